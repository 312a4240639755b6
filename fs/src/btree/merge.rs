//! Merging small nodes, and dropping roots that have one child. Done by the checkpoint alone, before it fixes F: so no merge happens
//! while nodes are serialised.
//!
//! Two neighbours below one parent become a new node, with an id of its own and no image; both are retired. Locks: the parent, then the
//! two in position order, all exclusively; both are in memory before anything is locked.

use super::node::{Content, Node, pointer_without_image};
use super::run::Run;
use super::{Forest, MergeCandidate};
use crate::error::Result;
use crate::format::node::NodePointer;
use crate::format::{BtreeId, Position};
use crate::sync::Arc;
use crate::sync::atomic::Ordering;

/// Most merges by one checkpoint.
const MERGES_MAX: usize = 512;
/// Merges that one checkpoint makes whatever is dirty.
const MERGES_MIN: usize = 4;
/// From so much of the cap on dirty nodes on it makes no more: they make nodes dirty, and the reserve is for the cap.
const MERGE_DIRTY_PERMILLE: u64 = 500;

/// A node with less than this part of the capacity in it is nearly empty.
const TINY_PART: usize = 16;

impl Forest {
    /// Remembers a node that has shrunk, once until it is looked at. Its content is locked by the caller.
    pub(super) fn note_small(&self, node: &Node, content: &mut Content) {
        if !content.merge_noted && content.live_bytes < self.limits.capacity_bytes / 4 {
            content.merge_noted = true;
            self.small_nodes.lock().insert((node.level, node.btree, content.minimum));
        }
    }

    /// Merges what has become small since the last time.
    pub(super) fn merge_small_nodes(&self) -> Result<()> {
        for merges in 0..MERGES_MAX {
            if merges >= MERGES_MIN && self.dirty_permille() >= MERGE_DIRTY_PERMILLE {
                break;
            }
            // Leaves first: what that makes of their parents is seen in the same go.
            let Some((level, btree, minimum)) = self.small_nodes.lock().pop_first() else { break };
            match self.merge_small((level, btree, minimum)).and_then(|()| self.collapse_root(btree)) {
                // A neighbour that cannot be read stays alone: it must not keep all others from being written.
                Err(error) if error.is_media_error() => tracing::warn!("nodes are not merged: {error}"),
                other => other?,
            }
        }
        Ok(())
    }

    fn merge_small(&self, (level, btree, minimum): MergeCandidate) -> Result<()> {
        let Some(found) = self.find(btree, minimum, level)? else { return Ok(()) };
        let (node, Some(parent)) = (found.node, found.parent) else { return Ok(()) };
        let limit = {
            let mut content = node.content.write();
            content.merge_noted = false;
            if content.retired || content.minimum != minimum {
                return Ok(());
            }
            content.limit
        };
        // With the right neighbour, or else the left one, if they are below the same parent.
        let right = limit.map(|limit| (minimum, limit));
        let left = {
            let above = parent.content.read();
            let before = minimum.predecessor().filter(|&before| above.covers(before));
            before.and_then(|before| above.child(before)).map(|(before, _)| (before, minimum))
        };
        for (left_at, right_at) in right.into_iter().chain(left) {
            let Some(left) = self.find(btree, left_at, level)? else { return Ok(()) };
            let Some(right) = self.find(btree, right_at, level)? else { return Ok(()) };
            if self.merge(&parent, &left.node, &right.node) {
                break;
            }
        }
        Ok(())
    }

    /// Whether what two neighbours hold fits one node with room to spare. A nearly empty one goes into one that is fuller.
    fn may_merge(&self, left_bytes: usize, right_bytes: usize) -> bool {
        let capacity = self.limits.capacity_bytes;
        let is_tiny = left_bytes.min(right_bytes) < capacity / TINY_PART;
        left_bytes + right_bytes <= if is_tiny { capacity / 4 * 3 } else { capacity / 2 }
    }

    /// Remembers a node that has just been read, if it is nearly empty: nobody may be left who remembers when it shrank.
    pub(super) fn note_tiny(&self, node: &Node, content: &mut Content) {
        if content.live_bytes < self.limits.capacity_bytes / TINY_PART {
            self.note_small(node, content);
        }
    }

    /// Merges two neighbours if they are still that, and fit a node with room to spare. Returns whether it did.
    fn merge(&self, parent: &Arc<Node>, left: &Arc<Node>, right: &Arc<Node>) -> bool {
        let _structure = self.structure.read();
        let mut above = parent.content.write();
        let mut first = left.content.write();
        if Arc::ptr_eq(left, right) {
            return false;
        }
        let mut second = right.content.write();
        let (left_at, right_at) = (first.minimum, second.minimum);
        let in_place = above.covers(left_at)
            && above.covers(right_at)
            && !first.retired
            && !second.retired
            && first.limit == Some(right_at)
            && Self::points_to(&above, left_at, left.id)
            && Self::points_to(&above, right_at, right.id);
        if !in_place || !self.may_merge(first.live_bytes, second.live_bytes) {
            return false;
        }
        let mut content = Content::empty(left.level, self.limits, left_at, second.limit);
        let mut base = Run::default();
        for (position, value) in first.all_older().chain(second.all_older()) {
            base.push(position, value.bytes());
        }
        content.base = Arc::new(base);
        content.recent = std::mem::take(&mut first.recent);
        content.recent.append(&mut second.recent);
        content.unimaged = std::mem::take(&mut first.unimaged);
        content.unimaged.append(&mut second.unimaged);
        content.newest = first.newest.max(second.newest);
        let oldest = [&first, &second].into_iter().filter(|half| half.dirty).map(|half| half.oldest).min();
        content.oldest = oldest.unwrap_or(content.newest);
        content.dirty = true;
        self.charge_slot(&mut content);
        content.recount();
        let sequence = content.newest;
        let bytes = content.memory_bytes();
        let merged = self.cache.insert(Node::new(self.new_node_id(), left.btree, content), bytes);
        self.list_dirty(&merged);
        for (node, half) in [(left, &mut first), (right, &mut second)] {
            self.retire(node, half);
        }
        // Retired, nobody looks at them; and the merged node stands before the right one in the order of locks.
        drop((first, second));
        self.put_locked(parent, &mut above, left_at, Some(pointer_without_image(merged.id)), sequence);
        self.put_locked(parent, &mut above, right_at, None, sequence);
        above.unimaged.remove(&right_at);
        // It may still be small: several neighbours become one in a row of such steps.
        self.note_small(&merged, &mut merged.content.write());
        above.unimaged.insert(left_at, merged);
        if let Some(below) = left.level.checked_sub(1) {
            // Two children have become neighbours below one parent.
            self.small_nodes.lock().insert((below, left.btree, right_at));
        }
        self.node_count.fetch_sub(1, Ordering::Relaxed);
        self.metrics.btree_merges.increment();
        true
    }

    fn retire(&self, node: &Node, content: &mut Content) {
        content.retired = true;
        self.unlist_dirty(node, content);
        self.cache.remove(node);
    }

    /// While a root has one child, the child becomes the root.
    fn collapse_root(&self, btree: BtreeId) -> Result<()> {
        loop {
            let root = self.root(btree);
            if root.level == 0 || root.content.read().live_keys != 1 {
                return Ok(());
            }
            let Some(child) = self.find(btree, Position::MIN, root.level - 1)? else { return Ok(()) };
            let _structure = self.structure.read();
            let mut slot = self.roots[btree as usize].write();
            let mut content = root.content.write();
            if !Arc::ptr_eq(&slot, &root)
                || content.live_keys != 1
                || content.retired
                || !Self::points_to(&content, Position::MIN, child.node.id)
            {
                return Ok(());
            }
            {
                // What the root's images pointed to is no longer reached through them.
                let mut kept = self.kept.lock();
                for (_, value) in content.all_older() {
                    kept.pending.replace(Some(&NodePointer::decode(value.bytes())?), None);
                }
            }
            content.unimaged.clear();
            self.retire(&root, &mut content);
            self.node_count.fetch_sub(1, Ordering::Relaxed);
            *slot = child.node;
        }
    }
}
