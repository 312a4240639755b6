//! The FUSE adapter and the session around it: the layer above everything else, with no logic of the filesystem's.
//!
//! - [`Operations`] is the transport-neutral interface: what a transport asks of the filesystem.
//! - `adapter` puts fuser's trait on top of it: decode, call, reply; a panic fails one request and latches read-only.
//! - `init` says what is agreed with the kernel, `attributes` converts.
//! - [`mounts`] reads and makes mounts: mount(2) as root, fusermount3 as a user.
//! - [`Session`] is one mount that is being served.
//! - [`MemoryFilesystem`] is a small filesystem in memory, with which the adapter is tested and the kernel is probed.
//!
//! Locks: none of its own while the filesystem is called, but the counter map of invariant 3 in `adapter` (leaf).

mod adapter;
mod attributes;
pub mod client;
mod crew;
mod init;
mod launder;
mod memory_filesystem;
pub mod mounts;
mod operations;
mod session;
mod vfs;
#[cfg(test)]
mod tests;

pub use init::{Negotiated, REQUEST_BYTES_MAX};
pub use memory_filesystem::{MemoryFilesystem, Seen};
pub use operations::{Operations, PageBatch};
pub use session::{Session, SessionSettings};

/// The type of our mounts: `fuse.coppice` in `/proc/mounts`.
pub const FILE_SYSTEM_TYPE: &str = "fuse.coppice";
