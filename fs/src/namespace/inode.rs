//! Inode keys, and where their numbers come from.

use rustix::io::Errno;

use super::Namespace;
use crate::env::Timestamp;
use crate::error::{Error, Result};
use crate::format::namespace::{FileType, Inode};
use crate::format::{BtreeId, Position};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::transaction::Transaction;
use crate::units::InodeNumber;

/// `FS_SYNC_FL`: writes are durable before they return.
pub const FLAG_SYNC: u32 = 0x8;
/// `FS_IMMUTABLE_FL`: nothing may be changed.
pub const FLAG_IMMUTABLE: u32 = 0x10;
/// `FS_APPEND_FL`: only appending, and for a directory only adding names.
pub const FLAG_APPEND: u32 = 0x20;
/// `FS_NODUMP_FL`.
pub const FLAG_NODUMP: u32 = 0x40;
/// `FS_NOATIME_FL`: the access time stays.
pub const FLAG_NOATIME: u32 = 0x80;
/// What chattr(1) may set here.
pub const FLAGS_SETTABLE: u32 = FLAG_SYNC | FLAG_IMMUTABLE | FLAG_APPEND | FLAG_NODUMP | FLAG_NOATIME;
/// What a new file takes from its directory.
const FLAGS_INHERITED: u32 = FLAG_SYNC | FLAG_NODUMP | FLAG_NOATIME;

/// Hands out inode numbers: one more than the largest that had a key at mount, upwards. A number is never reused in one mount,
/// also if the transaction that it was for fails; over mounts the generation tells lives apart.
#[derive(Debug)]
pub struct InodeAllocator {
    next: AtomicU64,
}

impl InodeAllocator {
    /// Starts above the largest inode key; where that cannot be read, in the middle of all numbers, which nobody has ever reached by counting.
    ///
    /// # Errors
    /// Those of reading the tree that are no damage.
    pub fn open(transaction: &mut Transaction<'_>) -> Result<Self> {
        let largest = match transaction.previous(BtreeId::Inodes, Position::MAX, Position::MIN) {
            Ok(last) => last.map_or(0, |(position, _)| position.inode).max(InodeNumber::ROOT.0),
            Err(error) if error.is_media_error() => InodeNumber::MAX.0 / 2,
            Err(error) => return Err(error),
        };
        Ok(Self { next: AtomicU64::new(largest.saturating_add(1)) })
    }

    /// A number that no inode has had in this mount.
    ///
    /// # Errors
    /// [`Error::NoSpace`] when the 2^44 are used up.
    pub fn allocate(&self) -> Result<InodeNumber> {
        let number = InodeNumber(self.next.fetch_add(1, Ordering::Relaxed));
        if number > InodeNumber::MAX { Err(Error::NoSpace("no inode number is left")) } else { Ok(number) }
    }
}

/// What a new inode starts with.
#[derive(Clone, Copy, Debug)]
pub struct NewInode<'a> {
    /// Its type.
    pub file_type: FileType,
    /// Permission bits that were asked for, before the umask.
    pub permissions: u32,
    /// What is taken off the permissions where the directory has no default ACL.
    pub umask: u32,
    /// Owner.
    pub uid: u32,
    /// Group, unless the directory's set-group-id bit says otherwise.
    pub gid: u32,
    /// Device number, for device nodes.
    pub device_number: u64,
    /// Target, for symbolic links.
    pub symlink_target: Option<&'a [u8]>,
    /// Distinguishes lives of the number; random.
    pub generation: u64,
    /// Its four times.
    pub now: Timestamp,
}

impl NewInode<'_> {
    /// The inode with no name, no parent, and the permissions as asked for.
    pub(super) fn inode(&self) -> Inode {
        let now = self.now.into();
        Inode {
            mode: self.file_type.mode_bits() | (self.permissions & 0o7777),
            uid: self.uid,
            gid: self.gid,
            link_count: 1,
            size: 0,
            allocated_bytes: 0,
            device_number: self.device_number,
            flags: 0,
            generation: self.generation,
            access_time: now,
            modification_time: now,
            change_time: now,
            birth_time: now,
            parent: 0,
            parent_hash: 0,
        }
    }

    /// As [`Self::inode`], with what the directory gives it: flags, and the group by its set-group-id bit.
    pub(super) fn inode_in(&self, parent: InodeNumber, directory: &Inode, parent_hash: u64) -> Inode {
        let mut inode = self.inode();
        if directory.mode & 0o2000 != 0 {
            inode.gid = directory.gid;
            if self.file_type == FileType::Directory {
                inode.mode |= 0o2000;
            }
        }
        inode.flags = directory.flags & FLAGS_INHERITED;
        inode.parent = parent.0;
        inode.parent_hash = parent_hash;
        inode.link_count = if self.file_type == FileType::Directory { 2 } else { 1 };
        inode
    }
}

impl Namespace {
    /// The inode with this number, or `None`.
    ///
    /// # Errors
    /// Those of reading the tree, or damage.
    pub fn inode(&self, transaction: &mut Transaction<'_>, number: InodeNumber) -> Result<Option<Inode>> {
        match self.visible(transaction, BtreeId::Inodes, number.0, 0)? {
            Some(value) => Ok(Some(Inode::decode(&value)?)),
            None => Ok(None),
        }
    }

    /// The inode with this number.
    ///
    /// # Errors
    /// `ESTALE` if there is none; those of reading the tree.
    pub fn live_inode(&self, transaction: &mut Transaction<'_>, number: InodeNumber) -> Result<Inode> {
        self.inode(transaction, number)?.ok_or(Error::Posix(Errno::STALE))
    }

    /// The inode that a dirent names.
    pub(super) fn named_inode(
        &self,
        transaction: &mut Transaction<'_>,
        directory: InodeNumber,
        number: InodeNumber,
    ) -> Result<Inode> {
        self.inode(transaction, number)?.ok_or_else(|| {
            Error::corrupt(
                format!("directory {directory}"),
                format!("an entry names inode {number}, which does not exist"),
            )
        })
    }

    /// Stores an inode.
    ///
    /// # Errors
    /// If it cannot be encoded.
    pub fn put_inode(&self, transaction: &mut Transaction<'_>, number: InodeNumber, inode: &Inode) -> Result<()> {
        let value = inode.encode()?;
        self.put(transaction, BtreeId::Inodes, number.0, 0, value);
        Ok(())
    }

    /// Reads an inode, lets `change` work on it, and stores it. Returns the new value.
    ///
    /// # Errors
    /// `ESTALE` if there is none, what `change` returns, and those of the tree.
    pub fn update_inode(
        &self,
        transaction: &mut Transaction<'_>,
        number: InodeNumber,
        change: impl FnOnce(&mut Inode) -> Result<()>,
    ) -> Result<Inode> {
        let mut inode = self.live_inode(transaction, number)?;
        change(&mut inode)?;
        self.put_inode(transaction, number, &inode)?;
        Ok(inode)
    }

    /// The live inode with this number, which must be a directory that has a name.
    ///
    /// # Errors
    /// `ENOTDIR`; `ENOENT` if it was removed.
    pub(super) fn live_directory(&self, transaction: &mut Transaction<'_>, number: InodeNumber) -> Result<Inode> {
        let inode = self.live_inode(transaction, number)?;
        if inode.file_type() != Some(FileType::Directory) {
            return Err(Errno::NOTDIR.into());
        }
        if inode.link_count == 0 {
            return Err(Errno::NOENT.into());
        }
        Ok(inode)
    }

    /// Removes the inode's key. Its extents, attributes and orphan key are the caller's.
    pub(super) fn delete_inode_key(&self, transaction: &mut Transaction<'_>, number: InodeNumber) {
        self.delete(transaction, BtreeId::Inodes, number.0, 0);
    }
}
