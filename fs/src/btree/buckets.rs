//! Buckets for nodes: where they come from, claiming enough of them before a checkpoint.
//!
//! No lock is held while a claim or a release runs its transaction.

use super::Forest;
use super::log::CheckpointLog;
use super::node::Node;
use crate::error::{Error, Result};
use crate::format::Position;
use crate::sync::Arc;
use crate::sync::atomic::Ordering;
use crate::units::{BucketIndex, DeviceIndex, JournalSequence};

/// Where buckets for nodes come from. The calls run a journalled transaction each, and hold no node lock when they are made.
pub trait NodeBuckets: Send + Sync {
    /// Gives `count` free buckets to nodes, in as few transactions as can be; more or fewer than asked, but not none. Must not wait for a
    /// checkpoint.
    ///
    /// # Errors
    /// If there are none.
    fn claim(&self, count: usize) -> Result<Vec<(DeviceIndex, BucketIndex)>>;
    /// Takes buckets back that no kept checkpoint uses, in one transaction.
    ///
    /// # Errors
    /// If the transaction fails.
    fn release(&self, buckets: &[(DeviceIndex, BucketIndex)]) -> Result<JournalSequence>;
}

impl Forest {
    /// Gives the forest its source of buckets. Without one it can only use what it has.
    pub fn set_node_buckets(&self, node_buckets: Arc<dyn NodeBuckets>) {
        let _ = self.node_buckets.set(node_buckets);
    }

    /// Bytes of the slots that the trees' nodes take, or will take with the next checkpoint, all copies counted; each tree's root is
    /// counted even while it is empty. No lock.
    #[must_use]
    pub fn node_bytes(&self) -> u64 {
        let nodes = u64::try_from(self.node_count.load(Ordering::Relaxed)).unwrap_or(0);
        nodes * (self.limits.copies * self.limits.node_bytes) as u64
    }

    /// Slots that a checkpoint would take now: full images of dirty nodes, and some for their parents.
    pub(super) fn estimate_slots(&self) -> usize {
        let dirty: Vec<Arc<Node>> = self.dirty.lock().nodes.values().cloned().collect();
        let mut full = 0;
        for node in &dirty {
            full += usize::from(node.content.read().needs_slot());
        }
        (full + full / 8 + 8) * self.limits.copies
    }

    /// Makes sure of `slots` free slots if buckets can be had. What is claimed is durable before a checkpoint is published, this one or a later.
    pub(super) fn ensure_slots(&self, slots: usize, log: &dyn CheckpointLog) -> Result<()> {
        loop {
            let (free, bucket_slots) = {
                let space = self.space.lock();
                (space.free_slots(), space.bucket_slots())
            };
            if free >= slots {
                return Ok(());
            }
            let Some(node_buckets) = self.node_buckets.get() else {
                return Err(Error::NoSpace("there are no buckets for B-tree nodes"));
            };
            let count = (slots - free).div_ceil(bucket_slots.max(1)).max(self.limits.copies);
            let buckets = node_buckets.claim(count)?;
            if buckets.is_empty() {
                return Err(Error::NoSpace("no bucket can be given to B-tree nodes"));
            }
            self.count_on(log.newest());
            let mut space = self.space.lock();
            for (device, bucket) in buckets {
                space.add_bucket(device, bucket);
            }
        }
    }

    /// The journal, replayed, says that a bucket is, or is no longer, for nodes. Noted for [`Self::end_replay`].
    pub(super) fn replay_bucket(&self, position: Position, value: Option<&[u8]>) -> Result<()> {
        use crate::format::space::{Bucket, BucketState};
        let device = u8::try_from(position.inode)
            .map_err(|_| Error::corrupt("journal", format!("a bucket of device {}", position.inode)))?;
        let (device, bucket) = (DeviceIndex(device), BucketIndex(position.offset));
        let state = value.map(Bucket::decode).transpose()?.map_or(BucketState::Free, |bucket| bucket.state);
        let is_claimed = state == BucketState::Metadata;
        if is_claimed {
            let known = self.reader.superblock.members.get(usize::from(device.0));
            if known.is_none_or(|member| bucket.0 >= member.bucket_count) {
                return Err(Error::corrupt("journal", format!("bucket {bucket} of device {device} does not exist")));
            }
        }
        self.replayed_buckets.lock().insert((device, bucket), is_claimed);
        Ok(())
    }

    /// All of the journal is replayed: its last word on each bucket holds. An earlier one may not: a bucket that became free after the newest
    /// checkpoint's F can have been claimed by that checkpoint, which names nodes in it.
    ///
    /// # Errors
    /// [`Error::Corrupt`] if a bucket was given back in which the newest checkpoint has nodes.
    pub fn end_replay(&self) -> Result<()> {
        let buckets = std::mem::take(&mut *self.replayed_buckets.lock());
        let mut space = self.space.lock();
        for ((device, bucket), is_claimed) in buckets {
            if is_claimed {
                space.add_bucket(device, bucket);
            } else {
                space.forget_bucket(device, bucket)?;
            }
        }
        Ok(())
    }
}
