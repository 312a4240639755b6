//! Who writes, when, and who waits for it: reservations' way out, the leader's turn, flushes, and the background worker.

use std::time::Duration;

use super::ring::{Statement, flush_all};
use super::state::{Encoded, State};
use super::{Inner, JournalWatermark};
use crate::device::WriteRequest;
use crate::env::{Event, Progress, Worker};
use crate::error::{Error, Result};
use crate::format::journal::AccountingCounter;
use crate::sync::Arc;
use crate::sync::atomic::Ordering;
use crate::units::JournalSequence;

/// The longest time that a durable sequence stays unstated when nothing else is written, and the shortest between two statements.
const STATEMENT_INTERVAL: Duration = Duration::from_millis(50);
/// From this fill on a checkpoint is asked for, if so much of it was filled since the last one.
const PRESSURE_PERMILLE: u32 = 400;
const PRESSURE_UNREFLECTED_PERMILLE: u32 = 100;
/// After so many checkpoints in a row that found no bucket, nobody waits any longer for one that frees the ring. There is a while between two.
const STARVATIONS_MAX: u64 = 4;

/// The right to write. Dropping it ends the turn; unwinding latches, since nobody knows what was written.
struct Turn<'a>(&'a Inner);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.latch("a writer of the journal panicked".into());
        }
        let has_unwritten = {
            let mut state = self.0.state.lock();
            state.is_writing = false;
            state.has_unwritten()
        };
        self.0.turn.notify();
        self.0.space.notify();
        if has_unwritten {
            self.0.worker_event.notify();
        }
    }
}

impl Inner {
    pub fn latch(&self, reason: String) {
        {
            let mut state = self.state.lock();
            if state.latched.is_some() {
                return;
            }
            tracing::error!(%reason, "the journal is latched: nothing more is written or acknowledged");
            state.latched = Some(reason.clone());
        }
        for event in [&self.turn, &self.appended, &self.space, &self.reusable_event, &self.worker_event] {
            event.notify();
        }
        let hooks = self.latch_hooks.lock().clone();
        for hook in hooks {
            hook(&reason);
        }
    }

    /// Latches with what went wrong, and returns what everybody is told from now on.
    fn fail(&self, error: &Error) -> Error {
        self.latch(error.to_string());
        match self.state.lock().check() {
            Err(latched) => latched,
            Ok(()) => Error::Bug("the latch is open".into()),
        }
    }

    pub fn try_reserve(&self, payload_bytes: usize, watermark: JournalWatermark) -> Option<(JournalSequence, usize)> {
        let (reserved, must_wake, has_pressure) = {
            let mut state = self.state.lock();
            let reserved = state.try_reserve(payload_bytes, watermark, || self.env.monotonic())?;
            let due = state.open.opened_at + self.commit_interval;
            let must_wake = reserved.has_sealed || (reserved.is_first && Self::wakes_worker(&mut state, due));
            let has_pressure = !state.has_told_pressure
                && state.fill_permille() >= PRESSURE_PERMILLE
                && state.unreflected_permille() >= PRESSURE_UNREFLECTED_PERMILLE;
            state.has_told_pressure |= has_pressure;
            (reserved, must_wake, has_pressure)
        };
        if must_wake {
            self.worker_event.notify();
        }
        if has_pressure {
            self.ask_for_checkpoint();
        }
        Some((reserved.sequence, reserved.slot))
    }

    /// Whether the worker must be woken to look again at `due`. It is told once.
    fn wakes_worker(state: &mut State, due: Duration) -> bool {
        let must_wake = state.worker_wakes_at.is_none_or(|wakes_at| wakes_at > due);
        if must_wake {
            state.worker_wakes_at = Some(due);
        }
        must_wake
    }

    fn ask_for_checkpoint(&self) {
        if let Some(hook) = self.pressure.get() {
            hook();
        }
    }

    pub fn complete(
        &self,
        sequence: JournalSequence,
        slot: usize,
        fill: Option<(Vec<u8>, u32, &[(AccountingCounter, i64)], bool)>,
    ) {
        let is_sealed_complete = self.state.lock().complete(sequence, slot, fill);
        if is_sealed_complete {
            self.appended.notify();
            self.worker_event.notify();
        }
    }

    pub fn wait_for_space(&self, payload_bytes: usize, watermark: JournalWatermark) -> Result<()> {
        enum Next {
            Go,
            Write,
            State(JournalSequence),
        }
        {
            let state = self.state.lock();
            state.check()?;
            if payload_bytes > state.payload_bytes_max() {
                let largest = state.payload_bytes_max();
                return Err(Error::Bug(format!("{payload_bytes} bytes to log at once, {largest} fit a record")));
            }
        }
        // One checkpoint frees what is before the *older* kept one's F: it may take two. So each release is followed by another request.
        let mut asked_at = None;
        let mut starved_before = 0;
        let mut unstatable = None;
        let mut is_counted = false;
        let outcome = loop {
            let next = self.env.wait(&self.space, || {
                let mut state = self.state.lock();
                if let Err(error) = state.check() {
                    return Some(Err(error));
                }
                if !state.has_ring_room(payload_bytes, watermark) {
                    if !is_counted {
                        is_counted = true;
                        state.space_waiters += 1;
                    }
                    if let Some(sequence) = state.release_waits_for().filter(|&wanted| Some(wanted) != unstatable) {
                        return Some(Ok(Next::State(sequence)));
                    }
                    if watermark == JournalWatermark::Checkpoint {
                        // Only a checkpoint could help, and this is one: say so instead of waiting for ever. The reserve excludes it.
                        let problem =
                            format!("a checkpoint lacks {payload_bytes} bytes of the journal's reserve for it");
                        return Some(Err(Error::Bug(problem)));
                    }
                    if asked_at != Some(state.release_count) {
                        asked_at = Some(state.release_count);
                        starved_before = state.starvations;
                        drop(state);
                        self.ask_for_checkpoint();
                    } else if state.starvations - starved_before >= STARVATIONS_MAX {
                        let problem = "the log is full, and no bucket is left for the B-tree nodes that would free it";
                        return Some(Err(Error::NoSpace(problem)));
                    }
                    return None;
                }
                if !state.must_write_first(payload_bytes) {
                    return Some(Ok(Next::Go));
                }
                if state.is_writing || !state.has_unwritten() {
                    return None;
                }
                state.is_writing = true;
                Some(Ok(Next::Write))
            });
            match next {
                Err(error) | Ok(Err(error)) => break Err(error),
                Ok(Ok(Next::Go)) => break Ok(()),
                Ok(Ok(Next::Write)) => {
                    if let Err(error) = self.turn() {
                        break Err(error);
                    }
                }
                Ok(Ok(Next::State(sequence))) => match self.make_reusable(sequence, Statement::Release) {
                    Err(error) => break Err(error),
                    // Not possible now (no room even for that, or the release is past the log's end): only a later release can help.
                    Ok(_) => unstatable = Some(sequence),
                },
            }
        };
        if is_counted {
            self.state.lock().space_waiters -= 1;
        }
        outcome
    }

    pub fn flush(&self, upto: JournalSequence) -> Result<()> {
        // In simulation others may get in between a commit and its fsync, as in production.
        self.env.maybe_yield(8)?;
        let upto = {
            let mut state = self.state.lock();
            state.check()?;
            let upto = upto.min(state.newest());
            state.flush_wanted = state.flush_wanted.max(upto);
            upto
        };
        loop {
            let must_lead = self.env.wait(&self.turn, || {
                let mut state = self.state.lock();
                if let Err(error) = state.check() {
                    return Some(Err(error));
                }
                if state.flushed >= upto {
                    return Some(Ok(false));
                }
                if state.is_writing {
                    return None;
                }
                state.is_writing = true;
                Some(Ok(true))
            })??;
            if !must_lead {
                return Ok(());
            }
            self.turn()?;
        }
    }

    /// One leader's turn; the caller has set `is_writing`. Writes what is sealed, and the open record if somebody wants it; flushes if
    /// somebody wants that, including those who came during the write.
    fn turn(&self) -> Result<()> {
        let turn = Turn(self);
        let target = {
            let mut state = self.state.lock();
            state.check()?;
            if state.open.is_statement || state.open.sequence <= state.flush_wanted {
                state.seal_used();
            }
            JournalSequence(state.open.sequence.0 - 1).min(state.flush_wanted)
        };
        self.env.wait(&self.appended, || (self.encode_ready() > target).then_some(()))?;
        let (batch, data_is_unflushed) = {
            let mut state = self.state.lock();
            state.check()?;
            let batch = state.take_encoded();
            let data_is_unflushed = batch.iter().any(|record| state.data_is_unflushed(record.data_stamp));
            (batch, data_is_unflushed)
        };
        if data_is_unflushed && !self.switches.skip_data_flush {
            self.flush_devices()?;
        }
        if self.switches.drop_journal_record {
            for record in batch.iter().filter(|record| !record.unflushed.sequence.0.is_multiple_of(8)) {
                self.write(std::slice::from_ref(record))?;
            }
        } else {
            self.write(&batch)?;
        }
        let must_flush = {
            let mut state = self.state.lock();
            state.mark_written(&batch, self.env.monotonic());
            state.flush_wanted.min(state.written) > state.flushed
        };
        if must_flush {
            self.flush_devices()?;
        }
        drop(turn);
        Ok(())
    }

    /// Writes a batch to all copies, one submission for each device.
    fn write(&self, batch: &[Encoded]) -> Result<()> {
        if batch.is_empty() {
            return Ok(());
        }
        for (index, device) in self.devices.iter().enumerate() {
            let mut requests: Vec<WriteRequest<'_>> = Vec::new();
            for copy in self.ring.copies.iter().filter(|copy| copy.device == index) {
                let mut end = None;
                for record in batch {
                    let offset = copy.start + record.offset;
                    match requests.last_mut().filter(|_| end == Some(offset)) {
                        Some(request) => request.data.push(&record.bytes),
                        None => requests.push(WriteRequest { offset, data: vec![&record.bytes] }),
                    }
                    end = Some(offset + record.bytes.len() as u64);
                }
            }
            if !requests.is_empty() {
                device.write_batch(&requests).map_err(|error| self.fail(&error))?;
            }
        }
        Ok(())
    }

    /// Flushes the devices, and marks durable what that covers. Only in a turn.
    fn flush_devices(&self) -> Result<()> {
        let coverage = self.state.lock().flush_coverage();
        self.metrics.journal_flushes.increment();
        flush_all(&self.devices).map_err(|error| self.fail(&error))?;
        let (has_freed, must_wake) = {
            let mut state = self.state.lock();
            state.check()?;
            let has_freed = state.mark_flushed(coverage);
            self.flushed.store(state.flushed.0, Ordering::Release);
            self.reusable.store(state.reusable.0, Ordering::Release);
            let is_unstated = state.content_flushed > state.stated;
            let due = self.env.monotonic() + STATEMENT_INTERVAL;
            (has_freed, is_unstated && Self::wakes_worker(&mut state, due))
        };
        self.reusable_event.notify();
        if has_freed {
            self.space.notify();
        }
        if must_wake {
            self.worker_event.notify();
        }
        Ok(())
    }

    pub fn want_reusable(&self, upto: JournalSequence) {
        let must_wake = {
            let mut state = self.state.lock();
            let upto = upto.min(state.newest());
            let is_more = upto > state.reusable_wanted && upto > state.reusable;
            state.reusable_wanted = state.reusable_wanted.max(upto);
            is_more
        };
        if must_wake {
            self.worker_event.notify();
        }
    }

    pub fn make_reusable(&self, upto: JournalSequence, purpose: Statement) -> Result<bool> {
        self.flush(upto)?;
        let statement = {
            let mut state = self.state.lock();
            let upto = upto.min(state.flushed);
            if state.reusable >= upto {
                return Ok(true);
            }
            state.statement_at = Some(self.env.monotonic());
            state.statement(upto, purpose)
        };
        let Some(statement) = statement else {
            // Ring space is what is missing.
            self.ask_for_checkpoint();
            return Ok(false);
        };
        self.flush(statement)?;
        Ok(true)
    }

    pub fn release_before(&self, offset: u64, sequence: JournalSequence) {
        let has_freed = {
            let chain = self.chain.lock();
            self.state.lock().release_before(offset, sequence, chain.position)
        };
        if !has_freed {
            self.worker_event.notify();
        }
        // Also if it only became pending: who waits for space can then state D.
        self.space.notify();
    }
}

/// Commits what nobody flushed within the interval, writes sealed records, states D.
pub(super) struct Committer {
    inner: Arc<Inner>,
}

/// What the worker does next.
enum Job {
    /// Write sealed records; the turn is taken.
    Write,
    Commit(JournalSequence),
    MakeReusable(JournalSequence, Statement),
    Sleep(Option<Duration>),
}

impl Committer {
    pub fn new(inner: Arc<Inner>) -> Self {
        Self { inner }
    }

    fn next_job(&self) -> Job {
        let inner = &self.inner;
        let now = inner.env.monotonic();
        let mut state = inner.state.lock();
        if state.latched.is_some() {
            return Job::Sleep(None);
        }
        let mut wakes_at: Option<Duration> = None;
        let mut at = |due: Duration| wakes_at = Some(wakes_at.map_or(due, |earliest| earliest.min(due)));
        if let Some(since) = state.content_since() {
            let due = since + inner.commit_interval;
            if due <= now {
                return Job::Commit(state.newest());
            }
            at(due);
        }
        let wanted = state.reusable_wanted.min(state.newest());
        if wanted > state.reusable {
            let due = state.statement_at.map_or(Duration::ZERO, |last| last + STATEMENT_INTERVAL);
            if due <= now {
                let purpose = match state.release_waits_for() {
                    Some(_) => Statement::Release,
                    None => Statement::FreeSpace(JournalWatermark::Reclaim),
                };
                return Job::MakeReusable(wanted, purpose);
            }
            at(due);
        }
        let mut must_write = state.has_unwritten();
        // What is sealed and waits for an append will state it, and wakes this worker.
        if state.content_flushed > state.stated && !must_write && state.sealed.is_empty() {
            let due = state.written_at + STATEMENT_INTERVAL;
            if due > now {
                at(due);
            } else {
                // Without room for it the log's end is already full of records that state earlier ones.
                let durable = state.content_flushed;
                must_write = state.statement(durable, Statement::Idle).is_some();
            }
        }
        if must_write {
            if !state.is_writing {
                state.is_writing = true;
                return Job::Write;
            }
            // The leader writes it too, or wakes this worker at the end of its turn.
            at(now + STATEMENT_INTERVAL);
        }
        state.worker_wakes_at = wakes_at;
        Job::Sleep(wakes_at.map(|due| due.saturating_sub(now)))
    }
}

impl Worker for Committer {
    fn name(&self) -> &'static str {
        "journal"
    }

    fn step(&self, _budget: u32) -> Result<Progress> {
        match self.next_job() {
            Job::Sleep(timeout) => return Ok(Progress::Idle(timeout)),
            Job::Write => self.inner.turn()?,
            Job::Commit(upto) => self.inner.flush(upto)?,
            Job::MakeReusable(upto, purpose) => {
                if !self.inner.make_reusable(upto, purpose)? {
                    return Ok(Progress::Idle(Some(STATEMENT_INTERVAL)));
                }
            }
        }
        Ok(Progress::Worked)
    }

    fn event(&self) -> &Event {
        &self.inner.worker_event
    }
}
