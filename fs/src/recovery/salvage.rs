//! Reading what is left of an image that cannot be mounted: keys around lost nodes, file data by its extents.
//!
//! [`Salvage`] needs a superblock and one checkpoint record. A tree whose root is lost is empty, a node that is lost is a range that is named and jumped
//! over, records of the journal that are lost end the replay with a warning. What the journal says of keys in a lost leaf is kept beside it. Nothing
//! is written; nothing but the trees and the data is looked at: no space, no workers, no transactions.
//!
//! Locks: the forest's. One caller at a time is what it is made for.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::checkpoints::{choose_log, ends_early, find, reuse_check};
use super::{replay, superblock};
use crate::btree::{Around, Forest, ForestConfig, NodeReader, Opening, walk_published};
use crate::data::{BadPart, Extent, ReuseCheck, Shape, read_extent};
use crate::device::BlockDevice;
use crate::env::Env;
use crate::error::{Error, Result};
use crate::format::checkpoint::Checkpoint;
use crate::format::extent::ExtentValue;
use crate::format::journal::{Entries, Entry};
use crate::format::namespace::LoggedOperation;
use crate::format::superblock::Superblock;
use crate::format::{BtreeId, ChecksumKind, Position, Value};
use crate::journal::{JournalConfig, Log, Totals, read_log_best, read_log_prefix};
use crate::metrics::Metrics;
use crate::sync::atomic::AtomicU64;
use crate::units::JournalSequence;

/// The trees that rescue reads.
const TREES: [BtreeId; 5] =
    [BtreeId::Extents, BtreeId::Inodes, BtreeId::Dirents, BtreeId::Xattrs, BtreeId::LoggedOperations];
/// Budget for nodes in memory, in bytes.
const CACHE_BYTES: u64 = 128 << 20;
/// Keys that one step of a scan asks for.
const SCAN_KEYS: usize = 1024;

/// Keys that cannot be read: those from one position to another, both inclusive.
#[derive(Clone, Debug)]
pub struct LostKeys {
    /// Tree.
    pub btree: BtreeId,
    /// First position.
    pub from: Position,
    /// Last position.
    pub to: Position,
    /// Why.
    pub reason: String,
}

/// What a scan comes by, in order.
#[derive(Debug)]
pub enum Salvaged {
    /// A key.
    Key(Position, Value),
    /// A range that is lost, but for the keys of it that come next.
    Lost(LostKeys),
}

/// See the module's documentation.
pub struct Salvage {
    devices: Vec<Arc<dyn BlockDevice>>,
    shape: Shape,
    forest: Arc<Forest>,
    checkpoint: Checkpoint,
    totals: Totals,
    warnings: Vec<String>,
    lost_trees: BTreeMap<BtreeId, String>,
    /// What the journal says of keys whose leaves are lost; `None` for deleted ones.
    beside: BTreeMap<(BtreeId, Position), Option<Value>>,
    /// For another state than the present one.
    reuse: Option<Reuse>,
    give_unverified: bool,
}

/// Which state is read, and how.
#[derive(Clone, Copy, Debug, Default)]
pub struct SalvageOptions {
    /// The state of this checkpoint, as it was when it was made, instead of the present one.
    pub checkpoint: Option<u64>,
    /// Give data that nothing can verify, too: it has no checksum, and whether its space was used again since is not known. It is marked as such.
    pub give_unverified: bool,
}

/// How data of an older state is told from what was written over it.
struct Reuse {
    check: ReuseCheck,
    /// The buckets' present generations are known.
    is_known: bool,
}

/// What can be read of an extent.
#[derive(Debug)]
pub struct ExtentContent {
    /// The bytes, zeros where they cannot be read.
    pub bytes: Vec<u8>,
    /// Where that is.
    pub bad: Vec<BadPart>,
    /// Why nobody can tell whether the bytes are the file's, if so. They are there if [`SalvageOptions::give_unverified`] asks for them.
    pub unverified: Option<String>,
}

impl std::fmt::Debug for Salvage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Salvage").field("checkpoint", &self.checkpoint.number).finish_non_exhaustive()
    }
}

/// A checkpoint that could be read from, with how bad it is.
struct Candidate {
    checkpoint: Checkpoint,
    log: Log,
    log_problem: Option<Error>,
    lost_nodes: u64,
}

impl Salvage {
    /// Opens what is left. Of the checkpoints the one is taken that loses least: the newest, if they are equal.
    ///
    /// # Errors
    /// If no copy of the superblock can be read, or no checkpoint record: then only a rebuild finds anything. [`Error::Unusable`] for a checkpoint that
    /// there is not.
    pub fn open(devices: Vec<Arc<dyn BlockDevice>>, options: SalvageOptions) -> Result<Self> {
        let SalvageOptions { checkpoint: number, give_unverified } = options;
        let first = devices.first().ok_or_else(|| Error::Invalid("a filesystem needs a device".into()))?;
        let superblock = Arc::new(superblock::read(&**first)?.superblock);
        let reader = NodeReader::new(Arc::clone(&superblock), devices.clone(), Arc::new(Metrics::default()));
        let config = JournalConfig::new(&superblock, devices.clone(), None);
        let mut warnings = Vec::new();
        let candidate = match number {
            Some(number) => as_it_was(&reader, &config, number)?,
            None => best(&reader, &config, &mut warnings)?,
        };
        let Candidate { checkpoint, log, log_problem, .. } = candidate;
        if let Some(problem) = &log_problem {
            warnings.push(format!(
                "the journal is damaged ({problem}): what was changed after record {} is lost, and files that were being changed then may mix old and new",
                log.next.0.saturating_sub(1)
            ));
        }
        let mut lost_trees = BTreeMap::new();
        let opening = without_lost_roots(&reader, &checkpoint, &mut lost_trees);
        for (btree, reason) in &lost_trees {
            warnings.push(format!("the root of the {} tree is lost: {reason}", btree.name()));
        }
        let totals = log.totals(&checkpoint).unwrap_or_default();
        let forest = open_forest(&superblock, &devices, &opening, log.highest_epoch.saturating_add(1))?;
        let bucket_bytes = superblock.geometry.bucket_bytes;
        let reuse = match (number, &log_problem) {
            (None, None) => None,
            // What was written behind the damage may be in space that this state's files were in.
            (None, Some(_)) => Some(Reuse { check: reuse_check(None, bucket_bytes), is_known: false }),
            (Some(_), _) => {
                let present = present_or_warn(&superblock, &devices, &reader, &config, &mut warnings);
                let is_known = present.is_some();
                Some(Reuse { check: reuse_check(present, bucket_bytes), is_known })
            }
        };
        let shape = Shape {
            block_bytes: superblock.geometry.block_bytes,
            bucket_bytes: superblock.geometry.bucket_bytes,
            device_bytes: devices.iter().map(|device| device.size_bytes()).collect(),
        };
        let beside = BTreeMap::new();
        let mut salvage =
            Self { devices, shape, forest, checkpoint, totals, warnings, lost_trees, beside, reuse, give_unverified };
        salvage.replay(&log);
        salvage.warn_of_interrupted_operations();
        Ok(salvage)
    }

    /// The checkpoint that is read from.
    #[must_use]
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// The global counters, as far as they are known.
    #[must_use]
    pub fn totals(&self) -> &Totals {
        &self.totals
    }

    /// What whoever uses the result should know, a sentence each.
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Sizes that extents obey.
    #[must_use]
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The raw puts of the journal. A leaf that is lost has no place for them: they are kept beside.
    fn replay(&mut self, log: &Log) {
        for record in &log.records {
            let sequence = record.header.sequence;
            for entry in Entries::new(&record.payload) {
                match entry {
                    Ok(Entry::Key { btree, key }) if TREES.contains(&btree) => {
                        let value: Option<Value> = key.value.map(Into::into);
                        if self.forest.replay_put(btree, key.position, value.clone(), sequence).is_err() {
                            self.beside.insert((btree, key.position), value);
                        }
                    }
                    Ok(_) => {}
                    Err(error) => {
                        self.warnings.push(format!("a part of journal record {sequence} is lost: {error}"));
                        break;
                    }
                }
            }
        }
        if let Err(error) = self.forest.end_replay() {
            self.warnings.push(format!("the journal and the node-space map differ: {error}"));
        }
    }

    fn warn_of_interrupted_operations(&mut self) {
        let mut inodes = Vec::new();
        self.scan(BtreeId::LoggedOperations, Position::MIN, Position::MAX, &mut |salvaged| {
            if let Salvaged::Key(_, value) = salvaged
                && let Ok(operation) = LoggedOperation::decode(&value)
                && !matches!(operation, LoggedOperation::Truncate { .. })
            {
                inodes.push(format!("{operation:?}"));
            }
            Ok(())
        })
        .unwrap_or_default();
        for operation in inodes {
            self.warnings.push(format!(
                "an operation on a file was interrupted, parts of it may stand where they stood before: {operation}"
            ));
        }
    }

    /// Calls `visit` with the keys of a tree from one position to another, both inclusive, and with the ranges that are lost, in order.
    ///
    /// # Errors
    /// The visitor's, which end the scan.
    pub fn scan(
        &self,
        btree: BtreeId,
        from: Position,
        to: Position,
        visit: &mut dyn FnMut(Salvaged) -> Result<()>,
    ) -> Result<()> {
        if let Some(reason) = self.lost_trees.get(&btree) {
            visit(Salvaged::Lost(LostKeys { btree, from, to, reason: reason.clone() }))?;
        }
        let mut cursor = Some(from);
        while let Some(from) = cursor.filter(|from| *from <= to) {
            match self.forest.scan_around(btree, from, to, SCAN_KEYS) {
                Around::Keys(scan) => {
                    cursor = scan.covered_to.successor();
                    for (position, value) in scan.keys {
                        visit(Salvaged::Key(position, value))?;
                    }
                }
                Around::Lost { to: last, error } => {
                    cursor = last.successor();
                    visit(Salvaged::Lost(LostKeys { btree, from, to: last, reason: error.to_string() }))?;
                    for ((_, position), value) in self.beside.range((btree, from)..=(btree, last)) {
                        if let Some(value) = value {
                            visit(Salvaged::Key(*position, Arc::clone(value)))?;
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// What can be read of an extent; `None` for what holds no bytes. See [`read_extent`].
    pub fn read(&self, extent: &Extent) -> Option<ExtentContent> {
        let mut unverified = None;
        if let (Some(reuse), ExtentValue::Data(data)) = (&self.reuse, &extent.value) {
            let is_unknown = !reuse.is_known && data.checksum_kind == ChecksumKind::None;
            let error = match (reuse.check)(data) {
                Ok(None) => None,
                Ok(Some(reason)) => {
                    unverified = is_unknown.then(|| reason.clone());
                    (!is_unknown || !self.give_unverified).then(|| Error::corrupt("the extent", reason))
                }
                Err(error) => Some(error),
            };
            if let Some(error) = error {
                let bad = vec![BadPart { start: 0, end: data.length.into(), error }];
                return Some(ExtentContent { bytes: vec![0; data.length as usize], bad, unverified });
            }
        }
        let (bytes, bad) = read_extent(&self.devices, &self.shape, extent)?;
        Some(ExtentContent { bytes, bad, unverified })
    }
}

/// A checkpoint's own state.
fn as_it_was(reader: &NodeReader, config: &JournalConfig, number: u64) -> Result<Candidate> {
    let checkpoint = find(reader, number)?;
    let (log, log_problem) = read_log_prefix(config, &checkpoint, JournalSequence(checkpoint.newest_sequence))?;
    Ok(Candidate { checkpoint, log, log_problem, lost_nodes: 0 })
}

/// The checkpoint that loses least of the present state.
fn best(reader: &NodeReader, config: &JournalConfig, warnings: &mut Vec<String>) -> Result<Candidate> {
    let mut best: Option<Candidate> = None;
    let mut problem =
        Error::corrupt("checkpoint area", "it holds no valid record: `fsck.coppice --rebuild` may find what is left");
    for (index, checkpoint) in reader.checkpoints().into_iter().enumerate() {
        let (log, log_problem) = match read_log_best(config, &checkpoint) {
            Ok((log, problem)) => {
                let problem = problem.or_else(|| ends_early(reader, &log));
                (log, problem)
            }
            Err(error) => {
                problem = error;
                continue;
            }
        };
        // Without the journal from its F on an older checkpoint is an older state, and parts of it are gone.
        if index > 0 && log.records.is_empty() && best.is_some() {
            continue;
        }
        let lost_nodes = lost_nodes(reader, &checkpoint);
        let is_better = best
            .as_ref()
            .is_none_or(|best| (log_problem.is_some(), lost_nodes) < (best.log_problem.is_some(), best.lost_nodes));
        if is_better {
            if let Some(newer) = &best {
                warnings.push(format!(
                    "checkpoint {} is read, since {} nodes of the newer checkpoint {} are lost ({lost_nodes} of this one): with the journal it gives the same state",
                    checkpoint.number, newer.lost_nodes, newer.checkpoint.number
                ));
            }
            best = Some(Candidate { checkpoint, log, log_problem, lost_nodes });
        }
        if best.as_ref().is_some_and(|best| best.lost_nodes == 0 && best.log_problem.is_none()) {
            break;
        }
    }
    if let Some(lost) = reader.lost_record() {
        warnings.push(format!("checkpoint {} cannot be used: {}", lost.number, lost.reason));
    }
    best.ok_or(problem)
}

/// Nodes of the trees that are read which cannot be.
fn lost_nodes(reader: &NodeReader, checkpoint: &Checkpoint) -> u64 {
    let mut lost = 0;
    let kept = checkpoint.roots.iter().filter(|root| TREES.iter().any(|tree| *tree as u8 == root.btree));
    let only = Checkpoint { roots: kept.cloned().collect(), ..checkpoint.clone() };
    let walked = walk_published(reader, &only, &mut |node| {
        lost += u64::from(node.keys.is_err());
        Ok(())
    });
    if walked.is_err() { u64::MAX } else { lost }
}

/// The checkpoint without the roots that cannot be read and the trees that are not wanted. The map is of no use to who only reads.
fn without_lost_roots(
    reader: &NodeReader,
    checkpoint: &Checkpoint,
    lost_trees: &mut BTreeMap<BtreeId, String>,
) -> Opening {
    let mut newest = Checkpoint { roots: Vec::new(), map: Vec::new(), ..checkpoint.clone() };
    for btree in TREES {
        let Some(root) = checkpoint.roots.iter().find(|root| root.btree == btree as u8) else { continue };
        let alone = Checkpoint { roots: vec![root.clone()], map: Vec::new(), ..checkpoint.clone() };
        match reader.verify(&alone) {
            Ok(()) => newest.roots.push(root.clone()),
            Err(error) => {
                lost_trees.insert(btree, error.to_string());
            }
        }
    }
    let next_number = newest.number.saturating_add(1);
    Opening { newest, previous: None, next_number, passed_over: Vec::new() }
}

fn open_forest(
    superblock: &Arc<Superblock>,
    devices: &[Arc<dyn BlockDevice>],
    opening: &Opening,
    epoch: u64,
) -> Result<Arc<Forest>> {
    let config = ForestConfig {
        superblock: Arc::clone(superblock),
        devices: devices.to_vec(),
        cache_bytes: Arc::new(AtomicU64::new(CACHE_BYTES)),
        dirty_bytes_max: u64::MAX,
        epoch,
    };
    Forest::open(config, opening, Env::real(), Arc::new(Metrics::default()))
}

/// The present state's trees, replayed in memory: what knows the buckets' present generations.
///
/// # Errors
/// Those of opening.
pub fn open_present(
    superblock: &Arc<Superblock>,
    devices: &[Arc<dyn BlockDevice>],
    reader: &NodeReader,
    config: &JournalConfig,
) -> Result<Arc<Forest>> {
    let (opening, log) = choose_log(reader, config, true)?;
    let forest = open_forest(superblock, devices, &opening, log.highest_epoch.saturating_add(1))?;
    replay(&forest, &log)?;
    Ok(forest)
}

/// How data of an older state is told from what was written over it; with less certainty where the present state cannot be opened.
pub fn present_reuse_check(
    superblock: &Arc<Superblock>,
    devices: &[Arc<dyn BlockDevice>],
    reader: &NodeReader,
    config: &JournalConfig,
    warnings: &mut Vec<String>,
) -> ReuseCheck {
    let present = present_or_warn(superblock, devices, reader, config, warnings);
    reuse_check(present, superblock.geometry.bucket_bytes)
}

fn present_or_warn(
    superblock: &Arc<Superblock>,
    devices: &[Arc<dyn BlockDevice>],
    reader: &NodeReader,
    config: &JournalConfig,
    warnings: &mut Vec<String>,
) -> Option<Arc<Forest>> {
    match open_present(superblock, devices, reader, config) {
        Ok(present) => Some(present),
        Err(error) => {
            warnings.push(format!(
                "the present state cannot be read ({error}): which buckets were used again is not known, so nothing can verify data without checksums"
            ));
            None
        }
    }
}
