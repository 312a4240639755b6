//! Writers against a device that takes its time, in simulated time: the same run each time.

use std::time::Duration;

use super::*;

const MIB: u64 = 1 << 20;

/// The writeback worker over a device of so many bytes a second: each batch moves the clock.
struct SlowFlusher {
    env: Arc<Env>,
    cache: Arc<Cache>,
    file: Arc<File>,
    bytes_per_second: AtomicU64,
    written_bytes: AtomicU64,
}

impl Worker for SlowFlusher {
    fn name(&self) -> &'static str {
        "slow flusher"
    }

    fn step(&self, _: u32) -> Result<Progress> {
        if !self.cache.needs_writeback() {
            return Ok(Progress::Idle(Some(Duration::from_millis(10))));
        }
        let runs = collect_dirty(&self.file.space, 0..u64::MAX, self.cache.writeback_batch_bytes());
        let bytes: u64 = runs.iter().map(WritebackRun::length).sum();
        let batch = self.cache.begin_writeback();
        let time = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second.load(Ordering::Relaxed) as f64);
        self.env.wait_until(&Event::new(), self.env.monotonic() + time, || None::<()>)?;
        for run in runs {
            self.file.store_run(run, false);
        }
        self.cache.end_writeback(batch, bytes);
        self.written_bytes.fetch_add(bytes, Ordering::Relaxed);
        Ok(Progress::Worked)
    }

    fn event(&self) -> &Event {
        self.cache.writeback_wanted()
    }
}

struct Slow {
    env: Arc<Env>,
    metrics: Arc<Metrics>,
    cache: Arc<Cache>,
    file: Arc<File>,
    flusher: Arc<SlowFlusher>,
}

impl Slow {
    fn new(bytes_per_second: u64) -> Self {
        let env = Env::simulated(3);
        let metrics = Arc::new(Metrics::default());
        let cache = Cache::new(Arc::clone(&env), Arc::clone(&metrics), CacheOptions::new(256 * MIB)).unwrap();
        let file = File::new(&cache, 1, 0);
        let flusher = Arc::new(SlowFlusher {
            env: Arc::clone(&env),
            cache: Arc::clone(&cache),
            file: Arc::clone(&file),
            bytes_per_second: AtomicU64::new(bytes_per_second),
            written_bytes: AtomicU64::new(0),
        });
        env.register(Arc::clone(&flusher) as Arc<dyn Worker>);
        Self { env, metrics, cache, file, flusher }
    }

    /// Writes over the first 64 MiB again and again. Returns what was unwritten after each write.
    fn write(&self, bytes: u64, piece: u64) -> Vec<u64> {
        let data = vec![7; usize::try_from(piece).unwrap()];
        let step = |number: u64| {
            self.cache.pace_writer(piece).unwrap();
            self.file.write(number * piece % (64 * MIB), &data).unwrap();
            self.cache.unwritten_bytes()
        };
        (0..bytes / piece).map(step).collect()
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        self.env.unregister_all();
    }
}

#[test]
fn what_is_dirty_follows_the_speed_of_the_device() {
    let slow = Slow::new(40 * MIB);
    assert_eq!(slow.cache.dirty_limit_bytes(), 64 * MIB, "before anything is known");
    slow.write(128 * MIB, MIB);
    assert_eq!(slow.cache.write_bandwidth_bytes().div_ceil(MIB), 40);
    assert_eq!(slow.cache.dirty_limit_bytes().div_ceil(MIB), 20);
    let written = || slow.flusher.written_bytes.load(Ordering::Relaxed);
    let (started, waits) = (slow.env.monotonic(), slow.metrics.pagecache_writer_throttled.get());
    let before = written();
    let unwritten = slow.write(400 * MIB, MIB);
    let most = unwritten.iter().max().unwrap();
    assert!(*most <= 20 * MIB, "{most} bytes");
    // As fast as the device, and slowed down by pauses rather than stopped.
    let seconds = (slow.env.monotonic() - started).as_secs_f64();
    let rate = (written() - before) as f64 / seconds / MIB as f64;
    assert!((38.0..40.1).contains(&rate), "{rate} MiB a second");
    assert!(slow.metrics.pagecache_writer_paused.get() > 50);
    let waits = slow.metrics.pagecache_writer_throttled.get() - waits;
    assert!(waits < 20, "{waits} writes waited at the limit");
    // The device becomes slower: what may be dirty follows.
    slow.flusher.bytes_per_second.store(20 * MIB, Ordering::Relaxed);
    slow.write(160 * MIB, MIB);
    let limit = slow.cache.dirty_limit_bytes();
    assert!((10 * MIB..12 * MIB).contains(&limit), "{limit}");
    assert!(slow.metrics.pagecache_writer_throttled_us.get() > 10_000_000);
}

#[test]
fn one_seed_is_one_run_with_pauses_too() {
    let run = || {
        let slow = Slow::new(30 * MIB);
        (slow.write(200 * MIB, 128 << 10), slow.env.monotonic())
    };
    assert!(run() == run());
}

#[test]
fn a_paused_writer_is_thrown_out_when_the_cache_is_latched() {
    let slow = Slow::new(40 * MIB);
    slow.write(128 * MIB, MIB);
    slow.env.unregister_all();
    while slow.cache.unwritten_bytes() + MIB <= slow.cache.dirty_limit_bytes() {
        slow.file.write(slow.cache.unwritten_bytes(), &[1; MIB as usize]).unwrap();
    }
    slow.cache.latch(Error::Latched { reason: "a test".into() });
    let before = slow.env.monotonic();
    slow.cache.pace_writer(MIB).unwrap();
    assert_eq!(slow.env.monotonic(), before, "no pause");
}
