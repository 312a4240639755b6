//! Repairs of what the passes found. Each is a transaction of its own, so that a cut at any moment leaves a filesystem that can be
//! checked and repaired again. Finding is elsewhere; a repair looks at what it changes once more, and does nothing where that is no longer
//! as the problem says.
//!
//! Keys are corrected without the triggers that normally keep what follows from them (`CommitOptions::raw`), since it may be that which is
//! wrong; what follows is then found and repaired in a later round ([`crate::session`]).
//!
//! What is thrown away, and what not:
//! - What has no name gets one in `lost+found`; an inode that is gone is made anew where its extents or entries are there.
//! - A range of a file whose data is lost reads as an error, never as zeros: [`DataExtent::lost`](coppicefs::format::extent::DataExtent::lost) stands
//!   there. Each is a [`Loss`], to be reported with the file's path.
//! - Keys that mean nothing, and those that belong to nobody and are no file's data, are deleted.

mod counts;
mod extents;
mod keys;
pub mod map;
mod names;
mod nodes;

use coppicefs::filesystem::Filesystem;
use coppicefs::format::Position;
use coppicefs::format::namespace::{Dirent, DirentBucket, Inode};
use coppicefs::format::{BtreeId, namespace};
use coppicefs::transaction::{CommitOptions, Transaction};
use coppicefs::units::{InodeNumber, SnapshotId};
use coppicefs::{Error, Result};

use crate::problem::Problem;
use crate::report::Report;

/// A range of a file that was lost: reading it is an error from now on.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Loss {
    /// The file.
    pub inode: u64,
    /// First byte.
    pub start: u64,
    /// First byte after it.
    pub end: u64,
}

/// What repairs came to.
#[derive(Debug, Default)]
pub struct Repairs {
    /// Problems that were repaired.
    pub count: usize,
    /// What was lost by them, or before.
    pub losses: Vec<Loss>,
    /// Problems that could not be repaired, and why.
    pub failed: Vec<(Problem, String)>,
}

/// Repairs what can be repaired of `chosen`, which are problems of `report`, and makes it durable.
///
/// # Errors
/// The device's, or a repair that could not be committed.
pub fn repair(filesystem: &Filesystem, report: &Report, chosen: &[Problem]) -> Result<Repairs> {
    let mut repairs = Repairs::default();
    let repairable = || chosen.iter().filter(|problem| problem.is_repairable());
    // Space for nodes must be found by what the others do.
    let in_order = repairable().filter(|problem| problem.is_of_space());
    for problem in in_order.chain(repairable().filter(|problem| !problem.is_of_space())) {
        match repair_one(filesystem, report, problem, &mut repairs.losses) {
            Ok(()) => repairs.count += 1,
            // Of one problem; a device that fails for good fails the checkpoint below, too.
            Err(error) if error.is_media_error() || matches!(error, Error::Invalid(_)) => {
                repairs.failed.push((problem.clone(), error.to_string()));
            }
            Err(error) => return Err(error),
        }
    }
    filesystem.checkpoint()?;
    Ok(repairs)
}

fn repair_one(filesystem: &Filesystem, report: &Report, problem: &Problem, losses: &mut Vec<Loss>) -> Result<()> {
    match problem {
        Problem::SuperblockCopy { .. } => nodes::repair_superblock(filesystem),
        // The checkpoint that ends the round is written over it; a map is made again before anything is opened.
        Problem::CheckpointDamaged { .. } | Problem::NodeMapLost { .. } => Ok(()),
        Problem::NodeCopy { btree, from, level, .. } => filesystem.forest().rewrite_node(*btree, *level, *from),
        Problem::NodeMap { .. } => nodes::correct_map(filesystem, report),
        Problem::NodeUnreadable { btree, level, from, to, .. } => {
            nodes::replace(filesystem, *btree, *level, (*from, *to), losses)
        }
        _ => {
            let options = CommitOptions { raw: true, ..CommitOptions::reclaim() };
            let committed = filesystem.transactions().run(options, |transaction| {
                let mut repair = KeyRepair { filesystem, transaction, losses: Vec::new() };
                repair.key(problem)?;
                Ok(repair.losses)
            })?;
            losses.extend(committed.value);
            Ok(())
        }
    }
}

/// One repair in its transaction.
struct KeyRepair<'r, 't> {
    filesystem: &'r Filesystem,
    transaction: &'r mut Transaction<'t>,
    losses: Vec<Loss>,
}

impl KeyRepair<'_, '_> {
    fn key(&mut self, problem: &Problem) -> Result<()> {
        match problem {
            Problem::SubvolumeMissing { btree, position } | Problem::KeyUndecodable { btree, position, .. } => {
                self.undecodable(*btree, *position)
            }
            Problem::ExtentMisplaced { position, .. } => self.misplaced_extent(*position),
            Problem::ExtentOverlap { position, .. } => self.overlapping_extent(*position),
            Problem::ExtentPointer { position, .. } => self.wrong_pointer(*position),
            Problem::ExtentStale { position, .. } => self.stale_extent(*position),
            Problem::ExtentsShareSpace { position, other, .. } => self.shared_space(*position, *other),
            Problem::ExtentWithoutInode { position } => self.ownerless_extent(*position),
            Problem::InodeType { inode, .. } => self.inode_type(InodeNumber(*inode)),
            Problem::RootMissing { .. } => self.root(),
            Problem::DirentName { position, discriminator, .. } => self.dirent_name(*position, *discriminator),
            Problem::DirentOwner { position, discriminator, .. } => self.ownerless_dirent(*position, *discriminator),
            Problem::DirentDangling { position, discriminator, .. }
            | Problem::DirectoryNamedTwice { position, discriminator, .. } => {
                self.remove_dirent(*position, *discriminator).map(|_| ())
            }
            Problem::DirentType { position, discriminator, actual, .. } => {
                self.dirent_type(*position, *discriminator, *actual)
            }
            Problem::XattrName { position, .. } => self.xattr_names(*position),
            Problem::XattrOwner { position } => {
                self.transaction.delete(BtreeId::Xattrs, *position);
                Ok(())
            }
            Problem::Unconnected { inode } => self.connect(InodeNumber(*inode)),
            Problem::ParentWrong { inode, found, .. } => {
                self.change_inode(*inode, |stored| (stored.parent, stored.parent_hash) = *found)
            }
            Problem::OrphanDangling { inode } | Problem::OrphanLinked { inode, .. } => {
                self.transaction.delete(BtreeId::Orphans, orphan_position(*inode));
                Ok(())
            }
            Problem::OrphanMissing { inode } => {
                self.transaction.put(BtreeId::Orphans, orphan_position(*inode), Vec::new());
                Ok(())
            }
            other => self.count(other),
        }
    }

    /// The inode's key, if it is one.
    fn inode(&mut self, inode: u64) -> Result<Option<Inode>> {
        let value = self.transaction.get(BtreeId::Inodes, inode_position(inode))?;
        Ok(value.and_then(|value| Inode::decode(&value).ok()))
    }

    fn change_inode(&mut self, inode: u64, change: impl FnOnce(&mut Inode)) -> Result<()> {
        if let Some(mut stored) = self.inode(inode)? {
            change(&mut stored);
            self.transaction.put(BtreeId::Inodes, inode_position(inode), stored.encode()?);
        }
        Ok(())
    }

    /// The entries at a position; none if they mean nothing.
    fn dirents(&mut self, position: Position) -> Result<Vec<Dirent>> {
        let stored = self.transaction.get(BtreeId::Dirents, position)?;
        Ok(stored.and_then(|value| DirentBucket::decode(&value).ok()).unwrap_or_default().0)
    }

    fn put_dirents(&mut self, position: Position, mut bucket: Vec<Dirent>) {
        let is_ascending = bucket.windows(2).all(|pair| matches!(pair, [a, b] if a.discriminator < b.discriminator));
        if !is_ascending {
            for (number, dirent) in (0..=u8::MAX).zip(&mut bucket) {
                dirent.discriminator = number;
            }
        }
        if bucket.is_empty() {
            self.transaction.delete(BtreeId::Dirents, position);
        } else {
            self.transaction.put(BtreeId::Dirents, position, DirentBucket(bucket).encode());
        }
    }
}

fn device_position(device: u8, bucket: u64) -> Position {
    Position::new(u64::from(device), bucket, 0)
}

/// Where an inode is noted for deletion.
pub(crate) fn orphan_position(inode: u64) -> Position {
    Position::new(0, inode, SnapshotId::ROOT.0)
}

fn inode_position(inode: u64) -> Position {
    Position::new(inode, 0, SnapshotId::ROOT.0)
}

/// Whether an inode of this type has extents.
fn has_data(inode: &Inode) -> bool {
    matches!(inode.file_type(), Some(namespace::FileType::Regular | namespace::FileType::Symlink) | None)
}
