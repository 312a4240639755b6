//! Splits and merges.
//!
//! The caller holds no lock. A split locks the parent exclusively, then the node; a split of a root locks the tree's root slot, then
//! the node. Full parents are split on the way down, so that a split never has to go up. Every split and merge holds `structure`
//! shared, so that a checkpoint can hold them all off for a moment. No I/O is done under any of these locks.

use super::Forest;
use super::node::{Content, Node, encode_pointer, pointer_without_image};
use crate::error::{Error, Result};
use crate::format::{BtreeId, Position};
use crate::sync::Arc;
use crate::sync::atomic::Ordering;
use crate::units::NodeId;

use super::image::LEVEL_MAX;

impl Forest {
    /// Makes room towards `bytes` more bytes of packed keys in the leaf of `position`, by splitting it once. The caller holds no leaf.
    /// It looks again afterwards, and calls again if its keys still do not fit.
    ///
    /// # Errors
    /// If a node cannot be read; [`Error::Invalid`] if so much can never be in one leaf.
    pub fn make_room(&self, btree: BtreeId, position: Position, bytes: usize) -> Result<()> {
        // Each round splits one node or is overtaken by another split.
        for _ in 0..10_000 {
            let mut level = self.root(btree).level;
            let mut done = true;
            loop {
                let Some(found) = self.find(btree, position, level)? else { break };
                let roomy = {
                    let content = found.node.content.read();
                    if level == 0 { content.has_room(bytes) } else { content.has_room_for_child() }
                };
                if !roomy {
                    let split =
                        self.split(found.parent.as_ref(), &found.node, position, if level == 0 { bytes } else { 0 })?;
                    if split && level == 0 {
                        // The caller's keys may be spread over both halves now: it asks again if this was not enough.
                        return Ok(());
                    }
                    done = false;
                    break;
                }
                match level.checked_sub(1) {
                    Some(below) => level = below,
                    None => break,
                }
            }
            if done {
                return Ok(());
            }
        }
        Err(Error::Bug(format!("splitting makes no room at {position} of the {} tree", btree.name())))
    }

    /// A node id that was never used.
    pub(super) fn new_node_id(&self) -> NodeId {
        NodeId(self.next_node.fetch_add(1, Ordering::Relaxed))
    }

    /// Where to split a node that lacks room for `bytes` at `position`.
    fn choose_split(&self, content: &Content, position: Position, bytes: usize) -> Result<Position> {
        let nearly_empty = content.level == 0 && content.live_bytes <= self.limits.capacity_bytes / 4;
        if !nearly_empty && let Some(at) = content.split_position(position) {
            return Ok(at);
        }
        // Much is coming into a leaf that has little: what comes before `position` goes to one side, the rest to the other.
        if content.level == 0 && content.minimum < position {
            return Ok(position);
        }
        // Or all that is there goes to the right.
        let first = content.all().next().map(|(first, _)| first);
        if let Some(first) = first.filter(|&first| content.level == 0 && position < first) {
            return Ok(first);
        }
        Err(Error::Invalid(format!(
            "{bytes} bytes of keys at {position} do not fit a node of {} bytes",
            self.limits.node_bytes
        )))
    }

    /// Splits `node` if it is still where it was found and still lacks room. Returns whether it did.
    fn split(&self, parent: Option<&Arc<Node>>, node: &Arc<Node>, position: Position, bytes: usize) -> Result<bool> {
        let _structure = self.structure.read();
        let Some(parent) = parent else { return self.split_root(node, position, bytes) };
        let mut above = parent.content.write();
        let mut content = node.content.write();
        let minimum = content.minimum;
        let in_place = above.covers(minimum) && content.covers(position) && Self::points_to(&above, minimum, node.id);
        let lacks_room = if node.level == 0 { !content.has_room(bytes) } else { !content.has_room_for_child() };
        if !in_place || !lacks_room || !above.has_room_for_child() {
            return Ok(false);
        }
        let at = self.choose_split(&content, position, bytes)?;
        let half = self.split_content(node, &mut content, at);
        let sequence = content.newest;
        self.put_locked(parent, &mut above, at, Some(pointer_without_image(half.id)), sequence);
        above.unimaged.insert(at, half);
        Ok(true)
    }

    fn split_root(&self, node: &Arc<Node>, position: Position, bytes: usize) -> Result<bool> {
        let mut slot = self.roots[node.btree as usize].write();
        if !Arc::ptr_eq(&slot, node) {
            return Ok(false);
        }
        let mut content = node.content.write();
        let lacks_room = if node.level == 0 { !content.has_room(bytes) } else { !content.has_room_for_child() };
        if !lacks_room {
            return Ok(false);
        }
        if node.level + 1 >= LEVEL_MAX {
            return Err(Error::Bug(format!("the {} tree would have more than {LEVEL_MAX} levels", node.btree.name())));
        }
        let at = self.choose_split(&content, position, bytes)?;
        let half = self.split_content(node, &mut content, at);
        let mut above = Content::empty(node.level + 1, self.limits, Position::MIN, None);
        let sequence = content.newest;
        let left = match &content.image {
            Some(pointer) => encode_pointer(pointer),
            None => {
                above.unimaged.insert(content.minimum, Arc::clone(node));
                pointer_without_image(node.id)
            }
        };
        above.put(content.minimum, Some(left), sequence);
        above.put(at, Some(pointer_without_image(half.id)), sequence);
        above.unimaged.insert(at, half);
        self.charge_slot(&mut above);
        let bytes = above.memory_bytes();
        let root = Node::new(self.new_node_id(), node.btree, above);
        self.list_dirty(&root);
        *slot = self.cache.insert(root, bytes);
        self.node_count.fetch_add(1, Ordering::Relaxed);
        Ok(true)
    }

    /// Splits the content; the new half is in the cache and listed as dirty.
    fn split_content(&self, node: &Arc<Node>, content: &mut Content, at: Position) -> Arc<Node> {
        let mut half = content.split_off(at);
        half.dirty = true;
        self.charge_slot(&mut half);
        let bytes = half.memory_bytes();
        let half = self.cache.insert(Node::new(self.new_node_id(), node.btree, half), bytes);
        self.list_dirty(&half);
        self.cache.recharge(node, content.memory_bytes());
        self.node_count.fetch_add(1, Ordering::Relaxed);
        self.metrics.btree_splits.increment();
        half
    }

    /// Whether the child at `minimum` is this node.
    pub(super) fn points_to(above: &Content, minimum: Position, id: NodeId) -> bool {
        above
            .get(minimum)
            .and_then(|value| crate::format::node::NodePointer::decode(value.bytes()).ok())
            .is_some_and(|pointer| pointer.node == id)
    }
}
