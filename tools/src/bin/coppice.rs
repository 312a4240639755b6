//! The program `coppice`: everything, by subcommand, or by the name that it was started with.

#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    coppicefs_tools::cli::run_by_name()
}
