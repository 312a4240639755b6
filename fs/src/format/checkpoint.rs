//! Checkpoint records and the node-space map, in the checkpoint area.
//!
//! The area is a range of buckets, with as many copies as metadata has. Record number `n` lies in slot `n % RECORD_SLOTS` of
//! [`RECORD_SLOT_BYTES`]; behind the slots lie map pages, written copy-on-write. A record is the single point of publication: it names
//! the roots, the boundary F, the totals at F, and the pages of the map.

use bincode::{Decode, Encode};
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::checksum::metadata_checksum;
use super::codec;
use crate::error::Corruption;

/// First bytes of a record.
pub const RECORD_MAGIC: u64 = u64::from_le_bytes(*b"coppCKPT");
/// Slots for records at the start of the area.
pub const RECORD_SLOTS: u64 = 4;
/// Bytes of a slot.
pub const RECORD_SLOT_BYTES: usize = 64 << 10;
/// First bytes of a map page.
pub const MAP_PAGE_MAGIC: u32 = u32::from_le_bytes(*b"NMAP");
/// Bytes of a map page.
pub const MAP_PAGE_BYTES: usize = 4096;
/// Buckets that one map page describes.
pub const MAP_PAGE_ENTRIES: usize = (MAP_PAGE_BYTES - size_of::<RawMapHeader>()) / size_of::<RawMapEntry>();

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawRecordHeader {
    magic: U64,
    filesystem: [u8; 16],
    payload_bytes: U32,
    checksum: U32,
}

/// A tree's root.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Root {
    /// Number of the tree.
    pub btree: u8,
    /// Level of the root node; 0 if it is a leaf.
    pub level: u8,
    /// Encoded [`super::node::NodePointer`].
    pub pointer: Vec<u8>,
}

/// A page of the node-space map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct MapPageReference {
    /// Index of the page's place in the area, counted from behind the record slots.
    pub place: u32,
    /// Its checksum.
    pub checksum: u32,
}

/// The newest version of a checkpoint record.
pub type Checkpoint = CheckpointV1;

#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
enum StoredCheckpoint {
    V1(CheckpointV1),
}

/// What a checkpoint says.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct CheckpointV1 {
    /// Number of the checkpoint, from 1.
    pub number: u64,
    /// Mount epoch in which it was written: journal records from `first_replay` on have this epoch or a later one.
    pub epoch: u64,
    /// F: every record below it is reflected in the images. Replay starts here.
    pub first_replay: u64,
    /// Where in the journal's ring, in bytes, the record F is (or will be).
    pub first_replay_offset: u64,
    /// Checksum of the record before F, which F's chains to.
    pub previous_record_checksum: u32,
    /// Newest sequence in any image: the journal is durable up to here.
    pub newest_sequence: u64,
    /// Trees that have an image. A tree without one is empty.
    pub roots: Vec<Root>,
    /// Counter number and total, exactly at F.
    pub totals: Vec<(u16, i64)>,
    /// The next node id to be handed out.
    pub next_node: u64,
    /// Whether the filesystem was closed in order, with nothing to replay.
    pub clean: bool,
    /// Pages of the node-space map.
    pub map: Vec<MapPageReference>,
    /// Seconds since 1970 when it was written, for people.
    pub written_at: i64,
}

impl CheckpointV1 {
    /// The stored form, at most [`RECORD_SLOT_BYTES`], not padded.
    ///
    /// # Errors
    /// If it is larger than that.
    pub fn encode(&self, filesystem: uuid::Uuid) -> Result<Vec<u8>, Corruption> {
        let payload = codec::encode("checkpoint record", &StoredCheckpoint::V1(self.clone()))?;
        let mut header = RawRecordHeader {
            magic: RECORD_MAGIC.into(),
            filesystem: *filesystem.as_bytes(),
            payload_bytes: U32::new(u32::try_from(payload.len()).unwrap_or(u32::MAX)),
            checksum: U32::ZERO,
        };
        header.checksum = metadata_checksum(&[header.as_bytes(), &payload]).into();
        let bytes = [header.as_bytes(), &payload].concat();
        if bytes.len() > RECORD_SLOT_BYTES {
            let problem = format!("{} bytes do not fit a slot of {RECORD_SLOT_BYTES}", bytes.len());
            return Err(Corruption::new("checkpoint record", problem));
        }
        Ok(bytes)
    }

    /// Reads and verifies a record at the start of a slot.
    ///
    /// # Errors
    /// If it is not one of this filesystem, or its checksum is wrong.
    pub fn decode(filesystem: uuid::Uuid, bytes: &[u8]) -> Result<Self, Corruption> {
        let (header, rest) = RawRecordHeader::read_from_prefix(bytes)
            .map_err(|_| Corruption::new("checkpoint record", format!("cut short: {} bytes", bytes.len())))?;
        if header.magic.get() != RECORD_MAGIC {
            return Err(Corruption::new("checkpoint record", format!("no magic number: {:#x}", header.magic.get())));
        }
        if header.filesystem != *filesystem.as_bytes() {
            return Err(Corruption::new("checkpoint record", "of another filesystem"));
        }
        let length = usize::try_from(header.payload_bytes.get()).unwrap_or(usize::MAX);
        let payload = rest.get(..length).ok_or_else(|| {
            Corruption::new("checkpoint record", format!("{length} bytes of payload, {} left", rest.len()))
        })?;
        let zeroed = RawRecordHeader { checksum: U32::ZERO, ..header };
        let computed = metadata_checksum(&[zeroed.as_bytes(), payload]);
        if computed != header.checksum.get() {
            let problem = format!("checksum {computed:#x}, {:#x} stored", header.checksum.get());
            return Err(Corruption::new("checkpoint record", problem));
        }
        let StoredCheckpoint::V1(checkpoint) = codec::decode("checkpoint record", payload)?;
        Ok(checkpoint)
    }
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawMapHeader {
    magic: U32,
    checksum: U32,
    page: U32,
    entry_count: U32,
    filesystem: [u8; 16],
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawMapEntry {
    device_and_bucket: U64,
    used: U64,
}

/// One bucket of nodes: which of its slots are in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapEntry {
    /// Device.
    pub device: u8,
    /// Bucket index, below 2^56.
    pub bucket: u64,
    /// Bit `i`: the slot at `i * node_bytes` in the bucket holds a published node. A bucket has at most 64 slots.
    pub used: u64,
}

/// Encodes a map page; at most [`MAP_PAGE_ENTRIES`] entries. Returns its [`MAP_PAGE_BYTES`] and its checksum.
#[must_use]
pub fn encode_map_page(filesystem: uuid::Uuid, page: u32, entries: &[MapEntry]) -> (Vec<u8>, u32) {
    let mut header = RawMapHeader {
        magic: MAP_PAGE_MAGIC.into(),
        checksum: U32::ZERO,
        page: page.into(),
        entry_count: U32::new(u32::try_from(entries.len()).unwrap_or(u32::MAX)),
        filesystem: *filesystem.as_bytes(),
    };
    let mut body = Vec::with_capacity(MAP_PAGE_BYTES);
    for entry in entries {
        let raw = RawMapEntry {
            device_and_bucket: (u64::from(entry.device) << 56 | entry.bucket).into(),
            used: entry.used.into(),
        };
        body.extend_from_slice(raw.as_bytes());
    }
    let checksum = metadata_checksum(&[header.as_bytes(), &body]);
    header.checksum = checksum.into();
    let mut bytes = header.as_bytes().to_vec();
    bytes.append(&mut body);
    bytes.resize(MAP_PAGE_BYTES, 0);
    (bytes, checksum)
}

/// Decodes and verifies a map page: its entries and its checksum.
///
/// # Errors
/// If it is not page `page` of this filesystem, or its checksum is wrong.
pub fn decode_map_page(filesystem: uuid::Uuid, page: u32, bytes: &[u8]) -> Result<(Vec<MapEntry>, u32), Corruption> {
    let what = || format!("node-space map page {page}");
    let (header, rest) = RawMapHeader::read_from_prefix(bytes)
        .map_err(|_| Corruption::new(what(), format!("cut short: {} bytes", bytes.len())))?;
    if header.magic.get() != MAP_PAGE_MAGIC || header.filesystem != *filesystem.as_bytes() || header.page.get() != page
    {
        return Err(Corruption::new(what(), "not this page of this filesystem"));
    }
    let count = usize::try_from(header.entry_count.get()).unwrap_or(usize::MAX);
    if count > MAP_PAGE_ENTRIES {
        return Err(Corruption::new(what(), format!("{count} entries, at most {MAP_PAGE_ENTRIES}")));
    }
    let body = rest
        .get(..count * size_of::<RawMapEntry>())
        .ok_or_else(|| Corruption::new(what(), format!("cut short: {} bytes", bytes.len())))?;
    let zeroed = RawMapHeader { checksum: U32::ZERO, ..header };
    let computed = metadata_checksum(&[zeroed.as_bytes(), body]);
    if computed != header.checksum.get() {
        return Err(Corruption::new(what(), format!("checksum {computed:#x}, {:#x} stored", header.checksum.get())));
    }
    let entries =
        body.chunks_exact(size_of::<RawMapEntry>()).filter_map(|chunk| RawMapEntry::read_from_bytes(chunk).ok());
    let entries = entries
        .map(|raw| {
            let packed = raw.device_and_bucket.get();
            let device = u8::try_from(packed >> 56).unwrap_or(u8::MAX);
            MapEntry { device, bucket: packed & ((1 << 56) - 1), used: raw.used.get() }
        })
        .collect();
    Ok((entries, computed))
}
