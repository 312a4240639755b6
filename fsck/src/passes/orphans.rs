//! Checks: what is noted for deletion exists and has no name; what has no link is noted. Logged operations mean something. Collects: the orphans of
//! the window. An orphan is work that a record has promised, and counts as clean.

use coppicefs::Result;
use coppicefs::btree::Keys;
use coppicefs::format::BtreeId;
use coppicefs::format::namespace::LoggedOperation;

use super::Checker;
use crate::problem::Problem;
use crate::repair::orphan_position;

pub(super) fn run(checker: &mut Checker<'_>) -> Result<()> {
    if checker.state.window.first == 0 {
        checker.for_each_batch(BtreeId::LoggedOperations, |checker, batch| {
            for (position, value) in batch.iter().flat_map(Keys::iter) {
                let problem = match LoggedOperation::decode(value) {
                    Ok(operation) => checker.filesystem.data().operation_problem(position, &operation),
                    Err(error) => Some(error.to_string()),
                };
                if let Some(problem) = problem {
                    checker.undecodable(BtreeId::LoggedOperations, position, &problem);
                }
            }
            Ok(())
        })?;
    }
    checker.for_each_batch(BtreeId::Orphans, |checker, batch| {
        for (position, value) in batch.iter().flat_map(Keys::iter) {
            let inode = position.offset;
            if !checker.state.window.contains(inode) {
                continue;
            }
            if position != orphan_position(inode) {
                checker.undecodable(BtreeId::Orphans, position, &"no deletion is noted there");
                continue;
            }
            if !value.is_empty() {
                checker.undecodable(BtreeId::Orphans, position, &format!("{} bytes, not 0", value.len()));
                continue;
            }
            checker.state.orphans.insert(inode);
            // Whoever deletes orphans leaves one alone that says that it has names: it would stay for ever.
            match checker.state.inode(inode).map(|facts| facts.names.max(facts.link_count)) {
                None => checker.report(Problem::OrphanDangling { inode }),
                Some(0) => {}
                Some(links) => checker.report(Problem::OrphanLinked { inode, links }),
            }
        }
        Ok(())
    })?;
    let state = &checker.state;
    let is_missing = |inode: u64| !state.orphans.contains(&inode);
    let nameless = state.inodes().iter().filter(|facts| facts.link_count == 0 && facts.names == 0);
    let missing: Vec<u64> = nameless.map(|facts| facts.inode).filter(|inode| is_missing(*inode)).collect();
    for inode in missing {
        checker.report(Problem::OrphanMissing { inode });
    }
    Ok(())
}
