//! coppice: a copy-on-write filesystem in userspace, as a library.
//!
//! The modules below stand in layer order: each may use only those above it (`tests/tests/layers.rs` enforces it). Read
//! `DESIGN.md` for the life of a write and of a read, `FORMAT.md` for the bytes; then [`transaction`] and [`btree`] for how
//! changes become durable, and [`pagecache`] for how file data is cached.

pub mod units;
pub mod error;
pub mod sync;
pub mod env;
pub mod options;
pub mod metrics;

pub mod memory;
pub mod format;
pub mod device;
pub mod alloc;
pub mod journal;
pub mod btree;
pub mod transaction;
pub mod space;
pub mod snapshot;
pub mod data;
pub mod namespace;
pub mod pagecache;
pub mod vfs;
pub mod recovery;
pub mod workers;
pub mod filesystem;
#[cfg(feature = "fuse")]
pub mod fuse;

pub use error::{Corruption, Error, Result};
