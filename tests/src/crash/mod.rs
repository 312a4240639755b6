//! Power cuts everywhere: [`run`] performs a workload on a [`SimDevice`] once, keeps a snapshot at each boundary (before each write, flush
//! and discard) together with the oracle's state at that moment, and then opens what a power cut could have left at each.
//!
//! For each image: the checker (`fsck -n`) finds nothing on it as it is; it mounts; what is shown is allowed by the [`Model`]; it unmounts; the
//! checker finds nothing again, and a second mount shows the same. Where asked, power is cut during that mount as well. Images that
//! were seen before are not opened again, only held against the newer oracle.
//!
//! Everything is decided by the seed: the same seed gives the same run. A [`Failure`] says what to type to see it again, and keeps the image.

#[cfg(test)]
mod tests;
#[cfg(test)]
mod toy;

use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use coppicefs::device::{CrashPlan, DiscardMode, Image, PlanOptions, SimDevice, SimOptions, Snapshot};

use crate::model::Model;
use crate::operation::Operation;
use crate::tree::Tree;

/// A filesystem under test, mounted.
pub trait Mounted {
    /// Performs an operation. The outer error ends the run; the inner one is the filesystem's answer.
    ///
    /// # Errors
    /// What the operation fails with.
    fn perform(&mut self, operation: &Operation) -> Result<(), coppicefs::Error>;

    /// Everything that it shows.
    ///
    /// # Errors
    /// What reading it fails with.
    fn tree(&mut self) -> Result<Tree, coppicefs::Error>;

    /// Ends it cleanly.
    ///
    /// # Errors
    /// What that fails with.
    fn unmount(self: Box<Self>) -> Result<(), coppicefs::Error>;
}

/// A filesystem under test.
pub trait Subject: Sync {
    /// Makes an empty filesystem.
    ///
    /// # Errors
    /// What that fails with.
    fn format(&self, device: &Arc<SimDevice>) -> Result<(), coppicefs::Error>;

    /// Mounts, with recovery. `seed` decides what background work does when.
    ///
    /// # Errors
    /// What that fails with.
    fn mount(&self, device: &Arc<SimDevice>, seed: u64) -> Result<Box<dyn Mounted>, coppicefs::Error>;

    /// Whether every operation is durable when it returns.
    fn is_durable_at_once(&self) -> bool {
        false
    }

    /// Checks an image and changes nothing; says what is wrong with it. (Free space against use belongs to it.)
    ///
    /// # Errors
    /// What that fails with.
    fn check(&self, device: &Arc<SimDevice>) -> Result<Vec<String>, coppicefs::Error>;
}

/// At so many boundaries of a recovery the power is cut again, evenly spread.
const RECOVERY_BOUNDARIES_MAX: usize = 24;

/// How thoroughly.
#[derive(Clone, Debug)]
pub struct CrashOptions {
    /// Decides everything that is not decided by the workload.
    pub seed: u64,
    /// Size of the device in bytes.
    pub device_bytes: u64,
    /// The unit in which data survives, in bytes: the filesystem's block.
    pub block_bytes: u64,
    /// Alignment of the device, in bytes.
    pub sector_bytes: u32,
    /// What is tried at each boundary.
    pub plans: PlanOptions,
    /// Cut the power during recovery too: in so many ways at boundaries of one recovery in sixteen; 0: never.
    pub during_recovery: usize,
    /// Threads that open images.
    pub threads: usize,
}

impl Default for CrashOptions {
    fn default() -> Self {
        Self {
            seed: 1,
            device_bytes: 64 << 20,
            block_bytes: 4096,
            sector_bytes: 4096,
            plans: PlanOptions { exhaustive_up_to: 4, samples: 8, limit: Some(64), ..PlanOptions::default() },
            during_recovery: 2,
            threads: std::thread::available_parallelism().map_or(1, usize::from),
        }
    }
}

/// What was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Boundaries of the run.
    pub boundaries: usize,
    /// Power cuts.
    pub crashes: usize,
    /// Different images among them: recoveries.
    pub images: usize,
    /// Images that a power cut during recovery left.
    pub recovery_crashes: usize,
}

/// A crash, or an operation, after which the filesystem was not what it may be.
#[derive(Clone, Debug)]
pub struct Failure {
    /// What is wrong.
    pub problem: String,
    /// The seed of the run.
    pub seed: u64,
    /// The boundary and the plan of the power cut, if it was one.
    pub crash: Option<(u64, CrashPlan)>,
    /// The operation that was under way, or done last, with its number.
    pub operation: Option<(u64, Operation)>,
    /// What was on the medium.
    pub image: Option<PathBuf>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.problem)?;
        if let Some((number, operation)) = &self.operation {
            writeln!(f, "  during or after operation {number}: {operation:?}")?;
        }
        if let Some((boundary, plan)) = &self.crash {
            writeln!(f, "  power cut at boundary {boundary}, what reached the medium: {:?}", plan.survivors)?;
        }
        if let Some(image) = &self.image {
            writeln!(f, "  the medium before recovery: {}", image.display())?;
        }
        let commit = std::process::Command::new("git")
            .args(["rev-parse", "--short", "HEAD"])
            .output()
            .map_or_else(|_| String::new(), |output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
        write!(f, "  seed {}, commit {commit}; again: COPPICE_SEED={} and the same test", self.seed, self.seed)
    }
}

impl std::error::Error for Failure {}

/// The seed of this process's tests: COPPICE_SEED, or the given one.
#[must_use]
pub fn seed_or(default: u64) -> u64 {
    std::env::var("COPPICE_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(default)
}

/// A moment of the run: what was on its way to the medium, and what the oracle knew.
struct Moment {
    snapshot: Snapshot,
    model: Arc<Model>,
}

/// One image to open: the earliest moment that can leave it, and all moments whose oracle must allow what it shows.
struct Case {
    moment: usize,
    plan: CrashPlan,
    moments: Vec<usize>,
}

/// A lock that outlives a panic of another test thread.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Performs `workload` on `subject` and cuts the power everywhere. See the module's documentation.
///
/// # Errors
/// The first failure, by the order of boundaries.
pub fn run(subject: &dyn Subject, workload: &[Operation], options: &CrashOptions) -> Result<Report, Box<Failure>> {
    let fail = |problem: String, number: usize| {
        Box::new(Failure {
            problem,
            seed: options.seed,
            crash: None,
            operation: workload.get(number).cloned().map(|operation| (number as u64 + 1, operation)),
            image: None,
        })
    };
    let moments = record(subject, workload, options).map_err(|(problem, number)| fail(problem, number))?;
    let mut cases: Vec<Case> = Vec::new();
    let mut by_hash: HashMap<u64, usize> = HashMap::new();
    let mut report = Report { boundaries: moments.len(), ..Report::default() };
    for (index, moment) in moments.iter().enumerate() {
        let plans = PlanOptions { seed: options.plans.seed ^ options.seed ^ index as u64, ..options.plans.clone() };
        for plan in moment.snapshot.plans(&plans) {
            report.crashes += 1;
            let hash = moment.snapshot.crash(&plan).content_hash();
            let case = *by_hash.entry(hash).or_insert_with(|| {
                cases.push(Case { moment: index, plan, moments: Vec::new() });
                cases.len() - 1
            });
            if cases[case].moments.last() != Some(&index) {
                cases[case].moments.push(index);
            }
        }
    }
    report.images = cases.len();
    report.recovery_crashes = open_all(subject, workload, options, &moments, &cases)?;
    Ok(report)
}

/// Performs the workload. The error names the operation by its index in the workload.
fn record(
    subject: &dyn Subject,
    workload: &[Operation],
    options: &CrashOptions,
) -> Result<Vec<Moment>, (String, usize)> {
    let device = Arc::new(SimDevice::new(options.device_bytes, sim_options(options, options.seed)));
    subject.format(&device).map_err(|error| (format!("format failed: {error}"), workload.len()))?;
    coppicefs::device::BlockDevice::flush(&*device).map_err(|error| (error.to_string(), workload.len()))?;
    let model = Arc::new(Mutex::new(Arc::new(Model::new(options.block_bytes))));
    let moments: Arc<Mutex<Vec<Moment>>> = Arc::default();
    let (at_model, at_moments) = (Arc::clone(&model), Arc::clone(&moments));
    let remember = move |device: &SimDevice| {
        let moment = Moment { snapshot: device.snapshot(), model: Arc::clone(&lock(&at_model)) };
        lock(&at_moments).push(moment);
    };
    let at_boundary = remember.clone();
    device.set_hook(move |device, _| at_boundary(device));
    let mut mounted = subject
        .mount(&device, options.seed)
        .map_err(|error| (format!("the first mount failed: {error}"), workload.len()))?;
    for (index, operation) in workload.iter().enumerate() {
        let expected = Arc::make_mut(&mut lock(&model)).begin(operation);
        let answer = mounted.perform(operation).map_err(|error| (error.errno(), error));
        match (&expected, &answer) {
            (Ok(()), Ok(())) => {
                let promised = if subject.is_durable_at_once() { &Operation::Sync } else { operation };
                Arc::make_mut(&mut lock(&model)).acknowledge(promised);
            }
            (Err(expected), Err((errno, _))) if expected == errno => {}
            (expected, answer) => {
                let answer = answer.as_ref().map_err(|(_, error)| error.to_string());
                return Err((format!("answered {answer:?}, should have answered {expected:?}"), index));
            }
        }
    }
    let shown = mounted.tree().map_err(|error| (format!("reading everything failed: {error}"), workload.len()))?;
    lock(&model).check_live(&shown).map_err(|problem| (format!("with no crash at all: {problem}"), workload.len()))?;
    remember(&device);
    mounted.unmount().map_err(|error| (format!("unmounting failed: {error}"), workload.len()))?;
    // An unmounted filesystem is a synced one.
    Arc::make_mut(&mut lock(&model)).acknowledge(&Operation::Sync);
    remember(&device);
    device.clear_hook();
    let moments = std::mem::take(&mut *lock(&moments));
    Ok(moments)
}

fn sim_options(options: &CrashOptions, seed: u64) -> SimOptions {
    SimOptions {
        seed,
        block_bytes: options.sector_bytes,
        read_only: false,
        discard_mode: DiscardMode::Varied,
        shuffle_batches: true,
    }
}

/// Opens every case, on several threads. Returns how many images came from power cuts during recovery.
fn open_all(
    subject: &dyn Subject,
    workload: &[Operation],
    options: &CrashOptions,
    moments: &[Moment],
    cases: &[Case],
) -> Result<usize, Box<Failure>> {
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    let recovery_crashes = AtomicUsize::new(0);
    let failures: Mutex<Vec<(usize, String)>> = Mutex::default();
    std::thread::scope(|scope| {
        for _ in 0..options.threads.max(1) {
            scope.spawn(|| {
                while !failed.load(Ordering::Relaxed) {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(case) = cases.get(index) else { return };
                    // A panic of the filesystem is a failure of this case, with its seed, not of the harness.
                    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                        open_one(subject, options, moments, case, index)
                    }))
                    .unwrap_or_else(|panic| Err(format!("panicked: {}", words_of(&*panic))));
                    match outcome {
                        Ok(count) => {
                            recovery_crashes.fetch_add(count, Ordering::Relaxed);
                        }
                        Err(problem) => {
                            lock(&failures).push((index, problem));
                            failed.store(true, Ordering::Relaxed);
                        }
                    }
                }
            });
        }
    });
    let mut failures = std::mem::take(&mut *lock(&failures));
    failures.sort();
    let Some((index, problem)) = failures.into_iter().next() else {
        return Ok(recovery_crashes.into_inner());
    };
    let case = &cases[index];
    let moment = &moments[case.moment];
    let number = moment.model.operations();
    Err(Box::new(Failure {
        problem,
        seed: options.seed,
        crash: Some((moment.snapshot.boundary(), case.plan.clone())),
        operation: workload.get((number as usize).wrapping_sub(1)).cloned().map(|operation| (number, operation)),
        image: keep(&moment.snapshot.crash(&case.plan), options.seed, index),
    }))
}

fn words_of(panic: &(dyn std::any::Any + Send)) -> String {
    let words = panic.downcast_ref::<&str>().map(ToString::to_string);
    words.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".into())
}

/// Keeps the image of a failure where somebody can look at it.
fn keep(image: &Image, seed: u64, index: usize) -> Option<PathBuf> {
    let folder = std::env::temp_dir().join("coppice-crash");
    std::fs::create_dir_all(&folder).ok()?;
    let path = folder.join(format!("seed-{seed}-case-{index}.img"));
    image.to_file(&path).ok()?;
    Some(path)
}

fn open_one(
    subject: &dyn Subject,
    options: &CrashOptions,
    moments: &[Moment],
    case: &Case,
    index: usize,
) -> Result<usize, String> {
    let moment = &moments[case.moment];
    let image = moment.snapshot.crash(&case.plan);
    let seed = options.seed ^ (index as u64) << 20;
    let inside: Arc<Mutex<Vec<Snapshot>>> = Arc::default();
    let crash_inside = options.during_recovery > 0 && index.is_multiple_of(16);
    let allow =
        |tree: &Tree, moments_of: &[usize]| moments_of.iter().try_for_each(|&index| moments[index].model.check(tree));
    let shown = open_image(subject, options, image, seed, |device| {
        let inside = Arc::clone(&inside);
        if crash_inside {
            device.set_hook(move |device, _| lock(&inside).push(device.snapshot()));
        }
    })?;
    allow(&shown, &case.moments)?;
    let mut count = 0;
    let inside = std::mem::take(&mut *lock(&inside));
    for snapshot in inside.iter().step_by(inside.len().div_ceil(RECOVERY_BOUNDARIES_MAX).max(1)) {
        let plans = PlanOptions {
            limit: Some(options.during_recovery),
            seed: seed ^ snapshot.boundary(),
            ..options.plans.clone()
        };
        for plan in snapshot.plans(&plans) {
            count += 1;
            let again = open_image(subject, options, snapshot.crash(&plan), seed, |_| {})
                .and_then(|again| allow(&again, &case.moments))
                .map_err(|problem| format!("{problem}; power was cut again during recovery, at {plan:?}"));
            again?;
        }
    }
    Ok(count)
}

/// Checks, mounts, reads, unmounts, checks, and mounts again. `prepare` sees the device before the first mount.
fn open_image(
    subject: &dyn Subject,
    options: &CrashOptions,
    image: Image,
    seed: u64,
    prepare: impl FnOnce(&SimDevice),
) -> Result<Tree, String> {
    let check = |device: &Arc<SimDevice>, when: &str| {
        let hash = device.image().content_hash();
        let findings = subject.check(device).map_err(|error| format!("checking {when} failed: {error}"))?;
        if !findings.is_empty() {
            return Err(format!("the check {when} found: {}", findings.join("; ")));
        }
        if device.image().content_hash() != hash {
            return Err(format!("the check {when} changed the image"));
        }
        Ok(())
    };
    let device = Arc::new(SimDevice::from_image(image, sim_options(options, seed)));
    check(&device, "before recovery")?;
    prepare(&device);
    let mut mounted = subject.mount(&device, seed).map_err(|error| format!("mounting failed: {error}"))?;
    let shown = mounted.tree().map_err(|error| format!("reading everything failed: {error}"))?;
    mounted.unmount().map_err(|error| format!("unmounting failed: {error}"))?;
    device.clear_hook();
    check(&device, "after recovery")?;
    // What recovery showed is durable: had the power gone now, with everything unflushed lost, it would still be there.
    let durable = device.snapshot().durable().clone();
    let device = Arc::new(SimDevice::from_image(durable, sim_options(options, seed)));
    let mut mounted = subject.mount(&device, seed).map_err(|error| format!("mounting again failed: {error}"))?;
    let again = mounted.tree().map_err(|error| format!("reading everything again failed: {error}"))?;
    mounted.unmount().map_err(|error| format!("unmounting again failed: {error}"))?;
    if shown != again {
        let differing = shown.iter().find(|(path, entry)| again.get(*path) != Some(*entry)).map(|(path, _)| path);
        return Err(format!("a second mount shows something else, first at {differing:?}"));
    }
    Ok(shown)
}
