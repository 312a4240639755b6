//! What a lost superblock said, from what the nodes say: sizes by what fits all that was found, the rest as mkfs would choose it.
//!
//! What cannot be found: the label, mkfs's date, and the key of the hash of names. Names get a new key, so all directories are hashed anew.

use std::collections::{BTreeSet, HashMap};
use std::hash::Hash;

use coppicefs::filesystem::FormatOptions;
use coppicefs::filesystem::format::{BUCKETS_MIN, plan};
use coppicefs::format::extent::ExtentValue;
use coppicefs::format::space::{Backpointer, Bucket, BucketState};
use coppicefs::format::superblock::{Defaults, Geometry, Superblock};
use coppicefs::format::{BtreeId, ChecksumKind, CompressionKind, Position};
use coppicefs::recovery::scan::FoundNode;
use coppicefs::{Error, Result};

use super::tree::Trees;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
/// Extents, and backpointers, that are looked at: more do not make it surer.
const SAMPLE_MAX: usize = 20_000;
/// Smallest journal that is tried.
const JOURNAL_BYTES_MIN: u64 = 256 * KIB;

/// What the extents say.
#[derive(Debug, Default)]
struct Sample {
    /// Where the first copy of an extent is, and how many bytes.
    places: HashMap<Position, (u64, u64)>,
    blocks: HashMap<u32, usize>,
    checksums: HashMap<u8, usize>,
    compressions: HashMap<u8, usize>,
}

fn most<T: Eq + Hash + Copy + Ord>(votes: &HashMap<T, usize>) -> Option<T> {
    votes.iter().max_by_key(|(choice, count)| (**count, **choice)).map(|(choice, _)| *choice)
}

/// The end of a walk that has seen enough.
fn enough() -> Error {
    Error::Shutdown
}

fn unless_enough(outcome: Result<()>) -> Result<()> {
    match outcome {
        Err(Error::Shutdown) => Ok(()),
        other => other,
    }
}

fn sample(trees: &Trees<'_>) -> Result<Sample> {
    let mut sample = Sample::default();
    unless_enough(trees.for_each(BtreeId::Extents, |key| {
        let Ok(ExtentValue::Data(data)) = ExtentValue::decode(&key.value) else { return Ok(()) };
        if let (CompressionKind::None, count @ 1..) = (data.compression, data.checksums.len()) {
            *sample.blocks.entry(data.length / u32::try_from(count).unwrap_or(1)).or_default() += 1;
        }
        *sample.checksums.entry(data.checksum_kind as u8).or_default() += 1;
        *sample.compressions.entry(data.compression as u8).or_default() += 1;
        if let Some(pointer) = data.pointers.first() {
            sample.places.insert(key.position, (pointer.offset, u64::from(data.disk_bytes)));
        }
        if sample.places.len() >= SAMPLE_MAX { Err(enough()) } else { Ok(()) }
    }))?;
    Ok(sample)
}

/// A backpointer's key has the bucket and the place in it, its value leads to an extent that has the place on the device.
fn bucket_bytes_by_backpointers(trees: &Trees<'_>, sample: &Sample) -> Result<Option<u64>> {
    let mut votes: HashMap<u64, usize> = HashMap::new();
    let mut seen = 0_usize;
    unless_enough(trees.for_each(BtreeId::Backpointers, |key| {
        let bucket = key.position.inode & ((1 << 48) - 1);
        let within = key.position.offset >> 32;
        if let Ok(backpointer) = Backpointer::decode(&key.value)
            && let Some((offset, _)) = sample.places.get(&backpointer.position)
            && let Some(start) = offset.checked_sub(within)
            && bucket > 0
            && start.is_multiple_of(bucket)
        {
            *votes.entry(start / bucket).or_default() += 1;
        }
        seen += 1;
        if seen >= 4 * SAMPLE_MAX { Err(enough()) } else { Ok(()) }
    }))?;
    Ok(most(&votes))
}

/// Where there is no data: buckets of nodes have keys, and are where nodes lie.
fn bucket_bytes_by_nodes(trees: &Trees<'_>, nodes: &[FoundNode], possible: &[u64]) -> Result<Option<u64>> {
    let mut buckets = BTreeSet::new();
    trees.for_each(BtreeId::Buckets, |key| {
        if Bucket::decode(&key.value).is_ok_and(|bucket| bucket.state == BucketState::Metadata) {
            buckets.insert(key.position.offset);
        }
        Ok(())
    })?;
    let fitting = |size: u64| {
        nodes.iter().filter(|node| buckets.contains(&(node.address / size))).count() * 1000 / nodes.len().max(1)
    };
    let best = possible.iter().map(|&size| (fitting(size), size)).max();
    Ok(best.filter(|(fit, _)| *fit > 0).map(|(_, size)| size))
}

/// The largest power of two of which all addresses are multiples, and not less than what is written.
fn node_bytes(nodes: &[FoundNode]) -> u64 {
    let aligned = nodes.iter().map(|node| node.address.trailing_zeros()).min().unwrap_or(15);
    let written = nodes.iter().map(|node| u64::from(node.summary.written_bytes)).max().unwrap_or(0);
    (1_u64 << aligned.min(20)).max(written.next_power_of_two()).clamp(8 * KIB, MIB)
}

fn replicas(nodes: &[FoundNode]) -> u8 {
    let mut copies: HashMap<(u64, u32), u8> = HashMap::new();
    for node in nodes {
        let count = copies.entry((node.summary.header.node.0, node.summary.last_checksum)).or_default();
        *count = count.saturating_add(1);
    }
    let mut votes: HashMap<u8, usize> = HashMap::new();
    copies.values().for_each(|count| *votes.entry(*count).or_default() += 1);
    most(&votes).unwrap_or(2).clamp(1, 2)
}

/// The sizes that fit what was found.
///
/// # Errors
/// If none do.
pub fn guess(trees: &Trees<'_>, nodes: &[FoundNode], device_bytes: u64) -> Result<(Geometry, Defaults)> {
    let sample = sample(trees)?;
    let block = most(&sample.blocks).filter(|block| block.is_power_of_two() && (4096..=65536).contains(block));
    let node = node_bytes(nodes);
    let crosses = |size: u64| sample.places.values().any(|(offset, bytes)| offset % size + bytes > size);
    let possible: Vec<u64> = (13..=24)
        .map(|bits| 1_u64 << bits)
        .filter(|&size| size >= node && size / node <= 64 && !crosses(size))
        .collect();
    let voted = bucket_bytes_by_backpointers(trees, &sample)?.filter(|size| possible.contains(size));
    let voted = match voted {
        Some(size) => Some(size),
        None => bucket_bytes_by_nodes(trees, nodes, &possible)?,
    };
    // As mkfs chooses on a device of this size.
    let usual = (device_bytes / BUCKETS_MIN).clamp(64 * KIB, 256 * KIB);
    let usual = 1_u64 << usual.ilog2();
    let bucket = voted.or_else(|| possible.iter().copied().find(|&size| size >= usual)).ok_or_else(|| {
        Error::Unusable(format!("no size of buckets fits what was found ({} nodes of {node} bytes)", nodes.len()))
    })?;
    let narrow = |bytes: u64| u32::try_from(bytes).unwrap_or(u32::MAX);
    let geometry = Geometry {
        block_bytes: block.unwrap_or(4096),
        bucket_bytes: narrow(bucket),
        node_bytes: narrow(node),
        metadata_replicas: replicas(nodes),
    };
    let compressed = most(&sample.compressions.into_iter().filter(|(kind, _)| *kind != 0).collect());
    let defaults = Defaults {
        label: String::new(),
        checksum: most(&sample.checksums).unwrap_or(ChecksumKind::Crc32c as u8),
        compression: compressed.unwrap_or(CompressionKind::None as u8),
        compression_level: if compressed == Some(CompressionKind::Zstd as u8) { 3 } else { 0 },
        created_at: 0,
        created_by: concat!("fsck-coppice --rebuild ", env!("CARGO_PKG_VERSION")).into(),
        hash_seed: 0,
    };
    Ok((geometry, defaults))
}

/// A superblock with these sizes whose fixed areas lie where nothing is that `is_needed`: `[first, end)` in buckets.
///
/// # Errors
/// If there is no such place.
pub fn place(
    filesystem: uuid::Uuid,
    geometry: Geometry,
    defaults: &Defaults,
    device_bytes: u64,
    is_needed: impl Fn(u64, u64) -> bool,
) -> Result<Superblock> {
    let mut journal_bytes = (device_bytes / 256).clamp(2 * MIB, 32 * MIB);
    let mut last = Error::Unusable("there is no room for a journal".into());
    while journal_bytes >= JOURNAL_BYTES_MIN {
        let options = FormatOptions {
            uuid: filesystem,
            geometry,
            journal_bytes,
            defaults: defaults.clone(),
            owner: (0, 0),
            buckets_min: 64,
        };
        match plan(&options, device_bytes) {
            Ok(superblock) => {
                let areas = superblock.layout.journal.iter().chain(&superblock.layout.checkpoints);
                let taken = areas.clone().find(|area| is_needed(area.first, area.first + area.count));
                match taken {
                    None => return Ok(superblock),
                    Some(area) => {
                        last = Error::Unusable(format!(
                            "buckets {} to {} are needed for the journal or the checkpoints, and hold what is to be kept: rebuild into another image with --output",
                            area.first,
                            area.first + area.count
                        ));
                    }
                }
            }
            Err(error) => last = error,
        }
        journal_bytes /= 2;
    }
    Err(last)
}

/// Byte ranges that may hold the journal of a filesystem with this size of buckets whose superblock is lost: from where mkfs starts it up to the
/// first node behind.
#[must_use]
pub fn journal_areas(geometry: Geometry, nodes: &[FoundNode], device_bytes: u64) -> Vec<(u64, u64)> {
    let bucket_bytes = u64::from(geometry.bucket_bytes);
    let options = FormatOptions {
        uuid: uuid::Uuid::nil(),
        geometry,
        journal_bytes: JOURNAL_BYTES_MIN,
        defaults: Defaults::default(),
        owner: (0, 0),
        buckets_min: 1,
    };
    let starts: BTreeSet<u64> = plan(&options, device_bytes)
        .map(|superblock| superblock.layout.journal.iter().map(|area| area.first * bucket_bytes).collect())
        .unwrap_or_default();
    let end_of = |start: u64| {
        let nodes = nodes.iter().map(|node| node.address - node.address % bucket_bytes);
        let first = nodes.filter(|address| *address >= start).min().unwrap_or(device_bytes);
        let next = starts.iter().copied().find(|other| *other > start).unwrap_or(device_bytes);
        first.min(next)
    };
    starts.iter().map(|&start| (start, end_of(start))).collect()
}
