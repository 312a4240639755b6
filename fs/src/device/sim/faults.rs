//! How a [`SimDevice`] misbehaves on request. Counts are of requests (elements of batches), from 0 for the next one.

use std::ops::Range;

use rustix::io::Errno;

use super::SimDevice;
use crate::device::Image;
use crate::sync::Arc;

#[derive(Clone, Copy, Debug)]
pub(super) enum WriteFault {
    Fail(Errno),
    Lose,
    Misdirect(i64),
}

/// Planned and standing faults. Protected by the device's lock.
#[derive(Default)]
pub(super) struct Faults {
    reads: u64,
    writes: u64,
    flushes: u64,
    read_faults: Vec<(u64, Errno)>,
    write_faults: Vec<(u64, WriteFault)>,
    flush_faults: Vec<(u64, Errno)>,
    bad: Vec<Range<u64>>,
    stale: Vec<(Range<u64>, Arc<Image>)>,
    lying: bool,
    broken: bool,
    pub(super) powered_off: bool,
    pub(super) power_off_at: Option<u64>,
}

fn take<T: Copy>(faults: &mut Vec<(u64, T)>, count: &mut u64) -> Option<T> {
    let at = *count;
    *count += 1;
    let index = faults.iter().position(|&(when, _)| when == at)?;
    Some(faults.swap_remove(index).1)
}

fn overlaps(range: &Range<u64>, offset: u64, length: u64) -> bool {
    range.start < offset + length && offset < range.end
}

/// What is left of `range` without `[offset, offset + length)`.
fn without(range: &Range<u64>, offset: u64, length: u64) -> impl Iterator<Item = Range<u64>> + use<> {
    [range.start..range.end.min(offset), range.start.max(offset + length)..range.end]
        .into_iter()
        .filter(|rest| rest.start < rest.end)
}

impl Faults {
    pub(super) fn on_read(&mut self, offset: u64, length: u64) -> Option<Errno> {
        let planned = take(&mut self.read_faults, &mut self.reads);
        let bad = self.powered_off || self.bad.iter().any(|range| overlaps(range, offset, length));
        planned.or(bad.then_some(Errno::IO))
    }

    pub(super) fn on_write(&mut self, offset: u64, length: u64) -> Option<WriteFault> {
        let planned = take(&mut self.write_faults, &mut self.writes);
        if self.powered_off {
            return Some(WriteFault::Fail(Errno::IO));
        }
        if planned.is_none() {
            self.overwritten(offset, length);
        }
        planned
    }

    pub(super) fn on_flush(&mut self) -> Option<Errno> {
        let planned = take(&mut self.flush_faults, &mut self.flushes);
        self.broken |= planned.is_some();
        planned.or(self.powered_off.then_some(Errno::IO))
    }

    pub(super) fn flush_lies(&self) -> bool {
        self.lying || self.broken
    }

    /// New content cures bad and stale sectors, as a disk that remaps them.
    pub(super) fn overwritten(&mut self, offset: u64, length: u64) {
        self.bad = self.bad.iter().flat_map(|range| without(range, offset, length)).collect();
        self.stale = std::mem::take(&mut self.stale)
            .into_iter()
            .flat_map(|(range, image)| without(&range, offset, length).map(move |rest| (rest, Arc::clone(&image))))
            .collect();
    }

    pub(super) fn make_stale(&self, offset: u64, buffer: &mut [u8]) {
        for (range, image) in &self.stale {
            if overlaps(range, offset, buffer.len() as u64) {
                let start = range.start.max(offset);
                let end = range.end.min(offset + buffer.len() as u64);
                image.read(start, &mut buffer[(start - offset) as usize..(end - offset) as usize]);
            }
        }
    }
}

impl SimDevice {
    /// Read request number `nth` from now fails with `errno`.
    pub fn fail_read(&self, nth: u64, errno: Errno) {
        let faults = &mut self.state.lock().faults;
        faults.read_faults.push((faults.reads + nth, errno));
    }

    /// Write request number `nth` from now fails with `errno`. Part of it may have been stored, and so may the rest of its batch.
    pub fn fail_write(&self, nth: u64, errno: Errno) {
        let faults = &mut self.state.lock().faults;
        faults.write_faults.push((faults.writes + nth, WriteFault::Fail(errno)));
    }

    /// Flush number `nth` from now fails with `errno`; later ones succeed and make nothing durable.
    pub fn fail_flush(&self, nth: u64, errno: Errno) {
        let faults = &mut self.state.lock().faults;
        faults.flush_faults.push((faults.flushes + nth, errno));
    }

    /// Write request number `nth` from now is acknowledged and not stored.
    pub fn lose_write(&self, nth: u64) {
        let faults = &mut self.state.lock().faults;
        faults.write_faults.push((faults.writes + nth, WriteFault::Lose));
    }

    /// Write request number `nth` from now lands `by` bytes further on (or before); off the device it is lost.
    pub fn misdirect_write(&self, nth: u64, by: i64) {
        let faults = &mut self.state.lock().faults;
        faults.write_faults.push((faults.writes + nth, WriteFault::Misdirect(by)));
    }

    /// Reads that touch the range fail with EIO, until its sectors are written again.
    pub fn make_bad(&self, offset: u64, length: u64) {
        self.state.lock().faults.bad.push(offset..offset + length);
    }

    /// Reads of the range answer from `older`, until its sectors are written again.
    pub fn make_stale(&self, offset: u64, length: u64, older: &Image) {
        self.state.lock().faults.stale.push((offset..offset + length, Arc::new(older.clone())));
    }

    /// Flushes report success and do nothing, until this is called with `false`.
    pub fn lie_about_flush(&self, lie: bool) {
        self.state.lock().faults.lying = lie;
    }

    /// From now on everything fails with EIO and nothing is stored.
    pub fn power_off(&self) {
        self.state.lock().faults.powered_off = true;
    }

    /// As [`Self::power_off`], at boundary `number`: what it announces does not happen any more.
    pub fn power_off_at(&self, number: u64) {
        self.state.lock().faults.power_off_at = Some(number);
    }

    /// Forgets all planned and standing faults; what has been corrupted stays so.
    pub fn clear_faults(&self) {
        let faults = &mut self.state.lock().faults;
        *faults = Faults { reads: faults.reads, writes: faults.writes, flushes: faults.flushes, ..Faults::default() };
    }

    /// Changes what the medium holds, durably and behind everybody's back: `change` gets each piece of the range with its offset.
    pub fn corrupt(&self, offset: u64, length: u64, change: impl Fn(u64, &mut [u8])) {
        let mut state = self.state.lock();
        let state = &mut *state;
        Arc::make_mut(&mut state.durable).update(offset, length, &change);
        state.current.update(offset, length, &change);
    }

    /// Flips bit `bit` (0 to 7) of the byte at `offset`.
    pub fn flip_bit(&self, offset: u64, bit: u8) {
        self.corrupt(offset, 1, |_, bytes| bytes.iter_mut().for_each(|byte| *byte ^= 1 << (bit & 7)));
    }

    /// Zeroes a range of the medium.
    pub fn zero_sectors(&self, offset: u64, length: u64) {
        self.corrupt(offset, length, |_, bytes| bytes.fill(0));
    }
}
