//! Where a key stands in its tree.

use super::Reader;
use crate::error::Corruption;

/// Position of a key, ordered by inode, then offset, then snapshot. What `inode` and `offset` mean is the tree's affair
/// ([`super::BtreeId`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position {
    /// Inode number, or the tree's major index (a device, for bucket trees).
    pub inode: u64,
    /// Offset in bytes, hash, bucket index: the tree's minor index.
    pub offset: u64,
    /// Snapshot, [`crate::units::SnapshotId::ROOT`] before snapshots exist; 0 in trees that hold no user data.
    pub snapshot: u32,
}

impl Position {
    /// Smallest position.
    pub const MIN: Self = Self { inode: 0, offset: 0, snapshot: 0 };
    /// Largest position.
    pub const MAX: Self = Self { inode: u64::MAX, offset: u64::MAX, snapshot: u32::MAX };
    /// Bytes of an encoded position.
    pub const ENCODED_BYTES: usize = 20;

    /// A position.
    #[must_use]
    pub const fn new(inode: u64, offset: u64, snapshot: u32) -> Self {
        Self { inode, offset, snapshot }
    }

    /// The next larger position, or `None` after [`Self::MAX`].
    #[must_use]
    pub fn successor(self) -> Option<Self> {
        if let Some(snapshot) = self.snapshot.checked_add(1) {
            return Some(Self { snapshot, ..self });
        }
        if let Some(offset) = self.offset.checked_add(1) {
            return Some(Self { offset, snapshot: 0, ..self });
        }
        self.inode.checked_add(1).map(|inode| Self { inode, offset: 0, snapshot: 0 })
    }

    /// The next smaller position, or `None` before [`Self::MIN`].
    #[must_use]
    pub fn predecessor(self) -> Option<Self> {
        if let Some(snapshot) = self.snapshot.checked_sub(1) {
            return Some(Self { snapshot, ..self });
        }
        if let Some(offset) = self.offset.checked_sub(1) {
            return Some(Self { offset, snapshot: u32::MAX, ..self });
        }
        self.inode.checked_sub(1).map(|inode| Self { inode, offset: u64::MAX, snapshot: u32::MAX })
    }

    /// Appends the encoded form.
    pub fn encode(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.inode.to_le_bytes());
        out.extend_from_slice(&self.offset.to_le_bytes());
        out.extend_from_slice(&self.snapshot.to_le_bytes());
    }

    /// Reads the encoded form.
    ///
    /// # Errors
    /// If bytes are missing.
    pub fn decode(reader: &mut Reader<'_>) -> Result<Self, Corruption> {
        Ok(Self { inode: reader.u64()?, offset: reader.u64()?, snapshot: reader.u32()? })
    }
}

impl std::fmt::Display for Position {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.snapshot {
            u32::MAX => write!(f, "{}:{}", self.inode, self.offset),
            snapshot => write!(f, "{}:{}:{snapshot}", self.inode, self.offset),
        }
    }
}
