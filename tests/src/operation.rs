//! [`Operation`]: one POSIX operation as data, so that workloads can be listed, generated, shrunk and printed.

use serde::{Deserialize, Serialize};

/// One operation. Paths are absolute inside the filesystem: `/a/b`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Operation {
    /// open(O_CREAT | O_EXCL).
    Create { path: String, mode: u16 },
    /// mkdir.
    MakeDirectory { path: String, mode: u16 },
    /// mkfifo.
    MakeFifo { path: String, mode: u16 },
    /// symlink.
    SymbolicLink { path: String, target: String },
    /// link.
    Link { existing: String, path: String },
    /// unlink.
    Unlink { path: String },
    /// rmdir.
    RemoveDirectory { path: String },
    /// rename, over what is there if that may be.
    Rename { from: String, to: String },
    /// renameat2(RENAME_EXCHANGE).
    Exchange { one: String, other: String },
    /// pwrite of [`content`]`(tag, offset, length)`.
    Write { path: String, offset: u64, length: u64, tag: u32 },
    /// A write in one of the other ways. With `append` the offset says where the file ends.
    WriteAs { path: String, offset: u64, length: u64, tag: u32, way: Way },
    /// truncate, to a smaller or a larger size.
    Truncate { path: String, size: u64 },
    /// open(O_TRUNC), as the kernel passes it on: a change of the size by name, then an open.
    OpenTruncated { path: String },
    /// fallocate(PUNCH_HOLE | KEEP_SIZE).
    Punch { path: String, offset: u64, length: u64 },
    /// fallocate(0), or fallocate(KEEP_SIZE).
    Allocate { path: String, offset: u64, length: u64, keep_size: bool },
    /// A handle on a file is kept open until [`Operation::Release`].
    Hold { path: String },
    /// pwrite through the handle that was opened last, whose file has no name any more.
    WriteUnlinked { offset: u64, length: u64, tag: u32 },
    /// Closes all handles that were kept.
    Release,
    /// fallocate(ZERO_RANGE), with or without KEEP_SIZE.
    Zero { path: String, offset: u64, length: u64, keep_size: bool },
    /// Takes whole blocks out: what lies behind moves down (our collapse_range).
    Collapse { path: String, offset: u64, length: u64 },
    /// Makes room of whole blocks: what lies behind moves up (our insert_range).
    Insert { path: String, offset: u64, length: u64 },
    /// chmod.
    ChangeMode { path: String, mode: u16 },
    /// setxattr of a `user.` attribute.
    SetXattr { path: String, name: String, value: String },
    /// removexattr.
    RemoveXattr { path: String, name: String },
    /// fsync of a file.
    Fsync { path: String },
    /// fdatasync of a file.
    Fdatasync { path: String },
    /// fsync of a directory.
    FsyncDirectory { path: String },
    /// Everything durable (our sync ioctl).
    Sync,
    /// Not POSIX: background work gets its turn (writeback, checkpoint, discard, copygc). Promises nothing.
    Settle,
    /// Not POSIX: what comes before it only prepares; the run is not cut there.
    Begin,
    /// Not POSIX: background work gets so many turns, and no more.
    Turns { count: u32 },
}

/// How a write is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Way {
    /// O_SYNC: durable when it returns, as after an fsync.
    Synchronous,
    /// O_DIRECT, at block boundaries.
    Direct,
    /// O_DIRECT and O_SYNC.
    DirectSynchronous,
    /// O_APPEND.
    Append,
}

impl Way {
    /// Whether it promises durability.
    #[must_use]
    pub fn is_synchronous(self) -> bool {
        matches!(self, Self::Synchronous | Self::DirectSynchronous)
    }

    /// Whether it goes past the cache.
    #[must_use]
    pub fn is_direct(self) -> bool {
        matches!(self, Self::Direct | Self::DirectSynchronous)
    }
}

impl Operation {
    /// Whether its return promises durability.
    #[must_use]
    pub fn is_sync(&self) -> bool {
        match self {
            Self::WriteAs { way, .. } => way.is_synchronous(),
            _ => matches!(self, Self::Fsync { .. } | Self::Fdatasync { .. } | Self::FsyncDirectory { .. } | Self::Sync),
        }
    }
}

impl Operation {
    /// Whether it must not fail for lack of space.
    #[must_use]
    pub fn gives_space_back(&self) -> bool {
        matches!(
            self,
            Self::Unlink { .. }
                | Self::RemoveDirectory { .. }
                | Self::Release
                | Self::OpenTruncated { .. }
                | Self::Truncate { size: 0, .. }
        )
    }

    /// What it did if it stopped after so many bytes; `None` if that is nothing.
    #[must_use]
    pub fn cut_to(&self, done: u64) -> Option<Self> {
        let mut cut = self.clone();
        match &mut cut {
            Self::Write { length, .. } | Self::WriteAs { length, .. } | Self::WriteUnlinked { length, .. }
                if done > 0 =>
            {
                *length = done.min(*length);
                Some(cut)
            }
            _ => None,
        }
    }
}

/// Set in a write's tag: its bytes shrink to about a quarter when they are compressed.
pub const COMPRESSIBLE: u32 = 1 << 31;

/// The bytes that write number `tag` puts at `[offset, offset + length)`: each word names its write and its place, so that bytes of another
/// file, another write or another place never pass for the right ones, and none is zero. With [`COMPRESSIBLE`] one word in eight does; the
/// others are all the same.
#[must_use]
pub fn content(tag: u32, offset: u64, length: u64) -> Vec<u8> {
    (offset..offset + length)
        .map(|at| {
            if tag & COMPRESSIBLE != 0 && at / 8 % 8 != 0 {
                return 0x55;
            }
            let word = (u64::from(tag) << 40 ^ (at / 8)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            word.rotate_left(17).to_le_bytes()[(at % 8) as usize] | 1
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_depends_on_tag_and_place_not_on_the_cut() {
        let whole = content(3, 100, 5000);
        assert_eq!(whole[1000..1700], content(3, 1100, 700));
        assert_ne!(content(4, 100, 64), whole[..64]);
        assert_ne!(content(3, 4196, 64), whole[..64]);
        assert!(whole.iter().all(|&byte| byte != 0));
        let compressible = content(3 | COMPRESSIBLE, 0, 4096);
        assert_ne!(content(4 | COMPRESSIBLE, 0, 4096), compressible);
        assert_ne!(content(3 | COMPRESSIBLE, 4096, 4096), compressible);
        assert_eq!(compressible.iter().filter(|&&byte| byte == 0x55).count() / 100, 35);
    }
}
