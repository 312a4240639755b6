//! Attributes, times and file types between the filesystem's terms and fuser's.

use std::time::{Duration, SystemTime};

use fuser::{FileAttr, FileType as FuserType, INodeNo, TimeOrNow};

use crate::env::Timestamp;
use crate::format::namespace::FileType;
use crate::vfs::{Attributes, SetTime};

/// How long the kernel may keep a name or attributes: it hears of every change, since it makes them all.
pub(super) const LIFETIME: Duration = Duration::from_secs(24 * 60 * 60);

/// How long the kernel may keep these attributes.
pub(super) fn lifetime(attributes: &Attributes) -> Duration {
    if attributes.cacheable { LIFETIME } else { Duration::ZERO }
}

pub(super) fn file_type(kind: FileType) -> FuserType {
    match kind {
        FileType::Fifo => FuserType::NamedPipe,
        FileType::CharacterDevice => FuserType::CharDevice,
        FileType::Directory => FuserType::Directory,
        FileType::BlockDevice => FuserType::BlockDevice,
        FileType::Regular => FuserType::RegularFile,
        FileType::Symlink => FuserType::Symlink,
        FileType::Socket => FuserType::Socket,
    }
}

pub(super) fn file_attributes(attributes: &Attributes) -> FileAttr {
    FileAttr {
        ino: INodeNo(attributes.node),
        size: attributes.size_bytes,
        blocks: attributes.blocks_of_512,
        atime: system_time(attributes.access_time),
        mtime: system_time(attributes.modification_time),
        ctime: system_time(attributes.change_time),
        crtime: SystemTime::UNIX_EPOCH,
        kind: file_type(attributes.file_type),
        perm: attributes.permissions & 0o7777,
        nlink: attributes.link_count,
        uid: attributes.uid,
        gid: attributes.gid,
        rdev: attributes.device_number,
        blksize: attributes.preferred_io_bytes,
        flags: 0,
    }
}

/// Attributes of no node: the answer that lets the kernel remember that a name does not exist (node 0).
pub(super) fn absent() -> FileAttr {
    placeholder(0, FileType::Regular, 0)
}

/// Attributes that the kernel refuses (the size is beyond its largest), for an entry of readdirplus whose inode cannot be read:
/// the name, number and type reach the program, no inode is made, and the kernel gives one lookup back.
pub(super) fn refused(node: u64, kind: FileType) -> FileAttr {
    placeholder(node, kind, u64::MAX)
}

fn placeholder(node: u64, kind: FileType, size: u64) -> FileAttr {
    FileAttr {
        ino: INodeNo(node),
        size,
        blocks: 0,
        atime: SystemTime::UNIX_EPOCH,
        mtime: SystemTime::UNIX_EPOCH,
        ctime: SystemTime::UNIX_EPOCH,
        crtime: SystemTime::UNIX_EPOCH,
        kind: file_type(kind),
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

/// A time as fuser encodes it for the kernel (that direction is right for all times).
fn system_time(time: Timestamp) -> SystemTime {
    let whole = Duration::from_secs(time.seconds.unsigned_abs());
    let seconds = if time.seconds >= 0 {
        SystemTime::UNIX_EPOCH.checked_add(whole)
    } else {
        SystemTime::UNIX_EPOCH.checked_sub(whole)
    };
    seconds
        .and_then(|seconds| seconds.checked_add(Duration::from_nanos(time.nanoseconds.into())))
        .unwrap_or(SystemTime::UNIX_EPOCH)
}

/// A time as fuser 0.18.0 decoded it from the kernel. Before 1970 it *subtracts* the nanoseconds from the seconds, where they
/// count forwards; this takes the two numbers apart again as the kernel had sent them.
pub(super) fn timestamp(time: SystemTime) -> Timestamp {
    match time.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(after) => {
            Timestamp { seconds: i64::try_from(after.as_secs()).unwrap_or(i64::MAX), nanoseconds: after.subsec_nanos() }
        }
        Err(before) => {
            let before = before.duration();
            Timestamp {
                seconds: i64::try_from(before.as_secs()).map_or(i64::MIN, |seconds| -seconds),
                nanoseconds: before.subsec_nanos(),
            }
        }
    }
}

pub(super) fn set_time(time: TimeOrNow) -> SetTime {
    match time {
        TimeOrNow::SpecificTime(time) => SetTime::To(timestamp(time)),
        TimeOrNow::Now => SetTime::Now,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What fuser does to a time from the kernel.
    fn as_fuser_decodes(seconds: i64, nanoseconds: u32) -> SystemTime {
        if seconds >= 0 {
            SystemTime::UNIX_EPOCH + Duration::new(seconds.unsigned_abs(), nanoseconds)
        } else {
            SystemTime::UNIX_EPOCH - Duration::new(seconds.unsigned_abs(), nanoseconds)
        }
    }

    #[test]
    fn times_survive_fusers_decoding() {
        for (seconds, nanoseconds) in
            [(0, 0), (0, 999_999_999), (1, 5), (-1, 0), (-1, 1), (-1, 999_999_999), (-5, 500_000_000), (i64::MAX, 7)]
        {
            assert_eq!(timestamp(as_fuser_decodes(seconds, nanoseconds)), Timestamp { seconds, nanoseconds });
        }
    }

    #[test]
    fn times_are_encoded_as_they_are() {
        let half = Timestamp { seconds: -1, nanoseconds: 500_000_000 };
        assert_eq!(system_time(half), SystemTime::UNIX_EPOCH - Duration::from_millis(500));
        let odd = Timestamp { seconds: i64::MIN, nanoseconds: 1 };
        assert_eq!(Timestamp::from(system_time(odd)).nanoseconds, 1);
    }
}
