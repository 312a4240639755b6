//! Checks of the trees that hold a handful of keys, which follow the [`passes`]: the subvolumes and snapshots trees hold the one key that every filesystem
//! has, and nothing else; keys of devices and orphans stand where such keys stand; logged operations can be gone on with.
//!
//! A mount must understand these keys, so what is wrong with them keeps it from coming up; what most of them say is known without them. A tree of which a node
//! is lost is left out: the nodes pass has reported that, and its repair comes first. Takes no locks; nothing is kept but the problems.

use std::time::Instant;

use coppicefs::filesystem::Filesystem;
use coppicefs::format::namespace::{Inode, LoggedOperation, Snapshot, Subvolume};
use coppicefs::format::{BtreeId, Position, Value};
use coppicefs::snapshot::{stored_root, stored_subvolume};
use coppicefs::{Error, Result};

use crate::passes::{self, CheckOptions, OnProgress};
use crate::problem::Problem;
use crate::repair::{inode_position, orphan_position};
use crate::report::{PassReport, Report};

/// Keys that one step of a scan asks for.
const SCAN_KEYS: usize = 4096;

/// All passes, and these checks. `progress` is as for [`passes::check`].
///
/// # Errors
/// As [`check_with`].
pub fn check(filesystem: &Filesystem, progress: &(dyn Fn(usize, usize, &'static str, u64) + Sync)) -> Result<Report> {
    let mut report = passes::check(filesystem, progress)?;
    add_to(filesystem, &mut report)?;
    Ok(report)
}

/// Runs all passes and these checks over a filesystem that nobody changes meanwhile.
///
/// # Errors
/// Only what makes checking itself impossible. Damage is in the report.
pub fn check_with(filesystem: &Filesystem, options: &CheckOptions, progress: OnProgress<'_>) -> Result<Report> {
    let mut report = passes::check_with(filesystem, options, progress)?;
    add_to(filesystem, &mut report)?;
    Ok(report)
}

fn add_to(filesystem: &Filesystem, report: &mut Report) -> Result<()> {
    let start = Instant::now();
    let mut examined = 0;
    for check in [subvolumes, snapshots, devices, orphans, logged_operations] {
        match check(filesystem, &mut examined) {
            // The orphans pass has said so of those that have names.
            Ok(problems) => {
                let is_new = |problem: &Problem| match problem {
                    Problem::OrphanLinked { inode, .. } => !report
                        .problems
                        .iter()
                        .any(|known| matches!(known, Problem::OrphanLinked { inode: known, .. } if known == inode)),
                    _ => true,
                };
                let new: Vec<Problem> = problems.into_iter().filter(is_new).collect();
                report.problems.extend(new);
            }
            Err(error) if error.is_media_error() => {}
            Err(error) => return Err(error),
        }
    }
    report.passes.push(PassReport { name: "small trees", duration: start.elapsed(), examined });
    Ok(())
}

/// The problems of a tree's keys, those that `problem` finds.
fn keys_of(
    filesystem: &Filesystem,
    btree: BtreeId,
    examined: &mut u64,
    mut problem: impl FnMut(Position, &Value) -> Option<Problem>,
) -> Result<Vec<Problem>> {
    let mut problems = Vec::new();
    let mut cursor = Some(Position::MIN);
    while let Some(from) = cursor {
        let scan = filesystem.forest().scan(btree, from, Position::MAX, SCAN_KEYS)?;
        *examined += scan.keys.len() as u64;
        problems.extend(scan.keys.iter().filter_map(|(position, value)| problem(*position, value)));
        cursor = scan.covered_to.successor();
    }
    Ok(problems)
}

fn undecodable(btree: BtreeId, position: Position, reason: impl ToString) -> Problem {
    Problem::KeyUndecodable { btree, position, reason: reason.to_string() }
}

/// A tree that has one key, whose value is known.
fn one_key(
    filesystem: &Filesystem,
    examined: &mut u64,
    btree: BtreeId,
    (expected, expected_value): (Position, Vec<u8>),
    says: impl Fn(&[u8]) -> Result<String>,
) -> Result<Vec<Problem>> {
    let mut is_there = false;
    let mut problems = keys_of(filesystem, btree, examined, |position, value| {
        if position != expected {
            return Some(undecodable(btree, position, "there is only one, and this is not its place"));
        }
        is_there = true;
        if **value == *expected_value {
            return None;
        }
        let reason = says(value).map_or_else(|error| error.to_string(), |says| format!("there is no {says}"));
        Some(undecodable(btree, position, reason))
    })?;
    if !is_there {
        problems.push(Problem::SubvolumeMissing { btree, position: expected });
    }
    Ok(problems)
}

fn subvolumes(filesystem: &Filesystem, examined: &mut u64) -> Result<Vec<Problem>> {
    one_key(filesystem, examined, BtreeId::Subvolumes, stored_subvolume()?, |value| {
        Ok(format!("{:?}", Subvolume::decode(value)?))
    })
}

fn snapshots(filesystem: &Filesystem, examined: &mut u64) -> Result<Vec<Problem>> {
    one_key(filesystem, examined, BtreeId::Snapshots, stored_root()?, |value| {
        Ok(format!("{:?}", Snapshot::decode(value)?))
    })
}

fn devices(filesystem: &Filesystem, examined: &mut u64) -> Result<Vec<Problem>> {
    let devices = filesystem.superblock().members.len() as u64;
    keys_of(filesystem, BtreeId::Devices, examined, |position, _| {
        let is_place = position.inode < devices && position == Position::new(position.inode, 0, 0);
        (!is_place).then_some(Problem::IndexKeyStray { btree: BtreeId::Devices, position })
    })
}

fn orphans(filesystem: &Filesystem, examined: &mut u64) -> Result<Vec<Problem>> {
    keys_of(filesystem, BtreeId::Orphans, examined, |position, value| {
        if position != orphan_position(position.offset) {
            return Some(undecodable(BtreeId::Orphans, position, "no deletion is noted there"));
        }
        if !value.is_empty() {
            return Some(undecodable(BtreeId::Orphans, position, format!("{} bytes, not 0", value.len())));
        }
        // Whoever deletes orphans leaves one alone that says that it has names: it would stay for ever.
        let stored = filesystem.forest().get(BtreeId::Inodes, inode_position(position.offset)).ok()??;
        let links = Inode::decode(&stored).ok()?.link_count;
        (links > 0).then_some(Problem::OrphanLinked { inode: position.offset, links })
    })
}

fn logged_operations(filesystem: &Filesystem, examined: &mut u64) -> Result<Vec<Problem>> {
    keys_of(filesystem, BtreeId::LoggedOperations, examined, |position, value| {
        // What does not decode is the orphans pass's.
        let operation = LoggedOperation::decode(value).map_err(Error::from).ok()?;
        let problem = filesystem.data().operation_problem(position, &operation)?;
        Some(undecodable(BtreeId::LoggedOperations, position, problem))
    })
}
