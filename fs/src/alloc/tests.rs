//! The allocator against a plain model of a disk: who may write where, and when.

use std::cell::RefCell;
use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::format::space::{Bucket, BucketState};
use crate::format::superblock::{BucketRange, Defaults, ErrorCounts, Geometry, Layout, Member, Superblock};
use crate::metrics::Metrics;
use crate::sync::Arc;
use crate::sync::atomic::Ordering;
use crate::units::JournalSequence;

const BLOCK: u32 = 4096;
const BUCKET: u32 = 8 * BLOCK;
const DEVICE: DeviceIndex = DeviceIndex(0);

fn superblock(bucket_count: u64, bucket_bytes: u32, node_bytes: u32, metadata_replicas: u8) -> Superblock {
    let size_bytes = bucket_count * u64::from(bucket_bytes);
    let area = |first| BucketRange { device: 0, first, count: 4 };
    Superblock {
        filesystem: uuid::Uuid::nil(),
        sequence: 1,
        compat: 0,
        read_only_compat: 0,
        incompat: 0,
        version: 1,
        version_minimum: 1,
        geometry: Geometry { block_bytes: BLOCK, bucket_bytes, node_bytes, metadata_replicas },
        members: vec![Member { uuid: [0; 16], size_bytes, bucket_count }],
        layout: Layout { journal: vec![area(2)], checkpoints: vec![area(10)] },
        defaults: Defaults::default(),
        errors: ErrorCounts::default(),
        unknown_sections: Vec::new(),
    }
}

fn small_reserves() -> Reserves {
    Reserves {
        bucket_bytes: u64::from(BUCKET),
        block_bytes: u64::from(BLOCK),
        usable_buckets: 24,
        dirty_node_bytes_max: 0,
        metadata_buckets: 2,
        copygc_buckets: 2,
        slack_buckets: 2,
        node_bytes: 0,
        metadata_copies: 2,
    }
}

fn floor(watermark: Watermark) -> u64 {
    Counters::default().floor_buckets(&small_reserves(), watermark)
}

#[test]
fn reserved_buckets_are_those_of_the_superblock() {
    for (bucket_count, bucket_bytes) in [(600, 64 << 10), (40, 1 << 20), (2048, 256 << 10)] {
        let superblock = superblock(bucket_count, bucket_bytes, 16 << 10, 2);
        let ranges = capacity::reserved_ranges(&superblock, 0);
        for bucket in 0..bucket_count {
            let reserved = capacity::in_ranges(&ranges, (DEVICE, BucketIndex(bucket)));
            assert_eq!(reserved, superblock.is_reserved(0, bucket), "bucket {bucket} of {bucket_count}");
        }
    }
}

#[test]
fn reserves_scale_with_the_device() {
    for (bucket_count, bucket_bytes, node_bytes) in [
        (600_u64, 64_u32 << 10, 16_u32 << 10),
        (512, 256 << 10, 32 << 10),
        (2048, 256 << 10, 32 << 10),
        (8192, 1 << 20, 128 << 10),
        (2 << 20, 4 << 20, 128 << 10),
    ] {
        let superblock = superblock(bucket_count, bucket_bytes, node_bytes, 2);
        let reserves = Reserves::of(&superblock);
        let usable = reserves.usable_buckets * u64::from(bucket_bytes);
        let permille = if usable < 100 << 20 { 850 } else { 900 };
        assert!(reserves.capacity_bytes() * 1000 >= usable * permille, "nine tenths for people: {reserves:?}");
        assert!(reserves.copygc_buckets >= 4 && reserves.dirty_node_bytes_max >= 24 * u64::from(node_bytes));
        check_derivation(&superblock, &reserves);
    }
}

/// Node space and journal as design 4.3 has them, in numbers.
fn check_derivation(superblock: &Superblock, reserves: &Reserves) {
    let geometry = superblock.geometry;
    let (node_bytes, copies) = (u64::from(geometry.node_bytes), u64::from(geometry.metadata_replicas));
    let needed = (3 * reserves.dirty_node_bytes_max + 8 * node_bytes) * copies;
    assert!(reserves.metadata_bytes() >= needed, "{reserves:?}");
    // What a checkpoint asks for at most, as `Forest::estimate_slots` has it, in buckets.
    let dirty = reserves.dirty_node_bytes_max / node_bytes;
    let slots = (dirty + dirty / 8 + 8) * copies;
    let claims = slots.div_ceil(u64::from(geometry.bucket_bytes) / node_bytes);
    let mut log = Vec::new();
    let position = crate::format::Position::new(255, u64::MAX, 0);
    let bucket = Bucket { state: BucketState::Metadata, generation: u32::MAX, charged_bytes: 0 };
    crate::format::journal::encode_key(crate::format::BtreeId::Buckets, position, Some(&bucket.encode()), &mut log);
    crate::format::journal::encode_key(crate::format::BtreeId::FreeSpace, position, None, &mut log);
    let claim_blocks = (claims * log.len() as u64).div_ceil(4096 - 256);
    let ring = superblock.layout.journal[0].count * u64::from(geometry.bucket_bytes) / 4096;
    // A statement, what frees emptied buckets, the release of surplus ones: a block each; twice, since the first checkpoint may free nothing.
    let needed = 2 * (3 + claim_blocks);
    assert!(capacity::checkpoint_blocks(ring) >= needed, "{needed} blocks of {ring} for {claims} claims: {reserves:?}");
}

/// Every geometry that mkfs accepts on the smallest device for it, with the smallest journal (1 MiB), is refused or has its reserves.
#[test]
fn the_smallest_devices_have_their_reserves() {
    let mut accepted = 0;
    for bucket_shift in 16..=24 {
        for node_shift in 14..=bucket_shift.min(20) {
            for replicas in [1, 2] {
                for buckets in [512, 600, 1000, 5000, 1 << 20] {
                    let (bucket_bytes, node_bytes) = (1_u32 << bucket_shift, 1_u32 << node_shift);
                    if bucket_bytes / node_bytes > 64 {
                        continue;
                    }
                    let mut superblock = superblock(buckets, bucket_bytes, node_bytes, replicas);
                    let journal = (1_u64 << 20).div_ceil(u64::from(bucket_bytes));
                    superblock.layout.journal = vec![BucketRange { device: 0, first: 2, count: journal }];
                    let reserves = Reserves::of(&superblock);
                    if reserves.leaves_room() {
                        accepted += 1;
                        check_derivation(&superblock, &reserves);
                    }
                }
            }
        }
    }
    assert!(accepted > 300, "{accepted}");
}

#[test]
fn what_is_called_available_can_be_reserved_and_no_more() {
    let reserves = small_reserves();
    let allocator = Allocator::new(reserves, 1, Arc::new(Metrics::default()));
    let mut held = Vec::new();
    for step in 0.. {
        let available = allocator.usage().available_bytes;
        let more = available + reserves.headroom_bytes() + 2 * u64::from(BLOCK);
        assert!(allocator.reserve(more).is_err(), "{more}, with {available} available");
        if available == 0 {
            assert!(step > 3);
            break;
        }
        drop(allocator.reserve(available).unwrap());
        assert_eq!(allocator.usage().available_bytes, available, "dropped, it is all back");
        held.push(allocator.reserve((available / 2).max(u64::from(BLOCK))).unwrap());
    }
    drop(held);
    assert_eq!(allocator.counters().reserved_bytes.load(Ordering::SeqCst), 0);
    let privileged = allocator.reserve_privileged(1 << 30);
    assert_eq!(allocator.usage().available_bytes, 0);
    drop(privileged);
    assert_eq!(allocator.counters().reserved_bytes.load(Ordering::SeqCst), 0);
}

proptest! {
    /// Splitting and merging lose nothing, and dropping gives all of it back.
    #[test]
    fn reservations_are_conserved(bytes in 1_u64..400_000, cuts in proptest::collection::vec(0_u64..100_000, 0..20)) {
        let allocator = Allocator::new(small_reserves(), 1, Arc::new(Metrics::default()));
        let reserved = || allocator.counters().reserved_bytes.load(Ordering::SeqCst);
        let Ok(mut whole) = allocator.reserve(bytes) else { return Ok(()) };
        let (promised, data) = (reserved(), whole.bytes());
        let mut parts: Vec<_> = cuts.iter().map(|cut| whole.split(*cut)).collect();
        prop_assert_eq!(parts.iter().map(SpaceReservation::bytes).sum::<u64>() + whole.bytes(), data);
        prop_assert_eq!(reserved(), promised);
        if let Some(part) = parts.pop() { whole.merge(part); }
        prop_assert_eq!(reserved(), promised);
        drop(parts);
        drop(whole);
        prop_assert_eq!(reserved(), 0);
    }
}

/// The trees as plain maps.
#[derive(Default)]
struct Trees {
    buckets: BTreeMap<BucketIndex, Bucket>,
    free_keys: BTreeMap<BucketIndex, bool>,
    mark: u64,
}

struct ModelStore<'a> {
    trees: &'a RefCell<Trees>,
    bucket_count: u64,
}

impl BucketStore for ModelStore<'_> {
    fn free_buckets(&self, device: DeviceIndex, from: BucketIndex, limit: usize) -> Result<FreeBatch> {
        let trees = self.trees.borrow();
        let mut batch = FreeBatch::default();
        // Two at a time, so that searches end in the middle.
        for (&bucket, &discarded) in trees.free_keys.range(from..).take(limit.min(2)) {
            let generation = trees.buckets.get(&bucket).map_or(0, |bucket| bucket.generation);
            batch.candidates.push(FreeCandidate { key: (device, bucket), generation, discarded });
            batch.next = Some(BucketIndex(bucket.0 + 1));
        }
        Ok(batch)
    }

    fn extend(&self, _: DeviceIndex) -> Result<u64> {
        let mut trees = self.trees.borrow_mut();
        let end = (trees.mark + 5).min(self.bucket_count);
        let fresh = end - trees.mark;
        for bucket in trees.mark..end {
            trees.free_keys.insert(BucketIndex(bucket), true);
        }
        trees.mark = end;
        Ok(fresh)
    }
}

/// An extent that is in the trees.
#[derive(Clone, Debug)]
struct Live {
    bucket: BucketIndex,
    start: u64,
    length: u32,
}

struct Model {
    allocator: Arc<Allocator>,
    trees: RefCell<Trees>,
    bucket_count: u64,
    sequence: u64,
    reusable: u64,
    outstanding: Vec<Allocation>,
    live: Vec<Live>,
    /// News of emptyings that have not reached the allocator.
    late: Vec<(BucketKey, Bucket, Bucket, JournalSequence)>,
    /// Where the present life of each bucket has come to.
    written_to: BTreeMap<BucketIndex, u64>,
    /// The record that last emptied each bucket.
    emptied_at: BTreeMap<BucketIndex, u64>,
    references: Vec<BucketReferences>,
}

impl Model {
    fn new() -> Self {
        let reserves = small_reserves();
        Self {
            allocator: Allocator::new(reserves, 1, Arc::new(Metrics::default())),
            trees: RefCell::default(),
            bucket_count: reserves.usable_buckets,
            sequence: 0,
            reusable: 0,
            outstanding: Vec::new(),
            live: Vec::new(),
            late: Vec::new(),
            written_to: BTreeMap::new(),
            emptied_at: BTreeMap::new(),
            references: Vec::new(),
        }
    }

    fn bucket(&self, bucket: BucketIndex) -> Bucket {
        self.trees.borrow().buckets.get(&bucket).copied().unwrap_or(Bucket::UNUSED)
    }

    fn take(&mut self, point: WritePoint, blocks: u32, watermark: Watermark) -> Result<(), TestCaseError> {
        loop {
            match self.allocator.take(point, blocks * BLOCK, watermark) {
                Take::Space(allocation) => return self.check_allocation(allocation, blocks, watermark),
                Take::Refill => {
                    let store = ModelStore { trees: &self.trees, bucket_count: self.bucket_count };
                    self.allocator.refill(&store).unwrap();
                }
                Take::Full => {
                    prop_assert!(!self.allocator.could_take(point, watermark));
                    let floor = floor(watermark);
                    prop_assert!(self.allocator.loose() <= floor, "{} loose buckets refused", self.allocator.loose());
                    return Ok(());
                }
            }
        }
    }

    fn check_allocation(&mut self, got: Allocation, blocks: u32, watermark: Watermark) -> Result<(), TestCaseError> {
        let start = got.offset % u64::from(BUCKET);
        prop_assert_eq!(got.offset / u64::from(BUCKET), got.bucket.0);
        prop_assert!(got.length > 0 && got.length <= blocks * BLOCK && got.length.is_multiple_of(BLOCK));
        prop_assert!(start + u64::from(got.length) <= u64::from(BUCKET));
        if start == 0 {
            let bucket = self.bucket(got.bucket);
            prop_assert_eq!(bucket.state, BucketState::Free, "a life starts from free");
            prop_assert!(!self.outstanding.iter().any(|other| other.bucket == got.bucket));
            let emptied_at = self.emptied_at.get(&got.bucket).copied().unwrap_or(0);
            prop_assert!(emptied_at <= self.reusable, "emptied at {}, reusable {}", emptied_at, self.reusable);
            prop_assert!(self.allocator.loose() >= floor(watermark));
        } else {
            prop_assert_eq!(self.written_to.get(&got.bucket).copied(), Some(start), "offsets only go up");
        }
        prop_assert!(!self.live.iter().any(|live| live.bucket == got.bucket
            && live.start < start + u64::from(got.length)
            && start < live.start + u64::from(live.length)));
        self.written_to.insert(got.bucket, start + u64::from(got.length));
        self.outstanding.push(got);
        Ok(())
    }

    fn change(&mut self, bucket: BucketIndex, delta: i64, late: bool) {
        let old = self.bucket(bucket);
        let charged_bytes = old.charged_bytes.checked_add_signed(delta).unwrap();
        let emptied = charged_bytes == 0;
        let state = if emptied { BucketState::NeedDiscard } else { BucketState::Data };
        let new = Bucket { state, generation: old.generation + u32::from(emptied), charged_bytes };
        self.sequence += 1;
        if emptied {
            self.emptied_at.insert(bucket, self.sequence);
        }
        let mut trees = self.trees.borrow_mut();
        trees.buckets.insert(bucket, new);
        trees.free_keys.remove(&bucket);
        drop(trees);
        let news = ((DEVICE, bucket), old, new, JournalSequence(self.sequence));
        if late && emptied {
            self.late.push(news);
        } else {
            self.allocator.bucket_committed(news.0, news.1, news.2, news.3);
        }
    }

    fn commit(&mut self, index: usize) -> Result<(), TestCaseError> {
        let allocation = self.outstanding.swap_remove(index);
        let (bucket, length) = (allocation.bucket, allocation.length);
        let known = allocation.present_generation();
        let actual = self.bucket(bucket).generation;
        if known != actual {
            // Only news that is late can make the known generation old. The body runs again until it has arrived.
            prop_assert!(self.allocator.may_retry_pointer((DEVICE, bucket), known, actual));
            self.deliver();
        }
        prop_assert_eq!(allocation.present_generation(), actual);
        self.live.push(Live { bucket, start: allocation.offset % u64::from(BUCKET), length });
        self.change(bucket, i64::from(length), false);
        drop(allocation);
        Ok(())
    }

    fn free(&mut self, limit: usize) -> Result<(), TestCaseError> {
        for emptied in self.allocator.eligible(JournalSequence(self.reusable), limit) {
            let bucket = emptied.key.1;
            let old = self.bucket(bucket);
            prop_assert!(emptied.sequence.0 <= self.reusable);
            prop_assert!(!self.allocator.is_open(emptied.key));
            prop_assert!(!self.references.iter().any(|held| held.buckets().contains(&emptied.key)));
            let same = old.state == BucketState::NeedDiscard && emptied.generation == Some(old.generation);
            if same {
                prop_assert!(self.emptied_at[&bucket] <= self.reusable);
                let new = Bucket { state: BucketState::Free, ..old };
                let mut trees = self.trees.borrow_mut();
                trees.buckets.insert(bucket, new);
                trees.free_keys.insert(bucket, false);
                drop(trees);
                self.sequence += 1;
                self.allocator.bucket_committed(emptied.key, old, new, JournalSequence(self.sequence));
            }
            let generation = old.generation;
            let candidate = FreeCandidate { key: emptied.key, generation, discarded: false };
            self.allocator.finish(emptied.key, same.then_some(candidate), false);
        }
        Ok(())
    }

    fn deliver(&mut self) {
        for (key, old, new, sequence) in std::mem::take(&mut self.late) {
            self.allocator.bucket_committed(key, old, new, sequence);
        }
    }

    /// When nothing is late, the counters are a recount.
    fn check_counters(&self) -> Result<(), TestCaseError> {
        let trees = self.trees.borrow();
        let count = |state| trees.buckets.values().filter(|bucket| bucket.state == state).count() as u64;
        let usage = self.allocator.usage();
        prop_assert_eq!(usage.data_buckets, count(BucketState::Data));
        prop_assert_eq!(usage.need_discard_buckets, count(BucketState::NeedDiscard));
        prop_assert_eq!(usage.data_bytes, self.live.iter().map(|live| u64::from(live.length)).sum::<u64>());
        Ok(())
    }
}

#[derive(Clone, Debug)]
enum Step {
    Take(u64, u32, bool),
    Commit(usize),
    Drop(usize),
    Shrink(usize, u32),
    Delete(usize, bool),
    Deliver,
    Flush,
    Free(usize),
    Reference(u64),
    Unreference,
    CloseEmpty,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (0_u64..8, 1_u32..12, prop::bool::weighted(0.2)).prop_map(|(writer, blocks, gc)| Step::Take(writer, blocks, gc)),
        6 => any::<usize>().prop_map(Step::Commit),
        1 => any::<usize>().prop_map(Step::Drop),
        1 => (any::<usize>(), 1_u32..4).prop_map(|(index, blocks)| Step::Shrink(index, blocks)),
        6 => (any::<usize>(), prop::bool::weighted(0.3)).prop_map(|(index, late)| Step::Delete(index, late)),
        1 => Just(Step::Deliver),
        1 => Just(Step::Flush),
        2 => (1_usize..6).prop_map(Step::Free),
        1 => (0_u64..24).prop_map(Step::Reference),
        1 => Just(Step::Unreference),
        1 => Just(Step::CloseEmpty),
    ];
    proptest::collection::vec(step, 0..400)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Over any history: a life starts only from free and durable, offsets in it only go up, nothing live is ever overwritten, and in the
    /// end every bucket comes back.
    #[test]
    fn the_allocator_agrees_with_a_plain_disk(steps in steps()) {
        let mut model = Model::new();
        for step in steps {
            let outstanding = model.outstanding.len();
            match step {
                Step::Take(_, blocks, true) => model.take(WritePoint::CopyGc, blocks, Watermark::CopyGc)?,
                Step::Take(writer, blocks, false) => model.take(WritePoint::User(writer), blocks, Watermark::Normal)?,
                Step::Commit(index) if outstanding > 0 => model.commit(index % outstanding)?,
                Step::Drop(index) if outstanding > 0 => drop(model.outstanding.swap_remove(index % outstanding)),
                Step::Shrink(index, blocks) if outstanding > 0 => {
                    let allocation = &mut model.outstanding[index % outstanding];
                    let (bucket, end) = (allocation.bucket, allocation.offset % u64::from(BUCKET) + u64::from(allocation.length));
                    let before = allocation.length;
                    allocation.shrink(blocks * BLOCK);
                    prop_assert_eq!(allocation.length, before.min(blocks * BLOCK));
                    let shrunk_end = end - u64::from(before - allocation.length);
                    // Given back only if it was the end of a bucket that is not full.
                    if model.written_to[&bucket] == end && end < u64::from(BUCKET) && model.allocator.is_open((DEVICE, bucket)) {
                        model.written_to.insert(bucket, shrunk_end);
                    }
                }
                Step::Delete(index, late) if !model.live.is_empty() => {
                    let live = model.live.swap_remove(index % model.live.len());
                    model.change(live.bucket, -i64::from(live.length), late);
                }
                Step::Deliver => model.deliver(),
                Step::Flush => model.reusable = model.sequence,
                Step::Free(limit) => model.free(limit)?,
                Step::Reference(bucket) => {
                    let references = model.allocator.references().take([(DEVICE, BucketIndex(bucket))]);
                    model.references.push(references);
                }
                Step::Unreference => drop(model.references.pop()),
                Step::CloseEmpty => { model.allocator.close_empty(); }
                _ => {}
            }
            if model.late.is_empty() {
                model.check_counters()?;
            }
        }
        model.deliver();
        model.outstanding.clear();
        model.references.clear();
        while let Some(live) = model.live.pop() {
            model.change(live.bucket, -i64::from(live.length), false);
        }
        model.allocator.close_empty();
        model.reusable = model.sequence;
        model.free(usize::MAX)?;
        prop_assert_eq!(model.allocator.loose(), model.bucket_count);
        // And all of them can be opened again, but for the floor.
        let floor = floor(Watermark::Normal);
        for _ in 0..model.bucket_count {
            model.take(WritePoint::User(0), BUCKET / BLOCK, Watermark::Normal)?;
        }
        prop_assert_eq!(model.outstanding.len() as u64, model.bucket_count - floor);
    }
}

#[test]
fn a_reader_sees_the_freeing_or_the_freeing_sees_the_reader() {
    let allocator = Allocator::new(small_reserves(), 1, Arc::new(Metrics::default()));
    let key = (DEVICE, BucketIndex(3));
    allocator.add_emptied(key, JournalSequence(5));
    assert!(allocator.eligible(JournalSequence(4), 8).is_empty());
    let mark = allocator.references().mark();
    let references = allocator.references().take([key]);
    assert!(allocator.references().unchanged_since(mark));
    assert!(allocator.eligible(JournalSequence(5), 8).is_empty(), "it is being read");
    assert!(!allocator.references().unchanged_since(mark), "a later reader looks again");
    drop(references);
    let eligible = allocator.eligible(JournalSequence(5), 8);
    assert_eq!(eligible, [Emptied { key, generation: None, sequence: JournalSequence(5) }]);
}

#[test]
fn the_emptiest_bucket_is_taken_first_and_only_when_it_is_known_to_be() {
    let mut index = fragmentation::FragmentationIndex::default();
    let key = |bucket| (DEVICE, BucketIndex(bucket));
    index.note(key(1), 900);
    index.note(key(2), 400);
    assert_eq!(index.take_lowest(950, 500), Some(key(2)));
    assert_eq!(index.take_lowest(950, 500), None, "there may be better ones that were not seen");
    index.begin_look();
    index.end_look(None);
    assert_eq!(index.take_lowest(800, 500), None);
    index.correct(key(1), 700);
    assert_eq!(index.take_lowest(800, 500), Some(key(1)));
    for bucket in 0..2 * fragmentation::ENTRIES_MAX as u64 {
        index.note(key(bucket), 10_000 - bucket);
    }
    assert_eq!(index.len(), fragmentation::ENTRIES_MAX);
    let lowest = index.take_lowest(u64::MAX, u64::MAX).unwrap();
    assert_eq!(lowest, key(2 * fragmentation::ENTRIES_MAX as u64 - 1));
    assert!(!index.knows_all_below(10_000) && index.knows_all_below(5_000));
}
