//! The command line of `coppice`: one definition gives parser, help, man page and completions.

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use coppicefs::output;

use crate::commands::{checkpoints, install, journal, layout, list, mounted, restore, scrub, show_super, usage};
use crate::{bench, image, mount, probe, trial};

/// The exit code of a command that could not do what it should.
const EXIT_FAILURE: u8 = 1;
/// The exit code for a command line that is wrong, as most programs have it.
const EXIT_USAGE: u8 = 2;

/// A copy-on-write filesystem in userspace.
#[derive(Parser, Debug)]
#[command(name = "coppice", version, propagate_version = true, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Make a filesystem on an image file or a disk
    Mkfs(coppicefs_mkfs::cli::Arguments),
    /// Check a filesystem, and repair it
    Fsck(coppicefs_fsck::cli::Arguments),
    /// Mount an image file or a disk
    Mount(mount::MountCommand),
    /// Show what the superblock says
    ShowSuper(show_super::Arguments),
    /// Show where space is, of an image or of a mount
    Usage(usage::Arguments),
    /// List the keys of a B-tree
    List(list::Arguments),
    /// Show what is in the log
    Journal(journal::Arguments),
    /// List the checkpoints of an image, and which of them are whole
    Checkpoints(checkpoints::Arguments),
    /// Read and verify everything, of a mount or an image, and repair what has another copy
    Scrub(scrub::Arguments),
    /// Copy out all that is readable of an image that cannot be mounted
    Restore(restore::Arguments),
    /// Show all counters of a mounted filesystem
    Stats(mounted::StatsArguments),
    /// Make everything on a mounted filesystem durable
    Sync(mounted::SyncArguments),
    /// Take a range out of a mounted file: what lies behind it moves down
    Collapse(layout::Arguments),
    /// Make room in a mounted file: what lies behind moves up
    Insert(layout::Arguments),
    /// Show what the running kernel's FUSE does, as far as the filesystem relies on it
    Probe {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Install this program and the links by which mount(8) and fsck(8) find it
    Install(install::Arguments),
    /// Print a completion script for a shell
    Completions {
        /// bash, zsh, fish, ...
        shell: clap_complete::Shell,
    },
    /// Print the man page
    Man,
    /// Show the main job end to end on an image in a temporary folder
    Try(trial::Arguments),
    /// Run fio's jobs on a mounted filesystem and print a table
    Bench(bench::Arguments),
}

/// Runs the program by the name that it was started with: `mkfs.coppice` and the like are links to `coppice`.
#[must_use]
pub fn run_by_name() -> ExitCode {
    let mut arguments = std::env::args_os();
    let name = arguments.next().unwrap_or_default();
    let name = Path::new(&name).file_name().unwrap_or_default().to_string_lossy().into_owned();
    let rest: Vec<_> = arguments.collect();
    let by = |subcommand: &str| {
        let words = ["coppice".into(), subcommand.into()].into_iter().chain(rest.iter().cloned());
        parse(words)
    };
    match name.as_str() {
        "mkfs.coppice" | "mkfs-coppice" => by("mkfs"),
        "fsck.coppice" | "fsck-coppice" => by("fsck"),
        "mount.coppice" | "mount-coppice" | "mount.fuse.coppice" => mount::main_with(image::open),
        "umount.coppice" | "umount.fuse.coppice" => mount::unmount_main(),
        _ => parse(["coppice".into()].into_iter().chain(rest)),
    }
}

/// Parses and runs; what cannot be parsed is refused in one line, with the exit code that callers of that program know.
fn parse(words: impl IntoIterator<Item = OsString>) -> ExitCode {
    let words: Vec<OsString> = words.into_iter().collect();
    match Cli::try_parse_from(&words) {
        Ok(cli) => run(cli),
        // Help, also for a command line that says nothing at all; and version.
        Err(error) if !error.use_stderr() => {
            output::keep(error.print());
            output::end("coppice", ExitCode::SUCCESS, EXIT_FAILURE)
        }
        Err(error) if words.len() < 2 => {
            let _ = error.print();
            ExitCode::from(EXIT_USAGE)
        }
        Err(error) => {
            complain!("coppice: {}", output::in_one_line(&error.to_string()));
            let is_fsck = words.get(1).is_some_and(|word| word == "fsck");
            ExitCode::from(if is_fsck { coppicefs_fsck::cli::EXIT_USAGE } else { EXIT_USAGE })
        }
    }
}

fn run(cli: Cli) -> ExitCode {
    let (code, unwritten) = match cli.command {
        Command::Mount(command) => return mount::run(&command, image::open),
        Command::Fsck(arguments) => {
            output::warn_on_terminal();
            (coppicefs_fsck::cli::run(&arguments), coppicefs_fsck::cli::EXIT_OPERATIONAL)
        }
        Command::Scrub(arguments) => (scrub::run(&arguments), scrub::EXIT_OPERATIONAL),
        // It says itself what cannot be read.
        Command::Restore(arguments) => (restore::run(&arguments), restore::EXIT_OPERATIONAL),
        command => {
            output::warn_on_terminal();
            let outcome = run_simple(command);
            if let Err(error) = &outcome {
                complain!("coppice: {error:#}");
            }
            (if outcome.is_ok() { 0 } else { EXIT_FAILURE }, EXIT_FAILURE)
        }
    };
    output::end("coppice", ExitCode::from(code), unwritten)
}

fn run_simple(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Mkfs(arguments) => coppicefs_mkfs::cli::run(&arguments),
        Command::ShowSuper(arguments) => show_super::run(&arguments),
        Command::Usage(arguments) => usage::run(&arguments),
        Command::List(arguments) => list::run(&arguments),
        Command::Journal(arguments) => journal::run(&arguments),
        Command::Checkpoints(arguments) => checkpoints::run(&arguments),
        Command::Stats(arguments) => mounted::stats(&arguments),
        Command::Sync(arguments) => mounted::sync(&arguments),
        Command::Collapse(arguments) => layout::collapse(&arguments),
        Command::Insert(arguments) => layout::insert(&arguments),
        Command::Probe { json } => probe::run(json),
        Command::Install(arguments) => install::run(&arguments),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "coppice", &mut output::Output);
            Ok(())
        }
        Command::Man => Ok(clap_mangen::Man::new(Cli::command()).render(&mut output::Output)?),
        Command::Try(arguments) => trial::run(&arguments),
        Command::Bench(arguments) => bench::run(&arguments),
        Command::Mount(_) | Command::Fsck(_) | Command::Restore(_) | Command::Scrub(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
