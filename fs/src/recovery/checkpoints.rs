//! The kept checkpoints of an image: which of them are whole, and opening an older one as it was.
//!
//! A checkpoint gives two states. With all of the journal from its F on: the present one. With the journal from its F up to the newest record that any
//! of its images holds: what was there when it was made. The second is offered while those records are kept, read-only.
//!
//! The older state's data was not kept for it: buckets that were emptied since may have been written again. So each extent that is read is compared
//! with the present generation of its bucket ([`reuse_check`]).
//!
//! No locks of its own. Nothing is written.

use std::sync::Arc;

use super::superblock;
use crate::btree::{Forest, NodeReader, Opening, PassedOver, walk_published};
use crate::data::ReuseCheck;
use crate::device::BlockDevice;
use crate::error::{Error, Result};
use crate::format::checkpoint::Checkpoint;
use crate::format::extent::{DataExtent, ExtentPointer};
use crate::format::space::{Bucket, BucketState};
use crate::format::superblock::Superblock;
use crate::format::{BtreeId, ChecksumKind, Position};
use crate::journal::{JournalConfig, Log, holds_log_of, read_log, read_log_until};
use crate::metrics::Metrics;
use crate::units::JournalSequence;

/// Sentences about one checkpoint that are kept.
const PROBLEMS_MAX: usize = 8;

/// What is known of a checkpoint whose record can be read.
#[derive(Clone, Debug)]
pub struct InspectedCheckpoint {
    /// The record.
    pub checkpoint: Checkpoint,
    /// Nodes that it reaches, and how many of them cannot be read in any copy. What lies below those is not counted.
    pub nodes: u64,
    /// Nodes that cannot be read in any copy.
    pub lost_nodes: u64,
    /// Copies of nodes that are bad where another is good.
    pub bad_copies: u64,
    /// What is wrong with it, the first few.
    pub problems: Vec<String>,
    /// Why it cannot be opened as it was; `None` if it can.
    pub as_it_was: Option<String>,
    /// Why it does not give the present state; `None` if it does.
    pub present: Option<String>,
}

impl InspectedCheckpoint {
    /// Record, map and all nodes can be read.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.problems.is_empty()
    }
}

/// What is known of all checkpoints of an image.
#[derive(Clone, Debug)]
pub struct InspectedCheckpoints {
    /// The superblock.
    pub superblock: Superblock,
    /// The newest one, if its record is not whole.
    pub lost: Option<PassedOver>,
    /// Those whose records can be read, newest first.
    pub checkpoints: Vec<InspectedCheckpoint>,
}

/// Looks at all checkpoints of a device: reads every copy of every node that each of them reaches. `progress` is told of each node.
///
/// # Errors
/// Those of the superblock.
pub fn inspect_checkpoints(device: Arc<dyn BlockDevice>, progress: &dyn Fn()) -> Result<InspectedCheckpoints> {
    let superblock = superblock::read(&*device)?.superblock;
    let devices = vec![device];
    let config = JournalConfig::new(&superblock, devices.clone(), None);
    let reader = NodeReader::new(Arc::new(superblock.clone()), devices, Arc::new(Metrics::default()));
    let checkpoints = reader.checkpoints().into_iter().map(|found| inspect(&reader, &config, found, progress));
    Ok(InspectedCheckpoints { checkpoints: checkpoints.collect(), lost: reader.lost_record(), superblock })
}

fn inspect(
    reader: &NodeReader,
    config: &JournalConfig,
    checkpoint: Checkpoint,
    progress: &dyn Fn(),
) -> InspectedCheckpoint {
    let (mut nodes, mut lost_nodes, mut bad_copies) = (0, 0, 0);
    let mut problems = Vec::new();
    problems.extend(reader.read_map(&checkpoint).err().map(|error| error.to_string()));
    // Its states are read without the map.
    let unusable = reader.verify(&without_map(&checkpoint)).err().map(|error| error.to_string());
    problems.extend(unusable.clone());
    let walked = walk_published(reader, &checkpoint, &mut |node| {
        progress();
        nodes += 1;
        match &node.keys {
            Ok(_) => bad_copies += node.copies.iter().filter(|(_, outcome)| outcome.is_err()).count() as u64,
            Err(error) => {
                lost_nodes += 1;
                let error = error.to_string();
                if problems.len() < PROBLEMS_MAX && !problems.contains(&error) {
                    problems.push(error);
                }
            }
        }
        Ok(())
    });
    if let Err(error) = walked {
        problems.push(error.to_string());
    }
    let log = read_log_until(config, &checkpoint, JournalSequence(checkpoint.newest_sequence));
    let as_it_was = unusable.clone().or_else(|| log.err().map(|error| error.to_string()));
    let present = unusable.or_else(|| read_log(config, &checkpoint).err().map(|error| error.to_string()));
    InspectedCheckpoint { checkpoint, nodes, lost_nodes, bad_copies, problems, as_it_was, present }
}

/// The checkpoint as it is opened by those who only read: the node-space map says where nodes may be written, and nothing else.
pub(super) fn without_map(checkpoint: &Checkpoint) -> Checkpoint {
    Checkpoint { map: Vec::new(), ..checkpoint.clone() }
}

/// The newest checkpoint whose roots can be read, though its map cannot, nor one of the others be used whole. Its number among the valid records
/// that are newer, and what is wrong with its map.
#[must_use]
pub fn choose_without_map(reader: &NodeReader) -> Option<(usize, Checkpoint, Error)> {
    let usable = |record: &Checkpoint| reader.verify(&without_map(record)).is_ok();
    let (index, record) = reader.checkpoints().into_iter().enumerate().find(|(_, record)| usable(record))?;
    let problem = reader.read_map(&record).err()?;
    Some((index, record, problem))
}

/// [`NodeReader::choose_checkpoint`]; where nothing but the map is lost, read-only without it.
fn choose_checkpoint(reader: &NodeReader, read_only: bool) -> Result<Opening> {
    let error = match reader.choose_checkpoint() {
        Ok(opening) => return Ok(opening),
        Err(error) => error,
    };
    let Some((_, record, problem)) = choose_without_map(reader) else {
        // What is wrong with the newest says more than what is wrong with one that is not kept.
        let newest = reader.checkpoints().into_iter().next();
        return Err(newest.and_then(|newest| reader.verify(&without_map(&newest)).err()).unwrap_or(error));
    };
    if !read_only {
        return Err(match problem {
            Error::Corrupt(mut corruption) => {
                corruption.problem.push_str(": `fsck.coppice -y` makes the map again, `mount -o ro` does without");
                corruption.into()
            }
            problem => problem,
        });
    }
    tracing::warn!("the node-space map is lost ({problem}): checkpoint {} is read without it", record.number);
    let next_number = record.number.saturating_add(1);
    Ok(Opening { newest: without_map(&record), previous: None, next_number, passed_over: Vec::new() })
}

/// What is wrong with a log that ends before a record that was durable, by any checkpoint record that is whole, though what that names may not be: it was
/// written when the journal had been flushed up to there.
pub(super) fn ends_early(reader: &NodeReader, log: &Log) -> Option<Error> {
    let flushed = reader.checkpoints().into_iter().max_by_key(|record| record.newest_sequence)?;
    (flushed.newest_sequence >= log.next.0).then(|| {
        let problem = format!(
            "the journal ends before it, but all up to record {} was durable when checkpoint {} was written: `coppice checkpoints` lists older states that can be shown, `fsck.coppice --rebuild` finds what is left",
            flushed.newest_sequence, flushed.number
        );
        Error::corrupt(format!("journal record {}", log.next), problem)
    })
}

/// The newest checkpoint whose trees and log can be read. If the newest one's log is damaged, the one before it has the same records and more, so
/// there is nothing to fall back to. With `read_only`, a checkpoint of which the node-space map alone is lost will do.
///
/// # Errors
/// If there is none, or its log is damaged.
pub fn choose_log(reader: &NodeReader, config: &JournalConfig, read_only: bool) -> Result<(Opening, Log)> {
    let mut opening = choose_checkpoint(reader, read_only)?;
    let log = read_log(config, &opening.newest)?;
    if let Some(problem) = ends_early(reader, &log) {
        return Err(problem);
    }
    // The journal overwrites nothing from the older one's F on. If that is overwritten already (this is not the one that was kept beside the
    // newest, which is lost), its place is one that live records have taken.
    let first_replay = opening.newest.first_replay;
    let is_kept = |older: &Checkpoint| older.first_replay == first_replay || holds_log_of(config, older);
    if let Some(older) = opening.previous.take_if(|older| !is_kept(older)) {
        tracing::warn!("checkpoint {} is not kept: its journal is gone", older.number);
    }
    Ok((opening, log))
}

const WHERE: &str = "`coppice checkpoints` lists those that are whole";

/// The record of checkpoint `number`.
pub(super) fn find(reader: &NodeReader, number: u64) -> Result<Checkpoint> {
    let records = reader.checkpoints();
    let numbers: Vec<String> = records.iter().map(|record| record.number.to_string()).collect();
    records.into_iter().find(|record| record.number == number).ok_or_else(|| {
        let numbers = numbers.join(", ");
        Error::Unusable(format!("there is no checkpoint {number} (there are {numbers}): {WHERE}"))
    })
}

/// The checkpoint `number`, and the part of the log that gives what was there when it was made.
///
/// # Errors
/// [`Error::Unusable`], naming what is wrong and where to look: there is none, it is not whole, or its journal is no longer kept.
pub fn choose_older(reader: &NodeReader, config: &JournalConfig, number: u64) -> Result<(Opening, Log)> {
    let record = without_map(&find(reader, number)?);
    let highest = reader.checkpoints().first().map_or(number, |record| record.number);
    reader
        .verify(&record)
        .map_err(|error| Error::Unusable(format!("checkpoint {number} is not whole: {error}; {WHERE}")))?;
    let log = read_log_until(config, &record, JournalSequence(record.newest_sequence)).map_err(|error| {
        Error::Unusable(format!("checkpoint {number} can no longer be opened as it was: {error}; {WHERE}"))
    })?;
    Ok((Opening { newest: record, previous: None, next_number: highest + 1, passed_over: Vec::new() }, log))
}

/// For a state that is older than the present one: says of an extent why it cannot be read any more. `present` is the present state's trees; without them
/// only checksums tell.
///
/// An extent is readable if its buckets have the generation that they had, for then they were never emptied, and nothing in them was written
/// twice; or if they were emptied once and nothing was counted in them since, where its checksums then tell whether they were discarded.
#[must_use]
pub fn reuse_check(present: Option<Arc<Forest>>, bucket_bytes: u32) -> ReuseCheck {
    Box::new(move |data: &DataExtent| {
        let is_checksummed = data.checksum_kind != ChecksumKind::None;
        let Some(present) = &present else {
            return Ok((!is_checksummed)
                .then(|| "it has no checksum, and whether its bucket was used again is not known".into()));
        };
        for pointer in &data.pointers {
            let now = present_bucket(present, pointer, bucket_bytes)?;
            let was_only_emptied = now.generation == pointer.generation.wrapping_add(1)
                && matches!(now.state, BucketState::Free | BucketState::NeedDiscard);
            if now.generation != pointer.generation && !(was_only_emptied && is_checksummed) {
                let (now, then) = (now.generation, pointer.generation);
                return Ok(Some(format!("its bucket was emptied since (generation {now}, {then} in the extent)")));
            }
        }
        Ok(None)
    })
}

fn present_bucket(present: &Forest, pointer: &ExtentPointer, bucket_bytes: u32) -> Result<Bucket> {
    let bucket = pointer.offset / u64::from(bucket_bytes.max(1));
    let stored = present.get(BtreeId::Buckets, Position::new(pointer.device.0.into(), bucket, 0))?;
    Ok(stored.map_or(Ok(Bucket::UNUSED), |stored| Bucket::decode(&stored))?)
}
