//! One bit for each block of a folio, set under the folio's lock, read without any.

use crate::sync::atomic::{AtomicU64, Ordering};
use std::ops::Range;

/// Blocks of the largest folio: 1 MiB of 4 KiB blocks.
pub(super) const BLOCKS_MAX: u32 = 256;

/// Up to [`BLOCKS_MAX`] bits, all clear at first. A bit that is set stays set.
#[derive(Debug, Default)]
pub(super) struct BlockBitmap([AtomicU64; 4]);

impl BlockBitmap {
    /// Sets the bits of `range`; what was written before is visible to whoever sees them set.
    pub(super) fn set(&self, range: Range<u32>) {
        self.each_word(range, |word, mask| {
            word.fetch_or(mask, Ordering::Release);
            true
        });
    }

    /// Whether all bits of `range` are set.
    pub(super) fn all_set(&self, range: Range<u32>) -> bool {
        self.each_word(range, |word, mask| word.load(Ordering::Acquire) & mask == mask)
    }

    pub(super) fn is_set(&self, block: u32) -> bool {
        self.all_set(block..block + 1)
    }

    /// How many bits from `start` on are set without a gap, looking no further than `end`.
    pub(super) fn run_of_set(&self, start: u32, end: u32) -> u32 {
        if self.all_set(start..end) {
            return end - start;
        }
        (start..end).take_while(|&block| self.is_set(block)).count().try_into().unwrap_or(0)
    }

    /// How many bits from `start` on are clear without a gap, looking no further than `end`.
    pub(super) fn run_of_clear(&self, start: u32, end: u32) -> u32 {
        (start..end).take_while(|&block| !self.is_set(block)).count().try_into().unwrap_or(0)
    }

    fn each_word(&self, range: Range<u32>, mut f: impl FnMut(&AtomicU64, u64) -> bool) -> bool {
        let mut at = range.start;
        while at < range.end {
            let word = at / 64;
            let end = range.end.min((word + 1) * 64);
            let count = end - at;
            let mask = if count == 64 { u64::MAX } else { ((1_u64 << count) - 1) << (at % 64) };
            let Some(word) = self.0.get(word as usize) else { return false };
            if !f(word, mask) {
                return false;
            }
            at = end;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_found_across_words() {
        let bitmap = BlockBitmap::default();
        bitmap.set(60..200);
        assert!(bitmap.all_set(60..200));
        assert!(!bitmap.all_set(59..200) && !bitmap.all_set(60..201));
        assert_eq!(bitmap.run_of_set(61, 256), 139);
        assert_eq!(bitmap.run_of_set(61, 70), 9);
        assert_eq!(bitmap.run_of_clear(0, 256), 60);
        assert_eq!(bitmap.run_of_clear(200, 256), 56);
        assert_eq!(bitmap.run_of_set(0, 256), 0);
        bitmap.set(0..256);
        assert!(bitmap.all_set(0..256));
    }
}
