//! Files and disks in every way of doing I/O: against a vector, locks, loop devices, truncation, panics.

use std::os::unix::fs::FileExt;
use std::process::Command;

use proptest::prelude::*;

use super::*;
use crate::device::{ImageIdentity, is_same_image, lock_holders};

const SIZE: u64 = 1 << 20;

/// All ways to do I/O: each test that moves bytes runs with every one.
fn ways() -> Vec<FileOptions> {
    let mut ways = Vec::new();
    for backend in [Backend::IoUring, Backend::Threads] {
        for direct_io in [DirectIo::Auto, DirectIo::Never] {
            ways.push(FileOptions { backend, direct_io, ..FileOptions::default() });
        }
    }
    if let Err(error) = Rings::new() {
        eprintln!("this kernel has no io_uring for us, only threads are tested: {error}");
        ways.retain(|way| way.backend != Backend::IoUring);
    }
    ways
}

fn folders() -> Vec<tempfile::TempDir> {
    // A disk filesystem, and tmpfs, which does not do direct I/O on older kernels.
    let mut folders = vec![tempfile::tempdir_in(".").unwrap()];
    folders.extend(tempfile::tempdir_in("/dev/shm"));
    folders
}

fn read_only() -> FileOptions {
    FileOptions { read_only: true, ..FileOptions::default() }
}

/// One batch of the model test: offset and length in blocks, how far the memory is off alignment, how the data is cut.
type Piece = (u64, u64, usize, usize);

#[derive(Clone, Debug)]
enum Operation {
    Write(Vec<Piece>),
    Read(Vec<Piece>),
    Discard(u64, u64),
    Flush,
}

fn piece() -> impl Strategy<Value = Piece> {
    (
        0u64..1900,
        1u64..130,
        prop_oneof![3 => Just(0usize), 1 => 1usize..600],
        prop_oneof![Just(512usize), Just(4096), 1usize..5000],
    )
        .prop_map(|(start, length, off, cut)| (start, length.min(2048 - start), off, cut))
}

fn operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        4 => prop::collection::vec(piece(), 1..12).prop_map(Operation::Write),
        4 => prop::collection::vec(piece(), 1..12).prop_map(Operation::Read),
        1 => (0u64..2000, 1u64..48).prop_map(|(start, length)| Operation::Discard(start, length)),
        1 => Just(Operation::Flush),
    ]
}

fn check_against_a_vector(device: &FileDevice, operations: &[Operation]) {
    let mut model = vec![0u8; SIZE as usize];
    let mut tag = 0u8;
    for operation in operations {
        match operation {
            Operation::Write(pieces) => {
                // No order inside a batch, so pieces do not overlap.
                let mut taken: Vec<std::ops::Range<u64>> = Vec::new();
                let mut buffers = Vec::new();
                for &(start, length, off, cut) in pieces {
                    if taken.iter().any(|range| range.start < start + length && start < range.end) {
                        continue;
                    }
                    taken.push(start..start + length);
                    tag = tag.wrapping_add(1);
                    let mut buffer = AlignedBuffer::zeroed(off + length as usize * 512);
                    (0..)
                        .zip(&mut buffer[off..])
                        .for_each(|(index, byte): (usize, _)| *byte = tag ^ (index / 512) as u8);
                    let at = start as usize * 512;
                    model[at..at + length as usize * 512].copy_from_slice(&buffer[off..]);
                    buffers.push((start * 512, buffer, off, cut));
                }
                let requests: Vec<_> = buffers
                    .iter()
                    .map(|(offset, buffer, off, cut)| WriteRequest {
                        offset: *offset,
                        data: buffer[*off..].chunks(*cut).collect(),
                    })
                    .collect();
                device.write_batch(&requests).unwrap();
            }
            Operation::Read(pieces) => {
                let mut buffers: Vec<_> = pieces
                    .iter()
                    .map(|&(start, length, off, _)| {
                        (start * 512, AlignedBuffer::zeroed(off + length as usize * 512), off)
                    })
                    .collect();
                let mut requests: Vec<_> = buffers
                    .iter_mut()
                    .map(|(offset, buffer, off)| ReadRequest { offset: *offset, buffer: &mut buffer[*off..] })
                    .collect();
                let mut landings = vec![0; requests.len()];
                device.read_batch(&mut requests, &mut |index, outcome| {
                    outcome.unwrap();
                    landings[index] += 1;
                });
                assert!(landings.iter().all(|&count| count == 1), "{landings:?}");
                for (offset, buffer, off) in &buffers {
                    let at = *offset as usize;
                    assert!(buffer[*off..] == model[at..at + buffer.len() - off], "wrong bytes at {at}");
                }
            }
            Operation::Discard(start, length) => {
                let (offset, length) = (start * 512, length * 512);
                device.discard(offset, length).unwrap();
                // Undefined: take over what is there.
                device.read(offset, &mut model[offset as usize..(offset + length) as usize]).unwrap();
            }
            Operation::Flush => device.flush().unwrap(),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn every_way_moves_the_right_bytes(operations in prop::collection::vec(operation(), 1..16)) {
        for folder in folders() {
            for (number, options) in ways().into_iter().enumerate() {
                let path = folder.path().join(number.to_string());
                let device = FileDevice::create(&path, SIZE, Creation::Careful, &options).unwrap();
                prop_assert_eq!(device.uses_io_uring(), options.backend == Backend::IoUring);
                if device.block_bytes() == 512 {
                    check_against_a_vector(&device, &operations);
                }
            }
        }
    }
}

#[test]
fn direct_io_is_used_where_the_host_does_it_and_given_up_where_not() {
    for folder in folders() {
        let path = folder.path().join("image");
        let device = FileDevice::create(&path, SIZE, Creation::Careful, &FileOptions::default()).unwrap();
        let flags = rustix::fs::fcntl_getfl(&device.file).unwrap();
        assert_eq!(flags.contains(OFlags::DIRECT), device.is_direct());
        drop(device);
        let options = FileOptions { direct_io: DirectIo::Never, ..FileOptions::default() };
        assert!(!FileDevice::open(&path, &options).unwrap().is_direct());
    }
    // The files of /proc refuse the flag, on every kernel.
    let file = File::open("/proc/version").unwrap();
    assert!(enable_direct(&file).is_none());
    assert!(!rustix::fs::fcntl_getfl(&file).unwrap().contains(OFlags::DIRECT));
}

#[test]
fn batches_beyond_the_ring_and_slices_beyond_one_call_are_done_in_parts() {
    let folder = tempfile::tempdir_in(".").unwrap();
    for options in ways() {
        let path = folder.path().join("image");
        let device = FileDevice::create(&path, 8 << 20, Creation::Careful, &options).unwrap();
        let block = u64::from(device.block_bytes());
        let data = AlignedBuffer::copy_of(&(0..4u32 << 20).map(|index| (index / 512 % 251) as u8).collect::<Vec<_>>())
            .unwrap();
        // More slices than one call takes, in one request.
        let slices: Vec<&[u8]> = data.chunks(512.max(block as usize)).collect();
        assert!(slices.len() >= 1024);
        device.write_batch(&[WriteRequest { offset: 4 << 20, data: slices.clone() }]).unwrap();
        // More requests than the ring holds.
        let requests: Vec<_> = (0u64..)
            .zip(&slices)
            .map(|(index, slice)| WriteRequest { offset: index * block, data: vec![slice] })
            .collect();
        device.write_batch(&requests).unwrap();
        let mut read = vec![0; 8 << 20];
        let mut pieces: Vec<_> = (0u64..)
            .zip(read.chunks_mut(block as usize))
            .map(|(index, buffer)| ReadRequest { offset: index * block, buffer })
            .collect();
        let mut landed = 0;
        device.read_batch(&mut pieces, &mut |_, outcome| {
            outcome.unwrap();
            landed += 1;
        });
        assert_eq!(landed, (8 << 20) / block);
        assert!(read[..4 << 20] == data[..] && read[4 << 20..] == data[..]);
        drop(device);
        fs::remove_file(path).unwrap();
    }
}

#[test]
fn many_threads_submit_at_once() {
    let folder = tempfile::tempdir_in(".").unwrap();
    for options in ways() {
        let path = folder.path().join("image");
        let device = FileDevice::create(&path, SIZE, Creation::Careful, &options).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..8u64 {
                let device = &device;
                scope.spawn(move || {
                    let base = thread * (SIZE / 8);
                    for round in 0..20u8 {
                        let data = AlignedBuffer::copy_of(&[thread as u8 * 32 + round; 16384]).unwrap();
                        let requests: Vec<_> = (0..4)
                            .map(|index| WriteRequest { offset: base + index * 16384, data: vec![&data] })
                            .collect();
                        device.write_batch(&requests).unwrap();
                        let mut read = AlignedBuffer::zeroed(65536);
                        let mut pieces: Vec<_> = (0u64..)
                            .zip(read.chunks_mut(16384))
                            .map(|(index, buffer)| ReadRequest { offset: base + index * 16384, buffer })
                            .collect();
                        device.read_batch(&mut pieces, &mut |_, outcome| outcome.unwrap());
                        assert!(read.iter().all(|&byte| byte == thread as u8 * 32 + round));
                    }
                });
            }
        });
    }
}

#[test]
fn a_panic_while_reads_land_waits_for_the_rest_and_leaves_the_device_usable() {
    let folder = tempfile::tempdir_in(".").unwrap();
    for options in ways() {
        let path = folder.path().join("image");
        let device = FileDevice::create(&path, SIZE, Creation::Careful, &options).unwrap();
        device.write(0, &[7; SIZE as usize]).unwrap();
        for round in 0..10 {
            let mut read = AlignedBuffer::zeroed(SIZE as usize);
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                let mut pieces: Vec<_> = (0u64..)
                    .zip(read.chunks_mut(4096))
                    .map(|(index, buffer)| ReadRequest { offset: index * 4096, buffer })
                    .collect();
                let mut count = 0;
                device.read_batch(&mut pieces, &mut |_, _| {
                    count += 1;
                    assert!(count != 1 + round * 20, "on purpose");
                });
            }));
            assert!(outcome.is_err());
            // Nobody writes to this memory any more.
            read.fill(1);
            std::thread::yield_now();
            assert!(read.iter().all(|&byte| byte == 1));
        }
        let mut read = [0; 4096];
        device.read(4096, &mut read).unwrap();
        assert_eq!(read, [7; 4096]);
    }
}

#[test]
fn a_truncated_image_gives_a_clear_error_for_what_is_gone_only() {
    let folder = tempfile::tempdir_in(".").unwrap();
    for options in ways() {
        let path = folder.path().join("image");
        let device = FileDevice::create(&path, SIZE, Creation::Careful, &options).unwrap();
        device.write(0, &[1; 65536]).unwrap();
        // Inside a sector: direct reads stop there with a short count.
        File::options().write(true).open(&path).unwrap().set_len(40_000).unwrap();
        let mut buffers = [[0u8; 8192], [0; 8192], [0; 8192]];
        let offsets = [0, 36_864, 65_536];
        let mut requests: Vec<_> = offsets
            .iter()
            .zip(&mut buffers)
            .map(|(&offset, buffer)| ReadRequest { offset, buffer: &mut buffer[..] })
            .collect();
        let mut outcomes: Vec<Option<Result<()>>> = vec![None, None, None];
        device.read_batch(&mut requests, &mut |index, outcome| outcomes[index] = Some(outcome));
        assert!(matches!(outcomes[0], Some(Ok(()))), "{outcomes:?}");
        for outcome in &outcomes[1..] {
            match outcome {
                Some(Err(Error::Device { source, .. })) => {
                    assert_eq!(source.kind(), io::ErrorKind::UnexpectedEof, "{source}")
                }
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(buffers[0], [1; 8192]);
        drop(device);
        // Opened anew, the size is known and whole blocks only are there.
        let device = FileDevice::open(&path, &options).unwrap();
        assert_eq!(device.size_bytes(), 40_000 - 40_000 % u64::from(device.block_bytes()));
        let message = device.read(65_536, &mut [0; 4096]).unwrap_err().to_string();
        assert!(message.contains("ends at byte"), "{message}");
        drop(device);
        fs::remove_file(&path).unwrap();
    }
}

#[test]
fn writes_never_make_an_image_longer() {
    let folder = tempfile::tempdir_in(".").unwrap();
    for options in ways() {
        let device = FileDevice::create(folder.path().join("image"), SIZE, Creation::Careful, &options).unwrap();
        assert!(device.write(SIZE - 4096, &[1; 8192]).is_err());
        assert!(device.write(SIZE, &[1; 4096]).is_err());
        assert!(device.write(u64::MAX - 4095, &[1; 4096]).is_err());
        assert!(device.discard(SIZE - 4096, 8192).is_err());
        assert!(device.preallocate(SIZE - 4096, 8192).is_err());
        assert_eq!(device.file.metadata().unwrap().len(), SIZE);
    }
}

#[test]
fn a_read_only_device_is_not_written() {
    let folder = tempfile::tempdir_in(".").unwrap();
    let path = folder.path().join("image");
    drop(FileDevice::create(&path, SIZE, Creation::Careful, &FileOptions::default()).unwrap());
    let mut device = FileDevice::open(&path, &read_only()).unwrap();
    assert!(device.is_read_only());
    assert!(matches!(device.write(0, &[1; 4096]), Err(Error::ReadOnly)));
    assert!(matches!(device.discard(0, 4096), Err(Error::ReadOnly)));
    assert!(matches!(device.preallocate(0, 4096), Err(Error::ReadOnly)));
    assert!(matches!(device.resize(0, Creation::Force), Err(Error::ReadOnly)));
    device.flush().unwrap();
    device.read(0, &mut [0; 4096]).unwrap();
}

#[test]
fn one_writer_or_many_readers_have_an_image() {
    let folder = tempfile::tempdir_in(".").unwrap();
    let path = folder.path().join("image");
    let writer = FileDevice::create(&path, SIZE, Creation::Careful, &FileOptions::default()).unwrap();
    for options in [FileOptions::default(), read_only()] {
        match FileDevice::open(&path, &options) {
            Err(Error::InUse { processes, user, .. }) => {
                assert_eq!(processes, [std::process::id()], "{user}");
                assert!(user.contains(&std::process::id().to_string()));
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(lock_holders(&path), [std::process::id()]);
    assert!(matches!(
        FileDevice::create(&path, 2 * SIZE, Creation::Force, &FileOptions::default()),
        Err(Error::InUse { .. })
    ));
    assert_eq!(fs::metadata(&path).unwrap().len(), SIZE);
    FileDevice::open(&path, &FileOptions { lock: false, read_only: true, ..FileOptions::default() }).unwrap();
    drop(writer);
    let reader = FileDevice::open(&path, &read_only()).unwrap();
    let other = FileDevice::open(&path, &read_only()).unwrap();
    assert!(matches!(FileDevice::open(&path, &FileOptions::default()), Err(Error::InUse { .. })));
    drop((reader, other));
    FileDevice::open(&path, &FileOptions::default()).unwrap();
}

/// The kernel's io_uring workers, and children of other threads before their exec, keep the open file for a moment after the device is
/// gone. The lock must not stay with it: a mount right after mkfs in one process was refused at times.
#[test]
fn the_lock_ends_with_the_device_whoever_still_holds_the_file() {
    let folder = tempfile::tempdir_in(".").unwrap();
    let path = folder.path().join("image");
    let device = FileDevice::create(&path, SIZE, Creation::Careful, &FileOptions::default()).unwrap();
    let held = device.file.try_clone().unwrap();
    assert!(matches!(FileDevice::open(&path, &FileOptions::default()), Err(Error::InUse { .. })));
    drop(device);
    FileDevice::open(&path, &FileOptions::default()).unwrap();
    drop(held);
}

#[test]
fn a_holder_that_goes_away_is_waited_for() {
    let folder = tempfile::tempdir_in(".").unwrap();
    let path = folder.path().join("image");
    let mut holder = Some(FileDevice::create(&path, SIZE, Creation::Careful, &FileOptions::default()).unwrap());
    let mut asked = 0;
    FileDevice::open_waiting(&path, &FileOptions::default(), |error, _| {
        assert!(matches!(error, Error::InUse { .. }));
        asked += 1;
        if asked == 3 {
            holder = None;
        }
        true
    })
    .unwrap();
    assert_eq!(asked, 3);
    let _holder = FileDevice::open(&path, &FileOptions::default()).unwrap();
    let refused =
        FileDevice::open_waiting(&path, &FileOptions::default(), |_, waited| waited < Duration::from_millis(30));
    assert!(matches!(refused, Err(Error::InUse { .. })));
}

#[test]
fn only_files_and_disks_are_opened() {
    let folder = tempfile::tempdir_in(".").unwrap();
    for options in [FileOptions::default(), read_only()] {
        let message = FileDevice::open(folder.path(), &options).unwrap_err().to_string();
        assert!(message.contains("is a directory"), "{message}");
        assert!(matches!(FileDevice::open("/dev/null", &options), Err(Error::Unusable(_))));
        let missing = FileDevice::open(folder.path().join("missing"), &options).unwrap_err();
        assert_eq!(missing.errno(), Errno::NOENT);
    }
    let fifo = folder.path().join("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, Mode::RWXU, 0).unwrap();
    assert!(matches!(FileDevice::open(&fifo, &read_only()), Err(Error::Unusable(_))));
    // An empty file is a device of no bytes: every read of it says where it ends.
    fs::write(folder.path().join("empty"), "").unwrap();
    let empty = FileDevice::open(folder.path().join("empty"), &FileOptions::default()).unwrap();
    assert_eq!(empty.size_bytes(), 0);
    assert!(empty.read(0, &mut [0; 4096]).is_err());
}

#[test]
fn creating_never_cuts_an_image_off_unless_told() {
    let folder = tempfile::tempdir_in(".").unwrap();
    let path = folder.path().join("image");
    let options = FileOptions::default();
    let create = |size, creation| FileDevice::create(&path, size, creation, &options);
    let device = create(8 << 40, Creation::Careful).unwrap();
    assert_eq!(device.size_bytes(), 8 << 40);
    device.write(0, &[5; 4096]).unwrap();
    drop(device);
    assert!(matches!(create(SIZE, Creation::Careful), Err(Error::Invalid(_))));
    assert_eq!(fs::metadata(&path).unwrap().len(), 8 << 40);
    drop(create(8 << 40, Creation::Careful).unwrap());
    let mut device = create(SIZE, Creation::Force).unwrap();
    let mut read = [0; 4096];
    device.read(0, &mut read).unwrap();
    assert_eq!(read, [5; 4096]);
    assert!(matches!(device.resize(4096, Creation::Careful), Err(Error::Invalid(_))));
    device.resize(2 * SIZE, Creation::Careful).unwrap();
    assert_eq!(device.size_bytes(), 2 * SIZE);
    device.write(2 * SIZE - 4096, &[6; 4096]).unwrap();
    // What cannot be made leaves nothing behind.
    let too_large = folder.path().join("too-large");
    assert!(FileDevice::create(&too_large, u64::MAX / 2, Creation::Careful, &options).is_err());
    assert!(!too_large.exists());
    assert!(FileDevice::create(folder.path(), SIZE, Creation::Force, &options).is_err());
    assert!(folder.path().is_dir());
}

#[test]
fn discarding_and_preallocating_change_what_the_host_has_set_aside() {
    let folder = tempfile::tempdir_in(".").unwrap();
    let path = folder.path().join("image");
    let device = FileDevice::create(&path, SIZE, Creation::Careful, &FileOptions::default()).unwrap();
    let used = || std::os::unix::fs::MetadataExt::blocks(&fs::metadata(&path).unwrap()) * 512;
    assert_eq!(used(), 0);
    if device.preallocate(0, SIZE / 2).unwrap() {
        assert!(used() >= SIZE / 2);
    }
    device.write(0, &[1; SIZE as usize / 2]).unwrap();
    device.flush().unwrap();
    assert!(used() >= SIZE / 2);
    device.discard(0, SIZE / 2).unwrap();
    if device.discards.load(Ordering::Relaxed) {
        device.flush().unwrap();
        assert!(used() < SIZE / 2);
    }
    assert_eq!(fs::metadata(&path).unwrap().len(), SIZE);
}

/// A loop device on a file, for tests that run as root where the kernel has them.
struct Loop(String);

impl Loop {
    fn new(path: &Path) -> Option<Self> {
        let output = Command::new("losetup").args(["--find", "--show"]).arg(path).output().ok()?;
        if !output.status.success() {
            eprintln!("not tested, no loop devices here: {}", String::from_utf8_lossy(&output.stderr));
            return None;
        }
        Some(Self(String::from_utf8(output.stdout).ok()?.trim().to_owned()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

#[test]
fn a_loop_device_and_its_file_are_one_image() {
    let folder = tempfile::tempdir_in(".").unwrap();
    let path = folder.path().join("image");
    drop(FileDevice::create(&path, 4 * SIZE, Creation::Careful, &FileOptions::default()).unwrap());
    let Some(device) = Loop::new(&path) else { return };
    assert!(is_same_image(&path, Path::new(&device.0)));
    assert!(!is_same_image(&path, folder.path()));
    assert!(matches!(ImageIdentity::of(Path::new(&device.0)), Ok(ImageIdentity::File { .. })));
    let options = FileOptions::default();
    // Open by the loop device: the file is locked.
    let by_loop = FileDevice::open(&device.0, &options).unwrap();
    assert!(by_loop.is_disk());
    assert_eq!(by_loop.size_bytes(), 4 * SIZE);
    assert!(matches!(FileDevice::open(&path, &options), Err(Error::InUse { .. })));
    assert!(matches!(FileDevice::open(&path, &read_only()), Err(Error::InUse { .. })));
    assert!(matches!(FileDevice::open(&device.0, &options), Err(Error::InUse { .. })));
    assert!(FileDevice::create(&device.0, SIZE, Creation::Force, &options).is_err());
    drop(by_loop);
    // Open by the file: the loop device is locked.
    let by_file = FileDevice::open(&path, &options).unwrap();
    assert!(matches!(FileDevice::open(&device.0, &options), Err(Error::InUse { .. })));
    drop(by_file);
    // Readers share, by either name.
    let by_file = FileDevice::open(&path, &read_only()).unwrap();
    let by_loop = FileDevice::open(&device.0, &read_only()).unwrap();
    drop((by_file, by_loop));
    // Claimed by somebody who knows nothing of our locks, as the kernel does for a mount.
    let claim = rustix::fs::open(&*device.0, OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC, Mode::empty()).unwrap();
    for name in [path.as_path(), Path::new(&device.0)] {
        match FileDevice::open(name, &options) {
            Err(error @ Error::InUse { .. }) => assert!(error.to_string().contains("/dev/loop"), "{error}"),
            other => panic!("{other:?}"),
        }
        FileDevice::open(name, &read_only()).unwrap();
    }
    drop(claim);
    FileDevice::open(&path, &options).unwrap();
}

#[test]
fn a_disk_is_read_written_and_discarded_in_every_way() {
    let folder = tempfile::tempdir_in(".").unwrap();
    let path = folder.path().join("image");
    fs::write(&path, "").unwrap();
    File::options().write(true).open(&path).unwrap().set_len(SIZE).unwrap();
    let Some(disk) = Loop::new(&path) else { return };
    for options in ways() {
        let device = FileDevice::open(&disk.0, &options).unwrap();
        let operations = [
            Operation::Write(vec![(0, 8, 0, 4096), (100, 33, 3, 700), (1000, 64, 0, 512)]),
            Operation::Read(vec![(0, 8, 0, 1), (100, 33, 0, 1), (99, 2, 5, 1)]),
            Operation::Discard(96, 64),
            Operation::Flush,
            Operation::Read(vec![(0, 128, 0, 1), (1000, 64, 0, 1)]),
        ];
        // What an earlier way wrote is not part of the model.
        device.write(0, &[0; SIZE as usize]).unwrap();
        check_against_a_vector(&device, &operations);
        assert!(!device.preallocate(0, 4096).unwrap());
    }
    // It went to the file.
    let mut read = [0; 512];
    File::open(&path).unwrap().read_exact_at(&mut read, 512_000).unwrap();
    assert_ne!(read, [0; 512]);
}

#[test]
fn a_child_process_does_not_use_the_rings_of_its_parent() {
    let folder = tempfile::tempdir_in(".").unwrap();
    for options in ways() {
        let path = folder.path().join("image");
        let device = FileDevice::create(&path, SIZE, Creation::Careful, &options).unwrap();
        if let Engine::Rings(rings) = &device.engine {
            // As it looks in a child: a ring of another process in the list. Forgetting it leaks it here, once.
            rings.pretend_other_process();
        }
        let data = [3; 4096];
        let requests: Vec<_> = (0..4).map(|index| WriteRequest { offset: index * 4096, data: vec![&data] }).collect();
        device.write_batch(&requests).unwrap();
        let mut read = [0; 16384];
        device.read(0, &mut read).unwrap();
        assert_eq!(read, [3; 16384]);
    }
}
