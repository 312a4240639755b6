//! The program `mkfs-coppice` as it is started: its exit codes, what it prints and where, and what it leaves alone when it refuses.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Output, Stdio};

fn mkfs(directory: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mkfs-coppice"));
    command.args(arguments).current_dir(directory).stdin(Stdio::null());
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Ends with `code`; gives what it printed on both outputs.
fn ends(code: i32, command: &mut Command) -> (String, String) {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let (printed, said) = (text(&stdout), text(&stderr));
    assert_eq!(status.code(), Some(code), "{command:?}: {printed}{said}");
    (printed, said)
}

#[test]
fn an_image_is_made_once_and_then_kept() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let (printed, said) = ends(0, &mut mkfs(directory, &["new.img", "--size", "64M", "-L", "first"]));
    assert!(printed.contains("new.img") && printed.contains("first"), "{printed}");
    assert_eq!(said, "");
    let image = fs::read(directory.join("new.img")).unwrap();
    assert_eq!(image.len(), 64 << 20);

    // It holds a filesystem: without -f it stays, byte for byte.
    let (printed, said) = ends(1, &mut mkfs(directory, &["new.img"]));
    assert_eq!(printed, "");
    assert!(said.contains("new.img") && said.contains("coppice") && said.contains("-f"), "{said}");
    ends(0, &mut mkfs(directory, &["new.img", "-n", "--force"]));
    assert!(fs::read(directory.join("new.img")).unwrap() == image, "a refusal and a dry run change nothing");

    let (printed, _) = ends(0, &mut mkfs(directory, &["new.img", "--force", "--quiet", "-L", "second"]));
    assert_eq!(printed, "");
    assert!(fs::read(directory.join("new.img")).unwrap() != image);
}

#[test]
fn a_wrong_command_line_is_one_line_and_makes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    for (arguments, named) in [
        (&["new.img"][..], &["new.img", "--size"][..]),
        (&[][..], &["TARGET"]),
        (&["new.img", "--size", "much"], &["much", "--size"]),
        (&["new.img", "--size", "64M", "--metadata-replicas", "3"], &["3", "--metadata-replicas"]),
        (&["new.img", "--size", "64M", "--block-size", "5000"], &["5000"]),
        (&["new.img", "--size", "64M", "--compression", "best"], &["best", "--compression"]),
        (&["absent/new.img", "--size", "64M"], &["absent", "mkdir -p"]),
    ] {
        let (printed, said) = ends(1, &mut mkfs(directory, arguments));
        assert_eq!(printed, "", "{arguments:?}");
        assert_eq!(said.lines().count(), 1, "{arguments:?}: {said}");
        assert!(said.starts_with("mkfs-coppice: "), "{arguments:?}: {said}");
        for word in named {
            assert!(said.contains(word), "{arguments:?} should name {word:?}: {said}");
        }
        assert_eq!(fs::read_dir(directory).unwrap().count(), 0, "{arguments:?}");
    }
}

/// The same as `tests/tests/unwritable_output.rs` for the other programs.
#[test]
fn a_reader_who_has_gone_changes_nothing_and_a_full_disk_is_said() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    ends(0, &mut mkfs(directory, &["new.img", "--size", "64M"]));
    let nobody = || {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        Stdio::from(writer)
    };
    for arguments in [&["--version"][..], &["--help"], &["-n", "-f", "new.img"], &["-f", "new.img"]] {
        let mut command = mkfs(directory, arguments);
        let gone = command.stdout(nobody()).stderr(Stdio::piped()).spawn().unwrap().wait_with_output().unwrap();
        assert_eq!((gone.status.code(), text(&gone.stderr)), (Some(0), String::new()), "{arguments:?}");
        let both = command.stdout(nobody()).stderr(nobody()).status().unwrap();
        assert_eq!(both.code(), Some(0), "{arguments:?}");

        let full = File::options().write(true).open("/dev/full").unwrap();
        let full = command.stdout(full).stderr(Stdio::piped()).spawn().unwrap().wait_with_output().unwrap();
        let said = text(&full.stderr);
        assert_eq!(full.status.code(), Some(1), "{arguments:?}: {said}");
        assert_eq!(said.matches("cannot write to standard output: No space left").count(), 1, "{arguments:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{arguments:?}: {said}");
    }
}
