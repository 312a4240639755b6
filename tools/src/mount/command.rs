//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Parser;
use coppicefs::options::{self, MountOptions};

/// Mounts a coppice image
#[derive(Clone, Debug, Parser)]
#[command(
    name = "mount-coppice",
    version,
    after_help = options::mount_options_help(),
    long_about = "Mounts a coppice image. Returns when the mount is usable; a daemon serves it until it is unmounted.\n\n\
                  As root the mount is open to all users, as a user (through fusermount3) to that user alone. \
                  Unmount with umount(8) or `fusermount3 -u`, or by ending the daemon with SIGTERM."
)]
pub struct MountCommand {
    /// Image file or block device
    #[arg(value_name = "SPEC")]
    pub spec: PathBuf,
    /// Directory to mount on
    #[arg(value_name = "DIR")]
    pub directory: PathBuf,
    /// Mount options, separated by commas
    #[arg(short = 'o', value_name = "OPTIONS")]
    pub options: Vec<String>,
    /// Stay in the foreground, and log to the terminal
    #[arg(short = 'f', long)]
    pub foreground: bool,
    /// Ignore unknown mount options
    #[arg(short = 's')]
    pub sloppy: bool,
    /// Do not write /etc/mtab (it never is)
    #[arg(short = 'n')]
    pub no_mtab: bool,
    /// Log more
    #[arg(short = 'v', long)]
    pub verbose: bool,
    /// Append messages to this file instead of syslog or the terminal
    #[arg(long, value_name = "FILE")]
    pub log: Option<PathBuf>,
    /// Type of the filesystem, as mount(8) names it
    #[arg(short = 't', value_name = "TYPE", hide = true)]
    pub file_system_type: Option<OsString>,
    /// This process is the daemon of a `mount-coppice` that waits for it
    #[arg(long, hide = true)]
    pub daemon: bool,
}

impl MountCommand {
    /// The mount options of all `-o`.
    ///
    /// # Errors
    /// One line that names the option that is unknown or has a wrong value.
    pub fn mount_options(&self) -> coppicefs::Result<MountOptions> {
        let mut options = MountOptions::default();
        for given in &self.options {
            if self.sloppy {
                options.apply_known(given)?;
            } else {
                options.apply(given)?;
            }
        }
        if let Some(log) = &self.log {
            options.log = Some(log.clone());
        }
        // The daemon leaves the current directory.
        if let Some(log) = &mut options.log
            && let Ok(absolute) = std::path::absolute(&*log)
        {
            *log = absolute;
        }
        Ok(options)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_helper_protocol_is_understood() {
        let command =
            MountCommand::try_parse_from(["mount.coppice", "a b", "/mnt", "-n", "-v", "-o", "ro,noatime", "-t", "x"])
                .unwrap();
        assert!(command.no_mtab && command.verbose && !command.foreground);
        assert!(command.mount_options().unwrap().read_only);
        let twice = ["mount-coppice", "-fs", "i", "d", "-o", "ro,nosuch", "-o", "rw,commit=3"];
        let command = MountCommand::try_parse_from(twice).unwrap();
        let options = command.mount_options().unwrap();
        assert!(!options.read_only && options.commit_interval.as_secs() == 3);
        assert!(MountCommand::try_parse_from(["mount-coppice", "i"]).is_err());
    }
}
