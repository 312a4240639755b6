//! One request on its way between memory and a file: what is left to do, and the plain system call that does some of it.
//!
//! Invariants:
//! 1. The pieces of memory are borrowed for `'a` (reads: exclusively), or are the transfer's own bounce buffer.
//! 2. Whoever gives a transfer's memory to the kernel or to another thread takes it back before the borrow of the transfer ends,
//!    unwinding included. `uring` and `pool` each have a guard for this.

#![allow(unsafe_code)]

use std::io::{self, IoSlice, IoSliceMut};
use std::marker::PhantomData;
use std::os::fd::BorrowedFd;

use rustix::io::Errno;
use smallvec::SmallVec;

use super::{ReadRequest, WriteRequest};
use crate::error::Result;
use crate::memory::AlignedBuffer;

/// Most pieces that the kernel takes in one call (IOV_MAX).
const VECTORS_MAX: usize = 1024;
/// Most bytes that the kernel moves in one call.
const CALL_BYTES_MAX: usize = 0x7fff_f000;
/// How often a call that says "try again" is tried again before that counts as a failure.
const RETRIES_MAX: u32 = 10_000;

/// Which way the bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    Read,
    Write,
}

/// A piece of memory as the kernel knows it (`struct iovec`). Written through only by reads.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Vector {
    pub(super) base: *mut u8,
    pub(super) length: usize,
}

/// What to do after an attempt.
pub(super) enum Step {
    Again,
    Done(io::Result<()>),
}

/// See the module's documentation.
pub(super) struct Transfer<'a> {
    /// Index of the request in the caller's batch.
    pub(super) request: usize,
    pub(super) direction: Direction,
    /// Byte offset on the device of what is left.
    offset: u64,
    remaining: u64,
    vectors: SmallVec<[Vector; 1]>,
    /// The vectors before this one are done.
    first: usize,
    retries: u32,
    /// What direct I/O is aligned to, in bytes; 1 without it.
    alignment: usize,
    bounce: Option<AlignedBuffer>,
    /// Where a bounced read goes in the end.
    target: Option<Vector>,
    /// The outcome was delivered. For the backends' use.
    pub(super) landed: bool,
    memory: PhantomData<&'a mut [u8]>,
}

// SAFETY: the raw pointers stand for the exclusive (reads) or shared (writes) borrow of plain bytes that `'a` names, and for
// the bounce buffer that moves along: all of these may be used from any thread.
unsafe impl Send for Transfer<'_> {}

impl<'a> Transfer<'a> {
    /// A read of `request`, number `index` of its batch, bounced if its buffer is not aligned to `alignment` bytes.
    ///
    /// # Errors
    /// ENOMEM for the bounce buffer.
    pub(super) fn read(index: usize, request: &'a mut ReadRequest<'_>, alignment: usize) -> Result<Self> {
        let length = request.buffer.len();
        let vector = Vector { base: request.buffer.as_mut_ptr(), length };
        let mut transfer = Self::new(Direction::Read, index, request.offset, alignment);
        transfer.remaining = length as u64;
        if vector.is_aligned(alignment) {
            transfer.vectors.push(vector);
        } else {
            let mut bounce = AlignedBuffer::try_zeroed(length)?;
            transfer.vectors.push(Vector { base: bounce.as_mut_ptr(), length });
            transfer.bounce = Some(bounce);
            transfer.target = Some(vector);
        }
        Ok(transfer)
    }

    /// A write of `request`, number `index` of its batch, bounced if one of its slices is not aligned to `alignment` bytes.
    ///
    /// # Errors
    /// ENOMEM for the bounce buffer.
    pub(super) fn write(index: usize, request: &'a WriteRequest<'_>, alignment: usize) -> Result<Self> {
        let mut transfer = Self::new(Direction::Write, index, request.offset, alignment);
        transfer.remaining = request.length();
        transfer.vectors.extend(
            request
                .data
                .iter()
                .filter(|slice| !slice.is_empty())
                .map(|slice| Vector { base: slice.as_ptr().cast_mut(), length: slice.len() }),
        );
        if !transfer.vectors.iter().all(|vector| vector.is_aligned(alignment)) {
            let length = usize::try_from(transfer.remaining).map_err(|_| Errno::NOMEM)?;
            let mut bounce = AlignedBuffer::try_zeroed(length)?;
            let mut done = 0;
            for slice in &request.data {
                bounce[done..done + slice.len()].copy_from_slice(slice);
                done += slice.len();
            }
            transfer.vectors.clear();
            transfer.vectors.push(Vector { base: bounce.as_mut_ptr(), length });
            transfer.bounce = Some(bounce);
        }
        Ok(transfer)
    }

    fn new(direction: Direction, request: usize, offset: u64, alignment: usize) -> Self {
        Self {
            request,
            direction,
            offset,
            remaining: 0,
            vectors: SmallVec::new(),
            first: 0,
            retries: 0,
            alignment,
            bounce: None,
            target: None,
            landed: false,
            memory: PhantomData,
        }
    }

    /// Where the next call starts, in bytes on the device.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// Whether nothing is left to do.
    pub(super) fn is_complete(&self) -> bool {
        self.remaining == 0
    }

    /// The pieces of the next call: no more than the kernel takes at once. The rest follows as after a short count.
    pub(super) fn call_vectors(&self) -> &[Vector] {
        let rest = self.vectors.get(self.first..).unwrap_or(&[]);
        let mut bytes = 0usize;
        let count = rest
            .iter()
            .take(VECTORS_MAX)
            .take_while(|vector| {
                bytes = bytes.saturating_add(vector.length);
                bytes <= CALL_BYTES_MAX
            })
            .count();
        // A single piece that is too long is cut by the kernel (preadv) or by the caller (io_uring).
        &rest[..count.max(1).min(rest.len())]
    }

    /// One system call on the calling thread.
    fn attempt(&self, file: BorrowedFd<'_>) -> io::Result<usize> {
        let vectors = self.call_vectors().iter();
        let count = match self.direction {
            Direction::Read => {
                // SAFETY: invariant 1: valid, exclusively ours, and no two vectors overlap.
                let slice = |vector: &Vector| unsafe { std::slice::from_raw_parts_mut(vector.base, vector.length) };
                let mut slices: SmallVec<[IoSliceMut<'_>; 1]> = vectors.map(slice).map(IoSliceMut::new).collect();
                rustix::io::preadv(file, &mut slices, self.offset)
            }
            Direction::Write => {
                // SAFETY: invariant 1: valid and not written while it is borrowed.
                let slice = |vector: &Vector| unsafe { std::slice::from_raw_parts(vector.base, vector.length) };
                let slices: SmallVec<[IoSlice<'_>; 1]> = vectors.map(slice).map(IoSlice::new).collect();
                rustix::io::pwritev(file, &slices, self.offset)
            }
        }?;
        Ok(count)
    }

    /// Does all of it on the calling thread.
    pub(super) fn run(&mut self, file: BorrowedFd<'_>) -> io::Result<()> {
        if self.is_complete() {
            return Ok(());
        }
        loop {
            let result = self.attempt(file);
            if let Step::Done(outcome) = self.account(result) {
                return outcome;
            }
        }
    }

    /// Takes the result of a call into account: bytes moved, or an errno.
    pub(super) fn account(&mut self, result: io::Result<usize>) -> Step {
        match result {
            Ok(0) => Step::Done(Err(self.ended())),
            Ok(count) => {
                self.advance(count);
                if self.is_complete() {
                    Step::Done(Ok(()))
                } else if count.is_multiple_of(self.alignment) {
                    Step::Again
                } else {
                    // Direct I/O stops inside a block only where the file ends.
                    Step::Done(Err(self.ended()))
                }
            }
            Err(error) => match Errno::from_io_error(&error) {
                Some(Errno::INTR | Errno::AGAIN) if self.retries < RETRIES_MAX => {
                    self.retries += 1;
                    if self.retries > 16 {
                        std::thread::yield_now();
                    }
                    Step::Again
                }
                _ => Step::Done(Err(error)),
            },
        }
    }

    fn ended(&self) -> io::Error {
        match self.direction {
            Direction::Read => io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("the image was cut off: it ends at byte {}", self.offset),
            ),
            Direction::Write => io::Error::new(io::ErrorKind::WriteZero, "the host wrote nothing"),
        }
    }

    fn advance(&mut self, mut count: usize) {
        self.offset += count as u64;
        self.remaining = self.remaining.saturating_sub(count as u64);
        while let Some(vector) = self.vectors.get_mut(self.first) {
            if count < vector.length {
                // SAFETY: `count` is less than the length, so the address stays inside the piece.
                vector.base = unsafe { vector.base.add(count) };
                vector.length -= count;
                return;
            }
            count -= vector.length;
            self.first += 1;
        }
    }

    /// Copies a bounced read to where the caller wants it. To be called once the transfer is done.
    pub(super) fn deliver(&mut self) {
        if let (Some(bounce), Some(target)) = (self.bounce.take(), self.target.take()) {
            // SAFETY: the target is the caller's buffer of the same length, borrowed exclusively; the bounce buffer is another
            // allocation, and the kernel is done with it.
            unsafe { std::ptr::copy_nonoverlapping(bounce.as_ptr(), target.base, target.length) };
        }
    }
}

impl Vector {
    fn is_aligned(self, alignment: usize) -> bool {
        (self.base as usize).is_multiple_of(alignment) && self.length.is_multiple_of(alignment)
    }
}
