//! The program fsck, as people and fsck(8) call it: what each mode changes, and the exit codes.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use coppicefs::Result;
use coppicefs::filesystem::{Filesystem, OpenOptions, WorkerSet};
use coppicefs::format::namespace::{DirentBucket, Inode};
use coppicefs::format::space::{Bucket, BucketState};
use coppicefs::format::superblock::copy_offsets;
use coppicefs::format::{BtreeId, Position};
use coppicefs::transaction::{CommitOptions, Transaction};
use coppicefs_tests::damage::Target;
use coppicefs_tests::limit::finish;
use coppicefs_tests::mount::{Site, assert_refused, is_mounted};

const SNAPSHOT: u32 = u32::MAX;

/// A small image with a tree on it.
fn made() -> Option<Site> {
    let site = Site::formatted("128M", &[])?;
    site.mount("");
    fs::create_dir(site.mnt().join("folder")).unwrap();
    for number in 0..10_u8 {
        fs::write(site.mnt().join(format!("folder/file {number}")), vec![number; 3000 * usize::from(number)]).unwrap();
    }
    site.unmount_and_check();
    Some(site)
}

fn damage(image: &Path, change: impl Fn(&mut Transaction<'_>) -> Result<()>) {
    let options = OpenOptions { workers: WorkerSet::Essential, cache_bytes: 16 << 20, ..OpenOptions::default() };
    let filesystem = Filesystem::open_path(image, &options).unwrap();
    let raw = CommitOptions { raw: true, ..CommitOptions::default() };
    filesystem.transactions().run(raw, |transaction| change(transaction)).unwrap();
    filesystem.close().unwrap();
}

/// Exit code and output of fsck with these words.
fn fsck(site: &Site, words: &[&str]) -> (i32, String, String) {
    let output = finish(site.coppice(&[&["fsck"], words].concat()).arg(site.image())).unwrap();
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
}

fn a_file(transaction: &mut Transaction<'_>) -> Result<(Position, Inode)> {
    let keys = transaction.range(BtreeId::Inodes, Position::MIN, Position::MAX, 100)?;
    let mut files = keys.into_iter().map(|(position, value)| (position, Inode::decode(&value).unwrap()));
    Ok(files.find(|(_, inode)| inode.mode & 0o170_000 == 0o100_000 && inode.size > 10_000).expect("a file"))
}

fn dirent_of(inode: &Inode) -> Position {
    Position::new(inode.parent, inode.parent_hash, SNAPSHOT)
}

type Change = fn(&mut Transaction<'_>) -> Result<()>;

/// Damages with the identifiers under which they are found.
const REPAIRABLE: &[(&str, Change)] = &[
    ("link-count", |transaction| {
        let (position, mut inode) = a_file(transaction)?;
        inode.link_count = 7;
        transaction.put(BtreeId::Inodes, position, inode.encode()?);
        Ok(())
    }),
    ("unconnected", |transaction| {
        let (_, inode) = a_file(transaction)?;
        transaction.delete(BtreeId::Dirents, dirent_of(&inode));
        Ok(())
    }),
    ("dirent-dangling", |transaction| {
        let (_, inode) = a_file(transaction)?;
        let value = transaction.get(BtreeId::Dirents, dirent_of(&inode))?.expect("its entry");
        let mut bucket = DirentBucket::decode(&value)?;
        bucket.0[0].inode = coppicefs::units::InodeNumber(123_456);
        transaction.put(BtreeId::Dirents, dirent_of(&inode), bucket.encode());
        Ok(())
    }),
    ("orphan-dangling", |transaction| {
        transaction.put(BtreeId::Orphans, Position::new(0, 4711, SNAPSHOT), Vec::new());
        Ok(())
    }),
    ("bucket-wrong", |transaction| {
        let keys = transaction.range(BtreeId::Buckets, Position::MIN, Position::MAX, 1000)?;
        let mut decoded = keys.into_iter().map(|(position, value)| (position, Bucket::decode(&value).unwrap()));
        let (position, mut bucket) =
            decoded.find(|(_, bucket)| bucket.state == BucketState::Data).expect("a data bucket");
        bucket.charged_bytes += 4096;
        transaction.put(BtreeId::Buckets, position, bucket.encode());
        Ok(())
    }),
    ("free-space-value", |transaction| {
        let (position, _) = transaction.next(BtreeId::FreeSpace, Position::MIN, Position::MAX)?.expect("a free bucket");
        transaction.put(BtreeId::FreeSpace, position, vec![0xee; 3]);
        Ok(())
    }),
    ("index-key-stray", |transaction| {
        transaction.put(BtreeId::NeedDiscard, Position::new(77, 5, 0), Vec::new());
        Ok(())
    }),
];

/// What `-p` leaves to a person: something is lost by it.
fn lossy(transaction: &mut Transaction<'_>) -> Result<()> {
    let (position, _) = transaction.next(BtreeId::Extents, Position::MIN, Position::MAX)?.expect("an extent");
    transaction.put(BtreeId::Extents, position, vec![0xee; 10]);
    Ok(())
}

#[test]
fn each_mode_repairs_what_it_says_and_n_writes_nothing() {
    let Some(site) = made() else { return };
    assert_eq!(fsck(&site, &["-n"]).0, 0);
    assert_eq!(fsck(&site, &["-p"]).0, 0);
    // Without a mode and without a terminal it is -p.
    let modes: &[&[&str]] = &[&["-p"], &["-a"], &["-y"], &[], &["-q", "-y"], &["-v"], &["--json"]];
    for ((id, change), mode) in REPAIRABLE.iter().zip(modes) {
        damage(&site.image(), change);
        let before = fs::read(site.image()).unwrap();
        let (code, said, _) = fsck(&site, &["-n"]);
        assert!(code == 4 && said.contains(id), "{id}: {code} {said}");
        let (code, said, _) = fsck(&site, &["-n", "--json"]);
        let report: serde_json::Value = serde_json::from_str(&said).unwrap_or_else(|error| panic!("{error}: {said}"));
        assert_eq!((code, &report["clean"], &report["exit_code"]), (4, &false.into(), &4.into()), "{said}");
        let problems = report["problems"].as_array().unwrap();
        assert!(problems.iter().any(|problem| problem["id"] == *id && problem["repairable"] == true), "{id}: {said}");
        assert!(fs::read(site.image()).unwrap() == before, "{id}: -n has changed the image");
        let (code, said, errors) = fsck(&site, mode);
        assert_eq!(code, 1, "{id} {mode:?}: {said}{errors}");
        let (code, said, _) = fsck(&site, &["-n"]);
        assert_eq!(code, 0, "{id} {mode:?}, then: {said}");
    }
    site.mount("");
    assert!(is_mounted(&site.mnt()));
    site.unmount_and_check();
}

#[test]
fn what_is_repaired_and_what_is_not_add_up() {
    let Some(site) = made() else { return };
    damage(&site.image(), lossy);
    damage(&site.image(), REPAIRABLE[0].1);
    // Counts that follow from what is lost are no certain repair either.
    let before = fs::read(site.image()).unwrap();
    let (code, said, _) = fsck(&site, &["-p"]);
    assert!(code == 4 && said.contains("key-undecodable") && said.contains("fsck-coppice -y"), "{code} {said}");
    let image = fs::File::options().write(true).open(site.image()).unwrap();
    image.write_all_at(&[0xff; 4096], copy_offsets(before.len() as u64)[1]).unwrap();
    let (code, said, _) = fsck(&site, &["-p"]);
    assert!(code == 5 && said.contains("superblock-copy") && said.contains("key-undecodable"), "{code} {said}");
    let (code, listed, _) = fsck(&site, &["-n"]);
    assert!(code == 4 && listed.contains("link-count") && listed.contains("lost: /folder/file"), "{code} {listed}");
    let (code, said, _) = fsck(&site, &["-y"]);
    assert_eq!(code, 1, "{said}");
    let findings =
        |said: &str| said.lines().filter(|line| !line.contains(" problems")).map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(findings(&listed), findings(&said), "-n and -y give different lists");
    assert_eq!(fsck(&site, &["-n"]).0, 0);
    // The file that lost its data is there, and says so.
    site.mount("");
    let lost = listed.split("lost: ").nth(1).and_then(|rest| rest.split(": ").next()).unwrap();
    let outcome = fs::read(site.mnt().join(lost.trim_start_matches('/')));
    assert_eq!(outcome.unwrap_err().raw_os_error(), Some(5), "{lost}");
    assert!(site.log().contains("fsck has found it lost"), "{}", site.log());
    // The daemon has logged an error, as it should: not by the way that asserts that it has not.
    assert!(finish(std::process::Command::new("umount").arg(site.mnt())).unwrap().status.success());
    assert_eq!(fsck(&site, &["-n"]).0, 0);
}

#[test]
fn files_with_damaged_data_are_listed_with_their_ranges() {
    let Some(site) = Site::formatted("128M", &[]) else { return };
    site.mount("compression=none");
    let content = |number: u8| -> Vec<u8> { (0..40 * 4096_u32).map(|at| (at / 7) as u8 ^ number).collect() };
    fs::create_dir(site.mnt().join("a folder")).unwrap();
    fs::write(site.mnt().join("a folder/bad\nname"), content(1)).unwrap();
    fs::write(site.mnt().join("whole"), content(2)).unwrap();
    site.unmount();
    site.mount("compression=lz4");
    fs::write(site.mnt().join("frames"), content(3)).unwrap();
    site.unmount_and_check();
    assert_eq!(fsck(&site, &["--list-damaged"]).0, 0);
    // One block of the first, the only frame of the last, found by their extents.
    let listed = |word: &str| -> Vec<u64> {
        let said = finish(site.coppice(&["list", "--btree", "extents"]).arg(site.image())).unwrap();
        let text = String::from_utf8(said.stdout).unwrap();
        let lines = text.lines().filter(|line| line.contains("bytes at 0:") && line.contains("Lz4") == (word == "lz4"));
        lines
            .filter_map(|line| {
                line.split_once("bytes at 0:")?.1.split(|letter: char| !letter.is_ascii_digit()).next()?.parse().ok()
            })
            .collect()
    };
    let image = fs::File::options().read(true).write(true).open(site.image()).unwrap();
    let flip = |offset: u64| {
        let mut byte = [0];
        image.read_exact_at(&mut byte, offset).unwrap();
        image.write_all_at(&[byte[0] ^ 4], offset).unwrap();
    };
    let (plain, frames) = (listed("none"), listed("lz4"));
    assert!(!plain.is_empty() && !frames.is_empty(), "{plain:?} {frames:?}");
    flip(plain[0] + 3 * 4096 + 77);
    flip(frames[0] + 100);
    let before = fs::read(site.image()).unwrap();
    let (code, said, errors) = fsck(&site, &["--list-damaged"]);
    assert!(code == 4 && said.contains("/a folder/bad\\nname: bytes 12288 to 16384: "), "{code} {said} {errors}");
    assert!(said.contains("/frames: bytes 0 to ") && !said.contains("/whole"), "{said}");
    let (code, said, _) = fsck(&site, &["--list-damaged", "--json"]);
    let report: serde_json::Value = serde_json::from_str(&said).unwrap_or_else(|error| panic!("{error}: {said}"));
    let damaged = report["damaged"].as_array().unwrap();
    assert_eq!((code, damaged.len(), &damaged[0]["start"]), (4, 2, &12288.into()), "{said}");
    assert!(fs::read(site.image()).unwrap() == before, "the image has changed");
    assert_eq!(fsck(&site, &["--list-damaged", "-y"]).0, 16);
}

#[test]
fn bad_copies_on_the_medium() {
    let Some(site) = made() else { return };
    let image = fs::File::options().write(true).open(site.image()).unwrap();
    let [first, middle, last] = copy_offsets(128 << 20);
    image.write_all_at(&[0xff; 4096], middle).unwrap();
    let (code, said, _) = fsck(&site, &["-n"]);
    assert!(code == 4 && said.contains("superblock-copy"), "{code} {said}");
    assert_eq!(fsck(&site, &["-p"]).0, 1);
    assert_eq!(fsck(&site, &["-n"]).0, 0);
    // With none left it is no filesystem, and a check cannot be made; as JSON, too.
    for offset in [first, middle, last] {
        image.write_all_at(&[0xff; 4096], offset).unwrap();
    }
    for words in [&["-n", "--json"], &["-y", "--json"]] {
        let (code, said, errors) = fsck(&site, words);
        let report: serde_json::Value = serde_json::from_str(&said).unwrap_or_else(|error| panic!("{error}: {said}"));
        assert!((code == 4 || code == 8) && report["exit_code"] == code && report["clean"] == false, "{code} {said}");
        assert_eq!(errors.lines().count(), 1, "{errors}");
    }
}

/// The reader of a pipe may go at any time: the report is lost then, and nothing else.
#[test]
fn a_closed_pipe_ends_no_repair() {
    let Some(site) = made() else { return };
    damage(&site.image(), |transaction| {
        let (position, mut inode) = a_file(transaction)?;
        inode.link_count += 1;
        transaction.put(BtreeId::Inodes, position, inode.encode()?);
        Ok(())
    });
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut repair = site.coppice(&["fsck", "-y", "-v"]);
    let output = repair.arg(site.image()).stdout(writer).spawn().unwrap().wait().unwrap();
    assert_eq!(output.code(), Some(1));
    site.assert_clean();
}

/// The root of a tree is lost in every checkpoint: each program names what helps, and that helps.
#[test]
fn what_cannot_be_mounted_names_what_helps() {
    let Some(site) = made() else { return };
    // So that no checkpoint is kept from which the journal alone gives everything.
    site.mount("");
    fs::write(site.mnt().join("another"), b"file").unwrap();
    site.unmount();
    {
        let target = Target::open(&site.image());
        for checkpoint in target.checkpoints() {
            if checkpoint.roots.iter().any(|root| root.btree == BtreeId::Inodes as u8) {
                target.destroy_node(&target.root(&checkpoint, BtreeId::Inodes));
            }
        }
    }
    let image = site.image().display().to_string();
    for options in ["rw", "ro"] {
        let refused = finish(site.coppice(&["mount", "-o", options]).arg(site.image()).arg(site.mnt())).unwrap();
        let ways = [format!("`coppice restore {image} DIR`"), format!("`fsck.coppice -n {image}`")];
        assert_refused(&refused, &["inodes tree", &ways[0], &ways[1]]);
    }
    let (code, said, _) = fsck(&site, &["-y"]);
    assert_eq!(code, 8, "{said}");
    assert!(said.contains(&format!("`coppice restore {image} DIR`")) && said.contains("--rebuild"), "{said}");
    let to = site.path("restored");
    let restored = finish(site.coppice(&["restore"]).arg(site.image()).arg(&to)).unwrap();
    assert_eq!(restored.status.code(), Some(4), "{}", String::from_utf8_lossy(&restored.stdout));
    // What is left of the size of a file whose inode is lost are its blocks.
    assert!(fs::read(to.join("folder/file 7")).unwrap().starts_with(&[7; 21_000]));
    let (code, said, _) = fsck(&site, &["--rebuild", "-y"]);
    assert_eq!(code, 1, "{said}");
    site.mount("");
    site.unmount_and_check();
}
