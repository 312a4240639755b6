//! A daemon that does not answer ends the test, not the patience of whoever waits for it: whatever waits for FUSE cannot be killed, so
//! the harness kills the daemon first.

use std::process::Command;

use coppicefs_tests::limit::finish;
use coppicefs_tests::mount::{Site, is_mounted};
use rustix::process::{Signal, kill_process};

#[test]
fn a_daemon_that_hangs_ends_the_test() {
    const INSIDE: &str = "COPPICE_TEST_HANGS_INSIDE";
    if std::env::var_os(INSIDE).is_some() {
        let Some(site) = Site::formatted("128M", &[]) else { return };
        site.mount("");
        println!("folder {}", site.path("mnt").display());
        kill_process(site.daemon(), Signal::STOP).unwrap();
        let _ = rustix::fs::statfs(site.mnt());
        unreachable!("a stopped daemon has answered");
    }
    let Some(_site) = Site::new() else { return };
    let mut again = Command::new(std::env::current_exe().unwrap());
    again.args(["--exact", "a_daemon_that_hangs_ends_the_test", "--nocapture"]);
    let output = finish(again.env(INSIDE, "1").env("COPPICE_TEST_SECONDS", "6")).unwrap();
    let (said, printed) = (String::from_utf8_lossy(&output.stderr), String::from_utf8_lossy(&output.stdout));
    let (_, folder) = printed.split_once("folder ").unwrap_or_else(|| panic!("{printed}{said}"));
    let mountpoint = folder.lines().next().map(std::path::Path::new).unwrap();
    assert_eq!(output.status.code(), None, "it was to abort: {said}");
    for part in ["a_daemon_that_hangs_ends_the_test has not ended after 6 s", "coppice mount", "--daemon"] {
        assert!(said.contains(part), "{part:?} is not in: {said}");
    }
    assert!(!is_mounted(mountpoint));
    std::fs::remove_dir_all(mountpoint.parent().unwrap()).unwrap();
}
