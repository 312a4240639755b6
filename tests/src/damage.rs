//! Destroying chosen parts of an image file that nothing has open: checkpoint records, node-space maps, nodes, blocks of file data.
//!
//! What is destroyed is found as the filesystem itself finds it, through [`NodeReader`]; writes go to the file directly.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use coppicefs::btree::{NodeReader, PublishedNode, walk_published};
use coppicefs::device::{BlockDevice, FileDevice, FileOptions};
use coppicefs::format::checkpoint::{Checkpoint, MAP_PAGE_BYTES, RECORD_SLOT_BYTES, RECORD_SLOTS};
use coppicefs::format::extent::ExtentValue;
use coppicefs::format::node::{NodeAddress, NodePointer};
use coppicefs::format::superblock::Superblock;
use coppicefs::format::{BtreeId, Position};
use coppicefs::metrics::Metrics;
use coppicefs::recovery::superblock;

/// An image file, looked at between two openings.
pub struct Target {
    path: PathBuf,
    /// Its superblock.
    pub superblock: Superblock,
    /// Reads its nodes.
    pub reader: NodeReader,
}

impl Target {
    /// Looks at an image. Holds a shared lock on it until dropped.
    ///
    /// # Panics
    /// If it cannot be opened.
    pub fn open(path: &Path) -> Self {
        let options = FileOptions { read_only: true, ..FileOptions::default() };
        let device: Arc<dyn BlockDevice> = Arc::new(FileDevice::open(path, &options).unwrap());
        let superblock = superblock::read(&*device).unwrap().superblock;
        let reader = NodeReader::new(Arc::new(superblock.clone()), vec![device], Arc::new(Metrics::default()));
        Self { path: path.to_path_buf(), superblock, reader }
    }

    /// The valid checkpoints, newest first.
    pub fn checkpoints(&self) -> Vec<Checkpoint> {
        self.reader.checkpoints()
    }

    /// Overwrites a range of the file with a pattern that is nothing.
    ///
    /// # Panics
    /// If it cannot be written.
    pub fn destroy(&self, offset: u64, length: usize) {
        File::options().write(true).open(&self.path).unwrap().write_all_at(&vec![0x5a; length], offset).unwrap();
    }

    fn areas(&self) -> Vec<u64> {
        let bucket_bytes = u64::from(self.superblock.geometry.bucket_bytes);
        self.superblock.layout.checkpoints.iter().map(|range| range.first * bucket_bytes).collect()
    }

    /// The record of a checkpoint, in all copies.
    pub fn destroy_record(&self, number: u64) {
        for area in self.areas() {
            self.destroy(area + number % RECORD_SLOTS * RECORD_SLOT_BYTES as u64, 4096);
        }
    }

    /// The pages of a checkpoint's node-space map, in all copies. Checkpoints share pages.
    pub fn destroy_map(&self, checkpoint: &Checkpoint) {
        for (area, page) in
            self.areas().into_iter().flat_map(|area| checkpoint.map.iter().map(move |page| (area, page)))
        {
            let place = u64::from(page.place) * MAP_PAGE_BYTES as u64;
            self.destroy(area + RECORD_SLOTS * RECORD_SLOT_BYTES as u64 + place, MAP_PAGE_BYTES);
        }
    }

    /// One copy of a node: its last bytes, which the checkpoint that the pointer is from wrote.
    pub fn destroy_copy(&self, pointer: &NodePointer, copy: &NodeAddress) {
        let last = u64::from(pointer.written_bytes.saturating_sub(8));
        self.destroy(copy.offset + last, 8);
    }

    /// A node, in all copies.
    pub fn destroy_node(&self, pointer: &NodePointer) {
        for copy in &pointer.copies {
            self.destroy_copy(pointer, copy);
        }
    }

    /// The root of a tree.
    ///
    /// # Panics
    /// If the tree has none.
    pub fn root(&self, checkpoint: &Checkpoint, btree: BtreeId) -> NodePointer {
        let root = checkpoint.roots.iter().find(|root| root.btree == btree as u8).expect("a root");
        NodePointer::decode(&root.pointer).unwrap()
    }

    /// All nodes that a checkpoint reaches.
    ///
    /// # Panics
    /// If a root makes no sense.
    pub fn nodes(&self, checkpoint: &Checkpoint) -> Vec<(BtreeId, u8, NodePointer)> {
        let mut nodes = Vec::new();
        self.for_each_node(checkpoint, &mut |node| nodes.push((node.btree, node.level, node.pointer.clone())));
        nodes
    }

    /// Extents with data in buckets, by the checkpoint's images: the key and the offset on the device.
    ///
    /// # Panics
    /// If a root makes no sense.
    pub fn data(&self, checkpoint: &Checkpoint) -> Vec<(Position, u64, u32)> {
        let mut found = Vec::new();
        self.for_each_node(checkpoint, &mut |node| {
            if node.btree == BtreeId::Extents && node.level == 0 {
                for (position, value) in node.keys.as_ref().unwrap().iter() {
                    if let ExtentValue::Data(data) = ExtentValue::decode(value).unwrap() {
                        found.push((position, data.pointers.first().unwrap().offset, data.length));
                    }
                }
            }
        });
        found
    }

    fn for_each_node(&self, checkpoint: &Checkpoint, visit: &mut dyn FnMut(&PublishedNode)) {
        walk_published(&self.reader, checkpoint, &mut |node| {
            visit(node);
            Ok(())
        })
        .unwrap();
    }
}
