//! Journal records: a header and entries, padded to [`RECORD_ALIGNMENT_BYTES`].
//!
//! A record is accepted by recovery only if its checksum is right and it continues the chain: its sequence is one above, and
//! `previous_checksum` is the checksum of, the record before.

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::checksum::{ChecksumKind, metadata_checksum};
use super::key::{BtreeId, PackedKey, pack, unpack};
use super::{Position, Reader};
use crate::error::Corruption;
use crate::units::{DeviceIndex, JournalSequence};

/// First bytes of a record.
pub const RECORD_MAGIC: u64 = u64::from_le_bytes(*b"coppJRNL");
/// Records start and end on multiples of this.
pub const RECORD_ALIGNMENT_BYTES: usize = 4096;

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawRecordHeader {
    magic: U64,
    filesystem: [u8; 16],
    epoch: U64,
    sequence: U64,
    known_flushed: U64,
    previous_checksum: U32,
    payload_bytes: U32,
    entry_count: U32,
    reserved: U32,
    checksum: U32,
}

/// Header of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordHeader {
    /// The filesystem's id.
    pub filesystem: uuid::Uuid,
    /// Goes up with every read-write mount.
    pub epoch: u64,
    /// This record's sequence.
    pub sequence: JournalSequence,
    /// D: the newest sequence that was known to be flushed when this record was written.
    pub known_flushed: JournalSequence,
    /// Checksum of the record before.
    pub previous_checksum: u32,
    /// Bytes of entries after the header.
    pub payload_bytes: u32,
    /// Number of entries.
    pub entry_count: u32,
}

impl RecordHeader {
    /// Bytes of the header.
    pub const BYTES: usize = 68;

    /// Header and payload, not padded, and the record's checksum.
    #[must_use]
    pub fn encode(&self, payload: &[u8]) -> (Vec<u8>, u32) {
        let mut raw = RawRecordHeader {
            magic: RECORD_MAGIC.into(),
            filesystem: *self.filesystem.as_bytes(),
            epoch: self.epoch.into(),
            sequence: self.sequence.0.into(),
            known_flushed: self.known_flushed.0.into(),
            previous_checksum: self.previous_checksum.into(),
            payload_bytes: self.payload_bytes.into(),
            entry_count: self.entry_count.into(),
            reserved: U32::ZERO,
            checksum: U32::ZERO,
        };
        let checksum = metadata_checksum(&[raw.as_bytes(), payload]);
        raw.checksum = checksum.into();
        let mut bytes = Vec::with_capacity(Self::BYTES + payload.len() + RECORD_ALIGNMENT_BYTES);
        bytes.extend_from_slice(raw.as_bytes());
        bytes.extend_from_slice(payload);
        (bytes, checksum)
    }

    /// Reads only the header: for learning how long a record claims to be. Nothing is verified but the magic number.
    ///
    /// # Errors
    /// If there is no record here.
    pub fn peek(bytes: &[u8]) -> Result<Self, Corruption> {
        Self::raw(bytes).map(|(raw, _)| Self::from_raw(&raw))
    }

    /// Reads and verifies a record at the start of `bytes`: header, payload, checksum.
    ///
    /// # Errors
    /// If it is not one, is cut short, or its checksum is wrong.
    pub fn decode(bytes: &[u8]) -> Result<(Self, &[u8], u32), Corruption> {
        let (raw, rest) = Self::raw(bytes)?;
        let what = || format!("journal record {}", raw.sequence.get());
        let length = usize::try_from(raw.payload_bytes.get()).unwrap_or(usize::MAX);
        let payload = rest
            .get(..length)
            .ok_or_else(|| Corruption::new(what(), format!("{length} bytes of entries, {} left", rest.len())))?;
        let zeroed = RawRecordHeader { checksum: U32::ZERO, ..raw };
        let computed = metadata_checksum(&[zeroed.as_bytes(), payload]);
        if computed != raw.checksum.get() {
            return Err(Corruption::new(what(), format!("checksum {computed:#x}, {:#x} stored", raw.checksum.get())));
        }
        Ok((Self::from_raw(&raw), payload, computed))
    }

    fn raw(bytes: &[u8]) -> Result<(RawRecordHeader, &[u8]), Corruption> {
        let (raw, rest) = RawRecordHeader::read_from_prefix(bytes)
            .map_err(|_| Corruption::new("journal record", format!("cut short: {} bytes", bytes.len())))?;
        if raw.magic.get() != RECORD_MAGIC || raw.reserved.get() != 0 {
            return Err(Corruption::new("journal record", format!("no magic number: {:#x}", raw.magic.get())));
        }
        Ok((raw, rest))
    }

    fn from_raw(raw: &RawRecordHeader) -> Self {
        Self {
            filesystem: uuid::Uuid::from_bytes(raw.filesystem),
            epoch: raw.epoch.get(),
            sequence: JournalSequence(raw.sequence.get()),
            known_flushed: JournalSequence(raw.known_flushed.get()),
            previous_checksum: raw.previous_checksum.get(),
            payload_bytes: raw.payload_bytes.get(),
            entry_count: raw.entry_count.get(),
        }
    }
}

/// Global counters. Logged as deltas; totals stand in checkpoint records. The numbers are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u16)]
pub enum AccountingCounter {
    /// Bytes on disk that extents are charged for.
    DataBytes = 0,
    /// Bytes that unwritten extents (fallocate) hold.
    ReservedBytes = 1,
    /// Inodes.
    Inodes = 2,
    /// File bytes that are stored compressed.
    CompressedLogicalBytes = 3,
    /// What those take on disk.
    CompressedDiskBytes = 4,
    /// Buckets that hold B-tree nodes.
    MetadataBuckets = 5,
    /// Buckets that hold file data (count above 0).
    DataBuckets = 6,
    /// Buckets that were emptied and are not yet reusable.
    NeedDiscardBuckets = 7,
    /// Bytes of inline file data in keys.
    InlineBytes = 8,
}

impl AccountingCounter {
    /// All counters, in stored order.
    pub const ALL: [Self; 9] = [
        Self::DataBytes,
        Self::ReservedBytes,
        Self::Inodes,
        Self::CompressedLogicalBytes,
        Self::CompressedDiskBytes,
        Self::MetadataBuckets,
        Self::DataBuckets,
        Self::NeedDiscardBuckets,
        Self::InlineBytes,
    ];

    /// The counter with this stored number.
    ///
    /// # Errors
    /// For an unknown number.
    pub fn from_stored(stored: u16) -> Result<Self, Corruption> {
        Self::ALL
            .get(usize::from(stored))
            .copied()
            .ok_or_else(|| Corruption::new("accounting counter", format!("unknown number {stored}")))
    }
}

/// One entry of a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry<'a> {
    /// A final, exact-position put or whiteout.
    Key {
        /// Tree.
        btree: BtreeId,
        /// Key.
        key: PackedKey<'a>,
    },
    /// A change of a global counter.
    Accounting {
        /// Which.
        counter: AccountingCounter,
        /// By how much.
        delta: i64,
    },
    /// New data that was allowed to complete alongside this record: recovery verifies it for records above D.
    DataRange {
        /// Device.
        device: DeviceIndex,
        /// Byte offset.
        offset: u64,
        /// Length in bytes.
        length: u32,
        /// Kind of `checksum`.
        kind: ChecksumKind,
        /// Of the whole range.
        checksum: u64,
    },
}

const TAG_KEY: u8 = 1;
const TAG_ACCOUNTING: u8 = 2;
const TAG_DATA_RANGE: u8 = 3;

/// Appends a key entry.
pub fn encode_key(btree: BtreeId, position: Position, value: Option<&[u8]>, out: &mut Vec<u8>) {
    out.extend_from_slice(&[TAG_KEY, btree as u8]);
    pack(position, value, out);
}

/// Appends an accounting entry.
pub fn encode_accounting(counter: AccountingCounter, delta: i64, out: &mut Vec<u8>) {
    out.push(TAG_ACCOUNTING);
    out.extend_from_slice(&(counter as u16).to_le_bytes());
    out.extend_from_slice(&delta.to_le_bytes());
}

/// Appends a data-range entry.
pub fn encode_data_range(
    device: DeviceIndex,
    offset: u64,
    length: u32,
    kind: ChecksumKind,
    checksum: u64,
    out: &mut Vec<u8>,
) {
    out.extend_from_slice(&[TAG_DATA_RANGE, device.0]);
    out.extend_from_slice(&offset.to_le_bytes());
    out.extend_from_slice(&length.to_le_bytes());
    out.push(kind as u8);
    out.extend_from_slice(&checksum.to_le_bytes());
}

/// Decodes the entries of a record's payload, one after the other.
#[derive(Debug)]
pub struct Entries<'a> {
    rest: &'a [u8],
}

impl<'a> Entries<'a> {
    /// Over a verified payload.
    #[must_use]
    pub fn new(payload: &'a [u8]) -> Self {
        Self { rest: payload }
    }

    fn next_entry(&mut self) -> Result<Entry<'a>, Corruption> {
        let mut reader = Reader::new("journal entry", self.rest);
        match reader.u8()? {
            TAG_KEY => {
                let btree = BtreeId::from_stored(reader.u8()?)?;
                let (key, rest) = unpack(reader.bytes(reader.remaining())?)?;
                self.rest = rest;
                Ok(Entry::Key { btree, key })
            }
            TAG_ACCOUNTING => {
                let counter = AccountingCounter::from_stored(reader.u16()?)?;
                let delta = reader.i64()?;
                self.rest = reader.bytes(reader.remaining())?;
                Ok(Entry::Accounting { counter, delta })
            }
            TAG_DATA_RANGE => {
                let device = DeviceIndex(reader.u8()?);
                let offset = reader.u64()?;
                let length = reader.u32()?;
                let kind = ChecksumKind::from_stored(reader.u8()?)?;
                let checksum = reader.u64()?;
                self.rest = reader.bytes(reader.remaining())?;
                Ok(Entry::DataRange { device, offset, length, kind, checksum })
            }
            other => Err(reader.problem(format!("unknown tag {other}"))),
        }
    }
}

impl<'a> Iterator for Entries<'a> {
    type Item = Result<Entry<'a>, Corruption>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let entry = self.next_entry();
        if entry.is_err() {
            self.rest = &[];
        }
        Some(entry)
    }
}
