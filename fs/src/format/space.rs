//! Values of the trees that say where space is.

use super::{BtreeId, Position, Reader};
use crate::error::Corruption;

/// What a bucket holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum BucketState {
    /// Nothing; may be opened. It has a key in the free-space tree.
    Free = 0,
    /// File data: the count is above 0.
    Data = 1,
    /// B-tree nodes; which slots are in use is in the node-space map.
    Metadata = 2,
    /// Nothing since the transaction that emptied it; it has a key in the need-discard tree.
    NeedDiscard = 3,
    /// Superblock, journal or checkpoint area. Never changes.
    Reserved = 4,
}

/// Value in the buckets tree: 16 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bucket {
    /// What it holds.
    pub state: BucketState,
    /// Goes up each time that the bucket is emptied.
    pub generation: u32,
    /// Bytes that extents pointing here are charged with; may exceed the bucket's size where frames are partly live.
    pub charged_bytes: u64,
}

impl Bucket {
    /// A bucket that was never used: what a missing key means.
    pub const UNUSED: Self = Self { state: BucketState::Free, generation: 0, charged_bytes: 0 };

    /// The stored form.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![self.state as u8, 0, 0, 0];
        out.extend_from_slice(&self.generation.to_le_bytes());
        out.extend_from_slice(&self.charged_bytes.to_le_bytes());
        out
    }

    /// Decodes a stored value.
    ///
    /// # Errors
    /// If it is not one.
    pub fn decode(bytes: &[u8]) -> Result<Self, Corruption> {
        let mut reader = Reader::new("bucket", bytes);
        let state = match reader.u8()? {
            0 => BucketState::Free,
            1 => BucketState::Data,
            2 => BucketState::Metadata,
            3 => BucketState::NeedDiscard,
            4 => BucketState::Reserved,
            other => return Err(reader.problem(format!("unknown state {other}"))),
        };
        if reader.bytes(3)? != [0; 3] {
            return Err(reader.problem("unknown flags"));
        }
        let bucket = Self { state, generation: reader.u32()?, charged_bytes: reader.u64()? };
        reader.finish()?;
        Ok(bucket)
    }
}

/// Value in the free-space tree: 1 byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FreeBucket {
    /// Whether the host has been told that the bucket is free (or it was never written).
    pub discarded: bool,
}

impl FreeBucket {
    /// The stored form.
    #[must_use]
    pub fn encode(self) -> Vec<u8> {
        vec![u8::from(self.discarded)]
    }

    /// Decodes a stored value.
    ///
    /// # Errors
    /// If it is not one.
    pub fn decode(bytes: &[u8]) -> Result<Self, Corruption> {
        match bytes {
            [0] => Ok(Self { discarded: false }),
            [1] => Ok(Self { discarded: true }),
            _ => Err(Corruption::new("free bucket", format!("{} bytes, unknown", bytes.len()))),
        }
    }
}

/// Value in the backpointers tree: which key points into the bucket here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backpointer {
    /// Tree of the key.
    pub btree: BtreeId,
    /// Bytes on disk that start at the backpointer's place.
    pub disk_bytes: u32,
    /// The key.
    pub position: Position,
}

impl Backpointer {
    /// The stored form.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![self.btree as u8];
        out.extend_from_slice(&self.disk_bytes.to_le_bytes());
        self.position.encode(&mut out);
        out
    }

    /// Decodes a stored value.
    ///
    /// # Errors
    /// If it is not one.
    pub fn decode(bytes: &[u8]) -> Result<Self, Corruption> {
        let mut reader = Reader::new("backpointer", bytes);
        let btree = BtreeId::from_stored(reader.u8()?)?;
        let disk_bytes = reader.u32()?;
        let position = Position::decode(&mut reader)?;
        reader.finish()?;
        Ok(Self { btree, disk_bytes, position })
    }
}

/// Value in the devices tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceUsage {
    /// Buckets from here on that have no key in the buckets tree were never used and are free, and have no key in the free-space tree either;
    /// but for the reserved ones of the superblock's layout. (Nodes may claim buckets above the mark, for the upper half of the device.)
    pub untouched_from: u64,
}

impl DeviceUsage {
    /// The stored form.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        self.untouched_from.to_le_bytes().to_vec()
    }

    /// Decodes a stored value.
    ///
    /// # Errors
    /// If it is not one.
    pub fn decode(bytes: &[u8]) -> Result<Self, Corruption> {
        let mut reader = Reader::new("device usage", bytes);
        let usage = Self { untouched_from: reader.u64()? };
        reader.finish()?;
        Ok(usage)
    }
}
