//! Readers against punch, truncate, collapse, insert, overwrite and reuse on a mount: see [`coppicefs_tests::race::mount`]. In each cache mode, with and
//! without checksums and compression; and a daemon whose add lock excludes nobody, which must be noticed.
//!
//! `COPPICE_RACE_SECONDS=n` races every combination for n seconds, instead of two for each cache mode for a moment; `COPPICE_SEED=n` sets the seed.

mod mapping;

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use coppicefs::device::{BlockDevice, FileDevice, FileOptions};
use coppicefs::filesystem::{Filesystem, OpenOptions};
use coppicefs::fuse::mounts::MountRequest;
use coppicefs::fuse::{Session, SessionSettings, client};
use coppicefs::options::CacheMode;
use coppicefs::space::TestSwitches;
use coppicefs_tests::crash::seed_or;
use coppicefs_tests::limit::{lengthen, show};
use coppicefs_tests::mount::{Site, command, wait_until};
use coppicefs_tests::race::mount::{Left, MountRace, MountReport, fill, run};
use mapping::Mapping;
use rustix::process::{Signal, kill_process};

/// As small as mkfs makes it.
const TINY: [&str; 6] = ["--bucket-size", "64K", "--node-size", "16K", "--journal-size", "1M"];

fn formatted(checksum: &str) -> Option<Site> {
    Site::formatted("32M", &[&TINY[..], &["--checksum", checksum]].concat())
}

/// On what is mounted at a site, filled before. Whoever serves it is shown and killed if the race does not end.
fn race(site: &Site, duration: Duration, cache: &str) -> Result<(MountReport, Left), String> {
    fill(&site.mnt(), site.available_bytes(), 1).unwrap();
    let daemon = site.daemon();
    let options = MountRace { duration, is_daemons_cache: cache == "daemon", seed: seed_or(1) };
    run(&site.mnt(), options, Mapping::for_reading, move || {
        show(daemon.as_raw_nonzero().get().cast_unsigned());
        let _ = kill_process(daemon, Signal::KILL);
    })
}

/// Counters of the daemon that say whether what was raced met.
fn meetings(site: &Site) -> Vec<(String, u64)> {
    let names = ["misses", "add_waited", "block_waited", "readahead_batches", "direct_slow", "buckets_discarded"];
    let is_wanted = |name: &str| names.iter().any(|wanted| name.rsplit('.').next() == Some(wanted));
    client::statistics(&site.mnt()).unwrap().into_iter().filter(|(name, _)| is_wanted(name)).collect()
}

fn races_well(cache: &str, checksum: &str, compression: &str, duration: Duration) {
    let Some(site) = formatted(checksum) else { return };
    let options = format!("cache={cache},cache_size=16M,commit=0,compression={compression}");
    site.mount(&options);
    let (report, left) = race(&site, duration, cache)
        .unwrap_or_else(|wrong| panic!("{options}, checksum {checksum}: {wrong}\nthe log:\n{}", site.log()));
    println!("{options}, checksum {checksum}: {report:?}, {:?}", meetings(&site));
    site.unmount_and_check();
    site.mount("");
    left.check(&site.mnt()).unwrap_or_else(|wrong| panic!("{options}, checksum {checksum}, mounted again: {wrong}"));
    site.unmount();
}

/// The short form: checksums with and without compression, in one mode the one way, in the next the other.
fn in_mode(cache: &str, short: [(&str, &str); 2]) {
    let seconds = std::env::var("COPPICE_RACE_SECONDS").ok().and_then(|seconds| seconds.parse().ok());
    let Some(seconds) = seconds else {
        for (checksum, compression) in short {
            races_well(cache, checksum, compression, Duration::from_millis(1500));
        }
        return;
    };
    lengthen(1 + seconds / 200);
    for checksum in ["crc32c", "none"] {
        for compression in ["none", "lz4"] {
            races_well(cache, checksum, compression, Duration::from_secs(seconds));
        }
    }
}

#[test]
fn every_stamp_is_explained_with_the_kernels_cache() {
    in_mode("kernel", [("crc32c", "none"), ("none", "lz4")]);
}

#[test]
fn every_stamp_is_explained_with_delayed_writes() {
    in_mode("writeback", [("none", "none"), ("crc32c", "lz4")]);
}

#[test]
fn every_stamp_is_explained_with_the_daemons_cache_alone() {
    in_mode("daemon", [("none", "none"), ("crc32c", "lz4")]);
}

/// In the child of [`an_add_lock_that_excludes_nobody_is_caught`]: where its image and its mountpoint are.
const BROKEN: &str = "COPPICE_RACE_BROKEN";

/// Serves the image of a folder until it is unmounted, with deliberate faults that no mount option switches on.
fn serve_broken(folder: &Path) {
    let device: Arc<dyn BlockDevice> =
        Arc::new(FileDevice::open(folder.join("disk.img"), &FileOptions::default()).unwrap());
    let options = OpenOptions {
        cache_bytes: 16 << 20,
        commit_interval: Duration::ZERO,
        switches: TestSwitches { add_lock_excludes_nobody: true, pause_us: 300, ..TestSwitches::default() },
        ..OpenOptions::default()
    };
    let filesystem = Filesystem::open(vec![device], &options).unwrap();
    let request = MountRequest {
        source: "broken".into(),
        directory: folder.join("mnt"),
        flags: rustix::mount::MountFlags::empty(),
        allow_other: true,
    };
    let settings = SessionSettings { cache: CacheMode::Daemon, threads: 8 };
    Session::mount(Arc::clone(filesystem.vfs()), &request, settings).unwrap().serve().unwrap();
    let _ = filesystem.close();
}

/// Ends with its test.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn an_add_lock_that_excludes_nobody_is_caught() {
    if let Some(folder) = std::env::var_os(BROKEN) {
        return serve_broken(Path::new(&folder));
    }
    let Some(site) = formatted("none") else { return };
    let start = Instant::now();
    let program = std::env::current_exe().unwrap();
    let mut again: Command = command(program);
    again.args(["--exact", "an_add_lock_that_excludes_nobody_is_caught"]).env(BROKEN, site.path(""));
    let server = Server(again.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
    wait_until("it is mounted", || site.is_mounted());
    let outcome = race(&site, Duration::from_secs(60), "daemon");
    drop(server);
    let wrong = outcome.map(|(report, _)| report).expect_err("the fault was not noticed in a minute");
    println!("caught after {:.1} s: {wrong}", start.elapsed().as_secs_f64());
    assert!(wrong.contains("block "), "something else is wrong: {wrong}");
}
