//! Names: entries that cannot be, that belong to nobody, and what has no name.

use coppicefs::format::namespace::{Dirent, FileType, Inode};
use coppicefs::format::{BtreeId, Position};
use coppicefs::units::{InodeNumber, SnapshotId};
use coppicefs::{Error, Result};

use super::{KeyRepair, inode_position};
use crate::passes::is_possible;

const LOST_AND_FOUND: &str = "lost+found";
/// Names that are tried where one is taken.
const NAMES_MAX: u32 = 1000;

impl KeyRepair<'_, '_> {
    /// Takes an entry away. Returns it.
    pub(super) fn remove_dirent(&mut self, position: Position, discriminator: u8) -> Result<Option<Dirent>> {
        let mut bucket = self.dirents(position)?;
        let Some(index) = bucket.iter().position(|dirent| dirent.discriminator == discriminator) else {
            return Ok(None);
        };
        let removed = bucket.remove(index);
        self.put_dirents(position, bucket);
        Ok(Some(removed))
    }

    pub(super) fn dirent_type(&mut self, position: Position, discriminator: u8, actual: u8) -> Result<()> {
        let actual = FileType::from_stored(actual)?;
        let mut bucket = self.dirents(position)?;
        for dirent in bucket.iter_mut().filter(|dirent| dirent.discriminator == discriminator) {
            dirent.file_type = actual;
        }
        self.put_dirents(position, bucket);
        Ok(())
    }

    /// An entry whose name is possible moves to where the name's hash says, unless that name is there. What loses its only name so goes to
    /// `lost+found`.
    pub(super) fn dirent_name(&mut self, position: Position, discriminator: u8) -> Result<()> {
        let Some(dirent) = self.remove_dirent(position, discriminator)? else { return Ok(()) };
        let place = Position { offset: self.filesystem.namespace().hash(&dirent.name), ..position };
        if is_possible(&dirent.name) && place != position {
            self.add_dirent(place, dirent)?;
        }
        Ok(())
    }

    /// Adds an entry, if its name is not there. Returns whether.
    fn add_dirent(&mut self, place: Position, dirent: Dirent) -> Result<bool> {
        let mut bucket = self.dirents(place)?;
        if bucket.iter().any(|present| present.name == dirent.name) {
            return Ok(false);
        }
        let discriminator = bucket.last().map_or(0, |last| last.discriminator.saturating_add(1));
        bucket.push(Dirent { discriminator, ..dirent });
        self.put_dirents(place, bucket);
        Ok(true)
    }

    /// The directory of an entry is gone: it is made anew. If something else has its number, the entry goes.
    pub(super) fn ownerless_dirent(&mut self, position: Position, discriminator: u8) -> Result<()> {
        match self.inode(position.inode)? {
            None => self.make_inode(position.inode),
            Some(inode) if inode.file_type() == Some(FileType::Directory) => Ok(()),
            Some(_) => self.remove_dirent(position, discriminator).map(|_| ()),
        }
    }

    /// Gives an inode a name in `lost+found`: its number, with a `#` before it. Counts are set right by a later round.
    pub(super) fn connect(&mut self, inode: InodeNumber) -> Result<()> {
        let Some(mut lost) = self.inode(inode.0)? else { return Ok(()) };
        let Some(file_type) = lost.file_type() else { return Ok(()) };
        let directory = self.lost_and_found()?;
        if file_type == FileType::Directory {
            self.unname(&lost, inode)?;
        }
        let name = format!("#{inode}");
        let hash = self.name_free(directory, &name, inode, file_type)?;
        (lost.parent, lost.parent_hash) = (directory.0, hash);
        self.transaction.put(BtreeId::Inodes, inode_position(inode.0), lost.encode()?);
        Ok(())
    }

    /// Takes away the name of a directory in a loop, so that it has one name and not two.
    fn unname(&mut self, lost: &Inode, inode: InodeNumber) -> Result<()> {
        let position = Position::new(lost.parent, lost.parent_hash, SnapshotId::ROOT.0);
        let mut bucket = self.dirents(position)?;
        let before = bucket.len();
        bucket.retain(|dirent| dirent.inode != inode);
        if bucket.len() < before {
            self.put_dirents(position, bucket);
        }
        Ok(())
    }

    /// Names an inode in a directory, with a number behind the name if it is taken. Returns the name's hash.
    fn name_free(
        &mut self,
        directory: InodeNumber,
        name: &str,
        inode: InodeNumber,
        file_type: FileType,
    ) -> Result<u64> {
        for number in 0..NAMES_MAX {
            let name = if number == 0 { name.to_owned() } else { format!("{name}.{number}") }.into_bytes();
            let hash = self.filesystem.namespace().hash(&name);
            let dirent = Dirent { discriminator: 0, file_type, inode, name };
            if self.add_dirent(Position::new(directory.0, hash, SnapshotId::ROOT.0), dirent)? {
                return Ok(hash);
            }
        }
        Err(Error::Invalid(format!("all names like {name} are taken in directory {directory}")))
    }

    /// The directory `lost+found` of the root, made if it is not there; under another name if something else is.
    fn lost_and_found(&mut self) -> Result<InodeNumber> {
        let root = InodeNumber::ROOT;
        for number in 0..NAMES_MAX {
            let suffix = if number == 0 { String::new() } else { format!(".{number}") };
            let name = format!("{LOST_AND_FOUND}{suffix}").into_bytes();
            let hash = self.filesystem.namespace().hash(&name);
            let position = Position::new(root.0, hash, SnapshotId::ROOT.0);
            let Some(found) = self.dirents(position)?.into_iter().find(|dirent| dirent.name == name) else {
                let inode = self.new_inode_number()?;
                self.make_inode(inode.0)?;
                self.change_inode(inode.0, |made| {
                    made.mode = FileType::Directory.mode_bits() | 0o700;
                    (made.link_count, made.size) = (2, 0);
                    (made.parent, made.parent_hash) = (root.0, hash);
                })?;
                let dirent = Dirent { discriminator: 0, file_type: FileType::Directory, inode, name };
                self.add_dirent(position, dirent)?;
                return Ok(inode);
            };
            if self.inode(found.inode.0)?.is_some_and(|inode| inode.file_type() == Some(FileType::Directory)) {
                return Ok(found.inode);
            }
        }
        Err(Error::Invalid(format!("all names like {LOST_AND_FOUND} are taken by files")))
    }

    /// A number that nothing has a key of.
    fn new_inode_number(&mut self) -> Result<InodeNumber> {
        let mut largest = InodeNumber::ROOT.0;
        let last = Position::new(InodeNumber::MAX.0, u64::MAX, u32::MAX);
        for btree in [BtreeId::Inodes, BtreeId::Extents, BtreeId::Dirents, BtreeId::Xattrs] {
            let found = self.transaction.previous(btree, last, Position::MIN)?;
            largest = largest.max(found.map_or(0, |(position, _)| position.inode));
        }
        if largest < InodeNumber::MAX.0 {
            return Ok(InodeNumber(largest + 1));
        }
        // The numbers are used up at the top: the first gap from below.
        let mut candidate = InodeNumber::ROOT.0 + 1;
        for (position, _) in self.transaction.range(BtreeId::Inodes, inode_position(candidate), Position::MAX, 4096)? {
            if position.inode > candidate {
                break;
            }
            candidate = position.inode + 1;
        }
        Ok(InodeNumber(candidate))
    }
}
