//! POSIX and Linux odds and ends that a user meets, through the kernel.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown};
use std::process::Command;

use coppicefs_tests::mount::{Site, command, installed, is_mounted, program, run, wait_until};
use rustix::fs::{CWD, FallocateFlags, Mode, OFlags, RenameFlags, fallocate, renameat_with};
use rustix::io::Errno;

fn on_a_mount(options: &str, test: impl FnOnce(&Site)) {
    let Some(site) = Site::formatted("256M", &[]) else { return };
    site.mount(options);
    test(&site);
    site.unmount_and_check();
}

/// For what a cache of file data in front of us could get wrong.
fn on_a_mount_of_each_mode(options: &str, test: impl Fn(&Site)) {
    for mode in ["kernel", "writeback", "daemon"] {
        on_a_mount(format!("cache={mode},{options}").trim_end_matches(','), &test);
    }
}

#[test]
fn renames_with_flags_and_unnamed_files() {
    on_a_mount("", |site| {
        let path = |name: &str| site.mnt().join(name);
        let unnamed = rustix::fs::open(site.mnt(), OFlags::TMPFILE | OFlags::RDWR, Mode::from_raw_mode(0o600));
        assert_eq!(unnamed.unwrap_err(), Errno::OPNOTSUPP);
        fs::write(path("one"), b"one").unwrap();
        fs::create_dir(path("two")).unwrap();
        fs::write(path("two/inner"), b"inner").unwrap();
        let rename = |from: &str, to: &str, flags| renameat_with(CWD, path(from), CWD, path(to), flags);
        assert_eq!(rename("one", "two", RenameFlags::NOREPLACE), Err(Errno::EXIST));
        rename("one", "three", RenameFlags::NOREPLACE).unwrap();
        rename("three", "two", RenameFlags::EXCHANGE).unwrap();
        assert_eq!(fs::read(path("two")).unwrap(), b"one");
        assert_eq!(fs::read(path("three/inner")).unwrap(), b"inner");
        assert_eq!(rename("three", "absent", RenameFlags::EXCHANGE), Err(Errno::NOENT));
        assert_eq!(rename("three", "three/below", RenameFlags::empty()), Err(Errno::INVAL));
        assert_eq!(rename("two", "three", RenameFlags::empty()), Err(Errno::ISDIR));
        fs::create_dir(path("four")).unwrap();
        assert_eq!(rename("four", "three", RenameFlags::empty()), Err(Errno::NOTEMPTY));
        assert_eq!(rename("three", "four", RenameFlags::empty()), Ok(()));
        site.remount("");
        assert_eq!(fs::read(path("four/inner")).unwrap(), b"inner");
        assert!(!path("three").exists());
    });
}

#[test]
fn an_unlinked_file_lives_until_it_is_closed() {
    on_a_mount_of_each_mode("", |site| {
        site.sync();
        let path = site.mnt().join("file");
        let mut file = File::options().create(true).truncate(true).read(true).write(true).open(&path).unwrap();
        file.write_all(&vec![7; 3 << 20]).unwrap();
        file.sync_all().unwrap();
        fs::remove_file(&path).unwrap();
        assert!(!path.exists());
        assert_eq!(file.metadata().unwrap().nlink(), 0);
        file.write_all(&vec![8; 1 << 20]).unwrap();
        file.sync_all().unwrap();
        file.rewind().unwrap();
        let mut found = Vec::new();
        file.read_to_end(&mut found).unwrap();
        assert!(found[..3 << 20].iter().all(|&byte| byte == 7) && found[3 << 20..].iter().all(|&byte| byte == 8));
        drop(file);
        wait_until("its space is free", || {
            site.sync();
            site.usage("data_bytes") == 0
        });
    });
}

#[test]
fn appends_from_many_handles_are_whole() {
    on_a_mount_of_each_mode("", |site| {
        const RECORD: usize = 37;
        let path = site.mnt().join("log");
        std::thread::scope(|scope| {
            for writer in 0..4_u8 {
                let path = &path;
                scope.spawn(move || {
                    let mut file = File::options().create(true).append(true).open(path).unwrap();
                    for _ in 0..500 {
                        file.write_all(&[b'a' + writer; RECORD]).unwrap();
                    }
                });
            }
        });
        site.remount("");
        let found = fs::read(&path).unwrap();
        assert_eq!(found.len(), 4 * 500 * RECORD);
        let mut counts = [0; 4];
        for record in found.chunks(RECORD) {
            assert!(record.iter().all(|byte| byte == &record[0]), "a record is torn: {record:?}");
            counts[usize::from(record[0] - b'a')] += 1;
        }
        assert_eq!(counts, [500; 4]);
    });
}

#[test]
fn allocation_holes_and_seeking() {
    for options in ["", "cache=writeback", "cache=daemon"] {
        on_a_mount(options, |site| {
            let path = site.mnt().join("file");
            let file = File::options().create(true).truncate(true).read(true).write(true).open(&path).unwrap();
            fallocate(&file, FallocateFlags::empty(), 0, 1 << 20).unwrap();
            assert_eq!(file.metadata().unwrap().len(), 1 << 20);
            assert!(file.metadata().unwrap().blocks() * 512 >= 1 << 20, "fallocate allocates");
            fallocate(&file, FallocateFlags::KEEP_SIZE, 1 << 20, 1 << 20).unwrap();
            assert_eq!(file.metadata().unwrap().len(), 1 << 20);
            file.write_all_at(&vec![5; 1 << 20], 0).unwrap();
            file.sync_all().unwrap();
            fallocate(&file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 100_000, 300_000).unwrap();
            let seek = |from| rustix::fs::seek(&file, from).unwrap();
            assert_eq!(seek(rustix::fs::SeekFrom::Hole(0)), 102_400, "the whole blocks of a punched range are a hole");
            assert_eq!(seek(rustix::fs::SeekFrom::Data(102_400)), 397_312);
            assert_eq!(seek(rustix::fs::SeekFrom::Hole(397_312)), 1 << 20);
            assert_eq!(rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(1 << 20)), Err(Errno::NXIO));
            let mut expected = vec![5; 1 << 20];
            expected[100_000..400_000].fill(0);
            assert!(fs::read(&path).unwrap() == expected);
            for mode in [FallocateFlags::COLLAPSE_RANGE, FallocateFlags::INSERT_RANGE] {
                // The kernel does not pass these on to FUSE: `coppice collapse` and `coppice insert` do it.
                assert_eq!(fallocate(&file, mode, 0, 4096), Err(Errno::OPNOTSUPP));
            }
            assert!(fs::read(&path).unwrap() == expected);
            file.set_len(77_777).unwrap();
            file.set_len(200_000).unwrap();
            expected.truncate(77_777);
            expected.resize(200_000, 0);
            site_remount_compare(site, options, &path, file, &expected);
        });
    }
}

fn site_remount_compare(site: &Site, options: &str, path: &std::path::Path, file: File, expected: &[u8]) {
    drop(file);
    assert!(fs::read(path).unwrap() == expected);
    site.remount(options);
    assert!(fs::read(path).unwrap() == expected, "after mounting again");
}

#[test]
fn copies_inside_the_filesystem() {
    on_a_mount_of_each_mode("", |site| {
        let bytes: Vec<u8> = (0..3_000_000_u32).map(|index| (index.wrapping_mul(2_654_435_761) >> 11) as u8).collect();
        let (from, to) = (site.mnt().join("from"), site.mnt().join("to"));
        fs::write(&from, &bytes).unwrap();
        let (source, target) = (File::open(&from).unwrap(), File::create(&to).unwrap());
        let (mut at, mut into) = (1000, 0);
        while at < bytes.len() as u64 {
            let copied =
                rustix::fs::copy_file_range(&source, Some(&mut at), &target, Some(&mut into), 1 << 20).unwrap();
            assert!(copied > 0);
        }
        assert!(fs::read(&to).unwrap() == bytes[1000..]);
        drop((source, target));
        fs::copy(&from, &to).unwrap();
        fs::remove_file(&from).unwrap();
        site.remount("");
        assert!(fs::read(&to).unwrap() == bytes);
    });
}

#[test]
fn writing_and_chown_clear_set_id_bits() {
    on_a_mount_of_each_mode("suid", |site| {
        if !installed("setpriv") {
            return;
        }
        let path = site.mnt().join("program");
        let mode = || fs::metadata(&path).unwrap().mode() & 0o7777;
        fs::write(&path, b"x").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o6777)).unwrap();
        run(command("setpriv")
            .args(["--reuid=65534", "--regid=65534", "--clear-groups", "--", "sh", "-c", "echo more >> \"$0\""])
            .arg(&path));
        assert_eq!(mode(), 0o777, "a write by somebody else");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o6777)).unwrap();
        chown(&path, Some(5), Some(6)).unwrap();
        assert_eq!(mode(), 0o777, "chown");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o6777)).unwrap();
        run(command("setpriv")
            .args(["--reuid=65534", "--regid=65534", "--clear-groups", "--", "truncate", "-s", "1"])
            .arg(&path));
        assert_eq!(mode(), 0o777, "truncate by somebody else");
        if installed("fallocate") {
            fs::set_permissions(&path, fs::Permissions::from_mode(0o6777)).unwrap();
            run(command("setpriv")
                .args(["--reuid=65534", "--regid=65534", "--clear-groups", "--", "fallocate", "-p", "-l", "1"])
                .arg(&path));
            assert_eq!(mode(), 0o777, "a hole punched by somebody else");
        }
        // Capabilities that a program lends go with any change of its content, whoever makes it.
        let capabilities = [0x0200_0001_u32, 1 << 13, 0, 0, 0].map(u32::to_le_bytes).concat();
        let name = "security.capability";
        for by_another in [false, true] {
            rustix::fs::setxattr(&path, name, &capabilities, rustix::fs::XattrFlags::empty()).unwrap();
            let (user, script) = (if by_another { "65534" } else { "0" }, "echo more >> \"$0\"");
            run(command("setpriv").args([&format!("--reuid={user}"), "--", "sh", "-c", script]).arg(&path));
            let found = rustix::fs::getxattr(&path, name, &mut [0; 64][..]);
            assert_eq!(found, Err(Errno::NODATA), "capabilities after a write, by another: {by_another}");
        }
        // New entries of a set-group-id directory take its group.
        let folder = site.mnt().join("folder");
        fs::create_dir(&folder).unwrap();
        chown(&folder, None, Some(77)).unwrap();
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o2775)).unwrap();
        fs::create_dir(folder.join("below")).unwrap();
        fs::write(folder.join("file"), b"").unwrap();
        let below = fs::metadata(folder.join("below")).unwrap();
        assert_eq!((below.gid(), below.mode() & 0o2000), (77, 0o2000));
        assert_eq!(fs::metadata(folder.join("file")).unwrap().gid(), 77);
    });
}

#[test]
fn a_large_directory_lists_each_name_once() {
    on_a_mount("", |site| {
        const NAMES: usize = 20_000;
        let folder = site.mnt().join("folder");
        fs::create_dir(&folder).unwrap();
        for number in 0..NAMES {
            File::create(folder.join(format!("name {number}"))).unwrap();
        }
        let list = || -> Vec<String> {
            fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
        };
        let assert_all = |names: Vec<String>, count: usize| {
            assert_eq!(names.len(), count);
            assert_eq!(names.into_iter().collect::<BTreeSet<_>>().len(), count);
        };
        assert_all(list(), NAMES);
        site.remount("");
        assert_all(list(), NAMES);
        // Removed while it is listed: the others are still each seen once.
        let mut seen = BTreeSet::new();
        for entry in fs::read_dir(&folder).unwrap() {
            let entry = entry.unwrap();
            assert!(seen.insert(entry.file_name()), "{:?} twice", entry.file_name());
            if seen.len() % 2 == 0 {
                fs::remove_file(entry.path()).unwrap();
            }
        }
        assert_eq!(seen.len(), NAMES);
        assert_all(list(), NAMES / 2);
        fs::remove_dir_all(&folder).unwrap();
    });
}

#[test]
fn names_sizes_and_limits() {
    on_a_mount("", |site| {
        let longest = "n".repeat(255);
        fs::write(site.mnt().join(&longest), b"x").unwrap();
        let error = fs::write(site.mnt().join("n".repeat(256)), b"x").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::NAMETOOLONG.raw_os_error()));
        let unreadable =
            std::ffi::OsString::from(<std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(b"\xFF\xFE\n\x01"));
        fs::write(site.mnt().join(&unreadable), b"y").unwrap();
        let statistics = rustix::fs::statvfs(site.mnt()).unwrap();
        assert_eq!(statistics.f_namemax, 255);
        assert!(statistics.f_bavail <= statistics.f_bfree && statistics.f_bfree <= statistics.f_blocks);
        assert!(statistics.f_blocks * statistics.f_frsize <= 256 << 20);
        assert!(statistics.f_blocks * statistics.f_frsize > 200 << 20);
        assert!(statistics.f_files > 0 && statistics.f_ffree > 0);
        let target = "t".repeat(4095);
        std::os::unix::fs::symlink(&target, site.mnt().join("link")).unwrap();
        let far = File::create(site.mnt().join("far")).unwrap();
        far.write_all_at(b"end", (1 << 42) - 3).unwrap();
        // The last byte that a file can have is one like any other.
        let edge =
            File::options().create(true).truncate(true).read(true).write(true).open(site.mnt().join("edge")).unwrap();
        let last = i64::MAX as u64 - 1;
        let written = edge.write_all_at(b"x", last).and_then(|()| edge.sync_all());
        let mut byte = [0];
        match written {
            Ok(()) => {
                edge.read_exact_at(&mut byte, last).unwrap();
                assert_eq!(byte, *b"x");
            }
            Err(error) => assert_eq!(error.raw_os_error(), Some(Errno::FBIG.raw_os_error())),
        }
        drop((far, edge));
        site.remount("");
        assert_eq!(fs::read(site.mnt().join(&longest)).unwrap(), b"x");
        assert_eq!(fs::read(site.mnt().join(&unreadable)).unwrap(), b"y");
        assert_eq!(fs::read_link(site.mnt().join("link")).unwrap().as_os_str().len(), 4095);
        let mut far = File::open(site.mnt().join("far")).unwrap();
        assert_eq!(far.metadata().unwrap().len(), 1 << 42);
        far.seek(SeekFrom::End(-3)).unwrap();
        let mut end = String::new();
        far.read_to_string(&mut end).unwrap();
        assert_eq!(end, "end");
    });
}

#[test]
fn a_read_only_mount_refuses_changes_and_writes_nothing() {
    let Some(site) = Site::formatted("128M", &[]) else { return };
    site.mount("");
    fs::write(site.mnt().join("file"), b"content").unwrap();
    site.unmount();
    let sum = || run(command("sha256sum").arg(site.image()));
    let before = sum();
    site.mount("ro");
    assert_eq!(fs::read(site.mnt().join("file")).unwrap(), b"content");
    let refused = Some(Errno::ROFS.raw_os_error());
    assert_eq!(fs::write(site.mnt().join("new"), b"x").unwrap_err().raw_os_error(), refused);
    assert_eq!(fs::remove_file(site.mnt().join("file")).unwrap_err().raw_os_error(), refused);
    site.unmount();
    assert_eq!(sum(), before);
    site.assert_clean();
}

#[test]
fn an_ordinary_user_formats_mounts_and_unmounts() {
    const USER: u32 = 65_534;
    if !installed("setpriv") || !installed("fusermount3") {
        return;
    }
    let Some(site) = Site::new() else { return };
    if fs::metadata("/dev/fuse").unwrap().mode() & 0o006 != 0o006 {
        eprintln!("skipped: /dev/fuse is not open to other users");
        return;
    }
    chown(site.path(""), Some(USER), Some(USER)).unwrap();
    chown(site.mnt(), Some(USER), Some(USER)).unwrap();
    let copy = site.path("coppice");
    fs::copy(program(), &copy).unwrap();
    let as_user = |words: &[&str]| -> Command {
        let mut command = command("setpriv");
        command.args([&format!("--reuid={USER}"), &format!("--regid={USER}"), "--clear-groups", "--"]);
        command.args(words).current_dir(site.path(""));
        command
    };
    run(&mut as_user(&["./coppice", "mkfs", "-q", "--size", "128M", "disk.img"]));
    run(&mut as_user(&["./coppice", "mount", "--log", "log", "disk.img", "mnt"]));
    assert!(is_mounted(&site.mnt()));
    run(&mut as_user(&[
        "sh",
        "-c",
        "echo content > mnt/file && mkdir mnt/folder && chmod 700 mnt/folder && test -w mnt/file",
    ]));
    // Without allow_other the mount is this user's alone, root included.
    assert_eq!(fs::read_dir(site.mnt()).map(|_| ()).unwrap_err().raw_os_error(), Some(Errno::ACCESS.raw_os_error()));
    run(&mut as_user(&["./coppice", "sync", "mnt"]));
    run(&mut as_user(&["fusermount3", "-u", "mnt"]));
    assert!(!is_mounted(&site.mnt()));
    run(&mut as_user(&["./coppice", "fsck", "-n", "disk.img"]));
    run(&mut as_user(&["./coppice", "mount", "--log", "log", "disk.img", "mnt"]));
    assert_eq!(run(&mut as_user(&["cat", "mnt/file"])), "content\n");
    run(&mut as_user(&["fusermount3", "-u", "mnt"]));
    site.assert_clean();
}
