//! Bad media, structure by structure and call by call, in process: whatever happens, nothing panics or hangs, no wrong byte is shown
//! as right, what has another copy is shown whole, and errors name what is damaged.
//!
//! `COPPICE_FAULTS_SAMPLES` (2) is how many of each structure are tried, and a measure of the rest; `COPPICE_SEED` picks them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use coppicefs::Error;
use coppicefs::device::{BlockDevice, Image, SimDevice};
use coppicefs::space::TestSwitches;
use coppicefs_tests::crash::{Subject, seed_or};
use coppicefs_tests::filesystem_subject::Coppice;
use coppicefs_tests::limit::Limit;
use coppicefs_tests::model::Model;
use coppicefs_tests::mount::count;
use coppicefs_tests::operation::Operation;
use coppicefs_tests::regions::{Region, regions};
use coppicefs_tests::shown::{Shown, show};
use coppicefs_tests::simulated::device_of;
use coppicefs_tests::tree::Tree;
use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};
use rustix::io::Errno;

const DEVICE_BYTES: u64 = 16 << 20;

fn dynamic(device: &Arc<SimDevice>) -> Arc<dyn BlockDevice> {
    Arc::clone(device) as _
}

/// Directories, files of all sizes, links, attributes, and changes of some of it; every fourth step makes all of it durable.
fn operations() -> Vec<Operation> {
    let mut operations = Vec::new();
    for folder in 0..4_u32 {
        let parent = format!("/d{folder}");
        operations.push(Operation::MakeDirectory { path: parent.clone(), mode: 0o755 });
        for file in 0..10_u32 {
            let path = format!("{parent}/a file with a name {file}");
            let (tag, length) = (1 + folder * 100 + file, 1 + u64::from(file) * 5000);
            operations.push(Operation::Create { path: path.clone(), mode: 0o640 });
            operations.push(Operation::Write { path: path.clone(), offset: 0, length, tag });
            operations.push(Operation::SetXattr {
                path: path.clone(),
                name: "user.a".into(),
                value: "v".repeat(1 << file),
            });
            match file {
                3 => operations.push(Operation::Link { existing: path, path: format!("/link{folder}") }),
                4 => operations.push(Operation::SymbolicLink { path: format!("/symbolic{folder}"), target: path }),
                5 => operations.push(Operation::Punch { path, offset: 4096, length: 8192 }),
                6 => operations.push(Operation::Truncate { path, size: 9000 }),
                _ => {}
            }
        }
        operations.push(if folder % 2 == 0 { Operation::Sync } else { Operation::Settle });
    }
    operations
}

/// An image, and what it has to show.
struct Made {
    image: Image,
    /// What the medium held in the middle of it.
    older: Arc<Image>,
    tree: Tree,
}

/// Ended in order, or with its newest changes in the journal alone.
fn made(in_order: bool) -> Made {
    let subject = Coppice::default();
    let device = device_of(Image::new(DEVICE_BYTES));
    subject.format(&device).unwrap();
    let mut mounted = subject.mount(&device, 1).unwrap();
    let mut model = Model::new(4096);
    let operations = operations();
    let mut older = None;
    for (number, operation) in operations.iter().enumerate() {
        if number == operations.len() * 3 / 4 {
            mounted.perform(&Operation::Sync).unwrap();
            older = Some(Arc::new(device.snapshot().everything()));
        }
        model.begin(operation).unwrap();
        mounted.perform(operation).unwrap();
    }
    if in_order {
        mounted.unmount().unwrap();
    } else {
        mounted.perform(&Operation::Sync).unwrap();
    }
    Made { image: device.snapshot().everything(), older: older.unwrap(), tree: model.tree() }
}

/// What becomes of a copy.
#[derive(Clone, Copy, Debug)]
enum Damage {
    Bit,
    Zeros,
    Noise,
    Unreadable,
    Stale,
}

const DAMAGES: [Damage; 5] = [Damage::Bit, Damage::Zeros, Damage::Noise, Damage::Unreadable, Damage::Stale];

/// Damages a sector of a copy, or all of it where that is what happens to whole devices. Whether anything has changed.
fn damage(
    device: &SimDevice,
    made: &Made,
    copy: &std::ops::Range<u64>,
    damage: Damage,
    random: &mut Xoshiro256PlusPlus,
) -> bool {
    let length = copy.end - copy.start;
    let at = copy.start + random.next_u64() % length;
    let sector = (at / 512 * 512).max(copy.start);
    let sector_length = (sector / 512 * 512 + 512).min(copy.end) - sector;
    match damage {
        Damage::Bit => device.flip_bit(at, (random.next_u64() % 8) as u8),
        Damage::Zeros => device.corrupt(sector, sector_length, |_, bytes| bytes.fill(0)),
        Damage::Noise => {
            let noise = random.next_u64() | 1;
            device.corrupt(sector, sector_length, |at, bytes| {
                bytes.iter_mut().zip(at..).for_each(|(byte, at)| *byte ^= (noise.rotate_left(at as u32) | 1) as u8);
            });
        }
        Damage::Unreadable => {
            device.make_bad(at / 4096 * 4096, 4096);
            return true;
        }
        Damage::Stale => {
            let (mut new, mut old) = (vec![0; length as usize], vec![0; length as usize]);
            made.image.read(copy.start, &mut new);
            made.older.read(copy.start, &mut old);
            device.make_stale(copy.start, length, &made.older);
            return new != old;
        }
    }
    let mut before = vec![0; sector_length as usize];
    made.image.read(sector, &mut before);
    let mut after = before.clone();
    device.image().read(sector, &mut after);
    before != after
}

/// Up to `samples` regions of each name, by seed.
fn sampled(regions: Vec<Region>, samples: usize, random: &mut Xoshiro256PlusPlus) -> Vec<Region> {
    let mut by_name: BTreeMap<&str, Vec<Region>> = BTreeMap::new();
    for region in regions {
        by_name.entry(region.name).or_default().push(region);
    }
    let mut chosen = Vec::new();
    for mut regions in by_name.into_values() {
        for _ in 0..samples.min(regions.len()) {
            chosen.push(regions.swap_remove((random.next_u64() % regions.len() as u64) as usize));
        }
    }
    chosen
}

/// That an answer of a damaged filesystem is no lie.
fn assert_honest(what: &str, shown: &Shown) {
    assert!(shown.wrong.is_empty(), "{what}: {:?}", shown.wrong);
    for (path, _, error) in &shown.errors {
        assert!(error.is_media_error(), "{what}: {path}: {error:?}");
    }
}

#[test]
fn every_structure_is_known_by_name() {
    let names: BTreeSet<_> = [true, false]
        .into_iter()
        .flat_map(|in_order| regions(&device_of(made(in_order).image)).unwrap())
        .map(|region| region.name)
        .collect();
    let wanted = [
        "superblock",
        "checkpoint record",
        "node-space map",
        "journal",
        "data",
        "extents",
        "inodes",
        "dirents",
        "xattrs",
        "buckets",
        "free-space",
        "backpointers",
    ];
    for name in wanted {
        assert!(names.contains(name), "{name} is not among {names:?}");
    }
}

/// One copy damaged: where there is another, everything is shown; a check then finds nothing that a repair does not cure.
#[test]
fn what_has_another_copy_is_shown_whole_and_healed() {
    let samples = count("COPPICE_FAULTS_SAMPLES", 2) as usize;
    let mut random = Xoshiro256PlusPlus::seed_from_u64(seed_or(1));
    let subject = Coppice::default();
    let (mut tried, mut healed) = (0, 0);
    for made in [made(true), made(false)] {
        for region in sampled(regions(&device_of(made.image.clone())).unwrap(), samples, &mut random) {
            for (number, copy) in region.copies.iter().enumerate().filter(|_| region.copies.len() > 1) {
                for kind in DAMAGES {
                    let _limit = Limit::new();
                    let device = device_of(made.image.clone());
                    let what = format!("{kind:?} in copy {number} of {} at {copy:?}", region.name);
                    damage(&device, &made, copy, kind, &mut random);
                    let shown = show(&dynamic(&device), &made.tree).unwrap_or_else(|error| panic!("{what}: {error}"));
                    assert!(shown.is_whole(), "{what}: {:?} {:?}", shown.wrong, shown.errors);
                    healed += shown.counters["btree.node_read_repaired"];
                    let problems = subject.check(&device).unwrap_or_else(|error| panic!("{what}: {error}"));
                    // Whoever reads a node reads its first copy, and goes on to the next.
                    let is_healed = !problems.iter().any(|problem| problem.starts_with("node-copy"));
                    assert!(is_healed || number > 0, "{what}: {problems:?}");
                    // Once more, with nothing but what the first mount left.
                    let shown =
                        show(&dynamic(&device), &made.tree).unwrap_or_else(|error| panic!("{what}: then {error}"));
                    assert!(shown.is_whole(), "{what}: then {:?} {:?}", shown.wrong, shown.errors);
                    tried += 1;
                }
            }
        }
    }
    assert!(healed > 0);
    println!("{tried} damaged copies, {healed} nodes healed when they were read");
}

/// All copies damaged: an error that names it, or a state that loses nothing; never anything else.
#[test]
fn what_has_no_copy_left_is_an_error_that_names_it() {
    let samples = count("COPPICE_FAULTS_SAMPLES", 2) as usize;
    let mut random = Xoshiro256PlusPlus::seed_from_u64(seed_or(1));
    let (mut refused, mut partly, mut whole) = (0, 0, 0);
    for made in [made(true), made(false)] {
        for region in sampled(regions(&device_of(made.image.clone())).unwrap(), samples, &mut random) {
            for kind in DAMAGES {
                let _limit = Limit::new();
                let device = device_of(made.image.clone());
                let what = format!("{kind:?} in all copies of {} at {:?}", region.name, region.copies);
                let mut changed = true;
                for copy in &region.copies {
                    changed &= damage(&device, &made, copy, kind, &mut random);
                }
                match show(&dynamic(&device), &made.tree) {
                    Ok(shown) => {
                        assert_honest(&what, &shown);
                        if region.name == "data" {
                            assert!(
                                shown.errors.is_empty() || shown.errors.iter().all(|(_, offset, _)| offset.is_some()),
                                "{what}: {:?}",
                                shown.errors
                            );
                            assert!(!changed || !shown.errors.is_empty(), "{what}: nobody noticed");
                        }
                        *(if shown.errors.is_empty() { &mut whole } else { &mut partly }) += 1;
                    }
                    Err(error) => {
                        assert!(!matches!(error, Error::Bug(_)), "{what}: {error}");
                        assert!(region.name != "data", "{what}: {error}");
                        refused += 1;
                    }
                }
            }
        }
    }
    println!("all copies: {refused} refused, {partly} with errors, {whole} whole (older checkpoint, or not needed)");
    assert!(refused > 0 && partly > 0);
}

/// The nth read of the device fails, once.
#[test]
fn any_read_may_fail() {
    let stride = 3;
    let made = made(false);
    let mut tried = 0;
    for nth in (0..).step_by(stride) {
        let _limit = Limit::new();
        let device = device_of(made.image.clone());
        device.fail_read(nth, Errno::IO);
        let what = format!("read {nth}");
        match show(&dynamic(&device), &made.tree) {
            Ok(shown) => {
                assert_honest(&what, &shown);
                let reads =
                    shown.counters["device.metadata_read_submissions"] + shown.counters["device.data_read_submissions"];
                if nth > reads * 4 {
                    break;
                }
            }
            Err(error) => assert!(error.is_media_error(), "{what}: {error:?}"),
        }
        device.clear_faults();
        let shown = show(&dynamic(&device), &made.tree).unwrap_or_else(|error| panic!("{what}: afterwards {error}"));
        assert!(shown.is_whole(), "{what}: afterwards {:?} {:?}", shown.wrong, shown.errors);
        tried += 1;
    }
    println!("{tried} reads failed, one by one");
    assert!(tried > 20);
}

/// A write that the device acknowledges and does not do, or does elsewhere: one copy of metadata, or data.
fn with_one_bad_write(what: &str, plan: impl Fn(&SimDevice, u64)) {
    let mut tried = 0;
    let operations = operations();
    let mut model = Model::new(4096);
    operations.iter().for_each(|operation| model.begin(operation).unwrap());
    let tree = model.tree();
    let stride = (14 / count("COPPICE_FAULTS_SAMPLES", 2)).max(1);
    for nth in (seed_or(1) % stride..).step_by(stride as usize) {
        let _limit = Limit::new();
        let subject = Coppice::default();
        let device = device_of(Image::new(DEVICE_BYTES));
        subject.format(&device).unwrap();
        let mut mounted = subject.mount(&device, 1).unwrap();
        plan(&device, nth);
        let what = format!("{what} of write {nth}");
        for operation in &operations {
            if let Err(error) = mounted.perform(operation) {
                assert!(error.is_media_error(), "{what}: {operation:?}: {error:?}");
            }
        }
        let before = device.boundaries();
        if let Err(error) = mounted.unmount() {
            assert!(error.is_media_error(), "{what}: {error:?}");
        }
        match show(&dynamic(&device), &tree) {
            Ok(shown) => {
                assert_honest(&what, &shown);
                assert!(shown.errors.iter().all(|(_, offset, _)| offset.is_some()), "{what}: {:?}", shown.errors);
            }
            Err(error) => panic!("{what}: {error}"),
        }
        tried += 1;
        if nth > before {
            break;
        }
    }
    println!("{what}: {tried} writes");
}

#[test]
fn any_write_may_be_lost() {
    with_one_bad_write("loss", |device, nth| device.lose_write(nth));
}

#[test]
fn any_write_may_go_elsewhere() {
    with_one_bad_write("misdirection", |device, nth| {
        device.misdirect_write(nth, if nth % 2 == 0 { 64 << 10 } else { -4096 });
    });
}

/// Space is refused from the nth promise on, 64 times in a row (who is refused writes back and asks again): whoever meets that fails as
/// if nothing had been asked, and what was before is as it was.
#[test]
fn any_promise_of_space_may_be_refused() {
    let operations = operations();
    let stride = 16 / count("COPPICE_FAULTS_SAMPLES", 2).clamp(1, 16);
    let (mut tried, mut refusals) = (0, 0);
    for nth in (seed_or(1) % stride..).step_by(stride as usize) {
        let _limit = Limit::new();
        let first = nth as u32;
        let switches = TestSwitches { refuse_promises: Some((first, first + 63)), ..TestSwitches::default() };
        let refused = with_refusals(&Coppice { switches, ..Coppice::default() }, &operations);
        tried += 1;
        refusals += refused;
        if refused == 0 {
            break;
        }
    }
    println!("{tried} runs, {refusals} operations were refused");
    assert!(tried > 10);
}

/// How many operations were refused.
fn with_refusals(subject: &Coppice, operations: &[Operation]) -> usize {
    let what = format!("{:?}", subject.switches.refuse_promises);
    let device = device_of(Image::new(DEVICE_BYTES));
    subject.format(&device).unwrap();
    let mut mounted = subject.mount(&device, 1).unwrap();
    let mut model = Model::new(4096);
    let mut partly: BTreeSet<&str> = BTreeSet::new();
    let mut refused = 0;
    for operation in operations {
        let mut next = model.clone();
        let expected = next.begin(operation);
        match mounted.perform(operation) {
            Ok(()) => {
                expected.unwrap_or_else(|errno| panic!("{what}: {operation:?} should fail with {errno}"));
                model = next;
            }
            Err(Error::NoSpace(_)) => {
                refused += 1;
                if let Operation::Write { path, .. } = operation {
                    // As much of it as there was space for.
                    partly.insert(path);
                }
            }
            Err(error) => assert_eq!(expected, Err(error.errno()), "{what}: {operation:?}: {error}"),
        }
    }
    mounted.unmount().unwrap_or_else(|error| panic!("{what}: {error}"));
    let problems = subject.check(&device).unwrap_or_else(|error| panic!("{what}: {error}"));
    assert!(problems.is_empty(), "{what}: {problems:?}");
    let mut shown = show(&dynamic(&device), &model.tree()).unwrap_or_else(|error| panic!("{what}: {error}"));
    shown.wrong.retain(|wrong| !partly.iter().any(|path| wrong.starts_with(&format!("{path}: "))));
    assert!(shown.is_whole(), "{what}: {:?} {:?}", shown.wrong, shown.errors);
    refused
}
