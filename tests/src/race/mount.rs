//! The race on a mount: the system calls of programs, the kernel's page cache, its readahead and its page faults, and the daemon behind them.
//!
//! - Readers: sequential reads, `POSIX_FADV_WILLNEED` and a read, `POSIX_FADV_DONTNEED` and a read, reads of a mapping (through pwrite(2), which says how
//!   far it came where looking would be SIGBUS), splice into a pipe, `O_DIRECT` reads.
//! - Changes: those of `change`. Collapse and insert as `coppice collapse` and `insert` make them, by the same library function.
//! - Beside them: fsync of the racing files; and files that are written, fsynced, renamed over each other and removed, with what an old one holds
//!   compared before it goes. The rest of the image is full, so that what is freed is what is taken.
//!
//! What must hold depends on who answers. With `cache=daemon` read(2) gets its bytes from us in one piece. Mappings and splice have
//! the kernel's page cache in every mode, and with the other modes all reads have: such pages may be torn by the kernel itself, so each byte counts.
//! (An O_DIRECT read that comes to the kernel's end of the file goes on in its page cache, so it counts as one of that.) No stale page is
//! allowed anywhere: what had ended when a read began is not seen again.
//!
//! No operation may fail, for want of space neither: there is more than all files together take at any time. There is no option against discards, but
//! so little is free that nothing is discarded: the filesystem keeps that many emptied buckets as they are.

use std::fs::{self, File};
use std::io::{self, Read};
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use coppicefs::fuse::client;
use coppicefs::memory::AlignedBuffer;
use rand_xoshiro::rand_core::Rng;
use rustix::fs::{Advice, FallocateFlags, MemfdFlags, OFlags, fadvise, fallocate, memfd_create};
use rustix::pipe::{SpliceFlags, pipe, splice};

use super::change::Change;
use super::history::{RacingFile, Shown, Source, describe, stamp};
use super::{Actor, BLOCK, BLOCKS, CHURN, FILES, GRACE, Stage, Watchdog, lock};

const FILE_BYTES: usize = (BLOCKS * BLOCK) as usize;
/// Blocks of one read at most.
const READ_BLOCKS: u64 = 8;
const READERS: usize = 3;
const CHURNERS: usize = 2;
/// Files that a churning thread keeps, and their blocks at most.
const CHURN_FILES: usize = 8;
const CHURN_BLOCKS: u64 = 16;
/// What is left free for all of this; the files take at most a third of it at once.
pub const SPARE_BYTES: u64 = 4 << 20;

/// A file that is mapped for reading. What needs `unsafe` is with the tests that give it.
pub trait Mapped {
    /// Writes a range of the mapping to the start of a file with pwrite(2), and returns how far that came: not at all where the first page cannot be had.
    ///
    /// # Errors
    /// Anything but `EFAULT`.
    fn copy_to(&self, range: Range<usize>, target: &File) -> io::Result<usize>;

    /// Takes the pages out of this process's tables: the next access faults.
    fn forget(&self);
}

/// Maps so many bytes of a file, from its start on. The file may be shorter.
pub type Map = fn(&File, usize) -> Box<dyn Mapped>;

/// How one race goes.
#[derive(Clone, Copy, Debug)]
pub struct MountRace {
    /// How long, at least: it goes on until every way of reading and every kind of change was there.
    pub duration: Duration,
    /// Whether the mount has `cache=daemon`: then reads are whole.
    pub is_daemons_cache: bool,
    /// Seed of what the threads do; their order is the host's.
    pub seed: u64,
}

/// What a race did.
#[derive(Clone, Debug, Default)]
pub struct MountReport {
    /// Reads that were compared, by the way of reading.
    pub reads: Vec<(&'static str, u64)>,
    /// Changes of racing files, by kind.
    pub changes: Vec<(&'static str, u64)>,
    /// Files written, replaced or removed beside them.
    pub churned: u64,
}

/// The racing files as they must be from now on.
pub struct Left(Vec<RacingFile>);

/// Ways of reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Sequential,
    WillNeed,
    Uncached,
    Mapping,
    Splice,
    Direct,
}

const WAYS: [(Way, &str); 6] = [
    (Way::Sequential, "sequential"),
    (Way::WillNeed, "readahead"),
    (Way::Uncached, "uncached"),
    (Way::Mapping, "mapping"),
    (Way::Splice, "splice"),
    (Way::Direct, "direct"),
];

/// What one thread does until the race is over.
type Work<'a> = Box<dyn FnOnce(&mut Actor<'_>) -> io::Result<()> + Send + 'a>;

struct Race {
    options: MountRace,
    folder: PathBuf,
    map: Map,
    files: Vec<RacingFile>,
    stage: Arc<Stage>,
    reads: [AtomicU64; WAYS.len()],
    changes: [AtomicU64; Change::KINDS.len()],
    churned: AtomicU64,
}

/// A racing file as one reader has it.
struct Reader<'a> {
    file: &'a RacingFile,
    buffered: File,
    direct: File,
    mapped: Box<dyn Mapped>,
    sequential: u64,
}

fn open(path: &Path, writes: bool, direct: bool) -> io::Result<File> {
    let flags = if direct { OFlags::DIRECT.bits().cast_signed() } else { 0 };
    File::options().read(true).write(writes).custom_flags(flags).open(path)
}

fn advise(file: &File, offset: u64, length: u64, advice: Advice) -> io::Result<()> {
    Ok(fadvise(file, offset, NonZeroU64::new(length), advice)?)
}

/// One read(2), into memory that O_DIRECT accepts.
fn read_once(file: &File, offset: u64, length: u64) -> io::Result<Vec<u8>> {
    let mut buffer = AlignedBuffer::zeroed(length as usize);
    let read = file.read_at(&mut buffer, offset)?;
    Ok(buffer.get(..read).unwrap_or_default().to_vec())
}

/// One splice(2), and what the pipe then has.
fn splice_once(file: &File, offset: u64, length: u64) -> io::Result<Vec<u8>> {
    let (output, input) = pipe()?;
    let mut offset = offset;
    splice(file, Some(&mut offset), &input, None, length as usize, SpliceFlags::empty())?;
    drop(input);
    let mut bytes = Vec::new();
    File::from(output).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn whole_write(written: usize, wanted: usize) -> io::Result<()> {
    if written == wanted { Ok(()) } else { Err(io::Error::other(format!("{written} bytes of {wanted} were written"))) }
}

impl Race {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Runs one thread's work over and over until the race is over; an error of it is the race's.
    fn repeat(&self, actor: &mut Actor<'_>, what: &str, mut once: impl FnMut(&mut Actor<'_>) -> Result<(), String>) {
        while !self.stage.is_over() {
            if let Err(wrong) = once(actor) {
                self.stage.fail(format!("{what}: {wrong}"));
            }
        }
    }

    /// The one thread that changes a racing file.
    fn change(&self, actor: &mut Actor<'_>, file: &RacingFile) -> io::Result<()> {
        let path = self.path(&racing_name(file.number));
        let (buffered, direct) = (open(&path, true, false)?, open(&path, true, true)?);
        self.repeat(actor, "a change", |actor| {
            let Some(change) = Change::pick(actor, file.size()) else { return Ok(()) };
            let described = format!("{change:?} of file {} of {} bytes", file.number, file.size());
            let (operation, data) = change.begin(file);
            actor.says(format!("operation {operation}, {described}"));
            let outcome = match &change {
                Change::Collapse(range) => {
                    client::collapse_range(&path, range.start * BLOCK, (range.end - range.start) * BLOCK)
                        .map_err(|error| error.to_string())
                }
                Change::Insert(range) => {
                    client::insert_range(&path, range.start * BLOCK, (range.end - range.start) * BLOCK)
                        .map_err(|error| error.to_string())
                }
                Change::Write { direct: true, .. } => apply(&direct, &change, &data).map_err(|error| error.to_string()),
                _ => apply(&buffered, &change, &data).map_err(|error| error.to_string()),
            };
            outcome.map_err(|error| format!("{described}: {error}"))?;
            file.end(operation);
            count(&self.changes, change.kind());
            Ok(())
        });
        Ok(())
    }

    /// Reads racing files in every way that there is.
    fn read(&self, actor: &mut Actor<'_>) -> io::Result<()> {
        let mut readers = Vec::new();
        for file in &self.files {
            let path = self.path(&racing_name(file.number));
            let (buffered, direct) = (open(&path, false, false)?, open(&path, false, true)?);
            let mapped = (self.map)(&buffered, FILE_BYTES);
            readers.push(Reader { file, buffered, direct, mapped, sequential: 0 });
        }
        let scratch = File::from(memfd_create("mapped", MemfdFlags::CLOEXEC)?);
        self.repeat(actor, "a read", |actor| {
            let (at, index) = (actor.below(FILES) as usize, actor.below(WAYS.len() as u64) as usize);
            let (Some(reader), Some(&(way, name))) = (readers.get_mut(at), WAYS.get(index)) else { return Ok(()) };
            self.read_one(actor, reader, way, &scratch).map_err(|wrong| format!("{name}: {wrong}"))?;
            count(&self.reads, index);
            Ok(())
        });
        Ok(())
    }

    fn read_one(&self, actor: &mut Actor<'_>, reader: &mut Reader<'_>, way: Way, scratch: &File) -> Result<(), String> {
        let file = reader.file;
        let blocks = 1 + actor.below(READ_BLOCKS);
        let offset = if way == Way::Sequential { reader.sequential } else { actor.below(BLOCKS) * BLOCK };
        let length = (blocks * BLOCK).min(BLOCKS * BLOCK - offset);
        if way == Way::Sequential {
            reader.sequential = (offset + length) % (BLOCKS * BLOCK);
        }
        let forgets = actor.below(2) == 0;
        actor.says(format!("{way:?} read of {length} bytes at {offset} of file {}", file.number));
        let from = file.ended();
        let bytes = match way {
            Way::Sequential => read_once(&reader.buffered, offset, length),
            Way::WillNeed => advise(&reader.buffered, offset, length, Advice::WillNeed)
                .and_then(|()| read_once(&reader.buffered, offset, length)),
            Way::Uncached => advise(&reader.buffered, offset, length, Advice::DontNeed)
                .and_then(|()| read_once(&reader.buffered, offset, length)),
            Way::Splice => splice_once(&reader.buffered, offset, length),
            Way::Direct => read_once(&reader.direct, offset, length),
            Way::Mapping => {
                if forgets {
                    reader.mapped.forget();
                }
                read_mapping(&*reader.mapped, offset, length, scratch)
            }
        };
        let to = file.begun();
        let bytes = bytes.map_err(|error| format!("{length} bytes at {offset} of file {}: {error}", file.number))?;
        let source = match way {
            Way::Mapping => Source::Mapping,
            // Linux splices from its page cache, FOPEN_DIRECT_IO or not.
            Way::Splice => Source::PageCache,
            _ if self.options.is_daemons_cache => Source::Filesystem,
            _ => Source::PageCache,
        };
        file.check(&Shown { offset, wanted: length, bytes: &bytes, from, to, source })
    }

    /// Makes racing files durable; drops what the kernel has of them.
    fn sync(&self, actor: &mut Actor<'_>) -> io::Result<()> {
        let paths = self.files.iter().map(|file| self.path(&racing_name(file.number)));
        let files = paths.map(|path| open(&path, true, false)).collect::<io::Result<Vec<_>>>()?;
        self.repeat(actor, "fsync", |actor| {
            let (Some(file), data_only) = (files.get(actor.below(FILES) as usize), actor.below(2) == 0) else {
                return Ok(());
            };
            actor.says("fsync".into());
            let synced = if data_only { file.sync_data() } else { file.sync_all() };
            synced.and_then(|()| advise(file, 0, 0, Advice::DontNeed)).map_err(|error| error.to_string())
        });
        Ok(())
    }

    /// Takes what is freed as fast as it can: files that are written, synced, renamed over each other and removed.
    fn churn(&self, actor: &mut Actor<'_>) -> io::Result<()> {
        let mut kept: Vec<Option<Vec<u8>>> = vec![None; CHURN_FILES];
        let mut round = 0;
        self.repeat(actor, "churn", |actor| {
            round += 1;
            let slot = actor.below(CHURN_FILES as u64);
            let Some(kept) = kept.get_mut(slot as usize) else { return Ok(()) };
            self.churn_once(actor, slot, round, kept)?;
            self.churned.fetch_add(1, Ordering::Relaxed);
            Ok(())
        });
        Ok(())
    }

    fn churn_once(
        &self,
        actor: &mut Actor<'_>,
        slot: u64,
        round: u64,
        kept: &mut Option<Vec<u8>>,
    ) -> Result<(), String> {
        let old = self.path(&format!("old{}-{slot}", actor.number));
        let new = self.path(&format!("new{}", actor.number));
        let failed = |what: &str| {
            let text = format!("{what} {}", old.display());
            move |error: io::Error| format!("{text}: {error}")
        };
        if let Some(content) = kept {
            actor.says(format!("look at {}", old.display()));
            let direct = actor.below(2) == 0;
            let found = open(&old, false, direct).and_then(|file| {
                advise(&file, 0, 0, Advice::DontNeed)?;
                read_once(&file, 0, (CHURN_BLOCKS + 1) * BLOCK)
            });
            compare(&found.map_err(failed("reading"))?, content)
                .map_err(|wrong| format!("{}: {wrong}", old.display()))?;
        }
        let (number, blocks) = (CHURN + actor.number as u64, 1 + actor.below(CHURN_BLOCKS));
        let data: Vec<u8> = (0..blocks).flat_map(|block| stamp(number, block, round)).collect();
        actor.says(format!("churn {blocks} blocks over {}", old.display()));
        let file = File::options().create_new(true).read(true).write(true).open(&new).map_err(failed("creating"))?;
        file.write_at(&data, 0).and_then(|written| whole_write(written, data.len())).map_err(failed("writing"))?;
        if actor.below(2) == 0 {
            file.sync_all().map_err(failed("fsync of"))?;
        }
        let found = read_once(&file, 0, (CHURN_BLOCKS + 1) * BLOCK).map_err(failed("reading"))?;
        compare(&found, &data).map_err(|wrong| format!("{}: {wrong}", new.display()))?;
        drop(file);
        if actor.below(4) == 0 {
            fs::remove_file(&new).map_err(failed("removing before"))?;
        } else {
            fs::rename(&new, &old).map_err(failed("renaming over"))?;
            *kept = Some(data);
        }
        Ok(())
    }

    fn has_seen_all(&self) -> bool {
        let has_been = |count: &AtomicU64| count.load(Ordering::Relaxed) > 0;
        self.reads.iter().all(has_been) && self.changes.iter().all(has_been) && has_been(&self.churned)
    }

    fn run_threads(&self) {
        let mut works: Vec<Work<'_>> = Vec::new();
        for file in &self.files {
            works.push(Box::new(move |actor| self.change(actor, file)));
        }
        for _ in 0..READERS {
            works.push(Box::new(|actor| self.read(actor)));
        }
        for _ in 0..CHURNERS {
            works.push(Box::new(|actor| self.churn(actor)));
        }
        works.push(Box::new(|actor| self.sync(actor)));
        let start = Instant::now();
        std::thread::scope(|scope| {
            for (number, work) in works.into_iter().enumerate() {
                scope.spawn(move || {
                    let mut actor = Actor::new(&self.stage, number, self.options.seed);
                    if let Err(error) = work(&mut actor) {
                        self.stage.fail(format!("thread {number} could not begin: {error}"));
                    }
                    actor.says(String::new());
                });
            }
            while !self.stage.is_over() && (start.elapsed() < self.options.duration || !self.has_seen_all()) {
                std::thread::park_timeout(Duration::from_millis(10));
            }
            self.stage.end();
        });
    }

    fn report(&self) -> MountReport {
        let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
        MountReport {
            reads: WAYS.iter().map(|(_, name)| *name).zip(self.reads.iter().map(load)).collect(),
            changes: Change::KINDS.into_iter().zip(self.changes.iter().map(load)).collect(),
            churned: load(&self.churned),
        }
    }
}

fn racing_name(number: u64) -> String {
    format!("file{number}")
}

fn count(counters: &[AtomicU64], index: usize) {
    if let Some(counter) = counters.get(index) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

fn compare(found: &[u8], expected: &[u8]) -> Result<(), String> {
    if found.len() != expected.len() {
        return Err(format!("it is {} bytes long, not {}", found.len(), expected.len()));
    }
    let mut blocks = found.chunks(BLOCK as usize).zip(expected.chunks(BLOCK as usize)).enumerate();
    match blocks.find(|(_, (found, expected))| found != expected) {
        Some((index, (found, expected))) => {
            Err(format!("block {index} is {}; it was {}", describe(found), describe(expected)))
        }
        None => Ok(()),
    }
}

/// Reads whole pages of a mapping, as far as the kernel can have them.
fn read_mapping(mapped: &dyn Mapped, offset: u64, length: u64, scratch: &File) -> io::Result<Vec<u8>> {
    let copied = mapped.copy_to(offset as usize..(offset + length) as usize, scratch)?;
    let mut bytes = vec![0; copied];
    scratch.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// All changes but collapse and insert.
fn apply(file: &File, change: &Change, data: &[u8]) -> io::Result<()> {
    let allocate = |range: &Range<u64>, flags: FallocateFlags, keeps_size: bool| {
        let flags = if keeps_size { flags | FallocateFlags::KEEP_SIZE } else { flags };
        fallocate(file, flags, range.start * BLOCK, (range.end - range.start) * BLOCK)
    };
    match change {
        Change::Write { range, direct } => {
            let aligned;
            let data = if *direct {
                aligned = AlignedBuffer::copy_of(data).map_err(io::Error::other)?;
                &*aligned
            } else {
                data
            };
            whole_write(file.write_at(data, range.start * BLOCK)?, data.len())
        }
        Change::Punch(range) => Ok(allocate(range, FallocateFlags::PUNCH_HOLE, true)?),
        Change::Zero { range, keeps_size } => Ok(allocate(range, FallocateFlags::ZERO_RANGE, *keeps_size)?),
        Change::Allocate { range, keeps_size } => Ok(allocate(range, FallocateFlags::empty(), *keeps_size)?),
        Change::Truncate(size) => file.set_len(*size),
        Change::Collapse(_) | Change::Insert(_) => Err(io::Error::other("not by one system call")),
    }
}

/// Fills a new filesystem with bytes that no compression makes fewer, but for [`SPARE_BYTES`].
///
/// # Errors
/// Of the filesystem.
pub fn fill(folder: &Path, available_bytes: u64, seed: u64) -> io::Result<()> {
    let stage = Stage::new();
    let mut random = Actor::new(&stage, 0, seed).random;
    let mut bytes = vec![0; available_bytes.saturating_sub(SPARE_BYTES) as usize];
    random.fill_bytes(&mut bytes);
    let file = File::create(folder.join("filler"))?;
    whole_write(file.write_at(&bytes, 0)?, bytes.len())?;
    file.sync_all()
}

/// Races in the root of a mount, which is new. If it does not end, `rescue` is called: it must have every system call on the mount return.
///
/// # Errors
/// What was seen that no order of the operations explains; an error of an operation; a race that does not end.
pub fn run(
    folder: &Path,
    options: MountRace,
    map: Map,
    rescue: impl FnOnce() + Send + 'static,
) -> Result<(MountReport, Left), String> {
    let files = (0..FILES).map(RacingFile::new).collect();
    let zeros = || AtomicU64::new(0);
    let race = Race {
        options,
        folder: folder.to_owned(),
        map,
        files,
        stage: Arc::new(Stage::new()),
        reads: std::array::from_fn(|_| zeros()),
        changes: std::array::from_fn(|_| zeros()),
        churned: zeros(),
    };
    for file in &race.files {
        File::create_new(race.path(&racing_name(file.number))).map_err(|error| format!("creating: {error}"))?;
    }
    let stage = Arc::clone(&race.stage);
    let watchdog = Watchdog::new(options.duration + GRACE, move || {
        let doing = stage.describe();
        stage.fail(format!("the race has not ended {GRACE:?} after its time\n{doing}"));
        eprintln!("the race has not ended {GRACE:?} after its time: {options:?}\n{doing}");
        rescue();
    });
    race.run_threads();
    drop(watchdog);
    let wrong = lock(&race.stage.wrong).take();
    wrong.map_or_else(|| Ok((race.report(), Left(race.files))), Err)
}

impl Left {
    /// Whether the racing files in a folder are what the last operations left.
    ///
    /// # Errors
    /// What is different, or cannot be read.
    pub fn check(&self, folder: &Path) -> Result<(), String> {
        for file in &self.0 {
            let path = folder.join(racing_name(file.number));
            let bytes = fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
            let (from, to, wanted) = (file.ended(), file.begun(), BLOCKS * BLOCK);
            file.check(&Shown { offset: 0, wanted, bytes: &bytes, from, to, source: Source::Filesystem })?;
        }
        Ok(())
    }
}
