//! Races of readers against whatever frees, moves and reuses the blocks that they read, on real threads: no read ever shows what no order of the
//! operations explains, and no operation fails.
//!
//! Every block that is written carries a stamp (file, block, number of the operation). Each racing file has one thread that changes it, so that its
//! operations have an order; the content that each leaves of each block is noted *before* it begins. A reader notes which operations had ended
//! when it began, and which had begun when it ended: what it saw must be what one of the states in between has there, and the
//! length that it got must fit the size of one. Anything else is an old stamp, another file's, garbage or wrong zeros. An error is a failure too.
//! Other threads write, replace and remove other files on the same tiny device, so that what is freed is reused at once.
//!
//! - `history`: stamps, and what a read may show.
//! - `change`: what the changing thread does, and what that leaves.
//! - [`library`]: the race in this process, on the library. - [`mount`]: through the kernel, on a mount.
//!
//! A watchdog says what each thread was doing if a race does not end: a hang must not cost more than one test.

mod change;
mod history;
pub mod library;
pub mod mount;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};

const BLOCK: u64 = 4096;
/// Blocks of a racing file at most.
const BLOCKS: u64 = 40;
/// Racing files.
const FILES: u64 = 2;
/// Stamps of files that come and go start here.
const CHURN: u64 = 1000;
/// Threads at most.
const THREADS_MAX: usize = 16;
/// How long the end may take after the time is up.
const GRACE: Duration = Duration::from_secs(60);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the threads of a race share: whether it is over, what went wrong, and what each does now.
struct Stage {
    stop: AtomicBool,
    wrong: Mutex<Option<String>>,
    doing: Vec<Mutex<String>>,
}

impl Stage {
    fn new() -> Self {
        let doing = (0..THREADS_MAX).map(|_| Mutex::default()).collect();
        Self { stop: AtomicBool::new(false), wrong: Mutex::new(None), doing }
    }

    fn is_over(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn end(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Ends the race. What went wrong first is kept.
    fn fail(&self, what: String) {
        lock(&self.wrong).get_or_insert(what);
        self.end();
    }

    fn describe(&self) -> String {
        let line = |(number, doing): (usize, &Mutex<String>)| format!("thread {number}: {}\n", lock(doing));
        self.doing.iter().enumerate().filter(|(_, doing)| !lock(doing).is_empty()).map(line).collect()
    }
}

/// One thread: its random numbers, and where it says what it does.
struct Actor<'a> {
    stage: &'a Stage,
    number: usize,
    random: Xoshiro256PlusPlus,
}

impl<'a> Actor<'a> {
    fn new(stage: &'a Stage, number: usize, seed: u64) -> Self {
        let random = Xoshiro256PlusPlus::seed_from_u64(seed.wrapping_mul(1000) + number as u64);
        Self { stage, number, random }
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.random.next_u64() % limit.max(1)
    }

    fn says(&self, what: String) {
        if let Some(doing) = self.stage.doing.get(self.number) {
            *lock(doing) = what;
        }
    }
}

/// Does what it was told, if nobody says in time that all is well.
struct Watchdog {
    state: Arc<(Mutex<bool>, Condvar)>,
}

impl Watchdog {
    fn new(limit: Duration, past_it: impl FnOnce() + Send + 'static) -> Self {
        let state = Arc::new((Mutex::new(false), Condvar::new()));
        let watched = Arc::clone(&state);
        std::thread::spawn(move || {
            let (is_done, changed) = &*watched;
            let outcome = changed.wait_timeout_while(lock(is_done), limit, |is_done| !*is_done);
            if outcome.is_ok_and(|(_, timeout)| timeout.timed_out()) {
                past_it();
            }
        });
        Self { state }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        *lock(&self.state.0) = true;
        self.state.1.notify_all();
    }
}
