//! One block of metadata destroyed, under a real mount: of images with two copies of metadata all mount, all files are intact, and one
//! `coppice scrub` beside it heals them, so that fsck and a second scrub find nothing in any copy.
//!
//! `COPPICE_SCRUB_MOUNTS` (8) is how many images, `COPPICE_SEED` (1) the first one's seed.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use coppicefs::device::Image;
use coppicefs_tests::crash::seed_or;
use coppicefs_tests::fuzz::Random;
use coppicefs_tests::limit::{Limit, finish};
use coppicefs_tests::mount::{Site, count, run};
use coppicefs_tests::regions::metadata_blocks;
use coppicefs_tests::simulated::device_of;

const BLOCK: usize = 4096;

/// An image, what it holds, and what may be destroyed of it.
struct Base {
    image: Image,
    files: BTreeMap<String, Vec<u8>>,
    blocks: Vec<u64>,
}

/// Folders with files of all sizes, through a mount that ends in order, or whose daemon is killed: then the journal is needed.
fn made(site: &Site, in_order: bool) -> Base {
    run(site.coppice(&["mkfs", "-q", "-f", "--size", "64M"]).arg(site.image()));
    site.mount("");
    let mut files = BTreeMap::new();
    for number in 0..400_usize {
        let folder = format!("folder {}", number % 6);
        fs::create_dir_all(site.mnt().join(&folder)).unwrap();
        let path = format!("{folder}/file {number}");
        let content = format!("<{number}>").into_bytes().repeat(1 + number * number % 9000);
        fs::write(site.mnt().join(&path), &content).unwrap();
        files.insert(path, content);
        if number == 300 {
            // Not all of it is in the newest checkpoint.
            site.remount("");
        }
    }
    site.sync();
    if in_order {
        site.unmount()
    } else {
        site.crash()
    }
    let image = Image::from_file(&site.image()).unwrap();
    let blocks = metadata_blocks(&device_of(image.clone())).unwrap();
    assert!(blocks.len() > 40, "{} blocks", blocks.len());
    Base { image, files, blocks }
}

fn assert_intact(root: &Path, base: &Base, what: &str) {
    for (path, expected) in &base.files {
        let found = fs::read(root.join(path)).unwrap_or_else(|error| panic!("{what}: {path}: {error}"));
        assert!(found == *expected, "{what}: {path} is not what was written");
    }
}

/// Returns 1 if the scrub had something to heal: the rest is healed by the mount and by reading, or needed by nobody.
fn heals(site: &Site, base: &Base, seed: u64) -> u64 {
    let mut random = Random::new(seed);
    let block = base.blocks[random.below(base.blocks.len())];
    let zeros = random.below(3) == 0;
    let garbage: Vec<u8> = (0..BLOCK).map(|_| if zeros { 0 } else { random.below(256) as u8 }).collect();
    let mut image = base.image.clone();
    image.write(block, &garbage);
    let _ = fs::remove_file(site.image());
    image.to_file(&site.image()).unwrap();
    let what = format!("COPPICE_SEED={seed}, block at {block}");
    let code = |words: &[&str], path: &Path| {
        let output = finish(site.coppice(words).arg(path)).unwrap();
        let said = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8_lossy(&said).into_owned())
    };
    site.mount("");
    assert_intact(&site.mnt(), base, &what);
    let (healed, said) = code(&["scrub", "-q"], &site.mnt());
    assert!(matches!(healed, Some(0 | 1)), "{what}: {said}");
    assert_intact(&site.mnt(), base, &what);
    site.unmount_noisily();
    assert!(!site.log().contains("panicked"), "{what}: {}", site.log());
    fs::remove_file(site.path("log")).unwrap();
    for words in [&["fsck", "-n"][..], &["scrub", "-q"]] {
        let (found, said) = code(words, &site.image());
        assert_eq!(found, Some(0), "{what}: afterwards {words:?}: {said}");
    }
    u64::from(healed == Some(1))
}

#[test]
fn a_scrub_heals_what_a_mount_can_do_without() {
    let sites: Vec<Site> = (0..2).filter_map(|_| Site::new()).collect();
    let Some(first) = sites.first() else { return };
    let images = count("COPPICE_SCRUB_MOUNTS", 8);
    let bases = [made(first, true), made(first, false)];
    let _ = fs::remove_file(first.path("log"));
    let start = Instant::now();
    let (next, healed) = (AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for site in &sites {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let Some(base) = bases.get(number as usize % 2).filter(|_| number < images) else { return };
                    let _limit = Limit::new();
                    healed.fetch_add(heals(site, base, seed_or(1) + number), Ordering::Relaxed);
                }
            });
        }
    });
    println!(
        "{images} mounts with one block of metadata destroyed (of {} and {}): all mounted, all intact, all healed ({} by the scrub) in {:.1} s",
        bases[0].blocks.len(),
        bases[1].blocks.len(),
        healed.load(Ordering::Relaxed),
        start.elapsed().as_secs_f64()
    );
}
