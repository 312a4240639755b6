//! Finding nodes: descent from the root with one short shared lock at a time, and reading what is not in memory.
//!
//! A descent may be overtaken by splits and merges: a node that is retired, or does not cover the position, means "again from the
//! root". A node that was read is published in the cache only if its parent still points to what was read, checked under the
//! parent's shared lock: so an old image never comes back after the node was changed, written and evicted.

use super::image::{Expected, is_pointer};
use super::node::{Content, Node};
use super::{Forest, Scan};
use crate::error::{Error, Result};
use crate::format::node::NodePointer;
use crate::format::{BtreeId, Position, Value};
use crate::sync::Arc;
use crate::sync::atomic::Ordering;
use crate::units::{JournalSequence, NodeId};

/// Overtaken this often in one descent is damage or a bug, not contention.
const RETRIES_MAX: u32 = 10_000;

/// A node and its parent as a descent has seen them; both may have changed since.
pub(super) struct Found {
    pub node: Arc<Node>,
    pub parent: Option<Arc<Node>>,
}

/// What [`Forest::scan_around`] comes by.
#[derive(Debug)]
pub enum Around {
    /// Keys.
    Keys(Scan),
    /// Nothing can be read up to `to`, inclusive.
    Lost {
        /// Last position of the node that is lost.
        to: Position,
        /// Why.
        error: Error,
    },
}

/// A node is being read: others wait for that.
struct Loading<'f>(&'f Forest, NodeId);

impl Drop for Loading<'_> {
    fn drop(&mut self) {
        self.0.loading.lock().remove(&self.1);
        self.0.loaded.notify();
    }
}

impl Forest {
    /// The root of a tree.
    pub(super) fn root(&self, btree: BtreeId) -> Arc<Node> {
        // One slot for each tree.
        Arc::clone(&self.roots[btree as usize].read())
    }

    /// The node of `level` whose range holds `position`; `None` if the tree is lower.
    pub(super) fn find(&self, btree: BtreeId, position: Position, level: u8) -> Result<Option<Found>> {
        for attempt in 0..RETRIES_MAX {
            if attempt > 16 && !self.env.is_simulated() {
                std::thread::yield_now();
            }
            let mut node = self.root(btree);
            let mut parent = None;
            if node.level < level {
                return Ok(None);
            }
            loop {
                let (child_minimum, pointer) = {
                    let content = node.content.read();
                    if !content.covers(position) {
                        break;
                    }
                    if node.level == level {
                        drop(content);
                        return Ok(Some(Found { node, parent }));
                    }
                    let Some((child_minimum, value)) = content.child(position) else {
                        let what = format!("node {} of the {} tree", node.id, btree.name());
                        return Err(Error::corrupt(what, format!("it has no child for {position}")));
                    };
                    (child_minimum, NodePointer::decode(value.bytes())?)
                };
                let child = match self.cache.get(pointer.node) {
                    Some(child) => child,
                    None => match self.load(&node, child_minimum, &pointer)? {
                        Some(child) => child,
                        None => break,
                    },
                };
                // Levels descend by one: so the loop ends, whatever the image holds.
                if child.level + 1 != node.level || child.btree != btree {
                    let what = format!("node {} of the {} tree, level {}", node.id, btree.name(), node.level);
                    let found = format!("node {} of the {} tree, level {}", child.id, child.btree.name(), child.level);
                    return Err(Error::corrupt(what, format!("its child is {found}")));
                }
                parent = Some(std::mem::replace(&mut node, child));
            }
        }
        // Damage can look like it: two parents that name one node.
        Err(Error::corrupt(format!("{} tree", btree.name()), format!("no way leads to {position}")))
    }

    /// The leaf whose range holds `position`.
    pub(super) fn find_leaf(&self, btree: BtreeId, position: Position) -> Result<Arc<Node>> {
        match self.find(btree, position, 0)? {
            Some(found) => Ok(found.node),
            None => Err(Error::Bug(format!("the {} tree has no level 0", btree.name()))),
        }
    }

    /// Reads a child that is not in memory. `None` if the parent no longer points to what was read.
    fn load(&self, parent: &Arc<Node>, minimum: Position, pointer: &NodePointer) -> Result<Option<Arc<Node>>> {
        if pointer.copies.is_empty() {
            // It was in memory when the parent was looked at, or it is gone by now.
            return match parent.content.read().unimaged.get(&minimum) {
                Some(child) if child.id == pointer.node => Ok(Some(Arc::clone(child))),
                _ => Ok(None),
            };
        }
        if !self.loading.lock().insert(pointer.node) {
            let id = pointer.node;
            self.env.wait(&self.loaded, || (!self.loading.lock().contains(&id)).then_some(()))?;
            return Ok(None);
        }
        let loading = Loading(self, pointer.node);
        let outcome = self.load_alone(parent, minimum, pointer);
        drop(loading);
        if outcome.is_ok() {
            self.shrink_cache(256);
        }
        outcome
    }

    fn load_alone(&self, parent: &Arc<Node>, minimum: Position, pointer: &NodePointer) -> Result<Option<Arc<Node>>> {
        let limit = parent.content.read().child_limit(minimum);
        let expected = Expected { btree: parent.btree, level: parent.level.saturating_sub(1), minimum, limit };
        let node = match self.read_node(pointer, &expected) {
            Ok(node) => node,
            Err(error) => {
                // The slot may have been reused under us if the pointer was an old one.
                let content = parent.content.read();
                let unchanged = content.covers(minimum)
                    && content.get(minimum).is_some_and(|value| is_pointer(value.bytes(), pointer))
                    && content.child_limit(minimum) == limit;
                return if unchanged { Err(error) } else { Ok(None) };
            }
        };
        let content = parent.content.read();
        if !content.covers(minimum)
            || content.get(minimum).is_none_or(|value| !is_pointer(value.bytes(), pointer))
            || content.child_limit(minimum) != limit
        {
            return Ok(None);
        }
        // Locked until it is listed, if it is dirty: a commit that found it in between would take it for listed, and a checkpoint miss its change.
        let mut inside = node.content.write();
        let bytes = inside.memory_bytes();
        let present = self.cache.insert(Arc::clone(&node), bytes);
        if Arc::ptr_eq(&present, &node) {
            self.note_tiny(&node, &mut inside);
            self.list_if_dirty(&node, &mut inside);
        }
        drop(inside);
        Ok(Some(present))
    }

    /// Reads a node from its image. If a copy is bad, the node is dirty from the start: its next image is a full one elsewhere.
    pub(super) fn read_node(&self, pointer: &NodePointer, expected: &Expected) -> Result<Arc<Node>> {
        let (image, repair) = self.reader.read(pointer, expected)?;
        let mut content = Content::empty(expected.level, self.limits, expected.minimum, expected.limit);
        content.base = Arc::new(image.run);
        content.image = Some(pointer.clone());
        content.newest = image.newest;
        content.recount();
        if repair {
            content.rewrite = true;
            // What will never be written must not stay in memory for it.
            if self.writes() {
                let _ = content.touch(JournalSequence(0));
            }
        }
        let node = Node::new(pointer.node, expected.btree, content);
        // A scan passes once: only a second use makes it worth keeping.
        node.referenced.store(false, Ordering::Relaxed);
        Ok(node)
    }

    /// Evicts down to the budget, looking at no more than `steps_max` nodes: most may be dirty, and cannot go.
    pub(super) fn shrink_cache(&self, steps_max: usize) {
        let evicted = self.cache.evict(self.cache_bytes.load(Ordering::Relaxed), steps_max);
        self.metrics.btree_evictions.add(evicted);
    }

    /// The value at `position`.
    ///
    /// # Errors
    /// If a node on the way cannot be read.
    pub fn get(&self, btree: BtreeId, position: Position) -> Result<Option<Value>> {
        loop {
            let leaf = self.find_leaf(btree, position)?;
            let content = leaf.content.read();
            if content.covers(position) {
                return Ok(content.get(position).map(|value| value.to_value()));
            }
        }
    }

    /// Keys from `from` up to `to`, both inclusive, ascending, of one leaf at most, at most `limit`. Everything in
    /// `[from, covered_to]` was seen: go on after `covered_to` while it is below `to`.
    ///
    /// # Errors
    /// If a node on the way cannot be read.
    pub fn scan(&self, btree: BtreeId, from: Position, to: Position, limit: usize) -> Result<Scan> {
        loop {
            let leaf = self.find_leaf(btree, from)?;
            let content = leaf.content.read();
            if !content.covers(from) {
                continue;
            }
            let covered_to = to.min(content.last_position());
            let keys: Vec<_> =
                content.range(from, covered_to, false).take(limit).map(|(at, value)| (at, value.to_value())).collect();
            let covered_to = match keys.last() {
                Some(&(last, _)) if keys.len() >= limit => last,
                _ => covered_to,
            };
            return Ok(Scan { keys, covered_to });
        }
    }

    /// As [`Self::scan`], descending: from `from` down to `to`, both inclusive. Everything in `[covered_to, from]` was seen.
    ///
    /// # Errors
    /// If a node on the way cannot be read.
    pub fn scan_back(&self, btree: BtreeId, from: Position, to: Position, limit: usize) -> Result<Scan> {
        loop {
            let leaf = self.find_leaf(btree, from)?;
            let content = leaf.content.read();
            if !content.covers(from) {
                continue;
            }
            let covered_to = to.max(content.minimum);
            let keys: Vec<_> =
                content.range(covered_to, from, true).take(limit).map(|(at, value)| (at, value.to_value())).collect();
            let covered_to = match keys.last() {
                Some(&(last, _)) if keys.len() >= limit => last,
                _ => covered_to,
            };
            return Ok(Scan { keys, covered_to });
        }
    }

    /// As [`Self::scan`], but names the range of a node that is lost, so that it can be jumped over. Always goes forward.
    pub fn scan_around(&self, btree: BtreeId, from: Position, to: Position, limit: usize) -> Around {
        match self.scan(btree, from, to, limit) {
            Ok(scan) => Around::Keys(scan),
            Err(error) => Around::Lost { to: self.lost_until(btree, from, 0).min(to), error },
        }
    }

    /// The last position of the lost node, at or above `level`, in whose range `position` is. What is known of ranges is above it.
    pub(super) fn lost_until(&self, btree: BtreeId, position: Position, level: u8) -> Position {
        let root = self.root(btree);
        for above in level + 1..=root.level {
            let Ok(Some(found)) = self.find(btree, position, above) else { continue };
            let content = found.node.content.read();
            let limit = match content.child(position) {
                Some((minimum, _)) => content.child_limit(minimum),
                None => content.limit,
            };
            return limit.and_then(Position::predecessor).unwrap_or(Position::MAX).max(position);
        }
        Position::MAX
    }
}
