//! Feeding a pipe from folio memory: by reference (`vmsplice`) where whole pages are worth it, else by copy (`writev`).
//!
//! What `vmsplice` hands over the pipe refers to until its reader takes it, and the kernel does not say when that is. So:
//! 1. the run is marked as gifted *before* the call ([`super::FolioBytes`]): its bytes never change again, and its pages are never used for anything else;
//! 2. the descriptor is one that is open for writing: on the read end of a pipe `vmsplice` works the other way round, and would write
//!    into memory that others read.
//!
//! Takes no lock; waits for the pipe's reader only, if the pipe is a blocking one.

use std::io::{self, IoSlice};
use std::os::fd::BorrowedFd;

use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;
use rustix::pipe::{IoSliceRaw, SpliceFlags};
use smallvec::SmallVec;

use super::folio_bytes::{ByteReference, FOLIO_ALIGNMENT};
use crate::error::Result;

/// Pieces that are shorter are copied: a page of the pipe for each would hold little.
const SHARED_BYTES_MIN: usize = FOLIO_ALIGNMENT;
/// Whether folio memory lies on pages of its own: where pages are surely no larger than its alignment.
const MAY_SHARE: bool = cfg!(any(target_arch = "x86_64", target_arch = "x86"));
/// Most pieces of one call, well below IOV_MAX.
const PIECES_MAX: usize = 64;

/// One piece of what is to go into a pipe.
#[derive(Clone, Copy, Debug)]
pub enum PipePiece<'a> {
    /// Folio memory from this offset of the reference on.
    Folio(&'a ByteReference, usize),
    /// Memory that never changes.
    Static(&'static [u8]),
}

impl PipePiece<'_> {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Folio(reference, from) => reference.get(*from..).unwrap_or_default(),
            Self::Static(bytes) => bytes,
        }
    }
}

/// The write end of a pipe.
#[derive(Debug)]
pub struct Pipe<'fd> {
    descriptor: BorrowedFd<'fd>,
    is_non_blocking: bool,
}

impl<'fd> Pipe<'fd> {
    /// The pipe behind a descriptor, blocking or not as the descriptor says now.
    ///
    /// # Errors
    /// `EINVAL` if it is no pipe, `EBADF` if it is not open for writing.
    pub fn new(descriptor: BorrowedFd<'fd>) -> Result<Self> {
        let status = rustix::fs::fstat(descriptor)?;
        if FileType::from_raw_mode(status.st_mode) != FileType::Fifo {
            return Err(Errno::INVAL.into());
        }
        let flags = rustix::fs::fcntl_getfl(descriptor)?;
        if !matches!(flags & OFlags::ACCMODE, OFlags::WRONLY | OFlags::RDWR) {
            return Err(Errno::BADF.into());
        }
        Ok(Self { descriptor, is_non_blocking: flags.contains(OFlags::NONBLOCK) })
    }

    /// Puts the start of `pieces` into the pipe, and returns how many bytes that were: at least one, unless there are none.
    ///
    /// # Errors
    /// `EAGAIN` if the pipe is full and non-blocking, `EPIPE` if nobody reads it, `EINTR`.
    pub fn feed(&self, pieces: &[PipePiece<'_>]) -> io::Result<usize> {
        let Some(first) = pieces.iter().position(|piece| !piece.bytes().is_empty()) else { return Ok(0) };
        let pieces = pieces.get(first..).unwrap_or_default();
        let is_shared = |piece: &PipePiece<'_>| MAY_SHARE && piece.bytes().len() >= SHARED_BYTES_MIN;
        let shared = pieces.iter().take(PIECES_MAX).take_while(|piece| is_shared(piece)).count();
        if shared > 0 {
            return self.share(pieces.get(..shared).unwrap_or_default());
        }
        let copied: SmallVec<[IoSlice<'_>; 8]> = pieces
            .iter()
            .take(PIECES_MAX)
            .take_while(|piece| !is_shared(piece))
            .map(|piece| IoSlice::new(piece.bytes()))
            .collect();
        Ok(rustix::io::writev(self.descriptor, &copied)?)
    }

    fn share(&self, pieces: &[PipePiece<'_>]) -> io::Result<usize> {
        let mut slices: SmallVec<[IoSliceRaw<'_>; 8]> = SmallVec::new();
        for piece in pieces {
            if let PipePiece::Folio(reference, _) = piece {
                reference.gift();
            }
            slices.push(IoSliceRaw::from_slice(piece.bytes()));
        }
        let flags = if self.is_non_blocking { SpliceFlags::NONBLOCK } else { SpliceFlags::empty() };
        // SAFETY: the slices are alive for the call. The pipe goes on to refer to their pages; these are static, or of runs that were marked as
        // gifted above, so their bytes never change and the pages are never used for anything else. The descriptor is the write end of
        // a pipe (checked in `new`, and a descriptor's access mode never changes), so the kernel only reads.
        #[expect(unsafe_code)]
        let count = unsafe { rustix::pipe::vmsplice(self.descriptor, &slices, flags) }?;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::AsFd;

    use super::super::{Budget, FolioBytes};
    use super::*;
    use crate::sync::Arc;

    fn folio(byte: u8) -> Arc<FolioBytes> {
        run(&Budget::new(1 << 20), byte)
    }

    fn run(budget: &Arc<Budget>, byte: u8) -> Arc<FolioBytes> {
        let mut reservation = budget.try_reserve(65536).unwrap();
        let mut writer = FolioBytes::allocate(&mut reservation, 65536).unwrap();
        writer.fill(byte);
        Arc::clone(writer.bytes())
    }

    #[test]
    fn only_the_write_end_of_a_pipe_is_taken() {
        let (read, write) = rustix::pipe::pipe().unwrap();
        assert_eq!(Pipe::new(read.as_fd()).unwrap_err().errno(), Errno::BADF);
        assert!(Pipe::new(write.as_fd()).is_ok());
        let file = tempfile::tempfile().unwrap();
        assert_eq!(Pipe::new(file.as_fd()).unwrap_err().errno(), Errno::INVAL);
    }

    /// Without the gift the memory would go to the next run, and the reader would see that one's bytes.
    #[test]
    fn what_is_in_the_pipe_stays_when_its_memory_ends_and_others_want_memory() {
        let (read, write) = rustix::pipe::pipe().unwrap();
        let budget = Budget::new(64 << 20);
        let bytes = run(&budget, 1);
        let reference = bytes.reference(0..65536);
        assert_eq!(Pipe::new(write.as_fd()).unwrap().feed(&[PipePiece::Folio(&reference, 0)]).unwrap(), 65536);
        assert!(bytes.is_gifted());
        drop((reference, bytes));
        let others: Vec<_> = (0..64).map(|_| run(&budget, 2)).collect();
        drop(write);
        let mut found = Vec::new();
        std::fs::File::from(read).read_to_end(&mut found).unwrap();
        assert!(found.len() == 65536 && found.iter().all(|&byte| byte == 1));
        drop(others);
    }

    #[test]
    fn small_pieces_are_copied_and_leave_their_run_alone() {
        let (read, write) = rustix::pipe::pipe().unwrap();
        let bytes = folio(3);
        let reference = bytes.reference(10..20);
        let pipe = Pipe::new(write.as_fd()).unwrap();
        assert_eq!(
            pipe.feed(&[PipePiece::Static(&[]), PipePiece::Folio(&reference, 3), PipePiece::Static(&[9; 2])]).unwrap(),
            9
        );
        assert!(!bytes.is_gifted());
        let mut found = [0; 9];
        std::fs::File::from(read).read_exact(&mut found).unwrap();
        assert_eq!(found, [3, 3, 3, 3, 3, 3, 3, 9, 9]);
    }

    #[test]
    fn a_full_pipe_that_does_not_block_says_so_and_a_closed_one_too() {
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::NONBLOCK).unwrap();
        let bytes = folio(4);
        let reference = bytes.reference(0..65536);
        let pipe = Pipe::new(write.as_fd()).unwrap();
        let mut fed = 0;
        let error = loop {
            match pipe.feed(&[PipePiece::Folio(&reference, 100)]) {
                Ok(count) => fed += count,
                Err(error) => break error,
            }
        };
        assert!(fed > 0 && error.kind() == io::ErrorKind::WouldBlock, "{fed} {error}");
        drop(read);
        let error = pipe.feed(&[PipePiece::Folio(&reference, 0)]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }
}
