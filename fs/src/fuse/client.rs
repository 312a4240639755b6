//! The other end of our ioctls: what tools ask of a mounted filesystem.
//!
//! No locks. `unsafe` is the ioctl calls; the kernel writes at most the size that the command's number says.

#![allow(unsafe_code, reason = "ioctl(2)")]

use std::fs::File;
use std::path::Path;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use rustix::ioctl::{NoArg, Setter, Updater, ioctl};

use crate::error::{Error, Result};
use crate::vfs::{
    ARM_COLLAPSE, ARM_INSERT, IOCTL_ARM, IOCTL_SCRUB, IOCTL_STATISTICS, IOCTL_SYNC, SCRUB_PAGE_BYTES, ScrubPage,
    ScrubRequest,
};

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

/// Asks the daemon of the filesystem that holds `mount` about a scrub, or for one.
///
/// # Errors
/// As [`sync`]; `EPERM` for whoever is neither root nor runs the daemon, `EBUSY` for a start while one is running.
pub fn scrub(mount: &Path, request: ScrubRequest) -> Result<ScrubPage> {
    let file = open(mount)?;
    let mut page = [0_u8; SCRUB_PAGE_BYTES];
    for (to, from) in page.iter_mut().zip(request.encode()) {
        *to = from;
    }
    // SAFETY: the command's number says that the kernel reads and writes 12288 bytes, which is the size of `page`.
    let outcome = unsafe {
        ioctl(&file, Updater::<{ IOCTL_SCRUB as rustix::ioctl::Opcode }, [u8; SCRUB_PAGE_BYTES]>::new(&mut page))
    };
    match outcome {
        Ok(()) => ScrubPage::decode(&page),
        Err(errno @ (Errno::BUSY | Errno::PERM)) => Err(errno.into()),
        Err(errno) => Err(not_ours(mount, errno)),
    }
}

/// How often a change of a file's layout is tried whose size somebody else changes meanwhile.
const ARM_ATTEMPTS: u32 = 8;

/// Opens a file whose layout is to be changed, and says how long it is.
fn open_to_change(path: &Path) -> Result<(File, u64)> {
    let failed = |error| Error::io(format!("opening {}", path.display()), error);
    let file = File::options().read(true).write(true).open(path).map_err(failed)?;
    let size = file.metadata().map_err(failed)?.len();
    Ok((file, size))
}

fn arm(path: &Path, file: &File, what: u64, offset: u64, length: u64, size: u64) -> Result<()> {
    let words = [what, offset, length, size].map(u64::to_le);
    // SAFETY: the command's number says that the kernel reads 32 bytes, which is the size of `words`.
    unsafe { ioctl(file, Setter::<{ IOCTL_ARM as rustix::ioctl::Opcode }, [u64; 4]>::new(words)) }
        .map_err(|errno| not_ours(path, errno))
}

/// The length of the range from `offset` on that fires: beyond the end of a file of `size` bytes, and to a multiple of every page and folio. The
/// kernel drops what lies in the range; of a page that it covers in part it would zero that part.
fn fired_bytes(offset: u64, size: u64) -> u64 {
    const FOLIO_BYTES: u64 = 2 << 20;
    let end = size.checked_next_multiple_of(FOLIO_BYTES).unwrap_or(u64::MAX);
    end.min(i64::MAX.cast_unsigned()).saturating_sub(offset)
}

/// Takes `length` bytes at `offset` (multiples of the block size, ending before the end of the file) out of the file at `path`: what lies behind moves down.
/// Linux passes no such request on, so it is armed, and fired by a hole to behind the end of the file: the kernel then writes back and drops what it caches
/// itself. The truncation afterwards tells it the new size: what others append between the two is lost.
///
/// # Errors
/// [`Error::Unusable`] if the file is none of ours; the filesystem's: `EINVAL` for other ranges, `EAGAIN` if others change the file's size all the time.
pub fn collapse_range(path: &Path, offset: u64, length: u64) -> Result<()> {
    let failed = |errno: rustix::io::Errno| Error::io(format!("collapsing {}", path.display()), errno.into());
    for _ in 0..ARM_ATTEMPTS {
        let (file, size) = open_to_change(path)?;
        if length == 0 || offset.checked_add(length).is_none_or(|end| end >= size) {
            return Err(failed(rustix::io::Errno::INVAL));
        }
        arm(path, &file, ARM_COLLAPSE, offset, length, size)?;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(&file, flags, offset, fired_bytes(offset, size)) {
            Err(rustix::io::Errno::AGAIN) => {}
            Err(errno) => return Err(failed(errno)),
            Ok(()) => return rustix::fs::ftruncate(&file, size - length).map_err(failed),
        }
    }
    Err(failed(rustix::io::Errno::AGAIN))
}

/// Makes a hole of `length` bytes at `offset` (multiples of the block size, before the end of the file) in the file at `path`: what lies there and behind
/// moves up. Fired by a zeroing; see [`collapse_range`]. That the last byte is allocated afterwards tells the kernel the new size, and cuts nothing off; only where a hole
/// is there and no space for it, a truncation does.
///
/// # Errors
/// As there.
pub fn insert_range(path: &Path, offset: u64, length: u64) -> Result<()> {
    let failed = |errno: rustix::io::Errno| Error::io(format!("inserting into {}", path.display()), errno.into());
    for _ in 0..ARM_ATTEMPTS {
        let (file, size) = open_to_change(path)?;
        let end = size.checked_add(length).filter(|_| length > 0 && offset < size);
        let end = end.ok_or_else(|| failed(rustix::io::Errno::INVAL))?;
        arm(path, &file, ARM_INSERT, offset, length, size)?;
        let flags = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        match fallocate(&file, flags, offset, fired_bytes(offset, end)) {
            Err(rustix::io::Errno::AGAIN) => {}
            Err(errno) => return Err(failed(errno)),
            Ok(()) => {
                return match fallocate(&file, FallocateFlags::empty(), end - 1, 1) {
                    Err(rustix::io::Errno::NOSPC) => rustix::fs::ftruncate(&file, end).map_err(failed),
                    outcome => outcome.map_err(failed),
                };
            }
        }
    }
    Err(failed(rustix::io::Errno::AGAIN))
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
