//! Targets that decode: superblock, journal record, node, values of keys.

use std::sync::Arc;

use coppicefs::device::{BlockDevice, Image, SimDevice, SimOptions};
use coppicefs::format::BtreeId;
use coppicefs::format::checkpoint::{Checkpoint, decode_map_page};
use coppicefs::format::checksum::metadata_checksum;
use coppicefs::format::extent::ExtentValue;
use coppicefs::format::journal::{Entries, RecordHeader};
use coppicefs::format::key::{packed_bytes, unpack};
use coppicefs::format::namespace::{DirentBucket, Inode, LoggedOperation, Snapshot, Subvolume, XattrBucket};
use coppicefs::format::node::{APPEND_ALIGNMENT_BYTES, BsetHeader, HEADER_BYTES, NodeHeader, NodePointer};
use coppicefs::format::space::{Backpointer, Bucket, DeviceUsage, FreeBucket};
use coppicefs::format::superblock::Superblock;

use super::image::good_image;
use crate::regions::regions;

/// Where a structure's checksum lies, how long its header is, and where the header says how much follows.
struct Layout {
    checksum: usize,
    header: usize,
    length: Option<usize>,
}

const SUPERBLOCK: Layout = Layout { checksum: 76, header: 80, length: Some(72) };
const RECORD: Layout = Layout { checksum: 64, header: 68, length: Some(52) };
const NODE: Layout = Layout { checksum: HEADER_BYTES - 4, header: HEADER_BYTES, length: None };
const BSET: Layout = Layout { checksum: 28, header: BsetHeader::BYTES, length: Some(24) };

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// Makes the checksum of the structure at the start of `bytes` right, if there is all of it. Returns how long it is.
fn make_right(bytes: &mut [u8], layout: &Layout) -> Option<usize> {
    let follows = layout.length.map_or(Some(0), |at| u32_at(bytes, at))? as usize;
    let length = layout.header.checked_add(follows)?;
    let whole = bytes.get_mut(..length)?;
    whole[layout.checksum..layout.checksum + 4].fill(0);
    let checksum = metadata_checksum(&[whole]);
    whole[layout.checksum..layout.checksum + 4].copy_from_slice(&checksum.to_le_bytes());
    Some(length)
}

pub(super) fn superblock(bytes: &[u8]) {
    let mut bytes = bytes.to_vec();
    let _ = Superblock::decode(&bytes);
    make_right(&mut bytes, &SUPERBLOCK);
    if let Ok(superblock) = Superblock::decode(&bytes)
        && let Ok(again) = superblock.encode()
    {
        assert_eq!(
            Superblock::decode(&again).ok().as_ref(),
            Some(&superblock),
            "what was decoded is encoded to something else"
        );
    }
}

pub(super) fn journal_record(bytes: &[u8]) {
    let mut bytes = bytes.to_vec();
    let _ = RecordHeader::peek(&bytes);
    make_right(&mut bytes, &RECORD);
    if let Ok((_, payload, _)) = RecordHeader::decode(&bytes) {
        assert!(Entries::new(payload).count() <= payload.len());
    }
    assert!(Entries::new(&bytes).count() <= bytes.len());
}

/// Header and chain of bsets, as in a slot.
pub(super) fn node(bytes: &[u8]) {
    let mut bytes = bytes.to_vec();
    make_right(&mut bytes, &NODE);
    let Ok(header) = NodeHeader::decode(&bytes) else { return };
    let mut offset = HEADER_BYTES;
    while let Some(rest) = bytes.get_mut(offset..).filter(|rest| !rest.is_empty()) {
        let Some(length) = make_right(rest, &BSET) else { return };
        let Ok((_, mut payload, _)) = BsetHeader::decode(rest) else { return };
        while let Ok((key, left)) = unpack(payload) {
            assert_eq!(payload.len() - left.len(), packed_bytes(key.value), "a key of another length than it has");
            if let Some(value) = key.value {
                decode_value(header.btree, value);
                if header.level > 0 {
                    let _ = NodePointer::decode(value);
                }
            }
            payload = left;
        }
        offset = (offset + length).next_multiple_of(APPEND_ALIGNMENT_BYTES);
    }
}

/// The first byte is the number of the tree.
pub(super) fn value(bytes: &[u8]) {
    let Some((&btree, bytes)) = bytes.split_first() else { return };
    match BtreeId::from_stored(btree) {
        Ok(btree) => decode_value(btree, bytes),
        // What is not in a tree.
        Err(_) => {
            let _ = NodePointer::decode(bytes);
            let _ = Checkpoint::decode(uuid_of(bytes), bytes);
            let _ = decode_map_page(uuid_of(bytes), 0, bytes);
        }
    }
}

fn uuid_of(bytes: &[u8]) -> uuid::Uuid {
    uuid::Uuid::from_slice(bytes.get(8..24).unwrap_or(&[0; 16])).unwrap_or_default()
}

/// What is decoded is encoded to something that decodes to the same.
macro_rules! round_trip {
    ($kind:ty, $bytes:expr) => {
        if let Ok(value) = <$kind>::decode($bytes) {
            let again = <$kind>::decode(&value.encode());
            assert_eq!(again.ok().as_ref(), Some(&value), "what was decoded is encoded to something else");
        }
    };
    ($kind:ty, $bytes:expr, fallible) => {
        if let Ok(value) = <$kind>::decode($bytes)
            && let Ok(bytes) = value.encode()
        {
            assert_eq!(
                <$kind>::decode(&bytes).ok().as_ref(),
                Some(&value),
                "what was decoded is encoded to something else"
            );
        }
    };
}

fn decode_value(btree: BtreeId, bytes: &[u8]) {
    match btree {
        BtreeId::Extents => round_trip!(ExtentValue, bytes),
        BtreeId::Inodes => round_trip!(Inode, bytes, fallible),
        BtreeId::Dirents => round_trip!(DirentBucket, bytes),
        BtreeId::Xattrs => round_trip!(XattrBucket, bytes),
        BtreeId::Buckets => round_trip!(Bucket, bytes),
        BtreeId::FreeSpace => round_trip!(FreeBucket, bytes),
        BtreeId::Backpointers => round_trip!(Backpointer, bytes),
        BtreeId::LoggedOperations => round_trip!(LoggedOperation, bytes, fallible),
        BtreeId::Subvolumes => round_trip!(Subvolume, bytes, fallible),
        BtreeId::Snapshots => round_trip!(Snapshot, bytes, fallible),
        BtreeId::Devices => round_trip!(DeviceUsage, bytes),
        BtreeId::NeedDiscard | BtreeId::Orphans => {}
    }
}

fn device_of(image: Image) -> Arc<SimDevice> {
    Arc::new(SimDevice::from_image(image, SimOptions { block_bytes: 512, ..SimOptions::default() }))
}

/// What the good image holds of these structures.
fn found(is_wanted: impl Fn(&str) -> bool) -> Vec<Vec<u8>> {
    let device = device_of(good_image());
    let regions = regions(&device).expect("the good image can be opened");
    let wanted = regions.iter().filter(|region| is_wanted(region.name));
    wanted
        .filter_map(|region| region.copies.first())
        .map(|copy| {
            let start = copy.start / 512 * 512;
            let mut bytes = vec![0; (copy.end.next_multiple_of(512) - start) as usize];
            device.read(start, &mut bytes).expect("the simulated device can be read");
            bytes.truncate((copy.end - start) as usize);
            bytes
        })
        .collect()
}

pub(super) fn superblock_seeds() -> Vec<Vec<u8>> {
    let mut seeds = found(|name| name == "superblock");
    for seed in &mut seeds {
        let length = SUPERBLOCK.header + u32_at(seed, 72).unwrap_or(0) as usize;
        seed.truncate(length);
    }
    seeds
}

pub(super) fn journal_record_seeds() -> Vec<Vec<u8>> {
    let mut seeds = found(|name| name == "journal");
    seeds.sort_by_key(Vec::len);
    // Short ones and long ones; the rest is more of the same.
    let step = (seeds.len() / 6).max(1);
    seeds.into_iter().step_by(step).collect()
}

pub(super) fn node_seeds() -> Vec<Vec<u8>> {
    found(|name| BtreeId::ALL.iter().any(|btree| btree.name() == name))
}

pub(super) fn value_seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for node in node_seeds() {
        let Ok(header) = NodeHeader::decode(&node) else { continue };
        let Some(Ok((_, mut payload, _))) = node.get(HEADER_BYTES..).map(BsetHeader::decode) else { continue };
        for _ in 0..4 {
            let Ok((key, left)) = unpack(payload) else { break };
            let value = key.value.unwrap_or_default();
            seeds.push([&[header.btree as u8], value].concat());
            payload = left;
        }
    }
    seeds.extend(found(|name| name == "checkpoint record" || name == "node-space map").into_iter().map(|bytes| {
        let end = bytes.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
        [&[u8::MAX], &bytes[..end]].concat()
    }));
    seeds
}
