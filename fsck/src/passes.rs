//! The passes, in order. Each is in a file of its own, whose first lines say what it checks and what it collects.
//!
//! **Memory.** What is kept of each inode while its names are counted is some 100 bytes; with [`CheckOptions::memory_bytes`] that is bounded: the inodes are
//! looked at in several *windows* of their numbers, and the passes over names and extents run once for each. Always kept are 8 bytes for each inode, 16 more
//! for each directory (the graph that must reach the root), about 100 for each bucket in use, and the problems. Which extents share space is found by
//! walking the backpointers in the order of the device, which takes no memory. The budget is also that of the nodes that are cached ([`node_cache_bytes`])
//! and of the leaves that are read ahead (`scan.rs`). Where the facts of all inodes fit, no tree is read twice.

mod accounting;
mod backpointers;
mod buckets;
mod connectivity;
mod dirents;
mod extents;
mod inodes;
mod nodes;
mod orphans;
mod scan;
mod small_trees;
mod superblock;
mod xattrs;

pub(crate) use backpointers::backpointer_place;
pub(crate) use dirents::is_possible;
pub(crate) use scan::Published;
pub(crate) use xattrs::is_possible_xattr;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use coppicefs::btree::Keys;
use coppicefs::filesystem::Filesystem;
use coppicefs::format::{BtreeId, Position};
use coppicefs::units::{InodeNumber, SnapshotId};
use coppicefs::{Error, Result};
use rayon::prelude::*;

use crate::problem::Problem;
use crate::report::{PassReport, Report};
use crate::state::{FACTS_BYTES, State, Window};

/// A pass: a stable identifier, what it does, and the function.
pub struct Pass {
    /// Stable identifier.
    pub name: &'static str,
    /// What it checks, in a sentence.
    pub sentence: &'static str,
    /// Whether it runs once for each window of inodes.
    pub is_windowed: bool,
    run: fn(&mut Checker<'_>) -> Result<()>,
}

const fn once(name: &'static str, sentence: &'static str, run: fn(&mut Checker<'_>) -> Result<()>) -> Pass {
    Pass { name, sentence, is_windowed: false, run }
}

const fn windowed(name: &'static str, sentence: &'static str, run: fn(&mut Checker<'_>) -> Result<()>) -> Pass {
    Pass { name, sentence, is_windowed: true, run }
}

/// The table. The windowed ones stand together. The journal is checked by opening: a damaged one does not open, and is reported by [`crate::cli`].
pub const PASSES: &[Pass] = &[
    once("superblock", "Every copy of the superblock is whole and the same.", superblock::run),
    once(
        "nodes",
        "Every copy of every node is whole (of most leaves, when their keys are looked at), ranges fit, and the node-space map equals what is reachable.",
        nodes::run,
    ),
    once(
        "inode index",
        "Which inodes there are, and which are directories; all about them, if there is memory.",
        inodes::index,
    ),
    windowed("inodes", "Every inode means something.", inodes::run),
    windowed(
        "extents",
        "Extents belong to files, do not overlap, and point at space with a backpointer.",
        extents::run,
    ),
    windowed("dirents", "Names stand where their hash says, and name what exists.", dirents::run),
    windowed("orphans", "What has no name is noted for deletion, and nothing else is.", orphans::run),
    windowed("connectivity", "Every inode has a name, and says where.", connectivity::run),
    windowed("link counts", "Link counts and directory sizes are the number of names.", connectivity::link_counts),
    windowed("xattrs", "Extended attributes belong to inodes and stand where their hash says.", xattrs::run),
    once("directories", "Every directory can be reached from the root.", connectivity::directories),
    once("backpointers", "No space is shared, and no backpointer is left over.", backpointers::run),
    once(
        "buckets",
        "States and counts of buckets, and the free-space and need-discard trees, are what extents and nodes say.",
        buckets::run,
    ),
    once(
        "small trees",
        "The subvolumes, snapshots and devices trees hold what every filesystem has, and nothing else.",
        small_trees::run,
    ),
    once("accounting", "The global counters are the sums of what was found.", accounting::run),
];

/// How far a check is.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// Number of the pass in [`PASSES`].
    pub pass: usize,
    /// Its name.
    pub name: &'static str,
    /// Bytes of nodes looked at so far, in all passes.
    pub done: u64,
    /// Those that there will be, as far as is known: 0 before the nodes have been counted.
    pub total: u64,
}

/// Called now and then with how far a check is.
pub type OnProgress<'a> = &'a (dyn Fn(Progress) + Sync);

/// As [`check_with`], with all the memory that it takes. `progress` is called with the number of the pass, how many there are, its name, and how many
/// bytes of nodes were looked at so far.
///
/// # Errors
/// As [`check_with`].
pub fn check(filesystem: &Filesystem, progress: &(dyn Fn(usize, usize, &'static str, u64) + Sync)) -> Result<Report> {
    let progress = |at: Progress| progress(at.pass, PASSES.len(), at.name, at.done);
    check_with(filesystem, &CheckOptions::default(), &progress)
}

/// How a check is made.
#[derive(Clone, Copy, Debug)]
pub struct CheckOptions {
    /// Budget for what grows with the number of inodes.
    pub memory_bytes: u64,
}

impl Default for CheckOptions {
    fn default() -> Self {
        Self { memory_bytes: u64::MAX }
    }
}

/// What of a budget nodes in memory may take; the rest is for tables.
#[must_use]
pub fn node_cache_bytes(memory_bytes: u64) -> u64 {
    memory_bytes / 2
}

/// Fewest inodes of a window.
const WINDOW_INODES_MIN: usize = 64;
/// Trees whose leaves are read once, by the passes that they belong to.
const READ_ONCE: &[BtreeId] = &[
    BtreeId::Inodes,
    BtreeId::Extents,
    BtreeId::Xattrs,
    BtreeId::LoggedOperations,
    BtreeId::Buckets,
    BtreeId::FreeSpace,
    BtreeId::NeedDiscard,
    BtreeId::Backpointers,
    BtreeId::Subvolumes,
    BtreeId::Snapshots,
    BtreeId::Devices,
];
/// Trees that are read for each window.
const READ_FOR_EACH_WINDOW: &[BtreeId] = &[BtreeId::Dirents, BtreeId::Orphans];

/// A check that is running.
pub struct Checker<'a> {
    filesystem: &'a Filesystem,
    state: State,
    problems: Vec<Problem>,
    examined: u64,
    work: &'a Work<'a>,
    pass: (usize, &'static str),
    inode_counts: [u64; 4],
    data_bytes: u64,
    /// Bytes of leaves that are read at once.
    batch_bytes: usize,
    /// What tables of inodes may take, in bytes.
    tables_bytes: u64,
}

/// The work of all passes.
struct Work<'a> {
    progress: OnProgress<'a>,
    done: AtomicU64,
    total: AtomicU64,
}

impl Checker<'_> {
    fn report(&mut self, problem: Problem) {
        self.problems.push(problem);
    }

    /// Counts what was looked at.
    fn examine(&mut self, count: u64) {
        self.examined += count;
    }

    /// Shows how far the check is: so many bytes of nodes further.
    fn advance(&self, bytes: u64) {
        let done = self.work.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let (pass, name) = self.pass;
        (self.work.progress)(Progress { pass, name, done, total: self.work.total.load(Ordering::Relaxed).max(done) });
    }

    /// Says how much there will be, as far as is known.
    fn expect(&self, total: u64) {
        self.work.total.store(total, Ordering::Relaxed);
    }

    /// Whether a file's key can stand there.
    fn is_place(&self, position: Position) -> bool {
        position.snapshot == SnapshotId::ROOT.0 && (1..=InodeNumber::MAX.0).contains(&position.inode)
    }

    fn misplaced(&mut self, btree: BtreeId, position: Position) {
        self.report(misplaced(btree, position));
    }

    fn undecodable(&mut self, btree: BtreeId, position: Position, error: &dyn std::fmt::Display) {
        self.report(undecodable(btree, position, error));
    }
}

fn misplaced(btree: BtreeId, position: Position) -> Problem {
    undecodable(btree, position, &"no file has a key there")
}

fn undecodable(btree: BtreeId, position: Position, error: &dyn std::fmt::Display) -> Problem {
    Problem::KeyUndecodable { btree, position, reason: error.to_string() }
}

/// Decodes the keys of a batch, on all cores: leaf by leaf, in order.
fn decoded<'k, T: Send>(batch: &'k [Keys], decode: impl Fn(Position, &'k [u8]) -> T + Sync) -> Vec<Vec<(Position, T)>> {
    let leaf = |keys: &'k Keys| keys.iter().map(|(position, value)| (position, decode(position, value))).collect();
    batch.par_iter().map(leaf).collect()
}

/// Runs all passes over a filesystem that nobody changes meanwhile.
///
/// # Errors
/// Only what makes checking itself impossible: an I/O error of a kind that is not damage, a shutdown. Damage is in the report.
pub fn check_with(filesystem: &Filesystem, options: &CheckOptions, progress: OnProgress<'_>) -> Result<Report> {
    let passes = PASSES.iter().map(|pass| PassReport { name: pass.name, ..PassReport::default() }).collect();
    let mut report = Report { passes, ..Report::default() };
    let work = Work { progress, done: AtomicU64::new(0), total: AtomicU64::new(0) };
    let mut state = State::default();
    let windowed = || PASSES.iter().enumerate().filter(|(_, pass)| pass.is_windowed);
    let first = windowed().next().map_or(0, |(index, _)| index);
    let last = windowed().next_back().map_or(0, |(index, _)| index);
    for (number, _) in PASSES.iter().enumerate().take(first) {
        run_pass(filesystem, options, number, &work, &mut state, &mut report)?;
    }
    let tables = tables_bytes(options);
    let windows = if state.has_all_facts() {
        vec![Window::default()]
    } else {
        let most = tables.saturating_sub(state.index_bytes()) / FACTS_BYTES;
        state.windows(usize::try_from(most).unwrap_or(usize::MAX).max(WINDOW_INODES_MIN))
    };
    report.windows = windows.len();
    if let Some(published) = state.published.as_ref().filter(|_| !state.has_all_facts()) {
        let again = published.bytes_of(READ_FOR_EACH_WINDOW) * (windows.len() as u64 - 1);
        work.total.fetch_add(again + published.bytes_of(&[BtreeId::Inodes]), Ordering::Relaxed);
    }
    for window in windows {
        if !state.has_all_facts() {
            state.begin(window);
        }
        for number in first..=last {
            run_pass(filesystem, options, number, &work, &mut state, &mut report)?;
        }
        report.tables_peak_bytes = report.tables_peak_bytes.max(state.index_bytes() + state.facts_bytes());
    }
    state.end_windows();
    for (number, _) in PASSES.iter().enumerate().skip(last + 1) {
        run_pass(filesystem, options, number, &work, &mut state, &mut report)?;
    }
    report.known_in_use.buckets = state.in_use_buckets;
    report.known_in_use.slots = state.in_use_slots;
    Ok(report)
}

/// What tables of inodes may take of a budget.
fn tables_bytes(options: &CheckOptions) -> u64 {
    options.memory_bytes.saturating_sub(node_cache_bytes(options.memory_bytes))
}

fn run_pass(
    filesystem: &Filesystem,
    options: &CheckOptions,
    number: usize,
    work: &Work<'_>,
    state: &mut State,
    report: &mut Report,
) -> Result<()> {
    let Some(pass) = PASSES.get(number) else { return Ok(()) };
    let start = Instant::now();
    let mut checker = Checker {
        filesystem,
        state: std::mem::take(state),
        problems: Vec::new(),
        examined: 0,
        work,
        pass: (number, pass.name),
        inode_counts: [0; 4],
        data_bytes: 0,
        batch_bytes: scan::batch_bytes(options.memory_bytes),
        tables_bytes: tables_bytes(options),
    };
    checker.advance(0);
    (pass.run)(&mut checker)?;
    report.problems.append(&mut checker.problems);
    if let Some(entry) = report.passes.get_mut(number) {
        entry.duration += start.elapsed();
        entry.examined += checker.examined;
    }
    for (sum, count) in report.inode_counts.iter_mut().zip(checker.inode_counts) {
        *sum += count;
    }
    report.data_bytes += checker.data_bytes;
    *state = checker.state;
    Ok(())
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
