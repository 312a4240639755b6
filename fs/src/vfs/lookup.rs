//! From names and node ids to inodes: lookup, forget, listings of directories.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use rustix::io::Errno;

use super::Vfs;
use super::inode::VfsInode;
use super::types::{Caller, DirectoryEntry, Emitted, Entry, Lookup, Opened};
use crate::error::{Error, Result};
use crate::format::namespace::{FileType, Inode};
use crate::namespace::Cookie;
use crate::sync::Arc;
use crate::units::{InodeNumber, JournalSequence};

/// Names that are read from the tree at a time.
const LISTING_STEP: usize = 128;

impl Vfs {
    /// The inode of a node id. Ids above 2^44 belong to other subvolumes, which do not exist yet.
    ///
    /// # Errors
    /// `ESTALE` if there is none.
    pub(super) fn inode(&self, node: u64) -> Result<Arc<VfsInode>> {
        self.object(InodeNumber(node), 0)
    }

    /// The object of an inode, loaded if need be; `lookups` more are counted. An inode without a name is not brought back.
    pub(super) fn object(&self, number: InodeNumber, lookups: u64) -> Result<Arc<VfsInode>> {
        self.check_alive()?;
        if number > InodeNumber::MAX {
            return Err(Errno::STALE.into());
        }
        self.table.get_or_load(number, lookups, || {
            // Sampled first: a commit that the read below sees is at or before it.
            let mut transaction = self.transactions.read();
            let inode = self.namespace.live_inode(&mut transaction, number)?;
            if inode.link_count == 0 {
                return Err(Errno::STALE.into());
            }
            self.new_object(number, inode, self.journal.newest())
        })
    }

    /// An object for an inode as it is stored.
    pub(super) fn new_object(
        &self,
        number: InodeNumber,
        inode: Inode,
        sequence: JournalSequence,
    ) -> Result<Arc<VfsInode>> {
        let file_type =
            inode.file_type().ok_or_else(|| Error::corrupt(format!("inode {number}"), "its mode has no file type"))?;
        let file = (file_type == FileType::Regular).then(|| self.new_file_pages(number));
        Ok(Arc::new(VfsInode::new(number, file_type, inode, file, sequence)))
    }

    /// What a lookup answers about an inode.
    pub(super) fn entry(&self, inode: &VfsInode) -> Entry {
        Entry { attributes: self.attributes_of(inode), generation: inode.generation }
    }

    fn directory(&self, node: u64) -> Result<Arc<VfsInode>> {
        let inode = self.inode(node)?;
        if inode.file_type == FileType::Directory { Ok(inode) } else { Err(Errno::NOTDIR.into()) }
    }

    /// Finds a name in a directory. A name that is found counts one lookup.
    ///
    /// # Errors
    /// `ENOTDIR`, `ENAMETOOLONG`, `ESTALE`, and those of the media.
    pub fn lookup(&self, _caller: &Caller, parent: u64, name: &OsStr) -> Result<Lookup> {
        if name == "." {
            return Ok(Lookup::Found(self.entry(&*self.object(InodeNumber(parent), 1)?)));
        }
        let directory = self.directory(parent)?;
        if name == ".." {
            let up = InodeNumber(directory.state().inode.parent);
            return Ok(Lookup::Found(self.entry(&*self.object(up, 1)?)));
        }
        for _ in 0..super::RETRIES {
            let mut transaction = self.transactions.read();
            let found = self.namespace.lookup(&mut transaction, directory.number, name.as_bytes())?;
            let Some(dirent) = found else { return Ok(Lookup::Absent) };
            match self.object(dirent.inode, 1) {
                Ok(inode) => return Ok(Lookup::Found(self.entry(&inode))),
                // Removed since: look again.
                Err(Error::Posix(Errno::STALE)) => {}
                Err(error) => return Err(error),
            }
        }
        let problem = format!("an entry names an inode that does not exist: {}", name.to_string_lossy());
        Err(Error::corrupt(format!("directory {}", directory.number), problem))
    }

    /// Gives lookups of a node back.
    pub fn forget(&self, node: u64, lookups: u64) {
        if self.table.forget(InodeNumber(node), lookups) {
            self.reap_if_unused(InodeNumber(node));
        }
    }

    /// Opens a directory.
    ///
    /// # Errors
    /// `ENOTDIR`, and those of the media.
    pub fn opendir(&self, _caller: &Caller, node: u64, flags: i32) -> Result<Opened> {
        let inode = self.directory(node)?;
        Ok(Opened { handle: self.handles.open(inode, flags) })
    }

    /// Closes a directory.
    ///
    /// # Errors
    /// `EBADF`.
    pub fn releasedir(&self, node: u64, handle: u64) -> Result<()> {
        self.release(node, handle)
    }

    /// Lists a directory from `cookie` (0 is the start).
    ///
    /// # Errors
    /// Those of the media.
    pub fn readdir(
        &self,
        _caller: &Caller,
        node: u64,
        _handle: u64,
        cookie: u64,
        emit: &mut dyn FnMut(&DirectoryEntry<'_>) -> Emitted,
    ) -> Result<()> {
        let directory = self.directory(node)?;
        self.touch_access(&directory, 0);
        self.walk(&directory, Cookie(cookie), &mut |entry, _| Ok(emit(entry)))
    }

    /// Lists a directory with the attributes of each entry; each that is accepted counts a lookup, but not "." and "..".
    ///
    /// # Errors
    /// Those of the media.
    pub fn readdirplus(
        &self,
        _caller: &Caller,
        node: u64,
        _handle: u64,
        cookie: u64,
        emit: &mut dyn FnMut(&DirectoryEntry<'_>, Option<&Entry>) -> Emitted,
    ) -> Result<()> {
        let directory = self.directory(node)?;
        self.touch_access(&directory, 0);
        self.walk(&directory, Cookie(cookie), &mut |entry, is_name| {
            let number = InodeNumber(entry.node);
            let inode = match self.object(number, u64::from(is_name)) {
                Ok(inode) => inode,
                // Removed meanwhile or damaged: the name alone.
                Err(_) => return Ok(emit(entry, None)),
            };
            let emitted = emit(entry, Some(&self.entry(&inode)));
            drop(inode);
            if emitted == Emitted::Full && is_name {
                self.forget(number.0, 1);
            }
            Ok(emitted)
        })
    }

    fn walk(
        &self,
        directory: &VfsInode,
        mut after: Cookie,
        visit: &mut dyn FnMut(&DirectoryEntry<'_>, bool) -> Result<Emitted>,
    ) -> Result<()> {
        let up = directory.state().inode.parent;
        let dots = [(Cookie::DOT, directory.number.0, "."), (Cookie::DOT_DOT, up, "..")];
        for (cookie, node, name) in dots {
            if after < cookie {
                let name = OsStr::new(name);
                let entry = DirectoryEntry { node, file_type: FileType::Directory, name, next_cookie: cookie.0 };
                if visit(&entry, false)? == Emitted::Full {
                    return Ok(());
                }
                after = cookie;
            }
        }
        loop {
            let mut transaction = self.transactions.read();
            let listing = self.namespace.list(&mut transaction, directory.number, after, LISTING_STEP)?;
            drop(transaction);
            for entry in &listing.entries {
                let next = DirectoryEntry {
                    node: entry.inode.0,
                    file_type: entry.file_type,
                    name: OsStr::from_bytes(&entry.name),
                    next_cookie: entry.cookie.0,
                };
                if visit(&next, true)? == Emitted::Full {
                    return Ok(());
                }
                after = entry.cookie;
            }
            if listing.ended {
                return Ok(());
            }
        }
    }
}
