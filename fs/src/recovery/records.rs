//! Reading a journal that no checkpoint says where to start in: all records that are whole, and which of them are the log.
//!
//! A mount's first record stands where the chain of the one before was cut, with a higher epoch: so of two records of one sequence the
//! higher epoch is the log's, and whatever has a lower epoch than a record of a lower sequence was cut off. What is left is a rising sequence; a step over
//! missing records is damage where D says that they were durable, and the end of the log where it does not.
//!
//! Memory: a line for each record; payloads are read when they are asked for. No locks.

use std::collections::{BTreeMap, HashMap};

use crate::device::BlockDevice;
use crate::error::{Corruption, Error, Result};
use crate::format::ChecksumKind;
use crate::format::journal::{Entries, Entry, RECORD_ALIGNMENT_BYTES, RecordHeader};
use crate::units::{round_down, round_up};

/// Bytes read at once.
const WINDOW_BYTES: u64 = 4 << 20;
/// The largest record that anybody writes, with room to spare.
const RECORD_BYTES_MAX: u64 = 64 << 20;
/// How many times its size may be read of an area, for records that turn out bad.
const BAD_RECORD_BUDGET: u64 = 4;
/// Longest range of data that may complete alongside a record.
const DATA_RANGE_BYTES_MAX: u32 = 16 << 20;

const BLOCK_BYTES: u64 = RECORD_ALIGNMENT_BYTES as u64;

/// A record that was found whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FoundRecord {
    /// Its header.
    pub header: RecordHeader,
    /// Its checksum.
    pub checksum: u32,
    /// Byte offset on the device.
    pub offset: u64,
}

/// A journal as it was found.
#[derive(Clone, Debug, Default)]
pub struct FoundLog {
    /// The log, oldest record first.
    pub records: Vec<FoundRecord>,
    /// Sequences of durable records that are missing in it, as ranges `[first, end)`.
    pub missing: Vec<(u64, u64)>,
    /// Highest epoch of any record.
    pub highest_epoch: u64,
    /// Highest sequence, and D, of any record.
    pub highest_sequence: u64,
    /// Highest D of the log.
    pub known_flushed: u64,
}

impl FoundLog {
    /// From this sequence on nothing is missing, up to the end; `None` if there is no record.
    #[must_use]
    pub fn whole_from(&self) -> Option<u64> {
        let first = self.records.first()?.header.sequence.0;
        Some(self.missing.last().map_or(first, |(_, end)| *end))
    }
}

/// Reads all records in the byte ranges `areas` of the device, the copies of one ring. `identity` is the journal's id; if it is not known, the
/// newest decides that has records at one place in all copies: what files hold does not lie so.
#[must_use]
pub fn find_log(device: &dyn BlockDevice, areas: &[(u64, u64)], identity: Option<uuid::Uuid>) -> FoundLog {
    let mut found: Vec<FoundRecord> = Vec::new();
    let mut copies: HashMap<(u64, u32, uuid::Uuid), usize> = HashMap::new();
    for &(start, end) in areas {
        let before = found.len();
        Area { device, start, end: end.min(device.size_bytes()), window: Vec::new(), window_start: 0 }
            .collect(&mut found);
        for record in found.iter().skip(before) {
            *copies.entry((record.offset - start, record.checksum, record.header.filesystem)).or_default() += 1;
        }
    }
    let identity = identity.or_else(|| {
        let most = copies.values().copied().max()?;
        let in_all = |record: &&FoundRecord| {
            areas.iter().any(|(start, _)| {
                let place = record.offset.checked_sub(*start);
                place.and_then(|place| copies.get(&(place, record.checksum, record.header.filesystem))) == Some(&most)
            })
        };
        found.iter().filter(in_all).max_by_key(|record| record.header.epoch).map(|record| record.header.filesystem)
    });
    found.retain(|record| Some(record.header.filesystem) == identity);
    choose(&found)
}

/// Which of the records are the log.
fn choose(found: &[FoundRecord]) -> FoundLog {
    let mut log = FoundLog {
        highest_epoch: found.iter().map(|record| record.header.epoch).max().unwrap_or(0),
        highest_sequence: found
            .iter()
            .map(|record| record.header.sequence.0.max(record.header.known_flushed.0))
            .max()
            .unwrap_or(0),
        ..FoundLog::default()
    };
    let mut newest: BTreeMap<u64, FoundRecord> = BTreeMap::new();
    for record in found {
        let known = newest.entry(record.header.sequence.0).or_insert(*record);
        if record.header.epoch > known.header.epoch {
            *known = *record;
        }
    }
    let mut epoch = 0;
    newest.retain(|_, record| {
        let is_cut_off = record.header.epoch < epoch;
        epoch = epoch.max(record.header.epoch);
        !is_cut_off
    });
    log.known_flushed = newest.values().map(|record| record.header.known_flushed.0).max().unwrap_or(0);
    for record in newest.into_values() {
        if let Some(last) = log.records.last() {
            let expected = last.header.sequence.0.saturating_add(1);
            let sequence = record.header.sequence.0;
            if sequence != expected || record.header.previous_checksum != last.checksum {
                if expected > log.known_flushed {
                    break;
                }
                log.missing.push((expected, sequence));
            }
        }
        log.records.push(record);
    }
    if let Some(last) = log.records.last() {
        let next = last.header.sequence.0.saturating_add(1);
        if log.known_flushed >= next {
            log.missing.push((next, log.known_flushed.saturating_add(1)));
        }
    }
    log
}

/// A range of the device that may hold records.
struct Area<'a> {
    device: &'a dyn BlockDevice,
    start: u64,
    end: u64,
    window: Vec<u8>,
    window_start: u64,
}

impl Area<'_> {
    fn bytes(&mut self, offset: u64, length: u64) -> Option<&[u8]> {
        let end = offset.checked_add(length).filter(|end| *end <= self.end)?;
        let window_end = self.window_start + self.window.len() as u64;
        if offset < self.window_start || end > window_end {
            for wanted in [length.max(WINDOW_BYTES).min(self.end - offset), length] {
                self.window.resize(usize::try_from(wanted).ok()?, 0);
                self.window_start = offset;
                if self.device.read(offset, &mut self.window).is_ok() {
                    break;
                }
                self.window.clear();
            }
        }
        let skip = usize::try_from(offset.checked_sub(self.window_start)?).ok()?;
        self.window.get(skip..)?.get(..usize::try_from(length).ok()?)
    }

    fn collect(mut self, found: &mut Vec<FoundRecord>) {
        let mut budget = self.end.saturating_sub(self.start).saturating_mul(BAD_RECORD_BUDGET);
        let mut offset = round_up(self.start, BLOCK_BYTES);
        while offset < self.end {
            let Some(length) = self.peek(offset) else {
                offset += BLOCK_BYTES;
                continue;
            };
            let Some(left) = budget.checked_sub(length) else { return };
            budget = left;
            match self.bytes(offset, length).map(RecordHeader::decode) {
                Some(Ok((header, _, checksum))) => {
                    found.push(FoundRecord { header, checksum, offset });
                    offset += length;
                }
                _ => offset += BLOCK_BYTES,
            }
        }
    }

    /// How long the record is that starts here, by its unverified header.
    fn peek(&mut self, offset: u64) -> Option<u64> {
        let header = RecordHeader::peek(self.bytes(offset, BLOCK_BYTES)?).ok()?;
        let length = round_up(RecordHeader::BYTES as u64 + u64::from(header.payload_bytes), BLOCK_BYTES);
        (length <= RECORD_BYTES_MAX).then_some(length)
    }
}

impl FoundRecord {
    /// Reads the record's entries again.
    ///
    /// # Errors
    /// The device's; [`Error::Corrupt`] if it is no longer what was found.
    pub fn payload(&self, device: &dyn BlockDevice) -> Result<Vec<u8>> {
        let length = round_up(RecordHeader::BYTES as u64 + u64::from(self.header.payload_bytes), BLOCK_BYTES);
        let mut bytes = vec![0; usize::try_from(length.min(RECORD_BYTES_MAX)).unwrap_or(0)];
        device.read(self.offset, &mut bytes)?;
        let (header, payload, _) = RecordHeader::decode(&bytes)?;
        if header != self.header {
            return Err(Error::corrupt(format!("journal record {}", self.header.sequence), "it has changed"));
        }
        Ok(payload.to_vec())
    }
}

/// Whether all data that was written alongside a record arrived: the log ends before the first record above D of which it did not.
///
/// # Errors
/// If an entry means nothing.
pub fn data_is_there(device: &dyn BlockDevice, payload: &[u8]) -> Result<bool, Corruption> {
    for entry in Entries::new(payload) {
        let Entry::DataRange { offset, length, kind, checksum, .. } = entry? else { continue };
        if kind == ChecksumKind::None || length > DATA_RANGE_BYTES_MAX {
            return Ok(false);
        }
        let block_bytes = u64::from(device.block_bytes()).max(1);
        let start = round_down(offset, block_bytes);
        let Some(end) = offset.checked_add(u64::from(length)).map(|end| round_up(end, block_bytes)) else {
            return Ok(false);
        };
        if end > device.size_bytes() {
            return Ok(false);
        }
        let mut bytes = vec![0; usize::try_from(end - start).unwrap_or(0)];
        let skip = usize::try_from(offset - start).unwrap_or(0);
        let is_there = device.read(start, &mut bytes).is_ok()
            && bytes.get(skip..).and_then(|data| data.get(..length as usize)).map(|data| kind.compute(data))
                == Some(checksum);
        if !is_there {
            return Ok(false);
        }
    }
    Ok(true)
}
