//! Checks: what is noted for deletion exists and has no name; what has no link is noted. Collects: the orphans, and inodes of
//! logged operations. An orphan is work that a record has promised, and counts as clean.

use coppicefs::Result;
use coppicefs::format::BtreeId;
use coppicefs::format::namespace::LoggedOperation;

use super::Checker;
use crate::problem::Problem;

pub(super) fn run(checker: &mut Checker<'_>) -> Result<()> {
    checker.for_each_batch(BtreeId::LoggedOperations, |checker, keys| {
        for (position, value) in keys {
            match LoggedOperation::decode(&value) {
                Ok(operation) => {
                    checker.state.logged.insert(operation.inode());
                }
                Err(error) => checker.undecodable(BtreeId::LoggedOperations, position, &error),
            }
        }
        Ok(())
    })?;
    checker.for_each_batch(BtreeId::Orphans, |checker, keys| {
        for (position, _) in keys {
            let inode = position.offset;
            checker.state.orphans.insert(inode);
            match checker.state.inodes.get(&inode).map(|facts| facts.names) {
                None => checker.report(Problem::OrphanDangling { inode }),
                Some(0) => {}
                Some(links) => checker.report(Problem::OrphanLinked { inode, links }),
            }
        }
        Ok(())
    })?;
    let mut missing: Vec<u64> = checker
        .state
        .inodes
        .iter()
        .filter(|(inode, facts)| facts.link_count == 0 && facts.names == 0 && !checker.state.orphans.contains(inode))
        .map(|(inode, _)| *inode)
        .collect();
    missing.sort_unstable();
    for inode in missing {
        checker.report(Problem::OrphanMissing { inode });
    }
    Ok(())
}
