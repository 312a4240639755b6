//! What users give by mistake: each is refused with one line that says what is wrong and how to go on, and nothing is changed.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use coppicefs_tests::limit::finish;
use coppicefs_tests::mount::{Site, assert_refused, command, installed, run};
use rustix::fs::{SeekFrom, seek};

/// What a refusal must not change: the length, and what is in the file and where. Holes are not read: images are sparse.
fn fingerprint(path: &Path) -> (u64, Vec<(u64, Vec<u8>)>) {
    let file = File::open(path).unwrap();
    let length = file.metadata().unwrap().len();
    let mut pieces = Vec::new();
    let mut at = 0;
    while let Ok(start) = seek(&file, SeekFrom::Data(at)) {
        let end = seek(&file, SeekFrom::Hole(start)).unwrap();
        let mut bytes = vec![0; usize::try_from(end - start).unwrap()];
        file.read_exact_at(&mut bytes, start).unwrap();
        pieces.push((start, bytes));
        at = end;
    }
    (length, pieces)
}

fn assert_refused_unchanged(image: &Path, command: &mut Command, parts: &[&str]) {
    let before = fingerprint(image);
    let output = finish(command).unwrap();
    assert_refused(&output, parts);
    assert!(fingerprint(image) == before, "{command:?} changed the file");
}

/// Every tool that reads an image refuses this one, naming it.
fn assert_no_tool_takes(site: &Site, parts: &[&str]) {
    let image = site.image();
    let name = image.display().to_string();
    let parts = [&[name.as_str()], parts].concat();
    assert_refused_unchanged(&image, site.coppice(&["mount"]).arg(&image).arg(site.mnt()), &parts);
    for words in [&["fsck", "-n"][..], &["fsck", "-y"], &["show-super"], &["usage"], &["list"], &["journal"]] {
        assert_refused_unchanged(&image, site.coppice(words).arg(&image), &parts);
    }
    assert!(!site.is_mounted());
}

#[test]
fn files_that_hold_no_filesystem() {
    let Some(site) = Site::new() else { return };
    File::create(site.image()).unwrap();
    assert_no_tool_takes(&site, &[]);
    fs::write(site.image(), b"too short for anything").unwrap();
    assert_no_tool_takes(&site, &[]);
    File::create(site.image()).unwrap().set_len(128 << 20).unwrap();
    assert_no_tool_takes(&site, &[]);
    let mut state = 1_u64;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    })
    .take(8 << 20)
    .collect();
    fs::write(site.image(), noise).unwrap();
    assert_no_tool_takes(&site, &[]);
}

#[test]
fn a_truncated_image() {
    let Some(site) = Site::formatted("128M", &[]) else { return };
    for length in [48 << 20, 5 << 20, 70_000, 4096] {
        let file = File::options().write(true).open(site.image()).unwrap();
        file.set_len(length).unwrap();
        assert_no_tool_takes(&site, &[]);
    }
}

#[test]
fn another_filesystem_and_a_partition_table() {
    if !installed("mkfs.ext4") {
        return;
    }
    let Some(site) = Site::new() else { return };
    File::create(site.image()).unwrap().set_len(128 << 20).unwrap();
    run(command("mkfs.ext4").args(["-q", "-F"]).arg(site.image()));
    assert_no_tool_takes(&site, &["not a coppice filesystem"]);
    assert_refused_unchanged(&site.image(), site.coppice(&["mkfs"]).arg(site.image()), &["ext4", "-f"]);
    run(site.coppice(&["mkfs", "-q", "-f"]).arg(site.image()));
    site.assert_clean();
    assert_refused_unchanged(&site.image(), site.coppice(&["mkfs"]).arg(site.image()), &["coppice", "-f"]);

    let mut table = vec![0; 512];
    table[446..462].copy_from_slice(&[0, 2, 0, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 0, 1, 0]);
    table[510..].copy_from_slice(&[0x55, 0xAA]);
    table.resize(128 << 20, 0);
    fs::write(site.image(), table).unwrap();
    assert_refused_unchanged(&site.image(), site.coppice(&["mkfs"]).arg(site.image()), &["partition table", "-f"]);
}

/// A loop device, detached on drop.
struct Loop(PathBuf);

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = finish(command("losetup").arg("-d").arg(&self.0));
    }
}

fn attach(image: &Path) -> Option<Loop> {
    let output = finish(command("losetup").args(["--find", "--show"]).arg(image)).ok()?;
    if !output.status.success() {
        eprintln!("skipped: no loop device: {}", String::from_utf8_lossy(&output.stderr));
        return None;
    }
    Some(Loop(String::from_utf8(output.stdout).unwrap().trim().into()))
}

#[test]
fn an_image_that_is_mounted() {
    let Some(site) = Site::formatted("128M", &[]) else { return };
    site.mount("");
    fs::write(site.mnt().join("file"), b"content").unwrap();
    site.sync();
    let at = site.mnt().display().to_string();
    let other = site.path("other");
    fs::create_dir(&other).unwrap();
    let mut names = vec![site.image()];
    let looped = attach(&site.image());
    names.extend(looped.as_ref().map(|looped| looped.0.clone()));
    for name in &names {
        let refused = |command: &mut Command| {
            let started = Instant::now();
            assert_refused(&finish(command).unwrap(), &["in use", &at]);
            assert!(started.elapsed() < Duration::from_secs(20), "{command:?} waited for a live mount");
        };
        refused(site.coppice(&["mount"]).arg(name).arg(&other));
        refused(site.coppice(&["mkfs", "-f"]).arg(name));
        refused(site.coppice(&["fsck", "-y"]).arg(name));
        refused(site.coppice(&["fsck", "-n"]).arg(name));
        refused(site.coppice(&["list"]).arg(name));
    }
    assert_eq!(fs::read(site.mnt().join("file")).unwrap(), b"content");
    site.unmount();
    // The loop device itself is an image like any other.
    if let Some(Loop(device)) = &looped {
        run(site.coppice(&["mount"]).arg(device).arg(site.mnt()));
        assert_eq!(fs::read(site.mnt().join("file")).unwrap(), b"content");
        assert_refused(&finish(site.coppice(&["mount"]).arg(site.image()).arg(&other)).unwrap(), &["in use", &at]);
        run(command("umount").arg(site.mnt()));
        run(site.coppice(&["fsck", "-n"]).arg(device));
    }
    drop(looped);
    site.assert_clean();
}

#[test]
fn wrong_targets_mountpoints_and_options() {
    let Some(site) = Site::formatted("128M", &[]) else { return };
    let image = site.image();
    let mnt = site.mnt();
    let refused = |words: &[&str], paths: &[&Path], parts: &[&str]| {
        assert_refused_unchanged(&image, site.coppice(words).args(paths), parts);
        assert!(!site.is_mounted());
    };
    let absent = site.path("absent");
    // A directory as the image.
    refused(&["mount"], &[&mnt, &mnt], &["is a directory"]);
    refused(&["mkfs", "--size", "128M"], &[&mnt], &["directory"]);
    refused(&["fsck", "-n"], &[&mnt], &["directory"]);
    // No image.
    refused(&["mount"], &[&absent, &mnt], &["does not exist", "mkfs"]);
    refused(&["fsck", "-n"], &[&absent], &[&absent.display().to_string()]);
    refused(&["mkfs"], &[&absent], &["--size"]);
    assert!(!absent.exists());
    refused(&["mkfs", "--size", "128M"], &[&absent.join("disk.img")], &["does not exist", "mkdir -p"]);
    // A mountpoint that is none.
    refused(&["mount"], &[&image, &absent], &["does not exist", "mkdir"]);
    refused(&["mount"], &[&image, &image], &["not a directory"]);
    // Options and values that do not exist.
    refused(&["mount", "-o", "rw,colour=blue"], &[&image, &mnt], &["colour"]);
    refused(&["mount", "-o", "compression=snappy"], &[&image, &mnt], &["snappy"]);
    refused(&["mount", "-o", "cache_size=lots"], &[&image, &mnt], &["lots"]);
    refused(&["mkfs", "-f", "--bucket-size", "100"], &[&image], &["bucket"]);
    refused(&["mkfs", "-f", "--compression", "snappy"], &[&image], &["snappy", "zstd"]);
    refused(&["mkfs", "-f", "--colour"], &[&image], &["--colour", "--help"]);
    refused(&["mkfs", "-f"], &[], &["<TARGET>", "--help"]);
    refused(&["nosuch"], &[&image], &["nosuch", "--help"]);
    // Wrong usage has its own exit code in fsck(8).
    let output = finish(site.coppice(&["fsck", "--colour"]).arg(&image)).unwrap();
    assert_refused(&output, &["--colour", "--help"]);
    assert_eq!(output.status.code(), Some(16));
    let small = site.path("small");
    refused(&["mkfs", "--size", "1M"], &[&small], &["small"]);
    assert!(!small.exists(), "a refused mkfs left a file");
    // Not a mount of ours.
    refused(&["sync"], &[&site.path("")], &["not"]);
    refused(&["stats"], &[&site.path("")], &["not"]);
    site.assert_clean();
}

#[test]
fn an_image_that_may_not_be_written() {
    const USER: &str = "65534";
    if !installed("setpriv") {
        return;
    }
    let Some(site) = Site::formatted("128M", &[]) else { return };
    fs::set_permissions(site.image(), fs::Permissions::from_mode(0o444)).unwrap();
    std::os::unix::fs::chown(site.mnt(), Some(65_534), Some(65_534)).unwrap();
    let as_user = |words: &[&str]| {
        let mut command = command("setpriv");
        command.args([&format!("--reuid={USER}"), &format!("--regid={USER}"), "--clear-groups", "--"]);
        // The build folder may be closed to other users.
        let copy = site.path("coppice");
        if !copy.exists() {
            fs::copy(coppicefs_tests::mount::program(), &copy).unwrap();
        }
        command.arg(copy).args(words).current_dir(site.path(""));
        command
    };
    let image = site.image();
    let name = image.display().to_string();
    let mnt = site.mnt();
    assert_refused_unchanged(&image, as_user(&["mount"]).arg(&image).arg(&mnt), &[&name, "ro"]);
    assert_refused_unchanged(&image, as_user(&["fsck", "-y"]).arg(&image), &[&name]);
    assert_refused_unchanged(&image, as_user(&["mkfs", "-f"]).arg(&image), &[&name]);
    run(as_user(&["fsck", "-n"]).arg(&image));
    assert!(!site.is_mounted());
}

/// Without any option, and it works: bytes go in until it is full, and come out again.
#[test]
fn small_images_are_formatted_and_filled() {
    for mebibytes in [32, 48, 64, 127] {
        let Some(site) = Site::formatted(&format!("{mebibytes}M"), &[]) else { return };
        site.mount("");
        let available = site.available_bytes();
        assert!(available > mebibytes << 19, "{available} of {mebibytes} MiB can be used");
        let piece = vec![mebibytes as u8; 1 << 20];
        let mut full = 0;
        while fs::write(site.mnt().join(format!("file {full}")), &piece).is_ok() {
            full += 1;
            assert!(full <= mebibytes, "more went in than there is");
        }
        assert!(full << 20 > available / 2, "full after {full} MiB of {available} bytes");
        site.sync();
        site.remount("");
        for number in 0..full {
            assert!(fs::read(site.mnt().join(format!("file {number}"))).unwrap() == piece);
            fs::remove_file(site.mnt().join(format!("file {number}"))).unwrap();
        }
        site.unmount_and_check();
    }
}

#[test]
fn formatting_takes_no_time_whatever_the_size() {
    let Some(site) = Site::new() else { return };
    // The best of a few: other tests run at the same time.
    let fastest = (0..5)
        .map(|_| {
            let _ = fs::remove_file(site.image());
            let started = Instant::now();
            run(site.coppice(&["mkfs", "-q", "--size", "8T"]).arg(site.image()));
            started.elapsed()
        })
        .min()
        .unwrap();
    assert!(fastest < Duration::from_millis(if cfg!(debug_assertions) { 3000 } else { 1000 }), "{fastest:?}");
    site.mount("");
    fs::write(site.mnt().join("file"), b"content").unwrap();
    assert!(site.available_bytes() > 6 << 40);
    site.unmount();
}
