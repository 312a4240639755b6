//! Writeback: committing what runs ahead in memory.
//!
//! One pass over a file takes its dirty blocks in the order of their offsets, a bounded number of bytes at a time, and hands them to the data layer,
//! which commits extents and inode together. One pass at a time for each inode ([`VfsInode::try_writeback_turn`]), so commits
//! of one file are in order and its stored size grows with its data: a pass ends at the size that the file had when it began; what it writes counts only up
//! to the size of the moment when it was collected; and the block that the stored size ends in, when it is dirty again, is written before, or
//! with, anything behind it. So no crash shows a file that was lengthened over bytes which were never written back. A truncation holds the turn.
//!
//! No inode lock, add or block is taken here: holders of those wait for writeback.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use super::Vfs;
use super::inode::{FilePages, VfsInode, WritebackTurn};
use crate::btree::CheckpointReason;
use crate::data::{WriteCommit, WriteRun};
use crate::env::{Event, Progress, Worker};
use crate::error::{Error, Result};
use crate::pagecache::{WritebackRun, collect_dirty_with};
use crate::sync::{Arc, Mutex};
use crate::transaction::CommitOptions;
use crate::units::{InodeNumber, round_down, round_up};

/// Hand-overs to the data layer in one step of the worker, for one file.
const BATCHES_STEP: u64 = 4;
/// Files that one step of the worker looks at.
const FILES_STEP: usize = 16;
/// How often all that is dirty is written back before space is refused: meanwhile others make promises of what that frees.
const ADMISSION_PASSES: usize = 4;
/// Checkpoints that space waits for: some merge nodes, the next free what only those before them used.
const NODE_PASSES: usize = 8;
/// Access times are stored this long after the first read.
const TIMES_AGE: Duration = Duration::from_secs(60);
/// With more inodes than this the worker does not wait for their age.
const TIMES_SOON: usize = 2048;
/// With more than this, whoever adds one stores the oldest.
const TIMES_MAX: usize = 8192;

/// Inodes whose times are newer in memory, by when they are due.
#[derive(Debug, Default)]
pub(super) struct DelayedTimes {
    queue: Mutex<BTreeMap<(Duration, InodeNumber), Arc<VfsInode>>>,
}

impl Vfs {
    /// Waits for the right to write this inode back. There is none, and nothing to be written, once it is being deleted.
    pub(super) fn writeback_turn<'a>(&self, inode: &'a VfsInode) -> Result<Option<WritebackTurn<'a>>> {
        self.env.wait(inode.writeback_event(), || match inode.try_writeback_turn() {
            None if !inode.is_writeback_ended() => None,
            turn => Some(turn),
        })
    }

    /// Commits what is dirty of the inode now. What becomes dirty meanwhile may be left.
    pub(super) fn write_back(&self, inode: &VfsInode) -> Result<()> {
        let Some(file) = &inode.file else { return Ok(()) };
        if file.pages.unwritten_blocks() == 0 {
            return Ok(());
        }
        let Some(turn) = self.writeback_turn(inode)? else { return Ok(()) };
        let outcome = self.write_back_pass(inode, file, u64::MAX);
        drop(turn);
        outcome.map(|_| ())
    }

    /// Commits what is dirty of `range` (bytes) now, with what is dirty before it (the size must not grow over that), and waits for what others are committing.
    pub(super) fn write_back_part(&self, inode: &VfsInode, file: &FilePages, range: &Range<u64>) -> Result<()> {
        if let Some(turn) = self.writeback_turn(inode)? {
            let outcome = self.write_back_pass(inode, file, u64::MAX);
            drop(turn);
            outcome?;
        }
        file.pages.wait_for_writeback(range)
    }

    /// Asks for space with `ask`. Where that is refused, what is dirty is written back, file by file, and it is asked again: an overwrite is
    /// promised its whole size, and gives back what it replaces only with its commit. Then what is being deleted is waited for, and the
    /// checkpoints that give node space back: what is freed but not yet reusable counts as free. Inode locks may be held.
    ///
    /// # Errors
    /// [`Error::NoSpace`] if nothing of that frees enough; other errors of `ask`. Those of writeback are for the files' handles.
    pub(super) fn admit<T>(&self, ask: impl Fn() -> Result<T>) -> Result<T> {
        self.fill_landing_reserve();
        for _ in 0..ADMISSION_PASSES {
            match ask() {
                Err(Error::NoSpace(_)) => {}
                outcome => return outcome,
            }
            let spaces = self.cache.dirty_spaces(usize::MAX, None);
            if spaces.is_empty() {
                break;
            }
            for space in spaces {
                let Some(inode) = self.table.get(InodeNumber(space.identity())) else { continue };
                if let Err(error @ Error::Bug(_)) = self.write_back(&inode) {
                    return Err(error);
                }
                match ask() {
                    Err(Error::NoSpace(_)) => {}
                    outcome => return outcome,
                }
            }
        }
        match self.ask_during_deletions(&ask)? {
            Err(Error::NoSpace(_)) => {}
            outcome => return outcome,
        }
        let forest = self.transactions.forest();
        for _ in 0..NODE_PASSES {
            if !forest.could_free_nodes() {
                break;
            }
            match forest.checkpoint(&*self.journal, CheckpointReason::Requested) {
                Ok(_) | Err(Error::NoSpace(_)) => {}
                Err(error) => return Err(error),
            }
            match ask() {
                Err(Error::NoSpace(_)) => {}
                outcome => return outcome,
            }
        }
        ask()
    }

    /// Commits dirty blocks, in ascending order, until `bytes_max` are written. Returns how many were. The caller has the turn.
    fn write_back_pass(&self, inode: &VfsInode, file: &FilePages, bytes_max: u64) -> Result<u64> {
        let block = file.pages.block_bytes();
        let end = round_up(inode.size(), block);
        let (mut written, mut from) = (0, 0);
        while written < bytes_max && from < end {
            // The last block that was written may have been appended to meanwhile.
            let start = round_down(inode.state().stored_size, block).min(from);
            let batch_bytes = self.cache.writeback_batch_bytes();
            let (runs, size) = collect_dirty_with(&file.pages, start..end, batch_bytes, || inode.size());
            let Some(last) = runs.last() else { break };
            from = from.max(last.offset() + last.length());
            written += self.write_runs(inode, file, runs, size)?;
        }
        Ok(written)
    }

    /// Writes and commits runs that were collected when the file had this size.
    pub(super) fn write_runs(
        &self,
        inode: &VfsInode,
        file: &FilePages,
        runs: Vec<WritebackRun>,
        size: u64,
    ) -> Result<u64> {
        let block = file.pages.block_bytes();
        let bytes: u64 = runs.iter().map(WritebackRun::length).sum();
        let units: u64 = runs.iter().map(WritebackRun::units).sum();
        let reservation = file.reserved.lock().split(units * block);
        let pieces: Vec<WriteRun<'_>> =
            runs.iter().map(|run| WriteRun { offset: run.offset(), data: run.slices().collect() }).collect();
        inode.state().times_ahead = false;
        let size_limit = || inode.size().min(size);
        let update_inode = |stored: &mut crate::format::namespace::Inode| inode.store_times(stored);
        let commit = WriteCommit { size_limit: &size_limit, update_inode: &update_inode };
        let batch = self.cache.begin_writeback();
        let outcome = self.data.write(inode.number, &pieces, reservation, commit);
        drop(pieces);
        match outcome {
            Ok(change) => {
                if let Some(stored) = &change.inode {
                    inode.refresh(stored, change.sequence);
                }
                for run in runs {
                    run.complete(Ok(()));
                }
                self.cache.end_writeback(batch, bytes);
                self.metrics.writeback_bytes.add(bytes);
                Ok(bytes)
            }
            Err(error) => {
                if matches!(&error, Error::Device { operation, .. } if *operation != "read") {
                    self.latch(format!("file data could not be written: {error}"));
                }
                inode.state().times_ahead = true;
                let mut surplus = 0;
                for run in runs {
                    surplus += run.complete(Err(error.clone()));
                }
                // The blocks are dirty again, and their promise was given away.
                let kept = units.saturating_sub(surplus) * block;
                file.reserved.lock().merge(self.space.reserve_privileged(kept));
                Err(error)
            }
        }
    }

    /// Notes that the inode's times in memory are to be stored in a while.
    pub(super) fn delay_times(&self, inode: &Arc<VfsInode>) {
        let due = self.env.monotonic() + TIMES_AGE;
        {
            let mut state = inode.state();
            if state.due.is_some() {
                return;
            }
            state.due = Some(due);
        }
        let oldest = {
            let mut queue = self.delayed_times.queue.lock();
            queue.insert((due, inode.number), Arc::clone(inode));
            (queue.len() > TIMES_MAX).then(|| queue.pop_first()).flatten()
        };
        if let Some((_, oldest)) = oldest
            && let Err(error) = self.store_delayed_times(&oldest)
        {
            tracing::warn!(inode = oldest.number.0, %error, "access time not stored");
        }
    }

    /// Stores the inode's times if they are newer in memory.
    pub(super) fn store_delayed_times(&self, inode: &VfsInode) -> Result<()> {
        let due = {
            let mut state = inode.state();
            if state.due.is_none() && !(state.times_ahead && inode.file.is_some()) {
                return Ok(());
            }
            state.times_ahead = false;
            state.due.take()
        };
        if let Some(due) = due {
            self.delayed_times.queue.lock().remove(&(due, inode.number));
        }
        let committed = self.transactions.run(CommitOptions::default(), |transaction| {
            let Some(mut stored) = self.namespace.inode(transaction, inode.number)? else { return Ok(()) };
            if inode.file.is_some() {
                inode.store_times(&mut stored);
            } else {
                // Everything else of it is stored already, perhaps newer than it is in memory.
                stored.access_time = inode.state().inode.access_time;
            }
            self.namespace.put_inode(transaction, inode.number, &stored)
        });
        match committed {
            Ok(committed) => {
                inode.committed(committed.sequence);
                Ok(())
            }
            Err(error) => {
                inode.state().times_ahead = true;
                Err(error)
            }
        }
    }

    /// Stores all times that are newer in memory.
    pub(super) fn store_all_delayed_times(&self) -> Result<()> {
        let mut outcome = Ok(());
        while let Some((_, inode)) = self.delayed_times.pop(None) {
            outcome = outcome.and(self.store_delayed_times(&inode));
        }
        outcome
    }
}

impl DelayedTimes {
    /// The inode that is due first; with `now`, only if it is due, or if there are many.
    fn pop(&self, now: Option<Duration>) -> Option<((Duration, InodeNumber), Arc<VfsInode>)> {
        let mut queue = self.queue.lock();
        let (&(due, _), _) = queue.first_key_value()?;
        let is_due = now.is_none_or(|now| due <= now || queue.len() > TIMES_SOON);
        if is_due { queue.pop_first() } else { None }
    }

    fn next_due(&self) -> Option<Duration> {
        self.queue.lock().first_key_value().map(|(&(due, _), _)| due)
    }
}

/// The worker: dirty files oldest first when they are old, or at once when memory is short; then delayed times.
#[derive(Debug)]
pub struct WritebackWorker {
    vfs: Arc<Vfs>,
    /// When a file that failed is tried again, by inode: a failing file must not keep the others waiting, nor the processor busy.
    failed_until: Mutex<BTreeMap<InodeNumber, Duration>>,
}

/// How long a file whose writeback failed is left alone.
const FAILURE_PAUSE: Duration = Duration::from_secs(1);

impl WritebackWorker {
    /// The worker of this filesystem.
    #[must_use]
    pub fn new(vfs: Arc<Vfs>) -> Self {
        Self { vfs, failed_until: Mutex::new(BTreeMap::new()) }
    }

    /// Writes a part of one file. Returns whether anything was done.
    fn write_one(&self, number: InodeNumber, now: Duration) -> Result<bool> {
        let vfs = &self.vfs;
        if self.failed_until.lock().get(&number).is_some_and(|&until| until > now) {
            return Ok(false);
        }
        let Some(inode) = vfs.table.get(number) else { return Ok(false) };
        let Some(file) = &inode.file else { return Ok(false) };
        let Some(turn) = inode.try_writeback_turn() else { return Ok(false) };
        let outcome = vfs.write_back_pass(&inode, file, BATCHES_STEP * vfs.cache.writeback_batch_bytes());
        drop(turn);
        match outcome {
            Ok(bytes) => {
                self.failed_until.lock().remove(&number);
                Ok(bytes > 0)
            }
            // A simulated bug must be seen; everything else is the file's to report.
            Err(error @ Error::Bug(_)) => Err(error),
            Err(error) => {
                tracing::error!(inode = number.0, %error, "writeback failed");
                self.failed_until.lock().insert(number, now + FAILURE_PAUSE);
                Ok(false)
            }
        }
    }
}

impl Worker for WritebackWorker {
    fn name(&self) -> &'static str {
        "writeback"
    }

    fn step(&self, _budget: u32) -> Result<Progress> {
        let vfs = &self.vfs;
        if let Err(reason) = vfs.check_writable() {
            // Nothing will be written any more: whoever waits for it must not wait for ever.
            vfs.cache.latch(reason);
            return Ok(Progress::Idle(None));
        }
        let now = vfs.env.monotonic();
        let age = vfs.options.writeback_age;
        let older_than = if vfs.cache.needs_writeback() { None } else { Some(age) };
        let mut has_worked = false;
        // Those that failed lately stand first and are passed over.
        let failed = self.failed_until.lock().len();
        for space in vfs.cache.dirty_spaces(FILES_STEP + failed, older_than) {
            has_worked |= self.write_one(InodeNumber(space.identity()), now)?;
        }
        for _ in 0..FILES_STEP {
            let Some((_, inode)) = vfs.delayed_times.pop(Some(now)) else { break };
            has_worked = true;
            if let Err(error) = vfs.store_delayed_times(&inode) {
                tracing::error!(inode = inode.number.0, %error, "times not stored");
                break;
            }
        }
        if has_worked {
            return Ok(Progress::Worked);
        }
        let data =
            vfs.cache.oldest_dirty_age().map(|dirty_for| age.saturating_sub(dirty_for).max(Duration::from_millis(10)));
        let times = vfs.delayed_times.next_due().map(|due| due.saturating_sub(now));
        // Nothing dirty: a file that becomes dirty may go unnoticed for a part of its age, never longer.
        let next = data.into_iter().chain(times).min().unwrap_or(age / 4).min(age / 4);
        Ok(Progress::Idle(Some(next.max(Duration::from_millis(1)))))
    }

    fn event(&self) -> &Event {
        self.vfs.cache.writeback_wanted()
    }
}
