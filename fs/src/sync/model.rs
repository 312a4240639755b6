//! The facade over loom's models. Ranks are not checked here: loom finds a deadlock by itself.

use super::LockClass;
pub use loom::sync::{Arc, MutexGuard, RwLockReadGuard, RwLockWriteGuard, atomic};

/// Not counted under the model.
#[must_use]
pub fn lock_count() -> u64 {
    0
}

/// loom's mutex with parking_lot's interface.
#[derive(Debug)]
pub struct Mutex<T>(loom::sync::Mutex<T>);

impl<T> Mutex<T> {
    /// A new, unlocked mutex.
    pub fn new(value: T) -> Self {
        Self(loom::sync::Mutex::new(value))
    }

    /// A new, unlocked mutex; the rank is not looked at.
    pub fn ranked(_: LockClass, value: T) -> Self {
        Self::new(value)
    }

    /// Locks, waiting as long as it takes.
    pub fn lock(&self) -> MutexGuard<'_, T> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Locks if that needs no waiting.
    pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        self.0.try_lock().ok()
    }
}

impl<T: Default> Default for Mutex<T> {
    fn default() -> Self {
        Self::new(T::default())
    }
}

impl Default for Condvar {
    fn default() -> Self {
        Self::new()
    }
}

/// loom's reader-writer lock with parking_lot's interface.
#[derive(Debug)]
pub struct RwLock<T>(loom::sync::RwLock<T>);

impl<T> RwLock<T> {
    /// A new, unlocked lock.
    pub fn new(value: T) -> Self {
        Self(loom::sync::RwLock::new(value))
    }

    /// A new, unlocked lock; the rank is not looked at.
    pub fn ranked(_: LockClass, value: T) -> Self {
        Self::new(value)
    }

    /// Locks for reading.
    pub fn read(&self) -> RwLockReadGuard<'_, T> {
        self.0.read().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Locks for writing.
    pub fn write(&self) -> RwLockWriteGuard<'_, T> {
        self.0.write().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// loom's condition variable with parking_lot's interface.
#[derive(Debug)]
pub struct Condvar(loom::sync::Condvar);

impl Condvar {
    /// A new condition variable with nobody waiting.
    pub fn new() -> Self {
        Self(loom::sync::Condvar::new())
    }

    /// Releases the mutex, waits for a notification, and locks again, by value.
    pub fn wait_owned<'a, T>(&self, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
        self.0.wait(guard).unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Wakes one waiter.
    pub fn notify_one(&self) {
        self.0.notify_one();
    }

    /// Wakes all waiters.
    pub fn notify_all(&self) {
        self.0.notify_all();
    }
}

/// loom preempts by itself.
pub mod schedule {
    /// Nothing, in this build.
    #[must_use]
    pub fn yield_now() -> bool {
        false
    }
}

/// For loops that wait for a few instructions of another thread.
pub fn pause(_: u32) {
    loom::thread::yield_now();
}
