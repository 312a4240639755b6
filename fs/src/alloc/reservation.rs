//! Promises of space: what makes ENOSPC the answer to the `write` or `fallocate` that asked, never to a later one.

use super::capacity::whole_blocks;
use super::{Counters, Reserves};
use crate::error::{Error, Result};
use crate::sync::Arc;

/// A promise that `bytes()` of data, and the metadata that names it, can be written. Given back when dropped; to be held until the
/// transaction that counts the data has committed.
#[derive(Debug)]
pub struct SpaceReservation {
    counters: Arc<Counters>,
    bytes: u64,
    overhead_bytes: u64,
}

impl SpaceReservation {
    /// Promises `bytes` of data, rounded up to blocks, and their overhead.
    ///
    /// # Errors
    /// [`Error::NoSpace`] if they are not there.
    pub(super) fn admit(counters: &Arc<Counters>, reserves: &Reserves, bytes: u64) -> Result<Self> {
        let bytes = whole_blocks(reserves, bytes);
        Self::admit_with(counters, reserves, bytes, reserves.overhead_bytes(bytes))
    }

    /// Promises `bytes` of unwritten space, rounded up to blocks, with what writing it block by block will take.
    ///
    /// # Errors
    /// [`Error::NoSpace`] if they are not there.
    pub(super) fn admit_unwritten(counters: &Arc<Counters>, reserves: &Reserves, bytes: u64) -> Result<Self> {
        let bytes = whole_blocks(reserves, bytes);
        let overhead_bytes = reserves.overhead_bytes(bytes).max(reserves.unwritten_overhead_bytes(bytes));
        Self::admit_with(counters, reserves, bytes, overhead_bytes)
    }

    fn admit_with(counters: &Arc<Counters>, reserves: &Reserves, bytes: u64, overhead_bytes: u64) -> Result<Self> {
        if counters.admit(reserves, bytes.saturating_add(overhead_bytes)) {
            Ok(Self { counters: Arc::clone(counters), bytes, overhead_bytes })
        } else {
            Err(Error::NoSpace("all of the filesystem's space is used or promised"))
        }
    }

    /// Promises metadata only: `key_bytes` of keys and values, in half-full nodes, in all copies.
    ///
    /// # Errors
    /// [`Error::NoSpace`] if it is not there.
    pub(super) fn admit_metadata(counters: &Arc<Counters>, reserves: &Reserves, key_bytes: u64) -> Result<Self> {
        let overhead_bytes = reserves.metadata_overhead_bytes(key_bytes);
        if counters.admit(reserves, overhead_bytes) {
            Ok(Self { counters: Arc::clone(counters), bytes: 0, overhead_bytes })
        } else {
            Err(Error::NoSpace("all of the filesystem's space is used or promised"))
        }
    }

    /// Promises from the reserve: counted, never refused.
    pub(super) fn privileged(counters: &Arc<Counters>, reserves: &Reserves, bytes: u64) -> Self {
        let bytes = whole_blocks(reserves, bytes);
        let overhead_bytes = reserves.overhead_bytes(bytes);
        counters.admit_always(bytes.saturating_add(overhead_bytes));
        Self { counters: Arc::clone(counters), bytes, overhead_bytes }
    }

    /// Bytes of data that it covers.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Splits `bytes` off (at most all), with their share of the overhead.
    #[must_use]
    pub fn split(&mut self, bytes: u64) -> Self {
        let bytes = bytes.min(self.bytes);
        let share = u128::from(self.overhead_bytes) * u128::from(bytes) / u128::from(self.bytes.max(1));
        let overhead_bytes = u64::try_from(share).unwrap_or(self.overhead_bytes).min(self.overhead_bytes);
        self.bytes -= bytes;
        self.overhead_bytes -= overhead_bytes;
        Self { counters: Arc::clone(&self.counters), bytes, overhead_bytes }
    }

    /// Adds another reservation of the same filesystem to this one.
    pub fn merge(&mut self, mut other: Self) {
        debug_assert!(Arc::ptr_eq(&self.counters, &other.counters), "reservations of two filesystems");
        self.bytes += std::mem::take(&mut other.bytes);
        self.overhead_bytes += std::mem::take(&mut other.overhead_bytes);
    }
}

impl Drop for SpaceReservation {
    fn drop(&mut self) {
        self.counters.give_back(self.bytes.saturating_add(self.overhead_bytes));
    }
}
