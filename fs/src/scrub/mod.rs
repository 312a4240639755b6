//! Scrub: reads and verifies everything while the filesystem runs, and repairs what has another copy.
//!
//! ```text
//! superblock    its copies; stale or bad ones are written again
//! checkpoints   the kept records and node-space maps, each copy; bad ones are written again
//! journal       what the kept checkpoints need of it and was durable, each copy; bad ones are written again
//! nodes         every copy of every node; one with a bad copy is written whole, elsewhere, by the next checkpoint
//! data          every extent, through the data layer's own read: buckets are referenced, and a key is looked up again before anything counts as damaged
//! settling      a checkpoint, if nodes are to be written anew
//! ```
//! One [`Worker`], whose thread is started with the first scrub: who never scrubs has none. It is driven and looked at through [`ScrubControl`]. A cancelled scrub
//! goes on where it stopped. Where a [`ScrubKeeper`] is given, it is told the place when a scrub begins, ends or is cancelled, every few seconds
//! beside it, and at the unmount; what it had kept is read once, by who opens the filesystem. On a read-only filesystem everything is read and nothing repaired.
//!
//! Locks: one short mutex over the state, held over nothing; what a step reads and waits for is the forest's and the data layer's. The keeper is called by
//! the scrub's own thread and by who opens and closes, never by who answers a request: its file may lie on the very filesystem that is served.

mod place;
mod step;

use std::time::Duration;

use crate::btree::{Forest, NodeCursor, ScrubFinding};
use crate::data::Data;
use crate::device::BlockDevice;
use crate::env::{Env, Event, Progress, Worker};
use crate::error::{Error, Result};
use crate::format::Position;
use crate::format::superblock::Superblock;
use crate::journal::Journal;
use crate::space::Space;
use crate::sync::{Arc, Mutex};
use crate::transaction::Transactions;
use crate::vfs::{ScrubAsk, ScrubControl, ScrubPage, ScrubReport, ScrubRequest, ScrubState, ScrubStatus, Vfs};
use crate::workers::{OnFailure, WorkerThreads};

pub use self::place::{ScrubKeeper, ScrubPlace};

/// Findings that are kept; further ones are counted.
const FINDINGS_MAX: usize = 10_000;
/// Findings in one answer, before their length counts.
const PAGE_FINDINGS_MAX: usize = 64;
/// Longest rest for the sake of the rate, so that a cancellation is soon heard.
const REST_MAX: Duration = Duration::from_millis(200);
/// How old the kept place of a running scrub is at most, but for the length of a step.
const KEEP_INTERVAL: Duration = Duration::from_secs(5);

/// What a scrub needs.
pub struct ScrubConfig {
    /// Its copies are verified.
    pub superblock: Arc<Superblock>,
    /// All devices.
    pub devices: Vec<Arc<dyn BlockDevice>>,
    /// The trees.
    pub forest: Arc<Forest>,
    /// The journal.
    pub journal: Arc<Journal>,
    /// Transactions.
    pub transactions: Arc<Transactions>,
    /// File data.
    pub data: Arc<Data>,
    /// How much there is.
    pub space: Arc<Space>,
    /// For paths.
    pub vfs: Arc<Vfs>,
    /// Time.
    pub env: Arc<Env>,
    /// Nothing may be written.
    pub read_only: bool,
    /// Keeps the place of a scrub beyond the unmount.
    pub keeper: Option<Arc<dyn ScrubKeeper>>,
    /// What is called if the worker fails.
    pub on_failure: OnFailure,
}

/// Where a scrub goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Superblock,
    Checkpoints,
    Journal,
    Nodes(NodeCursor),
    Data(Position),
    /// Waits for a checkpoint after this many.
    Settling(u64),
    End,
}

impl Phase {
    fn name(self) -> &'static str {
        match self {
            Self::Superblock => "superblock",
            Self::Checkpoints => "checkpoints",
            Self::Journal => "journal",
            Self::Nodes(_) => "nodes",
            Self::Data(_) => "data",
            Self::Settling(_) => "settling",
            Self::End => "end",
        }
    }
}

#[derive(Debug)]
struct State {
    status: ScrubStatus,
    findings: Vec<ScrubReport>,
    phase: Phase,
    /// Something was found that a checkpoint repairs.
    needs_checkpoint: bool,
    /// So many checkpoints had been made when it was found last.
    checkpoints_before: u64,
    /// Changed since it was kept, in more than how far it is.
    is_to_be_kept: bool,
    /// When it was kept last.
    kept: Duration,
    rate_bytes: u64,
    /// When this run began, and what was read before it.
    began: Duration,
    bytes_before: u64,
    elapsed_before: u64,
}

/// See the module's documentation.
pub struct Scrub {
    config: ScrubConfig,
    state: Mutex<State>,
    event: Event,
    thread: Mutex<Option<WorkerThreads>>,
}

/// The part that the thread drives.
struct ScrubWorker(Arc<Scrub>);

/// What one step came to.
#[derive(Default)]
struct Step {
    bytes: u64,
    nodes: u64,
    copies: u64,
    data_bytes: u64,
    unchecked_bytes: u64,
    findings: Vec<ScrubReport>,
    needs_checkpoint: bool,
    next: Option<Phase>,
    /// Come back after this long.
    rest: Option<Duration>,
}

impl std::fmt::Debug for Scrub {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Scrub").field("state", &self.state.lock().status.state).finish_non_exhaustive()
    }
}

impl Scrub {
    /// A scrub that has not begun.
    #[must_use]
    pub fn new(config: ScrubConfig) -> Arc<Self> {
        let state = Mutex::new(recalled(&config));
        Arc::new(Self { config, state, event: Event::new(), thread: Mutex::new(None) })
    }

    /// What drives a scrub.
    fn worker(self: &Arc<Self>) -> Arc<dyn Worker> {
        Arc::new(ScrubWorker(Arc::clone(self)))
    }

    /// Stops the thread, if there is one. Call it before the other workers are stopped: a step may wait for them.
    pub fn stop(&self) {
        self.cancel();
        let thread = self.thread.lock().take();
        if let Some(thread) = thread {
            thread.stop();
        }
        self.keep_if_due();
    }

    /// The last checkpoint was made: what was repaired is on the device. To be called after [`Self::stop`].
    pub fn settle(&self) {
        {
            let mut state = self.state.lock();
            state.is_to_be_kept |= state.needs_checkpoint;
            state.needs_checkpoint = false;
        }
        self.keep_if_due();
    }

    fn cancel(&self) {
        let now = self.config.env.monotonic();
        {
            let mut state = self.state.lock();
            if state.status.state != ScrubState::Running {
                return;
            }
            state.status.elapsed_ms = state.elapsed(now);
            state.stopped(ScrubState::Cancelled, &self.config.env);
        }
        self.event.notify();
    }

    /// Tells the keeper, if there is one, where the scrub stands, if it was not told for long or of something that counts.
    fn keep_if_due(&self) {
        let Some(keeper) = &self.config.keeper else { return };
        let now = self.config.env.monotonic();
        let checkpoints = self.config.forest.checkpoints_done();
        let place = {
            let mut state = self.state.lock();
            let is_running = state.status.state == ScrubState::Running;
            let is_old = is_running && now.saturating_sub(state.kept) >= KEEP_INTERVAL;
            if !state.is_to_be_kept && !is_old {
                return;
            }
            // One that was running when it was found may have taken its nodes before.
            let is_unsettled = state.needs_checkpoint && checkpoints <= state.checkpoints_before.saturating_add(1);
            state.is_to_be_kept = false;
            state.kept = now;
            ScrubPlace { is_unsettled, ..ScrubPlace::of(&state, state.shown(now), self.config.read_only) }
        };
        if let Err(error) = keeper.keep(self.config.superblock.filesystem, &place) {
            tracing::warn!("the place of the scrub cannot be kept: {error}");
        }
    }

    fn start(self: &Arc<Self>, restart: bool, rate_bytes: u64) -> Result<()> {
        let now = self.config.env.monotonic();
        let bytes_total = self.total_bytes();
        {
            let mut state = self.state.lock();
            if state.status.state == ScrubState::Running {
                return Err(rustix::io::Errno::BUSY.into());
            }
            let notice = std::mem::take(&mut state.status.notice);
            if restart || state.status.state != ScrubState::Cancelled {
                *state = State::new();
            } else {
                state.status.resumed = true;
                state.elapsed_before = state.status.elapsed_ms;
            }
            state.status.notice = if restart { String::new() } else { notice };
            state.status.ended_at = 0;
            state.is_to_be_kept = true;
            state.rate_bytes = rate_bytes;
            state.began = now;
            state.bytes_before = state.status.bytes;
            state.status.state = ScrubState::Running;
            state.status.bytes_total = bytes_total;
        }
        self.start_thread()?;
        self.event.notify();
        Ok(())
    }

    fn start_thread(self: &Arc<Self>) -> Result<()> {
        let mut thread = self.thread.lock();
        if thread.is_none() {
            *thread = Some(WorkerThreads::start(&self.config.env, vec![self.worker()], &self.config.on_failure)?);
        }
        Ok(())
    }

    /// Data, and both copies of what nodes take.
    fn total_bytes(&self) -> u64 {
        self.config.space.usage().data_bytes.saturating_add(self.config.forest.node_bytes())
    }

    fn page(&self, cursor: u64) -> ScrubPage {
        let now = self.config.env.monotonic();
        let state = self.state.lock();
        let status = state.shown(now);
        let from = usize::try_from(cursor).unwrap_or(usize::MAX).min(state.findings.len());
        let findings: Vec<_> = state.findings.iter().skip(from).take(PAGE_FINDINGS_MAX).cloned().collect();
        let next = from as u64 + findings.len() as u64;
        ScrubPage { status, findings, next, finding_count: state.findings.len() as u64 }
    }

    /// Does one step, notes what it came to, and has it kept.
    fn step(&self) -> Result<Progress> {
        let progress = self.step_only();
        self.keep_if_due();
        progress
    }

    fn step_only(&self) -> Result<Progress> {
        let (phase, needs_checkpoint) = {
            let state = self.state.lock();
            if state.status.state != ScrubState::Running {
                return Ok(Progress::Idle(None));
            }
            if let Some(rest) = state.ahead_of_rate(self.config.env.monotonic()) {
                return Ok(Progress::Idle(Some(rest.min(REST_MAX))));
            }
            (state.phase, state.needs_checkpoint)
        };
        let outcome = self.run(phase, needs_checkpoint);
        let now = self.config.env.monotonic();
        let checkpoints = self.config.forest.checkpoints_done();
        let mut state = self.state.lock();
        match outcome {
            Ok(step) => {
                state.take(&step);
                if step.needs_checkpoint {
                    state.checkpoints_before = checkpoints;
                }
                if let Some(next) = step.next {
                    state.phase = next;
                }
                if state.phase == Phase::End {
                    state.status.elapsed_ms = state.elapsed(now);
                    state.status.bytes_total = state.status.bytes;
                    state.needs_checkpoint = false;
                    state.stopped(ScrubState::Done, &self.config.env);
                    return Ok(Progress::Idle(None));
                }
                Ok(step.rest.map_or(Progress::Worked, |rest| Progress::Idle(Some(rest))))
            }
            Err(Error::Shutdown) => Err(Error::Shutdown),
            // Whoever asked is told; the filesystem itself is none the worse.
            Err(error) => {
                tracing::error!("the scrub ended: {error}");
                state.status.elapsed_ms = state.elapsed(now);
                state.status.failure = error.to_string();
                state.stopped(ScrubState::Failed, &self.config.env);
                Ok(Progress::Idle(None))
            }
        }
    }
}

impl State {
    fn new() -> Self {
        Self {
            status: ScrubStatus::default(),
            findings: Vec::new(),
            phase: Phase::Superblock,
            needs_checkpoint: false,
            checkpoints_before: 0,
            is_to_be_kept: false,
            kept: Duration::ZERO,
            rate_bytes: 0,
            began: Duration::ZERO,
            bytes_before: 0,
            elapsed_before: 0,
        }
    }

    fn elapsed(&self, now: Duration) -> u64 {
        let since = now.saturating_sub(self.began).as_millis();
        self.elapsed_before.saturating_add(u64::try_from(since).unwrap_or(u64::MAX))
    }

    /// The status as it is told.
    fn shown(&self, now: Duration) -> ScrubStatus {
        let mut status = self.status.clone();
        status.phase = self.phase.name().to_owned();
        if status.state == ScrubState::Running {
            status.elapsed_ms = self.elapsed(now);
        }
        status
    }

    fn stopped(&mut self, state: ScrubState, env: &Env) {
        self.status.state = state;
        self.status.ended_at = env.now().seconds;
        self.is_to_be_kept = true;
    }

    /// How long to rest, if more was read in this run than the rate allows.
    fn ahead_of_rate(&self, now: Duration) -> Option<Duration> {
        if self.rate_bytes == 0 {
            return None;
        }
        let bytes = self.status.bytes.saturating_sub(self.bytes_before);
        let micros = u128::from(bytes) * 1_000_000 / u128::from(self.rate_bytes);
        let due = Duration::from_micros(u64::try_from(micros).unwrap_or(u64::MAX));
        let passed = now.saturating_sub(self.began);
        (due > passed).then(|| due.saturating_sub(passed))
    }

    fn take(&mut self, step: &Step) {
        let status = &mut self.status;
        status.bytes += step.bytes;
        status.nodes += step.nodes;
        status.copies += step.copies;
        status.data_bytes += step.data_bytes;
        status.unchecked_bytes += step.unchecked_bytes;
        status.bytes_total = status.bytes_total.max(status.bytes);
        self.needs_checkpoint |= step.needs_checkpoint;
        for finding in &step.findings {
            if finding.is_repaired {
                tracing::warn!("scrub: {}", finding.describe());
                status.repaired += 1;
            } else {
                tracing::error!("scrub: {}", finding.describe());
                status.damaged += 1;
            }
            if self.findings.len() < FINDINGS_MAX {
                self.findings.push(finding.clone());
            }
        }
    }
}

/// The state that was kept, or one that has not begun.
fn recalled(config: &ScrubConfig) -> State {
    let mut state = State::new();
    let Some(keeper) = &config.keeper else { return state };
    let read = |place: ScrubPlace| Ok((place.read(config.read_only)?, place.status));
    match keeper.recall(config.superblock.filesystem).and_then(|place| place.map(read).transpose()) {
        Ok(None) => {}
        Ok(Some((phase, mut status))) => {
            // Whoever ran it was killed.
            if status.state == ScrubState::Running {
                status.state = ScrubState::Cancelled;
            }
            (state.phase, state.status) = (phase, ScrubStatus { resumed: false, ..status });
        }
        Err(why) => state.status.notice = format!("the kept place of a scrub is ignored: {why}"),
    }
    state
}

impl Step {
    fn to(next: Phase) -> Self {
        Self { next: Some(next), ..Self::default() }
    }

    /// To be tried again soon.
    fn later() -> Self {
        Self { rest: Some(Duration::from_millis(5)), ..Self::default() }
    }

    fn find(&mut self, kind: &str, found: ScrubFinding) {
        let reason = match found.keys {
            Some((btree, from, to)) => format!("{} tree, keys {from} to {to}: {}", btree.name(), found.reason),
            None => found.reason,
        };
        let is_repaired = found.is_repaired;
        self.findings.push(ScrubReport { kind: kind.into(), is_repaired, reason, ..ScrubReport::default() });
    }
}

impl Worker for ScrubWorker {
    fn name(&self) -> &'static str {
        "scrub"
    }

    fn step(&self, _budget: u32) -> Result<Progress> {
        self.0.step()
    }

    fn event(&self) -> &Event {
        &self.0.event
    }
}

/// The control of a scrub, for those who ask.
#[derive(Debug)]
pub struct ScrubHandle(pub Arc<Scrub>);

/// The same for the vfs, which a scrub holds itself.
#[derive(Debug)]
pub struct ScrubRequests(pub std::sync::Weak<Scrub>);

impl ScrubControl for ScrubRequests {
    fn control(&self, request: ScrubRequest) -> Result<ScrubPage> {
        ScrubHandle(self.0.upgrade().ok_or(Error::Shutdown)?).control(request)
    }
}

impl ScrubControl for ScrubHandle {
    fn control(&self, request: ScrubRequest) -> Result<ScrubPage> {
        match request.ask {
            ScrubAsk::Status => {}
            ScrubAsk::Start { restart, rate_bytes } => self.0.start(restart, rate_bytes)?,
            ScrubAsk::Cancel => self.0.cancel(),
        }
        Ok(self.0.page(request.cursor))
    }
}
