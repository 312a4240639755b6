//! Limits of time: a test that hangs ends its whole test binary, after saying where everybody stands.
//!
//! 1. While a [`Limit`] lives, its test may take [`TEST_SECONDS`] (`COPPICE_TEST_SECONDS`; long forms take longer: [`lengthen`]). Past
//!    that, a thread writes to standard error what this process, its children and its daemons are doing, kills all of them, and
//!    aborts. What serves a mount is killed before this process ends: a thread that waits for an answer of FUSE cannot be.
//! 2. [`finish`] runs a command and waits for it at most [`COMMAND_SECONDS`]; past that, the same is written, and the command is
//!    killed with all that it has started. That includes who has only kept its output open.
//!
//! One mutex around the list of limits, held for moments. Also compiled into the tests of `tools`, so nothing of this crate is used here.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, Once, PoisonError, mpsc};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};

/// Seconds that a test may take, in the form that fits into every test run.
pub const TEST_SECONDS: u64 = 300;
/// Seconds that a command of a test may take.
pub const COMMAND_SECONDS: u64 = 120;
/// Seconds for finding out where a hanging process stands.
const REPORT_SECONDS: u64 = 45;
/// An environment variable by which the processes that a test has started, daemons too, are found.
const MARK: &str = "COPPICE_TEST_PROCESS";

struct Running {
    number: u64,
    test: String,
    /// Where its mounts are.
    folder: Option<PathBuf>,
    started: Instant,
}

static RUNNING: Mutex<Vec<Running>> = Mutex::new(Vec::new());
static CHANGED: Condvar = Condvar::new();
/// A test is past its time: the end of this process is near.
static ENDING: AtomicBool = AtomicBool::new(false);
/// By how much limits are longer than in the short form.
static FACTOR: AtomicU64 = AtomicU64::new(1);

fn running() -> MutexGuard<'static, Vec<Running>> {
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes all limits of this process longer, for a long form.
pub fn lengthen(factor: u64) {
    FACTOR.fetch_max(factor, Ordering::Relaxed);
    CHANGED.notify_all();
}

fn test_limit() -> Duration {
    let seconds = std::env::var("COPPICE_TEST_SECONDS").ok().and_then(|text| text.parse().ok());
    Duration::from_secs(seconds.unwrap_or(TEST_SECONDS).saturating_mul(FACTOR.load(Ordering::Relaxed)))
}

/// The limit of a test, or of a part of one, while it lives.
#[must_use = "the limit ends when this is dropped"]
pub struct Limit(u64);

impl Limit {
    /// A limit for the test that this thread runs, from now on.
    pub fn new() -> Self {
        Self::start(None)
    }

    /// The same; past its time, whatever is mounted in this folder is detached. The folder is kept.
    pub fn with_mounts_in(folder: PathBuf) -> Self {
        Self::start(Some(folder))
    }

    fn start(folder: Option<PathBuf>) -> Self {
        static WATCHER: Once = Once::new();
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        WATCHER.call_once(|| {
            std::thread::spawn(watch);
        });
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let test = std::thread::current().name().unwrap_or("a test").to_owned();
        running().push(Running { number, test, folder, started: Instant::now() });
        CHANGED.notify_all();
        Self(number)
    }
}

impl Drop for Limit {
    fn drop(&mut self) {
        // What it waited for was killed: that is not how it was to end.
        while ENDING.load(Ordering::Relaxed) {
            std::thread::park();
        }
        running().retain(|running| running.number != self.0);
    }
}

fn watch() {
    let mut list = running();
    loop {
        let next = list.iter().map(|running| (running.started + test_limit(), running.test.clone())).min();
        let now = Instant::now();
        list = match next {
            None => CHANGED.wait(list).unwrap_or_else(PoisonError::into_inner),
            Some((deadline, _)) if deadline > now => {
                CHANGED.wait_timeout(list, deadline - now).unwrap_or_else(PoisonError::into_inner).0
            }
            Some((_, test)) => {
                drop(list);
                end_all(&test)
            }
        }
    }
}

/// Says where everybody stands, kills them and this process.
fn end_all(test: &str) -> ! {
    ENDING.store(true, Ordering::Relaxed);
    say(&format!("\n==== test {test} has not ended after {} s; this is where it stands\n", test_limit().as_secs()));
    kill_after_report(|| {
        let mut processes = started_by_us();
        processes.push(std::process::id());
        processes
    });
    let folders: Vec<PathBuf> = running().iter().filter_map(|running| running.folder.clone()).collect();
    detach_mounts(&folders);
    show_backtraces(std::process::id());
    say(&format!(
        "==== test {test} has not ended: its processes are killed, and this test binary ends. Kept: {folders:?}\n"
    ));
    std::process::abort()
}

fn detach_mounts(folders: &[PathBuf]) {
    let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
    for mountpoint in mounts.lines().filter_map(|line| line.split(' ').nth(1)) {
        if folders.iter().any(|folder| Path::new(mountpoint).starts_with(folder)) {
            let _ = rustix::mount::unmount(mountpoint, rustix::mount::UnmountFlags::DETACH);
        }
    }
}

/// To the real standard error: what threads print may be captured.
fn say(text: &str) {
    let _ = io::stderr().write_all(text.as_bytes());
}

/// Describes the processes that `find` finds and kills all but this one. Both are tried in a thread of their own, as whatever looks at
/// a process that hangs may hang itself.
fn kill_after_report(find: impl FnOnce() -> Vec<u32> + Send + 'static) {
    let (found, processes) = mpsc::channel();
    let (described, done) = mpsc::channel();
    std::thread::spawn(move || {
        let list = find();
        let _ = found.send(list.clone());
        list.iter().for_each(|&process| describe(process));
        // A debugger stops us all, and waits for threads that wait for FUSE: ourselves only when those are free.
        list.iter().filter(|&&process| process != std::process::id()).for_each(|&process| show_backtraces(process));
        let _ = described.send(());
    });
    let processes = processes.recv_timeout(Duration::from_secs(REPORT_SECONDS)).unwrap_or_default();
    let _ = done.recv_timeout(Duration::from_secs(REPORT_SECONDS));
    for process in processes.into_iter().filter(|&process| process != std::process::id()) {
        if let Some(process) = as_pid(process) {
            let _ = kill_process(process, Signal::KILL);
        }
    }
}

fn as_pid(process: u32) -> Option<Pid> {
    i32::try_from(process).ok().and_then(Pid::from_raw)
}

/// All processes, with their parents.
fn processes() -> Vec<(u32, u32)> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let numbers = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    numbers
        .filter_map(|process| {
            let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
            // "12 (a name) S 1 ...": the name may hold anything.
            let parent = stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()?;
            Some((process, parent))
        })
        .collect()
}

/// A process's children, and theirs.
fn descendants(process: u32) -> Vec<u32> {
    let all = processes();
    let mut found = vec![process];
    let mut at = 0;
    while let Some(&parent) = found.get(at) {
        let children = all.iter().filter(|(child, of)| *of == parent && !found.contains(child));
        let children: Vec<u32> = children.map(|(child, _)| *child).collect();
        found.extend(children);
        at += 1;
    }
    found.split_off(1)
}

/// Our children and whoever else carries our mark: daemons have left the family.
fn started_by_us() -> Vec<u32> {
    let mut found = descendants(std::process::id());
    let mark = format!("{MARK}={}", std::process::id());
    for (process, _) in processes() {
        let environment = fs::read(format!("/proc/{process}/environ")).unwrap_or_default();
        if !found.contains(&process) && environment.split(|&byte| byte == 0).any(|part| part == mark.as_bytes()) {
            found.push(process);
        }
    }
    found
}

/// Whoever has one of these pipes open, beside us.
fn holders(pipes: &[u64]) -> Vec<u32> {
    let names: Vec<PathBuf> = pipes.iter().map(|pipe| format!("pipe:[{pipe}]").into()).collect();
    let holds = |process: u32| {
        let descriptors = fs::read_dir(format!("/proc/{process}/fd")).into_iter().flatten().flatten();
        descriptors.filter_map(|entry| fs::read_link(entry.path()).ok()).any(|target| names.contains(&target))
    };
    let others = processes().into_iter().map(|(process, _)| process).filter(|&process| process != std::process::id());
    others.filter(|&process| holds(process)).collect()
}

/// Writes where each thread of a process stands, in the kernel and in its program.
pub fn show(process: u32) {
    describe(process);
    show_backtraces(process);
}

/// Writes what a process is, and where each of its threads waits in the kernel.
fn describe(process: u32) {
    let folder = PathBuf::from(format!("/proc/{process}"));
    let read = |path: PathBuf| fs::read_to_string(path).unwrap_or_default().trim_end().to_owned();
    let arguments = fs::read(folder.join("cmdline")).unwrap_or_default();
    let arguments = String::from_utf8_lossy(&arguments).replace('\0', " ");
    say(&format!("---- process {process}: {arguments}\n"));
    for thread in fs::read_dir(folder.join("task")).into_iter().flatten().flatten() {
        let status = read(thread.path().join("status"));
        let state = status.lines().find(|line| line.starts_with("State:")).unwrap_or_default();
        say(&format!(
            "thread {} {} {state}, waits in {}, system call {}\n",
            thread.file_name().to_string_lossy(),
            read(thread.path().join("comm")),
            read(thread.path().join("wchan")),
            read(thread.path().join("syscall")),
        ));
        for line in read(thread.path().join("stack")).lines() {
            say(&format!("    {line}\n"));
        }
    }
}

/// Writes where each thread of a process is in its program, if there is a debugger.
fn show_backtraces(process: u32) {
    let Ok(output) = io::stderr().as_fd().try_clone_to_owned() else { return };
    say(&format!("---- backtraces of process {process}\n"));
    // It may stop this process, so somebody else ends it.
    let debugger = Command::new("timeout")
        .args(["-k", "1", "15", "gdb"])
        .args(["-batch", "-nx", "-p", &process.to_string(), "-ex", "thread apply all backtrace 16"])
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(Stdio::null())
        .spawn();
    if !debugger.and_then(|mut debugger| debugger.wait()).is_ok_and(|status| status.success()) {
        say("no backtraces: no gdb, or it has not ended\n");
    }
}

enum Event {
    Output(Vec<u8>),
    Errors(Vec<u8>),
    Ended(io::Result<ExitStatus>),
}

fn read_all(mut pipe: impl Read + Send + 'static, events: &mpsc::Sender<Event>, event: fn(Vec<u8>) -> Event) {
    let events = events.clone();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = pipe.read_to_end(&mut bytes);
        let _ = events.send(event(bytes));
    });
}

/// Runs a command to its end, and to the end of what it prints.
///
/// # Errors
/// If it cannot be started; [`io::ErrorKind::TimedOut`] if it does not end in time: then it has been killed.
pub fn finish(command: &mut Command) -> io::Result<Output> {
    finish_within(command, Duration::from_secs(COMMAND_SECONDS * FACTOR.load(Ordering::Relaxed)))
}

/// [`finish`] with another limit.
///
/// # Errors
/// As [`finish`].
pub fn finish_within(command: &mut Command, limit: Duration) -> io::Result<Output> {
    let deadline = Instant::now() + limit;
    command.env(MARK, std::process::id().to_string()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut child = command.spawn()?;
    let process = child.id();
    let (events, results) = mpsc::channel();
    let mut pipes = Vec::new();
    if let (Some(output), Some(errors)) = (child.stdout.take(), child.stderr.take()) {
        pipes.extend([rustix::fs::fstat(&output)?.st_ino, rustix::fs::fstat(&errors)?.st_ino]);
        read_all(output, &events, Event::Output);
        read_all(errors, &events, Event::Errors);
    }
    std::thread::spawn(move || events.send(Event::Ended(child.wait())));
    let (mut output, mut errors, mut status) = (None, None, None);
    while output.is_none() || errors.is_none() || status.is_none() {
        match results.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(Event::Output(bytes)) => output = Some(bytes),
            Ok(Event::Errors(bytes)) => errors = Some(bytes),
            Ok(Event::Ended(ended)) => status = Some(ended?),
            Err(_) => return Err(overdue(command, process, pipes, limit, status)),
        }
    }
    match (status, output, errors) {
        (Some(status), Some(stdout), Some(stderr)) => Ok(Output { status, stdout, stderr }),
        _ => Err(io::ErrorKind::BrokenPipe.into()),
    }
}

/// Reports and kills a command that is past its time.
fn overdue(command: &Command, process: u32, pipes: Vec<u64>, limit: Duration, status: Option<ExitStatus>) -> io::Error {
    let what = match status {
        Some(_) => "has ended, but something that it started keeps its output open",
        None => "has not ended",
    };
    let text = format!("{command:?} {what} after {} s", limit.as_secs_f32());
    say(&format!("\n==== {text}; this is where it stands\n"));
    kill_after_report(move || {
        // Daemons have left the family, but may still hold what they inherited.
        let mut processes = holders(&pipes);
        if status.is_none() {
            processes.push(process);
            processes.extend(descendants(process));
        }
        processes.sort_unstable();
        processes.dedup();
        processes
    });
    if let (Some(group), None) = (as_pid(process), status) {
        let _ = kill_process_group(group, Signal::KILL);
    }
    io::Error::new(io::ErrorKind::TimedOut, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    const INSIDE: &str = "COPPICE_TEST_INSIDE";

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]).stdin(Stdio::null());
        command
    }

    /// Runs a test again in a process of its own, so that its end and its messages can be seen.
    fn again(test: &str) -> (Output, String) {
        let mut again = Command::new(std::env::current_exe().unwrap());
        again.args(["--exact", &format!("limit::tests::{test}"), "--nocapture"]);
        let output = finish(again.env(INSIDE, "1").env("COPPICE_TEST_SECONDS", "1")).unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        (output, said)
    }

    #[test]
    fn a_command_is_finished_with_all_that_it_prints() {
        let output = finish(&mut shell("echo out; echo err >&2; exit 3")).unwrap();
        assert_eq!((output.status.code(), &*output.stdout, &*output.stderr), (Some(3), &b"out\n"[..], &b"err\n"[..]));
        assert_eq!(finish(&mut Command::new("/nowhere/at-all")).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    /// Nothing of this is waited for: neither the shell, nor who keeps its output open when the shell has ended.
    #[test]
    fn what_does_not_end_is_killed() {
        if std::env::var_os(INSIDE).is_none() {
            let (output, said) = again("what_does_not_end_is_killed");
            assert!(output.status.success(), "{said}");
            assert!(said.contains("has not ended after 0.3 s") && said.contains("keeps its output open"), "{said}");
            return;
        }
        for script in ["sleep 987654 & wait", "sleep 987654 & echo $!"] {
            let error = finish_within(&mut shell(script), Duration::from_millis(300)).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
        }
        // A killed process is there for a moment more.
        let deadline = Instant::now() + Duration::from_secs(60);
        while started_by_us().iter().any(|process| {
            fs::read_to_string(format!("/proc/{process}/cmdline")).is_ok_and(|line| line.starts_with("sleep\0987654"))
        }) {
            assert!(Instant::now() < deadline, "it lives on");
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_test_that_hangs_ends_its_process() {
        if std::env::var_os(INSIDE).is_some() {
            let _limit = Limit::new();
            let _ = finish(&mut shell("exec sleep 987653"));
            return;
        }
        let (output, said) = again("a_test_that_hangs_ends_its_process");
        assert_eq!(output.status.code(), None, "it was to abort: {said}");
        assert!(said.contains("a_test_that_hangs_ends_its_process has not ended after 1 s"), "{said}");
        assert!(said.contains("sleep 987653"), "the child is named: {said}");
    }
}
