//! The command line of fsck, and its exit codes: those of fsck(8).

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use coppicefs::btree::NodeReader;
use coppicefs::device::{BlockDevice, FileOptions};
use coppicefs::filesystem::{Filesystem, KnownInUse, OpenOptions, WorkerSet};
use coppicefs::format::journal::AccountingCounter;
use coppicefs::recovery::superblock;
use coppicefs::{Error, Result};
use indicatif::{ProgressBar, ProgressStyle};

use crate::damaged::Damaged;
use crate::overlay::Overlay;
use crate::passes::{CheckOptions, Progress};
use crate::problem::{Problem, Severity};
use crate::rebuild::command::RebuildArguments;
use crate::repair::Loss;
use crate::repair::map::lost_map;
use crate::report::{Report, Summary};
use crate::session::{Outcome, Session};
use crate::{damaged, passes, rebuild, session};

/// Nothing is wrong.
pub const EXIT_CLEAN: u8 = 0;
/// Something was wrong, and is repaired.
pub const EXIT_REPAIRED: u8 = 1;
/// Something is wrong, and is not repaired.
pub const EXIT_UNREPAIRED: u8 = 4;
/// The check itself could not be done, or something is left that takes `--rebuild`.
pub const EXIT_OPERATIONAL: u8 = 8;
/// The command line is wrong.
pub const EXIT_USAGE: u8 = 16;

/// What fsck takes on the command line.
#[derive(Args, Clone, Debug)]
#[allow(clippy::struct_excessive_bools, reason = "command-line flags")]
pub struct Arguments {
    /// Change nothing: say what is wrong, all of what -y would repair
    #[arg(short = 'n', conflicts_with_all = ["preen", "yes"])]
    pub no_changes: bool,
    /// Repair whatever can be repaired with nothing thrown away; the default without a terminal
    #[arg(short = 'p', short_alias = 'a', visible_short_alias = 'a', conflicts_with = "yes")]
    pub preen: bool,
    /// Repair everything that can be repaired without a scan of the whole device; what is lost by it is listed, and reading it is an error
    #[arg(short = 'y')]
    pub yes: bool,
    /// Check even if it was unmounted in order (which is what happens anyway: a check always looks at everything)
    #[arg(short = 'f')]
    pub force: bool,
    /// Say more: each pass, with its time
    #[arg(short = 'v', long)]
    pub verbose: bool,
    /// Say nothing but errors
    #[arg(short = 'q', long)]
    pub quiet: bool,
    /// The report as JSON on standard output
    #[arg(long)]
    pub json: bool,
    /// Show a progress bar, with an estimate of the time left
    #[arg(short = 'C', long)]
    pub progress: bool,
    /// Memory for what grows with the number of inodes, and for the nodes that are cached (512M): with less, names are looked at several times. 8
    /// bytes for each inode, 16 more for each directory and 100 for each bucket in use come on top
    #[arg(long, value_name = "SIZE", value_parser = parse_memory, default_value = "512M")]
    pub memory: u64,
    /// Read all file data, list the ranges of files that cannot be read, and do nothing else; where the trees are damaged, too, as -y would leave them
    #[arg(long, conflicts_with_all = ["preen", "yes"])]
    pub list_damaged: bool,
    /// For images whose superblocks, checkpoints or roots are lost
    #[command(flatten)]
    pub rebuild: RebuildArguments,
    /// Image file or disk
    pub target: PathBuf,
}

/// What the exit codes mean, for `--help`.
pub const EXIT_CODES: &str = "\
Exit codes, as fsck(8) has them: 0 nothing is wrong; 1 problems were repaired; 4 problems are left (always with -n), 5 if others were repaired; \
8 the check could not be made or its report not be written, or what is left takes --rebuild; 16 the command line is wrong. With --rebuild: 1 it is rebuilt and clean; 4 with -n, \
there is something to rebuild; 8 it cannot be.";

/// Fewest bytes that `--memory` takes: nodes of a transaction must fit.
const MEMORY_BYTES_MIN: u64 = 16 << 20;

fn parse_memory(text: &str) -> std::result::Result<u64, String> {
    let bytes = parse_size::Config::new().with_binary().parse_size(text).map_err(|error| error.to_string())?;
    if bytes < MEMORY_BYTES_MIN {
        return Err(format!(
            "{text} is too little: at least {}",
            humansize::format_size(MEMORY_BYTES_MIN, humansize::BINARY)
        ));
    }
    Ok(bytes)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    NoChanges,
    Preen,
    Yes,
    Ask,
}

impl Mode {
    fn of(arguments: &Arguments) -> Self {
        match arguments {
            Arguments { no_changes: true, .. } | Arguments { list_damaged: true, .. } => Self::NoChanges,
            Arguments { preen: true, .. } => Self::Preen,
            Arguments { yes: true, .. } => Self::Yes,
            _ if std::io::stdin().is_terminal() => Self::Ask,
            _ => Self::Preen,
        }
    }

    /// Which of these to repair. Nobody is asked about the same problem twice.
    fn choose(self, problems: &[Problem], declined: &mut Vec<Problem>) -> Vec<Problem> {
        match self {
            // On a device that forgets it.
            Self::NoChanges | Self::Yes => problems.to_vec(),
            Self::Preen => problems.iter().filter(|problem| problem.severity() < Severity::Damage).cloned().collect(),
            Self::Ask => {
                let mut chosen = Vec::new();
                for problem in problems {
                    if !declined.contains(problem) {
                        if ask(problem) { &mut chosen } else { &mut *declined }.push(problem.clone());
                    }
                }
                chosen
            }
        }
    }
}

fn ask(problem: &Problem) -> bool {
    let mut answer = String::new();
    let _ = write!(std::io::stderr(), "{}. Repair? [Y/n] ", problem.describe());
    match std::io::stdin().read_line(&mut answer) {
        Ok(count) if count > 0 => !matches!(answer.trim(), "n" | "N" | "no"),
        _ => false,
    }
}

/// Runs fsck, prints its report, and returns its exit code.
#[must_use]
pub fn run(arguments: &Arguments) -> u8 {
    let target = arguments.target.display().to_string();
    match run_checked(arguments, &target) {
        Ok(code) => code,
        Err(error) => {
            let takes_rebuild = error.is_media_error() || error.to_string().starts_with("no copy of the superblock");
            let hint = if takes_rebuild {
                format!("; fsck-coppice --rebuild {target} scans for what is left")
            } else {
                String::new()
            };
            complain!("fsck-coppice: {error}{hint}");
            if arguments.json {
                let said = format!("{error}{hint}");
                say!("{}", crate::report::error_to_json(&target, &said, EXIT_OPERATIONAL));
            }
            EXIT_OPERATIONAL
        }
    }
}

fn run_checked(arguments: &Arguments, target: &str) -> Result<u8> {
    if arguments.rebuild.rebuild {
        return rebuild::command::run(arguments, target);
    }
    let mode = Mode::of(arguments);
    let options = FileOptions { read_only: mode == Mode::NoChanges, ..FileOptions::default() };
    let device: Arc<dyn BlockDevice> = Arc::new(Filesystem::open_device_waiting(&arguments.target, &options)?);
    let (device, before) = match with_map(arguments, target, mode, device)? {
        Ok(prepared) => prepared,
        Err(code) => return Ok(code),
    };
    // Looked at first with nothing written: what is found to be in use is known before anything is.
    let filesystem = match open(arguments, &device, true, KnownInUse::default()) {
        Ok(filesystem) => filesystem,
        Err(error) if error.is_media_error() => return Ok(unopenable(arguments, target, &device, &error)),
        Err(error) => return Err(error),
    };
    let listed = arguments.list_damaged.then(|| list_damaged(arguments, target, &filesystem, 0));
    let outcome = match listed {
        // Which files a lost node of the trees is about is found by a repair, in memory.
        Some(Err(error)) if error.is_media_error() => check_with_progress(arguments, &filesystem)
            .and_then(|report| if report.is_clean() { Err(error) } else { Ok(Ok(report)) }),
        Some(listed) => listed.map(Err),
        None => check_with_progress(arguments, &filesystem).map(Ok),
    };
    let was_closed = filesystem.opening().newest.clean && filesystem.replayed().records == 0;
    let closed = filesystem.close();
    drop(filesystem);
    let report = match outcome? {
        Ok(report) => report,
        Err(code) => return Ok(code),
    };
    closed?;
    if report.is_clean() {
        if mode != Mode::NoChanges && !was_closed {
            open(arguments, &device, false, KnownInUse::default())?.close()?;
        }
        let mut outcome = Outcome { report: report.clone(), last: report, ..Outcome::default() };
        outcome.repaired_before(before);
        let code = if outcome.problems.is_empty() { EXIT_CLEAN } else { exit_code(mode, &outcome) };
        print_report(arguments, target, mode, &outcome, &[], code);
        return Ok(code);
    }
    let device = if mode == Mode::NoChanges { Arc::new(Overlay::new(device)) as _ } else { device };
    let filesystem = open(arguments, &device, false, report.known_in_use.clone())?;
    let outcome = rounds(arguments, target, mode, &filesystem, report);
    if arguments.list_damaged {
        let code = outcome.and_then(|outcome| list_after(arguments, target, &filesystem, &outcome));
        filesystem.close()?;
        return code;
    }
    let lost = outcome.as_ref().map_or(Ok(Vec::new()), |outcome| lost(&filesystem, outcome));
    let closed = filesystem.close();
    let mut outcome = outcome?;
    closed?;
    outcome.repaired_before(before);
    let code = exit_code(mode, &outcome);
    print_report(arguments, target, mode, &outcome, &lost?, code);
    Ok(code)
}

/// A device, and what was repaired on it before it could be opened.
type Prepared = (Arc<dyn BlockDevice>, Vec<Problem>);

/// The device with a node-space map, and roots, made again if they are lost: with `-n` in memory. An exit code if nothing more can be done.
fn with_map(
    arguments: &Arguments,
    target: &str,
    mode: Mode,
    device: Arc<dyn BlockDevice>,
) -> Result<std::result::Result<Prepared, u8>> {
    let lost = lost_map(std::slice::from_ref(&device))?;
    let Some(lost) = lost else { return Ok(Ok((device, Vec::new()))) };
    let problems = lost.problems().to_vec();
    if !arguments.json && !arguments.list_damaged {
        problems.iter().for_each(|problem| say!("{target}: {}: {}", problem.id(), problem.describe()));
    }
    if mode.choose(&problems, &mut Vec::new()).len() < problems.len() {
        let outcome = Outcome { problems: problems.clone(), left: problems, ..Outcome::default() };
        let code = exit_code(mode, &outcome);
        print_report(arguments, target, mode, &outcome, &[], code);
        return Ok(Err(code));
    }
    let device = if mode == Mode::NoChanges { Arc::new(Overlay::new(device)) as _ } else { device };
    match lost.repair(std::slice::from_ref(&device)) {
        Ok(()) => Ok(Ok((device, problems))),
        Err(error) if error.is_media_error() => Ok(Err(unopenable(arguments, target, &device, &error))),
        Err(error) => Err(error),
    }
}

fn exit_code(mode: Mode, outcome: &Outcome) -> u8 {
    match mode {
        Mode::NoChanges => EXIT_UNREPAIRED,
        Mode::Yes if outcome.needs_rebuild() => EXIT_OPERATIONAL,
        // As fsck(8) has it, the sum.
        _ => {
            let repaired = if outcome.repaired > 0 { EXIT_REPAIRED } else { EXIT_CLEAN };
            repaired + if outcome.left.is_empty() { EXIT_CLEAN } else { EXIT_UNREPAIRED }
        }
    }
}

fn open(
    arguments: &Arguments,
    device: &Arc<dyn BlockDevice>,
    read_only: bool,
    known_in_use: KnownInUse,
) -> Result<Arc<Filesystem>> {
    let options = OpenOptions {
        read_only,
        workers: WorkerSet::Essential,
        known_in_use,
        // A quarter of it is for nodes.
        cache_bytes: passes::node_cache_bytes(arguments.memory).saturating_mul(4),
        for_repair: true,
        ..OpenOptions::default()
    };
    Filesystem::open(vec![Arc::clone(device)], &options)
}

/// A filesystem that does not open can only be rebuilt. Says what it is that is damaged.
fn unopenable(arguments: &Arguments, target: &str, device: &Arc<dyn BlockDevice>, error: &Error) -> u8 {
    let reason = error.to_string();
    let chosen = superblock::read(&**device).and_then(|found| {
        let metrics = Arc::new(coppicefs::metrics::Metrics::default());
        NodeReader::new(Arc::new(found.superblock), vec![Arc::clone(device)], metrics).choose_checkpoint()
    });
    let problem = match chosen {
        Ok(_) => Problem::JournalDamaged { reason },
        Err(_) => Problem::CheckpointUnusable { reason },
    };
    if !arguments.json {
        say!("{target}: {}: {}", problem.id(), problem.describe());
    }
    let outcome = Outcome { problems: vec![problem.clone()], left: vec![problem], ..Outcome::default() };
    print_report(arguments, target, Mode::of(arguments), &outcome, &[], EXIT_OPERATIONAL);
    EXIT_OPERATIONAL
}

fn rounds(arguments: &Arguments, target: &str, mode: Mode, filesystem: &Filesystem, first: Report) -> Result<Outcome> {
    let mut declined = Vec::new();
    let mut session = Session {
        check: &mut || check_with_progress(arguments, filesystem),
        choose: &mut |problems| mode.choose(problems, &mut declined),
        found: &mut |problem| {
            if !arguments.json && !arguments.list_damaged {
                say!("{target}: {}: {}", problem.id(), problem.describe());
            }
        },
    };
    session::run(filesystem, Some(first), &mut session)
}

/// The losses with the paths of their files.
fn lost(filesystem: &Filesystem, outcome: &Outcome) -> Result<Vec<Damaged>> {
    let reason = "the data is lost, reading it is an error";
    let with_path = |loss: &Loss| {
        let path = damaged::path(filesystem, loss.inode)?;
        Ok(Damaged { path, inode: loss.inode, start: loss.start, end: loss.end, reason: reason.into() })
    };
    outcome.losses.iter().map(with_path).collect()
}

/// Lists them where the trees were damaged, too, and are repaired in memory.
fn list_after(arguments: &Arguments, target: &str, filesystem: &Filesystem, outcome: &Outcome) -> Result<u8> {
    if outcome.needs_rebuild() {
        print_report(arguments, target, Mode::NoChanges, outcome, &[], EXIT_OPERATIONAL);
        return Ok(EXIT_OPERATIONAL);
    }
    list_damaged(arguments, target, filesystem, outcome.problems.len())
}

/// `problems` of the trees are repaired in memory alone.
fn list_damaged(arguments: &Arguments, target: &str, filesystem: &Filesystem, problems: usize) -> Result<u8> {
    let bar = bar(arguments, logical_bytes(filesystem), "{bar:30} {bytes} of {total_bytes} [{elapsed}, {eta} left]");
    let outcome = damaged::find(filesystem, &|bytes| bar.inc(bytes));
    bar.finish_and_clear();
    let (damaged, read_bytes) = outcome?;
    let code = if damaged.is_empty() && problems == 0 { EXIT_CLEAN } else { EXIT_UNREPAIRED };
    if arguments.json {
        say!("{}", crate::report::damaged_to_json(target, &damaged, read_bytes, problems, code));
        return Ok(code);
    }
    for range in &damaged {
        say!("{target}: {}", range.describe());
    }
    if !arguments.quiet {
        let read = humansize::format_size(read_bytes, humansize::BINARY);
        let lost: u64 = damaged.iter().map(|range| range.end - range.start).sum();
        match damaged.len() {
            0 => say!("{target}: all {read} of file data can be read"),
            count => say!(
                "{target}: {count} ranges of files cannot be read, {} of {read}: restore those files from a backup, or delete them",
                humansize::format_size(lost, humansize::BINARY)
            ),
        }
        if problems > 0 {
            say!(
                "{target}: there are {problems} problems of the trees, too, and nothing was changed: the paths are those after fsck-coppice -y {target}, which repairs them"
            );
        }
    }
    Ok(code)
}

/// Bytes of file data that reading all of it will read: of compressed data what it is when it is decoded.
fn logical_bytes(filesystem: &Filesystem) -> u64 {
    let totals = filesystem.totals();
    let [stored, logical, disk] = [
        AccountingCounter::DataBytes,
        AccountingCounter::CompressedLogicalBytes,
        AccountingCounter::CompressedDiskBytes,
    ]
    .map(|counter| u64::try_from(totals.get(counter)).unwrap_or(0));
    stored.saturating_add(logical).saturating_sub(disk)
}

/// A progress bar, hidden unless it is asked for.
fn bar(arguments: &Arguments, length: u64, template: &str) -> ProgressBar {
    if !arguments.progress || arguments.quiet {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(length);
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar
}

fn check_with_progress(arguments: &Arguments, filesystem: &Filesystem) -> Result<Report> {
    let template = "{bar:30} {percent}% {msg} [{elapsed}, {eta} left]";
    let bar = bar(arguments, 0, template);
    let options = CheckOptions { memory_bytes: arguments.memory };
    let report = passes::check_with(filesystem, &options, &|at: Progress| {
        bar.set_length(at.total);
        bar.set_position(at.done);
        bar.set_message(at.name);
    });
    bar.finish_and_clear();
    report
}

fn print_report(arguments: &Arguments, target: &str, mode: Mode, outcome: &Outcome, lost: &[Damaged], code: u8) {
    let report = if mode == Mode::NoChanges { &outcome.report } else { &outcome.last };
    if arguments.json {
        let repaired = if mode == Mode::NoChanges { 0 } else { outcome.repaired };
        let summary = Summary { target, problems: &outcome.problems, lost, repaired, exit_code: code };
        match report.to_json(&summary) {
            Ok(json) => say!("{json}"),
            Err(error) => complain!("fsck-coppice: {error}"),
        }
        return;
    }
    for range in lost {
        say!("{target}: lost: {}", range.describe());
    }
    for (problem, reason) in &outcome.failed {
        say!("{target}: {} is not repaired: {reason}", problem.id());
    }
    if arguments.quiet {
        return;
    }
    if arguments.verbose {
        for pass in &report.passes {
            say!("{target}: pass {}: {} examined in {:.3} s", pass.name, pass.examined, pass.duration.as_secs_f64());
        }
    }
    let [directories, regular, links, others] = report.inode_counts;
    let size = humansize::format_size(report.data_bytes, humansize::BINARY);
    let summary =
        format!("{directories} directories, {regular} files, {links} symbolic links, {others} others, {size} of data");
    let count = outcome.problems.len();
    let rebuild = outcome.needs_rebuild();
    match code {
        EXIT_CLEAN => say!("{target}: clean, {summary}"),
        EXIT_REPAIRED => say!("{target}: {} problems repaired, now clean, {summary}", outcome.repaired),
        _ if rebuild => say!(
            "{target}: {count} problems, some of which take a scan of the whole device: `coppice restore {target} DIR` copies out what can be read, then run fsck-coppice --rebuild {target}"
        ),
        _ if mode == Mode::NoChanges => {
            say!("{target}: {count} problems, nothing was changed: fsck-coppice -y {target} repairs them, {summary}");
        }
        _ => say!("{target}: {} problems left: run fsck-coppice -y {target}, {summary}", outcome.left.len()),
    }
}
