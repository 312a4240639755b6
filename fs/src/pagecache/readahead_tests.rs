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

/// What batches of these lengths teach about a device of this latency and bandwidth.
fn worth(latency_us: u64, bytes_per_us: u64, lengths: &[u64]) -> Option<u64> {
    let mut worth = DeviceWorth::default();
    for &bytes in lengths {
        worth.observe(bytes, Duration::from_micros(latency_us + bytes / bytes_per_us));
    }
    worth.window_bytes()
}

const DOUBLING: [u64; 7] = [128 << 10, 256 << 10, 512 << 10, 1 << 20, 2 << 20, 4 << 20, 4 << 20];

#[test]
fn a_window_is_worth_eight_times_what_latency_costs() {
    // A disk: 8 ms, 200 MB/s. A fast one: 80 us, 2 GB/s.
    for (latency_us, bytes_per_us) in [(8000, 200), (80, 2000)] {
        let found = worth(latency_us, bytes_per_us, &DOUBLING).unwrap();
        let expected = 8 * latency_us * bytes_per_us;
        assert!(found.abs_diff(expected) < expected / 10, "{found}, not {expected}");
    }
}

#[test]
fn what_teaches_nothing_changes_nothing() {
    assert_eq!(worth(80, 2000, &[]), None);
    assert_eq!(worth(80, 2000, &[1 << 20; 100]), None, "one length tells nothing of latency");
    assert_eq!(worth(80, 2000, &DOUBLING[..2]), None, "two batches are not enough");
    let mut still = DeviceWorth::default();
    DOUBLING.iter().for_each(|&bytes| still.observe(bytes, Duration::ZERO));
    assert_eq!(still.window_bytes(), None, "a clock that stands still");
    let known = worth(80, 2000, &DOUBLING).unwrap();
    let later = worth(80, 2000, &[DOUBLING.as_slice(), &[4 << 20; 200]].concat()).unwrap();
    assert!(known.abs_diff(later) < known / 5, "{known} {later}: equal lengths forget nothing");
}

#[test]
fn the_governor_keeps_to_its_bounds_and_gives_way() {
    let governor = Governor::default();
    assert_eq!(governor.window_bytes(16 << 20, 0, 0), 4 << 20, "nothing is known yet");
    assert_eq!(governor.window_bytes(1 << 20, 0, 0), 1 << 20);
    for bytes in DOUBLING {
        governor.observe(bytes, Duration::from_micros(8000 + bytes / 200));
    }
    assert!(governor.window_bytes(16 << 20, 0, 0) > 11 << 20);
    assert_eq!(governor.window_bytes(8 << 20, 0, 0), 8 << 20);
    // Folios that are evicted unread halve the window, again and again, to a bound; what is used brings it back.
    let windows: Vec<u64> = (1..9).map(|wasted| governor.window_bytes(8 << 20, 100, wasted)).collect();
    assert_eq!(windows[..5], [4 << 20, 2 << 20, 1 << 20, 512 << 10, 256 << 10]);
    assert_eq!(windows[5..], [256 << 10; 3]);
    assert_eq!(governor.window_bytes(8 << 20, 110, 8), 256 << 10, "too early");
    let back: Vec<u64> = (1..7).map(|step| governor.window_bytes(8 << 20, 100 + 16 * step, 8)).collect();
    assert_eq!(back, [512 << 10, 1 << 20, 2 << 20, 4 << 20, 8 << 20, 8 << 20]);
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
