//! A whole image that a malicious hand has written: every checksum is right. It is checked, mounted, walked, read, written to, repaired.

use std::sync::{Arc, OnceLock};

use coppicefs::device::{BlockDevice, Image, SimDevice, SimOptions};
use coppicefs::env::Env;
use coppicefs::filesystem::OpenOptions;
use coppicefs::format::checkpoint::{Checkpoint, RECORD_SLOT_BYTES, RECORD_SLOTS};
use coppicefs::format::key::{pack, unpack};
use coppicefs::format::node::{BsetHeader, HEADER_BYTES, NodeHeader, NodePointer};
use coppicefs::format::superblock::{Superblock, copy_offsets};
use coppicefs::{Error, Result};

use crate::crash::Subject;
use crate::filesystem_subject::Coppice;
use crate::operation::Operation;
use crate::shown::show;
use crate::tree::Tree;

const DEVICE_BYTES: u64 = 8 << 20;
/// Bytes of one change.
const CHANGE_BYTES: usize = 12;

pub(super) fn device_of(image: Image) -> Arc<SimDevice> {
    Arc::new(SimDevice::from_image(image, SimOptions { block_bytes: 512, ..SimOptions::default() }))
}

/// Every kind of file, data in keys and in extents, holes, preallocated space, links, attributes; a log that needs replay.
pub(super) fn good_image() -> Image {
    static GOOD: OnceLock<Image> = OnceLock::new();
    GOOD.get_or_init(make_good_image).clone()
}

fn workload() -> Vec<Operation> {
    let mut operations = Vec::new();
    for folder in 0..2_u32 {
        let parent = format!("/d{folder}");
        operations.push(Operation::MakeDirectory { path: parent.clone(), mode: 0o755 });
        for file in 0..6_u32 {
            let path = format!("{parent}/f{file}");
            let (length, tag) = (1 + u64::from(file) * 7000, file + 1);
            operations.push(Operation::Create { path: path.clone(), mode: 0o644 });
            operations.push(Operation::Write { path: path.clone(), offset: 0, length, tag });
            match file {
                1 => operations.push(Operation::SetXattr { path, name: "user.a".into(), value: "value".into() }),
                2 => operations.push(Operation::Link { existing: path, path: format!("/l{folder}") }),
                3 => operations.push(Operation::SymbolicLink { path: format!("/s{folder}"), target: path }),
                4 => operations.push(Operation::Punch { path, offset: 4096, length: 8192 }),
                _ => operations.push(Operation::Allocate { path, offset: 40_000, length: 9000, keep_size: true }),
            }
        }
        operations.push(if folder == 0 { Operation::Settle } else { Operation::Sync });
    }
    operations
}

fn make_good_image() -> Image {
    let subject = Coppice::default();
    let device = device_of(Image::new(DEVICE_BYTES));
    subject.format(&device).expect("format");
    let mut mounted = subject.mount(&device, 1).expect("mount");
    for operation in workload() {
        mounted.perform(&operation).expect("an operation of the good image");
    }
    mounted.unmount().expect("unmount");
    // Once more, so that there is something in the log.
    let mut mounted = subject.mount(&device, 2).expect("mount");
    for operation in [
        Operation::Unlink { path: "/d0/f1".into() },
        Operation::Write { path: "/d1/f3".into(), offset: 5000, length: 5000, tag: 77 },
        Operation::Sync,
    ] {
        mounted.perform(&operation).expect("an operation of the good image");
    }
    device.snapshot().everything()
}

fn read(device: &SimDevice, offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    // In range: it is zeros otherwise, which nothing decodes.
    let _ = device.read(offset, &mut bytes);
    bytes
}

fn put(device: &SimDevice, offset: u64, bytes: &[u8]) {
    device.corrupt(offset, bytes.len() as u64, |at, piece| {
        let from = (at - offset) as usize;
        piece.copy_from_slice(&bytes[from..from + piece.len()]);
    });
}

/// The parts of a change: what it is made to, where in that, and what comes there.
#[derive(Clone, Copy)]
struct Change {
    what: u8,
    which: u8,
    at: u16,
    value: u64,
}

impl Change {
    fn all(bytes: &[u8]) -> impl Iterator<Item = Self> + '_ {
        bytes.chunks_exact(CHANGE_BYTES).map(|bytes| Self {
            what: bytes[0],
            which: bytes[1],
            at: u16::from_le_bytes([bytes[2], bytes[3]]),
            value: bytes[4..].iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte)),
        })
    }
}

/// Applies a change; nothing, if the change before has left nothing to be changed.
fn apply(device: &SimDevice, change: Change) -> Option<()> {
    let superblock = Superblock::decode(&read(device, copy_offsets(DEVICE_BYTES)[0], 16 << 10)).ok()?;
    match change.what % 8 {
        0 => change_superblock(device, superblock, change),
        1 => change_checkpoint(device, &superblock, |checkpoint| change_record(checkpoint, change)),
        // The log and the file data as they come: their checksums find it.
        2 => {
            let at = change.value % DEVICE_BYTES / 512 * 512;
            device.corrupt(at, 512, |_, bytes| bytes.iter_mut().for_each(|byte| *byte ^= change.which | 1));
            Some(())
        }
        _ => change_root(device, &superblock, change),
    }
}

fn change_superblock(device: &SimDevice, mut superblock: Superblock, change: Change) -> Option<()> {
    let value = change.value;
    match change.which % 10 {
        0 => superblock.geometry.block_bytes = value as u32,
        1 => superblock.geometry.bucket_bytes = value as u32,
        2 => superblock.geometry.node_bytes = value as u32,
        3 => superblock.geometry.metadata_replicas = value as u8,
        4 => superblock.members.first_mut()?.bucket_count = value,
        5 => superblock.members.first_mut()?.size_bytes = value,
        6 => superblock.layout.journal.get_mut(usize::from(change.at) % 2)?.first = value,
        7 => superblock.layout.journal.get_mut(usize::from(change.at) % 2)?.count = value,
        8 => superblock.layout.checkpoints.get_mut(usize::from(change.at) % 2)?.first = value,
        _ => superblock.layout.checkpoints.get_mut(usize::from(change.at) % 2)?.count = value,
    }
    superblock.sequence = superblock.sequence.saturating_add(1);
    let bytes = superblock.encode().ok()?;
    copy_offsets(DEVICE_BYTES).iter().for_each(|&offset| put(device, offset, &bytes));
    Some(())
}

/// Offsets of the copies of the checkpoint area.
fn areas(superblock: &Superblock) -> Vec<u64> {
    let bucket_bytes = u64::from(superblock.geometry.bucket_bytes);
    superblock.layout.checkpoints.iter().map(|range| range.first.saturating_mul(bucket_bytes)).collect()
}

fn newest(device: &SimDevice, superblock: &Superblock) -> Option<Checkpoint> {
    let area = *areas(superblock).first()?;
    (0..RECORD_SLOTS)
        .filter_map(|slot| {
            let bytes = read(device, area.checked_add(slot * RECORD_SLOT_BYTES as u64)?, RECORD_SLOT_BYTES);
            Checkpoint::decode(superblock.filesystem, &bytes).ok()
        })
        .max_by_key(|record| record.number)
}

fn change_checkpoint(
    device: &SimDevice,
    superblock: &Superblock,
    change: impl FnOnce(&mut Checkpoint) -> Option<()>,
) -> Option<()> {
    let mut record = newest(device, superblock)?;
    let number = record.number;
    change(&mut record)?;
    let bytes = record.encode(superblock.filesystem).ok()?;
    for area in areas(superblock) {
        let offset = area.checked_add(number % RECORD_SLOTS * RECORD_SLOT_BYTES as u64)?;
        if offset + bytes.len() as u64 <= DEVICE_BYTES {
            put(device, offset, &bytes);
        }
    }
    Some(())
}

fn change_record(record: &mut Checkpoint, change: Change) -> Option<()> {
    let (at, value) = (usize::from(change.at), change.value);
    match change.which % 10 {
        0 => record.number = value,
        1 => record.epoch = value,
        2 => record.first_replay = value,
        3 => record.first_replay_offset = value,
        4 => record.newest_sequence = value,
        5 => record.next_node = value,
        6 => record.clean = !record.clean,
        7 => {
            let count = record.totals.len();
            record.totals.get_mut(at % count.max(1))?.1 = value.cast_signed();
        }
        8 => {
            let count = record.map.len();
            record.map.get_mut(at % count.max(1))?.place = value as u32;
        }
        _ => {
            let count = record.roots.len();
            let root = record.roots.get_mut(at % count.max(1))?;
            let at = (value >> 32) as usize % root.pointer.len().max(1);
            *root.pointer.get_mut(at)? ^= value as u8 | 1;
            root.level ^= (value >> 8) as u8 & 3;
        }
    }
    Some(())
}

/// A key of a tree's root becomes another, or loses, gains or changes bytes of its value. The node is written again, as one bset.
fn change_root(device: &SimDevice, superblock: &Superblock, change: Change) -> Option<()> {
    change_checkpoint(device, superblock, |record| {
        let count = record.roots.len();
        let root = record.roots.get_mut(usize::from(change.which) % count.max(1))?;
        let mut pointer = NodePointer::decode(&root.pointer).ok()?;
        let address = *pointer.copies.first()?;
        let bytes = read(device, address.offset, superblock.geometry.node_bytes as usize);
        let header = NodeHeader::decode(&bytes).ok()?;
        let (bset, mut payload, _) = BsetHeader::decode(bytes.get(HEADER_BYTES..)?).ok()?;
        let mut keys = Vec::new();
        while let Ok((key, left)) = unpack(payload) {
            keys.push((key.position, key.value.map(<[u8]>::to_vec)));
            payload = left;
        }
        let index = usize::from(change.at) % keys.len().max(1);
        let (position, value) = keys.get_mut(index)?;
        let number = change.value & 0x00ff_ffff_ffff_ffff;
        match change.value >> 56 {
            0 => position.inode = number,
            1 => position.offset = number,
            2 => position.snapshot = number as u32,
            3 => *value = None,
            4 => value.as_mut()?.truncate(number as usize % 64),
            5 => value.as_mut()?.extend([number as u8; 9]),
            _ => {
                let value = value.as_mut()?;
                let at = (number >> 8) as usize % value.len().max(1);
                *value.get_mut(at)? = number as u8;
            }
        }
        keys.sort();
        keys.dedup_by_key(|(position, _)| *position);
        let mut payload = Vec::new();
        keys.iter().for_each(|(position, value)| pack(*position, value.as_deref(), &mut payload));
        let bset = BsetHeader { key_count: keys.len() as u32, payload_bytes: payload.len() as u32, ..bset };
        let (bset, checksum) = bset.encode(&payload);
        for copy in &pointer.copies {
            let header = NodeHeader { address: copy.offset, device: copy.device, ..header };
            put(device, copy.offset, &[header.encode(), bset.clone()].concat());
        }
        (pointer.written_bytes, pointer.bset_count) = ((HEADER_BYTES + bset.len()) as u32, 1);
        pointer.last_checksum = checksum;
        root.pointer.clear();
        pointer.encode(&mut root.pointer);
        Some(())
    })
}

pub(super) fn image(bytes: &[u8]) {
    let device = device_of(good_image());
    for change in Change::all(bytes).take(16) {
        let _ = apply(&device, change);
    }
    let image = device.image();
    let subject = Coppice::default();
    let before = image.content_hash();
    let checked = subject.check(&device);
    assert_eq!(device.image().content_hash(), before, "the check changed the image");
    assert_no_bug(checked);
    // What it shows may be anything; what it says of what cannot be must be an error.
    let shown = show(&(device_of(image.clone()) as Arc<dyn BlockDevice>), &expected());
    if let Ok(shown) = &shown {
        shown.errors.iter().for_each(|(_, _, error)| assert!(!matches!(error, Error::Bug(_)), "{error}"));
    }
    assert_no_bug(shown);
    assert_no_bug(repair(&device_of(image.clone())));
    // Written to.
    if let Ok(mut mounted) = subject.mount(&device_of(image), 1) {
        for operation in workload().into_iter().take(20) {
            assert_no_bug(mounted.perform(&operation));
        }
        assert_no_bug(mounted.unmount());
    }
}

fn assert_no_bug<T>(outcome: Result<T>) {
    if let Err(error @ Error::Bug(_)) = outcome {
        panic!("{error}");
    }
}

fn expected() -> Tree {
    static EXPECTED: OnceLock<Tree> = OnceLock::new();
    let make = || {
        let mut model = crate::model::Model::new(4096);
        workload().iter().for_each(|operation| model.begin(operation).expect("an operation of the good image"));
        model.tree()
    };
    EXPECTED.get_or_init(make).clone()
}

/// As `fsck -y` does it. Whether it is clean then.
fn repair(device: &Arc<SimDevice>) -> Result<bool> {
    let options = OpenOptions { cache_bytes: 8 << 20, env: Some(Env::simulated(1)), ..OpenOptions::default() };
    let outcome = coppicefs_fsck::session::repair_all(&[Arc::clone(device) as _], &options)?;
    Ok(outcome.left.is_empty())
}

/// One change of each kind.
pub(super) fn seeds() -> Vec<Vec<u8>> {
    let change = |what: u8, which: u8, at: u16, value: u64| {
        let mut bytes = vec![what, which];
        bytes.extend(at.to_le_bytes());
        bytes.extend(value.to_le_bytes());
        bytes
    };
    let mut seeds = Vec::new();
    for which in 0..10 {
        seeds.push(change(0, which, 0, 512));
        seeds.push(change(1, which, 0, 3));
    }
    for tree in 0..12 {
        for kind in 0..7_u64 {
            seeds.push(change(3, tree, u16::from(tree), kind << 56 | 0x0302));
        }
    }
    seeds.push(change(2, 0xff, 0, 4096));
    seeds
}
