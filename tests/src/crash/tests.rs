//! The harness passes a correct filesystem and catches broken ones.

use super::toy::{Bug, Toy};
use super::*;
use crate::workloads;

fn options() -> CrashOptions {
    CrashOptions { seed: seed_or(1), device_bytes: 4 << 20, ..CrashOptions::default() }
}

#[test]
fn a_correct_filesystem_passes_every_workload() {
    let mut total = Report::default();
    for (name, workload) in workloads::all() {
        let report = run(&Toy(Bug::None), &workload, &options()).unwrap_or_else(|failure| panic!("{name}: {failure}"));
        println!("{name}: {report:?}");
        assert!(report.boundaries > 10 && report.images > 10, "{name}: {report:?}");
        total.crashes += report.crashes;
        total.recovery_crashes += report.recovery_crashes;
    }
    assert!(total.recovery_crashes > 500, "{total:?}");
}

#[test]
fn a_correct_filesystem_passes_random_workloads() {
    let first = seed_or(1);
    for seed in first..first + 4 {
        let workload = workloads::random(seed, 60);
        let options = CrashOptions { seed, ..options() };
        run(&Toy(Bug::None), &workload, &options).unwrap_or_else(|failure| panic!("{failure}\n{workload:#?}"));
    }
}

#[test]
fn every_broken_filesystem_is_caught() {
    for bug in [
        Bug::NoFlush,
        Bug::FlushFirst,
        Bug::NoChecksum,
        Bug::SkipBadRecords,
        Bug::RewriteAtMount,
        Bug::CheckWrites,
        Bug::LoseUnlinks,
    ] {
        let caught = workloads::all().into_iter().any(|(_, workload)| match run(&Toy(bug), &workload, &options()) {
            Ok(_) => false,
            Err(failure) => {
                let text = failure.to_string();
                assert!(text.contains("again: coppice-crash --seed 1 --device-bytes 4194304"), "{text}");
                forget_image(&failure);
                let cut = failure.cut.as_ref();
                // The same cut alone shows the same.
                let again = cut.map(|cut| replay(&Toy(bug), &workload, &options(), cut).unwrap_err());
                let again = again.inspect(|again| forget_image(again)).map(|again| again.problem);
                assert_eq!(again, cut.map(|_| failure.problem.clone()), "{bug:?}");
                true
            }
        });
        assert!(caught, "{bug:?} was not noticed");
    }
}

#[test]
fn a_wrong_answer_is_a_failure_without_any_crash() {
    struct NeverFails;
    struct Inner;
    impl Mounted for Inner {
        fn perform(&mut self, _: &Operation) -> Result<(), coppicefs::Error> {
            Ok(())
        }
        fn tree(&mut self) -> Result<Tree, coppicefs::Error> {
            Ok(Tree::new())
        }
        fn unmount(self: Box<Self>) -> Result<(), coppicefs::Error> {
            Ok(())
        }
    }
    impl Subject for NeverFails {
        fn format(&self, _: &Arc<SimDevice>) -> Result<(), coppicefs::Error> {
            Ok(())
        }
        fn mount(&self, _: &Arc<SimDevice>, _: u64) -> Result<Box<dyn Mounted>, coppicefs::Error> {
            Ok(Box::new(Inner))
        }
        fn check(&self, _: &Arc<SimDevice>) -> Result<Vec<String>, coppicefs::Error> {
            Ok(Vec::new())
        }
    }
    let workload = [Operation::Unlink { path: "/missing".into() }];
    let failure = run(&NeverFails, &workload, &options()).unwrap_err();
    assert!(failure.problem.contains("should have answered"), "{failure}");
}

#[test]
fn a_failing_workload_is_made_small() {
    let (subject, options) = (Toy(Bug::LoseUnlinks), CrashOptions { during_recovery: 0, ..options() });
    let workload = workloads::random(3, 80);
    let failure = run(&subject, &workload, &options).unwrap_err();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    let (small, failure) = shrink::shrink(&subject, &workload, failure, &options, deadline);
    forget_image(&failure);
    // Something must be there to be unlinked, and the unlink must be synced or seen.
    assert!(small.len() <= 4, "{small:#?}");
    assert!(small.iter().any(|operation| matches!(operation, Operation::Unlink { .. })), "{small:#?}");
    assert!(run(&subject, &small, &options).inspect_err(|failure| forget_image(failure)).is_err());
}

#[test]
fn one_seed_is_one_run() {
    let workload = workloads::random(5, 40);
    let options = CrashOptions { threads: 1, ..options() };
    assert_eq!(run(&Toy(Bug::None), &workload, &options).unwrap(), run(&Toy(Bug::None), &workload, &options).unwrap());
}
