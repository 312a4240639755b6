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
                assert!(text.contains("COPPICE_SEED="), "{text}");
                if let Some(image) = &failure.image {
                    std::fs::remove_file(image).unwrap();
                }
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
fn one_seed_is_one_run() {
    let workload = workloads::random(5, 40);
    let options = CrashOptions { threads: 1, ..options() };
    assert_eq!(run(&Toy(Bug::None), &workload, &options).unwrap(), run(&Toy(Bug::None), &workload, &options).unwrap());
}
