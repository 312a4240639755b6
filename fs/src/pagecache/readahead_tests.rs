//! The window policy as a pure function: streams of every kind, and what they make it ask for.

use std::collections::{BTreeMap, BTreeSet};

use super::*;

const LIMITS: Limits = Limits { window_min: 32, window_max: 1024, alignment: 256, end: 1 << 20 };

/// A cache that holds everything it was told to fetch, and counts.
struct Simulated {
    streams: Streams,
    limits: Limits,
    cached: BTreeSet<u64>,
    markers: BTreeMap<u64, ()>,
    read: BTreeSet<u64>,
    misses: u64,
    batches: u64,
}

impl Simulated {
    fn new(limits: Limits) -> Self {
        Self {
            streams: Streams::default(),
            limits,
            cached: BTreeSet::new(),
            markers: BTreeMap::new(),
            read: BTreeSet::new(),
            misses: 0,
            batches: 0,
        }
    }

    fn apply(&mut self, decision: Decision) {
        for range in &decision.ranges {
            assert!(range.end <= self.limits.end, "past the end of the file");
            assert!(range.end - range.start <= 3 * self.limits.window_max, "{range:?} is too long");
            self.cached.extend(range.clone());
        }
        if let Some(marker) = decision.marker {
            assert!(self.cached.contains(&marker), "a marker on nothing");
            self.markers.insert(marker, ());
        }
        self.batches += u64::from(!decision.ranges.is_empty());
    }

    fn read(&mut self, start: u64, count: u64) {
        let end = (start + count).min(self.limits.end);
        for block in start..end {
            if !self.cached.contains(&block) {
                self.misses += 1;
                let decision = self.streams.decide(&Access::Miss(block..end), &self.limits);
                if decision.ranges.is_empty() {
                    self.batches += 1;
                }
                self.apply(decision);
                self.cached.extend(block..end);
            }
            self.read.insert(block);
            if self.markers.remove(&block).is_some() {
                let decision = self.streams.decide(&Access::Marker(block), &self.limits);
                self.apply(decision);
            }
        }
    }

    fn wasted(&self) -> usize {
        self.cached.difference(&self.read).count()
    }
}

#[test]
fn a_sequential_reader_misses_once() {
    let mut cache = Simulated::new(LIMITS);
    for start in (0..32768).step_by(32) {
        cache.read(start, 32);
    }
    assert_eq!(cache.misses, 1);
    assert!(cache.batches <= 32768 / 1024 + 8, "{}", cache.batches);
    assert!(cache.wasted() <= 2 * 1024 + 512, "{}", cache.wasted());
}

#[test]
fn a_reader_that_starts_in_the_middle_is_found_out_soon() {
    let mut cache = Simulated::new(LIMITS);
    for start in (100_001..120_000).step_by(8) {
        cache.read(start, 8);
    }
    assert!(cache.misses <= 3, "{}", cache.misses);
}

#[test]
fn the_end_of_the_file_ends_the_window() {
    let mut cache = Simulated::new(Limits { end: 1000, ..LIMITS });
    for start in (0..1000).step_by(16) {
        cache.read(start, 16);
    }
    assert_eq!((cache.misses, cache.cached.len()), (1, 1000));
    let mut tiny = Simulated::new(Limits { end: 1, ..LIMITS });
    tiny.read(0, 1);
    assert_eq!((tiny.misses, tiny.cached.len()), (1, 1));
}

#[test]
fn random_reads_fetch_nothing_ahead() {
    let mut cache = Simulated::new(LIMITS);
    let mut state = 88_172_645_463_325_252_u64;
    for _ in 0..500 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        cache.read((state % (1 << 20)) | 1, 1);
    }
    assert!(cache.wasted() < 500, "{} blocks nobody wanted", cache.wasted());
}

#[test]
fn a_backward_reader_is_served_from_behind() {
    let mut cache = Simulated::new(LIMITS);
    for start in (0..1024_u64).rev().map(|number| number * 16) {
        cache.read(start, 16);
    }
    assert!(cache.misses <= 6, "{}", cache.misses);
    assert_eq!(cache.wasted(), 0);
}

#[test]
fn a_strided_reader_gets_its_pieces_and_no_more() {
    let mut cache = Simulated::new(LIMITS);
    for piece in 0..400_u64 {
        cache.read(1000 + piece * 777, 4);
    }
    assert!(cache.misses <= 12, "{}", cache.misses);
    assert!(cache.wasted() <= 4 * 64 + 64, "{}", cache.wasted());
}

#[test]
fn a_backward_strided_reader_too() {
    let mut cache = Simulated::new(LIMITS);
    for piece in (0..400_u64).rev() {
        cache.read(1000 + piece * 777, 4);
    }
    assert!(cache.misses <= 12, "{}", cache.misses);
}

#[test]
fn interleaved_streams_are_told_apart() {
    let mut cache = Simulated::new(LIMITS);
    for step in 0..500_u64 {
        for stream in 0..6_u64 {
            cache.read(stream * 150_000 + step * 32, 32);
        }
    }
    assert!(cache.misses <= 6 * 3, "{}", cache.misses);
}

#[test]
fn reordering_inside_a_window_does_not_break_a_stream() {
    let mut cache = Simulated::new(LIMITS);
    let mut state = 1_u64;
    for group in 0..200_u64 {
        let mut reads: Vec<u64> = (0..4).map(|number| group * 128 + number * 32).collect();
        for place in (1..4_usize).rev() {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            reads.swap(place, (state >> 33) as usize % (place + 1));
        }
        for start in reads {
            cache.read(start, 32);
        }
    }
    assert!(cache.misses <= 12, "{}", cache.misses);
    assert!(cache.batches <= 200 * 128 / 1024 + 20, "{}", cache.batches);
}

proptest::proptest! {
    /// Whatever the accesses, what is decided lies inside the file and the limits, and decides nothing impossible.
    #[test]
    fn any_history_is_survived(reads in proptest::collection::vec((0_u64..5000, 1_u64..300), 1..200), end in 1_u64..5000) {
        let mut cache = Simulated::new(Limits { end, window_max: 300, alignment: 64, window_min: 8 });
        for (start, count) in reads {
            cache.read(start, count);
        }
    }
}
