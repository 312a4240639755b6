//! Programs whose buffers are mappings of files on the mount, which make a filesystem wait for itself where it holds a lock while it touches
//! memory: each ends in time with right contents, in every cache mode.

mod mapping;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;

use coppicefs_tests::mount::Site;
use mapping::Mapping;
use rustix::fs::{SeekFrom, seek, sendfile};
use rustix::io::Errno;
use rustix::pipe::{SpliceFlags, pipe, splice};

const MODES: [&str; 3] = ["cache=kernel", "cache=writeback", "cache=daemon"];
/// For one program; they take a fraction of a second.
const LIMIT: Duration = Duration::from_secs(60);
const PAGE: usize = 4096;
const FILE_BYTES: usize = 1 << 20;

/// Bytes that tell where they belong.
fn pattern(tag: u8) -> Vec<u8> {
    (0..FILE_BYTES).map(|at| (at / PAGE) as u8 ^ (at % 251) as u8 ^ tag).collect()
}

/// A new file with [`pattern`], whose pages neither cache holds as dirty.
fn new_file(path: &Path, tag: u8) -> File {
    let mut file = File::options().create_new(true).read(true).write(true).open(path).unwrap();
    file.write_all(&pattern(tag)).unwrap();
    file.sync_all().unwrap();
    file
}

fn open(path: &Path, direct: bool) -> File {
    let flags = if direct { direct_flag() } else { 0 };
    File::options().read(true).write(true).custom_flags(flags).open(path).unwrap()
}

fn direct_flag() -> i32 {
    i32::try_from(rustix::fs::OFlags::DIRECT.bits()).unwrap()
}

/// What a read or write may come to: all of it, or an error that says that the buffer could not be reached.
fn all_or_fault(outcome: std::io::Result<usize>, wanted: usize) -> bool {
    match outcome {
        Ok(bytes) => {
            assert_eq!(bytes, wanted);
            true
        }
        Err(error) => {
            assert_eq!(error.raw_os_error(), Some(Errno::FAULT.raw_os_error()), "{error}");
            false
        }
    }
}

/// Runs a program on a mount of each mode, within the limit; fsck is clean after it.
fn in_every_mode(program: fn(&Path)) {
    for mode in MODES {
        let Some(site) = Site::formatted("128M", &[]) else { return };
        site.mount(mode);
        let (done, ended) = channel();
        let folder = site.mnt();
        let running = std::thread::spawn(move || {
            program(&folder);
            let _ = done.send(());
        });
        if ended.recv_timeout(LIMIT) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            // Whoever waits for it gets an error.
            site.kill();
            panic!("{mode}: it hangs");
        }
        running.join().unwrap_or_else(|_| panic!("{mode}: it failed"));
        site.unmount_and_check();
    }
}

/// Offsets in the file and in its mapping: the same range, overlapping ones, different ones.
const RANGES: [(usize, usize); 4] = [(0, 0), (0, 32 << 10), (512 << 10, 0), (256 << 10, 260 << 10)];
const RANGE_BYTES: usize = 64 << 10;

#[test]
fn reads_into_a_mapping_of_the_same_file() {
    in_every_mode(|folder| {
        for (index, (at, to)) in RANGES.into_iter().enumerate() {
            for (direct, resident) in [(false, false), (false, true), (true, false), (true, true)] {
                let path = folder.join(format!("file {index} {direct} {resident}"));
                let file = new_file(&path, 1);
                let mut expected = pattern(1);
                let mut mapping = Mapping::new(&file, FILE_BYTES);
                if resident {
                    assert!(mapping.bytes() == expected);
                } else {
                    mapping.forget();
                }
                let reader = open(&path, direct);
                let outcome = reader.read_at(&mut mapping.bytes()[to..to + RANGE_BYTES], at as u64);
                let is_disjoint = at + RANGE_BYTES <= to || to + RANGE_BYTES <= at;
                if all_or_fault(outcome, RANGE_BYTES) && (is_disjoint || at == to) {
                    let source = expected[at..at + RANGE_BYTES].to_vec();
                    expected[to..to + RANGE_BYTES].copy_from_slice(&source);
                    mapping.flush().unwrap();
                    assert!(mapping.bytes() == expected, "{at} {to} {direct} {resident}");
                    drop(mapping);
                    assert!(fs::read(&path).unwrap() == expected, "{at} {to} {direct} {resident}");
                }
            }
        }
    });
}

#[test]
fn writes_from_a_mapping_of_the_same_file() {
    in_every_mode(|folder| {
        for (index, (at, from)) in RANGES.into_iter().enumerate() {
            for (direct, resident) in [(false, false), (false, true), (true, false), (true, true)] {
                let path = folder.join(format!("file {index} {direct} {resident}"));
                let file = new_file(&path, 2);
                let mut expected = pattern(2);
                let mut mapping = Mapping::new(&file, FILE_BYTES);
                if resident {
                    // Dirty, too: what is written is what the mapping shows.
                    mapping.bytes()[from] ^= 0xff;
                    expected[from] ^= 0xff;
                } else {
                    mapping.forget();
                }
                let writer = open(&path, direct);
                let outcome = writer.write_at(&mapping.bytes()[from..from + RANGE_BYTES], at as u64);
                let is_disjoint = at + RANGE_BYTES <= from || from + RANGE_BYTES <= at;
                if all_or_fault(outcome, RANGE_BYTES) && (is_disjoint || at == from) {
                    let source = expected[from..from + RANGE_BYTES].to_vec();
                    expected[at..at + RANGE_BYTES].copy_from_slice(&source);
                    writer.sync_all().unwrap();
                    assert!(mapping.bytes() == expected, "{at} {from} {direct} {resident}");
                    drop(mapping);
                    assert!(fs::read(&path).unwrap() == expected, "{at} {from} {direct} {resident}");
                }
            }
        }
    });
}

#[test]
fn direct_writes_from_mappings_that_are_not_there_yet() {
    in_every_mode(|folder| {
        // Of another file.
        let source = new_file(&folder.join("source"), 3);
        new_file(&folder.join("target"), 4);
        let mut mapping = Mapping::new(&source, FILE_BYTES);
        mapping.forget();
        let target = open(&folder.join("target"), true);
        if all_or_fault(target.write_at(&mapping.bytes()[..FILE_BYTES / 2], 0), FILE_BYTES / 2) {
            let found = fs::read(folder.join("target")).unwrap();
            assert!(found[..FILE_BYTES / 2] == pattern(3)[..FILE_BYTES / 2]);
            assert!(found[FILE_BYTES / 2..] == pattern(4)[FILE_BYTES / 2..]);
        }
        // A page onto itself, dirty and clean.
        for is_dirty in [true, false] {
            let path = folder.join(format!("itself {is_dirty}"));
            let file = new_file(&path, 5);
            let mut expected = pattern(5);
            let mut mapping = Mapping::new(&file, FILE_BYTES);
            if is_dirty {
                mapping.bytes()[PAGE..2 * PAGE].fill(9);
                expected[PAGE..2 * PAGE].fill(9);
            }
            let writer = open(&path, true);
            all_or_fault(writer.write_at(&mapping.bytes()[PAGE..2 * PAGE], PAGE as u64), PAGE);
            assert!(mapping.bytes() == expected);
            drop(mapping);
            assert!(fs::read(&path).unwrap() == expected);
        }
        // Appending the file's own start.
        for direct in [false, true] {
            let path = folder.join(format!("appended {direct}"));
            let file = new_file(&path, 6);
            let mut mapping = Mapping::new(&file, FILE_BYTES);
            mapping.forget();
            let flags = if direct { direct_flag() } else { 0 };
            let mut writer = File::options().append(true).custom_flags(flags).open(&path).unwrap();
            if all_or_fault(writer.write(&mapping.bytes()[..RANGE_BYTES]), RANGE_BYTES) {
                let found = fs::read(&path).unwrap();
                assert!(found[..FILE_BYTES] == pattern(6) && found[FILE_BYTES..] == pattern(6)[..RANGE_BYTES]);
            }
        }
    });
}

#[test]
fn direct_writes_beside_buffered_ones() {
    in_every_mode(|folder| {
        const ROUNDS: u8 = 40;
        const BLOCKS: usize = 64;
        let path = folder.join("file");
        new_file(&path, 7);
        let write = |direct: bool, first: u8| {
            let writer = open(&path, direct);
            // Aligned, as O_DIRECT wants it.
            let scratch = folder.join(format!("scratch {direct}"));
            let mut buffer = Mapping::new(&new_file(&scratch, 0), PAGE);
            for round in 0..ROUNDS {
                for block in 0..BLOCKS {
                    buffer.bytes().fill(first + round);
                    writer.write_all_at(buffer.bytes(), (block * PAGE) as u64).unwrap();
                }
            }
            writer.sync_all().unwrap();
        };
        std::thread::scope(|scope| {
            scope.spawn(|| write(true, 100));
            scope.spawn(|| write(false, 200));
        });
        let buffered = fs::read(&path).unwrap();
        for (index, block) in buffered.chunks(PAGE).take(BLOCKS).enumerate() {
            let stamp = block[0];
            assert!(block.iter().all(|&byte| byte == stamp), "block {index} is torn");
            assert!(
                [100 + ROUNDS - 1, 200 + ROUNDS - 1].contains(&stamp),
                "block {index} is from an early round: {stamp}"
            );
        }
        assert!(buffered[BLOCKS * PAGE..] == pattern(7)[BLOCKS * PAGE..]);
        let mut buffer = Mapping::new(&new_file(&folder.join("scratch"), 0), FILE_BYTES);
        open(&path, true).read_exact_at(buffer.bytes(), 0).unwrap();
        assert!(buffer.bytes() == buffered, "both ways of reading agree");
    });
}

/// All that a pipe holds, until its other end is closed.
fn drain(mut pipe: File) -> Vec<u8> {
    let mut bytes = Vec::new();
    pipe.read_to_end(&mut bytes).unwrap();
    bytes
}

/// Gives the file to a pipe piece by piece, until its end.
fn feed(file: &File, pipe: &File, by_splice: bool) {
    let mut offset = 0;
    loop {
        let sent = if by_splice {
            splice(file, Some(&mut offset), pipe, None, RANGE_BYTES, SpliceFlags::empty()).unwrap()
        } else {
            sendfile(pipe, file, Some(&mut offset), RANGE_BYTES).unwrap()
        };
        if sent == 0 || offset >= FILE_BYTES as u64 {
            return;
        }
    }
}

#[test]
fn sendfile_and_splice_of_a_file_that_is_truncated() {
    in_every_mode(|folder| {
        let path = folder.join("file");
        new_file(&path, 8);
        let expected = pattern(8);
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let changer = scope.spawn(|| {
                let file = open(&path, false);
                while !is_over.load(Ordering::Relaxed) {
                    file.set_len((FILE_BYTES / 3) as u64).unwrap();
                    file.set_len(FILE_BYTES as u64).unwrap();
                    file.write_all_at(&expected[FILE_BYTES / 3..], (FILE_BYTES / 3) as u64).unwrap();
                }
            });
            for round in 0..24 {
                let (output, input) = pipe().unwrap();
                let reader = scope.spawn(move || drain(File::from(output)));
                feed(&open(&path, false), &File::from(input), round % 2 == 0);
                let found = reader.join().unwrap();
                // The file's bytes, or the zeros of its growth; nothing else, and in their places.
                let wrong = found.iter().zip(&expected).position(|(&byte, &wanted)| byte != wanted && byte != 0);
                assert_eq!(wrong, None, "round {round}");
                assert!(found.len() >= FILE_BYTES / 3 && found[..FILE_BYTES / 3] == expected[..FILE_BYTES / 3]);
            }
            is_over.store(true, Ordering::Relaxed);
            changer.join().unwrap();
        });
    });
}

#[test]
fn seeking_sees_what_only_mappings_and_delayed_writes_have() {
    in_every_mode(|folder| {
        let file = File::options().create_new(true).read(true).write(true).open(folder.join("file")).unwrap();
        file.set_len(FILE_BYTES as u64).unwrap();
        let seek = |from| seek(file.as_fd(), from);
        assert_eq!(seek(SeekFrom::Data(0)), Err(Errno::NXIO));
        let mut mapping = Mapping::new(&file, FILE_BYTES);
        mapping.bytes()[512 << 10] = 1;
        assert_eq!(seek(SeekFrom::Data(0)), Ok(512 << 10));
        assert_eq!(seek(SeekFrom::Hole(512 << 10)), Ok((512 << 10) + PAGE as u64));
        // Again, after it was clean.
        mapping.bytes()[128 << 10] = 2;
        assert_eq!(seek(SeekFrom::Data(0)), Ok(128 << 10));
        file.write_all_at(&[3; 10], 700 << 10).unwrap();
        assert_eq!(seek(SeekFrom::Data(600 << 10)), Ok(700 << 10));
        assert_eq!(seek(SeekFrom::Hole(700 << 10)), Ok((700 << 10) + PAGE as u64));
        mapping.bytes()[800 << 10] = 4;
        drop(mapping);
        assert_eq!(seek(SeekFrom::Data(750 << 10)), Ok(800 << 10));
        let found = fs::read(folder.join("file")).unwrap();
        let data = [(128 << 10, 2), (512 << 10, 1), (700 << 10, 3), (800 << 10, 4)];
        assert!(data.iter().all(|&(at, byte)| found[at] == byte));
    });
}

#[test]
fn what_does_not_fit_is_reported_by_msync_and_fsync() {
    for mode in MODES {
        let Some(site) = Site::formatted("128M", &[]) else { return };
        site.mount(mode);
        let (done, ended) = channel();
        let path = site.mnt().join("file");
        std::thread::spawn(move || {
            let file = File::options().create_new(true).read(true).write(true).open(&path).unwrap();
            // More than the device, as holes: no space is promised for a hole.
            let length = 160 << 20;
            file.set_len(length as u64).unwrap();
            let mut mapping = Mapping::new(&file, length);
            for page in mapping.bytes().chunks_mut(PAGE) {
                page[0] = 5;
            }
            let synced = mapping.flush();
            drop(mapping);
            let _ = done.send((synced, file.sync_all().map_err(|error| error.raw_os_error())));
        });
        let Ok((synced, _)) = ended.recv_timeout(LIMIT) else {
            site.kill();
            panic!("{mode}: it hangs, or failed");
        };
        assert_eq!(synced, Err(Errno::NOSPC), "{mode}");
        fs::remove_file(site.mnt().join("file")).unwrap();
        site.unmount_and_check();
    }
}

#[test]
fn one_bad_block_is_one_error() {
    const BAD: usize = 20;
    let Some(site) = Site::formatted("128M", &[]) else { return };
    site.mount("");
    let path = site.mnt().join("file");
    drop(new_file(&path, 11));
    site.unmount();
    flip_a_bit(&site, (BAD * PAGE) as u64);
    let expected = pattern(11);
    for mode in MODES {
        site.mount(mode);
        let file = File::open(&path).unwrap();
        // As `cat` reads, through readahead: up to the block, then the error.
        let mut bytes = vec![0; FILE_BYTES];
        let mut offset = 0;
        let error = loop {
            match file.read_at(&mut bytes[offset..offset + RANGE_BYTES], offset as u64) {
                Ok(0) => panic!("{mode}: the damage is not noticed, at {offset}"),
                Ok(length) => offset += length,
                Err(error) => break error,
            }
        };
        assert_eq!((offset, error.raw_os_error()), (BAD * PAGE, Some(Errno::IO.raw_os_error())), "{mode}");
        assert!(bytes[..offset] == expected[..offset], "{mode}");
        // Its neighbours, one by one and together, by read, directly and mapped.
        let neighbours = |file: &File, bytes: &mut [u8]| {
            for block in (0..FILE_BYTES / PAGE).filter(|&block| block != BAD) {
                file.read_exact_at(&mut bytes[..PAGE], (block * PAGE) as u64).unwrap();
                assert!(bytes[..PAGE] == expected[block * PAGE..][..PAGE], "{mode}: block {block}");
            }
            let bad = file.read_at(&mut bytes[..PAGE], (BAD * PAGE) as u64);
            assert_eq!(bad.unwrap_err().raw_os_error(), Some(Errno::IO.raw_os_error()), "{mode}");
        };
        neighbours(&file, &mut bytes);
        neighbours(&File::open(&path).unwrap(), &mut bytes);
        let scratch = site.mnt().join(format!("scratch {mode}"));
        let mut buffer = Mapping::new(&new_file(&scratch, 0), FILE_BYTES);
        let direct = open(&path, true);
        assert_eq!(direct.read_at(buffer.bytes(), 0).unwrap(), BAD * PAGE, "{mode}: the bytes before it");
        neighbours(&direct, buffer.bytes());
        let mut mapping = Mapping::new(&open(&path, false), FILE_BYTES);
        assert!(mapping.bytes()[(BAD + 1) * PAGE..] == expected[(BAD + 1) * PAGE..], "{mode}");
        assert!(mapping.bytes()[..BAD * PAGE] == expected[..BAD * PAGE], "{mode}");
        drop(mapping);
        assert_eq!(fs::metadata(&path).unwrap().len(), FILE_BYTES as u64, "{mode}: the size stays");
        drop((file, direct, buffer));
        let log = fs::read_to_string(site.path("log")).unwrap();
        assert_eq!(log.matches("/file cannot be read").count(), 1, "{mode}: said once, with the path:\n{log}");
        // What is left of it would be taken for a fault of the daemon's.
        fs::remove_file(site.path("log")).unwrap();
        site.unmount();
    }
}

/// Damages the block at this offset of the only file, in the image.
fn flip_a_bit(site: &Site, offset: u64) {
    let listed = site.coppice(&["list", "--btree", "extents", "--json"]).arg(site.image()).output().unwrap();
    let keys: serde_json::Value = serde_json::from_slice(&listed.stdout).unwrap();
    let (start, address) = keys
        .as_array()
        .unwrap()
        .iter()
        .find_map(|key| {
            let end = key["offset"].as_u64()?;
            let (length, rest) = key["value"].as_str()?.split_once(" bytes at 0:")?;
            let start = end - length.parse::<u64>().ok()?;
            let address = rest.split_once(' ')?.0.parse::<u64>().ok()?;
            (start..end).contains(&offset).then_some((start, address))
        })
        .unwrap_or_else(|| panic!("no extent at {offset}: {keys}"));
    let image = File::options().read(true).write(true).open(site.image()).unwrap();
    let mut byte = [0];
    image.read_exact_at(&mut byte, address + offset - start + 7).unwrap();
    image.write_all_at(&[byte[0] ^ 0x10], address + offset - start + 7).unwrap();
}
