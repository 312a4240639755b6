//! [`MemDevice`]: a device in memory, for tests and for filesystems that need not outlive the process.
//!
//! Everything is durable as soon as it is written. The one lock guards the bytes, for the time of a copy; nothing is waited for
//! under it.

use super::check::check_range;
use super::{BlockDevice, Image, ReadRequest, WriteRequest};
use crate::error::Result;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{LockClass, Rank, RwLock, order};

/// See the module's documentation.
#[derive(Debug)]
pub struct MemDevice {
    image: RwLock<Image>,
    size_bytes: u64,
    read_only: bool,
    bytes_written: AtomicU64,
}

impl MemDevice {
    /// A device of `size_bytes` zeros. It is sparse: only what is written takes memory.
    #[must_use]
    pub fn new(size_bytes: u64) -> Self {
        Self::from_image(Image::new(size_bytes), false)
    }

    /// A device that holds `image`.
    #[must_use]
    pub fn from_image(image: Image, read_only: bool) -> Self {
        Self {
            size_bytes: image.size_bytes(),
            image: RwLock::ranked(LockClass::new(Rank::InnerLeaf), image),
            read_only,
            bytes_written: AtomicU64::new(0),
        }
    }

    /// How many bytes were written since it was made.
    #[must_use]
    pub fn bytes_written(&self) -> u64 {
        self.bytes_written.load(Ordering::SeqCst)
    }

    /// What the device holds now.
    #[must_use]
    pub fn image(&self) -> Image {
        self.image.read().clone()
    }
}

impl BlockDevice for MemDevice {
    fn name(&self) -> &str {
        "memory"
    }

    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn block_bytes(&self) -> u32 {
        512
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn read_batch(&self, requests: &mut [ReadRequest<'_>], landed: &mut dyn FnMut(usize, Result<()>)) {
        order::check_held("a device read", order::OVER_READ);
        for (index, request) in requests.iter_mut().enumerate() {
            let outcome = check_range("read", self, request.offset, request.buffer.len() as u64);
            if outcome.is_ok() {
                self.image.read().read(request.offset, request.buffer);
            }
            landed(index, outcome);
        }
    }

    fn write_batch(&self, requests: &[WriteRequest<'_>]) -> Result<()> {
        order::check_held("a device write", order::OVER_WRITE);
        if self.read_only {
            return Err(crate::Error::ReadOnly);
        }
        for request in requests {
            check_range("write", self, request.offset, request.length())?;
            let mut image = self.image.write();
            let mut offset = request.offset;
            for slice in &request.data {
                image.write(offset, slice);
                offset += slice.len() as u64;
            }
            drop(image);
            self.bytes_written.fetch_add(request.length(), Ordering::SeqCst);
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        order::check_held("a device flush", order::OVER_WRITE);
        Ok(())
    }

    fn discard(&self, offset: u64, length: u64) -> Result<()> {
        order::check_held("a device discard", order::OVER_WRITE);
        if self.read_only {
            return Err(crate::Error::ReadOnly);
        }
        check_range("discard", self, offset, length)?;
        self.image.write().zero(offset, length);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;

    #[test]
    fn what_is_written_is_read_and_what_is_discarded_takes_no_memory() {
        let device = MemDevice::new(8 << 40);
        let offset = (8u64 << 40) - (1 << 20);
        let (front, back) = ([3; 512], [4; 1024]);
        device.write_batch(&[WriteRequest { offset, data: vec![&front, &back] }]).unwrap();
        let mut read = [0; 1536];
        device.read(offset, &mut read).unwrap();
        assert_eq!(read[..512], front);
        assert_eq!(read[512..], back);
        device.discard(offset, 1 << 20).unwrap();
        assert_eq!(device.image().resident_bytes(), 0);
    }

    #[test]
    fn requests_off_the_device_are_refused_one_by_one() {
        let device = MemDevice::new(4096);
        let (mut good, mut unaligned, mut beyond) = ([1; 512], [1; 511], [1; 1024]);
        let mut outcomes = [None, None, None];
        device.read_batch(
            &mut [
                ReadRequest { offset: 0, buffer: &mut good },
                ReadRequest { offset: 0, buffer: &mut unaligned },
                ReadRequest { offset: 3584, buffer: &mut beyond },
            ],
            &mut |index, outcome| outcomes[index] = Some(outcome),
        );
        assert!(matches!(outcomes[0], Some(Ok(()))));
        assert!(matches!(outcomes[1], Some(Err(Error::Invalid(_)))));
        assert!(matches!(outcomes[2], Some(Err(Error::Device { .. }))));
        assert!(device.write(u64::MAX - 511, &[0; 512]).is_err());
        assert!(matches!(MemDevice::from_image(Image::new(512), true).write(0, &[0; 512]), Err(Error::ReadOnly)));
    }
}
