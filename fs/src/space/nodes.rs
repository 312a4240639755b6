//! Buckets for B-tree nodes. Copies go to different halves of the device, so that what destroys one end leaves a copy.
//!
//! Called from within checkpoints: a claim waits for nothing that a checkpoint does, and takes the last free bucket if it must. The
//! metadata's reserve makes that one be there.

use std::sync::Weak;

use crate::alloc::{BucketKey, BucketStore};
use crate::btree::NodeBuckets;
use crate::error::{Error, Result};
use crate::format::space::BucketState;
use crate::format::{BtreeId, Position};
use crate::journal::JournalWatermark;
use crate::sync::Arc;
use crate::sync::atomic::Ordering;
use crate::transaction::{BucketChange, CommitOptions};
use crate::units::{BucketIndex, DeviceIndex, JournalSequence};

use super::store::{Store, range_end, untouched_from};
use super::{Space, bucket_position};

/// Most buckets that one transaction claims.
const CLAIM_BUCKETS_MAX: usize = 64;
/// Bytes that a claim may put into one leaf, for each bucket.
const CLAIM_LEAF_BYTES: usize = 64;
/// Emptied buckets that are freed when a claim finds no free ones: at least so many.
const FREE_BUCKETS_MIN: usize = 16;

/// Half of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Half {
    /// The first half.
    Low,
    /// The second.
    High,
}

/// A bucket that was claimed for nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeBucket {
    /// Device.
    pub device: DeviceIndex,
    /// Bucket.
    pub bucket: BucketIndex,
    /// The half that it lies in, which may not be the one that was asked for when space is short.
    pub half: Half,
}

/// The forest's way to its buckets. Weak, because space holds the forest.
struct NodeSource(Weak<Space>);

impl NodeSource {
    fn space(&self) -> Result<Arc<Space>> {
        self.0.upgrade().ok_or(Error::Shutdown)
    }
}

impl NodeBuckets for NodeSource {
    fn claim(&self, count: usize) -> Result<Vec<BucketKey>> {
        let claimed = self.space()?.claim_node_buckets(count)?;
        Ok(claimed.into_iter().map(|claimed| (claimed.device, claimed.bucket)).collect())
    }

    fn release(&self, buckets: &[BucketKey]) -> Result<JournalSequence> {
        self.space()?.release_node_buckets(buckets)
    }
}

impl Space {
    /// What the forest claims its buckets through. Does not keep this alive.
    #[must_use]
    pub fn node_buckets(self: &Arc<Self>) -> Arc<dyn NodeBuckets> {
        Arc::new(NodeSource(Arc::downgrade(self)))
    }

    /// Claims `count` buckets for nodes, or as many as there are: with two copies of metadata every other one in the upper half. All of them in one
    /// transaction where that fits a leaf, and with at most one look at what was emptied: this is what the journal's reserve for checkpoints is
    /// made for. The claims are durable when the journal is flushed up to its newest record.
    ///
    /// # Errors
    /// [`Error::NoSpace`] if no bucket is left at all; the device's.
    pub fn claim_node_buckets(&self, count: usize) -> Result<Vec<NodeBucket>> {
        let at_once = (self.transactions.forest().leaf_bytes_max() / CLAIM_LEAF_BYTES).clamp(8, CLAIM_BUCKETS_MAX);
        let mut claimed = Vec::with_capacity(count);
        let mut may_free = true;
        while claimed.len() < count {
            let held = self.hold_many(claimed.len(), at_once.min(count - claimed.len()))?;
            if held.is_empty() {
                if std::mem::take(&mut may_free) && self.free_for_nodes(count - claimed.len())? {
                    continue;
                }
                break;
            }
            let outcome = self.transactions.run(CommitOptions::checkpoint(), |transaction| {
                for key in &held {
                    let change = BucketChange { to_state: Some(BucketState::Metadata), ..BucketChange::default() };
                    transaction.change_bucket(key.0, key.1, change);
                }
                Ok(())
            });
            for key in &held {
                self.allocator.finish(*key, None, false);
            }
            match outcome {
                Ok(_) => claimed.extend(held.iter().map(|&key| NodeBucket {
                    device: key.0,
                    bucket: key.1,
                    half: self.half_of(key),
                })),
                // Those that were claimed are the caller's; the next call meets the error again.
                Err(_) if !claimed.is_empty() => break,
                Err(error) => return Err(error),
            }
        }
        self.refresh_node_bytes();
        if claimed.is_empty() {
            self.journal.checkpoint_starved();
            return Err(Error::NoSpace("no bucket is left for metadata"));
        }
        Ok(claimed)
    }

    /// Holds up to `count` free buckets, of which the first is the `index`th of a claim.
    fn hold_many(&self, index: usize, count: usize) -> Result<Vec<BucketKey>> {
        let mut held = Vec::with_capacity(count);
        while held.len() < count && !self.is_refused() {
            let is_low = self.superblock.geometry.metadata_replicas < 2 || (index + held.len()).is_multiple_of(2);
            match self.hold_for_nodes(if is_low { Half::Low } else { Half::High }) {
                Ok(Some(key)) => held.push(key),
                Ok(None) => break,
                Err(error) => {
                    for key in held {
                        self.allocator.finish(key, None, false);
                    }
                    return Err(error);
                }
            }
        }
        Ok(held)
    }

    /// Makes free what was emptied, here and now. Returns whether there was anything.
    fn free_for_nodes(&self, count: usize) -> Result<bool> {
        self.allocator.close_empty();
        let Some((_, newest)) = self.allocator.emptied_span() else { return Ok(false) };
        self.journal.make_reusable(newest, JournalWatermark::Checkpoint)?;
        Ok(self.free_emptied(CommitOptions::checkpoint(), count.max(FREE_BUCKETS_MIN))? > 0)
    }

    /// Takes buckets back that no kept checkpoint uses, in one transaction. They are reusable when this is durable.
    ///
    /// # Errors
    /// The transaction's; [`Error::Bug`] if one is not a bucket of nodes.
    pub fn release_node_buckets(&self, buckets: &[BucketKey]) -> Result<JournalSequence> {
        let committed = self.transactions.run(CommitOptions::checkpoint(), |transaction| {
            for &(device, bucket) in buckets {
                let change = BucketChange { to_state: Some(BucketState::NeedDiscard), ..BucketChange::default() };
                transaction.change_bucket(device, bucket, change);
            }
            Ok(())
        })?;
        Ok(committed.sequence)
    }

    fn half_of(&self, (device, bucket): BucketKey) -> Half {
        if bucket.0 < self.bucket_count(device) / 2 { Half::Low } else { Half::High }
    }

    /// Used buckets before untouched ones, the half that was asked for before the other.
    fn hold_for_nodes(&self, half: Half) -> Result<Option<BucketKey>> {
        let other = if half == Half::Low { Half::High } else { Half::Low };
        for half in [half, other] {
            for device in (0..=u8::MAX).map(DeviceIndex).take(self.superblock.members.len()) {
                if let Some(key) = self.hold_used(device, half)? {
                    return Ok(Some(key));
                }
                if let Some(key) = self.hold_untouched(device, half)? {
                    return Ok(Some(key));
                }
            }
        }
        Ok(None)
    }

    fn half_range(&self, device: DeviceIndex, half: Half) -> (u64, u64) {
        let bucket_count = self.bucket_count(device);
        match half {
            Half::Low => (0, bucket_count / 2),
            Half::High => (bucket_count / 2, bucket_count),
        }
    }

    fn hold_used(&self, device: DeviceIndex, half: Half) -> Result<Option<BucketKey>> {
        let (first, end) = self.half_range(device, half);
        let mut from = BucketIndex(first);
        loop {
            let batch = Store::new(self).free_buckets(device, from, 64)?;
            for candidate in batch.candidates {
                if candidate.key.1.0 >= end {
                    return Ok(None);
                }
                if self.hold_if_free(candidate.key)? {
                    if !candidate.discarded {
                        self.allocator.add_undiscarded(-1);
                    }
                    return Ok(Some(candidate.key));
                }
            }
            match batch.next {
                Some(next) if next.0 < end && next > from => from = next,
                _ => return Ok(None),
            }
        }
    }

    /// A never-used bucket, above the mark or not: one that has no key.
    fn hold_untouched(&self, device: DeviceIndex, half: Half) -> Result<Option<BucketKey>> {
        let (first, end) = self.half_range(device, half);
        let reserved = self.reserved(device);
        let mark = untouched_from(&mut self.transactions.read(), device)?;
        // The cursor only saves looking at what was claimed before; it is device 0's.
        let slot = self.node_cursors.get(usize::from(half == Half::High));
        let slot = slot.filter(|_| device == DeviceIndex(0));
        let cursor = slot.map_or(0, |slot| slot.load(Ordering::Relaxed));
        let mut next = first.max(mark).max(cursor);
        while next < end {
            if let Some(after) = range_end(reserved, next) {
                next = after;
                continue;
            }
            let last = Position::new(u64::from(device.0), end - 1, u32::MAX);
            let from = bucket_position((device, BucketIndex(next)));
            let known = self.transactions.read().range(BtreeId::Buckets, from, last, 64)?;
            let window_end = known.last().filter(|_| known.len() == 64).map_or(end, |(last, _)| last.offset + 1);
            while next < window_end.min(end) {
                if let Some(after) = range_end(reserved, next) {
                    next = after;
                    continue;
                }
                let key = (device, BucketIndex(next));
                next += 1;
                let is_known = known.binary_search_by_key(&key.1.0, |(position, _)| position.offset).is_ok();
                if !is_known && self.hold_if_free(key)? {
                    if let Some(slot) = slot {
                        slot.store(next, Ordering::Relaxed);
                    }
                    return Ok(Some(key));
                }
            }
        }
        Ok(None)
    }
}
