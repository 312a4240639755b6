//! Trees, keys, and how a key is packed in a bset and in a journal record.

use std::sync::Arc;

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::Position;
use crate::error::Corruption;

/// A key's value, as stored. Cheap to clone.
pub type Value = Arc<[u8]>;

/// The trees. The numbers are stored and never change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum BtreeId {
    /// File data: (inode, end of the extent in bytes, snapshot) -> [`super::extent::ExtentValue`].
    Extents = 0,
    /// (inode, 0, snapshot) -> [`super::namespace::Inode`].
    Inodes = 1,
    /// (directory inode, name hash, snapshot) -> [`super::namespace::DirentBucket`].
    Dirents = 2,
    /// (inode, name hash, snapshot) -> [`super::namespace::XattrBucket`].
    Xattrs = 3,
    /// (device, bucket, 0) -> [`super::space::Bucket`]. A bucket that was never used has no key.
    Buckets = 4,
    /// (device, bucket, 0) -> [`super::space::FreeBucket`]: free buckets that were used, or lie below the device's untouched mark.
    FreeSpace = 5,
    /// (device, bucket, 0) -> empty: emptied buckets, not yet reusable.
    NeedDiscard = 6,
    /// (device << 48 | bucket, byte in bucket << 32 | block in frame, snapshot) -> [`super::space::Backpointer`].
    Backpointers = 7,
    /// (0, inode, snapshot) -> empty: inodes with no name, to be deleted when nobody has them open, or at mount.
    Orphans = 8,
    /// (0, id, 0) -> [`super::namespace::LoggedOperation`]: long operations to be resumed at mount.
    LoggedOperations = 9,
    /// (0, subvolume, 0) -> [`super::namespace::Subvolume`].
    Subvolumes = 10,
    /// (0, snapshot, 0) -> [`super::namespace::Snapshot`].
    Snapshots = 11,
    /// (device, 0, 0) -> [`super::space::DeviceUsage`]: the untouched mark. Reserved for more of the kind.
    Devices = 12,
}

impl BtreeId {
    /// All trees, in stored order.
    pub const ALL: [Self; 13] = [
        Self::Extents,
        Self::Inodes,
        Self::Dirents,
        Self::Xattrs,
        Self::Buckets,
        Self::FreeSpace,
        Self::NeedDiscard,
        Self::Backpointers,
        Self::Orphans,
        Self::LoggedOperations,
        Self::Subvolumes,
        Self::Snapshots,
        Self::Devices,
    ];

    /// The tree with this stored number.
    ///
    /// # Errors
    /// For an unknown number.
    pub fn from_stored(stored: u8) -> Result<Self, Corruption> {
        Self::ALL
            .get(usize::from(stored))
            .copied()
            .ok_or_else(|| Corruption::new("B-tree number", format!("unknown number {stored}")))
    }

    /// Its name in messages and on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Extents => "extents",
            Self::Inodes => "inodes",
            Self::Dirents => "dirents",
            Self::Xattrs => "xattrs",
            Self::Buckets => "buckets",
            Self::FreeSpace => "free-space",
            Self::NeedDiscard => "need-discard",
            Self::Backpointers => "backpointers",
            Self::Orphans => "orphans",
            Self::LoggedOperations => "logged-operations",
            Self::Subvolumes => "subvolumes",
            Self::Snapshots => "snapshots",
            Self::Devices => "devices",
        }
    }

    /// Whether keys of this tree belong to a snapshot and are seen through the snapshot filter.
    #[must_use]
    pub const fn has_snapshots(self) -> bool {
        matches!(self, Self::Extents | Self::Inodes | Self::Dirents | Self::Xattrs)
    }
}

/// A key as it travels between layers: a position, and a value or its absence (a node-level whiteout).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    /// Where.
    pub position: Position,
    /// `None` is a whiteout: whatever stood here in an older bset is gone.
    pub value: Option<Value>,
}

/// Fixed part of a packed key: 28 bytes, then `value_bytes` bytes of value.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct PackedKeyHeader {
    inode: U64,
    offset: U64,
    snapshot: U32,
    /// Bit 0: whiteout. The rest is 0.
    flags: u8,
    reserved: [u8; 3],
    value_bytes: U32,
}

const FLAG_WHITEOUT: u8 = 1;

impl PackedKeyHeader {
    /// Bytes of the fixed part.
    pub const BYTES: usize = 28;
}

/// Bytes that a key takes when packed.
#[must_use]
pub fn packed_bytes(value: Option<&[u8]>) -> usize {
    PackedKeyHeader::BYTES + value.map_or(0, <[u8]>::len)
}

/// Appends a packed key.
pub fn pack(position: Position, value: Option<&[u8]>, out: &mut Vec<u8>) {
    let header = PackedKeyHeader {
        inode: position.inode.into(),
        offset: position.offset.into(),
        snapshot: position.snapshot.into(),
        flags: if value.is_none() { FLAG_WHITEOUT } else { 0 },
        reserved: [0; 3],
        // A value never comes near 4 GiB: nodes are at most 1 MiB.
        value_bytes: U32::new(value.map_or(0, |value| u32::try_from(value.len()).unwrap_or(u32::MAX))),
    };
    out.extend_from_slice(header.as_bytes());
    out.extend_from_slice(value.unwrap_or_default());
}

/// A packed key, looked at in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedKey<'a> {
    /// Where.
    pub position: Position,
    /// `None` is a whiteout.
    pub value: Option<&'a [u8]>,
}

/// Splits the first packed key off `bytes`: the key and the rest.
///
/// # Errors
/// If it is cut short, or has unknown flags.
pub fn unpack(bytes: &[u8]) -> Result<(PackedKey<'_>, &[u8]), Corruption> {
    let (header, rest) = PackedKeyHeader::ref_from_prefix(bytes)
        .map_err(|_| Corruption::new("packed key", format!("cut short after {} bytes", bytes.len())))?;
    if header.flags & !FLAG_WHITEOUT != 0 || header.reserved != [0; 3] {
        return Err(Corruption::new("packed key", format!("unknown flags {:#x}", header.flags)));
    }
    let position = Position::new(header.inode.get(), header.offset.get(), header.snapshot.get());
    let length = usize::try_from(header.value_bytes.get()).unwrap_or(usize::MAX);
    let (value, rest) = rest.split_at_checked(length).ok_or_else(|| {
        Corruption::new(format!("packed key {position}"), format!("value of {length} bytes, {} left", rest.len()))
    })?;
    let value = if header.flags & FLAG_WHITEOUT != 0 {
        if length != 0 {
            return Err(Corruption::new(format!("packed key {position}"), "a whiteout with a value"));
        }
        None
    } else {
        Some(value)
    };
    Ok((PackedKey { position, value }, rest))
}
