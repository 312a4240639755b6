//! Tests of the trees, against a plain `BTreeMap`.

mod crash;
mod damage;
mod disk;
mod memory;
mod speed;
mod stream;
mod threads;
mod waiting;
pub(super) mod world;

use super::*;
use crate::format::superblock::{BucketRange, Defaults, ErrorCounts, Geometry, Layout, Member, VERSION};

/// A superblock with small nodes: 8 KiB in buckets of 256 KiB. Journal in buckets 1 and 2, checkpoint area in 3..7 and 8..12.
pub(super) fn superblock(size_bytes: u64, metadata_replicas: u8) -> Superblock {
    let bucket_bytes = 256 << 10;
    Superblock {
        filesystem: uuid::Uuid::from_u128(7),
        sequence: 1,
        compat: 0,
        read_only_compat: 0,
        incompat: 0,
        version: VERSION,
        version_minimum: VERSION,
        geometry: Geometry { block_bytes: 4096, bucket_bytes, node_bytes: 8192, metadata_replicas },
        members: vec![Member { uuid: [1; 16], size_bytes, bucket_count: size_bytes / u64::from(bucket_bytes) }],
        layout: Layout {
            journal: vec![BucketRange { device: 0, first: 1, count: 1 }],
            checkpoints: vec![
                BucketRange { device: 0, first: 3, count: 4 },
                BucketRange { device: 0, first: 8, count: 4 },
            ],
        },
        defaults: Defaults::default(),
        errors: ErrorCounts::default(),
        unknown_sections: Vec::new(),
    }
}

pub(super) fn value(seed: u64, bytes: usize) -> Value {
    let mut value = seed.to_le_bytes().to_vec();
    value.resize(bytes.max(8), seed as u8);
    Value::from(value)
}

/// One key in one commit, as `transaction` would do it.
pub(super) fn commit(forest: &Forest, changes: &[(BtreeId, Position, Option<Value>)], sequence: u64) {
    loop {
        let targets =
            changes.iter().map(|(btree, position, _)| LeafTarget { btree: *btree, position: *position, write: true });
        let mut leaves = forest.lock_leaves(&mut targets.collect()).unwrap();
        let updates = changes
            .iter()
            .map(|(btree, position, value)| (*btree, *position, crate::format::key::packed_bytes(value.as_deref())));
        let full = leaves.full_leaf(updates);
        if let Some((btree, position, bytes)) = full {
            drop(leaves);
            forest.make_room(btree, position, bytes).unwrap();
            continue;
        }
        for (btree, position, value) in changes {
            leaves.put(*btree, *position, value.clone(), JournalSequence(sequence));
        }
        return;
    }
}

/// All keys of a tree by scans of `limit` keys.
pub(super) fn all_keys(forest: &Forest, btree: BtreeId, limit: usize) -> Vec<(Position, Value)> {
    let mut keys = Vec::new();
    let mut from = Position::MIN;
    loop {
        let mut scan = forest.scan(btree, from, Position::MAX, limit).unwrap();
        keys.append(&mut scan.keys);
        match scan.covered_to.successor() {
            Some(next) => from = next,
            None => return keys,
        }
    }
}

/// All keys of a tree by descending scans.
pub(super) fn all_keys_back(forest: &Forest, btree: BtreeId, limit: usize) -> Vec<(Position, Value)> {
    let mut keys = Vec::new();
    let mut from = Position::MAX;
    loop {
        let mut scan = forest.scan_back(btree, from, Position::MIN, limit).unwrap();
        keys.append(&mut scan.keys);
        match scan.covered_to.predecessor() {
            Some(next) => from = next,
            None => {
                keys.reverse();
                return keys;
            }
        }
    }
}

pub(super) type Model = BTreeMap<Position, Value>;

pub(super) fn assert_equal(forest: &Forest, btree: BtreeId, model: &Model) {
    let expected: Vec<_> = model.iter().map(|(position, value)| (*position, value.clone())).collect();
    assert!(all_keys(forest, btree, 7) == expected, "ascending scan differs");
    assert!(all_keys_back(forest, btree, 1000) == expected, "descending scan differs");
}
