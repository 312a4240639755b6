//! Checks: the root is a directory; every inode that is not to be deleted has a name; every directory reaches the root
//! through the directories that name it; every inode says rightly where it is named; link counts and directory sizes are right.
//! Collects nothing.

use std::collections::HashSet;

use coppicefs::Result;
use coppicefs::format::namespace::FileType;
use coppicefs::units::InodeNumber;

use super::Checker;
use crate::problem::Problem;

const ROOT: u64 = InodeNumber::ROOT.0;

pub(super) fn run(checker: &mut Checker<'_>) -> Result<()> {
    match checker.state.inodes.get(&ROOT) {
        Some(facts) if facts.file_type == Some(FileType::Directory) => {}
        Some(_) => checker.report(Problem::RootMissing { reason: "inode 1 is not a directory".into() }),
        None => checker.report(Problem::RootMissing { reason: "inode 1 does not exist".into() }),
    }
    let mut problems = Vec::new();
    let mut connected: HashSet<u64> = HashSet::from([ROOT]);
    let mut inodes: Vec<u64> = checker.state.inodes.keys().copied().collect();
    inodes.sort_unstable();
    for &inode in &inodes {
        let Some(facts) = checker.state.inodes.get(&inode) else { continue };
        checker.examined += 1;
        if inode == ROOT || checker.state.orphans.contains(&inode) || (facts.link_count == 0 && facts.names == 0) {
            continue;
        }
        if facts.names == 0 {
            problems.push(Problem::Unconnected { inode });
            continue;
        }
        // A file that had several names may have lost the one that it knew.
        let is_unknown = facts.parent == (0, 0) && facts.file_type != Some(FileType::Directory);
        if !facts.parent_confirmed
            && !is_unknown
            && let Some(found) = facts.named_at
        {
            problems.push(Problem::ParentWrong { inode, stored: facts.parent, found });
        }
        if facts.file_type == Some(FileType::Directory) && !reaches_root(checker, inode, &mut connected) {
            problems.push(Problem::Unconnected { inode });
            // What hangs below it is connected through it once it is.
            connected.insert(inode);
        }
    }
    for problem in problems {
        checker.report(problem);
    }
    Ok(())
}

/// Walks up by names until something known to be connected. A loop, or an end, is not.
fn reaches_root(checker: &Checker<'_>, inode: u64, connected: &mut HashSet<u64>) -> bool {
    let mut path = HashSet::new();
    let mut at = inode;
    while !connected.contains(&at) {
        if !path.insert(at) {
            return false;
        }
        match checker.state.inodes.get(&at).and_then(|facts| facts.named_at) {
            Some((parent, _)) => at = parent,
            // An unnamed directory is reported itself, and what is below it will be connected with it.
            None => break,
        }
    }
    connected.extend(path);
    true
}

pub(super) fn link_counts(checker: &mut Checker<'_>) -> Result<()> {
    let mut inodes: Vec<u64> = checker.state.inodes.keys().copied().collect();
    inodes.sort_unstable();
    for inode in inodes {
        let Some(facts) = checker.state.inodes.get(&inode).cloned() else { continue };
        checker.examined += 1;
        if facts.names == 0 && inode != ROOT {
            continue;
        }
        let found = match facts.file_type {
            Some(FileType::Directory) => 2 + facts.subdirectories,
            _ => facts.names,
        };
        if found != facts.link_count {
            checker.report(Problem::LinkCount { inode, stored: facts.link_count, found });
        }
        if facts.file_type == Some(FileType::Directory) && facts.entries != facts.size {
            checker.report(Problem::DirectorySize { inode, stored: facts.size, found: facts.entries });
        }
    }
    Ok(())
}
