//! What the keys about space mean, and the space that is handed out: buckets, free space, need-discard, backpointers, accounting.
//!
//! **Guarantees.** 1. A write that was admitted ([`Space::reserve`]) gets space ([`Space::allocate`]): it may wait for flushes and for copygc, it does not
//! fail. 2. Index trees, counts and accounting say the same as the extents after every transaction, since they change in it
//! (`trigger`). 3. Bytes are rewritten only when a flushed record says that their freeing is durable, and nobody reads them
//! ([`crate::alloc`]).
//!
//! **Pointers and generations.** A bucket's generation goes up in the transaction that empties it, and a bucket may be emptied while it is
//! still open: a small file is written and deleted, the next one is written behind it. The bucket then stands in the need-discard tree
//! with its new generation, stays open, and the next count makes it data again. So a pointer is made *in the body* of the
//! transaction that puts it ([`pointer()`], [`stamp`]), with the generation of that moment; if the bucket is emptied between that and the commit, the
//! trigger sees the difference under the leaf's lock and the body runs again. The data is not written again: within one open life no
//! byte is handed out twice.
//!
//! **The trees.** A bucket without a key in the buckets tree was never used and is free. The device's untouched mark says from where on such
//! buckets have no key in the free-space tree either; node buckets in the upper half of the device may have been claimed above it.
//!
//! Locks: only the allocator's short ones, never over a transaction or I/O. What waits: `allocate`, through [`Env::wait`].

mod bucket_state;
mod copygc;
mod free;
mod nodes;
mod store;
mod trigger;

use crate::alloc::capacity::reserved_ranges;
use crate::alloc::references::ReuseMark;
use crate::alloc::{Allocator, BucketKey, Reserves, Take};
use crate::btree::CheckpointReason;
use crate::device::BlockDevice;
use crate::env::{Env, Event, Worker};
use crate::error::{Error, Result};
use crate::format::extent::{ExtentPointer, ExtentValue};
use crate::format::journal::AccountingCounter;
use crate::format::space::Bucket;
use crate::format::superblock::Superblock;
use crate::format::{BtreeId, Position};
use crate::journal::{Journal, JournalWatermark};
use crate::metrics::Metrics;
use crate::sync::Arc;
use crate::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use crate::transaction::{CommitOptions, Transaction, Transactions};
use crate::units::{BucketIndex, DeviceIndex};

pub use crate::alloc::{Allocation, BucketReferences, SpaceReservation, TestSwitches, Usage, Watermark, WritePoint};
pub use nodes::{Half, NodeBucket};
pub use trigger::SpaceTrigger;

/// Checkpoints that are made for a bucket when nobody else can free one: some merge and move nodes, the next free what only those before used.
const CHECKPOINTS_FOR_A_BUCKET: usize = 4;

/// The space of one filesystem. See the module's documentation.
pub struct Space {
    superblock: Arc<Superblock>,
    /// Ranges of the fixed areas of each device.
    reserved: Vec<Vec<(u64, u64)>>,
    devices: Vec<Arc<dyn BlockDevice>>,
    transactions: Arc<Transactions>,
    journal: Arc<Journal>,
    env: Arc<Env>,
    metrics: Arc<Metrics>,
    allocator: Arc<Allocator>,
    switches: TestSwitches,
    /// Promises that were asked for, where a switch refuses some.
    promises: AtomicU32,
    /// Allocations that were asked for, where a switch refuses some.
    allocations: AtomicU32,
    /// Threads that wait for a free bucket.
    waiters: AtomicU32,
    /// Wakes copygc.
    copygc_event: Event,
    /// Copygc has found nothing to move since the last change.
    copygc_exhausted: AtomicBool,
    /// What freeing writes finds no space.
    cannot_free: AtomicBool,
    /// The host has refused to take free buckets back: it is not asked again.
    discards_fail: AtomicBool,
    /// Where the search for buckets to punch goes on, on device 0, 1, ... in turn.
    punch_cursor: crate::sync::Mutex<BucketKey>,
    /// Where the search for never-used node buckets goes on, for each half of the device.
    node_cursors: [AtomicU64; 2],
}

impl std::fmt::Debug for Space {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Space").field("usage", &self.usage()).finish_non_exhaustive()
    }
}

impl Space {
    /// Opens the space of a filesystem whose log has been replayed, and becomes the transactions' trigger. Reads the need-discard tree, which is
    /// no longer than what the log and the last moments before it emptied; no bucket is read.
    ///
    /// # Errors
    /// The device's, or damage.
    pub fn open(
        superblock: Arc<Superblock>,
        devices: Vec<Arc<dyn BlockDevice>>,
        transactions: Arc<Transactions>,
        journal: Arc<Journal>,
        env: Arc<Env>,
        metrics: Arc<Metrics>,
    ) -> Result<Arc<Self>> {
        Self::open_with(superblock, devices, transactions, journal, env, metrics, TestSwitches::default())
    }

    /// As [`Self::open`], with deliberate faults.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_with(
        superblock: Arc<Superblock>,
        devices: Vec<Arc<dyn BlockDevice>>,
        transactions: Arc<Transactions>,
        journal: Arc<Journal>,
        env: Arc<Env>,
        metrics: Arc<Metrics>,
        switches: TestSwitches,
    ) -> Result<Arc<Self>> {
        let reserves = Reserves::of(&superblock);
        let allocator = Allocator::new(reserves, superblock.members.len(), Arc::clone(&metrics));
        let totals = journal.totals();
        let counters = allocator.counters();
        for (counter, target) in [
            (AccountingCounter::DataBytes, &counters.data_bytes),
            (AccountingCounter::ReservedBytes, &counters.unwritten_bytes),
            (AccountingCounter::DataBuckets, &counters.data_buckets),
            (AccountingCounter::MetadataBuckets, &counters.metadata_buckets),
            (AccountingCounter::NeedDiscardBuckets, &counters.need_discard_buckets),
        ] {
            target.store(totals.get(counter), Ordering::SeqCst);
        }
        let reserved: Vec<_> =
            (0..=u8::MAX).zip(&superblock.members).map(|(device, _)| reserved_ranges(&superblock, device)).collect();
        transactions.set_trigger(Arc::new(SpaceTrigger::new(Arc::clone(&superblock), Arc::clone(&allocator))))?;
        let space = Arc::new(Self {
            superblock,
            reserved,
            devices,
            transactions,
            journal,
            env,
            metrics,
            allocator,
            switches,
            promises: AtomicU32::new(0),
            allocations: AtomicU32::new(0),
            waiters: AtomicU32::new(0),
            copygc_event: Event::new(),
            copygc_exhausted: AtomicBool::new(false),
            cannot_free: AtomicBool::new(false),
            discards_fail: AtomicBool::new(false),
            punch_cursor: crate::sync::Mutex::new((DeviceIndex(0), BucketIndex(0))),
            node_cursors: [AtomicU64::new(0), AtomicU64::new(0)],
        });
        // Who waits for a bucket looks whether the journal still works, and must be woken to do so.
        let waited_on = Arc::clone(&space.allocator);
        space.journal.on_latch(std::sync::Arc::new(move |_| waited_on.changed().notify()));
        space.refresh_node_bytes();
        space.load_emptied()?;
        Ok(space)
    }

    /// What is kept back. Depends on the superblock alone: [`Reserves::of`] says the same before the filesystem is open.
    #[must_use]
    pub fn reserves(&self) -> &Reserves {
        self.allocator.reserves()
    }

    /// Promises `bytes` of file data (rounded up to blocks), worst-case metadata included. Decided from counters alone: space that is freed but
    /// not yet reusable counts as free. Give it back (drop it) when the transaction that counts the data has committed.
    ///
    /// # Errors
    /// [`Error::NoSpace`]. Dirty data that overwrites or compresses gives back more than it is charged with, so write back first, then ask again.
    pub fn reserve(&self, bytes: u64) -> Result<SpaceReservation> {
        self.before_promise()?;
        self.allocator.reserve(bytes)
    }

    /// As [`Self::reserve`], for space that fallocate is to hold: with what writing it will take, block by block.
    ///
    /// # Errors
    /// [`Error::NoSpace`].
    pub fn reserve_unwritten(&self, bytes: u64) -> Result<SpaceReservation> {
        self.before_promise()?;
        self.allocator.reserve_unwritten(bytes)
    }

    /// Bytes of neighbouring data, in whole blocks, that [`Self::reserve`] would promise now.
    #[must_use]
    pub fn reservable_bytes(&self) -> u64 {
        self.refresh_node_bytes();
        self.reserves().data_within(self.allocator.usage().free_bytes)
    }

    /// Promises the space of about `key_bytes` of new keys and values: for operations that make metadata and no data (create, link, setxattr).
    ///
    /// # Errors
    /// [`Error::NoSpace`].
    pub fn reserve_metadata(&self, key_bytes: u64) -> Result<SpaceReservation> {
        self.before_promise()?;
        self.allocator.reserve_metadata(key_bytes)
    }

    fn before_promise(&self) -> Result<()> {
        self.refresh_node_bytes();
        match self.switches.refuse_promises {
            Some((first, last)) if (first..=last).contains(&self.promises.fetch_add(1, Ordering::Relaxed)) => {
                Err(Error::NoSpace("a test refuses it"))
            }
            _ => Ok(()),
        }
    }

    /// Counts an allocation. Whether a switch says that there is no space for it.
    fn is_refused(&self) -> bool {
        self.metrics.space_allocations.increment();
        let refused = self.switches.refuse_allocations;
        refused.is_some_and(|(first, last)| (first..=last).contains(&self.allocations.fetch_add(1, Ordering::Relaxed)))
    }

    /// Learns what the trees' nodes take.
    fn refresh_node_bytes(&self) {
        let bytes = i64::try_from(self.transactions.forest().node_bytes()).unwrap_or(i64::MAX);
        self.allocator.counters().node_bytes.store(bytes, Ordering::SeqCst);
    }

    /// Promises from the reserve, never refused: for what gives space back (truncate's partial block), for copygc, and for writes into space
    /// that an unwritten extent already holds.
    #[must_use]
    pub fn reserve_privileged(&self, bytes: u64) -> SpaceReservation {
        self.allocator.reserve_privileged(bytes)
    }

    /// Contiguous space in an open bucket: at most `bytes` (rounded up to blocks), at least one block; in one bucket, allocations follow each
    /// other. Waits where it must, for what is freed to become durable or for copygc; holds no lock meanwhile, and the caller holds none.
    ///
    /// # Errors
    /// The device's; [`Error::NoSpace`] if nothing that could free a bucket is left, which an admitted write does not meet.
    pub fn allocate(&self, point: WritePoint, bytes: u32, watermark: Watermark) -> Result<Allocation> {
        if self.is_refused() {
            return Err(Error::NoSpace("a test refuses it"));
        }
        loop {
            match self.allocator.take(point, bytes, watermark) {
                Take::Space(allocation) => return Ok(allocation),
                Take::Refill => {
                    self.allocator.refill(&store::Store::new(self))?;
                }
                Take::Full => self.wait_for_bucket(point, watermark)?,
            }
            if self.copygc_needed() {
                self.copygc_event.notify();
            }
        }
    }

    /// As [`Self::allocate`], but `None` where that would wait for a bucket: for those who hold space already.
    ///
    /// # Errors
    /// The device's, or damage.
    pub fn allocate_now(&self, point: WritePoint, bytes: u32, watermark: Watermark) -> Result<Option<Allocation>> {
        if self.is_refused() {
            return Ok(None);
        }
        loop {
            match self.allocator.take(point, bytes, watermark) {
                Take::Space(allocation) => return Ok(Some(allocation)),
                Take::Refill => {
                    self.allocator.refill(&store::Store::new(self))?;
                }
                Take::Full if self.free_now()? => {}
                Take::Full => return Ok(None),
            }
        }
    }

    /// As [`Self::allocate_now`], for copygc, which others wait for.
    ///
    /// # Errors
    /// The device's, or damage.
    pub fn try_allocate(&self, point: WritePoint, bytes: u32, watermark: Watermark) -> Result<Option<Allocation>> {
        let taken = self.allocate_now(point, bytes, watermark)?;
        if taken.is_none() && self.allocator.emptied_span().is_none() {
            // Copygc has used its reserve up and nothing is about to come back: whoever waits for it is told.
            self.copygc_exhausted.store(true, Ordering::SeqCst);
            self.allocator.changed().notify();
        }
        Ok(taken)
    }

    /// Waits until it is worth trying again. First frees what it can itself. Where nobody can free a bucket any more, nodes in sparsely used
    /// buckets may have taken copygc's own: then checkpoints give them back. No lock of a node or folio is held.
    fn wait_for_bucket(&self, point: WritePoint, watermark: Watermark) -> Result<()> {
        let forest = self.transactions.forest();
        for _ in 0..CHECKPOINTS_FOR_A_BUCKET {
            match self.wait_for_others(point, watermark) {
                Err(Error::NoSpace(_)) if forest.could_free_nodes() => {}
                outcome => return outcome,
            }
            match forest.checkpoint(&*self.journal, CheckpointReason::Requested) {
                Ok(_) | Err(Error::NoSpace(_)) => {}
                // In simulation a running one may be below us on the stack.
                Err(Error::Bug(_)) if self.env.is_simulated() => break,
                Err(error) => return Err(error),
            }
        }
        self.wait_for_others(point, watermark)
    }

    fn wait_for_others(&self, point: WritePoint, watermark: Watermark) -> Result<()> {
        if self.free_now()? {
            return Ok(());
        }
        self.copygc_exhausted.store(false, Ordering::SeqCst);
        self.waiters.fetch_add(1, Ordering::SeqCst);
        self.copygc_event.notify();
        self.allocator.emptied_event().notify();
        let outcome = self.env.wait(self.allocator.changed(), || {
            if self.allocator.could_take(point, watermark) {
                return Some(Ok(()));
            }
            if let Some(reason) = self.journal.latched() {
                return Some(Err(Error::Latched { reason }));
            }
            self.is_hopeless().then_some(Err(Error::NoSpace("no bucket is free, and none can become free")))
        });
        self.waiters.fetch_sub(1, Ordering::SeqCst);
        outcome?
    }

    /// Frees emptied buckets with a flush of its own, without waiting for anybody. Returns whether there were any.
    fn free_now(&self) -> Result<bool> {
        self.allocator.close_empty();
        let Some((_, newest)) = self.allocator.emptied_span() else { return Ok(false) };
        self.journal.make_reusable(newest, JournalWatermark::Reclaim)?;
        Ok(self.free_emptied(CommitOptions::reclaim(), 64)? > 0)
    }

    /// Copygc cannot write down what it would move: whoever waits for it is told.
    pub fn copygc_lacks_space(&self) {
        self.copygc_exhausted.store(true, Ordering::SeqCst);
        self.allocator.changed().notify();
    }

    /// Whether nothing under way can free a bucket.
    fn is_hopeless(&self) -> bool {
        if self.cannot_free.load(Ordering::SeqCst) {
            return true;
        }
        self.copygc_exhausted.load(Ordering::SeqCst)
            && self.allocator.emptied_span().is_none()
            && !self.allocator.is_busy()
    }

    /// References on the buckets that `pointers` point into: none is rewritten or discarded while they are held. To be followed by a look at the
    /// key: only a key that is there *after* this names bytes that stay. The look can be left out if
    /// [`Self::unchanged_since`] a mark from before the first look.
    pub fn reference(&self, pointers: &[ExtentPointer]) -> BucketReferences {
        let bucket_bytes = self.reserves().bucket_bytes;
        let keys = pointers.iter().map(|pointer| (pointer.device, BucketIndex(pointer.offset / bucket_bytes)));
        self.allocator.references().take(keys)
    }

    /// The deliberate faults.
    #[must_use]
    pub fn switches(&self) -> &TestSwitches {
        &self.switches
    }

    /// Pauses if a test asked for it: at places where a race would come between if something allowed it.
    pub fn test_pause(&self) {
        if self.switches.pause_us > 0 {
            let limit = std::time::Duration::from_micros(self.switches.pause_us.into());
            // Some none, some all of it.
            let share = self.env.monotonic().subsec_micros() % 4;
            std::thread::sleep(limit * share / 3);
        }
    }

    /// The present moment, to be taken before extents are looked up.
    #[must_use]
    pub fn reuse_mark(&self) -> ReuseMark {
        self.allocator.references().mark()
    }

    /// Whether no bucket was freed since: then what was looked up after the mark, and referenced, stays.
    #[must_use]
    pub fn unchanged_since(&self, mark: ReuseMark) -> bool {
        self.allocator.references().unchanged_since(mark)
    }

    /// Where the space is.
    #[must_use]
    pub fn usage(&self) -> Usage {
        self.refresh_node_bytes();
        self.allocator.usage()
    }

    /// A bucket's key now.
    ///
    /// # Errors
    /// The device's, or damage.
    pub fn bucket(&self, (device, bucket): BucketKey) -> Result<Bucket> {
        bucket_of(&self.transactions, (device, bucket))
    }

    /// Keeps buckets from ever being opened, claimed, freed or discarded, whatever the trees say of them: for fsck, which has found that they hold
    /// something.
    pub fn withhold(&self, buckets: &[BucketKey]) {
        for &key in buckets {
            // Whoever has it already is us.
            let _ = self.allocator.hold(key);
        }
    }

    /// The workers that free emptied buckets and punch holes.
    #[must_use]
    pub fn workers(self: &Arc<Self>) -> Vec<Arc<dyn Worker>> {
        vec![Arc::new(free::FreeWorker::new(Arc::clone(self)))]
    }

    /// The allocator's state, to be shown when a test hangs.
    #[cfg(test)]
    pub(crate) fn allocator_for_tests(&self) -> &Allocator {
        &self.allocator
    }

    fn bucket_count(&self, device: DeviceIndex) -> u64 {
        self.superblock.members.get(usize::from(device.0)).map_or(0, |member| member.bucket_count)
    }

    /// Whether a bucket is in a fixed area, or behind the end of its device: whatever keys say, it is never handed out or given back to the host.
    fn is_fixed(&self, (device, bucket): BucketKey) -> bool {
        bucket.0 >= self.bucket_count(device) || store::range_end(self.reserved(device), bucket.0).is_some()
    }

    fn reserved(&self, device: DeviceIndex) -> &[(u64, u64)] {
        self.reserved.get(usize::from(device.0)).map_or(&[], Vec::as_slice)
    }
}

/// A bucket's place in the buckets, free-space and need-discard trees.
fn bucket_position((device, bucket): BucketKey) -> Position {
    Position::new(u64::from(device.0), bucket.0, 0)
}

/// A bucket from its stored value; none means never used.
fn decode_bucket(value: Option<&[u8]>) -> Result<Bucket> {
    Ok(value.map(Bucket::decode).transpose()?.unwrap_or(Bucket::UNUSED))
}

fn bucket_of(transactions: &Transactions, key: BucketKey) -> Result<Bucket> {
    decode_bucket(transactions.forest().get(BtreeId::Buckets, bucket_position(key))?.as_deref())
}

/// A pointer to byte `at` of an allocation, with the generation of this moment. To be made in the body of the transaction that puts
/// it, each time that the body runs; the transaction is asked for as the proof.
#[must_use]
pub fn pointer(_body: &Transaction<'_>, allocation: &Allocation, at: u32) -> ExtentPointer {
    ExtentPointer {
        device: allocation.device,
        generation: allocation.present_generation(),
        offset: allocation.offset + u64::from(at),
    }
}

/// Gives the pointers of `value` that lie in `allocation` the generation of this moment: for extents that were made before the body. To be called in
/// the body, each time that it runs.
pub fn stamp(_body: &Transaction<'_>, allocation: &Allocation, value: &mut ExtentValue) {
    if let ExtentValue::Data(data) = value {
        let range = allocation.offset..allocation.offset + u64::from(allocation.length);
        for pointer in &mut data.pointers {
            if pointer.device == allocation.device && range.contains(&pointer.offset) {
                pointer.generation = allocation.present_generation();
            }
        }
    }
}

#[cfg(test)]
mod tests;
