//! Runs workers: a thread each in production, the simulation's scheduler otherwise.
//!
//! A worker whose step fails or panics is not run again: the failure is given to `on_failure`, which latches the filesystem
//! read-only. Takes no locks of its own.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::JoinHandle;

use crate::env::{Env, Progress, Worker};
use crate::error::{Error, Result};
use crate::sync::Arc;
use crate::sync::atomic::{AtomicBool, Ordering};
#[cfg(not(loom))]
use crate::sync::{RankSet, order};

/// How much a worker is asked to do in one step.
const STEP_BUDGET: u32 = 64;

/// What is called, with the worker's name, when one fails.
pub type OnFailure = Arc<dyn Fn(&'static str, &Error) + Send + Sync>;

/// Running workers, in the order of their start: a step may wait for workers that were started earlier (a commit for a checkpoint), never for
/// later ones. Stop them with [`Self::stop`] before what they work on goes away.
pub struct WorkerThreads {
    threads: Vec<Running>,
}

struct Running {
    worker: Arc<dyn Worker>,
    stopping: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl std::fmt::Debug for WorkerThreads {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WorkerThreads").field("threads", &self.threads.len()).finish()
    }
}

impl WorkerThreads {
    /// Starts a thread for each worker, or registers them with the simulation.
    ///
    /// # Errors
    /// If the host refuses a thread.
    pub fn start(env: &Arc<Env>, workers: Vec<Arc<dyn Worker>>, on_failure: &OnFailure) -> Result<Self> {
        let mut running = Self { threads: Vec::new() };
        for worker in workers {
            if env.is_simulated() {
                env.register(worker);
                continue;
            }
            let stopping = Arc::new(AtomicBool::new(false));
            let (body, is_stopping, on_failure) = (Arc::clone(&worker), Arc::clone(&stopping), Arc::clone(on_failure));
            let thread = std::thread::Builder::new()
                .name(format!("coppice-{}", worker.name()))
                .spawn(move || run(&*body, &is_stopping, &on_failure));
            match thread {
                Ok(thread) => running.threads.push(Running { worker, stopping, thread }),
                Err(error) => {
                    running.stop();
                    return Err(Error::io("starting a worker thread", error));
                }
            }
        }
        Ok(running)
    }

    /// Stops the workers after their present step, the last started first, and waits for each: those that it may be waiting for still run.
    pub fn stop(mut self) {
        self.stop_all();
    }

    fn stop_all(&mut self) {
        while let Some(Running { worker, stopping, thread }) = self.threads.pop() {
            stopping.store(true, Ordering::Release);
            worker.event().notify();
            // Who unwinds may hold what a worker waits for.
            if !std::thread::panicking() && thread.join().is_err() {
                tracing::error!(worker = worker.name(), "the worker's thread panicked outside of a step");
            }
        }
    }
}

/// A filesystem that is dropped without being closed must not go on writing.
impl Drop for WorkerThreads {
    fn drop(&mut self) {
        self.stop_all();
    }
}

fn run(worker: &dyn Worker, stopping: &AtomicBool, on_failure: &OnFailure) {
    loop {
        let seen = worker.event().generation();
        if stopping.load(Ordering::Acquire) {
            return;
        }
        let outcome = catch_unwind(AssertUnwindSafe(|| worker.step(STEP_BUDGET)))
            .unwrap_or_else(|_| Err(Error::Bug(format!("worker {} panicked", worker.name()))));
        match outcome {
            Ok(Progress::Worked) => {}
            #[cfg(not(loom))]
            Ok(Progress::Idle(timeout)) => {
                order::check_held("a worker's rest", RankSet::NONE);
                worker.event().wait_past(seen, timeout);
            }
            #[cfg(loom)]
            Ok(Progress::Idle(_)) => {
                let _ = seen;
            }
            Err(Error::Shutdown) => return,
            Err(error) => {
                on_failure(worker.name(), &error);
                return;
            }
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::env::Event;
    use crate::sync::atomic::AtomicU32;

    struct Failing(Event, AtomicU32);
    impl Worker for Failing {
        fn name(&self) -> &'static str {
            "failing"
        }
        fn step(&self, _: u32) -> Result<Progress> {
            if self.1.fetch_add(1, Ordering::Relaxed) == 2 { panic!("on purpose") } else { Ok(Progress::Worked) }
        }
        fn event(&self) -> &Event {
            &self.0
        }
    }

    /// Serves whoever asks, as the checkpoint worker does.
    #[derive(Default)]
    struct Serving {
        event: Event,
        asked: AtomicU32,
        served: AtomicU32,
    }
    impl Worker for Serving {
        fn name(&self) -> &'static str {
            "serving"
        }
        fn step(&self, _: u32) -> Result<Progress> {
            self.served.store(self.asked.load(Ordering::Acquire), Ordering::Release);
            Ok(Progress::Idle(None))
        }
        fn event(&self) -> &Event {
            &self.event
        }
    }

    /// A step that needs the other worker many times, and says if it is not served.
    struct Asking {
        event: Event,
        serving: Arc<Serving>,
        begun: std::sync::mpsc::Sender<()>,
        outcome: std::sync::mpsc::Sender<bool>,
    }
    impl Worker for Asking {
        fn name(&self) -> &'static str {
            "asking"
        }
        fn step(&self, _: u32) -> Result<Progress> {
            let _ = self.begun.send(());
            let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
            let mut is_served = true;
            for _ in 0..20_000 {
                let asked = self.serving.asked.fetch_add(1, Ordering::AcqRel) + 1;
                self.serving.event.notify();
                while self.serving.served.load(Ordering::Acquire) < asked && is_served {
                    is_served = std::time::Instant::now() < deadline;
                    std::thread::yield_now();
                }
            }
            let _ = self.outcome.send(is_served);
            Ok(Progress::Idle(None))
        }
        fn event(&self) -> &Event {
            &self.event
        }
    }

    /// All workers were told to stop at once: a deletion that waited for a checkpoint then waited for ever, and close with it.
    #[test]
    fn a_worker_may_wait_for_an_earlier_one_until_it_has_stopped() {
        let serving = Arc::new(Serving::default());
        let (begun, has_begun) = std::sync::mpsc::channel();
        let (outcome, outcomes) = std::sync::mpsc::channel();
        let asking = Asking { event: Event::new(), serving: Arc::clone(&serving), begun, outcome };
        let on_failure: OnFailure = Arc::new(|_, _| {});
        let threads = WorkerThreads::start(&Env::real(), vec![serving, Arc::new(asking)], &on_failure).unwrap();
        has_begun.recv().unwrap();
        threads.stop();
        assert_eq!(outcomes.try_iter().find(|is_served| !is_served), None);
    }

    #[test]
    fn a_panic_in_a_step_is_reported_and_the_worker_ends() {
        let (sender, receiver) = std::sync::mpsc::channel();
        let on_failure: OnFailure = Arc::new(move |name, error| sender.send((name, error.to_string())).unwrap());
        let worker = Arc::new(Failing(Event::new(), AtomicU32::new(0)));
        let threads = WorkerThreads::start(&Env::real(), vec![worker], &on_failure).unwrap();
        let (name, error) = receiver.recv().unwrap();
        assert_eq!(name, "failing");
        assert!(error.contains("panicked"), "{error}");
        threads.stop();
    }
}
