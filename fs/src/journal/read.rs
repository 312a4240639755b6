//! Reading the log after a crash: which records are there, where it ends, and whether something that must be there is not.
//!
//! The chain starts at the checkpoint's F. A record continues it only if its checksum is right, it is of this filesystem, its sequence is the
//! next, it names the checksum of the record before, and its epoch is not lower. It lies where the record before ended, or, if it does not
//! fit there, at the ring's start. Any copy will do ([`Log::repair_copies`] then restores the others); if an earlier life's record continues the chain too, the higher epoch is the log.
//!
//! Behind the end of the chain the whole ring is looked through, in all copies, for the highest D; the checkpoint itself says, too, up to where the journal
//! was flushed before its record was written. If that is above the end, durable records are missing: damage, not the end. Otherwise records above D are checked for the data that was written alongside them.
//!
//! Time and memory are bounded by the ring's size, whatever its content: records that are verified and found bad cost a budget of a few
//! ring sizes.

use std::collections::BTreeMap;

use super::ring::{BLOCK_BYTES, Ring, flush_all};
use super::totals::Totals;
use super::{JournalConfig, JournalStart, SEQUENCES};
use crate::device::BlockDevice;
use crate::error::{Corruption, Error, Result};
use crate::format::ChecksumKind;
use crate::format::checkpoint::Checkpoint;
use crate::format::journal::{Entries, Entry, RECORD_ALIGNMENT_BYTES, RecordHeader};
use crate::units::{DeviceIndex, JournalSequence, round_down, round_up};

/// Bytes read at once.
const WINDOW_BYTES: u64 = 1 << 20;
/// Longest range of data that may complete alongside a record, and the most of it that is checked in all.
const DATA_RANGE_BYTES_MAX: u32 = 16 << 20;
const DATA_CHECKED_BYTES_MAX: u64 = 1 << 30;
/// How many times the ring's size may be read for records that turn out bad, per copy.
const BAD_RECORD_BUDGET: u64 = 4;

/// One record of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogRecord {
    /// Its header.
    pub header: RecordHeader,
    /// Its entries, see [`Entries`].
    pub payload: Vec<u8>,
}

/// The log from a checkpoint's F on.
#[derive(Clone, Debug)]
pub struct Log {
    /// All records, in order, from F on.
    pub records: Vec<LogRecord>,
    /// Sequence of the first record that is not there.
    pub next: JournalSequence,
    /// Offset in the ring, in bytes, where it would start.
    pub offset: u64,
    /// Checksum of the last record, or what the checkpoint names if there is none.
    pub previous_checksum: u32,
    /// Highest epoch that is in the ring or the checkpoint: a new mount must be above it.
    pub highest_epoch: u64,
    /// Highest D that was seen.
    pub known_flushed: JournalSequence,
    /// Copies of these records that are not as they should be.
    bad_copies: Vec<BadCopy>,
}

/// A copy of a record that another copy has whole.
#[derive(Clone, Copy, Debug)]
struct BadCopy {
    /// Index of the record in the log.
    record: usize,
    /// Index of the ring's copy.
    copy: usize,
    /// Offset of the record in the ring.
    offset: u64,
}

impl Log {
    /// Whether there is nothing to replay (empty records only).
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.records.iter().all(|record| record.payload.is_empty())
    }

    /// How many records lack a good copy. After a power cut that is no sign of damage: the last writes reached some copies only.
    #[must_use]
    pub fn bad_copy_count(&self) -> usize {
        self.bad_copies.len()
    }

    /// Writes the records again to the copies that lack them, and flushes. A mount that is going to write calls it before anything else: it will
    /// count on these records, which may now be in one copy only.
    ///
    /// # Errors
    /// The device's.
    pub fn repair_copies(&self, config: &JournalConfig) -> Result<()> {
        if self.bad_copies.is_empty() {
            return Ok(());
        }
        let ring = Ring::new(config)?;
        for bad in &self.bad_copies {
            let Some(record) = self.records.get(bad.record) else { continue };
            let Some(copy) = ring.copies.get(bad.copy) else { continue };
            let Some(device) = config.devices.get(copy.device) else { continue };
            let (mut bytes, _) = record.header.encode(&record.payload);
            bytes.resize(bytes.len().next_multiple_of(RECORD_ALIGNMENT_BYTES), 0);
            device.write(copy.start + bad.offset, &bytes)?;
        }
        tracing::info!(copies = self.bad_copies.len(), "journal records were written again to copies that lacked them");
        flush_all(&config.devices)
    }

    /// Totals at the log's end: the checkpoint's and the deltas of all records.
    ///
    /// # Errors
    /// If an entry is damaged.
    pub fn totals(&self, from: &Checkpoint) -> Result<Totals> {
        let mut totals = Totals::from_stored(&from.totals)?;
        for record in &self.records {
            totals.add_record(&record.payload)?;
        }
        Ok(totals)
    }

    /// Where a journal that continues this log starts. `from` is the checkpoint that the log was read from; `oldest_kept` the older of the
    /// kept ones (`from` itself if it is the only one).
    ///
    /// # Errors
    /// If an entry is damaged.
    pub fn start(&self, from: &Checkpoint, oldest_kept: &Checkpoint) -> Result<JournalStart> {
        Ok(JournalStart {
            epoch: self.highest_epoch.saturating_add(1),
            next: self.next,
            offset: self.offset,
            previous_checksum: self.previous_checksum,
            oldest_needed_offset: oldest_kept.first_replay_offset,
            totals: self.totals(from)?,
        })
    }
}

/// A verified record.
struct Found {
    header: RecordHeader,
    payload: Vec<u8>,
    checksum: u32,
    /// Where it is in the ring, and how many bytes of it.
    start: u64,
    length: u64,
    /// Indexes of the copies that do not have it.
    bad_copies: Vec<usize>,
}

/// One copy of the ring, read through a window.
struct CopyReader<'a> {
    device: &'a dyn BlockDevice,
    start: u64,
    ring_bytes: u64,
    window: Vec<u8>,
    window_offset: u64,
    /// What lies at the ring's start: the chain looks there wherever it is.
    first: Option<(RecordHeader, u64)>,
}

impl<'a> CopyReader<'a> {
    fn new(device: &'a dyn BlockDevice, start: u64, ring_bytes: u64) -> Self {
        let mut reader = Self { device, start, ring_bytes, window: Vec::new(), window_offset: 0, first: None };
        reader.first = reader.peek(0);
        reader
    }

    fn in_window(&self, offset: u64, length: u64) -> Option<&[u8]> {
        let start = usize::try_from(offset.checked_sub(self.window_offset)?).ok()?;
        self.window.get(start..)?.get(..usize::try_from(length).ok()?)
    }

    /// Bytes of the ring; `None` if they cannot be read or are not all in it. Offset and length are whole blocks.
    fn bytes(&mut self, offset: u64, length: u64) -> Option<&[u8]> {
        if offset.checked_add(length)? > self.ring_bytes {
            return None;
        }
        if self.in_window(offset, length).is_none() {
            let wide = length.max(WINDOW_BYTES).min(self.ring_bytes - offset);
            // A bad sector somewhere in the window must not hide the good blocks before it.
            if !self.fill_window(offset, wide) && (wide == length || !self.fill_window(offset, length)) {
                return None;
            }
        }
        self.in_window(offset, length)
    }

    fn fill_window(&mut self, offset: u64, length: u64) -> bool {
        let Ok(length) = usize::try_from(length) else { return false };
        self.window.resize(length, 0);
        self.window_offset = offset;
        let is_read = self.device.read(self.start + offset, &mut self.window).is_ok();
        if !is_read {
            self.window.clear();
        }
        is_read
    }

    /// The header at an offset, not verified but for its magic number, and the length in the ring that it claims.
    fn peek(&mut self, offset: u64) -> Option<(RecordHeader, u64)> {
        let header = RecordHeader::peek(self.bytes(offset, BLOCK_BYTES)?).ok()?;
        let length = round_up(RecordHeader::BYTES as u64 + u64::from(header.payload_bytes), BLOCK_BYTES);
        (offset + length <= self.ring_bytes).then_some((header, length))
    }

    fn verify(&mut self, offset: u64, length: u64) -> Option<Found> {
        let (header, payload, checksum) = RecordHeader::decode(self.bytes(offset, length)?).ok()?;
        let payload = payload.to_vec();
        Some(Found { header, payload, checksum, start: offset, length, bad_copies: Vec::new() })
    }

    /// Whether this copy has a record that another has.
    fn has(&mut self, record: &Found) -> bool {
        let Some(bytes) = self.bytes(record.start, record.length) else { return false };
        RecordHeader::decode(bytes)
            .is_ok_and(|(header, payload, _)| header == record.header && payload == record.payload)
    }
}

/// What the next record must continue.
struct Tip {
    sequence: u64,
    epoch: u64,
    previous_checksum: u32,
    offset: u64,
}

struct Reader<'a> {
    config: &'a JournalConfig,
    ring: Ring,
    copies: Vec<CopyReader<'a>>,
    highest_epoch: u64,
    known_flushed: JournalSequence,
}

/// Reads the log that a checkpoint needs. Flushes the devices first (unless they are read-only), so that nothing it has read can be lost
/// again; writes nothing.
///
/// # Errors
/// [`Error::Corrupt`] if a record that is durable for certain cannot be read in any copy (the message names sequence and offset), or the
/// checkpoint's boundary is not in the ring; a device's error if the flush fails.
pub fn read_log(config: &JournalConfig, from: &Checkpoint) -> Result<Log> {
    if !config.switches.skip_recovery_flush {
        for device in config.devices.iter().filter(|device| !device.is_read_only()) {
            device.flush()?;
        }
    }
    let mut reader = Reader::new(config, from)?;
    let (found, tip) = reader.follow_chain(from, u64::MAX);
    reader.look_behind_the_end(&found, &tip)?;
    let end = JournalSequence(tip.sequence - 1);
    if reader.known_flushed > end {
        return Err(reader.damage(&tip));
    }
    reader.into_log(found, &tip)
}

/// The records from a checkpoint's F up to `until` inclusive, all of which were durable at some time. The log behind `until` is not looked at.
/// Nothing is flushed.
///
/// # Errors
/// [`Error::Corrupt`] if not all of them are there (any more).
pub fn read_log_until(config: &JournalConfig, from: &Checkpoint, until: JournalSequence) -> Result<Log> {
    let (log, problem) = read_log_prefix(config, from, until)?;
    match problem {
        Some(problem) => Err(problem),
        None => Ok(log),
    }
}

/// As [`read_log_until`], but gives what is there, with what is wrong behind it: where the first record is that is missing.
///
/// # Errors
/// If the journal cannot be looked at, or the checkpoint's boundary is not in the ring.
pub fn read_log_prefix(
    config: &JournalConfig,
    from: &Checkpoint,
    until: JournalSequence,
) -> Result<(Log, Option<Error>)> {
    let mut reader = Reader::new(config, from)?;
    let (found, tip) = reader.follow_chain(from, until.0);
    let problem = (tip.sequence <= until.0).then(|| {
        let problem = format!("it is not (or no longer) whole at byte {} of the journal", tip.offset);
        Error::corrupt(format!("journal record {}", tip.sequence), problem)
    });
    reader.known_flushed = until;
    Ok((reader.into_log(found, &tip)?, problem))
}

/// The log as far as it can be followed, for those who have lost hope in the rest: with what [`read_log`] would say.
///
/// # Errors
/// If the journal cannot be looked at, or the checkpoint's boundary is not in the ring.
pub fn read_log_best(config: &JournalConfig, from: &Checkpoint) -> Result<(Log, Option<Error>)> {
    let mut reader = Reader::new(config, from)?;
    let (found, tip) = reader.follow_chain(from, u64::MAX);
    let problem = match reader.look_behind_the_end(&found, &tip) {
        Ok(()) if reader.known_flushed.0 >= tip.sequence => Some(reader.damage(&tip)),
        Ok(()) => None,
        Err(error) => Some(error),
    };
    Ok((reader.into_log(found, &tip)?, problem))
}

/// Whether the first record of a checkpoint's log is still in the ring, whole. Records are overwritten in their order: so the later ones are, too.
#[must_use]
pub fn holds_log_of(config: &JournalConfig, checkpoint: &Checkpoint) -> bool {
    let reader = Reader::new(config, checkpoint);
    reader.is_ok_and(|mut reader| !reader.follow_chain(checkpoint, checkpoint.first_replay).0.is_empty())
}

impl<'a> Reader<'a> {
    fn new(config: &'a JournalConfig, from: &Checkpoint) -> Result<Self> {
        let ring = Ring::new(config)?;
        if !SEQUENCES.contains(&from.first_replay)
            || from.first_replay_offset >= ring.bytes
            || !from.first_replay_offset.is_multiple_of(BLOCK_BYTES)
        {
            let problem =
                format!("F is record {} at byte {} of the journal", from.first_replay, from.first_replay_offset);
            return Err(Error::corrupt(format!("checkpoint {}", from.number), problem));
        }
        let copies = ring.copies.iter().filter_map(|copy| {
            let device = config.devices.get(copy.device)?;
            Some(CopyReader::new(device.as_ref(), copy.start, ring.bytes))
        });
        let copies = copies.collect();
        // Images may hold changes up to there: with a log that ends before, they would mix states.
        let known_flushed = JournalSequence(from.newest_sequence);
        Ok(Self { config, ring, copies, highest_epoch: from.epoch, known_flushed })
    }

    /// The records as a log, cut at the first whose data did not arrive.
    fn into_log(self, found: Vec<(u64, Found)>, tip: &Tip) -> Result<Log> {
        let reader = self;
        let mut log = Log {
            records: Vec::with_capacity(found.len()),
            next: JournalSequence(tip.sequence),
            offset: tip.offset,
            previous_checksum: tip.previous_checksum,
            highest_epoch: reader.highest_epoch,
            known_flushed: reader.known_flushed,
            bad_copies: Vec::new(),
        };
        let mut checked_bytes = 0;
        for (offset, record) in found {
            let header = record.header;
            if header.sequence > log.known_flushed && !reader.data_is_there(&record, &mut checked_bytes)? {
                log.next = header.sequence;
                log.offset = offset;
                log.previous_checksum = header.previous_checksum;
                break;
            }
            let bad_copies =
                record.bad_copies.iter().map(|&copy| BadCopy { record: log.records.len(), copy, offset: record.start });
            log.bad_copies.extend(bad_copies);
            log.records.push(LogRecord { header, payload: record.payload });
        }
        Ok(log)
    }
}

impl Reader<'_> {
    /// The unbroken chain from F, not beyond record `until`: each record, with the offset where the one before ended; and what would come next.
    fn follow_chain(&mut self, from: &Checkpoint, until: u64) -> (Vec<(u64, Found)>, Tip) {
        let mut tip = Tip {
            sequence: from.first_replay,
            epoch: from.epoch,
            previous_checksum: from.previous_record_checksum,
            offset: from.first_replay_offset,
        };
        let mut found = Vec::new();
        let mut passed_bytes = 0;
        while tip.sequence <= until {
            let rest = self.ring.bytes - tip.offset;
            let mut best: Option<Found> = None;
            for offset in [tip.offset, 0] {
                let has_wrapped = offset != tip.offset;
                for copy in &mut self.copies {
                    let peeked = if has_wrapped { copy.first } else { copy.peek(offset) };
                    let Some((header, length)) = peeked else { continue };
                    let continues = header.previous_checksum == tip.previous_checksum && header.epoch >= tip.epoch;
                    if header.filesystem != self.config.filesystem
                        || header.sequence.0 != tip.sequence
                        || !(continues || self.config.switches.break_chain)
                        || (has_wrapped && length <= rest)
                        || best.as_ref().is_some_and(|best| best.header.epoch >= header.epoch)
                    {
                        continue;
                    }
                    best = copy.verify(offset, length).or(best);
                }
            }
            let Some(mut record) = best else { break };
            let copies = self.copies.iter_mut().enumerate();
            record.bad_copies = copies.filter_map(|(index, copy)| (!copy.has(&record)).then_some(index)).collect();
            let skipped = if record.start == tip.offset { 0 } else { rest };
            passed_bytes += skipped + record.length;
            if passed_bytes >= self.ring.bytes {
                break;
            }
            self.highest_epoch = self.highest_epoch.max(record.header.epoch);
            self.known_flushed = self.known_flushed.max(record.header.known_flushed);
            let before = tip.offset;
            tip = Tip {
                sequence: tip.sequence.saturating_add(1),
                epoch: record.header.epoch,
                previous_checksum: record.checksum,
                offset: self.ring.offset(record.start + record.length),
            };
            found.push((before, record));
        }
        (found, tip)
    }

    /// Looks at every block that is not in the chain for records that were written later: they tell the highest D and epoch.
    fn look_behind_the_end(&mut self, found: &[(u64, Found)], tip: &Tip) -> Result<()> {
        let mut accepted: BTreeMap<u64, u64> = BTreeMap::new();
        for (_, record) in found {
            accepted.insert(record.start, record.length);
        }
        for copy in &mut self.copies {
            let mut budget = self.ring.bytes * BAD_RECORD_BUDGET;
            let mut offset = 0;
            while offset < self.ring.bytes {
                if let Some(length) = accepted.get(&offset) {
                    offset += length;
                    continue;
                }
                let Some((header, length)) = copy.peek(offset) else {
                    offset += BLOCK_BYTES;
                    continue;
                };
                let is_later = header.sequence.0 >= tip.sequence && header.epoch >= tip.epoch;
                let tells_more = is_later && header.known_flushed > self.known_flushed;
                if header.filesystem != self.config.filesystem || !(tells_more || header.epoch > self.highest_epoch) {
                    offset += BLOCK_BYTES;
                    continue;
                }
                budget = budget.checked_sub(length).ok_or_else(|| {
                    Corruption::new("journal", "it is full of damaged records: what it should hold cannot be told")
                })?;
                let Some(record) = copy.verify(offset, length) else {
                    offset += BLOCK_BYTES;
                    continue;
                };
                self.highest_epoch = self.highest_epoch.max(record.header.epoch);
                if is_later {
                    self.known_flushed = self.known_flushed.max(record.header.known_flushed);
                }
                offset += record.length;
            }
        }
        Ok(())
    }

    fn damage(&self, tip: &Tip) -> Error {
        let problem = format!(
            "it cannot be read in any copy, at byte {} of the journal, but all up to record {} was durable: `coppice checkpoints` lists older states that can be shown, `fsck.coppice --rebuild` finds what is left",
            tip.offset, self.known_flushed
        );
        let mut corruption = Corruption::new(format!("journal record {}", tip.sequence), problem);
        if let Some(copy) = self.ring.copies.first() {
            let device = DeviceIndex(u8::try_from(copy.device).unwrap_or(u8::MAX));
            corruption = corruption.at(device, copy.start + tip.offset);
        }
        corruption.into()
    }

    /// Whether all data that was written alongside a record arrived.
    fn data_is_there(&self, record: &Found, checked_bytes: &mut u64) -> Result<bool> {
        for entry in Entries::new(&record.payload) {
            let Entry::DataRange { device, offset, length, kind, checksum } = entry? else { continue };
            *checked_bytes += u64::from(length);
            if kind == ChecksumKind::None || length > DATA_RANGE_BYTES_MAX || *checked_bytes > DATA_CHECKED_BYTES_MAX {
                let problem = format!("{length} bytes of data with checksum kind {kind:?} cannot be written alongside");
                return Err(Error::corrupt(format!("journal record {}", record.header.sequence), problem));
            }
            if self.checksum_of(device, offset, length, kind) != Some(checksum) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn checksum_of(&self, device: DeviceIndex, offset: u64, length: u32, kind: ChecksumKind) -> Option<u64> {
        let device = self.config.devices.get(usize::from(device.0))?;
        let block_bytes = u64::from(device.block_bytes());
        let start = round_down(offset, block_bytes);
        let end = round_up(offset.checked_add(u64::from(length))?, block_bytes);
        if end > device.size_bytes() {
            return None;
        }
        let mut bytes = vec![0; usize::try_from(end - start).ok()?];
        device.read(start, &mut bytes).ok()?;
        let skip = usize::try_from(offset - start).ok()?;
        let data = bytes.get(skip..)?.get(..usize::try_from(length).ok()?)?;
        Some(kind.compute(data))
    }
}
