//! `coppice scrub`: reads and verifies everything, of a mount while it is used or of an image, and repairs what has another copy.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Args;
use coppicefs::filesystem::{Filesystem, OpenOptions, WorkerSet};
use coppicefs::fuse::client;
use coppicefs::options::parse_size;
use coppicefs::vfs::{ScrubAsk, ScrubControl as _, ScrubPage, ScrubReport, ScrubRequest, ScrubState, ScrubStatus};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use signal_hook::consts::{SIGINT, SIGTERM};

use crate::{output, place};

/// Everything is as it should be.
pub const EXIT_CLEAN: u8 = 0;
/// Something was not, and is repaired.
pub const EXIT_REPAIRED: u8 = 1;
/// Something is damaged and cannot be repaired.
pub const EXIT_DAMAGED: u8 = 4;
/// The scrub could not be made, or did not come to its end.
pub const EXIT_OPERATIONAL: u8 = 8;

/// How often it is looked at.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// What `coppice scrub` takes.
#[derive(Args, Clone, Debug)]
#[command(
    after_help = "Of a mount, the daemon scrubs, beside whatever else it does. Cancelled, interrupted (Ctrl-C) or ended by unmounting, \
                  the next scrub of the mount or of the image goes on where it stopped. The place is kept in \
                  $COPPICE_STATE_DIRECTORY, else in /var/lib/coppice for root and in $XDG_STATE_HOME/coppice or \
                  ~/.local/state/coppice for others.\n\n\
                  Exit codes: 0 everything is as it should be, 1 all that was not is repaired, 4 damage remains, 8 the scrub did not come to its end, or its report could not be written."
)]
#[allow(clippy::struct_excessive_bools, reason = "command-line flags")]
pub struct Arguments {
    /// Read at most so much a second, e.g. 50M
    #[arg(long, value_name = "SIZE")]
    rate: Option<String>,
    /// Begin from the beginning, also if a cancelled scrub could go on
    #[arg(long, conflicts_with_all = ["cancel", "status"])]
    restart: bool,
    /// Stop the scrub that is running on this mount
    #[arg(long, conflicts_with_all = ["rate", "status"])]
    cancel: bool,
    /// Show how far the scrub of this mount is, and what the last one found
    #[arg(long, conflicts_with = "rate")]
    status: bool,
    /// The report as JSON on standard output
    #[arg(long)]
    json: bool,
    /// Say nothing but what is damaged
    #[arg(short, long)]
    quiet: bool,
    /// Mountpoint, or image file or disk that is not mounted
    target: PathBuf,
}

/// Who is asked: a daemon, or the filesystem in this process.
type Ask<'a> = &'a dyn Fn(ScrubAsk, u64) -> coppicefs::Result<ScrubPage>;

/// Runs it; returns the exit code.
#[must_use]
pub fn run(arguments: &Arguments) -> u8 {
    let outcome = if arguments.target.is_dir() { scrub_mount(arguments) } else { scrub_image(arguments) };
    outcome.unwrap_or_else(|error| {
        complain!("coppice: {error:#}");
        EXIT_OPERATIONAL
    })
}

fn scrub_mount(arguments: &Arguments) -> anyhow::Result<u8> {
    let ask = |ask, cursor| client::scrub(&arguments.target, ScrubRequest { ask, cursor });
    if arguments.cancel {
        let page = ask(ScrubAsk::Cancel, 0)?;
        if !matches!(page.status.state, ScrubState::Cancelled) {
            say!("{}: no scrub is running", arguments.target.display());
        }
        return Ok(EXIT_CLEAN);
    }
    if arguments.status {
        let (status, findings) = everything(&ask)?;
        return report(arguments, &status, &findings);
    }
    follow(arguments, &ask)
}

fn scrub_image(arguments: &Arguments) -> anyhow::Result<u8> {
    if arguments.cancel || arguments.status {
        bail!(
            "{} is not a mountpoint: the scrub of an image lives in the program that makes it",
            arguments.target.display()
        );
    }
    let options = place::kept(OpenOptions { workers: WorkerSet::Essential, ..OpenOptions::default() });
    let filesystem: Arc<Filesystem> = Filesystem::open_path(&arguments.target, &options)?;
    let scrub = filesystem.scrub();
    let outcome = follow(arguments, &|ask, cursor| scrub.control(ScrubRequest { ask, cursor }));
    let closed = filesystem.close();
    let code = outcome?;
    closed?;
    Ok(code)
}

/// Starts a scrub and waits for its end, or for an interruption, which cancels it.
fn follow(arguments: &Arguments, ask: Ask<'_>) -> anyhow::Result<u8> {
    let rate_bytes = arguments.rate.as_deref().map(parse_size).transpose()?.unwrap_or(0);
    let is_interrupted = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&is_interrupted)).context("cannot wait for signals")?;
    }
    let started = ask(ScrubAsk::Start { restart: arguments.restart, rate_bytes }, 0);
    let mut status = match started {
        Err(error) if error.errno() == rustix::io::Errno::BUSY => {
            bail!(
                "a scrub is running on {} already: --status shows how far it is, --cancel stops it",
                arguments.target.display()
            )
        }
        started => started?.status,
    };
    if !status.notice.is_empty() {
        complain!("coppice: warning: {}; the scrub begins anew", status.notice);
    }
    if status.resumed && !arguments.quiet {
        complain!("going on where the last scrub stopped, in {} (--restart begins anew)", status.phase);
    }
    let bar = if arguments.quiet { ProgressBar::hidden() } else { ProgressBar::new(status.bytes_total) };
    if let Ok(style) =
        ProgressStyle::with_template("{msg:11} {bar:30} {bytes}/{total_bytes} {bytes_per_sec} [{elapsed}, {eta} left]")
    {
        bar.set_style(style);
    }
    while status.state == ScrubState::Running {
        std::thread::sleep(POLL_INTERVAL);
        let asked = if is_interrupted.load(Ordering::Relaxed) { ScrubAsk::Cancel } else { ScrubAsk::Status };
        status = ask(asked, u64::MAX)?.status;
        bar.set_length(status.bytes_total);
        bar.set_position(status.bytes);
        bar.set_message(status.phase.clone());
    }
    bar.finish_and_clear();
    let (status, findings) = everything(ask)?;
    report(arguments, &status, &findings)
}

/// The status, and all findings, page by page.
fn everything(ask: Ask<'_>) -> coppicefs::Result<(ScrubStatus, Vec<ScrubReport>)> {
    let mut findings = Vec::new();
    let mut cursor = 0;
    loop {
        let page = ask(ScrubAsk::Status, cursor)?;
        findings.extend(page.findings);
        if page.next <= cursor || page.next >= page.finding_count {
            return Ok((page.status, findings));
        }
        cursor = page.next;
    }
}

#[derive(Serialize)]
struct JsonFinding<'a> {
    kind: &'a str,
    repaired: bool,
    path: &'a str,
    inode: u64,
    start: u64,
    end: u64,
    reason: &'a str,
}

#[derive(Serialize)]
struct JsonReport<'a> {
    target: String,
    state: &'a str,
    phase: &'a str,
    resumed: bool,
    exit_code: u8,
    #[serde(flatten)]
    totals: place::Totals,
    elapsed_seconds: f64,
    /// When it ended, in seconds since 1970; null if it has not.
    ended_at: Option<i64>,
    failure: &'a str,
    findings: Vec<JsonFinding<'a>>,
}

fn report(arguments: &Arguments, status: &ScrubStatus, findings: &[ScrubReport]) -> anyhow::Result<u8> {
    let code = match status.state {
        ScrubState::Failed => EXIT_OPERATIONAL,
        _ if status.damaged > 0 => EXIT_DAMAGED,
        ScrubState::Cancelled if !arguments.status => EXIT_OPERATIONAL,
        _ if status.repaired > 0 => EXIT_REPAIRED,
        _ => EXIT_CLEAN,
    };
    let target = arguments.target.display().to_string();
    if arguments.json {
        let findings = findings.iter().map(|finding| JsonFinding {
            kind: &finding.kind,
            repaired: finding.is_repaired,
            path: &finding.path,
            inode: finding.inode,
            start: finding.start,
            end: finding.end,
            reason: &finding.reason,
        });
        output::json(&JsonReport {
            target,
            state: status.state.name(),
            phase: &status.phase,
            resumed: status.resumed,
            exit_code: code,
            totals: place::Totals::of(status),
            elapsed_seconds: std::time::Duration::from_millis(status.elapsed_ms).as_secs_f64(),
            ended_at: (status.ended_at != 0).then_some(status.ended_at),
            failure: &status.failure,
            findings: findings.collect(),
        })?;
        return Ok(code);
    }
    for finding in findings {
        say!("{target}: {}", finding.describe());
    }
    let further = (status.repaired + status.damaged).saturating_sub(findings.len() as u64);
    if further > 0 {
        say!("{target}: and {further} more, of which only the number is kept");
    }
    if !arguments.quiet {
        let ended = match status.ended_at {
            seconds if arguments.status && seconds != 0 => format!(" (ended {})", output::time(seconds)),
            _ => String::new(),
        };
        say!("{target}: {}{ended}", summary(status));
    }
    Ok(code)
}

fn summary(status: &ScrubStatus) -> String {
    let seconds = Duration::from_millis(status.elapsed_ms).as_secs_f64();
    let read = format!(
        "{} of data, {} nodes in {} copies read in {seconds:.1} s",
        output::size(status.data_bytes),
        status.nodes,
        status.copies
    );
    let outcome = match (status.damaged, status.repaired) {
        (0, 0) => "nothing is damaged".to_owned(),
        (0, repaired) => format!("{repaired} repaired, nothing else is damaged"),
        (damaged, repaired) => format!("{damaged} damaged, {repaired} repaired"),
    };
    let unchecked = match status.unchecked_bytes {
        0 => String::new(),
        bytes => format!("; {} of data have no checksum, and could be read", output::size(bytes)),
    };
    match status.state {
        ScrubState::Never => "no scrub was made, as far as is known".to_owned(),
        ScrubState::Running => {
            let share = status.bytes * 100 / status.bytes_total.max(1);
            format!("running ({}), {share}%: {read}; so far {outcome}", status.phase)
        }
        ScrubState::Cancelled => format!("cancelled ({}): {read}; until then {outcome}{unchecked}", status.phase),
        ScrubState::Failed => format!("could not go on: {}; {read}; until then {outcome}", status.failure),
        ScrubState::Done => format!("{outcome}: {read}{unchecked}"),
    }
}
