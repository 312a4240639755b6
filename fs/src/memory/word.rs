//! The one atomic word that decides who may look at a folio's bytes and who may change them.
//!
//! The word holds a **writer bit** and a **count of byte references**. Invariants, each kept by a single compare-and-swap:
//!
//! 1. The writer bit is set only while the count is 0, and the count leaves 0 only while the writer bit is clear. So a `&[u8]`
//!    and a `&mut [u8]` of the same bytes never exist together.
//! 2. A reader never waits for a reader; it waits only for a writer that is inside right now (a memory copy).
//! 3. A writer never waits: [`ReferenceWord::try_write`] fails while anybody looks, and the caller replaces the affected part instead.
//!
//! ```text
//!   idle --try_write--> writing --end_write--> idle
//!   idle --reference--> read(1) --reference--> read(2) ... --release--> idle
//! ```
//!
//! loom checks it (`RUSTFLAGS="--cfg loom" cargo test -p coppicefs --lib --release --target-dir target/loom`).

use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::pause;

const WRITER: u64 = 1 << 63;

/// See the module's documentation.
#[derive(Debug)]
pub struct ReferenceWord(AtomicU64);

impl ReferenceWord {
    /// A word with nobody inside.
    #[must_use]
    pub fn new_idle() -> Self {
        Self(AtomicU64::new(0))
    }

    /// A word that is born with the writer inside: the bytes are new, nobody else knows them.
    #[must_use]
    pub fn new_writing() -> Self {
        Self(AtomicU64::new(WRITER))
    }

    /// Takes a byte reference if no writer is inside.
    pub fn try_reference(&self) -> bool {
        let mut seen = self.0.load(Ordering::Relaxed);
        while seen & WRITER == 0 {
            match self.0.compare_exchange_weak(seen, seen + 1, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return true,
                Err(now) => seen = now,
            }
        }
        false
    }

    /// Takes a byte reference; waits for a writer that is inside, which is as long as a memory copy.
    pub fn reference(&self) {
        let mut rounds = 0_u32;
        while !self.try_reference() {
            rounds += 1;
            pause(rounds);
        }
    }

    /// Gives one byte reference back.
    pub fn release(&self) {
        let before = self.0.fetch_sub(1, Ordering::Release);
        debug_assert!(before & WRITER == 0 && before > 0, "a byte reference was released twice");
    }

    /// Enters as the writer if nobody is inside.
    pub fn try_write(&self) -> bool {
        self.0.compare_exchange(0, WRITER, Ordering::Acquire, Ordering::Relaxed).is_ok()
    }

    /// The writer leaves.
    pub fn end_write(&self) {
        let before = self.0.swap(0, Ordering::Release);
        debug_assert_eq!(before, WRITER, "a writer left that was not inside");
    }

    /// How many byte references there are now. Only a hint: it may be different at once.
    #[must_use]
    pub fn reference_count(&self) -> u64 {
        self.0.load(Ordering::Relaxed) & !WRITER
    }
}

#[cfg(all(test, loom))]
#[expect(unsafe_code, reason = "loom's cell hands out raw pointers, to check each access")]
mod model {
    use super::*;
    use loom::cell::UnsafeCell;
    use loom::sync::Arc;

    struct Bytes {
        word: ReferenceWord,
        cell: UnsafeCell<u64>,
    }

    /// loom's cell reports a `&` beside a `&mut`; the assertion reports a value that nobody wrote.
    #[test]
    fn readers_and_writers_exclude_each_other() {
        loom::model(|| {
            let bytes = Arc::new(Bytes { word: ReferenceWord::new_writing(), cell: UnsafeCell::new(0) });
            // SAFETY: the word was born with this writer inside.
            bytes.cell.with_mut(|value| unsafe { *value = 7 });
            bytes.word.end_write();
            let threads: Vec<_> = (0..2_u64)
                .map(|number| {
                    let bytes = Arc::clone(&bytes);
                    loom::thread::spawn(move || {
                        if number == 0 {
                            if bytes.word.try_write() {
                                // SAFETY: `try_write` let us in alone; loom checks it.
                                bytes.cell.with_mut(|value| unsafe { *value = 8 });
                                bytes.word.end_write();
                            }
                        } else {
                            bytes.word.reference();
                            // SAFETY: our byte reference keeps the writer out; loom checks it.
                            let value = bytes.cell.with(|value| unsafe { *value });
                            assert!(value == 7 || value == 8);
                            bytes.word.release();
                        }
                    })
                })
                .collect();
            if bytes.word.try_reference() {
                // SAFETY: as above.
                bytes.cell.with(|value| assert!(unsafe { *value } >= 7));
                bytes.word.release();
            }
            for thread in threads {
                thread.join().unwrap();
            }
            assert!(bytes.word.try_write(), "everybody has left");
        });
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_writer_enters_only_alone_and_keeps_readers_out() {
        let word = ReferenceWord::new_idle();
        word.reference();
        assert!(!word.try_write());
        assert!(word.try_reference(), "readers share");
        assert_eq!(word.reference_count(), 2);
        word.release();
        assert!(!word.try_write());
        word.release();
        assert!(word.try_write());
        assert!(!word.try_reference());
        assert!(!word.try_write());
        word.end_write();
        assert!(word.try_reference());
    }
}
