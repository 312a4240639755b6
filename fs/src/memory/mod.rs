//! Memory that other threads and the host look at: the bytes of folios with their reference word, and buffers aligned for
//! O_DIRECT. With `device` and `fuse` this is the only place for `unsafe`; what it offers is safe.
//!
//! - [`word::ReferenceWord`]: one atomic word, {writer bit, count of byte references}; loom checks it.
//! - [`FolioBytes`], [`ByteReference`], [`FolioWriter`]: folio memory under that word.
//! - [`Budget`], [`MemoryReservation`]: what that memory is counted against.
//! - [`Pipe`]: a pipe that is fed with references to folio memory.
//!
//! It takes no locks. Memory is counted from its reservation until the last reference to it is gone.

pub mod word;

#[cfg(not(loom))]
mod buffer;
#[cfg(not(loom))]
mod budget;
#[cfg(not(loom))]
mod folio_bytes;
#[cfg(not(loom))]
mod pipe;

#[cfg(not(loom))]
pub use budget::{Budget, MemoryReservation, WaiterMark};
#[cfg(not(loom))]
pub use buffer::{ALIGNMENT_BYTES, AlignedBuffer};
#[cfg(not(loom))]
pub use folio_bytes::{ByteReference, FOLIO_ALIGNMENT, FOLIO_BYTES_MAX, FolioBytes, FolioWriter};
#[cfg(not(loom))]
pub use pipe::{Pipe, PipePiece};
