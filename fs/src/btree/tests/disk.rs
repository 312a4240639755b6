//! Trees with checkpoints: against a map, through reopening, eviction, damage.

use super::world::*;
use super::*;
use crate::device::MemDevice;
use crate::format::space::{Bucket, BucketState};
use proptest::prelude::*;

fn world(replicas: u8, cache_bytes: u64) -> World {
    World::new(Arc::new(MemDevice::new(SIZE_BYTES)), replicas, cache_bytes)
}

#[derive(Clone, Debug)]
enum Step {
    Put { inode: u64, offset: u64, bytes: usize, btree: BtreeId },
    Delete { inode: u64, offset: u64, btree: BtreeId },
    DeleteRange { from: u64, to: u64 },
    Checkpoint { lag: u64 },
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    let btree = prop_oneof![3 => Just(BtreeId::Extents), 1 => Just(BtreeId::Inodes)];
    prop_oneof![
        60 => (0u64..200, 0u64..8, 8usize..700, btree.clone())
            .prop_map(|(inode, offset, bytes, btree)| Step::Put { inode, offset, bytes, btree }),
        20 => (0u64..200, 0u64..8, btree).prop_map(|(inode, offset, btree)| Step::Delete { inode, offset, btree }),
        2 => (0u64..200, 1u64..120).prop_map(|(from, count)| Step::DeleteRange { from, to: from + count }),
        4 => (0u64..20).prop_map(|lag| Step::Checkpoint { lag }),
        1 => Just(Step::Reopen),
    ]
}

fn run(steps: Vec<Step>, replicas: u8) {
    let mut world = world(replicas, 48 << 10);
    world.checkpoint();
    for (index, step) in steps.into_iter().enumerate() {
        match step {
            Step::Put { inode, offset, bytes, btree } => {
                let position = Position::new(inode, offset, 1);
                world.commit(vec![(btree, position, Some(value(index as u64, bytes)))]);
            }
            Step::Delete { inode, offset, btree } => {
                world.commit(vec![(btree, Position::new(inode, offset, 1), None)]);
            }
            Step::DeleteRange { from, to } => {
                let doomed: Vec<_> = all_keys(&world.forest, BtreeId::Extents, 64)
                    .into_iter()
                    .filter(|(position, _)| (from..to).contains(&position.inode))
                    .map(|(position, _)| (BtreeId::Extents, position, None))
                    .collect();
                for chunk in doomed.chunks(16) {
                    world.commit(chunk.to_vec());
                }
            }
            Step::Checkpoint { lag } => {
                world.log.lag.store(lag, Ordering::Relaxed);
                world.checkpoint();
                world.assert_map_is_reachability();
            }
            Step::Reopen => {
                world = world.reopen(Arc::clone(&world.device), world.log.len()).unwrap();
            }
        }
    }
    world.assert_matches_log();
    world.checkpoint();
    world.assert_map_is_reachability();
    let again = world.reopen(Arc::clone(&world.device), world.log.len()).unwrap();
    again.assert_matches_log();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn survives_checkpoints_and_reopening(steps in proptest::collection::vec(step(), 1..1500)) {
        run(steps, 2);
    }

    #[test]
    fn survives_checkpoints_with_one_copy(steps in proptest::collection::vec(step(), 1..500)) {
        run(steps, 1);
    }
}

#[test]
fn a_large_tree_lives_in_a_small_cache_and_shrinks_when_emptied() {
    let world = world(2, 128 << 10);
    let mut random = 1u64;
    for index in 0..6000u64 {
        random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let position = Position::new(random >> 40, index, 0);
        world.commit(vec![(BtreeId::Dirents, position, Some(value(index, 80)))]);
        if index % 500 == 499 {
            world.checkpoint();
            world.assert_map_is_reachability();
        }
    }
    assert!(world.forest.cached_bytes() < 256 << 10, "{} bytes cached", world.forest.cached_bytes());
    assert!(world.forest.metrics.btree_evictions.get() > 50);
    assert!(world.forest.root(BtreeId::Dirents).level >= 1);
    world.assert_matches_log();
    let used = world.forest.space.lock().used_slots();
    let doomed = all_keys(&world.forest, BtreeId::Dirents, 100);
    for chunk in doomed.chunks(50) {
        world.commit(chunk.iter().map(|(position, _)| (BtreeId::Dirents, *position, None)).collect());
    }
    for _ in 0..3 {
        world.checkpoint();
        world.assert_map_is_reachability();
    }
    assert!(world.forest.metrics.btree_merges.get() > 50);
    assert_eq!(world.forest.root(BtreeId::Dirents).level, 0, "an empty tree is one leaf");
    assert!(world.forest.space.lock().used_slots() < used / 20);
    world.assert_matches_log();
}

#[test]
fn what_was_emptied_is_given_back() {
    let world = world(2, 1 << 20);
    for index in 0..8000u64 {
        world.commit(vec![(BtreeId::Extents, Position::new(index, 0, 0), Some(value(index, 200)))]);
    }
    world.checkpoint();
    let buckets = |world: &World| {
        let values = all_keys(&world.forest, BtreeId::Buckets, 100);
        values.iter().filter(|(_, value)| value[0] == crate::format::space::BucketState::Metadata as u8).count()
    };
    let before = buckets(&world);
    for index in 0..8000u64 {
        world.commit(vec![(BtreeId::Extents, Position::new(index, 0, 0), None)]);
    }
    for _ in 0..12 {
        world.checkpoint();
        world.assert_map_is_reachability();
    }
    assert!(buckets(&world) < before / 2 + 8, "{} of {before} buckets are still held", buckets(&world));
    let again = world.reopen(Arc::clone(&world.device), world.log.len()).unwrap();
    again.assert_matches_log();
    again.checkpoint();
    again.assert_map_is_reachability();
}

#[test]
fn a_bad_copy_is_read_from_the_other_and_rewritten_elsewhere() {
    let world = world(2, 1 << 20);
    for index in 0..2000u64 {
        world.commit(vec![(BtreeId::Extents, Position::new(index, 0, 0), Some(value(index, 100)))]);
    }
    world.checkpoint();
    let opening = world.reader().choose_checkpoint().unwrap();
    let mut damaged = 0;
    walk_published(&world.reader(), &opening.newest, &mut |node| {
        let (address, _) = node.copies[0];
        let mut block = vec![0; 4096];
        world.device.read(address.offset, &mut block).unwrap();
        block[300] ^= 1;
        world.device.write(address.offset, &block).unwrap();
        damaged += 1;
        Ok(())
    })
    .unwrap();
    let again = world.reopen(Arc::clone(&world.device), world.log.len()).unwrap();
    again.assert_matches_log();
    assert_eq!(again.forest.metrics.btree_node_read_repaired.get(), damaged);
    again.checkpoint();
    again.assert_map_is_reachability();
}

#[test]
fn the_previous_checkpoint_and_more_replay_give_the_same_state() {
    let world = world(2, 1 << 20);
    for index in 0..3000u64 {
        world.commit(vec![(BtreeId::Extents, Position::new(index * 7919 % 3000, 0, 0), Some(value(index, 100)))]);
        if index % 600 == 0 {
            world.checkpoint();
        }
    }
    world.checkpoint();
    world.commit(vec![(BtreeId::Extents, Position::new(5000, 0, 0), Some(value(1, 100)))]);
    let opening = world.reader().choose_checkpoint().unwrap();
    // What the newest checkpoint added to the root of the extents is lost, in all copies.
    let root = |checkpoint: &Checkpoint| {
        let root = checkpoint.roots.iter().find(|root| root.btree == BtreeId::Extents as u8).unwrap();
        NodePointer::decode(&root.pointer).unwrap()
    };
    let newest = root(&opening.newest);
    assert_ne!(newest, root(opening.previous.as_ref().unwrap()));
    let last_block = u64::from(newest.written_bytes - 1) / 4096 * 4096;
    for copy in &newest.copies {
        world.device.write(copy.offset + last_block, &[0; 4096]).unwrap();
    }
    let older = world.reader().choose_checkpoint().unwrap();
    assert_eq!(older.newest.number, opening.newest.number - 1);
    let again = world.reopen(Arc::clone(&world.device), world.log.len()).unwrap();
    again.assert_matches_log();
    again.checkpoint();
    again.assert_map_is_reachability();
    let newest = again.reader().choose_checkpoint().unwrap();
    assert_eq!(newest.previous.unwrap().number, older.newest.number, "the damaged record was overwritten");
}

#[test]
fn no_buckets_is_an_error_that_does_no_damage() {
    let world = world(2, 1 << 20);
    world.checkpoint();
    world.buckets.left.store(0, Ordering::Relaxed);
    for index in 0..3000u64 {
        world.commit(vec![(BtreeId::Extents, Position::new(index, 0, 0), Some(value(index, 200)))]);
    }
    let outcome = world.forest.checkpoint(&*world.log, CheckpointReason::Requested);
    assert!(matches!(outcome, Err(Error::NoSpace(_))), "{outcome:?}");
    world.buckets.left.store(u64::MAX, Ordering::Relaxed);
    world.checkpoint();
    world.assert_map_is_reachability();
    world.reopen(Arc::clone(&world.device), world.log.len()).unwrap().assert_matches_log();
}

/// A checkpoint that claims a bucket in the middle may get one that became free after its F: the journal from F on says so first. Replay took that
/// for a bucket that was given back with nodes in it, and the filesystem could not be mounted.
#[test]
fn the_last_word_of_the_journal_on_a_bucket_holds() {
    let world = world(1, 1 << 20);
    for index in 0..100 {
        world.commit(vec![(BtreeId::Extents, Position::new(index, 0, 0), Some(value(index, 200)))]);
    }
    world.checkpoint();
    let address = *world.forest.space.lock().used_by_newest().first().unwrap();
    let bucket = address.offset / u64::from(world.superblock.geometry.bucket_bytes);
    for state in [BucketState::Free, BucketState::Metadata] {
        let value = Bucket { state, generation: 1, charged_bytes: 0 }.encode();
        world.log.append(vec![(BtreeId::Buckets, Position::new(0, bucket, 0), Some(value.into()))]);
    }
    let again = world.reopen(Arc::clone(&world.device), world.log.len()).unwrap();
    assert_eq!(all_keys(&again.forest, BtreeId::Extents, 100).len(), 100);
    let cut = world.reopen(Arc::clone(&world.device), world.log.len() - 1).map(drop);
    assert!(matches!(cut, Err(Error::Corrupt(_))), "nodes in a free bucket: {cut:?}");
}

/// 10^5 keys, random updates, checkpoints every 5000 commits: bytes of nodes written per commit.
#[test]
fn write_amplification_of_random_updates_is_bounded() {
    let mut superblock = superblock(SIZE_BYTES, 1);
    superblock.geometry.node_bytes = 128 << 10;
    superblock.geometry.bucket_bytes = 1 << 20;
    superblock.members[0].bucket_count = SIZE_BYTES >> 20;
    superblock.layout.checkpoints = vec![BucketRange { device: 0, first: 3, count: 1 }];
    let device: Arc<dyn BlockDevice> = Arc::new(MemDevice::new(SIZE_BYTES));
    let log = Arc::<FakeLog>::default();
    let opening = Opening::empty();
    let world = World::open(device, Arc::new(superblock), log, &opening, 1, 64 << 20, Env::simulated(1)).unwrap();
    for index in 0..100_000u64 {
        world.commit(vec![(BtreeId::Extents, Position::new(index, 0, 0), Some(value(index, 60)))]);
    }
    world.checkpoint();
    let before = world.forest.metrics.btree_node_bytes_written.get();
    let mut random = 1u64;
    for index in 0..50_000u64 {
        random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        world.commit(vec![(BtreeId::Extents, Position::new((random >> 33) % 100_000, 0, 0), Some(value(index, 60)))]);
        if index % 5000 == 4999 {
            world.checkpoint();
        }
    }
    let per_commit = (world.forest.metrics.btree_node_bytes_written.get() - before) / 50_000;
    let metrics = &world.forest.metrics;
    println!(
        "{per_commit} bytes of nodes per commit of 88 bytes; {} appends, {} rewrites",
        metrics.btree_bset_appends.get(),
        metrics.btree_node_rewrites.get()
    );
    assert!(per_commit < 400, "{per_commit} bytes per commit");
    world.assert_map_is_reachability();
}

/// Whatever a map or a record says, no node goes into the journal, and the journal is given back to nobody.
#[test]
fn no_slot_of_a_fixed_area_is_handed_out() {
    let mut space = NodeSpace::new(&superblock(SIZE_BYTES, 1));
    for bucket in [0, 1, 3, 11] {
        space.add_bucket(crate::units::DeviceIndex(0), crate::units::BucketIndex(bucket));
    }
    assert_eq!((space.free_slots(), space.allocate(1)), (0, None));
    assert_eq!(space.surplus(0, 8), []);
    space.add_bucket(crate::units::DeviceIndex(0), crate::units::BucketIndex(20));
    assert_eq!(space.allocate(1).unwrap()[0].offset / (256 << 10), 20);
}
