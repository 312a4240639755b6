//! Taking pages out, under **block**: what truncate, punch, zero-range, collapse, insert and direct writes do before they change extents.
//!
//! For each folio of the range: lock it, wait until its writeback has *committed*, drop its dirty state, detach it. A folio that straddles an
//! edge of the range is split: outside of the range nothing changes. Fills are excluded by the guard, so when this returns, nothing of the
//! range is cached, nothing of it is being written, and nothing can come back before the guard is dropped.
//!
//! A direct write drops its blocks only in its commit: until then it [holds](HeldRange) the folios locked and their dirty blocks in runs of its own.
//! So a commit that fails has lost nothing, and an fsync meanwhile waits for it.

use std::ops::Range;
use std::sync::Arc;

use super::add_lock::BlockGuard;
use super::folio::LockedFolio;
use super::space::AddressSpace;
use super::write::{WriteContext, zero_within_block};
use super::writeback::{WritebackRun, hold_dirty};
use crate::error::{Error, Result};

/// What an invalidation dropped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Dropped {
    /// Dirty blocks whose bytes will not be written.
    pub blocks: u64,
    /// Units of the caller's reservation that they carried: to be given back.
    pub units: u64,
}

/// Drops the pages of `range` (bytes, multiples of the block size; the end may be `u64::MAX`), dirty ones included.
///
/// # Errors
/// [`Error::Bug`] for an unaligned range or a guard that does not cover it; what a simulated wait fails with.
pub fn invalidate_range(space: &Arc<AddressSpace>, blocking: &BlockGuard<'_>, range: Range<u64>) -> Result<Dropped> {
    let block = space.block_bytes();
    if !range.start.is_multiple_of(block) || !(range.end.is_multiple_of(block) || range.end == u64::MAX) {
        return Err(Error::Bug(format!("invalidation of the unaligned range {}..{}", range.start, range.end)));
    }
    if !blocking.covers(space.add_lock(), &range) {
        return Err(Error::Bug("invalidation outside of the blocked range".into()));
    }
    let blocks = space.blocks_of(&range);
    let mut dropped = Dropped::default();
    // Without any folio locked first: it is the longest wait, and readers of these folios need not share it.
    space.wait_for_writeback(&range)?;
    let mut at = blocks.start;
    while at < blocks.end {
        let found = space.map().load().at_or_after(at).cloned();
        let Some(folio) = found.filter(|folio| folio.index() < blocks.end) else { break };
        let locked = folio.lock(space.cache().env(), space)?;
        if folio.is_detached() {
            continue;
        }
        let inside = folio.index().max(blocks.start)..folio.end().min(blocks.end);
        let (count, units) = space.drop_dirty(&inside)?;
        dropped.blocks += count;
        dropped.units += units;
        at = folio.end();
        if inside == (folio.index()..folio.end()) {
            space.detach(&locked);
        } else {
            space.replace(locked, inside, &[]);
        }
    }
    if dropped.blocks > 0 {
        space.cache().notify_cleaned();
    }
    space.bump_sequence();
    Ok(dropped)
}

/// The folios of a range, locked, with their dirty blocks out of writeback's reach. Dropped, everything is as before.
#[derive(Debug)]
#[must_use]
pub struct HeldRange<'a> {
    space: &'a Arc<AddressSpace>,
    blocks: Range<u64>,
    /// Dirty blocks, as if they were being written. Dropped before the folios are unlocked.
    runs: Vec<WritebackRun>,
    folios: Vec<LockedFolio>,
}

/// Locks the folios of `range` (bytes, multiples of the block size) and takes their dirty blocks, for a commit that replaces all of it. Readers of what
/// is cached go on; nobody changes it.
///
/// # Errors
/// [`Error::Bug`] for a guard that does not cover the range; what a simulated wait fails with.
pub fn hold_range<'a>(
    space: &'a Arc<AddressSpace>,
    blocking: &BlockGuard<'_>,
    range: Range<u64>,
) -> Result<HeldRange<'a>> {
    if !blocking.covers(space.add_lock(), &range) {
        return Err(Error::Bug("holding pages outside of the blocked range".into()));
    }
    let blocks = space.blocks_of(&range);
    space.wait_for_writeback(&range)?;
    let mut held = HeldRange { space, blocks: blocks.clone(), runs: Vec::new(), folios: Vec::new() };
    let mut at = blocks.start;
    while at < blocks.end {
        let found = space.map().load().at_or_after(at).cloned();
        let Some(folio) = found.filter(|folio| folio.index() < blocks.end) else { break };
        let locked = folio.lock(space.cache().env(), space)?;
        if folio.is_detached() {
            continue;
        }
        at = folio.end();
        // From here on it is the commit's, as that of a fill is the fill's: nothing that a commit waits for takes a folio's lock.
        held.folios.push(locked.hand_to_fill());
    }
    // Nothing becomes dirty any more. What writeback has taken since is waited for; it needs no folio's lock.
    held.runs = hold_dirty(space, &blocks)?;
    Ok(held)
}

impl HeldRange<'_> {
    /// Takes the range out of the cache: its extents are replaced, and the inode knows the record that did it.
    pub fn discard(self) -> Dropped {
        let mut dropped = Dropped::default();
        for locked in self.folios {
            let folio = locked.folio();
            let inside = folio.index().max(self.blocks.start)..folio.end().min(self.blocks.end);
            if inside == (folio.index()..folio.end()) {
                self.space.detach(&locked);
            } else {
                self.space.replace(locked, inside, &[]);
            }
        }
        for run in self.runs {
            dropped.blocks += run.length() / self.space.block_bytes();
            dropped.units += run.units();
            run.complete(Ok(()));
        }
        dropped
    }

    /// A part of the extents was replaced before an error: what is dirty stays (its write had succeeded), what is clean goes, as it may be stale.
    pub fn discard_clean(self) {
        drop(self.runs);
        for locked in self.folios {
            let folio = locked.folio();
            let inside = folio.index().max(self.blocks.start)..folio.end().min(self.blocks.end);
            if self.space.is_dirty(&self.space.bytes_of(&inside)) {
                continue;
            }
            if inside == (folio.index()..folio.end()) {
                self.space.detach(&locked);
            } else {
                self.space.replace(locked, inside, &[]);
            }
        }
    }
}

/// What a punch or a truncate did in the cache.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Punched {
    /// What was dropped.
    pub dropped: Dropped,
    /// Edge blocks that became dirty by being zeroed: each took `units_per_block` of the reservation.
    pub newly_dirty_blocks: u64,
    /// The bytes whose extents the caller now removes: whole blocks.
    pub interior: Range<u64>,
}

/// Makes `offset..offset + length` read as zeros as far as the cache is concerned: zeroes the blocks that the range covers in part
/// (dirty, at most two), drops those it covers wholly. The caller holds the inode's lock exclusively and has reserved for two blocks; it then
/// removes the extents of `interior`, still under `blocking`.
///
/// # Errors
/// That of reading an edge block; then nothing was dropped.
pub fn punch(context: &WriteContext<'_>, blocking: &BlockGuard<'_>, offset: u64, length: u64) -> Result<Punched> {
    let block = context.space.block_bytes();
    let end = offset.saturating_add(length);
    let first_whole = offset.div_ceil(block).saturating_mul(block);
    let last_whole = if end == u64::MAX { end } else { end / block * block };
    let mut punched = Punched::default();
    let mut zero = |range: Range<u64>| -> Result<()> {
        // A block that starts behind the end of the file holds nothing. The one that the file ends in may, on disk: a size that
        // was cut durably before the zeroed block was written.
        if !range.is_empty() && range.start / block * block < context.end_of_file {
            punched.newly_dirty_blocks += zero_within_block(context, blocking, range)?.newly_dirty_blocks;
        }
        Ok(())
    };
    if first_whole > last_whole {
        // Inside one block.
        zero(offset..end)?;
        punched.interior = first_whole..first_whole;
        return Ok(punched);
    }
    zero(offset..first_whole)?;
    zero(last_whole..end)?;
    if first_whole < last_whole {
        punched.dropped = invalidate_range(context.space, blocking, first_whole..last_whole)?;
    }
    punched.interior = first_whole..last_whole;
    Ok(punched)
}

/// Cuts the pages off at `size`: zeroes the rest of the block that `size` lies in (if there is anything but zeros), drops all behind it.
/// The caller holds the inode's lock exclusively, gives the *old* size in `context.end_of_file`, and then commits the new size and removes the
/// extents of `interior`, still under `blocking`, which covers `size..u64::MAX`. Growing a file calls it too, with the old size for
/// `size`: so the rest of the old last block is zero before it becomes visible.
///
/// # Errors
/// That of reading the last block; then nothing was dropped.
pub fn truncate(context: &WriteContext<'_>, blocking: &BlockGuard<'_>, size: u64) -> Result<Punched> {
    punch(context, blocking, size, u64::MAX - size)
}
