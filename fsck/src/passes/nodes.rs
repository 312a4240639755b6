//! Checks: every node that the newest checkpoint reaches, on each of its copies: header, chain of bsets, order and range of keys; and
//! that the node-space map has exactly the slots of reachable nodes. The leaves are read, and checked in the same way, by the passes that go through their
//! trees (`scan.rs`): here it is seen that no slot is used twice. Collects: buckets that hold nodes, and ranges of keys that are lost.

use std::collections::{BTreeMap, HashMap};

use coppicefs::Result;
use coppicefs::btree::walk_interior;
use coppicefs::format::checkpoint::MapEntry;

use super::scan::{Published, reader_of};
use super::{Checker, READ_FOR_EACH_WINDOW, READ_ONCE};
use crate::problem::Problem;

type Slots = BTreeMap<(u8, u64), u64>;

pub(super) fn run(checker: &mut Checker<'_>) -> Result<()> {
    let filesystem = checker.filesystem;
    let reader = reader_of(filesystem);
    let opening = reader.choose_checkpoint()?;
    for passed in opening.passed_over.iter().filter(|passed| passed.is_damage) {
        checker.report(Problem::CheckpointDamaged {
            number: passed.number,
            used: opening.newest.number,
            reason: passed.reason.clone(),
        });
    }
    let pages = reader.read_map(&opening.newest)?;
    let geometry = filesystem.superblock().geometry;
    let (bucket_bytes, node_bytes) = (u64::from(geometry.bucket_bytes), u64::from(geometry.node_bytes));
    let mut reachable = Slots::new();
    let mut leaf_bytes: HashMap<u8, u64> = HashMap::new();
    walk_interior(&reader, &opening.newest, &mut |node| {
        checker.examine(1);
        for (address, _) in &node.copies {
            let slot = u32::try_from(address.offset % bucket_bytes / node_bytes).unwrap_or(u32::MAX);
            let used = reachable.entry((address.device.0, address.offset / bucket_bytes)).or_default();
            *used |= 1_u64.checked_shl(slot).unwrap_or(0);
        }
        if node.level == 0 {
            *leaf_bytes.entry(node.btree as u8).or_default() += u64::from(node.pointer.written_bytes);
        }
        checker.report_copies(node);
        Ok(())
    })?;
    let published = Published { reader, checkpoint: opening.newest, verified: HashMap::new(), leaf_bytes };
    checker.expect(published.bytes_of(READ_ONCE) + published.bytes_of(READ_FOR_EACH_WINDOW));
    check_map(checker, published.checkpoint.number, reachable, pages);
    checker.state.published = Some(Box::new(published));
    Ok(())
}

fn check_map(checker: &mut Checker<'_>, checkpoint: u64, reachable: Slots, pages: Vec<Vec<MapEntry>>) {
    let recorded: Slots = pages.into_iter().flatten().map(|entry| ((entry.device, entry.bucket), entry.used)).collect();
    let mut keys: Vec<_> = reachable.keys().chain(recorded.keys()).copied().collect();
    keys.sort_unstable();
    keys.dedup();
    // What cannot be reached below a lost node is kept all the same.
    let is_complete = checker.state.lost.is_empty();
    let mut used = Vec::new();
    let mut differs = false;
    for key in keys {
        let (device, bucket) = key;
        let recorded = recorded.get(&key).copied().unwrap_or(0);
        let reachable = reachable.get(&key).copied().unwrap_or(0);
        checker.state.metadata_buckets.insert(key, reachable);
        let in_use = if is_complete { reachable } else { reachable | recorded };
        differs |= in_use != recorded;
        used.push((device, bucket, in_use));
        // Below a lost interior node everything looks unreachable: then the map is all that is known.
        if recorded != reachable && is_complete {
            checker.report(Problem::NodeMap { device, bucket, recorded, reachable });
        }
    }
    if differs {
        checker.state.in_use_slots = Some((checkpoint, used));
    }
}
