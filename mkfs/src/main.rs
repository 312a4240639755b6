//! The command `mkfs-coppice`; `mkfs.coppice` is a link to it.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use coppicefs_mkfs::cli::{Arguments, in_one_line, run};

/// Makes a coppice filesystem on an image file or a disk.
#[derive(Parser)]
#[command(name = "mkfs-coppice", version)]
struct Command {
    #[command(flatten)]
    arguments: Arguments,
}

fn main() -> ExitCode {
    let command = match Command::try_parse() {
        Ok(command) => command,
        Err(error) if error.use_stderr() => {
            eprintln!("mkfs-coppice: {}", in_one_line(&error));
            return ExitCode::FAILURE;
        }
        // Help and version.
        Err(error) => {
            let _ = error.print();
            return ExitCode::SUCCESS;
        }
    };
    match run(&command.arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mkfs-coppice: {error:#}");
            ExitCode::FAILURE
        }
    }
}
