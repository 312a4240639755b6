//! One cache for each filesystem: its budget, its dirty limit, its list of dirty spaces.
//!
//! - **Budget**: every byte of folio memory is counted in [`Budget`] from before it is allocated until its last reference is gone.
//!   Whoever needs memory evicts clean folios itself ([`super::reclaim`]); if nothing can be evicted, it waits for writeback or for
//!   fills under way, holding no lock.
//! - **Dirty limit**: a write gets a quota for its blocks before it takes any lock; while dirty and in-writeback blocks are at the limit it
//!   waits for writeback. So at least the rest of the budget can always be evicted, and reads go on. How high the limit is, and how writers are slowed down
//!   before they reach it: [`super::throttle`].

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use super::add_lock::AddLock;
use super::folio::Folio;
use super::readahead::Governor;
use super::reclaim::Reclaim;
use super::space::AddressSpace;
use super::throttle::{DirtyLimits, Throttle};
use crate::env::{Env, Event};
use crate::error::{Error, Result};
use crate::memory::{Budget, FOLIO_ALIGNMENT, FOLIO_BYTES_MAX, FolioBytes, FolioWriter, MemoryReservation};
use crate::metrics::Metrics;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{LockClass, Mutex, Rank, RankSet, order};

/// Runs a piece of work elsewhere: readahead that nobody waits for.
pub type Spawn = Arc<dyn Fn(Box<dyn FnOnce() + Send>) + Send + Sync>;

/// Place in the list of dirty spaces: when it became dirty, and a number that makes it unique.
pub(super) type DirtyKey = (Duration, u64);

/// What a cache is made with.
#[derive(Clone)]
pub struct CacheOptions {
    /// Bytes of folio memory.
    pub budget_bytes: u64,
    /// Bytes of a block: a power of two, 4096 to 1 MiB.
    pub block_bytes: u32,
    /// Most bytes that may be dirty or in writeback; a quarter of the budget if not given.
    pub dirty_limit_bytes: Option<u64>,
    /// No more may be dirty than the devices write in this time.
    pub dirty_time: Duration,
    /// The longest readahead window in bytes.
    pub readahead_max_bytes: u64,
    /// Runs readahead that nobody waits for. Without it such readahead runs in the reader's thread (simulation).
    pub spawn: Option<Spawn>,
    /// Test seam: the add lock excludes nobody. The race test must then fail.
    pub fault_add_lock_excludes_nobody: bool,
}

impl CacheOptions {
    /// Options for a budget of `budget_bytes`, with 4 KiB blocks.
    #[must_use]
    pub fn new(budget_bytes: u64) -> Self {
        Self {
            budget_bytes,
            block_bytes: 4096,
            dirty_limit_bytes: None,
            dirty_time: Duration::from_millis(500),
            readahead_max_bytes: 16 << 20,
            spawn: None,
            fault_add_lock_excludes_nobody: false,
        }
    }
}

impl std::fmt::Debug for CacheOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CacheOptions")
            .field("budget_bytes", &self.budget_bytes)
            .field("block_bytes", &self.block_bytes)
            .finish_non_exhaustive()
    }
}

/// What may be held while memory or the dirty limit is waited for: writers hold their inode, a block holder may fill its edges. Not add, and no folio:
/// what would make room may need them.
const OVER_MEMORY_WAIT: RankSet = RankSet::of(&[Rank::Inode, Rank::Block]);

/// See the module's documentation.
pub struct Cache {
    env: Arc<Env>,
    metrics: Arc<Metrics>,
    block_shift: u32,
    folio_blocks_max: u32,
    readahead_blocks_max: u64,
    governor: Governor,
    /// What memory allows.
    dirty_limit_blocks: u64,
    throttle: Throttle,
    spawn: Option<Spawn>,
    add_lock_excludes: bool,
    budget: Arc<Budget>,
    reclaim: Reclaim,
    serial: AtomicU64,
    /// Blocks in the dirty sets of all spaces. Changed under a space's `tracking`.
    dirty_blocks: AtomicU64,
    /// Blocks in the writeback sets of all spaces. Changed under a space's `tracking`.
    writeback_blocks: AtomicU64,
    /// Blocks that writers under way may still make dirty.
    promised_blocks: AtomicU64,
    /// Fills under way: their memory can be evicted soon.
    fills: AtomicU64,
    throttled: AtomicU64,
    /// Runs of dirty blocks that were written, and runs that could not be for want of space: who waits for the first sees by the second when to stop.
    written_runs: AtomicU64,
    unplaced_runs: AtomicU64,
    /// Runs that could not be written, for whatever reason.
    failed_runs: AtomicU64,
    /// Pieces of work that were given to `spawn` and have not ended.
    spawned: AtomicU64,
    /// Notified when one of them ends.
    spawned_ended: Event,
    /// Notified when fewer blocks are unwritten.
    cleaned: Event,
    /// Notified when the writeback worker should look.
    writeback_wanted: Event,
    /// Oldest first. The owner keeps a dirty space alive; one that ends takes itself out.
    dirty_spaces: Mutex<BTreeMap<DirtyKey, Weak<AddressSpace>>>,
    latched: Mutex<Option<Error>>,
}

impl std::fmt::Debug for Cache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cache")
            .field("used_bytes", &self.used_bytes())
            .field("dirty_bytes", &self.dirty_bytes())
            .field("writeback_bytes", &self.writeback_bytes())
            .finish_non_exhaustive()
    }
}

impl Cache {
    /// An empty cache.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a block size that is no power of two of 4096 bytes to 1 MiB.
    pub fn new(env: Arc<Env>, metrics: Arc<Metrics>, options: CacheOptions) -> Result<Arc<Self>> {
        let block = u64::from(options.block_bytes);
        if !block.is_power_of_two() || !(4096..=FOLIO_BYTES_MAX as u64).contains(&block) {
            return Err(Error::Invalid(format!(
                "a page cache block of {block} bytes; it must be a power of two, 4096 to 1 MiB"
            )));
        }
        // Small caches get small folios, so that one folio is never a large part of the budget.
        let sixteenth = (options.budget_bytes / 16).max(block);
        let folio_bytes = (1_u64 << sixteenth.ilog2()).min(FOLIO_BYTES_MAX as u64);
        let dirty_limit = options.dirty_limit_bytes.unwrap_or(options.budget_bytes / 4);
        Ok(Arc::new(Self {
            env,
            metrics,
            block_shift: block.trailing_zeros(),
            folio_blocks_max: u32::try_from(folio_bytes / block).unwrap_or(1),
            readahead_blocks_max: (options.readahead_max_bytes.min(options.budget_bytes / 8) / block).max(1),
            governor: Governor::default(),
            dirty_limit_blocks: (dirty_limit / block).max(1),
            throttle: Throttle::new(options.dirty_time),
            spawn: options.spawn,
            add_lock_excludes: !options.fault_add_lock_excludes_nobody,
            budget: Budget::new(options.budget_bytes),
            reclaim: Reclaim::new(options.budget_bytes),
            serial: AtomicU64::new(0),
            dirty_blocks: AtomicU64::new(0),
            writeback_blocks: AtomicU64::new(0),
            promised_blocks: AtomicU64::new(0),
            fills: AtomicU64::new(0),
            throttled: AtomicU64::new(0),
            written_runs: AtomicU64::new(0),
            unplaced_runs: AtomicU64::new(0),
            failed_runs: AtomicU64::new(0),
            spawned: AtomicU64::new(0),
            spawned_ended: Event::new(),
            cleaned: Event::new_over(OVER_MEMORY_WAIT),
            writeback_wanted: Event::new(),
            dirty_spaces: Mutex::ranked(LockClass::new(Rank::InnerLeaf), BTreeMap::new()),
            latched: Mutex::new(None),
        }))
    }

    /// The pages of an inode, none at first. `identity` is the owner's name for it; the owner makes one space for one inode.
    #[must_use]
    pub fn new_space(self: &Arc<Self>, identity: u64) -> Arc<AddressSpace> {
        let (env, metrics) = (Arc::clone(&self.env), Arc::clone(&self.metrics));
        let lock = if self.add_lock_excludes {
            AddLock::new(env, metrics)
        } else {
            AddLock::new_without_exclusion(env, metrics)
        };
        AddressSpace::new(self, identity, self.serial.fetch_add(1, Ordering::Relaxed), lock)
    }

    /// Size of a block in bytes.
    #[must_use]
    pub fn block_bytes(&self) -> u64 {
        1 << self.block_shift
    }

    pub(super) fn block_shift(&self) -> u32 {
        self.block_shift
    }

    pub(super) fn folio_blocks_max(&self) -> u32 {
        self.folio_blocks_max
    }

    /// The longest readahead window now, in blocks: what the device is worth, less under memory pressure.
    pub(super) fn readahead_window_blocks(&self) -> u64 {
        let (used, wasted) = (&self.metrics.pagecache_readahead_used, &self.metrics.pagecache_readahead_wasted);
        let bytes_max = self.readahead_blocks_max << self.block_shift;
        (self.governor.window_bytes(bytes_max, used.get(), wasted.get()) >> self.block_shift).max(1)
    }

    pub(super) fn governor(&self) -> &Governor {
        &self.governor
    }

    /// The most blocks that one step of a read or a write asks memory for.
    pub(super) fn step_blocks_max(&self) -> u64 {
        u64::from(self.folio_blocks_max).min((self.dirty_limit_blocks / 2).max(1))
    }

    pub(super) fn env(&self) -> &Env {
        &self.env
    }

    pub(super) fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Bytes of folio memory in use: cached, in flight, collected.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        self.budget.used_bytes()
    }

    /// The most bytes that were ever in use.
    #[must_use]
    pub fn peak_bytes(&self) -> u64 {
        self.budget.peak_bytes()
    }

    /// Bytes that are dirty and in no writeback run.
    #[must_use]
    pub fn dirty_bytes(&self) -> u64 {
        self.dirty_blocks.load(Ordering::SeqCst) << self.block_shift
    }

    /// Bytes in writeback runs.
    #[must_use]
    pub fn writeback_bytes(&self) -> u64 {
        self.writeback_blocks.load(Ordering::SeqCst) << self.block_shift
    }

    fn unwritten_blocks(&self) -> u64 {
        self.dirty_blocks.load(Ordering::SeqCst) + self.writeback_blocks.load(Ordering::SeqCst)
    }

    pub(super) fn unwritten_bytes(&self) -> u64 {
        self.unwritten_blocks() << self.block_shift
    }

    /// The most bytes that may be dirty or in writeback now.
    #[must_use]
    pub fn dirty_limit_bytes(&self) -> u64 {
        self.dirty_limits().limit
    }

    pub(super) fn dirty_limits(&self) -> DirtyLimits {
        self.throttle.limits(self.dirty_limit_blocks << self.block_shift)
    }

    pub(super) fn throttle(&self) -> &Throttle {
        &self.throttle
    }

    /// Notified when fewer blocks are unwritten.
    pub(super) fn cleaned(&self) -> &Event {
        &self.cleaned
    }

    pub(super) fn is_latched(&self) -> bool {
        self.latched.lock().is_some()
    }

    /// Changes the budget, and evicts down to it as far as clean folios allow. Returns the bytes in use then.
    pub fn set_budget_bytes(&self, budget_bytes: u64) -> u64 {
        self.budget.set_limit_bytes(budget_bytes);
        while self.used_bytes() > budget_bytes && self.reclaim.evict_one(&self.metrics) {}
        self.used_bytes()
    }

    /// Evicts every clean folio that nobody uses. Returns how many.
    pub fn evict_all_clean(&self) -> u64 {
        let mut count = 0;
        while self.reclaim.evict_one(&self.metrics) {
            count += 1;
        }
        count
    }

    /// Makes writers fail with `reason` instead of waiting for a writeback that will not come: the filesystem has latched read-only.
    pub fn latch(&self, reason: Error) {
        self.latched.lock().get_or_insert(reason);
        self.cleaned.notify();
        self.budget.freed().notify();
    }

    // ---- memory -------------------------------------------------------------------------------------------------------

    /// Memory for `bytes` if eviction of clean folios is all it takes.
    pub(super) fn try_reserve_memory(&self, bytes: u64) -> Option<MemoryReservation> {
        loop {
            if let Some(reservation) = self.budget.try_reserve(bytes) {
                return Some(reservation);
            }
            if !self.reclaim.evict_one(&self.metrics) {
                return None;
            }
        }
    }

    /// Memory for `bytes`; waits for writeback and for fills under way if it must. Called with no lock held. When there is nothing to
    /// wait for (replies under way pin everything) the budget is overdrawn.
    pub(super) fn reserve_memory(&self, bytes: u64) -> Result<MemoryReservation> {
        order::check_held("a wait for memory", OVER_MEMORY_WAIT);
        if let Some(reservation) = self.try_reserve_memory(bytes) {
            return Ok(reservation);
        }
        let _mark = self.budget.announce_waiter();
        let mut progress = self.writing_progress();
        let failed_before = self.failed_runs.load(Ordering::SeqCst);
        self.env.wait(self.budget.freed(), || {
            if let Some(reservation) = self.try_reserve_memory(bytes) {
                return Some(reservation);
            }
            let hopeless = self.is_latched()
                || self.is_stuck_since(&mut progress)
                || self.failure_of_all_since(failed_before).is_some();
            if hopeless || (self.unwritten_blocks() == 0 && self.fills.load(Ordering::SeqCst) == 0) {
                return Some(self.budget.overdraw(bytes));
            }
            self.writeback_wanted.notify();
            None
        })
    }

    /// Memory for `bytes` that a holder of block needs: it must not wait for fills that wait for add, nor for its own file's writeback. A block or two, beyond
    /// the budget where nothing can be evicted.
    pub(super) fn reserve_memory_under_block(&self, bytes: u64) -> MemoryReservation {
        self.try_reserve_memory(bytes).unwrap_or_else(|| self.budget.overdraw(bytes))
    }

    /// Fresh memory for at least `bytes` (at most 1 MiB) that belongs to no file: a direct read's, counted in the budget until its last reference is gone.
    /// Waits for memory, so no lock is held.
    ///
    /// # Errors
    /// ENOMEM; [`Error::Bug`] for more bytes; what a simulated wait fails with.
    pub fn fresh_pages(&self, bytes: usize) -> Result<FolioWriter> {
        let length = bytes.max(FOLIO_ALIGNMENT).next_power_of_two();
        FolioBytes::allocate(&mut self.reserve_memory(length as u64)?, length)
    }

    /// Counts a fill as under way until the returned value is dropped.
    pub(super) fn begin_fill(&self) -> FillMark<'_> {
        self.fills.fetch_add(1, Ordering::SeqCst);
        FillMark(self)
    }

    pub(super) fn enqueue(&self, folio: &Arc<Folio>) {
        if self.reclaim.enqueue(folio) {
            self.metrics.pagecache_refaults.increment();
        }
    }

    pub(super) fn spawn(self: &Arc<Self>, work: impl FnOnce() + Send + 'static) {
        let Some(spawn) = &self.spawn else { return work() };
        self.spawned.fetch_add(1, Ordering::SeqCst);
        let mark = SpawnMark(Arc::clone(self));
        spawn(Box::new(move || {
            work();
            drop(mark);
        }));
    }

    /// Waits until no readahead that nobody waits for is under way: before the devices are let go.
    ///
    /// # Errors
    /// What a simulated wait fails with.
    pub fn quiesce(&self) -> Result<()> {
        self.env.wait(&self.spawned_ended, || (self.spawned.load(Ordering::SeqCst) == 0).then_some(()))
    }

    // ---- dirty limit --------------------------------------------------------------------------------------------------

    /// The right to make `blocks` blocks dirty. Waits while the limit is reached; called with no lock of the cache held.
    ///
    /// # Errors
    /// What latched the cache; [`Error::NoSpace`] if meanwhile nothing was written, since what is dirty already found no space; what is wrong with one
    /// of the files, if those that are dirty can all not be written.
    pub(super) fn reserve_dirty(&self, blocks: u64) -> Result<DirtyQuota<'_>> {
        order::check_held("a wait for the dirty limit", OVER_MEMORY_WAIT);
        if let Some(quota) = self.try_reserve_dirty(blocks) {
            return Ok(quota);
        }
        self.metrics.pagecache_writer_throttled.increment();
        let started = self.env.monotonic();
        self.throttled.fetch_add(1, Ordering::SeqCst);
        self.writeback_wanted.notify();
        let mut progress = self.writing_progress();
        let failed_before = self.failed_runs.load(Ordering::SeqCst);
        let outcome = self.env.wait(&self.cleaned, || {
            if let Some(reason) = self.latched.lock().clone() {
                return Some(Err(reason));
            }
            if let Some(quota) = self.try_reserve_dirty(blocks) {
                return Some(Ok(quota));
            }
            if self.is_stuck_since(&mut progress) {
                return Some(Err(Error::NoSpace("what was written before cannot be put on the device")));
            }
            if let Some(failure) = self.failure_of_all_since(failed_before) {
                return Some(Err(failure));
            }
            self.writeback_wanted.notify();
            None
        });
        self.throttled.fetch_sub(1, Ordering::SeqCst);
        self.count_throttled(started);
        outcome?
    }

    /// The right to make `blocks` blocks dirty whatever the limit says: for the two edges of a punch, whose holder of block must not wait for
    /// writers that wait for add.
    pub(super) fn overdraw_dirty(&self, blocks: u64) -> DirtyQuota<'_> {
        self.promised_blocks.fetch_add(blocks, Ordering::SeqCst);
        DirtyQuota { cache: self, blocks }
    }

    fn try_reserve_dirty(&self, blocks: u64) -> Option<DirtyQuota<'_>> {
        let after = self.promised_blocks.fetch_add(blocks, Ordering::SeqCst) + blocks;
        let limit = (self.dirty_limits().limit >> self.block_shift).max(1);
        if after + self.unwritten_blocks() <= limit || (after == blocks && self.unwritten_blocks() == 0) {
            return Some(DirtyQuota { cache: self, blocks });
        }
        self.promised_blocks.fetch_sub(blocks, Ordering::SeqCst);
        None
    }

    /// `newly` blocks of a space became dirty, paid from `quota`. Under the space's `tracking`.
    pub(super) fn count_dirty(&self, newly: u64, quota: &mut DirtyQuota<'_>) {
        let before = self.dirty_blocks.fetch_add(newly, Ordering::SeqCst);
        let paid = quota.blocks.min(newly);
        quota.blocks -= paid;
        self.promised_blocks.fetch_sub(paid, Ordering::SeqCst);
        let background = self.background_blocks();
        if before < background && before + newly >= background {
            self.writeback_wanted.notify();
        }
    }

    /// Moves `blocks` from dirty to writeback. Under the space's `tracking`.
    pub(super) fn count_collected(&self, blocks: u64) {
        self.writeback_blocks.fetch_add(blocks, Ordering::SeqCst);
        self.dirty_blocks.fetch_sub(blocks, Ordering::SeqCst);
    }

    /// `blocks` in writeback ended, `redirtied` of them dirty again. Under the space's `tracking`.
    pub(super) fn count_written(&self, blocks: u64, redirtied: u64) {
        self.dirty_blocks.fetch_add(redirtied, Ordering::SeqCst);
        self.writeback_blocks.fetch_sub(blocks, Ordering::SeqCst);
    }

    /// A run ended: written, or for want of space not. Before who waits is told.
    pub(super) fn count_run(&self, is_written: bool) {
        let counter = if is_written { &self.written_runs } else { &self.unplaced_runs };
        counter.fetch_add(1, Ordering::SeqCst);
    }

    /// How many runs were written, and how many found no space.
    fn writing_progress(&self) -> (u64, u64) {
        (self.written_runs.load(Ordering::SeqCst), self.unplaced_runs.load(Ordering::SeqCst))
    }

    /// Whether since the last look none was written, and some found no space: to wait for it is in vain. What was admitted has its space promised, so
    /// only a promise that was not kept leads here; and a wait without an end would be worse than an error.
    fn is_stuck_since(&self, last: &mut (u64, u64)) -> bool {
        let before = std::mem::replace(last, self.writing_progress());
        last.0 == before.0 && last.1 > before.1
    }

    /// A run failed, for whatever reason. After its space knows it.
    pub(super) fn count_failed_run(&self) {
        self.failed_runs.fetch_add(1, Ordering::SeqCst);
    }

    /// Whether any run has ever failed.
    pub(super) fn has_failed_runs(&self) -> bool {
        self.failed_runs.load(Ordering::SeqCst) > 0
    }

    /// Why nothing of what is dirty can be written, if it was tried again since so many runs had failed: then to wait for it is in vain, until somebody
    /// mends or removes it.
    fn failure_of_all_since(&self, failed_before: u64) -> Option<Error> {
        let is_new = self.failed_runs.load(Ordering::SeqCst) > failed_before;
        if !is_new || self.writeback_blocks.load(Ordering::SeqCst) > 0 {
            return None;
        }
        let mut failure = None;
        for space in self.dirty_spaces(usize::MAX, None) {
            failure = Some(space.failure()?);
        }
        failure
    }

    /// `blocks` dirty blocks were dropped. Under the space's `tracking`.
    pub(super) fn count_dropped(&self, blocks: u64) {
        self.dirty_blocks.fetch_sub(blocks, Ordering::SeqCst);
    }

    /// Wakes who waits for fewer unwritten blocks or for memory. After the change, with no lock held.
    pub(super) fn notify_cleaned(&self) {
        self.cleaned.notify();
        self.budget.freed().notify();
    }

    fn background_blocks(&self) -> u64 {
        (self.dirty_limits().background >> self.block_shift).max(1)
    }

    // ---- for the writeback worker -------------------------------------------------------------------------------------

    /// What wakes the writeback worker: the background limit was passed, a writer is throttled, or memory is wanted.
    #[must_use]
    pub fn writeback_wanted(&self) -> &Event {
        &self.writeback_wanted
    }

    /// Whether writeback should run now, whatever the age of the dirty data.
    #[must_use]
    pub fn needs_writeback(&self) -> bool {
        let dirty = self.dirty_blocks.load(Ordering::SeqCst);
        dirty >= self.background_blocks()
            || (dirty > 0 && (self.throttled.load(Ordering::SeqCst) > 0 || self.budget.has_waiters()))
    }

    /// The spaces with dirty blocks, those first that have been dirty longest, at most `count`; with `older_than`, only those that became
    /// dirty at least so long ago.
    #[must_use]
    pub fn dirty_spaces(&self, count: usize, older_than: Option<Duration>) -> Vec<Arc<AddressSpace>> {
        let now = self.env.monotonic();
        let candidates: Vec<(DirtyKey, Weak<AddressSpace>)> =
            self.dirty_spaces.lock().iter().map(|(key, space)| (*key, Weak::clone(space))).collect();
        candidates
            .iter()
            .take_while(|((since, _), _)| older_than.is_none_or(|age| now.saturating_sub(*since) >= age))
            .filter_map(|(_, space)| space.upgrade())
            .take(count)
            .collect()
    }

    /// How long the oldest dirty data has been dirty.
    #[must_use]
    pub fn oldest_dirty_age(&self) -> Option<Duration> {
        let now = self.env.monotonic();
        self.dirty_spaces.lock().keys().next().map(|(since, _)| now.saturating_sub(*since))
    }

    /// Puts a space that became dirty in the list. Under its `tracking`.
    pub(super) fn list_dirty(&self, space: &Arc<AddressSpace>) -> DirtyKey {
        let key = (self.env.monotonic(), space.serial());
        self.dirty_spaces.lock().insert(key, Arc::downgrade(space));
        key
    }

    /// Takes a space that is clean, or ends, out of the list. Under its `tracking`.
    pub(super) fn unlist_dirty(&self, key: DirtyKey) {
        self.dirty_spaces.lock().remove(&key);
    }
}

/// See [`Cache::begin_fill`].
#[derive(Debug)]
pub(super) struct FillMark<'a>(&'a Cache);

impl Drop for FillMark<'_> {
    fn drop(&mut self) {
        self.0.fills.fetch_sub(1, Ordering::SeqCst);
        if self.0.budget.has_waiters() {
            self.0.budget.freed().notify();
        }
    }
}

/// The right to make some blocks dirty; what is left of it goes back when it is dropped.
#[derive(Debug)]
pub(super) struct DirtyQuota<'a> {
    cache: &'a Cache,
    blocks: u64,
}

impl Drop for DirtyQuota<'_> {
    fn drop(&mut self) {
        if self.blocks > 0 {
            self.cache.promised_blocks.fetch_sub(self.blocks, Ordering::SeqCst);
            if self.cache.throttled.load(Ordering::SeqCst) > 0 {
                self.cache.cleaned.notify();
            }
        }
    }
}

/// Counts a piece of spawned work, run or not, until it is dropped.
struct SpawnMark(Arc<Cache>);

impl Drop for SpawnMark {
    fn drop(&mut self) {
        self.0.spawned.fetch_sub(1, Ordering::SeqCst);
        self.0.spawned_ended.notify();
    }
}

/// An executor of `count` threads for [`CacheOptions::spawn`]. Work that finds all of them busy and 64 pieces waiting is
/// dropped: it is a guess. The threads end when the returned value is dropped.
///
/// # Errors
/// If the host refuses a thread.
pub fn spawn_threads(count: usize) -> Result<Spawn> {
    let (sender, receiver) = crossbeam_channel::bounded::<Box<dyn FnOnce() + Send>>(SPAWN_QUEUE);
    for number in 0..count {
        let receiver = receiver.clone();
        std::thread::Builder::new()
            .name(format!("readahead-{number}"))
            .spawn(move || {
                for work in receiver {
                    // A panic in one guess is that guess's end, not the thread's.
                    if std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).is_err() {
                        tracing::error!("readahead panicked");
                    }
                }
            })
            .map_err(|error| Error::io("starting a readahead thread", error))?;
    }
    Ok(Arc::new(move |work| {
        // Full or closed: the work is dropped, which counts it as ended.
        let _ = sender.try_send(work);
    }))
}

/// Pieces of readahead that may wait for a thread.
const SPAWN_QUEUE: usize = 64;
