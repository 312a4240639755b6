//! SEEK_DATA and SEEK_HOLE over what is on disk. Unwritten extents and whiteouts are holes. What is dirty in memory is for the caller to lay over.

use super::Data;
use crate::error::Result;
use crate::format::extent::ExtentValue;
use crate::units::InodeNumber;

impl Data {
    /// The first offset at or after `offset`, below `size`, that holds data. `None` if there is none.
    ///
    /// # Errors
    /// The device's, or damage.
    pub fn seek_data(&self, inode: InodeNumber, offset: u64, size: u64) -> Result<Option<u64>> {
        let mut transaction = self.transactions.read();
        let mut at = offset;
        while at < size {
            // Inline data counts as its whole block.
            let from = if at < u64::from(self.shape.block_bytes) { 0 } else { at };
            let Some((_, _, extent)) = self.view().next(&mut transaction, inode, from)? else { break };
            match extent.value {
                ExtentValue::Data(_) | ExtentValue::Inline(_) => {
                    return Ok(Some(extent.start().max(at)).filter(|&found| found < size));
                }
                ExtentValue::Unwritten { .. } | ExtentValue::Whiteout { .. } => at = extent.end,
            }
        }
        Ok(None)
    }

    /// The first offset at or after `offset` that is in a hole; `size` if there is none before it. The rest of the block that inline data ends in counts as
    /// data, as it does once the file has grown.
    ///
    /// # Errors
    /// The device's, or damage.
    pub fn seek_hole(&self, inode: InodeNumber, offset: u64, size: u64) -> Result<u64> {
        let mut transaction = self.transactions.read();
        let mut at = offset;
        while at < size {
            let covering = self.view().next(&mut transaction, inode, at)?.map(|(_, _, extent)| extent);
            match covering {
                Some(extent)
                    if extent.start() <= at
                        && matches!(extent.value, ExtentValue::Data(_) | ExtentValue::Inline(_)) =>
                {
                    at = self.shape.block_ceiling(extent.end);
                }
                _ => return Ok(at),
            }
        }
        Ok(size)
    }
}
