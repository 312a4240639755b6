//! How the cases damage: changes of one key, and of bytes on the medium.

use std::collections::BTreeMap;
use std::sync::Arc;

use coppicefs::Result;
use coppicefs::btree::NodeReader;
use coppicefs::device::Image;
use coppicefs::filesystem::Filesystem;
use coppicefs::format::checkpoint::{
    Checkpoint, MAP_PAGE_BYTES, RECORD_SLOT_BYTES, RECORD_SLOTS, decode_map_page, encode_map_page,
};
use coppicefs::format::extent::{DataExtent, ExtentValue};
use coppicefs::format::namespace::{Dirent, DirentBucket, Inode};
use coppicefs::format::node::NodePointer;
use coppicefs::format::space::{Bucket, BucketState};
use coppicefs::format::{BtreeId, Position, Value};
use coppicefs::metrics::Metrics;
use coppicefs::recovery::superblock;
use coppicefs::transaction::Transaction;

use crate::ground::{Ground, ROOT, SNAPSHOT, device_of, open};

pub fn inode_position(inode: u64) -> Position {
    Position::new(inode, 0, SNAPSHOT)
}

pub fn stored(ground: &Ground, inode: u64) -> Inode {
    Inode::decode(&ground.keys[&(BtreeId::Inodes, inode_position(inode))]).unwrap()
}

/// Changes the inode at a path.
pub fn change_inode(
    ground: &Ground,
    transaction: &mut Transaction<'_>,
    path: &str,
    change: impl Fn(&mut Inode),
) -> Result<()> {
    let number = if path == "/" { ROOT } else { ground.inode(path) };
    let mut inode = stored(ground, number);
    change(&mut inode);
    transaction.put(BtreeId::Inodes, inode_position(number), inode.encode()?);
    Ok(())
}

/// Where the name of a path's inode stands.
pub fn dirent_of(ground: &Ground, path: &str) -> Position {
    let inode = stored(ground, ground.inode(path));
    Position::new(inode.parent, inode.parent_hash, SNAPSHOT)
}

pub fn change_dirent(
    ground: &Ground,
    transaction: &mut Transaction<'_>,
    path: &str,
    change: impl Fn(&mut Dirent),
) -> Result<()> {
    let position = dirent_of(ground, path);
    let mut bucket = DirentBucket::decode(&ground.keys[&(BtreeId::Dirents, position)])?;
    bucket.0.iter_mut().for_each(change);
    transaction.put(BtreeId::Dirents, position, bucket.encode());
    Ok(())
}

/// The first extent of a path.
pub fn extent_of(ground: &Ground, path: &str) -> (Position, DataExtent) {
    let extents = ground.of(BtreeId::Extents, ground.inode(path));
    let (position, value) = extents.first().unwrap_or_else(|| panic!("{path} has no extent"));
    match ExtentValue::decode(value).unwrap() {
        ExtentValue::Data(data) => (*position, data),
        other => panic!("{path} has {other:?}"),
    }
}

pub fn put_extent(transaction: &mut Transaction<'_>, position: Position, data: DataExtent) {
    transaction.put(BtreeId::Extents, position, ExtentValue::Data(data).encode());
}

/// The first bucket in a state.
pub fn bucket_in(ground: &Ground, state: BucketState) -> (Position, Bucket) {
    let mut buckets = ground.all(BtreeId::Buckets).into_iter();
    buckets
        .find_map(|(position, value)| {
            let bucket = Bucket::decode(&value).unwrap();
            (bucket.state == state).then_some((position, bucket))
        })
        .unwrap_or_else(|| panic!("no bucket in {state:?}"))
}

/// The bucket that the first extent of a path is in.
pub fn bucket_of(ground: &Ground, path: &str) -> (Position, Bucket) {
    let (_, data) = extent_of(ground, path);
    let position = Position::new(0, data.pointers[0].offset / (64 << 10), 0);
    (position, Bucket::decode(&ground.keys[&(BtreeId::Buckets, position)]).unwrap())
}

pub fn first_key(ground: &Ground, btree: BtreeId) -> (Position, Value) {
    ground.all(btree).into_iter().next().unwrap_or_else(|| panic!("the {} tree is empty", btree.name()))
}

/// Makes every copy of the leaf that holds a key of `path` unreadable.
pub fn lose_leaf(ground: &Ground, image: &mut Image, btree: BtreeId, path: &str) {
    let at = match btree {
        BtreeId::Dirents => dirent_of(ground, path),
        BtreeId::Backpointers => first_key(ground, btree).0,
        _ => ground.of(btree, ground.inode(path))[0].0,
    };
    let leaves = ground.nodes(btree, 0);
    let leaf = leaves.iter().find(|(first, last, _)| *first <= at && at <= *last);
    let (.., copies) = leaf.unwrap_or_else(|| panic!("the {} tree has one leaf", btree.name()));
    for copy in copies {
        image.write(*copy, &[0; 4096]);
    }
}

pub fn opened(image: &Image) -> Arc<Filesystem> {
    open(&device_of(image), true).unwrap()
}

/// Makes what the newest checkpoint has of a root, and the one before it has not, unreadable in every copy.
pub fn lose_newest_root(ground: &Ground, image: &mut Image) {
    let filesystem = opened(&ground.image);
    let (newest, previous) = (filesystem.opening().newest.clone(), filesystem.opening().previous.clone().unwrap());
    filesystem.close().unwrap();
    let pointers = |checkpoint: &Checkpoint| -> Vec<NodePointer> {
        checkpoint.roots.iter().map(|root| NodePointer::decode(&root.pointer).unwrap()).collect()
    };
    let before = pointers(&previous);
    let lost = pointers(&newest).into_iter().find(|pointer| !before.contains(pointer)).unwrap();
    for copy in &lost.copies {
        // The last bytes that it has: an image that is a beginning of this one stays whole.
        image.write(copy.offset + u64::from(lost.written_bytes) - 8, &[0xff; 8]);
    }
}

/// Takes a slot that is used out of the newest checkpoint's node-space map, and makes the checksums fit.
pub fn take_slot_out_of_map(_: &Ground, image: &mut Image) {
    let filesystem = opened(image);
    let superblock = filesystem.superblock().clone();
    let mut newest: Checkpoint = filesystem.opening().newest.clone();
    filesystem.close().unwrap();
    let bucket_bytes = u64::from(superblock.geometry.bucket_bytes);
    let starts: Vec<u64> = superblock.layout.checkpoints.iter().map(|range| range.first * bucket_bytes).collect();
    let place = u64::from(newest.map[0].place) * MAP_PAGE_BYTES as u64 + RECORD_SLOTS * RECORD_SLOT_BYTES as u64;
    let mut page = vec![0; MAP_PAGE_BYTES];
    image.read(starts[0] + place, &mut page);
    let (mut entries, _) = decode_map_page(superblock.filesystem, 0, &page).unwrap();
    let entry = entries.iter_mut().find(|entry| entry.used != 0).unwrap();
    entry.used &= entry.used - 1;
    let (page, checksum) = encode_map_page(superblock.filesystem, 0, &entries);
    newest.map[0].checksum = checksum;
    let record = newest.encode(superblock.filesystem).unwrap();
    for start in starts {
        image.write(start + place, &page);
        image.write(start + newest.number % RECORD_SLOTS * RECORD_SLOT_BYTES as u64, &record);
    }
}

/// Destroys every page of every map that a checkpoint record names, in all copies. The slots that the newest one said were used, by bucket.
pub fn lose_maps(image: &mut Image) -> BTreeMap<(u8, u64), u64> {
    let device = device_of(image);
    let superblock = Arc::new(superblock::read(&*device).unwrap().superblock);
    let reader = NodeReader::new(Arc::clone(&superblock), vec![device as _], Arc::new(Metrics::default()));
    let records = reader.checkpoints();
    let newest = reader.read_map(&records[0]).unwrap();
    for page in records.iter().flat_map(|record| &record.map) {
        for area in &superblock.layout.checkpoints {
            let start = area.first * u64::from(superblock.geometry.bucket_bytes);
            let place = u64::from(page.place) * MAP_PAGE_BYTES as u64;
            image.write(start + RECORD_SLOTS * RECORD_SLOT_BYTES as u64 + place, &[0x5a; MAP_PAGE_BYTES]);
        }
    }
    newest.into_iter().flatten().map(|entry| ((entry.device, entry.bucket), entry.used)).collect()
}

/// Destroys the root of a tree in every checkpoint that still has it, in all copies. Returns whether there was one.
pub fn lose_root(image: &mut Image, btree: BtreeId) -> bool {
    let device = device_of(image);
    let superblock = Arc::new(superblock::read(&*device).unwrap().superblock);
    let reader = NodeReader::new(superblock, vec![device as _], Arc::new(Metrics::default()));
    let mut was_there = false;
    for record in reader.checkpoints() {
        for root in record.roots.iter().filter(|root| root.btree == btree as u8) {
            // The slots of one that is not kept are others' by now.
            let alone = Checkpoint { roots: vec![root.clone()], map: Vec::new(), ..record.clone() };
            if reader.verify(&alone).is_err() {
                continue;
            }
            let pointer = NodePointer::decode(&root.pointer).unwrap();
            pointer.copies.iter().for_each(|copy| image.write(copy.offset, &[0x5a; 4096]));
            was_there = true;
        }
    }
    was_there
}
