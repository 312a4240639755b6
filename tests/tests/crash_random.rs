//! Power cuts at every boundary of random workloads, against the whole filesystem. COPPICE_SEED is the first seed, COPPICE_ROUNDS the number of
//! workloads.

use coppicefs_tests::crash::{CrashOptions, run, seed_or};
use coppicefs_tests::filesystem_subject::Coppice;
use coppicefs_tests::workloads;

/// Operations of one workload.
const OPERATIONS: usize = 50;

#[test]
fn random_workloads_survive_power_cuts_everywhere() {
    let first = seed_or(1);
    let rounds = std::env::var("COPPICE_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(4);
    for seed in first..first + rounds {
        let workload = workloads::random(seed, OPERATIONS);
        let mut options = CrashOptions { seed, device_bytes: 16 << 20, ..CrashOptions::default() };
        options.plans.limit = Some(24);
        let report = run(&Coppice::default(), &workload, &options);
        let report = report.unwrap_or_else(|failure| panic!("{failure}\n{workload:#?}"));
        println!("seed {seed}: {report:?}");
        assert!(report.images > 10, "{report:?}");
    }
}
