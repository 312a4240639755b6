//! What programs print goes to a reader who has gone, or onto a full disk: a table of all that print what somebody asked for.
//!
//! A reader who has gone (`| head -1`, also `2>&1 | head -1`) changes no exit code. On `/dev/full` they say in one line what went wrong,
//! and end with the code of a failure. `println!` would have panicked, and `coppice stats --watch` must end at all.
//! (`mkfs/tests/program.rs` does the same for `mkfs-coppice`, which is built for its own tests only.)

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use coppicefs_tests::mount::{Site, built, command, run};

/// Who prints what, and how it ends when that cannot be written. All end with 0 when it can.
struct Case<'a> {
    program: &'a str,
    words: &'a [&'a str],
    paths: &'a [&'a Path],
    unwritten: i32,
}

fn case<'a>(program: &'a str, words: &'a [&'a str], paths: &'a [&'a Path], unwritten: i32) -> Case<'a> {
    Case { program, words, paths, unwritten }
}

/// A pipe that nobody reads.
fn closed_pipe() -> Stdio {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    writer.into()
}

impl Case<'_> {
    fn command(&self, site: &Site) -> Command {
        let path = match self.program {
            "coppice-crash" => PathBuf::from(env!("CARGO_BIN_EXE_coppice-crash")),
            name => built(name),
        };
        let mut command = command(path);
        command.args(self.words).args(self.paths).current_dir(site.path(""));
        command.env("COPPICE_STATE_DIRECTORY", site.path("state"));
        command
    }

    /// Tries all that its output can meet.
    fn try_all(&self, site: &Site) {
        let what = format!("{} {}", self.program, self.words.join(" "));
        let errors = site.path("errors");
        // The test's limit of time is this command's.
        let ended = |output: Stdio, errors: Stdio| {
            self.command(site).stdout(output).stderr(errors).spawn().unwrap().wait().unwrap().code()
        };
        let code = ended(closed_pipe(), File::create(&errors).unwrap().into());
        let said = fs::read_to_string(&errors).unwrap();
        assert_eq!(code, Some(0), "{what}, its reader gone: {said}");
        assert!(!said.contains("panicked") && !said.contains("output"), "{what}, its reader gone: {said}");

        assert_eq!(ended(closed_pipe(), closed_pipe()), Some(0), "{what}, the reader of both outputs gone");

        let full = File::options().write(true).open("/dev/full").unwrap();
        let code = ended(full.into(), File::create(&errors).unwrap().into());
        let said = fs::read_to_string(&errors).unwrap();
        assert_eq!(code, Some(self.unwritten), "{what} on a full disk: {said}");
        let told = said.lines().filter(|line| line.contains("cannot write to standard output: No space left")).count();
        assert!(told == 1 && !said.contains("panicked"), "{what} on a full disk: {said}");
    }
}

#[test]
fn whatever_is_printed_of_an_image() {
    let Some(site) = Site::formatted("64M", &[]) else { return };
    site.mount("");
    for number in 0..20 {
        fs::write(site.mnt().join(format!("file {number}")), [7; 5000]).unwrap();
    }
    site.unmount();
    let (image, fresh) = (site.image(), site.path("fresh.img"));
    let [image, fresh] = [image.as_path(), fresh.as_path()];
    let few = ["--workload", "append", "--plans", "1", "--quiet"];
    for case in [
        case("coppice", &["--help"], &[], 1),
        case("coppice", &["--version"], &[], 1),
        case("coppice", &["man"], &[], 1),
        case("coppice", &["completions", "bash"], &[], 1),
        case("coppice", &["show-super"], &[image], 1),
        case("coppice", &["show-super", "--json"], &[image], 1),
        case("coppice", &["usage"], &[image], 1),
        case("coppice", &["usage", "--json"], &[image], 1),
        case("coppice", &["list"], &[image], 1),
        case("coppice", &["list", "--btree", "dirents", "--json"], &[image], 1),
        case("coppice", &["journal", "--all"], &[image], 1),
        case("coppice", &["journal", "--json"], &[image], 1),
        case("coppice", &["checkpoints"], &[image], 1),
        case("coppice", &["checkpoints", "--json"], &[image], 1),
        case("coppice", &["scrub"], &[image], 8),
        case("coppice", &["scrub", "--json"], &[image], 8),
        case("coppice", &["fsck", "-n"], &[image], 8),
        case("coppice", &["mkfs", "-f", "--size", "64M"], &[fresh], 1),
        case("coppice", &["install", "--helpers", "none", "--prefix"], &[&site.path("prefix")], 1),
        case("fsck-coppice", &["--help"], &[], 8),
        case("fsck-coppice", &["-n"], &[image], 8),
        case("fsck-coppice", &["-y", "--verbose"], &[image], 8),
        case("fsck-coppice", &["-n", "--json"], &[image], 8),
        case("fsck-coppice", &["--list-damaged"], &[image], 8),
        case("fsck-coppice", &["--list-damaged", "--json"], &[image], 8),
        case("mount-coppice", &["--help"], &[], 32),
        case("coppice-crash", &["--help"], &[], 3),
        case("coppice-crash", &["--list"], &[], 3),
        case("coppice-crash", &few, &[], 3),
    ] {
        case.try_all(&site);
    }
    site.assert_clean();
    // What was done is done, whoever hears of it.
    run(site.coppice(&["fsck", "-n"]).arg(fresh));
    run(command(site.path("prefix/bin/mkfs-coppice")).arg("--version"));
}

#[test]
fn whatever_is_printed_of_a_mount() {
    let Some(site) = Site::formatted("64M", &[]) else { return };
    site.mount("");
    let mnt = site.mnt();
    let mnt = mnt.as_path();
    for case in [
        case("coppice", &["usage"], &[mnt], 1),
        case("coppice", &["stats"], &[mnt], 1),
        case("coppice", &["stats", "--json"], &[mnt], 1),
        case("coppice", &["stats", "--watch"], &[mnt], 1),
        case("coppice", &["stats", "--watch", "--json"], &[mnt], 1),
        case("coppice", &["scrub"], &[mnt], 8),
        case("coppice", &["scrub", "--status", "--json"], &[mnt], 8),
        case("coppice", &["scrub", "--cancel"], &[mnt], 8),
        case("coppice", &["probe"], &[], 1),
        case("coppice", &["probe", "--json"], &[], 1),
    ] {
        case.try_all(&site);
    }
    site.unmount_and_check();
}
