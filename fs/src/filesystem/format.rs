//! Making a new filesystem: where the fixed areas lie, and the first bytes of each.
//!
//! The work is the same whatever the size of the device: superblock copies, an empty journal (written, not only allocated,
//! so that the host commits no metadata for it later), and the first checkpoint record. Buckets and trees start out empty.

use std::sync::Arc;

use crate::alloc::Reserves;
use crate::device::{BlockDevice, WriteRequest};
use crate::env::Env;
use crate::error::{Error, Result};
use crate::format::checkpoint::{Checkpoint, MAP_PAGE_BYTES, MAP_PAGE_ENTRIES, RECORD_SLOT_BYTES, RECORD_SLOTS};
use crate::format::superblock::{
    BucketRange, Defaults, ErrorCounts, Geometry, Layout, Member, SUPERBLOCK_BYTES, Superblock, VERSION, copy_offsets,
};
use crate::memory::AlignedBuffer;
use crate::recovery::superblock;

/// Fewest buckets that a filesystem can live with.
pub const BUCKETS_MIN: u64 = 512;

/// What to make.
#[derive(Clone, Debug)]
pub struct FormatOptions {
    /// Id of the filesystem.
    pub uuid: uuid::Uuid,
    /// Sizes.
    pub geometry: Geometry,
    /// Bytes of the journal's ring, for each copy; rounded up to buckets.
    pub journal_bytes: u64,
    /// What the superblock remembers.
    pub defaults: Defaults,
    /// User and group that own the root directory.
    pub owner: (u32, u32),
    /// Fewest buckets to accept: [`BUCKETS_MIN`], less only in tests.
    pub buckets_min: u64,
}

/// Plans the superblock of a filesystem on a device of `size_bytes`: by these alone, but for the ids of the devices, which are random.
///
/// # Errors
/// [`Error::Unusable`] if the device is too small for this geometry; says how small it may be.
pub fn plan(options: &FormatOptions, size_bytes: u64) -> Result<Superblock> {
    let bucket_bytes = u64::from(options.geometry.bucket_bytes);
    let bucket_count = size_bytes / bucket_bytes;
    if bucket_count < options.buckets_min {
        return Err(Error::Unusable(format!(
            "the device is too small: {size_bytes} bytes make {bucket_count} buckets of {bucket_bytes} bytes, at least {} are needed, which are {} bytes{}",
            options.buckets_min,
            options.buckets_min * bucket_bytes,
            if bucket_bytes > 64 << 10 { " (or fewer with a smaller --bucket-size)" } else { "" },
        )));
    }
    let journal_buckets = options.journal_bytes.div_ceil(bucket_bytes).max(1);
    let map_pages = bucket_count.div_ceil(MAP_PAGE_ENTRIES as u64) + 1;
    let checkpoint_bytes = RECORD_SLOTS * RECORD_SLOT_BYTES as u64 + 3 * map_pages * MAP_PAGE_BYTES as u64;
    let checkpoint_buckets = checkpoint_bytes.div_ceil(bucket_bytes);
    let copies = copy_offsets(size_bytes);
    // Copies lie behind a superblock copy each: the first behind the primary, the second behind the middle one.
    let mut layout = Layout::default();
    let replicas = u64::from(options.geometry.metadata_replicas);
    let mut next = 0;
    for copy in 0..replicas {
        let start =
            if copy == 1 { copies.get(1).copied().unwrap_or(0).max(next * bucket_bytes) } else { next * bucket_bytes };
        let behind =
            if copy < 2 { start + SUPERBLOCK_BYTES as u64 + copies.first().copied().unwrap_or(0) } else { start };
        let first = behind.div_ceil(bucket_bytes);
        layout.journal.push(BucketRange { device: 0, first, count: journal_buckets });
        layout.checkpoints.push(BucketRange { device: 0, first: first + journal_buckets, count: checkpoint_buckets });
        next = first + journal_buckets + checkpoint_buckets;
    }
    // The last bucket holds the last copy of the superblock.
    if next + options.buckets_min / 4 > bucket_count {
        return Err(Error::Unusable(format!(
            "the device is too small: a journal of {} bytes and the checkpoint area leave less than {} of {bucket_count} buckets; use a smaller --journal-size or --bucket-size",
            options.journal_bytes,
            options.buckets_min / 4,
        )));
    }
    let superblock = Superblock {
        filesystem: options.uuid,
        sequence: 1,
        compat: 0,
        read_only_compat: 0,
        incompat: 0,
        version: VERSION,
        version_minimum: VERSION,
        geometry: options.geometry,
        members: vec![Member { uuid: *uuid::Uuid::new_v4().as_bytes(), size_bytes, bucket_count }],
        layout,
        defaults: options.defaults.clone(),
        errors: ErrorCounts::default(),
        unknown_sections: Vec::new(),
    };
    if !Reserves::of(&superblock).leaves_room() {
        return Err(Error::Unusable(format!(
            "the device is too small: what nodes of {} bytes need takes more than half of it; use a smaller --node-size",
            options.geometry.node_bytes
        )));
    }
    // What mount would refuse is refused here, by the same check.
    Superblock::decode(&superblock.encode()?)
}

/// Writes an empty filesystem: no root directory yet, [`super::Filesystem::format`] makes that through a transaction.
///
/// # Errors
/// The device's.
pub(super) fn write_empty(device: &dyn BlockDevice, superblock: &Superblock, env: &Env) -> Result<()> {
    let bucket_bytes = u64::from(superblock.geometry.bucket_bytes);
    // Old superblocks first: a half-made filesystem must not look like the one before it.
    let zeros = AlignedBuffer::zeroed(1 << 20);
    for offset in copy_offsets(device.size_bytes()) {
        device.write(offset, zeros.get(..SUPERBLOCK_BYTES).unwrap_or_default())?;
    }
    device.flush()?;
    let mut requests = Vec::new();
    let slots =
        superblock.layout.checkpoints.iter().map(|range| (range.first, RECORD_SLOTS * RECORD_SLOT_BYTES as u64));
    let journals = superblock.layout.journal.iter().map(|range| (range.first, range.count * bucket_bytes));
    for (first, length) in journals.chain(slots) {
        let mut done = 0;
        while done < length {
            let step = (length - done).min(zeros.len() as u64);
            let slice = usize::try_from(step).ok().and_then(|step| zeros.get(..step)).unwrap_or_default();
            requests.push(WriteRequest { offset: first * bucket_bytes + done, data: vec![slice] });
            done += step;
        }
    }
    device.write_batch(&requests)?;
    let checkpoint = Checkpoint {
        number: 1,
        epoch: 1,
        first_replay: 1,
        first_replay_offset: 0,
        previous_record_checksum: 0,
        newest_sequence: 0,
        roots: Vec::new(),
        totals: Vec::new(),
        next_node: 1,
        clean: true,
        map: Vec::new(),
        written_at: env.now().seconds,
    };
    let record = checkpoint.encode(superblock.filesystem)?;
    let mut buffer = AlignedBuffer::zeroed(RECORD_SLOT_BYTES);
    if let Some(start) = buffer.get_mut(..record.len()) {
        start.copy_from_slice(&record);
    }
    let slot = checkpoint.number % RECORD_SLOTS * RECORD_SLOT_BYTES as u64;
    for range in &superblock.layout.checkpoints {
        device.write(range.first * bucket_bytes + slot, &buffer)?;
    }
    device.flush()?;
    superblock::write(device, superblock)
}

/// Sizes for a small in-memory filesystem in tests: small nodes and buckets, so that splits, checkpoints and wraps happen.
#[must_use]
pub fn test_geometry() -> FormatOptions {
    FormatOptions {
        uuid: uuid::Uuid::from_u128(0xc0_99_1c_e0),
        geometry: Geometry { block_bytes: 4096, bucket_bytes: 64 << 10, node_bytes: 16 << 10, metadata_replicas: 2 },
        journal_bytes: 512 << 10,
        defaults: Defaults { checksum: 1, created_by: "test".into(), hash_seed: 1, ..Defaults::default() },
        owner: (0, 0),
        buckets_min: 128,
    }
}

/// A device slice as this crate passes them around.
pub type Devices = Vec<Arc<dyn BlockDevice>>;
