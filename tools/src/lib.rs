//! The command-line tools.

pub mod mount;
