//! Locking the leaves of a commit.
//!
//! All leaves are found, and read in, before any is locked. They are then locked in (tree, position) order, with no look at the rest
//! of the tree meanwhile; a leaf that no longer covers what it was found for means unlocking all and starting again. Splits and
//! checkpoints lock a parent and then children, and wait for nothing else while they do: so a committer's wait always ends, and two
//! writers on different leaves never wait for each other.

use super::node::{Content, Node};
use super::{Forest, LeafTarget};
use crate::error::{Error, Result};
use crate::format::key::packed_bytes;
use crate::format::{BtreeId, Position, Value};
use crate::sync::atomic::Ordering;
use crate::sync::{Arc, OwnedReadGuard, OwnedWriteGuard};
use crate::units::JournalSequence;

enum Guard {
    Shared(OwnedReadGuard<Content>),
    Exclusive(OwnedWriteGuard<Content>),
}

impl Guard {
    fn content(&self) -> &Content {
        match self {
            Self::Shared(guard) => guard,
            Self::Exclusive(guard) => guard,
        }
    }
}

struct LockedLeaf {
    node: Arc<Node>,
    guard: Guard,
}

/// Leaves of a commit, locked. Dropping it unlocks them. Nothing that waits may be called while it lives.
pub struct LockedLeaves<'a> {
    forest: &'a Forest,
    /// In (tree, position) order.
    leaves: Vec<LockedLeaf>,
}

/// A leaf that was found, and the range of targets that it must cover.
struct Wanted {
    node: Arc<Node>,
    write: bool,
    first: Position,
    last: Position,
    limit: Option<Position>,
}

impl Forest {
    /// Locks the leaves that hold `targets`: exclusively where one of a leaf's targets is to be written, else shared. Sorts `targets`.
    /// Reads nodes if need be; waits for other commits, and shortly for splits and checkpoints.
    ///
    /// # Errors
    /// If a node cannot be read.
    pub fn lock_leaves(&self, targets: &mut Vec<LeafTarget>) -> Result<LockedLeaves<'_>> {
        targets.sort_unstable_by_key(|target| (target.btree, target.position, !target.write));
        targets.dedup_by_key(|target| (target.btree, target.position));
        for attempt in 0..100_000 {
            if attempt > 4 && !self.env.is_simulated() {
                std::thread::yield_now();
            }
            let wanted = self.find_wanted(targets)?;
            if let Some(leaves) = self.try_lock_all(wanted) {
                return Ok(leaves);
            }
        }
        Err(Error::Bug("a commit never finds its leaves in place".into()))
    }

    fn find_wanted(&self, targets: &[LeafTarget]) -> Result<Vec<Wanted>> {
        let mut wanted: Vec<Wanted> = Vec::with_capacity(targets.len());
        for target in targets {
            if let Some(leaf) = wanted.last_mut() {
                // Targets ascend, so only the upper bound needs a look.
                if leaf.node.btree == target.btree && leaf.limit.is_none_or(|limit| target.position < limit) {
                    leaf.last = target.position;
                    leaf.write |= target.write;
                    continue;
                }
            }
            let node = self.find_leaf(target.btree, target.position)?;
            let limit = node.content.read().limit;
            let (first, last) = (target.position, target.position);
            wanted.push(Wanted { node, write: target.write, first, last, limit });
        }
        Ok(wanted)
    }

    fn try_lock_all(&self, wanted: Vec<Wanted>) -> Option<LockedLeaves<'_>> {
        let mut leaves: Vec<LockedLeaf> = Vec::with_capacity(wanted.len());
        for leaf in wanted {
            // The range shrank since the leaf was found, and the next target led to it again: find them all anew.
            if leaves.last().is_some_and(|last| Arc::ptr_eq(&last.node, &leaf.node)) {
                return None;
            }
            let node = leaf.node;
            node.content.expect_order();
            let guard = if leaf.write {
                Guard::Exclusive(match node.content.try_write_owned() {
                    Some(guard) => guard,
                    None => self.contended(|| node.content.write_owned()),
                })
            } else {
                Guard::Shared(match node.content.try_read_owned() {
                    Some(guard) => guard,
                    None => self.contended(|| node.content.read_owned()),
                })
            };
            if !guard.content().covers(leaf.first) || !guard.content().covers(leaf.last) {
                return None;
            }
            leaves.push(LockedLeaf { node, guard });
        }
        Some(LockedLeaves { forest: self, leaves })
    }

    fn contended<T>(&self, lock: impl FnOnce() -> T) -> T {
        self.metrics.transaction_leaf_contended.increment();
        let started = self.env.monotonic();
        let during_checkpoint = self.checkpoint_running.load(Ordering::Relaxed);
        let guard = lock();
        if during_checkpoint {
            let waited = self.env.monotonic().saturating_sub(started);
            self.metrics.transaction_lock_wait_max_us.raise_to(u64::try_from(waited.as_micros()).unwrap_or(u64::MAX));
        }
        guard
    }
}

impl LockedLeaves<'_> {
    fn index(&self, btree: BtreeId, position: Position) -> Option<usize> {
        let after =
            self.leaves.partition_point(|leaf| (leaf.node.btree, leaf.guard.content().minimum) <= (btree, position));
        let index = after.checked_sub(1)?;
        let leaf = self.leaves.get(index)?;
        (leaf.node.btree == btree && leaf.guard.content().covers(position)).then_some(index)
    }

    fn content(&self, btree: BtreeId, position: Position) -> Option<&Content> {
        self.leaves.get(self.index(btree, position)?).map(|leaf| leaf.guard.content())
    }

    /// Whether a locked leaf covers this position.
    #[must_use]
    pub fn covers(&self, btree: BtreeId, position: Position) -> bool {
        self.index(btree, position).is_some()
    }

    /// The value at `position`, which is in a locked leaf.
    #[must_use]
    pub fn get(&self, btree: BtreeId, position: Position) -> Option<Value> {
        let value = self.content(btree, position)?.get(position)?;
        Some(value.to_value())
    }

    /// The keys in `[from, to]`; `None` if that is not inside one locked leaf.
    #[must_use]
    pub fn range(&self, btree: BtreeId, from: Position, to: Position) -> Option<Vec<(Position, Value)>> {
        let content = self.content(btree, from)?;
        if !content.covers(to) {
            return None;
        }
        Some(content.range(from, to, false).map(|(position, value)| (position, value.to_value())).collect())
    }

    /// Whether `bytes` more bytes of packed keys ([`crate::format::key::packed_bytes`]) fit the leaf at `position`: the sum over the
    /// transaction's keys of that leaf. If not: unlock, [`Forest::make_room`], start again.
    #[must_use]
    pub fn room(&self, btree: BtreeId, position: Position, bytes: usize) -> bool {
        self.content(btree, position).is_some_and(|content| content.has_room(bytes))
    }

    /// The first leaf that has no room for its share of `updates` (tree, position, packed bytes; in order): what to give to
    /// [`Forest::make_room`]. What the updates replace is taken off; a share that does not grow the leaf always fits. The position is in
    /// the middle of the leaf's updates, so that a transaction larger than a leaf is spread.
    #[must_use]
    pub fn full_leaf(
        &self,
        updates: impl Iterator<Item = (BtreeId, Position, usize)>,
    ) -> Option<(BtreeId, Position, usize)> {
        let mut share: Vec<(BtreeId, Position)> = Vec::new();
        let (mut added_bytes, mut replaced_bytes) = (0usize, 0usize);
        let mut share_index = None;
        let full = |share: &[(BtreeId, Position)], growth_bytes: usize| {
            let &(btree, middle) = share.get(share.len() / 2)?;
            (growth_bytes > 0 && !self.room(btree, middle, growth_bytes)).then_some((btree, middle, growth_bytes))
        };
        for (btree, position, bytes) in updates {
            let index = self.index(btree, position);
            if index != share_index {
                if let Some(found) = full(&share, added_bytes.saturating_sub(replaced_bytes)) {
                    return Some(found);
                }
                share.clear();
                (added_bytes, replaced_bytes) = (0, 0);
                share_index = index;
            }
            let leaf = index.and_then(|index| self.leaves.get(index));
            let replaced = leaf.and_then(|leaf| leaf.guard.content().get(position));
            share.push((btree, position));
            added_bytes += bytes;
            replaced_bytes += replaced.map_or(0, |value| packed_bytes(Some(value.bytes())));
        }
        full(&share, added_bytes.saturating_sub(replaced_bytes))
    }

    /// Puts a value, or deletes the key. The leaf is locked exclusively and has room. Cannot fail. Must happen before the journal
    /// reservation of `sequence` is appended: a checkpoint takes appended for applied.
    pub fn put(&mut self, btree: BtreeId, position: Position, value: Option<Value>, sequence: JournalSequence) {
        let index = self.index(btree, position);
        let leaf = index.and_then(|index| self.leaves.get_mut(index));
        let Some(LockedLeaf { node, guard: Guard::Exclusive(content) }) = leaf else {
            debug_assert!(false, "put at {position} of the {} tree without its lock", btree.name());
            tracing::error!("put at {position} of the {} tree without its lock: dropped", btree.name());
            self.forest.fail("a commit wrote to a leaf that it had not locked");
            return;
        };
        self.forest.put_locked(node, content, position, value, sequence);
    }
}

impl Forest {
    /// Puts into a node whose content the caller has locked exclusively.
    pub(super) fn put_locked(
        &self,
        node: &Arc<Node>,
        content: &mut Content,
        position: Position,
        value: Option<Value>,
        sequence: JournalSequence,
    ) {
        let deleted = value.is_none();
        let effect = content.put(position, value, sequence);
        if deleted {
            self.note_small(node, content);
        }
        self.cache.charge(node, effect.memory_delta);
        self.charge_slot(content);
        if effect.became_dirty {
            self.list_dirty(node);
        }
    }

    /// Puts one key of a journal record, at mount. After all of them: [`Self::end_replay`].
    ///
    /// # Errors
    /// If a node cannot be read, or the key is larger than a node.
    pub fn replay_put(
        &self,
        btree: BtreeId,
        position: Position,
        value: Option<Value>,
        sequence: JournalSequence,
    ) -> Result<()> {
        if btree == BtreeId::Buckets {
            self.replay_bucket(position, value.as_deref())?;
        }
        let bytes = packed_bytes(value.as_deref());
        loop {
            let mut leaves = self.lock_leaves(&mut vec![LeafTarget { btree, position, write: true }])?;
            let Some((.., growth_bytes)) = leaves.full_leaf(std::iter::once((btree, position, bytes))) else {
                leaves.put(btree, position, value, sequence);
                return Ok(());
            };
            drop(leaves);
            self.make_room(btree, position, growth_bytes)?;
        }
    }
}
