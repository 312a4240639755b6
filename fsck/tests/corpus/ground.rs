//! The filesystem that every case damages, and ways to look at one.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::sync::Arc;

use coppicefs::Result;
use coppicefs::btree::{NodeReader, walk_published};
use coppicefs::device::{BlockDevice, Image, SimDevice, SimOptions};
use coppicefs::env::Env;
use coppicefs::filesystem::format::test_geometry;
use coppicefs::filesystem::{Filesystem, OpenOptions, WorkerSet};
use coppicefs::format::namespace::FileType;
use coppicefs::format::{BtreeId, Position, Value};
use coppicefs::metrics::Metrics;
use coppicefs::options::CompressionChoice;
use coppicefs::transaction::{CommitOptions, Transaction};
use coppicefs::vfs::{Caller, Emitted, Lookup, ReadRequest, Vfs, WriteRequest};

pub const SNAPSHOT: u32 = u32::MAX;
pub const ROOT: u64 = 1;
const CALLER: Caller = Caller { uid: 0, gid: 0, pid: 1, umask: 0o022 };
const DEVICE_BYTES: u64 = 32 << 20;
const READ_BYTES: u32 = 64 << 10;
/// Trees whose keys are users'.
const PRIMARY: [BtreeId; 4] = [BtreeId::Extents, BtreeId::Inodes, BtreeId::Dirents, BtreeId::Xattrs];

/// What a path shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shown {
    pub inode: u64,
    pub file_type: FileType,
    pub permissions: u16,
    pub link_count: u32,
    /// Content by blocks of reading, target, or nothing; `None` for what is an error.
    pub content: Vec<Option<Vec<u8>>>,
    pub xattrs: Vec<u8>,
}

pub type Keys = BTreeMap<(BtreeId, Position), Value>;

/// A whole filesystem, and what it holds.
pub struct Ground {
    pub image: Image,
    /// The same, with the journal not replayed.
    pub unreplayed: Image,
    pub shown: BTreeMap<String, Shown>,
    pub keys: Keys,
    /// Where a file of the name "second" stands.
    pub second_hash: u64,
}

pub fn device_of(image: &Image) -> Arc<SimDevice> {
    Arc::new(SimDevice::from_image(image.clone(), SimOptions { block_bytes: 4096, ..SimOptions::default() }))
}

pub fn open(device: &Arc<SimDevice>, read_only: bool) -> Result<Arc<Filesystem>> {
    let options = OpenOptions { read_only, workers: WorkerSet::Essential, for_repair: true, ..options() };
    Filesystem::open(vec![Arc::clone(device) as _], &options)
}

fn options() -> OpenOptions {
    OpenOptions { cache_bytes: 8 << 20, env: Some(Env::simulated(1)), ..OpenOptions::default() }
}

fn create(vfs: &Vfs, parent: u64, name: &str, content: &[u8]) -> u64 {
    let (entry, opened) = vfs.create(&CALLER, parent, OsStr::new(name), 0o644, 2).unwrap();
    let node = entry.attributes.node;
    for (index, data) in content.chunks(READ_BYTES as usize).enumerate() {
        let request = WriteRequest::new(node, opened.handle, index as u64 * u64::from(READ_BYTES), data);
        assert_eq!(vfs.write(&CALLER, &request).unwrap() as usize, data.len());
    }
    vfs.fsync(&CALLER, node, opened.handle, false).unwrap();
    vfs.release(node, opened.handle).unwrap();
    node
}

/// Bytes that differ in each block.
pub fn content(seed: u64, length: usize) -> Vec<u8> {
    (0..length as u64).map(|at| (at / 7 + at / 4096 * 31 + seed * 17) as u8).collect()
}

impl Ground {
    /// Directories, many files in extents and inline, compressed or not, links of both kinds, attributes: enough for trees of several leaves.
    pub fn made() -> Self {
        let device = device_of(&Image::new(DEVICE_BYTES));
        let as_device: Arc<dyn BlockDevice> = Arc::clone(&device) as _;
        Filesystem::format(&as_device, &test_geometry(), &Env::simulated(1)).unwrap();
        for (part, compression) in [CompressionChoice::None, CompressionChoice::Lz4].into_iter().enumerate() {
            let options = OpenOptions { compression: Some(compression), ..options() };
            let filesystem = Filesystem::open(vec![Arc::clone(&device) as _], &options).unwrap();
            let vfs = filesystem.vfs();
            for folder in 0..3 {
                let name = format!("folder {part} {folder}");
                let directory = vfs.mkdir(&CALLER, ROOT, OsStr::new(&name), 0o755).unwrap().attributes.node;
                let inner = vfs.mkdir(&CALLER, directory, OsStr::new("inner"), 0o700).unwrap().attributes.node;
                create(vfs, inner, "deep", b"deep down");
                for file in 0..40_u64 {
                    let length = if file % 8 == 7 { 300 } else { 5000 + 1500 * file as usize };
                    let node = create(vfs, directory, &format!("file {file}"), &content(file + 100 * folder, length));
                    let value = vec![b'v'; 60];
                    vfs.set_xattr(&CALLER, node, OsStr::new("user.number"), &value, 0).unwrap();
                    if file == 0 {
                        vfs.link(&CALLER, node, ROOT, OsStr::new(&format!("hard link {part} {folder}"))).unwrap();
                    }
                }
                vfs.symlink(&CALLER, ROOT, OsStr::new(&format!("symbolic {part} {folder}")), b"folder 0 0").unwrap();
            }
            filesystem.sync().unwrap();
            filesystem.close().unwrap();
            filesystem.env().unregister_all();
        }
        let image = device.image();
        let second_hash = open(&device, true).unwrap().namespace().hash(b"second");
        let unreplayed = {
            let filesystem = Filesystem::open(vec![Arc::clone(&device) as _], &options()).unwrap();
            for number in 0..6 {
                create(filesystem.vfs(), ROOT, &format!("late {number}"), &content(number, 9000));
            }
            filesystem.sync().unwrap();
            let snapshot = device.snapshot().everything();
            // It has crashed: the workers hold the filesystem, and the scheduler holds them.
            filesystem.env().unregister_all();
            snapshot
        };
        let (shown, keys) = (shown(&image), keys(&image));
        Self { image, unreplayed, shown, keys, second_hash }
    }

    /// The inode at a path.
    pub fn inode(&self, path: &str) -> u64 {
        self.shown.get(path).unwrap_or_else(|| panic!("no {path}")).inode
    }

    /// The keys of an inode in a tree.
    pub fn of(&self, btree: BtreeId, inode: u64) -> Vec<(Position, Value)> {
        let range = (btree, Position::new(inode, 0, 0))..=(btree, Position::new(inode, u64::MAX, u32::MAX));
        self.keys.range(range).map(|((_, position), value)| (*position, Arc::clone(value))).collect()
    }

    /// All keys of a tree.
    pub fn all(&self, btree: BtreeId) -> Vec<(Position, Value)> {
        let range = (btree, Position::MIN)..=(btree, Position::MAX);
        self.keys.range(range).map(|((_, position), value)| (*position, Arc::clone(value))).collect()
    }

    /// Nodes of a tree at a level: range and copies, but for the root.
    pub fn nodes(&self, btree: BtreeId, level: u8) -> Vec<(Position, Position, Vec<u64>)> {
        nodes_of(&self.image, btree, level)
    }
}

/// Nodes of a tree at a level: range and copies, but for the root.
pub fn nodes_of(image: &Image, btree: BtreeId, level: u8) -> Vec<(Position, Position, Vec<u64>)> {
    let filesystem = open(&device_of(image), true).unwrap();
    let superblock = Arc::new(filesystem.superblock().clone());
    let reader = NodeReader::new(superblock, filesystem.devices().to_vec(), Arc::new(Metrics::default()));
    let mut found = Vec::new();
    walk_published(&reader, &filesystem.opening().newest, &mut |node| {
        let is_root = node.minimum == Position::MIN && node.limit.is_none();
        if node.btree == btree && node.level == level && !is_root {
            let last = node.limit.and_then(Position::predecessor).unwrap_or(Position::MAX);
            found.push((node.minimum, last, node.copies.iter().map(|(copy, _)| copy.offset).collect()));
        }
        Ok(())
    })
    .unwrap();
    filesystem.close().unwrap();
    found
}

/// Changes keys with no trigger, and closes.
pub fn with_keys(image: &Image, change: &dyn Fn(&mut Transaction<'_>) -> Result<()>) -> Image {
    let device = device_of(image);
    let filesystem = open(&device, false).unwrap();
    let raw = CommitOptions { raw: true, ..CommitOptions::default() };
    filesystem.transactions().run(raw, |transaction| change(transaction)).unwrap();
    filesystem.close().unwrap();
    device.image()
}

/// Writes the first block of a file as a mount would.
pub fn with_block_written(image: &Image, inode: u64, data: &[u8]) -> Image {
    let device = device_of(image);
    let filesystem = Filesystem::open(vec![Arc::clone(&device) as _], &options()).unwrap();
    let vfs = filesystem.vfs();
    let opened = vfs.open(&CALLER, inode, 2).unwrap();
    let request = WriteRequest::new(inode, opened.handle, 0, data);
    assert_eq!(vfs.write(&CALLER, &request).unwrap() as usize, data.len());
    vfs.fsync(&CALLER, inode, opened.handle, false).unwrap();
    vfs.release(inode, opened.handle).unwrap();
    filesystem.close().unwrap();
    filesystem.env().unregister_all();
    device.image()
}

/// All keys of all trees.
pub fn keys(image: &Image) -> Keys {
    let filesystem = open(&device_of(image), true).unwrap();
    let mut keys = Keys::new();
    for btree in BtreeId::ALL {
        let found = filesystem.transactions().read().range(btree, Position::MIN, Position::MAX, usize::MAX).unwrap();
        keys.extend(found.into_iter().map(|(position, value)| ((btree, position), value)));
    }
    filesystem.close().unwrap();
    keys
}

/// All that a mount shows, by path.
pub fn shown(image: &Image) -> BTreeMap<String, Shown> {
    let filesystem = open(&device_of(image), true).unwrap();
    let mut shown = BTreeMap::new();
    walk(filesystem.vfs(), ROOT, "", &mut shown);
    filesystem.close().unwrap();
    filesystem.env().unregister_all();
    shown
}

fn walk(vfs: &Vfs, directory: u64, path: &str, shown: &mut BTreeMap<String, Shown>) {
    let opened = vfs.opendir(&CALLER, directory, 0).unwrap();
    let mut names = Vec::new();
    vfs.readdir(&CALLER, directory, opened.handle, 0, &mut |entry| {
        names.push(entry.name.to_owned());
        Emitted::Accepted
    })
    .unwrap();
    vfs.releasedir(directory, opened.handle).unwrap();
    for name in names.iter().filter(|name| *name != "." && *name != "..") {
        let path = format!("{path}/{}", name.to_str().unwrap());
        let Lookup::Found(entry) = vfs.lookup(&CALLER, directory, name).unwrap() else { panic!("{path} is not there") };
        let attributes = entry.attributes;
        let node = attributes.node;
        let content = match attributes.file_type {
            FileType::Symlink => vec![vfs.readlink(&CALLER, node).ok()],
            FileType::Regular => read(vfs, node, attributes.size_bytes),
            _ => Vec::new(),
        };
        let one = Shown {
            inode: node,
            file_type: attributes.file_type,
            permissions: attributes.permissions,
            link_count: attributes.link_count,
            content,
            xattrs: vfs.list_xattrs(&CALLER, node).unwrap(),
        };
        shown.insert(path.clone(), one);
        if attributes.file_type == FileType::Directory {
            walk(vfs, node, &path, shown);
        }
        vfs.forget(node, 1);
    }
}

fn read(vfs: &Vfs, node: u64, size_bytes: u64) -> Vec<Option<Vec<u8>>> {
    let opened = vfs.open(&CALLER, node, 0).unwrap();
    let blocks = (0..size_bytes).step_by(4096);
    let content = blocks.map(|offset| {
        let request = ReadRequest { node, handle: opened.handle, offset, length_bytes: 4096, direct: true };
        let pages = vfs.read(&CALLER, &request).ok()?;
        let mut bytes = Vec::new();
        pages.slices().for_each(|slice| bytes.extend_from_slice(slice));
        Some(bytes)
    });
    let content = content.collect();
    vfs.release(node, opened.handle).unwrap();
    content
}

/// Keys of users that are not as they were, by inode.
pub fn changed_inodes(before: &Keys, after: &Keys) -> BTreeSet<u64> {
    let all: BTreeSet<_> = before.keys().chain(after.keys()).copied().collect();
    let primary = all.into_iter().filter(|(btree, _)| PRIMARY.contains(btree));
    primary.filter(|key| before.get(key) != after.get(key)).map(|(_, position)| position.inode).collect()
}
