//! What fsck asks of the trees: whether a leaf is as it was published, an empty node in the place of one that is lost, and a node-space map that is
//! what can be reached.
//!
//! The last two change only what the next checkpoint publishes, so a power cut before it leaves what was there. Until that checkpoint nobody may put a key
//! into a node that was replaced: replay would look for it in the lost one. No lock is held while a node is read.

use super::image::{Expected, is_pointer};
use super::node::{Content, Node, pointer_without_image};
use super::{Forest, PublishedNode};
use crate::error::{Error, Result};
use crate::format::node::NodePointer;
use crate::format::{BtreeId, Position, Value};
use crate::sync::Arc;
use crate::sync::atomic::Ordering;

/// Slots of a bucket that hold nodes: device, bucket, one bit for each slot.
pub type UsedSlots = (u8, u64, u64);

impl Forest {
    /// Whether the tree holds in a published leaf's range just what the leaf's image holds: nothing was put there, split or merged since.
    ///
    /// # Errors
    /// If a node above it cannot be read.
    pub fn is_as_published(&self, leaf: &PublishedNode) -> Result<bool> {
        let PublishedNode { btree, level, pointer, minimum, limit, .. } = leaf;
        let root = self.root(*btree);
        let in_memory = if root.level == *level { Some(root) } else { self.cache.get(pointer.node) };
        if let Some(node) = in_memory {
            let content = node.content.read();
            return Ok(!content.retired
                && (content.minimum, content.limit) == (*minimum, *limit)
                && content.image.as_ref() == Some(pointer)
                && content.recent.is_empty()
                && content.frozen.is_empty());
        }
        let Some(above) = self.find(*btree, *minimum, level + 1)? else { return Ok(false) };
        let content = above.node.content.read();
        Ok(content.covers(*minimum)
            && content.get(*minimum).is_some_and(|value| is_pointer(value.bytes(), pointer))
            && content.child_limit(*minimum) == *limit)
    }

    /// Puts a new node in the place of the one of `level` whose range holds `at`, if no copy of that can be read. It holds `keys` (a leaf alone may
    /// have any; those outside of its range are left out). Returns whether it was so.
    ///
    /// # Errors
    /// If a node above cannot be read; [`Error::Corrupt`] for a root; [`Error::Invalid`] if the keys do not fit a node.
    pub fn replace_unreadable(
        &self,
        btree: BtreeId,
        level: u8,
        at: Position,
        keys: &[(Position, Value)],
    ) -> Result<bool> {
        loop {
            let Some(found) = self.find(btree, at, level + 1)? else {
                return Err(Error::corrupt(format!("root of the {} tree", btree.name()), "no copy of it is good"));
            };
            let parent = found.node;
            let (minimum, limit, pointer) = {
                let content = parent.content.read();
                let Some((minimum, value)) = content.child(at).filter(|_| content.covers(at)) else { continue };
                (minimum, content.child_limit(minimum), NodePointer::decode(value.bytes())?)
            };
            let expected = Expected { btree, level, minimum, limit };
            if self.cache.get(pointer.node).is_some() || self.reader.read(&pointer, &expected).is_ok() {
                return Ok(false);
            }
            let _structure = self.structure.read();
            let mut above = parent.content.write();
            let is_there = above.covers(minimum)
                && above.get(minimum).is_some_and(|value| is_pointer(value.bytes(), &pointer))
                && above.child_limit(minimum) == limit;
            if !is_there {
                continue;
            }
            let sequence = above.newest;
            let mut leaf = Content::empty(0, self.limits, minimum, limit);
            for (position, value) in
                keys.iter().filter(|(position, _)| leaf.covers(*position)).cloned().collect::<Vec<_>>()
            {
                let _ = leaf.put(position, Some(value), sequence);
            }
            if leaf.live_bytes > self.limits.capacity_bytes {
                return Err(Error::Invalid(format!("{} bytes of keys in one node", leaf.live_bytes)));
            }
            let mut node = self.add_unwritten(btree, leaf);
            for level in 1..=level {
                let mut content = Content::empty(level, self.limits, minimum, limit);
                let _ = content.put(minimum, Some(pointer_without_image(node.id)), sequence);
                content.unimaged.insert(minimum, node);
                node = self.add_unwritten(btree, content);
                self.node_count.fetch_add(1, Ordering::Relaxed);
            }
            self.put_locked(&parent, &mut above, minimum, Some(pointer_without_image(node.id)), sequence);
            above.unimaged.insert(minimum, node);
            return Ok(true);
        }
    }

    /// Has the next checkpoint write the node of `level` whose range holds `at` whole, elsewhere: a copy of it is bad.
    ///
    /// # Errors
    /// If no copy can be read, or a node above it.
    pub fn rewrite_node(&self, btree: BtreeId, level: u8, at: Position) -> Result<()> {
        let Some(found) = self.find(btree, at, level)? else { return Ok(()) };
        let mut content = found.node.content.write();
        if content.retired || content.rewrite || content.image.is_none() {
            return Ok(());
        }
        content.rewrite = true;
        let newest = content.newest;
        let became_dirty = content.touch(newest);
        self.charge_slot(&mut content);
        if became_dirty {
            self.list_dirty(&found.node);
        }
        Ok(())
    }

    /// A node with no image, in the cache and listed as dirty.
    fn add_unwritten(&self, btree: BtreeId, mut content: Content) -> Arc<Node> {
        let sequence = content.newest;
        let _ = content.touch(sequence);
        self.charge_slot(&mut content);
        let bytes = content.memory_bytes();
        let node = self.cache.insert(Node::new(self.new_node_id(), btree, content), bytes);
        self.list_dirty(&node);
        node
    }

    /// Makes `used`, found by walking checkpoint `number`, the slots that the newest checkpoint uses, whatever its map says; the next checkpoint
    /// stores them. Returns `false`, and does nothing, if that is no longer the newest, or another is being made.
    ///
    /// # Errors
    /// [`Error::Corrupt`] if there can be no such slots.
    pub fn correct_used_slots(&self, number: u64, used: &[UsedSlots]) -> Result<bool> {
        if !self.try_begin() {
            return Ok(false);
        }
        let is_newest = self.kept.lock().newest.number == number;
        let outcome = if is_newest { self.space.lock().correct_newest(used).map(|()| true) } else { Ok(false) };
        self.checkpoint_running.store(false, Ordering::Release);
        self.checkpoint_event.notify();
        outcome
    }
}
