//! Tests of file data over real trees, a real journal and a real allocator, on simulated devices.

mod copygc;
mod damage;
mod cutting;
mod model;
mod ranges;
mod reuse;

use std::collections::BTreeMap;

use super::*;
use crate::alloc::TestSwitches;
use crate::device::{DiscardMode, SimDevice, SimOptions};
use crate::filesystem::format::test_geometry;
use crate::filesystem::{Filesystem, OpenOptions};
use crate::format::extent::ExtentValue;
use crate::format::namespace::FileType;
use crate::format::space::{Backpointer, Bucket, BucketState};
use crate::format::{CompressionKind, Value};
use crate::transaction::CommitOptions;
use crate::units::BucketIndex;

/// Places in the middle of an operation where a test lets something happen.
pub mod seam {
    use std::cell::RefCell;

    type Hook = Option<(&'static str, Box<dyn FnOnce()>)>;

    thread_local! {
        static HOOK: RefCell<Hook> = const { RefCell::new(None) };
    }

    /// Runs `hook` once, when this thread next comes to `place`.
    pub fn at(place: &'static str, hook: impl FnOnce() + 'static) {
        HOOK.set(Some((place, Box::new(hook))));
    }

    pub fn reach(place: &str) {
        let hook = HOOK.with_borrow_mut(|hook| hook.take_if(|(wanted, _)| *wanted == place));
        if let Some((_, hook)) = hook {
            hook();
        }
    }
}

pub const BLOCK: u64 = 4096;

/// A whole filesystem, of which the tests use the data layer.
pub struct Stack {
    pub filesystem: Arc<Filesystem>,
    pub device: Arc<SimDevice>,
    pub env: Arc<Env>,
    pub metrics: Arc<Metrics>,
    pub transactions: Arc<Transactions>,
    pub space: Arc<Space>,
    pub data: Arc<Data>,
}

impl Drop for Stack {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.filesystem.close().unwrap();
        }
        self.env.unregister_all();
    }
}

impl Stack {
    pub fn new(options: DataOptions, seed: u64) -> Self {
        Self::with(options, Env::simulated(seed), 24 << 20)
    }

    pub fn with(options: DataOptions, env: Arc<Env>, size: u64) -> Self {
        let mut format = test_geometry();
        format.geometry.metadata_replicas = 1;
        format.defaults.checksum = options.checksum as u8;
        format.defaults.compression = options.compression.kind() as u8;
        format.defaults.compression_level = if options.compression.kind() == CompressionKind::Zstd { 3 } else { 0 };
        // What is discarded becomes garbage, so that reading it shows.
        let sim = SimOptions { discard_mode: DiscardMode::Garbage, ..SimOptions::default() };
        let device = Arc::new(SimDevice::new(size, sim));
        let target: Arc<dyn BlockDevice> = device.clone();
        Filesystem::format(&target, &format, &env).unwrap();
        let stack = Self::open(device, env);
        assert_eq!(stack.data.options, options);
        stack
    }

    fn open(device: Arc<SimDevice>, env: Arc<Env>) -> Self {
        Self::open_with(device, env, TestSwitches::default())
    }

    /// With deliberate faults.
    fn open_with(device: Arc<SimDevice>, env: Arc<Env>, switches: TestSwitches) -> Self {
        let options =
            OpenOptions { env: Some(Arc::clone(&env)), cache_bytes: 64 << 20, switches, ..OpenOptions::default() };
        let filesystem = Filesystem::open(vec![device.clone()], &options).unwrap();
        Self {
            device,
            env,
            metrics: Arc::clone(filesystem.metrics()),
            transactions: Arc::clone(filesystem.transactions()),
            space: Arc::clone(filesystem.space()),
            data: Arc::clone(filesystem.data()),
            filesystem,
        }
    }

    /// Closed and opened again.
    pub fn reopened(self) -> Self {
        let (device, env) = (Arc::clone(&self.device), Arc::clone(&self.env));
        drop(self);
        Self::open(device, env)
    }

    /// The same, with deliberate faults.
    pub fn reopened_with(self, switches: TestSwitches) -> Self {
        let (device, env) = (Arc::clone(&self.device), Arc::clone(&self.env));
        drop(self);
        Self::open_with(device, env, switches)
    }

    /// Made durable, then the power is cut: opened from what the medium holds for certain.
    pub fn recovered(self) -> Self {
        self.filesystem.sync().unwrap();
        self.env.unregister_all();
        let image = self.device.snapshot().durable().clone();
        let sim = SimOptions { discard_mode: DiscardMode::Garbage, ..SimOptions::default() };
        let (device, env) = (Arc::new(SimDevice::from_image(image, sim)), Arc::clone(&self.env));
        // The old one goes on with a device that nobody looks at.
        drop(self);
        Self::open(device, env)
    }

    pub fn create(&self, inode: u64) -> InodeNumber {
        let number = InodeNumber(inode);
        self.transactions
            .run(CommitOptions::default(), |transaction| {
                let stored = Inode { mode: FileType::Regular.mode_bits() | 0o644, link_count: 1, ..Inode::default() };
                transaction.put(BtreeId::Inodes, Position::new(inode, 0, u32::MAX), stored.encode()?);
                Ok(())
            })
            .unwrap();
        number
    }

    pub fn stored(&self, inode: InodeNumber) -> Inode {
        self.data.inode(&mut self.transactions.read(), inode).unwrap().unwrap()
    }

    /// Writes the blocks of `content` that `[from, to)` touches, as a page cache would. The content's length is the file's size.
    pub fn write(&self, inode: InodeNumber, content: &[u8], from: u64, to: u64) -> Change {
        let (start, end) = (from / BLOCK * BLOCK, to.next_multiple_of(BLOCK).min(content.len() as u64));
        self.write_runs(inode, content, &[(start, end)])
    }

    pub fn write_runs(&self, inode: InodeNumber, content: &[u8], ranges: &[(u64, u64)]) -> Change {
        let runs: Vec<WriteRun<'_>> = ranges
            .iter()
            .map(|&(start, end)| WriteRun {
                offset: start,
                // Folios of 16 KiB.
                data: content[start as usize..end as usize].chunks(16 << 10).collect(),
            })
            .collect();
        let bytes = ranges.iter().map(|(start, end)| (end - start).next_multiple_of(BLOCK)).sum();
        let reservation = self.space.reserve(bytes).unwrap();
        let size = content.len() as u64;
        let commit = WriteCommit { size_limit: &|| size, update_inode: &|inode| inode.modification_time.seconds += 1 };
        match self.data.write(inode, &runs, reservation, commit) {
            Ok(change) => change,
            Err(error) => {
                let journal = self.transactions.journal();
                panic!("{error}: {:?}, journal {} of 1000 full", self.space.usage(), journal.fill_permille());
            }
        }
    }

    /// The bytes of `[start, end)`, whole blocks, with what could not be read.
    pub fn try_read(&self, inode: InodeNumber, start: u64, end: u64) -> (Vec<u8>, Vec<BadRange>) {
        let mut bytes = vec![0xEE; (end - start) as usize];
        let mut bad = Vec::new();
        let mut offset = start;
        let mut pieces: Vec<ReadPiece<'_>> = bytes
            .chunks_mut(5 * BLOCK as usize)
            .map(|buffer| {
                let piece = ReadPiece { offset, buffer };
                offset += piece.buffer.len() as u64;
                piece
            })
            .collect();
        let mut landed = vec![0; pieces.len()];
        self.data.read_detailed(inode, &mut pieces, &mut || {}, &mut |piece, more| {
            landed[piece] += 1;
            bad.extend(more);
        });
        assert!(landed.iter().all(|&count| count == 1), "each piece lands once: {landed:?}");
        bad.sort_by_key(|bad| bad.start);
        (bytes, bad)
    }

    pub fn read(&self, inode: InodeNumber, start: u64, end: u64) -> Vec<u8> {
        let (bytes, bad) = self.try_read(inode, start, end);
        assert!(bad.is_empty(), "{bad:?}");
        bytes
    }

    pub fn keys(&self, btree: BtreeId) -> Vec<(Position, Value)> {
        self.transactions.read().range(btree, Position::MIN, Position::MAX, usize::MAX).unwrap()
    }

    pub fn extents_of(&self, inode: InodeNumber) -> Vec<extents::Extent> {
        let keys = self.keys(BtreeId::Extents).into_iter().filter(|(position, _)| position.inode == inode.0);
        keys.map(|(position, value)| self.data.shape.decode(position, &value).unwrap()).collect()
    }

    /// Buckets that hold data, in the order of their numbers.
    pub fn data_buckets(&self) -> Vec<BucketIndex> {
        let keys = self.keys(BtreeId::Buckets).into_iter();
        keys.filter(|(_, value)| Bucket::decode(value).unwrap().state == BucketState::Data)
            .map(|(position, _)| BucketIndex(position.offset))
            .collect()
    }

    /// The file is `content` and nothing else, and everything on disk agrees with everything else.
    pub fn check(&self, files: &[(InodeNumber, &[u8])]) {
        for (inode, content) in files {
            let size = content.len() as u64;
            let end = size.next_multiple_of(BLOCK) + 2 * BLOCK;
            let bytes = self.read(*inode, 0, end);
            let first_difference = bytes.iter().zip(content.iter()).position(|(found, expected)| found != expected);
            assert_eq!(first_difference, None, "inode {inode}, size {size}");
            let behind = bytes[content.len()..].iter().position(|&byte| byte != 0);
            assert_eq!(behind, None, "inode {inode}: bytes behind the end at {size}");
            assert_eq!(self.stored(*inode).size, size);
        }
        self.check_space(files);
    }

    fn check_space(&self, files: &[(InodeNumber, &[u8])]) {
        let mut charged: BTreeMap<u64, u64> = BTreeMap::new();
        let mut allocated: BTreeMap<u64, u64> = BTreeMap::new();
        let mut backpointers: BTreeMap<Position, Backpointer> = BTreeMap::new();
        let mut last: Option<(u64, u64)> = None;
        for (position, value) in self.keys(BtreeId::Extents) {
            let extent = self.data.shape.decode(position, &value).unwrap();
            if let Some((inode, end)) = last
                && inode == position.inode
            {
                assert!(extent.start() >= end, "extent {position} overlaps the one before");
            }
            last = Some((position.inode, extent.end));
            *allocated.entry(position.inode).or_default() += extents::allocated_bytes(&extent.value);
            if let ExtentValue::Data(data) = &extent.value {
                for pointer in &data.pointers {
                    let bucket = self.data.shape.bucket_of(pointer).0;
                    *charged.entry(bucket).or_default() += u64::from(data.charged_bytes());
                    let in_bucket = pointer.offset % u64::from(self.data.shape.bucket_bytes);
                    let block = u64::from(data.frame_offset / self.data.shape.block_bytes);
                    let at = Position::new(bucket, in_bucket << 32 | block, position.snapshot);
                    let backpointer = Backpointer { btree: BtreeId::Extents, disk_bytes: data.disk_bytes, position };
                    assert_eq!(backpointers.insert(at, backpointer), None, "two extents at {at}");
                }
            }
        }
        for (inode, _) in files {
            assert_eq!(self.stored(*inode).allocated_bytes, allocated.get(&inode.0).copied().unwrap_or(0));
        }
        for (position, value) in self.keys(BtreeId::Buckets) {
            let bucket = Bucket::decode(&value).unwrap();
            let expected = charged.remove(&position.offset).unwrap_or(0);
            assert_eq!(bucket.charged_bytes, expected, "bucket {}", position.offset);
        }
        assert!(charged.is_empty(), "extents in buckets without a key: {charged:?}");
        for (position, value) in self.keys(BtreeId::Backpointers) {
            let backpointer = Backpointer::decode(&value).unwrap();
            assert_eq!(backpointers.remove(&position), Some(backpointer), "backpointer {position}");
        }
        assert!(backpointers.is_empty(), "extents without backpointers");
    }
}

pub fn options(compression: Compression, checksum: ChecksumKind) -> DataOptions {
    DataOptions { checksum, compression, ..DataOptions::default() }
}

pub fn plain() -> DataOptions {
    options(Compression::NONE, ChecksumKind::Crc32c)
}

pub fn lz4() -> Compression {
    Compression::new(CompressionKind::Lz4, 0).unwrap()
}

pub fn zstd() -> Compression {
    Compression::new(CompressionKind::Zstd, 3).unwrap()
}

/// Bytes that do not compress, different for each `seed`.
pub fn noise(length: usize, seed: u64) -> Vec<u8> {
    use rand_xoshiro::rand_core::{Rng, SeedableRng};
    let mut bytes = vec![0; length];
    rand_xoshiro::Xoshiro256PlusPlus::seed_from_u64(seed).fill_bytes(&mut bytes);
    bytes
}

/// Bytes that compress well, different for each `seed`.
pub fn text(length: usize, seed: u64) -> Vec<u8> {
    (0_u64..).flat_map(|line| format!("{seed}: line {line} of a text\n").into_bytes()).take(length).collect()
}
