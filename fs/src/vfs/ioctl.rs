//! ioctl(2): chattr's flags, shutdown, and what FUSE has no other way for (sync, statistics).
//!
//! FUSE passes on only commands that say their sizes, at most 16 KiB; privileges are checked here.

use std::fmt::Write as _;

use rustix::io::Errno;

use super::Vfs;
use super::caller::is_privileged;
use super::inode::VfsInode;
use super::scrub::IOCTL_SCRUB;
use super::types::{Caller, IoctlReply, IoctlRequest};
use crate::error::Result;
use crate::format::journal::AccountingCounter;
use crate::namespace::{FLAG_APPEND, FLAG_IMMUTABLE, FLAG_NOATIME, FLAG_NODUMP, FLAG_SYNC, FLAGS_SETTABLE};
use crate::sync::Arc;
use crate::sync::atomic::Ordering;
use crate::transaction::CommitOptions;

/// `FS_IOC_GETFLAGS`.
const GET_FLAGS: u32 = 0x8008_6601;
/// `FS_IOC_SETFLAGS`.
const SET_FLAGS: u32 = 0x4008_6602;
/// `FS_IOC_FSGETXATTR`.
const GET_EXTENDED_FLAGS: u32 = 0x801c_581f;
/// `FS_IOC_FSSETXATTR`.
const SET_EXTENDED_FLAGS: u32 = 0x401c_5820;
/// `FS_IOC_SHUTDOWN`. Its number says that it only gives, so through FUSE its argument never arrives: it is then a power cut.
const SHUTDOWN: u32 = 0x8004_587d;
/// The same, declared as taking an argument, which FUSE delivers.
const SHUTDOWN_WITH_ARGUMENT: u32 = 0x4004_587d;
/// Flush nothing before the shutdown.
const SHUTDOWN_NO_FLUSH: u32 = 2;

/// Makes everything durable: what `sync(2)` cannot ask of a FUSE filesystem. `_IO(0xc7, 1)`.
pub const IOCTL_SYNC: u32 = 0xc701;
/// Counters as text, a line `name value` each. `_IOWR(0xc7, 2, [u8; 8192])`: the input starts with the cursor, 0 at first (u64,
/// little-endian); the answer is the next cursor, 0 at the end (u64), and then as many whole lines as fit. They change between two answers,
/// but each line is whole, and none is missing.
pub const IOCTL_STATISTICS: u32 = 0xe000_c702;

/// Makes the next fallocate of the handle a collapse or an insert, which Linux does not pass on. `_IOW(0xc7, 16, [u64; 4])`: what
/// ([`super::ARM_COLLAPSE`], [`super::ARM_INSERT`]), offset, length, and the size that the caller believes the file to have. It is fired by `PUNCH_HOLE | KEEP_SIZE` (a
/// collapse) or `ZERO_RANGE | KEEP_SIZE` (an insert) from the offset to the end of the file or farther: to the end of a page, or the kernel zeroes a part of what it
/// caches. Afterwards the kernel must be told the new size. Any other fallocate on the handle fails with `EINVAL`, and disarms; so does one of a file that has
/// another size (`EAGAIN`).
pub const IOCTL_ARM: u32 = 0x4020_c710;

/// `FS_XFLAG_*` beside the `FS_*_FL` that means the same.
const EXTENDED_FLAGS: [(u32, u32); 5] =
    [(0x8, FLAG_IMMUTABLE), (0x10, FLAG_APPEND), (0x20, FLAG_SYNC), (0x40, FLAG_NOATIME), (0x80, FLAG_NODUMP)];
/// Bytes of `struct fsxattr`.
const EXTENDED_BYTES: usize = 28;

fn first_u32(input: &[u8]) -> Result<u32> {
    input.first_chunk().map(|bytes| u32::from_le_bytes(*bytes)).ok_or_else(|| Errno::INVAL.into())
}

impl Vfs {
    /// ioctl(2).
    ///
    /// # Errors
    /// `ENOTTY` for unknown commands, `EPERM`, `EOPNOTSUPP` for flags that are not served.
    pub fn ioctl(&self, caller: &Caller, request: &IoctlRequest<'_>) -> Result<IoctlReply> {
        let answer = |output: Vec<u8>| IoctlReply { result: 0, output };
        match request.command {
            GET_FLAGS => {
                let flags = self.inode(request.node)?.state().inode.flags;
                Ok(answer(u64::from(flags).to_le_bytes().to_vec()).cut(request.output_bytes_max))
            }
            SET_FLAGS => {
                let flags = first_u32(request.input)?;
                self.set_flags(caller, request.node, flags)?;
                Ok(answer(Vec::new()))
            }
            GET_EXTENDED_FLAGS => {
                let flags = self.inode(request.node)?.state().inode.flags;
                let extended = EXTENDED_FLAGS.iter().filter(|(_, flag)| flags & flag != 0).map(|(bit, _)| bit);
                let mut output = vec![0; EXTENDED_BYTES];
                output.splice(..4, extended.sum::<u32>().to_le_bytes());
                Ok(answer(output).cut(request.output_bytes_max))
            }
            SET_EXTENDED_FLAGS => {
                let extended = first_u32(request.input)?;
                let (_, rest) = request.input.split_at_checked(4).ok_or(Errno::INVAL)?;
                let known = EXTENDED_FLAGS.iter().map(|(bit, _)| bit).sum::<u32>();
                // Projects and extent sizes are not served; the count of extents is the kernel's to ignore.
                let is_other_set = rest.iter().enumerate().any(|(at, &byte)| byte != 0 && !(4..8).contains(&at));
                if extended & !known != 0 || is_other_set {
                    return Err(Errno::OPNOTSUPP.into());
                }
                let flags = EXTENDED_FLAGS.iter().filter(|(bit, _)| extended & bit != 0).map(|(_, flag)| flag).sum();
                self.set_flags(caller, request.node, flags)?;
                Ok(answer(Vec::new()))
            }
            SHUTDOWN | SHUTDOWN_WITH_ARGUMENT => {
                if !is_privileged(caller) {
                    return Err(Errno::PERM.into());
                }
                let flags = if request.input.is_empty() { SHUTDOWN_NO_FLUSH } else { first_u32(request.input)? };
                self.shut_down(flags)?;
                Ok(answer(Vec::new()))
            }
            IOCTL_SYNC => {
                self.sync()?;
                Ok(answer(Vec::new()))
            }
            IOCTL_ARM => {
                self.arm(request.node, request.handle, request.input)?;
                Ok(answer(Vec::new()))
            }
            IOCTL_SCRUB => self.scrub_ioctl(caller, request),
            IOCTL_STATISTICS => self.statistics_page(request),
            _ => Err(Errno::NOTTY.into()),
        }
    }

    fn set_flags(&self, caller: &Caller, node: u64, flags: u32) -> Result<()> {
        self.check_writable()?;
        if flags & !FLAGS_SETTABLE != 0 {
            return Err(Errno::OPNOTSUPP.into());
        }
        let inode: Arc<VfsInode> = self.inode(node)?;
        let now = self.env.now();
        let lock = inode.lock.write();
        let (present, owner) = {
            let state = inode.state();
            (state.inode.flags, state.inode.uid)
        };
        if !is_privileged(caller) && (caller.uid != owner || (present ^ flags) & (FLAG_IMMUTABLE | FLAG_APPEND) != 0) {
            return Err(Errno::PERM.into());
        }
        let committed = self.transactions.run(CommitOptions::default(), |transaction| {
            self.namespace.update_inode(transaction, inode.number, |stored| {
                stored.flags = flags;
                stored.change_time = now.into();
                Ok(())
            })
        })?;
        inode.apply(&committed.value, committed.sequence);
        drop(lock);
        self.settle(&inode)
    }

    /// `FS_IOC_SHUTDOWN`: as if the machine had lost its power, after a flush unless `flags` says none.
    fn shut_down(&self, flags: u32) -> Result<()> {
        match flags {
            0 => self.sync()?,
            1 => self.journal.flush(self.journal.newest())?,
            SHUTDOWN_NO_FLUSH => {}
            _ => return Err(Errno::INVAL.into()),
        }
        self.is_shut_down.store(true, Ordering::Release);
        self.latch("a shutdown was asked for");
        Ok(())
    }

    /// All counters, as lines of text.
    #[must_use]
    pub fn statistics_text(&self) -> String {
        let mut text = String::new();
        let usage = self.space.usage();
        let totals = self.journal.totals();
        let forest = self.transactions.forest();
        let total = |counter| u64::try_from(totals.get(counter)).unwrap_or(0);
        let own = [
            ("usage.total_bytes", usage.total_bytes),
            ("usage.free_bytes", usage.free_bytes),
            ("usage.available_bytes", usage.available_bytes),
            ("usage.data_bytes", usage.data_bytes),
            ("usage.unwritten_bytes", usage.unwritten_bytes),
            ("usage.inline_bytes", total(AccountingCounter::InlineBytes)),
            ("usage.metadata_bytes", usage.metadata_bytes),
            ("usage.waiting_for_reuse_bytes", usage.need_discard_buckets * usage.bucket_bytes),
            ("usage.compressed_logical_bytes", total(AccountingCounter::CompressedLogicalBytes)),
            ("usage.compressed_disk_bytes", total(AccountingCounter::CompressedDiskBytes)),
            ("usage.inodes", total(AccountingCounter::Inodes)),
            ("vfs.inodes_in_memory", self.table.resident_count() as u64),
            ("vfs.deletions_waiting", self.deletions.waiting() as u64),
            ("pagecache.used_bytes", self.cache.used_bytes()),
            ("pagecache.peak_bytes", self.cache.peak_bytes()),
            ("pagecache.dirty_bytes", self.cache.dirty_bytes()),
            ("pagecache.writeback_bytes", self.cache.writeback_bytes()),
            ("pagecache.write_bandwidth_bytes", self.cache.write_bandwidth_bytes()),
            ("pagecache.dirty_limit_bytes", self.cache.dirty_limit_bytes()),
            ("btree.cached_bytes", forest.cached_bytes()),
            ("btree.cached_peak_bytes", forest.cached_peak_bytes()),
            ("btree.dirty_bytes", forest.dirty_bytes()),
        ];
        for (name, value) in self.metrics.snapshot().into_iter().chain(own) {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{name} {value}");
        }
        text
    }

    fn statistics_page(&self, request: &IoctlRequest<'_>) -> Result<IoctlReply> {
        // The cursor is the number of a line: the lines are the same in each answer, only their values change.
        let cursor = request.input.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        let text = self.statistics_text();
        let room = usize::try_from(request.output_bytes_max).unwrap_or(usize::MAX);
        let mut output = vec![0; size_of::<u64>()];
        let mut next = 0_u64;
        for (line, number) in text.split_inclusive('\n').zip(0_u64..).skip_while(|(_, number)| *number < cursor) {
            if output.len() + line.len() > room {
                next = number;
                break;
            }
            output.extend_from_slice(line.as_bytes());
        }
        // A page in which no line fits ends it: the caller would ask for ever.
        let next = if next == cursor { 0 } else { next };
        output.splice(..size_of::<u64>(), next.to_le_bytes());
        Ok(IoctlReply { result: 0, output }.cut(request.output_bytes_max))
    }
}

impl IoctlReply {
    pub(super) fn cut(mut self, output_bytes_max: u32) -> Self {
        self.output.truncate(usize::try_from(output_bytes_max).unwrap_or(usize::MAX));
        self
    }
}
