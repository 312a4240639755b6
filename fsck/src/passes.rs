//! The passes, in order. Each is in a file of its own, whose first lines say what it checks and what it collects.

mod accounting;
mod buckets;
mod connectivity;
mod dirents;
mod extents;
mod inodes;
mod nodes;
mod orphans;
mod superblock;
mod xattrs;

pub(crate) use dirents::is_possible;
pub(crate) use extents::backpointer_place;
pub(crate) use xattrs::is_possible_xattr;

use std::time::Instant;

use coppicefs::filesystem::Filesystem;
use coppicefs::format::{BtreeId, Position, Value};
use coppicefs::units::{InodeNumber, SnapshotId};
use coppicefs::{Error, Result};

use crate::problem::Problem;
use crate::report::{PassReport, Report};
use crate::state::State;

/// A pass: a stable identifier, what it does, and the function.
pub struct Pass {
    /// Stable identifier.
    pub name: &'static str,
    /// What it checks, in a sentence.
    pub sentence: &'static str,
    run: fn(&mut Checker<'_>) -> Result<()>,
}

/// The table. The journal is checked by opening: a damaged one does not open, and is reported by [`crate::cli`].
pub const PASSES: &[Pass] = &[
    Pass { name: "superblock", sentence: "Every copy of the superblock is whole and the same.", run: superblock::run },
    Pass {
        name: "nodes",
        sentence: "Every copy of every node is whole, ranges fit, and the node-space map equals what is reachable.",
        run: nodes::run,
    },
    Pass { name: "inodes", sentence: "Every inode means something.", run: inodes::run },
    Pass {
        name: "extents",
        sentence: "Extents belong to files, do not overlap, and point at space of their own with a backpointer.",
        run: extents::run,
    },
    Pass { name: "dirents", sentence: "Names stand where their hash says, and name what exists.", run: dirents::run },
    Pass {
        name: "orphans",
        sentence: "What has no name is noted for deletion, and nothing else is.",
        run: orphans::run,
    },
    Pass {
        name: "connectivity",
        sentence: "Every inode can be reached from the root, and says where it is named.",
        run: connectivity::run,
    },
    Pass {
        name: "link counts",
        sentence: "Link counts and directory sizes are the number of names.",
        run: connectivity::link_counts,
    },
    Pass {
        name: "xattrs",
        sentence: "Extended attributes belong to inodes and stand where their hash says.",
        run: xattrs::run,
    },
    Pass {
        name: "buckets",
        sentence: "States and counts of buckets, and the free-space and need-discard trees, are what extents and nodes say.",
        run: buckets::run,
    },
    Pass { name: "accounting", sentence: "The global counters are the sums of what was found.", run: accounting::run },
];

/// How far a check is: pass number, passes, name of the pass, keys examined in it so far.
pub type OnProgress<'a> = &'a (dyn Fn(usize, usize, &'static str, u64) + Sync);

/// A check that is running.
pub struct Checker<'a> {
    filesystem: &'a Filesystem,
    state: State,
    problems: Vec<Problem>,
    examined: u64,
    progress: Box<dyn Fn(u64) + 'a>,
    inode_counts: [u64; 4],
    data_bytes: u64,
}

/// Keys that one step of a scan asks for.
const SCAN_KEYS: usize = 4096;

impl Checker<'_> {
    fn report(&mut self, problem: Problem) {
        self.problems.push(problem);
    }

    /// Calls `visit` with batches of keys of a tree, in order. A lost range is jumped over: the nodes pass has reported it.
    fn for_each_batch(
        &mut self,
        btree: BtreeId,
        mut visit: impl FnMut(&mut Self, Vec<(Position, Value)>) -> Result<()>,
    ) -> Result<()> {
        let mut cursor = Some(Position::MIN);
        while let Some(from) = cursor {
            match self.filesystem.forest().scan(btree, from, Position::MAX, SCAN_KEYS) {
                Ok(scan) => {
                    cursor = scan.covered_to.successor();
                    self.examined += scan.keys.len() as u64;
                    (self.progress)(self.examined);
                    visit(self, scan.keys)?;
                }
                Err(error) if error.is_media_error() => {
                    let lost = self.state.lost.get(&(btree as u8)).into_iter().flatten();
                    match lost.filter(|(first, last)| *first <= from && from <= *last).map(|(_, last)| *last).max() {
                        Some(last) => cursor = last.successor(),
                        None => {
                            self.report(Problem::NodeUnreadable {
                                btree,
                                level: 0,
                                from,
                                to: Position::MAX,
                                reason: error.to_string(),
                            });
                            return Ok(());
                        }
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Whether a file's key can stand there.
    fn is_place(&self, position: Position) -> bool {
        position.snapshot == SnapshotId::ROOT.0 && (1..=InodeNumber::MAX.0).contains(&position.inode)
    }

    fn misplaced(&mut self, btree: BtreeId, position: Position) {
        self.undecodable(btree, position, &"no file has a key there");
    }

    /// A directory hangs below another than was thought first.
    fn move_subdirectory(&mut self, from: u64, to: u64) {
        for (directory, change) in [(from, -1), (to, 1)] {
            if let Some(facts) = self.state.inodes.get_mut(&directory) {
                facts.subdirectories = facts.subdirectories.saturating_add_signed(change);
            }
        }
    }

    fn undecodable(&mut self, btree: BtreeId, position: Position, error: &dyn std::fmt::Display) {
        self.report(Problem::KeyUndecodable { btree, position, reason: error.to_string() });
    }
}

/// Runs all passes over a filesystem that nobody changes meanwhile.
///
/// # Errors
/// Only what makes checking itself impossible: an I/O error of a kind that is not damage, a shutdown. Damage is in the report.
pub fn check(filesystem: &Filesystem, progress: OnProgress<'_>) -> Result<Report> {
    let mut report = Report::default();
    let mut state = State::default();
    for (number, pass) in PASSES.iter().enumerate() {
        let start = Instant::now();
        let mut checker = Checker {
            filesystem,
            state: std::mem::take(&mut state),
            problems: Vec::new(),
            examined: 0,
            progress: Box::new(move |examined| progress(number, PASSES.len(), pass.name, examined)),
            inode_counts: [0; 4],
            data_bytes: 0,
        };
        (checker.progress)(0);
        (pass.run)(&mut checker)?;
        report.problems.append(&mut checker.problems);
        report.passes.push(PassReport { name: pass.name, duration: start.elapsed(), examined: checker.examined });
        for (sum, count) in report.inode_counts.iter_mut().zip(checker.inode_counts) {
            *sum += count;
        }
        report.data_bytes += checker.data_bytes;
        state = checker.state;
        report.known_in_use.buckets.append(&mut state.in_use_buckets);
        report.known_in_use.slots = report.known_in_use.slots.take().or(state.in_use_slots.take());
    }
    Ok(report)
}

/// A name for people: bytes that are not UTF-8 or not printable are escaped, since names are hostile text.
fn printable(name: &[u8]) -> String {
    String::from_utf8_lossy(name).escape_debug().collect()
}

/// Turns damage into `None`, keeps other errors.
fn unless_damaged<T>(outcome: Result<T>) -> Result<std::result::Result<T, Error>> {
    match outcome {
        Ok(value) => Ok(Ok(value)),
        Err(error) if error.is_media_error() => Ok(Err(error)),
        Err(error) => Err(error),
    }
}
