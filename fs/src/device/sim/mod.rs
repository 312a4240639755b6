//! [`SimDevice`]: a device whose power can be cut, and that can misbehave, all by seed.
//!
//! **What it keeps**: the durable image (what certainly survives), the list of writes since the last flush in the order in
//! which they completed, and the current image (what reads see: durable plus unflushed). A flush makes the unflushed durable.
//! [`SimDevice::snapshot`] copies durable image and list cheaply (shared chunks), so one run of a workload gives all its crash
//! points: [`Snapshot`] then enumerates what may be on the medium after a power cut.
//!
//! **Fault model**: at a crash each unflushed write (a discard is one) is kept, dropped, or torn at [`SECTOR_BYTES`], and
//! overlapping ones may have reached the medium in any order; what was flushed survives, unless told to lie. On request:
//! failing reads, writes and flushes; bad sectors; flipped bits; zeroed sectors; writes that are acknowledged and lost,
//! or that land elsewhere; ranges that answer with older content; flushes that do nothing. A failed write may have been
//! stored in part, and so may the rest of its batch; after a failed flush no later one makes anything durable. Discarded ranges
//! hold garbage by seed. Within a batch, requests complete in an order that the seed decides.
//!
//! **Boundaries**: before each request of a write batch, each flush and each discard the hook is called, with no lock held: at these
//! points the set of possible images changes. (A crash *during* a write is covered by the boundary after it, where at least as much
//! has been acknowledged; so take one last snapshot at the end of a run.)
//!
//! One lock guards the state, for the time of a copy.

mod crash;
mod faults;
mod text;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io;

pub use crash::{CrashPlan, PlanOptions, Plans, Sectors, Snapshot, Survivor, UnflushedWrite};

use self::crash::{Content, DiscardKind, Random};
use self::faults::{Faults, WriteFault};
use super::check::{check_range, device_error};
use super::{BlockDevice, Image, ReadRequest, WriteRequest};
use crate::error::{Error, Result};
use crate::sync::{Arc, LockClass, Mutex, Rank, order};

/// What a power cut tears writes at, in bytes.
pub const SECTOR_BYTES: u64 = 512;

/// What a discarded range holds afterwards.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DiscardMode {
    /// By seed, one of the others for each discard; garbage most often.
    #[default]
    Varied,
    /// Random bytes.
    Garbage,
    /// Zeros, as a punched image file.
    Zeros,
    /// What it held before, as a host that cannot discard.
    Keep,
}

/// How a [`SimDevice`] is set up.
#[derive(Clone, Debug)]
pub struct SimOptions {
    /// Decides the order of completions, garbage, and what a failed write leaves behind.
    pub seed: u64,
    /// Alignment of requests in bytes: a power of two from 512 to 4096.
    pub block_bytes: u32,
    /// Refuse writes.
    pub read_only: bool,
    /// What a discarded range holds.
    pub discard_mode: DiscardMode,
    /// Complete the requests of a batch in an order by seed, not as given.
    pub shuffle_batches: bool,
}

impl Default for SimOptions {
    fn default() -> Self {
        Self {
            seed: 0,
            block_bytes: 512,
            read_only: false,
            discard_mode: DiscardMode::default(),
            shuffle_batches: true,
        }
    }
}

/// What is about to happen at a boundary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BoundaryKind {
    /// One request of a write batch.
    Write {
        /// Byte offset.
        offset: u64,
        /// Length in bytes.
        length: u64,
        /// How many requests of the same batch have completed before.
        batch_done: usize,
    },
    /// A flush.
    Flush,
    /// A discard.
    Discard {
        /// Byte offset.
        offset: u64,
        /// Length in bytes.
        length: u64,
    },
}

/// A point at which power may be cut, just before something happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Boundary {
    /// Counts up from 0 in the life of the device.
    pub number: u64,
    /// What happens next.
    pub kind: BoundaryKind,
}

/// Called at every boundary with the device and what happens next; no lock is held.
pub type BoundaryHook = Arc<dyn Fn(&SimDevice, Boundary) + Send + Sync>;

struct State {
    durable: Arc<Image>,
    current: Image,
    unflushed: Vec<Arc<UnflushedWrite>>,
    /// Writes and discards so far.
    writes: u64,
    boundaries: u64,
    random: Random,
    faults: Faults,
    hook: Option<BoundaryHook>,
}

/// See the module's documentation.
pub struct SimDevice {
    options: SimOptions,
    size_bytes: u64,
    state: Mutex<State>,
}

impl SimDevice {
    /// A device of `size_bytes` durable zeros.
    #[must_use]
    pub fn new(size_bytes: u64, options: SimOptions) -> Self {
        Self::from_image(Image::new(size_bytes), options)
    }

    /// A device on which `image` is durable: how a crashed state is opened again.
    #[must_use]
    pub fn from_image(image: Image, options: SimOptions) -> Self {
        let state = State {
            durable: Arc::new(image.clone()),
            unflushed: Vec::new(),
            writes: 0,
            boundaries: 0,
            random: Random::new(options.seed),
            faults: Faults::default(),
            hook: None,
            current: image,
        };
        Self {
            size_bytes: state.current.size_bytes(),
            options,
            state: Mutex::ranked(LockClass::new(Rank::InnerLeaf), state),
        }
    }

    /// A device whose host still holds what `snapshot` says was not flushed, as after the death of the process that wrote it: reads see it,
    /// and a power cut may still undo it.
    #[must_use]
    pub fn from_snapshot(snapshot: &Snapshot, options: SimOptions) -> Self {
        let device = Self::from_image(snapshot.durable().clone(), options);
        {
            let mut state = device.state.lock();
            state.current = snapshot.everything();
            state.unflushed = snapshot.unflushed().to_vec();
            state.writes = state.unflushed.last().map_or(0, |write| write.number() + 1);
        }
        device
    }

    /// Sets what is called at each boundary, in place of what was.
    pub fn set_hook(&self, hook: impl Fn(&SimDevice, Boundary) + Send + Sync + 'static) {
        self.state.lock().hook = Some(Arc::new(hook));
    }

    /// No hook any more.
    pub fn clear_hook(&self) {
        self.state.lock().hook = None;
    }

    /// How many boundaries have passed: the number that the next one will have.
    #[must_use]
    pub fn boundaries(&self) -> u64 {
        self.state.lock().boundaries
    }

    /// How many writes and discards a power cut now could undo.
    #[must_use]
    pub fn unflushed_count(&self) -> usize {
        self.state.lock().unflushed.len()
    }

    /// What a power cut now has to work with. Cheap: nothing is copied but references.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let state = self.state.lock();
        Snapshot::new(Arc::clone(&state.durable), state.unflushed.clone(), state.boundaries)
    }

    /// The image after a power cut now, as `plan` says.
    #[must_use]
    pub fn crash(&self, plan: &CrashPlan) -> Image {
        self.snapshot().crash(plan)
    }

    /// What reads see now: everything that was written, as after a clean shutdown.
    #[must_use]
    pub fn image(&self) -> Image {
        self.state.lock().current.clone()
    }

    fn boundary(&self, kind: BoundaryKind) {
        let (hook, boundary) = {
            let mut state = self.state.lock();
            let boundary = Boundary { number: state.boundaries, kind };
            state.boundaries += 1;
            if state.faults.power_off_at == Some(boundary.number) {
                state.faults.powered_off = true;
            }
            (state.hook.clone(), boundary)
        };
        if let Some(hook) = hook {
            hook(self, boundary);
        }
    }

    fn fail(&self, operation: &'static str, offset: u64, length: u64, errno: rustix::io::Errno) -> Error {
        device_error(operation, self, offset, length, io::Error::from_raw_os_error(errno.raw_os_error()))
    }

    fn order(&self, count: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..count).collect();
        if self.options.shuffle_batches && count > 1 {
            self.state.lock().random.shuffle(&mut order);
        }
        order
    }

    fn read_one(&self, request: &mut ReadRequest<'_>) -> Result<()> {
        let (offset, length) = (request.offset, request.buffer.len() as u64);
        check_range("read", self, offset, length)?;
        let mut state = self.state.lock();
        if let Some(errno) = state.faults.on_read(offset, length) {
            return Err(self.fail("read", offset, length, errno));
        }
        state.current.read(offset, request.buffer);
        state.faults.make_stale(offset, request.buffer);
        Ok(())
    }

    fn write_one(&self, request: &WriteRequest<'_>) -> Result<()> {
        let (offset, length) = (request.offset, request.length());
        let mut state = self.state.lock();
        let state = &mut *state;
        let fault = state.faults.on_write(offset, length);
        let mut data = Vec::with_capacity(length as usize);
        request.data.iter().for_each(|slice| data.extend_from_slice(slice));
        match fault {
            None => state.store(offset, data),
            Some(WriteFault::Lose) => {}
            Some(WriteFault::Misdirect(by)) => {
                if let Some(offset) = offset.checked_add_signed(by)
                    && offset.checked_add(length).is_some_and(|end| end <= self.size_bytes)
                {
                    state.store(offset, data);
                }
            }
            Some(WriteFault::Fail(errno)) => {
                let sectors = state.random.below(length / SECTOR_BYTES + 1);
                data.truncate((sectors * SECTOR_BYTES) as usize);
                if !state.faults.powered_off {
                    state.store(offset, data);
                }
                return Err(self.fail("write", offset, length, errno));
            }
        }
        Ok(())
    }
}

impl State {
    fn store(&mut self, offset: u64, data: Vec<u8>) {
        if data.is_empty() {
            return;
        }
        self.add(UnflushedWrite::new(self.writes, offset, Content::Data(data.into())));
    }

    fn add(&mut self, write: UnflushedWrite) {
        self.writes += 1;
        write.apply(&Sectors::All, &mut self.current);
        self.unflushed.push(Arc::new(write));
    }
}

impl fmt::Debug for SimDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimDevice").field("size_bytes", &self.size_bytes).field("seed", &self.options.seed).finish()
    }
}

impl BlockDevice for SimDevice {
    fn name(&self) -> &str {
        "simulated"
    }

    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn block_bytes(&self) -> u32 {
        self.options.block_bytes
    }

    fn is_read_only(&self) -> bool {
        self.options.read_only
    }

    fn read_batch(&self, requests: &mut [ReadRequest<'_>], landed: &mut dyn FnMut(usize, Result<()>)) {
        order::check_held("a device read", order::OVER_READ);
        for index in self.order(requests.len()) {
            landed(index, self.read_one(&mut requests[index]));
        }
    }

    fn write_batch(&self, requests: &[WriteRequest<'_>]) -> Result<()> {
        order::check_held("a device write", order::OVER_WRITE);
        if self.options.read_only {
            return Err(Error::ReadOnly);
        }
        for request in requests {
            check_range("write", self, request.offset, request.length())?;
        }
        let mut outcome = Ok(());
        for (batch_done, index) in self.order(requests.len()).into_iter().enumerate() {
            let request = &requests[index];
            // After a failure the rest of the batch may or may not have been written.
            if outcome.is_err() && self.state.lock().random.one_in(2) {
                continue;
            }
            self.boundary(BoundaryKind::Write { offset: request.offset, length: request.length(), batch_done });
            let written = self.write_one(request);
            outcome = outcome.and(written);
        }
        outcome
    }

    fn flush(&self) -> Result<()> {
        order::check_held("a device flush", order::OVER_WRITE);
        self.boundary(BoundaryKind::Flush);
        let mut state = self.state.lock();
        let state = &mut *state;
        if let Some(errno) = state.faults.on_flush() {
            return Err(self.fail("flush", 0, self.size_bytes, errno));
        }
        if !state.faults.flush_lies() {
            let durable = Arc::make_mut(&mut state.durable);
            for write in state.unflushed.drain(..) {
                write.apply(&Sectors::All, durable);
            }
        }
        Ok(())
    }

    fn discard(&self, offset: u64, length: u64) -> Result<()> {
        order::check_held("a device discard", order::OVER_WRITE);
        if self.options.read_only {
            return Err(Error::ReadOnly);
        }
        check_range("discard", self, offset, length)?;
        if length == 0 {
            return Ok(());
        }
        self.boundary(BoundaryKind::Discard { offset, length });
        let mut state = self.state.lock();
        if state.faults.powered_off {
            return Err(self.fail("discard", offset, length, rustix::io::Errno::IO));
        }
        state.faults.overwritten(offset, length);
        let seed = state.random.next();
        let kind = match self.options.discard_mode {
            DiscardMode::Garbage => DiscardKind::Garbage(seed),
            DiscardMode::Zeros => DiscardKind::Zeros,
            DiscardMode::Keep => DiscardKind::Keep,
            DiscardMode::Varied => match seed % 8 {
                0 => DiscardKind::Zeros,
                1 => DiscardKind::Keep,
                _ => DiscardKind::Garbage(seed),
            },
        };
        let number = state.writes;
        state.add(UnflushedWrite::new(number, offset, Content::Discarded { kind, length }));
        Ok(())
    }
}
