//! The superblock: what a device is, and where everything else starts.
//!
//! [`SUPERBLOCK_BYTES`] at each of [`copy_offsets`]: a fixed header, then sections, each with its number and length, so that old programs can step over
//! new ones. Copies are written one at a time with a flush between; the newest valid sequence wins. Nothing that changes
//! with the data is here: checkpoints have their own area.

use bincode::{Decode, Encode};
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::checksum::metadata_checksum;
use super::{Reader, codec};
use crate::error::{Corruption, Error, Result};
use crate::units::round_down;

/// First bytes.
pub const SUPERBLOCK_MAGIC: [u8; 16] = *b"coppice fs super";
/// Bytes of each copy.
pub const SUPERBLOCK_BYTES: usize = 16 << 10;
/// Byte offset of the first copy.
pub const PRIMARY_OFFSET: u64 = 4096;
/// Format version that this program writes.
pub const VERSION: u16 = 1;

/// Incompatible features that this program knows. An unknown bit is a refusal.
pub const KNOWN_INCOMPAT: u64 = 0;
/// Features whose absence allows reading only. An unknown bit makes read-write mounts refuse.
pub const KNOWN_READ_ONLY_COMPAT: u64 = 0;

/// Byte offsets of the copies on a device of this size: near the start, in the middle, at the end. Computable from the size alone.
#[must_use]
pub fn copy_offsets(device_bytes: u64) -> [u64; 3] {
    let end = round_down(device_bytes.saturating_sub(SUPERBLOCK_BYTES as u64), 4096);
    [PRIMARY_OFFSET, round_down(device_bytes / 2, 1 << 20).max(PRIMARY_OFFSET + SUPERBLOCK_BYTES as u64), end]
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 16],
    filesystem: [u8; 16],
    sequence: U64,
    compat: U64,
    read_only_compat: U64,
    incompat: U64,
    version: U16,
    /// Oldest version whose programs can read it.
    version_minimum: U16,
    section_count: U32,
    sections_bytes: U32,
    checksum: U32,
}

/// Sizes that never change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Geometry {
    /// Unit of allocation and of data checksums; 4096 to 65536, a power of two.
    pub block_bytes: u32,
    /// A power of two, at least `node_bytes`, at most 64 times it.
    pub bucket_bytes: u32,
    /// Bytes of a B-tree node's slot; a power of two, 16 KiB to 1 MiB (smaller only in tests).
    pub node_bytes: u32,
    /// Copies of metadata: nodes, journal, checkpoint area.
    pub metadata_replicas: u8,
}

/// A member device.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Member {
    /// The device's own id.
    pub uuid: [u8; 16],
    /// Its size in bytes when it was formatted.
    pub size_bytes: u64,
    /// Buckets on it: `size_bytes / bucket_bytes`.
    pub bucket_count: u64,
}

/// A run of buckets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct BucketRange {
    /// Device.
    pub device: u8,
    /// First bucket.
    pub first: u64,
    /// Number of buckets.
    pub count: u64,
}

impl BucketRange {
    /// Whether the bucket is in the range.
    #[must_use]
    pub fn contains(&self, device: u8, bucket: u64) -> bool {
        self.device == device && bucket >= self.first && bucket - self.first < self.count
    }
}

/// Where the fixed areas are. Every range is one copy; the copies are equal in size.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct Layout {
    /// The journal's ring.
    pub journal: Vec<BucketRange>,
    /// The checkpoint area.
    pub checkpoints: Vec<BucketRange>,
}

/// Defaults that mkfs wrote; mount options override them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct Defaults {
    /// The name that people gave it, UTF-8, at most 64 bytes.
    pub label: String,
    /// Stored number of the data checksum kind.
    pub checksum: u8,
    /// Stored number of the compression kind.
    pub compression: u8,
    /// Level for zstd.
    pub compression_level: u8,
    /// Seconds since 1970.
    pub created_at: i64,
    /// Version of the program that made it.
    pub created_by: String,
    /// Key of the hash of directory entries and attribute names.
    pub hash_seed: u64,
}

/// Failures that the filesystem has met, for ever.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct ErrorCounts {
    /// Name of the kind of error, and how often.
    pub counts: Vec<(String, u64)>,
}

/// The superblock, decoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// Id of the filesystem.
    pub filesystem: uuid::Uuid,
    /// Goes up with each write; the newest copy wins.
    pub sequence: u64,
    /// Features that old programs may ignore.
    pub compat: u64,
    /// Features that old programs may ignore when reading only.
    pub read_only_compat: u64,
    /// Features that old programs must refuse.
    pub incompat: u64,
    /// Format version.
    pub version: u16,
    /// Oldest format version whose programs can read it.
    pub version_minimum: u16,
    /// Sizes.
    pub geometry: Geometry,
    /// Devices, by index.
    pub members: Vec<Member>,
    /// Fixed areas.
    pub layout: Layout,
    /// mkfs's defaults.
    pub defaults: Defaults,
    /// Errors so far.
    pub errors: ErrorCounts,
    /// Sections of newer programs: number and bytes, kept as they are.
    pub unknown_sections: Vec<(u32, Vec<u8>)>,
}

const SECTION_GEOMETRY: u32 = 1;
const SECTION_MEMBERS: u32 = 2;
const SECTION_LAYOUT: u32 = 3;
const SECTION_DEFAULTS: u32 = 4;
const SECTION_ERRORS: u32 = 5;

impl Superblock {
    /// The stored form, [`SUPERBLOCK_BYTES`] long.
    ///
    /// # Errors
    /// If the sections do not fit.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let mut sections = vec![
            (SECTION_GEOMETRY, codec::encode("geometry section", &self.geometry)?),
            (SECTION_MEMBERS, codec::encode("members section", &self.members)?),
            (SECTION_LAYOUT, codec::encode("layout section", &self.layout)?),
            (SECTION_DEFAULTS, codec::encode("defaults section", &self.defaults)?),
            (SECTION_ERRORS, codec::encode("errors section", &self.errors)?),
        ];
        sections.extend(self.unknown_sections.iter().cloned());
        let mut body = Vec::new();
        for (number, bytes) in &sections {
            body.extend_from_slice(&number.to_le_bytes());
            body.extend_from_slice(&u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_le_bytes());
            body.extend_from_slice(bytes);
        }
        let mut header = RawHeader {
            magic: SUPERBLOCK_MAGIC,
            filesystem: *self.filesystem.as_bytes(),
            sequence: self.sequence.into(),
            compat: self.compat.into(),
            read_only_compat: self.read_only_compat.into(),
            incompat: self.incompat.into(),
            version: self.version.into(),
            version_minimum: self.version_minimum.into(),
            section_count: U32::new(u32::try_from(sections.len()).unwrap_or(u32::MAX)),
            sections_bytes: U32::new(u32::try_from(body.len()).unwrap_or(u32::MAX)),
            checksum: U32::ZERO,
        };
        header.checksum = metadata_checksum(&[header.as_bytes(), &body]).into();
        let mut bytes = [header.as_bytes(), &body].concat();
        if bytes.len() > SUPERBLOCK_BYTES {
            return Err(Error::corrupt("superblock", format!("its sections take {} bytes", bytes.len())));
        }
        bytes.resize(SUPERBLOCK_BYTES, 0);
        Ok(bytes)
    }

    /// Whether `bytes` start like a superblock of ours, damaged or not.
    #[must_use]
    pub fn is_recognised(bytes: &[u8]) -> bool {
        bytes.starts_with(&SUPERBLOCK_MAGIC)
    }

    /// Reads and verifies a copy. Refuses what this program does not understand.
    ///
    /// # Errors
    /// [`Error::Corrupt`] if it is damaged or not one; [`Error::Unusable`] if it is too new.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let (header, rest) = RawHeader::read_from_prefix(bytes)
            .map_err(|_| Corruption::new("superblock", format!("cut short: {} bytes", bytes.len())))?;
        if header.magic != SUPERBLOCK_MAGIC {
            return Err(Error::corrupt("superblock", "no magic number"));
        }
        let length = usize::try_from(header.sections_bytes.get()).unwrap_or(usize::MAX);
        let body = rest
            .get(..length)
            .ok_or_else(|| Corruption::new("superblock", format!("{length} bytes of sections, {} left", rest.len())))?;
        let zeroed = RawHeader { checksum: U32::ZERO, ..header };
        let computed = metadata_checksum(&[zeroed.as_bytes(), body]);
        if computed != header.checksum.get() {
            let problem = format!("checksum {computed:#x}, {:#x} stored", header.checksum.get());
            return Err(Error::corrupt("superblock", problem));
        }
        let unknown = header.incompat.get() & !KNOWN_INCOMPAT;
        if unknown != 0 || header.version_minimum.get() > VERSION {
            return Err(Error::Unusable(format!(
                "this filesystem needs a newer coppice: format version {} (this program knows {VERSION}), unknown features {unknown:#x}",
                header.version.get(),
            )));
        }
        Self::decode_sections(&header, body)
    }

    fn decode_sections(header: &RawHeader, body: &[u8]) -> Result<Self> {
        let (mut geometry, mut members, mut layout, mut defaults, mut errors) = (None, None, None, None, None);
        let mut unknown_sections = Vec::new();
        let mut reader = Reader::new("superblock", body);
        for _ in 0..header.section_count.get() {
            let number = reader.u32()?;
            let length = usize::try_from(reader.u32()?).unwrap_or(usize::MAX);
            let bytes = reader.bytes(length)?;
            match number {
                SECTION_GEOMETRY => geometry = Some(codec::decode::<Geometry>("geometry section", bytes)?),
                SECTION_MEMBERS => members = Some(codec::decode::<Vec<Member>>("members section", bytes)?),
                SECTION_LAYOUT => layout = Some(codec::decode::<Layout>("layout section", bytes)?),
                SECTION_DEFAULTS => defaults = Some(codec::decode::<Defaults>("defaults section", bytes)?),
                SECTION_ERRORS => errors = Some(codec::decode::<ErrorCounts>("errors section", bytes)?),
                _ => unknown_sections.push((number, bytes.to_vec())),
            }
        }
        reader.finish()?;
        let missing = |name: &str| Error::corrupt("superblock", format!("it has no {name} section"));
        let superblock = Self {
            filesystem: uuid::Uuid::from_bytes(header.filesystem),
            sequence: header.sequence.get(),
            compat: header.compat.get(),
            read_only_compat: header.read_only_compat.get(),
            incompat: header.incompat.get(),
            version: header.version.get(),
            version_minimum: header.version_minimum.get(),
            geometry: geometry.ok_or_else(|| missing("geometry"))?,
            members: members.ok_or_else(|| missing("members"))?,
            layout: layout.ok_or_else(|| missing("layout"))?,
            defaults: defaults.ok_or_else(|| missing("defaults"))?,
            errors: errors.unwrap_or_default(),
            unknown_sections,
        };
        superblock.validate()?;
        Ok(superblock)
    }

    /// Checks that the numbers make sense together, so that nothing above needs to.
    fn validate(&self) -> Result<()> {
        let bad = |problem: String| Err(Error::corrupt("superblock", problem));
        let Geometry { block_bytes, bucket_bytes, node_bytes, metadata_replicas } = self.geometry;
        if !block_bytes.is_power_of_two() || !(4096..=65536).contains(&block_bytes) {
            return bad(format!("block size {block_bytes}"));
        }
        if !node_bytes.is_power_of_two() || !(8192..=1 << 20).contains(&node_bytes) {
            return bad(format!("node size {node_bytes}"));
        }
        if !bucket_bytes.is_power_of_two()
            || bucket_bytes > 1 << 24
            || bucket_bytes < node_bytes.max(block_bytes)
            || bucket_bytes / node_bytes > 64
        {
            return bad(format!("bucket size {bucket_bytes} with nodes of {node_bytes}"));
        }
        if !(1..=4).contains(&metadata_replicas) {
            return bad(format!("{metadata_replicas} copies of metadata"));
        }
        if self.members.is_empty() || self.members.len() > 255 {
            return bad(format!("{} members", self.members.len()));
        }
        for member in &self.members {
            if member.bucket_count > member.size_bytes / u64::from(bucket_bytes) {
                return bad(format!("{} buckets on a device of {} bytes", member.bucket_count, member.size_bytes));
            }
        }
        for ranges in [&self.layout.journal, &self.layout.checkpoints] {
            if ranges.is_empty() || ranges.len() > 4 {
                return bad(format!("{} copies of an area", ranges.len()));
            }
            for range in ranges {
                let buckets = self.members.get(usize::from(range.device)).map_or(0, |member| member.bucket_count);
                let end = range.first.checked_add(range.count);
                if range.count == 0 || end.is_none_or(|end| end > buckets) {
                    return bad(format!("an area of {} buckets from {} of {buckets}", range.count, range.first));
                }
                if Some(range.count) != ranges.first().map(|first| first.count) {
                    return bad("copies of an area that differ in size".into());
                }
            }
        }
        Ok(())
    }

    /// Whether a bucket holds a superblock copy or one of the fixed areas. Buckets of an unknown device count as reserved.
    #[must_use]
    pub fn is_reserved(&self, device: u8, bucket: u64) -> bool {
        let Some(member) = self.members.get(usize::from(device)) else { return true };
        let bucket_bytes = u64::from(self.geometry.bucket_bytes);
        let start = bucket.saturating_mul(bucket_bytes);
        let copies = copy_offsets(member.size_bytes);
        copies.iter().any(|&copy| copy < start + bucket_bytes && copy + SUPERBLOCK_BYTES as u64 > start)
            || bucket == 0
            || self.layout.journal.iter().chain(&self.layout.checkpoints).any(|range| range.contains(device, bucket))
    }
}
