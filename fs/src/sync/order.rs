//! Which locks the calling thread holds, and whether what it does now is in order. Debug builds only: in release builds everything here is
//! zero-sized and empty.
//!
//! - **Waiting for a lock** ([`expect`]) is in order if each lock that the thread holds precedes it ([`LockClass`]), and it does not hold that
//!   very lock. Taking one without waiting (a `try_` form, a lock that nobody else can know) cannot deadlock and is only noted; what
//!   is waited for *while* it is held is checked against it.
//! - **A wait, device I/O, a reply** ([`check_held`]) is in order if the thread holds locks of the allowed ranks only. What is allowed where: the
//!   constants here, and each [`Event`](crate::env::Event)'s own.
//! - **Hand-over**: a note belongs to the thread that took the lock. Whoever gives a lock to another thread, or to I/O under way, says so first
//!   ([`Held::hand_over`]); a lock that is released elsewhere without it is reported.
//! - A simulated worker runs on the stack of the one who waits; [`apart`] keeps the two apart.
//!
//! A violation is an error in the log and a panic: it ends the test, or the one request in a debug daemon. With `COPPICE_LOCK_ORDER=log` in the
//! environment it is written to standard error instead and the program goes on, to see all violations of a run.

use super::{LockClass, Rank, RankSet};

/// What may be held over a read of a device. A fill holds **add** while it looks the extents up and submits; the block holder reads edge
/// blocks and nodes; an inode's lock is held by writers that need the rest of a block. The folios of a fill are handed over to it.
pub const OVER_READ: RankSet = RankSet::of(&[Rank::Lifecycle, Rank::Inode, Rank::Block, Rank::Add]);
/// What may be held over a write, flush or discard: an inode's lock by writes that wait, **block** while the change that it is held for is committed.
pub const OVER_WRITE: RankSet = RankSet::of(&[Rank::Lifecycle, Rank::Inode, Rank::Block]);
/// What may be held over a wait for an event that has no rule of its own: a fill under **add** may wait until a node is read.
pub const OVER_WAIT: RankSet = RankSet::of(&[Rank::Lifecycle, Rank::Inode, Rank::Block, Rank::Add]);

pub use checked::*;

#[cfg(all(debug_assertions, not(loom)))]
mod checked {
    use std::cell::RefCell;
    use std::fmt::Write as _;
    use std::panic::Location;
    use std::thread::ThreadId;

    use super::super::rank::RULE;
    use super::super::schedule;
    use super::{LockClass, RankSet};

    struct Note {
        class: LockClass,
        /// Of the lock: tells whether it is the same one.
        address: usize,
        location: &'static Location<'static>,
        serial: u64,
    }

    #[derive(Default)]
    struct Notes {
        held: Vec<Note>,
        serial: u64,
    }

    thread_local! {
        /// By task: there are several on one thread where the schedule is explored, else one.
        static NOTES: RefCell<Vec<Notes>> = RefCell::default();
    }

    /// The calling thread's notes; nothing while the thread ends.
    fn with_notes<T>(body: impl FnOnce(&mut Notes) -> T) -> Option<T> {
        let task = schedule::task();
        let with = |notes: &RefCell<Vec<Notes>>| {
            let mut notes = notes.borrow_mut();
            if notes.len() <= task {
                notes.resize_with(task + 1, Notes::default);
            }
            notes.get_mut(task).map(body)
        };
        NOTES.try_with(with).ok().flatten()
    }

    /// Who holds a lock.
    type Holder = (ThreadId, usize);

    fn holder() -> Holder {
        (std::thread::current().id(), schedule::task())
    }

    /// The note that a lock is held; dropped when it is released.
    #[derive(Debug)]
    pub struct Held {
        serial: u64,
        /// Whose note it is; nobody's after a hand-over.
        holder: Option<Holder>,
        class: LockClass,
    }

    impl Held {
        /// The lock no longer belongs to this thread: nothing is checked against it, and any thread may release it.
        pub fn hand_over(&mut self) {
            self.release();
            self.holder = None;
        }

        fn release(&self) {
            let Some(holder) = self.holder else { return };
            if holder != self::holder() {
                return report(format!(
                    "lock order: {} was released by thread {:?}, but {holder:?} took it; hand it over explicitly",
                    self.class,
                    self::holder()
                ));
            }
            with_notes(|notes| {
                if let Some(place) = notes.held.iter().rposition(|note| note.serial == self.serial) {
                    notes.held.remove(place);
                }
            });
        }
    }

    impl Drop for Held {
        fn drop(&mut self) {
            self.release();
        }
    }

    /// Reports unless a lock of this class may be waited for now. `address` is the lock's own.
    #[track_caller]
    pub fn expect(class: &LockClass, address: usize) {
        let location = Location::caller();
        let found = with_notes(|notes| {
            // A lock may be the first field of another, at the same address.
            let place = class.rank().place();
            let again = notes.held.iter().find(|note| note.address == address && note.class.rank().place() == place);
            if let Some(note) = again {
                return Some(format!(
                    "lock order: this thread wants {class} at {location}, which it holds already since {}; pass the guard down\n{}",
                    note.location,
                    list(&notes.held)
                ));
            }
            let wrong = notes.held.iter().find(|note| !note.class.precedes(class))?;
            Some(format!(
                "lock order violated\n  this thread wants {class} at {location}\n  but it holds      {} since {}\n{}  \
                 the order here    {} -> {}\n  the rule          {RULE}",
                wrong.class,
                wrong.location,
                list(&notes.held),
                wrong.class.rank(),
                class.rank(),
            ))
        });
        if let Some(Some(text)) = found {
            report(text);
        }
    }

    /// Notes that the calling thread holds a lock of this class.
    #[track_caller]
    pub fn hold(class: &LockClass, address: usize) -> Held {
        let location = Location::caller();
        let serial = with_notes(|notes| {
            notes.serial += 1;
            notes.held.push(Note { class: *class, address, location, serial: notes.serial });
            notes.serial
        });
        Held { serial: serial.unwrap_or(0), holder: serial.map(|_| holder()), class: *class }
    }

    /// Reports unless the thread holds locks of the `allowed` ranks only. `what` is about to happen.
    #[track_caller]
    pub fn check_held(what: &str, allowed: RankSet) {
        let location = Location::caller();
        let found = with_notes(|notes| {
            let wrong = notes.held.iter().find(|note| !allowed.contains(note.class.rank()))?;
            Some(format!(
                "lock order violated\n  a lock is held over {what} at {location}: {} since {}\n{}  allowed there: {allowed}",
                wrong.class,
                wrong.location,
                list(&notes.held)
            ))
        });
        if let Some(Some(text)) = found {
            report(text);
        }
    }

    /// Runs `body` as if on a thread of its own, that holds nothing.
    pub fn apart<T>(body: impl FnOnce() -> T) -> T {
        struct Restore(Vec<Note>);
        impl Drop for Restore {
            fn drop(&mut self) {
                let before = std::mem::take(&mut self.0);
                with_notes(|notes| notes.held = before);
            }
        }
        let _restore = Restore(with_notes(|notes| std::mem::take(&mut notes.held)).unwrap_or_default());
        body()
    }

    fn list(held: &[Note]) -> String {
        let mut text = String::from("  all that it holds, in the order taken:\n");
        for note in held {
            let _ = writeln!(text, "    {} since {}", note.class, note.location);
        }
        text
    }

    fn report(text: String) {
        tracing::error!("{text}");
        if std::env::var_os("COPPICE_LOCK_ORDER").is_some_and(|how| how == "log") {
            return eprintln!("{text}");
        }
        // A second panic in a drop would end the process.
        assert!(std::thread::panicking(), "{text}");
    }
}

#[cfg(not(all(debug_assertions, not(loom))))]
mod checked {
    use super::{LockClass, RankSet};

    /// The note that a lock is held: nothing, in this build.
    #[derive(Debug)]
    pub struct Held(());

    impl Held {
        /// Nothing, in this build.
        #[inline]
        pub fn hand_over(&mut self) {}
    }

    /// Nothing, in this build.
    #[inline]
    pub fn expect(_: &LockClass, _: usize) {}

    /// Nothing, in this build.
    #[inline]
    #[must_use]
    pub fn hold(_: &LockClass, _: usize) -> Held {
        Held(())
    }

    /// Nothing, in this build.
    #[inline]
    pub fn check_held(_: &str, _: RankSet) {}

    /// Runs `body`.
    #[inline]
    pub fn apart<T>(body: impl FnOnce() -> T) -> T {
        body()
    }
}
