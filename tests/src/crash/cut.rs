//! [`Cut`]: one way in which a run ends, exactly; and [`Failure`]: what was wrong after it, with the command that shows it again.

use std::fmt;
use std::path::PathBuf;

use coppicefs::device::CrashPlan;

use crate::operation::Operation;

/// Where the run ends, and what is on the medium then. Says the same in every run of the same seed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut {
    /// Number of the boundary, from 0 for the first of the mount.
    pub boundary: usize,
    /// What of the writes in flight reached the medium. `None`: the process was killed, the host still has all of them.
    pub plan: Option<CrashPlan>,
    /// Number of a flushed write of the log that the device has lost all the same, with its copies.
    pub lost: Option<usize>,
    /// A later boundary at which a cut can leave the same: what was promised by then counts.
    pub promised_at: Option<usize>,
    /// A power cut during the recovery: at which of its boundaries, and what reached the medium.
    pub second: Option<(usize, CrashPlan)>,
}

impl Cut {
    /// The power fails at a boundary.
    #[must_use]
    pub fn power(boundary: usize, plan: CrashPlan) -> Self {
        Self { boundary, plan: Some(plan), lost: None, promised_at: None, second: None }
    }

    /// The arguments of `coppice-crash` that mean it.
    #[must_use]
    pub fn arguments(&self) -> String {
        let mut text = self.arguments_of_medium();
        if let Some(boundary) = self.promised_at {
            text += &format!(" --promised-at {boundary}");
        }
        text
    }

    /// Those that say what is on the medium.
    pub(super) fn arguments_of_medium(&self) -> String {
        let mut text = match &self.plan {
            Some(plan) => format!("--cut {} --plan {plan}", self.boundary),
            None => format!("--cut {} --killed", self.boundary),
        };
        if let Some(lost) = self.lost {
            text += &format!(" --lose {lost}");
        }
        if let Some((boundary, plan)) = &self.second {
            text += &format!(" --second-cut {boundary} --second-plan {plan}");
        }
        text
    }
}

/// A crash, or an operation, after which the filesystem was not what it may be.
#[derive(Clone, Debug)]
pub struct Failure {
    /// What is wrong.
    pub problem: String,
    /// The seed of the run.
    pub seed: u64,
    /// How the run ended, if not by a wrong answer.
    pub cut: Option<Cut>,
    /// The operation that was under way, or done last, with its number.
    pub operation: Option<(u64, Operation)>,
    /// What was on the medium.
    pub image: Option<PathBuf>,
    /// The command that does the same run, without the cut.
    pub again: String,
}

impl Failure {
    /// The one command that shows this failure again.
    #[must_use]
    pub fn command(&self) -> String {
        match &self.cut {
            Some(cut) => format!("{} {}", self.again, cut.arguments()),
            None => self.again.clone(),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.problem)?;
        if let Some((number, operation)) = &self.operation {
            writeln!(f, "  during or after operation {number}: {operation:?}")?;
        }
        if let Some(image) = &self.image {
            writeln!(f, "  the medium before recovery: {}", image.display())?;
        }
        let commit = std::process::Command::new("git")
            .args(["rev-parse", "--short", "HEAD"])
            .output()
            .map_or_else(|_| String::new(), |output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
        write!(f, "  at commit {commit}; again: {}", self.command())
    }
}

impl std::error::Error for Failure {}
