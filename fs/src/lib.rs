//! coppice: a copy-on-write filesystem in userspace, as a library.
//!
//! The modules below stand in layer order: each may use only those above it (`tests/tests/layers.rs` enforces it). Read
//! `DESIGN.md` for the life of a write and of a read, `FORMAT.md` for the bytes; then [`transaction`] and [`btree`] for how
//! changes become durable, and [`pagecache`] for how file data is cached.

pub mod units;
pub mod error;
pub mod output;
pub mod sync;
pub mod env;
#[cfg(not(loom))]
pub mod options;
pub mod metrics;

pub mod memory;
// Under `--cfg loom` only what is model-checked is built: the word of `memory`, the add lock of `pagecache`.
#[cfg(not(loom))]
pub mod format;
#[cfg(not(loom))]
pub mod device;
#[cfg(not(loom))]
pub mod alloc;
#[cfg(not(loom))]
pub mod journal;
#[cfg(not(loom))]
pub mod btree;
#[cfg(not(loom))]
pub mod transaction;
#[cfg(not(loom))]
pub mod space;
#[cfg(not(loom))]
pub mod snapshot;
#[cfg(not(loom))]
pub mod data;
#[cfg(not(loom))]
pub mod namespace;
pub mod pagecache;
#[cfg(not(loom))]
pub mod vfs;
#[cfg(not(loom))]
pub mod recovery;
#[cfg(not(loom))]
pub mod scrub;
#[cfg(not(loom))]
pub mod workers;
#[cfg(not(loom))]
pub mod filesystem;
#[cfg(all(feature = "fuse", not(loom)))]
pub mod fuse;

pub use error::{Corruption, Error, Result};
