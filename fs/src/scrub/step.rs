//! What one step of a scrub reads.

use std::ops::Range;

use super::{Phase, Scrub, Step};
use crate::btree::{Around, NodeCursor, ScrubFinding};
use crate::data::{BadRange, ReadPiece};
use crate::error::{Error, Result};
use crate::format::extent::ExtentValue;
use crate::format::{BtreeId, ChecksumKind, Position, Value};
use crate::journal::{JournalConfig, read_log_prefix};
use crate::memory::AlignedBuffer;
use crate::recovery::superblock;
use crate::units::InodeNumber;
use crate::vfs::ScrubReport;

/// Nodes in one step.
const STEP_NODES: usize = 16;
/// Extents, and bytes of file data, in one step.
const STEP_EXTENTS: usize = 256;
const STEP_BYTES: u64 = 4 << 20;
/// Most bytes that are read into one buffer.
const PIECE_BYTES_MAX: u64 = 1 << 20;

/// Neighbouring data of one file.
struct Stretch {
    inode: u64,
    range: Range<u64>,
}

impl Scrub {
    pub(super) fn run(&self, phase: Phase, needs_checkpoint: bool) -> Result<Step> {
        match phase {
            Phase::Superblock => self.superblock(),
            Phase::Checkpoints => self.checkpoints(),
            Phase::Journal => self.journal(),
            Phase::Nodes(cursor) => self.nodes(cursor),
            Phase::Data(from) => self.data(from, needs_checkpoint),
            Phase::Settling(before) => {
                if self.config.forest.checkpoints_done() > before {
                    return Ok(Step::to(Phase::End));
                }
                self.config.forest.request_checkpoint();
                Ok(Step::later())
            }
            Phase::End => Ok(Step::default()),
        }
    }

    fn superblock(&self) -> Result<Step> {
        let mut step = Step::to(Phase::Checkpoints);
        for device in &self.config.devices {
            let found = superblock::read(&**device)?;
            for (offset, reason) in found.stale_copies {
                let is_repaired = !self.config.read_only;
                if is_repaired {
                    superblock::write_copy(&**device, &found.superblock, offset)?;
                }
                let reason = format!("the copy at byte {offset}: {reason}");
                step.find("superblock", ScrubFinding { reason, keys: None, is_repaired });
            }
            step.copies += 3;
        }
        Ok(step)
    }

    fn checkpoints(&self) -> Result<Step> {
        let Some(done) = self.config.forest.scrub_area(!self.config.read_only)? else { return Ok(Step::later()) };
        let mut step = Step { copies: done.copies, bytes: done.bytes, ..Step::to(Phase::Journal) };
        for finding in done.findings {
            step.needs_checkpoint |= !finding.is_repaired && !self.config.read_only;
            step.find("checkpoint", finding);
        }
        Ok(step)
    }

    /// What is durable and kept. Checkpoints are held off meanwhile, which would let the ring go on over it.
    fn journal(&self) -> Result<Step> {
        let until = self.config.journal.flushed();
        let Some(hold) = self.config.forest.hold_checkpoints() else { return Ok(Step::later()) };
        let mut step = Step::to(Phase::Nodes(NodeCursor::START));
        let from = hold.oldest_kept();
        let config = JournalConfig::new(&self.config.superblock, self.config.devices.clone(), None);
        let (log, problem) = read_log_prefix(&config, &from, until)?;
        let payload: u64 = log.records.iter().map(|record| record.payload.len() as u64).sum();
        step.bytes = payload * config.copies.len() as u64;
        step.copies = (log.records.len() * config.copies.len()) as u64;
        let is_writable = !self.config.read_only;
        let bad = log.bad_copy_count();
        if bad > 0 {
            if is_writable {
                log.repair_copies(&config)?;
            }
            let reason = format!("{bad} copies of records");
            step.find("journal", ScrubFinding { reason, keys: None, is_repaired: is_writable });
        }
        if let Some(problem) = problem {
            // What it says is in the trees in memory: the next checkpoint makes it needless.
            let reason = format!("{problem}; a checkpoint makes it needless");
            step.needs_checkpoint |= is_writable;
            step.find("journal", ScrubFinding { reason, keys: None, is_repaired: is_writable });
        }
        drop(hold);
        Ok(step)
    }

    fn nodes(&self, cursor: NodeCursor) -> Result<Step> {
        let done = self.config.forest.scrub_nodes(cursor, STEP_NODES, !self.config.read_only)?;
        let next = done.next.map_or(Phase::Data(Position::MIN), Phase::Nodes);
        let mut step = Step { nodes: done.nodes, copies: done.copies, bytes: done.bytes, ..Step::to(next) };
        if done.is_busy {
            step.rest = Step::later().rest;
        }
        for finding in done.findings {
            step.needs_checkpoint |= finding.is_repaired;
            step.find("node", finding);
        }
        Ok(step)
    }

    fn data(&self, from: Position, needs_checkpoint: bool) -> Result<Step> {
        let mut step = Step::default();
        let (keys, covered_to) =
            match self.config.forest.scan_around(BtreeId::Extents, from, Position::MAX, STEP_EXTENTS) {
                Around::Keys(scan) => (scan.keys, scan.covered_to),
                // Its node was told of.
                Around::Lost { to, error } if error.is_media_error() => (Vec::new(), to),
                Around::Lost { error, .. } => return Err(error),
            };
        let mut next = covered_to.successor();
        let mut stretches: Vec<Stretch> = Vec::new();
        for (position, value) in keys {
            if step.data_bytes >= STEP_BYTES {
                next = Some(position);
                break;
            }
            self.add(position, &value, &mut stretches, &mut step);
        }
        step.bytes = step.data_bytes;
        for of_one in stretches.chunk_by(|one, other| one.inode == other.inode) {
            self.read(of_one, &mut step)?;
        }
        step.next = Some(match next {
            Some(next) => Phase::Data(next),
            None if needs_checkpoint && !self.config.read_only => {
                Phase::Settling(self.config.forest.checkpoints_done())
            }
            None => Phase::End,
        });
        Ok(step)
    }

    fn add(&self, position: Position, value: &Value, stretches: &mut Vec<Stretch>, step: &mut Step) {
        let extent = match self.config.data.shape().decode(position, value) {
            Ok(extent) => extent,
            Err(error) => {
                let finding = ScrubFinding { reason: error.to_string(), keys: None, is_repaired: false };
                return step.find("key", finding);
            }
        };
        let ExtentValue::Data(data) = &extent.value else { return };
        let stored = u64::from(data.charged_bytes());
        step.data_bytes += stored;
        if data.checksum_kind == ChecksumKind::None {
            step.unchecked_bytes += stored;
        }
        let (inode, range) = (position.inode, extent.start()..extent.end);
        match stretches.last_mut() {
            Some(last)
                if last.inode == inode
                    && last.range.end == range.start
                    && range.end - last.range.start <= PIECE_BYTES_MAX =>
            {
                last.range.end = range.end;
            }
            _ => stretches.push(Stretch { inode, range }),
        }
    }

    /// Reads stretches of one file, as they are by now.
    fn read(&self, stretches: &[Stretch], step: &mut Step) -> Result<()> {
        let Some(inode) = stretches.first().map(|first| InodeNumber(first.inode)) else { return Ok(()) };
        let mut buffers = Vec::with_capacity(stretches.len());
        for stretch in stretches {
            let length = usize::try_from(stretch.range.end - stretch.range.start).unwrap_or(usize::MAX);
            buffers.push(AlignedBuffer::try_zeroed(length)?);
        }
        let mut pieces: Vec<ReadPiece<'_>> = stretches
            .iter()
            .zip(&mut buffers)
            .map(|(stretch, buffer)| ReadPiece { offset: stretch.range.start, buffer })
            .collect();
        let mut all_bad: Vec<BadRange> = Vec::new();
        self.config.data.read_detailed(inode, &mut pieces, &mut || {}, &mut |_, bad| all_bad.extend(bad));
        all_bad.sort_by_key(|bad| bad.start);
        let mut found: Vec<ScrubReport> = Vec::new();
        for bad in all_bad {
            if !bad.error.is_media_error() {
                return Err(bad.error);
            }
            match found.last_mut() {
                Some(last) if last.end == bad.start => last.end = bad.end,
                _ => found.push(ScrubReport {
                    kind: "data".into(),
                    inode: inode.0,
                    start: bad.start,
                    end: bad.end,
                    path: String::new(),
                    reason: bad.error.to_string(),
                    is_repaired: false,
                }),
            }
        }
        if !found.is_empty() {
            let path = self.path(inode)?;
            found.iter_mut().for_each(|finding| finding.path.clone_from(&path));
            step.findings.append(&mut found);
        }
        Ok(())
    }

    fn path(&self, inode: InodeNumber) -> Result<String> {
        match self.config.vfs.namespace().path(&mut self.config.transactions.read(), inode) {
            Ok(path) => Ok(path.map_or_else(String::new, |path| path.escape_ascii().to_string())),
            Err(Error::Shutdown) => Err(Error::Shutdown),
            Err(_) => Ok(String::new()),
        }
    }
}
