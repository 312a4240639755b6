//! Which inodes there are: those that were found, and those that must have been, since newer leaves name them or hold their data.
//!
//! A name, an entry or an extent of an inode that is not there means one of two things. If the inodes' leaf is newer than the leaf that it stands in, the
//! inode was deleted, and what still names it is old. If the inodes' leaf is older, or lost, the inode is lost: it is made up from what
//! is known of it, so that its data has a place.

use std::collections::{BTreeMap, HashMap, HashSet};

use coppicefs::Result;
use coppicefs::env::Timestamp;
use coppicefs::format::namespace::{Dirent, DirentBucket, FileType, Inode, LoggedOperation, NAME_BYTES_MAX};
use coppicefs::format::{BtreeId, Position};
use coppicefs::units::{InodeNumber, SnapshotId};

use super::tree::Trees;

const ROOT: u64 = InodeNumber::ROOT.0;

/// What is known of an inode.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// Its type.
    pub file_type: Option<FileType>,
    /// Its size in bytes; of one that is made up, where its last extent ends.
    pub size: u64,
    /// It was lost.
    pub is_made_up: bool,
    /// It has extents.
    pub has_extents: bool,
    /// Directory and hash that it says it is named by.
    pub parent: (u64, u64),
    /// Bytes that its extents hold.
    pub allocated_bytes: u64,
    /// Names that were found.
    pub names: u32,
    /// Of a directory: directories in it.
    pub subdirectories: u32,
    /// Of a directory: entries.
    pub entries: u64,
    /// The first place where it is named.
    pub named_at: Option<(u64, u64)>,
    /// Where it is named by the name that it says, hashed anew.
    pub confirmed_at: Option<(u64, u64)>,
}

/// Whether there is an inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existence {
    /// It was found, or made up before.
    Exists,
    /// It was there, and is lost.
    Lost,
    /// It was deleted.
    Deleted,
}

/// All inodes.
#[derive(Debug, Default)]
pub struct Inodes {
    /// By number.
    pub facts: BTreeMap<u64, Facts>,
    /// Inodes on which an operation is to be finished at the next mount.
    pub logged: HashSet<u64>,
    /// Values that mean nothing.
    pub undecodable: u64,
    /// Made up, but nothing of them is left.
    pub hollow: u64,
    /// For each directory the one name that counts: its directory, and the hash that it was found at.
    directory_names: HashMap<u64, (u64, u64)>,
}

/// The position of an inode's key.
#[must_use]
pub fn inode_position(inode: u64) -> Position {
    Position::new(inode, 0, SnapshotId::ROOT.0)
}

/// Whether a name can be one.
#[must_use]
pub fn is_name(name: &[u8]) -> bool {
    !name.is_empty()
        && name.len() <= NAME_BYTES_MAX
        && name != b"."
        && name != b".."
        && !name.iter().any(|byte| matches!(byte, 0 | b'/'))
}

impl Inodes {
    /// Reads inodes, pending operations and names.
    ///
    /// # Errors
    /// None of damage.
    pub fn collect(trees: &Trees<'_>) -> Result<Self> {
        let mut inodes = Self::default();
        trees.for_each(BtreeId::Inodes, |key| {
            match Inode::decode(&key.value) {
                Ok(inode) if key.position == inode_position(key.position.inode) => {
                    inodes.facts.insert(
                        key.position.inode,
                        Facts {
                            file_type: inode.file_type(),
                            size: inode.size,
                            parent: (inode.parent, inode.parent_hash),
                            ..Facts::default()
                        },
                    );
                }
                _ => inodes.undecodable += 1,
            }
            Ok(())
        })?;
        trees.for_each(BtreeId::LoggedOperations, |key| {
            if let Ok(operation) = LoggedOperation::decode(&key.value) {
                inodes.logged.insert(operation.inode());
            }
            Ok(())
        })?;
        let root = inodes.facts.entry(ROOT).or_insert_with(|| Facts { is_made_up: true, ..Facts::default() });
        root.file_type = Some(FileType::Directory);
        trees.for_each(BtreeId::Dirents, |key| {
            match DirentBucket::decode(&key.value) {
                Ok(bucket) if key.position.snapshot == SnapshotId::ROOT.0 => {
                    for dirent in &bucket.0 {
                        inodes.learn_name(trees, key.position, key.known, dirent);
                    }
                }
                _ => inodes.undecodable += 1,
            }
            Ok(())
        })?;
        Ok(inodes)
    }

    /// Whether there is an inode that something names which is known to have been so at `known`.
    #[must_use]
    pub fn existence(&self, trees: &Trees<'_>, inode: u64, known: u64) -> Existence {
        if self.facts.contains_key(&inode) {
            return Existence::Exists;
        }
        if inode == 0 || inode > InodeNumber::MAX.0 {
            return Existence::Deleted;
        }
        match trees.known_at(BtreeId::Inodes, inode_position(inode)) {
            Some(newest) if newest >= known => Existence::Deleted,
            _ => Existence::Lost,
        }
    }

    /// Makes an inode up.
    pub fn make_up(&mut self, inode: u64, file_type: Option<FileType>) -> &mut Facts {
        let facts = self.facts.entry(inode).or_insert_with(|| Facts { is_made_up: true, ..Facts::default() });
        if facts.is_made_up && facts.file_type.is_none() {
            facts.file_type = file_type;
        }
        facts
    }

    fn learn_name(&mut self, trees: &Trees<'_>, position: Position, known: u64, dirent: &Dirent) {
        if !is_name(&dirent.name) {
            return;
        }
        let directory = position.inode;
        match self.existence(trees, directory, known) {
            Existence::Deleted => return,
            Existence::Lost => {
                self.make_up(directory, Some(FileType::Directory));
            }
            Existence::Exists => {}
        }
        // Something that was made up as the target of a name is a directory for certain if it has entries.
        match self.facts.get_mut(&directory) {
            Some(facts) if facts.is_made_up => facts.file_type = Some(FileType::Directory),
            Some(facts) if facts.file_type == Some(FileType::Directory) => {}
            _ => return,
        }
        let target = dirent.inode.0;
        match self.existence(trees, target, known) {
            Existence::Deleted => return,
            Existence::Lost => {
                if !matches!(dirent.file_type, FileType::Directory | FileType::Regular | FileType::Symlink) {
                    return;
                }
                self.make_up(target, Some(dirent.file_type));
            }
            Existence::Exists => {}
        }
        if let Some(facts) = self.facts.get(&target)
            && facts.file_type == Some(FileType::Directory)
        {
            let here = (directory, position.offset);
            if facts.parent == here {
                self.directory_names.insert(target, here);
            } else {
                self.directory_names.entry(target).or_insert(here);
            }
        }
    }

    /// Forgets what was made up and has nothing in it, and symbolic links without a target, when all extents are known.
    pub fn drop_hollow(&mut self) {
        let before = self.facts.len();
        self.facts.retain(|_, facts| match facts.file_type {
            Some(FileType::Directory) => true,
            Some(FileType::Symlink) => facts.has_extents,
            _ => !facts.is_made_up || facts.has_extents,
        });
        self.hollow = (before - self.facts.len()) as u64;
        for facts in self.facts.values_mut().filter(|facts| facts.is_made_up) {
            facts.file_type.get_or_insert(FileType::Regular);
        }
    }

    /// Forgets what a walk has counted, for the next one.
    pub fn reset_counts(&mut self) {
        for facts in self.facts.values_mut() {
            (facts.allocated_bytes, facts.names, facts.subdirectories, facts.entries) = (0, 0, 0, 0);
            (facts.named_at, facts.confirmed_at) = (None, None);
        }
    }

    /// Whether an entry that stands at `position` is kept, and the type that it gets.
    #[must_use]
    pub fn keeps(&self, position: Position, dirent: &Dirent) -> Option<FileType> {
        let directory = self.facts.get(&position.inode)?;
        let target = self.facts.get(&dirent.inode.0)?;
        if directory.file_type != Some(FileType::Directory) || !is_name(&dirent.name) || dirent.inode.0 == ROOT {
            return None;
        }
        if target.file_type == Some(FileType::Directory)
            && self.directory_names.get(&dirent.inode.0).is_some_and(|here| *here != (position.inode, position.offset))
        {
            return None;
        }
        Some(target.file_type.unwrap_or(dirent.file_type))
    }

    /// Counts a name that is kept.
    pub fn count_name(&mut self, directory: u64, found_at: u64, stored_at: u64, inode: u64) {
        let mut is_directory = false;
        if let Some(facts) = self.facts.get_mut(&inode) {
            is_directory = facts.file_type == Some(FileType::Directory);
            facts.names = facts.names.saturating_add(1);
            facts.named_at.get_or_insert((directory, stored_at));
            if facts.parent == (directory, found_at) {
                facts.confirmed_at = Some((directory, stored_at));
            }
        }
        if let Some(facts) = self.facts.get_mut(&directory) {
            facts.entries += 1;
            facts.subdirectories += u32::from(is_directory);
        }
    }
}

impl Facts {
    /// The inode as it is to be stored: `found` with what was learned, or made up.
    #[must_use]
    pub fn inode(&self, number: u64, found: Option<Inode>, now: Timestamp) -> Inode {
        let is_directory = self.file_type == Some(FileType::Directory);
        let mut inode = found.unwrap_or_else(|| Inode {
            mode: self.file_type.map_or(0, FileType::mode_bits) | if is_directory { 0o700 } else { 0o600 },
            link_count: 1,
            size: self.size,
            access_time: now.into(),
            modification_time: now.into(),
            change_time: now.into(),
            birth_time: now.into(),
            ..Inode::default()
        });
        inode.allocated_bytes = self.allocated_bytes;
        if number == ROOT {
            inode.mode = FileType::Directory.mode_bits() | inode.mode & 0o7777;
            (inode.parent, inode.parent_hash) = (ROOT, 0);
        } else if let Some(at) = self.confirmed_at.or(self.named_at) {
            (inode.parent, inode.parent_hash) = at;
        }
        if is_directory {
            inode.link_count = 2 + self.subdirectories;
            inode.size = self.entries;
        } else if self.names > 0 {
            inode.link_count = self.names;
        }
        inode
    }
}
