//! Open files and directories.

use hashbrown::HashMap;
use rustix::io::Errno;

use super::inode::VfsInode;
use crate::error::{Error, Result};
use crate::pagecache::{ErrorCursor, Readahead};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Arc, Mutex, RwLock};

/// One open file or directory.
#[derive(Debug)]
pub(super) struct Handle {
    pub inode: Arc<VfsInode>,
    /// open(2)'s flags.
    pub flags: i32,
    /// Which late errors of a file it has reported.
    error_cursor: Mutex<ErrorCursor>,
    /// Its reading habits.
    pub readahead: Readahead,
}

impl Handle {
    /// Reports an error of delayed writes that this handle has not reported, once.
    ///
    /// # Errors
    /// That error.
    pub fn check_late_errors(&self) -> Result<()> {
        match &self.inode.file {
            Some(file) => file.pages.errors().check(&mut self.error_cursor.lock()),
            None => Ok(()),
        }
    }
}

/// All handles, by number. The lock is a leaf.
#[derive(Debug, Default)]
pub(super) struct Handles {
    next: AtomicU64,
    open: RwLock<HashMap<u64, Arc<Handle>>>,
}

impl Handles {
    /// Opens. The inode's count of handles goes up.
    pub fn open(&self, inode: Arc<VfsInode>, flags: i32) -> u64 {
        inode.opened();
        let error_cursor = inode.file.as_ref().map_or_else(ErrorCursor::default, |file| file.pages.errors().cursor());
        let number = self.next.fetch_add(1, Ordering::Relaxed) + 1;
        self.open.write().insert(
            number,
            Arc::new(Handle { inode, flags, error_cursor: Mutex::new(error_cursor), readahead: Readahead::new() }),
        );
        number
    }

    /// The handle with this number.
    ///
    /// # Errors
    /// `EBADF`.
    pub fn get(&self, number: u64) -> Result<Arc<Handle>> {
        self.open.read().get(&number).cloned().ok_or(Error::Posix(Errno::BADF))
    }

    /// Closes. The caller takes the inode's count down.
    pub fn close(&self, number: u64) -> Result<Arc<Handle>> {
        self.open.write().remove(&number).ok_or(Error::Posix(Errno::BADF))
    }

    /// Closes all: the kernel is gone.
    pub fn close_all(&self) -> Vec<Arc<Handle>> {
        self.open.write().drain().map(|(_, handle)| handle).collect()
    }
}
