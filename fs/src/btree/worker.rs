//! The worker that makes checkpoints.

use std::time::Duration;

use super::Forest;
use super::checkpoint::CheckpointReason;
use super::log::CheckpointLog;
use crate::env::{Env, Event, Progress, Worker};
use crate::error::{Error, Result};
use crate::sync::atomic::Ordering;
use crate::sync::{Arc, Mutex};

impl Forest {
    /// A worker that makes checkpoints: when asked, when the journal is 40% full, when it gives node space back, and every
    /// `interval`.
    pub fn checkpoint_worker(self: &Arc<Self>, log: Arc<dyn CheckpointLog>, interval: Duration) -> Arc<dyn Worker> {
        let forest = Arc::downgrade(self);
        log.on_pressure(Box::new(move || {
            if let Some(forest) = forest.upgrade() {
                forest.request_checkpoint();
            }
        }));
        let last = Mutex::new(self.env.monotonic());
        Arc::new(CheckpointWorker { forest: Arc::clone(self), log, interval, last })
    }
}

struct CheckpointWorker {
    forest: Arc<Forest>,
    log: Arc<dyn CheckpointLog>,
    interval: Duration,
    /// When the last one ended.
    last: Mutex<Duration>,
}

/// How full the journal may get before a checkpoint starts.
const JOURNAL_FILL_PERMILLE: u32 = 400;
/// Shortest time between two checkpoints that are made to give node space back.
const RECLAIM_INTERVAL: Duration = Duration::from_secs(1);
/// How often the journal's fill is looked at.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

impl CheckpointWorker {
    /// Whether another checkpoint moves the older kept F, or begins to.
    fn would_free_journal(&self) -> bool {
        let moves = {
            let kept = self.forest.kept.lock();
            kept.previous.as_ref().map_or(0, |previous| previous.first_replay) < kept.newest.first_replay
        };
        moves || self.log.unreflected_permille() > 0
    }
}

impl Worker for CheckpointWorker {
    fn name(&self) -> &'static str {
        "checkpoint"
    }

    fn step(&self, _budget: u32) -> Result<Progress> {
        let forest = &self.forest;
        let env: &Env = &forest.env;
        let idle = Progress::Idle(Some(POLL_INTERVAL.min(self.interval)));
        let overdue = env.monotonic().saturating_sub(*self.last.lock()) >= self.interval;
        let asked = forest.checkpoint_requested.load(Ordering::Relaxed)
            || (self.log.fill_permille() >= JOURNAL_FILL_PERMILLE && self.would_free_journal());
        let since = env.monotonic().saturating_sub(*self.last.lock());
        let reclaims = since >= RECLAIM_INTERVAL.min(self.interval) && forest.wants_reclaim();
        let asked = asked || reclaims;
        let due = asked || (overdue && forest.dirty_count.load(Ordering::Relaxed) > 0);
        if !due || !forest.try_begin() {
            return Ok(idle);
        }
        let reason = if asked { CheckpointReason::Requested } else { CheckpointReason::Periodic };
        let outcome = forest.run_checkpoint(&*self.log, reason);
        *self.last.lock() = env.monotonic();
        match outcome {
            // Nothing is lost yet: space may be freed, and who needs it is told.
            Err(Error::NoSpace(reason)) => {
                tracing::error!("a checkpoint found no space: {reason}");
                Ok(idle)
            }
            other => other.map(|_| Progress::Worked),
        }
    }

    fn event(&self) -> &Event {
        &self.forest.checkpoint_event
    }
}
