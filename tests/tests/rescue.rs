//! Rescue, with the real programs: the previous checkpoint in place of a damaged one, the list of checkpoints, an older state mounted, and what can be
//! read of an image that cannot be mounted.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use coppicefs::device::{BlockDevice, MemDevice};
use coppicefs::env::Env;
use coppicefs::filesystem::format::test_geometry;
use coppicefs::filesystem::{Filesystem, OpenOptions, WorkerSet};
use coppicefs::format::namespace::{Dirent, DirentBucket};
use coppicefs::format::{BtreeId, Position};
use coppicefs::journal::{JournalConfig, holds_log_of};
use coppicefs::transaction::CommitOptions;
use coppicefs::vfs::Caller;
use coppicefs_tests::damage::Target;
use coppicefs_tests::limit::{Limit, finish};
use coppicefs_tests::mount::{Site, assert_refused, run};

/// Directories of files with known content, some changed again in each round, each round with a checkpoint of its own.
fn populated(rounds: u32) -> Option<Site> {
    let site = Site::formatted("64M", &[])?;
    for round in 0..rounds {
        site.mount("");
        for number in 0..30 {
            if round == 0 || number % 3 == round % 3 {
                let folder = site.mnt().join(format!("folder{}", number % 5));
                fs::create_dir_all(&folder).unwrap();
                fs::write(folder.join(format!("file{number}")), content(round, number)).unwrap();
            }
        }
        site.unmount();
    }
    Some(site)
}

fn content(round: u32, number: u32) -> Vec<u8> {
    format!("round {round} file {number};").into_bytes().repeat(20 + 300 * number as usize)
}

fn assert_present_state(site: &Site, rounds: u32) {
    for number in 0..30 {
        let last = (0..rounds).rev().find(|round| *round == 0 || number % 3 == round % 3).unwrap();
        let path = site.mnt().join(format!("folder{}/file{number}", number % 5));
        assert!(fs::read(&path).unwrap() == content(last, number), "{}", path.display());
    }
}

/// The newest checkpoint's record, a root: each destroyed in all copies. (A map's pages are those of the checkpoint before, where no node has moved.)
#[test]
fn the_previous_checkpoint_gives_the_present_state() {
    const ROUNDS: u32 = 4;
    let Some(site) = populated(ROUNDS) else { return };
    let intact = fs::read(site.image()).unwrap();
    for part in ["record", "root of the inodes", "root of the extents"] {
        fs::write(site.image(), &intact).unwrap();
        let newest = {
            let target = Target::open(&site.image());
            let checkpoints = target.checkpoints();
            match part {
                "record" => target.destroy_record(checkpoints[0].number),
                "root of the inodes" => target.destroy_node(&target.root(&checkpoints[0], BtreeId::Inodes)),
                _ => target.destroy_node(&target.root(&checkpoints[0], BtreeId::Extents)),
            }
            checkpoints[0].number
        };
        // A lost record looks like a power cut while it was written; the rest is damage.
        let check = finish(site.coppice(&["fsck", "-n"]).arg(site.image())).unwrap();
        let said = String::from_utf8_lossy(&check.stdout).into_owned() + &String::from_utf8_lossy(&check.stderr);
        assert_eq!(check.status.code(), Some(if part == "record" { 0 } else { 4 }), "{part}: {said}");
        let warning = format!("checkpoint {newest} cannot be used");
        assert!(said.contains(&warning) && said.contains("is used instead"), "{part}: {said}");
        assert_eq!(said.contains("checkpoint-damaged"), part != "record", "{part}: {said}");

        fs::write(site.path("log"), "").unwrap();
        site.mount("ro");
        assert_present_state(&site, ROUNDS);
        site.remount("");
        assert_present_state(&site, ROUNDS);
        let log = site.log();
        assert!(log.contains("WARN") && log.contains(&warning), "{part}: {log}");
        site.unmount_and_check();
        site.mount("");
        assert_present_state(&site, ROUNDS);
        site.unmount();
    }

    // fsck repairs it alone, and says so.
    fs::write(site.image(), &intact).unwrap();
    {
        let target = Target::open(&site.image());
        target.destroy_node(&target.root(&target.checkpoints()[0], BtreeId::Inodes));
    }
    let repaired = finish(site.coppice(&["fsck", "-y"]).arg(site.image())).unwrap();
    let said = String::from_utf8_lossy(&repaired.stdout).into_owned();
    assert_eq!(repaired.status.code(), Some(1), "{said}");
    assert!(said.contains("checkpoint-damaged"), "{said}");
    let again = finish(site.coppice(&["fsck", "-n"]).arg(site.image())).unwrap();
    let said = String::from_utf8_lossy(&again.stderr).into_owned();
    assert!(again.status.code() == Some(0) && !said.contains("cannot be used"), "{said}");
    site.mount("");
    assert_present_state(&site, ROUNDS);
    site.unmount();
}

/// The one before the newest is lost, and the one before that is long no longer kept: its place in the journal is others'. It was taken for the
/// older kept one, and the journal then began to overwrite what the newest needs.
#[test]
fn a_checkpoint_whose_journal_is_gone_is_not_kept() {
    const CALLER: Caller = Caller { uid: 0, gid: 0, pid: 1, umask: 0o022 };
    let _limit = Limit::new();
    let memory = Arc::new(MemDevice::new(64 << 20));
    let device: Arc<dyn BlockDevice> = Arc::clone(&memory) as _;
    let env = Env::simulated(1);
    Filesystem::format(&device, &test_geometry(), &env).unwrap();
    let open = |device: Arc<dyn BlockDevice>| {
        let options = OpenOptions {
            workers: WorkerSet::Essential,
            cache_bytes: 16 << 20,
            env: Some(Env::simulated(1)),
            ..OpenOptions::default()
        };
        Filesystem::open(vec![device], &options).unwrap()
    };
    let filesystem = open(Arc::clone(&device));
    let config = JournalConfig::new(filesystem.superblock(), vec![Arc::clone(&device)], None);
    let reader = coppicefs::btree::NodeReader::new(
        Arc::new(filesystem.superblock().clone()),
        vec![Arc::clone(&device)],
        Arc::clone(filesystem.metrics()),
    );
    for round in 0..4_u64 {
        for number in 0..8 {
            let name = format!("{round}.{number}");
            filesystem.vfs().mkdir(&CALLER, 1, std::ffi::OsStr::new(&name), 0o755).unwrap();
        }
        filesystem.journal().flush(filesystem.journal().newest()).unwrap();
        filesystem.checkpoint().unwrap();
    }
    let checkpoints = reader.checkpoints();
    assert!(checkpoints[2].first_replay < checkpoints[0].first_replay && holds_log_of(&config, &checkpoints[2]));
    // Power is cut, the record of the older kept one is lost, and where the log of the one before it began, later records are.
    let image = memory.image();
    drop(filesystem);
    let after: Arc<dyn BlockDevice> = Arc::new(MemDevice::from_image(image, false));
    let bucket_bytes = u64::from(config.bucket_bytes);
    let superblock = coppicefs::recovery::superblock::read(&*after).unwrap().superblock;
    for area in &superblock.layout.checkpoints {
        let slot = checkpoints[1].number % coppicefs::format::checkpoint::RECORD_SLOTS;
        let at = area.first * bucket_bytes + slot * coppicefs::format::checkpoint::RECORD_SLOT_BYTES as u64;
        after.write(at, &[0x5a; 4096]).unwrap();
    }
    for ring in &superblock.layout.journal {
        after.write(ring.first * bucket_bytes + checkpoints[2].first_replay_offset, &[0x5a; 4096]).unwrap();
    }
    let filesystem = open(after);
    assert_eq!(filesystem.opening().newest.number, checkpoints[0].number);
    assert_eq!(filesystem.opening().previous.as_ref().map(|older| older.number), None);
    filesystem.close().unwrap();
}

fn json(output: &std::process::Output) -> serde_json::Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
        panic!("{error}: {}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
    })
}

#[test]
fn checkpoints_are_listed_with_what_is_wrong_with_them() {
    let Some(site) = populated(4) else { return };
    let list = || json(&finish(site.coppice(&["checkpoints", "--json"]).arg(site.image())).unwrap());
    let before = list();
    let found = before["checkpoints"].as_array().unwrap();
    assert_eq!(found.len(), 4, "{before}");
    let newest = &found[0];
    assert!(newest["newest"] == true && newest["whole"] == true && newest["closed_in_order"] == true, "{newest}");
    assert!(newest["gives_present_state"] == true && newest["opens_as_it_was"] == true, "{newest}");
    assert!(newest["written_at"].as_i64().unwrap() > 1_600_000_000 && newest["nodes"].as_u64().unwrap() > 5);
    let table = run(site.coppice(&["checkpoints"]).arg(site.image()));
    assert!(table.contains("(newest)") && table.contains("whole") && table.contains(" UTC"), "{table}");
    {
        let target = Target::open(&site.image());
        target.destroy_node(&target.root(&target.checkpoints()[0], BtreeId::Dirents));
        target.destroy_record(target.checkpoints()[1].number);
    }
    let after = list();
    let found = after["checkpoints"].as_array().unwrap();
    assert_eq!(found.len(), 3, "{after}");
    assert!(found[0]["whole"] == false && found[0]["opens_as_it_was"] == false, "{after}");
    assert!(found[0]["problems"][0].as_str().unwrap().contains("dirents"), "{after}");
}

/// Bytes that say which file, which version and which block they are.
fn stamped(file: u32, version: u32, blocks: u32) -> Vec<u8> {
    (0..blocks)
        .flat_map(|block| {
            format!("<{file:06}.{version:06}.{block:06}>").into_bytes().repeat(4096 / 22 + 1).into_iter().take(4096)
        })
        .collect()
}

/// An older state shows its own content or EIO, whatever was written over it; never what it did not hold.
#[test]
fn an_older_state_shows_the_older_content_or_eio() {
    const FILES: u32 = 40;
    // Without checksums, too: there a generation is all that tells.
    for options in [&[][..], &["--checksum", "none"]] {
        let Some(site) = Site::formatted("32M", options) else { return };
        let path = |file: u32| site.mnt().join(format!("file{file}"));
        site.mount("");
        for file in 0..FILES {
            fs::write(path(file), stamped(file, 1, 60)).unwrap();
        }
        fs::create_dir(site.mnt().join("gone")).unwrap();
        fs::write(site.mnt().join("gone/with it"), b"small and inline").unwrap();
        site.unmount();
        let older = Target::open(&site.image()).checkpoints()[0].number;

        // A good part is deleted, and its space used again.
        site.mount("");
        for file in 0..FILES {
            match file % 4 {
                0 => fs::write(path(file), stamped(file, 2, 60)).unwrap(),
                1 => fs::remove_file(path(file)).unwrap(),
                2 => fs::rename(path(file), site.mnt().join(format!("renamed{file}"))).unwrap(),
                _ => {}
            }
        }
        fs::remove_dir_all(site.mnt().join("gone")).unwrap();
        site.sync();
        // Until it is full: what was freed is used again.
        for file in 1000..1200 {
            if fs::write(path(file), stamped(file, 3, 60)).is_err() {
                break;
            }
            site.sync();
        }
        site.sync();
        site.crash();

        let refuse =
            |options: &str| finish(site.coppice(&["mount", "-o", options]).arg(site.image()).arg(site.mnt())).unwrap();
        assert_refused(&refuse(&format!("checkpoint={older}")), &["-o ro,checkpoint=N"]);
        assert_refused(&refuse("ro,checkpoint=4711"), &["4711", "coppice checkpoints"]);
        assert_refused(&refuse("ro,checkpoint=x"), &["checkpoint"]);
        let list = json(&finish(site.coppice(&["checkpoints", "--json"]).arg(site.image())).unwrap());
        let entry = list["checkpoints"].as_array().unwrap().iter().find(|one| one["number"] == older).cloned();
        assert!(entry.is_some_and(|entry| entry["opens_as_it_was"] == true), "{list}");

        site.mount(&format!("ro,checkpoint={older}"));
        let (mut whole, mut refused) = (0, 0);
        for file in 0..FILES {
            match fs::read(path(file)) {
                Ok(content) => {
                    assert!(content == stamped(file, 1, 60), "file {file} is its own");
                    whole += 1;
                }
                Err(error) => {
                    assert_eq!(error.raw_os_error(), Some(5), "file {file}: {error}");
                    refused += 1;
                }
            }
        }
        eprintln!("{options:?}: {whole} files as they were, {refused} refused");
        assert_eq!(fs::read(site.mnt().join("gone/with it")).unwrap(), b"small and inline");
        assert!(!site.mnt().join("renamed2").exists());
        assert!(fs::write(site.mnt().join("new"), b"x").is_err());
        // Copygc has moved what was left alone, too.
        assert!(whole > 0 || !options.is_empty(), "{refused} refused");
        assert!(refused > 0, "nothing was used again: {whole} whole");
        site.unmount_noisily();
        // The present state is none the worse.
        site.mount("");
        assert_eq!(fs::read(path(0)).unwrap(), stamped(0, 2, 60));
        site.unmount_noisily();
        site.assert_clean();
    }
}

/// Everything about a tree that a copy keeps, by path.
fn seen(root: &Path) -> BTreeMap<PathBuf, String> {
    let mut found = BTreeMap::new();
    let mut pending = vec![root.to_path_buf()];
    while let Some(path) = pending.pop() {
        let metadata = fs::symlink_metadata(&path).unwrap();
        let kind = metadata.file_type();
        let content = if kind.is_dir() {
            pending.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            String::new()
        } else if kind.is_symlink() {
            format!("{:?}", fs::read_link(&path).unwrap())
        } else if kind.is_file() {
            let bytes = fs::read(&path).unwrap();
            format!(
                "{} {:x}",
                bytes.len(),
                bytes.iter().fold(7_u64, |sum, &byte| sum.wrapping_mul(31) ^ u64::from(byte))
            )
        } else {
            format!("device {}", metadata.rdev())
        };
        let mut value = [0; 100];
        let length = rustix::fs::lgetxattr(&path, "user.color", &mut value[..]).unwrap_or(0);
        let links = if kind.is_dir() { 0 } else { metadata.nlink() };
        let (seconds, nanoseconds) = (metadata.mtime(), metadata.mtime_nsec());
        let described = format!(
            "{:o} {}:{} {links} {seconds}.{nanoseconds} {content} {:?}",
            metadata.mode(),
            metadata.uid(),
            metadata.gid(),
            &value[..length]
        );
        found.insert(path.strip_prefix(root).unwrap().to_path_buf(), described);
    }
    found
}

/// A file of every kind.
fn make_every_kind(root: &Path) {
    for folder in 0..6 {
        let folder = root.join(format!("folder {folder}/deeper"));
        fs::create_dir_all(&folder).unwrap();
        for number in 0..60_u32 {
            let path = folder.join(format!("file with a name that takes room, number {number}"));
            fs::write(
                &path,
                stamped(number, 1, number % 9).split_off((number as usize % 3) * 100 * usize::from(number % 9 > 0)),
            )
            .unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600 + number % 0o177)).unwrap();
            std::os::unix::fs::chown(&path, Some(1000 + number), Some(2000)).unwrap();
        }
        fs::hard_link(
            folder.join("file with a name that takes room, number 7"),
            root.join(format!("{}", folder.to_string_lossy().len()))
                .with_extension(folder.parent().unwrap().file_name().unwrap()),
        )
        .unwrap();
    }
    fs::write(root.join("inline"), b"inline").unwrap();
    rustix::fs::setxattr(root.join("inline"), "user.color", b"green", rustix::fs::XattrFlags::empty()).unwrap();
    let sparse = fs::File::create(root.join("sparse")).unwrap();
    sparse.write_all_at(&stamped(1, 1, 1), 5 << 20).unwrap();
    sparse.set_len((9 << 20) + 77).unwrap();
    symlink("folder 0/deeper", root.join("link")).unwrap();
    symlink("/nowhere/at/all", root.join("dangling")).unwrap();
    let make = |name: &str, kind, device| {
        rustix::fs::mknodat(rustix::fs::CWD, root.join(name), kind, rustix::fs::Mode::from_raw_mode(0o640), device)
            .unwrap();
    };
    make("pipe", rustix::fs::FileType::Fifo, 0);
    make("null", rustix::fs::FileType::CharacterDevice, rustix::fs::makedev(1, 3));
    make("socket", rustix::fs::FileType::Socket, 0);
    fs::set_permissions(root.join("folder 1"), fs::Permissions::from_mode(0o2750)).unwrap();
    let time = rustix::fs::Timespec { tv_sec: -12345, tv_nsec: 678 };
    let times = rustix::fs::Timestamps { last_access: time, last_modification: time };
    for name in ["folder 2", "inline", "link"] {
        rustix::fs::utimensat(rustix::fs::CWD, root.join(name), &times, rustix::fs::AtFlags::SYMLINK_NOFOLLOW).unwrap();
    }
}

fn restore(site: &Site, options: &[&str]) -> (i32, serde_json::Value, PathBuf) {
    let to = site.path("restored");
    let _ = fs::remove_dir_all(&to);
    let output = finish(site.coppice(&["restore", "--json", "-q"]).args(options).arg(site.image()).arg(&to)).unwrap();
    (output.status.code().unwrap(), json(&output), to)
}

#[test]
fn everything_readable_is_restored() {
    let Some(site) = Site::formatted("64M", &[]) else { return };
    site.mount("");
    make_every_kind(&site.mnt());
    let original = seen(&site.mnt());
    site.sync();
    // A crash: the journal has the newest of it.
    site.crash();
    let (code, report, to) = restore(&site, &[]);
    assert_eq!(code, 0, "{report}");
    assert_eq!(seen(&to), original);
    let sparse = fs::metadata(to.join("sparse")).unwrap();
    assert!(sparse.blocks() * 512 < 1 << 20, "holes stay holes: {}", sparse.blocks());
    // Not into what is there; with the flag beside it.
    let again = finish(site.coppice(&["restore"]).arg(site.image()).arg(&to)).unwrap();
    assert_eq!(again.status.code(), Some(8));
    assert!(String::from_utf8_lossy(&again.stderr).contains("--non-empty"));
    let again = finish(site.coppice(&["restore", "--non-empty", "-q"]).arg(site.image()).arg(&to)).unwrap();
    assert_eq!(again.status.code(), Some(0), "{}", String::from_utf8_lossy(&again.stdout));
    assert_eq!(fs::read(to.join("inline~1")).unwrap(), b"inline");

    // Clean, for what is next: all in the trees.
    site.mount("");
    site.unmount();
    let intact = fs::read(site.image()).unwrap();
    let (newest, nodes, data) = {
        let target = Target::open(&site.image());
        let newest = target.checkpoints().remove(0);
        (newest.clone(), target.nodes(&newest), target.data(&newest))
    };
    // A block of a file is lost: that range alone.
    let (key, offset, _) =
        data.iter().find(|(key, _, length)| *length >= 4 * 4096 && key.offset == u64::from(*length)).unwrap();
    {
        Target::open(&site.image()).destroy(offset + 4096, 4096);
    }
    let (code, report, to) = restore(&site, &[]);
    assert_eq!(code, 4, "{report}");
    let damaged = report["damaged"].as_array().unwrap();
    assert_eq!(damaged.len(), 1, "{report}");
    assert_eq!(
        (&damaged[0]["inode"], &damaged[0]["start"], &damaged[0]["end"]),
        (&key.inode.into(), &4096.into(), &8192.into())
    );
    let path = damaged[0]["path"].as_str().unwrap();
    let content = fs::read(to.join(&path[1..])).unwrap();
    assert!(content[4096..8192].iter().all(|&byte| byte == 0) && content[..4096].iter().all(|&byte| byte != 0));

    // Each tree's leaves, lost in turn: mount or what reads it fails, and the rest is restored.
    for btree in [BtreeId::Inodes, BtreeId::Dirents, BtreeId::Extents, BtreeId::Xattrs] {
        fs::write(site.image(), &intact).unwrap();
        {
            let target = Target::open(&site.image());
            // Older ones would give the same state, with their journal.
            target.checkpoints().iter().skip(1).for_each(|older| target.destroy_record(older.number));
            let mut leaves = nodes.iter().filter(|(tree, level, _)| *tree == btree && *level == 0);
            let (.., leaf) = leaves.next_back().unwrap();
            for copy in &leaf.copies {
                target.destroy(copy.offset, 4096);
            }
        }
        let (code, report, to) = restore(&site, &[]);
        assert_eq!(code, 4, "{btree:?}: {report}");
        let restored = seen(&to);
        let intact_paths = original.iter().filter(|(path, described)| restored.get(*path) == Some(described)).count();
        eprintln!("{btree:?}: {intact_paths} of {} as they were, {} unnamed", original.len(), report["unnamed"]);
        let contents = |of: &BTreeMap<PathBuf, String>| of.len();
        match btree {
            BtreeId::Dirents => {
                assert!(report["unnamed"].as_u64().unwrap() > 0, "{report}");
                // lost+found is one more.
                assert!(
                    contents(&restored) + 8 >= original.len(),
                    "all are somewhere: {} {}",
                    restored.len(),
                    original.len()
                );
                assert!(fs::read_dir(to.join("lost+found")).unwrap().count() > 0);
            }
            BtreeId::Xattrs => assert!(intact_paths + 1 >= original.len()),
            _ => assert!(intact_paths > 0 || nodes.iter().filter(|(tree, ..)| *tree == btree).count() == 1),
        }
    }

    // The inodes' root: no mount, but content and names.
    fs::write(site.image(), &intact).unwrap();
    {
        let target = Target::open(&site.image());
        target.checkpoints().iter().skip(1).for_each(|older| target.destroy_record(older.number));
        for copy in &target.root(&newest, BtreeId::Inodes).copies {
            target.destroy(copy.offset, 4096);
        }
    }
    let refused = finish(site.coppice(&["mount"]).arg(site.image()).arg(site.mnt())).unwrap();
    assert!(!refused.status.success());
    let (code, report, to) = restore(&site, &[]);
    assert_eq!(code, 4, "{report}");
    let number = "folder 3/deeper/file with a name that takes room, number 17";
    assert!(fs::read(to.join(number)).unwrap().starts_with(&stamped(17, 1, 8)[200..4096]), "its size alone is lost");

    // The journal is damaged where it matters: no mount, and the checkpoint's state.
    fs::write(site.image(), &intact).unwrap();
    site.mount("");
    fs::write(site.mnt().join("in the journal alone"), b"x").unwrap();
    site.sync();
    fs::write(site.mnt().join("and this"), b"x").unwrap();
    site.sync();
    site.crash();
    destroy_start_of_journal(&site);
    let refused = finish(site.coppice(&["mount"]).arg(site.image()).arg(site.mnt())).unwrap();
    assert!(!refused.status.success(), "a damaged journal is no end");
    let (_, report, to) = restore(&site, &[]);
    assert!(report["warnings"].to_string().contains("the journal is damaged"), "{report}");
    let restored = seen(&to);
    assert!(
        original
            .iter()
            .filter(|(path, _)| !path.as_os_str().is_empty())
            .all(|(path, described)| restored.get(path) == Some(described))
    );
}

/// The state of an older checkpoint is copied as it was; what was used again since is listed and left as a hole.
#[test]
fn an_older_checkpoint_is_restored_as_it_was() {
    let Some(site) = Site::formatted("64M", &[]) else { return };
    site.mount("");
    make_every_kind(&site.mnt());
    let original = seen(&site.mnt());
    site.unmount();
    let older = Target::open(&site.image()).checkpoints()[0].number.to_string();
    let unmounted = fs::read(site.image()).unwrap();
    site.mount("");
    fs::remove_file(site.mnt().join("inline")).unwrap();
    fs::rename(site.mnt().join("folder 2"), site.mnt().join("renamed")).unwrap();
    let rewritten = site.mnt().join("folder 3/deeper/file with a name that takes room, number 17");
    fs::write(&rewritten, stamped(17, 2, 8)).unwrap();
    fs::write(site.mnt().join("new"), b"new").unwrap();
    site.sync();
    site.crash();
    let intact = fs::read(site.image()).unwrap();

    let (code, report, to) = restore(&site, &["--checkpoint", &older]);
    assert_eq!((code, report["checkpoint"].to_string()), (0, older.clone()), "{report}");
    assert!(seen(&to) == original, "{report}");
    let (code, report, to) = restore(&site, &[]);
    assert!(
        code == 0 && to.join("new").exists() && to.join("renamed").exists() && !to.join("inline").exists(),
        "{report}"
    );
    assert!(fs::read(site.image()).unwrap() == intact, "the image was written to");
    let refused =
        finish(site.coppice(&["restore", "--checkpoint", "4711"]).arg(site.image()).arg(site.path("no"))).unwrap();
    assert_refused(&refused, &["4711", "coppice checkpoints"]);

    // The space of files is used again: the file's own bytes, or a hole that is listed.
    fs::write(site.image(), &unmounted).unwrap();
    site.mount("");
    fs::remove_dir_all(site.mnt().join("folder 3")).unwrap();
    site.sync();
    for number in 0..400 {
        if fs::write(site.mnt().join(format!("filler{number}")), stamped(number, 3, 60)).is_err() {
            break;
        }
        site.sync();
    }
    site.crash();
    let (code, report, to) = restore(&site, &["--checkpoint", &older]);
    let listed = report["damaged"].as_array().unwrap();
    let mut whole_count = 0;
    for number in 0..60 {
        let name = format!("folder 3/deeper/file with a name that takes room, number {number}");
        let is_listed = listed.iter().any(|one| one["path"] == format!("/{name}"));
        let whole = stamped(number, 1, number % 9).split_off((number as usize % 3) * 100 * usize::from(number % 9 > 0));
        let is_whole = fs::read(to.join(&name)).unwrap() == whole;
        assert!(is_listed != is_whole, "{name}: whole {is_whole}, {report}");
        whole_count += usize::from(is_whole);
    }
    assert!(code == 4 && whole_count < 60, "nothing was used again: {report}");
}

/// Data without checksums, and a journal that is damaged: nothing tells whether space was used again behind the damage. Such data is left out, or, where
/// that is asked for, given and listed.
#[test]
fn data_that_nothing_verifies_is_given_only_where_it_is_asked_for() {
    for checksum in ["none", "crc32c"] {
        let Some(site) = Site::formatted("64M", &["--checksum", checksum]) else { return };
        site.mount("");
        for number in 0..8 {
            fs::write(site.mnt().join(format!("file{number}")), stamped(number, 1, 20)).unwrap();
        }
        fs::write(site.mnt().join("inline"), b"inline").unwrap();
        site.unmount();
        site.mount("");
        for number in 0..2 {
            fs::write(site.mnt().join(format!("late{number}")), b"x").unwrap();
            site.sync();
        }
        site.crash();
        destroy_start_of_journal(&site);
        let is_whole =
            |to: &Path, number: u32| fs::read(to.join(format!("file{number}"))).unwrap() == stamped(number, 1, 20);
        let (code, report, to) = restore(&site, &[]);
        assert!(report["warnings"].to_string().contains("the journal is damaged"), "{report}");
        let damaged = report["damaged"].as_array().unwrap().len();
        assert_eq!((code, damaged), if checksum == "none" { (4, 8) } else { (0, 0) }, "{report}");
        assert!(checksum != "none" || report["damaged"].to_string().contains("--unverified"), "{report}");
        assert!((0..8).all(|number| is_whole(&to, number) == (checksum != "none")), "{report}");
        assert_eq!(fs::read(to.join("inline")).unwrap(), b"inline");

        let (code, report, to) = restore(&site, &["--unverified"]);
        let unverified = report["unverified"].as_array().unwrap();
        assert_eq!((code, unverified.len()), if checksum == "none" { (4, 8) } else { (0, 0) }, "{report}");
        assert!(
            report["damaged"].as_array().unwrap().is_empty() && (0..8).all(|number| is_whole(&to, number)),
            "{report}"
        );
        for one in unverified {
            assert_eq!((&one["start"], &one["end"]), (&0.into(), &(20 * 4096).into()), "{report}");
        }
        let said =
            finish(site.coppice(&["restore", "--unverified"]).arg(site.image()).arg(site.path("again"))).unwrap();
        let said = String::from_utf8_lossy(&said.stdout).into_owned();
        assert_eq!(said.contains("may not be the file's"), checksum == "none", "{said}");
    }
}

fn flags_of(path: &Path) -> u32 {
    let file = fs::File::open(path).unwrap();
    rustix::fs::ioctl_getflags(&file).map_or(0, |flags| flags.bits())
}

fn set_flags(path: &Path, flags: u32) -> rustix::io::Result<()> {
    let file = fs::File::open(path).unwrap();
    rustix::fs::ioctl_setflags(&file, rustix::fs::IFlags::from_bits_retain(flags))
}

/// Flags of chattr: all of them onto a filesystem that has them, and one sentence where it has not.
#[test]
fn flags_of_chattr_are_restored() {
    const FLAGS: [(&str, u32); 7] = [
        ("sync", 0x8),
        ("immutable", 0x10),
        ("append", 0x20),
        ("no dump", 0x40),
        ("several", 0x8 | 0x10 | 0x40 | 0x80),
        ("folder", 0x10 | 0x80),
        ("folder/inner", 0x20),
    ];
    let Some(site) = Site::formatted("64M", &[]) else { return };
    let Some(onto) = Site::formatted("64M", &[]) else { return };
    site.mount("");
    fs::create_dir(site.mnt().join("folder")).unwrap();
    for (name, _) in FLAGS.iter().filter(|(name, _)| *name != "folder") {
        fs::write(site.mnt().join(name), name.as_bytes()).unwrap();
    }
    // A second name must be made before the file is immutable.
    fs::hard_link(site.mnt().join("immutable"), site.mnt().join("second name")).unwrap();
    for (name, flags) in FLAGS.iter().rev() {
        set_flags(&site.mnt().join(name), *flags).unwrap();
    }
    let original = seen(&site.mnt());
    site.unmount();

    onto.mount("");
    let to = onto.mnt().join("restored");
    let output = finish(site.coppice(&["restore", "--json"]).arg(site.image()).arg(&to)).unwrap();
    let report = json(&output);
    assert_eq!((output.status.code(), report["notes"].as_array().unwrap().len()), (Some(0), 0), "{report}");
    assert!(seen(&to) == original, "{report}");
    for (name, flags) in FLAGS {
        assert_eq!(flags_of(&to.join(name)), flags, "{name}");
    }
    assert!(fs::write(to.join("immutable"), b"x").is_err() && fs::write(to.join("folder/new"), b"x").is_err());
    onto.unmount();

    // A filesystem that has no such flags.
    let bare = Path::new("/proc/self/fd");
    assert!(set_flags(bare, 0x40).is_err());
    let shm = PathBuf::from("/dev/shm").join(format!("coppice-restore-{}", std::process::id()));
    if fs::create_dir(&shm).is_ok() {
        let takes_sync = {
            let probe = shm.join("probe");
            fs::write(&probe, b"").unwrap();
            set_flags(&probe, 0x8).is_ok()
        };
        site.mount("");
        for (name, flags) in FLAGS.iter() {
            set_flags(&site.mnt().join(name), flags & 0x8).unwrap();
        }
        site.unmount();
        let output = finish(site.coppice(&["restore", "--json"]).arg(site.image()).arg(shm.join("to"))).unwrap();
        let report = json(&output);
        fs::remove_dir_all(&shm).unwrap();
        let notes = report["notes"].as_array().unwrap();
        assert_eq!(output.status.code(), Some(0), "{report}");
        assert_eq!(notes.len(), usize::from(!takes_sync), "{report}");
        assert!(takes_sync || notes[0].as_str().unwrap().contains("2 in all (of S)"), "{report}");
    }
}

/// The node-space map is lost in all copies and in all checkpoints: who only reads does without it, fsck makes it again.
#[test]
fn without_a_node_space_map_everything_is_read_and_fsck_makes_it_again() {
    const ROUNDS: u32 = 3;
    let Some(site) = populated(ROUNDS) else { return };
    let older = {
        let target = Target::open(&site.image());
        let checkpoints = target.checkpoints();
        checkpoints.iter().for_each(|checkpoint| target.destroy_map(checkpoint));
        checkpoints[1].number
    };
    let damaged = fs::read(site.image()).unwrap();
    let refused = finish(site.coppice(&["mount"]).arg(site.image()).arg(site.mnt())).unwrap();
    assert_refused(
        &refused,
        &["node-space map", "`mount -o ro` does without", "`fsck.coppice -y` makes the map again"],
    );

    site.mount("ro");
    assert_present_state(&site, ROUNDS);
    assert!(fs::write(site.mnt().join("new"), b"x").is_err());
    site.unmount();
    site.mount(&format!("ro,checkpoint={older}"));
    assert!(site.mnt().join("folder0/file0").exists());
    site.unmount();
    let (code, report, to) = restore(&site, &[]);
    assert_eq!(code, 0, "{report}");
    assert!(fs::read(to.join("folder2/file7")).unwrap() == content(1, 7), "{report}");
    run(site.coppice(&["list"]).arg(site.image()));
    let listed = run(site.coppice(&["checkpoints"]).arg(site.image()));
    assert!(listed.contains("node-space map"), "{listed}");
    assert!(fs::read(site.image()).unwrap() == damaged, "something was written");

    let fsck = |mode| {
        let output = finish(site.coppice(&["fsck", mode]).arg(site.image())).unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let (code, said) = fsck("-n");
    assert!(code == Some(4) && said.contains("node-map-lost"), "{said}");
    assert!(fs::read(site.image()).unwrap() == damaged, "-n has written");
    // Nothing is lost, so -p repairs it.
    let (code, said) = fsck("-p");
    assert!(code == Some(1) && said.contains("node-map-lost"), "{said}");
    assert_eq!(fsck("-n").0, Some(0));
    site.mount("");
    assert_present_state(&site, ROUNDS);
    fs::write(site.mnt().join("new"), b"x").unwrap();
    site.unmount_and_check();
}

/// Names that lead elsewhere, a symbolic link where a directory is to be: all stays inside.
#[test]
fn nothing_that_an_image_says_leads_outside() {
    let Some(site) = Site::formatted("64M", &[]) else { return };
    let outside = site.path("outside");
    fs::create_dir(&outside).unwrap();
    site.mount("");
    fs::write(site.mnt().join("file"), b"payload").unwrap();
    fs::create_dir(site.mnt().join("folder")).unwrap();
    fs::write(site.mnt().join("folder/inner"), b"inner").unwrap();
    symlink(&outside, site.mnt().join("way")).unwrap();
    site.unmount();
    {
        let options = OpenOptions { workers: WorkerSet::Essential, ..OpenOptions::default() };
        let filesystem = Filesystem::open_path(&site.image(), &options).unwrap();
        let scan = filesystem.forest().scan(BtreeId::Dirents, Position::MIN, Position::MAX, 1000).unwrap();
        let root: Vec<_> = scan.keys.into_iter().filter(|(position, _)| position.inode == 1).collect();
        let raw = CommitOptions { raw: true, ..CommitOptions::default() };
        let hostile = ["../escaped", "..", "/etc/escaped", "way"];
        filesystem
            .transactions()
            .run(raw, |transaction| {
                for (position, value) in &root {
                    let mut bucket = DirentBucket::decode(value)?;
                    let first = bucket.0.first().cloned().unwrap();
                    for (number, name) in (1..).zip(hostile) {
                        bucket.0.push(Dirent {
                            discriminator: first.discriminator + number,
                            name: name.into(),
                            ..first.clone()
                        });
                    }
                    transaction.put(BtreeId::Dirents, *position, bucket.encode());
                }
                Ok(())
            })
            .unwrap();
        filesystem.close().unwrap();
    }
    let before = fs::read_dir(site.path("")).unwrap().count();
    let (code, report, to) = restore(&site, &[]);
    assert_eq!(code, 4, "{report}");
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0, "{report}");
    assert_eq!(fs::read_dir(site.path("")).unwrap().count(), before + 1, "only the target itself");
    assert!(!Path::new("/etc/escaped").exists());
    assert_eq!(fs::read(to.join("file")).unwrap(), b"payload");
    assert_eq!(fs::read(to.join("folder/inner")).unwrap(), b"inner");
    assert!(fs::symlink_metadata(to.join(".._escaped")).is_ok(), "{report}");
}

/// Destroys what the next mount must replay first, in all copies.
fn destroy_start_of_journal(site: &Site) {
    let target = Target::open(&site.image());
    let bucket_bytes = u64::from(target.superblock.geometry.bucket_bytes);
    let newest = target.checkpoints().remove(0);
    for ring in &target.superblock.layout.journal {
        target.destroy(ring.first * bucket_bytes + newest.first_replay_offset, 4096);
    }
}
