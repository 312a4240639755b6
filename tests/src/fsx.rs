//! Random operations on one file, in this process, against a plain array of bytes: what fsx does on a mount, with reopening, crashes after fsync and a
//! cache that is smaller than the file.
//!
//! One thread and [`Env::simulated`]: one seed is one run, workers included.

use std::ffi::OsStr;
use std::sync::Arc;

use coppicefs::device::{BlockDevice, MemDevice};
use coppicefs::env::Env;
use coppicefs::filesystem::format::test_geometry;
use coppicefs::filesystem::{Filesystem, OpenOptions, WorkerSet};
use coppicefs::options::CompressionChoice;
use coppicefs::vfs::{Caller, CopyRequest, ReadRequest, Seek, SetAttributes, Vfs, WriteRequest};
use coppicefs::{Error, Result};
use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};
use rustix::io::Errno;

const ROOT: u64 = 1;
const READ_WRITE: i32 = 2;
const CALLER: Caller = Caller { uid: 0, gid: 0, pid: 1, umask: 0 };
const NAME: &str = "fsx";
/// Longest file in bytes.
const FILE_BYTES_MAX: u64 = 256 << 10;
/// Longest operation in bytes.
const OPERATION_BYTES_MAX: u64 = 64 << 10;
const BLOCK: u64 = 4096;
/// Operations that are told when something differs.
const TOLD: usize = 12;

const KEEP_SIZE: i32 = 1;
const PUNCH_HOLE: i32 = 2;
const ZERO_RANGE: i32 = 0x10;

/// What is run.
#[derive(Clone, Copy, Debug)]
pub struct FsxOptions {
    /// Seed of the operations and of the workers.
    pub seed: u64,
    /// How many operations.
    pub operations: u64,
    /// Compression of file data.
    pub compression: CompressionChoice,
}

struct Fsx {
    options: FsxOptions,
    random: Xoshiro256PlusPlus,
    device: Arc<MemDevice>,
    filesystem: Arc<Filesystem>,
    env: Arc<Env>,
    /// Mounts so far.
    mounts: u64,
    node: u64,
    handle: u64,
    /// What the file holds.
    model: Vec<u8>,
    /// The last operations, newest last.
    told: Vec<String>,
    /// Counts the writes, so that each has bytes of its own.
    writes: u64,
}

/// Runs the operations.
///
/// # Errors
/// The first difference, with the operations before it; an error of an operation; what fsck finds at the end.
pub fn run(options: FsxOptions) -> std::result::Result<(), String> {
    let mut fsx = Fsx::new(options).map_err(|error| error.to_string())?;
    for number in 0..options.operations {
        let outcome = fsx.step().and_then(|()| if number % 64 == 0 { fsx.compare_all() } else { Ok(()) });
        if let Err(error) = outcome {
            return Err(format!("{options:?}, operation {number}: {error}\n{}", fsx.told.join("\n")));
        }
    }
    fsx.end().map_err(|error| format!("{options:?}, at the end: {error}\n{}", fsx.told.join("\n")))
}

fn difference(what: String) -> Error {
    Error::Bug(what)
}

impl Fsx {
    fn new(options: FsxOptions) -> Result<Self> {
        let device = Arc::new(MemDevice::new(16 << 20));
        let as_device: Arc<dyn BlockDevice> = device.clone();
        Filesystem::format(&as_device, &test_geometry(), &Env::simulated(options.seed))?;
        let random = Xoshiro256PlusPlus::seed_from_u64(options.seed);
        let (filesystem, env) = open(&device, &options, 0)?;
        let (entry, opened) = filesystem.vfs().create(&CALLER, ROOT, OsStr::new(NAME), 0o644, READ_WRITE)?;
        Ok(Self {
            options,
            random,
            device,
            filesystem,
            env,
            mounts: 1,
            node: entry.attributes.node,
            handle: opened.handle,
            model: Vec::new(),
            told: Vec::new(),
            writes: 0,
        })
    }

    fn vfs(&self) -> &Vfs {
        self.filesystem.vfs()
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.random.next_u64() % limit.max(1)
    }

    fn tell(&mut self, what: String) {
        if self.told.len() == TOLD {
            self.told.remove(0);
        }
        self.told.push(format!("{what} (size {})", self.model.len()));
    }

    /// A range below `limit`, on blocks now and then.
    fn range(&mut self, limit: u64) -> (usize, usize) {
        let (mut start, mut length) = (self.below(limit), 1 + self.below(OPERATION_BYTES_MAX));
        match self.below(4) {
            0 => (start, length) = (start / BLOCK * BLOCK, length.div_ceil(BLOCK) * BLOCK),
            1 => length = 1 + length % BLOCK,
            _ => {}
        }
        (start as usize, (start + length).min(limit) as usize)
    }

    fn step(&mut self) -> Result<()> {
        match self.below(100) {
            0..20 => self.read(),
            20..45 => self.write(),
            45..53 => self.truncate(),
            53..61 => self.hole(),
            61..66 => self.shift(),
            66..71 => self.allocate(),
            71..76 => self.copy(),
            76..84 => self.seek(),
            84..90 => self.sync(),
            90..96 => {
                self.tell("evict".into());
                self.filesystem.cache().evict_all_clean();
                Ok(())
            }
            96..98 => {
                self.tell("let workers run".into());
                for _ in 0..20 {
                    self.env.step_random_worker()?;
                    self.env.advance_clock();
                }
                Ok(())
            }
            98 => self.remount(),
            _ => self.crash(),
        }
    }

    fn read_at(&self, offset: u64, length: u64, direct: bool) -> Result<Vec<u8>> {
        let length_bytes = u32::try_from(length).unwrap_or(u32::MAX);
        let request = ReadRequest { node: self.node, handle: self.handle, offset, length_bytes, direct };
        Ok(self.vfs().read(&CALLER, &request)?.to_vec())
    }

    fn read(&mut self) -> Result<()> {
        let (start, end) = self.range(FILE_BYTES_MAX);
        let direct = self.below(3) == 0;
        self.tell(format!("read {start}..{end}, direct {direct}"));
        let found = self.read_at(start as u64, (end - start) as u64, direct)?;
        let expected = self.model.get(start..end.min(self.model.len())).unwrap_or_default();
        compare(start, expected, &found)
    }

    fn compare_all(&mut self) -> Result<()> {
        let found = self.read_at(0, FILE_BYTES_MAX, false)?;
        compare(0, &self.model, &found)?;
        let size = self.vfs().get_attributes(&CALLER, self.node, None)?.size_bytes;
        if size != self.model.len() as u64 {
            return Err(difference(format!("a size of {size} instead of {}", self.model.len())));
        }
        Ok(())
    }

    fn write(&mut self) -> Result<()> {
        let append = self.below(5) == 0;
        let limit = if self.below(2) == 0 { FILE_BYTES_MAX } else { self.model.len() as u64 };
        let (mut start, mut end) = self.range(limit);
        if append {
            (start, end) = (self.model.len(), (self.model.len() + end - start).min(FILE_BYTES_MAX as usize));
        }
        if start >= end {
            return Ok(());
        }
        let direct = self.below(3) == 0;
        self.writes += 1;
        // Half of it can be compressed; no byte is zero.
        let seed = self.writes;
        let noisy = seed.is_multiple_of(2);
        let byte = |index: usize| {
            let mixed = (index as u64 + seed).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56;
            (if noisy { mixed } else { seed + index as u64 / 512 }) as u8 | 1
        };
        let data: Vec<u8> = (start..end).map(byte).collect();
        self.tell(format!("write {start}..{end}, append {append}, direct {direct}"));
        let request = WriteRequest { direct, append, ..WriteRequest::new(self.node, self.handle, start as u64, &data) };
        let written = self.vfs().write(&CALLER, &request)?;
        if written as usize != data.len() {
            return Err(difference(format!("{written} bytes written of {}", data.len())));
        }
        self.grow(end);
        if let Some(target) = self.model.get_mut(start..end) {
            target.copy_from_slice(&data);
        }
        Ok(())
    }

    fn grow(&mut self, end: usize) {
        if end > self.model.len() {
            self.model.resize(end, 0);
        }
    }

    fn truncate(&mut self) -> Result<()> {
        let (size, _) = self.range(FILE_BYTES_MAX);
        let size = if self.below(8) == 0 { self.below(3000) as usize } else { size };
        self.tell(format!("truncate to {size}"));
        let changes = SetAttributes { size_bytes: Some(size as u64), ..SetAttributes::default() };
        self.vfs().set_attributes(&CALLER, self.node, &changes)?;
        self.model.resize(size, 0);
        Ok(())
    }

    fn fallocate(&mut self, start: usize, end: usize, mode: i32) -> Result<()> {
        self.vfs().fallocate(&CALLER, self.node, self.handle, start as u64, (end - start) as u64, mode)
    }

    fn hole(&mut self) -> Result<()> {
        let (start, end) = self.range(FILE_BYTES_MAX);
        if start >= end {
            return Ok(());
        }
        let (mode, grows) = match self.below(4) {
            0 => (ZERO_RANGE, true),
            1 => (ZERO_RANGE | KEEP_SIZE, false),
            _ => (PUNCH_HOLE | KEEP_SIZE, false),
        };
        self.tell(format!("fallocate {mode:#x} {start}..{end}"));
        self.fallocate(start, end, mode)?;
        if grows {
            self.grow(end);
        }
        let end = end.min(self.model.len());
        if let Some(zeroed) = self.model.get_mut(start..end) {
            zeroed.fill(0);
        }
        Ok(())
    }

    /// Collapse or insert: refused as the kernel refuses it where the range is not whole blocks, reaches the end, or makes the file too long.
    fn shift(&mut self) -> Result<()> {
        let (start, end) = self.range(FILE_BYTES_MAX);
        let collapses = self.below(2) == 0;
        let size = self.model.len();
        let (offset, length) = (start as u64, end.saturating_sub(start) as u64);
        if !collapses && size + end.saturating_sub(start) > FILE_BYTES_MAX as usize {
            return Ok(());
        }
        let what = if collapses { "collapse" } else { "insert" };
        self.tell(format!("{what} {start}..{end}"));
        let is_whole = length > 0 && offset.is_multiple_of(BLOCK) && length.is_multiple_of(BLOCK);
        let is_inside = if collapses { end < size } else { start < size };
        let outcome = if collapses {
            self.vfs().collapse_range(self.node, self.handle, offset, length)
        } else {
            self.vfs().insert_range(self.node, self.handle, offset, length)
        };
        if !is_whole || !is_inside {
            return match outcome {
                Err(Error::Posix(Errno::INVAL)) => Ok(()),
                outcome => Err(difference(format!("{what} should be refused: {outcome:?}"))),
            };
        }
        outcome?;
        if collapses {
            self.model.drain(start..end);
        } else {
            self.model.splice(start..start, std::iter::repeat_n(0, end - start));
        }
        Ok(())
    }

    fn allocate(&mut self) -> Result<()> {
        let (start, end) = self.range(FILE_BYTES_MAX);
        if start >= end {
            return Ok(());
        }
        let mode = if self.below(2) == 0 { KEEP_SIZE } else { 0 };
        self.tell(format!("fallocate {mode:#x} {start}..{end}"));
        self.fallocate(start, end, mode)?;
        if mode == 0 {
            self.grow(end);
        }
        Ok(())
    }

    fn copy(&mut self) -> Result<()> {
        let (start, end) = self.range(self.model.len() as u64);
        let target = self.below(FILE_BYTES_MAX) as usize;
        let length = end.saturating_sub(start).min(FILE_BYTES_MAX as usize - target);
        if length == 0 || (start < target + length && target < start + length) {
            return Ok(());
        }
        self.tell(format!("copy {length} bytes at {start} to {target}"));
        let request = CopyRequest {
            source_node: self.node,
            source_handle: self.handle,
            source_offset: start as u64,
            target_node: self.node,
            target_handle: self.handle,
            target_offset: target as u64,
            length_bytes: length as u64,
        };
        let copied = self.vfs().copy_file_range(&CALLER, &request)?;
        if copied != length as u64 {
            return Err(difference(format!("{copied} bytes copied of {length}")));
        }
        self.grow(target + length);
        self.model.copy_within(start..start + length, target);
        Ok(())
    }

    /// What is said to be a hole is zeros; what is skipped on the way to data is zeros.
    fn seek(&mut self) -> Result<()> {
        let size = self.model.len();
        let offset = self.below(size as u64 + BLOCK) as usize;
        let what = if self.below(2) == 0 { Seek::Data } else { Seek::Hole };
        self.tell(format!("seek {what:?} from {offset}"));
        let found = match self.vfs().seek(&CALLER, self.node, self.handle, offset as u64, what) {
            Ok(found) => found as usize,
            Err(Error::Posix(Errno::NXIO)) if offset >= size || what == Seek::Data => size.max(offset),
            Err(error) => return Err(error),
        };
        if found < offset || found > size.max(offset) {
            return Err(difference(format!("found at {found}")));
        }
        let zeros = match what {
            Seek::Data => offset..found,
            // To the end of its block.
            Seek::Hole => found..(found + 1).next_multiple_of(BLOCK as usize).min(size),
        };
        match self.model.get(zeros.clone()) {
            Some(bytes) if bytes.iter().any(|&byte| byte != 0) => {
                Err(difference(format!("{zeros:?} is called a hole and holds data")))
            }
            _ => Ok(()),
        }
    }

    fn sync(&mut self) -> Result<()> {
        let data_only = self.below(2) == 0;
        self.tell(format!("fsync, data only {data_only}"));
        self.vfs().fsync(&CALLER, self.node, self.handle, data_only)
    }

    fn remount(&mut self) -> Result<()> {
        self.tell("remount".into());
        self.filesystem.close()?;
        self.open()
    }

    /// What was fsynced is there after a death that nothing prepared.
    fn crash(&mut self) -> Result<()> {
        self.tell("fsync and crash".into());
        self.vfs().fsync(&CALLER, self.node, self.handle, false)?;
        self.device = Arc::new(MemDevice::from_image(self.device.image(), false));
        self.filesystem.vfs().latch("crash");
        // A latched filesystem writes nothing more, and says so.
        let _ = self.filesystem.close();
        self.open()
    }

    fn open(&mut self) -> Result<()> {
        (self.filesystem, self.env) = open(&self.device, &self.options, self.mounts)?;
        self.mounts += 1;
        let entry = match self.vfs().lookup(&CALLER, ROOT, OsStr::new(NAME))? {
            coppicefs::vfs::Lookup::Found(entry) => entry,
            coppicefs::vfs::Lookup::Absent => return Err(difference("the file is gone".into())),
        };
        self.node = entry.attributes.node;
        self.handle = self.vfs().open(&CALLER, self.node, READ_WRITE)?.handle;
        self.compare_all()
    }

    fn end(&mut self) -> Result<()> {
        self.compare_all()?;
        self.filesystem.close()?;
        let env = Env::simulated(1);
        let options =
            OpenOptions { read_only: true, workers: WorkerSet::Essential, env: Some(env), ..OpenOptions::default() };
        let filesystem = Filesystem::open(vec![Arc::clone(&self.device) as _], &options)?;
        let report = coppicefs_fsck::check(&filesystem, &|_, _, _, _| {})?;
        filesystem.close()?;
        match report.problems.first() {
            Some(problem) => Err(difference(format!("fsck: {}", problem.describe()))),
            None => Ok(()),
        }
    }
}

impl Drop for Fsx {
    fn drop(&mut self) {
        // The workers hold the filesystem, and the scheduler holds them.
        self.env.unregister_all();
    }
}

fn open(device: &Arc<MemDevice>, options: &FsxOptions, mount: u64) -> Result<(Arc<Filesystem>, Arc<Env>)> {
    let env = Env::simulated(options.seed.wrapping_mul(1000).wrapping_add(mount));
    let open_options = OpenOptions {
        // Less than the file for pages, so that reads and writes evict.
        cache_bytes: 1 << 20,
        compression: Some(options.compression),
        env: Some(Arc::clone(&env)),
        writeback_age: std::time::Duration::from_millis(200),
        ..OpenOptions::default()
    };
    Ok((Filesystem::open(vec![Arc::clone(device) as _], &open_options)?, env))
}

fn compare(start: usize, expected: &[u8], found: &[u8]) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    let at = expected.iter().zip(found).position(|(a, b)| a != b).unwrap_or(expected.len().min(found.len()));
    Err(difference(format!(
        "{} bytes instead of {}; the first difference at {}: {:?} instead of {:?}",
        found.len(),
        expected.len(),
        start + at,
        found.get(at),
        expected.get(at)
    )))
}
