//! Reading and writing the copies of the superblock.

use crate::device::BlockDevice;
use crate::error::{Error, Result};
use crate::format::superblock::{SUPERBLOCK_BYTES, Superblock, copy_offsets};
use crate::memory::AlignedBuffer;

/// The superblock of a device, and which copies are not as they should be.
#[derive(Debug)]
pub struct Found {
    /// The newest valid copy.
    pub superblock: Superblock,
    /// Byte offsets of copies that are damaged or older, with the reason.
    pub stale_copies: Vec<(u64, String)>,
}

/// Reads all copies and chooses the newest valid one.
///
/// # Errors
/// [`Error::Unusable`] if this is not a coppice filesystem, is too new, or the device is shorter than the filesystem; says what to do.
pub fn read(device: &dyn BlockDevice) -> Result<Found> {
    let mut valid: Vec<(u64, Superblock)> = Vec::new();
    let mut bad: Vec<(u64, Error)> = Vec::new();
    let mut recognised = false;
    if device.size_bytes() == 0 {
        return Err(Error::Unusable(format!(
            "{} is empty: make a filesystem on it with mkfs-coppice --size SIZE",
            device.name()
        )));
    }
    let mut buffer = AlignedBuffer::zeroed(SUPERBLOCK_BYTES);
    for offset in copy_offsets(device.size_bytes()) {
        if offset + SUPERBLOCK_BYTES as u64 > device.size_bytes() {
            continue;
        }
        let outcome = device.read(offset, &mut buffer).and_then(|()| Superblock::decode(&buffer));
        recognised |= Superblock::is_recognised(&buffer);
        match outcome {
            Ok(superblock) => valid.push((offset, superblock)),
            Err(error @ Error::Unusable(_)) => return Err(error),
            Err(error) => bad.push((offset, error)),
        }
    }
    let Some(superblock) = valid.iter().map(|(_, superblock)| superblock).max_by_key(|superblock| superblock.sequence)
    else {
        return Err(not_ours(device, recognised, &bad));
    };
    let superblock = superblock.clone();
    let expected = superblock.members.first().map_or(0, |member| member.size_bytes);
    if device.size_bytes() < expected {
        return Err(Error::Unusable(format!(
            "{} is cut short: the filesystem is {expected} bytes long, the device only {}; restore the missing part (truncate --size={expected} gives back the length, not the data)",
            device.name(),
            device.size_bytes(),
        )));
    }
    let mut stale_copies: Vec<_> = bad.into_iter().map(|(offset, error)| (offset, error.to_string())).collect();
    for (offset, copy) in &valid {
        if *copy != superblock {
            stale_copies.push((*offset, format!("sequence {} of {}", copy.sequence, superblock.sequence)));
        }
    }
    Ok(Found { superblock, stale_copies })
}

fn not_ours(device: &dyn BlockDevice, recognised: bool, bad: &[(u64, Error)]) -> Error {
    if recognised {
        let reasons: Vec<_> = bad.iter().map(|(offset, error)| format!("byte {offset}: {error}")).collect();
        return Error::Unusable(format!(
            "no copy of the superblock of {} is whole ({})",
            device.name(),
            reasons.join("; ")
        ));
    }
    match bad.iter().find(|(_, error)| matches!(error, Error::Device { .. })) {
        Some((_, error)) => error.clone(),
        None => Error::Unusable(format!(
            "{} is not a coppice filesystem: no superblock was found (mkfs-coppice makes one; if it was one, fsck-coppice --rebuild finds what is left of it)",
            device.name()
        )),
    }
}

/// Writes all copies, one at a time with a flush between, so that a power cut damages at most one.
///
/// # Errors
/// The device's.
pub fn write(device: &dyn BlockDevice, superblock: &Superblock) -> Result<()> {
    let bytes = superblock.encode()?;
    let mut buffer = AlignedBuffer::zeroed(SUPERBLOCK_BYTES);
    buffer.copy_from_slice(&bytes);
    for offset in copy_offsets(device.size_bytes()) {
        device.write(offset, &buffer)?;
        device.flush()?;
    }
    Ok(())
}

/// Writes one copy again, and flushes.
///
/// # Errors
/// The device's.
pub fn write_copy(device: &dyn BlockDevice, superblock: &Superblock, offset: u64) -> Result<()> {
    let mut buffer = AlignedBuffer::zeroed(SUPERBLOCK_BYTES);
    buffer.copy_from_slice(&superblock.encode()?);
    device.write(offset, &buffer)?;
    device.flush()
}
