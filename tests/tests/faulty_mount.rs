//! A dying disk under a real mount: what programs get, what the log says, and what is there when the disk is well again.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;

use coppicefs_tests::limit::finish;
use coppicefs_tests::mount::{Site, command, run, wait_until};

const PROGRAM: &str = env!("CARGO_BIN_EXE_coppice-faulty-mount");
const BLOCK_BYTES: usize = 4096;

/// Mounts with these faults, which begin when [`begin`] is called.
fn mount(site: &Site, options: &str, faults: &str) {
    let mut mount = command(PROGRAM);
    mount.env("COPPICE_FAULTS", format!("when={},{faults}", site.path("begin").display()));
    run(mount.arg("--log").arg(site.path("log")).args(["-o", options]).arg(site.image()).arg(site.mnt()));
}

fn begin(site: &Site) {
    File::create(site.path("begin")).unwrap();
}

/// Unmounts, whatever the log says; the disk is well again.
fn end(site: &Site) {
    // Another test's child may hold a descriptor of ours between fork and exec.
    wait_until("it is unmounted", || finish(command("umount").arg(site.mnt())).unwrap().status.success());
    wait_until("the daemon is gone", || coppicefs::device::lock_holders(&site.image()).is_empty());
    let _ = fs::remove_file(site.path("begin"));
}

fn write_synced(site: &Site, name: &str, byte: u8) -> std::io::Result<()> {
    let mut file = File::create(site.mnt().join(name))?;
    file.write_all(&[byte; 5 * BLOCK_BYTES])?;
    file.sync_all()
}

fn errno<T>(outcome: std::io::Result<T>) -> Option<rustix::io::Errno> {
    outcome.err().and_then(|error| error.raw_os_error()).map(rustix::io::Errno::from_raw_os_error)
}

/// Nothing is acknowledged after it, reads go on, one clear line says why; afterwards everything that was acknowledged is there.
fn latches(faults: &str, operation: &str) {
    for options in ["cache=kernel", "cache=writeback", "cache=daemon"] {
        let Some(site) = Site::formatted("128M", &[]) else { return };
        mount(&site, options, faults);
        write_synced(&site, "before", 1).unwrap();
        begin(&site);
        assert!(write_synced(&site, "after", 2).is_err(), "{options}: it was acknowledged");
        assert_eq!(errno(write_synced(&site, "later", 3)), Some(rustix::io::Errno::ROFS), "{options}");
        assert_eq!(fs::read(site.mnt().join("before")).unwrap(), [1; 5 * BLOCK_BYTES], "{options}");
        let log = site.log();
        let said = format!(
            "nothing more is written to the device device=\"{}\" reason={operation} of",
            site.image().display()
        );
        assert_eq!(log.matches(&said).count(), 1, "{options}: {log}");
        end(&site);
        fs::remove_file(site.path("log")).unwrap();
        site.assert_clean();
        site.mount(options);
        assert_eq!(fs::read(site.mnt().join("before")).unwrap(), [1; 5 * BLOCK_BYTES], "{options}");
        write_synced(&site, "well again", 4).unwrap();
        site.unmount_and_check();
    }
}

#[test]
fn a_failed_write_latches_and_loses_nothing_that_was_acknowledged() {
    latches("write@0..=eio", "write");
}

#[test]
fn a_failed_flush_latches_and_loses_nothing_that_was_acknowledged() {
    latches("flush@0=eio", "flush");
}

#[test]
fn a_device_that_shrinks_is_an_error_and_no_end_of_what_is_left() {
    latches("size@1048576=eio", "write");
}

/// Where the first extent of the only file lies.
fn place_of_data(site: &Site) -> u64 {
    let listed = finish(site.coppice(&["list", "--btree", "extents"]).arg(site.image())).unwrap();
    let text = String::from_utf8(listed.stdout).unwrap();
    let place = |line: &str| {
        line.split_once("bytes at 0:")?.1.split(|letter: char| !letter.is_ascii_digit()).next()?.parse().ok()
    };
    text.lines().find_map(place).unwrap_or_else(|| panic!("no extent: {text}"))
}

#[test]
fn an_unreadable_block_is_eio_for_itself_and_the_log_names_the_file() {
    for options in ["cache=kernel", "cache=writeback", "cache=daemon"] {
        let Some(site) = Site::formatted("128M", &["--compression", "none"]) else { return };
        site.mount(options);
        fs::create_dir(site.mnt().join("a folder")).unwrap();
        let content: Vec<u8> = (0..64 * BLOCK_BYTES).map(|at| (at / 5) as u8).collect();
        fs::write(site.mnt().join("a folder/file"), &content).unwrap();
        site.unmount_and_check();
        let bad = place_of_data(&site) + 7 * BLOCK_BYTES as u64;
        mount(&site, options, &format!("bytes@{bad}+{BLOCK_BYTES}=eio"));
        begin(&site);
        let file = File::open(site.mnt().join("a folder/file")).unwrap();
        for (number, expected) in content.chunks(BLOCK_BYTES).enumerate() {
            let mut block = [0; BLOCK_BYTES];
            let read = file.read_exact_at(&mut block, (number * BLOCK_BYTES) as u64);
            if number == 7 {
                assert_eq!(errno(read), Some(rustix::io::Errno::IO), "{options}");
            } else {
                read.unwrap_or_else(|error| panic!("{options}: block {number}: {error}"));
                assert_eq!(block, expected, "{options}: block {number}");
            }
        }
        drop(file);
        let mut all = Vec::new();
        let read = File::open(site.mnt().join("a folder/file")).unwrap().read_to_end(&mut all);
        assert!(read.is_err() && all.len() <= 7 * BLOCK_BYTES && content.starts_with(&all), "{options}");
        let log = site.log();
        let said: Vec<_> = log.lines().filter(|line| line.contains("/a folder/file")).collect();
        assert!(
            said.len() == 1 && said[0].contains("disk.img") && said[0].contains(&bad.to_string()),
            "{options}: {log}"
        );
        // A bad block for reading is no reason not to write.
        write_synced(&site, "another", 1).unwrap();
        end(&site);
        site.mount(options);
        assert!(fs::read(site.mnt().join("a folder/file")).unwrap() == content, "{options}");
        end(&site);
    }
}

/// One write after another is lost, or goes elsewhere: what is read then is right, or an error.
#[test]
fn a_lost_or_misdirected_write_is_never_read_as_right() {
    for (nth, effect) in [(0, "lost"), (1, "lost"), (2, "lost"), (3, "lost"), (1, "+65536"), (2, "-262144")] {
        let Some(site) = Site::formatted("128M", &[]) else { return };
        mount(&site, "cache=kernel", &format!("write@{nth}={effect}"));
        write_synced(&site, "before", 1).unwrap();
        begin(&site);
        write_synced(&site, "one", 2).unwrap();
        write_synced(&site, "two", 3).unwrap();
        end(&site);
        site.mount("cache=daemon");
        for (name, byte) in [("before", 1), ("one", 2), ("two", 3)] {
            match fs::read(site.mnt().join(name)) {
                Ok(bytes) => assert_eq!(bytes, [byte; 5 * BLOCK_BYTES], "{name} after {nth} {effect}"),
                Err(error) => {
                    assert_eq!(errno::<()>(Err(error)), Some(rustix::io::Errno::IO), "{name} after {nth} {effect}")
                }
            }
        }
        end(&site);
        let checked = finish(site.coppice(&["fsck", "-n"]).arg(site.image())).unwrap();
        assert!(matches!(checked.status.code(), Some(0 | 4)), "{nth} {effect}: {checked:?}");
    }
}

/// No space is found for some allocations, though there is: who writes is told, and what was acknowledged is there.
#[test]
fn an_allocation_that_finds_no_space_is_told_to_the_writer_alone() {
    for (options, refused) in [("cache=kernel", "4..30"), ("cache=writeback", "9..9"), ("cache=daemon", "0..12")] {
        let Some(site) = Site::formatted("128M", &[]) else { return };
        mount(&site, options, &format!("allocate@{refused}=enospc"));
        let (mut written, mut told) = (Vec::new(), 0);
        for number in 0..60 {
            let name = format!("file {number}");
            match write_synced(&site, &name, number) {
                Ok(()) => written.push((name, number)),
                Err(error) => {
                    assert_eq!(errno::<()>(Err(error)), Some(rustix::io::Errno::NOSPC), "{options}, {refused}");
                    told += 1;
                }
            }
        }
        assert!(told > 0 && written.len() > 20, "{options}, {refused}: {told} were told, {} written", written.len());
        let last_told = written.windows(2).rposition(|pair| pair[1].1 != pair[0].1 + 1);
        assert!(last_told.is_none_or(|at| at < 20), "{options}, {refused}: it does not go on: {written:?}");
        let check = |when: &str| {
            for (name, byte) in &written {
                let found = fs::read(site.mnt().join(name)).unwrap_or_else(|error| panic!("{when}: {name}: {error}"));
                assert!(found == [*byte; 5 * BLOCK_BYTES], "{options}, {refused}: {when}: {name}");
            }
        };
        check("while it is mounted");
        end(&site);
        site.assert_clean();
        site.mount(options);
        check("afterwards");
        write_synced(&site, "again", 1).unwrap();
        end(&site);
        site.assert_clean();
    }
}
