//! Extents: where a range of a file's data is. Keyed by the *end* of the range (`position.offset`, in bytes).

use smallvec::SmallVec;

use super::Reader;
use super::checksum::{ChecksumKind, CompressionKind};
use crate::error::Corruption;
use crate::units::DeviceIndex;

/// Most bytes of file data that one extent covers.
pub const EXTENT_BYTES_MAX: u32 = 1 << 20;
/// Most bytes of a file that one key says are lost: see [`DataExtent::lost`].
pub const LOST_BYTES_MAX: u32 = 1 << 30;
/// Most bytes of file data in one compressed frame.
pub const FRAME_BYTES_MAX: u32 = 1 << 18;

/// One copy of an extent's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ExtentPointer {
    /// Device.
    pub device: DeviceIndex,
    /// Generation of the bucket when the data was written: a pointer with another generation is stale.
    pub generation: u32,
    /// Byte offset on the device of the first stored byte (of the live part if raw, of the frame if compressed).
    pub offset: u64,
}

/// Data in buckets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataExtent {
    /// Bytes of file data, a multiple of the block size, at most [`EXTENT_BYTES_MAX`]; without a copy, [`LOST_BYTES_MAX`].
    pub length: u32,
    /// The copies, at most 4, all with the same bytes. None: the data is lost, and reading it is an error until it is written again.
    pub pointers: SmallVec<[ExtentPointer; 1]>,
    /// How the stored bytes are compressed.
    pub compression: CompressionKind,
    /// Raw: equal to `length`. Compressed: bytes that the whole frame takes on disk, a multiple of the block size.
    pub disk_bytes: u32,
    /// Compressed: exact bytes of the compressed stream, at most `disk_bytes`. Raw: equal to `length`.
    pub stream_bytes: u32,
    /// Compressed: bytes of the whole frame when decoded. Raw: equal to `length`.
    pub frame_bytes: u32,
    /// Compressed: where the live part starts in the decoded frame. Raw: 0.
    pub frame_offset: u32,
    /// Kind of the checksums.
    pub checksum_kind: ChecksumKind,
    /// Raw: one per block of `length`. Compressed: one, over the `stream_bytes` of the stream. Empty for `None`.
    pub checksums: Vec<u64>,
}

impl DataExtent {
    /// What stands for `length` bytes of a file whose data is lost: fsck puts it there, so that nobody takes zeros for what was written.
    #[must_use]
    pub fn lost(length: u32) -> Self {
        Self {
            length,
            pointers: SmallVec::new(),
            compression: CompressionKind::None,
            disk_bytes: length,
            stream_bytes: length,
            frame_bytes: length,
            frame_offset: 0,
            checksum_kind: ChecksumKind::None,
            checksums: Vec::new(),
        }
    }

    /// Bytes of disk space that this extent is charged with: all it stores, or for a part of a compressed frame
    /// what the part would take alone at most. Never 0, so a bucket with a live part never counts as empty; and never less than
    /// rewriting the part alone can need, so that copygc cannot need more than is charged. 0 for lost data, which is in no bucket.
    #[must_use]
    pub fn charged_bytes(&self) -> u32 {
        if self.pointers.is_empty() { 0 } else { self.disk_bytes.min(self.length) }
    }
}

/// Value of a key in the extents tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExtentValue {
    /// Data in buckets.
    Data(DataExtent),
    /// The bytes themselves: the range starts at offset 0 and is as long as the data.
    Inline(Vec<u8>),
    /// Allocated but unwritten: reads as zeros; its space is held.
    Unwritten {
        /// Bytes, a multiple of the block size.
        length: u32,
    },
    /// Hides an ancestor snapshot's data: reads as a hole.
    Whiteout {
        /// Bytes.
        length: u32,
    },
}

const TAG_DATA: u8 = 1;
const TAG_INLINE: u8 = 2;
const TAG_UNWRITTEN: u8 = 3;
const TAG_WHITEOUT: u8 = 4;

impl ExtentValue {
    /// Bytes of file data that it covers: the key's range is `[position.offset - length, position.offset)`.
    #[must_use]
    pub fn length(&self) -> u64 {
        match self {
            Self::Data(data) => u64::from(data.length),
            Self::Inline(bytes) => bytes.len() as u64,
            Self::Unwritten { length } | Self::Whiteout { length } => u64::from(*length),
        }
    }

    /// The stored form.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        match self {
            Self::Data(data) => {
                out.reserve(32 + data.pointers.len() * 13 + data.checksums.len() * data.checksum_kind.stored_bytes());
                out.push(TAG_DATA);
                out.push(data.compression as u8);
                out.push(data.checksum_kind as u8);
                out.push(u8::try_from(data.pointers.len()).unwrap_or(u8::MAX));
                out.extend_from_slice(&data.length.to_le_bytes());
                for pointer in &data.pointers {
                    out.push(pointer.device.0);
                    out.extend_from_slice(&pointer.generation.to_le_bytes());
                    out.extend_from_slice(&pointer.offset.to_le_bytes());
                }
                if data.compression != CompressionKind::None {
                    for field in [data.disk_bytes, data.stream_bytes, data.frame_bytes, data.frame_offset] {
                        out.extend_from_slice(&field.to_le_bytes());
                    }
                }
                for checksum in &data.checksums {
                    out.extend(checksum.to_le_bytes().iter().take(data.checksum_kind.stored_bytes()));
                }
            }
            Self::Inline(bytes) => {
                out.reserve(1 + bytes.len());
                out.push(TAG_INLINE);
                out.extend_from_slice(bytes);
            }
            Self::Unwritten { length } => {
                out.push(TAG_UNWRITTEN);
                out.extend_from_slice(&length.to_le_bytes());
            }
            Self::Whiteout { length } => {
                out.push(TAG_WHITEOUT);
                out.extend_from_slice(&length.to_le_bytes());
            }
        }
        out
    }

    /// Decodes a stored value.
    ///
    /// # Errors
    /// If it is not one, or its lengths contradict each other.
    pub fn decode(bytes: &[u8]) -> Result<Self, Corruption> {
        let mut reader = Reader::new("extent", bytes);
        match reader.u8()? {
            TAG_DATA => Self::decode_data(reader).map(Self::Data),
            TAG_INLINE => {
                let bytes = reader.bytes(reader.remaining())?;
                if bytes.is_empty() {
                    return Err(Corruption::new("extent", "empty inline data"));
                }
                Ok(Self::Inline(bytes.to_vec()))
            }
            tag @ (TAG_UNWRITTEN | TAG_WHITEOUT) => {
                let length = reader.u32()?;
                if length == 0 {
                    return Err(reader.problem("length 0"));
                }
                reader.finish()?;
                Ok(if tag == TAG_UNWRITTEN { Self::Unwritten { length } } else { Self::Whiteout { length } })
            }
            other => Err(reader.problem(format!("unknown tag {other}"))),
        }
    }

    /// How many bytes of inline data a stored value is, if it is that: without copying them.
    #[must_use]
    pub fn inline_bytes(stored: &[u8]) -> Option<u64> {
        match stored.split_first() {
            Some((&TAG_INLINE, data)) if !data.is_empty() => Some(data.len() as u64),
            _ => None,
        }
    }

    fn decode_data(mut reader: Reader<'_>) -> Result<DataExtent, Corruption> {
        let compression = CompressionKind::from_stored(reader.u8()?)?;
        let checksum_kind = ChecksumKind::from_stored(reader.u8()?)?;
        let pointer_count = reader.u8()?;
        if pointer_count > 4 {
            return Err(reader.problem(format!("{pointer_count} pointers, at most 4 expected")));
        }
        let length = reader.u32()?;
        if pointer_count == 0 {
            reader.finish()?;
            let is_plain = compression == CompressionKind::None && checksum_kind == ChecksumKind::None;
            if !is_plain || length == 0 || length > LOST_BYTES_MAX {
                return Err(Corruption::new("extent", format!("{length} bytes of data, and no pointer")));
            }
            return Ok(DataExtent::lost(length));
        }
        let mut pointers = SmallVec::new();
        for _ in 0..pointer_count {
            pointers.push(ExtentPointer {
                device: DeviceIndex(reader.u8()?),
                generation: reader.u32()?,
                offset: reader.u64()?,
            });
        }
        let (disk_bytes, stream_bytes, frame_bytes, frame_offset) = match compression {
            CompressionKind::None => (length, length, length, 0),
            _ => (reader.u32()?, reader.u32()?, reader.u32()?, reader.u32()?),
        };
        if length == 0 || length > EXTENT_BYTES_MAX || disk_bytes == 0 || disk_bytes > EXTENT_BYTES_MAX {
            return Err(reader.problem(format!("{length} bytes of data, {disk_bytes} bytes on disk")));
        }
        if compression != CompressionKind::None
            && (frame_bytes > FRAME_BYTES_MAX
                || stream_bytes > disk_bytes
                || stream_bytes == 0
                || frame_offset.checked_add(length).is_none_or(|end| end > frame_bytes))
        {
            let problem =
                format!("part {frame_offset}+{length} of a frame of {frame_bytes} ({stream_bytes}/{disk_bytes})");
            return Err(reader.problem(problem));
        }
        let width = checksum_kind.stored_bytes();
        let mut checksums = Vec::new();
        if width > 0 {
            if !reader.remaining().is_multiple_of(width) {
                return Err(reader.problem(format!("{} bytes of checksums", reader.remaining())));
            }
            let count = reader.remaining() / width;
            if compression != CompressionKind::None && count != 1 {
                return Err(reader.problem(format!("{count} checksums of one frame")));
            }
            if count == 0 || !(length as usize).is_multiple_of(count) {
                return Err(reader.problem(format!("{count} checksums for {length} bytes")));
            }
            checksums.reserve_exact(count);
            for _ in 0..count {
                checksums.push(if width == 4 { u64::from(reader.u32()?) } else { reader.u64()? });
            }
        }
        reader.finish()?;
        Ok(DataExtent {
            length,
            pointers,
            compression,
            disk_bytes,
            stream_bytes,
            frame_bytes,
            frame_offset,
            checksum_kind,
            checksums,
        })
    }
}
