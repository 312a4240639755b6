//! One file of a whole filesystem under schedules that shuttle picks: cached and direct reads against buffered and direct writes, truncate, punch, fsync,
//! eviction and the filesystem's own workers.
//!
//! As in `pagecache/tests/schedules.rs`: every half block is a register, and what was read must be explained by a serial order of all operations. Nobody
//! may wait for ever, and what a remount shows is what the last operations left. `COPPICE_VFS_SCHEDULES=10000` for long, `COPPICE_SEED=n` for others.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{LazyLock, Mutex as PlainMutex};

use shuttle::rand::{Rng, thread_rng};
use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::thread;

use super::*;
use crate::device::Image;
use crate::sync::history::{Operation, is_explained};
use crate::sync::schedule;

const BLOCKS: u64 = 4;
const HALF: u64 = 2048;
const HALVES: u64 = BLOCKS * 2;
const LENGTH: u64 = HALVES * HALF;

/// What half block `half` holds after `value` was written to it.
fn stamp(half: u64, value: u64) -> Vec<u8> {
    if value == 0 {
        return vec![0; 2048];
    }
    [half, value, !value, 0x5EED].into_iter().flat_map(u64::to_le_bytes).collect::<Vec<u8>>().repeat(64)
}

fn stamps(halves: Range<u64>, value: u64) -> Vec<u8> {
    halves.flat_map(|half| stamp(half, value)).collect()
}

/// A filesystem with the file `f`: value 1 in all but the last block, which is a hole.
static START: LazyLock<Image> = LazyLock::new(|| {
    let mut mount = Mount::simulated(1);
    let file = mount.create(ROOT, "f");
    mount.write(file, 0, &stamps(0..HALVES - 2, 1)).unwrap();
    mount.truncate(file.0, LENGTH).unwrap();
    mount.close();
    mount.device.image()
});

struct World {
    mount: Mount,
    file: (u64, u64),
    clock: AtomicU64,
    values: AtomicU64,
    histories: PlainMutex<Vec<Vec<Operation>>>,
    wrong: PlainMutex<Option<String>>,
}

/// The tasks that step the filesystem's workers, until they are told to stop.
struct Workers {
    stop: Arc<AtomicBool>,
    tasks: Vec<thread::JoinHandle<()>>,
}

impl Workers {
    fn start(env: &Arc<Env>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let start = |_| {
            let (env, stop) = (Arc::clone(env), Arc::clone(&stop));
            thread::spawn(move || {
                while !stop.load(Ordering::SeqCst) {
                    env.step_random_worker().unwrap();
                    schedule::yield_now();
                }
            })
        };
        Self { tasks: (0..2).map(start).collect(), stop }
    }

    fn stop(self) {
        self.stop.store(true, Ordering::SeqCst);
        for task in self.tasks {
            task.join().unwrap();
        }
    }
}

impl World {
    fn new(env: &Arc<Env>) -> Self {
        let device = Arc::new(MemDevice::from_image(START.clone(), false));
        let options = OpenOptions { env: Some(env.clone()), cache_bytes: 4 << 20, ..OpenOptions::default() };
        let mut mount = Mount { device, env: env.clone(), options, filesystem: None };
        mount.open();
        let node = mount.lookup(ROOT, "f").unwrap();
        let first = Operation { begin: 0, end: 0, is_write: true, value: 1 };
        let history = |half| if half < HALVES - 2 { vec![first] } else { Vec::new() };
        Self {
            file: (node, mount.open_file(node)),
            mount,
            clock: AtomicU64::new(1),
            values: AtomicU64::new(2),
            histories: PlainMutex::new((0..HALVES).map(history).collect()),
            wrong: PlainMutex::new(None),
        }
    }

    fn now(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }

    fn record(&self, half: u64, operation: Operation) {
        self.histories.lock().unwrap()[usize::try_from(half).unwrap()].push(operation);
    }

    fn change(&self, halves: Range<u64>, value: u64, body: impl FnOnce()) {
        let begin = self.now();
        body();
        let end = self.now();
        halves.for_each(|half| self.record(half, Operation { begin, end, is_write: true, value }));
    }

    fn read(&self, file: (u64, u64), halves: Range<u64>, direct: bool) {
        let begin = self.now();
        let request = ReadRequest {
            node: file.0,
            handle: file.1,
            offset: halves.start * HALF,
            length_bytes: u32::try_from((halves.end - halves.start) * HALF).unwrap(),
            direct,
        };
        let outcome = self.mount.vfs().read(&USER, &request).map(|pages| pages.to_vec());
        let end = self.now();
        let mut bytes = match outcome {
            Ok(bytes) => bytes,
            Err(error) => {
                self.wrong.lock().unwrap().get_or_insert(format!("a read of {halves:?} failed: {error}"));
                return;
            }
        };
        // Behind the end of the file, which may be shorter for a moment, is what a longer one has there.
        bytes.resize(usize::try_from((halves.end - halves.start) * HALF).unwrap(), 0);
        for (half, bytes) in halves.zip(bytes.chunks(2048)) {
            let value = u64::from_le_bytes(bytes[8..16].try_into().unwrap());
            if bytes != stamp(half, value) {
                let what = format!("half block {half} is torn, or another's: {:?}", &bytes[..32]);
                self.wrong.lock().unwrap().get_or_insert(what);
                return;
            }
            self.record(half, Operation { begin, end, is_write: false, value });
        }
    }

    fn write(&self, halves: Range<u64>, direct: bool) {
        let value = self.values.fetch_add(1, Ordering::SeqCst);
        let data = stamps(halves.clone(), value);
        let request = WriteRequest { direct, ..write_request(self.file.0, self.file.1, halves.start * HALF, &data) };
        self.change(halves, value, || {
            assert_eq!(self.mount.vfs().write(&USER, &request).unwrap() as usize, data.len());
        });
    }

    fn cut(&self, half: u64) {
        self.change(half..HALVES, 0, || {
            self.mount.truncate(self.file.0, half * HALF).unwrap();
        });
        // Makes it longer only: another task may have written meanwhile.
        self.mount.vfs().fallocate(&USER, self.file.0, self.file.1, 0, LENGTH, 0).unwrap();
    }

    fn punch(&self, halves: Range<u64>) {
        let (offset, length) = (halves.start * HALF, (halves.end - halves.start) * HALF);
        self.change(halves, 0, || {
            self.mount.vfs().fallocate(&USER, self.file.0, self.file.1, offset, length, 3).unwrap();
        });
    }

    fn change_anything(&self) {
        let some = |limit: u64| thread_rng().gen_range(0..limit);
        let start = some(HALVES);
        let halves = start..start + 1 + some(HALVES - start).min(3);
        match some(5) {
            0 => self.write(halves, false),
            1 => self.write(start / 2 * 2..start / 2 * 2 + 2, true),
            2 => self.write(halves, true),
            3 => self.punch(halves),
            _ => self.cut(start),
        }
    }

    fn read_anything(&self) {
        let start = thread_rng().gen_range(0..HALVES);
        let end = thread_rng().gen_range(start..HALVES) + 1;
        self.read(self.file, start..end, thread_rng().gen_ratio(1, 3));
    }

    fn make_durable(&self) {
        self.mount.vfs().fsync(&USER, self.file.0, self.file.1, false).unwrap();
        self.mount.filesystem.as_ref().unwrap().cache().evict_all_clean();
    }

    fn check(&mut self) {
        self.mount.reopen();
        let handle = self.mount.open_file(self.file.0);
        self.read((self.file.0, handle), 0..HALVES, false);
        if let Some(what) = self.wrong.lock().unwrap().take() {
            panic!("{what}");
        }
        for (half, history) in self.histories.lock().unwrap().iter().enumerate() {
            assert!(is_explained(history), "no serial order explains what happened to half block {half}: {history:#?}");
        }
    }
}

fn one_schedule() {
    let env = Env::simulated(thread_rng().r#gen());
    let workers = Workers::start(&env);
    let world = Arc::new(World::new(&env));
    let task = |body: fn(&World)| {
        let world = Arc::clone(&world);
        thread::spawn(move || (0..2).for_each(|_| body(&world)))
    };
    let read = World::read_anything;
    let change = World::change_anything;
    let tasks = [task(read), task(read), task(change), task(change), task(World::make_durable)];
    for task in tasks {
        task.join().unwrap();
    }
    let Ok(mut world) = Arc::try_unwrap(world) else { unreachable!("all tasks have ended") };
    world.check();
    world.mount.close();
    drop(world);
    workers.stop();
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn schedules() -> usize {
    usize::try_from(setting("COPPICE_VFS_SCHEDULES", 60)).unwrap()
}

#[test]
fn every_read_of_a_filesystem_is_explained_by_a_serial_order() {
    let count = schedules();
    LazyLock::force(&START);
    let scheduler = RandomScheduler::new_from_seed(setting("COPPICE_SEED", 1), count);
    assert_eq!(schedule::explore(scheduler, one_schedule), count);
}

#[test]
fn every_read_of_a_filesystem_is_explained_where_tasks_run_long() {
    let count = schedules();
    LazyLock::force(&START);
    let scheduler = PctScheduler::new_from_seed(setting("COPPICE_SEED", 1), 4, count);
    assert_eq!(schedule::explore(scheduler, one_schedule), count);
}
