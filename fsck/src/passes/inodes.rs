//! Checks: every inode decodes and has a known type. Collects: which inodes there are (`index`); facts about those of the window, and the number of
//! inodes (`run`). If facts about all of them fit the budget, `index` collects them, and nothing is left to `run`.

use coppicefs::Result;
use coppicefs::error::Corruption;
use coppicefs::format::journal::AccountingCounter;
use coppicefs::format::namespace::{FileType, Inode};
use coppicefs::format::{BtreeId, Position};

use super::Checker;
use crate::problem::Problem;
use crate::state::{FACTS_BYTES, InodeFacts};

/// What is known of the inodes that were looked at.
#[derive(Default)]
struct Gathered {
    facts: Vec<InodeFacts>,
    problems: Vec<Problem>,
    keys: i64,
    /// Directories, regular files, symbolic links, others.
    kinds: [u64; 4],
}

pub(super) fn index(checker: &mut Checker<'_>) -> Result<()> {
    let mut gathered = Some(Gathered::default());
    if let Some(gathered) = &mut gathered {
        // Only a hint: it may be wrong.
        let stored = checker.filesystem.totals().get(AccountingCounter::Inodes);
        let most = checker.tables_bytes / FACTS_BYTES;
        gathered.facts.reserve_exact(usize::try_from(u64::try_from(stored).unwrap_or(0).min(most / 2)).unwrap_or(0));
    }
    checker.for_each_batch(BtreeId::Inodes, |checker, batch| {
        for (position, inode) in super::decoded(batch, facts_of).into_iter().flatten() {
            if let Ok((facts, _)) = &inode
                && position.offset == 0
                && checker.is_place(position)
            {
                let is_directory = facts.file_type == Some(FileType::Directory);
                checker.state.add_to_index(position.inode, is_directory);
            }
            if let Some(gathered) = &mut gathered {
                gathered.add(checker, position, inode);
            }
        }
        let facts = gathered.as_ref().map_or(0, |gathered| gathered.facts.len() as u64 * FACTS_BYTES);
        if checker.state.index_bytes() + facts > checker.tables_bytes {
            gathered = None;
        }
        Ok(())
    })?;
    if let Some(mut gathered) = gathered {
        let facts = std::mem::take(&mut gathered.facts);
        gathered.put(checker);
        checker.state.set_all_facts(facts);
    }
    Ok(())
}

pub(super) fn run(checker: &mut Checker<'_>) -> Result<()> {
    if checker.state.has_all_facts() {
        return Ok(());
    }
    checker.for_each_of_window(BtreeId::Inodes, |checker, batch| {
        let mut gathered = Gathered::default();
        for (position, inode) in super::decoded(batch, facts_of).into_iter().flatten() {
            gathered.add(checker, position, inode);
        }
        std::mem::take(&mut gathered.facts).into_iter().for_each(|facts| checker.state.add(facts));
        gathered.put(checker);
        Ok(())
    })
}

/// What is kept of a stored inode, and its mode.
fn facts_of(position: Position, value: &[u8]) -> Result<(InodeFacts, u32), Corruption> {
    let inode = Inode::decode(value)?;
    let facts = InodeFacts {
        inode: position.inode,
        file_type: inode.file_type(),
        link_count: inode.link_count,
        size: inode.size,
        allocated_bytes: inode.allocated_bytes,
        found_bytes: 0,
        names: 0,
        subdirectories: 0,
        entries: 0,
        parent: (inode.parent, inode.parent_hash),
        named_at: None,
        parent_confirmed: false,
    };
    Ok((facts, inode.mode))
}

impl Gathered {
    fn add(&mut self, checker: &Checker<'_>, position: Position, inode: Result<(InodeFacts, u32), Corruption>) {
        self.keys += 1;
        match inode {
            Ok((facts, mode)) if position.offset == 0 && checker.is_place(position) => self.add_inode(facts, mode),
            Ok(_) => self.problems.push(super::misplaced(BtreeId::Inodes, position)),
            Err(error) => self.problems.push(super::undecodable(BtreeId::Inodes, position, &error)),
        }
    }

    fn add_inode(&mut self, facts: InodeFacts, mode: u32) {
        let kind = match facts.file_type {
            Some(FileType::Directory) => 0,
            Some(FileType::Regular) => 1,
            Some(FileType::Symlink) => 2,
            _ => 3,
        };
        if let Some(count) = self.kinds.get_mut(kind) {
            *count += 1;
        }
        if facts.file_type.is_none() {
            self.problems.push(Problem::InodeType { inode: facts.inode, mode });
        }
        self.facts.push(facts);
    }

    fn put(self, checker: &mut Checker<'_>) {
        checker.state.count(AccountingCounter::Inodes, self.keys);
        for (sum, count) in checker.inode_counts.iter_mut().zip(self.kinds) {
            *sum += count;
        }
        self.problems.into_iter().for_each(|problem| checker.report(problem));
    }
}
