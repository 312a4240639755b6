//! `coppice-crash`: the crash simulator as a program. See `--help`.

mod arguments;

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;
use coppicefs::{complain, output, say};
use coppicefs_tests::crash::{CrashOptions, Failure, Report, image_after, replay, run, shrink};
use coppicefs_tests::filesystem_subject::{BROKEN_BUILDS, Coppice};
use coppicefs_tests::operation::Operation;
use coppicefs_tests::workloads;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use crate::arguments::{Arguments, Named};

/// As the programs do.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

const EXIT_FAILED: u8 = 1;
const EXIT_OPERATIONAL: u8 = 3;

fn main() -> ExitCode {
    let code = match Arguments::try_parse() {
        Ok(arguments) => perform(&arguments).map_or_else(failed, |held| if held { 0 } else { EXIT_FAILED }),
        Err(error) if error.use_stderr() => error.exit(),
        // Help and version.
        Err(error) => {
            output::keep(error.print());
            0
        }
    };
    output::end("coppice-crash", ExitCode::from(code), EXIT_OPERATIONAL)
}

fn failed(error: anyhow::Error) -> u8 {
    complain!("coppice-crash: {error:#}");
    EXIT_OPERATIONAL
}

/// Whether everything held.
fn perform(arguments: &Arguments) -> Result<bool> {
    if arguments.list {
        list();
        return Ok(true);
    }
    let subject = arguments.subject()?;
    let chosen = arguments.chosen()?;
    match arguments.only_cut() {
        Some(cut) => {
            let [workload] = chosen.as_slice() else {
                anyhow::bail!("--cut is for one workload: name it by --workload")
            };
            let options = arguments.options(workload, 1);
            if let Some(path) = &arguments.image {
                let image = match image_after(&subject, &workload.operations, &options, &cut) {
                    Ok(image) => image,
                    Err(failure) => anyhow::bail!("{failure}"),
                };
                image.to_file(path)?;
                say!("{}: what is on the medium then; fsck-coppice and mount-coppice take it", path.display());
                return Ok(true);
            }
            let outcome = replay(&subject, &workload.operations, &options, &cut);
            match outcome {
                Ok(()) if arguments.json => say!("{}", json!({ "failures": [] })),
                Ok(()) => say!("{}: what this end leaves is as it should be", workload.name),
                Err(failure) if arguments.json => {
                    say!("{}", json!({ "failures": [described(workload, &failure, None)] }));
                    return Ok(false);
                }
                Err(failure) => {
                    say!("{}: {failure}", workload.name);
                    return Ok(false);
                }
            }
            Ok(true)
        }
        None => run_all(arguments, &subject, &chosen),
    }
}

fn list() {
    for (name, operations) in workloads::fixed() {
        say!("{name}  ({} operations)", operations.len());
    }
    say!("random:SEED:OPERATIONS");
    say!("full:SEED:OPERATIONS  (fills the device)");
    say!("\nbuilds that are broken on purpose, each with a command that shows it:");
    for (name, words) in BROKEN_BUILDS {
        say!("coppice-crash --switch {name} {words}");
    }
    say!("--switch reuse-first breaks nothing: buckets that were used are used again before others");
}

/// What came of a workload.
struct Outcome {
    report: Report,
    failure: Option<Box<Failure>>,
    seconds: f64,
}

fn run_all(arguments: &Arguments, subject: &Coppice, chosen: &[Named]) -> Result<bool> {
    let start = Instant::now();
    let jobs = arguments.jobs.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from)).max(1);
    // Many workloads side by side, or the images of one: nothing waits for a part that is done by one thread.
    let (side_by_side, threads) = if chosen.len() > jobs { (jobs, 1) } else { (1, jobs) };
    let outcomes: Vec<Mutex<Option<Outcome>>> = chosen.iter().map(|_| Mutex::default()).collect();
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let bar = progress(arguments, chosen.len());
    std::thread::scope(|scope| {
        for _ in 0..side_by_side {
            scope.spawn(|| {
                while arguments.keep_going || !failed.load(Ordering::Relaxed) {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let (Some(workload), Some(place)) = (chosen.get(index), outcomes.get(index)) else { return };
                    let outcome = run_one(subject, workload, &arguments.options(workload, threads));
                    failed.fetch_or(outcome.failure.is_some(), Ordering::Relaxed);
                    if !arguments.json {
                        bar.suspend(|| say!("{}", line(workload, &outcome)));
                    }
                    bar.inc(1);
                    *place.lock().unwrap_or_else(PoisonError::into_inner) = Some(outcome);
                }
            });
        }
    });
    bar.finish_and_clear();
    let done = chosen.iter().zip(outcomes);
    let done: Vec<(&Named, Outcome)> = done
        .filter_map(|(workload, outcome)| {
            outcome.into_inner().unwrap_or_else(PoisonError::into_inner).map(|outcome| (workload, outcome))
        })
        .collect();
    let mut total = Report::default();
    done.iter().for_each(|(_, outcome)| total.add(&outcome.report));
    let mut failures = Vec::new();
    for (workload, outcome) in &done {
        let Some(failure) = &outcome.failure else { continue };
        let shrunk = shrunk(arguments, subject, workload, failure)?;
        if !arguments.json {
            print_failure(workload, failure, shrunk.as_ref());
        }
        failures.push(described(workload, failure, shrunk.as_ref()));
    }
    let held = failures.is_empty();
    let seconds = start.elapsed().as_secs_f64();
    if arguments.json {
        let workloads: Vec<Value> = done
            .iter()
            .map(|(workload, outcome)| {
                let mut value = counts(&outcome.report, outcome.seconds);
                value["name"] = json!(workload.name);
                value["held"] = json!(outcome.failure.is_none());
                value
            })
            .collect();
        let all = json!({ "workloads": workloads, "total": counts(&total, seconds), "failures": failures });
        say!("{}", serde_json::to_string_pretty(&all)?);
    } else {
        say!("{} of {} workloads: {}", done.len(), chosen.len(), summary(&total, seconds));
        say!("{}", if held { "everything held" } else { "something did not hold" });
    }
    Ok(held)
}

fn progress(arguments: &Arguments, length: usize) -> ProgressBar {
    if arguments.quiet || arguments.json {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(length as u64);
    if let Ok(style) = ProgressStyle::with_template("{bar:30} workload {pos}/{len} [{elapsed}, {eta} left]") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_secs(1));
    bar
}

fn run_one(subject: &Coppice, workload: &Named, options: &CrashOptions) -> Outcome {
    let start = Instant::now();
    let (report, failure) = match run(subject, &workload.operations, options) {
        Ok(report) => (report, None),
        Err(failure) => (Report::default(), Some(failure)),
    };
    Outcome { report, failure, seconds: start.elapsed().as_secs_f64() }
}

fn summary(report: &Report, seconds: f64) -> String {
    let mut more = String::new();
    for (count, what) in [
        (report.refused, "refused as they may be"),
        (report.lacked_space, "operations without space"),
        (report.faults, "runs whose device failed"),
    ] {
        if count > 0 {
            more += &format!(", {count} {what}");
        }
    }
    format!(
        "{} boundaries; {} crash states ({} cuts, {} cuts during recovery, {} kills, {} with a lost write), {} images recovered, {} not tried again{more}; {seconds:.1} s",
        report.boundaries,
        report.states(),
        report.crashes,
        report.recovery_crashes,
        report.kills,
        report.lost,
        report.recovered(),
        report.states().saturating_sub(report.recovered()),
    )
}

fn line(workload: &Named, outcome: &Outcome) -> String {
    match &outcome.failure {
        None => format!("{}: {}", workload.name, summary(&outcome.report, outcome.seconds)),
        Some(_) => format!("{}: FAILED after {:.1} s", workload.name, outcome.seconds),
    }
}

fn counts(report: &Report, seconds: f64) -> Value {
    json!({
        "boundaries": report.boundaries,
        "crash_states": report.states(),
        "cuts": report.crashes,
        "cuts_during_recovery": report.recovery_crashes,
        "kills": report.kills,
        "lost_writes": report.lost,
        "images_recovered": report.recovered(),
        "refused": report.refused,
        "operations_without_space": report.lacked_space,
        "device_failures": report.faults,
        "deduplicated": report.states().saturating_sub(report.recovered()),
        "seconds": seconds,
    })
}

/// A workload that was made smaller, where it can be read from, and how it fails.
struct Shrunk {
    operations: Vec<Operation>,
    command: String,
}

fn shrunk(arguments: &Arguments, subject: &Coppice, workload: &Named, failure: &Failure) -> Result<Option<Shrunk>> {
    if arguments.shrink == 0 {
        return Ok(None);
    }
    let mut options = arguments.options(workload, arguments.jobs.unwrap_or(1));
    options.plans.limit = Some(options.plans.limit.unwrap_or(64).min(64));
    let deadline = Instant::now() + Duration::from_secs(arguments.shrink);
    let first = Box::new(Failure { image: None, ..failure.clone() });
    let (operations, _) = shrink::shrink(subject, &workload.operations, first, &options, deadline);
    if operations.len() == workload.operations.len() {
        return Ok(None);
    }
    let folder = std::env::temp_dir().join("coppice-crash");
    std::fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    let name: String =
        workload.name.chars().map(|letter| if letter.is_alphanumeric() { letter } else { '-' }).collect();
    let path = folder.join(format!("shrunk-{name}-{}.json", options.seed));
    std::fs::write(&path, serde_json::to_vec_pretty(&operations)?)
        .with_context(|| format!("writing {}", path.display()))?;
    options.again = format!("coppice-crash --workload '@{}'", path.display());
    // Once more under its own name: the failure then says what to type.
    match run(subject, &operations, &options) {
        Err(failure) => Ok(Some(Shrunk { operations, command: failure.command() })),
        Ok(_) => Ok(None),
    }
}

fn described(workload: &Named, failure: &Failure, shrunk: Option<&Shrunk>) -> Value {
    json!({
        "workload": workload.name,
        "problem": failure.problem,
        "operation": failure.operation,
        "command": failure.command(),
        "image": failure.image,
        "shrunk": shrunk.map(|shrunk| &shrunk.operations),
        "shrunk_command": shrunk.map(|shrunk| &shrunk.command),
    })
}

fn print_failure(workload: &Named, failure: &Failure, shrunk: Option<&Shrunk>) {
    say!("\n{}: {failure}", workload.name);
    if let Some(shrunk) = shrunk {
        say!("  {} operations are enough:", shrunk.operations.len());
        for operation in &shrunk.operations {
            say!("    {operation:?}");
        }
        say!("  again: {}", shrunk.command);
    }
}
