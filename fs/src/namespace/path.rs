//! From an inode to a name, for people: messages and tools. What is damaged on the way makes the path unknown, never an error of its own kind.

use super::Namespace;
use crate::error::Result;
use crate::transaction::Transaction;
use crate::units::InodeNumber;

/// Deepest place that is looked for: damaged directories may form a ring.
const DEPTH_MAX: usize = 4096;

impl Namespace {
    /// A path of the inode from the root of the subvolume, as bytes that begin with `/`. `None` where it has no name, or none that is
    /// known: see invariant 4 in [`super`].
    ///
    /// # Errors
    /// Those of the tree.
    pub fn path(&self, transaction: &mut Transaction<'_>, number: InodeNumber) -> Result<Option<Vec<u8>>> {
        let mut names = Vec::new();
        let mut at = number;
        while at != InodeNumber::ROOT {
            let Some(inode) = self.inode(transaction, at)? else { return Ok(None) };
            let parent = InodeNumber(inode.parent);
            let bucket = self.bucket(transaction, parent, inode.parent_hash)?;
            let name = bucket.and_then(|bucket| bucket.0.into_iter().find(|dirent| dirent.inode == at));
            let Some(name) = name.filter(|_| names.len() < DEPTH_MAX) else { return Ok(None) };
            names.push(name.name);
            at = parent;
        }
        if names.is_empty() {
            return Ok(Some(b"/".to_vec()));
        }
        Ok(Some(names.iter().rev().flat_map(|name| [b"/", name.as_slice()].concat()).collect()))
    }
}
