//! `--rebuild`: new trees out of whatever a scan of the device finds, for an image whose superblocks, checkpoints or roots are gone.
//!
//! ```text
//! survey      scan for nodes; whose they are; sizes, if no superblock says them               (`survey`, `geometry`)
//! trees       the newest leaf for each range of keys, and the journal above                     (`tree`)
//! decisions   which inodes there are, which extents are kept, checked against their data       (`inodes`, `data`)
//! mark        nodes of the new epoch do not count from here on
//! write       all trees anew, into slots that hold neither data nor nodes that are needed       (`write`)
//! unmark      every node is durable: from here on they are the best evidence there is
//! publish     checkpoint, then superblock copies
//! repair      the ordinary passes: what has no name goes to lost+found
//! ```
//!
//! **A power cut** before the mark is gone leaves all that was there, and the next rebuild does not look at what this one wrote. After it, every range
//! of keys has a new, whole leaf, which wins over the old ones; the journal's records are older than it. So a rebuild can always be started again.
//!
//! Memory: a line for each node, inode and extent; the keys in the journal; a few windows of data. Data is read by this thread, checked by rayon's.

pub mod command;
pub mod data;
mod geometry;
pub mod inodes;
mod report;
mod survey;
mod tree;
mod write;

use std::collections::BTreeMap;
use std::sync::Arc;

use coppicefs::btree::{BulkWriter, FreeSlots};
use coppicefs::device::BlockDevice;
use coppicefs::env::Env;
use coppicefs::filesystem::{Filesystem, OpenOptions, WorkerSet};
use coppicefs::format::BtreeId;
use coppicefs::format::checkpoint::Checkpoint;
use coppicefs::format::mark::{MARK_BYTES, RebuildMark, SECOND_MARK_BUCKET_BYTES, mark_places};
use coppicefs::format::superblock::{Layout, Member, Superblock, VERSION};
use coppicefs::memory::AlignedBuffer;
use coppicefs::recovery::records::FoundLog;
use coppicefs::recovery::superblock;
use coppicefs::units::{JournalSequence, NodeId};
use coppicefs::{Error, Result};

pub use report::{LostKeys, RebuildReport};

use crate::report::Report;
use crate::session;
use data::Extents;
use inodes::Inodes;
use survey::{NODE_COUNTER_BITS, Survey};
use tree::Trees;
use write::{Counting, Walk, Written, write_buckets};

/// How far the epoch of a rebuild is above all others: mounts of an image whose rebuild was cut off do not come near it.
const EPOCH_GAP: u64 = 1000;
/// Epochs that fit a node's id.
const EPOCH_MAX: u64 = 1 << (64 - NODE_COUNTER_BITS);
/// Sequences that fit a journal.
const SEQUENCE_MAX: u64 = 1 << 62;
/// Bytes copied at once to another image.
const COPY_BYTES: u64 = 1 << 20;

/// What a rebuild is doing: it reports the bytes that it has dealt with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Looking for nodes: bytes of the device.
    Scan,
    /// Checking file data.
    Data,
    /// Copying file data to another image.
    Copy,
    /// Writing trees: no bytes are reported.
    Write,
}

/// Told how far the rebuild is: the stage, and bytes since the last call.
pub type OnStage<'a> = &'a (dyn Fn(Stage, u64) + Sync);

/// Where the result goes.
#[derive(Clone, Copy)]
pub enum Target<'a> {
    /// Nowhere: only say what would be found.
    Nothing,
    /// Over what is there.
    InPlace,
    /// To another device, which is at least as large; all of it is overwritten.
    Other(&'a Arc<dyn BlockDevice>),
}

/// How to rebuild.
#[derive(Clone)]
pub struct RebuildOptions {
    /// The filesystem, where there are nodes of several.
    pub filesystem: Option<uuid::Uuid>,
    /// Time and randomness.
    pub env: Arc<Env>,
}

/// Everything that was found and decided.
struct Plan<'a> {
    trees: &'a Trees<'a>,
    survey: &'a Survey,
    log: &'a FoundLog,
    superblock: Superblock,
    is_new_superblock: bool,
    inodes: Inodes,
    extents: Extents,
}

/// Rebuilds. `confirm` is asked once it is known what will be there, before anything is written; if it says no, nothing is.
///
/// # Errors
/// [`Error::Unusable`], which says why nothing can be rebuilt or what to choose; [`Error::NoSpace`] if there is no room for the new trees beside what is
/// there; the device's.
pub fn rebuild(
    device: &Arc<dyn BlockDevice>,
    target: Target<'_>,
    options: &RebuildOptions,
    progress: OnStage<'_>,
    confirm: &mut dyn FnMut(&RebuildReport) -> bool,
) -> Result<RebuildReport> {
    let mut survey = survey::survey(device, options.filesystem, &|bytes| progress(Stage::Scan, bytes))?;
    let provisional = provisional(device, &survey)?;
    let areas = match &survey.superblock {
        Some(_) => Vec::new(),
        None => geometry::journal_areas(provisional.geometry, &survey.nodes, device.size_bytes()),
    };
    let log = survey.log(&**device, &areas);
    let reader = survey::reader(&provisional, device);
    let record = survey.record.as_ref().filter(|_| survey.is_record_current(&log)).map(|record| (&reader, record));
    let mut trees = Trees::new(&**device, &survey.nodes, record)?;
    let applied = trees.apply_log(&log);
    trees.find_suspects(survey.record.as_ref());
    if trees.is_unknown(BtreeId::Inodes) {
        return Err(Error::Unusable(format!("no inode is left of filesystem {}", survey.filesystem)));
    }
    let mut inodes = Inodes::collect(&trees)?;
    let checked = |bytes| progress(Stage::Data, bytes);
    let extents = data::decide(&trees, &**device, &provisional, &mut inodes, &checked)?;
    inodes.drop_hollow();
    let is_new_superblock = survey.superblock.is_none();
    let superblock = if is_new_superblock {
        placed(device, &survey, &trees, &extents, &provisional, &options.env)?
    } else {
        provisional
    };
    let mut plan = Plan { trees: &trees, survey: &survey, log: &log, superblock, is_new_superblock, inodes, extents };
    let written = plan.count(&options.env)?;
    let mut report = report::report(&survey, &log, applied, &trees, &plan.inodes, &plan.extents, &written);
    report.used_checkpoint = record.map(|(_, record)| record.number);
    if matches!(target, Target::Nothing) || !confirm(&report) {
        return Ok(report);
    }
    progress(Stage::Write, 0);
    report.is_written = true;
    report.written_nodes = plan.write(device, target, options, progress)?;
    Ok(report)
}

/// The superblock that was found; or one with the sizes that fit, and no fixed areas.
fn provisional(device: &Arc<dyn BlockDevice>, survey: &Survey) -> Result<Superblock> {
    if let Some(known) = &survey.superblock {
        return Ok(known.clone());
    }
    let trees = Trees::new(&**device, &survey.nodes, None)?;
    let (geometry, defaults) = geometry::guess(&trees, &survey.nodes, device.size_bytes())?;
    let size_bytes = device.size_bytes();
    Ok(Superblock {
        filesystem: survey.filesystem,
        sequence: 1,
        compat: 0,
        read_only_compat: 0,
        incompat: 0,
        version: VERSION,
        version_minimum: VERSION,
        geometry,
        members: vec![Member {
            uuid: *uuid::Uuid::new_v4().as_bytes(),
            size_bytes,
            bucket_count: size_bytes / u64::from(geometry.bucket_bytes),
        }],
        layout: Layout::default(),
        defaults,
        errors: coppicefs::format::superblock::ErrorCounts::default(),
        unknown_sections: Vec::new(),
    })
}

/// The provisional superblock with fixed areas where neither data nor nodes are that are needed, and a new key for the hash of names.
fn placed(
    device: &Arc<dyn BlockDevice>,
    survey: &Survey,
    trees: &Trees<'_>,
    extents: &Extents,
    provisional: &Superblock,
    env: &Env,
) -> Result<Superblock> {
    let bucket_bytes = u64::from(provisional.geometry.bucket_bytes);
    let mut needed = extents.live.clone();
    for node in trees.needed_nodes() {
        needed.extend(survey.nodes.get(node).map(|node| node.address / bucket_bytes));
    }
    let mut defaults = provisional.defaults.clone();
    defaults.hash_seed = env.random_u64();
    defaults.created_at = env.now().seconds;
    geometry::place(survey.filesystem, provisional.geometry, &defaults, device.size_bytes(), |first, end| {
        needed.range(first..end).next().is_some()
    })
}

impl Plan<'_> {
    fn count(&mut self, env: &Env) -> Result<Written> {
        let mut walk = Walk {
            trees: self.trees,
            superblock: &self.superblock,
            inodes: &mut self.inodes,
            extents: &self.extents,
            sink: &mut Counting,
            now: env.now(),
            written: Written::default(),
        };
        walk.run()?;
        Ok(walk.written)
    }

    /// Writes and publishes. Returns the number of nodes.
    fn write(
        &mut self,
        device: &Arc<dyn BlockDevice>,
        target: Target<'_>,
        options: &RebuildOptions,
        progress: OnStage<'_>,
    ) -> Result<u64> {
        let epoch = self.survey.highest_epoch.saturating_add(EPOCH_GAP);
        // One between the log and the new one is the nodes': no record of the old log is as new as they are.
        let sequence = self.survey.highest_sequence.saturating_add(2);
        if epoch >= EPOCH_MAX || sequence >= SEQUENCE_MAX {
            return Err(Error::Unusable(format!("epoch {epoch} or sequence {sequence} leaves no room for a rebuild")));
        }
        let in_place = !matches!(target, Target::Other(_));
        let output = match target {
            Target::Other(other) => other,
            _ => device,
        };
        if output.size_bytes() < self.superblock.members.first().map_or(0, |member| member.size_bytes) {
            return Err(Error::Unusable(format!("{} is smaller than the filesystem", output.name())));
        }
        let mark = RebuildMark { filesystem: self.survey.filesystem, epoch };
        if in_place {
            self.set_mark(&**output, &mark.encode())?;
        } else {
            self.copy_data(&**device, &**output, progress)?;
        }
        let free = self.free_slots(in_place);
        let reader = survey::reader(&self.superblock, output);
        // All that the log says is in the nodes.
        let reflected = JournalSequence(sequence - 1);
        let mut writer = BulkWriter::new(reader, &free, NodeId(epoch << NODE_COUNTER_BITS | 1), reflected);
        self.inodes.reset_counts();
        let failed_before = self.trees.failed_reads();
        let mut walk = Walk {
            trees: self.trees,
            superblock: &self.superblock,
            inodes: &mut self.inodes,
            extents: &self.extents,
            sink: &mut writer,
            now: options.env.now(),
            written: Written::default(),
        };
        walk.run()?;
        let mut written = walk.written;
        write_buckets(&mut writer, &self.superblock, &self.extents, &mut written)?;
        writer.finish_nodes()?;
        if self.trees.failed_reads() > failed_before {
            return Err(Error::Unusable(
                "nodes that were read before cannot be read any more, so nothing was published: run --rebuild again"
                    .into(),
            ));
        }
        let node_count = writer.node_count();
        if in_place {
            self.set_mark(&**output, &[0; MARK_BYTES])?;
        }
        writer.publish(Checkpoint {
            number: self.survey.record.as_ref().map_or(0, |record| record.number) + 1,
            epoch,
            first_replay: sequence,
            first_replay_offset: 0,
            previous_record_checksum: 0,
            newest_sequence: sequence - 1,
            roots: Vec::new(),
            totals: written.totals.to_stored(),
            next_node: 0,
            clean: true,
            map: Vec::new(),
            written_at: options.env.now().seconds,
        })?;
        let mut superblock = self.superblock.clone();
        if !self.is_new_superblock {
            superblock.sequence += 1;
        }
        superblock::write(&**output, &superblock)?;
        Ok(node_count)
    }

    /// Writes the mark, or zeros over it, and flushes.
    fn set_mark(&self, device: &dyn BlockDevice, mark: &[u8]) -> Result<()> {
        let mut block = AlignedBuffer::try_zeroed(4096)?;
        let has_second = self.superblock.geometry.bucket_bytes >= SECOND_MARK_BUCKET_BYTES;
        for (offset, within) in mark_places(device.size_bytes()).into_iter().take(1 + usize::from(has_second)) {
            // What else is in the block stays.
            device.read(offset, &mut block)?;
            if let Some(place) = block.get_mut(within..within + mark.len()) {
                place.copy_from_slice(mark);
            }
            device.write(offset, &block)?;
        }
        device.flush()
    }

    /// Slots that hold neither data, nor nodes or records that are still needed: whole buckets first, and none of the fixed areas.
    fn free_slots(&self, in_place: bool) -> Vec<FreeSlots> {
        let bucket_bytes = u64::from(self.superblock.geometry.bucket_bytes);
        let node_bytes = u64::from(self.superblock.geometry.node_bytes);
        let all = u64::MAX >> (64 - (bucket_bytes / node_bytes).clamp(1, 64));
        let mut needed: BTreeMap<u64, u64> = BTreeMap::new();
        if in_place {
            let nodes = self.trees.needed_nodes().into_iter().filter_map(|index| self.survey.nodes.get(index));
            for node in nodes {
                let start = node.address % bucket_bytes;
                let first = start / node_bytes;
                let count = (start + u64::from(node.summary.written_bytes)).div_ceil(node_bytes) - first;
                let slots = (u64::MAX >> (64 - count.min(64))) << first;
                *needed.entry(node.address / bucket_bytes).or_default() |= slots;
            }
            // The old journal's area may have been larger than the new one's.
            for record in &self.log.records {
                let end = record.offset + u64::from(record.header.payload_bytes) + 4096;
                for bucket in record.offset / bucket_bytes..=end / bucket_bytes {
                    needed.insert(bucket, u64::MAX);
                }
            }
        }
        let bucket_count = self.superblock.members.first().map_or(0, |member| member.bucket_count);
        let usable = (0..bucket_count)
            .filter(|bucket| !self.superblock.is_reserved(0, *bucket) && !self.extents.live.contains(bucket));
        let slots = usable.map(|bucket| FreeSlots { bucket, slots: all & !needed.get(&bucket).copied().unwrap_or(0) });
        let (mut whole, parts): (Vec<_>, Vec<_>) = slots.partition(|free| free.slots == all);
        whole.extend(parts);
        whole
    }

    /// Copies the buckets that hold data. What cannot be read stays empty: its checksums say so.
    fn copy_data(&self, from: &dyn BlockDevice, to: &dyn BlockDevice, progress: OnStage<'_>) -> Result<()> {
        let bucket_bytes = u64::from(self.superblock.geometry.bucket_bytes);
        let step = COPY_BYTES.min(bucket_bytes);
        let mut buffer = AlignedBuffer::try_zeroed(usize::try_from(step).unwrap_or(0))?;
        for bucket in &self.extents.live {
            let mut offset = bucket * bucket_bytes;
            while offset < (bucket + 1) * bucket_bytes {
                match from.read(offset, &mut buffer) {
                    Ok(()) => to.write(offset, &buffer)?,
                    Err(error) => tracing::warn!("not copied: {error}"),
                }
                progress(Stage::Copy, step);
                offset += step;
            }
        }
        Ok(())
    }
}

/// What the ordinary passes make of a rebuilt filesystem.
#[derive(Clone, Debug)]
pub struct Finished {
    /// What they find at the end.
    pub report: Report,
    /// How many problems they repaired.
    pub repaired: usize,
}

/// Runs the ordinary passes, and repairs what they find, until they find nothing new. `visit` may look at the filesystem then.
///
/// # Errors
/// Those of opening, of a repair, of closing.
pub fn finish(
    device: Arc<dyn BlockDevice>,
    env: Option<Arc<Env>>,
    visit: &mut dyn FnMut(&Filesystem) -> Result<()>,
) -> Result<Finished> {
    let options = OpenOptions { workers: WorkerSet::Essential, env, ..OpenOptions::default() };
    let outcome = session::repair_all(&[Arc::clone(&device)], &options)?;
    let filesystem = Filesystem::open(vec![device], &OpenOptions { read_only: true, ..options })?;
    let visited = visit(&filesystem);
    let closed = filesystem.close();
    visited?;
    closed?;
    Ok(Finished { report: Report { problems: outcome.left, ..outcome.last }, repaired: outcome.repaired })
}
