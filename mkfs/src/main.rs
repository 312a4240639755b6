//! The command `mkfs-coppice`; `mkfs.coppice` is a link to it.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use coppicefs_mkfs::cli::{Arguments, run};

/// Makes a coppice filesystem on an image file or a disk.
#[derive(Parser)]
#[command(name = "mkfs-coppice", version)]
struct Command {
    #[command(flatten)]
    arguments: Arguments,
}

fn main() -> ExitCode {
    match run(&Command::parse().arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mkfs-coppice: {error:#}");
            ExitCode::FAILURE
        }
    }
}
