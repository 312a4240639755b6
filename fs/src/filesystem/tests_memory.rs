//! Nodes in memory keep to their part of `cache_size`, also the dirty ones, whatever the size of the device.

use std::sync::Arc;

use super::format::test_geometry;
use super::*;
use crate::device::MemDevice;
use crate::format::superblock::Geometry;
use crate::format::{BtreeId, Position};
use crate::transaction::CommitOptions;

const MIB: u64 = 1 << 20;

/// A large device's dirty nodes were allowed 64 MiB, however small the cache.
#[test]
fn nodes_keep_to_their_part_of_a_small_cache_on_a_large_device() {
    let device: Arc<dyn BlockDevice> = Arc::new(MemDevice::new(16 << 30));
    let geometry = Geometry { block_bytes: 4096, bucket_bytes: 1 << 20, node_bytes: 128 << 10, metadata_replicas: 2 };
    let options = FormatOptions { geometry, journal_bytes: 32 << 20, buckets_min: 512, ..test_geometry() };
    Filesystem::format(&device, &options, &Env::real()).unwrap();
    let options = OpenOptions { cache_bytes: 32 * MIB, ..OpenOptions::default() };
    let filesystem = Filesystem::open(vec![device], &options).unwrap();
    // Keys of several times the cache, and changes all over them: each leaf becomes dirty.
    let put = |index: u64, byte: u8| {
        let position = Position::new(1 << 40 | index, 0, 1);
        let options = CommitOptions { raw: true, ..CommitOptions::default() };
        let committed = filesystem.transactions().run(options, |transaction| {
            transaction.put(BtreeId::Xattrs, position, vec![byte; 400]);
            Ok(())
        });
        committed.unwrap();
    };
    const KEYS: u64 = 100_000;
    (0..KEYS).for_each(|index| put(index, 1));
    let mut random = 1_u64;
    for _ in 0..20_000 {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        put((random >> 33) % KEYS, 2);
    }
    let peak = filesystem.forest().cached_peak_bytes();
    println!("at most {} KiB of nodes", peak / 1024);
    assert!(filesystem.metrics().btree_evictions.get() > 0, "the keys are more than the cache");
    assert!(peak <= 8 * MIB / 100 * 105, "{peak} bytes of nodes");
    filesystem.close().unwrap();
}
