//! Copygc: moves what is alive out of the most fragmented bucket, so that the bucket can be freed.
//!
//! ```text
//! victim (fewest charged bytes) -> its backpointers -> the extents they name -> one read -> verify -> allocate -> one write
//!    -> transactions: where a key is still what it was, its pointer now names the copy     (compare-and-swap)
//! ```
//!
//! Guarantees:
//! 1. **Never a checksum over bad data.** Raw blocks move with the checksums that they had; a block that does not match stays a block that does not match, and
//!    one that cannot be read becomes one that does not match. The same for whole frames.
//! 2. **Never more space than it frees.** Raw data moves byte for byte. The parts of a frame are charged together at least what the frame takes, or each at least
//!    its own length: in the first case the frame moves as it is, for all of them; in the second each part is decoded and compressed alone,
//!    or stored raw.
//! 3. **A key that changed meanwhile is left alone.** Its new data is elsewhere. If the key is unchanged when the move commits, then it was alive all the time
//!    (offsets of a bucket are handed out once in each generation), so the bytes that were read are its own, checksums or not.
//!
//! 4. **It never waits for space**, since those who wait for space wait for it: without space it moves what it can, and goes on with the same bucket later.
//!
//! No lock is held over I/O; never takes an inode lock, add or block. Runs when free buckets are low or somebody waits for one
//! ([`crate::space::Space::copygc_needed`]).

use std::collections::BTreeMap;

use super::Data;
use super::compress;
use super::extents::{Extent, allocated_bytes, part, signed};
use super::read::{block_is_good, verified_stream};
use super::write::stored_value_bytes;
use crate::alloc::{Allocation, BucketKey, Watermark, WritePoint};
use crate::device::{ReadRequest, WriteRequest};
use crate::env::{Event, Progress, Worker};
use crate::error::{Error, Result};
use crate::format::extent::{DataExtent, ExtentValue};
use crate::format::space::Backpointer;
use crate::format::{BtreeId, ChecksumKind, CompressionKind, Position, Value};
use crate::memory::AlignedBuffer;
use crate::space::pointer;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Arc, Mutex};
use crate::transaction::{CommitOptions, Transaction};
use crate::units::{BucketIndex, DeviceIndex, InodeNumber};

/// Stored bytes that are read at once.
const BATCH_BYTES: u64 = 1 << 20;

/// How long to wait for space, or if nothing in a victim could be moved.
const RETRY_AFTER: std::time::Duration = std::time::Duration::from_millis(5);

/// The same where not even keys find space.
const RETRY_SPACE: std::time::Duration = std::time::Duration::from_millis(100);

/// How long to leave things alone after an error of the medium.
const PAUSE_AFTER_ERROR: std::time::Duration = std::time::Duration::from_secs(1);

/// A key that points into the victim.
struct Live {
    position: Position,
    value: Value,
    extent: Extent,
    data: DataExtent,
    /// Which of its pointers.
    pointer: usize,
}

/// Stored bytes of the victim, with the keys that want them: one for raw data, one or more parts for a frame.
struct Group {
    /// Byte offset on the device.
    offset: u64,
    keys: Vec<Live>,
    stored: AlignedBuffer,
    /// Blocks that could not be read, for raw data; block 0 stands for a whole frame.
    unreadable: Vec<usize>,
}

/// New bytes for a key or several: a piece of the value, where it now is, and what goes there.
struct Piece {
    /// Bytes of the key's range that it covers.
    from: u64,
    value: ExtentValue,
    /// Index of its space in the batch's placements; `None`: it stays where it is.
    placement: Option<usize>,
}

/// A key and what takes its place.
struct Move {
    position: Position,
    old: Value,
    start: u64,
    pointer: usize,
    pieces: Vec<Piece>,
    allocated_before: u64,
}

/// What a batch will do.
#[derive(Default)]
struct Plan {
    placements: Vec<Placement>,
    moves: Vec<Move>,
    /// The end of a bucket that was too short for a frame.
    spare: Option<Allocation>,
    /// There is no space now without waiting: nothing more is planned.
    is_full: bool,
}

/// Space with the bytes that go there.
struct Placement {
    allocation: Allocation,
    bytes: Bytes,
}

/// Bytes to be written: a part of what was read, or bytes of their own.
enum Bytes {
    Read { group: usize, from: usize, to: usize },
    Own(AlignedBuffer),
}

/// The worker. One for each filesystem.
pub struct CopyGc {
    data: Arc<Data>,
    /// A bucket that is not empty yet, since space ran out.
    pending: Mutex<Option<BucketKey>>,
    /// The last step found no space for B-tree nodes.
    lacks_space: AtomicBool,
}

/// What moving data out of a bucket came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Evacuated {
    /// Keys that name other places now.
    pub moved: usize,
    /// Whether all of the bucket was looked at; if not, there was no space for the rest.
    pub is_complete: bool,
}

impl Data {
    /// The worker that keeps free buckets coming.
    #[must_use]
    pub fn copygc_worker(self: &Arc<Self>) -> Arc<CopyGc> {
        Arc::new(CopyGc { data: Arc::clone(self), pending: Mutex::new(None), lacks_space: AtomicBool::new(false) })
    }

    /// Moves all that is alive out of a bucket, as far as there is space without waiting: others wait for copygc.
    ///
    /// # Errors
    /// The device's or the journal's.
    pub fn evacuate(&self, device: DeviceIndex, bucket: BucketIndex) -> Result<Evacuated> {
        let _quiet = self.env.quiet();
        let major = u64::from(device.0) << 48 | bucket.0;
        let mut moved = 0;
        let mut cursor = Some(0_u64);
        while let Some(from) = cursor {
            let (groups, next) = self.collect(device, bucket, major, from)?;
            let (moved_now, is_complete) = self.move_groups(device, groups)?;
            moved += moved_now;
            if !is_complete {
                return Ok(Evacuated { moved, is_complete });
            }
            cursor = next;
        }
        self.metrics.copygc_buckets.increment();
        Ok(Evacuated { moved, is_complete: true })
    }

    /// Live data of the bucket from `cursor` (bytes in the bucket) on, about [`BATCH_BYTES`] of it, and where to go on.
    fn collect(
        &self,
        device: DeviceIndex,
        bucket: BucketIndex,
        major: u64,
        cursor: u64,
    ) -> Result<(Vec<Group>, Option<u64>)> {
        let mut transaction = self.transactions.read();
        let mut from = Position::new(major, cursor << 32, 0);
        let to = Position::new(major, u64::MAX, u32::MAX);
        let mut groups: BTreeMap<u64, Group> = BTreeMap::new();
        let mut batch_bytes = 0;
        loop {
            let keys = transaction.range(BtreeId::Backpointers, from, to, 64)?;
            let Some((last, _)) = keys.last() else { break };
            let Some(next) = last.successor() else { break };
            from = next;
            for (position, value) in keys {
                let in_bucket = position.offset >> 32;
                // All parts of a frame stand at one offset, and belong together.
                if batch_bytes >= BATCH_BYTES && !groups.contains_key(&in_bucket) {
                    return Ok((groups.into_values().collect(), Some(in_bucket)));
                }
                let offset = bucket.0 * u64::from(self.shape.bucket_bytes) + in_bucket;
                let Some(live) = self.live(&mut transaction, device, offset, &Backpointer::decode(&value)?)? else {
                    continue;
                };
                match groups.get_mut(&in_bucket) {
                    Some(group) => group.keys.push(live),
                    None => {
                        let stored = AlignedBuffer::try_zeroed(live.data.disk_bytes as usize)?;
                        batch_bytes += u64::from(live.data.disk_bytes);
                        groups.insert(in_bucket, Group { offset, keys: vec![live], stored, unreadable: Vec::new() });
                    }
                }
            }
        }
        Ok((groups.into_values().collect(), None))
    }

    /// The extent that a backpointer names, if it (still) points here.
    fn live(
        &self,
        transaction: &mut Transaction<'_>,
        device: DeviceIndex,
        offset: u64,
        backpointer: &Backpointer,
    ) -> Result<Option<Live>> {
        if backpointer.btree != BtreeId::Extents {
            return Ok(None);
        }
        let position = backpointer.position;
        let Some(value) = transaction.get(BtreeId::Extents, position)? else { return Ok(None) };
        let extent = match self.shape.decode(position, &value) {
            Ok(extent) => extent,
            Err(error) => {
                tracing::error!("copygc leaves an extent where it is: {error}");
                return Ok(None);
            }
        };
        let ExtentValue::Data(data) = extent.value.clone() else { return Ok(None) };
        let pointer = data.pointers.iter().position(|pointer| pointer.device == device && pointer.offset == offset);
        Ok(pointer.map(|pointer| Live { position, value, data, extent, pointer }))
    }

    /// Moves what the groups hold. Returns how many keys, and whether there was space for all.
    fn move_groups(&self, device: DeviceIndex, mut groups: Vec<Group>) -> Result<(usize, bool)> {
        if groups.is_empty() {
            return Ok((0, true));
        }
        self.read_groups(device, &mut groups)?;
        let total = groups.iter().map(|group| group.stored.len() as u64).sum();
        let reservation = self.space.reserve_privileged(total);
        let mut plan = Plan::default();
        for (index, group) in groups.iter().enumerate() {
            self.plan(index, group, &mut plan)?;
            if plan.is_full {
                break;
            }
        }
        let Plan { placements, moves, spare, is_full } = plan;
        drop(spare);
        let writes = placements.iter().filter_map(|placement| {
            let bytes = match &placement.bytes {
                Bytes::Read { group, from, to } => groups.get(*group)?.stored.get(*from..*to)?,
                Bytes::Own(bytes) => bytes.as_slice(),
            };
            let request = WriteRequest { offset: placement.allocation.offset, data: vec![bytes] };
            Some((placement.allocation.device, request))
        });
        let writes: Vec<_> = writes.collect();
        self.metrics.copygc_bytes.add(writes.iter().map(|(_, write)| write.length()).sum());
        self.write_to_devices(writes)?;
        let moved = self.commit_moves(&moves, &placements)?;
        drop(reservation);
        Ok((moved, !is_full))
    }

    /// Reads all groups in one submission; what fails is read again block by block.
    fn read_groups(&self, device: DeviceIndex, groups: &mut [Group]) -> Result<()> {
        let device = self.device(device)?;
        let mut failed = vec![false; groups.len()];
        {
            let mut requests: Vec<ReadRequest<'_>> = groups
                .iter_mut()
                .map(|group| ReadRequest { offset: group.offset, buffer: &mut group.stored })
                .collect();
            self.metrics.device_data_read_submissions.increment();
            device.read_batch(&mut requests, &mut |index, result| {
                if let Some(failed) = failed.get_mut(index) {
                    *failed = result.is_err();
                }
            });
        }
        let block = self.shape.block_bytes as usize;
        for (group, _) in groups.iter_mut().zip(failed).filter(|(_, failed)| *failed) {
            let is_raw = group.keys.iter().all(|live| live.data.compression == CompressionKind::None);
            let offset = group.offset;
            for (index, bytes) in group.stored.chunks_mut(block).enumerate() {
                if let Err(error) = device.read(offset + (index * block) as u64, bytes) {
                    tracing::error!(offset, "copygc cannot read file data: {error}");
                    bytes.fill(0);
                    group.unreadable.push(if is_raw { index } else { 0 });
                }
            }
        }
        Ok(())
    }

    /// Plans where the bytes of a group go and what its keys become.
    fn plan(&self, index: usize, group: &Group, plan: &mut Plan) -> Result<()> {
        let Some(first) = group.keys.first() else { return Ok(()) };
        if first.data.compression == CompressionKind::None {
            for live in &group.keys {
                self.plan_raw(index, group, live, plan)?;
            }
            return Ok(());
        }
        let charged: u64 = group.keys.iter().map(|live| u64::from(live.data.charged_bytes())).sum();
        let single_copies = group.keys.iter().all(|live| live.data.pointers.len() == 1);
        if charged < u64::from(first.data.disk_bytes) && single_copies && group.unreadable.is_empty() {
            let mut decoded = vec![0; first.data.frame_bytes as usize];
            let is_good = verified_stream(&first.data, &group.stored)
                .and_then(|stream| compress::decode(first.data.compression, stream, &mut decoded))
                .is_ok();
            let fits = |live: &Live| live.data.frame_offset.saturating_add(live.data.length) <= first.data.frame_bytes;
            if is_good && group.keys.iter().all(fits) {
                for live in &group.keys {
                    self.plan_part(live, &decoded, plan)?;
                }
                return Ok(());
            }
        }
        self.plan_frame(index, group, plan)
    }

    /// A raw extent, byte for byte, in as many pieces as the open buckets ask for.
    fn plan_raw(&self, index: usize, group: &Group, live: &Live, plan: &mut Plan) -> Result<()> {
        let source = ExtentValue::Data(self.honest_raw(live, group));
        let length = u64::from(live.data.length);
        let mut pieces = Vec::new();
        let mut from = 0;
        while from < length && !plan.is_full {
            let Some(allocation) = self.some_space(plan, length - from)? else { break };
            let to = length.min(from + u64::from(allocation.length));
            let value = part(&source, from, to, self.shape.block_bytes)?;
            let bytes = Bytes::Read { group: index, from: index_of(from), to: index_of(to) };
            pieces.push(Piece { from, value, placement: Some(plan.placements.len()) });
            plan.placements.push(Placement { allocation, bytes });
            from = to;
        }
        if pieces.is_empty() {
            return Ok(());
        }
        if from < length {
            // The rest stays for now, with the checksums that it has now.
            let value = part(&live.extent.value, from, length, self.shape.block_bytes)?;
            pieces.push(Piece { from, value, placement: None });
        }
        plan.moves.push(new_move(live, pieces));
        Ok(())
    }

    /// The extent with its checksums, so that blocks that could not be read do not match theirs.
    fn honest_raw(&self, live: &Live, group: &Group) -> DataExtent {
        let mut data = live.data.clone();
        if group.unreadable.is_empty() {
            let block = self.shape.block_bytes as usize;
            let blocks = group.stored.chunks(block).zip(0_u64..);
            let bad = blocks.filter(|(bytes, number)| !block_is_good(&data, *number, bytes)).count();
            if bad > 0 {
                self.metrics.data_checksum_errors.add(bad as u64);
                tracing::error!(
                    inode = live.position.inode,
                    offset = group.offset,
                    "copygc moves {bad} damaged blocks as they are"
                );
            }
            return data;
        }
        let zeros = vec![0; self.shape.block_bytes as usize];
        if data.checksum_kind == ChecksumKind::None {
            // Without checksums the loss could not be told from zeros.
            data.checksum_kind = ChecksumKind::Crc32c;
            let blocks = group.stored.chunks(self.shape.block_bytes as usize);
            data.checksums = blocks.map(|block| ChecksumKind::Crc32c.compute(block)).collect();
        }
        let of_zeros = data.checksum_kind.compute(&zeros);
        for &block in &group.unreadable {
            if let Some(checksum) = data.checksums.get_mut(block)
                && *checksum == of_zeros
            {
                *checksum ^= 1;
            }
        }
        data
    }

    /// A whole frame as it is, for all its parts.
    fn plan_frame(&self, index: usize, group: &Group, plan: &mut Plan) -> Result<()> {
        let length = group.stored.len();
        let Some(allocation) = self.contiguous_space(plan, length as u64)? else { return Ok(()) };
        let placement = Some(plan.placements.len());
        plan.placements.push(Placement { allocation, bytes: Bytes::Read { group: index, from: 0, to: length } });
        for live in &group.keys {
            let mut data = live.data.clone();
            if !group.unreadable.is_empty() {
                let stream = group.stored.get(..data.stream_bytes as usize).unwrap_or_default();
                if data.checksum_kind == ChecksumKind::None {
                    data.checksum_kind = ChecksumKind::Crc32c;
                    data.checksums = vec![ChecksumKind::Crc32c.compute(stream)];
                }
                let computed = data.checksum_kind.compute(stream);
                for checksum in data.checksums.iter_mut().filter(|checksum| **checksum == computed) {
                    *checksum ^= 1;
                }
            }
            let piece = Piece { from: 0, value: ExtentValue::Data(data), placement };
            plan.moves.push(new_move(live, vec![piece]));
        }
        Ok(())
    }

    /// A part of a decoded frame, compressed alone or raw. Takes no more than the part is charged with, which is its length.
    fn plan_part(&self, live: &Live, decoded: &[u8], plan: &mut Plan) -> Result<()> {
        let from = live.data.frame_offset as usize;
        let bytes = decoded
            .get(from..)
            .and_then(|bytes| bytes.get(..live.data.length as usize))
            .ok_or_else(|| Error::corrupt(format!("extent {}", live.position), "a part outside of its frame"))?;
        let mut pieces = Vec::new();
        let kind = live.data.checksum_kind;
        let compression = self.options.compression;
        if let Some(frame) = compress::encode(compression, bytes, self.shape.block_bytes) {
            let stream = frame.bytes.get(..frame.stream_bytes as usize).unwrap_or_default();
            let checksums = if kind == ChecksumKind::None { Vec::new() } else { vec![kind.compute(stream)] };
            let value = ExtentValue::Data(DataExtent {
                compression: compression.kind(),
                disk_bytes: u32::try_from(frame.bytes.len()).unwrap_or(u32::MAX),
                stream_bytes: frame.stream_bytes,
                frame_bytes: live.data.length,
                frame_offset: 0,
                checksums,
                ..live.data.clone()
            });
            let Some(allocation) = self.contiguous_space(plan, frame.bytes.len() as u64)? else { return Ok(()) };
            pieces.push(Piece { from: 0, value, placement: Some(plan.placements.len()) });
            plan.placements.push(Placement { allocation, bytes: Bytes::Own(frame.bytes) });
        } else {
            let block = self.shape.block_bytes as usize;
            let checksums = match kind {
                ChecksumKind::None => Vec::new(),
                _ => bytes.chunks(block).map(|block| kind.compute(block)).collect(),
            };
            let length = live.data.length;
            let value = ExtentValue::Data(DataExtent {
                compression: CompressionKind::None,
                disk_bytes: length,
                stream_bytes: length,
                frame_bytes: length,
                frame_offset: 0,
                checksums,
                ..live.data.clone()
            });
            let mut from = 0;
            while from < u64::from(length) {
                let Some(allocation) = self.some_space(plan, u64::from(length) - from)? else { return Ok(()) };
                let to = u64::from(length).min(from + u64::from(allocation.length));
                let own = AlignedBuffer::copy_of(bytes.get(index_of(from)..index_of(to)).unwrap_or_default())?;
                let value = part(&value, from, to, self.shape.block_bytes)?;
                pieces.push(Piece { from, value, placement: Some(plan.placements.len()) });
                plan.placements.push(Placement { allocation, bytes: Bytes::Own(own) });
                from = to;
            }
        }
        plan.moves.push(new_move(live, pieces));
        Ok(())
    }

    /// At most `bytes` of space, from what is left over first. `None` if there is none now.
    fn some_space(&self, plan: &mut Plan, bytes: u64) -> Result<Option<Allocation>> {
        if let Some(allocation) = plan.spare.take() {
            return Ok(Some(allocation));
        }
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        let allocation = self.space.try_allocate(WritePoint::CopyGc, bytes, Watermark::CopyGc)?;
        plan.is_full |= allocation.is_none();
        Ok(allocation)
    }

    /// `bytes` of contiguous space. The end of a bucket that is too short is left over for raw data. `None` if there is none now.
    fn contiguous_space(&self, plan: &mut Plan, bytes: u64) -> Result<Option<Allocation>> {
        let wanted = u32::try_from(bytes).unwrap_or(u32::MAX);
        loop {
            let allocation = self.space.try_allocate(WritePoint::CopyGc, wanted, Watermark::CopyGc)?;
            match allocation {
                Some(allocation) if allocation.length < wanted => plan.spare = Some(allocation),
                Some(allocation) => return Ok(Some(allocation)),
                None => {
                    plan.is_full = true;
                    return Ok(None);
                }
            }
        }
    }

    fn commit_moves(&self, moves: &[Move], placements: &[Placement]) -> Result<usize> {
        let options = CommitOptions { data_needs_flush: true, ..CommitOptions::reclaim() };
        let (mut at, mut moved) = (0, 0);
        while at < moves.len() {
            let committed = self.transactions.run(options, |transaction| {
                let (mut next, mut moved, mut value_bytes) = (at, 0, 0);
                while let Some(one) = moves.get(next) {
                    let staged = transaction.update_count();
                    if staged > 0 && (staged >= self.keys_max || value_bytes >= self.value_bytes_max) {
                        break;
                    }
                    moved += usize::from(self.stage_move(transaction, one, placements, &mut value_bytes)?);
                    next += 1;
                }
                Ok((next, moved))
            })?;
            let (next, moved_now) = committed.value;
            if let (Some(hook), Some(done)) = (self.moved.get(), moves.get(at..next)) {
                let inodes: std::collections::BTreeSet<u64> = done.iter().map(|one| one.position.inode).collect();
                inodes.into_iter().for_each(|inode| hook(InodeNumber(inode)));
            }
            at = next;
            moved += moved_now;
        }
        Ok(moved)
    }

    /// The compare-and-swap of one key. Returns whether the key was still what it was.
    fn stage_move(
        &self,
        transaction: &mut Transaction<'_>,
        one: &Move,
        placements: &[Placement],
        value_bytes: &mut usize,
    ) -> Result<bool> {
        if transaction.get(BtreeId::Extents, one.position)?.as_ref() != Some(&one.old) {
            return Ok(false);
        }
        let mut allocated_delta = -signed(one.allocated_before);
        for piece in &one.pieces {
            let mut value = piece.value.clone();
            if let Some(placement) = piece.placement {
                let Some(placement) = placements.get(placement) else {
                    return Err(Error::Bug("a move without a place".into()));
                };
                if let ExtentValue::Data(data) = &mut value {
                    match data.pointers.get_mut(one.pointer) {
                        Some(slot) => *slot = pointer(transaction, &placement.allocation, 0),
                        None => return Err(Error::Bug("a move of a pointer that does not exist".into())),
                    }
                }
            }
            allocated_delta += signed(allocated_bytes(&value));
            *value_bytes += stored_value_bytes(&value);
            let end = one.start + piece.from + value.length();
            let position = Position { offset: end, ..one.position };
            transaction.put(BtreeId::Extents, position, value.encode());
        }
        if allocated_delta != 0 {
            let inode = InodeNumber(one.position.inode);
            if let Some(mut stored) = self.inode(transaction, inode)? {
                self.put_inode(transaction, inode, &mut stored, allocated_delta, &|_| {})?;
            }
        }
        Ok(true)
    }
}

fn new_move(live: &Live, pieces: Vec<Piece>) -> Move {
    Move {
        position: live.position,
        old: Arc::clone(&live.value),
        start: live.extent.start(),
        pointer: live.pointer,
        pieces,
        allocated_before: allocated_bytes(&live.extent.value),
    }
}

fn index_of(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

impl Worker for CopyGc {
    fn name(&self) -> &'static str {
        "copygc"
    }

    fn step(&self, _budget: u32) -> Result<Progress> {
        if !self.data.space.copygc_needed() {
            return Ok(Progress::Idle(None));
        }
        let pending = self.pending.lock().take();
        let victim = match pending {
            Some(victim) => Some(victim),
            None => self.data.space.fragmented_bucket()?,
        };
        let Some((device, bucket)) = victim else { return Ok(Progress::Idle(None)) };
        let evacuated = match self.data.evacuate(device, bucket) {
            Ok(evacuated) => evacuated,
            // What cannot be read keeps its bucket. A failed write has latched the device, and the next commit says so.
            Err(error) if error.is_media_error() && self.data.transactions.journal().latched().is_none() => {
                tracing::error!(bucket = bucket.0, "copygc leaves a bucket as it is: {error}");
                return Ok(Progress::Idle(Some(PAUSE_AFTER_ERROR)));
            }
            // Not even for the keys: as if there were none for the data.
            Err(Error::NoSpace(reason)) => {
                self.data.metrics.copygc_space_waits.increment();
                if !self.lacks_space.swap(true, Ordering::Relaxed) {
                    tracing::warn!("copygc waits for space: {reason}");
                }
                *self.pending.lock() = Some((device, bucket));
                self.data.space.copygc_lacks_space();
                return Ok(Progress::Idle(Some(RETRY_SPACE)));
            }
            Err(error) => return Err(error),
        };
        self.lacks_space.store(false, Ordering::Relaxed);
        if !evacuated.is_complete {
            *self.pending.lock() = Some((device, bucket));
            return Ok(Progress::Idle(Some(RETRY_AFTER)));
        }
        Ok(if evacuated.moved > 0 { Progress::Worked } else { Progress::Idle(Some(RETRY_AFTER)) })
    }

    fn event(&self) -> &Event {
        self.data.space.copygc_event()
    }
}
