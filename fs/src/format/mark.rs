//! The mark of a rebuild that is under way: nodes of its epoch are not evidence.
//!
//! A rebuild writes nodes of an epoch of its own before anything is published, and may give names another hash than the nodes that it
//! reads from: half of its work mixed with the old nodes would be wrong. The mark is durable before its first node, and is taken away when its last
//! one is durable. It takes [`MARK_BYTES`] at [`MARK_OFFSET`] of the first block of the device, and at the start of the block behind the middle copy of the superblock,
//! where buckets are so large that this belongs to the copy's.

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::checksum::metadata_checksum;
use super::superblock::{SUPERBLOCK_BYTES, copy_offsets};

/// First bytes of a mark.
pub const MARK_MAGIC: u64 = u64::from_le_bytes(*b"coppRBLD");
/// Bytes of a mark.
pub const MARK_BYTES: usize = size_of::<RawMark>();
/// Where the mark is in the first block of the device.
pub const MARK_OFFSET: usize = 3072;
/// Smallest bucket that holds the second mark together with the middle copy of the superblock.
pub const SECOND_MARK_BUCKET_BYTES: u32 = 32 << 10;

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawMark {
    magic: U64,
    filesystem: [u8; 16],
    epoch: U64,
    checksum: U32,
}

/// Blocks of 4096 bytes that may hold a mark: offset on the device, and offset of the mark in the block.
#[must_use]
pub fn mark_places(device_bytes: u64) -> [(u64, usize); 2] {
    let [_, middle, _] = copy_offsets(device_bytes);
    [(0, MARK_OFFSET), (middle + SUPERBLOCK_BYTES as u64, 0)]
}

/// Which nodes are not evidence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RebuildMark {
    /// Id of the filesystem.
    pub filesystem: uuid::Uuid,
    /// Epoch of the nodes of the unfinished rebuild.
    pub epoch: u64,
}

impl RebuildMark {
    /// The stored form, [`MARK_BYTES`] long.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut raw = RawMark {
            magic: MARK_MAGIC.into(),
            filesystem: *self.filesystem.as_bytes(),
            epoch: self.epoch.into(),
            checksum: U32::ZERO,
        };
        raw.checksum = metadata_checksum(&[raw.as_bytes()]).into();
        raw.as_bytes().to_vec()
    }

    /// The mark at the start of `bytes`, if there is a whole one.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (raw, _) = RawMark::read_from_prefix(bytes).ok()?;
        let zeroed = RawMark { checksum: U32::ZERO, ..raw };
        let is_whole = raw.magic.get() == MARK_MAGIC && metadata_checksum(&[zeroed.as_bytes()]) == raw.checksum.get();
        is_whole.then(|| Self { filesystem: uuid::Uuid::from_bytes(raw.filesystem), epoch: raw.epoch.get() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_known_again_and_a_torn_one_is_none() {
        let mark = RebuildMark { filesystem: uuid::Uuid::from_u128(7), epoch: 1002 };
        let mut bytes = mark.encode();
        assert_eq!(bytes.len(), MARK_BYTES);
        assert_eq!(RebuildMark::decode(&bytes), Some(mark));
        assert_eq!(RebuildMark::decode(&bytes[..MARK_BYTES - 1]), None);
        bytes[25] ^= 1;
        assert_eq!(RebuildMark::decode(&bytes), None);
    }
}
