//! `umount.fuse.coppice`: what umount(8) runs for our mounts once it is installed. umount(2) returns before the daemon has written
//! its last checkpoint; this returns when the image is free.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Parser;
use coppicefs::device::lock_holders;
use coppicefs::fuse::{FILE_SYSTEM_TYPE, mounts};
use coppicefs::output;
use rustix::io::Errno;

use super::target::resolve_last;
use super::{EXIT_FAILURE, EXIT_USAGE};

const NAME: &str = "umount.fuse.coppice";
/// How long a daemon may take to close its filesystem before this goes on without it, saying so.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(120);
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// Unmounts a coppice filesystem, and returns when its image is free
#[derive(Debug, Parser)]
#[command(name = NAME, version)]
struct UnmountCommand {
    /// Where it is mounted
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// Take it out of the tree even while it is busy, and do not wait
    #[arg(short = 'l')]
    lazily: bool,
    /// Accepted, as umount(8) passes it on; without effect
    #[arg(short = 'f', hide = true)]
    force: bool,
    /// Accepted, as umount(8) passes it on; /etc/mtab is never written
    #[arg(short = 'n', hide = true)]
    no_mtab: bool,
    /// Say what is done
    #[arg(short = 'v')]
    verbose: bool,
    /// Type of the filesystem, as umount(8) names it
    #[arg(short = 't', value_name = "TYPE", hide = true)]
    file_system_type: Option<std::ffi::OsString>,
}

/// Runs `umount.fuse.coppice` with this process's arguments. Exit codes as mount(8)'s.
pub fn unmount_main() -> ExitCode {
    let command = match UnmountCommand::try_parse() {
        Ok(command) => command,
        Err(error) => {
            let printed = error.print();
            if error.use_stderr() {
                return ExitCode::from(EXIT_USAGE);
            }
            output::keep(printed);
            return output::end(NAME, ExitCode::SUCCESS, EXIT_FAILURE);
        }
    };
    match unmount(&command) {
        Ok(()) => output::end(NAME, ExitCode::SUCCESS, EXIT_FAILURE),
        Err(error) => {
            complain!("{NAME}: {error:#}");
            ExitCode::from(EXIT_FAILURE)
        }
    }
}

fn unmount(command: &UnmountCommand) -> anyhow::Result<()> {
    let directory = resolve_last(&command.directory)?;
    let Some(entry) = mounts::find(&directory)?.filter(|entry| entry.file_system_type == FILE_SYSTEM_TYPE) else {
        bail!("{} is not a coppice mount: see /proc/mounts", directory.display());
    };
    // A relative source says nothing here: then there is nobody to wait for.
    let image = Path::new(&entry.source);
    let daemons = if image.is_absolute() { lock_holders(image) } else { Vec::new() };
    let by_fusermount = !rustix::process::geteuid().is_root();
    match mounts::unmount(&directory, command.lazily, by_fusermount) {
        Err(error) if error.errno() == Errno::BUSY => {
            bail!("{} is busy: close what is open there (`fuser -vm` lists it), or use -l", directory.display())
        }
        other => other.with_context(|| format!("cannot unmount {}", directory.display()))?,
    }
    if command.verbose {
        say!("{} unmounted", directory.display());
    }
    let deadline = Instant::now() + CLOSE_TIMEOUT;
    while !command.lazily && lock_holders(image).iter().any(|holder| daemons.contains(holder)) {
        if Instant::now() > deadline {
            bail!("unmounted, but the daemon has not finished with {}", image.display());
        }
        std::thread::sleep(POLL_INTERVAL);
    }
    Ok(())
}
