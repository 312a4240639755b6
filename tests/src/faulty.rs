//! [`FaultyDevice`]: a device that misbehaves by a plan in words, around a real one. `coppice-faulty-mount` serves a mount from it, so that
//! what a person sees of a dying disk can be tested through the kernel.
//!
//! A plan is faults with commas between; `COPPICE_FAULTS` holds it for the program:
//!
//! | fault | what happens |
//! | --- | --- |
//! | `read@N=eio`, `write@N=eio`, `flush@N=eio` | the Nth request of that kind fails (from 0; `N..` for that and all after it) |
//! | `write@N=lost` | it is acknowledged and not done |
//! | `write@N=+BYTES`, `write@N=-BYTES` | it is done so far away from where it should |
//! | `bytes@OFFSET+LENGTH=eio` | reads of any of these bytes fail |
//! | `size@BYTES=eio` | the device has shrunk: whatever reaches behind it fails |
//! | `allocate@N=enospc`, `allocate@N..=enospc`, `allocate@N..M=enospc` | no space is found for the Nth allocation since the mount, whatever `when` says |
//! | `when=PATH` | nothing happens, and nothing is counted, until there is a file at PATH |
//!
//! Locks: none; counters are atomic.

use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use coppicefs::device::{BlockDevice, ReadRequest, WriteRequest};
use coppicefs::{Error, Result};

/// What happens to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Effect {
    Fail,
    Lose,
    Misdirect(i64),
}

/// Kind of request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    Read,
    Write,
    Flush,
}

/// See the module's table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FaultPlan {
    calls: Vec<(Call, Range<u64>, Effect)>,
    bad: Vec<Range<u64>>,
    size_bytes: Option<u64>,
    no_space: Option<(u32, u32)>,
    when: Option<PathBuf>,
}

impl FromStr for FaultPlan {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut plan = Self::default();
        for fault in text.split(',').filter(|fault| !fault.is_empty()) {
            plan.add(fault).ok_or_else(|| format!("`{fault}` is no fault: see coppicefs_tests::faulty"))?;
        }
        Ok(plan)
    }
}

impl FaultPlan {
    fn add(&mut self, fault: &str) -> Option<()> {
        let (place, effect) = fault.split_once('=')?;
        if place == "when" {
            self.when = Some(effect.into());
            return Some(());
        }
        let (what, place) = place.split_once('@')?;
        let call = match what {
            "read" => Call::Read,
            "write" => Call::Write,
            "flush" => Call::Flush,
            "bytes" => {
                let (offset, length) = place.split_once('+')?;
                let offset = offset.parse::<u64>().ok()?;
                self.bad.push(offset..offset.checked_add(length.parse().ok()?)?);
                return (effect == "eio").then_some(());
            }
            "size" => {
                self.size_bytes = Some(place.parse().ok()?);
                return (effect == "eio").then_some(());
            }
            "allocate" => {
                let (first, end) = place.split_once("..").unwrap_or((place, place));
                let last = if end.is_empty() { u32::MAX } else { end.parse().ok()? };
                self.no_space = Some((first.parse().ok()?, last));
                return (effect == "enospc").then_some(());
            }
            _ => return None,
        };
        let numbers = match place.strip_suffix("..") {
            Some(first) => first.parse().ok()?..u64::MAX,
            None => place.parse::<u64>().ok().and_then(|number| Some(number..number.checked_add(1)?))?,
        };
        let effect = match effect {
            "eio" => Effect::Fail,
            "lost" if call == Call::Write => Effect::Lose,
            by if call == Call::Write => Effect::Misdirect(by.parse().ok()?),
            _ => return None,
        };
        self.calls.push((call, numbers, effect));
        Some(())
    }

    /// Which allocations find no space: first and last.
    #[must_use]
    pub fn no_space(&self) -> Option<(u32, u32)> {
        self.no_space
    }

    fn is_on(&self) -> bool {
        self.when.as_ref().is_none_or(|path| path.exists())
    }

    fn effect(&self, call: Call, number: u64) -> Option<Effect> {
        self.calls
            .iter()
            .find(|(kind, numbers, _)| *kind == call && numbers.contains(&number))
            .map(|(_, _, effect)| *effect)
    }

    fn reaches_behind(&self, offset: u64, length: u64) -> bool {
        self.size_bytes.is_some_and(|size| offset.saturating_add(length) > size)
    }

    fn is_bad(&self, offset: u64, length: u64) -> bool {
        let overlaps = |bad: &Range<u64>| bad.start < offset.saturating_add(length) && offset < bad.end;
        self.reaches_behind(offset, length) || self.bad.iter().any(overlaps)
    }
}

/// See the module's documentation.
#[derive(Debug)]
pub struct FaultyDevice {
    inner: Arc<dyn BlockDevice>,
    plan: FaultPlan,
    reads: AtomicU64,
    writes: AtomicU64,
    flushes: AtomicU64,
}

impl FaultyDevice {
    /// `inner`, with the faults of `plan`.
    #[must_use]
    pub fn new(inner: Arc<dyn BlockDevice>, plan: FaultPlan) -> Self {
        let [reads, writes, flushes] = [const { AtomicU64::new(0) }; 3];
        Self { inner, plan, reads, writes, flushes }
    }

    fn failed(&self, operation: &'static str, offset: u64, length: u64) -> Error {
        let source = Arc::new(io::Error::from_raw_os_error(rustix::io::Errno::IO.raw_os_error()));
        Error::Device { operation, device: self.name().to_owned(), offset, length, source }
    }

    /// One write of a batch.
    fn write_one(&self, request: &WriteRequest<'_>) -> Result<()> {
        let number = self.writes.fetch_add(1, Ordering::Relaxed);
        let (offset, length) = (request.offset, request.length());
        match self.plan.effect(Call::Write, number) {
            _ if self.plan.reaches_behind(offset, length) => Err(self.failed("write", offset, length)),
            Some(Effect::Fail) => Err(self.failed("write", offset, length)),
            Some(Effect::Lose) => Ok(()),
            Some(Effect::Misdirect(by)) => match offset.checked_add_signed(by) {
                Some(elsewhere) if elsewhere.saturating_add(length) <= self.size_bytes() => {
                    self.inner.write_batch(&[WriteRequest { offset: elsewhere, data: request.data.clone() }])
                }
                // Nowhere on the device.
                _ => Ok(()),
            },
            None => self.inner.write_batch(std::slice::from_ref(request)),
        }
    }
}

impl BlockDevice for FaultyDevice {
    coppicefs::as_the_device_below!(inner);

    fn is_read_only(&self) -> bool {
        self.inner.is_read_only()
    }

    fn read_batch(&self, requests: &mut [ReadRequest<'_>], landed: &mut dyn FnMut(usize, Result<()>)) {
        if !self.plan.is_on() {
            return self.inner.read_batch(requests, landed);
        }
        for (index, request) in requests.iter_mut().enumerate() {
            let number = self.reads.fetch_add(1, Ordering::Relaxed);
            let (offset, length) = (request.offset, request.buffer.len() as u64);
            if self.plan.effect(Call::Read, number).is_some() || self.plan.is_bad(offset, length) {
                landed(index, Err(self.failed("read", offset, length)));
            } else {
                let one = ReadRequest { offset, buffer: &mut *request.buffer };
                self.inner.read_batch(&mut [one], &mut |_, result| landed(index, result));
            }
        }
    }

    fn write_batch(&self, requests: &[WriteRequest<'_>]) -> Result<()> {
        if !self.plan.is_on() {
            return self.inner.write_batch(requests);
        }
        requests.iter().try_for_each(|request| self.write_one(request))
    }

    fn flush(&self) -> Result<()> {
        if self.plan.is_on() {
            let number = self.flushes.fetch_add(1, Ordering::Relaxed);
            if self.plan.effect(Call::Flush, number).is_some() {
                return Err(self.failed("flush", 0, self.size_bytes()));
            }
        }
        self.inner.flush()
    }

    fn discard(&self, offset: u64, length: u64) -> Result<()> {
        self.inner.discard(offset, length)
    }
}

#[cfg(test)]
mod tests {
    use coppicefs::device::MemDevice;

    use super::*;

    #[test]
    fn a_plan_is_what_it_says_or_refused() {
        let plan: FaultPlan =
            "read@3=eio,write@2..=lost,write@0=-4096,flush@1=eio,bytes@8192+4096=eio,when=/x".parse().unwrap();
        assert_eq!(plan.effect(Call::Read, 3), Some(Effect::Fail));
        assert_eq!(plan.effect(Call::Read, 4), None);
        assert_eq!(plan.effect(Call::Write, 1 << 40), Some(Effect::Lose));
        assert_eq!(plan.effect(Call::Write, 0), Some(Effect::Misdirect(-4096)));
        assert!(plan.is_bad(4096, 4097) && !plan.is_bad(4096, 4096) && !plan.is_bad(12_288, 1) && !plan.is_on());
        for (text, refused) in [("1", (1, 1)), ("2..5", (2, 5)), ("7..", (7, u32::MAX))] {
            let plan: FaultPlan = format!("allocate@{text}=enospc").parse().unwrap();
            assert_eq!(plan.no_space(), Some(refused));
        }
        for wrong in [
            "read",
            "read@=eio",
            "read@3=lost",
            "write@3=away",
            "bytes@3=eio",
            "bytes@3+4=lost",
            "flush@x=eio",
            "allocate@x=enospc",
            "allocate@1=eio",
            "what@1=eio",
        ] {
            assert!(wrong.parse::<FaultPlan>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn requests_meet_what_was_planned_for_them() {
        let device = |plan: &str| FaultyDevice::new(Arc::new(MemDevice::new(64 << 10)), plan.parse().unwrap());
        let mut buffer = vec![0; 4096];
        let lost = device("write@0=lost,write@1=+8192,write@2=eio");
        lost.write(0, &[1; 4096]).unwrap();
        lost.write(4096, &[2; 4096]).unwrap();
        assert!(lost.write(0, &[3; 4096]).is_err());
        let mut first = |offset: u64| {
            lost.read(offset, &mut buffer).unwrap();
            buffer[0]
        };
        assert_eq!([first(0), first(4096), first(12_288)], [0, 0, 2]);
        let shrunk = device("size@8192=eio,read@0=eio,flush@0=eio");
        assert!(shrunk.read(0, &mut buffer).is_err() && shrunk.read(0, &mut buffer).is_ok());
        assert!(shrunk.read(8192, &mut buffer).is_err() && shrunk.write(4096, &[0; 8192]).is_err());
        assert!(shrunk.flush().is_err() && shrunk.flush().is_ok());
    }
}
