//! The race of readers against whatever frees, moves and reuses the blocks that they read: in this process, on real threads.
//!
//! Every block that is written carries a stamp (file, block, number of the operation). Each racing file has one thread that changes it, so that its
//! operations have an order; the content that each leaves of each block is noted *before* it begins. A reader notes which operations had ended
//! when it began, and which had begun when it ended: each block that it saw must be what one of the states in between has there, and the
//! length that it got must fit the size of one. Anything else is an old stamp, another file's, garbage or wrong zeros. An error is a failure too.
//! Other threads write, replace and remove other files on the same tiny device, so that what is freed is reused at once.
//!
//! A watchdog prints what each thread was doing and aborts if the race does not end: a hang must not cost more than one test.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use coppicefs::device::{BlockDevice, MemDevice};
use coppicefs::env::Env;
use coppicefs::filesystem::format::test_geometry;
use coppicefs::filesystem::{Filesystem, OpenOptions, WorkerSet};
use coppicefs::options::CompressionChoice;
use coppicefs::space::TestSwitches;
use coppicefs::vfs::{Caller, CopyRequest, ReadRequest, SetAttributes, Vfs, WriteRequest};
use coppicefs::{Error, Result};
use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};
use rustix::io::Errno;

const BLOCK: u64 = 4096;
/// Blocks of a racing file at most.
const BLOCKS: u64 = 40;
/// Racing files.
const FILES: u64 = 2;
/// Stamps of files that come and go start here.
const CHURN: u64 = 1000;
const ROOT: u64 = 1;
const READ_WRITE: i32 = 2;
const CALLER: Caller = Caller { uid: 0, gid: 0, pid: 1, umask: 0 };
/// States that are kept for readers that have not ended.
const HISTORY_MAX: usize = 4096;
/// How long the end may take after the time is up.
const GRACE: Duration = Duration::from_secs(60);

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

/// Content of a block: the stamp that an operation gave to a block (this one, or one that has moved here) up to a byte, zeros behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Content {
    operation: u64,
    block: u64,
    bytes: usize,
}

const ZEROS: Content = Content { operation: 0, block: 0, bytes: 0 };

fn stamp(file: u64, block: u64, operation: u64) -> Vec<u8> {
    let mut one = Vec::with_capacity(32);
    for value in [file + 1, block, operation, !operation] {
        one.extend_from_slice(&value.to_le_bytes());
    }
    one.repeat(128)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What every operation left, newest last.
struct History {
    blocks: Vec<VecDeque<(u64, Content)>>,
    sizes: VecDeque<(u64, u64)>,
}

/// The states that some operation in `[from, to]`, or the last one before, left.
fn between<T: Copy>(history: &VecDeque<(u64, T)>, from: u64, to: u64) -> Vec<T> {
    let mut states: Vec<T> = Vec::new();
    for &(operation, state) in history.iter().rev().skip_while(|(operation, _)| *operation > to) {
        states.push(state);
        if operation <= from {
            break;
        }
    }
    states
}

struct RacingFile {
    number: u64,
    node: u64,
    handle: u64,
    history: Mutex<History>,
    begun: AtomicU64,
    ended: AtomicU64,
}

impl RacingFile {
    fn content(&self, block: u64) -> Content {
        let history = lock(&self.history);
        history.blocks.get(block as usize).and_then(|states| states.back()).map_or(ZEROS, |(_, content)| *content)
    }

    fn size(&self) -> u64 {
        lock(&self.history).sizes.back().map_or(0, |(_, size)| *size)
    }

    /// Notes what the next operation will leave, and begins it.
    fn begin(&self, size: u64, changes: &[(u64, Content)]) -> u64 {
        let operation = self.begun.load(Ordering::SeqCst) + 1;
        let mut history = lock(&self.history);
        for &(block, content) in changes {
            if let Some(states) = history.blocks.get_mut(block as usize) {
                states.push_back((operation, content));
                if states.len() > HISTORY_MAX {
                    states.pop_front();
                }
            }
        }
        history.sizes.push_back((operation, size));
        if history.sizes.len() > HISTORY_MAX {
            history.sizes.pop_front();
        }
        self.begun.store(operation, Ordering::SeqCst);
        operation
    }

    /// Whether a read that began when `from` had ended, and ended when `to` had begun, may have seen this.
    fn check(&self, offset: u64, wanted: u64, bytes: &[u8], from: u64, to: u64) -> std::result::Result<(), String> {
        let history = lock(&self.history);
        let sizes = between(&history.sizes, from, to);
        let length = bytes.len() as u64;
        let seen: Vec<u64> = sizes.iter().map(|size| size.saturating_sub(offset).min(wanted)).collect();
        // A write lengthens the file block by block; nothing shortens it by steps. Newest first.
        let grows = |pair: &[u64]| matches!(pair, [after, before] if (*before..=*after).contains(&length) && length.is_multiple_of(BLOCK));
        if !seen.contains(&length) && !seen.windows(2).any(grows) {
            return Err(format!("{length} bytes of {wanted} at {offset}, operations {from}..{to}, sizes {sizes:?}"));
        }
        for (block, bytes) in (offset / BLOCK..).zip(bytes.chunks(BLOCK as usize)) {
            let Some(states) = history.blocks.get(block as usize) else { continue };
            let states = between(states, from, to);
            let fits = |content: &Content| {
                let (stamped, zeros) = bytes.split_at(content.bytes.min(bytes.len()));
                let expected = stamp(self.number, content.block, content.operation);
                expected.starts_with(stamped) && zeros.iter().all(|&byte| byte == 0)
            };
            if !states.iter().any(fits) {
                let words: Vec<u64> = bytes
                    .chunks_exact(8)
                    .take(4)
                    .map(|word| u64::from_le_bytes(word.try_into().unwrap_or_default()))
                    .collect();
                let odd = bytes.chunks(32).position(|chunk| Some(chunk) != bytes.get(..32));
                return Err(format!(
                    "block {block} of file {}: it begins with {words:?}, another pattern after {odd:?} of 32 bytes; operations {from}..{to} allow {states:?}",
                    self.number
                ));
            }
        }
        Ok(())
    }
}

struct Race {
    options: RaceOptions,
    filesystem: Arc<Filesystem>,
    files: Vec<RacingFile>,
    stop: AtomicBool,
    wrong: Mutex<Option<String>>,
    reads: AtomicU64,
    changes: AtomicU64,
    churned: AtomicU64,
    /// What each thread does now.
    doing: Vec<Mutex<String>>,
}

/// Which thread: its random numbers and where it says what it does.
struct Actor<'a> {
    race: &'a Race,
    number: usize,
    random: Xoshiro256PlusPlus,
}

impl Actor<'_> {
    fn below(&mut self, limit: u64) -> u64 {
        self.random.next_u64() % limit.max(1)
    }

    fn says(&self, what: String) {
        if let Some(doing) = self.race.doing.get(self.number) {
            *lock(doing) = what;
        }
    }
}

fn read_request(file: (u64, u64), offset: u64, length: u64, direct: bool) -> ReadRequest {
    let length_bytes = u32::try_from(length).unwrap_or(u32::MAX);
    ReadRequest { node: file.0, handle: file.1, offset, length_bytes, direct }
}

fn write_request(file: (u64, u64), offset: u64, data: &[u8], direct: bool) -> WriteRequest<'_> {
    WriteRequest {
        node: file.0,
        handle: file.1,
        offset,
        data,
        direct,
        append: false,
        synchronous: false,
        from_page_cache: false,
        clear_set_id: false,
    }
}

impl Race {
    fn vfs(&self) -> &Vfs {
        self.filesystem.vfs()
    }

    fn is_over(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn fail(&self, what: String) {
        lock(&self.wrong).get_or_insert(what);
        self.stop.store(true, Ordering::Relaxed);
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
    fn change(&self, actor: &mut Actor<'_>, file: &RacingFile) {
        while !self.is_over() {
            match self.change_once(actor, file) {
                Ok(()) => {}
                // Nobody knows which part of it was done: readers may see both until the file is empty.
                Err(Error::NoSpace(_) | Error::Posix(Errno::NOSPC)) => {
                    let all: Vec<_> = (0..BLOCKS).map(|block| (block, ZEROS)).collect();
                    let operation = file.begin(0, &all);
                    if let Err(error) = self.truncate(file.node, 0) {
                        return self.fail(format!("truncate to nothing: {error}"));
                    }
                    file.ended.store(operation, Ordering::SeqCst);
                }
                Err(error) => return self.fail(format!("a change of file {}: {error}", file.number)),
            }
            self.changes.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn change_once(&self, actor: &mut Actor<'_>, file: &RacingFile) -> Result<()> {
        let size = file.size();
        let (first, count) = (actor.below(BLOCKS), 1 + actor.below(8));
        let range = first..(first + count).min(BLOCKS);
        let ids = (file.node, file.handle);
        match actor.below(12) {
            10 | 11 => return self.shift(actor, file, range),
            0..=3 => {
                let append = actor.below(3) == 0;
                let range = if append {
                    let end = size.div_ceil(BLOCK);
                    end..(end + count).min(BLOCKS)
                } else {
                    range
                };
                if range.is_empty() {
                    return Ok(());
                }
                let operation = file.begun.load(Ordering::SeqCst) + 1;
                let changes: Vec<_> =
                    range.clone().map(|block| (block, Content { operation, block, bytes: BLOCK as usize })).collect();
                let data: Vec<u8> = range.clone().flat_map(|block| stamp(file.number, block, operation)).collect();
                let direct = actor.below(3) == 0;
                actor.says(format!("write {range:?} of file {} of {size} bytes, direct {direct}", file.number));
                file.begin(size.max(range.end * BLOCK), &changes);
                let written = self.vfs().write(&CALLER, &write_request(ids, range.start * BLOCK, &data, direct))?;
                if u64::from(written) < data.len() as u64 {
                    return Err(Errno::NOSPC.into());
                }
                file.ended.store(operation, Ordering::SeqCst);
            }
            4..=6 => {
                let mode = if actor.below(3) == 0 { ZERO_RANGE } else { PUNCH_HOLE } | KEEP_SIZE;
                actor.says(format!("fallocate {mode:#x} {range:?} of file {} of {size} bytes", file.number));
                let changes: Vec<_> = range.clone().map(|block| (block, ZEROS)).collect();
                let operation = file.begin(size, &changes);
                let length = (range.end - range.start) * BLOCK;
                self.vfs().fallocate(&CALLER, ids.0, ids.1, range.start * BLOCK, length, mode)?;
                file.ended.store(operation, Ordering::SeqCst);
            }
            7 | 8 => {
                let new = match actor.below(3) {
                    0 => actor.below(BLOCKS * BLOCK),
                    1 => actor.below(BLOCKS) * BLOCK,
                    _ => size.saturating_sub(actor.below(3 * BLOCK)),
                };
                actor.says(format!("truncate file {} of {size} bytes to {new}", file.number));
                let changes: Vec<_> = (new / BLOCK..BLOCKS)
                    .map(|block| {
                        let kept = if block == new / BLOCK { (new % BLOCK) as usize } else { 0 };
                        let content = file.content(block);
                        let bytes = content.bytes.min(kept);
                        (block, if bytes == 0 { ZEROS } else { Content { bytes, ..content } })
                    })
                    .collect();
                let operation = file.begin(new, &changes);
                self.truncate(file.node, new)?;
                file.ended.store(operation, Ordering::SeqCst);
            }
            _ => {
                let keeps = actor.below(2) == 0;
                actor.says(format!(
                    "allocate {range:?} of file {} of {size} bytes, keeping the size {keeps}",
                    file.number
                ));
                let new = if keeps { size } else { size.max(range.end * BLOCK) };
                let operation = file.begin(new, &[]);
                let length = (range.end - range.start) * BLOCK;
                let mode = if keeps { KEEP_SIZE } else { 0 };
                self.vfs().fallocate(&CALLER, ids.0, ids.1, range.start * BLOCK, length, mode)?;
                file.ended.store(operation, Ordering::SeqCst);
            }
        }
        Ok(())
    }

    /// A collapse or an insert, where it is not refused.
    fn shift(&self, actor: &mut Actor<'_>, file: &RacingFile, range: Range<u64>) -> Result<()> {
        let (size, count) = (file.size(), range.end - range.start);
        let collapses = actor.below(2) == 0;
        let is_allowed = if collapses {
            range.end * BLOCK < size
        } else {
            range.start * BLOCK < size && size + count * BLOCK <= BLOCKS * BLOCK
        };
        if !is_allowed {
            return Ok(());
        }
        actor.says(format!("shift, collapse {collapses}, {range:?} of file {} of {size} bytes", file.number));
        let moved = |block: u64| {
            if collapses {
                file.content(block + count)
            } else {
                block.checked_sub(count).filter(|&from| from >= range.start).map_or(ZEROS, |from| file.content(from))
            }
        };
        let changes: Vec<_> = (range.start..BLOCKS).map(|block| (block, moved(block))).collect();
        let new = if collapses { size - count * BLOCK } else { size + count * BLOCK };
        let operation = file.begin(new, &changes);
        let (offset, length) = (range.start * BLOCK, count * BLOCK);
        if collapses {
            self.vfs().collapse_range(file.node, file.handle, offset, length)?;
        } else {
            self.vfs().insert_range(file.node, file.handle, offset, length)?;
        }
        file.ended.store(operation, Ordering::SeqCst);
        Ok(())
    }

    /// Reads racing files in every way that there is.
    fn read(&self, actor: &mut Actor<'_>, private: (u64, u64)) {
        let mut sequential = 0;
        while !self.is_over() {
            let Some(file) = self.files.get(actor.below(FILES) as usize) else { return };
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
            let from = file.ended.load(Ordering::SeqCst);
            let outcome = match how {
                7 => self.read_by_copy(file, private, offset, length),
                _ => self.read_pages(file, offset, length, how == 6).map(|bytes| (bytes, length)),
            };
            let to = file.begun.load(Ordering::SeqCst);
            let outcome = match outcome {
                Ok((bytes, length)) => file.check(offset, length, &bytes, from, to),
                Err(Error::NoSpace(_)) if how == 7 => continue,
                Err(error) => Err(format!("{length} bytes at {offset} of file {}: {error}", file.number)),
            };
            if let Err(wrong) = outcome {
                return self.fail(format!("read in way {how}: {wrong}"));
            }
            self.reads.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn read_pages(&self, file: &RacingFile, offset: u64, length: u64, direct: bool) -> Result<Vec<u8>> {
        let ids = (file.node, file.handle);
        let batch = self.vfs().read(&CALLER, &read_request(ids, offset, length, direct))?;
        let bytes = batch.to_vec();
        std::thread::yield_now();
        // What was collected may go stale, and never changes.
        if batch.to_vec() != bytes {
            return Err(Error::Bug("collected pages changed while they were held".into()));
        }
        Ok(bytes)
    }

    /// Reads by copying into another file. Returns how much was asked for in the end as well: where there is little space a copy is short.
    fn read_by_copy(&self, file: &RacingFile, private: (u64, u64), offset: u64, length: u64) -> Result<(Vec<u8>, u64)> {
        self.truncate(private.0, 0)?;
        let request = CopyRequest {
            source_node: file.node,
            source_handle: file.handle,
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
        while !self.is_over() {
            round += 1;
            match self.churn_once(actor, round) {
                Ok(()) | Err(Error::NoSpace(_) | Error::Posix(Errno::NOSPC)) => {}
                Err(error) => return self.fail(format!("churn: {error}")),
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
        while !self.is_over() {
            actor.says("moving data".into());
            let moved = match space.fragmented_bucket() {
                Ok(Some((device, bucket))) => self.filesystem.data().evacuate(device, bucket).map(drop),
                other => other.map(drop),
            };
            match moved {
                Ok(()) | Err(Error::NoSpace(_)) => std::thread::yield_now(),
                Err(error) => return self.fail(format!("moving data: {error}")),
            }
        }
    }

    /// Makes racing files durable and evicts, so that reads meet the device.
    fn sync(&self, actor: &mut Actor<'_>) {
        while !self.is_over() {
            let Some(file) = self.files.get(actor.below(FILES) as usize) else { return };
            actor.says(format!("sync file {}", file.number));
            if let Err(error) = self.vfs().fsync(&CALLER, file.node, file.handle, actor.below(2) == 0) {
                return self.fail(format!("fsync: {error}"));
            }
            self.filesystem.cache().evict_all_clean();
            std::thread::yield_now();
        }
    }
}

/// Ends the process, with what everybody was doing, if nobody says in time that all is well.
struct Watchdog {
    state: Arc<(Mutex<bool>, Condvar)>,
}

impl Watchdog {
    fn new(limit: Duration, race: Arc<Race>) -> Self {
        let state = Arc::new((Mutex::new(false), Condvar::new()));
        let watched = Arc::clone(&state);
        std::thread::spawn(move || {
            let (is_done, changed) = &*watched;
            let outcome = changed.wait_timeout_while(lock(is_done), limit, |is_done| !*is_done);
            if outcome.is_ok_and(|(_, timeout)| timeout.timed_out()) {
                eprintln!("the race has not ended {limit:?} after it began: {:?}", race.options);
                for (number, doing) in race.doing.iter().enumerate() {
                    eprintln!("thread {number}: {}", lock(doing));
                }
                std::process::abort();
            }
        });
        Self { state }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        *lock(&self.state.0) = true;
        self.state.1.notify_all();
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
    let mut race = Race {
        options,
        filesystem: Arc::clone(&filesystem),
        files: Vec::new(),
        stop: AtomicBool::new(false),
        wrong: Mutex::new(None),
        reads: AtomicU64::new(0),
        changes: AtomicU64::new(0),
        churned: AtomicU64::new(0),
        doing: (0..16).map(|_| Mutex::default()).collect(),
    };
    for number in 0..FILES {
        let (node, handle) = race.create(&format!("file{number}")).map_err(text)?;
        let blocks = (0..BLOCKS).map(|_| VecDeque::from([(0, ZEROS)])).collect();
        let history = Mutex::new(History { blocks, sizes: VecDeque::from([(0, 0)]) });
        let (begun, ended) = (AtomicU64::new(0), AtomicU64::new(0));
        race.files.push(RacingFile { number, node, handle, history, begun, ended });
    }
    let privates = [race.create("private0").map_err(text)?, race.create("private1").map_err(text)?];
    let race = Arc::new(race);
    let watchdog = Watchdog::new(options.duration + GRACE, Arc::clone(&race));
    run_threads(&race, &privates);
    let report = RaceReport {
        reads: race.reads.load(Ordering::Relaxed),
        changes: race.changes.load(Ordering::Relaxed),
        churned: race.churned.load(Ordering::Relaxed),
    };
    let mut wrong = lock(&race.wrong).take();
    let closed = filesystem.close();
    if wrong.is_none() {
        closed.map_err(text)?;
        wrong = check_after(&race, &device, &open_options).map_err(text)?;
    }
    drop(watchdog);
    wrong.map_or(Ok(report), Err)
}

fn run_threads(race: &Race, privates: &[(u64, u64)]) {
    let start = Instant::now();
    std::thread::scope(|scope| {
        let mut number = 0;
        let mut actor = || {
            let seed = race.options.seed.wrapping_mul(1000) + number;
            number += 1;
            Actor { race, number: number as usize - 1, random: Xoshiro256PlusPlus::seed_from_u64(seed) }
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
        while !race.is_over() && start.elapsed() < race.options.duration {
            std::thread::park_timeout(Duration::from_millis(10));
        }
        race.stop.store(true, Ordering::Relaxed);
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
    for file in &race.files {
        let handle = filesystem.vfs().open(&CALLER, file.node, 0)?.handle;
        let request = read_request((file.node, handle), 0, BLOCKS * BLOCK, false);
        let bytes = filesystem.vfs().read(&CALLER, &request)?.to_vec();
        let last = file.begun.load(Ordering::SeqCst);
        if let Err(difference) = file.check(0, BLOCKS * BLOCK, &bytes, file.ended.load(Ordering::SeqCst), last) {
            wrong.get_or_insert(format!("after a new mount: {difference}"));
        }
    }
    filesystem.close()?;
    Ok(wrong)
}
