//! What the keys of the inodes, dirents, xattrs and orphans trees mean: POSIX's namespace as functions over a transaction.
//!
//! Every function here stages reads and updates in the [`Transaction`] that it is given and has no other effect, so that a
//! caller makes one POSIX mutation exactly one transaction: atomic across a crash, and free to run again when it lost a race.
//! A mutation returns the inodes that it changed ([`Changed`]), for the caller's in-memory copies.
//!
//! Invariants, in each committed state:
//! 1. Each dirent names an inode that exists, with the dirent's file type. A directory has exactly one name.
//! 2. A file's `link_count` is the number of its names; a directory's is 2 + the number of its subdirectories, and its `size`
//!    the number of its names.
//! 3. An inode with `link_count` 0 has an orphan key, and no other inode has one.
//! 4. A directory's `parent` and `parent_hash` lead to its name; another file's lead to one of its names, or are 0 (when that name was
//!    removed and others are left).
//! 5. In a dirent bucket discriminators ascend, and a new one is larger than all that are there: readdir cookies are stable.
//!
//! No locks are taken. Two mutations that race are made serialisable by the transactions' validation; a caller that keeps
//! copies in memory serialises by its inode locks.

pub mod acl;
mod dirent;
mod inode;
mod operations;
mod orphan;
mod path;
mod rename;
mod view;
mod xattr;

use std::sync::Arc;

use smallvec::SmallVec;

pub use dirent::{Cookie, Entry, Listing};
pub use inode::{
    FLAG_APPEND, FLAG_IMMUTABLE, FLAG_NOATIME, FLAG_NODUMP, FLAG_SYNC, FLAGS_SETTABLE, InodeAllocator, NewInode,
};
pub use operations::Made;
pub use rename::{Rename, Renamed};
pub use xattr::{XATTR_CREATE, XATTR_REPLACE};

use crate::format::namespace::Inode;
use crate::format::superblock::Superblock;
use crate::snapshot::Snapshots;
use crate::transaction::Transaction;
use crate::units::{InodeNumber, SnapshotId};

/// Inodes that an operation changed, with their values as they will be committed.
pub type Changed = SmallVec<[(InodeNumber, Inode); 4]>;

/// Most names that a file may have.
pub const LINK_COUNT_MAX: u32 = 1 << 20;
/// Largest hash of a name.
const NAME_HASH_MAX: u64 = (1 << 56) - 2;
/// Longest target of a symbolic link in bytes.
pub const SYMLINK_BYTES_MAX: usize = 4095;

/// The namespace of one subvolume.
pub struct Namespace {
    snapshots: Arc<Snapshots>,
    snapshot: SnapshotId,
    hash_seed: u64,
    /// Longest value of a key in bytes: collision buckets and extended attributes are held to it.
    value_bytes_max: usize,
}

impl std::fmt::Debug for Namespace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Namespace").field("snapshot", &self.snapshot).finish_non_exhaustive()
    }
}

impl Namespace {
    /// The namespace that is written in `snapshot`.
    #[must_use]
    pub fn new(superblock: &Superblock, snapshots: Arc<Snapshots>, snapshot: SnapshotId) -> Self {
        let value_bytes_max = (superblock.geometry.node_bytes / 4) as usize - 64;
        Self { snapshots, snapshot, hash_seed: superblock.defaults.hash_seed, value_bytes_max }
    }

    /// The snapshot that it writes in.
    #[must_use]
    pub fn snapshot(&self) -> SnapshotId {
        self.snapshot
    }

    /// Makes the root directory, for mkfs: the one inode that has no name.
    ///
    /// # Errors
    /// If it cannot be encoded.
    pub fn create_root(&self, transaction: &mut Transaction<'_>, new: &NewInode<'_>) -> crate::Result<()> {
        let mut inode = new.inode();
        inode.link_count = 2;
        inode.parent = InodeNumber::ROOT.0;
        self.put_inode(transaction, InodeNumber::ROOT, &inode)?;
        Ok(())
    }

    /// Hash of a name: 56 bits, neither 0 nor all ones, so that cookies leave room below and stay below `i64::MAX`.
    #[must_use]
    pub fn hash(&self, name: &[u8]) -> u64 {
        name_hash(self.hash_seed, name)
    }
}

/// [`Namespace::hash`] of a filesystem that is not open: `seed` is its superblock's.
#[must_use]
pub fn name_hash(seed: u64, name: &[u8]) -> u64 {
    let hash = xxhash_rust::xxh3::xxh3_64_with_seed(name, seed) >> 8;
    hash.clamp(1, NAME_HASH_MAX)
}
