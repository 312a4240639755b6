//! Checks: extents decode, belong to a file, follow each other without overlap, are aligned, point into buckets that may hold
//! data with the bucket's generation, share no space but within one compressed frame, and have a backpointer each; and that no
//! backpointer is left over. Collects: bytes by bucket and by inode, and the totals of data.

use coppicefs::Result;
use coppicefs::format::extent::{DataExtent, ExtentPointer, ExtentValue};
use coppicefs::format::journal::AccountingCounter;
use coppicefs::format::namespace::FileType;
use coppicefs::format::space::{Backpointer, Bucket};
use coppicefs::format::superblock::{Geometry, Superblock};
use coppicefs::format::{BtreeId, CompressionKind, Position};
use rayon::prelude::*;

use super::{Checker, unless_damaged};
use crate::problem::Problem;
use crate::state::PhysicalRange;

pub(super) fn run(checker: &mut Checker<'_>) -> Result<()> {
    load_buckets(checker)?;
    let mut previous: Option<Position> = None;
    checker.for_each_batch(BtreeId::Extents, |checker, keys| {
        let decoded: Vec<_> =
            keys.into_par_iter().map(|(position, value)| (position, ExtentValue::decode(&value))).collect();
        for (position, extent) in decoded {
            match extent {
                Ok(extent) => check_extent(checker, position, &extent, &mut previous)?,
                Err(error) => checker.undecodable(BtreeId::Extents, position, &error),
            }
        }
        Ok(())
    })?;
    check_inode_bytes(checker);
    check_shared_space(checker);
    check_backpointers(checker)
}

fn load_buckets(checker: &mut Checker<'_>) -> Result<()> {
    checker.for_each_batch(BtreeId::Buckets, |checker, keys| {
        for (position, value) in keys {
            let device = u8::try_from(position.inode).unwrap_or(u8::MAX);
            match Bucket::decode(&value) {
                Ok(bucket) => {
                    checker.state.stored_buckets.insert((device, position.offset), bucket);
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
    let length = extent.length();
    let Some(start) = position.offset.checked_sub(length) else {
        checker.report(Problem::ExtentMisplaced { position, reason: format!("it is {length} bytes long") });
        return Ok(());
    };
    if let Some(before) = previous.replace(position)
        && (before.inode, before.snapshot) == (position.inode, position.snapshot)
        && before.offset > start
    {
        checker.report(Problem::ExtentOverlap { position, previous_end: before.offset });
    }
    let block = u64::from(checker.filesystem.superblock().geometry.block_bytes);
    let aligned = start.is_multiple_of(block) && length.is_multiple_of(block);
    let held = match extent {
        ExtentValue::Inline(_) if start != 0 => {
            checker.report(Problem::ExtentMisplaced { position, reason: "inline data that starts later".into() });
            length
        }
        ExtentValue::Inline(_) => {
            checker.state.count(AccountingCounter::InlineBytes, i64::try_from(length).unwrap_or(i64::MAX));
            length
        }
        ExtentValue::Whiteout { .. } => 0,
        _ if !aligned => {
            checker.report(Problem::ExtentMisplaced { position, reason: "it is not made of whole blocks".into() });
            length
        }
        ExtentValue::Unwritten { .. } => {
            checker.state.count(AccountingCounter::ReservedBytes, i64::try_from(length).unwrap_or(i64::MAX));
            length
        }
        ExtentValue::Data(data) => check_data(checker, position, data)?,
    };
    match checker.state.inodes.get_mut(&position.inode) {
        Some(facts) if matches!(facts.file_type, Some(FileType::Regular | FileType::Symlink) | None) => {
            facts.found_bytes += held;
        }
        _ => checker.report(Problem::ExtentWithoutInode { position }),
    }
    Ok(())
}

/// Returns the bytes that the inode holds by this extent.
fn check_data(checker: &mut Checker<'_>, position: Position, data: &DataExtent) -> Result<u64> {
    let charged = u64::from(data.charged_bytes());
    checker.data_bytes += charged;
    let signed = |bytes: u32| i64::from(bytes);
    for pointer in &data.pointers {
        checker.state.count(AccountingCounter::DataBytes, signed(data.charged_bytes()));
        check_pointer(checker, position, data, *pointer)?;
    }
    if data.compression != CompressionKind::None {
        checker.state.count(AccountingCounter::CompressedLogicalBytes, signed(data.length));
        checker.state.count(AccountingCounter::CompressedDiskBytes, signed(data.charged_bytes()));
    }
    let block = checker.filesystem.superblock().geometry.block_bytes;
    if data.compression == CompressionKind::None
        && !data.checksums.is_empty()
        && data.checksums.len() as u64 != u64::from(data.length / block)
    {
        let reason = format!("{} checksums for {} bytes", data.checksums.len(), data.length);
        checker.report(Problem::ExtentMisplaced { position, reason });
    }
    Ok(charged)
}

fn check_pointer(
    checker: &mut Checker<'_>,
    position: Position,
    data: &DataExtent,
    pointer: ExtentPointer,
) -> Result<()> {
    let superblock = checker.filesystem.superblock();
    let bucket_bytes = u64::from(superblock.geometry.bucket_bytes);
    let bucket = pointer.offset / bucket_bytes;
    let device = pointer.device.0;
    let buckets = superblock.members.get(usize::from(device)).map_or(0, |member| member.bucket_count);
    let within = pointer.offset % bucket_bytes;
    if bucket >= buckets || superblock.is_reserved(device, bucket) || within + u64::from(data.disk_bytes) > bucket_bytes
    {
        let reason = format!("byte {} of device {device} is no place for {} bytes", pointer.offset, data.disk_bytes);
        checker.report(Problem::ExtentPointer { position, reason });
        return Ok(());
    }
    *checker.state.data_buckets.entry((device, bucket)).or_default() += u64::from(data.charged_bytes());
    let stored = checker.state.stored_buckets.get(&(device, bucket)).copied().unwrap_or(Bucket::UNUSED);
    if stored.generation != pointer.generation {
        checker.report(Problem::ExtentStale {
            position,
            pointer_generation: pointer.generation,
            bucket_generation: stored.generation,
        });
    }
    checker.state.physical.push(PhysicalRange {
        device,
        offset: pointer.offset,
        bytes: data.disk_bytes,
        position,
        compressed: data.compression != CompressionKind::None,
    });
    checker.state.backpointers_expected += 1;
    let place = backpointer_place(superblock, position, data, &pointer);
    match unless_damaged(checker.filesystem.forest().get(BtreeId::Backpointers, place))? {
        Ok(Some(value)) => {
            let expected = Backpointer { btree: BtreeId::Extents, disk_bytes: data.disk_bytes, position };
            if Backpointer::decode(&value).ok() != Some(expected) {
                checker.report(Problem::BackpointerWrong { place, reason: format!("it is not that of {position}") });
            }
        }
        Ok(None) => checker.report(Problem::BackpointerMissing { extent: position, place }),
        Err(_) => {}
    }
    Ok(())
}

fn check_inode_bytes(checker: &mut Checker<'_>) {
    let mut wrong: Vec<_> = checker
        .state
        .inodes
        .iter()
        .filter(|(_, facts)| facts.allocated_bytes != facts.found_bytes)
        .map(|(inode, facts)| (*inode, facts.allocated_bytes, facts.found_bytes))
        .collect();
    wrong.sort_unstable();
    for (inode, stored, found) in wrong {
        checker.report(Problem::InodeAllocated { inode, stored, found });
    }
}

fn check_shared_space(checker: &mut Checker<'_>) {
    let mut physical = std::mem::take(&mut checker.state.physical);
    physical.par_sort_unstable();
    for pair in physical.windows(2) {
        let [first, second] = pair else { continue };
        let overlap = first.device == second.device && first.offset + u64::from(first.bytes) > second.offset;
        let one_frame =
            first.compressed && second.compressed && first.offset == second.offset && first.bytes == second.bytes;
        if overlap && !one_frame {
            checker.report(Problem::ExtentsShareSpace {
                position: second.position,
                other: first.position,
                device: second.device,
                offset: second.offset,
            });
        }
    }
}

/// Every expected backpointer was looked up; so if there are more, some are left over: each must lead to an extent that has it.
fn check_backpointers(checker: &mut Checker<'_>) -> Result<()> {
    let mut found = 0;
    checker.for_each_batch(BtreeId::Backpointers, |_, keys| {
        found += keys.len() as u64;
        Ok(())
    })?;
    if found == checker.state.backpointers_expected {
        return Ok(());
    }
    checker.for_each_batch(BtreeId::Backpointers, |checker, keys| {
        for (place, value) in keys {
            if let Some(reason) = wrong_backpointer(checker, place, &value)? {
                checker.report(Problem::BackpointerWrong { place, reason });
            }
        }
        Ok(())
    })
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
    let leads_back = matches!(&extent, Ok(ExtentValue::Data(data)) if data.pointers.iter().any(|pointer| {
        backpointer_place(superblock, backpointer.position, data, pointer) == place
    }));
    Ok((!leads_back).then(|| format!("the extent that ends at {} is elsewhere", backpointer.position)))
}

/// Where the backpointer of one copy of an extent stands: by the format's document, not by the code that writes it.
fn backpointer_place(
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
