//! The problem table: everything that can be wrong, with an identifier that scripts can rely on, a sentence, and whether it can be
//! repaired without asking.

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
    DirentOwner { directory: u64, name: String },
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

impl Problem {
    /// The identifier: stable, for scripts.
    #[must_use]
    pub fn id(&self) -> &'static str {
        match self {
            Self::SuperblockCopy { .. } => "superblock-copy",
            Self::JournalDamaged { .. } => "journal-damaged",
            Self::CheckpointUnusable { .. } => "checkpoint-unusable",
            Self::CheckpointDamaged { .. } => "checkpoint-damaged",
            Self::NodeCopy { .. } => "node-copy",
            Self::NodeUnreadable { .. } => "node-unreadable",
            Self::NodeMap { .. } => "node-map",
            Self::KeyUndecodable { .. } => "key-undecodable",
            Self::ExtentMisplaced { .. } => "extent-misplaced",
            Self::ExtentOverlap { .. } => "extent-overlap",
            Self::ExtentWithoutInode { .. } => "extent-without-inode",
            Self::ExtentPointer { .. } => "extent-pointer",
            Self::ExtentStale { .. } => "extent-stale",
            Self::ExtentsShareSpace { .. } => "extents-share-space",
            Self::BackpointerMissing { .. } => "backpointer-missing",
            Self::BackpointerWrong { .. } => "backpointer-wrong",
            Self::InodeType { .. } => "inode-type",
            Self::InodeAllocated { .. } => "inode-allocated",
            Self::DirectorySize { .. } => "directory-size",
            Self::DirentOwner { .. } => "dirent-owner",
            Self::DirentDangling { .. } => "dirent-dangling",
            Self::DirentName { .. } => "dirent-name",
            Self::DirentType { .. } => "dirent-type",
            Self::DirectoryNamedTwice { .. } => "directory-named-twice",
            Self::ParentWrong { .. } => "parent-wrong",
            Self::RootMissing { .. } => "root-missing",
            Self::Unconnected { .. } => "unconnected",
            Self::LinkCount { .. } => "link-count",
            Self::XattrOwner { .. } => "xattr-owner",
            Self::XattrName { .. } => "xattr-name",
            Self::OrphanDangling { .. } => "orphan-dangling",
            Self::OrphanLinked { .. } => "orphan-linked",
            Self::OrphanMissing { .. } => "orphan-missing",
            Self::BucketWrong { .. } => "bucket-wrong",
            Self::FreeSpaceKey { .. } => "free-space-key",
            Self::FreeSpaceValue { .. } => "free-space-value",
            Self::NeedDiscardKey { .. } => "need-discard-key",
            Self::IndexKeyStray { .. } => "index-key-stray",
            Self::Untouched { .. } => "untouched-mark",
            Self::Accounting { .. } => "accounting",
        }
    }

    /// How bad it is.
    #[must_use]
    pub fn severity(&self) -> Severity {
        match self {
            Self::SuperblockCopy { .. }
            | Self::CheckpointDamaged { .. }
            | Self::NodeCopy { .. }
            | Self::NodeMap { .. }
            | Self::BackpointerMissing { .. }
            | Self::BackpointerWrong { .. }
            | Self::InodeAllocated { .. }
            | Self::DirectorySize { .. }
            | Self::BucketWrong { .. }
            | Self::FreeSpaceKey { .. }
            | Self::FreeSpaceValue { .. }
            | Self::NeedDiscardKey { .. }
            | Self::IndexKeyStray { .. }
            | Self::Untouched { .. }
            | Self::OrphanDangling { .. }
            | Self::Accounting { .. } => Severity::Minor,
            Self::DirentDangling { .. }
            | Self::DirentType { .. }
            | Self::ParentWrong { .. }
            | Self::Unconnected { .. }
            | Self::LinkCount { .. }
            | Self::OrphanLinked { .. }
            | Self::OrphanMissing { .. } => Severity::Structural,
            _ => Severity::Damage,
        }
    }

    /// Whether [`crate::repair`] can repair it.
    #[must_use]
    pub fn is_repairable(&self) -> bool {
        // A node map that disagrees means that the space of a reachable node may be given away: only a rebuild is safe.
        self.severity() < Severity::Damage && !matches!(self, Self::NodeMap { .. })
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
            Self::DirentOwner { directory, name } => {
                format!("the entry '{name}' is in {directory}, which is no directory")
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
                format!("the key {position} of {} belongs to no bucket that there is", btree.name())
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
