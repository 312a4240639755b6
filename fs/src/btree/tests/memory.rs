//! Trees that are never written.

use super::*;
use proptest::prelude::*;

fn forest() -> Arc<Forest> {
    let config = ForestConfig {
        superblock: Arc::new(superblock(64 << 20, 2)),
        devices: Vec::new(),
        cache_bytes: Arc::new(AtomicU64::new(1 << 20)),
        dirty_bytes_max: u64::MAX,
        epoch: 1,
    };
    Forest::open(config, &Opening::empty(), Env::simulated(1), Arc::default()).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn behaves_like_a_map(operations in proptest::collection::vec((0u64..300, 0u64..3, any::<bool>(), 8usize..900), 1..1200)) {
        let forest = forest();
        let mut model = Model::new();
        for (index, (inode, offset, delete, bytes)) in operations.into_iter().enumerate() {
            let position = Position::new(inode, offset, 5);
            let value = (!delete).then(|| value(index as u64, bytes));
            commit(&forest, &[(BtreeId::Extents, position, value.clone())], index as u64 + 1);
            match value {
                Some(value) => model.insert(position, value),
                None => model.remove(&position),
            };
            prop_assert_eq!(forest.get(BtreeId::Extents, position).unwrap(), model.get(&position).cloned());
        }
        assert_equal(&forest, BtreeId::Extents, &model);
    }
}

#[test]
fn trees_grow_several_levels_and_stay_filled_when_keys_ascend() {
    let forest = forest();
    let mut model = Model::new();
    for index in 0..20_000u64 {
        let position = Position::new(index / 100, index % 100, 0);
        let value = value(index, 60);
        commit(&forest, &[(BtreeId::Inodes, position, Some(value.clone()))], index + 1);
        model.insert(position, value);
    }
    assert_eq!(forest.root(BtreeId::Inodes).level, 2);
    assert_equal(&forest, BtreeId::Inodes, &model);
    // 88 bytes each: ascending keys must not leave half-empty leaves.
    let leaves = forest.metrics.btree_splits.get() as usize;
    assert!(leaves < 20_000 * 88 / (forest.limits.soft_bytes * 3 / 4), "{leaves} splits");
}

#[test]
fn a_transaction_larger_than_a_leaf_is_spread_over_new_leaves() {
    let forest = forest();
    let keys: Vec<_> =
        (0..64u64).map(|index| (BtreeId::Dirents, Position::new(index, 0, 0), Some(value(index, 500)))).collect();
    commit(&forest, &keys, 1);
    let model: Model = keys.into_iter().filter_map(|(_, position, value)| Some((position, value?))).collect();
    assert_equal(&forest, BtreeId::Dirents, &model);
}

#[test]
fn a_key_that_no_leaf_can_hold_is_refused() {
    let forest = forest();
    assert!(matches!(forest.make_room(BtreeId::Xattrs, Position::MIN, 9000), Err(Error::Invalid(_))));
}

#[test]
fn locked_leaves_show_ranges_inside_a_leaf_only() {
    let forest = forest();
    for index in 0..1000u64 {
        commit(&forest, &[(BtreeId::Orphans, Position::new(0, index, 0), Some(value(index, 40)))], index + 1);
    }
    let mut targets = vec![
        LeafTarget { btree: BtreeId::Orphans, position: Position::new(0, 999, 0), write: true },
        LeafTarget { btree: BtreeId::Orphans, position: Position::new(0, 1, 0), write: false },
        LeafTarget { btree: BtreeId::Devices, position: Position::MIN, write: false },
    ];
    let leaves = forest.lock_leaves(&mut targets).unwrap();
    let at = |index| Position::new(0, index, 0);
    assert_eq!(leaves.range(BtreeId::Orphans, at(1), at(3)).unwrap().len(), 3);
    assert!(leaves.range(BtreeId::Orphans, at(1), at(999)).is_none());
    assert_eq!(leaves.get(BtreeId::Orphans, at(999)), Some(value(999, 40)));
    assert_eq!(leaves.get(BtreeId::Devices, Position::MIN), None);
    assert!(!leaves.covers(BtreeId::Orphans, at(500)));
}

#[test]
fn keys_of_almost_a_node_are_replaced_and_find_neighbours() {
    let forest = forest();
    let mut model = Model::new();
    for round in 0..3u64 {
        for index in (0..20u64).rev() {
            let position = Position::new(index, 0, 0);
            let value = value(round * 100 + index, 5500 + index as usize);
            commit(&forest, &[(BtreeId::Xattrs, position, Some(value.clone()))], round * 100 + index + 1);
            model.insert(position, value);
        }
    }
    assert_equal(&forest, BtreeId::Xattrs, &model);
    assert!(forest.metrics.btree_splits.get() < 40);
}
