//! Kinds of checksums and of compression, as stored.

use crate::error::Corruption;

/// How blocks of file data are checked. Metadata is always crc32c.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ChecksumKind {
    /// Not at all.
    None = 0,
    /// CRC-32C, in the low 32 bits.
    #[default]
    Crc32c = 1,
    /// XXH3, 64 bits.
    Xxh3 = 2,
}

impl ChecksumKind {
    /// The kind with this stored number.
    ///
    /// # Errors
    /// For an unknown number.
    pub fn from_stored(stored: u8) -> Result<Self, Corruption> {
        match stored {
            0 => Ok(Self::None),
            1 => Ok(Self::Crc32c),
            2 => Ok(Self::Xxh3),
            other => Err(Corruption::new("checksum kind", format!("unknown number {other}"))),
        }
    }

    /// Bytes that one checksum takes in an extent's value: 0, 4 or 8.
    #[must_use]
    pub const fn stored_bytes(self) -> usize {
        match self {
            Self::None => 0,
            Self::Crc32c => 4,
            Self::Xxh3 => 8,
        }
    }

    /// The checksum of `data`; 0 for `None`.
    #[must_use]
    pub fn compute(self, data: &[u8]) -> u64 {
        match self {
            Self::None => 0,
            Self::Crc32c => u64::from(crc32c::crc32c(data)),
            Self::Xxh3 => xxhash_rust::xxh3::xxh3_64(data),
        }
    }
}

/// How a frame of file data is compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum CompressionKind {
    /// Raw.
    #[default]
    None = 0,
    /// LZ4 block.
    Lz4 = 1,
    /// zstd frame.
    Zstd = 2,
}

impl CompressionKind {
    /// The kind with this stored number.
    ///
    /// # Errors
    /// For an unknown number.
    pub fn from_stored(stored: u8) -> Result<Self, Corruption> {
        match stored {
            0 => Ok(Self::None),
            1 => Ok(Self::Lz4),
            2 => Ok(Self::Zstd),
            other => Err(Corruption::new("compression kind", format!("unknown number {other}"))),
        }
    }
}

/// Checksum of metadata: CRC-32C of the parts one after the other.
#[must_use]
pub fn metadata_checksum(parts: &[&[u8]]) -> u32 {
    parts.iter().fold(0, |crc, part| crc32c::crc32c_append(crc, part))
}

impl std::str::FromStr for ChecksumKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self::None),
            "crc32c" => Ok(Self::Crc32c),
            "xxh3" => Ok(Self::Xxh3),
            other => Err(format!("unknown checksum '{other}': use crc32c, xxh3 or none")),
        }
    }
}

impl std::fmt::Display for ChecksumKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Crc32c => "crc32c",
            Self::Xxh3 => "xxh3",
        })
    }
}
