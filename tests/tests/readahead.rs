//! The page cache under a mount with `cache=daemon`: what a cold sequential read asks of the device, and what a warm one costs.
//!
//! Longer form by an environment variable: `COPPICE_READ_MIB` (1024 for the cold read's promise, 512 for the warm one's).

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

use coppicefs::fuse::client;
use coppicefs_tests::mount::{Site, count, wait_until};
use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};

const MIB: usize = 1 << 20;

/// All counters of the mount.
fn counters(site: &Site) -> BTreeMap<String, u64> {
    client::statistics(&site.mnt()).unwrap().into_iter().collect()
}

/// The counters when nothing goes on any more: no readahead is under way.
fn settled(site: &Site) -> BTreeMap<String, u64> {
    let activity = |counters: &BTreeMap<String, u64>| {
        ["pagecache.add_taken", "device.data_read_submissions", "pagecache.used_bytes"].map(|name| counters[name])
    };
    let mut before = counters(site);
    wait_until("readahead has ended", || {
        let now = counters(site);
        let is_settled = activity(&now) == activity(&before);
        before = now;
        is_settled
    });
    before
}

/// Writes a file of `mib` MiB, each with other content; `noise` bytes of every 64 do not compress.
fn write_file(path: &Path, mib: u64, noise: usize) {
    let mut random = Xoshiro256PlusPlus::seed_from_u64(mib);
    let mut file = File::create(path).unwrap();
    let mut piece = vec![0; MIB];
    for _ in 0..mib {
        piece.chunks_mut(64).for_each(|chunk| random.fill_bytes(&mut chunk[..noise]));
        file.write_all(&piece).unwrap();
    }
}

/// Reads the file in aligned MiB, and compares with what was written.
fn read_file(path: &Path, mib: u64, noise: usize) {
    let mut random = Xoshiro256PlusPlus::seed_from_u64(mib);
    let mut file = File::open(path).unwrap();
    let (mut piece, mut expected) = (vec![0; MIB], vec![0; MIB]);
    for number in 0..mib {
        file.read_exact(&mut piece).unwrap();
        expected.chunks_mut(64).for_each(|chunk| random.fill_bytes(&mut chunk[..noise]));
        assert!(piece == expected, "MiB {number}");
    }
}

#[test]
fn a_cold_read_takes_few_submissions_and_a_warm_one_no_lock_and_no_copy() {
    let mib = count("COPPICE_READ_MIB", 64);
    let Some(site) = Site::formatted(&format!("{}M", mib + mib / 4 + 256), &[]) else { return };
    site.mount("cache=daemon,cache_size=2G");
    let path = site.mnt().join("file");
    write_file(&path, mib, 64);
    site.remount("cache=daemon,cache_size=2G");

    let before = counters(&site);
    read_file(&path, mib, 64);
    let cold = settled(&site);
    let submissions = cold["device.data_read_submissions"] - before["device.data_read_submissions"];
    assert!(submissions <= mib + 32, "{submissions} submissions for {mib} MiB");
    let read = cold["device.bytes_read"] - before["device.bytes_read"];
    assert!(read >= mib << 20 && read <= (mib << 20) + (16 << 20), "{read} bytes were read for {mib} MiB");

    read_file(&path, mib, 64);
    let warm = counters(&site);
    let moved = |name: &str| warm[name] - cold[name];
    assert_eq!(moved("pagecache.add_taken"), 0);
    assert_eq!(moved("pagecache.block_taken"), 0);
    assert_eq!(moved("pagecache.misses"), 0);
    assert_eq!(moved("device.data_read_submissions"), 0);
    let (copied, referenced) = (moved("pagecache.reply_bytes_copied"), moved("pagecache.reply_bytes_referenced"));
    assert!(copied * 100 < mib << 20, "{copied} bytes were copied");
    assert_eq!(copied + referenced, mib << 20);
    eprintln!("{mib} MiB: {submissions} submissions cold; warm {copied} bytes copied, {referenced} referenced");
    site.unmount_and_check();
}

#[test]
fn the_frames_of_a_batch_are_decoded_at_the_same_time() {
    let mib = count("COPPICE_READ_MIB", 64);
    let Some(site) = Site::formatted(&format!("{}M", mib + 256), &["--compression", "zstd"]) else { return };
    site.mount("cache=daemon,cache_size=2G");
    let path = site.mnt().join("file");
    write_file(&path, mib, 24);
    site.remount("cache=daemon,cache_size=2G");
    let before = counters(&site);
    read_file(&path, mib, 24);
    let after = settled(&site);
    let submissions = after["device.data_read_submissions"] - before["device.data_read_submissions"];
    assert!(submissions <= mib + 32, "{submissions} submissions for {mib} MiB");
    // Each frame is read once: less than the file has, since it is compressed.
    let read = after["device.bytes_read"] - before["device.bytes_read"];
    assert!(read < mib << 20, "{read} bytes were read for {mib} MiB");
    let mut at_once = after["data.frames_decoded_at_once_max"];
    if std::thread::available_parallelism().is_ok_and(|processors| processors.get() > 1) {
        // A busy machine may not give the second thread a turn for as long as a batch takes.
        for _ in 0..20 {
            if at_once >= 2 {
                break;
            }
            site.remount("cache=daemon,cache_size=2G");
            read_file(&path, mib, 24);
            at_once = settled(&site)["data.frames_decoded_at_once_max"];
        }
        assert!(at_once >= 2, "{at_once}");
    }
    eprintln!("{mib} MiB of zstd: {submissions} submissions, {read} bytes, {at_once} frames at once");
    site.unmount_and_check();
}

#[test]
fn a_scan_of_four_times_the_cache_leaves_the_hot_file_alone_and_keeps_to_its_memory() {
    let Some(site) = Site::formatted("384M", &[]) else { return };
    site.mount("cache=daemon,cache_size=64M");
    let (hot, scanned) = (site.mnt().join("hot"), site.mnt().join("scanned"));
    write_file(&hot, 12, 64);
    write_file(&scanned, 200, 64);
    site.remount("cache=daemon,cache_size=64M");
    (0..3).for_each(|_| read_file(&hot, 12, 64));
    let before = settled(&site);
    read_file(&scanned, 200, 64);
    let scanned = settled(&site);
    assert!(
        scanned["pagecache.evicted_folios"] > before["pagecache.evicted_folios"],
        "the scan was larger than the cache"
    );
    read_file(&hot, 12, 64);
    let after = counters(&site);
    assert_eq!(after["pagecache.misses"], scanned["pagecache.misses"], "the scan threw hot folios out");
    let peak = after["pagecache.peak_bytes"];
    assert!(peak <= (64 << 20) / 100 * 105, "{peak} bytes of page cache");
    site.unmount_and_check();
}
