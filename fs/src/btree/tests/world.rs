//! Trees on a device, with a journal that is a list in memory and buckets that are handed out in order.

use super::*;
use crate::format::space::{Bucket, BucketState};
use crate::units::{BucketIndex, DeviceIndex};

pub type Change = (BtreeId, Position, Option<Value>);

/// Record `n` is `records[n - 1]`.
#[derive(Default)]
pub struct FakeLog {
    pub records: Mutex<Vec<Vec<Change>>>,
    pub flushed: AtomicU64,
    pub released: AtomicU64,
    /// The newest F: it never goes back.
    pub boundary: AtomicU64,
    /// How far F is held behind the newest record.
    pub lag: AtomicU64,
}

impl FakeLog {
    pub fn append(&self, changes: Vec<Change>) -> u64 {
        let mut records = self.records.lock();
        records.push(changes);
        records.len() as u64
    }
    pub fn len(&self) -> u64 {
        self.records.lock().len() as u64
    }
}

impl CheckpointLog for FakeLog {
    fn boundary(&self) -> Result<LogBoundary> {
        let first_replay = (self.len() + 1).saturating_sub(self.lag.load(Ordering::Relaxed)).max(1);
        let first_replay = first_replay.max(self.boundary.load(Ordering::Relaxed));
        self.boundary.store(first_replay, Ordering::Relaxed);
        Ok(LogBoundary {
            first_replay: JournalSequence(first_replay),
            offset: first_replay,
            previous_checksum: 9,
            totals: vec![(1, first_replay as i64)],
        })
    }
    fn flush(&self, upto: JournalSequence) -> Result<()> {
        assert!(upto.0 <= self.len(), "a checkpoint asks for records that do not exist");
        self.flushed.fetch_max(upto.0, Ordering::Relaxed);
        Ok(())
    }
    fn newest(&self) -> JournalSequence {
        JournalSequence(self.len())
    }
    fn release_before(&self, offset: u64, sequence: JournalSequence) {
        assert!(offset == sequence.0 || offset == 0);
        self.released.fetch_max(sequence.0, Ordering::Relaxed);
    }
    fn fill_permille(&self) -> u32 {
        0
    }
    fn unreflected_permille(&self) -> u32 {
        0
    }
    fn on_pressure(&self, _: Box<dyn Fn() + Send + Sync>) {}
}

/// Hands out buckets, each claim a transaction in the buckets tree.
pub struct TestBuckets {
    pub forest: std::sync::Weak<Forest>,
    pub log: Arc<FakeLog>,
    pub bucket_count: u64,
    /// Buckets that may still be claimed.
    pub left: AtomicU64,
}

impl TestBuckets {
    fn change(&self, bucket: u64, state: BucketState) -> u64 {
        let forest = self.forest.upgrade().unwrap();
        let value = Value::from(Bucket { state, generation: 0, charged_bytes: 0 }.encode());
        let change = (BtreeId::Buckets, Position::new(0, bucket, 0), Some(value));
        let sequence = self.log.append(vec![change.clone()]);
        commit(&forest, &[change], sequence);
        sequence
    }

    fn is_free(&self, bucket: u64) -> bool {
        let forest = self.forest.upgrade().unwrap();
        let value = forest.get(BtreeId::Buckets, Position::new(0, bucket, 0)).unwrap();
        value.is_none_or(|value| Bucket::decode(&value).unwrap().state == BucketState::Free)
    }
}

impl NodeBuckets for TestBuckets {
    fn claim(&self, count: usize) -> Result<Vec<(DeviceIndex, BucketIndex)>> {
        let count = count.min(usize::try_from(self.left.load(Ordering::Relaxed)).unwrap_or(usize::MAX));
        let half = self.bucket_count / 2;
        let mut claimed = Vec::new();
        for index in 0..half - 16 {
            // A copy of the superblock lies in the middle.
            for bucket in [16 + index, half + 1 + index] {
                if claimed.len() < count && self.is_free(bucket) {
                    self.change(bucket, BucketState::Metadata);
                    claimed.push((DeviceIndex(0), BucketIndex(bucket)));
                }
            }
        }
        self.left.fetch_sub(claimed.len() as u64, Ordering::Relaxed);
        Ok(claimed)
    }

    fn release(&self, buckets: &[(DeviceIndex, BucketIndex)]) -> Result<JournalSequence> {
        let mut sequence = 0;
        for (device, bucket) in buckets {
            assert_eq!(*device, DeviceIndex(0));
            sequence = self.change(bucket.0, BucketState::Free);
        }
        Ok(JournalSequence(sequence))
    }
}

pub struct World {
    pub device: Arc<dyn BlockDevice>,
    pub superblock: Arc<Superblock>,
    pub log: Arc<FakeLog>,
    pub forest: Arc<Forest>,
    pub epoch: u64,
    pub cache_bytes: u64,
    pub env: Arc<Env>,
    /// The filesystem's id and sizes as records up to now say.
    pub buckets: Arc<TestBuckets>,
}

pub const SIZE_BYTES: u64 = 256 << 20;

impl World {
    pub fn new(device: Arc<dyn BlockDevice>, replicas: u8, cache_bytes: u64) -> Self {
        let superblock = Arc::new(superblock(SIZE_BYTES, replicas));
        Self::open(device, superblock, Arc::default(), &Opening::empty(), 1, cache_bytes, Env::simulated(1)).unwrap()
    }

    pub fn open(
        device: Arc<dyn BlockDevice>,
        superblock: Arc<Superblock>,
        log: Arc<FakeLog>,
        opening: &Opening,
        epoch: u64,
        cache_bytes: u64,
        env: Arc<Env>,
    ) -> Result<Self> {
        let config = ForestConfig {
            superblock: Arc::clone(&superblock),
            devices: vec![Arc::clone(&device)],
            cache_bytes: Arc::new(AtomicU64::new(cache_bytes)),
            dirty_bytes_max: u64::MAX,
            epoch,
        };
        let forest = Forest::open(config, opening, Arc::clone(&env), Arc::default())?;
        let bucket_count = superblock.members[0].bucket_count;
        let buckets = Arc::new(TestBuckets {
            forest: Arc::downgrade(&forest),
            log: Arc::clone(&log),
            bucket_count,
            left: AtomicU64::new(u64::MAX),
        });
        forest.set_node_buckets(Arc::clone(&buckets) as Arc<dyn NodeBuckets>);
        Ok(Self { device, superblock, log, forest, epoch, cache_bytes, env, buckets })
    }

    pub fn reader(&self) -> NodeReader {
        NodeReader::new(Arc::clone(&self.superblock), vec![Arc::clone(&self.device)], Arc::default())
    }

    pub fn commit(&self, changes: Vec<Change>) -> u64 {
        let sequence = self.log.append(changes.clone());
        commit(&self.forest, &changes, sequence);
        sequence
    }

    pub fn checkpoint(&self) -> CheckpointOutcome {
        self.forest.checkpoint(&*self.log, CheckpointReason::Requested).unwrap()
    }

    /// Opens what `device` holds, with the log up to `cut`, as after a crash.
    pub fn reopen(&self, device: Arc<dyn BlockDevice>, cut: u64) -> Result<Self> {
        let records = self.log.records.lock().iter().take(cut as usize).cloned().collect::<Vec<_>>();
        let log =
            Arc::new(FakeLog { records: Mutex::new(records), flushed: AtomicU64::new(cut), ..FakeLog::default() });
        let reader = NodeReader::new(Arc::clone(&self.superblock), vec![Arc::clone(&device)], Arc::default());
        let opening = reader.choose_checkpoint()?;
        assert!(opening.newest.newest_sequence <= cut, "images hold records that were not durable");
        log.released.store(
            opening.previous.as_ref().map_or(opening.newest.first_replay, |previous| previous.first_replay),
            Ordering::Relaxed,
        );
        log.boundary.store(opening.newest.first_replay, Ordering::Relaxed);
        let world = Self::open(
            device,
            Arc::clone(&self.superblock),
            log,
            &opening,
            self.epoch + 1,
            self.cache_bytes,
            Arc::clone(&self.env),
        )?;
        let records = world.log.records.lock().clone();
        for (index, record) in records.iter().enumerate().skip(opening.newest.first_replay as usize - 1) {
            for (btree, position, value) in record {
                let sequence = JournalSequence(index as u64 + 1);
                world.forest.replay_put(*btree, *position, value.clone(), sequence)?;
            }
        }
        world.forest.end_replay()?;
        Ok(world)
    }

    /// What the log up to `cut` adds up to.
    pub fn model(&self, btree: BtreeId, cut: u64) -> Model {
        let mut model = Model::new();
        for record in self.log.records.lock().iter().take(cut as usize) {
            for (_, position, value) in record.iter().filter(|(at, ..)| *at == btree) {
                match value {
                    Some(value) => model.insert(*position, value.clone()),
                    None => model.remove(position),
                };
            }
        }
        model
    }

    pub fn assert_matches_log(&self) {
        for btree in BtreeId::ALL {
            assert_equal(&self.forest, btree, &self.model(btree, self.log.len()));
        }
    }

    /// The newest checkpoint on disk reaches exactly the slots that its map says are used, and every copy is good.
    pub fn assert_map_is_reachability(&self) {
        let reader = self.reader();
        let opening = reader.choose_checkpoint().unwrap();
        let mut reached = BTreeSet::new();
        walk_published(&reader, &opening.newest, &mut |node| {
            for (address, outcome) in &node.copies {
                assert!(outcome.is_ok(), "node {} copy {address:?}: {outcome:?}", node.pointer.node);
                assert!(reached.insert(*address));
            }
            let buckets: BTreeSet<u64> = node
                .copies
                .iter()
                .map(|(address, _)| address.offset / u64::from(self.superblock.geometry.bucket_bytes))
                .collect();
            assert_eq!(buckets.len(), node.copies.len(), "copies in one bucket");
            Ok(())
        })
        .unwrap();
        let mut mapped = BTreeSet::new();
        let node_bytes = u64::from(self.superblock.geometry.node_bytes);
        for entry in reader.read_map(&opening.newest).unwrap().into_iter().flatten() {
            for slot in (0..64u64).filter(|slot| entry.used & 1 << slot != 0) {
                let offset = entry.bucket * u64::from(self.superblock.geometry.bucket_bytes) + slot * node_bytes;
                mapped.insert(crate::format::node::NodeAddress { device: DeviceIndex(entry.device), offset });
            }
        }
        assert_eq!(reached, mapped, "the map differs from what can be reached");
        assert_eq!(reached, self.forest.space.lock().used_by_newest());
    }
}
