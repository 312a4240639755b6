//! Extents as intervals: decoding with every check, cutting, and replacing a range of a file.
//!
//! The extents tree maps the *end* of each range to its value. Invariants that [`overwrite`] keeps and [`Shape::decode`] checks:
//!
//! 1. Extents of one inode do not overlap. What no extent covers is a hole.
//! 2. Every extent but inline data starts and ends on a block. Inline data covers `[0, n)`, n below a block, and is the only extent of
//!    block 0 then. It is replaced whole.
//! 3. A raw extent lies in one bucket, at a block boundary, with one checksum for each block; its cut parts are raw extents again, with
//!    their own pointers and checksums. So a part can be moved, verified and freed alone.
//! 4. A part of a compressed frame keeps the whole frame's pointers, length and checksum, and says which bytes of the decoded frame it is. The
//!    frame's space is free only when the last part is gone: each is charged at least one block ([`DataExtent::charged_bytes`]).
//!
//! Cutting a hole into the middle of a compressed extent can raise what is charged (two parts instead of one), never what is
//! physically used; copygc moves such a frame as one, so it never needs more than the bytes on disk.
//!
//! No locks, no I/O of its own; [`overwrite`] reads through the caller's transaction.

use smallvec::SmallVec;

use crate::error::{Corruption, Error, Result};
use crate::format::extent::{DataExtent, ExtentPointer, ExtentValue};
use crate::format::{BtreeId, ChecksumKind, CompressionKind, Position, Value};
use crate::snapshot::Snapshots;
use crate::transaction::Transaction;
use crate::units::{BucketIndex, InodeNumber, SnapshotId};

/// Sizes that every extent of a filesystem obeys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Unit of checksums and of cutting, in bytes.
    pub block_bytes: u32,
    /// Bytes of a bucket.
    pub bucket_bytes: u32,
    /// Sizes of the devices in bytes, by index.
    pub device_bytes: SmallVec<[u64; 1]>,
}

/// One extent with its place: file bytes `[end - value.length(), end)`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extent {
    /// File offset of the first byte after it.
    pub end: u64,
    /// What it is.
    pub value: ExtentValue,
}

impl Extent {
    /// File offset of its first byte.
    #[must_use]
    pub fn start(&self) -> u64 {
        self.end - self.value.length()
    }
}

/// Bytes that an extent adds to its inode's `allocated_bytes`.
#[must_use]
pub fn allocated_bytes(value: &ExtentValue) -> u64 {
    match value {
        ExtentValue::Data(data) => u64::from(data.charged_bytes()),
        ExtentValue::Inline(bytes) => bytes.len() as u64,
        ExtentValue::Unwritten { length } => u64::from(*length),
        ExtentValue::Whiteout { .. } => 0,
    }
}

impl Shape {
    /// The bucket that a pointer points into.
    #[must_use]
    pub fn bucket_of(&self, pointer: &ExtentPointer) -> BucketIndex {
        BucketIndex(pointer.offset / u64::from(self.bucket_bytes))
    }

    /// Rounds down to a block.
    #[must_use]
    pub fn block_floor(&self, offset: u64) -> u64 {
        crate::units::round_down(offset, u64::from(self.block_bytes))
    }

    /// Rounds up to a block.
    #[must_use]
    pub fn block_ceiling(&self, offset: u64) -> u64 {
        crate::units::round_up(offset, u64::from(self.block_bytes))
    }

    /// Decodes a key of the extents tree and checks everything that can be checked without looking elsewhere.
    ///
    /// # Errors
    /// [`Error::Corrupt`], naming the key.
    pub fn decode(&self, position: Position, value: &[u8]) -> Result<Extent> {
        let value = ExtentValue::decode(value).map_err(|mut corruption| {
            corruption.what = format!("extent {position}");
            corruption
        })?;
        match self.problem(position.offset, &value) {
            None => Ok(Extent { end: position.offset, value }),
            Some(problem) => Err(Corruption::new(format!("extent {position}"), problem).into()),
        }
    }

    /// What is wrong with so many bytes of inline data that end at `end`.
    #[must_use]
    pub fn inline_problem(&self, end: u64, length: u64) -> Option<String> {
        if length > end {
            return Some(format!("{length} bytes that end at {end}"));
        }
        let bad = length != end || length >= u64::from(self.block_bytes);
        bad.then(|| format!("{length} inline bytes that end at {end}"))
    }

    /// What is wrong with an extent that ends at `end`, as far as it can be seen without looking elsewhere.
    #[must_use]
    pub fn problem(&self, end: u64, value: &ExtentValue) -> Option<String> {
        let block = u64::from(self.block_bytes);
        let length = value.length();
        if let ExtentValue::Inline(_) = value {
            return self.inline_problem(end, length);
        }
        if length > end {
            return Some(format!("{length} bytes that end at {end}"));
        }
        if !length.is_multiple_of(block) || !end.is_multiple_of(block) {
            return Some(format!("{length} bytes that end at {end} are not whole blocks of {block}"));
        }
        let ExtentValue::Data(data) = value else { return None };
        let raw = data.compression == CompressionKind::None;
        if !u64::from(data.disk_bytes).is_multiple_of(block)
            || !u64::from(data.frame_offset).is_multiple_of(block)
            || !u64::from(data.frame_bytes).is_multiple_of(block)
        {
            return Some(format!(
                "{} bytes on disk, part at {} of a frame of {}: not whole blocks of {block}",
                data.disk_bytes, data.frame_offset, data.frame_bytes
            ));
        }
        let checksum_count = match (data.checksum_kind, raw) {
            (ChecksumKind::None, _) => 0,
            (_, true) => length / block,
            (_, false) => 1,
        };
        if data.checksums.len() as u64 != checksum_count {
            return Some(format!("{} checksums, {checksum_count} expected", data.checksums.len()));
        }
        data.pointers.iter().find_map(|pointer| {
            let bucket_bytes = u64::from(self.bucket_bytes);
            let Some(&device_bytes) = self.device_bytes.get(usize::from(pointer.device.0)) else {
                return Some(format!("points to device {}, which does not exist", pointer.device));
            };
            let in_bucket = pointer.offset % bucket_bytes;
            let beyond = pointer.offset.checked_add(u64::from(data.disk_bytes)).is_none_or(|end| end > device_bytes);
            (beyond || !in_bucket.is_multiple_of(block) || in_bucket + u64::from(data.disk_bytes) > bucket_bytes)
                .then(|| format!("points to {}+{} on device {}", pointer.offset, data.disk_bytes, pointer.device))
        })
    }
}

/// The part `[from, to)` of an extent, both counted in bytes from its start. Of inline data only a prefix can be had.
///
/// # Errors
/// [`Error::Bug`] if the part is empty, outside, or not made of whole blocks: callers align first, and decoding has checked the extent.
pub fn part(value: &ExtentValue, from: u64, to: u64, block_bytes: u32) -> Result<ExtentValue> {
    let block = u64::from(block_bytes);
    let bug = || Error::Bug(format!("part {from}..{to} of an extent of {} bytes", value.length()));
    if from >= to || to > value.length() {
        return Err(bug());
    }
    if from == 0 && to == value.length() {
        return Ok(value.clone());
    }
    if let ExtentValue::Inline(bytes) = value {
        let prefix = usize::try_from(to).ok().and_then(|to| bytes.get(..to)).filter(|_| from == 0);
        return prefix.map(|prefix| ExtentValue::Inline(prefix.to_vec())).ok_or_else(bug);
    }
    let narrow = |bytes: u64| u32::try_from(bytes).map_err(|_| bug());
    if !from.is_multiple_of(block) || !to.is_multiple_of(block) {
        return Err(bug());
    }
    let length = narrow(to - from)?;
    Ok(match value {
        ExtentValue::Unwritten { .. } => ExtentValue::Unwritten { length },
        ExtentValue::Whiteout { .. } => ExtentValue::Whiteout { length },
        ExtentValue::Inline(_) => return Err(bug()),
        ExtentValue::Data(data) if data.compression != CompressionKind::None => {
            ExtentValue::Data(DataExtent { length, frame_offset: data.frame_offset + narrow(from)?, ..data.clone() })
        }
        ExtentValue::Data(data) => {
            let first = usize::try_from(from / block).map_err(|_| bug())?;
            let last = usize::try_from(to / block).map_err(|_| bug())?;
            let checksums = match data.checksum_kind {
                ChecksumKind::None => Vec::new(),
                _ => data.checksums.get(first..last).ok_or_else(bug)?.to_vec(),
            };
            let pointers = data.pointers.iter().map(|p| ExtentPointer { offset: p.offset + from, ..*p }).collect();
            ExtentValue::Data(DataExtent {
                length,
                pointers,
                disk_bytes: length,
                stream_bytes: length,
                frame_bytes: length,
                checksums,
                ..data.clone()
            })
        }
    })
}

/// What is left of an extent when `[start, end)` of the file is taken out of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Remainder {
    /// What lies before `start`.
    pub front: Option<Extent>,
    /// What lies from `end` on.
    pub back: Option<Extent>,
}

/// Takes `[start, end)`, whole blocks, out of an extent that overlaps it.
///
/// # Errors
/// [`Error::Bug`] if the range is not whole blocks.
pub fn take_out(extent: &Extent, start: u64, end: u64, block_bytes: u32) -> Result<Remainder> {
    if let ExtentValue::Inline(_) = extent.value {
        // Block 0 goes as a whole, and inline data with it.
        return Ok(if start == 0 {
            Remainder::default()
        } else {
            Remainder { front: Some(extent.clone()), back: None }
        });
    }
    let first = extent.start();
    let front = match start.checked_sub(first) {
        None | Some(0) => None,
        Some(kept) => Some(Extent { end: start, value: part(&extent.value, 0, kept, block_bytes)? }),
    };
    let back = if extent.end > end {
        let value = part(&extent.value, end - first, extent.value.length(), block_bytes)?;
        Some(Extent { end: extent.end, value })
    } else {
        None
    };
    Ok(Remainder { front, back })
}

/// Whose keys are looked at: the snapshot that the caller reads and writes in, and the sizes that extents obey.
#[derive(Clone, Copy)]
pub struct View<'a> {
    /// The snapshot filter.
    pub snapshots: &'a Snapshots,
    /// The snapshot.
    pub snapshot: SnapshotId,
    /// Sizes.
    pub shape: &'a Shape,
}

impl View<'_> {
    /// The extent with the smallest end above `from`, with its key: the one that covers `from`, or the next one after it.
    ///
    /// # Errors
    /// The device's, or damage.
    pub fn next(
        &self,
        transaction: &mut Transaction<'_>,
        inode: InodeNumber,
        from: u64,
    ) -> Result<Option<(Position, Value, Extent)>> {
        let Some(from) = from.checked_add(1) else { return Ok(None) };
        let (from, to) = (Position::new(inode.0, from, 0), Position::new(inode.0, u64::MAX, u32::MAX));
        let found = self.snapshots.next_visible(transaction, BtreeId::Extents, from, to, self.snapshot)?;
        let Some((position, value)) = found else { return Ok(None) };
        let extent = self.shape.decode(position, &value)?;
        Ok(Some((position, value, extent)))
    }

    /// The position of the extent of `inode` that ends at `end`, in this view's snapshot.
    #[must_use]
    pub fn position(&self, inode: InodeNumber, end: u64) -> Position {
        Position::new(inode.0, end, self.snapshot.0)
    }
}

/// What [`overwrite`] came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overwritten {
    /// The range was replaced up to here; less than was asked for if too many old extents overlap it.
    pub covered_to: u64,
    /// Change of the inode's `allocated_bytes`.
    pub allocated_delta: i64,
}

/// Replaces `[start, end)` of a file by `new`, or by a hole.
///
/// `start` and `end` are whole blocks (`end` may be `u64::MAX`: to the end). `new` covers exactly the range; only inline data may be shorter, for
/// a range of block 0. At most `keys_max` old extents are touched: if more overlap, it stops after those (`covered_to`), and only that part of
/// `new` is there. Old extents are trimmed, split or deleted; bucket counts and backpointers follow by the transaction's trigger.
///
/// # Errors
/// The device's, or damage; [`Error::Bug`] for a range that is not whole blocks.
pub fn overwrite(
    transaction: &mut Transaction<'_>,
    view: &View<'_>,
    inode: InodeNumber,
    start: u64,
    end: u64,
    new: Option<&ExtentValue>,
    keys_max: usize,
) -> Result<Overwritten> {
    let block_bytes = view.shape.block_bytes;
    let mut allocated_delta = 0_i64;
    let mut covered_to = end;
    let mut cursor = start;
    let mut touched = 0;
    while cursor < end {
        let Some((position, _, old)) = view.next(transaction, inode, cursor)? else { break };
        if old.start() >= end {
            break;
        }
        if touched >= keys_max.max(1) {
            covered_to = cursor;
            break;
        }
        if position.snapshot != view.snapshot.0 {
            // A key of an ancestor must be hidden, not changed; nothing makes snapshots yet, so this one is not ours.
            return Err(
                Corruption::new(format!("extent {position}"), "it belongs to a snapshot that does not exist").into()
            );
        }
        touched += 1;
        allocated_delta -= signed(allocated_bytes(&old.value));
        let Remainder { front, back } = take_out(&old, start, end, block_bytes)?;
        transaction.delete(BtreeId::Extents, position);
        for kept in front.into_iter().chain(back) {
            allocated_delta += signed(allocated_bytes(&kept.value));
            transaction.put(BtreeId::Extents, view.position(inode, kept.end), kept.value.encode());
        }
        // Inline data ends inside its block, and nothing else can be there.
        cursor = view.shape.block_ceiling(old.end);
    }
    if let Some(new) = new {
        let value = if covered_to < end { part(new, 0, covered_to - start, block_bytes)? } else { new.clone() };
        let new_end = start + value.length();
        allocated_delta += signed(allocated_bytes(&value));
        transaction.put(BtreeId::Extents, view.position(inode, new_end), value.encode());
    }
    Ok(Overwritten { covered_to, allocated_delta })
}

/// `bytes` as a signed number; sizes of extents are far below the limit.
pub(super) fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}
