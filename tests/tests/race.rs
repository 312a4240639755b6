//! Readers against punch, truncate, overwrite and reuse: see [`coppicefs_tests::race::library`]. Every combination of checksums and compression, and a build
//! whose add lock excludes nobody, which must fail within seconds.
//!
//! `COPPICE_RACE_SECONDS=n` races each combination for n seconds; `COPPICE_SEED=n` sets the seed.

use std::time::{Duration, Instant};

use coppicefs::options::CompressionChoice;
use coppicefs::space::TestSwitches;
use coppicefs_tests::crash::seed_or;
use coppicefs_tests::race::library::{RaceOptions, run};

fn duration() -> Duration {
    let seconds = std::env::var("COPPICE_RACE_SECONDS").ok().and_then(|seconds| seconds.parse().ok());
    seconds.map_or(Duration::from_millis(1500), Duration::from_secs)
}

fn options(checksums: bool, compression: CompressionChoice) -> RaceOptions {
    RaceOptions { duration: duration(), checksums, compression, switches: TestSwitches::default(), seed: seed_or(1) }
}

/// What no build may show, whatever the delays.
fn races_well(options: RaceOptions) {
    let report = run(options).unwrap_or_else(|wrong| panic!("{wrong}\n{options:?}"));
    println!("{options:?}: {report:?}");
    assert!(report.reads > 0 && report.changes > 0 && report.churned > 0, "hardly anything happened: {report:?}");
}

#[test]
fn every_stamp_is_explained() {
    for checksums in [true, false] {
        for compression in [CompressionChoice::None, CompressionChoice::Lz4] {
            races_well(options(checksums, compression));
        }
    }
}

/// The delays that make the broken builds fail are no harm to a whole one.
#[test]
fn every_stamp_is_explained_with_delays() {
    for pause_us in [300, 50_000] {
        let switches = TestSwitches { pause_us, ..TestSwitches::default() };
        races_well(RaceOptions { switches, ..options(false, CompressionChoice::None) });
    }
}

fn is_caught(what: &str, pause_us: u16, switches: TestSwitches) {
    let start = Instant::now();
    let limit = Duration::from_secs(150);
    for seed in 1.. {
        let options = RaceOptions {
            duration: Duration::from_secs(5),
            switches: TestSwitches { pause_us, ..switches },
            seed,
            ..options(false, CompressionChoice::None)
        };
        if let Err(wrong) = run(options) {
            println!("{what}: caught after {:.1} s: {wrong}", start.elapsed().as_secs_f64());
            return;
        }
        assert!(start.elapsed() < limit, "{what} was not noticed in {limit:?}");
    }
}

#[test]
fn an_add_lock_that_excludes_nobody_is_caught() {
    is_caught(
        "add_lock_excludes_nobody",
        300,
        TestSwitches { add_lock_excludes_nobody: true, ..TestSwitches::default() },
    );
}

#[test]
fn missing_references_on_buckets_are_caught() {
    is_caught("no_bucket_references", 50_000, TestSwitches { no_bucket_references: true, ..TestSwitches::default() });
}
