//! Checks: extended attributes decode, belong to an inode that exists, and stand under the hash of their name. Collects nothing.

use coppicefs::Result;
use coppicefs::format::BtreeId;
use coppicefs::format::namespace::XattrBucket;

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
            if !checker.state.inodes.contains_key(&position.inode) {
                checker.report(Problem::XattrOwner { position });
            }
            for xattr in bucket.0 {
                let hash = checker.filesystem.namespace().hash(&xattr.name);
                if hash != position.offset {
                    let reason = format!("it stands under hash {:#x}, its own is {hash:#x}", position.offset);
                    checker.report(Problem::XattrName { position, name: printable(&xattr.name), reason });
                }
            }
        }
        Ok(())
    })
}
