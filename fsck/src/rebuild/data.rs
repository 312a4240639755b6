//! File data: which extents are kept. Each is checked against its bytes.
//!
//! Extents of one file that overlap, and extents of any files that claim the same space, come from leaves of different age: the one whose data fits
//! its checksums stays, or else the one of the higher generation, or the newer one. An extent that nobody contests stays even where its data is bad: that is
//! damage, reads as an error, and is reported. Data without checksums in a bucket that was emptied since is another file's, and goes.
//!
//! Memory: a line for each extent, and a batch of data.

use std::collections::{BTreeSet, HashMap, HashSet};

use coppicefs::Result;
use coppicefs::data::extents::Shape;
use coppicefs::device::{BlockDevice, ReadRequest};
use coppicefs::format::extent::{DataExtent, ExtentValue};
use coppicefs::format::namespace::FileType;
use coppicefs::format::space::Bucket;
use coppicefs::format::superblock::Superblock;
use coppicefs::format::{BtreeId, ChecksumKind, CompressionKind};
use coppicefs::memory::AlignedBuffer;
use coppicefs::units::SnapshotId;
use rayon::prelude::*;
use serde::Serialize;

use super::inodes::{Existence, Inodes};
use super::tree::{Recovered, Trees};

/// Bytes of data that are checked together.
const BATCH_BYTES: u64 = 16 << 20;
/// Extents that are checked together.
const BATCH_EXTENTS: usize = 512;

/// A part of a file that is not there, or cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct FileRange {
    /// Inode number.
    pub inode: u64,
    /// First byte.
    pub start: u64,
    /// First byte behind.
    pub end: u64,
}

/// What was decided about the extents.
#[derive(Debug, Default)]
pub struct Extents {
    /// Keys that are not kept: inode and end.
    pub dropped: HashSet<(u64, u64)>,
    /// Of those, what a file loses by it.
    pub lost: Vec<FileRange>,
    /// Kept, but the data does not fit its checksums.
    pub damaged: Vec<FileRange>,
    /// Buckets with data that is kept.
    pub live: BTreeSet<u64>,
    /// Buckets as the buckets tree had them.
    pub stored: HashMap<u64, Bucket>,
    /// The highest generation of each bucket.
    pub generations: HashMap<u64, u32>,
    /// Keys that belong to files that were deleted.
    pub stale: u64,
    /// Keys that mean nothing.
    pub undecodable: u64,
    /// Bytes that were checked.
    pub checked_bytes: u64,
}

/// Where an extent's bytes are.
#[derive(Clone, Copy, Debug)]
struct Place {
    offset: u64,
    bytes: u32,
    key: FileRange,
    known: u64,
    generation: u32,
    /// Of a hundred blocks, how many fit their checksums.
    good: u8,
    is_checked: bool,
    is_frame: bool,
}

/// One extent that waits to be checked.
struct Waiting {
    key: FileRange,
    known: u64,
    data: DataExtent,
}

struct Pass<'a> {
    trees: &'a Trees<'a>,
    device: &'a dyn BlockDevice,
    shape: Shape,
    progress: &'a (dyn Fn(u64) + Sync),
    found: Extents,
    places: Vec<Place>,
    /// Extents with the parts of them that are damaged.
    damaged: Vec<(FileRange, FileRange)>,
    waiting: Vec<Waiting>,
    waiting_bytes: u64,
    /// The extent before, of the same inode.
    last: Option<(FileRange, u64)>,
}

/// Decides about all extents; makes up inodes whose data was found without them. `progress` is called with the bytes that were checked.
///
/// # Errors
/// No memory; none of damage.
pub fn decide(
    trees: &Trees<'_>,
    device: &dyn BlockDevice,
    superblock: &Superblock,
    inodes: &mut Inodes,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<Extents> {
    let shape = Shape {
        block_bytes: superblock.geometry.block_bytes,
        bucket_bytes: superblock.geometry.bucket_bytes,
        device_bytes: superblock.members.iter().map(|member| member.size_bytes).collect(),
    };
    let mut pass = Pass {
        trees,
        device,
        shape,
        progress,
        found: Extents::default(),
        places: Vec::new(),
        damaged: Vec::new(),
        waiting: Vec::new(),
        waiting_bytes: 0,
        last: None,
    };
    let bucket_count = superblock.members.first().map_or(0, |member| member.bucket_count);
    trees.for_each(BtreeId::Buckets, |key| {
        let is_one = key.position.inode == 0 && key.position.offset < bucket_count;
        if let (true, Ok(bucket)) = (is_one, Bucket::decode(&key.value)) {
            pass.found.stored.insert(key.position.offset, bucket);
        }
        Ok(())
    })?;
    trees.for_each(BtreeId::Extents, |key| pass.extent(superblock, inodes, &key))?;
    pass.check_waiting()?;
    pass.settle();
    Ok(pass.found)
}

impl Pass<'_> {
    fn drop_key(&mut self, key: FileRange, is_loss: bool) {
        if self.found.dropped.insert((key.inode, key.end)) && is_loss {
            self.found.lost.push(key);
        }
    }

    fn extent(&mut self, superblock: &Superblock, inodes: &mut Inodes, key: &Recovered) -> Result<()> {
        let position = key.position;
        let nothing = FileRange { inode: position.inode, start: position.offset, end: position.offset };
        let decoded = match self.shape.decode(position, &key.value) {
            Ok(extent) if position.snapshot == SnapshotId::ROOT.0 => extent,
            _ => {
                self.found.undecodable += 1;
                self.drop_key(nothing, false);
                return Ok(());
            }
        };
        let range = FileRange { inode: position.inode, start: decoded.start(), end: position.offset };
        let is_reserved = |data: &DataExtent| {
            let mut pointers = data.pointers.iter();
            let bucket_count = superblock.members.first().map_or(0, |member| member.bucket_count);
            pointers.any(|at| {
                let bucket = self.shape.bucket_of(at).0;
                bucket >= bucket_count || superblock.is_reserved(at.device.0, bucket)
            })
        };
        if let ExtentValue::Data(data) = &decoded.value
            && is_reserved(data)
        {
            self.found.undecodable += 1;
            self.drop_key(range, false);
            return Ok(());
        }
        if !self.belongs(inodes, range, key.known, &decoded.value) || !self.fits_before(range, key.known) {
            return Ok(());
        }
        if let Some(facts) = inodes.facts.get_mut(&range.inode) {
            facts.has_extents = true;
            if facts.is_made_up {
                facts.size = facts.size.max(range.end);
            }
        }
        self.last = Some((range, key.known));
        if let ExtentValue::Data(data) = decoded.value {
            self.waiting_bytes += u64::from(data.disk_bytes) * data.pointers.len() as u64;
            self.waiting.push(Waiting { key: range, known: key.known, data });
            if self.waiting_bytes >= BATCH_BYTES || self.waiting.len() >= BATCH_EXTENTS {
                self.check_waiting()?;
            }
        }
        Ok(())
    }

    /// Whether there is a file for it, and it is inside of it.
    fn belongs(&mut self, inodes: &mut Inodes, range: FileRange, known: u64, value: &ExtentValue) -> bool {
        match inodes.existence(self.trees, range.inode, known) {
            Existence::Deleted => {
                self.found.stale += 1;
                self.drop_key(range, false);
                return false;
            }
            Existence::Lost => {
                inodes.make_up(range.inode, None);
            }
            Existence::Exists => {}
        }
        let Some(facts) = inodes.facts.get(&range.inode) else { return false };
        let has_data = matches!(facts.file_type, Some(FileType::Regular | FileType::Symlink) | None);
        // What a truncation has cut off, unless it is still to be moved.
        let is_beyond = !facts.is_made_up
            && matches!(value, ExtentValue::Data(_))
            && range.start >= self.shape.block_ceiling(facts.size)
            && !inodes.logged.contains(&range.inode);
        // The target of a symbolic link is one inline extent, as long as the link says.
        let is_no_target = facts.file_type == Some(FileType::Symlink)
            && !matches!(value, ExtentValue::Inline(target) if facts.is_made_up || target.len() as u64 == facts.size);
        if !has_data || is_beyond || is_no_target {
            self.found.stale += 1;
            self.drop_key(range, false);
            return false;
        }
        true
    }

    /// Whether it is kept beside the extent before it in the file; the older one of two that overlap goes.
    fn fits_before(&mut self, range: FileRange, known: u64) -> bool {
        let Some((before, before_known)) = self.last else { return true };
        if before.inode != range.inode || before.end <= range.start {
            return true;
        }
        if known <= before_known {
            self.drop_key(range, true);
            return false;
        }
        self.drop_key(before, true);
        true
    }

    fn check_waiting(&mut self) -> Result<()> {
        let waiting = std::mem::take(&mut self.waiting);
        self.waiting_bytes = 0;
        let mut buffers = Vec::new();
        for (index, extent) in waiting.iter().enumerate() {
            for pointer in &extent.data.pointers {
                buffers.push((index, pointer.offset, AlignedBuffer::try_zeroed(extent.data.disk_bytes as usize)?));
            }
        }
        let mut is_read = vec![false; buffers.len()];
        let mut requests: Vec<ReadRequest<'_>> =
            buffers.iter_mut().map(|(_, offset, buffer)| ReadRequest { offset: *offset, buffer }).collect();
        self.device.read_batch(&mut requests, &mut |index, outcome| {
            if let Some(flag) = is_read.get_mut(index) {
                *flag = outcome.is_ok();
            }
        });
        drop(requests);
        let mut copies: Vec<Vec<&[u8]>> = vec![Vec::new(); waiting.len()];
        for ((index, _, buffer), is_read) in buffers.iter().zip(is_read) {
            if let (true, Some(list)) = (is_read, copies.get_mut(*index)) {
                list.push(buffer);
            }
        }
        let outcomes: Vec<(u8, Vec<FileRange>)> = waiting
            .par_iter()
            .zip(&copies)
            .map(|(extent, copies)| check_data(extent.key, &extent.data, copies))
            .collect();
        for (extent, (good, damaged)) in waiting.iter().zip(outcomes) {
            let Waiting { key, known, data } = extent;
            self.found.checked_bytes += u64::from(data.disk_bytes);
            (self.progress)(u64::from(data.disk_bytes));
            self.damaged.extend(damaged.into_iter().map(|range| (*key, range)));
            self.places.extend(data.pointers.iter().map(|pointer| Place {
                offset: pointer.offset,
                bytes: data.disk_bytes,
                key: *key,
                known: *known,
                generation: pointer.generation,
                good,
                is_checked: data.checksum_kind != ChecksumKind::None,
                is_frame: data.compression != CompressionKind::None,
            }));
        }
        Ok(())
    }

    /// Who has what space, when all that claim some are known.
    fn settle(&mut self) {
        let bucket_bytes = u64::from(self.shape.bucket_bytes).max(1);
        let mut places = std::mem::take(&mut self.places);
        places.retain(|place| !self.found.dropped.contains(&(place.key.inode, place.key.end)));
        for (bucket, stored) in &self.found.stored {
            self.found.generations.insert(*bucket, stored.generation);
        }
        for place in &places {
            let newest = self.found.generations.entry(place.offset / bucket_bytes).or_default();
            *newest = place.generation.max(*newest);
        }
        for place in places.iter().filter(|place| !place.is_checked) {
            let newest = self.found.generations.get(&(place.offset / bucket_bytes)).copied().unwrap_or(0);
            if place.generation < newest {
                self.drop_key(place.key, true);
            }
        }
        places.sort_by_key(|place| (place.offset, place.bytes, place.key));
        let mut kept: Vec<Place> = Vec::new();
        for place in places {
            if self.found.dropped.contains(&(place.key.inode, place.key.end)) {
                continue;
            }
            let mut is_kept = true;
            while let Some(before) = kept.last() {
                let is_apart = before.offset + u64::from(before.bytes) <= place.offset;
                let is_one_frame =
                    before.is_frame && place.is_frame && (before.offset, before.bytes) == (place.offset, place.bytes);
                if is_apart || is_one_frame {
                    break;
                }
                let rank = |place: &Place| (place.good, place.generation, place.known);
                if rank(&place) <= rank(before) {
                    is_kept = false;
                    break;
                }
                let loser = before.key;
                kept.pop();
                self.drop_key(loser, true);
            }
            if is_kept {
                kept.push(place);
            } else {
                self.drop_key(place.key, true);
            }
        }
        let dropped = &self.found.dropped;
        kept.retain(|place| !dropped.contains(&(place.key.inode, place.key.end)));
        let damaged = std::mem::take(&mut self.damaged);
        let is_kept = |(key, _): &(FileRange, FileRange)| !dropped.contains(&(key.inode, key.end));
        self.found.damaged = damaged.into_iter().filter(is_kept).map(|(_, range)| range).collect();
        self.found.live = kept.iter().map(|place| place.offset / bucket_bytes).collect();
    }
}

/// Of a hundred blocks, how many fit their checksums in some copy, and which parts of the file do not.
fn check_data(key: FileRange, data: &DataExtent, copies: &[&[u8]]) -> (u8, Vec<FileRange>) {
    if data.checksum_kind == ChecksumKind::None {
        return if copies.is_empty() { (0, vec![key]) } else { (50, Vec::new()) };
    }
    let fits = |start: usize, length: usize, checksum: u64| {
        copies.iter().any(|copy| {
            let bytes = start.checked_add(length).and_then(|end| copy.get(start..end));
            bytes.is_some_and(|bytes| data.checksum_kind.compute(bytes) == checksum)
        })
    };
    if data.compression != CompressionKind::None {
        let is_good = data.checksums.first().is_some_and(|checksum| fits(0, data.stream_bytes as usize, *checksum));
        return if is_good { (100, Vec::new()) } else { (0, vec![key]) };
    }
    let block = data.length as usize / data.checksums.len().max(1);
    let mut damaged: Vec<FileRange> = Vec::new();
    let mut good = 0;
    for (index, checksum) in data.checksums.iter().enumerate() {
        if fits(index * block, block, *checksum) {
            good += 1;
            continue;
        }
        let start = key.start + (index * block) as u64;
        match damaged.last_mut() {
            Some(last) if last.end == start => last.end += block as u64,
            _ => damaged.push(FileRange { inode: key.inode, start, end: start + block as u64 }),
        }
    }
    let share = good * 100 / data.checksums.len().max(1);
    (u8::try_from(share).unwrap_or(100), damaged)
}
