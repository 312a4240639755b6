//! What the end-to-end and crash tests of coppice share. Nothing here but
//! [`filesystem_subject`] knows how the filesystem works: that is the point.
//!
//! - [`limit`]: a test that hangs ends, and says where.
//! - [`operation`]: one POSIX operation as data, and the bytes that writes put into files.
//! - [`tree`]: what a filesystem holds, as a walk finds it.
//! - [`model`]: a plain in-memory filesystem that knows what was synced, and what a crash may leave (the oracle).
//! - [`regions`]: where the structures of an image lie, by name.
//! - [`shown`]: what a damaged filesystem shows, against what it should.
//! - [`simulated`]: an image on a simulated device.
//! - [`faulty`]: a device that misbehaves by a plan, also under a real mount.
//! - [`crash`]: runs a workload on a simulated device, cuts the power everywhere, and asks the oracle.
//! - [`filesystem_subject`]: coppice itself, in this process, for [`crash`].
//! - [`damage`]: chosen parts of an image file, destroyed.
//! - [`mount`]: an image in a temporary folder, formatted, mounted and checked by the real programs.
//! - [`fsx`]: random operations on one file against an array of bytes, in this process.
//! - [`race`]: readers against everything that frees and reuses what they read, on real threads, in this process and on a mount.
//! - [`fuzz`]: fuzz targets and their corpus.
//! - [`workloads`]: the small workloads that are crashed everywhere, and random ones by seed.

pub mod limit;
pub mod operation;
pub mod tree;
pub mod faulty;
pub mod regions;
pub mod shown;
pub mod simulated;
pub mod model;
pub mod crash;
pub mod mount;
pub mod damage;
pub mod workloads;
pub mod fuzz;
pub mod race;
pub mod fsx;
pub mod filesystem_subject;
