//! Readers against reuse: a count for each bucket that a read is going on in. Freeing waits until it is 0.
//!
//! A reader looks an extent up, takes references, and must then know that the bucket was not freed in between. Two ways, both exact:
//! - [`ReferenceTable::mark`] before the look-up and [`ReferenceTable::unchanged_since`] after taking the reference: no bucket at all was freed.
//!   The freeing side raises the mark *before* it looks at the counts, the reader counts *before* it looks at the mark; so either
//!   the reader sees the mark raised, or the freeing sees the count.
//! - else the bucket's generation, read after the reference was taken, is the pointer's: it goes up when a bucket is emptied.
//!
//! Sharded mutexes, innermost.

use crate::sync::atomic::{AtomicU64, Ordering};
use std::collections::HashMap;

use smallvec::SmallVec;

use super::BucketKey;
use crate::sync::{Arc, Mutex};

const SHARDS: usize = 32;

/// Counts of references. See the module's documentation.
#[derive(Debug)]
pub struct ReferenceTable {
    shards: [Mutex<HashMap<BucketKey, u32>>; SHARDS],
    freed: AtomicU64,
}

impl Default for ReferenceTable {
    fn default() -> Self {
        Self { shards: std::array::from_fn(|_| Mutex::new(HashMap::new())), freed: AtomicU64::new(0) }
    }
}

/// A moment, for [`ReferenceTable::unchanged_since`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReuseMark(u64);

impl ReferenceTable {
    fn shard(&self, key: BucketKey) -> &Mutex<HashMap<BucketKey, u32>> {
        let index = usize::try_from(key.1.0.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 59).unwrap_or(0) % SHARDS;
        // The remainder is in range; the fallback keeps this total.
        self.shards.get(index).unwrap_or(&self.shards[0])
    }

    /// The present moment.
    #[must_use]
    pub fn mark(&self) -> ReuseMark {
        ReuseMark(self.freed.load(Ordering::SeqCst))
    }

    /// Whether no bucket was freed since.
    #[must_use]
    pub fn unchanged_since(&self, mark: ReuseMark) -> bool {
        self.mark() == mark
    }

    /// Takes a reference on each bucket.
    pub fn take(self: &Arc<Self>, keys: impl IntoIterator<Item = BucketKey>) -> BucketReferences {
        let keys: SmallVec<[BucketKey; 2]> = keys.into_iter().collect();
        for key in &keys {
            *self.shard(*key).lock().entry(*key).or_insert(0) += 1;
        }
        // Orders the counts before the look at the mark.
        crate::sync::atomic::fence(Ordering::SeqCst);
        BucketReferences { table: Arc::clone(self), keys }
    }

    /// Says that a bucket is about to be freed: to be followed by [`Self::is_referenced`].
    pub fn announce_freeing(&self) {
        self.freed.fetch_add(1, Ordering::SeqCst);
    }

    /// Whether somebody reads the bucket.
    #[must_use]
    pub fn is_referenced(&self, key: BucketKey) -> bool {
        self.shard(key).lock().contains_key(&key)
    }
}

/// References on buckets, dropped together: none of them is rewritten or discarded meanwhile.
#[derive(Debug)]
#[must_use]
pub struct BucketReferences {
    table: Arc<ReferenceTable>,
    keys: SmallVec<[BucketKey; 2]>,
}

impl BucketReferences {
    /// The buckets.
    #[must_use]
    pub fn buckets(&self) -> &[BucketKey] {
        &self.keys
    }

    /// Adds another set.
    pub fn merge(&mut self, mut other: Self) {
        self.keys.append(&mut other.keys);
    }
}

impl Drop for BucketReferences {
    fn drop(&mut self) {
        for key in &self.keys {
            let mut shard = self.table.shard(*key).lock();
            if let Some(count) = shard.get_mut(key) {
                *count -= 1;
                if *count == 0 {
                    shard.remove(key);
                }
            }
        }
    }
}
