//! Space on real transactions, trees and a journal, on a device in memory.

mod life;
mod trigger;

use std::collections::{BTreeMap, BTreeSet};

use smallvec::smallvec;

use super::*;
use crate::btree::{Forest, ForestConfig, Opening};
use crate::device::MemDevice;
use crate::env::Progress;
use crate::filesystem::format::{plan, test_geometry};
use crate::format::extent::DataExtent;
use crate::format::space::{Backpointer, BucketState, DeviceUsage};
use crate::format::{ChecksumKind, CompressionKind};
use crate::journal::{JournalConfig, JournalStart};
use crate::sync::Mutex;
use crate::sync::atomic::AtomicU64;
use crate::transaction::CommitOptions;
use crate::units::{JournalSequence, SnapshotId};

const BLOCK: u32 = 4096;
const BLOCK_BYTES: u64 = BLOCK as u64;

struct Fixture {
    env: Arc<Env>,
    journal: Arc<Journal>,
    transactions: Arc<Transactions>,
    space: Arc<Space>,
    device: Arc<MemDevice>,
    superblock: Arc<Superblock>,
    /// The record that last emptied each bucket, as the test knows it: whoever deletes notes it.
    emptied_at: Mutex<BTreeMap<BucketKey, JournalSequence>>,
    /// Lives that began before the emptying was durable.
    early: AtomicU64,
    version: AtomicU64,
}

impl Fixture {
    fn new(env: Arc<Env>, switches: TestSwitches) -> Arc<Self> {
        Self::with_journal(env, switches, 8 << 20, 256 << 20)
    }

    fn with_journal(env: Arc<Env>, switches: TestSwitches, journal_bytes: u64, dirty_bytes_max: u64) -> Arc<Self> {
        let metrics = Arc::new(Metrics::default());
        let size = 64 << 20;
        let options = crate::filesystem::format::FormatOptions { journal_bytes, ..test_geometry() };
        let superblock = Arc::new(plan(&options, size).unwrap());
        let device = Arc::new(MemDevice::new(size));
        let devices: Vec<Arc<dyn BlockDevice>> = vec![device.clone()];
        let config = ForestConfig {
            superblock: Arc::clone(&superblock),
            devices: devices.clone(),
            cache_bytes: Arc::new(AtomicU64::new(256 << 20)),
            dirty_bytes_max: dirty_bytes_max.max(Reserves::of(&superblock).dirty_node_bytes_max),
            epoch: 1,
        };
        let forest = Forest::open(config, &Opening::empty(), env.clone(), metrics.clone()).unwrap();
        let config = JournalConfig {
            record_bytes_max: 64 << 10,
            ..JournalConfig::new(&superblock, devices.clone(), Some(std::time::Duration::from_secs(1)))
        };
        let journal = Journal::open(config, JournalStart::fresh(), env.clone(), metrics.clone()).unwrap();
        let transactions = Transactions::new(forest, journal.clone(), env.clone(), metrics.clone());
        let space = Space::open_with(
            superblock.clone(),
            devices,
            transactions.clone(),
            journal.clone(),
            env.clone(),
            metrics,
            switches,
        )
        .unwrap();
        let (emptied_at, early, version) = (Mutex::default(), AtomicU64::new(0), AtomicU64::new(1));
        Arc::new(Self { env, journal, transactions, space, device, superblock, emptied_at, early, version })
    }

    /// With real checkpoints, a small journal, and the cap on dirty nodes that the reserve is made for.
    fn checkpointed(seed: u64) -> Arc<Self> {
        let env = Env::simulated(seed);
        let fixture = Self::with_journal(env, TestSwitches::default(), 1 << 20, 0);
        let forest = fixture.transactions.forest();
        forest.set_node_buckets(fixture.space.node_buckets());
        let interval = std::time::Duration::from_secs(5);
        let checkpoints = forest.checkpoint_worker(fixture.journal.clone(), interval);
        fixture.env.register(checkpoints);
        fixture.start()
    }

    /// With the workers of journal and space, and a simple copygc, in the simulation.
    fn simulated(seed: u64, switches: TestSwitches) -> Arc<Self> {
        Self::new(Env::simulated(seed), switches).start()
    }

    fn start(self: Arc<Self>) -> Arc<Self> {
        let fixture = self;
        for worker in fixture.journal.workers().into_iter().chain(fixture.space.workers()) {
            fixture.env.register(worker);
        }
        fixture.env.register(Arc::new(TestCopyGc { fixture: Arc::clone(&fixture) }));
        fixture
    }

    fn allocate(&self, point: WritePoint, bytes: u32, watermark: Watermark) -> Result<Allocation> {
        let allocation = self.space.allocate(point, bytes, watermark)?;
        let key = (allocation.device, allocation.bucket);
        if allocation.offset.is_multiple_of(self.space.reserves().bucket_bytes) {
            let emptied_at = self.emptied_at.lock().get(&key).copied();
            if emptied_at.is_some_and(|emptied_at| emptied_at > self.journal.reusable()) {
                self.early.fetch_add(1, Ordering::SeqCst);
            }
        }
        Ok(allocation)
    }

    /// Puts a block of a file: new data in new space, then one transaction.
    fn write(&self, inode: u64, block: u64) -> Result<()> {
        let reservation = self.space.reserve(BLOCK_BYTES)?;
        let allocation = self.allocate(WritePoint::User(inode), BLOCK, Watermark::Normal)?;
        let version = self.version.fetch_add(1, Ordering::SeqCst);
        self.device.write(allocation.offset, &content(inode, block, version)).unwrap();
        let position = Position::new(inode, (block + 1) * BLOCK_BYTES, SnapshotId::ROOT.0);
        let committed = self.transactions.run(CommitOptions::data(), |transaction| {
            let old = transaction.get(BtreeId::Extents, position)?;
            let old = old.map(|old| ExtentValue::decode(&old)).transpose()?;
            let pointer = pointer(transaction, &allocation, 0);
            transaction.put(BtreeId::Extents, position, raw(BLOCK, pointer, version).encode());
            Ok(old)
        })?;
        self.note_dropped(committed.value.as_ref(), committed.sequence);
        drop(reservation);
        Ok(())
    }

    fn delete(&self, inode: u64, block: u64) -> Result<()> {
        let position = Position::new(inode, (block + 1) * BLOCK_BYTES, SnapshotId::ROOT.0);
        let committed = self.transactions.run(CommitOptions::reclaim(), |transaction| {
            let old = transaction.get(BtreeId::Extents, position)?;
            transaction.delete(BtreeId::Extents, position);
            old.map(|old| ExtentValue::decode(&old)).transpose().map_err(Error::from)
        })?;
        self.note_dropped(committed.value.as_ref(), committed.sequence);
        Ok(())
    }

    fn note_dropped(&self, old: Option<&ExtentValue>, sequence: JournalSequence) {
        if let Some(ExtentValue::Data(data)) = old {
            for pointer in &data.pointers {
                let bucket = BucketIndex(pointer.offset / self.space.reserves().bucket_bytes);
                let mut emptied_at = self.emptied_at.lock();
                let last = emptied_at.entry((pointer.device, bucket)).or_default();
                *last = sequence.max(*last);
            }
        }
    }

    fn keys(&self, btree: BtreeId) -> Vec<(Position, Vec<u8>)> {
        let keys = self.transactions.read().range(btree, Position::MIN, Position::MAX, usize::MAX).unwrap();
        keys.into_iter().map(|(position, value)| (position, value.to_vec())).collect()
    }

    /// Lets the workers run until nothing is left to be freed.
    fn settle(&self) {
        self.space.allocator.close_empty();
        self.env
            .wait(self.space.allocator.changed(), || {
                (self.space.allocator.emptied_span().is_none() && !self.space.allocator.is_busy()).then_some(())
            })
            .unwrap();
    }

    /// Everything that is derived, against a recount from the extents alone.
    fn check(&self) {
        let (mut charges, mut backpointers) = (BTreeMap::new(), BTreeMap::new());
        let mut totals: BTreeMap<AccountingCounter, i64> = BTreeMap::new();
        let mut add = |counter, delta: i64| *totals.entry(counter).or_default() += delta;
        let bucket_bytes = self.space.reserves().bucket_bytes;
        for (position, value) in self.keys(BtreeId::Extents) {
            match ExtentValue::decode(&value).unwrap() {
                ExtentValue::Data(data) => {
                    for pointer in &data.pointers {
                        let charged = data.disk_bytes.min(data.length);
                        let (bucket, start) = (pointer.offset / bucket_bytes, pointer.offset % bucket_bytes);
                        let key = (pointer.device, BucketIndex(bucket));
                        *charges.entry(key).or_insert(0) += u64::from(charged);
                        add(AccountingCounter::DataBytes, i64::from(charged));
                        assert_eq!(self.space.bucket(key).unwrap().generation, pointer.generation, "{position}");
                        let at = Position::new(
                            u64::from(pointer.device.0) << 48 | bucket,
                            start << 32 | u64::from(data.frame_offset / BLOCK),
                            position.snapshot,
                        );
                        let value = Backpointer { btree: BtreeId::Extents, disk_bytes: data.disk_bytes, position };
                        assert_eq!(backpointers.insert(at, value.encode()), None);
                        if data.compression != CompressionKind::None {
                            add(AccountingCounter::CompressedDiskBytes, i64::from(charged));
                        }
                    }
                    if data.compression != CompressionKind::None {
                        add(AccountingCounter::CompressedLogicalBytes, i64::from(data.length));
                    }
                }
                ExtentValue::Unwritten { length } => add(AccountingCounter::ReservedBytes, i64::from(length)),
                ExtentValue::Inline(bytes) => add(AccountingCounter::InlineBytes, bytes.len() as i64),
                ExtentValue::Whiteout { .. } => {}
            }
        }
        assert_eq!(self.keys(BtreeId::Backpointers).into_iter().collect::<BTreeMap<_, _>>(), backpointers);
        let (mut free, mut need_discard) = (BTreeSet::new(), BTreeSet::new());
        for (position, value) in self.keys(BtreeId::Buckets) {
            let bucket = Bucket::decode(&value).unwrap();
            let key = (DeviceIndex(u8::try_from(position.inode).unwrap()), BucketIndex(position.offset));
            assert!(!self.superblock.is_reserved(key.0.0, key.1.0));
            assert_eq!(bucket.charged_bytes, charges.remove(&key).unwrap_or(0), "bucket {key:?}");
            assert_eq!(bucket.charged_bytes > 0, bucket.state == BucketState::Data);
            match bucket.state {
                BucketState::Data => add(AccountingCounter::DataBuckets, 1),
                BucketState::Metadata => add(AccountingCounter::MetadataBuckets, 1),
                BucketState::NeedDiscard => {
                    add(AccountingCounter::NeedDiscardBuckets, 1);
                    need_discard.insert(position);
                }
                BucketState::Free => {
                    free.insert(position);
                }
                BucketState::Reserved => panic!("a key of a reserved bucket"),
            }
        }
        assert!(charges.is_empty(), "extents in buckets with no key: {charges:?}");
        let mark = self.transactions.read().get(BtreeId::Devices, Position::MIN).unwrap();
        let mark = mark.map_or(0, |value| DeviceUsage::decode(&value).unwrap().untouched_from);
        let known: BTreeSet<_> = self.keys(BtreeId::Buckets).into_iter().map(|(position, _)| position.offset).collect();
        for bucket in (0..mark).filter(|bucket| !known.contains(bucket) && !self.superblock.is_reserved(0, *bucket)) {
            free.insert(Position::new(0, bucket, 0));
        }
        let positions = |btree| self.keys(btree).into_iter().map(|(position, _)| position).collect::<BTreeSet<_>>();
        assert_eq!(positions(BtreeId::FreeSpace), free);
        assert_eq!(positions(BtreeId::NeedDiscard), need_discard);
        let journalled = self.journal.totals();
        for counter in AccountingCounter::ALL {
            assert_eq!(journalled.get(counter), totals.get(&counter).copied().unwrap_or(0), "{counter:?}");
        }
        let usage = self.space.usage();
        let total = |counter| totals.get(&counter).copied().unwrap_or(0) as u64;
        assert_eq!(usage.data_bytes, total(AccountingCounter::DataBytes));
        assert_eq!(usage.unwritten_bytes, total(AccountingCounter::ReservedBytes));
        assert_eq!(usage.data_buckets, total(AccountingCounter::DataBuckets));
        assert_eq!(usage.metadata_buckets, total(AccountingCounter::MetadataBuckets));
        assert_eq!(usage.need_discard_buckets, total(AccountingCounter::NeedDiscardBuckets));
    }

    /// Every block of file data holds what was last written there.
    fn check_content(&self) {
        let mut buffer = vec![0; BLOCK as usize];
        for (position, value) in self.keys(BtreeId::Extents) {
            if let ExtentValue::Data(data) = ExtentValue::decode(&value).unwrap() {
                self.device.read(data.pointers[0].offset, &mut buffer).unwrap();
                let block = position.offset / BLOCK_BYTES - 1;
                assert_eq!(buffer, content(position.inode, block, data.checksums[0]), "{position}");
            }
        }
    }
}

fn content(inode: u64, block: u64, version: u64) -> Vec<u8> {
    [inode, block, version, 0].map(u64::to_le_bytes).concat().repeat(BLOCK as usize / 32)
}

/// A raw extent whose checksum is a version number.
fn raw(length: u32, pointer: ExtentPointer, version: u64) -> ExtentValue {
    ExtentValue::Data(DataExtent {
        length,
        pointers: smallvec![pointer],
        compression: CompressionKind::None,
        disk_bytes: length,
        stream_bytes: length,
        frame_bytes: length,
        frame_offset: 0,
        checksum_kind: ChecksumKind::Xxh3,
        checksums: vec![version],
    })
}

/// Moves the blocks of fragmented buckets, as `data` does for real extents.
struct TestCopyGc {
    fixture: Arc<Fixture>,
}

impl Worker for TestCopyGc {
    fn name(&self) -> &'static str {
        "test-copygc"
    }

    fn step(&self, _: u32) -> Result<Progress> {
        let fixture = &self.fixture;
        if !fixture.space.copygc_needed() {
            return Ok(Progress::Idle(None));
        }
        let Some((device, bucket)) = fixture.space.fragmented_bucket()? else { return Ok(Progress::Idle(None)) };
        let prefix = u64::from(device.0) << 48 | bucket.0;
        let (from, to) = (Position::new(prefix, 0, 0), Position::new(prefix, u64::MAX, u32::MAX));
        for (_, value) in fixture.transactions.read().range(BtreeId::Backpointers, from, to, usize::MAX)? {
            let position = Backpointer::decode(&value)?.position;
            let Some(value) = fixture.transactions.read().get(BtreeId::Extents, position)? else { continue };
            let ExtentValue::Data(data) = ExtentValue::decode(&value)? else { continue };
            let _references = fixture.space.reference(&data.pointers);
            let allocation = fixture.allocate(WritePoint::CopyGc, BLOCK, Watermark::CopyGc)?;
            let mut buffer = vec![0; BLOCK as usize];
            fixture.device.read(data.pointers[0].offset, &mut buffer)?;
            fixture.device.write(allocation.offset, &buffer)?;
            let committed = fixture.transactions.run(CommitOptions::reclaim(), |transaction| {
                if transaction.get(BtreeId::Extents, position)?.as_ref() != Some(&value) {
                    return Ok(false);
                }
                let moved = pointer(transaction, &allocation, 0);
                transaction.put(BtreeId::Extents, position, raw(BLOCK, moved, data.checksums[0]).encode());
                Ok(true)
            })?;
            if committed.value {
                fixture.note_dropped(Some(&ExtentValue::Data(data)), committed.sequence);
            }
        }
        Ok(Progress::Worked)
    }

    fn event(&self) -> &Event {
        self.fixture.space.copygc_event()
    }
}
