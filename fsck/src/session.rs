//! A whole run of fsck over an open filesystem: rounds of checking and repairing, until nothing is left that is to be repaired.
//!
//! Each round repairs problems of one [`Stage`] alone, the earliest that has any; what follows from those is found in the next. A stage is not begun while
//! damage of an earlier one is left: counts that are derived from what is lost would make free what is only out of sight.
//!
//! What a run would do is found by doing it, on a device that keeps writes in memory ([`crate::overlay`]): so `-n` and `-y` give the same list.

use std::collections::HashSet;
use std::sync::Arc;

use coppicefs::Result;
use coppicefs::device::BlockDevice;
use coppicefs::filesystem::{Filesystem, OpenOptions, WorkerSet};

use crate::problem::{Problem, Severity, Stage};
use crate::repair::map::LostMap;
use crate::repair::{self, Loss};
use crate::report::Report;

/// Most rounds: each stage brings to light what it hid.
const ROUNDS_MAX: usize = 24;

/// What a run came to.
#[derive(Debug, Default)]
pub struct Outcome {
    /// The first check's report, but for its problems: what was found.
    pub report: Report,
    /// The last check's, but for its problems: what is there at the end.
    pub last: Report,
    /// What was found and was, or could have been, repaired at its turn; then what is left.
    pub problems: Vec<Problem>,
    /// How many problems were repaired.
    pub repaired: usize,
    /// What is left at the end.
    pub left: Vec<Problem>,
    /// Ranges of files that were lost.
    pub losses: Vec<Loss>,
    /// Problems that a repair was tried of in vain, and why.
    pub failed: Vec<(Problem, String)>,
}

impl Outcome {
    /// Adds what was repaired before the filesystem could be opened.
    pub(crate) fn repaired_before(&mut self, problems: Vec<Problem>) {
        self.repaired += problems.len();
        self.problems.splice(0..0, problems);
    }

    /// Whether something is left that only a scan of the whole device can repair.
    #[must_use]
    pub fn needs_rebuild(&self) -> bool {
        !self.failed.is_empty() || self.left.iter().any(|problem| !problem.is_repairable())
    }
}

/// Who decides, and who watches.
pub struct Session<'a> {
    /// Checks the filesystem, and shows how far that is.
    pub check: &'a mut dyn FnMut() -> Result<Report>,
    /// Which of the repairable problems of a stage to repair.
    pub choose: &'a mut dyn FnMut(&[Problem]) -> Vec<Problem>,
    /// Called once for each of [`Outcome::problems`], when it is known that it is one.
    pub found: &'a mut dyn FnMut(&Problem),
}

/// Runs rounds. `first` is the report of a check of this state, if there was one.
///
/// # Errors
/// What makes checking or repairing impossible. Damage is in the outcome.
pub fn run(filesystem: &Filesystem, first: Option<Report>, session: &mut Session<'_>) -> Result<Outcome> {
    let mut outcome = Outcome::default();
    let mut told: HashSet<String> = HashSet::new();
    let mut failed: HashSet<String> = HashSet::new();
    let mut before: Vec<Problem> = Vec::new();
    let mut next = first;
    for round in 0..ROUNDS_MAX {
        let mut report = match next.take() {
            Some(report) => report,
            None => (session.check)()?,
        };
        let (stage, mut chosen) = turn(&report.problems, &failed, session.choose);
        // A repair that does not hold is none.
        if chosen == before || round + 1 == ROUNDS_MAX {
            let reason = "it is still there after a repair";
            outcome.failed.extend(chosen.drain(..).map(|problem| (problem, reason.to_owned())));
        }
        let is_last = chosen.is_empty();
        for problem in &report.problems {
            let is_at_turn = is_last || stage.is_some_and(|stage| problem.stage() <= stage);
            if is_at_turn && told.insert(identity(problem)) {
                (session.found)(problem);
                outcome.problems.push(problem.clone());
            }
        }
        if round == 0 {
            outcome.report = Report { problems: Vec::new(), ..report.clone() };
        }
        if is_last {
            outcome.left = std::mem::take(&mut report.problems);
            outcome.last = report;
            break;
        }
        let repairs = repair::repair(filesystem, &report, &chosen)?;
        outcome.repaired += repairs.count;
        outcome.losses.extend(repairs.losses);
        failed.extend(repairs.failed.iter().map(|(problem, _)| identity(problem)));
        outcome.failed.extend(repairs.failed);
        before = chosen;
    }
    outcome.losses.sort_unstable();
    outcome.losses.dedup();
    Ok(outcome)
}

/// What tells problems apart.
fn identity(problem: &Problem) -> String {
    format!("{}: {}", problem.id(), problem.describe())
}

/// The stage whose turn it is, and what is to be repaired of it.
fn turn(
    problems: &[Problem],
    failed: &HashSet<String>,
    choose: &mut dyn FnMut(&[Problem]) -> Vec<Problem>,
) -> (Option<Stage>, Vec<Problem>) {
    let mut stages: Vec<Stage> = problems.iter().map(Problem::stage).collect();
    stages.sort_unstable();
    stages.dedup();
    for stage in stages {
        let of_stage = || problems.iter().filter(|problem| problem.stage() == stage);
        let can: Vec<Problem> = of_stage()
            .filter(|problem| problem.is_repairable() && (failed.is_empty() || !failed.contains(&identity(problem))))
            .cloned()
            .collect();
        let chosen = if can.is_empty() { can } else { choose(&can) };
        if !chosen.is_empty() || of_stage().any(|problem| problem.severity() == Severity::Damage) {
            return (Some(stage), chosen);
        }
    }
    (None, Vec::new())
}

/// Checks the filesystem on these devices with nothing written, and then repairs all that can be repaired, as `-y` does. For programs.
///
/// # Errors
/// As [`run`], and those of opening.
pub fn repair_all(devices: &[Arc<dyn BlockDevice>], options: &OpenOptions) -> Result<Outcome> {
    let check = |filesystem: &Filesystem| crate::passes::check(filesystem, &|_, _, _, _| {});
    let lost_map = repair::map::lost_map(devices)?;
    if let Some(map) = &lost_map {
        map.repair(devices)?;
    }
    let options = OpenOptions { workers: WorkerSet::Essential, for_repair: true, ..options.clone() };
    let filesystem = Filesystem::open(devices.to_vec(), &OpenOptions { read_only: true, ..options.clone() })?;
    let report = check(&filesystem);
    filesystem.close()?;
    drop(filesystem);
    let report = report?;
    let known_in_use = report.known_in_use.clone();
    let filesystem = Filesystem::open(devices.to_vec(), &OpenOptions { read_only: false, known_in_use, ..options })?;
    let mut session =
        Session { check: &mut || check(&filesystem), choose: &mut |problems| problems.to_vec(), found: &mut |_| {} };
    let outcome = run(&filesystem, Some(report), &mut session);
    let closed = filesystem.close();
    let mut outcome = outcome?;
    closed?;
    outcome.repaired_before(lost_map.iter().flat_map(LostMap::problems).cloned().collect());
    Ok(outcome)
}
