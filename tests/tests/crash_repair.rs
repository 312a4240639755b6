//! Power cuts during fsck's repair: whatever is on the medium then, a second repair makes it clean, and it shows what an undisturbed repair
//! would have left.
//!
//! `COPPICE_SEED=n` sets the seed; `COPPICE_CRASH_LONG=1` tries many more plans at each write of the repair.

use std::sync::{Arc, Mutex, PoisonError};

use coppicefs::Result;
use coppicefs::btree::{NodeReader, walk_published};
use coppicefs::device::{Image, PlanOptions, SimDevice, SimOptions, Snapshot};
use coppicefs::env::Env;
use coppicefs::filesystem::{Filesystem, OpenOptions, WorkerSet};
use coppicefs::format::checkpoint::{Checkpoint, MAP_PAGE_BYTES, RECORD_SLOT_BYTES, RECORD_SLOTS};
use coppicefs::format::extent::{DataExtent, ExtentValue};
use coppicefs::format::journal::AccountingCounter;
use coppicefs::format::namespace::{DirentBucket, Inode};
use coppicefs::format::node::NodePointer;
use coppicefs::format::space::{Bucket, BucketState};
use coppicefs::format::superblock::copy_offsets;
use coppicefs::format::{BtreeId, Position};
use coppicefs::metrics::Metrics;
use coppicefs::transaction::{CommitOptions, Transaction};
use coppicefs_fsck::repair::map::lost_map;
use coppicefs_fsck::session::repair_all;
use coppicefs_tests::crash::{Subject, seed_or};
use coppicefs_tests::filesystem_subject::Coppice;
use coppicefs_tests::limit::{Limit, lengthen};
use coppicefs_tests::operation::Operation;
use coppicefs_tests::tree::Tree;

const DEVICE_BYTES: u64 = 16 << 20;
const SNAPSHOT: u32 = u32::MAX;

fn is_long() -> bool {
    std::env::var_os("COPPICE_CRASH_LONG").is_some_and(|value| value != "0")
}

fn device_of(image: Image, seed: u64) -> Arc<SimDevice> {
    Arc::new(SimDevice::from_image(image, SimOptions { seed, block_bytes: 4096, ..SimOptions::default() }))
}

fn open(device: &Arc<SimDevice>, seed: u64) -> Arc<Filesystem> {
    let env = Env::simulated(seed);
    let options =
        OpenOptions { workers: WorkerSet::Essential, cache_bytes: 8 << 20, env: Some(env), ..OpenOptions::default() };
    Filesystem::open(vec![Arc::clone(device) as _], &options).unwrap()
}

/// Directories, files of all sizes, links, attributes.
fn made(subject: &Coppice) -> Image {
    let device = Arc::new(SimDevice::new(DEVICE_BYTES, SimOptions { block_bytes: 4096, ..SimOptions::default() }));
    subject.format(&device).unwrap();
    let mut mounted = subject.mount(&device, 1).unwrap();
    let mut operations = Vec::new();
    for folder in 0..3 {
        let path = format!("/d{folder}");
        operations.push(Operation::MakeDirectory { path: path.clone(), mode: 0o755 });
        for file in 0..6_u32 {
            let path = format!("{path}/f{file}");
            operations.extend([
                Operation::Create { path: path.clone(), mode: 0o644 },
                Operation::Write { path: path.clone(), offset: 0, length: 1 + u64::from(file) * 9000, tag: file + 1 },
                Operation::SetXattr { path: path.clone(), name: "user.a".into(), value: "1".into() },
            ]);
            if file == 3 {
                operations.push(Operation::Link { existing: path, path: format!("/link{folder}") });
            }
        }
    }
    for operation in &operations {
        mounted.perform(operation).unwrap();
    }
    mounted.unmount().unwrap();
    device.image()
}

/// As `fsck -y` does it.
fn repaired(device: &Arc<SimDevice>, seed: u64) -> Result<()> {
    let options = OpenOptions { cache_bytes: 8 << 20, env: Some(Env::simulated(seed)), ..OpenOptions::default() };
    let outcome = repair_all(&[Arc::clone(device) as _], &options)?;
    assert!(outcome.left.is_empty(), "left after a repair: {:?}", outcome.left);
    Ok(())
}

/// What the repair has made of the keys of users, but for what is made by chance or the clock.
fn keys(device: &Arc<SimDevice>) -> Vec<(BtreeId, Position, Vec<u8>)> {
    let options = OpenOptions { read_only: true, cache_bytes: 8 << 20, ..OpenOptions::default() };
    let options = OpenOptions { workers: WorkerSet::Essential, env: Some(Env::simulated(1)), ..options };
    let filesystem = Filesystem::open(vec![Arc::clone(device) as _], &options).unwrap();
    let mut all = Vec::new();
    for btree in [BtreeId::Extents, BtreeId::Inodes, BtreeId::Dirents, BtreeId::Xattrs] {
        for (position, value) in
            filesystem.transactions().read().range(btree, Position::MIN, Position::MAX, usize::MAX).unwrap()
        {
            let value = if btree == BtreeId::Inodes {
                let inode = Inode::decode(&value).unwrap();
                let Inode { mode, link_count, size, allocated_bytes, parent, parent_hash, .. } = inode;
                format!("{mode:o} {link_count} {size} {allocated_bytes} {parent} {parent_hash}").into_bytes()
            } else {
                value.to_vec()
            };
            all.push((btree, position, value));
        }
    }
    filesystem.close().unwrap();
    all
}

fn shown(subject: &Coppice, device: &Arc<SimDevice>) -> Tree {
    let mut mounted = subject.mount(device, 1).unwrap();
    // Not where data is lost: that is an error.
    let tree = mounted.tree().unwrap_or_default();
    mounted.unmount().unwrap();
    tree
}

/// What a check finds; `None` if it takes a repair of the node-space map first.
fn checked(subject: &Coppice, device: &Arc<SimDevice>) -> Option<Vec<String>> {
    match subject.check(device) {
        Ok(found) => Some(found),
        Err(error) => {
            let lost = lost_map(&[Arc::clone(device) as _]).unwrap();
            assert!(lost.is_some(), "the check fails: {error}");
            None
        }
    }
}

/// Repairs the damaged image once undisturbed, and then again from everything that a power cut in the middle could have left.
fn survives(name: &str, subject: &Coppice, damaged: &Image) -> usize {
    let _limit = Limit::new();
    let seed = seed_or(1);
    let device = device_of(damaged.clone(), seed);
    assert!(checked(subject, &device).is_none_or(|found| !found.is_empty()), "{name}: nothing is wrong with it");
    let snapshots: Arc<Mutex<Vec<Snapshot>>> = Arc::default();
    let seen = Arc::clone(&snapshots);
    device.set_hook(move |device, _| seen.lock().unwrap_or_else(PoisonError::into_inner).push(device.snapshot()));
    repaired(&device, seed).unwrap();
    device.clear_hook();
    assert_eq!(subject.check(&device).unwrap(), [""; 0], "{name}: undisturbed");
    let expected_keys = keys(&device);
    let expected = shown(subject, &device);
    let snapshots = std::mem::take(&mut *snapshots.lock().unwrap_or_else(PoisonError::into_inner));
    let limit = if is_long() { 64 } else { 4 };
    let mut images = std::collections::BTreeSet::new();
    for snapshot in &snapshots {
        let plans = PlanOptions { limit: Some(limit), seed: seed ^ snapshot.boundary(), ..PlanOptions::default() };
        for plan in snapshot.plans(&plans) {
            let image = snapshot.crash(&plan);
            if !images.insert(image.content_hash()) {
                continue;
            }
            let at = format!(
                "{name}: cut at boundary {} of the repair, {:?}, seed {seed}",
                snapshot.boundary(),
                plan.survivors
            );
            let device = device_of(image, seed);
            // A check of what the cut left may find anything, but changes nothing.
            let before = device.image().content_hash();
            checked(subject, &device);
            assert_eq!(device.image().content_hash(), before, "{at}: the check changed the image");
            repaired(&device, seed).unwrap_or_else(|error| panic!("{at}: {error}"));
            assert_eq!(subject.check(&device).unwrap(), [""; 0], "{at}");
            assert!(keys(&device) == expected_keys, "{at}: other keys than an undisturbed repair leaves");
            let tree = shown(subject, &device);
            let differing = expected.iter().find(|(path, entry)| tree.get(*path) != Some(*entry)).map(|(path, _)| path);
            assert!(tree == expected, "{at}: shows something else, first at {differing:?}");
        }
    }
    println!("{name}: {} boundaries, {} different images", snapshots.len(), images.len());
    images.len()
}

/// Damages the image by a transaction, past everything that keeps its structures right.
fn damaged(image: &Image, change: impl Fn(&mut Transaction<'_>) -> Result<()>) -> Image {
    let device = device_of(image.clone(), 1);
    let filesystem = open(&device, 1);
    let options = CommitOptions { raw: true, ..CommitOptions::default() };
    filesystem.transactions().run(options, |transaction| change(transaction)).unwrap();
    filesystem.close().unwrap();
    device.image()
}

/// The regular files that hold more than a few bytes.
fn files(transaction: &mut Transaction<'_>) -> Result<Vec<(Position, Inode)>> {
    let keys = transaction.range(BtreeId::Inodes, Position::MIN, Position::MAX, 100)?;
    let found = keys.into_iter().map(|(position, value)| (position, Inode::decode(&value).unwrap()));
    Ok(found.filter(|(_, inode)| inode.mode & 0o170_000 == 0o100_000 && inode.size > 10_000).collect())
}

fn dirent_of(inode: &Inode) -> Position {
    Position::new(inode.parent, inode.parent_hash, SNAPSHOT)
}

/// The map in every record and copy, and with it something that is repaired after it.
#[test]
fn a_lost_map() {
    if is_long() {
        lengthen(10);
    }
    let subject = Coppice::default();
    let mut image = damaged(&made(&subject), |transaction| {
        for (position, mut inode) in files(transaction)?.into_iter().take(1) {
            inode.link_count += 3;
            transaction.put(BtreeId::Inodes, position, inode.encode()?);
        }
        Ok(())
    });
    let mut without_roots = image.clone();
    destroy_maps(&mut image);
    assert!(survives("a lost map", &subject, &image) > 10);
    destroy_roots(&mut without_roots, &[BtreeId::Snapshots, BtreeId::Buckets, BtreeId::FreeSpace]);
    assert!(survives("lost roots of trees that follow from others", &subject, &without_roots) > 10);
}

/// Destroys the roots of some trees in every checkpoint that still has them.
fn destroy_roots(image: &mut Image, trees: &[BtreeId]) {
    let device = device_of(image.clone(), 1);
    let superblock = Arc::new(coppicefs::recovery::superblock::read(&*device).unwrap().superblock);
    let reader = NodeReader::new(superblock, vec![device as _], Arc::new(Metrics::default()));
    for record in reader.checkpoints() {
        for root in record.roots.iter().filter(|root| trees.iter().any(|tree| *tree as u8 == root.btree)) {
            let alone = Checkpoint { roots: vec![root.clone()], map: Vec::new(), ..record.clone() };
            if reader.verify(&alone).is_ok() {
                let pointer = NodePointer::decode(&root.pointer).unwrap();
                pointer.copies.iter().for_each(|copy| image.write(copy.offset, &[0x5a; 4096]));
            }
        }
    }
}

/// Destroys the pages of all maps that a record names.
fn destroy_maps(image: &mut Image) {
    let device = device_of(image.clone(), 1);
    let superblock = Arc::new(coppicefs::recovery::superblock::read(&*device).unwrap().superblock);
    let reader = NodeReader::new(Arc::clone(&superblock), vec![device as _], Arc::new(Metrics::default()));
    for record in reader.checkpoints() {
        for page in &record.map {
            for area in &superblock.layout.checkpoints {
                let start = area.first * u64::from(superblock.geometry.bucket_bytes);
                let place = u64::from(page.place) * MAP_PAGE_BYTES as u64;
                image.write(start + RECORD_SLOTS * RECORD_SLOT_BYTES as u64 + place, &[0x5a; MAP_PAGE_BYTES]);
            }
        }
    }
}

#[test]
fn names_and_counts() {
    if is_long() {
        lengthen(10);
    }
    let subject = Coppice::default();
    let image = made(&subject);
    let counts = damaged(&image, |transaction| {
        for (position, mut inode) in files(transaction)?.into_iter().take(3) {
            inode.link_count += 3;
            inode.allocated_bytes += 4096;
            transaction.put(BtreeId::Inodes, position, inode.encode()?);
        }
        Ok(())
    });
    let nameless = damaged(&image, |transaction| {
        for (_, inode) in files(transaction)?.iter().take(3) {
            transaction.delete(BtreeId::Dirents, dirent_of(inode));
        }
        Ok(())
    });
    let folder = damaged(&image, |transaction| {
        let keys = transaction.range(BtreeId::Inodes, Position::new(2, 0, SNAPSHOT), Position::MAX, 100)?;
        let inodes = keys.into_iter().map(|(_, value)| Inode::decode(&value).unwrap());
        let folder = inodes.into_iter().find(|inode| inode.mode & 0o170_000 == 0o040_000).expect("a directory");
        transaction.delete(BtreeId::Dirents, dirent_of(&folder));
        Ok(())
    });
    let dangling = damaged(&image, |transaction| {
        for (_, inode) in files(transaction)?.iter().take(2) {
            let value = transaction.get(BtreeId::Dirents, dirent_of(inode))?.expect("its entry");
            let mut bucket = DirentBucket::decode(&value)?;
            bucket.0[0].inode = coppicefs::units::InodeNumber(123_456);
            transaction.put(BtreeId::Dirents, dirent_of(inode), bucket.encode());
        }
        Ok(())
    });
    let orphans = damaged(&image, |transaction| {
        let files = files(transaction)?;
        transaction.put(BtreeId::Orphans, Position::new(0, files[0].0.inode, SNAPSHOT), Vec::new());
        transaction.put(BtreeId::Orphans, Position::new(0, 4711, SNAPSHOT), Vec::new());
        Ok(())
    });
    let mut images = 0;
    for (name, damaged) in [
        ("link counts", &counts),
        ("files without names", &nameless),
        ("a directory without a name", &folder),
        ("names of nothing", &dangling),
        ("orphans", &orphans),
    ] {
        images += survives(name, &subject, damaged);
    }
    assert!(images > 50, "only {images} different images");
}

#[test]
fn space() {
    if is_long() {
        lengthen(10);
    }
    let subject = Coppice::default();
    let image = made(&subject);
    let buckets = damaged(&image, |transaction| {
        let keys = transaction.range(BtreeId::Buckets, Position::MIN, Position::MAX, 1000)?;
        let decoded = keys.into_iter().map(|(position, value)| (position, Bucket::decode(&value).unwrap()));
        for (position, mut bucket) in decoded.filter(|(_, bucket)| bucket.state == BucketState::Data).take(2) {
            bucket.charged_bytes += 4096;
            transaction.put(BtreeId::Buckets, position, bucket.encode());
            transaction.put(BtreeId::NeedDiscard, position, Vec::new());
        }
        transaction.account(AccountingCounter::DataBytes, 12_288);
        transaction.account(AccountingCounter::Inodes, -1);
        Ok(())
    });
    let backpointers = damaged(&image, |transaction| {
        let keys = transaction.range(BtreeId::Backpointers, Position::MIN, Position::MAX, 3)?;
        for (position, value) in keys {
            transaction.delete(BtreeId::Backpointers, position);
            let beside = Position { offset: position.offset + 5, ..position };
            transaction.put(BtreeId::Backpointers, beside, value.to_vec());
        }
        Ok(())
    });
    let mut images = 0;
    for (name, damaged) in [("buckets and counters", &buckets), ("backpointers", &backpointers)] {
        images += survives(name, &subject, damaged);
    }
    assert!(images > 20, "only {images} different images");
}

/// Bytes on the medium: a copy of the superblock, a copy of a node.
#[test]
fn copies() {
    if is_long() {
        lengthen(10);
    }
    let subject = Coppice::default();
    let image = made(&subject);
    let mut superblock = image.clone();
    superblock.write(copy_offsets(DEVICE_BYTES)[1], &[0xff; 4096]);
    let device = device_of(image.clone(), 1);
    let filesystem = open(&device, 1);
    let roots = &filesystem.opening().newest.roots;
    let root = roots.iter().find(|root| root.btree == BtreeId::Inodes as u8).expect("inodes");
    let pointer = coppicefs::format::node::NodePointer::decode(&root.pointer).unwrap();
    filesystem.close().unwrap();
    let mut node = image.clone();
    node.write(pointer.copies[0].offset, &[0; 4096]);
    for (name, damaged) in [("a copy of the superblock", &superblock), ("a copy of a node", &node)] {
        survives(name, &subject, damaged);
    }
}

/// The first extent of a file, which is in a bucket.
fn extent_of(transaction: &mut Transaction<'_>, file: &Position) -> Result<(Position, DataExtent)> {
    let (from, to) = (Position::new(file.inode, 0, 0), Position::new(file.inode, u64::MAX, u32::MAX));
    let (position, value) = transaction.next(BtreeId::Extents, from, to)?.expect("an extent");
    match ExtentValue::decode(&value)? {
        ExtentValue::Data(data) => Ok((position, data)),
        other => panic!("{position} is {other:?}"),
    }
}

/// What is contradictory, or means nothing.
#[test]
fn contradictions() {
    if is_long() {
        lengthen(10);
    }
    let subject = Coppice::default();
    let image = made(&subject);
    let undecodable = damaged(&image, |transaction| {
        let files = files(transaction)?;
        let (position, _) = extent_of(transaction, &files[0].0)?;
        transaction.put(BtreeId::Extents, position, vec![0xee; 7]);
        transaction.put(BtreeId::Dirents, dirent_of(&files[1].1), vec![0xee; 7]);
        Ok(())
    });
    let inodes_gone = damaged(&image, |transaction| {
        for (position, _) in files(transaction)?.into_iter().take(2) {
            transaction.delete(BtreeId::Inodes, position);
        }
        Ok(())
    });
    let folder_gone = damaged(&image, |transaction| {
        let folder = files(transaction)?[0].1.parent;
        transaction.delete(BtreeId::Inodes, Position::new(folder, 0, SNAPSHOT));
        Ok(())
    });
    let root_gone = damaged(&image, |transaction| {
        transaction.delete(BtreeId::Inodes, Position::new(1, 0, SNAPSHOT));
        Ok(())
    });
    let stale = damaged(&image, |transaction| {
        for (number, (file, _)) in files(transaction)?.iter().take(2).enumerate() {
            let (position, mut data) = extent_of(transaction, file)?;
            data.pointers[0].generation += 1;
            // Of one the data is there, of the other not.
            data.checksums.iter_mut().for_each(|checksum| *checksum ^= number as u64);
            transaction.put(BtreeId::Extents, position, ExtentValue::Data(data).encode());
        }
        Ok(())
    });
    let shared = damaged(&image, |transaction| {
        let files = files(transaction)?;
        let (position, mut data) = extent_of(transaction, &files[0].0)?;
        data.pointers[0] = extent_of(transaction, &files[1].0)?.1.pointers[0];
        transaction.put(BtreeId::Extents, position, ExtentValue::Data(data).encode());
        Ok(())
    });
    let elsewhere = damaged(&image, |transaction| {
        let files = files(transaction)?;
        let (position, mut data) = extent_of(transaction, &files[0].0)?;
        data.pointers[0].offset = 1 << 40;
        transaction.put(BtreeId::Extents, position, ExtentValue::Data(data).encode());
        let at = dirent_of(&files[1].1);
        let value = transaction.get(BtreeId::Dirents, at)?.expect("its entry").to_vec();
        transaction.delete(BtreeId::Dirents, at);
        transaction.put(BtreeId::Dirents, Position { offset: at.offset ^ 1, ..at }, value);
        Ok(())
    });
    let mut images = 0;
    for (name, damaged) in [
        ("keys that mean nothing", &undecodable),
        ("files without inodes", &inodes_gone),
        ("a directory without an inode", &folder_gone),
        ("no root", &root_gone),
        ("stale pointers", &stale),
        ("shared space", &shared),
        ("a pointer to nowhere, a name elsewhere", &elsewhere),
    ] {
        images += survives(name, &subject, damaged);
    }
    assert!(images > 50, "only {images} different images");
}

/// A leaf of which no copy is left, for each tree that has several.
#[test]
fn lost_leaves() {
    if is_long() {
        lengthen(10);
    }
    let subject = Coppice::default();
    let device = device_of(made(&subject), 1);
    let mut mounted = subject.mount(&device, 1).unwrap();
    for file in 0..400_u32 {
        let path = format!("/d0/more with a long name {file}");
        mounted.perform(&Operation::Create { path: path.clone(), mode: 0o644 }).unwrap();
        mounted.perform(&Operation::Write { path, offset: 0, length: 5000, tag: file + 1 }).unwrap();
    }
    mounted.unmount().unwrap();
    let image = device.image();
    let filesystem = open(&device, 1);
    let superblock = Arc::new(filesystem.superblock().clone());
    let reader = NodeReader::new(superblock, filesystem.devices().to_vec(), Arc::new(Metrics::default()));
    let mut leaves = std::collections::BTreeMap::new();
    walk_published(&reader, &filesystem.opening().newest, &mut |node| {
        if node.level == 0 && node.minimum > Position::MIN {
            leaves.entry(node.btree).or_insert_with(|| node.pointer.copies.clone());
        }
        Ok(())
    })
    .unwrap();
    filesystem.close().unwrap();
    assert!(leaves.len() >= 3, "trees with several leaves: {:?}", leaves.keys());
    for (btree, copies) in leaves {
        let mut damaged = image.clone();
        for copy in copies {
            damaged.write(copy.offset, &[0; 4096]);
        }
        survives(&format!("a leaf of {}", btree.name()), &subject, &damaged);
    }
}
