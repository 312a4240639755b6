//! Each kind of inconsistency that can be repaired, made through the real code, found, repaired in a first run, and gone in a second.

use std::ffi::OsStr;
use std::sync::Arc;

use coppicefs::Result;
use coppicefs::device::{BlockDevice, MemDevice};
use coppicefs::env::Env;
use coppicefs::filesystem::format::test_geometry;
use coppicefs::filesystem::{Filesystem, OpenOptions, WorkerSet};
use coppicefs::format::journal::AccountingCounter;
use coppicefs::format::namespace::{DirentBucket, Inode};
use coppicefs::format::space::{Bucket, BucketState, FreeBucket};
use coppicefs::format::superblock::copy_offsets;
use coppicefs::format::{BtreeId, Position};
use coppicefs::transaction::{CommitOptions, Transaction};
use coppicefs::vfs::{Caller, Lookup, WriteRequest};
use coppicefs_fsck::{Problem, Report, check, repair};

const CALLER: Caller = Caller { uid: 0, gid: 0, pid: 1, umask: 0o022 };
const ROOT: u64 = 1;
const SNAPSHOT: u32 = u32::MAX;

/// A small tree: directories, files with data in buckets and inline, a hard link, an attribute.
fn made() -> Arc<dyn BlockDevice> {
    let env = Env::real();
    let device: Arc<dyn BlockDevice> = Arc::new(MemDevice::new(64 << 20));
    Filesystem::format(&device, &test_geometry(), &env).unwrap();
    let filesystem = open(&device, WorkerSet::All);
    let vfs = filesystem.vfs();
    let directory = vfs.mkdir(&CALLER, ROOT, OsStr::new("directory"), 0o755).unwrap().attributes.node;
    for index in 0..20_u64 {
        let name = format!("file {index}");
        let (entry, opened) = vfs.create(&CALLER, directory, OsStr::new(&name), 0o644, 2).unwrap();
        let node = entry.attributes.node;
        let data = vec![index as u8 + 1; 100 + 5000 * index as usize];
        let request = WriteRequest {
            node,
            handle: opened.handle,
            offset: 0,
            data: &data,
            direct: false,
            append: false,
            synchronous: false,
            from_page_cache: false,
            clear_set_id: false,
        };
        assert_eq!(vfs.write(&CALLER, &request).unwrap() as usize, data.len());
        vfs.set_xattr(&CALLER, node, OsStr::new("user.number"), b"1", 0).unwrap();
        vfs.release(node, opened.handle).unwrap();
    }
    let Lookup::Found(first) = vfs.lookup(&CALLER, directory, OsStr::new("file 0")).unwrap() else { panic!("file 0") };
    vfs.link(&CALLER, first.attributes.node, ROOT, OsStr::new("hard link")).unwrap();
    filesystem.close().unwrap();
    device
}

fn open(device: &Arc<dyn BlockDevice>, workers: WorkerSet) -> Arc<Filesystem> {
    let options = OpenOptions { workers, cache_bytes: 16 << 20, ..OpenOptions::default() };
    Filesystem::open(vec![Arc::clone(device)], &options).unwrap()
}

fn found(filesystem: &Filesystem) -> Report {
    check(filesystem, &|_, _, _, _| {}).unwrap()
}

fn damage(filesystem: &Filesystem, change: impl Fn(&mut Transaction<'_>) -> Result<()>) {
    let options = CommitOptions { raw: true, ..CommitOptions::default() };
    filesystem.transactions().run(options, |transaction| change(transaction)).unwrap();
}

/// Damages a fresh filesystem, and proves: found under this id, repaired, then nothing is found, also after a close.
fn proves(id: &str, change: impl Fn(&mut Transaction<'_>) -> Result<()>) {
    let device = made();
    let filesystem = open(&device, WorkerSet::Essential);
    assert!(found(&filesystem).is_clean(), "{id}: clean before the damage: {:?}", found(&filesystem).problems);
    damage(&filesystem, change);
    let report = found(&filesystem);
    assert!(report.problems.iter().any(|problem| problem.id() == id), "{id} not among {:?}", report.problems);
    let mut problems = report.problems;
    for _ in 0..4 {
        if problems.is_empty() {
            break;
        }
        assert!(problems.iter().all(Problem::is_repairable), "{id}: {problems:?}");
        assert!(repair::repair(&filesystem, &problems).unwrap() > 0);
        problems = found(&filesystem).problems;
    }
    assert!(problems.is_empty(), "{id}: left after repairs: {problems:?}");
    filesystem.close().unwrap();
    drop(filesystem);
    let filesystem = open(&device, WorkerSet::Essential);
    assert!(found(&filesystem).is_clean(), "{id}: clean after a close");
    filesystem.close().unwrap();
}

fn inode_position(inode: u64) -> Position {
    Position::new(inode, 0, SNAPSHOT)
}

fn first(transaction: &mut Transaction<'_>, btree: BtreeId) -> Result<(Position, Arc<[u8]>)> {
    Ok(transaction.next(btree, Position::MIN, Position::MAX)?.expect("a key"))
}

/// The first file of the directory: names, data, an attribute.
fn some_file(transaction: &mut Transaction<'_>) -> Result<(Position, Inode)> {
    let keys = transaction.range(BtreeId::Inodes, Position::MIN, Position::MAX, 100)?;
    let found = keys.into_iter().map(|(position, value)| (position, Inode::decode(&value).unwrap()));
    Ok(found.into_iter().find(|(_, inode)| inode.mode & 0o170_000 == 0o100_000 && inode.size > 10_000).expect("a file"))
}

#[test]
fn link_count() {
    proves("link-count", |transaction| {
        let (position, mut inode) = some_file(transaction)?;
        inode.link_count = 7;
        transaction.put(BtreeId::Inodes, position, inode.encode()?);
        Ok(())
    });
}

#[test]
fn allocated_bytes() {
    proves("inode-allocated", |transaction| {
        let (position, mut inode) = some_file(transaction)?;
        inode.allocated_bytes += 4096;
        transaction.put(BtreeId::Inodes, position, inode.encode()?);
        Ok(())
    });
}

#[test]
fn directory_size() {
    proves("directory-size", |transaction| {
        let value = transaction.get(BtreeId::Inodes, inode_position(ROOT))?.expect("the root");
        let mut inode = Inode::decode(&value)?;
        inode.size += 1;
        transaction.put(BtreeId::Inodes, inode_position(ROOT), inode.encode()?);
        Ok(())
    });
}

#[test]
fn parent_of_an_inode() {
    proves("parent-wrong", |transaction| {
        let (position, mut inode) = some_file(transaction)?;
        inode.parent = 999;
        transaction.put(BtreeId::Inodes, position, inode.encode()?);
        Ok(())
    });
}

#[test]
fn a_name_of_nothing() {
    proves("dirent-dangling", |transaction| {
        let keys = transaction.range(BtreeId::Dirents, Position::MIN, Position::MAX, 100)?;
        let (position, value) = keys.into_iter().find(|(position, _)| position.inode != ROOT).expect("an entry");
        let mut bucket = DirentBucket::decode(&value)?;
        let mut extra = bucket.0[0].clone();
        extra.discriminator += 1;
        extra.inode = coppicefs::units::InodeNumber(123_456);
        extra.name = bucket.0[0].name.clone();
        bucket.0[0].inode = extra.inode;
        transaction.put(BtreeId::Dirents, position, bucket.encode());
        Ok(())
    });
}

#[test]
fn type_in_a_name() {
    proves("dirent-type", |transaction| {
        let keys = transaction.range(BtreeId::Dirents, Position::MIN, Position::MAX, 100)?;
        let (position, value) = keys.into_iter().find(|(position, _)| position.inode != ROOT).expect("an entry");
        let mut bucket = DirentBucket::decode(&value)?;
        bucket.0[0].file_type = coppicefs::format::namespace::FileType::Fifo;
        transaction.put(BtreeId::Dirents, position, bucket.encode());
        Ok(())
    });
}

#[test]
fn a_file_without_a_name_goes_to_lost_and_found() {
    proves("unconnected", |transaction| {
        let (_, inode) = some_file(transaction)?;
        transaction.delete(BtreeId::Dirents, Position::new(inode.parent, inode.parent_hash, SNAPSHOT));
        Ok(())
    });
}

#[test]
fn a_directory_without_a_name_goes_to_lost_and_found_with_what_is_in_it() {
    proves("unconnected", |transaction| {
        let keys = transaction.range(BtreeId::Inodes, inode_position(2), Position::MAX, 100)?;
        let inodes = keys.into_iter().map(|(_, value)| Inode::decode(&value).unwrap());
        let directory = inodes.into_iter().find(|inode| inode.mode & 0o170_000 == 0o040_000).expect("a directory");
        transaction.delete(BtreeId::Dirents, Position::new(directory.parent, directory.parent_hash, SNAPSHOT));
        Ok(())
    });
}

#[test]
fn orphans() {
    proves("orphan-dangling", |transaction| {
        transaction.put(BtreeId::Orphans, Position::new(0, 4711, SNAPSHOT), Vec::new());
        Ok(())
    });
    proves("orphan-linked", |transaction| {
        let (position, _) = some_file(transaction)?;
        transaction.put(BtreeId::Orphans, Position::new(0, position.inode, SNAPSHOT), Vec::new());
        Ok(())
    });
    proves("orphan-missing", |transaction| {
        let (position, mut inode) = some_file(transaction)?;
        transaction.delete(BtreeId::Dirents, Position::new(inode.parent, inode.parent_hash, SNAPSHOT));
        inode.link_count = 0;
        transaction.put(BtreeId::Inodes, position, inode.encode()?);
        Ok(())
    });
}

#[test]
fn backpointers() {
    proves("backpointer-missing", |transaction| {
        let (position, _) = first(transaction, BtreeId::Backpointers)?;
        transaction.delete(BtreeId::Backpointers, position);
        Ok(())
    });
    proves("backpointer-wrong", |transaction| {
        let (position, value) = first(transaction, BtreeId::Backpointers)?;
        let beside = Position { offset: position.offset + 5, ..position };
        transaction.put(BtreeId::Backpointers, beside, value.to_vec());
        Ok(())
    });
}

#[test]
fn counts_of_buckets() {
    proves("bucket-wrong", |transaction| {
        let keys = transaction.range(BtreeId::Buckets, Position::MIN, Position::MAX, 1000)?;
        let decoded = keys.into_iter().map(|(position, value)| (position, Bucket::decode(&value).unwrap()));
        let (position, mut bucket) =
            decoded.into_iter().find(|(_, bucket)| bucket.state == BucketState::Data).expect("a data bucket");
        bucket.charged_bytes += 4096;
        transaction.put(BtreeId::Buckets, position, bucket.encode());
        Ok(())
    });
}

#[test]
fn free_space_and_need_discard_keys() {
    proves("free-space-key", |transaction| {
        let (position, _) = first(transaction, BtreeId::FreeSpace)?;
        transaction.delete(BtreeId::FreeSpace, position);
        Ok(())
    });
    proves("free-space-key", |transaction| {
        let keys = transaction.range(BtreeId::Buckets, Position::MIN, Position::MAX, 1000)?;
        let used = keys.iter().find(|(_, value)| Bucket::decode(value).unwrap().state == BucketState::Data);
        let (position, _) = used.expect("a data bucket");
        transaction.put(BtreeId::FreeSpace, *position, FreeBucket { discarded: false }.encode());
        Ok(())
    });
    proves("need-discard-key", |transaction| {
        let keys = transaction.range(BtreeId::Buckets, Position::MIN, Position::MAX, 1000)?;
        let used = keys.iter().find(|(_, value)| Bucket::decode(value).unwrap().state == BucketState::Data);
        let (position, _) = used.expect("a data bucket");
        transaction.put(BtreeId::NeedDiscard, *position, Vec::new());
        Ok(())
    });
}

#[test]
fn global_counters() {
    for counter in [AccountingCounter::DataBytes, AccountingCounter::Inodes, AccountingCounter::DataBuckets] {
        proves("accounting", |transaction| {
            transaction.account(counter, 12_288);
            Ok(())
        });
    }
}

#[test]
fn a_copy_of_the_superblock() {
    let device = made();
    let [_, middle, _] = copy_offsets(device.size_bytes());
    device.write(middle, &[0xff; 4096]).unwrap();
    let filesystem = open(&device, WorkerSet::Essential);
    let problems = found(&filesystem).problems;
    assert!(matches!(problems.as_slice(), [Problem::SuperblockCopy { .. }]), "{problems:?}");
    assert_eq!(repair::repair(&filesystem, &problems).unwrap(), 1);
    assert!(found(&filesystem).is_clean(), "{:?}", found(&filesystem).problems);
    filesystem.close().unwrap();
}

#[test]
fn a_copy_of_a_node() {
    let device = made();
    let filesystem = open(&device, WorkerSet::Essential);
    let root =
        filesystem.opening().newest.roots.iter().find(|root| root.btree == BtreeId::Inodes as u8).expect("inodes");
    let pointer = coppicefs::format::node::NodePointer::decode(&root.pointer).unwrap();
    filesystem.close().unwrap();
    drop(filesystem);
    device.write(pointer.copies[0].offset, &[0; 4096]).unwrap();
    let filesystem = open(&device, WorkerSet::Essential);
    let problems = found(&filesystem).problems;
    assert!(problems.iter().any(|problem| problem.id() == "node-copy"), "{problems:?}");
    assert!(repair::repair(&filesystem, &problems).unwrap() > 0);
    assert!(found(&filesystem).is_clean(), "{:?}", found(&filesystem).problems);
    filesystem.close().unwrap();
}

#[test]
fn what_cannot_be_repaired_is_damage_and_is_said() {
    let device = made();
    let filesystem = open(&device, WorkerSet::Essential);
    damage(&filesystem, |transaction| {
        let (position, _) = first(transaction, BtreeId::Extents)?;
        transaction.put(BtreeId::Extents, position, vec![0xee; 10]);
        Ok(())
    });
    let problems = found(&filesystem).problems;
    let damaged = problems.iter().find(|problem| problem.id() == "key-undecodable").expect("it is found");
    assert!(!damaged.is_repairable());
    assert!(damaged.describe().contains("extents"), "{}", damaged.describe());
    filesystem.close().unwrap();
}
