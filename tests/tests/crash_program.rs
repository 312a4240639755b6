//! `coppice-crash` as a program: what it prints can be typed in again, and the images that it writes are images.

use std::path::{Path, PathBuf};
use std::process::Command;

use coppicefs::filesystem::{Filesystem, OpenOptions, WorkerSet};
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
fn words(command: &Value) -> Vec<String> {
    let command = command.as_str().expect("a command");
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
        let again = words(&failure[command]);
        let (code, said) = coppice_crash(folder.path(), &again.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!(code, Some(1), "{again:?}: {said}");
        if command == "command" {
            assert_eq!(said["failures"][0]["problem"], failure["problem"]);
        }
    }
    let length = failure["shrunk"].as_array().expect("a workload").len();
    assert!(length < 13, "{length} operations: {failure}");
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
