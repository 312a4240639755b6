//! `mount-coppice` from the outside: command line, background and foreground, exit codes, signals, dead mounts, ordinary users.
//! Behind it is the filesystem in memory (`examples/mount_memory.rs`). Needs root and /dev/fuse; says so where they are missing.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use limit::{Limit, finish};

/// The same limits of time as the end-to-end tests have; `coppicefs-tests` stands above this crate.
#[path = "../../tests/src/limit.rs"]
#[allow(dead_code)]
mod limit;

/// `nobody`: fusermount3 wants a user with a name.
const USER: u32 = 65_534;

fn program() -> PathBuf {
    let mut path = std::env::current_exe().unwrap();
    path.pop();
    path.pop();
    path.push("examples/mount_memory");
    assert!(path.exists(), "`cargo test -p coppicefs-tools` builds {}", path.display());
    path
}

struct Place {
    _limit: Limit,
    directory: tempfile::TempDir,
}

impl Place {
    fn new() -> Option<Self> {
        if !rustix::process::geteuid().is_root() || File::open("/dev/fuse").is_err() {
            eprintln!("skipped: needs root and /dev/fuse");
            return None;
        }
        let directory = tempfile::tempdir().unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let limit = Limit::with_mounts_in(fs::canonicalize(directory.path()).unwrap());
        let place = Self { directory, _limit: limit };
        fs::write(place.path("disk.img"), b"image").unwrap();
        fs::create_dir(place.path("mnt")).unwrap();
        Some(place)
    }

    fn path(&self, name: &str) -> PathBuf {
        fs::canonicalize(self.directory.path()).unwrap().join(name)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(program());
        command.current_dir(self.directory.path()).args(arguments).stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        finish(&mut self.command(arguments)).unwrap()
    }

    /// As an ordinary user, to whom everything here belongs.
    fn run_as_user(&self, arguments: &[&str]) -> Output {
        if self.mounts().is_empty() {
            for name in ["", "disk.img", "mnt"] {
                chown(self.path(name), Some(USER), Some(USER)).unwrap();
            }
        }
        let mut command = Command::new("setpriv");
        command
            .args([&format!("--reuid={USER}"), &format!("--regid={USER}"), "--clear-groups", "--"])
            .args(arguments)
            .current_dir(self.directory.path())
            .stdin(Stdio::null());
        finish(&mut command).unwrap()
    }

    fn mount(&self, arguments: &[&str]) {
        let output = self.run(&[&["disk.img", "mnt"], arguments].concat());
        assert!(output.status.success(), "{output:?}");
        assert!(output.stdout.is_empty() && output.stderr.is_empty(), "{output:?}");
    }

    /// The lines of /proc/mounts for our mountpoint.
    fn mounts(&self) -> Vec<String> {
        let mountpoint = format!(" {} ", self.path("mnt").display());
        let text = fs::read_to_string("/proc/mounts").unwrap();
        text.lines().filter(|line| line.contains(&mountpoint)).map(str::to_owned).collect()
    }

    /// Daemons of this place: processes with our program that have this place's image as an argument.
    fn daemons(&self) -> Vec<Pid> {
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            let Ok(line) = fs::read(entry.path().join("cmdline")) else { continue };
            let arguments: Vec<_> = line.split(|&byte| byte == 0).collect();
            if arguments.contains(&&b"--daemon"[..]) && arguments.contains(&self.marker().as_bytes()) {
                found.extend(Pid::from_raw(pid));
            }
        }
        found
    }

    /// The log's path tells our daemons from other tests'.
    fn marker(&self) -> String {
        self.path("log").display().to_string()
    }

    fn mount_with_log(&self, arguments: &[&str]) {
        self.mount(&[&["--log", &self.marker()], arguments].concat());
    }

    fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    fn unmount(&self) {
        // Another test's child may hold our descriptors between fork and exec.
        wait_until("it is unmounted", || {
            finish(Command::new("umount").arg(self.path("mnt"))).unwrap().status.success()
        });
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        while !self.mounts().is_empty()
            && rustix::mount::unmount(self.path("mnt"), rustix::mount::UnmountFlags::DETACH).is_ok()
        {}
    }
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "timed out: {what}");
        std::thread::yield_now();
    }
}

fn assert_refused(output: &Output, code: i32, parts: &[&str]) {
    let said = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(code), "{said}");
    assert_eq!(said.lines().count(), 1, "one line: {said}");
    for part in parts {
        assert!(said.contains(part), "{part:?} is not in: {said}");
    }
}

#[test]
fn it_returns_when_the_mount_is_usable_and_sigterm_unmounts() {
    let Some(place) = Place::new() else { return };
    place.mount_with_log(&["-n", "-v", "-o", "rw,noauto,user,x-test=1,nofail,_netdev,comment=c,commit=2,suid"]);
    fs::write(place.path("mnt/file"), b"content").unwrap();
    assert_eq!(
        place.mounts(),
        [format!(
            "disk.img {} fuse.coppice rw,nodev,relatime,user_id=0,group_id=0,default_permissions,allow_other 0 0",
            place.path("mnt").display()
        )]
    );
    let daemons = place.daemons();
    let [daemon] = daemons[..] else { panic!("{daemons:?}") };
    // It has left the terminal and the directory.
    assert_eq!(rustix::process::getsid(Some(daemon)).unwrap(), daemon);
    let process = PathBuf::from(format!("/proc/{}", daemon.as_raw_nonzero()));
    assert_eq!(fs::read_link(process.join("cwd")).unwrap(), Path::new("/"));
    for descriptor in ["fd/0", "fd/1", "fd/2"] {
        assert_eq!(fs::read_link(process.join(descriptor)).unwrap(), Path::new("/dev/null"));
    }
    // Root raises the kernel's readahead.
    let device = rustix::fs::stat(place.path("mnt")).unwrap().st_dev;
    let bdi = format!("/sys/class/bdi/{}:{}/read_ahead_kb", rustix::fs::major(device), rustix::fs::minor(device));
    assert_eq!(fs::read_to_string(bdi).unwrap().trim(), "2048");

    kill_process(daemon, Signal::TERM).unwrap();
    wait_until("the daemon ends", || place.daemons().is_empty());
    assert!(place.mounts().is_empty());
    let log = place.log();
    for part in ["mounted", "unmounting", "closed"] {
        assert!(log.contains(part), "{log}");
    }
    assert!(!log.contains("ERROR"), "{log}");
}

#[test]
fn in_the_foreground_it_stays_and_sigint_ends_it_with_success() {
    let Some(place) = Place::new() else { return };
    let mut child = place.command(&["disk.img", "mnt", "-f"]).stderr(Stdio::piped()).spawn().unwrap();
    wait_until("it is mounted", || !place.mounts().is_empty());
    fs::write(place.path("mnt/file"), b"content").unwrap();
    assert!(child.try_wait().unwrap().is_none());
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    assert!(place.mounts().is_empty());
    assert!(String::from_utf8(output.stderr).unwrap().contains("closed"), "it logs to the terminal");
}

#[test]
fn what_cannot_work_is_refused_in_one_line() {
    let Some(place) = Place::new() else { return };
    fs::write(place.path("file"), b"").unwrap();
    fs::create_dir(place.path("other")).unwrap();
    let refused = |arguments: &[&str], code, parts: &[&str]| assert_refused(&place.run(arguments), code, parts);
    refused(&["disk.img", "nowhere"], 32, &["nowhere", "does not exist", "mkdir"]);
    refused(&["disk.img", "file"], 32, &["file", "not a directory"]);
    refused(&["absent.img", "mnt"], 32, &["absent.img", "does not exist", "mkfs-coppice"]);
    refused(&["mnt", "mnt"], 32, &["is a directory"]);
    refused(&["/dev/null", "mnt"], 32, &["/dev/null", "neither"]);
    refused(&["disk.img", "mnt", "-o", "ro,nosuch=1"], 1, &["nosuch"]);
    refused(&["disk.img", "mnt", "-o", "commit=soon"], 1, &["commit", "soon"]);
    refused(&["disk.img", "mnt", "--log", "/nowhere/log"], 32, &["/nowhere/log"]);
    refused(&["disk.img"], 1, &["<DIR>", "--help"]);
    refused(&["disk.img", "mnt", "--nosuch"], 1, &["--nosuch"]);
    refused(&["disk.img", "nowhere", "-f"], 32, &["nowhere", "does not exist"]);
    assert!(place.mounts().is_empty());
    let image = place.path("disk.img");
    let output = place.run(&[image.to_str().unwrap(), "mnt", "-s", "-o", "nosuch,ro"]);
    assert!(output.status.success(), "-s ignores unknown options: {output:?}");
    assert!(place.mounts()[0].contains(" ro,"));
    // In use: by path, by a link.
    std::os::unix::fs::symlink("disk.img", place.path("link.img")).unwrap();
    for image in ["disk.img", "link.img"] {
        refused(&[image, "other"], 32, &[image, "in use", "mnt"]);
    }
    place.unmount();
    let help = place.run(&["--help"]);
    assert!(help.status.success() && String::from_utf8(help.stdout).unwrap().contains("cache=kernel|writeback|daemon"));
}

#[test]
fn a_dead_mount_of_the_same_image_is_replaced_and_another_is_not() {
    let Some(place) = Place::new() else { return };
    place.mount_with_log(&[]);
    kill_process(place.daemons()[0], Signal::KILL).unwrap();
    wait_until("the daemon is gone", || place.daemons().is_empty());
    // A request that was under way when the connection ended is answered ECONNABORTED.
    wait_until("the mount is dead", || rustix::fs::statfs(place.path("mnt")).err() == Some(rustix::io::Errno::NOTCONN));
    fs::write(place.path("another.img"), b"").unwrap();
    assert_refused(&place.run(&["another.img", "mnt"]), 32, &["something else", "umount -l"]);
    place.mount_with_log(&[]);
    assert_eq!(place.mounts().len(), 1);
    fs::write(place.path("mnt/file"), b"content").unwrap();
    place.unmount();
}

#[test]
fn a_busy_mount_is_detached_and_a_second_signal_ends_it() {
    let Some(place) = Place::new() else { return };
    place.mount_with_log(&[]);
    let mut file = File::create(place.path("mnt/file")).unwrap();
    file.write_all(b"content").unwrap();
    let daemon = place.daemons()[0];
    kill_process(daemon, Signal::TERM).unwrap();
    wait_until("it is detached", || place.mounts().is_empty());
    // Open files are still served.
    file.write_all(b"more").unwrap();
    file.sync_all().unwrap();
    wait_until("the log says so", || place.log().contains("busy"));
    kill_process(daemon, Signal::TERM).unwrap();
    wait_until("the daemon ends", || place.daemons().is_empty());
    assert!(file.write_all(b"too late").is_err() || file.sync_all().is_err());
    assert!(place.log().contains("closed"));
}

/// A daemon that ends must not unmount what was mounted at its place since: fuser's own check is inverted and would.
#[test]
fn unmounting_and_mounting_again_at_once_works() {
    let Some(place) = Place::new() else { return };
    for round in 0..20 {
        place.mount_with_log(&[]);
        fs::write(place.path("mnt/file"), [round]).unwrap();
        place.unmount();
    }
    place.mount_with_log(&[]);
    wait_until("the old daemons end", || place.daemons().len() == 1);
    assert_eq!(place.mounts().len(), 1);
    fs::write(place.path("mnt/file"), b"content").unwrap();
    place.unmount();
}

/// Users need a /dev/fuse that is open to them, as udev makes it. Where it is not (a bare virtual machine), the test runs itself again
/// in a mount namespace of its own that has one. Returns whether to go on.
fn give_users_the_device(place: &Place, test: &str) -> bool {
    const INSIDE: &str = "COPPICE_TEST_HAS_DEVICE";
    if fs::metadata("/dev/fuse").unwrap().permissions().mode() & 0o006 == 0o006 {
        return true;
    }
    if std::env::var_os(INSIDE).is_none() {
        let mut again = Command::new("unshare");
        again.arg("-m").arg(std::env::current_exe().unwrap()).args(["--exact", test, "--nocapture"]).env(INSIDE, "1");
        let output = finish(&mut again).unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        return false;
    }
    let device = place.path("fuse");
    let mode = rustix::fs::Mode::from_raw_mode(0o666);
    let number = rustix::fs::makedev(10, 229);
    rustix::fs::mknodat(rustix::fs::CWD, &device, rustix::fs::FileType::CharacterDevice, mode, number).unwrap();
    fs::set_permissions(&device, fs::Permissions::from_mode(0o666)).unwrap();
    rustix::mount::mount_bind(&device, "/dev/fuse").unwrap();
    true
}

#[test]
fn an_ordinary_user_mounts_through_fusermount() {
    let Some(place) = Place::new() else { return };
    if !give_users_the_device(&place, "an_ordinary_user_mounts_through_fusermount") {
        return;
    }
    let program = program();
    let program = program.to_str().unwrap();
    let marker = place.marker();
    let output = place.run_as_user(&[program, "disk.img", "mnt", "--log", &marker, "-o", "noexec"]);
    assert!(output.status.success(), "{output:?}");
    let line = place.mounts().pop().unwrap();
    for part in ["disk.img ", " fuse.coppice ", "nosuid,nodev,noexec", "user_id=65534", "default_permissions"] {
        assert!(line.contains(part), "{line}");
    }
    assert!(!line.contains("allow_other"));
    let output =
        place.run_as_user(&["sh", "-ec", "echo content >mnt/file; mkdir mnt/d; mv mnt/file mnt/d; cat mnt/d/file"]);
    assert_eq!(output.stdout, b"content\n", "{output:?}");
    // Not even root looks into it.
    assert_eq!(fs::metadata(place.path("mnt/d")).unwrap_err().raw_os_error(), Some(13), "EACCES");
    let daemon = place.daemons()[0];
    kill_process(daemon, Signal::TERM).unwrap();
    wait_until("the daemon ends", || place.daemons().is_empty());
    assert!(place.mounts().is_empty(), "{}", place.log());

    // By fusermount3 -u, too; and a dead one is replaced.
    assert!(place.run_as_user(&[program, "disk.img", "mnt", "--log", &marker]).status.success());
    kill_process(place.daemons()[0], Signal::KILL).unwrap();
    wait_until("the daemon is gone", || place.daemons().is_empty());
    let output = place.run_as_user(&[program, "disk.img", "mnt", "--log", &marker]);
    assert!(output.status.success(), "{output:?} {}", place.log());
    assert_eq!(place.mounts().len(), 1);
    assert!(place.run_as_user(&["fusermount3", "-u", "mnt"]).status.success());
    wait_until("the daemon ends", || place.daemons().is_empty());

    if !fs::read_to_string("/etc/fuse.conf").unwrap_or_default().lines().any(|line| line.trim() == "user_allow_other") {
        let output = place.run_as_user(&[program, "disk.img", "mnt", "-o", "allow_other"]);
        assert_refused(&output, 32, &["allow_other"]);
    }
    assert!(place.mounts().is_empty());
}

/// By a relative path nobody can say which image it is; by an absolute one the helper waits until the daemon has let it go.
#[test]
fn the_unmount_helper_unmounts_and_refuses_what_is_not_ours() {
    let Some(place) = Place::new() else { return };
    let helper = place.path("umount.fuse.coppice");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_coppice"), &helper).unwrap();
    let run = |arguments: &[&str]| {
        let mut command = Command::new(&helper);
        command.args(arguments).current_dir(place.directory.path()).stdin(Stdio::null());
        finish(&mut command).unwrap()
    };
    assert_refused(&run(&["mnt"]), 32, &["not a coppice mount"]);
    place.mount_with_log(&[]);
    let file = File::create(place.path("mnt/file")).unwrap();
    assert_refused(&run(&["mnt", "-n"]), 32, &["busy"]);
    drop(file);
    wait_until("it is unmounted", || run(&["mnt", "-t", "fuse.coppice"]).status.success());
    assert!(place.mounts().is_empty());
}
