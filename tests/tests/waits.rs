//! What goes on after a failure: nobody waits for what has become impossible, reading goes on, and what is dropped lets go.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use coppicefs::btree::{CheckpointHold, CheckpointLog, CheckpointReason, LogBoundary};
use coppicefs::device::{BlockDevice, MemDevice, ReadRequest, SimDevice, SimOptions, WriteRequest};
use coppicefs::env::Env;
use coppicefs::filesystem::format::test_geometry;
use coppicefs::filesystem::{Filesystem, OpenOptions, WorkerSet};
use coppicefs::format::space::{Bucket, BucketState};
use coppicefs::format::{BtreeId, Position};
use coppicefs::space::{TestSwitches, Watermark, WritePoint};
use coppicefs::transaction::CommitOptions;
use coppicefs::units::JournalSequence;
use coppicefs::vfs::Caller;
use coppicefs::{Error, Result};
use coppicefs_tests::crash::seed_or;
use coppicefs_tests::damage::Target;
use coppicefs_tests::faulty::FaultyDevice;
use coppicefs_tests::limit::Limit;
use coppicefs_tests::mount::{count, wait_until};
use coppicefs_tests::simulated::device_of;
use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};

const DEVICE_BYTES: u64 = 64 << 20;
/// What a wait that ends may take on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(60);

fn options() -> OpenOptions {
    // The least that there can be for nodes: a few dozen.
    OpenOptions { cache_bytes: 4 << 20, ..OpenOptions::default() }
}

fn formatted(device: Arc<dyn BlockDevice>) -> Arc<dyn BlockDevice> {
    Filesystem::format(&device, &test_geometry(), &Env::real()).unwrap();
    device
}

/// Commits one key; it means nothing, and nobody looks at it.
fn put(filesystem: &Filesystem, index: u64, value: u8) -> Result<()> {
    let options = CommitOptions { raw: true, ..CommitOptions::default() };
    filesystem.transactions().run(options, |transaction| {
        transaction.put(BtreeId::Xattrs, Position::new(1 << 40 | index, 0, u32::MAX), vec![value; 100]);
        Ok(())
    })?;
    Ok(())
}

/// Takes a key of [`put`] away.
fn remove(filesystem: &Filesystem, index: u64) -> Result<()> {
    let options = CommitOptions { raw: true, ..CommitOptions::default() };
    filesystem.transactions().run(options, |transaction| {
        transaction.delete(BtreeId::Xattrs, Position::new(1 << 40 | index, 0, u32::MAX));
        Ok(())
    })?;
    Ok(())
}

fn scan(filesystem: &Filesystem, btree: BtreeId) -> Result<usize> {
    let (mut from, mut keys) = (Position::MIN, 0);
    loop {
        let found = filesystem.forest().scan(btree, from, Position::MAX, 1000)?;
        keys += found.keys.len();
        match found.covered_to.successor() {
            Some(next) => from = next,
            None => return Ok(keys),
        }
    }
}

/// Keeps checkpoints away, as soon as none runs.
fn held(filesystem: &Filesystem) -> CheckpointHold<'_> {
    let mut hold = None;
    wait_until("a moment without a checkpoint", || {
        hold = filesystem.forest().hold_checkpoints();
        hold.is_some()
    });
    hold.unwrap()
}

/// Runs something that may never end beside the test.
fn beside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Receiver<T> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || sender.send(work()));
    receiver
}

fn counter(filesystem: &Filesystem, name: &str) -> u64 {
    filesystem.metrics().snapshot().iter().find(|(found, _)| *found == name).map_or(0, |(_, value)| *value)
}

/// A commit that came when the checkpoint worker had ended waited for it for ever, and the end of the mount with it.
#[test]
fn commits_do_not_wait_for_checkpoints_that_will_never_be() {
    let _limit = Limit::new();
    let filesystem = Filesystem::open(vec![formatted(Arc::new(MemDevice::new(DEVICE_BYTES)))], &options()).unwrap();
    (0..12_000).for_each(|index| put(&filesystem, index, 1).unwrap());
    filesystem.checkpoint().unwrap();
    let hold = held(&filesystem);
    let waits = counter(&filesystem, "transaction.checkpoint_waits");
    let committing = beside({
        let filesystem = Arc::clone(&filesystem);
        move || (0..12_000).try_for_each(|index| put(&filesystem, index * 131 % 12_000, 2))
    });
    wait_until("a commit waits", || counter(&filesystem, "transaction.checkpoint_waits") > waits);
    filesystem.journal().latch("a test");
    drop(hold);
    let first = committing.recv_timeout(PATIENCE).expect("the commit that waited was not told");
    assert!(matches!(first, Err(Error::Latched { .. })), "{first:?}");
    let next = beside({
        let filesystem = Arc::clone(&filesystem);
        move || put(&filesystem, 1, 3)
    });
    let next = next.recv_timeout(PATIENCE).expect("the commit after it waits for ever");
    assert!(matches!(next, Err(Error::Latched { .. })), "{next:?}");
    let closed = beside(move || filesystem.close());
    closed.recv_timeout(PATIENCE).expect("the mount does not end").unwrap();
}

/// Who waited for a free bucket was not woken when the journal failed.
#[test]
fn nobody_waits_for_a_bucket_when_nothing_is_written_any_more() {
    let _limit = Limit::new();
    let filesystem = Filesystem::open(vec![formatted(Arc::new(MemDevice::new(DEVICE_BYTES)))], &options()).unwrap();
    let allocating = beside({
        let filesystem = Arc::clone(&filesystem);
        move || {
            // Held: so somebody might give space back.
            let mut held = Vec::new();
            loop {
                match filesystem.space().allocate(WritePoint::User(1), 64 << 10, Watermark::Normal) {
                    Ok(allocation) => held.push(allocation),
                    Err(error) => return error,
                }
            }
        }
    });
    let mut seen = (0, 0);
    wait_until("an allocation waits", || {
        let now = counter(&filesystem, "space.allocations");
        seen = if now == seen.0 { (now, seen.1 + 1) } else { (now, 0) };
        now > 100 && seen.1 > 100
    });
    filesystem.journal().latch("a test");
    let error = allocating.recv_timeout(PATIENCE).expect("the allocation waits for ever");
    assert!(matches!(error, Error::Latched { .. }), "{error:?}");
    filesystem.close().unwrap();
}

/// A journal that panics when it is asked for F.
struct Panicking;

impl CheckpointLog for Panicking {
    fn boundary(&self) -> Result<LogBoundary> {
        panic!("on purpose")
    }
    fn flush(&self, _: JournalSequence) -> Result<()> {
        Ok(())
    }
    fn newest(&self) -> JournalSequence {
        JournalSequence(0)
    }
    fn release_before(&self, _: u64, _: JournalSequence) {}
    fn fill_permille(&self) -> u32 {
        0
    }
    fn unreflected_permille(&self) -> u32 {
        0
    }
    fn on_pressure(&self, _: Box<dyn Fn() + Send + Sync>) {}
}

/// It looked as if it ran for ever, and the next one waited for its end.
#[test]
fn a_checkpoint_that_panicked_is_waited_for_by_nobody() {
    let _limit = Limit::new();
    let filesystem = Filesystem::open(vec![formatted(Arc::new(MemDevice::new(DEVICE_BYTES)))], &options()).unwrap();
    put(&filesystem, 1, 1).unwrap();
    let forest = Arc::clone(filesystem.forest());
    let unwound = catch_unwind(AssertUnwindSafe(|| forest.checkpoint(&Panicking, CheckpointReason::Requested)));
    assert!(unwound.is_err());
    let next = beside({
        let filesystem = Arc::clone(&filesystem);
        move || filesystem.checkpoint()
    });
    let next = next.recv_timeout(PATIENCE).expect("the next checkpoint waits for ever");
    assert!(matches!(next, Err(Error::Latched { .. })), "{next:?}");
}

/// What a failed checkpoint had not written was evicted, and could not be read any more.
#[test]
fn reading_goes_on_after_a_checkpoint_that_could_not_be_written() {
    let _limit = Limit::new();
    let folder = tempfile::tempdir().unwrap();
    let switch = folder.path().join("broken");
    let plan = format!("write@0..=eio,when={}", switch.display()).parse().unwrap();
    let device = FaultyDevice::new(formatted(Arc::new(MemDevice::new(DEVICE_BYTES))), plan);
    let filesystem = Filesystem::open(vec![Arc::new(device)], &options()).unwrap();
    (0..12_000).for_each(|index| put(&filesystem, index, 1).unwrap());
    filesystem.checkpoint().unwrap();
    let keys = scan(&filesystem, BtreeId::Xattrs).unwrap();
    (0..12).for_each(|index| put(&filesystem, index * 1000, 2).unwrap());
    std::fs::write(&switch, "").unwrap();
    assert!(filesystem.checkpoint().is_err());
    for _ in 0..2 {
        assert_eq!(scan(&filesystem, BtreeId::Xattrs).unwrap(), keys);
        assert!(BtreeId::ALL.iter().all(|&btree| scan(&filesystem, btree).is_ok()));
    }
    assert!(counter(&filesystem, "btree.evictions") > 0, "all of it was in memory");
    filesystem.close().unwrap();
}

/// Nodes with a bad copy were kept in memory, all of them, to be written by a checkpoint that a read-only mount never makes.
#[test]
fn what_is_read_only_keeps_no_node_to_be_written() {
    let _limit = Limit::new();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    std::fs::File::create(&path).unwrap().set_len(DEVICE_BYTES).unwrap();
    {
        let device = Filesystem::open_device_waiting(&path, &Default::default()).unwrap();
        let filesystem = Filesystem::open(vec![formatted(Arc::new(device))], &options()).unwrap();
        (0..12_000).for_each(|index| put(&filesystem, index, 1).unwrap());
        filesystem.close().unwrap();
    }
    {
        let target = Target::open(&path);
        let checkpoint = target.checkpoints().remove(0);
        for (.., pointer) in target.nodes(&checkpoint) {
            target.destroy_copy(&pointer, pointer.copies.first().unwrap());
        }
    }
    let read_only = OpenOptions { read_only: true, ..options() };
    let filesystem = Filesystem::open_path(&path, &read_only).unwrap();
    assert!(scan(&filesystem, BtreeId::Xattrs).unwrap() > 11_000);
    assert!(counter(&filesystem, "btree.node_read_repaired") > 50);
    assert_eq!(filesystem.forest().dirty_bytes(), 0);
    filesystem.close().unwrap();
}

/// The first checkpoint after a replay only saves the next replay.
#[test]
fn a_mount_goes_on_without_space_for_its_first_checkpoint() {
    let _limit = Limit::new();
    let device = Arc::new(SimDevice::new(DEVICE_BYTES, SimOptions { block_bytes: 4096, ..SimOptions::default() }));
    formatted(Arc::clone(&device) as _);
    let essential = OpenOptions { workers: WorkerSet::Essential, ..options() };
    let filesystem = Filesystem::open(vec![Arc::clone(&device) as _], &essential).unwrap();
    let hold = held(&filesystem);
    // Fewer nodes than commits wait for, more than there are slots for.
    (0..800).for_each(|index| put(&filesystem, index, 1).unwrap());
    filesystem.journal().flush(filesystem.journal().newest()).unwrap();
    let image = device.snapshot().everything();
    drop(hold);
    filesystem.close().unwrap();
    let switches = TestSwitches { refuse_allocations: Some((0, u32::MAX)), ..TestSwitches::default() };
    let full = OpenOptions { switches, ..options() };
    let filesystem = Filesystem::open(vec![device_of(image)], &full).unwrap();
    assert!(filesystem.replayed().keys > 0);
    assert_eq!(scan(&filesystem, BtreeId::Xattrs).unwrap(), 800);
}

/// Its workers went on, and kept the device.
#[test]
fn a_filesystem_that_is_dropped_lets_go_of_its_device() {
    let _limit = Limit::new();
    let device = formatted(Arc::new(MemDevice::new(DEVICE_BYTES)));
    let filesystem = Filesystem::open(vec![Arc::clone(&device)], &options()).unwrap();
    put(&filesystem, 1, 1).unwrap();
    drop(filesystem);
    assert_eq!(Arc::strong_count(&device), 1);
}

/// What a damaged key calls emptied was freed, and handed out, whatever lies there.
#[test]
fn the_journal_is_not_handed_out_for_file_data() {
    let _limit = Limit::new();
    let device = formatted(Arc::new(MemDevice::new(DEVICE_BYTES)));
    let essential = OpenOptions { workers: WorkerSet::Essential, ..options() };
    let filesystem = Filesystem::open(vec![Arc::clone(&device)], &essential).unwrap();
    let ring = *filesystem.superblock().layout.journal.first().unwrap();
    let emptied = Bucket { state: BucketState::NeedDiscard, generation: 1, charged_bytes: 0 };
    let raw = CommitOptions { raw: true, ..CommitOptions::default() };
    let damage = filesystem.transactions().run(raw, |transaction| {
        let at = Position::new(0, ring.first, 0);
        transaction.put(BtreeId::Buckets, at, emptied.encode());
        transaction.put(BtreeId::NeedDiscard, at, Vec::new());
        Ok(())
    });
    damage.unwrap();
    filesystem.close().unwrap();
    let filesystem = Filesystem::open(vec![device], &essential).unwrap();
    let mut held = Vec::new();
    while let Some(one) = filesystem.space().allocate_now(WritePoint::User(1), 64 << 10, Watermark::Metadata).unwrap() {
        assert!(!ring.contains(0, one.bucket.0), "bucket {} is the journal's", one.bucket);
        held.push(one);
    }
    assert!(held.len() > 100);
}

/// A device that cannot take back what is free.
#[derive(Debug)]
struct Keeping {
    inner: Arc<dyn BlockDevice>,
    asked: AtomicU64,
}

impl BlockDevice for Keeping {
    coppicefs::as_the_device_below!(inner);

    fn is_read_only(&self) -> bool {
        false
    }
    fn read_batch(&self, requests: &mut [ReadRequest<'_>], landed: &mut dyn FnMut(usize, Result<()>)) {
        self.inner.read_batch(requests, landed);
    }
    fn write_batch(&self, requests: &[WriteRequest<'_>]) -> Result<()> {
        self.inner.write_batch(requests)
    }
    fn flush(&self) -> Result<()> {
        self.inner.flush()
    }
    fn discard(&self, offset: u64, length: u64) -> Result<()> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let source = Arc::new(std::io::Error::from_raw_os_error(rustix::io::Errno::NOSPC.raw_os_error()));
        Err(Error::Device { operation: "discard", device: self.name().to_owned(), offset, length, source })
    }
}

/// A hole that the host could not punch (its own metadata has no space, for one) made the filesystem read-only.
#[test]
fn a_host_that_takes_no_space_back_stops_nothing() {
    let _limit = Limit::new();
    let inner = formatted(Arc::new(MemDevice::new(DEVICE_BYTES)));
    let device = Arc::new(Keeping { inner, asked: AtomicU64::new(0) });
    let filesystem = Filesystem::open(vec![Arc::clone(&device) as _], &options()).unwrap();
    let vfs = filesystem.vfs();
    let caller = Caller { uid: 0, gid: 0, pid: 1, umask: 0 };
    let name = std::ffi::OsStr::new("large");
    let (entry, opened) = vfs.create(&caller, 1, name, 0o100_644, 2).unwrap();
    let node = entry.attributes.node;
    let data: Vec<u8> = (0..1 << 17).map(|index: u32| (index.wrapping_mul(2_654_435_761) >> 16) as u8).collect();
    for block in 0..128 {
        let request = coppicefs::vfs::WriteRequest::new(node, opened.handle, block << 17, &data);
        assert_eq!(vfs.write(&caller, &request).unwrap(), 1 << 17);
    }
    vfs.fsync(&caller, node, opened.handle, false).unwrap();
    vfs.release(node, opened.handle).unwrap();
    vfs.unlink(&caller, 1, name).unwrap();
    vfs.forget(node, 1);
    wait_until("the host is asked to take space back", || device.asked.load(Ordering::Relaxed) > 0);
    // Emptied buckets still become free.
    wait_until("all is free", || filesystem.usage().need_discard_buckets == 0);
    assert_eq!(filesystem.latched(), None);
    put(&filesystem, 1, 1).unwrap();
    filesystem.close().unwrap();
    assert_eq!(device.asked.load(Ordering::Relaxed), 1, "it is not asked again");
}

/// Writes, syncs, cuts and deletes files of a directory of its own until it is told to stop. Errors are answers.
fn churn(filesystem: &Filesystem, thread: u64, stop: &AtomicBool) {
    let vfs = filesystem.vfs();
    let caller = Caller { uid: 0, gid: 0, pid: 1, umask: 0 };
    let mut random = Xoshiro256PlusPlus::seed_from_u64(thread);
    let mut data = vec![0; 96 << 10];
    random.fill_bytes(&mut data);
    while !stop.load(Ordering::Relaxed) {
        let name = format!("{thread} with a name that is long enough to fill leaves {}", random.next_u64() % 60);
        let name = std::ffi::OsStr::new(&name);
        if random.next_u64().is_multiple_of(3) {
            let _ = vfs.unlink(&caller, 1, name);
            continue;
        }
        let Ok((entry, opened)) = vfs.create(&caller, 1, name, 0o100_644, 2) else { continue };
        let node = entry.attributes.node;
        for _ in 0..random.next_u64() % 8 {
            let offset = random.next_u64() % (4 << 20);
            let length = 1 + random.next_u64() as usize % data.len();
            let _ =
                vfs.write(&caller, &coppicefs::vfs::WriteRequest::new(node, opened.handle, offset, &data[..length]));
        }
        if random.next_u64().is_multiple_of(4) {
            let _ = vfs.fsync(&caller, node, opened.handle, false);
        }
        let _ = vfs.release(node, opened.handle);
        vfs.forget(node, 1);
    }
}

/// In the middle of everything the device fails, or the journal, or nothing: all threads and the end of the mount come to their end. `COPPICE_WAITS`
/// (4) is how often it is tried, `COPPICE_SEED` (1) the first try's seed.
#[test]
fn everything_ends_whatever_fails() {
    let _limit = Limit::new();
    for seed in (seed_or(1)..).take(count("COPPICE_WAITS", 4) as usize) {
        let mut random = Xoshiro256PlusPlus::seed_from_u64(seed);
        let folder = tempfile::tempdir().unwrap();
        let switch = folder.path().join("broken");
        let kind = ["write@0..=eio", "flush@0..=eio", "write@7..=eio", "flush@2..=eio"][random.next_u64() as usize % 4];
        let plan = format!("{kind},when={}", switch.display()).parse().unwrap();
        let mut format = test_geometry();
        format.journal_bytes = (128 << 10) << (random.next_u64() % 3);
        let inner: Arc<dyn BlockDevice> = Arc::new(MemDevice::new(32 << 20));
        Filesystem::format(&inner, &format, &Env::real()).unwrap();
        let device = Arc::new(FaultyDevice::new(inner, plan));
        let filesystem = Filesystem::open(vec![device], &options()).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let threads: Vec<_> = (0..6)
            .map(|thread| {
                let (filesystem, stop) = (Arc::clone(&filesystem), Arc::clone(&stop));
                beside(move || churn(&filesystem, seed * 100 + thread, &stop))
            })
            .collect();
        std::thread::sleep(Duration::from_millis(200 + random.next_u64() % 800));
        match random.next_u64() % 4 {
            0 => {}
            1 => filesystem.vfs().latch("a test"),
            _ => std::fs::write(&switch, "").unwrap(),
        }
        std::thread::sleep(Duration::from_millis(random.next_u64() % 200));
        stop.store(true, Ordering::Relaxed);
        for thread in threads {
            thread.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("seed {seed}: an operation does not end"));
        }
        let closed = beside(move || filesystem.close());
        let _ = closed.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("seed {seed}: the mount does not end"));
    }
}

/// For a while there is no bucket for anything, B-tree nodes included: operations are refused, and nothing else. The worker that met it first made
/// the filesystem read-only. `COPPICE_WAITS` (4) is how often it is tried, `COPPICE_SEED` (1) the first try's seed.
#[test]
fn want_of_space_passes() {
    let _limit = Limit::new();
    for seed in (seed_or(1)..).take(count("COPPICE_WAITS", 4) as usize) {
        let mut random = Xoshiro256PlusPlus::seed_from_u64(seed);
        let first = random.next_u64() as u32 % 100;
        let last = first + 100 + random.next_u64() as u32 % 200;
        let no_slots_beforehand = random.next_u64().is_multiple_of(2);
        let switches =
            TestSwitches { refuse_allocations: Some((first, last)), no_slots_beforehand, ..TestSwitches::default() };
        let mut format = test_geometry();
        format.journal_bytes = (128 << 10) << (random.next_u64() % 3);
        let device: Arc<dyn BlockDevice> = Arc::new(MemDevice::new(32 << 20));
        Filesystem::format(&device, &format, &Env::real()).unwrap();
        let options = OpenOptions { switches, ..options() };
        let filesystem = Filesystem::open(vec![Arc::clone(&device)], &options).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let threads: Vec<_> = (0..3)
            .map(|thread| {
                let (filesystem, stop) = (Arc::clone(&filesystem), Arc::clone(&stop));
                beside(move || match thread {
                    // More dirty nodes than commits may make without a checkpoint.
                    0 => (0..).take_while(|_| !stop.load(Ordering::Relaxed)).for_each(|index| {
                        let _ = put(&filesystem, index * 131 % 12_000, 1);
                    }),
                    _ => churn(&filesystem, seed * 100 + thread, &stop),
                })
            })
            .collect();
        let name = "space.allocations";
        wait_until("space comes back", || {
            filesystem.latched().is_some() || counter(&filesystem, name) > u64::from(last)
        });
        stop.store(true, Ordering::Relaxed);
        for thread in threads {
            thread.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("seed {seed}: an operation does not end"));
        }
        assert_eq!(filesystem.latched(), None, "seed {seed}");
        // Who waits is told while there is no space.
        wait_until("all that is unlinked is deleted", || filesystem.vfs().wait_for_deletions().is_ok());
        (0..12_000).for_each(|index| remove(&filesystem, index).unwrap());
        filesystem.close().unwrap();
        let again = Filesystem::open(vec![device], &OpenOptions { read_only: true, ..OpenOptions::default() }).unwrap();
        let problems = coppicefs_fsck::check(&again, &|_, _, _, _| {}).unwrap().problems;
        assert!(problems.is_empty(), "seed {seed}: {problems:?}");
    }
}
