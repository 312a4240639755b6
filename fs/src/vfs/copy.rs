//! copy_file_range: through the page cache, with no lock over the whole.

use super::Vfs;
use super::file::WriteAt;
use super::types::{Caller, CopyRequest};
use crate::error::{Error, Result};
use crate::pagecache::CopySink;
use rustix::io::Errno;

/// Bytes that are copied at a time.
const STEP_BYTES: u64 = 1 << 20;

impl Vfs {
    /// Copies; returns how many bytes. Stops early at the end of the source, and where something failed after a part was copied.
    ///
    /// # Errors
    /// Those of reading and writing; `EINVAL` for overlapping ranges of one file.
    pub fn copy_file_range(&self, _caller: &Caller, request: &CopyRequest) -> Result<u64> {
        self.check_writable()?;
        let source = self.handles.get(request.source_handle)?;
        let target = self.handles.get(request.target_handle)?;
        let (from, to) = (request.source_offset, request.target_offset);
        let is_same = source.inode.number == target.inode.number;
        if is_same && from < to.saturating_add(request.length_bytes) && to < from.saturating_add(request.length_bytes) {
            return Err(Errno::INVAL.into());
        }
        // The end of the source as it is now: the copy itself may move it.
        let length = request.length_bytes.min(source.inode.size().saturating_sub(from));
        let mut copied = 0;
        let mut buffer = vec![0; usize::try_from(length.min(STEP_BYTES)).unwrap_or(0)];
        while copied < length {
            let wanted = (length - copied).min(STEP_BYTES);
            let step = self.copy_step(&source, &target, from + copied, to + copied, wanted, &mut buffer);
            match step {
                Ok(0) => break,
                Ok(bytes) => copied += bytes,
                Err(error) if copied == 0 => return Err(error),
                Err(_) => break,
            }
        }
        Ok(copied)
    }

    fn copy_step(
        &self,
        source: &super::handle::Handle,
        target: &super::handle::Handle,
        from: u64,
        to: u64,
        length: u64,
        buffer: &mut [u8],
    ) -> Result<u64> {
        let size = source.inode.size();
        let bytes = self.read_into(source, from, length, size, &mut CopySink::new(buffer))?.into_result()?;
        let data = usize::try_from(bytes).ok().and_then(|bytes| buffer.get(..bytes));
        let data = data.ok_or_else(|| Error::Bug("a copy read more than it asked for".into()))?;
        self.write_bytes(&target.inode, WriteAt::Offset(to), data, true, false)
    }
}
