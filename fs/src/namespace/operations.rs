//! Making and removing names: create, link, unlink, rmdir. Each is one transaction's worth of updates.

use rustix::io::Errno;

use super::dirent::is_dots;
use super::inode::{FLAG_APPEND, FLAG_IMMUTABLE, NewInode};
use super::{Changed, LINK_COUNT_MAX, Namespace, SYMLINK_BYTES_MAX, acl};
use crate::env::Timestamp;
use crate::error::{Error, Result};
use crate::format::BtreeId;
use crate::format::extent::ExtentValue;
use crate::format::namespace::{Dirent, FileType, Inode};
use crate::transaction::Transaction;
use crate::units::InodeNumber;

/// A new inode.
#[derive(Clone, Debug)]
pub struct Made {
    /// The inode as it will be committed.
    pub inode: Inode,
    /// It, and its directory.
    pub changed: Changed,
}

/// Refuses to change an immutable or append-only inode.
pub(super) fn refuse_protected(inode: &Inode) -> Result<()> {
    if inode.flags & (FLAG_IMMUTABLE | FLAG_APPEND) != 0 { Err(Errno::PERM.into()) } else { Ok(()) }
}

/// Refuses to add a name to an immutable directory.
pub(super) fn refuse_immutable(directory: &Inode) -> Result<()> {
    if directory.flags & FLAG_IMMUTABLE != 0 { Err(Errno::PERM.into()) } else { Ok(()) }
}

pub(super) fn touch_directory(directory: &mut Inode, now: Timestamp) {
    directory.modification_time = now.into();
    directory.change_time = now.into();
}

/// One more name in a directory, of a subdirectory or not.
pub(super) fn count_name(directory: &mut Inode, is_directory: bool) -> Result<()> {
    directory.size += 1;
    if is_directory {
        if directory.link_count >= LINK_COUNT_MAX {
            return Err(Errno::MLINK.into());
        }
        directory.link_count += 1;
    }
    Ok(())
}

/// One name less in a directory. Counts that are too low on disk stay at their floor, for fsck to mend.
pub(super) fn uncount_name(directory: &mut Inode, is_directory: bool) {
    directory.size = directory.size.saturating_sub(1);
    if is_directory {
        directory.link_count = directory.link_count.saturating_sub(1).max(2);
    }
}

impl Namespace {
    /// Makes an inode of any type with a name in `parent`: owner, group, flags and permissions by the rules of set-group-id
    /// directories, the default ACL, or the umask.
    ///
    /// # Errors
    /// `EEXIST`, `ENOENT` (a removed directory), `ENOTDIR`, `ENAMETOOLONG`, `EPERM` (an immutable directory), `EMLINK`; those
    /// of the tree.
    pub fn create(
        &self,
        transaction: &mut Transaction<'_>,
        parent: InodeNumber,
        name: &[u8],
        number: InodeNumber,
        new: &NewInode<'_>,
    ) -> Result<Made> {
        let mut directory = self.live_directory(transaction, parent)?;
        // EEXIST comes before what else may be wrong with the directory.
        let hash = self.insert_dirent(transaction, parent, name, number, new.file_type)?;
        refuse_immutable(&directory)?;
        let mut inode = new.inode_in(parent, &directory, hash);
        let is_directory = new.file_type == FileType::Directory;
        if new.file_type != FileType::Symlink {
            self.inherit_acl(transaction, parent, number, &mut inode, new.umask)?;
        }
        if let Some(target) = new.symlink_target {
            if target.is_empty() {
                return Err(Errno::NOENT.into());
            }
            if target.len() > SYMLINK_BYTES_MAX || target.len() + 1 > self.value_bytes_max {
                return Err(Errno::NAMETOOLONG.into());
            }
            inode.size = target.len() as u64;
            inode.allocated_bytes = inode.size;
            let value = ExtentValue::Inline(target.to_vec()).encode();
            self.put(transaction, BtreeId::Extents, number.0, target.len() as u64, value);
        }
        count_name(&mut directory, is_directory)?;
        touch_directory(&mut directory, new.now);
        self.put_inode(transaction, number, &inode)?;
        self.put_inode(transaction, parent, &directory)?;
        Ok(Made { inode: inode.clone(), changed: Changed::from_iter([(number, inode), (parent, directory)]) })
    }

    fn inherit_acl(
        &self,
        transaction: &mut Transaction<'_>,
        parent: InodeNumber,
        number: InodeNumber,
        inode: &mut Inode,
        umask: u32,
    ) -> Result<()> {
        let Some(default) = self.xattr(transaction, parent, acl::DEFAULT)? else {
            inode.mode &= !(umask & 0o777);
            return Ok(());
        };
        let (list, granted) = acl::inherit(&acl::decode(&default)?, inode.mode);
        inode.mode = (inode.mode & !0o777) | granted;
        if !acl::permissions(&list).1 {
            self.put_xattr(transaction, number, acl::ACCESS, &acl::encode(&list))?;
        }
        if inode.file_type() == Some(FileType::Directory) {
            self.put_xattr(transaction, number, acl::DEFAULT, &default)?;
        }
        Ok(())
    }

    /// Target of a symbolic link.
    ///
    /// # Errors
    /// `EINVAL` if it is none; damage; those of the tree.
    pub fn symlink_target(&self, transaction: &mut Transaction<'_>, number: InodeNumber) -> Result<Vec<u8>> {
        let inode = self.live_inode(transaction, number)?;
        if inode.file_type() != Some(FileType::Symlink) {
            return Err(Errno::INVAL.into());
        }
        let found = self.visible_range(transaction, BtreeId::Extents, number.0, 0, 1)?;
        match found.first().map(|(_, value)| ExtentValue::decode(value)).transpose()? {
            Some(ExtentValue::Inline(target)) if target.len() as u64 == inode.size => Ok(target),
            _ => Err(Error::corrupt(format!("symbolic link {number}"), "it has no target of its size")),
        }
    }

    /// Gives `number` another name.
    ///
    /// # Errors
    /// `EPERM` for directories and protected files, `EMLINK`, `ENOENT` if it lost its last name; as [`Self::create`].
    pub fn link(
        &self,
        transaction: &mut Transaction<'_>,
        number: InodeNumber,
        parent: InodeNumber,
        name: &[u8],
        now: Timestamp,
    ) -> Result<Made> {
        let mut directory = self.live_directory(transaction, parent)?;
        let mut inode = self.live_inode(transaction, number)?;
        let file_type = inode.file_type().ok_or_else(|| Error::corrupt(format!("inode {number}"), "no file type"))?;
        if file_type == FileType::Directory {
            return Err(Errno::PERM.into());
        }
        let hash = self.insert_dirent(transaction, parent, name, number, file_type)?;
        refuse_immutable(&directory)?;
        refuse_protected(&inode)?;
        if inode.link_count == 0 {
            return Err(Errno::NOENT.into());
        }
        if inode.link_count >= LINK_COUNT_MAX {
            return Err(Errno::MLINK.into());
        }
        inode.link_count += 1;
        inode.change_time = now.into();
        (inode.parent, inode.parent_hash) = (parent.0, hash);
        count_name(&mut directory, false)?;
        touch_directory(&mut directory, now);
        self.put_inode(transaction, number, &inode)?;
        self.put_inode(transaction, parent, &directory)?;
        Ok(Made { inode: inode.clone(), changed: Changed::from_iter([(number, inode), (parent, directory)]) })
    }

    /// Takes the name `place` (directory and hash) off `inode`, which is stored; the last one makes it an orphan.
    pub(super) fn drop_name(
        &self,
        transaction: &mut Transaction<'_>,
        number: InodeNumber,
        inode: &mut Inode,
        place: (InodeNumber, u64),
        now: Timestamp,
    ) -> Result<()> {
        let is_directory = inode.file_type() == Some(FileType::Directory);
        inode.link_count = if is_directory { 0 } else { inode.link_count.saturating_sub(1) };
        inode.change_time = now.into();
        if inode.link_count == 0 {
            self.add_orphan(transaction, number);
        } else if (inode.parent, inode.parent_hash) == (place.0.0, place.1) {
            // Where its other names are is not known without a search.
            (inode.parent, inode.parent_hash) = (0, 0);
        }
        self.put_inode(transaction, number, inode)
    }

    /// Removes a name of something other than a directory. The inode without a name stays, as an orphan.
    ///
    /// # Errors
    /// `ENOENT`, `EISDIR`, `EPERM` (immutable, append-only); those of the tree.
    pub fn unlink(
        &self,
        transaction: &mut Transaction<'_>,
        parent: InodeNumber,
        name: &[u8],
        now: Timestamp,
    ) -> Result<Changed> {
        let mut directory = self.live_directory(transaction, parent)?;
        if is_dots(name) {
            return Err(Errno::ISDIR.into());
        }
        let Dirent { inode: number, .. } = self.require(transaction, parent, name)?;
        let mut inode = self.named_inode(transaction, parent, number)?;
        if inode.file_type() == Some(FileType::Directory) {
            return Err(Errno::ISDIR.into());
        }
        refuse_protected(&directory)?;
        refuse_protected(&inode)?;
        self.remove_dirent(transaction, parent, name)?;
        uncount_name(&mut directory, false);
        touch_directory(&mut directory, now);
        self.drop_name(transaction, number, &mut inode, (parent, self.hash(name)), now)?;
        self.put_inode(transaction, parent, &directory)?;
        Ok(Changed::from_iter([(number, inode), (parent, directory)]))
    }

    /// Removes an empty directory.
    ///
    /// # Errors
    /// `ENOENT`, `ENOTDIR`, `ENOTEMPTY`, `EINVAL` for ".", `EPERM`; those of the tree.
    pub fn rmdir(
        &self,
        transaction: &mut Transaction<'_>,
        parent: InodeNumber,
        name: &[u8],
        now: Timestamp,
    ) -> Result<Changed> {
        let mut directory = self.live_directory(transaction, parent)?;
        match name {
            b"." => return Err(Errno::INVAL.into()),
            b".." => return Err(Errno::NOTEMPTY.into()),
            _ => {}
        }
        let Dirent { inode: number, .. } = self.require(transaction, parent, name)?;
        let mut inode = self.named_inode(transaction, parent, number)?;
        if inode.file_type() != Some(FileType::Directory) {
            return Err(Errno::NOTDIR.into());
        }
        refuse_protected(&directory)?;
        refuse_protected(&inode)?;
        if !self.is_empty(transaction, number)? {
            return Err(Errno::NOTEMPTY.into());
        }
        self.remove_dirent(transaction, parent, name)?;
        uncount_name(&mut directory, true);
        touch_directory(&mut directory, now);
        self.drop_name(transaction, number, &mut inode, (parent, self.hash(name)), now)?;
        self.put_inode(transaction, parent, &directory)?;
        Ok(Changed::from_iter([(number, inode), (parent, directory)]))
    }
}
