//! Nodes in memory, by id, within a byte budget.
//!
//! A node may leave only while nobody but the cache refers to it. Whoever needs one to stay holds an `Arc`: the list of dirty
//! nodes, parents of children without an image, a running checkpoint, the table of roots, and every user on the way through.
//! So eviction can never lose a change or race with a use.
//!
//! Locks: a shard (lookup, insertion), or the clock's queue, then a shard. Never held over anything else.

use std::collections::VecDeque;

use hashbrown::HashMap;

use super::node::Node;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Arc, Mutex};
use crate::units::NodeId;

const SHARDS: usize = 16;

#[derive(Debug, Default)]
pub(super) struct NodeCache {
    shards: [Mutex<HashMap<NodeId, Arc<Node>>>; SHARDS],
    /// The clock: nodes in the order in which they are looked at for eviction.
    clock: Mutex<VecDeque<NodeId>>,
    bytes: AtomicU64,
    peak_bytes: AtomicU64,
}

impl NodeCache {
    fn shard(&self, id: NodeId) -> &Mutex<HashMap<NodeId, Arc<Node>>> {
        // In range by the modulo.
        &self.shards[(id.0 as usize) % SHARDS]
    }

    /// The node, if it is in memory. Counts as a use.
    pub fn get(&self, id: NodeId) -> Option<Arc<Node>> {
        let node = self.shard(id).lock().get(&id).cloned()?;
        node.referenced.store(true, Ordering::Relaxed);
        Some(node)
    }

    /// Adds a node that takes `bytes`; if it is there already, that one is returned instead.
    pub fn insert(&self, node: Arc<Node>, bytes: usize) -> Arc<Node> {
        {
            let mut shard = self.shard(node.id).lock();
            if let Some(present) = shard.get(&node.id) {
                return Arc::clone(present);
            }
            shard.insert(node.id, Arc::clone(&node));
        }
        self.recharge(&node, bytes);
        self.clock.lock().push_back(node.id);
        node
    }

    /// Takes a node out: it is no longer in its tree.
    pub fn remove(&self, node: &Node) {
        self.shard(node.id).lock().remove(&node.id);
        self.recharge(node, 0);
    }

    /// Sets what a node is charged.
    pub fn recharge(&self, node: &Node, bytes: usize) {
        let before = node.charged_bytes.swap(bytes as u64, Ordering::Relaxed);
        self.add((bytes as u64).wrapping_sub(before));
    }

    /// Changes what a node is charged.
    pub fn charge(&self, node: &Node, delta: i64) {
        node.charged_bytes.fetch_add(delta as u64, Ordering::Relaxed);
        self.add(delta as u64);
    }

    /// Adds a difference, which wraps around if it is negative.
    fn add(&self, delta: u64) {
        let after = self.bytes.fetch_add(delta, Ordering::Relaxed).wrapping_add(delta);
        self.peak_bytes.fetch_max(after, Ordering::Relaxed);
    }

    /// Bytes of all nodes in memory.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// The most that they ever took.
    pub fn peak_bytes(&self) -> u64 {
        self.peak_bytes.load(Ordering::Relaxed)
    }

    /// Evicts until at most `budget_bytes` are left, or `steps_max` nodes were looked at, or all. Returns how many went.
    pub fn evict(&self, budget_bytes: u64, steps_max: usize) -> u64 {
        if self.bytes() <= budget_bytes {
            return 0;
        }
        let mut evicted = 0;
        // Two rounds: the first takes the marks away.
        let mut steps = steps_max.min(2 * self.clock.lock().len());
        while steps > 0 && self.bytes() > budget_bytes {
            steps -= 1;
            let Some(id) = self.clock.lock().pop_front() else { break };
            let gone = {
                let mut shard = self.shard(id).lock();
                match shard.get(&id) {
                    // Removed meanwhile: the clock forgets it.
                    None => continue,
                    Some(node) if node.referenced.swap(false, Ordering::Relaxed) => None,
                    // Under the shard's lock nobody can get a new reference, and there is none but ours.
                    Some(node) if Arc::strong_count(node) == 1 => shard.remove(&id),
                    Some(_) => None,
                }
            };
            match gone {
                Some(node) => {
                    self.recharge(&node, 0);
                    evicted += 1;
                }
                None => self.clock.lock().push_back(id),
            }
        }
        evicted
    }
}
