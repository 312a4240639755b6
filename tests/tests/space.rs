//! A filesystem that is nearly full: overwriting many times its size, ENOSPC where it is due, and space that comes back exactly.
//!
//! `COPPICE_SPACE_MIB` (160) is the image's size, `COPPICE_SPACE_OVERWRITES` (2) how many times its size is overwritten.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::FileExt;

use coppicefs_tests::mount::{Site, count};
use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};

/// Until what was freed is counted as free: what is cached is written, and deleted files are gone.
fn settle(site: &Site) -> u64 {
    let mut before = 0;
    for _ in 0..50 {
        site.sync();
        let now = site.available_bytes();
        if now == before {
            return now;
        }
        before = now;
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    before
}

#[test]
fn overwriting_at_eighty_percent_then_full_then_empty() {
    const FILES: u64 = 8;
    const PIECE: usize = 16 << 10;
    let mebibytes = count("COPPICE_SPACE_MIB", 160);
    let overwrites = count("COPPICE_SPACE_OVERWRITES", 2);
    let Some(site) = Site::formatted(&format!("{mebibytes}M"), &[]) else { return };
    site.mount("");
    let empty = settle(&site);
    let file_bytes = (empty / 5 * 4 / FILES) & !0xFFFFF;
    let mut random = Xoshiro256PlusPlus::seed_from_u64(5);
    let mut piece = vec![0; PIECE];
    // Which piece holds what: the first eight bytes of each are its stamp.
    let pieces = file_bytes / PIECE as u64;
    let mut stamps = vec![vec![0_u64; usize::try_from(pieces).unwrap()]; usize::try_from(FILES).unwrap()];
    let files: Vec<_> = (0..FILES)
        .map(|number| {
            File::options()
                .create_new(true)
                .read(true)
                .write(true)
                .open(site.mnt().join(format!("file {number}")))
                .unwrap()
        })
        .collect();
    let mut write = |file: usize, at: usize, random: &mut Xoshiro256PlusPlus| {
        random.fill_bytes(&mut piece);
        let stamp = random.next_u64();
        piece[..8].copy_from_slice(&stamp.to_le_bytes());
        stamps[file][at] = stamp;
        files[file].write_all_at(&piece, (at * PIECE) as u64)
    };
    for (file, opened) in files.iter().enumerate() {
        for at in 0..usize::try_from(pieces).unwrap() {
            write(file, at, &mut random)
                .unwrap_or_else(|error| panic!("filling, {} available: {error}", site.available_bytes()));
        }
        opened.sync_all().unwrap();
    }
    let total = (overwrites * mebibytes) << 20;
    for done in 0..total / PIECE as u64 {
        let file = usize::try_from(random.next_u64() % FILES).unwrap();
        let at = usize::try_from(random.next_u64() % pieces).unwrap();
        let outcome = write(file, at, &mut random);
        let is_written = outcome.is_ok();
        let outcome = if done % 512 == 0 { outcome.and_then(|()| files[file].sync_all()) } else { outcome };
        if let Err(error) = outcome {
            panic!(
                "a false failure of {} after {} MiB of overwriting, {} available: {error}\n{}",
                if is_written { "fsync" } else { "write" },
                (done * PIECE as u64) >> 20,
                site.available_bytes(),
                site.log()
            );
        }
    }
    for file in &files {
        file.sync_all().unwrap();
    }
    drop(files);
    // Full: the rest in files of a few sizes, until nothing fits.
    let mut chunk = vec![0; 1 << 20];
    random.fill_bytes(&mut chunk);
    let mut filler = File::create(site.mnt().join("filler")).unwrap();
    let full = loop {
        if let Err(error) = filler.write_all(&chunk).and_then(|()| filler.sync_data()) {
            break error;
        }
    };
    assert_eq!(full.kind(), ErrorKind::StorageFull, "{full}");
    drop(filler);
    // Nothing of what was written is lost by that.
    site.remount("");
    for (number, stamps) in stamps.iter().enumerate() {
        let file = File::open(site.mnt().join(format!("file {number}"))).unwrap();
        let mut found = [0; 8];
        for (at, stamp) in stamps.iter().enumerate() {
            file.read_exact_at(&mut found, (at * PIECE) as u64).unwrap();
            assert_eq!(u64::from_le_bytes(found), *stamp, "piece {at} of file {number}");
        }
    }
    // Full again, then everything goes.
    let again =
        (0..).find_map(|number| fs::write(site.mnt().join(format!("little {number}")), &chunk[..PIECE]).err()).unwrap();
    assert_eq!(again.kind(), ErrorKind::StorageFull, "{again}");
    for entry in fs::read_dir(site.mnt()).unwrap() {
        let path = entry.unwrap().path();
        fs::remove_file(&path)
            .unwrap_or_else(|error| panic!("removing {} on a full filesystem: {error}", path.display()));
    }
    settle(&site);
    assert_eq!(site.usage("data_bytes"), 0);
    site.unmount_and_check();
    // Each bucket that was ever used has a key: the trees stay a little larger than they were, once.
    site.mount("");
    let after = settle(&site);
    let keys = 512 * mebibytes * 1024 * 1024 / (256 << 10);
    assert!(
        after + keys + (1 << 20) >= empty,
        "{} bytes are lost, {} are nodes'",
        i128::from(empty) - i128::from(after),
        site.usage("metadata_bytes")
    );
    for round in 0..2 {
        for number in 0..40 {
            fs::write(site.mnt().join(format!("again {number}")), &chunk).unwrap();
        }
        site.sync();
        for number in 0..40 {
            fs::remove_file(site.mnt().join(format!("again {number}"))).unwrap();
        }
        settle(&site);
        site.remount("");
        let now = settle(&site);
        assert!(
            now + (256 << 10) >= after,
            "round {round}: {} bytes more are lost",
            i128::from(after) - i128::from(now)
        );
    }
    site.unmount_and_check();
}

#[test]
fn what_df_calls_available_can_be_written() {
    let Some(site) = Site::formatted("128M", &[]) else { return };
    site.mount("");
    let available = settle(&site);
    let mut file = File::create(site.mnt().join("file")).unwrap();
    let chunk: Vec<u8> = (0..1 << 20).map(|index: u32| (index.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let mut written = 0;
    while written + chunk.len() as u64 <= available {
        file.write_all(&chunk).and_then(|()| file.sync_data()).unwrap_or_else(|error| {
            panic!("{} of {} MiB that were available could be written: {error}", written >> 20, available >> 20)
        });
        written += chunk.len() as u64;
    }
    drop(file);
    fs::remove_file(site.mnt().join("file")).unwrap();
    site.unmount_and_check();
}
