//! The command `fsck-coppice`; `fsck.coppice` is a link to it.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use coppicefs_fsck::cli::{Arguments, run};

/// Checks a coppice filesystem, and repairs it.
#[derive(Parser)]
#[command(name = "fsck-coppice", version)]
struct Command {
    #[command(flatten)]
    arguments: Arguments,
}

fn main() -> ExitCode {
    ExitCode::from(run(&Command::parse().arguments))
}
