//! Open files and directories.

use std::cell::RefCell;
use std::sync::Weak;

use hashbrown::HashMap;
use rustix::io::Errno;

use super::inode::VfsInode;
use crate::error::{Error, Result};
use crate::pagecache::{ErrorCursor, Readahead};
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::{Arc, LockClass, Mutex, Rank, RwLock};

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
    /// What its next fallocate is to be.
    pub armed: Mutex<Option<super::fallocate::Armed>>,
    is_closed: AtomicBool,
}

impl Handle {
    /// Whether it was opened for writing: then a shared mapping of it may be written to, too.
    pub fn is_writable(&self) -> bool {
        is_writable(self.flags)
    }

    /// An error of delayed writes that this handle has not reported; it will report it again.
    ///
    /// # Errors
    /// That error.
    pub fn peek_late_errors(&self) -> Result<()> {
        match &self.inode.file {
            Some(file) => file.pages.errors().peek(&self.error_cursor.lock()),
            None => Ok(()),
        }
    }

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

/// Whether open(2)'s flags ask for writing.
fn is_writable(flags: i32) -> bool {
    flags & 0o3 != 0
}

/// All handles, by number. The lock is a leaf. Each thread remembers the handles that it used last, so that reading through one again
/// takes no lock.
#[derive(Debug, Default)]
pub(super) struct Handles {
    next: AtomicU64,
    open: RwLock<HashMap<u64, Arc<Handle>>>,
    /// Tells filesystems of one process apart.
    identity: Arc<()>,
}

/// A handle that a thread has used.
struct Remembered {
    owner: Arc<()>,
    number: u64,
    handle: Weak<Handle>,
}

/// Handles that a thread remembers.
const REMEMBERED_MAX: usize = 8;

thread_local! {
    static REMEMBERED: RefCell<Vec<Remembered>> = const { RefCell::new(Vec::new()) };
}

impl Handles {
    /// Opens. The inode's count of handles goes up.
    pub fn open(&self, inode: Arc<VfsInode>, flags: i32) -> u64 {
        inode.opened(is_writable(flags));
        let error_cursor = inode.file.as_ref().map_or_else(ErrorCursor::default, |file| file.pages.errors().cursor());
        let number = self.next.fetch_add(1, Ordering::Relaxed) + 1;
        let handle = Handle {
            inode,
            flags,
            error_cursor: Mutex::ranked(LockClass::new(Rank::OuterLeaf), error_cursor),
            readahead: Readahead::new(),
            armed: Mutex::new(None),
            is_closed: AtomicBool::new(false),
        };
        self.open.write().insert(number, Arc::new(handle));
        number
    }

    fn remembered(&self, number: u64) -> Option<Arc<Handle>> {
        let found = REMEMBERED.with_borrow(|remembered| {
            let found = remembered
                .iter()
                .find(|remembered| remembered.number == number && Arc::ptr_eq(&remembered.owner, &self.identity))?;
            found.handle.upgrade()
        });
        found.filter(|handle| !handle.is_closed.load(Ordering::Acquire))
    }

    fn remember(&self, number: u64, handle: &Arc<Handle>) {
        let owner = Arc::clone(&self.identity);
        let new = Remembered { owner, number, handle: Arc::downgrade(handle) };
        REMEMBERED.with_borrow_mut(|remembered| {
            remembered.retain(|remembered| remembered.handle.strong_count() > 0);
            if remembered.len() == REMEMBERED_MAX {
                remembered.remove(0);
            }
            remembered.push(new);
        });
    }

    /// The handle with this number.
    ///
    /// # Errors
    /// `EBADF`.
    pub fn get(&self, number: u64) -> Result<Arc<Handle>> {
        if let Some(handle) = self.remembered(number) {
            return Ok(handle);
        }
        let handle = self.open.read().get(&number).cloned().ok_or(Error::Posix(Errno::BADF))?;
        self.remember(number, &handle);
        Ok(handle)
    }

    /// Closes. The caller takes the inode's count down.
    pub fn close(&self, number: u64) -> Result<Arc<Handle>> {
        let handle = self.open.write().remove(&number).ok_or(Error::Posix(Errno::BADF))?;
        handle.is_closed.store(true, Ordering::Release);
        Ok(handle)
    }

    /// Closes all: the kernel is gone.
    pub fn close_all(&self) -> Vec<Arc<Handle>> {
        let handles: Vec<_> = self.open.write().drain().map(|(_, handle)| handle).collect();
        for handle in &handles {
            handle.is_closed.store(true, Ordering::Release);
        }
        handles
    }
}
