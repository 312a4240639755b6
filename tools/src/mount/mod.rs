//! `mount-coppice`: mounts an image and serves it.
//!
//! The life of a mount, and the file of each step:
//! 1. `command`: the command line, which is mount(8)'s helper protocol.
//! 2. `background`: without `-f` this process starts itself again as the daemon and waits on a pipe until that says that the mount
//!    is usable, or why not. (A new process, not a fork: no thread, lock or buffer is inherited half-way.)
//! 3. `target`: the image and the mountpoint are looked at, a dead mount of the same image is taken away, and what cannot work is
//!    refused in one line.
//! 4. `serve`: open, mount, serve, and close after the last request; SIGTERM and SIGINT unmount.
//! 5. `logging`: where messages go.
//! 6. `unmount`: the helper that umount(8) runs, which waits until the daemon has let the image go.
//!
//! Exit codes are mount(8)'s: 0 mounted (with `-f`: mounted and cleanly unmounted), 1 wrong usage, 32 the mount failed.

mod background;
mod command;
mod logging;
mod serve;
mod target;
mod unmount;

use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser as _;
use coppicefs::fuse::Operations;
use coppicefs::options::MountOptions;
use coppicefs::output;

pub use command::MountCommand;
pub use target::Target;
pub use unmount::unmount_main;

/// What is mounted: an open filesystem.
pub trait Mountable: Send + Sync + 'static {
    /// What serves its requests.
    type Operations: Operations;

    /// What serves its requests.
    fn operations(&self) -> Arc<Self::Operations>;

    /// Makes everything durable and lets the image go. Called once, after the last request.
    ///
    /// # Errors
    /// What could not be made durable.
    fn close(&self) -> coppicefs::Result<()>;
}

/// The command was used wrongly.
const EXIT_USAGE: u8 = 1;
/// The mount failed.
const EXIT_FAILURE: u8 = 32;

/// Runs `mount-coppice` with this process's arguments. `open` opens the image that the target names.
pub fn main_with<M: Mountable>(open: impl FnOnce(&Target, &MountOptions) -> coppicefs::Result<M>) -> ExitCode {
    match MountCommand::try_parse() {
        Ok(command) => run(&command, open),
        Err(error) => {
            if !error.use_stderr() {
                // Help and version.
                output::keep(error.print());
                return output::end("mount-coppice", ExitCode::SUCCESS, EXIT_FAILURE);
            }
            complain!("mount-coppice: {}", output::in_one_line(&error.to_string()));
            ExitCode::from(EXIT_USAGE)
        }
    }
}

/// Runs a parsed command: `mount-coppice` and `coppice mount`.
pub fn run<M: Mountable>(
    command: &MountCommand,
    open: impl FnOnce(&Target, &MountOptions) -> coppicefs::Result<M>,
) -> ExitCode {
    let options = match command.mount_options() {
        Ok(options) => options,
        Err(error) => {
            complain!("mount-coppice: {error}");
            return ExitCode::from(EXIT_USAGE);
        }
    };
    if command.daemon {
        return background::run_daemon(|report| serve::serve(command, options, open, report));
    }
    let outcome = if command.foreground {
        logging::to_terminal(command.verbose, options.log.as_deref())
            .and_then(|()| serve::serve(command, options, open, |()| Ok(())))
    } else {
        background::start_daemon()
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain!("mount-coppice: {error:#}");
            ExitCode::from(EXIT_FAILURE)
        }
    }
}
