//! Requests and answers of the POSIX operations, as typed values: nothing of a transport's wire format. The FUSE adapter's
//! `Operations` trait uses the same types.

use std::ffi::OsStr;

use crate::env::Timestamp;
use crate::format::namespace::FileType;

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

impl<'a> WriteRequest<'a> {
    /// A write(2) through the cache, with no flag.
    #[must_use]
    pub fn new(node: u64, handle: u64, offset: u64, data: &'a [u8]) -> Self {
        Self {
            node,
            handle,
            offset,
            data,
            direct: false,
            append: false,
            synchronous: false,
            from_page_cache: false,
            clear_set_id: false,
        }
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
