//! Memory under load: page cache and node cache together keep to `cache_size`, and the daemon to that and a fixed amount more.
//!
//! Longer form by an environment variable: `COPPICE_MEMORY_SECONDS` (8).

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use coppicefs::fuse::client;
use coppicefs_tests::mount::{Site, count};
use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};

const MIB: u64 = 1 << 20;
const CACHE_MIB: u64 = 64;
/// What the daemon may take besides `cache_size` (design, 2.3), in MiB.
const BESIDES_MIB: u64 = 192;
/// Files that are read and written in place, and their size.
const FILES: u64 = 4;
const FILE_MIB: u64 = 48;

/// Reads a file from its start to its end again and again, or at random places.
fn read(path: &Path, seed: u64, end: Instant) -> u64 {
    let mut random = Xoshiro256PlusPlus::seed_from_u64(seed);
    let mut file = File::open(path).unwrap();
    let mut piece = vec![0; 256 << 10];
    let mut bytes = 0;
    while Instant::now() < end {
        let read = if seed.is_multiple_of(2) {
            let read = file.read(&mut piece).unwrap();
            if read == 0 {
                file.seek(SeekFrom::Start(0)).unwrap();
            }
            read
        } else {
            file.read_at(&mut piece[..32 << 10], random.next_u64() % (FILE_MIB * MIB)).unwrap()
        };
        bytes += read as u64;
    }
    bytes
}

/// Overwrites a file in order, or at random places.
fn write(path: &Path, seed: u64, end: Instant) -> u64 {
    let mut random = Xoshiro256PlusPlus::seed_from_u64(seed);
    let file = File::options().write(true).open(path).unwrap();
    let mut piece = vec![0; 128 << 10];
    let mut bytes = 0;
    while Instant::now() < end {
        random.fill_bytes(&mut piece[..4096]);
        let length = if seed.is_multiple_of(2) { piece.len() } else { 12 << 10 };
        let offset = if seed.is_multiple_of(2) { bytes } else { random.next_u64() };
        file.write_all_at(&piece[..length], offset % (FILE_MIB * MIB - length as u64)).unwrap();
        bytes += length as u64;
    }
    bytes
}

/// Makes, looks at and removes small files in many folders: inodes, names and extents of their own.
fn churn(folder: &Path, seed: u64, end: Instant) -> u64 {
    let mut random = Xoshiro256PlusPlus::seed_from_u64(seed);
    let mut content = [0; 6000];
    let mut made = 0;
    while Instant::now() < end {
        let folder = folder.join(format!("{seed}-{}", made / 500));
        if made % 500 == 0 {
            fs::create_dir(&folder).unwrap();
        }
        random.fill_bytes(&mut content);
        let path = folder.join(format!("a name that takes some room in a node: {made}"));
        File::create(&path).unwrap().write_all(&content[..100 + made as usize % 5900]).unwrap();
        if made % 5 == 0 {
            fs::remove_file(path).unwrap();
        }
        made += 1;
    }
    made
}

#[test]
fn the_caches_keep_to_their_size_and_the_daemon_to_its_memory() {
    let seconds = count("COPPICE_MEMORY_SECONDS", 8);
    // So large that what may be dirty of nodes, by their space, is more than the cache has for them.
    let Some(site) = Site::formatted("12G", &[]) else { return };
    site.mount(&format!("cache=daemon,cache_size={CACHE_MIB}M"));
    let file = |number: u64| site.mnt().join(format!("file {number}"));
    for number in 0..FILES {
        let mut file = File::create(file(number)).unwrap();
        (0..FILE_MIB).for_each(|mib| file.write_all(&vec![mib as u8; MIB as usize]).unwrap());
    }
    let end = Instant::now() + Duration::from_secs(seconds);
    let [read_bytes, written_bytes, made] = [const { AtomicU64::new(0) }; 3];
    std::thread::scope(|scope| {
        for number in 0..FILES {
            let (path, read_bytes) = (file(number), &read_bytes);
            scope.spawn(move || read_bytes.fetch_add(read(&path, number, end), Ordering::Relaxed));
        }
        for number in 0..3 {
            let (path, written_bytes) = (file(number), &written_bytes);
            scope.spawn(move || written_bytes.fetch_add(write(&path, number, end), Ordering::Relaxed));
        }
        for number in 0..3 {
            let (folder, made) = (site.mnt(), &made);
            scope.spawn(move || made.fetch_add(churn(&folder, number, end), Ordering::Relaxed));
        }
    });
    let counters: BTreeMap<String, u64> = client::statistics(&site.mnt()).unwrap().into_iter().collect();
    let (pages, nodes) = (counters["pagecache.peak_bytes"], counters["btree.cached_peak_bytes"]);
    let resident = site.daemon_memory_bytes("VmHWM");
    eprintln!(
        "{} MiB read, {} MiB written, {} files made; of {CACHE_MIB} MiB at most {} KiB of pages and {} KiB of nodes, {} MiB resident",
        read_bytes.into_inner() / MIB,
        written_bytes.into_inner() / MIB,
        made.into_inner(),
        pages / 1024,
        nodes / 1024,
        resident / MIB,
    );
    assert!(counters["pagecache.evicted_folios"] > 0 && nodes > 0);
    // The most of each need not have been at the same time.
    assert!(pages + nodes <= CACHE_MIB * MIB / 100 * 105, "{pages} bytes of pages and {nodes} of nodes");
    assert!(resident <= (CACHE_MIB + BESIDES_MIB) * MIB, "{resident} bytes");
    site.unmount_and_check();
}
