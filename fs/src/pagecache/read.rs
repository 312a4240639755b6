//! `read_iter`, the one read path.
//!
//! A **hit** takes one byte reference and no lock: the map is an atomic pointer, the uptodate bits are atomic, and the sink gets the
//! reference. A **miss** goes through [`super::insert`]; nothing is held while it waits.

use std::ops::Range;
use std::sync::Arc;

use super::add_lock::BlockGuard;
use super::collect::ReadSink;
use super::folio::Folio;
use super::insert::{self, FillRequest};
use super::readahead::{Access, Decision, Limits, Readahead};
use super::source::PageSource;
use super::space::AddressSpace;
use crate::error::{Error, Result};

/// The first readahead window in bytes.
const WINDOW_MIN_BYTES: u64 = 128 << 10;

/// What a read needs to know besides its range.
#[derive(Clone, Copy)]
pub struct ReadContext<'a> {
    /// The inode's pages.
    pub space: &'a Arc<AddressSpace>,
    /// Where missing bytes come from.
    pub source: &'a Arc<dyn PageSource>,
    /// The open file's readahead state; without it only what is wanted is read.
    pub readahead: Option<&'a Readahead>,
    /// Size of the file in bytes, as the caller sampled it: no readahead passes its block.
    pub end_of_file: u64,
}

impl std::fmt::Debug for ReadContext<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ReadContext")
            .field("space", &self.space.identity())
            .field("end_of_file", &self.end_of_file)
            .finish()
    }
}

/// What a read achieved: `bytes` went to the sink, and if that is less than was asked for, `error` says why.
#[derive(Debug)]
#[must_use]
pub struct ReadOutcome {
    /// Bytes given to the sink.
    pub bytes: u64,
    /// Why it stopped early: the error of the first block that could not be read.
    pub error: Option<Error>,
}

impl ReadOutcome {
    /// All or nothing: the error, if there was one.
    ///
    /// # Errors
    /// The error of the first block that could not be read.
    pub fn into_result(self) -> Result<u64> {
        self.error.map_or(Ok(self.bytes), Err)
    }
}

/// Gives the bytes `offset..offset + length` of the file to `sink`, in order. The caller has clipped the range to the file's size: what
/// lies behind is not this function's business. Takes no lock for what is in the cache; holds none while it waits for the rest.
pub fn read_iter(context: &ReadContext<'_>, offset: u64, length: u64, sink: &mut dyn ReadSink) -> ReadOutcome {
    let space = context.space;
    let end = offset.saturating_add(length);
    let mut at = offset;
    let mut retry = Retry::default();
    while at < end {
        match read_hit(context, at, end) {
            Hit::Bytes { reference, marker } => {
                space.cache().metrics().pagecache_hits.increment();
                at += reference.len() as u64;
                sink.accept(reference);
                if let Some(block) = marker {
                    read_ahead(context, block);
                }
            }
            Hit::Miss(folio) => {
                space.cache().metrics().pagecache_misses.increment();
                let blocks = space.blocks_of(&(at..end));
                if let Err(error) = resolve_miss(context, None, blocks, folio.as_ref(), &mut retry) {
                    return ReadOutcome { bytes: at - offset, error: Some(error) };
                }
            }
        }
    }
    ReadOutcome { bytes: at - offset, error: None }
}

enum Hit {
    Bytes { reference: crate::memory::ByteReference, marker: Option<u64> },
    Miss(Option<Arc<Folio>>),
}

fn read_hit(context: &ReadContext<'_>, at: u64, end: u64) -> Hit {
    let space = context.space;
    let index = at >> space.block_shift();
    let map = space.map().load();
    let Some(folio) = map.get(index) else { return Hit::Miss(None) };
    let first = folio.relative(index);
    let last = folio.relative((end.div_ceil(space.block_bytes())).min(folio.end()));
    let run = folio.uptodate().run_of_set(first, last);
    if run == 0 {
        return Hit::Miss(Some(Arc::clone(folio)));
    }
    let run_end = (index + u64::from(run)) << space.block_shift();
    let range = at..end.min(run_end);
    let reference = folio.reference(&range);
    if folio.touch(&range) {
        space.cache().metrics().pagecache_readahead_used.increment();
    }
    Hit::Bytes { reference, marker: folio.take_marker().then_some(index) }
}

/// What was tried for a block that stays not uptodate.
#[derive(Debug, Default)]
pub(super) struct Retry {
    /// The block of the last attempt, and whether it was a batch (or somebody else's fill) rather than this block alone.
    after_batch: Option<u64>,
}

/// Does one thing about a miss at `wanted.start`: waits for whoever has the folio locked, or fills. The caller looks again. After a
/// fill that left the block missing, it is read once more, alone, and then its error is returned.
pub(super) fn resolve_miss(
    context: &ReadContext<'_>,
    blocking: Option<&BlockGuard<'_>>,
    wanted: Range<u64>,
    folio: Option<&Arc<Folio>>,
    retry: &mut Retry,
) -> Result<()> {
    let space = context.space;
    let block = wanted.start;
    let alone = retry.after_batch == Some(block);
    if let Some(folio) = folio
        && folio.is_locked()
    {
        retry.after_batch = Some(block);
        return folio.wait_unlocked(space.cache().env(), space);
    }
    let wanted = block..if alone { block + 1 } else { wanted.end.min(block + space.cache().step_blocks_max()) };
    let error = match folio {
        Some(folio) if folio.is_detached() => None,
        Some(folio) => insert::refill(space, context.source, blocking, folio, wanted)?,
        None => {
            let mut request = FillRequest {
                wanted: wanted.clone(),
                end: end_block(context).max(wanted.end),
                ..FillRequest::default()
            };
            if !alone && let Some(readahead) = context.readahead {
                let decision = readahead.decide(&Access::Miss(wanted), &limits(context));
                request.ahead = decision.ranges;
                request.marker = decision.marker;
            }
            insert::fill(space, context.source, blocking, &request)?
        }
    };
    match error {
        Some(error) if alone => Err(error),
        _ => {
            retry.after_batch = Some(block);
            Ok(())
        }
    }
}

fn end_block(context: &ReadContext<'_>) -> u64 {
    context.end_of_file.div_ceil(context.space.block_bytes())
}

fn limits(context: &ReadContext<'_>) -> Limits {
    let cache = context.space.cache();
    let window_max = cache.readahead_window_blocks();
    Limits {
        window_min: (WINDOW_MIN_BYTES / cache.block_bytes()).clamp(1, window_max),
        window_max,
        alignment: u64::from(cache.folio_blocks_max()),
        end: end_block(context),
    }
}

/// Starts the window after the one that `block` marks.
fn read_ahead(context: &ReadContext<'_>, block: u64) {
    let Some(readahead) = context.readahead else { return };
    let Decision { ranges, marker } = readahead.decide(&Access::Marker(block), &limits(context));
    if ranges.is_empty() {
        return;
    }
    let request = FillRequest { wanted: 0..0, ahead: ranges, marker, end: end_block(context) };
    let (space, source) = (Arc::clone(context.space), Arc::clone(context.source));
    let work = move || {
        // A guess that fails costs nothing: whoever needs the bytes reads them again and reports the error.
        if let Err(error) = insert::fill(&space, &source, None, &request) {
            tracing::debug!(%error, "readahead gave up");
        }
    };
    context.space.cache().spawn(work);
}
