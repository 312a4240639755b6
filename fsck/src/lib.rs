//! `fsck-coppice`: finds every inconsistency that two structures can have with one another, and repairs what it safely can.
//!
//! Nothing that is checked is trusted: counts are recomputed from the leaves of the trees, free space from the extents and nodes
//! that exist, link counts from the names. [`passes`] says what is checked, in which order; [`problem`] is the one table of
//! what can be wrong; [`repair`] is kept apart from finding; [`session`] has them take turns until nothing is left. `-n` does the same on a device that
//! keeps its writes in memory, so it gives the same list as `-y`.
//!
//! A check reads the trees of a filesystem that was opened with its journal replayed in memory; a repair is a transaction, so a cut
//! at any moment leaves something that can be checked and repaired again.

#![forbid(unsafe_code)]

// `say!` and `complain!`, which end no program.
#[macro_use]
extern crate coppicefs;

pub mod cli;
pub mod damaged;
pub mod overlay;
pub mod passes;
pub mod problem;
pub mod rebuild;
pub mod repair;
pub mod report;
pub mod session;
pub mod state;

pub use passes::{CheckOptions, check, check_with};
pub use problem::{Problem, Severity};
pub use report::Report;
pub use session::repair_all;
