//! Power cuts at every write and flush of checkpoints, and what is opened afterwards.

use super::world::*;
use super::*;
use crate::device::{MemDevice, PlanOptions, SimDevice, SimOptions, Snapshot};
use crate::env::{Progress, Worker};

/// A moment at which power may be cut.
struct Moment {
    snapshot: Snapshot,
    flushed: u64,
    newest: u64,
    released: u64,
    checkpoints: u64,
}

/// A small deterministic generator.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) % limit.max(1)
    }
}

fn changes(random: &mut Random, seed: u64) -> Vec<Change> {
    let mut changes: BTreeMap<(BtreeId, Position), Option<Value>> = BTreeMap::new();
    for _ in 0..1 + random.below(3) {
        let btree = if random.below(3) == 0 { BtreeId::Inodes } else { BtreeId::Extents };
        let position = Position::new(random.below(120), random.below(4), 0);
        let deleted = random.below(3) == 0;
        changes.insert((btree, position), (!deleted).then(|| value(seed, 8 + random.below(500) as usize)));
    }
    changes.into_iter().map(|((btree, position), value)| (btree, position, value)).collect()
}

fn change(world: &World, random: &mut Random, seed: u64) {
    world.commit(changes(random, seed));
}

/// Commits, splitting leaves, whenever a checkpoint lets others run between two nodes.
struct Committer {
    forest: std::sync::Weak<Forest>,
    log: Arc<FakeLog>,
    random: Mutex<Random>,
    event: Event,
    commits: AtomicU64,
}

impl Worker for Committer {
    fn name(&self) -> &'static str {
        "committer"
    }
    fn step(&self, _: u32) -> Result<Progress> {
        let Some(forest) = self.forest.upgrade() else { return Ok(Progress::Idle(None)) };
        for _ in 0..12 {
            let seed = 1 << 50 | self.commits.fetch_add(1, Ordering::Relaxed);
            let changes = changes(&mut self.random.lock(), seed);
            let sequence = self.log.append(changes.clone());
            commit(&forest, &changes, sequence);
        }
        Ok(Progress::Worked)
    }
    fn event(&self) -> &Event {
        &self.event
    }
}

/// What [`run`] came to.
#[derive(Default)]
struct Outcome {
    /// States that were opened.
    opened: usize,
    /// Commits in the middle of checkpoints.
    committed: u64,
    /// Checkpoints that found no space for some of their nodes, with others written.
    set_aside: usize,
}

/// Makes a checkpoint, with no more buckets for nodes than it takes, found out by trying.
fn checkpoint_in_little_space(world: &World) -> usize {
    let mut set_aside = 0;
    let metrics = &world.forest.metrics;
    let images = || metrics.btree_node_rewrites.get() + metrics.btree_bset_appends.get();
    loop {
        let before = images();
        match world.forest.checkpoint(&*world.log, CheckpointReason::Requested) {
            Ok(_) => return set_aside,
            Err(Error::NoSpace(_)) => {
                set_aside += usize::from(images() > before);
                world.assert_matches_log();
                world.buckets.left.store(2, Ordering::Relaxed);
            }
            Err(error) => panic!("{error}"),
        }
    }
}

/// Every boundary of a workload, with some ways for the writes to get lost at each.
fn run(seed: u64, plans_for_each: usize, in_little_space: bool) -> Outcome {
    let device = Arc::new(SimDevice::new(SIZE_BYTES, SimOptions { seed, ..SimOptions::default() }));
    let world = World::new(Arc::clone(&device) as Arc<dyn BlockDevice>, 2, 96 << 10);
    let moments: Arc<Mutex<Vec<Moment>>> = Arc::default();
    {
        let (moments, log, forest) = (Arc::clone(&moments), Arc::clone(&world.log), Arc::downgrade(&world.forest));
        device.set_hook(move |device, _| {
            let checkpoints = forest.upgrade().map_or(0, |forest| forest.metrics.checkpoints.get());
            let moment = Moment {
                snapshot: device.snapshot(),
                flushed: log.flushed.load(Ordering::Relaxed),
                newest: log.len(),
                released: log.released.load(Ordering::Relaxed),
                checkpoints,
            };
            moments.lock().push(moment);
        });
    }
    let committer = Arc::new(Committer {
        forest: Arc::downgrade(&world.forest),
        log: Arc::clone(&world.log),
        random: Mutex::new(Random(seed + 1000)),
        event: Event::new(),
        commits: AtomicU64::new(0),
    });
    world.env.register(Arc::clone(&committer) as Arc<dyn Worker>);
    let mut random = Random(seed);
    let mut outcome = Outcome::default();
    if in_little_space {
        world.forest.set_test_switches(TestSwitches { no_slots_beforehand: true, ..TestSwitches::default() });
        world.buckets.left.store(0, Ordering::Relaxed);
    }
    for round in 0..10u64 {
        for index in 0..random.below(60) {
            change(&world, &mut random, round << 32 | index);
        }
        world.log.lag.store(random.below(8), Ordering::Relaxed);
        if in_little_space {
            outcome.set_aside += checkpoint_in_little_space(&world);
        } else {
            world.checkpoint();
        }
        world.assert_map_is_reachability();
    }
    device.clear_hook();
    world.env.unregister_all();
    outcome.committed = committer.commits.load(Ordering::Relaxed);

    let moments = std::mem::take(&mut *moments.lock());
    for (index, moment) in moments.iter().enumerate() {
        let options = PlanOptions {
            exhaustive_up_to: 2,
            samples: plans_for_each,
            seed: seed << 32 | index as u64,
            limit: Some(plans_for_each),
            ..PlanOptions::default()
        };
        for plan in moment.snapshot.plans(&options) {
            let image = moment.snapshot.crash(&plan);
            let cut = moment.flushed + random.below(moment.newest - moment.flushed + 1);
            let device: Arc<dyn BlockDevice> = Arc::new(MemDevice::from_image(image, false));
            let again = match world.reopen(device, cut) {
                Ok(again) => again,
                Err(error) => {
                    assert_eq!(moment.checkpoints, 0, "seed {seed}, moment {index}, {plan:?}: {error}");
                    continue;
                }
            };
            let first_replay = again.forest.kept.lock().newest.first_replay;
            assert!(first_replay >= moment.released, "seed {seed}: needs journal that was released");
            for btree in [BtreeId::Extents, BtreeId::Inodes, BtreeId::Buckets] {
                assert_equal(&again.forest, btree, &world.model(btree, cut));
            }
            outcome.opened += 1;
            // Life goes on, in a few of them.
            if random.below(8) == 0 {
                for index in 0..random.below(40) {
                    change(&again, &mut random, 1 << 60 | index);
                }
                again.checkpoint();
                again.assert_map_is_reachability();
                let third = again.reopen(Arc::clone(&again.device), again.log.len()).unwrap();
                third.assert_matches_log();
            }
        }
    }
    outcome
}

#[test]
fn a_power_cut_at_any_boundary_loses_nothing_durable() {
    let outcomes: Vec<Outcome> = (1..3).map(|seed| run(seed, 3, false)).collect();
    let opened: usize = outcomes.iter().map(|outcome| outcome.opened).sum();
    assert!(opened > 300, "{opened} states were opened");
    assert!(outcomes.iter().all(|outcome| outcome.committed > 100), "nothing was committed during checkpoints");
}

/// A checkpoint that found no space in the middle made the filesystem read-only. What it has written is now the next one's.
#[test]
fn a_checkpoint_without_space_for_all_nodes_is_ended_by_the_next() {
    let outcomes: Vec<Outcome> = (1..13).map(|seed| run(seed, 1, true)).collect();
    let opened: usize = outcomes.iter().map(|outcome| outcome.opened).sum();
    let set_aside: usize = outcomes.iter().map(|outcome| outcome.set_aside).sum();
    assert!(set_aside > 5, "{set_aside} checkpoints were set aside");
    assert!(opened > 300, "{opened} states were opened");
}

#[test]
fn a_failed_write_latches_and_loses_nothing_durable() {
    for nth in [0, 1, 3, 7, 20] {
        let device = Arc::new(SimDevice::new(SIZE_BYTES, SimOptions::default()));
        let world = World::new(Arc::clone(&device) as Arc<dyn BlockDevice>, 2, 1 << 20);
        let mut random = Random(nth + 1);
        for index in 0..200 {
            change(&world, &mut random, index);
        }
        world.checkpoint();
        for index in 0..200 {
            change(&world, &mut random, index);
        }
        device.fail_write(nth, rustix::io::Errno::IO);
        let outcome = world.forest.checkpoint(&*world.log, CheckpointReason::Requested);
        device.clear_faults();
        if outcome.is_ok() {
            continue;
        }
        let again = world.forest.checkpoint(&*world.log, CheckpointReason::Requested);
        assert!(matches!(again, Err(Error::Latched { .. })), "{again:?}");
        assert!(matches!(world.forest.wait_for_dirty_room(), Err(Error::Latched { .. })));
        let image = Arc::new(MemDevice::from_image(device.image(), false));
        let flushed = world.log.flushed.load(Ordering::Relaxed);
        let third = world.reopen(image, flushed).unwrap();
        assert_equal(&third.forest, BtreeId::Extents, &world.model(BtreeId::Extents, flushed));
    }
}
