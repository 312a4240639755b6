//! A small filesystem in memory, with which the adapter is tested and the running kernel is probed (`coppice probe`).
//!
//! It does what POSIX asks of the operations that arrive, holds everything under one lock, forgets nothing until it is dropped, and
//! can write down what arrived ([`Seen`]). It is not for storing anything.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc as StdArc;
use std::time::SystemTime;

use rustix::io::Errno;

use super::operations::{Operations, PageBatch};
use crate::env::Timestamp;
use crate::error::Result;
use crate::format::namespace::{FileType, NAME_BYTES_MAX};
use crate::metrics::Metrics;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Mutex, MutexGuard};
use crate::vfs::{
    Attributes, Caller, CopyRequest, DirectoryEntry, Emitted, Entry, IoctlReply, IoctlRequest, Lookup, Opened,
    ReadRequest, Seek, SetAttributes, SetTime, Statistics, WriteRequest,
};

/// Unit of content: what one slice of a reply holds at most.
const BLOCK_BYTES: u64 = 64 << 10;
const ROOT: u64 = 1;
/// `FS_IOC_GETFLAGS`, `FS_IOC_SHUTDOWN`.
const GET_FLAGS: u32 = 0x8008_6601;
const SHUTDOWN: u32 = 0x8004_587d;
/// The same, declared as taking an argument.
const SHUTDOWN_WITH_ARGUMENT: u32 = 0x4004_587d;

/// One request that arrived.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Its name, as in [`Operations`].
    pub operation: &'static str,
    /// Flags, mode, offset or command, as the operation has; for getxattr 1 if it is of capabilities, 2 if of an ACL; for ioctl bit 32
    /// says that it is of a directory.
    pub detail: u64,
    /// Length in bytes, where it has one.
    pub length_bytes: u64,
    /// For reads and writes.
    pub direct: bool,
    /// For writes: delayed by the kernel's page cache.
    pub from_page_cache: bool,
    /// For writes: the set-user-id bits are to be cleared.
    pub clear_set_id: bool,
}

#[derive(Debug)]
enum Content {
    File(BTreeMap<u64, StdArc<Vec<u8>>>),
    Directory { names: HashMap<OsString, u64>, entries: BTreeMap<u64, (OsString, u64)>, parent: u64 },
    Symlink(Vec<u8>),
    Special,
}

#[derive(Debug)]
struct Node {
    attributes: Attributes,
    content: Content,
    xattrs: BTreeMap<OsString, Vec<u8>>,
    lookups: u64,
}

#[derive(Debug, Default)]
struct State {
    nodes: HashMap<u64, Node>,
    newest_node: u64,
    newest_cookie: u64,
    newest_handle: u64,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct MemoryFilesystem {
    state: Mutex<State>,
    metrics: Metrics,
    recording: Mutex<Option<Vec<Seen>>>,
    panic_in: Mutex<Option<&'static str>>,
    read_only: AtomicBool,
}

/// Runs of blocks, referenced.
#[derive(Debug)]
pub struct MemoryPages(Vec<(StdArc<Vec<u8>>, usize, usize)>);

impl MemoryPages {
    fn slices(&self) -> impl Iterator<Item = &[u8]> {
        self.0.iter().filter_map(|(block, from, to)| block.get(*from..*to))
    }
}

impl PageBatch for MemoryPages {
    fn as_single(&self) -> Option<&[u8]> {
        if self.0.len() > 1 { None } else { Some(self.slices().next().unwrap_or_default()) }
    }

    fn for_each_slice(&self, each: &mut dyn FnMut(&[u8])) {
        self.slices().for_each(each);
    }
}

fn now() -> Timestamp {
    Timestamp::from(SystemTime::now())
}

fn node(state: &State, node: u64) -> Result<&Node> {
    state.nodes.get(&node).ok_or(Errno::STALE.into())
}

fn node_mut(state: &mut State, node: u64) -> Result<&mut Node> {
    state.nodes.get_mut(&node).ok_or(Errno::STALE.into())
}

fn find(state: &State, parent: u64, name: &OsStr) -> Result<Option<u64>> {
    match &node(state, parent)?.content {
        Content::Directory { parent: above, .. } if name == ".." => Ok(Some(*above)),
        Content::Directory { .. } if name == "." => Ok(Some(parent)),
        Content::Directory { names, entries, .. } => {
            Ok(names.get(name).and_then(|cookie| entries.get(cookie)).map(|&(_, node)| node))
        }
        _ => Err(Errno::NOTDIR.into()),
    }
}

fn insert_name(state: &mut State, parent: u64, name: &OsStr, child: u64) -> Result<()> {
    if name.len() > NAME_BYTES_MAX {
        return Err(Errno::NAMETOOLONG.into());
    }
    // 1 and 2 are "." and "..".
    state.newest_cookie += 1;
    let cookie = state.newest_cookie + 2;
    let Content::Directory { names, entries, .. } = &mut node_mut(state, parent)?.content else {
        return Err(Errno::NOTDIR.into());
    };
    if names.contains_key(name) {
        return Err(Errno::EXIST.into());
    }
    names.insert(name.to_owned(), cookie);
    entries.insert(cookie, (name.to_owned(), child));
    touch(node_mut(state, parent)?, true);
    Ok(())
}

fn remove_name(state: &mut State, parent: u64, name: &OsStr) -> Result<u64> {
    let Content::Directory { names, entries, .. } = &mut node_mut(state, parent)?.content else {
        return Err(Errno::NOTDIR.into());
    };
    let cookie = names.remove(name).ok_or(Errno::NOENT)?;
    let (_, child) = entries.remove(&cookie).ok_or(Errno::IO)?;
    touch(node_mut(state, parent)?, true);
    Ok(child)
}

fn is_directory(node: &Node) -> bool {
    matches!(node.content, Content::Directory { .. })
}

fn is_empty_directory(node: &Node) -> bool {
    matches!(&node.content, Content::Directory { entries, .. } if entries.is_empty())
}

fn touch(node: &mut Node, content: bool) {
    let now = now();
    node.attributes.change_time = now;
    if content {
        node.attributes.modification_time = now;
    }
}

fn drop_link(state: &mut State, child: u64) -> Result<()> {
    let child = node_mut(state, child)?;
    let fewer = if is_directory(child) { 2 } else { 1 };
    child.attributes.link_count = child.attributes.link_count.saturating_sub(fewer);
    touch(child, false);
    Ok(())
}

fn read_blocks(
    blocks: &BTreeMap<u64, StdArc<Vec<u8>>>,
    size: u64,
    offset: u64,
    length: u64,
) -> Vec<(StdArc<Vec<u8>>, usize, usize)> {
    let end = offset.saturating_add(length).min(size);
    let mut slices = Vec::new();
    let mut position = offset;
    let zeros = StdArc::new(vec![0; BLOCK_BYTES as usize]);
    while position < end {
        let index = position / BLOCK_BYTES;
        let from = position % BLOCK_BYTES;
        let to = BLOCK_BYTES.min(from + end - position);
        slices.push((StdArc::clone(blocks.get(&index).unwrap_or(&zeros)), from as usize, to as usize));
        position += to - from;
    }
    slices
}

fn write_blocks(blocks: &mut BTreeMap<u64, StdArc<Vec<u8>>>, offset: u64, data: &[u8]) {
    let mut position = offset;
    let mut rest = data;
    while !rest.is_empty() {
        let from = (position % BLOCK_BYTES) as usize;
        let (now, later) = rest.split_at(rest.len().min(BLOCK_BYTES as usize - from));
        let block = blocks.entry(position / BLOCK_BYTES).or_insert_with(|| StdArc::new(vec![0; BLOCK_BYTES as usize]));
        if let Some(target) = StdArc::make_mut(block).get_mut(from..from + now.len()) {
            target.copy_from_slice(now);
        }
        position += now.len() as u64;
        rest = later;
    }
}

/// Zeros a range; whole blocks become holes.
fn zero_blocks(blocks: &mut BTreeMap<u64, StdArc<Vec<u8>>>, offset: u64, end: u64) {
    let indexes: Vec<u64> = blocks.range(offset / BLOCK_BYTES..end.div_ceil(BLOCK_BYTES)).map(|(&i, _)| i).collect();
    for index in indexes {
        let start = index * BLOCK_BYTES;
        let (from, to) = (offset.saturating_sub(start), (end - start).min(BLOCK_BYTES));
        if from == 0 && to == BLOCK_BYTES {
            blocks.remove(&index);
        } else if let Some(block) = blocks.get_mut(&index)
            && let Some(target) = StdArc::make_mut(block).get_mut(from as usize..to as usize)
        {
            target.fill(0);
        }
    }
}

impl Default for MemoryFilesystem {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryFilesystem {
    /// An empty one, whose root belongs to the calling user.
    #[must_use]
    pub fn new() -> Self {
        let this = Self {
            state: Mutex::default(),
            metrics: Metrics::default(),
            recording: Mutex::new(None),
            panic_in: Mutex::new(None),
            read_only: AtomicBool::new(false),
        };
        let caller = Caller {
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            pid: 0,
            umask: 0,
        };
        {
            let mut state = this.state.lock();
            let content = Content::Directory { names: HashMap::new(), entries: BTreeMap::new(), parent: ROOT };
            Self::add_node(&mut state, &caller, FileType::Directory, 0o755, 0, content);
        }
        this
    }

    /// Starts to write down what arrives.
    pub fn start_recording(&self) {
        *self.recording.lock() = Some(Vec::new());
    }

    /// What arrived since [`Self::start_recording`], which ends here.
    pub fn stop_recording(&self) -> Vec<Seen> {
        self.recording.lock().take().unwrap_or_default()
    }

    /// Lets the next request of this name panic.
    pub fn panic_in(&self, operation: &'static str) {
        *self.panic_in.lock() = Some(operation);
    }

    /// Whether a panic has latched it read-only.
    pub fn is_latched(&self) -> bool {
        self.read_only.load(Ordering::Relaxed)
    }

    /// Sum of the lookups that the kernel has not given back, the root's aside.
    pub fn lookups_outstanding(&self) -> u64 {
        self.state.lock().nodes.iter().filter(|&(&node, _)| node != ROOT).map(|(_, node)| node.lookups).sum()
    }

    fn enter(&self, operation: &'static str) -> MutexGuard<'_, State> {
        self.enter_with(operation, 0, 0)
    }

    fn enter_with(&self, operation: &'static str, detail: u64, length_bytes: u64) -> MutexGuard<'_, State> {
        let seen = Seen { operation, detail, length_bytes, direct: false, from_page_cache: false, clear_set_id: false };
        self.enter_seen(seen)
    }

    fn enter_seen(&self, seen: Seen) -> MutexGuard<'_, State> {
        let operation = seen.operation;
        if let Some(recording) = self.recording.lock().as_mut() {
            recording.push(seen);
        }
        if self.panic_in.lock().take_if(|name| *name == operation).is_some() {
            panic!("asked to panic in {operation}");
        }
        self.state.lock()
    }

    fn check_writable(&self) -> Result<()> {
        if self.is_latched() { Err(Errno::ROFS.into()) } else { Ok(()) }
    }

    fn add_node(
        state: &mut State,
        caller: &Caller,
        file_type: FileType,
        mode: u32,
        device_number: u32,
        content: Content,
    ) -> u64 {
        state.newest_node += 1;
        let number = state.newest_node;
        let now = now();
        let attributes = Attributes {
            node: number,
            size_bytes: if let Content::Symlink(target) = &content { target.len() as u64 } else { 0 },
            blocks_of_512: 0,
            access_time: now,
            modification_time: now,
            change_time: now,
            file_type,
            permissions: (mode & 0o7777 & !caller.umask) as u16,
            link_count: if file_type == FileType::Directory { 2 } else { 1 },
            uid: caller.uid,
            gid: caller.gid,
            device_number,
            preferred_io_bytes: 4096,
            cacheable: true,
        };
        state.nodes.insert(number, Node { attributes, content, xattrs: BTreeMap::new(), lookups: 0 });
        number
    }

    fn count_lookup(state: &mut State, number: u64) -> Result<Entry> {
        let node = node_mut(state, number)?;
        node.lookups += 1;
        Ok(Entry { attributes: node.attributes, generation: 0 })
    }

    fn make(
        &self,
        state: &mut State,
        caller: &Caller,
        parent: u64,
        name: &OsStr,
        file_type: FileType,
        mode: u32,
        device_number: u32,
        content: Content,
    ) -> Result<Entry> {
        self.check_writable()?;
        let child = Self::add_node(state, caller, file_type, mode, device_number, content);
        if let Err(error) = insert_name(state, parent, name, child) {
            state.nodes.remove(&child);
            return Err(error);
        }
        if file_type == FileType::Directory {
            node_mut(state, parent)?.attributes.link_count += 1;
        }
        Self::count_lookup(state, child)
    }

    fn open_handle(state: &mut State) -> Opened {
        state.newest_handle += 1;
        Opened { handle: state.newest_handle }
    }

    fn list(
        state: &State,
        number: u64,
        cookie: u64,
        emit: &mut dyn FnMut(&State, &DirectoryEntry<'_>) -> Emitted,
    ) -> Result<()> {
        let Content::Directory { entries, parent, .. } = &node(state, number)?.content else {
            return Err(Errno::NOTDIR.into());
        };
        let dots = [(1, OsStr::new("."), number), (2, OsStr::new(".."), *parent)];
        let dots = dots.into_iter().filter(|&(own, ..)| own > cookie);
        let named = entries.range(cookie + 1..).map(|(&own, (name, child))| (own, name.as_os_str(), *child));
        for (next_cookie, name, child) in dots.chain(named) {
            let Ok(found) = node(state, child) else { continue };
            let file_type = found.attributes.file_type;
            if emit(state, &DirectoryEntry { node: child, file_type, name, next_cookie }) == Emitted::Full {
                break;
            }
        }
        Ok(())
    }
}

fn blocks_mut(node: &mut Node) -> Result<&mut BTreeMap<u64, StdArc<Vec<u8>>>> {
    match &mut node.content {
        Content::File(blocks) => Ok(blocks),
        Content::Directory { .. } => Err(Errno::ISDIR.into()),
        _ => Err(Errno::INVAL.into()),
    }
}

fn after_change(node: &mut Node, size: u64) -> Result<()> {
    node.attributes.blocks_of_512 = blocks_mut(node)?.len() as u64 * (BLOCK_BYTES / 512);
    node.attributes.size_bytes = size;
    touch(node, true);
    Ok(())
}

impl Operations for MemoryFilesystem {
    type Pages = MemoryPages;

    fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    fn request_panicked(&self, _: &'static str, _: &str) {
        self.metrics.vfs_panics.increment();
        self.read_only.store(true, Ordering::Relaxed);
    }

    fn lookup(&self, _: &Caller, parent: u64, name: &OsStr) -> Result<Lookup> {
        let mut state = self.enter("lookup");
        match find(&state, parent, name)? {
            Some(child) => Ok(Lookup::Found(Self::count_lookup(&mut state, child)?)),
            None if name.len() > NAME_BYTES_MAX => Err(Errno::NAMETOOLONG.into()),
            None => Ok(Lookup::Absent),
        }
    }

    fn forget(&self, number: u64, lookups: u64) {
        let mut state = self.enter_with("forget", lookups, 0);
        if let Ok(node) = node_mut(&mut state, number) {
            assert!(number == ROOT || node.lookups >= lookups, "more lookups given back than were counted");
            node.lookups = node.lookups.saturating_sub(lookups);
        }
    }

    fn get_attributes(&self, _: &Caller, number: u64, _: Option<u64>) -> Result<Attributes> {
        Ok(node(&self.enter("getattr"), number)?.attributes)
    }

    fn set_attributes(&self, caller: &Caller, number: u64, changes: &SetAttributes) -> Result<Attributes> {
        let mut state = self.enter("setattr");
        self.check_writable()?;
        let node = node_mut(&mut state, number)?;
        if let Some(size) = changes.size_bytes {
            zero_blocks(blocks_mut(node)?, size, u64::MAX / BLOCK_BYTES * BLOCK_BYTES);
            after_change(node, size)?;
            if caller.uid != 0 {
                node.attributes.permissions &= !0o6000;
            }
        }
        if let Some(mode) = changes.mode {
            node.attributes.permissions = (mode & 0o7777) as u16;
        }
        if changes.uid.is_some() || changes.gid.is_some() {
            if !is_directory(node) {
                node.attributes.permissions &= !0o6000;
            }
            node.attributes.uid = changes.uid.unwrap_or(node.attributes.uid);
            node.attributes.gid = changes.gid.unwrap_or(node.attributes.gid);
        }
        let time = |change: Option<SetTime>, old| match change {
            Some(SetTime::To(time)) => time,
            Some(SetTime::Now) => now(),
            None => old,
        };
        node.attributes.access_time = time(changes.access_time, node.attributes.access_time);
        node.attributes.modification_time = time(changes.modification_time, node.attributes.modification_time);
        touch(node, false);
        Ok(node.attributes)
    }

    fn readlink(&self, _: &Caller, number: u64) -> Result<Vec<u8>> {
        match &node(&self.enter("readlink"), number)?.content {
            Content::Symlink(target) => Ok(target.clone()),
            _ => Err(Errno::INVAL.into()),
        }
    }

    fn mknod(&self, caller: &Caller, parent: u64, name: &OsStr, mode: u32, device_number: u32) -> Result<Entry> {
        let mut state = self.enter_with("mknod", mode.into(), 0);
        let file_type = FileType::from_mode(mode).ok_or(Errno::INVAL)?;
        let content = if file_type == FileType::Regular { Content::File(BTreeMap::new()) } else { Content::Special };
        self.make(&mut state, caller, parent, name, file_type, mode, device_number, content)
    }

    fn mkdir(&self, caller: &Caller, parent: u64, name: &OsStr, mode: u32) -> Result<Entry> {
        let mut state = self.enter_with("mkdir", mode.into(), 0);
        let content = Content::Directory { names: HashMap::new(), entries: BTreeMap::new(), parent };
        self.make(&mut state, caller, parent, name, FileType::Directory, mode, 0, content)
    }

    fn symlink(&self, caller: &Caller, parent: u64, name: &OsStr, target: &[u8]) -> Result<Entry> {
        let mut state = self.enter("symlink");
        let content = Content::Symlink(target.to_vec());
        self.make(&mut state, caller, parent, name, FileType::Symlink, 0o777, 0, content)
    }

    fn link(&self, _: &Caller, number: u64, parent: u64, name: &OsStr) -> Result<Entry> {
        let mut state = self.enter("link");
        self.check_writable()?;
        insert_name(&mut state, parent, name, number)?;
        let node = node_mut(&mut state, number)?;
        node.attributes.link_count += 1;
        touch(node, false);
        Self::count_lookup(&mut state, number)
    }

    fn unlink(&self, _: &Caller, parent: u64, name: &OsStr) -> Result<()> {
        let mut state = self.enter("unlink");
        self.check_writable()?;
        let child = remove_name(&mut state, parent, name)?;
        drop_link(&mut state, child)
    }

    fn rmdir(&self, _: &Caller, parent: u64, name: &OsStr) -> Result<()> {
        let mut state = self.enter("rmdir");
        self.check_writable()?;
        let child = find(&state, parent, name)?.ok_or(Errno::NOENT)?;
        match node(&state, child)? {
            found if !is_directory(found) => return Err(Errno::NOTDIR.into()),
            found if !is_empty_directory(found) => return Err(Errno::NOTEMPTY.into()),
            _ => {}
        }
        remove_name(&mut state, parent, name)?;
        node_mut(&mut state, parent)?.attributes.link_count -= 1;
        drop_link(&mut state, child)
    }

    fn rename(
        &self,
        _: &Caller,
        parent: u64,
        name: &OsStr,
        new_parent: u64,
        new_name: &OsStr,
        flags: u32,
    ) -> Result<()> {
        let mut state = self.enter_with("rename", flags.into(), 0);
        self.check_writable()?;
        let child = find(&state, parent, name)?.ok_or(Errno::NOENT)?;
        let replaced = find(&state, new_parent, new_name)?;
        let moves_directory = is_directory(node(&state, child)?);
        match (flags, replaced) {
            (0 | 1, None) => {}
            (1, Some(_)) => return Err(Errno::EXIST.into()),
            (0, Some(replaced)) if replaced == child => return Ok(()),
            (0, Some(replaced)) => {
                match (moves_directory, node(&state, replaced)?) {
                    (true, found) if !is_directory(found) => return Err(Errno::NOTDIR.into()),
                    (true, found) if !is_empty_directory(found) => return Err(Errno::NOTEMPTY.into()),
                    (false, found) if is_directory(found) => return Err(Errno::ISDIR.into()),
                    _ => {}
                }
                remove_name(&mut state, new_parent, new_name)?;
                drop_link(&mut state, replaced)?;
            }
            (2, Some(other)) => {
                remove_name(&mut state, parent, name)?;
                remove_name(&mut state, new_parent, new_name)?;
                insert_name(&mut state, parent, name, other)?;
                return insert_name(&mut state, new_parent, new_name, child);
            }
            (2, None) => return Err(Errno::NOENT.into()),
            _ => return Err(Errno::INVAL.into()),
        }
        remove_name(&mut state, parent, name)?;
        insert_name(&mut state, new_parent, new_name, child)?;
        touch(node_mut(&mut state, child)?, false);
        if let Content::Directory { parent: above, .. } = &mut node_mut(&mut state, child)?.content {
            *above = new_parent;
            node_mut(&mut state, parent)?.attributes.link_count -= 1;
            node_mut(&mut state, new_parent)?.attributes.link_count += 1;
        }
        Ok(())
    }

    fn open(&self, _: &Caller, number: u64, flags: i32) -> Result<Opened> {
        let mut state = self.enter_with("open", flags as u32 as u64, 0);
        node(&state, number)?;
        Ok(Self::open_handle(&mut state))
    }

    fn create(&self, caller: &Caller, parent: u64, name: &OsStr, mode: u32, flags: i32) -> Result<(Entry, Opened)> {
        let mut state = self.enter_with("create", flags as u32 as u64, 0);
        let content = Content::File(BTreeMap::new());
        let entry = self.make(&mut state, caller, parent, name, FileType::Regular, mode, 0, content)?;
        Ok((entry, Self::open_handle(&mut state)))
    }

    fn read(&self, _: &Caller, request: &ReadRequest) -> Result<MemoryPages> {
        let state = self.enter_seen(Seen {
            operation: "read",
            detail: request.offset,
            length_bytes: request.length_bytes.into(),
            direct: request.direct,
            from_page_cache: false,
            clear_set_id: false,
        });
        let node = node(&state, request.node)?;
        let Content::File(blocks) = &node.content else { return Err(Errno::ISDIR.into()) };
        let size = node.attributes.size_bytes;
        Ok(MemoryPages(read_blocks(blocks, size, request.offset, request.length_bytes.into())))
    }

    fn read_some(&self, caller: &Caller, request: &ReadRequest) -> Result<MemoryPages> {
        self.read(caller, request)
    }

    fn may_be_dirty_in_kernel(&self, _: u64) -> bool {
        false
    }

    fn landing_bytes_max(&self) -> u64 {
        0
    }

    fn hold_landing_reserve(&self, _: u64) {}

    fn write(&self, _: &Caller, request: &WriteRequest<'_>) -> Result<u32> {
        let mut state = self.enter_seen(Seen {
            operation: "write",
            detail: request.offset,
            length_bytes: request.data.len() as u64,
            direct: request.direct,
            from_page_cache: request.from_page_cache,
            clear_set_id: request.clear_set_id,
        });
        self.check_writable()?;
        let node = node_mut(&mut state, request.node)?;
        let offset = if request.append { node.attributes.size_bytes } else { request.offset };
        write_blocks(blocks_mut(node)?, offset, request.data);
        let size = node.attributes.size_bytes.max(offset + request.data.len() as u64);
        after_change(node, size)?;
        if request.clear_set_id {
            node.attributes.permissions &= !0o6000;
        }
        u32::try_from(request.data.len()).map_err(|_| Errno::INVAL.into())
    }

    fn flush(&self, _: &Caller, _: u64, _: u64) -> Result<()> {
        drop(self.enter("flush"));
        Ok(())
    }

    fn release(&self, _: u64, _: u64) -> Result<()> {
        drop(self.enter("release"));
        Ok(())
    }

    fn fsync(&self, _: &Caller, _: u64, _: u64, data_only: bool) -> Result<()> {
        drop(self.enter_with("fsync", data_only.into(), 0));
        Ok(())
    }

    fn opendir(&self, _: &Caller, number: u64, _: i32) -> Result<Opened> {
        let mut state = self.enter("opendir");
        node(&state, number)?;
        Ok(Self::open_handle(&mut state))
    }

    fn readdir(
        &self,
        _: &Caller,
        number: u64,
        _: u64,
        cookie: u64,
        emit: &mut dyn FnMut(&DirectoryEntry<'_>) -> Emitted,
    ) -> Result<()> {
        let state = self.enter("readdir");
        Self::list(&state, number, cookie, &mut |_, entry| emit(entry))
    }

    fn readdirplus(
        &self,
        _: &Caller,
        number: u64,
        _: u64,
        cookie: u64,
        emit: &mut dyn FnMut(&DirectoryEntry<'_>, Option<&Entry>) -> Emitted,
    ) -> Result<()> {
        let mut state = self.enter("readdirplus");
        let mut accepted = Vec::new();
        Self::list(&state, number, cookie, &mut |state, entry| {
            // Stands for an inode that cannot be read.
            let damaged = entry.name.as_bytes().starts_with(b"damaged");
            let found = node(state, entry.node).ok().filter(|_| !damaged);
            let found = found.map(|node| Entry { attributes: node.attributes, generation: 0 });
            let emitted = emit(entry, found.as_ref());
            if emitted == Emitted::Accepted && found.is_some() && entry.next_cookie > 2 {
                accepted.push(entry.node);
            }
            emitted
        })?;
        for number in accepted {
            Self::count_lookup(&mut state, number)?;
        }
        Ok(())
    }

    fn releasedir(&self, _: u64, _: u64) -> Result<()> {
        drop(self.enter("releasedir"));
        Ok(())
    }

    fn fsyncdir(&self, _: &Caller, _: u64, _: u64, data_only: bool) -> Result<()> {
        drop(self.enter_with("fsyncdir", data_only.into(), 0));
        Ok(())
    }

    fn statistics(&self) -> Result<Statistics> {
        drop(self.enter("statfs"));
        Ok(Statistics {
            block_bytes: 4096,
            blocks: 1 << 20,
            blocks_free: 1 << 19,
            blocks_available: 1 << 18,
            files: 1000,
            files_free: 500,
            name_bytes_max: NAME_BYTES_MAX as u32,
        })
    }

    fn set_xattr(&self, _: &Caller, number: u64, name: &OsStr, value: &[u8], flags: i32) -> Result<()> {
        let mut state = self.enter_with("setxattr", flags as u32 as u64, value.len() as u64);
        self.check_writable()?;
        let node = node_mut(&mut state, number)?;
        match (flags, node.xattrs.contains_key(name)) {
            (1, true) => Err(Errno::EXIST.into()),
            (2, false) => Err(Errno::NODATA.into()),
            _ => {
                node.xattrs.insert(name.to_owned(), value.to_vec());
                Ok(())
            }
        }
    }

    fn get_xattr(&self, _: &Caller, number: u64, name: &OsStr) -> Result<Vec<u8>> {
        let kind = match name.as_bytes() {
            b"security.capability" => 1,
            b"system.posix_acl_access" | b"system.posix_acl_default" => 2,
            _ => 0,
        };
        let state = self.enter_with("getxattr", kind, 0);
        node(&state, number)?.xattrs.get(name).cloned().ok_or(Errno::NODATA.into())
    }

    fn list_xattrs(&self, _: &Caller, number: u64) -> Result<Vec<u8>> {
        let state = self.enter("listxattr");
        let mut names = Vec::new();
        for name in node(&state, number)?.xattrs.keys() {
            names.extend_from_slice(name.as_bytes());
            names.push(0);
        }
        Ok(names)
    }

    fn remove_xattr(&self, _: &Caller, number: u64, name: &OsStr) -> Result<()> {
        let mut state = self.enter("removexattr");
        node_mut(&mut state, number)?.xattrs.remove(name).map(drop).ok_or(Errno::NODATA.into())
    }

    fn fallocate(&self, _: &Caller, number: u64, _: u64, offset: u64, length: u64, mode: i32) -> Result<()> {
        let mut state = self.enter_with("fallocate", mode as u32 as u64, length);
        self.check_writable()?;
        let node = node_mut(&mut state, number)?;
        let end = offset.saturating_add(length);
        let keep_size = mode & libc::FALLOC_FL_KEEP_SIZE != 0;
        match mode & !libc::FALLOC_FL_KEEP_SIZE {
            0 => {
                for index in offset / BLOCK_BYTES..end.div_ceil(BLOCK_BYTES).min(1 << 14) {
                    let new = || StdArc::new(vec![0; BLOCK_BYTES as usize]);
                    blocks_mut(node)?.entry(index).or_insert_with(new);
                }
            }
            libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE => zero_blocks(blocks_mut(node)?, offset, end),
            _ => return Err(Errno::OPNOTSUPP.into()),
        }
        let size = node.attributes.size_bytes;
        after_change(node, if keep_size { size } else { size.max(end) })
    }

    fn seek(&self, _: &Caller, number: u64, _: u64, offset: u64, what: Seek) -> Result<u64> {
        let state = self.enter_with("lseek", (what == Seek::Hole).into(), 0);
        let node = node(&state, number)?;
        let Content::File(blocks) = &node.content else { return Err(Errno::INVAL.into()) };
        let size = node.attributes.size_bytes;
        let mut position = offset;
        while position < size {
            if blocks.contains_key(&(position / BLOCK_BYTES)) == (what == Seek::Data) {
                return Ok(position);
            }
            position = (position / BLOCK_BYTES + 1) * BLOCK_BYTES;
        }
        if offset < size && what == Seek::Hole { Ok(size) } else { Err(Errno::NXIO.into()) }
    }

    fn copy_file_range(&self, _: &Caller, request: &CopyRequest) -> Result<u64> {
        let mut state = self.enter_with("copy_file_range", 0, request.length_bytes);
        self.check_writable()?;
        let source = node(&state, request.source_node)?;
        let Content::File(blocks) = &source.content else { return Err(Errno::INVAL.into()) };
        let size = source.attributes.size_bytes;
        let pages = MemoryPages(read_blocks(blocks, size, request.source_offset, request.length_bytes));
        let target = node_mut(&mut state, request.target_node)?;
        let mut offset = request.target_offset;
        for bytes in pages.slices() {
            write_blocks(blocks_mut(target)?, offset, bytes);
            offset += bytes.len() as u64;
        }
        let size = target.attributes.size_bytes.max(offset);
        after_change(target, size)?;
        Ok(offset - request.target_offset)
    }

    fn ioctl(&self, _: &Caller, request: &IoctlRequest<'_>) -> Result<IoctlReply> {
        let detail = u64::from(request.command) | u64::from(request.directory) << 32;
        drop(self.enter_with("ioctl", detail, request.input.len() as u64));
        match request.command {
            // The kernel asks for 4 bytes, whatever the number of the command says.
            GET_FLAGS => Ok(IoctlReply { result: 0, output: vec![0; 4] }),
            SHUTDOWN | SHUTDOWN_WITH_ARGUMENT => Ok(IoctlReply::default()),
            _ => Err(Errno::NOTTY.into()),
        }
    }
}
