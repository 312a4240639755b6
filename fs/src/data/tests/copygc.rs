//! Copygc under load: a small device that is overwritten many times its size, and readers beside it.

use super::*;
use crate::sync::atomic::{AtomicBool, Ordering};

struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// Random overwrites of a file that takes most of the device: without copygc it would end in no free bucket.
fn overwrite_for_long(options: DataOptions, fill_percent: u64, overwrites: u64, compressible: bool) {
    let mut stack = Stack::new(options, 5);
    let inode = stack.create(9);
    let available = stack.space.usage().available_bytes;
    let blocks = available * fill_percent / 100 / BLOCK;
    // What compresses does so to three quarters or less, so the device is as full as it says before the first frame is cut.
    let make = |length: usize, seed| {
        let mut bytes = noise(length, seed);
        if compressible {
            bytes.chunks_mut(BLOCK as usize).for_each(|block| block.iter_mut().take(1200).for_each(|byte| *byte = 7));
        }
        bytes
    };
    let mut content = make((blocks * BLOCK) as usize, 0);
    let size = content.len() as u64;
    for start in (0..size).step_by(1 << 20) {
        stack.write_runs(inode, &content, &[(start, size.min(start + (1 << 20)))]);
    }
    let mut random = Random(77);
    for round in 0..overwrites {
        let (start, length) = (random.below(blocks) * BLOCK, (1 + random.below(3)) * BLOCK);
        let end = size.min(start + length);
        let bytes = make((end - start) as usize, round + 1);
        content[start as usize..end as usize].copy_from_slice(&bytes);
        stack.write_runs(inode, &content, &[(start, end)]);
    }
    assert!(stack.metrics.copygc_buckets.get() > 0, "copygc had nothing to do: {:?}", stack.space.usage());
    stack.check(&[(inode, &content)]);
    stack = stack.recovered();
    stack.check(&[(inode, &content)]);
    // And all of it comes back.
    stack.data.truncate(inode, 0, &|_| {}).unwrap();
    assert_eq!(stack.space.usage().data_bytes, 0);
}

#[test]
fn a_full_device_is_overwritten_for_long() {
    overwrite_for_long(plain(), 80, 6000, false);
}

#[test]
fn a_full_device_of_frames_is_overwritten_for_long() {
    overwrite_for_long(options(lz4(), ChecksumKind::Crc32c), 75, 2500, true);
}

#[test]
fn parts_of_frames_are_moved_alone() {
    let stack = Stack::new(options(zstd(), ChecksumKind::Crc32c), 3);
    let inode = stack.create(9);
    let mut content = Vec::new();
    for block in 0..64_u64 {
        content.extend(noise(1500, block));
        content.resize((block as usize + 1) * BLOCK as usize, 0);
    }
    let size = content.len() as u64;
    stack.write(inode, &content, 0, size);
    // One block in eight stays of each frame.
    for start in (0..size).step_by(8 * BLOCK as usize) {
        let (from, to) = (start + BLOCK, start + 8 * BLOCK);
        content[from as usize..to as usize].fill(0);
        stack.data.punch(inode, from, to, &|_| {}).unwrap();
    }
    let before = stack.stored(inode).allocated_bytes;
    for _ in 0..2 {
        for bucket in stack.data_buckets() {
            stack.data.evacuate(DeviceIndex(0), bucket).unwrap();
        }
        stack.check(&[(inode, &content)]);
        assert!(stack.stored(inode).allocated_bytes <= before);
    }
    let raw = |extent: &extents::Extent| matches!(&extent.value, ExtentValue::Data(data) if data.compression == CompressionKind::None);
    assert!(stack.extents_of(inode).iter().all(raw), "a single block is stored raw");
}

/// Readers, writers and copygc at once, in real threads, without checksums: only the references keep readers from buckets that
/// were given to others. Each block says whose it is.
#[test]
fn readers_never_see_another_files_blocks() {
    let options = options(Compression::NONE, ChecksumKind::None);
    let stack = Stack::with(options, Env::real(), 24 << 20);
    let blocks = 300_u64;
    let block_of = |inode: u64, index: u64, version: u64| {
        let mut block = vec![0_u8; BLOCK as usize];
        for word in block.chunks_exact_mut(24) {
            word[..8].copy_from_slice(&inode.to_le_bytes());
            word[8..16].copy_from_slice(&index.to_le_bytes());
            word[16..].copy_from_slice(&version.to_le_bytes());
        }
        block
    };
    let inodes = [stack.create(21), stack.create(22)];
    for inode in inodes {
        let content: Vec<u8> = (0..blocks).flat_map(|index| block_of(inode.0, index, 0)).collect();
        stack.write_runs(inode, &content, &[(0, blocks * BLOCK)]);
    }
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (stack, done) = (&stack, &done);
        for inode in inodes {
            scope.spawn(move || {
                let mut random = Random(inode.0);
                for version in 1..1500 {
                    let index = random.below(blocks);
                    let block = block_of(inode.0, index, version);
                    let run = WriteRun { offset: index * BLOCK, data: vec![&block] };
                    let commit = WriteCommit { size_limit: &|| blocks * BLOCK, update_inode: &|_| {} };
                    stack.data.write(inode, &[run], stack.space.reserve(BLOCK).unwrap(), commit).unwrap();
                }
                done.store(true, Ordering::Relaxed);
            });
        }
        scope.spawn(move || {
            let mut random = Random(5);
            while !done.load(Ordering::Relaxed) {
                let buckets = stack.data_buckets();
                let bucket = buckets[random.below(buckets.len() as u64) as usize];
                stack.data.evacuate(DeviceIndex(0), bucket).unwrap();
            }
        });
        scope.spawn(move || {
            let mut random = Random(6);
            while !done.load(Ordering::Relaxed) {
                let inode = inodes[random.below(2) as usize];
                let first = random.below(blocks - 20);
                let bytes = stack.read(inode, first * BLOCK, (first + 20) * BLOCK);
                for (block, index) in bytes.chunks(BLOCK as usize).zip(first..) {
                    let version = u64::from_le_bytes(block[16..24].try_into().unwrap());
                    assert!(block == block_of(inode.0, index, version), "block {index} of inode {inode} is not whole");
                }
            }
        });
    });
    stack.check_space(&[(inodes[0], &[]), (inodes[1], &[])]);
    assert!(stack.metrics.buckets_emptied.get() > 10);
}
