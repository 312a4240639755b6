//! Slots for nodes: which hold nodes of the newest checkpoint, of the one before, and of the one that is being made.
//!
//! A slot may be written as a whole only if none of the three uses it. What a checkpoint uses changes only by what its parents' new
//! images say ([`SlotChanges`]), so the map that is stored equals what can be reached from the stored roots.
//!
//! No I/O, no locks of its own: [`super::Forest`] keeps it under a mutex that is a leaf of the lock order.

use std::collections::{BTreeMap, BTreeSet};

use smallvec::SmallVec;

use crate::alloc::capacity::{in_ranges, reserved_ranges};
use crate::error::{Error, Result};
use crate::format::checkpoint::{MAP_PAGE_ENTRIES, MapEntry};
use crate::format::node::{NodeAddress, NodePointer};
use crate::format::superblock::Superblock;
use crate::units::{BucketIndex, DeviceIndex};

/// How often each slot was added (+1) or dropped (-1) by what parents point to.
#[derive(Clone, Debug, Default)]
pub(super) struct SlotChanges(BTreeMap<NodeAddress, i64>);

impl SlotChanges {
    /// A parent's entry changes from `old` to `new`.
    pub fn replace(&mut self, old: Option<&NodePointer>, new: Option<&NodePointer>) {
        for (pointer, by) in [(old, -1), (new, 1)] {
            for &copy in pointer.iter().flat_map(|pointer| &pointer.copies) {
                *self.0.entry(copy).or_default() += by;
            }
        }
    }

    /// Adds up with other changes.
    pub fn add(&mut self, other: &Self) {
        for (&address, &by) in &other.0 {
            *self.0.entry(address).or_default() += by;
        }
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct BucketSlots {
    /// Used by the newest checkpoint.
    newest: u64,
    /// Used by the one before.
    previous: u64,
    /// Allocated for the one that is being made.
    pending: u64,
    /// Page of the map that describes this bucket.
    page: usize,
}

impl BucketSlots {
    fn taken(&self) -> u64 {
        self.newest | self.previous | self.pending
    }
}

type BucketKey = (u8, u64);

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct NodeSpace {
    bucket_bytes: u64,
    node_bytes: u64,
    /// Buckets of each device.
    bucket_counts: Vec<u64>,
    /// Fixed areas of each device: whatever maps and keys say, no slot there is handed out.
    fixed: Vec<Vec<(u64, u64)>>,
    buckets: BTreeMap<BucketKey, BucketSlots>,
    /// Those with a free slot.
    with_free: BTreeSet<BucketKey>,
    /// Number of buckets on each page of the map.
    page_fill: Vec<usize>,
}

impl NodeSpace {
    pub fn new(superblock: &Superblock) -> Self {
        Self {
            bucket_bytes: u64::from(superblock.geometry.bucket_bytes),
            node_bytes: u64::from(superblock.geometry.node_bytes),
            bucket_counts: superblock.members.iter().map(|member| member.bucket_count).collect(),
            fixed: (0..).take(superblock.members.len()).map(|device| reserved_ranges(superblock, device)).collect(),
            buckets: BTreeMap::new(),
            with_free: BTreeSet::new(),
            page_fill: Vec::new(),
        }
    }

    fn slots_per_bucket(&self) -> u32 {
        // At most 64: the superblock was validated.
        u32::try_from(self.bucket_bytes / self.node_bytes).unwrap_or(64).min(64)
    }

    fn mask(&self) -> u64 {
        u64::MAX >> (64 - self.slots_per_bucket().max(1))
    }

    fn locate(&self, address: NodeAddress) -> (BucketKey, u64) {
        let key = (address.device.0, address.offset / self.bucket_bytes);
        (key, 1 << (address.offset % self.bucket_bytes / self.node_bytes))
    }

    fn is_fixed(&self, key: BucketKey) -> bool {
        let ranges = self.fixed.get(usize::from(key.0));
        ranges.is_none_or(|ranges| in_ranges(ranges, (DeviceIndex(key.0), BucketIndex(key.1))))
    }

    fn refresh(&mut self, key: BucketKey) {
        let mask = self.mask();
        if self.buckets.get(&key).is_some_and(|slots| slots.taken() & mask != mask) && !self.is_fixed(key) {
            self.with_free.insert(key);
        } else {
            self.with_free.remove(&key);
        }
    }

    fn insert(&mut self, key: BucketKey, page: Option<usize>, change: impl FnOnce(&mut BucketSlots)) {
        if !self.buckets.contains_key(&key) {
            let page = page.unwrap_or_else(|| {
                let roomy = self.page_fill.iter().position(|&fill| fill < MAP_PAGE_ENTRIES);
                roomy.unwrap_or(self.page_fill.len())
            });
            if self.page_fill.len() <= page {
                self.page_fill.resize(page + 1, 0);
            }
            if let Some(fill) = self.page_fill.get_mut(page) {
                *fill += 1;
            }
            self.buckets.insert(key, BucketSlots { page, ..BucketSlots::default() });
        }
        if let Some(slots) = self.buckets.get_mut(&key) {
            change(slots);
        }
        self.refresh(key);
    }

    /// Takes over what a page of the newest checkpoint's map says.
    ///
    /// # Errors
    /// If it uses slots that cannot be.
    pub fn load_newest(&mut self, page: usize, entries: &[MapEntry]) -> Result<()> {
        for entry in entries {
            let device = usize::from(entry.device);
            if entry.used & !self.mask() != 0
                || self.bucket_counts.get(device).is_none_or(|&count| entry.bucket >= count)
            {
                let problem = format!("bucket {} of device {}: slots {:#x}", entry.bucket, entry.device, entry.used);
                return Err(Error::corrupt("node-space map", problem));
            }
            self.insert((entry.device, entry.bucket), Some(page), |slots| slots.newest = entry.used);
        }
        Ok(())
    }

    /// Takes over what was found by looking at the newest checkpoint's trees, in place of what its map says. Buckets without a node stay claimed.
    ///
    /// # Errors
    /// If there can be no such slots; then nothing is taken over.
    pub fn correct_newest(&mut self, used: &[(u8, u64, u64)]) -> Result<()> {
        for &(device, bucket, slots) in used {
            let exists = self.bucket_counts.get(usize::from(device)).is_some_and(|&count| bucket < count);
            if !exists || slots & !self.mask() != 0 {
                let problem = format!("bucket {bucket} of device {device}: slots {slots:#x}");
                return Err(Error::corrupt("pointers to nodes", problem));
            }
        }
        for slots in self.buckets.values_mut() {
            slots.newest = 0;
        }
        for &(device, bucket, used) in used.iter().filter(|(.., slots)| *slots != 0) {
            self.insert((device, bucket), None, |slots| slots.newest = used);
        }
        let keys: Vec<BucketKey> = self.buckets.keys().copied().collect();
        for key in keys {
            self.refresh(key);
        }
        Ok(())
    }

    /// Takes over what the map of the checkpoint before says.
    pub fn load_previous(&mut self, entries: &[MapEntry]) {
        for entry in entries {
            // A bucket that only the older one knows was given back since: it is not ours to write.
            let key = (entry.device, entry.bucket);
            if let Some(slots) = self.buckets.get_mut(&key) {
                slots.previous = entry.used;
                self.refresh(key);
            }
        }
    }

    /// Adds a bucket that was given to nodes. Nothing if it is known.
    pub fn add_bucket(&mut self, device: DeviceIndex, bucket: BucketIndex) {
        self.insert((device.0, bucket.0), None, |_| ());
    }

    /// Forgets a bucket that was given back.
    ///
    /// # Errors
    /// If the newest checkpoint has nodes in it.
    pub fn forget_bucket(&mut self, device: DeviceIndex, bucket: BucketIndex) -> Result<()> {
        let key = (device.0, bucket.0);
        match self.buckets.get(&key) {
            None => Ok(()),
            Some(slots) if slots.newest | slots.pending != 0 => {
                let problem = format!("bucket {bucket} of device {device} was given back with nodes in it");
                Err(Error::corrupt("node-space map", problem))
            }
            Some(slots) => {
                if let Some(fill) = self.page_fill.get_mut(slots.page) {
                    *fill = fill.saturating_sub(1);
                }
                self.buckets.remove(&key);
                self.with_free.remove(&key);
                Ok(())
            }
        }
    }

    /// Slots that may be written as a whole.
    pub fn free_slots(&self) -> usize {
        let mask = self.mask();
        let free = |key: &BucketKey| self.buckets.get(key).map_or(0, |slots| (!slots.taken() & mask).count_ones());
        self.with_free.iter().map(|key| free(key) as usize).sum()
    }

    /// Slots that nodes of the newest checkpoint take.
    pub fn used_slots(&self) -> usize {
        self.buckets.values().map(|slots| slots.newest.count_ones() as usize).sum()
    }

    /// Slots of all buckets.
    pub fn claimed_slots(&self) -> usize {
        self.buckets.len() * self.bucket_slots()
    }

    /// Whether there are slots that only the checkpoint before the newest uses: the next one frees them.
    pub fn is_aging(&self) -> bool {
        self.buckets.values().any(|slots| slots.previous & !slots.newest != 0)
    }

    /// Nodes of the newest checkpoint that would move down if they were written whole: at most `count` of their slots, from the uppermost buckets of each half
    /// that have a free slot below them.
    pub fn movable(&self, count: usize) -> Vec<NodeAddress> {
        let mut found = Vec::new();
        for half in [false, true] {
            let Some(lowest) = self.first_free(|key| self.half(key) == half) else { continue };
            let above = self.buckets.range(lowest..).rev().filter(|(key, slots)| {
                **key != lowest && self.half(**key) == half && slots.newest != 0 && slots.newest != self.mask()
            });
            let slots = above.flat_map(|(key, slots)| {
                let used = (0..self.slots_per_bucket()).filter(move |slot| slots.newest & 1 << slot != 0);
                used.map(move |slot| NodeAddress {
                    device: DeviceIndex(key.0),
                    offset: key.1 * self.bucket_bytes + u64::from(slot) * self.node_bytes,
                })
            });
            found.extend(slots.take(count / 2));
        }
        found
    }

    /// Slots of a bucket.
    pub fn bucket_slots(&self) -> usize {
        self.slots_per_bucket() as usize
    }

    fn half(&self, key: BucketKey) -> bool {
        self.bucket_counts.get(usize::from(key.0)).is_some_and(|&count| key.1 >= count / 2)
    }

    /// The first bucket with a free slot for which `suits`. Lower buckets fill first, so that upper ones empty.
    fn first_free(&self, suits: impl Fn(BucketKey) -> bool) -> Option<BucketKey> {
        self.with_free.iter().copied().find(|&key| suits(key))
    }

    /// Takes slots for the copies of one node: on different devices where there are several, else in different halves of the device,
    /// at least in different buckets. `None` if there are not enough.
    pub fn allocate(&mut self, copies: usize) -> Option<SmallVec<[NodeAddress; 2]>> {
        let mut keys: SmallVec<[BucketKey; 4]> = SmallVec::new();
        for copy in 0..copies {
            let fresh = |key: BucketKey| !keys.contains(&key);
            let other_device = |key: BucketKey| keys.iter().all(|taken| taken.0 != key.0);
            let mut found = None;
            if copy > 0 && self.bucket_counts.len() > 1 {
                found = self.first_free(|key| fresh(key) && other_device(key));
            }
            let wanted_half = copy % 2 == 1;
            found = found
                .or_else(|| self.first_free(|key| fresh(key) && self.half(key) == wanted_half))
                .or_else(|| self.first_free(fresh));
            keys.push(found?);
        }
        let mask = self.mask();
        let mut addresses = SmallVec::new();
        for key in keys {
            let slots = self.buckets.get_mut(&key)?;
            let slot = (!slots.taken() & mask).trailing_zeros();
            slots.pending |= 1 << slot;
            let offset = key.1 * self.bucket_bytes + u64::from(slot) * self.node_bytes;
            addresses.push(NodeAddress { device: DeviceIndex(key.0), offset });
            self.refresh(key);
        }
        Some(addresses)
    }

    /// The map that a checkpoint with these changes stores: its pages, by index.
    ///
    /// # Errors
    /// [`Error::Corrupt`] if a slot would be used twice or dropped without having been used: the map of the checkpoint that was opened, or a pointer
    /// in its trees, is not what it should be.
    pub fn pages(&self, changes: &SlotChanges) -> Result<Vec<Vec<MapEntry>>> {
        let mut newest: BTreeMap<BucketKey, u64> =
            self.buckets.iter().map(|(key, slots)| (*key, slots.newest)).collect();
        let bad = |problem: String| Error::corrupt("node-space map", problem);
        for (&address, &by) in &changes.0 {
            let (key, bit) = self.locate(address);
            let used = newest
                .get_mut(&key)
                .ok_or_else(|| bad(format!("a node lies at {address:?}, which is no bucket of nodes")))?;
            match (by, *used & bit != 0) {
                (0, _) => {}
                (1, false) => *used |= bit,
                (-1, true) => *used &= !bit,
                (by, was) => {
                    return Err(bad(format!("slot {address:?} changes by {by}, and was used: {was}")));
                }
            }
        }
        let mut pages = vec![Vec::new(); self.page_fill.len()];
        for (key, used) in newest {
            let page = self.buckets.get(&key).map_or(0, |slots| slots.page);
            if let Some(entries) = pages.get_mut(page) {
                entries.push(MapEntry { device: key.0, bucket: key.1, used });
            }
        }
        Ok(pages)
    }

    /// The checkpoint with these pages is durable: what only the one before the previous used is free.
    pub fn publish(&mut self, pages: &[Vec<MapEntry>]) {
        for slots in self.buckets.values_mut() {
            slots.previous = slots.newest;
            slots.pending = 0;
        }
        for entry in pages.iter().flatten() {
            if let Some(slots) = self.buckets.get_mut(&(entry.device, entry.bucket)) {
                slots.newest = entry.used;
            }
        }
        let keys: Vec<BucketKey> = self.buckets.keys().copied().collect();
        for key in keys {
            self.refresh(key);
        }
    }

    /// Buckets that no kept checkpoint uses, the uppermost first, of which giving back `count` leaves at least `keep_slots` slots.
    pub fn surplus(&self, keep_slots: usize, count: usize) -> Vec<(DeviceIndex, BucketIndex)> {
        let spare = self.free_slots().saturating_sub(keep_slots) / self.bucket_slots().max(1);
        let empty = self.buckets.iter().rev().filter(|(key, slots)| slots.taken() == 0 && !self.is_fixed(**key));
        empty.map(|(&(device, bucket), _)| (DeviceIndex(device), BucketIndex(bucket))).take(spare.min(count)).collect()
    }

    /// Slots that the newest checkpoint uses, for comparing with what can be reached.
    #[cfg(test)]
    pub fn used_by_newest(&self) -> BTreeSet<NodeAddress> {
        let mut used = BTreeSet::new();
        for (key, slots) in &self.buckets {
            for slot in 0..self.slots_per_bucket() {
                if slots.newest & 1 << slot != 0 {
                    let offset = key.1 * self.bucket_bytes + u64::from(slot) * self.node_bytes;
                    used.insert(NodeAddress { device: DeviceIndex(key.0), offset });
                }
            }
        }
        used
    }
}
