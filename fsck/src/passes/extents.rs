//! Checks: extents decode, belong to a file, follow each other without overlap, are aligned, and point into buckets that may hold data with the
//! bucket's generation. Collects: bytes by bucket and by inode, the totals of data, and which backpointers there ought to be.

use coppicefs::Result;
use coppicefs::btree::Keys;
use coppicefs::data::extents::allocated_bytes;
use coppicefs::error::Corruption;
use coppicefs::format::extent::{DataExtent, ExtentPointer, ExtentValue};
use coppicefs::format::journal::AccountingCounter;
use coppicefs::format::namespace::FileType;
use coppicefs::format::space::{Backpointer, Bucket, BucketState};
use coppicefs::format::{BtreeId, CompressionKind, Position};
use rayon::prelude::*;
use smallvec::SmallVec;

use super::backpointers::backpointer_place;
use super::buckets::bucket_at;
use super::{Checker, misplaced};
use crate::problem::Problem;
use crate::state::{Found, State};

/// What a key holds. Inline data, which can be most of all metadata, is left where it is.
enum Content {
    Inline(u64),
    Other(ExtentValue),
}

impl Content {
    fn decode(value: &[u8]) -> std::result::Result<Self, Corruption> {
        match ExtentValue::inline_bytes(value) {
            Some(length) => Ok(Self::Inline(length)),
            None => ExtentValue::decode(value).map(Self::Other),
        }
    }

    fn length(&self) -> u64 {
        match self {
            Self::Inline(length) => *length,
            Self::Other(extent) => extent.length(),
        }
    }

    fn allocated_bytes(&self) -> u64 {
        match self {
            Self::Inline(length) => *length,
            Self::Other(extent) => allocated_bytes(extent),
        }
    }
}

/// An extent, and what was worked out about it beside the others.
struct Looked {
    position: Position,
    extent: Content,
    /// What is wrong with its shape.
    shape: Option<String>,
    owner: Option<Found>,
    pointers: SmallVec<[LookedPointer; 1]>,
}

/// One of its pointers.
struct LookedPointer {
    pointer: ExtentPointer,
    bucket: (u8, u64),
    outcome: std::result::Result<RightPlace, String>,
}

/// What is known of a pointer to a place where data can be.
struct RightPlace {
    /// The bucket's generation, if it has a key.
    generation: Option<u32>,
    /// Of the backpointer that there ought to be.
    backpointer_hash: u64,
}

/// Sums over a batch.
#[derive(Default)]
struct Sums {
    counters: [i64; AccountingCounter::ALL.len()],
    /// The bucket that was charged last, and with what.
    bucket: Option<((u8, u64), u64)>,
}

impl Sums {
    fn count(&mut self, counter: AccountingCounter, bytes: u64) {
        if let Some(sum) = self.counters.get_mut(counter as usize) {
            *sum += i64::try_from(bytes).unwrap_or(i64::MAX);
        }
    }

    /// Charges a bucket: those of neighbours are the same, mostly.
    fn charge(&mut self, state: &mut State, bucket: (u8, u64), bytes: u64) {
        match &mut self.bucket {
            Some((last, sum)) if *last == bucket => *sum += bytes,
            _ => {
                self.put_bucket(state);
                self.bucket = Some((bucket, bytes));
            }
        }
    }

    fn put_bucket(&mut self, state: &mut State) {
        if let Some((bucket, bytes)) = self.bucket.take() {
            *state.data_buckets.entry(bucket).or_default() += bytes;
        }
    }

    fn put(mut self, state: &mut State) {
        self.put_bucket(state);
        for counter in AccountingCounter::ALL {
            let sum = self.counters.get(counter as usize).copied().unwrap_or(0);
            state.count(counter, sum);
        }
    }
}

pub(super) fn run(checker: &mut Checker<'_>) -> Result<()> {
    if !std::mem::replace(&mut checker.state.has_buckets, true) {
        load_buckets(checker)?;
    }
    let mut previous: Option<Position> = None;
    checker.for_each_of_window(BtreeId::Extents, |checker, batch| {
        let mut sums = Sums::default();
        for looked in look_at(checker, batch).into_iter().flatten() {
            match looked {
                Ok(looked) => check_extent(checker, &looked, &mut previous, &mut sums),
                Err((position, error)) => checker.undecodable(BtreeId::Extents, position, &error),
            }
        }
        sums.put(&mut checker.state);
        Ok(())
    })?;
    check_inode_bytes(checker);
    Ok(())
}

fn load_buckets(checker: &mut Checker<'_>) -> Result<()> {
    checker.for_each_batch(BtreeId::Buckets, |checker, batch| {
        for (position, value) in batch.iter().flat_map(Keys::iter) {
            let Some(key) = bucket_at(checker, position) else {
                checker.report(Problem::IndexKeyStray { btree: BtreeId::Buckets, position });
                continue;
            };
            match Bucket::decode(value) {
                Ok(bucket) => {
                    checker.state.stored_buckets.insert(key, bucket);
                }
                Err(error) => checker.undecodable(BtreeId::Buckets, position, &error),
            }
        }
        Ok(())
    })
}

/// Decodes a batch, and works out what each extent needs no other for, on all cores.
fn look_at(checker: &Checker<'_>, batch: &[Keys]) -> Vec<Vec<std::result::Result<Looked, (Position, Corruption)>>> {
    let look = |(position, value): (Position, &[u8])| {
        let extent = Content::decode(value).map_err(|error| (position, error))?;
        let shape = checker.filesystem.data().shape();
        let shape = match &extent {
            Content::Inline(length) => shape.inline_problem(position.offset, *length),
            Content::Other(extent) => shape.problem(position.offset, extent),
        };
        let owner = checker.state.find(position.inode);
        let pointers = match &extent {
            Content::Other(ExtentValue::Data(data)) => {
                data.pointers.iter().map(|pointer| look_at_pointer(checker, position, data, *pointer)).collect()
            }
            _ => SmallVec::new(),
        };
        Ok(Looked { position, extent, shape, owner, pointers })
    };
    batch.par_iter().map(|keys| keys.iter().map(look).collect()).collect()
}

fn look_at_pointer(
    checker: &Checker<'_>,
    position: Position,
    data: &DataExtent,
    pointer: ExtentPointer,
) -> LookedPointer {
    let superblock = checker.filesystem.superblock();
    let bucket = (pointer.device.0, pointer.offset / u64::from(superblock.geometry.bucket_bytes));
    let outcome = match wrong_place(checker, data, &pointer) {
        Some(reason) => Err(reason),
        None => {
            let (place, expected) = expected_backpointer(checker, position, data, &pointer);
            Ok(RightPlace {
                generation: checker.state.stored_buckets.get(&bucket).map(|stored| stored.generation),
                backpointer_hash: checker.state.backpointer_hash(place, &expected.encode()),
            })
        }
    };
    LookedPointer { pointer, bucket, outcome }
}

/// The backpointer that a pointer ought to have, and where.
fn expected_backpointer(
    checker: &Checker<'_>,
    position: Position,
    data: &DataExtent,
    pointer: &ExtentPointer,
) -> (Position, Backpointer) {
    let place = backpointer_place(checker.filesystem.superblock(), position, data, pointer);
    (place, Backpointer { btree: BtreeId::Extents, disk_bytes: data.disk_bytes, position })
}

fn check_extent(checker: &mut Checker<'_>, looked: &Looked, previous: &mut Option<Position>, sums: &mut Sums) {
    let position = looked.position;
    if !checker.is_place(position) {
        checker.report(misplaced(BtreeId::Extents, position));
        return;
    }
    let before = checker.problems.len();
    check_file(checker, looked, previous, sums);
    if let Some(reason) = &looked.shape
        && checker.problems.get(before..).is_some_and(|new| !new.iter().any(Problem::is_of_extent))
    {
        checker.report(Problem::ExtentMisplaced { position, reason: reason.clone() });
    }
}

/// Checks an extent of a file.
fn check_file(checker: &mut Checker<'_>, looked: &Looked, previous: &mut Option<Position>, sums: &mut Sums) {
    let Looked { position, extent, owner, .. } = looked;
    let position = *position;
    let length = extent.length();
    let Some(start) = position.offset.checked_sub(length) else {
        checker.report(Problem::ExtentMisplaced { position, reason: format!("it is {length} bytes long") });
        return;
    };
    if let Some(before) = previous.replace(position)
        && before.inode == position.inode
        && before.offset > start
    {
        checker.report(Problem::ExtentOverlap { position, previous_end: before.offset });
    }
    match extent {
        Content::Inline(_) | Content::Other(ExtentValue::Inline(_)) => {
            sums.count(AccountingCounter::InlineBytes, length);
        }
        Content::Other(ExtentValue::Unwritten { .. }) => sums.count(AccountingCounter::ReservedBytes, length),
        Content::Other(ExtentValue::Whiteout { .. }) => {}
        Content::Other(ExtentValue::Data(data)) => check_data(checker, looked, data, sums),
    }
    match owner.and_then(|owner| checker.state.facts_of(owner)) {
        Some(facts) if matches!(facts.file_type, Some(FileType::Regular | FileType::Symlink) | None) => {
            facts.found_bytes += extent.allocated_bytes();
        }
        _ => checker.report(Problem::ExtentWithoutInode { position }),
    }
}

fn check_data(checker: &mut Checker<'_>, looked: &Looked, data: &DataExtent, sums: &mut Sums) {
    let position = looked.position;
    let charged = u64::from(data.charged_bytes());
    checker.data_bytes += charged;
    let mut problem = None;
    for LookedPointer { pointer, bucket, outcome } in &looked.pointers {
        sums.count(AccountingCounter::DataBytes, charged);
        let place = match outcome {
            Ok(place) => place,
            Err(reason) => {
                problem = Some(Problem::ExtentPointer { position, reason: reason.clone() });
                continue;
            }
        };
        sums.charge(&mut checker.state, *bucket, charged);
        match place.generation {
            Some(bucket_generation) if bucket_generation != pointer.generation => {
                let pointer_generation = pointer.generation;
                checker.report(Problem::ExtentStale { position, pointer_generation, bucket_generation });
            }
            Some(_) => {}
            None => {
                let newest = checker.state.generations.entry(*bucket).or_default();
                *newest = (*newest).max(pointer.generation);
            }
        }
        checker.state.backpointers_expected += 1;
        checker.state.backpointers_sum = checker.state.backpointers_sum.wrapping_add(place.backpointer_hash);
    }
    if data.compression != CompressionKind::None {
        sums.count(AccountingCounter::CompressedLogicalBytes, u64::from(data.length));
        sums.count(AccountingCounter::CompressedDiskBytes, charged);
    }
    if let Some(problem) = problem {
        checker.report(problem);
    }
}

/// Calls `visit` with each extent of a file, pointer to a place where data can be, and the backpointer that it ought to have: those that
/// were summed.
pub(super) fn for_each_expected(
    checker: &mut Checker<'_>,
    mut visit: impl FnMut(&mut Checker<'_>, Position, &DataExtent, &ExtentPointer, Position, Backpointer) -> Result<()>,
) -> Result<()> {
    checker.for_each_batch(BtreeId::Extents, |checker, batch| {
        for (position, value) in batch.iter().flat_map(Keys::iter) {
            let Ok(ExtentValue::Data(data)) = ExtentValue::decode(value) else { continue };
            let is_file = checker.is_place(position) && position.offset.checked_sub(u64::from(data.length)).is_some();
            for pointer in data.pointers.iter().filter(|_| is_file) {
                if wrong_place(checker, &data, pointer).is_none() {
                    let (place, expected) = expected_backpointer(checker, position, &data, pointer);
                    visit(checker, position, &data, pointer, place, expected)?;
                }
            }
        }
        Ok(())
    })
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
