//! Walking the trees of a checkpoint as they are on disk, for checkers and for tests. Reads every copy of every node.

use std::collections::BTreeSet;

use super::image::{Expected, LEVEL_MAX};
use super::reader::NodeReader;
use crate::error::{Corruption, Error, Result};
use crate::format::checkpoint::Checkpoint;
use crate::format::node::{NodeAddress, NodePointer};
use crate::format::{BtreeId, Position, Value};
use crate::sync::Arc;

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
    /// What each copy's verification said.
    pub copies: Vec<(NodeAddress, Result<()>)>,
    /// The keys, verified, whiteouts and what is out of range left out; the last copy's problem if none is good.
    pub keys: Result<Vec<(Position, Value)>>,
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
    let mut seen: BTreeSet<NodeAddress> = BTreeSet::new();
    let mut stack = Vec::new();
    for root in checkpoint.roots.iter().rev() {
        let btree = BtreeId::from_stored(root.btree)?;
        if root.level >= LEVEL_MAX {
            return Err(Error::corrupt(format!("root of the {} tree", btree.name()), format!("level {}", root.level)));
        }
        let expected = Expected { btree, level: root.level, minimum: Position::MIN, limit: None };
        stack.push((NodePointer::decode(&root.pointer)?, expected));
    }
    while let Some((pointer, expected)) = stack.pop() {
        let mut keys = Err(Error::corrupt(format!("pointer to node {}", pointer.node), "it has no copies"));
        let mut copies = Vec::new();
        for &copy in &pointer.copies {
            let outcome = if seen.insert(copy) {
                reader.read_copy(&pointer, copy, &expected)
            } else {
                Err(Corruption::new(format!("node {}", pointer.node), "two pointers lead to its slot")
                    .at(copy.device, copy.offset)
                    .into())
            };
            match outcome {
                Ok(image) => {
                    copies.push((copy, Ok(())));
                    if keys.is_err() {
                        let run = &image.run;
                        let all = (0..run.len()).filter_map(|index| run.key(index));
                        keys = Ok(all.map(|(position, value)| (position, Arc::from(value))).collect());
                    }
                }
                Err(error) => {
                    copies.push((copy, Err(error.clone())));
                    if keys.is_err() {
                        keys = Err(error);
                    }
                }
            }
        }
        let Expected { btree, level, minimum, limit } = expected;
        let node = PublishedNode { btree, level, pointer, minimum, limit, copies, keys };
        visitor(&node)?;
        if level == 0 {
            continue;
        }
        if let Ok(keys) = &node.keys {
            for (index, (position, value)) in keys.iter().enumerate().rev() {
                let child_limit = keys.get(index + 1).map(|(next, _)| *next).or(limit);
                let expected = Expected { btree, level: level - 1, minimum: *position, limit: child_limit };
                // Decoded once already: the image was verified.
                stack.push((NodePointer::decode(value)?, expected));
            }
        }
    }
    Ok(())
}
