//! Directory entries: buckets of names by the hash of the name.

use rustix::io::Errno;

use super::{NAME_HASH_MAX, Namespace};
use crate::error::{Error, Result};
use crate::format::BtreeId;
use crate::format::namespace::{Dirent, DirentBucket, FileType, NAME_BYTES_MAX};
use crate::transaction::Transaction;
use crate::units::InodeNumber;

const DISCRIMINATOR_BITS: u32 = 7;
const DISCRIMINATOR_MAX: u8 = (1 << DISCRIMINATOR_BITS) - 1;

/// A position in a directory that stays valid while names come and go: `hash << 7 | discriminator`. 0 is the start, 1 and 2 are
/// "." and "..", names are above 127 and below `i64::MAX`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cookie(pub u64);

impl Cookie {
    /// Before everything.
    pub const START: Self = Self(0);
    /// Of ".".
    pub const DOT: Self = Self(1);
    /// Of "..".
    pub const DOT_DOT: Self = Self(2);

    fn new(hash: u64, discriminator: u8) -> Self {
        Self(hash << DISCRIMINATOR_BITS | u64::from(discriminator & DISCRIMINATOR_MAX))
    }

    fn hash(self) -> u64 {
        self.0 >> DISCRIMINATOR_BITS
    }
}

/// One name, as a listing gives it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Where to go on after it.
    pub cookie: Cookie,
    /// The inode.
    pub inode: InodeNumber,
    /// Its type.
    pub file_type: FileType,
    /// The name.
    pub name: Vec<u8>,
}

/// A part of a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listing {
    /// The names after the cookie that was given, in cookie order.
    pub entries: Vec<Entry>,
    /// Nothing follows.
    pub ended: bool,
}

/// Refuses what cannot be a name.
///
/// # Errors
/// `ENOENT` for the empty name, `ENAMETOOLONG`, `EINVAL`.
pub(super) fn check_name(name: &[u8]) -> Result<()> {
    if name.is_empty() {
        return Err(Errno::NOENT.into());
    }
    if name.len() > NAME_BYTES_MAX {
        return Err(Errno::NAMETOOLONG.into());
    }
    if name.contains(&b'/') || name.contains(&0) {
        return Err(Errno::INVAL.into());
    }
    Ok(())
}

pub(super) fn is_dots(name: &[u8]) -> bool {
    name == b"." || name == b".."
}

impl Namespace {
    pub(super) fn bucket(
        &self,
        transaction: &mut Transaction<'_>,
        directory: InodeNumber,
        hash: u64,
    ) -> Result<Option<DirentBucket>> {
        match self.visible(transaction, BtreeId::Dirents, directory.0, hash)? {
            Some(value) => Ok(Some(DirentBucket::decode(&value)?)),
            None => Ok(None),
        }
    }

    /// The entry with this name, not "." or "..". The directory itself is not looked at.
    ///
    /// # Errors
    /// A name that cannot be one, and those of the tree.
    pub fn lookup(
        &self,
        transaction: &mut Transaction<'_>,
        directory: InodeNumber,
        name: &[u8],
    ) -> Result<Option<Dirent>> {
        check_name(name)?;
        let bucket = self.bucket(transaction, directory, self.hash(name))?;
        Ok(bucket.and_then(|bucket| bucket.0.into_iter().find(|dirent| dirent.name == name)))
    }

    /// The entry with this name; `ENOENT` if there is none.
    pub(super) fn require(
        &self,
        transaction: &mut Transaction<'_>,
        directory: InodeNumber,
        name: &[u8],
    ) -> Result<Dirent> {
        self.lookup(transaction, directory, name)?.ok_or(Error::Posix(Errno::NOENT))
    }

    /// Adds a name; returns its hash.
    pub(super) fn insert_dirent(
        &self,
        transaction: &mut Transaction<'_>,
        directory: InodeNumber,
        name: &[u8],
        inode: InodeNumber,
        file_type: FileType,
    ) -> Result<u64> {
        check_name(name)?;
        if is_dots(name) {
            return Err(Errno::EXIST.into());
        }
        let hash = self.hash(name);
        let mut bucket = self.bucket(transaction, directory, hash)?.unwrap_or_default();
        if bucket.0.iter().any(|dirent| dirent.name == name) {
            return Err(Errno::EXIST.into());
        }
        let discriminator = bucket.0.last().map_or(Some(0), |last| last.discriminator.checked_add(1));
        let discriminator = discriminator
            .filter(|&discriminator| discriminator <= DISCRIMINATOR_MAX)
            .ok_or(Error::NoSpace("too many names with one hash"))?;
        bucket.0.push(Dirent { discriminator, file_type, inode, name: name.to_vec() });
        let value = bucket.encode();
        if value.len() > self.value_bytes_max {
            return Err(Error::NoSpace("too many names with one hash"));
        }
        self.put(transaction, BtreeId::Dirents, directory.0, hash, value);
        Ok(hash)
    }

    /// Removes a name that is there.
    pub(super) fn remove_dirent(
        &self,
        transaction: &mut Transaction<'_>,
        directory: InodeNumber,
        name: &[u8],
    ) -> Result<()> {
        let hash = self.hash(name);
        let mut bucket = self.bucket(transaction, directory, hash)?.unwrap_or_default();
        let before = bucket.0.len();
        bucket.0.retain(|dirent| dirent.name != name);
        if bucket.0.len() == before {
            return Err(Errno::NOENT.into());
        }
        if bucket.0.is_empty() {
            self.delete(transaction, BtreeId::Dirents, directory.0, hash);
        } else {
            self.put(transaction, BtreeId::Dirents, directory.0, hash, bucket.encode());
        }
        Ok(())
    }

    /// Makes a name that is there lead to another inode; its cookie stays. Returns its hash.
    pub(super) fn replace_dirent(
        &self,
        transaction: &mut Transaction<'_>,
        directory: InodeNumber,
        name: &[u8],
        inode: InodeNumber,
        file_type: FileType,
    ) -> Result<u64> {
        let hash = self.hash(name);
        let mut bucket = self.bucket(transaction, directory, hash)?.unwrap_or_default();
        let dirent = bucket.0.iter_mut().find(|dirent| dirent.name == name).ok_or(Error::Posix(Errno::NOENT))?;
        dirent.inode = inode;
        dirent.file_type = file_type;
        self.put(transaction, BtreeId::Dirents, directory.0, hash, bucket.encode());
        Ok(hash)
    }

    /// Whether the directory holds no name.
    ///
    /// # Errors
    /// Those of the tree.
    pub fn is_empty(&self, transaction: &mut Transaction<'_>, directory: InodeNumber) -> Result<bool> {
        Ok(self.visible_range(transaction, BtreeId::Dirents, directory.0, 0, 1)?.is_empty())
    }

    /// The names after `after`, from at most `limit` buckets (nearly always one name each). "." and ".." are the caller's.
    ///
    /// # Errors
    /// Those of the tree, or damage.
    pub fn list(
        &self,
        transaction: &mut Transaction<'_>,
        directory: InodeNumber,
        after: Cookie,
        limit: usize,
    ) -> Result<Listing> {
        let found = self.visible_range(transaction, BtreeId::Dirents, directory.0, after.hash(), limit)?;
        let mut ended = found.len() < limit;
        let mut entries = Vec::with_capacity(found.len());
        for (hash, value) in found {
            // No name has such a hash: only damage stands there, and no cookie could say so.
            if hash > NAME_HASH_MAX {
                ended = true;
                break;
            }
            for dirent in DirentBucket::decode(&value)?.0 {
                let cookie = Cookie::new(hash, dirent.discriminator);
                if cookie > after {
                    let Dirent { file_type, inode, name, .. } = dirent;
                    entries.push(Entry { cookie, inode, file_type, name });
                }
            }
        }
        Ok(Listing { entries, ended })
    }

    /// The name of `child` in `directory` under this hash, for paths in messages and for `..`'s way back.
    ///
    /// # Errors
    /// Those of the tree.
    pub fn name_of(
        &self,
        transaction: &mut Transaction<'_>,
        directory: InodeNumber,
        hash: u64,
        child: InodeNumber,
    ) -> Result<Option<Vec<u8>>> {
        let bucket = self.bucket(transaction, directory, hash)?.unwrap_or_default();
        Ok(bucket.0.into_iter().find(|dirent| dirent.inode == child).map(|dirent| dirent.name))
    }
}
