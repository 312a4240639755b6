//! Serialising nodes for a checkpoint: freezing, encoding, writing in batches, linking into the parents.
//!
//! Locks: a node's content exclusively, each time for moving pointers only; `structure` exclusively in the rare case that splits keep
//! adding children without images. Encoding and writing are done with no lock held.

use super::checkpoint::CheckpointOutcome;
use super::image::{EncodedBset, append_offset, encode_bset};
use super::log::CheckpointLog;
use super::node::{Content, Node, encode_pointer};
use super::node_space::SlotChanges;
use super::run::{Changes, Run, packed_changes_bytes};
use super::{Forest, LEVEL_MAX};
use crate::device::WriteRequest;
use crate::error::{Error, Result};
use crate::format::checkpoint::Root;
use crate::format::node::{HEADER_BYTES, NodeAddress, NodeHeader, NodePointer};
use crate::format::{BtreeId, Position};
use crate::sync::Arc;
use crate::sync::atomic::Ordering;
use crate::units::{JournalSequence, NodeId};

use smallvec::SmallVec;

/// A node's content at the moment of its freezing: immutable layers.
struct Frozen {
    minimum: Position,
    limit: Option<Position>,
    base: Arc<Run>,
    older: Vec<Arc<Changes>>,
    recent: Arc<Changes>,
    image: Option<NodePointer>,
    rewrite: bool,
    newest: JournalSequence,
}

/// A write of an image, not yet submitted.
struct ImageWrite {
    address: NodeAddress,
    /// Empty for an appended bset.
    header: Vec<u8>,
    bset: Arc<Vec<u8>>,
}

/// A checkpoint being made.
pub(super) struct Attempt<'a> {
    pub forest: &'a Forest,
    pub log: &'a dyn CheckpointLog,
    first_replay: JournalSequence,
    pub changes: SlotChanges,
    /// Slots for the next full image.
    spare: Option<SmallVec<[NodeAddress; 2]>>,
    /// Splits are held off: nothing that could split may be called.
    structure_held: bool,
    writes: Vec<ImageWrite>,
    write_bytes: usize,
    /// Nodes whose images are not written yet: they must not be evicted.
    pub pinned: Vec<Arc<Node>>,
    /// Empty but in a build that is broken on purpose ([`crate::alloc::TestSwitches::parents_first`]).
    linked_late: Vec<(Arc<Node>, NodePointer)>,
    pub outcome: CheckpointOutcome,
}

/// Images are written in batches of about this many bytes.
const WRITE_BATCH_BYTES: usize = 4 << 20;
/// Layers above the base after which they are folded into it.
const FROZEN_LAYERS_MAX: usize = 4;
/// Rounds for children without images before splits are held off.
const FREEZE_ROUNDS_MAX: u32 = 4;

impl<'a> Attempt<'a> {
    /// A checkpoint of all below `first_replay`, with nothing done yet.
    pub fn new(forest: &'a Forest, log: &'a dyn CheckpointLog, first_replay: JournalSequence) -> Self {
        Self {
            forest,
            log,
            first_replay,
            changes: SlotChanges::default(),
            spare: None,
            structure_held: false,
            writes: Vec::new(),
            write_bytes: 0,
            pinned: Vec::new(),
            linked_late: Vec::new(),
            outcome: CheckpointOutcome::default(),
        }
    }

    /// Serialises everything that must be in this checkpoint; returns its roots.
    pub fn serialise_all(&mut self) -> Result<Vec<(Root, NodePointer)>> {
        for level in 0..LEVEL_MAX {
            for node in self.forest.dirty_nodes(level) {
                if level == 0 {
                    let content = node.content.read();
                    if content.oldest >= self.first_replay && content.image.is_some() && !content.rewrite {
                        continue;
                    }
                }
                self.serialise_and_link(&node)?;
                self.write_images(WRITE_BATCH_BYTES)?;
                // In simulation others commit between two nodes, as they do beside this thread in production; not when the journal is
                // filling up, since those who wait for this checkpoint would do so on top of its stack.
                if self.log.fill_permille() < 300 {
                    self.forest.env.maybe_yield(8)?;
                }
            }
        }
        let mut roots = Vec::new();
        for btree in BtreeId::ALL {
            loop {
                let root = self.forest.root(btree);
                let (image, empty, newest) = {
                    let content = root.content.read();
                    (content.image.clone(), content.live_keys == 0 && root.level == 0, content.newest)
                };
                match image {
                    Some(pointer) => {
                        let mut encoded = Vec::new();
                        pointer.encode(&mut encoded);
                        roots.push((Root { btree: btree as u8, level: root.level, pointer: encoded }, pointer));
                        break;
                    }
                    None if empty => {
                        // What emptied it may be newer than F: the record shows it, so the journal must not lose it.
                        self.forest.count_on(newest);
                        break;
                    }
                    None => self.serialise_and_link(&root)?,
                }
            }
        }
        self.write_images(0)?;
        for (node, pointer) in std::mem::take(&mut self.linked_late) {
            self.forest.link(&node, &pointer)?;
        }
        Ok(roots)
    }

    fn serialise_and_link(&mut self, node: &Arc<Node>) -> Result<()> {
        if let Some(pointer) = self.serialise(node)? {
            let parents_first = self.forest.switches.get().is_some_and(|switches| switches.parents_first);
            if parents_first && pointer.bset_count > 1 {
                self.linked_late.push((Arc::clone(node), pointer));
            } else {
                self.forest.link(node, &pointer)?;
            }
        }
        Ok(())
    }

    /// Makes sure of slots for one full image. [`Error::Restart`] if that would need a claim while splits are held off.
    fn ensure_spare(&mut self) -> Result<()> {
        let copies = self.forest.limits.copies;
        let mut supplied = Ok(());
        while self.spare.is_none() {
            self.spare = self.forest.space.lock().allocate(copies);
            if self.spare.is_none() {
                // Fewer than were asked for may be enough.
                supplied?;
                if self.structure_held {
                    return Err(Error::Restart);
                }
                // Many at once, so that a checkpoint claims a few times at most.
                let free = self.forest.space.lock().free_slots();
                let more = 8 + self.forest.dirty_nodes_max() / 8;
                supplied = self.forest.ensure_slots(free + more * copies, self.log);
            }
        }
        Ok(())
    }

    /// Moves a node's changes aside, when all its children have images. `None` if there is nothing to write.
    fn freeze(&mut self, node: &Arc<Node>) -> Result<Option<Frozen>> {
        let forest = self.forest;
        for round in 0.. {
            let hold = round >= FREEZE_ROUNDS_MAX;
            let supplied = if hold { forest.ensure_slots(16 * forest.limits.copies, self.log) } else { Ok(()) };
            // Fewer than were asked for may be enough.
            if let Err(error) = &supplied
                && !matches!(error, Error::NoSpace(_))
            {
                return supplied.map(|()| None);
            }
            let structure = (hold && !self.structure_held).then(|| forest.structure.write());
            let held_here = structure.is_some();
            self.structure_held |= held_here;
            let outcome = self.freeze_round(node);
            if held_here {
                self.structure_held = false;
            }
            drop(structure);
            match outcome {
                // Slots ran out while splits were held off: again, after a claim.
                Err(Error::Restart) if held_here => supplied?,
                Err(error) => return Err(error),
                Ok(Some(frozen)) => return Ok(frozen),
                Ok(None) => {}
            }
        }
        Ok(None)
    }

    /// One round: freezes the node if all children have images, else serialises those that have none. While splits are held off that is
    /// enough, and the node is frozen in the same round. A node is frozen only when slots for its image are at hand: a child may have taken
    /// those that were. [`Error::Restart`] before anything is frozen if they are not to be had while splits are held off.
    fn freeze_round(&mut self, node: &Arc<Node>) -> Result<Option<Option<Frozen>>> {
        loop {
            self.ensure_spare()?;
            let unimaged: Vec<Arc<Node>> = {
                let mut content = node.content.write();
                if content.unimaged.is_empty() || content.retired {
                    // Also if there is nothing to write: a change after F may have undone one before it, and what the image shows is then
                    // the state after both. The journal must not lose the later one.
                    self.forest.count_on(content.newest);
                    return Ok(Some(self.forest.freeze_content(node, &mut content)));
                }
                content.unimaged.values().cloned().collect()
            };
            for child in &unimaged {
                self.serialise_and_link(child)?;
            }
            if !self.structure_held {
                return Ok(None);
            }
        }
    }

    /// Freezes and encodes a node. Returns the pointer to its new image, `None` if there is nothing to write.
    fn serialise(&mut self, node: &Arc<Node>) -> Result<Option<NodePointer>> {
        let Some(frozen) = self.freeze(node)? else { return Ok(None) };
        self.pinned.push(Arc::clone(node));
        self.outcome.nodes += 1;
        if node.level > 0 {
            self.note_reachability(&frozen)?;
        }
        let append = frozen.image.as_ref().filter(|image| {
            !frozen.rewrite && self.forest.limits.append_fits(image, packed_changes_bytes(&frozen.recent))
        });
        let (pointer, base) = match append {
            Some(image) => (self.append(node, &frozen, image), None),
            None => {
                let mut layers = frozen.older.clone();
                layers.push(Arc::clone(&frozen.recent));
                let run = Content::fold(&frozen.base, &layers);
                (self.rewrite(node, &frozen, &run)?, Some(run))
            }
        };
        self.forest.install_image(node, &frozen, &pointer, base);
        Ok(Some(pointer))
    }

    /// The new image of an interior node adds and drops what its changes say, compared with what its images held.
    fn note_reachability(&mut self, frozen: &Frozen) -> Result<()> {
        for (&position, change) in &*frozen.recent {
            let new = change.as_ref().map(|value| NodePointer::decode(value)).transpose()?;
            let in_layer = frozen.older.iter().rev().find_map(|layer| layer.get(&position));
            let old = match in_layer {
                Some(change) => change.as_deref(),
                None => frozen.base.get(position),
            };
            let old = old.map(NodePointer::decode).transpose()?;
            self.changes.replace(old.as_ref(), new.as_ref());
        }
        Ok(())
    }

    fn append(&mut self, node: &Node, frozen: &Frozen, image: &NodePointer) -> NodePointer {
        let keys = frozen.recent.iter().map(|(position, value)| (*position, value.as_deref()));
        let bset = encode_bset(node.id, image.bset_count, image.last_checksum, frozen.newest, keys);
        let offset = append_offset(image.written_bytes as usize);
        let EncodedBset { mut bytes, checksum } = bset;
        // Inside the slot, which is at most 1 MiB.
        let written_bytes = u32::try_from(offset + bytes.len()).unwrap_or(u32::MAX);
        bytes.resize(append_offset(bytes.len()), 0);
        let bset = Arc::new(bytes);
        for copy in &image.copies {
            let address = NodeAddress { device: copy.device, offset: copy.offset + offset as u64 };
            self.push_write(ImageWrite { address, header: Vec::new(), bset: Arc::clone(&bset) });
        }
        self.forest.metrics.btree_bset_appends.increment();
        NodePointer {
            node: node.id,
            written_bytes,
            bset_count: image.bset_count + 1,
            last_checksum: checksum,
            copies: image.copies.clone(),
        }
    }

    fn rewrite(&mut self, node: &Node, frozen: &Frozen, run: &Run) -> Result<NodePointer> {
        let keys = (0..run.len()).filter_map(|index| run.key(index)).map(|(position, value)| (position, Some(value)));
        let EncodedBset { mut bytes, checksum } = encode_bset(node.id, 0, 0, frozen.newest, keys);
        let length = HEADER_BYTES + bytes.len();
        if length > self.forest.limits.node_bytes {
            return Err(Error::Bug(format!("node {} has grown to {length} bytes", node.id)));
        }
        let written_bytes = u32::try_from(length).unwrap_or(u32::MAX);
        bytes.resize(append_offset(length) - HEADER_BYTES, 0);
        let bset = Arc::new(bytes);
        let copies = self.spare.take().ok_or_else(|| Error::Bug("no slot was set aside for an image".into()))?;
        for &address in &copies {
            let header = NodeHeader {
                filesystem: self.forest.reader.superblock.filesystem,
                node: node.id,
                device: address.device,
                address: address.offset,
                btree: node.btree,
                level: node.level,
                newest_sequence: frozen.newest,
                minimum: frozen.minimum,
                limit: frozen.limit,
            };
            self.push_write(ImageWrite { address, header: header.encode(), bset: Arc::clone(&bset) });
        }
        self.forest.metrics.btree_node_rewrites.increment();
        Ok(NodePointer { node: node.id, written_bytes, bset_count: 1, last_checksum: checksum, copies })
    }

    fn push_write(&mut self, write: ImageWrite) {
        let bytes = write.header.len() + write.bset.len();
        self.write_bytes += bytes;
        self.outcome.bytes += bytes as u64;
        self.writes.push(write);
    }

    /// Submits what was encoded if it is at least `threshold_bytes`. No lock is held.
    pub fn write_images(&mut self, threshold_bytes: usize) -> Result<()> {
        if self.writes.is_empty() || self.write_bytes < threshold_bytes {
            return Ok(());
        }
        for (index, device) in self.forest.reader.devices.iter().enumerate() {
            let here = self.writes.iter().filter(|write| usize::from(write.address.device.0) == index);
            let requests: Vec<WriteRequest<'_>> = here
                .map(|write| {
                    let data = if write.header.is_empty() {
                        vec![write.bset.as_slice()]
                    } else {
                        vec![write.header.as_slice(), write.bset.as_slice()]
                    };
                    WriteRequest { offset: write.address.offset, data }
                })
                .collect();
            if !requests.is_empty() {
                device.write_batch(&requests)?;
            }
        }
        self.forest.metrics.btree_node_bytes_written.add(self.write_bytes as u64);
        self.writes.clear();
        self.write_bytes = 0;
        self.pinned.clear();
        Ok(())
    }
}

impl Forest {
    fn dirty_nodes(&self, level: u8) -> Vec<Arc<Node>> {
        let first = (level, BtreeId::Extents, NodeId(0));
        let dirty = self.dirty.lock();
        dirty.nodes.range(first..).take_while(|((at, ..), _)| *at == level).map(|(_, node)| Arc::clone(node)).collect()
    }

    /// Takes a node off the list of dirty ones. Its content is locked by the caller.
    pub(super) fn unlist_dirty(&self, node: &Node, content: &mut Content) {
        content.dirty = false;
        if self.dirty.lock().nodes.remove(&(node.level, node.btree, node.id)).is_some() {
            self.dirty_count.fetch_sub(1, Ordering::Relaxed);
        }
        if std::mem::take(&mut content.charged_slot) {
            self.dirty_slots.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Moves the changes aside. `None` if there is nothing to write.
    fn freeze_content(&self, node: &Node, content: &mut Content) -> Option<Frozen> {
        if content.retired {
            return None;
        }
        self.unlist_dirty(node, content);
        if content.recent.is_empty() && content.image.is_some() && !content.rewrite {
            return None;
        }
        let recent = Arc::new(std::mem::take(&mut content.recent));
        let frozen = Frozen {
            minimum: content.minimum,
            limit: content.limit,
            base: Arc::clone(&content.base),
            older: content.frozen.clone(),
            recent: Arc::clone(&recent),
            image: content.image.clone(),
            rewrite: content.rewrite,
            newest: content.newest,
        };
        content.recent_bytes = 0;
        content.frozen.push(recent);
        Some(frozen)
    }

    /// The image that was made of `frozen` is the node's newest one. Folds layers if there are many.
    fn install_image(&self, node: &Arc<Node>, frozen: &Frozen, pointer: &NodePointer, run: Option<Run>) {
        let layers = frozen.older.len() + 1;
        let is_whole = run.is_some();
        let run = run.or_else(|| {
            (layers >= FROZEN_LAYERS_MAX).then(|| {
                let mut all = frozen.older.clone();
                all.push(Arc::clone(&frozen.recent));
                Content::fold(&frozen.base, &all)
            })
        });
        let mut content = node.content.write();
        content.image = Some(pointer.clone());
        // Of an appended image what was asked for meanwhile still holds.
        content.rewrite &= !is_whole;
        if let Some(run) = run {
            // A split meanwhile has folded the layers itself.
            let same = Arc::ptr_eq(&content.base, &frozen.base)
                && content.frozen.len() == layers
                && content.frozen.last().is_some_and(|last| Arc::ptr_eq(last, &frozen.recent));
            if same {
                content.base = Arc::new(run);
                content.frozen.clear();
            }
        }
        self.cache.recharge(node, content.memory_bytes());
    }

    /// Puts the pointer to a node's newest image into its parent. Nothing if it is a root or no longer in its tree.
    fn link(&self, node: &Arc<Node>, pointer: &NodePointer) -> Result<()> {
        let (minimum, sequence) = {
            let content = node.content.read();
            (content.minimum, content.newest)
        };
        loop {
            if Arc::ptr_eq(&self.root(node.btree), node) || node.content.read().retired {
                return Ok(());
            }
            let Some(found) = self.find(node.btree, minimum, node.level + 1)? else { continue };
            let mut above = found.node.content.write();
            if !above.covers(minimum) {
                continue;
            }
            if Self::points_to(&above, minimum, node.id) {
                self.put_locked(&found.node, &mut above, minimum, Some(encode_pointer(pointer)), sequence);
                above.unimaged.remove(&minimum);
            }
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::btree::tests::value;
    use crate::btree::tests::world::{SIZE_BYTES, World};
    use crate::device::MemDevice;

    /// A parent took the slot that was set aside for it for granted, and its last child had used it up: the filesystem latched when commits kept
    /// splitting leaves under a checkpoint until splits were held off.
    #[test]
    fn while_splits_are_held_off_a_parent_gets_slots_after_its_children() {
        let world = World::new(Arc::new(MemDevice::new(SIZE_BYTES)), 2, 8 << 20);
        for index in 0..500 {
            world.commit(vec![(BtreeId::Extents, Position::new(index, 0, 0), Some(value(index, 200)))]);
        }
        let forest = &world.forest;
        let root = forest.root(BtreeId::Extents);
        let unimaged = root.content.read().unimaged.len();
        assert!(root.level == 1 && unimaged > 2, "{unimaged} leaves without an image");
        let mut attempt = Attempt::new(forest, &*world.log, JournalSequence(1));
        attempt.structure_held = true;
        let refused = attempt.serialise_and_link(&root);
        assert!(
            matches!(refused, Err(Error::Restart)),
            "no bucket may be claimed while splits are held off: {refused:?}"
        );
        forest.ensure_slots(forest.estimate_slots(), &*world.log).unwrap();
        attempt.serialise_and_link(&root).unwrap();
        attempt.write_images(0).unwrap();
        let content = root.content.read();
        assert!(content.unimaged.is_empty() && content.image.is_some());
        drop(content);
        world.assert_matches_log();
    }
}
