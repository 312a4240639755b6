//! The page cache's source for one file: its extents, as the data layer reads them.

use std::ops::Range;

use crate::data::{BadRange, Data, ReadPiece};
use crate::pagecache::{PageSource, ReadaheadBatch};
use crate::sync::Arc;
use crate::units::InodeNumber;

pub(super) struct FileSource {
    pub inode: InodeNumber,
    pub data: Arc<Data>,
}

impl PageSource for FileSource {
    fn read_batch(&self, mut batch: ReadaheadBatch<'_>) {
        let mut entries = batch.take_entries();
        let mut outcomes: Vec<Option<Vec<BadRange>>> = entries.iter().map(|_| None).collect();
        let mut pieces: Vec<ReadPiece<'_>> =
            entries.iter_mut().map(|entry| ReadPiece { offset: entry.offset(), buffer: entry.destination() }).collect();
        self.data.read_detailed(self.inode, &mut pieces, &mut || batch.submitted(), &mut |index, bad| {
            if let Some(outcome) = outcomes.get_mut(index) {
                *outcome = Some(bad);
            }
        });
        drop(pieces);
        for (mut entry, outcome) in entries.into_iter().zip(outcomes) {
            // An entry without an outcome is dropped, not uptodate.
            let Some(mut bad) = outcome else { continue };
            if bad.is_empty() {
                entry.complete();
                continue;
            }
            bad.sort_by_key(|bad| bad.start);
            let start = entry.offset();
            let within = |offset: u64| u32::try_from(offset.saturating_sub(start)).unwrap_or(u32::MAX);
            let mut at = start;
            for BadRange { start: bad_start, end: bad_end, error } in bad {
                entry.filled(within(at)..within(bad_start));
                at = at.max(bad_end);
                entry.fail(error);
            }
            let end = entry.end();
            entry.filled(within(at)..within(end));
        }
    }

    fn widen(&self, range: Range<u64>) -> Range<u64> {
        self.data.widen(self.inode, range)
    }
}
