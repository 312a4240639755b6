//! The keys of a node as a walk hands them out: their values stay in the buffer that they were read into, which is used again when nobody looks
//! at them any more. No locks are held.

use super::image::Span;
use crate::error::Result;
use crate::format::{Position, Value};
use crate::memory::AlignedBuffer;
use crate::sync::{Arc, Mutex};

/// Buffers that are used again: fresh ones cost more than what is read into them.
#[derive(Debug, Default)]
pub(super) struct SpareBuffers(Mutex<Vec<AlignedBuffer>>);

impl SpareBuffers {
    /// A buffer of at least `length` bytes, with anything in it.
    pub fn take(&self, length: usize) -> Result<AlignedBuffer> {
        match self.0.lock().pop().filter(|spare| spare.len() >= length) {
            Some(spare) => Ok(spare),
            None => AlignedBuffer::try_zeroed(length),
        }
    }

    pub fn give(&self, buffer: AlignedBuffer) {
        self.0.lock().push(buffer);
    }
}

#[derive(Debug, Default)]
enum Bytes {
    #[default]
    None,
    Owned(Vec<u8>),
    Read {
        buffer: AlignedBuffer,
        spare: Arc<SpareBuffers>,
    },
}

impl Bytes {
    fn get(&self, (start, end): Span) -> Option<&[u8]> {
        let range = start as usize..end as usize;
        match self {
            Self::None => None,
            Self::Owned(bytes) => bytes.get(range),
            Self::Read { buffer, .. } => buffer.get(range),
        }
    }
}

#[derive(Debug, Default)]
struct Source {
    keys: Vec<(Position, Span)>,
    bytes: Bytes,
}

impl Drop for Source {
    fn drop(&mut self) {
        if let Bytes::Read { buffer, spare } = std::mem::take(&mut self.bytes) {
            spare.give(buffer);
        }
    }
}

/// A stretch of the keys of one node, in order, with no whiteouts. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Keys {
    source: Arc<Source>,
    start: usize,
    end: usize,
}

impl Keys {
    fn new(keys: Vec<(Position, Span)>, bytes: Bytes) -> Self {
        let end = keys.len();
        Self { source: Arc::new(Source { keys, bytes }), start: 0, end }
    }

    /// Keys whose values lie in a buffer, which goes to `spare` in the end.
    pub(super) fn read(keys: Vec<(Position, Span)>, buffer: AlignedBuffer, spare: &Arc<SpareBuffers>) -> Self {
        Self::new(keys, Bytes::Read { buffer, spare: Arc::clone(spare) })
    }

    /// Keys that are there already, in ascending order of position: of one leaf, at most.
    #[must_use]
    pub fn of(pairs: &[(Position, Value)]) -> Self {
        let mut bytes = Vec::with_capacity(pairs.iter().map(|(_, value)| value.len()).sum());
        let mut keys = Vec::with_capacity(pairs.len());
        for (position, value) in pairs {
            let start = bytes.len();
            bytes.extend_from_slice(value);
            keys.push((*position, (start as u32, bytes.len() as u32)));
        }
        Self::new(keys, Bytes::Owned(bytes))
    }

    /// How many.
    #[must_use]
    pub fn len(&self) -> usize {
        self.end - self.start
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// The keys and their values.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (Position, &[u8])> {
        let keys = self.source.keys.get(self.start..self.end).unwrap_or_default();
        // What made the spans has found them in the bytes.
        keys.iter().map(|(position, span)| (*position, self.source.bytes.get(*span).unwrap_or_default()))
    }

    /// Those in `[from, to]`.
    #[must_use]
    pub fn within(&self, from: Position, to: Position) -> Self {
        let keys = &self.source.keys;
        let start = keys.partition_point(|(position, _)| *position < from).clamp(self.start, self.end);
        let end = keys.partition_point(|(position, _)| *position <= to).clamp(start, self.end);
        Self { source: Arc::clone(&self.source), start, end }
    }
}
