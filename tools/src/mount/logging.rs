//! Where messages go: the terminal with `-f`, else syslog, or a file with `--log`. A panic anywhere is a message, too.

use std::fmt::Debug;
use std::fs::OpenOptions;
use std::io::IsTerminal;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context as _;
use rustix::io::Errno;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

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

/// Drops one message of fuser's that is no error: a request whose process was interrupted is withdrawn by the kernel, which then knows no
/// request that our answer belongs to.
struct WithoutWithdrawn;

impl<S: Subscriber> Layer<S> for WithoutWithdrawn {
    fn event_enabled(&self, event: &Event<'_>, _: Context<'_, S>) -> bool {
        if *event.metadata().level() != Level::ERROR {
            return true;
        }
        let mut message = Message::default();
        event.record(&mut message);
        !message.is_withdrawn
    }
}

/// Looks at an event's message.
#[derive(Default)]
struct Message {
    is_withdrawn: bool,
}

impl Visit for Message {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        if field.name() == "message" {
            let text = format!("{value:?}");
            self.is_withdrawn =
                text.starts_with("Failed to send FUSE reply") && text.contains(&Errno::NOENT.to_string());
        }
    }
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
    let _ = subscriber.finish().with(WithoutWithdrawn).try_init();
    Ok(())
}

/// Logs to the terminal, or to a file.
pub(super) fn to_terminal(verbose: bool, log: Option<&Path>) -> anyhow::Result<()> {
    log_panics();
    match log {
        Some(path) => to_file(verbose, path),
        None => {
            let subscriber = tracing_subscriber::fmt()
                .with_env_filter(filter(verbose))
                .with_ansi(std::io::stderr().is_terminal())
                .with_writer(std::io::stderr)
                .finish();
            let _ = subscriber.with(WithoutWithdrawn).try_init();
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
            .with_target(false)
            .with_writer(syslog)
            .finish()
            .with(WithoutWithdrawn)
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

#[cfg(test)]
mod tests {
    use std::io::{Error, Write};
    use std::sync::Arc;

    use super::*;

    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl Write for Written {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_withdrawn_request_is_no_error() {
        let written = Written::default();
        let writer = written.clone();
        let subscriber = tracing_subscriber::fmt().with_writer(move || writer.clone()).finish();
        tracing::subscriber::with_default(subscriber.with(WithoutWithdrawn), || {
            // As fuser words it.
            for errno in [Errno::NOENT, Errno::INVAL] {
                tracing::error!("Failed to send FUSE reply: {}", Error::from(errno));
            }
            tracing::error!("something else: {}", Error::from(Errno::NOENT));
        });
        let text = String::from_utf8(written.0.lock().unwrap().clone()).unwrap();
        assert_eq!(text.lines().count(), 2, "{text}");
        assert!(text.contains("Invalid argument") && text.contains("something else"), "{text}");
    }
}
