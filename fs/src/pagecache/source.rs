//! Where the bytes come from: [`PageSource`], and the batch it is given.
//!
//! **"Unlocked exactly once", by type.** A [`FillEntry`] owns the lock of a new folio and the writer's right to its bytes. Whatever
//! happens to it (completed, partly filled, failed, dropped by an early return or a panic) its `Drop` publishes which blocks are
//! uptodate and unlocks the folio, once.

use std::ops::Range;
use std::sync::Arc;

use super::add_lock::{AddGuard, BlockGuard};
use super::folio::{Folio, LockedFolio};
use crate::error::{Error, Result};
use crate::memory::FolioWriter;
use crate::sync::Mutex;

/// What stands behind an address space: extents, in production. One object for each inode.
pub trait PageSource: Send + Sync {
    /// Fills the entries of a batch: walks the extents with one cursor, submits all device reads together, completes entries as they
    /// land. Called under add (or block), with the folios of the entries locked and nothing else.
    ///
    /// The source calls [`ReadaheadBatch::submitted`] when it has looked the extents up and holds what keeps their blocks from
    /// being reused; from then on the entries' folio locks alone hold truncates and punches off. Every byte of a completed entry must have
    /// been written: zeros for holes, for unwritten extents, and beyond what is on disk. An entry that is dropped unfilled unlocks its
    /// folio not-uptodate. Errors are reported for each entry ([`FillEntry::fail`]). Takes no inode lock, no add, no block.
    fn read_batch(&self, batch: ReadaheadBatch<'_>);

    /// The range of file bytes to read when `range` is wanted: widened to the compressed frames that it cuts, so that none is
    /// decoded twice. Advice only; called with no lock held.
    fn widen(&self, range: Range<u64>) -> Range<u64> {
        range
    }
}

/// Why a fill may run: nobody changes what extents mean, because **add** is held, or because we are the one who holds **block**.
#[derive(Debug)]
pub(super) enum FillPermit<'a> {
    Adding(AddGuard<'a>),
    Blocking(&'a BlockGuard<'a>),
}

/// One batch of fills: entries in ascending order of offset, not overlapping, not necessarily adjacent.
#[derive(Debug)]
pub struct ReadaheadBatch<'a> {
    permit: Option<FillPermit<'a>>,
    entries: Vec<FillEntry>,
}

impl<'a> ReadaheadBatch<'a> {
    pub(super) fn new(permit: FillPermit<'a>, entries: Vec<FillEntry>) -> Self {
        Self { permit: Some(permit), entries }
    }

    /// The file bytes from the first entry's start to the last one's end.
    #[must_use]
    pub fn range(&self) -> Range<u64> {
        match (self.entries.first(), self.entries.last()) {
            (Some(first), Some(last)) => first.offset()..last.end(),
            _ => 0..0,
        }
    }

    /// The entries, to read their destinations into place.
    pub fn entries_mut(&mut self) -> &mut [FillEntry] {
        &mut self.entries
    }

    /// The entries by value, for a source that completes them one by one or on other threads. The batch keeps the add lock
    /// until [`Self::submitted`] or its end.
    #[must_use]
    pub fn take_entries(&mut self) -> Vec<FillEntry> {
        std::mem::take(&mut self.entries)
    }

    /// The extents are looked up and their blocks are held: gives add back. Nothing may be looked up for this batch afterwards.
    pub fn submitted(&mut self) {
        self.permit = None;
    }

    /// The bytes that may be looked up: those for which add (or block) is held. Nothing after [`Self::submitted`].
    #[must_use]
    pub fn may_look_up(&self) -> Range<u64> {
        match &self.permit {
            Some(FillPermit::Adding(guard)) => guard.range().clone(),
            Some(FillPermit::Blocking(guard)) => guard.range().clone(),
            None => 0..0,
        }
    }

    /// Completes all entries that are left as wholly filled.
    pub fn complete_all(mut self) {
        for entry in self.take_entries() {
            entry.complete();
        }
    }
}

/// The first error of a batch, shared by its entries.
pub(super) type BatchError = Arc<Mutex<Option<Error>>>;

/// One locked folio that waits for its bytes.
#[derive(Debug)]
pub struct FillEntry {
    folio: LockedFolio,
    writer: Option<FolioWriter>,
    filled: Vec<Range<u32>>,
    error: BatchError,
}

impl FillEntry {
    pub(super) fn new(folio: LockedFolio, writer: FolioWriter, error: BatchError) -> Self {
        Self { folio, writer: Some(writer), filled: Vec::new(), error }
    }

    pub(super) fn folio(&self) -> &Arc<Folio> {
        self.folio.folio()
    }

    /// Offset in the file, in bytes; a multiple of the cache's block size.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.folio.folio().start()
    }

    /// Length in bytes: a power of two of blocks.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.folio.folio().length()
    }

    /// Offset of the first byte after it.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.offset() + self.length()
    }

    /// The folio's own memory, aligned to 4096 bytes: a device may read into it directly, a decoder may write into it.
    pub fn destination(&mut self) -> &mut [u8] {
        match &mut self.writer {
            Some(writer) => writer,
            None => &mut [],
        }
    }

    /// The whole entry is filled. Unlocks the folio, uptodate.
    pub fn complete(mut self) {
        let length = u32::try_from(self.length()).unwrap_or(u32::MAX);
        self.filled.push(0..length);
    }

    /// The bytes of `range` (counted from the entry's start) are filled. Blocks that end up wholly filled become uptodate when the
    /// entry is dropped; the others stay as they are. For a folio of which one block is bad.
    pub fn filled(&mut self, range: Range<u32>) {
        if !range.is_empty() {
            self.filled.push(range);
        }
    }

    /// Reports an error of this entry. Blocks that were [`Self::filled`] still become uptodate when it is dropped. The first error of a
    /// batch of one is what the reader gets.
    pub fn fail(&mut self, error: Error) {
        let mut first = self.error.lock();
        if first.is_none() {
            *first = Some(error);
        }
    }

    /// Ends the entry by a result: filled wholly, or failed wholly.
    pub fn finish(mut self, result: Result<()>) {
        match result {
            Ok(()) => self.complete(),
            Err(error) => self.fail(error),
        }
    }
}

impl Drop for FillEntry {
    fn drop(&mut self) {
        // The writer leaves before the blocks become uptodate, so that a reader that sees them uptodate never waits.
        drop(self.writer.take());
        self.filled.sort_by_key(|range| range.start);
        let folio = self.folio.folio();
        let mut covered: Option<Range<u32>> = None;
        for range in self.filled.drain(..) {
            match &mut covered {
                Some(run) if range.start <= run.end => run.end = run.end.max(range.end),
                _ => {
                    if let Some(run) = covered.replace(range) {
                        folio.set_uptodate_bytes(run);
                    }
                }
            }
        }
        if let Some(run) = covered {
            folio.set_uptodate_bytes(run);
        }
        // `self.folio` unlocks when it is dropped, after this.
    }
}
