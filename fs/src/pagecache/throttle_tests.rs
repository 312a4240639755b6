//! The policy as a pure function: what is measured, what may be dirty, what a write costs.

use proptest::prelude::*;

use super::*;

const MIB: u64 = 1 << 20;
const SECOND: Duration = Duration::from_secs(1);

fn milliseconds(count: u64) -> Duration {
    Duration::from_millis(count)
}

#[test]
fn the_bandwidth_is_that_of_the_last_seconds() {
    let mut bandwidth = Bandwidth::default();
    assert_eq!(bandwidth.bytes_per_second(), None);
    bandwidth.observe(16 * MIB, Duration::ZERO, true);
    bandwidth.observe(4096, milliseconds(1), false);
    assert_eq!(bandwidth.bytes_per_second(), None, "neither says anything");
    (0..50).for_each(|_| bandwidth.observe(10 * MIB, milliseconds(100), true));
    let fast = bandwidth.bytes_per_second().unwrap();
    assert!((99 * MIB..=101 * MIB).contains(&fast), "{fast}");
    // One hiccup of a device is not the end of its speed.
    bandwidth.observe(MIB, milliseconds(300), true);
    let after = bandwidth.bytes_per_second().unwrap();
    assert!(after > 80 * MIB, "{after}");
    // A device that has become slow is believed within seconds, and one that has become fast as well.
    (0..100).for_each(|_| bandwidth.observe(MIB, milliseconds(100), true));
    let slow = bandwidth.bytes_per_second().unwrap();
    assert!((10 * MIB..12 * MIB).contains(&slow), "{slow}");
    (0..100).for_each(|_| bandwidth.observe(10 * MIB, milliseconds(100), true));
    let fast = bandwidth.bytes_per_second().unwrap();
    assert!((90 * MIB..=100 * MIB).contains(&fast), "{fast}");
}

#[test]
fn a_load_that_asks_for_little_does_not_make_the_device_look_slow() {
    let mut bandwidth = Bandwidth::default();
    (0..50).for_each(|_| bandwidth.observe(10 * MIB, milliseconds(100), true));
    // Small fsyncs: each waits for a flush.
    (0..10_000).for_each(|_| bandwidth.observe(4096, milliseconds(2), false));
    let after = bandwidth.bytes_per_second().unwrap();
    assert!(after > 99 * MIB, "{after}");
    // But a small batch that is fast shows that it is faster than was known.
    (0..1000).for_each(|_| bandwidth.observe(512 << 10, milliseconds(2), false));
    let after = bandwidth.bytes_per_second().unwrap();
    assert!(after > 150 * MIB, "{after}");
}

#[test]
fn what_may_be_dirty_is_a_time_of_the_bandwidth_between_a_floor_and_what_memory_allows() {
    let limit = |memory: u64, bandwidth: u64| DirtyLimits::of(memory, bandwidth, milliseconds(500)).limit;
    assert_eq!(limit(512 * MIB, 4000 * MIB), 512 * MIB);
    assert_eq!(limit(512 * MIB, 200 * MIB), 100 * MIB);
    assert_eq!(limit(512 * MIB, 1), LIMIT_BYTES_MIN);
    assert_eq!(limit(MIB, 1), MIB);
    let limits = DirtyLimits::of(512 * MIB, 200 * MIB, milliseconds(500));
    assert_eq!((limits.background, limits.free_run), (25 * MIB, 25 * MIB + 75 * MIB / 2));
    assert_eq!(DirtyLimits::of(64 * MIB, 1000 * MIB, SECOND).background, 32 * MIB);
}

#[test]
fn in_the_middle_of_what_is_left_a_writer_is_as_fast_as_the_device() {
    let limits = DirtyLimits::of(512 * MIB, 200 * MIB, milliseconds(500));
    let middle = limits.free_run.midpoint(limits.limit);
    assert_eq!(limits.cost(middle, MIB, 200 * MIB, 1), milliseconds(5));
    assert_eq!(limits.cost(middle, MIB, 200 * MIB, 4), milliseconds(20), "one of four");
    assert_eq!(limits.cost(limits.free_run, u64::MAX, 1, 9), Duration::ZERO);
    assert!(limits.cost(limits.free_run + MIB, MIB, 200 * MIB, 1) < milliseconds(1));
    assert_eq!(limits.cost(limits.limit, 1, u64::MAX, 1), PAUSE_MAX);
}

#[test]
fn short_pauses_are_saved_up() {
    let mut pace = Pace::default();
    let pauses: Vec<_> = (0..6).map(|_| pace.pause(Duration::from_micros(400))).collect();
    assert_eq!(pauses, [0, 0, 1200, 0, 0, 1200].map(Duration::from_micros));
    assert_eq!(pace.pause(milliseconds(7)), milliseconds(7));
    assert_eq!(pace.pause(Duration::ZERO), Duration::ZERO);
    assert_eq!(pace.pause(SECOND), PAUSE_MAX);
}

/// What was seen of writers against a device, after the first seconds: what was dirty before it was known is written by then.
struct Played {
    /// The most that was unwritten.
    most: u64,
    /// Bytes that each writer has written.
    written: Vec<u64>,
    /// How often a writer found the limit reached, in steps of a millisecond.
    at_limit: u64,
    /// How long the device had nothing to do.
    idle: Duration,
}

const SETTLED: Duration = Duration::from_secs(4);

/// Plays writers that want to write without a rest, each in pieces of its own size, against a device of so many bytes a second.
fn play(pieces: &[u64], device: u64, memory: u64, time: Duration) -> Played {
    let mut bandwidth = Bandwidth::default();
    let mut pace = Pace::default();
    let (mut unwritten, mut now) = (0_u64, Duration::ZERO);
    let mut batch: Option<(Duration, Duration, u64)> = None;
    let mut resumes = vec![Duration::ZERO; pieces.len()];
    let mut played = Played { most: 0, written: vec![0; pieces.len()], at_limit: 0, idle: Duration::ZERO };
    let settled = SETTLED;
    while now < time {
        let known = bandwidth.bytes_per_second().unwrap_or(ASSUMED_BANDWIDTH);
        let limits = DirtyLimits::of(memory, known, milliseconds(500));
        // The device ends a batch, and begins the next where there is enough.
        if let Some((since, until, bytes)) = batch
            && until <= now
        {
            unwritten -= bytes;
            bandwidth.observe(bytes, until - since, true);
            batch = None;
        }
        if batch.is_none() && unwritten >= limits.background {
            let bytes = (known / BATCHES_PER_SECOND).clamp(BATCH_BYTES_MIN, BATCH_BYTES_MAX).min(unwritten);
            batch = Some((now, now + Duration::from_secs_f64(bytes as f64 / device as f64), bytes));
        }
        if batch.is_none() && now > settled {
            played.idle += milliseconds(1);
        }
        for (writer, &piece) in pieces.iter().enumerate() {
            // A program of at most 2 GiB/s.
            let mut budget = 2 * MIB;
            while resumes[writer] <= now && budget > 0 {
                if unwritten + piece > limits.limit {
                    played.at_limit += u64::from(now > settled);
                    break;
                }
                let others = resumes.iter().filter(|&&resume| resume > now).count() as u64;
                let cost = limits.cost(unwritten, piece, known, others + 1);
                unwritten += piece;
                budget = budget.saturating_sub(piece);
                played.written[writer] += if now > settled { piece } else { 0 };
                resumes[writer] = now + pace.pause(cost);
            }
        }
        if now > settled {
            played.most = played.most.max(unwritten);
        }
        now += milliseconds(1);
    }
    played
}

#[test]
fn writers_are_as_fast_as_the_device_seldom_reach_the_limit_and_share_it() {
    let cases: [(&[u64], u64); 6] = [
        (&[128 << 10], 100 * MIB),
        (&[128 << 10; 4], 100 * MIB),
        (&[MIB; 8], 400 * MIB),
        (&[4096; 3], 30 * MIB),
        (&[MIB], 20 * MIB),
        (&[MIB, 128 << 10, 64 << 10], 200 * MIB),
    ];
    for (pieces, device) in cases {
        let what = format!("writers of {pieces:?} at {device}");
        let seconds = 6;
        let played = play(pieces, device, 1 << 30, SETTLED + Duration::from_secs(seconds));
        let all: u64 = played.written.iter().sum();
        assert!(all > device * seconds / 10 * 9, "{what}: {all} bytes in {seconds} s");
        let limit = DirtyLimits::of(1 << 30, device, milliseconds(500)).limit;
        assert!(played.most <= limit / 100 * 115, "{what}: {} bytes unwritten, {limit} are the limit", played.most);
        assert!(played.idle < milliseconds(100), "{what}: the device was idle for {:?}", played.idle);
        assert!(played.at_limit < 500, "{what}: {} times at the limit", played.at_limit);
        let (least, most) = (played.written.iter().min().unwrap(), played.written.iter().max().unwrap());
        assert!(least * 4 > *most, "{what}: a writer starves: {least} bytes, another has {most}");
    }
}

/// Where the device is faster than the writers, or memory is the limit, nobody pauses for the device's sake for long.
#[test]
fn a_device_that_keeps_up_stops_nobody() {
    let played = play(&[128 << 10], 4096 * MIB, 1 << 30, SETTLED + SECOND);
    let all: u64 = played.written.iter().sum();
    assert!(all > 1990 * MIB, "{all}");
    assert_eq!(played.at_limit, 0);
}

proptest! {
    #[test]
    fn limits_are_in_order_and_grow_with_memory_and_bandwidth(
        memory in 4096_u64..1 << 40,
        more_memory in 0_u64..1 << 40,
        bandwidth in 1_u64..1 << 40,
        more_bandwidth in 0_u64..1 << 40,
        time in 1_u64..10_000,
    ) {
        let time = milliseconds(time);
        let limits = DirtyLimits::of(memory, bandwidth, time);
        prop_assert!(limits.background <= limits.free_run && limits.free_run <= limits.limit);
        prop_assert!(limits.limit <= memory && limits.limit >= memory.min(LIMIT_BYTES_MIN));
        prop_assert!(limits.background > 0);
        for more in [
            DirtyLimits::of(memory + more_memory, bandwidth, time),
            DirtyLimits::of(memory, bandwidth + more_bandwidth, time),
            DirtyLimits::of(memory, bandwidth, time * 2),
        ] {
            prop_assert!(more.background >= limits.background);
            prop_assert!(more.free_run >= limits.free_run);
            prop_assert!(more.limit >= limits.limit);
        }
    }

    #[test]
    fn a_pause_grows_with_what_is_dirty_and_what_is_written_and_is_bounded(
        memory in 4096_u64..1 << 40,
        bandwidth in 1_u64..1 << 40,
        unwritten in 0_u64..1 << 41,
        more_unwritten in 0_u64..1 << 30,
        bytes in 1_u64..1 << 30,
        more_bytes in 0_u64..1 << 30,
        more_bandwidth in 0_u64..1 << 30,
        writers in 0_u64..100,
    ) {
        let limits = DirtyLimits::of(memory, bandwidth, milliseconds(500));
        let cost = limits.cost(unwritten, bytes, bandwidth, writers);
        prop_assert!(cost <= PAUSE_MAX);
        prop_assert!(limits.cost(unwritten + more_unwritten, bytes, bandwidth, writers) >= cost);
        prop_assert!(limits.cost(unwritten, bytes + more_bytes, bandwidth, writers) >= cost);
        prop_assert!(limits.cost(unwritten, bytes, bandwidth, writers + 1) >= cost);
        prop_assert!(limits.cost(unwritten, bytes, bandwidth + more_bandwidth, writers) <= cost);
        prop_assert_eq!(limits.cost(limits.free_run, bytes, 1, writers), Duration::ZERO);
    }

    /// All that is owed is paid, nobody pays more than the bound, and nobody much more than its own.
    #[test]
    fn pauses_are_bounded_and_none_is_lost(costs in proptest::collection::vec(0_u64..300_000, 1..200)) {
        let mut pace = Pace::default();
        let (mut owed, mut paid) = (Duration::ZERO, Duration::ZERO);
        for cost in costs {
            let cost = Duration::from_micros(cost).min(PAUSE_MAX);
            let pause = pace.pause(cost);
            prop_assert!(pause <= PAUSE_MAX);
            prop_assert!(pause.is_zero() || pause < cost + PAUSE_MIN);
            owed += cost;
            paid += pause;
            prop_assert!(paid <= owed);
            let is_cut = pause == PAUSE_MAX;
            owed = if is_cut { paid } else { owed };
            prop_assert!(owed - paid < PAUSE_MIN, "{owed:?} were owed, {paid:?} paid");
        }
    }
}
