//! fallocate(2): allocate (with and without growing the file), and punch hole.

use rustix::io::Errno;

use super::Vfs;
use super::file::FILE_BYTES_MAX;
use super::inode::VfsInode;
use super::types::{Caller, SetAttributes};
use crate::error::{Error, Result};
use crate::format::namespace::{FileType, Inode};
use crate::namespace::{FLAG_APPEND, FLAG_IMMUTABLE};
use crate::pagecache::{self, WriteContext};
use crate::sync::Arc;
use crate::units::{round_down, round_up};

const KEEP_SIZE: i32 = 1;
const PUNCH_HOLE: i32 = 2;

impl Vfs {
    /// fallocate(2); `mode` is its mode.
    ///
    /// # Errors
    /// `EOPNOTSUPP` for modes that are not served, `ENOSPC`, `EFBIG`, `EPERM`.
    pub fn fallocate(
        &self,
        _caller: &Caller,
        node: u64,
        handle: u64,
        offset: u64,
        length: u64,
        mode: i32,
    ) -> Result<()> {
        self.check_writable()?;
        let handle = self.handles.get(handle)?;
        let inode = &handle.inode;
        if inode.number.0 != node {
            return Err(Errno::BADF.into());
        }
        if inode.file_type != FileType::Regular {
            return Err(Errno::NODEV.into());
        }
        if !matches!(mode, 0 | KEEP_SIZE) && mode != KEEP_SIZE | PUNCH_HOLE {
            return Err(Errno::OPNOTSUPP.into());
        }
        if length == 0 {
            return Err(Errno::INVAL.into());
        }
        let end = offset.checked_add(length).filter(|&end| end <= FILE_BYTES_MAX).ok_or(Error::Posix(Errno::FBIG))?;
        let lock = inode.lock.write();
        let flags = inode.state().inode.flags;
        if flags & FLAG_IMMUTABLE != 0 || (flags & FLAG_APPEND != 0 && mode & PUNCH_HOLE != 0) {
            return Err(Errno::PERM.into());
        }
        if mode & PUNCH_HOLE != 0 {
            self.punch(inode, offset, end)?;
        } else {
            self.allocate(inode, offset, end, mode)?;
        }
        drop(lock);
        // The edges of a hole are delayed data.
        if self.is_synchronous() { self.make_durable(inode, true) } else { Ok(()) }
    }

    /// Bytes of the range (whole blocks) that neither data nor an earlier fallocate holds.
    fn missing_bytes(&self, inode: &VfsInode, start: u64, end: u64) -> Result<u64> {
        let mut data_bytes = 0;
        let mut at = start;
        while let Some(data) = self.data.seek_data(inode.number, at, end)? {
            let hole = self.data.seek_hole(inode.number, data, end)?.min(end);
            data_bytes += hole.saturating_sub(data);
            if hole <= at {
                break;
            }
            at = hole;
        }
        let held = self.data.unwritten_bytes(inode.number, start, end)?;
        Ok((end - start).saturating_sub(data_bytes).saturating_sub(held))
    }

    fn allocate(&self, inode: &Arc<VfsInode>, offset: u64, end: u64, mode: i32) -> Result<()> {
        let grows = mode & KEEP_SIZE == 0 && end > inode.size();
        if inode.has_dirty_pages() {
            // What is promised becomes counted, so it is not asked for twice; and the tree's size may only cover what the tree has.
            self.write_back(inode)?;
        }
        let block = u64::from(self.superblock.geometry.block_bytes);
        let (start, stop) = (round_down(offset, block), round_up(end, block));
        let missing_bytes = self.missing_bytes(inode, start, stop)?;
        let reservation = self.admit(|| self.space.reserve(missing_bytes))?;
        let no_changes = SetAttributes::default();
        self.set_times_in_memory(inode, &no_changes, self.env.now(), grows);
        let update = |stored: &mut Inode| {
            if grows {
                stored.size = stored.size.max(end);
            }
            inode.store_times(stored);
        };
        let change = self.data.allocate(inode.number, offset, end, reservation, &update)?;
        if let Some(stored) = &change.inode {
            if grows {
                inode.raise_size(end);
            }
            inode.apply(stored, change.sequence);
            inode.refresh(stored, change.sequence);
        }
        Ok(())
    }

    fn punch(&self, inode: &Arc<VfsInode>, offset: u64, end: u64) -> Result<()> {
        let file = Self::file_of(inode)?;
        let block = file.pages.block_bytes();
        if inode.state().stored_size < inode.size() {
            // The block that gives the file its size may be among those that are dropped.
            self.write_back(inode)?;
        }
        // Behind the end there is nothing but zeros: a hole that reaches the end takes the whole last block.
        let end = if end >= inode.size() { round_up(end, block) } else { end };
        // The edges may have to be zeroed: never refused, since punching gives space back.
        file.reserved.lock().merge(self.space.reserve_privileged(2 * block));
        let guard = file.pages.block(round_down(offset, block)..round_up(end, block))?;
        let context = WriteContext {
            space: &file.pages,
            source: &file.source,
            end_of_file: inode.size(),
            units_per_block: 1,
            placed: &|_| {},
        };
        let punched = pagecache::punch(&context, &guard, offset, end - offset);
        self.settle_reservation(inode, punched.as_ref().ok())?;
        let interior = punched?.interior;
        self.set_times_in_memory(inode, &SetAttributes::default(), self.env.now(), true);
        if interior.start < interior.end {
            let update = |stored: &mut Inode| inode.store_times(stored);
            let change = self.data.punch(inode.number, interior.start, interior.end, &update)?;
            if let Some(stored) = &change.inode {
                inode.refresh(stored, change.sequence);
            }
        } else {
            inode.state().times_ahead = true;
            self.delay_times(inode);
        }
        Ok(())
    }
}
