//! Checks: entries decode, stand under the hash of their name in a directory that exists, have possible names, and name inodes that
//! exist with the type that they say; a directory has one name. Collects: names by inode, entries by directory.

use coppicefs::Result;
use coppicefs::format::namespace::{Dirent, DirentBucket, FileType, NAME_BYTES_MAX};
use coppicefs::format::{BtreeId, Position};
use coppicefs::units::InodeNumber;

use super::{Checker, printable};
use crate::problem::Problem;

pub(super) fn run(checker: &mut Checker<'_>) -> Result<()> {
    checker.for_each_batch(BtreeId::Dirents, |checker, keys| {
        for (position, value) in keys {
            match DirentBucket::decode(&value) {
                Ok(_) if !checker.is_place(position) => checker.misplaced(BtreeId::Dirents, position),
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
    let reason = if !is_possible(&dirent.name) {
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
            checker.report(Problem::DirentOwner { position, discriminator, name: name.clone() });
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
    let here = (directory, position.offset);
    let is_the_known_one = target.parent == here && !target.parent_confirmed;
    if is_directory && (target.names > 0 || dirent.inode == InodeNumber::ROOT) {
        let first = target.named_at.filter(|_| is_the_known_one);
        if let Some(first) = first {
            (target.named_at, target.parent_confirmed) = (Some(here), true);
            checker.move_subdirectory(first.0, directory);
        }
        second_name(checker, position, dirent, name, first);
        return;
    }
    target.names += 1;
    target.named_at.get_or_insert(here);
    target.parent_confirmed |= target.parent == here;
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

/// Whether a file can have this name.
pub(crate) fn is_possible(name: &[u8]) -> bool {
    (1..=NAME_BYTES_MAX).contains(&name.len())
        && !matches!(name, b"." | b"..")
        && !name.iter().any(|byte| matches!(byte, 0 | b'/'))
}

/// A directory has a second name. The one that goes is this, or the one at `first` if this is the one that the directory knows.
fn second_name(
    checker: &mut Checker<'_>,
    position: Position,
    dirent: &Dirent,
    name: String,
    first: Option<(u64, u64)>,
) {
    let inode = dirent.inode.0;
    let here = Problem::DirectoryNamedTwice { position, discriminator: dirent.discriminator, name, inode };
    let problem = first
        .and_then(|(directory, hash)| {
            let position = Position::new(directory, hash, position.snapshot);
            let value = checker.filesystem.forest().get(BtreeId::Dirents, position).ok()??;
            let bucket = DirentBucket::decode(&value).ok()?;
            let other = bucket.0.iter().find(|other| other.inode == dirent.inode)?;
            let (discriminator, name) = (other.discriminator, printable(&other.name));
            Some(Problem::DirectoryNamedTwice { position, discriminator, name, inode })
        })
        .unwrap_or(here);
    checker.report(problem);
}
