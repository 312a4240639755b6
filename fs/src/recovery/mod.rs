//! Opening: find the superblock, the newest whole checkpoint, and the end of the journal; replay; make the cut durable.
//!
//! ```text
//! superblock      newest valid copy of three
//! checkpoint      newest whole one of the area's slots; the one before it if its map or roots are damaged
//! journal         flush the device (host-cached bytes may never have become durable), then read the unbroken chain from F
//! replay          raw puts and whiteouts, in order; accounting deltas onto the totals at F. No triggers, no overlap checks
//! read-write      a first record in a new epoch, flushed: it overwrites whatever followed the end of the chain, so that no
//!                 later recovery can find another end; then a checkpoint, so that the replayed part is not replayed again
//! ```
//! A crash anywhere in it leaves the same state to be recovered: nothing is overwritten before the new record is durable.
//! [`crate::filesystem`] does it in this order.
//!
//! [`inspect_checkpoints`] says what is kept; [`choose_older`] and [`reuse_check`] are for opening an older state, [`Salvage`] for reading what is left of an image that cannot be opened;
//! [`scan`] and [`records`] are for a rebuild, where superblock, checkpoint or roots are gone.

mod checkpoints;
pub mod records;
mod replay;
mod salvage;
pub mod scan;
pub mod superblock;

pub use checkpoints::{
    InspectedCheckpoint, InspectedCheckpoints, choose_log, choose_older, choose_without_map, inspect_checkpoints,
    reuse_check,
};
pub use replay::{Replayed, replay, replay_index, replay_with_triggers};
pub use salvage::{ExtentContent, LostKeys, Salvage, SalvageOptions, Salvaged, present_reuse_check};
