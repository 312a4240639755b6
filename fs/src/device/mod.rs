//! Blocks in, blocks out, batched.
//!
//! A [`BlockDevice`] is a flat array of bytes that is read and written in whole blocks. **Ordering contract**: writes that have
//! completed are on the medium only after a [`flush`](BlockDevice::flush) that was issued after their completion; until then any
//! subset of them, in any order, torn at 512 bytes, may survive a power cut. A read sees every write that completed before
//! it was issued. A discarded range holds undefined bytes until it is written again.
//!
//! All calls block until the whole batch is done; the batch is one submission to the host. A device has no lock that is held
//! across I/O, so any number of threads may submit at once.

mod check;
mod checked;
mod file;
mod image;
mod lock;
mod memory;
mod pool;
mod sim;
mod transfer;
mod uring;

pub use checked::CheckedDevice;
pub use file::{Backend, Creation, DirectIo, FileDevice, FileOptions};
pub use image::{CHUNK_BYTES, Image};
pub use lock::{ImageIdentity, is_same_image, lock_holders};
pub use memory::MemDevice;
pub use sim::{
    Boundary, BoundaryHook, BoundaryKind, CrashPlan, DiscardMode, PlanOptions, Plans, SECTOR_BYTES, Sectors, SimDevice,
    SimOptions, Snapshot, Survivor, UnflushedWrite,
};

use crate::error::Result;

/// One read of a batch.
#[derive(Debug)]
pub struct ReadRequest<'a> {
    /// Byte offset on the device, a multiple of the device's block size.
    pub offset: u64,
    /// Where the bytes go. Its length is a multiple of the block size. Aligned buffers ([`crate::memory::AlignedBuffer`], folios)
    /// are read into directly, others through a bounce buffer.
    pub buffer: &'a mut [u8],
}

/// One write of a batch: the slices one after the other.
#[derive(Clone, Debug)]
pub struct WriteRequest<'a> {
    /// Byte offset on the device, a multiple of the device's block size.
    pub offset: u64,
    /// The bytes; their total length is a multiple of the block size.
    pub data: Vec<&'a [u8]>,
}

impl WriteRequest<'_> {
    /// Total length in bytes.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.data.iter().map(|slice| slice.len() as u64).sum()
    }
}

/// What a device that lies over another says as that one does: its name and its measures.
#[macro_export]
macro_rules! as_the_device_below {
    ($below:ident) => {
        fn name(&self) -> &str {
            self.$below.name()
        }

        fn size_bytes(&self) -> u64 {
            self.$below.size_bytes()
        }

        fn block_bytes(&self) -> u32 {
            self.$below.block_bytes()
        }
    };
}

/// A device. See the module's documentation for the ordering contract.
pub trait BlockDevice: Send + Sync + std::fmt::Debug {
    /// Path or name, for messages.
    fn name(&self) -> &str;
    /// Size in bytes.
    fn size_bytes(&self) -> u64;
    /// Alignment in bytes of offsets and lengths; a power of two, at most 4096.
    fn block_bytes(&self) -> u32;
    /// Whether writes are refused.
    fn is_read_only(&self) -> bool;

    /// Reads a batch in one submission. `landed(index, result)` is called on this thread for each request as it completes, in
    /// any order, exactly once. The requests' buffers may be looked at from `landed` only through the request's index after the
    /// call returns.
    fn read_batch(&self, requests: &mut [ReadRequest<'_>], landed: &mut dyn FnMut(usize, Result<()>));

    /// Writes a batch in one submission and waits for it. No order inside a batch.
    ///
    /// # Errors
    /// The first failure; the others of the batch may or may not have been written.
    fn write_batch(&self, requests: &[WriteRequest<'_>]) -> Result<()>;

    /// Makes every write that completed before this call durable.
    ///
    /// # Errors
    /// After a failure nothing may be assumed durable, and no later flush may be trusted: the caller latches.
    fn flush(&self) -> Result<()>;

    /// Gives a range back to the host (punches the image file). Its content is undefined afterwards. A no-op where the host
    /// cannot.
    ///
    /// # Errors
    /// The host's, for a real I/O error.
    fn discard(&self, offset: u64, length: u64) -> Result<()>;

    /// Reads one range.
    ///
    /// # Errors
    /// The device's.
    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let mut outcome = Ok(());
        self.read_batch(&mut [ReadRequest { offset, buffer }], &mut |_, result| outcome = result);
        outcome
    }

    /// Writes one range.
    ///
    /// # Errors
    /// The device's.
    fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.write_batch(&[WriteRequest { offset, data: vec![data] }])
    }
}
