//! Checks: extended attributes decode, belong to an inode that exists, and stand under the hash of their name. Collects nothing.

use coppicefs::Result;
use coppicefs::format::BtreeId;
use coppicefs::format::namespace::{NAME_BYTES_MAX, XattrBucket};

use super::{Checker, printable};
use crate::problem::Problem;

pub(super) fn run(checker: &mut Checker<'_>) -> Result<()> {
    checker.for_each_batch(BtreeId::Xattrs, |checker, keys| {
        for (position, value) in keys {
            let bucket = match XattrBucket::decode(&value) {
                Ok(bucket) => bucket,
                Err(error) => {
                    checker.undecodable(BtreeId::Xattrs, position, &error);
                    continue;
                }
            };
            if !checker.is_place(position) {
                checker.misplaced(BtreeId::Xattrs, position);
                continue;
            }
            if !checker.state.inodes.contains_key(&position.inode) {
                checker.report(Problem::XattrOwner { position });
            }
            for xattr in bucket.0 {
                let hash = checker.filesystem.namespace().hash(&xattr.name);
                let is_possible = is_possible_xattr(&xattr.name);
                if hash != position.offset || !is_possible {
                    let reason = if is_possible {
                        format!("it stands under hash {:#x}, its own is {hash:#x}", position.offset)
                    } else {
                        "not a possible name".into()
                    };
                    checker.report(Problem::XattrName { position, name: printable(&xattr.name), reason });
                }
            }
        }
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
