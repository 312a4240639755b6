//! Ranges of blocks with a value for each block: what is dirty, what is being written back.
//!
//! One [`BlockRanges`] for each address space is the truth about its dirty blocks. It is kept by block and not in the folios, so that
//! splitting or replacing a folio moves no dirty state, and so that writeback finds the longest runs without looking at folios.

use std::collections::BTreeMap;
use std::ops::Range;

/// Disjoint ranges of block indexes, each block carrying `units` (of the caller's reservation). Adjacent ranges of equal units are one.
#[derive(Debug, Default)]
pub(super) struct BlockRanges {
    by_start: BTreeMap<u64, (u64, u32)>,
    blocks: u64,
}

impl BlockRanges {
    /// Number of blocks in all ranges.
    pub(super) fn block_count(&self) -> u64 {
        self.blocks
    }

    pub(super) fn is_empty(&self) -> bool {
        self.blocks == 0
    }

    /// The parts of `range` that are inside, in order, with their units.
    pub(super) fn within(&self, range: Range<u64>) -> impl Iterator<Item = (Range<u64>, u32)> + '_ {
        let first = self.by_start.range(..=range.start).next_back().map_or(range.start, |(&start, _)| start);
        self.by_start
            .range(first..range.end.max(first))
            .map(move |(&start, &(end, units))| (start.max(range.start)..end.min(range.end), units))
            .filter(|(part, _)| part.start < part.end)
    }

    /// Whether any block of `range` is inside.
    pub(super) fn overlaps(&self, range: Range<u64>) -> bool {
        self.within(range).next().is_some()
    }

    /// Adds the blocks of `range` that are not inside, with `units` each; the others keep theirs. Returns how many were added.
    pub(super) fn insert_absent(&mut self, range: Range<u64>, units: u32) -> u64 {
        let mut gaps = Vec::new();
        let mut at = range.start;
        for (part, _) in self.within(range.clone()) {
            if at < part.start {
                gaps.push(at..part.start);
            }
            at = part.end;
        }
        if at < range.end {
            gaps.push(at..range.end);
        }
        let added = gaps.iter().map(|gap| gap.end - gap.start).sum();
        for gap in gaps {
            self.insert_gap(gap, units);
        }
        added
    }

    fn insert_gap(&mut self, mut gap: Range<u64>, units: u32) {
        self.blocks += gap.end - gap.start;
        if let Some((&start, &(end, theirs))) = self.by_start.range(..gap.start).next_back()
            && end == gap.start
            && theirs == units
        {
            gap.start = start;
        }
        if let Some(&(end, theirs)) = self.by_start.get(&gap.end)
            && theirs == units
        {
            self.by_start.remove(&gap.end);
            gap.end = end;
        }
        self.by_start.insert(gap.start, (gap.end, units));
    }

    /// Takes the blocks of `range` out. Returns what was there.
    pub(super) fn remove(&mut self, range: Range<u64>) -> Vec<(Range<u64>, u32)> {
        let removed: Vec<_> = self.within(range.clone()).collect();
        for (part, units) in &removed {
            let (&start, &(end, _)) =
                self.by_start.range(..=part.start).next_back().unwrap_or((&part.start, &(part.end, *units)));
            self.by_start.remove(&start);
            if start < part.start {
                self.by_start.insert(start, (part.start, *units));
            }
            if part.end < end {
                self.by_start.insert(part.end, (end, *units));
            }
            self.blocks -= part.end - part.start;
        }
        removed
    }
}

/// Sum of the units of removed parts.
pub(super) fn units_of(parts: &[(Range<u64>, u32)]) -> u64 {
    parts.iter().map(|(part, units)| (part.end - part.start) * u64::from(*units)).sum()
}

/// Sum of the blocks of removed parts.
pub(super) fn blocks_of(parts: &[(Range<u64>, u32)]) -> u64 {
    parts.iter().map(|(part, _)| part.end - part.start).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn ranges_are_an_array(operations in prop::collection::vec((any::<bool>(), 0_u64..60, 1_u64..20, 1_u32..3), 1..60)) {
            let mut ranges = BlockRanges::default();
            let mut model = [0_u32; 100];
            for (insert, start, length, units) in operations {
                let range = start..start + length;
                let slots = &mut model[start as usize..(start + length) as usize];
                if insert {
                    let added = slots.iter().filter(|&&units| units == 0).count() as u64;
                    slots.iter_mut().filter(|slot| **slot == 0).for_each(|slot| *slot = units);
                    prop_assert_eq!(ranges.insert_absent(range, units), added);
                } else {
                    let sum: u64 = slots.iter().map(|&units| u64::from(units)).sum();
                    slots.fill(0);
                    prop_assert_eq!(units_of(&ranges.remove(range)), sum);
                }
                let mut seen = [0_u32; 100];
                let mut last_end = None;
                for (part, units) in ranges.within(0..100) {
                    prop_assert!(last_end != Some((part.start, units)), "adjacent ranges of equal units are one");
                    last_end = Some((part.end, units));
                    seen[part.start as usize..part.end as usize].fill(units);
                }
                prop_assert_eq!(seen, model);
                prop_assert_eq!(ranges.block_count(), model.iter().filter(|&&units| units > 0).count() as u64);
            }
        }
    }
}
