//! The command `fsck-coppice`; `fsck.coppice` is a link to it.

#![forbid(unsafe_code)]

/// As the other programs': fewer instructions for the many small maps of the passes, and memory that is given back.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

use std::process::ExitCode;

use clap::Parser;
use coppicefs::{complain, output};
use coppicefs_fsck::cli::{Arguments, EXIT_CODES, EXIT_OPERATIONAL, EXIT_USAGE, run};

/// Checks a coppice filesystem, and repairs it.
#[derive(Parser)]
#[command(name = "fsck-coppice", version, after_help = EXIT_CODES)]
struct Command {
    #[command(flatten)]
    arguments: Arguments,
}

fn main() -> ExitCode {
    output::warn_on_terminal();
    let code = match Command::try_parse() {
        Ok(command) => ExitCode::from(run(&command.arguments)),
        Err(error) if error.use_stderr() => {
            complain!("fsck-coppice: {}", output::in_one_line(&error.to_string()));
            ExitCode::from(EXIT_USAGE)
        }
        // Help and version.
        Err(error) => {
            output::keep(error.print());
            ExitCode::SUCCESS
        }
    };
    output::end("fsck-coppice", code, EXIT_OPERATIONAL)
}
