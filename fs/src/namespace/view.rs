//! Keys of the subvolume's trees as its snapshot sees them: the only place here that knows positions.

use super::Namespace;
use crate::error::Result;
use crate::format::{BtreeId, Position, Value};
use crate::transaction::Transaction;
use crate::units::{InodeNumber, SnapshotId};

impl Namespace {
    fn position(&self, inode: u64, offset: u64) -> Position {
        Position::new(inode, offset, self.snapshot.0)
    }

    /// The visible value at (inode, offset).
    pub(super) fn visible(
        &self,
        transaction: &mut Transaction<'_>,
        btree: BtreeId,
        inode: u64,
        offset: u64,
    ) -> Result<Option<Value>> {
        let found = self.snapshots.visible(transaction, btree, InodeNumber(inode), offset, self.snapshot)?;
        Ok(found.map(|(_, value)| value))
    }

    /// The first `limit` visible keys of `inode` from `offset` on, ascending.
    pub(super) fn visible_range(
        &self,
        transaction: &mut Transaction<'_>,
        btree: BtreeId,
        inode: u64,
        offset: u64,
        limit: usize,
    ) -> Result<Vec<(u64, Value)>> {
        let (first, last) = (self.position(inode, offset), self.position(inode, u64::MAX));
        if self.snapshot == SnapshotId::ROOT {
            // The root of the snapshots sees its own keys only, and nothing stands above them: one scan.
            let keys = transaction.range(btree, first, last, limit)?;
            return Ok(keys.into_iter().map(|(position, value)| (position.offset, value)).collect());
        }
        let mut found = Vec::new();
        let mut from = Some(first);
        while let Some(first) = from {
            if found.len() >= limit {
                break;
            }
            from = match self.snapshots.next_visible(transaction, btree, first, last, self.snapshot)? {
                Some((position, value)) => {
                    found.push((position.offset, value));
                    position.offset.checked_add(1).map(|offset| self.position(inode, offset))
                }
                None => None,
            };
        }
        Ok(found)
    }

    pub(super) fn put(
        &self,
        transaction: &mut Transaction<'_>,
        btree: BtreeId,
        inode: u64,
        offset: u64,
        value: Vec<u8>,
    ) {
        transaction.put(btree, self.position(inode, offset), value);
    }

    pub(super) fn delete(&self, transaction: &mut Transaction<'_>, btree: BtreeId, inode: u64, offset: u64) {
        transaction.delete(btree, self.position(inode, offset));
    }
}
