//! Newtypes for the quantities that must not be mixed up: indexes, identifiers and log positions.
//!
//! Byte quantities are plain `u64`s whose names end in `_bytes` or say "bytes"; everything that is an *identity*
//! (a device, a bucket, an inode, a position in the log) has a type of its own here.

use std::fmt;

macro_rules! newtype {
    ($(#[$meta:meta])* $name:ident($inner:ty)) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

newtype!(
    /// Index of a member device in the superblock's member list. 0 is the only one of a single-device filesystem.
    DeviceIndex(u8)
);
newtype!(
    /// Index of a bucket on its device: bucket `i` covers bytes `[i * bucket_bytes, (i + 1) * bucket_bytes)`.
    BucketIndex(u64)
);
newtype!(
    /// Number of an inode inside its subvolume, below 2^44. The root directory is [`InodeNumber::ROOT`].
    InodeNumber(u64)
);
newtype!(
    /// Identifier of a snapshot; children have lower numbers than their parents. See [`SnapshotId::ROOT`].
    SnapshotId(u32)
);
newtype!(
    /// Sequence number of a journal record. 0 means "before the first record"; real records start at 1.
    JournalSequence(u64)
);
newtype!(
    /// Identifier of a B-tree node, never reused during the life of a filesystem. 0 is no node.
    NodeId(u64)
);

impl InodeNumber {
    /// The root directory. It is 1 because FUSE's root node id is 1, and node ids are computed from inode numbers.
    pub const ROOT: Self = Self(1);
    /// Largest inode number: the FUSE node id holds the subvolume in the 20 bits above it.
    pub const MAX: Self = Self((1 << 44) - 1);
}

impl SnapshotId {
    /// The snapshot that a new filesystem starts with. Ids are handed out downwards from it.
    pub const ROOT: Self = Self(u32::MAX);
}

impl JournalSequence {
    /// The sequence after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// Rounds `value` up to a multiple of `to`, which must not be zero; saturates at the largest multiple.
#[must_use]
pub fn round_up(value: u64, to: u64) -> u64 {
    match value % to {
        0 => value,
        rest => value.checked_add(to - rest).unwrap_or(u64::MAX - u64::MAX % to),
    }
}

/// Rounds `value` down to a multiple of `to`, which must not be zero.
#[must_use]
pub fn round_down(value: u64, to: u64) -> u64 {
    value - value % to
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_exact_at_the_edges() {
        assert_eq!(round_up(0, 4096), 0);
        assert_eq!(round_up(1, 4096), 4096);
        assert_eq!(round_up(4096, 4096), 4096);
        assert_eq!(round_up(u64::MAX, 4096), u64::MAX - 4095);
        assert_eq!(round_down(4097, 4096), 4096);
    }
}
