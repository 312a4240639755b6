//! Time, randomness and waiting. Everything that could make two runs differ goes through [`Env`].
//!
//! In production an [`Env`] is the host's clocks, and a wait is a condition variable. In simulation
//! ([`Env::simulated`]) there is one thread: time stands still until everything waits, randomness comes from the seed,
//! and a wait *runs other workers*, picked by the seed, until what is waited for has come true. So one seed reproduces one
//! run exactly, and every place where production could be interrupted by a worker is one where simulation lets a worker run. Tests that explore
//! schedules ([`crate::sync`]) have several tasks; there a wait only lets others go on, and the workers are stepped by tasks of the test.
//!
//! Rules for code that waits: hold no lock that a worker takes (the contracts of `DESIGN.md`, lock order), and make
//! what is waited for observable through the closure, since a wake-up may be spurious.

pub mod blocking;

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};

use crate::error::{Error, Result};
use crate::sync::{Condvar, LockClass, Mutex, Rank, RankSet, order, schedule};

/// A point in time as inodes store it: seconds since 1970 (negative before), and nanoseconds below 10^9.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp {
    /// Seconds since the epoch, rounded towards the past.
    pub seconds: i64,
    /// Nanoseconds after `seconds`, 0..=999_999_999.
    pub nanoseconds: u32,
}

impl From<SystemTime> for Timestamp {
    fn from(time: SystemTime) -> Self {
        match time.duration_since(SystemTime::UNIX_EPOCH) {
            Ok(after) => {
                Self { seconds: i64::try_from(after.as_secs()).unwrap_or(i64::MAX), nanoseconds: after.subsec_nanos() }
            }
            Err(before) => {
                let before = before.duration();
                let seconds = -i64::try_from(before.as_secs()).unwrap_or(i64::MAX);
                match before.subsec_nanos() {
                    0 => Self { seconds, nanoseconds: 0 },
                    nanoseconds => Self { seconds: seconds - 1, nanoseconds: 1_000_000_000 - nanoseconds },
                }
            }
        }
    }
}

/// What one step of a worker achieved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Something was done, and there may be more.
    Worked,
    /// Nothing to do now; step again when notified, or after this long if given.
    Idle(Option<Duration>),
}

/// A background job. A thread drives it in production, the seeded scheduler in simulation.
pub trait Worker: Send + Sync {
    /// A short name for logs and thread names.
    fn name(&self) -> &'static str;
    /// Does a bounded piece of work. `budget` is a hint in units of the worker's own (buckets, folios, nodes).
    ///
    /// # Errors
    /// An error that the worker cannot live with: the driver latches the filesystem read-only.
    fn step(&self, budget: u32) -> Result<Progress>;
    /// What wakes the worker when it is idle.
    fn event(&self) -> &Event;
}

/// Something that may be waited for: a generation that goes up, and a condition variable.
#[derive(Debug)]
pub struct Event {
    generation: Mutex<u64>,
    changed: Condvar,
    /// What may be held while it is waited for.
    allowed: RankSet,
}

impl Default for Event {
    fn default() -> Self {
        Self::new()
    }
}

impl Event {
    /// A new event. Locks that may be held while it is waited for: [`order::OVER_WAIT`].
    #[must_use]
    pub fn new() -> Self {
        Self::new_over(order::OVER_WAIT)
    }

    /// A new event that is waited for with locks of the `allowed` ranks held, and no others: debug builds check it.
    #[must_use]
    pub fn new_over(allowed: RankSet) -> Self {
        Self { generation: Mutex::ranked(LockClass::new(Rank::Event), 0), changed: Condvar::new(), allowed }
    }

    /// Wakes all who wait. Call it *after* making the change that they look for.
    pub fn notify(&self) {
        *self.generation.lock() += 1;
        self.changed.notify_all();
    }

    /// The present generation, to be given to [`Self::wait_past`].
    #[must_use]
    pub fn generation(&self) -> u64 {
        *self.generation.lock()
    }

    /// Blocks the thread until the generation differs from `seen`: loom's form, which knows no time.
    #[cfg(loom)]
    pub fn wait_past(&self, seen: u64, _: Option<Duration>) {
        let mut generation = self.generation.lock();
        while *generation == seen {
            generation = self.changed.wait_owned(generation);
        }
    }

    /// Blocks the thread until the generation differs from `seen`, or `timeout` passes. Production only: simulated code waits
    /// through [`Env::wait`].
    #[cfg(not(loom))]
    pub fn wait_past(&self, seen: u64, timeout: Option<Duration>) {
        let mut generation = self.generation.lock();
        if *generation == seen {
            drop(generation);
            // Takes locks of its own.
            blocking::about_to_wait();
            generation = self.generation.lock();
        }
        match timeout {
            None => {
                while *generation == seen {
                    self.changed.wait(&mut generation);
                }
            }
            Some(timeout) => {
                if *generation == seen {
                    self.changed.wait_for(&mut generation, timeout);
                }
            }
        }
    }
}

struct Simulation {
    seed: u64,
    random: Mutex<Xoshiro256PlusPlus>,
    clock: Mutex<Duration>,
    actors: Mutex<Vec<Actor>>,
    /// How many [`Quiet`] guards are alive.
    quiet: Mutex<u32>,
}

/// While it lives, [`Env::maybe_yield`] does nothing. See [`Env::quiet`].
#[derive(Debug)]
pub struct Quiet<'a>(&'a Env);

impl Drop for Quiet<'_> {
    fn drop(&mut self) {
        if let Some(simulation) = &self.0.simulation {
            *simulation.quiet.lock() -= 1;
        }
    }
}

struct Actor {
    worker: Arc<dyn Worker>,
    /// On the stack of the one thread: must not be entered again.
    running: bool,
    /// When it asked to be stepped again, if it is idle with a deadline.
    wake_at: Option<Duration>,
}

/// See the module's documentation.
pub struct Env {
    start: Instant,
    simulation: Option<Simulation>,
}

impl std::fmt::Debug for Env {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Env").field("seed", &self.simulation.as_ref().map(|s| s.seed)).finish_non_exhaustive()
    }
}

/// The clock of a simulation starts here: 2026-01-01, so that times look like times.
const SIMULATED_EPOCH_SECONDS: u64 = 1_767_225_600;

impl Env {
    /// The host's clocks, and real waiting.
    #[must_use]
    pub fn real() -> Arc<Self> {
        Arc::new(Self { start: Instant::now(), simulation: None })
    }

    /// One thread, a clock that only waiting advances, and randomness from `seed`.
    #[must_use]
    pub fn simulated(seed: u64) -> Arc<Self> {
        Arc::new(Self {
            start: Instant::now(),
            simulation: Some(Simulation {
                seed,
                random: Mutex::ranked(LockClass::new(Rank::Event), Xoshiro256PlusPlus::seed_from_u64(seed)),
                clock: Mutex::ranked(LockClass::new(Rank::Event), Duration::ZERO),
                actors: Mutex::ranked(LockClass::new(Rank::Event), Vec::new()),
                quiet: Mutex::ranked(LockClass::new(Rank::Event), 0),
            }),
        })
    }

    /// Whether everything must run on the calling thread (no rayon, no threads).
    #[must_use]
    pub fn is_simulated(&self) -> bool {
        self.simulation.is_some()
    }

    /// The wall clock.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        match &self.simulation {
            None => SystemTime::now().into(),
            Some(simulation) => {
                let now = Duration::from_secs(SIMULATED_EPOCH_SECONDS) + *simulation.clock.lock();
                Timestamp { seconds: i64::try_from(now.as_secs()).unwrap_or(i64::MAX), nanoseconds: now.subsec_nanos() }
            }
        }
    }

    /// Time since this `Env` was made; never goes backwards.
    #[must_use]
    pub fn monotonic(&self) -> Duration {
        match &self.simulation {
            None => self.start.elapsed(),
            Some(simulation) => *simulation.clock.lock(),
        }
    }

    /// A random number: from the seed in simulation, from the host otherwise.
    #[must_use]
    pub fn random_u64(&self) -> u64 {
        match &self.simulation {
            None => uuid::Uuid::new_v4().as_u64_pair().1 ^ uuid::Uuid::new_v4().as_u64_pair().0.rotate_left(32),
            Some(simulation) => simulation.random.lock().next_u64(),
        }
    }

    /// Adds a worker to the simulated scheduler. In production it does nothing: threads drive the workers.
    pub fn register(&self, worker: Arc<dyn Worker>) {
        if let Some(simulation) = &self.simulation {
            simulation.actors.lock().push(Actor { worker, running: false, wake_at: Some(Duration::ZERO) });
        }
    }

    /// Removes all workers from the simulated scheduler, at the end of a filesystem's life.
    pub fn unregister_all(&self) {
        if let Some(simulation) = &self.simulation {
            simulation.actors.lock().clear();
        }
    }

    /// Waits until `ready` returns something. `event` is what is notified when that may have changed.
    ///
    /// # Errors
    /// What a worker that was run meanwhile failed with (simulation), and [`Error::Bug`] if in simulation nobody can make
    /// `ready` come true: a deadlock, found deterministically.
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn wait<T>(&self, event: &Event, mut ready: impl FnMut() -> Option<T>) -> Result<T> {
        order::check_held("a wait", event.allowed);
        match &self.simulation {
            None => loop {
                let seen = event.generation();
                if let Some(value) = ready() {
                    return Ok(value);
                }
                event.wait_past(seen, None);
            },
            Some(_) => {
                let mut rounds_without_progress = 0;
                loop {
                    if let Some(value) = ready() {
                        return Ok(value);
                    }
                    rounds_without_progress += 1;
                    let is_stuck = if schedule::yield_now() {
                        // The workers are tasks of their own, and time passes.
                        if rounds_without_progress % 64 == 0 {
                            self.advance_clock();
                        }
                        false
                    } else if self.step_random_worker()? {
                        rounds_without_progress = 0;
                        false
                    } else {
                        !self.advance_clock()
                    };
                    if is_stuck || rounds_without_progress > 10_000 {
                        return Err(Error::Bug("simulated deadlock: nobody can make progress".into()));
                    }
                }
            }
        }
    }

    /// As [`Self::wait`], but no longer than to `deadline` (on [`Self::monotonic`]'s clock): then it returns nothing.
    ///
    /// # Errors
    /// What a worker that was run meanwhile failed with (simulation).
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn wait_until<T>(
        &self,
        event: &Event,
        deadline: Duration,
        mut ready: impl FnMut() -> Option<T>,
    ) -> Result<Option<T>> {
        order::check_held("a wait", event.allowed);
        let mut rounds = 0;
        loop {
            let seen = event.generation();
            if let Some(value) = ready() {
                return Ok(Some(value));
            }
            let left = deadline.saturating_sub(self.monotonic());
            if left.is_zero() {
                return Ok(None);
            }
            if !self.is_simulated() {
                event.wait_past(seen, Some(left));
                continue;
            }
            rounds += 1;
            // Workers that always find something to do must not make time stand still.
            if !self.step_random_worker()? || rounds > 10_000 {
                self.advance_clock_to(deadline);
            }
        }
    }

    /// Lets a simulated worker run where production could be preempted: with probability one in `one_in`, a random
    /// worker takes a step. Nothing in production. Where the schedule is explored, others go on.
    ///
    /// # Errors
    /// What the worker failed with.
    pub fn maybe_yield(&self, one_in: u64) -> Result<()> {
        let Some(simulation) = &self.simulation else { return Ok(()) };
        let is_quiet = *simulation.quiet.lock() > 0;
        if !is_quiet && self.random_u64().is_multiple_of(one_in.max(1)) && !schedule::yield_now() {
            self.step_random_worker()?;
        }
        Ok(())
    }

    /// For workers that others wait for while they hold something: no other worker steps in between until the guard is dropped, except where
    /// they wait themselves. The simulation has one stack, so whoever was stepped in between and waited for them would wait for ever; in production
    /// they are threads, and this is nothing.
    #[must_use]
    pub fn quiet(&self) -> Quiet<'_> {
        if let Some(simulation) = &self.simulation {
            *simulation.quiet.lock() += 1;
        }
        Quiet(self)
    }

    /// Steps one random worker that is not on the stack, until one makes progress or all were tried. Returns whether one did.
    ///
    /// # Errors
    /// What the worker failed with.
    pub fn step_random_worker(&self) -> Result<bool> {
        let Some(simulation) = &self.simulation else { return Ok(false) };
        let mut order: Vec<usize> = {
            let actors = simulation.actors.lock();
            (0..actors.len()).filter(|&index| actors.get(index).is_some_and(|actor| !actor.running)).collect()
        };
        while !order.is_empty() {
            let pick = usize::try_from(self.random_u64() % order.len() as u64).unwrap_or(0);
            let index = order.swap_remove(pick);
            let worker = {
                let mut actors = simulation.actors.lock();
                let Some(actor) = actors.get_mut(index) else { continue };
                if actor.running {
                    continue;
                }
                actor.running = true;
                Arc::clone(&actor.worker)
            };
            let outcome = order::apart(|| worker.step(8));
            let now = self.monotonic();
            if let Some(actor) = simulation.actors.lock().get_mut(index) {
                actor.running = false;
                actor.wake_at = match &outcome {
                    Ok(Progress::Idle(Some(after))) => Some(now + *after),
                    _ => None,
                };
            }
            if outcome? == Progress::Worked {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Moves the simulated clock to the next deadline of an idle worker. Returns whether there was one.
    pub fn advance_clock(&self) -> bool {
        let Some(simulation) = &self.simulation else { return false };
        let now = *simulation.clock.lock();
        let next = simulation.actors.lock().iter().filter_map(|actor| actor.wake_at).filter(|&at| at > now).min();
        match next {
            Some(at) => {
                *simulation.clock.lock() = at;
                true
            }
            None => false,
        }
    }

    /// Moves the simulated clock to the next deadline of an idle worker, or to `deadline` if that comes first.
    fn advance_clock_to(&self, deadline: Duration) {
        let Some(simulation) = &self.simulation else { return };
        let now = *simulation.clock.lock();
        let next = simulation.actors.lock().iter().filter_map(|actor| actor.wake_at).filter(|&at| at > now).min();
        *simulation.clock.lock() = next.map_or(deadline, |next| next.min(deadline)).max(now);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    struct Counter(AtomicU32, Event);
    impl Worker for Counter {
        fn name(&self) -> &'static str {
            "counter"
        }
        fn step(&self, _: u32) -> Result<Progress> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(Progress::Worked)
        }
        fn event(&self) -> &Event {
            &self.1
        }
    }

    #[test]
    fn a_simulated_wait_runs_workers() {
        let env = Env::simulated(1);
        let counter = Arc::new(Counter(AtomicU32::new(0), Event::new()));
        env.register(counter.clone());
        let event = Event::new();
        env.wait(&event, || (counter.0.load(Ordering::Relaxed) >= 3).then_some(())).unwrap();
    }

    #[test]
    fn a_simulated_deadlock_is_an_error() {
        let env = Env::simulated(1);
        assert!(matches!(env.wait(&Event::new(), || None::<()>), Err(Error::Bug(_))));
    }

    #[test]
    fn a_wait_with_a_deadline_ends_there_or_before() {
        for env in [Env::real(), Env::simulated(1)] {
            let start = env.monotonic();
            let deadline = start + Duration::from_millis(2);
            assert_eq!(env.wait_until(&Event::new(), deadline, || None::<()>).unwrap(), None);
            assert!(env.monotonic() >= deadline);
            assert_eq!(env.wait_until(&Event::new(), deadline, || Some(7)).unwrap(), Some(7), "past it already");
        }
        // What comes true before the deadline moves a simulated clock no further.
        let env = Env::simulated(1);
        let counter = Arc::new(Counter(AtomicU32::new(0), Event::new()));
        env.register(counter.clone());
        let is_done = || (counter.0.load(Ordering::Relaxed) >= 3).then_some(());
        assert_eq!(env.wait_until(&Event::new(), Duration::from_secs(9), is_done).unwrap(), Some(()));
        assert_eq!(env.monotonic(), Duration::ZERO);
        assert_eq!(env.wait_until(&Event::new(), Duration::from_secs(9), || None::<()>).unwrap(), None);
    }

    #[test]
    fn times_before_1970_keep_their_fraction() {
        let time = SystemTime::UNIX_EPOCH - Duration::from_nanos(1);
        assert_eq!(Timestamp::from(time), Timestamp { seconds: -1, nanoseconds: 999_999_999 });
    }
}
