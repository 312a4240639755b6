//! Walking the trees of a checkpoint as they are on disk, for checkers and for tests: all nodes ([`walk_published`]), or the leaves of one tree in
//! order ([`stream_leaves`]). Nodes are read many at once and verified on all cores; the leaves are also
//! read ahead: a thread finds them, some read, one verifies, and the caller visits.
//!
//! **Memory**: a few batches of nodes, whose size the caller gives; for [`walk_published`] also 16 bytes for each copy of a node. No locks.

use std::collections::HashSet;

use crossbeam_channel::{Receiver, Sender, bounded};

use super::image::{Expected, LEVEL_MAX};
use super::keys::{Keys, SpareBuffers};
use super::reader::{Fetch, Fetched, NodeReader};
use crate::error::{Corruption, Error, Result};
use crate::format::checkpoint::{Checkpoint, Root};
use crate::format::node::{NodeAddress, NodePointer};
use crate::format::{BtreeId, Position};
use crate::sync::Arc;

/// Bytes of nodes that [`walk_published`] reads at once.
const WALK_BYTES: usize = 4 << 20;
/// Most nodes that it takes at once without reading them.
const WALK_NODES: usize = 4096;
/// Batches of leaves that are read at the same time: the device is never without work while one is waited for.
const READERS: usize = 2;

/// A node that a checkpoint reaches.
#[derive(Debug)]
pub struct PublishedNode {
    /// Tree.
    pub btree: BtreeId,
    /// 0 for leaves.
    pub level: u8,
    /// As its parent, or the record, holds it.
    pub pointer: NodePointer,
    /// Smallest position that it may hold.
    pub minimum: Position,
    /// First position beyond; `None` for no bound.
    pub limit: Option<Position>,
    /// What the verification of each copy that was read said; all of them, if none was good.
    pub copies: Vec<(NodeAddress, Result<()>)>,
    /// The keys, verified, whiteouts and what is out of range left out; the last copy's problem if none is good.
    pub keys: Result<Keys>,
}

impl PublishedNode {
    fn new((fetch, fetched): (Fetch, Fetched)) -> Self {
        let Expected { btree, level, minimum, limit } = fetch.expected;
        Self { btree, level, pointer: fetch.pointer, minimum, limit, copies: fetched.copies, keys: fetched.keys }
    }

    /// The last position that it may hold.
    #[must_use]
    pub fn last_position(&self) -> Position {
        self.limit.and_then(Position::predecessor).unwrap_or(Position::MAX)
    }
}

/// Calls `visitor` for each node that `checkpoint` reaches, parents before children. A node that cannot be read is reported, and its
/// children are left out. A slot that two pointers lead to is visited as damaged the second time: the walk ends on any input.
///
/// # Errors
/// The visitor's; [`Error::Corrupt`] for a root that cannot be understood.
pub fn walk_published(
    reader: &NodeReader,
    checkpoint: &Checkpoint,
    visitor: &mut dyn FnMut(&PublishedNode) -> Result<()>,
) -> Result<()> {
    walk(reader, checkpoint, true, visitor)
}

/// As [`walk_published`], but leaves are not read: they are visited with no keys, and their copies taken for good if there can be such.
///
/// # Errors
/// As [`walk_published`].
pub fn walk_interior(
    reader: &NodeReader,
    checkpoint: &Checkpoint,
    visitor: &mut dyn FnMut(&PublishedNode) -> Result<()>,
) -> Result<()> {
    walk(reader, checkpoint, false, visitor)
}

fn walk(
    reader: &NodeReader,
    checkpoint: &Checkpoint,
    reads_leaves: bool,
    visitor: &mut dyn FnMut(&PublishedNode) -> Result<()>,
) -> Result<()> {
    let spare: Arc<SpareBuffers> = Arc::default();
    let mut seen: HashSet<NodeAddress> = HashSet::new();
    let mut stack = Vec::new();
    for root in checkpoint.roots.iter().rev() {
        stack.push(root_of(root)?);
    }
    while !stack.is_empty() {
        let mut batch = Vec::new();
        let mut bytes = 0;
        while bytes < WALK_BYTES
            && let Some((pointer, expected)) = stack.pop()
        {
            let is_read = expected.level > 0 || reads_leaves;
            bytes += if is_read { pointer.written_bytes as usize * pointer.copies.len() } else { 0 };
            batch.push((is_read, pointer, expected));
            if !is_read && batch.len() >= WALK_NODES {
                break;
            }
        }
        let nodes = read_batch(reader, batch, &mut seen, &spare)?;
        for node in &nodes {
            visitor(node)?;
        }
        for node in nodes.iter().rev() {
            push_children(node, &mut stack)?;
        }
    }
    Ok(())
}

fn root_of(root: &Root) -> Result<(NodePointer, Expected)> {
    let btree = BtreeId::from_stored(root.btree)?;
    if root.level >= LEVEL_MAX {
        return Err(Error::corrupt(format!("root of the {} tree", btree.name()), format!("level {}", root.level)));
    }
    let expected = Expected { btree, level: root.level, minimum: Position::MIN, limit: None };
    Ok((NodePointer::decode(&root.pointer)?, expected))
}

/// Reads what is to be read.
fn read_batch(
    reader: &NodeReader,
    batch: Vec<(bool, NodePointer, Expected)>,
    seen: &mut HashSet<NodeAddress>,
    spare: &Arc<SpareBuffers>,
) -> Result<Vec<PublishedNode>> {
    let mut unread: Vec<Option<PublishedNode>> = Vec::with_capacity(batch.len());
    let mut fetches = Vec::new();
    let mut twice: HashSet<(usize, NodeAddress)> = HashSet::new();
    for (index, (is_read, pointer, expected)) in batch.into_iter().enumerate() {
        for &copy in pointer.copies.iter().filter(|copy| !seen.insert(**copy)) {
            twice.insert((index, copy));
        }
        if is_read {
            fetches.push(reader.prepare(pointer, expected, true, spare)?);
            unread.push(None);
        } else {
            let checked = reader.check_pointer(&pointer);
            let copies = pointer.copies.iter().map(|&address| (address, checked.clone())).collect();
            let Expected { btree, level, minimum, limit } = expected;
            let keys = checked.map(|()| Keys::default());
            unread.push(Some(PublishedNode { btree, level, pointer, minimum, limit, copies, keys }));
        }
    }
    reader.fetch(&mut fetches);
    let mut fetched = reader.decode_all(fetches, spare).into_iter().map(PublishedNode::new);
    let mut nodes: Vec<PublishedNode> = unread.into_iter().filter_map(|node| node.or_else(|| fetched.next())).collect();
    if !twice.is_empty() {
        for (index, node) in nodes.iter_mut().enumerate() {
            refuse_shared(node, &|address| twice.contains(&(index, address)));
        }
    }
    Ok(nodes)
}

/// A slot holds one node: what leads to it a second time is damage, and nothing is below it.
fn refuse_shared(node: &mut PublishedNode, is_second: &dyn Fn(NodeAddress) -> bool) {
    for (address, outcome) in &mut node.copies {
        if is_second(*address) {
            let problem = Corruption::new(format!("node {}", node.pointer.node), "two pointers lead to its slot");
            *outcome = Err(problem.at(address.device, address.offset).into());
        }
    }
    let problem = node.copies.iter().find_map(|(_, outcome)| outcome.clone().err());
    if let Some(problem) = problem.filter(|_| node.copies.iter().all(|(_, outcome)| outcome.is_err())) {
        node.keys = Err(problem);
    }
}

/// Puts the children of a node on a stack, the first on top.
fn push_children(node: &PublishedNode, stack: &mut Vec<(NodePointer, Expected)>) -> Result<()> {
    let Ok(keys) = &node.keys else { return Ok(()) };
    if node.level == 0 {
        return Ok(());
    }
    let from = stack.len();
    stack.extend(children(node.btree, node.level, node.limit, keys.iter())?);
    if let Some(new) = stack.get_mut(from..) {
        new.reverse();
    }
    Ok(())
}

/// The children of an interior node with these keys, in order.
fn children<'k>(
    btree: BtreeId,
    level: u8,
    limit: Option<Position>,
    keys: impl Iterator<Item = (Position, &'k [u8])>,
) -> Result<Vec<(NodePointer, Expected)>> {
    let mut children: Vec<(NodePointer, Expected)> = Vec::new();
    for (minimum, value) in keys {
        if let Some((_, before)) = children.last_mut() {
            before.limit = Some(minimum);
        }
        // Decoded once already: the image was verified.
        let expected = Expected { btree, level: level.saturating_sub(1), minimum, limit };
        children.push((NodePointer::decode(value)?, expected));
    }
    Ok(children)
}

/// Which leaves, and how they are read.
#[derive(Clone, Copy, Debug)]
pub struct LeafRange {
    /// Tree.
    pub btree: BtreeId,
    /// First position.
    pub from: Position,
    /// Last position.
    pub to: Position,
    /// Of leaves that start behind this all copies are read and verified, of others the first good one is taken. `None` is before all.
    pub verified_to: Option<Position>,
    /// Bytes of nodes that are read at once. Some ten times as much is held.
    pub batch_bytes: usize,
    /// Whether a thread reads ahead.
    pub reads_ahead: bool,
}

/// Calls `visitor` with batches of the leaves of a checkpoint's tree whose ranges touch `range`, in order. What hangs below an interior node that
/// cannot be read is left out, and so is a tree that the checkpoint does not have.
///
/// # Errors
/// The visitor's; [`Error::Corrupt`] for a root that cannot be understood.
pub fn stream_leaves(
    reader: &NodeReader,
    checkpoint: &Checkpoint,
    range: &LeafRange,
    visitor: &mut dyn FnMut(Vec<PublishedNode>) -> Result<()>,
) -> Result<()> {
    let Some(root) = checkpoint.roots.iter().find(|root| root.btree == range.btree as u8) else { return Ok(()) };
    let spare: Arc<SpareBuffers> = Arc::default();
    let mut leaves = Leaves { reader, range, levels: vec![vec![root_of(root)?].into_iter()], spare: &spare };
    if range.reads_ahead {
        return stream_ahead(leaves, visitor);
    }
    while let Some(mut batch) = leaves.next_batch()? {
        reader.fetch(&mut batch);
        visitor(verified(reader, batch, &spare))?;
    }
    Ok(())
}

fn verified(reader: &NodeReader, batch: Vec<Fetch>, spare: &Arc<SpareBuffers>) -> Vec<PublishedNode> {
    reader.decode_all(batch, spare).into_iter().map(PublishedNode::new).collect()
}

/// Finds, reads and verifies leaves by threads of their own, a few batches before they are visited.
fn stream_ahead(mut leaves: Leaves<'_>, visitor: &mut dyn FnMut(Vec<PublishedNode>) -> Result<()>) -> Result<()> {
    let (reader, spare) = (leaves.reader, leaves.spare);
    let (to_read, to_be_read) = bounded::<ToRead>(READERS);
    // Batches in order, read or not: how many there may be bounds the memory.
    let (in_order, read) = bounded::<Receiver<Result<Vec<Fetch>>>>(READERS);
    let (to_visit, to_be_visited) = bounded(1);
    // Where a channel is closed nobody listens any more: an error ended the visit, or the reading.
    let find_all = move || {
        while let Some(batch) = leaves.next_batch().transpose() {
            let is_last = batch.is_err();
            let (done, when_done) = bounded(1);
            if in_order.send(when_done).is_err() || to_read.send((batch, done)).is_err() || is_last {
                break;
            }
        }
    };
    let read_all = |to_be_read: Receiver<ToRead>| {
        for (mut batch, done) in to_be_read {
            if let Ok(batch) = &mut batch {
                reader.fetch(batch);
            }
            // If nobody waits for it, the channel that it came by is closed soon.
            let _ = done.send(batch);
        }
    };
    let verify_all = move || {
        for batch in read.iter().map_while(|when_done| when_done.recv().ok()) {
            if to_visit.send(batch.map(|batch| verified(reader, batch, spare))).is_err() {
                break;
            }
        }
    };
    let started = |error| Error::io("starting a thread that reads ahead", error);
    let named = |name: &str| std::thread::Builder::new().name(name.into());
    // A thread that panics ends its channel, and then the scope: a stream is never cut short unnoticed.
    std::thread::scope(|scope| {
        named("find-leaves").spawn_scoped(scope, find_all).map_err(started)?;
        for _ in 0..READERS {
            let to_be_read = to_be_read.clone();
            named("read-leaves").spawn_scoped(scope, move || read_all(to_be_read)).map_err(started)?;
        }
        drop(to_be_read);
        named("verify-leaves").spawn_scoped(scope, verify_all).map_err(started)?;
        for batch in to_be_visited {
            visitor(batch?)?;
        }
        Ok(())
    })
}

/// A batch that is to be read, and who waits for it.
type ToRead = (Result<Vec<Fetch>>, Sender<Result<Vec<Fetch>>>);

/// The leaves of a tree, found by descent: of each level the nodes that are still to be visited.
struct Leaves<'a> {
    reader: &'a NodeReader,
    range: &'a LeafRange,
    levels: Vec<std::vec::IntoIter<(NodePointer, Expected)>>,
    spare: &'a Arc<SpareBuffers>,
}

impl Leaves<'_> {
    /// The next leaf.
    fn next_leaf(&mut self) -> Result<Option<(NodePointer, Expected)>> {
        // Levels descend by one, so it ends, whatever the images hold.
        while let Some(level) = self.levels.last_mut() {
            let Some((pointer, expected)) = level.next() else {
                self.levels.pop();
                continue;
            };
            let is_outside =
                expected.minimum > self.range.to || expected.limit.is_some_and(|limit| limit <= self.range.from);
            if is_outside {
                continue;
            }
            if expected.level == 0 {
                return Ok(Some((pointer, expected)));
            }
            if let Ok((image, _)) = self.reader.read(&pointer, &expected) {
                let Expected { btree, level, limit, .. } = expected;
                let keys = (0..image.run.len()).filter_map(|index| image.run.key(index));
                self.levels.push(children(btree, level, limit, keys)?.into_iter());
            }
        }
        Ok(None)
    }

    /// The next batch, not read yet.
    fn next_batch(&mut self) -> Result<Option<Vec<Fetch>>> {
        let mut batch = Vec::new();
        let mut bytes = 0;
        while bytes < self.range.batch_bytes {
            let Some((pointer, expected)) = self.next_leaf()? else { break };
            let all_copies = self.range.verified_to.is_none_or(|verified| expected.minimum > verified);
            let copies = if all_copies { pointer.copies.len() } else { 1 };
            bytes += pointer.written_bytes as usize * copies;
            batch.push(self.reader.prepare(pointer, expected, all_copies, self.spare)?);
        }
        Ok((!batch.is_empty()).then_some(batch))
    }
}
