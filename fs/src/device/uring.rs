//! Submission through io_uring: a whole batch goes to the kernel in one call.
//!
//! A thread takes a ring for the time of a batch, and gives it back: a ring is never shared, and the lock guards the list of idle
//! rings only. Invariants:
//! 1. [`Rings::run`] neither returns nor unwinds while the kernel may still use the memory of a transfer: [`Batch`]'s `Drop` reaps what
//!    is in flight, also when `landed` panics.
//! 2. A ring in the list is empty: nothing in flight, nothing queued.
//! 3. A ring is used by the process that made it: its memory is not there in a child (the kernel marks it so), so a child forgets the
//!    rings of its parent and makes its own.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use io_uring::{IoUring, Probe, opcode, squeue, types};
use rustix::io::Errno;

use super::transfer::{Direction, Step, Transfer};
use crate::sync::Mutex;

/// Requests in flight for one ring.
const RING_ENTRIES: u32 = 128;
/// Idle rings that are kept.
const IDLE_RINGS_MAX: usize = 16;
/// Most bytes of one request.
const CALL_BYTES_MAX: usize = 0x7fff_f000;

struct Ring {
    ring: IoUring,
    process: u32,
}

/// The rings of a device.
pub(super) struct Rings {
    idle: Mutex<Vec<Ring>>,
}

impl Ring {
    fn new() -> io::Result<Self> {
        // Completions are reaped by the thread that waits: no interrupts to other processors are needed. Older kernels do not
        // know the flag.
        let ring =
            IoUring::builder().setup_coop_taskrun().build(RING_ENTRIES).or_else(|_| IoUring::new(RING_ENTRIES))?;
        Ok(Self { ring, process: std::process::id() })
    }

    /// Checks that the kernel not only makes rings but lets us use them (seccomp filters differ).
    fn check(&mut self) -> io::Result<()> {
        let mut probe = Probe::new();
        self.ring.submitter().register_probe(&mut probe)?;
        let needed = [opcode::Read::CODE, opcode::Write::CODE, opcode::Readv::CODE, opcode::Writev::CODE];
        if !needed.iter().all(|&code| probe.is_supported(code)) {
            return Err(Errno::OPNOTSUPP.into());
        }
        // SAFETY: a no-op refers to no memory.
        unsafe { self.ring.submission().push(&opcode::Nop::new().build()) }
            .map_err(|_| io::Error::from(Errno::OPNOTSUPP))?;
        self.ring.submit_and_wait(1)?;
        match self.ring.completion().next() {
            Some(entry) if entry.result() == 0 => Ok(()),
            _ => Err(Errno::OPNOTSUPP.into()),
        }
    }
}

impl Rings {
    /// # Errors
    /// The kernel's, if it does not permit io_uring or lacks what we need of it.
    pub(super) fn new() -> io::Result<Self> {
        let mut ring = Ring::new()?;
        ring.check()?;
        Ok(Self { idle: Mutex::new(vec![ring]) })
    }

    /// Makes the idle rings look as they do in a child of the process that made them.
    #[cfg(test)]
    pub(super) fn pretend_other_process(&self) {
        self.idle.lock().iter_mut().for_each(|ring| ring.process ^= 1);
    }

    fn take(&self) -> io::Result<Ring> {
        loop {
            let Some(ring) = self.idle.lock().pop() else { return Ring::new() };
            if ring.process == std::process::id() {
                return Ok(ring);
            }
            // Invariant 3: its memory is not mapped here, so it must not even be dropped.
            std::mem::forget(ring);
        }
    }

    /// Does all transfers; `landed` gets each as it is done, on this thread.
    pub(super) fn run(
        &self,
        file: BorrowedFd<'_>,
        transfers: &mut [Transfer<'_>],
        landed: &mut dyn FnMut(&mut Transfer<'_>, io::Result<()>),
    ) {
        if let Ok(mut ring) = self.take() {
            let usable = Batch::new(&mut ring.ring, file.as_raw_fd(), transfers).run(landed);
            if usable {
                let mut idle = self.idle.lock();
                if idle.len() < IDLE_RINGS_MAX {
                    idle.push(ring);
                }
            }
        }
        // Where a ring could not be had (no memory, no descriptors) or failed in the middle, plain calls do the rest.
        for transfer in transfers.iter_mut().filter(|transfer| !transfer.landed) {
            let outcome = transfer.run(file);
            transfer.landed = true;
            landed(transfer, outcome);
        }
    }
}

/// A batch on its way through a ring.
struct Batch<'ring, 'batch, 'memory> {
    ring: &'ring mut IoUring,
    file: RawFd,
    transfers: &'batch mut [Transfer<'memory>],
    /// The next transfer that was not submitted yet.
    next: usize,
    /// Transfers to submit once more, after a short count or an interruption.
    again: Vec<usize>,
    /// Queued or in the kernel.
    in_flight: usize,
}

impl<'ring, 'batch, 'memory> Batch<'ring, 'batch, 'memory> {
    fn new(ring: &'ring mut IoUring, file: RawFd, transfers: &'batch mut [Transfer<'memory>]) -> Self {
        Self { ring, file, transfers, next: 0, again: Vec::new(), in_flight: 0 }
    }

    /// Returns whether the ring is fit for further use. If it is not, some transfers may not have landed.
    fn run(mut self, landed: &mut dyn FnMut(&mut Transfer<'_>, io::Result<()>)) -> bool {
        loop {
            self.fill(landed);
            if self.in_flight == 0 {
                return true;
            }
            // Reads are handed on as they land; nobody looks at a write before all are done.
            let want = match self.transfers.first().map(|transfer| transfer.direction) {
                Some(Direction::Write) => self.in_flight,
                _ => 1,
            };
            if !self.enter(want) {
                return false;
            }
            while let Some((index, result)) = self.reap() {
                let Some(transfer) = self.transfers.get_mut(index) else { continue };
                match transfer.account(result) {
                    Step::Again => self.again.push(index),
                    Step::Done(outcome) => {
                        transfer.landed = true;
                        landed(transfer, outcome);
                    }
                }
            }
        }
    }

    /// Queues as much as the ring takes.
    fn fill(&mut self, landed: &mut dyn FnMut(&mut Transfer<'_>, io::Result<()>)) {
        while self.in_flight < RING_ENTRIES as usize {
            let index = match self.again.pop() {
                Some(index) => index,
                None if self.next < self.transfers.len() => {
                    self.next += 1;
                    self.next - 1
                }
                None => return,
            };
            let Some(transfer) = self.transfers.get_mut(index) else { continue };
            if transfer.is_complete() {
                transfer.landed = true;
                landed(transfer, Ok(()));
                continue;
            }
            let entry = entry(self.file, transfer).user_data(index as u64);
            // SAFETY: the entry names memory that the transfer has borrowed, and vectors inside the transfer; neither moves or ends
            // before the request is reaped (invariant 1).
            if unsafe { self.ring.submission().push(&entry) }.is_err() {
                self.again.push(index);
                return;
            }
            self.in_flight += 1;
        }
    }

    /// Submits what is queued and waits for `want` completions. Returns whether the ring works.
    fn enter(&mut self, want: usize) -> bool {
        match self.ring.submit_and_wait(want) {
            Ok(_) => true,
            Err(error) => match Errno::from_io_error(&error) {
                Some(Errno::INTR) => true,
                // No memory at the moment, or completions to be reaped first.
                Some(Errno::AGAIN | Errno::BUSY) => {
                    std::thread::yield_now();
                    true
                }
                _ => {
                    tracing::warn!(%error, "io_uring failed, going on with plain calls");
                    false
                }
            },
        }
    }

    /// The next completion that is there.
    fn reap(&mut self) -> Option<(usize, io::Result<usize>)> {
        let entry = self.ring.completion().next()?;
        self.in_flight -= 1;
        let result = match usize::try_from(entry.result()) {
            Ok(count) => Ok(count),
            Err(_) => Err(io::Error::from_raw_os_error(entry.result().wrapping_neg())),
        };
        Some((entry.user_data() as usize, result))
    }
}

impl Drop for Batch<'_, '_, '_> {
    fn drop(&mut self) {
        // Here with requests in flight only if `landed` panicked or the ring failed. What is queued and was not taken by the kernel
        // never will be: a ring that fails is dropped, and after a panic it goes with the stack.
        while self.in_flight > self.ring.submission().len() {
            while self.reap().is_some() {}
            // Completions arrive by themselves; yielding enters the kernel, which delivers them.
            std::thread::yield_now();
        }
    }
}

fn entry(file: RawFd, transfer: &Transfer<'_>) -> squeue::Entry {
    let file = types::Fd(file);
    let offset = transfer.offset();
    match (transfer.direction, transfer.call_vectors()) {
        (Direction::Read, [one]) => {
            opcode::Read::new(file, one.base, one.length.min(CALL_BYTES_MAX) as u32).offset(offset).build()
        }
        (Direction::Write, [one]) => {
            opcode::Write::new(file, one.base, one.length.min(CALL_BYTES_MAX) as u32).offset(offset).build()
        }
        (Direction::Read, many) => {
            opcode::Readv::new(file, many.as_ptr().cast(), many.len() as u32).offset(offset).build()
        }
        (Direction::Write, many) => {
            opcode::Writev::new(file, many.as_ptr().cast(), many.len() as u32).offset(offset).build()
        }
    }
}

impl std::fmt::Debug for Rings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("io_uring")
    }
}
