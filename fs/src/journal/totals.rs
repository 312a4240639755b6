//! The global counters as one value: totals, or the deltas of one record.

use crate::error::Corruption;
use crate::format::journal::{AccountingCounter, Entries, Entry};

/// Bytes of one accounting entry in a record: tag, counter, delta.
const ACCOUNTING_ENTRY_BYTES: usize = 1 + 2 + 8;
/// What the accounting entries of one record take at most: one entry for each counter.
pub(super) const ACCOUNTING_BYTES_MAX: usize = AccountingCounter::ALL.len() * ACCOUNTING_ENTRY_BYTES;

/// A number for each [`AccountingCounter`]. Sums wrap, so that adding deltas is associative whatever their order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals([i64; AccountingCounter::ALL.len()]);

impl Totals {
    /// The number of one counter.
    #[must_use]
    pub fn get(&self, counter: AccountingCounter) -> i64 {
        self.0[counter as usize]
    }

    /// Adds `delta` to one counter.
    pub fn add(&mut self, counter: AccountingCounter, delta: i64) {
        let number = &mut self.0[counter as usize];
        *number = number.wrapping_add(delta);
    }

    /// Adds all of another's numbers.
    pub fn merge(&mut self, other: &Self) {
        for (counter, delta) in other.iter() {
            self.add(counter, delta);
        }
    }

    /// Counters and their numbers, in stored order.
    pub fn iter(&self) -> impl Iterator<Item = (AccountingCounter, i64)> + '_ {
        AccountingCounter::ALL.iter().map(|&counter| (counter, self.get(counter)))
    }

    /// As a checkpoint record stores them: what is not zero.
    #[must_use]
    pub fn to_stored(&self) -> Vec<(u16, i64)> {
        self.iter().filter(|&(_, total)| total != 0).map(|(counter, total)| (counter as u16, total)).collect()
    }

    /// From a checkpoint record.
    ///
    /// # Errors
    /// For an unknown counter number.
    pub fn from_stored(stored: &[(u16, i64)]) -> Result<Self, Corruption> {
        let mut totals = Self::default();
        for &(number, total) in stored {
            totals.add(AccountingCounter::from_stored(number)?, total);
        }
        Ok(totals)
    }

    /// Adds the deltas of one record's payload.
    ///
    /// # Errors
    /// If the payload is damaged.
    pub fn add_record(&mut self, payload: &[u8]) -> Result<(), Corruption> {
        for entry in Entries::new(payload) {
            if let Entry::Accounting { counter, delta } = entry? {
                self.add(counter, delta);
            }
        }
        Ok(())
    }
}
