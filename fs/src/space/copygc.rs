//! What copygc is asked to do: when, and with which bucket. The moving itself is `data`'s, who knows extents.

use crate::env::Event;
use crate::error::Result;
use crate::format::space::{Bucket, BucketState};
use crate::format::{BtreeId, Position};
use crate::sync::atomic::Ordering;
use crate::units::{BucketIndex, DeviceIndex};

use super::{Space, Watermark, bucket_position};

/// Buckets that one look at the buckets tree reads.
const LOOK_BUCKETS: usize = 512;

impl Space {
    /// Notified when copygc may have something to do.
    #[must_use]
    pub fn copygc_event(&self) -> &Event {
        &self.copygc_event
    }

    /// Whether free buckets are about to run out for file data. Emptied ones become free by themselves.
    #[must_use]
    pub fn copygc_needed(&self) -> bool {
        if self.waiters.load(Ordering::SeqCst) > 0 {
            return true;
        }
        let usage = self.allocator.usage();
        let counters = self.allocator.counters();
        let low = counters.floor_buckets(self.reserves(), Watermark::Normal) + self.reserves().copygc_buckets;
        usage.free_buckets + usage.need_discard_buckets < low
    }

    /// The bucket whose data copygc should move next: the emptiest, and only if moving it gives back an eighth of a bucket (any block, when
    /// somebody waits for space). A bucket is given once, until its count changes. `None` if there is none: whoever waits for space
    /// is told.
    ///
    /// # Errors
    /// The device's, or damage.
    pub fn fragmented_bucket(&self) -> Result<Option<(DeviceIndex, BucketIndex)>> {
        let bucket_bytes = self.reserves().bucket_bytes;
        let urgent = self.waiters.load(Ordering::SeqCst) > 0;
        let gain = if urgent { self.reserves().block_bytes } else { bucket_bytes / 8 };
        let charge_max = bucket_bytes.saturating_sub(gain);
        let mut looked_round = false;
        loop {
            let candidate = self.allocator.fragmentation().lock().take_lowest(charge_max, bucket_bytes / 2);
            match candidate {
                Some(key) if self.allocator.is_open(key) => {}
                Some(key) => {
                    let bucket = self.bucket(key)?;
                    if bucket.state == BucketState::Data && bucket.charged_bytes <= charge_max {
                        self.copygc_exhausted.store(false, Ordering::SeqCst);
                        return Ok(Some(key));
                    }
                }
                None if looked_round || self.allocator.fragmentation().lock().knows_all_below(charge_max) => {
                    if urgent {
                        self.copygc_exhausted.store(true, Ordering::SeqCst);
                        self.allocator.changed().notify();
                    }
                    return Ok(None);
                }
                None => looked_round = self.look_for_fragmented()?,
            }
        }
    }

    /// Reads on in the buckets tree. Returns whether its end was reached.
    fn look_for_fragmented(&self) -> Result<bool> {
        let block_bytes = self.reserves().block_bytes;
        let start = self.allocator.fragmentation().lock().begin_look();
        let from = start.map_or(Position::MIN, bucket_position);
        let scan = self.transactions.forest().scan(BtreeId::Buckets, from, Position::MAX, LOOK_BUCKETS)?;
        for (position, value) in scan.keys {
            let Ok(device) = u8::try_from(position.inode) else { continue };
            let key = (DeviceIndex(device), BucketIndex(position.offset));
            let bucket = Bucket::decode(&value)?;
            if bucket.state == BucketState::Data
                && bucket.charged_bytes.saturating_add(block_bytes) <= self.reserves().bucket_bytes
                && !self.allocator.is_open(key)
            {
                self.allocator.fragmentation().lock().note(key, bucket.charged_bytes);
            }
        }
        let next = scan.covered_to.successor().and_then(|next| {
            let offset = if next.snapshot > 0 { next.offset.checked_add(1)? } else { next.offset };
            u8::try_from(next.inode).ok().map(|device| (DeviceIndex(device), BucketIndex(offset)))
        });
        self.allocator.fragmentation().lock().end_look(next);
        Ok(next.is_none())
    }
}
