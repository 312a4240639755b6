//! The only place that puts folios into an address space or fills their blocks, and so the only one that takes **add**.
//!
//! A fill goes through these steps, and this order is what makes it safe beside punches and truncates:
//! 1. with nothing held: ask the source how far to widen; plan the folios; get their memory (evicting, waiting);
//! 2. take add, with no folio locked;
//! 3. insert the folios that are still missing, locked, in one step; what somebody else inserted meanwhile leaves the batch (a batch
//!    shrinks, it never waits for a folio while it holds add);
//! 4. hand the batch to the source: it looks the extents up, submits, and gives add back;
//! 5. each folio is unlocked when its bytes have landed.
//!
//! A puncher that takes block between 2 and 4 waits for add; one that takes it later finds the folios locked and waits for them. So
//! no bytes of an extent that was freed can enter the cache, and every fill ends before the extents under it change.
//!
//! Blocks of a folio that are not uptodate (their fill failed) are not filled in place: readers may look at the rest of it. They are
//! replaced by fresh folios.

use std::ops::Range;
use std::sync::Arc;

use smallvec::SmallVec;

use super::add_lock::BlockGuard;
use super::folio::{Folio, LockedFolio, Origin};
use super::source::{BatchError, FillEntry, FillPermit, PageSource, ReadaheadBatch};
use super::space::AddressSpace;
use crate::error::{Error, Result};
use crate::memory::{FolioBytes, FolioWriter, MemoryReservation};
use crate::sync::Mutex;

/// What a fill is asked for, in blocks.
#[derive(Clone, Debug, Default)]
pub(super) struct FillRequest {
    /// Somebody waits for these.
    pub(super) wanted: Range<u64>,
    /// These are guesses; they are left out when memory is short.
    pub(super) ahead: SmallVec<[Range<u64>; 4]>,
    /// The folio of this block starts the next window when it is read.
    pub(super) marker: Option<u64>,
    /// Nothing is read from this block on (end of file, rounded up).
    pub(super) end: u64,
}

/// `range` cut into naturally aligned powers of two of at most `blocks_max` blocks.
pub(super) fn aligned_pieces(range: Range<u64>, blocks_max: u32) -> impl Iterator<Item = (u64, u32)> {
    let most = u64::from(blocks_max.min(super::bitmap::BLOCKS_MAX));
    let mut at = range.start;
    std::iter::from_fn(move || {
        if at >= range.end {
            return None;
        }
        let alignment = if at == 0 { u64::MAX } else { 1 << at.trailing_zeros() };
        let length = 1_u64 << (range.end - at).ilog2();
        let blocks = alignment.min(length).min(most);
        let piece = (at, u32::try_from(blocks).unwrap_or(1));
        at += blocks;
        Some(piece)
    })
}

/// Sorts ranges and joins those that touch.
fn join(mut ranges: SmallVec<[Range<u64>; 4]>) -> SmallVec<[Range<u64>; 4]> {
    ranges.retain(|range| range.start < range.end);
    ranges.sort_by_key(|range| range.start);
    let mut joined: SmallVec<[Range<u64>; 4]> = SmallVec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

/// The pieces of `ranges` that no folio covers now.
fn missing_pieces(space: &AddressSpace, ranges: &[Range<u64>]) -> Vec<(u64, u32)> {
    let map = space.map().load();
    let mut pieces = Vec::new();
    for range in ranges {
        let mut at = range.start;
        while at < range.end {
            let next = map.at_or_after(at);
            let gap_end = next.map_or(range.end, |folio| folio.index().min(range.end));
            if at < gap_end {
                pieces.extend(aligned_pieces(at..gap_end, space.cache().folio_blocks_max()));
            }
            at = next.map_or(range.end, |folio| folio.end());
        }
    }
    pieces
}

fn bytes_of(space: &AddressSpace, pieces: &[(u64, u32)]) -> u64 {
    pieces.iter().map(|&(_, blocks)| u64::from(blocks) << space.block_shift()).sum()
}

/// Fills what is missing of a request. When it returns, the source has been through the batch; what it reported first is the inner error.
/// The blocks may still be missing: because of that error, or because somebody else has them locked.
///
/// Under block (`blocking`) it takes no add: the caller is the only one who changes extents.
pub(super) fn fill(
    space: &Arc<AddressSpace>,
    source: &Arc<dyn PageSource>,
    blocking: Option<&BlockGuard<'_>>,
    request: &FillRequest,
) -> Result<Option<Error>> {
    let widen = |range: &Range<u64>| {
        if blocking.is_some() {
            // The guard covers what its holder changes, and no more.
            return range.clone();
        }
        let bytes = source.widen(space.bytes_of(range));
        let blocks = space.blocks_of(&bytes);
        blocks.start.min(range.start)..blocks.end.max(range.end).min(request.end.max(range.end))
    };
    let wanted = join(SmallVec::from_iter((!request.wanted.is_empty()).then(|| widen(&request.wanted))));
    let mut all = wanted.clone();
    all.extend(
        request
            .ahead
            .iter()
            .map(|range| range.start..range.end.min(request.end))
            .filter(|r| !r.is_empty())
            .map(|r| widen(&r)),
    );
    let all = join(all);

    let cache = space.cache();
    let mut pieces = missing_pieces(space, &all);
    let mut memory = match cache.try_reserve_memory(bytes_of(space, &pieces)) {
        Some(memory) => memory,
        None if wanted.is_empty() => return Ok(None),
        None => {
            // Memory is short: no guesses, and no widening, since even one window may not fit.
            pieces = missing_pieces(space, std::slice::from_ref(&request.wanted));
            match blocking {
                Some(_) => cache.reserve_memory_under_block(bytes_of(space, &pieces)),
                None => cache.reserve_memory(bytes_of(space, &pieces))?,
            }
        }
    };
    let mut writers = Vec::with_capacity(pieces.len());
    for &(_, blocks) in &pieces {
        writers.push(FolioBytes::allocate(&mut memory, (blocks as usize) << space.block_shift())?);
    }
    drop(memory);
    let (Some(first), Some(last)) = (pieces.first(), pieces.last()) else { return Ok(None) };
    let range = space.bytes_of(&(first.0..last.0 + u64::from(last.1)));

    // Nobody waits for a guess, and a guess waits for nobody.
    let permit = if wanted.is_empty() && blocking.is_none() {
        match space.add_lock().try_add(range) {
            Some(guard) => FillPermit::Adding(guard),
            None => return Ok(None),
        }
    } else {
        permit(space, blocking, range)?
    };
    // Only now: a fill that still waits for add may wait for somebody who waits for memory.
    let _mark = cache.begin_fill();
    let is_wanted =
        |index: u64, blocks: u32| index < request.wanted.end && index + u64::from(blocks) > request.wanted.start;
    let folios: Vec<(LockedFolio, FolioWriter)> = pieces
        .iter()
        .zip(writers)
        .map(|(&(index, blocks), writer)| {
            let origin = if is_wanted(index, blocks) { Origin::Demand } else { Origin::Ahead };
            let folio = Folio::new_locked(space, index, blocks, Arc::clone(writer.bytes()), 0, origin).hand_to_fill();
            if request.marker.is_some_and(|marker| folio.folio().covers(marker)) {
                folio.folio().set_marker();
            }
            (folio, writer)
        })
        .collect();
    let inserted: Vec<bool> =
        space.map().update(|root| folios.iter().map(|(folio, _)| root.insert(Arc::clone(folio.folio()))).collect());
    let error = BatchError::new(Mutex::new(None));
    let entries: Vec<FillEntry> = folios
        .into_iter()
        .zip(inserted)
        .filter(|(_, inserted)| *inserted)
        .map(|((folio, writer), _)| FillEntry::new(folio, writer, Arc::clone(&error)))
        .collect();
    submit(space, source, permit, entries, &error, request.wanted.is_empty())
}

fn permit<'a>(
    space: &'a AddressSpace,
    blocking: Option<&'a BlockGuard<'a>>,
    range: Range<u64>,
) -> Result<FillPermit<'a>> {
    Ok(match blocking {
        Some(guard) => {
            debug_assert!(guard.covers(space.add_lock(), &range), "a fill under a block guard that does not cover it");
            FillPermit::Blocking(guard)
        }
        None => FillPermit::Adding(space.add_lock().add(range)?),
    })
}

fn submit(
    space: &Arc<AddressSpace>,
    source: &Arc<dyn PageSource>,
    permit: FillPermit<'_>,
    entries: Vec<FillEntry>,
    error: &BatchError,
    is_readahead: bool,
) -> Result<Option<Error>> {
    if entries.is_empty() {
        return Ok(None);
    }
    let metrics = space.cache().metrics();
    if is_readahead || entries.len() > 1 {
        metrics.pagecache_readahead_batches.increment();
        metrics.pagecache_readahead_folios.add(entries.len() as u64);
    }
    for entry in &entries {
        space.cache().enqueue(entry.folio());
    }
    let bytes = entries.iter().map(FillEntry::length).sum();
    let start = space.cache().env().monotonic();
    source.read_batch(ReadaheadBatch::new(permit, entries));
    space.cache().governor().observe(bytes, space.cache().env().monotonic().saturating_sub(start));
    Ok(error.lock().take())
}

/// Fills blocks of an existing folio that are not uptodate: those from `wanted.start` to the first that is, or to the end of
/// `wanted` or of the folio. They become fresh folios. Does nothing if the folio is locked or has changed meanwhile: the caller looks again.
pub(super) fn refill(
    space: &Arc<AddressSpace>,
    source: &Arc<dyn PageSource>,
    blocking: Option<&BlockGuard<'_>>,
    folio: &Arc<Folio>,
    wanted: Range<u64>,
) -> Result<Option<Error>> {
    let end = wanted.end.min(folio.end());
    let run = u64::from(folio.uptodate().run_of_clear(folio.relative(wanted.start), folio.relative(end)));
    let cut = wanted.start..wanted.start + run;
    if cut.is_empty() {
        return Ok(None);
    }
    let pieces: Vec<_> = aligned_pieces(cut.clone(), space.cache().folio_blocks_max()).collect();
    let mut memory = match blocking {
        Some(_) => space.cache().reserve_memory_under_block(bytes_of(space, &pieces)),
        None => space.cache().reserve_memory(bytes_of(space, &pieces))?,
    };
    let mut writers = Vec::with_capacity(pieces.len());
    for &(_, blocks) in &pieces {
        writers.push(FolioBytes::allocate(&mut memory, (blocks as usize) << space.block_shift())?);
    }
    drop(memory);

    let permit = permit(space, blocking, space.bytes_of(&cut))?;
    let _mark = space.cache().begin_fill();
    let Some(old) = folio.try_lock() else { return Ok(None) };
    let still_clear = folio.uptodate().run_of_clear(folio.relative(cut.start), folio.relative(cut.end));
    if folio.is_detached() || u64::from(still_clear) != run {
        return Ok(None);
    }
    let error = BatchError::new(Mutex::new(None));
    let entries: Vec<FillEntry> = pieces
        .iter()
        .zip(writers)
        .map(|(&(index, blocks), writer)| {
            let fresh =
                Folio::new_locked(space, index, blocks, Arc::clone(writer.bytes()), 0, Origin::Demand).hand_to_fill();
            FillEntry::new(fresh, writer, Arc::clone(&error))
        })
        .collect();
    let fresh: Vec<_> = entries.iter().map(|entry| Arc::clone(entry.folio())).collect();
    space.replace(old, cut, &fresh);
    submit(space, source, permit, entries, &error, false)
}

/// Inserts an empty folio for a writer, with add held only meanwhile: the largest aligned one from block `range.start` on inside
/// `range` that nothing covers. Returns it locked, with the right to its bytes (which are of an earlier life). Nothing if somebody was faster.
pub(super) fn insert_for_write(
    space: &Arc<AddressSpace>,
    range: Range<u64>,
    memory: &mut MemoryReservation,
) -> Result<Option<(LockedFolio, FolioWriter)>> {
    let gap_end = space.map().load().at_or_after(range.start).map_or(range.end, |next| next.index().min(range.end));
    let Some((index, blocks)) = aligned_pieces(range.start..gap_end, space.cache().folio_blocks_max()).next() else {
        return Ok(None);
    };
    let writer = FolioBytes::allocate(memory, (blocks as usize) << space.block_shift())?;
    let adding = space.add_lock().add(space.bytes_of(&(index..index + u64::from(blocks))))?;
    let folio = Folio::new_locked(space, index, blocks, Arc::clone(writer.bytes()), 0, Origin::Written);
    let inserted = space.map().update(|root| root.insert(Arc::clone(folio.folio())));
    drop(adding);
    if !inserted {
        return Ok(None);
    }
    space.cache().enqueue(folio.folio());
    Ok(Some((folio, writer)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_aligned_and_cover_the_range() {
        for start in 0..70_u64 {
            for end in start..600 {
                let mut at = start;
                for (index, blocks) in aligned_pieces(start..end, 64) {
                    assert_eq!(index, at);
                    assert!(blocks.is_power_of_two() && blocks <= 64 && index.is_multiple_of(u64::from(blocks)));
                    at += u64::from(blocks);
                }
                assert_eq!(at, end);
            }
        }
    }
}
