//! Changes of ranges under **block**: punch hole, zero range, collapse range, insert range.
//!
//! ```text
//! inode lock, exclusive -> what must be in the tree first is written back
//!   -> edge blocks, with their part of the range zeroed, go to fresh space       (still nothing has changed: an error loses nothing)
//!   -> block -> drop the cached blocks inside, hold those of the edges -> one transaction, or a logged operation -> block given back
//! ```
//!
//! So a fill sees the extents from before or from after, and a crash does too: a hole's edges are in the transaction that makes the hole.

use std::ops::Range;

use rustix::io::Errno;

use super::Vfs;
use super::file::FILE_BYTES_MAX;
use super::inode::{FilePages, VfsInode};
use super::types::SetAttributes;
use crate::data::{Change, PreparedWrite, RangeFill, WriteRun};
use crate::error::{Error, Result};
use crate::format::namespace::Inode;
use crate::memory::AlignedBuffer;
use crate::pagecache::{self, CopySink, Dropped, ReadContext};
use crate::space::SpaceReservation;
use crate::sync::Arc;
use crate::units::{round_down, round_up};

/// A block with its new content.
struct EdgeBlock {
    offset: u64,
    bytes: AlignedBuffer,
}

/// New content of blocks that a range covers in part, in fresh space.
struct Edges {
    prepared: PreparedWrite,
    _reservation: SpaceReservation,
}

impl Vfs {
    /// Takes `length` bytes at `offset` out of the file: what lies behind moves down. Both are whole blocks, and the range ends before the end of the
    /// file. Atomic across a crash.
    ///
    /// # Errors
    /// `EINVAL` for a range that is not so, `EPERM`, `EROFS`, `EBADF`.
    pub fn collapse_range(&self, node: u64, handle: u64, offset: u64, length: u64) -> Result<()> {
        self.check_writable()?;
        let handle = self.file_handle(node, handle)?;
        self.collapse_inode(&handle.inode, offset, length, None)
    }

    /// Makes a hole of `length` bytes at `offset`: what lies there and behind moves up. Both are whole blocks, and `offset` lies before the end of the
    /// file. Atomic across a crash.
    ///
    /// # Errors
    /// `EINVAL` for a range that is not so, `EFBIG`, `EPERM`, `EROFS`, `EBADF`.
    pub fn insert_range(&self, node: u64, handle: u64, offset: u64, length: u64) -> Result<()> {
        self.check_writable()?;
        let handle = self.file_handle(node, handle)?;
        self.insert_inode(&handle.inode, offset, length, None)
    }

    /// `size_expected`: the size that the caller believes in; another one is `EAGAIN`.
    pub(super) fn collapse_inode(
        &self,
        inode: &Arc<VfsInode>,
        offset: u64,
        length: u64,
        size_expected: Option<u64>,
    ) -> Result<()> {
        let file = Self::file_of(inode)?;
        let lock = inode.lock.write();
        self.check_shift(inode, file, offset, length, size_expected)?;
        if offset.checked_add(length).is_none_or(|end| end >= inode.size()) {
            return Err(Errno::INVAL.into());
        }
        self.shift(inode, file, offset, &|update| self.data.collapse(inode.number, offset, length, update))?;
        drop(lock);
        if self.is_synchronous() { self.make_durable(inode, true) } else { Ok(()) }
    }

    /// As [`Self::collapse_inode`].
    pub(super) fn insert_inode(
        &self,
        inode: &Arc<VfsInode>,
        offset: u64,
        length: u64,
        size_expected: Option<u64>,
    ) -> Result<()> {
        let file = Self::file_of(inode)?;
        let lock = inode.lock.write();
        self.check_shift(inode, file, offset, length, size_expected)?;
        if offset >= inode.size() {
            return Err(Errno::INVAL.into());
        }
        if inode.size().checked_add(length).is_none_or(|size| size > FILE_BYTES_MAX) {
            return Err(Errno::FBIG.into());
        }
        self.shift(inode, file, offset, &|update| self.data.insert(inode.number, offset, length, update))?;
        drop(lock);
        if self.is_synchronous() { self.make_durable(inode, true) } else { Ok(()) }
    }

    fn check_shift(
        &self,
        inode: &VfsInode,
        file: &FilePages,
        offset: u64,
        length: u64,
        size_expected: Option<u64>,
    ) -> Result<()> {
        self.check_range_change(inode, true)?;
        let block = file.pages.block_bytes();
        if length == 0 || !offset.is_multiple_of(block) || !length.is_multiple_of(block) {
            return Err(Errno::INVAL.into());
        }
        if size_expected.is_some_and(|size| size != inode.size()) {
            return Err(Errno::AGAIN.into());
        }
        Ok(())
    }

    /// Everything from `offset` on gets another place. The caller holds the inode lock exclusively.
    fn shift(
        &self,
        inode: &Arc<VfsInode>,
        file: &FilePages,
        offset: u64,
        change: &dyn Fn(&dyn Fn(&mut Inode)) -> Result<Change>,
    ) -> Result<()> {
        // Dirty blocks cannot move: they become extents first, and the tree's size becomes the file's.
        self.write_back(inode)?;
        // A collapse makes the file shorter: what reads meanwhile looks again.
        let _shrinking = inode.shrink();
        let _replacing = self.replacing.read();
        let guard = file.pages.block(offset..u64::MAX)?;
        let dropped = pagecache::invalidate_range(&file.pages, &guard, offset..u64::MAX)?;
        self.give_back(file, dropped);
        if dropped.blocks > 0 {
            return Err(Error::Bug(format!("{} blocks were dirty under the exclusive lock", dropped.blocks)));
        }
        self.set_times_in_memory(inode, &SetAttributes::default(), self.env.now(), true);
        let change = change(&|stored: &mut Inode| inode.store_times(stored))?;
        let stored = change.inode.ok_or(Error::Posix(Errno::STALE))?;
        inode.refresh(&stored, change.sequence);
        // Before anybody can read what has moved.
        inode.set_size(stored.size);
        drop(guard);
        Ok(())
    }

    /// Gives the promise of dropped dirty blocks back.
    pub(super) fn give_back(&self, file: &FilePages, dropped: Dropped) {
        let given_back = file.reserved.lock().split(dropped.units * file.pages.block_bytes());
        drop(given_back);
    }

    /// fallocate's PUNCH_HOLE. The caller holds the inode lock exclusively.
    pub(super) fn punch(&self, inode: &Arc<VfsInode>, offset: u64, end: u64) -> Result<()> {
        self.replace(inode, offset, end, RangeFill::Hole, 0)
    }

    /// fallocate's ZERO_RANGE: zeros whose space is held. The caller holds the inode lock exclusively.
    pub(super) fn zero(&self, inode: &Arc<VfsInode>, offset: u64, end: u64, keep_size: bool) -> Result<()> {
        let block = u64::from(self.superblock.geometry.block_bytes);
        let grown_size = if keep_size { 0 } else { end };
        // What will be held and is not yet. Blocks that are dirty there give their promise back.
        let missing_bytes = self.missing_bytes(inode, round_down(offset, block), round_up(end, block))?;
        let reservation = self.admit(|| self.space.reserve(missing_bytes))?;
        self.replace(inode, offset, end, RangeFill::Unwritten, grown_size)?;
        if !offset.is_multiple_of(block) || !end.is_multiple_of(block) {
            // Holes that the range covers in part.
            let change = self.data.allocate(inode.number, offset, end, reservation, &|_| {})?;
            if let Some(stored) = &change.inode {
                inode.refresh(stored, change.sequence);
            }
        }
        Ok(())
    }

    /// Makes `[offset, end)` zeros, and the file at least `grown_size` long.
    fn replace(&self, inode: &Arc<VfsInode>, offset: u64, end: u64, fill: RangeFill, grown_size: u64) -> Result<()> {
        let file = Self::file_of(inode)?;
        let block = file.pages.block_bytes();
        let (old_size, stored_size) = (inode.size(), inode.state().stored_size);
        if stored_size < old_size || grown_size > old_size {
            // The block that gives the file its size may be among those that are dropped; and the tree's size only covers what the tree has. What is
            // being written of the last block is as long as the file is now: its commit must not meet a longer one.
            self.write_back(inode)?;
        }
        // Behind the end there is nothing but zeros: a range that reaches the end takes the whole last block.
        let end = if end >= old_size { round_up(end, block) } else { end };
        let whole = round_up(offset, block)..round_down(end, block);
        let whole = if whole.start < whole.end { whole } else { whole.start..whole.start };
        let edges = self.prepare_edges(inode, file, offset..end)?;

        let touched = round_down(offset, block)..round_up(end, block);
        // Blocks that the range covers in part: held, so that nothing outside of the range is lost if the commit fails. What lies inside is cut out of
        // the folios that reach over its ends first: no folio is locked twice.
        let held_ranges = if whole.is_empty() {
            [touched.clone(), touched.end..touched.end]
        } else {
            [touched.start..whole.start, whole.end..touched.end]
        };
        let _replacing = self.replacing.read();
        let guard = file.pages.block(touched)?;
        let dropped = pagecache::invalidate_range(&file.pages, &guard, whole.clone())?;
        self.give_back(file, dropped);
        let hold = |range| pagecache::hold_range(&file.pages, &guard, range);
        let held = held_ranges.into_iter().filter(|range| !range.is_empty()).map(hold).collect::<Result<Vec<_>>>()?;
        self.set_times_in_memory(inode, &SetAttributes::default(), self.env.now(), true);
        let update = |stored: &mut Inode| {
            stored.size = stored.size.max(grown_size);
            inode.store_times(stored);
        };
        let change = self.data.replace_range(inode.number, &edges.prepared, whole, fill, &update)?;
        if let Some(stored) = &change.inode {
            inode.raise_size(grown_size);
            inode.refresh(stored, change.sequence);
        }
        for edge in held {
            self.give_back(file, edge.discard());
        }
        drop(guard);
        Ok(())
    }

    /// Writes the blocks that `range` covers in part, with that part zeroed, to fresh space. Those that are zero there already, in the tree too, need
    /// nothing. Never refused for want of space, since punching gives space back. The caller holds the inode lock exclusively.
    fn prepare_edges(&self, inode: &VfsInode, file: &FilePages, range: Range<u64>) -> Result<Edges> {
        let block = file.pages.block_bytes();
        let mut blocks: Vec<EdgeBlock> = Vec::new();
        for start in [round_down(range.start, block), round_down(range.end, block)] {
            let part = range.start.max(start)..range.end.min(start + block);
            let is_partial = !part.is_empty() && part != (start..start + block);
            let is_new = blocks.iter().all(|other| other.offset != start);
            if is_partial && is_new && start < inode.size() {
                blocks.extend(self.zeroed_edge(inode, file, start, part)?);
            }
        }
        let reservation = self.space.reserve_privileged(blocks.len() as u64 * block);
        let runs: Vec<WriteRun<'_>> =
            blocks.iter().map(|edge| WriteRun { offset: edge.offset, data: vec![edge.bytes.as_slice()] }).collect();
        Ok(Edges { prepared: self.data.prepare_edges(&runs)?, _reservation: reservation })
    }

    fn zeroed_edge(
        &self,
        inode: &VfsInode,
        file: &FilePages,
        start: u64,
        part: Range<u64>,
    ) -> Result<Option<EdgeBlock>> {
        let block = file.pages.block_bytes();
        let bytes = self.whole_block(inode, file, start)?;
        let mut edge = EdgeBlock { offset: start, bytes };
        let within = |offset: u64| usize::try_from(offset - start).unwrap_or(usize::MAX);
        let zeroed = edge.bytes.get_mut(within(part.start)..within(part.end)).unwrap_or_default();
        let is_clean = file.pages.unwritten_ranges(&(start..start + block)).is_empty();
        if is_clean && zeroed.iter().all(|&byte| byte == 0) {
            return Ok(None);
        }
        zeroed.fill(0);
        Ok(Some(edge))
    }

    /// The block at `start` as the cache has it or reads it; zeros from the end of the file on. The caller holds the inode lock exclusively.
    pub(super) fn whole_block(&self, inode: &VfsInode, file: &FilePages, start: u64) -> Result<AlignedBuffer> {
        let block = file.pages.block_bytes();
        let mut bytes = AlignedBuffer::try_zeroed(usize::try_from(block).unwrap_or(usize::MAX))?;
        let size = inode.size();
        let length = size.saturating_sub(start).min(block);
        let context = ReadContext { space: &file.pages, source: &file.source, readahead: None, end_of_file: size };
        let kept = bytes.get_mut(..usize::try_from(length).unwrap_or(0)).unwrap_or_default();
        pagecache::read_iter(&context, start, length, &mut CopySink::new(kept)).into_result()?;
        Ok(bytes)
    }
}
