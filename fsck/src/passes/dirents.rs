//! Checks: entries decode, stand under the hash of their name in a directory that exists, have possible names, and name inodes that
//! exist with the type that they say; a directory has one name. Collects: names by inode, entries by directory.

use coppicefs::Result;
use coppicefs::format::namespace::{Dirent, DirentBucket, FileType, NAME_BYTES_MAX};
use coppicefs::format::{BtreeId, Position};

use super::{Checker, printable};
use crate::problem::Problem;

pub(super) fn run(checker: &mut Checker<'_>) -> Result<()> {
    checker.for_each_batch(BtreeId::Dirents, |checker, keys| {
        for (position, value) in keys {
            match DirentBucket::decode(&value) {
                Ok(bucket) => {
                    let mut seen: Vec<&[u8]> = Vec::new();
                    for dirent in &bucket.0 {
                        let twice = seen.contains(&dirent.name.as_slice());
                        seen.push(&dirent.name);
                        check_dirent(checker, position, dirent, twice);
                    }
                }
                Err(error) => checker.undecodable(BtreeId::Dirents, position, &error),
            }
        }
        Ok(())
    })
}

fn check_dirent(checker: &mut Checker<'_>, position: Position, dirent: &Dirent, twice: bool) {
    let name = printable(&dirent.name);
    let discriminator = dirent.discriminator;
    let directory = position.inode;
    let hash = checker.filesystem.namespace().hash(&dirent.name);
    let reason = if dirent.name.is_empty() || dirent.name.len() > NAME_BYTES_MAX {
        Some(format!("{} bytes long", dirent.name.len()))
    } else if matches!(dirent.name.as_slice(), b"." | b"..") || dirent.name.iter().any(|byte| matches!(byte, 0 | b'/'))
    {
        Some("not a possible name".into())
    } else if twice {
        Some("it is there twice".into())
    } else if hash != position.offset {
        Some(format!("it stands under hash {:#x}, its own is {hash:#x}", position.offset))
    } else {
        None
    };
    if let Some(reason) = reason {
        checker.report(Problem::DirentName { position, discriminator, name: name.clone(), reason });
    }
    match checker.state.inodes.get_mut(&directory) {
        Some(facts) if facts.file_type == Some(FileType::Directory) => facts.entries += 1,
        _ => {
            checker.report(Problem::DirentOwner { directory, name: name.clone() });
            return;
        }
    }
    let Some(target) = checker.state.inodes.get_mut(&dirent.inode.0) else {
        checker.report(Problem::DirentDangling { position, discriminator, name, inode: dirent.inode.0 });
        if let Some(facts) = checker.state.inodes.get_mut(&directory) {
            facts.entries -= 1;
        }
        return;
    };
    let is_directory = target.file_type == Some(FileType::Directory);
    let actual = target.file_type;
    if is_directory && target.names > 0 {
        checker.report(Problem::DirectoryNamedTwice { position, discriminator, name, inode: dirent.inode.0 });
        return;
    }
    target.names += 1;
    target.named_at.get_or_insert((directory, position.offset));
    target.parent_confirmed |= target.parent == (directory, position.offset);
    if is_directory && let Some(facts) = checker.state.inodes.get_mut(&directory) {
        facts.subdirectories += 1;
    }
    if let Some(actual) = actual
        && actual != dirent.file_type
    {
        let (stored, actual) = (dirent.file_type as u8, actual as u8);
        checker.report(Problem::DirentType { position, discriminator, name, stored, actual });
    }
}
