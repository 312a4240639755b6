//! A byte budget that every folio's memory is taken from and returns to.
//!
//! Bytes are counted from the moment they are reserved (before any lock is taken) until the last reference to the memory is
//! dropped: cached folios, folios in flight and collected pages all count. Reserving is one compare-and-swap; nobody waits in here.
//! Whoever finds no room makes some (`pagecache::reclaim`) or waits for [`Budget::freed`].

use super::folio_bytes::Memory;
use crate::env::Event;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Arc, Mutex};

/// Runs of at least this many bytes are kept for the next one who wants such a run: to ask the host for them anew costs page faults
/// and zeroing.
const SPARE_RUN_BYTES_MIN: usize = 64 << 10;
/// Most bytes of runs that are kept. They are not counted in the budget: nobody uses them.
const SPARE_BYTES_MAX: u64 = 32 << 20;

/// Memory that nobody uses.
#[derive(Debug, Default)]
struct Spare {
    runs: Vec<Memory>,
    bytes: u64,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Budget {
    limit_bytes: AtomicU64,
    used_bytes: AtomicU64,
    peak_bytes: AtomicU64,
    waiting: AtomicU64,
    freed: Event,
    spare: Mutex<Spare>,
}

impl Budget {
    /// A budget of `limit_bytes`, all of it free.
    #[must_use]
    pub fn new(limit_bytes: u64) -> Arc<Self> {
        Arc::new(Self {
            limit_bytes: AtomicU64::new(limit_bytes),
            used_bytes: AtomicU64::new(0),
            peak_bytes: AtomicU64::new(0),
            waiting: AtomicU64::new(0),
            freed: Event::new(),
            spare: Mutex::new(Spare::default()),
        })
    }

    /// The limit in bytes.
    #[must_use]
    pub fn limit_bytes(&self) -> u64 {
        self.limit_bytes.load(Ordering::Relaxed)
    }

    /// Sets the limit. What is in use beyond it stays until it is reclaimed.
    pub fn set_limit_bytes(&self, limit_bytes: u64) {
        self.limit_bytes.store(limit_bytes, Ordering::Relaxed);
        self.freed.notify();
    }

    /// Bytes in use or reserved.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        self.used_bytes.load(Ordering::Relaxed)
    }

    /// The most that was ever in use.
    #[must_use]
    pub fn peak_bytes(&self) -> u64 {
        self.peak_bytes.load(Ordering::Relaxed)
    }

    /// Reserves `bytes` if they fit below the limit.
    #[must_use]
    pub fn try_reserve(self: &Arc<Self>, bytes: u64) -> Option<MemoryReservation> {
        let limit = self.limit_bytes();
        let after = self
            .used_bytes
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |used| {
                used.checked_add(bytes).filter(|&after| after <= limit)
            })
            .ok()?
            + bytes;
        self.peak_bytes.fetch_max(after, Ordering::Relaxed);
        Some(MemoryReservation { budget: Arc::clone(self), bytes })
    }

    /// Reserves `bytes` even beyond the limit: for a caller that found nothing to reclaim and nothing to wait for, which happens only
    /// when all memory is pinned by replies under way. Their number bounds the overdraft.
    #[must_use]
    pub fn overdraw(self: &Arc<Self>, bytes: u64) -> MemoryReservation {
        let after = self.used_bytes.fetch_add(bytes, Ordering::SeqCst) + bytes;
        self.peak_bytes.fetch_max(after, Ordering::Relaxed);
        MemoryReservation { budget: Arc::clone(self), bytes }
    }

    /// Notified when bytes come back while somebody has announced to wait ([`Self::announce_waiter`]).
    #[must_use]
    pub fn freed(&self) -> &Event {
        &self.freed
    }

    /// Whether anybody has announced to wait.
    #[must_use]
    pub fn has_waiters(&self) -> bool {
        self.waiting.load(Ordering::SeqCst) > 0
    }

    /// Makes every release notify [`Self::freed`] for as long as the returned value lives.
    #[must_use]
    pub fn announce_waiter(&self) -> WaiterMark<'_> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        WaiterMark(&self.waiting)
    }

    /// A run of exactly `length` bytes that somebody has used before.
    pub(super) fn take_spare(&self, length: usize) -> Option<Memory> {
        if length < SPARE_RUN_BYTES_MIN {
            return None;
        }
        let mut spare = self.spare.lock();
        let place = spare.runs.iter().rposition(|run| run.length() == length)?;
        spare.bytes -= length as u64;
        Some(spare.runs.swap_remove(place))
    }

    /// Keeps a run for the next one, if there is room for it.
    pub(super) fn keep_spare(&self, memory: Memory) {
        let length = memory.length() as u64;
        if memory.length() < SPARE_RUN_BYTES_MIN {
            return;
        }
        let mut spare = self.spare.lock();
        if spare.bytes + length <= SPARE_BYTES_MAX.min(self.limit_bytes() / 8) {
            spare.bytes += length;
            spare.runs.push(memory);
        }
    }

    pub(super) fn release(&self, bytes: u64) {
        self.used_bytes.fetch_sub(bytes, Ordering::SeqCst);
        if self.waiting.load(Ordering::SeqCst) > 0 {
            self.freed.notify();
        }
    }
}

/// See [`Budget::announce_waiter`].
#[derive(Debug)]
pub struct WaiterMark<'a>(&'a AtomicU64);

impl Drop for WaiterMark<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Bytes that were taken from a [`Budget`] and are not memory yet. What is left goes back when it is dropped.
#[derive(Debug)]
pub struct MemoryReservation {
    budget: Arc<Budget>,
    bytes: u64,
}

impl MemoryReservation {
    /// Bytes left in it.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Takes up to `bytes` out of this reservation, as one of its own. If it holds less, the rest is overdrawn: a caller that
    /// reserved by the rules never gets there.
    #[must_use]
    pub fn split_off(&mut self, bytes: u64) -> Self {
        let own = self.bytes.min(bytes);
        self.bytes -= own;
        if own < bytes {
            let rest = self.budget.overdraw(bytes - own);
            rest.forget();
        }
        Self { budget: Arc::clone(&self.budget), bytes }
    }

    /// Adds another reservation of the same budget to this one.
    pub fn merge(&mut self, other: Self) {
        debug_assert!(Arc::ptr_eq(&self.budget, &other.budget));
        self.bytes += other.bytes;
        other.forget();
    }

    /// Turns the reservation into a share of the budget that its new owner gives back by [`Budget::release`].
    pub(super) fn into_budget(self) -> Arc<Budget> {
        let budget = Arc::clone(&self.budget);
        self.forget();
        budget
    }

    fn forget(mut self) {
        self.bytes = 0;
    }
}

impl Drop for MemoryReservation {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.budget.release(self.bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reservations_are_counted_until_they_are_dropped() {
        let budget = Budget::new(100);
        let mut first = budget.try_reserve(60).unwrap();
        assert!(budget.try_reserve(41).is_none());
        let part = first.split_off(20);
        assert_eq!((first.bytes(), part.bytes(), budget.used_bytes()), (40, 20, 60));
        drop(first);
        assert_eq!(budget.used_bytes(), 20);
        drop(part);
        assert_eq!((budget.used_bytes(), budget.peak_bytes()), (0, 60));
    }

    #[test]
    fn an_overdraft_is_counted_and_comes_back() {
        let budget = Budget::new(10);
        let mut reservation = budget.overdraw(15);
        assert_eq!(budget.used_bytes(), 15);
        let more = reservation.split_off(20);
        assert_eq!((more.bytes(), reservation.bytes(), budget.used_bytes()), (20, 0, 20));
        drop((more, reservation));
        assert_eq!(budget.used_bytes(), 0);
    }
}
