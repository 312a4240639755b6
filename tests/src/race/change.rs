//! What the thread that changes a racing file does: which change, and what it leaves of the file.

use std::ops::Range;

use super::history::{Content, RacingFile, ZEROS, stamp};
use super::{Actor, BLOCK, BLOCKS};

/// One change of a racing file. Ranges are of blocks, inside the file where the change needs that.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// Of whole blocks, each with its stamp.
    Write { range: Range<u64>, direct: bool },
    /// The size stays.
    Punch(Range<u64>),
    /// Zeros whose space is held.
    Zero { range: Range<u64>, keeps_size: bool },
    /// Holds space.
    Allocate { range: Range<u64>, keeps_size: bool },
    /// To this many bytes.
    Truncate(u64),
    /// Ends before the end of the file.
    Collapse(Range<u64>),
    /// Begins before the end of the file.
    Insert(Range<u64>),
}

impl Change {
    /// Kinds of changes, for counters.
    pub(super) const KINDS: [&str; 8] =
        ["write", "direct write", "punch", "zero", "allocate", "truncate", "collapse", "insert"];

    /// Which of [`Self::KINDS`] this is.
    pub(super) fn kind(&self) -> usize {
        match self {
            Self::Write { direct: false, .. } => 0,
            Self::Write { direct: true, .. } => 1,
            Self::Punch(_) => 2,
            Self::Zero { .. } => 3,
            Self::Allocate { .. } => 4,
            Self::Truncate(_) => 5,
            Self::Collapse(_) => 6,
            Self::Insert(_) => 7,
        }
    }

    /// A change of a file that is `size` bytes long; none where the one that was thrown cannot be.
    pub(super) fn pick(actor: &mut Actor<'_>, size: u64) -> Option<Self> {
        let (first, count) = (actor.below(BLOCKS), 1 + actor.below(8));
        let range = first..(first + count).min(BLOCKS);
        let count = range.end - range.start;
        let change = match actor.below(12) {
            0..=3 => {
                let appends = actor.below(3) == 0;
                let end = size.div_ceil(BLOCK);
                let range = if appends { end..(end + count).min(BLOCKS) } else { range };
                Self::Write { range, direct: actor.below(3) == 0 }
            }
            4..=6 if actor.below(3) > 0 => Self::Punch(range),
            4..=6 => Self::Zero { range, keeps_size: actor.below(3) > 0 },
            7 | 8 => Self::Truncate(match actor.below(3) {
                0 => actor.below(BLOCKS * BLOCK),
                1 => actor.below(BLOCKS) * BLOCK,
                _ => size.saturating_sub(actor.below(3 * BLOCK)),
            }),
            9 => Self::Allocate { range, keeps_size: actor.below(2) == 0 },
            10 => Self::Collapse(range),
            _ => Self::Insert(range),
        };
        let is_allowed = match &change {
            Self::Write { range, .. } => !range.is_empty(),
            Self::Collapse(range) => range.end * BLOCK < size,
            Self::Insert(range) => range.start * BLOCK < size && size + count * BLOCK <= BLOCKS * BLOCK,
            _ => true,
        };
        is_allowed.then_some(change)
    }

    /// Notes what this will leave, and begins it. Returns its number, and the bytes of a write.
    pub(super) fn begin(&self, file: &RacingFile) -> (u64, Vec<u8>) {
        let operation = file.next_operation();
        let (size, changes) = self.leaves(file, operation);
        let data = match self {
            Self::Write { range, .. } => range.clone().flat_map(|block| stamp(file.number, block, operation)).collect(),
            _ => Vec::new(),
        };
        let what = format!("{self:?} of file {} of {} bytes", file.number, file.size());
        (file.begin(what, size, &changes), data)
    }

    /// The size in bytes, and the blocks that become different.
    fn leaves(&self, file: &RacingFile, operation: u64) -> (u64, Vec<(u64, Content)>) {
        let size = file.size();
        let zeroed = |range: &Range<u64>| range.clone().map(|block| (block, ZEROS)).collect();
        let grown = |range: &Range<u64>, keeps_size: bool| if keeps_size { size } else { size.max(range.end * BLOCK) };
        let bytes = |range: &Range<u64>| (range.end - range.start) * BLOCK;
        match self {
            Self::Write { range, .. } => {
                let written = |block| (block, Content { operation, block, bytes: BLOCK as usize });
                (grown(range, false), range.clone().map(written).collect())
            }
            Self::Punch(range) => (size, zeroed(range)),
            Self::Zero { range, keeps_size } => (grown(range, *keeps_size), zeroed(range)),
            Self::Allocate { range, keeps_size } => (grown(range, *keeps_size), Vec::new()),
            Self::Truncate(new) => {
                let cut = |block: u64| {
                    let kept = if block == new / BLOCK { (new % BLOCK) as usize } else { 0 };
                    let content = file.content(block);
                    let bytes = content.bytes.min(kept);
                    (block, if bytes == 0 { ZEROS } else { Content { bytes, ..content } })
                };
                (*new, (new / BLOCK..BLOCKS).map(cut).collect())
            }
            Self::Collapse(range) => {
                let moved = |block| (block, file.content(block + range.end - range.start));
                (size - bytes(range), (range.start..BLOCKS).map(moved).collect())
            }
            Self::Insert(range) => {
                let from = |block: u64| block.checked_sub(range.end - range.start).filter(|&from| from >= range.start);
                let moved = |block| (block, from(block).map_or(ZEROS, |from| file.content(from)));
                (size + bytes(range), (range.start..BLOCKS).map(moved).collect())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every change against the same on an array of bytes.
    #[test]
    fn what_a_change_leaves_is_what_an_array_has() {
        let stage = super::super::Stage::new();
        let mut actor = Actor::new(&stage, 0, 1);
        let file = RacingFile::new(5);
        let mut array: Vec<u8> = Vec::new();
        let mut seen = [0; Change::KINDS.len()];
        for _ in 0..3000 {
            let Some(change) = Change::pick(&mut actor, file.size()) else { continue };
            seen[change.kind()] += 1;
            let (operation, data) = change.begin(&file);
            apply(&change, &data, &mut array);
            file.end(operation);
            let shown = super::super::history::Shown {
                offset: 0,
                wanted: BLOCKS * BLOCK,
                bytes: &array,
                from: operation,
                to: operation,
                source: super::super::history::Source::Filesystem,
            };
            file.check(&shown).unwrap_or_else(|wrong| panic!("{change:?}: {wrong}"));
        }
        assert!(seen.iter().all(|&count| count > 20), "{seen:?}");
    }

    fn apply(change: &Change, data: &[u8], array: &mut Vec<u8>) {
        let bytes = |range: &Range<u64>| (range.start * BLOCK) as usize..(range.end * BLOCK) as usize;
        let grow = |array: &mut Vec<u8>, end: usize| array.resize(array.len().max(end), 0);
        match change {
            Change::Write { range, .. } => {
                grow(array, bytes(range).end);
                array[bytes(range)].copy_from_slice(data);
            }
            Change::Punch(range) | Change::Zero { range, keeps_size: true } => {
                let end = bytes(range).end.min(array.len());
                array[bytes(range).start.min(end)..end].fill(0);
            }
            Change::Zero { range, keeps_size: false } => {
                grow(array, bytes(range).end);
                array[bytes(range)].fill(0);
            }
            Change::Allocate { range, keeps_size: false } => grow(array, bytes(range).end),
            Change::Allocate { .. } => {}
            Change::Truncate(size) => array.resize(*size as usize, 0),
            Change::Collapse(range) => drop(array.drain(bytes(range))),
            Change::Insert(range) => {
                let (at, count) = (bytes(range).start, bytes(range).len());
                array.splice(at..at, std::iter::repeat_n(0, count));
            }
        }
    }
}
