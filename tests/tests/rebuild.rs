//! `fsck-coppice --rebuild`: what comes back of a filesystem whose superblocks, checkpoints, roots and journal are destroyed.
//!
//! `COPPICE_REBUILD_FILES=n` is how many files the large tree has (400; the figure of the issue is for 15000), `COPPICE_SEED` where random damage begins,
//! `COPPICE_CRASH_LONG=1` cuts the power at every write of a rebuild.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};

use coppicefs::Error;
use coppicefs::btree::{NodeReader, walk_published};
use coppicefs::device::{BlockDevice, Image, PlanOptions, SimDevice, SimOptions, Snapshot};
use coppicefs::env::Env;
use coppicefs::filesystem::{Filesystem, OpenOptions};
use coppicefs::format::superblock::{SUPERBLOCK_BYTES, Superblock, copy_offsets};
use coppicefs::format::{BtreeId, Position};
use coppicefs::metrics::Metrics;
use coppicefs::recovery::scan::scan_nodes;
use coppicefs::recovery::superblock;
use coppicefs::vfs::{Caller, WriteRequest};
use coppicefs_fsck::rebuild::{Finished, RebuildOptions, RebuildReport, Target, finish, rebuild};
use coppicefs_tests::crash::{Subject, seed_or};
use coppicefs_tests::filesystem_subject::Coppice;
use coppicefs_tests::limit::{self, Limit, lengthen};
use coppicefs_tests::mount::{count, program};
use coppicefs_tests::operation::{COMPRESSIBLE, Operation};
use coppicefs_tests::tree::{Kind, Tree};
use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};

const MIB: u64 = 1 << 20;

fn device_of(image: Image) -> Arc<SimDevice> {
    Arc::new(SimDevice::from_image(image, SimOptions { block_bytes: 4096, ..SimOptions::default() }))
}

/// lz4, so that what can be compressed is.
fn subject() -> Coppice {
    let mut subject = Coppice::default();
    subject.format.defaults.compression = 1;
    subject
}

/// What happens to the large tree: files of all sizes in many folders, links, attributes; some renamed, deleted, written over, cut.
fn workload(files: u64) -> Vec<Operation> {
    let mut operations = Vec::new();
    let mut deep = String::new();
    for depth in 0..12 {
        deep = format!("{deep}/deep{depth}");
        operations.push(Operation::MakeDirectory { path: deep.clone(), mode: 0o750 });
    }
    operations.push(Operation::Create { path: format!("{deep}/at the bottom"), mode: 0o600 });
    operations.push(Operation::Write { path: format!("{deep}/at the bottom"), offset: 0, length: 9000, tag: 77 });
    let folder = |file: u64| format!("/folder{}", file / 40);
    for file in 0..files {
        if file % 40 == 0 {
            operations.push(Operation::MakeDirectory { path: folder(file), mode: 0o755 });
        }
        let path = format!("{}/file number {file}", folder(file));
        let tag = u32::try_from(file + 1).unwrap() | if file % 3 == 0 { COMPRESSIBLE } else { 0 };
        operations.push(Operation::Create { path: path.clone(), mode: if file % 2 == 0 { 0o644 } else { 0o600 } });
        let length = [0, 100, 3000, 4096, 10_000, 40_000, 17, 5000][(file % 8) as usize];
        if length > 0 {
            operations.push(Operation::Write { path: path.clone(), offset: 0, length, tag });
        }
        if file % 4 == 0 {
            let value = format!("{file} {}", "v".repeat((file % 60) as usize));
            operations.push(Operation::SetXattr { path: path.clone(), name: "user.number".into(), value });
        }
        match file % 23 {
            1 => operations.push(Operation::Link { existing: path, path: format!("/hard link {file}") }),
            2 => operations.push(Operation::SymbolicLink { path: format!("/symbolic {file}"), target: path }),
            3 => operations.push(Operation::Rename { from: path, to: format!("/renamed {file}") }),
            4 => operations.push(Operation::Unlink { path }),
            5 => operations.push(Operation::Write { path, offset: 0, length: 12_000, tag: tag + 500_000 }),
            6 => operations.push(Operation::Truncate { path, size: length / 2 }),
            7 => operations.push(Operation::Allocate { path, offset: 0, length: 60_000, keep_size: false }),
            _ => {}
        }
        if file % 150 == 149 {
            operations.push(if file % 300 == 149 { Operation::Sync } else { Operation::Settle });
        }
    }
    // Written long ago, and gone or changed since: old leaves still have them.
    for file in (0..files).filter(|file| file % 23 == 8) {
        operations.push(Operation::Unlink { path: format!("{}/file number {file}", folder(file)) });
    }
    for file in (0..files).filter(|file| file % 23 == 9) {
        let path = format!("{}/file number {file}", folder(file));
        operations.push(Operation::Write { path, offset: 0, length: 8000, tag: 900_000 });
    }
    operations
}

/// The large tree, unmounted in order or not; and what it shows.
fn made(subject: &Coppice, size_bytes: u64, files: u64, is_unmounted: bool) -> (Image, Tree) {
    let device = device_of(Image::new(size_bytes));
    subject.format(&device).unwrap();
    let mut mounted = subject.mount(&device, 1).unwrap();
    for operation in workload(files) {
        mounted.perform(&operation).unwrap_or_else(|error| panic!("{operation:?}: {error}"));
    }
    mounted.perform(&Operation::Sync).unwrap();
    let tree = mounted.tree().unwrap();
    if is_unmounted {
        mounted.unmount().unwrap();
        return (device.image(), tree);
    }
    // The newest changes are in the journal alone.
    let image = device.snapshot().everything();
    drop(mounted);
    (image, tree)
}

fn known_superblock(image: &Image) -> Superblock {
    superblock::read(&*device_of(image.clone())).unwrap().superblock
}

fn destroy_superblocks(image: &mut Image) {
    for offset in copy_offsets(image.size_bytes()) {
        image.zero(offset, SUPERBLOCK_BYTES as u64);
    }
}

fn destroy_areas(image: &mut Image, superblock: &Superblock, with_journal: bool) {
    let bucket_bytes = u64::from(superblock.geometry.bucket_bytes);
    let journal = superblock.layout.journal.iter().filter(|_| with_journal);
    for area in superblock.layout.checkpoints.iter().chain(journal) {
        image.zero(area.first * bucket_bytes, area.count * bucket_bytes);
    }
}

/// All nodes above leaves, and the trees of which everything can be made anew.
fn destroy_roots(image: &mut Image) {
    let device = device_of(image.clone());
    let mut destroyed = 0;
    for node in scan_nodes(&*device, &|_| ()).unwrap().nodes {
        let header = &node.summary.header;
        let follows = [BtreeId::Subvolumes, BtreeId::Snapshots, BtreeId::Devices, BtreeId::FreeSpace];
        if header.level > 0 || follows.contains(&header.btree) {
            image.zero(node.address, u64::from(node.summary.written_bytes));
            destroyed += 1;
        }
    }
    assert!(destroyed > 4, "only {destroyed} nodes were destroyed");
}

fn options() -> RebuildOptions {
    RebuildOptions { filesystem: None, env: Env::simulated(1) }
}

fn rebuilt_with(device: &Arc<SimDevice>, options: &RebuildOptions) -> Result<(RebuildReport, Finished), Error> {
    let device: Arc<dyn BlockDevice> = Arc::clone(device) as _;
    let report = rebuild(&device, Target::InPlace, options, &|_, _| (), &mut |_| true)?;
    let finished = finish(device, Some(Env::simulated(1)), &mut |_| Ok(()))?;
    Ok((report, finished))
}

fn rebuilt(device: &Arc<SimDevice>) -> RebuildReport {
    let (report, finished) = rebuilt_with(device, &options()).unwrap();
    assert!(finished.report.is_clean(), "{:?}", finished.report.problems);
    report
}

fn shown(subject: &Coppice, device: &Arc<SimDevice>) -> Tree {
    assert_eq!(subject.check(device).unwrap(), [""; 0], "fsck -n of what was rebuilt");
    let mut mounted = subject.mount(device, 1).unwrap();
    let tree = mounted.tree().unwrap();
    mounted.unmount().unwrap();
    tree
}

fn assert_same(found: &Tree, expected: &Tree) {
    let missing: Vec<_> = expected.keys().filter(|path| !found.contains_key(*path)).take(5).collect();
    assert!(missing.is_empty(), "not there: {missing:?}");
    let more: Vec<_> = found.keys().filter(|path| !expected.contains_key(*path)).take(5).collect();
    assert!(more.is_empty(), "came back from the dead: {more:?}");
    for (path, entry) in expected {
        assert_eq!(found.get(path), Some(entry), "{path}");
    }
}

/// Rebuilds, and everything is as it was.
fn all_comes_back(name: &str, subject: &Coppice, image: Image, expected: &Tree) -> RebuildReport {
    let device = device_of(image);
    let report = rebuilt(&device);
    println!("{name}: {}", report.describe().join("; "));
    assert_same(&shown(subject, &device), expected);
    assert!(!report.is_something_lost(), "{name}: {report:?}");
    // The result is an ordinary filesystem: it takes more, and can be rebuilt again.
    let mut mounted = subject.mount(&device, 2).unwrap();
    mounted.perform(&Operation::Create { path: "/afterwards".into(), mode: 0o644 }).unwrap();
    mounted.perform(&Operation::Write { path: "/afterwards".into(), offset: 0, length: 50_000, tag: 4 }).unwrap();
    let expected = mounted.tree().unwrap();
    mounted.unmount().unwrap();
    assert_eq!(subject.check(&device).unwrap(), [""; 0]);
    let mut image = device.image();
    let superblock = known_superblock(&image);
    destroy_superblocks(&mut image);
    destroy_areas(&mut image, &superblock, false);
    let device = device_of(image);
    rebuilt(&device);
    assert_same(&shown(subject, &device), &expected);
    report
}

#[test]
fn superblocks_checkpoints_and_roots_are_destroyed() {
    let _limit = Limit::new();
    let files = count("COPPICE_REBUILD_FILES", 400);
    let is_long = files > 2000;
    let mut subject = subject();
    let mut size_bytes = 64 * MIB;
    if is_long {
        lengthen(10);
        size_bytes = files * 128 * 1024;
        subject.format.geometry.bucket_bytes = 256 << 10;
        subject.format.geometry.node_bytes = 32 << 10;
        subject.format.journal_bytes = 4 << 20;
    }
    for is_unmounted in [true, false] {
        let (image, expected) = made(&subject, size_bytes, files, is_unmounted);
        let superblock = known_superblock(&image);
        let mut destroyed = image.clone();
        destroy_superblocks(&mut destroyed);
        destroy_areas(&mut destroyed, &superblock, false);
        destroy_roots(&mut destroyed);
        let started = std::time::Instant::now();
        let device = device_of(destroyed.clone());
        let report = rebuilt(&device);
        let seconds = started.elapsed().as_secs_f64();
        let found = shown(&subject, &device);
        let is_file = |kind: &Kind| matches!(kind, Kind::File(_));
        let wanted = expected.values().filter(|entry| is_file(&entry.kind)).count();
        let back =
            expected.iter().filter(|(path, entry)| is_file(&entry.kind) && found.get(*path) == Some(*entry)).count();
        println!(
            "unmounted {is_unmounted}: {back} of {wanted} files with names and content, {:.3} %, in {seconds:.1} s; {}",
            100.0 * back as f64 / wanted as f64,
            report.describe().join("; ")
        );
        assert!(!report.superblock_found);
        assert!(report.log_keys > 0 || is_unmounted);
        if !is_long {
            all_comes_back("no superblock, checkpoint, root", &subject, destroyed, &expected);
        } else {
            assert_same(&found, &expected);
        }
    }
}

#[test]
fn the_journal_is_destroyed_too_after_an_unmount() {
    let _limit = Limit::new();
    let subject = subject();
    let (image, expected) = made(&subject, 64 * MIB, 400, true);
    let superblock = known_superblock(&image);
    let mut everything = image.clone();
    destroy_superblocks(&mut everything);
    destroy_areas(&mut everything, &superblock, true);
    destroy_roots(&mut everything);
    all_comes_back("all but leaves and data", &subject, everything, &expected);
    // Each alone, and nothing at all.
    let mut areas = image.clone();
    destroy_areas(&mut areas, &superblock, true);
    let report = all_comes_back("areas", &subject, areas, &expected);
    assert!(report.superblock_found && report.used_checkpoint.is_none());
    let mut roots = image.clone();
    destroy_roots(&mut roots);
    all_comes_back("roots", &subject, roots, &expected);
    let report = all_comes_back("nothing", &subject, image, &expected);
    assert!(report.used_checkpoint.is_some());
}

#[test]
fn a_journal_without_checkpoints_gives_the_newest_state() {
    let _limit = Limit::new();
    let subject = subject();
    let (image, expected) = made(&subject, 64 * MIB, 200, false);
    let superblock = known_superblock(&image);
    let mut areas = image.clone();
    destroy_areas(&mut areas, &superblock, false);
    let report = all_comes_back("checkpoints", &subject, areas, &expected);
    assert!(report.log_keys > 0);
    all_comes_back("nothing, after a crash", &subject, image, &expected);
}

fn write_file(device: &Arc<SimDevice>, name: &str, bytes: &[u8]) {
    const CALLER: Caller = Caller { uid: 0, gid: 0, pid: 1, umask: 0 };
    let env = Env::simulated(1);
    let options = OpenOptions { cache_bytes: 8 << 20, env: Some(env), ..OpenOptions::default() };
    let filesystem = Filesystem::open(vec![Arc::clone(device) as _], &options).unwrap();
    let vfs = filesystem.vfs();
    let (entry, opened) = vfs.create(&CALLER, 1, OsStr::new(name), 0o100_644, 2).unwrap();
    for (index, data) in bytes.chunks(128 << 10).enumerate() {
        let offset = (index * (128 << 10)) as u64;
        let request = WriteRequest::new(entry.attributes.node, opened.handle, offset, data);
        assert_eq!(vfs.write(&CALLER, &request).unwrap() as usize, data.len());
    }
    vfs.release(entry.attributes.node, opened.handle).unwrap();
    vfs.forget(entry.attributes.node, 1);
    filesystem.close().unwrap();
}

#[test]
fn an_image_in_a_file_is_data() {
    let _limit = Limit::new();
    // The inner one has the same id: a copy of the device on the device.
    let subject = Coppice::default();
    let (inner, _) = made(&subject, 12 * MIB, 30, true);
    let mut other = Coppice::default();
    other.format.uuid = uuid::Uuid::from_u128(99);
    let (foreign, _) = made(&other, 12 * MIB, 30, true);
    let (outer, _) = made(&subject, 96 * MIB, 60, true);
    let device = device_of(outer);
    write_file(&device, "copy", &inner.to_bytes().unwrap());
    write_file(&device, "another", &foreign.to_bytes().unwrap());
    let expected = shown(&subject, &device);
    let mut image = device.image();
    let superblock = known_superblock(&image);
    destroy_superblocks(&mut image);
    destroy_areas(&mut image, &superblock, true);
    destroy_roots(&mut image);
    // That has destroyed nothing of what the files hold: nodes in them lie elsewhere than they say.
    let report = all_comes_back("images in files", &subject, image, &expected);
    assert!(report.misplaced_nodes > 0, "{report:?}");
}

#[test]
fn of_two_filesystems_on_a_device_one_must_be_chosen() {
    let _limit = Limit::new();
    let mut old = Coppice::default();
    old.format.uuid = uuid::Uuid::from_u128(1);
    let (image, old_tree) = made(&old, 64 * MIB, 200, true);
    let device = device_of(image);
    let new = Coppice::default();
    new.format(&device).unwrap();
    let mut mounted = new.mount(&device, 1).unwrap();
    mounted.perform(&Operation::MakeDirectory { path: "/new".into(), mode: 0o755 }).unwrap();
    let new_tree = mounted.tree().unwrap();
    mounted.unmount().unwrap();
    let with_superblock = device.image();
    let mut image = with_superblock.clone();
    destroy_superblocks(&mut image);
    let error = rebuilt_with(&device_of(image.clone()), &options()).unwrap_err().to_string();
    for part in [old.format.uuid.to_string(), new.format.uuid.to_string(), "--filesystem-id".into()] {
        assert!(error.contains(&part), "{error}");
    }
    let chosen = RebuildOptions { filesystem: Some(new.format.uuid), ..options() };
    let device = device_of(image);
    let (_, finished) = rebuilt_with(&device, &chosen).unwrap();
    assert!(finished.report.is_clean());
    assert_same(&shown(&new, &device), &new_tree);
    // A superblock says which it is; but the older one may be wanted, as far as it is still there.
    let device = device_of(with_superblock);
    let chosen = RebuildOptions { filesystem: Some(old.format.uuid), ..options() };
    let (report, finished) = rebuilt_with(&device, &chosen).unwrap();
    assert!(finished.report.is_clean(), "{:?}", finished.report.problems);
    assert_eq!(report.filesystem, old.format.uuid.to_string());
    // The newer one has written over a leaf of extents: that is said, and a symbolic link without a target is gone.
    assert!(report.is_something_lost(), "{report:?}");
    let found = shown(&old, &device);
    let back = old_tree.iter().filter(|(path, entry)| found.get(*path) == Some(*entry)).count();
    assert!(back * 3 > old_tree.len(), "{back} of {}", old_tree.len());
}

/// Inodes, and directories, that have keys in leaves which are destroyed.
#[derive(Default)]
struct Hit {
    inodes: BTreeSet<u64>,
    directories: BTreeSet<u64>,
}

/// Destroys all copies of some leaves that the newest checkpoint leads to.
fn destroy_leaves(image: &mut Image, random: &mut Xoshiro256PlusPlus, one_in: u64) -> Hit {
    let device: Arc<dyn BlockDevice> = device_of(image.clone());
    let superblock = Arc::new(known_superblock(image));
    let reader = NodeReader::new(superblock, vec![device], Arc::new(Metrics::default()));
    let newest = reader.choose_checkpoint().unwrap().newest;
    let mut leaves = Vec::new();
    walk_published(&reader, &newest, &mut |node| {
        let counts = matches!(node.btree, BtreeId::Extents | BtreeId::Inodes | BtreeId::Dirents | BtreeId::Xattrs);
        if node.level == 0 && counts && node.minimum > Position::MIN {
            let keys: Vec<u64> = node.keys.as_ref().unwrap().iter().map(|(position, _)| position.inode).collect();
            leaves.push((node.btree, keys, node.pointer.clone()));
        }
        Ok(())
    })
    .unwrap();
    let mut hit = Hit::default();
    let mut destroyed = 0;
    while destroyed == 0 {
        for (btree, keys, pointer) in &leaves {
            if random.next_u64().is_multiple_of(one_in) {
                destroyed += 1;
                let list = if *btree == BtreeId::Dirents { &mut hit.directories } else { &mut hit.inodes };
                list.extend(keys);
                for copy in &pointer.copies {
                    image.zero(copy.offset, 4096);
                }
            }
        }
    }
    println!("{destroyed} of {} leaves are destroyed", leaves.len());
    hit
}

/// The newest image of leaves is lost, and no checkpoint or journal says so: where an older image of the whole range stands in, nothing in it shows that it is
/// older. The nodes above do.
#[test]
fn an_older_leaf_that_stands_in_is_suspected() {
    let _limit = Limit::new();
    let subject = subject();
    let (intact, _) = made(&subject, 48 * MIB, 1200, true);
    let superblock = Arc::new(known_superblock(&intact));
    let reader =
        NodeReader::new(Arc::clone(&superblock), vec![device_of(intact.clone())], Arc::new(Metrics::default()));
    let newest = reader.choose_checkpoint().unwrap().newest;
    for btree in [BtreeId::Inodes, BtreeId::Extents, BtreeId::Dirents] {
        let mut image = intact.clone();
        let mut destroyed = Vec::new();
        walk_published(&reader, &newest, &mut |node| {
            if node.level == 0 && node.btree == btree && destroyed.len() < 100 {
                destroyed.push(node.minimum.inode);
                node.pointer.copies.iter().for_each(|copy| image.zero(copy.offset, 4096));
            }
            Ok(())
        })
        .unwrap();
        destroy_areas(&mut image, &superblock, true);
        let device: Arc<dyn BlockDevice> = device_of(image);
        let report = match rebuild(&device, Target::Nothing, &options(), &|_, _| (), &mut |_| true) {
            Ok(report) => report,
            // Without an older leaf of any inode there is nothing to rebuild.
            Err(error) => {
                assert!(btree == BtreeId::Inodes && error.to_string().contains("no inode is left"), "{error}");
                continue;
            }
        };
        let inode = |position: &String| position.split(':').next().unwrap().parse::<u64>().unwrap();
        let said = report.lost_keys.iter().chain(&report.outdated_keys).chain(&report.suspect_keys);
        let said: Vec<_> = said
            .filter(|keys| keys.tree == btree.name())
            .map(|keys| (inode(&keys.from), keys.to.as_ref().map(inode)))
            .collect();
        println!(
            "{}: {} leaves destroyed: {} ranges lost, {} outdated, {} suspected",
            btree.name(),
            destroyed.len(),
            report.lost_keys.len(),
            report.outdated_keys.len(),
            report.suspect_keys.len()
        );
        for leaf in &destroyed {
            let is_said = said.iter().any(|(from, to)| from <= leaf && to.is_none_or(|to| *leaf <= to));
            assert!(is_said, "{}: nothing is said of the leaf from inode {leaf} on: {report:?}", btree.name());
        }
        assert!(report.is_something_lost());
        let others = report.suspect_keys.iter().filter(|keys| keys.tree != btree.name()).count();
        assert_eq!(others, 0, "{:?}", report.suspect_keys);
    }
}

#[test]
fn lost_leaves_cost_what_was_in_them_and_no_more() {
    let _limit = Limit::new();
    let subject = subject();
    let (image, expected) = made(&subject, 64 * MIB, 500, true);
    let superblock = known_superblock(&image);
    let seed = seed_or(1);
    let (mut said, mut all_safe) = (0, 0);
    for round in 0..4 {
        let mut random = Xoshiro256PlusPlus::seed_from_u64(seed + round);
        let mut damaged = image.clone();
        let hit = destroy_leaves(&mut damaged, &mut random, 12);
        destroy_superblocks(&mut damaged);
        destroy_areas(&mut damaged, &superblock, round % 2 == 0);
        destroy_roots(&mut damaged);
        let device = device_of(damaged);
        let (report, finished) = rebuilt_with(&device, &options()).unwrap();
        println!("round {round}, seed {seed}: {}", report.describe().join("; "));
        assert!(finished.report.is_clean(), "{:?}", finished.report.problems);
        let found = shown(&subject, &device);
        // A file is safe if none of its own keys were in a lost leaf, nor its name, nor that of a folder above it.
        let is_safe = |path: &str| {
            let mut at = Some(Path::new(path));
            let own = expected.get(path).is_some_and(|entry| !hit.inodes.contains(&entry.inode));
            let mut names = true;
            while let Some(parent) = at.and_then(Path::parent) {
                let folder = parent.to_str().and_then(|parent| expected.get(parent));
                names &= folder.is_some_and(|folder| {
                    !hit.directories.contains(&folder.inode) && !hit.inodes.contains(&folder.inode)
                });
                at = Some(parent);
            }
            own && names
        };
        let mut safe = 0;
        for (path, entry) in expected.iter().filter(|(path, _)| is_safe(path)) {
            safe += 1;
            let same = found.get(path);
            let is_same = match &entry.kind {
                // Links and sizes of a folder follow from what is left in it; so do links of a file.
                Kind::Directory => same.is_some_and(|same| same.kind == Kind::Directory && same.mode == entry.mode),
                kind => same.is_some_and(|same| same.kind == *kind && same.xattrs == entry.xattrs),
            };
            assert!(is_same, "round {round}, seed {seed}: {path} is {same:?}, was {entry:?}");
        }
        all_safe += safe;
        // What lost its name is in lost+found; whoever is there under its name shows no other file's bytes.
        let known: BTreeMap<u64, &Kind> = expected.values().map(|entry| (entry.inode, &entry.kind)).collect();
        let mut nameless = 0;
        for (path, entry) in found.iter().filter(|(path, _)| path.starts_with("/lost+found/#")) {
            let name = path.trim_start_matches("/lost+found/#").split('/').next().unwrap_or_default();
            nameless += 1;
            if let (Kind::File(bytes), Some(Kind::File(before)), false) =
                (&entry.kind, known.get(&entry.inode), hit.inodes.contains(&entry.inode))
            {
                assert!(bytes == before, "round {round}, seed {seed}: #{name}");
            }
        }
        let lost_names = expected.keys().filter(|path| !found.contains_key(*path)).count();
        println!("round {round}: {safe} paths safe, {lost_names} names lost, {nameless} in lost+found");
        said += u64::from(report.is_something_lost());
    }
    // An older image of a lost leaf may cover all of it.
    assert!(said > 0, "nothing was said to be lost in any round");
    assert!(all_safe > expected.len(), "only {all_safe} paths were safe in all rounds together");
}

#[test]
fn a_rebuild_that_is_cut_off_can_be_started_again() {
    let _limit = Limit::new();
    let is_long = std::env::var_os("COPPICE_CRASH_LONG").is_some_and(|value| value != "0");
    if is_long {
        lengthen(20);
    }
    let seed = seed_or(1);
    let subject = subject();
    let (image, expected) = made(&subject, 16 * MIB, 60, false);
    let superblock = known_superblock(&image);
    let mut lost = image.clone();
    destroy_superblocks(&mut lost);
    destroy_areas(&mut lost, &superblock, false);
    let mut known = image;
    destroy_areas(&mut known, &superblock, false);
    for (name, image) in [("superblocks lost", lost), ("superblocks known", known)] {
        let device = device_of(image);
        let snapshots: Arc<Mutex<Vec<Snapshot>>> = Arc::default();
        let seen = Arc::clone(&snapshots);
        device.set_hook(move |device, _| seen.lock().unwrap_or_else(PoisonError::into_inner).push(device.snapshot()));
        rebuilt(&device);
        device.clear_hook();
        assert_same(&shown(&subject, &device), &expected);
        let snapshots = std::mem::take(&mut *snapshots.lock().unwrap_or_else(PoisonError::into_inner));
        let mut images = BTreeSet::new();
        let (mut second, mut opened) = (0, 0);
        let step = if is_long { 1 } else { (snapshots.len() / 24).max(1) };
        for snapshot in snapshots.iter().step_by(step) {
            let limit = if is_long { 16 } else { 2 };
            let plans = PlanOptions { limit: Some(limit), seed: seed ^ snapshot.boundary(), ..PlanOptions::default() };
            for plan in snapshot.plans(&plans) {
                let image = snapshot.crash(&plan);
                if !images.insert(image.content_hash()) {
                    continue;
                }
                let device = device_of(image);
                let at = format!("{name}: cut at boundary {}, {:?}, seed {seed}", snapshot.boundary(), plan.survivors);
                let (report, finished) =
                    rebuilt_with(&device, &options()).unwrap_or_else(|error| panic!("{at}: {error}"));
                assert!(finished.report.is_clean(), "{at}: {:?}", finished.report.problems);
                assert!(!report.is_something_lost(), "{at}: {report:?}");
                second += u64::from(report.was_cut_off);
                opened += u64::from(report.used_checkpoint.is_some());
                let found = shown(&subject, &device);
                let differing = expected.iter().find(|(path, entry)| found.get(*path) != Some(*entry));
                assert!(found == expected, "{at}: shows something else, first {differing:?}");
            }
        }
        println!(
            "{name}: {} boundaries, {} images, {second} marked, {opened} published",
            snapshots.len(),
            images.len()
        );
        assert!(images.len() > 20 && second > 0 && opened > 0, "{} images, {second}, {opened}", images.len());
    }
}

#[test]
fn only_looking_writes_nothing_and_an_output_leaves_the_image_alone() {
    let _limit = Limit::new();
    let subject = subject();
    let (mut image, expected) = made(&subject, 64 * MIB, 100, true);
    destroy_superblocks(&mut image);
    let device = device_of(image);
    let before = device.image().content_hash();
    let as_device: Arc<dyn BlockDevice> = Arc::clone(&device) as _;
    let report = rebuild(&as_device, Target::Nothing, &options(), &|_, _| (), &mut |_| true).unwrap();
    assert!(!report.is_written && report.regular_files > 50, "{report:?}");
    let report = rebuild(&as_device, Target::InPlace, &options(), &|_, _| (), &mut |_| false).unwrap();
    assert!(!report.is_written);
    let other = device_of(Image::new(64 * MIB));
    let as_other: Arc<dyn BlockDevice> = Arc::clone(&other) as _;
    let report = rebuild(&as_device, Target::Other(&as_other), &options(), &|_, _| (), &mut |_| true).unwrap();
    assert!(report.is_written);
    assert!(finish(as_other, Some(Env::simulated(1)), &mut |_| Ok(())).unwrap().report.is_clean());
    assert_eq!(device.image().content_hash(), before, "the damaged image was written to");
    assert_same(&shown(&subject, &other), &expected);
}

/// Whatever is on the device: an answer, no panic, no hang; and what is rebuilt is clean.
#[test]
fn random_damage_is_answered() {
    let _limit = Limit::new();
    let subject = subject();
    let (image, _) = made(&subject, 16 * MIB, 60, false);
    let seed = seed_or(1);
    let (mut refused, mut clean) = (0, 0);
    for round in 0..count("COPPICE_FUZZ_IMAGES", 30) {
        let mut random = Xoshiro256PlusPlus::seed_from_u64(seed.wrapping_add(round));
        let mut damaged = image.clone();
        if round % 2 == 0 {
            destroy_superblocks(&mut damaged);
        }
        let nodes = scan_nodes(&*device_of(image.clone()), &|_| ()).unwrap().nodes;
        for _ in 0..1 + random.next_u64() % 64 {
            // Half of it where nodes are.
            let offset = match random.next_u64() % 2 {
                0 => nodes[(random.next_u64() % nodes.len() as u64) as usize].address + random.next_u64() % 8192,
                _ => random.next_u64() % (16 * MIB),
            };
            let byte = [random.next_u64() as u8];
            match random.next_u64() % 3 {
                0 => damaged.write(offset.min(16 * MIB - 1), &byte),
                1 => damaged.zero(offset / 512 * 512, 512),
                _ => damaged.write(offset / 512 * 512, &[byte[0]; 512]),
            }
        }
        match rebuilt_with(&device_of(damaged), &options()) {
            Ok((_, finished)) => {
                clean += 1;
                assert!(finished.report.is_clean(), "seed {seed}, round {round}: {:?}", finished.report.problems);
            }
            Err(Error::Unusable(_)) => refused += 1,
            Err(error) => panic!("seed {seed}, round {round}: {error}"),
        }
    }
    println!("{clean} rebuilt, {refused} refused");
    assert!(clean > 0);
    for bytes in [0, 4096, MIB, 20 * MIB] {
        let error = rebuilt_with(&device_of(Image::new(bytes)), &options()).unwrap_err();
        assert!(matches!(error, Error::Unusable(_)), "{bytes}: {error}");
    }
}

#[test]
fn the_program_asks_reports_and_rebuilds() {
    let _limit = Limit::new();
    let subject = subject();
    let (mut image, expected) = made(&subject, 64 * MIB, 60, true);
    destroy_superblocks(&mut image);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    image.to_file(&path).unwrap();
    let fsck = |words: &[&str]| {
        let mut command = Command::new(program());
        command.arg("fsck").args(words).arg(&path);
        let output = limit::finish(&mut command).unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
    };
    let (code, _, _) = fsck(&["-n"]);
    assert_eq!(code, 8);
    let (code, _, stderr) = fsck(&["--rebuild"]);
    assert!(code == 8 && stderr.contains("-y"), "{code}: {stderr}");
    let before = std::fs::read(&path).unwrap();
    let (code, stdout, stderr) = fsck(&["-n", "--rebuild", "--json"]);
    assert_eq!(code, 4, "{stderr}");
    let json: serde_json::Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(json["superblock_found"], false);
    assert!(json["regular_files"].as_u64().unwrap() > 30, "{stdout}");
    assert!(std::fs::read(&path).unwrap() == before, "-n has written");
    let output = folder.path().join("output");
    let (code, _, stderr) = fsck(&["-y", "--rebuild", "--output", output.to_str().unwrap()]);
    assert_eq!(code, 1, "{stderr}");
    assert!(std::fs::read(&path).unwrap() == before, "--output has written to the damaged image");
    let (code, stdout, stderr) = fsck(&["-y", "--rebuild"]);
    assert!(code == 1 && stdout.contains("now clean"), "{code}: {stdout}{stderr}");
    assert_eq!(fsck(&["-n"]).0, 0);
    for path in [&path, &output] {
        let device = device_of(Image::from_file(path).unwrap());
        assert_same(&shown(&subject, &device), &expected);
    }
}
