//! Space in memory: which buckets are open, which may be opened next, which wait to become reusable, and how many bytes may
//! still be promised. Keys are reached only through [`BucketStore`], which `space` implements.
//!
//! ```text
//!                         take() opens                  first count committed
//!   Free (free-space key) ------------> open, uncounted ---------------------> open, Data --- full, allocations dropped --> Data
//!     ^        ^                              | closed with nothing counted         |  ^                                     |
//!     |        +------------------------------+                       count 0, gen+1|  |counted again                        | count 0,
//!     |                                                                             v  |(still open)                         | gen+1
//!     |  [`Allocator::eligible`]: reusable() >= freeing sequence,             open, NeedDiscard                              v
//!     +-- not open, no reader's reference; journalled Free <------------------------+---- closed ------------------> NeedDiscard
//! ```
//!
//! Invariants:
//! 1. Within one open life of a bucket offsets only go up, and a life starts only from `Free`. So bytes are handed out once
//!    between two freeings, whatever happens to the counts meanwhile.
//! 2. A bucket becomes `Free` only from `NeedDiscard`, when a flushed record says that the transaction that emptied it is durable, when
//!    it is not open, and when no reader refers to it. So a crash never finds live data overwritten.
//! 3. Every bucket that is queued, open, claimed or being freed stands in `taken`, and the search for free buckets skips those and the
//!    ones that left `taken` while it searched. So a bucket is never handed out twice, though the search holds no lock.
//! 4. Bytes: `capacity - metadata - data - unwritten - reserved` is what may still be promised ([`capacity`]). Buckets: normal
//!    writers leave copygc's and the metadata's reserve alone, copygc leaves the metadata's alone ([`Watermark`]).
//!
//! Locks: one short mutex in [`Allocator`], sharded ones in [`references`], one in [`fragmentation`]; each is innermost, none is
//! held over I/O or over another.

mod allocator;
pub mod capacity;
pub mod fragmentation;
pub mod references;
pub mod reservation;

pub use allocator::{Allocation, Allocator, Emptied, Take};
pub use capacity::{Counters, Reserves, Usage};
pub use references::BucketReferences;
pub use reservation::SpaceReservation;

use crate::error::Result;
use crate::units::{BucketIndex, DeviceIndex};

/// A bucket of a device.
pub type BucketKey = (DeviceIndex, BucketIndex);

/// Streams that are kept in buckets of their own, so that what is written together is freed together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WritePoint {
    /// File data; the number is a hash of the writer (its inode), and picks one of a few open buckets.
    User(u64),
    /// What copygc moves: old data, apart from new.
    CopyGc,
}

/// How deep into the free buckets an allocation may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Watermark {
    /// File data: leaves copygc's and the metadata's reserve alone.
    Normal,
    /// Copygc: leaves the metadata's reserve alone.
    CopyGc,
    /// B-tree nodes: the last bucket.
    Metadata,
}

/// A bucket that may be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FreeCandidate {
    /// Which.
    pub key: BucketKey,
    /// Its generation.
    pub generation: u32,
    /// Whether it holds no storage of the host.
    pub discarded: bool,
}

/// Free buckets found by one look.
#[derive(Clone, Debug, Default)]
pub struct FreeBatch {
    /// What was found, ascending.
    pub candidates: Vec<FreeCandidate>,
    /// Where the next look goes on; `None` when the end of the device was reached.
    pub next: Option<BucketIndex>,
}

/// How the allocator reaches the trees.
pub trait BucketStore {
    /// Free buckets of the device from `from` on, at most `limit`.
    ///
    /// # Errors
    /// The device's, or damage.
    fn free_buckets(&self, device: DeviceIndex, from: BucketIndex, limit: usize) -> Result<FreeBatch>;

    /// Makes never-used buckets of the device free, in a small transaction. Returns how many; 0 when there is none left.
    ///
    /// # Errors
    /// The transaction's.
    fn extend(&self, device: DeviceIndex) -> Result<u64>;
}

/// Deliberate faults, so that the crash tests can show that they would catch them. All off by default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TestSwitches {
    /// Frees emptied buckets at once, durable or not, and reuses them first.
    pub reuse_too_early: bool,
    /// The journal names data that no flush has made durable.
    pub skip_data_flush: bool,
    /// One journal record in eight is never written, though it is acknowledged.
    pub drop_journal_record: bool,
    /// A checkpoint's record is written before what it names is durable.
    pub publish_checkpoint_early: bool,
    /// Journal records say that nothing is known to be durable: their D is 0.
    pub skip_known_flushed: bool,
    /// Recovery takes whatever record has the next sequence for the next one, of whichever chain and epoch.
    pub break_chain: bool,
    /// Recovery reads the log before it has flushed the device.
    pub skip_recovery_flush: bool,
    /// Emptied buckets are freed as soon as their emptying is flushed, with no durable record that says so.
    pub reuse_after_one_flush: bool,
    /// A checkpoint serialises a parent before its children, where their new images lie in the same places: it names the images before.
    pub parents_first: bool,
    /// Replay derives again what follows from each key, though the log has it.
    pub triggers_in_replay: bool,
    /// No fault: freed buckets are used next, not when the others are. Makes reuse happen in small workloads.
    pub reuse_first: bool,
    /// No fault: a checkpoint does not make sure of slots before it begins, so that between any two nodes there may be none.
    pub no_slots_beforehand: bool,
    /// Reads hold no references on the buckets that they read.
    pub no_bucket_references: bool,
    /// The page cache's add lock excludes nobody.
    pub add_lock_excludes_nobody: bool,
    /// Microseconds to pause, at most, where a race would have to come between: a read after its look-up, a hole between the cache and the tree.
    pub pause_us: u16,
    /// Promises of space with these numbers (first and last, from 0 at the mount) are refused, though there is space.
    pub refuse_promises: Option<(u32, u32)>,
    /// Allocations of space for data, and of buckets for nodes, with these numbers (first and last, from 0 at the mount) find none, though there is.
    pub refuse_allocations: Option<(u32, u32)>,
}

#[cfg(test)]
mod tests;
