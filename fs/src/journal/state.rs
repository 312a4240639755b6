//! What the journal's short mutex protects: the open record, the queues behind it, and how far things are.
//!
//! Pure bookkeeping: no I/O, no waiting, no clock. A record goes
//!
//! ```text
//! open --seal()--> sealed --(outstanding = 0) chain::encode_ready()--> encoded --writer::turn()--> unflushed --mark_flushed()--> durable
//! ```
//!
//! Invariants:
//! 1. Sequences are consecutive through unflushed, (in flight), encoded, (being encoded), sealed, open.
//! 2. `open_start` is at or above where the open record will start: it places upper bounds of all records that are not yet encoded.
//!    So whatever [`State::try_reserve`] admits fits the ring, and nothing from `tail` on is ever overwritten.
//! 3. `reusable <= flushed <= written`, and each only goes up.

use std::collections::VecDeque;
use std::time::Duration;

use super::JournalWatermark;
use super::ring::{BLOCK_BYTES, Ring, Statement};
use super::totals::{ACCOUNTING_BYTES_MAX, Totals};
use crate::error::{Error, Result};
use crate::format::journal::{AccountingCounter, RecordHeader};
use crate::units::{JournalSequence, round_up};

/// Bytes of a record that no reservation may use: the header and the accounting entries.
pub(super) const RECORD_OVERHEAD_BYTES: usize = RecordHeader::BYTES + ACCOUNTING_BYTES_MAX;

/// Bytes in the ring, at most, of a record with this payload.
pub(super) fn record_bound_bytes(payload_bytes: usize) -> u64 {
    round_up((RECORD_OVERHEAD_BYTES + payload_bytes) as u64, BLOCK_BYTES)
}

/// A record that collects entries, or waits for those that were promised to it.
#[derive(Debug)]
pub(super) struct Record {
    pub sequence: JournalSequence,
    /// One for each reservation, in order of reservation; filled by the appends, in any order.
    pub slots: Vec<Vec<u8>>,
    /// Reservations that are not yet appended.
    pub outstanding: usize,
    /// Sum of what the reservations asked for.
    pub reserved_bytes: usize,
    pub entry_count: u32,
    pub deltas: Totals,
    /// [`State::data_stamp`] of the newest entry that names unflushed data; 0 for none.
    pub data_stamp: u64,
    /// When the first reservation was made.
    pub opened_at: Duration,
    /// Written at the next turn even if it is empty and nobody wants it durable, for the D in its header.
    pub is_statement: bool,
}

impl Record {
    fn new(sequence: JournalSequence) -> Self {
        Self {
            sequence,
            slots: Vec::new(),
            outstanding: 0,
            reserved_bytes: 0,
            entry_count: 0,
            deltas: Totals::default(),
            data_stamp: 0,
            opened_at: Duration::ZERO,
            is_statement: false,
        }
    }

    /// Whether anything was reserved in it.
    pub fn has_content(&self) -> bool {
        !self.slots.is_empty()
    }

    fn is_used(&self) -> bool {
        self.has_content() || self.is_statement
    }
}

/// A record as bytes, with its place.
#[derive(Debug)]
pub(super) struct Encoded {
    /// Offset in the ring.
    pub offset: u64,
    /// Padded to whole blocks.
    pub bytes: Vec<u8>,
    pub data_stamp: u64,
    pub unflushed: Unflushed,
}

/// What must be remembered of a record until it is durable.
#[derive(Clone, Copy, Debug)]
pub(super) struct Unflushed {
    pub sequence: JournalSequence,
    /// D in its header.
    pub known_flushed: JournalSequence,
    /// When its first reservation was made; none for an empty record.
    pub content_since: Option<Duration>,
}

#[derive(Clone, Copy, Debug)]
struct PendingRelease {
    position: u64,
    /// F of the older kept checkpoint.
    first_replay: JournalSequence,
}

/// What a reservation holds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reserved {
    pub sequence: JournalSequence,
    pub slot: usize,
    /// The open record was full: a sealed one waits for a writer.
    pub has_sealed: bool,
    /// It is the first in its record.
    pub is_first: bool,
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct State {
    ring: Ring,
    payload_bytes_max: usize,
    unwritten_bytes_max: u64,
    pub open: Record,
    pub sealed: VecDeque<Record>,
    pub encoded: VecDeque<Encoded>,
    pub unflushed: VecDeque<Unflushed>,
    /// Bytes that a leader is writing.
    pub in_flight_bytes: u64,
    /// Upper bound of the open record's position.
    open_start: u64,
    /// Position of the oldest record that is still needed.
    tail: u64,
    released: JournalSequence,
    /// How often [`State::release_before`] was called.
    pub release_count: u64,
    /// How many checkpoints found no bucket for their nodes.
    pub starvations: u64,
    pending_releases: Vec<PendingRelease>,
    /// Position of the newest boundary.
    pub boundary_position: u64,
    /// Live totals: everything that was appended.
    pub totals: Totals,
    /// Goes up with each append that names unflushed data.
    data_stamp: u64,
    /// Data of appends up to this stamp is flushed.
    data_flushed: u64,
    pub written: JournalSequence,
    pub flushed: JournalSequence,
    pub reusable: JournalSequence,
    /// D of the newest encoded record.
    pub stated: JournalSequence,
    /// The newest encoded record.
    stated_by: JournalSequence,
    /// Newest durable record that is not empty.
    pub content_flushed: JournalSequence,
    pub flush_wanted: JournalSequence,
    pub reusable_wanted: JournalSequence,
    /// A leader is writing or flushing.
    pub is_writing: bool,
    pub latched: Option<String>,
    pub space_waiters: usize,
    /// The pressure hook was called since the last boundary or release.
    pub has_told_pressure: bool,
    pub written_at: Duration,
    pub statement_at: Option<Duration>,
    /// When the worker will look again by itself; none while it sleeps until notified.
    pub worker_wakes_at: Option<Duration>,
}

impl State {
    /// With `next` as the first record, at `head`; what is needed starts at `tail`. The first record of a mount is empty and
    /// alone: it always fits at the log's end, so it overwrites what an earlier life had there, which makes recovery's cut durable.
    pub fn new(ring: Ring, record_bytes_max: u64, next: JournalSequence, tail: u64, head: u64, totals: Totals) -> Self {
        let payload_bytes_max = usize::try_from(record_bytes_max).unwrap_or(usize::MAX) - RECORD_OVERHEAD_BYTES;
        let before = JournalSequence(next.0.saturating_sub(1));
        let mut state = Self {
            ring,
            payload_bytes_max,
            unwritten_bytes_max: record_bytes_max.saturating_mul(4).max(1 << 20),
            open: Record::new(next),
            sealed: VecDeque::new(),
            encoded: VecDeque::new(),
            unflushed: VecDeque::new(),
            in_flight_bytes: 0,
            open_start: head,
            tail,
            released: JournalSequence(0),
            release_count: 0,
            starvations: 0,
            pending_releases: Vec::new(),
            boundary_position: tail,
            totals,
            data_stamp: 0,
            data_flushed: 0,
            written: before,
            flushed: before,
            reusable: JournalSequence(0),
            stated: JournalSequence(0),
            stated_by: before,
            content_flushed: JournalSequence(0),
            flush_wanted: before,
            reusable_wanted: JournalSequence(0),
            is_writing: false,
            latched: None,
            space_waiters: 0,
            has_told_pressure: false,
            written_at: Duration::ZERO,
            statement_at: None,
            worker_wakes_at: None,
        };
        if state.end_of(state.open_start, 0) - state.tail <= state.ring.statement_limit(Statement::Release) {
            state.open.is_statement = true;
            state.seal();
        }
        state
    }

    /// Largest payload that one reservation may ask for.
    pub fn payload_bytes_max(&self) -> usize {
        self.payload_bytes_max
    }

    /// # Errors
    /// [`Error::Latched`] after a failure.
    pub fn check(&self) -> Result<()> {
        match &self.latched {
            None => Ok(()),
            Some(reason) => Err(Error::Latched { reason: reason.clone() }),
        }
    }

    /// Newest sequence that anything was reserved in.
    pub fn newest(&self) -> JournalSequence {
        if self.open.is_used() { self.open.sequence } else { JournalSequence(self.open.sequence.0 - 1) }
    }

    fn unwritten_bytes(&self) -> u64 {
        let sealed: u64 = self.sealed.iter().map(|record| record_bound_bytes(record.reserved_bytes)).sum();
        let encoded: u64 = self.encoded.iter().map(|record| record.bytes.len() as u64).sum();
        sealed + encoded + self.in_flight_bytes
    }

    fn end_of(&self, position: u64, payload_bytes: usize) -> u64 {
        let length = record_bound_bytes(payload_bytes);
        self.ring.place(position, length) + length
    }

    /// Whether the open record must be sealed before this payload: if it would be too large, or if it would grow over the ring's end. It would
    /// then move to the next lap as a whole, and all that it had before the end would be lost until the tail comes round: a claim of a few bytes could
    /// use the checkpoints' reserve up.
    fn must_seal(&self, payload_bytes: usize) -> bool {
        if !self.open.has_content() {
            return false;
        }
        let grown_bytes = self.open.reserved_bytes + payload_bytes;
        let place = |payload_bytes| self.ring.place(self.open_start, record_bound_bytes(payload_bytes));
        grown_bytes > self.payload_bytes_max || place(grown_bytes) != place(self.open.reserved_bytes)
    }

    /// Whether the ring has room for it.
    pub fn has_ring_room(&self, payload_bytes: usize, watermark: JournalWatermark) -> bool {
        let end = if self.must_seal(payload_bytes) {
            self.end_of(self.end_of(self.open_start, self.open.reserved_bytes), payload_bytes)
        } else {
            self.end_of(self.open_start, self.open.reserved_bytes + payload_bytes)
        };
        end - self.tail <= self.ring.limit(watermark)
    }

    /// Whether too much is queued for the writer to seal another record.
    pub fn must_write_first(&self, payload_bytes: usize) -> bool {
        let open_bytes = record_bound_bytes(self.open.reserved_bytes);
        self.must_seal(payload_bytes) && self.unwritten_bytes() + open_bytes > self.unwritten_bytes_max
    }

    /// A slot in the open record, sealing it first if it is full. None if there is no room.
    pub fn try_reserve(
        &mut self,
        payload_bytes: usize,
        watermark: JournalWatermark,
        now: impl FnOnce() -> Duration,
    ) -> Option<Reserved> {
        if self.latched.is_some()
            || payload_bytes > self.payload_bytes_max
            || !self.has_ring_room(payload_bytes, watermark)
            || self.must_write_first(payload_bytes)
        {
            return None;
        }
        let has_sealed = self.must_seal(payload_bytes);
        if has_sealed {
            self.seal();
        }
        let is_first = !self.open.has_content();
        if is_first {
            self.open.opened_at = now();
        }
        let slot = self.open.slots.len();
        self.open.slots.push(Vec::new());
        self.open.outstanding += 1;
        self.open.reserved_bytes += payload_bytes;
        Some(Reserved { sequence: self.open.sequence, slot, has_sealed, is_first })
    }

    /// Closes the open record to reservations and starts the next one.
    pub fn seal(&mut self) {
        self.open_start = self.end_of(self.open_start, self.open.reserved_bytes);
        let next = Record::new(self.open.sequence.next());
        self.sealed.push_back(std::mem::replace(&mut self.open, next));
    }

    /// Seals the open record if anything is in it.
    pub fn seal_used(&mut self) {
        if self.open.is_used() {
            self.seal();
        }
    }

    /// Makes sure that a record is on its way whose D is at least `upto`, which is flushed; returns its sequence. None if the ring has
    /// no room for another. One that is sealed and waits for an append will state what is flushed when it is encoded: so any number of
    /// statements that are wanted behind a slow reservation, or by many at once, are one record, and never fill the ring.
    pub fn statement(&mut self, upto: JournalSequence, purpose: Statement) -> Option<JournalSequence> {
        if self.stated >= upto {
            return Some(self.stated_by);
        }
        if let Some(waiting) = self.sealed.back() {
            return Some(waiting.sequence);
        }
        if !self.open.is_used() && self.end_of(self.open_start, 0) - self.tail > self.ring.statement_limit(purpose) {
            return None;
        }
        self.open.is_statement = true;
        Some(self.open.sequence)
    }

    /// Fills a slot. Returns whether that was the last one that a sealed record waited for. `fill` is none for a reservation that
    /// was dropped.
    pub fn complete(
        &mut self,
        sequence: JournalSequence,
        slot: usize,
        fill: Option<(Vec<u8>, u32, &[(AccountingCounter, i64)], bool)>,
    ) -> bool {
        let is_open = self.open.sequence == sequence;
        let record = if is_open {
            &mut self.open
        } else {
            // A record with outstanding slots cannot have left the queue.
            match self.sealed.iter_mut().find(|record| record.sequence == sequence) {
                Some(record) => record,
                None => return false,
            }
        };
        record.outstanding = record.outstanding.saturating_sub(1);
        if let Some((payload, entry_count, accounting, data_needs_flush)) = fill {
            if let Some(slot) = record.slots.get_mut(slot) {
                *slot = payload;
            }
            record.entry_count += entry_count;
            for &(counter, delta) in accounting {
                record.deltas.add(counter, delta);
                self.totals.add(counter, delta);
            }
            if data_needs_flush {
                self.data_stamp += 1;
                record.data_stamp = self.data_stamp;
            }
        }
        record.outstanding == 0 && !is_open
    }

    /// Takes the oldest sealed record if all its slots are filled.
    pub fn take_complete(&mut self) -> Option<Record> {
        if self.sealed.front()?.outstanding == 0 { self.sealed.pop_front() } else { None }
    }

    /// Queues a record that was encoded; `head` is the position behind it.
    pub fn push_encoded(&mut self, encoded: Encoded, head: u64) {
        debug_assert!(head - self.tail < self.ring.bytes, "the ring would be overwritten");
        self.stated = self.stated.max(encoded.unflushed.known_flushed);
        self.stated_by = encoded.unflushed.sequence;
        self.encoded.push_back(encoded);
        self.open_start =
            self.sealed.iter().fold(head, |position, record| self.end_of(position, record.reserved_bytes));
    }

    /// Takes what is to be written.
    pub fn take_encoded(&mut self) -> Vec<Encoded> {
        let batch: Vec<Encoded> = self.encoded.drain(..).collect();
        self.in_flight_bytes = batch.iter().map(|record| record.bytes.len() as u64).sum();
        batch
    }

    /// The batch is on the devices, not yet flushed.
    pub fn mark_written(&mut self, batch: &[Encoded], now: Duration) {
        self.in_flight_bytes = 0;
        if let Some(last) = batch.last() {
            self.written = last.unflushed.sequence;
            self.written_at = now;
        }
        self.unflushed.extend(batch.iter().map(|record| record.unflushed));
    }

    /// Whether a record with this stamp names data that no flush has covered.
    pub fn data_is_unflushed(&self, data_stamp: u64) -> bool {
        data_stamp > self.data_flushed
    }

    /// What a device flush that is issued now will cover.
    pub fn flush_coverage(&self) -> (JournalSequence, u64) {
        (self.written, self.data_stamp)
    }

    /// A device flush with this coverage has succeeded. Returns whether ring space became free.
    pub fn mark_flushed(&mut self, (written, data_stamp): (JournalSequence, u64)) -> bool {
        self.data_flushed = self.data_flushed.max(data_stamp);
        self.flushed = self.flushed.max(written);
        while let Some(&record) = self.unflushed.front().filter(|record| record.sequence <= written) {
            self.unflushed.pop_front();
            self.reusable = self.reusable.max(record.known_flushed);
            if record.content_since.is_some() {
                self.content_flushed = record.sequence;
            }
        }
        self.apply_releases()
    }

    /// Gives back the ring before `offset`, where record `first_replay` starts, as soon as a durable record states that all before
    /// it are durable. Returns whether space became free now.
    pub fn release_before(&mut self, offset: u64, first_replay: JournalSequence, head: u64) -> bool {
        self.release_count += 1;
        if first_replay <= self.released || offset >= self.ring.bytes {
            return false;
        }
        // The position in [tail, head] with this offset; there is one at most, since the ring is never quite full.
        let base = self.tail - self.ring.offset(self.tail) + offset;
        let position = if base < self.tail { base + self.ring.bytes } else { base };
        if position > head {
            return false;
        }
        self.released = first_replay;
        self.pending_releases.push(PendingRelease { position, first_replay });
        self.has_told_pressure = false;
        if !self.apply_releases() {
            self.reusable_wanted = self.reusable_wanted.max(JournalSequence(first_replay.0.saturating_sub(1)));
            return false;
        }
        true
    }

    fn apply_releases(&mut self) -> bool {
        let tail = self.tail;
        let reusable = self.reusable;
        self.pending_releases.retain(|release| {
            let is_free = release.first_replay <= reusable.next();
            if is_free {
                self.tail = self.tail.max(release.position);
            }
            !is_free
        });
        self.tail != tail
    }

    /// The sequence that must become reusable before ring space is free, if a release waits for one.
    pub fn release_waits_for(&self) -> Option<JournalSequence> {
        let first = self.pending_releases.first()?;
        Some(JournalSequence(first.first_replay.0.saturating_sub(1)))
    }

    /// When the oldest entry that is not durable was reserved.
    pub fn content_since(&self) -> Option<Duration> {
        let unflushed = self.unflushed.iter().find_map(|record| record.content_since);
        let encoded = || self.encoded.iter().find_map(|record| record.unflushed.content_since);
        let gathering = || self.sealed.iter().chain([&self.open]).find(|record| record.has_content());
        unflushed.or_else(encoded).or_else(|| gathering().map(|record| record.opened_at))
    }

    /// Whether a writer could write something now.
    pub fn has_unwritten(&self) -> bool {
        !self.encoded.is_empty() || self.sealed.front().is_some_and(|record| record.outstanding == 0)
    }

    /// Bytes of the ring from `position` to the end of everything that was reserved.
    fn used_since(&self, position: u64) -> u64 {
        let end =
            if self.open.is_used() { self.end_of(self.open_start, self.open.reserved_bytes) } else { self.open_start };
        end.saturating_sub(position)
    }

    /// Used part of what ordinary commits may fill, in thousandths; at least 1000 while somebody waits for space.
    pub fn fill_permille(&self) -> u32 {
        let fill = self.permille(self.tail);
        if self.space_waiters > 0 { fill.max(1000) } else { fill }
    }

    /// The part that was filled since the newest boundary.
    pub fn unreflected_permille(&self) -> u32 {
        self.permille(self.boundary_position)
    }

    fn permille(&self, position: u64) -> u32 {
        let limit = self.ring.limit(JournalWatermark::Normal);
        u32::try_from(self.used_since(position) * 1000 / limit).unwrap_or(u32::MAX)
    }
}
