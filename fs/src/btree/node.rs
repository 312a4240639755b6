//! A node in memory.
//!
//! A node's keys are layers: `base` (what its image held when it was last merged), `frozen` (changes that a checkpoint has
//! put, or is putting, into the image) and `recent` (changes that no image has). The newest layer that has a position decides.
//!
//! Invariants:
//! 1. `recent` is exactly what the next bset will hold: the difference between `base + frozen` and the present content. In an
//!    interior node `base + frozen` is what its images point to, so `recent` is also exactly the change of reachability.
//! 2. A whiteout stands only where a layer below has a live key.
//! 3. `minimum` never changes during the life of a node; `limit` only shrinks (splits). A merge makes a new node.
//! 4. `live_bytes` is exact: what the content takes in a full image, entries of interior nodes counted at their largest.
//! 5. A dirty node is held by the list of dirty nodes, a node without an image also by its parent (`unimaged`) or as a root.
//!
//! Locks: `content`, taken parent before child; a committer takes leaves only, in (tree, position) order. Never held over I/O.

use smallvec::SmallVec;

use super::image::append_offset;
use super::run::{CHANGE_OVERHEAD_BYTES, Changes, Merged, Run, ValueRef};
use crate::format::key::PackedKeyHeader;
use crate::format::node::{BsetHeader, HEADER_BYTES, NodePointer};
use crate::format::superblock::Geometry;
use crate::format::{BtreeId, Position, Value};
use crate::sync::atomic::{AtomicBool, AtomicU64};
use crate::sync::{Arc, LockClass, SharedRwLock};
use crate::units::{JournalSequence, NodeId};

/// Sizes that follow from the geometry.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Bytes of a slot.
    pub node_bytes: usize,
    /// Bytes of packed keys that a full image can hold.
    pub capacity_bytes: usize,
    /// Live bytes above which a node is split, so that a slot has room for appended bsets.
    pub soft_bytes: usize,
    /// Bytes that an encoded pointer with all its copies takes.
    pub pointer_bytes: usize,
    /// Copies of each node.
    pub copies: usize,
}

impl Limits {
    pub fn new(geometry: &Geometry) -> Self {
        let node_bytes = geometry.node_bytes as usize;
        let capacity_bytes = node_bytes.saturating_sub(HEADER_BYTES + BsetHeader::BYTES);
        let copies = usize::from(geometry.metadata_replicas).clamp(1, NodePointer::COPIES_MAX);
        Self { node_bytes, capacity_bytes, soft_bytes: capacity_bytes / 4 * 3, pointer_bytes: 19 + 9 * copies, copies }
    }

    /// Whether a bset of so many bytes of keys fits behind an image.
    pub fn append_fits(self, image: &NodePointer, payload_bytes: usize) -> bool {
        let end = append_offset(image.written_bytes as usize) + BsetHeader::BYTES + payload_bytes;
        end <= self.node_bytes && image.bset_count < u16::MAX
    }

    /// Bytes that a value is counted with in a node of this level.
    fn counted_bytes(self, level: u8, value_bytes: usize) -> usize {
        let value_bytes = if level == 0 { value_bytes } else { value_bytes.max(self.pointer_bytes) };
        PackedKeyHeader::BYTES + value_bytes
    }
}

/// A node. See the module's documentation.
#[derive(Debug)]
pub(super) struct Node {
    pub id: NodeId,
    pub btree: BtreeId,
    pub level: u8,
    pub content: SharedRwLock<Content>,
    /// Used since the cache's clock last passed.
    pub referenced: AtomicBool,
    /// Bytes that the cache charges for it.
    pub charged_bytes: AtomicU64,
}

/// What a node's lock protects.
#[derive(Debug)]
pub(super) struct Content {
    pub level: u8,
    pub limits: Limits,
    /// Smallest position that may be in the node.
    pub minimum: Position,
    /// First position beyond it; `None` for no bound.
    pub limit: Option<Position>,
    /// No longer in the tree: look again from the root.
    pub retired: bool,
    pub base: Arc<Run>,
    /// Oldest first.
    pub frozen: Vec<Arc<Changes>>,
    pub recent: Changes,
    /// Packed bytes of `recent`.
    pub recent_bytes: usize,
    pub live_bytes: usize,
    pub live_keys: usize,
    /// The newest image, published or about to be. Without one the whole content is unwritten.
    pub image: Option<NodePointer>,
    /// A copy of the image is bad: the next image is a full one, elsewhere.
    pub rewrite: bool,
    /// In the list of dirty nodes.
    pub dirty: bool,
    /// Counted among the dirty nodes that need a new slot.
    pub charged_slot: bool,
    /// In the list of small nodes.
    pub merge_noted: bool,
    /// Oldest sequence of `recent`; meaningful while dirty.
    pub oldest: JournalSequence,
    /// Newest sequence of the content, as far as known since it was read.
    pub newest: JournalSequence,
    /// Interior nodes: children that have no image yet, by position.
    pub unimaged: std::collections::BTreeMap<Position, Arc<Node>>,
}

/// What a put has changed in the accounting.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct PutEffect {
    /// The node was clean before.
    pub became_dirty: bool,
    /// Change of the bytes in memory.
    pub memory_delta: i64,
}

impl Node {
    /// A node with this content.
    pub fn new(id: NodeId, btree: BtreeId, content: Content) -> Arc<Self> {
        let Position { inode, offset, snapshot } = content.minimum;
        let class = LockClass::node(content.level, btree as u8, (inode, offset, snapshot));
        Arc::new(Self {
            id,
            btree,
            level: content.level,
            content: SharedRwLock::ranked(class, content),
            referenced: AtomicBool::new(true),
            charged_bytes: AtomicU64::new(0),
        })
    }
}

impl Content {
    /// Content with no image and no keys.
    pub fn empty(level: u8, limits: Limits, minimum: Position, limit: Option<Position>) -> Self {
        Self {
            level,
            limits,
            minimum,
            limit,
            retired: false,
            base: Arc::default(),
            frozen: Vec::new(),
            recent: Changes::new(),
            recent_bytes: 0,
            live_bytes: 0,
            live_keys: 0,
            image: None,
            rewrite: false,
            dirty: false,
            charged_slot: false,
            merge_noted: false,
            oldest: JournalSequence(0),
            newest: JournalSequence(0),
            unimaged: Default::default(),
        }
    }

    /// Whether the node is in its tree and `position` is in its range.
    pub fn covers(&self, position: Position) -> bool {
        !self.retired && self.minimum <= position && self.limit.is_none_or(|limit| position < limit)
    }

    /// Largest position in the range.
    pub fn last_position(&self) -> Position {
        self.limit.and_then(Position::predecessor).unwrap_or(Position::MAX)
    }

    /// The layers below `recent`, newest first.
    fn older(&self) -> impl Iterator<Item = &Changes> {
        self.frozen.iter().rev().map(|layer| &**layer)
    }

    /// The live value below `recent`.
    pub fn get_older(&self, position: Position) -> Option<ValueRef<'_>> {
        for layer in self.older() {
            if let Some(change) = layer.get(&position) {
                return change.as_ref().map(ValueRef::Shared);
            }
        }
        self.base.get(position).map(ValueRef::Packed)
    }

    /// The value at `position`.
    pub fn get(&self, position: Position) -> Option<ValueRef<'_>> {
        match self.recent.get(&position) {
            Some(change) => change.as_ref().map(ValueRef::Shared),
            None => self.get_older(position),
        }
    }

    /// Live keys in `[from, to]`, in either direction.
    pub fn range(
        &self,
        from: Position,
        to: Position,
        descending: bool,
    ) -> impl Iterator<Item = (Position, ValueRef<'_>)> {
        let layers = std::iter::once(&self.recent).chain(self.older());
        Merged::new(layers, &self.base, from, to, descending)
            .filter_map(|(position, value)| value.map(|value| (position, value)))
    }

    /// All live keys, ascending.
    pub fn all(&self) -> impl Iterator<Item = (Position, ValueRef<'_>)> {
        self.range(Position::MIN, Position::MAX, false)
    }

    /// Live keys of `base + frozen`, ascending.
    pub fn all_older(&self) -> impl Iterator<Item = (Position, ValueRef<'_>)> {
        Merged::new(self.older(), &self.base, Position::MIN, Position::MAX, false)
            .filter_map(|(position, value)| value.map(|value| (position, value)))
    }

    /// Interior nodes: the child whose range holds `position`: where it starts, and its encoded pointer.
    pub fn child(&self, position: Position) -> Option<(Position, ValueRef<'_>)> {
        self.range(Position::MIN, position, true).next()
    }

    /// Interior nodes: first position beyond the child that starts at `position`.
    pub fn child_limit(&self, position: Position) -> Option<Position> {
        let next = position.successor().and_then(|from| self.range(from, Position::MAX, false).next());
        next.map(|(position, _)| position).or(self.limit)
    }

    fn counted(&self, value_bytes: usize) -> usize {
        self.limits.counted_bytes(self.level, value_bytes)
    }

    /// Whether `bytes` more packed bytes may be put. A transaction's keys always fit a leaf that is nearly empty.
    pub fn has_room(&self, bytes: usize) -> bool {
        let wanted = self.live_bytes + bytes;
        wanted <= self.limits.soft_bytes
            || (wanted <= self.limits.capacity_bytes && self.live_bytes <= self.limits.capacity_bytes / 4)
    }

    /// Interior nodes: whether a child can split.
    pub fn has_room_for_child(&self) -> bool {
        self.live_bytes + 2 * self.counted(0) <= self.limits.soft_bytes.max(3 * self.counted(0))
    }

    /// Puts or removes a key. Cannot fail; that there is room was checked before.
    pub fn put(&mut self, position: Position, value: Option<Value>, sequence: JournalSequence) -> PutEffect {
        let mut memory_delta = 0i64;
        let older = self.get_older(position).map(|value| value.bytes().len());
        let before = match self.recent.get(&position) {
            Some(change) => {
                let bytes = change.as_ref().map_or(0, |value| value.len());
                self.recent_bytes -= PackedKeyHeader::BYTES + bytes;
                memory_delta -= (CHANGE_OVERHEAD_BYTES + bytes) as i64;
                change.as_ref().map(|_| bytes)
            }
            None => older,
        };
        if let Some(bytes) = before {
            self.live_bytes -= self.counted(bytes);
            self.live_keys -= 1;
        }
        let after = value.as_ref().map(|value| value.len());
        if let Some(bytes) = after {
            self.live_bytes += self.counted(bytes);
            self.live_keys += 1;
        }
        if value.is_some() || older.is_some() {
            let bytes = after.unwrap_or(0);
            self.recent_bytes += PackedKeyHeader::BYTES + bytes;
            memory_delta += (CHANGE_OVERHEAD_BYTES + bytes) as i64;
            self.recent.insert(position, value);
        } else {
            self.recent.remove(&position);
        }
        PutEffect { became_dirty: self.touch(sequence), memory_delta }
    }

    /// Notes that the content has changed at `sequence`. Returns whether the node was clean: the caller lists it as dirty.
    #[must_use]
    pub fn touch(&mut self, sequence: JournalSequence) -> bool {
        self.newest = self.newest.max(sequence);
        if self.dirty {
            self.oldest = self.oldest.min(sequence);
            return false;
        }
        self.oldest = sequence;
        self.dirty = true;
        true
    }

    /// Whether the next image cannot be a bset behind the present one.
    pub fn needs_slot(&self) -> bool {
        match &self.image {
            Some(image) if !self.rewrite => !self.limits.append_fits(image, self.recent_bytes),
            _ => true,
        }
    }

    /// Counts again what the content takes, after its layers were rearranged.
    pub fn recount(&mut self) {
        let (mut keys, mut bytes) = (0, 0);
        for (_, value) in self.all() {
            keys += 1;
            bytes += self.counted(value.bytes().len());
        }
        self.live_keys = keys;
        self.live_bytes = bytes;
        self.recent_bytes = super::run::packed_changes_bytes(&self.recent);
    }

    /// Bytes in memory, for the cache's budget.
    pub fn memory_bytes(&self) -> usize {
        let changes = |layer: &Changes| {
            layer
                .values()
                .map(|value| CHANGE_OVERHEAD_BYTES + value.as_ref().map_or(0, |value| value.len()))
                .sum::<usize>()
        };
        let layers: usize = self.frozen.iter().map(|layer| changes(layer)).sum();
        size_of::<Self>() + self.base.memory_bytes() + layers + changes(&self.recent)
    }

    /// Where to split so that both halves have keys: in the middle of the bytes, or near the end if `hint` is beyond all keys
    /// (keys that are added in ascending order would otherwise leave half-empty nodes). `None` with fewer than two keys.
    pub fn split_position(&self, hint: Position) -> Option<Position> {
        let (last, _) = self.range(Position::MIN, Position::MAX, true).next()?;
        let threshold = if hint > last { self.live_bytes / 8 * 7 } else { self.live_bytes / 2 };
        let mut bytes = 0;
        let mut first = true;
        for (position, value) in self.all() {
            if !first && (bytes >= threshold || position == last) {
                return Some(position);
            }
            first = false;
            bytes += self.counted(value.bytes().len());
        }
        None
    }

    /// Splits off what stands at `at` and after it. The rest keeps id and image (readers clip it); the new half has none.
    pub fn split_off(&mut self, at: Position) -> Self {
        let (mut left, mut right) = (Run::default(), Run::default());
        for (position, value) in self.all_older() {
            if position < at { &mut left } else { &mut right }.push(position, value.bytes());
        }
        left.shrink();
        right.shrink();
        let mut half = Self::empty(self.level, self.limits, at, self.limit);
        half.base = Arc::new(right);
        half.recent = self.recent.split_off(&at);
        half.unimaged = self.unimaged.split_off(&at);
        half.oldest = self.oldest;
        half.newest = self.newest;
        self.base = Arc::new(left);
        self.frozen.clear();
        self.limit = Some(at);
        self.recount();
        half.recount();
        half
    }

    /// `base` and the oldest layers of `frozen` as one run: what may replace them.
    pub fn fold(base: &Run, frozen: &[Arc<Changes>]) -> Run {
        let mut run = Run::default();
        let layers = frozen.iter().rev().map(|layer| &**layer);
        for (position, value) in Merged::new(layers, base, Position::MIN, Position::MAX, false) {
            if let Some(value) = value {
                run.push(position, value.bytes());
            }
        }
        run.shrink();
        run
    }
}

/// The pointer to a node without an image, encoded.
pub(super) fn pointer_without_image(node: NodeId) -> Value {
    encode_pointer(&NodePointer { node, written_bytes: 0, bset_count: 0, last_checksum: 0, copies: SmallVec::new() })
}

/// A pointer as the value of an interior node's key.
pub(super) fn encode_pointer(pointer: &NodePointer) -> Value {
    let mut bytes = Vec::with_capacity(19 + 9 * pointer.copies.len());
    pointer.encode(&mut bytes);
    Value::from(bytes)
}
