//! Where `read_iter` puts what it finds: copied into a buffer, or collected as references.

use smallvec::SmallVec;

use crate::memory::{ByteReference, Pipe, PipePiece};

/// Takes the bytes of a read, in order of their offset.
pub trait ReadSink {
    /// The next bytes.
    fn accept(&mut self, bytes: ByteReference);
}

/// Copies into a buffer of the caller's. The buffer is private memory of the daemon: it is touched while a byte reference is held.
#[derive(Debug)]
pub struct CopySink<'a> {
    rest: &'a mut [u8],
}

impl<'a> CopySink<'a> {
    /// A sink that fills `buffer` from its start. What does not fit is ignored.
    pub fn new(buffer: &'a mut [u8]) -> Self {
        Self { rest: buffer }
    }
}

impl ReadSink for CopySink<'_> {
    fn accept(&mut self, bytes: ByteReference) {
        let count = bytes.len().min(self.rest.len());
        let (now, later) = std::mem::take(&mut self.rest).split_at_mut(count);
        if let Some(bytes) = bytes.get(..count) {
            now.copy_from_slice(bytes);
        }
        self.rest = later;
    }
}

/// A shared page of zeros.
static ZEROS: [u8; 65536] = [0; 65536];

/// One piece of a [`PageBatch`].
#[derive(Clone, Debug)]
enum Segment {
    Bytes(ByteReference),
    Zeros(usize),
}

/// Collected pages: references to folio memory, and zeros that lie in no folio. No lock is held for it; the bytes cannot change while
/// it lives, and may go stale by a later write or truncate, as in a pipe.
#[derive(Clone, Debug, Default)]
pub struct PageBatch {
    segments: SmallVec<[Segment; 2]>,
    length: usize,
}

impl PageBatch {
    /// An empty batch.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether it holds nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// How many references to folio memory it holds.
    #[must_use]
    pub fn reference_count(&self) -> usize {
        self.segments.iter().filter(|segment| matches!(segment, Segment::Bytes(_))).count()
    }

    /// Adds bytes at the end.
    pub fn push(&mut self, bytes: ByteReference) {
        if !bytes.is_empty() {
            self.length += bytes.len();
            self.segments.push(Segment::Bytes(bytes));
        }
    }

    /// Adds `length` zeros at the end, from the shared zero page.
    pub fn push_zeros(&mut self, mut length: usize) {
        self.length += length;
        while length > 0 {
            let now = length.min(ZEROS.len());
            self.segments.push(Segment::Zeros(now));
            length -= now;
        }
    }

    /// Adds the bytes `range` of another batch at the end; the same memory is referred to.
    pub fn extend_from(&mut self, other: &Self, range: std::ops::Range<usize>) {
        let mut position = 0;
        for segment in &other.segments {
            let next = position + segment.bytes().len();
            let (start, end) = (range.start.max(position), range.end.min(next));
            if start < end {
                match segment {
                    Segment::Bytes(bytes) => self.push(bytes.slice(start - position..end - position)),
                    Segment::Zeros(_) => self.push_zeros(end - start),
                }
            }
            position = next;
        }
    }

    /// All bytes, if they lie in one piece: a reply that needs no copy.
    #[must_use]
    pub fn as_single(&self) -> Option<&[u8]> {
        match self.segments.as_slice() {
            [] => Some(&[]),
            [one] => Some(one.bytes()),
            _ => None,
        }
    }

    /// The pieces in order.
    pub fn slices(&self) -> impl Iterator<Item = &[u8]> {
        self.segments.iter().map(Segment::bytes)
    }

    /// Puts bytes from `at` on into a pipe, as many as it takes in one call, without copying what lies in whole pages. Returns how many: at
    /// least one, if any are left. No lock is held, and the bytes cannot change: this may wait for the pipe's reader as long as it likes.
    ///
    /// # Errors
    /// Those of [`Pipe::feed`].
    pub fn feed(&self, pipe: &Pipe<'_>, at: usize) -> std::io::Result<usize> {
        let mut skip = at;
        let mut pieces: SmallVec<[PipePiece<'_>; 8]> = SmallVec::new();
        for segment in &self.segments {
            let length = segment.bytes().len();
            if skip >= length {
                skip -= length;
                continue;
            }
            pieces.push(match segment {
                Segment::Bytes(bytes) => PipePiece::Folio(bytes, skip),
                Segment::Zeros(length) => PipePiece::Static(ZEROS.get(skip..*length).unwrap_or_default()),
            });
            skip = 0;
        }
        pipe.feed(&pieces)
    }

    /// A copy of all bytes.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.length);
        self.slices().for_each(|slice| bytes.extend_from_slice(slice));
        bytes
    }
}

impl Segment {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Zeros(length) => ZEROS.get(..*length).unwrap_or(&ZEROS),
        }
    }
}

impl ReadSink for PageBatch {
    fn accept(&mut self, bytes: ByteReference) {
        self.push(bytes);
    }
}
