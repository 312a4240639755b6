//! Checkpoints: making the trees durable, and giving back what that makes free.
//!
//! 1. *Before F*: merge small nodes, mark those that are to move, make sure of free slots (a journalled claim of buckets).
//! 2. The journal fixes F. All records below it are applied.
//! 3. *Serialise*, level by level from the leaves: freeze a node (its changes move aside, one short exclusive lock), encode what changed with
//!    no lock held, write it in batches, put the new pointer into the parent. A parent is frozen only when none of its
//!    children lacks an image. New splits may add such children meanwhile; after a few rounds splits are held off for a moment.
//! 4. The changed pages of the map are written. The journal is flushed up to the newest change in any image, then the devices: data,
//!    journal, images and map are durable.
//! 5. The record is written and flushed: *published*.
//! 6. What only the checkpoint before the previous used is free now; the journal before the previous checkpoint's F too.
//!
//! What each order prevents: an image never holds a change that the journal could lose (4 before 5); a slot that a kept checkpoint uses is
//! never written, except behind the bytes that its pointer covers; a claim is durable before a map names the bucket (4).
//! A failure after step 2 leaves nodes whose changes are in no image that is published: nothing may be published after it (latched). Not so want of
//! space, which is met before a node is frozen: what was written stays for the next checkpoint.

use std::time::Duration;

use super::Forest;
use super::Opening;
use super::log::{CheckpointLog, LogBoundary};
use super::node_space::SlotChanges;
use super::serialise::Attempt;
use crate::alloc::TestSwitches;
use crate::env::Event;
use crate::error::{Error, Result};
use crate::format::checkpoint::{Checkpoint, MapEntry, Root};
use crate::format::node::NodePointer;
use crate::sync::atomic::Ordering;
use crate::units::JournalSequence;

/// Nodes that a commit looks at to evict some, where there are more than there is memory for.
const SHRINK_STEPS: usize = 16;

/// Why a checkpoint is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckpointReason {
    /// It is time. Does nothing if nothing has changed.
    Periodic,
    /// Somebody waits for dirty room or journal space.
    Requested,
    /// The filesystem is being closed: nothing will be logged after it. Written even if nothing has changed.
    Close,
}

/// What a checkpoint did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckpointOutcome {
    /// Its number; that of the newest one if there was nothing to do.
    pub number: u64,
    /// Nodes written, each counted once.
    pub nodes: u64,
    /// Bytes of images written, all copies.
    pub bytes: u64,
    /// How long it took.
    pub duration: Duration,
}

/// The kept checkpoints, between checkpoints.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) newest: Checkpoint,
    pub(super) previous: Option<Checkpoint>,
    next_number: u64,
    /// Map of the newest, by page.
    pub(super) published_map: Vec<Vec<MapEntry>>,
    /// Changes of reachability since: by nodes that left the tree other than by their parent's entry (collapsed roots), and by the images of a
    /// checkpoint that found no space for all of its nodes.
    pub(super) pending: SlotChanges,
}

impl Kept {
    pub fn new(opening: &Opening, published_map: Vec<Vec<MapEntry>>) -> Self {
        Self {
            newest: opening.newest.clone(),
            previous: opening.previous.clone(),
            next_number: opening.next_number,
            published_map,
            pending: SlotChanges::default(),
        }
    }
}

/// The checkpoint that runs, from [`Forest::try_begin`] on. One that unwinds has left nodes half done: none may follow, and who waits is told.
struct Running<'f>(&'f Forest);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.abandon("a checkpoint panicked");
        }
        self.0.checkpoint_running.store(false, Ordering::Release);
    }
}

impl Forest {
    /// Deliberate faults. The first that are set stay.
    pub fn set_test_switches(&self, switches: TestSwitches) {
        let _ = self.switches.set(switches);
    }

    /// Asks for a checkpoint soon.
    pub fn request_checkpoint(&self) {
        if !self.checkpoint_requested.swap(true, Ordering::Relaxed) {
            self.checkpoint_event.notify();
        }
    }

    /// How many checkpoints have ended since the filesystem was opened.
    #[must_use]
    pub fn checkpoints_done(&self) -> u64 {
        self.checkpoints_done.load(Ordering::Relaxed)
    }

    /// Notified when a checkpoint has ended or was asked for.
    #[must_use]
    pub fn checkpoint_event(&self) -> &Event {
        &self.checkpoint_event
    }

    /// Waits, if too many nodes are dirty or those that cannot be evicted take too much memory, until a checkpoint has cleaned some. Call it
    /// before a commit, with no locks held.
    ///
    /// # Errors
    /// [`Error::Latched`] if checkpoints have failed; [`Error::NoSpace`] if they find no space.
    pub fn wait_for_dirty_room(&self) -> Result<()> {
        self.check_failure()?;
        // Nodes also grow, and split.
        self.shrink_cache(SHRINK_STEPS);
        if self.is_beyond_memory() {
            self.shrink_cache(usize::MAX);
        }
        // What a running checkpoint writes is no longer dirty, and cannot be evicted either: without asking for memory, too, as much again became
        // dirty beside it, and nodes took more than their part.
        let has_room = || self.dirty_permille() <= 1000 && !(self.is_beyond_memory() && self.is_to_be_written());
        if has_room() {
            return Ok(());
        }
        // In simulation the running checkpoint is below us on the stack: waiting for it would be for ever.
        if self.env.is_simulated() && self.checkpoint_running.load(Ordering::Relaxed) {
            return Ok(());
        }
        self.metrics.transaction_checkpoint_waits.increment();
        let started = self.env.monotonic();
        loop {
            let seen = self.checkpoints_done.load(Ordering::Relaxed);
            self.request_checkpoint();
            self.env.wait(&self.checkpoint_event, || {
                let done = self.checkpoints_done.load(Ordering::Relaxed) != seen;
                (done || has_room() || self.failure.lock().is_some()).then_some(())
            })?;
            self.check_failure()?;
            // After a checkpoint as much again may be dirty, by others; beyond that memory must stay bounded.
            if self.dirty_permille() <= 2000 {
                break;
            }
            if self.checkpoint_lacked_space.load(Ordering::Relaxed) {
                return Err(Error::NoSpace("B-tree nodes cannot be written"));
            }
        }
        let waited = self.env.monotonic().saturating_sub(started);
        self.metrics.transaction_room_wait_max_us.raise_to(u64::try_from(waited.as_micros()).unwrap_or(u64::MAX));
        Ok(())
    }

    /// Nodes take more memory than they may, by more than what comes in while one is evicted.
    fn is_beyond_memory(&self) -> bool {
        let budget = self.cache_bytes.load(Ordering::Relaxed);
        self.cache.bytes() > budget + budget / 32
    }

    /// A checkpoint would let nodes be evicted.
    fn is_to_be_written(&self) -> bool {
        self.dirty_count.load(Ordering::Relaxed) > 0 || self.checkpoint_running.load(Ordering::Relaxed)
    }

    /// Makes a checkpoint; waits for one that is running first. Holds no lock for longer than it takes to move a few pointers.
    ///
    /// # Errors
    /// If there is no space for nodes; if a device fails ([`Error::Latched`] ever after).
    pub fn checkpoint(&self, log: &dyn CheckpointLog, reason: CheckpointReason) -> Result<CheckpointOutcome> {
        self.env.wait(&self.checkpoint_event, || match self.check_failure() {
            Err(error) => Some(Err(error)),
            Ok(()) => self.try_begin().then_some(Ok(())),
        })??;
        self.run_checkpoint(log, reason)
    }

    pub(super) fn try_begin(&self) -> bool {
        self.checkpoint_running.compare_exchange(false, true, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    pub(super) fn run_checkpoint(
        &self,
        log: &dyn CheckpointLog,
        reason: CheckpointReason,
    ) -> Result<CheckpointOutcome> {
        let started = self.env.monotonic();
        self.checkpoint_requested.store(false, Ordering::Relaxed);
        let running = Running(self);
        let outcome = self.check_failure().and_then(|()| self.make_checkpoint(log, reason));
        let duration = self.env.monotonic().saturating_sub(started);
        self.checkpoint_lacked_space.store(matches!(outcome, Err(Error::NoSpace(_))), Ordering::Relaxed);
        drop(running);
        self.checkpoints_done.fetch_add(1, Ordering::Relaxed);
        self.shrink_cache(usize::MAX);
        self.checkpoint_event.notify();
        let mut outcome = outcome?;
        outcome.duration = duration;
        let micros = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        self.metrics.checkpoint_duration_max_us.raise_to(micros);
        Ok(outcome)
    }

    fn make_checkpoint(&self, log: &dyn CheckpointLog, reason: CheckpointReason) -> Result<CheckpointOutcome> {
        self.merge_small_nodes()?;
        let moved = self.relocate_nodes()?;
        let needed = self.estimate_slots();
        if !self.switches.get().is_some_and(|switches| switches.no_slots_beforehand) {
            self.ensure_slots(needed, log)?;
        }
        let boundary = log.boundary()?;
        {
            let kept = self.kept.lock();
            let unchanged = boundary.first_replay.0 == kept.newest.first_replay && kept.newest.number > 0;
            if unchanged && self.dirty_count.load(Ordering::Relaxed) == 0 && reason == CheckpointReason::Periodic {
                return Ok(CheckpointOutcome { number: kept.newest.number, ..CheckpointOutcome::default() });
            }
        }
        self.count_on(JournalSequence(boundary.first_replay.0.saturating_sub(1)));
        let mut attempt = Attempt::new(self, log, boundary.first_replay);
        let published = match attempt.serialise_all() {
            Ok(roots) => attempt.publish(roots, &boundary, reason),
            // Between two nodes: those that were written are so, and the next checkpoint publishes them.
            Err(error @ Error::NoSpace(_)) => match attempt.set_aside() {
                Ok(()) => return Err(error),
                Err(worse) => Err(worse),
            },
            Err(error) => Err(error),
        };
        if let Err(error) = &published {
            tracing::error!("a checkpoint failed, nothing more will be written: {error}");
            self.fail(&format!("a checkpoint failed: {error}"));
            // Reading goes on.
            self.unwritten.lock().append(&mut attempt.pinned);
        }
        let older = published?;
        let outcome = attempt.outcome;
        drop(attempt);
        log.release_before(older.0, older.1);
        self.metrics.checkpoints.increment();
        // Nothing is logged after the checkpoint that closes a filesystem.
        if reason != CheckpointReason::Close {
            self.give_back_surplus(needed, moved, log)?;
        }
        Ok(outcome)
    }

    /// The next checkpoint's record is written when the journal is durable up to here.
    pub(super) fn count_on(&self, sequence: JournalSequence) {
        self.counted_on.fetch_max(sequence.0, Ordering::Relaxed);
    }

    fn check_failure(&self) -> Result<()> {
        match &*self.failure.lock() {
            Some(reason) => Err(Error::Latched { reason: reason.clone() }),
            None => Ok(()),
        }
    }
}

impl Attempt<'_> {
    /// Leaves what was serialised to the next checkpoint: the images are written, and what they change of the map is kept.
    fn set_aside(&mut self) -> Result<()> {
        self.write_images(0)?;
        self.forest.kept.lock().pending.add(&self.changes);
        Ok(())
    }

    /// Makes the images durable and publishes them. Returns the older kept checkpoint's F: its place in the ring, and its sequence.
    fn publish(
        &mut self,
        roots: Vec<(Root, NodePointer)>,
        boundary: &LogBoundary,
        reason: CheckpointReason,
    ) -> Result<(u64, JournalSequence)> {
        let forest = self.forest;
        let (newest, previous, published_map, number) = {
            let mut kept = forest.kept.lock();
            let pending = std::mem::take(&mut kept.pending);
            self.changes.add(&pending);
            let previous = kept.previous.as_ref().map(|previous| previous.map.clone()).unwrap_or_default();
            (kept.newest.clone(), previous, kept.published_map.clone(), kept.next_number)
        };
        for root in &newest.roots {
            self.changes.replace(Some(&NodePointer::decode(&root.pointer)?), None);
        }
        for (_, pointer) in &roots {
            self.changes.replace(None, Some(pointer));
        }
        let pages = forest.space.lock().pages(&self.changes)?;
        let map = forest.reader.write_map(&pages, &published_map, &newest.map, &previous)?;
        // All that the record will name is durable before it is written: the journal, images and map pages.
        let counted_on = JournalSequence(forest.counted_on.load(Ordering::Relaxed));
        let is_early = forest.switches.get().is_some_and(|switches| switches.publish_checkpoint_early);
        if !is_early {
            self.log.flush(counted_on)?;
            forest.reader.flush()?;
        }
        let record = Checkpoint {
            number,
            epoch: forest.epoch,
            first_replay: boundary.first_replay.0,
            first_replay_offset: boundary.offset,
            previous_record_checksum: boundary.previous_checksum,
            newest_sequence: counted_on.0,
            roots: roots.into_iter().map(|(root, _)| root).collect(),
            totals: boundary.totals.clone(),
            next_node: forest.next_node.load(Ordering::Relaxed),
            clean: reason == CheckpointReason::Close && forest.dirty_count.load(Ordering::Relaxed) == 0,
            map,
            written_at: forest.env.now().seconds,
        };
        forest.reader.write_record(&record)?;
        if is_early {
            self.log.flush(counted_on)?;
        }
        forest.reader.flush()?;

        self.outcome.number = number;
        let older = (newest.first_replay_offset, JournalSequence(newest.first_replay));
        {
            let mut space = forest.space.lock();
            space.publish(&pages);
        }
        let mut kept = forest.kept.lock();
        kept.previous = (newest.number > 0).then_some(newest);
        kept.newest = record;
        kept.next_number = number + 1;
        kept.published_map = pages;
        Ok(older)
    }
}
