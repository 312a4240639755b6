//! The command line of fsck, and its exit codes: those of fsck(8).

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use coppicefs::filesystem::{Filesystem, OpenOptions, WorkerSet};
use coppicefs::{Error, Result};
use indicatif::{ProgressBar, ProgressStyle};

use crate::problem::{Problem, Severity};
use crate::rebuild::command::RebuildArguments;
use crate::report::Report;
use crate::{damaged, passes, rebuild, repair};

/// Nothing is wrong.
pub const EXIT_CLEAN: u8 = 0;
/// Something was wrong, and is repaired.
pub const EXIT_REPAIRED: u8 = 1;
/// Something is wrong, and is not repaired.
pub const EXIT_UNREPAIRED: u8 = 4;
/// The check itself could not be done.
pub const EXIT_OPERATIONAL: u8 = 8;
/// The command line is wrong.
pub const EXIT_USAGE: u8 = 16;

/// Most rounds of check and repair: a repair can bring to light what it hid.
const ROUNDS_MAX: usize = 6;

/// What fsck takes on the command line.
#[derive(Args, Clone, Debug)]
#[allow(clippy::struct_excessive_bools, reason = "command-line flags")]
pub struct Arguments {
    /// Change nothing: only say what is wrong
    #[arg(short = 'n', conflicts_with_all = ["preen", "yes"])]
    pub no_changes: bool,
    /// Repair whatever can be repaired with nothing thrown away, which is all that -y repairs, too; the default without a terminal
    #[arg(short = 'p', short_alias = 'a', visible_short_alias = 'a', conflicts_with = "yes")]
    pub preen: bool,
    /// Repair everything that can be repaired
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
    /// Show a progress bar
    #[arg(short = 'C', long)]
    pub progress: bool,
    /// Read all file data, list the ranges of files that cannot be read, and do nothing else
    #[arg(long, conflicts_with_all = ["preen", "yes"])]
    pub list_damaged: bool,
    /// For images whose superblocks, checkpoints or roots are lost
    #[command(flatten)]
    pub rebuild: RebuildArguments,
    /// Image file or disk
    pub target: PathBuf,
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
        let repairable = problems.iter().filter(|problem| problem.is_repairable());
        match self {
            Self::NoChanges => Vec::new(),
            Self::Preen | Self::Yes => repairable.cloned().collect(),
            Self::Ask => {
                let mut chosen = Vec::new();
                for problem in repairable {
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
    eprint!("{}. Repair? [Y/n] ", problem.describe());
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
            let code = match error {
                Error::Corrupt(_) => EXIT_UNREPAIRED,
                _ => EXIT_OPERATIONAL,
            };
            eprintln!("fsck-coppice: {error}");
            if arguments.json {
                println!("{}", crate::report::error_to_json(&target, &error.to_string(), code));
            }
            code
        }
    }
}

/// What clap has to say, in one line.
#[must_use]
pub fn in_one_line(error: &clap::Error) -> String {
    let text = error.to_string();
    let said: Vec<_> = text.lines().take_while(|line| !line.is_empty()).map(str::trim).collect();
    format!("{} (--help says how)", said.join(" ").trim_start_matches("error: "))
}

fn run_checked(arguments: &Arguments, target: &str) -> Result<u8> {
    if arguments.rebuild.rebuild {
        return rebuild::command::run(arguments, target);
    }
    let mode = Mode::of(arguments);
    let filesystem = open(&arguments.target, mode)?;
    let outcome = if arguments.list_damaged {
        list_damaged(arguments, target, &filesystem)
    } else {
        rounds(arguments, target, mode, &filesystem)
    };
    let closed = filesystem.close();
    let code = outcome?;
    closed?;
    Ok(code)
}

fn open(target: &Path, mode: Mode) -> Result<Arc<Filesystem>> {
    let options =
        OpenOptions { read_only: mode == Mode::NoChanges, workers: WorkerSet::Essential, ..OpenOptions::default() };
    Filesystem::open_path(target, &options)
}

fn rounds(arguments: &Arguments, target: &str, mode: Mode, filesystem: &Filesystem) -> Result<u8> {
    let mut first: Option<Report> = None;
    let mut repaired = 0;
    let mut code = EXIT_CLEAN;
    let mut declined = Vec::new();
    for _ in 0..ROUNDS_MAX {
        let report = check_with_progress(arguments, filesystem)?;
        let problems: Vec<Problem> = report.problems.clone();
        let known = |problem: &Problem| first.as_ref().is_some_and(|first| first.problems.contains(problem));
        if !arguments.json {
            for problem in problems.iter().filter(|problem| !known(problem)) {
                println!("{target}: {}: {}", problem.id(), problem.describe());
            }
        }
        let chosen = mode.choose(&problems, &mut declined);
        // As fsck(8) has it, the sum.
        code = if repaired > 0 { EXIT_REPAIRED } else { EXIT_CLEAN }
            + if problems.is_empty() { EXIT_CLEAN } else { EXIT_UNREPAIRED };
        match &mut first {
            None => first = Some(report),
            Some(first) => {
                let new: Vec<_> = problems.into_iter().filter(|problem| !first.problems.contains(problem)).collect();
                first.problems.extend(new);
            }
        }
        if chosen.is_empty() {
            break;
        }
        repaired += repair::repair(filesystem, &chosen)?;
    }
    if let Some(report) = &first {
        print_report(arguments, target, report, repaired, code);
    }
    Ok(code)
}

fn list_damaged(arguments: &Arguments, target: &str, filesystem: &Filesystem) -> Result<u8> {
    let bar = bar(arguments, filesystem.usage().data_bytes, "{bar:30} {bytes} [{elapsed}, {eta} left]");
    let outcome = damaged::find(filesystem, &|bytes| bar.inc(bytes));
    bar.finish_and_clear();
    let (damaged, read_bytes) = outcome?;
    let code = if damaged.is_empty() { EXIT_CLEAN } else { EXIT_UNREPAIRED };
    if arguments.json {
        println!("{}", crate::report::damaged_to_json(target, &damaged, read_bytes, code));
        return Ok(code);
    }
    for range in &damaged {
        println!("{target}: {}", range.describe());
    }
    if !arguments.quiet {
        let read = humansize::format_size(read_bytes, humansize::BINARY);
        let lost: u64 = damaged.iter().map(|range| range.end - range.start).sum();
        match damaged.len() {
            0 => println!("{target}: all {read} of file data can be read"),
            count => println!(
                "{target}: {count} ranges of files cannot be read, {} of {read}: restore those files from a backup, or delete them",
                humansize::format_size(lost, humansize::BINARY)
            ),
        }
    }
    Ok(code)
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
    let bar = bar(arguments, passes::PASSES.len() as u64, "{bar:30} pass {pos}/{len} {msg} [{elapsed}]");
    let report = passes::check(filesystem, &|number, _, name, examined| {
        bar.set_position(number as u64);
        bar.set_message(format!("{name}: {examined}"));
    });
    bar.finish_and_clear();
    report
}

fn print_report(arguments: &Arguments, target: &str, report: &Report, repaired: usize, code: u8) {
    if arguments.json {
        match report.to_json(target, repaired, code) {
            Ok(json) => println!("{json}"),
            Err(error) => eprintln!("fsck-coppice: {error}"),
        }
        return;
    }
    if arguments.quiet {
        return;
    }
    if arguments.verbose {
        for pass in &report.passes {
            println!(
                "{target}: pass {}: {} examined in {:.3} s",
                pass.name,
                pass.examined,
                pass.duration.as_secs_f64()
            );
        }
    }
    let [directories, regular, links, others] = report.inode_counts;
    let size = humansize::format_size(report.data_bytes, humansize::BINARY);
    let summary =
        format!("{directories} directories, {regular} files, {links} symbolic links, {others} others, {size} of data");
    let worst = report.problems.iter().map(Problem::severity).max();
    match code {
        EXIT_CLEAN => println!("{target}: clean, {summary}"),
        EXIT_REPAIRED => println!("{target}: {repaired} problems repaired, now clean, {summary}"),
        _ if worst == Some(Severity::Damage) => println!(
            "{target}: {} problems, some of which are damage that this version of fsck cannot repair: copy what is readable from a mount with -o ro, {summary}",
            report.problems.len()
        ),
        _ => println!("{target}: {} problems left: run fsck-coppice -y {target}, {summary}", report.problems.len()),
    }
}
