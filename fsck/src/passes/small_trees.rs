//! Checks: the subvolumes and snapshots trees hold the one key that every filesystem has, and nothing else; keys of devices stand where such keys stand.
//! A mount must understand these keys, so what is wrong with them keeps it from coming up; what they say is known without them. Collects nothing.

use coppicefs::Result;
use coppicefs::btree::Keys;
use coppicefs::format::namespace::{Snapshot, Subvolume};
use coppicefs::format::{BtreeId, Position};
use coppicefs::snapshot::{stored_root, stored_subvolume};

use super::Checker;
use crate::problem::Problem;

pub(super) fn run(checker: &mut Checker<'_>) -> Result<()> {
    one_key(checker, BtreeId::Subvolumes, stored_subvolume()?, |value| Ok(format!("{:?}", Subvolume::decode(value)?)))?;
    one_key(checker, BtreeId::Snapshots, stored_root()?, |value| Ok(format!("{:?}", Snapshot::decode(value)?)))?;
    let devices = checker.filesystem.superblock().members.len() as u64;
    checker.for_each_batch(BtreeId::Devices, |checker, batch| {
        for (position, _) in batch.iter().flat_map(Keys::iter) {
            if position.inode >= devices || position != Position::new(position.inode, 0, 0) {
                checker.report(Problem::IndexKeyStray { btree: BtreeId::Devices, position });
            }
        }
        Ok(())
    })
}

/// A tree that has one key, whose value is known.
fn one_key(
    checker: &mut Checker<'_>,
    btree: BtreeId,
    (expected, expected_value): (Position, Vec<u8>),
    says: impl Fn(&[u8]) -> Result<String>,
) -> Result<()> {
    let mut is_there = false;
    checker.for_each_batch(btree, |checker, batch| {
        for (position, value) in batch.iter().flat_map(Keys::iter) {
            if position != expected {
                checker.undecodable(btree, position, &"there is only one, and this is not its place");
                continue;
            }
            is_there = true;
            if value != expected_value {
                let reason = says(value).map_or_else(|error| error.to_string(), |says| format!("there is no {says}"));
                checker.undecodable(btree, position, &reason);
            }
        }
        Ok(())
    })?;
    // It may be in a node that is lost, whose repair comes first.
    if !is_there && !checker.state.lost.contains_key(&(btree as u8)) {
        checker.report(Problem::SubvolumeMissing { btree, position: expected });
    }
    Ok(())
}
