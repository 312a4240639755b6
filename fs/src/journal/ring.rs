//! Where records lie: a linear space of bytes for each copy, and how much of it each kind of caller may fill.
//!
//! A *position* is a `u64` that only goes up: lap times ring size plus offset. So "full" and "empty" differ, and used space is a
//! subtraction. Records never cross the ring's end: [`Ring::place`] moves one that does not fit to the next lap's start. It is
//! monotone in position and in length, so placing upper bounds of lengths gives an upper bound of where real ones end.

use std::sync::Arc;

use super::{JournalConfig, JournalWatermark};
use crate::alloc::capacity::checkpoint_blocks;
use crate::device::BlockDevice;
use crate::error::{Error, Result};
use crate::format::journal::RECORD_ALIGNMENT_BYTES;

/// Records start and end on multiples of this.
pub(super) const BLOCK_BYTES: u64 = RECORD_ALIGNMENT_BYTES as u64;
/// Fewer blocks than this cannot hold two checkpoints' records beside ordinary ones.
const RING_BLOCKS_MIN: u64 = 16;

/// What an empty record that states D is for, and so how much of the ring may be full of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Statement {
    /// An idle journal says how far it is.
    Idle,
    /// Somebody wants emptied buckets free: as much as their own commits may fill.
    FreeSpace(JournalWatermark),
    /// Ring space is free as soon as this is durable: everything.
    Release,
}

/// One copy of the ring.
#[derive(Clone, Debug)]
pub(super) struct RingCopy {
    /// Index of the device.
    pub device: usize,
    /// Byte offset of the ring on it.
    pub start: u64,
}

/// The ring's size, its copies, and its watermarks.
#[derive(Clone, Debug)]
pub(super) struct Ring {
    /// Size in bytes.
    pub bytes: u64,
    /// All copies; equal in content.
    pub copies: Vec<RingCopy>,
    normal: u64,
    reclaim: u64,
    checkpoint: u64,
}

impl Ring {
    /// Checks the configuration: the copies are equal in size, lie on their devices, and are large enough.
    pub fn new(config: &JournalConfig) -> Result<Self> {
        let bad = |problem: String| Err(Error::corrupt("journal area", problem));
        let Some(first) = config.copies.first() else { return bad("it has no copies".into()) };
        let bucket_bytes = u64::from(config.bucket_bytes);
        let bytes = first.count.saturating_mul(bucket_bytes);
        if !bucket_bytes.is_multiple_of(BLOCK_BYTES) || bytes / BLOCK_BYTES < RING_BLOCKS_MIN {
            return bad(format!("{} buckets of {bucket_bytes} bytes are too small", first.count));
        }
        let mut copies = Vec::new();
        for range in &config.copies {
            let Some(device) = config.devices.get(usize::from(range.device)) else {
                return bad(format!("device {} is missing", range.device));
            };
            let end = range.first.checked_add(range.count).and_then(|end| end.checked_mul(bucket_bytes));
            if range.count != first.count || end.is_none_or(|end| end > device.size_bytes()) {
                return bad(format!("{} buckets from {} on device {}", range.count, range.first, range.device));
            }
            copies.push(RingCopy { device: usize::from(range.device), start: range.first * bucket_bytes });
        }
        let blocks = bytes / BLOCK_BYTES;
        // From the top: one block is never used (so that full and empty differ on disk too), three are for the records that state D
        // so that a release takes effect, then what two checkpoints log, then what frees space. `alloc::capacity` caps the dirty nodes so
        // that the claims of a checkpoint fit its share.
        let checkpoint = blocks - 4;
        let reclaim = checkpoint - checkpoint_blocks(blocks);
        let normal = reclaim - (blocks / 16).max(2);
        Ok(Self {
            bytes,
            copies,
            normal: normal * BLOCK_BYTES,
            reclaim: reclaim * BLOCK_BYTES,
            checkpoint: checkpoint * BLOCK_BYTES,
        })
    }

    /// Offset in the ring of a position.
    pub fn offset(&self, position: u64) -> u64 {
        position % self.bytes
    }

    /// Where a record of `length` bytes starts if `position` is the next free one.
    pub fn place(&self, position: u64, length: u64) -> u64 {
        let offset = self.offset(position);
        if offset + length <= self.bytes { position } else { position - offset + self.bytes }
    }

    /// How many bytes may be in use after a reservation at this watermark.
    pub fn limit(&self, watermark: JournalWatermark) -> u64 {
        match watermark {
            JournalWatermark::Normal => self.normal,
            JournalWatermark::Reclaim => self.reclaim,
            JournalWatermark::Checkpoint => self.checkpoint,
        }
    }

    /// How many bytes may be in use after an empty record that states D.
    pub fn statement_limit(&self, purpose: Statement) -> u64 {
        match purpose {
            Statement::Idle => self.normal,
            Statement::FreeSpace(watermark) => self.limit(watermark),
            Statement::Release => self.bytes - BLOCK_BYTES,
        }
    }

    /// Bytes of the largest record that fits an empty ring wherever its head is: wrapping wastes less than the record's length.
    pub fn record_bytes_max(&self, wanted: u32) -> u64 {
        let largest = (self.normal / 2 / BLOCK_BYTES).max(1) * BLOCK_BYTES;
        (u64::from(wanted) / BLOCK_BYTES * BLOCK_BYTES).clamp(BLOCK_BYTES, largest)
    }
}

/// Flushes every device: data that a record names may lie on any of them.
pub(super) fn flush_all(devices: &[Arc<dyn BlockDevice>]) -> Result<()> {
    devices.iter().try_for_each(|device| device.flush())
}
