//! The other end of our ioctls: what tools ask of a mounted filesystem.
//!
//! No locks. `unsafe` is the ioctl calls; the kernel writes at most the size that the command's number says.

#![allow(unsafe_code, reason = "ioctl(2)")]

use std::fs::File;
use std::path::Path;

use rustix::ioctl::{NoArg, Updater, ioctl};

use crate::error::{Error, Result};
use crate::vfs::{IOCTL_STATISTICS, IOCTL_SYNC};

/// Bytes that one statistics call carries.
const PAGE_BYTES: usize = 8192;
/// Most answers that statistics may take.
const PAGES_MAX: usize = 128;

fn open(mount: &Path) -> Result<File> {
    File::open(mount).map_err(|error| Error::io(format!("opening {}", mount.display()), error))
}

fn not_ours(mount: &Path, errno: rustix::io::Errno) -> Error {
    if errno == rustix::io::Errno::NOTTY {
        return Error::Unusable(format!("{} is not on a mounted coppice filesystem", mount.display()));
    }
    Error::io(format!("asking the filesystem at {}", mount.display()), errno.into())
}

/// Makes everything on the filesystem that holds `mount` durable.
///
/// # Errors
/// [`Error::Unusable`] if it is none of ours; the filesystem's.
pub fn sync(mount: &Path) -> Result<()> {
    let file = open(mount)?;
    // SAFETY: the command has no argument.
    unsafe { ioctl(&file, NoArg::<{ IOCTL_SYNC as rustix::ioctl::Opcode }>::new()) }
        .map_err(|errno| not_ours(mount, errno))
}

/// All counters of the filesystem that holds `mount`: names and values.
///
/// # Errors
/// As [`sync`].
pub fn statistics(mount: &Path) -> Result<Vec<(String, u64)>> {
    let file = open(mount)?;
    let mut counters = Vec::new();
    let mut cursor = 0_u64;
    for _ in 0..PAGES_MAX {
        let mut page = [0_u8; PAGE_BYTES];
        if let Some(start) = page.first_chunk_mut() {
            *start = cursor.to_le_bytes();
        }
        // SAFETY: the command's number says that the kernel reads and writes 8192 bytes, which is the size of `page`.
        let outcome = unsafe {
            ioctl(&file, Updater::<{ IOCTL_STATISTICS as rustix::ioctl::Opcode }, [u8; PAGE_BYTES]>::new(&mut page))
        };
        outcome.map_err(|errno| not_ours(mount, errno))?;
        let Some((next, text)) = page.split_first_chunk() else { break };
        let text = String::from_utf8_lossy(text.split(|&byte| byte == 0).next().unwrap_or_default());
        counters.extend(text.lines().filter_map(|line| {
            line.split_once(' ').and_then(|(name, value)| Some((name.to_owned(), value.trim().parse().ok()?)))
        }));
        cursor = u64::from_le_bytes(*next);
        if cursor == 0 {
            break;
        }
    }
    Ok(counters)
}

/// What [`shut_down`] does first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum ShutDown {
    /// Write everything back.
    Synchronised = 0,
    /// Make the log durable.
    LogFlushed = 1,
    /// Nothing.
    AtOnce = 2,
}

/// `FS_IOC_SHUTDOWN`.
const SHUTDOWN: u32 = 0x8004_587d;
/// The same, declared as what it is, a command that takes an argument: so FUSE delivers it.
const SHUTDOWN_WITH_ARGUMENT: u32 = 0x4004_587d;

/// As if the machine lost its power now, or after `first`: the filesystem that holds `mount` serves nothing more, and is unmounted as
/// usual. Root only.
///
/// # Errors
/// As [`sync`]; `EPERM`.
pub fn shut_down(mount: &Path, first: ShutDown) -> Result<()> {
    let mut argument = first as u32;
    // SAFETY: the command's number says that the kernel reads 4 bytes, which is the size of `argument`.
    unsafe {
        let command = Updater::<{ SHUTDOWN_WITH_ARGUMENT as rustix::ioctl::Opcode }, u32>::new(&mut argument);
        ioctl(open(mount)?, command)
    }
    .map_err(|errno| not_ours(mount, errno))
}

/// As [`shut_down`] at once, by the command that other filesystems have and that other programs send. Through FUSE its argument never
/// arrives, since its number says that it only gives.
///
/// # Errors
/// As there.
pub fn shut_down_as_others_do(mount: &Path) -> Result<()> {
    let mut argument = ShutDown::AtOnce as u32;
    // SAFETY: the command's number says that the kernel writes 4 bytes, which is the size of `argument`; filesystems read as many.
    unsafe {
        let command = Updater::<{ SHUTDOWN as rustix::ioctl::Opcode }, u32>::new(&mut argument);
        ioctl(open(mount)?, command)
    }
    .map_err(|errno| not_ours(mount, errno))
}
