//! Names and attributes of the model: one value for each moment of the history. File data is not here.

use std::collections::BTreeMap;
use std::sync::Arc;

use rustix::io::Errno;

use crate::operation::Operation;
use crate::tree::{Entry, Kind};

/// Number of an inode in the model, never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InodeId(pub u64);

const ROOT: InodeId = InodeId(1);

/// What an operation changed.
pub(super) enum Changed {
    /// The data of a file.
    Data(InodeId),
    /// Names or attributes: of these inodes (for a file whose size changed, it alone).
    Namespace {
        inodes: Vec<InodeId>,
        /// Files that took the place of another inode, by rename or exchange.
        replacing: Vec<InodeId>,
    },
    /// Nothing (a sync).
    Nothing,
}

#[derive(Clone, Debug)]
struct Node {
    /// Kind, mode, links, attributes; the bytes of files are not kept here.
    entry: Entry,
    /// Entries, for directories.
    children: BTreeMap<String, InodeId>,
}

/// See the module's documentation. Cloning shares the nodes.
#[derive(Clone, Debug)]
pub(super) struct Namespace {
    nodes: BTreeMap<InodeId, Arc<Node>>,
    next: u64,
}

fn entry(inode: InodeId, kind: Kind, mode: u16) -> Entry {
    Entry { inode: inode.0, kind, mode, links: 0, xattrs: BTreeMap::new() }
}

/// Folder and name of a path.
fn split(path: &str) -> Result<(&str, &str), Errno> {
    match path.rsplit_once('/') {
        Some((_, "")) | None => Err(Errno::BUSY),
        Some(("", name)) => Ok(("/", name)),
        Some(parts) => Ok(parts),
    }
}

impl Namespace {
    pub(super) fn new() -> Self {
        let root = Node { entry: entry(ROOT, Kind::Directory, 0o755), children: BTreeMap::new() };
        Self { nodes: BTreeMap::from([(ROOT, Arc::new(root))]), next: ROOT.0 + 1 }
    }

    pub(super) fn entry(&self, inode: InodeId) -> Option<&Entry> {
        self.nodes.get(&inode).map(|node| &node.entry)
    }

    /// The inode that a path names; symbolic links are not followed.
    pub(super) fn lookup(&self, path: &str) -> Result<InodeId, Errno> {
        let mut at = ROOT;
        for name in path.split('/').filter(|name| !name.is_empty()) {
            let node = self.node(at)?;
            if node.entry.kind != Kind::Directory {
                return Err(Errno::NOTDIR);
            }
            at = *node.children.get(name).ok_or(Errno::NOENT)?;
        }
        Ok(at)
    }

    /// All paths, the root included.
    pub(super) fn paths(&self) -> BTreeMap<String, InodeId> {
        let mut paths = BTreeMap::from([("/".to_owned(), ROOT)]);
        let mut folders = vec![(String::new(), ROOT)];
        while let Some((prefix, folder)) = folders.pop() {
            let Some(node) = self.nodes.get(&folder) else { continue };
            for (name, &child) in &node.children {
                let path = format!("{prefix}/{name}");
                folders.push((path.clone(), child));
                paths.insert(path, child);
            }
        }
        paths
    }

    fn node(&self, inode: InodeId) -> Result<&Node, Errno> {
        self.nodes.get(&inode).map(|node| &**node).ok_or(Errno::NOENT)
    }

    fn node_mut(&mut self, inode: InodeId) -> Result<&mut Node, Errno> {
        self.nodes.get_mut(&inode).map(Arc::make_mut).ok_or(Errno::NOENT)
    }

    fn folder_of<'a>(&self, path: &'a str) -> Result<(InodeId, &'a str), Errno> {
        let (folder, name) = split(path)?;
        let folder = self.lookup(folder)?;
        if self.node(folder)?.entry.kind != Kind::Directory {
            return Err(Errno::NOTDIR);
        }
        Ok((folder, name))
    }

    fn file(&self, path: &str) -> Result<InodeId, Errno> {
        let inode = self.lookup(path)?;
        match self.node(inode)?.entry.kind {
            Kind::File(_) => Ok(inode),
            Kind::Directory => Err(Errno::ISDIR),
            Kind::SymbolicLink(_) | Kind::Fifo => Err(Errno::LOOP),
        }
    }

    fn add(&mut self, path: &str, kind: Kind, mode: u16) -> Result<Changed, Errno> {
        let (folder, name) = self.folder_of(path).map_err(|errno| if path == "/" { Errno::EXIST } else { errno })?;
        if self.node(folder)?.children.contains_key(name) {
            return Err(Errno::EXIST);
        }
        let inode = InodeId(self.next);
        self.next += 1;
        let node = Node { entry: entry(inode, kind, mode), children: BTreeMap::new() };
        self.nodes.insert(inode, Arc::new(node));
        self.attach(folder, name, inode)?;
        Ok(Changed::Namespace { inodes: vec![folder, inode], replacing: Vec::new() })
    }

    fn attach(&mut self, folder: InodeId, name: &str, inode: InodeId) -> Result<(), Errno> {
        self.node_mut(folder)?.children.insert(name.to_owned(), inode);
        self.node_mut(inode)?.entry.links += 1;
        Ok(())
    }

    fn detach(&mut self, folder: InodeId, name: &str) -> Result<InodeId, Errno> {
        let inode = self.node_mut(folder)?.children.remove(name).ok_or(Errno::NOENT)?;
        let node = self.node_mut(inode)?;
        node.entry.links -= 1;
        if node.entry.links == 0 {
            self.nodes.remove(&inode);
        }
        Ok(inode)
    }

    fn rename(&mut self, from: &str, to: &str) -> Result<Changed, Errno> {
        let (from_folder, from_name) = self.folder_of(from)?;
        let (to_folder, to_name) = self.folder_of(to)?;
        let moved = self.lookup(from)?;
        let is_directory = self.node(moved)?.entry.kind == Kind::Directory;
        if is_directory && to.starts_with(&format!("{from}/")) {
            return Err(Errno::INVAL);
        }
        let mut inodes = vec![from_folder, to_folder, moved];
        let mut replacing = Vec::new();
        if let Some(&target) = self.node(to_folder)?.children.get(to_name) {
            if target == moved {
                return Ok(Changed::Nothing);
            }
            let over = self.node(target)?;
            match (is_directory, over.entry.kind == Kind::Directory) {
                (true, false) => return Err(Errno::NOTDIR),
                (false, true) => return Err(Errno::ISDIR),
                (true, true) if !over.children.is_empty() => return Err(Errno::NOTEMPTY),
                _ => {}
            }
            self.detach(to_folder, to_name)?;
            inodes.push(target);
            replacing.push(moved);
        }
        // Attached first, so that its count never falls to 0.
        self.attach(to_folder, to_name, moved)?;
        self.detach(from_folder, from_name)?;
        Ok(Changed::Namespace { inodes, replacing })
    }

    fn exchange(&mut self, one: &str, other: &str) -> Result<Changed, Errno> {
        let (one_folder, one_name) = self.folder_of(one)?;
        let (other_folder, other_name) = self.folder_of(other)?;
        let (first, second) = (self.lookup(one)?, self.lookup(other)?);
        if one.starts_with(&format!("{other}/")) || other.starts_with(&format!("{one}/")) {
            return Err(Errno::INVAL);
        }
        if first == second {
            return Ok(Changed::Nothing);
        }
        self.node_mut(one_folder)?.children.insert(one_name.to_owned(), second);
        self.node_mut(other_folder)?.children.insert(other_name.to_owned(), first);
        Ok(Changed::Namespace { inodes: vec![one_folder, other_folder, first, second], replacing: vec![first, second] })
    }

    /// Performs an operation on names and attributes.
    pub(super) fn apply(&mut self, operation: &Operation) -> Result<Changed, Errno> {
        let only = |inode| Changed::Namespace { inodes: vec![inode], replacing: Vec::new() };
        Ok(match operation {
            Operation::Create { path, mode } => self.add(path, Kind::File(Vec::new()), *mode)?,
            Operation::MakeDirectory { path, mode } => self.add(path, Kind::Directory, *mode)?,
            Operation::MakeFifo { path, mode } => self.add(path, Kind::Fifo, *mode)?,
            Operation::SymbolicLink { path, target } => self.add(path, Kind::SymbolicLink(target.clone()), 0o777)?,
            Operation::Link { existing, path } => {
                let inode = self.lookup(existing)?;
                let (folder, name) = self.folder_of(path)?;
                if self.node(folder)?.children.contains_key(name) {
                    return Err(Errno::EXIST);
                }
                if self.node(inode)?.entry.kind == Kind::Directory {
                    return Err(Errno::PERM);
                }
                self.attach(folder, name, inode)?;
                Changed::Namespace { inodes: vec![folder, inode], replacing: Vec::new() }
            }
            Operation::Unlink { path } => {
                let (folder, name) = self.folder_of(path)?;
                if self.node(self.lookup(path)?)?.entry.kind == Kind::Directory {
                    return Err(Errno::ISDIR);
                }
                Changed::Namespace { inodes: vec![folder, self.detach(folder, name)?], replacing: Vec::new() }
            }
            Operation::RemoveDirectory { path } => {
                let (folder, name) = self.folder_of(path)?;
                let node = self.node(self.lookup(path)?)?;
                if node.entry.kind != Kind::Directory {
                    return Err(Errno::NOTDIR);
                }
                if !node.children.is_empty() {
                    return Err(Errno::NOTEMPTY);
                }
                Changed::Namespace { inodes: vec![folder, self.detach(folder, name)?], replacing: Vec::new() }
            }
            Operation::Rename { from, to } => self.rename(from, to)?,
            Operation::Exchange { one, other } => self.exchange(one, other)?,
            Operation::Write { path, length, .. } => match self.file(path)? {
                _ if *length == 0 => Changed::Nothing,
                inode => Changed::Data(inode),
            },
            Operation::WriteAs { path, length, .. } => match self.file(path)? {
                _ if *length == 0 => Changed::Nothing,
                inode => Changed::Data(inode),
            },
            Operation::Truncate { path, .. } | Operation::OpenTruncated { path } => only(self.file(path)?),
            Operation::Allocate { path, length, .. } => match self.file(path)? {
                _ if *length == 0 => return Err(Errno::INVAL),
                inode => only(inode),
            },
            Operation::Hold { path } | Operation::Fdatasync { path } => {
                self.file(path)?;
                Changed::Nothing
            }
            Operation::Punch { path, length, .. }
            | Operation::Zero { path, length, .. }
            | Operation::Collapse { path, length, .. }
            | Operation::Insert { path, length, .. } => match self.file(path)? {
                _ if *length == 0 => return Err(Errno::INVAL),
                inode => only(inode),
            },
            Operation::ChangeMode { path, mode } => {
                let inode = self.lookup(path)?;
                self.node_mut(inode)?.entry.mode = *mode;
                only(inode)
            }
            Operation::SetXattr { path, name, value } => {
                let inode = self.lookup(path)?;
                self.node_mut(inode)?.entry.xattrs.insert(name.clone(), value.clone());
                only(inode)
            }
            Operation::RemoveXattr { path, name } => {
                let inode = self.lookup(path)?;
                self.node_mut(inode)?.entry.xattrs.remove(name).ok_or(Errno::NODATA)?;
                only(inode)
            }
            Operation::Fsync { path } => {
                self.lookup(path)?;
                Changed::Nothing
            }
            Operation::FsyncDirectory { path } => {
                if self.node(self.lookup(path)?)?.entry.kind != Kind::Directory {
                    return Err(Errno::NOTDIR);
                }
                Changed::Nothing
            }
            // What has no name is not there after a crash, and not part of what a walk finds.
            Operation::WriteUnlinked { .. } | Operation::Release => Changed::Nothing,
            Operation::Sync | Operation::Settle | Operation::Turns { .. } | Operation::Begin => Changed::Nothing,
        })
    }
}
