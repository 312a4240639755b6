//! The simulated device against a plain model, its crash plans, and each of its faults.

use std::collections::{BTreeSet, HashSet};

use proptest::prelude::*;
use rustix::io::Errno;

use super::*;

fn plain() -> SimOptions {
    SimOptions { shuffle_batches: false, discard_mode: DiscardMode::Zeros, ..SimOptions::default() }
}

fn sector(tag: u32) -> Vec<u8> {
    tag.to_le_bytes().repeat(SECTOR_BYTES as usize / 4)
}

fn run(tag: u32, sectors: usize) -> Vec<u8> {
    sector(tag).repeat(sectors)
}

/// Sector tags of an image whose sectors were all written by [`sector`]; mixed sectors fail.
fn tags(image: &Image) -> Vec<u32> {
    let bytes = image.to_bytes().unwrap();
    bytes
        .chunks(SECTOR_BYTES as usize)
        .map(|sector| {
            assert!(sector.chunks(4).all(|word| word == &sector[..4]), "a sector is torn inside");
            u32::from_le_bytes(sector[..4].try_into().unwrap())
        })
        .collect()
}

const SECTORS: usize = 16;

#[derive(Clone, Debug)]
enum Operation {
    Write(Vec<(usize, usize)>),
    Discard(usize, usize),
    Flush,
    Snapshot,
}

fn range() -> impl Strategy<Value = (usize, usize)> {
    (0..SECTORS, 1usize..5).prop_map(|(start, length)| (start, length.min(SECTORS - start)))
}

fn operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        6 => prop::collection::vec(range(), 1..4).prop_map(Operation::Write),
        1 => range().prop_map(|(start, length)| Operation::Discard(start, length)),
        2 => Just(Operation::Flush),
        1 => Just(Operation::Snapshot),
    ]
}

/// One unflushed write of the model: start, length, tag.
type ModelWrite = (usize, usize, u32);

fn apply(tags: &[u32], writes: impl IntoIterator<Item = ModelWrite>) -> Vec<u32> {
    let mut tags = tags.to_vec();
    for (start, length, tag) in writes {
        tags[start..start + length].fill(tag);
    }
    tags
}

fn check_snapshot(snapshot: &Snapshot, durable: &[u32], unflushed: &[ModelWrite]) {
    assert_eq!(snapshot.unflushed().len(), unflushed.len());
    assert_eq!(tags(&snapshot.crash(&CrashPlan::default())), durable);
    assert_eq!(tags(&snapshot.everything()), apply(durable, unflushed.iter().copied()));
    // Whole writes in order: exactly the subsets, all of them if they are few.
    let options = PlanOptions { torn: false, reordered: false, samples: 8, ..PlanOptions::default() };
    let mut seen = BTreeSet::new();
    for plan in snapshot.plans(&options) {
        let expected = apply(durable, plan.survivors.iter().map(|survivor| unflushed[survivor.write]));
        assert_eq!(tags(&snapshot.crash(&plan)), expected, "{plan:?}");
        seen.insert(expected);
    }
    if unflushed.len() <= 6 {
        let all: BTreeSet<_> = (0..1usize << unflushed.len())
            .map(|subset| {
                let kept = unflushed.iter().enumerate().filter(|(index, _)| subset >> index & 1 == 1);
                apply(durable, kept.map(|(_, &write)| write))
            })
            .collect();
        assert_eq!(seen, all);
    }
    // Torn and in any order: each sector holds what was durable or what one of the writes put there.
    for plan in snapshot.plans(&PlanOptions { samples: 8, ..PlanOptions::default() }) {
        for (index, tag) in tags(&snapshot.crash(&plan)).into_iter().enumerate() {
            let by_write = |&(start, length, put): &ModelWrite| (start..start + length).contains(&index) && put == tag;
            assert!(tag == durable[index] || unflushed.iter().any(by_write), "sector {index} by {plan:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    #[test]
    fn the_device_is_its_model(operations in prop::collection::vec(operation(), 1..24)) {
        let device = SimDevice::new(SECTORS as u64 * SECTOR_BYTES, plain());
        let mut durable = vec![0u32; SECTORS];
        let mut unflushed: Vec<ModelWrite> = Vec::new();
        let mut tag = 0;
        let mut kept = Vec::new();
        for operation in operations {
            match operation {
                Operation::Write(ranges) => {
                    let mut buffers = Vec::new();
                    for (start, length) in ranges {
                        tag += 1;
                        unflushed.push((start, length, tag));
                        buffers.push((start as u64 * SECTOR_BYTES, run(tag, length)));
                    }
                    let requests: Vec<_> = buffers
                        .iter()
                        .map(|(offset, data)| WriteRequest { offset: *offset, data: data.chunks(700).collect() })
                        .collect();
                    device.write_batch(&requests).unwrap();
                }
                Operation::Discard(start, length) => {
                    unflushed.push((start, length, 0));
                    device.discard(start as u64 * SECTOR_BYTES, length as u64 * SECTOR_BYTES).unwrap();
                }
                Operation::Flush => {
                    durable = apply(&durable, unflushed.drain(..));
                    device.flush().unwrap();
                }
                Operation::Snapshot => kept.push((device.snapshot(), durable.clone(), unflushed.clone())),
            }
            let mut read = vec![0; SECTORS * SECTOR_BYTES as usize];
            device.read(0, &mut read).unwrap();
            prop_assert_eq!(tags(&Image::from_bytes(&read)), apply(&durable, unflushed.iter().copied()));
            prop_assert_eq!(device.unflushed_count(), unflushed.len());
        }
        kept.push((device.snapshot(), durable, unflushed));
        // Snapshots are not disturbed by what happened after them.
        for (snapshot, durable, unflushed) in &kept {
            check_snapshot(snapshot, durable, unflushed);
        }
    }
}

#[test]
fn one_seed_is_one_history() {
    let history = |seed| {
        let options = SimOptions { seed, ..SimOptions::default() };
        let device = SimDevice::new(1 << 20, options);
        let buffers: Vec<_> = (0..8).map(|index| run(index + 1, 4)).collect();
        let requests: Vec<_> = (0u64..)
            .zip(&buffers)
            .map(|(index, buffer)| WriteRequest { offset: index * 1024, data: vec![buffer] })
            .collect();
        device.write_batch(&requests).unwrap();
        device.discard(0, 1 << 16).unwrap();
        let snapshot = device.snapshot();
        let hashes: Vec<u64> =
            snapshot.plans(&PlanOptions::default()).map(|plan| snapshot.crash(&plan).content_hash()).collect();
        hashes
    };
    assert_eq!(history(1), history(1));
    assert_ne!(history(1), history(2));
}

#[test]
fn every_boundary_of_a_run_can_be_crashed_afterwards() {
    let device = SimDevice::new(1 << 20, plain());
    let seen = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&seen);
    device.set_hook(move |device, boundary| log.lock().push((boundary, device.snapshot())));
    let (one, two) = (sector(1), sector(2));
    device
        .write_batch(&[WriteRequest { offset: 0, data: vec![&one] }, WriteRequest { offset: 512, data: vec![&two] }])
        .unwrap();
    device.flush().unwrap();
    device.write(0, &two).unwrap();
    let seen = seen.lock();
    let counts: Vec<_> = seen.iter().map(|(boundary, snapshot)| (boundary.kind, snapshot.unflushed().len())).collect();
    assert_eq!(
        counts,
        [
            (BoundaryKind::Write { offset: 0, length: 512, batch_done: 0 }, 0),
            (BoundaryKind::Write { offset: 512, length: 512, batch_done: 1 }, 1),
            (BoundaryKind::Flush, 2),
            (BoundaryKind::Write { offset: 0, length: 512, batch_done: 0 }, 0),
        ]
    );
    assert!(seen.iter().enumerate().all(|(index, (boundary, _))| boundary.number == index as u64));
    // Before the flush both may be missing, after it neither.
    let states: HashSet<Vec<u32>> =
        seen[2].1.plans(&PlanOptions::default()).map(|plan| tags(&seen[2].1.crash(&plan))[..2].to_vec()).collect();
    assert_eq!(states, HashSet::from([vec![0, 0], vec![1, 0], vec![0, 2], vec![1, 2]]));
    assert_eq!(tags(seen[3].1.durable())[..2], [1, 2]);
}

#[test]
fn overlapping_writes_reach_the_medium_in_both_orders() {
    let device = SimDevice::new(4096, plain());
    for tag in 1..=2 {
        device.write(0, &sector(tag)).unwrap();
    }
    let snapshot = device.snapshot();
    let finals = |reordered| -> BTreeSet<u32> {
        let options = PlanOptions { reordered, ..PlanOptions::default() };
        snapshot
            .plans(&options)
            .filter(|plan| plan.survivors.len() == 2)
            .map(|p| tags(&snapshot.crash(&p))[0])
            .collect()
    };
    assert_eq!(finals(true), BTreeSet::from([1, 2]));
    assert_eq!(finals(false), BTreeSet::from([2]));
}

#[test]
fn a_write_tears_into_any_mix_of_its_sectors() {
    let device = SimDevice::new(4096, plain());
    device.write(0, &run(7, 4)).unwrap();
    let snapshot = device.snapshot();
    let states: BTreeSet<Vec<u32>> =
        (0..4000).map(|seed| tags(&snapshot.crash(&snapshot.random_plan(seed)))[..4].to_vec()).collect();
    assert_eq!(states.len(), 16, "{states:?}");
}

#[test]
fn many_writes_give_the_telling_plans_and_no_more_than_asked() {
    let device = SimDevice::new(1 << 20, plain());
    for index in 0..40 {
        device.write(index * 512, &sector(index as u32 + 1)).unwrap();
    }
    let snapshot = device.snapshot();
    let plans: Vec<CrashPlan> = snapshot.plans(&PlanOptions::default()).collect();
    for index in 0..40 {
        assert!(plans.contains(&CrashPlan::keeping((0..40).filter(|&write| write != index))));
        assert!(plans.contains(&CrashPlan::keeping([index])));
        assert!(plans.contains(&CrashPlan::keeping(0..=index)));
    }
    assert_eq!(plans[0], CrashPlan::default());
    assert_eq!(plans[1], CrashPlan::keeping(0..40));
    let few: Vec<_> = snapshot.plans(&PlanOptions { limit: Some(10), ..PlanOptions::default() }).collect();
    assert_eq!(few.len(), 10);
    assert_eq!(few[..2], plans[..2]);
}

#[test]
fn a_discard_is_undone_by_a_crash_and_leaves_garbage_else() {
    let options = SimOptions { discard_mode: DiscardMode::Garbage, ..SimOptions::default() };
    let device = SimDevice::new(1 << 20, options);
    device.write(0, &run(9, 16)).unwrap();
    device.flush().unwrap();
    device.discard(0, 4096).unwrap();
    let mut read = vec![0; 8192];
    device.read(0, &mut read).unwrap();
    assert_eq!(read[4096..], run(9, 8));
    assert_ne!(read[..512], sector(9));
    assert_ne!(read[..512], sector(0));
    let snapshot = device.snapshot();
    assert_eq!(tags(&snapshot.crash(&CrashPlan::default()))[..16], [9; 16]);
    device.flush().unwrap();
    let mut durable = vec![0; 8192];
    device.snapshot().durable().read(0, &mut durable);
    assert_eq!(durable, read);
}

#[test]
fn planned_failures_hit_the_nth_call() {
    let device = SimDevice::new(1 << 20, plain());
    device.fail_read(1, Errno::IO);
    device.fail_write(1, Errno::NOSPC);
    device.fail_flush(1, Errno::IO);
    let mut buffer = [0; 512];
    device.read(0, &mut buffer).unwrap();
    assert_eq!(device.read(0, &mut buffer).unwrap_err().errno(), Errno::IO);
    device.read(0, &mut buffer).unwrap();
    device.write(0, &sector(1)).unwrap();
    device.flush().unwrap();
    match device.write(512, &run(2, 4)).unwrap_err() {
        Error::Device { source, .. } => assert_eq!(source.raw_os_error(), Some(Errno::NOSPC.raw_os_error())),
        other => panic!("{other}"),
    }
    assert!(device.flush().is_err());
    // As hosts do: after a failed flush the next succeeds and proves nothing.
    device.write(0, &sector(3)).unwrap();
    device.flush().unwrap();
    assert_eq!(tags(device.snapshot().durable())[0], 1);
}

#[test]
fn a_failed_batch_is_stored_in_part() {
    let mut outcomes = BTreeSet::new();
    for seed in 0..64 {
        let device = SimDevice::new(1 << 20, SimOptions { seed, ..SimOptions::default() });
        device.fail_write(1, Errno::IO);
        let buffers: Vec<_> = (1..=3).map(|tag| run(tag, 2)).collect();
        let requests: Vec<_> = (0u64..)
            .zip(&buffers)
            .map(|(index, data)| WriteRequest { offset: index * 1024, data: vec![data] })
            .collect();
        assert!(device.write_batch(&requests).is_err());
        outcomes.insert(tags(&device.image())[..6].to_vec());
    }
    assert!(outcomes.len() > 8, "{outcomes:?}");
}

#[test]
fn bad_and_stale_sectors_last_until_they_are_written() {
    let device = SimDevice::new(1 << 20, plain());
    device.write(0, &run(1, 4)).unwrap();
    let older = device.image();
    device.write(0, &run(2, 4)).unwrap();
    device.make_stale(512, 1024, &older);
    device.make_bad(4096, 1024);
    let mut read = vec![0; 2048];
    device.read(0, &mut read).unwrap();
    assert_eq!(tags(&Image::from_bytes(&read)), [2, 1, 1, 2]);
    device.write(512, &sector(3)).unwrap();
    device.read(0, &mut read).unwrap();
    assert_eq!(tags(&Image::from_bytes(&read)), [2, 3, 1, 2]);
    assert!(device.read(4096, &mut read).is_err());
    assert!(device.read(4608, &mut read[..512]).is_err());
    device.write(4096, &sector(4)).unwrap();
    device.read(4096, &mut read[..512]).unwrap();
    assert!(device.read(4608, &mut read[..512]).is_err());
    device.clear_faults();
    device.read(4608, &mut read[..512]).unwrap();
}

#[test]
fn lost_and_misdirected_writes_are_acknowledged() {
    let device = SimDevice::new(1 << 20, plain());
    device.lose_write(0);
    device.misdirect_write(1, 1024);
    device.misdirect_write(2, -4096);
    for tag in 1..=3 {
        device.write(0, &sector(tag)).unwrap();
    }
    assert_eq!(tags(&device.image())[..3], [0, 0, 2]);
}

#[test]
fn a_lying_flush_makes_nothing_durable() {
    let device = SimDevice::new(1 << 20, plain());
    device.lie_about_flush(true);
    device.write(0, &sector(1)).unwrap();
    device.flush().unwrap();
    assert_eq!(tags(device.snapshot().durable())[0], 0);
    device.lie_about_flush(false);
    device.flush().unwrap();
    assert_eq!(tags(device.snapshot().durable())[0], 1);
}

#[test]
fn rot_is_durable_and_seen_at_once() {
    let device = SimDevice::new(1 << 20, plain());
    device.write(0, &run(5, 2)).unwrap();
    device.flush().unwrap();
    device.flip_bit(1, 0);
    device.zero_sectors(512, 512);
    let mut expected = run(5, 2);
    expected[1] ^= 1;
    expected[512..].fill(0);
    let mut read = vec![0; 1024];
    device.read(0, &mut read).unwrap();
    assert_eq!(read, expected);
    device.snapshot().durable().read(0, &mut read);
    assert_eq!(read, expected);
}

#[test]
fn after_the_power_is_off_nothing_works_and_nothing_changes() {
    let device = SimDevice::new(1 << 20, plain());
    device.power_off_at(2);
    device.write(0, &sector(1)).unwrap();
    device.flush().unwrap();
    assert!(device.write(0, &sector(2)).is_err());
    assert!(device.flush().is_err());
    assert!(device.discard(0, 512).is_err());
    assert!(device.read(0, &mut [0; 512]).is_err());
    let again = SimDevice::from_image(device.crash(&CrashPlan::keeping(0..device.unflushed_count())), plain());
    let mut read = [0; 512];
    again.read(0, &mut read).unwrap();
    assert_eq!(&read[..], &sector(1)[..]);
}

#[test]
fn after_a_kill_reads_see_what_a_power_cut_may_still_undo() {
    let device = SimDevice::new(64 << 10, SimOptions::default());
    device.write(0, &[1; 512]).unwrap();
    device.flush().unwrap();
    device.write(0, &[2; 512]).unwrap();
    let again = SimDevice::from_snapshot(&device.snapshot(), SimOptions::default());
    let mut bytes = [0; 512];
    again.read(0, &mut bytes).unwrap();
    assert_eq!(bytes, [2; 512]);
    again.crash(&CrashPlan::default()).read(0, &mut bytes);
    assert_eq!(bytes, [1; 512]);
    again.write(512, &[3; 512]).unwrap();
    assert_eq!(again.snapshot().unflushed()[1].number(), 2);
    again.flush().unwrap();
    again.crash(&CrashPlan::default()).read(0, &mut bytes);
    assert_eq!(bytes, [2; 512]);
}

#[test]
fn a_lost_write_leaves_what_was_there_without_it() {
    let device = SimDevice::new(64 << 10, SimOptions::default());
    let before = device.image();
    let mut history = Vec::new();
    for (offset, fill) in [(0, 1), (512, 2), (0, 3), (1024, 4)] {
        device.write(offset, &[fill; 1024]).unwrap();
        history.extend(device.snapshot().unflushed().to_vec());
        device.flush().unwrap();
    }
    device.write(2048, &[5; 512]).unwrap();
    let sectors = |lost: &[usize], plan: &CrashPlan| {
        let image = device.snapshot().crash_without(plan, &before, &history, lost);
        (0..5).map(|sector| image.to_bytes().unwrap()[sector * 512]).collect::<Vec<u8>>()
    };
    let (all, none) = (CrashPlan::keeping([0]), CrashPlan::default());
    assert_eq!(sectors(&[], &all), [3, 3, 4, 4, 5]);
    assert_eq!(sectors(&[2], &none), [1, 2, 4, 4, 0]);
    assert_eq!(sectors(&[1, 2, 3], &all), [1, 1, 0, 0, 5]);
    assert_eq!(sectors(&[0], &none), [3, 3, 4, 4, 0]);
    assert!(!history[0].is_copy_of(&history[1]) && history[0].is_copy_of(&history[0]));
}
