//! The add lock: a two-state shared lock, one for each address space.
//!
//! **add** is held to insert folios or to fill blocks, **block** while what the extents of the inode mean is changed. Each is
//! shared within itself and excludes the other. Invariants:
//!
//! 1. `count` is negative while adders hold the lock (their number), positive while blockers do, 0 when it is free.
//! 2. **Fairness bound**: from the moment one waits, at most [`FAIRNESS_BOUND`] newcomers of the other state enter. Then they
//!    queue, the holders drain, and *all* who wait are let in at once, with the lock handed to them before anybody else can
//!    take it. So neither state can starve the other, and no single waiter can be overtaken for ever.
//! 3. **No recursion**: with a bound, a second entry by the same thread can deadlock. The guard is passed down instead, and re-entry
//!    panics in debug builds. That is also why the guards cannot be sent to another thread, only lent to it.
//! 4. Nobody waits here with a folio locked (rank: inode, add/block, folio, node, journal); debug builds check it.
//!
//! Guards carry the byte range they were taken for. The lock is inode-wide today; the range is there so that a range lock can
//! replace it without a change in any caller.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

use crate::env::{Env, Event};
use crate::error::Result;
use crate::metrics::Metrics;
use crate::sync::order::{self, Held};
use crate::sync::{LockClass, Mutex, Rank, RankSet};

/// How many newcomers of one state may pass a waiter of the other.
pub const FAIRNESS_BOUND: u32 = if cfg!(loom) { 1 } else { 16 };

/// What may be held while the lock is waited for.
const OVER_WAIT: RankSet = RankSet::of(&[Rank::Inode]);

/// The two states.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Add = 0,
    Block = 1,
}

impl Side {
    fn other(self) -> Self {
        match self {
            Self::Add => Self::Block,
            Self::Block => Self::Add,
        }
    }

    fn sign(self) -> i64 {
        match self {
            Self::Add => -1,
            Self::Block => 1,
        }
    }

    fn class(self, range: &Range<u64>) -> LockClass {
        let rank = match self {
            Self::Add => Rank::Add,
            Self::Block => Rank::Block,
        };
        LockClass::keyed(rank, [range.start, range.end, 0, 0])
    }
}

/// One of the two queues.
#[derive(Debug, Default)]
struct Queue {
    /// Waiters that have not been let in.
    waiting: i64,
    /// Ticket of the next one to wait.
    next_ticket: u64,
    /// Tickets below this have been let in; `count` includes them already.
    granted_below: u64,
    /// Newcomers of the *other* state that entered since somebody waits here.
    passed: u32,
}

#[derive(Debug, Default)]
struct State {
    count: i64,
    queues: [Queue; 2],
}

impl State {
    fn queue(&mut self, side: Side) -> &mut Queue {
        &mut self.queues[side as usize]
    }

    fn admits(&self, side: Side) -> bool {
        self.count == 0 || self.count.signum() == side.sign()
    }

    /// A newcomer of `side` enters, if it may.
    fn try_enter(&mut self, side: Side) -> bool {
        if !self.admits(side) {
            return false;
        }
        let other = self.queue(side.other());
        if other.waiting > 0 {
            if other.passed >= FAIRNESS_BOUND {
                return false;
            }
            other.passed += 1;
        }
        self.count += side.sign();
        true
    }

    /// Lets everybody in who waits on `side`. Returns whether there was anybody.
    fn grant(&mut self, side: Side) -> bool {
        let queue = self.queue(side);
        let waiting = std::mem::take(&mut queue.waiting);
        queue.granted_below = queue.next_ticket;
        queue.passed = 0;
        self.count += side.sign() * waiting;
        waiting > 0
    }

    /// One holder of `side` leaves. Returns whether waiters were let in and must be woken.
    fn leave(&mut self, side: Side) -> bool {
        self.count -= side.sign();
        self.count == 0 && (self.grant(side.other()) || self.grant(side))
    }

    /// A waiter gives up. Returns whether others were let in.
    fn cancel(&mut self, side: Side, ticket: u64) -> bool {
        if ticket < self.queue(side).granted_below {
            return self.leave(side);
        }
        let queue = self.queue(side);
        queue.waiting -= 1;
        if queue.waiting > 0 {
            return false;
        }
        queue.passed = 0;
        self.admits(side.other()) && self.grant(side.other())
    }
}

/// See the module's documentation.
#[derive(Debug)]
pub struct AddLock {
    state: Mutex<State>,
    changed: Event,
    env: Arc<Env>,
    metrics: Arc<Metrics>,
    /// False only in the test that shows what the lock is for: everybody enters always.
    excludes: bool,
}

impl AddLock {
    /// A free lock.
    #[must_use]
    pub fn new(env: Arc<Env>, metrics: Arc<Metrics>) -> Self {
        Self { state: Mutex::new(State::default()), changed: Event::new_over(OVER_WAIT), env, metrics, excludes: true }
    }

    /// A lock that excludes nobody, for the test that must then fail.
    #[must_use]
    pub fn new_without_exclusion(env: Arc<Env>, metrics: Arc<Metrics>) -> Self {
        Self { excludes: false, ..Self::new(env, metrics) }
    }

    /// Takes **add** for `range` (bytes), waiting for blockers. Only `pagecache::insert` calls it.
    ///
    /// # Errors
    /// What a simulated wait fails with.
    #[cfg_attr(debug_assertions, track_caller)]
    pub(super) fn add(&self, range: Range<u64>) -> Result<AddGuard<'_>> {
        let held = self.enter(Side::Add, &range)?;
        Ok(AddGuard { lock: self, range, _held: held, not_send: PhantomData })
    }

    /// Takes **add** if that needs no waiting.
    #[cfg_attr(debug_assertions, track_caller)]
    pub(super) fn try_add(&self, range: Range<u64>) -> Option<AddGuard<'_>> {
        let held = self.try_enter(Side::Add, &range)?;
        Some(AddGuard { lock: self, range, _held: held, not_send: PhantomData })
    }

    /// Takes **block** for `range` (bytes), waiting for adders. The caller holds the inode's lock as the table of `pagecache` says, and
    /// no folio.
    ///
    /// # Errors
    /// What a simulated wait fails with.
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn block(&self, range: Range<u64>) -> Result<BlockGuard<'_>> {
        let held = self.enter(Side::Block, &range)?;
        Ok(BlockGuard { lock: self, range, _held: held, not_send: PhantomData })
    }

    /// Takes **block** if that needs no waiting.
    #[must_use]
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn try_block(&self, range: Range<u64>) -> Option<BlockGuard<'_>> {
        let held = self.try_enter(Side::Block, &range)?;
        Some(BlockGuard { lock: self, range, _held: held, not_send: PhantomData })
    }

    /// Whether a blocker is inside now.
    #[must_use]
    pub fn is_blocked(&self) -> bool {
        self.state.lock().count > 0
    }

    /// The signed count: minus the number of adders, or the number of blockers.
    #[must_use]
    pub fn count(&self) -> i64 {
        self.state.lock().count
    }

    fn count_taken(&self, side: Side) {
        match side {
            Side::Add => self.metrics.pagecache_add_taken.increment(),
            Side::Block => self.metrics.pagecache_block_taken.increment(),
        }
    }

    fn count_waited(&self, side: Side) {
        match side {
            Side::Add => self.metrics.pagecache_add_waited.increment(),
            Side::Block => self.metrics.pagecache_block_waited.increment(),
        }
    }

    fn address(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }

    /// Also the forms that do not wait are checked: with the bound, whoever enters again may stand before itself.
    #[cfg_attr(debug_assertions, track_caller)]
    fn try_enter(&self, side: Side, range: &Range<u64>) -> Option<Held> {
        let class = side.class(range);
        order::expect(&class, self.address());
        let entered = !self.excludes || self.state.lock().try_enter(side);
        if !entered {
            return None;
        }
        self.count_taken(side);
        Some(order::hold(&class, self.address()))
    }

    #[cfg_attr(debug_assertions, track_caller)]
    fn enter(&self, side: Side, range: &Range<u64>) -> Result<Held> {
        if let Some(held) = self.try_enter(side, range) {
            return Ok(held);
        }
        let ticket = {
            let mut state = self.state.lock();
            // Between the two critical sections the lock may have become free.
            if state.try_enter(side) {
                None
            } else {
                let queue = state.queue(side);
                queue.waiting += 1;
                queue.next_ticket += 1;
                Some(queue.next_ticket - 1)
            }
        };
        if let Some(ticket) = ticket {
            self.count_waited(side);
            let granted =
                self.env.wait(&self.changed, || (ticket < self.state.lock().queue(side).granted_below).then_some(()));
            if let Err(error) = granted {
                let wake = self.state.lock().cancel(side, ticket);
                if wake {
                    self.changed.notify();
                }
                return Err(error);
            }
        }
        self.count_taken(side);
        Ok(order::hold(&side.class(range), self.address()))
    }

    fn leave(&self, side: Side) {
        if self.excludes {
            let wake = self.state.lock().leave(side);
            if wake {
                self.changed.notify();
            }
        }
    }
}

/// Neither guard may leave its thread (re-entry is checked by thread), but helpers may borrow it.
type NotSend = PhantomData<std::sync::MutexGuard<'static, ()>>;

/// Proof that **add** is held: nobody changes what extents mean.
#[derive(Debug)]
#[must_use]
pub struct AddGuard<'a> {
    lock: &'a AddLock,
    range: Range<u64>,
    _held: Held,
    not_send: NotSend,
}

impl AddGuard<'_> {
    /// The byte range it was taken for.
    #[must_use]
    pub fn range(&self) -> &Range<u64> {
        &self.range
    }

    /// Whether it is a guard of `lock` and covers `range`: what a function that takes the guard as proof asserts.
    #[must_use]
    pub fn covers(&self, lock: &AddLock, range: &Range<u64>) -> bool {
        std::ptr::eq(self.lock, lock) && self.range.start <= range.start && range.end <= self.range.end
    }
}

impl Drop for AddGuard<'_> {
    fn drop(&mut self) {
        self.lock.leave(Side::Add);
    }
}

/// Proof that **block** is held: nobody inserts or fills.
#[derive(Debug)]
#[must_use]
pub struct BlockGuard<'a> {
    lock: &'a AddLock,
    range: Range<u64>,
    _held: Held,
    not_send: NotSend,
}

impl BlockGuard<'_> {
    /// The byte range it was taken for.
    #[must_use]
    pub fn range(&self) -> &Range<u64> {
        &self.range
    }

    /// Whether it is a guard of `lock` and covers `range`: what a function that takes the guard as proof asserts.
    #[must_use]
    pub fn covers(&self, lock: &AddLock, range: &Range<u64>) -> bool {
        std::ptr::eq(self.lock, lock) && self.range.start <= range.start && range.end <= self.range.end
    }
}

impl Drop for BlockGuard<'_> {
    fn drop(&mut self) {
        self.lock.leave(Side::Block);
    }
}

#[cfg(test)]
#[path = "add_lock_tests.rs"]
mod tests;
