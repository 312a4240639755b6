//! A node-space map that is lost: nothing can be written without it, and all that it says can be found by walking the trees. And roots of trees that are lost,
//! where all that these say follows from others, or is known, or is work that is noted elsewhere, too: such trees begin anew, empty, and are filled by the
//! ordinary repairs.
//!
//! Before anything is opened: the walked map becomes that of a new checkpoint record, which names what the newest one names otherwise. Its pages go where no
//! kept record has any, and are durable before the record is written, as in a checkpoint; so a cut at any moment leaves the old state or the new one.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use coppicefs::btree::{NodeReader, walk_published};
use coppicefs::device::BlockDevice;
use coppicefs::format::checkpoint::{
    Checkpoint, MAP_PAGE_BYTES, MAP_PAGE_ENTRIES, MapEntry, MapPageReference, RECORD_SLOT_BYTES, RECORD_SLOTS,
    encode_map_page,
};
use coppicefs::format::space::{Bucket, BucketState};
use coppicefs::format::superblock::Superblock;
use coppicefs::format::{BtreeId, Position};
use coppicefs::metrics::Metrics;
use coppicefs::recovery::{choose_without_map, superblock};
use coppicefs::{Error, Result};

use crate::problem::Problem;

/// Bytes of an area before the pages of maps.
const PAGES_START: u64 = RECORD_SLOTS * RECORD_SLOT_BYTES as u64;

/// A map, or roots, that are lost in all copies, where the rest of their checkpoint can be used, and no other checkpoint.
pub struct LostMap {
    superblock: Arc<Superblock>,
    reader: NodeReader,
    /// Without the roots that are lost.
    record: Checkpoint,
    /// Number of the record that is to have the new map.
    number: u64,
    problems: Vec<Problem>,
}

/// Trees that can begin anew.
const RENEWABLE: [BtreeId; 9] = [
    BtreeId::Buckets,
    BtreeId::FreeSpace,
    BtreeId::NeedDiscard,
    BtreeId::Backpointers,
    BtreeId::Devices,
    BtreeId::Subvolumes,
    BtreeId::Snapshots,
    BtreeId::Orphans,
    BtreeId::LoggedOperations,
];

/// Looks whether the map, or roots of trees that can begin anew, are what keeps a filesystem from being opened.
///
/// # Errors
/// Those of reading the superblock.
pub fn lost_map(devices: &[Arc<dyn BlockDevice>]) -> Result<Option<LostMap>> {
    let first = devices.first().ok_or_else(|| Error::Invalid("a filesystem needs a device".into()))?;
    let superblock = Arc::new(superblock::read(&**first)?.superblock);
    let reader = NodeReader::new(Arc::clone(&superblock), devices.to_vec(), Arc::new(Metrics::default()));
    if reader.choose_checkpoint().is_ok() {
        return Ok(None);
    }
    let records = reader.checkpoints();
    let highest = records.first().map_or(0, |record| record.number);
    let found = match choose_without_map(&reader) {
        Some((index, record, _)) => Some((index, record, Vec::new())),
        None => records.iter().enumerate().find_map(|(index, record)| {
            let (kept, problems) = without_renewable(&reader, record)?;
            Some((index, kept, problems))
        }),
    };
    Ok(found.map(|(index, record, mut problems)| {
        if let Err(error) = reader.read_map(&record) {
            problems.insert(0, Problem::NodeMapLost { number: record.number, reason: error.to_string() });
        }
        // It goes over a record that cannot be used, not over one that is kept.
        let number = highest.saturating_add(if index == 0 { 1 } else { RECORD_SLOTS });
        LostMap { superblock, reader, record, number, problems }
    }))
}

/// A checkpoint without the roots that are lost, if its trees can begin anew, and those roots.
fn without_renewable(reader: &NodeReader, record: &Checkpoint) -> Option<(Checkpoint, Vec<Problem>)> {
    let mut kept = Checkpoint { roots: Vec::new(), ..record.clone() };
    let mut problems = Vec::new();
    for root in &record.roots {
        let alone = Checkpoint { roots: vec![root.clone()], map: Vec::new(), ..record.clone() };
        let Err(error) = reader.verify(&alone) else {
            kept.roots.push(root.clone());
            continue;
        };
        let btree = RENEWABLE.into_iter().find(|btree| *btree as u8 == root.btree)?;
        let (from, to, reason) = (Position::MIN, Position::MAX, error.to_string());
        problems.push(Problem::NodeUnreadable { btree, level: root.level, from, to, reason });
    }
    Some((kept, problems))
}

impl LostMap {
    /// What is wrong, in terms of the table.
    #[must_use]
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }

    /// Makes the map again, and publishes it.
    ///
    /// # Errors
    /// [`Error::Corrupt`] if an interior node is lost, too: what lies below it is not found without a scan of the device. The devices'.
    pub fn repair(&self, devices: &[Arc<dyn BlockDevice>]) -> Result<()> {
        let entries = self.walk()?;
        let places = self.free_places();
        let pages: Vec<&[MapEntry]> = entries.chunks(MAP_PAGE_ENTRIES).collect();
        if places.len() < pages.len() {
            return Err(Error::NoSpace("the checkpoint area has no place for the node-space map"));
        }
        let mut map = Vec::with_capacity(pages.len());
        for ((page, entries), &place) in (0..).zip(pages).zip(&places) {
            let (bytes, checksum) = encode_map_page(self.superblock.filesystem, page, entries);
            self.write(devices, PAGES_START + u64::from(place) * MAP_PAGE_BYTES as u64, &bytes)?;
            map.push(MapPageReference { place, checksum });
        }
        devices.iter().try_for_each(|device| device.flush())?;
        let record = Checkpoint { number: self.number, map, ..self.record.clone() };
        let mut bytes = record.encode(self.superblock.filesystem)?;
        bytes.resize(bytes.len().next_multiple_of(4096), 0);
        self.write(devices, self.number % RECORD_SLOTS * RECORD_SLOT_BYTES as u64, &bytes)?;
        devices.iter().try_for_each(|device| device.flush())
    }

    /// Writes to all copies of the area.
    fn write(&self, devices: &[Arc<dyn BlockDevice>], offset: u64, bytes: &[u8]) -> Result<()> {
        let bucket_bytes = u64::from(self.superblock.geometry.bucket_bytes);
        for area in &self.superblock.layout.checkpoints {
            let missing = || Error::corrupt("superblock", format!("its checkpoint area is on device {}", area.device));
            let device = devices.get(usize::from(area.device)).ok_or_else(missing)?;
            device.write(area.first * bucket_bytes + offset, bytes)?;
        }
        Ok(())
    }

    /// The slots of all nodes, and the buckets that were claimed for more.
    fn walk(&self) -> Result<Vec<MapEntry>> {
        let bucket_bytes = u64::from(self.superblock.geometry.bucket_bytes);
        let node_bytes = u64::from(self.superblock.geometry.node_bytes);
        let mut used: BTreeMap<(u8, u64), u64> = BTreeMap::new();
        walk_published(&self.reader, &self.record, &mut |node| {
            for (address, _) in &node.copies {
                let slot = u32::try_from(address.offset % bucket_bytes / node_bytes).unwrap_or(u32::MAX);
                *used.entry((address.device.0, address.offset / bucket_bytes)).or_default() |=
                    1_u64.checked_shl(slot).unwrap_or(0);
            }
            match &node.keys {
                Err(error) if node.level > 0 => return Err(error.clone()),
                Ok(keys) if node.btree == BtreeId::Buckets && node.level == 0 => {
                    let of_nodes = keys.iter().filter(|(_, value)| {
                        Bucket::decode(value).is_ok_and(|bucket| bucket.state == BucketState::Metadata)
                    });
                    for (position, _) in of_nodes {
                        let device = u8::try_from(position.inode).unwrap_or(u8::MAX);
                        if self.is_bucket(device, position.offset) {
                            used.entry((device, position.offset)).or_default();
                        }
                    }
                }
                _ => {}
            }
            Ok(())
        })?;
        Ok(used.into_iter().map(|((device, bucket), used)| MapEntry { device, bucket, used }).collect())
    }

    fn is_bucket(&self, device: u8, bucket: u64) -> bool {
        let member = self.superblock.members.get(usize::from(device));
        member.is_some_and(|member| bucket < member.bucket_count) && !self.superblock.is_reserved(device, bucket)
    }

    /// Places for pages that no record uses; if those are too few, that neither of the two newest does.
    fn free_places(&self) -> Vec<u32> {
        let count = self.superblock.layout.checkpoints.first().map_or(0, |area| area.count);
        let bytes = count.saturating_mul(u64::from(self.superblock.geometry.bucket_bytes));
        let places = u32::try_from(bytes.saturating_sub(PAGES_START) / MAP_PAGE_BYTES as u64).unwrap_or(u32::MAX);
        let records = self.reader.checkpoints();
        let free_of = |records: &[Checkpoint]| -> Vec<u32> {
            let taken: BTreeSet<u32> =
                records.iter().flat_map(|record| &record.map).map(|reference| reference.place).collect();
            (0..places).filter(|place| !taken.contains(place)).collect()
        };
        let needed = self.record.map.len();
        let free = free_of(&records);
        if free.len() > needed { free } else { free_of(records.get(..2).unwrap_or(&records)) }
    }
}
