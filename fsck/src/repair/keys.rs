//! Keys that mean nothing, inodes whose type is gone, the root directory.

use coppicefs::Result;
use coppicefs::format::namespace::{FileType, Inode, Xattr, XattrBucket};
use coppicefs::format::{BtreeId, Position};
use coppicefs::snapshot::{stored_root, stored_subvolume};
use coppicefs::units::{InodeNumber, SnapshotId};

use super::{KeyRepair, inode_position};
use crate::passes::is_possible_xattr;

/// Permissions of what is made anew.
const PERMISSIONS: u32 = 0o600;
const DIRECTORY_PERMISSIONS: u32 = 0o700;

impl KeyRepair<'_, '_> {
    pub(super) fn undecodable(&mut self, btree: BtreeId, position: Position) -> Result<()> {
        match btree {
            BtreeId::Extents => self.lose(position, None),
            BtreeId::Snapshots | BtreeId::Subvolumes => {
                let (expected, value) = if btree == BtreeId::Snapshots { stored_root()? } else { stored_subvolume()? };
                if position == expected {
                    self.transaction.put(btree, position, value);
                } else {
                    self.transaction.delete(btree, position);
                }
                Ok(())
            }
            _ => {
                self.transaction.delete(btree, position);
                Ok(())
            }
        }
    }

    /// The first key of an inode in a tree, if there is one.
    fn has_keys(&mut self, btree: BtreeId, inode: u64) -> Result<bool> {
        let (from, to) = (Position::new(inode, 0, 0), Position::new(inode, u64::MAX, u32::MAX));
        Ok(self.transaction.next(btree, from, to)?.is_some())
    }

    /// A new inode in the place of one that is gone: a directory if it has entries, else a file with what its extents hold. Its names, or one in
    /// `lost+found`, and its counts are found right in the next rounds.
    pub(super) fn make_inode(&mut self, inode: u64) -> Result<()> {
        let is_directory = inode == InodeNumber::ROOT.0 || self.has_keys(BtreeId::Dirents, inode)?;
        let last = Position::new(inode, u64::MAX, u32::MAX);
        let last = self.transaction.previous(BtreeId::Extents, last, Position::new(inode, 0, 0))?;
        let size = if is_directory { 0 } else { last.map_or(0, |(position, _)| position.offset) };
        let (mode, link_count) = if is_directory {
            (FileType::Directory.mode_bits() | DIRECTORY_PERMISSIONS, 2)
        } else {
            (FileType::Regular.mode_bits() | PERMISSIONS, 1)
        };
        let owner = self.inode(InodeNumber::ROOT.0)?.map_or((0, 0), |root| (root.uid, root.gid));
        let now = self.filesystem.env().now().into();
        let made = Inode {
            mode,
            uid: owner.0,
            gid: owner.1,
            link_count,
            size: size.min(i64::MAX as u64),
            generation: self.filesystem.env().random_u64(),
            access_time: now,
            modification_time: now,
            change_time: now,
            birth_time: now,
            parent: if inode == InodeNumber::ROOT.0 { inode } else { 0 },
            ..Inode::default()
        };
        self.transaction.put(BtreeId::Inodes, inode_position(inode), made.encode()?);
        Ok(())
    }

    /// The type that its name says, else the one that what it holds fits.
    pub(super) fn inode_type(&mut self, number: InodeNumber) -> Result<()> {
        let Some(inode) = self.inode(number.0)?.filter(|inode| inode.file_type().is_none()) else { return Ok(()) };
        let position = Position::new(inode.parent, inode.parent_hash, SnapshotId::ROOT.0);
        let named = self.dirents(position)?.into_iter().find(|dirent| dirent.inode == number);
        let file_type = match named {
            Some(named) => named.file_type,
            None if number == InodeNumber::ROOT || self.has_keys(BtreeId::Dirents, number.0)? => FileType::Directory,
            None => FileType::Regular,
        };
        self.change_inode(number.0, |inode| inode.mode = inode.mode & 0o7777 | file_type.mode_bits())
    }

    pub(super) fn root(&mut self) -> Result<()> {
        let root = InodeNumber::ROOT.0;
        if self.inode(root)?.is_none() {
            return self.make_inode(root);
        }
        self.change_inode(root, |inode| inode.mode = inode.mode & 0o7777 | FileType::Directory.mode_bits())
    }

    /// Puts the attributes at a position where the hash of their names says; one that is there already stays, and one that no file can have goes.
    pub(super) fn xattr_names(&mut self, position: Position) -> Result<()> {
        let Some(value) = self.transaction.get(BtreeId::Xattrs, position)? else { return Ok(()) };
        let Ok(bucket) = XattrBucket::decode(&value) else { return Ok(()) };
        let namespace = self.filesystem.namespace();
        let (stay, go): (Vec<Xattr>, Vec<Xattr>) = bucket
            .0
            .into_iter()
            .partition(|xattr| namespace.hash(&xattr.name) == position.offset && is_possible_xattr(&xattr.name));
        self.put_xattrs(position, stay);
        for xattr in go {
            if !is_possible_xattr(&xattr.name) {
                continue;
            }
            let place = Position { offset: namespace.hash(&xattr.name), ..position };
            let stored = self.transaction.get(BtreeId::Xattrs, place)?;
            let mut bucket = stored.and_then(|value| XattrBucket::decode(&value).ok()).unwrap_or_default().0;
            if bucket.iter().all(|present| present.name != xattr.name) {
                bucket.push(xattr);
                self.put_xattrs(place, bucket);
            }
        }
        Ok(())
    }

    fn put_xattrs(&mut self, position: Position, bucket: Vec<Xattr>) {
        if bucket.is_empty() {
            self.transaction.delete(BtreeId::Xattrs, position);
        } else {
            self.transaction.put(BtreeId::Xattrs, position, XattrBucket(bucket).encode());
        }
    }
}
