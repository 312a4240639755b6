//! Assembly: a filesystem is opened, runs, and is closed. Recovery's order is in [`crate::recovery`].
//!
//! [`Filesystem::open`] returns when the filesystem is usable: replayed, the cut durable, workers running. [`Filesystem::close`] writes
//! everything back and takes a last checkpoint, so that the next mount replays nothing; a filesystem that is dropped without it has crashed, as
//! far as the next mount can tell, and has lost nothing that was fsynced.
//!
//! Nothing here is global: any number of filesystems live in one process.

pub mod format;
mod open;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

pub use format::FormatOptions;
pub use open::{InspectedLog, KnownInUse, OpenOptions, WorkerSet};

use crate::alloc::Usage;
use crate::btree::{CheckpointReason, Forest, Opening};
use crate::data::Data;
use crate::device::{BlockDevice, CheckedDevice};
use crate::env::Env;
use crate::error::{Error, Result};
use crate::format::superblock::Superblock;
use crate::journal::{Journal, Totals};
use crate::metrics::Metrics;
use crate::namespace::Namespace;
use crate::pagecache::Cache;
use crate::recovery::{Replayed, superblock};
use crate::scrub::{Scrub, ScrubHandle};
use crate::space::Space;
use crate::sync::Mutex;
use crate::transaction::Transactions;
use crate::vfs::Vfs;
use crate::workers::WorkerThreads;

/// A filesystem that is open.
pub struct Filesystem {
    superblock: Arc<Superblock>,
    checked: Vec<Arc<CheckedDevice>>,
    devices: Vec<Arc<dyn BlockDevice>>,
    env: Arc<Env>,
    metrics: Arc<Metrics>,
    forest: Arc<Forest>,
    journal: Arc<Journal>,
    transactions: Arc<Transactions>,
    space: Arc<Space>,
    data: Arc<Data>,
    cache: Arc<Cache>,
    vfs: Arc<Vfs>,
    opening: Opening,
    replayed: Replayed,
    read_only: bool,
    workers: Mutex<Option<WorkerThreads>>,
    scrub: Arc<Scrub>,
}

impl std::fmt::Debug for Filesystem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Filesystem").field("uuid", &self.superblock.filesystem).finish_non_exhaustive()
    }
}

impl Filesystem {
    /// The POSIX operations.
    #[must_use]
    pub fn vfs(&self) -> &Arc<Vfs> {
        &self.vfs
    }

    /// The superblock.
    #[must_use]
    pub fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    /// The devices, latched on the first failure, by index.
    #[must_use]
    pub fn devices(&self) -> &[Arc<dyn BlockDevice>] {
        &self.devices
    }

    /// The trees.
    #[must_use]
    pub fn forest(&self) -> &Arc<Forest> {
        &self.forest
    }

    /// The journal.
    #[must_use]
    pub fn journal(&self) -> &Arc<Journal> {
        &self.journal
    }

    /// Transactions.
    #[must_use]
    pub fn transactions(&self) -> &Arc<Transactions> {
        &self.transactions
    }

    /// Space.
    #[must_use]
    pub fn space(&self) -> &Arc<Space> {
        &self.space
    }

    /// File data.
    #[must_use]
    pub fn data(&self) -> &Arc<Data> {
        &self.data
    }

    /// The page cache.
    #[must_use]
    pub fn cache(&self) -> &Arc<Cache> {
        &self.cache
    }

    /// Names.
    #[must_use]
    pub fn namespace(&self) -> &Namespace {
        self.vfs.namespace()
    }

    /// Time, randomness, waiting.
    #[must_use]
    pub fn env(&self) -> &Arc<Env> {
        &self.env
    }

    /// Counters.
    #[must_use]
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// Global accounting, as of the newest transaction.
    #[must_use]
    pub fn totals(&self) -> Totals {
        self.journal.totals()
    }

    /// Scrubs: what a tool asks of the filesystem in its own process. What a mount is asked comes to the same.
    #[must_use]
    pub fn scrub(&self) -> ScrubHandle {
        ScrubHandle(Arc::clone(&self.scrub))
    }

    /// Where space is.
    #[must_use]
    pub fn usage(&self) -> Usage {
        self.space.usage()
    }

    /// The checkpoint that it was opened from.
    #[must_use]
    pub fn opening(&self) -> &Opening {
        &self.opening
    }

    /// What recovery replayed.
    #[must_use]
    pub fn replayed(&self) -> Replayed {
        self.replayed
    }

    /// Why the filesystem latched read-only, if it did.
    #[must_use]
    pub fn latched(&self) -> Option<String> {
        self.checked.iter().find_map(|device| device.latched_reason()).or_else(|| self.journal.latched())
    }

    /// Takes a checkpoint now, with everything durable behind it. Writes back no file data.
    ///
    /// # Errors
    /// The device's.
    pub fn checkpoint(&self) -> Result<()> {
        self.take_checkpoint(CheckpointReason::Requested)
    }

    /// Makes everything durable: dirty file data, and every transaction so far.
    ///
    /// # Errors
    /// The first error; everything else is still tried.
    pub fn sync(&self) -> Result<()> {
        self.vfs.sync()
    }

    /// Writes everything back, stops the workers and takes a last checkpoint. The filesystem is of no use afterwards.
    ///
    /// # Errors
    /// The first error; everything else is still tried. After an error the next mount recovers.
    pub fn close(&self) -> Result<()> {
        self.scrub.stop();
        let closed = self.vfs.close();
        if let Some(workers) = self.workers.lock().take() {
            workers.stop();
        }
        self.env.unregister_all();
        let finished = if self.read_only || self.latched().is_some() {
            Ok(())
        } else {
            self.give_nodes_back()
                .and_then(|()| self.journal.close())
                .and_then(|()| self.take_checkpoint(CheckpointReason::Close))
                .inspect(|()| self.scrub.settle())
        };
        closed.and(finished)
    }

    /// Merges what deletions left of nodes: what is known of them is in memory alone, so after the next mount they would stay as they are.
    fn give_nodes_back(&self) -> Result<()> {
        for _ in 0..CLOSE_CHECKPOINTS_MAX {
            if !self.forest().could_free_nodes() {
                break;
            }
            match self.take_checkpoint(CheckpointReason::Requested) {
                Ok(()) => {}
                Err(Error::NoSpace(_)) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Reads the superblock of an image or disk, and nothing else.
    ///
    /// # Errors
    /// Those of opening and of the superblock.
    pub fn read_superblock(path: &Path) -> Result<superblock::Found> {
        superblock::read(&open::open_device(path, true)?)
    }
}

/// Checkpoints that closing makes, at most, to give node space back.
const CLOSE_CHECKPOINTS_MAX: u32 = 8;
/// How often a worker that has nothing to do looks whether it has.
const CHECKPOINT_IDLE: Duration = Duration::from_secs(30);

#[cfg(all(test, not(loom)))]
mod tests;
#[cfg(all(test, not(loom)))]
mod tests_fill;
#[cfg(all(test, not(loom)))]
mod tests_measure;
#[cfg(all(test, not(loom)))]
mod tests_memory;
#[cfg(all(test, not(loom)))]
mod tests_pressure;
