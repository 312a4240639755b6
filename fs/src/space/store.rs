//! How the allocator's search reaches the trees.

use crate::alloc::{BucketStore, FreeBatch, FreeCandidate};
use crate::error::Result;
use crate::format::space::{BucketState, DeviceUsage, FreeBucket};
use crate::format::{BtreeId, Position};
use crate::transaction::{CommitOptions, Transaction};
use crate::units::{BucketIndex, DeviceIndex};

use super::{Space, bucket_position};

/// Never-used buckets that become free at a time.
const EXTEND_BUCKETS: usize = 64;
/// Packed bytes of a key in the free-space tree.
const FREE_KEY_BYTES: usize = 29;

/// The trees as a [`BucketStore`].
pub(super) struct Store<'a> {
    space: &'a Space,
}

impl<'a> Store<'a> {
    pub(super) fn new(space: &'a Space) -> Self {
        Self { space }
    }
}

/// The untouched mark of a device, as this transaction sees it.
pub(super) fn untouched_from(transaction: &mut Transaction<'_>, device: DeviceIndex) -> Result<u64> {
    let value = transaction.get(BtreeId::Devices, Position::new(u64::from(device.0), 0, 0))?;
    Ok(value.map(|value| DeviceUsage::decode(&value)).transpose()?.map_or(0, |usage| usage.untouched_from))
}

impl BucketStore for Store<'_> {
    fn free_buckets(&self, device: DeviceIndex, from: BucketIndex, limit: usize) -> Result<FreeBatch> {
        let space = self.space;
        let end = Position::new(u64::from(device.0), u64::MAX, u32::MAX);
        let mut cursor = Position::new(u64::from(device.0), from.0, 0);
        let mut batch = FreeBatch::default();
        while batch.candidates.is_empty() {
            let scan = space.transactions.forest().scan(BtreeId::FreeSpace, cursor, end, limit)?;
            for (position, value) in scan.keys {
                let key = (device, BucketIndex(position.offset));
                // A key that is damaged must not hand out the journal.
                if space.is_fixed(key) {
                    continue;
                }
                let discarded = FreeBucket::decode(&value)?.discarded;
                let bucket = space.bucket(key)?;
                // It may have been opened and counted since the scan; the search forgets such candidates anyway.
                if bucket.state == BucketState::Free {
                    batch.candidates.push(FreeCandidate { key, generation: bucket.generation, discarded });
                }
            }
            match scan.covered_to.successor().filter(|next| *next <= end) {
                Some(next) => cursor = next,
                None => return Ok(batch),
            }
        }
        let next = if cursor.snapshot > 0 { cursor.offset.saturating_add(1) } else { cursor.offset };
        batch.next = Some(BucketIndex(next));
        Ok(batch)
    }

    fn extend(&self, device: DeviceIndex) -> Result<u64> {
        let space = self.space;
        let count_max = EXTEND_BUCKETS.min(space.transactions.forest().leaf_bytes_max() / (2 * FREE_KEY_BYTES)).max(1);
        let bucket_count = space.bucket_count(device);
        let reserved = space.reserved(device);
        let committed = space.transactions.run(CommitOptions::reclaim(), |transaction| {
            let mark = untouched_from(transaction, device)?;
            let mut fresh = Vec::new();
            let mut next = mark;
            while next < bucket_count && fresh.len() < count_max {
                if let Some(end) = range_end(reserved, next) {
                    next = end;
                    continue;
                }
                fresh.push(BucketIndex(next));
                next += 1;
            }
            if next == mark {
                return Ok(0);
            }
            // Buckets above the mark that have a key were claimed for nodes: theirs is the say.
            let last = Position::new(u64::from(device.0), next - 1, u32::MAX);
            let from = bucket_position((device, BucketIndex(mark)));
            let known = transaction.range(BtreeId::Buckets, from, last, usize::MAX)?;
            fresh.retain(|bucket| known.binary_search_by_key(&bucket.0, |(position, _)| position.offset).is_err());
            for bucket in &fresh {
                let free = FreeBucket { discarded: true };
                transaction.put(BtreeId::FreeSpace, bucket_position((device, *bucket)), free.encode());
            }
            let usage = DeviceUsage { untouched_from: next };
            transaction.put(BtreeId::Devices, Position::new(u64::from(device.0), 0, 0), usage.encode());
            // A step over fixed areas alone is progress too.
            Ok(next - mark)
        })?;
        Ok(committed.value)
    }
}

/// The end of the fixed area that `bucket` is in.
pub(super) fn range_end(ranges: &[(u64, u64)], bucket: u64) -> Option<u64> {
    let index = ranges.partition_point(|&(first, _)| first <= bucket).checked_sub(1)?;
    ranges.get(index).map(|&(_, end)| end).filter(|end| bucket < *end)
}
