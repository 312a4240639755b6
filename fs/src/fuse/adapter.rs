//! fuser's trait on top of [`Operations`]: decode, call, reply. No decisions of the filesystem's are made here.
//!
//! Invariants:
//! 1. Every request is answered exactly once. A panic in one is caught, counted and logged, the filesystem is told to latch
//!    read-only, then that request gets `EIO`, and the session goes on.
//! 2. `ENOSYS` never leaves, but as the answer to FLUSH: the kernel would latch it. Every method of fuser's trait is overridden for the same
//!    reason. That FLUSH is never sent again is what we want where no write is delayed: close(2) still writes out shared mappings and
//!    reports what failed of them, and saves a round trip for every file. With `cache=writeback` FLUSH stays.
//! 3. Nothing of the filesystem is locked while a reply is written.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::OnceLock;
use std::time::{Duration, SystemTime};

use fuser::{
    AccessFlags, BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, FopenFlags, Generation, INodeNo, IoctlFlags,
    KernelConfig, LockOwner, Notifier, OpenFlags, PollEvents, PollFlags, PollNotifier, RenameFlags, ReplyAttr,
    ReplyBmap, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl,
    ReplyLock, ReplyLseek, ReplyOpen, ReplyPoll, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};

use super::attributes::{self, LIFETIME};
use super::crew::{Crew, Work};
use super::init::{self, Negotiated};
use super::launder::Launderer;
use super::operations::{Operations, PageBatch};
use crate::error::{Error, Result};
use crate::metrics::Metrics;
use crate::options::CacheMode;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Arc, Mutex, RankSet, order};
use crate::vfs::{
    Attributes, COPY_BYTES_MAX, Caller, CopyRequest, Emitted, Entry, IoctlRequest, Lookup, ReadRequest, Seek,
    SetAttributes, WriteRequest,
};

thread_local! {
    /// Where a reply of several runs is gathered; at most one request's size, kept for the next.
    static GATHERED: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// See the module's documentation.
pub(super) struct Adapter<O: Operations> {
    operations: Arc<O>,
    cache: CacheMode,
    negotiated: Arc<Mutex<Negotiated>>,
    phantoms: Phantoms,
    launderer: Launderer,
    crew: Arc<Crew>,
}

/// Lookups that the kernel will give back though none was counted: entries of readdirplus without attributes (see
/// [`attributes::refused`]). They are taken off the next forgets of their node.
#[derive(Default)]
struct Phantoms {
    any: AtomicBool,
    lookups: Mutex<HashMap<u64, u64>>,
}

impl Phantoms {
    fn add(&self, node: u64) {
        let mut lookups = self.lookups.lock();
        *lookups.entry(node).or_default() += 1;
        self.any.store(true, Ordering::Release);
    }

    /// How many of `given_back` lookups of `node` had been counted.
    fn take_off(&self, node: u64, given_back: u64) -> u64 {
        if !self.any.load(Ordering::Acquire) {
            return given_back;
        }
        let mut lookups = self.lookups.lock();
        let Some(phantom) = lookups.get_mut(&node) else { return given_back };
        let taken = (*phantom).min(given_back);
        *phantom -= taken;
        if *phantom == 0 {
            lookups.remove(&node);
            self.any.store(!lookups.is_empty(), Ordering::Release);
        }
        given_back - taken
    }
}

impl<O: Operations> Adapter<O> {
    pub(super) fn new(
        operations: Arc<O>,
        cache: CacheMode,
        negotiated: Arc<Mutex<Negotiated>>,
        notifier: Arc<OnceLock<Notifier>>,
        crew: Arc<Crew>,
    ) -> Self {
        let launderer = Launderer::new(notifier);
        Self { operations, cache, negotiated, phantoms: Phantoms::default(), launderer, crew }
    }

    /// Runs one request.
    fn run<T>(&self, operation: &'static str, body: impl FnOnce(&O) -> Result<T>) -> Result<T, Errno> {
        run(&*self.operations, operation, body)
    }

    fn open_flags(&self, flags: i32) -> FopenFlags {
        match self.cache {
            CacheMode::Kernel | CacheMode::Writeback => FopenFlags::FOPEN_KEEP_CACHE,
            // Parallel only on O_DIRECT descriptors: a larger write would lose its atomicity elsewhere.
            CacheMode::Daemon if flags & libc::O_DIRECT != 0 => {
                FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES
            }
            CacheMode::Daemon => FopenFlags::FOPEN_DIRECT_IO,
        }
    }
}

/// Bytes of a transfer above which its copy alone takes long.
const QUICK_BYTES_MAX: u64 = 64 << 10;

fn of_bytes(bytes: u64) -> Work {
    if bytes > QUICK_BYTES_MAX { Work::Long } else { Work::Quick }
}

/// Runs one request; see invariant 1. The filesystem is latched before the answer is sent.
fn run<O: Operations, T>(
    operations: &O,
    operation: &'static str,
    body: impl FnOnce(&O) -> Result<T>,
) -> Result<T, Errno> {
    let payload = match catch_unwind(AssertUnwindSafe(|| {
        let result = body(operations);
        order::check_held("a reply", RankSet::NONE);
        result
    })) {
        Ok(result) => return result.map_err(|error| errno(operation, &error)),
        Err(payload) => payload,
    };
    let message = panic_message(payload.as_ref());
    tracing::error!(operation, message, "a request panicked: it fails with EIO, the filesystem becomes read-only");
    if catch_unwind(AssertUnwindSafe(|| operations.request_panicked(operation, message))).is_err() {
        tracing::error!("latching read-only panicked, too");
    }
    Err(Errno::EIO)
}

fn panic_message(payload: &(dyn std::any::Any + Send)) -> &str {
    payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("a panic without a message")
}

/// The errno that the kernel gets; see invariant 2.
fn errno(operation: &'static str, error: &Error) -> Errno {
    let code = error.errno().raw_os_error();
    match error {
        Error::Posix(_) => tracing::trace!(operation, code, "refused"),
        Error::Bug(_) => tracing::error!(operation, %error, "request failed"),
        _ => tracing::debug!(operation, code, %error, "request failed"),
    }
    if code == libc::ENOSYS { Errno::EIO } else { Errno::from_i32(code) }
}

fn caller(request: &Request, umask: u32) -> Caller {
    Caller { uid: request.uid(), gid: request.gid(), pid: request.pid(), umask }
}

fn reply_entry(reply: ReplyEntry, result: Result<Entry, Errno>) {
    match result {
        Ok(entry) => reply.entry_with_ttls(
            &attributes::lifetime(&entry.attributes),
            &LIFETIME,
            &attributes::file_attributes(&entry.attributes),
            Generation(entry.generation),
        ),
        Err(errno) => reply.error(errno),
    }
}

fn reply_attributes(reply: ReplyAttr, result: Result<Attributes, Errno>) {
    match result {
        Ok(found) => reply.attr(&attributes::lifetime(&found), &attributes::file_attributes(&found)),
        Err(errno) => reply.error(errno),
    }
}

fn reply_empty(reply: ReplyEmpty, result: Result<(), Errno>) {
    match result {
        Ok(()) => reply.ok(),
        Err(errno) => reply.error(errno),
    }
}

/// Answers getxattr and listxattr: the size if the caller only asks for that, else the value if it fits.
fn reply_sized(reply: ReplyXattr, size: u32, result: Result<Vec<u8>, Errno>) {
    match result {
        Ok(value) => match u32::try_from(value.len()) {
            Ok(length) if size == 0 => reply.size(length),
            Ok(length) if length <= size => reply.data(&value),
            _ => reply.error(Errno::ERANGE),
        },
        Err(errno) => reply.error(errno),
    }
}

/// Sends what was read: one run as it lies in memory, several gathered into one buffer (fuser's reply takes one slice).
fn reply_pages(metrics: &Metrics, reply: ReplyData, pages: &impl PageBatch) {
    if let Some(bytes) = pages.as_single() {
        metrics.reply_bytes_referenced.add(bytes.len() as u64);
        return reply.data(bytes);
    }
    GATHERED.with_borrow_mut(|gathered| {
        gathered.clear();
        pages.for_each_slice(&mut |bytes| gathered.extend_from_slice(bytes));
        metrics.reply_bytes_copied.add(gathered.len() as u64);
        reply.data(gathered);
    });
}

impl<O: Operations> fuser::Filesystem for Adapter<O> {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        *self.negotiated.lock() = init::negotiate(config, self.cache);
        Ok(())
    }

    fn destroy(&mut self) {}

    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let _shift = self.crew.enter(Work::Quick);
        match self.run("lookup", |operations| operations.lookup(&caller(request, 0), parent.0, name)) {
            Ok(Lookup::Found(entry)) => reply_entry(reply, Ok(entry)),
            Ok(Lookup::Absent) => {
                reply.entry_with_ttls(&Duration::ZERO, &LIFETIME, &attributes::absent(), Generation(0));
            }
            Err(errno) => reply.error(errno),
        }
    }

    fn forget(&self, _: &Request, node: INodeNo, lookups: u64) {
        // No shift: fuser calls this once for each node of one request, and a thread that parked in between would keep the rest.
        let counted = self.phantoms.take_off(node.0, lookups);
        if counted > 0 {
            let _ = self.run("forget", |operations| {
                operations.forget(node.0, counted);
                Ok(())
            });
        }
    }

    fn getattr(&self, request: &Request, node: INodeNo, handle: Option<FileHandle>, reply: ReplyAttr) {
        let _shift = self.crew.enter(Work::Quick);
        let handle = handle.map(|handle| handle.0);
        reply_attributes(
            reply,
            self.run("getattr", |operations| operations.get_attributes(&caller(request, 0), node.0, handle)),
        );
    }

    fn setattr(
        &self,
        request: &Request,
        node: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        ctime: Option<SystemTime>,
        handle: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let _shift = self.crew.enter(if size.is_some() { Work::Long } else { Work::Quick });
        let changes = SetAttributes {
            mode,
            uid,
            gid,
            size_bytes: size,
            access_time: atime.map(attributes::set_time),
            modification_time: mtime.map(attributes::set_time),
            change_time: ctime.map(attributes::timestamp),
            handle: handle.map(|handle| handle.0),
        };
        reply_attributes(
            reply,
            self.run("setattr", |operations| operations.set_attributes(&caller(request, 0), node.0, &changes)),
        );
    }

    fn readlink(&self, request: &Request, node: INodeNo, reply: ReplyData) {
        let _shift = self.crew.enter(Work::Quick);
        match self.run("readlink", |operations| operations.readlink(&caller(request, 0), node.0)) {
            Ok(target) => reply.data(&target),
            Err(errno) => reply.error(errno),
        }
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        device: u32,
        reply: ReplyEntry,
    ) {
        let _shift = self.crew.enter(Work::Quick);
        reply_entry(
            reply,
            self.run("mknod", |operations| operations.mknod(&caller(request, umask), parent.0, name, mode, device)),
        );
    }

    fn mkdir(&self, request: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, reply: ReplyEntry) {
        let _shift = self.crew.enter(Work::Quick);
        reply_entry(
            reply,
            self.run("mkdir", |operations| operations.mkdir(&caller(request, umask), parent.0, name, mode)),
        );
    }

    fn unlink(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let _shift = self.crew.enter(Work::Quick);
        reply_empty(reply, self.run("unlink", |operations| operations.unlink(&caller(request, 0), parent.0, name)));
    }

    fn rmdir(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let _shift = self.crew.enter(Work::Quick);
        reply_empty(reply, self.run("rmdir", |operations| operations.rmdir(&caller(request, 0), parent.0, name)));
    }

    fn symlink(&self, request: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        let _shift = self.crew.enter(Work::Quick);
        let target = target.as_os_str().as_bytes();
        reply_entry(
            reply,
            self.run("symlink", |operations| operations.symlink(&caller(request, 0), parent.0, name, target)),
        );
    }

    fn rename(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let _shift = self.crew.enter(Work::Long);
        reply_empty(
            reply,
            self.run("rename", |operations| {
                operations.rename(&caller(request, 0), parent.0, name, new_parent.0, new_name, flags.bits())
            }),
        );
    }

    fn link(&self, request: &Request, node: INodeNo, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let _shift = self.crew.enter(Work::Quick);
        reply_entry(reply, self.run("link", |operations| operations.link(&caller(request, 0), node.0, parent.0, name)));
    }

    fn open(&self, request: &Request, node: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let _shift = self.crew.enter(Work::Quick);
        match self.run("open", |operations| operations.open(&caller(request, 0), node.0, flags.0)) {
            Ok(opened) => reply.opened(FileHandle(opened.handle), self.open_flags(flags.0)),
            Err(errno) => reply.error(errno),
        }
    }

    fn read(
        &self,
        request: &Request,
        node: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        flags: OpenFlags,
        owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let _shift = self.crew.enter(of_bytes(u64::from(size)));
        let read = ReadRequest {
            node: node.0,
            handle: handle.0,
            offset,
            length_bytes: size,
            direct: flags.0 & libc::O_DIRECT != 0,
        };
        // Only reads that go past the page cache, straight into the program's memory, name an owner: a part is an answer for them.
        let answer = self.run("read", |operations| match owner {
            Some(_) => operations.read_some(&caller(request, 0), &read),
            None => operations.read(&caller(request, 0), &read),
        });
        match answer {
            Ok(pages) => reply_pages(self.operations.metrics(), reply, &pages),
            Err(errno) => reply.error(errno),
        }
    }

    fn write(
        &self,
        request: &Request,
        node: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        flags: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let _shift = self.crew.enter(of_bytes(data.len() as u64));
        // A delayed write's handle is a guess, and so are its flags.
        let from_page_cache = write_flags.contains(WriteFlags::FUSE_WRITE_CACHE);
        let flag = |bits: i32| !from_page_cache && flags.0 & bits != 0;
        let write = WriteRequest {
            node: node.0,
            handle: handle.0,
            offset,
            data,
            direct: flag(libc::O_DIRECT),
            append: flag(libc::O_APPEND),
            synchronous: flag(libc::O_DSYNC),
            from_page_cache,
            clear_set_id: write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID),
        };
        match self.run("write", |operations| operations.write(&caller(request, 0), &write)) {
            Ok(written_bytes) => reply.written(written_bytes),
            Err(errno) => reply.error(errno),
        }
    }

    fn flush(&self, request: &Request, node: INodeNo, handle: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        let _shift = self.crew.enter(Work::Long);
        match self.run("flush", |operations| operations.flush(&caller(request, 0), node.0, handle.0)) {
            // See invariant 2.
            Ok(()) if self.cache != CacheMode::Writeback => reply.error(Errno::ENOSYS),
            flushed => reply_empty(reply, flushed),
        }
    }

    fn release(
        &self,
        _: &Request,
        node: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        let _shift = self.crew.enter(Work::Quick);
        reply_empty(reply, self.run("release", |operations| operations.release(node.0, handle.0)));
    }

    fn fsync(&self, request: &Request, node: INodeNo, handle: FileHandle, data_only: bool, reply: ReplyEmpty) {
        let _shift = self.crew.enter(Work::Long);
        reply_empty(
            reply,
            self.run("fsync", |operations| operations.fsync(&caller(request, 0), node.0, handle.0, data_only)),
        );
    }

    fn opendir(&self, request: &Request, node: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let _shift = self.crew.enter(Work::Quick);
        match self.run("opendir", |operations| operations.opendir(&caller(request, 0), node.0, flags.0)) {
            Ok(opened) => reply.opened(FileHandle(opened.handle), FopenFlags::empty()),
            Err(errno) => reply.error(errno),
        }
    }

    fn readdir(&self, request: &Request, node: INodeNo, handle: FileHandle, cookie: u64, mut reply: ReplyDirectory) {
        let _shift = self.crew.enter(Work::Quick);
        let mut accepted = 0_u64;
        let result = self.run("readdir", |operations| {
            operations.readdir(&caller(request, 0), node.0, handle.0, cookie, &mut |entry| {
                let kind = attributes::file_type(entry.file_type);
                if reply.add(INodeNo(entry.node), entry.next_cookie, kind, entry.name) {
                    return Emitted::Full;
                }
                accepted += 1;
                Emitted::Accepted
            })
        });
        match result {
            Err(errno) if accepted == 0 => reply.error(errno),
            _ => reply.ok(),
        }
    }

    fn readdirplus(
        &self,
        request: &Request,
        node: INodeNo,
        handle: FileHandle,
        cookie: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let _shift = self.crew.enter(Work::Quick);
        let mut accepted = 0_u64;
        let result = self.run("readdirplus", |operations| {
            operations.readdirplus(&caller(request, 0), node.0, handle.0, cookie, &mut |name, entry| {
                let (lifetime, attr, generation) = match entry {
                    Some(entry) => (
                        attributes::lifetime(&entry.attributes),
                        attributes::file_attributes(&entry.attributes),
                        entry.generation,
                    ),
                    None => (Duration::ZERO, attributes::refused(name.node, name.file_type), 0),
                };
                let node = INodeNo(name.node);
                if reply.add(node, name.next_cookie, name.name, &lifetime, &attr, Generation(generation)) {
                    return Emitted::Full;
                }
                // The kernel takes no notice of the attributes of these two.
                if entry.is_none() && name.name != "." && name.name != ".." {
                    self.phantoms.add(name.node);
                }
                accepted += 1;
                Emitted::Accepted
            })
        });
        match result {
            Err(errno) if accepted == 0 => reply.error(errno),
            _ => reply.ok(),
        }
    }

    fn releasedir(&self, _: &Request, node: INodeNo, handle: FileHandle, _: OpenFlags, reply: ReplyEmpty) {
        let _shift = self.crew.enter(Work::Quick);
        reply_empty(reply, self.run("releasedir", |operations| operations.releasedir(node.0, handle.0)));
    }

    fn fsyncdir(&self, request: &Request, node: INodeNo, handle: FileHandle, data_only: bool, reply: ReplyEmpty) {
        let _shift = self.crew.enter(Work::Long);
        reply_empty(
            reply,
            self.run("fsyncdir", |operations| operations.fsyncdir(&caller(request, 0), node.0, handle.0, data_only)),
        );
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        let _shift = self.crew.enter(Work::Quick);
        match self.run("statfs", Operations::statistics) {
            Ok(found) => reply.statfs(
                found.blocks,
                found.blocks_free,
                found.blocks_available,
                found.files,
                found.files_free,
                found.block_bytes,
                found.name_bytes_max,
                found.block_bytes,
            ),
            Err(errno) => reply.error(errno),
        }
    }

    fn setxattr(
        &self,
        request: &Request,
        node: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _: u32,
        reply: ReplyEmpty,
    ) {
        let _shift = self.crew.enter(Work::Quick);
        reply_empty(
            reply,
            self.run("setxattr", |operations| operations.set_xattr(&caller(request, 0), node.0, name, value, flags)),
        );
    }

    fn getxattr(&self, request: &Request, node: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let _shift = self.crew.enter(Work::Quick);
        reply_sized(
            reply,
            size,
            self.run("getxattr", |operations| operations.get_xattr(&caller(request, 0), node.0, name)),
        );
    }

    fn listxattr(&self, request: &Request, node: INodeNo, size: u32, reply: ReplyXattr) {
        let _shift = self.crew.enter(Work::Quick);
        reply_sized(
            reply,
            size,
            self.run("listxattr", |operations| operations.list_xattrs(&caller(request, 0), node.0)),
        );
    }

    fn removexattr(&self, request: &Request, node: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let _shift = self.crew.enter(Work::Quick);
        reply_empty(
            reply,
            self.run("removexattr", |operations| operations.remove_xattr(&caller(request, 0), node.0, name)),
        );
    }

    /// Never asked with `default_permissions`.
    fn access(&self, _: &Request, _: INodeNo, _: AccessFlags, reply: ReplyEmpty) {
        reply.ok();
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let _shift = self.crew.enter(Work::Quick);
        match self.run("create", |operations| operations.create(&caller(request, umask), parent.0, name, mode, flags)) {
            Ok((entry, opened)) => reply.created(
                &attributes::lifetime(&entry.attributes),
                &attributes::file_attributes(&entry.attributes),
                Generation(entry.generation),
                FileHandle(opened.handle),
                self.open_flags(flags),
            ),
            Err(errno) => reply.error(errno),
        }
    }

    /// Never asked: locks stay the kernel's.
    fn getlk(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: LockOwner,
        _: u64,
        _: u64,
        _: i32,
        _: u32,
        reply: ReplyLock,
    ) {
        reply.error(Errno::EOPNOTSUPP);
    }

    /// Never asked: locks stay the kernel's.
    fn setlk(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: LockOwner,
        _: u64,
        _: u64,
        _: i32,
        _: u32,
        _: bool,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EOPNOTSUPP);
    }

    /// Never asked: only for filesystems with a block device of the kernel's.
    fn bmap(&self, _: &Request, _: INodeNo, _: u32, _: u64, reply: ReplyBmap) {
        reply.error(Errno::EOPNOTSUPP);
    }

    fn ioctl(
        &self,
        request: &Request,
        node: INodeNo,
        handle: FileHandle,
        flags: IoctlFlags,
        command: u32,
        input: &[u8],
        output_bytes_max: u32,
        reply: ReplyIoctl,
    ) {
        let _shift = self.crew.enter(Work::Long);
        let ioctl = IoctlRequest {
            node: node.0,
            handle: handle.0,
            directory: flags.contains(IoctlFlags::FUSE_IOCTL_DIR),
            command,
            input,
            output_bytes_max,
        };
        match self.run("ioctl", |operations| operations.ioctl(&caller(request, 0), &ioctl)) {
            Ok(answer) if answer.output.len() as u64 <= u64::from(output_bytes_max) => {
                reply.ioctl(answer.result, &answer.output);
            }
            Ok(_) => reply.error(Errno::EOVERFLOW),
            Err(errno) => reply.error(errno),
        }
    }

    /// Files are always ready.
    fn poll(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: PollNotifier,
        events: PollEvents,
        _: PollFlags,
        reply: ReplyPoll,
    ) {
        let ready = PollEvents::POLLIN | PollEvents::POLLOUT | PollEvents::POLLRDNORM | PollEvents::POLLWRNORM;
        reply.poll(events & ready);
    }

    fn fallocate(
        &self,
        request: &Request,
        node: INodeNo,
        handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let _shift = self.crew.enter(Work::Long);
        reply_empty(
            reply,
            self.run("fallocate", |operations| {
                operations.fallocate(&caller(request, 0), node.0, handle.0, offset, length, mode)
            }),
        );
    }

    fn lseek(&self, request: &Request, node: INodeNo, handle: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        let _shift = self.crew.enter(Work::Long);
        let what = match whence {
            libc::SEEK_DATA => Seek::Data,
            libc::SEEK_HOLE => Seek::Hole,
            _ => return reply.error(Errno::EINVAL),
        };
        let Ok(offset) = u64::try_from(offset) else { return reply.error(Errno::ENXIO) };
        let (operations, caller) = (Arc::clone(&self.operations), caller(request, 0));
        let is_dirty = self.run("lseek", |operations| Ok(operations.may_be_dirty_in_kernel(node.0)));
        let answer = move || {
            let found =
                run(&*operations, "lseek", |operations| operations.seek(&caller, node.0, handle.0, offset, what));
            match found.map(i64::try_from) {
                Ok(Ok(found)) => reply.offset(found),
                Ok(Err(_)) => reply.error(Errno::EOVERFLOW),
                Err(errno) => reply.error(errno),
            }
        };
        match is_dirty {
            Ok(true) => self.launderer.launder(node.0, answer),
            _ => answer(),
        }
    }

    fn copy_file_range(
        &self,
        request: &Request,
        source: INodeNo,
        source_handle: FileHandle,
        source_offset: u64,
        target: INodeNo,
        target_handle: FileHandle,
        target_offset: u64,
        length: u64,
        _: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        let _shift = self.crew.enter(Work::Long);
        let copy = CopyRequest {
            source_node: source.0,
            source_handle: source_handle.0,
            source_offset,
            target_node: target.0,
            target_handle: target_handle.0,
            target_offset,
            length_bytes: length.min(COPY_BYTES_MAX),
        };
        match self.run("copy_file_range", |operations| operations.copy_file_range(&caller(request, 0), &copy)) {
            Ok(copied_bytes) => reply.written(u32::try_from(copied_bytes).unwrap_or(u32::MAX)),
            Err(errno) => reply.error(errno),
        }
    }
}
