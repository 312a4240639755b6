//! Power cuts everywhere: [`run`] performs a workload on a [`SimDevice`] once, keeps a snapshot at each boundary (before each write, flush
//! and discard) together with the oracle's state at that moment, and then opens what a power cut could have left at each.
//!
//! For each image: the checker (`fsck -n`) finds nothing on it as it is; it mounts; what is shown is allowed by the [`Model`]; it unmounts; the
//! checker finds nothing again, and a second mount shows the same. Images that were seen before are not opened again, only held against the newer
//! oracle. Where asked, besides:
//! - power is cut again during that mount, at its boundaries;
//! - the process dies and the host stays: it is mounted again over writes that are in no flush, and then power is cut;
//! - the device has lost one flushed write of the log (all copies): what it shows is whole, if older, or it refuses to mount;
//! - the device lies about every flush: an older state or a refusal, never what was not there ([`CrashOptions::device_lies`]);
//! - a write or a flush fails: what was acknowledged before holds, nothing is acknowledged after ([`Fault`]);
//! - operations may answer that there is no space.
//!
//! Everything is decided by the seed: the same seed gives the same run, whatever the number of threads. A [`Failure`] says what to type to see
//! it again, and keeps the image.
//!
//! [`Model`]: crate::model::Model

mod cases;
mod cut;
mod open;
mod record;
pub mod shrink;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod toy;

use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use coppicefs::device::{DiscardMode, Image, PlanOptions, SimDevice, SimOptions};

pub use self::cut::{Cut, Failure};
use self::open::Opener;
use self::record::{Recording, record};
use crate::operation::Operation;
use crate::tree::Tree;

/// A filesystem under test, mounted.
pub trait Mounted {
    /// Performs an operation. The outer error ends the run; the inner one is the filesystem's answer.
    ///
    /// # Errors
    /// What the operation fails with.
    fn perform(&mut self, operation: &Operation) -> Result<(), coppicefs::Error>;

    /// How many bytes of the write that failed last are in the file all the same.
    fn bytes_done(&self) -> u64 {
        0
    }

    /// One of its counters, since the mount.
    fn counter(&self, _name: &str) -> u64 {
        0
    }

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

    /// Where on a formatted device its log lies: byte ranges. Writes in it may be lost, to see what it makes of that.
    ///
    /// # Errors
    /// What finding it out fails with.
    fn log_ranges(&self, _device: &Arc<SimDevice>) -> Result<Vec<Range<u64>>, coppicefs::Error> {
        Ok(Vec::new())
    }

    /// The arguments that make `coppice-crash` take this subject.
    fn arguments(&self) -> String {
        String::new()
    }

    /// Checks an image and changes nothing; says what is wrong with it. (Free space against use belongs to it.)
    ///
    /// # Errors
    /// What that fails with.
    fn check(&self, device: &Arc<SimDevice>) -> Result<Vec<String>, coppicefs::Error>;
}

/// What a device does once, some time after the mount: request number so many from then on fails with EIO.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A write.
    Write(u64),
    /// A flush.
    Flush(u64),
}

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
    /// Cut the power during recovery too: in so many ways at boundaries of one recovery in [`Self::recovery_one_in`]; 0: never.
    pub during_recovery: usize,
    /// See [`Self::during_recovery`].
    pub recovery_one_in: usize,
    /// At so many boundaries of a recovery, evenly spread (and at its first ones).
    pub recovery_boundaries_max: usize,
    /// Let the process die at one boundary in [`Self::kill_one_in`], mount again, and cut the power in so many ways at boundaries of that mount; 0: never.
    pub after_kill: usize,
    /// See [`Self::after_kill`].
    pub kill_one_in: usize,
    /// Lose so many flushed writes of the log, one at a time, at each boundary.
    pub lost_writes: usize,
    /// Check before the recovery too, and mount a second time, for one image in so many.
    pub twice_one_in: usize,
    /// No flush makes anything durable.
    pub device_lies: bool,
    /// What fails.
    pub fault: Option<Fault>,
    /// Operations that need space may answer ENOSPC.
    pub may_lack_space: bool,
    /// Threads that open images.
    pub threads: usize,
    /// The command that names the workload, for failures: `coppice-crash --workload append`.
    pub again: String,
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
            recovery_one_in: 16,
            recovery_boundaries_max: 24,
            after_kill: 0,
            kill_one_in: 16,
            lost_writes: 0,
            twice_one_in: 1,
            device_lies: false,
            fault: None,
            may_lack_space: false,
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            again: "coppice-crash".into(),
        }
    }
}

impl CrashOptions {
    /// The command that repeats the run, without its end.
    fn command(&self, subject: &dyn Subject) -> String {
        let mut command = format!("{} --seed {} --device-bytes {}", self.again, self.seed, self.device_bytes);
        if self.device_lies {
            command += " --device-lies";
        }
        match self.fault {
            Some(Fault::Write(nth)) => command += &format!(" --fail-write {nth}"),
            Some(Fault::Flush(nth)) => command += &format!(" --fail-flush {nth}"),
            None => {}
        }
        if self.may_lack_space {
            command += " --may-lack-space";
        }
        match subject.arguments() {
            arguments if arguments.is_empty() => command,
            arguments => format!("{command} {arguments}"),
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
    /// Power cuts during recovery.
    pub recovery_crashes: usize,
    /// Different images among them, for each recovery.
    pub recovery_images: usize,
    /// Runs that ended by the death of the process.
    pub kills: usize,
    /// Different images with a lost write.
    pub lost: usize,
    /// Images that were refused, where that may be.
    pub refused: usize,
    /// Operations that found no space.
    pub lacked_space: usize,
    /// Runs whose device failed.
    pub faults: usize,
}

impl Report {
    /// Adds another run.
    pub fn add(&mut self, other: &Self) {
        self.boundaries += other.boundaries;
        self.crashes += other.crashes;
        self.images += other.images;
        self.recovery_crashes += other.recovery_crashes;
        self.recovery_images += other.recovery_images;
        self.kills += other.kills;
        self.lost += other.lost;
        self.refused += other.refused;
        self.lacked_space += other.lacked_space;
        self.faults += other.faults;
    }

    /// Crash states that were tried: cuts of all kinds.
    #[must_use]
    pub fn states(&self) -> usize {
        self.crashes + self.recovery_crashes + self.kills
    }

    /// Images that were recovered.
    #[must_use]
    pub fn recovered(&self) -> usize {
        self.images + self.recovery_images + self.kills + self.lost
    }
}

/// The seed of this process's tests: COPPICE_SEED, or the given one.
#[must_use]
pub fn seed_or(default: u64) -> u64 {
    std::env::var("COPPICE_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(default)
}

/// A lock that outlives a panic of another test thread.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
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

/// Performs `workload` on `subject` and cuts the power everywhere. See the module's documentation.
///
/// # Errors
/// The first failure, by the order of boundaries.
pub fn run(subject: &dyn Subject, workload: &[Operation], options: &CrashOptions) -> Result<Report, Box<Failure>> {
    let recording = recorded(subject, workload, options)?;
    let mut report = Report {
        boundaries: recording.moments.len(),
        lacked_space: recording.lacked_space,
        faults: usize::from(recording.has_failed),
        ..Report::default()
    };
    let cases = recording.cases(options, &mut report);
    report.kills = cases.iter().filter(|case| case.cut.plan.is_none()).count();
    let opener = Opener { subject, options, recording: &recording };
    let report = Mutex::new(report);
    let Some((cut, problem)) = first_failure(&opener, &cases, &report) else {
        return Ok(report.into_inner().unwrap_or_else(PoisonError::into_inner));
    };
    Err(failure_after(&opener, workload, cut, problem))
}

/// Performs `workload` and ends it by this one cut.
///
/// # Errors
/// The failure, if there is one; also if the run has no such boundary.
pub fn replay(
    subject: &dyn Subject,
    workload: &[Operation],
    options: &CrashOptions,
    cut: &Cut,
) -> Result<(), Box<Failure>> {
    let recording = recorded(subject, workload, options)?;
    let opener = Opener { subject, options, recording: &recording };
    let outcome = without_panic(|| opener.open_exactly(cut));
    outcome.map_err(|problem| failure_after(&opener, workload, cut.clone(), problem))
}

/// Performs `workload`, and returns what this cut leaves on the medium.
///
/// # Errors
/// If the run fails by itself, or has no such boundary.
pub fn image_after(
    subject: &dyn Subject,
    workload: &[Operation],
    options: &CrashOptions,
    cut: &Cut,
) -> Result<Image, Box<Failure>> {
    let recording = recorded(subject, workload, options)?;
    let opener = Opener { subject, options, recording: &recording };
    opener.image(cut).map_err(|problem| failure_after(&opener, workload, cut.clone(), problem))
}

fn recorded(subject: &dyn Subject, workload: &[Operation], options: &CrashOptions) -> Result<Recording, Box<Failure>> {
    record(subject, workload, options).map_err(|(problem, number)| {
        Box::new(Failure {
            problem,
            seed: options.seed,
            cut: None,
            operation: workload.get(number).cloned().map(|operation| (number as u64 + 1, operation)),
            image: None,
            again: options.command(subject),
        })
    })
}

fn failure_after(opener: &Opener<'_>, workload: &[Operation], cut: Cut, problem: String) -> Box<Failure> {
    let moment = opener.recording.moments.get(cut.promised_at.unwrap_or(cut.boundary));
    let model = moment.and_then(|moment| opener.recording.models.get(moment.model));
    let number = model.map_or(0, |model| model.operations());
    Box::new(Failure {
        problem,
        seed: opener.options.seed,
        operation: workload.get((number as usize).wrapping_sub(1)).cloned().map(|operation| (number, operation)),
        image: opener.image(&cut).ok().and_then(|image| keep(&image, &cut)),
        again: opener.options.command(opener.subject),
        cut: Some(cut),
    })
}

/// Opens every case, on several threads. Adds to the report what came of second cuts.
fn first_failure(opener: &Opener<'_>, cases: &[cases::Case], report: &Mutex<Report>) -> Option<(Cut, String)> {
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    let failures: Mutex<Vec<(usize, Cut, String)>> = Mutex::default();
    std::thread::scope(|scope| {
        for _ in 0..opener.options.threads.max(1) {
            scope.spawn(|| {
                // Cases are begun in order and ended once begun: so the first failure is found, whoever comes first.
                while !failed.load(Ordering::Relaxed) {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(case) = cases.get(index) else { return };
                    // A panic of the filesystem is a failure of this case, with its seed, not of the harness.
                    let mut at = case.cut.clone();
                    let outcome = without_panic(|| {
                        opener.open(case, index, report).map_err(|(cut, problem)| {
                            at = cut;
                            problem
                        })
                    });
                    if let Err(problem) = outcome {
                        lock(&failures).push((index, at, problem));
                        failed.store(true, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    let mut failures = failures.into_inner().unwrap_or_else(PoisonError::into_inner);
    failures.sort_by_key(|(index, ..)| *index);
    failures.into_iter().next().map(|(_, cut, problem)| (cut, problem))
}

fn without_panic(body: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(body))
        .unwrap_or_else(|panic| Err(format!("panicked: {}", words_of(&*panic))))
}

fn words_of(panic: &(dyn std::any::Any + Send)) -> String {
    let words = panic.downcast_ref::<&str>().map(ToString::to_string);
    words.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".into())
}

/// Keeps the image of a failure where somebody can look at it.
fn keep(image: &Image, cut: &Cut) -> Option<PathBuf> {
    let folder = std::env::temp_dir().join("coppice-crash");
    std::fs::create_dir_all(&folder).ok()?;
    let path = folder.join(format!("cut-{}-{:016x}.img", cut.boundary, image.content_hash()));
    image.to_file(&path).ok()?;
    Some(path)
}

/// Removes the image that a failure kept: for those who expected it.
pub fn forget_image(failure: &Failure) {
    if let Some(image) = &failure.image {
        let _ = std::fs::remove_file(image);
    }
}
