//! Committing threads, readers and checkpoints at once.

use super::world::*;
use super::*;
use crate::device::MemDevice;
use crate::format::key::packed_bytes;
use crate::units::JournalSequence;
use std::time::{Duration, Instant};

/// A journal that hands out sequences under leaf locks, as the real one.
#[derive(Default)]
struct SharedLog {
    state: Mutex<SharedState>,
    changed: Event,
    checkpoints: AtomicU64,
}

#[derive(Default)]
struct SharedState {
    next: u64,
    reserved: BTreeSet<u64>,
    records: BTreeMap<u64, Vec<Change>>,
}

impl SharedLog {
    fn reserve(&self) -> u64 {
        let mut state = self.state.lock();
        state.next += 1;
        let sequence = state.next;
        state.reserved.insert(sequence);
        sequence
    }
    fn append(&self, sequence: u64, changes: Vec<Change>) {
        let mut state = self.state.lock();
        state.records.insert(sequence, changes);
        state.reserved.remove(&sequence);
        drop(state);
        self.changed.notify();
    }
}

impl CheckpointLog for SharedLog {
    fn boundary(&self) -> Result<LogBoundary> {
        let first_replay = self.state.lock().next + 1;
        loop {
            let seen = self.changed.generation();
            if self.state.lock().reserved.first().is_none_or(|&first| first >= first_replay) {
                break;
            }
            self.changed.wait_past(seen, Some(Duration::from_millis(100)));
        }
        self.checkpoints.fetch_add(1, Ordering::Relaxed);
        let first_replay = JournalSequence(first_replay);
        Ok(LogBoundary { first_replay, offset: first_replay.0, previous_checksum: 0, totals: Vec::new() })
    }
    fn flush(&self, _: JournalSequence) -> Result<()> {
        Ok(())
    }
    fn newest(&self) -> JournalSequence {
        JournalSequence(self.state.lock().next)
    }
    fn release_before(&self, _: u64, _: JournalSequence) {}
    fn fill_permille(&self) -> u32 {
        0
    }
    fn unreflected_permille(&self) -> u32 {
        0
    }
    fn on_pressure(&self, _: Box<dyn Fn() + Send + Sync>) {}
}

/// Buckets in order, with no transaction: the claim itself is tested elsewhere.
struct PlainBuckets(Mutex<u64>);

impl NodeBuckets for PlainBuckets {
    fn claim(&self, count: usize) -> Result<Vec<(crate::units::DeviceIndex, crate::units::BucketIndex)>> {
        let mut next = self.0.lock();
        let first = *next;
        *next += count as u64;
        Ok((first..*next).map(|bucket| (crate::units::DeviceIndex(0), crate::units::BucketIndex(bucket))).collect())
    }
    fn release(&self, _: &[(crate::units::DeviceIndex, crate::units::BucketIndex)]) -> Result<JournalSequence> {
        Ok(JournalSequence(0))
    }
}

const KEYS: u64 = 600;

/// Moves a unit between two counters: their sum never changes.
fn transfer(forest: &Forest, log: &SharedLog, from: Position, to: Position, bytes: usize) {
    let mut targets = vec![
        LeafTarget { btree: BtreeId::Extents, position: from, write: true },
        LeafTarget { btree: BtreeId::Extents, position: to, write: true },
    ];
    loop {
        forest.wait_for_dirty_room().unwrap();
        let mut leaves = forest.lock_leaves(&mut targets).unwrap();
        let read = |position| {
            let value = leaves.get(BtreeId::Extents, position);
            value.map_or(1000, |value| u64::from_le_bytes(value[..8].try_into().unwrap()))
        };
        let encode = |amount: u64| {
            let mut value = amount.to_le_bytes().to_vec();
            value.resize(bytes, 0);
            Value::from(value)
        };
        let mut changes: Vec<Change> = vec![
            (BtreeId::Extents, from, Some(encode(read(from) - 1))),
            (BtreeId::Extents, to, Some(encode(read(to) + 1))),
        ];
        changes.sort_by_key(|(_, position, _)| *position);
        let updates =
            changes.iter().map(|(btree, position, value)| (*btree, *position, packed_bytes(value.as_deref())));
        if let Some((btree, position, bytes)) = leaves.full_leaf(updates) {
            drop(leaves);
            forest.make_room(btree, position, bytes).unwrap();
            continue;
        }
        let sequence = log.reserve();
        for (btree, position, value) in &changes {
            leaves.put(*btree, *position, value.clone(), JournalSequence(sequence));
        }
        log.append(sequence, changes);
        return;
    }
}

#[test]
fn commits_splits_reads_and_checkpoints_at_once_keep_every_sum() {
    let device: Arc<dyn BlockDevice> = Arc::new(MemDevice::new(SIZE_BYTES));
    let superblock = Arc::new(superblock(SIZE_BYTES, 2));
    let config = ForestConfig {
        superblock: Arc::clone(&superblock),
        devices: vec![Arc::clone(&device)],
        cache_bytes: Arc::new(AtomicU64::new(64 << 10)),
        dirty_bytes_max: 12 * 8192,
        epoch: 1,
    };
    let env = Env::real();
    let forest = Forest::open(config, &Opening::empty(), Arc::clone(&env), Arc::default()).unwrap();
    forest.set_node_buckets(Arc::new(PlainBuckets(Mutex::new(16))));
    let log = Arc::new(SharedLog::default());
    let worker = forest.checkpoint_worker(Arc::clone(&log) as Arc<dyn CheckpointLog>, Duration::from_millis(5));
    let stop = AtomicBool::new(false);
    let end = Instant::now() + Duration::from_millis(1500);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let seen = worker.event().generation();
                if worker.step(1).unwrap() != crate::env::Progress::Worked {
                    worker.event().wait_past(seen, Some(Duration::from_millis(2)));
                }
            }
        });
        let mut writers = Vec::new();
        for thread in 0..3u64 {
            let (forest, log) = (&forest, &log);
            writers.push(scope.spawn(move || {
                let mut random = thread + 1;
                let mut below = move |limit: u64| {
                    random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    (random >> 33) % limit
                };
                let mut commits = 0u64;
                while Instant::now() < end {
                    let (from, to) = (below(KEYS), below(KEYS - 1));
                    let to = if to >= from { to + 1 } else { to };
                    let bytes = 8 + below(300) as usize;
                    transfer(forest, log, Position::new(from, 0, 0), Position::new(to, 0, 0), bytes);
                    commits += 1;
                }
                commits
            }));
        }
        let reader = scope.spawn(|| {
            let mut scans = 0;
            while Instant::now() < end {
                for (position, _) in all_keys(&forest, BtreeId::Extents, 32) {
                    assert!(position.inode < KEYS);
                }
                scans += 1;
            }
            scans
        });
        let commits: u64 = writers.into_iter().map(|writer| writer.join().unwrap()).sum();
        let scans = reader.join().unwrap();
        stop.store(true, Ordering::Relaxed);
        worker.event().notify();
        println!(
            "{commits} commits, {scans} scans, {} checkpoints, {} contended, longest wait {} us, {} waits for checkpoints, {} evictions",
            forest.metrics.checkpoints.get(),
            forest.metrics.transaction_leaf_contended.get(),
            forest.metrics.transaction_lock_wait_max_us.get(),
            forest.metrics.transaction_checkpoint_waits.get(),
            forest.metrics.btree_evictions.get(),
        );
        assert!(commits > 100 && scans > 1);
    });
    assert!(forest.metrics.checkpoints.get() > 3);

    let mut model = Model::new();
    let records = std::mem::take(&mut log.state.lock().records);
    for (_, position, value) in records.values().flatten() {
        model.insert(*position, value.clone().unwrap());
    }
    assert_equal(&forest, BtreeId::Extents, &model);
    let sum: u64 = model.values().map(|value| u64::from_le_bytes(value[..8].try_into().unwrap())).sum();
    assert_eq!(sum, 1000 * model.len() as u64);

    // What the newest checkpoint holds, with the rest of the log, is the same.
    let reader = NodeReader::new(Arc::clone(&superblock), vec![Arc::clone(&device)], Arc::default());
    let opening = reader.choose_checkpoint().unwrap();
    let mut reached = BTreeSet::new();
    walk_published(&reader, &opening.newest, &mut |node| {
        for (address, outcome) in &node.copies {
            assert!(outcome.is_ok(), "{outcome:?}");
            assert!(reached.insert(*address));
        }
        Ok(())
    })
    .unwrap();
    assert_eq!(reached, forest.space.lock().used_by_newest());
    let config = ForestConfig {
        superblock,
        devices: vec![device],
        cache_bytes: Arc::new(AtomicU64::new(64 << 10)),
        dirty_bytes_max: u64::MAX,
        epoch: 2,
    };
    let again = Forest::open(config, &opening, env, Arc::default()).unwrap();
    for (&sequence, changes) in records.range(opening.newest.first_replay..) {
        for (btree, position, value) in changes {
            again.replay_put(*btree, *position, value.clone(), JournalSequence(sequence)).unwrap();
        }
    }
    again.end_replay().unwrap();
    assert_equal(&again, BtreeId::Extents, &model);
}
