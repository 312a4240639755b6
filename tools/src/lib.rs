//! The command-line tools: `coppice` with its subcommands, and the mount helper.

#![forbid(unsafe_code)]

pub mod bench;
pub mod cli;
pub mod commands;
pub mod image;
pub mod mount;
pub mod output;
pub mod probe;
pub mod trial;
