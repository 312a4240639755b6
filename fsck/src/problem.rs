//! The problem table: everything that can be wrong, with an identifier that scripts can rely on, a sentence, how bad it is, and when it is repaired.
//! The corpus in `tests/corpus.rs` has a case for every identifier.

use coppicefs::format::journal::AccountingCounter;
use coppicefs::format::space::{Bucket, BucketState};
use coppicefs::format::{BtreeId, Position};

/// How bad a problem is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// Redundancy or bookkeeping: nothing is lost, and the repair is certain. `-p` repairs it.
    Minor,
    /// Something that a user could see: a name, a link count, a file without a name. `-p` repairs it, nothing is thrown away.
    Structural,
    /// Data or metadata is lost or contradictory.
    Damage,
}

/// One inconsistency.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the sentence of each variant names its fields")]
pub enum Problem {
    SuperblockCopy { offset: u64, reason: String },
    JournalDamaged { reason: String },
    CheckpointUnusable { reason: String },
    CheckpointDamaged { number: u64, used: u64, reason: String },
    NodeCopy { btree: BtreeId, from: Position, level: u8, node: u64, device: u8, offset: u64, reason: String },
    NodeUnreadable { btree: BtreeId, level: u8, from: Position, to: Position, reason: String },
    NodeMap { device: u8, bucket: u64, recorded: u64, reachable: u64 },
    NodeMapLost { number: u64, reason: String },
    SubvolumeMissing { btree: BtreeId, position: Position },
    KeyUndecodable { btree: BtreeId, position: Position, reason: String },
    ExtentMisplaced { position: Position, reason: String },
    ExtentOverlap { position: Position, previous_end: u64 },
    ExtentWithoutInode { position: Position },
    ExtentPointer { position: Position, reason: String },
    ExtentStale { position: Position, pointer_generation: u32, bucket_generation: u32 },
    ExtentsShareSpace { position: Position, other: Position, device: u8, offset: u64 },
    BackpointerMissing { extent: Position, place: Position },
    BackpointerWrong { place: Position, reason: String },
    InodeType { inode: u64, mode: u32 },
    InodeAllocated { inode: u64, stored: u64, found: u64 },
    DirectorySize { inode: u64, stored: u64, found: u64 },
    DirentOwner { position: Position, discriminator: u8, name: String },
    DirentDangling { position: Position, discriminator: u8, name: String, inode: u64 },
    DirentName { position: Position, discriminator: u8, name: String, reason: String },
    DirentType { position: Position, discriminator: u8, name: String, stored: u8, actual: u8 },
    DirectoryNamedTwice { position: Position, discriminator: u8, name: String, inode: u64 },
    ParentWrong { inode: u64, stored: (u64, u64), found: (u64, u64) },
    RootMissing { reason: String },
    Unconnected { inode: u64 },
    LinkCount { inode: u64, stored: u32, found: u32 },
    XattrOwner { position: Position },
    XattrName { position: Position, name: String, reason: String },
    OrphanDangling { inode: u64 },
    OrphanLinked { inode: u64, links: u32 },
    OrphanMissing { inode: u64 },
    BucketWrong { device: u8, bucket: u64, stored: Bucket, found: Bucket },
    FreeSpaceKey { device: u8, bucket: u64, present: bool, state: BucketState },
    FreeSpaceValue { device: u8, bucket: u64, reason: String },
    NeedDiscardKey { device: u8, bucket: u64, present: bool, state: BucketState },
    IndexKeyStray { btree: BtreeId, position: Position },
    Untouched { device: u8, bucket: u64, untouched_from: u64 },
    Accounting { counter: AccountingCounter, stored: i64, found: i64 },
}

/// When a problem can be repaired: what an earlier stage repairs changes what a later one finds, so each round of repairs is of one stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stage {
    /// What the trees are made of.
    Nodes,
    /// Keys that mean nothing, or contradict each other.
    Keys,
    /// Keys whose owner does not exist.
    Owners,
    /// Names, and what has none.
    Names,
    /// What is counted, or follows from other keys.
    Counts,
}

/// One line for each kind of problem: identifier, severity, stage.
macro_rules! problem_table {
    ($($variant:ident, $id:literal, $severity:ident, $stage:ident;)*) => {
        /// All identifiers, in the order of the table.
        pub const IDS: &[&str] = &[$($id),*];

        impl Problem {
            fn entry(&self) -> (&'static str, Severity, Stage) {
                match self {
                    $(Self::$variant { .. } => ($id, Severity::$severity, Stage::$stage),)*
                }
            }
        }
    };
}

problem_table! {
    SuperblockCopy, "superblock-copy", Minor, Nodes;
    JournalDamaged, "journal-damaged", Damage, Nodes;
    CheckpointUnusable, "checkpoint-unusable", Damage, Nodes;
    CheckpointDamaged, "checkpoint-damaged", Minor, Nodes;
    NodeCopy, "node-copy", Minor, Nodes;
    NodeUnreadable, "node-unreadable", Damage, Nodes;
    NodeMap, "node-map", Minor, Nodes;
    NodeMapLost, "node-map-lost", Minor, Nodes;
    SubvolumeMissing, "subvolume-missing", Minor, Keys;
    KeyUndecodable, "key-undecodable", Damage, Keys;
    ExtentMisplaced, "extent-misplaced", Damage, Keys;
    ExtentOverlap, "extent-overlap", Damage, Keys;
    ExtentPointer, "extent-pointer", Damage, Keys;
    ExtentStale, "extent-stale", Damage, Keys;
    ExtentsShareSpace, "extents-share-space", Damage, Keys;
    InodeType, "inode-type", Damage, Keys;
    DirentName, "dirent-name", Damage, Keys;
    XattrName, "xattr-name", Damage, Keys;
    RootMissing, "root-missing", Damage, Keys;
    ExtentWithoutInode, "extent-without-inode", Damage, Owners;
    DirentOwner, "dirent-owner", Damage, Owners;
    DirectoryNamedTwice, "directory-named-twice", Damage, Names;
    DirentDangling, "dirent-dangling", Structural, Names;
    DirentType, "dirent-type", Structural, Names;
    XattrOwner, "xattr-owner", Damage, Names;
    OrphanDangling, "orphan-dangling", Minor, Names;
    OrphanLinked, "orphan-linked", Structural, Names;
    OrphanMissing, "orphan-missing", Structural, Names;
    Unconnected, "unconnected", Structural, Names;
    ParentWrong, "parent-wrong", Structural, Names;
    LinkCount, "link-count", Structural, Counts;
    DirectorySize, "directory-size", Minor, Counts;
    InodeAllocated, "inode-allocated", Minor, Counts;
    BackpointerMissing, "backpointer-missing", Minor, Counts;
    BackpointerWrong, "backpointer-wrong", Minor, Counts;
    IndexKeyStray, "index-key-stray", Minor, Nodes;
    BucketWrong, "bucket-wrong", Minor, Counts;
    FreeSpaceKey, "free-space-key", Minor, Counts;
    FreeSpaceValue, "free-space-value", Minor, Nodes;
    NeedDiscardKey, "need-discard-key", Minor, Counts;
    Untouched, "untouched-mark", Minor, Counts;
    Accounting, "accounting", Minor, Counts;
}

impl Problem {
    /// The identifier: stable, for scripts.
    #[must_use]
    pub fn id(&self) -> &'static str {
        self.entry().0
    }

    /// How bad it is.
    #[must_use]
    pub fn severity(&self) -> Severity {
        if self.is_of_space() || self.is_of_subvolumes() { Severity::Minor } else { self.entry().1 }
    }

    /// When it can be repaired.
    #[must_use]
    pub fn stage(&self) -> Stage {
        if self.is_of_space() { Stage::Nodes } else { self.entry().2 }
    }

    /// A key that means nothing, and that whoever looks for space for nodes would stumble over. What it said follows from other keys.
    pub(crate) fn is_of_space(&self) -> bool {
        match self {
            Self::KeyUndecodable { btree, .. } => is_derived(*btree) || *btree == BtreeId::Devices,
            Self::FreeSpaceValue { .. } | Self::IndexKeyStray { .. } => true,
            _ => false,
        }
    }

    /// A key of the one subvolume and snapshot that there are, whose content is known.
    fn is_of_subvolumes(&self) -> bool {
        matches!(self, Self::KeyUndecodable { btree: BtreeId::Subvolumes | BtreeId::Snapshots, .. })
    }

    /// Whether [`crate::repair`] can repair it. What cannot be repaired takes `--rebuild`, which scans the whole device.
    #[must_use]
    pub fn is_repairable(&self) -> bool {
        match self {
            Self::JournalDamaged { .. } | Self::CheckpointUnusable { .. } => false,
            // Below an interior node everything is whole, and a scan finds it; what only says where space is can be made anew without.
            Self::NodeUnreadable { btree, level, .. } => *level == 0 || is_derived(*btree),
            _ => true,
        }
    }

    /// Whether it says that an extent's own key or place is wrong.
    pub(crate) fn is_of_extent(&self) -> bool {
        matches!(self, Self::ExtentMisplaced { .. } | Self::ExtentPointer { .. } | Self::KeyUndecodable { .. })
    }

    /// What is wrong, in a sentence.
    #[must_use]
    pub fn describe(&self) -> String {
        match self {
            Self::SuperblockCopy { offset, reason } => {
                format!("the superblock copy at byte {offset} is stale: {reason}")
            }
            Self::JournalDamaged { reason } => format!("the journal is damaged: {reason}"),
            Self::CheckpointDamaged { number, used, reason } => format!(
                "checkpoint {number} is damaged ({reason}): checkpoint {used} and the journal give the same state, nothing is lost"
            ),
            Self::CheckpointUnusable { reason } => format!("no checkpoint is whole: {reason}"),
            Self::NodeCopy { btree, node, device, offset, reason, .. } => {
                format!("a copy of node {node} of {} (device {device}, byte {offset}) is bad: {reason}", btree.name())
            }
            Self::NodeUnreadable { btree, level, from, to, reason } => {
                format!(
                    "no copy of a level {level} node of {} is good, keys {from} to {to} are lost: {reason}",
                    btree.name()
                )
            }
            Self::NodeMap { device, bucket, recorded, reachable } => format!(
                "the node-space map has slots {recorded:#x} of bucket {bucket} (device {device}) in use, the trees use {reachable:#x}"
            ),
            Self::NodeMapLost { number, reason } => {
                format!(
                    "the node-space map of checkpoint {number} is lost ({reason}): it can be made again, nothing else is"
                )
            }
            Self::SubvolumeMissing { btree, position } => {
                format!("the {} tree does not have its one key, {position}", btree.name())
            }
            Self::KeyUndecodable { btree, position, reason } => {
                format!("the key {position} of {} means nothing: {reason}", btree.name())
            }
            Self::ExtentMisplaced { position, reason } => {
                format!("the extent that ends at {position} cannot be: {reason}")
            }
            Self::ExtentOverlap { position, previous_end } => {
                format!(
                    "the extent that ends at {position} overlaps the one before it, which ends at byte {previous_end}"
                )
            }
            Self::ExtentWithoutInode { position } => format!("the extent that ends at {position} belongs to no file"),
            Self::ExtentPointer { position, reason } => {
                format!("the extent that ends at {position} points wrong: {reason}")
            }
            Self::ExtentStale { position, pointer_generation, bucket_generation } => format!(
                "the extent that ends at {position} is of generation {pointer_generation}, its bucket of {bucket_generation}"
            ),
            Self::ExtentsShareSpace { position, other, device, offset } => format!(
                "the extents that end at {position} and at {other} share the space at byte {offset} of device {device}"
            ),
            Self::BackpointerMissing { extent, place } => {
                format!("the extent that ends at {extent} has no backpointer at {place}")
            }
            Self::BackpointerWrong { place, reason } => format!("the backpointer at {place} is wrong: {reason}"),
            Self::InodeType { inode, mode } => format!("inode {inode} has no known type (mode {mode:o})"),
            Self::InodeAllocated { inode, stored, found } => {
                format!("inode {inode} says it holds {stored} bytes, its extents hold {found}")
            }
            Self::DirectorySize { inode, stored, found } => {
                format!("directory {inode} says it has {stored} entries, it has {found}")
            }
            Self::DirentOwner { position, name, .. } => {
                format!("the entry '{name}' is in {}, which is no directory", position.inode)
            }
            Self::DirentDangling { position, name, inode, .. } => {
                format!("the entry '{name}' of directory {} names inode {inode}, which does not exist", position.inode)
            }
            Self::DirentName { position, name, reason, .. } => {
                format!("the entry '{name}' of directory {} cannot be: {reason}", position.inode)
            }
            Self::DirentType { position, name, stored, actual, .. } => {
                format!("the entry '{name}' of directory {} has type {stored}, its inode {actual}", position.inode)
            }
            Self::DirectoryNamedTwice { position, name, inode, .. } => {
                format!("the entry '{name}' of directory {} is a second name of directory {inode}", position.inode)
            }
            Self::ParentWrong { inode, stored, found } => {
                format!("inode {inode} says it is named in directory {}, it is in {}", stored.0, found.0)
            }
            Self::RootMissing { reason } => format!("there is no root directory: {reason}"),
            Self::Unconnected { inode } => format!("inode {inode} cannot be reached by any name"),
            Self::LinkCount { inode, stored, found } => {
                format!("inode {inode} has link count {stored}, {found} names were found")
            }
            Self::XattrOwner { position } => {
                format!("extended attributes of inode {}, which does not exist", position.inode)
            }
            Self::XattrName { position, name, reason } => {
                format!("the extended attribute '{name}' of inode {} cannot be: {reason}", position.inode)
            }
            Self::OrphanDangling { inode } => format!("inode {inode} is to be deleted, and does not exist"),
            Self::OrphanLinked { inode, links } => format!("inode {inode} is to be deleted, but has {links} names"),
            Self::OrphanMissing { inode } => format!("inode {inode} has no name, and is not noted for deletion"),
            Self::BucketWrong { device, bucket, stored, found } => format!(
                "bucket {bucket} of device {device} is noted as {:?} with {} bytes, it is {:?} with {}",
                stored.state, stored.charged_bytes, found.state, found.charged_bytes
            ),
            Self::FreeSpaceKey { device, bucket, present, state } => format!(
                "bucket {bucket} of device {device} is {state:?}, but {} the free-space tree",
                if *present { "in" } else { "not in" }
            ),
            Self::FreeSpaceValue { device, bucket, reason } => {
                format!("bucket {bucket} of device {device} means nothing in the free-space tree: {reason}")
            }
            Self::IndexKeyStray { btree, position } => {
                format!("the key {position} of {} belongs to no bucket or device that there is", btree.name())
            }
            Self::NeedDiscardKey { device, bucket, present, state } => format!(
                "bucket {bucket} of device {device} is {state:?}, but {} the need-discard tree",
                if *present { "in" } else { "not in" }
            ),
            Self::Untouched { device, bucket, untouched_from } => {
                format!(
                    "bucket {bucket} of device {device} is in the free-space tree, but buckets from {untouched_from} on are free without"
                )
            }
            Self::Accounting { counter, stored, found } => {
                format!("the counter {counter:?} is {stored}, it should be {found}")
            }
        }
    }
}

/// Trees whose keys all follow from others'.
fn is_derived(btree: BtreeId) -> bool {
    matches!(btree, BtreeId::Buckets | BtreeId::FreeSpace | BtreeId::NeedDiscard | BtreeId::Backpointers)
}
