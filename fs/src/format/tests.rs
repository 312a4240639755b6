//! Golden bytes and totality of every decoder.
//!
//! The golden values are what format version 1 is: a change that alters one is a new version, and needs a new variant, not a new
//! expectation. Large structures are pinned by their length and checksum.

use proptest::prelude::*;
use smallvec::smallvec;

use super::checkpoint::{Checkpoint, MapEntry, MapPageReference, Root, decode_map_page, encode_map_page};
use super::checksum::{ChecksumKind, CompressionKind, metadata_checksum};
use super::extent::{DataExtent, ExtentPointer, ExtentValue};
use super::journal::{
    AccountingCounter, Entries, Entry, RecordHeader, encode_accounting, encode_data_range, encode_key,
};
use super::key::{BtreeId, pack, packed_bytes, unpack};
use super::namespace::{
    Dirent, DirentBucket, FileType, Inode, LoggedOperation, Snapshot, StoredTime, Subvolume, Xattr, XattrBucket,
};
use super::node::{BsetHeader, NodeAddress, NodeHeader, NodePointer};
use super::position::Position;
use super::space::{Backpointer, Bucket, BucketState, DeviceUsage, FreeBucket};
use super::superblock::{
    BucketRange, Defaults, ErrorCounts, Geometry, Layout, Member, SUPERBLOCK_BYTES, Superblock, VERSION,
};
use crate::units::{DeviceIndex, InodeNumber, JournalSequence, NodeId};

const FILESYSTEM: uuid::Uuid = uuid::Uuid::from_u128(0x0011_2233_4455_6677_8899_aabb_ccdd_eeff);

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn position() -> Position {
    Position::new(0x0102, 0x0304_0506, 0x0708)
}

fn pointer() -> NodePointer {
    NodePointer {
        node: NodeId(0x1122),
        written_bytes: 8192,
        bset_count: 2,
        last_checksum: 0xaabb_ccdd,
        copies: smallvec![
            NodeAddress { device: DeviceIndex(0), offset: 1 << 20 },
            NodeAddress { device: DeviceIndex(0), offset: 3 << 20 },
        ],
    }
}

fn node_header() -> NodeHeader {
    NodeHeader {
        filesystem: FILESYSTEM,
        node: NodeId(0x1122),
        device: DeviceIndex(0),
        address: 1 << 20,
        btree: BtreeId::Extents,
        level: 1,
        newest_sequence: JournalSequence(99),
        minimum: Position::MIN,
        limit: Some(position()),
    }
}

fn data_extent() -> ExtentValue {
    ExtentValue::Data(DataExtent {
        length: 8192,
        pointers: smallvec![ExtentPointer { device: DeviceIndex(0), generation: 7, offset: 0x10_0000 }],
        compression: CompressionKind::None,
        disk_bytes: 8192,
        stream_bytes: 8192,
        frame_bytes: 8192,
        frame_offset: 0,
        checksum_kind: ChecksumKind::Crc32c,
        checksums: vec![0x1111_2222, 0x3333_4444],
    })
}

fn compressed_extent() -> ExtentValue {
    ExtentValue::Data(DataExtent {
        length: 4096,
        pointers: smallvec![ExtentPointer { device: DeviceIndex(0), generation: 7, offset: 0x10_0000 }],
        compression: CompressionKind::Zstd,
        disk_bytes: 12_288,
        stream_bytes: 10_000,
        frame_bytes: 131_072,
        frame_offset: 8192,
        checksum_kind: ChecksumKind::Xxh3,
        checksums: vec![0x1122_3344_5566_7788],
    })
}

fn inode() -> Inode {
    Inode {
        mode: 0o100_644,
        uid: 1000,
        gid: 100,
        link_count: 1,
        size: 5000,
        allocated_bytes: 8192,
        device_number: 0,
        flags: 0,
        generation: 42,
        access_time: StoredTime { seconds: -1, nanoseconds: 999_999_999 },
        modification_time: StoredTime { seconds: 1_767_225_600, nanoseconds: 1 },
        change_time: StoredTime { seconds: 2, nanoseconds: 0 },
        birth_time: StoredTime { seconds: 0, nanoseconds: 0 },
        parent: 1,
        parent_hash: 77,
    }
}

fn superblock() -> Superblock {
    let size_bytes = 1 << 30;
    Superblock {
        filesystem: FILESYSTEM,
        sequence: 3,
        compat: 0,
        read_only_compat: 0,
        incompat: 0,
        version: VERSION,
        version_minimum: VERSION,
        geometry: Geometry { block_bytes: 4096, bucket_bytes: 1 << 18, node_bytes: 1 << 15, metadata_replicas: 2 },
        members: vec![Member { uuid: [5; 16], size_bytes, bucket_count: size_bytes >> 18 }],
        layout: Layout {
            journal: vec![
                BucketRange { device: 0, first: 1, count: 16 },
                BucketRange { device: 0, first: 2049, count: 16 },
            ],
            checkpoints: vec![
                BucketRange { device: 0, first: 17, count: 2 },
                BucketRange { device: 0, first: 2065, count: 2 },
            ],
        },
        defaults: Defaults {
            label: "golden".into(),
            checksum: 1,
            compression: 2,
            compression_level: 3,
            created_at: 1_767_225_600,
            created_by: "a test".into(),
            hash_seed: 9,
        },
        errors: ErrorCounts { counts: vec![("data".into(), 2)] },
        unknown_sections: vec![(900, vec![1, 2, 3])],
    }
}

fn checkpoint() -> Checkpoint {
    let mut root = Vec::new();
    pointer().encode(&mut root);
    Checkpoint {
        number: 5,
        epoch: 2,
        first_replay: 100,
        first_replay_offset: 4096,
        previous_record_checksum: 0x1234_5678,
        newest_sequence: 120,
        roots: vec![Root { btree: 0, level: 1, pointer: root }],
        totals: vec![(0, 8192), (2, -1)],
        next_node: 77,
        clean: false,
        map: vec![MapPageReference { place: 3, checksum: 0x9999_0000 }],
        written_at: 1_767_225_600,
    }
}

fn record() -> (Vec<u8>, u32) {
    let mut payload = Vec::new();
    encode_key(BtreeId::Inodes, position(), Some(b"value"), &mut payload);
    encode_key(BtreeId::Inodes, position(), None, &mut payload);
    encode_accounting(AccountingCounter::DataBytes, -4096, &mut payload);
    encode_data_range(DeviceIndex(0), 1 << 20, 4096, ChecksumKind::Crc32c, 5, &mut payload);
    let header = RecordHeader {
        filesystem: FILESYSTEM,
        epoch: 2,
        sequence: JournalSequence(100),
        known_flushed: JournalSequence(98),
        previous_checksum: 0x1234_5678,
        payload_bytes: u32::try_from(payload.len()).unwrap(),
        entry_count: 4,
    };
    header.encode(&payload)
}

fn bset() -> (Vec<u8>, u32) {
    let mut payload = Vec::new();
    pack(position(), Some(b"value"), &mut payload);
    let header = BsetHeader {
        node: NodeId(0x1122),
        index: 1,
        previous_checksum: 0x0a0b_0c0d,
        key_count: 1,
        payload_bytes: u32::try_from(payload.len()).unwrap(),
        newest_sequence: JournalSequence(99),
    };
    header.encode(&payload)
}

fn dirents() -> DirentBucket {
    let dirent = |discriminator, name: &str| Dirent {
        discriminator,
        file_type: FileType::Regular,
        inode: InodeNumber(0x55),
        name: name.as_bytes().to_vec(),
    };
    DirentBucket(vec![dirent(0, "a"), dirent(3, "bc")])
}

fn xattrs() -> XattrBucket {
    XattrBucket(vec![Xattr { name: b"user.x".to_vec(), value: b"1".to_vec() }])
}

/// Every structure by name, encoded; small ones whole, large ones as length and checksum.
fn encoded() -> Vec<(&'static str, String)> {
    let mut packed = Vec::new();
    pack(position(), Some(b"value"), &mut packed);
    let mut whiteout = Vec::new();
    pack(position(), None, &mut whiteout);
    let mut encoded_pointer = Vec::new();
    pointer().encode(&mut encoded_pointer);
    let summary = |bytes: &[u8]| format!("{} bytes, {:08x}", bytes.len(), metadata_checksum(&[bytes]));
    let map = encode_map_page(FILESYSTEM, 7, &[MapEntry { device: 1, bucket: 0x1234, used: 0xff }]);
    let backpointer = Backpointer { btree: BtreeId::Extents, disk_bytes: 8192, position: position() };
    let bucket = Bucket { state: BucketState::Data, generation: 7, charged_bytes: 12_288 };
    vec![
        ("key", hex(&packed)),
        ("whiteout", hex(&whiteout)),
        ("node pointer", hex(&encoded_pointer)),
        ("node header", summary(&node_header().encode())),
        ("bset", hex(&bset().0)),
        ("journal record", hex(&record().0)),
        ("checkpoint", hex(&checkpoint().encode(FILESYSTEM).unwrap())),
        ("map page", summary(&map.0)),
        ("superblock", summary(&superblock().encode().unwrap())),
        ("data extent", hex(&data_extent().encode())),
        ("compressed extent", hex(&compressed_extent().encode())),
        ("inline extent", hex(&ExtentValue::Inline(b"inline".to_vec()).encode())),
        ("unwritten extent", hex(&ExtentValue::Unwritten { length: 4096 }.encode())),
        ("inode", hex(&inode().encode().unwrap())),
        ("dirents", hex(&dirents().encode())),
        ("xattrs", hex(&xattrs().encode())),
        ("logged operation", hex(&LoggedOperation::Truncate { inode: 300, size: 4096 }.encode().unwrap())),
        ("subvolume", hex(&Subvolume { snapshot: u32::MAX, root: 1 }.encode().unwrap())),
        ("snapshot", hex(&Snapshot { parent: 0, subvolume: 0 }.encode().unwrap())),
        ("bucket", hex(&bucket.encode())),
        ("free bucket", hex(&FreeBucket { discarded: true }.encode())),
        ("backpointer", hex(&backpointer.encode())),
        ("device usage", hex(&DeviceUsage { untouched_from: 64 }.encode())),
    ]
}

#[test]
fn golden_bytes() {
    let golden = include_str!("golden.txt");
    let expected: Vec<(&str, &str)> = golden.lines().filter_map(|line| line.split_once(": ")).collect();
    let found = encoded();
    let text: String = found.iter().map(|(name, bytes)| format!("{name}: {bytes}\n")).collect();
    assert_eq!(found.len(), expected.len(), "the structures are now:\n{text}");
    for ((name, bytes), (expected_name, expected_bytes)) in found.iter().zip(expected) {
        assert_eq!((*name, bytes.as_str()), (expected_name, expected_bytes), "the structures are now:\n{text}");
    }
}

#[test]
fn what_is_encoded_decodes_to_the_same() {
    assert_eq!(NodeHeader::decode(&node_header().encode()).unwrap(), node_header());
    let mut bytes = Vec::new();
    pointer().encode(&mut bytes);
    assert_eq!(NodePointer::decode(&bytes).unwrap(), pointer());
    let (bytes, checksum) = bset();
    let (header, payload, found) = BsetHeader::decode(&bytes).unwrap();
    assert_eq!((header.index, payload.len(), found), (1, packed_bytes(Some(b"value")), checksum));
    let (bytes, checksum) = record();
    let (header, payload, found) = RecordHeader::decode(&bytes).unwrap();
    assert_eq!((header.sequence, found), (JournalSequence(100), checksum));
    assert_eq!(Entries::new(payload).collect::<Result<Vec<_>, _>>().unwrap().len(), 4);
    let bytes = checkpoint().encode(FILESYSTEM).unwrap();
    assert_eq!(Checkpoint::decode(FILESYSTEM, &bytes).unwrap(), checkpoint());
    assert!(Checkpoint::decode(uuid::Uuid::nil(), &bytes).is_err(), "of another filesystem");
    let bytes = superblock().encode().unwrap();
    assert_eq!(bytes.len(), SUPERBLOCK_BYTES);
    assert_eq!(Superblock::decode(&bytes).unwrap(), superblock());
    for extent in [data_extent(), compressed_extent(), ExtentValue::Whiteout { length: 1 }] {
        assert_eq!(ExtentValue::decode(&extent.encode()).unwrap(), extent);
    }
    assert_eq!(Inode::decode(&inode().encode().unwrap()).unwrap(), inode());
    assert_eq!(DirentBucket::decode(&dirents().encode()).unwrap(), dirents());
    assert_eq!(XattrBucket::decode(&xattrs().encode()).unwrap(), xattrs());
    let entries = [MapEntry { device: 1, bucket: 0x1234, used: 0xff }];
    let (page, checksum) = encode_map_page(FILESYSTEM, 7, &entries);
    assert_eq!(decode_map_page(FILESYSTEM, 7, &page).unwrap(), (entries.to_vec(), checksum));
}

#[test]
fn an_unknown_incompatible_feature_is_a_clear_refusal() {
    let mut newer = superblock();
    newer.incompat = 1 << 40;
    let error = Superblock::decode(&newer.encode().unwrap()).unwrap_err();
    assert!(matches!(error, crate::Error::Unusable(_)), "{error}");
    assert!(error.to_string().contains("newer coppice"), "{error}");
}

/// Runs every decoder over the bytes. What matters is that it returns.
fn decode_everything(bytes: &[u8]) {
    let _ = Superblock::decode(bytes);
    let _ = NodeHeader::decode(bytes);
    let _ = NodePointer::decode(bytes);
    let _ = BsetHeader::decode(bytes);
    let _ = RecordHeader::peek(bytes);
    if let Ok((_, payload, _)) = RecordHeader::decode(bytes) {
        assert!(Entries::new(payload).count() <= payload.len());
    }
    assert!(Entries::new(bytes).count() <= bytes.len());
    let _ = Checkpoint::decode(FILESYSTEM, bytes);
    let _ = decode_map_page(FILESYSTEM, 0, bytes);
    let mut rest = bytes;
    while let Ok((key, left)) = unpack(rest) {
        assert_eq!(rest.len() - left.len(), packed_bytes(key.value));
        rest = left;
    }
    let _ = ExtentValue::decode(bytes);
    let _ = Inode::decode(bytes);
    let _ = DirentBucket::decode(bytes);
    let _ = XattrBucket::decode(bytes);
    let _ = LoggedOperation::decode(bytes);
    let _ = Subvolume::decode(bytes);
    let _ = Snapshot::decode(bytes);
    let _ = Bucket::decode(bytes);
    let _ = FreeBucket::decode(bytes);
    let _ = Backpointer::decode(bytes);
    let _ = DeviceUsage::decode(bytes);
}

/// Structures that are valid but for a few changed bytes get further than noise; checksums are made right again where they can be.
fn valid_structures() -> Vec<Vec<u8>> {
    let mut bytes = Vec::new();
    pointer().encode(&mut bytes);
    vec![
        bytes,
        node_header().encode(),
        bset().0,
        record().0,
        checkpoint().encode(FILESYSTEM).unwrap(),
        superblock().encode().unwrap(),
        data_extent().encode(),
        compressed_extent().encode(),
        inode().encode().unwrap(),
        dirents().encode(),
        xattrs().encode(),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn decoders_are_total_on_noise(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        decode_everything(&bytes);
    }

    #[test]
    fn decoders_are_total_on_damaged_structures(
        which in 0..11_usize,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in any::<prop::sample::Index>(),
        is_cut in any::<bool>(),
    ) {
        let mut bytes = valid_structures().swap_remove(which);
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if is_cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        decode_everything(&bytes);
    }

    #[test]
    fn entries_keep_their_keys(inode: u64, offset: u64, snapshot: u32, value in prop::option::of(prop::collection::vec(any::<u8>(), 0..50))) {
        let position = Position::new(inode, offset, snapshot);
        let mut payload = Vec::new();
        encode_key(BtreeId::Extents, position, value.as_deref(), &mut payload);
        let entries: Vec<_> = Entries::new(&payload).collect::<Result<_, _>>().unwrap();
        let is_same = matches!(&entries[..], [Entry::Key { btree: BtreeId::Extents, key }] if key.position == position && key.value == value.as_deref());
        prop_assert!(is_same, "{entries:?}");
    }

    #[test]
    fn positions_have_neighbours(inode: u64, offset: u64, snapshot: u32) {
        let position = Position::new(inode, offset, snapshot);
        if let Some(next) = position.successor() {
            prop_assert!(next > position);
            prop_assert_eq!(next.predecessor(), Some(position));
        } else {
            prop_assert_eq!(position, Position::MAX);
        }
    }
}
