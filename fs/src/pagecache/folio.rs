//! A folio: a power-of-two run of blocks, its bytes, which of them are uptodate, and its lock.
//!
//! ```text
//!            insert (locked)          fill or write           reclaim, punch, replace (locked)
//!   (none) ------------------> empty ---------------> uptodate ------------------------------> detached
//!                                |  fill fails                                                   (final)
//!                                +--> stays, unlocked, not uptodate: the next who needs it fills it again
//! ```
//!
//! - `bytes` never changes. What must be replaced (a write to bytes that somebody looks at) becomes another folio in the map; parts
//!   of one folio may go on as folios of their own that share its memory.
//! - A block that is uptodate stays so. It becomes uptodate only under the folio's lock.
//! - **Folio lock**: one bit. Its holder alone inserts bytes, detaches, replaces. Rank: after add/block; several in index order. A
//!   reader that hits takes no lock. Whoever locks a folio that came from the map rechecks that it is attached.
//! - Dirty and writeback state is kept by the address space ([`super::ranges`]).

use std::ops::Range;
use std::sync::{Arc, Weak};

use super::bitmap::BlockBitmap;
use super::space::AddressSpace;
use crate::env::Env;
use crate::error::Result;
use crate::memory::{ByteReference, FolioBytes, FolioWriter};
use crate::sync::LockClass;
use crate::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use crate::sync::order::{self, Held};

const LOCKED: u32 = 1;
/// Somebody sleeps on the lock: the unlocker must wake.
const WAITERS: u32 = 1 << 1;
/// Out of the map for good. Set under the lock.
const DETACHED: u32 = 1 << 2;
/// The first one to read here starts the next readahead window.
const MARKER: u32 = 1 << 3;
/// Nobody has read it since it was inserted.
const UNREAD: u32 = 1 << 4;
/// It was inserted by readahead, not because somebody waited for it.
const AHEAD: u32 = 1 << 5;
/// It stands in a reclaim queue.
const QUEUED: u32 = 1 << 6;
/// It has proved itself: it belongs in the main queue.
const HOT: u32 = 1 << 7;

/// How often a folio counts as read again, at most: what reclaim's second chances are measured in.
const FREQUENCY_MAX: u8 = 3;

/// See the module's documentation.
#[derive(Debug)]
pub struct Folio {
    index: u64,
    blocks: u32,
    block_shift: u32,
    bytes: Arc<FolioBytes>,
    bytes_offset: usize,
    uptodate: BlockBitmap,
    state: AtomicU32,
    frequency: AtomicU8,
    /// Which 64ths were read in the present pass over the folio.
    pass: AtomicU64,
    /// Where the last read ended, in bytes from the folio's start.
    read_to: AtomicU32,
    space: Weak<AddressSpace>,
}

/// How a folio comes into being.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// A reader or writer needs it now.
    Demand,
    /// Readahead guessed it.
    Ahead,
    /// A writer made it.
    Written,
    /// It is a part of a folio that was replaced.
    Part { hot: bool },
}

impl Folio {
    /// A folio of `blocks` (a power of two) blocks from block `index` on (a multiple of `blocks`), born locked.
    #[cfg_attr(debug_assertions, track_caller)]
    pub(super) fn new_locked(
        space: &Arc<AddressSpace>,
        index: u64,
        blocks: u32,
        bytes: Arc<FolioBytes>,
        bytes_offset: usize,
        origin: Origin,
    ) -> LockedFolio {
        debug_assert!(blocks.is_power_of_two() && index.is_multiple_of(u64::from(blocks)));
        let flags = match origin {
            Origin::Demand => UNREAD,
            Origin::Ahead => UNREAD | AHEAD,
            Origin::Written | Origin::Part { hot: false } => 0,
            Origin::Part { hot: true } => HOT,
        };
        LockedFolio::new(Arc::new(Self {
            index,
            blocks,
            block_shift: space.block_shift(),
            bytes,
            bytes_offset,
            uptodate: BlockBitmap::default(),
            state: AtomicU32::new(LOCKED | flags),
            frequency: AtomicU8::new(0),
            pass: AtomicU64::new(0),
            read_to: AtomicU32::new(0),
            space: Arc::downgrade(space),
        }))
    }

    /// Index of its first block in the file.
    #[must_use]
    pub fn index(&self) -> u64 {
        self.index
    }

    /// Index after its last block.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.index + u64::from(self.blocks)
    }

    /// Number of blocks.
    #[must_use]
    pub fn block_count(&self) -> u64 {
        u64::from(self.blocks)
    }

    /// Offset of its first byte in the file.
    #[must_use]
    pub fn start(&self) -> u64 {
        self.index << self.block_shift
    }

    /// Length in bytes.
    #[must_use]
    pub fn length(&self) -> u64 {
        u64::from(self.blocks) << self.block_shift
    }

    pub(super) fn covers(&self, index: u64) -> bool {
        (self.index..self.end()).contains(&index)
    }

    /// `index` counted from the folio's first block; the caller knows that it is inside.
    pub(super) fn relative(&self, index: u64) -> u32 {
        debug_assert!(index >= self.index && index <= self.end());
        u32::try_from(index - self.index).unwrap_or(self.blocks)
    }

    pub(super) fn uptodate(&self) -> &BlockBitmap {
        &self.uptodate
    }

    pub(super) fn is_uptodate(&self, index: u64) -> bool {
        self.uptodate.is_set(self.relative(index))
    }

    /// Marks the blocks of the file range `blocks` (inside the folio) uptodate. Only under the lock.
    pub(super) fn set_uptodate(&self, blocks: Range<u64>) {
        self.uptodate.set(self.relative(blocks.start)..self.relative(blocks.end));
    }

    /// Marks the blocks that lie wholly in `range` (bytes from the folio's start) uptodate. Only under the lock.
    pub(super) fn set_uptodate_bytes(&self, range: Range<u32>) {
        let block = 1_u32 << self.block_shift;
        let start = range.start.div_ceil(block);
        let end = (range.end / block).min(self.blocks);
        if start < end {
            self.uptodate.set(start..end);
        }
    }

    /// Where `range` (bytes of the file, inside the folio) lies in its memory.
    fn memory_range(&self, range: &Range<u64>) -> Range<usize> {
        let at = |offset: u64| self.bytes_offset + usize::try_from(offset - self.start()).unwrap_or(usize::MAX);
        at(range.start)..at(range.end)
    }

    /// A reference to the bytes of `range` (of the file, inside the folio). Waits only for a writer that copies right now.
    pub(super) fn reference(&self, range: &Range<u64>) -> ByteReference {
        self.bytes.reference(self.memory_range(range))
    }

    /// The right to change the bytes of `range` in place, if nobody looks. Only under the lock.
    pub(super) fn try_write(&self, range: &Range<u64>) -> Option<FolioWriter> {
        self.bytes.try_write(self.memory_range(range))
    }

    pub(super) fn bytes(&self) -> &Arc<FolioBytes> {
        &self.bytes
    }

    /// Where the memory of block `index` starts in [`Self::bytes`].
    pub(super) fn bytes_offset_of(&self, index: u64) -> usize {
        self.bytes_offset + ((self.relative(index) as usize) << self.block_shift)
    }

    pub(super) fn space(&self) -> Option<Arc<AddressSpace>> {
        self.space.upgrade()
    }

    pub(super) fn is_detached(&self) -> bool {
        self.state.load(Ordering::Acquire) & DETACHED != 0
    }

    pub(super) fn is_locked(&self) -> bool {
        self.state.load(Ordering::Acquire) & LOCKED != 0
    }

    fn try_lock_state(&self) -> bool {
        self.state.fetch_or(LOCKED, Ordering::Acquire) & LOCKED == 0
    }

    fn lock_class(&self) -> LockClass {
        LockClass::folio(self.space.as_ptr().addr() as u64, self.index)
    }

    fn address(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }

    /// Locks if that needs no waiting.
    #[cfg_attr(debug_assertions, track_caller)]
    pub(super) fn try_lock(self: &Arc<Self>) -> Option<LockedFolio> {
        if self.try_lock_state() { Some(LockedFolio::new(Arc::clone(self))) } else { None }
    }

    /// Locks, waiting for the holder: for a fill as long as its I/O.
    #[cfg_attr(debug_assertions, track_caller)]
    pub(super) fn lock(self: &Arc<Self>, env: &Env, space: &AddressSpace) -> Result<LockedFolio> {
        order::expect(&self.lock_class(), self.address());
        if let Some(locked) = self.try_lock() {
            return Ok(locked);
        }
        env.wait(space.unlocked(), || {
            // The bit first: an unlock after this wakes us, one before it is seen by the attempt.
            self.state.fetch_or(WAITERS, Ordering::SeqCst);
            self.try_lock()
        })
    }

    /// Waits until nobody holds the lock, without taking it.
    pub(super) fn wait_unlocked(&self, env: &Env, space: &AddressSpace) -> Result<()> {
        env.wait(space.unlocked(), || {
            if !self.is_locked() {
                return Some(());
            }
            self.state.fetch_or(WAITERS, Ordering::SeqCst);
            (!self.is_locked()).then_some(())
        })
    }

    fn unlock(&self) {
        let before = self.state.fetch_and(!(LOCKED | WAITERS), Ordering::SeqCst);
        debug_assert!(before & LOCKED != 0, "a folio was unlocked twice");
        if before & WAITERS != 0
            && let Some(space) = self.space.upgrade()
        {
            space.unlocked().notify();
        }
    }

    pub(super) fn set_marker(&self) {
        self.state.fetch_or(MARKER, Ordering::Relaxed);
    }

    /// Whether this read is the one that starts the next window; true once for each marker.
    pub(super) fn take_marker(&self) -> bool {
        self.state.load(Ordering::Relaxed) & MARKER != 0
            && self.state.fetch_and(!MARKER, Ordering::Relaxed) & MARKER != 0
    }

    /// Notes that `bytes` (of the file, inside the folio) were read. Returns whether it is the first read of a folio that readahead had guessed.
    ///
    /// A pass over the folio in pieces counts once, so that a sequential scan in small reads does not look like a hot folio: a read that goes on
    /// where the last one ended may begin in a part that was seen.
    pub(super) fn touch(&self, bytes: &Range<u64>) -> bool {
        let within = |offset: u64| u32::try_from(offset.saturating_sub(self.start())).unwrap_or(u32::MAX);
        let (start, end) = (within(bytes.start), within(bytes.end));
        let goes_on = self.read_to.load(Ordering::Relaxed) == start;
        self.read_to.store(end, Ordering::Relaxed);
        let parts = self.parts(&(start >> self.block_shift..end.div_ceil(1 << self.block_shift)));
        let state = self.state.load(Ordering::Relaxed);
        if state & UNREAD != 0 {
            let before = self.state.fetch_and(!(UNREAD | AHEAD), Ordering::Relaxed);
            self.pass.fetch_or(parts, Ordering::Relaxed);
            return before & (UNREAD | AHEAD) == UNREAD | AHEAD;
        }
        if self.frequency.load(Ordering::Relaxed) < FREQUENCY_MAX {
            // All but the first.
            let again = if goes_on { parts & parts.wrapping_sub(1) } else { parts };
            let seen = self.pass.load(Ordering::Relaxed);
            if again != 0 && seen & again == again {
                self.pass.store(parts, Ordering::Relaxed);
                // Lost updates of a hint do no harm.
                self.frequency
                    .store((self.frequency.load(Ordering::Relaxed) + 1).min(FREQUENCY_MAX), Ordering::Relaxed);
            } else {
                self.pass.store(seen | parts, Ordering::Relaxed);
            }
        }
        false
    }

    /// Whether readahead had guessed it and nobody has read it.
    pub(super) fn is_unread_guess(&self) -> bool {
        self.state.load(Ordering::Relaxed) & (UNREAD | AHEAD) == UNREAD | AHEAD
    }

    fn parts(&self, blocks: &Range<u32>) -> u64 {
        let per_part = self.blocks.div_ceil(64);
        let first = blocks.start / per_part;
        let last = blocks.end.saturating_sub(1).max(blocks.start) / per_part;
        let count = (last - first + 1).min(64);
        (if count == 64 { u64::MAX } else { (1 << count) - 1 }) << first.min(63)
    }

    pub(super) fn frequency(&self) -> u8 {
        self.frequency.load(Ordering::Relaxed)
    }

    pub(super) fn set_frequency(&self, frequency: u8) {
        self.frequency.store(frequency, Ordering::Relaxed);
    }

    pub(super) fn is_hot(&self) -> bool {
        self.state.load(Ordering::Relaxed) & HOT != 0
    }

    pub(super) fn set_hot(&self) {
        self.state.fetch_or(HOT, Ordering::Relaxed);
    }

    /// Claims the right to put the folio in a queue; false if it stands in one.
    pub(super) fn claim_queue_place(&self) -> bool {
        self.state.fetch_or(QUEUED, Ordering::SeqCst) & QUEUED == 0
    }

    pub(super) fn leave_queue(&self) {
        self.state.fetch_and(!QUEUED, Ordering::SeqCst);
    }
}

/// A folio that we hold the lock of. Unlocked, once, when it is dropped.
#[derive(Debug)]
#[must_use]
pub(super) struct LockedFolio {
    folio: Arc<Folio>,
    /// Noted for the lock order of this thread; not so once it waits for its bytes in a batch.
    held: Held,
}

impl LockedFolio {
    /// The folio's lock bit was set by the calling thread.
    #[cfg_attr(debug_assertions, track_caller)]
    fn new(folio: Arc<Folio>) -> Self {
        let held = order::hold(&folio.lock_class(), folio.address());
        Self { folio, held }
    }

    pub(super) fn folio(&self) -> &Arc<Folio> {
        &self.folio
    }

    /// Marks it as out of the map. The caller has taken it out.
    pub(super) fn detach(&self) {
        self.folio.state.fetch_or(DETACHED, Ordering::SeqCst);
    }

    /// The lock now belongs to a fill under way and not to this thread: whatever the thread locks next is not "after" it.
    pub(super) fn hand_to_fill(mut self) -> Self {
        self.held.hand_over();
        self
    }
}

impl Drop for LockedFolio {
    fn drop(&mut self) {
        self.folio.unlock();
    }
}
