//! Writeback beside appends and truncations, on real threads: what the tree says of a file is what was written back, and reads never see the
//! zeros that a truncation leaves for a moment.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;

use super::*;
use crate::data::ReadPiece;
use crate::pagecache::collect_dirty_with;

fn real() -> Mount {
    let options = OpenOptions { writeback_age: std::time::Duration::from_millis(5), ..OpenOptions::default() };
    Mount::with(Env::real(), 96 << 20, options)
}

/// Says that it is over when it is dropped, also by a panic: so one thread's failure ends the others.
struct Ending<'a>(&'a AtomicBool);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Mount {
    fn stored_size(&self, node: u64) -> u64 {
        let filesystem = self.filesystem.as_ref().unwrap();
        let mut transaction = filesystem.transactions().read();
        filesystem.namespace().inode(&mut transaction, InodeNumber(node)).unwrap().unwrap().size
    }

    /// The file as the tree has it: what a crash at this moment would leave.
    fn stored_bytes(&self, node: u64) -> Vec<u8> {
        let size = self.stored_size(node) as usize;
        let mut bytes = vec![0; size.next_multiple_of(4096)];
        let mut outcome = Ok(());
        let mut pieces = [ReadPiece { offset: 0, buffer: &mut bytes }];
        let data = self.filesystem.as_ref().unwrap().data();
        data.read(InodeNumber(node), &mut pieces, &mut |_, result| outcome = result);
        outcome.unwrap();
        bytes.truncate(size);
        bytes
    }
}

/// Who does not get the turn to write a file back must not take it from whoever has it: two passes over one file would run at once.
#[test]
fn a_turn_is_one_at_a_time() {
    let mount = Mount::simulated(1);
    let file = mount.create(ROOT, "f");
    let inode = mount.vfs().inode(file.0).unwrap();
    let turn = inode.try_writeback_turn();
    assert!(turn.is_some());
    for _ in 0..3 {
        assert!(inode.try_writeback_turn().is_none());
    }
    drop(turn);
    assert!(inode.try_writeback_turn().is_some());
}

/// Two ways to lengthen a file over zeros that nobody wrote: an older version of a block is on its way to disk, an append to it raises the size,
/// and the commit takes that size; or the blocks behind one that is dirty again are committed without it.
#[test]
fn the_stored_size_never_covers_what_was_not_written_back() {
    let mount = real();
    let file = mount.create(ROOT, "log");
    let is_done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _ending = Ending(&is_done);
        scope.spawn(|| {
            let _ending = Ending(&is_done);
            for index in 0..800_u64 {
                // Seldom a whole block, so that most blocks are written back more than once.
                mount.write(file, index * 700, &[index as u8 | 1; 700]).unwrap();
                if is_done.load(Ordering::Relaxed) {
                    break;
                }
            }
        });
        scope.spawn(|| {
            let _ending = Ending(&is_done);
            while !is_done.load(Ordering::Relaxed) {
                mount.vfs().fsync(&USER, file.0, file.1, true).unwrap();
            }
        });
        while !is_done.load(Ordering::Relaxed) {
            let bytes = mount.stored_bytes(file.0);
            for (index, bytes) in (0_u64..).zip(bytes.chunks(700)) {
                let wrong = bytes.iter().position(|&byte| byte != index as u8 | 1);
                assert_eq!(wrong, None, "of record {index}, which the stored size covers");
            }
        }
    });
}

/// A commit of writeback that was collected before a truncation, and comes after it, must not bring the old size back.
#[test]
fn a_truncation_is_not_undone_by_writeback_under_way() {
    let mount = real();
    let file = mount.create(ROOT, "f");
    let is_done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let _ending = Ending(&is_done);
            while !is_done.load(Ordering::Relaxed) {
                mount.vfs().fsync(&USER, file.0, file.1, true).unwrap();
            }
        });
        let _ending = Ending(&is_done);
        for round in 0..150_u64 {
            if is_done.load(Ordering::Relaxed) {
                break;
            }
            // Now and then the last block alone is on its way.
            mount.write(file, 4096, &[1; 4096]).unwrap();
            if round % 2 == 0 {
                mount.vfs().fsync(&USER, file.0, file.1, true).unwrap();
            }
            mount.write(file, 0, &[2; 4096]).unwrap();
            let size = 100 + round;
            mount.truncate(file.0, size).unwrap();
            mount.vfs().fsync(&USER, file.0, file.1, true).unwrap();
            let stored = mount.stored_bytes(file.0);
            let wrong = stored.iter().position(|&byte| byte != 2);
            assert_eq!(
                (stored.len(), wrong),
                (size as usize, None),
                "round {round}: length, and place of a wrong byte"
            );
        }
    });
}

/// What is being written of the last block of a file is as long as the file was. A zeroed range that made it longer meanwhile made that commit invalid,
/// and fsync failed with EINVAL.
#[test]
fn a_zeroed_range_behind_the_end_waits_for_writeback_under_way() {
    const ZERO_RANGE: i32 = 16;
    let options = OpenOptions { writeback_age: Duration::from_secs(3600), ..OpenOptions::default() };
    let mount = Mount::with(Env::real(), 64 << 20, options);
    let (node, handle) = mount.create(ROOT, "f");
    mount.write((node, handle), 0, &[1; 6000]).unwrap();
    mount.vfs().fsync(&USER, node, handle, false).unwrap();
    mount.write((node, handle), 5000, &[2; 1000]).unwrap();
    let inode = mount.vfs().inode(node).unwrap();
    let file = inode.file.as_ref().unwrap();
    let turn = inode.try_writeback_turn().unwrap();
    let (runs, size) = collect_dirty_with(&file.pages, 0..8192, 1 << 20, || inode.size());
    let (sender, receiver) = mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            mount.vfs().fallocate(&USER, node, handle, 8192, 8192, ZERO_RANGE).unwrap();
            sender.send(()).unwrap();
        });
        let has_waited = receiver.recv_timeout(Duration::from_millis(200)).is_err();
        mount.vfs().write_runs(&inode, file, runs, size).unwrap();
        drop(turn);
        assert!(has_waited);
        receiver.recv_timeout(Duration::from_secs(60)).expect("it ends once that is committed");
    });
    let expected = [vec![1; 5000], vec![2; 1000], vec![0; 16_384 - 6000]].concat();
    assert!(mount.read((node, handle), 0, 20_000).unwrap() == expected);
    assert_eq!(mount.stored_bytes(node), expected);
}

/// A file that is cut and appended to at once never holds zeros: not the zeroed rest of the block that it was cut in, and not the hole that was
/// there between the two.
#[test]
fn a_read_beside_truncate_and_append_sees_no_zeros() {
    let mount = real();
    let file = mount.create(ROOT, "f");
    mount.write(file, 0, &[1; 12_288]).unwrap();
    let is_done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for thread in 0..2_u64 {
            let (mount, is_done) = (&mount, &is_done);
            scope.spawn(move || {
                let _ending = Ending(is_done);
                let mut round = 0;
                while !is_done.load(Ordering::Relaxed) {
                    let offset = (round + thread) % 3 * 4096;
                    let bytes = mount.read(file, offset, 8192).unwrap();
                    let zeros = bytes.iter().filter(|&&byte| byte == 0).count();
                    assert_eq!(zeros, 0, "zeros among {} bytes at {offset}", bytes.len());
                    round += 1;
                    if round % 64 == 0 {
                        mount.filesystem.as_ref().unwrap().cache().evict_all_clean();
                    }
                }
            });
        }
        let _ending = Ending(&is_done);
        for round in 0..400_u64 {
            if is_done.load(Ordering::Relaxed) {
                break;
            }
            let size = [0, 100, 4096, 5000, 8192][(round % 5) as usize];
            mount.truncate(file.0, size).unwrap();
            mount.write(file, size, &vec![round as u8 | 1; (12_288 - size) as usize]).unwrap();
            if round % 16 == 0 {
                mount.vfs().fsync(&USER, file.0, file.1, true).unwrap();
            }
        }
    });
}
