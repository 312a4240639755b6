//! `coppice-crash` as a program: what it prints can be typed in again, and the images that it writes are images.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use coppicefs::filesystem::{Filesystem, OpenOptions, WorkerSet};
use coppicefs::space::TestSwitches;
use coppicefs_tests::filesystem_subject::switch_names;
use coppicefs_tests::limit::{Limit, finish};
use serde_json::Value;

/// Runs it, in a folder of its own for what it keeps. Returns its exit code, and what it says as JSON.
fn coppice_crash(folder: &Path, arguments: &[&str]) -> (Option<i32>, Value) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_coppice-crash"));
    command.args(arguments).args(["--json", "--jobs", "2"]).env("TMPDIR", folder);
    let output = finish(&mut command).unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
    (output.status.code(), value)
}

/// The words of a command that a failure prints, without the program's name.
fn words(command: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut is_quoted = false;
    for letter in command.chars() {
        match letter {
            '\'' => is_quoted = !is_quoted,
            ' ' if !is_quoted => words.push(String::new()),
            letter => words.last_mut().expect("a word").push(letter),
        }
    }
    assert_eq!(words.remove(0), "coppice-crash");
    words
}

#[test]
fn a_failure_is_shown_again_by_its_command_and_made_small() {
    let _limit = Limit::new();
    let folder = tempfile::tempdir().unwrap();
    let broken = ["--workload", "create, write, fsync", "--switch", "drop-journal-record", "--shrink", "20"];
    let (code, said) = coppice_crash(folder.path(), &broken);
    assert_eq!(code, Some(1), "{said}");
    let failure = &said["failures"][0];
    for command in ["command", "shrunk_command"] {
        let again = words(failure[command].as_str().expect("a command"));
        let (code, said) = coppice_crash(folder.path(), &again.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!(code, Some(1), "{again:?}: {said}");
        if command == "command" {
            assert_eq!(said["failures"][0]["problem"], failure["problem"]);
        }
    }
    let length = failure["shrunk"].as_array().expect("a workload").len();
    assert!(length < 13, "{length} operations: {failure}");
}

/// Each build that is broken on purpose is caught by the command that `--list` names for it, within a minute on a machine that does nothing else, by a power cut.
#[test]
fn every_broken_build_is_caught_by_its_command() {
    /// By how much this machine may be busy with other things: time is wall time.
    const MACHINE: u32 = 4;
    let _limit = Limit::new();
    let folder = tempfile::tempdir().unwrap();
    let listed = finish(Command::new(env!("CARGO_BIN_EXE_coppice-crash")).arg("--list")).unwrap();
    let listed = String::from_utf8(listed.stdout).unwrap();
    let commands: Vec<&str> = listed.lines().filter(|line| line.starts_with("coppice-crash --switch ")).collect();
    for (name, is_on) in switch_names(&TestSwitches::default()) {
        assert!(!is_on && (name == "reuse-first" || commands.iter().any(|command| command.contains(name))), "{name}");
    }
    assert!(commands.len() >= 10, "{listed}");
    for command in commands {
        let start = Instant::now();
        let mut words = words(command);
        words.extend(["--shrink".to_owned(), "0".to_owned()]);
        let (code, said) = coppice_crash(folder.path(), &words.iter().map(String::as_str).collect::<Vec<_>>());
        let elapsed = start.elapsed();
        assert_eq!(code, Some(1), "{command}: {said}");
        let again = said["failures"][0]["command"].as_str().expect("a command");
        assert!(again.contains("--cut "), "{command} fails without a power cut: {again}");
        assert!(elapsed < Duration::from_secs(60) * MACHINE, "{command}: not within a minute: {elapsed:?}");
        println!("{command}: caught after {:.1} s", elapsed.as_secs_f64());
    }
}

#[test]
fn what_a_cut_leaves_is_an_image() {
    let _limit = Limit::new();
    let folder = tempfile::tempdir().unwrap();
    let image: PathBuf = folder.path().join("image");
    let mut command = Command::new(env!("CARGO_BIN_EXE_coppice-crash"));
    command.args(["--workload", "rename over", "--cut", "60", "--plan", "0", "--image"]).arg(&image);
    assert!(finish(&mut command).unwrap().status.success());
    let options = OpenOptions { workers: WorkerSet::Essential, cache_bytes: 16 << 20, ..OpenOptions::default() };
    let filesystem = Filesystem::open_path(&image, &options).unwrap();
    assert!(filesystem.replayed().records > 0, "a cut in the middle leaves something to replay");
    assert_eq!(coppicefs_fsck::check(&filesystem, &|_, _, _, _| {}).unwrap().problems.len(), 0);
    filesystem.close().unwrap();
}

#[test]
fn a_wrong_command_line_is_said_to_be_wrong() {
    for (arguments, code) in [
        (&["--cut", "1", "--plan", "1:middle"][..], 2),
        (&["--cut", "1", "--workload", "no such thing"], 3),
        (&["--switch", "no such thing"], 3),
        (&["--cut", "100000", "--workload", "append", "--image", "/nonexistent/image"], 3),
    ] {
        let output = finish(Command::new(env!("CARGO_BIN_EXE_coppice-crash")).args(arguments)).unwrap();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {output:?}");
        assert!(!output.stderr.is_empty());
    }
}
