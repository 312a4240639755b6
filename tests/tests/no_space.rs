//! ENOSPC at the nth allocation, in process: a piece of space for data, or a bucket for nodes, is not to be had, though it was promised: once, a
//! few times, or for good. Nothing panics or hangs; whoever is told is told ENOSPC; what was acknowledged is there, in the mount that went
//! through it, after a power cut, and after the end; a check finds nothing; and once there is space again the filesystem goes on.
//!
//! `COPPICE_NO_SPACE_WORKLOADS` (1) is how many random workloads are tried, from `COPPICE_SEED` (1) on: all their allocations.

use std::sync::Arc;

use coppicefs::Error;
use coppicefs::device::{Image, SimDevice};
use coppicefs::space::TestSwitches;
use coppicefs_tests::crash::{Mounted, Subject, seed_or};
use coppicefs_tests::filesystem_subject::{COMPRESSIONS, Coppice};
use coppicefs_tests::limit::Limit;
use coppicefs_tests::model::Model;
use coppicefs_tests::mount::count;
use coppicefs_tests::operation::Operation;
use coppicefs_tests::simulated::device_of;
use coppicefs_tests::workloads;
use rustix::io::Errno;

const DEVICE_BYTES: u64 = 24 << 20;

/// So many allocations behind those of the workload are tried too.
const ALLOCATIONS_OF_END: u64 = 8;

/// How many allocations in a row find no space.
const WINDOWS: [u32; 3] = [1, 12, u32::MAX];

/// A run, and what it has to show.
struct Run<'a> {
    what: String,
    mounted: Box<dyn Mounted>,
    model: Model,
    /// Operations that were told that there is no space.
    refused: usize,
    workload: &'a [Operation],
}

impl Run<'_> {
    fn all(&mut self) {
        for operation in self.workload {
            self.one(operation);
        }
    }

    fn allocations(&self) -> u64 {
        self.mounted.counter("space.allocations")
    }

    /// Writes and syncs until so many allocations were made: the last refusal is over.
    fn until_there_is_space(&mut self, allocations: u64) {
        let path = "/probe".to_owned();
        self.one(&Operation::Create { path: path.clone(), mode: 0o600 });
        for tag in 9000.. {
            self.one(&Operation::Write { path: path.clone(), offset: 0, length: 30_000, tag });
            self.one(&Operation::Sync);
            if self.allocations() >= allocations {
                break;
            }
            assert!(tag < 9100, "{}: nobody asks for space any more", self.what);
        }
        let refused = self.refused;
        self.one(&Operation::Sync);
        assert_eq!(self.refused, refused, "{}: there is space again, and it does not see it", self.what);
    }

    fn one(&mut self, operation: &Operation) {
        let what = &self.what;
        let mut next = self.model.clone();
        let expected = next.begin(operation);
        match self.mounted.perform(operation) {
            // Of another kind than the workload thinks, since what was to be there was refused: the model does not look.
            Ok(()) | Err(Error::Posix(_)) if operation.is_sync() && !matches!(expected, Ok(())) => {}
            Err(Error::Posix(Errno::NOTDIR | Errno::LOOP | Errno::ISDIR)) if operation.is_sync() => {}
            Ok(()) => {
                expected.unwrap_or_else(|errno| panic!("{what}: {operation:?} should fail with {errno}"));
                next.acknowledge(operation);
                self.model = next;
            }
            Err(error @ Error::NoSpace(_)) => {
                self.refused += 1;
                let mut partly = self.model.clone();
                let kept = operation.cut_to(self.mounted.bytes_done());
                // It fits, since the whole did.
                kept.into_iter().for_each(|kept| _ = partly.begin(&kept));
                // Done where only its durability was refused, or not, or a write as far as there was space; never anything else.
                let shown = self.mounted.tree().unwrap_or_else(|error| panic!("{what}: {error}"));
                let found = [partly, next].into_iter().find(|model| model.check_live(&shown).is_ok());
                self.model = found.unwrap_or_else(|| {
                    let problem = self.model.check_live(&shown);
                    panic!("{what}: {operation:?} was refused ({error}), and what is there now is something else: {problem:?}")
                });
            }
            Err(error) => assert_eq!(expected, Err(error.errno()), "{what}: {operation:?}: {error}"),
        }
    }
}

/// What an image shows to a filesystem that finds space; and that nothing is wrong with it.
fn assert_shows(what: &str, model: &Model, device: &Arc<SimDevice>, subject: &Coppice) {
    let problems = subject.check(device).unwrap_or_else(|error| panic!("{what}: {error}"));
    assert!(problems.is_empty(), "{what}: {problems:?}");
    let mut mounted = subject.mount(device, 1).unwrap_or_else(|error| panic!("{what}: {error}"));
    let shown = mounted.tree().unwrap_or_else(|error| panic!("{what}: {error}"));
    model.check(&shown).unwrap_or_else(|problem| panic!("{what}: {problem}"));
    // It goes on.
    let path = "/afterwards".to_owned();
    for operation in [
        Operation::Create { path: path.clone(), mode: 0o644 },
        Operation::Write { path: path.clone(), offset: 0, length: 100_000, tag: 77 },
        Operation::Sync,
    ] {
        mounted.perform(&operation).unwrap_or_else(|error| panic!("{what}: {operation:?}: {error}"));
    }
    mounted.unmount().unwrap_or_else(|error| panic!("{what}: {error}"));
    let problems = subject.check(device).unwrap_or_else(|error| panic!("{what}: {error}"));
    assert!(problems.is_empty(), "{what}: then {problems:?}");
}

/// Performs a workload with `length` allocations from `first` on refused. How many operations were told, and how many allocations there were.
fn with_refusals(name: &str, workload: &[Operation], standard: &Coppice, first: u32, length: u32) -> (usize, u64) {
    let _limit = Limit::new();
    let what = format!("{name}, {length} allocations from {first} on");
    let switches = TestSwitches {
        refuse_allocations: Some((first, first.saturating_add(length - 1))),
        // A checkpoint that asks for all of its buckets beforehand is refused before it has written anything.
        no_slots_beforehand: first % 2 == 1,
        ..standard.switches
    };
    let subject = Coppice { switches, ..standard.clone() };
    let run_device = device_of(Image::new(DEVICE_BYTES));
    subject.format(&run_device).unwrap();
    let mounted = subject.mount(&run_device, seed_or(1)).unwrap();
    let mut run = Run { what, mounted, model: Model::new(4096), refused: 0, workload };
    run.all();
    let is_for_good = length == u32::MAX;
    // The end of the mount may be what is refused.
    if !is_for_good && run.allocations() > u64::from(first) {
        run.until_there_is_space(u64::from(first) + u64::from(length));
    }
    let is_over = !is_for_good && run.allocations() > u64::from(first);
    let allocations = run.allocations();
    let Run { what, mut mounted, mut model, refused, .. } = run;
    // Nothing is lost while it is mounted: what could not be written waits.
    let shown = mounted.tree().unwrap_or_else(|error| panic!("{what}: {error}"));
    model.check_live(&shown).unwrap_or_else(|problem| panic!("{what}: while it is mounted: {problem}"));
    // The power goes, and takes all that no flush made durable.
    let cut = device_of(run_device.snapshot().durable().clone());
    assert_shows(&format!("{what}, power cut"), &model, &cut, standard);
    match mounted.unmount() {
        Ok(()) => model.acknowledge(&Operation::Sync),
        Err(Error::NoSpace(_)) if !is_over => {}
        Err(error) => panic!("{what}: unmounting: {error}"),
    }
    assert_shows(&what, &model, &run_device, standard);
    (refused, allocations)
}

/// Every allocation of a workload, and those of its end, refused in all ways.
fn every_allocation(name: &str, workload: &[Operation], standard: &Coppice) {
    let (_, allocations) = with_refusals(name, workload, standard, u32::MAX, 1);
    let mut refused = 0;
    for first in 0..allocations + ALLOCATIONS_OF_END {
        for length in WINDOWS {
            refused += with_refusals(name, workload, standard, first as u32, length).0;
        }
    }
    println!("{name}: {allocations} allocations, {refused} operations were refused");
    assert!(refused > 0, "{name}");
}

/// A random workload, and the filesystem that it is for.
fn workload(seed: u64) -> (Vec<Operation>, Coppice) {
    let mut standard = Coppice { commit_at_once: seed % 4 == 3, ..Coppice::default() };
    let workload = workloads::random(seed, 100 + seed as usize % 5 * 60);
    if !seed.is_multiple_of(2) {
        return (workload, standard);
    }
    let (_, compression) = COMPRESSIONS[1 + seed as usize / 2 % 2];
    standard.format.defaults.compression = compression as u8;
    (workloads::compressible(workload), standard)
}

#[test]
fn any_allocation_of_a_random_workload_may_find_no_space() {
    for seed in seed_or(1)..seed_or(1) + count("COPPICE_NO_SPACE_WORKLOADS", 1) {
        let (workload, standard) = workload(seed);
        every_allocation(&format!("random {seed}"), &workload, &standard);
    }
}

/// Each of the small workloads, whose operations are what applications rely on; in the short form one allocation in 16. Some of them write more than
/// may be dirty: who waits for that to be written is told when it cannot be.
#[test]
fn any_allocation_of_the_small_workloads_may_find_no_space() {
    let is_long = count("COPPICE_NO_SPACE_WORKLOADS", 1) > 1;
    let (mut runs, mut refused) = (0_usize, 0);
    // Where what was to take a name away was refused, the model does not follow writes through a handle.
    let follows = |operations: &[Operation]| {
        !operations.iter().any(|operation| matches!(operation, Operation::WriteUnlinked { .. }))
    };
    for (name, operations) in workloads::fixed().into_iter().filter(|(_, operations)| follows(operations)) {
        let (_, allocations) = with_refusals(name, &operations, &Coppice::default(), u32::MAX, 1);
        for first in 0..allocations {
            for (index, length) in WINDOWS.into_iter().enumerate() {
                if is_long || runs.is_multiple_of(16) && (runs / 16 + index).is_multiple_of(WINDOWS.len()) {
                    refused += with_refusals(name, &operations, &Coppice::default(), first as u32, length).0;
                }
            }
            runs += 1;
        }
    }
    println!("{runs} allocations of the small workloads, {refused} operations were refused");
    assert!(runs > 100 && refused > 20);
}

/// Runs in which something was wrong once.
#[test]
fn what_was_wrong_once() {
    for (seed, first, length) in [
        // A truncation had dropped what was cached before it found no space for the new last block.
        (1, 11, 12),
        // With no bucket for any node the log filled up, and who waited for a checkpoint to free it waited for ever.
        (3, 0, u32::MAX),
        // And a truncation found that out after it had dropped what was cached.
        (3, 6, u32::MAX),
        // A direct write that extends its file was done in part, and answered that nothing was.
        (5, 10, 12),
        // A checkpoint claimed a bucket in the middle that had become free after its F: replay took it away from the nodes that were in it.
        (10, 19, 1),
    ] {
        let (workload, standard) = workload(seed);
        let (refused, _) = with_refusals(&format!("random {seed}"), &workload, &standard, first, length);
        // One alone is not always told.
        assert!(refused > 0 || length == 1, "random {seed}, from {first} on");
    }
}
