//! Sorted keys in memory: the immutable [`Run`] that a node's images add up to, the [`Changes`] made since, and the view of
//! several such layers as one ([`Merged`]).
//!
//! Invariants: positions in a run ascend strictly; a run holds no whiteouts (nothing lies below it). No locks here.

use std::collections::BTreeMap;
use std::collections::btree_map::Range;

use smallvec::SmallVec;

use crate::format::key::PackedKeyHeader;
use crate::format::{Position, Value};
use crate::sync::Arc;

/// Changes above a run: `None` is a whiteout, and stands only where a layer below has the key.
pub(super) type Changes = BTreeMap<Position, Option<Value>>;

/// Immutable sorted keys, packed: a search touches positions only, a value is a slice.
#[derive(Debug, Default)]
pub(super) struct Run {
    positions: Vec<Position>,
    /// End of each value in `bytes`.
    ends: Vec<u32>,
    bytes: Vec<u8>,
}

impl Run {
    /// An empty run with room for so many keys and bytes of values.
    pub fn with_capacity(keys: usize, value_bytes: usize) -> Self {
        Self {
            positions: Vec::with_capacity(keys),
            ends: Vec::with_capacity(keys),
            bytes: Vec::with_capacity(value_bytes),
        }
    }

    /// Number of keys.
    pub fn len(&self) -> usize {
        self.positions.len()
    }

    /// Adds a key behind all others.
    pub fn push(&mut self, position: Position, value: &[u8]) {
        debug_assert!(self.positions.last().is_none_or(|&last| last < position), "a run ascends");
        self.positions.push(position);
        self.bytes.extend_from_slice(value);
        // A run is the content of one node, at most 1 MiB.
        self.ends.push(u32::try_from(self.bytes.len()).unwrap_or(u32::MAX));
    }

    /// Position and value of the key with this index.
    pub fn key(&self, index: usize) -> Option<(Position, &[u8])> {
        let position = *self.positions.get(index)?;
        let start = match index.checked_sub(1) {
            Some(before) => *self.ends.get(before)? as usize,
            None => 0,
        };
        let value = self.bytes.get(start..*self.ends.get(index)? as usize)?;
        Some((position, value))
    }

    /// Index of the first key at or after `position`.
    pub fn lower_bound(&self, position: Position) -> usize {
        self.positions.partition_point(|&here| here < position)
    }

    /// Index of the first key after `position`.
    pub fn upper_bound(&self, position: Position) -> usize {
        self.positions.partition_point(|&here| here <= position)
    }

    /// The value at exactly `position`.
    pub fn get(&self, position: Position) -> Option<&[u8]> {
        let index = self.positions.binary_search(&position).ok()?;
        self.key(index).map(|(_, value)| value)
    }

    /// Bytes of memory.
    pub fn memory_bytes(&self) -> usize {
        self.positions.capacity() * size_of::<Position>() + self.ends.capacity() * 4 + self.bytes.capacity()
    }

    /// Gives back what growing has left over.
    pub fn shrink(&mut self) {
        self.positions.shrink_to_fit();
        self.ends.shrink_to_fit();
        self.bytes.shrink_to_fit();
    }
}

/// Bytes that a change takes in memory beside its value, for the accounting: node of the map and reference counts.
pub(super) const CHANGE_OVERHEAD_BYTES: usize = 72;

/// Bytes that changes take when packed in a bset.
pub(super) fn packed_changes_bytes(changes: &Changes) -> usize {
    changes.values().map(|value| PackedKeyHeader::BYTES + value.as_ref().map_or(0, |value| value.len())).sum()
}

/// A value in one of the layers.
#[derive(Clone, Copy, Debug)]
pub(super) enum ValueRef<'a> {
    /// Inside a run.
    Packed(&'a [u8]),
    /// Of a change.
    Shared(&'a Value),
}

impl<'a> ValueRef<'a> {
    /// The bytes.
    pub fn bytes(self) -> &'a [u8] {
        match self {
            Self::Packed(bytes) => bytes,
            Self::Shared(value) => value,
        }
    }

    /// A value of its own.
    pub fn to_value(self) -> Value {
        match self {
            Self::Packed(bytes) => Arc::from(bytes),
            Self::Shared(value) => Arc::clone(value),
        }
    }
}

enum Source<'a> {
    Run { run: &'a Run, start: usize, end: usize },
    Changes(Range<'a, Position, Option<Value>>),
}

impl<'a> Source<'a> {
    fn take(&mut self, descending: bool) -> Option<(Position, Option<ValueRef<'a>>)> {
        match self {
            Self::Run { run, start, end } => {
                if start >= end {
                    return None;
                }
                let index = if descending {
                    *end -= 1;
                    *end
                } else {
                    *start += 1;
                    *start - 1
                };
                run.key(index).map(|(position, value)| (position, Some(ValueRef::Packed(value))))
            }
            Self::Changes(range) => {
                let (position, value) = if descending { range.next_back() } else { range.next() }?;
                Some((*position, value.as_ref().map(ValueRef::Shared)))
            }
        }
    }
}

/// Layers seen as one, in order of position: the newest layer that has a position decides. Whiteouts are passed on.
pub(super) struct Merged<'a> {
    /// Newest first, each with its next key.
    sources: SmallVec<[(Source<'a>, Option<(Position, Option<ValueRef<'a>>)>); 4]>,
    descending: bool,
}

impl<'a> Merged<'a> {
    /// Keys in `[from, to]` of `changes` (newest first) above `base`.
    pub fn new(
        changes: impl Iterator<Item = &'a Changes>,
        base: &'a Run,
        from: Position,
        to: Position,
        descending: bool,
    ) -> Self {
        let mut sources: SmallVec<[(Source<'a>, Option<(Position, Option<ValueRef<'a>>)>); 4]> = SmallVec::new();
        if from <= to {
            for layer in changes.filter(|layer| !layer.is_empty()) {
                sources.push((Source::Changes(layer.range(from..=to)), None));
            }
            let run = Source::Run { run: base, start: base.lower_bound(from), end: base.upper_bound(to) };
            sources.push((run, None));
        }
        for (source, head) in &mut sources {
            *head = source.take(descending);
        }
        Self { sources, descending }
    }
}

impl<'a> Iterator for Merged<'a> {
    type Item = (Position, Option<ValueRef<'a>>);

    fn next(&mut self) -> Option<Self::Item> {
        let mut chosen: Option<Self::Item> = None;
        for (_, head) in &self.sources {
            if let Some((position, value)) = *head {
                // Strictly nearer only: of equal positions the first, newest, layer's stays.
                let nearer =
                    chosen.is_none_or(|(best, _)| if self.descending { position > best } else { position < best });
                if nearer {
                    chosen = Some((position, value));
                }
            }
        }
        let (position, _) = chosen?;
        for (source, head) in &mut self.sources {
            if head.is_some_and(|(here, _)| here == position) {
                *head = source.take(self.descending);
            }
        }
        chosen
    }
}
