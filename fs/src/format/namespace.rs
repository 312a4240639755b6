//! Values of the trees that make the namespace: inodes, directory entries, extended attributes, subvolumes, snapshots.

use bincode::{Decode, Encode};
use smallvec::SmallVec;

use super::{Reader, codec};
use crate::env::Timestamp;
use crate::error::Corruption;
use crate::units::InodeNumber;

/// Longest name of a directory entry in bytes.
pub const NAME_BYTES_MAX: usize = 255;

/// Type of a file, with the numbers of POSIX's `d_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum FileType {
    /// Named pipe.
    Fifo = 1,
    /// Character device.
    CharacterDevice = 2,
    /// Directory.
    Directory = 4,
    /// Block device.
    BlockDevice = 6,
    /// Regular file.
    Regular = 8,
    /// Symbolic link; its target is the file's data, inline.
    Symlink = 10,
    /// Socket.
    Socket = 12,
}

impl FileType {
    /// The type with this stored number.
    ///
    /// # Errors
    /// For an unknown number.
    pub fn from_stored(stored: u8) -> Result<Self, Corruption> {
        match stored {
            1 => Ok(Self::Fifo),
            2 => Ok(Self::CharacterDevice),
            4 => Ok(Self::Directory),
            6 => Ok(Self::BlockDevice),
            8 => Ok(Self::Regular),
            10 => Ok(Self::Symlink),
            12 => Ok(Self::Socket),
            other => Err(Corruption::new("file type", format!("unknown number {other}"))),
        }
    }

    /// The type in the upper bits of a mode, if there is one.
    #[must_use]
    pub fn from_mode(mode: u32) -> Option<Self> {
        u8::try_from((mode & 0o170_000) >> 12).ok().and_then(|stored| Self::from_stored(stored).ok())
    }

    /// The type as the upper bits of a mode.
    #[must_use]
    pub fn mode_bits(self) -> u32 {
        u32::from(self as u8) << 12
    }
}

/// A time as stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct StoredTime {
    /// Seconds since 1970.
    pub seconds: i64,
    /// 0..=999_999_999.
    pub nanoseconds: u32,
}

impl From<Timestamp> for StoredTime {
    fn from(time: Timestamp) -> Self {
        Self { seconds: time.seconds, nanoseconds: time.nanoseconds }
    }
}

impl From<StoredTime> for Timestamp {
    fn from(time: StoredTime) -> Self {
        Self { seconds: time.seconds, nanoseconds: time.nanoseconds }
    }
}

/// The newest version of an inode.
pub type Inode = InodeV1;

/// Versions of the stored inode.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
enum StoredInode {
    V1(InodeV1),
}

/// Value in the inodes tree.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct InodeV1 {
    /// Type and permissions, as `st_mode`.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Number of names; for a directory 2 + its subdirectories.
    pub link_count: u32,
    /// Size in bytes; for a directory the number of its entries.
    pub size: u64,
    /// Bytes that its extents are charged with or hold (`st_blocks * 512`).
    pub allocated_bytes: u64,
    /// Device number of a device node, as `st_rdev`.
    pub device_number: u64,
    /// `FS_*_FL` flags: immutable, append-only, noatime, nodump, sync.
    pub flags: u32,
    /// Distinguishes lives of an inode number.
    pub generation: u64,
    /// Last access.
    pub access_time: StoredTime,
    /// Last change of the data.
    pub modification_time: StoredTime,
    /// Last change of the inode.
    pub change_time: StoredTime,
    /// Creation.
    pub birth_time: StoredTime,
    /// A directory that names this inode (the first one, or the one of the newest name). The root's is itself. 0 if not known: a file with
    /// several names has lost the one that stood here.
    pub parent: u64,
    /// Name-hash part of the key of that entry.
    pub parent_hash: u64,
}

impl InodeV1 {
    /// Its type.
    #[must_use]
    pub fn file_type(&self) -> Option<FileType> {
        FileType::from_mode(self.mode)
    }

    /// The stored form.
    ///
    /// # Errors
    /// Never, in practice: an inode is small.
    pub fn encode(&self) -> Result<Vec<u8>, Corruption> {
        codec::encode("inode", &StoredInode::V1(self.clone()))
    }

    /// Decodes a stored value.
    ///
    /// # Errors
    /// If it is not one.
    pub fn decode(bytes: &[u8]) -> Result<Self, Corruption> {
        let StoredInode::V1(inode) = codec::decode("inode", bytes)?;
        let times = [inode.access_time, inode.modification_time, inode.change_time, inode.birth_time];
        if times.iter().any(|time| time.nanoseconds >= 1_000_000_000) {
            return Err(Corruption::new("inode", "nanoseconds out of range"));
        }
        Ok(inode)
    }
}

/// One name in a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dirent {
    /// Tells names with the same hash apart in readdir cookies; never reused while the others of the bucket live.
    pub discriminator: u8,
    /// Type of the inode.
    pub file_type: FileType,
    /// The inode.
    pub inode: InodeNumber,
    /// The name: 1 to 255 bytes, no `/`, no NUL, not `.` or `..`.
    pub name: Vec<u8>,
}

/// A [`Dirent`] whose name is where it was stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirentRef<'a> {
    /// As [`Dirent::discriminator`].
    pub discriminator: u8,
    /// As [`Dirent::file_type`].
    pub file_type: FileType,
    /// As [`Dirent::inode`].
    pub inode: InodeNumber,
    /// As [`Dirent::name`].
    pub name: &'a [u8],
}

/// Value in the dirents tree: all names of a directory with one hash, by discriminator. Nearly always one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DirentBucket(pub Vec<Dirent>);

impl DirentBucket {
    /// The stored form.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for dirent in &self.0 {
            out.push(dirent.discriminator);
            out.push(dirent.file_type as u8);
            out.extend_from_slice(&dirent.inode.0.to_le_bytes());
            out.push(u8::try_from(dirent.name.len()).unwrap_or(u8::MAX));
            out.extend_from_slice(&dirent.name);
        }
        out
    }

    /// Decodes a stored value.
    ///
    /// # Errors
    /// If it is not one.
    pub fn decode(bytes: &[u8]) -> Result<Self, Corruption> {
        let parsed = Self::parse(bytes)?;
        let owned = |dirent: DirentRef<'_>| Dirent {
            discriminator: dirent.discriminator,
            file_type: dirent.file_type,
            inode: dirent.inode,
            name: dirent.name.to_vec(),
        };
        Ok(Self(parsed.into_iter().map(owned).collect()))
    }

    /// As [`Self::decode`], with the names left where they are.
    ///
    /// # Errors
    /// If it is not one.
    pub fn parse(bytes: &[u8]) -> Result<SmallVec<[DirentRef<'_>; 1]>, Corruption> {
        let mut reader = Reader::new("directory entry", bytes);
        let mut dirents: SmallVec<[DirentRef<'_>; 1]> = SmallVec::new();
        while reader.remaining() > 0 {
            let discriminator = reader.u8()?;
            let file_type = FileType::from_stored(reader.u8()?)?;
            let inode = InodeNumber(reader.u64()?);
            let length = usize::from(reader.u8()?);
            let name = reader.bytes(length)?;
            if dirents.last().is_some_and(|last| last.discriminator >= discriminator) {
                return Err(reader.problem("discriminators out of order"));
            }
            dirents.push(DirentRef { discriminator, file_type, inode, name });
        }
        if dirents.is_empty() {
            return Err(Corruption::new("directory entry", "no name"));
        }
        Ok(dirents)
    }
}

/// One extended attribute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Xattr {
    /// Full name with its prefix: `user.x`, 1 to 255 bytes.
    pub name: Vec<u8>,
    /// Value.
    pub value: Vec<u8>,
}

/// Value in the xattrs tree: all attributes of an inode whose names have one hash.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct XattrBucket(pub Vec<Xattr>);

impl XattrBucket {
    /// The stored form.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for xattr in &self.0 {
            out.push(u8::try_from(xattr.name.len()).unwrap_or(u8::MAX));
            out.extend_from_slice(&u32::try_from(xattr.value.len()).unwrap_or(u32::MAX).to_le_bytes());
            out.extend_from_slice(&xattr.name);
            out.extend_from_slice(&xattr.value);
        }
        out
    }

    /// Decodes a stored value.
    ///
    /// # Errors
    /// If it is not one.
    pub fn decode(bytes: &[u8]) -> Result<Self, Corruption> {
        let mut reader = Reader::new("extended attribute", bytes);
        let mut xattrs = Vec::new();
        while reader.remaining() > 0 {
            let name_length = usize::from(reader.u8()?);
            let value_length = usize::try_from(reader.u32()?).unwrap_or(usize::MAX);
            let name = reader.bytes(name_length)?.to_vec();
            let value = reader.bytes(value_length)?.to_vec();
            if name.is_empty() {
                return Err(reader.problem("empty name"));
            }
            xattrs.push(Xattr { name, value });
        }
        if xattrs.is_empty() {
            return Err(Corruption::new("extended attribute", "no attribute"));
        }
        Ok(Self(xattrs))
    }
}

/// Value in the logged-operations tree: what is to be finished at mount.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum LoggedOperation {
    /// Drop the extents of `inode` beyond `size` bytes (rounded up to a block); the size itself is set already.
    Truncate {
        /// Inode number.
        inode: u64,
        /// Bytes that stay.
        size: u64,
    },
    /// Make what is left of a hole, or of a range of zeros that holds its space: `[start, end)`, whole blocks.
    Replace {
        /// Inode number.
        inode: u64,
        /// Where the work goes on.
        start: u64,
        /// Where it ends.
        end: u64,
        /// Whether space is held for the zeros (unwritten extents); else it becomes a hole.
        unwritten: bool,
    },
    /// Take `[offset, offset + length)`, whole blocks, out of the file: all behind it moves down by `length`. The size is changed already.
    Collapse {
        /// Inode number.
        inode: u64,
        /// First byte that goes.
        offset: u64,
        /// How many go.
        length: u64,
        /// Where the work goes on, in offsets from before: extents below `offset + length` are dropped, those behind it moved.
        cursor: u64,
    },
    /// Make room for `length` bytes, whole blocks, at `offset`: all behind it moves up. The size is changed already.
    Insert {
        /// Inode number.
        inode: u64,
        /// Where the room is made.
        offset: u64,
        /// How much.
        length: u64,
        /// Extents that end behind it, in offsets from before, have moved.
        cursor: u64,
    },
}

impl LoggedOperation {
    /// The inode that it is about.
    #[must_use]
    pub fn inode(&self) -> u64 {
        match self {
            Self::Truncate { inode, .. }
            | Self::Replace { inode, .. }
            | Self::Collapse { inode, .. }
            | Self::Insert { inode, .. } => *inode,
        }
    }

    /// The stored form.
    ///
    /// # Errors
    /// Never, in practice.
    pub fn encode(&self) -> Result<Vec<u8>, Corruption> {
        codec::encode("logged operation", self)
    }

    /// Decodes a stored value.
    ///
    /// # Errors
    /// If it is not one.
    pub fn decode(bytes: &[u8]) -> Result<Self, Corruption> {
        codec::decode("logged operation", bytes)
    }
}

/// Value in the subvolumes tree.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Subvolume {
    /// The snapshot that its present keys are written in.
    pub snapshot: u32,
    /// Inode number of its root directory.
    pub root: u64,
}

impl Subvolume {
    /// The stored form.
    ///
    /// # Errors
    /// Never, in practice.
    pub fn encode(&self) -> Result<Vec<u8>, Corruption> {
        codec::encode("subvolume", self)
    }

    /// Decodes a stored value.
    ///
    /// # Errors
    /// If it is not one.
    pub fn decode(bytes: &[u8]) -> Result<Self, Corruption> {
        codec::decode("subvolume", bytes)
    }
}

/// Value in the snapshots tree.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Snapshot {
    /// Its parent's id, 0 for the root of the snapshot tree.
    pub parent: u32,
    /// The subvolume that writes in it, if it is a leaf.
    pub subvolume: u32,
}

impl Snapshot {
    /// The stored form.
    ///
    /// # Errors
    /// Never, in practice.
    pub fn encode(&self) -> Result<Vec<u8>, Corruption> {
        codec::encode("snapshot", self)
    }

    /// Decodes a stored value.
    ///
    /// # Errors
    /// If it is not one.
    pub fn decode(bytes: &[u8]) -> Result<Self, Corruption> {
        codec::decode("snapshot", bytes)
    }
}
