//! One inode in memory: its lock, its attributes as users see them, its page cache.
//!
//! **What runs ahead.** For a regular file the size, the times and the data may be newer here than in the tree: delayed writes
//! change memory, and writeback's commits bring the tree up. Times are changed here *first*, also where a transaction stores them at
//! once: a commit of writeback that meets that transaction runs again and takes the new ones. Everything else (mode, owner, links, flags,
//! all of a directory but its access time) is changed by a transaction first, under the exclusive inode lock, and copied here after it.
//!
//! Locks: [`VfsInode::lock`] is the inode lock of the lock order (inode -> add/block -> folio -> node -> journal). No worker ever takes
//! it. [`VfsInode::state`] is a leaf: nothing that waits, and no other lock, is taken while it is held.

use std::time::Duration;

use crate::env::Event;
use crate::format::namespace::{FileType, Inode};
use crate::pagecache::{AddressSpace, PageSource};
use crate::space::SpaceReservation;
use crate::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicU64, Ordering, fence};
use crate::sync::{Arc, LockClass, Mutex, MutexGuard, RwLock};
use crate::units::{InodeNumber, JournalSequence};

/// What changes under the leaf lock.
#[derive(Debug)]
pub(super) struct State {
    /// The inode as users see it, but for its size.
    pub inode: Inode,
    /// Times in memory that no transaction has stored.
    pub times_ahead: bool,
    /// When writeback is due, in the environment's monotonic time; set while the inode is in the writeback queue.
    pub due: Option<Duration>,
    /// The commit whose view of `allocated_bytes` and of the stored size is here.
    pub tree_sequence: JournalSequence,
    /// The size that the tree holds: at most what `inode.size` says, while extending writes are delayed.
    pub stored_size: u64,
}

/// What only regular files have.
pub(super) struct FilePages {
    /// The page cache.
    pub pages: Arc<AddressSpace>,
    /// Where missing pages come from.
    pub source: Arc<dyn PageSource>,
    /// The promised space of the dirty blocks: a block's worth for each.
    pub reserved: Mutex<SpaceReservation>,
}

impl std::fmt::Debug for FilePages {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FilePages").field("pages", &self.pages.identity()).finish_non_exhaustive()
    }
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct VfsInode {
    pub number: InodeNumber,
    pub generation: u64,
    pub file_type: FileType,
    /// The inode lock.
    pub lock: RwLock<()>,
    state: Mutex<State>,
    /// Size in bytes as users see it; for a directory the number of its names. Raised from under a folio's lock.
    size: AtomicU64,
    /// Of a regular file.
    pub file: Option<FilePages>,
    /// Odd while the file is being made shorter, and a different number afterwards.
    shrinks: AtomicU64,
    /// Newest journal record that holds a change of it: what fsync waits for.
    sequence: AtomicU64,
    /// The access time needs no change before this time, in seconds since 1970, unless another time changes.
    access_settled_until: AtomicI64,
    /// The file is known to lend no capabilities to who runs it. Cleared under the exclusive inode lock, set under the shared one.
    lends_no_capabilities: AtomicBool,
    /// Open handles.
    opens: AtomicU32,
    /// Those of them that were opened for writing.
    writable_opens: AtomicU32,
    /// One writeback of an inode at a time; also held, for ever, by its deletion, which says so.
    writeback_busy: AtomicBool,
    writeback_ended: AtomicBool,
    writeback_done: Event,
}

/// The right to write an inode's dirty pages back.
pub(super) struct WritebackTurn<'a>(&'a VfsInode);

impl WritebackTurn<'_> {
    /// Never gives the turn back: the inode is being deleted. Whoever waits for it is told.
    pub fn keep(self) {
        self.0.writeback_ended.store(true, Ordering::Release);
        self.0.writeback_done.notify();
        std::mem::forget(self);
    }
}

impl Drop for WritebackTurn<'_> {
    fn drop(&mut self) {
        self.0.writeback_busy.store(false, Ordering::Release);
        self.0.writeback_done.notify();
    }
}

/// See [`VfsInode::shrink`].
pub(super) struct Shrinking<'a>(&'a VfsInode);

impl Drop for Shrinking<'_> {
    fn drop(&mut self) {
        self.0.shrinks.fetch_add(1, Ordering::SeqCst);
    }
}

impl VfsInode {
    pub fn new(
        number: InodeNumber,
        file_type: FileType,
        inode: Inode,
        file: Option<FilePages>,
        sequence: JournalSequence,
    ) -> Self {
        let size = inode.size;
        Self {
            number,
            generation: inode.generation,
            file_type,
            lock: RwLock::ranked(LockClass::inode(number.0), ()),
            state: Mutex::new(State {
                stored_size: inode.size,
                inode,
                times_ahead: false,
                due: None,
                tree_sequence: JournalSequence(0),
            }),
            size: AtomicU64::new(size),
            shrinks: AtomicU64::new(0),
            file,
            sequence: AtomicU64::new(sequence.0),
            access_settled_until: AtomicI64::new(i64::MIN),
            lends_no_capabilities: AtomicBool::new(false),
            opens: AtomicU32::new(0),
            writable_opens: AtomicU32::new(0),
            writeback_busy: AtomicBool::new(false),
            writeback_ended: AtomicBool::new(false),
            writeback_done: Event::new(),
        }
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// The state, to change times in it.
    pub fn state_for_times(&self) -> MutexGuard<'_, State> {
        let state = self.state.lock();
        self.access_settled_until.store(i64::MIN, Ordering::Release);
        state
    }

    /// Whether the access time is known to need no change at `seconds`.
    pub fn is_access_settled(&self, seconds: i64) -> bool {
        seconds < self.access_settled_until.load(Ordering::Acquire)
    }

    /// The access time needs no change before `seconds`. The caller has the state.
    pub fn settle_access(&self, seconds: i64) {
        self.access_settled_until.store(seconds, Ordering::Release);
    }

    /// Whether the file is known to lend no capabilities.
    pub fn lends_no_capabilities(&self) -> bool {
        self.lends_no_capabilities.load(Ordering::Acquire)
    }

    /// Notes whether the file is known to lend no capabilities. The caller holds the inode lock: exclusively, if it is not known any more.
    pub fn set_lends_no_capabilities(&self, known: bool) {
        self.lends_no_capabilities.store(known, Ordering::Release);
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// The caller holds the inode lock exclusively.
    pub fn set_size(&self, size: u64) {
        self.size.store(size, Ordering::Release);
    }

    /// Makes the file at least this long; under a folio's lock.
    pub fn raise_size(&self, size: u64) {
        self.size.fetch_max(size, Ordering::AcqRel);
    }

    /// The file is about to be made shorter, until the guard is dropped. The caller holds the inode lock exclusively.
    pub fn shrink(&self) -> Shrinking<'_> {
        self.shrinks.fetch_add(1, Ordering::SeqCst);
        Shrinking(self)
    }

    /// Reads with `read`, which is given the file's size, at a moment when the file is not made shorter: while that goes on, bytes that are cut off may read
    /// as zeros before the size says so, and bytes that are appended at once afterwards may too. Without a lock; where that fails, under the
    /// shared inode lock.
    pub fn read_unshrunk<T>(&self, mut read: impl FnMut(u64) -> T) -> T {
        let before = self.shrinks.load(Ordering::SeqCst);
        if before.is_multiple_of(2) {
            let outcome = read(self.size());
            fence(Ordering::SeqCst);
            if self.shrinks.load(Ordering::SeqCst) == before {
                return outcome;
            }
        }
        let _unshrunk = self.lock.read();
        read(self.size())
    }

    pub fn sequence(&self) -> JournalSequence {
        JournalSequence(self.sequence.load(Ordering::Acquire))
    }

    /// A commit in this record changed the inode.
    pub fn committed(&self, sequence: JournalSequence) {
        self.sequence.fetch_max(sequence.0, Ordering::AcqRel);
    }

    /// Takes over what a transaction of the namespace has stored. The caller holds the inode lock exclusively, or the inode is new.
    pub fn apply(&self, stored: &Inode, sequence: JournalSequence) {
        {
            let mut state = self.state_for_times();
            if self.file_type == FileType::Regular {
                let kept = &state.inode;
                let merged = Inode {
                    allocated_bytes: kept.allocated_bytes,
                    access_time: kept.access_time,
                    modification_time: kept.modification_time,
                    ..stored.clone()
                };
                state.inode = merged;
            } else {
                let access_time = state.inode.access_time;
                state.inode = Inode { access_time, ..stored.clone() };
                state.stored_size = stored.size;
                self.set_size(stored.size);
            }
        }
        self.committed(sequence);
    }

    /// Takes over space and size as a data commit has left them in the tree; the newest commit's view wins.
    pub fn refresh(&self, stored: &Inode, sequence: JournalSequence) {
        {
            let mut state = self.state();
            if sequence >= state.tree_sequence {
                state.tree_sequence = sequence;
                state.inode.allocated_bytes = stored.allocated_bytes;
                state.stored_size = stored.size;
            }
        }
        self.committed(sequence);
    }

    pub fn opened(&self, for_writing: bool) {
        self.writable_opens.fetch_add(for_writing.into(), Ordering::AcqRel);
        self.opens.fetch_add(1, Ordering::AcqRel);
    }

    /// One handle less; returns whether it was the last.
    pub fn closed(&self, for_writing: bool) -> bool {
        self.writable_opens.fetch_sub(for_writing.into(), Ordering::AcqRel);
        self.opens.fetch_sub(1, Ordering::AcqRel) == 1
    }

    /// Whether some handle was opened for writing.
    pub fn is_open_for_writing(&self) -> bool {
        self.writable_opens.load(Ordering::Acquire) > 0
    }

    pub fn is_open(&self) -> bool {
        self.opens.load(Ordering::Acquire) > 0
    }

    /// What a commit of delayed data or times stores with it.
    pub fn store_times(&self, stored: &mut Inode) {
        let state = self.state();
        stored.access_time = state.inode.access_time;
        stored.modification_time = state.inode.modification_time;
        // The times of change that namespace operations store are not here before they have committed.
        let (a, b) = (stored.change_time, state.inode.change_time);
        stored.change_time = if (a.seconds, a.nanoseconds) < (b.seconds, b.nanoseconds) { b } else { a };
    }

    /// Whether the page cache holds bytes that no commit has.
    pub fn has_dirty_pages(&self) -> bool {
        self.file.as_ref().is_some_and(|file| file.pages.unwritten_blocks() > 0)
    }

    /// Whether forgetting the object would lose something.
    pub fn is_pinned(&self) -> bool {
        let state = self.state();
        let is_ahead = state.times_ahead || state.due.is_some() || state.inode.link_count == 0;
        drop(state);
        is_ahead || self.is_open() || self.has_dirty_pages()
    }

    pub fn try_writeback_turn(&self) -> Option<WritebackTurn<'_>> {
        let taken = self.writeback_busy.compare_exchange(false, true, Ordering::AcqRel, Ordering::Relaxed);
        // Not `then_some`: a turn that is made and dropped gives somebody else's back.
        taken.is_ok().then(|| WritebackTurn(self))
    }

    /// Whether nobody gets the turn any more.
    pub fn is_writeback_ended(&self) -> bool {
        self.writeback_ended.load(Ordering::Acquire)
    }

    pub fn writeback_event(&self) -> &Event {
        &self.writeback_done
    }
}
