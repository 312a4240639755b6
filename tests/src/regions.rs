//! Where the structures of an image lie, by name, with all copies of each: what tests of bad media damage.

use std::ops::Range;
use std::sync::Arc;

use coppicefs::Result;
use coppicefs::btree::{NodeReader, PublishedNode, walk_published};
use coppicefs::device::{BlockDevice, SimDevice};
use coppicefs::env::Env;
use coppicefs::filesystem::{Filesystem, OpenOptions, WorkerSet};
use coppicefs::format::BtreeId;
use coppicefs::format::checkpoint::{Checkpoint, MAP_PAGE_BYTES, RECORD_SLOT_BYTES, RECORD_SLOTS};
use coppicefs::format::extent::ExtentValue;
use coppicefs::format::journal::{RECORD_ALIGNMENT_BYTES, RecordHeader};
use coppicefs::format::superblock::{BucketRange, SUPERBLOCK_BYTES, Superblock, copy_offsets};

const BLOCK_BYTES: u64 = 4096;

/// One structure.
#[derive(Clone, Debug)]
pub struct Region {
    /// What it is: `superblock`, `checkpoint record`, `node-space map`, `journal`, `data`, or the name of a B-tree.
    pub name: &'static str,
    /// The bytes of each copy that are in use, by offset on the device.
    pub copies: Vec<Range<u64>>,
}

/// All structures of the image that are in use.
///
/// # Errors
/// If the image cannot be opened, or is damaged.
pub fn regions(device: &Arc<SimDevice>) -> Result<Vec<Region>> {
    let options = OpenOptions {
        read_only: true,
        workers: WorkerSet::Essential,
        env: Some(Env::simulated(1)),
        ..OpenOptions::default()
    };
    let filesystem = Filesystem::open(vec![Arc::clone(device) as _], &options)?;
    let superblock = filesystem.superblock().clone();
    let newest = filesystem.opening().newest.clone();
    filesystem.close()?;
    let mut regions = vec![Region {
        name: "superblock",
        copies: copy_offsets(device.size_bytes())
            .into_iter()
            .map(|offset| offset..offset + SUPERBLOCK_BYTES as u64)
            .collect(),
    }];
    regions.extend(checkpoint_area(&superblock, &newest));
    regions.extend(journal_records(device, &superblock, &newest)?);
    regions.extend(nodes_and_data(device, superblock, &newest)?);
    Ok(regions)
}

/// Device offsets of all blocks of metadata that have another copy.
///
/// # Errors
/// As [`regions`].
pub fn metadata_blocks(device: &Arc<SimDevice>) -> Result<Vec<u64>> {
    let regions = regions(device)?;
    let copies = regions.iter().filter(|region| region.name != "data" && region.copies.len() > 1);
    let blocks = copies.flat_map(|region| &region.copies);
    Ok(blocks
        .flat_map(|copy| (copy.start / BLOCK_BYTES * BLOCK_BYTES..copy.end).step_by(BLOCK_BYTES as usize))
        .collect())
}

fn starts<'a>(superblock: &'a Superblock, ranges: &'a [BucketRange]) -> impl Iterator<Item = Range<u64>> + 'a {
    let bucket_bytes = u64::from(superblock.geometry.bucket_bytes);
    ranges.iter().map(move |range| range.first * bucket_bytes..(range.first + range.count) * bucket_bytes)
}

fn checkpoint_area(superblock: &Superblock, newest: &Checkpoint) -> Vec<Region> {
    let copies = |offset: u64, length: u64| -> Vec<Range<u64>> {
        let area = starts(superblock, &superblock.layout.checkpoints);
        area.map(|area| area.start + offset..area.start + offset + length).collect()
    };
    // Of a record's slot the first block is certainly in use.
    let slot = newest.number % RECORD_SLOTS * RECORD_SLOT_BYTES as u64;
    let mut regions = vec![Region { name: "checkpoint record", copies: copies(slot, 512) }];
    for page in &newest.map {
        let offset = RECORD_SLOTS * RECORD_SLOT_BYTES as u64 + u64::from(page.place) * MAP_PAGE_BYTES as u64;
        regions.push(Region { name: "node-space map", copies: copies(offset, MAP_PAGE_BYTES as u64) });
    }
    regions
}

/// Those from the checkpoint's first on.
fn journal_records(device: &SimDevice, superblock: &Superblock, newest: &Checkpoint) -> Result<Vec<Region>> {
    let rings: Vec<_> = starts(superblock, &superblock.layout.journal).collect();
    let Some(first) = rings.first() else { return Ok(Vec::new()) };
    let mut ring = vec![0; (first.end - first.start) as usize];
    device.read(first.start, &mut ring)?;
    let mut regions = Vec::new();
    for at in (0..ring.len()).step_by(RECORD_ALIGNMENT_BYTES) {
        let Ok((header, payload, _)) = RecordHeader::decode(&ring[at..]) else { continue };
        if header.sequence.0 >= newest.first_replay && header.epoch >= newest.epoch {
            let used = at as u64..(at + RecordHeader::BYTES + payload.len()) as u64;
            let copies = rings.iter().map(|ring| ring.start + used.start..ring.start + used.end).collect();
            regions.push(Region { name: "journal", copies });
        }
    }
    Ok(regions)
}

fn nodes_and_data(device: &Arc<SimDevice>, superblock: Superblock, newest: &Checkpoint) -> Result<Vec<Region>> {
    let reader = NodeReader::new(Arc::new(superblock), vec![Arc::clone(device) as _], Arc::default());
    let mut regions = Vec::new();
    let mut note = |node: &PublishedNode| {
        let used = u64::from(node.pointer.written_bytes);
        let copies = node.pointer.copies.iter().map(|copy| copy.offset..copy.offset + used).collect();
        regions.push(Region { name: node.btree.name(), copies });
        if node.btree != BtreeId::Extents || node.level > 0 {
            return Ok(());
        }
        for (_, value) in node.keys.as_ref().map_err(Clone::clone)?.iter() {
            if let Ok(ExtentValue::Data(data)) = ExtentValue::decode(value) {
                let copies = data.pointers.iter().map(|at| at.offset..at.offset + u64::from(data.stream_bytes));
                regions.push(Region { name: "data", copies: copies.collect() });
            }
        }
        Ok(())
    };
    walk_published(&reader, newest, &mut note)?;
    Ok(regions)
}
