//! [`Site`]: an image in a temporary folder, formatted, mounted and checked by the built `coppice`, through the kernel.
//!
//! Cargo builds the binaries of the whole workspace before it runs any test of it, and puts them two folders above the tests. So
//! `cargo test --workspace` finds them; `cargo test -p coppicefs-tests` needs a `cargo build -p coppicefs-tools` first.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::str::FromStr;
use std::time::{Duration, Instant};

use coppicefs::device::lock_holders;
use rustix::process::{Pid, Signal, kill_process};

use crate::limit::{Limit, finish, lengthen};

/// An image, a mountpoint, and room beside them, all removed on drop.
pub struct Site {
    /// Who mounts may hang. Ends before the folder is removed.
    _limit: Limit,
    folder: PathBuf,
    _directory: tempfile::TempDir,
}

/// The built `coppice`.
///
/// # Panics
/// If it is not there.
pub fn program() -> PathBuf {
    built("coppice")
}

/// A built program of the workspace. Cargo builds a package's programs for that package's own integration tests, which `cargo test --workspace` includes.
///
/// # Panics
/// If it is not there.
pub fn built(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("the test's own path");
    let profile = test.ancestors().nth(2).expect("target/<profile>/deps/<test>");
    let program = profile.join(name);
    assert!(
        program.exists(),
        "{} is not built: run `cargo test --workspace`, or `cargo build --workspace` first",
        program.display()
    );
    program
}

/// The long form's count from the environment, or the one that fits into every test run. A larger count makes the test's limit longer.
///
/// # Panics
/// If the variable is not a number.
pub fn count(variable: &str, default: u64) -> u64 {
    let count = number(variable, default);
    lengthen(count.div_ceil(default.max(1)));
    count
}

/// A number from the environment, or the default.
///
/// # Panics
/// If the variable is not a number.
pub fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |text| u64::from_str(&text).expect("a number in the environment"))
}

/// Whether a program is installed; says that the test is skipped if not.
pub fn installed(name: &str) -> bool {
    let found = std::env::var_os("PATH").is_some_and(|path| {
        std::env::split_paths(&path)
            .chain(["/usr/sbin".into(), "/sbin".into()])
            .any(|folder| folder.join(name).exists())
    });
    if !found {
        eprintln!("skipped: {name} is not installed");
    }
    found
}

/// A command that never waits for a terminal.
pub fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.stdin(Stdio::null()).env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    command
}

/// Runs a command that has to succeed, and returns what it printed.
///
/// # Panics
/// With its messages, if it fails.
pub fn run(command: &mut Command) -> String {
    let output = finish(command).unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Asserts that a command refused in one line which holds all `parts`.
///
/// # Panics
/// If not.
pub fn assert_refused(output: &Output, parts: &[&str]) {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && output.status.code().is_some(), "{:?}: {said}", output.status);
    assert_eq!(said.trim_end().lines().count(), 1, "one line: {said}");
    for part in parts {
        assert!(said.contains(part), "{part:?} is not in: {said}");
    }
}

/// Waits for something that another process does.
///
/// # Panics
/// After a minute.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < deadline, "timed out: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

impl Site {
    /// An empty folder with a mountpoint; none, saying so, where there is no FUSE.
    ///
    /// # Panics
    /// If the temporary folder cannot be made.
    pub fn new() -> Option<Self> {
        if !rustix::process::geteuid().is_root() || File::open("/dev/fuse").is_err() {
            eprintln!("skipped: needs root and /dev/fuse");
            return None;
        }
        let directory = tempfile::Builder::new().prefix("coppice-test-").tempdir().unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let folder = fs::canonicalize(directory.path()).unwrap();
        fs::create_dir(folder.join("mnt")).unwrap();
        let limit = Limit::with_mounts_in(folder.clone());
        Some(Self { folder, _directory: directory, _limit: limit })
    }

    /// A new image, formatted.
    ///
    /// # Panics
    /// If that fails.
    pub fn formatted(size: &str, options: &[&str]) -> Option<Self> {
        let site = Self::new()?;
        run(site.coppice(&["mkfs", "-q", "--size", size]).args(options).arg(site.image()));
        Some(site)
    }

    /// A path in the folder, beside the mountpoint.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// The image.
    pub fn image(&self) -> PathBuf {
        self.path("disk.img")
    }

    /// The mountpoint.
    pub fn mnt(&self) -> PathBuf {
        self.path("mnt")
    }

    /// `coppice` with these words.
    pub fn coppice(&self, words: &[&str]) -> Command {
        let mut command = command(program());
        // Not in the host's: a daemon keeps it from whoever mounts.
        command.current_dir(&self.folder).env("COPPICE_STATE_DIRECTORY", self.path("state")).args(words);
        command
    }

    /// Mounts with these options (`-o`), which may be empty.
    ///
    /// # Panics
    /// If that fails.
    pub fn mount(&self, options: &str) {
        let log = self.path("log");
        let mut command = self.coppice(&["mount", "--log"]);
        command.arg(log);
        if !options.is_empty() {
            command.args(["-o", options]);
        }
        run(command.arg(self.image()).arg(self.mnt()));
    }

    /// Unmounts, and waits until the daemon has let the image go.
    ///
    /// # Panics
    /// If that fails.
    pub fn unmount(&self) {
        // Another test's child may hold a descriptor of ours between fork and exec.
        self.unmount_noisily();
        self.assert_quiet_log();
    }

    /// Unmounts where errors in the log are what was asked for.
    ///
    /// # Panics
    /// If that fails.
    pub fn unmount_noisily(&self) {
        wait_until("it is unmounted", || finish(command("umount").arg(self.mnt())).unwrap().status.success());
        wait_until("the daemon is gone", || lock_holders(&self.image()).is_empty());
    }

    /// SIGKILL to the daemon; the dead mount is taken away.
    ///
    /// # Panics
    /// If that fails.
    pub fn crash(&self) {
        self.kill();
        wait_until("the daemon is gone", || lock_holders(&self.image()).is_empty());
        run(command("umount").arg("-l").arg(self.mnt()));
    }

    /// Unmounts and mounts again.
    pub fn remount(&self, options: &str) {
        self.unmount();
        self.mount(options);
    }

    /// Makes everything durable through the filesystem's own call.
    pub fn sync(&self) {
        run(self.coppice(&["sync"]).arg(self.mnt()));
    }

    /// What is available as `df` shows it, in bytes.
    ///
    /// # Panics
    /// If the mount does not answer.
    pub fn available_bytes(&self) -> u64 {
        let answer = rustix::fs::statvfs(self.mnt()).unwrap();
        answer.f_bavail * answer.f_frsize
    }

    /// One counter of `coppice usage`.
    ///
    /// # Panics
    /// If it is not there.
    pub fn usage(&self, name: &str) -> u64 {
        let text = run(self.coppice(&["usage", "--json"]).arg(self.mnt()));
        let usage: serde_json::Value = serde_json::from_str(&text).unwrap();
        usage[name].as_u64().unwrap_or_else(|| panic!("{name} in {text}"))
    }

    /// The daemon that serves the image.
    ///
    /// # Panics
    /// If there is not exactly one.
    pub fn daemon(&self) -> Pid {
        let holders = lock_holders(&self.image());
        let [daemon] = holders.as_slice() else { panic!("one daemon should hold the image, not {holders:?}") };
        Pid::from_raw(i32::try_from(*daemon).unwrap()).unwrap()
    }

    /// SIGKILL to the daemon.
    ///
    /// # Panics
    /// If it is not there.
    pub fn kill(&self) {
        kill_process(self.daemon(), Signal::KILL).unwrap();
    }

    /// A line of the daemon's /proc/PID/status that ends in kB, in bytes.
    ///
    /// # Panics
    /// If there is none.
    pub fn daemon_memory_bytes(&self, field: &str) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.daemon().as_raw_nonzero())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
    }

    /// What the daemons have logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// No daemon has logged an error.
    ///
    /// # Panics
    /// With the log, if one has.
    pub fn assert_quiet_log(&self) {
        let log = self.log();
        assert!(!log.contains("ERROR") && !log.contains("panicked"), "{log}");
    }

    /// `fsck -n` finds nothing and changes nothing.
    ///
    /// # Panics
    /// With what it says, if it finds something.
    pub fn assert_clean(&self) {
        let output = finish(self.coppice(&["fsck", "-n"]).arg(self.image())).unwrap();
        if output.status.code() != Some(0) {
            let kept = std::env::temp_dir().join(format!("coppice-unclean-{}.img", std::process::id()));
            let _ = finish(command("cp").arg("--sparse=always").args([self.image(), kept.clone()]));
            panic!(
                "fsck -n: {}\n{}{}\nthe log:\n{}\nthe image is kept: {}",
                output.status,
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr),
                self.log(),
                kept.display()
            );
        }
    }

    /// Unmounts, and `fsck -n` finds nothing.
    pub fn unmount_and_check(&self) {
        self.unmount();
        self.assert_clean();
    }

    /// Whether something is mounted here, its daemon alive or not.
    pub fn is_mounted(&self) -> bool {
        is_mounted(&self.mnt())
    }
}

/// Whether a path is a mountpoint, without asking what is mounted.
///
/// # Panics
/// If /proc cannot be read.
pub fn is_mounted(path: &Path) -> bool {
    let mountpoint = format!(" {} ", path.display());
    fs::read_to_string("/proc/mounts").unwrap().lines().any(|line| line.contains(&mountpoint))
}

impl Drop for Site {
    fn drop(&mut self) {
        while self.is_mounted() && rustix::mount::unmount(self.mnt(), rustix::mount::UnmountFlags::DETACH).is_ok() {}
        if std::thread::panicking() {
            self.end_daemon();
        }
    }
}

impl Site {
    /// After a failed test: asks its daemon to end, and if it does not, makes it.
    fn end_daemon(&self) {
        let send = |signal| {
            for holder in lock_holders(&self.image()) {
                // A test may hold the image itself.
                if holder != std::process::id()
                    && let Some(daemon) = i32::try_from(holder).ok().and_then(Pid::from_raw)
                {
                    let _ = kill_process(daemon, signal);
                }
            }
        };
        send(Signal::TERM);
        let deadline = Instant::now() + Duration::from_secs(5);
        while !lock_holders(&self.image()).is_empty() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
        }
        send(Signal::KILL);
    }
}
