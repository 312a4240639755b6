//! What the passes collect and hand on.

use std::collections::{BTreeMap, HashMap, HashSet};

use coppicefs::btree::UsedSlots;
use coppicefs::format::Position;
use coppicefs::format::namespace::FileType;
use coppicefs::format::space::Bucket;

/// What the inodes pass keeps of an inode.
#[derive(Clone, Debug)]
pub struct InodeFacts {
    /// Its type; `None` if the mode names none.
    pub file_type: Option<FileType>,
    /// Its stored link count.
    pub link_count: u32,
    /// Its stored size.
    pub size: u64,
    /// Bytes that it says its extents hold.
    pub allocated_bytes: u64,
    /// Bytes that its extents hold.
    pub found_bytes: u64,
    /// Names found for it.
    pub names: u32,
    /// Directories in it (if it is one), or entries.
    pub subdirectories: u32,
    /// Entries in it.
    pub entries: u64,
    /// Directory and name hash that it says it is named by.
    pub parent: (u64, u64),
    /// The first place where it is named.
    pub named_at: Option<(u64, u64)>,
    /// Whether one of its names stands where it says.
    pub parent_confirmed: bool,
}

/// Everything that the passes know so far.
#[derive(Debug, Default)]
pub struct State {
    /// Inodes by number.
    pub inodes: HashMap<u64, InodeFacts>,
    /// Inodes that are noted for deletion.
    pub orphans: HashSet<u64>,
    /// Inodes that a logged operation works on.
    pub logged: HashSet<u64>,
    /// Buckets as the extents and the nodes say: charged bytes, for data buckets.
    pub data_buckets: BTreeMap<(u8, u64), u64>,
    /// Buckets that hold reachable nodes, or that the node-space map claims.
    pub metadata_buckets: BTreeMap<(u8, u64), u64>,
    /// Buckets as the buckets tree says.
    pub stored_buckets: BTreeMap<(u8, u64), Bucket>,
    /// Ranges of keys that are lost, by tree: scans jump over them.
    pub lost: HashMap<u8, Vec<(Position, Position)>>,
    /// Physical ranges of extents: device, offset, bytes, the key, and whether the frame may be shared by parts of it.
    pub physical: Vec<PhysicalRange>,
    /// Generations of buckets that have no key: the newest that a pointer has.
    pub generations: BTreeMap<(u8, u64), u32>,
    /// Buckets that hold something although their keys say otherwise.
    pub in_use_buckets: Vec<(u8, u64)>,
    /// All slots of nodes, with the checkpoint's number, if the node-space map says otherwise.
    pub in_use_slots: Option<(u64, Vec<UsedSlots>)>,
    /// Counters as recomputed.
    pub totals: HashMap<u16, i64>,
    /// Backpointers that ought to exist.
    pub backpointers_expected: u64,
}

/// Where an extent's bytes lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PhysicalRange {
    /// Device.
    pub device: u8,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub bytes: u32,
    /// The extent's key.
    pub position: Position,
    /// Parts of one compressed frame share its bytes: offset of this one in the decoded frame, and its length.
    pub part: Option<(u32, u32)>,
}

impl State {
    /// Adds to a recomputed counter.
    pub fn count(&mut self, counter: coppicefs::format::journal::AccountingCounter, delta: i64) {
        *self.totals.entry(counter as u16).or_default() += delta;
    }
}
