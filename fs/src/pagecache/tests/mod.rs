//! A file in memory behind the cache: what vfs and data do, in a hundred lines.

mod model;
mod paths;
mod race;
mod schedules;
mod throttle;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::env::{Env, Event, Progress, Worker};
use crate::error::{Error, Result};
use crate::metrics::Metrics;
use crate::sync::Mutex;

const BLOCK: u64 = 4096;

/// The "device" of one file: blocks by index; what is not there is a hole.
#[derive(Default)]
struct Store {
    blocks: Mutex<BTreeMap<u64, Vec<u8>>>,
    bad: Mutex<BTreeSet<u64>>,
    /// Each batch that was read: the ranges of its entries.
    batches: Mutex<Vec<Vec<Range<u64>>>>,
    /// Frames of this many blocks are widened to.
    widen_blocks: u64,
}

impl PageSource for Store {
    fn read_batch(&self, mut batch: ReadaheadBatch<'_>) {
        let range = batch.range();
        assert!(batch.may_look_up().start <= range.start && range.end <= batch.may_look_up().end);
        batch.submitted();
        let entries = batch.take_entries();
        self.batches.lock().push(entries.iter().map(|entry| entry.offset()..entry.end()).collect());
        for mut entry in entries {
            let mut bad = Vec::new();
            for (number, chunk) in (0..).zip(entry_blocks(&mut entry)) {
                let (block, bytes) = chunk;
                if self.bad.lock().contains(&block) {
                    bad.push((number, block));
                    continue;
                }
                match self.blocks.lock().get(&block) {
                    Some(stored) => bytes.copy_from_slice(stored),
                    None => bytes.fill(0),
                }
            }
            if bad.is_empty() {
                entry.complete();
                continue;
            }
            let mut at = 0;
            for (number, block) in bad {
                entry.filled(at * 4096..number * 4096);
                entry.fail(Error::corrupt(format!("block {block}"), "bad on purpose"));
                at = number + 1;
            }
            let length = u32::try_from(entry.length()).unwrap();
            entry.filled(at * 4096..length);
        }
    }

    fn widen(&self, range: Range<u64>) -> Range<u64> {
        match self.widen_blocks * BLOCK {
            0 => range,
            frame => range.start / frame * frame..range.end.div_ceil(frame) * frame,
        }
    }
}

fn entry_blocks(entry: &mut FillEntry) -> impl Iterator<Item = (u64, &mut [u8])> {
    let first = entry.offset() / BLOCK;
    (first..).zip(entry.destination().chunks_exact_mut(4096))
}

/// A file: the size that vfs keeps, the pages, the device.
struct File {
    space: Arc<AddressSpace>,
    store: Arc<Store>,
    source: Arc<dyn PageSource>,
    size: AtomicU64,
    /// Units of reservation that are out: taken by dirty blocks, not yet consumed or given back.
    units: Mutex<i64>,
    readahead: Readahead,
}

const UNITS: u32 = 3;

impl File {
    fn new(cache: &Arc<Cache>, identity: u64, widen_blocks: u64) -> Arc<Self> {
        let store = Arc::new(Store { widen_blocks, ..Store::default() });
        Arc::new(Self {
            space: cache.new_space(identity),
            source: Arc::clone(&store) as Arc<dyn PageSource>,
            store,
            size: AtomicU64::new(0),
            units: Mutex::new(0),
            readahead: Readahead::new(),
        })
    }

    fn size(&self) -> u64 {
        self.size.load(Ordering::SeqCst)
    }

    fn write_with<R>(&self, f: impl FnOnce(&WriteContext<'_>) -> R) -> R {
        f(&WriteContext {
            space: &self.space,
            source: &self.source,
            end_of_file: self.size(),
            units_per_block: UNITS,
            placed: &|end| {
                self.size.fetch_max(end, Ordering::SeqCst);
            },
        })
    }

    fn took(&self, blocks: u64) {
        *self.units.lock() += blocks.cast_signed() * i64::from(UNITS);
    }

    fn gave_back(&self, units: u64) {
        *self.units.lock() -= units.cast_signed();
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        let outcome = self.write_with(|context| write(context, offset, data));
        self.took(outcome.newly_dirty_blocks);
        outcome.error.map_or(Ok(()), Err)
    }

    /// Zeroes and drops what is behind `size`, in the cache and on the device.
    fn cut(&self, size: u64) -> Result<()> {
        let guard = self.space.block(size..u64::MAX)?;
        let punched = self.write_with(|context| truncate(context, &guard, size))?;
        self.punched(punched);
        Ok(())
    }

    fn punched(&self, punched: Punched) {
        self.took(punched.newly_dirty_blocks);
        self.gave_back(punched.dropped.units);
        let blocks = punched.interior.start / BLOCK..punched.interior.end / BLOCK;
        self.store.blocks.lock().retain(|block, _| !blocks.contains(block));
    }

    fn truncate(&self, size: u64) -> Result<()> {
        self.cut(size.min(self.size()))?;
        self.size.store(size, Ordering::SeqCst);
        Ok(())
    }

    fn punch(&self, offset: u64, length: u64) -> Result<()> {
        let guard = self.space.block(0..u64::MAX)?;
        let punched = self.write_with(|context| punch(context, &guard, offset, length))?;
        self.punched(punched);
        Ok(())
    }

    fn context(&self) -> ReadContext<'_> {
        ReadContext {
            space: &self.space,
            source: &self.source,
            readahead: Some(&self.readahead),
            end_of_file: self.size(),
        }
    }

    fn clip(&self, offset: u64, length: u64) -> u64 {
        length.min(self.size().saturating_sub(offset))
    }

    fn collect(&self, offset: u64, length: u64) -> Result<PageBatch> {
        let mut pages = PageBatch::new();
        read_iter(&self.context(), offset, self.clip(offset, length), &mut pages).into_result()?;
        Ok(pages)
    }

    fn read(&self, offset: u64, length: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![0xEE; usize::try_from(self.clip(offset, length)).unwrap()];
        read_iter(&self.context(), offset, bytes.len() as u64, &mut CopySink::new(&mut bytes)).into_result()?;
        Ok(bytes)
    }

    /// Writes a run to the device, as far as the file reaches.
    fn store_run(&self, run: WritebackRun, fail: bool) {
        if fail {
            let surplus = run.complete(Err(Error::ReadOnly));
            self.gave_back(surplus);
            return;
        }
        let bytes: Vec<u8> = run.slices().flat_map(<[u8]>::to_vec).collect();
        assert_eq!(bytes.len() as u64, run.length());
        for (block, chunk) in (run.offset() / BLOCK..).zip(bytes.chunks(4096)) {
            if block * BLOCK < self.size() {
                self.store.blocks.lock().insert(block, chunk.to_vec());
            }
        }
        let units = run.units();
        assert_eq!(run.complete(Ok(())), 0);
        self.gave_back(units);
    }

    fn write_back(&self, max_bytes: u64, fail: bool) -> bool {
        let runs = collect_dirty(&self.space, 0..u64::MAX, max_bytes);
        let any = !runs.is_empty();
        for run in runs {
            self.store_run(run, fail);
        }
        any
    }
}

/// As `assert_eq`, for humans.
#[track_caller]
fn same(found: &[u8], expected: &[u8], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}: length");
    if let Some(place) = found.iter().zip(expected).position(|(found, expected)| found != expected) {
        panic!("{what}: byte {place} is {}, not {}", found[place], expected[place]);
    }
}

/// Writes back whatever is dirty, like the real worker.
struct Flusher {
    cache: Arc<Cache>,
    files: Mutex<Vec<Arc<File>>>,
    /// Runs that were taken and are finished some other time.
    under_way: Mutex<Vec<(Arc<File>, WritebackRun)>>,
}

impl Worker for Flusher {
    fn name(&self) -> &'static str {
        "flusher"
    }

    fn step(&self, _: u32) -> Result<Progress> {
        let under_way = self.under_way.lock().pop();
        if let Some((file, run)) = under_way {
            file.store_run(run, false);
            return Ok(Progress::Worked);
        }
        let files = self.files.lock().clone();
        for space in self.cache.dirty_spaces(4, None) {
            if let Some(file) = files.iter().find(|file| Arc::ptr_eq(&file.space, &space))
                && file.write_back(5 * BLOCK, false)
            {
                return Ok(Progress::Worked);
            }
        }
        Ok(Progress::Idle(None))
    }

    fn event(&self) -> &Event {
        self.cache.writeback_wanted()
    }
}

/// A cache, and its flusher as a simulated worker.
struct Bench {
    env: Arc<Env>,
    metrics: Arc<Metrics>,
    cache: Arc<Cache>,
    flusher: Arc<Flusher>,
}

impl Bench {
    fn new(seed: u64, options: CacheOptions) -> Self {
        let env = Env::simulated(seed);
        let metrics = Arc::new(Metrics::default());
        let cache = Cache::new(Arc::clone(&env), Arc::clone(&metrics), options).unwrap();
        let flusher = Arc::new(Flusher {
            cache: Arc::clone(&cache),
            files: Mutex::new(Vec::new()),
            under_way: Mutex::new(Vec::new()),
        });
        env.register(Arc::clone(&flusher) as Arc<dyn Worker>);
        Self { env, metrics, cache, flusher }
    }

    fn file(&self, identity: u64, widen_blocks: u64) -> Arc<File> {
        let file = File::new(&self.cache, identity, widen_blocks);
        self.flusher.files.lock().push(Arc::clone(&file));
        file
    }

    /// A file that lies on the device already, `length` bytes of a pattern.
    fn file_with(&self, identity: u64, length: u64) -> Arc<File> {
        let file = self.file(identity, 0);
        for block in 0..length.div_ceil(BLOCK) {
            file.store.blocks.lock().insert(block, pattern(identity, block));
        }
        file.size.store(length, Ordering::SeqCst);
        file
    }
}

fn pattern(identity: u64, block: u64) -> Vec<u8> {
    ((identity << 32) | block).to_le_bytes().repeat(512)
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.env.unregister_all();
        let files = std::mem::take(&mut *self.flusher.files.lock());
        // Not under the lock: what they drop takes locks of its own.
        drop(files);
    }
}
