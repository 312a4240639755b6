//! Open buckets, the supply of free ones, and the queue of emptied ones. See [the module](super) for the life of a bucket.
//!
//! In-memory effects of commits arrive by [`Allocator::bucket_committed`] with no lock held, so for one bucket they may arrive out of
//! order. Only "emptied" may come late (every other change is made by someone who holds the bucket open, or taken, until its
//! effects have arrived), and generations order it: a bucket is emptied once in each generation, and counted again at most
//! once in the next.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::fragmentation::FragmentationIndex;
use super::references::ReferenceTable;
use super::{
    BucketKey, BucketStore, Counters, FreeCandidate, Reserves, SpaceReservation, Usage, Watermark, WritePoint,
};
use crate::env::Event;
use crate::error::Result;
use crate::format::space::{Bucket, BucketState};
use crate::metrics::Metrics;
use crate::sync::atomic::{AtomicI64, Ordering};
use crate::sync::{Arc, Mutex};
use crate::units::{BucketIndex, DeviceIndex, JournalSequence, round_down, round_up};

/// Free buckets that are looked for at a time.
const SUPPLY_TARGET: usize = 32;
/// Most write points for users.
const USER_POINTS_MAX: u64 = 8;
/// How often a pointer of one generation may be refused as too old before it is called damage.
const STALE_POINTERS_MAX: u32 = 1000;

#[derive(Debug)]
struct OpenBucket {
    /// Generation that new pointers carry: the newest that is known.
    generation: u32,
    /// Generation when it was opened.
    opened_generation: u32,
    /// First byte that was not handed out.
    next_offset: u32,
    /// Allocations that are not dropped.
    allocations: u32,
    /// Write point that it stands at; `None` when it is full.
    point: Option<usize>,
    /// Whether a transaction has counted bytes in it, so that its key says so.
    counted: bool,
    /// The newest emptying: the generation that it began, and its record.
    emptied: Option<(u32, JournalSequence)>,
    /// The newest generation in which it was counted (again).
    counted_generation: u32,
    /// Pointers refused since the generation last went up.
    stale_pointers: u32,
    /// Bytes counted in this open life.
    charged: i64,
}

impl OpenBucket {
    fn emptied_now(&self) -> Option<(u32, JournalSequence)> {
        self.emptied.filter(|(generation, _)| *generation > self.counted_generation)
    }
}

/// An emptied bucket that may be freed now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Emptied {
    /// Which.
    pub key: BucketKey,
    /// The generation that its emptying began; `None` if it was emptied before the mount.
    pub generation: Option<u32>,
    /// The record that emptied it.
    pub sequence: JournalSequence,
}

#[derive(Debug)]
struct State {
    /// Open bucket of each write point; the last is copygc's.
    points: Vec<Option<BucketKey>>,
    open: BTreeMap<BucketKey, OpenBucket>,
    supply: VecDeque<FreeCandidate>,
    /// Invariant 3 of the module.
    taken: BTreeSet<BucketKey>,
    /// What left `taken` while somebody searched.
    departed: BTreeSet<BucketKey>,
    searches: u32,
    /// Where the search goes on, for each device.
    cursors: Vec<BucketIndex>,
    /// Free (or soon free) buckets that are taken, but for the supply's.
    held: u64,
    /// A search found nothing at all, and nothing became free since.
    dry: bool,
    /// Goes up when something becomes free.
    freeings: u64,
    emptied: BTreeMap<(JournalSequence, BucketKey), Option<u32>>,
}

impl State {
    fn untake(&mut self, key: BucketKey) {
        self.taken.remove(&key);
        if self.searches > 0 {
            self.departed.insert(key);
        }
        self.freeings += 1;
        self.dry = false;
    }
}

/// What [`Allocator::take`] came to.
#[derive(Debug)]
pub enum Take {
    /// Space.
    Space(Allocation),
    /// The supply ran out: [`Allocator::refill`], then try again.
    Refill,
    /// No bucket may be opened at this watermark now.
    Full,
}

/// The allocator of one filesystem.
#[derive(Debug)]
pub struct Allocator {
    reserves: Reserves,
    counters: Arc<Counters>,
    references: Arc<ReferenceTable>,
    fragmentation: Mutex<FragmentationIndex>,
    state: Mutex<State>,
    changed: Event,
    /// Notified when a bucket was emptied.
    emptied_event: Event,
    /// Free buckets of which the host was not told, as far as this mount has seen them.
    undiscarded: AtomicI64,
    metrics: Arc<Metrics>,
}

impl Allocator {
    /// An allocator with no open bucket and nothing known.
    #[must_use]
    pub fn new(reserves: Reserves, device_count: usize, metrics: Arc<Metrics>) -> Arc<Self> {
        let user_points = (reserves.usable_buckets / 128).clamp(1, USER_POINTS_MAX);
        let state = State {
            points: (0..=user_points).map(|_| None).collect(),
            open: BTreeMap::new(),
            supply: VecDeque::new(),
            taken: BTreeSet::new(),
            departed: BTreeSet::new(),
            searches: 0,
            cursors: vec![BucketIndex(0); device_count],
            held: 0,
            dry: false,
            freeings: 0,
            emptied: BTreeMap::new(),
        };
        Arc::new(Self {
            reserves,
            counters: Arc::default(),
            references: Arc::default(),
            fragmentation: Mutex::default(),
            state: Mutex::new(state),
            changed: Event::new(),
            emptied_event: Event::new(),
            undiscarded: AtomicI64::new(0),
            metrics,
        })
    }

    /// The reserves.
    #[must_use]
    pub fn reserves(&self) -> &Reserves {
        &self.reserves
    }

    /// The counters.
    #[must_use]
    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// Readers' references.
    #[must_use]
    pub fn references(&self) -> &Arc<ReferenceTable> {
        &self.references
    }

    /// Candidates for copygc.
    #[must_use]
    pub fn fragmentation(&self) -> &Mutex<FragmentationIndex> {
        &self.fragmentation
    }

    /// Notified when space may have become available.
    #[must_use]
    pub fn changed(&self) -> &Event {
        &self.changed
    }

    /// Notified when a bucket was emptied, or somebody wants those that were to be freed soon.
    #[must_use]
    pub fn emptied_event(&self) -> &Event {
        &self.emptied_event
    }

    /// Where the space is.
    #[must_use]
    pub fn usage(&self) -> Usage {
        self.counters.usage(&self.reserves)
    }

    /// Promises `bytes` of data.
    ///
    /// # Errors
    /// [`crate::Error::NoSpace`].
    pub fn reserve(&self, bytes: u64) -> Result<SpaceReservation> {
        SpaceReservation::admit(&self.counters, &self.reserves, bytes)
    }

    /// Promises `bytes` of unwritten space.
    ///
    /// # Errors
    /// [`crate::Error::NoSpace`].
    pub fn reserve_unwritten(&self, bytes: u64) -> Result<SpaceReservation> {
        SpaceReservation::admit_unwritten(&self.counters, &self.reserves, bytes)
    }

    /// Promises the space of `key_bytes` of keys.
    ///
    /// # Errors
    /// [`crate::Error::NoSpace`].
    pub fn reserve_metadata(&self, key_bytes: u64) -> Result<SpaceReservation> {
        SpaceReservation::admit_metadata(&self.counters, &self.reserves, key_bytes)
    }

    /// Promises from the reserve; never refused.
    #[must_use]
    pub fn reserve_privileged(&self, bytes: u64) -> SpaceReservation {
        SpaceReservation::privileged(&self.counters, &self.reserves, bytes)
    }

    fn bucket_bytes(&self) -> u32 {
        u32::try_from(self.reserves.bucket_bytes).unwrap_or(u32::MAX)
    }

    fn point_index(state: &State, point: WritePoint) -> usize {
        let user_points = state.points.len() - 1;
        match point {
            WritePoint::CopyGc => user_points,
            WritePoint::User(hash) => {
                let mixed = hash.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32;
                usize::try_from(mixed % user_points.max(1) as u64).unwrap_or(0)
            }
        }
    }

    /// Free buckets that nobody holds.
    fn loose_buckets(&self, state: &State) -> u64 {
        self.counters.free_buckets(&self.reserves).saturating_sub(state.held)
    }

    /// Buckets that could be opened or claimed now, the reserves included.
    #[must_use]
    pub fn loose(&self) -> u64 {
        self.loose_buckets(&self.state.lock())
    }

    /// Contiguous space: at most `bytes` (rounded up to blocks), at least a block.
    pub fn take(self: &Arc<Self>, point: WritePoint, bytes: u32, watermark: Watermark) -> Take {
        let mut state = self.state.lock();
        let index = Self::point_index(&state, point);
        if let Some(key) = state.points.get(index).copied().flatten() {
            return self.hand_out(&mut state, key, bytes).map_or(Take::Full, Take::Space);
        }
        if self.loose_buckets(&state) > self.counters.floor_buckets(&self.reserves, watermark) {
            if let Some(candidate) = state.supply.pop_front() {
                self.open(&mut state, candidate, index);
                return self.hand_out(&mut state, candidate.key, bytes).map_or(Take::Full, Take::Space);
            }
            if !state.dry {
                return Take::Refill;
            }
        }
        // The tail of another stream's bucket is better than none; copygc's is left to copygc.
        let user_points = state.points.len() - 1;
        if let Some(key) = state.points.iter().take(user_points).copied().flatten().next() {
            return self.hand_out(&mut state, key, bytes).map_or(Take::Full, Take::Space);
        }
        Take::Full
    }

    /// Whether [`Self::take`] would not say [`Take::Full`] now.
    #[must_use]
    pub fn could_take(&self, point: WritePoint, watermark: Watermark) -> bool {
        let state = self.state.lock();
        let index = Self::point_index(&state, point);
        let user_points = state.points.len() - 1;
        state.points.get(index).is_some_and(Option::is_some)
            || (self.loose_buckets(&state) > self.counters.floor_buckets(&self.reserves, watermark)
                && (!state.supply.is_empty() || !state.dry))
            || state.points.iter().take(user_points).any(Option::is_some)
    }

    fn open(&self, state: &mut State, candidate: FreeCandidate, index: usize) {
        self.metrics.buckets_opened.increment();
        if !candidate.discarded {
            self.add_undiscarded(-1);
        }
        state.held += 1;
        state.open.insert(
            candidate.key,
            OpenBucket {
                generation: candidate.generation,
                opened_generation: candidate.generation,
                next_offset: 0,
                allocations: 0,
                point: Some(index),
                counted: false,
                emptied: None,
                counted_generation: candidate.generation,
                stale_pointers: 0,
                charged: 0,
            },
        );
        if let Some(slot) = state.points.get_mut(index) {
            *slot = Some(candidate.key);
        }
    }

    /// Space at the end of an open bucket that stands at a write point; a full one leaves its write point.
    fn hand_out(self: &Arc<Self>, state: &mut State, key: BucketKey, bytes: u32) -> Option<Allocation> {
        let bucket_bytes = self.bucket_bytes();
        let block_bytes = self.reserves.block_bytes;
        let bucket = state.open.get_mut(&key)?;
        let start = bucket.next_offset;
        let wanted = round_up(u64::from(bytes.max(1)), block_bytes);
        let room = round_down(u64::from(bucket_bytes.saturating_sub(start)), block_bytes);
        let length = u32::try_from(wanted.min(room)).unwrap_or(0);
        if length == 0 {
            return None;
        }
        bucket.next_offset = start + length;
        bucket.allocations += 1;
        if u64::from(bucket_bytes - bucket.next_offset) < block_bytes {
            let point = bucket.point.take();
            if let Some(slot) = point.and_then(|index| state.points.get_mut(index)) {
                *slot = None;
            }
        }
        Some(Allocation {
            allocator: Arc::clone(self),
            device: key.0,
            bucket: key.1,
            offset: key.1.0 * self.reserves.bucket_bytes + u64::from(start),
            length,
        })
    }

    fn release(&self, key: BucketKey) {
        let charged = {
            let mut state = self.state.lock();
            let Some(bucket) = state.open.get_mut(&key) else { return };
            bucket.allocations = bucket.allocations.saturating_sub(1);
            if bucket.allocations > 0 || bucket.point.is_some() {
                return;
            }
            Self::close(&mut state, key)
        };
        if let Some(charged) = charged.filter(|charged| *charged < self.reserves.bucket_bytes) {
            self.fragmentation.lock().note(key, charged);
        }
        self.changed.notify();
    }

    /// Ends the open life of a bucket with no allocation. Returns its count if it holds data, to be noted for copygc: nothing else would
    /// tell it of space that was handed out and never counted.
    fn close(state: &mut State, key: BucketKey) -> Option<u64> {
        let bucket = state.open.remove(&key)?;
        if let Some(slot) = bucket.point.and_then(|index| state.points.get_mut(index)) {
            *slot = None;
        }
        if !bucket.counted {
            state.held = state.held.saturating_sub(1);
        } else if let Some((generation, sequence)) = bucket.emptied_now() {
            state.emptied.insert((sequence, key), Some(generation));
        }
        state.untake(key);
        u64::try_from(bucket.charged).ok().filter(|charged| *charged > 0)
    }

    /// Closes open buckets that hold nothing and that nobody writes to, so that they can be freed or used elsewhere. Returns
    /// whether there was one.
    pub fn close_empty(&self) -> bool {
        let mut state = self.state.lock();
        let idle: Vec<BucketKey> = state
            .open
            .iter()
            .filter(|(_, bucket)| bucket.allocations == 0 && (!bucket.counted || bucket.emptied_now().is_some()))
            .map(|(key, _)| *key)
            .collect();
        for key in &idle {
            let _ = Self::close(&mut state, *key);
        }
        !idle.is_empty()
    }

    /// Looks for free buckets where the last search ended, then for never-used ones. Returns whether the supply has any.
    /// Holds no lock while it looks; several may search at once.
    ///
    /// # Errors
    /// The store's.
    pub fn refill(&self, store: &dyn BucketStore) -> Result<bool> {
        let freeings = {
            let mut state = self.state.lock();
            state.searches += 1;
            state.freeings
        };
        let outcome = self.search(store);
        let mut state = self.state.lock();
        state.searches -= 1;
        if state.searches == 0 {
            state.departed.clear();
        }
        outcome?;
        if state.supply.is_empty() && state.freeings == freeings {
            state.dry = true;
        }
        Ok(!state.supply.is_empty())
    }

    fn search(&self, store: &dyn BucketStore) -> Result<()> {
        let device_count = self.state.lock().cursors.len();
        for device in (0..=u8::MAX).map(DeviceIndex).take(device_count) {
            if self.search_device(store, device)? > 0 {
                return Ok(());
            }
            while store.extend(device)? > 0 {
                if self.search_device(store, device)? > 0 {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// One round over a device's free buckets, which ends early when enough is found.
    fn search_device(&self, store: &dyn BucketStore, device: DeviceIndex) -> Result<usize> {
        let slot = usize::from(device.0);
        let start = self.state.lock().cursors.get(slot).copied().unwrap_or_default();
        let (mut from, mut wrapped, mut found) = (start, false, 0);
        loop {
            let batch = store.free_buckets(device, from, 2 * SUPPLY_TARGET)?;
            let mut state = self.state.lock();
            for candidate in batch.candidates {
                if wrapped && candidate.key.1 >= start {
                    return Ok(found);
                }
                if found >= SUPPLY_TARGET {
                    if let Some(cursor) = state.cursors.get_mut(slot) {
                        *cursor = candidate.key.1;
                    }
                    return Ok(found);
                }
                if !state.taken.contains(&candidate.key) && !state.departed.contains(&candidate.key) {
                    state.taken.insert(candidate.key);
                    state.supply.push_back(candidate);
                    found += 1;
                }
            }
            match batch.next {
                Some(next) if next > from => from = next,
                _ if wrapped || start == BucketIndex(0) => {
                    if let Some(cursor) = state.cursors.get_mut(slot) {
                        *cursor = BucketIndex(0);
                    }
                    return Ok(found);
                }
                _ => (from, wrapped) = (BucketIndex(0), true),
            }
        }
    }

    /// Holds a free bucket that the caller found in the trees, for a claim or a discard: nobody else gets it. `false` if it is taken.
    /// To be ended by [`Self::finish`]. The caller's look at the trees must come *after* this, since before it may have been stale.
    #[must_use]
    pub fn hold(&self, key: BucketKey) -> bool {
        let mut state = self.state.lock();
        if state.open.contains_key(&key) {
            return false;
        }
        if let Some(queued) = state.supply.iter().position(|candidate| candidate.key == key) {
            state.supply.remove(queued);
        } else if !state.taken.insert(key) {
            return false;
        }
        state.held += 1;
        true
    }

    /// Ends a hold. A bucket that is free now may be given along, to be opened soon (`first`: next).
    pub fn finish(&self, key: BucketKey, free: Option<FreeCandidate>, first: bool) {
        {
            let mut state = self.state.lock();
            state.held = state.held.saturating_sub(1);
            match free {
                Some(candidate) if first => {
                    state.supply.push_front(candidate);
                    state.freeings += 1;
                    state.dry = false;
                }
                Some(candidate) if state.supply.len() < SUPPLY_TARGET => {
                    state.supply.push_back(candidate);
                    state.freeings += 1;
                    state.dry = false;
                }
                _ => state.untake(key),
            }
        }
        self.changed.notify();
    }

    /// Free buckets of which the host was not told, as far as this mount has seen them.
    #[must_use]
    pub fn undiscarded(&self) -> u64 {
        u64::try_from(self.undiscarded.load(Ordering::Relaxed)).unwrap_or(0)
    }

    /// Counts such buckets.
    pub fn add_undiscarded(&self, delta: i64) {
        self.undiscarded.fetch_add(delta, Ordering::Relaxed);
    }

    /// Adds a bucket that was emptied before the mount; `sequence` is the newest record of the log then.
    pub fn add_emptied(&self, key: BucketKey, sequence: JournalSequence) {
        self.state.lock().emptied.insert((sequence, key), None);
    }

    /// Emptied buckets that may be freed: emptied at or below `reusable`, not open, and with no reader. At most `limit`. They are held until
    /// [`Self::finish`].
    #[must_use]
    pub fn eligible(&self, reusable: JournalSequence, limit: usize) -> Vec<Emptied> {
        let chosen: Vec<Emptied> = {
            let mut state = self.state.lock();
            let chosen: Vec<Emptied> = state
                .emptied
                .iter()
                .take_while(|((sequence, _), _)| *sequence <= reusable)
                .filter(|((_, key), _)| !state.taken.contains(key))
                .take(limit)
                .map(|((sequence, key), generation)| Emptied {
                    key: *key,
                    generation: *generation,
                    sequence: *sequence,
                })
                .collect();
            for emptied in &chosen {
                state.emptied.remove(&(emptied.sequence, emptied.key));
                state.taken.insert(emptied.key);
                state.held += 1;
            }
            chosen
        };
        if chosen.is_empty() {
            return chosen;
        }
        self.references.announce_freeing();
        let (referenced, free): (Vec<_>, Vec<_>) =
            chosen.into_iter().partition(|emptied| self.references.is_referenced(emptied.key));
        for emptied in referenced {
            self.put_back(emptied);
        }
        free
    }

    /// Undoes [`Self::eligible`] for a bucket that could not be freed now.
    pub fn put_back(&self, emptied: Emptied) {
        let mut state = self.state.lock();
        state.held = state.held.saturating_sub(1);
        state.taken.remove(&emptied.key);
        state.emptied.insert((emptied.sequence, emptied.key), emptied.generation);
    }

    /// Records of the oldest and the newest emptying that waits, if any does.
    #[must_use]
    pub fn emptied_span(&self) -> Option<(JournalSequence, JournalSequence)> {
        let state = self.state.lock();
        let oldest = state.emptied.first_key_value()?.0.0;
        let newest = state.emptied.last_key_value()?.0.0;
        Some((oldest, newest))
    }

    /// Whether a bucket is open.
    #[must_use]
    pub fn is_open(&self, key: BucketKey) -> bool {
        self.state.lock().open.contains_key(&key)
    }

    /// Whether somebody is about to make a change that may free space: an allocation is not dropped yet, or a bucket is held.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        let state = self.state.lock();
        let uncounted = state.open.values().filter(|bucket| !bucket.counted).count() as u64;
        state.held > uncounted || state.open.values().any(|bucket| bucket.allocations > 0)
    }

    /// A pointer of generation `expected` was refused since the bucket's key says `actual`. Whether the body may run again to make it
    /// afresh (the bucket was emptied while open, after the pointer was made); if not, it is damage.
    #[must_use]
    pub fn may_retry_pointer(&self, key: BucketKey, expected: u32, actual: u32) -> bool {
        let mut state = self.state.lock();
        let Some(bucket) = state.open.get_mut(&key) else { return false };
        if expected < bucket.opened_generation || expected >= actual {
            return false;
        }
        if bucket.generation < actual {
            // The emptying has committed, its effect on memory is about to arrive.
            return true;
        }
        bucket.stale_pointers += 1;
        bucket.stale_pointers <= STALE_POINTERS_MAX
    }

    /// Effects of a committed change of a bucket. Short locks, no I/O.
    pub fn bucket_committed(&self, key: BucketKey, old: Bucket, new: Bucket, sequence: JournalSequence) {
        let delta = i128::from(new.charged_bytes) - i128::from(old.charged_bytes);
        let delta = i64::try_from(delta).unwrap_or(if delta < 0 { i64::MIN } else { i64::MAX });
        self.counters.data_bytes.fetch_add(delta, Ordering::SeqCst);
        let mut state = self.state.lock();
        let is_open = state.open.contains_key(&key);
        if old.state != new.state {
            self.count_state(old.state, -1);
            self.count_state(new.state, 1);
        }
        match state.open.get_mut(&key) {
            Some(bucket) => {
                bucket.charged = bucket.charged.saturating_add(delta);
                let first_count = new.state == BucketState::Data && !bucket.counted;
                if new.state == BucketState::Data {
                    bucket.counted = true;
                    bucket.counted_generation = bucket.counted_generation.max(new.generation);
                }
                if old.state != new.state
                    && new.state == BucketState::NeedDiscard
                    && bucket.emptied.is_none_or(|(generation, _)| generation < new.generation)
                {
                    bucket.emptied = Some((new.generation, sequence));
                }
                if new.generation > bucket.generation {
                    bucket.generation = new.generation;
                    bucket.stale_pointers = 0;
                }
                if first_count {
                    state.held = state.held.saturating_sub(1);
                }
            }
            None if old.state != new.state && new.state == BucketState::NeedDiscard => {
                state.emptied.insert((sequence, key), Some(new.generation));
            }
            None => {}
        }
        drop(state);
        if new.state == BucketState::NeedDiscard && old.state != new.state {
            self.metrics.buckets_emptied.increment();
            self.emptied_event.notify();
        }
        let mut fragmentation = self.fragmentation.lock();
        if new.state != BucketState::Data {
            fragmentation.forget(key);
        } else if delta < 0 && !is_open {
            fragmentation.note(key, new.charged_bytes);
        } else {
            fragmentation.correct(key, new.charged_bytes);
        }
    }

    fn count_state(&self, state: BucketState, delta: i64) {
        let counter = match state {
            BucketState::Free | BucketState::Reserved => return,
            BucketState::Data => &self.counters.data_buckets,
            BucketState::Metadata => &self.counters.metadata_buckets,
            BucketState::NeedDiscard => &self.counters.need_discard_buckets,
        };
        counter.fetch_add(delta, Ordering::SeqCst);
    }
}

/// Contiguous space in an open bucket, handed out once. Keeps the bucket open until dropped: to be held until the transaction
/// that counts its bytes has committed. What is dropped uncounted is found again when the bucket is emptied.
#[derive(Debug)]
#[must_use]
pub struct Allocation {
    /// Device.
    pub device: DeviceIndex,
    /// Bucket.
    pub bucket: BucketIndex,
    /// Byte offset on the device.
    pub offset: u64,
    /// Length in bytes, whole blocks.
    pub length: u32,
    allocator: Arc<Allocator>,
}

impl Allocation {
    fn key(&self) -> BucketKey {
        (self.device, self.bucket)
    }

    /// Generation that a pointer made now must carry. It goes up if the bucket is emptied while this allocation is held, so pointers are
    /// made in the transaction's body, each time that it runs: see [`crate::space::pointer`], the only caller.
    #[must_use]
    pub(crate) fn present_generation(&self) -> u32 {
        let state = self.allocator.state.lock();
        state.open.get(&self.key()).map_or(0, |bucket| bucket.generation)
    }

    /// Gives the end back beyond `length` bytes (rounded up to blocks), if nothing was handed out after it.
    pub fn shrink(&mut self, length: u32) {
        let length = u32::try_from(round_up(u64::from(length.max(1)), self.allocator.reserves.block_bytes));
        let Ok(length) = length else { return };
        if length >= self.length {
            return;
        }
        let start = u32::try_from(self.offset % self.allocator.reserves.bucket_bytes).unwrap_or(0);
        let mut state = self.allocator.state.lock();
        if let Some(bucket) = state.open.get_mut(&self.key())
            && bucket.point.is_some()
            && bucket.next_offset == start + self.length
        {
            bucket.next_offset = start + length;
        }
        self.length = length;
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        self.allocator.release(self.key());
    }
}
