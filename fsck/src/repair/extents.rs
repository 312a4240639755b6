//! Extents that cannot be, that contradict each other, or that belong to nobody.
//!
//! Who owns a place on the device that two extents claim is asked of the data: it belongs to the one whose checksums it fits. Where data is gone, what is
//! put in the place of the extent makes a read of exactly that range fail.

use coppicefs::Result;
use coppicefs::data::extents::{Extent, part, take_out};
use coppicefs::format::extent::{DataExtent, EXTENT_BYTES_MAX, ExtentValue};
use coppicefs::format::namespace::FileType;
use coppicefs::format::space::{Backpointer, Bucket};
use coppicefs::format::{BtreeId, ChecksumKind, CompressionKind, Position};
use coppicefs::memory::AlignedBuffer;
use coppicefs::units::{InodeNumber, round_down, round_up};

use super::{KeyRepair, Loss, device_position, has_data};

/// What the device holds where an extent points, by its checksums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// All that was asked for is as it was written.
    Good,
    /// Some blocks are.
    Partly,
    /// None is, or none can be read.
    Bad,
    /// There are no checksums.
    Unknown,
}

impl KeyRepair<'_, '_> {
    fn block_bytes(&self) -> u32 {
        self.filesystem.superblock().geometry.block_bytes
    }

    /// The extent at a position, if it is one.
    fn extent(&mut self, position: Position) -> Result<Option<ExtentValue>> {
        let value = self.transaction.get(BtreeId::Extents, position)?;
        Ok(value.and_then(|value| ExtentValue::decode(&value).ok()))
    }

    /// The extent at a position, if it can be cut: one that cannot be is another problem, whose repair takes it away.
    fn sound_extent(&mut self, position: Position) -> Result<Option<ExtentValue>> {
        let shape = self.filesystem.data().shape();
        Ok(self.extent(position)?.filter(|extent| shape.problem(position.offset, extent).is_none()))
    }

    fn put_extent(&mut self, position: Position, end: u64, value: &ExtentValue) {
        self.transaction.put(BtreeId::Extents, Position { offset: end, ..position }, value.encode());
    }

    /// Whether a file whose data this could be exists, and its size.
    fn file_size(&mut self, position: Position) -> Result<Option<u64>> {
        if position.snapshot != coppicefs::units::SnapshotId::ROOT.0 {
            return Ok(None);
        }
        Ok(self.inode(position.inode)?.filter(has_data).map(|inode| inode.size))
    }

    /// Takes a key away that means nothing. In its place comes what makes reads fail, over the range that it may have covered: `length` bytes, or as
    /// many as an extent can have, up to the extents beside it and to the end of the file.
    pub(super) fn lose(&mut self, position: Position, length: Option<u64>) -> Result<()> {
        self.transaction.delete(BtreeId::Extents, position);
        let Some(size) = self.file_size(position)? else { return Ok(()) };
        let block = u64::from(self.block_bytes());
        let (first, last) = (Position::new(position.inode, 0, 0), Position::new(position.inode, u64::MAX, u32::MAX));
        let before = match position.predecessor() {
            Some(at) => {
                self.transaction.previous(BtreeId::Extents, at, first)?.map_or(0, |(position, _)| position.offset)
            }
            None => 0,
        };
        let behind = match position.successor().filter(|at| *at <= last) {
            Some(at) => self.transaction.next(BtreeId::Extents, at, last)?,
            None => None,
        };
        let behind = behind.map_or(u64::MAX, |(position, value)| {
            let length = ExtentValue::decode(&value).map_or(0, |extent| extent.length());
            position.offset.saturating_sub(length)
        });
        let longest = length.unwrap_or(u64::MAX).min(EXTENT_BYTES_MAX.into());
        let start = round_down(position.offset.saturating_sub(longest), block).max(round_up(before, block));
        let end = round_up(position.offset, block).min(round_down(behind, block)).min(round_up(size, block));
        self.mark_lost(position, start, end);
        Ok(())
    }

    /// Puts what stands for lost data over a range that no extent covers, if it is one.
    fn mark_lost(&mut self, position: Position, start: u64, end: u64) {
        let Some(length) = end.checked_sub(start).and_then(|length| u32::try_from(length).ok()) else { return };
        if length > 0 {
            self.put_extent(position, end, &ExtentValue::Data(DataExtent::lost(length)));
            self.losses.push(Loss { inode: position.inode, start, end });
        }
    }

    pub(super) fn misplaced_extent(&mut self, position: Position) -> Result<()> {
        let Some(extent) = self.extent(position)? else { return Ok(()) };
        if self.filesystem.data().shape().problem(position.offset, &extent).is_none() {
            return Ok(());
        }
        self.lose(position, Some(extent.length()))
    }

    /// What is left of an extent where the ones that end before it cover it, too. Held space that holds no data gives way to data.
    pub(super) fn overlapping_extent(&mut self, position: Position) -> Result<()> {
        let Some(value) = self.sound_extent(position)? else { return Ok(()) };
        let block_bytes = self.block_bytes();
        let mut pieces = vec![Extent { end: position.offset, value }];
        let Some(start) = pieces.first().and_then(|extent| extent.end.checked_sub(extent.value.length())) else {
            return Ok(());
        };
        let (from, to) = (Position::new(position.inode, start.saturating_add(1), 0), position.predecessor());
        let others = match to.filter(|to| from <= *to) {
            Some(to) => self.transaction.range(BtreeId::Extents, from, to, usize::MAX)?,
            None => Vec::new(),
        };
        if others.is_empty() {
            return Ok(());
        }
        self.transaction.delete(BtreeId::Extents, position);
        let is_data = pieces.iter().any(|piece| has_bytes(&piece.value));
        for (other, value) in others {
            let decoded = ExtentValue::decode(&value).ok();
            let length = decoded.as_ref().map_or(0, ExtentValue::length);
            if is_data && let Some(empty) = decoded.filter(|decoded| !has_bytes(decoded)) {
                let kept = other.offset.saturating_sub(length)..start.min(other.offset);
                self.transaction.delete(BtreeId::Extents, other);
                let is_cuttable = self.filesystem.data().shape().problem(other.offset, &empty).is_none();
                if kept.start < kept.end && is_cuttable {
                    let left = part(&empty, 0, kept.end - kept.start, block_bytes)?;
                    self.put_extent(other, kept.end, &left);
                }
                continue;
            }
            let (first, last) = (other.offset.saturating_sub(length), other.offset);
            let (first, last) = (round_down(first, block_bytes.into()), round_up(last, block_bytes.into()));
            let mut left = Vec::new();
            for piece in pieces {
                if piece.end <= first || piece.start() >= last {
                    left.push(piece);
                    continue;
                }
                let remainder = take_out(&piece, first, last, block_bytes)?;
                left.extend(remainder.front.into_iter().chain(remainder.back));
            }
            pieces = left;
        }
        for piece in pieces {
            self.put_extent(position, piece.end, &piece.value);
        }
        Ok(())
    }

    /// Drops the copies that are at no place; without another, the data is lost.
    pub(super) fn wrong_pointer(&mut self, position: Position) -> Result<()> {
        let Some(ExtentValue::Data(mut data)) = self.extent(position)? else { return Ok(()) };
        let superblock = self.filesystem.superblock();
        let bucket_bytes = u64::from(superblock.geometry.bucket_bytes);
        let several = data.pointers.len() > 1;
        data.pointers.retain(|pointer| {
            let bucket = pointer.offset / bucket_bytes;
            let member = superblock.members.get(usize::from(pointer.device.0));
            several
                && member.is_some_and(|member| bucket < member.bucket_count)
                && !superblock.is_reserved(pointer.device.0, bucket)
                && pointer.offset % bucket_bytes + u64::from(data.disk_bytes) <= bucket_bytes
        });
        if data.pointers.is_empty() {
            return self.lose(position, Some(data.length.into()));
        }
        self.put_extent(position, position.offset, &ExtentValue::Data(data));
        Ok(())
    }

    /// The generations do not fit: the data may be there all the same. If some of it is, the pointer is made to fit, and the blocks that are not fail
    /// their checksums when they are read.
    pub(super) fn stale_extent(&mut self, position: Position) -> Result<()> {
        let Some(ExtentValue::Data(mut data)) = self.sound_extent(position)? else { return Ok(()) };
        let Some(pointer) = data.pointers.first().copied() else { return Ok(()) };
        let bucket_bytes = u64::from(self.filesystem.superblock().geometry.bucket_bytes);
        let bucket = device_position(pointer.device.0, pointer.offset / bucket_bytes);
        let bucket = self.transaction.get(BtreeId::Buckets, bucket)?;
        let Some(bucket) = bucket.and_then(|value| Bucket::decode(&value).ok()) else { return Ok(()) };
        if bucket.generation == pointer.generation {
            return Ok(());
        }
        if !matches!(self.verify(&data, 0, data.length), Verdict::Good | Verdict::Partly) {
            return self.lose(position, Some(data.length.into()));
        }
        for pointer in data.pointers.iter_mut().take(1) {
            pointer.generation = bucket.generation;
        }
        self.put_extent(position, position.offset, &ExtentValue::Data(data));
        Ok(())
    }

    /// What the first copy of `[from, to)` of an extent is. Of a compressed one, what the whole frame is.
    fn verify(&self, data: &DataExtent, from: u32, to: u32) -> Verdict {
        if data.checksum_kind == ChecksumKind::None {
            return Verdict::Unknown;
        }
        let Some(pointer) = data.pointers.first() else { return Verdict::Bad };
        let Some(device) = self.filesystem.devices().get(usize::from(pointer.device.0)) else { return Verdict::Bad };
        let Ok(mut buffer) = AlignedBuffer::try_zeroed(data.disk_bytes as usize) else { return Verdict::Bad };
        if data.compression != CompressionKind::None {
            let landed = device.read(pointer.offset, &mut buffer).is_ok();
            let stream = buffer.get(..data.stream_bytes as usize).filter(|_| landed);
            let fits = stream.is_some_and(|stream| data.checksums.first() == Some(&data.checksum_kind.compute(stream)));
            return if fits { Verdict::Good } else { Verdict::Bad };
        }
        let block_bytes = self.block_bytes();
        let (mut good, mut all) = (0, 0);
        for block in from / block_bytes..to.div_ceil(block_bytes) {
            all += 1;
            let Some(bytes) = buffer.get_mut(..block_bytes as usize) else { continue };
            let landed = device.read(pointer.offset + u64::from(block) * u64::from(block_bytes), bytes).is_ok();
            let checksum = data.checksums.get(block as usize);
            good += u32::from(landed && checksum == Some(&data.checksum_kind.compute(bytes)));
        }
        match good {
            0 => Verdict::Bad,
            good if good == all => Verdict::Good,
            _ => Verdict::Partly,
        }
    }

    /// Two extents claim one place: it stays with the one whose checksums fit what is there; if that says nothing, with the one that the
    /// backpointer names, else with the other.
    pub(super) fn shared_space(&mut self, position: Position, other: Position) -> Result<()> {
        let (Some(ExtentValue::Data(first)), Some(ExtentValue::Data(second))) =
            (self.sound_extent(other)?, self.sound_extent(position)?)
        else {
            return Ok(());
        };
        let (Some(at), Some(second_at)) = (first.pointers.first().copied(), second.pointers.first().copied()) else {
            return Ok(());
        };
        let start = at.offset.max(second_at.offset);
        let end = (at.offset + u64::from(first.disk_bytes)).min(second_at.offset + u64::from(second.disk_bytes));
        if at.device != second_at.device || start >= end {
            // A backpointer says that one of them is longer than it is.
            self.correct_backpointer(other, &first)?;
            return self.correct_backpointer(position, &second);
        }
        let verdicts = [self.verify_place(&first, start, end), self.verify_place(&second, start, end)];
        let [keeps_first, keeps_second] = match verdicts {
            [Verdict::Good, Verdict::Good] | [Verdict::Unknown, Verdict::Unknown] => {
                let is_second = self.backpointer_names(position, &second)?;
                [!is_second, is_second]
            }
            [Verdict::Good, _] => [true, false],
            [_, Verdict::Good] => [false, true],
            [Verdict::Unknown, _] => [true, false],
            [_, Verdict::Unknown] => [false, true],
            _ => [false, false],
        };
        if !keeps_first {
            self.lose_place(other, &first, start, end)?;
        }
        if !keeps_second {
            self.lose_place(position, &second, start, end)?;
        }
        Ok(())
    }

    fn verify_place(&self, data: &DataExtent, start: u64, end: u64) -> Verdict {
        let (from, to) = within(data, start, end);
        self.verify(data, from, to)
    }

    /// Where the backpointer of an extent's first copy names it, and says something else of it, that is corrected.
    fn correct_backpointer(&mut self, position: Position, data: &DataExtent) -> Result<()> {
        if !self.backpointer_names(position, data)? {
            return Ok(());
        }
        let Some(pointer) = data.pointers.first() else { return Ok(()) };
        let place = crate::passes::backpointer_place(self.filesystem.superblock(), position, data, pointer);
        let right = Backpointer { btree: BtreeId::Extents, disk_bytes: data.disk_bytes, position };
        self.transaction.put(BtreeId::Backpointers, place, right.encode());
        Ok(())
    }

    /// Whether the backpointer where an extent's data lies names it.
    fn backpointer_names(&mut self, position: Position, data: &DataExtent) -> Result<bool> {
        let superblock = self.filesystem.superblock();
        let Some(pointer) = data.pointers.first() else { return Ok(false) };
        let place = crate::passes::backpointer_place(superblock, position, data, pointer);
        let stored = self.transaction.get(BtreeId::Backpointers, place)?;
        Ok(stored.and_then(|value| Backpointer::decode(&value).ok()).is_some_and(|found| found.position == position))
    }

    /// The bytes `[start, end)` of the device are not an extent's own: what it has there is lost, of a compressed one all.
    fn lose_place(&mut self, position: Position, data: &DataExtent, start: u64, end: u64) -> Result<()> {
        if data.compression != CompressionKind::None {
            return self.lose(position, Some(data.length.into()));
        }
        let (from, to) = within(data, start, end);
        let block_bytes = self.block_bytes();
        let (from, to) = (round_down(from.into(), block_bytes.into()), round_up(to.into(), block_bytes.into()));
        let length = u64::from(data.length);
        let Some(first) = position.offset.checked_sub(length) else { return Ok(()) };
        let value = ExtentValue::Data(data.clone());
        self.transaction.delete(BtreeId::Extents, position);
        if from > 0 {
            self.put_extent(position, first + from, &part(&value, 0, from, block_bytes)?);
        }
        if to < length {
            self.put_extent(position, position.offset, &part(&value, to, length, block_bytes)?);
        }
        self.mark_lost(position, first + from, first + to.min(length));
        Ok(())
    }

    /// The file is gone: it is made anew. What cannot be the data of a file is given up.
    pub(super) fn ownerless_extent(&mut self, position: Position) -> Result<()> {
        let can_be = position.inode > InodeNumber::ROOT.0 && position.offset <= i64::MAX as u64;
        match self.inode(position.inode)? {
            Some(inode) if has_data(&inode) => Ok(()),
            None if can_be => {
                self.make_inode(position.inode)?;
                // It has entries: then this is not its.
                let made = self.inode(position.inode)?;
                if made.is_some_and(|inode| inode.file_type() == Some(FileType::Directory)) {
                    self.give_up(position)?;
                }
                Ok(())
            }
            _ => self.give_up(position),
        }
    }

    fn give_up(&mut self, position: Position) -> Result<()> {
        let length = self.extent(position)?.map_or(0, |extent| extent.length());
        self.transaction.delete(BtreeId::Extents, position);
        let start = position.offset.saturating_sub(length);
        self.losses.push(Loss { inode: position.inode, start, end: position.offset });
        Ok(())
    }
}

/// Whether there are bytes that somebody wrote.
fn has_bytes(value: &ExtentValue) -> bool {
    matches!(value, ExtentValue::Data(_) | ExtentValue::Inline(_))
}

/// The bytes `[start, end)` of the device in a raw extent's own.
fn within(data: &DataExtent, start: u64, end: u64) -> (u32, u32) {
    let first = data.pointers.first().map_or(0, |pointer| pointer.offset);
    let narrow = |at: u64| u32::try_from(at.saturating_sub(first)).unwrap_or(u32::MAX).min(data.disk_bytes);
    (narrow(start), narrow(end))
}
