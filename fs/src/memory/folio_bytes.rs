//! The memory of folios: a power-of-two run of 4 KiB blocks, aligned to 4096 bytes, guarded by a [`ReferenceWord`].
//!
//! This is the only place where the cache touches raw memory. The interface is safe: [`ByteReference`] is a `&[u8]` for as long as
//! it lives, [`FolioWriter`] a `&mut [u8]`, and the word makes sure that they never exist together. Both keep the memory alive, so a
//! reference may outlive the folio, the inode and the cache.
//!
//! **Gifts**: a run whose pages a pipe refers to ([`super::Pipe`]) has one byte reference that is never given back, so its bytes do not
//! change any more, and when the run ends its pages are taken out of this process's memory: nobody else ever writes to a page that
//! the pipe still holds.

use std::alloc::Layout;
use std::ops::{Deref, DerefMut, Range};
use std::ptr::NonNull;

use super::budget::{Budget, MemoryReservation};
use super::word::ReferenceWord;
use crate::error::{Error, Result};
use crate::sync::Arc;
use crate::sync::atomic::{AtomicBool, Ordering};

/// Alignment of folio memory in bytes: what O_DIRECT wants, and a page.
pub const FOLIO_ALIGNMENT: usize = 4096;
/// The largest run in bytes.
pub const FOLIO_BYTES_MAX: usize = 1 << 20;

/// A run of memory. Made by [`FolioBytes::allocate`], read through [`FolioBytes::reference`], changed through [`FolioBytes::try_write`].
#[derive(Debug)]
pub struct FolioBytes {
    /// Always there but for the moment of the drop.
    memory: Option<Memory>,
    word: ReferenceWord,
    /// Somebody outside of this process's control may look at the pages. Set once, before they are handed over.
    is_gifted: AtomicBool,
    budget: Arc<Budget>,
}

/// An allocation of initialised bytes, aligned to [`FOLIO_ALIGNMENT`]; freed when it is dropped. By itself it gives no access.
#[derive(Debug)]
pub(super) struct Memory {
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: it owns its allocation, and gives no access to it.
#[expect(unsafe_code)]
unsafe impl Send for Memory {}
// SAFETY: as above: a shared `Memory` shows an address and a length. Access goes through `FolioBytes`, whose word arbitrates it.
#[expect(unsafe_code)]
unsafe impl Sync for Memory {}

impl Memory {
    fn layout(length: usize) -> Option<Layout> {
        Layout::from_size_align(length, FOLIO_ALIGNMENT).ok()
    }

    fn allocate_zeroed(length: usize) -> Option<Self> {
        let layout = Self::layout(length).filter(|layout| layout.size() > 0)?;
        // SAFETY: the layout has a non-zero size, checked on the line above.
        #[expect(unsafe_code)]
        let start = NonNull::new(unsafe { std::alloc::alloc_zeroed(layout) })?;
        Some(Self { start, length })
    }

    pub(super) fn length(&self) -> usize {
        self.length
    }

    /// Gives the pages up: whoever else refers to them keeps them as they are, and the addresses are backed by fresh zeros from now on.
    /// Where the host refuses that, the addresses are never used again.
    fn renounce(self) {
        // SAFETY: the range is exactly our allocation, whole pages of anonymous memory (`Pipe` gifts only where the host's pages are no
        // larger than a folio's alignment) that nobody refers to any more, as in `drop`; zeros are initialised bytes.
        #[expect(unsafe_code)]
        let outcome =
            unsafe { rustix::mm::madvise(self.start.as_ptr().cast(), self.length, rustix::mm::Advice::LinuxDontNeed) };
        if let Err(error) = outcome {
            tracing::warn!(%error, bytes = self.length, "memory that a pipe refers to cannot be unmapped: it is lost");
            std::mem::forget(self);
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Some(layout) = Self::layout(self.length) {
            // SAFETY: the memory came from the global allocator with this very layout, and nobody refers to it: every reference and
            // every writer holds an `Arc` of the `FolioBytes` that owned it, and that is gone.
            #[expect(unsafe_code)]
            unsafe {
                std::alloc::dealloc(self.start.as_ptr(), layout);
            }
        }
    }
}
impl FolioBytes {
    /// Memory of `length` bytes taken from `reservation`; the caller is its writer. Its bytes are zero or those of an earlier life, so the
    /// caller writes whatever it lets others see. `length` must be a power of two of
    /// at least 4096 and at most [`FOLIO_BYTES_MAX`] bytes.
    ///
    /// # Errors
    /// [`Error::Bug`] for another length, ENOMEM if the host has none.
    pub fn allocate(reservation: &mut MemoryReservation, length: usize) -> Result<FolioWriter> {
        if !length.is_power_of_two() || !(FOLIO_ALIGNMENT..=FOLIO_BYTES_MAX).contains(&length) {
            return Err(Error::Bug(format!("a folio of {length} bytes")));
        }
        let share = reservation.split_off(length as u64);
        let budget = share.into_budget();
        let Some(memory) = budget.take_spare(length).or_else(|| Memory::allocate_zeroed(length)) else {
            budget.release(length as u64);
            return Err(Error::Posix(rustix::io::Errno::NOMEM));
        };
        let bytes = Arc::new(Self {
            memory: Some(memory),
            word: ReferenceWord::new_writing(),
            is_gifted: AtomicBool::new(false),
            budget,
        });
        Ok(FolioWriter { bytes, range: 0..length })
    }

    /// Length in bytes.
    #[must_use]
    pub fn length(&self) -> usize {
        self.memory.as_ref().map_or(0, Memory::length)
    }

    /// Where the run starts. Not to be read or written but under the word.
    fn start(&self) -> *mut u8 {
        self.memory.as_ref().map_or(std::ptr::null_mut(), |memory| memory.start.as_ptr())
    }

    /// A reference to the bytes of `range` (clamped to the run). Waits for a writer that is inside.
    #[must_use]
    pub fn reference(self: &Arc<Self>, range: Range<usize>) -> ByteReference {
        self.word.reference();
        ByteReference { range: self.clamp(range), bytes: Arc::clone(self) }
    }

    /// The right to change the bytes of `range` (clamped to the run), unless anybody looks at the run or changes it.
    #[must_use]
    pub fn try_write(self: &Arc<Self>, range: Range<usize>) -> Option<FolioWriter> {
        self.word.try_write().then(|| FolioWriter { range: self.clamp(range), bytes: Arc::clone(self) })
    }

    /// Whether anybody in this process holds a byte reference now; a hint.
    #[must_use]
    pub fn is_referenced(&self) -> bool {
        self.word.reference_count() > u64::from(self.is_gifted())
    }

    /// Whether a pipe may refer to the pages.
    #[must_use]
    pub fn is_gifted(&self) -> bool {
        self.is_gifted.load(Ordering::Acquire)
    }

    fn clamp(&self, range: Range<usize>) -> Range<usize> {
        let end = range.end.min(self.length());
        range.start.min(end)..end
    }
}

impl Drop for FolioBytes {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            let length = memory.length() as u64;
            if self.is_gifted() {
                memory.renounce();
            } else {
                self.budget.keep_spare(memory);
            }
            self.budget.release(length);
        }
    }
}

/// Bytes that cannot change while this lives: one count in the word.
#[derive(Debug)]
pub struct ByteReference {
    bytes: Arc<FolioBytes>,
    range: Range<usize>,
}

impl ByteReference {
    /// A reference of its own to a part of the same bytes, `range` counted from this one's start (clamped). Never waits.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> Self {
        let length = self.range.len();
        let end = range.end.min(length);
        let start = range.start.min(end);
        self.bytes.word.reference();
        Self { bytes: Arc::clone(&self.bytes), range: self.range.start + start..self.range.start + end }
    }

    /// Marks the run as gifted: nobody writes to it any more, and its pages are never used for anything else. To be called before the host
    /// gets to see the pages.
    pub(super) fn gift(&self) {
        if !self.bytes.is_gifted.swap(true, Ordering::AcqRel) {
            // Never given back. Our own reference keeps every writer out until it counts.
            self.bytes.word.reference();
        }
    }

    /// Whether both look at the same run of memory.
    #[must_use]
    pub fn shares_memory_with(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.bytes, &other.bytes)
    }
}

impl Clone for ByteReference {
    fn clone(&self) -> Self {
        self.slice(0..self.range.len())
    }
}

impl Deref for ByteReference {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `range` was clamped to the run when this was made, the run is initialised (it was zeroed when it was allocated) and lives as
        // long as our `Arc`, and the byte reference that we hold in the word keeps every writer out.
        #[expect(unsafe_code)]
        unsafe {
            std::slice::from_raw_parts(self.bytes.start().add(self.range.start), self.range.len())
        }
    }
}

impl Drop for ByteReference {
    fn drop(&mut self) {
        self.bytes.word.release();
    }
}

/// The exclusive right to a run's bytes: the writer bit of its word.
#[derive(Debug)]
pub struct FolioWriter {
    bytes: Arc<FolioBytes>,
    range: Range<usize>,
}

impl FolioWriter {
    /// The run that is being written.
    #[must_use]
    pub fn bytes(&self) -> &Arc<FolioBytes> {
        &self.bytes
    }
}

impl Deref for FolioWriter {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: as in `ByteReference`, and nobody else can change the bytes: we hold the writer bit.
        #[expect(unsafe_code)]
        unsafe {
            std::slice::from_raw_parts(self.bytes.start().add(self.range.start), self.range.len())
        }
    }
}

impl DerefMut for FolioWriter {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: `range` lies in the run, which is initialised and alive; the writer bit that we hold excludes every byte reference and
        // every other writer, and `&mut self` every other slice of ours.
        #[expect(unsafe_code)]
        unsafe {
            std::slice::from_raw_parts_mut(self.bytes.start().add(self.range.start), self.range.len())
        }
    }
}

impl Drop for FolioWriter {
    fn drop(&mut self) {
        self.bytes.word.end_write();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn writer(length: usize) -> (Arc<Budget>, FolioWriter) {
        let budget = Budget::new(1 << 22);
        let mut reservation = budget.try_reserve(length as u64).unwrap();
        let writer = FolioBytes::allocate(&mut reservation, length).unwrap();
        (budget, writer)
    }

    #[test]
    fn memory_is_aligned_zeroed_and_counted() {
        let (budget, mut writer) = writer(8192);
        assert_eq!(writer.as_ptr() as usize % FOLIO_ALIGNMENT, 0);
        assert!(writer.iter().all(|&byte| byte == 0));
        writer[5] = 9;
        let bytes = Arc::clone(writer.bytes());
        drop(writer);
        let reference = bytes.reference(4..6);
        assert_eq!(&*reference, &[0, 9]);
        drop(bytes);
        assert_eq!(budget.used_bytes(), 8192, "a reference keeps the memory, and keeps it counted");
        assert_eq!(&*reference.slice(1..9), &[9]);
        drop(reference);
        assert_eq!(budget.used_bytes(), 0);
    }

    #[test]
    fn large_runs_are_used_again() {
        let budget = Budget::new(64 << 20);
        let mut reservation = budget.try_reserve(8 << 20).unwrap();
        let mut writer = FolioBytes::allocate(&mut reservation, 1 << 20).unwrap();
        writer.fill(7);
        let address = writer.as_ptr();
        drop(writer);
        let again = FolioBytes::allocate(&mut reservation, 1 << 20).unwrap();
        assert_eq!(again.as_ptr(), address);
        assert!(again.iter().all(|&byte| byte == 7));
    }

    #[test]
    fn a_writer_gets_in_only_when_nobody_looks() {
        let (_budget, writer) = writer(4096);
        let bytes = Arc::clone(writer.bytes());
        assert!(bytes.try_write(0..1).is_none(), "one writer at a time");
        drop(writer);
        let reference = bytes.reference(0..10);
        assert!(bytes.is_referenced());
        assert!(bytes.try_write(0..10).is_none());
        drop(reference.clone());
        assert!(bytes.try_write(0..10).is_none());
        drop(reference);
        let mut writer = bytes.try_write(10..20).unwrap();
        writer.fill(3);
        drop(writer);
        assert_eq!(bytes.reference(9..11).to_vec(), vec![0, 3]);
    }

    #[test]
    fn a_gifted_run_is_never_written_and_its_pages_are_not_used_again() {
        let budget = Budget::new(64 << 20);
        let mut reservation = budget.try_reserve(1 << 20).unwrap();
        let mut writer = FolioBytes::allocate(&mut reservation, 1 << 20).unwrap();
        writer.fill(7);
        let bytes = Arc::clone(writer.bytes());
        drop(writer);
        let reference = bytes.reference(0..4096);
        reference.gift();
        reference.slice(1..2).gift();
        drop(reference);
        assert!(!bytes.is_referenced(), "nobody in this process looks");
        assert!(bytes.try_write(0..1).is_none(), "but nobody may write, ever");
        assert_eq!(bytes.reference(5..7).to_vec(), [7, 7]);
        drop(bytes);
        assert_eq!(budget.used_bytes(), 0);
        assert!(budget.take_spare(1 << 20).is_none(), "not kept for the next one");
    }

    #[test]
    fn odd_sizes_are_refused() {
        let budget = Budget::new(1 << 30);
        let mut reservation = budget.try_reserve(1 << 22).unwrap();
        for length in [0, 1, 2048, 4097, 12288, 2 << 20] {
            assert!(FolioBytes::allocate(&mut reservation, length).is_err(), "{length}");
        }
    }

    #[test]
    fn threads_never_see_a_torn_page() {
        let (_budget, writer) = writer(4096);
        let bytes = Arc::clone(writer.bytes());
        drop(writer);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for round in 0..2000_u32 {
                    if let Some(mut writer) = bytes.try_write(0..4096) {
                        writer.fill(u8::try_from(round % 251).unwrap());
                    }
                }
            });
            scope.spawn(|| {
                for _ in 0..2000 {
                    let reference = bytes.reference(0..4096);
                    let first = reference[0];
                    assert!(reference.iter().all(|&byte| byte == first));
                }
            });
        });
    }
}
