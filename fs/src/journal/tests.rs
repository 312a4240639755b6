//! The journal against plain lists of what was appended: units here; crashes, every
//! schedule, damage and threads in the files beside.

mod crash;
mod interleaving;
mod reading;
mod threads;

use super::*;
use crate::device::{MemDevice, SimDevice, SimOptions};
use crate::env::Progress;
use crate::format::checkpoint::Checkpoint;
use crate::format::journal::{Entries, Entry, encode_key};
use crate::format::{BtreeId, Position};

const BUCKET_BYTES: u32 = 64 << 10;

/// One copy for each range, on the devices that the ranges name.
fn config(devices: Vec<std::sync::Arc<dyn BlockDevice>>, copies: Vec<BucketRange>) -> JournalConfig {
    JournalConfig {
        filesystem: Uuid::from_u128(7),
        devices,
        copies,
        bucket_bytes: BUCKET_BYTES,
        record_bytes_max: 16 << 10,
        commit_interval: Some(Duration::from_secs(1)),
        switches: crate::alloc::TestSwitches::default(),
    }
}

/// `count` buckets from `first` on device 0.
fn range(first: u64, count: u64) -> BucketRange {
    BucketRange { device: 0, first, count }
}

/// Two copies of a ring of `buckets` buckets of 16 blocks, on one device.
fn two_copies(device: std::sync::Arc<dyn BlockDevice>, buckets: u64) -> JournalConfig {
    config(vec![device], vec![range(1, buckets), range(1 + buckets, buckets)])
}

fn memory_config() -> JournalConfig {
    two_copies(std::sync::Arc::new(MemDevice::new(1 << 20)), 2)
}

fn simulated(buckets: u64, seed: u64) -> (std::sync::Arc<SimDevice>, JournalConfig) {
    let options = SimOptions { seed, ..SimOptions::default() };
    let device = std::sync::Arc::new(SimDevice::new((1 + 2 * buckets) * u64::from(BUCKET_BYTES), options));
    (device.clone(), two_copies(device, buckets))
}

/// A checkpoint that names a boundary.
fn checkpoint(boundary: &Boundary, epoch: u64) -> Checkpoint {
    Checkpoint {
        number: 1,
        epoch,
        first_replay: boundary.first_replay.0,
        first_replay_offset: boundary.offset,
        previous_record_checksum: boundary.previous_checksum,
        newest_sequence: 0,
        roots: Vec::new(),
        totals: boundary.totals.to_stored(),
        next_node: 1,
        clean: false,
        map: Vec::new(),
        written_at: 0,
    }
}

/// The checkpoint of a new filesystem.
fn first_checkpoint() -> Checkpoint {
    let start = JournalStart::fresh();
    let (first_replay, offset) = (start.next, start.offset);
    checkpoint(&Boundary { first_replay, offset, previous_checksum: 0, totals: Totals::default() }, 0)
}

/// An entry that names `number`, padded with a value of `bytes` bytes.
fn entry(number: u64, bytes: usize) -> Vec<u8> {
    let mut out = Vec::new();
    encode_key(BtreeId::Inodes, Position::new(number, 0, 0), Some(&vec![number as u8; bytes]), &mut out);
    out
}

/// The numbers in a record, in order.
fn numbers(record: &LogRecord) -> Vec<u64> {
    let keys = Entries::new(&record.payload).filter_map(|entry| match entry.unwrap() {
        Entry::Key { key, .. } => Some(key.position.inode),
        _ => None,
    });
    keys.collect()
}

fn log_numbers(log: &Log) -> Vec<u64> {
    log.records.iter().flat_map(numbers).collect()
}

/// Commits one entry if there is room for it at once.
fn try_commit(journal: &Journal, number: u64, bytes: usize, watermark: JournalWatermark) -> Option<JournalSequence> {
    let payload = entry(number, bytes);
    let reservation = journal.try_reserve(payload.len(), watermark)?;
    let sequence = reservation.sequence();
    let accounting = [(AccountingCounter::Inodes, 1), (AccountingCounter::DataBytes, number as i64)];
    journal.append(reservation, payload, 1, &accounting, false);
    Some(sequence)
}

/// Commits one entry: its sequence.
fn commit(journal: &Journal, number: u64, bytes: usize) -> JournalSequence {
    loop {
        if let Some(sequence) = try_commit(journal, number, bytes, JournalWatermark::Normal) {
            return sequence;
        }
        journal.wait_for_space(entry(number, bytes).len(), JournalWatermark::Normal).unwrap();
    }
}

fn open(config: &JournalConfig, start: JournalStart) -> std::sync::Arc<Journal> {
    Journal::open(config.clone(), start, Env::simulated(1), Default::default()).unwrap()
}

/// A boundary, and a checkpoint of it that is durable.
fn take_checkpoint(journal: &Journal, epoch: u64) -> Checkpoint {
    let boundary = journal.boundary().unwrap();
    journal.flush(journal.newest()).unwrap();
    checkpoint(&boundary, epoch)
}

fn release(journal: &Journal, older_kept: &Checkpoint) {
    journal.release_before(older_kept.first_replay_offset, JournalSequence(older_kept.first_replay));
}

/// Steps the worker until it is idle; what it then asks for.
fn run_worker(journal: &Journal) -> Option<Duration> {
    let workers = journal.workers();
    for _ in 0..100 {
        if let Progress::Idle(timeout) = workers[0].step(8).unwrap() {
            return timeout;
        }
    }
    panic!("the worker never rests");
}

/// Lets the worker run for `duration` of simulated time.
fn run_for(env: &Env, journal: &Journal, duration: Duration) {
    let end = env.monotonic() + duration;
    run_worker(journal);
    // The scheduler's clock stands at deadlines only: `step_random_worker` notes them, `advance_clock` goes there.
    loop {
        while env.step_random_worker().unwrap() {}
        if env.monotonic() >= end || !env.advance_clock() {
            return;
        }
    }
}

#[test]
fn what_is_committed_is_read_back_and_continued() {
    let config = memory_config();
    let mut expected = Vec::new();
    let from = first_checkpoint();
    for life in 0..3 {
        let log = read_log(&config, &from).unwrap();
        assert_eq!(log_numbers(&log), expected);
        let start = log.start(&from, &from).unwrap();
        assert_eq!(start.totals.get(AccountingCounter::Inodes), expected.len() as i64);
        assert_eq!(start.epoch, life + 1);
        let journal = open(&config, start);
        assert_eq!(journal.reusable(), JournalSequence(0));
        for number in 0..10 {
            let sequence = commit(&journal, life * 100 + number, 100);
            expected.push(life * 100 + number);
            if number % 3 == 0 {
                journal.flush(sequence).unwrap();
                assert!(journal.flushed() >= sequence);
            }
        }
        journal.close().unwrap();
        assert_eq!(journal.totals().get(AccountingCounter::Inodes), expected.len() as i64);
    }
}

#[test]
fn entries_stand_in_the_order_of_reservation() {
    let config = memory_config();
    let journal = open(&config, JournalStart::fresh());
    let reservations: Vec<_> = (0..5).map(|_| journal.try_reserve(200, JournalWatermark::Normal).unwrap()).collect();
    assert!(reservations.iter().all(|reservation| reservation.sequence() == JournalSequence(2)));
    for (number, reservation) in reservations.into_iter().enumerate().rev() {
        journal.append(reservation, entry(number as u64, 50), 1, &[], false);
    }
    journal.close().unwrap();
    assert_eq!(log_numbers(&read_log(&config, &first_checkpoint()).unwrap()), [0, 1, 2, 3, 4]);
}

#[test]
fn a_dropped_reservation_holds_nothing_up() {
    let config = memory_config();
    let journal = open(&config, JournalStart::fresh());
    let dropped = journal.try_reserve(100, JournalWatermark::Normal).unwrap();
    commit(&journal, 5, 10);
    let before = journal.newest();
    let unwound = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
        let _held = dropped;
        std::panic::resume_unwind(Box::new("a bug between reserve and append"));
    }));
    assert!(unwound.is_err());
    journal.flush(before).unwrap();
    assert_eq!(log_numbers(&read_log(&config, &first_checkpoint()).unwrap()), [5]);
}

#[test]
fn more_than_was_reserved_latches() {
    let journal = open(&memory_config(), JournalStart::fresh());
    let reservation = journal.try_reserve(4, JournalWatermark::Normal).unwrap();
    journal.append(reservation, vec![0; 5], 1, &[], false);
    assert!(matches!(journal.flush(JournalSequence(2)), Err(Error::Latched { .. })));
}

#[test]
fn a_boundary_cuts_totals_exactly() {
    let config = memory_config();
    let journal = open(&config, JournalStart::fresh());
    let mut sum = 0;
    let mut boundaries = Vec::new();
    for number in 1..20u64 {
        let before = journal.boundary().unwrap();
        assert_eq!(before.totals.get(AccountingCounter::DataBytes), sum);
        assert!(commit(&journal, number, 10) >= before.first_replay);
        sum += number as i64;
        boundaries.push((before, number));
    }
    journal.close().unwrap();
    for (boundary, first) in boundaries {
        let from = checkpoint(&boundary, 1);
        let log = read_log(&config, &from).unwrap();
        assert_eq!(log_numbers(&log), (first..20).collect::<Vec<_>>());
        assert_eq!(log.totals(&from).unwrap(), journal.totals());
    }
}

#[test]
fn one_flush_serves_a_batch_and_data_is_flushed_before_its_record() {
    let (device, config) = simulated(2, 1);
    let metrics = std::sync::Arc::new(Metrics::default());
    let journal = Journal::open(config, JournalStart::fresh(), Env::simulated(1), metrics.clone()).unwrap();
    journal.flush(journal.newest()).unwrap();
    let flushes = || metrics.journal_flushes.get();
    let before = flushes();
    for number in 0..10 {
        commit(&journal, number, 10);
    }
    journal.flush(journal.newest()).unwrap();
    assert_eq!(flushes() - before, 1, "ten commits, one flush");
    journal.flush(journal.newest()).unwrap();
    assert_eq!(flushes() - before, 1, "nothing new");

    let data_commit = || {
        let payload = entry(1, 10);
        let reservation = journal.try_reserve(payload.len(), JournalWatermark::Normal).unwrap();
        let sequence = reservation.sequence();
        journal.append(reservation, payload, 1, &[], true);
        sequence
    };
    // At the write of the record, the data that it names must not be among what a power cut can undo.
    device.write(u64::from(BUCKET_BYTES) * 5 - 512, &[1; 512]).unwrap();
    let sequence = data_commit();
    let unflushed_at_write = std::sync::Arc::new(Mutex::new(Vec::new()));
    let seen = unflushed_at_write.clone();
    device.set_hook(move |device, _| seen.lock().push(device.unflushed_count()));
    journal.flush(sequence).unwrap();
    device.clear_hook();
    // Flush with the data; two copies, the first without anything before it; flush.
    assert_eq!(*unflushed_at_write.lock(), [1, 0, 1, 2]);
    assert_eq!(flushes() - before, 3);

    // Any flush covers data that was appended before it: none of its own is needed for the record.
    let sequence = data_commit();
    let open_record = journal.newest();
    journal.flush(sequence).unwrap();
    assert_eq!(flushes() - before, 5);
    assert_eq!(open_record, sequence);
}

#[test]
fn reusable_follows_the_next_durable_record() {
    let config = memory_config();
    let journal = open(&config, JournalStart::fresh());
    let first = commit(&journal, 1, 10);
    journal.flush(first).unwrap();
    assert!(journal.reusable() < first, "no durable record says that it is durable");
    let second = commit(&journal, 2, 10);
    journal.flush(second).unwrap();
    assert!(journal.reusable() >= first && journal.reusable() < second);
    assert!(journal.make_reusable(second, JournalWatermark::Reclaim).unwrap());
    assert!(journal.reusable() >= second);
    let newest = journal.newest();
    assert!(journal.make_reusable(second, JournalWatermark::Reclaim).unwrap());
    assert_eq!(journal.newest(), newest, "no further record for what is stated");
}

#[test]
fn the_worker_commits_in_time_and_states_what_is_durable() {
    let env = Env::simulated(3);
    let config = memory_config();
    let journal = Journal::open(config, JournalStart::fresh(), env.clone(), Default::default()).unwrap();
    env.register(journal.workers().remove(0));
    run_for(&env, &journal, Duration::from_secs(5));
    assert!(journal.flushed() < JournalSequence(1), "an idle journal writes nothing durable");
    let sequence = commit(&journal, 1, 10);
    assert_eq!(run_worker(&journal), Some(Duration::from_secs(1)));
    assert!(journal.flushed() < sequence);
    run_for(&env, &journal, Duration::from_secs(1));
    assert!(journal.flushed() >= sequence);
    // An empty record states it within 50 ms, and then there is silence.
    run_for(&env, &journal, Duration::from_millis(50));
    assert_eq!(journal.inner.state.lock().stated, sequence);
    let newest = journal.newest();
    run_for(&env, &journal, Duration::from_secs(60));
    assert_eq!(journal.newest(), newest);
    assert!(journal.reusable() < sequence, "nobody asked for the flush");
    journal.want_reusable(sequence);
    run_for(&env, &journal, Duration::from_millis(50));
    assert!(journal.reusable() >= sequence);
    let newest = journal.newest();
    journal.want_reusable(JournalSequence(u64::MAX));
    run_for(&env, &journal, Duration::from_secs(60));
    assert!(journal.newest() <= newest.next().next(), "a wish for the future must not write for ever");
}

#[test]
fn with_commit_zero_the_worker_flushes_at_once() {
    let mut config = memory_config();
    config.commit_interval = None;
    let journal = open(&config, JournalStart::fresh());
    assert!(journal.commits_at_once());
    let sequence = commit(&journal, 1, 10);
    run_worker(&journal);
    assert!(journal.flushed() >= sequence);
}

#[test]
fn a_full_ring_keeps_room_for_those_who_empty_it() {
    let (_, config) = simulated(1, 1);
    let journal = open(&config, JournalStart::fresh());
    let asked = Arc::new(AtomicU64::new(0));
    let asked_by_hook = Arc::clone(&asked);
    journal.set_pressure_hook(Box::new(move || {
        asked_by_hook.fetch_add(1, Ordering::Relaxed);
    }));
    let mut counts = [0; 3];
    let watermarks = [JournalWatermark::Normal, JournalWatermark::Reclaim, JournalWatermark::Checkpoint];
    for (count, watermark) in counts.iter_mut().zip(watermarks) {
        while try_commit(&journal, 1, 3000, watermark).is_some() {
            *count += 1;
            journal.flush(journal.newest()).unwrap();
        }
    }
    // Of 16 blocks: one for the first record of the mount, 8 for ordinary commits, then two for each of the others.
    assert_eq!(counts, [7, 2, 2]);
    assert_eq!(asked.load(Ordering::Relaxed), 1);
    assert!(journal.fill_permille() >= 1000);
    assert!(journal.try_reserve(10, JournalWatermark::Normal).is_none(), "a new record needs a block");
    let newest = journal.newest();
    assert!(
        !journal.make_reusable(newest, JournalWatermark::Reclaim).unwrap(),
        "what checkpoints need is left to them"
    );
    let stated = journal.inner.make_reusable(newest, ring::Statement::Release).unwrap();
    assert!(stated, "and there is still room to state D");
    assert!(journal.reusable() >= newest);
    // Nobody can make room here, and the simulation sees that.
    assert!(matches!(journal.wait_for_space(10, JournalWatermark::Normal), Err(Error::Bug(_))));
    assert_eq!(asked.load(Ordering::Relaxed), 3);
    // A checkpoint that waited for a checkpoint would wait for ever: it is told at once.
    assert!(matches!(journal.wait_for_space(3000, JournalWatermark::Checkpoint), Err(Error::Bug(_))));
    assert!(matches!(journal.wait_for_space(1 << 20, JournalWatermark::Normal), Err(Error::Bug(_))));

    let first = take_checkpoint(&journal, 1);
    release(&journal, &first_checkpoint());
    assert!(journal.try_reserve(10, JournalWatermark::Normal).is_none(), "the older checkpoint needs everything");
    release(&journal, &first);
    journal.wait_for_space(10, JournalWatermark::Normal).unwrap();
    commit(&journal, 2, 10);
    journal.close().unwrap();
    assert_eq!(log_numbers(&read_log(&config, &first).unwrap()), [2]);
}

/// Mechanism: while a reservation is not appended, its record cannot be encoded, nor what is behind it; so D, which was to be stated, stayed unstated, and
/// the worker sealed one empty record after the other. Consequence: a full ring of them, and everybody waited for a checkpoint that had no room.
#[test]
fn statements_behind_a_slow_reservation_do_not_fill_the_ring() {
    let env = Env::simulated(3);
    let (_, config) = simulated(2, 1);
    let journal = Journal::open(config, JournalStart::fresh(), env.clone(), Default::default()).unwrap();
    env.register(journal.workers().remove(0));
    let durable = commit(&journal, 1, 10);
    journal.flush(durable).unwrap();
    let payload = entry(2, 10);
    let slow = journal.try_reserve(payload.len(), JournalWatermark::Normal).unwrap();
    journal.want_reusable(durable);
    let fill = journal.fill_permille();
    let worker = journal.workers().remove(0);
    for _ in 0..100 {
        env.advance_clock();
        let _ = worker.step(8);
        let _ = env.step_random_worker();
    }
    let (newest, fill_after) = (journal.newest(), journal.fill_permille());
    assert!(newest <= slow.sequence().next(), "record {newest} behind the slow one {}", slow.sequence());
    assert!(fill_after <= fill + 100, "the ring went from {fill} to {fill_after} permille by itself");
    journal.append(slow, payload, 1, &[], false);
    run_for(&env, &journal, Duration::from_millis(200));
    assert!(journal.reusable() >= durable, "what was wanted is stated in the end");
}

/// Mechanism: the open record grew over the ring's end, so the whole of it moved to the next lap. Consequence: a few bytes took as many blocks as
/// the record had, out of the reserve of those who asked.
#[test]
fn a_record_that_grows_does_not_leave_the_end_of_the_ring_unused() {
    let (_, config) = simulated(2, 1);
    let mut laps = 0;
    for lead in 8..40 {
        let journal = open(&config, JournalStart::fresh());
        let make_room = || {
            let kept = take_checkpoint(&journal, 1);
            release(&journal, &kept);
            journal.wait_for_space(3000, JournalWatermark::Normal).unwrap();
        };
        for _ in 0..lead {
            if try_commit(&journal, 1, 3000, JournalWatermark::Normal).is_none() {
                make_room();
                commit(&journal, 1, 3000);
            }
            journal.flush(journal.newest()).unwrap();
        }
        make_room();
        let start = journal.inner.chain.lock().position;
        let mut before = journal.fill_permille();
        // A block is 45 permille of the 22 that ordinary commits may fill.
        while try_commit(&journal, 1, 1000, JournalWatermark::Normal).is_some() {
            let now = journal.fill_permille();
            assert!(
                now <= before + 95,
                "1000 bytes took the ring from {before} to {now} permille, from block {lead} on"
            );
            before = now;
        }
        journal.flush(journal.newest()).unwrap();
        let ring_bytes = 2 * u64::from(BUCKET_BYTES);
        laps += u64::from(journal.inner.chain.lock().position / ring_bytes > start / ring_bytes);
    }
    assert!(laps > 5, "the end of the ring was passed {laps} times");
}

#[test]
fn a_release_waits_for_a_durable_statement() {
    let (_, config) = simulated(1, 1);
    let journal = open(&config, JournalStart::fresh());
    while try_commit(&journal, 1, 3000, JournalWatermark::Normal).is_some() {}
    let boundary = journal.boundary().unwrap();
    journal.flush(journal.newest()).unwrap();
    let fill = journal.fill_permille();
    journal.release_before(boundary.offset, boundary.first_replay);
    assert_eq!(journal.fill_permille(), fill, "no durable record says that all before F is durable");
    journal.wait_for_space(3000, JournalWatermark::Normal).unwrap();
    assert!(journal.reusable().next() >= boundary.first_replay);
    assert!(journal.fill_permille() < fill);
}

#[test]
fn a_failure_latches_for_ever() {
    for fail_flush in [false, true] {
        let (device, config) = simulated(1, 1);
        let journal = open(&config, JournalStart::fresh());
        let sequence = commit(&journal, 1, 10);
        if fail_flush {
            device.fail_flush(0, rustix::io::Errno::IO);
        } else {
            device.fail_write(1, rustix::io::Errno::IO);
        }
        assert!(matches!(journal.flush(sequence), Err(Error::Latched { .. })));
        assert!(journal.flushed() < sequence);
        device.clear_faults();
        assert!(matches!(journal.flush(sequence), Err(Error::Latched { .. })));
        assert!(journal.try_reserve(1, JournalWatermark::Checkpoint).is_none());
        assert!(matches!(journal.wait_for_space(1, JournalWatermark::Checkpoint), Err(Error::Latched { .. })));
        assert!(matches!(journal.boundary(), Err(Error::Latched { .. })));
        assert!(journal.latched().unwrap().contains("failed"));
        assert_eq!(run_worker(&journal), None);
    }
}

#[test]
fn rings_that_do_not_fit_are_refused() {
    let device: std::sync::Arc<dyn BlockDevice> = std::sync::Arc::new(MemDevice::new(1 << 20));
    let bad = [
        vec![],
        vec![range(15, 2)],
        vec![range(u64::MAX, 2)],
        vec![range(1, 2), range(3, 1)],
        vec![BucketRange { device: 1, first: 0, count: 1 }],
        vec![range(0, 0)],
    ];
    for copies in bad {
        let config = config(vec![device.clone()], copies);
        assert!(matches!(read_log(&config, &first_checkpoint()), Err(Error::Corrupt(_))));
        assert!(Journal::open(config, JournalStart::fresh(), Env::simulated(1), Default::default()).is_err());
    }
}
