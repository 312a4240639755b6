//! From dirty blocks to runs that the owner writes.
//!
//! ```text
//!   clean --mark_dirty--> dirty --collect_dirty--> writeback --complete(Ok)--> clean
//!                           ^                          |
//!                           +------complete(Err)-------+
//! ```
//!
//! - Taking a block from dirty to writeback is one critical section of `tracking`. The references to its bytes are taken after it, and a block is marked
//!   dirty after its bytes are in place: what a run holds is at least as new as the mark it took.
//! - The run holds byte references, so its bytes are stable: a write meanwhile goes to fresh memory and makes the block dirty again.
//! - A block is in at most one run at a time: two writes of one block cannot overtake each other. [`collect_dirty`] leaves out a dirty
//!   block whose previous version is still under way.
//! - It takes no folio lock, no add, no block: a puncher holds folio locks while it waits for a run to be completed.

use std::ops::Range;
use std::sync::Arc;

use super::cache::DirtyQuota;
use super::ranges::{BlockRanges, units_of};
use super::space::AddressSpace;
use crate::error::{Error, Result};
use crate::memory::ByteReference;

/// Marks `blocks` dirty, whose folio the caller holds locked. Returns how many were not dirty before.
pub(super) fn mark_dirty(
    space: &Arc<AddressSpace>,
    blocks: Range<u64>,
    units_per_block: u32,
    quota: &mut DirtyQuota<'_>,
) -> u64 {
    let mut tracking = space.tracking.lock();
    let newly = tracking.dirty.insert_absent(blocks, units_per_block);
    if newly > 0 && tracking.dirty_key.is_none() {
        tracking.dirty_key = Some(space.cache().list_dirty(space));
    }
    space.cache().count_dirty(newly, quota);
    newly
}

/// A contiguous run of blocks on its way to the device. To be [completed](Self::complete) when the transaction that points to the data has
/// committed; a run that is dropped makes its blocks dirty again.
#[derive(Debug)]
#[must_use]
pub struct WritebackRun {
    space: Arc<AddressSpace>,
    blocks: Range<u64>,
    segments: Vec<ByteReference>,
    units: u64,
    completed: bool,
}

/// How a run ends.
enum End {
    Written,
    /// Nobody tried to write it.
    Dropped,
    Failed(Error),
}

impl WritebackRun {
    /// The space it belongs to.
    #[must_use]
    pub fn space(&self) -> &Arc<AddressSpace> {
        &self.space
    }

    /// Offset of its first byte in the file; a multiple of the block size.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.space.bytes_of(&self.blocks).start
    }

    /// Length in bytes; a multiple of the block size, also where the file ends inside its last block (whose rest is zero).
    #[must_use]
    pub fn length(&self) -> u64 {
        (self.blocks.end - self.blocks.start) << self.space.block_shift()
    }

    /// The bytes, in order; each slice is whole blocks and aligned to 4096.
    pub fn slices(&self) -> impl Iterator<Item = &[u8]> {
        self.segments.iter().map(|segment| &**segment)
    }

    /// The bytes as references of their own, for a writer on another thread.
    #[must_use]
    pub fn references(&self) -> Vec<ByteReference> {
        self.segments.clone()
    }

    /// Units of the caller's reservation that these blocks carry.
    #[must_use]
    pub fn units(&self) -> u64 {
        self.units
    }

    /// Ends the run. `Ok`: the extents are committed, the writer has consumed [`Self::units`], and 0 is returned. `Err`: the blocks are dirty
    /// again and keep their units; those that a write has made dirty meanwhile carry units of their own, and the ones of the run
    /// are returned for the caller to give back. The error is remembered for fsync ([`AddressSpace::errors`]).
    pub fn complete(mut self, result: Result<()>) -> u64 {
        self.completed = true;
        match result {
            Ok(()) => {
                self.space.cache().count_run(true);
                self.end(&End::Written);
                0
            }
            Err(error) => {
                if matches!(error, Error::NoSpace(_)) {
                    self.space.cache().count_run(false);
                }
                self.space.errors().record(error.clone());
                self.end(&End::Failed(error))
            }
        }
    }

    fn end(&mut self, how: &End) -> u64 {
        // The references first: what waits for the run may want to write in place.
        self.segments.clear();
        let space = &self.space;
        let cache = space.cache();
        let mut surplus = 0;
        {
            let mut tracking = space.tracking.lock();
            let ended = tracking.writeback.remove(self.blocks.clone());
            let mut redirtied = 0;
            match how {
                End::Written => tracking.failure = None,
                // Space may come back by itself.
                End::Dropped | End::Failed(Error::NoSpace(_)) => {}
                End::Failed(error) => tracking.failure = Some(error.clone()),
            }
            if !matches!(how, End::Written) {
                for (part, units) in &ended {
                    let again = tracking.dirty.insert_absent(part.clone(), *units);
                    redirtied += again;
                    surplus += (part.end - part.start - again) * u64::from(*units);
                }
                if redirtied > 0 && tracking.dirty_key.is_none() {
                    tracking.dirty_key = Some(cache.list_dirty(space));
                }
            }
            cache.count_written(self.blocks.end - self.blocks.start, redirtied);
        }
        if matches!(how, End::Failed(_)) {
            cache.count_failed_run();
        }
        // Reclaim dropped folios that it met dirty: they stand for eviction again.
        let map = space.map().load_full();
        let mut at = self.blocks.start;
        while let Some(folio) = map.at_or_after(at)
            && folio.index() < self.blocks.end
        {
            cache.enqueue(folio);
            at = folio.end();
        }
        space.bump_sequence();
        space.written().notify();
        cache.notify_cleaned();
        surplus
    }
}

impl Drop for WritebackRun {
    fn drop(&mut self) {
        if !self.completed {
            self.end(&End::Dropped);
        }
    }
}

/// Takes up to `max_bytes` (at least one block) of dirty data of `range` (bytes) for writing: contiguous runs, in order of offset, each as long as
/// the dirty data allows. Takes no folio lock; waits for nobody but a writer that copies right now.
#[must_use]
pub fn collect_dirty(space: &Arc<AddressSpace>, range: Range<u64>, max_bytes: u64) -> Vec<WritebackRun> {
    collect_dirty_with(space, range, max_bytes, || ()).0
}

/// As [`collect_dirty`], and samples the file's size in the same critical section: everything below it that was ever dirty is in the runs, or was
/// before. What is placed later raises the size first and becomes dirty afterwards, so it will be collected again: the runs may show some of
/// it, and whoever writes them must not take it for the file's. `sample` reads an atomic, and nothing more.
#[must_use]
pub fn collect_dirty_with<T>(
    space: &Arc<AddressSpace>,
    range: Range<u64>,
    max_bytes: u64,
    sample: impl FnOnce() -> T,
) -> (Vec<WritebackRun>, T) {
    let limit = (max_bytes >> space.block_shift()).max(1);
    let mut taken: Vec<(Range<u64>, u64)> = Vec::new();
    let sampled = {
        let mut guard = space.tracking.lock();
        let tracking = &mut *guard;
        let sampled = sample();
        let mut left = limit;
        let mut parts = Vec::new();
        'dirty: for (dirty, units) in tracking.dirty.within(space.blocks_of(&range)) {
            for part in without(dirty, &tracking.writeback) {
                let part = part.start..part.end.min(part.start + left);
                left -= part.end - part.start;
                parts.push((part, units));
                if left == 0 {
                    break 'dirty;
                }
            }
        }
        let mut count = 0;
        for (part, units) in parts {
            tracking.dirty.remove(part.clone());
            tracking.writeback.insert_absent(part.clone(), units);
            let part_units = (part.end - part.start) * u64::from(units);
            count += part.end - part.start;
            match taken.last_mut() {
                Some((last, units)) if last.end == part.start => {
                    last.end = part.end;
                    *units += part_units;
                }
                _ => taken.push((part, part_units)),
            }
        }
        space.cache().count_collected(count);
        unlist_if_clean(space, tracking);
        sampled
    };
    (taken.into_iter().map(|(blocks, units)| run_of(space, blocks, units)).collect(), sampled)
}

/// Takes all dirty blocks of `blocks` into runs without bytes, once no other run covers any of them: for somebody who replaces them. The caller has their
/// folios locked, so nothing becomes dirty meanwhile.
pub(super) fn hold_dirty(space: &Arc<AddressSpace>, blocks: &Range<u64>) -> Result<Vec<WritebackRun>> {
    let taken = space.cache().env().wait(space.written(), || {
        let mut guard = space.tracking.lock();
        let tracking = &mut *guard;
        if tracking.writeback.overlaps(blocks.clone()) {
            return None;
        }
        let taken = tracking.dirty.remove(blocks.clone());
        for (part, units) in &taken {
            tracking.writeback.insert_absent(part.clone(), *units);
        }
        space.cache().count_collected(super::ranges::blocks_of(&taken));
        unlist_if_clean(space, tracking);
        Some(taken)
    })?;
    let run = |(blocks, units): (Range<u64>, u32)| {
        let units = (blocks.end - blocks.start) * u64::from(units);
        WritebackRun { space: Arc::clone(space), blocks, segments: Vec::new(), units, completed: false }
    };
    Ok(taken.into_iter().map(run).collect())
}

/// The parts of `range` that are not in `ranges`.
fn without(range: Range<u64>, ranges: &BlockRanges) -> Vec<Range<u64>> {
    let mut parts = Vec::new();
    let mut at = range.start;
    for (part, _) in ranges.within(range.clone()) {
        if at < part.start {
            parts.push(at..part.start);
        }
        at = part.end;
    }
    if at < range.end {
        parts.push(at..range.end);
    }
    parts
}

fn unlist_if_clean(space: &AddressSpace, tracking: &mut super::space::Tracking) {
    if tracking.dirty.is_empty()
        && let Some(key) = tracking.dirty_key.take()
    {
        space.cache().unlist_dirty(key);
    }
}

fn run_of(space: &Arc<AddressSpace>, blocks: Range<u64>, units: u64) -> WritebackRun {
    let mut run = WritebackRun {
        space: Arc::clone(space),
        blocks: blocks.clone(),
        segments: Vec::new(),
        units,
        completed: false,
    };
    // Dirty blocks are in the map, and stay there while they are in the writeback set. This version of it was loaded after we put
    // them there; a folio that is replaced from now on still has the bytes that the mark stood for.
    let map = space.map().load_full();
    let mut at = blocks.start;
    while at < blocks.end {
        let Some(folio) = map.get(at) else {
            debug_assert!(false, "block {at} is dirty and in no folio");
            break;
        };
        let end = folio.end().min(blocks.end);
        run.segments.push(folio.reference(&space.bytes_of(&(at..end))));
        at = end;
    }
    run
}

impl AddressSpace {
    /// The dirty or in-writeback parts of `range` (bytes), block by block, joined: what SEEK_DATA sees besides extents.
    #[must_use]
    pub fn unwritten_ranges(&self, range: &Range<u64>) -> Vec<Range<u64>> {
        let tracking = self.tracking.lock();
        let mut all = BlockRanges::default();
        let blocks = self.blocks_of(range);
        for (part, _) in tracking.dirty.within(blocks.clone()).chain(tracking.writeback.within(blocks.clone())) {
            all.insert_absent(part, 0);
        }
        drop(tracking);
        all.within(blocks).map(|(part, _)| self.bytes_of(&part)).collect()
    }

    /// Whether anything of `range` (bytes) is dirty and in no run.
    #[must_use]
    pub fn is_dirty(&self, range: &Range<u64>) -> bool {
        self.tracking.lock().dirty.overlaps(self.blocks_of(range))
    }

    /// Whether a run covers anything of `range` (bytes).
    #[must_use]
    pub fn is_being_written(&self, range: &Range<u64>) -> bool {
        self.tracking.lock().writeback.overlaps(self.blocks_of(range))
    }

    /// Why the last run could not be written, for other reasons than want of space, if none was written since and something is still dirty: what is
    /// written to the file now would only wait with the rest.
    #[must_use]
    pub fn failure(&self) -> Option<Error> {
        // Every write asks: where nothing ever failed, with no lock.
        if !self.cache().has_failed_runs() {
            return None;
        }
        self.tracking.lock().failure.clone()
    }

    /// Number of dirty blocks, in runs or not.
    #[must_use]
    pub fn unwritten_blocks(&self) -> u64 {
        let tracking = self.tracking.lock();
        tracking.dirty.block_count() + tracking.writeback.block_count()
    }

    /// Waits until no run covers any of `range` (bytes). Called with no lock that a writeback worker needs.
    ///
    /// An fsync collects and writes, waits, and does both once more: what it found under way the first time may have been dirty again.
    ///
    /// # Errors
    /// What a simulated wait fails with. Errors of the runs are in [`Self::errors`].
    pub fn wait_for_writeback(&self, range: &Range<u64>) -> Result<()> {
        let blocks = self.blocks_of(range);
        self.cache()
            .env()
            .wait(self.written(), || (!self.tracking.lock().writeback.overlaps(blocks.clone())).then_some(()))
    }

    /// Drops the dirty state of `blocks`, which are in no run. Waits for runs; the caller holds what keeps the blocks from becoming
    /// dirty again (the folio's lock). Returns (blocks, units) dropped.
    pub(super) fn drop_dirty(&self, blocks: &Range<u64>) -> Result<(u64, u64)> {
        self.cache().env().wait(self.written(), || {
            let mut tracking = self.tracking.lock();
            if tracking.writeback.overlaps(blocks.clone()) {
                return None;
            }
            let dropped = tracking.dirty.remove(blocks.clone());
            let count = super::ranges::blocks_of(&dropped);
            if count > 0 {
                self.cache().count_dropped(count);
                unlist_if_clean(self, &mut tracking);
                if tracking.dirty.is_empty() && tracking.writeback.is_empty() {
                    tracking.failure = None;
                }
            }
            Some((count, units_of(&dropped)))
        })
    }
}
