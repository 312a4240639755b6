//! The transport-neutral interface: what a transport (fuser today, an own /dev/fuse loop or io_uring later) asks of the
//! filesystem, with the vfs's typed requests and answers. Nothing in here knows FUSE's wire format.
//!
//! Contracts for implementations, which the kernel's behaviour forces (`design.md` 3.1 and 4.6):
//! - `ENOSYS` is never returned: the kernel latches it for the whole mount. Unsupported fallocate modes and ioctls are
//!   `EOPNOTSUPP` and `ENOTTY`. (The adapter turns an `ENOSYS` into `EIO`.)
//! - Permission bits are checked by the kernel (`default_permissions`); immutable, append-only, ioctl privileges and the clearing
//!   of set-user-id bits are the implementation's.
//! - Every [`Entry`] that is returned (lookup, mknod, mkdir, symlink, link, create, an accepted entry of readdirplus other than
//!   "." and "..") counts one lookup of its node, which `forget` gives back.
//! - A READ on a cached handle answers everything up to the end of the file, or an error; never a shorter prefix ([`Operations::read_some`] is
//!   for the others).
//! - No lock is held when a method returns: what it returns ([`PageBatch`]) holds references only.
//! - Methods are called from several threads at once, and may block; they may not wait for another request.

use std::ffi::OsStr;

use crate::error::Result;
use crate::metrics::Metrics;
use crate::vfs::{
    Attributes, Caller, CopyRequest, DirectoryEntry, Emitted, Entry, IoctlReply, IoctlRequest, Lookup, Opened,
    ReadRequest, Seek, SetAttributes, Statistics, WriteRequest,
};

/// Ordered runs of bytes that a reply refers to, kept alive by this value: references to folios, or a buffer.
pub trait PageBatch {
    /// All bytes, if they lie in one piece: a reply that needs no copy.
    fn as_single(&self) -> Option<&[u8]>;
    /// Calls `each` for every run, in order.
    fn for_each_slice(&self, each: &mut dyn FnMut(&[u8]));
}

impl PageBatch for crate::pagecache::PageBatch {
    fn as_single(&self) -> Option<&[u8]> {
        self.as_single()
    }

    fn for_each_slice(&self, each: &mut dyn FnMut(&[u8])) {
        self.slices().for_each(each);
    }
}

/// The filesystem, as a transport sees it. See the module's documentation for the contracts.
pub trait Operations: Send + Sync + 'static {
    /// What a read returns.
    type Pages: PageBatch;

    /// The counters of this filesystem.
    fn metrics(&self) -> &Metrics;

    /// A request panicked: count it, and latch read-only. `operation` names it, `message` is the panic's.
    fn request_panicked(&self, operation: &'static str, message: &str);

    /// Finds a name in a directory. "." and ".." are asked for by NFS export, "." also for nodes never seen in this session
    /// (`ESTALE` if it is gone).
    ///
    /// # Errors
    /// `ENOTDIR`, `ENAMETOOLONG`, `ESTALE`, and those of the media.
    fn lookup(&self, caller: &Caller, parent: u64, name: &OsStr) -> Result<Lookup>;

    /// Gives lookups of a node back.
    fn forget(&self, node: u64, lookups: u64);

    /// Attributes of a node.
    ///
    /// # Errors
    /// `ESTALE`, and those of the media.
    fn get_attributes(&self, caller: &Caller, node: u64, handle: Option<u64>) -> Result<Attributes>;

    /// Changes attributes; all of them or none.
    ///
    /// # Errors
    /// POSIX's.
    fn set_attributes(&self, caller: &Caller, node: u64, changes: &SetAttributes) -> Result<Attributes>;

    /// Target of a symbolic link.
    ///
    /// # Errors
    /// `EINVAL` if it is none.
    fn readlink(&self, caller: &Caller, node: u64) -> Result<Vec<u8>>;

    /// Makes a file, device node, pipe or socket.
    ///
    /// # Errors
    /// POSIX's.
    fn mknod(&self, caller: &Caller, parent: u64, name: &OsStr, mode: u32, device_number: u32) -> Result<Entry>;

    /// Makes a directory.
    ///
    /// # Errors
    /// POSIX's.
    fn mkdir(&self, caller: &Caller, parent: u64, name: &OsStr, mode: u32) -> Result<Entry>;

    /// Makes a symbolic link.
    ///
    /// # Errors
    /// POSIX's.
    fn symlink(&self, caller: &Caller, parent: u64, name: &OsStr, target: &[u8]) -> Result<Entry>;

    /// Makes another name of `node`.
    ///
    /// # Errors
    /// POSIX's.
    fn link(&self, caller: &Caller, node: u64, parent: u64, name: &OsStr) -> Result<Entry>;

    /// Removes a name of a file.
    ///
    /// # Errors
    /// POSIX's.
    fn unlink(&self, caller: &Caller, parent: u64, name: &OsStr) -> Result<()>;

    /// Removes an empty directory.
    ///
    /// # Errors
    /// POSIX's.
    fn rmdir(&self, caller: &Caller, parent: u64, name: &OsStr) -> Result<()>;

    /// Renames. `flags` are renameat2's (`RENAME_NOREPLACE` 1, `RENAME_EXCHANGE` 2, `RENAME_WHITEOUT` 4); unknown ones are
    /// `EINVAL`.
    ///
    /// # Errors
    /// POSIX's.
    fn rename(
        &self,
        caller: &Caller,
        parent: u64,
        name: &OsStr,
        new_parent: u64,
        new_name: &OsStr,
        flags: u32,
    ) -> Result<()>;

    /// Opens a file. `flags` are open(2)'s without O_CREAT, O_EXCL and O_TRUNC.
    ///
    /// # Errors
    /// POSIX's.
    fn open(&self, caller: &Caller, node: u64, flags: i32) -> Result<Opened>;

    /// Makes a file and opens it.
    ///
    /// # Errors
    /// POSIX's.
    fn create(&self, caller: &Caller, parent: u64, name: &OsStr, mode: u32, flags: i32) -> Result<(Entry, Opened)>;

    /// Reads.
    ///
    /// # Errors
    /// `EIO` for damaged blocks.
    fn read(&self, caller: &Caller, request: &ReadRequest) -> Result<Self::Pages>;

    /// As [`Self::read`], but may stop before a damaged block: for reads that no cache keeps.
    ///
    /// # Errors
    /// `EIO` if the first block is damaged.
    fn read_some(&self, caller: &Caller, request: &ReadRequest) -> Result<Self::Pages>;

    /// Whether the kernel's page cache may hold bytes of the file that no write has brought.
    fn may_be_dirty_in_kernel(&self, node: u64) -> bool;

    /// The most that [`Self::hold_landing_reserve`] would hold, in bytes.
    fn landing_bytes_max(&self) -> u64;

    /// The kernel may hold this many bytes of delayed writes: keep space for them. With `cache=writeback`, before the first request.
    fn hold_landing_reserve(&self, bytes: u64);

    /// Writes; returns how many bytes.
    ///
    /// # Errors
    /// POSIX's.
    fn write(&self, caller: &Caller, request: &WriteRequest<'_>) -> Result<u32>;

    /// A descriptor of the handle is closed: reports errors of delayed writes that were not reported yet.
    ///
    /// # Errors
    /// Those errors.
    fn flush(&self, caller: &Caller, node: u64, handle: u64) -> Result<()>;

    /// The last descriptor and mapping of the handle are gone.
    ///
    /// # Errors
    /// Nobody sees them.
    fn release(&self, node: u64, handle: u64) -> Result<()>;

    /// Makes a file durable; its attributes only as far as its data needs them if `data_only`.
    ///
    /// # Errors
    /// Of this and of delayed writes.
    fn fsync(&self, caller: &Caller, node: u64, handle: u64, data_only: bool) -> Result<()>;

    /// Opens a directory.
    ///
    /// # Errors
    /// `ENOTDIR`, and those of the media.
    fn opendir(&self, caller: &Caller, node: u64, flags: i32) -> Result<Opened>;

    /// Lists a directory from `cookie` (0 is the start), "." and ".." first.
    ///
    /// # Errors
    /// Those of the media. Entries that were accepted before it are answered; the next request, for the cookie after them, meets
    /// the error again.
    fn readdir(
        &self,
        caller: &Caller,
        node: u64,
        handle: u64,
        cookie: u64,
        emit: &mut dyn FnMut(&DirectoryEntry<'_>) -> Emitted,
    ) -> Result<()>;

    /// As [`Self::readdir`], with the attributes of each. An entry whose inode cannot be read is given without, and no lookup is
    /// counted for it: the program sees the name, and the error only when it uses it.
    ///
    /// # Errors
    /// As readdir; the lookups of entries that were accepted before it count.
    fn readdirplus(
        &self,
        caller: &Caller,
        node: u64,
        handle: u64,
        cookie: u64,
        emit: &mut dyn FnMut(&DirectoryEntry<'_>, Option<&Entry>) -> Emitted,
    ) -> Result<()>;

    /// The directory's handle is closed.
    ///
    /// # Errors
    /// Nobody sees them.
    fn releasedir(&self, node: u64, handle: u64) -> Result<()>;

    /// Makes a directory's entries durable.
    ///
    /// # Errors
    /// Those of the media.
    fn fsyncdir(&self, caller: &Caller, node: u64, handle: u64, data_only: bool) -> Result<()>;

    /// Filesystem statistics.
    ///
    /// # Errors
    /// None in practice.
    fn statistics(&self) -> Result<Statistics>;

    /// Sets an extended attribute. `flags` are setxattr(2)'s: `XATTR_CREATE` 1, `XATTR_REPLACE` 2.
    ///
    /// # Errors
    /// `EEXIST`, `ENODATA`, `E2BIG`, `ENOSPC`, `EOPNOTSUPP`.
    fn set_xattr(&self, caller: &Caller, node: u64, name: &OsStr, value: &[u8], flags: i32) -> Result<()>;

    /// Value of an extended attribute.
    ///
    /// # Errors
    /// `ENODATA`, `EOPNOTSUPP`.
    fn get_xattr(&self, caller: &Caller, node: u64, name: &OsStr) -> Result<Vec<u8>>;

    /// Names of the extended attributes, each with a NUL after it.
    ///
    /// # Errors
    /// Those of the media.
    fn list_xattrs(&self, caller: &Caller, node: u64) -> Result<Vec<u8>>;

    /// Removes an extended attribute.
    ///
    /// # Errors
    /// `ENODATA`, `EOPNOTSUPP`.
    fn remove_xattr(&self, caller: &Caller, node: u64, name: &OsStr) -> Result<()>;

    /// fallocate(2); `mode` is its mode.
    ///
    /// # Errors
    /// `EOPNOTSUPP` for modes that are not served, `ENOSPC`.
    fn fallocate(&self, caller: &Caller, node: u64, handle: u64, offset: u64, length: u64, mode: i32) -> Result<()>;

    /// Finds data or a hole at or after `offset`.
    ///
    /// # Errors
    /// `ENXIO` past the end.
    fn seek(&self, caller: &Caller, node: u64, handle: u64, offset: u64, what: Seek) -> Result<u64>;

    /// Copies; returns how many bytes.
    ///
    /// # Errors
    /// POSIX's.
    fn copy_file_range(&self, caller: &Caller, request: &CopyRequest) -> Result<u64>;

    /// ioctl(2).
    ///
    /// # Errors
    /// `ENOTTY` for unknown commands.
    fn ioctl(&self, caller: &Caller, request: &IoctlRequest<'_>) -> Result<IoctlReply>;
}
