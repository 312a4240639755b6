//! Turns complete records into bytes, in order: the chain of checksums, D, the place in the ring, and the totals so far.
//!
//! [`Chain`] has a mutex of its own, taken before the state's, so that encoding and checksumming a record holds up nobody who reserves
//! or appends. No I/O and no waiting happens under it.

use super::ring::{BLOCK_BYTES, Ring};
use super::state::{Encoded, Record, State, Unflushed};
use super::totals::Totals;
use super::{Boundary, Inner};
use crate::error::Result;
use crate::format::journal::{RecordHeader, encode_accounting};
use crate::units::{JournalSequence, round_up};

/// What the next record continues.
#[derive(Debug)]
pub(super) struct Chain {
    /// The next record to be encoded.
    pub next: JournalSequence,
    /// Position behind the last record.
    pub position: u64,
    pub previous_checksum: u32,
    /// Deltas of all records before `next` are in it.
    pub totals: Totals,
    /// Boundaries that somebody waits for, and those that were reached.
    boundaries: Vec<(JournalSequence, Option<Boundary>)>,
}

impl Chain {
    pub fn new(next: JournalSequence, position: u64, previous_checksum: u32, totals: Totals) -> Self {
        Self { next, position, previous_checksum, totals, boundaries: Vec::new() }
    }

    fn boundary(&self, ring: &Ring) -> Boundary {
        Boundary {
            first_replay: self.next,
            offset: ring.offset(self.position),
            previous_checksum: self.previous_checksum,
            totals: self.totals,
        }
    }

    fn encode(&mut self, record: Record, known_flushed: JournalSequence, ring: &Ring, inner: &Inner) -> Encoded {
        let payload_bytes: usize = record.slots.iter().map(Vec::len).sum();
        let mut payload = Vec::with_capacity(payload_bytes + super::totals::ACCOUNTING_BYTES_MAX);
        record.slots.iter().for_each(|slot| payload.extend_from_slice(slot));
        let mut entry_count = record.entry_count;
        for (counter, delta) in record.deltas.iter().filter(|&(_, delta)| delta != 0) {
            encode_accounting(counter, delta, &mut payload);
            entry_count += 1;
        }
        let header = RecordHeader {
            filesystem: inner.filesystem,
            epoch: inner.epoch,
            sequence: record.sequence,
            known_flushed: if inner.switches.skip_known_flushed { JournalSequence(0) } else { known_flushed },
            previous_checksum: self.previous_checksum,
            // Reservations keep the payload below the record's size, which is a u32.
            payload_bytes: u32::try_from(payload.len()).unwrap_or(u32::MAX),
            entry_count,
        };
        let (mut bytes, checksum) = header.encode(&payload);
        let length = round_up(bytes.len() as u64, BLOCK_BYTES);
        bytes.resize(usize::try_from(length).unwrap_or(usize::MAX), 0);
        let start = ring.place(self.position, length);
        self.position = start + length;
        self.previous_checksum = checksum;
        self.next = record.sequence.next();
        self.totals.merge(&record.deltas);
        let content_since = record.has_content().then_some(record.opened_at);
        Encoded {
            offset: ring.offset(start),
            bytes,
            data_stamp: record.data_stamp,
            unflushed: Unflushed { sequence: record.sequence, known_flushed, content_since },
        }
    }
}

impl Inner {
    /// Encodes all sealed records whose slots are filled, in order. Returns the next sequence to be encoded.
    pub fn encode_ready(&self) -> JournalSequence {
        let mut chain = self.chain.lock();
        let mut has_reached = false;
        loop {
            let (record, known_flushed) = {
                let mut state = self.state.lock();
                match state.take_complete() {
                    Some(record) => (record, state.flushed),
                    None => break,
                }
            };
            let encoded = chain.encode(record, known_flushed, &self.ring, self);
            self.metrics.journal_records.increment();
            self.metrics.journal_record_bytes.add(encoded.bytes.len() as u64);
            let reached = chain.boundary(&self.ring);
            for (sequence, boundary) in &mut chain.boundaries {
                if *sequence == reached.first_replay {
                    *boundary = Some(reached);
                    has_reached = true;
                }
            }
            self.state.lock().push_encoded(encoded, chain.position);
        }
        let next = chain.next;
        drop(chain);
        if has_reached {
            self.appended.notify();
        }
        next
    }

    /// See [`super::Journal::boundary`].
    pub fn boundary(&self) -> Result<Boundary> {
        let first_replay = {
            let mut chain = self.chain.lock();
            let mut state = self.state.lock();
            state.check()?;
            state.seal_used();
            let first_replay = state.open.sequence;
            if chain.next == first_replay {
                Self::note_boundary(&mut state, chain.position);
                return Ok(chain.boundary(&self.ring));
            }
            chain.boundaries.push((first_replay, None));
            first_replay
        };
        let boundary = self.env.wait(&self.appended, || {
            self.encode_ready();
            let mut chain = self.chain.lock();
            let index = chain.boundaries.iter().position(|(sequence, _)| *sequence == first_replay)?;
            let (_, boundary) = *chain.boundaries.get(index)?;
            boundary.inspect(|_| {
                chain.boundaries.swap_remove(index);
                let position = chain.position;
                Self::note_boundary(&mut self.state.lock(), position);
            })
        })?;
        self.state.lock().check()?;
        Ok(boundary)
    }

    fn note_boundary(state: &mut State, position: u64) {
        state.boundary_position = position;
        state.has_told_pressure = false;
    }
}
