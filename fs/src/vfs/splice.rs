//! Reading into a pipe by reference: `read_iter` with the collecting sink, and then the pipe is fed from what was collected.
//!
//! Guarantees:
//! 1. **No lock of the filesystem is held while the pipe is fed**, so a reader that is slow, or waits for the filesystem itself, holds nobody up.
//! 2. What was collected may go stale by a later write or truncation, as in a pipe. It is always what the file held when it was
//!    collected: its bytes do not change, and its memory is not used for anything else while the pipe refers to it ([`crate::memory::Pipe`]).
//! 3. At most [`STEP_BYTES`] are collected at a time.
//!
//! Locks: none of its own; those of a read while it collects.

use std::io;
use std::os::fd::BorrowedFd;

use super::Vfs;
use super::file::FILE_BYTES_MAX;
use super::handle::Handle;
use super::inode::VfsInode;
use super::types::Caller;
use crate::error::{Error, Result};
use crate::memory::Pipe;
use crate::pagecache::{PageBatch, ReadContext, read_iter};
use crate::units::round_down;
use rustix::io::Errno;

/// Most bytes that are collected before they are fed: the longest one reference.
pub(super) const STEP_BYTES: u64 = 1 << 20;

/// What lies in a range of a file.
#[derive(Debug)]
pub(super) struct Collected {
    /// The bytes, as far as they could be read.
    pub pages: PageBatch,
    /// Why that is less than there is.
    pub error: Option<Error>,
}

impl Vfs {
    /// Reads `length` bytes from `offset` on into a pipe, and returns how many went in: fewer at the end of the file, where the pipe is full and
    /// does not block, and before a block that cannot be read (whose error the next call returns).
    ///
    /// Whole pages are not copied: the pipe refers to the cache's own memory.
    ///
    /// # Errors
    /// If nothing went in: `EAGAIN`, `EPIPE` (and SIGPIPE, as write(2) does); `EINVAL` if it is no pipe and `EBADF` if it is not
    /// open for writing, or the handle is none of the node; `EISDIR`, `EINVAL` for other than files; `EIO`.
    pub fn splice_read(
        &self,
        _caller: &Caller,
        node: u64,
        handle: u64,
        offset: u64,
        length: u64,
        pipe: BorrowedFd<'_>,
    ) -> Result<u64> {
        let handle = self.file_handle(node, handle)?;
        let pipe = Pipe::new(pipe)?;
        let mut fed = 0;
        while fed < length {
            // Steps end at multiples of their length, so that each is one folio of a file that was read ahead.
            let at = offset.saturating_add(fed);
            let step_end = round_down(at, STEP_BYTES).saturating_add(STEP_BYTES).min(offset.saturating_add(length));
            let outcome = self.collect(&handle, at, step_end - at).and_then(|collected| {
                self.metrics.pagecache_splice_references.add(collected.pages.reference_count() as u64);
                let (count, error) = feed(&pipe, &collected.pages);
                fed += count;
                error.or(collected.error).map_or(Ok(count > 0), Err)
            });
            match outcome {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) if fed == 0 => return Err(error),
                Err(_) => break,
            }
        }
        Ok(fed)
    }

    /// Collects what the file has of a range: nothing behind its end.
    pub(super) fn collect(&self, handle: &Handle, offset: u64, length: u64) -> Result<Collected> {
        let inode = &handle.inode;
        inode.read_unshrunk(|size| {
            let end = size.min(offset.saturating_add(length));
            self.collect_below(handle, offset..end.max(offset), size)
        })
    }

    fn collect_below(&self, handle: &Handle, range: std::ops::Range<u64>, size: u64) -> Result<Collected> {
        let file = Self::file_of(&handle.inode)?;
        let context = ReadContext {
            space: &file.pages,
            source: &file.source,
            readahead: Some(&handle.readahead),
            end_of_file: size,
        };
        let mut pages = PageBatch::new();
        let mut at = range.start;
        while at < range.end {
            let data = self.next_data(&handle.inode, at, range.end)?.max(at);
            // The shared zeros stand for a hole that is not cached: no memory is spent on it.
            if data > at {
                pages.push_zeros(usize::try_from(data - at).unwrap_or(0));
                at = data;
                continue;
            }
            let outcome = read_iter(&context, at, range.end - at, &mut pages);
            at += outcome.bytes;
            if let Some(error) = outcome.error {
                self.tell_of_damage(handle.inode.number, &error);
                return Ok(Collected { pages, error: Some(error) });
            }
        }
        self.touch_access(&handle.inode, handle.flags);
        Ok(Collected { pages, error: None })
    }

    /// Where data may start at or after `at`, at most `end`: before it nothing is cached, and the file has a hole. Costs nothing if something of the
    /// range is cached.
    pub(super) fn next_data(&self, inode: &VfsInode, at: u64, end: u64) -> Result<u64> {
        let file = Self::file_of(inode)?;
        if file.pages.has_folios(&(at..end)) {
            return Ok(at);
        }
        // Dirty data is looked for before the extents: what is committed in between is seen in one of them at least.
        let delayed = file.pages.unwritten_ranges(&(at..end)).first().map(|range| range.start);
        let stored = self.data.seek_data(inode.number, at, FILE_BYTES_MAX.min(end))?;
        Ok([delayed, stored].into_iter().flatten().min().unwrap_or(end).clamp(at, end))
    }
}

/// Feeds all of a batch, as far as the pipe takes it. Waits with no lock held.
pub(super) fn feed(pipe: &Pipe<'_>, pages: &PageBatch) -> (u64, Option<Error>) {
    let mut fed = 0;
    while fed < pages.len() {
        match pages.feed(pipe, fed) {
            Ok(0) => break,
            Ok(count) => fed += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted && fed == 0 => {}
            Err(error) => {
                let errno = Errno::from_io_error(&error).unwrap_or(Errno::IO);
                return (fed as u64, Some(errno.into()));
            }
        }
    }
    (fed as u64, None)
}
