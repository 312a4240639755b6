//! [`Model`]: the oracle. A plain in-memory filesystem that remembers its whole history, and says whether what a crash left is
//! something that the contract allows.
//!
//! The contract (`DESIGN.md`, what a crash leaves), as it is checked here:
//! 1. Namespace and attribute operations survive as a prefix of their history, in order, each whole or not at all; the prefix holds
//!    at least what was synced ([`Model::acknowledge`]).
//! 2. File data is, block by block, what the block held at some time since it was last synced (or later); synced data is there.
//!    Truncation, holes and zeroed ranges (edges included), collapse and insert belong to the prefix, each whole: what they removed does not
//!    come back once they survived, and what a collapse or an insert moved was in the tree before.
//! 3. The size grows only with the data that made it grow: a block inside the recovered size is never shorter, and never zeros that the
//!    file did not hold.
//! 4. A file that was renamed over another name has the data it had at the rename, wherever the rename survived.
//!
//! Use: [`Model::begin`] before an operation is performed (from here on it *may* survive), [`Model::acknowledge`] once it returned (now what it
//! promises *must*), [`Model::check`] with what recovery shows. Cloning is cheap enough to keep one model for each crash point.

mod file;
mod namespace;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use rustix::io::Errno;

use self::file::{FileEvent, FileHistory};
pub use self::namespace::InodeId;
use self::namespace::{Changed, Namespace};
use crate::operation::{Operation, content};
use crate::tree::{Entry, Kind, Tree};

/// See the module's documentation.
#[derive(Clone, Debug)]
pub struct Model {
    block_bytes: u64,
    /// Operations begun so far: the number of the newest.
    operations: u64,
    /// The namespace after each operation that changed it, with the operation's number; the first is the empty one, number 0.
    versions: Vec<(u64, Namespace)>,
    /// At least the operations up to this number have survived any crash.
    required: u64,
    /// The newest operation that changed an inode's attributes, names or (for directories) entries.
    touched: BTreeMap<InodeId, u64>,
    files: BTreeMap<InodeId, FileHistory>,
}

impl Model {
    /// An empty filesystem whose data survives in blocks of `block_bytes`.
    #[must_use]
    pub fn new(block_bytes: u64) -> Self {
        Self {
            block_bytes,
            operations: 0,
            versions: vec![(0, Namespace::new())],
            required: 0,
            touched: BTreeMap::new(),
            files: BTreeMap::new(),
        }
    }

    /// How many operations have begun.
    #[must_use]
    pub fn operations(&self) -> u64 {
        self.operations
    }

    fn namespace(&self) -> &Namespace {
        // There is always the first version.
        &self.versions[self.versions.len() - 1].1
    }

    /// The operation is about to be performed.
    ///
    /// # Errors
    /// What POSIX says it fails with; it changes nothing then.
    pub fn begin(&mut self, operation: &Operation) -> Result<(), Errno> {
        let number = self.operations + 1;
        self.operations = number;
        let mut next = self.namespace().clone();
        let changed = next.apply(operation)?;
        self.check_shift(operation)?;
        if self.changes_times_alone(operation)? {
            return Ok(());
        }
        let mut push = |inode: InodeId, event| {
            self.files.entry(inode).or_insert_with(|| FileHistory::new(self.block_bytes)).push(number, event);
        };
        match (&changed, operation) {
            (
                Changed::Data(inode),
                Operation::Write { offset, length, tag, .. } | Operation::WriteAs { offset, length, tag, .. },
            ) => {
                push(*inode, FileEvent::Write { offset: *offset, data: content(*tag, *offset, *length).into() });
                return Ok(());
            }
            (Changed::Namespace { inodes, .. }, Operation::Truncate { size, .. }) => {
                inodes.iter().for_each(|&inode| push(inode, FileEvent::Truncate(*size)));
            }
            (Changed::Namespace { inodes, .. }, Operation::OpenTruncated { .. }) => {
                inodes.iter().for_each(|&inode| push(inode, FileEvent::Truncate(0)));
            }
            (Changed::Namespace { inodes, .. }, Operation::Allocate { offset, length, keep_size: false, .. }) => {
                inodes.iter().for_each(|&inode| push(inode, FileEvent::Grow(offset + length)));
            }
            (Changed::Namespace { inodes, .. }, Operation::Punch { offset, length, .. }) => {
                inodes.iter().for_each(|&inode| push(inode, FileEvent::Punch { offset: *offset, length: *length }));
            }
            (Changed::Namespace { inodes, .. }, Operation::Zero { offset, length, keep_size, .. }) => {
                let (offset, length, keep_size) = (*offset, *length, *keep_size);
                inodes.iter().for_each(|&inode| push(inode, FileEvent::Zero { offset, length, keep_size }));
            }
            (Changed::Namespace { inodes, .. }, Operation::Collapse { offset, length, .. }) => {
                let event = FileEvent::Shift { offset: *offset, removed: *length, inserted: 0 };
                inodes.iter().for_each(|&inode| push(inode, event.clone()));
            }
            (Changed::Namespace { inodes, .. }, Operation::Insert { offset, length, .. }) => {
                let event = FileEvent::Shift { offset: *offset, removed: 0, inserted: *length };
                inodes.iter().for_each(|&inode| push(inode, event.clone()));
            }
            _ => {}
        }
        if let Changed::Namespace { inodes, replacing } = changed {
            // The data of what takes the place of another file is there if the rename is.
            replacing.into_iter().for_each(|inode| push(inode, FileEvent::Settled));
            for inode in inodes {
                self.touched.insert(inode, number);
            }
            self.versions.push((number, next));
        }
        Ok(())
    }

    /// A punch behind the end of a file: times are not part of the model, so an fsync promises nothing of it, nor of what came before it.
    fn changes_times_alone(&self, operation: &Operation) -> Result<bool, Errno> {
        let Operation::Punch { path, offset, .. } = operation else { return Ok(false) };
        Ok(*offset >= self.size(self.namespace().lookup(path)?))
    }

    fn size(&self, inode: InodeId) -> u64 {
        self.files.get(&inode).map_or(0, |history| history.latest().len() as u64)
    }

    /// Collapse and insert are for whole blocks inside the file.
    fn check_shift(&self, operation: &Operation) -> Result<(), Errno> {
        let (path, end, length) = match operation {
            Operation::Collapse { path, offset, length } => (path, offset + length, length),
            Operation::Insert { path, offset, length } => (path, *offset, length),
            _ => return Ok(()),
        };
        let inode = self.namespace().lookup(path)?;
        let size = self.size(inode);
        let is_whole = end.is_multiple_of(self.block_bytes) && length.is_multiple_of(self.block_bytes);
        if is_whole && end < size { Ok(()) } else { Err(Errno::INVAL) }
    }

    /// The operation, which was begun last, has returned success: what it promises holds from now on.
    pub fn acknowledge(&mut self, operation: &Operation) {
        match operation {
            Operation::WriteAs { way, .. } if !way.is_synchronous() => {}
            // All that changed an inode is durable after fdatasync, too: times are not part of the model.
            Operation::Fsync { path }
            | Operation::Fdatasync { path }
            | Operation::WriteAs { path, .. }
            | Operation::FsyncDirectory { path } => {
                let Ok(inode) = self.namespace().lookup(path) else { return };
                let touched = self.touched.get(&inode).copied().unwrap_or(0);
                self.required = self.required.max(touched);
                if let Some(history) = self.files.get_mut(&inode) {
                    history.push(self.operations, FileEvent::Synced);
                }
            }
            Operation::Sync => {
                self.required = self.operations;
                for history in self.files.values_mut() {
                    history.push(self.operations, FileEvent::Synced);
                }
            }
            _ => {}
        }
        // What is synced is base: older versions can no longer be what a crash leaves.
        let oldest = self.oldest_allowed();
        self.versions.drain(..oldest);
    }

    /// Index of the oldest version that holds all that is required.
    fn oldest_allowed(&self) -> usize {
        self.versions.partition_point(|&(number, _)| number <= self.required).saturating_sub(1)
    }

    /// Whether a crash now may leave `tree`.
    ///
    /// # Errors
    /// Why not, for the version of the namespace that comes closest.
    pub fn check(&self, tree: &Tree) -> Result<(), String> {
        let mut closest: Option<(usize, String)> = None;
        for (number, namespace) in self.versions[self.oldest_allowed()..].iter().rev() {
            let problems = self.compare(tree, namespace, *number);
            if problems.is_empty() {
                return Ok(());
            }
            if closest.as_ref().is_none_or(|(count, _)| problems.len() < *count) {
                let first: Vec<&str> = problems.iter().take(5).map(String::as_str).collect();
                closest = Some((problems.len(), format!("as after operation {number}: {}", first.join("; "))));
            }
        }
        let (_, closest) = closest.unwrap_or_default();
        Err(format!(
            "no allowed state: operations up to {} must be there, {} have begun; closest is {closest}",
            self.required, self.operations
        ))
    }

    /// Whether `tree` is what the filesystem shows now, nothing lost.
    ///
    /// # Errors
    /// The differences.
    pub fn check_live(&self, tree: &Tree) -> Result<(), String> {
        let mut exact = self.clone();
        exact.acknowledge(&Operation::Sync);
        exact.check(tree)
    }

    fn compare(&self, tree: &Tree, namespace: &Namespace, number: u64) -> Vec<String> {
        let mut problems = Vec::new();
        let expected = namespace.paths();
        for path in tree.keys().filter(|path| !expected.contains_key(*path)) {
            problems.push(format!("{path} should not be there"));
        }
        // Two paths are one inode here exactly if they are there.
        let mut identity: BTreeMap<InodeId, u64> = BTreeMap::new();
        let mut seen: BTreeMap<u64, InodeId> = BTreeMap::new();
        for (path, inode) in &expected {
            let Some(found) = tree.get(path) else {
                problems.push(format!("{path} is missing"));
                continue;
            };
            if *identity.entry(*inode).or_insert(found.inode) != found.inode
                || *seen.entry(found.inode).or_insert(*inode) != *inode
            {
                problems.push(format!("{path} is a link to the wrong inode"));
            }
            if let Err(problem) = self.compare_one(namespace, *inode, found, number) {
                problems.push(format!("{path}: {problem}"));
            }
        }
        problems
    }

    fn compare_one(&self, namespace: &Namespace, inode: InodeId, found: &Entry, number: u64) -> Result<(), String> {
        let expected = namespace.entry(inode).ok_or("the model has lost it")?;
        match (&expected.kind, &found.kind) {
            (Kind::File(_), Kind::File(bytes)) => match self.files.get(&inode) {
                Some(history) => history.check(number, bytes)?,
                None if bytes.is_empty() => {}
                None => return Err(format!("has {} bytes, nothing was ever written", bytes.len())),
            },
            (expected, found) if expected == found => {}
            (expected, found) => return Err(format!("is {found:?}, should be {expected:?}")),
        }
        let has_mode = !matches!(expected.kind, Kind::SymbolicLink(_));
        if has_mode && expected.mode != found.mode {
            return Err(format!("has mode {:o}, should have {:o}", found.mode, expected.mode));
        }
        if !matches!(expected.kind, Kind::Directory) && found.links != 0 && expected.links != found.links {
            return Err(format!("has {} links, should have {}", found.links, expected.links));
        }
        if expected.xattrs != found.xattrs {
            return Err(format!("has attributes {:?}, should have {:?}", found.xattrs, expected.xattrs));
        }
        Ok(())
    }

    /// What the filesystem shows now.
    #[must_use]
    pub fn tree(&self) -> Tree {
        let namespace = self.namespace();
        namespace
            .paths()
            .into_iter()
            .filter_map(|(path, inode)| {
                let mut entry = namespace.entry(inode)?.clone();
                if let (Kind::File(bytes), Some(history)) = (&mut entry.kind, self.files.get(&inode)) {
                    *bytes = history.latest();
                }
                Some((path, entry))
            })
            .collect()
    }
}
