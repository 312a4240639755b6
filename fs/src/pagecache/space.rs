//! The pages of one inode.
//!
//! Locks, in order: the add lock (see [`super::add_lock`]); folio locks; `tracking` (what is dirty or being written back: short critical
//! sections, nothing is locked inside but the cache's list of dirty spaces); the map's update mutex (innermost, nothing inside).

use std::ops::Range;
use std::sync::Arc;

use super::add_lock::{AddLock, BlockGuard};
use super::cache::{Cache, DirtyKey};
use super::errors::ErrorSequence;
use super::folio::{Folio, LockedFolio};
use super::map::FolioMap;
use super::ranges::BlockRanges;
use crate::env::Event;
use crate::error::{Error, Result};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Mutex, Rank, RankSet};

/// What may be held while a folio, or the writeback of one, is waited for: a puncher holds block and the folios that it has locked. Not add: a fill
/// shrinks instead.
const OVER_FOLIO_WAIT: RankSet = RankSet::of(&[Rank::Inode, Rank::Block, Rank::Folio]);

/// What is dirty and what is being written back, by block.
#[derive(Debug, Default)]
pub(super) struct Tracking {
    pub(super) dirty: BlockRanges,
    /// Blocks of writeback runs that have not committed; their bytes are held by the runs.
    pub(super) writeback: BlockRanges,
    /// Where the space stands in the cache's list of dirty spaces.
    pub(super) dirty_key: Option<DirtyKey>,
    /// See [`AddressSpace::failure`].
    pub(super) failure: Option<Error>,
}

/// See the module's documentation. Made by [`Cache::new_space`].
#[derive(Debug)]
pub struct AddressSpace {
    identity: u64,
    /// Tells spaces apart that have the same identity at different times.
    serial: u64,
    cache: Arc<Cache>,
    map: FolioMap,
    add_lock: AddLock,
    unlocked: Event,
    written: Event,
    pub(super) tracking: Mutex<Tracking>,
    errors: ErrorSequence,
    sequence: AtomicU64,
}

impl AddressSpace {
    pub(super) fn new(cache: &Arc<Cache>, identity: u64, serial: u64, add_lock: AddLock) -> Arc<Self> {
        Arc::new(Self {
            identity,
            serial,
            cache: Arc::clone(cache),
            map: FolioMap::default(),
            add_lock,
            unlocked: Event::new_over(OVER_FOLIO_WAIT),
            written: Event::new_over(OVER_FOLIO_WAIT),
            tracking: Mutex::new(Tracking::default()),
            errors: ErrorSequence::default(),
            sequence: AtomicU64::new(0),
        })
    }

    /// The number that the owner gave it: an inode, in the owner's terms.
    #[must_use]
    pub fn identity(&self) -> u64 {
        self.identity
    }

    pub(super) fn serial(&self) -> u64 {
        self.serial
    }

    /// The cache it belongs to.
    #[must_use]
    pub fn cache(&self) -> &Arc<Cache> {
        &self.cache
    }

    /// Size of a block in bytes.
    #[must_use]
    pub fn block_bytes(&self) -> u64 {
        self.cache.block_bytes()
    }

    pub(super) fn block_shift(&self) -> u32 {
        self.cache.block_shift()
    }

    pub(super) fn map(&self) -> &FolioMap {
        &self.map
    }

    pub(super) fn add_lock(&self) -> &AddLock {
        &self.add_lock
    }

    /// Notified when a folio that somebody waits for is unlocked.
    pub(super) fn unlocked(&self) -> &Event {
        &self.unlocked
    }

    /// Notified when a writeback run ends.
    pub(super) fn written(&self) -> &Event {
        &self.written
    }

    /// Errors of writeback, for fsync to report.
    #[must_use]
    pub fn errors(&self) -> &ErrorSequence {
        &self.errors
    }

    /// Takes **block** for `range` (bytes, rounded out to blocks): nobody fills or inserts until it is dropped. The caller holds the inode's lock as the
    /// table of [`super`] says, and no other lock of the cache.
    ///
    /// # Errors
    /// What a simulated wait fails with.
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn block(&self, range: Range<u64>) -> Result<BlockGuard<'_>> {
        let guard = self.add_lock.block(self.bytes_of(&self.blocks_of(&range)))?;
        self.bump_sequence();
        Ok(guard)
    }

    /// Takes **block** if that needs no waiting.
    #[must_use]
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn try_block(&self, range: Range<u64>) -> Option<BlockGuard<'_>> {
        let guard = self.add_lock.try_block(self.bytes_of(&self.blocks_of(&range)))?;
        self.bump_sequence();
        Some(guard)
    }

    /// The number of extent changes so far, unless a blocker is inside: what a direct read compares before and after.
    #[must_use]
    pub fn sample_sequence(&self) -> Option<u64> {
        let sequence = self.sequence.load(Ordering::SeqCst);
        (!self.add_lock.is_blocked()).then_some(sequence)
    }

    /// Notes a change of extents: block holders, writeback's commit, copygc's move.
    pub fn bump_sequence(&self) {
        self.sequence.fetch_add(1, Ordering::SeqCst);
    }

    /// The byte range of blocks.
    pub(super) fn bytes_of(&self, blocks: &Range<u64>) -> Range<u64> {
        let shift = self.block_shift();
        let scale = |block: u64| block.saturating_mul(1 << shift);
        scale(blocks.start)..scale(blocks.end)
    }

    /// The blocks that a byte range touches.
    pub(super) fn blocks_of(&self, bytes: &Range<u64>) -> Range<u64> {
        let shift = self.block_shift();
        bytes.start >> shift..bytes.end.div_ceil(1 << shift)
    }

    /// Number of folios in the space; walks them (for tests and statistics).
    #[must_use]
    pub fn folio_count(&self) -> u64 {
        let map = self.map.load();
        let mut count = 0;
        let mut at = 0;
        while let Some(folio) = map.at_or_after(at) {
            count += 1;
            at = folio.end();
        }
        count
    }

    /// Whether anything of `range` (bytes) is in the cache, uptodate or not.
    #[must_use]
    pub fn has_folios(&self, range: &Range<u64>) -> bool {
        let blocks = self.blocks_of(range);
        !self.map.load().is_vacant(blocks.start, blocks.end)
    }

    /// Puts the parts of `old` outside of `cut` (blocks) back as folios of their own that share its memory, and `fresh` in the place of
    /// (parts of) `cut`, in one step that readers see whole; detaches and unlocks `old`. The caller has rechecked that it is attached.
    /// Takes no add: what was cached stays cached, under a lock that a blocker must wait for.
    pub(super) fn replace(self: &Arc<Self>, old: LockedFolio, cut: Range<u64>, fresh: &[Arc<Folio>]) {
        let mut parts = Vec::new();
        for outside in [old.folio().index()..cut.start, cut.end..old.folio().end()] {
            for (index, blocks) in super::insert::aligned_pieces(outside, u32::MAX) {
                let folio = old.folio();
                let part = Folio::new_locked(
                    self,
                    index,
                    blocks,
                    Arc::clone(folio.bytes()),
                    folio.bytes_offset_of(index),
                    super::folio::Origin::Part { hot: folio.is_hot() },
                );
                for block in index..part.folio().end() {
                    if folio.is_uptodate(block) {
                        part.folio().set_uptodate(block..block + 1);
                    }
                }
                parts.push(part);
            }
        }
        self.map.update(|root| {
            root.remove(old.folio());
            for folio in parts.iter().map(LockedFolio::folio).chain(fresh) {
                let inserted = root.insert(Arc::clone(folio));
                debug_assert!(inserted, "a part of a replaced folio met another folio");
            }
        });
        old.detach();
        for folio in parts.iter().map(LockedFolio::folio).chain(fresh) {
            self.cache.enqueue(folio);
        }
    }

    /// Takes a locked folio out of the map.
    pub(super) fn detach(&self, locked: &LockedFolio) {
        self.map.update(|root| root.remove(locked.folio()));
        locked.detach();
    }
}

impl Drop for AddressSpace {
    fn drop(&mut self) {
        // Dirty data that its owner gives up (a crash test, a filesystem that has latched) must not count against the others for ever.
        let mut tracking = self.tracking.lock();
        let dirty = tracking.dirty.block_count();
        if let Some(key) = tracking.dirty_key.take() {
            self.cache.unlist_dirty(key);
        }
        self.cache.count_dropped(dirty);
        drop(tracking);
        if dirty > 0 {
            self.cache.notify_cleaned();
        }
    }
}
