//! What a check found, for people and as JSON.

use std::time::Duration;

use coppicefs::filesystem::KnownInUse;
use serde::Serialize;

use crate::damaged::Damaged;
use crate::problem::{Problem, Severity};

/// One pass that was run.
#[derive(Clone, Debug, Default)]
pub struct PassReport {
    /// Its name.
    pub name: &'static str,
    /// How long it took.
    pub duration: Duration,
    /// What it looked at: keys, nodes, buckets.
    pub examined: u64,
}

/// The outcome of a check.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Everything that is wrong, in the order of the passes.
    pub problems: Vec<Problem>,
    /// The passes.
    pub passes: Vec<PassReport>,
    /// Inodes by kind: directories, regular files, symbolic links, others.
    pub inode_counts: [u64; 4],
    /// Bytes of file data on disk.
    pub data_bytes: u64,
    /// What must not be written over by a repair, although the trees allow it.
    pub known_in_use: KnownInUse,
    /// Windows of inode numbers that the passes over names ran for.
    pub windows: usize,
    /// Most bytes that the tables of inodes took.
    pub tables_peak_bytes: u64,
}

/// What a run came to, beside its first check's report.
#[derive(Clone, Copy, Debug)]
pub struct Summary<'a> {
    /// The image.
    pub target: &'a str,
    /// Everything that was found.
    pub problems: &'a [Problem],
    /// Ranges of files that repairs have found lost.
    pub lost: &'a [Damaged],
    /// How many problems were repaired.
    pub repaired: usize,
    /// The exit code.
    pub exit_code: u8,
}

#[derive(Serialize)]
struct JsonProblem {
    id: &'static str,
    severity: &'static str,
    repairable: bool,
    text: String,
}

#[derive(Serialize)]
struct JsonPass {
    name: &'static str,
    seconds: f64,
    examined: u64,
}

#[derive(Serialize)]
struct JsonReport<'a> {
    target: &'a str,
    clean: bool,
    repaired: usize,
    exit_code: u8,
    problems: Vec<JsonProblem>,
    /// Ranges of files that repairs have found lost.
    lost: &'a [Damaged],
    passes: Vec<JsonPass>,
    directories: u64,
    regular_files: u64,
    symbolic_links: u64,
    other_files: u64,
    data_bytes: u64,
}

#[derive(Serialize)]
struct JsonError<'a> {
    target: &'a str,
    clean: bool,
    exit_code: u8,
    error: &'a str,
}

/// What is said as JSON where no check could be made.
#[must_use]
pub fn error_to_json(target: &str, error: &str, exit_code: u8) -> String {
    // Strings and numbers have no way to fail.
    serde_json::to_string_pretty(&JsonError { target, clean: false, exit_code, error }).unwrap_or_default()
}

/// The ranges of files that cannot be read, as one JSON object; `problems` of the trees were repaired in memory before.
#[must_use]
pub fn damaged_to_json(target: &str, damaged: &[Damaged], read_bytes: u64, problems: usize, exit_code: u8) -> String {
    #[derive(Serialize)]
    struct Json<'a> {
        target: &'a str,
        exit_code: u8,
        read_bytes: u64,
        problems: usize,
        damaged: &'a [Damaged],
    }
    // Strings and numbers have no way to fail.
    serde_json::to_string_pretty(&Json { target, exit_code, read_bytes, problems, damaged }).unwrap_or_default()
}

impl Report {
    /// Whether nothing is wrong.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.problems.is_empty()
    }

    /// The report of a whole run as one JSON object.
    ///
    /// # Errors
    /// Never, in practice.
    pub fn to_json(&self, summary: &Summary<'_>) -> serde_json::Result<String> {
        let Summary { target, problems, lost, repaired, exit_code } = *summary;
        let [directories, regular_files, symbolic_links, other_files] = self.inode_counts;
        let severity = |problem: &Problem| match problem.severity() {
            Severity::Minor => "minor",
            Severity::Structural => "structural",
            Severity::Damage => "damage",
        };
        serde_json::to_string_pretty(&JsonReport {
            target,
            clean: problems.is_empty(),
            repaired,
            exit_code,
            problems: problems
                .iter()
                .map(|problem| JsonProblem {
                    id: problem.id(),
                    severity: severity(problem),
                    repairable: problem.is_repairable(),
                    text: problem.describe(),
                })
                .collect(),
            lost,
            passes: self
                .passes
                .iter()
                .map(|pass| JsonPass { name: pass.name, seconds: pass.duration.as_secs_f64(), examined: pass.examined })
                .collect(),
            directories,
            regular_files,
            symbolic_links,
            other_files,
            data_bytes: self.data_bytes,
        })
    }
}
