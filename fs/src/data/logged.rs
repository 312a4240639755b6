//! Changes of ranges that are whole, however long they are: holes and zeros with their edges, collapse, insert.
//!
//! An operation that one transaction cannot finish is a [`LoggedOperation`], which says where the work goes on. Its first transaction does what
//! is decided once (size, times, the blocks at the edges), as much of the rest as fits, and names the remainder in the logged-operations
//! tree; each further one moves the cursor; the last removes the key:
//!
//! ```text
//! edges, size, first extents, LoggedOperation put -> more extents, cursor moved ... -> last extents, LoggedOperation removed
//!      |                                                          |
//!      +---------------- crash: at mount, before any inode is used, resume_logged_operation ---+
//! ```
//!
//! So after a crash all of it is there or nothing. While it runs, the caller's block lock keeps everybody from the range. Extents that move keep
//! their place on disk and their checksums; only keys change. Locks: those of the layers below, inside of their calls.

use std::ops::Range;

use super::extents::{Extent, allocated_bytes, overwrite, part, signed};
use super::range::{UNWRITTEN_BYTES_MAX, logged_position};
use super::write::{PreparedWrite, WriteRun, stored_value_bytes};
use super::{Change, Data};
use crate::alloc::{Watermark, WritePoint};
use crate::error::{Corruption, Error, Result};
use crate::format::extent::ExtentValue;
use crate::format::namespace::{Inode, LoggedOperation};
use crate::format::{BtreeId, Position};
use crate::space::stamp;
use crate::transaction::{CommitOptions, Transaction};
use crate::units::{InodeNumber, JournalSequence};

/// Largest size of a file.
const FILE_BYTES_MAX: u64 = i64::MAX as u64;
/// How often the few blocks at the edges of a range are placed before that is refused.
const EDGE_ATTEMPTS: u32 = 16;

/// What a range becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeFill {
    /// A hole.
    Hole,
    /// Zeros whose space is held.
    Unwritten,
}

impl Data {
    /// Puts whole blocks into fresh space for a change that must work on a full filesystem: from the reserve that copygc has. See
    /// [`Self::replace_range`].
    ///
    /// # Errors
    /// The device's.
    pub fn prepare_edges(&self, blocks: &[WriteRun<'_>]) -> Result<PreparedWrite> {
        if blocks.is_empty() {
            return Ok(PreparedWrite::empty());
        }
        for _ in 0..EDGE_ATTEMPTS {
            // Where a bucket ends between two of them, the next attempt begins in a new one.
            let prepared = self.prepare(blocks, u64::MAX, WritePoint::CopyGc, Watermark::CopyGc)?;
            if prepared.covered_to() == u64::MAX {
                return Ok(prepared);
            }
        }
        Err(Error::NoSpace("no space for the blocks at the edges of a range"))
    }

    /// Makes `[start, end)`, whole blocks, a hole; across a crash, all of it or nothing. See [`Self::replace_range`].
    ///
    /// # Errors
    /// The device's or the journal's, [`Error::Invalid`] for a range that is not whole blocks.
    pub fn punch(&self, inode: InodeNumber, start: u64, end: u64, update_inode: &dyn Fn(&mut Inode)) -> Result<Change> {
        self.replace_range(inode, &PreparedWrite::empty(), start..end, RangeFill::Hole, update_inode)
    }

    /// Makes `range`, whole blocks, zeros, and gives the blocks of `edges`, which lie outside of it, their new content: across a crash, all of
    /// it or nothing. `range` may lie beyond the end of the file, whose size is for `update_inode` to change. The caller excludes changes of all these
    /// blocks (block lock), has dropped what is cached of them, and has reserved what [`RangeFill::Unwritten`] holds.
    ///
    /// # Errors
    /// The device's or the journal's, [`Error::Invalid`] for a range that is not whole blocks.
    pub fn replace_range(
        &self,
        inode: InodeNumber,
        edges: &PreparedWrite,
        range: Range<u64>,
        fill: RangeFill,
        update_inode: &dyn Fn(&mut Inode),
    ) -> Result<Change> {
        self.check_blocks(range.start, range.end)?;
        let operation = LoggedOperation::Replace {
            inode: inode.0,
            start: range.start,
            end: range.end,
            unwritten: fill == RangeFill::Unwritten,
        };
        let options = CommitOptions { data_needs_flush: !edges.placed.is_empty(), ..CommitOptions::reclaim() };
        let put_edges = |transaction: &mut Transaction<'_>, _: &mut Inode| {
            let mut delta = 0;
            for edge in &edges.placed {
                let mut value = edge.value.clone();
                stamp(transaction, &edge.allocation, &mut value);
                let end = edge.offset + value.length();
                let done = overwrite(transaction, &self.view(), inode, edge.offset, end, Some(&value), self.keys_max)?;
                if done.covered_to < end {
                    return Err(Error::Bug(format!("the edge block at {} covers too many extents", edge.offset)));
                }
                delta += done.allocated_delta;
            }
            Ok(delta)
        };
        self.start_operation(inode, &operation, options, &put_edges, update_inode)
    }

    /// Takes `[offset, offset + length)` out of the file: all behind it moves down, and the size shrinks by `length`. Across a crash, all of it or
    /// nothing. Everything that is dirty has been written back, the caller excludes all changes from `offset` on (block lock) and has dropped what is cached.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the range is not whole blocks, or reaches the end of the file; the device's or the journal's.
    pub fn collapse(
        &self,
        inode: InodeNumber,
        offset: u64,
        length: u64,
        update_inode: &dyn Fn(&mut Inode),
    ) -> Result<Change> {
        let end = offset.checked_add(length).ok_or_else(|| Error::Invalid("a range that is too long".into()))?;
        self.check_blocks(offset, end)?;
        let operation = LoggedOperation::Collapse { inode: inode.0, offset, length, cursor: offset };
        let shrink = |_: &mut Transaction<'_>, stored: &mut Inode| {
            if end >= stored.size {
                return Err(Error::Invalid(format!("collapsing {offset}..{end} of {} bytes", stored.size)));
            }
            stored.size -= length;
            Ok(0)
        };
        self.start_operation(inode, &operation, CommitOptions::reclaim(), &shrink, update_inode)
    }

    /// Makes a hole of `length` bytes at `offset`, inside the file: all behind it moves up, and the size grows. Otherwise as [`Self::collapse`].
    ///
    /// # Errors
    /// [`Error::Invalid`] if the range is not whole blocks or starts at the end of the file; the device's or the journal's.
    pub fn insert(
        &self,
        inode: InodeNumber,
        offset: u64,
        length: u64,
        update_inode: &dyn Fn(&mut Inode),
    ) -> Result<Change> {
        let end = offset.checked_add(length).ok_or_else(|| Error::Invalid("a range that is too long".into()))?;
        self.check_blocks(offset, end)?;
        if offset == 0 {
            // Inline data is always at the start of the file.
            self.expand_inline(inode)?;
        }
        // Unwritten extents may lie far behind the end of the file.
        let last = self.last_extent_end(inode)?;
        if last.checked_add(length).is_none() {
            return Err(Error::Invalid(format!("inserting {length} bytes before an extent that ends at {last}")));
        }
        let operation = LoggedOperation::Insert { inode: inode.0, offset, length, cursor: u64::MAX };
        let grow = |_: &mut Transaction<'_>, stored: &mut Inode| {
            if offset >= stored.size || stored.size.checked_add(length).is_none() {
                return Err(Error::Invalid(format!("inserting {length} bytes at {offset} of {}", stored.size)));
            }
            stored.size += length;
            Ok(0)
        };
        self.start_operation(inode, &operation, CommitOptions::reclaim(), &grow, update_inode)
    }

    fn last_extent_end(&self, inode: InodeNumber) -> Result<u64> {
        let (from, to) = (Position::new(inode.0, u64::MAX, u32::MAX), Position::new(inode.0, 0, 0));
        let last = self.transactions.read().previous(BtreeId::Extents, from, to)?;
        Ok(last.map_or(0, |(position, _)| position.offset))
    }

    /// Runs an operation from its first transaction, in which `first` does what is done once, to its last.
    fn start_operation(
        &self,
        inode: InodeNumber,
        operation: &LoggedOperation,
        options: CommitOptions,
        first: &dyn Fn(&mut Transaction<'_>, &mut Inode) -> Result<i64>,
        update_inode: &dyn Fn(&mut Inode),
    ) -> Result<Change> {
        let committed = self.transactions.run(options, |transaction| {
            let Some(mut stored) = self.inode(transaction, inode)? else { return Ok(None) };
            let once = first(transaction, &mut stored)?;
            let (rest, delta) = self.advance(transaction, operation)?;
            if let Some(rest) = &rest {
                transaction.put(BtreeId::LoggedOperations, logged_position(inode), rest.encode()?);
            }
            self.put_inode(transaction, inode, &mut stored, once + delta, update_inode)?;
            Ok(Some((rest, stored)))
        })?;
        let sequence = committed.sequence;
        match committed.value {
            None => Ok(Change { sequence, inode: None }),
            Some((None, stored)) => Ok(Change { sequence, inode: Some(stored) }),
            Some((Some(rest), _)) => {
                let done = self.finish_operation(rest).map_err(|error| self.stopped_half_way(inode, error))?;
                Ok(Change { sequence: sequence.max(done.sequence), inode: done.inode })
            }
        }
    }

    /// An operation has begun and does not come to its end. The next mount goes on with it, over whatever is done to the file until then: so nothing is
    /// changed any more.
    pub(super) fn stopped_half_way(&self, inode: InodeNumber, error: Error) -> Error {
        self.transactions.journal().latch(format!("a change of inode {inode} has stopped half-way: {error}"));
        error
    }

    /// Brings an operation that is named in the tree to its end.
    pub(super) fn finish_operation(&self, operation: LoggedOperation) -> Result<Change> {
        let inode = InodeNumber(operation.inode());
        let mut left = Some(operation);
        let mut change = Change { sequence: JournalSequence(0), inode: None };
        while let Some(operation) = left {
            #[cfg(test)]
            super::tests::seam::reach("range advanced");
            let committed = self.transactions.run(CommitOptions::reclaim(), |transaction| {
                let stored = self.inode(transaction, inode)?;
                let (rest, delta) = match &stored {
                    Some(_) => self.advance(transaction, &operation)?,
                    // Its extents are the deletion's to drop.
                    None => (None, 0),
                };
                match &rest {
                    Some(rest) => {
                        transaction.put(BtreeId::LoggedOperations, logged_position(inode), rest.encode()?);
                    }
                    None => transaction.delete(BtreeId::LoggedOperations, logged_position(inode)),
                }
                let Some(mut stored) = stored else { return Ok((rest, None)) };
                if delta != 0 {
                    self.put_inode(transaction, inode, &mut stored, delta, &|_| {})?;
                }
                Ok((rest, Some(stored)))
            })?;
            let (rest, stored) = committed.value;
            change = Change { sequence: change.sequence.max(committed.sequence), inode: stored };
            left = rest;
        }
        Ok(change)
    }

    /// Stages the next part of an operation. Returns what is left of it, and the change of the allocated bytes.
    fn advance(
        &self,
        transaction: &mut Transaction<'_>,
        operation: &LoggedOperation,
    ) -> Result<(Option<LoggedOperation>, i64)> {
        match *operation {
            LoggedOperation::Replace { inode, start, end, unwritten } => {
                let (cursor, delta) = self.advance_replace(transaction, InodeNumber(inode), start, end, unwritten)?;
                let rest = LoggedOperation::Replace { inode, start: cursor, end, unwritten };
                Ok(((cursor < end).then_some(rest), delta))
            }
            LoggedOperation::Collapse { inode, offset, length, cursor } => {
                let (left, delta) = self.advance_collapse(transaction, InodeNumber(inode), (offset, length), cursor)?;
                Ok((left.map(|cursor| LoggedOperation::Collapse { inode, offset, length, cursor }), delta))
            }
            LoggedOperation::Insert { inode, offset, length, cursor } => {
                let (left, delta) = self.advance_insert(transaction, InodeNumber(inode), (offset, length), cursor)?;
                Ok((left.map(|cursor| LoggedOperation::Insert { inode, offset, length, cursor }), delta))
            }
            LoggedOperation::Truncate { .. } => Err(Error::Bug("a truncation is not advanced here".into())),
        }
    }

    fn advance_replace(
        &self,
        transaction: &mut Transaction<'_>,
        inode: InodeNumber,
        start: u64,
        end: u64,
        unwritten: bool,
    ) -> Result<(u64, i64)> {
        if start >= end {
            return Ok((end, 0));
        }
        if !unwritten {
            let done = overwrite(transaction, &self.view(), inode, start, end, None, self.keys_max)?;
            return Ok((done.covered_to, done.allocated_delta));
        }
        let (mut cursor, mut delta) = (start, 0);
        while cursor < end && (cursor == start || transaction.update_count() < self.keys_max) {
            let piece_end = end.min(cursor.saturating_add(UNWRITTEN_BYTES_MAX));
            let length = u32::try_from(piece_end - cursor).unwrap_or(u32::MAX);
            let value = ExtentValue::Unwritten { length };
            let done = overwrite(transaction, &self.view(), inode, cursor, piece_end, Some(&value), self.keys_max)?;
            delta += done.allocated_delta;
            cursor = done.covered_to;
            if cursor < piece_end {
                break;
            }
        }
        Ok((cursor, delta))
    }

    /// Whether the transaction has room for another extent; it always has for the first.
    fn has_room(&self, transaction: &Transaction<'_>, moved: usize, value_bytes: usize) -> bool {
        moved == 0 || (transaction.update_count() < self.keys_max && value_bytes < self.value_bytes_max)
    }

    fn advance_collapse(
        &self,
        transaction: &mut Transaction<'_>,
        inode: InodeNumber,
        (offset, length): (u64, u64),
        mut cursor: u64,
    ) -> Result<(Option<u64>, i64)> {
        let (hole_end, mut delta) = (offset + length, 0);
        if cursor < hole_end {
            let done = overwrite(transaction, &self.view(), inode, cursor, hole_end, None, self.keys_max)?;
            delta = done.allocated_delta;
            cursor = done.covered_to;
            if cursor < hole_end {
                return Ok((Some(cursor), delta));
            }
        }
        let (mut moved, mut value_bytes) = (0, 0);
        loop {
            // What has moved ends at or below `cursor - length`: it is not met again.
            let Some((position, _, extent)) = self.view().next(transaction, inode, cursor)? else {
                return Ok((None, delta));
            };
            if !self.has_room(transaction, moved, value_bytes) {
                return Ok((Some(cursor), delta));
            }
            self.check_own(position)?;
            transaction.delete(BtreeId::Extents, position);
            let target = self.view().position(inode, extent.end - length);
            transaction.put(BtreeId::Extents, target, extent.value.encode());
            cursor = extent.end;
            moved += 1;
            value_bytes += stored_value_bytes(&extent.value);
        }
    }

    fn advance_insert(
        &self,
        transaction: &mut Transaction<'_>,
        inode: InodeNumber,
        (offset, length): (u64, u64),
        mut cursor: u64,
    ) -> Result<(Option<u64>, i64)> {
        let (mut moved, mut value_bytes, mut delta) = (0, 0, 0);
        let to = Position::new(inode.0, offset + 1, 0);
        while cursor > offset {
            let from = Position::new(inode.0, cursor, u32::MAX);
            let Some((position, value)) = transaction.previous(BtreeId::Extents, from, to)? else { break };
            if !self.has_room(transaction, moved, value_bytes) {
                return Ok((Some(cursor), delta));
            }
            self.check_own(position)?;
            let extent = self.shape.decode(position, &value)?;
            cursor = extent.start().max(offset);
            transaction.delete(BtreeId::Extents, position);
            let back = self.keep_front(transaction, inode, &extent, offset, &mut delta)?;
            let target = extent
                .end
                .checked_add(length)
                .ok_or_else(|| Error::corrupt(format!("extent {position}"), "it ends too far behind to be moved"))?;
            value_bytes += stored_value_bytes(&back);
            transaction.put(BtreeId::Extents, self.view().position(inode, target), back.encode());
            moved += 1;
        }
        Ok((None, delta))
    }

    /// Stages what of the extent lies before `offset`, and returns the rest of it.
    fn keep_front(
        &self,
        transaction: &mut Transaction<'_>,
        inode: InodeNumber,
        extent: &Extent,
        offset: u64,
        delta: &mut i64,
    ) -> Result<ExtentValue> {
        let start = extent.start();
        if start >= offset {
            return Ok(extent.value.clone());
        }
        let front = part(&extent.value, 0, offset - start, self.shape.block_bytes)?;
        let back = part(&extent.value, offset - start, extent.value.length(), self.shape.block_bytes)?;
        *delta += signed(allocated_bytes(&front)) + signed(allocated_bytes(&back));
        *delta -= signed(allocated_bytes(&extent.value));
        transaction.put(BtreeId::Extents, self.view().position(inode, offset), front.encode());
        Ok(back)
    }

    fn check_own(&self, position: Position) -> Result<()> {
        if position.snapshot == self.snapshot.0 {
            return Ok(());
        }
        Err(Corruption::new(format!("extent {position}"), "it belongs to a snapshot that does not exist").into())
    }

    /// Finishes one operation that a crash interrupted. Returns whether there was one: the mount calls it until there is none, before any inode is used.
    ///
    /// # Errors
    /// The device's or the journal's, or damage.
    pub fn resume_logged_operation(&self) -> Result<bool> {
        let Some(operation) = self.next_logged_operation()? else { return Ok(false) };
        let inode = InodeNumber(operation.inode());
        match operation {
            LoggedOperation::Truncate { size, .. } => self.finish_truncate(inode, self.shape.block_ceiling(size))?,
            operation => self.finish_operation(operation)?,
        };
        Ok(true)
    }

    /// The first operation that a crash interrupted.
    ///
    /// # Errors
    /// The device's, or damage.
    pub fn next_logged_operation(&self) -> Result<Option<LoggedOperation>> {
        let first = Position::new(0, 0, 0);
        let last = Position::new(0, u64::MAX, u32::MAX);
        let found = self.transactions.read().next(BtreeId::LoggedOperations, first, last)?;
        let Some((position, value)) = found else { return Ok(None) };
        let operation = LoggedOperation::decode(&value)?;
        match self.operation_problem(position, &operation) {
            Some(problem) => Err(Error::corrupt(format!("logged operation {position}"), problem)),
            None => Ok(Some(operation)),
        }
    }

    /// Why an operation cannot have been logged at a position, if it cannot: whoever went on with it would do harm, or would not come to an end.
    #[must_use]
    pub fn operation_problem(&self, position: Position, operation: &LoggedOperation) -> Option<String> {
        let inode = InodeNumber(operation.inode());
        if position != logged_position(inode) || !(InodeNumber::ROOT..=InodeNumber::MAX).contains(&inode) {
            return Some(format!("it is about inode {inode}"));
        }
        let is_range = |start: u64, end: u64| self.check_blocks(start, end).is_ok();
        let device_bytes: u64 = self.shape.device_bytes.iter().sum();
        let is_possible = match *operation {
            LoggedOperation::Truncate { size, .. } => size <= FILE_BYTES_MAX,
            // Space that is held is on the devices.
            LoggedOperation::Replace { start, end, unwritten, .. } => {
                is_range(start, end) && (!unwritten || end - start <= device_bytes)
            }
            LoggedOperation::Collapse { offset, length, cursor, .. } => {
                offset.checked_add(length).is_some_and(|end| is_range(offset, end)) && cursor >= offset
            }
            LoggedOperation::Insert { offset, length, .. } => {
                offset.checked_add(length).is_some_and(|end| is_range(offset, end) && end <= FILE_BYTES_MAX)
            }
        };
        (!is_possible).then(|| format!("{operation:?} cannot be"))
    }
}
