//! Commits and checkpoints that wait for each other, and those that come between.

use shuttle::scheduler::PctScheduler;

use super::world::*;
use super::*;
use crate::device::MemDevice;
use crate::sync::schedule;

#[test]
fn commits_beyond_the_dirty_cap_wait_for_the_worker() {
    let device: Arc<dyn BlockDevice> = Arc::new(MemDevice::new(SIZE_BYTES));
    let superblock = Arc::new(superblock(SIZE_BYTES, 2));
    let config = ForestConfig {
        superblock: Arc::clone(&superblock),
        devices: vec![Arc::clone(&device)],
        cache_bytes: Arc::new(AtomicU64::new(64 << 10)),
        dirty_bytes_max: 20 * 8192,
        epoch: 1,
    };
    let env = Env::simulated(3);
    let log = Arc::<FakeLog>::default();
    let forest = Forest::open(config, &Opening::empty(), Arc::clone(&env), Arc::default()).unwrap();
    let buckets = Arc::new(TestBuckets {
        forest: Arc::downgrade(&forest),
        log: Arc::clone(&log),
        bucket_count: superblock.members[0].bucket_count,
        left: AtomicU64::new(u64::MAX),
    });
    forest.set_node_buckets(buckets);
    env.register(
        forest.checkpoint_worker(Arc::clone(&log) as Arc<dyn CheckpointLog>, std::time::Duration::from_secs(5)),
    );
    for index in 0..4000u64 {
        forest.wait_for_dirty_room().unwrap();
        let change = (BtreeId::Extents, Position::new(index * 7919 % 4000, 0, 0), Some(value(index, 100)));
        let sequence = log.append(vec![change.clone()]);
        commit(&forest, &[change], sequence);
        assert!(forest.dirty_bytes() < 40 * 8192, "{} dirty bytes", forest.dirty_bytes());
    }
    assert!(forest.metrics.checkpoints.get() > 2);
    assert_eq!(all_keys(&forest, BtreeId::Extents, 100).len(), 4000);
    env.unregister_all();
}

/// Asking for a hold in vain took the mark away from the checkpoint that was running: the next one ran beside it, and a scrub took what was not written
/// yet for damage.
#[test]
fn a_hold_that_is_refused_changes_nothing() {
    let device: Arc<dyn BlockDevice> = Arc::new(MemDevice::new(SIZE_BYTES));
    let world = World::new(device, 2, 1 << 20);
    let forest = &world.forest;
    assert!(forest.try_begin(), "nothing is running");
    assert!(forest.hold_checkpoints().is_none());
    assert!(forest.hold_checkpoints().is_none(), "it is still running");
    assert!(!forest.try_begin());
    forest.checkpoint_running.store(false, Ordering::Release);
    let hold = forest.hold_checkpoints();
    assert!(hold.is_some() && forest.hold_checkpoints().is_none() && !forest.try_begin());
    drop(hold);
    assert!(forest.try_begin());
}

/// A node that is dirty from the start, since a copy of it is bad, stood in the cache before it was listed: a checkpoint in between missed a commit to
/// it, which was lost with the next power cut.
#[test]
fn a_commit_to_a_node_that_is_just_read_is_in_the_next_checkpoint() {
    let device = Arc::new(MemDevice::new(SIZE_BYTES));
    let world = World::new(Arc::clone(&device) as _, 2, 1 << 20);
    let at = |index| (BtreeId::Extents, Position::new(index, 0, 0));
    for index in 0..200 {
        let (btree, position) = at(index);
        world.commit(vec![(btree, position, Some(value(index, 200)))]);
    }
    world.checkpoint();
    let reader = world.reader();
    walk_published(&reader, &reader.choose_checkpoint().unwrap().newest, &mut |node| {
        if node.btree == BtreeId::Extents && node.level == 0 {
            let (first, _) = node.copies.first().unwrap();
            device.write(first.offset, &[0; 4096]).unwrap();
        }
        Ok(())
    })
    .unwrap();
    let (image, cut) = (device.image(), world.log.len());
    schedule::explore(PctScheduler::new_from_seed(1, 2, 1500), move || {
        let device: Arc<dyn BlockDevice> = Arc::new(MemDevice::from_image(image.clone(), false));
        let opened = world.reopen(Arc::clone(&device), cut).unwrap();
        let (btree, position) = at(100);
        let reading = shuttle::thread::spawn({
            let forest = Arc::clone(&opened.forest);
            move || forest.get(btree, position).unwrap().unwrap()
        });
        opened.commit(vec![(btree, position, Some(value(7, 200)))]);
        opened.checkpoint();
        reading.join().unwrap();
        let again = opened.reopen(device, opened.log.len()).unwrap();
        assert_eq!(again.forest.get(btree, position).unwrap(), Some(value(7, 200)));
    });
}
