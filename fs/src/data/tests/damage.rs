//! Damaged media: what cannot be read is one checksum unit, and it says so; nothing wrong is ever shown.

use super::*;
use crate::format::extent::{DataExtent, ExtentPointer};

/// The extent that covers `offset`.
fn extent_at(stack: &Stack, inode: InodeNumber, offset: u64) -> extents::Extent {
    stack.extents_of(inode).into_iter().find(|extent| extent.end > offset && extent.start() <= offset).unwrap()
}

fn data_of(extent: &extents::Extent) -> &DataExtent {
    match &extent.value {
        ExtentValue::Data(data) => data,
        other => panic!("{other:?}"),
    }
}

/// Where block `offset` of the file lies on the device (raw), or where its frame starts.
fn place(stack: &Stack, inode: InodeNumber, offset: u64) -> u64 {
    let extent = extent_at(stack, inode, offset);
    let data = data_of(&extent);
    let first = data.pointers[0].offset;
    if data.compression == CompressionKind::None { first + offset - extent.start() } else { first }
}

fn ranges(bad: &[BadRange]) -> Vec<(u64, u64)> {
    bad.iter().map(|bad| (bad.start, bad.end)).collect()
}

#[test]
fn a_flipped_bit_costs_one_block() {
    for checksum in [ChecksumKind::Crc32c, ChecksumKind::Xxh3] {
        let stack = Stack::new(options(Compression::NONE, checksum), 1);
        let inode = stack.create(9);
        let content = noise(100_000, 1);
        stack.write(inode, &content, 0, 100_000);
        let broken = place(&stack, inode, 5 * BLOCK);
        stack.device.flip_bit(broken + 1000, 3);
        let (bytes, bad) = stack.try_read(inode, 0, 25 * BLOCK);
        assert_eq!(ranges(&bad), [(5 * BLOCK, 6 * BLOCK)]);
        assert!(
            matches!(&bad[0].error, Error::Corrupt(corruption) if corruption.place == Some((DeviceIndex(0), broken))
            && corruption.what == format!("data of inode 9 at byte {}", 5 * BLOCK)),
            "{}",
            bad[0].error
        );
        assert_eq!(bytes[..5 * BLOCK as usize], content[..5 * BLOCK as usize]);
        assert_eq!(bytes[6 * BLOCK as usize..100_000], content[6 * BLOCK as usize..]);
        assert_eq!(stack.metrics.data_checksum_errors.get(), 1);
        // The neighbours alone read, without a word.
        assert_eq!(stack.read(inode, 6 * BLOCK, 7 * BLOCK), content[6 * BLOCK as usize..7 * BLOCK as usize]);
        let mut outcome = Vec::new();
        let mut buffer = vec![0; BLOCK as usize];
        stack.data.read(inode, &mut [ReadPiece { offset: 5 * BLOCK, buffer: &mut buffer }], &mut |piece, result| {
            outcome.push((piece, result.is_err()));
        });
        assert_eq!(outcome, [(0, true)]);
    }
}

#[test]
fn a_block_that_the_device_refuses_costs_one_block() {
    let stack = Stack::new(options(Compression::NONE, ChecksumKind::None), 1);
    let inode = stack.create(9);
    let content = noise(100_000, 1);
    stack.write(inode, &content, 0, 100_000);
    stack.device.make_bad(place(&stack, inode, 8 * BLOCK) + 512, 512);
    let (bytes, bad) = stack.try_read(inode, 0, 25 * BLOCK);
    assert_eq!(ranges(&bad), [(8 * BLOCK, 9 * BLOCK)]);
    assert!(matches!(bad[0].error, Error::Device { .. }), "{}", bad[0].error);
    assert_eq!(bytes[..8 * BLOCK as usize], content[..8 * BLOCK as usize]);
    assert_eq!(bytes[9 * BLOCK as usize..100_000], content[9 * BLOCK as usize..]);
}

#[test]
fn a_damaged_frame_costs_that_frame() {
    for (compression, checksum) in [(lz4(), ChecksumKind::Crc32c), (zstd(), ChecksumKind::Xxh3)] {
        let stack = Stack::new(options(compression, checksum), 1);
        let inode = stack.create(9);
        let content = text(200_000, 1);
        stack.write(inode, &content, 0, 200_000);
        let extent = extent_at(&stack, inode, 70_000);
        stack.device.flip_bit(data_of(&extent).pointers[0].offset + 17, 1);
        let (bytes, bad) = stack.try_read(inode, 0, 49 * BLOCK);
        assert_eq!(bad.first().map(|bad| bad.start), Some(extent.start()));
        assert_eq!(bad.last().map(|bad| bad.end), Some(extent.end));
        assert!(bad.windows(2).all(|pair| pair[0].end == pair[1].start));
        for (index, (found, expected)) in bytes.iter().zip(&content).enumerate() {
            let index = index as u64;
            assert!(found == expected || (extent.start()..extent.end).contains(&index), "byte {index}");
        }
    }
}

#[test]
fn a_good_copy_answers_for_a_bad_one() {
    let stack = Stack::new(plain(), 1);
    let inode = stack.create(9);
    let content = noise(5 * BLOCK as usize, 1);
    stack.write(inode, &content, 0, content.len() as u64);
    // Another file holds the same bytes; its places become second copies of this one's, as replicas will.
    let twin = stack.create(10);
    stack.write(twin, &content, 0, content.len() as u64);
    let (mine, copy) = (extent_at(&stack, inode, 0), extent_at(&stack, twin, 0));
    let mut data = data_of(&mine).clone();
    data.pointers.push(ExtentPointer { ..data_of(&copy).pointers[0] });
    stack
        .transactions
        .run(CommitOptions::default(), |transaction| {
            transaction.delete(BtreeId::Extents, Position::new(10, copy.end, u32::MAX));
            let value = ExtentValue::Data(data.clone()).encode();
            transaction.put(BtreeId::Extents, Position::new(9, mine.end, u32::MAX), value);
            Ok(())
        })
        .unwrap();
    stack.device.flip_bit(data.pointers[0].offset + 2 * BLOCK, 0);
    stack.device.make_bad(data.pointers[0].offset + 3 * BLOCK, 512);
    assert_eq!(stack.read(inode, 0, 5 * BLOCK), content);
    stack.device.flip_bit(data.pointers[1].offset + 2 * BLOCK, 0);
    let (_, bad) = stack.try_read(inode, 0, 5 * BLOCK);
    assert_eq!(ranges(&bad), [(2 * BLOCK, 3 * BLOCK)]);
}

#[test]
fn copygc_keeps_damage_visible() {
    for checksum in [ChecksumKind::None, ChecksumKind::Crc32c, ChecksumKind::Xxh3] {
        let stack = Stack::new(options(Compression::NONE, checksum), 1);
        let inode = stack.create(9);
        let content = noise(12 * BLOCK as usize, 1);
        stack.write(inode, &content, 0, content.len() as u64);
        let mut expected = vec![(7 * BLOCK, 8 * BLOCK)];
        stack.device.make_bad(place(&stack, inode, 7 * BLOCK), 4096);
        if checksum != ChecksumKind::None {
            stack.device.flip_bit(place(&stack, inode, 3 * BLOCK), 3);
            expected.insert(0, (3 * BLOCK, 4 * BLOCK));
        }
        let before = place(&stack, inode, 7 * BLOCK);
        for bucket in stack.data_buckets() {
            stack.data.evacuate(DeviceIndex(0), bucket).unwrap();
        }
        assert_ne!(place(&stack, inode, 7 * BLOCK), before);
        let (bytes, bad) = stack.try_read(inode, 0, 12 * BLOCK);
        assert_eq!(ranges(&bad), expected);
        for (index, (found, right)) in bytes.iter().zip(&content).enumerate() {
            let index = index as u64;
            assert!(found == right || expected.iter().any(|(from, to)| (*from..*to).contains(&index)), "byte {index}");
        }
        stack.check_space(&[(inode, &[])]);
    }
}

#[test]
fn copygc_keeps_a_damaged_frame_damaged() {
    for checksum in [ChecksumKind::None, ChecksumKind::Crc32c] {
        for refuses in [true, false] {
            if checksum == ChecksumKind::None && !refuses {
                continue;
            }
            let stack = Stack::new(options(lz4(), checksum), 1);
            let inode = stack.create(9);
            let mut content = text(60_000, 1);
            stack.write(inode, &content, 0, 60_000);
            // A hole in the middle of the frame: two parts of it live on.
            content[8192..32768].fill(0);
            stack.data.punch(inode, 8192, 32768, &|_| {}).unwrap();
            let first = place(&stack, inode, 0);
            if refuses {
                stack.device.make_bad(first, 512);
            } else {
                stack.device.flip_bit(first + 100, 2);
            }
            for bucket in stack.data_buckets() {
                stack.data.evacuate(DeviceIndex(0), bucket).unwrap();
            }
            assert_ne!(place(&stack, inode, 0), first);
            let (_, bad) = stack.try_read(inode, 0, 15 * BLOCK);
            let covered: u64 = bad.iter().map(|bad| bad.end - bad.start).sum();
            assert_eq!(covered, 15 * BLOCK - (32768 - 8192));
            stack.check_space(&[(inode, &[])]);
        }
    }
}

/// An extent that points off the device, or into other files by its lengths, is damage, not a panic or somebody's bytes.
#[test]
fn a_damaged_extent_is_an_error() {
    let stack = Stack::new(plain(), 1);
    let inode = stack.create(9);
    let content = noise(4 * BLOCK as usize, 1);
    stack.write(inode, &content, 0, content.len() as u64);
    let extent = extent_at(&stack, inode, 0);
    let position = Position::new(9, extent.end, u32::MAX);
    let original = extent.value.encode();
    for (at, byte) in [(0, 9), (3, 0), (3, 5), (4, 1), (7, 0xFF), (17, 0xFF), (16, 0x80), (8, 3)] {
        let mut value = original.clone();
        value[at] = byte;
        let forest = stack.transactions.forest();
        forest.replay_put(BtreeId::Extents, position, Some(value.into()), JournalSequence(1)).unwrap();
        let (_, bad) = stack.try_read(inode, 0, 4 * BLOCK);
        assert_eq!(bad.first().map(|bad| bad.start), Some(0), "byte {at} = {byte:#x}");
    }
}
