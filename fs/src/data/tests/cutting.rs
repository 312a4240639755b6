//! Cutting extents, against an array that says for each block of the file which stored block it is.

use proptest::prelude::*;
use smallvec::smallvec;

use crate::data::extents::{Extent, Remainder, Shape, part, take_out};
use crate::format::extent::{DataExtent, ExtentPointer, ExtentValue};
use crate::format::{ChecksumKind, CompressionKind, Position};
use crate::units::DeviceIndex;

const BLOCK: u32 = 4096;
const BLOCKS: usize = 64;

fn shape() -> Shape {
    Shape { block_bytes: BLOCK, bucket_bytes: 256 << 10, device_bytes: smallvec![64 << 20] }
}

fn raw(place: u64, blocks: u32) -> ExtentValue {
    let length = blocks * BLOCK;
    let pointer = |offset| ExtentPointer { device: DeviceIndex(0), generation: 3, offset };
    ExtentValue::Data(DataExtent {
        length,
        pointers: smallvec![pointer(place), pointer(place + (32 << 20))],
        compression: CompressionKind::None,
        disk_bytes: length,
        stream_bytes: length,
        frame_bytes: length,
        frame_offset: 0,
        checksum_kind: ChecksumKind::Crc32c,
        checksums: (0..u64::from(blocks)).map(|block| place / u64::from(BLOCK) + block).collect(),
    })
}

fn frame(place: u64, blocks: u32) -> ExtentValue {
    ExtentValue::Data(DataExtent {
        length: blocks * BLOCK,
        pointers: smallvec![ExtentPointer { device: DeviceIndex(0), generation: 3, offset: place }],
        compression: CompressionKind::Zstd,
        disk_bytes: BLOCK * blocks.div_ceil(2),
        stream_bytes: BLOCK * blocks.div_ceil(2) - 5,
        frame_bytes: blocks * BLOCK,
        frame_offset: 0,
        checksum_kind: ChecksumKind::Xxh3,
        checksums: vec![place],
    })
}

/// What a block of the file is: the stored place, and for a frame also the block in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Block {
    Hole,
    Unwritten,
    Raw { place: u64, checksum: u64 },
    Frame { place: u64, block: u64 },
}

fn blocks_of(value: &ExtentValue) -> Vec<Block> {
    let count = value.length() / u64::from(BLOCK);
    (0..count)
        .map(|block| match value {
            ExtentValue::Data(data) if data.compression == CompressionKind::None => {
                assert_eq!(data.pointers[1].offset, data.pointers[0].offset + (32 << 20));
                assert_eq!(data.checksums.len() as u64, count);
                let place = data.pointers[0].offset + block * u64::from(BLOCK);
                Block::Raw { place, checksum: data.checksums[usize::try_from(block).unwrap()] }
            }
            ExtentValue::Data(data) => {
                assert_eq!(data.checksums, vec![data.pointers[0].offset]);
                let block = u64::from(data.frame_offset / BLOCK) + block;
                Block::Frame { place: data.pointers[0].offset, block }
            }
            ExtentValue::Unwritten { .. } => Block::Unwritten,
            _ => Block::Hole,
        })
        .collect()
}

#[derive(Clone, Debug)]
enum Kind {
    Hole,
    Unwritten,
    Raw,
    Frame,
}

fn operation() -> impl Strategy<Value = (Kind, usize, usize)> {
    let kind = prop_oneof![Just(Kind::Hole), Just(Kind::Unwritten), Just(Kind::Raw), Just(Kind::Frame)];
    (kind, 0..BLOCKS, 1..17_usize)
}

proptest! {
    #[test]
    fn cutting_keeps_what_is_not_cut(operations in proptest::collection::vec(operation(), 1..60)) {
        let shape = shape();
        let mut model = vec![Block::Hole; BLOCKS];
        let mut extents: Vec<Extent> = Vec::new();
        for (number, (kind, from, count)) in operations.into_iter().enumerate() {
            let count = count.min(BLOCKS - from);
            let blocks = u32::try_from(count).unwrap();
            let (start, end) = (from as u64 * u64::from(BLOCK), (from + count) as u64 * u64::from(BLOCK));
            let place = (number as u64 % 120) * (256 << 10);
            let new = match kind {
                Kind::Hole => None,
                Kind::Unwritten => Some(ExtentValue::Unwritten { length: blocks * BLOCK }),
                Kind::Raw => Some(raw(place, blocks)),
                Kind::Frame => Some(frame(place, blocks)),
            };
            let mut next = Vec::new();
            for extent in extents {
                if extent.end <= start || extent.start() >= end {
                    next.push(extent);
                } else {
                    let Remainder { front, back } = take_out(&extent, start, end, BLOCK).unwrap();
                    next.extend(front.into_iter().chain(back));
                }
            }
            let new_blocks = new.as_ref().map_or(vec![Block::Hole; count], blocks_of);
            model[from..from + count].copy_from_slice(&new_blocks);
            next.extend(new.map(|value| Extent { end, value }));
            extents = next;
            let mut seen = vec![Block::Hole; BLOCKS];
            for extent in &extents {
                // Every part is an extent that can be stored, read back and believed.
                let decoded = shape.decode(Position::new(1, extent.end, u32::MAX), &extent.value.encode()).unwrap();
                prop_assert_eq!(&decoded, extent);
                let first = usize::try_from(extent.start() / u64::from(BLOCK)).unwrap();
                for (slot, block) in seen[first..].iter_mut().zip(blocks_of(&extent.value)) {
                    prop_assert_eq!(*slot, Block::Hole, "extents overlap");
                    *slot = block;
                }
            }
            prop_assert_eq!(&seen, &model);
        }
    }

    #[test]
    fn decoding_arbitrary_values_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..80), end in any::<u64>()) {
        if let Ok(extent) = shape().decode(Position::new(1, end, u32::MAX), &bytes) {
            prop_assert!(extent.start() <= extent.end);
        }
    }
}

#[test]
fn parts_must_be_whole_blocks_inside() {
    let extent = raw(0, 4);
    for (from, to) in [(0, 0), (4096, 4096), (0, 16385), (1, 4096), (0, 4095), (8192, 4096)] {
        assert!(part(&extent, from, to, BLOCK).is_err(), "{from}..{to}");
    }
    assert_eq!(part(&extent, 0, 16384, BLOCK).unwrap(), extent);
    let inline = ExtentValue::Inline(b"abc".to_vec());
    assert_eq!(part(&inline, 0, 2, BLOCK).unwrap(), ExtentValue::Inline(b"ab".to_vec()));
    assert!(part(&inline, 1, 2, BLOCK).is_err());
}

#[test]
fn contradictions_are_damage() {
    let shape = shape();
    let decode = |end, value: &ExtentValue| shape.decode(Position::new(1, end, u32::MAX), &value.encode());
    assert!(decode(16384, &raw(0, 4)).is_ok());
    assert!(decode(12288, &raw(0, 4)).is_err(), "starts before the file");
    assert!(decode(16385, &raw(0, 4)).is_err(), "not on a block");
    assert!(decode(16384, &raw((256 << 10) - 8192, 4)).is_err(), "crosses buckets");
    assert!(decode(16384, &raw(512, 4)).is_err(), "not at a block of the device");
    assert!(decode(16384, &raw(33 << 20, 4)).is_err(), "the second copy is off the device");
    let mut other_device = raw(0, 4);
    if let ExtentValue::Data(data) = &mut other_device {
        data.pointers[1].device = DeviceIndex(1);
    }
    assert!(decode(16384, &other_device).is_err(), "no such device");
    let mut few_checksums = raw(0, 4);
    if let ExtentValue::Data(data) = &mut few_checksums {
        data.checksums.truncate(2);
    }
    assert!(decode(16384, &few_checksums).is_err(), "two checksums of four blocks");
    assert!(decode(3, &ExtentValue::Inline(b"abc".to_vec())).is_ok());
    assert!(decode(4, &ExtentValue::Inline(b"abc".to_vec())).is_err(), "inline data that does not start at 0");
    assert!(decode(4096, &ExtentValue::Inline(vec![1; 4096])).is_err(), "a whole block inline");
}
