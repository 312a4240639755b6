//! The transport-neutral interface: what a transport (fuser today, an own /dev/fuse loop or io_uring later) asks of the
//! filesystem, with typed requests and results. Nothing in here knows FUSE's wire format.
//!
//! Contracts for implementations, which the kernel's behaviour forces (`design.md` 3.1 and 4.6):
//! - `ENOSYS` is never returned: the kernel latches it for the whole mount. Unsupported fallocate modes and ioctls are
//!   `EOPNOTSUPP` and `ENOTTY`. (The adapter turns an `ENOSYS` into `EIO`.)
//! - Permission bits are checked by the kernel (`default_permissions`); immutable, append-only, ioctl privileges and the clearing
//!   of set-user-id bits are the implementation's.
//! - Every [`Entry`] that is returned (lookup, mknod, mkdir, symlink, link, create, an accepted entry of readdirplus other than
//!   "." and "..") counts one lookup of its node, which `forget` gives back.
//! - A READ on a cached handle answers everything up to the end of the file, or an error; never a shorter prefix.
//! - No lock is held when a method returns: what it returns ([`PageBatch`]) holds references only.
//! - Methods are called from several threads at once, and may block; they may not wait for another request.

use std::ffi::OsStr;

use crate::env::Timestamp;
use crate::error::Result;
use crate::format::namespace::FileType;
use crate::metrics::Metrics;

/// Who asks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Caller {
    /// Filesystem user id.
    pub uid: u32,
    /// Filesystem group id.
    pub gid: u32,
    /// Process (thread) id in the daemon's namespace; 0 where it has none there. `/proc/PID/status` has its groups.
    pub pid: u32,
    /// The process's umask, for mknod, mkdir and create (0 elsewhere). The implementation applies it, and only where the parent
    /// has no default ACL.
    pub umask: u32,
}

/// What stat(2) shows of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// The node id, which is the inode number that programs see, too.
    pub node: u64,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Space that it holds, in units of 512 bytes.
    pub blocks_of_512: u64,
    /// Last access.
    pub access_time: Timestamp,
    /// Last change of the content.
    pub modification_time: Timestamp,
    /// Last change of the inode.
    pub change_time: Timestamp,
    /// Type of the file.
    pub file_type: FileType,
    /// The low twelve bits of the mode.
    pub permissions: u16,
    /// Number of names.
    pub link_count: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device number of a device node, in the kernel's 32-bit encoding (as `mknod` gave it).
    pub device_number: u32,
    /// What st_blksize shows: the preferred size of I/O.
    pub preferred_io_bytes: u32,
    /// Whether the kernel may keep these attributes. False while the inode has reserved or uncommitted blocks, since its
    /// `blocks_of_512` changes without a request then.
    pub cacheable: bool,
}

/// A node that a name leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its attributes, with its node id.
    pub attributes: Attributes,
    /// Distinguishes lives of a node id, for NFS file handles.
    pub generation: u64,
}

/// What a lookup found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lookup {
    /// The name exists.
    Found(Entry),
    /// It does not, and the kernel may remember that until the name is made through it.
    Absent,
}

/// A time to set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetTime {
    /// This one.
    To(Timestamp),
    /// The time of the operation.
    Now,
}

/// What a setattr changes; `None` stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SetAttributes {
    /// Permission bits (and type, which is ignored).
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Size in bytes: truncate or extend. FUSE does not deliver whether set-user-id bits are to be cleared: clear them when
    /// the caller is not privileged.
    pub size_bytes: Option<u64>,
    /// Last access.
    pub access_time: Option<SetTime>,
    /// Last modification.
    pub modification_time: Option<SetTime>,
    /// Last change of the inode (only with the kernel's writeback cache).
    pub change_time: Option<Timestamp>,
    /// The handle that ftruncate was called on.
    pub handle: Option<u64>,
}

/// An open file or directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opened {
    /// The handle that later requests carry.
    pub handle: u64,
}

/// A read.
#[derive(Clone, Copy, Debug)]
pub struct ReadRequest {
    /// The file.
    pub node: u64,
    /// The handle; it may have been opened for writing only (the kernel reads around partial writes).
    pub handle: u64,
    /// Byte offset.
    pub offset: u64,
    /// Length in bytes, at most 1 MiB.
    pub length_bytes: u32,
    /// The O_DIRECT bit of the descriptor now.
    pub direct: bool,
}

/// A write.
#[derive(Clone, Copy, Debug)]
pub struct WriteRequest<'a> {
    /// The file.
    pub node: u64,
    /// The handle; guessed by the kernel if `from_page_cache`.
    pub handle: u64,
    /// Byte offset. With `append` and not `from_page_cache`, the kernel's idea of the end of the file.
    pub offset: u64,
    /// The bytes, valid for the time of the call.
    pub data: &'a [u8],
    /// The O_DIRECT bit of the descriptor now, unless `from_page_cache`.
    pub direct: bool,
    /// O_APPEND, unless `from_page_cache`.
    pub append: bool,
    /// O_DSYNC or O_SYNC: on a direct handle, durable before the reply.
    pub synchronous: bool,
    /// Delayed by the kernel's page cache (writeback mode, shared mappings): no credentials, a guessed handle.
    pub from_page_cache: bool,
    /// The set-user-id and set-group-id bits are to be cleared.
    pub clear_set_id: bool,
}

/// Ordered runs of bytes that a reply refers to, kept alive by this value: references to folios, or a buffer.
pub trait PageBatch {
    /// Number of runs.
    fn slice_count(&self) -> usize;
    /// The run with this index, or nothing past the last.
    fn slice(&self, index: usize) -> &[u8];
}

impl PageBatch for Vec<u8> {
    fn slice_count(&self) -> usize {
        1
    }

    fn slice(&self, index: usize) -> &[u8] {
        if index == 0 { self } else { &[] }
    }
}

/// One entry of a directory, as readdir gives it.
#[derive(Clone, Copy, Debug)]
pub struct DirectoryEntry<'a> {
    /// Its node id.
    pub node: u64,
    /// Its type.
    pub file_type: FileType,
    /// Its name.
    pub name: &'a OsStr,
    /// Where to go on after this entry; stable across changes of the directory. At most `i64::MAX`, never 0.
    pub next_cookie: u64,
}

/// Whether an entry fitted into the reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Emitted {
    /// It is in.
    Accepted,
    /// It is not: stop, and do not count a lookup for it.
    Full,
}

/// Filesystem statistics, in blocks of `block_bytes`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Size of a block in bytes.
    pub block_bytes: u32,
    /// All blocks.
    pub blocks: u64,
    /// Free ones.
    pub blocks_free: u64,
    /// What can be written.
    pub blocks_available: u64,
    /// Inodes that there may be.
    pub files: u64,
    /// Of these, free.
    pub files_free: u64,
    /// Longest name in bytes.
    pub name_bytes_max: u32,
}

/// What lseek looks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seek {
    /// The next byte that is data.
    Data,
    /// The next hole, or the end.
    Hole,
}

/// A copy between two files.
#[derive(Clone, Copy, Debug)]
pub struct CopyRequest {
    /// Where from.
    pub source_node: u64,
    /// Its handle.
    pub source_handle: u64,
    /// Its byte offset.
    pub source_offset: u64,
    /// Where to.
    pub target_node: u64,
    /// Its handle.
    pub target_handle: u64,
    /// Its byte offset.
    pub target_offset: u64,
    /// Length in bytes, at most [`COPY_BYTES_MAX`].
    pub length_bytes: u64,
}

/// Longest copy of one [`CopyRequest`], since FUSE's answer has 32 bits: a multiple of every block size.
pub const COPY_BYTES_MAX: u64 = 0x7ff0_0000;

/// An ioctl with fixed-size arguments.
#[derive(Clone, Copy, Debug)]
pub struct IoctlRequest<'a> {
    /// The file or directory.
    pub node: u64,
    /// Its handle.
    pub handle: u64,
    /// Whether `node` is a directory.
    pub directory: bool,
    /// The command.
    pub command: u32,
    /// What the caller gave.
    pub input: &'a [u8],
    /// How much it can take, in bytes.
    pub output_bytes_max: u32,
}

/// Answer to an ioctl.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IoctlReply {
    /// What ioctl(2) returns.
    pub result: i32,
    /// What the caller gets; at most `output_bytes_max`.
    pub output: Vec<u8>,
}

/// The filesystem, as a transport sees it. See the module's documentation for the contracts.
pub trait Operations: Send + Sync + 'static {
    /// What a read returns.
    type Pages: PageBatch;

    /// The counters of this filesystem.
    fn metrics(&self) -> &Metrics;

    /// A request panicked: latch read-only. `operation` names it, `message` is the panic's.
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
