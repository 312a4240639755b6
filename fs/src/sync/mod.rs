//! The only door to locks and atomics: `parking_lot` in real builds, loom's models under `--cfg loom`. In the library's own tests also shuttle's
//! scheduler comes through it (`schedule.rs`).
//!
//! The interface is parking_lot's (no poisoning). Each blocking acquisition of a [`Mutex`] or [`RwLock`] is counted for the
//! calling thread, so that a test can prove that a path takes no mutex ([`lock_count`]).
//!
//! Every lock has a [`Rank`]. Debug builds check, thread by thread, that locks are taken in the order of their ranks, and that none is held over a
//! wait, device I/O or a reply but where the contract allows it ([`order`]). Release builds pay nothing: all of it is zero-sized there.

pub mod order;
mod rank;

#[cfg(all(test, not(loom)))]
pub mod atomic;
#[cfg(all(test, not(loom)))]
pub(crate) mod history;
#[cfg(loom)]
mod model;
#[cfg(not(loom))]
mod real;
#[cfg(not(loom))]
pub(crate) mod schedule;

#[cfg(loom)]
pub use model::*;
pub use rank::{LockClass, Rank, RankSet};
#[cfg(not(loom))]
pub use real::*;

#[cfg(all(test, not(loom)))]
mod schedule_tests;
#[cfg(all(test, not(loom)))]
mod tests;
