//! Splice into real pipes, and copies between filesystems: both go through the collecting sink.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use rustix::pipe::{PipeFlags, pipe, pipe_with};

use super::super::splice;
use super::*;
use crate::sync::lock_count;

const BLOCK: u64 = 4096;

fn real(size: u64) -> Mount {
    let options = OpenOptions { writeback_age: Duration::from_millis(50), ..OpenOptions::default() };
    Mount::with(Env::real(), size, options)
}

/// A block that says whose it is: file, block, generation.
fn stamp(file: u64, block: u64, generation: u64) -> Vec<u8> {
    [file, block, generation, !file].map(u64::to_le_bytes).concat().repeat(128)
}

fn stamped(file: u64, blocks: std::ops::Range<u64>, generation: u64) -> Vec<u8> {
    blocks.flat_map(|block| stamp(file, block, generation)).collect()
}

impl Mount {
    fn splice(&self, (node, handle): (u64, u64), offset: u64, length: u64, pipe: &OwnedFd) -> Result<u64> {
        self.vfs().splice_read(&USER, node, handle, offset, length, pipe.as_fd())
    }

    fn splice_all(&self, file: (u64, u64), offset: u64, length: u64) -> (Vec<u8>, Result<u64>) {
        let (read, write) = pipe().unwrap();
        std::thread::scope(|scope| {
            let reader = scope.spawn(move || {
                let mut found = Vec::new();
                File::from(read).read_to_end(&mut found).unwrap();
                found
            });
            let outcome = self.splice(file, offset, length, &write);
            drop(write);
            (reader.join().unwrap(), outcome)
        })
    }

    fn drop_clean(&self) {
        self.filesystem.as_ref().unwrap().cache().evict_all_clean();
    }
}

#[test]
fn a_pipe_gets_what_a_read_would_get() {
    let mount = real(48 << 20);
    let file = mount.create(ROOT, "f");
    let mut content = stamped(1, 0..700, 1);
    content.extend_from_slice(b"tail");
    mount.write(file, 0, &content).unwrap();
    mount.write(file, 6 << 20, b"behind a hole").unwrap();
    content.resize(6 << 20, 0);
    content.extend_from_slice(b"behind a hole");
    let size = content.len() as u64;
    for is_cold in [false, true] {
        if is_cold {
            mount.vfs().fsync(&USER, file.0, file.1, false).unwrap();
            mount.drop_clean();
        }
        for (offset, length) in
            [(0, size), (0, u64::MAX), (1, 5000), (700 * BLOCK - 3, 1 << 20), (size - 20, 100), (4095, 2)]
        {
            let end = size.min(offset.saturating_add(length));
            let (found, outcome) = mount.splice_all(file, offset, length);
            assert_eq!(outcome.unwrap(), end - offset, "at {offset}");
            assert!(found == content[offset as usize..end as usize], "at {offset}, {length} bytes");
        }
    }
    for (offset, length) in [(0, 0), (size, 10), (u64::MAX, 10)] {
        let (found, outcome) = mount.splice_all(file, offset, length);
        assert_eq!((found.len(), outcome.unwrap()), (0, 0));
    }
    assert!(mount.vfs().metrics().pagecache_splice_references.get() > 0);
}

#[test]
fn a_hole_that_is_not_cached_takes_no_memory() {
    let mount = real(48 << 20);
    let file = mount.create(ROOT, "f");
    mount.truncate(file.0, 8 << 20).unwrap();
    let cache = mount.filesystem.as_ref().unwrap().cache();
    let used = cache.used_bytes();
    let (found, outcome) = mount.splice_all(file, 0, 8 << 20);
    assert_eq!(outcome.unwrap(), 8 << 20);
    assert!(found.len() == 8 << 20 && found.iter().all(|&byte| byte == 0));
    assert_eq!(cache.used_bytes(), used);
}

#[test]
fn a_pipe_that_cannot_take_it_says_so() {
    let mount = real(48 << 20);
    let file = mount.create(ROOT, "f");
    let content = stamped(1, 0..256, 1);
    mount.write(file, 0, &content).unwrap();
    let (read, write) = pipe_with(PipeFlags::NONBLOCK).unwrap();
    assert_eq!(errno(mount.splice(file, 0, 10, &read)), Errno::BADF, "the wrong end");
    let plain: OwnedFd = tempfile::tempfile().unwrap().into();
    assert_eq!(errno(mount.splice(file, 0, 10, &plain)), Errno::INVAL, "no pipe");
    assert_eq!(errno(mount.vfs().splice_read(&USER, ROOT, file.1, 0, 10, write.as_fd())), Errno::BADF);
    let mut found = vec![0; content.len()];
    let mut at = 0;
    // A full pipe takes a part, then nothing; whoever reads makes room.
    while at < content.len() {
        let fed = mount.splice(file, at as u64, u64::MAX, &write).unwrap() as usize;
        assert!(fed > 0);
        if at + fed < content.len() {
            assert_eq!(errno(mount.splice(file, (at + fed) as u64, u64::MAX, &write)), Errno::AGAIN);
        }
        File::from(read.try_clone().unwrap()).read_exact(&mut found[at..at + fed]).unwrap();
        at += fed;
    }
    assert!(found == content);
    drop(read);
    assert_eq!(errno(mount.splice(file, 0, 10, &write)), Errno::PIPE);
    assert_eq!(errno(mount.splice(file, 0, 1 << 20, &write)), Errno::PIPE);
}

#[test]
fn the_bytes_before_a_bad_block_and_then_its_error() {
    let mount = real(48 << 20);
    let file = mount.create(ROOT, "f");
    mount.write(file, 0, &stamped(1, 0..300, 1)).unwrap();
    mount.vfs().fsync(&USER, file.0, file.1, false).unwrap();
    mount.drop_clean();
    let bad = stamp(1, 77, 1);
    let mut block = vec![0; 4096];
    for at in (0..mount.device.size_bytes()).step_by(4096) {
        mount.device.read(at, &mut block).unwrap();
        if block == bad {
            mount.device.write(at + 512, &[7; 512]).unwrap();
        }
    }
    let (found, outcome) = mount.splice_all(file, 0, u64::MAX);
    assert_eq!(outcome.unwrap(), 77 * BLOCK);
    assert!(found == stamped(1, 0..77, 1));
    let (found, outcome) = mount.splice_all(file, 77 * BLOCK, u64::MAX);
    assert_eq!((found.len(), errno(outcome)), (0, Errno::IO));
    let (found, outcome) = mount.splice_all(file, 78 * BLOCK, u64::MAX);
    assert_eq!(outcome.unwrap(), 222 * BLOCK);
    assert!(found == stamped(1, 78..300, 1));
}

#[test]
fn feeding_takes_no_lock() {
    let mount = real(48 << 20);
    let file = mount.create(ROOT, "f");
    mount.write(file, 0, &stamped(1, 0..16, 1)).unwrap();
    let handle = mount.vfs().handles.get(file.1).unwrap();
    let collected = mount.vfs().collect(&handle, 0, 16 * BLOCK).unwrap();
    let (_read, write) = pipe().unwrap();
    let pipe = crate::memory::Pipe::new(write.as_fd()).unwrap();
    let before = lock_count();
    let (fed, error) = splice::feed(&pipe, &collected.pages);
    assert_eq!(lock_count(), before);
    assert!(fed == 16 * BLOCK && error.is_none());
}

/// Waits for something that another thread does.
fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < deadline, "timed out: {what}");
        std::thread::yield_now();
    }
}

/// One of the things that make what was collected stale, or want its memory or its blocks.
fn disturb(mount: &Mount, file: (u64, u64), round: u64, step: u64) {
    let generation = round * 100 + step;
    let at = step * 61 % 400;
    match step % 5 {
        0 => drop(mount.write(file, at * BLOCK, &stamped(1, at..at + 70, generation)).unwrap()),
        1 => mount.vfs().fallocate(&USER, file.0, file.1, at * BLOCK, 64 * BLOCK, 3).unwrap(),
        2 => {
            mount.truncate(file.0, at * BLOCK).unwrap();
            mount.write(file, at * BLOCK, &stamped(1, at..512, generation)).unwrap();
        }
        3 => mount.vfs().fsync(&USER, file.0, file.1, true).unwrap(),
        _ => {
            mount.drop_clean();
            // Others take the blocks and the memory that became free.
            let other = mount.create(ROOT, "other");
            mount.write(other, 0, &stamped(2 + generation, 0..600, 1)).unwrap();
            mount.vfs().fsync(&USER, other.0, other.1, true).unwrap();
            mount.drop_clean();
            let (found, outcome) = mount.splice_all(other, 0, u64::MAX);
            assert!(outcome.unwrap() == 600 * BLOCK && found == stamped(2 + generation, 0..600, 1));
            mount.vfs().unlink(&USER, ROOT, OsStr::new("other")).unwrap();
            mount.vfs().release(other.0, other.1).unwrap();
            mount.vfs().forget(other.0, 1);
        }
    }
}

/// If the memory of what a pipe refers to were used again, or written in place, the reader would see another file's stamps, or torn blocks.
#[test]
fn a_full_pipe_and_a_slow_reader_see_only_the_files_own_bytes() {
    let mount = real(64 << 20);
    let file = mount.create(ROOT, "f");
    for round in 1..=4_u64 {
        mount.write(file, 0, &stamped(1, 0..512, round * 100)).unwrap();
        if round % 2 == 0 {
            mount.vfs().fsync(&USER, file.0, file.1, true).unwrap();
            mount.drop_clean();
        }
        let (read, write) = pipe().unwrap();
        let mut found = Vec::new();
        std::thread::scope(|scope| {
            let mount = &mount;
            let splicer = scope.spawn(move || mount.splice(file, 0, 512 * BLOCK, &write));
            wait_until("the pipe is full", || rustix::io::ioctl_fionread(&read).unwrap() >= 16 * BLOCK);
            // The splicer waits for us, and all of these make progress: it holds nothing.
            (0..5).for_each(|step| disturb(mount, file, round, step));
            assert!(!splicer.is_finished());
            let mut reader = File::from(read);
            let mut piece = vec![0; 50_000];
            for step in 5.. {
                let count = reader.read(&mut piece).unwrap();
                if count == 0 {
                    break;
                }
                found.extend_from_slice(&piece[..count]);
                if step < 30 {
                    disturb(mount, file, round, step);
                }
            }
            // The size may be less for a moment: then the splice ends there.
            assert_eq!(splicer.join().unwrap().unwrap(), found.len() as u64);
        });
        assert!(found.len() as u64 >= 256 * BLOCK, "{}", found.len());
        for (number, block) in (0_u64..).zip(found.chunks(4096)) {
            let generation = u64::from_le_bytes(block[16..24].try_into().unwrap());
            let is_old_or_new = generation / 100 == round && *block == stamp(1, number, generation);
            assert!(
                is_old_or_new || block.iter().all(|&byte| byte == 0),
                "round {round}, block {number}: {:?}",
                &block[..32]
            );
        }
    }
}

#[test]
fn a_copy_between_two_filesystems_keeps_bytes_and_holes() {
    let (source, target) = (real(48 << 20), real(64 << 20));
    let from = source.create(ROOT, "from");
    let mut content = vec![0; (20 << 20) + 77];
    for (at, blocks) in [(1 << 20, 300), ((9 << 20) + 4096, 1), (15 << 20, 256)] {
        let data = stamped(at as u64, 0..blocks, 1);
        source.write(from, at as u64, &data).unwrap();
        content[at..at + data.len()].copy_from_slice(&data);
        // One island is on disk and not cached, one is cached, one is dirty.
        if at == 1 << 20 {
            source.vfs().fsync(&USER, from.0, from.1, false).unwrap();
            source.drop_clean();
        }
    }
    source.truncate(from.0, content.len() as u64).unwrap();
    let to = target.create(ROOT, "to");
    // What the target holds where the source has a hole goes away.
    target.write(to, 0, &vec![9; 12 << 20]).unwrap();
    let request = CopyRequest {
        source_node: from.0,
        source_handle: from.1,
        source_offset: 0,
        target_node: to.0,
        target_handle: to.1,
        target_offset: 0,
        length_bytes: u64::MAX >> 1,
    };
    assert_eq!(source.vfs().copy_to(&USER, target.vfs(), &request).unwrap(), content.len() as u64);
    let read = |mount: &Mount, file: (u64, u64), length: usize| {
        let pieces = (0..length).step_by(1 << 20);
        pieces.flat_map(|at| mount.read(file, at as u64, 1 << 20).unwrap()).collect::<Vec<u8>>()
    };
    assert!(read(&target, to, content.len()) == content);
    target.vfs().fsync(&USER, to.0, to.1, false).unwrap();
    let allocated = target.attributes(to.0).blocks_of_512 * 512;
    assert_eq!(allocated, 557 * BLOCK, "the holes are holes");
    assert_eq!(target.attributes(to.0).size_bytes, content.len() as u64);

    // A part, to an offset that is not on a block's edge.
    let part = CopyRequest { source_offset: (1 << 20) - 10, target_offset: 5, length_bytes: 100_000, ..request };
    assert_eq!(source.vfs().copy_to(&USER, target.vfs(), &part).unwrap(), 100_000);
    let begin = (1 << 20) - 10;
    content.copy_within(begin..begin + 100_000, 5);
    assert!(read(&target, to, content.len()) == content);
}
