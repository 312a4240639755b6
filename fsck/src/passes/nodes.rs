//! Checks: every node that the checkpoint reaches, on each of its copies: header, chain of bsets, order and range of keys; and that
//! the node-space map has exactly the slots of reachable nodes. Collects: buckets that hold nodes, and ranges of keys that are lost.

use std::collections::BTreeMap;

use coppicefs::Result;

use super::Checker;
use crate::problem::Problem;

pub(super) fn run(checker: &mut Checker<'_>) -> Result<()> {
    let forest = checker.filesystem.forest().clone();
    let superblock = checker.filesystem.superblock().clone();
    let bucket_bytes = u64::from(superblock.geometry.bucket_bytes);
    let node_bytes = u64::from(superblock.geometry.node_bytes);
    let mut reachable: BTreeMap<(u8, u64), u64> = BTreeMap::new();
    forest.walk_published(&mut |visit| {
        checker.examined += 1;
        (checker.progress)(checker.examined);
        for copy in &visit.copies {
            let bucket = copy.address.offset / bucket_bytes;
            let slot = copy.address.offset % bucket_bytes / node_bytes;
            *reachable.entry((copy.address.device.0, bucket)).or_default() |=
                1_u64.checked_shl(u32::try_from(slot).unwrap_or(64)).unwrap_or(0);
            if let Err(error) = &copy.outcome
                && visit.copies.iter().any(|other| other.outcome.is_ok())
            {
                checker.problems.push(Problem::NodeCopy {
                    btree: visit.btree,
                    node: visit.node.0,
                    device: copy.address.device.0,
                    offset: copy.address.offset,
                    reason: error.to_string(),
                });
            }
        }
        if let Some(Err(error)) = visit.copies.iter().map(|copy| &copy.outcome).find(|outcome| outcome.is_err())
            && visit.copies.iter().all(|copy| copy.outcome.is_err())
        {
            let to = visit.last;
            checker.state.lost.entry(visit.btree as u8).or_default().push((visit.minimum, to));
            checker.problems.push(Problem::NodeUnreadable {
                btree: visit.btree,
                level: visit.level,
                from: visit.minimum,
                to,
                reason: error.to_string(),
            });
        }
        Ok(())
    })?;
    let recorded: BTreeMap<(u8, u64), u64> =
        forest.published_map()?.into_iter().map(|entry| ((entry.device, entry.bucket), entry.used)).collect();
    let mut keys: Vec<_> = reachable.keys().chain(recorded.keys()).copied().collect();
    keys.sort_unstable();
    keys.dedup();
    for key in keys {
        let (device, bucket) = key;
        let recorded = recorded.get(&key).copied();
        let reachable = reachable.get(&key).copied().unwrap_or(0);
        checker.state.metadata_buckets.insert(key, reachable);
        if recorded.unwrap_or(0) != reachable && checker.state.lost.is_empty() {
            checker.report(Problem::NodeMap { device, bucket, recorded: recorded.unwrap_or(0), reachable });
        }
    }
    Ok(())
}
