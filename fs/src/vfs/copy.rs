//! copy_file_range, within a filesystem and between two: the source is read through the collecting sink, and what it refers to is written to
//! the target with no copy in between. Holes stay holes.
//!
//! No lock is held over the whole: each step is a read and a write (or a punch) of its own, as a program would make them.

use std::ops::Range;

use super::Vfs;
use super::file::{FILE_BYTES_MAX, WriteAt};
use super::handle::Handle;
use super::splice::STEP_BYTES;
use super::types::{Caller, CopyRequest, SetAttributes};
use crate::error::Result;
use crate::namespace::{FLAG_APPEND, FLAG_IMMUTABLE, FLAG_SYNC};
use crate::sync::Arc;
use rustix::io::Errno;

/// Keep the size, punch a hole: fallocate(2)'s mode.
const PUNCH_HOLE_KEEP_SIZE: i32 = 3;

/// The start of a range: what it is, and where that ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Hole { end: u64 },
    Data { end: u64 },
}

impl Vfs {
    /// Copies; returns how many bytes. Stops early at the end of the source, and where something failed after a part was copied.
    ///
    /// # Errors
    /// Those of reading and writing; `EINVAL` for overlapping ranges of one file.
    pub fn copy_file_range(&self, caller: &Caller, request: &CopyRequest) -> Result<u64> {
        self.copy_to(caller, self, request)
    }

    /// As [`Self::copy_file_range`], into a file of another filesystem of this process.
    ///
    /// # Errors
    /// Those of reading here and of writing there; `EINVAL` for overlapping ranges of one file.
    pub fn copy_to(&self, caller: &Caller, target: &Self, request: &CopyRequest) -> Result<u64> {
        self.check_alive()?;
        target.check_writable()?;
        let from_handle = self.handles.get(request.source_handle)?;
        let to_handle = target.handles.get(request.target_handle)?;
        let (from, to) = (request.source_offset, request.target_offset);
        let is_same = std::ptr::eq(self, target) && from_handle.inode.number == to_handle.inode.number;
        if is_same && from < to.saturating_add(request.length_bytes) && to < from.saturating_add(request.length_bytes) {
            return Err(Errno::INVAL.into());
        }
        let flags = to_handle.inode.state().inode.flags;
        if flags & (FLAG_IMMUTABLE | FLAG_APPEND) != 0 {
            return Err(Errno::PERM.into());
        }
        // The end of the source as it is now: the copy itself may move it.
        let length = request.length_bytes.min(from_handle.inode.size().saturating_sub(from));
        let mut copied = 0;
        let mut ends_in_hole = false;
        let mut failed = None;
        while copied < length {
            let step = from + copied..from + length;
            let part = from_handle
                .inode
                .read_unshrunk(|size| self.part_at(&from_handle, &(step.start..step.end.min(size).max(step.start))));
            let outcome = part.and_then(|part| match part {
                Part::Hole { end } => Ok((target.make_hole(caller, request, to + copied, end - step.start)?, true)),
                Part::Data { end } => {
                    Ok((self.copy_data(&from_handle, step.start..end, target, &to_handle, to + copied)?, false))
                }
            });
            match outcome {
                Ok((0, _)) => break,
                Ok((bytes, is_hole)) => {
                    copied += bytes;
                    // What was copied ends in it, also if nothing follows because the source was cut or space ran out.
                    ends_in_hole = is_hole;
                }
                Err(error) => {
                    failed = Some(error);
                    break;
                }
            }
        }
        if ends_in_hole && copied > 0 {
            target.grow(&to_handle, to + copied)?;
        }
        if copied > 0 && (flags & FLAG_SYNC != 0 || target.is_synchronous()) {
            target.make_durable(&to_handle.inode, true)?;
        }
        match failed {
            Some(error) if copied == 0 => Err(error),
            _ => Ok(copied),
        }
    }

    /// What lies at the start of a range of the source; data in steps.
    fn part_at(&self, handle: &Handle, range: &Range<u64>) -> Result<Part> {
        let inode = &handle.inode;
        let pages = &Self::file_of(inode)?.pages;
        let near = range.start..range.end.min(range.start.saturating_add(STEP_BYTES));
        // Dirty data is looked for before the extents: what is committed in between is seen in one of them at least.
        if let Some(delayed) = pages.unwritten_ranges(&near).first().filter(|delayed| delayed.start <= near.start) {
            return Ok(Part::Data { end: delayed.end.min(near.end) });
        }
        if self.data.seek_data(inode.number, range.start, near.end)? == Some(range.start) {
            let hole = self.data.seek_hole(inode.number, near.start, near.end)?;
            return Ok(Part::Data { end: if hole > near.start { hole.min(near.end) } else { near.end } });
        }
        let delayed = pages.unwritten_ranges(range).first().map(|delayed| delayed.start);
        let stored = self.data.seek_data(inode.number, range.start, range.end)?;
        let data = [delayed, stored].into_iter().flatten().min().unwrap_or(range.end);
        Ok(if data > range.start { Part::Hole { end: data.min(range.end) } } else { Part::Data { end: near.end } })
    }

    fn copy_data(&self, from: &Handle, range: Range<u64>, target: &Self, to: &Handle, to_offset: u64) -> Result<u64> {
        let collected = self.collect(from, range.start, range.end - range.start)?;
        self.metrics.pagecache_splice_references.add(collected.pages.reference_count() as u64);
        let mut written = 0;
        for slice in collected.pages.slices() {
            match target.write_bytes(&to.inode, WriteAt::Offset(to_offset + written), slice, true, false) {
                // Space for a part of it.
                Ok(bytes) if bytes < slice.len() as u64 => return Ok(written + bytes),
                Ok(bytes) => written += bytes,
                Err(error) if written == 0 => return Err(error),
                Err(_) => return Ok(written),
            }
        }
        match collected.error {
            Some(error) if written == 0 => Err(error),
            _ => Ok(written),
        }
    }

    /// Takes away what the target has of a range. Behind its end it has nothing.
    fn make_hole(&self, caller: &Caller, request: &CopyRequest, offset: u64, length: u64) -> Result<u64> {
        let length = length.min(FILE_BYTES_MAX.saturating_sub(offset));
        if length == 0 {
            return Err(Errno::FBIG.into());
        }
        let handle = self.handles.get(request.target_handle)?;
        if offset < handle.inode.size() {
            let (node, handle) = (handle.inode.number.0, request.target_handle);
            self.fallocate(caller, node, handle, offset, length, PUNCH_HOLE_KEEP_SIZE)?;
        }
        Ok(length)
    }

    /// Makes a file at least `size` bytes long.
    fn grow(&self, handle: &Handle, size: u64) -> Result<()> {
        let inode = Arc::clone(&handle.inode);
        let lock = inode.lock.write();
        if inode.size() < size {
            let changes = SetAttributes { size_bytes: Some(size), ..SetAttributes::default() };
            self.set_size(&inode, size, &changes, self.env.now())?;
        }
        drop(lock);
        self.settle(&inode)
    }
}
