//! Checks: entries decode, stand under the hash of their name in a directory that exists, have possible names, and name inodes that
//! exist with the type that they say; a directory has one name. Collects: names by inode, entries by directory.

use coppicefs::Result;
use coppicefs::format::namespace::{Dirent, DirentBucket, FileType, NAME_BYTES_MAX};
use coppicefs::format::{BtreeId, Position};
use coppicefs::units::InodeNumber;
use rayon::prelude::*;

use super::{Checker, printable};
use crate::problem::Problem;
use crate::state::Window;

pub(super) fn run(checker: &mut Checker<'_>) -> Result<()> {
    checker.for_each_batch(BtreeId::Dirents, |checker, keys| {
        let namespace = checker.filesystem.namespace();
        let decoded: Vec<_> = keys
            .into_par_iter()
            .map(|(position, value)| {
                let bucket = DirentBucket::decode(&value);
                let hashes: Vec<u64> =
                    bucket.iter().flat_map(|bucket| &bucket.0).map(|dirent| namespace.hash(&dirent.name)).collect();
                (position, bucket, hashes)
            })
            .collect();
        for (position, bucket, hashes) in decoded {
            let is_ours = checker.state.window.contains(position.inode);
            match bucket {
                Ok(_) if !checker.is_place(position) => {
                    if is_ours {
                        checker.misplaced(BtreeId::Dirents, position);
                    }
                }
                Ok(bucket) => {
                    let mut seen: Vec<&[u8]> = Vec::new();
                    for (dirent, hash) in bucket.0.iter().zip(hashes) {
                        let twice = seen.contains(&dirent.name.as_slice());
                        seen.push(&dirent.name);
                        if is_ours {
                            check_name(checker, position, dirent, hash, twice);
                        }
                        check_dirent(checker, position, dirent);
                    }
                }
                Err(error) if is_ours => checker.undecodable(BtreeId::Dirents, position, &error),
                Err(_) => {}
            }
        }
        Ok(())
    })
}

fn check_name(checker: &mut Checker<'_>, position: Position, dirent: &Dirent, hash: u64, twice: bool) {
    let reason = if !is_possible(&dirent.name) {
        "not a possible name".into()
    } else if twice {
        "it is there twice".into()
    } else if hash != position.offset {
        format!("it stands under hash {:#x}, its own is {hash:#x}", position.offset)
    } else {
        return;
    };
    let (discriminator, name) = (dirent.discriminator, printable(&dirent.name));
    checker.report(Problem::DirentName { position, discriminator, name, reason });
}

/// What an entry says of its directory is counted where that is in the window, and what it says of its target where that is.
fn check_dirent(checker: &mut Checker<'_>, position: Position, dirent: &Dirent) {
    let Window { first, last } = checker.state.window;
    let here = |inode: u64| (first..=last).contains(&inode);
    let (directory, inode, discriminator) = (position.inode, dirent.inode.0, dirent.discriminator);
    if !here(directory) && !here(inode) {
        return;
    }
    if !checker.state.is_directory(directory) {
        if here(directory) {
            checker.report(Problem::DirentOwner { position, discriminator, name: printable(&dirent.name) });
        }
        return;
    }
    if !checker.state.exists(inode) {
        if here(inode) {
            let name = printable(&dirent.name);
            checker.report(Problem::DirentDangling { position, discriminator, name, inode });
        }
        return;
    }
    let is_second = here(inode) && !name_target(checker, position, dirent);
    let is_subdirectory = !is_second && checker.state.is_directory(inode);
    if let Some(facts) = checker.state.inode_mut(directory) {
        facts.entries += 1;
        facts.subdirectories += u32::from(is_subdirectory);
    }
}

/// Counts a name of an inode of the window. Returns `false` if it is a second one of a directory.
fn name_target(checker: &mut Checker<'_>, position: Position, dirent: &Dirent) -> bool {
    let here = (position.inode, position.offset);
    let Some(target) = checker.state.inode_mut(dirent.inode.0) else { return true };
    let actual = target.file_type;
    if actual == Some(FileType::Directory) && (target.names > 0 || dirent.inode == InodeNumber::ROOT) {
        let is_the_known_one = target.parent == here && !target.parent_confirmed;
        let before = target.named_at.filter(|_| is_the_known_one);
        if let Some((other, _)) = before {
            (target.named_at, target.parent_confirmed) = (Some(here), true);
            for (directory, change) in [(other, -1), (position.inode, 1)] {
                if let Some(facts) = checker.state.inode_mut(directory) {
                    facts.subdirectories = facts.subdirectories.saturating_add_signed(change);
                }
            }
        }
        second_name(checker, position, dirent, printable(&dirent.name), before);
        return false;
    }
    target.names += 1;
    target.named_at.get_or_insert(here);
    target.parent_confirmed |= target.parent == here;
    if let Some(actual) = actual
        && actual != dirent.file_type
    {
        let (stored, actual) = (dirent.file_type as u8, actual as u8);
        let (discriminator, name) = (dirent.discriminator, printable(&dirent.name));
        checker.report(Problem::DirentType { position, discriminator, name, stored, actual });
    }
    true
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
