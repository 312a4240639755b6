//! Streams of leaves against the model: what was published, in order, whatever the range, the batches and the threads; and what is told of copies.

use std::collections::BTreeMap;

use super::world::*;
use super::*;
use crate::btree::{Keys, LeafRange, PublishedNode, stream_leaves};
use crate::device::MemDevice;
use proptest::prelude::*;

const BTREE: BtreeId = BtreeId::Extents;

fn range(from: Position, to: Position, batch_bytes: usize, reads_ahead: bool) -> LeafRange {
    LeafRange { btree: BTREE, from, to, verified_to: None, batch_bytes, reads_ahead }
}

fn leaves(world: &World, range: &LeafRange) -> Vec<PublishedNode> {
    let reader = world.reader();
    let newest = reader.choose_checkpoint().unwrap().newest;
    let mut found = Vec::new();
    stream_leaves(&reader, &newest, range, &mut |batch| {
        found.extend(batch);
        Ok(())
    })
    .unwrap();
    found
}

fn pairs(keys: &Keys) -> BTreeMap<Position, Value> {
    keys.iter().map(|(position, value)| (position, Value::from(value))).collect()
}

fn at(index: u64) -> Position {
    Position::new(index, 0, 0)
}

/// A tree of several levels: published as far as `published` keys, with `changed` of them changed since.
fn grown(device: &Arc<MemDevice>, published: u64, changed: &[u64]) -> World {
    let world = World::new(Arc::clone(device) as Arc<dyn BlockDevice>, 2, 1 << 20);
    for index in 0..published {
        world.commit(vec![(BTREE, at(index), Some(value(index, 100)))]);
        if index % 401 == 0 {
            world.checkpoint();
        }
    }
    world.checkpoint();
    for &index in changed {
        let change = (index % 3 > 0).then(|| value(index + 7, 90));
        world.commit(vec![(BTREE, at(index), change)]);
    }
    world
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn a_stream_is_the_published_tree(
        count in 1u64..1500,
        bounds in (0u64..1500, 0u64..1500),
        batch_bytes in 1usize..200_000,
        reads_ahead in any::<bool>(),
        changed in proptest::collection::vec(0u64..1600, 0..300),
    ) {
        let device = Arc::new(MemDevice::new(SIZE_BYTES));
        let world = grown(&device, count, &changed);
        let (from, to) = (at(bounds.0.min(bounds.1)), at(bounds.0.max(bounds.1)));
        let found = leaves(&world, &range(from, to, batch_bytes, reads_ahead));
        // Neighbours touch, and together they cover the range.
        prop_assert!(found.first().is_some_and(|leaf| leaf.minimum <= from));
        prop_assert!(found.last().is_some_and(|leaf| leaf.last_position() >= to));
        for pair in found.windows(2) {
            prop_assert_eq!(pair[0].limit, Some(pair[1].minimum));
        }
        let mut published = BTreeMap::new();
        let mut present = BTreeMap::new();
        for leaf in &found {
            prop_assert!(leaf.copies.len() == 2 && leaf.copies.iter().all(|(_, outcome)| outcome.is_ok()));
            let (first, last) = (leaf.minimum.max(from), leaf.last_position().min(to));
            let keys = leaf.keys.as_ref().unwrap().within(first, last);
            prop_assert_eq!(keys.len(), keys.iter().count());
            published.extend(pairs(&keys));
            if world.forest.is_as_published(leaf).unwrap() {
                present.extend(pairs(&keys));
            } else {
                let mut cursor = Some(first);
                while let Some(next) = cursor.filter(|next| *next <= last) {
                    let scan = world.forest.scan(BTREE, next, last, 50).unwrap();
                    present.extend(pairs(&Keys::of(&scan.keys)));
                    cursor = scan.covered_to.successor();
                }
            }
        }
        let at_checkpoint: BTreeMap<_, _> = (0..count).map(|index| (at(index), value(index, 100))).collect();
        let within = |model: BTreeMap<Position, Value>| -> BTreeMap<Position, Value> {
            model.into_iter().filter(|(position, _)| (from..=to).contains(position)).collect()
        };
        prop_assert_eq!(published, within(at_checkpoint));
        prop_assert_eq!(present, within(world.model(BTREE, world.log.len())));
    }
}

#[test]
fn every_copy_is_looked_at_once_and_only_what_is_bad_is_told_of() {
    let device = Arc::new(MemDevice::new(SIZE_BYTES));
    let world = grown(&device, 1200, &[]);
    let whole = range(Position::MIN, Position::MAX, 30_000, true);
    let intact = leaves(&world, &whole);
    assert!(intact.len() > 8, "several leaves: {}", intact.len());
    let (one, both) = (&intact[2], &intact[5]);
    let spoil = |leaf: &PublishedNode, copy: usize| device.write(leaf.copies[copy].0.offset, &[0x5a; 512]).unwrap();
    spoil(one, 0);
    spoil(both, 0);
    spoil(both, 1);
    for reads_ahead in [false, true] {
        let found = leaves(&world, &LeafRange { reads_ahead, ..whole });
        assert_eq!(found.len(), intact.len());
        for (before, now) in intact.iter().zip(&found) {
            let bad: Vec<bool> = now.copies.iter().map(|(_, outcome)| outcome.is_err()).collect();
            let expected = match before.minimum {
                at if at == one.minimum => [true, false],
                at if at == both.minimum => [true, true],
                _ => [false, false],
            };
            assert_eq!(bad, expected, "{}", before.minimum);
            assert_eq!(now.keys.is_err(), before.minimum == both.minimum);
            if let (Ok(before), Ok(now)) = (&before.keys, &now.keys) {
                assert_eq!(pairs(before), pairs(now));
            }
        }
        // Those that were verified before: the first good copy is enough.
        let again = leaves(&world, &LeafRange { reads_ahead, verified_to: Some(one.minimum), ..whole });
        for leaf in &again {
            let copies = leaf.copies.len();
            let expected = if leaf.minimum >= one.minimum { 2 } else { 1 };
            assert_eq!(copies, expected, "{}", leaf.minimum);
            assert_eq!(leaf.keys.is_err(), leaf.minimum == both.minimum);
        }
    }
}

#[test]
fn a_visit_that_fails_ends_the_stream() {
    let device = Arc::new(MemDevice::new(SIZE_BYTES));
    let world = grown(&device, 1200, &[]);
    let reader = world.reader();
    let newest = reader.choose_checkpoint().unwrap().newest;
    for reads_ahead in [false, true] {
        let mut visits = 0;
        let whole = range(Position::MIN, Position::MAX, 1, reads_ahead);
        let outcome = stream_leaves(&reader, &newest, &whole, &mut |_| {
            visits += 1;
            if visits == 3 { Err(Error::ReadOnly) } else { Ok(()) }
        });
        assert!(matches!(outcome, Err(Error::ReadOnly)));
        assert_eq!(visits, 3);
    }
}
