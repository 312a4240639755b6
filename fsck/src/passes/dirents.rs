//! Checks: entries decode, stand under the hash of their name in a directory that exists, have possible names, and name inodes that
//! exist with the type that they say; a directory has one name. Collects: names by inode, entries by directory.

use coppicefs::Result;
use coppicefs::error::Corruption;
use coppicefs::format::namespace::{DirentBucket, DirentRef, FileType, NAME_BYTES_MAX};
use coppicefs::format::{BtreeId, Position};
use coppicefs::units::InodeNumber;
use smallvec::SmallVec;

use super::{Checker, printable};
use crate::problem::Problem;
use crate::state::{Found, Window};

/// An entry as it is stored, and what was worked out beside the others.
struct Entry<'k> {
    stored: DirentRef<'k>,
    hash: u64,
    target: Option<Found>,
}

type Bucket<'k> = SmallVec<[Entry<'k>; 1]>;

pub(super) fn run(checker: &mut Checker<'_>) -> Result<()> {
    let mut directory = Directory { inode: 0, found: None };
    checker.for_each_batch(BtreeId::Dirents, |checker, batch| {
        let namespace = checker.filesystem.namespace();
        let state = &checker.state;
        let look_up = |stored: DirentRef<'_>| (namespace.hash(stored.name), state.find(stored.inode.0));
        let parse = |_, value| -> std::result::Result<Bucket<'_>, Corruption> {
            let entries = DirentBucket::parse(value)?.into_iter();
            Ok(entries.map(|stored| (stored, look_up(stored))).map(Entry::from).collect())
        };
        for (position, bucket) in super::decoded(batch, parse).into_iter().flatten() {
            let is_ours = checker.state.window.contains(position.inode);
            match bucket {
                Ok(_) if !checker.is_place(position) => {
                    if is_ours {
                        checker.misplaced(BtreeId::Dirents, position);
                    }
                }
                Ok(bucket) => {
                    if directory.inode != position.inode {
                        directory = Directory { inode: position.inode, found: checker.state.find(position.inode) };
                    }
                    check_bucket(checker, position, &bucket, directory, is_ours);
                }
                Err(error) if is_ours => checker.undecodable(BtreeId::Dirents, position, &error),
                Err(_) => {}
            }
        }
        Ok(())
    })
}

impl<'k> From<(DirentRef<'k>, (u64, Option<Found>))> for Entry<'k> {
    fn from((stored, (hash, target)): (DirentRef<'k>, (u64, Option<Found>))) -> Self {
        Self { stored, hash, target }
    }
}

/// The directory that the last entry was in.
#[derive(Clone, Copy)]
struct Directory {
    inode: u64,
    found: Option<Found>,
}

fn check_bucket(
    checker: &mut Checker<'_>,
    position: Position,
    bucket: &Bucket<'_>,
    directory: Directory,
    is_ours: bool,
) {
    for (index, entry) in bucket.iter().enumerate() {
        if is_ours {
            let twice = bucket.iter().take(index).any(|before| before.stored.name == entry.stored.name);
            check_name(checker, position, entry, twice);
        }
        check_dirent(checker, position, entry, directory);
    }
}

fn check_name(checker: &mut Checker<'_>, position: Position, entry: &Entry<'_>, twice: bool) {
    let Entry { stored, hash, .. } = *entry;
    let reason = if !is_possible(stored.name) {
        "not a possible name".into()
    } else if twice {
        "it is there twice".into()
    } else if hash != position.offset {
        format!("it stands under hash {:#x}, its own is {hash:#x}", position.offset)
    } else {
        return;
    };
    let (discriminator, name) = (stored.discriminator, printable(stored.name));
    checker.report(Problem::DirentName { position, discriminator, name, reason });
}

/// What an entry says of its directory is counted where that is in the window, and what it says of its target where that is.
fn check_dirent(checker: &mut Checker<'_>, position: Position, entry: &Entry<'_>, directory: Directory) {
    let Window { first, last } = checker.state.window;
    let here = |inode: u64| (first..=last).contains(&inode);
    let stored = &entry.stored;
    let (inode, discriminator) = (stored.inode.0, stored.discriminator);
    if !here(directory.inode) && !here(inode) {
        return;
    }
    let Some(directory) = directory.found.filter(|found| found.is_directory) else {
        if here(directory.inode) {
            checker.report(Problem::DirentOwner { position, discriminator, name: printable(stored.name) });
        }
        return;
    };
    let Some(target) = entry.target else {
        if here(inode) {
            let name = printable(stored.name);
            checker.report(Problem::DirentDangling { position, discriminator, name, inode });
        }
        return;
    };
    let is_second = here(inode) && !name_target(checker, position, stored, target);
    let is_subdirectory = !is_second && target.is_directory;
    if let Some(facts) = checker.state.facts_of(directory) {
        facts.entries += 1;
        facts.subdirectories += u32::from(is_subdirectory);
    }
}

/// Counts a name of an inode of the window. Returns `false` if it is a second one of a directory.
fn name_target(checker: &mut Checker<'_>, position: Position, dirent: &DirentRef<'_>, found: Found) -> bool {
    let here = (position.inode, position.offset);
    let Some(target) = checker.state.facts_of(found) else { return true };
    let actual = target.file_type;
    if actual == Some(FileType::Directory) && (target.names > 0 || dirent.inode == InodeNumber::ROOT) {
        let is_the_known_one = target.parent == here && !target.parent_confirmed;
        let before = target.named_at.filter(|_| is_the_known_one);
        if let Some((other, _)) = before {
            (target.named_at, target.parent_confirmed) = (Some(here), true);
            for (directory, change) in [(other, -1), (position.inode, 1)] {
                let facts = checker.state.find(directory).and_then(|found| checker.state.facts_of(found));
                if let Some(facts) = facts {
                    facts.subdirectories = facts.subdirectories.saturating_add_signed(change);
                }
            }
        }
        second_name(checker, position, dirent, printable(dirent.name), before);
        return false;
    }
    target.names += 1;
    target.named_at.get_or_insert(here);
    target.parent_confirmed |= target.parent == here;
    if let Some(actual) = actual
        && actual != dirent.file_type
    {
        let (stored, actual) = (dirent.file_type as u8, actual as u8);
        let (discriminator, name) = (dirent.discriminator, printable(dirent.name));
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
    dirent: &DirentRef<'_>,
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
