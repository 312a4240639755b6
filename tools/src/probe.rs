//! `coppice probe`: what the running kernel's FUSE does, fact by fact, as far as the filesystem relies on it.
//!
//! Each fact is observed: a real operation on a real mount in a temporary directory, behind which a filesystem in memory writes down
//! what arrives. Facts that need root are left out for an ordinary user.

use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use anyhow::{Context, Result};
use coppicefs::fuse::mounts::{self, MountRequest, Mounted};
use coppicefs::fuse::{MemoryFilesystem, Negotiated, Seen, Session, SessionSettings, client};
use coppicefs::options::CacheMode;
use rustix::fs::{AtFlags, CWD, FallocateFlags, Mode, OFlags, RenameFlags, SeekFrom, StatxFlags, Timespec, Timestamps};
use rustix::io::Errno;
use rustix::mount::MountFlags;
use serde::Serialize;

/// One fact.
#[derive(Clone, Debug, Serialize)]
pub struct Fact {
    /// What it is about.
    pub topic: &'static str,
    /// The statement that the design relies on.
    pub statement: &'static str,
    /// Whether it holds here.
    pub holds: bool,
    /// What was seen.
    pub observed: String,
}

/// All facts, in the order in which they were observed.
#[derive(Debug, Default)]
struct Facts(Vec<Fact>);

impl Facts {
    fn add(&mut self, topic: &'static str, statement: &'static str, holds: bool, observed: impl Into<String>) {
        self.0.push(Fact { topic, statement, holds, observed: observed.into() });
    }
}

/// Observes all facts and prints them, as a table or as JSON.
///
/// # Errors
/// If nothing can be mounted, or a step that no fact is about fails.
pub fn run(json: bool) -> Result<()> {
    let facts = observe()?;
    if json {
        return crate::output::json(&facts);
    }
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING).set_header(["topic", "holds", "fact", "observed"]);
    table.set_content_arrangement(comfy_table::ContentArrangement::Dynamic);
    for fact in &facts {
        table.add_row([fact.topic, if fact.holds { "yes" } else { "NO" }, fact.statement, &fact.observed]);
    }
    say!("{table}");
    let differing = facts.iter().filter(|fact| !fact.holds).count();
    say!("\n{} facts, {differing} of them not as the design relies on.", facts.len());
    Ok(())
}

/// Observes all facts.
///
/// # Errors
/// If nothing can be mounted, or a step that no fact is about fails.
pub fn observe() -> Result<Vec<Fact>> {
    let mut facts = Facts::default();
    let mount = Mount::new(CacheMode::Kernel)?;
    session(&mut facts, &mount)?;
    names(&mut facts, &mount)?;
    attributes(&mut facts, &mount)?;
    cached_data(&mut facts, &mount)?;
    direct_data(&mut facts, &mount)?;
    space(&mut facts, &mount)?;
    durability(&mut facts, &mount)?;
    refused(&mut facts, &mount)?;
    set_id(&mut facts, &mount)?;
    mount.end(&mut facts)?;
    let mount = Mount::new(CacheMode::Daemon)?;
    daemon_cache(&mut facts, &mount)?;
    let mount = Mount::new(CacheMode::Writeback)?;
    delayed_writes(&mut facts, &mount)?;
    Ok(facts.0)
}

/// A mount to observe, taken away when it is dropped.
struct Mount {
    filesystem: Arc<MemoryFilesystem>,
    directory: tempfile::TempDir,
    mounted: Mounted,
    negotiated: Negotiated,
    server: Option<std::thread::JoinHandle<coppicefs::Result<()>>>,
}

impl Mount {
    fn new(cache: CacheMode) -> Result<Self> {
        let directory = tempfile::tempdir().context("cannot make a temporary directory")?;
        let filesystem = Arc::new(MemoryFilesystem::new());
        let request = MountRequest {
            source: "coppice-probe".into(),
            directory: fs::canonicalize(directory.path())?,
            flags: MountFlags::NODEV | MountFlags::NOSUID,
            allow_other: is_root(),
        };
        let session = Session::mount(Arc::clone(&filesystem), &request, SessionSettings { cache, threads: 4 })?;
        let (mounted, negotiated) = (session.mounted().clone(), session.negotiated());
        let server = Some(std::thread::spawn(move || session.serve()));
        Ok(Self { filesystem, directory, mounted, negotiated, server })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// What arrived during `body`, and what it returned.
    fn watch<T>(&self, body: impl FnOnce() -> T) -> (T, Vec<Seen>) {
        self.filesystem.start_recording();
        let value = body();
        (value, self.filesystem.stop_recording())
    }

    fn end(mut self, facts: &mut Facts) -> Result<()> {
        let unmounted = self.mounted.unmount(false);
        let served = self.server.take().map(std::thread::JoinHandle::join);
        let ended = matches!(served, Some(Ok(Ok(()))));
        let observed = format!("unmount: {}, session: {}", outcome(&unmounted), if ended { "ended" } else { "failed" });
        facts.add("session", "umount(2) ends the session, which reads ENODEV", unmounted.is_ok() && ended, observed);
        Ok(())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if self.server.is_some() {
            let _ = self.mounted.unmount(true);
        }
    }
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn count(seen: &[Seen], operation: &str) -> usize {
    seen.iter().filter(|seen| seen.operation == operation).count()
}

fn lengths(seen: &[Seen], operation: &str) -> Vec<u64> {
    seen.iter().filter(|seen| seen.operation == operation).map(|seen| seen.length_bytes).collect()
}

/// Names of the requests, in order, repetitions counted.
fn trace(seen: &[Seen]) -> String {
    let mut parts: Vec<(&str, usize)> = Vec::new();
    for seen in seen {
        match parts.last_mut() {
            Some((name, times)) if *name == seen.operation => *times += 1,
            _ => parts.push((seen.operation, 1)),
        }
    }
    if parts.is_empty() {
        return "nothing arrives".into();
    }
    let text = parts.iter().map(|(name, times)| if *times > 1 { format!("{name} x{times}") } else { (*name).into() });
    text.collect::<Vec<_>>().join(", ")
}

fn outcome<T, E: std::fmt::Display>(result: &std::result::Result<T, E>) -> String {
    match result {
        Ok(_) => "ok".into(),
        Err(error) => error.to_string(),
    }
}

fn write_file(path: &Path, length: usize) -> Result<File> {
    let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path)?;
    file.write_all(&vec![7; length])?;
    Ok(file)
}

fn session(facts: &mut Facts, mount: &Mount) -> Result<()> {
    let line = mounts::find(mount.mounted.directory())?;
    let how = if is_root() { "mount(2) and Session::from_fd" } else { "fusermount3 and Session::from_fd" };
    let as_asked =
        line.as_ref().is_some_and(|line| line.file_system_type == "fuse.coppice" && line.source == "coppice-probe");
    facts.add("session", "the mount shows type fuse.coppice and the source as given", as_asked, how);
    let (major, minor) = mount.negotiated.protocol;
    facts.add("session", "protocol 7.40 or newer", (major, minor) >= (7, 40), format!("{major}.{minor}"));
    let wanted = [
        "FUSE_ASYNC_READ",
        "FUSE_PARALLEL_DIROPS",
        "FUSE_DO_READDIRPLUS",
        "FUSE_READDIRPLUS_AUTO",
        "FUSE_ASYNC_DIO",
        "FUSE_POSIX_ACL",
        "FUSE_DONT_MASK",
        "FUSE_EXPORT_SUPPORT",
        "FUSE_DIRECT_IO_ALLOW_MMAP",
        "FUSE_CACHE_SYMLINKS",
        "FUSE_EXPLICIT_INVAL_DATA",
        "FUSE_MAX_PAGES",
        "FUSE_HAS_IOCTL_DIR",
        "FUSE_HANDLE_KILLPRIV_V2",
    ];
    let missing: Vec<_> = wanted.into_iter().filter(|name| !mount.negotiated.has(name)).collect();
    let observed =
        if missing.is_empty() { format!("all {}", wanted.len()) } else { format!("missing: {}", missing.join(", ")) };
    facts.add("session", "every capability that is asked for is granted", missing.is_empty(), observed);
    let unused = Negotiated::names(mount.negotiated.offered & !mount.negotiated.granted).join(", ");
    let clean = !mount.negotiated.has("FUSE_OVER_IO_URING") && !mount.negotiated.has("FUSE_WRITEBACK_CACHE");
    facts.add("session", "nothing else is granted", clean, format!("offered and unused: {unused}"));
    let device = OpenOptions::new().read(true).write(true).open("/dev/fuse");
    facts.add("session", "/dev/fuse can be opened, so that each thread has a queue", device.is_ok(), outcome(&device));
    Ok(())
}

fn names(facts: &mut Facts, mount: &Mount) -> Result<()> {
    let stat = |name: &str| fs::symlink_metadata(mount.path(name));
    let (_, seen) = mount.watch(|| (stat("absent"), stat("absent")));
    facts.add("names", "negative entries are cached", count(&seen, "lookup") == 1, trace(&seen));
    let (made, seen) = mount.watch(|| File::create(mount.path("absent")));
    made?;
    facts.add("names", "a cached negative entry does not hide a create", count(&seen, "create") == 1, trace(&seen));
    stat("absent")?;
    let (_, seen) = mount.watch(|| (stat("absent"), stat("absent")));
    facts.add("names", "entries and attributes are cached", seen.is_empty(), trace(&seen));
    let (made, seen) = mount.watch(|| File::create(mount.path("created")).map(drop));
    made?;
    let parent = count(&seen, "getattr");
    facts.add(
        "names",
        "default_permissions costs at most one GETATTR of the parent a create",
        parent <= 1,
        trace(&seen),
    );
    let (_, seen) = mount.watch(|| fs::remove_file(mount.path("created")));
    facts.add("names", "and at most one an unlink", count(&seen, "getattr") <= 1, trace(&seen));
    let acl = |seen: &[Seen]| seen.iter().filter(|seen| seen.operation == "getxattr" && seen.detail == 2).count();
    fs::create_dir(mount.path("sub"))?;
    let (_, first) = mount.watch(|| stat("sub/x"));
    let (_, second) = mount.watch(|| stat("sub/y"));
    let observed = format!("first walk: {}; second: {}", trace(&first), trace(&second));
    facts.add("names", "the ACL of a directory is asked for at most once", acl(&second) == 0, observed);

    symlink("target", mount.path("link"))?;
    let (_, seen) = mount.watch(|| (fs::read_link(mount.path("link")), fs::read_link(mount.path("link"))));
    facts.add("names", "targets of symbolic links are cached", count(&seen, "readlink") <= 1, trace(&seen));

    for index in 0..3 {
        File::create(mount.path(&format!("sub/{index}")))?;
    }
    let list = || fs::read_dir(mount.path("sub")).map(Iterator::count);
    let (_, first) = mount.watch(list);
    let (_, second) = mount.watch(list);
    let observed = format!("first listing: {}; second: {}", trace(&first), trace(&second));
    let auto = count(&first, "readdirplus") > 0 && count(&second, "readdirplus") <= 1 && count(&second, "readdir") > 0;
    facts.add("names", "readdirplus starts a listing, readdir goes on (auto)", auto, observed);

    let rename = |from: &str, to: &str, flags| {
        mount.watch(|| rustix::fs::renameat_with(CWD, mount.path(from), CWD, mount.path(to), flags))
    };
    let mut observed = Vec::new();
    let mut arrived = true;
    for (flags, detail) in [(RenameFlags::NOREPLACE, 1), (RenameFlags::EXCHANGE, 2), (RenameFlags::WHITEOUT, 4)] {
        let to = if detail == 2 { "sub/1" } else { "sub/9" };
        let (result, seen) = rename("sub/0", to, flags);
        let reached = seen.iter().any(|seen| seen.operation == "rename" && seen.detail == detail);
        observed.push(format!(
            "{flags:?}: {} ({})",
            if reached { "arrives" } else { "does not arrive" },
            outcome(&result)
        ));
        arrived &= reached || detail == 4;
        if detail == 1 {
            fs::rename(mount.path("sub/9"), mount.path("sub/0"))?;
        }
    }
    facts.add("names", "renameat2's NOREPLACE and EXCHANGE arrive with their flags", arrived, observed.join("; "));
    Ok(())
}

fn attributes(facts: &mut Facts, mount: &Mount) -> Result<()> {
    let path = mount.path("times");
    File::create(&path)?;
    let mut wrong = Vec::new();
    for (tv_sec, tv_nsec) in [(-1, 500_000_000), (-1, 0), (-100_000_000_000, 1), (1 << 33, 999_999_999)] {
        let time = Timespec { tv_sec, tv_nsec };
        let times = Timestamps { last_access: time, last_modification: time };
        rustix::fs::utimensat(CWD, &path, &times, AtFlags::empty())?;
        let found = fs::metadata(&path)?;
        if (found.mtime(), found.mtime_nsec()) != (tv_sec, tv_nsec) {
            wrong.push(format!("{tv_sec}.{tv_nsec:09} became {}.{:09}", found.mtime(), found.mtime_nsec()));
        }
    }
    let observed = if wrong.is_empty() { "all come back".into() } else { wrong.join("; ") };
    facts.add("attributes", "times before 1970 with a fraction survive", wrong.is_empty(), observed);
    let statx = rustix::fs::statx(CWD, &path, AtFlags::empty(), StatxFlags::BASIC_STATS | StatxFlags::BTIME)?;
    let birth = statx.stx_mask & StatxFlags::BTIME.bits() != 0;
    facts.add(
        "attributes",
        "statx(2) has no birth time (STATX does not reach us)",
        !birth,
        format!("birth time: {birth}"),
    );
    rustix::fs::setxattr(&path, "user.x", b"value", rustix::fs::XattrFlags::empty())?;
    let (size, seen) = mount.watch(|| rustix::fs::getxattr_query(&path, "user.x"));
    let holds = size == Ok(5) && count(&seen, "getxattr") == 1;
    facts.add("attributes", "extended attributes are not cached by the kernel", holds, trace(&seen));
    let file = File::open(&path)?;
    let (flags, seen) = mount.watch(|| rustix::fs::ioctl_getflags(&file));
    let arrives = flags.is_ok() && count(&seen, "ioctl") == 1;
    facts.add("attributes", "FS_IOC_GETFLAGS reaches us", arrives, format!("{}, {}", trace(&seen), outcome(&flags)));
    Ok(())
}

fn cached_data(facts: &mut Facts, mount: &Mount) -> Result<()> {
    let path = mount.path("cached");
    let (file, seen) = mount.watch(|| write_file(&path, 3 << 20));
    let file = file?;
    let writes = lengths(&seen, "write");
    let delayed = seen.iter().any(|seen| seen.from_page_cache);
    let all = writes.iter().sum::<u64>() == 3 << 20;
    let observed = format!("{} WRITEs of at most {} bytes", writes.len(), writes.iter().max().unwrap_or(&0));
    facts.add("cache=kernel", "a write has arrived when write(2) returns", all && !delayed, observed);
    let truncated = seen.iter().any(|seen| seen.operation == "setattr");
    let (_, seen) = mount.watch(|| OpenOptions::new().write(true).truncate(true).open(mount.path("times")));
    let in_open =
        seen.iter().any(|seen| seen.operation == "open" && seen.detail & u64::from(OFlags::TRUNC.bits()) != 0);
    let holds = !in_open && (truncated || count(&seen, "setattr") == 1);
    facts.add("cache=kernel", "O_TRUNC arrives as SETATTR, not in OPEN", holds, trace(&seen));
    drop(file);
    let (content, seen) = mount.watch(|| fs::read(&path));
    content?;
    facts.add(
        "cache=kernel",
        "what was written is read from the kernel's cache, also after a reopen",
        count(&seen, "read") == 0,
        trace(&seen),
    );

    // Fresh in the filesystem, unknown to the kernel's cache.
    let file = File::options().read(true).write(true).create(true).truncate(true).open(mount.path("cold"))?;
    rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, 8 << 20)?;
    let sequential = |file: &File| {
        let mut buffer = vec![0; 256 << 10];
        let mut reader = file;
        while reader.read(&mut buffer).is_ok_and(|length| length > 0) {}
    };
    let (_, seen) = mount.watch(|| sequential(&file));
    let largest = lengths(&seen, "read").into_iter().max().unwrap_or(0);
    let observed = format!(
        "{} READs of at most {} KiB; INIT offered {} KiB",
        count(&seen, "read"),
        largest >> 10,
        mount.negotiated.readahead_bytes_offered >> 10
    );
    facts.add("cache=kernel", "readahead is capped at 128 KiB at first", largest <= 128 << 10, observed);
    if is_root() {
        let raised = mount.mounted.set_read_ahead_kib(2048);
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
        // A descriptor takes the limit when it is opened.
        let again = File::open(mount.path("cold"))?;
        let (_, seen) = mount.watch(|| sequential(&again));
        let largest = lengths(&seen, "read").into_iter().max().unwrap_or(0);
        let observed = format!("{}; then READs of at most {} KiB", outcome(&raised), largest >> 10);
        facts.add("cache=kernel", "root raises it through read_ahead_kb", largest > 128 << 10, observed);
    }
    Ok(())
}

fn direct_data(facts: &mut Facts, mount: &Mount) -> Result<()> {
    let path = mount.path("direct");
    let direct = OFlags::DIRECT.bits().cast_signed();
    let file = File::options().read(true).write(true).create(true).truncate(true).custom_flags(direct).open(&path)?;
    let buffer = aligned(4 << 20);
    let data = buffer.as_slice();
    let (written, seen) = mount.watch(|| file.write_all_at(data, 0));
    written?;
    let flagged = seen.iter().filter(|seen| seen.operation == "write").all(|seen| seen.direct && !seen.from_page_cache);
    let largest = lengths(&seen, "write").into_iter().max().unwrap_or(0);
    facts.add("O_DIRECT", "WRITE shows the O_DIRECT bit", flagged && largest > 0, trace(&seen));
    let observed = format!("4 MiB in WRITEs of at most {} KiB", largest >> 10);
    facts.add("O_DIRECT", "the largest WRITE is 1 MiB (256 pages)", largest == 1 << 20, observed);
    let mut buffer = aligned(4 << 20);
    let (read, seen) = mount.watch(|| file.read_exact_at(buffer.as_mut_slice(), 0));
    read?;
    let flagged = seen.iter().filter(|seen| seen.operation == "read").all(|seen| seen.direct);
    let largest = lengths(&seen, "read").into_iter().max().unwrap_or(0);
    let observed = format!("{}, at most {} KiB", trace(&seen), largest >> 10);
    facts.add("O_DIRECT", "READ shows the O_DIRECT bit, and is 1 MiB at most", flagged && largest == 1 << 20, observed);
    let small = buffer.as_slice().get(..512).unwrap_or_default();
    let (unaligned, seen) = mount.watch(|| file.write_at(small, 512));
    let holds = unaligned.is_ok() && lengths(&seen, "write") == [512];
    facts.add("O_DIRECT", "the kernel does not check alignment: 512 bytes at 512 arrive", holds, outcome(&unaligned));
    let buffered = File::options().write(true).open(&path)?;
    let (_, seen) = mount.watch(|| buffered.write_at(b"x", 0));
    let plain = seen.iter().filter(|seen| seen.operation == "write").all(|seen| !seen.direct);
    facts.add("O_DIRECT", "a buffered descriptor of the same file does not show it", plain, trace(&seen));
    let other = File::create(mount.path("copied"))?;
    let source = File::open(&path)?;
    let (copied, seen) = mount.watch(|| rustix::fs::copy_file_range(&source, None, &other, None, 4 << 20));
    let holds = copied == Ok(4 << 20) && lengths(&seen, "copy_file_range") == [4 << 20];
    facts.add("copy", "copy_file_range arrives whole", holds, format!("{} ({})", trace(&seen), outcome(&copied)));
    Ok(())
}

/// A buffer for O_DIRECT: some kernels want it aligned.
struct Aligned {
    bytes: Vec<u8>,
    from: usize,
    length: usize,
}

fn aligned(length: usize) -> Aligned {
    let bytes = vec![5; length + 4096];
    let from = bytes.as_ptr().align_offset(4096);
    Aligned { bytes, from, length }
}

impl Aligned {
    fn as_slice(&self) -> &[u8] {
        self.bytes.get(self.from..self.from + self.length).unwrap_or_default()
    }

    fn as_mut_slice(&mut self) -> &mut [u8] {
        self.bytes.get_mut(self.from..self.from + self.length).unwrap_or_default()
    }
}

fn space(facts: &mut Facts, mount: &Mount) -> Result<()> {
    let file = write_file(&mount.path("space"), 1 << 20)?;
    let keep = FallocateFlags::KEEP_SIZE;
    let served = [
        ("allocate", FallocateFlags::empty()),
        ("KEEP_SIZE", keep),
        ("PUNCH_HOLE", FallocateFlags::PUNCH_HOLE | keep),
        ("ZERO_RANGE", FallocateFlags::ZERO_RANGE),
        ("ZERO_RANGE|KEEP_SIZE", FallocateFlags::ZERO_RANGE | keep),
    ];
    let try_mode = |mode| mount.watch(|| rustix::fs::fallocate(&file, mode, 0, 128 << 10));
    let arrived = |mode: FallocateFlags, seen: &[Seen]| {
        seen.iter().any(|seen| seen.operation == "fallocate" && seen.detail == u64::from(mode.bits()))
    };
    let mut observed = Vec::new();
    let mut all = true;
    for (name, mode) in served {
        let (result, seen) = try_mode(mode);
        all &= arrived(mode, &seen);
        observed.push(format!("{name}: {}", if arrived(mode, &seen) { outcome(&result) } else { "lost".into() }));
    }
    facts.add(
        "fallocate",
        "allocate, keep size, punch hole and zero range arrive with their modes",
        all,
        observed.join("; "),
    );
    let refused = [
        ("COLLAPSE_RANGE", FallocateFlags::COLLAPSE_RANGE),
        ("INSERT_RANGE", FallocateFlags::INSERT_RANGE),
        ("UNSHARE_RANGE", FallocateFlags::UNSHARE_RANGE),
    ];
    let mut observed = Vec::new();
    let mut none = true;
    for (name, mode) in refused {
        let (result, seen) = try_mode(mode);
        none &= count(&seen, "fallocate") == 0 && result == Err(Errno::OPNOTSUPP);
        observed.push(format!("{name}: {}", outcome(&result)));
    }
    facts.add(
        "fallocate",
        "collapse, insert and unshare never arrive (EOPNOTSUPP from the kernel)",
        none,
        observed.join("; "),
    );
    let (hole, first) = mount.watch(|| rustix::fs::seek(&file, SeekFrom::Hole(0)));
    let (data, second) = mount.watch(|| rustix::fs::seek(&file, SeekFrom::Data(0)));
    let holds = count(&first, "lseek") == 1 && count(&second, "lseek") == 1;
    let observed = format!("hole at {}, data at {}", shown(&hole), shown(&data));
    facts.add("lseek", "SEEK_HOLE and SEEK_DATA arrive", holds, observed);
    let (_, seen) = mount.watch(|| rustix::fs::statvfs(mount.mounted.directory()));
    facts.add("space", "statfs(2) arrives each time", count(&seen, "statfs") == 1, trace(&seen));
    Ok(())
}

fn shown<T: std::fmt::Display, E: std::fmt::Display>(result: &std::result::Result<T, E>) -> String {
    result.as_ref().map_or_else(ToString::to_string, ToString::to_string)
}

fn durability(facts: &mut Facts, mount: &Mount) -> Result<()> {
    let file = write_file(&mount.path("durable"), 4096)?;
    let (_, seen) = mount.watch(|| (file.sync_all(), file.sync_data()));
    let kinds: Vec<_> = seen.iter().filter(|seen| seen.operation == "fsync").map(|seen| seen.detail).collect();
    facts.add("durability", "fsync and fdatasync arrive, told apart", kinds == [0, 1], trace(&seen));
    let directory = File::open(mount.directory.path())?;
    let (_, seen) = mount.watch(|| directory.sync_all());
    facts.add("durability", "fsync of a directory arrives", count(&seen, "fsyncdir") == 1, trace(&seen));
    let (result, seen) = mount.watch(|| rustix::fs::syncfs(&file));
    facts.add("durability", "syncfs(2) does not reach us", seen.is_empty() && result.is_ok(), trace(&seen));
    let sync = OFlags::SYNC.bits().cast_signed();
    let (result, seen) =
        mount.watch(|| File::options().write(true).custom_flags(sync).open(mount.path("durable"))?.write_at(b"x", 0));
    result?;
    facts.add(
        "durability",
        "a cached write with O_SYNC is followed by FSYNC",
        count(&seen, "fsync") == 1,
        trace(&seen),
    );
    let (_, seen) = mount.watch(|| drop(file));
    facts.add("durability", "close(2) sends no FLUSH once it was ENOSYS", count(&seen, "flush") == 0, trace(&seen));
    if is_root() {
        let (result, seen) = mount.watch(|| client::shut_down_as_others_do(mount.directory.path()));
        let arrived = seen.iter().find(|seen| seen.operation == "ioctl");
        let holds = arrived.is_some_and(|seen| seen.detail == 1 << 32 | 0x8004_587d);
        facts.add("durability", "FS_IOC_SHUTDOWN on the root directory arrives as an ioctl", holds, outcome(&result));
        let bytes = arrived.map_or(0, |seen| seen.length_bytes);
        let observed = format!("{bytes} bytes of argument");
        facts.add(
            "durability",
            "but its argument does not (the command says that it only reads)",
            bytes == 0,
            observed,
        );
    }
    Ok(())
}

fn refused(facts: &mut Facts, mount: &Mount) -> Result<()> {
    let temporary = OFlags::TMPFILE | OFlags::RDWR;
    let (result, _) = mount.watch(|| rustix::fs::openat(CWD, mount.directory.path(), temporary, Mode::RUSR).map(drop));
    facts.add("missing", "O_TMPFILE is EOPNOTSUPP", result == Err(Errno::OPNOTSUPP), outcome(&result));
    let one = write_file(&mount.path("one"), 4096)?;
    let two = write_file(&mount.path("two"), 4096)?;
    let (result, seen) = mount.watch(|| rustix::fs::ioctl_ficlone(&one, &two));
    let holds = result.is_err() && seen.is_empty();
    facts.add("missing", "FICLONE never arrives", holds, format!("{}, {}", outcome(&result), trace(&seen)));
    let (result, seen) = mount.watch(|| rustix::fs::fadvise(&one, 0, None, rustix::fs::Advice::WillNeed));
    let holds = result.is_ok() && count(&seen, "ioctl") == 0;
    facts.add("missing", "posix_fadvise never arrives as such", holds, trace(&seen));
    let (result, seen) = mount.watch(|| rustix::fs::flock(&one, rustix::fs::FlockOperation::NonBlockingLockExclusive));
    let other = File::open(mount.path("one"))?;
    let second = rustix::fs::flock(&other, rustix::fs::FlockOperation::NonBlockingLockShared);
    let holds = result.is_ok() && second == Err(Errno::WOULDBLOCK) && seen.is_empty();
    facts.add(
        "locks",
        "flock(2) works in the kernel alone",
        holds,
        format!("{}, second: {}", trace(&seen), outcome(&second)),
    );
    Ok(())
}

/// With FUSE_HANDLE_KILLPRIV_V2. Needs an unprivileged writer, so root and setpriv(1).
fn set_id(facts: &mut Facts, mount: &Mount) -> Result<()> {
    let path = mount.path("set-id");
    let file = write_file(&path, 4096)?;
    let (_, seen) = mount.watch(|| file.write_at(b"x", 0));
    let asked = seen.iter().filter(|seen| seen.operation == "getxattr" && seen.detail == 1).count();
    facts.add("set-user-id", "write(2) does not ask for security.capability", asked == 0, trace(&seen));
    if !is_root() {
        return Ok(());
    }
    fs::set_permissions(mount.directory.path(), fs::Permissions::from_mode(0o755))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o4777))?;
    let (status, seen) = mount.watch(|| {
        Command::new("setpriv")
            .args(["--reuid=65534", "--regid=65534", "--clear-groups", "sh", "-c", "printf x 1<>\"$0\""])
            .arg(&path)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .status()
    });
    if !status.is_ok_and(|status| status.success()) {
        return Ok(());
    }
    let told = seen.iter().any(|seen| seen.operation == "write" && seen.clear_set_id);
    facts.add("set-user-id", "an unprivileged WRITE says that the bits are to be cleared", told, trace(&seen));
    let cleared = fs::metadata(&path)?.mode() & 0o4000 == 0;
    facts.add("set-user-id", "and the kernel sees that they are", cleared, format!("set-user-id: {}", !cleared));
    fs::set_permissions(&path, fs::Permissions::from_mode(0o4777))?;
    let (_, seen) = mount.watch(|| file.write_at(b"x", 0));
    let told = seen.iter().any(|seen| seen.clear_set_id);
    facts.add("set-user-id", "root's WRITE does not", !told, trace(&seen));
    Ok(())
}

fn daemon_cache(facts: &mut Facts, mount: &Mount) -> Result<()> {
    let file = write_file(&mount.path("file"), 3 << 20)?;
    let mut buffer = vec![0; 4096];
    let (_, seen) = mount.watch(|| (file.read_at(&mut buffer, 0), file.read_at(&mut buffer, 0)));
    facts.add(
        "cache=daemon",
        "every read(2) arrives, with its own size",
        lengths(&seen, "read") == [4096; 2],
        trace(&seen),
    );
    let data = vec![1; 4 << 20];
    let (_, seen) = mount.watch(|| file.write_at(&data, 0));
    let largest = lengths(&seen, "write").into_iter().max().unwrap_or(0);
    let observed = format!("{}, at most {} KiB", trace(&seen), largest >> 10);
    facts.add("cache=daemon", "a large write(2) arrives in WRITEs of 1 MiB", largest == 1 << 20, observed);
    let target = tempfile::tempfile()?;
    let (sent, seen) = mount.watch(|| {
        let mut offset = 0;
        rustix::fs::sendfile(&target, &file, Some(&mut offset), 1 << 20)
    });
    let all = sent == Ok(1 << 20);
    let sizes = lengths(&seen, "read");
    let observed =
        format!("{} READs of {} to {} bytes", sizes.len(), shown_min(&sizes), sizes.iter().max().unwrap_or(&0));
    facts.add("cache=daemon", "sendfile(2) works through the pipe, in READs of the pipe's size", all, observed);
    Ok(())
}

fn delayed_writes(facts: &mut Facts, mount: &Mount) -> Result<()> {
    const TOPIC: &str = "cache=writeback";
    let file = write_file(&mount.path("file"), 4096)?;
    // The kernel's time of the write is never ours of the creation.
    let (synced, seen) = mount.watch(|| file.sync_all());
    let holds = synced.is_ok() && count(&seen, "setattr") == 1;
    facts.add(TOPIC, "fsync(2) sends the file's times, by SETATTR", holds, trace(&seen));
    let (_, seen) = mount.watch(|| (0..8).try_for_each(|page| file.write_all_at(&[2; 4096], page * 4096)));
    facts.add(TOPIC, "a write has not arrived when write(2) returns", count(&seen, "write") == 0, trace(&seen));
    let (synced, seen) = mount.watch(|| file.sync_all());
    let delayed = seen.iter().filter(|seen| seen.operation == "write").all(|seen| seen.from_page_cache);
    let bytes: u64 = lengths(&seen, "write").iter().sum();
    let holds = synced.is_ok() && delayed && bytes == 8 * 4096;
    facts.add(TOPIC, "fsync(2) sends it, from the page cache", holds, trace(&seen));
    file.write_all_at(&[3; 10], 100)?;
    let (_, seen) = mount.watch(|| drop(file));
    let holds = count(&seen, "write") == 1 && count(&seen, "flush") == 1;
    facts.add(TOPIC, "close(2) writes back, then sends FLUSH", holds, trace(&seen));
    Ok(())
}

fn shown_min(sizes: &[u64]) -> u64 {
    sizes.iter().min().copied().unwrap_or(0)
}
