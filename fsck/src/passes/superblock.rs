//! Checks: every copy of the superblock is whole and of the newest sequence. Collects nothing.

use coppicefs::Result;
use coppicefs::recovery::superblock;

use super::Checker;
use crate::problem::Problem;

pub(super) fn run(checker: &mut Checker<'_>) -> Result<()> {
    for device in checker.filesystem.devices() {
        let found = superblock::read(&**device)?;
        checker.examine(3);
        for (offset, reason) in found.stale_copies {
            checker.report(Problem::SuperblockCopy { offset, reason });
        }
    }
    Ok(())
}
