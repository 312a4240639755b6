//! Inodes that have lost their last name: kept while somebody has them open, deleted in bounded steps after that or at mount.

use super::Namespace;
use crate::error::{Error, Result};
use crate::format::{BtreeId, Position};
use crate::transaction::Transaction;
use crate::units::InodeNumber;

/// Extended-attribute buckets that one step of a deletion removes.
const XATTR_STEP: usize = 64;

impl Namespace {
    fn orphan_position(&self, number: InodeNumber) -> Position {
        Position::new(0, number.0, self.snapshot.0)
    }

    pub(super) fn add_orphan(&self, transaction: &mut Transaction<'_>, number: InodeNumber) {
        transaction.put(BtreeId::Orphans, self.orphan_position(number), Vec::new());
    }

    /// The first `limit` orphans from `from` on.
    ///
    /// # Errors
    /// Those of the tree.
    pub fn orphans(
        &self,
        transaction: &mut Transaction<'_>,
        from: InodeNumber,
        limit: usize,
    ) -> Result<Vec<InodeNumber>> {
        let (from, to) = (Position::new(0, from.0, 0), Position::new(0, u64::MAX, u32::MAX));
        let found = transaction.range(BtreeId::Orphans, from, to, limit)?;
        Ok(found.into_iter().map(|(position, _)| InodeNumber(position.offset)).collect())
    }

    /// Whether an inode is noted for deletion where such notes stand.
    ///
    /// # Errors
    /// Those of the tree.
    pub fn is_orphan(&self, transaction: &mut Transaction<'_>, number: InodeNumber) -> Result<bool> {
        Ok(transaction.get(BtreeId::Orphans, self.orphan_position(number))?.is_some())
    }

    /// One step of deleting an orphan whose extents are gone: some of its attributes, or in the last one the inode and its
    /// orphan key. Returns whether more is to be done. An inode that is gone or has a name is left alone.
    ///
    /// # Errors
    /// [`Error::Corrupt`] if extents are left; those of the tree.
    pub fn delete_orphan_step(&self, transaction: &mut Transaction<'_>, number: InodeNumber) -> Result<bool> {
        let Some(inode) = self.inode(transaction, number)? else {
            transaction.delete(BtreeId::Orphans, self.orphan_position(number));
            return Ok(false);
        };
        if inode.link_count != 0 {
            transaction.delete(BtreeId::Orphans, self.orphan_position(number));
            return Ok(false);
        }
        let xattrs = self.visible_range(transaction, BtreeId::Xattrs, number.0, 0, XATTR_STEP)?;
        for (hash, _) in &xattrs {
            self.delete(transaction, BtreeId::Xattrs, number.0, *hash);
        }
        if xattrs.len() == XATTR_STEP {
            return Ok(true);
        }
        if !self.visible_range(transaction, BtreeId::Extents, number.0, 0, 1)?.is_empty() {
            // The caller has cut it to nothing: what is left cannot be where it is.
            let problem = "extents of it lie where none of its size can";
            return Err(Error::corrupt(format!("inode {number}, which is to be deleted"), problem));
        }
        self.delete_inode_key(transaction, number);
        transaction.delete(BtreeId::Orphans, self.orphan_position(number));
        Ok(false)
    }
}
