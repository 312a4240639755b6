//! Buffered writes.
//!
//! For each step (at most one folio's worth of bytes): get a dirty quota (this is where a writer is throttled), read the blocks that
//! are only partly written, get memory; all that with nothing held. Then, folio by folio: a hit locks the folio, rechecks that it is attached,
//! and changes its bytes; a gap takes add just long enough to insert an empty folio. A partly written block that is missing (it was
//! evicted meanwhile) drops the lock and starts over.
//!
//! Bytes that somebody looks at are not changed: the blocks become a fresh folio, the rest of the old one stays ([`AddressSpace::replace`]).
//! A block is marked dirty *after* its bytes are in place, under the folio's lock: writeback, which takes no folio lock, can then never
//! miss bytes.

use std::ops::Range;
use std::sync::Arc;

use smallvec::SmallVec;

use super::add_lock::BlockGuard;
use super::cache::DirtyQuota;
use super::folio::{Folio, LockedFolio, Origin};
use super::insert;
use super::read::{ReadContext, Retry, resolve_miss};
use super::source::PageSource;
use super::space::AddressSpace;
use super::writeback::mark_dirty;
use crate::error::{Error, Result};
use crate::memory::{ByteReference, FolioBytes, MemoryReservation};

/// What a write needs to know besides its bytes.
#[derive(Clone, Copy)]
pub struct WriteContext<'a> {
    /// The inode's pages.
    pub space: &'a Arc<AddressSpace>,
    /// Where the rest of a partly written block comes from.
    pub source: &'a Arc<dyn PageSource>,
    /// Size of the file in bytes. Blocks that start at or behind it hold nothing: they are not read, their rest is zero.
    pub end_of_file: u64,
    /// What each block that becomes dirty takes of the caller's reservation. The caller reserves for every block that the write
    /// touches, and gets back what was dirty already (its own count of `newly_dirty_blocks` tells).
    pub units_per_block: u32,
    /// Called with the offset behind the bytes that are in place, *before* they become dirty: where the caller raises the file's
    /// size. So a dirty block never lies behind the size, and the size never covers bytes that are not there. A folio is locked meanwhile:
    /// it may set an atomic, and nothing more.
    pub placed: &'a dyn Fn(u64),
}

impl std::fmt::Debug for WriteContext<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WriteContext")
            .field("space", &self.space.identity())
            .field("end_of_file", &self.end_of_file)
            .finish()
    }
}

/// What a write achieved.
#[derive(Debug, Default)]
#[must_use]
pub struct WriteOutcome {
    /// Bytes in the cache, dirty.
    pub bytes: u64,
    /// Blocks that became dirty: each took `units_per_block` of the reservation.
    pub newly_dirty_blocks: u64,
    /// Why it stopped early.
    pub error: Option<Error>,
}

/// What is written.
#[derive(Clone, Copy, Debug)]
enum Content<'a> {
    /// These bytes; the first one is for this offset of the file.
    Bytes(u64, &'a [u8]),
    Zeros,
}

impl Content<'_> {
    fn put(&self, range: &Range<u64>, destination: &mut [u8]) {
        match self {
            Self::Zeros => destination.fill(0),
            Self::Bytes(start, bytes) => {
                let at = |offset: u64| usize::try_from(offset - start).unwrap_or(usize::MAX);
                if let Some(bytes) = bytes.get(at(range.start)..at(range.end))
                    && bytes.len() == destination.len()
                {
                    destination.copy_from_slice(bytes);
                }
            }
        }
    }
}

/// Writes `data` at `offset` into the cache. `data` is private memory of the daemon (user memory is copied in before). The caller holds the
/// inode's lock as the table in [`super`] says, has reserved space for every block that is touched, and holds no lock of the cache.
///
/// After a crash the file's last block may hold garbage behind the end of the file. A write that leaves a gap zeroes it, and so may make that
/// one more block dirty.
pub fn write(context: &WriteContext<'_>, offset: u64, data: &[u8]) -> WriteOutcome {
    let mut outcome = WriteOutcome::default();
    let step_bytes = context.space.cache().step_blocks_max() << context.space.block_shift();
    let end = offset.saturating_add(data.len() as u64);
    // A write behind the end of the file makes the rest of the old last block visible. It is zero in the cache, but perhaps not on disk.
    let file_end = context.end_of_file;
    let block_end = file_end.div_ceil(context.space.block_bytes()).saturating_mul(context.space.block_bytes());
    if offset > file_end && file_end < block_end {
        match zero_unless_zero(context, None, file_end..block_end.min(offset)) {
            Ok(newly) => outcome.newly_dirty_blocks += newly,
            Err(error) => return WriteOutcome { error: Some(error), ..outcome },
        }
    }
    let mut at = offset;
    while at < end {
        // Steps end where a folio of the largest size would: long writes get the largest folios.
        let step_end = (at / step_bytes + 1).saturating_mul(step_bytes).min(end);
        let result =
            write_step(context, None, at..step_end, Content::Bytes(offset, data), &mut outcome.newly_dirty_blocks);
        match result {
            Ok(()) => at = step_end,
            Err(error) => {
                outcome.error = Some(error);
                break;
            }
        }
    }
    outcome.bytes = at - offset;
    outcome
}

/// Zeroes the bytes of `range`, which lies in one block, under block: the edge of a punch, the tail of the end of file. Blocks that hold
/// zeros there already are not made dirty. `placed` is not called.
///
/// # Errors
/// That of reading the block, or of a throttle after a latch. Then nothing has changed.
pub fn zero_within_block(
    context: &WriteContext<'_>,
    blocking: &BlockGuard<'_>,
    range: Range<u64>,
) -> Result<WriteOutcome> {
    let space = context.space;
    debug_assert!(blocking.covers(space.add_lock(), &range), "zeroing outside of the blocked range");
    let blocks = space.blocks_of(&range);
    if blocks.is_empty() {
        return Ok(WriteOutcome::default());
    }
    if blocks.end - blocks.start > 1 {
        return Err(Error::Bug(format!("zeroing bytes {}..{} as one block", range.start, range.end)));
    }
    let newly_dirty_blocks = zero_unless_zero(context, Some(blocking), range.clone())?;
    Ok(WriteOutcome { bytes: range.end - range.start, newly_dirty_blocks, error: None })
}

/// Zeroes the bytes of `range`, which lies in one block, unless they are zero. Returns how many blocks became dirty.
fn zero_unless_zero(context: &WriteContext<'_>, blocking: Option<&BlockGuard<'_>>, range: Range<u64>) -> Result<u64> {
    let space = context.space;
    let blocks = space.blocks_of(&range);
    let mut retry = Retry::default();
    let is_zero = loop {
        let map = space.map().load_full();
        match map.get(blocks.start) {
            Some(folio) if folio.is_uptodate(blocks.start) => {
                break folio.reference(&range).iter().all(|&byte| byte == 0);
            }
            folio => resolve_miss(&read_context(context), blocking, blocks.clone(), folio, &mut retry)?,
        }
    };
    let mut newly = 0;
    if !is_zero {
        write_step(context, blocking, range, Content::Zeros, &mut newly)?;
    }
    Ok(newly)
}

fn read_context<'a>(context: &WriteContext<'a>) -> ReadContext<'a> {
    ReadContext { space: context.space, source: context.source, readahead: None, end_of_file: context.end_of_file }
}

/// What stops a pass over a step's folios.
enum Pass {
    Done,
    /// The block must be read first.
    Needs(u64),
}

fn write_step(
    context: &WriteContext<'_>,
    blocking: Option<&BlockGuard<'_>>,
    range: Range<u64>,
    content: Content<'_>,
    newly: &mut u64,
) -> Result<()> {
    let space = context.space;
    let cache = space.cache();
    let blocks = space.blocks_of(&range);
    let mut quota = match blocking {
        None => cache.reserve_dirty(blocks.end - blocks.start)?,
        Some(_) => cache.overdraw_dirty(blocks.end - blocks.start),
    };
    let mut retry = Retry::default();
    let mut at = range.start;
    loop {
        // Pinned until their folio is locked: else getting memory for the rest could evict them, for ever where memory is short.
        let mut pins = Pins::new();
        for edge in [blocks.start, blocks.end - 1] {
            if is_partial(space, edge, &range) {
                pins.extend(make_uptodate(context, blocking, edge, &mut retry)?.map(|pin| (edge, pin)));
            }
        }
        let bytes = (blocks.end - blocks.start) << space.block_shift();
        let mut memory = match blocking {
            Some(_) => cache.reserve_memory_under_block(bytes),
            None => cache.reserve_memory(bytes)?,
        };
        let pass = write_pass(
            context,
            blocking.is_some(),
            &range,
            &mut at,
            content,
            &mut pins,
            &mut memory,
            &mut quota,
            newly,
        )?;
        drop((pins, memory));
        match pass {
            Pass::Done => return Ok(()),
            Pass::Needs(block) => {
                make_uptodate(context, blocking, block, &mut retry)?;
            }
        }
    }
}

/// Blocks that must not be evicted, and what keeps them: a reference to their bytes.
type Pins = SmallVec<[(u64, ByteReference); 2]>;

/// Whether `range` covers only a part of `block`.
fn is_partial(space: &AddressSpace, block: u64, range: &Range<u64>) -> bool {
    let bytes = space.bytes_of(&(block..block + 1));
    bytes.start < range.start || bytes.end > range.end
}

/// Whether the rest of `block` must be known before a part of it is written. (It need not if it lies behind the end of the file.)
fn needs_rest(context: &WriteContext<'_>, block: u64, range: &Range<u64>) -> bool {
    is_partial(context.space, block, range) && block << context.space.block_shift() < context.end_of_file
}

/// Reads `block` into the cache unless it is there, and pins it; nothing if it lies behind the end of the file.
fn make_uptodate(
    context: &WriteContext<'_>,
    blocking: Option<&BlockGuard<'_>>,
    block: u64,
    retry: &mut Retry,
) -> Result<Option<ByteReference>> {
    let space = context.space;
    if block << space.block_shift() >= context.end_of_file {
        return Ok(None);
    }
    loop {
        let map = space.map().load_full();
        match map.get(block) {
            Some(folio) if folio.is_uptodate(block) => {
                return Ok(Some(folio.reference(&space.bytes_of(&(block..block + 1)))));
            }
            folio => resolve_miss(&read_context(context), blocking, block..block + 1, folio, retry)?,
        }
    }
}

fn write_pass(
    context: &WriteContext<'_>,
    is_blocking: bool,
    range: &Range<u64>,
    at: &mut u64,
    content: Content<'_>,
    pins: &mut Pins,
    memory: &mut MemoryReservation,
    quota: &mut DirtyQuota<'_>,
    newly: &mut u64,
) -> Result<Pass> {
    let space = context.space;
    while *at < range.end {
        let index = *at >> space.block_shift();
        let found = space.map().load().get(index).cloned();
        let locked = if let Some(folio) = found {
            let locked = folio.lock(space.cache().env(), space)?;
            if folio.is_detached() {
                continue;
            }
            locked
        } else {
            if is_blocking {
                // Under block nothing is inserted but by a fill.
                return Ok(Pass::Needs(index));
            }
            if needs_rest(context, index, range) {
                return Ok(Pass::Needs(index));
            }
            // A last block that needs its rest is not part of the gap.
            let blocks = space.blocks_of(&(*at..range.end));
            let last = blocks.end - 1;
            let gap = index..if last > index && needs_rest(context, last, range) { last } else { blocks.end };
            match insert::insert_for_write(space, gap, memory)? {
                Some((locked, writer)) => {
                    drop(writer);
                    locked
                }
                None => continue,
            }
        };
        // Locked, nobody evicts it. A pin of ours would only keep it from being changed in place.
        pins.retain(|(block, _)| !locked.folio().covers(*block));
        let piece = *at..range.end.min(space.bytes_of(&(0..locked.folio().end())).end);
        if let Some(block) = missing_rest(context, locked.folio(), &piece, range) {
            drop(locked);
            return Ok(Pass::Needs(block));
        }
        *at = piece.end;
        *newly += modify(context, locked, &piece, content, memory, quota)?;
    }
    Ok(Pass::Done)
}

/// A block of `piece` that is written in part, is not uptodate, and whose rest matters.
fn missing_rest(context: &WriteContext<'_>, folio: &Folio, piece: &Range<u64>, range: &Range<u64>) -> Option<u64> {
    let blocks = context.space.blocks_of(piece);
    [blocks.start, blocks.end - 1]
        .into_iter()
        .find(|&block| needs_rest(context, block, range) && !folio.is_uptodate(block))
}

/// Changes the bytes of `piece` (inside the locked folio) and marks its blocks dirty. Blocks that are not uptodate become so: what
/// `piece` does not cover of them is zero. Returns how many blocks became dirty.
fn modify(
    context: &WriteContext<'_>,
    locked: LockedFolio,
    piece: &Range<u64>,
    content: Content<'_>,
    memory: &mut MemoryReservation,
    quota: &mut DirtyQuota<'_>,
) -> Result<u64> {
    let space = context.space;
    let blocks = space.blocks_of(piece);
    let touched = space.bytes_of(&blocks);
    let folio = Arc::clone(locked.folio());
    let finish = |quota: &mut DirtyQuota<'_>| {
        if matches!(content, Content::Bytes(..)) {
            (context.placed)(piece.end);
        }
        mark_dirty(space, blocks.clone(), context.units_per_block, quota)
    };
    if let Some(mut writer) = folio.try_write(&touched) {
        put(&folio, space, &touched, piece, content, &mut writer, false);
        drop(writer);
        folio.set_uptodate(blocks.clone());
        return Ok(finish(quota));
    }
    // Somebody looks at these bytes: they stay as they are, and the blocks get new memory.
    let mut fresh = Vec::new();
    for (index, count) in insert::aligned_pieces(blocks.clone(), space.cache().folio_blocks_max()) {
        let mut writer = FolioBytes::allocate(memory, (count as usize) << space.block_shift())?;
        let part_blocks = index..index + u64::from(count);
        let part = space.bytes_of(&part_blocks);
        let covered = piece.start.max(part.start)..piece.end.min(part.end);
        put(&folio, space, &part, &covered, content, &mut writer, true);
        let bytes = Arc::clone(writer.bytes());
        drop(writer);
        let new = Folio::new_locked(space, index, count, bytes, 0, Origin::Part { hot: folio.is_hot() });
        new.folio().set_uptodate(part_blocks);
        fresh.push(new);
    }
    let folios: Vec<_> = fresh.iter().map(|new| Arc::clone(new.folio())).collect();
    space.replace(locked, blocks.clone(), &folios);
    // `fresh` is still locked, so that nothing evicts it before it is dirty.
    let newly = finish(quota);
    drop(fresh);
    Ok(newly)
}

/// Puts content into `destination`, which holds the bytes of `part` (whole blocks): the bytes of `covered`, and around it what the
/// blocks held (zeros if they are not uptodate). `copy_rest`: the destination is new memory.
fn put(
    folio: &Folio,
    space: &AddressSpace,
    part: &Range<u64>,
    covered: &Range<u64>,
    content: Content<'_>,
    destination: &mut [u8],
    copy_rest: bool,
) {
    let at = |offset: u64| usize::try_from(offset - part.start).unwrap_or(usize::MAX);
    for rest in [part.start..covered.start, covered.end..part.end] {
        if rest.is_empty() {
            continue;
        }
        let Some(target) = destination.get_mut(at(rest.start)..at(rest.end)) else { continue };
        if !folio.is_uptodate(rest.start >> space.block_shift()) {
            target.fill(0);
        } else if copy_rest {
            target.copy_from_slice(&folio.reference(&rest));
        }
    }
    if let Some(target) = destination.get_mut(at(covered.start)..at(covered.end)) {
        content.put(covered, target);
    }
}
