//! A scrub's place outlives the mount: cancelled, interrupted, or ended by an unmount or by SIGKILL, the next scrub of the mount or the image goes on
//! there, with the totals so far. What is kept and cannot be meant is ignored with one line.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use coppicefs_tests::damage::Target;
use coppicefs_tests::limit::finish;
use coppicefs_tests::mount::{Site, run, wait_until};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// Data is read in steps of a few MiB: enough that a scrub with a rate runs for longer than its place is kept beside it.
const FILES: usize = 120;
const FILE_BYTES: usize = 200_000;

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", said(output)))
}

fn number(report: &Value, name: &str) -> u64 {
    report[name].as_u64().unwrap_or_else(|| panic!("no {name}: {report}"))
}

/// Files of data that no write compresses or keeps inline.
fn filled() -> Option<Site> {
    let site = Site::formatted("64M", &[])?;
    site.mount("");
    for file in 0..FILES {
        let bytes: Vec<u8> = (0..FILE_BYTES).map(|at| (at * (file + 7) / 3 % 251) as u8).collect();
        fs::write(site.mnt().join(format!("file {file}")), bytes).unwrap();
    }
    site.unmount();
    Some(site)
}

fn scrub(site: &Site, on: &Path, options: &[&str]) -> Output {
    finish(site.coppice(&["scrub", "--json"]).args(options).arg(on)).unwrap()
}

/// One that reads slowly, so that it can be caught at work.
fn slow(site: &Site, on: &Path) -> Child {
    let mut command: Command = site.coppice(&["scrub", "--json", "-q", "--rate", "2M"]);
    command.arg(on).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn status(site: &Site) -> Value {
    json(&scrub(site, &site.mnt(), &["--status"]))
}

fn wait_for_data(site: &Site) {
    wait_until("data is read", || {
        let now = status(site);
        now["state"] == "running" && number(&now, "data_bytes") > 0
    });
}

fn kept_file(site: &Site) -> PathBuf {
    let mut entries = fs::read_dir(site.path("state")).unwrap().map(|entry| entry.unwrap().path());
    let file = entries.next().expect("a place is kept");
    assert_eq!(entries.next(), None, "only one");
    file
}

fn kept(site: &Site) -> Option<Value> {
    let file = fs::read_dir(site.path("state"))
        .ok()?
        .flatten()
        .find(|entry| entry.file_name().to_string_lossy().ends_with(".json"))?;
    serde_json::from_slice(&fs::read(file.path()).ok()?).ok()
}

/// Destroys a block of data of the file with the least or the greatest inode number. Returns the inode.
fn destroy_data(site: &Site, last: bool) -> u64 {
    let target = Target::open(&site.image());
    let newest = target.checkpoints().remove(0);
    let mut data = target.data(&newest);
    data.sort_by_key(|(key, ..)| *key);
    let (key, offset, _) = if last { data.pop().unwrap() } else { data.remove(0) };
    target.destroy(offset, 4096);
    key.inode
}

#[test]
fn a_scrub_goes_on_after_the_next_mount() {
    let Some(site) = filled() else { return };
    let whole = number(&json(&scrub(&site, &site.image(), &["--restart"])), "data_bytes");
    assert!(whole >= (FILES * FILE_BYTES / 2) as u64, "{whole}");
    site.mount("");
    let done = status(&site);
    assert!(done["state"] == "done" && number(&done, "data_bytes") == whole, "{done}");
    assert!(done["ended_at"].as_i64().unwrap() > 1_700_000_000, "{done}");

    // Cancelled; then the mount ends.
    let child = slow(&site, &site.mnt());
    wait_for_data(&site);
    run(site.coppice(&["scrub", "--cancel"]).arg(site.mnt()));
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(8));
    site.unmount();
    let first = kept(&site).unwrap();
    let before = number(&first, "data_bytes");
    assert!(first["state"] == "cancelled" && before > 0 && before < whole, "{first}");

    // What lies before the place is not looked at again, what lies behind it is.
    destroy_data(&site, false);
    let behind = destroy_data(&site, true);
    site.mount("");
    assert_eq!(status(&site)["state"], "cancelled");
    let output = scrub(&site, &site.mnt(), &[]);
    let report = json(&output);
    assert_eq!((output.status.code(), &report["resumed"]), (Some(4), &Value::Bool(true)), "{}", said(&output));
    assert!(said(&output).contains("going on where the last scrub stopped, in data"), "{}", said(&output));
    let found = report["findings"].as_array().unwrap();
    assert!(found.len() == 1 && number(&found[0], "inode") == behind, "{report}");
    assert_eq!(number(&report, "data_bytes"), whole, "both parts together");
    site.unmount_noisily();

    // What it found is known afterwards; anew, both are found.
    site.mount("");
    let done = status(&site);
    assert!(done["state"] == "done" && number(&done, "damaged") == 1 && number(&done, "exit_code") == 4, "{done}");
    let anew = json(&scrub(&site, &site.mnt(), &["--restart"]));
    assert!(anew["resumed"] == false && number(&anew, "damaged") == 2, "{anew}");
    site.unmount_noisily();
}

#[test]
fn unmounting_and_killing_keep_the_place() {
    let Some(site) = filled() else { return };
    let whole = number(&json(&scrub(&site, &site.image(), &[])), "data_bytes");
    // The mount ends while the daemon scrubs, and nobody waits for it.
    site.mount("");
    let mut child = slow(&site, &site.mnt());
    wait_for_data(&site);
    child.kill().unwrap();
    child.wait().unwrap();
    site.unmount();
    let first = number(&kept(&site).unwrap(), "data_bytes");
    assert!(first > 0 && first < whole);

    // The daemon is killed: then the place is a few seconds old.
    site.mount("");
    let mut child = slow(&site, &site.mnt());
    wait_until("the place is kept beside it", || {
        kept(&site).is_some_and(|now| now["state"] == "running" && number(&now, "data_bytes") > first)
    });
    site.crash();
    child.wait().unwrap();
    let second = number(&kept(&site).unwrap(), "data_bytes");
    let resumed = json(&scrub(&site, &site.image(), &[]));
    assert!(second > first && resumed["resumed"] == true, "{resumed}");
    assert_eq!((number(&resumed, "data_bytes"), &resumed["state"]), (whole, &"done".into()), "{resumed}");
}

#[test]
fn an_interrupted_scrub_of_an_image_goes_on_and_a_wrong_place_is_ignored() {
    let Some(site) = filled() else { return };
    let child = slow(&site, &site.image());
    wait_until("it has begun", || kept(&site).is_some_and(|now| now["state"] == "running"));
    kill_process(Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap(), Signal::INT).unwrap();
    let interrupted = child.wait_with_output().unwrap();
    assert_eq!(interrupted.status.code(), Some(8), "{}", said(&interrupted));
    let (file, place) = (kept_file(&site), kept(&site).unwrap());
    assert_eq!(place["state"], "cancelled", "{place}");
    let before = fs::read(&file).unwrap();

    let change = |name: &str, value: Value| {
        let mut place = place.clone();
        place[name] = value;
        serde_json::to_vec(&place).unwrap()
    };
    for (bytes, why) in [
        (b"{ half".to_vec(), "damaged"),
        (change("version", 7.into()), "of version 7"),
        (change("uuid", "8b9cb7c3-0000-4000-8000-000000000000".into()), "of another filesystem"),
        (change("bytes", u64::MAX.into()), "more than there can be"),
        (change("unsettled", true.into()), "no checkpoint"),
    ] {
        fs::write(&file, bytes).unwrap();
        let output = scrub(&site, &site.image(), &["-q"]);
        assert_eq!(
            (output.status.code(), &json(&output)["resumed"]),
            (Some(0), &Value::Bool(false)),
            "{}",
            said(&output)
        );
        let warning = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(warning.contains(why) && warning.lines().count() == 1, "{warning}, not one line with {why}");
    }
    fs::write(&file, before).unwrap();
    let output = scrub(&site, &site.image(), &["-q"]);
    let report = json(&output);
    assert!(output.status.success() && report["resumed"] == true && output.stderr.is_empty(), "{}", said(&output));
}
