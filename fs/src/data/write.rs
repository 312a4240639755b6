//! Writing: runs of dirty bytes become the largest extents they can, in fresh space, and are then named by transactions.
//!
//! ```text
//! clamp to the file's size, pad the last block with zeros -> tiny file: inline data, one transaction
//!   -> compress and checksum in units of 128 KiB (in parallel if there are many) -> neighbouring raw units become one extent
//!   -> allocate -> one submission to the device -> transactions: replace the range by the new extents, update the inode
//! ```
//!
//! Guarantees:
//! 1. Nothing is overwritten in place: until its transaction commits, the file has its old bytes, and afterwards its new ones, extent by extent.
//! 2. The stored size grows only in a transaction that also names the data up to it.
//! 3. Bytes past the file's size are written as zeros (see [`super`], invariant 1).
//! 4. Allocations stay open from before the write to after the commit, so that the bucket is neither closed nor thought empty.
//! 5. If the inode is gone when the data is to be named, the write is dropped, and its space was never counted.
//!
//! Waits for space (discards, checkpoints, copygc), the device and the journal; so the caller holds no lock that those need (folios under writeback
//! are fine: no worker waits for folios). Compression runs in rayon's pool, where nothing waits.

use std::collections::VecDeque;

use rayon::prelude::*;
use smallvec::SmallVec;

use super::compress::{self, Compression, EncodedFrame};
use super::extents::{overwrite, part};
use super::{Change, Data};
use crate::alloc::{Allocation, Watermark, WritePoint};
use crate::device::WriteRequest;
use crate::error::{Error, Result};
use crate::format::extent::{DataExtent, ExtentPointer, ExtentValue};
use crate::format::namespace::Inode;
use crate::format::{ChecksumKind, CompressionKind};
use crate::memory::AlignedBuffer;
use crate::space::{SpaceReservation, stamp};
use crate::transaction::CommitOptions;
use crate::units::{InodeNumber, JournalSequence};

/// Bytes to be written, one slice after the other.
#[derive(Clone, Debug)]
pub struct WriteRun<'a> {
    /// File offset in bytes, a multiple of the block size.
    pub offset: u64,
    /// The bytes: whole blocks, but for the last run, which may end at the end of the file.
    pub data: Vec<&'a [u8]>,
}

impl WriteRun<'_> {
    fn length(&self) -> u64 {
        self.data.iter().map(|slice| slice.len() as u64).sum()
    }
}

/// What the transactions of a write do to the inode.
#[derive(Clone, Copy)]
pub struct WriteCommit<'a> {
    /// The file's size as its writers know it. Data beyond it is dropped. Called before the data is written and again in each
    /// transaction, so that a truncation in between counts; whoever makes the file *shorter* within a block that is being
    /// written must wait for the write first (the page cache's block lock does).
    pub size_limit: &'a dyn Fn() -> u64,
    /// Changes times and whatever else follows from the write; size and allocated bytes are taken care of. Runs in each transaction, and
    /// possibly several times.
    pub update_inode: &'a dyn Fn(&mut Inode),
}

/// Less than this is not handed to other threads.
const PARALLEL_BYTES_MIN: u64 = 256 << 10;

/// Whole blocks of a run, as slices of whole blocks.
struct Source<'a> {
    offset: u64,
    slices: Vec<&'a [u8]>,
}

/// A run's bytes that had to be copied: those that are not whole blocks.
enum Copied {
    Nothing,
    /// The last, partial block, padded.
    Tail(AlignedBuffer),
    /// All of it, since slices end within blocks.
    All(AlignedBuffer),
}

/// A stretch of file data that is encoded at once.
struct Unit<'a> {
    offset: u64,
    length: u64,
    slices: SmallVec<[&'a [u8]; 2]>,
}

/// What goes to disk for a stretch of file data.
enum Item<'a> {
    Raw { offset: u64, slices: Vec<&'a [u8]>, length: u64, checksums: Vec<u64> },
    Frame { unit: Unit<'a>, frame: EncodedFrame },
}

impl Item<'_> {
    fn offset(&self) -> u64 {
        match self {
            Item::Raw { offset, .. } => *offset,
            Item::Frame { unit, .. } => unit.offset,
        }
    }
}

/// Bytes with a place on disk.
#[derive(Debug)]
pub(super) struct Placed {
    pub(super) offset: u64,
    pub(super) value: ExtentValue,
    pub(super) allocation: Allocation,
}

/// Data that lies in fresh space, written but not flushed, and that no key names yet. Dropped, it was never there: its space was not counted.
/// Its allocations keep their buckets open, so it must not be kept for long.
#[derive(Debug)]
#[must_use]
pub struct PreparedWrite {
    pub(super) placed: Vec<Placed>,
    /// File offset of the first byte after it, padding not counted.
    data_end: u64,
    /// What was asked for from this file offset on found no space without waiting, and is not in here; `u64::MAX` if all of it is.
    covered_to: u64,
}

impl PreparedWrite {
    /// Nothing.
    pub fn empty() -> Self {
        Self { placed: Vec::new(), data_end: 0, covered_to: u64::MAX }
    }

    /// Where what was asked for goes on that is not in here: nobody waits for space while holding some. `u64::MAX` if all is in.
    #[must_use]
    pub fn covered_to(&self) -> u64 {
        self.covered_to
    }
}

enum Stored<'a> {
    Slices(Vec<&'a [u8]>),
    Frame(AlignedBuffer),
}

/// How far the commits of one write have come.
#[derive(Clone, Copy)]
struct Cursor {
    index: usize,
    /// Bytes of that extent that are committed already.
    within: u64,
}

impl Data {
    /// Writes the runs, which are ascending and do not overlap, and commits them. Returns when everything is committed (not: durable).
    ///
    /// # Errors
    /// The device's or the journal's (the filesystem is latched then); [`Error::Invalid`] for runs that are not as said. After an error
    /// some of the data may be committed.
    pub fn write(
        &self,
        inode: InodeNumber,
        runs: &[WriteRun<'_>],
        reservation: SpaceReservation,
        commit: WriteCommit<'_>,
    ) -> Result<Change> {
        let limit = (commit.size_limit)();
        if let Some(change) = self.write_inline(inode, runs, limit, commit)? {
            return Ok(change);
        }
        let change = self.write_blocks(inode, runs, limit, WritePoint::User(inode.0), Watermark::Normal, commit);
        // Everything that it stood for is counted by now, or was never needed.
        drop(reservation);
        change
    }

    /// Stores a whole tiny file in its extent's key. `None` if it is not one.
    fn write_inline(
        &self,
        inode: InodeNumber,
        runs: &[WriteRun<'_>],
        limit: u64,
        commit: WriteCommit<'_>,
    ) -> Result<Option<Change>> {
        let [run] = runs else { return Ok(None) };
        let inline_max = u64::from(self.options.inline_max).min(u64::from(self.shape.block_bytes) - 1);
        if run.offset != 0 || limit == 0 || limit > inline_max || run.length() < limit {
            return Ok(None);
        }
        let length = usize::try_from(limit).unwrap_or(usize::MAX);
        let bytes: Vec<u8> = run.data.iter().flat_map(|slice| slice.iter().copied()).take(length).collect();
        let value = ExtentValue::Inline(bytes);
        let committed = self.transactions.run(CommitOptions::default(), |transaction| {
            let Some(mut stored) = self.inode(transaction, inode)? else { return Ok(Some(None)) };
            if stored.size > limit || (commit.size_limit)() != limit {
                return Ok(None);
            }
            // Space that fallocate holds stays held: then the data goes there.
            if let Some((_, _, present)) = self.view().next(transaction, inode, 0)?
                && present.start() == 0
                && matches!(present.value, ExtentValue::Unwritten { .. })
            {
                return Ok(None);
            }
            let block = u64::from(self.shape.block_bytes);
            let done = overwrite(transaction, &self.view(), inode, 0, block, Some(&value), 2)?;
            stored.size = limit;
            self.put_inode(transaction, inode, &mut stored, done.allocated_delta, commit.update_inode)?;
            Ok(Some(Some(stored)))
        })?;
        Ok(committed.value.map(|inode| {
            self.metrics.data_bytes_written.add(limit);
            Change { sequence: committed.sequence, inode }
        }))
    }

    /// Puts the runs (ascending, not overlapping) into fresh space, with no key that names them: what may be done with no lock held. `size` is
    /// the file's size once they are committed: bytes beyond it are not written. Returns when the writes have completed. Waits for space for the first bytes
    /// only: see [`PreparedWrite::covered_to`].
    ///
    /// # Errors
    /// The device's; [`Error::Invalid`] for runs that are not whole blocks. Nothing has changed then.
    pub fn prepare_write(&self, inode: InodeNumber, runs: &[WriteRun<'_>], size: u64) -> Result<PreparedWrite> {
        self.prepare(runs, size, WritePoint::User(inode.0), Watermark::Normal)
    }

    /// Names prepared data. `committed` is told how far (file offset) each transaction came: what lies below is new, whatever happens to the rest. The
    /// caller excludes changes of the same blocks (block lock), and has made sure that the stored size may grow to the end of the data.
    ///
    /// # Errors
    /// The journal's. A part may be committed then.
    pub fn commit_write(
        &self,
        inode: InodeNumber,
        prepared: &PreparedWrite,
        commit: WriteCommit<'_>,
        committed: &mut dyn FnMut(u64),
    ) -> Result<Change> {
        self.commit_placed(inode, &prepared.placed, prepared.data_end, commit, committed)
    }

    pub(super) fn prepare(
        &self,
        runs: &[WriteRun<'_>],
        limit: u64,
        point: WritePoint,
        watermark: Watermark,
    ) -> Result<PreparedWrite> {
        let block = self.shape.block_bytes;
        let copied = runs.iter().map(|run| copy_odd_bytes(run, limit, block)).collect::<Result<Vec<_>>>()?;
        let sources: Vec<Source<'_>> =
            runs.iter().zip(&copied).filter_map(|(run, copied)| source(run, copied, limit, block)).collect();
        let data_end = runs.last().map_or(0, |run| run.offset.saturating_add(run.length())).min(limit);
        self.place_and_submit(&mut self.encode(&sources), data_end, point, watermark)
    }

    /// Writes what of the items there is space for; the rest stays in `items`.
    fn place_and_submit(
        &self,
        items: &mut VecDeque<Item<'_>>,
        data_end: u64,
        point: WritePoint,
        watermark: Watermark,
    ) -> Result<PreparedWrite> {
        let (placed, stored): (Vec<_>, Vec<_>) = self.place(items, point, watermark)?.into_iter().unzip();
        self.submit_writes(&placed, &stored)?;
        let covered_to = items.front().map_or(u64::MAX, Item::offset);
        Ok(PreparedWrite { placed, data_end: data_end.min(covered_to), covered_to })
    }

    /// Writes runs as extents in buckets, whatever their size.
    pub(super) fn write_blocks(
        &self,
        inode: InodeNumber,
        runs: &[WriteRun<'_>],
        limit: u64,
        point: WritePoint,
        watermark: Watermark,
        commit: WriteCommit<'_>,
    ) -> Result<Change> {
        let block = self.shape.block_bytes;
        let copied = runs.iter().map(|run| copy_odd_bytes(run, limit, block)).collect::<Result<Vec<_>>>()?;
        let sources: Vec<Source<'_>> =
            runs.iter().zip(&copied).filter_map(|(run, copied)| source(run, copied, limit, block)).collect();
        let data_end = runs.last().map_or(0, |run| run.offset.saturating_add(run.length())).min(limit);
        let mut items = self.encode(&sources);
        let mut change = Change { sequence: JournalSequence(0), inode: None };
        loop {
            let prepared = self.place_and_submit(&mut items, data_end, point, watermark)?;
            let committed = self.commit_write(inode, &prepared, commit, &mut |_| {})?;
            change = Change { sequence: change.sequence.max(committed.sequence), inode: committed.inode };
            if items.is_empty() || change.inode.is_none() {
                return Ok(change);
            }
        }
    }

    /// Compresses and checksums.
    fn encode<'a>(&self, sources: &[Source<'a>]) -> VecDeque<Item<'a>> {
        let mut units = Vec::new();
        for source in sources {
            cut_units(source, self.frame_bytes, &mut units);
        }
        let total: u64 = units.iter().map(|unit| unit.length).sum();
        let encoded: Vec<Item<'a>> = if units.len() > 1 && total >= PARALLEL_BYTES_MIN && !self.env.is_simulated() {
            units.into_par_iter().map(|unit| self.encode_unit(unit)).collect()
        } else {
            units.into_iter().map(|unit| self.encode_unit(unit)).collect()
        };
        let mut items: VecDeque<Item<'a>> = VecDeque::with_capacity(encoded.len());
        for item in encoded {
            match (items.back_mut(), item) {
                (
                    Some(Item::Raw { offset, slices, length, checksums }),
                    Item::Raw { offset: next, slices: more, length: more_length, checksums: more_checksums },
                ) if *offset + *length == next && *length + more_length <= self.extent_bytes_max => {
                    slices.extend(more);
                    *length += more_length;
                    checksums.extend(more_checksums);
                }
                (_, item) => items.push_back(item),
            }
        }
        items
    }

    fn encode_unit<'a>(&self, unit: Unit<'a>) -> Item<'a> {
        match compress_unit(self.options.compression, &unit, self.shape.block_bytes) {
            Some(frame) => {
                self.metrics.data_bytes_compressed_in.add(unit.length);
                self.metrics.data_bytes_compressed_out.add(frame.bytes.len() as u64);
                Item::Frame { unit, frame }
            }
            None => self.raw_item(unit),
        }
    }

    fn raw_item<'a>(&self, unit: Unit<'a>) -> Item<'a> {
        let kind = self.options.checksum;
        let checksums = match kind {
            ChecksumKind::None => Vec::new(),
            _ => {
                let blocks = unit.slices.iter().flat_map(|slice| slice.chunks(self.shape.block_bytes as usize));
                blocks.map(|block| kind.compute(block)).collect()
            }
        };
        Item::Raw { offset: unit.offset, length: unit.length, slices: unit.slices.into_vec(), checksums }
    }

    /// Gives items their places, in order, as many as there is space for without waiting, but one at least: nobody waits for space while
    /// holding some, or all who write could wait for each other. What is left stays in `items`. A frame that does not fit into what is left of the
    /// open bucket is cut so that its first part does.
    fn place<'a>(
        &self,
        items: &mut VecDeque<Item<'a>>,
        point: WritePoint,
        watermark: Watermark,
    ) -> Result<Vec<(Placed, Stored<'a>)>> {
        let mut placed = Vec::with_capacity(items.len());
        // The end of a bucket, too short for a frame: raw data that follows may use it.
        let mut spare: Option<Allocation> = None;
        while let Some(item) = items.pop_front() {
            let (wanted, tail) = match &item {
                Item::Raw { length, .. } => ((*length).min(self.extent_bytes_max), spare.take()),
                Item::Frame { frame, .. } => (frame.bytes.len() as u64, None),
            };
            let wanted = u32::try_from(wanted).unwrap_or(u32::MAX);
            let allocation = match tail {
                Some(tail) => tail,
                None if placed.is_empty() && spare.is_none() => self.space.allocate(point, wanted, watermark)?,
                None => match self.space.allocate_now(point, wanted, watermark)? {
                    Some(allocation) => allocation,
                    None => {
                        items.push_front(item);
                        if !placed.is_empty() {
                            break;
                        }
                        spare = None;
                        continue;
                    }
                },
            };
            match item {
                Item::Raw { offset, slices, length, checksums } => {
                    let fits = u64::from(allocation.length).min(u64::from(wanted));
                    let (head, rest) = cut_raw(offset, slices, length, checksums, fits, self.shape.block_bytes);
                    if let Some(rest) = rest {
                        items.push_front(rest);
                    }
                    let Item::Raw { offset, slices, length, checksums } = head else { continue };
                    let value = self.raw_extent(&allocation, length, checksums);
                    placed.push((Placed { offset, value, allocation }, Stored::Slices(slices)));
                }
                Item::Frame { unit, frame } if allocation.length >= wanted => {
                    placed.push(self.placed_frame(&unit, frame, allocation));
                }
                Item::Frame { unit, frame } => match self.refit(&unit, wanted, allocation.length) {
                    Some((first_unit, first, rest)) => {
                        items.push_front(rest);
                        placed.push(self.placed_frame(&first_unit, first, allocation));
                    }
                    None => {
                        items.push_front(Item::Frame { unit, frame });
                        spare = Some(allocation);
                    }
                },
            }
        }
        Ok(placed)
    }

    fn placed_frame<'a>(&self, unit: &Unit<'_>, frame: EncodedFrame, allocation: Allocation) -> (Placed, Stored<'a>) {
        let checksum = self.stream_checksum(&frame);
        let value = self.frame_extent(&allocation, unit, &frame, checksum);
        (Placed { offset: unit.offset, value, allocation }, Stored::Frame(frame.bytes))
    }

    /// Cuts a frame that needs `needed` bytes so that its first part fits into `room` bytes.
    fn refit<'a>(&self, unit: &Unit<'a>, needed: u32, room: u32) -> Option<(Unit<'a>, EncodedFrame, Item<'a>)> {
        // Smaller pieces shrink a little less: leave a sixteenth.
        let share = unit.length.saturating_mul(u64::from(room)) / u64::from(needed.max(1)) / 16 * 15;
        let length = self.shape.block_floor(share);
        if length < 2 * u64::from(self.shape.block_bytes) || length >= unit.length {
            return None;
        }
        let (first, rest) = cut_unit(unit, length);
        let frame = compress_unit(self.options.compression, &first, self.shape.block_bytes)?;
        (frame.bytes.len() <= room as usize).then(|| (first, frame, self.encode_unit(rest)))
    }

    fn stream_checksum(&self, frame: &EncodedFrame) -> u64 {
        self.options.checksum.compute(frame.bytes.get(..frame.stream_bytes as usize).unwrap_or_default())
    }

    /// The value of a raw extent in freshly allocated space.
    pub(super) fn raw_extent(&self, allocation: &Allocation, length: u64, checksums: Vec<u64>) -> ExtentValue {
        let length = u32::try_from(length).unwrap_or(u32::MAX);
        ExtentValue::Data(DataExtent {
            length,
            pointers: SmallVec::from_iter([place_of(allocation)]),
            compression: CompressionKind::None,
            disk_bytes: length,
            stream_bytes: length,
            frame_bytes: length,
            frame_offset: 0,
            checksum_kind: self.options.checksum,
            checksums,
        })
    }

    fn frame_extent(
        &self,
        allocation: &Allocation,
        unit: &Unit<'_>,
        frame: &EncodedFrame,
        checksum: u64,
    ) -> ExtentValue {
        let length = u32::try_from(unit.length).unwrap_or(u32::MAX);
        ExtentValue::Data(DataExtent {
            length,
            pointers: SmallVec::from_iter([place_of(allocation)]),
            compression: self.options.compression.kind(),
            disk_bytes: u32::try_from(frame.bytes.len()).unwrap_or(u32::MAX),
            stream_bytes: frame.stream_bytes,
            frame_bytes: length,
            frame_offset: 0,
            checksum_kind: self.options.checksum,
            checksums: match self.options.checksum {
                ChecksumKind::None => Vec::new(),
                _ => vec![checksum],
            },
        })
    }

    /// One submission for each device.
    fn submit_writes(&self, placed: &[Placed], stored: &[Stored<'_>]) -> Result<()> {
        let writes = placed.iter().zip(stored).map(|(placed, stored)| {
            let data = match stored {
                Stored::Slices(slices) => slices.clone(),
                Stored::Frame(bytes) => vec![bytes.as_slice()],
            };
            (placed.allocation.device, WriteRequest { offset: placed.allocation.offset, data })
        });
        self.write_to_devices(writes.collect())
    }

    fn commit_placed(
        &self,
        inode: InodeNumber,
        placed: &[Placed],
        data_end: u64,
        commit: WriteCommit<'_>,
        committed_to: &mut dyn FnMut(u64),
    ) -> Result<Change> {
        let mut cursor = Cursor { index: 0, within: 0 };
        let mut change = Change { sequence: JournalSequence(0), inode: None };
        while cursor.index < placed.len() {
            let committed = self.transactions.run(CommitOptions::data(), |transaction| {
                let Some(mut stored) = self.inode(transaction, inode)? else { return Ok(None) };
                if !data_end.is_multiple_of(u64::from(self.shape.block_bytes)) && stored.size > data_end {
                    let text =
                        format!("a write that ends within a block at {data_end}, before the end at {}", stored.size);
                    return Err(Error::Invalid(text));
                }
                let limit = (commit.size_limit)();
                let (cursor, covered_to, allocated_delta) =
                    self.stage_placed(transaction, inode, placed, cursor, limit)?;
                stored.size = stored.size.max(covered_to.min(limit).min(data_end));
                self.put_inode(transaction, inode, &mut stored, allocated_delta, commit.update_inode)?;
                Ok(Some((cursor, stored)))
            })?;
            let Some((next, stored)) = committed.value else {
                return Ok(Change { sequence: committed.sequence, inode: None });
            };
            for written in placed.get(cursor.index..next.index).unwrap_or_default() {
                self.metrics.data_bytes_written.add(written.value.length());
                self.metrics.writeback_extents.increment();
            }
            change = Change { sequence: change.sequence.max(committed.sequence), inode: Some(stored) };
            cursor = next;
            match placed.get(cursor.index) {
                Some(next) => committed_to(next.offset + cursor.within),
                None => committed_to(u64::MAX),
            }
        }
        Ok(change)
    }

    /// Stages as many of the extents as one transaction takes. Returns how far it came, the end of what it staged, and the change of
    /// the allocated bytes.
    fn stage_placed(
        &self,
        transaction: &mut crate::transaction::Transaction<'_>,
        inode: InodeNumber,
        placed: &[Placed],
        mut cursor: Cursor,
        limit: u64,
    ) -> Result<(Cursor, u64, i64)> {
        let (mut covered_to, mut allocated_delta, mut value_bytes) = (0, 0, 0);
        while let Some(next) = placed.get(cursor.index) {
            let staged = transaction.update_count();
            if staged > 0 && (staged >= self.keys_max || value_bytes >= self.value_bytes_max) {
                break;
            }
            let start = next.offset + cursor.within;
            let end = (next.offset + next.value.length()).min(self.shape.block_ceiling(limit));
            if start < end {
                let mut value = next.value.clone();
                stamp(transaction, &next.allocation, &mut value);
                let value = part(&value, cursor.within, end - next.offset, self.shape.block_bytes)?;
                value_bytes += stored_value_bytes(&value);
                let done = overwrite(transaction, &self.view(), inode, start, end, Some(&value), self.keys_max)?;
                allocated_delta += done.allocated_delta;
                covered_to = done.covered_to;
                if done.covered_to < end {
                    cursor.within = done.covered_to - next.offset;
                    break;
                }
            }
            cursor = Cursor { index: cursor.index + 1, within: 0 };
        }
        Ok((cursor, covered_to, allocated_delta))
    }
}

/// A pointer to freshly allocated space. Its generation is that of the moment when the body stages it ([`stamp`]).
pub(super) fn place_of(allocation: &Allocation) -> ExtentPointer {
    ExtentPointer { device: allocation.device, generation: 0, offset: allocation.offset }
}

/// About how long the value is when encoded.
pub(super) fn stored_value_bytes(value: &ExtentValue) -> usize {
    match value {
        ExtentValue::Data(data) => 64 + data.checksums.len() * data.checksum_kind.stored_bytes(),
        ExtentValue::Inline(bytes) => bytes.len() + 32,
        ExtentValue::Unwritten { .. } | ExtentValue::Whiteout { .. } => 32,
    }
}

/// Bytes of a run that count: those below the file's size.
fn wanted_bytes(run: &WriteRun<'_>, limit: u64) -> usize {
    usize::try_from(run.length().min(limit.saturating_sub(run.offset))).unwrap_or(usize::MAX)
}

fn copy_odd_bytes(run: &WriteRun<'_>, limit: u64, block_bytes: u32) -> Result<Copied> {
    let block = block_bytes as usize;
    if !run.offset.is_multiple_of(u64::from(block_bytes)) || run.offset.checked_add(run.length()).is_none() {
        return Err(Error::Invalid(format!("a write of {} bytes at {} is not whole blocks", run.length(), run.offset)));
    }
    let wanted = wanted_bytes(run, limit);
    let mut left = wanted;
    let mut odd = false;
    for slice in &run.data {
        odd |= slice.len() < left && !slice.len().is_multiple_of(block);
        left = left.saturating_sub(slice.len());
    }
    let from = match (odd, wanted % block) {
        (true, _) => 0,
        (false, 0) => return Ok(Copied::Nothing),
        (false, tail) => wanted - tail,
    };
    let mut buffer = AlignedBuffer::try_zeroed((wanted - from).next_multiple_of(block))?;
    let mut skip = from;
    let mut rest: &mut [u8] = &mut buffer;
    let mut left = wanted - from;
    for slice in &run.data {
        let skipped = skip.min(slice.len());
        skip -= skipped;
        let slice = slice.get(skipped..).unwrap_or_default();
        let length = slice.len().min(left);
        let (head, tail) = std::mem::take(&mut rest).split_at_mut(length);
        head.copy_from_slice(slice.get(..length).unwrap_or_default());
        rest = tail;
        left -= length;
    }
    Ok(if odd { Copied::All(buffer) } else { Copied::Tail(buffer) })
}

fn source<'a>(run: &WriteRun<'a>, copied: &'a Copied, limit: u64, block_bytes: u32) -> Option<Source<'a>> {
    let wanted = wanted_bytes(run, limit);
    if wanted == 0 {
        return None;
    }
    let mut slices = Vec::with_capacity(run.data.len() + 1);
    if let Copied::All(bytes) = copied {
        slices.push(bytes.as_slice());
        return Some(Source { offset: run.offset, slices });
    }
    let mut left = wanted - wanted % block_bytes as usize;
    for slice in &run.data {
        let length = slice.len().min(left);
        if length > 0 {
            slices.extend(slice.get(..length));
        }
        left -= length;
    }
    if let Copied::Tail(bytes) = copied {
        slices.push(bytes.as_slice());
    }
    Some(Source { offset: run.offset, slices })
}

/// Cuts a source at multiples of `unit_bytes` of the file, so that rewriting a part of a file meets whole frames.
fn cut_units<'a>(source: &Source<'a>, unit_bytes: u64, units: &mut Vec<Unit<'a>>) {
    let mut offset = source.offset;
    let mut unit = Unit { offset, length: 0, slices: SmallVec::new() };
    for slice in &source.slices {
        let mut rest: &'a [u8] = slice;
        while !rest.is_empty() {
            let room = unit_bytes - offset % unit_bytes;
            let length = usize::try_from(room).unwrap_or(usize::MAX).min(rest.len());
            let (head, tail) = rest.split_at(length);
            unit.slices.push(head);
            unit.length += length as u64;
            offset += length as u64;
            rest = tail;
            if offset.is_multiple_of(unit_bytes) {
                units.push(std::mem::replace(&mut unit, Unit { offset, length: 0, slices: SmallVec::new() }));
            }
        }
    }
    if unit.length > 0 {
        units.push(unit);
    }
}

/// The first `length` bytes of a unit, and the rest.
fn cut_unit<'a>(unit: &Unit<'a>, length: u64) -> (Unit<'a>, Unit<'a>) {
    let (first, rest) = cut_slices(unit.slices.iter().copied(), length);
    (
        Unit { offset: unit.offset, length, slices: first.into() },
        Unit { offset: unit.offset + length, length: unit.length - length, slices: rest.into() },
    )
}

fn cut_slices<'a>(slices: impl Iterator<Item = &'a [u8]>, length: u64) -> (Vec<&'a [u8]>, Vec<&'a [u8]>) {
    let mut left = usize::try_from(length).unwrap_or(usize::MAX);
    let (mut first, mut rest) = (Vec::new(), Vec::new());
    for slice in slices {
        let (head, tail) = slice.split_at(slice.len().min(left));
        left -= head.len();
        if !head.is_empty() {
            first.push(head);
        }
        if !tail.is_empty() {
            rest.push(tail);
        }
    }
    (first, rest)
}

/// The first `fits` bytes of a raw item, and the rest if there is any.
fn cut_raw<'a>(
    offset: u64,
    slices: Vec<&'a [u8]>,
    length: u64,
    mut checksums: Vec<u64>,
    fits: u64,
    block_bytes: u32,
) -> (Item<'a>, Option<Item<'a>>) {
    if fits >= length {
        return (Item::Raw { offset, slices, length, checksums }, None);
    }
    let (first, rest) = cut_slices(slices.into_iter(), fits);
    let blocks = usize::try_from(fits / u64::from(block_bytes)).unwrap_or(usize::MAX).min(checksums.len());
    let rest_checksums = checksums.split_off(blocks);
    let rest = Item::Raw { offset: offset + fits, slices: rest, length: length - fits, checksums: rest_checksums };
    (Item::Raw { offset, slices: first, length: fits, checksums }, Some(rest))
}

fn compress_unit(compression: Compression, unit: &Unit<'_>, block_bytes: u32) -> Option<EncodedFrame> {
    if compression.kind() == CompressionKind::None {
        return None;
    }
    match unit.slices.as_slice() {
        [slice] => compress::encode(compression, slice, block_bytes),
        slices => compress::encode(compression, &slices.concat(), block_bytes),
    }
}
