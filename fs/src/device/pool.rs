//! Submission through `preadv` and `pwritev`, where io_uring is not to be had: a few helper threads and the calling thread share a
//! batch.
//!
//! Each transfer of a batch is claimed by one thread, which does all of it. The caller claims too, so a batch of one never leaves its
//! thread, and a batch makes progress even if no helper does (they are busy, or are not there after a `fork`). Invariants:
//! 1. A transfer's memory is touched by the thread that claimed it, then by the caller once its completion has been received.
//! 2. [`Pool::run`] neither returns nor unwinds before every claimed transfer is complete, and none can be claimed after: [`Claims`]'s
//!    `Drop` sees to both. A helper that comes late finds nothing to claim and touches nothing.
//!
//! The lock guards the starting of the threads.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};

use super::transfer::Transfer;
use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::{Arc, Mutex};

/// Helper threads of a device.
const HELPERS: usize = 4;

struct Batch {
    file: RawFd,
    transfers: *mut Transfer<'static>,
    count: usize,
    /// The next transfer to claim; at or above `count` nothing is left.
    next: AtomicUsize,
    done: Sender<(usize, io::Result<()>)>,
}

// SAFETY: the transfers are `Send`, and each is touched by one thread at a time (invariant 1); the pointer is not followed once nothing
// is left to claim (invariant 2).
unsafe impl Send for Batch {}
// SAFETY: as above; everything shared is atomic or a channel.
unsafe impl Sync for Batch {}

impl Batch {
    fn claim(&self) -> Option<usize> {
        let index = self.next.fetch_add(1, Ordering::Relaxed);
        (index < self.count).then_some(index)
    }

    /// Does transfer `index`, which the calling thread has claimed.
    fn run(&self, index: usize) -> io::Result<()> {
        // SAFETY: claimed, so no other thread touches it, and the caller of `Pool::run` waits for its completion (invariant 2), which
        // keeps the transfer and the file alive.
        let (transfer, file) = unsafe { (&mut *self.transfers.add(index), BorrowedFd::borrow_raw(self.file)) };
        catch_unwind(AssertUnwindSafe(|| transfer.run(file)))
            .unwrap_or_else(|_| Err(io::Error::other("the thread that did it panicked")))
    }

    fn help(&self) {
        while let Some(index) = self.claim() {
            let outcome = self.run(index);
            // The caller holds the receiver until it has this; if it is gone, so is whoever would want to know.
            let _ = self.done.send((index, outcome));
        }
    }
}

/// The caller's hold on a batch.
struct Claims {
    batch: Arc<Batch>,
    done: Receiver<(usize, io::Result<()>)>,
    finished: usize,
}

impl Drop for Claims {
    fn drop(&mut self) {
        // Nobody claims from here on; wait for what was claimed.
        let claimed = self.batch.next.swap(self.batch.count, Ordering::Relaxed).min(self.batch.count);
        while self.finished < claimed && self.done.recv().is_ok() {
            self.finished += 1;
        }
    }
}

/// The helper threads of a device, started with the first batch that can use them.
pub(super) struct Pool {
    helpers: Mutex<Option<Sender<Arc<Batch>>>>,
}

impl Pool {
    pub(super) fn new() -> Self {
        Self { helpers: Mutex::new(None) }
    }

    fn helpers(&self) -> Sender<Arc<Batch>> {
        let mut helpers = self.helpers.lock();
        helpers
            .get_or_insert_with(|| {
                let (sender, receiver) = bounded::<Arc<Batch>>(256);
                for number in 0..HELPERS {
                    let receiver = receiver.clone();
                    // A thread that cannot be started is one helper less. They end when the device drops its sender.
                    let _ = std::thread::Builder::new().name(format!("device-{number}")).spawn(move || {
                        for batch in receiver {
                            batch.help();
                        }
                    });
                }
                sender
            })
            .clone()
    }

    /// Does all transfers; `landed` gets each as it is done, on this thread.
    pub(super) fn run(
        &self,
        file: BorrowedFd<'_>,
        transfers: &mut [Transfer<'_>],
        landed: &mut dyn FnMut(&mut Transfer<'_>, io::Result<()>),
    ) {
        if let [transfer] = transfers {
            let outcome = transfer.run(file);
            landed(transfer, outcome);
            return;
        }
        let (sender, receiver) = unbounded();
        let start: *mut Transfer<'_> = transfers.as_mut_ptr();
        let batch = Arc::new(Batch {
            file: file.as_raw_fd(),
            transfers: start.cast(),
            count: transfers.len(),
            next: AtomicUsize::new(0),
            done: sender,
        });
        let mut claims = Claims { batch, done: receiver, finished: 0 };
        let helpers = self.helpers();
        for _ in 0..HELPERS.min(transfers.len().saturating_sub(1)) {
            // A full queue means that the helpers are behind: we do it ourselves.
            let _ = helpers.try_send(Arc::clone(&claims.batch));
        }
        let mut land = |claims: &mut Claims, index: usize, outcome: io::Result<()>| {
            claims.finished += 1;
            // SAFETY: complete, so the thread that had claimed it is done with it (the channel orders its writes before this).
            landed(unsafe { &mut *start.add(index) }, outcome);
        };
        while let Some(index) = claims.batch.claim() {
            let outcome = claims.batch.run(index);
            land(&mut claims, index, outcome);
            while let Ok((index, outcome)) = claims.done.try_recv() {
                land(&mut claims, index, outcome);
            }
        }
        while claims.finished < claims.batch.count {
            match claims.done.recv() {
                Ok((index, outcome)) => land(&mut claims, index, outcome),
                Err(_) => break,
            }
        }
    }
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("preadv/pwritev")
    }
}
