//! Extended attributes: buckets of attributes by the hash of the name, so that one of them is one lookup.
//!
//! POSIX ACLs are attributes too (`system.posix_acl_access`, `system.posix_acl_default`, in the kernel's own encoding); the access
//! ACL and the permission bits are kept equal where they overlap.

use rustix::io::Errno;

use super::{Changed, Namespace, acl};
use crate::env::Timestamp;
use crate::error::{Error, Result};
use crate::format::BtreeId;
use crate::format::namespace::{FileType, NAME_BYTES_MAX, Xattr, XattrBucket};
use crate::transaction::Transaction;
use crate::units::InodeNumber;

/// setxattr's `XATTR_CREATE`: fail if it is there.
pub const XATTR_CREATE: i32 = 1;
/// setxattr's `XATTR_REPLACE`: fail if it is not.
pub const XATTR_REPLACE: i32 = 2;

/// Longest value that Linux passes on.
const VALUE_BYTES_MAX: usize = 64 << 10;
/// Buckets that a listing reads at a time.
const LISTING_STEP: usize = 32;
const PREFIXES: [&[u8]; 3] = [b"user.", b"trusted.", b"security."];

fn check_name(name: &[u8]) -> Result<()> {
    if name == acl::ACCESS || name == acl::DEFAULT {
        return Ok(());
    }
    match PREFIXES.iter().find_map(|prefix| name.strip_prefix(*prefix)) {
        None => Err(Errno::OPNOTSUPP.into()),
        Some([]) => Err(Errno::INVAL.into()),
        Some(_) if name.len() > NAME_BYTES_MAX => Err(Errno::RANGE.into()),
        Some(_) => Ok(()),
    }
}

impl Namespace {
    fn xattr_bucket(
        &self,
        transaction: &mut Transaction<'_>,
        number: InodeNumber,
        hash: u64,
    ) -> Result<Option<XattrBucket>> {
        match self.visible(transaction, BtreeId::Xattrs, number.0, hash)? {
            Some(value) => Ok(Some(XattrBucket::decode(&value)?)),
            None => Ok(None),
        }
    }

    /// The value of an attribute, if it is there.
    ///
    /// # Errors
    /// `EOPNOTSUPP` for a name of no known kind; those of the tree.
    pub fn xattr(
        &self,
        transaction: &mut Transaction<'_>,
        number: InodeNumber,
        name: &[u8],
    ) -> Result<Option<Vec<u8>>> {
        check_name(name)?;
        let bucket = self.xattr_bucket(transaction, number, self.hash(name))?.unwrap_or_default();
        Ok(bucket.0.into_iter().find(|xattr| xattr.name == name).map(|xattr| xattr.value))
    }

    /// Names of the attributes that `is_shown` accepts, each with a NUL after it. Takes memory for a few values, however many there are.
    ///
    /// # Errors
    /// `E2BIG` if they take more than `bytes_max`; those of the tree.
    pub fn xattr_names(
        &self,
        transaction: &mut Transaction<'_>,
        number: InodeNumber,
        is_shown: impl Fn(&[u8]) -> bool,
        bytes_max: usize,
    ) -> Result<Vec<u8>> {
        let mut names = Vec::new();
        let mut from = Some(0);
        while let Some(offset) = from {
            let found = self.visible_range(transaction, BtreeId::Xattrs, number.0, offset, LISTING_STEP)?;
            from = found.last().filter(|_| found.len() == LISTING_STEP).and_then(|(hash, _)| hash.checked_add(1));
            for (_, value) in found {
                for xattr in XattrBucket::decode(&value)?.0.into_iter().filter(|xattr| is_shown(&xattr.name)) {
                    names.extend_from_slice(&xattr.name);
                    names.push(0);
                }
                if names.len() > bytes_max {
                    return Err(Errno::TOOBIG.into());
                }
            }
        }
        Ok(names)
    }

    /// Stages an attribute with no look at flags and types.
    pub(super) fn put_xattr(
        &self,
        transaction: &mut Transaction<'_>,
        number: InodeNumber,
        name: &[u8],
        value: &[u8],
    ) -> Result<()> {
        let hash = self.hash(name);
        let mut bucket = self.xattr_bucket(transaction, number, hash)?.unwrap_or_default();
        match bucket.0.iter_mut().find(|xattr| xattr.name == name) {
            Some(xattr) => xattr.value = value.to_vec(),
            None => bucket.0.push(Xattr { name: name.to_vec(), value: value.to_vec() }),
        }
        let encoded = bucket.encode();
        if encoded.len() > self.value_bytes_max {
            return Err(Error::NoSpace("the extended attribute does not fit into a key"));
        }
        self.put(transaction, BtreeId::Xattrs, number.0, hash, encoded);
        Ok(())
    }

    /// Stages the removal of an attribute, whatever the file's flags; returns whether it was there.
    ///
    /// # Errors
    /// Those of the tree.
    pub fn drop_xattr(&self, transaction: &mut Transaction<'_>, number: InodeNumber, name: &[u8]) -> Result<bool> {
        let hash = self.hash(name);
        let Some(mut bucket) = self.xattr_bucket(transaction, number, hash)? else { return Ok(false) };
        let before = bucket.0.len();
        bucket.0.retain(|xattr| xattr.name != name);
        if bucket.0.len() == before {
            return Ok(false);
        }
        if bucket.0.is_empty() {
            self.delete(transaction, BtreeId::Xattrs, number.0, hash);
        } else {
            self.put(transaction, BtreeId::Xattrs, number.0, hash, bucket.encode());
        }
        Ok(true)
    }

    /// Sets an attribute. Setting the access ACL sets the permission bits, and clears the set-group-id bit if `clear_set_gid`
    /// (the caller is neither privileged nor in the file's group).
    ///
    /// # Errors
    /// `EEXIST` and `ENODATA` by `flags`; `EOPNOTSUPP`, `EINVAL` for the name or an ACL; `E2BIG` beyond 64 KiB, `ENOSPC` beyond
    /// what fits into a key; `EPERM` on an immutable or append-only file; those of the tree.
    pub fn set_xattr(
        &self,
        transaction: &mut Transaction<'_>,
        number: InodeNumber,
        name: &[u8],
        value: &[u8],
        flags: i32,
        clear_set_gid: bool,
        now: Timestamp,
    ) -> Result<Changed> {
        check_name(name)?;
        if flags & !(XATTR_CREATE | XATTR_REPLACE) != 0 {
            return Err(Errno::INVAL.into());
        }
        if value.len() > VALUE_BYTES_MAX {
            return Err(Errno::TOOBIG.into());
        }
        let mut inode = self.live_inode(transaction, number)?;
        super::operations::refuse_protected(&inode)?;
        let is_there = self.xattr(transaction, number, name)?.is_some();
        if flags & XATTR_CREATE != 0 && is_there {
            return Err(Errno::EXIST.into());
        }
        if flags & XATTR_REPLACE != 0 && !is_there {
            return Err(Errno::NODATA.into());
        }
        let mut keep = true;
        if name == acl::ACCESS || name == acl::DEFAULT {
            if inode.file_type() == Some(FileType::Symlink) {
                return Err(Errno::OPNOTSUPP.into());
            }
            let list = acl::decode(value)?;
            if name == acl::DEFAULT {
                if inode.file_type() != Some(FileType::Directory) {
                    return Err(Errno::ACCESS.into());
                }
                keep = !list.is_empty();
            } else if list.is_empty() {
                keep = false;
            } else {
                let (permissions, is_exact) = acl::permissions(&list);
                inode.mode = (inode.mode & !0o777) | permissions;
                if clear_set_gid {
                    inode.mode &= !0o2000;
                }
                keep = !is_exact;
            }
        }
        if keep {
            self.put_xattr(transaction, number, name, value)?;
        } else {
            self.drop_xattr(transaction, number, name)?;
        }
        inode.change_time = now.into();
        self.put_inode(transaction, number, &inode)?;
        Ok(Changed::from_iter([(number, inode)]))
    }

    /// Removes an attribute.
    ///
    /// # Errors
    /// `ENODATA`; as [`Self::set_xattr`].
    pub fn remove_xattr(
        &self,
        transaction: &mut Transaction<'_>,
        number: InodeNumber,
        name: &[u8],
        now: Timestamp,
    ) -> Result<Changed> {
        check_name(name)?;
        let mut inode = self.live_inode(transaction, number)?;
        super::operations::refuse_protected(&inode)?;
        if !self.drop_xattr(transaction, number, name)? {
            return Err(Errno::NODATA.into());
        }
        inode.change_time = now.into();
        self.put_inode(transaction, number, &inode)?;
        Ok(Changed::from_iter([(number, inode)]))
    }

    /// Makes the access ACL, if there is one, follow a chmod.
    ///
    /// # Errors
    /// Damage, and those of the tree.
    pub fn chmod_acl(&self, transaction: &mut Transaction<'_>, number: InodeNumber, permissions: u32) -> Result<()> {
        if let Some(value) = self.xattr(transaction, number, acl::ACCESS)? {
            let mut list = acl::decode(&value)?;
            acl::change_permissions(&mut list, permissions);
            self.put_xattr(transaction, number, acl::ACCESS, &acl::encode(&list))?;
        }
        Ok(())
    }
}
