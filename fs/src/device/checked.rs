//! [`CheckedDevice`]: refuses to write after the first failure, and counts.
//!
//! Invariants:
//! 1. Once a write or a flush has failed, or somebody called [`CheckedDevice::latch`], every later write, flush and discard fails
//!    with [`Error::Latched`]: what the medium holds is unknown, and a second flush that "succeeds" proves nothing (the host may
//!    have dropped the dirty pages with the first error).
//! 2. A flush or a write that was under way when the latch fell is not acknowledged either.
//! 3. Reads go on.
//!
//! The lock guards the reason, for the time of a copy; it is taken on the failing paths only.

use std::fmt;

use super::{BlockDevice, ReadRequest, WriteRequest};
use crate::env::blocking;
use crate::error::{Error, Result};
use crate::metrics::Metrics;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Arc, Mutex};

/// See the module's documentation.
pub struct CheckedDevice {
    inner: Arc<dyn BlockDevice>,
    metrics: Arc<Metrics>,
    latched: AtomicBool,
    reason: Mutex<Option<String>>,
}

impl CheckedDevice {
    /// Wraps `inner`; counts go to `metrics`.
    #[must_use]
    pub fn new(inner: Arc<dyn BlockDevice>, metrics: Arc<Metrics>) -> Self {
        Self { inner, metrics, latched: AtomicBool::new(false), reason: Mutex::new(None) }
    }

    /// The device inside.
    #[must_use]
    pub fn inner(&self) -> &Arc<dyn BlockDevice> {
        &self.inner
    }

    /// Refuses all writes from now on. The first reason is kept; it is logged once.
    pub fn latch(&self, reason: impl Into<String>) {
        let mut kept = self.reason.lock();
        if kept.is_none() {
            let reason = reason.into();
            tracing::error!(device = self.inner.name(), %reason, "nothing more is written to the device");
            *kept = Some(reason);
            // After the reason is there, so that whoever sees the flag finds it.
            self.latched.store(true, Ordering::Release);
        }
    }

    /// Whether writes are refused.
    #[must_use]
    pub fn is_latched(&self) -> bool {
        self.latched.load(Ordering::Acquire)
    }

    /// Why writes are refused, if they are.
    #[must_use]
    pub fn latched_reason(&self) -> Option<String> {
        if self.is_latched() { self.reason.lock().clone() } else { None }
    }

    /// # Errors
    /// [`Error::Latched`] if writes are refused.
    pub fn check_latch(&self) -> Result<()> {
        match self.latched_reason() {
            Some(reason) => Err(Error::Latched { reason }),
            None => Ok(()),
        }
    }

    /// Runs a changing operation between two looks at the latch.
    fn guarded(&self, operation: impl FnOnce() -> Result<()>) -> Result<()> {
        self.check_latch()?;
        blocking::about_to_wait();
        match operation() {
            Ok(()) => self.check_latch(),
            // Refused before anything was sent to the medium: nothing is in doubt.
            Err(error @ (Error::ReadOnly | Error::Invalid(_))) => Err(error),
            Err(error) => {
                self.latch(error.to_string());
                Err(error)
            }
        }
    }
}

impl fmt::Debug for CheckedDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CheckedDevice").field("inner", &self.inner).field("latched", &self.latched_reason()).finish()
    }
}

impl BlockDevice for CheckedDevice {
    crate::as_the_device_below!(inner);

    fn is_read_only(&self) -> bool {
        self.inner.is_read_only()
    }

    fn read_batch(&self, requests: &mut [ReadRequest<'_>], landed: &mut dyn FnMut(usize, Result<()>)) {
        self.metrics.device_bytes_read.add(requests.iter().map(|request| request.buffer.len() as u64).sum());
        blocking::about_to_wait();
        self.inner.read_batch(requests, landed);
    }

    fn write_batch(&self, requests: &[WriteRequest<'_>]) -> Result<()> {
        self.guarded(|| {
            self.inner.write_batch(requests)?;
            self.metrics.device_bytes_written.add(requests.iter().map(WriteRequest::length).sum());
            Ok(())
        })
    }

    fn flush(&self) -> Result<()> {
        self.guarded(|| {
            self.inner.flush()?;
            self.metrics.device_flushes.increment();
            Ok(())
        })
    }

    fn discard(&self, offset: u64, length: u64) -> Result<()> {
        // A failed discard leaves undefined bytes where undefined bytes were allowed: it is reported, and latches nothing.
        self.check_latch()?;
        self.inner.discard(offset, length)?;
        self.metrics.device_discards.increment();
        self.check_latch()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{Image, MemDevice, SimDevice, SimOptions};

    fn checked(inner: impl BlockDevice + 'static) -> CheckedDevice {
        CheckedDevice::new(Arc::new(inner), Arc::new(Metrics::default()))
    }

    #[test]
    fn the_first_write_failure_latches_and_reads_go_on() {
        let sim = SimDevice::new(1 << 20, SimOptions::default());
        sim.fail_write(1, rustix::io::Errno::IO);
        let device = checked(sim);
        device.write(0, &[1; 512]).unwrap();
        assert!(matches!(device.write(512, &[1; 512]), Err(Error::Device { .. })));
        assert!(device.is_latched());
        assert!(matches!(device.write(512, &[1; 512]), Err(Error::Latched { .. })));
        assert!(matches!(device.flush(), Err(Error::Latched { .. })));
        assert!(matches!(device.discard(0, 512), Err(Error::Latched { .. })));
        let mut read = [0; 512];
        device.read(0, &mut read).unwrap();
        assert_eq!(read, [1; 512]);
    }

    #[test]
    fn a_failed_flush_latches_although_the_next_would_succeed() {
        let sim = SimDevice::new(1 << 20, SimOptions::default());
        sim.fail_flush(0, rustix::io::Errno::IO);
        let device = checked(sim);
        assert!(matches!(device.flush(), Err(Error::Device { .. })));
        assert!(matches!(device.flush(), Err(Error::Latched { .. })));
    }

    #[test]
    fn a_refusal_before_the_medium_does_not_latch() {
        let device = checked(MemDevice::from_image(Image::new(4096), true));
        assert!(matches!(device.write(0, &[0; 512]), Err(Error::ReadOnly)));
        assert!(!device.is_latched());
        let device = checked(MemDevice::new(4096));
        assert!(matches!(device.write(1, &[0; 512]), Err(Error::Invalid(_))));
        assert!(!device.is_latched());
    }

    #[test]
    fn the_first_reason_is_kept() {
        let device = checked(MemDevice::new(4096));
        device.latch("one");
        device.latch("two");
        assert_eq!(device.latched_reason().as_deref(), Some("one"));
    }

    #[test]
    fn bytes_and_flushes_are_counted() {
        let metrics = Arc::new(Metrics::default());
        let device = CheckedDevice::new(Arc::new(MemDevice::new(1 << 20)), metrics.clone());
        device.write(0, &[0; 1024]).unwrap();
        device.read(0, &mut [0; 512]).unwrap();
        device.flush().unwrap();
        device.discard(0, 512).unwrap();
        assert_eq!(metrics.device_bytes_written.get(), 1024);
        assert_eq!(metrics.device_bytes_read.get(), 512);
        assert_eq!((metrics.device_flushes.get(), metrics.device_discards.get()), (1, 1));
    }
}
