//! Repairs of what the passes found. Each is a transaction of its own, so that a cut at any moment leaves a filesystem that can be
//! checked and repaired again; finding is elsewhere, so a repair decides nothing.
//!
//! Index trees and counts are corrected without the triggers that normally keep them (`CommitOptions::raw`), since it is those that
//! are wrong. Nothing is thrown away: what has no name gets one in `lost+found`.

use coppicefs::env::Timestamp;
use coppicefs::filesystem::Filesystem;
use coppicefs::format::extent::ExtentValue;
use coppicefs::format::namespace::{Dirent, DirentBucket, FileType, Inode};
use coppicefs::format::space::{Backpointer, BucketState, DeviceUsage, FreeBucket};
use coppicefs::format::{BtreeId, Position};
use coppicefs::recovery::superblock;
use coppicefs::transaction::{CommitOptions, Transaction};
use coppicefs::units::{InodeNumber, SnapshotId};
use coppicefs::{Error, Result};

use crate::problem::Problem;

const LOST_AND_FOUND: &[u8] = b"lost+found";

/// Repairs what can be repaired of `problems`, and makes it durable. Returns how many were.
///
/// # Errors
/// The device's, or a repair that could not be committed.
pub fn repair(filesystem: &Filesystem, problems: &[Problem]) -> Result<usize> {
    let mut repaired = 0;
    let mut superblock_done = false;
    for problem in problems.iter().filter(|problem| problem.is_repairable()) {
        match problem {
            Problem::SuperblockCopy { .. } => {
                if !std::mem::replace(&mut superblock_done, true) {
                    repair_superblock(filesystem)?;
                }
            }
            // Reading a node whose copy is bad marks it to be written whole, elsewhere, by the checkpoint below.
            Problem::NodeCopy { btree, from, .. } => {
                filesystem.forest().get(*btree, *from)?;
            }
            // The checkpoint below is written over it.
            Problem::CheckpointDamaged { .. } => {}
            Problem::Unconnected { inode } => connect(filesystem, InodeNumber(*inode))?,
            _ => {
                let options = CommitOptions { raw: true, ..CommitOptions::reclaim() };
                filesystem.transactions().run(options, |transaction| repair_key(transaction, problem))?;
            }
        }
        repaired += 1;
    }
    filesystem.checkpoint()?;
    Ok(repaired)
}

fn repair_superblock(filesystem: &Filesystem) -> Result<()> {
    let mut newest = filesystem.superblock().clone();
    newest.sequence += 1;
    for device in filesystem.devices() {
        superblock::write(&**device, &newest)?;
    }
    Ok(())
}

fn device_position(device: u8, bucket: u64) -> Position {
    Position::new(u64::from(device), bucket, 0)
}

fn orphan_position(inode: u64) -> Position {
    Position::new(0, inode, SnapshotId::ROOT.0)
}

fn inode_position(inode: u64) -> Position {
    Position::new(inode, 0, SnapshotId::ROOT.0)
}

fn repair_key(transaction: &mut Transaction<'_>, problem: &Problem) -> Result<()> {
    match problem {
        Problem::BackpointerMissing { extent, place } => {
            let Some(value) = transaction.get(BtreeId::Extents, *extent)? else { return Ok(()) };
            if let ExtentValue::Data(data) = ExtentValue::decode(&value)? {
                let backpointer =
                    Backpointer { btree: BtreeId::Extents, disk_bytes: data.disk_bytes, position: *extent };
                transaction.put(BtreeId::Backpointers, *place, backpointer.encode());
            }
        }
        Problem::BackpointerWrong { place, .. } => transaction.delete(BtreeId::Backpointers, *place),
        Problem::InodeAllocated { inode, found, .. } => {
            change_inode(transaction, *inode, |stored| stored.allocated_bytes = *found)?;
        }
        Problem::DirectorySize { inode, found, .. } => {
            change_inode(transaction, *inode, |stored| stored.size = *found)?
        }
        Problem::LinkCount { inode, found, .. } => {
            change_inode(transaction, *inode, |stored| stored.link_count = *found)?;
        }
        Problem::ParentWrong { inode, found, .. } => {
            change_inode(transaction, *inode, |stored| (stored.parent, stored.parent_hash) = *found)?;
        }
        Problem::DirentDangling { position, discriminator, .. } => {
            change_dirents(transaction, *position, |bucket| {
                bucket.retain(|dirent| dirent.discriminator != *discriminator)
            })?;
        }
        Problem::DirentType { position, discriminator, actual, .. } => {
            let actual = FileType::from_stored(*actual)?;
            change_dirents(transaction, *position, |bucket| {
                for dirent in bucket.iter_mut().filter(|dirent| dirent.discriminator == *discriminator) {
                    dirent.file_type = actual;
                }
            })?;
        }
        Problem::OrphanDangling { inode } | Problem::OrphanLinked { inode, .. } => {
            transaction.delete(BtreeId::Orphans, orphan_position(*inode));
        }
        Problem::OrphanMissing { inode } => transaction.put(BtreeId::Orphans, orphan_position(*inode), Vec::new()),
        Problem::BucketWrong { device, bucket, found, .. } => {
            transaction.put(BtreeId::Buckets, device_position(*device, *bucket), found.encode());
        }
        Problem::FreeSpaceKey { device, bucket, state, .. } => {
            let position = device_position(*device, *bucket);
            match state {
                BucketState::Free => {
                    transaction.put(BtreeId::FreeSpace, position, FreeBucket { discarded: false }.encode());
                }
                _ => transaction.delete(BtreeId::FreeSpace, position),
            }
        }
        Problem::FreeSpaceValue { device, bucket, .. } => {
            let position = device_position(*device, *bucket);
            // Gone if another problem says that it does not belong there.
            if transaction.get(BtreeId::FreeSpace, position)?.is_some() {
                transaction.put(BtreeId::FreeSpace, position, FreeBucket { discarded: false }.encode());
            }
        }
        Problem::IndexKeyStray { btree, position } => transaction.delete(*btree, *position),
        Problem::NeedDiscardKey { device, bucket, state, .. } => {
            let position = device_position(*device, *bucket);
            match state {
                BucketState::NeedDiscard => transaction.put(BtreeId::NeedDiscard, position, Vec::new()),
                _ => transaction.delete(BtreeId::NeedDiscard, position),
            }
        }
        Problem::Untouched { device, bucket, .. } => {
            let position = Position::new(u64::from(*device), 0, 0);
            let stored = transaction.get(BtreeId::Devices, position)?;
            let stored =
                stored.map(|value| DeviceUsage::decode(&value)).transpose()?.map_or(0, |usage| usage.untouched_from);
            let usage = DeviceUsage { untouched_from: stored.max(*bucket + 1) };
            transaction.put(BtreeId::Devices, position, usage.encode());
        }
        Problem::Accounting { counter, stored, found } => transaction.account(*counter, found - stored),
        other => return Err(Error::Bug(format!("no repair for {}", other.id()))),
    }
    Ok(())
}

fn change_inode(transaction: &mut Transaction<'_>, inode: u64, change: impl FnOnce(&mut Inode)) -> Result<()> {
    let position = inode_position(inode);
    if let Some(value) = transaction.get(BtreeId::Inodes, position)? {
        let mut stored = Inode::decode(&value)?;
        change(&mut stored);
        transaction.put(BtreeId::Inodes, position, stored.encode()?);
    }
    Ok(())
}

fn change_dirents(
    transaction: &mut Transaction<'_>,
    position: Position,
    change: impl FnOnce(&mut Vec<Dirent>),
) -> Result<()> {
    let stored = transaction.get(BtreeId::Dirents, position)?;
    let mut bucket = stored.map(|value| DirentBucket::decode(&value)).transpose()?.unwrap_or_default();
    change(&mut bucket.0);
    if bucket.0.is_empty() {
        transaction.delete(BtreeId::Dirents, position);
    } else {
        transaction.put(BtreeId::Dirents, position, bucket.encode());
    }
    Ok(())
}

/// Gives an inode a name in `lost+found`: its number, with a `#` before it. Link counts are set right by the next round.
fn connect(filesystem: &Filesystem, inode: InodeNumber) -> Result<()> {
    let now = filesystem.env().now();
    filesystem.transactions().run(CommitOptions::reclaim(), |transaction| {
        let Some(value) = transaction.get(BtreeId::Inodes, inode_position(inode.0))? else { return Ok(()) };
        let mut lost = Inode::decode(&value)?;
        let Some(file_type) = lost.file_type() else { return Ok(()) };
        let directory = lost_and_found(filesystem, transaction, now)?;
        if lost.parent != 0 && file_type == FileType::Directory {
            unname(transaction, &lost, inode)?;
        }
        let name = format!("#{inode}").into_bytes();
        let hash = add_name(filesystem, transaction, directory, &name, inode, file_type)?;
        (lost.parent, lost.parent_hash) = (directory.0, hash);
        transaction.put(BtreeId::Inodes, inode_position(inode.0), lost.encode()?);
        Ok(())
    })?;
    Ok(())
}

/// Takes away the name of a directory in a loop, so that it has one name and not two.
fn unname(transaction: &mut Transaction<'_>, lost: &Inode, inode: InodeNumber) -> Result<()> {
    let position = Position::new(lost.parent, lost.parent_hash, SnapshotId::ROOT.0);
    let mut removed = 0;
    change_dirents(transaction, position, |bucket| {
        let before = bucket.len();
        bucket.retain(|dirent| dirent.inode != inode);
        removed = before - bucket.len();
    })?;
    if removed > 0 {
        change_inode(transaction, lost.parent, |parent| {
            parent.size = parent.size.saturating_sub(1);
            parent.link_count = parent.link_count.saturating_sub(1);
        })?;
    }
    Ok(())
}

fn add_name(
    filesystem: &Filesystem,
    transaction: &mut Transaction<'_>,
    directory: InodeNumber,
    name: &[u8],
    inode: InodeNumber,
    file_type: FileType,
) -> Result<u64> {
    let hash = filesystem.namespace().hash(name);
    let position = Position::new(directory.0, hash, SnapshotId::ROOT.0);
    let mut added = false;
    change_dirents(transaction, position, |bucket| {
        if bucket.iter().all(|dirent| dirent.name != name) {
            let discriminator = bucket.last().map_or(0, |last| last.discriminator.saturating_add(1));
            bucket.push(Dirent { discriminator, file_type, inode, name: name.to_vec() });
            added = true;
        }
    })?;
    if added {
        change_inode(transaction, directory.0, |parent| {
            parent.size += 1;
            if file_type == FileType::Directory {
                parent.link_count += 1;
            }
        })?;
    }
    Ok(hash)
}

fn lost_and_found(filesystem: &Filesystem, transaction: &mut Transaction<'_>, now: Timestamp) -> Result<InodeNumber> {
    let root = InodeNumber::ROOT;
    let hash = filesystem.namespace().hash(LOST_AND_FOUND);
    let position = Position::new(root.0, hash, SnapshotId::ROOT.0);
    if let Some(value) = transaction.get(BtreeId::Dirents, position)? {
        let bucket = DirentBucket::decode(&value)?;
        if let Some(found) = bucket.0.iter().find(|dirent| dirent.name == LOST_AND_FOUND) {
            if found.file_type == FileType::Directory {
                return Ok(found.inode);
            }
            return Err(Error::Unusable("/lost+found is not a directory: rename it, then run fsck again".into()));
        }
    }
    let largest = transaction.previous(BtreeId::Inodes, Position::MAX, Position::MIN)?;
    let inode = InodeNumber(largest.map_or(root.0, |(position, _)| position.inode) + 1);
    let directory = Inode {
        mode: FileType::Directory.mode_bits() | 0o700,
        link_count: 2,
        generation: filesystem.env().random_u64(),
        access_time: now.into(),
        modification_time: now.into(),
        change_time: now.into(),
        birth_time: now.into(),
        parent: root.0,
        parent_hash: hash,
        ..Inode::default()
    };
    transaction.put(BtreeId::Inodes, inode_position(inode.0), directory.encode()?);
    add_name(filesystem, transaction, root, LOST_AND_FOUND, inode, FileType::Directory)?;
    Ok(inode)
}
