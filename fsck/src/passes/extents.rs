//! Checks: extents decode, belong to a file, follow each other without overlap, are aligned, point into buckets that may hold
//! data with the bucket's generation, and have a backpointer each. Collects: bytes by bucket and by inode, the totals of data, and the extents whose
//! backpointer is not there.

use coppicefs::Result;
use coppicefs::data::extents::allocated_bytes;
use coppicefs::format::extent::{DataExtent, ExtentPointer, ExtentValue};
use coppicefs::format::journal::AccountingCounter;
use coppicefs::format::namespace::FileType;
use coppicefs::format::space::{Backpointer, Bucket, BucketState};
use coppicefs::format::{BtreeId, CompressionKind, Position};
use rayon::prelude::*;

use super::backpointers::backpointer_place;
use super::buckets::bucket_at;
use super::{Checker, unless_damaged};
use crate::problem::Problem;
use crate::state::PhysicalRange;

pub(super) fn run(checker: &mut Checker<'_>) -> Result<()> {
    if !std::mem::replace(&mut checker.state.has_buckets, true) {
        load_buckets(checker)?;
    }
    let mut previous: Option<Position> = None;
    checker.for_each_of_window(BtreeId::Extents, |checker, keys| {
        let shape = checker.filesystem.data().shape();
        let decoded: Vec<_> = keys
            .into_par_iter()
            .map(|(position, value)| {
                let extent = ExtentValue::decode(&value);
                let problem = extent.as_ref().ok().and_then(|extent| shape.problem(position.offset, extent));
                (position, extent, problem)
            })
            .collect();
        for (position, extent, problem) in decoded {
            match extent {
                Ok(extent) => {
                    let before = checker.problems.len();
                    check_extent(checker, position, &extent, &mut previous)?;
                    let is_new =
                        checker.problems.get(before..).is_some_and(|new| !new.iter().any(Problem::is_of_extent));
                    if let Some(reason) = problem.filter(|_| is_new) {
                        checker.report(Problem::ExtentMisplaced { position, reason });
                    }
                }
                Err(error) => checker.undecodable(BtreeId::Extents, position, &error),
            }
        }
        Ok(())
    })?;
    check_inode_bytes(checker);
    Ok(())
}

fn load_buckets(checker: &mut Checker<'_>) -> Result<()> {
    checker.for_each_batch(BtreeId::Buckets, |checker, keys| {
        for (position, value) in keys {
            let Some(key) = bucket_at(checker, position) else {
                checker.report(Problem::IndexKeyStray { btree: BtreeId::Buckets, position });
                continue;
            };
            match Bucket::decode(&value) {
                Ok(bucket) => {
                    checker.state.stored_buckets.insert(key, bucket);
                }
                Err(error) => checker.undecodable(BtreeId::Buckets, position, &error),
            }
        }
        Ok(())
    })
}

fn check_extent(
    checker: &mut Checker<'_>,
    position: Position,
    extent: &ExtentValue,
    previous: &mut Option<Position>,
) -> Result<()> {
    if !checker.is_place(position) {
        checker.misplaced(BtreeId::Extents, position);
        return Ok(());
    }
    let length = extent.length();
    let Some(start) = position.offset.checked_sub(length) else {
        checker.report(Problem::ExtentMisplaced { position, reason: format!("it is {length} bytes long") });
        return Ok(());
    };
    if let Some(before) = previous.replace(position)
        && before.inode == position.inode
        && before.offset > start
    {
        checker.report(Problem::ExtentOverlap { position, previous_end: before.offset });
    }
    let count = |checker: &mut Checker<'_>, counter| {
        checker.state.count(counter, i64::try_from(length).unwrap_or(i64::MAX));
    };
    match extent {
        ExtentValue::Inline(_) => count(checker, AccountingCounter::InlineBytes),
        ExtentValue::Unwritten { .. } => count(checker, AccountingCounter::ReservedBytes),
        ExtentValue::Whiteout { .. } => {}
        ExtentValue::Data(data) => check_data(checker, position, data)?,
    }
    match checker.state.inode_mut(position.inode) {
        Some(facts) if matches!(facts.file_type, Some(FileType::Regular | FileType::Symlink) | None) => {
            facts.found_bytes += allocated_bytes(extent);
        }
        _ => checker.report(Problem::ExtentWithoutInode { position }),
    }
    Ok(())
}

fn check_data(checker: &mut Checker<'_>, position: Position, data: &DataExtent) -> Result<()> {
    let charged = u64::from(data.charged_bytes());
    checker.data_bytes += charged;
    let signed = |bytes: u32| i64::from(bytes);
    let mut problem = None;
    for pointer in &data.pointers {
        checker.state.count(AccountingCounter::DataBytes, signed(data.charged_bytes()));
        match wrong_place(checker, data, pointer) {
            None => check_pointer(checker, position, data, *pointer)?,
            Some(reason) => problem = Some(Problem::ExtentPointer { position, reason }),
        }
    }
    if data.compression != CompressionKind::None {
        checker.state.count(AccountingCounter::CompressedLogicalBytes, signed(data.length));
        checker.state.count(AccountingCounter::CompressedDiskBytes, signed(data.charged_bytes()));
    }
    if let Some(problem) = problem {
        checker.report(problem);
    }
    Ok(())
}

/// Why data cannot be where a pointer says.
fn wrong_place(checker: &Checker<'_>, data: &DataExtent, pointer: &ExtentPointer) -> Option<String> {
    let superblock = checker.filesystem.superblock();
    let bucket_bytes = u64::from(superblock.geometry.bucket_bytes);
    let bucket = pointer.offset / bucket_bytes;
    let device = pointer.device.0;
    let buckets = superblock.members.get(usize::from(device)).map_or(0, |member| member.bucket_count);
    let within = pointer.offset % bucket_bytes;
    let is_place = bucket < buckets
        && !superblock.is_reserved(device, bucket)
        && within.is_multiple_of(u64::from(superblock.geometry.block_bytes))
        && within + u64::from(data.disk_bytes) <= bucket_bytes;
    if !is_place {
        return Some(format!("byte {} of device {device} is no place for {} bytes", pointer.offset, data.disk_bytes));
    }
    let key = (device, bucket);
    let state = checker.state.stored_buckets.get(&key).map(|stored| stored.state);
    let nodes = checker.state.metadata_buckets.get(&key);
    let holds_nodes = nodes.is_some_and(|slots| *slots != 0 || state == Some(BucketState::Metadata));
    holds_nodes.then(|| format!("bucket {bucket} of device {device} holds nodes of the trees"))
}

fn check_pointer(
    checker: &mut Checker<'_>,
    position: Position,
    data: &DataExtent,
    pointer: ExtentPointer,
) -> Result<()> {
    let superblock = checker.filesystem.superblock();
    let key = (pointer.device.0, pointer.offset / u64::from(superblock.geometry.bucket_bytes));
    *checker.state.data_buckets.entry(key).or_default() += u64::from(data.charged_bytes());
    match checker.state.stored_buckets.get(&key) {
        Some(stored) if stored.generation != pointer.generation => {
            let (pointer_generation, bucket_generation) = (pointer.generation, stored.generation);
            checker.report(Problem::ExtentStale { position, pointer_generation, bucket_generation });
        }
        Some(_) => {}
        None => {
            let newest = checker.state.generations.entry(key).or_default();
            *newest = (*newest).max(pointer.generation);
        }
    }
    checker.state.backpointers_expected += 1;
    let place = backpointer_place(superblock, position, data, &pointer);
    let expected = Backpointer { btree: BtreeId::Extents, disk_bytes: data.disk_bytes, position };
    let problem = match unless_damaged(checker.filesystem.forest().get(BtreeId::Backpointers, place))? {
        Ok(Some(value)) if Backpointer::decode(&value).ok() == Some(expected) => return Ok(()),
        Ok(Some(_)) => Some(Problem::BackpointerWrong { place, reason: format!("it is not that of {position}") }),
        Ok(None) => Some(Problem::BackpointerMissing { extent: position, place }),
        Err(_) => None,
    };
    checker.state.without_backpointer.push(PhysicalRange {
        device: key.0,
        offset: pointer.offset,
        bytes: data.disk_bytes,
        block: data.frame_offset / superblock.geometry.block_bytes,
        position,
    });
    if let Some(problem) = problem {
        checker.report(problem);
    }
    Ok(())
}

fn check_inode_bytes(checker: &mut Checker<'_>) {
    let wrong = checker.state.inodes().iter().filter(|facts| facts.allocated_bytes != facts.found_bytes);
    let problems: Vec<Problem> = wrong
        .map(|facts| {
            let (inode, stored, found) = (facts.inode, facts.allocated_bytes, facts.found_bytes);
            Problem::InodeAllocated { inode, stored, found }
        })
        .collect();
    problems.into_iter().for_each(|problem| checker.report(problem));
}
