//! Fills against punches, truncates and direct writes whose freed blocks are reused at once, by another file.
//!
//! Every block on the device carries a stamp (file, block, generation). A reader may see zeros (a hole) or a stamp of the very file and block
//! it read, whole, and no older than what was there when it began. Mechanism of the race: a fill looks up block P of file A; a punch
//! frees P; file B writes P; the fill reads P and puts B's bytes into A's cache. The test with the exclusion removed shows that it happens.

use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use super::*;
use crate::sync::{LockClass, Rank};

const FILES: u64 = 2;
const BLOCKS: u64 = 48;

struct Device {
    blocks: Vec<Mutex<Vec<u8>>>,
    /// Newest first, so that a freed block is reused as soon as possible.
    free: Mutex<Vec<usize>>,
}

impl Device {
    fn allocate(&self) -> usize {
        loop {
            if let Some(number) = self.free.lock().pop() {
                return number;
            }
            std::thread::yield_now();
        }
    }
}

struct Stamped {
    number: u64,
    device: Arc<Device>,
    map: Mutex<BTreeMap<u64, usize>>,
    seed: AtomicU64,
}

fn nap(seed: &AtomicU64) {
    match seed.fetch_add(0x9E37_79B9_7F4A_7C15, Ordering::Relaxed) >> 61 {
        0 => std::thread::sleep(Duration::from_micros(50)),
        1..=3 => std::thread::yield_now(),
        _ => {}
    }
}

impl PageSource for Stamped {
    fn read_batch(&self, mut batch: ReadaheadBatch<'_>) {
        let range = batch.range();
        let found: BTreeMap<u64, usize> = {
            let map = self.map.lock();
            map.range(range.start / BLOCK..range.end / BLOCK).map(|(&block, &number)| (block, number)).collect()
        };
        nap(&self.seed);
        batch.submitted();
        nap(&self.seed);
        for mut entry in batch.take_entries() {
            for (block, bytes) in entry_blocks(&mut entry) {
                match found.get(&block) {
                    Some(&number) => bytes.copy_from_slice(&self.device.blocks[number].lock()),
                    None => bytes.fill(0),
                }
            }
            entry.complete();
        }
    }
}

fn stamp(file: u64, block: u64, generation: u64) -> Vec<u8> {
    let mut one = Vec::new();
    for value in [file + 1, block, generation, !generation] {
        one.extend_from_slice(&value.to_le_bytes());
    }
    one.repeat(128)
}

struct RaceFile {
    stamped: Arc<Stamped>,
    source: Arc<dyn PageSource>,
    space: Arc<AddressSpace>,
    /// The inode's lock.
    inode: Mutex<()>,
    next_generation: AtomicU64,
    /// The newest generation that was acknowledged, by block.
    acknowledged: Vec<AtomicU64>,
}

struct Race {
    cache: Arc<Cache>,
    device: Arc<Device>,
    files: Vec<RaceFile>,
    stop: AtomicBool,
    wrong: Mutex<Option<String>>,
    reads: AtomicU64,
    changes: AtomicU64,
}

fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state >> 11
}

impl Race {
    fn new(broken: bool) -> Self {
        let options = CacheOptions {
            fault_add_lock_excludes_nobody: broken,
            readahead_max_bytes: 64 << 10,
            ..CacheOptions::new(1 << 20)
        };
        let cache = Cache::new(Env::real(), Arc::new(Metrics::default()), options).unwrap();
        let count = usize::try_from(FILES * BLOCKS).unwrap() + 40;
        let device = Arc::new(Device {
            blocks: (0..count).map(|_| Mutex::new(vec![0xFF; 4096])).collect(),
            free: Mutex::new((0..count).collect()),
        });
        let files = (0..FILES)
            .map(|number| {
                let stamped = Arc::new(Stamped {
                    number,
                    device: Arc::clone(&device),
                    map: Mutex::ranked(LockClass::new(Rank::OuterLeaf), BTreeMap::new()),
                    seed: AtomicU64::new(number),
                });
                RaceFile {
                    source: Arc::clone(&stamped) as Arc<dyn PageSource>,
                    stamped,
                    space: cache.new_space(number),
                    inode: Mutex::ranked(LockClass::new(Rank::Inode), ()),
                    next_generation: AtomicU64::new(1),
                    acknowledged: (0..BLOCKS).map(|_| AtomicU64::new(0)).collect(),
                }
            })
            .collect();
        Self {
            cache,
            device,
            files,
            stop: AtomicBool::new(false),
            wrong: Mutex::new(None),
            reads: AtomicU64::new(0),
            changes: AtomicU64::new(0),
        }
    }

    fn report(&self, what: String) {
        self.stop.store(true, Ordering::SeqCst);
        self.wrong.lock().get_or_insert(what);
    }

    fn read(&self, random_state: &mut u64, readahead: &Readahead) {
        let file = &self.files[usize::try_from(random(random_state) % FILES).unwrap()];
        let first = random(random_state) % BLOCKS;
        let count = (random(random_state) % 12 + 1).min(BLOCKS - first);
        let oldest: Vec<u64> = (first..first + count)
            .map(|block| file.acknowledged[usize::try_from(block).unwrap()].load(Ordering::SeqCst))
            .collect();
        let context = ReadContext {
            space: &file.space,
            source: &file.source,
            readahead: Some(readahead),
            end_of_file: BLOCKS * BLOCK,
        };
        let mut pages = PageBatch::new();
        let outcome = read_iter(&context, first * BLOCK, count * BLOCK, &mut pages);
        if outcome.bytes != count * BLOCK {
            self.report(format!("a read failed: {:?}", outcome.error));
            return;
        }
        for ((block, bytes), oldest) in (first..).zip(pages.to_vec().chunks(4096)).zip(oldest) {
            if bytes.iter().all(|&byte| byte == 0) {
                continue;
            }
            let generation = u64::from_le_bytes(bytes[16..24].try_into().unwrap());
            if bytes != stamp(file.stamped.number, block, generation) {
                self.report(format!(
                    "file {} block {block}: foreign or torn bytes {:?}",
                    file.stamped.number,
                    &bytes[..32]
                ));
            } else if generation < oldest {
                self.report(format!(
                    "file {} block {block}: generation {generation} after {oldest}",
                    file.stamped.number
                ));
            }
        }
        self.reads.fetch_add(1, Ordering::Relaxed);
    }

    /// A direct write of one block: data to fresh space, then block, to drop the folios and commit.
    fn direct_write(&self, file: &RaceFile, block: u64) {
        let _inode = file.inode.lock();
        let generation = file.next_generation.fetch_add(1, Ordering::SeqCst);
        let number = self.device.allocate();
        self.device.blocks[number].lock().copy_from_slice(&stamp(file.stamped.number, block, generation));
        let guard = file.space.block(block * BLOCK..(block + 1) * BLOCK).unwrap();
        let _ = invalidate_range(&file.space, &guard, block * BLOCK..(block + 1) * BLOCK).unwrap();
        nap(&file.stamped.seed);
        let old = file.stamped.map.lock().insert(block, number);
        self.device.free.lock().extend(old);
        drop(guard);
        file.acknowledged[usize::try_from(block).unwrap()].store(generation, Ordering::SeqCst);
    }

    fn punch(&self, file: &RaceFile, first: u64, count: u64) {
        let _inode = file.inode.lock();
        let range = first * BLOCK..(first + count) * BLOCK;
        let guard = file.space.block(range.clone()).unwrap();
        let _ = invalidate_range(&file.space, &guard, range).unwrap();
        nap(&file.stamped.seed);
        let mut map = file.stamped.map.lock();
        for block in first..first + count {
            let old = map.remove(&block);
            self.device.free.lock().extend(old);
        }
        drop(map);
        drop(guard);
    }

    fn buffered_write(&self, file: &RaceFile, block: u64) {
        let _inode = file.inode.lock();
        let generation = file.next_generation.fetch_add(1, Ordering::SeqCst);
        let context = WriteContext {
            space: &file.space,
            source: &file.source,
            end_of_file: BLOCKS * BLOCK,
            units_per_block: 1,
            placed: &|_| {},
        };
        let outcome = write(&context, block * BLOCK, &stamp(file.stamped.number, block, generation));
        assert!(outcome.error.is_none());
        file.acknowledged[usize::try_from(block).unwrap()].store(generation, Ordering::SeqCst);
    }

    fn change(&self, state: &mut u64) {
        let file = &self.files[usize::try_from(random(state) % FILES).unwrap()];
        let block = random(state) % BLOCKS;
        match random(state) % 4 {
            0 => self.punch(file, block, (random(state) % 6 + 1).min(BLOCKS - block)),
            1 => self.buffered_write(file, block),
            _ => self.direct_write(file, block),
        }
        self.changes.fetch_add(1, Ordering::Relaxed);
    }

    fn write_back(&self) {
        for file in &self.files {
            for run in collect_dirty(&file.space, 0..u64::MAX, 64 << 10) {
                let bytes: Vec<u8> = run.slices().flat_map(<[u8]>::to_vec).collect();
                let mut fresh = Vec::new();
                for (block, bytes) in (run.offset() / BLOCK..).zip(bytes.chunks(4096)) {
                    let number = self.device.allocate();
                    self.device.blocks[number].lock().copy_from_slice(bytes);
                    fresh.push((block, number));
                }
                nap(&file.stamped.seed);
                let mut map = file.stamped.map.lock();
                for (block, number) in fresh {
                    let old = map.insert(block, number);
                    self.device.free.lock().extend(old);
                }
                drop(map);
                run.complete(Ok(()));
            }
        }
    }

    fn run(&self, time: Duration) -> Option<String> {
        let end = Instant::now() + time;
        std::thread::scope(|scope| {
            for number in 1..=3_u64 {
                scope.spawn(move || {
                    let mut state = number.wrapping_mul(0x9E37_79B9_7F4A_7C15);
                    let readahead = Readahead::new();
                    while !self.stop.load(Ordering::Relaxed) {
                        self.read(&mut state, &readahead);
                    }
                });
            }
            for number in 11..=12_u64 {
                scope.spawn(move || {
                    let mut state = number.wrapping_mul(0x9E37_79B9_7F4A_7C15);
                    while !self.stop.load(Ordering::Relaxed) {
                        self.change(&mut state);
                    }
                });
            }
            scope.spawn(|| {
                while !self.stop.load(Ordering::Relaxed) || self.cache.dirty_bytes() > 0 {
                    self.write_back();
                    self.cache.evict_all_clean();
                    std::thread::yield_now();
                }
            });
            // On a busy machine longer, until enough has happened for the result to mean something.
            let latest = end + Duration::from_secs(60);
            let has_little =
                || self.reads.load(Ordering::Relaxed) <= ENOUGH || self.changes.load(Ordering::Relaxed) <= ENOUGH;
            while (Instant::now() < end || (has_little() && Instant::now() < latest))
                && !self.stop.load(Ordering::Relaxed)
            {
                std::thread::sleep(Duration::from_millis(5));
            }
            self.stop.store(true, Ordering::SeqCst);
        });
        self.wrong.lock().take()
    }
}

/// Reads and changes that a run needs.
const ENOUGH: u64 = 100;

#[test]
fn a_freed_block_never_enters_the_cache() {
    let race = Race::new(false);
    assert_eq!(race.run(Duration::from_millis(1500)), None);
    assert!(race.reads.load(Ordering::Relaxed) > ENOUGH && race.changes.load(Ordering::Relaxed) > ENOUGH);
}

#[test]
fn without_the_add_lock_the_race_is_found() {
    let race = Race::new(true);
    assert!(race.run(Duration::from_secs(10)).is_some(), "the test would not notice a lost exclusion");
}
