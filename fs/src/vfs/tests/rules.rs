//! Who takes which lock: a test for each row of the table in `pagecache`. Where a row says "none", the test itself holds the lock,
//! exclusively, on the very thread that does the operation: taking it would be reported (or hang, but the check of the order is faster).

use std::sync::mpsc;

use super::*;
use crate::data::tests::seam;
use crate::memory::AlignedBuffer;
use crate::vfs::inode::VfsInode;

const MEBIBYTE: usize = 1 << 20;

struct Bench {
    mount: Mount,
    file: (u64, u64),
    inode: Arc<VfsInode>,
    content: Vec<u8>,
}

impl Bench {
    /// A file of a mebibyte, on disk and not in the cache.
    fn new() -> Self {
        let mount = Mount::with(Env::real(), 64 << 20, OpenOptions::default());
        let file = mount.create(ROOT, "f");
        let content: Vec<u8> = (0..MEBIBYTE).map(|at| (at / 100) as u8 | 1).collect();
        mount.write(file, 0, &content).unwrap();
        mount.vfs().fsync(&USER, file.0, file.1, false).unwrap();
        let inode = mount.vfs().inode(file.0).unwrap();
        let bench = Self { mount, file, inode, content };
        bench.drop_cache();
        bench
    }

    fn drop_cache(&self) {
        self.vfs().write_back_all().unwrap();
        self.mount.filesystem.as_ref().unwrap().cache().evict_all_clean();
        assert!(!self.pages().has_folios(&(0..u64::MAX)));
    }

    fn vfs(&self) -> &Vfs {
        self.mount.vfs()
    }

    fn pages(&self) -> &Arc<crate::pagecache::AddressSpace> {
        &self.inode.file.as_ref().unwrap().pages
    }

    fn read(&self) {
        assert!(self.mount.read(self.file, 0, MEBIBYTE as u32).unwrap() == self.content);
    }

    fn counters(&self) -> (u64, u64) {
        let metrics = self.vfs().metrics();
        (metrics.pagecache_add_taken.get(), metrics.pagecache_block_taken.get())
    }

    /// What `operation` takes of (add, block).
    fn taken(&self, operation: impl FnOnce()) -> (u64, u64) {
        let before = self.counters();
        operation();
        let after = self.counters();
        (after.0 - before.0, after.1 - before.1)
    }

    /// Whether `operation` waits as long as `guard` is held, and ends when it is dropped.
    fn waits_for<G>(&self, guard: G, operation: impl FnOnce() + Send) -> bool {
        let (sender, receiver) = mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                operation();
                sender.send(()).unwrap();
            });
            let waits = receiver.recv_timeout(Duration::from_millis(200)).is_err();
            drop(guard);
            if waits {
                receiver.recv_timeout(Duration::from_secs(60)).expect("it ends once the lock is free");
            }
            waits
        })
    }

    fn direct_write(&self, offset: u64, length: usize) {
        let data = AlignedBuffer::zeroed(length);
        assert_eq!(self.vfs().direct_write(&USER, self.file.0, self.file.1, offset, &data).unwrap(), length);
    }
}

#[test]
fn a_read_hit_takes_no_inode_lock_and_no_page_cache_lock() {
    let bench = Bench::new();
    bench.read();
    let exclusive = bench.inode.lock.write();
    let blocked = bench.pages().block(0..u64::MAX).unwrap();
    assert_eq!(bench.taken(|| bench.read()), (0, 0));
    drop((blocked, exclusive));
}

#[test]
fn a_fill_takes_add_and_no_inode_lock() {
    let bench = Bench::new();
    let exclusive = bench.inode.lock.write();
    let (add, block) = bench.taken(|| bench.read());
    assert!((1..=4).contains(&add) && block == 0, "{add} adds for one mebibyte");
    drop(exclusive);
    bench.drop_cache();
    let blocked = bench.pages().block(0..u64::MAX).unwrap();
    assert!(bench.waits_for(blocked, || bench.read()), "a fill under block");
}

#[test]
fn a_buffered_write_inside_the_end_shares_the_inode_lock_and_an_extending_one_does_not() {
    let bench = Bench::new();
    bench.read();
    let write = |offset: u64| {
        bench.mount.write(bench.file, offset, &[7; 5000]).unwrap();
    };
    assert!(!bench.waits_for(bench.inode.lock.read(), || write(100)));
    assert!(bench.waits_for(bench.inode.lock.write(), || write(100)));
    assert!(bench.waits_for(bench.inode.lock.read(), || write(MEBIBYTE as u64 - 10)));
    // A hit, and an insertion.
    assert_eq!(bench.taken(|| write(100)), (0, 0));
    assert_eq!(bench.taken(|| write(2 * MEBIBYTE as u64)).1, 0);
}

#[test]
fn truncate_punch_zero_range_collapse_and_insert_take_the_inode_lock_exclusively_and_block() {
    type Change = fn(&Bench) -> Result<()>;
    let changes: [Change; 5] = [
        |bench| bench.mount.truncate(bench.file.0, 900_000).map(drop),
        |bench| bench.vfs().fallocate(&USER, bench.file.0, bench.file.1, 8192, 100_000, 3),
        |bench| bench.vfs().fallocate(&USER, bench.file.0, bench.file.1, 8192, 100_000, 17),
        |bench| bench.vfs().collapse_range(bench.file.0, bench.file.1, 8192, 40_960),
        |bench| bench.vfs().insert_range(bench.file.0, bench.file.1, 8192, 40_960),
    ];
    for change in changes {
        let bench = Bench::new();
        assert!(bench.waits_for(bench.inode.lock.read(), || change(&bench).unwrap()));
        assert_eq!(bench.taken(|| change(&bench).unwrap()).1, 1);
    }
}

#[test]
fn a_direct_write_of_whole_blocks_inside_the_end_shares_the_inode_lock() {
    let bench = Bench::new();
    // Beside another one, which has the shared lock and is in its block.
    let shared = bench.inode.lock.read();
    let blocked = bench.pages().block(0..65_536).unwrap();
    assert!(!bench.waits_for((blocked, shared), || bench.direct_write(65_536, 65_536)));
    assert_eq!(bench.taken(|| bench.direct_write(0, 65_536)), (0, 1));
    assert!(bench.waits_for(bench.inode.lock.read(), || bench.direct_write(100, 65_536)), "a block in part");
    assert!(bench.waits_for(bench.inode.lock.read(), || bench.direct_write(MEBIBYTE as u64, 4096)), "the end");
}

#[test]
fn a_direct_write_puts_its_data_in_place_before_it_takes_a_lock() {
    let bench = Bench::new();
    let before = bench.mount.device.bytes_written();
    let (sender, receiver) = mpsc::channel();
    std::thread::scope(|scope| {
        let exclusive = bench.inode.lock.write();
        let bench = &bench;
        scope.spawn(move || {
            bench.direct_write(0, MEBIBYTE);
            sender.send(()).unwrap();
        });
        // Its mebibyte is on the device while the lock is not free.
        let deadline = std::time::Instant::now() + Duration::from_secs(60);
        while bench.mount.device.bytes_written() < before + MEBIBYTE as u64 {
            assert!(std::time::Instant::now() < deadline, "nothing is written before the lock is had");
            std::thread::yield_now();
        }
        assert!(receiver.try_recv().is_err());
        drop(exclusive);
        receiver.recv_timeout(Duration::from_secs(60)).expect("it ends once the lock is free");
    });
    assert!(bench.mount.read(bench.file, 0, MEBIBYTE as u32).unwrap().iter().all(|&byte| byte == 0));
}

#[test]
fn a_direct_read_takes_no_lock_and_writes_back_first() {
    let bench = Bench::new();
    let mut buffer = AlignedBuffer::zeroed(MEBIBYTE);
    let mut read = |expected: &[u8]| {
        let bytes = bench.vfs().direct_read(&USER, bench.file.0, bench.file.1, 0, &mut buffer).unwrap();
        assert!(buffer[..bytes] == *expected);
    };
    let metrics = bench.vfs().metrics();
    let exclusive = bench.inode.lock.write();
    assert_eq!(bench.taken(|| read(&bench.content)), (0, 0));
    assert_eq!((metrics.direct_fast.get(), metrics.direct_slow.get()), (1, 0));
    drop(exclusive);
    assert!(!bench.pages().has_folios(&(0..u64::MAX)), "a direct read leaves nothing in the cache");
    let mut content = bench.content.clone();
    bench.mount.write(bench.file, 10_000, &[0xEE; 100]).unwrap();
    content[10_000..10_100].fill(0xEE);
    let exclusive = bench.inode.lock.write();
    assert_eq!(bench.taken(|| read(&content)), (0, 0));
    assert_eq!((metrics.direct_fast.get(), metrics.direct_slow.get()), (1, 1));
    assert_eq!(bench.pages().unwritten_blocks(), 0);
    drop(exclusive);
}

#[test]
fn after_three_failed_checks_a_direct_read_becomes_a_fill_through_the_cache() {
    fn bump_each_time(pages: Arc<crate::pagecache::AddressSpace>, seen: Arc<std::sync::atomic::AtomicU32>) {
        seam::at("looked up", move || {
            // Only while the read goes around the cache: a fill has its folios in there.
            seen.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            pages.bump_sequence();
            bump_each_time(pages, seen);
        });
    }
    let bench = Bench::new();
    let seen = Arc::new(std::sync::atomic::AtomicU32::new(0));
    bump_each_time(Arc::clone(bench.pages()), Arc::clone(&seen));
    let mut buffer = AlignedBuffer::zeroed(8192);
    let taken = bench.taken(|| {
        assert_eq!(bench.vfs().direct_read(&USER, bench.file.0, bench.file.1, 4096, &mut buffer).unwrap(), 8192);
    });
    seam::at("never", || {});
    assert!(buffer[..] == bench.content[4096..12_288]);
    assert_eq!(taken, (1, 0));
    assert_eq!(seen.load(std::sync::atomic::Ordering::Relaxed), 4, "three looks and a fill");
    assert_eq!(bench.vfs().metrics().direct_slow.get(), 1);
}

#[test]
fn writeback_and_lseek_take_no_lock() {
    let bench = Bench::new();
    bench.mount.write(bench.file, 0, &[5; 100_000]).unwrap();
    let exclusive = bench.inode.lock.write();
    let blocked = bench.pages().block(0..u64::MAX).unwrap();
    assert_eq!(bench.vfs().seek(&USER, bench.file.0, bench.file.1, 5, Seek::Data).unwrap(), 5);
    bench.vfs().write_back(&bench.inode).unwrap();
    assert_eq!(bench.vfs().seek(&USER, bench.file.0, bench.file.1, 5, Seek::Hole).unwrap(), MEBIBYTE as u64);
    drop((blocked, exclusive));
}

/// A buffered write's dirty blocks, taken out by a direct write that then fails, are still there; and an fsync meanwhile would have waited.
#[test]
fn a_direct_write_that_fails_loses_nothing() {
    let bench = Bench::new();
    bench.mount.write(bench.file, 0, &[5; 20_000]).unwrap();
    let before = bench.pages().unwritten_blocks();
    let guard = bench.pages().block(0..8192).unwrap();
    let held = crate::pagecache::hold_range(bench.pages(), &guard, 0..8192).unwrap();
    assert!(!bench.pages().is_dirty(&(0..8192)), "out of writeback's reach");
    assert_eq!(bench.pages().unwritten_blocks(), before, "but not forgotten");
    drop((held, guard));
    assert!(bench.pages().is_dirty(&(0..8192)));
    assert!(bench.mount.read(bench.file, 0, 20_000).unwrap() == [5; 20_000]);
    bench.vfs().fsync(&USER, bench.file.0, bench.file.1, false).unwrap();
    assert_eq!(bench.pages().unwritten_blocks(), 0);
}
