//! Deleting inodes that have no name: in bounded steps, by one worker.
//!
//! An inode gets here when it has lost its last name and nobody has it open or looked up any more; or at mount, when its orphan
//! key is left from before. Its object has left the table then, and an inode without a name is never loaded again, so
//! nobody else touches it. Until the last step the orphan key stays: a crash at any point is resumed by the next mount.

use std::collections::VecDeque;
use std::time::Duration;

use super::Vfs;
use super::inode::VfsInode;
use crate::env::{Event, Progress, Worker};
use crate::error::{Error, Result};
use crate::pagecache::invalidate_range;
use crate::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use crate::sync::{Arc, Mutex};
use crate::transaction::CommitOptions;
use crate::units::InodeNumber;

/// Orphan keys that are read at a time when leftovers are looked for.
const SCAN_STEP: usize = 64;
/// How long to wait for somebody else's writeback of the inode.
const RETRY: Duration = Duration::from_millis(10);
/// How long to wait for space for what a deletion writes down.
const RETRY_SPACE: Duration = Duration::from_millis(100);

#[derive(Debug)]
struct Deletion {
    number: InodeNumber,
    /// The object, if it was in memory: its pages go first.
    inode: Option<Arc<VfsInode>>,
    extents_are_gone: bool,
}

#[derive(Debug)]
struct Queue {
    waiting: VecDeque<Deletion>,
    /// Where the search for leftovers goes on; `None` when it is done.
    scan_from: Option<InodeNumber>,
    /// A step is under way.
    is_working: bool,
    /// The last step found no space for B-tree nodes. Nobody waits for deletions then.
    lacks_space: bool,
}

/// What is to be deleted.
#[derive(Debug)]
pub(super) struct Deletions {
    queue: Mutex<Queue>,
    event: Event,
    /// The worker has run: there is somebody to wait for.
    is_driven: AtomicBool,
    /// Who waits for the space of what is deleted: they are told after each step.
    waiters: AtomicU32,
}

impl Default for Deletions {
    fn default() -> Self {
        let queue =
            Queue { waiting: VecDeque::new(), scan_from: Some(InodeNumber(0)), is_working: false, lacks_space: false };
        let (is_driven, waiters) = (AtomicBool::new(false), AtomicU32::new(0));
        Self { queue: Mutex::new(queue), event: Event::new(), is_driven, waiters }
    }
}

impl Deletions {
    fn push(&self, number: InodeNumber, inode: Option<Arc<VfsInode>>) {
        let deletion = Deletion { number, inode, extents_are_gone: false };
        self.queue.lock().waiting.push_back(deletion);
        self.event.notify();
    }

    /// Something has changed that those who wait must see.
    pub fn wake(&self) {
        self.event.notify();
    }

    /// Number of inodes that wait for their deletion.
    pub fn waiting(&self) -> usize {
        self.queue.lock().waiting.len()
    }
}

impl Vfs {
    /// Gives an inode to the worker if it has no name and nobody uses it.
    pub(super) fn reap_if_unused(&self, number: InodeNumber) {
        if self.options.read_only {
            return;
        }
        if let Some(inode) = self.table.take_unused_orphan(number) {
            self.deletions.push(number, Some(inode));
        }
    }

    /// Whether deletions are waiting, or leftovers of an earlier mount not yet looked for.
    #[must_use]
    pub fn has_deletions(&self) -> bool {
        let queue = self.deletions.queue.lock();
        !queue.waiting.is_empty() || queue.scan_from.is_some() || queue.is_working
    }

    /// Asks for space with `ask` until it is there or nothing is left to be deleted, whose answer is the last.
    pub(super) fn ask_during_deletions<T>(&self, ask: &dyn Fn() -> Result<T>) -> Result<Result<T>> {
        let deletions = &self.deletions;
        if !deletions.is_driven.load(Ordering::Acquire) {
            return Ok(ask());
        }
        deletions.waiters.fetch_add(1, Ordering::SeqCst);
        let answer = self.env.wait(&deletions.event, || {
            if let Err(error) = self.check_writable() {
                return Some(Err(error));
            }
            // Looked at first: what is deleted in between is in the answer.
            let more = self.has_deletions() && !deletions.queue.lock().lacks_space;
            match ask() {
                Err(Error::NoSpace(_)) if more => None,
                answer => Some(answer),
            }
        });
        deletions.waiters.fetch_sub(1, Ordering::SeqCst);
        answer.map_err(|error| match error {
            // In simulation the worker may be below us on the stack.
            Error::Bug(_) if self.env.is_simulated() => Error::NoSpace("what is being deleted cannot be waited for"),
            error => error,
        })
    }

    /// Waits until everything that can be deleted is (tests, and callers who want exact figures of free space).
    ///
    /// # Errors
    /// If the filesystem has latched; [`Error::NoSpace`] if what deletions write finds no space.
    pub fn wait_for_deletions(&self) -> Result<()> {
        self.env.wait(&self.deletions.event, || {
            if let Err(error) = self.check_writable() {
                return Some(Err(error));
            }
            if !self.has_deletions() {
                return Some(Ok(()));
            }
            let lacks_space = self.deletions.queue.lock().lacks_space;
            lacks_space.then_some(Err(Error::NoSpace("what is unlinked cannot be deleted now")))
        })?
    }

    fn scan_for_leftovers(&self, from: InodeNumber) -> Result<()> {
        let found = self.namespace.orphans(&mut self.transactions.read(), from, SCAN_STEP)?;
        for &number in &found {
            // One that is in memory lost its name in this mount: it comes here by itself. So does one that waits already.
            let is_waiting = self.deletions.queue.lock().waiting.iter().any(|deletion| deletion.number == number);
            if !is_waiting && self.table.get(number).is_none() && self.is_leftover(number)? {
                self.deletions.push(number, None);
            }
        }
        let last = found.last().filter(|_| found.len() == SCAN_STEP);
        let next = last.and_then(|last| last.0.checked_add(1)).map(InodeNumber);
        self.deletions.queue.lock().scan_from = next;
        Ok(())
    }

    /// Whether what is noted for deletion may be deleted: a wrong note must not cost a file that has names.
    fn is_leftover(&self, number: InodeNumber) -> Result<bool> {
        let mut transaction = self.transactions.read();
        let is_noted = self.namespace.is_orphan(&mut transaction, number)?;
        let problem = match self.namespace.inode(&mut transaction, number) {
            _ if !is_noted => "the note stands where no note does".into(),
            Ok(Some(inode)) if inode.link_count > 0 => format!("it has {} names", inode.link_count),
            Ok(_) => return Ok(true),
            Err(error) if error.is_media_error() => error.to_string(),
            Err(error) => return Err(error),
        };
        tracing::warn!("inode {number} is noted for deletion and is left alone ({problem}): fsck.coppice repairs it");
        Ok(false)
    }

    /// One step of a deletion. Returns whether more is to be done. After an error it can be taken again.
    fn delete_step(&self, deletion: &mut Deletion, budget: u32) -> Result<(bool, Progress)> {
        if let Some(inode) = &deletion.inode {
            // Kept for ever: no writeback of this inode starts again.
            let Some(turn) = inode.try_writeback_turn() else {
                return Ok((true, Progress::Idle(Some(RETRY))));
            };
            turn.keep();
            if let Some(file) = &inode.file {
                let guard = file.pages.block(0..u64::MAX)?;
                let dropped = invalidate_range(&file.pages, &guard, 0..u64::MAX)?;
                // Now: the object may live on for a while, among those whose times are to be stored.
                self.give_back(file, dropped);
            }
            deletion.inode = None;
            return Ok((true, Progress::Worked));
        }
        if !deletion.extents_are_gone {
            let more = self.data.delete_extents_step(deletion.number, 0, budget.max(1) as usize)?;
            deletion.extents_are_gone = !more;
            return Ok((true, Progress::Worked));
        }
        let committed = self.transactions.run(CommitOptions::reclaim(), |transaction| {
            self.namespace.delete_orphan_step(transaction, deletion.number)
        })?;
        Ok((committed.value, Progress::Worked))
    }
}

/// The worker. See the module's documentation.
#[derive(Debug)]
pub struct DeletionWorker {
    vfs: Arc<Vfs>,
}

impl DeletionWorker {
    /// The worker of this filesystem.
    #[must_use]
    pub fn new(vfs: Arc<Vfs>) -> Self {
        Self { vfs }
    }
}

impl Worker for DeletionWorker {
    fn name(&self) -> &'static str {
        "deletion"
    }

    fn step(&self, budget: u32) -> Result<Progress> {
        let vfs = &self.vfs;
        vfs.deletions.is_driven.store(true, Ordering::Release);
        if vfs.check_writable().is_err() {
            vfs.deletions.event.notify();
            return Ok(Progress::Idle(None));
        }
        let (mut deletion, scan_from) = {
            let mut queue = vfs.deletions.queue.lock();
            let deletion = queue.waiting.pop_front();
            queue.is_working = deletion.is_some() || queue.scan_from.is_some();
            (deletion, queue.scan_from)
        };
        let number = deletion.as_ref().map(|deletion| deletion.number);
        let outcome = match (&mut deletion, scan_from) {
            (Some(deletion), _) => vfs.delete_step(deletion, budget),
            (None, Some(from)) => vfs.scan_for_leftovers(from).map(|()| (false, Progress::Worked)),
            (None, None) => Ok((false, Progress::Idle(None))),
        };
        let mut queue = vfs.deletions.queue.lock();
        queue.is_working = false;
        let lacked_space = std::mem::replace(&mut queue.lacks_space, matches!(outcome, Err(Error::NoSpace(_))));
        let (is_unfinished, progress) = match outcome {
            // There are others who may free some: no reason to stop everybody either.
            Err(Error::NoSpace(reason)) => {
                vfs.metrics.deletion_space_waits.increment();
                if !lacked_space {
                    tracing::warn!("deletions wait for space: {reason}");
                    vfs.deletions.event.notify();
                }
                (true, Progress::Idle(Some(RETRY_SPACE)))
            }
            // Damage to one file, or to the notes, is no reason to stop everybody: what stays is the next mount's or fsck's.
            Err(error) if error.is_media_error() && vfs.journal.latched().is_none() => {
                if number.is_none() {
                    queue.scan_from = None;
                }
                let what = number.map_or_else(|| "unlinked files".into(), |number| format!("unlinked inode {number}"));
                tracing::error!("{what} cannot be deleted: {error}; fsck.coppice repairs it");
                (false, Progress::Worked)
            }
            outcome => outcome?,
        };
        if let Some(deletion) = deletion.filter(|_| is_unfinished) {
            match progress {
                // The same one next, or the others first while it waits.
                Progress::Worked => queue.waiting.push_front(deletion),
                Progress::Idle(_) => queue.waiting.push_back(deletion),
            }
        }
        let is_done = queue.waiting.is_empty() && queue.scan_from.is_none();
        drop(queue);
        // Not after a step that found nothing: the event is this worker's own, and it would wake itself for ever.
        let is_awaited = vfs.deletions.waiters.load(Ordering::SeqCst) > 0;
        if (is_done || is_awaited) && progress == Progress::Worked {
            vfs.deletions.event.notify();
        }
        Ok(progress)
    }

    fn event(&self) -> &Event {
        &self.vfs.deletions.event
    }
}
