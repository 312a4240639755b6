//! The only door to locks and atomics: `parking_lot` in real builds, loom's models under `--cfg loom`.
//!
//! The interface is parking_lot's (no poisoning). Each blocking acquisition of a [`Mutex`] or [`RwLock`] is counted for the
//! calling thread, so that a test can prove that a path takes no mutex ([`lock_count`]).

#[cfg(not(loom))]
mod real {
    use std::cell::Cell;

    pub use parking_lot::{MappedMutexGuard, MutexGuard, RwLockReadGuard, RwLockWriteGuard, WaitTimeoutResult};
    pub use std::sync::Arc;
    pub use std::sync::atomic;

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

    /// Mutual exclusion; `parking_lot::Mutex`, counted.
    #[derive(Debug, Default)]
    pub struct Mutex<T: ?Sized>(parking_lot::Mutex<T>);

    impl<T> Mutex<T> {
        /// A new, unlocked mutex.
        pub const fn new(value: T) -> Self {
            Self(parking_lot::Mutex::new(value))
        }

        /// The value, without locking.
        pub fn into_inner(self) -> T {
            self.0.into_inner()
        }
    }

    impl<T: ?Sized> Mutex<T> {
        /// Locks, waiting as long as it takes.
        pub fn lock(&self) -> MutexGuard<'_, T> {
            count();
            self.0.lock()
        }

        /// Locks if that needs no waiting.
        pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
            count();
            self.0.try_lock()
        }

        /// The value; the exclusive borrow is the lock.
        pub fn get_mut(&mut self) -> &mut T {
            self.0.get_mut()
        }
    }

    /// Many readers or one writer; `parking_lot::RwLock`, counted.
    #[derive(Debug, Default)]
    pub struct RwLock<T: ?Sized>(parking_lot::RwLock<T>);

    impl<T> RwLock<T> {
        /// A new, unlocked lock.
        pub const fn new(value: T) -> Self {
            Self(parking_lot::RwLock::new(value))
        }

        /// The value, without locking.
        pub fn into_inner(self) -> T {
            self.0.into_inner()
        }
    }

    impl<T: ?Sized> RwLock<T> {
        /// Locks for reading. A thread never takes the same lock for reading twice.
        pub fn read(&self) -> RwLockReadGuard<'_, T> {
            count();
            self.0.read()
        }

        /// Locks for writing.
        pub fn write(&self) -> RwLockWriteGuard<'_, T> {
            count();
            self.0.write()
        }

        /// Locks for reading if that needs no waiting.
        pub fn try_read(&self) -> Option<RwLockReadGuard<'_, T>> {
            count();
            self.0.try_read()
        }

        /// Locks for writing if that needs no waiting.
        pub fn try_write(&self) -> Option<RwLockWriteGuard<'_, T>> {
            count();
            self.0.try_write()
        }

        /// The value; the exclusive borrow is the lock.
        pub fn get_mut(&mut self) -> &mut T {
            self.0.get_mut()
        }
    }

    /// Shared lock on a [`SharedRwLock`] that keeps the lock alive.
    pub type OwnedReadGuard<T> = parking_lot::ArcRwLockReadGuard<parking_lot::RawRwLock, T>;
    /// Exclusive lock on a [`SharedRwLock`] that keeps the lock alive.
    pub type OwnedWriteGuard<T> = parking_lot::ArcRwLockWriteGuard<parking_lot::RawRwLock, T>;

    /// Many readers or one writer, with guards that own a reference to the lock, so that a set of guards can be a value.
    #[derive(Debug, Default)]
    pub struct SharedRwLock<T>(Arc<parking_lot::RwLock<T>>);

    impl<T> SharedRwLock<T> {
        /// A new, unlocked lock.
        pub fn new(value: T) -> Self {
            Self(Arc::new(parking_lot::RwLock::new(value)))
        }

        /// Locks for reading. A thread never takes the same lock for reading twice.
        pub fn read(&self) -> RwLockReadGuard<'_, T> {
            count();
            self.0.read()
        }

        /// Locks for writing.
        pub fn write(&self) -> RwLockWriteGuard<'_, T> {
            count();
            self.0.write()
        }

        /// Locks for reading, by a guard of its own.
        pub fn read_owned(&self) -> OwnedReadGuard<T> {
            count();
            self.0.read_arc()
        }

        /// Locks for writing, by a guard of its own.
        pub fn write_owned(&self) -> OwnedWriteGuard<T> {
            count();
            self.0.write_arc()
        }

        /// As [`Self::read_owned`], if that needs no waiting.
        pub fn try_read_owned(&self) -> Option<OwnedReadGuard<T>> {
            count();
            self.0.try_read_arc()
        }

        /// As [`Self::write_owned`], if that needs no waiting.
        pub fn try_write_owned(&self) -> Option<OwnedWriteGuard<T>> {
            count();
            self.0.try_write_arc()
        }
    }

    /// Condition variable; `parking_lot::Condvar`.
    #[derive(Debug, Default)]
    pub struct Condvar(parking_lot::Condvar);

    impl Condvar {
        /// A new condition variable with nobody waiting.
        pub const fn new() -> Self {
            Self(parking_lot::Condvar::new())
        }

        /// Releases the mutex, waits for a notification, and locks again. May wake up without one.
        pub fn wait<T: ?Sized>(&self, guard: &mut MutexGuard<'_, T>) {
            self.0.wait(guard);
        }

        /// As [`Self::wait`], but no longer than `timeout`.
        pub fn wait_for<T: ?Sized>(
            &self,
            guard: &mut MutexGuard<'_, T>,
            timeout: std::time::Duration,
        ) -> WaitTimeoutResult {
            self.0.wait_for(guard, timeout)
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
}

#[cfg(loom)]
mod model {
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

        /// Releases the mutex, waits for a notification, and locks again.
        pub fn wait<T>(&self, guard: &mut MutexGuard<'_, T>) {
            // loom's wait consumes the guard; taking it out of the reference needs a replacement that does not exist, so
            // code that is model-checked uses `wait_owned`.
            let _ = guard;
            unreachable!("use wait_owned in model-checked code");
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
}

#[cfg(loom)]
pub use model::*;
#[cfg(not(loom))]
pub use real::*;

#[cfg(not(loom))]
impl Condvar {
    /// As `wait`, by value: the form that loom's model has too.
    pub fn wait_owned<'a, T>(&self, mut guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
        self.wait(&mut guard);
        guard
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn acquisitions_are_counted_per_thread() {
        let before = lock_count();
        let mutex = Mutex::new(0);
        *mutex.lock() += 1;
        let lock = RwLock::new(0);
        let _ = *lock.read();
        *lock.write() += 1;
        assert_eq!(lock_count() - before, 3);
    }
}
