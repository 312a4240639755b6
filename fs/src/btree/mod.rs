//! B-trees of large, log-structured nodes, made durable by atomic checkpoints.
//!
//! **Guarantees.** [`Forest::get`] and [`Forest::scan`] see each leaf at one instant. A commit ([`Forest::lock_leaves`]) sees and changes
//! all its leaves at one instant. After a checkpoint, the trees as of its boundary F can be read from what its record names; with the
//! journal from F on replayed, nothing that was durable is lost. The previous checkpoint stays valid for the same.
//!
//! **How.** A node in memory is layers of changes above what its image holds (`node`). Only a checkpoint writes nodes: it appends
//! what changed as a bset to the node's slot, or writes the node whole elsewhere (`checkpoint`). Interior nodes hold pointers to
//! images, so a child that was written changes its parent, up to the roots, which stand in the checkpoint's record: the one point
//! of publication.
//!
//! **Lock order.** `structure` -> a root slot -> a node's content, parent before child, leaves in (tree, position) order -> the list of dirty
//! nodes, a shard of the cache, the loading set, the node space. The last four are leaves: nothing is locked under them. No lock
//! is held over I/O or while waiting.

mod area;
mod buckets;
mod bulk;
mod cache;
mod checkpoint;
mod compact;
mod descent;
mod image;
mod keys;
mod locking;
mod log;
mod merge;
mod node;
mod node_space;
mod reader;
mod repair;
mod run;
mod salvage;
mod scrub;
mod serialise;
mod structure;
#[cfg(test)]
mod tests;
mod walk;
mod worker;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::OnceLock;

use crate::alloc::TestSwitches;
use crate::alloc::capacity::DIRTY_NODES_MIN;
use crate::device::BlockDevice;
use crate::env::{Env, Event};
use crate::error::{Error, Result};
use crate::format::checkpoint::Checkpoint;
use crate::format::node::NodePointer;
use crate::format::superblock::Superblock;
use crate::format::{BtreeId, Position, Value};
use crate::metrics::Metrics;
use crate::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicU64, Ordering};
use crate::sync::{Arc, LockClass, Mutex, Rank, RwLock};
#[cfg(test)]
use crate::units::JournalSequence;
use crate::units::{BucketIndex, DeviceIndex, NodeId};

pub use buckets::NodeBuckets;
pub use bulk::{BulkWriter, FreeSlots};
pub use checkpoint::{CheckpointOutcome, CheckpointReason};
pub use descent::Around;
pub use keys::Keys;
pub use locking::LockedLeaves;
pub use log::{CheckpointLog, LogBoundary};
pub use reader::NodeReader;
pub use repair::UsedSlots;
pub use salvage::{NodeSummary, may_be_node, salvage_keys, summarise};
pub use scrub::{CheckpointHold, NodeCursor, ScrubFinding, Scrubbed};
pub use walk::{LeafRange, PublishedNode, stream_leaves, walk_interior, walk_published};

use cache::NodeCache;
use checkpoint::Kept;
use image::{Expected, LEVEL_MAX};
use node::{Content, Limits, Node};
use node_space::NodeSpace;

/// What a forest needs to know.
#[derive(Clone, Debug)]
pub struct ForestConfig {
    /// Geometry, members, checkpoint area.
    pub superblock: Arc<Superblock>,
    /// Devices in the order of the superblock's members.
    pub devices: Vec<Arc<dyn BlockDevice>>,
    /// Budget in bytes for nodes in memory. May be changed while the filesystem runs.
    pub cache_bytes: Arc<AtomicU64>,
    /// Most bytes of new slots that dirty nodes may need: commits beyond wait for a checkpoint. Dirty nodes whose changes fit behind
    /// their image need none; all together they may take a quarter of `cache_bytes`, or 24 nodes of this if that is more.
    pub dirty_bytes_max: u64,
    /// This life's mount epoch, above every one before: node ids are made from it.
    pub epoch: u64,
}

/// Which checkpoint a forest is opened from.
#[derive(Clone, Debug)]
pub struct Opening {
    /// The one to read. Number 0 for a filesystem that has none yet.
    pub newest: Checkpoint,
    /// The one before it, whose nodes are kept too.
    pub previous: Option<Checkpoint>,
    /// Number of the next checkpoint.
    pub next_number: u64,
    /// Newer ones that cannot be used, newest first.
    pub passed_over: Vec<PassedOver>,
}

/// A checkpoint that cannot be used, though nothing newer can either.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PassedOver {
    /// Its number.
    pub number: u64,
    /// What is wrong with it.
    pub reason: String,
    /// It was whole once. If not: a power cut while its record was written looks the same.
    pub is_damage: bool,
}

impl Opening {
    /// Of a filesystem that was never written: all trees are empty.
    #[must_use]
    pub fn empty() -> Self {
        let newest = Checkpoint {
            number: 0,
            epoch: 0,
            first_replay: 1,
            first_replay_offset: 0,
            previous_record_checksum: 0,
            newest_sequence: 0,
            roots: Vec::new(),
            totals: Vec::new(),
            next_node: 1,
            clean: true,
            map: Vec::new(),
            written_at: 0,
        };
        Self { newest, previous: None, next_number: 1, passed_over: Vec::new() }
    }
}

/// A position that a commit needs locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeafTarget {
    /// Tree.
    pub btree: BtreeId,
    /// Position.
    pub position: Position,
    /// Whether the leaf is to be locked exclusively.
    pub write: bool,
}

/// Keys of one leaf, and how far they were looked for.
#[derive(Clone, Debug)]
pub struct Scan {
    /// In the order of the scan.
    pub keys: Vec<(Position, Value)>,
    /// Everything between the start and this position, inclusive, was seen.
    pub covered_to: Position,
}

/// Nodes that hold changes which no image has.
#[derive(Debug, Default)]
struct DirtyNodes {
    /// By level, tree and id: an order that does not depend on hashing.
    nodes: BTreeMap<(u8, BtreeId, NodeId), Arc<Node>>,
}

/// All trees of a filesystem. See the module's documentation.
pub struct Forest {
    reader: NodeReader,
    env: Arc<Env>,
    metrics: Arc<Metrics>,
    limits: Limits,
    cache: NodeCache,
    cache_bytes: Arc<AtomicU64>,
    dirty_bytes_max: u64,
    /// By tree. The slot's lock is taken before the root's content.
    roots: Vec<RwLock<Arc<Node>>>,
    dirty: Mutex<DirtyNodes>,
    dirty_count: AtomicU64,
    /// Nodes of the trees, written or not. Signed, since a merge may be counted before the split that it undoes.
    node_count: AtomicI64,
    /// Dirty nodes whose next image needs a new slot.
    dirty_slots: AtomicU64,
    /// Nodes that are being read.
    loading: Mutex<BTreeSet<NodeId>>,
    loaded: Event,
    /// Shared by splits and merges; exclusively by a checkpoint that wants none for a moment.
    structure: RwLock<()>,
    next_node: AtomicU64,
    epoch: u64,
    space: Mutex<NodeSpace>,
    node_buckets: OnceLock<Arc<dyn NodeBuckets>>,
    /// Nodes that shrank and may be merged.
    small_nodes: Mutex<BTreeSet<MergeCandidate>>,
    kept: Mutex<Kept>,
    checkpoint_running: AtomicBool,
    checkpoint_requested: AtomicBool,
    /// Another checkpoint would make node space free, or begin to.
    reclaim_pending: AtomicBool,
    reclaim_idle_rounds: AtomicU32,
    /// The last checkpoint failed for lack of space.
    checkpoint_lacked_space: AtomicBool,
    /// Buckets of which the replayed journal speaks, and whether they are for nodes now.
    replayed_buckets: Mutex<BTreeMap<(DeviceIndex, BucketIndex), bool>>,
    /// Newest journal sequence of what the next checkpoint's record will name: changes in images, and claims of their slots.
    counted_on: AtomicU64,
    checkpoints_done: AtomicU64,
    /// Notified when a checkpoint ends or is asked for.
    checkpoint_event: Event,
    /// The first failure after which nothing may be published any more.
    failure: Mutex<Option<String>>,
    /// Nodes whose images were to be written when that happened: memory alone has them, for ever.
    unwritten: Mutex<Vec<Arc<Node>>>,
    switches: OnceLock<TestSwitches>,
}

/// Level, tree and smallest position of a node.
type MergeCandidate = (u8, BtreeId, Position);

/// Bits of a node id below the epoch.
const NODE_COUNTER_BITS: u32 = 40;
/// The highest mount epoch whose node ids are of their own.
const EPOCH_MAX: u64 = u64::MAX >> NODE_COUNTER_BITS;

impl Forest {
    /// Opens the trees of a checkpoint. Reads the roots.
    ///
    /// # Errors
    /// If a root cannot be read; [`Error::Corrupt`] for an epoch that no number of mounts leads to.
    pub fn open(config: ForestConfig, opening: &Opening, env: Arc<Env>, metrics: Arc<Metrics>) -> Result<Arc<Self>> {
        if config.epoch > EPOCH_MAX {
            return Err(Error::corrupt("mount epoch", format!("it is {}, at most {EPOCH_MAX} can be", config.epoch)));
        }
        let limits = Limits::new(&config.superblock.geometry);
        let reader = NodeReader::new(config.superblock, config.devices, Arc::clone(&metrics));
        let map = reader.read_map(&opening.newest)?;
        let mut space = NodeSpace::new(&reader.superblock);
        for (page, entries) in map.iter().enumerate() {
            space.load_newest(page, entries)?;
        }
        if let Some(previous) = &opening.previous {
            for entries in reader.read_map(previous)? {
                space.load_previous(&entries);
            }
        }
        let mut forest = Self {
            reader,
            env,
            metrics,
            limits,
            cache: NodeCache::default(),
            cache_bytes: config.cache_bytes,
            dirty_bytes_max: config.dirty_bytes_max,
            roots: Vec::new(),
            dirty: Mutex::default(),
            dirty_count: AtomicU64::new(0),
            node_count: AtomicI64::new(0),
            dirty_slots: AtomicU64::new(0),
            loading: Mutex::default(),
            loaded: Event::new(),
            structure: RwLock::ranked(LockClass::new(Rank::Structure), ()),
            next_node: AtomicU64::new(config.epoch << NODE_COUNTER_BITS | 1),
            epoch: config.epoch,
            space: Mutex::new(space),
            node_buckets: OnceLock::new(),
            small_nodes: Mutex::default(),
            kept: Mutex::new(Kept::new(opening, map)),
            checkpoint_running: AtomicBool::new(false),
            checkpoint_requested: AtomicBool::new(false),
            reclaim_pending: AtomicBool::new(false),
            reclaim_idle_rounds: AtomicU32::new(0),
            checkpoint_lacked_space: AtomicBool::new(false),
            replayed_buckets: Mutex::default(),
            counted_on: AtomicU64::new(0),
            checkpoints_done: AtomicU64::new(0),
            checkpoint_event: Event::new(),
            failure: Mutex::new(None),
            unwritten: Mutex::default(),
            switches: OnceLock::new(),
        };
        for btree in BtreeId::ALL {
            let root = forest.open_root(btree, &opening.newest)?;
            let class = LockClass::keyed(Rank::RootSlot, [btree as u64, 0, 0, 0]);
            forest.roots.push(RwLock::ranked(class, root));
        }
        let published = forest.space.lock().used_slots() / limits.copies;
        let unwritten_roots = BtreeId::ALL.len().saturating_sub(opening.newest.roots.len());
        forest.node_count = AtomicI64::new(i64::try_from(published + unwritten_roots).unwrap_or(i64::MAX));
        Ok(Arc::new(forest))
    }

    fn open_root(&self, btree: BtreeId, checkpoint: &Checkpoint) -> Result<Arc<Node>> {
        let Some(root) = checkpoint.roots.iter().find(|root| root.btree == btree as u8) else {
            let content = Content::empty(0, self.limits, Position::MIN, None);
            let bytes = content.memory_bytes();
            return Ok(self.cache.insert(Node::new(self.new_node_id(), btree, content), bytes));
        };
        if root.level >= LEVEL_MAX {
            return Err(Error::corrupt(format!("root of the {} tree", btree.name()), format!("level {}", root.level)));
        }
        let pointer = NodePointer::decode(&root.pointer)?;
        let expected = Expected { btree, level: root.level, minimum: Position::MIN, limit: None };
        let node = self.read_node(&pointer, &expected)?;
        self.list_if_dirty(&node, &mut node.content.write());
        let bytes = node.content.read().memory_bytes();
        Ok(self.cache.insert(node, bytes))
    }

    /// Lists a node that became dirty. The caller has its content locked, or is the only one who knows the node.
    fn list_dirty(&self, node: &Arc<Node>) {
        let added = self.dirty.lock().nodes.insert((node.level, node.btree, node.id), Arc::clone(node)).is_none();
        if added {
            self.dirty_count.fetch_add(1, Ordering::Relaxed);
            // Early enough that commits can go on while it is made.
            if self.dirty_permille() > 750 {
                self.request_checkpoint();
            }
        }
    }

    /// Lists a node that was dirty when it was read: a copy of it is bad. Its content is locked by the caller.
    fn list_if_dirty(&self, node: &Arc<Node>, content: &mut Content) {
        if content.dirty {
            self.charge_slot(content);
            self.list_dirty(node);
        }
    }

    /// Counts a dirty node among those that need a new slot, when it begins to.
    fn charge_slot(&self, content: &mut Content) {
        if content.dirty && !content.charged_slot && content.needs_slot() {
            content.charged_slot = true;
            self.dirty_slots.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// How much of what dirty nodes may take they take, in space or in memory: 1000 is the cap.
    fn dirty_permille(&self) -> u64 {
        let node_bytes = self.limits.node_bytes as u64;
        // As much again may become dirty while a checkpoint writes these: all of it, and what others use, is to fit.
        let least = self.dirty_bytes_max.min(DIRTY_NODES_MIN * node_bytes);
        let memory_max = (self.cache_bytes.load(Ordering::Relaxed) / 4).max(least);
        let share = |count: &AtomicU64, most: u64| {
            (count.load(Ordering::Relaxed) * node_bytes).saturating_mul(1000) / most.max(node_bytes)
        };
        share(&self.dirty_slots, self.dirty_bytes_max).max(share(&self.dirty_count, memory_max))
    }

    /// The cap on dirty nodes that need a slot.
    fn dirty_nodes_max(&self) -> usize {
        usize::try_from(self.dirty_bytes_max).unwrap_or(usize::MAX) / self.limits.node_bytes.max(1)
    }

    /// Bytes of the dirty nodes, each counted as a whole slot.
    #[must_use]
    pub fn dirty_bytes(&self) -> u64 {
        self.dirty_count.load(Ordering::Relaxed) * self.limits.node_bytes as u64
    }

    /// Bytes of nodes in memory.
    #[must_use]
    pub fn cached_bytes(&self) -> u64 {
        self.cache.bytes()
    }

    /// The most bytes that they ever took.
    #[must_use]
    pub fn cached_peak_bytes(&self) -> u64 {
        self.cache.peak_bytes()
    }

    /// Packed bytes of keys that one transaction may always put into one leaf.
    #[must_use]
    pub fn leaf_bytes_max(&self) -> usize {
        self.limits.capacity_bytes / 4
    }

    /// Notes a failure after which no checkpoint may be published.
    fn fail(&self, reason: &str) {
        self.failure.lock().get_or_insert_with(|| reason.to_owned());
    }

    /// Whether there will be checkpoints.
    fn writes(&self) -> bool {
        !self.reader.devices.iter().any(|device| device.is_read_only()) && self.failure.lock().is_none()
    }

    /// No checkpoint will be published any more: the journal that they count on has failed. Whoever waits for one is told. Takes leaf locks only.
    pub fn abandon(&self, reason: &str) {
        self.fail(reason);
        self.checkpoint_event.notify();
    }
}
