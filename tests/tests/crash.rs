//! Power cuts against the whole filesystem: the fixed workloads at every boundary, and random ones by seed. (That broken builds are caught, `crash_program`
//! shows.)
//!
//! `COPPICE_SEED=n` sets the seed; `COPPICE_CRASH_LONG=1` tries every plan at every boundary, and many more seeds.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Instant;

use coppicefs::device::{BlockDevice, MemDevice, ReadRequest, WriteRequest};
use coppicefs::env::Env;
use coppicefs::filesystem::format::test_geometry;
use coppicefs::filesystem::{Filesystem, OpenOptions, WorkerSet};
use coppicefs::format::checksum::{ChecksumKind, CompressionKind};
use coppicefs::recovery::{Salvage, SalvageOptions};
use coppicefs::space::TestSwitches;
use coppicefs::vfs::Caller;
use coppicefs_tests::crash::{CrashOptions, Fault, Report, run, seed_or};
use coppicefs_tests::filesystem_subject::Coppice;
use coppicefs_tests::limit::{Limit, lengthen};
use coppicefs_tests::operation::Operation;
use coppicefs_tests::workloads;

const DEVICE_BYTES: u64 = 16 << 20;

fn is_long() -> bool {
    std::env::var_os("COPPICE_CRASH_LONG").is_some_and(|value| value != "0")
}

/// With so many plans at each boundary; many more in the long form.
fn options(plans_max: usize) -> CrashOptions {
    let mut options =
        CrashOptions { seed: seed_or(1), device_bytes: DEVICE_BYTES, after_kill: 1, ..CrashOptions::default() };
    options.plans.limit = Some(if is_long() { plans_max * 16 } else { plans_max });
    if is_long() {
        lengthen(24);
        options.plans.samples = 32;
        options.during_recovery = 8;
    }
    options
}

fn crash(subject: &Coppice, name: &str, operations: &[Operation], options: &CrashOptions) -> Report {
    // Simulated: whoever waits for ever spins or waits for a lock.
    let _limit = Limit::new();
    let start = Instant::now();
    let report = run(subject, operations, options).unwrap_or_else(|failure| panic!("{name}: {failure}"));
    println!("{name}: {report:?}, {:.1} s", start.elapsed().as_secs_f64());
    report
}

/// All of these, one after the other.
fn crash_all(subject: &Coppice, what: &str, workloads: Vec<(&str, Vec<Operation>)>, options: &CrashOptions) -> Report {
    let mut total = Report::default();
    for (name, operations) in workloads {
        let report = crash(subject, &format!("{what}, {name}"), &operations, options);
        total.add(&report);
    }
    println!("{what}: {total:?}");
    total
}

#[test]
fn fixed_workloads_survive_a_cut_at_every_boundary() {
    let total = crash_all(&Coppice::default(), "fixed", workloads::all(), &options(16));
    assert!(total.images > 1000 && total.recovery_crashes > 1000, "{total:?}");
}

#[test]
fn more_workloads_survive_a_cut_at_every_boundary() {
    let subject = Coppice::default();
    let workloads = workloads::more();
    assert!(workloads.len() >= 40);
    let total = crash_all(&subject, "more", workloads, &CrashOptions { during_recovery: 1, ..options(5) });
    assert!(total.images > 1000, "{total:?}");
}

#[test]
fn each_mutation_alone_survives_a_cut_at_every_boundary() {
    let workloads = workloads::alone();
    assert!(workloads.len() >= 40);
    for (name, operations) in workloads {
        let is_large = name == "names during compaction" || name == "mutations between checkpoints";
        if is_large && !is_long() {
            continue;
        }
        let device_bytes = workloads::device_bytes(name);
        let options = CrashOptions { device_bytes, during_recovery: 1, after_kill: 0, ..options(4) };
        crash(&Coppice::default(), name, &operations, &options);
    }
}

/// All workloads in the long form; in the short form every so manieth, from the one that the seed says.
fn slice(one_in: usize) -> Vec<(&'static str, Vec<Operation>)> {
    let all = workloads::all().into_iter().chain(workloads::more());
    if is_long() { all.collect() } else { all.skip(seed_or(1) as usize % one_in).step_by(one_in).collect() }
}

fn few() -> CrashOptions {
    CrashOptions { during_recovery: if is_long() { 2 } else { 1 }, ..options(4) }
}

fn with_format(compression: CompressionKind, checksum: ChecksumKind) -> Coppice {
    let mut subject = Coppice::default();
    subject.format.defaults.compression = compression as u8;
    subject.format.defaults.compression_level = 3;
    subject.format.defaults.checksum = checksum as u8;
    subject
}

#[test]
fn compressed_files_survive() {
    for (compression, checksum) in
        [(CompressionKind::Lz4, ChecksumKind::Crc32c), (CompressionKind::Zstd, ChecksumKind::Xxh3)]
    {
        let subject = with_format(compression, checksum);
        let workloads = slice(5).into_iter().map(|(name, operations)| (name, workloads::compressible(operations)));
        let what = format!("{compression:?}, {checksum:?}");
        crash_all(&subject, &what, workloads.collect(), &few());
    }
}

#[test]
fn other_checksums_and_none_survive() {
    for checksum in [ChecksumKind::Xxh3, ChecksumKind::None] {
        let subject = with_format(CompressionKind::None, checksum);
        crash_all(&subject, &format!("checksum {checksum}"), slice(7), &few());
    }
}

/// `commit=0`: every operation is durable when it returns, with nothing that syncs.
#[test]
fn every_operation_is_durable_with_commit_at_once() {
    let subject = Coppice { commit_at_once: true, ..Coppice::default() };
    crash_all(&subject, "commit=0", slice(5), &few());
}

#[test]
fn trees_that_split_and_merge_survive() {
    let subject = Coppice::default();
    let (name, operations) = workloads::large().swap_remove(0);
    crash(&subject, name, &operations, &options(4));
    assert!(subject.counter("btree.splits") > 0 && subject.counter("btree.merges") > 0, "{:?}", subject.counters);
}

#[test]
fn compaction_survives() {
    let subject = Coppice::default();
    let (name, operations) = workloads::large().swap_remove(1);
    crash(&subject, name, &operations, &CrashOptions { device_bytes: 8 << 20, during_recovery: 1, ..options(2) });
    assert!(subject.counter("copygc.buckets") > 0, "{:?}", subject.counters);
}

#[test]
fn compaction_of_compressed_files_survives() {
    let subject = with_format(CompressionKind::Lz4, ChecksumKind::None);
    let (name, operations) = workloads::large().swap_remove(1);
    let options = CrashOptions { device_bytes: 8 << 20, during_recovery: 1, ..options(1) };
    crash(&subject, &format!("compressed {name}"), &workloads::compressible(operations), &options);
}

#[test]
fn random_workloads_survive() {
    let first = seed_or(1);
    let subject = Coppice::default();
    for seed in first..first + if is_long() { 200 } else { 8 } {
        let operations = workloads::random(seed, if is_long() { 150 } else { 60 });
        let options = CrashOptions { seed, ..options(8) };
        crash(&subject, &format!("random {seed}"), &operations, &options);
    }
}

/// Whatever the number of threads, and although a new filesystem has a random id.
#[test]
fn one_seed_is_one_run() {
    let operations = workloads::by_name("append").expect("a workload");
    let options = CrashOptions { threads: 1, lost_writes: 1, ..options(6) };
    let one = crash(&Coppice::default(), "one thread", &operations, &options);
    let other = crash(&Coppice::default(), "three threads", &operations, &CrashOptions { threads: 3, ..options });
    assert_eq!(one, other);
}

/// Every flush lies: what is left is an older state, or is refused. Both happen.
#[test]
fn a_device_that_lies_leaves_an_older_state_or_is_refused() {
    let options = CrashOptions { device_lies: true, during_recovery: 0, after_kill: 0, ..options(12) };
    let workloads = ["create, write, fsync", "checkpoint in the middle"];
    let workloads = workloads.map(|name| (name, workloads::by_name(name).expect("a workload"))).into();
    let total = crash_all(&Coppice::default(), "lies", workloads, &options);
    assert!(total.refused > 20 && total.images > 2 * total.refused, "{total:?}");
}

/// A device that is nearly full, and caches that hold less than the files.
#[test]
fn random_workloads_survive_without_space_and_memory() {
    let subject = Coppice { cache_bytes: 4 << 20, ..Coppice::default() };
    let seeds = if is_long() { 40 } else { 1 };
    let first = seed_or(1);
    let mut total = Report::default();
    let options = CrashOptions { device_bytes: 32 << 20, during_recovery: 0, after_kill: 0, ..options(1) };
    crash(&subject, "more than fits the cache", &workloads::more_than_memory(), &options);
    assert!(subject.counter("pagecache.evicted_folios") > 0, "{:?}", subject.counters);
    for seed in first..first + seeds {
        let during_recovery = if is_long() { 2 } else { 0 };
        let after_kill = during_recovery;
        let small = CrashOptions { device_bytes: 8 << 20, may_lack_space: true, ..options.clone() };
        let mut options = CrashOptions { during_recovery, after_kill, seed, ..small };
        options.plans.limit = options.plans.limit.map(|limit| 2 * limit);
        total.add(&crash(&subject, &format!("full {seed}"), &workloads::full(seed, 80), &options));
    }
    assert!(total.lacked_space > 0, "{total:?}");
}

/// The nth write or flush fails: what was acknowledged before is there, nothing is acknowledged afterwards.
#[test]
fn what_was_acknowledged_before_a_failed_write_or_flush_is_there() {
    let operations = workloads::by_name("checkpoint in the middle").expect("a workload");
    let count = if is_long() { 60 } else { 5 };
    let mut total = Report::default();
    for nth in 0..count {
        for fault in [Fault::Write(2 + nth * 13 % 71), Fault::Flush(1 + nth * 5 % 23)] {
            let options = CrashOptions { fault: Some(fault), during_recovery: 0, after_kill: 0, ..options(3) };
            total.add(&crash(&Coppice::default(), &format!("{fault:?}"), &operations, &options));
        }
    }
    assert!(total.faults > count as usize, "{total:?}");
}

#[test]
fn records_of_one_batch() {
    // As the broken chain is shown: a cut between them, then one during the recovery.
    let options = CrashOptions { recovery_one_in: 1, during_recovery: 2, recovery_boundaries_max: 1, ..options(32) };
    let subject = Coppice { record_bytes_max: 4096, ..Coppice::default() };
    crash_all(&subject, "small records", vec![("batches of records", workloads::batches())], &options);
}

/// What D is for: a device that loses one write of the log, which it had acknowledged, is noticed, or nothing was reused since.
fn losing() -> CrashOptions {
    CrashOptions { lost_writes: 3, during_recovery: 0, after_kill: 0, ..options(1) }
}

fn reusing() -> impl Iterator<Item = (&'static str, Vec<Operation>)> {
    workloads::all().into_iter().filter(|(name, _)| *name == "bucket reuse")
}

#[test]
fn a_lost_write_of_the_log_is_refused_or_harmless() {
    let switches = TestSwitches { reuse_first: true, ..TestSwitches::default() };
    let subject = Coppice { switches, ..Coppice::default() };
    let total = crash_all(&subject, "a lost write", reusing().collect(), &losing());
    assert!(total.lost > 200, "{total:?}");
}

/// A device that at some moment stops to write to the log: it acknowledges such writes all the same.
#[derive(Debug)]
struct Forgetful {
    below: Arc<MemDevice>,
    log: Vec<std::ops::Range<u64>>,
    forgets: AtomicBool,
}

impl BlockDevice for Forgetful {
    fn name(&self) -> &str {
        "forgetful"
    }
    fn size_bytes(&self) -> u64 {
        self.below.size_bytes()
    }
    fn block_bytes(&self) -> u32 {
        self.below.block_bytes()
    }
    fn is_read_only(&self) -> bool {
        false
    }
    fn read_batch(&self, requests: &mut [ReadRequest<'_>], landed: &mut dyn FnMut(usize, coppicefs::Result<()>)) {
        self.below.read_batch(requests, landed);
    }
    fn write_batch(&self, requests: &[WriteRequest<'_>]) -> coppicefs::Result<()> {
        let forgets = self.forgets.load(Ordering::SeqCst);
        let is_lost =
            |request: &&WriteRequest<'_>| forgets && self.log.iter().any(|range| range.contains(&request.offset));
        let kept: Vec<_> = requests.iter().filter(|request| !is_lost(request)).cloned().collect();
        self.below.write_batch(&kept)
    }
    fn flush(&self) -> coppicefs::Result<()> {
        self.below.flush()
    }
    fn discard(&self, offset: u64, length: u64) -> coppicefs::Result<()> {
        self.below.discard(offset, length)
    }
}

/// Images of a checkpoint hold changes of records that the device has lost though it had acknowledged them. The end of the log was taken for its end, and the
/// trees mixed what was before and behind it.
#[test]
fn a_log_that_ends_before_what_its_checkpoint_holds_is_damage() {
    const CALLER: Caller = Caller { uid: 0, gid: 0, pid: 1, umask: 0o022 };
    let _limit = Limit::new();
    let memory = Arc::new(MemDevice::new(64 << 20));
    let plain: Arc<dyn BlockDevice> = Arc::clone(&memory) as _;
    Filesystem::format(&plain, &test_geometry(), &Env::real()).unwrap();
    let superblock = coppicefs::recovery::superblock::read(&*plain).unwrap().superblock;
    let bucket_bytes = u64::from(superblock.geometry.bucket_bytes);
    let ring = |range: &coppicefs::format::superblock::BucketRange| {
        range.first * bucket_bytes..(range.first + range.count) * bucket_bytes
    };
    let log = superblock.layout.journal.iter().map(ring).collect();
    let device = Arc::new(Forgetful { below: Arc::clone(&memory), log, forgets: AtomicBool::new(false) });
    let options = OpenOptions { workers: WorkerSet::Essential, cache_bytes: 16 << 20, ..OpenOptions::default() };
    let filesystem = Filesystem::open(vec![Arc::clone(&device) as _], &options).unwrap();
    let reader = coppicefs::btree::NodeReader::new(
        Arc::new(superblock),
        vec![Arc::clone(&plain)],
        Arc::clone(filesystem.metrics()),
    );
    let (is_done, made) = (AtomicBool::new(false), AtomicU32::new(0));
    let image = std::thread::scope(|scope| {
        for thread in 0..2_u32 {
            let (filesystem, is_done, made) = (&filesystem, &is_done, &made);
            scope.spawn(move || {
                for number in 0..u32::MAX {
                    let name = format!("{thread}.{number}");
                    let outcome = filesystem.vfs().mkdir(&CALLER, 1, std::ffi::OsStr::new(&name), 0o755);
                    if outcome.is_err() || is_done.load(Ordering::SeqCst) {
                        break;
                    }
                    made.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        // Images hold what is committed while the checkpoint is made.
        let mut image = None;
        for _ in 0..2000 {
            let before = made.load(Ordering::SeqCst);
            while made.load(Ordering::SeqCst) < before + 20 {
                std::thread::yield_now();
            }
            device.forgets.store(true, Ordering::SeqCst);
            filesystem.checkpoint().unwrap();
            let newest = reader.checkpoints().remove(0);
            if newest.newest_sequence >= newest.first_replay {
                image = Some(memory.image());
                break;
            }
        }
        is_done.store(true, Ordering::SeqCst);
        image.expect("no checkpoint was made beside a commit")
    });
    filesystem.close().unwrap();
    let after: Arc<dyn BlockDevice> = Arc::new(MemDevice::from_image(image, false));
    for read_only in [false, true] {
        let options = OpenOptions { read_only, env: Some(Env::simulated(1)), ..options.clone() };
        let refused = Filesystem::open(vec![Arc::clone(&after)], &options).map(|_| ()).unwrap_err().to_string();
        assert!(refused.contains("journal record") && refused.contains("was durable"), "{refused}");
    }
    let salvage = Salvage::open(vec![after], SalvageOptions::default()).unwrap();
    assert!(salvage.warnings().iter().any(|warning| warning.contains("the journal is damaged")));
}
