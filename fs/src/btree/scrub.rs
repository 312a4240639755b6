//! Scrubbing: every copy of every node, and of the checkpoint area, read and verified while the filesystem runs; what is bad is written anew.
//!
//! Pointers are taken from the trees in memory, parents' entries for all but the roots, and read past the cache. Bad is only what is bad while no
//! checkpoint runs, by a pointer that is still the tree's: a checkpoint installs pointers before it has written what they name, and makes slots free.
//! A node with a bad copy becomes dirty, and to be written whole: the next checkpoint writes it elsewhere, as it does for one that was read that way.
//!
//! Locks: a parent's content, shared, for each look at its entries; [`CheckpointHold`] keeps checkpoints away while a doubt is settled (a few
//! reads) and nobody waits for it to be free: who finds it taken comes back later.

use super::Forest;
use super::area::MAP_START;
use super::checkpoint::Kept;
use super::image::Expected;
use super::keys::SpareBuffers;
use crate::error::{Error, Result};
use crate::format::checkpoint::{
    Checkpoint, MAP_PAGE_BYTES, MapEntry, RECORD_SLOT_BYTES, RECORD_SLOTS, decode_map_page, encode_map_page,
};
use crate::format::node::{NodeAddress, NodePointer};
use crate::format::{BtreeId, Position};
use crate::sync::Arc;
use crate::sync::atomic::Ordering;
use crate::units::JournalSequence;

/// While it lives no checkpoint runs.
#[must_use]
pub struct CheckpointHold<'f>(&'f Forest);

impl std::fmt::Debug for CheckpointHold<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("CheckpointHold")
    }
}

impl Drop for CheckpointHold<'_> {
    fn drop(&mut self) {
        self.0.checkpoint_running.store(false, Ordering::Release);
        self.0.checkpoint_event.notify();
    }
}

impl CheckpointHold<'_> {
    /// The older of the kept checkpoints: the newest if there is no other.
    #[must_use]
    pub fn oldest_kept(&self) -> Checkpoint {
        let kept = self.0.kept.lock();
        kept.previous.clone().unwrap_or_else(|| kept.newest.clone())
    }
}

/// Where a scrub of nodes goes on: tree by tree, leaves first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeCursor {
    /// Index in [`BtreeId::ALL`].
    tree: usize,
    level: u8,
    position: Position,
}

impl NodeCursor {
    /// The first node.
    pub const START: Self = Self { tree: 0, level: 0, position: Position::MIN };

    /// Name of the tree, level and position: what [`Self::from_parts`] takes.
    #[must_use]
    pub fn parts(self) -> (String, u8, Position) {
        // Behind the last tree there is none.
        let name = BtreeId::ALL.get(self.tree).map_or("", |btree| btree.name());
        (name.to_owned(), self.level, self.position)
    }

    /// The cursor at a position of a level of a tree; `None` if there can be no such.
    #[must_use]
    pub fn from_parts(tree: &str, level: u8, position: Position) -> Option<Self> {
        let tree = if tree.is_empty() {
            BtreeId::ALL.len()
        } else {
            BtreeId::ALL.iter().position(|btree| btree.name() == tree)?
        };
        (level < super::image::LEVEL_MAX).then_some(Self { tree, level, position })
    }
}

/// A node or a piece of the checkpoint area with something wrong.
#[derive(Clone, Debug)]
pub struct ScrubFinding {
    /// What it is, and what was found.
    pub reason: String,
    /// Tree and range of keys, for a node.
    pub keys: Option<(BtreeId, Position, Position)>,
    /// It is written anew, or will be by the next checkpoint. Else it is lost, or nothing may be written.
    pub is_repaired: bool,
}

/// What a part of a scrub has seen.
#[derive(Debug, Default)]
pub struct Scrubbed {
    /// Nodes.
    pub nodes: u64,
    /// Copies that were read.
    pub copies: u64,
    /// Bytes that were read.
    pub bytes: u64,
    /// What is wrong.
    pub findings: Vec<ScrubFinding>,
    /// Where to go on; none at the end.
    pub next: Option<NodeCursor>,
    /// A checkpoint is running: come back later, to `next`.
    pub is_busy: bool,
}

/// A node as its parent knows it.
struct Child {
    pointer: NodePointer,
    expected: Expected,
}

impl Forest {
    /// Keeps checkpoints away. `None` if one is running.
    #[must_use]
    pub fn hold_checkpoints(&self) -> Option<CheckpointHold<'_>> {
        // Made only if it is one: what is dropped lets checkpoints begin, beside one that is running.
        self.try_begin().then(|| CheckpointHold(self))
    }

    /// Nodes of all trees.
    #[must_use]
    pub fn nodes(&self) -> u64 {
        u64::try_from(self.node_count.load(Ordering::Relaxed)).unwrap_or(0)
    }

    /// Reads every copy of about `nodes_max` nodes from the cursor on. With `repair`, those with bad copies will be written anew.
    ///
    /// # Errors
    /// Other than the medium's.
    pub fn scrub_nodes(&self, cursor: NodeCursor, nodes_max: usize, repair: bool) -> Result<Scrubbed> {
        let mut done = Scrubbed { next: Some(cursor), ..Scrubbed::default() };
        while let Some(cursor) = done.next.filter(|_| done.nodes < nodes_max as u64 && !done.is_busy) {
            let (children, after) = self.children_from(cursor, nodes_max)?;
            done.next = after;
            let whole = self.read_all(&children, &mut done)?;
            for (child, is_whole) in children.into_iter().zip(whole) {
                if is_whole {
                    done.nodes += 1;
                } else if !self.scrub_child(&child, repair, &mut done)? {
                    done.is_busy = true;
                    done.next = Some(NodeCursor { position: child.expected.minimum, ..cursor });
                    break;
                }
            }
        }
        Ok(done)
    }

    /// Written nodes at and after a cursor, of one parent, and the cursor behind them.
    fn children_from(&self, cursor: NodeCursor, limit: usize) -> Result<(Vec<Child>, Option<NodeCursor>)> {
        let Some(&btree) = BtreeId::ALL.get(cursor.tree) else { return Ok((Vec::new(), None)) };
        let next_tree = Some(NodeCursor { tree: cursor.tree + 1, ..NodeCursor::START });
        let root = self.root(btree);
        if cursor.level > root.level {
            return Ok((Vec::new(), next_tree));
        }
        if cursor.level == root.level {
            let expected = Expected { btree, level: root.level, minimum: Position::MIN, limit: None };
            let image = root.content.read().image.clone();
            return Ok((image.map(|pointer| Child { pointer, expected }).into_iter().collect(), next_tree));
        }
        let next_level = Some(NodeCursor { level: cursor.level + 1, position: Position::MIN, ..cursor });
        let behind = |position: Position| Some(NodeCursor { position, ..cursor });
        let parent = match self.find(btree, cursor.position, cursor.level + 1) {
            Ok(Some(found)) => found.node,
            Ok(None) => return Ok((Vec::new(), next_level)),
            // It is lost, and is told of when its own level is looked at.
            Err(error) if error.is_media_error() => {
                let last = self.lost_until(btree, cursor.position, cursor.level + 1);
                return Ok((Vec::new(), last.successor().map_or(next_level, behind)));
            }
            Err(error) => return Err(error),
        };
        let content = parent.content.read();
        if !content.covers(cursor.position) {
            // Split meanwhile: again.
            return Ok((Vec::new(), Some(cursor)));
        }
        let first = content.child(cursor.position).map_or(cursor.position, |(minimum, _)| minimum);
        let mut entries = Vec::new();
        for (minimum, value) in content.range(first, content.last_position(), false).take(limit.max(1) + 1) {
            entries.push((minimum, NodePointer::decode(value.bytes())?));
        }
        let all = entries.len() <= limit.max(1);
        let behind_last = if all { content.limit } else { entries.last().map(|(minimum, _)| *minimum) };
        let minimums: Vec<Position> = entries.iter().map(|(minimum, _)| *minimum).collect();
        if !all {
            entries.pop();
        }
        let children = entries.into_iter().enumerate().filter(|(_, (_, pointer))| !pointer.copies.is_empty());
        let children = children.map(|(index, (minimum, pointer))| {
            let limit = minimums.get(index + 1).copied().or(content.limit);
            Child { pointer, expected: Expected { btree, level: cursor.level, minimum, limit } }
        });
        Ok((children.collect(), behind_last.map_or(next_level, behind)))
    }

    /// Reads all copies of nodes at once. Whether those of each are good.
    fn read_all(&self, children: &[Child], done: &mut Scrubbed) -> Result<Vec<bool>> {
        let spare: Arc<SpareBuffers> = Arc::default();
        let mut batch = Vec::with_capacity(children.len());
        for Child { pointer, expected } in children {
            done.copies += pointer.copies.len() as u64;
            done.bytes += u64::from(pointer.written_bytes) * pointer.copies.len() as u64;
            batch.push(self.reader.prepare(pointer.clone(), *expected, true, &spare)?);
        }
        self.reader.fetch(&mut batch);
        let verified = self.reader.decode_all(batch, &spare);
        Ok(verified.iter().map(|(_, fetched)| fetched.copies.iter().all(|(_, outcome)| outcome.is_ok())).collect())
    }

    /// Reads all copies; which are bad. How many bytes that were.
    fn read_copies(&self, child: &Child, done: &mut Scrubbed) -> Vec<(NodeAddress, Error)> {
        let mut bad = Vec::new();
        for &copy in &child.pointer.copies {
            done.copies += 1;
            done.bytes += u64::from(child.pointer.written_bytes);
            if let Err(error) = self.reader.read_copy(&child.pointer, copy, &child.expected) {
                bad.push((copy, error));
            }
        }
        bad
    }

    /// Looks again at a node that has a bad copy. False if that has to wait for a checkpoint.
    fn scrub_child(&self, child: &Child, repair: bool, done: &mut Scrubbed) -> Result<bool> {
        let Some(hold) = self.hold_checkpoints() else { return Ok(false) };
        done.nodes += 1;
        // The pointer of now, whose image is written.
        let Expected { btree, level, minimum, .. } = child.expected;
        let cursor = NodeCursor { tree: tree_index(btree), level, position: minimum };
        let (children, _) = self.children_from(cursor, 1)?;
        let Some(child) = children.into_iter().find(|now| now.expected.minimum == minimum) else { return Ok(true) };
        let bad = self.read_copies(&child, done);
        if let Some((_, first)) = bad.first() {
            let is_lost = bad.len() == child.pointer.copies.len();
            let is_repaired = repair && self.write_anew(&child)?;
            if !is_lost || is_repaired {
                self.metrics.btree_node_read_repaired.increment();
            }
            let last = child.expected.limit.and_then(Position::predecessor).unwrap_or(Position::MAX);
            let copies = child.pointer.copies.len();
            let reason = format!("{} of {copies} copies of a node: {first}", bad.len());
            done.findings.push(ScrubFinding { reason, keys: Some((btree, minimum, last)), is_repaired });
        }
        drop(hold);
        Ok(true)
    }

    /// Makes a node dirty, and to be written whole. False if its content is lost.
    fn write_anew(&self, child: &Child) -> Result<bool> {
        let Expected { btree, level, minimum, .. } = child.expected;
        let node = match self.find(btree, minimum, level) {
            Ok(Some(found)) => found.node,
            Ok(None) => return Ok(true),
            Err(error) if error.is_media_error() => return Ok(false),
            Err(error) => return Err(error),
        };
        let mut content = node.content.write();
        // Otherwise it has another image by now.
        if content.image.as_ref() == Some(&child.pointer) && !content.retired {
            content.rewrite = true;
            let _ = content.touch(JournalSequence(0));
            self.charge_slot(&mut content);
            self.list_dirty(&node);
        }
        Ok(true)
    }

    /// Reads every copy of the records and maps of the kept checkpoints, and writes bad ones again. `None` if a checkpoint is running.
    ///
    /// # Errors
    /// Of writing.
    pub fn scrub_area(&self, repair: bool) -> Result<Option<Scrubbed>> {
        let Some(hold) = self.hold_checkpoints() else { return Ok(None) };
        let mut done = Scrubbed::default();
        let (newest, previous, published) = {
            let kept: &Kept = &self.kept.lock();
            (kept.newest.clone(), kept.previous.clone(), kept.published_map.clone())
        };
        let filesystem = self.reader.superblock.filesystem;
        if newest.number > 0 {
            for checkpoint in std::iter::once(&newest).chain(&previous) {
                let what = format!("record of checkpoint {}", checkpoint.number);
                let at = checkpoint.number % RECORD_SLOTS * RECORD_SLOT_BYTES as u64;
                let mut bytes = checkpoint.encode(filesystem)?;
                bytes.resize(bytes.len().next_multiple_of(4096), 0);
                let is_good =
                    |found: &[u8]| Checkpoint::decode(filesystem, found).is_ok_and(|found| found == *checkpoint);
                self.scrub_piece(&what, at, Some(&bytes), RECORD_SLOT_BYTES, &is_good, repair, &mut done)?;
            }
        }
        for (checkpoint, in_memory) in [(Some(&newest), Some(&published)), (previous.as_ref(), None)] {
            let Some(checkpoint) = checkpoint else { continue };
            self.scrub_map(checkpoint, in_memory, repair, &mut done)?;
        }
        if done.findings.iter().any(|finding| finding.is_repaired) {
            self.reader.flush()?;
        }
        drop(hold);
        Ok(Some(done))
    }

    fn scrub_map(
        &self,
        checkpoint: &Checkpoint,
        in_memory: Option<&Vec<Vec<MapEntry>>>,
        repair: bool,
        done: &mut Scrubbed,
    ) -> Result<()> {
        let filesystem = self.reader.superblock.filesystem;
        for (page, reference) in (0..).zip(&checkpoint.map) {
            let at = MAP_START + u64::from(reference.place) * MAP_PAGE_BYTES as u64;
            let is_good = |found: &[u8]| {
                decode_map_page(filesystem, page, found).is_ok_and(|(_, checksum)| checksum == reference.checksum)
            };
            let known = in_memory.and_then(|pages| pages.get(page as usize));
            let known =
                known.map(|entries| encode_map_page(filesystem, page, entries).0).filter(|bytes| is_good(bytes));
            let what = format!("page {page} of the node-space map of checkpoint {}", checkpoint.number);
            self.scrub_piece(&what, at, known.as_deref(), MAP_PAGE_BYTES, &is_good, repair, done)?;
        }
        Ok(())
    }

    /// One piece of the area, which lies at `at` in each copy.
    fn scrub_piece(
        &self,
        what: &str,
        at: u64,
        known: Option<&[u8]>,
        length: usize,
        is_good: &dyn Fn(&[u8]) -> bool,
        repair: bool,
        done: &mut Scrubbed,
    ) -> Result<()> {
        let mut good: Option<Vec<u8>> = known.map(<[u8]>::to_vec);
        let mut bad = Vec::new();
        let mut copies = 0;
        for (device, start) in self.reader.area_copies() {
            let mut found = vec![0; length];
            let read = self.reader.area_device(device).and_then(|device| device.read(start + at, &mut found));
            done.copies += 1;
            done.bytes += length as u64;
            copies += 1;
            if read.is_ok() && is_good(&found) {
                good.get_or_insert(found);
            } else {
                bad.push((device, start));
            }
        }
        if bad.is_empty() {
            return Ok(());
        }
        let mut is_repaired = false;
        if let (Some(good), true) = (&good, repair) {
            for (device, start) in &bad {
                self.reader.area_device(*device)?.write(start + at, good)?;
            }
            is_repaired = true;
        }
        let reason = format!("{} of {copies} copies of the {what}", bad.len());
        done.findings.push(ScrubFinding { reason, keys: None, is_repaired });
        Ok(())
    }
}

fn tree_index(btree: BtreeId) -> usize {
    BtreeId::ALL.iter().position(|other| *other == btree).unwrap_or(usize::MAX)
}
