//! stat, chmod, chown, utimens; truncate is [`super::size`]'s. And when reading changes an access time.

use rustix::io::Errno;

use super::caller::is_privileged;
use super::inode::VfsInode;
use super::types::{Attributes, Caller, SetAttributes, SetTime};
use super::{AccessTime, Vfs};
use crate::env::Timestamp;
use crate::error::Result;
use crate::format::namespace::{FileType, Inode};
use crate::namespace::{FLAG_APPEND, FLAG_IMMUTABLE, FLAG_NOATIME};
use crate::sync::Arc;
use crate::transaction::CommitOptions;

/// A relative access time is renewed when it is older than this, in seconds.
const RELATIVE_AGE_SECONDS: i64 = 24 * 3600;
/// `O_NOATIME`.
const OPEN_NOATIME: i32 = 0o1_000_000;

const SET_UID: u32 = 0o4000;
const SET_GID: u32 = 0o2000;
const GROUP_EXECUTE: u32 = 0o010;

/// The mode of a file whose owner or content changes: without the bits that lend rights.
pub(super) fn without_set_id(mode: u32) -> u32 {
    // Without group execution the set-group-id bit is not a right that is lent: it marked mandatory locks.
    let cleared = if mode & GROUP_EXECUTE != 0 { SET_UID | SET_GID } else { SET_UID };
    mode & !cleared
}

/// The times of memory that a change of attributes touches, to be put back if it fails.
#[derive(Clone, Copy)]
pub(super) struct Times {
    access: crate::format::namespace::StoredTime,
    modification: crate::format::namespace::StoredTime,
    change: crate::format::namespace::StoredTime,
}

impl Vfs {
    /// What users see of an inode.
    pub(super) fn attributes_of(&self, inode: &VfsInode) -> Attributes {
        let unwritten_bytes =
            inode.file.as_ref().map_or(0, |file| file.pages.unwritten_blocks() * file.pages.block_bytes());
        let state = inode.state();
        let stored = &state.inode;
        Attributes {
            node: inode.number.0,
            size_bytes: inode.size(),
            blocks_of_512: (stored.allocated_bytes + unwritten_bytes).div_ceil(512),
            access_time: stored.access_time.into(),
            modification_time: stored.modification_time.into(),
            change_time: stored.change_time.into(),
            file_type: inode.file_type,
            permissions: u16::try_from(stored.mode & 0o7777).unwrap_or(0),
            link_count: stored.link_count,
            uid: stored.uid,
            gid: stored.gid,
            device_number: u32::try_from(stored.device_number).unwrap_or(u32::MAX),
            preferred_io_bytes: self.superblock.geometry.block_bytes,
            cacheable: unwritten_bytes == 0,
        }
    }

    /// Attributes of a node.
    ///
    /// # Errors
    /// `ESTALE`, and those of the media.
    pub fn get_attributes(&self, _caller: &Caller, node: u64, _handle: Option<u64>) -> Result<Attributes> {
        Ok(self.attributes_of(&*self.inode(node)?))
    }

    /// Changes attributes, all of them or none.
    ///
    /// # Errors
    /// `EPERM` for what an immutable or append-only file refuses; `EISDIR`, `EINVAL`, `EFBIG`, `ENOSPC` for sizes; those of the media.
    pub fn set_attributes(&self, caller: &Caller, node: u64, changes: &SetAttributes) -> Result<Attributes> {
        self.check_writable()?;
        let inode = self.inode(node)?;
        let lock = inode.lock.write();
        self.refuse_protected(&inode, changes)?;
        let now = self.env.now();
        let changes = if changes.size_bytes.is_some() && !is_privileged(caller) {
            // FUSE does not say whether the caller may keep them.
            let mode = changes.mode.unwrap_or_else(|| inode.state().inode.mode);
            &SetAttributes { mode: Some(without_set_id(mode)), ..*changes }
        } else {
            changes
        };
        match changes.size_bytes {
            Some(size) => self.set_size(&inode, size, changes, now)?,
            None => self.set_plain(&inode, changes, now)?,
        }
        drop(lock);
        self.settle(&inode)?;
        Ok(self.attributes_of(&inode))
    }

    fn refuse_protected(&self, inode: &VfsInode, changes: &SetAttributes) -> Result<()> {
        let flags = inode.state().inode.flags;
        let is_explicit = |time: Option<SetTime>| matches!(time, Some(SetTime::To(_)));
        let is_more_than_touch = changes.mode.is_some()
            || changes.uid.is_some()
            || changes.gid.is_some()
            || changes.size_bytes.is_some()
            || is_explicit(changes.access_time)
            || is_explicit(changes.modification_time);
        // Where the kernel keeps times, only it sends a time of change; without anything else it is what earlier writes have left to store,
        // which comes by nobody's order and cannot be refused. (A `touch -m -d` cannot be told from it.)
        let is_others = changes.mode.or(changes.uid).or(changes.gid).is_some();
        if changes.change_time.is_some() && !is_others && changes.size_bytes.is_none() && changes.access_time.is_none()
        {
            return Ok(());
        }
        if flags & FLAG_IMMUTABLE != 0 || (flags & FLAG_APPEND != 0 && is_more_than_touch) {
            return Err(Errno::PERM.into());
        }
        Ok(())
    }

    fn set_plain(&self, inode: &Arc<VfsInode>, changes: &SetAttributes, now: Timestamp) -> Result<()> {
        let before = self.set_times_in_memory(inode, changes, now, false);
        let committed = self.transactions.run(CommitOptions::default(), |transaction| {
            if let Some(mode) = changes.mode {
                self.namespace.chmod_acl(transaction, inode.number, mode & 0o777)?;
            }
            self.namespace.update_inode(transaction, inode.number, |stored| {
                apply_changes(inode, changes, stored);
                Ok(())
            })
        });
        match committed {
            Ok(committed) => {
                inode.apply(&committed.value, committed.sequence);
                Ok(())
            }
            Err(error) => {
                restore_times(inode, before);
                Err(error)
            }
        }
    }

    /// Changes the times in memory, before the transaction that stores them. Returns what they were.
    pub(super) fn set_times_in_memory(
        &self,
        inode: &VfsInode,
        changes: &SetAttributes,
        now: Timestamp,
        content_changes: bool,
    ) -> Times {
        let mut state = inode.state_for_times();
        let stored = &mut state.inode;
        let before =
            Times { access: stored.access_time, modification: stored.modification_time, change: stored.change_time };
        let time = |time: SetTime| match time {
            SetTime::To(time) => time.into(),
            SetTime::Now => now.into(),
        };
        if content_changes {
            stored.modification_time = now.into();
        }
        if let Some(access) = changes.access_time {
            stored.access_time = time(access);
        }
        if let Some(modification) = changes.modification_time {
            stored.modification_time = time(modification);
        }
        stored.change_time = changes.change_time.unwrap_or(now).into();
        before
    }

    /// Notes that an inode was read, by the mount's rule. The new time is stored later.
    pub(super) fn touch_access(&self, inode: &Arc<VfsInode>, flags: i32) {
        if self.options.read_only || flags & OPEN_NOATIME != 0 || self.options.access_time == AccessTime::Never {
            return;
        }
        let now = self.env.now();
        if inode.is_access_settled(now.seconds) {
            return;
        }
        {
            let mut state = inode.state();
            let stored = &state.inode;
            let key = |time: crate::format::namespace::StoredTime| (time.seconds, time.nanoseconds);
            let is_old = key(stored.access_time) <= key(stored.modification_time)
                || key(stored.access_time) <= key(stored.change_time)
                || now.seconds.saturating_sub(stored.access_time.seconds) >= RELATIVE_AGE_SECONDS;
            let is_wanted = self.options.access_time == AccessTime::Always || is_old;
            if stored.flags & FLAG_NOATIME != 0 || !is_wanted || key(stored.access_time) == key(now.into()) {
                if !is_wanted {
                    inode.settle_access(stored.access_time.seconds.saturating_add(RELATIVE_AGE_SECONDS));
                }
                return;
            }
            state.inode.access_time = now.into();
        }
        self.delay_times(inode);
    }
}

/// What a change of attributes does to the stored inode, with times from memory.
pub(super) fn apply_changes(inode: &VfsInode, changes: &SetAttributes, stored: &mut Inode) {
    let is_owner_changed = changes.uid.is_some() || changes.gid.is_some();
    if let Some(mode) = changes.mode {
        stored.mode = (stored.mode & !0o7777) | (mode & 0o7777);
    }
    if is_owner_changed && inode.file_type != FileType::Directory {
        stored.mode = without_set_id(stored.mode);
    }
    stored.uid = changes.uid.unwrap_or(stored.uid);
    stored.gid = changes.gid.unwrap_or(stored.gid);
    inode.store_times(stored);
}

pub(super) fn restore_times(inode: &VfsInode, before: Times) {
    let mut state = inode.state_for_times();
    state.inode.access_time = before.access;
    state.inode.modification_time = before.modification;
    state.inode.change_time = before.change;
}
