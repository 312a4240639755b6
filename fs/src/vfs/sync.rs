//! fsync and its relatives.
//!
//! All changes of a file, and of the directories above it, go through one journal in one order. So a file is durable when its delayed data
//! is committed and the journal is durable up to the newest record that changed it.

use super::Vfs;
use super::inode::VfsInode;
use super::types::Caller;
use crate::error::Result;
use crate::sync::Arc;

impl Vfs {
    /// Commits the inode's delayed data and times, and makes all its changes durable.
    pub(super) fn make_durable(&self, inode: &Arc<VfsInode>, data_only: bool) -> Result<()> {
        if !self.options.read_only {
            self.check_writable()?;
            let outcome = self
                .write_back(inode)
                .and_then(|()| self.wait_for_replacements(inode))
                .and_then(|is_again| if is_again { self.write_back(inode) } else { Ok(()) });
            if !data_only {
                self.store_delayed_times(inode)?;
            }
            outcome?;
        }
        self.journal.flush(inode.sequence())
    }

    /// Waits for those who had taken dirty blocks out of the cache, to replace them by a commit, when we looked for dirty blocks: a punch or a
    /// truncation holds the inode's lock exclusively until it has committed, a direct write keeps them as if they were being written. Returns whether one of
    /// these was waited for: if it failed, they are dirty again.
    fn wait_for_replacements(&self, inode: &VfsInode) -> Result<bool> {
        let Some(file) = &inode.file else { return Ok(false) };
        let is_held = file.pages.is_being_written(&(0..u64::MAX));
        file.pages.wait_for_writeback(&(0..u64::MAX))?;
        drop(inode.lock.read());
        Ok(is_held)
    }

    /// Makes a file durable; its access time only if not `data_only`.
    ///
    /// # Errors
    /// Of this and of delayed writes.
    pub fn fsync(&self, _caller: &Caller, node: u64, handle: u64, data_only: bool) -> Result<()> {
        self.check_alive()?;
        match self.handles.get(handle) {
            Ok(handle) if handle.inode.number.0 == node => {
                let outcome = self.make_durable(&handle.inode, data_only);
                // Also what failed before: each handle hears of it once.
                let late = handle.check_late_errors();
                outcome.and(late)
            }
            _ => self.make_durable(&self.inode(node)?, data_only),
        }
    }

    /// Makes a directory's entries durable.
    ///
    /// # Errors
    /// Those of the media.
    pub fn fsyncdir(&self, _caller: &Caller, node: u64, _handle: u64, data_only: bool) -> Result<()> {
        let inode = self.inode(node)?;
        self.make_durable(&inode, data_only)
    }

    /// Commits all delayed data and times.
    ///
    /// # Errors
    /// The first error; everything else is still tried.
    pub fn write_back_all(&self) -> Result<()> {
        let mut outcome = Ok(());
        let mut seen = std::collections::BTreeSet::new();
        loop {
            let spaces = self.cache.dirty_spaces(usize::MAX, None);
            let inodes: Vec<_> = spaces
                .iter()
                .filter_map(|space| self.table.get(crate::units::InodeNumber(space.identity())))
                .filter(|inode| seen.insert(inode.number))
                .collect();
            if inodes.is_empty() {
                break;
            }
            for inode in inodes {
                outcome = outcome.and(self.write_back(&inode));
            }
        }
        outcome.and(self.store_all_delayed_times())
    }

    /// Makes everything durable.
    ///
    /// # Errors
    /// The first error; everything else is durable all the same. Errors of delayed writes are also kept for the files' own handles.
    pub fn sync(&self) -> Result<()> {
        self.check_alive()?;
        let mut outcome = Ok(());
        if !self.options.read_only {
            self.check_writable()?;
            outcome = self.write_back_all();
            // As for one file: those who took dirty blocks out of the cache have committed.
            let is_replacing = self.replacing.try_write().is_none();
            drop(self.replacing.write());
            if is_replacing {
                // One that failed has left them dirty.
                outcome = outcome.and(self.write_back_all());
            }
        }
        outcome.and(self.journal.flush(self.journal.newest()))
    }
}
