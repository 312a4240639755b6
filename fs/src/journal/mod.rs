//! The journal: ordered durable records in a ring, group commit, and the reading of the log after a crash.
//!
//! Writers reserve room in the *open record*, append final key puts to it, and ask for a sequence to be durable. Reserving and appending
//! take one short mutex and do no I/O, so they may be called with leaf locks held. Whoever calls [`Journal::flush`] may become the
//! *leader*: it seals the open record, writes everything sealed to all copies of the ring in one submission, flushes the devices, and so
//! serves all who asked meanwhile; those who ask during its write share the next turn. No thread of the journal's own is needed for
//! that; the worker only commits what nobody flushed, and states D.
//!
//! What it guarantees, and what each rule prevents:
//! 1. A record is whole or not there: one checksum; and the log is a prefix: each record names the checksum of the one before, the mount
//!    epoch never goes down along the chain, so nothing of an earlier life continues it.
//! 2. [`Journal::flush`] returns only after a device flush that was issued after the record's write, and after the completion of the data
//!    that its entries name. Entries with `data_needs_flush` have that data flushed before the record is even written.
//! 3. D, in each record, is the newest sequence that was durable when it was encoded. Recovery finds the highest D anywhere in the ring: what cannot
//!    be read at or below it is damage, never the end of the log. Space freed at or below a D *inside a durable record* may be rewritten
//!    ([`Journal::reusable`]): then no recovery can come to a state that still needs the old content.
//! 4. Nothing from the older kept checkpoint's F on is overwritten, nor is anything before it until a durable record's D covers it.
//! 5. The first record of a mount is empty and alone. It takes the place where the log ended, so the cut that recovery made is
//!    durable as soon as it is flushed; until then nothing is reusable.
//! 6. The first failed write or flush latches: every later reservation and flush fails, nothing is acknowledged any more.
//!
//! Locks, in order: `chain` (encoding), then `state` (bookkeeping); both are leaves for everybody else, and no I/O or waiting happens
//! under either. The right to write is a flag in `state`, not a lock, so that waiting for it goes through [`Env::wait`].

mod chain;
mod read;
mod ring;
mod state;
mod totals;
mod writer;

#[cfg(all(test, not(loom)))]
mod tests;

use std::sync::OnceLock;
use std::time::Duration;

use uuid::Uuid;

use crate::alloc::TestSwitches;
use crate::device::BlockDevice;
use crate::env::{Env, Event, Worker};
use crate::error::{Error, Result};
use crate::format::journal::AccountingCounter;
use crate::format::superblock::{BucketRange, Superblock};
use crate::metrics::Metrics;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Arc, LockClass, Mutex, Rank};
use crate::units::JournalSequence;

use chain::Chain;
pub use read::{Log, LogRecord, holds_log_of, read_log, read_log_best, read_log_prefix, read_log_until};
use ring::Ring;
use state::State;
pub use totals::Totals;

/// Sequences that records may have: far enough from the type's end that counting up needs no checks.
const SEQUENCES: std::ops::Range<u64> = 1..1 << 63;

/// Where the journal lies and how it commits.
#[derive(Clone, Debug)]
pub struct JournalConfig {
    /// The id in every record: [`journal_identity`], the same for all who read or write this journal.
    pub filesystem: Uuid,
    /// All member devices, by [`crate::units::DeviceIndex`]; all are flushed, since data may be on any.
    pub devices: Vec<std::sync::Arc<dyn BlockDevice>>,
    /// The ring's copies, equal in size.
    pub copies: Vec<BucketRange>,
    /// Bytes of a bucket.
    pub bucket_bytes: u32,
    /// Largest record in bytes; made smaller for a small ring.
    pub record_bytes_max: u32,
    /// How old an entry may get before it is flushed unasked (`commit=`). None or zero: every commit is to be flushed at once, by whoever
    /// made it ([`Journal::commits_at_once`]) and at the latest by the worker.
    pub commit_interval: Option<Duration>,
    /// Deliberate faults.
    pub switches: TestSwitches,
}

/// The id that journal records of a filesystem carry. It is not the filesystem's own id, which users can learn: recovery looks at
/// whole blocks of the ring for records, and what users store passes through the ring. A value that looked like a
/// record, with a sequence far ahead, could make recovery see damage where there is none. Nobody who cannot read the superblock knows
/// this id.
#[must_use]
pub fn journal_identity(superblock: &Superblock) -> Uuid {
    let seed = superblock.defaults.hash_seed;
    Uuid::from_u128(xxhash_rust::xxh3::xxh3_128_with_seed(superblock.filesystem.as_bytes(), seed))
}

impl JournalConfig {
    /// The journal of the filesystem that a superblock describes, with records of at most 256 KiB.
    #[must_use]
    pub fn new(
        superblock: &Superblock,
        devices: Vec<std::sync::Arc<dyn BlockDevice>>,
        commit_interval: Option<Duration>,
    ) -> Self {
        Self {
            filesystem: journal_identity(superblock),
            devices,
            copies: superblock.layout.journal.clone(),
            bucket_bytes: superblock.geometry.bucket_bytes,
            record_bytes_max: 256 << 10,
            commit_interval,
            switches: TestSwitches::default(),
        }
    }
}

/// Where writing starts: after mkfs ([`JournalStart::fresh`]) or recovery ([`Log::start`]).
#[derive(Clone, Copy, Debug)]
pub struct JournalStart {
    /// Mount epoch, above every one that is in the ring.
    pub epoch: u64,
    /// Sequence of the first record.
    pub next: JournalSequence,
    /// Offset in the ring, in bytes, where the log ends.
    pub offset: u64,
    /// Checksum of the last record of the log.
    pub previous_checksum: u32,
    /// Offset in the ring of the older kept checkpoint's F: from there on nothing is overwritten. Equal to `offset`: nothing is kept.
    pub oldest_needed_offset: u64,
    /// Totals at the log's end.
    pub totals: Totals,
}

impl JournalStart {
    /// The start of a new filesystem's first journal.
    #[must_use]
    pub fn fresh() -> Self {
        Self {
            epoch: 1,
            next: JournalSequence(1),
            offset: 0,
            previous_checksum: 0,
            oldest_needed_offset: 0,
            totals: Totals::default(),
        }
    }
}

/// How much of the ring a reservation may use. Ordinary commits stop first, then what frees space, then checkpoints.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum JournalWatermark {
    /// Ordinary commits.
    #[default]
    Normal,
    /// Copygc, discard, deletes: what gives space back.
    Reclaim,
    /// What a checkpoint itself commits (claims of node buckets). Never waits: what two checkpoints log fits the reserve, and if it does not that is
    /// an error, since nobody else could make room.
    Checkpoint,
}

/// F of a checkpoint, as its record stores it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Boundary {
    /// F: the first record that is not reflected.
    pub first_replay: JournalSequence,
    /// Offset in the ring, in bytes, behind the record before F. F itself starts here, or at 0 if it does not fit.
    pub offset: u64,
    /// Checksum of the record before F.
    pub previous_checksum: u32,
    /// Totals with the deltas of all records before F, and of no other.
    pub totals: Totals,
}

/// Called, without waiting for anything, when a checkpoint should make room in the ring.
pub type PressureHook = Box<dyn Fn() + Send + Sync>;
/// Called with the reason when the journal latches, once or more: wakes those who wait for what can no longer happen.
pub type LatchHook = std::sync::Arc<dyn Fn(&str) + Send + Sync>;

/// What all parts of the journal share; see the files for who uses what.
struct Inner {
    filesystem: Uuid,
    devices: Vec<std::sync::Arc<dyn BlockDevice>>,
    ring: Ring,
    epoch: u64,
    commit_interval: Duration,
    env: std::sync::Arc<Env>,
    metrics: std::sync::Arc<Metrics>,
    chain: Mutex<Chain>,
    state: Mutex<State>,
    /// Mirrors of the state's fields, for readers that need no lock.
    flushed: AtomicU64,
    reusable: AtomicU64,
    /// A leader's turn has ended.
    turn: Event,
    /// A sealed record has all its entries, or a boundary was reached.
    appended: Event,
    /// Ring or queue space became free.
    space: Event,
    reusable_event: Event,
    worker_event: Event,
    pressure: OnceLock<PressureHook>,
    latch_hooks: Mutex<Vec<LatchHook>>,
    switches: TestSwitches,
}

/// The journal of a mounted filesystem. See the module's documentation.
pub struct Journal {
    inner: Arc<Inner>,
}

impl std::fmt::Debug for Journal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Journal")
            .field("newest", &self.newest())
            .field("flushed", &self.flushed())
            .finish_non_exhaustive()
    }
}

/// Room in a record. Give it to [`Journal::append`]; dropped without (an unwinding panic), it counts as an append of nothing, so that the
/// record is not held up for ever.
#[must_use]
pub struct Reservation {
    inner: Arc<Inner>,
    sequence: JournalSequence,
    slot: usize,
    payload_bytes: usize,
    is_done: bool,
}

impl Reservation {
    /// Sequence of the record: flush it to make what is appended durable.
    #[must_use]
    pub fn sequence(&self) -> JournalSequence {
        self.sequence
    }
}

impl std::fmt::Debug for Reservation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reservation")
            .field("sequence", &self.sequence)
            .field("slot", &self.slot)
            .finish_non_exhaustive()
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if !self.is_done {
            self.inner.complete(self.sequence, self.slot, None);
        }
    }
}

impl Journal {
    /// Starts writing at `start`. Does no I/O: the empty first record is queued, and recovery makes its cut durable with
    /// `flush(newest())`, before anything else is written.
    ///
    /// # Errors
    /// If the ring does not lie on the devices, is too small, or `start` is not in it.
    pub fn open(
        config: JournalConfig,
        start: JournalStart,
        env: std::sync::Arc<Env>,
        metrics: std::sync::Arc<Metrics>,
    ) -> Result<std::sync::Arc<Self>> {
        let ring = Ring::new(&config)?;
        for offset in [start.offset, start.oldest_needed_offset] {
            if offset >= ring.bytes || !offset.is_multiple_of(ring::BLOCK_BYTES) {
                return Err(Error::corrupt("journal", format!("offset {offset} in a ring of {} bytes", ring.bytes)));
            }
        }
        if !SEQUENCES.contains(&start.next.0) {
            return Err(Error::corrupt("journal", format!("it cannot start at record {}", start.next)));
        }
        let tail = start.oldest_needed_offset;
        let head = if start.offset < tail { start.offset + ring.bytes } else { start.offset };
        let record_bytes_max = ring.record_bytes_max(config.record_bytes_max);
        let state = State::new(ring.clone(), record_bytes_max, start.next, tail, head, start.totals);
        let flushed = AtomicU64::new(state.flushed.0);
        let inner = Inner {
            filesystem: config.filesystem,
            devices: config.devices,
            ring,
            epoch: start.epoch,
            commit_interval: config.commit_interval.unwrap_or(Duration::ZERO),
            env,
            metrics,
            chain: Mutex::ranked(
                LockClass::new(Rank::JournalChain),
                Chain::new(start.next, head, start.previous_checksum, start.totals),
            ),
            state: Mutex::ranked(LockClass::new(Rank::JournalState), state),
            flushed,
            reusable: AtomicU64::new(0),
            turn: Event::new(),
            appended: Event::new(),
            space: Event::new(),
            reusable_event: Event::new(),
            worker_event: Event::new(),
            pressure: OnceLock::new(),
            latch_hooks: Mutex::default(),
            switches: config.switches,
        };
        Ok(std::sync::Arc::new(Self { inner: Arc::new(inner) }))
    }

    /// Largest payload in bytes that one reservation can have.
    #[must_use]
    pub fn payload_bytes_max(&self) -> usize {
        self.inner.state.lock().payload_bytes_max()
    }

    /// Room for `payload_bytes` of entries (accounting not counted: it is always there) in the open record. Takes a short mutex, never blocks
    /// on I/O: may be called with leaf locks held. Between this and [`Self::append`] the caller must not wait for anything.
    ///
    /// None if there is no room, or after a failure: unlock, [`Self::wait_for_space`], start again.
    #[must_use]
    pub fn try_reserve(&self, payload_bytes: usize, watermark: JournalWatermark) -> Option<Reservation> {
        let (sequence, slot) = self.inner.try_reserve(payload_bytes, watermark)?;
        Some(Reservation { inner: Arc::clone(&self.inner), sequence, slot, payload_bytes, is_done: false })
    }

    /// Waits until [`Self::try_reserve`] would succeed (it may fail again: others are woken too). Writes sealed records itself where that is what
    /// is missing, and asks for a checkpoint through the pressure hook where ring space is. Call it with no locks held.
    ///
    /// # Errors
    /// [`Error::Latched`] after a failure; [`Error::NoSpace`] if the ring is full and checkpoints find no bucket ([`Self::checkpoint_starved`]);
    /// [`Error::Bug`] if `payload_bytes` can never fit a record.
    pub fn wait_for_space(&self, payload_bytes: usize, watermark: JournalWatermark) -> Result<()> {
        self.inner.wait_for_space(payload_bytes, watermark)
    }

    /// Fills a reservation with `entry_count` entries encoded in `payload` (see [`crate::format::journal`]); the order inside a record is that of
    /// reservation. `accounting` is summed per record. `data_needs_flush`: the entries name data whose device writes have *completed* but are
    /// not flushed; the devices are flushed before the record is written. Without it, the named data is flushed already, or listed in
    /// `payload` as data ranges and completed.
    ///
    /// Infallible: a payload above what was reserved is a bug of the caller's, and latches.
    pub fn append(
        &self,
        mut reservation: Reservation,
        payload: Vec<u8>,
        entry_count: u32,
        accounting: &[(AccountingCounter, i64)],
        data_needs_flush: bool,
    ) {
        reservation.is_done = true;
        if payload.len() > reservation.payload_bytes {
            let reserved = reservation.payload_bytes;
            self.latch(format!("{} bytes were logged into a reservation of {reserved}", payload.len()));
            self.inner.complete(reservation.sequence, reservation.slot, None);
            return;
        }
        let fill = Some((payload, entry_count, accounting, data_needs_flush));
        self.inner.complete(reservation.sequence, reservation.slot, fill);
    }

    /// Returns when all records up to `upto` (or the newest that exists) are durable. Group commit: the caller may do the writing for all.
    /// Call it with no locks held, and with no reservation of its own that is not appended.
    ///
    /// # Errors
    /// [`Error::Latched`] after a failed write or flush, this one or an earlier one.
    pub fn flush(&self, upto: JournalSequence) -> Result<()> {
        self.inner.flush(upto)
    }

    /// Newest sequence in which anything was reserved.
    #[must_use]
    pub fn newest(&self) -> JournalSequence {
        self.inner.state.lock().newest()
    }

    /// Newest durable sequence. No lock.
    #[must_use]
    pub fn flushed(&self) -> JournalSequence {
        JournalSequence(self.inner.flushed.load(Ordering::Acquire))
    }

    /// The largest D inside a durable record: space freed at or below it may be rewritten or discarded. No lock.
    #[must_use]
    pub fn reusable(&self) -> JournalSequence {
        JournalSequence(self.inner.reusable.load(Ordering::Acquire))
    }

    /// Somebody waits for space that was freed at `upto`: the worker makes it reusable within 50 ms.
    pub fn want_reusable(&self, upto: JournalSequence) {
        self.inner.want_reusable(upto);
    }

    /// As [`Self::want_reusable`], but at once and by the caller: flushes, and if needed writes and flushes an empty record. Returns whether
    /// `upto` (or the newest record, if lower) is reusable now; false if the ring has no room for the empty record at this watermark: a
    /// checkpoint is asked for then.
    ///
    /// # Errors
    /// As [`Self::flush`].
    pub fn make_reusable(&self, upto: JournalSequence, watermark: JournalWatermark) -> Result<bool> {
        self.inner.make_reusable(upto, ring::Statement::FreeSpace(watermark))
    }

    /// Notified when [`Self::flushed`] or [`Self::reusable`] has moved, and when the journal latches.
    #[must_use]
    pub fn reusable_event(&self) -> &Event {
        &self.inner.reusable_event
    }

    /// F for a checkpoint. Seals the open record, waits until all reservations before F are appended, encodes them (no I/O). Every reservation
    /// made after this call began sealing is in F or later. Call it with no locks that a holder of a reservation may need.
    ///
    /// # Errors
    /// [`Error::Latched`] after a failure.
    pub fn boundary(&self) -> Result<Boundary> {
        self.inner.boundary()
    }

    /// The older kept checkpoint's F is `sequence`, at `offset` in the ring: space before it is free, as soon as a durable record's D covers
    /// all before F (usually at once). Stale calls (a lower sequence than before) are ignored.
    pub fn release_before(&self, offset: u64, sequence: JournalSequence) {
        self.inner.release_before(offset, sequence);
    }

    /// How full the ring is, in thousandths of what ordinary commits may fill, counted from the older kept checkpoint's F; at least 1000 while
    /// somebody waits for ring space. A checkpoint starts at 400.
    #[must_use]
    pub fn fill_permille(&self) -> u32 {
        self.inner.state.lock().fill_permille()
    }

    /// The part of [`Self::fill_permille`] that was filled since the newest [`Self::boundary`]: what a checkpoint now would begin to free.
    #[must_use]
    pub fn unreflected_permille(&self) -> u32 {
        self.inner.state.lock().unreflected_permille()
    }

    /// Called once when the fill has passed 400 and a checkpoint would begin to free some of that (again after each boundary or release), and
    /// when somebody begins to wait for ring space, again after each release that was not enough: one checkpoint frees only what is before
    /// the *older* kept one's F, so it may take two. It is called with the caller's leaf locks held: it may set a flag and notify an event, no more. The first hook that is set stays.
    pub fn set_pressure_hook(&self, hook: PressureHook) {
        let _ = self.inner.pressure.set(hook);
    }

    /// Adds a hook that is called when the journal latches, after everybody can see it ([`Self::latched`]); at once if it has. The caller of
    /// [`Self::latch`] may hold leaf locks: it may set a flag and notify an event, no more.
    pub fn on_latch(&self, hook: LatchHook) {
        self.inner.latch_hooks.lock().push(std::sync::Arc::clone(&hook));
        if let Some(reason) = self.latched() {
            hook(&reason);
        }
    }

    /// Live totals: everything that was appended.
    #[must_use]
    pub fn totals(&self) -> Totals {
        self.inner.state.lock().totals
    }

    /// Whether every commit must be flushed before it is acknowledged (`commit=0`).
    #[must_use]
    pub fn commits_at_once(&self) -> bool {
        self.inner.commit_interval.is_zero()
    }

    /// The background writer: one worker.
    #[must_use]
    pub fn workers(&self) -> Vec<std::sync::Arc<dyn Worker>> {
        vec![std::sync::Arc::new(writer::Committer::new(Arc::clone(&self.inner)))]
    }

    /// Makes everything durable, at the end of a mount.
    ///
    /// # Errors
    /// As [`Self::flush`].
    pub fn close(&self) -> Result<()> {
        self.flush(self.newest())
    }

    /// A checkpoint found no bucket for its nodes. Who waits for a checkpoint to free the ring is told when that has happened a few times.
    pub fn checkpoint_starved(&self) {
        self.inner.state.lock().starvations += 1;
        self.inner.space.notify();
    }

    /// Refuses everything from now on: reservations, flushes, boundaries fail with [`Error::Latched`]. The first reason stays.
    pub fn latch(&self, reason: impl Into<String>) {
        self.inner.latch(reason.into());
    }

    /// Why the journal refuses everything, if it does.
    #[must_use]
    pub fn latched(&self) -> Option<String> {
        self.inner.state.lock().latched.clone()
    }
}
