//! The command `mkfs-coppice`; `mkfs.coppice` is a link to it.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use coppicefs::{complain, output};
use coppicefs_mkfs::cli::{Arguments, run};

/// Makes a coppice filesystem on an image file or a disk.
#[derive(Parser)]
#[command(name = "mkfs-coppice", version)]
struct Command {
    #[command(flatten)]
    arguments: Arguments,
}

fn main() -> ExitCode {
    output::warn_on_terminal();
    let code = match Command::try_parse() {
        Ok(command) => make(&command.arguments),
        Err(error) if error.use_stderr() => {
            complain!("mkfs-coppice: {}", output::in_one_line(&error.to_string()));
            ExitCode::FAILURE
        }
        // Help and version.
        Err(error) => {
            output::keep(error.print());
            ExitCode::SUCCESS
        }
    };
    output::end("mkfs-coppice", code, 1)
}

fn make(arguments: &Arguments) -> ExitCode {
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain!("mkfs-coppice: {error:#}");
            ExitCode::FAILURE
        }
    }
}
