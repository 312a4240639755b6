//! Checks: every node that the newest checkpoint reaches, on each of its copies: header, chain of bsets, order and range of keys; and
//! that the node-space map has exactly the slots of reachable nodes. Collects: buckets that hold nodes, and ranges of keys that are lost.

use std::collections::BTreeMap;
use std::sync::Arc;

use coppicefs::Result;
use coppicefs::btree::{NodeReader, PublishedNode, walk_published};
use coppicefs::format::{BtreeId, Position};

use super::{Checker, KEYS_OF_NODE};
use crate::problem::Problem;

type Slots = BTreeMap<(u8, u64), u64>;

pub(super) fn run(checker: &mut Checker<'_>) -> Result<()> {
    let filesystem = checker.filesystem;
    let superblock = Arc::new(filesystem.superblock().clone());
    let reader =
        NodeReader::new(Arc::clone(&superblock), filesystem.devices().to_vec(), Arc::clone(filesystem.metrics()));
    let opening = reader.choose_checkpoint()?;
    for passed in opening.passed_over.iter().filter(|passed| passed.is_damage) {
        checker.report(Problem::CheckpointDamaged {
            number: passed.number,
            used: opening.newest.number,
            reason: passed.reason.clone(),
        });
    }
    let bucket_bytes = u64::from(superblock.geometry.bucket_bytes);
    let node_bytes = u64::from(superblock.geometry.node_bytes);
    let pages = reader.read_map(&opening.newest)?;
    let slots: u64 = pages.iter().flatten().map(|entry| u64::from(entry.used.count_ones())).sum();
    let nodes = slots / u64::from(superblock.geometry.metadata_replicas.max(1));
    checker.expect(nodes + nodes * KEYS_OF_NODE);
    let mut reachable = Slots::new();
    walk_published(&reader, &opening.newest, &mut |node| {
        checker.examine(1);
        if let (0, Ok(keys)) = (node.level, &node.keys) {
            *checker.state.keys.entry(node.btree as u8).or_default() += keys.len() as u64;
        }
        for (address, _) in &node.copies {
            let slot = u32::try_from(address.offset % bucket_bytes / node_bytes).unwrap_or(u32::MAX);
            let used = reachable.entry((address.device.0, address.offset / bucket_bytes)).or_default();
            *used |= 1_u64.checked_shl(slot).unwrap_or(0);
        }
        report_node(checker, node);
        Ok(())
    })?;
    expect_keys(checker);
    let recorded: Slots = pages.into_iter().flatten().map(|entry| ((entry.device, entry.bucket), entry.used)).collect();
    let mut keys: Vec<_> = reachable.keys().chain(recorded.keys()).copied().collect();
    keys.sort_unstable();
    keys.dedup();
    let mut used = Vec::new();
    let mut differs = false;
    for key in keys {
        let (device, bucket) = key;
        let recorded = recorded.get(&key).copied().unwrap_or(0);
        let reachable = reachable.get(&key).copied().unwrap_or(0);
        checker.state.metadata_buckets.insert(key, reachable);
        // What cannot be reached below a lost node is kept all the same.
        let is_complete = checker.state.lost.is_empty();
        let in_use = if is_complete { reachable } else { reachable | recorded };
        differs |= in_use != recorded;
        used.push((device, bucket, in_use));
        // Below a lost interior node everything looks unreachable: then the map is all that is known.
        if recorded != reachable && is_complete {
            checker.report(Problem::NodeMap { device, bucket, recorded, reachable });
        }
    }
    if differs {
        checker.state.in_use_slots = Some((opening.newest.number, used));
    }
    Ok(())
}

/// What the other passes will look at.
fn expect_keys(checker: &mut Checker<'_>) {
    let keys = |btree: BtreeId| checker.state.keys.get(&(btree as u8)).copied().unwrap_or(0);
    let once = 2 * keys(BtreeId::Inodes)
        + [BtreeId::Buckets, BtreeId::Backpointers, BtreeId::Backpointers, BtreeId::FreeSpace, BtreeId::NeedDiscard]
            .map(keys)
            .iter()
            .sum::<u64>();
    let of_inodes = 3 * keys(BtreeId::Inodes) + keys(BtreeId::Extents) + keys(BtreeId::Xattrs);
    let of_windows = keys(BtreeId::Dirents) + keys(BtreeId::Orphans);
    checker.state.keys_of_windows = of_windows;
    checker.expect(checker.examined + once + of_inodes + of_windows);
}

fn report_node(checker: &mut Checker<'_>, node: &PublishedNode) {
    match &node.keys {
        Ok(_) => {
            for (address, outcome) in &node.copies {
                if let Err(error) = outcome {
                    checker.report(Problem::NodeCopy {
                        btree: node.btree,
                        from: node.minimum,
                        node: node.pointer.node.0,
                        level: node.level,
                        device: address.device.0,
                        offset: address.offset,
                        reason: error.to_string(),
                    });
                }
            }
        }
        Err(error) => {
            let to = node.limit.and_then(Position::predecessor).unwrap_or(Position::MAX);
            checker.state.lost.entry(node.btree as u8).or_default().push((node.minimum, to));
            checker.report(Problem::NodeUnreadable {
                btree: node.btree,
                level: node.level,
                from: node.minimum,
                to,
                reason: error.to_string(),
            });
        }
    }
}
