//! Shared mappings of files on the mount.

#![allow(unsafe_code, reason = "mmap(2)")]
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::fs::File;
use std::io;
use std::ops::Range;

use coppicefs_tests::race::mount::Mapped;
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, MsyncFlags, ProtFlags, madvise, mmap, msync, munmap};

/// A shared mapping of a whole file.
pub struct Mapping {
    address: *mut u8,
    length: usize,
}

impl Mapping {
    pub fn new(file: &File, length: usize) -> Self {
        Self::with(file, length, ProtFlags::READ | ProtFlags::WRITE)
    }

    /// A mapping for [`Mapped`] alone: the file may be shorter at any time.
    pub fn for_reading(file: &File, length: usize) -> Box<dyn Mapped> {
        Box::new(Self::with(file, length, ProtFlags::READ))
    }

    fn with(file: &File, length: usize, protection: ProtFlags) -> Self {
        // SAFETY: the kernel chooses a free range of addresses.
        let address = unsafe { mmap(std::ptr::null_mut(), length, protection, MapFlags::SHARED, file, 0) };
        Self { address: address.unwrap().cast(), length }
    }

    /// Its bytes. Nothing else in this process looks at them meanwhile.
    pub fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: `length` bytes are mapped at `address`, readable and writable, until drop; the file is not shorter.
        unsafe { std::slice::from_raw_parts_mut(self.address, self.length) }
    }

    /// Takes the pages out of this process's tables: the next access faults.
    pub fn forget(&self) {
        // SAFETY: the range is ours, and a shared mapping of a file loses nothing by this.
        unsafe { madvise(self.address.cast(), self.length, Advice::LinuxDontNeed) }.unwrap();
    }

    pub fn flush(&mut self) -> rustix::io::Result<()> {
        // SAFETY: the range is mapped.
        unsafe { msync(self.address.cast(), self.length, MsyncFlags::SYNC) }
    }
}

impl Mapped for Mapping {
    fn copy_to(&self, range: Range<usize>, target: &File) -> io::Result<usize> {
        assert!(range.start <= range.end && range.end <= self.length);
        // SAFETY: the range is mapped until drop. This program never looks at it: the kernel alone does, and says where there is no page.
        let bytes = unsafe { std::slice::from_raw_parts(self.address.add(range.start), range.len()) };
        match rustix::io::pwrite(target, bytes, 0) {
            Err(Errno::FAULT) => Ok(0),
            outcome => Ok(outcome?),
        }
    }

    fn forget(&self) {
        Self::forget(self);
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: nothing refers to it any more.
        unsafe { munmap(self.address.cast(), self.length) }.unwrap();
    }
}
