//! Checks: the root is a directory; every inode that is not to be deleted has a name, and says rightly where; every directory reaches the root
//! through the directories that name it; link counts and directory sizes are right. Collects nothing.

use std::collections::HashSet;

use coppicefs::Result;
use coppicefs::format::namespace::FileType;
use coppicefs::units::InodeNumber;

use super::Checker;
use crate::problem::Problem;
use crate::state::InodeFacts;

const ROOT: u64 = InodeNumber::ROOT.0;

pub(super) fn run(checker: &mut Checker<'_>) -> Result<()> {
    if checker.state.window.contains(ROOT) {
        match checker.state.inode(ROOT) {
            Some(facts) if facts.file_type == Some(FileType::Directory) => {}
            Some(_) => checker.report(Problem::RootMissing { reason: "inode 1 is not a directory".into() }),
            None => checker.report(Problem::RootMissing { reason: "inode 1 does not exist".into() }),
        }
    }
    checker.examine(checker.state.inodes().len() as u64);
    let found: Vec<Problem> = checker.state.inodes().iter().filter_map(|facts| check_inode(checker, facts)).collect();
    found.into_iter().for_each(|problem| checker.report(problem));
    Ok(())
}

fn check_inode(checker: &Checker<'_>, facts: &InodeFacts) -> Option<Problem> {
    let inode = facts.inode;
    if inode == ROOT || checker.state.orphans.contains(&inode) || (facts.link_count == 0 && facts.names == 0) {
        return None;
    }
    if facts.names == 0 {
        return Some(Problem::Unconnected { inode });
    }
    // A file that had several names may have lost the one that it knew.
    let is_unknown = facts.parent == (0, 0) && facts.file_type != Some(FileType::Directory);
    let found = facts.named_at.filter(|_| !facts.parent_confirmed && !is_unknown)?;
    Some(Problem::ParentWrong { inode, stored: facts.parent, found })
}

/// Every directory that has a name reaches the root.
pub(super) fn directories(checker: &mut Checker<'_>) -> Result<()> {
    let mut problems = Vec::new();
    let mut connected: HashSet<u64> = HashSet::from([ROOT]);
    let mut examined = 0;
    for inode in checker.state.directories() {
        examined += 1;
        if !reaches_root(checker, inode, &mut connected) {
            problems.push(Problem::Unconnected { inode });
            // What hangs below it is connected through it once it is.
            connected.insert(inode);
        }
    }
    checker.examine(examined);
    problems.into_iter().for_each(|problem| checker.report(problem));
    Ok(())
}

/// Walks up by names until something known to be connected. A loop is not.
fn reaches_root(checker: &Checker<'_>, inode: u64, connected: &mut HashSet<u64>) -> bool {
    let mut path = HashSet::new();
    let mut at = inode;
    while !connected.contains(&at) {
        if !path.insert(at) {
            return false;
        }
        match checker.state.named_in(at) {
            Some(parent) => at = parent,
            // An unnamed directory is reported itself, and what is below it will be connected with it.
            None => break,
        }
    }
    connected.extend(path);
    true
}

pub(super) fn link_counts(checker: &mut Checker<'_>) -> Result<()> {
    checker.examine(checker.state.inodes().len() as u64);
    let found: Vec<Problem> = checker.state.inodes().iter().flat_map(check_counts).collect();
    found.into_iter().for_each(|problem| checker.report(problem));
    Ok(())
}

fn check_counts(facts: &InodeFacts) -> impl Iterator<Item = Problem> {
    let inode = facts.inode;
    let is_directory = facts.file_type == Some(FileType::Directory);
    let is_named = facts.names > 0 || inode == ROOT;
    let found = if is_directory { 2 + facts.subdirectories } else { facts.names };
    let links = (is_named && found != facts.link_count).then_some(Problem::LinkCount {
        inode,
        stored: facts.link_count,
        found,
    });
    let size = (is_named && is_directory && facts.entries != facts.size).then_some(Problem::DirectorySize {
        inode,
        stored: facts.size,
        found: facts.entries,
    });
    links.into_iter().chain(size)
}
