//! What the passes collect and hand on.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::hash::{BuildHasher, RandomState};

use coppicefs::btree::UsedSlots;
use coppicefs::format::Position;
use coppicefs::format::namespace::FileType;
use coppicefs::format::space::Bucket;

use crate::passes::Published;

/// What the passes know of an inode of the present window.
#[derive(Clone, Debug)]
pub struct InodeFacts {
    /// Number.
    pub inode: u64,
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
    /// Directories in it (if it is one).
    pub subdirectories: u32,
    /// Entries in it.
    pub entries: u64,
    /// Directory and name hash that it says it is named by.
    pub parent: (u64, u64),
    /// The first place where it is named; the one that it knows, if it is a directory with several.
    pub named_at: Option<(u64, u64)>,
    /// Whether one of its names stands where it says.
    pub parent_confirmed: bool,
}

/// Bytes of the facts about one inode.
pub const FACTS_BYTES: u64 = size_of::<InodeFacts>() as u64;

/// One of all inodes.
#[derive(Clone, Copy, Debug)]
pub struct Found {
    at: usize,
    /// Its number.
    pub inode: u64,
    /// Whether it is a directory.
    pub is_directory: bool,
}

/// A range of inode numbers, both inclusive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// First.
    pub first: u64,
    /// Last.
    pub last: u64,
}

impl Default for Window {
    fn default() -> Self {
        Self { first: 0, last: u64::MAX }
    }
}

impl Window {
    /// Whether an inode number is in it.
    #[must_use]
    pub fn contains(&self, inode: u64) -> bool {
        (self.first..=self.last).contains(&inode)
    }
}

/// In the index: set for directories. Inode numbers are far below.
const DIRECTORY: u64 = 1 << 63;

/// Everything that the passes know so far.
#[derive(Debug, Default)]
pub struct State {
    /// All inodes, ascending; [`DIRECTORY`] is set for directories.
    index: Vec<u64>,
    /// All directories, ascending, with the one that names them; 0 for none so far.
    directories: Vec<(u64, u64)>,
    /// The inodes that are looked at now.
    pub window: Window,
    /// Facts about them, ascending.
    facts: Vec<InodeFacts>,
    /// How many inodes there are before the window's first.
    facts_from: usize,
    has_all_facts: bool,
    facts_peak: usize,
    /// Inodes that are noted for deletion, of the window.
    pub orphans: HashSet<u64>,
    /// Buckets as the extents and the nodes say: charged bytes, for data buckets.
    pub data_buckets: BTreeMap<(u8, u64), u64>,
    /// Buckets that hold reachable nodes, or that the node-space map claims.
    pub metadata_buckets: BTreeMap<(u8, u64), u64>,
    /// Buckets as the buckets tree says.
    pub stored_buckets: BTreeMap<(u8, u64), Bucket>,
    /// Whether that was read.
    pub has_buckets: bool,
    /// Ranges of keys that are lost, by tree: scans jump over them.
    pub lost: HashMap<u8, Vec<(Position, Position)>>,
    /// Backpointers that ought to exist.
    pub backpointers_expected: u64,
    /// Generations of buckets that have no key: the newest that a pointer has.
    pub generations: BTreeMap<(u8, u64), u32>,
    /// Buckets that hold something although their keys say otherwise.
    pub in_use_buckets: Vec<(u8, u64)>,
    /// All slots of nodes, with the checkpoint's number, if the node-space map says otherwise.
    pub in_use_slots: Option<(u64, Vec<UsedSlots>)>,
    /// Counters as recomputed.
    pub totals: HashMap<u16, i64>,
    /// The checkpoint whose leaves the passes read.
    pub(crate) published: Option<Box<Published>>,
    /// The sum of the hashes of all backpointers that ought to exist, each by [`State::backpointer_hash`].
    pub backpointers_sum: u64,
    hashes: RandomState,
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
    /// Block in the decoded frame: parts of one compressed frame share its bytes.
    pub block: u32,
    /// The extent's key.
    pub position: Position,
}

impl State {
    /// Adds to a recomputed counter.
    pub fn count(&mut self, counter: coppicefs::format::journal::AccountingCounter, delta: i64) {
        *self.totals.entry(counter as u16).or_default() += delta;
    }

    /// Adds an inode to the index. They come in ascending order.
    pub fn add_to_index(&mut self, inode: u64, is_directory: bool) {
        self.index.push(if is_directory { inode | DIRECTORY } else { inode });
        if is_directory {
            self.directories.push((inode, 0));
        }
    }

    /// Which of all inodes it is, if it exists.
    #[must_use]
    pub fn find(&self, inode: u64) -> Option<Found> {
        let at = self.index.binary_search_by_key(&inode, |entry| entry & !DIRECTORY).ok()?;
        self.index.get(at).map(|entry| Found { at, inode, is_directory: entry & DIRECTORY != 0 })
    }

    /// Whether an inode exists.
    #[must_use]
    pub fn exists(&self, inode: u64) -> bool {
        self.find(inode).is_some()
    }

    /// Facts about an inode that was found, if it is of the window.
    pub fn facts_of(&mut self, found: Found) -> Option<&mut InodeFacts> {
        let at = found.at.checked_sub(self.facts_from)?;
        // The index was made from the same keys: each of its inodes has facts.
        self.facts.get_mut(at).filter(|facts| facts.inode == found.inode)
    }

    /// Hash of a backpointer: keyed anew for each check, so that no two sets of them have one sum but by chance, at 2^-64.
    #[must_use]
    pub fn backpointer_hash(&self, place: Position, value: &[u8]) -> u64 {
        self.hashes.hash_one((place.inode, place.offset, place.snapshot, value))
    }

    /// Takes facts about all inodes, ascending: there is one window.
    pub fn set_all_facts(&mut self, facts: Vec<InodeFacts>) {
        self.facts_peak = self.facts_peak.max(facts.len());
        self.facts = facts;
        self.facts_from = 0;
        self.window = Window::default();
        self.has_all_facts = true;
    }

    /// Whether facts about all inodes are there.
    #[must_use]
    pub fn has_all_facts(&self) -> bool {
        self.has_all_facts
    }

    /// All directories, ascending.
    pub fn directories(&self) -> impl Iterator<Item = u64> {
        self.directories.iter().map(|(inode, _)| *inode)
    }

    /// The directory that names a directory.
    #[must_use]
    pub fn named_in(&self, directory: u64) -> Option<u64> {
        let found = self.directories.binary_search_by_key(&directory, |(inode, _)| *inode).ok()?;
        self.directories.get(found).map(|(_, parent)| *parent).filter(|parent| *parent != 0)
    }

    /// Bytes of what is kept of all inodes.
    #[must_use]
    pub fn index_bytes(&self) -> u64 {
        (size_of_val(self.index.as_slice()) + size_of_val(self.directories.as_slice())) as u64
    }

    /// Most bytes that facts took.
    #[must_use]
    pub fn facts_bytes(&self) -> u64 {
        self.facts_peak as u64 * FACTS_BYTES
    }

    /// Ranges of numbers with at most so many inodes each, which together are all numbers.
    #[must_use]
    pub fn windows(&self, inodes_max: usize) -> Vec<Window> {
        let mut windows = Vec::new();
        let mut first = 0;
        for chunk in self.index.chunks(inodes_max.max(1)) {
            let last = chunk.last().map_or(u64::MAX, |entry| entry & !DIRECTORY);
            windows.push(Window { first, last });
            first = last + 1;
        }
        match windows.last_mut() {
            Some(window) => window.last = u64::MAX,
            None => windows.push(Window::default()),
        }
        windows
    }

    /// Goes on to another window.
    pub fn begin(&mut self, window: Window) {
        self.end_windows();
        self.window = window;
        self.facts_from = self.index.partition_point(|entry| entry & !DIRECTORY < window.first);
        let behind = self.index.partition_point(|entry| entry & !DIRECTORY <= window.last);
        self.facts.reserve_exact(behind.saturating_sub(self.facts_from));
    }

    /// Keeps of the facts only who names which directory.
    pub fn end_windows(&mut self) {
        for facts in &self.facts {
            if let (Some((parent, _)), Ok(found)) =
                (facts.named_at, self.directories.binary_search_by_key(&facts.inode, |(inode, _)| *inode))
                && let Some(entry) = self.directories.get_mut(found)
            {
                entry.1 = parent;
            }
        }
        self.facts_peak = self.facts_peak.max(self.facts.len());
        self.facts = Vec::new();
        self.orphans.clear();
    }

    /// Adds facts about an inode of the window. They come in ascending order.
    pub fn add(&mut self, facts: InodeFacts) {
        self.facts.push(facts);
        self.facts_peak = self.facts_peak.max(self.facts.len());
    }

    /// Facts about the window's inodes, ascending.
    #[must_use]
    pub fn inodes(&self) -> &[InodeFacts] {
        &self.facts
    }

    /// Facts about an inode of the window.
    #[must_use]
    pub fn inode(&self, inode: u64) -> Option<&InodeFacts> {
        let found = self.facts.binary_search_by_key(&inode, |facts| facts.inode).ok()?;
        self.facts.get(found)
    }
}
