//! Laundering: before SEEK_DATA or SEEK_HOLE is answered, the kernel writes out what its page cache holds of the file. It does not do so by
//! itself.
//!
//! That happens on a thread of its own, which serves no request: telling the kernel waits until the kernel has written, by WRITE requests that
//! the serving threads answer.
//!
//! Locks: the queue's (leaf).

use std::sync::OnceLock;
use std::sync::mpsc::{Sender, channel};

use fuser::{INodeNo, Notifier};

use crate::sync::{Arc, Mutex};

/// What is done when the file is clean.
type Answer = Box<dyn FnOnce() + Send>;

/// See the module's documentation.
pub(super) struct Launderer {
    /// Set when the session exists.
    notifier: Arc<OnceLock<Notifier>>,
    /// The thread, once it was needed; it ends with this value.
    queue: Mutex<Option<Sender<(u64, Answer)>>>,
}

impl Launderer {
    pub(super) fn new(notifier: Arc<OnceLock<Notifier>>) -> Self {
        Self { notifier, queue: Mutex::new(None) }
    }

    /// Has the kernel write out what it holds of `node`, and calls `answer` then, both on another thread. Where that cannot be, `answer` is
    /// called at once.
    pub(super) fn launder(&self, node: u64, answer: impl FnOnce() + Send + 'static) {
        let mut queue = self.queue.lock();
        if queue.is_none() {
            *queue = self.start();
        }
        let job: (u64, Answer) = (node, Box::new(answer));
        let unserved = match queue.as_ref() {
            Some(queue) => queue.send(job).map_err(|refused| refused.0).err(),
            None => Some(job),
        };
        drop(queue);
        if let Some((_, answer)) = unserved {
            answer();
        }
    }

    fn start(&self) -> Option<Sender<(u64, Answer)>> {
        let notifier = self.notifier.get()?.clone();
        let (queue, jobs) = channel::<(u64, Answer)>();
        let started = std::thread::Builder::new().name("launderer".into()).spawn(move || {
            for (node, answer) in jobs {
                // From the start to the end. An inode that the kernel does not know is clean.
                if let Err(error) = notifier.inval_inode(INodeNo(node), 0, 0) {
                    tracing::debug!(node, %error, "the kernel did not write out what it holds of a file");
                }
                answer();
            }
        });
        match started {
            Ok(_) => Some(queue),
            Err(error) => {
                tracing::warn!("cannot start a thread, SEEK_DATA may miss what the kernel holds: {error}");
                None
            }
        }
    }
}
