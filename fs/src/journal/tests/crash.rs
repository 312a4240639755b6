//! Random operations, power cuts at any write or flush boundary, any subset of what was not flushed, damage to one copy, and
//! recovery; again and again in one ring; against a list of what was committed.

use proptest::prelude::*;

use super::*;
use crate::device::Snapshot;

#[derive(Clone, Debug)]
enum Operation {
    /// Commit an entry with a value of so many bytes.
    Commit(usize),
    /// Commit it if the ring has room at the highest watermark.
    Privileged(usize),
    /// Two reservations, appended in the other order; the second dropped if set.
    Pair(usize, bool),
    /// Flush the commit that was made so many commits ago.
    Flush(usize),
    Checkpoint,
    Worker,
    WantReusable,
}

fn operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        8 => prop_oneof![0usize..300, 0usize..6000].prop_map(Operation::Commit),
        3 => (0usize..6000).prop_map(Operation::Privileged),
        1 => (0usize..2000, any::<bool>()).prop_map(|(bytes, is_dropped)| Operation::Pair(bytes, is_dropped)),
        4 => (0usize..4).prop_map(Operation::Flush),
        1 => Just(Operation::Checkpoint),
        2 => Just(Operation::Worker),
        1 => Just(Operation::WantReusable),
    ]
}

/// What a power cut would leave and what must then be there.
#[derive(Clone)]
struct Promise {
    snapshot: Snapshot,
    /// Newest sequence that a flush acknowledged, or that was called reusable.
    acknowledged: JournalSequence,
    /// Durable checkpoints, the older first; at most two.
    kept: Vec<Checkpoint>,
}

struct Life {
    journal: std::sync::Arc<Journal>,
    epoch: u64,
    /// What was committed, with its sequence, from the first life on.
    committed: Vec<(JournalSequence, u64)>,
    kept: Vec<Checkpoint>,
    next_number: u64,
}

impl Life {
    fn note(&mut self, sequence: JournalSequence) {
        self.committed.push((sequence, self.next_number));
        self.next_number += 1;
    }

    /// As the forest does it: boundary, everything durable, checkpoint record durable, older space released.
    fn checkpoint(&mut self, shared: &Mutex<(JournalSequence, Vec<Checkpoint>)>) {
        let boundary = self.journal.boundary().unwrap();
        let mut expected = Totals::default();
        for &(_, number) in self.committed.iter().filter(|(sequence, _)| *sequence < boundary.first_replay) {
            expected.add(AccountingCounter::Inodes, 1);
            expected.add(AccountingCounter::DataBytes, number as i64);
        }
        assert_eq!(boundary.totals, expected);
        self.journal.flush(self.journal.newest()).unwrap();
        self.kept.push(checkpoint(&boundary, self.epoch));
        if self.kept.len() > 2 {
            self.kept.remove(0);
        }
        shared.lock().1 = self.kept.clone();
        release(&self.journal, &self.kept[0]);
    }

    fn commit(&mut self, bytes: usize, shared: &Mutex<(JournalSequence, Vec<Checkpoint>)>) {
        let mut checkpoints = 0;
        loop {
            if let Some(sequence) = try_commit(&self.journal, self.next_number, bytes, JournalWatermark::Normal) {
                self.note(sequence);
                return;
            }
            let state = self.journal.inner.state.lock();
            let needs_ring = !state.has_ring_room(entry(self.next_number, bytes).len(), JournalWatermark::Normal);
            let release_waits_for = state.release_waits_for();
            drop(state);
            if !needs_ring {
                self.journal.wait_for_space(entry(0, bytes).len(), JournalWatermark::Normal).unwrap();
            } else if let Some(sequence) = release_waits_for {
                assert!(self.journal.inner.make_reusable(sequence, ring::Statement::Release).unwrap());
            } else {
                checkpoints += 1;
                assert!(checkpoints <= 3, "checkpoints do not make room");
                self.checkpoint(shared);
            }
        }
    }

    fn run(&mut self, operation: &Operation, shared: &Mutex<(JournalSequence, Vec<Checkpoint>)>) {
        let journal = self.journal.clone();
        match operation {
            Operation::Commit(bytes) => self.commit(*bytes, shared),
            Operation::Privileged(bytes) => {
                if let Some(sequence) = try_commit(&journal, self.next_number, *bytes, JournalWatermark::Checkpoint) {
                    self.note(sequence);
                }
            }
            Operation::Pair(bytes, is_dropped) => {
                let Some(first) = journal.try_reserve(bytes + 100, JournalWatermark::Normal) else { return };
                let second = journal.try_reserve(bytes + 100, JournalWatermark::Normal);
                let number = self.next_number;
                let accounting =
                    |number: u64| [(AccountingCounter::Inodes, 1), (AccountingCounter::DataBytes, number as i64)];
                self.note(first.sequence());
                match second {
                    Some(second) if !is_dropped => {
                        self.note(second.sequence());
                        journal.append(second, entry(number + 1, *bytes), 1, &accounting(number + 1), false);
                    }
                    dropped => drop(dropped),
                }
                journal.append(first, entry(number, *bytes), 1, &accounting(number), true);
            }
            Operation::Flush(back) => {
                let Some(&(sequence, _)) = self.committed.iter().rev().nth(*back) else { return };
                journal.flush(sequence).unwrap();
                assert!(journal.flushed() >= sequence);
            }
            Operation::Checkpoint => self.checkpoint(shared),
            Operation::Worker => {
                run_worker(&journal);
            }
            Operation::WantReusable => journal.want_reusable(journal.newest()),
        }
        let mut shared = shared.lock();
        shared.0 = shared.0.max(journal.flushed()).max(journal.reusable());
    }
}

/// Breaks some blocks of one copy of the ring, always the same: what is broken stays so until it is overwritten.
fn damage_one_copy(device: &SimDevice, blocks: u64, copy: u64, seed: u64) {
    let mut random = seed;
    for block in 0..blocks {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let place = u64::from(BUCKET_BYTES) + (copy * blocks + block) * 4096;
        match (random >> 40) % 4 {
            0 => device.flip_bit(place + (random >> 50) % 64, 2),
            1 => device.zero_sectors(place, 512),
            2 => device.make_bad(place, 512),
            _ => {}
        }
    }
}

/// One life: operations until a power cut at boundary `cut_after` of it, or at the end.
fn live(device: &std::sync::Arc<SimDevice>, life: &mut Life, operations: &[Operation], cut_after: u64) -> Promise {
    let shared = std::sync::Arc::new(Mutex::new((JournalSequence(0), life.kept.clone())));
    let promise: std::sync::Arc<Mutex<Option<Promise>>> = Default::default();
    let cut_at = device.boundaries() + cut_after;
    let take = {
        let (promise, shared, journal) = (promise.clone(), shared.clone(), life.journal.clone());
        move |device: &SimDevice| {
            let (acknowledged, kept) = shared.lock().clone();
            let acknowledged = acknowledged.max(journal.flushed()).max(journal.reusable());
            *promise.lock() = Some(Promise { snapshot: device.snapshot(), acknowledged, kept });
        }
    };
    let hook = take.clone();
    device.set_hook(move |device, boundary| {
        if boundary.number == cut_at {
            hook(device);
        }
    });
    for operation in operations {
        life.run(operation, &shared);
        if promise.lock().is_some() {
            break;
        }
    }
    device.clear_hook();
    if promise.lock().is_none() {
        take(device);
    }
    let taken = promise.lock().take();
    taken.unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 2000, ..ProptestConfig::default() })]

    #[test]
    fn what_was_acknowledged_survives_any_power_cut(
        seed in any::<u64>(),
        buckets in 1u64..3,
        lives in proptest::collection::vec((proptest::collection::vec(operation(), 1..60), 0u64..120, any::<u64>()), 1..5),
    ) {
        let (mut device, mut config) = simulated(buckets, seed);
        let mut life = Life {
            journal: open(&config, JournalStart::fresh()),
            epoch: 1,
            committed: Vec::new(),
            kept: vec![first_checkpoint()],
            next_number: 1,
        };
        for (operations, cut_after, crash_seed) in lives {
            let promise = live(&device, &mut life, &operations, cut_after);
            let Promise { snapshot, acknowledged, kept } = promise;
            let image = snapshot.crash(&snapshot.random_plan(crash_seed));
            let options = SimOptions { seed: crash_seed, ..SimOptions::default() };
            device = std::sync::Arc::new(SimDevice::from_image(image, options));
            config = two_copies(device.clone(), buckets);
            damage_one_copy(&device, buckets * 16, seed % 2, crash_seed);

            // From the older checkpoint the log says the same, only more.
            let (oldest, newest) = (&kept[0], kept.last().unwrap());
            let log = read_log(&config, oldest).unwrap();
            let short = read_log(&config, newest).unwrap();
            prop_assert_eq!(short.next, log.next);
            prop_assert_eq!(short.totals(newest).unwrap(), log.totals(oldest).unwrap());
            prop_assert!(log.next > acknowledged, "{} was acknowledged, the log ends before {}", acknowledged, log.next);

            // What survived is all commits below the end, in order and whole.
            life.committed.retain(|(sequence, _)| *sequence < log.next);
            let since = |first: u64| {
                life.committed.iter().filter(move |(sequence, _)| sequence.0 >= first).map(|&(_, number)| number)
            };
            prop_assert_eq!(log_numbers(&log), since(oldest.first_replay).collect::<Vec<_>>());
            prop_assert_eq!(log_numbers(&short), since(newest.first_replay).collect::<Vec<_>>());

            log.repair_copies(&config).unwrap();
            prop_assert_eq!(read_log(&config, oldest).unwrap().bad_copy_count(), 0);
            let start = log.start(oldest, oldest).unwrap();
            prop_assert!(start.epoch > life.epoch || log.highest_epoch <= life.epoch);
            life.epoch = start.epoch;
            life.journal = open(&config, start);
            life.kept = kept;
            life.journal.flush(life.journal.newest()).unwrap();
        }
    }
}
