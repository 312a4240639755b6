//! B-tree nodes on disk: a header, then bsets, each with its own checksum and chained to the one before.
//!
//! A node lies in a *slot* of `node_bytes`. The header takes the first [`HEADER_BYTES`]; the first bset follows it at once, later
//! ones start on multiples of [`APPEND_ALIGNMENT_BYTES`], so that a torn append cannot touch published bytes. A [`NodePointer`] says how many bytes are
//! published and the checksum of the last bset, which covers (through the chain) all before it.

use smallvec::SmallVec;
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::checksum::metadata_checksum;
use super::{BtreeId, Position, Reader};
use crate::error::Corruption;
use crate::units::{DeviceIndex, JournalSequence, NodeId};

/// First bytes of a node's slot.
pub const NODE_MAGIC: u64 = u64::from_le_bytes(*b"coppNODE");
/// First bytes of a bset.
pub const BSET_MAGIC: u32 = u32::from_le_bytes(*b"BSET");
/// Bytes from the start of a slot to the first bset.
pub const HEADER_BYTES: usize = 128;
/// Where appended bsets start: at least a physical block.
pub const APPEND_ALIGNMENT_BYTES: usize = 4096;

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawPosition {
    inode: U64,
    offset: U64,
    snapshot: U32,
}

impl From<Position> for RawPosition {
    fn from(position: Position) -> Self {
        Self { inode: position.inode.into(), offset: position.offset.into(), snapshot: position.snapshot.into() }
    }
}

impl From<RawPosition> for Position {
    fn from(raw: RawPosition) -> Self {
        Self::new(raw.inode.get(), raw.offset.get(), raw.snapshot.get())
    }
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawNodeHeader {
    magic: U64,
    filesystem: [u8; 16],
    node: U64,
    address: U64,
    newest_sequence: U64,
    minimum: RawPosition,
    /// Exclusive; all ones in `unbounded` means no upper bound.
    limit: RawPosition,
    device: u8,
    btree: u8,
    level: u8,
    unbounded: u8,
    reserved: [u8; 32],
    checksum: U32,
}

const _: () = assert!(size_of::<RawNodeHeader>() == HEADER_BYTES);

/// Header of a node, which makes it recognisable by a scan of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeHeader {
    /// The filesystem's id.
    pub filesystem: uuid::Uuid,
    /// The node's id.
    pub node: NodeId,
    /// Device that this copy lies on.
    pub device: DeviceIndex,
    /// Byte address of the slot on the device.
    pub address: u64,
    /// Tree.
    pub btree: BtreeId,
    /// 0 for leaves.
    pub level: u8,
    /// Newest journal sequence in the first bset.
    pub newest_sequence: JournalSequence,
    /// Smallest position that may be in the node.
    pub minimum: Position,
    /// First position beyond the node; `None` for no bound. The parent may give a smaller range: it wins.
    pub limit: Option<Position>,
}

impl NodeHeader {
    /// The header's bytes, [`HEADER_BYTES`] long.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut raw = RawNodeHeader {
            magic: NODE_MAGIC.into(),
            filesystem: *self.filesystem.as_bytes(),
            node: self.node.0.into(),
            address: self.address.into(),
            newest_sequence: self.newest_sequence.0.into(),
            minimum: self.minimum.into(),
            limit: self.limit.unwrap_or(Position::MAX).into(),
            device: self.device.0,
            btree: self.btree as u8,
            level: self.level,
            unbounded: u8::from(self.limit.is_none()),
            reserved: [0; 32],
            checksum: U32::ZERO,
        };
        raw.checksum = metadata_checksum(&[raw.as_bytes()]).into();
        let mut bytes = raw.as_bytes().to_vec();
        bytes.resize(HEADER_BYTES, 0);
        bytes
    }

    /// Reads a header from the start of a slot.
    ///
    /// # Errors
    /// If it is not one, or its checksum is wrong.
    pub fn decode(bytes: &[u8]) -> Result<Self, Corruption> {
        let (raw, _) = RawNodeHeader::read_from_prefix(bytes)
            .map_err(|_| Corruption::new("node header", format!("cut short: {} bytes", bytes.len())))?;
        if raw.magic.get() != NODE_MAGIC {
            return Err(Corruption::new("node header", format!("no magic number: {:#x}", raw.magic.get())));
        }
        let zeroed = RawNodeHeader { checksum: U32::ZERO, ..raw };
        let computed = metadata_checksum(&[zeroed.as_bytes()]);
        if computed != raw.checksum.get() {
            let problem = format!("checksum {computed:#x}, {:#x} stored", raw.checksum.get());
            return Err(Corruption::new("node header", problem));
        }
        if raw.unbounded > 1 {
            return Err(Corruption::new("node header", format!("unknown bound {}", raw.unbounded)));
        }
        Ok(Self {
            filesystem: uuid::Uuid::from_bytes(raw.filesystem),
            node: NodeId(raw.node.get()),
            device: DeviceIndex(raw.device),
            address: raw.address.get(),
            btree: BtreeId::from_stored(raw.btree)?,
            level: raw.level,
            newest_sequence: JournalSequence(raw.newest_sequence.get()),
            minimum: raw.minimum.into(),
            limit: (raw.unbounded == 0).then(|| raw.limit.into()),
        })
    }
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawBsetHeader {
    magic: U32,
    index: U16,
    reserved: U16,
    node: U64,
    previous_checksum: U32,
    key_count: U32,
    payload_bytes: U32,
    checksum: U32,
    newest_sequence: U64,
}

/// Header of a bset: the node that it belongs to, its place in the chain, and how much follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BsetHeader {
    /// The node.
    pub node: NodeId,
    /// 0 for the first bset of the node.
    pub index: u16,
    /// Checksum of the bset before; 0 for the first.
    pub previous_checksum: u32,
    /// Number of packed keys, in ascending order of position.
    pub key_count: u32,
    /// Bytes of packed keys after the header.
    pub payload_bytes: u32,
    /// Newest journal sequence of its keys.
    pub newest_sequence: JournalSequence,
}

impl BsetHeader {
    /// Bytes of a bset's header.
    pub const BYTES: usize = 40;

    /// The whole bset, header and payload, and its checksum.
    #[must_use]
    pub fn encode(&self, payload: &[u8]) -> (Vec<u8>, u32) {
        let mut raw = RawBsetHeader {
            magic: BSET_MAGIC.into(),
            index: self.index.into(),
            reserved: U16::ZERO,
            node: self.node.0.into(),
            previous_checksum: self.previous_checksum.into(),
            key_count: self.key_count.into(),
            payload_bytes: self.payload_bytes.into(),
            checksum: U32::ZERO,
            newest_sequence: self.newest_sequence.0.into(),
        };
        let checksum = metadata_checksum(&[raw.as_bytes(), payload]);
        raw.checksum = checksum.into();
        let mut bytes = Vec::with_capacity(Self::BYTES + payload.len());
        bytes.extend_from_slice(raw.as_bytes());
        bytes.extend_from_slice(payload);
        (bytes, checksum)
    }

    /// Reads and verifies a bset at the start of `bytes`: header, payload and checksum.
    ///
    /// # Errors
    /// If it is not one, is cut short, or its checksum is wrong.
    pub fn decode(bytes: &[u8]) -> Result<(Self, &[u8], u32), Corruption> {
        let (raw, rest) = RawBsetHeader::read_from_prefix(bytes)
            .map_err(|_| Corruption::new("bset", format!("cut short: {} bytes", bytes.len())))?;
        if raw.magic.get() != BSET_MAGIC || raw.reserved.get() != 0 {
            return Err(Corruption::new("bset", format!("no magic number: {:#x}", raw.magic.get())));
        }
        let what = || format!("bset {} of node {}", raw.index.get(), raw.node.get());
        let length = usize::try_from(raw.payload_bytes.get()).unwrap_or(usize::MAX);
        let payload = rest.get(..length).ok_or_else(|| {
            Corruption::new(what(), format!("{length} bytes of keys, {} left in the node", rest.len()))
        })?;
        let zeroed = RawBsetHeader { checksum: U32::ZERO, ..raw };
        let computed = metadata_checksum(&[zeroed.as_bytes(), payload]);
        if computed != raw.checksum.get() {
            return Err(Corruption::new(what(), format!("checksum {computed:#x}, {:#x} stored", raw.checksum.get())));
        }
        let header = Self {
            node: NodeId(raw.node.get()),
            index: raw.index.get(),
            previous_checksum: raw.previous_checksum.get(),
            key_count: raw.key_count.get(),
            payload_bytes: raw.payload_bytes.get(),
            newest_sequence: JournalSequence(raw.newest_sequence.get()),
        };
        Ok((header, payload, computed))
    }
}

/// One copy of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeAddress {
    /// Device.
    pub device: DeviceIndex,
    /// Byte address of the slot, a multiple of the node size within its bucket.
    pub offset: u64,
}

/// A pointer to a node's published image: value of a key of an interior node (whose position is the smallest that the child may
/// hold), and of a root in a checkpoint record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodePointer {
    /// The node.
    pub node: NodeId,
    /// Bytes of the slot that belong to this image, from its start.
    pub written_bytes: u32,
    /// Number of bsets in this image.
    pub bset_count: u16,
    /// Checksum of the last bset, which covers the ones before through the chain.
    pub last_checksum: u32,
    /// The copies, at most [`Self::COPIES_MAX`]. None: the node has no image yet (in memory only, never on disk).
    pub copies: SmallVec<[NodeAddress; 2]>,
}

impl NodePointer {
    /// Most copies of a node.
    pub const COPIES_MAX: usize = 4;

    /// Appends the encoded form.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.node.0.to_le_bytes());
        out.extend_from_slice(&self.written_bytes.to_le_bytes());
        out.extend_from_slice(&self.last_checksum.to_le_bytes());
        out.extend_from_slice(&self.bset_count.to_le_bytes());
        out.push(u8::try_from(self.copies.len()).unwrap_or(u8::MAX));
        for copy in &self.copies {
            out.push(copy.device.0);
            out.extend_from_slice(&copy.offset.to_le_bytes());
        }
    }

    /// Decodes a pointer that takes up all of `bytes`.
    ///
    /// # Errors
    /// If it is not one.
    pub fn decode(bytes: &[u8]) -> Result<Self, Corruption> {
        let mut reader = Reader::new("node pointer", bytes);
        let node = NodeId(reader.u64()?);
        let written_bytes = reader.u32()?;
        let last_checksum = reader.u32()?;
        let bset_count = reader.u16()?;
        let count = usize::from(reader.u8()?);
        if count > Self::COPIES_MAX {
            return Err(reader.problem(format!("{count} copies, at most {}", Self::COPIES_MAX)));
        }
        let mut copies = SmallVec::new();
        for _ in 0..count {
            copies.push(NodeAddress { device: DeviceIndex(reader.u8()?), offset: reader.u64()? });
        }
        reader.finish()?;
        Ok(Self { node, written_bytes, bset_count, last_checksum, copies })
    }
}
