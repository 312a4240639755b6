//! What the programs print. The library itself prints nothing.
//!
//! 1. *Printing ends no program*, whatever it is in the middle of: there is no panic, as `println!` has one, and no signal.
//! 2. *A reader who has gone is no error* (`| head -1`): what follows is thrown away. Who prints much asks [`is_wanted`] now and then.
//! 3. *Anything else that cannot be written is told* (`> /dev/full`): the first failure is kept, nothing is written after it, and
//!    [`end`], the last act of each program, says so and makes it the exit code.
//!
//! Standard output belongs to the process, and so does what is kept here. No lock but that of the stream, for one line.

use std::fmt::Arguments;
use std::io::{self, ErrorKind, IsTerminal, Write};
use std::process::ExitCode;
use std::sync::OnceLock;

/// Why nothing can be written to standard output any more.
static FAILURE: OnceLock<io::Error> = OnceLock::new();

/// Prints a line on standard output, as `println!` does; see [`coppicefs::output`](crate::output) for what cannot be written.
#[macro_export]
macro_rules! say {
    ($($text:tt)*) => { $crate::output::line(format_args!($($text)*)) };
}

/// Prints a line on standard error, as `eprintln!` does; what cannot be written there cannot be told anywhere.
#[macro_export]
macro_rules! complain {
    ($($text:tt)*) => { $crate::output::error_line(format_args!($($text)*)) };
}

/// What the parser of a command line has to say, without its hints.
#[must_use]
pub fn in_one_line(text: &str) -> String {
    let said: Vec<_> = text.lines().take_while(|line| !line.is_empty()).map(str::trim).collect();
    format!("{} (--help says how)", said.join(" ").trim_start_matches("error: "))
}

/// Keeps the first failure of standard output.
pub fn keep(outcome: io::Result<()>) {
    if let Err(error) = outcome {
        let _ = FAILURE.set(error);
    }
}

/// Whether what is printed still goes anywhere.
#[must_use]
pub fn is_wanted() -> bool {
    FAILURE.get().is_none()
}

/// From here on warnings (a wait for a daemon that is finishing, a damaged copy) go to standard error. For a program, at its start.
pub fn warn_on_terminal() {
    let _ = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::WARN)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .without_time()
        .with_target(false)
        .try_init();
}

/// What `say!` does.
pub fn line(text: Arguments<'_>) {
    if is_wanted() {
        keep(writeln!(io::stdout(), "{text}"));
    }
}

/// What `complain!` does.
pub fn error_line(text: Arguments<'_>) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// Standard output for whoever takes a writer. Never fails: failures are kept.
#[derive(Debug, Clone, Copy)]
pub struct Output;

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if is_wanted() {
            keep(io::stdout().write_all(bytes));
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if is_wanted() {
            keep(io::stdout().flush());
        }
        Ok(())
    }
}

/// The end of a program: its exit code, or `unwritten`, with a line that says why, if somebody could not be given what it printed.
#[must_use]
pub fn end(program: &str, code: ExitCode, unwritten: u8) -> ExitCode {
    let _ = Output.flush();
    match FAILURE.get() {
        Some(error) if error.kind() != ErrorKind::BrokenPipe => {
            complain!("{program}: cannot write to standard output: {error}");
            ExitCode::from(unwritten)
        }
        _ => code,
    }
}
