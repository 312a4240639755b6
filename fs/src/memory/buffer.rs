//! Heap bytes that O_DIRECT accepts.
//!
//! An [`AlignedBuffer`] owns a zero-initialised allocation that starts on a multiple of [`ALIGNMENT_BYTES`]. Its length never
//! changes, so addresses that were handed to the kernel stay valid for the buffer's life. It takes no locks.

#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use crate::error::{Error, Result};

/// Alignment of every [`AlignedBuffer`], in bytes: the largest logical block of any device that we serve.
pub const ALIGNMENT_BYTES: usize = 4096;

/// Owned bytes, aligned for direct I/O. Dereferences to `[u8]`.
pub struct AlignedBuffer {
    /// Start of the allocation; dangling (but aligned) if the length is 0.
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: the buffer owns its bytes exclusively and has no interior mutability, as a `Box<[u8]>`.
unsafe impl Send for AlignedBuffer {}
// SAFETY: as above: a shared reference gives shared access to plain bytes only.
unsafe impl Sync for AlignedBuffer {}

impl AlignedBuffer {
    /// A buffer of `length_bytes` zeros. For lengths that we choose ourselves: like `Vec`, it ends the process if the host has
    /// no memory. Where the length comes from disk or from a user, take [`Self::try_zeroed`].
    #[must_use]
    pub fn zeroed(length_bytes: usize) -> Self {
        match Self::layout(length_bytes) {
            Some(layout) => Self::allocate(length_bytes).unwrap_or_else(|| handle_alloc_error(layout)),
            None => handle_alloc_error(Layout::new::<[u8; ALIGNMENT_BYTES]>()),
        }
    }

    /// A buffer of `length_bytes` zeros.
    ///
    /// # Errors
    /// ENOMEM if the host has no memory for it. The caller bounds the length: an overcommitting host refuses nothing.
    pub fn try_zeroed(length_bytes: usize) -> Result<Self> {
        Self::allocate(length_bytes).ok_or(Error::Posix(rustix::io::Errno::NOMEM))
    }

    /// A copy of `bytes`.
    ///
    /// # Errors
    /// ENOMEM, as [`Self::try_zeroed`].
    pub fn copy_of(bytes: &[u8]) -> Result<Self> {
        let mut buffer = Self::try_zeroed(bytes.len())?;
        buffer.copy_from_slice(bytes);
        Ok(buffer)
    }

    /// The bytes.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        self
    }

    /// The bytes, to change.
    #[must_use]
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        self
    }

    fn layout(length_bytes: usize) -> Option<Layout> {
        Layout::from_size_align(length_bytes, ALIGNMENT_BYTES).ok()
    }

    fn allocate(length: usize) -> Option<Self> {
        let layout = Self::layout(length)?;
        if length == 0 {
            let start = NonNull::new(std::ptr::without_provenance_mut::<u8>(ALIGNMENT_BYTES))?;
            return Some(Self { start, length });
        }
        // SAFETY: the layout's size is not zero.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) })?;
        Some(Self { start, length })
    }
}

impl Drop for AlignedBuffer {
    fn drop(&mut self) {
        if self.length > 0
            && let Some(layout) = Self::layout(self.length)
        {
            // SAFETY: `start` came from `alloc_zeroed` with this very layout, and is freed once.
            unsafe { dealloc(self.start.as_ptr(), layout) };
        }
    }
}

impl Deref for AlignedBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `start` is valid for `length` initialised bytes (or dangling and aligned for 0), borrowed as `self` is.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.length) }
    }
}

impl DerefMut for AlignedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.length) }
    }
}

impl AsRef<[u8]> for AlignedBuffer {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Clone for AlignedBuffer {
    fn clone(&self) -> Self {
        let mut copy = Self::zeroed(self.length);
        copy.copy_from_slice(self);
        copy
    }
}

impl fmt::Debug for AlignedBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedBuffer({} bytes)", self.length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_aligned_zeroed_and_of_the_length_asked() {
        for length in [0, 1, 511, 512, 4096, 4097, 1 << 20] {
            let mut buffer = AlignedBuffer::zeroed(length);
            assert_eq!(buffer.as_ptr() as usize % ALIGNMENT_BYTES, 0);
            assert_eq!(buffer.len(), length);
            assert!(buffer.iter().all(|&byte| byte == 0));
            buffer.fill(7);
            assert!(buffer.clone().iter().all(|&byte| byte == 7));
        }
    }

    #[test]
    fn an_impossible_length_is_an_error() {
        assert!(AlignedBuffer::try_zeroed(usize::MAX).is_err());
        assert!(AlignedBuffer::try_zeroed(isize::MAX as usize - 4096).is_err());
    }

    #[test]
    fn a_copy_holds_the_bytes() {
        assert_eq!(&*AlignedBuffer::copy_of(b"abc").unwrap(), b"abc");
    }
}
