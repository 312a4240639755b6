//! Checks: no two extents share space, but for the parts of one compressed frame; every extent has its backpointers, and every backpointer leads to an
//! extent that has it. Backpointers stand in the order of the device, so neighbours are all that is compared; and whether they are just those that extents
//! ought to have is seen by the sums of their keyed hashes, in whatever order they come. Where the sums differ, each is looked up. Collects nothing.

use coppicefs::Result;
use coppicefs::btree::Keys;
use coppicefs::format::extent::{DataExtent, ExtentPointer, ExtentValue};
use coppicefs::format::space::Backpointer;
use coppicefs::format::superblock::{Geometry, Superblock};
use coppicefs::format::{BtreeId, Position};

use super::extents::for_each_expected;
use super::{Checker, unless_damaged};
use crate::problem::Problem;
use crate::state::PhysicalRange;

pub(super) fn run(checker: &mut Checker<'_>) -> Result<()> {
    let mut found = (0_u64, 0_u64);
    let mut neighbours = Neighbours::default();
    let bucket_bytes = u64::from(checker.filesystem.superblock().geometry.bucket_bytes);
    checker.for_each_batch(BtreeId::Backpointers, |checker, batch| {
        for (place, value) in batch.iter().flat_map(Keys::iter) {
            let hash = checker.state.backpointer_hash(place, value);
            found = (found.0 + 1, found.1.wrapping_add(hash));
            if let Ok(backpointer) = Backpointer::decode(value) {
                neighbours.pass(range_of(place, &backpointer, bucket_bytes));
            }
        }
        Ok(())
    })?;
    // They are just those that there ought to be, if there are as many and the sums are the same. Else each must prove itself.
    if found == (checker.state.backpointers_expected, checker.state.backpointers_sum) {
        neighbours.problems.into_iter().for_each(|problem| checker.report(problem));
        return Ok(());
    }
    check_each(checker)
}

/// Looks for the backpointer of each extent, and for the extent of each backpointer.
fn check_each(checker: &mut Checker<'_>) -> Result<()> {
    let bucket_bytes = u64::from(checker.filesystem.superblock().geometry.bucket_bytes);
    let block_bytes = checker.filesystem.superblock().geometry.block_bytes;
    let mut others = Vec::new();
    for_each_expected(checker, |checker, position, data, pointer, place, expected| {
        let problem = match unless_damaged(checker.filesystem.forest().get(BtreeId::Backpointers, place))? {
            Ok(Some(value)) => match Backpointer::decode(&value) {
                Ok(found) if found == expected => return Ok(()),
                Ok(found) if found.position != position => {
                    let reason = format!("it is not that of {position}");
                    Some(Problem::BackpointerWrong { place, reason })
                }
                // It is told of when all backpointers are gone through.
                _ => None,
            },
            Ok(None) => Some(Problem::BackpointerMissing { extent: position, place }),
            Err(_) => None,
        };
        others.push(PhysicalRange {
            device: pointer.device.0,
            offset: pointer.offset,
            bytes: data.disk_bytes,
            block: data.frame_offset / block_bytes,
            position,
        });
        problem.into_iter().for_each(|problem| checker.report(problem));
        Ok(())
    })?;
    others.sort_unstable();
    let mut others = others.into_iter().peekable();
    let mut neighbours = Neighbours::default();
    checker.for_each_batch(BtreeId::Backpointers, |checker, batch| {
        for (place, value) in batch.iter().flat_map(Keys::iter) {
            if let Some(reason) = wrong_backpointer(checker, place, value)? {
                checker.report(Problem::BackpointerWrong { place, reason });
                continue;
            }
            let Ok(backpointer) = Backpointer::decode(value) else { continue };
            let range = range_of(place, &backpointer, bucket_bytes);
            while let Some(other) = others.next_if(|other| *other <= range) {
                neighbours.pass(other);
            }
            neighbours.pass(range);
        }
        Ok(())
    })?;
    others.for_each(|other| neighbours.pass(other));
    neighbours.problems.into_iter().for_each(|problem| checker.report(problem));
    Ok(())
}

fn range_of(place: Position, backpointer: &Backpointer, bucket_bytes: u64) -> PhysicalRange {
    let bucket = place.inode & ((1 << 48) - 1);
    PhysicalRange {
        device: u8::try_from(place.inode >> 48).unwrap_or(u8::MAX),
        offset: bucket.saturating_mul(bucket_bytes).saturating_add(place.offset >> 32),
        bytes: backpointer.disk_bytes,
        block: u32::try_from(place.offset & u64::from(u32::MAX)).unwrap_or(0),
        position: backpointer.position,
    }
}

/// Ranges in the order of the device.
#[derive(Default)]
struct Neighbours {
    /// The one that reaches furthest so far.
    furthest: Option<PhysicalRange>,
    problems: Vec<Problem>,
}

impl Neighbours {
    fn pass(&mut self, range: PhysicalRange) {
        let end = |range: &PhysicalRange| (range.device, range.offset.saturating_add(u64::from(range.bytes)));
        if let Some(other) = self.furthest.filter(|other| share_space(other, &range)) {
            self.problems.push(Problem::ExtentsShareSpace {
                position: range.position,
                other: other.position,
                device: range.device,
                offset: range.offset,
            });
        }
        if self.furthest.is_none_or(|other| end(&range) >= end(&other)) {
            self.furthest = Some(range);
        }
    }
}

/// Whether two ranges overlap, other than as different parts of one compressed frame. The first starts no later.
fn share_space(first: &PhysicalRange, second: &PhysicalRange) -> bool {
    let one_frame = (first.offset, first.bytes) == (second.offset, second.bytes) && first.block != second.block;
    first.device == second.device
        && first.offset.saturating_add(u64::from(first.bytes)) > second.offset
        && first.position != second.position
        && !one_frame
}

fn wrong_backpointer(checker: &Checker<'_>, place: Position, value: &[u8]) -> Result<Option<String>> {
    let backpointer = match Backpointer::decode(value) {
        Ok(backpointer) => backpointer,
        Err(error) => return Ok(Some(error.to_string())),
    };
    let extent = match unless_damaged(checker.filesystem.forest().get(backpointer.btree, backpointer.position))? {
        Ok(Some(value)) => ExtentValue::decode(&value),
        Ok(None) => return Ok(Some(format!("there is no extent that ends at {}", backpointer.position))),
        Err(_) => return Ok(None),
    };
    let superblock = checker.filesystem.superblock();
    let Ok(ExtentValue::Data(data)) = &extent else {
        return Ok(Some(format!("the extent that ends at {} is not in a bucket", backpointer.position)));
    };
    let leads_back =
        data.pointers.iter().any(|pointer| backpointer_place(superblock, backpointer.position, data, pointer) == place);
    if !leads_back {
        return Ok(Some(format!("the extent that ends at {} is elsewhere", backpointer.position)));
    }
    let (said, are) = (backpointer.disk_bytes, data.disk_bytes);
    Ok((said != are).then(|| format!("it says {said} bytes, they are {are}")))
}

/// Where the backpointer of one copy of an extent stands: by the format's document, not by the code that writes it.
pub(crate) fn backpointer_place(
    superblock: &Superblock,
    position: Position,
    data: &DataExtent,
    pointer: &ExtentPointer,
) -> Position {
    let Geometry { bucket_bytes, block_bytes, .. } = superblock.geometry;
    let bucket = pointer.offset / u64::from(bucket_bytes);
    let within = pointer.offset % u64::from(bucket_bytes);
    let block = u64::from(data.frame_offset / block_bytes);
    Position::new(u64::from(pointer.device.0) << 48 | bucket, within << 32 | block, position.snapshot)
}
