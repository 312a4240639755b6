//! Direct I/O: between the caller's memory and the devices, with no copy in our cache, and coherent with it.
//!
//! **A direct read** takes no lock, but that of the inode, shared, where the file is being made shorter. It writes back what is dirty of its range, samples {no blocker inside, sequence of extent changes}, reads, and
//! requires the same sequence: then its bytes were the file's at one time. After [`ATTEMPTS`] failures it becomes a read through the cache, which
//! waits for blockers and so always ends.
//!
//! **A direct write** puts its data into fresh space before anything else. Then it takes **block**, [holds](pagecache::hold_range) the cached
//! blocks, commits, and drops them: readers see old or new bytes, an error leaves all as it was.
//!
//! | write | inode lock | when the data is written |
//! | --- | --- | --- |
//! | whole blocks inside the file | shared | before any lock: disjoint writes run in parallel |
//! | extending, or with blocks that it covers in part | exclusive | under it: the rest of the blocks must not change meanwhile |
//!
//! The caller's memory is never touched while a lock is held: in the second case it is copied first.

use std::ops::Range;

use super::Vfs;
use super::attributes::without_set_id;
use super::file::{FILE_BYTES_MAX, WriteAt};
use super::handle::Handle;
use super::inode::{FilePages, VfsInode};
use super::types::{Caller, SetAttributes};
use crate::data::{PreparedWrite, ReadPiece, WriteCommit, WriteRun};
use crate::error::{Error, Result};
use crate::format::namespace::Inode;
use crate::memory::{AlignedBuffer, FOLIO_ALIGNMENT, FOLIO_BYTES_MAX};
use crate::pagecache::{self, CopySink, PageBatch};
use crate::sync::Arc;
use crate::units::{round_down, round_up};
use rustix::io::Errno;

/// How often a direct read looks before it goes through the cache.
const ATTEMPTS: u32 = 3;
/// Bytes of one commit of a long direct write.
const WRITE_STEP_BYTES: usize = 4 << 20;

/// Where a direct read puts whole blocks.
enum Target<'a> {
    /// Memory of the caller's own.
    Buffer(&'a mut [u8]),
    /// Fresh pages, which become references.
    Pages(&'a mut PageBatch),
}

impl Vfs {
    /// Reads into the caller's memory, past the cache: straight from the devices where offset, length and memory are aligned to blocks. Returns how
    /// many bytes lie before the end of the file.
    ///
    /// # Errors
    /// `EBADF`, `EISDIR`; `EIO` for damaged blocks.
    pub fn direct_read(
        &self,
        _caller: &Caller,
        node: u64,
        handle: u64,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<usize> {
        let handle = self.file_handle(node, handle)?;
        let block = Self::file_of(&handle.inode)?.pages.block_bytes();
        let length = handle.inode.read_unshrunk(|size| {
            let length = size.saturating_sub(offset).min(buffer.len() as u64);
            let wanted = buffer.get_mut(..usize::try_from(length).unwrap_or(0)).unwrap_or_default();
            let is_aligned = offset.is_multiple_of(block) && wanted.as_ptr().align_offset(FOLIO_ALIGNMENT) == 0;
            let whole = if is_aligned { round_down(length, block) } else { 0 };
            let (head, mut rest) = wanted.split_at_mut(usize::try_from(whole).unwrap_or(0));
            if !head.is_empty() {
                self.read_blocks(&handle, size, offset..offset + whole, Target::Buffer(head))?;
            }
            if !rest.is_empty() {
                let mut pages = PageBatch::new();
                self.read_range(&handle, size, offset + whole..offset + length, &mut pages)?;
                for slice in pages.slices() {
                    let (now, later) = rest.split_at_mut(slice.len().min(rest.len()));
                    now.copy_from_slice(slice.get(..now.len()).unwrap_or_default());
                    rest = later;
                }
            }
            Ok::<_, Error>(length)
        });
        let length = length.inspect_err(|error| self.tell_of_damage(handle.inode.number, error))?;
        self.touch_access(&handle.inode, handle.flags);
        Ok(usize::try_from(length).unwrap_or(usize::MAX))
    }

    /// Writes from the caller's memory, past the cache; returns how many bytes. Not durable before an fsync.
    ///
    /// # Errors
    /// `EBADF`, `EPERM`, `ENOSPC`, `EFBIG`; the device's.
    pub fn direct_write(&self, caller: &Caller, node: u64, handle: u64, offset: u64, data: &[u8]) -> Result<usize> {
        let request = super::WriteRequest {
            node,
            handle,
            offset,
            data,
            direct: true,
            append: false,
            synchronous: false,
            from_page_cache: false,
            clear_set_id: false,
        };
        self.write(caller, &request).map(|bytes| bytes as usize)
    }

    /// A read request with the O_DIRECT bit: fresh pages, all up to the end of the file or an error.
    pub(super) fn read_direct(&self, handle: &Arc<Handle>, offset: u64, length: u64) -> Result<PageBatch> {
        let pages = handle.inode.read_unshrunk(|size| {
            let end = size.min(offset.saturating_add(length));
            let mut pages = PageBatch::new();
            if offset < end {
                self.read_range(handle, size, offset..end, &mut pages)?;
            }
            Ok::<_, Error>(pages)
        });
        let pages = pages.inspect_err(|error| self.tell_of_damage(handle.inode.number, error))?;
        self.touch_access(&handle.inode, handle.flags);
        Ok(pages)
    }

    /// Reads any range below `size` into fresh pages.
    fn read_range(&self, handle: &Handle, size: u64, range: Range<u64>, pages: &mut PageBatch) -> Result<()> {
        let block = Self::file_of(&handle.inode)?.pages.block_bytes();
        let mut at = range.start;
        while at < range.end {
            let start = round_down(at, block);
            let end = round_up(range.end, block).min(start + FOLIO_BYTES_MAX as u64);
            let mut blocks = PageBatch::new();
            self.read_blocks(handle, size, start..end, Target::Pages(&mut blocks))?;
            // Of the first and the last block only what was asked for.
            let within = |offset: u64| usize::try_from(offset - start).unwrap_or(usize::MAX);
            pages.extend_from(&blocks, within(at)..within(range.end.min(end)));
            at = end;
        }
        Ok(())
    }

    /// Reads whole blocks, at most as long as a folio where they become pages.
    fn read_blocks(&self, handle: &Handle, size: u64, range: Range<u64>, target: Target<'_>) -> Result<()> {
        let inode = &handle.inode;
        let file = Self::file_of(inode)?;
        let is_alone = !file.pages.has_folios(&(0..u64::MAX));
        let length = usize::try_from(range.end - range.start).unwrap_or(usize::MAX);
        let attempts = match target {
            Target::Buffer(buffer) => {
                let attempts = self.try_read_around(inode, file, range.start, buffer)?;
                if attempts.is_none() {
                    // The end of the file may lie inside: what is behind it stays zero.
                    buffer.fill(0);
                    self.read_into(handle, range.start, range.end - range.start, size, &mut CopySink::new(buffer))?
                        .into_result()?;
                }
                attempts
            }
            Target::Pages(pages) => {
                let mut fresh = self.cache.fresh_pages(length)?;
                let buffer = fresh.get_mut(..length).unwrap_or_default();
                let attempts = self.try_read_around(inode, file, range.start, buffer)?;
                let bytes = Arc::clone(fresh.bytes());
                drop(fresh);
                if attempts.is_some() {
                    pages.push(bytes.reference(0..length));
                } else {
                    let before = pages.len();
                    self.read_into(handle, range.start, range.end - range.start, size, pages)?.into_result()?;
                    pages.push_zeros((before + length).saturating_sub(pages.len()));
                }
                attempts
            }
        };
        let is_fast = is_alone && attempts == Some(1);
        self.count_direct(is_fast);
        Ok(())
    }

    fn count_direct(&self, is_fast: bool) {
        let counter = if is_fast { &self.metrics.direct_fast } else { &self.metrics.direct_slow };
        counter.increment();
    }

    /// Reads whole blocks from the devices. Returns how many attempts it took; nothing if extents changed under each of them.
    fn try_read_around(
        &self,
        inode: &VfsInode,
        file: &FilePages,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<Option<u32>> {
        let range = offset..offset + buffer.len() as u64;
        for attempt in 1..=ATTEMPTS {
            if !file.pages.unwritten_ranges(&range).is_empty() && self.write_back_part(inode, file, &range).is_err() {
                // What cannot be written is in the cache alone.
                return Ok(None);
            }
            let Some(sequence) = file.pages.sample_sequence() else { continue };
            let mut outcome = Ok(());
            let mut pieces = [ReadPiece { offset, buffer: &mut *buffer }];
            self.data.read(inode.number, &mut pieces, &mut |_, result| outcome = result);
            if file.pages.sample_sequence() == Some(sequence) {
                return outcome.map(|()| Some(attempt));
            }
        }
        Ok(None)
    }

    /// Writes past the cache; returns how many bytes. After an error with a part written, that part.
    pub(super) fn write_direct(
        &self,
        inode: &Arc<VfsInode>,
        at: WriteAt,
        data: &[u8],
        clear_set_id: bool,
    ) -> Result<u64> {
        let file = Self::file_of(inode)?;
        let mut done = 0;
        for step in data.chunks(WRITE_STEP_BYTES) {
            let at = match at {
                WriteAt::Offset(offset) => WriteAt::Offset(offset.saturating_add(done)),
                WriteAt::End => WriteAt::End,
            };
            match self.write_direct_step(inode, file, at, step, clear_set_id && done == 0) {
                Ok(bytes) => {
                    done += bytes;
                    if bytes < step.len() as u64 {
                        break;
                    }
                }
                Err(error) if done == 0 => return Err(error),
                Err(_) => break,
            }
        }
        Ok(done)
    }

    fn write_direct_step(
        &self,
        inode: &Arc<VfsInode>,
        file: &FilePages,
        at: WriteAt,
        data: &[u8],
        clear_set_id: bool,
    ) -> Result<u64> {
        let mut data = data;
        if let WriteAt::Offset(offset) = at {
            if offset >= FILE_BYTES_MAX {
                return Err(Errno::FBIG.into());
            }
            let room = usize::try_from(FILE_BYTES_MAX - offset).unwrap_or(usize::MAX);
            data = data.get(..room).unwrap_or(data);
        }
        let is_alone = !file.pages.has_folios(&(0..u64::MAX));
        self.count_direct(is_alone);
        let (reservation, length) = self.reserve_for_write(inode, at, data.len() as u64, false)?;
        let data = data.get(..usize::try_from(length).unwrap_or(usize::MAX)).unwrap_or(data);
        let is_lending = clear_set_id && {
            let mode = inode.state().inode.mode;
            without_set_id(mode) != mode
        };
        let block = file.pages.block_bytes();
        if let WriteAt::Offset(offset) = at
            && !is_lending
            && offset.is_multiple_of(block)
            && length.is_multiple_of(block)
            && offset + length <= inode.size()
        {
            let written = self.write_direct_shared(inode, file, offset, data)?;
            if written > 0 {
                return Ok(written);
            }
            // The file was cut meanwhile: the write extends it.
        }
        let copy = AlignedBuffer::copy_of(data)?;
        let exclusive = inode.lock.write();
        if is_lending {
            self.clear_set_id(inode)?;
        }
        let offset = match at {
            WriteAt::Offset(offset) => offset,
            WriteAt::End => inode.size(),
        };
        let length = length.min(FILE_BYTES_MAX.saturating_sub(offset));
        let copy = copy.get(..usize::try_from(length).unwrap_or(usize::MAX)).unwrap_or_default();
        if copy.is_empty() {
            return Err(Errno::FBIG.into());
        }
        let written = self.write_direct_exclusive(inode, file, offset, copy)?;
        drop((exclusive, reservation));
        Ok(written)
    }

    /// A write that extends the file or covers blocks in part: their rest is read through the cache, and written with it. Returns how much was
    /// written: less than asked for where an error came after a part.
    fn write_direct_exclusive(&self, inode: &Arc<VfsInode>, file: &FilePages, offset: u64, data: &[u8]) -> Result<u64> {
        let block = file.pages.block_bytes();
        let (size, end) = (inode.size(), offset + data.len() as u64);
        let (first, last) = (round_down(offset, block), round_down(end, block));
        let within = |offset: u64| usize::try_from(offset % block).unwrap_or(usize::MAX);
        let (head, tail);
        let mut slices: Vec<&[u8]> = Vec::with_capacity(3);
        if first < offset {
            head = self.whole_block(inode, file, first)?;
            slices.push(head.get(..within(offset)).unwrap_or_default());
        }
        slices.push(data);
        // The last block ends where the file does: behind that, the writer pads with zeros.
        let mut run_end = end;
        if last < end && end < size {
            tail = self.whole_block(inode, file, last)?;
            run_end = size.min(last + block);
            let kept = usize::try_from(run_end - last).unwrap_or(usize::MAX);
            slices.push(tail.get(within(end)..kept).unwrap_or_default());
        }
        let mut at = first;
        while at < run_end {
            let run = WriteRun { offset: at, data: skip(&slices, at - first) };
            let step = self.prepare_direct(inode, &[run], size.max(run_end)).and_then(|prepared| {
                let to = prepared.covered_to().min(round_up(run_end, block));
                self.commit_direct(inode, file, &prepared, at..to, to.min(run_end)).map(|()| to)
            });
            match step {
                Ok(to) => at = to,
                Err(_) if at > offset => break,
                Err(error) => return Err(error),
            }
        }
        Ok(at.min(end) - offset)
    }

    /// A write of whole blocks inside the file: each part that there is space for goes there with no lock held, and is then committed. Returns how much was
    /// written: less than asked for where the file was cut meanwhile, or where an error came after a part.
    fn write_direct_shared(&self, inode: &Arc<VfsInode>, file: &FilePages, offset: u64, data: &[u8]) -> Result<u64> {
        let end = offset + data.len() as u64;
        let step = |at: u64| -> Result<u64> {
            let run = WriteRun { offset: at, data: skip(&[data], at - offset) };
            let prepared = self.prepare_direct(inode, &[run], u64::MAX)?;
            let to = prepared.covered_to().min(end);
            let _shared = inode.lock.read();
            // Nothing shortens the file under the shared lock.
            if to > inode.size() {
                return Ok(at);
            }
            self.commit_direct(inode, file, &prepared, at..to, to).map(|()| to)
        };
        let mut at = offset;
        while at < end {
            match step(at) {
                Ok(to) if to > at => at = to,
                Err(error) if at == offset => return Err(error),
                _ => break,
            }
        }
        Ok(at - offset)
    }

    fn prepare_direct(&self, inode: &VfsInode, runs: &[WriteRun<'_>], size: u64) -> Result<PreparedWrite> {
        self.data.prepare_write(inode.number, runs, size).inspect_err(|error| {
            if matches!(error, Error::Device { operation, .. } if *operation != "read") {
                self.latch(format!("file data could not be written: {error}"));
            }
        })
    }

    /// Puts prepared data in the place of `range`, whole blocks, of extents and cache; the file becomes at least `end` long. The caller holds the inode
    /// lock: exclusively, if `end` lies behind the end of the file.
    fn commit_direct(
        &self,
        inode: &Arc<VfsInode>,
        file: &FilePages,
        prepared: &PreparedWrite,
        range: Range<u64>,
        end: u64,
    ) -> Result<()> {
        if end > inode.state().stored_size {
            // The tree's size grows only over what the tree has.
            self.write_back(inode)?;
        }
        let _replacing = self.replacing.read();
        let guard = file.pages.block(range.clone())?;
        let held = pagecache::hold_range(&file.pages, &guard, range.clone())?;
        let before = self.set_times_in_memory(inode, &SetAttributes::default(), self.env.now(), true);
        let size_limit = || inode.size().max(end);
        let update_inode = |stored: &mut Inode| inode.store_times(stored);
        let commit = WriteCommit { size_limit: &size_limit, update_inode: &update_inode };
        let mut committed_to = range.start;
        let outcome = self.data.commit_write(inode.number, prepared, commit, &mut |to| committed_to = to);
        match outcome {
            Ok(change) => {
                if let Some(stored) = &change.inode {
                    inode.raise_size(end);
                    inode.refresh(stored, change.sequence);
                }
                let dropped = held.discard();
                self.give_back(file, dropped);
                drop(guard);
                Ok(())
            }
            Err(error) => {
                super::attributes::restore_times(inode, before);
                if committed_to > range.start {
                    // Memory is never behind the tree.
                    inode.raise_size(committed_to.min(end));
                    held.discard_clean();
                }
                Err(error)
            }
        }
    }
}

/// The slices without their first `bytes` bytes.
fn skip<'a>(slices: &[&'a [u8]], bytes: u64) -> Vec<&'a [u8]> {
    let mut left = usize::try_from(bytes).unwrap_or(usize::MAX);
    let mut rest = Vec::with_capacity(slices.len());
    for slice in slices {
        let (skipped, kept) = slice.split_at(slice.len().min(left));
        left -= skipped.len();
        if !kept.is_empty() {
            rest.push(kept);
        }
    }
    rest
}
