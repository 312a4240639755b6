//! Changes of ranges that write no file data: truncating, allocating, dropping the extents of a deleted inode. (Holes, collapse and insert are in
//! [`super::logged`].)
//!
//! Each works in transactions of bounded size. Allocating may stop half-way in a crash, as the ranges it changes are independent
//! blocks. Truncation is whole: its first transaction sets the size, makes the tail of the last block zeros (invariant 1 of [`super`]), and, if
//! extents are left beyond, names the rest of the work in the logged-operations tree:
//!
//! ```text
//! size set, tail zeroed, first extents dropped, LoggedOperation put -> more extents dropped ... -> last ones dropped, LoggedOperation removed
//!      |                                                                |
//!      +------------------- crash: at mount, resume_logged_operation ---+
//! ```
//!
//! Truncation and deletion work on a full filesystem: they commit at the reclaim watermark, and the one block that a truncation writes is taken
//! from copygc's reserve.

use super::extents::{Overwritten, overwrite, part, signed};
use super::read::ReadPiece;
use super::write::{WriteCommit, WriteRun};
use super::{Change, Data};
use crate::alloc::{Allocation, Watermark, WritePoint};
use crate::device::WriteRequest;
use crate::error::{Error, Result};
use crate::format::extent::ExtentValue;
use crate::format::namespace::{Inode, LoggedOperation};
use crate::format::{BtreeId, ChecksumKind, Position, Value};
use crate::memory::AlignedBuffer;
use crate::space::{SpaceReservation, stamp};
use crate::transaction::{CommitOptions, Transaction};
use crate::units::{InodeNumber, JournalSequence};

/// Bytes of one unwritten extent at most: far below what its length field holds.
pub(super) const UNWRITTEN_BYTES_MAX: u64 = 1 << 30;

/// How often the last block may change under a truncation before that is taken for a bug.
const ATTEMPTS_MAX: u32 = 64;

/// The new last block of a truncated file, written, to be committed if the old one is still what it was made from.
struct Tail {
    position: Position,
    old: Value,
    allocation: Allocation,
    value: ExtentValue,
    _reservation: SpaceReservation,
}

/// What [`Data::prepare_truncation`] has made ready: all of a truncation that may lack space or meet a bad block.
#[must_use]
pub struct PreparedTruncation(Option<Tail>);

/// What a truncation's first transaction came to.
enum Truncated {
    Done(Inode),
    /// Extents are left from this offset on.
    More(Inode, u64),
    /// The last block is not what the new tail was made from.
    TailChanged,
}

pub(super) fn logged_position(inode: InodeNumber) -> Position {
    Position::new(0, inode.0, 0)
}

impl Data {
    pub(super) fn check_blocks(&self, start: u64, end: u64) -> Result<()> {
        let block = u64::from(self.shape.block_bytes);
        if start > end || !start.is_multiple_of(block) || !(end.is_multiple_of(block) || end == u64::MAX) {
            return Err(Error::Invalid(format!("the range {start}..{end} is not whole blocks of {block}")));
        }
        Ok(())
    }

    /// Sets the file's size. Shorter: extents beyond are dropped, and the rest of the last block becomes zeros. Longer: the new part is a hole.
    /// The caller excludes writes to the inode (block lock), and has dropped what is cached beyond the new size. `update_inode` sees the inode with its new
    /// size.
    ///
    /// Returns when the extents are gone; if the host crashes before, the size is as its first transaction set it, and the mount drops the
    /// rest.
    ///
    /// # Errors
    /// The device's or the journal's.
    pub fn truncate(&self, inode: InodeNumber, size: u64, update_inode: &dyn Fn(&mut Inode)) -> Result<Change> {
        let prepared = self.prepare_truncation(inode, size)?;
        self.truncate_prepared(inode, size, prepared, update_inode)
    }

    /// Reads the block that will be the last one, and writes what it will be to fresh space. Before the caller drops anything: what can fail for
    /// want of space, or at a bad block, has then changed nothing.
    ///
    /// # Errors
    /// The device's; [`Error::NoSpace`].
    pub fn prepare_truncation(&self, inode: InodeNumber, size: u64) -> Result<PreparedTruncation> {
        self.transactions.wait_for_room(CommitOptions::reclaim())?;
        self.prepare_tail(inode, size).map(PreparedTruncation)
    }

    /// [`Self::truncate`] with what was prepared for it.
    ///
    /// # Errors
    /// The device's or the journal's.
    pub fn truncate_prepared(
        &self,
        inode: InodeNumber,
        size: u64,
        prepared: PreparedTruncation,
        update_inode: &dyn Fn(&mut Inode),
    ) -> Result<Change> {
        let mut prepared = Some(prepared.0);
        for _ in 0..ATTEMPTS_MAX {
            let tail = match prepared.take() {
                Some(tail) => tail,
                None => self.prepare_tail(inode, size)?,
            };
            let options = CommitOptions { data_needs_flush: tail.is_some(), ..CommitOptions::reclaim() };
            let committed = self.transactions.run(options, |transaction| {
                let Some(stored) = self.inode(transaction, inode)? else { return Ok(None) };
                self.truncate_first(transaction, inode, stored, size, tail.as_ref(), update_inode).map(Some)
            })?;
            let sequence = committed.sequence;
            match committed.value {
                None => return Ok(Change { sequence, inode: None }),
                Some(Truncated::Done(stored)) => return Ok(Change { sequence, inode: Some(stored) }),
                Some(Truncated::More(stored, from)) => {
                    drop(tail);
                    let rest =
                        self.finish_truncate(inode, from).map_err(|error| self.stopped_half_way(inode, error))?;
                    return Ok(Change {
                        sequence: sequence.max(rest.sequence),
                        inode: Some(rest.inode.unwrap_or(stored)),
                    });
                }
                Some(Truncated::TailChanged) => {}
            }
        }
        Err(Error::Bug(format!("the last block of inode {inode} changed under a truncation {ATTEMPTS_MAX} times")))
    }

    /// If the block that will hold the end has data in a bucket: its copy with zeros from `size` on, written to fresh space.
    fn prepare_tail(&self, inode: InodeNumber, size: u64) -> Result<Option<Tail>> {
        let block = self.shape.block_bytes;
        let start = self.shape.block_floor(size);
        if start == size {
            return Ok(None);
        }
        let (position, old) = {
            let mut transaction = self.transactions.read();
            if self.inode(&mut transaction, inode)?.is_none_or(|stored| stored.size <= size) {
                return Ok(None);
            }
            match self.view().next(&mut transaction, inode, size)? {
                Some((position, old, extent))
                    if extent.start() <= start && matches!(extent.value, ExtentValue::Data(_)) =>
                {
                    (position, old)
                }
                _ => return Ok(None),
            }
        };
        let mut bytes = AlignedBuffer::try_zeroed(block as usize)?;
        let mut outcome = Ok(());
        self.read(inode, &mut [ReadPiece { offset: start, buffer: &mut bytes }], &mut |_, result| outcome = result);
        match outcome {
            Ok(()) => {}
            // A damaged block stays damaged: nothing of it will ever be shown.
            Err(Error::Corrupt(_)) => return Ok(None),
            Err(error) => return Err(error),
        }
        let kept = usize::try_from(size - start).unwrap_or(usize::MAX).min(bytes.len());
        let (_, behind) = bytes.split_at_mut(kept);
        if behind.iter().all(|&byte| byte == 0) {
            return Ok(None);
        }
        behind.fill(0);
        let reservation = self.space.reserve_privileged(u64::from(block));
        let allocation = self.space.allocate(WritePoint::CopyGc, block, Watermark::CopyGc)?;
        let checksums = match self.options.checksum {
            ChecksumKind::None => Vec::new(),
            kind => vec![kind.compute(&bytes)],
        };
        let value = self.raw_extent(&allocation, u64::from(block), checksums);
        let request = WriteRequest { offset: allocation.offset, data: vec![bytes.as_slice()] };
        self.write_to_devices(vec![(allocation.device, request)])?;
        Ok(Some(Tail { position, old, allocation, value, _reservation: reservation }))
    }

    fn truncate_first(
        &self,
        transaction: &mut Transaction<'_>,
        inode: InodeNumber,
        mut stored: Inode,
        size: u64,
        tail: Option<&Tail>,
        update_inode: &dyn Fn(&mut Inode),
    ) -> Result<Truncated> {
        let mut left_from = None;
        let mut allocated_delta = 0;
        if size < stored.size {
            let Some(delta) = self.truncate_last_block(transaction, inode, size, tail)? else {
                return Ok(Truncated::TailChanged);
            };
            let from = self.shape.block_ceiling(size);
            let done = overwrite(transaction, &self.view(), inode, from, u64::MAX, None, self.keys_max)?;
            allocated_delta = delta + done.allocated_delta;
            if done.covered_to < u64::MAX {
                left_from = Some(done.covered_to);
                let operation = LoggedOperation::Truncate { inode: inode.0, size };
                transaction.put(BtreeId::LoggedOperations, logged_position(inode), operation.encode()?);
            }
        }
        stored.size = size;
        self.put_inode(transaction, inode, &mut stored, allocated_delta, update_inode)?;
        Ok(match left_from {
            None => Truncated::Done(stored),
            Some(from) => Truncated::More(stored, from),
        })
    }

    /// Makes the bytes from `size` to the end of its block zeros. Returns the change of the allocated bytes, or `None` if `tail` was made from something
    /// else than what is there.
    fn truncate_last_block(
        &self,
        transaction: &mut Transaction<'_>,
        inode: InodeNumber,
        size: u64,
        tail: Option<&Tail>,
    ) -> Result<Option<i64>> {
        let (start, end) = (self.shape.block_floor(size), self.shape.block_ceiling(size));
        if start == end {
            return Ok(Some(0));
        }
        let (position, value, extent) = match self.view().next(transaction, inode, start)? {
            Some(found) if found.2.start() <= start => found,
            _ => return Ok(Some(0)),
        };
        match (&extent.value, tail) {
            (ExtentValue::Inline(_), _) if extent.end > size => {
                let shorter = part(&extent.value, 0, size, self.shape.block_bytes)?;
                transaction.delete(BtreeId::Extents, position);
                transaction.put(BtreeId::Extents, self.view().position(inode, size), shorter.encode());
                Ok(Some(signed(size) - signed(extent.end)))
            }
            (ExtentValue::Data(_), Some(tail)) => {
                if tail.position != position || tail.old != value {
                    return Ok(None);
                }
                let mut new = tail.value.clone();
                stamp(transaction, &tail.allocation, &mut new);
                let done = overwrite(transaction, &self.view(), inode, start, end, Some(&new), self.keys_max)?;
                Ok(Some(done.allocated_delta))
            }
            // Data without a new tail: its bytes behind the end are zeros already, or damaged.
            _ => Ok(Some(0)),
        }
    }

    /// Drops what is left from `from` on, and then the promise to do so.
    pub(super) fn finish_truncate(&self, inode: InodeNumber, mut from: u64) -> Result<Change> {
        let mut change = Change { sequence: JournalSequence(0), inode: None };
        while from < u64::MAX {
            let committed = self.transactions.run(CommitOptions::reclaim(), |transaction| {
                let (done, stored) = self.drop_extents(transaction, inode, from, self.keys_max)?;
                if done.covered_to == u64::MAX {
                    transaction.delete(BtreeId::LoggedOperations, logged_position(inode));
                }
                Ok((done.covered_to, stored))
            })?;
            let (covered_to, stored) = committed.value;
            from = covered_to;
            change = Change { sequence: change.sequence.max(committed.sequence), inode: stored };
        }
        Ok(change)
    }

    /// Stages the end of all extents from `from` on, at most `keys_max` of them, and the inode's new sum if it is there.
    fn drop_extents(
        &self,
        transaction: &mut Transaction<'_>,
        inode: InodeNumber,
        from: u64,
        keys_max: usize,
    ) -> Result<(Overwritten, Option<Inode>)> {
        let stored = self.inode(transaction, inode)?;
        let done = overwrite(transaction, &self.view(), inode, from, u64::MAX, None, keys_max)?;
        let stored = match stored {
            Some(mut stored) if done.allocated_delta != 0 => {
                self.put_inode(transaction, inode, &mut stored, done.allocated_delta, &|_| {})?;
                Some(stored)
            }
            stored => stored,
        };
        Ok((done, stored))
    }

    /// Drops extents of an inode from `from` (whole blocks) on, in one transaction, at most `budget` of them. Returns whether there are more. For
    /// inodes that are being deleted; works whether or not the inode's key is still there.
    ///
    /// # Errors
    /// The device's or the journal's, or damage.
    pub fn delete_extents_step(&self, inode: InodeNumber, from: u64, budget: usize) -> Result<bool> {
        self.check_blocks(from, u64::MAX)?;
        let keys_max = self.keys_max.min(budget.max(1));
        let committed = self.transactions.run(CommitOptions::reclaim(), |transaction| {
            let (done, _) = self.drop_extents(transaction, inode, from, keys_max)?;
            if done.covered_to == u64::MAX {
                // A truncation that was under way has nothing left to do.
                let position = logged_position(inode);
                if transaction.get(BtreeId::LoggedOperations, position)?.is_some() {
                    transaction.delete(BtreeId::LoggedOperations, position);
                }
            }
            Ok(done.covered_to < u64::MAX)
        })?;
        Ok(committed.value)
    }

    /// Holds space for the holes of `[start, end)`, rounded out to blocks: unwritten extents, which read as zeros. What is there stays. The reservation covers
    /// the whole range at most; what was not needed of it is given back. The size is for `update_inode` to change, which the last transaction calls: what
    /// fails before that leaves the size as it was.
    ///
    /// # Errors
    /// The device's or the journal's. Some of the range may be allocated then.
    pub fn allocate(
        &self,
        inode: InodeNumber,
        start: u64,
        end: u64,
        reservation: SpaceReservation,
        update_inode: &dyn Fn(&mut Inode),
    ) -> Result<Change> {
        let (start, end) = (self.shape.block_floor(start), self.shape.block_ceiling(end));
        let mut change = Change { sequence: JournalSequence(0), inode: None };
        if start == 0 && start < end {
            change.sequence = self.expand_inline(inode)?;
        }
        let mut cursor = start;
        while cursor < end {
            let committed = self.transactions.run(CommitOptions::default(), |transaction| {
                let Some(mut stored) = self.inode(transaction, inode)? else { return Ok(None) };
                let (covered_to, delta) = self.fill_holes(transaction, inode, cursor, end)?;
                let update = if covered_to < end { &|_: &mut Inode| {} } else { update_inode };
                self.put_inode(transaction, inode, &mut stored, delta, update)?;
                Ok(Some((covered_to, stored)))
            })?;
            let Some((covered_to, stored)) = committed.value else {
                return Ok(Change { sequence: change.sequence, inode: None });
            };
            cursor = covered_to;
            change = Change { sequence: change.sequence.max(committed.sequence), inode: Some(stored) };
        }
        drop(reservation);
        Ok(change)
    }

    /// Turns inline data into a block, so that space is held for it too.
    pub(super) fn expand_inline(&self, inode: InodeNumber) -> Result<JournalSequence> {
        let (bytes, size) = {
            let mut transaction = self.transactions.read();
            let Some(stored) = self.inode(&mut transaction, inode)? else { return Ok(JournalSequence(0)) };
            match self.view().next(&mut transaction, inode, 0)? {
                Some((_, _, extent)) => match extent.value {
                    ExtentValue::Inline(bytes) => (bytes, stored.size),
                    _ => return Ok(JournalSequence(0)),
                },
                None => return Ok(JournalSequence(0)),
            }
        };
        let run = WriteRun { offset: 0, data: vec![bytes.as_slice()] };
        // Bytes between the inline data and the size are zeros.
        let padded;
        let run = if (bytes.len() as u64) < size {
            let mut whole = bytes.clone();
            whole.resize(self.shape.block_bytes as usize, 0);
            padded = whole;
            WriteRun { offset: 0, data: vec![padded.as_slice()] }
        } else {
            run
        };
        let commit = WriteCommit { size_limit: &|| size, update_inode: &|_| {} };
        let change = self.write_blocks(inode, &[run], size, WritePoint::User(inode.0), Watermark::Normal, commit)?;
        Ok(change.sequence)
    }

    /// Stages unwritten extents for the holes from `cursor` on. Returns how far it came and the change of the allocated bytes.
    fn fill_holes(
        &self,
        transaction: &mut Transaction<'_>,
        inode: InodeNumber,
        cursor: u64,
        end: u64,
    ) -> Result<(u64, i64)> {
        let (mut at, mut delta, mut seen) = (cursor, 0, 0);
        while at < end && seen < self.keys_max {
            seen += 1;
            let next = self.view().next(transaction, inode, at)?.map(|(_, _, extent)| extent);
            let hole_end = next.as_ref().map_or(end, |extent| extent.start().min(end));
            if hole_end > at {
                let length = (hole_end - at).min(UNWRITTEN_BYTES_MAX);
                let value = ExtentValue::Unwritten { length: u32::try_from(length).unwrap_or(u32::MAX) };
                at += length;
                delta += signed(length);
                transaction.put(BtreeId::Extents, self.view().position(inode, at), value.encode());
            } else if let Some(extent) = next {
                at = self.shape.block_ceiling(extent.end);
            }
        }
        Ok((at.min(end), delta))
    }

    /// Bytes of `[start, end)` whose space fallocate holds already: a write there needs no new promise of space.
    ///
    /// # Errors
    /// The device's, or damage.
    pub fn unwritten_bytes(&self, inode: InodeNumber, start: u64, end: u64) -> Result<u64> {
        let mut transaction = self.transactions.read();
        let (mut at, mut sum) = (start, 0);
        while at < end {
            let Some((_, _, extent)) = self.view().next(&mut transaction, inode, at)? else { break };
            if extent.start() >= end {
                break;
            }
            if let ExtentValue::Unwritten { .. } = extent.value {
                sum += extent.end.min(end) - extent.start().max(at);
            }
            at = extent.end;
        }
        Ok(sum)
    }
}
