//! What a rebuild found, for people and as JSON.

use coppicefs::format::namespace::FileType;
use coppicefs::format::{BtreeId, Position};
use coppicefs::recovery::records::FoundLog;
use serde::Serialize;

use super::data::{Extents, FileRange};
use super::inodes::Inodes;
use super::survey::Survey;
use super::tree::{Applied, Trees};
use super::write::Written;

/// Ranges and files that are listed for people; JSON has all.
const LISTED_MAX: usize = 20;

/// A range of keys of which no leaf, or an old one, was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LostKeys {
    /// Name of the tree.
    pub tree: &'static str,
    /// First position.
    pub from: String,
    /// First position behind; nothing if there is none.
    pub to: Option<String>,
}

/// See the module's documentation. Sizes in bytes.
#[derive(Clone, Debug, Default, Serialize)]
#[allow(clippy::struct_excessive_bools, reason = "each is a finding")]
pub struct RebuildReport {
    /// The filesystem.
    pub filesystem: String,
    /// A copy of the superblock was whole. Else its sizes are guessed, and its label is lost.
    pub superblock_found: bool,
    /// A rebuild was cut off before.
    pub was_cut_off: bool,
    /// The checkpoint whose trees were followed, as far as they can be; without one the newest leaves count.
    pub used_checkpoint: Option<u64>,
    /// Nodes of the filesystem, all copies and all ages.
    pub nodes: u64,
    /// Slots that start like nodes and are damaged.
    pub damaged_nodes: u64,
    /// Nodes in images that are stored in files.
    pub misplaced_nodes: u64,
    /// Nodes of other filesystems.
    pub foreign_nodes: u64,
    /// Bytes of the device that cannot be read.
    pub unreadable_bytes: u64,
    /// Records of the journal.
    pub log_records: u64,
    /// Keys that only the journal has.
    pub log_keys: u64,
    /// Records that are missing in the journal.
    pub log_missing: u64,
    /// Directories.
    pub directories: u64,
    /// Regular files.
    pub regular_files: u64,
    /// Symbolic links.
    pub symbolic_links: u64,
    /// Other files.
    pub other_files: u64,
    /// Names.
    pub names: u64,
    /// Bytes of regular files, by their sizes.
    pub file_bytes: u64,
    /// Bytes of data that were checked.
    pub checked_bytes: u64,
    /// Inodes that were lost, and made up from their data and names: owner, mode, times and the exact size are lost.
    pub made_up: u64,
    /// Names whose file is lost altogether.
    pub lost_files: u64,
    /// Ranges of keys without a leaf.
    pub lost_keys: Vec<LostKeys>,
    /// Ranges of keys whose newest leaf is lost: an older one stands in.
    pub outdated_keys: Vec<LostKeys>,
    /// Ranges of keys that may be older than the rest: something points to a newer leaf, which was not found.
    pub suspect_keys: Vec<LostKeys>,
    /// Values that mean nothing.
    pub undecodable: u64,
    /// Parts of files whose space another file has.
    pub lost_ranges: Vec<FileRange>,
    /// Parts of files of which the keys are lost or outdated: they may be holes now, or old.
    pub uncertain_ranges: Vec<FileRange>,
    /// Parts of files whose data does not fit its checksums.
    pub damaged_ranges: Vec<FileRange>,
    /// Whether the trees were written.
    pub is_written: bool,
    /// How many nodes they have.
    pub written_nodes: u64,
}

pub(super) fn report(
    survey: &Survey,
    log: &FoundLog,
    applied: Applied,
    trees: &Trees<'_>,
    inodes: &Inodes,
    extents: &Extents,
    written: &Written,
) -> RebuildReport {
    let [directories, regular_files, symbolic_links, other_files] = written.inode_counts;
    let (mut lost_keys, mut outdated_keys, mut suspect_keys) = (Vec::new(), Vec::new(), Vec::new());
    for btree in [BtreeId::Inodes, BtreeId::Dirents, BtreeId::Extents, BtreeId::Xattrs] {
        let named = |(from, to): (Position, Option<Position>)| LostKeys {
            tree: btree.name(),
            from: from.to_string(),
            to: to.map(|to| to.to_string()),
        };
        // A tree of which nothing is left may never have had a key.
        if !trees.is_unknown(btree) || trees.had_leaves(btree) {
            lost_keys.extend(trees.lost(btree).into_iter().map(named));
        }
        outdated_keys.extend(trees.outdated(btree).into_iter().map(named));
        suspect_keys.extend(trees.suspects(btree).iter().copied().map(named));
    }
    // Records of earlier laps are overwritten here and there; what is in the nodes is not missed.
    let is_missed = |(first, end): &(u64, u64)| end.saturating_sub((*first).max(survey.newest_in_nodes + 1));
    RebuildReport {
        filesystem: survey.filesystem.to_string(),
        superblock_found: survey.superblock.is_some(),
        was_cut_off: survey.is_second,
        nodes: survey.nodes.len() as u64,
        damaged_nodes: survey.damaged_nodes,
        misplaced_nodes: survey.misplaced_nodes,
        foreign_nodes: survey.foreign_nodes,
        unreadable_bytes: survey.unreadable_bytes,
        log_records: applied.records,
        log_keys: applied.keys,
        log_missing: applied.bad_records + log.missing.iter().map(is_missed).sum::<u64>(),
        directories,
        regular_files,
        symbolic_links,
        other_files,
        names: written.names,
        file_bytes: written.file_bytes,
        checked_bytes: extents.checked_bytes,
        made_up: inodes.facts.values().filter(|facts| facts.is_made_up).count() as u64,
        lost_files: inodes.hollow,
        lost_keys,
        outdated_keys,
        suspect_keys,
        undecodable: inodes.undecodable + extents.undecodable + written.too_long,
        lost_ranges: extents.lost.clone(),
        uncertain_ranges: uncertain(trees, inodes),
        damaged_ranges: extents.damaged.clone(),
        ..RebuildReport::default()
    }
}

/// What files have in ranges of extents whose newest leaf is lost.
fn uncertain(trees: &Trees<'_>, inodes: &Inodes) -> Vec<FileRange> {
    let mut found = Vec::new();
    let suspects = trees.suspects(BtreeId::Extents).iter().copied();
    for (from, to) in trees.lost(BtreeId::Extents).into_iter().chain(trees.outdated(BtreeId::Extents)).chain(suspects) {
        let last = to.map_or(u64::MAX, |to| to.inode);
        for (&inode, facts) in inodes.facts.range(from.inode..=last) {
            let is_data = matches!(facts.file_type, Some(FileType::Regular | FileType::Symlink));
            let start = if inode == from.inode { from.offset } else { 0 };
            let end = match to {
                Some(to) if inode == to.inode => facts.size.min(to.offset),
                _ => facts.size,
            };
            if is_data && start < end {
                found.push(FileRange { inode, start, end });
            }
        }
    }
    found.sort_unstable();
    found.dedup();
    found
}

impl RebuildReport {
    /// Whether anything is missing that was there once, as far as can be told.
    #[must_use]
    pub fn is_something_lost(&self) -> bool {
        self.made_up + self.lost_files + self.undecodable + self.log_missing + self.unreadable_bytes > 0
            || !self.lost_keys.is_empty()
            || !self.outdated_keys.is_empty()
            || !self.suspect_keys.is_empty()
            || !self.lost_ranges.is_empty()
            || !self.damaged_ranges.is_empty()
    }

    /// What was found, in lines.
    #[must_use]
    pub fn describe(&self) -> Vec<String> {
        let size = |bytes: u64| humansize::format_size(bytes, humansize::BINARY);
        let mut lines = vec![
            format!(
                "filesystem {}: {} copies of nodes, {} of the journal's records; {}, {}",
                self.filesystem,
                self.nodes,
                self.log_records,
                if self.superblock_found {
                    "its superblock is whole"
                } else {
                    "its superblock is lost: sizes are what fits, the label is gone"
                },
                match self.used_checkpoint {
                    Some(number) => format!("checkpoint {number} was followed"),
                    None => "no checkpoint to follow: the newest leaves count".into(),
                }
            ),
            format!(
                "found: {} directories, {} files ({}), {} symbolic links, {} others, {} names; {} of data checked",
                self.directories,
                self.regular_files,
                size(self.file_bytes),
                self.symbolic_links,
                self.other_files,
                self.names,
                size(self.checked_bytes)
            ),
        ];
        let mut add = |count: u64, text: String| {
            if count > 0 {
                lines.push(text);
            }
        };
        add(u64::from(self.was_cut_off), "a rebuild was cut off before; what it wrote does not count".into());
        add(
            self.misplaced_nodes + self.foreign_nodes,
            format!(
                "left out: {} nodes of images in files, {} of other filesystems",
                self.misplaced_nodes, self.foreign_nodes
            ),
        );
        add(self.unreadable_bytes, format!("lost: {} of the device cannot be read", size(self.unreadable_bytes)));
        add(self.damaged_nodes, format!("{} nodes are damaged; other copies may not be", self.damaged_nodes));
        add(self.log_missing, format!("lost: {} records of the journal, with the newest changes", self.log_missing));
        add(
            self.made_up,
            format!("{} lost inodes are made up: owner, mode, times and exact size of these are lost", self.made_up),
        );
        add(self.lost_files, format!("lost: {} files of which only the name is left", self.lost_files));
        add(self.undecodable, format!("lost: {} keys that mean nothing", self.undecodable));
        let listed = |what: &str, ranges: &[FileRange], lines: &mut Vec<String>| {
            for range in ranges.iter().take(LISTED_MAX) {
                lines.push(format!("{what}: bytes {} to {} of inode {}", range.start, range.end, range.inode));
            }
            if ranges.len() > LISTED_MAX {
                lines.push(format!("{what}: {} more parts of files", ranges.len() - LISTED_MAX));
            }
        };
        let keys = |what: &str, ranges: &[LostKeys], lines: &mut Vec<String>| {
            for lost in ranges.iter().take(LISTED_MAX) {
                let to = lost.to.as_deref().unwrap_or("the end");
                lines.push(format!("{what}: keys {} to {to} of {}", lost.from, lost.tree));
            }
            if ranges.len() > LISTED_MAX {
                lines.push(format!("{what}: {} more ranges of keys", ranges.len() - LISTED_MAX));
            }
        };
        keys("lost", &self.lost_keys, &mut lines);
        keys("outdated, an older leaf stands in", &self.outdated_keys, &mut lines);
        keys("may be older than the rest, something points to a newer leaf", &self.suspect_keys, &mut lines);
        listed("lost", &self.lost_ranges, &mut lines);
        listed("uncertain, may be holes or old", &self.uncertain_ranges, &mut lines);
        listed("damaged", &self.damaged_ranges, &mut lines);
        lines
    }
}
