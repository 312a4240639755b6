//! Power cuts at every boundary of the fixed workloads, against the whole filesystem.

use coppicefs_tests::crash::{CrashOptions, Report, run, seed_or};
use coppicefs_tests::filesystem_subject::Coppice;
use coppicefs_tests::workloads;

fn options() -> CrashOptions {
    let mut options = CrashOptions { seed: seed_or(1), device_bytes: 16 << 20, ..CrashOptions::default() };
    options.plans.limit = Some(6);
    options
}

fn workload(name: &str) {
    let (_, operations) = workloads::all().into_iter().find(|(found, _)| *found == name).expect("a workload");
    let start = std::time::Instant::now();
    let report: Report =
        run(&Coppice::default(), &operations, &options()).unwrap_or_else(|failure| panic!("{name}: {failure}"));
    println!("{name}: {report:?} in {:?}", start.elapsed());
}

#[test]
fn create_write_fsync() {
    workload("create, write, fsync");
}
#[test]
fn rename_over() {
    workload("rename over");
}
#[test]
fn append() {
    workload("append");
}
#[test]
fn unlink() {
    workload("unlink");
}
#[test]
fn directory_tree() {
    workload("directory tree");
}
#[test]
fn truncate() {
    workload("truncate");
}
#[test]
fn overwrite() {
    workload("overwrite");
}
#[test]
fn checkpoint_in_the_middle() {
    workload("checkpoint in the middle");
}
#[test]
fn attributes_and_links() {
    workload("attributes and links");
}
#[test]
fn exchange() {
    workload("exchange");
}
