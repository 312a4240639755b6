//! The cases: what is damaged, what a first check finds beside it, and whose keys the repair may change.

use coppicefs::Result;
use coppicefs::device::Image;
use coppicefs::format::checkpoint::{RECORD_SLOT_BYTES, RECORD_SLOTS};
use coppicefs::format::extent::ExtentValue;
use coppicefs::format::journal::AccountingCounter;
use coppicefs::format::namespace::{Dirent, DirentBucket, FileType, LoggedOperation, Subvolume, XattrBucket};
use coppicefs::format::space::{Backpointer, Bucket, BucketState, DeviceUsage, FreeBucket};
use coppicefs::format::superblock::copy_offsets;
use coppicefs::format::{BtreeId, CompressionKind, Position};
use coppicefs::transaction::Transaction;
use coppicefs::units::InodeNumber;

use crate::damage::{
    bucket_in, bucket_of, change_dirent, change_inode, dirent_of, extent_of, first_key, inode_position, lose_leaf,
    lose_newest_root, opened, put_extent, take_slot_out_of_map,
};
use crate::ground::{Ground, ROOT, SNAPSHOT, with_keys};

/// How an image is damaged.
#[derive(Clone, Copy)]
pub enum Damage {
    /// By a transaction past everything that keeps structures right.
    Keys(fn(&Ground, &mut Transaction<'_>) -> Result<()>),
    /// On the medium.
    Bytes(fn(&Ground, &mut Image)),
    /// As before, and where the journal is not replayed.
    Unreplayed(fn(&Ground, &mut Image)),
}

/// A case of the corpus.
pub struct Case {
    /// The identifier that it is found by.
    pub id: &'static str,
    /// What is done.
    pub name: &'static str,
    pub damage: Damage,
    /// Identifiers that the first check finds, too.
    pub follows: &'static [&'static str],
    /// Paths whose keys may change by it, and by its repair. `/` is the root; new inodes may come anyway.
    pub touches: &'static [&'static str],
    /// Paths of which what the first extent held cannot be read afterwards.
    pub lost: &'static [&'static str],
    /// Paths that are there afterwards and were not before.
    pub comes: &'static [&'static str],
    /// Paths that are gone afterwards.
    pub goes: &'static [&'static str],
    /// Only a scan can repair it.
    pub takes_rebuild: bool,
}

const NOTHING: Case = Case {
    id: "",
    name: "",
    damage: Damage::Keys(|_, _| Ok(())),
    follows: &[],
    touches: &[],
    lost: &[],
    comes: &[],
    goes: &[],
    takes_rebuild: false,
};

/// A raw file of five blocks and more, a compressed one, a small one, a directory.
const FILE: &str = "/folder 0 0/file 20";
const NEIGHBOUR: &str = "/folder 0 0/file 21";
const FRAME: &str = "/folder 1 0/file 20";
const INLINE: &str = "/folder 0 0/file 7";
const FOLDER: &str = "/folder 0 1";
const INNER: &str = "/folder 0 1/inner";

pub const CASES: &[Case] = &[
    Case {
        id: "superblock-copy",
        name: "a copy of the superblock",
        damage: Damage::Bytes(|_, image| {
            let [_, middle, _] = copy_offsets(image.size_bytes());
            image.write(middle, &[0xff; 4096]);
        }),
        ..NOTHING
    },
    Case {
        id: "journal-damaged",
        name: "a record of the journal that was durable",
        damage: Damage::Unreplayed(|ground, image| {
            let filesystem = opened(&ground.unreplayed);
            let superblock = filesystem.superblock().clone();
            let first = filesystem.opening().newest.first_replay_offset;
            filesystem.close().unwrap();
            for copy in &superblock.layout.journal {
                let start = copy.first * u64::from(superblock.geometry.bucket_bytes);
                image.write(start + first, &[0; 4096]);
            }
        }),
        takes_rebuild: true,
        ..NOTHING
    },
    Case {
        id: "checkpoint-unusable",
        name: "all checkpoint records",
        damage: Damage::Bytes(|ground, image| {
            let filesystem = opened(&ground.image);
            let superblock = filesystem.superblock().clone();
            filesystem.close().unwrap();
            for copy in &superblock.layout.checkpoints {
                let start = copy.first * u64::from(superblock.geometry.bucket_bytes);
                for slot in 0..RECORD_SLOTS {
                    image.write(start + slot * RECORD_SLOT_BYTES as u64, &[0; 4096]);
                }
            }
        }),
        takes_rebuild: true,
        ..NOTHING
    },
    Case {
        id: "checkpoint-damaged",
        name: "a root of the newest, in all copies",
        damage: Damage::Bytes(lose_newest_root),
        ..NOTHING
    },
    Case {
        id: "node-copy",
        name: "the first copy of a leaf",
        damage: Damage::Bytes(|ground, image| image.write(ground.nodes(BtreeId::Inodes, 0)[1].2[0], &[0; 4096])),
        ..NOTHING
    },
    Case {
        id: "node-copy",
        name: "the second copy of a leaf",
        damage: Damage::Bytes(|ground, image| image.write(ground.nodes(BtreeId::Extents, 0)[0].2[1], &[0; 4096])),
        ..NOTHING
    },
    Case {
        id: "node-map",
        name: "a slot that is used and not in the map",
        damage: Damage::Bytes(take_slot_out_of_map),
        ..NOTHING
    },
    Case {
        id: "key-undecodable",
        name: "an extent",
        damage: Damage::Keys(|ground, transaction| {
            let (position, _) = extent_of(ground, FILE);
            transaction.put(BtreeId::Extents, position, vec![0xee; 10]);
            Ok(())
        }),
        follows: &["inode-allocated", "backpointer-wrong", "bucket-wrong", "accounting"],
        touches: &[FILE],
        lost: &[FILE],
        ..NOTHING
    },
    Case {
        id: "key-undecodable",
        name: "an inode of a file with data",
        damage: Damage::Keys(|ground, transaction| {
            transaction.put(BtreeId::Inodes, inode_position(ground.inode(FILE)), vec![0xee; 10]);
            Ok(())
        }),
        follows: &["extent-without-inode", "dirent-dangling", "xattr-owner", "directory-size"],
        touches: &[FILE],
        ..NOTHING
    },
    Case {
        id: "key-undecodable",
        name: "an entry",
        damage: Damage::Keys(|ground, transaction| {
            transaction.put(BtreeId::Dirents, dirent_of(ground, NEIGHBOUR), vec![0xee; 10]);
            Ok(())
        }),
        follows: &["unconnected", "directory-size"],
        touches: &["/", NEIGHBOUR, "/folder 0 0"],
        goes: &[NEIGHBOUR],
        comes: &["/lost+found", "/lost+found/#INODE"],
        ..NOTHING
    },
    Case {
        id: "key-undecodable",
        name: "attributes",
        damage: Damage::Keys(|ground, transaction| {
            let (position, _) = ground.of(BtreeId::Xattrs, ground.inode(FILE))[0];
            transaction.put(BtreeId::Xattrs, position, vec![0xee; 10]);
            Ok(())
        }),
        touches: &[FILE],
        ..NOTHING
    },
    Case {
        id: "key-undecodable",
        name: "a bucket with data",
        damage: Damage::Keys(|ground, transaction| {
            transaction.put(BtreeId::Buckets, bucket_of(ground, FILE).0, vec![0xee; 3]);
            Ok(())
        }),
        follows: &["bucket-wrong"],
        ..NOTHING
    },
    Case {
        id: "key-undecodable",
        name: "the mark of a device",
        damage: Damage::Keys(|ground, transaction| {
            transaction.put(BtreeId::Devices, first_key(ground, BtreeId::Devices).0, vec![1]);
            Ok(())
        }),
        ..NOTHING
    },
    Case {
        id: "key-undecodable",
        name: "a logged operation",
        damage: Damage::Keys(|_, transaction| {
            transaction.put(BtreeId::LoggedOperations, Position::new(0, 5, 0), vec![0xee; 2]);
            Ok(())
        }),
        ..NOTHING
    },
    Case {
        id: "key-undecodable",
        name: "an inode where none can be",
        damage: Damage::Keys(|ground, transaction| {
            let value = ground.keys[&(BtreeId::Inodes, inode_position(ground.inode(FILE)))].to_vec();
            transaction.put(BtreeId::Inodes, Position::new(InodeNumber::MAX.0 + 9, 0, SNAPSHOT), value);
            Ok(())
        }),
        follows: &["accounting"],
        ..NOTHING
    },
    Case {
        id: "extent-misplaced",
        name: "an extent that does not end at a block",
        damage: Damage::Keys(|ground, transaction| {
            let (position, data) = extent_of(ground, FILE);
            transaction.delete(BtreeId::Extents, position);
            put_extent(transaction, Position { offset: position.offset + 512, ..position }, data);
            Ok(())
        }),
        follows: &["backpointer-wrong", "extent-overlap"],
        touches: &[FILE],
        lost: &[FILE],
        ..NOTHING
    },
    Case {
        id: "extent-overlap",
        name: "an extent that ends in the next one",
        damage: Damage::Keys(|ground, transaction| {
            let (position, _) = extent_of(ground, FILE);
            let value = ExtentValue::Unwritten { length: 4096 };
            transaction.put(BtreeId::Extents, Position { offset: position.offset + 4096, ..position }, value.encode());
            Ok(())
        }),
        follows: &["inode-allocated", "accounting"],
        ..NOTHING
    },
    Case {
        id: "extent-overlap",
        name: "an extent that begins in the one before",
        damage: Damage::Keys(|ground, transaction| {
            let extents = ground.of(BtreeId::Extents, ground.inode(FILE));
            let (position, _) = extents.last().unwrap();
            let unwritten = ExtentValue::Unwritten { length: 3 * 4096 };
            transaction.put(
                BtreeId::Extents,
                Position { offset: position.offset + 4096, ..*position },
                unwritten.encode(),
            );
            Ok(())
        }),
        follows: &["inode-allocated", "accounting"],
        touches: &[FILE],
        ..NOTHING
    },
    Case {
        id: "extent-without-inode",
        name: "the inode of a file with data is gone",
        damage: Damage::Keys(|ground, transaction| {
            transaction.delete(BtreeId::Inodes, inode_position(ground.inode(FILE)));
            Ok(())
        }),
        follows: &["dirent-dangling", "xattr-owner", "directory-size", "accounting"],
        touches: &[FILE],
        ..NOTHING
    },
    Case {
        id: "extent-without-inode",
        name: "the inode and the name of a file with data are gone",
        damage: Damage::Keys(|ground, transaction| {
            transaction.delete(BtreeId::Inodes, inode_position(ground.inode(FILE)));
            transaction.delete(BtreeId::Dirents, dirent_of(ground, FILE));
            Ok(())
        }),
        follows: &["xattr-owner", "directory-size", "accounting"],
        touches: &["/", FILE, "/folder 0 0"],
        goes: &[FILE],
        comes: &["/lost+found", "/lost+found/#INODE"],
        ..NOTHING
    },
    Case {
        id: "extent-without-inode",
        name: "an extent of a directory",
        damage: Damage::Keys(|ground, transaction| {
            let value = ExtentValue::Unwritten { length: 4096 };
            transaction.put(BtreeId::Extents, Position::new(ground.inode(FOLDER), 4096, SNAPSHOT), value.encode());
            Ok(())
        }),
        follows: &["accounting"],
        touches: &[FOLDER],
        ..NOTHING
    },
    Case {
        id: "extent-pointer",
        name: "a pointer beyond the device",
        damage: Damage::Keys(|ground, transaction| {
            let (position, mut data) = extent_of(ground, FILE);
            data.pointers[0].offset = 1 << 40;
            put_extent(transaction, position, data);
            Ok(())
        }),
        follows: &["backpointer-wrong", "bucket-wrong"],
        touches: &[FILE],
        lost: &[FILE],
        ..NOTHING
    },
    Case {
        id: "extent-pointer",
        name: "a pointer into a bucket of nodes",
        damage: Damage::Keys(|ground, transaction| {
            let (position, mut data) = extent_of(ground, FILE);
            data.pointers[0].offset = bucket_in(ground, BucketState::Metadata).0.offset * (64 << 10);
            put_extent(transaction, position, data);
            Ok(())
        }),
        follows: &["backpointer-wrong", "bucket-wrong"],
        touches: &[FILE],
        lost: &[FILE],
        ..NOTHING
    },
    Case {
        id: "extent-stale",
        name: "a pointer of another generation to data that is there",
        damage: Damage::Keys(|ground, transaction| {
            let (position, mut data) = extent_of(ground, FILE);
            data.pointers[0].generation += 3;
            put_extent(transaction, position, data);
            Ok(())
        }),
        touches: &[FILE],
        ..NOTHING
    },
    Case {
        id: "extent-stale",
        name: "a pointer of another generation to something else",
        damage: Damage::Keys(|ground, transaction| {
            let (position, mut data) = extent_of(ground, FILE);
            data.pointers[0].generation += 3;
            data.checksums.iter_mut().for_each(|checksum| *checksum ^= 1);
            put_extent(transaction, position, data);
            Ok(())
        }),
        touches: &[FILE],
        lost: &[FILE],
        ..NOTHING
    },
    Case {
        id: "extents-share-space",
        name: "a pointer to the data of another",
        damage: Damage::Keys(|ground, transaction| {
            let (position, mut data) = extent_of(ground, FILE);
            let (_, other) = extent_of(ground, NEIGHBOUR);
            data.pointers[0] = other.pointers[0];
            put_extent(transaction, position, data);
            Ok(())
        }),
        follows: &["backpointer-wrong", "bucket-wrong"],
        touches: &[FILE],
        lost: &[FILE],
        ..NOTHING
    },
    Case {
        id: "extents-share-space",
        name: "a second key of the same frame",
        damage: Damage::Keys(|ground, transaction| {
            let (position, data) = extent_of(ground, FRAME);
            assert_ne!(data.compression, CompressionKind::None);
            put_extent(transaction, Position { offset: position.offset + (1 << 20), ..position }, data);
            Ok(())
        }),
        follows: &["backpointer-wrong", "bucket-wrong", "inode-allocated", "accounting"],
        touches: &[FRAME],
        ..NOTHING
    },
    Case {
        id: "backpointer-missing",
        name: "a backpointer is gone",
        damage: Damage::Keys(|ground, transaction| {
            transaction.delete(BtreeId::Backpointers, first_key(ground, BtreeId::Backpointers).0);
            Ok(())
        }),
        ..NOTHING
    },
    Case {
        id: "backpointer-wrong",
        name: "a backpointer beside where it should be",
        damage: Damage::Keys(|ground, transaction| {
            let (position, value) = first_key(ground, BtreeId::Backpointers);
            let beside = Position { offset: position.offset + 5, ..position };
            transaction.put(BtreeId::Backpointers, beside, value.to_vec());
            Ok(())
        }),
        ..NOTHING
    },
    Case {
        id: "backpointer-wrong",
        name: "a backpointer that says more bytes, over what lies behind",
        damage: Damage::Keys(|ground, transaction| {
            let (position, value) = first_key(ground, BtreeId::Backpointers);
            let backpointer = Backpointer::decode(&value)?;
            let longer = Backpointer { disk_bytes: backpointer.disk_bytes + 4096, ..backpointer };
            transaction.put(BtreeId::Backpointers, position, longer.encode());
            Ok(())
        }),
        ..NOTHING
    },
    Case {
        id: "inode-type",
        name: "a file's type",
        damage: Damage::Keys(|ground, transaction| {
            change_inode(ground, transaction, FILE, |inode| inode.mode &= 0o7777)
        }),
        touches: &[],
        ..NOTHING
    },
    Case {
        id: "inode-type",
        name: "a directory's type",
        damage: Damage::Keys(|ground, transaction| {
            change_inode(ground, transaction, INNER, |inode| inode.mode &= 0o7777)
        }),
        follows: &["dirent-owner", "unconnected", "link-count"],
        ..NOTHING
    },
    Case {
        id: "inode-allocated",
        name: "bytes that a file holds",
        damage: Damage::Keys(|ground, transaction| {
            change_inode(ground, transaction, FILE, |inode| inode.allocated_bytes += 4096)
        }),
        ..NOTHING
    },
    Case {
        id: "directory-size",
        name: "entries of a directory",
        damage: Damage::Keys(|ground, transaction| change_inode(ground, transaction, "/", |inode| inode.size += 1)),
        ..NOTHING
    },
    Case {
        id: "dirent-owner",
        name: "the inode of a directory is gone",
        damage: Damage::Keys(|ground, transaction| {
            transaction.delete(BtreeId::Inodes, inode_position(ground.inode(INNER)));
            Ok(())
        }),
        follows: &["dirent-dangling", "unconnected", "directory-size", "link-count", "accounting"],
        touches: &[INNER],
        ..NOTHING
    },
    Case {
        id: "dirent-owner",
        name: "an entry of a file",
        damage: Damage::Keys(|ground, transaction| {
            let bucket = DirentBucket(vec![Dirent {
                discriminator: 0,
                file_type: FileType::Regular,
                inode: InodeNumber(ground.inode(INLINE)),
                name: b"x".to_vec(),
            }]);
            transaction.put(BtreeId::Dirents, Position::new(ground.inode(FILE), 7, SNAPSHOT), bucket.encode());
            Ok(())
        }),
        follows: &["dirent-name"],
        ..NOTHING
    },
    Case {
        id: "dirent-dangling",
        name: "an entry of nothing",
        damage: Damage::Keys(|ground, transaction| {
            change_dirent(ground, transaction, NEIGHBOUR, |dirent| dirent.inode = InodeNumber(123_456))
        }),
        follows: &["unconnected", "directory-size"],
        touches: &["/", NEIGHBOUR, "/folder 0 0"],
        goes: &[NEIGHBOUR],
        comes: &["/lost+found", "/lost+found/#INODE"],
        ..NOTHING
    },
    Case {
        id: "dirent-name",
        name: "an entry under another hash",
        damage: Damage::Keys(|ground, transaction| {
            let position = dirent_of(ground, NEIGHBOUR);
            let value = ground.keys[&(BtreeId::Dirents, position)].to_vec();
            transaction.delete(BtreeId::Dirents, position);
            transaction.put(BtreeId::Dirents, Position { offset: position.offset ^ 1, ..position }, value);
            Ok(())
        }),
        follows: &["parent-wrong"],
        ..NOTHING
    },
    Case {
        id: "dirent-name",
        name: "a name that cannot be",
        damage: Damage::Keys(|ground, transaction| {
            change_dirent(ground, transaction, NEIGHBOUR, |dirent| dirent.name = b"a/b".to_vec())
        }),
        touches: &["/", NEIGHBOUR, "/folder 0 0"],
        goes: &[NEIGHBOUR],
        comes: &["/lost+found", "/lost+found/#INODE"],
        ..NOTHING
    },
    Case {
        id: "dirent-type",
        name: "the type in an entry",
        damage: Damage::Keys(|ground, transaction| {
            change_dirent(ground, transaction, FILE, |dirent| dirent.file_type = FileType::Fifo)
        }),
        ..NOTHING
    },
    Case {
        id: "directory-named-twice",
        name: "a second name of a directory",
        damage: Damage::Keys(|ground, transaction| {
            let bucket = DirentBucket(vec![Dirent {
                discriminator: 0,
                file_type: FileType::Directory,
                inode: InodeNumber(ground.inode(INNER)),
                name: b"second".to_vec(),
            }]);
            // Before the one that the directory knows, in the order of keys.
            transaction.put(BtreeId::Dirents, Position::new(ROOT, ground.second_hash, SNAPSHOT), bucket.encode());
            Ok(())
        }),
        follows: &["directory-size"],
        ..NOTHING
    },
    Case {
        id: "parent-wrong",
        name: "where an inode says it is named",
        damage: Damage::Keys(|ground, transaction| change_inode(ground, transaction, FILE, |inode| inode.parent = 999)),
        ..NOTHING
    },
    Case {
        id: "root-missing",
        name: "the root directory is gone",
        damage: Damage::Keys(|_, transaction| {
            transaction.delete(BtreeId::Inodes, inode_position(ROOT));
            Ok(())
        }),
        follows: &["dirent-owner", "unconnected", "link-count", "parent-wrong", "accounting"],
        touches: &["/"],
        ..NOTHING
    },
    Case {
        id: "root-missing",
        name: "the root directory is a file",
        damage: Damage::Keys(|ground, transaction| {
            change_inode(ground, transaction, "/", |inode| inode.mode = 0o100_755)
        }),
        follows: &["dirent-owner", "unconnected", "link-count", "parent-wrong"],
        ..NOTHING
    },
    Case {
        id: "unconnected",
        name: "the name of a file is gone",
        damage: Damage::Keys(|ground, transaction| {
            transaction.delete(BtreeId::Dirents, dirent_of(ground, NEIGHBOUR));
            Ok(())
        }),
        follows: &["directory-size"],
        touches: &["/", NEIGHBOUR, "/folder 0 0"],
        goes: &[NEIGHBOUR],
        comes: &["/lost+found", "/lost+found/#INODE"],
        ..NOTHING
    },
    Case {
        id: "link-count",
        name: "a file's link count",
        damage: Damage::Keys(|ground, transaction| {
            change_inode(ground, transaction, FILE, |inode| inode.link_count = 7)
        }),
        ..NOTHING
    },
    Case {
        id: "xattr-owner",
        name: "attributes of nothing",
        damage: Damage::Keys(|ground, transaction| {
            let (position, value) = ground.of(BtreeId::Xattrs, ground.inode(FILE))[0].clone();
            transaction.put(BtreeId::Xattrs, Position { inode: 123_456, ..position }, value.to_vec());
            Ok(())
        }),
        ..NOTHING
    },
    Case {
        id: "xattr-name",
        name: "attributes under another hash",
        damage: Damage::Keys(|ground, transaction| {
            let (position, value) = ground.of(BtreeId::Xattrs, ground.inode(FILE))[0].clone();
            assert_eq!(XattrBucket::decode(&value)?.0.len(), 1);
            transaction.delete(BtreeId::Xattrs, position);
            transaction.put(BtreeId::Xattrs, Position { offset: position.offset ^ 1, ..position }, value.to_vec());
            Ok(())
        }),
        ..NOTHING
    },
    Case {
        id: "orphan-dangling",
        name: "a deletion of nothing",
        damage: Damage::Keys(|_, transaction| {
            transaction.put(BtreeId::Orphans, Position::new(0, 4711, SNAPSHOT), Vec::new());
            Ok(())
        }),
        ..NOTHING
    },
    Case {
        id: "orphan-linked",
        name: "a deletion of what has a name",
        damage: Damage::Keys(|ground, transaction| {
            transaction.put(BtreeId::Orphans, Position::new(0, ground.inode(FILE), SNAPSHOT), Vec::new());
            Ok(())
        }),
        ..NOTHING
    },
    Case {
        id: "orphan-missing",
        name: "no deletion of what has no name",
        damage: Damage::Keys(|ground, transaction| {
            transaction.delete(BtreeId::Dirents, dirent_of(ground, NEIGHBOUR));
            change_inode(ground, transaction, NEIGHBOUR, |inode| inode.link_count = 0)
        }),
        follows: &["directory-size"],
        touches: &["/folder 0 0", NEIGHBOUR],
        goes: &[NEIGHBOUR],
        ..NOTHING
    },
    Case {
        id: "key-undecodable",
        name: "a deletion that is noted elsewhere",
        damage: Damage::Keys(|ground, transaction| {
            transaction.put(BtreeId::Orphans, Position::new(5, ground.inode(FILE), SNAPSHOT), Vec::new());
            Ok(())
        }),
        ..NOTHING
    },
    Case {
        id: "key-undecodable",
        name: "an operation that would never end, and one of another file",
        damage: Damage::Keys(|ground, transaction| {
            let inode = ground.inode(FILE);
            let endless = LoggedOperation::Replace { inode, start: 0, end: 1 << 62, unwritten: true };
            transaction.put(BtreeId::LoggedOperations, Position::new(0, inode, 0), endless.encode()?);
            let other = LoggedOperation::Truncate { inode, size: 0 };
            transaction.put(BtreeId::LoggedOperations, Position::new(0, inode + 1, 0), other.encode()?);
            Ok(())
        }),
        ..NOTHING
    },
    Case {
        id: "key-undecodable",
        name: "the root of the snapshots, the subvolume, and others that there are not",
        damage: Damage::Keys(|ground, transaction| {
            let [(snapshot, value), (subvolume, _)] =
                [BtreeId::Snapshots, BtreeId::Subvolumes].map(|btree| first_key(ground, btree));
            transaction.put(BtreeId::Snapshots, snapshot, vec![0xee; 3]);
            transaction.put(BtreeId::Snapshots, Position { offset: 1 << 40, ..snapshot }, value.to_vec());
            transaction.put(BtreeId::Subvolumes, subvolume, Subvolume { snapshot: 5, root: ROOT }.encode()?);
            transaction.put(BtreeId::Subvolumes, Position { offset: 5, ..subvolume }, Vec::new());
            Ok(())
        }),
        ..NOTHING
    },
    Case {
        id: "subvolume-missing",
        name: "the root of the snapshots, and the subvolume",
        damage: Damage::Keys(|ground, transaction| {
            for btree in [BtreeId::Snapshots, BtreeId::Subvolumes] {
                transaction.delete(btree, first_key(ground, btree).0);
            }
            Ok(())
        }),
        ..NOTHING
    },
    Case {
        id: "bucket-wrong",
        name: "the count of a bucket",
        damage: Damage::Keys(|ground, transaction| {
            let (position, mut bucket) = bucket_of(ground, FILE);
            bucket.charged_bytes += 4096;
            transaction.put(BtreeId::Buckets, position, bucket.encode());
            Ok(())
        }),
        ..NOTHING
    },
    Case {
        id: "bucket-wrong",
        name: "a bucket with data that is noted as free in every way",
        damage: Damage::Keys(|ground, transaction| {
            let (position, bucket) = bucket_of(ground, FILE);
            let free = Bucket { state: BucketState::Free, charged_bytes: 0, ..bucket };
            transaction.put(BtreeId::Buckets, position, free.encode());
            transaction.put(BtreeId::FreeSpace, position, FreeBucket { discarded: false }.encode());
            Ok(())
        }),
        follows: &["free-space-key"],
        ..NOTHING
    },
    Case {
        id: "free-space-key",
        name: "a free bucket without a key",
        damage: Damage::Keys(|ground, transaction| {
            transaction.delete(BtreeId::FreeSpace, first_key(ground, BtreeId::FreeSpace).0);
            Ok(())
        }),
        ..NOTHING
    },
    Case {
        id: "free-space-value",
        name: "the value of a free bucket",
        damage: Damage::Keys(|ground, transaction| {
            transaction.put(BtreeId::FreeSpace, first_key(ground, BtreeId::FreeSpace).0, vec![0xee; 3]);
            Ok(())
        }),
        ..NOTHING
    },
    Case {
        id: "need-discard-key",
        name: "a key of a bucket with data",
        damage: Damage::Keys(|ground, transaction| {
            transaction.put(BtreeId::NeedDiscard, bucket_of(ground, FILE).0, Vec::new());
            Ok(())
        }),
        ..NOTHING
    },
    Case {
        id: "index-key-stray",
        name: "keys of buckets that there are not",
        damage: Damage::Keys(|_, transaction| {
            transaction.put(BtreeId::NeedDiscard, Position::new(77, 5, 0), Vec::new());
            transaction.put(BtreeId::Buckets, Position::new(0, 1 << 40, 0), Bucket::UNUSED.encode());
            transaction.put(BtreeId::Devices, Position::new(3, 0, 0), DeviceUsage { untouched_from: 1 }.encode());
            Ok(())
        }),
        ..NOTHING
    },
    Case {
        id: "untouched-mark",
        name: "a mark below free buckets",
        damage: Damage::Keys(|ground, transaction| {
            let (position, value) = first_key(ground, BtreeId::Devices);
            let untouched_from = DeviceUsage::decode(&value)?.untouched_from;
            assert!(untouched_from > 8);
            transaction.put(BtreeId::Devices, position, DeviceUsage { untouched_from: 8 }.encode());
            Ok(())
        }),
        ..NOTHING
    },
    Case {
        id: "accounting",
        name: "global counters",
        damage: Damage::Keys(|_, transaction| {
            transaction.account(AccountingCounter::DataBytes, 12_288);
            transaction.account(AccountingCounter::Inodes, -1);
            transaction.account(AccountingCounter::DataBuckets, 2);
            Ok(())
        }),
        ..NOTHING
    },
];

/// Cases whose keys are so many that what they touch is looked at otherwise: a leaf is lost.
pub const LOST_LEAVES: &[(&str, BtreeId, fn(&Ground, &mut Image))] = &[
    ("extents", BtreeId::Extents, |ground, image| lose_leaf(ground, image, BtreeId::Extents, FILE)),
    ("inodes", BtreeId::Inodes, |ground, image| lose_leaf(ground, image, BtreeId::Inodes, FILE)),
    ("dirents", BtreeId::Dirents, |ground, image| lose_leaf(ground, image, BtreeId::Dirents, FILE)),
    ("xattrs", BtreeId::Xattrs, |ground, image| lose_leaf(ground, image, BtreeId::Xattrs, FILE)),
    ("backpointers", BtreeId::Backpointers, |ground, image| lose_leaf(ground, image, BtreeId::Backpointers, FILE)),
];

impl Case {
    /// The damaged image.
    pub fn image(&self, ground: &Ground) -> Image {
        match self.damage {
            Damage::Keys(change) => with_keys(&ground.image, &|transaction| change(ground, transaction)),
            Damage::Bytes(change) => {
                let mut image = ground.image.clone();
                change(ground, &mut image);
                image
            }
            Damage::Unreplayed(change) => {
                let mut image = ground.unreplayed.clone();
                change(ground, &mut image);
                image
            }
        }
    }
}
