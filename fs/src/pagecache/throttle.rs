//! How much may be dirty, and how fast writers go on: as the device does.
//!
//! ```text
//!   dirty or in writeback:   0 ------ background ------ free run ------ limit
//!   a writer                 goes on                    goes slower     waits
//!   the writeback worker     what is old                all that there is
//! ```
//!
//! - **Bandwidth** ([`Bandwidth`]): what writeback achieved in the last seconds of its work, compression and commits included. A batch of writeback is measured
//!   from its start to its end, and with it all that others finished meanwhile.
//! - **Limits** ([`DirtyLimits`]): the dirty limit is what memory allows, or what the device writes in a given time ([`CacheOptions::dirty_time`]), whichever is
//!   less, but at least 8 MiB. So nothing that is dirty waits longer for its turn, nor does a sync. From a quarter of that on (the background threshold), or a half of what memory
//!   allows, the worker writes whatever the age.
//! - **Pace** ([`DirtyLimits::cost`], [`Pace`]): past the middle between the two, each writer pays for its bytes with time, times the number of those who pay: what the bandwidth
//!   makes of them in the middle of what is left, less before it, more behind. So all of them together are as fast as the device, a small write costs little whoever else
//!   writes, and where the measurement is wrong, what is dirty settles a little lower or higher. Nobody pays more than 200 ms for a write; where that is not enough, the
//!   limit stops them.
//!
//! Writers pause before they take any lock. The two mutexes here are leaves.
//!
//! [`CacheOptions::dirty_time`]: super::CacheOptions::dirty_time

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::cache::Cache;
use crate::error::Result;
use crate::sync::{Mutex, order};

/// The limit is never lower, in bytes, unless memory is: a device that is measured wrongly, or is very slow, still gets batches worth its while.
const LIMIT_BYTES_MIN: u64 = 8 << 20;
/// What a device is taken for, in bytes a second, before it was measured: a slow one gets no more than 64 MiB of a flood until it is known.
const ASSUMED_BANDWIDTH: u64 = 128 << 20;
/// The most that a writer pauses for one write.
pub const PAUSE_MAX: Duration = Duration::from_millis(200);
/// Shorter pauses are saved up: the host would make them longer.
const PAUSE_MIN: Duration = Duration::from_millis(1);
/// The time of writeback that the bandwidth is an average over.
const AVERAGE_SECONDS: f64 = 2.0;
/// A batch of this many bytes says what the device can do, whatever else there is to do.
const BULK_BYTES: u64 = 1 << 20;
/// A hand-over to the data layer is what the device writes in this part of a second, within bounds: so others get their turn between two of them.
const BATCHES_PER_SECOND: u64 = 16;
const BATCH_BYTES_MIN: u64 = 1 << 20;
const BATCH_BYTES_MAX: u64 = 16 << 20;

/// What writeback achieves: bytes by the time that they took, in which older batches count less. A function of what it was told, of nothing else.
#[derive(Clone, Debug, Default)]
pub struct Bandwidth {
    bytes: f64,
    seconds: f64,
}

impl Bandwidth {
    /// `bytes` were written in `time`. `had_enough`: there was as much to write as the device takes. Else the measurement is a lower bound, and
    /// counts only where it is higher. One that took no time (in simulation the clock stands still) says nothing.
    #[expect(clippy::cast_precision_loss, reason = "an estimate")]
    pub fn observe(&mut self, bytes: u64, time: Duration, had_enough: bool) {
        if time.is_zero() || bytes == 0 {
            return;
        }
        let (bytes, seconds) = (bytes as f64, time.as_secs_f64());
        if !had_enough && bytes * self.seconds <= self.bytes * seconds {
            return;
        }
        if !had_enough && self.seconds == 0.0 {
            return;
        }
        let ageing = AVERAGE_SECONDS / (AVERAGE_SECONDS + seconds);
        self.bytes = self.bytes * ageing + bytes;
        self.seconds = self.seconds * ageing + seconds;
    }

    /// Bytes a second, at least 1; none before anything was measured.
    #[must_use]
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "positive, and a float cast saturates")]
    pub fn bytes_per_second(&self) -> Option<u64> {
        (self.seconds > 0.0).then(|| ((self.bytes / self.seconds) as u64).max(1))
    }
}

/// Thresholds for what is dirty or in writeback, in bytes: `background <= free_run <= limit`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirtyLimits {
    /// From here on the worker writes whatever the age.
    pub background: u64,
    /// Behind this, writers pause.
    pub free_run: u64,
    /// Here they wait.
    pub limit: u64,
}

impl DirtyLimits {
    /// The thresholds where memory allows `memory_bytes` and the device writes `bandwidth` bytes a second: `time` of it.
    #[must_use]
    pub fn of(memory_bytes: u64, bandwidth: u64, time: Duration) -> Self {
        let milliseconds = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let timed = (bandwidth.saturating_mul(milliseconds) / 1000).max(LIMIT_BYTES_MIN);
        let limit = memory_bytes.min(timed);
        let background = (limit / 2).min(timed / 4);
        Self { background, free_run: background + (limit - background) / 2, limit }
    }

    /// The time that `bytes` more cost each of `writers` when `unwritten` bytes are dirty or in writeback: none up to `free_run`, what the device needs for those of all
    /// in the middle between that and the limit, and [`PAUSE_MAX`] at most.
    #[must_use]
    pub fn cost(&self, unwritten: u64, bytes: u64, bandwidth: u64, writers: u64) -> Duration {
        if unwritten <= self.free_run {
            return Duration::ZERO;
        }
        if unwritten >= self.limit {
            return PAUSE_MAX;
        }
        let part = u128::from(unwritten - self.free_run) * u128::from(writers.max(1));
        let of = u128::from(self.limit - unwritten) * u128::from(bandwidth.max(1));
        let nanoseconds = u128::from(bytes).saturating_mul(part).saturating_mul(1_000_000_000) / of;
        u64::try_from(nanoseconds).map_or(PAUSE_MAX, Duration::from_nanos).min(PAUSE_MAX)
    }
}

/// Debts that are too small to be paid one by one.
#[derive(Clone, Debug, Default)]
pub struct Pace {
    debt: Duration,
}

impl Pace {
    /// How long the writer of something that costs this much pauses: longer than that by less than a millisecond, for others' debts that were too small.
    pub fn pause(&mut self, cost: Duration) -> Duration {
        if cost.is_zero() {
            return cost;
        }
        self.debt += cost;
        if self.debt < PAUSE_MIN { Duration::ZERO } else { std::mem::take(&mut self.debt).min(PAUSE_MAX) }
    }
}

/// A cache's measurement of its device, and who pauses.
#[derive(Debug)]
pub(super) struct Throttle {
    dirty_time: Duration,
    bandwidth: Mutex<Bandwidth>,
    /// What `bandwidth` says; 0 before anything was measured.
    bytes_per_second: AtomicU64,
    /// All bytes that writeback has ended with.
    written_bytes: AtomicU64,
    pace: Mutex<Pace>,
    /// Writers that pause now.
    paused: AtomicU64,
}

impl Throttle {
    pub(super) fn new(dirty_time: Duration) -> Self {
        Self {
            dirty_time,
            bandwidth: Mutex::new(Bandwidth::default()),
            bytes_per_second: AtomicU64::new(0),
            written_bytes: AtomicU64::new(0),
            pace: Mutex::new(Pace::default()),
            paused: AtomicU64::new(0),
        }
    }

    fn bandwidth(&self) -> u64 {
        match self.bytes_per_second.load(Ordering::Relaxed) {
            0 => ASSUMED_BANDWIDTH,
            bytes => bytes,
        }
    }

    pub(super) fn limits(&self, memory_bytes: u64) -> DirtyLimits {
        DirtyLimits::of(memory_bytes, self.bandwidth(), self.dirty_time)
    }
}

/// A batch of writeback under way. See [`Cache::begin_writeback`].
#[derive(Debug)]
#[must_use]
pub struct WritebackBatch {
    started: Duration,
    written_bytes_before: u64,
    is_pressed: bool,
}

impl Cache {
    /// A batch of writeback starts now: for the measurement of the device.
    pub fn begin_writeback(&self) -> WritebackBatch {
        WritebackBatch {
            started: self.env().monotonic(),
            written_bytes_before: self.throttle().written_bytes.load(Ordering::Relaxed),
            is_pressed: self.is_pressed(),
        }
    }

    /// The batch is committed: `bytes` of files. One that failed is just dropped.
    pub fn end_writeback(&self, batch: WritebackBatch, bytes: u64) {
        let throttle = self.throttle();
        let now = self.env().monotonic();
        let written = throttle.written_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let had_enough = bytes >= BULK_BYTES || (batch.is_pressed && self.is_pressed());
        let mut bandwidth = throttle.bandwidth.lock();
        bandwidth.observe(
            written.saturating_sub(batch.written_bytes_before),
            now.saturating_sub(batch.started),
            had_enough,
        );
        throttle.bytes_per_second.store(bandwidth.bytes_per_second().unwrap_or(0), Ordering::Relaxed);
    }

    /// Whether there is more to write than the worker may leave.
    fn is_pressed(&self) -> bool {
        self.unwritten_bytes() >= self.dirty_limits().background
    }

    /// The bytes of one batch of writeback.
    #[must_use]
    pub fn writeback_batch_bytes(&self) -> u64 {
        (self.throttle().bandwidth() / BATCHES_PER_SECOND).clamp(BATCH_BYTES_MIN, BATCH_BYTES_MAX)
    }

    /// What writeback achieves, in bytes a second; 0 before anything was measured.
    #[must_use]
    pub fn write_bandwidth_bytes(&self) -> u64 {
        self.throttle().bytes_per_second.load(Ordering::Relaxed)
    }

    /// Slows a writer of `bytes` down to what the device achieves, while much is dirty. Called with no lock held, before the write.
    ///
    /// # Errors
    /// What a simulated wait fails with.
    pub fn pace_writer(&self, bytes: u64) -> Result<()> {
        order::check_held("a writer's pause", crate::sync::RankSet::NONE);
        let throttle = self.throttle();
        let writers = throttle.paused.load(Ordering::Relaxed) + 1;
        let cost = self.dirty_limits().cost(self.unwritten_bytes(), bytes, throttle.bandwidth(), writers);
        if cost.is_zero() {
            return Ok(());
        }
        let pause = throttle.pace.lock().pause(cost);
        if pause.is_zero() {
            return Ok(());
        }
        self.metrics().pagecache_writer_paused.increment();
        let started = self.env().monotonic();
        let is_over = || (self.is_latched() || self.unwritten_bytes() <= self.dirty_limits().free_run).then_some(());
        throttle.paused.fetch_add(1, Ordering::Relaxed);
        let outcome = self.env().wait_until(self.cleaned(), started + pause, is_over);
        throttle.paused.fetch_sub(1, Ordering::Relaxed);
        self.count_throttled(started);
        outcome.map(|_| ())
    }

    /// Counts the time since `started` as one that a writer was held up for.
    pub(super) fn count_throttled(&self, started: Duration) {
        let waited = self.env().monotonic().saturating_sub(started);
        self.metrics().pagecache_writer_throttled_us.add(u64::try_from(waited.as_micros()).unwrap_or(u64::MAX));
    }
}

#[cfg(test)]
#[path = "throttle_tests.rs"]
mod tests;
