//! coppice itself as a [`Subject`] of the crash tests: the whole filesystem in this process, on a simulated device.
//!
//! Everything runs on the calling thread: [`Env::simulated`] steps the workers, at moments that the seed picks. Operations go through the
//! [`Vfs`], as requests of the kernel would; what the kernel itself refuses (writing to a directory) is refused here.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use coppicefs::device::{BlockDevice, SimDevice};
use coppicefs::env::Env;
use coppicefs::filesystem::format::test_geometry;
use coppicefs::filesystem::{Filesystem, FormatOptions, OpenOptions, WorkerSet};
use coppicefs::format::checksum::{ChecksumKind, CompressionKind};
use coppicefs::format::namespace::FileType;
use coppicefs::options::AccessTimes;
use coppicefs::space::TestSwitches;
use coppicefs::vfs::{Attributes, Caller, Emitted, Lookup, ReadRequest, SetAttributes, Vfs, WriteRequest};
use coppicefs::{Error, Result};
use rustix::io::Errno;

use crate::crash::{Mounted, Subject};
use crate::operation::{Operation, Way, content};
use crate::tree::{Entry, Kind, Tree};

const ROOT: u64 = 1;
const CALLER: Caller = Caller { uid: 0, gid: 0, pid: 1, umask: 0 };
const READ_WRITE: i32 = 2;
const EXCHANGE: u32 = 2;
const KEEP_SIZE: i32 = 1;
const KEEP_SIZE_AND_PUNCH_HOLE: i32 = 3;
const ZERO_RANGE: i32 = 16;
const FIFO_BITS: u32 = 0o010_000;
/// Bytes of one write request, as the kernel cuts them.
const WRITE_BYTES_MAX: usize = 128 << 10;

/// How the filesystem under test is made and opened.
#[derive(Clone, Debug)]
pub struct Coppice {
    /// Sizes.
    pub format: FormatOptions,
    /// Every operation is durable when it returns: `commit=0`.
    pub commit_at_once: bool,
    /// Deliberate faults.
    pub switches: TestSwitches,
    /// Budget of page cache and node cache, in bytes.
    pub cache_bytes: u64,
    /// Largest record of the journal, in bytes.
    pub record_bytes_max: u32,
    /// The filesystem's counters, summed over all mounts so far: what was exercised.
    pub counters: Arc<Mutex<BTreeMap<&'static str, u64>>>,
}

impl Coppice {
    /// The sum of a counter over all mounts so far.
    #[must_use]
    pub fn counter(&self, name: &str) -> u64 {
        self.counters.lock().unwrap_or_else(PoisonError::into_inner).get(name).copied().unwrap_or(0)
    }
}

impl Default for Coppice {
    fn default() -> Self {
        let mut format = test_geometry();
        // Small, so that the ring wraps and recovery reads little.
        format.journal_bytes = 256 << 10;
        Self {
            format,
            commit_at_once: false,
            switches: TestSwitches::default(),
            cache_bytes: 8 << 20,
            record_bytes_max: 1 << 20,
            counters: Arc::default(),
        }
    }
}

impl Coppice {
    fn options(&self, env: &Arc<Env>) -> OpenOptions {
        OpenOptions {
            cache_bytes: self.cache_bytes,
            record_bytes_max: self.record_bytes_max,
            access_times: AccessTimes::Never,
            env: Some(Arc::clone(env)),
            switches: self.switches,
            commit_interval: if self.commit_at_once { Duration::ZERO } else { OpenOptions::default().commit_interval },
            writeback_age: Duration::from_millis(500),
            ..OpenOptions::default()
        }
    }
}

/// Every build that is broken on purpose: its switch, and the other words of a `coppice-crash` command that shows it within seconds.
pub const BROKEN_BUILDS: [(&str, &str); 10] = [
    ("skip-data-flush", "--workload 'create, write, fsync'"),
    ("reuse-too-early", "--workload 'bucket reuse'"),
    ("drop-journal-record", "--workload 'create, write, fsync'"),
    ("publish-checkpoint-early", "--workload 'create, write, fsync'"),
    // Only a device that loses an acknowledged write of the log tells: DESIGN.md says why.
    ("skip-known-flushed", "--switch reuse-first --workload 'bucket reuse' --lost-writes 3"),
    // A cut between the records of one batch, then one during the recovery, before the next batch has overwritten what the first left.
    ("break-chain", "--record-bytes 4096 --workload 'batches of records' --recovery-one-in 1"),
    ("skip-recovery-flush", "--workload 'create, write, fsync' --kill-one-in 2 --after-kill 4"),
    ("reuse-after-one-flush", "--switch reuse-first --workload 'bucket reuse' --lost-writes 3"),
    ("parents-first", "--workload 'many names' --workload compaction --plans 1"),
    ("triggers-in-replay", "--workload 'create, write, fsync'"),
];

/// Every switch of tests, by the name that `coppice-crash --switch` takes, and whether it is on: [`BROKEN_BUILDS`], and `reuse-first`, which breaks nothing.
#[must_use]
pub fn switch_names(switches: &TestSwitches) -> Vec<(&'static str, bool)> {
    vec![
        ("skip-data-flush", switches.skip_data_flush),
        ("reuse-too-early", switches.reuse_too_early),
        ("drop-journal-record", switches.drop_journal_record),
        ("publish-checkpoint-early", switches.publish_checkpoint_early),
        ("skip-known-flushed", switches.skip_known_flushed),
        ("break-chain", switches.break_chain),
        ("skip-recovery-flush", switches.skip_recovery_flush),
        ("reuse-after-one-flush", switches.reuse_after_one_flush),
        ("parents-first", switches.parents_first),
        ("triggers-in-replay", switches.triggers_in_replay),
        ("reuse-first", switches.reuse_first),
    ]
}

/// Turns a switch on by its name. Returns whether there is one.
pub fn turn_on(switches: &mut TestSwitches, name: &str) -> bool {
    let switch = match name {
        "skip-data-flush" => &mut switches.skip_data_flush,
        "reuse-too-early" => &mut switches.reuse_too_early,
        "drop-journal-record" => &mut switches.drop_journal_record,
        "publish-checkpoint-early" => &mut switches.publish_checkpoint_early,
        "skip-known-flushed" => &mut switches.skip_known_flushed,
        "break-chain" => &mut switches.break_chain,
        "skip-recovery-flush" => &mut switches.skip_recovery_flush,
        "reuse-after-one-flush" => &mut switches.reuse_after_one_flush,
        "parents-first" => &mut switches.parents_first,
        "triggers-in-replay" => &mut switches.triggers_in_replay,
        "reuse-first" => &mut switches.reuse_first,
        _ => return false,
    };
    *switch = true;
    true
}

/// Kinds of compression, as the superblock stores them, by name.
pub const COMPRESSIONS: [(&str, CompressionKind); 3] =
    [("none", CompressionKind::None), ("lz4", CompressionKind::Lz4), ("zstd", CompressionKind::Zstd)];
/// Kinds of checksum, as the superblock stores them, by name.
pub const CHECKSUMS: [(&str, ChecksumKind); 3] =
    [("none", ChecksumKind::None), ("crc32c", ChecksumKind::Crc32c), ("xxh3", ChecksumKind::Xxh3)];

fn compression_name(stored: u8) -> &'static str {
    COMPRESSIONS.iter().find(|(_, kind)| *kind as u8 == stored).map_or("none", |(name, _)| name)
}

fn checksum_name(stored: u8) -> &'static str {
    CHECKSUMS.iter().find(|(_, kind)| *kind as u8 == stored).map_or("none", |(name, _)| name)
}

impl Subject for Coppice {
    fn format(&self, device: &Arc<SimDevice>) -> Result<()> {
        let device: Arc<dyn BlockDevice> = Arc::clone(device) as _;
        Filesystem::format(&device, &self.format, &Env::simulated(1)).map(|_| ())
    }

    fn mount(&self, device: &Arc<SimDevice>, seed: u64) -> Result<Box<dyn Mounted>> {
        let env = Env::simulated(seed);
        let filesystem = Filesystem::open(vec![Arc::clone(device) as _], &self.options(&env))?;
        let counters = Arc::clone(&self.counters);
        Ok(Box::new(MountedCoppice { filesystem, env, held: Vec::new(), counters, bytes_done: Cell::new(0) }))
    }

    fn is_durable_at_once(&self) -> bool {
        self.commit_at_once
    }

    fn log_ranges(&self, device: &Arc<SimDevice>) -> Result<Vec<Range<u64>>> {
        let superblock = coppicefs::recovery::superblock::read(&**device)?.superblock;
        let bucket_bytes = u64::from(superblock.geometry.bucket_bytes);
        let ranges = superblock.layout.journal.iter();
        Ok(ranges.map(|range| range.first * bucket_bytes..(range.first + range.count) * bucket_bytes).collect())
    }

    fn arguments(&self) -> String {
        let mut arguments = Vec::new();
        if self.commit_at_once {
            arguments.push("--commit-at-once".to_owned());
        }
        let standard = Self::default();
        if self.cache_bytes != standard.cache_bytes {
            arguments.push(format!("--cache-bytes {}", self.cache_bytes));
        }
        if self.record_bytes_max != standard.record_bytes_max {
            arguments.push(format!("--record-bytes {}", self.record_bytes_max));
        }
        for (name, on) in switch_names(&self.switches) {
            if on {
                arguments.push(format!("--switch {name}"));
            }
        }
        let stored = &self.format.defaults;
        if stored.compression != standard.format.defaults.compression {
            arguments.push(format!("--compression {}", compression_name(stored.compression)));
        }
        if stored.checksum != standard.format.defaults.checksum {
            arguments.push(format!("--checksum {}", checksum_name(stored.checksum)));
        }
        arguments.join(" ")
    }

    fn check(&self, device: &Arc<SimDevice>) -> Result<Vec<String>> {
        let env = Env::simulated(1);
        let options =
            OpenOptions { read_only: true, workers: WorkerSet::Essential, for_repair: true, ..self.options(&env) };
        let filesystem = Filesystem::open(vec![Arc::clone(device) as _], &options)?;
        let report = coppicefs_fsck::check(&filesystem, &|_, _, _, _| {})?;
        filesystem.close()?;
        Ok(report.problems.iter().map(|problem| format!("{}: {}", problem.id(), problem.describe())).collect())
    }
}

/// A mounted coppice. Dropped without `unmount`, it has crashed.
struct MountedCoppice {
    filesystem: Arc<Filesystem>,
    env: Arc<Env>,
    /// Node and handle of the files that are kept open.
    held: Vec<(u64, u64)>,
    counters: Arc<Mutex<BTreeMap<&'static str, u64>>>,
    /// Of the newest write.
    bytes_done: Cell<u64>,
}

impl Drop for MountedCoppice {
    fn drop(&mut self) {
        // The workers hold the filesystem, and the scheduler holds them.
        self.env.unregister_all();
        let mut counters = self.counters.lock().unwrap_or_else(PoisonError::into_inner);
        for (name, value) in self.filesystem.metrics().snapshot() {
            *counters.entry(name).or_default() += value;
        }
    }
}

/// A node with the lookup that was counted for it, which is given back at the end.
struct Found<'a> {
    vfs: &'a Vfs,
    attributes: Attributes,
    is_counted: bool,
}

impl Found<'_> {
    fn node(&self) -> u64 {
        self.attributes.node
    }
}

impl Drop for Found<'_> {
    fn drop(&mut self) {
        if self.is_counted {
            self.vfs.forget(self.attributes.node, 1);
        }
    }
}

/// An open file, closed at the end.
struct Open<'a> {
    vfs: &'a Vfs,
    node: u64,
    handle: u64,
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        // Fails only for a handle that does not exist.
        let _ = self.vfs.release(self.node, self.handle);
    }
}

fn split(path: &str) -> Result<(&str, &OsStr)> {
    match path.rsplit_once('/') {
        Some((_, "")) | None => Err(Errno::BUSY.into()),
        Some(("", name)) => Ok(("/", OsStr::new(name))),
        Some((folder, name)) => Ok((folder, OsStr::new(name))),
    }
}

impl MountedCoppice {
    fn vfs(&self) -> &Vfs {
        self.filesystem.vfs()
    }

    fn find(&self, path: &str) -> Result<Found<'_>> {
        let vfs = self.vfs();
        let mut at = Found { vfs, attributes: vfs.get_attributes(&CALLER, ROOT, None)?, is_counted: false };
        for name in path.split('/').filter(|name| !name.is_empty()) {
            match vfs.lookup(&CALLER, at.node(), OsStr::new(name))? {
                Lookup::Found(entry) => at = Found { vfs, attributes: entry.attributes, is_counted: true },
                Lookup::Absent => return Err(Errno::NOENT.into()),
            }
        }
        Ok(at)
    }

    fn folder<'a>(&self, path: &'a str) -> Result<(Found<'_>, &'a OsStr)> {
        let (folder, name) = split(path)?;
        let folder = self.find(folder)?;
        match folder.attributes.file_type {
            FileType::Directory => Ok((folder, name)),
            _ => Err(Errno::NOTDIR.into()),
        }
    }

    fn open<'a>(&'a self, found: &Found<'_>) -> Result<Open<'a>> {
        match found.attributes.file_type {
            FileType::Regular => {}
            FileType::Directory => return Err(Errno::ISDIR.into()),
            _ => return Err(Errno::LOOP.into()),
        }
        let opened = self.vfs().open(&CALLER, found.node(), READ_WRITE)?;
        Ok(Open { vfs: self.vfs(), node: found.node(), handle: opened.handle })
    }

    fn forget(&self, node: u64) {
        self.vfs().forget(node, 1);
    }

    fn write(&self, path: &str, offset: u64, data: &[u8], way: Option<Way>) -> Result<()> {
        let found = self.find(path)?;
        let open = self.open(&found)?;
        self.write_through((open.node, open.handle), offset, data, way)
    }

    fn write_through(&self, (node, handle): (u64, u64), offset: u64, data: &[u8], way: Option<Way>) -> Result<()> {
        let mut done = 0;
        self.bytes_done.set(0);
        while let Some(rest) = data.get(done..).filter(|rest| !rest.is_empty()) {
            let request = WriteRequest {
                direct: way.is_some_and(Way::is_direct),
                append: way == Some(Way::Append),
                synchronous: way.is_some_and(Way::is_synchronous),
                ..WriteRequest::new(node, handle, offset + done as u64, &rest[..rest.len().min(WRITE_BYTES_MAX)])
            };
            done += self.vfs().write(&CALLER, &request)? as usize;
            self.bytes_done.set(done as u64);
        }
        Ok(())
    }

    /// Closes all files that were kept open.
    fn release(&mut self) -> Result<()> {
        for (node, handle) in std::mem::take(&mut self.held) {
            self.filesystem.vfs().release(node, handle)?;
            self.filesystem.vfs().forget(node, 1);
        }
        Ok(())
    }

    fn read(&self, found: &Found<'_>) -> Result<Vec<u8>> {
        let open = self.open(found)?;
        let mut bytes = Vec::new();
        loop {
            let request = ReadRequest {
                node: open.node,
                handle: open.handle,
                offset: bytes.len() as u64,
                length_bytes: WRITE_BYTES_MAX as u32,
                direct: false,
            };
            let pages = self.vfs().read(&CALLER, &request)?;
            let before = bytes.len();
            pages.slices().for_each(|slice| bytes.extend_from_slice(slice));
            if bytes.len() == before {
                return Ok(bytes);
            }
        }
    }

    /// Workers step; where none has anything to do, the clock goes on to the next one's deadline.
    fn give_turns(&self, count: u32) -> Result<()> {
        for _ in 0..count {
            if !self.env.step_random_worker()? {
                self.env.advance_clock();
            }
        }
        Ok(())
    }

    /// Background work, and sometimes a checkpoint.
    fn settle(&self) -> Result<()> {
        self.give_turns(24)?;
        if self.env.random_u64().is_multiple_of(2) {
            self.filesystem.checkpoint()?;
        }
        Ok(())
    }

    fn xattrs(&self, node: u64) -> Result<BTreeMap<String, String>> {
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        let names = self.vfs().list_xattrs(&CALLER, node)?;
        let names = names.split(|&byte| byte == 0).filter(|name| !name.is_empty());
        names
            .map(|name| {
                let name = text(name.to_vec());
                let value = self.vfs().get_xattr(&CALLER, node, OsStr::new(&name))?;
                Ok((name, text(value)))
            })
            .collect()
    }

    fn walk(&self, path: &str, tree: &mut Tree) -> Result<()> {
        let found = self.find(path)?;
        let kind = match found.attributes.file_type {
            FileType::Regular => {
                let bytes = self.read(&found)?;
                if bytes.len() as u64 != found.attributes.size_bytes {
                    let problem = format!("{} bytes are read, stat says {}", bytes.len(), found.attributes.size_bytes);
                    return Err(Error::Bug(format!("{path}: {problem}")));
                }
                Kind::File(bytes)
            }
            FileType::Directory => Kind::Directory,
            FileType::Symlink => {
                Kind::SymbolicLink(String::from_utf8_lossy(&self.vfs().readlink(&CALLER, found.node())?).into_owned())
            }
            FileType::Fifo => Kind::Fifo,
            other => return Err(Error::Bug(format!("{path} is a {other:?}"))),
        };
        let is_directory = kind == Kind::Directory;
        let entry = Entry {
            inode: found.node(),
            kind,
            mode: found.attributes.permissions,
            links: found.attributes.link_count,
            xattrs: self.xattrs(found.node())?,
        };
        tree.insert(path.to_owned(), entry);
        if !is_directory {
            return Ok(());
        }
        let mut names = Vec::new();
        let opened = self.vfs().opendir(&CALLER, found.node(), 0)?;
        let listed = self.vfs().readdir(&CALLER, found.node(), opened.handle, 0, &mut |entry| {
            names.push(entry.name.to_string_lossy().into_owned());
            Emitted::Accepted
        });
        self.vfs().releasedir(found.node(), opened.handle)?;
        listed?;
        for name in names.iter().filter(|name| *name != "." && *name != "..") {
            self.walk(&format!("{}/{name}", path.trim_end_matches('/')), tree)?;
        }
        Ok(())
    }
}

impl Mounted for MountedCoppice {
    fn perform(&mut self, operation: &Operation) -> Result<()> {
        let vfs = self.vfs();
        self.env.maybe_yield(4)?;
        match operation {
            Operation::Create { path, mode } => {
                // The kernel opens what O_EXCL refuses to make; here the refusal is what is asked for.
                let (folder, name) = self.folder_or_exists(path)?;
                if let Lookup::Found(entry) = vfs.lookup(&CALLER, folder.node(), name)? {
                    self.forget(entry.attributes.node);
                    return Err(Errno::EXIST.into());
                }
                let (entry, opened) =
                    vfs.create(&CALLER, folder.node(), name, 0o100_000 | u32::from(*mode), READ_WRITE)?;
                vfs.release(entry.attributes.node, opened.handle)?;
                self.forget(entry.attributes.node);
            }
            Operation::MakeDirectory { path, mode } => {
                let (folder, name) = self.folder_or_exists(path)?;
                let entry = vfs.mkdir(&CALLER, folder.node(), name, u32::from(*mode))?;
                self.forget(entry.attributes.node);
            }
            Operation::MakeFifo { path, mode } => {
                let (folder, name) = self.folder_or_exists(path)?;
                let entry = vfs.mknod(&CALLER, folder.node(), name, FIFO_BITS | u32::from(*mode), 0)?;
                self.forget(entry.attributes.node);
            }
            Operation::OpenTruncated { path } => {
                let found = self.find(path)?;
                // What cannot be opened is refused before anything is changed.
                drop(self.open(&found)?);
                let changes = SetAttributes { size_bytes: Some(0), ..SetAttributes::default() };
                vfs.set_attributes(&CALLER, found.node(), &changes)?;
                drop(self.open(&found)?);
            }
            Operation::SymbolicLink { path, target } => {
                let (folder, name) = self.folder_or_exists(path)?;
                let entry = vfs.symlink(&CALLER, folder.node(), name, target.as_bytes())?;
                self.forget(entry.attributes.node);
            }
            Operation::Link { existing, path } => {
                let found = self.find(existing)?;
                let (folder, name) = self.folder(path)?;
                if found.attributes.file_type == FileType::Directory {
                    if let Lookup::Found(entry) = vfs.lookup(&CALLER, folder.node(), name)? {
                        self.forget(entry.attributes.node);
                        return Err(Errno::EXIST.into());
                    }
                    return Err(Errno::PERM.into());
                }
                let entry = vfs.link(&CALLER, found.node(), folder.node(), name)?;
                self.forget(entry.attributes.node);
            }
            Operation::Unlink { path } => {
                let (folder, name) = self.folder(path)?;
                vfs.unlink(&CALLER, folder.node(), name)?;
            }
            Operation::RemoveDirectory { path } => {
                let (folder, name) = self.folder(path)?;
                vfs.rmdir(&CALLER, folder.node(), name)?;
            }
            Operation::Rename { from, to } | Operation::Exchange { one: from, other: to } => {
                let (folder, name) = self.folder(from)?;
                let (new_folder, new_name) = self.folder(to)?;
                let flags = if matches!(operation, Operation::Exchange { .. }) { EXCHANGE } else { 0 };
                vfs.rename(&CALLER, folder.node(), name, new_folder.node(), new_name, flags)?;
            }
            Operation::Write { path, offset, length, tag } => {
                self.write(path, *offset, &content(*tag, *offset, *length), None)?;
            }
            Operation::WriteAs { path, offset, length, tag, way } => {
                self.write(path, *offset, &content(*tag, *offset, *length), Some(*way))?;
            }
            Operation::WriteUnlinked { offset, length, tag } => {
                let held = self.held.last().copied().ok_or(Errno::BADF)?;
                self.write_through(held, *offset, &content(*tag, *offset, *length), None)?;
            }
            Operation::Hold { path } => {
                let mut found = self.find(path)?;
                let mut open = self.open(&found)?;
                // The handle and the lookup are given back by `release`.
                found.is_counted = false;
                let held = (open.node, std::mem::replace(&mut open.handle, u64::MAX));
                drop((found, open));
                self.held.push(held);
            }
            Operation::Release => self.release()?,
            Operation::Allocate { path, offset, length, keep_size } => {
                let found = self.find(path)?;
                let open = self.open(&found)?;
                vfs.fallocate(&CALLER, found.node(), open.handle, *offset, *length, i32::from(*keep_size))?;
            }
            Operation::Truncate { path, size } => {
                let found = self.find(path)?;
                let open = self.open(&found)?;
                let changes =
                    SetAttributes { size_bytes: Some(*size), handle: Some(open.handle), ..SetAttributes::default() };
                vfs.set_attributes(&CALLER, found.node(), &changes)?;
            }
            Operation::Punch { path, offset, length } => {
                let found = self.find(path)?;
                let open = self.open(&found)?;
                vfs.fallocate(&CALLER, found.node(), open.handle, *offset, *length, KEEP_SIZE_AND_PUNCH_HOLE)?;
            }
            Operation::Zero { path, offset, length, keep_size } => {
                let found = self.find(path)?;
                let open = self.open(&found)?;
                let mode = if *keep_size { ZERO_RANGE | KEEP_SIZE } else { ZERO_RANGE };
                vfs.fallocate(&CALLER, found.node(), open.handle, *offset, *length, mode)?;
            }
            Operation::Collapse { path, offset, length } => {
                let found = self.find(path)?;
                let open = self.open(&found)?;
                vfs.collapse_range(found.node(), open.handle, *offset, *length)?;
            }
            Operation::Insert { path, offset, length } => {
                let found = self.find(path)?;
                let open = self.open(&found)?;
                vfs.insert_range(found.node(), open.handle, *offset, *length)?;
            }
            Operation::ChangeMode { path, mode } => {
                let found = self.find(path)?;
                let changes = SetAttributes { mode: Some(u32::from(*mode)), ..SetAttributes::default() };
                vfs.set_attributes(&CALLER, found.node(), &changes)?;
            }
            Operation::SetXattr { path, name, value } => {
                let found = self.find(path)?;
                vfs.set_xattr(&CALLER, found.node(), OsStr::new(name), value.as_bytes(), 0)?;
            }
            Operation::RemoveXattr { path, name } => {
                let found = self.find(path)?;
                vfs.remove_xattr(&CALLER, found.node(), OsStr::new(name))?;
            }
            Operation::Fsync { path } | Operation::Fdatasync { path } => {
                let data_only = matches!(operation, Operation::Fdatasync { .. });
                let found = self.find(path)?;
                match found.attributes.file_type {
                    FileType::Regular => {
                        let open = self.open(&found)?;
                        vfs.fsync(&CALLER, found.node(), open.handle, data_only)?;
                    }
                    _ => vfs.fsync(&CALLER, found.node(), 0, data_only)?,
                }
            }
            Operation::FsyncDirectory { path } => {
                let found = self.find(path)?;
                let opened = vfs.opendir(&CALLER, found.node(), 0)?;
                let outcome = vfs.fsyncdir(&CALLER, found.node(), opened.handle, false);
                vfs.releasedir(found.node(), opened.handle)?;
                outcome?;
            }
            Operation::Sync => self.filesystem.sync()?,
            Operation::Begin => {}
            Operation::Settle => self.settle()?,
            Operation::Turns { count } => self.give_turns(*count)?,
        }
        Ok(())
    }

    fn bytes_done(&self) -> u64 {
        self.bytes_done.get()
    }

    fn counter(&self, name: &str) -> u64 {
        let counters = self.filesystem.metrics().snapshot();
        counters.iter().find(|(counter, _)| *counter == name).map_or(0, |(_, value)| *value)
    }

    fn tree(&mut self) -> Result<Tree> {
        let mut tree = Tree::new();
        self.walk("/", &mut tree)?;
        Ok(tree)
    }

    fn unmount(mut self: Box<Self>) -> Result<()> {
        self.release()?;
        self.filesystem.close()
    }
}

impl MountedCoppice {
    /// Folder and name of what is to be made. The root is there.
    fn folder_or_exists<'a>(&self, path: &'a str) -> Result<(Found<'_>, &'a OsStr)> {
        if path == "/" { Err(Errno::EXIST.into()) } else { self.folder(path) }
    }
}
