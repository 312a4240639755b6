//! [`Tree`]: everything that a filesystem shows, as a walk from the root finds it.

use std::collections::BTreeMap;

/// What a path is, and what it holds.
#[derive(Clone, PartialEq, Eq)]
pub enum Kind {
    /// A file with its bytes.
    File(Vec<u8>),
    /// A directory.
    Directory,
    /// A symbolic link with its target.
    SymbolicLink(String),
    /// A named pipe.
    Fifo,
}

/// One path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Identity: paths with equal numbers are links to one inode.
    pub inode: u64,
    /// What it is and holds.
    pub kind: Kind,
    /// Permission bits; not looked at for symbolic links.
    pub mode: u16,
    /// Link count as stat shows it. 0 if not known; not looked at for directories.
    pub links: u32,
    /// `user.` attributes.
    pub xattrs: BTreeMap<String, String>,
}

/// All paths below the root, which is `/` and is there too.
pub type Tree = BTreeMap<String, Entry>;

impl std::fmt::Debug for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(bytes) => write!(f, "a file of {} bytes", bytes.len()),
            Self::Directory => f.write_str("a directory"),
            Self::Fifo => f.write_str("a fifo"),
            Self::SymbolicLink(target) => write!(f, "a symbolic link to {target:?}"),
        }
    }
}
