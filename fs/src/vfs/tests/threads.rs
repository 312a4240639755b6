//! Many threads over real time: nothing deadlocks, nothing is lost, counts stay right.

use std::sync::atomic::{AtomicU64, Ordering};

use super::*;

fn real() -> Mount {
    Mount::with(
        Env::real(),
        96 << 20,
        OpenOptions { writeback_age: Duration::from_millis(50), ..OpenOptions::default() },
    )
}

#[test]
fn threads_change_one_directory_at_once() {
    let mut mount = real();
    let other = mount.mkdir(ROOT, "other");
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let mount = &mount;
            scope.spawn(move || {
                for index in 0..60 {
                    let name = format!("t{thread}-{index}");
                    let file = mount.create(ROOT, &name);
                    mount.write(file, 0, name.as_bytes()).unwrap();
                    // Back and forth between two directories, in both orders of locking.
                    mount.vfs().rename(&USER, ROOT, OsStr::new(&name), other, OsStr::new(&name), 0).unwrap();
                    if index % 3 == 0 {
                        mount.vfs().rename(&USER, other, OsStr::new(&name), ROOT, OsStr::new("contended"), 0).unwrap();
                    }
                    if index % 5 == 0 {
                        mount.vfs().fsync(&USER, file.0, file.1, false).unwrap();
                    }
                    if index % 7 == 0 {
                        let _ = mount.vfs().unlink(&USER, ROOT, OsStr::new("contended"));
                    }
                    mount.vfs().release(file.0, file.1).unwrap();
                    mount.vfs().forget(file.0, 1);
                }
            });
        }
    });
    let listed = mount.list(other);
    assert_eq!(listed.len() - 2, 4 * 40);
    for (name, node) in listed.iter().skip(2) {
        let handle = mount.open_file(*node);
        assert_eq!(mount.read((*node, handle), 0, 100).unwrap(), name.as_bytes());
    }
    mount.reopen();
    mount.vfs().wait_for_deletions().unwrap();
    assert_eq!(mount.list(other), listed);
    let contended = u64::from(mount.lookup(ROOT, "contended").is_some());
    let inodes = mount.filesystem.as_ref().unwrap().totals().get(crate::format::journal::AccountingCounter::Inodes);
    assert_eq!(u64::try_from(inodes).unwrap(), 2 + 160 + contended);
    assert_eq!(mount.attributes(ROOT).size_bytes, 1 + contended);
}

#[test]
fn writers_readers_and_truncation_of_one_file() {
    let mount = real();
    let file = mount.create(ROOT, "f");
    let rounds = AtomicU64::new(0);
    const LENGTH: u64 = 1 << 20;
    mount.write(file, 0, &vec![1; LENGTH as usize]).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..2_u64 {
            let (mount, rounds) = (&mount, &rounds);
            scope.spawn(move || {
                // Each writes whole blocks of one byte, its own or the start's.
                for round in 0..200_u64 {
                    let block = (round * 7 + thread * 13) % 256;
                    mount.write(file, block * 4096, &[thread as u8 + 2; 4096]).unwrap();
                    if round % 50 == 0 {
                        mount.vfs().fsync(&USER, file.0, file.1, true).unwrap();
                    }
                    rounds.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        scope.spawn(|| {
            for round in 0..40_u64 {
                if round % 3 == 0 {
                    mount.truncate(file.0, LENGTH / 2).unwrap();
                    mount.truncate(file.0, LENGTH).unwrap();
                } else {
                    mount.vfs().fallocate(&USER, file.0, file.1, (round % 64) * 8192, 12_288, 3).unwrap();
                }
            }
        });
        scope.spawn(|| {
            let mut round = 0;
            while rounds.load(Ordering::Relaxed) < 400 {
                let block = (round * 5) % 256;
                let read = mount.read(file, block * 4096, 4096).unwrap();
                // A block is whole: never torn, never anything that was not written.
                assert!(read.is_empty() || read.iter().all(|&byte| byte == read[0] && byte <= 3), "block {block}");
                if round % 64 == 0 {
                    mount.filesystem.as_ref().unwrap().cache().evict_all_clean();
                }
                round += 1;
            }
        });
    });
    mount.vfs().fsync(&USER, file.0, file.1, false).unwrap();
}

#[test]
fn appends_do_not_overlap() {
    let mut mount = real();
    let file = mount.create(ROOT, "log");
    std::thread::scope(|scope| {
        for thread in 0..4_u8 {
            let mount = &mount;
            scope.spawn(move || {
                for _ in 0..100 {
                    let data = [thread + 1; 700];
                    let request = WriteRequest { append: true, ..write_request(file.0, file.1, 0, &data) };
                    assert_eq!(mount.vfs().write(&USER, &request).unwrap(), 700);
                }
            });
        }
    });
    mount.reopen();
    let handle = mount.open_file(file.0);
    let all = mount.read((file.0, handle), 0, 1 << 20).unwrap();
    assert_eq!(all.len(), 4 * 100 * 700);
    let mut counts = [0; 5];
    for piece in all.chunks(700) {
        assert!(piece.iter().all(|&byte| byte == piece[0]));
        counts[usize::from(piece[0])] += 1;
    }
    assert_eq!(counts, [0, 100, 100, 100, 100]);
}

#[test]
fn more_data_than_memory_flows_through() {
    let mount = Mount::with(
        Env::real(),
        128 << 20,
        OpenOptions { writeback_age: Duration::from_millis(50), ..OpenOptions::default() },
    );
    let file = mount.create(ROOT, "big");
    let piece: Vec<u8> = (0..1 << 20).map(|index: u32| (index / 4096) as u8).collect();
    for index in 0..50_u64 {
        assert_eq!(mount.write(file, index << 20, &piece).unwrap(), 1 << 20);
    }
    for index in (0..50_u64).rev() {
        assert!(mount.read(file, index << 20, 1 << 20).unwrap() == piece, "piece {index}");
    }
    assert!(mount.filesystem.as_ref().unwrap().cache().peak_bytes() <= 24 << 20);
}

#[test]
fn a_warm_read_takes_no_lock() {
    let mount = real();
    let file = mount.create(ROOT, "f");
    mount.write(file, 0, &vec![3; 1 << 20]).unwrap();
    mount.vfs().sync().unwrap();
    for _ in 0..2 {
        mount.read(file, 0, 1 << 20).unwrap();
    }
    let before = crate::sync::lock_count();
    let request = ReadRequest { node: file.0, handle: file.1, offset: 0, length_bytes: 1 << 20, direct: false };
    let batch = mount.vfs().read(&USER, &request).unwrap();
    assert_eq!(crate::sync::lock_count() - before, 0);
    assert_eq!((batch.len(), batch.reference_count()), (1 << 20, 1));
}
