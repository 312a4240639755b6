//! Copying one file: content with its holes, extended attributes, owner, mode and times.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::rc::Rc;

use anyhow::Context as _;
use coppicefs::data::{BadPart, Extent};
use coppicefs::format::BtreeId;
use coppicefs::format::namespace::{FileType, Inode, StoredTime, XattrBucket};
use coppicefs::recovery::Salvaged;
use coppicefs::units::SnapshotId;
use rustix::fs::{
    AtFlags, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags, chownat, fchmod, fchown, fsetxattr, futimens,
    lsetxattr, mknodat, openat, symlinkat, utimensat,
};
use rustix::io::Errno;

use super::target::{Directory, Place};
use super::{Restore, position, stopped};

/// Longest target of a symbolic link.
const SYMLINK_BYTES_MAX: usize = 4095;

/// What stands in for an inode that is lost: its owner alone may do something with it.
pub(super) fn unknown(file_type: FileType) -> Inode {
    let permissions = if file_type == FileType::Directory { 0o700 } else { 0o600 };
    Inode { mode: file_type.mode_bits() | permissions, link_count: 1, size: u64::MAX, ..Inode::default() }
}

fn timestamps(inode: &Inode) -> Timestamps {
    let time = |time: StoredTime| Timespec { tv_sec: time.seconds, tv_nsec: i64::from(time.nanoseconds) };
    Timestamps { last_access: time(inode.access_time), last_modification: time(inode.modification_time) }
}

impl Restore<'_> {
    /// Copies a file that is no directory. Returns where it is, if it could be made.
    pub(super) fn copy(
        &mut self,
        directory: &Directory,
        here: Rc<Place>,
        number: u64,
        file_type: FileType,
        mut inode: Inode,
    ) -> anyhow::Result<Option<Rc<Place>>> {
        match file_type {
            FileType::Regular => {
                let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::WRONLY | OFlags::CLOEXEC;
                let (here, file) =
                    directory.make(here, |name| openat(directory, name, flags, Mode::RUSR | Mode::WUSR))?;
                let path = Place::path(Some(&here));
                let file = File::from(file);
                let end = self.copy_content(&file, number, inode.size, &path)?;
                if inode.size == u64::MAX {
                    inode.size = end;
                }
                // A size from a damaged image may be more than a file can have.
                self.kept("size", rustix::fs::ftruncate(&file, inode.size), &path);
                self.finish(&file, number, &inode, &path);
                self.keep_flags(Some(Rc::clone(&here)), inode.flags);
                self.report.files += 1;
                Ok(Some(here))
            }
            FileType::Symlink => {
                let Some(content) = self.link_target(number, inode.size, &Place::path(Some(&here)))? else {
                    return Ok(None);
                };
                let (here, ()) = directory.make(here, |name| symlinkat(content.as_slice(), directory, name))?;
                self.finish_unopened(directory, &here, number, &inode);
                self.report.symbolic_links += 1;
                Ok(Some(here))
            }
            FileType::Fifo | FileType::Socket | FileType::CharacterDevice | FileType::BlockDevice => {
                let kind = rustix::fs::FileType::from_raw_mode(file_type.mode_bits());
                let path = Place::path(Some(&here));
                let made = directory
                    .make(here, |name| mknodat(directory, name, kind, Mode::from_raw_mode(0o600), inode.device_number));
                match made {
                    Ok((here, ())) => {
                        self.finish_unopened(directory, &here, number, &inode);
                        self.report.others += 1;
                        Ok(Some(here))
                    }
                    // Device nodes are for root to make.
                    Err(error) => {
                        self.report.lose(&path, format!("{error:#}"));
                        Ok(None)
                    }
                }
            }
            FileType::Directory => Ok(None),
        }
    }

    /// Writes what can be read of a file below `size`; what cannot stays a hole, and is reported. Returns where its last extent ends.
    fn copy_content(&mut self, file: &File, number: u64, size: u64, path: &str) -> anyhow::Result<u64> {
        let mut end = 0;
        let mut impossible = Vec::new();
        self.extents(number, size, path, &mut |extent, bytes| {
            end = end.max(extent.end);
            let Some((bytes, bad)) = bytes else { return Ok(()) };
            let kept = usize::try_from(size.saturating_sub(extent.start())).unwrap_or(usize::MAX).min(bytes.len());
            for (start, part) in good_parts(bytes.get(..kept).unwrap_or_default(), bad) {
                let at = extent.start() + start;
                match file.write_all_at(part, at) {
                    // Farther out than the host's files can be.
                    Err(error)
                        if matches!(
                            error.raw_os_error().map(Errno::from_raw_os_error),
                            Some(Errno::FBIG | Errno::INVAL)
                        ) =>
                    {
                        impossible.push((at..at + part.len() as u64, error.to_string()));
                    }
                    outcome => outcome.with_context(|| format!("cannot write {path}"))?,
                }
            }
            Ok(())
        })?;
        for (range, reason) in impossible {
            self.report.damage(path, number, range, &reason);
        }
        Ok(end)
    }

    /// The target of a symbolic link, if all of it can be read.
    fn link_target(&mut self, number: u64, size: u64, path: &str) -> anyhow::Result<Option<Vec<u8>>> {
        let before = self.report.damaged_count();
        let mut content = Vec::new();
        self.extents(number, size, path, &mut |extent, bytes| {
            if let Some((bytes, _)) = bytes
                && extent.start() == content.len() as u64
                && content.len() <= SYMLINK_BYTES_MAX
            {
                content.extend_from_slice(bytes);
            }
            Ok(())
        })?;
        content.truncate(usize::try_from(size).unwrap_or(usize::MAX));
        let is_whole = self.report.damaged_count() == before && (size == u64::MAX || content.len() as u64 == size);
        if content.is_empty() || content.contains(&0) || content.len() > SYMLINK_BYTES_MAX || !is_whole {
            self.report.lose(path, "where this symbolic link leads to is lost".into());
            return Ok(None);
        }
        Ok(Some(content))
    }

    /// Calls `visit` with each extent below `size` and its bytes, and reports what cannot be read.
    fn extents(
        &mut self,
        number: u64,
        size: u64,
        path: &str,
        visit: &mut dyn FnMut(&Extent, Option<(&[u8], &[BadPart])>) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let salvage = self.salvage;
        let mut at = 0;
        let mut hidden: Option<String> = None;
        let mut failed = None;
        let scanned = salvage.scan(BtreeId::Extents, position(number, 0), position(number, u64::MAX), &mut |found| {
            let (key, value) = match found {
                Salvaged::Key(key, value) => (key, value),
                Salvaged::Lost(lost) => {
                    hidden = Some(lost.reason);
                    return Ok(());
                }
            };
            if key.snapshot != SnapshotId::ROOT.0 {
                return Ok(());
            }
            let extent = match salvage.shape().decode(key, &value) {
                Ok(extent) => extent,
                Err(error) => {
                    self.report.damage(path, number, at..key.offset.min(size), &error.to_string());
                    at = at.max(key.offset);
                    return Ok(());
                }
            };
            if let Some(reason) = hidden.take() {
                self.report.damage(path, number, at..extent.start().min(size), &reason);
            }
            let read = (extent.start() < size).then(|| salvage.read(&extent)).flatten();
            let unverified = read.as_ref().and_then(|read| read.unverified.as_ref());
            for bad in read.iter().flat_map(|read| &read.bad) {
                let range = extent.start() + bad.start..(extent.start() + bad.end).min(size);
                let mut reason = bad.error.to_string();
                if unverified.is_some() && !self.gives_unverified {
                    reason.push_str(" (--unverified copies such data all the same)");
                }
                self.report.damage(path, number, range, &reason);
            }
            if let Some(reason) = unverified.filter(|_| self.gives_unverified) {
                self.report.unverified(path, number, extent.start()..extent.end.min(size), reason);
            }
            self.report.bytes += read.as_ref().map_or(0, |read| read.bytes.len() as u64);
            at = at.max(extent.end);
            let bytes = read.as_ref().map(|read| (read.bytes.as_slice(), read.bad.as_slice()));
            visit(&extent, bytes).map_err(|error| {
                let stop = stopped(&error);
                failed = Some(error);
                stop
            })
        });
        if let Some(error) = failed {
            return Err(error);
        }
        scanned?;
        if let Some(reason) = hidden {
            // Of a file whose size is lost, too, nothing more can be said.
            self.report.damage(path, number, at..size, &reason);
        }
        Ok(())
    }

    /// Gives an open file its attributes, the times last.
    pub(super) fn finish(&mut self, file: impl AsFd, number: u64, inode: &Inode, path: &str) {
        self.owner(fchown(&file, Some(Uid::from_raw(inode.uid)), Some(Gid::from_raw(inode.gid))), path);
        self.attributes(number, path, &|name, value| fsetxattr(&file, name, value, XattrFlags::empty()));
        self.kept("mode", fchmod(&file, Mode::from_raw_mode(inode.mode & 0o7777)), path);
        self.kept("times", futimens(&file, &timestamps(inode)), path);
    }

    /// The same for what is not opened: symbolic links, pipes, sockets, devices.
    fn finish_unopened(&mut self, directory: &Directory, here: &Place, number: u64, inode: &Inode) {
        let path = Place::path(Some(here));
        let (uid, gid) = (Uid::from_raw(inode.uid), Gid::from_raw(inode.gid));
        self.owner(chownat(directory, here.name(), Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW), &path);
        // There is no lsetxattrat: this names the same file.
        let mut named = format!("/proc/self/fd/{}/", directory.as_fd().as_raw_fd()).into_bytes();
        named.extend_from_slice(here.name());
        self.attributes(number, &path, &|name, value| lsetxattr(named.as_slice(), name, value, XattrFlags::empty()));
        if inode.file_type() != Some(FileType::Symlink) {
            let mode = Mode::from_raw_mode(inode.mode & 0o7777);
            self.kept("mode", rustix::fs::chmodat(directory, here.name(), mode, AtFlags::empty()), &path);
        }
        let times = utimensat(directory, here.name(), &timestamps(inode), AtFlags::SYMLINK_NOFOLLOW);
        self.kept("times", times, &path);
    }

    /// Only root gives files away: for others that is no news.
    fn owner(&mut self, outcome: rustix::io::Result<()>, path: &str) {
        if rustix::process::geteuid().is_root() {
            self.kept("owner", outcome, path);
        }
    }

    fn attributes(&mut self, number: u64, path: &str, set: &dyn Fn(&[u8], &[u8]) -> rustix::io::Result<()>) {
        let salvage = self.salvage;
        let scanned = salvage.scan(BtreeId::Xattrs, position(number, 0), position(number, u64::MAX), &mut |found| {
            let bucket = match found {
                Salvaged::Key(key, _) if key.snapshot != SnapshotId::ROOT.0 => return Ok(()),
                Salvaged::Key(_, value) => XattrBucket::decode(&value).map_err(|error| error.to_string()),
                Salvaged::Lost(lost) => Err(lost.reason),
            };
            match bucket {
                Ok(bucket) => {
                    for attribute in bucket.0.iter().filter(|attribute| !attribute.name.contains(&0)) {
                        let what = format!("extended attribute {}", attribute.name.escape_ascii());
                        self.kept(&what, set(&attribute.name, &attribute.value), path);
                    }
                }
                Err(reason) => self.report.lose(path, format!("extended attributes are lost: {reason}")),
            }
            Ok(())
        });
        if let Err(error) = scanned {
            self.report.lose(path, format!("extended attributes are lost: {error}"));
        }
    }

    fn kept(&mut self, what: &str, outcome: rustix::io::Result<()>, path: &str) {
        if let Err(errno) = outcome {
            self.report.note(format!("{path}: {what} not kept: {errno}"));
        }
    }
}

/// The stretches of `bytes` between the bad parts, with their offsets.
fn good_parts<'b>(bytes: &'b [u8], bad: &[BadPart]) -> Vec<(u64, &'b [u8])> {
    let mut parts = Vec::new();
    let mut from = 0;
    let index = |offset: u64| usize::try_from(offset).unwrap_or(usize::MAX);
    for bad in bad {
        if let Some(part) = bytes.get(index(from)..index(bad.start).min(bytes.len())).filter(|part| !part.is_empty()) {
            parts.push((from, part));
        }
        from = bad.end;
    }
    if let Some(part) = bytes.get(index(from)..).filter(|part| !part.is_empty()) {
        parts.push((from, part));
    }
    parts
}
