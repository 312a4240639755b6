//! fallocate in every mode, collapse and insert by our own commands, and O_DIRECT, through the kernel, in all three cache modes: what a
//! program sees right after, by read, by mapping and by stat, is what a plain vector holds.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use coppicefs::fuse::client;
use coppicefs_tests::mount::{Site, command, program, run};
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;

const BLOCK: u64 = 4096;

fn in_all_cache_modes(test: impl Fn(&Site)) {
    for mode in ["kernel", "writeback", "daemon"] {
        let Some(site) = Site::formatted("256M", &[]) else { return };
        site.mount(&format!("cache={mode}"));
        test(&site);
        site.unmount_and_check();
    }
}

fn pattern(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    })
    .take(length)
    .collect()
}

#[track_caller]
fn check(path: &Path, content: &[u8]) {
    assert_eq!(fs::metadata(path).unwrap().len(), content.len() as u64);
    let found = fs::read(path).unwrap();
    let differs = found.iter().zip(content).position(|(one, other)| one != other);
    assert_eq!((differs, found.len()), (None, content.len()));
}

fn layout(what: &str, path: &Path, offset: u64, length: u64) {
    run(command(program()).arg(what).arg(path).arg(offset.to_string()).arg(length.to_string()));
}

#[test]
fn zeroed_ranges_and_holes_with_edges() {
    in_all_cache_modes(|site| {
        let path = site.mnt().join("file");
        let mut content = pattern(300_000, 1);
        fs::write(&path, &content).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        for (flags, offset, length) in [
            (FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE, 5000_u64, 50_000_u64),
            (FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 99_999, 33_333),
            (FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE, 290_000, 50_000),
            (FallocateFlags::ZERO_RANGE, 299_000, 50_000),
        ] {
            // Dirty where the range begins and ends, and inside.
            for at in [offset - 100, offset + length / 2, offset + length - 50] {
                if (at + 150) as usize <= content.len() {
                    file.write_all_at(&[at as u8 | 1; 150], at).unwrap();
                    content[at as usize..at as usize + 150].fill(at as u8 | 1);
                }
            }
            fallocate(&file, flags, offset, length).unwrap();
            let end = (offset + length) as usize;
            if !flags.contains(FallocateFlags::KEEP_SIZE) {
                content.resize(content.len().max(end), 0);
            }
            let end = end.min(content.len());
            content[offset as usize..end].fill(0);
            check(&path, &content);
        }
        // Holes are exactly where nothing is; what is dirty in a hole is data.
        let hole = seek(&file, SeekFrom::Hole(90_000)).unwrap();
        assert_eq!(hole, 102_400);
        file.write_all_at(b"x", 110_000).unwrap();
        content[110_000] = b'x';
        assert_eq!(seek(&file, SeekFrom::Data(hole)).unwrap(), 110_000 / BLOCK * BLOCK);
        drop(file);
        site.remount("");
        check(&path, &content);
    });
}

#[test]
fn collapse_and_insert_are_right_at_once() {
    in_all_cache_modes(|site| {
        let path = site.mnt().join("file");
        let mut content = pattern(1_000_000, 2);
        fs::write(&path, &content).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        // All of it in the kernel's cache, the end of it dirty.
        check(&path, &content);
        file.write_all_at(&[9; 5000], 990_000).unwrap();
        content[990_000..995_000].fill(9);

        layout("collapse", &path, 10 * BLOCK, 30 * BLOCK);
        content.drain(10 * BLOCK as usize..40 * BLOCK as usize);
        check(&path, &content);
        layout("insert", &path, 5 * BLOCK, 7 * BLOCK);
        content.splice(5 * BLOCK as usize..5 * BLOCK as usize, std::iter::repeat_n(0, 7 * BLOCK as usize));
        check(&path, &content);
        file.write_all_at(&[7; 3000], 6 * BLOCK + 5).unwrap();
        content[6 * BLOCK as usize + 5..][..3000].fill(7);
        layout("insert", &path, 0, BLOCK);
        content.splice(0..0, std::iter::repeat_n(0, BLOCK as usize));
        layout("collapse", &path, 0, 3 * BLOCK);
        content.drain(0..3 * BLOCK as usize);
        check(&path, &content);

        // Ranges that are not whole blocks, or reach the end.
        for (what, offset, length) in
            [("collapse", 1, BLOCK), ("collapse", BLOCK, 100), ("collapse", BLOCK, 1 << 40), ("insert", 1 << 40, BLOCK)]
        {
            let output = command(program())
                .arg(what)
                .arg(&path)
                .args([offset.to_string(), length.to_string()])
                .output()
                .unwrap();
            assert!(!output.status.success(), "{what} {offset} {length}");
        }
        // The refused attempts have left nothing armed.
        fallocate(&file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, BLOCK, BLOCK).unwrap();
        content[BLOCK as usize..2 * BLOCK as usize].fill(0);
        check(&path, &content);
        assert_eq!(fallocate(&file, FallocateFlags::COLLAPSE_RANGE, 0, BLOCK), Err(Errno::OPNOTSUPP));
        drop(file);
        site.remount("");
        check(&path, &content);
    });
}

/// The kernel zeroes its own page where a range that it drops ends inside of one. That page may already hold what an insert has moved there: so the
/// range must end between pages, or whoever reads the end of the file meanwhile makes it zeros.
#[test]
fn an_insert_leaves_the_end_of_the_file_to_those_who_read_it_meanwhile() {
    in_all_cache_modes(|site| {
        let path = site.mnt().join("file");
        let length = 8 * BLOCK + 1000;
        let content = pattern(length as usize, 4);
        fs::write(&path, &content).unwrap();
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    let file = File::open(&path).unwrap();
                    while !is_over.load(Ordering::Relaxed) {
                        file.read_at(&mut [0; 2000], length).unwrap();
                    }
                });
            }
            let _ending = Ending(&is_over);
            for round in 0..150 {
                client::insert_range(&path, BLOCK, BLOCK).unwrap();
                let found = fs::read(&path).unwrap();
                assert_eq!(found.len() as u64, length + BLOCK, "round {round}");
                let moved = found[2 * BLOCK as usize..].iter().zip(&content[BLOCK as usize..]);
                let wrong = moved.filter(|(found, expected)| found != expected).count();
                assert_eq!(wrong, 0, "bytes of what has moved, round {round}");
                client::collapse_range(&path, BLOCK, BLOCK).unwrap();
                assert!(fs::read(&path).unwrap() == content, "round {round}");
            }
        });
    });
}

/// Says that it is over when it is dropped, also by a panic.
struct Ending<'a>(&'a AtomicBool);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn direct_and_buffered_descriptors_see_one_file() {
    in_all_cache_modes(|site| {
        let path = site.mnt().join("file");
        let mut content = pattern(500_000, 3);
        fs::write(&path, &content).unwrap();
        let buffered = File::options().read(true).write(true).open(&path).unwrap();
        let direct = File::options()
            .read(true)
            .write(true)
            .custom_flags(rustix::fs::OFlags::DIRECT.bits() as i32)
            .open(&path)
            .unwrap();
        let mut aligned = coppicefs::memory::AlignedBuffer::zeroed(256 << 10);
        for round in 0..12_u64 {
            let offset = round * 7 % 30 * BLOCK;
            let length = ((round % 5 + 1) * 3 * BLOCK) as usize;
            // A buffered write that straddles the direct one's beginning, not written back.
            let at = offset as usize + 100;
            buffered.write_all_at(&[round as u8 + 1; 5000], at as u64).unwrap();
            content[at..at + 5000].fill(round as u8 + 1);
            aligned[..length].copy_from_slice(&pattern(length, 100 + round));
            direct.write_all_at(&aligned[..length], offset + BLOCK).unwrap();
            content[(offset + BLOCK) as usize..][..length].copy_from_slice(&aligned[..length]);
            let mut found = vec![0; length + 8192];
            buffered.read_exact_at(&mut found, offset).unwrap();
            assert!(found == content[offset as usize..][..length + 8192], "round {round}: read buffered");
            direct.read_exact_at(&mut aligned[..length + 8192], offset).unwrap();
            assert!(aligned[..length + 8192] == content[offset as usize..][..length + 8192], "round {round}: direct");
        }
        // Past the end: the file grows.
        let end = (content.len() as u64).next_multiple_of(BLOCK);
        direct.write_all_at(&aligned[..8192], end).unwrap();
        content.resize(end as usize, 0);
        content.extend_from_slice(&aligned[..8192]);
        check(&path, &content);
        drop((buffered, direct));
        site.remount("");
        check(&path, &content);
    });
}
