//! The facade over `parking_lot`: its locks, counted and ranked; in test builds also scheduled ([`super::schedule`]).

use std::cell::Cell;
use std::fmt;
use std::ops::{Deref, DerefMut};

pub use parking_lot::WaitTimeoutResult;
pub use std::sync::Arc;
#[cfg(not(test))]
pub use std::sync::atomic;

use super::order::{self, Held};
use super::schedule::{self, Notices, Released};
use super::{LockClass, Rank};

thread_local! {
    static LOCKS: Cell<u64> = const { Cell::new(0) };
}

fn count() {
    LOCKS.with(|locks| locks.set(locks.get().wrapping_add(1)));
}

/// How many mutexes and reader-writer locks the calling thread has acquired through this facade.
#[must_use]
pub fn lock_count() -> u64 {
    LOCKS.with(Cell::get)
}

fn address<T: ?Sized>(lock: &T) -> usize {
    std::ptr::from_ref(lock).cast::<()>().addr()
}

/// A guard of `parking_lot`'s, and the note that the thread holds it.
#[must_use]
pub struct Guard<G> {
    // Released before it is noted as released.
    guard: G,
    _held: Held,
    _released: Released,
}

impl<G: Deref> Deref for Guard<G> {
    type Target = G::Target;

    #[inline]
    fn deref(&self) -> &G::Target {
        &self.guard
    }
}

impl<G: DerefMut> DerefMut for Guard<G> {
    #[inline]
    fn deref_mut(&mut self) -> &mut G::Target {
        &mut self.guard
    }
}

impl<G: fmt::Debug> fmt::Debug for Guard<G> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.guard.fmt(f)
    }
}

/// The lock of a [`Mutex`].
pub type MutexGuard<'a, T> = Guard<parking_lot::MutexGuard<'a, T>>;
/// The shared lock of a [`RwLock`] or [`SharedRwLock`].
pub type RwLockReadGuard<'a, T> = Guard<parking_lot::RwLockReadGuard<'a, T>>;
/// The exclusive lock of a [`RwLock`] or [`SharedRwLock`].
pub type RwLockWriteGuard<'a, T> = Guard<parking_lot::RwLockWriteGuard<'a, T>>;
/// Shared lock on a [`SharedRwLock`] that keeps the lock alive.
pub type OwnedReadGuard<T> = Guard<parking_lot::ArcRwLockReadGuard<parking_lot::RawRwLock, T>>;
/// Exclusive lock on a [`SharedRwLock`] that keeps the lock alive.
pub type OwnedWriteGuard<T> = Guard<parking_lot::ArcRwLockWriteGuard<parking_lot::RawRwLock, T>>;

/// Counts, checks the order, waits by `lock` (or has `attempt` succeed, where the schedule is explored), and notes.
#[inline]
#[cfg_attr(debug_assertions, track_caller)]
fn wait_for<G>(
    class: &LockClass,
    address: usize,
    lock: impl FnOnce() -> G,
    attempt: impl FnMut() -> Option<G>,
) -> Guard<G> {
    count();
    order::expect(class, address);
    let guard = schedule::acquire(attempt, lock);
    Guard { guard, _held: order::hold(class, address), _released: Released }
}

/// Counts, and notes if `lock` succeeds without waiting.
#[inline]
#[cfg_attr(debug_assertions, track_caller)]
fn attempt<G>(class: &LockClass, address: usize, lock: impl FnOnce() -> Option<G>) -> Option<Guard<G>> {
    count();
    schedule::point();
    let guard = lock()?;
    Some(Guard { guard, _held: order::hold(class, address), _released: Released })
}

/// Mutual exclusion; `parking_lot::Mutex`, counted and ranked.
#[derive(Debug, Default)]
pub struct Mutex<T: ?Sized> {
    class: LockClass,
    lock: parking_lot::Mutex<T>,
}

impl<T> Mutex<T> {
    /// A new, unlocked mutex of rank [`Rank::Leaf`].
    pub const fn new(value: T) -> Self {
        Self::ranked(LockClass::new(Rank::Leaf), value)
    }

    /// A new, unlocked mutex.
    pub const fn ranked(class: LockClass, value: T) -> Self {
        Self { class, lock: parking_lot::Mutex::new(value) }
    }

    /// The value, without locking.
    pub fn into_inner(self) -> T {
        self.lock.into_inner()
    }
}

impl<T: ?Sized> Mutex<T> {
    /// Locks, waiting as long as it takes.
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn lock(&self) -> Guard<parking_lot::MutexGuard<'_, T>> {
        wait_for(&self.class, address(self), || self.lock.lock(), || self.lock.try_lock())
    }

    /// Locks if that needs no waiting.
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn try_lock(&self) -> Option<Guard<parking_lot::MutexGuard<'_, T>>> {
        attempt(&self.class, address(self), || self.lock.try_lock())
    }

    /// The value; the exclusive borrow is the lock.
    pub fn get_mut(&mut self) -> &mut T {
        self.lock.get_mut()
    }
}

/// Many readers or one writer; `parking_lot::RwLock`, counted and ranked.
#[derive(Debug, Default)]
pub struct RwLock<T: ?Sized> {
    class: LockClass,
    lock: parking_lot::RwLock<T>,
}

impl<T> RwLock<T> {
    /// A new, unlocked lock of rank [`Rank::Leaf`].
    pub const fn new(value: T) -> Self {
        Self::ranked(LockClass::new(Rank::Leaf), value)
    }

    /// A new, unlocked lock.
    pub const fn ranked(class: LockClass, value: T) -> Self {
        Self { class, lock: parking_lot::RwLock::new(value) }
    }

    /// The value, without locking.
    pub fn into_inner(self) -> T {
        self.lock.into_inner()
    }
}

impl<T: ?Sized> RwLock<T> {
    /// Locks for reading. A thread never takes the same lock for reading twice.
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn read(&self) -> Guard<parking_lot::RwLockReadGuard<'_, T>> {
        wait_for(&self.class, address(self), || self.lock.read(), || self.lock.try_read())
    }

    /// Locks for writing.
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn write(&self) -> Guard<parking_lot::RwLockWriteGuard<'_, T>> {
        wait_for(&self.class, address(self), || self.lock.write(), || self.lock.try_write())
    }

    /// Locks for reading if that needs no waiting.
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn try_read(&self) -> Option<Guard<parking_lot::RwLockReadGuard<'_, T>>> {
        attempt(&self.class, address(self), || self.lock.try_read())
    }

    /// Locks for writing if that needs no waiting.
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn try_write(&self) -> Option<Guard<parking_lot::RwLockWriteGuard<'_, T>>> {
        attempt(&self.class, address(self), || self.lock.try_write())
    }

    /// The value; the exclusive borrow is the lock.
    pub fn get_mut(&mut self) -> &mut T {
        self.lock.get_mut()
    }
}

/// Many readers or one writer, with guards that own a reference to the lock, so that a set of guards can be a value.
#[derive(Debug, Default)]
pub struct SharedRwLock<T> {
    class: LockClass,
    lock: Arc<parking_lot::RwLock<T>>,
}

impl<T> SharedRwLock<T> {
    /// A new, unlocked lock.
    pub fn ranked(class: LockClass, value: T) -> Self {
        Self { class, lock: Arc::new(parking_lot::RwLock::new(value)) }
    }

    fn address(&self) -> usize {
        address(&*self.lock)
    }

    /// Locks for reading. A thread never takes the same lock for reading twice.
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn read(&self) -> RwLockReadGuard<'_, T> {
        wait_for(&self.class, self.address(), || self.lock.read(), || self.lock.try_read())
    }

    /// Locks for writing.
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn write(&self) -> RwLockWriteGuard<'_, T> {
        wait_for(&self.class, self.address(), || self.lock.write(), || self.lock.try_write())
    }

    /// Locks for reading, by a guard of its own.
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn read_owned(&self) -> OwnedReadGuard<T> {
        wait_for(&self.class, self.address(), || self.lock.read_arc(), || self.lock.try_read_arc())
    }

    /// Locks for writing, by a guard of its own.
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn write_owned(&self) -> OwnedWriteGuard<T> {
        wait_for(&self.class, self.address(), || self.lock.write_arc(), || self.lock.try_write_arc())
    }

    /// As [`Self::read_owned`], if that needs no waiting.
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn try_read_owned(&self) -> Option<OwnedReadGuard<T>> {
        attempt(&self.class, self.address(), || self.lock.try_read_arc())
    }

    /// As [`Self::write_owned`], if that needs no waiting.
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn try_write_owned(&self) -> Option<OwnedWriteGuard<T>> {
        attempt(&self.class, self.address(), || self.lock.try_write_arc())
    }

    /// Checks, in debug builds, that the calling thread may wait for the lock now: before a `try_` form that is followed by a wait if
    /// it fails, so that the order is checked without contention too.
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn expect_order(&self) {
        order::expect(&self.class, self.address());
    }
}

/// Condition variable; `parking_lot::Condvar`.
#[derive(Debug, Default)]
pub struct Condvar(parking_lot::Condvar, Notices);

impl Condvar {
    /// A new condition variable with nobody waiting.
    pub const fn new() -> Self {
        Self(parking_lot::Condvar::new(), Notices::new())
    }

    /// Releases the mutex, waits for a notification, and locks again. May wake up without one.
    pub fn wait<T: ?Sized>(&self, guard: &mut Guard<parking_lot::MutexGuard<'_, T>>) {
        if !self.1.wait(&mut guard.guard) {
            self.0.wait(&mut guard.guard);
        }
    }

    /// As [`Self::wait`], but no longer than `timeout`.
    pub fn wait_for<T: ?Sized>(
        &self,
        guard: &mut Guard<parking_lot::MutexGuard<'_, T>>,
        timeout: std::time::Duration,
    ) -> WaitTimeoutResult {
        let timeout = if self.1.pass(&mut guard.guard) { std::time::Duration::ZERO } else { timeout };
        self.0.wait_for(&mut guard.guard, timeout)
    }

    /// As [`Self::wait`], by value: the form that loom's model has too.
    pub fn wait_owned<'a, T>(&self, mut guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
        self.wait(&mut guard);
        guard
    }

    /// Wakes one waiter.
    pub fn notify_one(&self) {
        self.1.notify();
        self.0.notify_one();
    }

    /// Wakes all waiters.
    pub fn notify_all(&self) {
        self.1.notify();
        self.0.notify_all();
    }
}

/// For loops that wait for a few instructions of another thread: a hint at first, then the thread's turn is given up.
pub fn pause(rounds: u32) {
    if schedule::yield_now() {
        return;
    }
    if rounds < 64 {
        std::hint::spin_loop();
    } else {
        std::thread::yield_now();
    }
}
