//! Where a thread may be preempted, told to shuttle. Test builds only: in all others everything here is zero-sized and empty.
//!
//! Inside of `explore` the threads of a test are shuttle's tasks: all on one thread of the host, one of them running at any time, and which one goes on is
//! chosen by a seeded scheduler at every operation on a lock, an atomic or a condition variable of the facade. So a schedule is a number that can be run again.
//!
//! The locks stay `parking_lot`'s. A task *tries* a lock; if that fails, it is parked until anything is released or notified, and tries again. So shuttle
//! knows who waits, and a deadlock is reported as soon as everybody does. Atomics are sequentially consistent here: what weaker orders allow is loom's
//! business ([`super`]). A wait with a time limit ends at once.

pub use half::*;

#[cfg(test)]
mod half {
    use std::cell::{Cell, RefCell};
    use std::sync::atomic::{AtomicU64, Ordering};

    use parking_lot::MutexGuard;
    use shuttle::scheduler::Scheduler;
    use shuttle::sync::mpsc::{Sender, channel};
    use shuttle::{Config, Runner};

    thread_local! {
        /// Whether the tasks of an exploration run on this thread of the host.
        static IS_INSIDE: Cell<bool> = const { Cell::new(false) };
        /// Who waits for anything to change.
        static PARKED: RefCell<Vec<Sender<()>>> = const { RefCell::new(Vec::new()) };
    }

    /// Stack of a task in bytes; only what is touched takes memory.
    const STACK_BYTES: usize = 4 << 20;

    /// Runs `body` once for each schedule that `scheduler` has, as the first task; it makes the others by `shuttle::thread`. Returns how often.
    ///
    /// # Panics
    /// If a task does, or if all wait for each other. Shuttle prints the schedule first.
    pub fn explore(scheduler: impl Scheduler + Send + 'static, body: impl Fn() + Send + Sync + 'static) -> usize {
        let mut config = Config::new();
        config.stack_size = STACK_BYTES;
        // On a thread of its own, so that nothing of a failed exploration stays behind.
        let explorer = std::thread::spawn(move || {
            IS_INSIDE.set(true);
            Runner::new(scheduler, config).run(body)
        });
        explorer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Whether the caller is a task of an exploration.
    pub fn is_explored() -> bool {
        IS_INSIDE.get()
    }

    /// A task that unwinds is not interrupted any more: its exploration is over.
    fn may_switch() -> bool {
        is_explored() && !std::thread::panicking()
    }

    /// The number of the task, 0 outside of explorations: tasks share what is local to a thread.
    #[cfg(debug_assertions)]
    pub fn task() -> usize {
        if may_switch() { usize::from(shuttle::thread::current().id()) } else { 0 }
    }

    /// Another task may go on here.
    pub fn point() {
        if may_switch() {
            // Any operation of shuttle's is one, and this one says nothing about what should run next.
            shuttle::sync::atomic::AtomicBool::new(false).load(Ordering::SeqCst);
        }
    }

    /// Lets others go on, since this task can do nothing before they do. False outside of explorations.
    pub fn yield_now() -> bool {
        let may = may_switch();
        if may {
            shuttle::thread::yield_now();
        }
        may
    }

    /// Takes a lock: by `lock`, which may block the thread, or in an exploration by `attempt`.
    pub fn acquire<G>(mut attempt: impl FnMut() -> Option<G>, lock: impl FnOnce() -> G) -> G {
        if !is_explored() {
            return lock();
        }
        point();
        let mut taken = None;
        wait_until(|| {
            taken = attempt();
            taken.is_some()
        });
        taken.unwrap_or_else(|| unreachable!("it was waited for"))
    }

    /// Parks the task until `ready`.
    fn wait_until(mut ready: impl FnMut() -> bool) {
        while !ready() {
            assert!(!std::thread::panicking(), "a task that panicked needs what another one holds");
            // Not by `park`, which may return for no reason, for ever: a deadlock would look like work.
            let (waker, woken) = channel();
            PARKED.with_borrow_mut(|parked| parked.push(waker));
            let _ = woken.recv();
        }
    }

    /// Has all who are parked look again.
    fn wake() {
        if may_switch() {
            for waker in PARKED.take() {
                let _ = waker.send(());
            }
        }
    }

    /// Dropped when something was released.
    #[derive(Debug)]
    pub struct Released;

    impl Drop for Released {
        fn drop(&mut self) {
            wake();
        }
    }

    /// What a condition variable counts, so that explored tasks know whether they were notified.
    #[derive(Debug, Default)]
    pub struct Notices(AtomicU64);

    impl Notices {
        pub const fn new() -> Self {
            Self(AtomicU64::new(0))
        }

        pub fn notify(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
            wake();
        }

        /// Gives the lock back, waits for a notification, and takes it again. False, and nothing done, outside of explorations.
        pub fn wait<T: ?Sized>(&self, guard: &mut MutexGuard<'_, T>) -> bool {
            let seen = self.0.load(Ordering::SeqCst);
            self.unlocked(guard, || self.0.load(Ordering::SeqCst) != seen)
        }

        /// Gives the lock back for a moment. False, and nothing done, outside of explorations.
        pub fn pass<T: ?Sized>(&self, guard: &mut MutexGuard<'_, T>) -> bool {
            self.unlocked(guard, || true)
        }

        fn unlocked<T: ?Sized>(&self, guard: &mut MutexGuard<'_, T>, ready: impl Fn() -> bool) -> bool {
            if !may_switch() {
                return false;
            }
            let mutex = MutexGuard::mutex(guard);
            MutexGuard::unlocked(guard, || {
                wake();
                shuttle::thread::yield_now();
                // Free, it is taken before anybody else goes on.
                wait_until(|| ready() && !mutex.is_locked());
            });
            true
        }
    }
}

#[cfg(not(test))]
mod half {
    use parking_lot::MutexGuard;

    /// There is but one, in this build.
    #[cfg(debug_assertions)]
    #[inline]
    pub fn task() -> usize {
        0
    }

    /// Nothing, in this build.
    #[inline]
    pub fn point() {}

    /// Nothing, in this build.
    #[inline]
    pub fn yield_now() -> bool {
        false
    }

    /// Takes a lock by `lock`.
    #[inline]
    pub fn acquire<G>(_: impl FnMut() -> Option<G>, lock: impl FnOnce() -> G) -> G {
        lock()
    }

    /// Nothing, in this build.
    #[derive(Debug)]
    pub struct Released;

    /// Nothing, in this build.
    #[derive(Debug, Default)]
    pub struct Notices;

    impl Notices {
        pub const fn new() -> Self {
            Self
        }

        #[inline]
        pub fn notify(&self) {}

        #[inline]
        pub fn wait<T: ?Sized>(&self, _: &mut MutexGuard<'_, T>) -> bool {
            false
        }

        #[inline]
        pub fn pass<T: ?Sized>(&self, _: &mut MutexGuard<'_, T>) -> bool {
            false
        }
    }
}
