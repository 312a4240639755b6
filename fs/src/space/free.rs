//! From emptied to free: in the background, when the emptying is durable and nobody reads the bucket; and lazily to the host.
//!
//! A hole that is punched costs the host a metadata commit when it is written again, so buckets are kept as they are for reuse, and only
//! what is more than [`keep`](FreeWorker) is given back, in batches.

use std::time::Duration;

use crate::alloc::{FreeCandidate, TestSwitches};
use crate::env::{Event, Progress, Worker};
use crate::error::{Error, Result};
use crate::format::space::{BucketState, FreeBucket};
use crate::format::{BtreeId, Position};
use crate::sync::atomic::Ordering;
use crate::sync::{Arc, Mutex};
use crate::transaction::{BucketChange, CommitOptions};
use crate::units::{BucketIndex, DeviceIndex, JournalSequence};

use super::{Space, bucket_position};

/// Buckets freed by one transaction.
const FREE_BATCH: usize = 16;
/// Buckets punched by one transaction.
const PUNCH_BATCH: usize = 16;
/// Fewest undiscarded free buckets that are kept for reuse.
const KEEP_BUCKETS_MIN: u64 = 64;
/// How soon to look whether what was emptied has become reusable, or is no longer read.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// The same when space is short.
const LOOK_SOON: Duration = Duration::from_millis(5);
/// How long to wait for space for what freeing writes down.
const RETRY_SPACE: Duration = Duration::from_millis(100);
/// How long an emptied bucket may wait for somebody else's flush before the worker asks for one.
const PATIENCE: Duration = Duration::from_secs(1);

impl Space {
    /// Queues the buckets that were emptied before the mount. They wait for a record of this life to say that the recovered log is durable.
    pub(super) fn load_emptied(&self) -> Result<()> {
        let newest = self.journal.newest();
        let keys = self.transactions.read().range(BtreeId::NeedDiscard, Position::MIN, Position::MAX, usize::MAX)?;
        for (position, _) in keys {
            let Ok(device) = u8::try_from(position.inode) else { continue };
            let key = (DeviceIndex(device), BucketIndex(position.offset));
            // A key that is damaged must not hand out the journal.
            if !self.is_fixed(key) {
                self.allocator.add_emptied(key, newest);
            }
        }
        Ok(())
    }

    /// Frees up to `limit` emptied buckets whose emptying is durable. Returns how many.
    pub(super) fn free_emptied(&self, options: CommitOptions, limit: usize) -> Result<usize> {
        // What is held here is what others wait for.
        let _quiet = self.env.quiet();
        let reusable = match &self.switches {
            TestSwitches { reuse_too_early: true, .. } => JournalSequence(u64::MAX),
            TestSwitches { reuse_after_one_flush: true, .. } => self.journal.flushed(),
            _ => self.journal.reusable(),
        };
        let is_first = self.switches.reuse_too_early || self.switches.reuse_first;
        let mut freed_count = 0;
        while freed_count < limit {
            let emptied = self.allocator.eligible(reusable, FREE_BATCH.min(limit - freed_count));
            if emptied.is_empty() {
                break;
            }
            let outcome = self.transactions.run(options, |transaction| {
                let mut freed = Vec::new();
                for candidate in &emptied {
                    let value = transaction.get(BtreeId::Buckets, bucket_position(candidate.key))?;
                    let bucket = super::decode_bucket(value.as_deref())?;
                    // News of an emptying may come after the bucket was counted again.
                    let same = candidate.generation.is_none_or(|generation| generation == bucket.generation);
                    if bucket.state == BucketState::NeedDiscard && same {
                        let (device, index) = candidate.key;
                        let change = BucketChange { to_state: Some(BucketState::Free), ..BucketChange::default() };
                        transaction.change_bucket(device, index, change);
                        freed.push((candidate.key, bucket.generation));
                    }
                }
                Ok(freed)
            });
            let freed = match outcome {
                Ok(committed) => committed.value,
                Err(error) => {
                    for candidate in emptied {
                        self.allocator.put_back(candidate);
                    }
                    return Err(error);
                }
            };
            for candidate in &emptied {
                let generation = freed.iter().find(|(key, _)| *key == candidate.key).map(|(_, generation)| *generation);
                let free =
                    generation.map(|generation| FreeCandidate { key: candidate.key, generation, discarded: false });
                self.allocator.finish(candidate.key, free, is_first);
            }
            freed_count += freed.len();
            self.allocator.add_undiscarded(i64::try_from(freed.len()).unwrap_or(0));
        }
        Ok(freed_count)
    }

    /// Gives some surplus free buckets back to the host. Returns how many.
    fn punch_surplus(&self) -> Result<usize> {
        let keep = (self.reserves().usable_buckets / 16).max(KEEP_BUCKETS_MIN);
        let surplus = self.allocator.undiscarded().saturating_sub(keep);
        let limit = PUNCH_BATCH.min(usize::try_from(surplus).unwrap_or(PUNCH_BATCH));
        if limit == 0 || self.discards_fail.load(Ordering::Relaxed) {
            return Ok(0);
        }
        let _quiet = self.env.quiet();
        let held = self.hold_undiscarded(limit)?;
        if held.is_empty() {
            // Fewer than was thought: start counting afresh.
            self.allocator.add_undiscarded(-i64::try_from(surplus).unwrap_or(0));
            return Ok(0);
        }
        let outcome = self.punch(&held);
        for key in &held {
            self.allocator.finish(*key, None, false);
        }
        if !outcome? {
            return Ok(0);
        }
        self.allocator.add_undiscarded(-i64::try_from(held.len()).unwrap_or(0));
        Ok(held.len())
    }

    /// Gives these free buckets back to the host. Whether it took them.
    fn punch(&self, held: &[(DeviceIndex, BucketIndex)]) -> Result<bool> {
        let bucket_bytes = self.reserves().bucket_bytes;
        let mut runs: Vec<(DeviceIndex, u64, u64)> = Vec::new();
        for &(device, bucket) in held {
            match runs.last_mut() {
                Some((last, first, count)) if *last == device && *first + *count == bucket.0 => *count += 1,
                _ => runs.push((device, bucket.0, 1)),
            }
        }
        for (device, first, count) in runs {
            if let Some(target) = self.devices.get(usize::from(device.0))
                && let Err(error) = target.discard(first * bucket_bytes, count * bucket_bytes)
            {
                // What is there now may be anything, as it was before: nothing is lost but the host's space.
                if matches!(error, Error::Latched { .. }) {
                    return Err(error);
                }
                tracing::warn!("free space is no longer given back to the host: {error}");
                self.discards_fail.store(true, Ordering::Relaxed);
                return Ok(false);
            }
            self.metrics.buckets_discarded.add(count);
        }
        self.transactions.run(CommitOptions::reclaim(), |transaction| {
            for &(device, bucket) in held {
                let change =
                    BucketChange { to_state: Some(BucketState::Free), discarded: true, ..BucketChange::default() };
                transaction.change_bucket(device, bucket, change);
            }
            Ok(())
        })?;
        Ok(true)
    }

    /// Holds free buckets that the host was not told of, from the cursor on.
    fn hold_undiscarded(&self, limit: usize) -> Result<Vec<(DeviceIndex, BucketIndex)>> {
        let (device, bucket) = *self.punch_cursor.lock();
        let end = Position::new(u64::from(device.0), u64::MAX, u32::MAX);
        let mut held = Vec::new();
        let mut from = bucket_position((device, bucket));
        let mut wrapped = bucket == BucketIndex(0);
        loop {
            let scan = self.transactions.forest().scan(BtreeId::FreeSpace, from, end, 64)?;
            for (position, value) in scan.keys {
                let key = (device, BucketIndex(position.offset));
                if held.len() < limit && !FreeBucket::decode(&value)?.discarded && self.hold_if_free(key)? {
                    held.push(key);
                }
            }
            let next = scan.covered_to.successor().filter(|next| *next <= end);
            match next {
                Some(next) if held.len() < limit => from = next,
                Some(next) => {
                    *self.punch_cursor.lock() = (device, BucketIndex(next.offset));
                    return Ok(held);
                }
                None if wrapped || !held.is_empty() => {
                    let following = device.0.saturating_add(1);
                    let device = if usize::from(following) < self.devices.len() { following } else { 0 };
                    *self.punch_cursor.lock() = (DeviceIndex(device), BucketIndex(0));
                    return Ok(held);
                }
                None => {
                    wrapped = true;
                    from = bucket_position((device, BucketIndex(0)));
                }
            }
        }
    }

    /// Holds a bucket if it is free, as seen after the hold, and there is such a bucket.
    pub(super) fn hold_if_free(&self, key: (DeviceIndex, BucketIndex)) -> Result<bool> {
        if self.is_fixed(key) || !self.allocator.hold(key) {
            return Ok(false);
        }
        match self.bucket(key) {
            Ok(bucket) if bucket.state == BucketState::Free => Ok(true),
            outcome => {
                self.allocator.finish(key, None, false);
                outcome.map(|_| false)
            }
        }
    }
}

/// How often the worker looks at what the nodes take.
const REFRESH: Duration = Duration::from_millis(100);

/// The worker.
pub(super) struct FreeWorker {
    space: Arc<Space>,
    /// The oldest emptying that is not reusable, and since when that is so.
    waiting: Mutex<Option<(JournalSequence, Duration)>>,
    refreshed_at: Mutex<Duration>,
}

impl FreeWorker {
    pub(super) fn new(space: Arc<Space>) -> Self {
        Self { space, waiting: Mutex::new(None), refreshed_at: Mutex::new(Duration::ZERO) }
    }

    fn refresh(&self) {
        let now = self.space.env.monotonic();
        let mut refreshed_at = self.refreshed_at.lock();
        if now >= *refreshed_at + REFRESH {
            *refreshed_at = now;
            drop(refreshed_at);
            self.space.refresh_node_bytes();
            // The floor may have sunk.
            self.space.allocator.changed().notify();
        }
    }
}

impl Worker for FreeWorker {
    fn name(&self) -> &'static str {
        "free"
    }

    fn step(&self, budget: u32) -> Result<Progress> {
        let space = &self.space;
        let limit = usize::try_from(budget).unwrap_or(FREE_BATCH).max(1);
        self.refresh();
        let outcome = match space.free_emptied(CommitOptions::reclaim(), limit) {
            Ok(0) => space.punch_surplus(),
            outcome => outcome,
        };
        let lacks_space = matches!(outcome, Err(Error::NoSpace(_)));
        let lacked_space = space.cannot_free.swap(lacks_space, Ordering::SeqCst);
        match outcome {
            Ok(0) => {}
            Ok(_) => return Ok(Progress::Worked),
            // A checkpoint that finds some is enough. Who waits for a bucket is told.
            Err(Error::NoSpace(reason)) => {
                space.metrics.free_space_waits.increment();
                if !lacked_space {
                    tracing::warn!("emptied buckets wait for space to be freed in: {reason}");
                    space.allocator.changed().notify();
                }
                return Ok(Progress::Idle(Some(RETRY_SPACE)));
            }
            Err(error) => return Err(error),
        }
        let Some((oldest, newest)) = space.allocator.emptied_span() else { return Ok(Progress::Idle(None)) };
        if oldest <= space.journal.reusable() {
            return Ok(Progress::Idle(Some(LOOK_AGAIN)));
        }
        // An idle journal says nothing durable by itself; a busy one says it all the time.
        let now = space.env.monotonic();
        let since = {
            let mut waiting = self.waiting.lock();
            match *waiting {
                Some((sequence, since)) if sequence == oldest => since,
                _ => {
                    *waiting = Some((oldest, now));
                    now
                }
            }
        };
        let is_short = space.copygc_needed();
        if is_short || now >= since + PATIENCE {
            space.journal.want_reusable(newest);
        }
        Ok(Progress::Idle(Some(if is_short { LOOK_SOON } else { LOOK_AGAIN })))
    }

    /// Not the journal's, which is notified at each flush: most flushes have nothing to do with emptied buckets.
    fn event(&self) -> &Event {
        self.space.allocator.emptied_event()
    }
}
