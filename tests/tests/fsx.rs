//! fsx: random operations on one file against a plain array of bytes. In this process by [`coppicefs_tests::fsx`], for every seed the same run; and by
//! the program of that name on a mount, in each cache mode, where it is installed (`cargo install fsx --locked`; `.ci/run` does). And the other program
//! from the registry that tests filesystems: pjdfstest, its whole suite.
//!
//! `COPPICE_FSX_OPERATIONS=n` runs n operations of each, `COPPICE_SEED=n` sets the seed.

use std::path::PathBuf;

use coppicefs::options::CompressionChoice;
use coppicefs_tests::crash::seed_or;
use coppicefs_tests::fsx::{FsxOptions, run};
use coppicefs_tests::limit::{Limit, finish, lengthen};
use coppicefs_tests::mount::{Site, command, count};

fn in_process(compression: CompressionChoice) {
    let operations = count("COPPICE_FSX_OPERATIONS", 8000);
    lengthen(1 + operations / 100_000);
    let _limit = Limit::new();
    let first = seed_or(1);
    for seed in first..first + 4 {
        let options = FsxOptions { seed, operations: operations / 4, compression };
        run(options).unwrap_or_else(|wrong| panic!("{wrong}"));
    }
}

#[test]
fn random_operations_equal_an_array() {
    in_process(CompressionChoice::None);
}

#[test]
fn random_operations_equal_an_array_with_compression() {
    in_process(CompressionChoice::Lz4);
}

/// The program that cargo has installed, if it has.
fn program(name: &str) -> Option<PathBuf> {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo")));
    let found = home.map(|home| home.join("bin").join(name)).filter(|path| path.exists());
    if found.is_none() {
        eprintln!("skipped: {name} is not installed (cargo install {name} --locked)");
    }
    found
}

/// What the kernel passes on of what it can do.
const CONFIGURATION: &str = "flen = 262144
nomsyncafterwrite = false
[opsize]
max = 65536
min = 1
align = 1
[weights]
truncate = 1.0
invalidate = 1.0
fsync = 0.3
read = 2.0
mapread = 2.0
write = 2.0
mapwrite = 1.0
close_open = 0.5
punch_hole = 1.0
sendfile = 1.0
posix_fallocate = 1.0
posix_fadvise = 1.0
copy_file_range = 1.0
";

fn on_a_mount(mount_options: &str) {
    let Some(program) = program("fsx") else { return };
    let Some(site) = Site::formatted("256M", &[]) else { return };
    let configuration = site.path("fsx.toml");
    std::fs::write(&configuration, CONFIGURATION).unwrap();
    let operations = count("COPPICE_FSX_OPERATIONS", 400);
    lengthen(1 + operations / 10_000);
    let operations = operations.to_string();
    let first = seed_or(1);
    site.mount(mount_options);
    for seed in first..first + 2 {
        let mut fsx = command(&program);
        fsx.arg("-f").arg(&configuration);
        fsx.args(["-q", "-N", &operations, "-S", &seed.to_string(), "-P"]).arg(site.path(""));
        let output = finish(fsx.arg(site.mnt().join(format!("fsx{seed}")))).unwrap();
        assert!(
            output.status.success(),
            "{mount_options}, seed {seed}: {}\n{}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    site.unmount_and_check();
}

#[test]
fn fsx_on_a_mount_that_the_kernel_caches() {
    on_a_mount("cache=kernel,cache_size=16M,compression=none");
    on_a_mount("cache=kernel,cache_size=16M,compression=zstd");
}

#[test]
fn fsx_on_a_mount_that_the_daemon_caches() {
    on_a_mount("cache=daemon,cache_size=16M,compression=none");
    on_a_mount("cache=daemon,cache_size=16M,compression=lz4");
}

#[test]
fn fsx_on_a_mount_whose_writes_the_kernel_delays() {
    on_a_mount("cache=writeback,cache_size=16M,compression=none");
    on_a_mount("cache=writeback,cache_size=16M,compression=lz4");
}

/// What Linux has of it, and three users that every Debian has.
const POSIX_CONFIGURATION: &str = "[features]
posix_fallocate = {}
rename_ctime = {}
utimensat = {}
utime_now = {}
[settings]
naptime = 0.01
allow_remount = false
[dummy_auth]
entries = [[\"nobody\", \"nogroup\"], [\"daemon\", \"daemon\"], [\"bin\", \"bin\"]]
";

#[test]
fn the_whole_suite_of_pjdfstest() {
    let Some(program) = program("pjdfstest") else { return };
    let Some(site) = Site::formatted("256M", &[]) else { return };
    let configuration = site.path("pjdfstest.toml");
    std::fs::write(&configuration, POSIX_CONFIGURATION).unwrap();
    site.mount("");
    let mut suite = command(&program);
    suite.arg("-c").arg(&configuration).arg("-p").arg(site.mnt()).current_dir(site.mnt());
    let output = finish(&mut suite).unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{}\n{said}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    assert!(said.contains("Summary: 0 failed"), "{said}");
    site.unmount_and_check();
}
