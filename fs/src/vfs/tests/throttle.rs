//! A device that takes its time, and writers that want more: how much is dirty, and how long others wait.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::*;
use crate::device::{ReadRequest as DeviceRead, WriteRequest as DeviceWrite};
use crate::sync::Mutex;

const MIB: u64 = 1 << 20;

/// Writes go through one after the other, at so many bytes a second; reads and flushes take no time.
#[derive(Debug)]
struct SlowDevice {
    inner: MemDevice,
    /// 0: as fast as memory.
    bytes_per_second: AtomicU64,
    busy_until: Mutex<Instant>,
}

impl BlockDevice for SlowDevice {
    fn name(&self) -> &str {
        "slow memory"
    }

    fn size_bytes(&self) -> u64 {
        self.inner.size_bytes()
    }

    fn block_bytes(&self) -> u32 {
        self.inner.block_bytes()
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn read_batch(&self, requests: &mut [DeviceRead<'_>], landed: &mut dyn FnMut(usize, Result<()>)) {
        self.inner.read_batch(requests, landed);
    }

    fn write_batch(&self, requests: &[DeviceWrite<'_>]) -> Result<()> {
        let bytes: u64 = requests.iter().map(DeviceWrite::length).sum();
        let bytes_per_second = self.bytes_per_second.load(Ordering::Relaxed);
        if bytes_per_second > 0 {
            let until = {
                let mut busy_until = self.busy_until.lock();
                let time = Duration::from_secs_f64(bytes as f64 / bytes_per_second as f64);
                *busy_until = (*busy_until).max(Instant::now()) + time;
                *busy_until
            };
            std::thread::sleep(until.saturating_duration_since(Instant::now()));
        }
        self.inner.write_batch(requests)
    }

    fn flush(&self) -> Result<()> {
        self.inner.flush()
    }

    fn discard(&self, offset: u64, length: u64) -> Result<()> {
        self.inner.discard(offset, length)
    }
}

struct Slow {
    device: Arc<SlowDevice>,
    filesystem: Arc<Filesystem>,
}

impl Slow {
    fn new(bytes_per_second: u64) -> Self {
        let device = Arc::new(SlowDevice {
            inner: MemDevice::new(384 << 20),
            bytes_per_second: AtomicU64::new(0),
            busy_until: Mutex::new(Instant::now()),
        });
        let as_device: Arc<dyn BlockDevice> = device.clone();
        Filesystem::format(&as_device, &test_geometry(), &Env::real()).unwrap();
        let options = OpenOptions { cache_bytes: 256 << 20, ..OpenOptions::default() };
        let filesystem = Filesystem::open(vec![as_device], &options).unwrap();
        device.bytes_per_second.store(bytes_per_second, Ordering::Relaxed);
        Self { device, filesystem }
    }

    fn create(&self, name: &str) -> (u64, u64) {
        let (entry, opened) = self.filesystem.vfs().create(&USER, ROOT, OsStr::new(name), 0o644, 2).unwrap();
        (entry.attributes.node, opened.handle)
    }

    fn write(&self, (node, handle): (u64, u64), offset: u64, data: &[u8]) {
        self.filesystem.vfs().write(&USER, &write_request(node, handle, offset, data)).unwrap();
    }

    /// Overwrites a file of 64 MiB until it is over.
    fn flood(&self, name: &str, is_over: &AtomicBool) {
        let file = self.create(name);
        let mut piece = vec![0; 256 << 10];
        for number in 0_u64.. {
            if is_over.load(Ordering::Relaxed) {
                break;
            }
            piece.fill(number as u8);
            self.write(file, number * piece.len() as u64 % (64 * MIB), &piece);
        }
    }

    fn unwritten_bytes(&self) -> u64 {
        self.filesystem.cache().dirty_bytes() + self.filesystem.cache().writeback_bytes()
    }

    /// Until the device is known, and no more is dirty than it lets be.
    fn settle(&self) {
        let cache = self.filesystem.cache();
        let deadline = Instant::now() + Duration::from_secs(60);
        while cache.write_bandwidth_bytes() == 0 || self.unwritten_bytes() > cache.dirty_limit_bytes() {
            assert!(Instant::now() < deadline, "{cache:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        self.device.bytes_per_second.store(0, Ordering::Relaxed);
        let closed = self.filesystem.close();
        assert!(closed.is_ok() || std::thread::panicking(), "{closed:?}");
    }
}

/// Ends the writers, also by a panic.
struct Ending<'a>(&'a AtomicBool);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Without the measured limit a quarter of the cache is dirty: one and a half seconds of this device.
#[test]
fn what_is_dirty_stays_near_what_the_device_writes_in_half_a_second() {
    let slow = Slow::new(32 * MIB);
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _ending = Ending(&is_over);
        (0..2).for_each(|number| {
            let (slow, is_over) = (&slow, &is_over);
            scope.spawn(move || slow.flood(&format!("flood {number}"), is_over));
        });
        slow.settle();
        let (started, written) = (Instant::now(), slow.device.inner.bytes_written());
        let mut most = 0;
        while started.elapsed() < Duration::from_millis(1500) {
            most = most.max(slow.unwritten_bytes());
            std::thread::sleep(Duration::from_millis(1));
        }
        let rate = (slow.device.inner.bytes_written() - written) as f64 / started.elapsed().as_secs_f64();
        println!("most {most}, {:?}, {rate} bytes a second", slow.filesystem.cache());
        // The device is never faster than this, so neither is what was measured.
        assert!(most <= 18 * MIB, "{most} bytes are dirty or in writeback");
        // And it has enough to do, as far as this machine lets it.
        assert!(rate >= (8 * MIB) as f64, "{rate} bytes a second");
    });
    let metrics = slow.filesystem.metrics();
    assert!(metrics.pagecache_writer_paused.get() > 0);
    assert!(metrics.pagecache_writer_throttled_us.get() > 0);
}

/// How long an fsync takes, in what the device wrote meanwhile: that does not depend on how busy this machine is.
#[test]
fn an_fsync_of_a_small_file_is_not_held_back_by_another_files_flood() {
    let slow = Slow::new(32 * MIB);
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _ending = Ending(&is_over);
        (0..2).for_each(|number| {
            let (slow, is_over) = (&slow, &is_over);
            scope.spawn(move || slow.flood(&format!("flood {number}"), is_over));
        });
        slow.settle();
        let small = slow.create("small");
        let mut costs: Vec<u64> = (0..9)
            .map(|round| {
                // At any point of the batch that is under way.
                std::thread::sleep(Duration::from_millis(40 + 7 * u64::from(round)));
                let before = slow.device.inner.bytes_written();
                slow.write(small, 0, &[round; 4096]);
                slow.filesystem.vfs().fsync(&USER, small.0, small.1, false).unwrap();
                slow.device.inner.bytes_written() - before
            })
            .collect();
        costs.sort_unstable();
        println!("bytes written by the device during an fsync: {costs:?}");
        assert!(costs[4] <= 10 * MIB, "{costs:?}");
    });
}
