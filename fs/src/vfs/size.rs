//! Truncation and growth: the one change of attributes that data takes part in.
//!
//! The tree's size never covers bytes that are only in memory. So before a file grows, or is cut behind what the tree has, its delayed data is
//! committed; then the tree's size is the file's.

use rustix::io::Errno;

use super::Vfs;
use super::attributes::{apply_changes, restore_times};
use super::file::FILE_BYTES_MAX;
use super::inode::VfsInode;
use super::types::SetAttributes;
use crate::env::Timestamp;
use crate::error::{Error, Result};
use crate::format::namespace::{FileType, Inode};
use crate::pagecache::{self, Punched, WriteContext};
use crate::sync::Arc;
use crate::units::round_down;

impl Vfs {
    /// Sets a file's size, and the other attributes with it, in one transaction. The caller holds the inode lock exclusively.
    pub(super) fn set_size(
        &self,
        inode: &Arc<VfsInode>,
        size: u64,
        changes: &SetAttributes,
        now: Timestamp,
    ) -> Result<()> {
        let file = match inode.file_type {
            FileType::Regular => Self::file_of(inode)?,
            FileType::Directory => return Err(Errno::ISDIR.into()),
            _ => return Err(Errno::INVAL.into()),
        };
        if size > FILE_BYTES_MAX {
            return Err(Errno::FBIG.into());
        }
        let old_size = inode.size();
        if size > inode.state().stored_size && inode.has_dirty_pages() {
            // Writers wait for our lock, so nothing becomes dirty behind it.
            self.write_back(inode)?;
        }
        let from = size.min(old_size);
        let _shrinking = (size < old_size).then(|| inode.shrink());
        // What was collected before would bring the old size back, and what is collected now has it too, until memory has the new one.
        let _turn = self.writeback_turn(inode)?.ok_or(Error::Posix(Errno::STALE))?;
        // The last block may have to be zeroed: never refused, since truncation must work on a full filesystem.
        file.reserved.lock().merge(self.space.reserve_privileged(2 * file.pages.block_bytes()));
        let _replacing = self.replacing.read();
        let guard = file.pages.block(round_down(from, file.pages.block_bytes())..u64::MAX)?;
        let context = WriteContext {
            space: &file.pages,
            source: &file.source,
            end_of_file: old_size,
            units_per_block: 1,
            placed: &|_| {},
        };
        // What may fail comes before anything is dropped.
        let prepared = match self.data.prepare_truncation(inode.number, size) {
            Ok(prepared) => prepared,
            Err(error) => {
                self.settle_reservation(inode, None)?;
                return Err(error);
            }
        };
        let punched = pagecache::truncate(&context, &guard, from);
        self.settle_reservation(inode, punched.as_ref().ok())?;
        let _dropped = punched?;
        let before = self.set_times_in_memory(inode, changes, now, true);
        let update = |stored: &mut Inode| apply_changes(inode, changes, stored);
        self.space.test_pause();
        let outcome = self.data.truncate_prepared(inode.number, size, prepared, &update).and_then(|change| {
            let sequence = change.sequence;
            change.inode.map(|stored| (stored, sequence)).ok_or(Error::Posix(Errno::STALE))
        });
        match outcome {
            Ok((stored, sequence)) => {
                inode.set_size(size);
                inode.apply(&stored, sequence);
                inode.refresh(&stored, sequence);
                Ok(())
            }
            Err(error) => {
                restore_times(inode, before);
                // What was dropped from the cache is gone. The tree still has what it had.
                let stored_size = inode.state().stored_size;
                inode.set_size(size.max(stored_size).min(old_size));
                Err(error)
            }
        }
    }

    /// Takes what a punch has freed of the promised space, and what it did not need of its two blocks, out of the inode's account.
    pub(super) fn settle_reservation(&self, inode: &VfsInode, punched: Option<&Punched>) -> Result<()> {
        let file = Self::file_of(inode)?;
        let (dropped, used) = punched.map_or((0, 0), |punched| (punched.dropped.units, punched.newly_dirty_blocks));
        let surplus = (dropped + 2).saturating_sub(used) * file.pages.block_bytes();
        let given_back = file.reserved.lock().split(surplus);
        drop(given_back);
        Ok(())
    }
}
