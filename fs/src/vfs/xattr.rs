//! Extended attributes.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use rustix::io::Errno;

use super::Vfs;
use super::caller::{is_in_group, is_privileged};
use super::inode::VfsInode;
use super::types::Caller;
use crate::error::{Error, Result};
use crate::namespace::{Changed, acl};
use crate::sync::Arc;
use crate::transaction::{CommitOptions, Committed};

/// A read-only attribute with the time of creation, which FUSE has no other way for: seconds, a point, nanoseconds.
const BIRTH_TIME: &[u8] = b"user.coppice.birth_time";
/// The attribute by which a file lends capabilities to who runs it.
const CAPABILITIES: &[u8] = b"security.capability";
const NAMES_BYTES_MAX: usize = 64 << 10;

impl Vfs {
    /// Sets an extended attribute. `flags` are setxattr(2)'s.
    ///
    /// # Errors
    /// `EEXIST`, `ENODATA`, `E2BIG`, `ENOSPC`, `EOPNOTSUPP`, `EPERM`.
    pub fn set_xattr(&self, caller: &Caller, node: u64, name: &OsStr, value: &[u8], flags: i32) -> Result<()> {
        self.check_writable()?;
        let name = name.as_bytes();
        if name == BIRTH_TIME {
            return Err(Errno::PERM.into());
        }
        let inode = self.inode(node)?;
        let key_bytes = value.len() as u64 + super::names::ADMISSION_BYTES;
        let _admission = self.admit(|| self.space.reserve_metadata(key_bytes))?;
        let group_matters = name == acl::ACCESS && !is_privileged(caller) && inode.state().inode.mode & 0o2000 != 0;
        let gid = inode.state().inode.gid;
        let clear_set_gid = group_matters && !is_in_group(caller, gid);
        let now = self.env.now();
        self.change_xattrs(&inode, &mut |transaction| {
            self.namespace.set_xattr(transaction, inode.number, name, value, flags, clear_set_gid, now)
        })
    }

    fn change_xattrs(
        &self,
        inode: &Arc<VfsInode>,
        body: &mut dyn FnMut(&mut crate::transaction::Transaction<'_>) -> Result<Changed>,
    ) -> Result<()> {
        let lock = inode.lock.write();
        let Committed { value: changed, sequence } =
            self.transactions.run(CommitOptions::default(), |transaction| body(transaction))?;
        for (_, stored) in &changed {
            inode.apply(stored, sequence);
        }
        inode.set_lends_no_capabilities(false);
        drop(lock);
        self.settle(inode)
    }

    /// Takes the capabilities off that a file lends to who runs it, before its content is changed. The kernel does so itself where it caches the file's data.
    ///
    /// # Errors
    /// Those of the commit.
    pub(super) fn drop_capabilities(&self, inode: &Arc<VfsInode>) -> Result<()> {
        if inode.lends_no_capabilities() {
            return Ok(());
        }
        {
            let _lock = inode.lock.read();
            match self.namespace.xattr(&mut self.transactions.read(), inode.number, CAPABILITIES) {
                Ok(None) => {
                    inode.set_lends_no_capabilities(true);
                    return Ok(());
                }
                Ok(Some(_)) => {}
                // What cannot be read lends nothing either.
                Err(_) => return Ok(()),
            }
        }
        let _lock = inode.lock.write();
        let committed = self.transactions.run(CommitOptions::default(), |transaction| {
            self.namespace.drop_xattr(transaction, inode.number, CAPABILITIES)
        })?;
        inode.committed(committed.sequence);
        Ok(())
    }

    /// Value of an extended attribute.
    ///
    /// # Errors
    /// `ENODATA`, `EOPNOTSUPP`.
    pub fn get_xattr(&self, _caller: &Caller, node: u64, name: &OsStr) -> Result<Vec<u8>> {
        let inode = self.inode(node)?;
        if name.as_bytes() == BIRTH_TIME {
            let time = inode.state().inode.birth_time;
            return Ok(format!("{}.{:09}", time.seconds, time.nanoseconds).into_bytes());
        }
        let mut transaction = self.transactions.read();
        let value = self.namespace.xattr(&mut transaction, inode.number, name.as_bytes())?;
        value.ok_or(Error::Posix(Errno::NODATA))
    }

    /// Names of the extended attributes, each with a NUL after it. `trusted.` ones are root's to see.
    ///
    /// # Errors
    /// `E2BIG` if they are more than Linux passes on; those of the media.
    pub fn list_xattrs(&self, caller: &Caller, node: u64) -> Result<Vec<u8>> {
        let inode = self.inode(node)?;
        let is_shown = |name: &[u8]| is_privileged(caller) || !name.starts_with(b"trusted.");
        self.namespace.xattr_names(&mut self.transactions.read(), inode.number, is_shown, NAMES_BYTES_MAX)
    }

    /// Removes an extended attribute.
    ///
    /// # Errors
    /// `ENODATA`, `EOPNOTSUPP`, `EPERM`.
    pub fn remove_xattr(&self, _caller: &Caller, node: u64, name: &OsStr) -> Result<()> {
        self.check_writable()?;
        let inode = self.inode(node)?;
        let now = self.env.now();
        self.change_xattrs(&inode, &mut |transaction| {
            self.namespace.remove_xattr(transaction, inode.number, name.as_bytes(), now)
        })
    }
}
