//! Small images that are filled to the last byte, emptied and filled again, by several threads: nothing may hang, nothing may be refused that
//! `df` offers, and what was deleted must come back.

use std::ffi::OsStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Weak};
use std::time::Duration;

use super::format::test_geometry;
use super::*;
use crate::device::MemDevice;
use crate::error::Error;
use crate::format::superblock::Geometry;
use crate::sync::Mutex;
use crate::vfs::{Caller, Vfs, WriteRequest};

const ROOT: u64 = 1;
const O_RDWR: i32 = 2;
const CALLER: Caller = Caller { uid: 0, gid: 0, pid: 1, umask: 0 };
const MIB: u64 = 1 << 20;

/// What the watchdog looks at.
#[derive(Default)]
struct Watched {
    progress: AtomicU64,
    filesystem: Mutex<Weak<Filesystem>>,
}

impl Watched {
    fn tick(&self) {
        self.progress.fetch_add(1, Ordering::Relaxed);
    }

    fn open(&self, device: &Arc<dyn BlockDevice>, cache_bytes: u64) -> Arc<Filesystem> {
        let options = OpenOptions { cache_bytes, ..OpenOptions::default() };
        let filesystem = Filesystem::open(vec![Arc::clone(device)], &options).unwrap();
        *self.filesystem.lock() = Arc::downgrade(&filesystem);
        filesystem
    }

    /// What is known of a filesystem that hangs.
    fn report(&self) {
        let Some(filesystem) = self.filesystem.lock().upgrade() else { return };
        println!("{:#?}\n{:?}\nlatched: {:?}", filesystem.usage(), filesystem.space(), filesystem.latched());
        println!(
            "journal {} permille full, {} dirty bytes",
            filesystem.journal().fill_permille(),
            filesystem.forest().dirty_bytes()
        );
        println!("{:?}", filesystem.metrics().snapshot());
        println!("{:?}", filesystem.space().allocator_for_tests());
    }
}

/// Runs `body` on a thread of its own. Fails when nothing has moved for a while: a hang costs that, not the whole run.
fn with_watchdog(body: impl FnOnce(&Watched) + Send + 'static) {
    const QUIET_SECONDS_MAX: u32 = 60;
    let watched = Arc::new(Watched::default());
    let (done, wait) = channel();
    let thread = std::thread::spawn({
        let watched = Arc::clone(&watched);
        move || {
            body(&watched);
            let _ = done.send(());
        }
    });
    let mut seen = 0;
    let mut quiet_seconds = 0;
    loop {
        match wait.recv_timeout(Duration::from_secs(1)) {
            Ok(()) | Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {}
        }
        let now = watched.progress.load(Ordering::Relaxed);
        quiet_seconds = if now == seen { quiet_seconds + 1 } else { 0 };
        seen = now;
        if quiet_seconds >= QUIET_SECONDS_MAX {
            watched.report();
            panic!("nothing has moved for {quiet_seconds} s, after {now} operations: the filesystem hangs");
        }
    }
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn rounds(usual: u64) -> u64 {
    std::env::var("COPPICE_FILL_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(usual)
}

/// A fill of one thread's directory, and what it came to.
#[derive(Debug, Default)]
struct Filled {
    names: Vec<String>,
    bytes: u64,
}

struct Filler<'a> {
    vfs: &'a Arc<Vfs>,
    watched: &'a Watched,
}

impl Filler<'_> {
    /// Appends to a new file until it has `bytes`, or there is no space. Returns how many were written, and whether all were.
    fn write_file(&self, directory: u64, name: &str, bytes: u64) -> (u64, bool) {
        let created = self.vfs.create(&CALLER, directory, OsStr::new(name), 0o100_644, O_RDWR);
        let (entry, opened) = match created {
            Ok(created) => created,
            Err(Error::NoSpace(_)) => return (0, false),
            Err(error) => panic!("create: {error}"),
        };
        let node = entry.attributes.node;
        let block = vec![name.len() as u8; 128 << 10];
        let mut written = 0;
        let mut fits = true;
        while written < bytes && fits {
            let length = (bytes - written).min(block.len() as u64) as usize;
            let request = WriteRequest::new(node, opened.handle, written, &block[..length]);
            match self.vfs.write(&CALLER, &request) {
                Ok(count) => written += u64::from(count),
                Err(Error::NoSpace(_)) => fits = false,
                Err(error) => panic!("write: {error}"),
            }
            self.watched.tick();
        }
        self.vfs.release(node, opened.handle).unwrap();
        self.vfs.forget(node, 1);
        (written, fits)
    }

    /// Makes files of `bytes_of(index)` bytes until there is no space.
    fn fill(&self, directory: u64, bytes_of: impl Fn(u64) -> u64) -> Filled {
        let mut filled = Filled::default();
        for index in 0.. {
            let name = format!("file {index}");
            let (bytes, fits) = self.write_file(directory, &name, bytes_of(index));
            filled.bytes += bytes;
            if bytes > 0 || fits {
                filled.names.push(name);
            }
            if !fits {
                break;
            }
        }
        filled
    }

    fn empty(&self, directory: u64) {
        for index in 0.. {
            // A file whose write was refused may be there too.
            match self.vfs.unlink(&CALLER, directory, OsStr::new(&format!("file {index}"))) {
                Ok(()) => {}
                Err(Error::Posix(rustix::io::Errno::NOENT)) => break,
                Err(error) => panic!("unlink: {error}"),
            }
            self.watched.tick();
        }
    }
}

fn counted(filesystem: &Filesystem, name: &str) -> u64 {
    filesystem.metrics().snapshot().iter().find(|(found, _)| *found == name).map_or(0, |(_, value)| *value)
}

/// Mixed sizes, so that fragments of buckets, many extents and many inodes all occur.
fn mixed_bytes(thread: u64, index: u64) -> u64 {
    let random = (thread * 1_000_003 + index).wrapping_mul(6_364_136_223_846_793_005) >> 33;
    match random % 8 {
        0..5 => 1 + random % (12 << 10),
        5..7 => 1 + random % (80 << 10),
        _ => 1 + random % (600 << 10),
    }
}

#[test]
fn a_small_image_is_filled_emptied_and_refilled_without_a_hang() {
    const THREADS: u64 = 4;
    with_watchdog(|watched| {
        let device: Arc<dyn BlockDevice> = Arc::new(MemDevice::new(32 * MIB));
        Filesystem::format(&device, &test_geometry(), &Env::real()).unwrap();
        let filesystem = watched.open(&device, 8 << 20);
        let vfs = filesystem.vfs();
        let filler = Filler { vfs, watched };
        let directories: Vec<u64> = (0..THREADS)
            .map(|thread| vfs.mkdir(&CALLER, ROOT, OsStr::new(&format!("{thread}")), 0o755).unwrap().attributes.node)
            .collect();
        for round in 0..rounds(4) {
            let before = filesystem.usage();
            let filled: Vec<Filled> = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..THREADS)
                    .zip(&directories)
                    .map(|(thread, &directory)| {
                        let filler = &filler;
                        scope.spawn(move || {
                            let filled = filler.fill(directory, |index| mixed_bytes(thread + 16 * round, index));
                            filler.empty(directory);
                            filled
                        })
                    })
                    .collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            let bytes: u64 = filled.iter().map(|filled| filled.bytes).sum();
            let files: usize = filled.iter().map(|filled| filled.names.len()).sum();
            println!(
                "round {round}: {} KiB available, {} KiB in {files} files written, {} checkpoints, {} reservations blocked",
                before.available_bytes >> 10,
                bytes >> 10,
                counted(&filesystem, "checkpoint.count"),
                counted(&filesystem, "journal.reservations_blocked"),
            );
            vfs.wait_for_deletions().unwrap();
            assert_eq!(filesystem.usage().data_bytes, 0);
        }
        assert_eq!(filesystem.latched(), None);
        filesystem.close().unwrap();
    });
}

/// What mkfs chooses for small devices.
fn usual_geometry() -> FormatOptions {
    let geometry = Geometry { block_bytes: 4096, bucket_bytes: 256 << 10, node_bytes: 32 << 10, metadata_replicas: 2 };
    FormatOptions { geometry, journal_bytes: 2 << 20, buckets_min: 512, ..test_geometry() }
}

fn formatted(size_bytes: u64) -> Arc<dyn BlockDevice> {
    let device: Arc<dyn BlockDevice> = Arc::new(MemDevice::new(size_bytes));
    Filesystem::format(&device, &usual_geometry(), &Env::real()).unwrap();
    device
}

/// Deletes what `filler` made, and takes checkpoints until `df` offers nearly as much as before. No remount. Returns how many it took.
fn comes_back(filesystem: &Filesystem, filler: &Filler<'_>, available: u64) -> u32 {
    filler.empty(ROOT);
    filesystem.vfs().wait_for_deletions().unwrap();
    assert_eq!(filesystem.usage().data_bytes, 0);
    // Each bucket that was ever used has keys: a few nodes, in two copies.
    let tolerance = 12 * 2 * u64::from(filesystem.superblock().geometry.node_bytes);
    for checkpoints in 0..40 {
        if filesystem.usage().available_bytes + tolerance >= available {
            return checkpoints;
        }
        filesystem.checkpoint().unwrap();
        filler.watched.tick();
    }
    panic!("df offered {available} bytes, now, with all deleted: {:#?}", filesystem.usage());
}

#[test]
fn what_is_deleted_just_before_an_unmount_is_there_after_the_mount() {
    with_watchdog(|watched| {
        let device = formatted(128 * MIB);
        let filesystem = watched.open(&device, 16 << 20);
        let available = filesystem.usage().available_bytes;
        let filler = Filler { vfs: filesystem.vfs(), watched };
        for index in 0..12_000 {
            filler.write_file(ROOT, &format!("file {index}"), 100);
        }
        filesystem.sync().unwrap();
        filler.empty(ROOT);
        filesystem.vfs().wait_for_deletions().unwrap();
        let nodes = filesystem.usage().node_bytes;
        filesystem.close().unwrap();
        let again = watched.open(&device, 16 << 20);
        let tolerance = 12 * 2 * u64::from(again.superblock().geometry.node_bytes);
        let usage = again.usage();
        assert!(usage.available_bytes + tolerance >= available, "{available} bytes, {nodes} of nodes; now {usage:#?}");
        again.close().unwrap();
    });
}

#[test]
fn what_df_offers_can_be_written_to_one_file_and_comes_back() {
    with_watchdog(|watched| {
        for size in [128 * MIB, 320 * MIB] {
            let filesystem = watched.open(&formatted(size), 16 << 20);
            let filler = Filler { vfs: filesystem.vfs(), watched };
            let available = filesystem.usage().available_bytes;
            assert!(available * 100 >= size * 84, "{} of {} MiB offered", available / MIB, size / MIB);
            for round in 0..2 {
                let offered = filesystem.usage().available_bytes;
                let (written, fits) = filler.write_file(ROOT, "file 0", u64::MAX);
                assert!(!fits && written >= offered, "round {round}: {offered} bytes offered, {written} written");
                filesystem.sync().unwrap();
                let checkpoints = comes_back(&filesystem, &filler, available);
                println!(
                    "{} MiB: {} MiB offered, {} MiB written, back after {checkpoints} checkpoints",
                    size / MIB,
                    offered / MIB,
                    written / MIB
                );
            }
            filesystem.close().unwrap();
        }
    });
}

#[test]
fn many_small_files_fill_the_device_until_df_offers_nothing() {
    with_watchdog(|watched| {
        for size in [128 * MIB, 192 * MIB] {
            let filesystem = watched.open(&formatted(size), 16 << 20);
            let filler = Filler { vfs: filesystem.vfs(), watched };
            let available = filesystem.usage().available_bytes;
            for round in 0..2 {
                let filled = filler.fill(ROOT, |_| 4096);
                let left = filesystem.usage().available_bytes;
                assert!(left < MIB, "round {round}: refused with {left} bytes offered");
                filesystem.sync().unwrap();
                assert!(filled.bytes * 100 >= available * 60, "round {round}: {} of {available} bytes", filled.bytes);
                let checkpoints = comes_back(&filesystem, &filler, available);
                println!(
                    "{} MiB: {} MiB in files of 4 KiB, back after {checkpoints} checkpoints",
                    size / MIB,
                    filled.bytes / MIB
                );
            }
            filesystem.close().unwrap();
        }
    });
}

/// A write into what fallocate holds needs nothing that others could take, however full the filesystem is and in whatever order it is written.
#[test]
fn what_fallocate_promised_can_be_written_on_a_full_filesystem() {
    const HELD: u64 = 24 * MIB;
    with_watchdog(|watched| {
        let filesystem = watched.open(&formatted(128 * MIB), 16 << 20);
        let vfs = filesystem.vfs();
        let filler = Filler { vfs, watched };
        let (entry, opened) = vfs.create(&CALLER, ROOT, OsStr::new("held"), 0o100_644, O_RDWR).unwrap();
        let (node, handle) = (entry.attributes.node, opened.handle);
        // Half of it inside the file, half behind its end.
        vfs.fallocate(&CALLER, node, handle, 0, HELD / 2, 0).unwrap();
        vfs.fallocate(&CALLER, node, handle, HELD / 2, HELD / 2, 1).unwrap();
        let directory = vfs.mkdir(&CALLER, ROOT, OsStr::new("small"), 0o755).unwrap().attributes.node;
        let large = filler.write_file(ROOT, "file 0", u64::MAX);
        assert!(!large.1);
        let small = filler.fill(directory, |_| 4096);
        println!("full with {} MiB and {} files", large.0 / MIB, small.names.len());
        let write = |offset: u64, length: usize, append: bool| {
            let data = vec![(offset >> 12) as u8 | 1; length];
            let request = WriteRequest { append, ..WriteRequest::new(node, handle, offset, &data) };
            let mut done = 0;
            while done < length {
                let rest = WriteRequest { offset: offset + done as u64, data: &data[done..], ..request };
                done += vfs.write(&CALLER, &rest).unwrap_or_else(|error| panic!("at {offset}: {error}")) as usize;
            }
            watched.tick();
        };
        // Single blocks in an order that scatters them, then appends.
        let blocks = HELD / 2 / 4096;
        for index in 0..blocks {
            write(index * 769 % blocks * 4096, 4096, false);
        }
        vfs.fsync(&CALLER, node, handle, false).unwrap();
        for index in 0..HELD / 2 / (64 << 10) {
            write(HELD / 2 + index * (64 << 10), 64 << 10, true);
        }
        vfs.fsync(&CALLER, node, handle, false).unwrap();
        assert_eq!(filesystem.usage().unwritten_bytes, 0);
        assert_eq!(vfs.get_attributes(&CALLER, node, None).unwrap().size_bytes, HELD);
        vfs.release(node, handle).unwrap();
        filesystem.close().unwrap();
    });
}
