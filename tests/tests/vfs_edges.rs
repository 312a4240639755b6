//! Edges of the POSIX operations, in process and with real threads: what waits for others ends whatever becomes of them, and nothing is left behind.

use std::ffi::OsStr;
use std::io;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::thread::ThreadId;
use std::time::Duration;

use coppicefs::device::{BlockDevice, Image, ReadRequest, SimDevice, WriteRequest as DeviceWrite};
use coppicefs::env::Env;
use coppicefs::filesystem::format::test_geometry;
use coppicefs::filesystem::{Filesystem, OpenOptions};
use coppicefs::format::namespace::{Dirent, DirentBucket, FileType};
use coppicefs::format::{BtreeId, Position};
use coppicefs::transaction::{CommitOptions, Transaction};
use coppicefs::units::{InodeNumber, SnapshotId};
use coppicefs::vfs::{
    Attributes, Caller, CopyRequest, Emitted, IoctlRequest, Lookup, ReadRequest as FileRead, SetAttributes, Vfs,
    WriteRequest,
};
use coppicefs::{Error, Result};
use coppicefs_tests::limit::Limit;
use coppicefs_tests::regions::regions;
use coppicefs_tests::simulated::device_of;
use rustix::io::Errno;

const ROOT: u64 = 1;
const READ_WRITE: i32 = 2;
const NO_ACCESS_TIME: i32 = 0o1_000_000;
const USER: Caller = Caller { uid: 0, gid: 0, pid: 0, umask: 0 };

/// An empty filesystem on a simulated device.
fn formatted(bytes: u64) -> Arc<SimDevice> {
    let device = device_of(Image::new(bytes));
    let dynamic: Arc<dyn BlockDevice> = Arc::clone(&device) as _;
    Filesystem::format(&dynamic, &test_geometry(), &Env::real()).unwrap();
    device
}

fn open<D: BlockDevice + 'static>(device: &Arc<D>, options: OpenOptions) -> Arc<Filesystem> {
    Filesystem::open(vec![Arc::clone(device) as _], &OpenOptions { cache_bytes: 24 << 20, ..options }).unwrap()
}

fn attributes(vfs: &Vfs, node: u64) -> Attributes {
    vfs.get_attributes(&USER, node, None).unwrap()
}

fn read(vfs: &Vfs, (node, handle): (u64, u64), offset: u64, length_bytes: u32) -> Vec<u8> {
    vfs.read(&USER, &FileRead { node, handle, offset, length_bytes, direct: false }).unwrap().to_vec()
}

fn create(vfs: &Vfs, name: &str) -> (u64, u64) {
    let (entry, opened) = vfs.create(&USER, ROOT, OsStr::new(name), 0o644, READ_WRITE).unwrap();
    (entry.attributes.node, opened.handle)
}

fn found(vfs: &Vfs, name: &str) -> u64 {
    match vfs.lookup(&USER, ROOT, OsStr::new(name)).unwrap() {
        Lookup::Found(entry) => entry.attributes.node,
        Lookup::Absent => panic!("{name} is not there"),
    }
}

/// A file that is there, opened.
fn opened(vfs: &Vfs, name: &str, flags: i32) -> (u64, u64) {
    let node = found(vfs, name);
    (node, vfs.open(&USER, node, flags).unwrap().handle)
}

fn write(vfs: &Vfs, (node, handle): (u64, u64), offset: u64, data: &[u8]) -> Result<u32> {
    vfs.write(&USER, &WriteRequest::new(node, handle, offset, data))
}

/// A filesystem with a file `f` whose extents are so many that a mount reads the root of their tree alone. The leaves that were not read, too, once
/// `warm` had its way, are unreadable.
fn with_unreadable_extents(warm: impl FnOnce(&Vfs)) -> (Arc<SimDevice>, Arc<Filesystem>) {
    let device = formatted(96 << 20);
    let filesystem = open(&device, OpenOptions::default());
    let file = create(filesystem.vfs(), "f");
    for block in 0..2000 {
        write(filesystem.vfs(), file, block * 8192, &[7; 4096]).unwrap();
    }
    filesystem.close().unwrap();
    let regions = regions(&device).unwrap();
    let leaves = regions.iter().filter(|region| region.name == "extents");
    // Nothing becomes durable by itself.
    let filesystem =
        open(&device, OpenOptions { commit_interval: Duration::from_secs(3600), ..OpenOptions::default() });
    warm(filesystem.vfs());
    leaves.flat_map(|leaf| &leaf.copies).for_each(|copy| device.make_bad(copy.start, copy.end - copy.start));
    (device, filesystem)
}

/// Where a file's extents cannot be read, its delayed data cannot be committed: whoever writes hears of it, and waits for ever for nothing.
#[test]
fn writers_do_not_wait_for_what_cannot_be_written_back() {
    let _limit = Limit::new();
    let (_device, filesystem) = with_unreadable_extents(|_| {});
    let (node, handle) = opened(filesystem.vfs(), "f", READ_WRITE);
    let (ended, end) = channel();
    let writer = Arc::clone(&filesystem);
    std::thread::spawn(move || {
        let outcome = (0..512_u64)
            .try_for_each(|piece| write(writer.vfs(), (node, handle), piece << 17, &vec![1; 1 << 17]).map(|_| ()));
        let _ = ended.send(outcome);
    });
    let outcome = end.recv_timeout(Duration::from_secs(60)).expect("a writer waits for ever");
    assert!(outcome.is_err(), "64 MiB were taken though nothing can be written");
    assert!(filesystem.vfs().fsync(&USER, node, handle, false).is_err());
    let _ = filesystem.close();
}

/// What happens before a read fails.
type Interlude = Box<dyn Fn() + Send>;

/// A device on which the reads of one thread fail, the first of them after something else has happened; and the first write of another one, after that.
struct Gate {
    inner: Arc<SimDevice>,
    closed_for: Mutex<Option<(ThreadId, Option<Interlude>)>>,
    writer: Mutex<Option<(ThreadId, Interlude)>>,
}

impl std::fmt::Debug for Gate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gate").finish_non_exhaustive()
    }
}

impl Gate {
    fn new(inner: Arc<SimDevice>) -> Arc<Self> {
        Arc::new(Self { inner, closed_for: Mutex::new(None), writer: Mutex::new(None) })
    }

    /// What the reads of the calling thread come to, if they fail.
    fn pass(&self) -> Option<Error> {
        let interlude = match self.closed_for.lock().unwrap().as_mut() {
            Some((thread, interlude)) if *thread == std::thread::current().id() => interlude.take(),
            _ => return None,
        };
        if let Some(interlude) = interlude {
            interlude();
        }
        let source = Arc::new(io::Error::from_raw_os_error(Errno::IO.raw_os_error()));
        Some(Error::Device { operation: "read", device: "gate".into(), offset: 0, length: 0, source })
    }
}

impl BlockDevice for Gate {
    coppicefs::as_the_device_below!(inner);

    fn is_read_only(&self) -> bool {
        self.inner.is_read_only()
    }

    fn read_batch(&self, requests: &mut [ReadRequest<'_>], landed: &mut dyn FnMut(usize, Result<()>)) {
        match self.pass() {
            None => self.inner.read_batch(requests, landed),
            Some(error) => (0..requests.len()).for_each(|index| landed(index, Err(error.clone()))),
        }
    }

    fn write_batch(&self, requests: &[DeviceWrite<'_>]) -> Result<()> {
        let is_its = |(thread, _): &mut (ThreadId, Interlude)| *thread == std::thread::current().id();
        let interlude = self.writer.lock().unwrap().take_if(is_its);
        if let Some((_, interlude)) = interlude {
            interlude();
        }
        self.inner.write_batch(requests)
    }

    fn flush(&self) -> Result<()> {
        self.inner.flush()
    }

    fn discard(&self, offset: u64, length: u64) -> Result<()> {
        self.inner.discard(offset, length)
    }
}

/// A write that ends early, whose first part was committed before: the time of the change is stored all the same.
#[test]
fn a_time_that_comes_after_the_commit_of_its_data_is_stored() {
    let _limit = Limit::new();
    let gate = Gate::new(formatted(96 << 20));
    let filesystem = open(&gate, OpenOptions::default());
    let file = create(filesystem.vfs(), "f");
    for piece in 0..9 {
        write(filesystem.vfs(), file, piece << 17, &vec![7; 1 << 17]).unwrap();
    }
    filesystem.close().unwrap();
    let filesystem = open(&gate, OpenOptions::default());
    let vfs = filesystem.vfs();
    let node = found(vfs, "f");
    let file = (node, vfs.open(&USER, node, READ_WRITE | NO_ACCESS_TIME).unwrap().handle);
    let before = attributes(vfs, node).modification_time;
    // The leaf of its extents is in memory from now on.
    read(vfs, file, 0, 4096);
    let other = Arc::clone(vfs);
    let interlude = move || {
        let vfs = Arc::clone(&other);
        std::thread::spawn(move || vfs.fsync(&USER, file.0, file.1, true).unwrap()).join().unwrap();
        assert!(attributes(&other, file.0).cacheable, "something is dirty after an fdatasync");
    };
    *gate.closed_for.lock().unwrap() = Some((std::thread::current().id(), Some(Box::new(interlude))));
    let written = write(vfs, file, 0, &vec![1; (1 << 20) + 100]).unwrap();
    *gate.closed_for.lock().unwrap() = None;
    assert_eq!(written, 1 << 20, "the last block cannot be read");
    let shown = attributes(vfs, node).modification_time;
    assert!(shown > before);
    filesystem.close().unwrap();
    let filesystem = open(&gate, OpenOptions::default());
    let node = found(filesystem.vfs(), "f");
    assert_eq!(attributes(filesystem.vfs(), node).modification_time, shown);
    filesystem.close().unwrap();
}

/// What was promised to delayed data of a file that is deleted comes back with its deletion, also if the file was read a moment ago.
#[test]
fn the_space_that_a_deleted_files_delayed_data_was_promised_comes_back() {
    let _limit = Limit::new();
    let device = formatted(96 << 20);
    let options = OpenOptions { writeback_age: Duration::from_secs(3600), ..OpenOptions::default() };
    let filesystem = open(&device, options);
    let vfs = filesystem.vfs();
    let before = filesystem.usage().available_bytes;
    let (node, handle) = create(vfs, "f");
    for piece in 0..16 {
        write(vfs, (node, handle), piece << 17, &vec![7; 1 << 17]).unwrap();
    }
    assert_eq!(read(vfs, (node, handle), 0, 4096), [7; 4096]);
    assert!(filesystem.usage().available_bytes + (2 << 20) <= before);
    vfs.unlink(&USER, ROOT, OsStr::new("f")).unwrap();
    vfs.release(node, handle).unwrap();
    vfs.forget(node, 1);
    vfs.wait_for_deletions().unwrap();
    let after = filesystem.usage().available_bytes;
    assert!(after + (1 << 20) > before, "{before} bytes were available, {after} are");
    filesystem.close().unwrap();
}

/// Those who wait for their turn to write a file back do not wait for ever if the file is deleted first.
#[test]
fn who_waits_to_write_back_what_is_deleted_meanwhile_goes_on() {
    const WAITERS: usize = 32;
    let _limit = Limit::new();
    let gate = Gate::new(formatted(96 << 20));
    let options = OpenOptions { writeback_age: Duration::from_secs(3600), ..OpenOptions::default() };
    let filesystem = open(&gate, options);
    let (ended, end) = channel();
    for round in 0..40 {
        let file = create(filesystem.vfs(), "f");
        write(filesystem.vfs(), file, 0, &[1; 16384]).unwrap();
        // One is at it, and has to wait for the device.
        let ((inside, is_inside), (free, is_free)) = (channel(), channel::<()>());
        let (first, gate, first_ended) = (Arc::clone(filesystem.vfs()), Arc::clone(&gate), ended.clone());
        std::thread::spawn(move || {
            let interlude = Box::new(move || {
                inside.send(()).unwrap();
                is_free.recv().unwrap();
            });
            *gate.writer.lock().unwrap() = Some((std::thread::current().id(), interlude));
            let _ = first_ended.send(first.sync());
        });
        is_inside.recv().unwrap();
        // More is dirty, and others want to write that.
        write(filesystem.vfs(), file, 16384, &[2; 16384]).unwrap();
        for _ in 0..WAITERS {
            let (vfs, ended) = (Arc::clone(filesystem.vfs()), ended.clone());
            std::thread::spawn(move || ended.send(vfs.sync()));
        }
        std::thread::sleep(Duration::from_millis(2));
        filesystem.vfs().unlink(&USER, ROOT, OsStr::new("f")).unwrap();
        filesystem.vfs().release(file.0, file.1).unwrap();
        filesystem.vfs().forget(file.0, 1);
        free.send(()).unwrap();
        for _ in 0..=WAITERS {
            let outcome = end.recv_timeout(Duration::from_secs(60));
            outcome.unwrap_or_else(|_| panic!("a sync waits for ever, in round {round}")).unwrap();
        }
    }
    filesystem.close().unwrap();
}

/// copy_file_range changes a file as write does.
#[test]
fn a_copy_is_durable_where_writes_are_and_refused_where_they_are() {
    const SET_FLAGS: u32 = 0x4008_6602;
    const IMMUTABLE: u32 = 0x10;
    let _limit = Limit::new();
    let device = formatted(96 << 20);
    let filesystem = open(&device, OpenOptions { synchronous: true, ..OpenOptions::default() });
    let vfs = filesystem.vfs();
    let (source, target) = (create(vfs, "source"), create(vfs, "target"));
    write(vfs, source, 0, &[7; 8192]).unwrap();
    let copy = CopyRequest {
        source_node: source.0,
        source_handle: source.1,
        source_offset: 0,
        target_node: target.0,
        target_handle: target.1,
        target_offset: 0,
        length_bytes: 8192,
    };
    assert_eq!(vfs.copy_file_range(&USER, &copy).unwrap(), 8192);
    let durable = device_of(device.snapshot().durable().clone());
    let flags = IMMUTABLE.to_le_bytes();
    let request = IoctlRequest {
        node: target.0,
        handle: target.1,
        directory: false,
        command: SET_FLAGS,
        input: &flags,
        output_bytes_max: 0,
    };
    vfs.ioctl(&USER, &request).unwrap();
    assert_eq!(vfs.copy_file_range(&USER, &copy).unwrap_err().errno(), Errno::PERM);
    filesystem.close().unwrap();

    let filesystem = open(&durable, OpenOptions::default());
    let vfs = filesystem.vfs();
    let (node, handle) = opened(vfs, "target", 0);
    assert!(read(vfs, (node, handle), 0, 8192) == [7; 8192], "a copy was lost on a synchronous mount");
    filesystem.close().unwrap();
}

/// A file that cannot be written back is no reason to leave the others' changes undurable.
#[test]
fn a_sync_that_fails_for_one_file_makes_all_else_durable() {
    let _limit = Limit::new();
    let (device, filesystem) = with_unreadable_extents(|_| {});
    let vfs = filesystem.vfs();
    let (node, handle) = opened(vfs, "f", READ_WRITE);
    write(vfs, (node, handle), 0, &[1; 4096]).unwrap();
    vfs.mkdir(&USER, ROOT, OsStr::new("d"), 0o755).unwrap();
    assert!(vfs.sync().unwrap_err().is_media_error());
    let durable = device_of(device.snapshot().durable().clone());
    let _ = filesystem.close();
    let filesystem = open(&durable, OpenOptions::default());
    found(filesystem.vfs(), "d");
    filesystem.close().unwrap();
}

/// A descriptor that is closed, by a child that ends perhaps, takes no error away from the others of its handle.
#[test]
fn an_error_that_a_close_was_told_is_told_the_next_fsync_once() {
    let _limit = Limit::new();
    let (device, filesystem) = with_unreadable_extents(|_| {});
    let vfs = filesystem.vfs();
    let (node, handle) = opened(vfs, "f", READ_WRITE);
    write(vfs, (node, handle), 0, &[1; 4096]).unwrap();
    assert!(vfs.sync().unwrap_err().is_media_error());
    device.clear_faults();
    vfs.sync().unwrap();
    for _ in 0..2 {
        assert!(vfs.flush(&USER, node, handle).unwrap_err().is_media_error());
    }
    assert!(vfs.fsync(&USER, node, handle, false).unwrap_err().is_media_error());
    vfs.fsync(&USER, node, handle, false).unwrap();
    vfs.flush(&USER, node, handle).unwrap();
    filesystem.close().unwrap();
}

/// A truncation that has begun and cannot go on, since extents cannot be read: the next mount will finish it. What was acknowledged in between is not cut off.
#[test]
fn what_is_acknowledged_after_a_truncation_that_stopped_half_way_stays() {
    let _limit = Limit::new();
    // The first leaf is in memory.
    let (device, filesystem) = with_unreadable_extents(|vfs| {
        let (node, handle) = opened(vfs, "f", 0);
        read(vfs, (node, handle), 0, 4096);
        vfs.release(node, handle).unwrap();
    });
    let vfs = filesystem.vfs();
    let (node, handle) = opened(vfs, "f", READ_WRITE);
    let cut = SetAttributes { size_bytes: Some(0), ..SetAttributes::default() };
    assert!(vfs.set_attributes(&USER, node, &cut).unwrap_err().is_media_error());
    let is_acknowledged = write(vfs, (node, handle), 0, &[1; 4096])
        .and_then(|_| vfs.fsync(&USER, node, handle, false))
        .inspect_err(|error| eprintln!("refused: {error}"))
        .is_ok();
    let _ = filesystem.close();
    device.clear_faults();
    let filesystem = open(&device, OpenOptions::default());
    let (node, handle) = opened(filesystem.vfs(), "f", 0);
    let shown = read(filesystem.vfs(), (node, handle), 0, 4096);
    // One that was refused is there or not, as a crash is.
    let expected: &[&[u8]] = if is_acknowledged { &[&[1; 4096]] } else { &[&[], &[7; 4096]] };
    assert!(expected.contains(&shown.as_slice()), "{is_acknowledged}: {} bytes, {:?}", shown.len(), shown.first());
    filesystem.close().unwrap();
}

/// A file whose extents cannot be read cannot be deleted whole. That is no reason to stop everybody else.
#[test]
fn a_deletion_that_meets_damage_stops_nobody() {
    let _limit = Limit::new();
    let (_device, filesystem) = with_unreadable_extents(|_| {});
    let vfs = filesystem.vfs();
    let node = found(vfs, "f");
    vfs.unlink(&USER, ROOT, OsStr::new("f")).unwrap();
    vfs.forget(node, 1);
    vfs.wait_for_deletions().unwrap();
    assert_eq!(filesystem.latched(), None);
    vfs.mkdir(&USER, ROOT, OsStr::new("d"), 0o755).unwrap();
    filesystem.close().unwrap();
}

/// However many attributes a file has, they are listed in pieces, and all of them.
#[test]
fn many_attributes_are_all_listed_or_refused() {
    let _limit = Limit::new();
    let device = formatted(96 << 20);
    let filesystem = open(&device, OpenOptions::default());
    let vfs = filesystem.vfs();
    let (node, _) = create(vfs, "f");
    let name = |number: u32| format!("user.{}{number:03}", "n".repeat(200));
    for number in 0..300 {
        vfs.set_xattr(&USER, node, OsStr::new(&name(number)), b"value", 0).unwrap();
    }
    vfs.set_xattr(&USER, node, OsStr::new("trusted.t"), b"value", 0).unwrap();
    let listed = |uid| {
        let list = vfs.list_xattrs(&Caller { uid, ..USER }, node)?;
        let mut names: Vec<_> =
            list.split(|&byte| byte == 0).map(|name| String::from_utf8(name.to_vec()).unwrap()).collect();
        names.sort();
        Ok::<_, Error>(names)
    };
    let mut expected: Vec<_> = (0..300).map(name).chain([String::new()]).collect();
    expected.sort();
    assert_eq!(listed(1).unwrap(), expected);
    expected.push("trusted.t".into());
    expected.sort();
    assert_eq!(listed(0).unwrap(), expected);
    for number in 300..330 {
        vfs.set_xattr(&USER, node, OsStr::new(&name(number)), b"value", 0).unwrap();
    }
    assert_eq!(listed(0).unwrap_err().errno(), Errno::TOOBIG);
    filesystem.close().unwrap();
}

/// Names at places that no hash leads to are damage; a listing ends all the same.
#[test]
fn a_listing_of_a_damaged_directory_ends() {
    let _limit = Limit::new();
    let device = formatted(96 << 20);
    let filesystem = open(&device, OpenOptions::default());
    create(filesystem.vfs(), "f");
    let damage = |transaction: &mut Transaction<'_>| {
        for number in 0..300 {
            let dirent = Dirent {
                discriminator: 0,
                file_type: FileType::Regular,
                inode: InodeNumber(2),
                name: format!("{number}").into_bytes(),
            };
            let position = Position::new(ROOT, (1 << 57) + number, SnapshotId::ROOT.0);
            transaction.put(BtreeId::Dirents, position, DirentBucket(vec![dirent]).encode());
        }
        Ok(())
    };
    filesystem.transactions().run(CommitOptions::default(), damage).unwrap();
    let (ended, end) = channel();
    let vfs = Arc::clone(filesystem.vfs());
    std::thread::spawn(move || {
        let mut names = Vec::new();
        let outcome = vfs.readdir(&USER, ROOT, 0, 0, &mut |entry| {
            names.push(entry.name.to_owned());
            Emitted::Accepted
        });
        let _ = ended.send(outcome.map(|()| names));
    });
    let names = end.recv_timeout(Duration::from_secs(30)).expect("a listing has no end").unwrap();
    assert!(names.contains(&"f".into()) && names.len() < 400, "{} names", names.len());
    filesystem.close().unwrap();
}
