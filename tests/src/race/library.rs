//! The race in this process: the library, on a device in memory, with no kernel in between.
//!
//! Here every read is whole: each block is one state's. What ways of reading there are: through the cache, sequential ones for readahead, with all
//! that is clean evicted first, direct, and by copying to another file. Of the deliberate faults, an add lock that
//! excludes nobody must be noticed here.

use std::ffi::OsStr;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use coppicefs::device::{BlockDevice, MemDevice};
use coppicefs::env::Env;
use coppicefs::filesystem::format::test_geometry;
use coppicefs::filesystem::{Filesystem, OpenOptions, WorkerSet};
use coppicefs::options::CompressionChoice;
use coppicefs::space::TestSwitches;
use coppicefs::vfs::{Caller, CopyRequest, ReadRequest, SetAttributes, Vfs, WriteRequest};
use coppicefs::{Error, Result};
use rustix::io::Errno;

use super::change::Change;
use super::history::{RacingFile, Shown, Source, ZEROS, stamp};
use super::{Actor, BLOCK, BLOCKS, CHURN, FILES, GRACE, Stage, Watchdog, lock};

const ROOT: u64 = 1;
const READ_WRITE: i32 = 2;
const CALLER: Caller = Caller { uid: 0, gid: 0, pid: 1, umask: 0 };
const KEEP_SIZE: i32 = 1;
const PUNCH_HOLE: i32 = 2;
const ZERO_RANGE: i32 = 0x10;

/// What is raced.
#[derive(Clone, Copy, Debug)]
pub struct RaceOptions {
    /// How long, at least.
    pub duration: Duration,
    /// Whether file data has checksums.
    pub checksums: bool,
    /// Compression of file data.
    pub compression: CompressionChoice,
    /// Deliberate faults.
    pub switches: TestSwitches,
    /// Seed of what the threads do; their order is the host's.
    pub seed: u64,
}

/// What a race did.
#[derive(Clone, Copy, Debug, Default)]
pub struct RaceReport {
    /// Reads whose every block was compared.
    pub reads: u64,
    /// Changes of racing files.
    pub changes: u64,
    /// Files written, replaced or removed beside them.
    pub churned: u64,
}

/// A racing file, and how it is open: node and handle.
struct OpenFile {
    file: RacingFile,
    ids: (u64, u64),
}

struct Race {
    filesystem: Arc<Filesystem>,
    files: Vec<OpenFile>,
    stage: Arc<Stage>,
    reads: AtomicU64,
    changes: AtomicU64,
    churned: AtomicU64,
}

fn read_request(file: (u64, u64), offset: u64, length: u64, direct: bool) -> ReadRequest {
    let length_bytes = u32::try_from(length).unwrap_or(u32::MAX);
    ReadRequest { node: file.0, handle: file.1, offset, length_bytes, direct }
}

fn write_request(file: (u64, u64), offset: u64, data: &[u8], direct: bool) -> WriteRequest<'_> {
    WriteRequest { direct, ..WriteRequest::new(file.0, file.1, offset, data) }
}

impl Race {
    fn vfs(&self) -> &Vfs {
        self.filesystem.vfs()
    }

    fn create(&self, name: &str) -> Result<(u64, u64)> {
        let (entry, opened) = self.vfs().create(&CALLER, ROOT, OsStr::new(name), 0o644, READ_WRITE)?;
        Ok((entry.attributes.node, opened.handle))
    }

    fn truncate(&self, node: u64, size: u64) -> Result<()> {
        let changes = SetAttributes { size_bytes: Some(size), ..SetAttributes::default() };
        self.vfs().set_attributes(&CALLER, node, &changes).map(|_| ())
    }

    /// The one thread that changes a racing file.
    fn change(&self, actor: &mut Actor<'_>, open: &OpenFile) {
        let file = &open.file;
        while !self.stage.is_over() {
            let Some(change) = Change::pick(actor, file.size()) else { continue };
            actor.says(format!("{change:?} of file {} of {} bytes", file.number, file.size()));
            let (operation, data) = change.begin(file);
            match self.apply(open.ids, &change, &data) {
                Ok(()) => file.end(operation),
                // Nobody knows which part of it was done: readers may see both until the file is empty.
                Err(Error::NoSpace(_) | Error::Posix(Errno::NOSPC)) => {
                    let all: Vec<_> = (0..BLOCKS).map(|block| (block, ZEROS)).collect();
                    let operation = file.begin("what did not fit is cut".into(), 0, &all);
                    if let Err(error) = self.truncate(open.ids.0, 0) {
                        return self.stage.fail(format!("truncate to nothing: {error}"));
                    }
                    file.end(operation);
                }
                Err(error) => return self.stage.fail(format!("{change:?} of file {}: {error}", file.number)),
            }
            self.changes.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn apply(&self, ids: (u64, u64), change: &Change, data: &[u8]) -> Result<()> {
        let bytes = |range: &Range<u64>| (range.start * BLOCK, (range.end - range.start) * BLOCK);
        let fallocate = |range: &Range<u64>, mode: i32, keeps_size: bool| {
            let mode = if keeps_size { mode | KEEP_SIZE } else { mode };
            let (offset, length) = bytes(range);
            self.vfs().fallocate(&CALLER, ids.0, ids.1, offset, length, mode)
        };
        match change {
            Change::Write { range, direct } => {
                let written = self.vfs().write(&CALLER, &write_request(ids, range.start * BLOCK, data, *direct))?;
                if u64::from(written) < data.len() as u64 {
                    return Err(Errno::NOSPC.into());
                }
                Ok(())
            }
            Change::Punch(range) => fallocate(range, PUNCH_HOLE, true),
            Change::Zero { range, keeps_size } => fallocate(range, ZERO_RANGE, *keeps_size),
            Change::Allocate { range, keeps_size } => fallocate(range, 0, *keeps_size),
            Change::Truncate(size) => self.truncate(ids.0, *size),
            Change::Collapse(range) => {
                let (offset, length) = bytes(range);
                self.vfs().collapse_range(ids.0, ids.1, offset, length)
            }
            Change::Insert(range) => {
                let (offset, length) = bytes(range);
                self.vfs().insert_range(ids.0, ids.1, offset, length)
            }
        }
    }

    /// Reads racing files in every way that there is.
    fn read(&self, actor: &mut Actor<'_>, private: (u64, u64)) {
        let mut sequential = 0;
        while !self.stage.is_over() {
            let Some(open) = self.files.get(actor.below(FILES) as usize) else { return };
            let file = &open.file;
            let (mut offset, length) = (actor.below(BLOCKS) * BLOCK, (1 + actor.below(8)) * BLOCK);
            let how = actor.below(8);
            if how < 3 {
                // Several times in order, so that readahead has something to guess.
                offset = sequential;
                sequential = (sequential + length) % (BLOCKS * BLOCK);
            }
            if how == 3 {
                self.filesystem.cache().evict_all_clean();
            }
            actor.says(format!("read {length} at {offset} of file {}, way {how}", file.number));
            let from = file.ended();
            let outcome = match how {
                7 => self.read_by_copy(open, private, offset, length),
                _ => self.read_pages(open, offset, length, how == 6).map(|bytes| (bytes, length)),
            };
            let to = file.begun();
            let outcome = match outcome {
                Ok((bytes, wanted)) => {
                    file.check(&Shown { offset, wanted, bytes: &bytes, from, to, source: Source::Filesystem })
                }
                Err(Error::NoSpace(_)) if how == 7 => continue,
                Err(error) => Err(format!("{length} bytes at {offset} of file {}: {error}", file.number)),
            };
            if let Err(wrong) = outcome {
                return self.stage.fail(format!("read in way {how}: {wrong}"));
            }
            self.reads.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn read_pages(&self, file: &OpenFile, offset: u64, length: u64, direct: bool) -> Result<Vec<u8>> {
        let batch = self.vfs().read(&CALLER, &read_request(file.ids, offset, length, direct))?;
        let bytes = batch.to_vec();
        std::thread::yield_now();
        // What was collected may go stale, and never changes.
        if batch.to_vec() != bytes {
            return Err(Error::Bug("collected pages changed while they were held".into()));
        }
        Ok(bytes)
    }

    /// Reads by copying into another file. Returns how much was asked for in the end as well: where there is little space a copy is short.
    fn read_by_copy(&self, file: &OpenFile, private: (u64, u64), offset: u64, length: u64) -> Result<(Vec<u8>, u64)> {
        self.truncate(private.0, 0)?;
        let request = CopyRequest {
            source_node: file.ids.0,
            source_handle: file.ids.1,
            source_offset: offset,
            target_node: private.0,
            target_handle: private.1,
            target_offset: 0,
            length_bytes: length,
        };
        let copied = self.vfs().copy_file_range(&CALLER, &request)?;
        let bytes = self.vfs().read(&CALLER, &read_request(private, 0, copied, false))?.to_vec();
        Ok((bytes, if copied > 0 { copied } else { length }))
    }

    /// Takes what is freed as fast as it can: files that are written, synced, renamed over each other and removed.
    fn churn(&self, actor: &mut Actor<'_>) {
        let mut round = 0_u64;
        while !self.stage.is_over() {
            round += 1;
            match self.churn_once(actor, round) {
                Ok(()) | Err(Error::NoSpace(_) | Error::Posix(Errno::NOSPC)) => {}
                Err(error) => return self.stage.fail(format!("churn: {error}")),
            }
            self.churned.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn churn_once(&self, actor: &mut Actor<'_>, round: u64) -> Result<()> {
        let slot = actor.below(12);
        let (new, old) = (format!("new{}", actor.number), format!("old{}-{slot}", actor.number));
        let number = CHURN + actor.number as u64;
        let blocks = 1 + actor.below(24);
        actor.says(format!("churn {blocks} blocks over {old}"));
        let ids = self.create(&new)?;
        let data: Vec<u8> = (0..blocks).flat_map(|block| stamp(number, block, round)).collect();
        let outcome = self.vfs().write(&CALLER, &write_request(ids, 0, &data, false));
        let outcome = outcome.and_then(|written| {
            if actor.below(4) == 0 {
                self.vfs().fsync(&CALLER, ids.0, ids.1, true)?;
            }
            let batch = self.vfs().read(&CALLER, &read_request(ids, 0, data.len() as u64, false))?;
            if batch.to_vec() != data.get(..written as usize).unwrap_or_default() {
                return Err(Error::Bug("a file of one's own reads differently".into()));
            }
            Ok(())
        });
        self.vfs().release(ids.0, ids.1)?;
        self.vfs().forget(ids.0, 1);
        if outcome.is_err() || actor.below(4) == 0 {
            self.vfs().unlink(&CALLER, ROOT, OsStr::new(&new))?;
        } else {
            self.vfs().rename(&CALLER, ROOT, OsStr::new(&new), ROOT, OsStr::new(&old), 0)?;
        }
        outcome
    }

    /// Moves data out of fragmented buckets, as copygc does, but all the time: so buckets empty that are being read from.
    fn move_data(&self, actor: &Actor<'_>) {
        let space = self.filesystem.space();
        while !self.stage.is_over() {
            actor.says("moving data".into());
            let moved = match space.fragmented_bucket() {
                Ok(Some((device, bucket))) => self.filesystem.data().evacuate(device, bucket).map(drop),
                other => other.map(drop),
            };
            match moved {
                Ok(()) | Err(Error::NoSpace(_)) => std::thread::yield_now(),
                Err(error) => return self.stage.fail(format!("moving data: {error}")),
            }
        }
    }

    /// Makes racing files durable and evicts, so that reads meet the device.
    fn sync(&self, actor: &mut Actor<'_>) {
        while !self.stage.is_over() {
            let Some(file) = self.files.get(actor.below(FILES) as usize) else { return };
            actor.says(format!("sync file {}", file.file.number));
            if let Err(error) = self.vfs().fsync(&CALLER, file.ids.0, file.ids.1, actor.below(2) == 0) {
                return self.stage.fail(format!("fsync: {error}"));
            }
            self.filesystem.cache().evict_all_clean();
            std::thread::yield_now();
        }
    }
}

/// Runs a race, then closes, checks and compares once more.
///
/// # Errors
/// What was seen that no order of the operations explains; an error of an operation; what fsck finds.
pub fn run(options: RaceOptions) -> std::result::Result<RaceReport, String> {
    let text = |error: Error| error.to_string();
    let mut format = test_geometry();
    format.defaults.checksum = u8::from(options.checksums);
    let device = Arc::new(MemDevice::new(14 << 20));
    let as_device: Arc<dyn BlockDevice> = device.clone();
    Filesystem::format(&as_device, &format, &Env::real()).map_err(text)?;
    let open_options = OpenOptions {
        cache_bytes: 8 << 20,
        commit_interval: Duration::ZERO,
        compression: Some(options.compression),
        switches: options.switches,
        writeback_age: Duration::from_millis(2),
        ..OpenOptions::default()
    };
    let filesystem = Filesystem::open(vec![as_device], &open_options).map_err(text)?;
    let stage = Arc::new(Stage::new());
    let mut race = Race {
        filesystem: Arc::clone(&filesystem),
        files: Vec::new(),
        stage: Arc::clone(&stage),
        reads: AtomicU64::new(0),
        changes: AtomicU64::new(0),
        churned: AtomicU64::new(0),
    };
    for number in 0..FILES {
        let ids = race.create(&format!("file{number}")).map_err(text)?;
        race.files.push(OpenFile { file: RacingFile::new(number), ids });
    }
    let privates = [race.create("private0").map_err(text)?, race.create("private1").map_err(text)?];
    let watchdog = Watchdog::new(options.duration + GRACE, move || {
        eprintln!("the race has not ended {GRACE:?} after its time: {options:?}\n{}", stage.describe());
        std::process::abort();
    });
    run_threads(&race, &options, &privates);
    let report = RaceReport {
        reads: race.reads.load(Ordering::Relaxed),
        changes: race.changes.load(Ordering::Relaxed),
        churned: race.churned.load(Ordering::Relaxed),
    };
    let mut wrong = lock(&race.stage.wrong).take();
    let closed = filesystem.close();
    if wrong.is_none() {
        closed.map_err(text)?;
        wrong = check_after(&race, &device, &open_options).map_err(text)?;
    }
    drop(watchdog);
    wrong.map_or(Ok(report), Err)
}

fn run_threads(race: &Race, options: &RaceOptions, privates: &[(u64, u64)]) {
    let start = Instant::now();
    std::thread::scope(|scope| {
        let mut number = 0;
        let mut actor = || {
            number += 1;
            Actor::new(&race.stage, number - 1, options.seed)
        };
        for file in &race.files {
            let mut actor = actor();
            scope.spawn(move || race.change(&mut actor, file));
        }
        for &private in privates {
            let mut actor = actor();
            scope.spawn(move || race.read(&mut actor, private));
        }
        for _ in 0..2 {
            let mut actor = actor();
            scope.spawn(move || race.churn(&mut actor));
        }
        let mut syncer = actor();
        scope.spawn(move || race.sync(&mut syncer));
        let mover = actor();
        scope.spawn(move || race.move_data(&mover));
        while !race.stage.is_over() && start.elapsed() < options.duration {
            std::thread::park_timeout(Duration::from_millis(10));
        }
        race.stage.end();
    });
}

/// The files after a clean end, from another mount; and fsck.
fn check_after(race: &Race, device: &Arc<MemDevice>, options: &OpenOptions) -> Result<Option<String>> {
    let copy: Arc<dyn BlockDevice> = Arc::new(MemDevice::from_image(device.image(), false));
    let quiet = OpenOptions {
        read_only: true,
        workers: WorkerSet::Essential,
        switches: TestSwitches::default(),
        ..options.clone()
    };
    let filesystem = Filesystem::open(vec![copy], &quiet)?;
    let report = coppicefs_fsck::check(&filesystem, &|_, _, _, _| {})?;
    let mut wrong = report.problems.first().map(|problem| format!("fsck: {}", problem.describe()));
    for OpenFile { file, ids } in &race.files {
        let handle = filesystem.vfs().open(&CALLER, ids.0, 0)?.handle;
        let wanted = BLOCKS * BLOCK;
        let bytes = filesystem.vfs().read(&CALLER, &read_request((ids.0, handle), 0, wanted, false))?.to_vec();
        let (from, to) = (file.ended(), file.begun());
        let shown = Shown { offset: 0, wanted, bytes: &bytes, from, to, source: Source::Filesystem };
        if let Err(difference) = file.check(&shown) {
            wrong.get_or_insert(format!("after a new mount: {difference}"));
        }
    }
    filesystem.close()?;
    Ok(wrong)
}
