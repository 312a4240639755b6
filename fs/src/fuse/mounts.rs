//! Mounts of this process's namespace: listing them, making ours, taking it away.
//!
//! As root the mount is made with mount(2), so that the type and the source are exactly as asked; the descriptor goes to fuser's
//! `Session::from_fd`. As a user fusermount3 makes it and hands the descriptor over a socket. Neither uses fuser's own mount
//! code, whose check before it unmounts is inverted: it would take away a mount that someone else has made there since.

use std::ffi::{CString, OsString};
use std::io::Read;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

use super::FILE_SYSTEM_TYPE;
use crate::error::{Error, Result};

/// One line of `/proc/self/mountinfo`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountEntry {
    /// Device number of the mounted filesystem: major, minor.
    pub device: (u32, u32),
    /// Where.
    pub directory: PathBuf,
    /// Type, with subtype.
    pub file_system_type: OsString,
    /// What was given as the source.
    pub source: OsString,
}

/// All mounts, in the order in which they were made: a later one at the same directory hides the earlier.
///
/// # Errors
/// If /proc cannot be read.
pub fn list() -> Result<Vec<MountEntry>> {
    let path = "/proc/self/mountinfo";
    let text = std::fs::read(path).map_err(|error| Error::io(format!("cannot read {path}"), error))?;
    Ok(text.split(|&byte| byte == b'\n').filter_map(parse_line).collect())
}

fn parse_line(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|&byte| byte == b' ');
    let device = fields.nth(2)?;
    let directory = fields.nth(1)?;
    let mut after = fields.skip_while(|&field| field != b"-").skip(1);
    let file_system_type = after.next()?;
    let source = after.next()?;
    let (major, minor) = std::str::from_utf8(device).ok()?.split_once(':')?;
    Some(MountEntry {
        device: (major.parse().ok()?, minor.parse().ok()?),
        directory: PathBuf::from(unescape(directory)),
        file_system_type: unescape(file_system_type),
        source: unescape(source),
    })
}

/// Undoes the kernel's `\ooo` for blanks, tabs, newlines, backslashes.
fn unescape(field: &[u8]) -> OsString {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let octal = tail.get(..3).filter(|digits| first == b'\\' && digits.iter().all(|d| (b'0'..b'8').contains(d)));
        match octal {
            Some(digits) => {
                bytes.push(digits.iter().fold(0_u8, |value, digit| value.wrapping_mul(8).wrapping_add(digit - b'0')));
                rest = tail.get(3..).unwrap_or_default();
            }
            None => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    OsString::from_vec(bytes)
}

/// The visible mount at exactly this directory (an absolute path without links), if there is one.
///
/// # Errors
/// If /proc cannot be read.
pub fn find(directory: &Path) -> Result<Option<MountEntry>> {
    Ok(list()?.into_iter().rev().find(|entry| entry.directory == directory))
}

/// What to mount, and how.
#[derive(Clone, Debug)]
pub struct MountRequest {
    /// What `/proc/mounts` shows as the source: the image's path as given.
    pub source: OsString,
    /// An absolute path of a directory, without links.
    pub directory: PathBuf,
    /// Mount flags of the VFS, `ro`, `nosuid` and so on.
    pub flags: MountFlags,
    /// Whether other users than the one who mounts may use it.
    pub allow_other: bool,
}

/// A mount of ours. Dropping it does nothing: who made it unmounts it.
#[derive(Clone, Debug)]
pub struct Mounted {
    directory: PathBuf,
    device: Option<(u32, u32)>,
    by_fusermount: bool,
}

/// Mounts, and returns the descriptor to serve the mount with.
///
/// # Errors
/// What the kernel or fusermount3 said, in one line.
pub(super) fn mount(request: &MountRequest) -> Result<(OwnedFd, Mounted)> {
    let by_fusermount = !rustix::process::geteuid().is_root();
    let connection = if by_fusermount { mount_by_fusermount(request)? } else { mount_as_root(request)? };
    let device =
        find(&request.directory)?.filter(|entry| entry.file_system_type == FILE_SYSTEM_TYPE).map(|entry| entry.device);
    Ok((connection, Mounted { directory: request.directory.clone(), device, by_fusermount }))
}

fn mount_as_root(request: &MountRequest) -> Result<OwnedFd> {
    let connection = rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(|errno| {
        Error::io("cannot open /dev/fuse (is the kernel's fuse module loaded? try `modprobe fuse`)", errno.into())
    })?;
    let user = rustix::process::getuid().as_raw();
    let group = rustix::process::getgid().as_raw();
    let mut data =
        format!("fd={},rootmode=40000,user_id={user},group_id={group},default_permissions", connection.as_raw_fd());
    if request.allow_other {
        data.push_str(",allow_other");
    }
    let data = CString::new(data).map_err(|_| Error::Bug("a NUL in numbers".into()))?;
    rustix::mount::mount(request.source.as_os_str(), &request.directory, FILE_SYSTEM_TYPE, request.flags, &*data)
        .map_err(|errno| Error::io(format!("cannot mount on {}", request.directory.display()), errno.into()))?;
    Ok(connection)
}

/// Options for fusermount3: it knows their names, not the flags.
fn fusermount_options(request: &MountRequest) -> OsString {
    let mut options = OsString::from("subtype=coppice,default_permissions");
    for (flag, name) in [
        (MountFlags::RDONLY, "ro"),
        (MountFlags::NOEXEC, "noexec"),
        (MountFlags::NOATIME, "noatime"),
        (MountFlags::SYNCHRONOUS, "sync"),
        (MountFlags::DIRSYNC, "dirsync"),
    ] {
        if request.flags.contains(flag) {
            options.push(",");
            options.push(name);
        }
    }
    if request.allow_other {
        options.push(",allow_other");
    }
    options.push(",fsname=");
    let mut source = Vec::new();
    for &byte in request.source.as_bytes() {
        if byte == b',' || byte == b'\\' {
            source.push(b'\\');
        }
        source.push(byte);
    }
    options.push(OsString::from_vec(source));
    options
}

pub(super) fn mount_by_fusermount(request: &MountRequest) -> Result<OwnedFd> {
    let (ours, theirs) = UnixStream::pair().map_err(|error| Error::io("cannot make a socket pair", error))?;
    // Its standard input is the socket: so the descriptor is inherited without further ado.
    let mut child = Command::new("fusermount3")
        .arg("-o")
        .arg(fusermount_options(request))
        .arg("--")
        .arg(&request.directory)
        .env("_FUSE_COMMFD", "0")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| {
            Error::io("cannot run fusermount3, which users mount with (package fuse3; or mount as root)", error)
        })?;
    let received = receive_descriptor(&ours);
    let mut said = String::new();
    if let Some(mut stderr) = child.stderr.take() {
        let _ = stderr.read_to_string(&mut said);
    }
    let status = child.wait().map_err(|error| Error::io("cannot wait for fusermount3", error))?;
    match received {
        Ok(Some(connection)) if status.success() => Ok(connection),
        Ok(_) => Err(Error::Unusable(match said.trim() {
            "" => format!("fusermount3 failed ({status})"),
            said => said.lines().collect::<Vec<_>>().join("; "),
        })),
        Err(errno) => Err(Error::io("cannot take the connection from fusermount3", errno.into())),
    }
}

fn receive_descriptor(socket: &UnixStream) -> rustix::io::Result<Option<OwnedFd>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0_u8; 1];
    rustix::io::retry_on_intr(|| {
        let mut buffers = [std::io::IoSliceMut::new(&mut byte)];
        rustix::net::recvmsg(socket, &mut buffers, &mut ancillary, RecvFlags::CMSG_CLOEXEC)
    })?;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(mut descriptors) = message {
            return Ok(descriptors.next());
        }
    }
    Ok(None)
}

impl Mounted {
    /// Where.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Device number of the mounted filesystem: major, minor; unknown if it could not be found in /proc.
    #[must_use]
    pub fn device(&self) -> Option<(u32, u32)> {
        self.device
    }

    /// Whether the mount is still there and visible.
    #[must_use]
    pub fn is_visible(&self) -> bool {
        find(&self.directory).ok().flatten().is_some_and(|entry| Some(entry.device) == self.device)
    }

    /// Unmounts; `lazily` takes it out of the tree even while files are open, which stay usable.
    ///
    /// # Errors
    /// `EBUSY` while it is used, unless `lazily`; `EINVAL` if it is not mounted any more or hidden by another mount.
    pub fn unmount(&self, lazily: bool) -> Result<()> {
        if !self.is_visible() {
            return Err(Errno::INVAL.into());
        }
        unmount(&self.directory, lazily, self.by_fusermount)
    }

    /// Ends the connection at once: requests that are under way fail with `ECONNABORTED`, and the session ends.
    ///
    /// # Errors
    /// If the kernel's fusectl filesystem is neither mounted nor may be mounted by us.
    pub fn abort(&self) -> Result<()> {
        let Some((_, minor)) = self.device else {
            return Err(Error::Unusable("the connection's number is not known".into()));
        };
        let path = format!("/sys/fs/fuse/connections/{minor}/abort");
        match std::fs::write(&path, "1") {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => abort_by_private_fusectl(minor)
                .map_err(|errno| Error::io(format!("cannot write {path}, nor mount fusectl"), errno.into())),
            other => other.map_err(|error| Error::io(format!("cannot write {path}"), error)),
        }
    }

    /// Lets the kernel read ahead further than the 128 KiB to which FUSE caps it. Needs root.
    ///
    /// # Errors
    /// If sysfs refuses.
    pub fn set_read_ahead_kib(&self, kib: u32) -> Result<()> {
        self.set_tunable("read_ahead_kb", kib.into())
    }

    /// The most bytes that the kernel's page cache may hold for this mount unwritten, as far as it keeps to it (Linux 6.3).
    ///
    /// # Errors
    /// If sysfs does not tell.
    pub fn dirty_bytes_max(&self) -> Result<u64> {
        let path = self.tunable("max_bytes")?;
        let text = std::fs::read_to_string(&path).map_err(|error| Error::io(format!("cannot read {path}"), error))?;
        text.trim().parse().map_err(|_| Error::Unusable(format!("{path} holds no number")))
    }

    /// Changes that; root only.
    ///
    /// # Errors
    /// If sysfs refuses.
    pub fn set_dirty_bytes_max(&self, bytes: u64) -> Result<()> {
        self.set_tunable("max_bytes", bytes)
    }

    fn tunable(&self, name: &str) -> Result<String> {
        let Some((major, minor)) = self.device else {
            return Err(Error::Unusable("the mount's device number is not known".into()));
        };
        Ok(format!("/sys/class/bdi/{major}:{minor}/{name}"))
    }

    fn set_tunable(&self, name: &str, value: u64) -> Result<()> {
        let path = self.tunable(name)?;
        std::fs::write(&path, value.to_string()).map_err(|error| Error::io(format!("cannot write {path}"), error))
    }
}

/// Where nobody has mounted fusectl: a mount of it that only this function sees.
fn abort_by_private_fusectl(minor: u32) -> rustix::io::Result<()> {
    use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};
    let context = fsopen("fusectl", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&context)?;
    let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
    let abort = rustix::fs::openat(&mount, format!("{minor}/abort"), OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::io::write(&abort, b"1").map(drop)
}

/// Unmounts whatever is visible at `directory`.
///
/// # Errors
/// What the kernel or fusermount3 said.
pub fn unmount(directory: &Path, lazily: bool, by_fusermount: bool) -> Result<()> {
    if !by_fusermount {
        let flags = if lazily { UnmountFlags::DETACH } else { UnmountFlags::empty() };
        return Ok(rustix::mount::unmount(directory, flags | UnmountFlags::NOFOLLOW)?);
    }
    let mut command = Command::new("fusermount3");
    command.arg("-u");
    if lazily {
        command.arg("-z");
    }
    let output = command
        .arg("--")
        .arg(directory)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| Error::io("cannot run fusermount3", error))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    if said.contains("busy") {
        return Err(Errno::BUSY.into());
    }
    Err(Error::Unusable(said.trim().lines().collect::<Vec<_>>().join("; ")))
}

/// Whether `error` says that a mount's daemon is gone, or went while it was asked.
#[must_use]
pub fn is_dead(error: &std::io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::NOTCONN | Errno::CONNABORTED))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_mountinfo_is_taken_apart() {
        let line = br"36 35 0:98 / /mnt\040two rw,noatime shared:1 master:2 - fuse.coppice /tmp/a\134b rw,user_id=0";
        assert_eq!(
            parse_line(line),
            Some(MountEntry {
                device: (0, 98),
                directory: PathBuf::from("/mnt two"),
                file_system_type: FILE_SYSTEM_TYPE.into(),
                source: r"/tmp/a\b".into(),
            })
        );
        assert_eq!(parse_line(b""), None);
        assert_eq!(parse_line(b"1 2 x:y / / - a b"), None);
        assert_eq!(unescape(br"\04"), OsString::from(r"\04"));
    }

    #[test]
    fn the_root_is_mounted() {
        assert!(find(Path::new("/")).unwrap().is_some());
    }

    #[test]
    fn commas_in_the_source_are_escaped_for_fusermount() {
        let request = MountRequest {
            source: r"/tmp/a,b\c".into(),
            directory: "/mnt".into(),
            flags: MountFlags::RDONLY,
            allow_other: false,
        };
        assert_eq!(
            fusermount_options(&request),
            OsString::from(r"subtype=coppice,default_permissions,ro,fsname=/tmp/a\,b\\c")
        );
    }
}
