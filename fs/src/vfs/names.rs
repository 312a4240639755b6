//! Operations that change names: each takes the inode locks of all inodes that it changes, runs one transaction, and copies what was
//! stored into memory before it unlocks.
//!
//! Which inode a name leads to is known only after a lookup, and locks come in the order of inode numbers: so look up, lock, and let the
//! transaction check that the name still leads there; else start again.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use rustix::io::Errno;
use smallvec::SmallVec;

use super::Vfs;
use super::inode::VfsInode;
use super::types::{Caller, Entry, Opened};
use crate::error::{Error, Result};
use crate::format::namespace::FileType;
use crate::namespace::{Changed, Made, NewInode, Rename};
use crate::sync::{Arc, RwLockWriteGuard};
use crate::transaction::{CommitOptions, Committed};
use crate::units::InodeNumber;

/// Bytes of keys for which there must be space before an operation adds some: a few inodes and names, with their fixed parts.
pub(super) const ADMISSION_BYTES: u64 = 2 << 10;
const RENAME_NOREPLACE: u32 = 1;
const RENAME_EXCHANGE: u32 = 2;

/// What is to be made.
#[derive(Clone, Copy)]
struct Making<'a> {
    file_type: FileType,
    permissions: u32,
    device_number: u64,
    symlink_target: Option<&'a [u8]>,
}

type Locks<'a> = SmallVec<[RwLockWriteGuard<'a, ()>; 4]>;

/// Locks several inodes exclusively, in the order of their numbers, each once.
pub(super) fn lock_exclusively<'a>(inodes: &[&'a Arc<VfsInode>]) -> Locks<'a> {
    let mut ordered: SmallVec<[&'a Arc<VfsInode>; 4]> = inodes.iter().copied().collect();
    ordered.sort_by_key(|inode| inode.number);
    ordered.dedup_by_key(|inode| inode.number);
    ordered.into_iter().map(|inode| inode.lock.write()).collect()
}

impl Vfs {
    /// Copies what a transaction has stored into the inodes in memory. Their inode locks are held.
    fn apply(&self, changed: &Changed, held: &[&Arc<VfsInode>], committed: &Committed<()>) {
        for (number, stored) in changed {
            if let Some(inode) = held.iter().find(|inode| inode.number == *number) {
                inode.apply(stored, committed.sequence);
            }
        }
    }

    fn make(&self, caller: &Caller, parent: u64, name: &OsStr, making: Making<'_>) -> Result<(Arc<VfsInode>, Entry)> {
        self.check_writable()?;
        let directory = self.inode(parent)?;
        let number = self.allocator.allocate()?;
        let _admission = self.admit(|| self.space.reserve_metadata(ADMISSION_BYTES))?;
        let new = NewInode {
            file_type: making.file_type,
            permissions: making.permissions,
            umask: caller.umask,
            uid: caller.uid,
            gid: caller.gid,
            device_number: making.device_number,
            symlink_target: making.symlink_target,
            generation: self.env.random_u64(),
            now: self.env.now(),
        };
        let inode = {
            let _lock = directory.lock.write();
            let committed = self.transactions.run(CommitOptions::default(), |transaction| {
                self.namespace.create(transaction, directory.number, name.as_bytes(), number, &new)
            })?;
            let Committed { value: Made { inode, changed }, sequence } = committed;
            self.apply(&changed, &[&directory], &Committed { value: (), sequence });
            self.table.get_or_load(number, 1, || self.new_object(number, inode.clone(), sequence))?
        };
        self.settle_names(&directory)?;
        let entry = self.entry(&inode);
        Ok((inode, entry))
    }

    /// Makes a file, device node, pipe or socket. `mode` has the type; none is a regular file.
    ///
    /// # Errors
    /// POSIX's.
    pub fn mknod(&self, caller: &Caller, parent: u64, name: &OsStr, mode: u32, device_number: u32) -> Result<Entry> {
        let file_type = match FileType::from_mode(mode) {
            None if mode & 0o170_000 == 0 => FileType::Regular,
            Some(FileType::Directory | FileType::Symlink) | None => return Err(Errno::INVAL.into()),
            Some(file_type) => file_type,
        };
        let is_device = matches!(file_type, FileType::CharacterDevice | FileType::BlockDevice);
        let device_number = if is_device { u64::from(device_number) } else { 0 };
        let making = Making { file_type, permissions: mode & 0o7777, device_number, symlink_target: None };
        self.make(caller, parent, name, making).map(|(_, entry)| entry)
    }

    /// Makes a directory.
    ///
    /// # Errors
    /// POSIX's.
    pub fn mkdir(&self, caller: &Caller, parent: u64, name: &OsStr, mode: u32) -> Result<Entry> {
        let file_type = FileType::Directory;
        let making = Making { file_type, permissions: mode & 0o7777, device_number: 0, symlink_target: None };
        self.make(caller, parent, name, making).map(|(_, entry)| entry)
    }

    /// Makes a symbolic link.
    ///
    /// # Errors
    /// POSIX's.
    pub fn symlink(&self, caller: &Caller, parent: u64, name: &OsStr, target: &[u8]) -> Result<Entry> {
        let file_type = FileType::Symlink;
        let making = Making { file_type, permissions: 0o777, device_number: 0, symlink_target: Some(target) };
        self.make(caller, parent, name, making).map(|(_, entry)| entry)
    }

    /// Makes a regular file and opens it.
    ///
    /// # Errors
    /// POSIX's.
    pub fn create(&self, caller: &Caller, parent: u64, name: &OsStr, mode: u32, flags: i32) -> Result<(Entry, Opened)> {
        let file_type = FileType::Regular;
        let making = Making { file_type, permissions: mode & 0o7777, device_number: 0, symlink_target: None };
        let (inode, entry) = self.make(caller, parent, name, making)?;
        Ok((entry, Opened { handle: self.handles.open(inode, flags) }))
    }

    /// Makes another name of `node`.
    ///
    /// # Errors
    /// POSIX's.
    pub fn link(&self, _caller: &Caller, node: u64, parent: u64, name: &OsStr) -> Result<Entry> {
        self.check_writable()?;
        let inode = self.inode(node)?;
        let directory = self.inode(parent)?;
        let _admission = self.admit(|| self.space.reserve_metadata(ADMISSION_BYTES))?;
        let now = self.env.now();
        {
            let held = [&inode, &directory];
            let _locks = lock_exclusively(&held);
            let committed = self.transactions.run(CommitOptions::default(), |transaction| {
                self.namespace.link(transaction, inode.number, directory.number, name.as_bytes(), now)
            })?;
            let Committed { value: Made { changed, .. }, sequence } = committed;
            self.apply(&changed, &held, &Committed { value: (), sequence });
        }
        self.settle_names(&directory)?;
        self.table.add_lookups(inode.number, 1);
        Ok(self.entry(&inode))
    }

    /// The object of the inode that a name leads to; `None` if there is no such name.
    fn named(&self, directory: InodeNumber, name: &[u8]) -> Result<Option<Arc<VfsInode>>> {
        for _ in 0..super::RETRIES {
            let mut transaction = self.transactions.read();
            let Some(dirent) = self.namespace.lookup(&mut transaction, directory, name)? else { return Ok(None) };
            match self.object(dirent.inode, 0) {
                // Removed since the lookup: look again.
                Err(Error::Posix(Errno::STALE)) => {}
                other => return other.map(Some),
            }
        }
        Err(Error::corrupt(format!("directory {directory}"), "an entry names an inode that does not exist"))
    }

    fn remove(&self, parent: u64, name: &OsStr, is_directory: bool) -> Result<()> {
        self.check_writable()?;
        let directory = self.inode(parent)?;
        if directory.file_type != FileType::Directory {
            return Err(Errno::NOTDIR.into());
        }
        let name = name.as_bytes();
        loop {
            let now = self.env.now();
            // "." and ".." have no entry; the transaction knows their errors.
            let child = match name {
                b"." | b".." => Arc::clone(&directory),
                _ => self.named(directory.number, name)?.ok_or(Error::Posix(Errno::NOENT))?,
            };
            let committed = {
                let held = [&directory, &child];
                let _locks = lock_exclusively(&held);
                let committed = self.transactions.run(CommitOptions::reclaim(), |transaction| {
                    let changed = if is_directory {
                        self.namespace.rmdir(transaction, directory.number, name, now)?
                    } else {
                        self.namespace.unlink(transaction, directory.number, name, now)?
                    };
                    // The name leads to another inode than the one that is locked: commit nothing.
                    if changed.iter().all(|(number, _)| *number != child.number) {
                        return Err(LOST_RACE);
                    }
                    Ok(changed)
                });
                match committed {
                    Ok(Committed { value: changed, sequence }) => {
                        self.apply(&changed, &held, &Committed { value: (), sequence });
                        true
                    }
                    Err(error) if is_lost_race(&error) => false,
                    Err(error) => return Err(error),
                }
            };
            if committed {
                self.reap_if_unused(child.number);
                return self.settle_names(&directory);
            }
        }
    }

    /// Removes a name of a file. A file without a name lives until nobody has it open.
    ///
    /// # Errors
    /// POSIX's.
    pub fn unlink(&self, _caller: &Caller, parent: u64, name: &OsStr) -> Result<()> {
        self.remove(parent, name, false)
    }

    /// Removes an empty directory.
    ///
    /// # Errors
    /// POSIX's.
    pub fn rmdir(&self, _caller: &Caller, parent: u64, name: &OsStr) -> Result<()> {
        self.remove(parent, name, true)
    }

    /// Renames. Before a file takes the place of another one, its delayed data is committed: a crash shows the old content or the
    /// new, never an empty file. That happens with no lock held.
    ///
    /// # Errors
    /// POSIX's.
    pub fn rename(
        &self,
        _caller: &Caller,
        parent: u64,
        name: &OsStr,
        new_parent: u64,
        new_name: &OsStr,
        flags: u32,
    ) -> Result<()> {
        self.check_writable()?;
        if flags & !(RENAME_NOREPLACE | RENAME_EXCHANGE) != 0 {
            return Err(Errno::INVAL.into());
        }
        let (no_replace, exchange) = (flags & RENAME_NOREPLACE != 0, flags & RENAME_EXCHANGE != 0);
        let directory = self.inode(parent)?;
        let new_directory = self.inode(new_parent)?;
        let mut written_back: SmallVec<[InodeNumber; 2]> = SmallVec::new();
        loop {
            let now = self.env.now();
            let (name, new_name) = (name.as_bytes(), new_name.as_bytes());
            let is_dots = |name: &[u8]| name == b"." || name == b"..";
            if is_dots(name) || is_dots(new_name) {
                return Err(Errno::BUSY.into());
            }
            let source = self.named(directory.number, name)?.ok_or(Error::Posix(Errno::NOENT))?;
            let target = self.named(new_directory.number, new_name)?;
            if let (Some(target), false) = (&target, no_replace) {
                let moved = [Some(&source), exchange.then_some(target)];
                for inode in moved.into_iter().flatten() {
                    if inode.has_dirty_pages() && !written_back.contains(&inode.number) {
                        self.write_back(inode)?;
                        written_back.push(inode.number);
                    }
                }
            }
            let request = Rename {
                parent: directory.number,
                name,
                new_parent: new_directory.number,
                new_name,
                no_replace,
                exchange,
                now,
            };
            let mut held: SmallVec<[&Arc<VfsInode>; 4]> = SmallVec::from_slice(&[&directory, &new_directory, &source]);
            held.extend(target.as_ref());
            let expected_target = target.as_ref().map(|target| target.number);
            let outcome = {
                let _locks = lock_exclusively(&held);
                let committed = self.transactions.run(CommitOptions::default(), |transaction| {
                    let renamed = self.namespace.rename(transaction, &request)?;
                    if renamed.source != source.number || renamed.target != expected_target {
                        return Err(LOST_RACE);
                    }
                    Ok(renamed)
                });
                if let Ok(Committed { value: renamed, sequence }) = &committed {
                    self.apply(&renamed.changed, &held, &Committed { value: (), sequence: *sequence });
                }
                committed
            };
            match outcome {
                Ok(_) => {
                    if let Some(target) = expected_target {
                        self.reap_if_unused(target);
                    }
                    // One record holds all of it.
                    return self.settle_names(&directory);
                }
                Err(error) if is_lost_race(&error) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// What a transaction's body returns when a name leads to another inode than the one that is locked: nothing is committed.
const LOST_RACE: Error = Error::Posix(Errno::AGAIN);

fn is_lost_race(error: &Error) -> bool {
    matches!(error, Error::Posix(Errno::AGAIN))
}
