//! The order in which locks are taken, as data: what rank each lock has, and what may be taken after what.
//!
//! ```text
//!   lifecycle -> inode -> add or block -> folio -> structure -> root slot -> node -> journal chain -> journal state
//!             -> outer leaf -> leaf -> inner leaf -> event
//! ```
//!
//! Equal ranks: inodes by ascending number; folios of one address space by ascending index; nodes with the parent before the child, and
//! those of a level by (tree, position). Of all other ranks a thread holds one lock at a time.

use std::fmt;

/// What kind of lock it is; decides its place in the order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rank {
    /// Held while a filesystem or a test's world is built up and torn down.
    Lifecycle,
    /// An inode's lock; key: its number.
    Inode,
    /// The blocking state of an add lock; key: the byte range.
    Block,
    /// The adding state of an add lock; key: the byte range.
    Add,
    /// A folio's lock; key: address space, index.
    Folio,
    /// The trees' structure: splits and merges against checkpoints.
    Structure,
    /// The slot of a tree's root; key: the tree.
    RootSlot,
    /// A node's content; key: [`LockClass::node`].
    Node,
    /// The journal's chain of records.
    JournalChain,
    /// The journal's state.
    JournalState,
    /// A mutex under which one [`Rank::Leaf`] may be taken.
    OuterLeaf,
    /// A mutex under which no other is taken, but for the two that follow. The rank of a lock that is given none.
    Leaf,
    /// A mutex that is taken under a [`Rank::Leaf`].
    InnerLeaf,
    /// What an [`Event`](crate::env::Event) and a simulated [`Env`](crate::env::Env) lock: nothing is ever taken under it.
    Event,
}

/// The rule, for reports.
#[cfg(all(debug_assertions, not(loom)))]
pub(super) const RULE: &str = "lifecycle -> inode (by number) -> add or block -> folio (of one file, by index) -> structure -> root slot \
     -> node (parent before child, one level by tree and position) -> journal chain -> journal state -> outer leaf -> leaf -> inner leaf -> event";

impl Rank {
    /// Its place in the order: a lock is taken only after locks of lower places.
    #[cfg(all(debug_assertions, not(loom)))]
    pub(super) fn place(self) -> u8 {
        match self {
            Self::Lifecycle => 0,
            Self::Inode => 1,
            // Two states of one lock.
            Self::Block | Self::Add => 2,
            Self::Folio => 3,
            Self::Structure => 4,
            Self::RootSlot => 5,
            Self::Node => 6,
            Self::JournalChain => 7,
            Self::JournalState => 8,
            Self::OuterLeaf => 9,
            Self::Leaf => 10,
            Self::InnerLeaf => 11,
            Self::Event => 12,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Lifecycle => "lifecycle",
            Self::Inode => "inode",
            Self::Block => "block",
            Self::Add => "add",
            Self::Folio => "folio",
            Self::Structure => "structure",
            Self::RootSlot => "root slot",
            Self::Node => "node",
            Self::JournalChain => "journal chain",
            Self::JournalState => "journal state",
            Self::OuterLeaf => "outer leaf",
            Self::Leaf => "leaf",
            Self::InnerLeaf => "inner leaf",
            Self::Event => "event",
        }
    }
}

impl fmt::Display for Rank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A set of ranks: those that may be held over something. Zero-sized in release builds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RankSet {
    #[cfg(all(debug_assertions, not(loom)))]
    bits: u16,
}

impl RankSet {
    /// No rank.
    pub const NONE: Self = Self::of(&[]);

    /// These ranks.
    #[cfg(all(debug_assertions, not(loom)))]
    #[must_use]
    pub const fn of(ranks: &[Rank]) -> Self {
        let mut bits = 0;
        let mut rest = ranks;
        while let [first, others @ ..] = rest {
            bits |= 1 << *first as u16;
            rest = others;
        }
        Self { bits }
    }

    /// These ranks.
    #[cfg(not(all(debug_assertions, not(loom))))]
    #[must_use]
    pub const fn of(_: &[Rank]) -> Self {
        Self {}
    }
}

#[cfg(all(debug_assertions, not(loom)))]
impl RankSet {
    /// Whether `rank` is one of them.
    pub(super) const fn contains(self, rank: Rank) -> bool {
        self.bits & 1 << rank as u16 != 0
    }
}

#[cfg(all(debug_assertions, not(loom)))]
impl fmt::Display for RankSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = [Rank::Lifecycle, Rank::Inode, Rank::Block, Rank::Add, Rank::Folio, Rank::Structure];
        let names: Vec<_> = all.into_iter().filter(|&rank| self.contains(rank)).map(Rank::name).collect();
        f.write_str(&if names.is_empty() { "nothing".to_owned() } else { names.join(", ") })
    }
}

/// A lock's rank, and its key among equals. Zero-sized in release builds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LockClass {
    #[cfg(all(debug_assertions, not(loom)))]
    rank: Rank,
    #[cfg(all(debug_assertions, not(loom)))]
    key: [u64; 4],
}

impl Default for LockClass {
    fn default() -> Self {
        Self::new(Rank::Leaf)
    }
}

impl LockClass {
    /// The class of the only lock of a rank that a thread holds.
    #[must_use]
    pub const fn new(rank: Rank) -> Self {
        Self::keyed(rank, [0; 4])
    }

    /// The class of one of several; what the key means, see [`Rank`].
    #[cfg(all(debug_assertions, not(loom)))]
    #[must_use]
    pub const fn keyed(rank: Rank, key: [u64; 4]) -> Self {
        Self { rank, key }
    }

    /// The class of one of several; what the key means, see [`Rank`].
    #[cfg(not(all(debug_assertions, not(loom))))]
    #[must_use]
    pub const fn keyed(_: Rank, _: [u64; 4]) -> Self {
        Self {}
    }

    /// The class of an inode's lock.
    #[must_use]
    pub const fn inode(number: u64) -> Self {
        Self::keyed(Rank::Inode, [number, 0, 0, 0])
    }

    /// The class of a folio's lock. `space` tells address spaces apart.
    #[must_use]
    pub const fn folio(space: u64, index: u64) -> Self {
        Self::keyed(Rank::Folio, [space, index, 0, 0])
    }

    /// The class of a node's lock: its level (0 for leaves), its tree, and the smallest (inode, offset, snapshot) that it may hold.
    #[must_use]
    pub const fn node(level: u8, tree: u8, minimum: (u64, u64, u32)) -> Self {
        let depth = (u8::MAX - level) as u64;
        Self::keyed(Rank::Node, [depth << 8 | tree as u64, minimum.0, minimum.1, minimum.2 as u64])
    }
}

#[cfg(all(debug_assertions, not(loom)))]
impl LockClass {
    pub(super) fn rank(&self) -> Rank {
        self.rank
    }

    /// Whether a lock of class `next` may be waited for while one of this class is held.
    pub(super) fn precedes(&self, next: &Self) -> bool {
        match self.rank.place().cmp(&next.rank.place()) {
            std::cmp::Ordering::Less => true,
            std::cmp::Ordering::Greater => false,
            std::cmp::Ordering::Equal => match self.rank {
                Rank::Inode | Rank::Node => self.key < next.key,
                Rank::Folio => self.key[0] == next.key[0] && self.key[1] < next.key[1],
                _ => false,
            },
        }
    }
}

#[cfg(all(debug_assertions, not(loom)))]
impl fmt::Display for LockClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [first, second, third, fourth] = self.key;
        match self.rank {
            Rank::Inode => write!(f, "inode {first} (rank inode)"),
            Rank::Block | Rank::Add => write!(f, "{} of bytes {first}..{second} (rank add or block)", self.rank),
            Rank::Folio => write!(f, "folio {second} of address space {first:#x} (rank folio)"),
            Rank::RootSlot => write!(f, "root slot of tree {first} (rank root slot)"),
            Rank::Node => write!(
                f,
                "node of tree {}, level {}, from {second}:{third}:{fourth} (rank node)",
                first & 0xFF,
                u64::from(u8::MAX) - (first >> 8)
            ),
            rank => write!(f, "a lock of rank {rank}"),
        }
    }
}
