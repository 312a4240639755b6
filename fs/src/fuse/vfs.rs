//! The vfs behind the transport-neutral interface: its methods have the same names and types.

use std::ffi::OsStr;

use super::operations::Operations;
use crate::error::Result;
use crate::metrics::Metrics;
use crate::pagecache::PageBatch;
use crate::vfs::{
    Attributes, Caller, CopyRequest, DirectoryEntry, Emitted, Entry, IoctlReply, IoctlRequest, Lookup, Opened,
    ReadRequest, Seek, SetAttributes, Statistics, Vfs, WriteRequest,
};

impl Operations for Vfs {
    type Pages = PageBatch;

    fn metrics(&self) -> &Metrics {
        self.metrics()
    }

    fn request_panicked(&self, operation: &'static str, message: &str) {
        self.request_panicked(operation, message)
    }

    fn lookup(&self, caller: &Caller, parent: u64, name: &OsStr) -> Result<Lookup> {
        self.lookup(caller, parent, name)
    }

    fn forget(&self, node: u64, lookups: u64) {
        self.forget(node, lookups)
    }

    fn get_attributes(&self, caller: &Caller, node: u64, handle: Option<u64>) -> Result<Attributes> {
        self.get_attributes(caller, node, handle)
    }

    fn set_attributes(&self, caller: &Caller, node: u64, changes: &SetAttributes) -> Result<Attributes> {
        self.set_attributes(caller, node, changes)
    }

    fn readlink(&self, caller: &Caller, node: u64) -> Result<Vec<u8>> {
        self.readlink(caller, node)
    }

    fn mknod(&self, caller: &Caller, parent: u64, name: &OsStr, mode: u32, device_number: u32) -> Result<Entry> {
        self.mknod(caller, parent, name, mode, device_number)
    }

    fn mkdir(&self, caller: &Caller, parent: u64, name: &OsStr, mode: u32) -> Result<Entry> {
        self.mkdir(caller, parent, name, mode)
    }

    fn symlink(&self, caller: &Caller, parent: u64, name: &OsStr, target: &[u8]) -> Result<Entry> {
        self.symlink(caller, parent, name, target)
    }

    fn link(&self, caller: &Caller, node: u64, parent: u64, name: &OsStr) -> Result<Entry> {
        self.link(caller, node, parent, name)
    }

    fn unlink(&self, caller: &Caller, parent: u64, name: &OsStr) -> Result<()> {
        self.unlink(caller, parent, name)
    }

    fn rmdir(&self, caller: &Caller, parent: u64, name: &OsStr) -> Result<()> {
        self.rmdir(caller, parent, name)
    }

    fn rename(
        &self,
        caller: &Caller,
        parent: u64,
        name: &OsStr,
        new_parent: u64,
        new_name: &OsStr,
        flags: u32,
    ) -> Result<()> {
        self.rename(caller, parent, name, new_parent, new_name, flags)
    }

    fn open(&self, caller: &Caller, node: u64, flags: i32) -> Result<Opened> {
        self.open(caller, node, flags)
    }

    fn create(&self, caller: &Caller, parent: u64, name: &OsStr, mode: u32, flags: i32) -> Result<(Entry, Opened)> {
        self.create(caller, parent, name, mode, flags)
    }

    fn read(&self, caller: &Caller, request: &ReadRequest) -> Result<PageBatch> {
        self.read(caller, request)
    }

    fn read_some(&self, caller: &Caller, request: &ReadRequest) -> Result<PageBatch> {
        self.read_some(caller, request)
    }

    fn may_be_dirty_in_kernel(&self, node: u64) -> bool {
        self.may_be_dirty_in_kernel(node)
    }

    fn landing_bytes_max(&self) -> u64 {
        self.landing_bytes_max()
    }

    fn hold_landing_reserve(&self, bytes: u64) {
        self.hold_landing_reserve(bytes)
    }

    fn write(&self, caller: &Caller, request: &WriteRequest<'_>) -> Result<u32> {
        self.write(caller, request)
    }

    fn flush(&self, caller: &Caller, node: u64, handle: u64) -> Result<()> {
        self.flush(caller, node, handle)
    }

    fn release(&self, node: u64, handle: u64) -> Result<()> {
        self.release(node, handle)
    }

    fn fsync(&self, caller: &Caller, node: u64, handle: u64, data_only: bool) -> Result<()> {
        self.fsync(caller, node, handle, data_only)
    }

    fn opendir(&self, caller: &Caller, node: u64, flags: i32) -> Result<Opened> {
        self.opendir(caller, node, flags)
    }

    fn readdir(
        &self,
        caller: &Caller,
        node: u64,
        handle: u64,
        cookie: u64,
        emit: &mut dyn FnMut(&DirectoryEntry<'_>) -> Emitted,
    ) -> Result<()> {
        self.readdir(caller, node, handle, cookie, emit)
    }

    fn readdirplus(
        &self,
        caller: &Caller,
        node: u64,
        handle: u64,
        cookie: u64,
        emit: &mut dyn FnMut(&DirectoryEntry<'_>, Option<&Entry>) -> Emitted,
    ) -> Result<()> {
        self.readdirplus(caller, node, handle, cookie, emit)
    }

    fn releasedir(&self, node: u64, handle: u64) -> Result<()> {
        self.releasedir(node, handle)
    }

    fn fsyncdir(&self, caller: &Caller, node: u64, handle: u64, data_only: bool) -> Result<()> {
        self.fsyncdir(caller, node, handle, data_only)
    }

    fn statistics(&self) -> Result<Statistics> {
        self.statistics()
    }

    fn set_xattr(&self, caller: &Caller, node: u64, name: &OsStr, value: &[u8], flags: i32) -> Result<()> {
        self.set_xattr(caller, node, name, value, flags)
    }

    fn get_xattr(&self, caller: &Caller, node: u64, name: &OsStr) -> Result<Vec<u8>> {
        self.get_xattr(caller, node, name)
    }

    fn list_xattrs(&self, caller: &Caller, node: u64) -> Result<Vec<u8>> {
        self.list_xattrs(caller, node)
    }

    fn remove_xattr(&self, caller: &Caller, node: u64, name: &OsStr) -> Result<()> {
        self.remove_xattr(caller, node, name)
    }

    fn fallocate(&self, caller: &Caller, node: u64, handle: u64, offset: u64, length: u64, mode: i32) -> Result<()> {
        self.fallocate(caller, node, handle, offset, length, mode)
    }

    fn seek(&self, caller: &Caller, node: u64, handle: u64, offset: u64, what: Seek) -> Result<u64> {
        self.seek(caller, node, handle, offset, what)
    }

    fn copy_file_range(&self, caller: &Caller, request: &CopyRequest) -> Result<u64> {
        self.copy_file_range(caller, request)
    }

    fn ioctl(&self, caller: &Caller, request: &IoctlRequest<'_>) -> Result<IoctlReply> {
        self.ioctl(caller, request)
    }
}
