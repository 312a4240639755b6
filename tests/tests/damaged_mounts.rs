//! Damaged media under real programs, by seed: an image with 1 to 64 changed sectors is mounted, read and written by ordinary programs, repaired, and
//! checked. What was not damaged is whole; the second check is clean, or the first said what takes `--rebuild`, after which it is.
//!
//! `COPPICE_DAMAGED_MOUNTS` (4) is how many images, `COPPICE_SEED` the first one's seed.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use coppicefs::device::lock_holders;
use coppicefs_tests::crash::seed_or;
use coppicefs_tests::fuzz::Random;
use coppicefs_tests::limit::finish_within;
use coppicefs_tests::mount::{Site, command, count, run, wait_until};

const IMAGE_BYTES: u64 = 64 << 20;
const SECTOR: u64 = 512;
/// No program may take longer.
const LIMIT: Duration = Duration::from_secs(10);

fn content(number: usize) -> Vec<u8> {
    (0..1 + number * 3001).map(|at| (at / 3) as u8 ^ number as u8).collect()
}

/// Folders with files of all sizes; their contents by path.
fn populate(root: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    for folder in 0..4 {
        fs::create_dir(root.join(format!("folder {folder}"))).unwrap();
        for file in 0..20 {
            let path = format!("folder {folder}/file {file}");
            fs::write(root.join(&path), content(folder * 20 + file)).unwrap();
            files.insert(path, content(folder * 20 + file));
        }
    }
    files
}

/// Offsets of the sectors that hold something.
fn used(image: &[u8]) -> Vec<u64> {
    let sectors = image.chunks(SECTOR as usize).zip(0..);
    sectors.filter(|(sector, _)| sector.iter().any(|&byte| byte != 0)).map(|(_, number)| number * SECTOR).collect()
}

/// Exit code and what was said; nothing may hang or be killed by a signal.
fn fsck(site: &Site, words: &[&str]) -> (i32, String) {
    let output = finish_within(site.coppice(&["fsck"]).args(words).arg(site.image()), LIMIT).unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    (output.status.code().unwrap_or_else(|| panic!("fsck {words:?}: {}: {said}", output.status)), said)
}

/// Files whose contents are other than they should be. Errors are no lies.
fn lies(root: &Path, files: &BTreeMap<String, Vec<u8>>) -> Vec<String> {
    let is_lie = |path: &str, expected: &[u8]| fs::read(root.join(path)).is_ok_and(|found| found != expected);
    files.iter().filter(|(path, expected)| is_lie(path, expected)).map(|(path, _)| path.clone()).collect()
}

fn unmount(site: &Site) {
    wait_until("it is unmounted", || command("umount").arg(site.mnt()).status().unwrap().success());
    wait_until("the daemon is gone", || lock_holders(&site.image()).is_empty());
}

/// Whether it could be mounted, and whether a rebuild was needed.
fn one(site: &Site, what: &str, files: &BTreeMap<String, Vec<u8>>) -> (bool, bool) {
    let mut mount = site.coppice(&["mount", "--log"]);
    mount.arg(site.path("log")).arg(site.image()).arg(site.mnt());
    let output = finish_within(&mut mount, LIMIT).unwrap();
    let mounted = output.status.success();
    if mounted {
        let lies = lies(&site.mnt(), files);
        assert!(lies.is_empty(), "{what}: {lies:?} are not what was written");
        let _ = fs::write(site.mnt().join("new"), "new");
        let _ = finish_within(command("find").arg(site.mnt()).args(["-type", "f", "-newer", "/etc/passwd"]), LIMIT)
            .unwrap();
        unmount(site);
        assert!(!site.log().contains("panicked"), "{what}: {}", site.log());
    } else {
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(32) && said.lines().count() == 1, "{what}: {:?} {said}", output.status);
    }
    let (code, said) = fsck(site, &["-y"]);
    assert!([0, 1, 8].contains(&code) && !said.contains("panicked"), "{what}: fsck -y {code}: {said}");
    if code == 8 {
        assert!(said.contains("--rebuild"), "{what}: {said}");
        let (code, said) = fsck(site, &["--rebuild", "-y"]);
        assert_eq!(code, 1, "{what}: --rebuild: {said}");
    }
    let (checked, said) = fsck(site, &["-n"]);
    assert_eq!(checked, 0, "{what}: {said}");
    (mounted, code == 8)
}

#[test]
fn damaged_images_under_real_programs() {
    let Some(site) = Site::formatted("64M", &[]) else { return };
    site.mount("");
    let files = populate(&site.mnt());
    site.unmount_and_check();
    let good = fs::read(site.image()).unwrap();
    let used = used(&good);
    let start = Instant::now();
    let images = count("COPPICE_DAMAGED_MOUNTS", 4);
    let (mut mounted, mut rebuilt) = (0, 0);
    for seed in seed_or(1)..seed_or(1) + images {
        let mut random = Random::new(seed);
        fs::write(site.image(), &good).unwrap();
        let image = File::options().write(true).open(site.image()).unwrap();
        for _ in 0..=random.below(64) {
            // Mostly where something is.
            let offset = match random.below(4) {
                0 => random.below((IMAGE_BYTES / SECTOR) as usize) as u64 * SECTOR,
                _ => used[random.below(used.len())],
            };
            let noise: Vec<u8> = (0..SECTOR).map(|_| random.below(256) as u8).collect();
            image.write_all_at(if random.below(3) == 0 { &[0; 512] } else { &noise }, offset).unwrap();
        }
        drop(image);
        let (was_mounted, was_rebuilt) = one(&site, &format!("COPPICE_SEED={seed}"), &files);
        mounted += u64::from(was_mounted);
        rebuilt += u64::from(was_rebuilt);
        // What is left of it can be used.
        run(site.coppice(&["mount", "--log"]).arg(site.path("log")).arg(site.image()).arg(site.mnt()));
        let lies = lies(&site.mnt(), &files);
        assert!(lies.is_empty(), "COPPICE_SEED={seed}: after the repair {lies:?} are not what was written");
        fs::write(site.mnt().join("after"), "the repair").unwrap();
        unmount(&site);
    }
    println!(
        "{images} images in {:.1} s: {mounted} could be mounted, {rebuilt} took a rebuild",
        start.elapsed().as_secs_f64()
    );
}
