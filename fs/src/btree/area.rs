//! The checkpoint area: reading and writing records and map pages, and choosing the checkpoint to open.
//!
//! Every copy of the area holds the same: [`RECORD_SLOTS`] slots for records, then places for map pages. Record `n` lies in slot
//! `n % RECORD_SLOTS`, so the newest and the one before are never overwritten; map pages go to places that neither of them uses.

use std::collections::BTreeSet;

use super::image::{Expected, LEVEL_MAX};
use super::reader::NodeReader;
use super::{Opening, PassedOver};
use crate::device::{BlockDevice, WriteRequest};
use crate::error::{Corruption, Error, Result};
use crate::format::checkpoint::{
    Checkpoint, MAP_PAGE_BYTES, MapEntry, MapPageReference, RECORD_SLOT_BYTES, RECORD_SLOTS, decode_map_page,
    encode_map_page,
};
use crate::format::node::NodePointer;
use crate::format::superblock::BucketRange;
use crate::format::{BtreeId, Position};
use crate::sync::Arc;
use crate::units::DeviceIndex;

/// Bytes from the start of a copy to the first map page.
pub(super) const MAP_START: u64 = RECORD_SLOTS * RECORD_SLOT_BYTES as u64;

/// What the slots for records hold.
struct Records {
    /// Valid ones, newest first, each once.
    records: Vec<Checkpoint>,
    /// Slots that were written at some time.
    written: [bool; RECORD_SLOTS as usize],
}

impl Records {
    /// The record after the newest valid one, if its slot holds something else than what stood there before.
    fn lost_newest(&self) -> Option<PassedOver> {
        let number = self.records.first()?.number + 1;
        let slot = number % RECORD_SLOTS;
        let is_held = self.records.iter().any(|record| record.number % RECORD_SLOTS == slot);
        let is_written = self.written.get(usize::try_from(slot).ok()?).copied().unwrap_or(false);
        // From the fifth on each slot held one before.
        (!is_held && (is_written || number > RECORD_SLOTS)).then(|| PassedOver {
            number,
            reason: "its record is not whole in any copy (the power was cut while it was written, or it is damaged)"
                .into(),
            is_damage: false,
        })
    }
}

impl NodeReader {
    pub(super) fn area_copies(&self) -> impl Iterator<Item = (DeviceIndex, u64)> {
        let bucket_bytes = u64::from(self.superblock.geometry.bucket_bytes);
        let start = move |range: &BucketRange| (DeviceIndex(range.device), range.first * bucket_bytes);
        self.superblock.layout.checkpoints.iter().map(start)
    }

    /// Number of places for map pages.
    pub(super) fn map_places(&self) -> u32 {
        let count = self.superblock.layout.checkpoints.first().map_or(0, |range| range.count);
        let bytes = count * u64::from(self.superblock.geometry.bucket_bytes);
        u32::try_from(bytes.saturating_sub(MAP_START) / MAP_PAGE_BYTES as u64).unwrap_or(u32::MAX)
    }

    pub(super) fn area_device(&self, device: DeviceIndex) -> Result<&Arc<dyn BlockDevice>> {
        let missing = || Error::corrupt("superblock", format!("its checkpoint area is on missing device {device}"));
        self.devices.get(usize::from(device.0)).ok_or_else(missing)
    }

    /// What the slots of all copies hold.
    fn records(&self) -> Records {
        let mut records: Vec<Checkpoint> = Vec::new();
        let mut written = [false; RECORD_SLOTS as usize];
        let mut buffer = vec![0; RECORD_SLOT_BYTES];
        for (device, start) in self.area_copies() {
            for slot in 0..RECORD_SLOTS {
                let offset = start + slot * RECORD_SLOT_BYTES as u64;
                let read = self.area_device(device).and_then(|device| device.read(offset, &mut buffer));
                if let Some(written) = written.get_mut(usize::try_from(slot).unwrap_or(usize::MAX)) {
                    // mkfs fills the slots with zeros.
                    *written |= read.is_err() || buffer.iter().any(|&byte| byte != 0);
                }
                let decoded = read.and_then(|()| Ok(Checkpoint::decode(self.superblock.filesystem, &buffer)?));
                match decoded {
                    Ok(record) if record.number % RECORD_SLOTS == slot => {
                        if !records.iter().any(|known| known.number == record.number) {
                            records.push(record);
                        }
                    }
                    Ok(record) => tracing::warn!("checkpoint record {} lies in slot {slot}", record.number),
                    // Slots that were never written are the rule in a young filesystem.
                    Err(error) => tracing::debug!("checkpoint record slot {slot} of device {device}: {error}"),
                }
            }
        }
        records.sort_by_key(|record| std::cmp::Reverse(record.number));
        Records { records, written }
    }

    /// Reads a page of a checkpoint's map.
    fn map_page(&self, index: usize, reference: MapPageReference) -> Result<Vec<MapEntry>> {
        let page = u32::try_from(index).unwrap_or(u32::MAX);
        let mut last_error = Error::corrupt(format!("node-space map page {page}"), "it has no copies");
        if reference.place >= self.map_places() {
            return Err(Error::corrupt(format!("node-space map page {page}"), format!("place {}", reference.place)));
        }
        for (device, start) in self.area_copies() {
            let offset = start + MAP_START + u64::from(reference.place) * MAP_PAGE_BYTES as u64;
            let mut buffer = vec![0; MAP_PAGE_BYTES];
            let read = self.area_device(device).and_then(|device| device.read(offset, &mut buffer));
            match read.and_then(|()| Ok(decode_map_page(self.superblock.filesystem, page, &buffer)?)) {
                Ok((entries, checksum)) if checksum == reference.checksum => return Ok(entries),
                Ok(_) => {
                    let what = format!("node-space map page {page}");
                    last_error = Corruption::new(what, "of another checkpoint").at(device, offset).into();
                }
                Err(error) => last_error = error,
            }
        }
        Err(last_error)
    }

    /// All pages of a checkpoint's node-space map, by index.
    ///
    /// # Errors
    /// If a page is bad in all copies.
    pub fn read_map(&self, checkpoint: &Checkpoint) -> Result<Vec<Vec<MapEntry>>> {
        checkpoint.map.iter().enumerate().map(|(index, &reference)| self.map_page(index, reference)).collect()
    }

    /// All checkpoints whose records can be read, newest first.
    #[must_use]
    pub fn checkpoints(&self) -> Vec<Checkpoint> {
        self.records().records
    }

    /// The checkpoint whose record should be there and is not whole in any copy, if there is one: newer than all others.
    #[must_use]
    pub fn lost_record(&self) -> Option<PassedOver> {
        self.records().lost_newest()
    }

    /// Whether the map and all roots of a checkpoint can be read.
    ///
    /// # Errors
    /// Says what cannot.
    pub fn verify(&self, checkpoint: &Checkpoint) -> Result<()> {
        self.read_map(checkpoint)?;
        for root in &checkpoint.roots {
            let btree = BtreeId::from_stored(root.btree)?;
            if root.level >= LEVEL_MAX {
                return Err(Error::corrupt(
                    format!("root of the {} tree", btree.name()),
                    format!("level {}", root.level),
                ));
            }
            let expected = Expected { btree, level: root.level, minimum: Position::MIN, limit: None };
            self.read(&NodePointer::decode(&root.pointer)?, &expected)?;
        }
        Ok(())
    }

    /// Chooses the checkpoint to open: the newest whose record, map and roots can be read. With the journal from its F on, each
    /// gives the same present state.
    ///
    /// # Errors
    /// If there is none.
    pub fn choose_checkpoint(&self) -> Result<Opening> {
        let found = self.records();
        let highest = found.records.first().map_or(0, |record| record.number);
        let mut passed_over: Vec<PassedOver> = found.lost_newest().into_iter().collect();
        let mut problem = Error::corrupt("checkpoint area", "it holds no valid record");
        for (index, record) in found.records.iter().enumerate() {
            match self.verify(record) {
                Ok(()) => {
                    let mut older = found.records.iter().skip(index + 1);
                    let previous = older.find(|older| self.read_map(older).is_ok()).cloned();
                    // The next record goes over one that cannot be used, not over one that is kept.
                    let next_number = if index == 0 { highest + 1 } else { highest + RECORD_SLOTS };
                    for passed in &passed_over {
                        tracing::warn!(
                            "checkpoint {} cannot be used: {}. Checkpoint {} is used instead: with the journal, which is kept for it, nothing is lost",
                            passed.number,
                            passed.reason,
                            record.number
                        );
                    }
                    return Ok(Opening { newest: record.clone(), previous, next_number, passed_over });
                }
                Err(error) => {
                    passed_over.push(PassedOver { number: record.number, reason: error.to_string(), is_damage: true });
                    problem = error;
                }
            }
        }
        for passed in &passed_over {
            tracing::warn!("checkpoint {} cannot be used: {}", passed.number, passed.reason);
        }
        Err(problem)
    }

    /// Writes map pages that differ from what the newest checkpoint's references hold, and gives the references of the new map.
    /// Durable after the next device flush.
    pub(super) fn write_map(
        &self,
        pages: &[Vec<MapEntry>],
        published: &[Vec<MapEntry>],
        newest: &[MapPageReference],
        previous: &[MapPageReference],
    ) -> Result<Vec<MapPageReference>> {
        let mut taken: BTreeSet<u32> = newest.iter().chain(previous).map(|reference| reference.place).collect();
        let mut next_place = 0;
        let mut references = Vec::with_capacity(pages.len());
        let mut writes = Vec::new();
        for (index, entries) in pages.iter().enumerate() {
            if let (Some(reference), true) = (newest.get(index), published.get(index) == Some(entries)) {
                references.push(*reference);
                continue;
            }
            while taken.contains(&next_place) {
                next_place += 1;
            }
            if next_place >= self.map_places() {
                return Err(Error::NoSpace("the checkpoint area has no place for the node-space map"));
            }
            taken.insert(next_place);
            let page = u32::try_from(index).unwrap_or(u32::MAX);
            let (bytes, checksum) = encode_map_page(self.superblock.filesystem, page, entries);
            references.push(MapPageReference { place: next_place, checksum });
            writes.push((MAP_START + u64::from(next_place) * MAP_PAGE_BYTES as u64, bytes));
        }
        self.write_area(&writes)?;
        Ok(references)
    }

    /// Writes a record to its slot. Durable after the next device flush.
    pub(super) fn write_record(&self, checkpoint: &Checkpoint) -> Result<()> {
        let mut bytes = checkpoint.encode(self.superblock.filesystem)?;
        bytes.resize(bytes.len().next_multiple_of(4096), 0);
        self.write_area(&[(checkpoint.number % RECORD_SLOTS * RECORD_SLOT_BYTES as u64, bytes)])
    }

    /// Empties the slots of all records. Durable after the next device flush.
    pub(super) fn erase_records(&self) -> Result<()> {
        let slots = (0..RECORD_SLOTS).map(|slot| (slot * RECORD_SLOT_BYTES as u64, vec![0; RECORD_SLOT_BYTES]));
        self.write_area(&slots.collect::<Vec<_>>())
    }

    /// The newest record that is whole, and the highest number of any, whether or not what they name can be read.
    #[must_use]
    pub fn newest_record(&self) -> Option<Checkpoint> {
        self.records().records.into_iter().next()
    }

    fn write_area(&self, writes: &[(u64, Vec<u8>)]) -> Result<()> {
        for (device, start) in self.area_copies() {
            let requests: Vec<WriteRequest<'_>> = writes
                .iter()
                .map(|(offset, bytes)| WriteRequest { offset: start + offset, data: vec![bytes.as_slice()] })
                .collect();
            if !requests.is_empty() {
                self.area_device(device)?.write_batch(&requests)?;
            }
        }
        Ok(())
    }

    /// Flushes all devices.
    pub(super) fn flush(&self) -> Result<()> {
        self.devices.iter().try_for_each(|device| device.flush())
    }
}
