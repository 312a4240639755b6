//! The daemon in the background: it is this program, started again with `--daemon`, whose standard output is a pipe to the process
//! that the user waits for. It writes `ok` when the mount is usable, or one line that says why it is not.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, bail};

use super::{EXIT_FAILURE, logging};

const USABLE: &str = "ok\n";

/// Starts the daemon and waits until its mount is usable.
pub(super) fn start_daemon() -> anyhow::Result<()> {
    let mut arguments = std::env::args_os();
    let name = arguments.next().unwrap_or_else(|| "mount-coppice".into());
    let mut arguments: Vec<_> = arguments.collect();
    let end_of_options = arguments.iter().position(|argument| argument == "--").unwrap_or(arguments.len());
    arguments.insert(end_of_options, "--daemon".into());
    let mut child = Command::new("/proc/self/exe")
        .arg0(name)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start the daemon")?;
    let mut said = String::new();
    let pipe = child.stdout.take().context("the daemon has no output")?;
    // The end of the pipe: it is usable (then the daemon lives on), or it has ended.
    pipe.take(64 << 10).read_to_string(&mut said).context("cannot hear from the daemon")?;
    if said == USABLE {
        return Ok(());
    }
    let status = child.wait().context("cannot wait for the daemon")?;
    match said.trim() {
        "" => bail!("the daemon ended before the mount was usable ({status})"),
        said => bail!("{said}"),
    }
}

/// Runs the daemon. `serve` calls what it is given once the mount is usable.
pub(super) fn run_daemon(serve: impl FnOnce(fn(()) -> anyhow::Result<()>) -> anyhow::Result<()>) -> ExitCode {
    // A session of its own: no signal of the terminal's, no hang-up.
    let _ = rustix::process::setsid();
    // It was started as /proc/self/exe, whose last component would be its name in messages and in ps.
    let _ = rustix::thread::set_name(c"mount-coppice");
    match serve(report_usable) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // After `report_usable` nobody reads this; the log has it.
            let line = format!("{error:#}").replace('\n', "; ");
            tracing::error!("{line}");
            let _ = writeln!(std::io::stdout(), "{line}");
            ExitCode::from(EXIT_FAILURE)
        }
    }
}

/// Tells the waiting process, and lets the terminal go.
fn report_usable((): ()) -> anyhow::Result<()> {
    let mut pipe = std::io::stdout();
    pipe.write_all(USABLE.as_bytes()).and_then(|()| pipe.flush()).context("nobody waits for this mount any more")?;
    let null = File::options().read(true).write(true).open("/dev/null").context("cannot open /dev/null")?;
    logging::leave_terminal();
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    Ok(())
}
