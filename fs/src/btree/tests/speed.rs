//! Times, for people; `cargo test -- --ignored --nocapture speed`.

use super::world::*;
use super::*;
use crate::device::MemDevice;
use std::time::Instant;

#[test]
#[ignore = "prints times"]
fn speed_of_commits_reads_and_checkpoints() {
    let mut superblock = superblock(SIZE_BYTES, 2);
    superblock.geometry.node_bytes = 128 << 10;
    superblock.geometry.bucket_bytes = 1 << 20;
    superblock.members[0].bucket_count = SIZE_BYTES >> 20;
    superblock.layout.checkpoints = vec![BucketRange { device: 0, first: 3, count: 1 }];
    let device: Arc<dyn BlockDevice> = Arc::new(MemDevice::new(SIZE_BYTES));
    let log = Arc::<FakeLog>::default();
    let world = World::open(device, Arc::new(superblock), log, &Opening::empty(), 1, 256 << 20, Env::real()).unwrap();
    let count = 100_000u64;
    let mut random = 1u64;
    let mut next = move || {
        random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (random >> 33) % count
    };
    let timed = |what: &str, count: u64, work: &mut dyn FnMut()| {
        let started = Instant::now();
        work();
        println!("{what}: {} ns each", started.elapsed().as_nanos() as u64 / count);
    };
    let forest = &world.forest;
    let put = |index: u64, sequence: u64| {
        commit(forest, &[(BtreeId::Extents, Position::new(index, 0, 0), Some(value(index, 60)))], sequence);
    };
    timed("ascending commit", count, &mut || (0..count).for_each(|index| put(index, 0)));
    timed("random commit", count, &mut || (0..count).for_each(|_| put(next(), 0)));
    timed("checkpoint of everything", 1, &mut || {
        world.checkpoint();
    });
    timed("random commit after a checkpoint", count, &mut || (0..count).for_each(|_| put(next(), 0)));
    timed("second checkpoint", 1, &mut || {
        world.checkpoint();
    });
    timed("get", count, &mut || {
        (0..count).for_each(|_| assert!(forest.get(BtreeId::Extents, Position::new(next(), 0, 0)).unwrap().is_some()));
    });
    timed("scan of 8", count, &mut || {
        (0..count).for_each(|_| {
            forest.scan(BtreeId::Extents, Position::new(next(), 0, 0), Position::MAX, 8).unwrap();
        });
    });
    let again = world.reopen(Arc::clone(&world.device), world.log.len()).unwrap();
    timed("cold scan of everything, per key", count, &mut || {
        assert_eq!(all_keys(&again.forest, BtreeId::Extents, 1000).len() as u64, count);
    });
    println!(
        "{} bytes in the cache, {} nodes read",
        again.forest.cached_bytes(),
        again.forest.metrics.btree_node_reads.get()
    );
}
