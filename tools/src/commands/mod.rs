//! The subcommands of `coppice`, a file each.

pub mod checkpoints;
pub mod describe;
pub mod install;
pub mod journal;
pub mod layout;
pub mod list;
pub mod mounted;
pub mod restore;
pub mod scrub;
pub mod show_super;
pub mod usage;
