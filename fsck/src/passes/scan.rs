//! Where the passes get their keys from: leaves as they were published, read ahead in batches and verified on all cores, each of them once on all its
//! copies ([`stream_leaves`]). Where the trees in memory hold something else than the image (the journal was replayed, or a repair was made), or the
//! image cannot be read, the keys are the trees'. So every pass sees the present state, whole, whatever was published.
//!
//! Collects: ranges of keys that are lost.

use std::collections::HashMap;
use std::sync::Arc;

use coppicefs::Result;
use coppicefs::btree::{Around, Keys, LeafRange, NodeReader, PublishedNode, stream_leaves};
use coppicefs::format::checkpoint::Checkpoint;
use coppicefs::format::{BtreeId, Position};

use super::{Checker, unless_damaged};
use crate::problem::Problem;
use crate::state::Window;

/// Keys that one step of a scan of the trees in memory asks for.
const SCAN_KEYS: usize = 4096;
/// Most bytes of nodes that are read at once.
const BATCH_BYTES_MAX: u64 = 3 << 20;
/// Least, a small node.
const BATCH_BYTES_MIN: u64 = 64 << 10;
/// What is held of batches, beside other things, is some ten times one of them: that is kept a small part of the budget.
const BUDGET_PARTS: u64 = 128;

/// The checkpoint whose leaves are read.
#[derive(Debug)]
pub(crate) struct Published {
    pub reader: NodeReader,
    pub checkpoint: Checkpoint,
    /// Of each tree, the last leaf's start that was verified on all its copies.
    pub verified: HashMap<u8, Position>,
    /// Bytes of the leaves of each tree.
    pub leaf_bytes: HashMap<u8, u64>,
}

/// Bytes of leaves that are read at once, of a budget.
pub(super) fn batch_bytes(memory_bytes: u64) -> usize {
    usize::try_from((memory_bytes / BUDGET_PARTS).clamp(BATCH_BYTES_MIN, BATCH_BYTES_MAX)).unwrap_or(usize::MAX)
}

impl Checker<'_> {
    /// As [`Self::for_each_in`], over a whole tree.
    pub(super) fn for_each_batch(
        &mut self,
        btree: BtreeId,
        visit: impl FnMut(&mut Self, &[Keys]) -> Result<()>,
    ) -> Result<()> {
        self.for_each_in(btree, Position::MIN, Position::MAX, visit)
    }

    /// As [`Self::for_each_in`], over the keys of the window's inodes.
    pub(super) fn for_each_of_window(
        &mut self,
        btree: BtreeId,
        visit: impl FnMut(&mut Self, &[Keys]) -> Result<()>,
    ) -> Result<()> {
        let Window { first, last } = self.state.window;
        self.for_each_in(btree, Position::new(first, 0, 0), Position::new(last, u64::MAX, u32::MAX), visit)
    }

    /// Calls `visit` with batches of keys of a range of a tree, in order. What is lost is reported, once, and left out.
    pub(super) fn for_each_in(
        &mut self,
        btree: BtreeId,
        from: Position,
        to: Position,
        mut visit: impl FnMut(&mut Self, &[Keys]) -> Result<()>,
    ) -> Result<()> {
        let mut cursor = Some(from);
        if let Some(mut published) = self.state.published.take() {
            let range = LeafRange {
                btree,
                from,
                to,
                verified_to: published.verified.get(&(btree as u8)).copied(),
                batch_bytes: self.batch_bytes,
                reads_ahead: !self.filesystem.env().is_simulated(),
            };
            let mut verified_to = range.verified_to;
            let outcome = stream_leaves(&published.reader, &published.checkpoint, &range, &mut |leaves| {
                let batch = self.present_keys(&range, &leaves, &mut cursor)?;
                verified_to = verified_to.max(leaves.last().map(|leaf| leaf.minimum));
                self.examine(batch.iter().map(|keys| keys.len() as u64).sum());
                self.advance(leaves.iter().map(|leaf| u64::from(leaf.pointer.written_bytes)).sum());
                visit(self, &batch)
            });
            published.verified.extend(verified_to.map(|position| (btree as u8, position)));
            self.state.published = Some(published);
            outcome?;
        }
        // What no published leaf covers: below a lost node, or of a tree that was not published yet.
        if let Some(from) = cursor.filter(|from| *from <= to) {
            let rest = self.scan_trees(btree, from, to)?;
            self.examine(rest.iter().map(|keys| keys.len() as u64).sum());
            visit(self, &rest)?;
        }
        Ok(())
    }

    /// The keys that the trees hold up to the end of these leaves, from the cursor on, which goes behind them.
    fn present_keys(
        &mut self,
        range: &LeafRange,
        leaves: &[PublishedNode],
        cursor: &mut Option<Position>,
    ) -> Result<Vec<Keys>> {
        let mut batch = Vec::with_capacity(leaves.len());
        for leaf in leaves {
            if range.verified_to.is_none_or(|verified| leaf.minimum > verified) {
                self.report_copies(leaf);
            }
            let Some(from) = cursor.filter(|from| *from <= range.to) else { break };
            let (first, last) = (leaf.minimum.max(range.from), leaf.last_position().min(range.to));
            if let Some(before) = first.predecessor().filter(|before| from <= *before) {
                batch.append(&mut self.scan_trees(range.btree, from, before)?);
            }
            // Where the trees cannot even be asked, looking for the keys tells what is lost.
            let is_present = unless_damaged(self.filesystem.forest().is_as_published(leaf))?.unwrap_or(false);
            match &leaf.keys {
                Ok(keys) if is_present => batch.push(keys.within(first, last)),
                _ => batch.append(&mut self.scan_trees(range.btree, first, last)?),
            }
            *cursor = last.successor();
        }
        Ok(batch)
    }

    /// Keys of the trees in memory, which are read as needed.
    fn scan_trees(&mut self, btree: BtreeId, from: Position, to: Position) -> Result<Vec<Keys>> {
        let mut found = Vec::new();
        let mut cursor = Some(from);
        while let Some(from) = cursor.filter(|from| *from <= to) {
            match self.filesystem.forest().scan_around(btree, from, to, SCAN_KEYS) {
                Around::Keys(scan) => {
                    cursor = scan.covered_to.successor();
                    found.push(Keys::of(&scan.keys));
                }
                Around::Lost { to: last, error } if error.is_media_error() => {
                    cursor = last.successor();
                    let known = self.state.lost.entry(btree as u8).or_default();
                    if !known.iter().any(|(first, last)| *first <= from && from <= *last) {
                        known.push((from, last));
                        let reason = error.to_string();
                        self.report(Problem::NodeUnreadable { btree, level: 0, from, to: last, reason });
                    }
                }
                Around::Lost { error, .. } => return Err(error),
            }
        }
        Ok(found)
    }

    /// Reports what is wrong with a node or its copies.
    pub(super) fn report_copies(&mut self, node: &PublishedNode) {
        let (btree, level, from) = (node.btree, node.level, node.minimum);
        if let Err(error) = &node.keys {
            let to = node.last_position();
            let known = self.state.lost.entry(btree as u8).or_default();
            // The nodes pass has told of pointers that lead nowhere.
            if known.contains(&(from, to)) {
                return;
            }
            known.push((from, to));
            self.report(Problem::NodeUnreadable { btree, level, from, to, reason: error.to_string() });
            return;
        }
        for (address, outcome) in &node.copies {
            if let Err(error) = outcome {
                let (device, offset, reason) = (address.device.0, address.offset, error.to_string());
                self.report(Problem::NodeCopy {
                    btree,
                    from,
                    node: node.pointer.node.0,
                    level,
                    device,
                    offset,
                    reason,
                });
            }
        }
    }
}

impl Published {
    /// Bytes of the leaves of trees, each as often as it is named.
    pub fn bytes_of(&self, btrees: &[BtreeId]) -> u64 {
        btrees.iter().filter_map(|btree| self.leaf_bytes.get(&(*btree as u8))).sum()
    }
}

/// Reads nodes of a filesystem past its trees in memory.
pub(super) fn reader_of(filesystem: &coppicefs::filesystem::Filesystem) -> NodeReader {
    let superblock = Arc::new(filesystem.superblock().clone());
    NodeReader::new(superblock, filesystem.devices().to_vec(), Arc::clone(filesystem.metrics()))
}
