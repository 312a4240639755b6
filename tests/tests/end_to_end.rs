//! What people do with a filesystem, through the kernel: copying trees, git, SQLite, fio, and memory that stays bounded.
//!
//! Longer forms by environment variables: `COPPICE_COPY_MIB` (memory test), `COPPICE_FIO_MIB`, `COPPICE_FIO_JOBS`,
//! `COPPICE_SQLITE_TRANSACTIONS`, `COPPICE_TREE` (a folder that the tests of copying take instead of a small made tree).

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, PermissionsExt, chown, lchown, symlink};
use std::path::{Path, PathBuf};
use std::time::Instant;

use coppicefs_tests::limit::{finish, lengthen};
use coppicefs_tests::mount::{Site, command, count, installed, run};
use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};
use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags};

/// Bytes that compress about by half.
fn content(random: &mut Xoshiro256PlusPlus, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    for chunk in bytes.chunks_mut(64) {
        let half = chunk.len() / 2;
        random.fill_bytes(&mut chunk[..half]);
    }
    bytes
}

fn set_times(path: &Path, seconds: i64, nanoseconds: i64) {
    let time = |seconds| Timespec { tv_sec: seconds, tv_nsec: nanoseconds };
    let times = Timestamps { last_access: time(seconds + 1), last_modification: time(seconds) };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

/// A few hundred files of every kind, with everything that a copy should keep.
fn make_tree(root: &Path) {
    let mut random = Xoshiro256PlusPlus::seed_from_u64(7);
    let times = [(0, 0), (-1, 999_999_999), (-86_400 * 365 * 40, 123_456_789), (1_700_000_000, 1), (4_102_444_800, 5)];
    let mut files = Vec::new();
    for folder in 0..12_u32 {
        let directory = root.join(format!("folder {folder}/näme/deep"));
        fs::create_dir_all(&directory).unwrap();
        for number in 0..25_u32 {
            let length = match number % 6 {
                0 => 0,
                1 => 1 + (random.next_u32() % 100) as usize,
                2 => 4096,
                3 => (random.next_u32() % 20_000) as usize,
                4 => (random.next_u32() % 150_000) as usize,
                _ => 4095 + (random.next_u32() % 3) as usize,
            };
            let path = directory.join(format!("file.{number}"));
            fs::write(&path, content(&mut random, length)).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o400 + random.next_u32() % 0o377)).unwrap();
            files.push(path);
        }
    }
    fs::write(root.join("large"), content(&mut random, 9_000_001)).unwrap();
    fs::write(root.join("empty"), b"").unwrap();
    let sparse = File::create(root.join("sparse")).unwrap();
    for at in [1 << 20, (5 << 20) + 77, 90 << 20] {
        sparse.write_all_at(b"an island in a hole", at).unwrap();
    }
    sparse.set_len(120 << 20).unwrap();
    drop(sparse);
    for (index, path) in files.iter().enumerate() {
        if index % 7 == 0 {
            fs::hard_link(path, root.join(format!("hard link {index}"))).unwrap();
        }
        if index % 9 == 0 {
            let link = root.join(format!("link {index}"));
            symlink(format!("folder/nowhere/{}", "x".repeat(index)), &link).unwrap();
            lchown(&link, Some(12), Some(34)).unwrap();
            set_times(&link, -5, 6);
        }
        if index % 5 == 0 {
            chown(path, Some(1000 + u32::try_from(index).unwrap()), Some(70_000)).unwrap();
        }
        if index % 4 == 0 {
            for (name, length) in [("user.small", 3), ("user.ünïcode", 200), ("user.large", 3000)] {
                let value = content(&mut random, length);
                rustix::fs::setxattr(path, name, &value, XattrFlags::empty()).unwrap();
            }
        }
    }
    // chown clears these bits, so they come later.
    fs::set_permissions(&files[5], fs::Permissions::from_mode(0o6755)).unwrap();
    rustix::fs::mknodat(CWD, root.join("fifo"), FileType::Fifo, Mode::from_raw_mode(0o620), 0).unwrap();
    rustix::fs::mknodat(CWD, root.join("socket"), FileType::Socket, Mode::from_raw_mode(0o600), 0).unwrap();
    rustix::fs::mknodat(
        CWD,
        root.join("null"),
        FileType::CharacterDevice,
        Mode::from_raw_mode(0o666),
        rustix::fs::makedev(1, 3),
    )
    .unwrap();
    for (index, path) in files.iter().enumerate() {
        let (seconds, nanoseconds) = times[index % times.len()];
        set_times(path, seconds, nanoseconds);
    }
    let sticky = root.join("sticky");
    fs::create_dir(&sticky).unwrap();
    fs::set_permissions(&sticky, fs::Permissions::from_mode(0o3777)).unwrap();
    set_times(&sticky, -1_000_000_000, 999_999_999);
    // rsync takes times for equal that differ within the second: nothing may be as new as its copies.
    run(command("find").arg(root).args([
        "-newermt",
        "-1 hour",
        "-exec",
        "touch",
        "-h",
        "-d",
        "2001-02-03 04:05:06.789",
        "{}",
        "+",
    ]));
}

/// All that `find` and `getfattr` can tell of a tree, sorted.
fn describe(root: &Path) -> String {
    // Sizes and link counts of directories are each filesystem's own.
    let found = run(command("find")
        .args([".", "-printf", "%p %y %m %U %G %T@ %l"])
        .args(["(", "-type", "d", "-printf", "\\n", "-o", "-printf", " %s %n\\n", ")"])
        .current_dir(root));
    let mut lines: Vec<_> = found.lines().map(str::to_owned).collect();
    lines.sort();
    let xattrs = run(command("sh")
        .args(["-c", "find . -print0 | LC_ALL=C sort -z | xargs -0 getfattr -h -d -m '^user' -e hex --absolute-names"])
        .current_dir(root));
    let linked = run(command("find").args([".", "-type", "f", "-links", "+1", "-printf", "%i\\n"]).current_dir(root));
    let linked: std::collections::BTreeSet<_> = linked.lines().collect();
    format!("{}\n{xattrs}\n{} inodes with several links", lines.join("\n"), linked.len())
}

fn assert_same_tree(left: &Path, right: &Path) {
    run(command("diff")
        .args(["-r", "--no-dereference", "--exclude=fifo", "--exclude=socket", "--exclude=null"])
        .args([left, right]));
    let (expected, found) = (describe(left), describe(right));
    for (expected, found) in expected.lines().zip(found.lines()) {
        assert_eq!(expected, found);
    }
    assert_eq!(expected.lines().count(), found.lines().count());
}

/// Runs `work`, and says how long it took.
fn timed<T>(what: &str, work: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let value = work();
    eprintln!("{what}: {:.2} s", start.elapsed().as_secs_f64());
    value
}

fn copy_a_tree(compression: &str) {
    if !installed("rsync") || !installed("getfattr") {
        return;
    }
    let tree = std::env::var_os("COPPICE_TREE").map(PathBuf::from);
    let size = if tree.is_some() { "8G" } else { "1G" };
    if tree.is_some() {
        lengthen(20);
    }
    let Some(site) = Site::formatted(size, &["--compression", compression]) else { return };
    let is_made = tree.is_none();
    let source = tree.unwrap_or_else(|| site.path("source"));
    if is_made {
        fs::create_dir(&source).unwrap();
        make_tree(&source);
    }
    // One of them with the kernel's delayed writes.
    site.mount(if compression == "lz4" { "cache=writeback" } else { "" });
    let (copied, synchronised) = (site.mnt().join("copied"), site.mnt().join("synchronised"));
    timed(&format!("{compression}: cp -a"), || run(command("cp").arg("-a").args([&source, &copied])));
    let mut from = source.clone().into_os_string();
    from.push("/");
    let options = if is_made { "-aHAXS" } else { "-aHAX" };
    timed(&format!("{compression}: rsync {options}"), || {
        run(command("rsync").arg(options).arg(&from).arg(&synchronised))
    });
    site.unmount();
    timed(&format!("{compression}: fsck -n"), || site.assert_clean());
    site.mount("");
    timed(&format!("{compression}: compared"), || assert_same_tree(&source, &copied));
    site.remount("cache=daemon");
    assert_same_tree(&source, &copied);
    assert_same_tree(&source, &synchronised);
    if is_made {
        let allocated = std::os::unix::fs::MetadataExt::blocks(&fs::metadata(copied.join("sparse")).unwrap()) * 512;
        assert!(allocated <= (3 * 128) << 10, "the holes of a sparse file take space: {allocated}");
    }
    // Once more finds nothing to do: times and sizes are as rsync left them.
    let again = run(command("rsync").args([&format!("{options}i")]).arg(&from).arg(&synchronised));
    assert_eq!(again, "");
    timed(&format!("{compression}: rm -r"), || fs::remove_dir_all(&copied).unwrap());
    site.unmount_and_check();
}

#[test]
fn a_tree_is_copied_without_compression() {
    copy_a_tree("none");
}

#[test]
fn a_tree_is_copied_with_lz4() {
    copy_a_tree("lz4");
}

#[test]
fn a_tree_is_copied_with_zstd() {
    copy_a_tree("zstd");
}

#[test]
fn git_clones_and_checks() {
    if !installed("git") {
        return;
    }
    let Some(site) = Site::formatted("512M", &["--compression", "zstd"]) else { return };
    site.mount("");
    let git = |folder: &Path, words: &[&str]| {
        run(command("git")
            .args(["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "gc.auto=0", "-c", "safe.directory=*"])
            .args(words)
            .current_dir(folder)
            .env("HOME", site.path("")))
    };
    // A repository with some history, made on the filesystem itself.
    let first = site.mnt().join("first");
    fs::create_dir(&first).unwrap();
    git(&first, &["init", "-q", "-b", "main"]);
    let mut random = Xoshiro256PlusPlus::seed_from_u64(11);
    for commit in 0..8 {
        for number in 0..30_u32 {
            let folder = first.join(format!("src/{}", number % 5));
            fs::create_dir_all(&folder).unwrap();
            let length = 100 + (random.next_u32() % 30_000) as usize;
            fs::write(folder.join(format!("file{number}")), content(&mut random, length)).unwrap();
        }
        git(&first, &["add", "-A"]);
        git(&first, &["commit", "-q", "-m", &format!("commit {commit}")]);
    }
    git(&site.mnt(), &["clone", "-q", "--no-local", "first", "second"]);
    let second = site.mnt().join("second");
    git(&second, &["repack", "-adq"]);
    site.remount("");
    for repository in [&first, &second] {
        git(repository, &["fsck", "--full", "--strict"]);
        assert_eq!(git(repository, &["status", "--porcelain"]), "");
        assert_eq!(git(repository, &["rev-list", "--count", "HEAD"]).trim(), "8");
    }
    site.unmount_and_check();
}

#[test]
fn sqlite_commits() {
    if !installed("sqlite3") {
        return;
    }
    let transactions = count("COPPICE_SQLITE_TRANSACTIONS", 60);
    let Some(site) = Site::formatted("256M", &[]) else { return };
    site.mount("");
    for (mode, cache) in [("delete", "writeback"), ("wal", "kernel")] {
        site.remount(&format!("cache={cache}"));
        let database = site.mnt().join(format!("{mode}.db"));
        let mut script = format!(
            "PRAGMA journal_mode={mode}; PRAGMA synchronous=FULL; CREATE TABLE t(id INTEGER PRIMARY KEY, v TEXT);\n"
        );
        for number in 0..transactions {
            script.push_str(&format!(
                "BEGIN; INSERT INTO t(v) VALUES(hex(randomblob({}))); COMMIT;\n",
                10 + number * 13 % 3000
            ));
        }
        let script_path = site.path("script");
        fs::write(&script_path, script).unwrap();
        run(command("sqlite3").arg(&database).stdin(File::open(script_path).unwrap()));
    }
    site.remount("");
    for mode in ["delete", "wal"] {
        let database = site.mnt().join(format!("{mode}.db"));
        let said = run(command("sqlite3").arg(&database).arg("PRAGMA integrity_check; SELECT count(*) FROM t;"));
        assert_eq!(said, format!("ok\n{transactions}\n"));
    }
    site.unmount_and_check();
}

#[test]
fn a_crate_is_built_with_its_target_on_the_mount() {
    let cargo = PathBuf::from(env!("CARGO"));
    if !cargo.exists() {
        eprintln!("skipped: the cargo that built this test is gone");
        return;
    }
    let Some(site) = Site::formatted("1G", &["--compression", "lz4"]) else { return };
    site.mount("");
    let folder = site.mnt().join("hello");
    fs::create_dir_all(folder.join("src")).unwrap();
    fs::write(folder.join("Cargo.toml"), "[package]\nname = \"hello\"\nversion = \"0.1.0\"\nedition = \"2021\"\n")
        .unwrap();
    fs::write(folder.join("src/lib.rs"), "pub fn twice(x: u32) -> u32 { 2 * x }\n").unwrap();
    fs::write(folder.join("src/main.rs"), "fn main() { println!(\"{}\", hello::twice(21)); }\n").unwrap();
    let build = |words: &[&str]| {
        let mut command = command(&cargo);
        // The tools of the outer build, but nothing that it says of itself.
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("CARGO") && name != "CARGO_HOME" {
                command.env_remove(name);
            }
        }
        command.env("PATH", std::env::var_os("PATH").unwrap_or_default());
        run(command.args(words).arg("--offline").current_dir(&folder))
    };
    timed("cargo build", || build(&["build", "-q"]));
    assert_eq!(run(&mut command(folder.join("target/debug/hello"))), "42\n");
    site.remount("cache=daemon");
    // Times and contents are as cargo left them: nothing is built again; then a change is seen.
    let said = run(command("find").args([folder.as_path(), Path::new("-newer"), &folder.join("target/debug/hello")]));
    build(&["build", "-q"]);
    assert_eq!(
        said,
        run(command("find").args([folder.as_path(), Path::new("-newer"), &folder.join("target/debug/hello")]))
    );
    fs::write(folder.join("src/lib.rs"), "pub fn twice(x: u32) -> u32 { x + x + 1 }\n").unwrap();
    build(&["build", "-q"]);
    assert_eq!(run(&mut command(folder.join("target/debug/hello"))), "43\n");
    site.unmount_and_check();
}

fn verify_with_fio(cache: &str) {
    if !installed("fio") {
        return;
    }
    let (mebibytes, jobs) = (count("COPPICE_FIO_MIB", 12), count("COPPICE_FIO_JOBS", 1));
    let Some(site) = Site::formatted(&format!("{}M", 256 + 8 * jobs * mebibytes), &[]) else { return };
    site.mount(&format!("cache={cache}"));
    for (engine, pattern, direct, depth) in [
        ("psync", "write", 0, 1),
        ("psync", "randwrite", 0, 1),
        ("psync", "randwrite", 1, 1),
        ("io_uring", "randwrite", 0, 8),
        ("io_uring", "randwrite", 1, 8),
        ("mmap", "randwrite", 0, 1),
    ] {
        let mut fio = command("fio");
        fio.args([
            "--name=verify",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--do_verify=1",
            "--bsrange=4k-1m",
            "--blockalign=4k",
        ])
        .args(["--norandommap", "--random_generator=tausworthe64", "--minimal", "--fsync=64", "--serialize_overlap=1"])
        .arg(format!("--ioengine={engine}"))
        .arg(format!("--rw={pattern}"))
        .arg(format!("--direct={direct}"))
        .arg(format!("--iodepth={depth}"))
        .arg(format!("--size={mebibytes}M"))
        .arg(format!("--numjobs={jobs}"))
        .arg(format!("--directory={}", site.mnt().display()))
        .current_dir(site.path(""));
        let output = finish(&mut fio).unwrap();
        let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        if engine == "io_uring" && (said.contains("not permitted") || said.contains("not implemented")) {
            eprintln!("skipped: no io_uring here");
            continue;
        }
        assert!(output.status.success(), "{engine} {pattern} direct={direct}: {said}");
    }
    site.unmount_and_check();
}

#[test]
fn fio_verifies_through_the_kernels_cache() {
    verify_with_fio("kernel");
}

#[test]
fn fio_verifies_through_the_kernels_delayed_writes() {
    verify_with_fio("writeback");
}

#[test]
fn fio_verifies_through_the_daemons_cache() {
    verify_with_fio("daemon");
}

/// What the daemon may use beside its caches.
const MEMORY_BESIDE_CACHES: u64 = 192 << 20;

#[test]
fn memory_is_bounded_by_cache_size() {
    let mebibytes = count("COPPICE_COPY_MIB", 240);
    let Some(site) = Site::formatted(&format!("{}M", mebibytes * 5 / 4 + 256), &[]) else { return };
    site.mount("cache_size=64M");
    let mut random = Xoshiro256PlusPlus::seed_from_u64(3);
    let chunk = content(&mut random, 1 << 20);
    std::thread::scope(|scope| {
        for writer in 0..4_u64 {
            let (site, chunk) = (&site, &chunk);
            scope.spawn(move || {
                let mut file = File::create(site.mnt().join(format!("file {writer}"))).unwrap();
                for _ in 0..mebibytes / 4 {
                    file.write_all(chunk).unwrap();
                }
            });
        }
    });
    // Many small files too: inodes and names are cached as well.
    for number in 0..3000 {
        fs::write(site.mnt().join(format!("small {number}")), b"a few bytes").unwrap();
    }
    std::thread::scope(|scope| {
        for reader in 0..4_u64 {
            let site = &site;
            scope.spawn(move || run(command("cksum").arg(site.mnt().join(format!("file {reader}")))));
        }
    });
    let peak = site.daemon_memory_bytes("VmHWM");
    assert!(peak < (64 << 20) + MEMORY_BESIDE_CACHES, "the daemon used {} MiB", peak >> 20);
    eprintln!("the daemon used at most {} MiB", peak >> 20);
    site.unmount_and_check();
}
