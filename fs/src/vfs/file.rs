//! Open files: open, read, write, lseek, release.

use rustix::io::Errno;

use super::Vfs;
use super::attributes::without_set_id;
use super::handle::Handle;
use super::inode::{FilePages, VfsInode};
use super::source::FileSource;
use super::types::{Caller, Opened, ReadRequest, Seek, WriteRequest};
use crate::error::{Error, Result};
use crate::format::namespace::FileType;
use crate::namespace::{FLAG_APPEND, FLAG_IMMUTABLE, FLAG_SYNC};
use crate::pagecache::{self, PageBatch, ReadContext, ReadOutcome, ReadSink, WriteContext};
use crate::space::SpaceReservation;
use crate::sync::{Arc, Mutex};
use crate::transaction::CommitOptions;
use crate::units::{InodeNumber, round_down, round_up};

/// Largest size of a file in bytes: what an `off_t` holds.
pub(super) const FILE_BYTES_MAX: u64 = i64::MAX as u64;

const OPEN_ACCESS_MODE: i32 = 0o3;
const OPEN_APPEND: i32 = 0o2000;

/// Where a write goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WriteAt {
    Offset(u64),
    End,
}

impl Vfs {
    pub(super) fn new_file_pages(&self, number: InodeNumber) -> FilePages {
        FilePages {
            pages: self.cache.new_space(number.0),
            source: Arc::new(FileSource { inode: number, data: Arc::clone(&self.data) }),
            reserved: Mutex::new(self.space.reserve_privileged(0)),
        }
    }

    pub(super) fn file_handle(&self, node: u64, handle: u64) -> Result<Arc<Handle>> {
        self.check_alive()?;
        let handle = self.handles.get(handle)?;
        if handle.inode.number.0 != node {
            return Err(Errno::BADF.into());
        }
        Ok(handle)
    }

    /// The pages of an inode that must be a regular file.
    pub(super) fn file_of(inode: &VfsInode) -> Result<&FilePages> {
        inode.file.as_ref().ok_or_else(|| match inode.file_type {
            FileType::Directory => Errno::ISDIR.into(),
            _ => Errno::INVAL.into(),
        })
    }

    /// Opens a file. `flags` are open(2)'s without O_CREAT, O_EXCL and O_TRUNC.
    ///
    /// # Errors
    /// `EISDIR`; `EPERM` for writing to an immutable file, or other than at the end of an append-only one; `EROFS`.
    pub fn open(&self, _caller: &Caller, node: u64, flags: i32) -> Result<Opened> {
        let inode = self.inode(node)?;
        if flags & OPEN_ACCESS_MODE != 0 {
            if self.options.read_only {
                return Err(Error::ReadOnly);
            }
            if inode.file_type == FileType::Directory {
                return Err(Errno::ISDIR.into());
            }
            let stored = inode.state().inode.flags;
            if stored & FLAG_IMMUTABLE != 0 || (stored & FLAG_APPEND != 0 && flags & OPEN_APPEND == 0) {
                return Err(Errno::PERM.into());
            }
        }
        Ok(Opened { handle: self.handles.open(inode, flags) })
    }

    /// The last descriptor and mapping of the handle are gone.
    ///
    /// # Errors
    /// `EBADF`.
    pub fn release(&self, _node: u64, handle: u64) -> Result<()> {
        let handle = self.handles.close(handle)?;
        if handle.inode.closed(handle.is_writable()) {
            self.reap_if_unused(handle.inode.number);
        }
        Ok(())
    }

    /// A descriptor of the handle is closed: says what errors of delayed writes the handle has not reported yet. An fsync through another descriptor reports
    /// them all the same: that one of them was closed, by a child that ended, say, nobody may have looked at.
    ///
    /// # Errors
    /// Those errors.
    pub fn flush(&self, _caller: &Caller, node: u64, handle: u64) -> Result<()> {
        self.file_handle(node, handle)?.peek_late_errors()
    }

    /// Target of a symbolic link.
    ///
    /// # Errors
    /// `EINVAL` if it is none.
    pub fn readlink(&self, _caller: &Caller, node: u64) -> Result<Vec<u8>> {
        let inode = self.inode(node)?;
        let target = self.namespace.symlink_target(&mut self.transactions.read(), inode.number)?;
        self.touch_access(&inode, 0);
        Ok(target)
    }

    /// Reads: references to the cache's own pages, up to the end of the file, or an error; never a shorter prefix.
    ///
    /// # Errors
    /// `EIO` for damaged blocks.
    pub fn read(&self, _caller: &Caller, request: &ReadRequest) -> Result<PageBatch> {
        self.read_pages(request, false)
    }

    /// As [`Self::read`], but what lies before a damaged block is answered without it: for a caller that takes the answer to its program as
    /// it is, and keeps none of it.
    ///
    /// # Errors
    /// `EIO` if the first block is damaged.
    pub fn read_some(&self, _caller: &Caller, request: &ReadRequest) -> Result<PageBatch> {
        self.read_pages(request, true)
    }

    fn read_pages(&self, request: &ReadRequest, may_stop_early: bool) -> Result<PageBatch> {
        let handle = self.file_handle(request.node, request.handle)?;
        let length = u64::from(request.length_bytes);
        if request.direct {
            match self.read_direct(&handle, request.offset, length) {
                // The cache knows what lies before the bad block.
                Err(_) if may_stop_early => {}
                outcome => return outcome,
            }
        }
        handle.inode.read_unshrunk(|size| {
            let mut batch = PageBatch::new();
            let outcome = self.read_into(&handle, request.offset, length, size, &mut batch)?;
            match outcome {
                ReadOutcome { bytes, error: Some(_) } if may_stop_early && bytes > 0 => {}
                outcome => {
                    outcome.into_result()?;
                }
            }
            Ok(batch)
        })
    }

    /// Gives what lies below `size` of the range to `sink`.
    pub(super) fn read_into(
        &self,
        handle: &Handle,
        offset: u64,
        length: u64,
        size: u64,
        sink: &mut dyn ReadSink,
    ) -> Result<ReadOutcome> {
        let file = Self::file_of(&handle.inode)?;
        let length = size.saturating_sub(offset).min(length);
        if length == 0 {
            return Ok(ReadOutcome { bytes: 0, error: None });
        }
        let context = ReadContext {
            space: &file.pages,
            source: &file.source,
            readahead: Some(&handle.readahead),
            end_of_file: size,
        };
        let outcome = pagecache::read_iter(&context, offset, length, sink);
        if let Some(error) = &outcome.error {
            self.tell_of_damage(handle.inode.number, error);
        }
        if outcome.bytes > 0 {
            self.touch_access(&handle.inode, handle.flags);
        }
        Ok(outcome)
    }

    /// Promises space for a write of `length` bytes, or for its first part where there is no more: then at least a byte. Returns the promise and the
    /// length. Space that fallocate holds there is used where no other is left. What the kernel has `delayed` lands in the reserve for it, and is
    /// never shortened.
    pub(super) fn reserve_for_write(
        &self,
        inode: &VfsInode,
        at: WriteAt,
        length: u64,
        delayed: bool,
    ) -> Result<(SpaceReservation, u64)> {
        let block = u64::from(self.superblock.geometry.block_bytes);
        // An append's place may move until it has the lock, so it may need a block more.
        let (offset, bytes) = match at {
            WriteAt::Offset(offset) => (offset, round_up(offset + length, block) - round_down(offset, block)),
            WriteAt::End => (inode.size(), round_up(length, block) + block),
        };
        if delayed && let Ok(reservation) = self.space.reserve(bytes).or_else(|_| self.take_landing_reserve(bytes)) {
            return Ok((reservation, length));
        }
        let refused = match self.admit(|| self.space.reserve(bytes)) {
            Err(error @ Error::NoSpace(_)) => error,
            outcome => return outcome.map(|reservation| (reservation, length)),
        };
        let start = round_down(offset, block);
        let head = if at == WriteAt::End { block } else { offset - start };
        let held = self.data.unwritten_bytes(inode.number, start, start + bytes)?;
        if held > 0 || Self::file_of(inode)?.pages.unwritten_blocks() > 0 {
            let dirty = Self::file_of(inode)?.pages.unwritten_ranges(&(start..start + bytes));
            let promised: u64 = dirty.iter().map(|range| range.end - range.start).sum();
            // Blocks that are dirty already have their promise; the outcome gives back what is not needed.
            let covered = (held + promised).min(bytes);
            match self.space.reserve(bytes - covered) {
                Ok(mut reservation) if covered > 0 => {
                    reservation.merge(self.space.reserve_privileged(covered));
                    return Ok((reservation, length));
                }
                Ok(_) | Err(Error::NoSpace(_)) => {}
                Err(error) => return Err(error),
            }
        }
        if delayed {
            return Err(refused);
        }
        let held = self.held_prefix(inode, start, bytes)?;
        let shorter = |bytes: u64| bytes.checked_sub(head).map(|part| part.min(length)).filter(|&part| part > 0);
        if let Some(part) = shorter(held) {
            return Ok((self.space.reserve_privileged(held), part));
        }
        let fitting = self.space.reservable_bytes().min(bytes);
        match shorter(fitting) {
            Some(part) => Ok((self.space.reserve(fitting)?, part)),
            None => Err(refused),
        }
    }

    /// Bytes (whole blocks) from `start` on, at most `bytes`, that fallocate holds without a gap.
    fn held_prefix(&self, inode: &VfsInode, start: u64, bytes: u64) -> Result<u64> {
        let block = u64::from(self.superblock.geometry.block_bytes);
        let (mut low, mut high) = (0, bytes / block);
        while low < high {
            let middle = (low + high).div_ceil(2);
            let length = middle * block;
            if self.data.unwritten_bytes(inode.number, start, start + length)? == length {
                low = middle;
            } else {
                high = middle - 1;
            }
        }
        Ok(low * block)
    }

    /// Writes; returns how many bytes.
    ///
    /// # Errors
    /// `ENOSPC`, `EFBIG`, `EPERM`; `EIO` where the rest of a partly written block cannot be read.
    pub fn write(&self, _caller: &Caller, request: &WriteRequest<'_>) -> Result<u32> {
        self.check_writable()?;
        // The kernel guesses a handle for what its page cache has delayed.
        let handle = match self.file_handle(request.node, request.handle) {
            Err(_) if request.from_page_cache => None,
            handle => Some(handle?),
        };
        let inode = match &handle {
            Some(handle) => Arc::clone(&handle.inode),
            None => self.inode(request.node)?,
        };
        // Where the kernel delays writes, it alone knows where the file ends.
        let is_append = request.append && !request.from_page_cache;
        let at = if is_append && !self.options.kernel_delays_writes {
            WriteAt::End
        } else {
            WriteAt::Offset(request.offset)
        };
        let flags = inode.state().inode.flags;
        if !request.from_page_cache && (flags & FLAG_IMMUTABLE != 0 || (flags & FLAG_APPEND != 0 && !is_append)) {
            return Err(Errno::PERM.into());
        }
        if !request.from_page_cache {
            self.drop_capabilities(&inode)?;
        }
        // What the kernel's page cache has delayed is no direct write, whatever the handle says.
        let written = if request.direct && !request.from_page_cache {
            self.write_direct(&inode, at, request.data, request.clear_set_id)
        } else {
            self.write_bytes(&inode, at, request.data, request.clear_set_id, request.from_page_cache)
        };
        let bytes = written.inspect_err(|error| self.tell_of_damage(inode.number, error))?;
        if (request.synchronous && !request.from_page_cache) || flags & FLAG_SYNC != 0 || self.is_synchronous() {
            let outcome = self.make_durable(&inode, true);
            // What this answers is not to be said again by the handle's next fsync.
            let late = handle.map_or(Ok(()), |handle| handle.check_late_errors());
            outcome.and(late)?;
        }
        Ok(u32::try_from(bytes).unwrap_or(u32::MAX))
    }

    /// Puts bytes into the page cache, with their space promised first. Returns how many: fewer than all only where there is no space for more.
    /// `delayed`: they come from the kernel's page cache; then it is all or none.
    pub(super) fn write_bytes(
        &self,
        inode: &Arc<VfsInode>,
        at: WriteAt,
        data: &[u8],
        clear_set_id: bool,
        delayed: bool,
    ) -> Result<u64> {
        let file = Self::file_of(inode)?;
        if data.is_empty() {
            return Ok(0);
        }
        let mut length = data.len() as u64;
        if let WriteAt::Offset(offset) = at {
            if offset >= FILE_BYTES_MAX {
                return Err(Errno::FBIG.into());
            }
            length = length.min(FILE_BYTES_MAX - offset);
        }
        if let Some(failure) = file.pages.failure() {
            return Err(failure);
        }
        // With nothing held: whoever else wants this file is not slowed down.
        self.cache.pace_writer(length)?;
        let (reservation, promised) = self.reserve_for_write(inode, at, length, delayed)?;
        length = promised;
        let is_lending = clear_set_id && {
            let mode = inode.state().inode.mode;
            without_set_id(mode) != mode
        };
        let extends = |size: u64| match at {
            WriteAt::Offset(offset) => offset + length > size,
            WriteAt::End => true,
        };
        // Shared, while the size stays; nothing shortens the file under a shared lock.
        let mut shared = None;
        let mut exclusive = None;
        if !is_lending && !extends(inode.size()) {
            shared = Some(inode.lock.read()).filter(|_| !extends(inode.size()));
        }
        if shared.is_none() {
            exclusive = Some(inode.lock.write());
        }
        if is_lending {
            self.clear_set_id(inode)?;
        }
        let offset = match at {
            WriteAt::Offset(offset) => offset,
            WriteAt::End => inode.size(),
        };
        length = length.min(FILE_BYTES_MAX.saturating_sub(offset));
        let data = usize::try_from(length).ok().and_then(|length| data.get(..length)).unwrap_or(data);
        // What the kernel has delayed happened earlier; it sends the time of that itself. Before the blocks are dirty: the commit of the last of them
        // then has it.
        let is_timed = !(delayed && self.options.kernel_delays_writes);
        if is_timed {
            self.note_modification(inode);
        }
        let outcome = self.write_pages(inode, file, offset, data, reservation);
        if is_timed && outcome.bytes == 0 {
            self.delay_times(inode);
        }
        drop((shared, exclusive));
        match outcome.error {
            Some(error) if outcome.bytes == 0 => Err(error),
            _ => Ok(outcome.bytes),
        }
    }

    fn write_pages(
        &self,
        inode: &VfsInode,
        file: &FilePages,
        offset: u64,
        data: &[u8],
        reservation: SpaceReservation,
    ) -> pagecache::WriteOutcome {
        let block = file.pages.block_bytes();
        let promised_blocks = reservation.bytes() / block;
        // Before a block becomes dirty its promise must be where writeback looks for it.
        file.reserved.lock().merge(reservation);
        let context = WriteContext {
            space: &file.pages,
            source: &file.source,
            end_of_file: inode.size(),
            units_per_block: 1,
            placed: &|end| inode.raise_size(end),
        };
        let outcome = pagecache::write(&context, offset, data);
        let surplus = promised_blocks.saturating_sub(outcome.newly_dirty_blocks) * block;
        let given_back = file.reserved.lock().split(surplus);
        drop(given_back);
        outcome
    }

    /// Sets the times of a change of content that comes next, in memory; the commit of the data stores them.
    fn note_modification(&self, inode: &VfsInode) {
        let now = self.env.now();
        let mut state = inode.state_for_times();
        state.inode.modification_time = now.into();
        state.inode.change_time = now.into();
        state.times_ahead = true;
    }

    /// Takes the bits off that lend rights. The caller holds the inode lock exclusively.
    pub(super) fn clear_set_id(&self, inode: &VfsInode) -> Result<()> {
        let committed = self.transactions.run(CommitOptions::default(), |transaction| {
            self.namespace.update_inode(transaction, inode.number, |stored| {
                stored.mode = without_set_id(stored.mode);
                Ok(())
            })
        })?;
        inode.apply(&committed.value, committed.sequence);
        Ok(())
    }

    /// Whether the kernel's page cache may hold bytes of the file that no write has brought: those of shared mappings, and in the writeback
    /// mode all others. When the last handle for writing is released, it has written them.
    #[must_use]
    pub fn may_be_dirty_in_kernel(&self, node: u64) -> bool {
        self.table.get(InodeNumber(node)).is_some_and(|inode| inode.is_open_for_writing())
    }

    /// Finds data or a hole at or after `offset`; delayed data counts.
    ///
    /// # Errors
    /// `ENXIO` at or past the end, and where no data follows.
    pub fn seek(&self, _caller: &Caller, node: u64, handle: u64, offset: u64, what: Seek) -> Result<u64> {
        let handle = self.file_handle(node, handle)?;
        let inode = &handle.inode;
        let file = Self::file_of(inode)?;
        let size = inode.size();
        if offset >= size {
            return Err(Errno::NXIO.into());
        }
        // Sampled before the extents: what is committed in between is seen in one of them at least.
        let delayed = file.pages.unwritten_ranges(&(offset..size));
        match what {
            Seek::Data => {
                let stored = self.data.seek_data(inode.number, offset, size)?;
                let delayed = delayed.first().map(|range| range.start.max(offset));
                let first = [stored, delayed].into_iter().flatten().min().filter(|&first| first < size);
                first.ok_or(Error::Posix(Errno::NXIO))
            }
            Seek::Hole => {
                let mut at = offset;
                loop {
                    let hole = self.data.seek_hole(inode.number, at, size)?;
                    match delayed.iter().find(|range| range.contains(&hole)) {
                        Some(range) if hole < size => at = range.end,
                        _ => return Ok(hole.min(size)),
                    }
                    if at >= size {
                        return Ok(size);
                    }
                }
            }
        }
    }
}
