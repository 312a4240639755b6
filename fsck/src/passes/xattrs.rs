//! Checks: extended attributes decode, belong to an inode that exists, and stand under the hash of their name. Collects nothing.

use coppicefs::Result;
use coppicefs::btree::Keys;
use coppicefs::format::BtreeId;
use coppicefs::format::namespace::{NAME_BYTES_MAX, XattrBucket};
use rayon::prelude::*;

use super::{Checker, printable};
use crate::problem::Problem;

pub(super) fn run(checker: &mut Checker<'_>) -> Result<()> {
    checker.for_each_of_window(BtreeId::Xattrs, |checker, batch| {
        let namespace = checker.filesystem.namespace();
        let state = &checker.state;
        let is_place = |position| checker.is_place(position);
        let found: Vec<Problem> = batch
            .par_iter()
            .flat_map_iter(Keys::iter)
            .flat_map_iter(|(position, value)| {
                let undecodable =
                    |reason: String| vec![Problem::KeyUndecodable { btree: BtreeId::Xattrs, position, reason }];
                let bucket = match XattrBucket::decode(value) {
                    Ok(_) if !is_place(position) => return undecodable("no file has a key there".into()),
                    Ok(bucket) => bucket,
                    Err(error) => return undecodable(error.to_string()),
                };
                let mut problems = Vec::new();
                if !state.exists(position.inode) {
                    problems.push(Problem::XattrOwner { position });
                }
                for xattr in bucket.0 {
                    let hash = namespace.hash(&xattr.name);
                    let is_possible = is_possible_xattr(&xattr.name);
                    if hash != position.offset || !is_possible {
                        let reason = if is_possible {
                            format!("it stands under hash {:#x}, its own is {hash:#x}", position.offset)
                        } else {
                            "not a possible name".into()
                        };
                        problems.push(Problem::XattrName { position, name: printable(&xattr.name), reason });
                    }
                }
                problems
            })
            .collect();
        found.into_iter().for_each(|problem| checker.report(problem));
        Ok(())
    })
}

/// Whether an attribute can have this name.
pub(crate) fn is_possible_xattr(name: &[u8]) -> bool {
    let kinds: [&[u8]; 3] = [b"user.", b"trusted.", b"security."];
    let is_acl = matches!(name, b"system.posix_acl_access" | b"system.posix_acl_default");
    let is_of_kind = kinds.iter().any(|kind| name.len() > kind.len() && name.starts_with(kind));
    (is_acl || is_of_kind) && name.len() <= NAME_BYTES_MAX && !name.contains(&0)
}
