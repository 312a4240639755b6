//! Targets that decode: superblock, journal record, node, values of keys.

use coppicefs::device::BlockDevice;
use coppicefs::format::BtreeId;
use coppicefs::format::checkpoint::{Checkpoint, MAP_PAGE_BYTES, decode_map_page};
use coppicefs::format::checksum::metadata_checksum;
use coppicefs::format::extent::ExtentValue;
use coppicefs::format::journal::{Entries, RecordHeader};
use coppicefs::format::key::{packed_bytes, unpack};
use coppicefs::format::namespace::{DirentBucket, Inode, LoggedOperation, Snapshot, Subvolume, XattrBucket};
use coppicefs::format::node::{APPEND_ALIGNMENT_BYTES, BsetHeader, HEADER_BYTES, NodeHeader, NodePointer};
use coppicefs::format::space::{Backpointer, Bucket, DeviceUsage, FreeBucket};
use coppicefs::format::superblock::Superblock;

use super::image::{device_of, good_image};
use crate::regions::regions;

/// Where a structure's checksum lies, how long its header is, and where the header says how much follows, in which unit.
struct Layout {
    checksum: usize,
    header: usize,
    length: Option<usize>,
    unit: usize,
}

const SUPERBLOCK: Layout = Layout { checksum: 76, header: 80, length: Some(72), unit: 1 };
const RECORD: Layout = Layout { checksum: 64, header: 68, length: Some(52), unit: 1 };
const NODE: Layout = Layout { checksum: HEADER_BYTES - 4, header: HEADER_BYTES, length: None, unit: 1 };
const BSET: Layout = Layout { checksum: 28, header: BsetHeader::BYTES, length: Some(24), unit: 1 };
const CHECKPOINT: Layout = Layout { checksum: 28, header: 32, length: Some(24), unit: 1 };
const MAP_PAGE: Layout = Layout { checksum: 4, header: 32, length: Some(12), unit: 16 };

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// Makes the checksum of the structure at the start of `bytes` right, if there is all of it. Returns how long it is.
fn make_right(bytes: &mut [u8], layout: &Layout) -> Option<usize> {
    let follows = layout.length.map_or(Some(0), |at| u32_at(bytes, at))? as usize;
    let length = follows.checked_mul(layout.unit)?.checked_add(layout.header)?;
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
    decode_node(&mut bytes.to_vec());
}

/// How many bytes of a node, whose checksums are made right, can be decoded: whole bsets.
fn decode_node(bytes: &mut [u8]) -> usize {
    make_right(bytes, &NODE);
    let Ok(header) = NodeHeader::decode(bytes) else { return 0 };
    let mut offset = HEADER_BYTES;
    while let Some(rest) = bytes.get_mut(offset..).filter(|rest| !rest.is_empty()) {
        let Some(length) = make_right(rest, &BSET) else { return offset };
        let Ok((_, mut payload, _)) = BsetHeader::decode(rest) else { return offset };
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
    offset
}

/// The first byte is the number of the tree.
pub(super) fn value(bytes: &[u8]) {
    decode_any(bytes);
}

/// Whether it is something.
fn decode_any(bytes: &[u8]) -> bool {
    let Some((&btree, bytes)) = bytes.split_first() else { return false };
    match BtreeId::from_stored(btree) {
        Ok(btree) => decode_value(btree, bytes),
        // What is not in a tree.
        Err(_) => {
            let pointer = NodePointer::decode(bytes).is_ok();
            // Zeros at the end of a seed are left out.
            let padded = |layout| {
                let mut bytes = bytes.to_vec();
                bytes.resize(bytes.len().max(MAP_PAGE_BYTES), 0);
                make_right(&mut bytes, layout);
                bytes
            };
            let checkpoint = padded(&CHECKPOINT);
            let checkpoint = Checkpoint::decode(uuid_at(&checkpoint, 8), &checkpoint).is_ok();
            let page = padded(&MAP_PAGE);
            let number = u32_at(&page, 8).unwrap_or(0);
            decode_map_page(uuid_at(&page, 16), number, &page).is_ok() || pointer || checkpoint
        }
    }
}

fn uuid_at(bytes: &[u8], at: usize) -> uuid::Uuid {
    uuid::Uuid::from_slice(bytes.get(at..at + 16).unwrap_or(&[0; 16])).unwrap_or_default()
}

/// What is decoded is encoded to something that decodes to the same. Whether it is decoded.
macro_rules! round_trip {
    ($kind:ty, $bytes:expr) => {{
        let decoded = <$kind>::decode($bytes);
        if let Ok(value) = &decoded {
            let again = <$kind>::decode(&value.encode());
            assert_eq!(again.ok().as_ref(), Some(value), "what was decoded is encoded to something else");
        }
        decoded.is_ok()
    }};
    ($kind:ty, $bytes:expr, fallible) => {{
        let decoded = <$kind>::decode($bytes);
        if let Ok(value) = &decoded
            && let Ok(bytes) = value.encode()
        {
            let again = <$kind>::decode(&bytes);
            assert_eq!(again.ok().as_ref(), Some(value), "what was decoded is encoded to something else");
        }
        decoded.is_ok()
    }};
}

/// Whether it is a value of this tree.
fn decode_value(btree: BtreeId, bytes: &[u8]) -> bool {
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
        BtreeId::NeedDiscard | BtreeId::Orphans => bytes.is_empty(),
    }
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

/// If the format moves, the targets must move with it: else they would feed the decoders nothing but wrong checksums.
#[cfg(test)]
mod tests {
    use super::*;

    /// A seed whose checksum was destroyed and made right again.
    fn made_right(seed: &[u8], layout: &Layout) -> Vec<u8> {
        let mut bytes = seed.to_vec();
        bytes[layout.checksum..layout.checksum + 4].fill(0xa5);
        make_right(&mut bytes, layout).expect("all of it is there");
        bytes
    }

    #[test]
    fn superblocks_are_decoded_with_the_checksum_that_is_made_for_them() {
        for seed in superblock_seeds() {
            let expected = Superblock::decode(&seed).expect("a superblock");
            assert_eq!(Superblock::decode(&made_right(&seed, &SUPERBLOCK)).ok(), Some(expected));
        }
    }

    #[test]
    fn records_are_decoded_with_the_checksum_that_is_made_for_them() {
        for seed in journal_record_seeds() {
            let bytes = made_right(&seed, &RECORD);
            let (_, payload, _) = RecordHeader::decode(&bytes).expect("a record");
            assert!(Entries::new(payload).all(|entry| entry.is_ok()));
        }
    }

    #[test]
    fn nodes_are_decoded_with_the_checksums_that_are_made_for_them() {
        for seed in node_seeds() {
            let mut bytes = made_right(&seed, &NODE);
            bytes[HEADER_BYTES + BSET.checksum..][..4].fill(0xa5);
            assert!(decode_node(&mut bytes) >= seed.len(), "not all of a node of {} bytes is decoded", seed.len());
        }
    }

    #[test]
    fn values_are_decoded() {
        for seed in value_seeds() {
            assert!(decode_any(&seed), "{:?}: {:?}", seed.first(), seed.get(1..));
        }
    }
}
