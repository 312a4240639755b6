//! Which of a session's threads read requests: as few as keep up, so that a client's next request finds a thread that is awake, on a warm processor.
//!
//! fuser starts all threads at once, each reads, and the kernel wakes the one that has slept longest: with one client every request pays for a cold
//! thread. Here a thread that has answered parks, inside of the method that fuser called, when enough others read. Before it does what
//! may take long, and before it blocks in what should not have ([`crate::env::blocking`]), it hands its place to one that is parked.
//!
//! - **Somebody always reads**, but while every thread is busy: a place is given up only to a parked thread, or if none is parked; a thread parks only
//!   if others have places. Threads that have not served yet all read, and are not counted.
//! - **How many places** follows the load: one more when a thread hardly ever waits for the next request, one less when it waits for half of the time; never
//!   more than processors. (That a request is there already when a thread comes back says little: a client on another processor is that fast. A second
//!   reader would then only be woken in vain.)
//! - **The end**: a thread of fuser's that ends tells the others (by the destructor of its thread-local seat), and nobody parks from then on:
//!   each finds by itself that the connection is gone. The last reader has served, or else none has parked.
//!
//! Lock: one mutex, under which nothing is taken; held for a moment, and by a parked thread never.

use std::cell::RefCell;
use std::time::{Duration, Instant};

use crate::env::blocking;
use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::{Arc, Condvar, LockClass, Mutex, Rank};

/// Requests after which a thread looks at how much of the time it has waited.
const WINDOW: u32 = 256;
/// A thread that waits for less than this part of the time is not enough.
const BUSY_PART: u32 = 32;
/// One that waits for more than this part is more than enough, if it is not alone.
const IDLE_PART: u32 = 2;

/// How long a request may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Work {
    /// Answered from memory as a rule.
    Quick,
    /// Waits for a device, for other requests, or moves many bytes.
    Long,
}

#[derive(Debug, Default)]
struct Places {
    /// Threads that have served before, and now read or do quick work.
    readers: usize,
    /// How many of those there should be.
    wanted: usize,
    /// Parked threads.
    parked: usize,
    /// Parked threads that have been given a place and have not woken up yet.
    waking: usize,
    /// The connection ends: nobody parks.
    is_over: bool,
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Crew {
    places: Mutex<Places>,
    given: Condvar,
    /// Copies of `readers` and `wanted`, to see without the lock that nothing is to be done.
    readers: AtomicUsize,
    wanted: AtomicUsize,
    wanted_max: usize,
}

/// The calling thread's part in its crew.
struct Seat {
    crew: Arc<Crew>,
    /// Whether it is one of `readers`.
    counted: bool,
    /// When its last answer was sent, and when the request that it works on had come.
    answered: Option<Instant>,
    arrived: Option<Instant>,
    /// Quick requests in this window, how long it waited for them, and how long it worked on them.
    requests: u32,
    waited: Duration,
    worked: Duration,
}

thread_local! {
    static SEAT: RefCell<Option<Seat>> = const { RefCell::new(None) };
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut places = self.crew.places.lock();
        places.is_over = true;
        drop(places);
        self.crew.given.notify_all();
    }
}

/// One request, from before it is looked at until after its answer is sent.
#[must_use]
pub(super) struct Shift(());

impl Drop for Shift {
    fn drop(&mut self) {
        with_seat(Seat::answered);
    }
}

/// Does something to the thread's seat. Not re-entered: what is done there waits for nothing but a place.
fn with_seat(act: impl FnOnce(&mut Seat)) {
    // A thread that is ending has none.
    let _ = SEAT.try_with(|seat| {
        if let Ok(mut seat) = seat.try_borrow_mut()
            && let Some(seat) = seat.as_mut()
        {
            act(seat);
        }
    });
}

/// How many places there should be, where there are `wanted` and one of the threads waited and worked for so long in a window.
fn places_for(waited: Duration, worked: Duration, wanted: usize) -> usize {
    let time = waited + worked;
    if waited * BUSY_PART < time {
        wanted + 1
    } else if waited * IDLE_PART > time {
        wanted.saturating_sub(1)
    } else {
        wanted
    }
}

impl Crew {
    /// A crew for a session of `threads` threads on a host of `processors`.
    pub(super) fn new(threads: usize, processors: usize) -> Arc<Self> {
        Arc::new(Self {
            places: Mutex::ranked(LockClass::new(Rank::Event), Places { wanted: 1, ..Places::default() }),
            given: Condvar::new(),
            readers: AtomicUsize::new(0),
            wanted: AtomicUsize::new(1),
            wanted_max: processors.min(threads).max(1),
        })
    }

    /// The calling thread has read a request.
    pub(super) fn enter(self: &Arc<Self>, work: Work) -> Shift {
        SEAT.with(|seat| {
            let mut seat = seat.borrow_mut();
            if !seat.as_ref().is_some_and(|seat| Arc::ptr_eq(&seat.crew, self)) {
                *seat = Some(Seat::new(Arc::clone(self)));
                blocking::set_hook(|| with_seat(Seat::step_aside));
            }
        });
        with_seat(|seat| {
            seat.arrived();
            if work == Work::Long {
                seat.step_aside();
            }
        });
        Shift(())
    }

    fn publish(&self, places: &Places) {
        self.readers.store(places.readers, Ordering::Relaxed);
        self.wanted.store(places.wanted, Ordering::Relaxed);
    }

    /// Gives a place to a parked thread, if there is one. Returns whether.
    fn call_one(&self, places: &mut Places) -> bool {
        let is_there = places.parked > places.waking;
        if is_there {
            places.waking += 1;
            self.given.notify_one();
        }
        is_there
    }

    /// So many places there are from now on.
    fn want(&self, wanted: usize) {
        let mut places = self.places.lock();
        places.wanted = wanted;
        if places.readers < places.wanted && self.call_one(&mut places) {
            places.readers += 1;
        }
        self.publish(&places);
    }
}

impl Seat {
    fn new(crew: Arc<Crew>) -> Self {
        let (waited, worked) = (Duration::ZERO, Duration::ZERO);
        Self { crew, counted: false, answered: None, arrived: None, requests: 0, waited, worked }
    }

    /// Counts the thread, if it is not, and learns from how soon the request came.
    fn arrived(&mut self) {
        if !self.counted {
            let mut places = self.crew.places.lock();
            places.readers += 1;
            self.counted = true;
            self.crew.publish(&places);
        }
        let now = Instant::now();
        self.arrived = Some(now);
        if let Some(answered) = self.answered {
            self.requests += 1;
            self.waited += now.saturating_duration_since(answered);
        }
        if self.requests >= WINDOW {
            let wanted = self.crew.wanted.load(Ordering::Relaxed);
            let better = places_for(self.waited, self.worked, wanted).clamp(1, self.crew.wanted_max);
            if better != wanted {
                self.crew.want(better);
            }
            (self.requests, self.waited, self.worked) = (0, Duration::ZERO, Duration::ZERO);
        }
    }

    /// Gives the place up: what follows may take long.
    fn step_aside(&mut self) {
        if !self.counted {
            return;
        }
        self.counted = false;
        let mut places = self.crew.places.lock();
        // The place goes over as it is, or is gone.
        if places.readers > places.wanted || !self.crew.call_one(&mut places) {
            places.readers = places.readers.saturating_sub(1);
        }
        self.crew.publish(&places);
    }

    /// The answer is sent: takes a place, or parks until there is one.
    fn answered(&mut self) {
        // What it gave its place away for says nothing about the load.
        if self.counted
            && let Some(arrived) = self.arrived
        {
            self.worked += arrived.elapsed();
        }
        let crew = &self.crew;
        let has_place = self.counted && crew.readers.load(Ordering::Relaxed) <= crew.wanted.load(Ordering::Relaxed);
        if !has_place && !std::thread::panicking() {
            let mut places = crew.places.lock();
            if self.counted {
                places.readers = places.readers.saturating_sub(1);
            }
            if places.readers < places.wanted || places.is_over {
                places.readers += 1;
            } else {
                places.parked += 1;
                crew.publish(&places);
                while places.waking == 0 && !places.is_over {
                    crew.given.wait(&mut places);
                }
                places.parked -= 1;
                // Whoever called has counted this thread already.
                if places.waking > 0 {
                    places.waking -= 1;
                } else {
                    places.readers += 1;
                }
            }
            self.counted = true;
            crew.publish(&places);
        }
        self.answered = Some(Instant::now());
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::thread::{JoinHandle, ThreadId};

    use super::*;
    use crate::env::Event;
    use crate::sync::atomic::AtomicBool;

    type Job = Box<dyn FnOnce() + Send>;

    /// A session as fuser has it: threads that read from one queue, as long as it is open.
    struct Session {
        queue: Option<Sender<(Work, Job)>>,
        threads: Vec<JoinHandle<()>>,
    }

    impl Session {
        fn new(threads: usize, processors: usize) -> Self {
            let crew = Crew::new(threads, processors);
            let (queue, requests) = channel::<(Work, Job)>();
            let requests = Arc::new(std::sync::Mutex::new(requests));
            let read = |requests: &std::sync::Mutex<Receiver<(Work, Job)>>| requests.lock().unwrap().recv();
            let threads = (0..threads).map(|_| {
                let (crew, requests) = (Arc::clone(&crew), Arc::clone(&requests));
                std::thread::spawn(move || {
                    while let Ok((work, job)) = read(&requests) {
                        let _shift = crew.enter(work);
                        job();
                    }
                })
            });
            Self { queue: Some(queue), threads: threads.collect() }
        }

        fn send(&self, work: Work, job: impl FnOnce() + Send + 'static) {
            self.queue.as_ref().unwrap().send((work, Box::new(job))).unwrap();
        }

        /// Sends, waits for the answer, and returns who gave it.
        fn ask(&self, work: Work) -> ThreadId {
            let (answer, answered) = channel();
            self.send(work, move || answer.send(std::thread::current().id()).unwrap());
            answered.recv().unwrap()
        }
    }

    impl Drop for Session {
        /// The connection ends; all threads must.
        fn drop(&mut self) {
            self.queue = None;
            // After a failure some may be blocked for ever.
            if !std::thread::panicking() {
                self.threads.drain(..).for_each(|thread| thread.join().unwrap());
            }
        }
    }

    #[test]
    fn one_client_is_served_by_one_thread() {
        let session = Session::new(6, 4);
        let (mut last, mut row, mut asked) = (session.ask(Work::Quick), 0, 0);
        while row < 100 {
            let served = session.ask(Work::Quick);
            row = if served == last { row + 1 } else { 0 };
            last = served;
            asked += 1;
            assert!(asked < 100_000, "after {asked} requests of one client several threads still take turns");
        }
    }

    #[test]
    fn somebody_reads_while_others_block() {
        for work in [Work::Quick, Work::Long] {
            let session = Session::new(4, 4);
            for _ in 0..64 {
                session.ask(Work::Quick);
            }
            for _ in 0..200 {
                // Three that wait until a fourth request is served, by an event as a transaction does.
                let gate = Arc::new((Event::new(), AtomicBool::new(false)));
                let (ended, wait) = channel();
                for _ in 0..3 {
                    let (gate, ended) = (Arc::clone(&gate), ended.clone());
                    session.send(work, move || {
                        loop {
                            let seen = gate.0.generation();
                            if gate.1.load(Ordering::SeqCst) {
                                break;
                            }
                            gate.0.wait_past(seen, None);
                        }
                        ended.send(()).unwrap();
                    });
                }
                session.send(Work::Quick, move || {
                    gate.1.store(true, Ordering::SeqCst);
                    gate.0.notify();
                });
                (0..3).for_each(|_| wait.recv_timeout(Duration::from_secs(60)).unwrap());
            }
        }
    }

    #[test]
    fn places_follow_the_part_of_the_time_that_a_thread_waits() {
        let after = |waited, worked| places_for(Duration::from_micros(waited), Duration::from_micros(worked), 2);
        assert_eq!([after(1, 99), after(4, 96), after(50, 50), after(51, 49), after(100, 0)], [3, 2, 2, 1, 1]);
        assert_eq!(after(0, 0), 2);
        assert_eq!(places_for(Duration::from_secs(1), Duration::ZERO, 0), 0);
    }

    #[test]
    fn a_busy_thread_gets_another_beside_it_and_idle_ones_do_not_stay() {
        let crew = Crew::new(4, 2);
        // One who never waits: what it works on takes longer than it takes to come back.
        let begin = Instant::now();
        let wanted = || {
            assert!(begin.elapsed() < Duration::from_secs(60), "it takes too long");
            crew.places.lock().wanted
        };
        while wanted() < 2 {
            let shift = crew.enter(Work::Quick);
            let start = Instant::now();
            while start.elapsed() < Duration::from_micros(200) {}
            drop(shift);
        }
        while wanted() > 1 {
            std::thread::sleep(Duration::from_micros(50));
            drop(crew.enter(Work::Quick));
        }
    }

    #[test]
    fn a_flood_is_answered() {
        let session = Session::new(8, 4);
        let (answer, answered) = channel();
        for number in 0..20_000_u64 {
            let answer = answer.clone();
            let work = if number % 7 == 0 { Work::Long } else { Work::Quick };
            session.send(work, move || answer.send(number).unwrap());
        }
        let mut numbers: Vec<u64> = (0..20_000).map(|_| answered.recv().unwrap()).collect();
        numbers.sort_unstable();
        assert!(numbers.iter().copied().eq(0..20_000));
    }

    #[test]
    fn all_end_whenever_the_connection_ends() {
        for requests in 0..40 {
            let session = Session::new(5, 2);
            for number in 0..requests {
                session.ask(if number % 3 == 0 { Work::Long } else { Work::Quick });
            }
        }
    }
}
