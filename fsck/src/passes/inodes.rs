//! Checks: every inode decodes and has a known type. Collects: which inodes there are (`index`); facts about those of the window, and the number of
//! inodes (`run`).

use coppicefs::Result;
use coppicefs::format::BtreeId;
use coppicefs::format::journal::AccountingCounter;
use coppicefs::format::namespace::{FileType, Inode};
use rayon::prelude::*;

use super::Checker;
use crate::problem::Problem;
use crate::state::InodeFacts;

pub(super) fn index(checker: &mut Checker<'_>) -> Result<()> {
    checker.for_each_batch(BtreeId::Inodes, |checker, keys| {
        let types: Vec<_> = keys
            .into_par_iter()
            .map(|(position, value)| (position, Inode::decode(&value).ok().map(|inode| inode.file_type())))
            .collect();
        for (position, file_type) in types {
            if let Some(file_type) = file_type
                && position.offset == 0
                && checker.is_place(position)
            {
                checker.state.add_to_index(position.inode, file_type == Some(FileType::Directory));
            }
        }
        Ok(())
    })
}

pub(super) fn run(checker: &mut Checker<'_>) -> Result<()> {
    checker.for_each_of_window(BtreeId::Inodes, |checker, keys| {
        let decoded: Vec<_> = keys.into_par_iter().map(|(position, value)| (position, Inode::decode(&value))).collect();
        for (position, inode) in decoded {
            checker.state.count(AccountingCounter::Inodes, 1);
            match inode {
                Ok(inode) if position.offset == 0 && checker.is_place(position) => {
                    check_inode(checker, position.inode, &inode);
                }
                Ok(_) => checker.misplaced(BtreeId::Inodes, position),
                Err(error) => checker.undecodable(BtreeId::Inodes, position, &error),
            }
        }
        Ok(())
    })
}

fn check_inode(checker: &mut Checker<'_>, number: u64, inode: &Inode) {
    let file_type = inode.file_type();
    let kind = match file_type {
        Some(FileType::Directory) => 0,
        Some(FileType::Regular) => 1,
        Some(FileType::Symlink) => 2,
        _ => 3,
    };
    if let Some(count) = checker.inode_counts.get_mut(kind) {
        *count += 1;
    }
    if file_type.is_none() {
        checker.report(Problem::InodeType { inode: number, mode: inode.mode });
    }
    checker.state.add(InodeFacts {
        inode: number,
        file_type,
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
    });
}
