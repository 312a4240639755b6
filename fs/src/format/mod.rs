//! Byte layouts and their codecs: pure functions, no I/O, no state. `FORMAT.md` holds the same layouts as tables.
//!
//! Every decoder is total: arbitrary bytes give an error, never a panic, and never an allocation that is not bounded by the
//! length of the input. Every structure carries its own version; unknown ones are refused with a message, never guessed at.
//! All integers are little-endian.

pub mod checkpoint;
pub mod checksum;
pub mod codec;
pub mod extent;
pub mod journal;
pub mod key;
pub mod mark;
pub mod namespace;
pub mod node;
pub mod position;
pub mod space;
pub mod superblock;

pub use checksum::{ChecksumKind, CompressionKind};
pub use key::{BtreeId, Value};
pub use position::Position;

use crate::error::Corruption;

/// Reads little-endian fields from a byte slice; running out of bytes is an error that names the structure.
#[derive(Debug)]
pub struct Reader<'a> {
    bytes: &'a [u8],
    what: &'static str,
}

impl<'a> Reader<'a> {
    /// A reader over `bytes` of a structure called `what` in messages.
    #[must_use]
    pub fn new(what: &'static str, bytes: &'a [u8]) -> Self {
        Self { bytes, what }
    }

    /// Bytes not yet read.
    #[must_use]
    pub fn remaining(&self) -> usize {
        self.bytes.len()
    }

    /// The next `length` bytes.
    ///
    /// # Errors
    /// If there are fewer.
    pub fn bytes(&mut self, length: usize) -> Result<&'a [u8], Corruption> {
        match self.bytes.split_at_checked(length) {
            Some((head, tail)) => {
                self.bytes = tail;
                Ok(head)
            }
            None => Err(self.problem(format!("{length} bytes expected, {} left", self.bytes.len()))),
        }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Corruption> {
        let mut array = [0; N];
        array.copy_from_slice(self.bytes(N)?);
        Ok(array)
    }

    /// The next byte.
    ///
    /// # Errors
    /// If there is none. So for the others.
    pub fn u8(&mut self) -> Result<u8, Corruption> {
        self.array::<1>().map(|[byte]| byte)
    }

    /// The next two bytes.
    pub fn u16(&mut self) -> Result<u16, Corruption> {
        self.array().map(u16::from_le_bytes)
    }

    /// The next four bytes.
    pub fn u32(&mut self) -> Result<u32, Corruption> {
        self.array().map(u32::from_le_bytes)
    }

    /// The next eight bytes.
    pub fn u64(&mut self) -> Result<u64, Corruption> {
        self.array().map(u64::from_le_bytes)
    }

    /// The next eight bytes, signed.
    pub fn i64(&mut self) -> Result<i64, Corruption> {
        self.array().map(i64::from_le_bytes)
    }

    /// Ends the reading: nothing may be left.
    ///
    /// # Errors
    /// If something is.
    pub fn finish(self) -> Result<(), Corruption> {
        if self.bytes.is_empty() { Ok(()) } else { Err(self.problem(format!("{} bytes too many", self.bytes.len()))) }
    }

    /// A corruption of this structure.
    #[must_use]
    pub fn problem(&self, problem: impl Into<String>) -> Corruption {
        Corruption::new(self.what, problem)
    }
}

#[cfg(test)]
mod tests;
