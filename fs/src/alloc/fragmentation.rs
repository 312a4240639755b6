//! Which bucket gives the most back for the least copying: the data buckets with the smallest counts that are known.
//!
//! Fed by commits that lower a count, and by a cursor over the buckets tree that `space` moves when this runs dry. Bounded: of more
//! than [`ENTRIES_MAX`] only the emptiest are kept. Entries are hints; who takes one looks at the bucket's key.

use std::collections::{BTreeMap, BTreeSet};

use super::BucketKey;

/// Most entries that are kept.
pub const ENTRIES_MAX: usize = 4096;

/// Data buckets by charged bytes.
#[derive(Debug, Default)]
pub struct FragmentationIndex {
    by_charge: BTreeSet<(u64, BucketKey)>,
    charges: BTreeMap<BucketKey, u64>,
    /// Where the cursor over the buckets tree goes on; `None` at its start.
    cursor: Option<BucketKey>,
    /// Whether the cursor has been round once.
    complete: bool,
    /// The smallest count that was dropped for lack of room since the cursor's last start.
    dropped: Option<u64>,
}

impl FragmentationIndex {
    /// Notes a bucket's count.
    pub fn note(&mut self, key: BucketKey, charged_bytes: u64) {
        if let Some(before) = self.charges.insert(key, charged_bytes) {
            self.by_charge.remove(&(before, key));
        }
        self.by_charge.insert((charged_bytes, key));
        if self.charges.len() > ENTRIES_MAX
            && let Some((charge, worst)) = self.by_charge.pop_last()
        {
            self.charges.remove(&worst);
            self.dropped = Some(self.dropped.map_or(charge, |dropped| dropped.min(charge)));
        }
    }

    /// Corrects the count of a bucket if it is known.
    pub fn correct(&mut self, key: BucketKey, charged_bytes: u64) {
        if self.charges.contains_key(&key) {
            self.note(key, charged_bytes);
        }
    }

    /// Forgets a bucket.
    pub fn forget(&mut self, key: BucketKey) {
        if let Some(charge) = self.charges.remove(&key) {
            self.by_charge.remove(&(charge, key));
        }
    }

    /// Takes the bucket with the smallest count out, if that is at most `charge_max`. If it is above `good`, only if it is known
    /// to be the smallest of all.
    pub fn take_lowest(&mut self, charge_max: u64, good: u64) -> Option<BucketKey> {
        let &(charge, key) = self.by_charge.first()?;
        if charge > charge_max || (charge > good && !self.knows_all_below(charge)) {
            return None;
        }
        self.forget(key);
        Some(key)
    }

    /// Whether every bucket with a count below `charge` is known.
    #[must_use]
    pub fn knows_all_below(&self, charge: u64) -> bool {
        self.complete && self.dropped.is_none_or(|dropped| charge <= dropped)
    }

    /// Where the cursor is; a start from the beginning forgets what was dropped.
    pub fn begin_look(&mut self) -> Option<BucketKey> {
        if self.cursor.is_none() {
            self.dropped = None;
        }
        self.cursor
    }

    /// Moves the cursor; `None` says that it came round.
    pub fn end_look(&mut self, next: Option<BucketKey>) {
        self.cursor = next;
        self.complete |= next.is_none();
    }

    /// Number of entries.
    #[must_use]
    pub fn len(&self) -> usize {
        self.charges.len()
    }

    /// Whether nothing is known.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.charges.is_empty()
    }
}
