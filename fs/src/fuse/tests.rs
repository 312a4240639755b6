//! The adapter on a real mount, with the filesystem in memory behind it. Needs root and /dev/fuse; says so and passes where they
//! are missing (`.ci/run` has them).

use std::collections::BTreeSet;
use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Seek as _, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, CWD, FallocateFlags, FileType, Mode, RenameFlags, Timespec, Timestamps, XattrFlags};
use rustix::io::Errno;
use rustix::mount::MountFlags;

use super::mounts::{self, MountRequest, Mounted};
use super::{MemoryFilesystem, Negotiated, Session, SessionSettings};
use crate::error::Result;
use crate::options::CacheMode;
use crate::sync::Arc;
use crate::sync::atomic::{AtomicBool, Ordering};

struct TestMount {
    filesystem: Arc<MemoryFilesystem>,
    directory: tempfile::TempDir,
    mounted: Mounted,
    negotiated: Negotiated,
    server: Option<JoinHandle<Result<()>>>,
}

impl TestMount {
    fn new(cache: CacheMode) -> Option<Self> {
        if !rustix::process::geteuid().is_root() || File::open("/dev/fuse").is_err() {
            eprintln!("skipped: needs root and /dev/fuse");
            return None;
        }
        let directory = tempfile::tempdir().unwrap();
        let filesystem = Arc::new(MemoryFilesystem::new());
        let request = MountRequest {
            source: "/some/image, with a comma".into(),
            directory: fs::canonicalize(directory.path()).unwrap(),
            flags: MountFlags::NOSUID | MountFlags::NODEV,
            allow_other: true,
        };
        let settings = SessionSettings { cache, threads: 4 };
        let session = Session::mount(Arc::clone(&filesystem), &request, settings).unwrap();
        let (mounted, negotiated) = (session.mounted().clone(), session.negotiated());
        let server = Some(std::thread::spawn(move || session.serve()));
        Some(Self { filesystem, directory, mounted, negotiated, server })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Unmounts and waits for the session's end.
    fn end(mut self) {
        // Another test's child may hold our descriptors between fork and exec.
        let deadline = Instant::now() + Duration::from_secs(10);
        while let Err(error) = self.mounted.unmount(false) {
            assert!(error.errno() == Errno::BUSY && Instant::now() < deadline, "{error}");
            std::thread::yield_now();
        }
        self.server.take().unwrap().join().unwrap().unwrap();
    }
}

impl Drop for TestMount {
    fn drop(&mut self) {
        if self.server.is_some() {
            let _ = self.mounted.unmount(true);
        }
    }
}

fn errno_of<T: std::fmt::Debug>(result: std::io::Result<T>) -> Option<i32> {
    result.unwrap_err().raw_os_error()
}

fn seen_names(mount: &TestMount) -> BTreeSet<&'static str> {
    mount.filesystem.stop_recording().into_iter().map(|seen| seen.operation).collect()
}

#[test]
fn every_operation_arrives_and_is_answered() {
    let Some(mount) = TestMount::new(CacheMode::Kernel) else { return };
    mount.filesystem.start_recording();
    let file = mount.path("file");
    let mut open = OpenOptions::new().read(true).write(true).create_new(true).mode(0o640).open(&file).unwrap();
    let content: Vec<u8> = (0..300_000_u32).flat_map(u32::to_le_bytes).collect();
    open.write_all(&content).unwrap();
    open.sync_all().unwrap();
    open.sync_data().unwrap();
    assert_eq!(fs::read(&file).unwrap(), content);

    // Attributes.
    fs::set_permissions(&file, fs::Permissions::from_mode(0o4755)).unwrap();
    std::os::unix::fs::chown(&file, Some(12), Some(34)).unwrap();
    let found = fs::metadata(&file).unwrap();
    assert_eq!((found.uid(), found.gid(), found.mode() & 0o7777, found.size()), (12, 34, 0o755, content.len() as u64));
    for (tv_sec, tv_nsec) in [(5, 6), (-1, 999_999_999), (-7, 0), (i64::from(u32::MAX) + 10, 1)] {
        let time = Timespec { tv_sec, tv_nsec };
        rustix::fs::utimensat(CWD, &file, &Timestamps { last_access: time, last_modification: time }, AtFlags::empty())
            .unwrap();
        let found = fs::metadata(&file).unwrap();
        assert_eq!((found.mtime(), found.mtime_nsec()), (tv_sec, tv_nsec));
        assert_eq!((found.atime(), found.atime_nsec()), (tv_sec, tv_nsec));
    }

    // Size and space.
    open.set_len(1_000_000).unwrap();
    open.set_len(5_000_000).unwrap();
    rustix::fs::fallocate(&open, FallocateFlags::empty(), 5_000_000, 1000).unwrap();
    rustix::fs::fallocate(&open, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 65_536, 131_072).unwrap();
    assert_eq!(open.metadata().unwrap().len(), 5_001_000);
    let mut hole = [1_u8; 10];
    open.read_exact_at(&mut hole, 65_536).unwrap();
    assert_eq!(hole, [0; 10]);
    assert_eq!(rustix::fs::seek(&open, rustix::fs::SeekFrom::Hole(0)).unwrap(), 65_536);
    assert_eq!(rustix::fs::seek(&open, rustix::fs::SeekFrom::Data(65_536)).unwrap(), 196_608);

    // Copying, appending, truncating.
    let copy = mount.path("copy");
    let target = File::create(&copy).unwrap();
    let (mut from, mut to) = (0, 0);
    assert_eq!(rustix::fs::copy_file_range(&open, Some(&mut from), &target, Some(&mut to), 60_000).unwrap(), 60_000);
    assert_eq!(fs::read(&copy).unwrap(), content[..60_000]);
    OpenOptions::new().append(true).open(&copy).unwrap().write_all(b"tail").unwrap();
    assert_eq!(fs::read(&copy).unwrap().len(), 60_004);
    assert_eq!(File::create(&copy).unwrap().metadata().unwrap().len(), 0);

    // Names.
    let directory = mount.path("directory");
    fs::create_dir(&directory).unwrap();
    symlink("to/nowhere", directory.join("link")).unwrap();
    assert_eq!(fs::read_link(directory.join("link")).unwrap(), Path::new("to/nowhere"));
    fs::hard_link(&file, directory.join("hard")).unwrap();
    assert_eq!(fs::metadata(&file).unwrap().nlink(), 2);
    rustix::fs::mknodat(CWD, directory.join("null"), FileType::CharacterDevice, Mode::RUSR, rustix::fs::makedev(1, 3))
        .unwrap();
    assert_eq!(fs::metadata(directory.join("null")).unwrap().rdev(), rustix::fs::makedev(1, 3));
    let rename = |from: &Path, to: &Path, flags| rustix::fs::renameat_with(CWD, from, CWD, to, flags);
    assert_eq!(rename(&file, &copy, RenameFlags::NOREPLACE), Err(Errno::EXIST));
    rename(&file, &copy, RenameFlags::EXCHANGE).unwrap();
    assert_eq!(fs::metadata(&copy).unwrap().len(), 5_001_000);
    fs::rename(&copy, &file).unwrap();
    let mut listed: Vec<_> =
        fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    listed.sort();
    assert_eq!(listed, ["hard", "link", "null"]);
    File::open(&directory).unwrap().sync_all().unwrap();
    assert_eq!(fs::remove_dir(&directory).unwrap_err().kind(), ErrorKind::DirectoryNotEmpty);
    for name in &listed {
        fs::remove_file(directory.join(name)).unwrap();
    }
    fs::remove_dir(&directory).unwrap();
    assert_eq!(fs::metadata(mount.path("absent")).unwrap_err().kind(), ErrorKind::NotFound);

    // Extended attributes.
    rustix::fs::setxattr(&file, "user.one", b"value", XattrFlags::CREATE).unwrap();
    assert_eq!(rustix::fs::setxattr(&file, "user.one", b"x", XattrFlags::CREATE), Err(Errno::EXIST));
    assert_eq!(rustix::fs::setxattr(&file, "user.two", b"x", XattrFlags::REPLACE), Err(Errno::NODATA));
    let mut value = [0_u8; 64];
    assert_eq!(rustix::fs::getxattr(&file, "user.one", &mut value), Ok(5));
    assert_eq!(&value[..5], b"value");
    assert_eq!(rustix::fs::getxattr_query(&file, "user.one"), Ok(5));
    assert_eq!(rustix::fs::getxattr(&file, "user.one", &mut value[..3]), Err(Errno::RANGE));
    assert_eq!(rustix::fs::listxattr(&file, &mut value), Ok(9));
    rustix::fs::removexattr(&file, "user.one").unwrap();
    assert_eq!(rustix::fs::removexattr(&file, "user.one"), Err(Errno::NODATA));

    // The rest.
    assert_eq!(rustix::fs::statvfs(&file).unwrap().f_bavail, 1 << 18);
    assert_eq!(rustix::fs::ioctl_getflags(&open).unwrap(), rustix::fs::IFlags::empty());
    drop((open, target));
    let mut wanted: BTreeSet<&str> = [
        "lookup",
        "getattr",
        "setattr",
        "readlink",
        "mknod",
        "mkdir",
        "symlink",
        "link",
        "unlink",
        "rmdir",
        "rename",
        "open",
        "create",
        "read",
        "write",
        "flush",
        "fsync",
        "opendir",
        "readdirplus",
        "fsyncdir",
        "statfs",
        "setxattr",
        "getxattr",
        "listxattr",
        "removexattr",
        "fallocate",
        "lseek",
        "copy_file_range",
        "ioctl",
        "releasedir",
    ]
    .into();
    for seen in seen_names(&mount) {
        wanted.remove(seen);
    }
    assert!(wanted.is_empty(), "never arrived: {wanted:?}");
    assert!(!mount.filesystem.is_latched());
    mount.end();
}

#[test]
fn the_mount_shows_what_was_asked() {
    let Some(mount) = TestMount::new(CacheMode::Kernel) else { return };
    let entry = mounts::find(mount.mounted.directory()).unwrap().unwrap();
    assert_eq!(entry.file_system_type, "fuse.coppice");
    assert_eq!(entry.source, "/some/image, with a comma");
    let text = fs::read_to_string("/proc/mounts").unwrap();
    let line = text.lines().find(|line| line.contains(mount.directory.path().to_str().unwrap())).unwrap();
    for option in ["nosuid", "nodev", "default_permissions", "allow_other", "user_id=0"] {
        assert!(line.contains(option), "{line}");
    }
    for capability in ["FUSE_HANDLE_KILLPRIV_V2", "FUSE_PARALLEL_DIROPS", "FUSE_POSIX_ACL", "FUSE_DONT_MASK"] {
        assert!(mount.negotiated.has(capability), "{:?}", Negotiated::names(mount.negotiated.granted));
    }
    for capability in ["FUSE_WRITEBACK_CACHE", "FUSE_OVER_IO_URING", "FUSE_SETXATTR_EXT", "FUSE_ATOMIC_O_TRUNC"] {
        assert!(!mount.negotiated.has(capability));
    }
    mount.mounted.set_read_ahead_kib(1024).unwrap();
    mount.mounted.unmount(true).unwrap();
    assert!(!mount.mounted.is_visible());
    assert!(mount.mounted.unmount(false).is_err(), "it must not unmount what is beneath");
}

#[test]
fn a_large_directory_is_listed_exactly_once_also_while_it_shrinks() {
    const COUNT: usize = 8000;
    let Some(mount) = TestMount::new(CacheMode::Kernel) else { return };
    let directory = mount.path("many");
    fs::create_dir(&directory).unwrap();
    let name = |index: usize| format!("{index:06}-{}", "x".repeat(index % 200));
    for index in 0..COUNT {
        File::create(directory.join(name(index))).unwrap();
    }
    let list = || -> Vec<String> {
        fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    };
    let mut listed = list();
    assert_eq!(listed.len(), COUNT);
    listed.sort();
    assert_eq!(listed, (0..COUNT).map(name).collect::<Vec<_>>());
    // Removing what was just returned must not make the listing skip or repeat.
    let mut removed = 0;
    for entry in fs::read_dir(&directory).unwrap() {
        fs::remove_file(entry.unwrap().path()).unwrap();
        removed += 1;
    }
    assert_eq!(removed, COUNT);
    assert!(list().is_empty());
    // Nothing is left in the kernel: each lookup that was counted was given back.
    let deadline = Instant::now() + Duration::from_secs(10);
    while mount.filesystem.lookups_outstanding() > 1 {
        assert!(Instant::now() < deadline, "{} lookups outstanding", mount.filesystem.lookups_outstanding());
        let _ = fs::metadata(mount.path("nothing"));
    }
    mount.end();
}

#[test]
fn an_entry_without_attributes_is_listed_and_its_lookup_is_not_counted() {
    let Some(mount) = TestMount::new(CacheMode::Kernel) else { return };
    for name in ["a", "damaged", "z"] {
        File::create(mount.path(name)).unwrap();
    }
    // The first listing uses readdirplus (the kernel starts with it), as does each from the start after lookups.
    for _ in 0..5 {
        let mut listed: Vec<_> = fs::read_dir(mount.directory.path())
            .unwrap()
            .map(|entry| entry.unwrap())
            .map(|entry| (entry.file_name().into_string().unwrap(), entry.file_type().unwrap().is_file()))
            .collect();
        listed.sort();
        assert_eq!(listed, [("a".into(), true), ("damaged".into(), true), ("z".into(), true)]);
    }
    for name in ["a", "damaged", "z"] {
        fs::remove_file(mount.path(name)).unwrap();
    }
    let deadline = Instant::now() + Duration::from_secs(10);
    while mount.filesystem.lookups_outstanding() > 0 {
        assert!(Instant::now() < deadline, "{} lookups outstanding", mount.filesystem.lookups_outstanding());
        let _ = fs::metadata(mount.path("nothing"));
    }
    assert!(!mount.filesystem.is_latched(), "more lookups were given back than counted");
    mount.end();
}

/// Also for a thread that has just taken a request: one of a hundred rounds or so has one.
#[test]
fn a_connection_that_ends_under_load_is_an_end_and_no_error() {
    for _ in 0..150 {
        let Some(mut mount) = TestMount::new(CacheMode::Kernel) else { return };
        let (absent, mounted) = (mount.path("nothing"), mount.mounted.clone());
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while !is_over.load(Ordering::Relaxed) {
                        let _ = fs::metadata(&absent);
                    }
                });
            }
            std::thread::yield_now();
            mounted.abort().unwrap();
            is_over.store(true, Ordering::Relaxed);
        });
        let end = mount.server.take().unwrap().join().unwrap();
        mounted.unmount(true).unwrap();
        end.unwrap();
    }
}

#[test]
fn a_panic_fails_one_request_and_latches() {
    let Some(mount) = TestMount::new(CacheMode::Kernel) else { return };
    fs::write(mount.path("file"), b"content").unwrap();
    for (count, operation) in (1..).zip(["lookup", "opendir", "statfs", "write"]) {
        mount.filesystem.panic_in(operation);
        let outcome = match operation {
            "lookup" => errno_of(fs::metadata(mount.path("other"))),
            "opendir" => errno_of(fs::read_dir(mount.directory.path())),
            "statfs" => rustix::fs::statvfs(mount.path("file")).err().map(Errno::raw_os_error),
            _ => errno_of(OpenOptions::new().append(true).open(mount.path("file")).unwrap().write(b"x")),
        };
        assert_eq!(outcome, Some(libc::EIO), "{operation}");
        assert_eq!(mount.filesystem_panics(), count);
        assert!(mount.filesystem.is_latched());
        // Still answerable.
        assert_eq!(fs::read(mount.path("file")).unwrap(), b"content");
        assert_eq!(errno_of(fs::write(mount.path("new"), b"")), Some(libc::EROFS));
    }
    mount.end();
}

impl TestMount {
    fn filesystem_panics(&self) -> u64 {
        use super::Operations;
        self.filesystem.metrics().vfs_panics.get()
    }
}

#[test]
fn requests_run_at_the_same_time() {
    let Some(mount) = TestMount::new(CacheMode::Kernel) else { return };
    std::thread::scope(|scope| {
        for thread in 0..8_u8 {
            let mount = &mount;
            scope.spawn(move || {
                for round in 0..20_u8 {
                    let path = mount.path(&format!("{thread}-{round}"));
                    let content = vec![thread ^ round; 200_000 + usize::from(round)];
                    fs::write(&path, &content).unwrap();
                    assert_eq!(fs::read(&path).unwrap(), content);
                    fs::remove_file(&path).unwrap();
                }
            });
        }
    });
    mount.end();
}

#[test]
fn without_the_kernels_cache_every_read_and_write_arrives() {
    use super::Operations;
    let Some(mount) = TestMount::new(CacheMode::Daemon) else { return };
    let mut file = OpenOptions::new().read(true).write(true).create_new(true).open(mount.path("file")).unwrap();
    file.write_all(&[7; 100_000]).unwrap();
    mount.filesystem.start_recording();
    let mut bytes = vec![0; 1000];
    for _ in 0..3 {
        file.seek(SeekFrom::Start(10)).unwrap();
        file.read_exact(&mut bytes).unwrap();
    }
    let reads = mount.filesystem.stop_recording().into_iter().filter(|seen| seen.operation == "read").count();
    assert_eq!(reads, 3);
    let metrics = mount.filesystem.metrics();
    assert_eq!(metrics.reply_bytes_referenced.get(), 3000, "one run of bytes is not copied by us");
    assert_eq!(metrics.reply_bytes_copied.get(), 0);
    // Across two blocks of the filesystem in memory it is gathered.
    file.read_exact_at(&mut bytes, 65_000).unwrap();
    assert_eq!(metrics.reply_bytes_copied.get(), 1000);
    assert_eq!(bytes, [7; 1000]);
    drop(file);
    mount.end();
}

#[test]
fn fusermount_hands_the_connection_over() {
    if TestMount::new(CacheMode::Kernel).is_none() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = fs::canonicalize(directory.path()).unwrap();
    let request = MountRequest {
        source: r"/tmp/a,b\c d".into(),
        directory: path.clone(),
        flags: MountFlags::empty(),
        allow_other: false,
    };
    let connection = mounts::mount_by_fusermount(&request).unwrap();
    let entry = mounts::find(&path).unwrap().unwrap();
    assert_eq!((entry.source.to_str(), entry.file_system_type.to_str()), (Some(r"/tmp/a,b\c d"), Some("fuse.coppice")));
    assert!(rustix::io::fcntl_getfd(connection.as_fd()).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
    // Its daemon "dies".
    drop(connection);
    let error = rustix::fs::statfs(&path).unwrap_err();
    assert!(mounts::is_dead(&error.into()));
    mounts::unmount(&path, true, true).unwrap();
    assert_eq!(mounts::find(&path).unwrap(), None);
    let missing = MountRequest { directory: path.join("missing"), ..request };
    let error = mounts::mount_by_fusermount(&missing).unwrap_err().to_string();
    assert!(error.contains("missing") && !error.contains('\n'), "{error}");
}

/// Times that fuser's decoding overflows on must not kill the thread that reads them (`Cargo.toml` builds fuser without
/// overflow checks for that).
#[test]
fn the_earliest_time_is_survived() {
    let Some(mount) = TestMount::new(CacheMode::Kernel) else { return };
    let path = CString::new(mount.path("file").to_str().unwrap()).unwrap();
    File::create(mount.path("file")).unwrap();
    let time = Timespec { tv_sec: i64::MIN, tv_nsec: 0 };
    let times = Timestamps { last_access: time, last_modification: time };
    let _ = rustix::fs::utimensat(CWD, path.as_c_str(), &times, AtFlags::empty());
    assert!(fs::metadata(mount.path("file")).is_ok());
    mount.end();
}
