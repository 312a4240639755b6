//! Stamps, and the history of a racing file: which states a read that overlapped some operations may show.
//!
//! A stamp fills its block. All of its bytes depend on file, block and operation, as a hash does: any two stamps differ in 255 of 256 bytes, so a few
//! bytes tell one from another. Yet its sectors are alike but for their first word, so that it can be compressed, and that word can be
//! turned back into what was stamped, for messages.
//!
//! One mutex for each file, held for a comparison.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{BLOCK, BLOCKS, lock};

/// States that are kept for readers that have not ended.
const HISTORY_MAX: usize = 4096;
/// Operations that a message names.
const SAID: usize = 6;
const SECTOR: usize = 512;
const WORDS: u64 = SECTOR as u64 / 8;

/// Content of a block: the stamp that an operation gave to a block (this one, or one that has moved here) up to a byte, zeros behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Content {
    pub(super) operation: u64,
    pub(super) block: u64,
    pub(super) bytes: usize,
}

pub(super) const ZEROS: Content = Content { operation: 0, block: 0, bytes: 0 };

/// What a stamp says: 12 bits of file, 12 of block, 32 of operation. The marker tells it from chance.
fn name(file: u64, block: u64, operation: u64) -> u64 {
    (MARKER << 59) | ((file & 0xfff) << 44) | ((block & 0xfff) << 32) | (operation & 0xffff_ffff)
}

const MARKER: u64 = 0b10110;
const SECTOR_SHIFT: u32 = 56;

/// A permutation of the words that looks like chance.
fn mix(word: u64) -> u64 {
    let word = (word ^ (word >> 32)).wrapping_mul(FIRST);
    let word = (word ^ (word >> 32)).wrapping_mul(SECOND);
    word ^ (word >> 32)
}

/// Undoes [`mix`].
fn unmix(word: u64) -> u64 {
    let word = (word ^ (word >> 32)).wrapping_mul(inverse(SECOND));
    let word = (word ^ (word >> 32)).wrapping_mul(inverse(FIRST));
    word ^ (word >> 32)
}

const FIRST: u64 = 0x9e37_79b9_7f4a_7c15;
const SECOND: u64 = 0xd6e8_feb8_6659_fd93;

/// Of an odd number, modulo 2^64: each step of Newton's doubles the bits that are right.
const fn inverse(odd: u64) -> u64 {
    let mut found = odd;
    let mut step = 0;
    while step < 6 {
        found = found.wrapping_mul(2_u64.wrapping_sub(odd.wrapping_mul(found)));
        step += 1;
    }
    found
}

/// The block of bytes that an operation writes as a block of a file.
pub(super) fn stamp(file: u64, block: u64, operation: u64) -> Vec<u8> {
    let name = name(file, block, operation);
    let words = (1..WORDS).flat_map(|index| mix(name.wrapping_add(index.wrapping_mul(FIRST))).to_le_bytes());
    let rest: Vec<u8> = words.collect();
    let mut bytes = Vec::with_capacity(BLOCK as usize);
    for sector in 0..BLOCK / SECTOR as u64 {
        bytes.extend_from_slice(&mix(name | (sector << SECTOR_SHIFT)).to_le_bytes());
        bytes.extend_from_slice(&rest);
    }
    bytes
}

/// Which stamps there are in the bytes of a block, sector by sector.
pub(super) fn describe(bytes: &[u8]) -> String {
    let mut runs: Vec<(usize, String)> = Vec::new();
    for (at, sector) in (0..).step_by(SECTOR).zip(bytes.chunks(SECTOR)) {
        let what = describe_sector(sector);
        if runs.last().is_none_or(|(_, last)| *last != what) {
            runs.push((at, what));
        }
    }
    let runs: Vec<String> = runs.into_iter().map(|(at, what)| format!("from {at} on {what}")).collect();
    format!("{} bytes, {}", bytes.len(), runs.join(", "))
}

fn describe_sector(sector: &[u8]) -> String {
    if sector.iter().all(|&byte| byte == 0) {
        return "zeros".into();
    }
    let Some(first) = sector.first_chunk() else { return format!("{sector:?}") };
    let name = unmix(u64::from_le_bytes(*first));
    if name >> 59 != MARKER {
        return format!("no stamp ({:02x?})", sector.get(..16).unwrap_or(sector));
    }
    let (file, block, operation) = ((name >> 44) & 0xfff, (name >> 32) & 0xfff, name & 0xffff_ffff);
    let expected = stamp(file, block, operation);
    let differs = sector.iter().zip(&expected).skip(8).position(|(one, other)| one != other);
    let torn = differs.map_or(String::new(), |at| format!(" up to byte {}", at + 8));
    format!("file {file}'s block {block} of operation {operation}{torn}")
}

/// How what a read has shown came to it, and so what it may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// From us in one piece: each block is one state's, and the length too, but that a write lengthens a file block by block.
    Filesystem,
    /// Through the kernel's page cache by read or splice. The kernel copies from its pages while writes copy into them: each *byte* is
    /// one state's. It looks at the size several times: a read ends inside of a block only where a state ends there, and between blocks only if
    /// a state ends there or earlier; and some state is as long as what was read.
    PageCache,
    /// Whole pages of a mapping, up to the first that cannot be had: some state ends before that, and some state has a byte of
    /// the last that could be had. Each byte is one state's.
    Mapping,
}

/// What a read has shown.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shown<'a> {
    /// A multiple of the block.
    pub(super) offset: u64,
    pub(super) wanted: u64,
    pub(super) bytes: &'a [u8],
    /// The operation that had ended when the read began.
    pub(super) from: u64,
    /// The operation that had begun when the read ended.
    pub(super) to: u64,
    pub(super) source: Source,
}

/// What every operation left, newest last.
struct History {
    blocks: Vec<VecDeque<(u64, Content)>>,
    sizes: VecDeque<(u64, u64)>,
    /// What the newest operations were.
    said: VecDeque<(u64, String)>,
}

impl History {
    /// What the last operations up to `to` were, for messages.
    fn recent(&self, to: u64) -> String {
        let mut recent: Vec<String> = Vec::new();
        for (operation, what) in self.said.iter().rev().filter(|(operation, _)| *operation <= to).take(SAID) {
            recent.push(format!("\n  operation {operation}: {what}"));
        }
        recent.concat()
    }
}

/// The states that some operation in `[from, to]`, or the last one before, left. Newest first.
fn between<T: Copy>(history: &VecDeque<(u64, T)>, from: u64, to: u64) -> Vec<T> {
    let mut states: Vec<T> = Vec::new();
    for &(operation, state) in history.iter().rev().skip_while(|(operation, _)| *operation > to) {
        states.push(state);
        if operation <= from {
            break;
        }
    }
    states
}

/// A file that one thread changes and others read.
pub(super) struct RacingFile {
    pub(super) number: u64,
    history: Mutex<History>,
    begun: AtomicU64,
    ended: AtomicU64,
}

impl RacingFile {
    /// An empty file.
    pub(super) fn new(number: u64) -> Self {
        let blocks = (0..BLOCKS).map(|_| VecDeque::from([(0, ZEROS)])).collect();
        let history = Mutex::new(History { blocks, sizes: VecDeque::from([(0, 0)]), said: VecDeque::new() });
        Self { number, history, begun: AtomicU64::new(0), ended: AtomicU64::new(0) }
    }

    /// What the newest operation leaves of a block.
    pub(super) fn content(&self, block: u64) -> Content {
        let history = lock(&self.history);
        history.blocks.get(block as usize).and_then(|states| states.back()).map_or(ZEROS, |(_, content)| *content)
    }

    /// What the newest operation leaves as the size, in bytes.
    pub(super) fn size(&self) -> u64 {
        lock(&self.history).sizes.back().map_or(0, |(_, size)| *size)
    }

    /// The operation that would begin next.
    pub(super) fn next_operation(&self) -> u64 {
        self.begun() + 1
    }

    /// The newest operation that has begun.
    pub(super) fn begun(&self) -> u64 {
        self.begun.load(Ordering::SeqCst)
    }

    /// The newest operation that has ended.
    pub(super) fn ended(&self) -> u64 {
        self.ended.load(Ordering::SeqCst)
    }

    /// Notes what the next operation is and will leave, and begins it.
    pub(super) fn begin(&self, what: String, size: u64, changes: &[(u64, Content)]) -> u64 {
        let operation = self.next_operation();
        let mut history = lock(&self.history);
        for &(block, content) in changes {
            if let Some(states) = history.blocks.get_mut(block as usize) {
                states.push_back((operation, content));
                if states.len() > HISTORY_MAX {
                    states.pop_front();
                }
            }
        }
        history.sizes.push_back((operation, size));
        if history.sizes.len() > HISTORY_MAX {
            history.sizes.pop_front();
        }
        history.said.push_back((operation, what));
        if history.said.len() > SAID * 8 {
            history.said.pop_front();
        }
        self.begun.store(operation, Ordering::SeqCst);
        operation
    }

    /// The operation that was begun has ended.
    pub(super) fn end(&self, operation: u64) {
        self.ended.store(operation, Ordering::SeqCst);
    }

    /// Whether a read may have shown this.
    pub(super) fn check(&self, shown: &Shown<'_>) -> Result<(), String> {
        let history = lock(&self.history);
        let &Shown { from, to, offset, wanted, source, .. } = shown;
        let sizes = between(&history.sizes, from, to);
        if !fits_length(shown, &sizes) {
            let length = shown.bytes.len();
            return Err(format!(
                "file {}: {length} bytes of {wanted} at {offset} ({source:?}), operations {from}..{to}, newest first sizes {sizes:?}{}",
                self.number,
                history.recent(to)
            ));
        }
        for (block, bytes) in (offset / BLOCK..).zip(shown.bytes.chunks(BLOCK as usize)) {
            let Some(states) = history.blocks.get(block as usize) else { continue };
            let states = between(states, from, to);
            let expected: Vec<Vec<u8>> = states.iter().map(|&content| self.expected(content)).collect();
            let mut allowed = expected.iter();
            let wrong_at = match source {
                Source::Filesystem if allowed.any(|whole| whole.starts_with(bytes)) => None,
                Source::Filesystem => Some(0),
                Source::PageCache | Source::Mapping => {
                    let is_explained = |at: usize, byte: u8| expected.iter().any(|whole| whole.get(at) == Some(&byte));
                    bytes.iter().enumerate().position(|(at, &byte)| !is_explained(at, byte))
                }
            };
            if let Some(at) = wrong_at {
                return Err(format!(
                    "block {block} of file {} ({source:?}), byte {at}: {}; operations {from}..{to} allow {states:?}, newest first sizes {sizes:?}{}",
                    self.number,
                    describe(bytes),
                    history.recent(to)
                ));
            }
        }
        Ok(())
    }

    fn expected(&self, content: Content) -> Vec<u8> {
        let mut bytes = stamp(self.number, content.block, content.operation);
        bytes.iter_mut().skip(content.bytes).for_each(|byte| *byte = 0);
        bytes
    }
}

/// Whether a read of files of these sizes, newest first, may have been as long as it was. See [`Source`].
fn fits_length(shown: &Shown<'_>, sizes: &[u64]) -> bool {
    let (offset, wanted, length) = (shown.offset, shown.wanted, shown.bytes.len() as u64);
    let end = offset + length;
    let is_whole = length.is_multiple_of(BLOCK);
    if length > wanted {
        return false;
    }
    match shown.source {
        Source::Filesystem => {
            let seen: Vec<u64> = sizes.iter().map(|size| size.saturating_sub(offset).min(wanted)).collect();
            // Nothing shortens a file by steps.
            let grows =
                |pair: &[u64]| matches!(pair, [after, before] if (*before..=*after).contains(&length) && is_whole);
            seen.contains(&length) || seen.windows(2).any(grows)
        }
        Source::PageCache => {
            let is_end = |size: &u64| if is_whole { *size <= end } else { *size == end };
            (length == wanted || sizes.iter().any(is_end)) && (length == 0 || sizes.iter().any(|size| *size >= end))
        }
        Source::Mapping => {
            let has_last = |size: &u64| *size > end - BLOCK;
            // The kernel copies on from a page that a truncation takes away under it: it has as many bytes of it as it had by then.
            let page = end / BLOCK * BLOCK;
            if !is_whole {
                return sizes.iter().any(|size| *size > page) && sizes.iter().any(|size| *size <= page);
            }
            (length == wanted || sizes.iter().any(|size| *size <= end)) && (length == 0 || sizes.iter().any(has_last))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: usize = BLOCK as usize;

    /// A file whose operation 1 wrote two blocks, 2 wrote the first again, 3 cut the second in half, 4 made the first a hole.
    fn file() -> RacingFile {
        let file = RacingFile::new(0);
        let stamped = |operation, block| (block, Content { operation, block, bytes: WHOLE });
        for (size, changes) in [
            (2 * BLOCK, vec![stamped(1, 0), stamped(1, 1)]),
            (2 * BLOCK, vec![stamped(2, 0)]),
            (BLOCK + BLOCK / 2, vec![(1, Content { operation: 1, block: 1, bytes: WHOLE / 2 })]),
            (BLOCK + BLOCK / 2, vec![(0, ZEROS)]),
        ] {
            let operation = file.begin(String::new(), size, &changes);
            file.end(operation);
        }
        file
    }

    fn check(source: Source, bytes: &[u8], from: u64, to: u64) -> Result<(), String> {
        file().check(&Shown { offset: 0, wanted: 2 * BLOCK, bytes, from, to, source })
    }

    fn joined(one: &[u8], other: &[u8]) -> Vec<u8> {
        [one, other].concat()
    }

    #[test]
    fn a_stamp_says_what_it_is_and_no_two_are_alike() {
        assert_eq!(unmix(mix(0x0123_4567_89ab_cdef)), 0x0123_4567_89ab_cdef);
        let one = stamp(1007, 39, 123_456);
        assert_eq!(describe(&one), "4096 bytes, from 0 on file 1007's block 39 of operation 123456");
        for other in [stamp(1008, 39, 123_456), stamp(1007, 38, 123_456), stamp(1007, 39, 123_457), vec![0; WHOLE]] {
            let alike = one.iter().zip(&other).filter(|(one, other)| one == other).count();
            assert!(alike < WHOLE / 64, "{alike} bytes are alike");
        }
        let mut torn = one;
        torn[600..].copy_from_slice(&stamp(1, 2, 3)[600..]);
        let said = describe(&torn);
        assert!(said.contains("from 512 on file 1007's block 39 of operation 123456 up to byte 88"), "{said}");
        assert!(said.contains("from 1024 on file 1's block 2 of operation 3"), "{said}");
    }

    #[test]
    fn every_state_in_between_is_allowed_and_no_other() {
        let (first, second) = (stamp(0, 0, 1), stamp(0, 1, 1));
        let again = stamp(0, 0, 2);
        for source in [Source::Filesystem, Source::PageCache, Source::Mapping] {
            for (from, to, is_allowed) in [(0, 1, true), (0, 2, true), (1, 2, true), (2, 2, false), (2, 4, false)] {
                let outcome = check(source, &joined(&first, &second), from, to);
                assert_eq!(outcome.is_ok(), is_allowed, "{source:?} {from} {to} {outcome:?}");
            }
            assert!(check(source, &joined(&again, &second), 1, 2).is_ok());
            let future = check(source, &joined(&again, &second), 0, 1).unwrap_err();
            assert!(future.contains("block 0 of file 0") && future.contains("of operation 2"), "{future}");
            // Another file's, another block's, garbage, and zeros that are in no state.
            for wrong in [stamp(7, 0, 1), stamp(0, 1, 1), vec![9; WHOLE], vec![0; WHOLE]] {
                assert!(check(source, &joined(&wrong, &second), 1, 3).is_err(), "{source:?}");
            }
        }
    }

    #[test]
    fn a_torn_block_is_allowed_only_in_the_kernels_pages_and_only_of_allowed_states() {
        let second = stamp(0, 1, 1);
        let torn = |other: &[u8], at: usize| joined(&joined(&stamp(0, 0, 1)[..at], &other[at..]), &second);
        for at in [1, 700, WHOLE - 40] {
            let of_both = torn(&stamp(0, 0, 2), at);
            assert!(check(Source::Filesystem, &of_both, 1, 2).is_err());
            assert!(check(Source::PageCache, &of_both, 1, 2).is_ok() && check(Source::Mapping, &of_both, 1, 2).is_ok());
            assert!(check(Source::PageCache, &of_both, 2, 2).is_err());
            // A cache line of another file.
            let mut of_another = of_both;
            of_another[1024..1088].copy_from_slice(&stamp(3, 0, 1)[1024..1088]);
            assert!(check(Source::PageCache, &of_another, 1, 2).is_err());
        }
    }

    #[test]
    fn what_was_cut_off_is_zeros() {
        let (first, mut half) = (stamp(0, 0, 2), stamp(0, 1, 1));
        assert!(check(Source::Mapping, &joined(&first, &half), 3, 3).is_err(), "it shows what was cut off");
        half[WHOLE / 2..].fill(0);
        assert!(check(Source::Mapping, &joined(&first, &half), 3, 3).is_ok());
        assert!(check(Source::PageCache, &joined(&first, &half[..WHOLE / 2]), 3, 3).is_ok());
        half[..WHOLE / 2].fill(0);
        assert!(check(Source::Mapping, &joined(&first, &half), 3, 3).is_err(), "it lost what was kept");
    }

    #[test]
    fn lengths_are_those_of_states() {
        let bytes = joined(&stamp(0, 0, 1), &stamp(0, 1, 1));
        let fits = |source, length: u64, wanted, sizes: &[u64]| {
            let bytes = &bytes[..length as usize];
            fits_length(&Shown { offset: 0, wanted, bytes, from: 0, to: 0, source }, sizes)
        };
        let (half, one, two) = (BLOCK / 2, BLOCK, 2 * BLOCK);
        for source in [Source::Filesystem, Source::PageCache] {
            assert!(
                fits(source, two, two, &[two]) && fits(source, one, two, &[one]) && fits(source, half, two, &[half])
            );
            assert!(fits(source, half, two, &[two, half]) && fits(source, 0, two, &[0]));
            // Short with no reason, longer than the file ever was, ending where no state does.
            assert!(
                !fits(source, one, two, &[two]) && !fits(source, two, two, &[one]) && !fits(source, two, one, &[two])
            );
            assert!(!fits(source, half, two, &[two, 0]) && !fits(source, 0, two, &[one]));
            // A growing file.
            assert!(fits(source, one, two, &[two, 0]));
        }
        // The kernel sees the end move while it reads; we do not.
        assert!(fits(Source::PageCache, one, two, &[0, two]) && !fits(Source::Filesystem, one, two, &[0, two]));
        assert!(fits(Source::Mapping, two, two, &[one + 1]) && fits(Source::Mapping, one, two, &[half]));
        assert!(fits(Source::Mapping, 0, two, &[0]) && fits(Source::Mapping, one, two, &[half, two]));
        assert!(!fits(Source::Mapping, two, two, &[one]) && !fits(Source::Mapping, one, two, &[one + 1]));
        assert!(fits(Source::Mapping, half, two, &[0, two]) && !fits(Source::Mapping, half, two, &[one, two]));
        assert!(!fits(Source::Mapping, half, two, &[half]) && !fits(Source::Mapping, 0, two, &[1]));
    }
}
