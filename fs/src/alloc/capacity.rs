//! How many bytes may be promised: the reserves, the counters, and what `df` shows.
//!
//! A promise of data holds the worst case of its own metadata until it commits; then what the trees really grew by is counted, at once.
//! So what `df` calls available is what can be written to one large file, nothing is put aside for what nobody writes, and many small files
//! make it sink faster than their bytes. Space that fallocate holds is counted with the metadata of the day when it is written block by block.
//!
//! The reserves, in numbers:
//! - *Nodes*: (kept checkpoints + 1) x the cap on dirty nodes x copies, and the nodes of a wave of splits.
//! - *Copygc*: buckets that only it (and nodes) may open, and as many and more that are never promised: the tails of open buckets, and room
//!   for copygc to find something to gain.
//! - *The journal*: an eighth of the ring is for what two checkpoints log. A checkpoint logs a statement of D, one record that frees emptied
//!   buckets, the claims of buckets for its nodes, one release. The cap on dirty nodes is such that the claims fit.

use crate::sync::atomic::{AtomicI64, Ordering};

use crate::format::superblock::{SUPERBLOCK_BYTES, Superblock, copy_offsets};
use crate::sync::Mutex;
use crate::units::round_up;

use super::{BucketKey, Watermark};

/// Checkpoints whose node space is kept, and the one being written.
const CHECKPOINTS_HELD: u64 = 3;
/// Most bytes of dirty nodes on any device.
const DIRTY_NODE_BYTES_MAX: u64 = 64 << 20;
/// Fewest dirty nodes that transactions can work with.
pub const DIRTY_NODES_MIN: u64 = 24;
/// The same on a device that is too small for so many.
const DIRTY_NODES_LEAST: u64 = 8;
/// Part of the device that dirty nodes may take, where that is between the bounds.
const DIRTY_SHARE: u64 = 192;
/// Nodes that one wave of splits may need at once.
const SPLIT_NODES: u64 = 8;
/// Packed bytes of keys that a write of any number of neighbouring blocks may add, but for their checksums: it leaves two pieces of what was
/// there and one new extent, each with a backpointer; and the keys of a bucket.
const RANGE_KEY_BYTES: u64 = 448;
/// Packed bytes for each of its blocks: the checksum, and its share of an extent for each 128 KiB.
const BLOCK_KEY_BYTES: u64 = 12;
/// Bytes of a block of the journal, which records are rounded up to.
const JOURNAL_BLOCK_BYTES: u64 = 4096;
/// Records that a checkpoint logs beside its claims: a statement, what frees emptied buckets, a release; the claims may waste a part of one more.
const CHECKPOINT_FIXED_RECORDS: u64 = 3;
/// Bytes of the journal that the claim of a bucket takes at most: the bucket's key, and a whiteout in the free-space tree, with some to spare.
const CLAIM_LOG_BYTES: u64 = 128;

/// Blocks of a journal of `blocks` blocks that only checkpoints may fill, for what two of them log: two, since the first may free nothing.
#[must_use]
pub const fn checkpoint_blocks(blocks: u64) -> u64 {
    if blocks / 8 > 2 { blocks / 8 } else { 2 }
}

/// Buckets that one checkpoint may claim, so that the claims fit its share of the journal.
fn claims_max(superblock: &Superblock) -> u64 {
    let ring_buckets = superblock.layout.journal.first().map_or(0, |range| range.count);
    let blocks = ring_buckets.saturating_mul(u64::from(superblock.geometry.bucket_bytes)) / JOURNAL_BLOCK_BYTES;
    let each = (checkpoint_blocks(blocks) / 2).saturating_sub(CHECKPOINT_FIXED_RECORDS);
    each * (JOURNAL_BLOCK_BYTES / CLAIM_LOG_BYTES)
}

/// The most dirty nodes whose images one checkpoint can claim slots for: it claims an eighth and eight nodes more than it knows to need.
fn dirty_nodes_for_claims(superblock: &Superblock) -> u64 {
    let geometry = superblock.geometry;
    let bucket_slots = u64::from(geometry.bucket_bytes / geometry.node_bytes.max(1)).max(1);
    let nodes = claims_max(superblock) * bucket_slots / u64::from(geometry.metadata_replicas).max(1);
    nodes.saturating_sub(8) / 9 * 8
}

/// Most buckets that are copygc's alone.
const COPYGC_BUCKETS_MAX: u64 = 1024;
/// Nodes that `df` leaves room for.
const HEADROOM_NODES: u64 = 6;

/// A device's buckets that belong to fixed areas, as ascending, disjoint ranges `[first, end)`.
#[must_use]
pub fn reserved_ranges(superblock: &Superblock, device: u8) -> Vec<(u64, u64)> {
    let Some(member) = superblock.members.get(usize::from(device)) else { return Vec::new() };
    let bucket_bytes = u64::from(superblock.geometry.bucket_bytes).max(1);
    let mut ranges = vec![(0, 1)];
    ranges.extend(
        copy_offsets(member.size_bytes).map(|offset| {
            (offset / bucket_bytes, offset.saturating_add(SUPERBLOCK_BYTES as u64).div_ceil(bucket_bytes))
        }),
    );
    let areas = superblock.layout.journal.iter().chain(&superblock.layout.checkpoints);
    ranges.extend(areas.filter(|area| area.device == device).map(|area| (area.first, area.first + area.count)));
    ranges.sort_unstable();
    let mut merged: Vec<(u64, u64)> = Vec::new();
    for (first, end) in ranges {
        let (first, end) = (first.min(member.bucket_count), end.min(member.bucket_count));
        match merged.last_mut() {
            Some((_, last_end)) if first <= *last_end => *last_end = end.max(*last_end),
            _ if first < end => merged.push((first, end)),
            _ => {}
        }
    }
    merged
}

/// What is kept back, and for whom. Follows from the superblock alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reserves {
    /// Bytes of a bucket.
    pub bucket_bytes: u64,
    /// Bytes of a block.
    pub block_bytes: u64,
    /// Buckets of all devices that are in no fixed area.
    pub usable_buckets: u64,
    /// Cap on the bytes of dirty nodes, which the B-tree keeps.
    pub dirty_node_bytes_max: u64,
    /// Buckets that only B-tree nodes may take: (kept checkpoints + 1) x the cap x copies, and splits.
    pub metadata_buckets: u64,
    /// Buckets that only copygc (and nodes) may take. Never promised.
    pub copygc_buckets: u64,
    /// Further buckets that are never promised: full ones have some slack.
    pub slack_buckets: u64,
    /// Bytes of a node.
    pub node_bytes: u64,
    /// Copies of the metadata.
    pub metadata_copies: u64,
}

impl Reserves {
    /// The reserves of a filesystem.
    #[must_use]
    pub fn of(superblock: &Superblock) -> Self {
        let geometry = superblock.geometry;
        let bucket_bytes = u64::from(geometry.bucket_bytes).max(1);
        let node_bytes = u64::from(geometry.node_bytes);
        let copies = u64::from(geometry.metadata_replicas);
        let usable_buckets: u64 = (0..=u8::MAX)
            .zip(&superblock.members)
            .map(|(device, member)| {
                let reserved: u64 = reserved_ranges(superblock, device).iter().map(|(first, end)| end - first).sum();
                member.bucket_count.saturating_sub(reserved)
            })
            .sum();
        let usable_bytes = usable_buckets.saturating_mul(bucket_bytes);
        // At most a quarter of the device is for nodes that nobody sees.
        let fitting =
            (usable_bytes / 4 / copies.max(1) / node_bytes.max(1)).saturating_sub(SPLIT_NODES) / CHECKPOINTS_HELD;
        let dirty_nodes = ((usable_bytes / DIRTY_SHARE).min(DIRTY_NODE_BYTES_MAX) / node_bytes.max(1))
            .max(DIRTY_NODES_MIN)
            .min(fitting)
            .min(dirty_nodes_for_claims(superblock))
            .max(DIRTY_NODES_LEAST);
        let dirty_node_bytes_max = dirty_nodes * node_bytes;
        let metadata_bytes = (CHECKPOINTS_HELD * dirty_node_bytes_max + SPLIT_NODES * node_bytes) * copies;
        Self {
            bucket_bytes,
            block_bytes: u64::from(geometry.block_bytes).max(1),
            usable_buckets,
            dirty_node_bytes_max,
            metadata_buckets: metadata_bytes.div_ceil(bucket_bytes) + 2 * copies,
            copygc_buckets: (usable_buckets / 50).clamp(4, COPYGC_BUCKETS_MAX),
            slack_buckets: (usable_buckets / 50).max(8),
            node_bytes,
            metadata_copies: copies,
        }
    }

    /// Whether a device with these reserves is of any use.
    #[must_use]
    pub fn leaves_room(&self) -> bool {
        self.capacity_bytes() >= self.usable_buckets.saturating_mul(self.bucket_bytes) / 2
    }

    /// Bytes that data, its metadata and promises may take together.
    #[must_use]
    pub fn capacity_bytes(&self) -> u64 {
        self.usable_buckets
            .saturating_sub(self.metadata_buckets + self.copygc_buckets + self.slack_buckets)
            .saturating_mul(self.bucket_bytes)
    }

    /// Node bytes that a promise of `bytes` of neighbouring data holds until it commits: the worst case.
    #[must_use]
    pub fn overhead_bytes(&self, bytes: u64) -> u64 {
        if bytes == 0 {
            return 0;
        }
        let blocks = bytes.div_ceil(self.block_bytes);
        self.metadata_overhead_bytes(RANGE_KEY_BYTES + blocks.saturating_mul(BLOCK_KEY_BYTES))
    }

    /// Node bytes that `bytes` of unwritten space may come to, block by block: an extent, its checksum and a backpointer each, in nodes that are
    /// split in the middle and never filled again: five 64ths of the data for each copy.
    #[must_use]
    pub fn unwritten_overhead_bytes(&self, bytes: u64) -> u64 {
        bytes.div_ceil(64).saturating_mul(5 * self.metadata_copies)
    }

    /// What `df` leaves out: the first splits of a few trees come at once, and the last write needs the worst case.
    #[must_use]
    pub fn headroom_bytes(&self) -> u64 {
        HEADROOM_NODES * self.node_bytes * self.metadata_copies + self.overhead_bytes(self.block_bytes)
    }

    /// Node space that `key_bytes` of packed keys may need at worst: nodes filled to three eighths, in all copies.
    #[must_use]
    pub fn metadata_overhead_bytes(&self, key_bytes: u64) -> u64 {
        key_bytes.saturating_mul(8 * self.metadata_copies) / 3
    }

    /// The most neighbouring data, in whole blocks, that fits `bytes` with its overhead.
    #[must_use]
    pub fn data_within(&self, bytes: u64) -> u64 {
        let bytes = bytes.saturating_sub(self.metadata_overhead_bytes(RANGE_KEY_BYTES + BLOCK_KEY_BYTES));
        let per_block = self.block_bytes + self.metadata_overhead_bytes(BLOCK_KEY_BYTES);
        bytes / per_block * self.block_bytes
    }

    /// Bytes of [`Self::metadata_buckets`].
    #[must_use]
    pub fn metadata_bytes(&self) -> u64 {
        self.metadata_buckets.saturating_mul(self.bucket_bytes)
    }
}

/// What is used and promised, kept as commits happen. Differences may be added in any order, so each is signed and may pass
/// through odd values for a moment.
#[derive(Debug, Default)]
pub struct Counters {
    /// Bytes that extents are charged with.
    pub data_bytes: AtomicI64,
    /// Bytes that unwritten extents hold.
    pub unwritten_bytes: AtomicI64,
    /// Bytes promised by reservations, their overhead included.
    pub reserved_bytes: AtomicI64,
    /// Buckets with a count above 0.
    pub data_buckets: AtomicI64,
    /// Buckets of nodes.
    pub metadata_buckets: AtomicI64,
    /// Bytes of the trees' nodes, in all copies, counted from the moment that they exist, not when a checkpoint first writes them: a promise of
    /// metadata ends with its commit, and what it became must be counted then. What else is in node buckets is the reserve at work: the
    /// checkpoints that are kept, and room for the next.
    pub node_bytes: AtomicI64,
    /// Emptied buckets that are not free yet.
    pub need_discard_buckets: AtomicI64,
    /// Held by those who add promises, so that two do not promise the same bytes.
    pub(super) admission: Mutex<()>,
}

fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

fn unsigned(bytes: i64) -> u64 {
    u64::try_from(bytes).unwrap_or(0)
}

impl Counters {
    /// Buckets that are free, queued and opened-but-uncounted ones included.
    #[must_use]
    pub fn free_buckets(&self, reserves: &Reserves) -> u64 {
        // Totals come from a checkpoint's record: any numbers.
        let used = self.data_buckets.load(Ordering::SeqCst);
        let used = used.saturating_add(self.metadata_buckets.load(Ordering::SeqCst));
        let used = used.saturating_add(self.need_discard_buckets.load(Ordering::SeqCst));
        reserves.usable_buckets.saturating_sub(unsigned(used))
    }

    fn claimed_bytes(&self, reserves: &Reserves) -> i64 {
        self.metadata_buckets.load(Ordering::SeqCst).saturating_mul(signed(reserves.bucket_bytes))
    }

    /// Metadata needs the nodes and the reserve; its buckets may be more than that, when they are sparsely used.
    fn metadata_beyond_reserve(&self, reserves: &Reserves) -> i64 {
        let beyond = self.claimed_bytes(reserves).saturating_sub(signed(reserves.metadata_bytes()));
        beyond.max(self.node_bytes.load(Ordering::SeqCst))
    }

    /// Buckets that an allocation at this watermark leaves alone: what is left of the reserves.
    #[must_use]
    pub fn floor_buckets(&self, reserves: &Reserves, watermark: Watermark) -> u64 {
        let nodes = self.node_bytes.load(Ordering::SeqCst);
        let wanted = nodes.saturating_add(signed(reserves.metadata_bytes()));
        let metadata = unsigned(wanted.saturating_sub(self.claimed_bytes(reserves))).div_ceil(reserves.bucket_bytes);
        match watermark {
            Watermark::Normal => metadata + reserves.copygc_buckets,
            Watermark::CopyGc => metadata,
            Watermark::Metadata => 0,
        }
    }

    /// Bytes that are used or promised, but for the reserves. Promises are read first: a commit adds the data before its promise is given back, so
    /// bytes may be seen twice, never missed.
    fn taken_bytes(&self, reserves: &Reserves) -> i64 {
        let reserved = self.reserved_bytes.load(Ordering::SeqCst);
        let metadata = self.metadata_beyond_reserve(reserves);
        // Unwritten space is read before data, for the same reason: a write turns the one into the other.
        let unwritten = self.unwritten_bytes.load(Ordering::SeqCst);
        let unwritten = unwritten.saturating_add(signed(reserves.unwritten_overhead_bytes(unsigned(unwritten))));
        let data = self.data_bytes.load(Ordering::SeqCst);
        reserved.saturating_add(metadata).saturating_add(unwritten).saturating_add(data)
    }

    /// Bytes that may still be promised, overhead included.
    #[must_use]
    pub fn promisable_bytes(&self, reserves: &Reserves) -> u64 {
        unsigned(signed(reserves.capacity_bytes()).saturating_sub(self.taken_bytes(reserves)))
    }

    /// Promises `bytes` if they are there.
    pub(super) fn admit(&self, reserves: &Reserves, bytes: u64) -> bool {
        let _admission = self.admission.lock();
        if self.promisable_bytes(reserves) < bytes {
            return false;
        }
        self.reserved_bytes.fetch_add(signed(bytes), Ordering::SeqCst);
        true
    }

    /// Promises `bytes` whether they are there or not.
    pub(super) fn admit_always(&self, bytes: u64) {
        self.reserved_bytes.fetch_add(signed(bytes), Ordering::SeqCst);
    }

    /// Takes a promise back.
    pub(super) fn give_back(&self, bytes: u64) {
        self.reserved_bytes.fetch_sub(signed(bytes), Ordering::SeqCst);
    }

    /// What `df` and `coppice usage` show.
    #[must_use]
    pub fn usage(&self, reserves: &Reserves) -> Usage {
        let free_bytes = self.promisable_bytes(reserves);
        Usage {
            total_bytes: reserves.capacity_bytes(),
            free_bytes,
            available_bytes: reserves.data_within(free_bytes.saturating_sub(reserves.headroom_bytes())),
            data_bytes: unsigned(self.data_bytes.load(Ordering::SeqCst)),
            unwritten_bytes: unsigned(self.unwritten_bytes.load(Ordering::SeqCst)),
            node_bytes: unsigned(self.node_bytes.load(Ordering::SeqCst)),
            metadata_bytes: unsigned(self.metadata_buckets.load(Ordering::SeqCst))
                .saturating_mul(reserves.bucket_bytes),
            reserved_bytes: unsigned(self.reserved_bytes.load(Ordering::SeqCst)),
            bucket_bytes: reserves.bucket_bytes,
            usable_buckets: reserves.usable_buckets,
            free_buckets: self.free_buckets(reserves),
            data_buckets: unsigned(self.data_buckets.load(Ordering::SeqCst)),
            metadata_buckets: unsigned(self.metadata_buckets.load(Ordering::SeqCst)),
            need_discard_buckets: unsigned(self.need_discard_buckets.load(Ordering::SeqCst)),
        }
    }
}

/// Where the space is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes that people can use: all buckets outside of the fixed areas, less the reserves. `f_blocks`.
    pub total_bytes: u64,
    /// Bytes neither used nor promised. `f_bfree`.
    pub free_bytes: u64,
    /// Bytes of data that can be written now to one file, with its metadata. `f_bavail`. A multiple of the block size; a reservation of this
    /// succeeds.
    pub available_bytes: u64,
    /// Bytes on disk that extents are charged with.
    pub data_bytes: u64,
    /// Bytes held by unwritten extents (fallocate).
    pub unwritten_bytes: u64,
    /// Bytes of buckets that nodes have.
    pub metadata_bytes: u64,
    /// Bytes of the trees' nodes, written or not; the rest of the buckets is room for the next ones, out of the reserve.
    pub node_bytes: u64,
    /// Bytes promised to writes that are not committed, overhead included.
    pub reserved_bytes: u64,
    /// Bytes of a bucket.
    pub bucket_bytes: u64,
    /// Buckets outside of the fixed areas.
    pub usable_buckets: u64,
    /// Free ones.
    pub free_buckets: u64,
    /// Ones with file data.
    pub data_buckets: u64,
    /// Ones with nodes.
    pub metadata_buckets: u64,
    /// Emptied ones that are not free yet.
    pub need_discard_buckets: u64,
}

/// Rounds a length up to whole blocks.
#[must_use]
pub(super) fn whole_blocks(reserves: &Reserves, bytes: u64) -> u64 {
    round_up(bytes, reserves.block_bytes)
}

/// Whether a bucket is in one of the ascending ranges.
#[must_use]
pub fn in_ranges(ranges: &[(u64, u64)], key: BucketKey) -> bool {
    let index = ranges.partition_point(|&(first, _)| first <= key.1.0);
    index.checked_sub(1).and_then(|index| ranges.get(index)).is_some_and(|&(_, end)| key.1.0 < end)
}
