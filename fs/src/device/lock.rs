//! Who may use an image: advisory locks (`flock`), and what is the same image under two names.
//!
//! Rules:
//! 1. A tool that writes holds an exclusive lock, one that only reads a shared one, for as long as its device is open. Locks are
//!    never waited for here: the caller gets [`Error::InUse`] and decides.
//! 2. A loop device and the file behind it are one image: who opens the loop device locks the file too, so who opens the file finds it
//!    locked. The other way round, who opens the file for writing looks for loop devices on it that somebody has claimed
//!    (a mount by the kernel).
//! 3. A lock ends when its [`ImageLock`] is dropped, not when the last reference to the open file goes: the kernel's io_uring workers and
//!    children between `fork` and `exec` may hold such references a little longer, and the next `open` must not see them. (A process
//!    that dies drops nothing; the kernel then ends the lock with the last reference.) Only the process that locked unlocks.

use std::ffi::OsStr;
use std::fs::{self, File, Metadata};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, OFlags, flock, major, minor};
use rustix::io::Errno;

use crate::error::{Error, Result};

/// Loop devices on loop devices are followed so deep.
const LOOP_DEPTH_MAX: u32 = 8;

/// What an image is, whatever it is called: two paths with equal identities are the same bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ImageIdentity {
    /// A file.
    File {
        /// Device number of the filesystem it is on.
        device: u64,
        /// Its inode there.
        inode: u64,
    },
    /// A disk, by its device number.
    Disk(u64),
}

impl ImageIdentity {
    /// The image that `path` names: symbolic links and loop devices are followed to what is behind them.
    ///
    /// # Errors
    /// The host's, if the path cannot be looked up.
    pub fn of(path: &Path) -> Result<Self> {
        let metadata =
            fs::metadata(path).map_err(|error| Error::io(format!("looking up {}", path.display()), error))?;
        Ok(Self::of_metadata(&metadata, 0))
    }

    fn of_metadata(metadata: &Metadata, depth: u32) -> Self {
        if !metadata.file_type().is_block_device() {
            return Self::File { device: metadata.dev(), inode: metadata.ino() };
        }
        match backing_file(metadata.rdev()).and_then(|path| fs::metadata(path).ok()) {
            Some(behind) if depth < LOOP_DEPTH_MAX => Self::of_metadata(&behind, depth + 1),
            _ => Self::Disk(metadata.rdev()),
        }
    }
}

/// Whether two paths name the same image. Paths that cannot be looked up are the same as nothing.
#[must_use]
pub fn is_same_image(one: &Path, other: &Path) -> bool {
    matches!((ImageIdentity::of(one), ImageIdentity::of(other)), (Ok(one), Ok(other)) if one == other)
}

/// The file behind a loop device (or a partition of one), by its device number.
fn backing_file(device: u64) -> Option<PathBuf> {
    let folder = PathBuf::from(format!("/sys/dev/block/{}:{}", major(device), minor(device)));
    let mut path = fs::read(folder.join("loop/backing_file"))
        // A partition stands below its disk.
        .or_else(|_| fs::read(fs::canonicalize(&folder)?.join("../loop/backing_file")))
        .ok()?;
    if path.last() == Some(&b'\n') {
        path.pop();
    }
    Some(PathBuf::from(OsStr::from_bytes(&path)))
}

/// The loop devices whose file is `identity`.
fn loops_on(identity: ImageIdentity) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir("/sys/block") else { return Vec::new() };
    entries
        .flatten()
        .filter(|entry| entry.file_name().as_bytes().starts_with(b"loop"))
        // Most loop devices are idle and have no such file: do not open their nodes.
        .filter(|entry| entry.path().join("loop/backing_file").exists())
        .map(|entry| Path::new("/dev").join(entry.file_name()))
        .filter(|path| ImageIdentity::of(path).is_ok_and(|of_loop| of_loop == identity))
        .collect()
}

/// The processes that hold a lock on the file at `path`, as far as the host tells.
#[must_use]
pub fn lock_holders(path: &Path) -> Vec<u32> {
    fs::metadata(path).map(|metadata| holders(&metadata)).unwrap_or_default()
}

fn holders(metadata: &Metadata) -> Vec<u32> {
    let Ok(locks) = fs::read_to_string("/proc/locks") else { return Vec::new() };
    let place = format!("{:02x}:{:02x}:{}", major(metadata.dev()), minor(metadata.dev()), metadata.ino());
    let mut processes: Vec<u32> = locks
        .lines()
        // "1: FLOCK  ADVISORY  WRITE 1234 fe:00:5678 0 EOF"; a waiter's line has "->" after the number.
        .filter_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            match fields.as_slice() {
                [_, "FLOCK", _, _, process, at, ..] if *at == place => process.parse().ok(),
                _ => None,
            }
        })
        .collect();
    processes.sort_unstable();
    processes.dedup();
    processes
}

fn in_use(path: &Path, metadata: Option<&Metadata>) -> Error {
    let processes = metadata.map(holders).unwrap_or_default();
    let names: Vec<String> = processes
        .iter()
        .map(|process| match fs::read_to_string(format!("/proc/{process}/comm")) {
            Ok(name) => format!("process {process} ({})", name.trim_end()),
            Err(_) => format!("process {process}"),
        })
        .collect();
    let user = if names.is_empty() { "another process".to_owned() } else { names.join(" and ") };
    Error::InUse { device: path.display().to_string(), user, processes }
}

/// The error for a disk that the kernel would not open exclusively: somebody, a mount perhaps, has claimed it.
pub(super) fn claimed(path: &Path) -> Error {
    match in_use(path, fs::metadata(path).ok().as_ref()) {
        Error::InUse { device, processes, .. } if processes.is_empty() => {
            Error::InUse { device, user: "the kernel (mounted, or part of another device)".into(), processes }
        }
        other => other,
    }
}

fn lock_one(file: &File, path: &Path, shared: bool) -> Result<()> {
    let operation =
        if shared { FlockOperation::NonBlockingLockShared } else { FlockOperation::NonBlockingLockExclusive };
    loop {
        match flock(file, operation) {
            Ok(()) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(Errno::WOULDBLOCK) => return Err(in_use(path, file.metadata().ok().as_ref())),
            // A filesystem without locks: go on unlocked rather than be unusable on it.
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NOLCK) => {
                tracing::warn!(path = %path.display(), "the host cannot lock this file");
                return Ok(());
            }
            Err(errno) => return Err(Error::io(format!("locking {}", path.display()), errno.into())),
        }
    }
}

/// The locks on an image, until it is dropped.
#[derive(Debug)]
pub(super) struct ImageLock {
    /// The image, and what is behind it.
    files: Vec<File>,
    process: u32,
}

impl Drop for ImageLock {
    fn drop(&mut self) {
        if self.process == std::process::id() {
            for file in &self.files {
                let _ = flock(file, FlockOperation::Unlock);
            }
        }
    }
}

/// Locks an open image by the module's rules.
///
/// # Errors
/// [`Error::InUse`], or the host's.
pub(super) fn lock_image(file: &File, path: &Path, shared: bool) -> Result<ImageLock> {
    let context = |error| Error::io(format!("locking {}", path.display()), error);
    let mut held = ImageLock { files: Vec::new(), process: std::process::id() };
    let image = file.try_clone().map_err(context)?;
    lock_one(&image, path, shared)?;
    held.files.push(image);
    let context = |error| Error::io(format!("looking up {}", path.display()), error);
    let own = file.metadata().map_err(context)?;
    let mut metadata = own.clone();
    while metadata.file_type().is_block_device() && held.files.len() <= LOOP_DEPTH_MAX as usize {
        let Some(behind) = backing_file(metadata.rdev()) else { break };
        let Ok(next) = File::open(&behind) else {
            // Deleted, or in another mount namespace: nobody can open it by that name either.
            tracing::debug!(path = %path.display(), file = %behind.display(), "the file behind the loop device is not reachable");
            break;
        };
        lock_one(&next, &behind, shared)?;
        metadata = next.metadata().map_err(context)?;
        held.files.push(next);
    }
    if !shared {
        for device in loops_on(ImageIdentity::of_metadata(&own, 0)) {
            let is_itself = fs::metadata(&device).is_ok_and(|other| other.rdev() == own.rdev())
                && own.file_type().is_block_device();
            // Opening exclusively and closing again asks the kernel whether somebody has claimed it.
            let exclusive = OFlags::EXCL.bits() as i32;
            if !is_itself
                && let Err(error) = File::options().read(true).custom_flags(exclusive).open(&device)
                && Errno::from_io_error(&error) == Some(Errno::BUSY)
            {
                return Err(claimed(&device));
            }
        }
    }
    Ok(held)
}
