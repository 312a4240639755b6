//! `fsck-coppice --rebuild`: asks, shows how far it is, and says what came of it.

use std::io::IsTerminal;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Args;
use coppicefs::device::{BlockDevice, Creation, FileDevice, FileOptions};
use coppicefs::env::Env;
use coppicefs::filesystem::Filesystem;
use coppicefs::units::InodeNumber;
use coppicefs::{Error, Result};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::data::FileRange;
use super::{Finished, RebuildOptions, RebuildReport, Stage, Target, finish, rebuild};
use crate::cli::{Arguments, EXIT_CLEAN, EXIT_OPERATIONAL, EXIT_REPAIRED, EXIT_UNREPAIRED};

/// Damaged files that are named for people; JSON has all ranges.
const PATHS_MAX: usize = 50;

/// What `--rebuild` takes on the command line.
#[derive(Args, Clone, Debug, Default)]
pub struct RebuildArguments {
    /// Build all trees anew from what a scan of the whole device finds: for images whose superblocks, checkpoints or roots are lost.
    /// With -n only says what would be found; asks, unless there is -y
    #[arg(long, conflicts_with_all = ["preen", "list_damaged"])]
    pub rebuild: bool,
    /// The filesystem to rebuild, where there is more than one on the device
    #[arg(long, value_name = "UUID", requires = "rebuild")]
    pub filesystem_id: Option<uuid::Uuid>,
    /// Write the result to a new image, and leave the damaged one as it is
    #[arg(long, value_name = "IMAGE", requires = "rebuild", conflicts_with = "no_changes")]
    pub output: Option<PathBuf>,
}

#[derive(Serialize)]
struct Json<'a> {
    target: &'a str,
    exit_code: u8,
    #[serde(flatten)]
    found: &'a RebuildReport,
    problems_repaired: usize,
    problems_left: Vec<String>,
    damaged_files: Vec<String>,
}

/// Runs it and prints what came of it. Returns the exit code.
///
/// # Errors
/// As [`rebuild`], and those of opening the images.
pub fn run(arguments: &Arguments, target: &str) -> Result<u8> {
    let output_path = arguments.rebuild.output.as_deref();
    let read_only = arguments.no_changes || output_path.is_some();
    let is_asked = !arguments.no_changes && !arguments.yes;
    if is_asked && !std::io::stdin().is_terminal() {
        return Err(Error::Invalid(
            "--rebuild replaces all metadata: say -y, or -n to see first what would be found".into(),
        ));
    }
    let options = FileOptions { read_only, ..FileOptions::default() };
    let device: Arc<dyn BlockDevice> = Arc::new(Filesystem::open_device_waiting(&arguments.target, &options)?);
    let output = output_path.map(|path| create(path, device.size_bytes())).transpose()?;
    let where_to = match (&output, arguments.no_changes) {
        (_, true) => Target::Nothing,
        (Some(output), _) => Target::Other(output),
        (None, _) => Target::InPlace,
    };
    let outcome = run_on(arguments, target, &device, where_to, is_asked);
    if let (Some(path), false) = (output_path, matches!(outcome, Ok((_, true)))) {
        // An image that was made for this must not be left behind half made.
        let _ = std::fs::remove_file(path);
    }
    outcome.map(|(code, _)| code)
}

fn create(path: &Path, size_bytes: u64) -> Result<Arc<dyn BlockDevice>> {
    if path.exists() {
        return Err(Error::Invalid(format!("{} exists: --output makes a new image", path.display())));
    }
    Ok(Arc::new(FileDevice::create(path, size_bytes, Creation::Careful, &FileOptions::default())?))
}

/// Returns the exit code, and whether something was written.
fn run_on(
    arguments: &Arguments,
    target: &str,
    device: &Arc<dyn BlockDevice>,
    where_to: Target<'_>,
    is_asked: bool,
) -> Result<(u8, bool)> {
    let bars = Bars::new(arguments, device.size_bytes());
    let options = RebuildOptions { filesystem: arguments.rebuild.filesystem_id, env: Env::real() };
    let found = rebuild(device, where_to, &options, &|stage, bytes| bars.on(stage, bytes), &mut |report| {
        bars.clear();
        !is_asked || ask(target, report)
    });
    bars.clear();
    let found = found.map_err(|error| match error {
        Error::NoSpace(reason) => Error::Unusable(format!(
            "the new trees do not fit beside what is still needed ({reason}): write them to another image with --output; nothing is lost"
        )),
        other => other,
    })?;
    if !found.is_written {
        let is_needed = !found.superblock_found || found.used_checkpoint.is_none() || found.is_something_lost();
        let code = if is_needed { EXIT_UNREPAIRED } else { EXIT_CLEAN };
        print(arguments, target, &found, None, &[], code);
        return Ok((code, false));
    }
    let result = match where_to {
        Target::Other(output) => output,
        _ => device,
    };
    let mut paths = Vec::new();
    let finished = finish(Arc::clone(result), None, &mut |filesystem| {
        let ranges = found.damaged_ranges.iter().chain(&found.lost_ranges).chain(&found.uncertain_ranges);
        paths = damaged_paths(filesystem, ranges)?;
        Ok(())
    })?;
    let code = if finished.report.is_clean() { EXIT_REPAIRED } else { EXIT_OPERATIONAL };
    print(arguments, target, &found, Some(&finished), &paths, code);
    Ok((code, true))
}

/// The files that lost something, each once.
fn damaged_paths<'a>(filesystem: &Filesystem, ranges: impl Iterator<Item = &'a FileRange>) -> Result<Vec<String>> {
    let mut inodes: Vec<u64> = ranges.map(|range| range.inode).collect();
    inodes.sort_unstable();
    inodes.dedup();
    let mut paths = Vec::new();
    for inode in inodes {
        let path = filesystem.namespace().path(&mut filesystem.transactions().read(), InodeNumber(inode))?;
        paths.push(path.map_or_else(|| format!("inode {inode}"), |path| path.escape_ascii().to_string()));
    }
    Ok(paths)
}

fn ask(target: &str, report: &RebuildReport) -> bool {
    for line in report.describe() {
        complain!("{target}: {line}");
    }
    let _ = write!(std::io::stderr(), "{target}: replace all metadata by this? [y/N] ");
    let mut answer = String::new();
    matches!(std::io::stdin().read_line(&mut answer), Ok(count) if count > 0)
        && matches!(answer.trim(), "y" | "Y" | "yes")
}

fn print(
    arguments: &Arguments,
    target: &str,
    found: &RebuildReport,
    finished: Option<&Finished>,
    paths: &[String],
    code: u8,
) {
    let left = finished.map(|finished| finished.report.problems.as_slice()).unwrap_or_default();
    let repaired = finished.map_or(0, |finished| finished.repaired);
    if arguments.json {
        let json = Json {
            target,
            exit_code: code,
            found,
            problems_repaired: repaired,
            problems_left: left.iter().map(crate::problem::Problem::describe).collect(),
            damaged_files: paths.to_vec(),
        };
        match serde_json::to_string_pretty(&json) {
            Ok(json) => say!("{json}"),
            Err(error) => complain!("fsck-coppice: {error}"),
        }
        return;
    }
    for problem in left {
        say!("{target}: {}: {}", problem.id(), problem.describe());
    }
    if arguments.quiet {
        return;
    }
    for line in found.describe() {
        say!("{target}: {line}");
    }
    for path in paths.iter().take(PATHS_MAX) {
        say!("{target}: not whole: {path}");
    }
    if paths.len() > PATHS_MAX {
        say!("{target}: not whole: {} more files", paths.len() - PATHS_MAX);
    }
    match (finished, left.len()) {
        (None, _) => say!("{target}: nothing was changed: --rebuild -y would make this of it"),
        (Some(_), 0) => say!(
            "{target}: rebuilt, {} nodes written, {repaired} problems repaired afterwards, now clean",
            found.written_nodes
        ),
        (Some(_), count) => say!("{target}: rebuilt, but {count} problems are left"),
    }
}

/// A bar for each stage, hidden unless progress is asked for.
struct Bars {
    scan: ProgressBar,
    data: ProgressBar,
    is_told: AtomicBool,
    is_shown: bool,
}

impl Bars {
    fn new(arguments: &Arguments, device_bytes: u64) -> Self {
        let is_shown = !arguments.quiet && (arguments.progress || std::io::stderr().is_terminal());
        let bar = |length: Option<u64>, template: &str| {
            let bar = match length {
                _ if !is_shown => ProgressBar::hidden(),
                Some(length) => ProgressBar::new(length),
                None => ProgressBar::new_spinner(),
            };
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style);
            }
            bar
        };
        Self {
            scan: bar(Some(device_bytes), "scan for nodes {bar:30} {bytes} of {total_bytes} [{elapsed}, {eta} left]"),
            data: bar(None, "file data: {bytes} checked [{elapsed}, {bytes_per_sec}]"),
            is_told: AtomicBool::new(false),
            is_shown,
        }
    }

    fn on(&self, stage: Stage, bytes: u64) {
        match stage {
            Stage::Scan => self.scan.inc(bytes),
            Stage::Data | Stage::Copy => {
                self.scan.finish_and_clear();
                self.data.inc(bytes);
            }
            Stage::Write => {
                if self.is_shown && !self.is_told.swap(true, Ordering::Relaxed) {
                    self.clear();
                    complain!("writing the new trees");
                }
            }
        }
    }

    fn clear(&self) {
        self.scan.finish_and_clear();
        self.data.finish_and_clear();
    }
}
