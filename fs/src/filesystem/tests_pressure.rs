//! Threads against a small journal and few dirty nodes: checkpoints, claims, journal and commits must never wait for each other.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::format::test_geometry;
use super::*;
use crate::btree::{NodeReader, walk_published};
use crate::device::MemDevice;
use crate::vfs::{Caller, Lookup};

const ROOT: u64 = 1;
const O_RDWR: i32 = 2;
const CALLER: Caller = Caller { uid: 0, gid: 0, pid: 1, umask: 0 };

/// Creates, renames, links and removes names in a directory of its own until `end`. Returns the names that are left.
fn churn(filesystem: &Filesystem, thread: u64, end: Instant, operations: &AtomicU64) -> (u64, BTreeSet<String>) {
    let vfs = filesystem.vfs();
    let directory =
        vfs.mkdir(&CALLER, ROOT, OsStr::new(&format!("directory {thread}")), 0o755).unwrap().attributes.node;
    let mut names = BTreeSet::new();
    let mut random = thread + 1;
    let mut below = move |limit: u64| {
        random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (random >> 33) % limit
    };
    while Instant::now() < end {
        let name = format!("a rather long name, so that leaves fill: {}", below(800));
        if names.contains(&name) {
            if below(2) == 0 {
                vfs.unlink(&CALLER, directory, OsStr::new(&name)).unwrap();
                names.remove(&name);
            } else {
                let new = format!("another long name of the same file: {}", below(800));
                vfs.rename(&CALLER, directory, OsStr::new(&name), directory, OsStr::new(&new), 0).unwrap();
                names.remove(&name);
                names.insert(new);
            }
        } else {
            let (entry, opened) = vfs.create(&CALLER, directory, OsStr::new(&name), 0o100_644, O_RDWR).unwrap();
            let node = entry.attributes.node;
            if below(20) == 0 {
                vfs.fsync(&CALLER, node, opened.handle, false).unwrap();
            }
            vfs.release(node, opened.handle).unwrap();
            vfs.forget(node, 1);
            names.insert(name);
        }
        operations.fetch_add(1, Ordering::Relaxed);
    }
    (directory, names)
}

#[test]
fn threads_and_checkpoints_make_progress_with_a_small_journal() {
    let env = Env::real();
    let device: Arc<dyn BlockDevice> = Arc::new(MemDevice::new(64 << 20));
    let superblock = Filesystem::format(&device, &test_geometry(), &env).unwrap();
    let options = OpenOptions { env: Some(Arc::clone(&env)), cache_bytes: 8 << 20, ..OpenOptions::default() };
    let filesystem = Filesystem::open(vec![Arc::clone(&device)], &options).unwrap();
    let operations = AtomicU64::new(0);
    let end = Instant::now() + Duration::from_secs(3);
    let left: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|thread| {
                scope.spawn({
                    let (filesystem, operations) = (&filesystem, &operations);
                    move || churn(filesystem, thread, end, operations)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let counted = |name: &str| {
        filesystem.metrics().snapshot().iter().find(|(found, _)| *found == name).map_or(0, |(_, value)| *value)
    };
    println!(
        "{} operations, {} commits, {} checkpoints (longest {} us), {} waits for checkpoints, {} reservations blocked, longest wait for a lock {} us",
        operations.load(Ordering::Relaxed),
        counted("transaction.commits"),
        counted("checkpoint.count"),
        counted("checkpoint.duration_max_us"),
        counted("transaction.checkpoint_waits"),
        counted("journal.reservations_blocked"),
        counted("transaction.lock_wait_max_us"),
    );
    assert!(operations.load(Ordering::Relaxed) > 200);
    assert!(counted("checkpoint.count") > 2);
    filesystem.close().unwrap();
    drop(filesystem);

    let reader = NodeReader::new(Arc::new(superblock.clone()), vec![Arc::clone(&device)], Arc::default());
    let opening = reader.choose_checkpoint().unwrap();
    assert!(opening.newest.clean);
    let mut reached = BTreeSet::new();
    walk_published(&reader, &opening.newest, &mut |node| {
        for (address, outcome) in &node.copies {
            assert!(outcome.is_ok(), "{outcome:?}");
            assert!(reached.insert(address.offset));
        }
        Ok(())
    })
    .unwrap();
    let (bucket_bytes, node_bytes) =
        (u64::from(superblock.geometry.bucket_bytes), u64::from(superblock.geometry.node_bytes));
    let mut mapped = BTreeSet::new();
    for entry in reader.read_map(&opening.newest).unwrap().into_iter().flatten() {
        let used = (0..64).filter(|slot| entry.used & 1 << slot != 0);
        mapped.extend(used.map(|slot| entry.bucket * bucket_bytes + slot * node_bytes));
    }
    assert_eq!(reached, mapped);

    let filesystem = Filesystem::open(vec![device], &options).unwrap();
    assert_eq!(filesystem.replayed().keys, 0);
    for (directory, names) in left {
        for name in names {
            let found = filesystem.vfs().lookup(&CALLER, directory, OsStr::new(&name)).unwrap();
            assert!(matches!(found, Lookup::Found(_)), "{name} is gone");
        }
    }
    filesystem.close().unwrap();
}
