//! Checkpoints: making the trees durable, and giving back what that makes free.
//!
//! 1. *Before F*: merge small nodes, make sure of free slots (a journalled claim of buckets).
//! 2. The journal fixes F. All records below it are applied.
//! 3. *Serialise*, level by level from the leaves: freeze a node (its changes move aside, one short exclusive lock), encode what changed with
//!    no lock held, write it in batches, put the new pointer into the parent. A parent is frozen only when none of its
//!    children lacks an image. New splits may add such children meanwhile; after a few rounds splits are held off for a moment.
//! 4. The journal is flushed up to the newest change in any image, then the devices: data, journal and images are durable.
//! 5. The map and the record are written, each with a device flush: *published*.
//! 6. What only the checkpoint before the previous used is free now; the journal before the previous checkpoint's F too.
//!
//! What each order prevents: an image never holds a change that the journal could lose (4 before 5); a slot that a kept checkpoint uses is
//! never written, except behind the bytes that its pointer covers; a claim is durable before a map names the bucket (4).
//! A failure after step 2 leaves nodes whose changes are in no image that is published: nothing may be published after it (latched).

use std::time::Duration;

use super::image::{EncodedBset, append_offset, encode_bset};
use super::node::{Content, Node, encode_pointer};
use super::node_space::SlotChanges;
use super::run::{Changes, Run, packed_changes_bytes};
use super::{Forest, LEVEL_MAX, Opening};
use crate::device::WriteRequest;
use crate::env::{Env, Event, Progress, Worker};
use crate::error::{Error, Result};
use crate::format::checkpoint::{Checkpoint, MapEntry, Root};
use crate::format::node::{BsetHeader, HEADER_BYTES, NodeAddress, NodeHeader, NodePointer};
use crate::format::{BtreeId, Position};
use crate::sync::atomic::Ordering;
use crate::sync::{Arc, Mutex};
use crate::units::{BucketIndex, DeviceIndex, JournalSequence, NodeId};

use smallvec::SmallVec;

/// F, as the journal fixes it.
#[derive(Clone, Debug)]
pub struct LogBoundary {
    /// F: replay starts here. Every record below it is applied.
    pub first_replay: JournalSequence,
    /// Where F is, or will be, in the journal's ring, in bytes.
    pub offset: u64,
    /// Checksum of the record before F.
    pub previous_checksum: u32,
    /// Counter number and total, exactly at F.
    pub totals: Vec<(u16, i64)>,
}

/// What a checkpoint needs of the journal.
pub trait CheckpointLog: Send + Sync {
    /// Fixes F; waits until every reservation below it is appended.
    ///
    /// # Errors
    /// If the journal has failed.
    fn boundary(&self) -> Result<LogBoundary>;
    /// Makes all records up to `upto` durable, and the data that they name.
    ///
    /// # Errors
    /// If the journal has failed.
    fn flush(&self, upto: JournalSequence) -> Result<()>;
    /// The newest sequence that has been reserved.
    fn newest(&self) -> JournalSequence;
    /// Nobody will replay what is before this place any more.
    fn release_before(&self, offset: u64, sequence: JournalSequence);
    /// How full the journal is.
    fn fill_permille(&self) -> u32;
}

/// Where buckets for nodes come from. The calls run a journalled transaction each, and hold no node lock when they are made.
pub trait NodeBuckets: Send + Sync {
    /// Gives `count` free buckets to nodes; more or fewer than asked, but not none. Must not wait for a checkpoint.
    ///
    /// # Errors
    /// If there are none.
    fn claim(&self, count: usize) -> Result<Vec<(DeviceIndex, BucketIndex)>>;
    /// Takes a bucket back that no kept checkpoint uses.
    ///
    /// # Errors
    /// If the transaction fails.
    fn release(&self, device: DeviceIndex, bucket: BucketIndex) -> Result<JournalSequence>;
}

/// Why a checkpoint is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckpointReason {
    /// It is time.
    Periodic,
    /// Somebody waits for dirty room or journal space.
    Requested,
    /// The filesystem is being closed: nothing will be logged after it. Written even if nothing has changed.
    Close,
}

/// What a checkpoint did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckpointOutcome {
    /// Its number; that of the newest one if there was nothing to do.
    pub number: u64,
    /// Nodes written, each counted once.
    pub nodes: u64,
    /// Bytes of images written, all copies.
    pub bytes: u64,
    /// How long it took.
    pub duration: Duration,
}

/// The kept checkpoints, between checkpoints.
#[derive(Debug)]
pub(super) struct Kept {
    newest: Checkpoint,
    previous: Option<Checkpoint>,
    next_number: u64,
    /// Map of the newest, by page.
    published_map: Vec<Vec<MapEntry>>,
    /// Changes of reachability by nodes that left the tree since, other than by their parent's entry: collapsed roots.
    pub(super) pending: SlotChanges,
}

impl Kept {
    pub fn new(opening: &Opening, published_map: Vec<Vec<MapEntry>>) -> Self {
        Self {
            newest: opening.newest.clone(),
            previous: opening.previous.clone(),
            next_number: opening.next_number,
            published_map,
            pending: SlotChanges::default(),
        }
    }
}

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
struct Attempt<'a> {
    forest: &'a Forest,
    log: &'a dyn CheckpointLog,
    first_replay: JournalSequence,
    /// The journal must be durable up to here before publication.
    flush_upto: JournalSequence,
    changes: SlotChanges,
    /// Slots for the next full image.
    spare: Option<SmallVec<[NodeAddress; 2]>>,
    /// Splits are held off: nothing that could split may be called.
    structure_held: bool,
    writes: Vec<ImageWrite>,
    write_bytes: usize,
    /// Nodes whose images are not written yet: they must not be evicted.
    pinned: Vec<Arc<Node>>,
    outcome: CheckpointOutcome,
}

/// Images are written in batches of about this many bytes.
const WRITE_BATCH_BYTES: usize = 4 << 20;
/// Layers above the base after which they are folded into it.
const FROZEN_LAYERS_MAX: usize = 4;
/// Rounds for children without images before splits are held off.
const FREEZE_ROUNDS_MAX: u32 = 4;

impl Forest {
    /// Gives the forest its source of buckets. Without one it can only use what it has.
    pub fn set_node_buckets(&self, node_buckets: Arc<dyn NodeBuckets>) {
        let _ = self.node_buckets.set(node_buckets);
    }

    /// Asks for a checkpoint soon.
    pub fn request_checkpoint(&self) {
        if !self.checkpoint_requested.swap(true, Ordering::Relaxed) {
            self.checkpoint_event.notify();
        }
    }

    /// Notified when a checkpoint has ended or was asked for.
    #[must_use]
    pub fn checkpoint_event(&self) -> &Event {
        &self.checkpoint_event
    }

    /// Waits, if too many nodes are dirty, until a checkpoint has cleaned some. Call it before a commit, with no locks held.
    ///
    /// # Errors
    /// [`Error::Latched`] if checkpoints have failed.
    pub fn wait_for_dirty_room(&self) -> Result<()> {
        self.check_failure()?;
        if self.dirty_bytes() <= self.dirty_bytes_max {
            return Ok(());
        }
        // In simulation the running checkpoint is below us on the stack: waiting for it would be for ever.
        if self.env.is_simulated() && self.checkpoint_running.load(Ordering::Relaxed) {
            return Ok(());
        }
        self.metrics.transaction_checkpoint_waits.increment();
        let seen = self.checkpoints_done.load(Ordering::Relaxed);
        self.request_checkpoint();
        self.env.wait(&self.checkpoint_event, || {
            let room = self.dirty_bytes() <= self.dirty_bytes_max;
            (room || self.checkpoints_done.load(Ordering::Relaxed) != seen || self.failure.lock().is_some())
                .then_some(())
        })?;
        self.check_failure()
    }

    /// Makes a checkpoint; waits for one that is running first. Holds no lock for longer than it takes to move a few pointers.
    ///
    /// # Errors
    /// If there is no space for nodes; if a device fails ([`Error::Latched`] ever after).
    pub fn checkpoint(&self, log: &dyn CheckpointLog, reason: CheckpointReason) -> Result<CheckpointOutcome> {
        self.env.wait(&self.checkpoint_event, || self.try_begin().then_some(()))?;
        self.run_checkpoint(log, reason)
    }

    fn try_begin(&self) -> bool {
        self.checkpoint_running.compare_exchange(false, true, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    fn run_checkpoint(&self, log: &dyn CheckpointLog, reason: CheckpointReason) -> Result<CheckpointOutcome> {
        let started = self.env.monotonic();
        self.checkpoint_requested.store(false, Ordering::Relaxed);
        let outcome = self.check_failure().and_then(|()| self.make_checkpoint(log, reason));
        let duration = self.env.monotonic().saturating_sub(started);
        self.checkpoint_running.store(false, Ordering::Release);
        self.checkpoints_done.fetch_add(1, Ordering::Relaxed);
        self.shrink_cache();
        self.checkpoint_event.notify();
        let mut outcome = outcome?;
        outcome.duration = duration;
        let micros = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        self.metrics.checkpoint_duration_max_us.raise_to(micros);
        Ok(outcome)
    }

    fn make_checkpoint(&self, log: &dyn CheckpointLog, reason: CheckpointReason) -> Result<CheckpointOutcome> {
        self.merge_small_nodes()?;
        let needed = self.estimate_slots();
        let claimed = self.ensure_slots(needed, log)?;
        let boundary = log.boundary()?;
        {
            let kept = self.kept.lock();
            let unchanged = boundary.first_replay.0 == kept.newest.first_replay && kept.newest.number > 0;
            if unchanged && self.dirty_count.load(Ordering::Relaxed) == 0 && reason != CheckpointReason::Close {
                return Ok(CheckpointOutcome { number: kept.newest.number, ..CheckpointOutcome::default() });
            }
        }
        let mut attempt = Attempt {
            forest: self,
            log,
            first_replay: boundary.first_replay,
            flush_upto: claimed.max(JournalSequence(boundary.first_replay.0.saturating_sub(1))),
            changes: SlotChanges::default(),
            spare: None,
            structure_held: false,
            writes: Vec::new(),
            write_bytes: 0,
            pinned: Vec::new(),
            outcome: CheckpointOutcome::default(),
        };
        let published = attempt.serialise_all().and_then(|roots| attempt.publish(roots, &boundary, reason));
        if let Err(error) = &published {
            tracing::error!("a checkpoint failed, nothing more will be written: {error}");
            self.fail(&format!("a checkpoint failed: {error}"));
        }
        let older = published?;
        let outcome = attempt.outcome;
        drop(attempt);
        log.release_before(older.0, older.1);
        self.metrics.checkpoints.increment();
        self.give_back_surplus(needed)?;
        Ok(outcome)
    }

    /// Slots that a checkpoint would take now: full images of dirty nodes, and some for their parents.
    fn estimate_slots(&self) -> usize {
        let dirty: Vec<Arc<Node>> = self.dirty.lock().nodes.values().cloned().collect();
        let mut full = 0;
        for node in &dirty {
            let content = node.content.read();
            let appends = content
                .image
                .as_ref()
                .is_some_and(|image| !content.rewrite && self.append_fits(image, content.recent_bytes));
            full += usize::from(!appends);
        }
        (full + full / 8 + 16) * self.limits.copies
    }

    fn append_fits(&self, image: &NodePointer, payload_bytes: usize) -> bool {
        let end = append_offset(image.written_bytes as usize) + BsetHeader::BYTES + payload_bytes;
        end <= self.limits.node_bytes && image.bset_count < u16::MAX
    }

    /// Makes sure of `slots` free slots if buckets can be had. Returns up to where the journal must be durable for what was claimed.
    fn ensure_slots(&self, slots: usize, log: &dyn CheckpointLog) -> Result<JournalSequence> {
        let mut claimed = JournalSequence(0);
        loop {
            let (free, bucket_slots) = {
                let space = self.space.lock();
                (space.free_slots(), space.bucket_slots())
            };
            if free >= slots {
                return Ok(claimed);
            }
            let Some(node_buckets) = self.node_buckets.get() else {
                return Err(Error::NoSpace("there are no buckets for B-tree nodes"));
            };
            let count = (slots - free).div_ceil(bucket_slots.max(1)).max(self.limits.copies);
            let buckets = node_buckets.claim(count)?;
            if buckets.is_empty() {
                return Err(Error::NoSpace("no bucket can be given to B-tree nodes"));
            }
            claimed = log.newest();
            let mut space = self.space.lock();
            for (device, bucket) in buckets {
                space.add_bucket(device, bucket);
            }
        }
    }

    /// Gives a few buckets back if many slots are free.
    fn give_back_surplus(&self, needed: usize) -> Result<()> {
        let Some(node_buckets) = self.node_buckets.get() else { return Ok(()) };
        let surplus = {
            let space = self.space.lock();
            let keep = needed * 2 + space.used_slots() / 2 + 4 * space.bucket_slots();
            space.surplus(keep, 8)
        };
        for (device, bucket) in surplus {
            self.space.lock().forget_bucket(device, bucket)?;
            node_buckets.release(device, bucket)?;
        }
        Ok(())
    }

    /// The journal, replayed, says that a bucket is, or is no longer, for nodes.
    pub(super) fn replay_bucket(&self, position: Position, value: Option<&[u8]>) -> Result<()> {
        use crate::format::space::{Bucket, BucketState};
        let device = u8::try_from(position.inode)
            .map_err(|_| Error::corrupt("journal", format!("a bucket of device {}", position.inode)))?;
        let (device, bucket) = (DeviceIndex(device), BucketIndex(position.offset));
        let state = value.map(Bucket::decode).transpose()?.map_or(BucketState::Free, |bucket| bucket.state);
        let mut space = self.space.lock();
        if state == BucketState::Metadata {
            let known = self.reader.superblock.members.get(usize::from(device.0));
            if known.is_none_or(|member| bucket.0 >= member.bucket_count) {
                return Err(Error::corrupt("journal", format!("bucket {bucket} of device {device} does not exist")));
            }
            space.add_bucket(device, bucket);
            Ok(())
        } else {
            space.forget_bucket(device, bucket)
        }
    }

    /// A worker that makes checkpoints: when asked, when the journal is 40% full, and every `interval`.
    pub fn checkpoint_worker(self: &Arc<Self>, log: Arc<dyn CheckpointLog>, interval: Duration) -> Arc<dyn Worker> {
        let last = Mutex::new(self.env.monotonic());
        Arc::new(CheckpointWorker { forest: Arc::clone(self), log, interval, last })
    }
}

impl Attempt<'_> {
    /// Serialises everything that must be in this checkpoint; returns its roots.
    fn serialise_all(&mut self) -> Result<Vec<(Root, NodePointer)>> {
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
            }
        }
        let mut roots = Vec::new();
        for btree in BtreeId::ALL {
            loop {
                let root = self.forest.root(btree);
                let (image, empty) = {
                    let content = root.content.read();
                    (content.image.clone(), content.live_keys == 0 && root.level == 0)
                };
                match image {
                    Some(pointer) => {
                        let mut encoded = Vec::new();
                        pointer.encode(&mut encoded);
                        roots.push((Root { btree: btree as u8, level: root.level, pointer: encoded }, pointer));
                        break;
                    }
                    None if empty => break,
                    None => self.serialise_and_link(&root)?,
                }
            }
        }
        self.write_images(0)?;
        Ok(roots)
    }

    fn serialise_and_link(&mut self, node: &Arc<Node>) -> Result<()> {
        if let Some(pointer) = self.serialise(node)? {
            self.forest.link(node, &pointer)?;
        }
        Ok(())
    }

    /// Makes sure of slots for one full image. [`Error::Restart`] if that would need a claim while splits are held off.
    fn ensure_spare(&mut self) -> Result<()> {
        while self.spare.is_none() {
            let copies = self.forest.limits.copies;
            self.spare = self.forest.space.lock().allocate(copies);
            if self.spare.is_none() {
                if self.structure_held {
                    return Err(Error::Restart);
                }
                let free = self.forest.space.lock().free_slots();
                let claimed = self.forest.ensure_slots(free + 8 * copies, self.log)?;
                self.flush_upto = self.flush_upto.max(claimed);
            }
        }
        Ok(())
    }

    /// Moves a node's changes aside, when all its children have images. `None` if there is nothing to write.
    fn freeze(&mut self, node: &Arc<Node>) -> Result<Option<Frozen>> {
        let forest = self.forest;
        for round in 0.. {
            let hold = round >= FREEZE_ROUNDS_MAX;
            if hold {
                forest.ensure_slots(16 * forest.limits.copies, self.log).map(|claimed| {
                    self.flush_upto = self.flush_upto.max(claimed);
                })?;
            }
            self.ensure_spare()?;
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
                Err(Error::Restart) if held_here => {}
                Err(error) => return Err(error),
                Ok(Some(frozen)) => return Ok(frozen),
                Ok(None) => {}
            }
        }
        Ok(None)
    }

    /// One round: freezes the node if all children have images, else serialises those that have none. While splits are held off that is
    /// enough, and the node is frozen in the same round.
    fn freeze_round(&mut self, node: &Arc<Node>) -> Result<Option<Option<Frozen>>> {
        loop {
            let unimaged: Vec<Arc<Node>> = {
                let mut content = node.content.write();
                if content.unimaged.is_empty() || content.retired {
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
        self.flush_upto = self.flush_upto.max(frozen.newest);
        self.pinned.push(Arc::clone(node));
        self.outcome.nodes += 1;
        if node.level > 0 {
            self.note_reachability(&frozen)?;
        }
        let append = frozen
            .image
            .as_ref()
            .filter(|image| !frozen.rewrite && self.forest.append_fits(image, packed_changes_bytes(&frozen.recent)));
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
    fn write_images(&mut self, threshold_bytes: usize) -> Result<()> {
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

    /// Makes the images durable and publishes them. Returns the older kept checkpoint's F: its place in the ring, and its sequence.
    fn publish(
        &mut self,
        roots: Vec<(Root, NodePointer)>,
        boundary: &LogBoundary,
        reason: CheckpointReason,
    ) -> Result<(u64, JournalSequence)> {
        let forest = self.forest;
        self.log.flush(self.flush_upto)?;
        forest.reader.flush()?;

        let (newest, previous, published_map, number) = {
            let mut kept = forest.kept.lock();
            let pending = std::mem::take(&mut kept.pending);
            self.changes.add(&pending);
            let previous = kept.previous.as_ref().map(|previous| previous.map.clone()).unwrap_or_default();
            (kept.newest.clone(), previous, kept.published_map.clone(), kept.next_number)
        };
        for root in &newest.roots {
            self.changes.replace(Some(&NodePointer::decode(&root.pointer)?), None);
        }
        for (_, pointer) in &roots {
            self.changes.replace(None, Some(pointer));
        }
        let pages = forest.space.lock().pages(&self.changes)?;
        let map = forest.reader.write_map(&pages, &published_map, &newest.map, &previous)?;
        let record = Checkpoint {
            number,
            epoch: forest.epoch,
            first_replay: boundary.first_replay.0,
            first_replay_offset: boundary.offset,
            previous_record_checksum: boundary.previous_checksum,
            newest_sequence: self.flush_upto.0,
            roots: roots.into_iter().map(|(root, _)| root).collect(),
            totals: boundary.totals.clone(),
            next_node: forest.next_node.load(Ordering::Relaxed),
            clean: reason == CheckpointReason::Close && forest.dirty_count.load(Ordering::Relaxed) == 0,
            map,
            written_at: forest.env.now().seconds,
        };
        // The pages must be there before a record names them.
        forest.reader.flush()?;
        forest.reader.write_record(&record)?;
        forest.reader.flush()?;

        self.outcome.number = number;
        let older = (newest.first_replay_offset, JournalSequence(newest.first_replay));
        {
            let mut space = forest.space.lock();
            space.publish(&pages);
        }
        let mut kept = forest.kept.lock();
        kept.previous = (newest.number > 0).then_some(newest);
        kept.newest = record;
        kept.next_number = number + 1;
        kept.published_map = pages;
        Ok(older)
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
        let run = run.or_else(|| {
            (layers >= FROZEN_LAYERS_MAX).then(|| {
                let mut all = frozen.older.clone();
                all.push(Arc::clone(&frozen.recent));
                Content::fold(&frozen.base, &all)
            })
        });
        let mut content = node.content.write();
        content.image = Some(pointer.clone());
        content.rewrite = false;
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

    fn check_failure(&self) -> Result<()> {
        match &*self.failure.lock() {
            Some(reason) => Err(Error::Latched { reason: reason.clone() }),
            None => Ok(()),
        }
    }
}

struct CheckpointWorker {
    forest: Arc<Forest>,
    log: Arc<dyn CheckpointLog>,
    interval: Duration,
    /// When the last one ended.
    last: Mutex<Duration>,
}

/// How full the journal may get before a checkpoint starts.
const JOURNAL_FILL_PERMILLE: u32 = 400;
/// How often the journal's fill is looked at.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

impl Worker for CheckpointWorker {
    fn name(&self) -> &'static str {
        "checkpoint"
    }

    fn step(&self, _budget: u32) -> Result<Progress> {
        let forest = &self.forest;
        let env: &Env = &forest.env;
        let idle = Progress::Idle(Some(POLL_INTERVAL.min(self.interval)));
        let overdue = env.monotonic().saturating_sub(*self.last.lock()) >= self.interval;
        let asked =
            forest.checkpoint_requested.load(Ordering::Relaxed) || self.log.fill_permille() >= JOURNAL_FILL_PERMILLE;
        let dirty = forest.dirty_count.load(Ordering::Relaxed) > 0;
        if !asked && !(overdue && dirty) {
            return Ok(idle);
        }
        if !forest.try_begin() {
            return Ok(idle);
        }
        let reason = if asked { CheckpointReason::Requested } else { CheckpointReason::Periodic };
        let outcome = forest.run_checkpoint(&*self.log, reason);
        *self.last.lock() = env.monotonic();
        outcome?;
        Ok(Progress::Worked)
    }

    fn event(&self) -> &Event {
        &self.forest.checkpoint_event
    }
}
