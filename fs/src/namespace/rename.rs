//! Rename, in its three forms: plain (replacing what is in the way), without replacing, and exchange.

use rustix::io::Errno;

use super::dirent::is_dots;
use super::operations::{count_name, refuse_immutable, refuse_protected, touch_directory, uncount_name};
use super::{Changed, Namespace};
use crate::env::Timestamp;
use crate::error::{Error, Result};
use crate::format::namespace::{Dirent, FileType, Inode};
use crate::transaction::Transaction;
use crate::units::InodeNumber;

/// How deep a directory may lie: beyond this a chain of parents is taken for a loop on disk.
const DEPTH_MAX: u32 = 1 << 20;

/// What is to be renamed, to what, and how.
#[derive(Clone, Copy, Debug)]
pub struct Rename<'a> {
    /// Directory of the old name.
    pub parent: InodeNumber,
    /// Old name.
    pub name: &'a [u8],
    /// Directory of the new name.
    pub new_parent: InodeNumber,
    /// New name.
    pub new_name: &'a [u8],
    /// `EEXIST` if the new name exists.
    pub no_replace: bool,
    /// The two names exchange their inodes.
    pub exchange: bool,
    /// Time of the operation.
    pub now: Timestamp,
}

/// What a rename did.
#[derive(Clone, Debug)]
pub struct Renamed {
    /// The inode that has the new name now.
    pub source: InodeNumber,
    /// The inode that had it before.
    pub target: Option<InodeNumber>,
    /// All inodes that changed; one with `link_count` 0 has become an orphan. Empty if both names were of one file.
    pub changed: Changed,
}

/// The inodes of a rename while it is worked out, each once however many roles it plays.
struct Working(Changed);

impl Working {
    fn load(
        &mut self,
        namespace: &Namespace,
        transaction: &mut Transaction<'_>,
        directory: InodeNumber,
        number: InodeNumber,
    ) -> Result<()> {
        if self.0.iter().all(|(present, _)| *present != number) {
            let inode = namespace.named_inode(transaction, directory, number)?;
            self.0.push((number, inode));
        }
        Ok(())
    }

    fn get(&mut self, number: InodeNumber) -> Result<&mut Inode> {
        let found = self.0.iter_mut().find(|(present, _)| *present == number);
        found.map(|(_, inode)| inode).ok_or_else(|| Error::Bug(format!("inode {number} was not loaded")))
    }
}

impl Namespace {
    /// Renames. Nothing changes if old and new name are of one file.
    ///
    /// # Errors
    /// `ENOENT`, `EEXIST`, `EISDIR`, `ENOTDIR`, `ENOTEMPTY`, `EINVAL` (a directory into itself), `EBUSY` ("." and ".."), `EPERM`,
    /// `EMLINK`; those of the tree.
    pub fn rename(&self, transaction: &mut Transaction<'_>, request: &Rename<'_>) -> Result<Renamed> {
        let Rename { parent, name, new_parent, new_name, no_replace, exchange, now } = *request;
        if no_replace && exchange {
            return Err(Errno::INVAL.into());
        }
        if is_dots(name) || is_dots(new_name) {
            return Err(Errno::BUSY.into());
        }
        let directory = self.live_directory(transaction, parent)?;
        let mut working = Working(Changed::from_iter([(parent, directory)]));
        if new_parent != parent {
            let directory = self.live_directory(transaction, new_parent)?;
            working.0.push((new_parent, directory));
        }
        let old = self.require(transaction, parent, name)?;
        let target = self.lookup(transaction, new_parent, new_name)?;
        if no_replace && target.is_some() {
            return Err(Errno::EXIST.into());
        }
        if exchange && target.is_none() {
            return Err(Errno::NOENT.into());
        }
        let target_number = target.as_ref().map(|target| target.inode);
        if target_number == Some(old.inode) {
            return Ok(Renamed { source: old.inode, target: target_number, changed: Changed::new() });
        }
        working.load(self, transaction, parent, old.inode)?;
        if let Some(target) = target_number {
            working.load(self, transaction, new_parent, target)?;
        }
        refuse_protected(working.get(parent)?)?;
        refuse_protected(working.get(old.inode)?)?;
        refuse_immutable(working.get(new_parent)?)?;
        if let Some(target) = target_number {
            refuse_protected(working.get(new_parent)?)?;
            refuse_protected(working.get(target)?)?;
        }
        if old.file_type == FileType::Directory {
            self.refuse_loop(transaction, old.inode, new_parent)?;
        }
        match &target {
            Some(target) if exchange => {
                if target.file_type == FileType::Directory {
                    self.refuse_loop(transaction, target.inode, parent)?;
                }
                self.exchange(transaction, request, &old, target, &mut working)?;
            }
            _ => self.move_name(transaction, request, &old, target.as_ref(), &mut working)?,
        }
        touch_directory(working.get(parent)?, now);
        touch_directory(working.get(new_parent)?, now);
        for (number, inode) in &working.0 {
            self.put_inode(transaction, *number, inode)?;
        }
        Ok(Renamed { source: old.inode, target: target_number, changed: working.0 })
    }

    fn move_name(
        &self,
        transaction: &mut Transaction<'_>,
        request: &Rename<'_>,
        old: &Dirent,
        target: Option<&Dirent>,
        working: &mut Working,
    ) -> Result<()> {
        let Rename { parent, name, new_parent, new_name, now, .. } = *request;
        let is_directory = old.file_type == FileType::Directory;
        let hash = match target {
            Some(target) => {
                let target_is_directory = target.file_type == FileType::Directory;
                if is_directory && !target_is_directory {
                    return Err(Errno::NOTDIR.into());
                }
                if target_is_directory && !is_directory {
                    return Err(Errno::ISDIR.into());
                }
                // The source's own directory is an ancestor of the source: not empty, so the check below covers it.
                if target_is_directory && !self.is_empty(transaction, target.inode)? {
                    return Err(Errno::NOTEMPTY.into());
                }
                uncount_name(working.get(new_parent)?, target_is_directory);
                let place = (new_parent, self.hash(new_name));
                self.drop_name(transaction, target.inode, working.get(target.inode)?, place, now)?;
                self.replace_dirent(transaction, new_parent, new_name, old.inode, old.file_type)?
            }
            None => self.insert_dirent(transaction, new_parent, new_name, old.inode, old.file_type)?,
        };
        self.remove_dirent(transaction, parent, name)?;
        uncount_name(working.get(parent)?, is_directory);
        count_name(working.get(new_parent)?, is_directory)?;
        let inode = working.get(old.inode)?;
        (inode.parent, inode.parent_hash) = (new_parent.0, hash);
        inode.change_time = now.into();
        Ok(())
    }

    fn exchange(
        &self,
        transaction: &mut Transaction<'_>,
        request: &Rename<'_>,
        old: &Dirent,
        target: &Dirent,
        working: &mut Working,
    ) -> Result<()> {
        let Rename { parent, name, new_parent, new_name, now, .. } = *request;
        let new_hash = self.replace_dirent(transaction, new_parent, new_name, old.inode, old.file_type)?;
        let old_hash = self.replace_dirent(transaction, parent, name, target.inode, target.file_type)?;
        let is_directory = |dirent: &Dirent| dirent.file_type == FileType::Directory;
        if parent != new_parent && is_directory(old) != is_directory(target) {
            let (loses, gains) = if is_directory(old) { (parent, new_parent) } else { (new_parent, parent) };
            // Names stay as many as they were; only what they lead to is another kind.
            uncount_name(working.get(loses)?, true);
            working.get(loses)?.size += 1;
            count_name(working.get(gains)?, true)?;
            working.get(gains)?.size -= 1;
        }
        for (number, directory, hash) in [(old.inode, new_parent, new_hash), (target.inode, parent, old_hash)] {
            let inode = working.get(number)?;
            (inode.parent, inode.parent_hash) = (directory.0, hash);
            inode.change_time = now.into();
        }
        Ok(())
    }

    /// Refuses to put the directory `moved` into `into` if that is `moved` or lies below it.
    fn refuse_loop(&self, transaction: &mut Transaction<'_>, moved: InodeNumber, into: InodeNumber) -> Result<()> {
        let mut current = into;
        for _ in 0..DEPTH_MAX {
            if current == moved {
                return Err(Errno::INVAL.into());
            }
            if current == InodeNumber::ROOT {
                return Ok(());
            }
            let inode = self.named_inode(transaction, current, current)?;
            current = InodeNumber(inode.parent);
        }
        Err(Error::corrupt(format!("directory {into}"), "its parents form a loop"))
    }
}
