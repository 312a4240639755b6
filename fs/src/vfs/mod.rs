//! POSIX operations over the namespace, the page cache and the data layer. A transport (FUSE, a library caller) sees only this.
//!
//! What it guarantees:
//! 1. Each change of the namespace or of attributes is one transaction, committed when the call returns: after a crash those that
//!    were not synced are a prefix, in order.
//! 2. Data is delayed: a write changes the page cache and the attributes in memory, having reserved its space first; writeback commits it.
//!    `fsync` writes the file's delayed bytes back, and then makes the journal durable up to the newest record that changed the file,
//!    which is at or after the one that made its name.
//! 3. An inode without a name lives while it is open or looked up; then a worker deletes it in bounded steps. Its orphan key lets
//!    the next mount finish that.
//! 4. Memory: objects of inodes are bounded in number; the page cache has its own budget.
//!
//! **Lock order**: inode locks (in the order of inode numbers) -> add/block -> folios -> tree nodes -> journal. The table's shards, the
//! handles, an inode's `inode::State` are leaves. Workers (writeback, deletion) never take an inode lock, so whoever holds one may
//! wait for them. No lock is held when a method returns.

mod attributes;
mod caller;
mod copy;
mod damage;
mod deletion;
mod direct;
mod fallocate;
mod file;
mod handle;
mod inode;
mod inode_table;
mod ioctl;
mod landing;
mod lookup;
mod names;
mod ranges;
mod scrub;
mod size;
mod source;
mod splice;
mod sync;
mod types;
mod writeback;
mod xattr;

use std::time::Duration;

pub use deletion::DeletionWorker;
pub use fallocate::{ARM_COLLAPSE, ARM_INSERT};
pub use ioctl::{IOCTL_ARM, IOCTL_STATISTICS, IOCTL_SYNC};
pub use scrub::{
    IOCTL_SCRUB, SCRUB_PAGE_BYTES, ScrubAsk, ScrubControl, ScrubPage, ScrubReport, ScrubRequest, ScrubState,
    ScrubStatus,
};
pub use types::*;
pub use writeback::WritebackWorker;

use crate::data::Data;
use crate::env::{Env, Worker};
use crate::error::{Error, Result};
use crate::format::journal::AccountingCounter;
use crate::format::superblock::Superblock;
use crate::journal::Journal;
use crate::metrics::Metrics;
use crate::namespace::{InodeAllocator, Namespace};
use crate::pagecache::Cache;
use crate::snapshot::Snapshots;
use crate::space::Space;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Arc, LockClass, RwLock};
use crate::transaction::Transactions;
use crate::units::SnapshotId;

/// How often a lookup that raced with a removal is tried again before the entry is taken for damaged.
const RETRIES: u32 = 16;

/// When reading changes a file's access time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AccessTime {
    /// Never (`noatime`).
    Never,
    /// When it is not newer than the last change, or older than a day (`relatime`).
    #[default]
    Relative,
    /// Always (`strictatime`).
    Always,
}

/// Options of a mount that this layer knows.
#[derive(Clone, Copy, Debug)]
pub struct VfsOptions {
    /// Nothing may be changed, and no worker changes anything.
    pub read_only: bool,
    /// Access times.
    pub access_time: AccessTime,
    /// Everything is durable when it returns. So it is with a commit interval of 0.
    pub synchronous: bool,
    /// Changes of names are durable when they return.
    pub directory_synchronous: bool,
    /// Dirty data is written back when it is this old.
    pub writeback_age: Duration,
    /// The kernel delays writes to files (`cache=writeback`): their sizes and their times of modification are its own while it has them in
    /// memory.
    pub kernel_delays_writes: bool,
    /// Most inodes that are kept in memory beyond those that are open, dirty or unlinked.
    pub inodes_max: usize,
}

impl Default for VfsOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            access_time: AccessTime::default(),
            synchronous: false,
            directory_synchronous: false,
            writeback_age: Duration::from_secs(5),
            kernel_delays_writes: false,
            inodes_max: 32 << 10,
        }
    }
}

/// What a [`Vfs`] stands on.
pub struct VfsConfig {
    /// Transactions over the trees, after recovery.
    pub transactions: Arc<Transactions>,
    /// The journal below them.
    pub journal: Arc<Journal>,
    /// Space.
    pub space: Arc<Space>,
    /// File data.
    pub data: Arc<Data>,
    /// Snapshots.
    pub snapshots: Arc<Snapshots>,
    /// The superblock.
    pub superblock: Arc<Superblock>,
    /// The page cache.
    pub cache: Arc<Cache>,
    /// Time and waiting.
    pub env: Arc<Env>,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// Options.
    pub options: VfsOptions,
}

/// The filesystem as POSIX sees it. See the module's documentation.
pub struct Vfs {
    transactions: Arc<Transactions>,
    journal: Arc<Journal>,
    space: Arc<Space>,
    data: Arc<Data>,
    superblock: Arc<Superblock>,
    cache: Arc<Cache>,
    env: Arc<Env>,
    metrics: Arc<Metrics>,
    options: VfsOptions,
    namespace: Namespace,
    allocator: InodeAllocator,
    table: inode_table::InodeTable,
    handles: handle::Handles,
    told: damage::Told,
    delayed_times: writeback::DelayedTimes,
    deletions: deletion::Deletions,
    landing: landing::Landing,
    /// Held shared from before dirty blocks are taken out of the cache until the commit that replaces them; a sync takes it. Its place is behind all inodes' locks.
    replacing: RwLock<()>,
    is_shut_down: AtomicBool,
    scrub: std::sync::OnceLock<Arc<dyn ScrubControl>>,
}

impl std::fmt::Debug for Vfs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vfs").field("options", &self.options).field("table", &self.table).finish_non_exhaustive()
    }
}

impl Vfs {
    /// Over an open filesystem. Its workers ([`Self::workers`]) are the caller's to run.
    ///
    /// # Errors
    /// Those of reading the trees.
    pub fn new(config: VfsConfig) -> Result<Arc<Self>> {
        let namespace = Namespace::new(&config.superblock, config.snapshots, SnapshotId::ROOT);
        let allocator = InodeAllocator::open(&mut config.transactions.read())?;
        let vfs = Arc::new(Self {
            transactions: config.transactions,
            journal: config.journal,
            space: config.space,
            data: config.data,
            superblock: config.superblock,
            cache: config.cache,
            env: config.env,
            metrics: config.metrics,
            options: config.options,
            namespace,
            allocator,
            table: inode_table::InodeTable::new(config.options.inodes_max),
            handles: handle::Handles::default(),
            told: damage::Told::default(),
            delayed_times: writeback::DelayedTimes::default(),
            deletions: deletion::Deletions::default(),
            landing: landing::Landing::default(),
            replacing: RwLock::ranked(LockClass::inode(u64::MAX), ()),
            is_shut_down: AtomicBool::new(false),
            scrub: std::sync::OnceLock::new(),
        });
        // A direct read that met extents under way looks again.
        let moved_of = Arc::downgrade(&vfs);
        vfs.data.set_moved_hook(Box::new(move |inode| {
            let moved = moved_of.upgrade().and_then(|vfs| vfs.table.get(inode));
            if let Some(file) = moved.as_ref().and_then(|inode| inode.file.as_ref()) {
                file.pages.bump_sequence();
            }
        }));
        Ok(vfs)
    }

    /// The background jobs: writeback, and the deletion of unlinked files. A filesystem that is only read has none.
    #[must_use]
    pub fn workers(self: &Arc<Self>) -> Vec<Arc<dyn Worker>> {
        if self.options.read_only {
            return Vec::new();
        }
        vec![Arc::new(WritebackWorker::new(Arc::clone(self))), Arc::new(DeletionWorker::new(Arc::clone(self)))]
    }

    /// The counters of this filesystem.
    #[must_use]
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// The namespace, for those who look at keys (path names in messages).
    #[must_use]
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Refuses all changes from now on: something has gone wrong that must not get worse. The first reason stays.
    pub fn latch(&self, reason: impl Into<String>) {
        let reason = reason.into();
        tracing::error!("{reason}: the filesystem is read-only from now on");
        self.journal.latch(reason.clone());
        self.cache.latch(Error::Latched { reason });
        self.deletions.wake();
    }

    /// A request panicked: what it left half done in memory must not reach the disk.
    pub fn request_panicked(&self, operation: &'static str, message: &str) {
        self.metrics.vfs_panics.increment();
        self.latch(format!("a bug stopped {operation}: {message}"));
    }

    /// Fails after a shutdown ioctl.
    fn check_alive(&self) -> Result<()> {
        if self.is_shut_down.load(Ordering::Acquire) { Err(Error::Shutdown) } else { Ok(()) }
    }

    /// Fails where nothing may be changed.
    fn check_writable(&self) -> Result<()> {
        self.check_alive()?;
        if self.options.read_only {
            return Err(Error::ReadOnly);
        }
        match self.journal.latched() {
            Some(reason) => {
                // The journal may have latched by itself: writers must not wait for a writeback that will not come.
                self.cache.latch(Error::Latched { reason: reason.clone() });
                Err(Error::Latched { reason })
            }
            None => Ok(()),
        }
    }

    /// Whether every operation is to be durable when it returns.
    fn is_synchronous(&self) -> bool {
        self.options.synchronous || self.journal.commits_at_once()
    }

    /// Ends a change of attributes: durable, where the mount says so. No lock is held.
    fn settle(&self, inode: &inode::VfsInode) -> Result<()> {
        if self.is_synchronous() { self.journal.flush(inode.sequence()) } else { Ok(()) }
    }

    /// Ends a change of names in a directory: durable, where the mount says so. No lock is held.
    fn settle_names(&self, directory: &inode::VfsInode) -> Result<()> {
        if self.options.directory_synchronous || self.is_synchronous() {
            self.journal.flush(directory.sequence())
        } else {
            Ok(())
        }
    }

    /// Filesystem statistics.
    ///
    /// # Errors
    /// After a shutdown.
    pub fn statistics(&self) -> Result<Statistics> {
        self.check_alive()?;
        self.fill_landing_reserve();
        let usage = self.space.usage();
        let block_bytes = self.superblock.geometry.block_bytes;
        let blocks = |bytes: u64| bytes / u64::from(block_bytes);
        // Inodes need no table: one fits wherever two blocks are free, at the most.
        let inode_count = u64::try_from(self.journal.totals().get(AccountingCounter::Inodes)).unwrap_or(0);
        let files_free = blocks(usage.available_bytes) / 2;
        Ok(Statistics {
            block_bytes,
            blocks: blocks(usage.total_bytes),
            blocks_free: blocks(usage.free_bytes),
            blocks_available: blocks(usage.available_bytes),
            files: files_free + inode_count,
            files_free,
            name_bytes_max: 255,
        })
    }

    /// Writes everything back and gives up what the kernel held, at the end of a mount: no request comes any more. What is left unlinked is
    /// deleted by the worker, if it is run until idle, or by the next mount.
    ///
    /// # Errors
    /// The first error of writing back; everything else is still tried.
    pub fn close(&self) -> Result<()> {
        self.drop_landing_reserve();
        for handle in self.handles.close_all() {
            handle.inode.closed(handle.is_writable());
        }
        for inode in self.table.forget_all() {
            self.reap_if_unused(inode.number);
        }
        self.cache.quiesce()?;
        if self.options.read_only || self.check_writable().is_err() { Ok(()) } else { self.write_back_all() }
    }
}

#[cfg(test)]
mod tests;
