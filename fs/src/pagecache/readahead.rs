//! The readahead window: a pure function of the accesses so far.
//!
//! It is asked on a **miss** and when a reader reaches a **marker** (the start of the last window: time to fetch the next one while this
//! one is read); a hit elsewhere asks nothing. It tells up to [`STREAMS_MAX`] streams of one open file apart, so interleaved readers
//! do not disturb each other. A stream is sequential (tolerant of reordering inside a window, since the kernel's READs arrive on several
//! threads), backward, or strided. Windows double up to the limit; their ends are aligned, so that long streams get the largest folios.
//!
//! The limit is what the device makes worth while ([`DeviceWorth`]), and less while memory is so short that folios are evicted before
//! anybody has read them (`Governor`).

use std::ops::Range;

use std::time::Duration;

use smallvec::SmallVec;

use crate::sync::Mutex;

/// Streams of one open file that are told apart.
pub const STREAMS_MAX: usize = 16;

/// What bounds a window, in blocks.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The first window of a stream.
    pub window_min: u64,
    /// The longest window.
    pub window_max: u64,
    /// Windows at least this long end at multiples of it: the largest folio. A power of two.
    pub alignment: u64,
    /// First block after the end of the file: no window passes it.
    pub end: u64,
}

/// What a reader met.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Access {
    /// These blocks (not empty) are wanted and the first of them is not in the cache.
    Miss(Range<u64>),
    /// The block carries a marker.
    Marker(u64),
}

/// What to fetch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decision {
    /// Ranges of blocks, besides what is wanted. They may overlap what is cached.
    pub ranges: SmallVec<[Range<u64>; 4]>,
    /// The block whose first reader is to come back for the next window.
    pub marker: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// One access seen; `step` is the distance to the one before, if there was one like it.
    Fresh {
        step: i64,
    },
    Forward,
    Backward,
    /// Pieces of the same length at equal distances; `pieces` in the last batch.
    Strided {
        step: i64,
        pieces: u64,
    },
}

#[derive(Clone, Debug)]
struct Stream {
    kind: Kind,
    /// What was planned last; for a fresh stream, what was wanted.
    planned: Range<u64>,
    window: u64,
    last_use: u64,
}

/// The streams of one open file. See the module's documentation.
#[derive(Clone, Debug, Default)]
pub struct Streams {
    streams: SmallVec<[Stream; 4]>,
    clock: u64,
}

impl Streams {
    /// Decides what to fetch at an access.
    pub fn decide(&mut self, access: &Access, limits: &Limits) -> Decision {
        self.clock += 1;
        let mut decision = match access {
            Access::Miss(wanted) => self.miss(wanted, limits),
            Access::Marker(block) => self.marker(*block, limits),
        };
        for range in &mut decision.ranges {
            range.end = range.end.min(limits.end);
        }
        decision.ranges.retain(|range| range.start < range.end);
        decision
    }

    fn miss(&mut self, wanted: &Range<u64>, limits: &Limits) -> Decision {
        let clock = self.clock;
        // Those first that have a direction; among equals the one used last.
        let mut order: SmallVec<[usize; STREAMS_MAX]> = (0..self.streams.len()).collect();
        order.sort_by_key(|&number| {
            let stream = &self.streams[number];
            (matches!(stream.kind, Kind::Fresh { .. }), std::cmp::Reverse(stream.last_use))
        });
        // Neighbours before strides: several sequential readers in turn look like a strided one.
        for strided in [false, true] {
            for &number in &order {
                if let Some(decision) = self.streams[number].try_miss(wanted, limits, strided) {
                    self.streams[number].last_use = clock;
                    return decision;
                }
            }
        }
        // The start of a file is taken for the start of a sequential read. Anything else is perhaps the next piece of a strided one:
        // remember the distance from the piece before.
        let newest = order.iter().map(|&number| &self.streams[number]).max_by_key(|stream| stream.last_use);
        let step = match newest {
            Some(before) if matches!(before.kind, Kind::Fresh { .. }) && length(&before.planned) == length(wanted) => {
                distance(before.planned.start, wanted.start)
            }
            _ => 0,
        };
        let mut stream = Stream { kind: Kind::Fresh { step }, planned: wanted.clone(), window: 0, last_use: clock };
        let decision = if wanted.start == 0 { stream.start_forward(wanted, limits) } else { Decision::default() };
        self.remember(stream);
        decision
    }

    /// Adds a stream. Single accesses push each other out before they push out a stream that has a direction.
    fn remember(&mut self, stream: Stream) {
        let is_fresh = |stream: &Stream| matches!(stream.kind, Kind::Fresh { .. });
        if self.streams.len() < STREAMS_MAX {
            self.streams.push(stream);
            return;
        }
        let many_fresh = self.streams.iter().filter(|stream| is_fresh(stream)).count() >= STREAMS_MAX / 2;
        let victim = self
            .streams
            .iter_mut()
            .filter(|stream| !many_fresh || is_fresh(stream))
            .min_by_key(|stream| stream.last_use);
        if let Some(victim) = victim {
            *victim = stream;
        }
    }

    fn marker(&mut self, block: u64, limits: &Limits) -> Decision {
        let clock = self.clock;
        // A strided stream spans the blocks of others: it is asked last.
        let rank = |stream: &Stream| match stream.kind {
            Kind::Fresh { .. } => None,
            _ if !stream.planned.contains(&block) => None,
            Kind::Forward | Kind::Backward => Some(0),
            Kind::Strided { .. } => Some(1),
        };
        let Some((_, stream)) =
            self.streams.iter_mut().filter_map(|stream| Some((rank(stream)?, stream))).min_by_key(|(rank, _)| *rank)
        else {
            return Decision::default();
        };
        stream.last_use = clock;
        match stream.kind {
            Kind::Fresh { .. } => Decision::default(),
            Kind::Forward => stream.next_forward(stream.planned.end, 0, limits, true),
            Kind::Backward => stream.next_backward(stream.planned.start, limits),
            Kind::Strided { step, pieces } => {
                let length = stream.window;
                let next = if step > 0 {
                    stream.planned.end.checked_add_signed(step - length.cast_signed())
                } else {
                    stream.planned.start.checked_add_signed(step)
                };
                next.map_or_else(Decision::default, |next| stream.next_strided(next, length, step, pieces * 2, limits))
            }
        }
    }
}

fn length(range: &Range<u64>) -> u64 {
    range.end - range.start
}

fn distance(from: u64, to: u64) -> i64 {
    to.cast_signed().wrapping_sub(from.cast_signed())
}

impl Stream {
    fn try_miss(&mut self, wanted: &Range<u64>, limits: &Limits, strided: bool) -> Option<Decision> {
        let count = length(wanted);
        match self.kind {
            Kind::Forward if !strided => {
                let near = self.planned.start..=self.planned.end.saturating_add(self.window);
                if !near.contains(&wanted.start) {
                    return None;
                }
                if wanted.end <= self.planned.end {
                    // Inside what was planned: it was left out, evicted, or a reader overtook. Fetch to the end of the plan.
                    let end = self.planned.end.min(wanted.start + self.window.max(count));
                    return Some(Decision { ranges: smallvec::smallvec![wanted.start..end], marker: None });
                }
                Some(self.next_forward(self.planned.end.min(wanted.start), wanted.end, limits, false))
            }
            Kind::Backward if !strided => {
                let near =
                    wanted.end <= self.planned.end && wanted.end.saturating_add(self.window) >= self.planned.start;
                near.then(|| {
                    if wanted.start >= self.planned.start {
                        Decision { ranges: smallvec::smallvec![self.planned.start..wanted.end], marker: None }
                    } else {
                        self.next_backward(wanted.end.max(self.planned.start), limits)
                    }
                })
            }
            Kind::Strided { step, pieces } if strided => {
                let next = if step > 0 {
                    self.planned.end.checked_add_signed(step)?.checked_sub(self.window)?
                } else {
                    self.planned.start.checked_add_signed(step)?
                };
                (wanted.start == next && count == self.window)
                    .then(|| self.next_strided(next, count, step, pieces * 2, limits))
            }
            Kind::Fresh { .. } if !strided => {
                if wanted.start >= self.planned.end && wanted.start - self.planned.end < count {
                    return Some(self.start_forward(wanted, limits));
                }
                if wanted.end <= self.planned.start && self.planned.start - wanted.end < count {
                    self.kind = Kind::Backward;
                    self.window = (count * 2).max(limits.window_min / 2);
                    self.planned = wanted.clone();
                    return Some(self.next_backward(wanted.end, limits));
                }
                None
            }
            Kind::Fresh { step } => {
                let repeats =
                    step != 0 && count == length(&self.planned) && distance(self.planned.start, wanted.start) == step;
                repeats.then(|| self.next_strided(wanted.start, count, step, 4, limits))
            }
            Kind::Forward | Kind::Backward | Kind::Strided { .. } => None,
        }
    }

    fn start_forward(&mut self, wanted: &Range<u64>, limits: &Limits) -> Decision {
        self.kind = Kind::Forward;
        self.window = (length(wanted) * 2).max(limits.window_min / 2);
        self.next_forward(wanted.start, wanted.end, limits, false)
    }

    /// The next window, from `start`, twice as long as the last one, at least to `reach`. An asynchronous one is marked at its start,
    /// one that somebody waits for right behind what he waits for.
    fn next_forward(&mut self, start: u64, reach: u64, limits: &Limits, asynchronous: bool) -> Decision {
        if start >= limits.end {
            return Decision::default();
        }
        self.window = (self.window * 2).clamp(1, limits.window_max.max(1));
        let unit = if self.window >= limits.alignment { limits.alignment } else { 1 << self.window.ilog2() };
        let end = start.saturating_add(self.window).div_ceil(unit).saturating_mul(unit);
        // Alignment may not push a window past its limit by more than it must.
        let end = if end - start > limits.window_max && end - unit > start.max(reach) { end - unit } else { end };
        let end = end.max(reach).min(limits.end.max(reach));
        self.planned = start..end;
        let marker = if asynchronous { start } else { reach };
        Decision { ranges: smallvec::smallvec![start..end], marker: (marker < end.min(limits.end)).then_some(marker) }
    }

    /// The window that ends at `end`, twice as long as the last one; marked in its middle.
    fn next_backward(&mut self, end: u64, limits: &Limits) -> Decision {
        if end == 0 {
            return Decision::default();
        }
        self.window = (self.window * 2).clamp(1, limits.window_max.max(1));
        let unit = if self.window >= limits.alignment { limits.alignment } else { 1 << self.window.ilog2() };
        let start = end.saturating_sub(self.window) / unit * unit;
        let start = if end - start > limits.window_max && start + unit < end { start + unit } else { start };
        self.planned = start..end;
        Decision { ranges: smallvec::smallvec![start..end], marker: (start > 0).then_some(start + (end - start) / 2) }
    }

    fn next_strided(&mut self, first: u64, count: u64, step: i64, pieces: u64, limits: &Limits) -> Decision {
        let pieces = pieces.clamp(1, (limits.window_max / count.max(1)).clamp(1, 32));
        let mut ranges: SmallVec<[Range<u64>; 4]> = SmallVec::new();
        let mut at = Some(first);
        for _ in 0..pieces {
            let Some(start) = at.filter(|&start| start < limits.end) else { break };
            ranges.push(start..start.saturating_add(count));
            at = start.checked_add_signed(step);
        }
        let (Some(one), Some(other)) = (ranges.first(), ranges.last()) else { return Decision::default() };
        self.kind = Kind::Strided { step, pieces };
        self.window = count;
        self.planned = one.start.min(other.start)..one.end.max(other.end);
        // Marked in the middle of the batch, so that the next one is under way before this one is used up.
        let marker = ranges.get(ranges.len() / 2).map(|range| range.start);
        Decision { ranges, marker }
    }
}

/// The readahead state of one open file. Its lock is taken on misses and markers only.
#[derive(Debug, Default)]
pub struct Readahead(Mutex<Streams>);

impl Readahead {
    /// The state of a file that was just opened.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    pub(super) fn decide(&self, access: &Access, limits: &Limits) -> Decision {
        self.0.lock().decide(access, limits)
    }
}

/// A window is worth while until the device's latency is this part of its time.
const LATENCY_PART: f64 = 8.0;
/// How much a batch counts when the next one has been measured.
const AGEING: f64 = 15.0 / 16.0;
/// Batches, aged, that a measurement needs.
const BATCHES_MIN: f64 = 3.0;
/// The longest window before anything was measured, in bytes. No measurement makes it shorter: what is read ahead on other threads
/// costs these threads' wake-ups, too, which a batch does not show.
const WINDOW_BYTES_MIN: u64 = 4 << 20;

/// What a longer window is worth on this device, from the batches that were read: the fit of *time = latency + bytes / bandwidth*, in which
/// older batches count less. A function of what it was told, of nothing else.
#[derive(Clone, Debug, Default)]
pub struct DeviceWorth {
    count: f64,
    bytes: f64,
    seconds: f64,
    bytes_squared: f64,
    bytes_seconds: f64,
    window_bytes: Option<f64>,
}

impl DeviceWorth {
    /// A batch of `bytes` took `time`. One that took none (in simulation the clock stands still) says nothing.
    #[expect(clippy::cast_precision_loss, reason = "an estimate")]
    pub fn observe(&mut self, bytes: u64, time: Duration) {
        if time.is_zero() || bytes == 0 {
            return;
        }
        let (bytes, seconds) = (bytes as f64, time.as_secs_f64());
        for (sum, term) in [
            (&mut self.count, 1.0),
            (&mut self.bytes, bytes),
            (&mut self.seconds, seconds),
            (&mut self.bytes_squared, bytes * bytes),
            (&mut self.bytes_seconds, bytes * seconds),
        ] {
            *sum = *sum * AGEING + term;
        }
        let mean = self.bytes / self.count;
        let variance = self.bytes_squared / self.count - mean * mean;
        // Batches of one length do not tell latency from bandwidth: the last estimate stays.
        if self.count < BATCHES_MIN || variance < mean * mean / 100.0 {
            return;
        }
        let covariance = self.bytes_seconds / self.count - mean * self.seconds / self.count;
        let seconds_per_byte = (covariance / variance).max(0.0);
        let latency = (self.seconds / self.count - seconds_per_byte * mean).max(0.0);
        // Where longer batches take no longer, the longest is best.
        let worth = (LATENCY_PART * latency / seconds_per_byte.max(1e-15)).min(1e12);
        self.window_bytes = Some(self.window_bytes.map_or(worth, |before| (before + worth) / 2.0));
    }

    /// The longest window that is worth while, in bytes, if that is known.
    #[must_use]
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "positive, and at most 1e12")]
    pub fn window_bytes(&self) -> Option<u64> {
        self.window_bytes.map(|bytes| bytes as u64)
    }
}

/// How often the longest window is halved under memory pressure, at most.
const PRESSURE_MAX: u32 = 5;
/// Guesses that must have come true, with none evicted unread, before the windows double again.
const USED_FOR_RELIEF: u64 = 16;

#[derive(Debug, Default)]
struct Governed {
    worth: DeviceWorth,
    pressure: u32,
    used_seen: u64,
    wasted_seen: u64,
}

/// How long windows may be now, for all files of a cache. Its lock is taken for a batch that was read, and for a decision.
#[derive(Debug, Default)]
pub(super) struct Governor(Mutex<Governed>);

impl Governor {
    /// See [`DeviceWorth::observe`].
    pub(super) fn observe(&self, bytes: u64, time: Duration) {
        self.0.lock().worth.observe(bytes, time);
    }

    /// The longest window in bytes, at most `bytes_max`. `used` and `wasted` count the folios that were read ahead and then read, or evicted
    /// before anybody read them.
    pub(super) fn window_bytes(&self, bytes_max: u64, used: u64, wasted: u64) -> u64 {
        let mut governed = self.0.lock();
        if wasted > governed.wasted_seen {
            governed.pressure = (governed.pressure + 1).min(PRESSURE_MAX);
            (governed.wasted_seen, governed.used_seen) = (wasted, used);
        } else if governed.pressure > 0 && used.saturating_sub(governed.used_seen) >= USED_FOR_RELIEF {
            governed.pressure -= 1;
            governed.used_seen = used;
        }
        let window = governed.worth.window_bytes().unwrap_or(0).max(WINDOW_BYTES_MIN).min(bytes_max);
        window >> governed.pressure
    }
}

#[cfg(test)]
#[path = "readahead_tests.rs"]
mod tests;
