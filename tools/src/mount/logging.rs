//! Where messages go: the terminal with `-f`, else syslog, or a file with `--log`. A panic anywhere is a message, too.

use std::fs::OpenOptions;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use tracing_subscriber::EnvFilter;

/// Whether the standard error output still is the user's.
static ON_TERMINAL: AtomicBool = AtomicBool::new(true);

/// From here on nobody reads the standard error output.
pub(super) fn leave_terminal() {
    ON_TERMINAL.store(false, Ordering::Relaxed);
}

/// `COPPICE_LOG` has the syntax of tracing's filters.
fn filter(verbose: bool) -> EnvFilter {
    let default = if verbose { "debug,fuser=info" } else { "info,fuser=warn" };
    EnvFilter::try_from_env("COPPICE_LOG").unwrap_or_else(|_| EnvFilter::new(default))
}

fn to_file(verbose: bool, path: &Path) -> anyhow::Result<()> {
    let file = OpenOptions::new()
        .append(true)
        .create(true)
        .open(path)
        .with_context(|| format!("cannot open the log {}", path.display()))?;
    let subscriber =
        tracing_subscriber::fmt().with_env_filter(filter(verbose)).with_ansi(false).with_writer(Mutex::new(file));
    // It fails if there is a subscriber already, which then is the embedding program's.
    let _ = subscriber.try_init();
    Ok(())
}

/// Logs to the terminal, or to a file.
pub(super) fn to_terminal(verbose: bool, log: Option<&Path>) -> anyhow::Result<()> {
    log_panics();
    match log {
        Some(path) => to_file(verbose, path),
        None => {
            let _ = tracing_subscriber::fmt().with_env_filter(filter(verbose)).with_writer(std::io::stderr).try_init();
            Ok(())
        }
    }
}

/// Logs to syslog, or to a file.
pub(super) fn to_system(verbose: bool, log: Option<&Path>) -> anyhow::Result<()> {
    log_panics();
    if let Some(path) = log {
        return to_file(verbose, path);
    }
    // None if there is one in this process already; its messages then go where that one sends them.
    if let Some(syslog) =
        syslog_tracing::Syslog::new(c"coppice", syslog_tracing::Options::LOG_PID, syslog_tracing::Facility::Daemon)
    {
        let _ = tracing_subscriber::fmt()
            .with_env_filter(filter(verbose))
            .with_ansi(false)
            .without_time()
            .with_level(false)
            .with_writer(syslog)
            .try_init();
    }
    Ok(())
}

fn log_panics() {
    let previous = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        let backtrace = std::backtrace::Backtrace::force_capture();
        let payload = panic.payload();
        let text =
            payload.downcast_ref::<&str>().copied().or_else(|| payload.downcast_ref::<String>().map(String::as_str));
        let message = text.unwrap_or("no message");
        tracing::error!(place, %backtrace, "panic: {message}");
        if ON_TERMINAL.load(Ordering::Relaxed) {
            previous(panic);
        }
    }));
}
