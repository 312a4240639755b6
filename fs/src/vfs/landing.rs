//! The landing reserve: space for what the kernel's page cache has accepted, and we have not seen yet (`cache=writeback`).
//!
//! The kernel may hold as much as its dirty limit. So that much is promised to nobody else, and `df` does not show it. A delayed write
//! that finds no other space takes from it; what was taken is made up for before anyone else is promised space again.
//!
//! Locks: its own, an outer leaf: space is promised under it.

use super::Vfs;
use crate::error::{Error, Result};
use crate::space::SpaceReservation;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{LockClass, Mutex, Rank};

/// The reserve's largest part of a filesystem.
const SHARE: u64 = 16;

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Landing {
    /// Bytes to hold; 0 where the kernel delays nothing.
    target_bytes: AtomicU64,
    held: Mutex<Option<SpaceReservation>>,
}

impl Default for Landing {
    fn default() -> Self {
        let held = Mutex::ranked(LockClass::new(Rank::OuterLeaf), None);
        Self { target_bytes: AtomicU64::new(0), held }
    }
}

impl Vfs {
    /// The largest landing reserve of this filesystem in bytes: what the kernel's dirty limit should be lowered to.
    #[must_use]
    pub fn landing_bytes_max(&self) -> u64 {
        self.space.usage().total_bytes / SHARE
    }

    /// Holds `bytes` (at most [`Self::landing_bytes_max`]) for writes that the kernel delays, or as much of it as there is; the rest as it
    /// becomes free.
    pub fn hold_landing_reserve(&self, bytes: u64) {
        self.landing.target_bytes.store(bytes.min(self.landing_bytes_max()), Ordering::Relaxed);
        self.fill_landing_reserve();
    }

    /// Makes up for what was taken.
    pub(super) fn fill_landing_reserve(&self) {
        let target_bytes = self.landing.target_bytes.load(Ordering::Relaxed);
        if target_bytes == 0 || self.options.read_only {
            return;
        }
        let mut held = self.landing.held.lock();
        let missing = target_bytes.saturating_sub(held.as_ref().map_or(0, SpaceReservation::bytes));
        let bytes = missing.min(self.space.usage().available_bytes);
        if bytes == 0 {
            return;
        }
        // Refused only if somebody was faster.
        if let Ok(more) = self.space.reserve(bytes) {
            match held.as_mut() {
                Some(held) => held.merge(more),
                None => *held = Some(more),
            }
        }
    }

    /// Takes space for a delayed write.
    ///
    /// # Errors
    /// [`Error::NoSpace`] if the reserve is used up.
    pub(super) fn take_landing_reserve(&self, bytes: u64) -> Result<SpaceReservation> {
        let mut held = self.landing.held.lock();
        match held.as_mut().filter(|held| held.bytes() >= bytes) {
            Some(held) => Ok(held.split(bytes)),
            None => Err(Error::NoSpace("the reserve for writes that the kernel delays is used up")),
        }
    }

    /// Gives it back: the kernel is gone.
    pub(super) fn drop_landing_reserve(&self) {
        self.landing.target_bytes.store(0, Ordering::Relaxed);
        drop(self.landing.held.lock().take());
    }
}
