//! Reading an extent's bytes with nothing but the devices: for rescue, where space, transactions and all that reads rely on may be lost.
//!
//! Every byte is verified as in [`super::read`]; here nobody else changes anything, so no bucket is referenced and no key looked up again. No locks.

use super::Shape;
use super::compress;
use super::extents::Extent;
use super::read::{block_is_good, verified_stream};
use crate::device::BlockDevice;
use crate::error::{Error, Result};
use crate::format::CompressionKind;
use crate::format::extent::{DataExtent, ExtentPointer, ExtentValue};
use crate::sync::Arc;

/// Bytes of an extent that cannot be read: an offset in it, and the first one behind.
#[derive(Clone, Debug)]
pub struct BadPart {
    /// First byte, in the extent.
    pub start: u64,
    /// First byte behind it.
    pub end: u64,
    /// Why.
    pub error: Error,
}

/// The bytes of an extent, zeros where they cannot be read, and which those are. `None` for what holds no bytes: a hole, or allocated space that
/// was never written. Takes as much memory as the extent covers, 1 MiB at most, and as its frame.
#[must_use]
pub fn read_extent(
    devices: &[Arc<dyn BlockDevice>],
    shape: &Shape,
    extent: &Extent,
) -> Option<(Vec<u8>, Vec<BadPart>)> {
    match &extent.value {
        ExtentValue::Unwritten { .. } | ExtentValue::Whiteout { .. } => None,
        ExtentValue::Inline(bytes) => Some((bytes.clone(), Vec::new())),
        ExtentValue::Data(data) if data.compression == CompressionKind::None => Some(read_raw(devices, shape, data)),
        ExtentValue::Data(data) => Some(match read_frame(devices, data) {
            Ok(bytes) => (bytes, Vec::new()),
            Err(error) => {
                let end = u64::from(data.length);
                (vec![0; data.length as usize], vec![BadPart { start: 0, end, error }])
            }
        }),
    }
}

fn read_at(devices: &[Arc<dyn BlockDevice>], pointer: &ExtentPointer, at: u64, bytes: &mut [u8]) -> Result<()> {
    let device = devices.get(usize::from(pointer.device.0));
    let device = device.ok_or_else(|| Error::corrupt("extent pointer", format!("device {}", pointer.device)))?;
    device.read(pointer.offset.saturating_add(at), bytes)
}

fn read_raw(devices: &[Arc<dyn BlockDevice>], shape: &Shape, data: &DataExtent) -> (Vec<u8>, Vec<BadPart>) {
    let mut bytes = vec![0; data.length as usize];
    let is_read = data.pointers.first().is_some_and(|first| read_at(devices, first, 0, &mut bytes).is_ok());
    let mut bad: Vec<BadPart> = Vec::new();
    let block_bytes = u64::from(shape.block_bytes);
    for (number, block) in (0..).zip(bytes.chunks_mut(shape.block_bytes as usize)) {
        if is_read && block_is_good(data, number, block) {
            continue;
        }
        let start = number * block_bytes;
        if let Err(error) = read_block(devices, data, number, start, block) {
            block.fill(0);
            bad.push(BadPart { start, end: start + block_bytes, error });
        }
    }
    (bytes, bad)
}

/// One block, from each copy in turn.
fn read_block(
    devices: &[Arc<dyn BlockDevice>],
    data: &DataExtent,
    number: u64,
    at: u64,
    block: &mut [u8],
) -> Result<()> {
    let mut last = Error::corrupt("extent", "it has no copies");
    for pointer in &data.pointers {
        match read_at(devices, pointer, at, block) {
            Ok(()) if block_is_good(data, number, block) => return Ok(()),
            Ok(()) => last = Error::corrupt("the block", "its checksum is wrong"),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn read_frame(devices: &[Arc<dyn BlockDevice>], data: &DataExtent) -> Result<Vec<u8>> {
    let mut last = Error::corrupt("extent", "it has no copies");
    for pointer in &data.pointers {
        let mut stored = vec![0; data.disk_bytes as usize];
        let mut decoded = vec![0; data.frame_bytes as usize];
        let outcome = read_at(devices, pointer, 0, &mut stored)
            .and_then(|()| compress::decode(data.compression, verified_stream(data, &stored)?, &mut decoded));
        match outcome {
            Ok(()) => {
                let part = decoded.get(data.frame_offset as usize..).and_then(|rest| rest.get(..data.length as usize));
                return part
                    .map(<[u8]>::to_vec)
                    .ok_or_else(|| Error::corrupt("compressed frame", "a part lies outside of it"));
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}
