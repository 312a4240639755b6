//! What the trees are made of: copies, lost nodes, the node-space map.

use coppicefs::btree::Around;
use coppicefs::filesystem::Filesystem;
use coppicefs::format::extent::{DataExtent, EXTENT_BYTES_MAX, ExtentValue, LOST_BYTES_MAX};
use coppicefs::format::namespace::Inode;
use coppicefs::format::{BtreeId, Position, Value};
use coppicefs::recovery::superblock;
use coppicefs::units::{SnapshotId, round_down, round_up};
use coppicefs::{Result, data};

use super::{Loss, has_data};
use crate::report::Report;

/// Keys that one step of a scan asks for.
const SCAN_KEYS: usize = 4096;

/// Writes all copies, if one is not as it should be.
pub(super) fn repair_superblock(filesystem: &Filesystem) -> Result<()> {
    for device in filesystem.devices() {
        let found = superblock::read(&**device)?;
        if !found.stale_copies.is_empty() {
            let mut newest = found.superblock;
            newest.sequence += 1;
            superblock::write(&**device, &newest)?;
        }
    }
    Ok(())
}

/// Takes the slots that were found for those that are in use; the checkpoint at the end of the round stores them.
pub(super) fn correct_map(filesystem: &Filesystem, report: &Report) -> Result<()> {
    if let Some((number, slots)) = &report.known_in_use.slots {
        // If another checkpoint was made since, the next round finds what is left.
        filesystem.forest().correct_used_slots(*number, slots)?;
    }
    Ok(())
}

/// An empty node in the place of a lost one, but for what stands for lost data of files. Published before anything else is changed: until then
/// nobody may put a key into it.
pub(super) fn replace(
    filesystem: &Filesystem,
    btree: BtreeId,
    level: u8,
    (from, to): (Position, Position),
    losses: &mut Vec<Loss>,
) -> Result<()> {
    let lost = if btree == BtreeId::Extents { lost_data(filesystem, from, to)? } else { Vec::new() };
    let keys: Vec<(Position, Value)> = lost
        .iter()
        .filter_map(|loss| {
            let value = ExtentValue::Data(DataExtent::lost(u32::try_from(loss.end - loss.start).ok()?));
            Some((Position::new(loss.inode, loss.end, SnapshotId::ROOT.0), value.encode().into()))
        })
        .collect();
    if filesystem.forest().replace_unreadable(btree, level, from, &keys)? {
        losses.extend(lost);
        filesystem.checkpoint()?;
    }
    Ok(())
}

/// Keys of a range, over nodes that can be read; those that cannot are stepped over.
fn scan(
    filesystem: &Filesystem,
    btree: BtreeId,
    from: Position,
    to: Position,
    visit: &mut dyn FnMut(Position, &[u8]) -> Result<()>,
) -> Result<()> {
    let mut cursor = Some(from);
    while let Some(at) = cursor.filter(|at| *at <= to) {
        match filesystem.forest().scan_around(btree, at, to, SCAN_KEYS) {
            Around::Keys(scan) => {
                for (position, value) in &scan.keys {
                    visit(*position, value)?;
                }
                cursor = scan.covered_to.successor();
            }
            Around::Lost { error, .. } if !error.is_media_error() => return Err(error),
            Around::Lost { to: last, .. } => cursor = last.successor(),
        }
    }
    Ok(())
}

/// What files may have had in extents that end in a range of keys that are lost: all of the file there that no other extent covers, of files that hold
/// less than they say.
fn lost_data(filesystem: &Filesystem, from: Position, to: Position) -> Result<Vec<Loss>> {
    let block = u64::from(filesystem.superblock().geometry.block_bytes);
    let mut files = Vec::new();
    let (first, last) = (Position::new(from.inode, 0, 0), Position::new(to.inode, u64::MAX, u32::MAX));
    scan(filesystem, BtreeId::Inodes, first, last, &mut |position, value| {
        if let Ok(inode) = Inode::decode(value)
            && has_data(&inode)
            && inode.size > 0
        {
            files.push((position.inode, inode.size, inode.allocated_bytes));
        }
        Ok(())
    })?;
    let mut losses = Vec::new();
    for (inode, size, allocated) in files {
        let lowest = if inode == from.inode { from.offset } else { 0 };
        let highest = if inode == to.inode { to.offset } else { u64::MAX };
        // What other extents cover: before the range, and behind it.
        let (mut held, mut before, mut behind) = (0, 0, u64::MAX);
        let mut see = |position: Position, value: &[u8]| {
            if let Ok(extent) = ExtentValue::decode(value) {
                held += data::extents::allocated_bytes(&extent);
                if position.offset < lowest {
                    before = before.max(position.offset);
                } else {
                    behind = behind.min(position.offset.saturating_sub(extent.length()));
                }
            }
            Ok(())
        };
        let at = |offset| Position::new(inode, offset, SnapshotId::ROOT.0);
        if let Some(offset) = lowest.checked_sub(1) {
            scan(filesystem, BtreeId::Extents, Position::new(inode, 0, 0), at(offset), &mut see)?;
        }
        if let Some(offset) = highest.checked_add(1) {
            scan(filesystem, BtreeId::Extents, at(offset), at(u64::MAX), &mut see)?;
        }
        if held < allocated {
            let start = round_up(before, block).max(round_down(lowest.saturating_sub(EXTENT_BYTES_MAX.into()), block));
            let end = round_down(highest, block).min(round_up(size, block)).min(round_down(behind, block));
            add_pieces(inode, start, end, &mut losses);
        }
    }
    Ok(losses)
}

/// In pieces that one key can stand for, of which only the first may be short.
fn add_pieces(inode: u64, start: u64, mut end: u64, losses: &mut Vec<Loss>) {
    while start < end {
        let fits = end - start <= u64::from(LOST_BYTES_MAX);
        let from = if fits { start } else { end - u64::from(LOST_BYTES_MAX / 2) };
        losses.push(Loss { inode, start: from, end });
        end = from;
    }
}
