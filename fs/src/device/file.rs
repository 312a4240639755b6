//! [`FileDevice`]: an image file or a disk.
//!
//! It is opened with O_DIRECT where the host takes that, since we have a page cache of our own, and through the host's page cache
//! where not; submission is by io_uring where the kernel permits, by plain calls on a few threads where not. None of this shows in
//! the results. Short counts are continued, interruptions retried, unaligned memory bounced. A device that is open is locked (see
//! [`super::lock`]). No lock is held across I/O.
//!
//! After a `fork` the child may use a device that was open (its rings are remade), but the lock ends with the parent's.

#![allow(unsafe_code)]

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, FallocateFlags, Mode, OFlags, StatxFlags};
use rustix::io::Errno;

use super::check::{check_range, device_error};
use super::lock::{ImageLock, claimed, lock_image};
use super::pool::Pool;
use super::transfer::Transfer;
use super::uring::Rings;
use super::{BlockDevice, ReadRequest, WriteRequest};
use crate::error::{Error, Result};
use crate::memory::AlignedBuffer;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::order;

/// How batches reach the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Backend {
    /// io_uring where the kernel permits, else threads.
    #[default]
    Auto,
    /// io_uring, or opening fails.
    IoUring,
    /// `preadv` and `pwritev` on a few threads.
    Threads,
}

/// Whether the host's page cache is passed by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DirectIo {
    /// Passed by where the host can.
    #[default]
    Auto,
    /// Used.
    Never,
}

/// How a [`FileDevice`] is opened.
#[derive(Clone, Debug)]
pub struct FileOptions {
    /// Open for reading only, with a shared lock.
    pub read_only: bool,
    /// How batches reach the kernel.
    pub backend: Backend,
    /// Whether the host's page cache is passed by.
    pub direct_io: DirectIo,
    /// Lock the device (and refuse one that is locked). Only for looking into a device that is in use.
    pub lock: bool,
}

impl Default for FileOptions {
    fn default() -> Self {
        Self { read_only: false, backend: Backend::default(), direct_io: DirectIo::default(), lock: true }
    }
}

/// How [`FileDevice::create`] and [`FileDevice::resize`] treat what is there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Creation {
    /// Makes a new file, or takes the one that is there and lets it grow; refuses to shrink it.
    #[default]
    Careful,
    /// Also cuts off what is longer.
    Force,
}

#[derive(Debug)]
enum Engine {
    Rings(Rings),
    Pool(Pool),
}

/// See the module's documentation.
#[derive(Debug)]
pub struct FileDevice {
    name: String,
    file: File,
    size_bytes: u64,
    block_bytes: u32,
    read_only: bool,
    is_disk: bool,
    /// What direct I/O aligns memory to, in bytes; 1 if the host's page cache is used.
    alignment: usize,
    engine: Engine,
    /// Cleared when the host says that it cannot.
    discards: AtomicBool,
    /// See the rules of [`super::lock`].
    _lock: Option<ImageLock>,
}

/// BLKDISCARD of `linux/fs.h`: `_IO(0x12, 119)`, with a pointer to {start, length} in bytes.
const BLKDISCARD: rustix::ioctl::Opcode = rustix::ioctl::opcode::none(0x12, 119);

impl FileDevice {
    /// Opens an image file or a disk, locked.
    ///
    /// # Errors
    /// [`Error::InUse`] if somebody else has it (see [`Self::open_waiting`]), [`Error::Unusable`] if it is neither file nor disk, or
    /// the host's.
    pub fn open(path: impl AsRef<Path>, options: &FileOptions) -> Result<Self> {
        Self::open_with(path.as_ref(), options, None)
    }

    /// As [`Self::open`], but while somebody else has it, tries again as long as `keep_waiting` says so. It is called with the
    /// [`Error::InUse`] and the time since the first attempt, every few milliseconds: a daemon that is shutting down is waited for.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_waiting(
        path: impl AsRef<Path>,
        options: &FileOptions,
        mut keep_waiting: impl FnMut(&Error, Duration) -> bool,
    ) -> Result<Self> {
        let start = Instant::now();
        loop {
            match Self::open(path.as_ref(), options) {
                Err(error @ Error::InUse { .. }) if keep_waiting(&error, start.elapsed()) => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                outcome => return outcome,
            }
        }
    }

    /// Makes an image file of `size_bytes`, sparse, and opens it. One that is there is locked and resized before anybody has looked
    /// into it: who wants to look first takes [`Self::open`], then [`Self::resize`].
    ///
    /// # Errors
    /// [`Error::Invalid`] if a longer file is there and `creation` does not say to cut it, or for a disk; else as [`Self::open`].
    /// Where it fails, a file that was not there before is removed.
    pub fn create(path: impl AsRef<Path>, size_bytes: u64, creation: Creation, options: &FileOptions) -> Result<Self> {
        if options.read_only {
            return Err(Error::ReadOnly);
        }
        let path = path.as_ref();
        let existed = fs::symlink_metadata(path).is_ok();
        let outcome = Self::open_with(path, options, Some((size_bytes, creation)));
        // An image whose lock we did not get is somebody's who came in between.
        if !existed && !matches!(outcome, Ok(_) | Err(Error::InUse { .. })) {
            let _ = fs::remove_file(path);
        }
        outcome
    }

    fn open_with(path: &Path, options: &FileOptions, create: Option<(u64, Creation)>) -> Result<Self> {
        let name = path.display().to_string();
        let context = |doing: &str, error: io::Error| Error::io(format!("{doing} {name}"), error);
        // Before opening: opening a FIFO blocks, and some character devices do things when they are opened.
        let is_disk = match fs::metadata(path) {
            Ok(metadata) => check_kind(&name, &metadata)?,
            Err(error) if create.is_some() && error.kind() == io::ErrorKind::NotFound => false,
            Err(error) => return Err(context("opening", error)),
        };
        let mut flags = OFlags::CLOEXEC | if options.read_only { OFlags::RDONLY } else { OFlags::RDWR };
        if create.is_some() {
            if is_disk {
                return Err(Error::Invalid(format!("{name} is a disk: its size cannot be chosen")));
            }
            flags |= OFlags::CREATE;
        } else if is_disk && !options.read_only && options.lock {
            // On a disk: refused if it is mounted or part of another device, and held against both.
            flags |= OFlags::EXCL;
        }
        let file = match rustix::fs::open(path, flags, Mode::from_raw_mode(0o666)) {
            Ok(descriptor) => File::from(descriptor),
            Err(Errno::BUSY) if is_disk => return Err(claimed(path)),
            Err(errno) => return Err(context("opening", errno.into())),
        };
        let metadata = file.metadata().map_err(|error| context("looking up", error))?;
        if check_kind(&name, &metadata)? != is_disk {
            return Err(Error::Unusable(format!("{name} was replaced while it was opened: try again")));
        }
        let lock = if options.lock { Some(lock_image(&file, path, options.read_only)?) } else { None };
        if let Some((size_bytes, creation)) = create {
            resize(&file, path, size_bytes, creation)?;
        }
        let length = if is_disk {
            rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0))
                .map_err(|errno| context("finding the size of", errno.into()))?
        } else {
            // Asked for again: it may have been resized before we had the lock.
            file.metadata().map_err(|error| context("looking up", error))?.len()
        };
        let direct = match options.direct_io {
            DirectIo::Auto => enable_direct(&file),
            DirectIo::Never => None,
        };
        let sector_bytes =
            if is_disk { rustix::fs::ioctl_blksszget(&file).unwrap_or(512).clamp(512, 4096) } else { 512 };
        let block_bytes = direct.map_or(sector_bytes, |direct| direct.offset.max(sector_bytes));
        let engine = match options.backend {
            Backend::Threads => Engine::Pool(Pool::new()),
            Backend::IoUring => Engine::Rings(Rings::new().map_err(|error| context("using io_uring for", error))?),
            Backend::Auto => match Rings::new() {
                Ok(rings) => Engine::Rings(rings),
                Err(error) => {
                    tracing::debug!(%error, "no io_uring here, using threads");
                    Engine::Pool(Pool::new())
                }
            },
        };
        Ok(Self {
            size_bytes: length - length % u64::from(block_bytes),
            block_bytes,
            read_only: options.read_only,
            is_disk,
            alignment: direct.map_or(1, |direct| direct.memory),
            engine,
            discards: AtomicBool::new(true),
            _lock: lock,
            file,
            name,
        })
    }

    /// Gives the image file another size: a hole is added, or the end cut off.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it would shrink and `creation` does not say so, or for a disk; [`Error::ReadOnly`]; or the host's.
    pub fn resize(&mut self, size_bytes: u64, creation: Creation) -> Result<()> {
        if self.read_only {
            return Err(Error::ReadOnly);
        }
        if self.is_disk {
            return Err(Error::Invalid(format!("{} is a disk: its size cannot be chosen", self.name)));
        }
        resize(&self.file, Path::new(&self.name), size_bytes, creation)?;
        self.size_bytes = size_bytes - size_bytes % u64::from(self.block_bytes);
        Ok(())
    }

    /// Whether the host's page cache is passed by.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.alignment > 1
    }

    /// Whether batches go through io_uring.
    #[must_use]
    pub fn uses_io_uring(&self) -> bool {
        matches!(self.engine, Engine::Rings(_))
    }

    /// Whether it is a disk, not an image file.
    #[must_use]
    pub fn is_disk(&self) -> bool {
        self.is_disk
    }

    /// Has the host set space aside for a range of the image file, so that writing there cannot run out of it. Contents stay. Returns
    /// whether it did: a disk needs none, and some hosts cannot. The host still commits metadata of its own with the first write of
    /// each block: what is written often and synchronously should be *written* once.
    ///
    /// # Errors
    /// [`Error::NoSpace`] if the host has no room, or the host's.
    pub fn preallocate(&self, offset: u64, length: u64) -> Result<bool> {
        if self.read_only {
            return Err(Error::ReadOnly);
        }
        check_range("preallocate", self, offset, length)?;
        if self.is_disk || length == 0 {
            return Ok(false);
        }
        loop {
            return match rustix::fs::fallocate(&self.file, FallocateFlags::KEEP_SIZE, offset, length) {
                Ok(()) => Ok(true),
                Err(Errno::INTR) => continue,
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV) => Ok(false),
                Err(Errno::NOSPC | Errno::DQUOT) => Err(Error::NoSpace("the host has no room for the image file")),
                Err(errno) => Err(device_error("preallocate", self, offset, length, errno.into())),
            };
        }
    }

    fn run(&self, transfers: &mut [Transfer<'_>], landed: &mut dyn FnMut(&mut Transfer<'_>, io::Result<()>)) {
        let file = self.file.as_fd();
        match (&self.engine, transfers) {
            (_, []) => {}
            // One request is cheapest as one plain call, whatever the engine.
            (_, [transfer]) => {
                let outcome = transfer.run(file);
                landed(transfer, outcome);
            }
            (Engine::Rings(rings), transfers) => rings.run(file, transfers, landed),
            (Engine::Pool(pool), transfers) => pool.run(file, transfers, landed),
        }
    }
}

/// Returns whether it is a disk; an error if it is neither disk nor file.
fn check_kind(name: &str, metadata: &fs::Metadata) -> Result<bool> {
    let kind = metadata.file_type();
    if kind.is_file() || kind.is_block_device() {
        return Ok(kind.is_block_device());
    }
    let what = if kind.is_dir() { "a directory" } else { "not a file" };
    Err(Error::Unusable(format!("{name} is {what}: name an image file or a disk")))
}

fn resize(file: &File, path: &Path, size_bytes: u64, creation: Creation) -> Result<()> {
    let context = |error: io::Error| Error::io(format!("making {} {size_bytes} bytes long", path.display()), error);
    let length = file.metadata().map_err(context)?.len();
    if length > size_bytes && creation == Creation::Careful {
        return Err(Error::Invalid(format!(
            "{} is {length} bytes long, making it {size_bytes} would cut it off: use force if that is meant",
            path.display()
        )));
    }
    if length != size_bytes {
        file.set_len(size_bytes).map_err(context)?;
    }
    // Its size and its name are durable before anything that relies on them.
    file.sync_all().map_err(context)?;
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder.to_owned(),
        _ => PathBuf::from("."),
    };
    // A folder that may not be read cannot be synced; the file is there all the same.
    if let Ok(folder) = File::open(folder) {
        let _ = folder.sync_all();
    }
    Ok(())
}

/// What direct I/O on a file must be aligned to, in bytes.
#[derive(Clone, Copy)]
struct Direct {
    memory: usize,
    offset: u32,
}

/// Switches a file to direct I/O, if the host really does it: some accept the flag and fail the reads.
fn enable_direct(file: &File) -> Option<Direct> {
    let (memory, offset) = match rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN) {
        Ok(known) if known.stx_mask & StatxFlags::DIOALIGN.bits() != 0 => {
            (known.stx_dio_mem_align, known.stx_dio_offset_align)
        }
        _ => (0, 0),
    };
    let plain = rustix::fs::fcntl_getfl(file).ok()?;
    rustix::fs::fcntl_setfl(file, plain | OFlags::DIRECT).ok()?;
    // The host's word, or by trial.
    let candidates = if offset > 0 { vec![offset.max(512)] } else { vec![512, 4096] };
    for offset in candidates.into_iter().filter(|&offset| offset <= 4096) {
        let mut buffer = AlignedBuffer::try_zeroed(offset as usize).ok()?;
        if rustix::io::pread(file, &mut buffer[..], 0).is_ok() {
            // Below 512 nothing is gained, and a driver may be wrong about it.
            let memory = if memory > 0 { memory.clamp(512, 4096) } else { 4096 } as usize;
            return Some(Direct { memory, offset });
        }
    }
    rustix::fs::fcntl_setfl(file, plain).ok()?;
    None
}

impl BlockDevice for FileDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn block_bytes(&self) -> u32 {
        self.block_bytes
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn read_batch(&self, requests: &mut [ReadRequest<'_>], landed: &mut dyn FnMut(usize, Result<()>)) {
        order::check_held("a device read", order::OVER_READ);
        let mut transfers = Vec::with_capacity(requests.len());
        let mut ranges = Vec::with_capacity(requests.len());
        for (index, request) in requests.iter_mut().enumerate() {
            let (offset, length) = (request.offset, request.buffer.len() as u64);
            ranges.push((offset, length));
            match check_range("read", self, offset, length)
                .and_then(|()| Transfer::read(index, request, self.alignment))
            {
                Ok(transfer) => transfers.push(transfer),
                Err(error) => landed(index, Err(error)),
            }
        }
        self.run(&mut transfers, &mut |transfer, outcome| {
            transfer.deliver();
            let (offset, length) = ranges.get(transfer.request).copied().unwrap_or_default();
            landed(transfer.request, outcome.map_err(|error| device_error("read", self, offset, length, error)));
        });
    }

    fn write_batch(&self, requests: &[WriteRequest<'_>]) -> Result<()> {
        order::check_held("a device write", order::OVER_WRITE);
        if self.read_only {
            return Err(Error::ReadOnly);
        }
        let mut transfers = Vec::with_capacity(requests.len());
        for (index, request) in requests.iter().enumerate() {
            check_range("write", self, request.offset, request.length())?;
            transfers.push(Transfer::write(index, request, self.alignment)?);
        }
        let mut first = Ok(());
        self.run(&mut transfers, &mut |transfer, outcome| {
            if let (Err(error), Ok(()), Some(request)) = (outcome, &first, requests.get(transfer.request)) {
                first = Err(device_error("write", self, request.offset, request.length(), error));
            }
        });
        first
    }

    fn flush(&self) -> Result<()> {
        order::check_held("a device flush", order::OVER_WRITE);
        loop {
            return match rustix::fs::fdatasync(&self.file) {
                Ok(()) => Ok(()),
                Err(Errno::INTR) => continue,
                // A read-only host has nothing to make durable.
                Err(Errno::ROFS | Errno::INVAL) if self.read_only => Ok(()),
                Err(errno) => Err(device_error("flush", self, 0, self.size_bytes, errno.into())),
            };
        }
    }

    fn discard(&self, offset: u64, length: u64) -> Result<()> {
        order::check_held("a device discard", order::OVER_WRITE);
        if self.read_only {
            return Err(Error::ReadOnly);
        }
        check_range("discard", self, offset, length)?;
        if length == 0 || !self.discards.load(Ordering::Relaxed) {
            return Ok(());
        }
        loop {
            let outcome = if self.is_disk {
                // SAFETY: BLKDISCARD takes a pointer to two u64: start and length in bytes.
                unsafe {
                    rustix::ioctl::ioctl(
                        &self.file,
                        rustix::ioctl::Setter::<BLKDISCARD, [u64; 2]>::new([offset, length]),
                    )
                }
            } else {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                rustix::fs::fallocate(&self.file, flags, offset, length)
            };
            return match outcome {
                Ok(()) => Ok(()),
                Err(Errno::INTR) => continue,
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV | Errno::NOTTY) => {
                    self.discards.store(false, Ordering::Relaxed);
                    Ok(())
                }
                Err(errno) => Err(device_error("discard", self, offset, length, errno.into())),
            };
        }
    }
}

#[cfg(test)]
#[path = "file_tests.rs"]
mod tests;
