//! The journal as checkpoints see it.

use crate::error::Result;
use crate::journal::Journal;
use crate::units::JournalSequence;

/// F, as the journal fixes it.
#[derive(Clone, Debug)]
pub struct LogBoundary {
    /// F: replay starts here. Every record below it is applied.
    pub first_replay: JournalSequence,
    /// Where F is, or will be, in the journal's ring, in bytes.
    pub offset: u64,
    /// Checksum of the record before F.
    pub previous_checksum: u32,
    /// Counter number and total, exactly at F.
    pub totals: Vec<(u16, i64)>,
}

/// What a checkpoint needs of the journal.
pub trait CheckpointLog: Send + Sync {
    /// Fixes F; waits until every reservation below it is appended.
    ///
    /// # Errors
    /// If the journal has failed.
    fn boundary(&self) -> Result<LogBoundary>;
    /// Makes all records up to `upto` durable, and the data that they name.
    ///
    /// # Errors
    /// If the journal has failed.
    fn flush(&self, upto: JournalSequence) -> Result<()>;
    /// The newest sequence that has been reserved.
    fn newest(&self) -> JournalSequence;
    /// Nobody will replay what is before this place any more.
    fn release_before(&self, offset: u64, sequence: JournalSequence);
    /// How full the journal is.
    fn fill_permille(&self) -> u32;
    /// The part of that which was filled since the newest boundary.
    fn unreflected_permille(&self) -> u32;
    /// Calls `hook` when the journal gets full. It is called with locks held: it sets a flag and notifies an event, no more.
    fn on_pressure(&self, hook: Box<dyn Fn() + Send + Sync>);
}

impl CheckpointLog for Journal {
    fn boundary(&self) -> Result<LogBoundary> {
        let boundary = Self::boundary(self)?;
        Ok(LogBoundary {
            first_replay: boundary.first_replay,
            offset: boundary.offset,
            previous_checksum: boundary.previous_checksum,
            totals: boundary.totals.to_stored(),
        })
    }

    fn flush(&self, upto: JournalSequence) -> Result<()> {
        Self::flush(self, upto)
    }

    fn newest(&self) -> JournalSequence {
        Self::newest(self)
    }

    fn release_before(&self, offset: u64, sequence: JournalSequence) {
        Self::release_before(self, offset, sequence);
    }

    fn fill_permille(&self) -> u32 {
        Self::fill_permille(self)
    }

    fn unreflected_permille(&self) -> u32 {
        Self::unreflected_permille(self)
    }

    fn on_pressure(&self, hook: Box<dyn Fn() + Send + Sync>) {
        self.set_pressure_hook(hook);
    }
}
