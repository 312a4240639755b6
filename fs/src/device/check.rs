//! What every device checks of a request before it touches the medium.

use std::io;

use super::BlockDevice;
use crate::error::{Error, Result};
use crate::sync::Arc;

/// An error of `device` in the words of [`Error::Device`].
pub(super) fn device_error(
    operation: &'static str,
    device: &dyn BlockDevice,
    offset: u64,
    length: u64,
    source: io::Error,
) -> Error {
    Error::Device { operation, device: device.name().to_owned(), offset, length, source: Arc::new(source) }
}

/// Checks that a range is aligned to the device's blocks and lies on it.
///
/// # Errors
/// [`Error::Invalid`] for a range that is not whole blocks (a bug of the caller), [`Error::Device`] for one beyond the end (a
/// corrupt address, or a truncated image).
pub(super) fn check_range(operation: &'static str, device: &dyn BlockDevice, offset: u64, length: u64) -> Result<()> {
    let block_bytes = u64::from(device.block_bytes());
    if !offset.is_multiple_of(block_bytes) || !length.is_multiple_of(block_bytes) {
        return Err(Error::Invalid(format!(
            "{operation} of {length} bytes at byte {offset} of {} is not whole blocks of {block_bytes} bytes",
            device.name()
        )));
    }
    let size = device.size_bytes();
    if offset.checked_add(length).is_none_or(|end| end > size) {
        let source = io::Error::new(io::ErrorKind::UnexpectedEof, format!("it ends at byte {size}"));
        return Err(device_error(operation, device, offset, length, source));
    }
    Ok(())
}
