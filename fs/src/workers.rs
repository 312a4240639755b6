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

/// Running workers. Stop them with [`Self::stop`] before what they work on goes away.
pub struct WorkerThreads {
    stopping: Arc<AtomicBool>,
    threads: Vec<(Arc<dyn Worker>, JoinHandle<()>)>,
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
        let mut running = Self { stopping: Arc::new(AtomicBool::new(false)), threads: Vec::new() };
        for worker in workers {
            if env.is_simulated() {
                env.register(worker);
                continue;
            }
            let (body, stopping, on_failure) =
                (Arc::clone(&worker), Arc::clone(&running.stopping), Arc::clone(on_failure));
            let thread = std::thread::Builder::new()
                .name(format!("coppice-{}", worker.name()))
                .spawn(move || run(&*body, &stopping, &on_failure));
            match thread {
                Ok(thread) => running.threads.push((worker, thread)),
                Err(error) => {
                    running.stop();
                    return Err(Error::io("starting a worker thread", error));
                }
            }
        }
        Ok(running)
    }

    /// Asks all workers to stop after their present step, and waits for them.
    pub fn stop(self) {
        self.stopping.store(true, Ordering::Release);
        for (worker, _) in &self.threads {
            worker.event().notify();
        }
        for (worker, thread) in self.threads {
            if thread.join().is_err() {
                tracing::error!(worker = worker.name(), "the worker's thread panicked outside of a step");
            }
        }
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
