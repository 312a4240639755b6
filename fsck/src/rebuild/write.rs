//! The new trees: what was found, sorted and made consistent, and what follows from it made anew.
//!
//! The same walk counts (`-n`) and writes. The order is that of what is needed to know: extents say what inodes hold, names give inodes
//! their link counts, and buckets come last, when all nodes but theirs have a place.

use std::collections::BTreeMap;

use coppicefs::btree::BulkWriter;
use coppicefs::data::extents::allocated_bytes;
use coppicefs::env::Timestamp;
use coppicefs::format::extent::ExtentValue;
use coppicefs::format::journal::AccountingCounter;
use coppicefs::format::key::packed_bytes;
use coppicefs::format::namespace::{
    Dirent, DirentBucket, FileType, Inode, LoggedOperation, Snapshot, Subvolume, Xattr, XattrBucket,
};
use coppicefs::format::space::{Backpointer, Bucket, BucketState, DeviceUsage, FreeBucket};
use coppicefs::format::superblock::Superblock;
use coppicefs::format::{BtreeId, CompressionKind, Position};
use coppicefs::journal::Totals;
use coppicefs::units::{InodeNumber, SnapshotId};
use coppicefs::{Error, Result};

use super::data::Extents;
use super::inodes::{Facts, Inodes, inode_position};
use super::tree::Trees;

const SNAPSHOT: u32 = SnapshotId::ROOT.0;
const ROOT: u64 = InodeNumber::ROOT.0;
/// Names that one hash may have in a directory: readdir's cookies count them with seven bits.
const NAMES_OF_A_HASH_MAX: usize = 128;

/// What is written to, or only counted.
pub trait Sink {
    /// Begins a tree.
    fn begin(&mut self, btree: BtreeId);
    /// Adds a key; ascending.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it is too long: it is left out then. Others end the rebuild.
    fn push(&mut self, position: Position, value: Vec<u8>) -> Result<()>;
    /// Ends the tree.
    ///
    /// # Errors
    /// The device's, and no space.
    fn end(&mut self) -> Result<()>;
}

impl Sink for BulkWriter {
    fn begin(&mut self, btree: BtreeId) {
        Self::begin(self, btree);
    }

    fn push(&mut self, position: Position, value: Vec<u8>) -> Result<()> {
        Self::push(self, position, value)
    }

    fn end(&mut self) -> Result<()> {
        Self::end(self)
    }
}

/// Nothing is written.
#[derive(Debug, Default)]
pub struct Counting;

impl Sink for Counting {
    fn begin(&mut self, _: BtreeId) {}

    fn push(&mut self, _: Position, _: Vec<u8>) -> Result<()> {
        Ok(())
    }

    fn end(&mut self) -> Result<()> {
        Ok(())
    }
}

/// What the walk has seen.
#[derive(Debug, Default)]
pub struct Written {
    /// Bytes charged, by bucket.
    pub charged: BTreeMap<u64, u64>,
    /// The global counters.
    pub totals: Totals,
    /// Directories, regular files, symbolic links, others.
    pub inode_counts: [u64; 4],
    /// Names.
    pub names: u64,
    /// Bytes of regular files, by their sizes.
    pub file_bytes: u64,
    /// Names that name nothing that is left.
    pub dropped_names: u64,
    /// Keys that are too long for a node.
    pub too_long: u64,
}

/// The walk.
pub struct Walk<'a, S: Sink> {
    /// What was found.
    pub trees: &'a Trees<'a>,
    /// The superblock of the result.
    pub superblock: &'a Superblock,
    /// All inodes; counts are added.
    pub inodes: &'a mut Inodes,
    /// What was decided about the extents.
    pub extents: &'a Extents,
    /// Where it goes.
    pub sink: &'a mut S,
    /// The time that inodes which are made up get.
    pub now: Timestamp,
    /// What it comes to.
    pub written: Written,
}

/// Hash of a name: as the namespace of this superblock has it.
fn hash(superblock: &Superblock, name: &[u8]) -> u64 {
    coppicefs::namespace::name_hash(superblock.defaults.hash_seed, name)
}

impl<S: Sink> Walk<'_, S> {
    /// Writes every tree but those of buckets.
    ///
    /// # Errors
    /// The sink's.
    pub fn run(&mut self) -> Result<()> {
        let mut backpointers = self.extents()?;
        self.dirents()?;
        self.xattrs()?;
        self.inodes()?;
        self.orphans()?;
        self.logged_operations()?;
        self.subvolumes()?;
        backpointers.sort_unstable_by_key(|(position, _)| *position);
        backpointers.dedup_by_key(|(position, _)| *position);
        self.sink.begin(BtreeId::Backpointers);
        for (position, backpointer) in backpointers {
            self.put(position, backpointer.encode())?;
        }
        self.sink.end()
    }

    fn put(&mut self, position: Position, value: Vec<u8>) -> Result<()> {
        match self.sink.push(position, value) {
            Err(Error::Invalid(reason)) => {
                tracing::warn!("a key is left out: {reason}");
                self.written.too_long += 1;
                Ok(())
            }
            other => other,
        }
    }

    fn extents(&mut self) -> Result<Vec<(Position, Backpointer)>> {
        let mut backpointers = Vec::new();
        let trees = self.trees;
        self.sink.begin(BtreeId::Extents);
        trees.for_each(BtreeId::Extents, |key| {
            let position = key.position;
            let inode = position.inode;
            if position.snapshot != SNAPSHOT || self.extents.dropped.contains(&(inode, position.offset)) {
                return Ok(());
            }
            // Decoded once before: what does not decode was dropped.
            let (Ok(mut value), Some(facts)) = (ExtentValue::decode(&key.value), self.inodes.facts.get_mut(&inode))
            else {
                return Ok(());
            };
            facts.allocated_bytes += allocated_bytes(&value);
            self.count_extent(&mut value, position, &mut backpointers);
            self.put(position, value.encode())
        })?;
        self.sink.end()?;
        Ok(backpointers)
    }

    /// Counts an extent as the space's triggers do, and gives its pointers the generation that their buckets get.
    fn count_extent(
        &mut self,
        value: &mut ExtentValue,
        position: Position,
        backpointers: &mut Vec<(Position, Backpointer)>,
    ) {
        let signed = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
        let geometry = self.superblock.geometry;
        let totals = &mut self.written.totals;
        match value {
            ExtentValue::Inline(bytes) => totals.add(AccountingCounter::InlineBytes, signed(bytes.len() as u64)),
            ExtentValue::Unwritten { length } => totals.add(AccountingCounter::ReservedBytes, i64::from(*length)),
            ExtentValue::Whiteout { .. } => {}
            ExtentValue::Data(data) => {
                let charged = data.charged_bytes();
                let all = i64::from(charged) * signed(data.pointers.len() as u64);
                totals.add(AccountingCounter::DataBytes, all);
                if data.compression != CompressionKind::None {
                    totals.add(AccountingCounter::CompressedLogicalBytes, data.length.into());
                    totals.add(AccountingCounter::CompressedDiskBytes, all);
                }
                let block = u64::from(data.frame_offset / geometry.block_bytes.max(1));
                for pointer in &mut data.pointers {
                    let bucket_bytes = u64::from(geometry.bucket_bytes);
                    let (bucket, within) = (pointer.offset / bucket_bytes, pointer.offset % bucket_bytes);
                    *self.written.charged.entry(bucket).or_default() += u64::from(charged);
                    if let Some(generation) = self.extents.generations.get(&bucket) {
                        pointer.generation = *generation;
                    }
                    let place =
                        Position::new(u64::from(pointer.device.0) << 48 | bucket, within << 32 | block, SNAPSHOT);
                    let backpointer = Backpointer { btree: BtreeId::Extents, disk_bytes: data.disk_bytes, position };
                    backpointers.push((place, backpointer));
                }
            }
        }
    }

    /// Directory by directory, each hashed anew.
    fn dirents(&mut self) -> Result<()> {
        let trees = self.trees;
        let mut directory = 0;
        let mut entries: Vec<(u64, u64, Dirent)> = Vec::new();
        self.sink.begin(BtreeId::Dirents);
        trees.for_each(BtreeId::Dirents, |key| {
            if key.position.inode != directory {
                self.directory(directory, std::mem::take(&mut entries))?;
                directory = key.position.inode;
            }
            let bucket = DirentBucket::decode(&key.value).ok().filter(|_| key.position.snapshot == SNAPSHOT);
            for mut dirent in bucket.map(|bucket| bucket.0).unwrap_or_default() {
                match self.inodes.keeps(key.position, &dirent) {
                    Some(file_type) => {
                        dirent.file_type = file_type;
                        entries.push((hash(self.superblock, &dirent.name), key.position.offset, dirent));
                    }
                    None => self.written.dropped_names += 1,
                }
            }
            Ok(())
        })?;
        self.directory(directory, entries)?;
        self.sink.end()
    }

    fn directory(&mut self, directory: u64, mut entries: Vec<(u64, u64, Dirent)>) -> Result<()> {
        entries.sort_by(|a, b| (a.0, &a.2.name, a.1).cmp(&(b.0, &b.2.name, b.1)));
        let before = entries.len();
        entries.dedup_by(|a, b| a.2.name == b.2.name);
        self.written.dropped_names += (before - entries.len()) as u64;
        for of_hash in entries.chunk_by(|a, b| a.0 == b.0) {
            let mut bucket = DirentBucket::default();
            for (at, found_at, dirent) in of_hash.iter().take(NAMES_OF_A_HASH_MAX) {
                let discriminator = u8::try_from(bucket.0.len()).unwrap_or(u8::MAX);
                bucket.0.push(Dirent { discriminator, ..dirent.clone() });
                self.inodes.count_name(directory, *found_at, *at, dirent.inode.0);
                self.written.names += 1;
            }
            if let Some((at, ..)) = of_hash.first() {
                self.put(Position::new(directory, *at, SNAPSHOT), bucket.encode())?;
            }
        }
        Ok(())
    }

    fn xattrs(&mut self) -> Result<()> {
        let trees = self.trees;
        let mut inode = 0;
        let mut found: Vec<(u64, Xattr)> = Vec::new();
        self.sink.begin(BtreeId::Xattrs);
        trees.for_each(BtreeId::Xattrs, |key| {
            if key.position.inode != inode {
                self.xattrs_of(inode, std::mem::take(&mut found))?;
                inode = key.position.inode;
            }
            if self.inodes.facts.contains_key(&inode)
                && key.position.snapshot == SNAPSHOT
                && let Ok(bucket) = XattrBucket::decode(&key.value)
            {
                found.extend(bucket.0.into_iter().map(|xattr| (hash(self.superblock, &xattr.name), xattr)));
            }
            Ok(())
        })?;
        self.xattrs_of(inode, found)?;
        self.sink.end()
    }

    fn xattrs_of(&mut self, inode: u64, mut found: Vec<(u64, Xattr)>) -> Result<()> {
        found.sort_by(|a, b| (a.0, &a.1.name).cmp(&(b.0, &b.1.name)));
        found.dedup_by(|a, b| a.1.name == b.1.name);
        for of_hash in found.chunk_by(|a, b| a.0 == b.0) {
            let bucket = XattrBucket(of_hash.iter().map(|(_, xattr)| xattr.clone()).collect());
            if let Some((at, _)) = of_hash.first() {
                self.put(Position::new(inode, *at, SNAPSHOT), bucket.encode())?;
            }
        }
        Ok(())
    }

    fn inodes(&mut self) -> Result<()> {
        let trees = self.trees;
        self.sink.begin(BtreeId::Inodes);
        let mut next = 0;
        trees.for_each(BtreeId::Inodes, |key| {
            let number = key.position.inode;
            if key.position != inode_position(number) || !self.inodes.facts.contains_key(&number) {
                return Ok(());
            }
            self.made_up_inodes(next, Some(number))?;
            next = number.saturating_add(1);
            // One that does not decode may have been made up: the root.
            self.inode(number, Inode::decode(&key.value).ok())
        })?;
        self.made_up_inodes(next, None)?;
        self.sink.end()
    }

    /// Those from `from` on, below `to`, that have no key.
    fn made_up_inodes(&mut self, from: u64, to: Option<u64>) -> Result<()> {
        let all = self.inodes.facts.range(from..).map(|(number, _)| *number);
        let numbers: Vec<u64> = all.take_while(|number| to.is_none_or(|to| *number < to)).collect();
        numbers.into_iter().try_for_each(|number| self.inode(number, None))
    }

    fn inode(&mut self, number: u64, found: Option<Inode>) -> Result<()> {
        let Some(facts) = self.inodes.facts.get(&number) else { return Ok(()) };
        let inode = Facts::inode(facts, number, found, self.now);
        let kind = match facts.file_type {
            Some(FileType::Directory) => 0,
            Some(FileType::Regular) => 1,
            Some(FileType::Symlink) => 2,
            _ => 3,
        };
        if kind == 1 {
            self.written.file_bytes = self.written.file_bytes.saturating_add(inode.size);
        }
        if let Some(count) = self.written.inode_counts.get_mut(kind) {
            *count += 1;
        }
        self.written.totals.add(AccountingCounter::Inodes, 1);
        let value = inode.encode()?;
        self.put(inode_position(number), value)
    }

    fn orphans(&mut self) -> Result<()> {
        let trees = self.trees;
        self.sink.begin(BtreeId::Orphans);
        trees.for_each(BtreeId::Orphans, |key| {
            let facts = self.inodes.facts.get(&key.position.offset);
            if key.position == Position::new(0, key.position.offset, SNAPSHOT)
                && facts.is_some_and(|facts| facts.names == 0 && key.position.offset != ROOT)
            {
                self.put(key.position, Vec::new())?;
            }
            Ok(())
        })?;
        self.sink.end()
    }

    fn logged_operations(&mut self) -> Result<()> {
        let trees = self.trees;
        self.sink.begin(BtreeId::LoggedOperations);
        trees.for_each(BtreeId::LoggedOperations, |key| {
            let operation = LoggedOperation::decode(&key.value).ok();
            if operation.is_some_and(|operation| self.inodes.facts.contains_key(&operation.inode())) {
                self.put(key.position, key.value.to_vec())?;
            }
            Ok(())
        })?;
        self.sink.end()
    }

    /// The one subvolume and snapshot that there are.
    fn subvolumes(&mut self) -> Result<()> {
        self.sink.begin(BtreeId::Subvolumes);
        self.put(Position::MIN, Subvolume { snapshot: SNAPSHOT, root: ROOT }.encode()?)?;
        self.sink.end()?;
        self.sink.begin(BtreeId::Snapshots);
        let snapshot = Snapshot { parent: 0, subvolume: 0 };
        self.put(Position::new(0, SNAPSHOT.into(), 0), snapshot.encode()?)?;
        self.sink.end()
    }
}

/// Writes the trees of buckets; all others are written. Adds the counters of buckets to `written`.
///
/// # Errors
/// The device's, and no space.
pub fn write_buckets(
    writer: &mut BulkWriter,
    superblock: &Superblock,
    extents: &Extents,
    written: &mut Written,
) -> Result<()> {
    let bucket_count = superblock.members.first().map_or(0, |member| member.bucket_count);
    let key_bytes = packed_bytes(None) + 16;
    let leaf_keys = (writer.filled_bytes() / key_bytes).max(1);
    // At most as many keys as there are buckets, in the buckets tree and in the free-space tree; their parents; the tree of devices.
    let leaves = usize::try_from(bucket_count).unwrap_or(usize::MAX) / leaf_keys + 1;
    writer.claim_for(2 * (leaves + leaves / 8 + 4) + 2)?;
    let of_nodes: std::collections::BTreeSet<u64> = writer.buckets().into_iter().collect();
    let is_free = |bucket: u64| {
        !superblock.is_reserved(0, bucket) && !of_nodes.contains(&bucket) && !written.charged.contains_key(&bucket)
    };
    let highest = [of_nodes.last(), written.charged.keys().next_back(), extents.generations.keys().max()];
    let mark = highest.into_iter().flatten().max().map_or(0, |bucket| bucket + 1).min(bucket_count);
    writer.begin(BtreeId::Buckets);
    for bucket in 0..mark {
        let known = extents.generations.get(&bucket).copied();
        let generation = known.unwrap_or(0);
        let value = if let Some(&charged_bytes) = written.charged.get(&bucket) {
            Bucket { state: BucketState::Data, generation, charged_bytes }
        } else if of_nodes.contains(&bucket) {
            Bucket { state: BucketState::Metadata, generation, charged_bytes: 0 }
        } else if known.is_some() && is_free(bucket) {
            // No pointer of an earlier life fits it.
            Bucket { state: BucketState::Free, generation: generation.wrapping_add(1), charged_bytes: 0 }
        } else {
            continue;
        };
        writer.push(Position::new(0, bucket, 0), value.encode())?;
    }
    writer.end()?;
    writer.begin(BtreeId::FreeSpace);
    for bucket in (0..mark).filter(|&bucket| is_free(bucket)) {
        writer.push(Position::new(0, bucket, 0), FreeBucket { discarded: false }.encode())?;
    }
    writer.end()?;
    writer.begin(BtreeId::NeedDiscard);
    writer.end()?;
    writer.begin(BtreeId::Devices);
    writer.push(Position::MIN, DeviceUsage { untouched_from: mark }.encode())?;
    writer.end()?;
    let signed = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
    written.totals.add(AccountingCounter::DataBuckets, signed(written.charged.len()));
    written.totals.add(AccountingCounter::MetadataBuckets, signed(of_nodes.len()));
    Ok(())
}
