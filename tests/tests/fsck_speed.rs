//! How long a check takes, beside what checks ext4 and btrfs, on the same tree: `COPPICE_FSCK_INODES=1000000 cargo test --release -p coppicefs-tests --test
//! fsck_speed -- --nocapture` prints the table, and fails unless `fsck-coppice -n` is ahead of both. The short form only sees that a check of some
//! thousand inodes counts them all.
//!
//! The tree is made like one of sources: a directory for every five files, sizes spread evenly over their logarithm from 64 bytes to 64 KiB (a median of 2
//! KiB), of which no more than 16 KiB are written, since no check looks at what files hold.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use coppicefs_tests::limit::finish;
use coppicefs_tests::mount::{Site, command, count, installed, run};

const INODES: u64 = 5000;
const FILES_OF_DIRECTORY: u64 = 5;
const SUBDIRECTORIES: u64 = 8;
const SIZE_MAX: u64 = 16 << 10;
const ROUNDS: usize = 3;

/// SplitMix64 (Steele, Lea, Flood 2014): the same sizes everywhere.
fn random(seed: u64) -> u64 {
    let mut mixed = seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 31
}

fn size_of_file(number: u64) -> usize {
    let fraction = random(number) as f64 / u64::MAX as f64;
    (2_f64.powf(6.0 + 10.0 * fraction) as u64).min(SIZE_MAX) as usize
}

/// Where the directory with this number is: each has some below it.
fn directory(root: &Path, number: u64) -> PathBuf {
    let mut names = Vec::new();
    let mut at = number;
    while at > 0 {
        names.push(format!("folder-{at}"));
        at = (at - 1) / SUBDIRECTORIES;
    }
    names.iter().rev().fold(root.to_owned(), |path, name| path.join(name))
}

/// Makes a tree with so many inodes below the root. Returns how many directories and files.
fn grow(root: &Path, inodes: u64) -> (u64, u64) {
    let directories = inodes / (FILES_OF_DIRECTORY + 1);
    let content = vec![b'c'; SIZE_MAX as usize];
    let mut files = 0;
    for number in 1..=directories {
        let folder = directory(root, number);
        fs::create_dir(&folder).unwrap();
        for name in 0..FILES_OF_DIRECTORY {
            fs::write(folder.join(format!("source file {name}.c")), &content[..size_of_file(files)]).unwrap();
            files += 1;
        }
    }
    (directories, files)
}

/// Seconds that a command takes which must find nothing.
fn seconds(words: &[&str]) -> f64 {
    let mut checker = command(words[0]);
    checker.args(&words[1..]);
    let start = Instant::now();
    let output = finish(&mut checker).unwrap();
    let elapsed = start.elapsed().as_secs_f64();
    assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stdout));
    elapsed
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}

/// A peer: its image is made and filled.
fn peer(site: &Site, kind: &str, bytes: u64, inodes: u64) -> PathBuf {
    let image = site.path(&format!("{kind}.img"));
    fs::File::create(&image).unwrap().set_len(bytes).unwrap();
    let mut make = command(format!("mkfs.{kind}"));
    if kind == "ext4" {
        make.args(["-q", "-F", "-N", &(inodes + inodes / 8).to_string()]);
    } else {
        make.args(["-q", "-f"]);
    }
    run(make.arg(&image));
    let mountpoint = site.path(&format!("{kind}.mnt"));
    fs::create_dir(&mountpoint).unwrap();
    run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&mountpoint));
    grow(&mountpoint, inodes);
    // Where the host's disk is full, the peer has lost what it delayed, and would have little to check.
    let synced = rustix::fs::syncfs(fs::File::open(&mountpoint).unwrap());
    run(Command::new("umount").arg(&mountpoint));
    synced.unwrap_or_else(|error| panic!("{kind} could not keep its tree: {error}"));
    image
}

#[test]
fn a_check_is_ahead_of_its_peers() {
    let inodes = count("COPPICE_FSCK_INODES", INODES);
    let bytes = (inodes * (24 << 10)).max(256 << 20);
    let Some(site) = Site::formatted(&bytes.to_string(), &[]) else { return };
    site.mount("");
    let (directories, files) = grow(&site.mnt(), inodes);
    site.unmount();
    let image = site.image();
    let image = image.to_str().unwrap();
    let program = site.coppice(&[]).get_program().to_str().unwrap().to_owned();
    let output = finish(site.coppice(&["fsck", "-n"]).arg(image)).unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{said}");
    // The root is a directory, too.
    assert!(said.contains(&format!("clean, {} directories, {files} files", directories + 1)), "{said}");
    if inodes <= INODES {
        return;
    }
    assert!(installed("e2fsck") && installed("btrfs"), "the long form compares with e2fsprogs and btrfs-progs");
    let ext4 = peer(&site, "ext4", bytes * 2, inodes);
    let btrfs = peer(&site, "btrfs", bytes * 2, inodes);
    let (ext4, btrfs) = (ext4.to_str().unwrap(), btrfs.to_str().unwrap());
    let checks: [(&str, &[&str]); 3] = [
        ("fsck-coppice -n", &[&program, "fsck", "-n", image]),
        ("e2fsck -f -n", &["e2fsck", "-f", "-n", ext4]),
        ("btrfs check", &["btrfs", "check", btrfs]),
    ];
    println!("{} inodes, medians of {ROUNDS} rounds in turn, seconds", directories + files + 1);
    println!("{:<18}{:>10}{:>10}", "", "cold", "warm");
    let mut medians = [(0.0, 0.0); 3];
    let mut figures = vec![(Vec::new(), Vec::new()); 3];
    for _ in 0..ROUNDS {
        for ((_, words), (cold, warm)) in checks.iter().zip(&mut figures) {
            rustix::fs::sync();
            fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
            cold.push(seconds(words));
            warm.push(seconds(words));
        }
    }
    for (((name, _), (cold, warm)), of_all) in checks.iter().zip(figures).zip(&mut medians) {
        *of_all = (median(cold), median(warm));
        println!("{name:<18}{:>10.2}{:>10.2}", of_all.0, of_all.1);
    }
    let [ours, peers @ ..] = medians;
    for (cold, warm) in peers {
        assert!(ours.0 < cold && ours.1 < warm, "it is behind a peer");
    }
}
