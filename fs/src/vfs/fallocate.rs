//! fallocate(2): allocate (with and without growing the file), punch hole, zero range, collapse range, insert range.
//!
//! All but allocate hold the inode's lock exclusively and, for the change itself, **block** over all blocks that they touch: see
//! [`super::ranges`]. Each is one transaction, or one logged operation: after a crash it is there whole, edges included, or not at all.
//!
//! Linux does not pass collapse and insert on to FUSE daemons. They are library methods ([`Vfs::collapse_range`], [`Vfs::insert_range`]), and
//! through a mount they are *armed* by an ioctl on the handle, once, and *fired* by a fallocate that the kernel does pass on, so that the kernel itself
//! takes its inode lock, writes back, and drops its cache. The kernel drops whole pages; of a page that the range covers in part it zeroes that part, and what
//! a reader has just fetched there would be zeros from then on. So the range goes from the offset to a page boundary behind the end, by PUNCH_HOLE|KEEP_SIZE for a
//! collapse, by ZERO_RANGE|KEEP_SIZE for an insert; a second call tells the kernel the new size.

use rustix::io::Errno;

use super::Vfs;
use super::attributes::without_set_id;
use super::caller::is_privileged;
use super::file::FILE_BYTES_MAX;
use super::inode::VfsInode;
use super::types::{Caller, SetAttributes};
use crate::error::{Error, Result};
use crate::format::namespace::{FileType, Inode};
use crate::namespace::{FLAG_APPEND, FLAG_IMMUTABLE};
use crate::sync::Arc;
use crate::units::{round_down, round_up};

pub(super) const KEEP_SIZE: i32 = 1;
const PUNCH_HOLE: i32 = 2;
const COLLAPSE_RANGE: i32 = 8;
const ZERO_RANGE: i32 = 16;
const INSERT_RANGE: i32 = 32;

/// A change that the next fallocate of a handle is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Armed {
    Collapse { offset: u64, length: u64, size: u64 },
    Insert { offset: u64, length: u64, size: u64 },
}

/// Input of the ioctl that arms: what (u64: [`ARM_COLLAPSE`], [`ARM_INSERT`]), offset, length, the file's size, all little-endian.
const ARM_BYTES: usize = 32;
/// See [`super::IOCTL_ARM`].
pub const ARM_COLLAPSE: u64 = 1;
/// See [`super::IOCTL_ARM`].
pub const ARM_INSERT: u64 = 2;

impl Vfs {
    /// fallocate(2); `mode` is its mode.
    ///
    /// # Errors
    /// `EOPNOTSUPP` for modes that are not served, `ENOSPC`, `EFBIG`, `EPERM`.
    pub fn fallocate(
        &self,
        caller: &Caller,
        node: u64,
        handle: u64,
        offset: u64,
        length: u64,
        mode: i32,
    ) -> Result<()> {
        self.check_writable()?;
        let handle = self.file_handle(node, handle)?;
        let inode = &handle.inode;
        if inode.file_type != FileType::Regular {
            return Err(Errno::NODEV.into());
        }
        // Whatever comes of it: what was armed is meant for this call and for no later one.
        let armed = handle.armed.lock().take();
        if length == 0 {
            return Err(Errno::INVAL.into());
        }
        let end = offset.checked_add(length).filter(|&end| end <= FILE_BYTES_MAX).ok_or(Error::Posix(Errno::FBIG))?;
        self.clear_set_id_for(caller, inode)?;
        if let Some(armed) = armed {
            return self.fire(inode, armed, (offset, end), mode);
        }
        match mode {
            0 | KEEP_SIZE | ZERO_RANGE => {}
            _ if mode == KEEP_SIZE | PUNCH_HOLE || mode == KEEP_SIZE | ZERO_RANGE => {}
            COLLAPSE_RANGE => return self.collapse_inode(inode, offset, length, None),
            INSERT_RANGE => return self.insert_inode(inode, offset, length, None),
            _ => return Err(Errno::OPNOTSUPP.into()),
        }
        let lock = inode.lock.write();
        self.check_range_change(inode, mode & PUNCH_HOLE != 0)?;
        if mode & PUNCH_HOLE != 0 {
            self.punch(inode, offset, end)?;
        } else if mode & ZERO_RANGE != 0 {
            self.zero(inode, offset, end, mode & KEEP_SIZE != 0)?;
        } else {
            self.allocate(inode, offset, end, mode)?;
        }
        drop(lock);
        if self.is_synchronous() { self.make_durable(inode, true) } else { Ok(()) }
    }

    /// FUSE does not say whether the caller may keep the bits that lend rights, as it does for a write.
    fn clear_set_id_for(&self, caller: &Caller, inode: &Arc<VfsInode>) -> Result<()> {
        let is_lending = || {
            let mode = inode.state().inode.mode;
            without_set_id(mode) != mode
        };
        if is_privileged(caller) || !is_lending() {
            return Ok(());
        }
        let _lock = inode.lock.write();
        self.check_range_change(inode, false)?;
        self.clear_set_id(inode)
    }

    /// Fails where the content may not be changed. The caller holds the inode lock.
    pub(super) fn check_range_change(&self, inode: &VfsInode, removes: bool) -> Result<()> {
        let flags = inode.state().inode.flags;
        if flags & FLAG_IMMUTABLE != 0 || (flags & FLAG_APPEND != 0 && removes) {
            return Err(Errno::PERM.into());
        }
        Ok(())
    }

    /// Arms the handle: its next fallocate becomes what `input` says.
    pub(super) fn arm(&self, node: u64, handle: u64, input: &[u8]) -> Result<()> {
        self.check_writable()?;
        let handle = self.file_handle(node, handle)?;
        if !handle.is_writable() {
            return Err(Errno::BADF.into());
        }
        Self::file_of(&handle.inode)?;
        let input = input.first_chunk::<ARM_BYTES>().ok_or(Error::Posix(Errno::INVAL))?;
        let mut words = input.chunks_exact(8).map(|word| word.try_into().map_or(0, u64::from_le_bytes));
        let mut next = || words.next().unwrap_or(0);
        let (what, offset, length, size) = (next(), next(), next(), next());
        let armed = match what {
            ARM_COLLAPSE => Armed::Collapse { offset, length, size },
            ARM_INSERT => Armed::Insert { offset, length, size },
            _ => return Err(Errno::INVAL.into()),
        };
        *handle.armed.lock() = Some(armed);
        Ok(())
    }

    /// The fallocate that was armed for, if it is the one: the kernel has written back all from its start on, and will drop that.
    fn fire(&self, inode: &Arc<VfsInode>, armed: Armed, (start, end): (u64, u64), mode: i32) -> Result<()> {
        match armed {
            Armed::Collapse { offset, length, size }
                if mode == KEEP_SIZE | PUNCH_HOLE && start == offset && end >= size =>
            {
                self.collapse_inode(inode, offset, length, Some(size))
            }
            Armed::Insert { offset, length, size }
                if mode == KEEP_SIZE | ZERO_RANGE && start == offset && end >= size =>
            {
                self.insert_inode(inode, offset, length, Some(size))
            }
            _ => Err(Errno::INVAL.into()),
        }
    }

    /// Bytes of the range (whole blocks) that neither data nor an earlier fallocate holds.
    pub(super) fn missing_bytes(&self, inode: &VfsInode, start: u64, end: u64) -> Result<u64> {
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
        let reservation = self.admit(|| self.space.reserve_unwritten(missing_bytes))?;
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
}
