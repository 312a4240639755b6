//! The page cache: folios, the add lock, readahead, collection, writeback, reclaim. It knows a [`PageSource`], not extents.
//!
//! [`Cache`] is one for each filesystem, [`AddressSpace`] one for each inode. Looking a folio up and taking a reference to its bytes
//! needs no lock. Who holds what:
//!
//! | who | inode lock (the caller's) | page-cache lock | function |
//! | --- | --- | --- | --- |
//! | read hit | none | none: a byte reference | [`read_iter`] |
//! | fill (miss, readahead, rest of a partly written block) | none | **add** | `insert::fill`, `insert::refill` |
//! | buffered write | shared inside EOF, exclusive when extending | add where a folio is inserted or filled; a hit locks the folio | [`write()`] |
//! | truncate, punch, zero-range, collapse, insert, reflink target | exclusive | **block** | [`truncate`], [`invalidate_range`] |
//! | direct write | shared if block-aligned and inside EOF, else exclusive | **block**, only to drop the folios and commit | [`hold_range`] |
//! | direct read | none | none, by [`AddressSpace::sample_sequence`] | |
//! | writeback, lseek, extent map | none | none | [`collect_dirty`], [`AddressSpace::unwritten_ranges`] |
//!
//! **Lock order**: inode, add/block, folio (several in index order), `tracking` (short), map update (shortest). A waiter for add or
//! block holds no folio. Memory and dirty quota are waited for with nothing held.
//!
//! Reading order: [`add_lock`], `folio`, `space`, `map`, `insert`, `read`, `write`, `writeback`, [`throttle`], `invalidate`, `reclaim`.

pub mod add_lock;

#[cfg(not(loom))]
mod bitmap;
#[cfg(not(loom))]
mod cache;
#[cfg(not(loom))]
mod collect;
#[cfg(not(loom))]
mod errors;
#[cfg(not(loom))]
mod folio;
#[cfg(not(loom))]
mod insert;
#[cfg(not(loom))]
mod invalidate;
#[cfg(not(loom))]
mod map;
#[cfg(not(loom))]
mod ranges;
#[cfg(not(loom))]
mod read;
#[cfg(not(loom))]
pub mod readahead;
#[cfg(not(loom))]
mod reclaim;
#[cfg(not(loom))]
mod source;
#[cfg(not(loom))]
mod space;
#[cfg(not(loom))]
pub mod throttle;
#[cfg(not(loom))]
mod write;
#[cfg(not(loom))]
mod writeback;

#[cfg(not(loom))]
mod exports {
    pub use super::add_lock::{AddGuard, BlockGuard};
    pub use super::cache::{Cache, CacheOptions, Spawn, spawn_threads};
    pub use super::collect::{CopySink, PageBatch, ReadSink};
    pub use super::errors::{ErrorCursor, ErrorSequence};
    pub use super::invalidate::{Dropped, HeldRange, Punched, hold_range, invalidate_range, punch, truncate};
    pub use super::read::{ReadContext, ReadOutcome, read_iter};
    pub use super::readahead::Readahead;
    pub use super::source::{FillEntry, PageSource, ReadaheadBatch};
    pub use super::space::AddressSpace;
    pub use super::write::{WriteContext, WriteOutcome, write, zero_within_block};
    pub use super::writeback::{WritebackRun, collect_dirty, collect_dirty_with};
}
#[cfg(not(loom))]
pub use exports::*;

#[cfg(all(test, not(loom)))]
mod tests;
