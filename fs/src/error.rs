//! What can go wrong, and the one place where it becomes an errno.
//!
//! Every layer returns [`Result`]. Errors from disk carry what is damaged ([`Corruption`]); errors from users carry what
//! they named. [`Error::errno`] is the only mapping to the numbers that POSIX knows.

use std::fmt;
use std::io;
use std::sync::Arc;

use crate::units::DeviceIndex;

/// Result of every fallible operation of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A structure on disk that is not what it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Corruption {
    /// What is damaged, in the format's terms: "superblock", "bset 3 of node 17", "journal record 1042".
    pub what: String,
    /// Where it lies, where that is known: device and offset in bytes.
    pub place: Option<(DeviceIndex, u64)>,
    /// What is wrong with it: what was expected and what was found.
    pub problem: String,
}

impl Corruption {
    /// A corruption at no known place (a decoder sees bytes, not addresses).
    pub fn new(what: impl Into<String>, problem: impl Into<String>) -> Self {
        Self { what: what.into(), place: None, problem: problem.into() }
    }

    /// The same corruption, at `offset` bytes on `device`.
    #[must_use]
    pub fn at(mut self, device: DeviceIndex, offset: u64) -> Self {
        self.place = Some((device, offset));
        self
    }
}

impl fmt::Display for Corruption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is damaged", self.what)?;
        if let Some((device, offset)) = self.place {
            write!(f, " (device {device}, byte {offset})")?;
        }
        write!(f, ": {}", self.problem)
    }
}

/// An error of any layer.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A device refused or failed an operation.
    #[error("{operation} of {length} bytes at byte {offset} of {device} failed: {source}")]
    Device {
        /// "read", "write", "flush", "discard".
        operation: &'static str,
        /// The device's path or name.
        device: String,
        /// Byte offset on the device.
        offset: u64,
        /// Length in bytes.
        length: u64,
        /// What the host said.
        #[source]
        source: Arc<io::Error>,
    },
    /// Something on disk is damaged.
    #[error("{0}")]
    Corrupt(Corruption),
    /// The filesystem latched read-only after an earlier failure, which is named.
    #[error("the filesystem is read-only after an error: {reason}")]
    Latched {
        /// The first failure.
        reason: String,
    },
    /// A change was asked of a filesystem that is mounted or opened read-only.
    #[error("the filesystem is mounted read-only")]
    ReadOnly,
    /// The transaction's closure must run again: something it had read has changed. Never leaves `transaction`.
    #[error("transaction restart")]
    Restart,
    /// There is no space for it.
    #[error("no space left: {0}")]
    NoSpace(&'static str),
    /// The image cannot be used: not ours, too new, too small, truncated. Says what to do.
    #[error("{0}")]
    Unusable(String),
    /// Somebody else holds the device. The caller may wait and try again.
    #[error("{device} is in use by {user}")]
    InUse {
        /// The device's path.
        device: String,
        /// Who holds it, in words: "process 12 (mount-coppice)", "another process".
        user: String,
        /// The processes that hold its lock, where they are known.
        processes: Vec<u32>,
    },
    /// The caller's argument is wrong. Says which and why.
    #[error("{0}")]
    Invalid(String),
    /// A POSIX outcome that needs no words of its own (ENOENT, EEXIST, ...).
    #[error("{}", io::Error::from_raw_os_error(.0.raw_os_error()))]
    Posix(rustix::io::Errno),
    /// An I/O error outside of a device (opening an image, reading /proc).
    #[error("{context}: {source}")]
    Io {
        /// What was being done, to what.
        context: String,
        /// What the host said.
        #[source]
        source: Arc<io::Error>,
    },
    /// The filesystem is being shut down.
    #[error("the filesystem is shut down")]
    Shutdown,
    /// A bug of ours that was caught before it did damage.
    #[error("internal error: {0}")]
    Bug(String),
}

impl Error {
    /// A corruption at no known place.
    pub fn corrupt(what: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Corrupt(Corruption::new(what, problem))
    }

    /// An I/O error with the words of what was being done.
    pub fn io(context: impl Into<String>, source: io::Error) -> Self {
        Self::Io { context: context.into(), source: Arc::new(source) }
    }

    /// The errno of this error, the only place where one becomes the other.
    #[must_use]
    pub fn errno(&self) -> rustix::io::Errno {
        use rustix::io::Errno;
        match self {
            Self::Posix(errno) => *errno,
            Self::NoSpace(_) => Errno::NOSPC,
            Self::ReadOnly | Self::Latched { .. } => Errno::ROFS,
            Self::Invalid(_) | Self::Unusable(_) => Errno::INVAL,
            Self::InUse { .. } => Errno::BUSY,
            Self::Shutdown => Errno::IO,
            Self::Restart => Errno::AGAIN,
            Self::Device { .. } | Self::Corrupt(_) | Self::Bug(_) => Errno::IO,
            Self::Io { source, .. } => source.raw_os_error().map_or(Errno::IO, Errno::from_raw_os_error),
        }
    }

    /// Whether this is damage on the medium (as against a refusal).
    #[must_use]
    pub fn is_media_error(&self) -> bool {
        matches!(self, Self::Device { .. } | Self::Corrupt(_))
    }
}

impl From<rustix::io::Errno> for Error {
    fn from(errno: rustix::io::Errno) -> Self {
        Self::Posix(errno)
    }
}

impl From<Corruption> for Error {
    fn from(corruption: Corruption) -> Self {
        Self::Corrupt(corruption)
    }
}
