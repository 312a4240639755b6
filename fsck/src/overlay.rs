//! A device whose writes stay in memory: what `-n` tries repairs on. What lies under it is only read.
//!
//! Memory grows with what is written, in pages of `PAGE_BYTES`. One lock, held for copies in memory, not over I/O.

use std::collections::HashMap;
use std::sync::Arc;

use coppicefs::Result;
use coppicefs::device::{BlockDevice, ReadRequest, WriteRequest};
use parking_lot::RwLock;

const PAGE_BYTES: u64 = 4096;

type Page = Box<[u8]>;

/// See the module's documentation.
#[derive(Debug)]
pub struct Overlay {
    below: Arc<dyn BlockDevice>,
    pages: RwLock<HashMap<u64, Page>>,
}

impl Overlay {
    /// Over a device.
    #[must_use]
    pub fn new(below: Arc<dyn BlockDevice>) -> Self {
        Self { below, pages: RwLock::default() }
    }

    /// A page as it is below.
    fn page(&self, number: u64) -> Result<Page> {
        let mut page = vec![0; PAGE_BYTES as usize].into_boxed_slice();
        let start = number * PAGE_BYTES;
        let there = self.below.size_bytes().saturating_sub(start).min(PAGE_BYTES);
        let there = usize::try_from(there).unwrap_or(0);
        if let Some(bytes) = page.get_mut(..there).filter(|bytes| !bytes.is_empty()) {
            self.below.read(start, bytes)?;
        }
        Ok(page)
    }

    fn write_piece(&self, mut offset: u64, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let (number, within) = (offset / PAGE_BYTES, usize::try_from(offset % PAGE_BYTES).unwrap_or(0));
            let (piece, rest) = bytes.split_at(bytes.len().min(PAGE_BYTES as usize - within));
            let is_known = self.pages.read().contains_key(&number);
            let fresh = if is_known { None } else { Some(self.page(number)?) };
            let mut pages = self.pages.write();
            if let Some(fresh) = fresh {
                pages.entry(number).or_insert(fresh);
            }
            let target = pages.get_mut(&number).and_then(|page| page.get_mut(within..within + piece.len()));
            if let Some(target) = target {
                target.copy_from_slice(piece);
            }
            offset += piece.len() as u64;
            bytes = rest;
        }
        Ok(())
    }

    /// Lays what was written over what was read.
    fn lay_over(&self, offset: u64, buffer: &mut [u8]) {
        let pages = self.pages.read();
        if pages.is_empty() {
            return;
        }
        let mut at = 0;
        while at < buffer.len() {
            let position = offset + at as u64;
            let within = usize::try_from(position % PAGE_BYTES).unwrap_or(0);
            let length = (PAGE_BYTES as usize - within).min(buffer.len() - at);
            if let Some(page) = pages.get(&(position / PAGE_BYTES))
                && let (Some(target), Some(source)) =
                    (buffer.get_mut(at..at + length), page.get(within..within + length))
            {
                target.copy_from_slice(source);
            }
            at += length;
        }
    }
}

impl BlockDevice for Overlay {
    coppicefs::as_the_device_below!(below);

    fn is_read_only(&self) -> bool {
        false
    }

    fn read_batch(&self, requests: &mut [ReadRequest<'_>], landed: &mut dyn FnMut(usize, Result<()>)) {
        let mut outcomes = Vec::with_capacity(requests.len());
        self.below.read_batch(requests, &mut |index, outcome| outcomes.push((index, outcome)));
        for (index, outcome) in outcomes {
            if let Some(request) = requests.get_mut(index) {
                self.lay_over(request.offset, request.buffer);
            }
            landed(index, outcome);
        }
    }

    fn write_batch(&self, requests: &[WriteRequest<'_>]) -> Result<()> {
        for request in requests {
            let mut offset = request.offset;
            for bytes in &request.data {
                self.write_piece(offset, bytes)?;
                offset += bytes.len() as u64;
            }
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn discard(&self, _offset: u64, _length: u64) -> Result<()> {
        Ok(())
    }
}
