//! The inodes in memory, by number, and how often the kernel has looked each up.
//!
//! Node ids are computed from inode numbers, so an object may be dropped and loaded again at any time while nothing is open, dirty or
//! unlinked: the table holds a bounded number of objects, and of the others only a count of lookups (24 bytes each), which
//! decides when an inode without a name may go.
//!
//! A shard's lock is a leaf; it is not held while the tree is read. A load that raced with an eviction of the same shard starts
//! again, so it never brings back what was true before.

use std::collections::VecDeque;

use hashbrown::HashMap;

use super::inode::VfsInode;
use crate::error::Result;
use crate::sync::{Arc, LockClass, Mutex, Rank};
use crate::units::InodeNumber;

const SHARDS: u64 = 64;
/// How many objects an insertion looks at to find one to drop.
const EVICTION_SCAN: usize = 8;

#[derive(Default)]
struct Entry {
    inode: Option<Arc<VfsInode>>,
    lookups: u64,
}

#[derive(Default)]
struct Shard {
    entries: HashMap<u64, Entry>,
    /// Numbers of the objects that are present, in the order in which they are considered for dropping. May name some twice.
    resident: VecDeque<u64>,
    resident_count: usize,
    /// Goes up with each object that is dropped.
    evictions: u64,
}

/// See the module's documentation.
pub(super) struct InodeTable {
    shards: Vec<Mutex<Shard>>,
    resident_max: usize,
}

impl std::fmt::Debug for InodeTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("InodeTable").field("resident_max", &self.resident_max).finish_non_exhaustive()
    }
}

impl Shard {
    fn drop_object(&mut self, number: u64) {
        if let Some(entry) = self.entries.get_mut(&number) {
            if entry.inode.take().is_some() {
                self.resident_count -= 1;
                self.evictions += 1;
            }
            if entry.lookups == 0 {
                self.entries.remove(&number);
            }
        }
    }

    fn evict(&mut self, resident_max: usize) -> Vec<Arc<VfsInode>> {
        let mut dropped = Vec::new();
        for _ in 0..EVICTION_SCAN {
            if self.resident_count <= resident_max {
                break;
            }
            let Some(number) = self.resident.pop_front() else { break };
            let Some(inode) = self.entries.get(&number).and_then(|entry| entry.inode.clone()) else { continue };
            // Two: the table's and ours. Nobody gets another without this shard's lock.
            if Arc::strong_count(&inode) == 2 && !inode.is_pinned() {
                self.drop_object(number);
                dropped.push(inode);
            } else {
                self.resident.push_back(number);
            }
        }
        dropped
    }
}

impl InodeTable {
    pub fn new(resident_max: usize) -> Self {
        let shards = (0..SHARDS).map(|_| Mutex::ranked(LockClass::new(Rank::OuterLeaf), Shard::default())).collect();
        Self { shards, resident_max: (resident_max / SHARDS as usize).max(4) }
    }

    fn shard(&self, number: InodeNumber) -> &Mutex<Shard> {
        let index = usize::try_from(number.0 % SHARDS).unwrap_or(0);
        // SHARDS of them were made.
        &self.shards[index]
    }

    /// The object, if it is in memory.
    pub fn get(&self, number: InodeNumber) -> Option<Arc<VfsInode>> {
        self.shard(number).lock().entries.get(&number.0)?.inode.clone()
    }

    /// The object, made by `load` (which reads the tree) if it is not in memory. `lookups` are added to its count.
    pub fn get_or_load(
        &self,
        number: InodeNumber,
        lookups: u64,
        mut load: impl FnMut() -> Result<Arc<VfsInode>>,
    ) -> Result<Arc<VfsInode>> {
        loop {
            let evictions = {
                let mut shard = self.shard(number).lock();
                if let Some(entry) = shard.entries.get_mut(&number.0)
                    && let Some(inode) = &entry.inode
                {
                    let inode = Arc::clone(inode);
                    entry.lookups += lookups;
                    return Ok(inode);
                }
                shard.evictions
            };
            let loaded = load()?;
            let mut shard = self.shard(number).lock();
            if shard.evictions != evictions {
                continue;
            }
            let entry = shard.entries.entry(number.0).or_default();
            entry.lookups += lookups;
            if let Some(present) = &entry.inode {
                return Ok(Arc::clone(present));
            }
            entry.inode = Some(Arc::clone(&loaded));
            shard.resident.push_back(number.0);
            shard.resident_count += 1;
            let dropped = shard.evict(self.resident_max);
            drop(shard);
            drop(dropped);
            return Ok(loaded);
        }
    }

    /// Counts lookups of an inode whose object is held.
    pub fn add_lookups(&self, number: InodeNumber, lookups: u64) {
        self.shard(number).lock().entries.entry(number.0).or_default().lookups += lookups;
    }

    /// Gives lookups back; returns whether none is left.
    pub fn forget(&self, number: InodeNumber, lookups: u64) -> bool {
        let mut shard = self.shard(number).lock();
        let Some(entry) = shard.entries.get_mut(&number.0) else { return true };
        entry.lookups = entry.lookups.saturating_sub(lookups);
        if entry.lookups > 0 {
            return false;
        }
        if entry.inode.is_none() {
            shard.entries.remove(&number.0);
        }
        true
    }

    /// Gives all lookups back: the kernel is gone.
    pub fn forget_all(&self) -> Vec<Arc<VfsInode>> {
        let mut present = Vec::new();
        for shard in &self.shards {
            let mut shard = shard.lock();
            shard.entries.retain(|_, entry| {
                entry.lookups = 0;
                entry.inode.is_some()
            });
            present.extend(shard.entries.values().filter_map(|entry| entry.inode.clone()));
        }
        present.sort_by_key(|inode| inode.number);
        present
    }

    /// Takes the object of an inode out if it has lost its last name and nobody has it open or looked up: it is to be deleted.
    pub fn take_unused_orphan(&self, number: InodeNumber) -> Option<Arc<VfsInode>> {
        let mut shard = self.shard(number).lock();
        let entry = shard.entries.get(&number.0)?;
        let inode = entry.inode.as_ref()?;
        if entry.lookups > 0 || inode.is_open() || inode.state().inode.link_count != 0 {
            return None;
        }
        let inode = Arc::clone(inode);
        shard.drop_object(number.0);
        Some(inode)
    }

    /// Number of objects in memory.
    pub fn resident_count(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().resident_count).sum()
    }
}
