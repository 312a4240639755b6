//! Checks: each bucket's state and count is what extents and nodes say; the free-space and need-discard trees hold exactly the
//! buckets that they should, with values that mean something; nothing beyond the untouched mark is in use. Collects: the counters of buckets.

use std::collections::BTreeSet;

use coppicefs::Result;
use coppicefs::btree::Keys;
use coppicefs::format::journal::AccountingCounter;
use coppicefs::format::space::{Bucket, BucketState, DeviceUsage, FreeBucket};
use coppicefs::format::{BtreeId, Position};

use super::Checker;
use crate::problem::Problem;

type BucketKey = (u8, u64);

/// Trees that say where space is, by bucket.
const BUCKET_TREES: [BtreeId; 3] = [BtreeId::Buckets, BtreeId::FreeSpace, BtreeId::NeedDiscard];

pub(super) fn run(checker: &mut Checker<'_>) -> Result<()> {
    let free = index_keys(checker, BtreeId::FreeSpace)?;
    let need_discard = index_keys(checker, BtreeId::NeedDiscard)?;
    keep_lost_buckets(checker);
    let mut keys: BTreeSet<BucketKey> = checker.state.stored_buckets.keys().copied().collect();
    keys.extend(checker.state.data_buckets.keys());
    keys.extend(checker.state.metadata_buckets.keys());
    keys.extend(&free);
    keys.extend(&need_discard);
    for (device, bucket) in keys {
        checker.examine(1);
        check_bucket(checker, (device, bucket), &free, &need_discard);
    }
    check_untouched(checker, &free)
}

/// Nothing is known of buckets whose keys are in lost nodes: none of them may be used until they are known again.
fn keep_lost_buckets(checker: &mut Checker<'_>) {
    let members = &checker.filesystem.superblock().members;
    let mut kept = Vec::new();
    for (first, last) in BUCKET_TREES.iter().filter_map(|btree| checker.state.lost.get(&(*btree as u8))).flatten() {
        for (device, member) in (0..=u8::MAX).zip(members) {
            let device_number = u64::from(device);
            if (first.inode..=last.inode).contains(&device_number) {
                let from = if first.inode == device_number { first.offset } else { 0 };
                let to = if last.inode == device_number { last.offset.saturating_add(1) } else { u64::MAX };
                kept.extend((from..to.min(member.bucket_count)).map(|bucket| (device, bucket)));
            }
        }
    }
    checker.state.in_use_buckets.append(&mut kept);
}

/// The buckets that a tree of buckets names.
fn index_keys(checker: &mut Checker<'_>, btree: BtreeId) -> Result<BTreeSet<BucketKey>> {
    let mut found = BTreeSet::new();
    checker.for_each_batch(btree, |checker, batch| {
        for (position, value) in batch.iter().flat_map(Keys::iter) {
            let Some((device, bucket)) = bucket_at(checker, position) else {
                checker.report(Problem::IndexKeyStray { btree, position });
                continue;
            };
            found.insert((device, bucket));
            if btree == BtreeId::FreeSpace
                && let Err(error) = FreeBucket::decode(value)
            {
                checker.report(Problem::FreeSpaceValue { device, bucket, reason: error.to_string() });
            }
        }
        Ok(())
    })?;
    Ok(found)
}

/// The bucket whose key stands at a position, if there is one.
pub(super) fn bucket_at(checker: &Checker<'_>, position: Position) -> Option<BucketKey> {
    let device = u8::try_from(position.inode).ok()?;
    let superblock = checker.filesystem.superblock();
    let member = superblock.members.get(usize::from(device))?;
    let is_bucket = position.offset < member.bucket_count
        && position.snapshot == 0
        && !superblock.is_reserved(device, position.offset);
    is_bucket.then_some((device, position.offset))
}

fn check_bucket(
    checker: &mut Checker<'_>,
    key: BucketKey,
    free: &BTreeSet<BucketKey>,
    need_discard: &BTreeSet<BucketKey>,
) {
    let (device, bucket) = key;
    let known = checker.state.stored_buckets.get(&key).copied();
    let stored = known.unwrap_or(Bucket::UNUSED);
    let charged = checker.state.data_buckets.get(&key).copied().unwrap_or(0);
    let nodes = checker.state.metadata_buckets.contains_key(&key);
    let state = match (charged > 0, nodes, stored.state) {
        (true, _, _) => BucketState::Data,
        (false, true, _) => BucketState::Metadata,
        (false, false, BucketState::NeedDiscard) => BucketState::NeedDiscard,
        // A bucket that was claimed for nodes and holds none that is published yet stays claimed.
        (false, false, BucketState::Metadata) => BucketState::Metadata,
        (false, false, BucketState::Data | BucketState::Reserved) => BucketState::NeedDiscard,
        (false, false, BucketState::Free) => BucketState::Free,
    };
    let generation = match known {
        // A bucket that is emptied begins a new generation.
        Some(stored) if state == BucketState::NeedDiscard && stored.state == BucketState::Data => {
            stored.generation.wrapping_add(1)
        }
        Some(stored) => stored.generation,
        None => checker.state.generations.get(&key).copied().unwrap_or(0),
    };
    let found = Bucket { state, generation, charged_bytes: charged };
    let is_listed = free.contains(&key) || need_discard.contains(&key);
    if matches!(state, BucketState::Data | BucketState::Metadata) && (is_listed || stored.state != state) {
        checker.state.in_use_buckets.push(key);
    }
    if found != stored {
        checker.report(Problem::BucketWrong { device, bucket, stored, found });
    }
    match found.state {
        BucketState::Data => checker.state.count(AccountingCounter::DataBuckets, 1),
        BucketState::Metadata => checker.state.count(AccountingCounter::MetadataBuckets, 1),
        BucketState::NeedDiscard => checker.state.count(AccountingCounter::NeedDiscardBuckets, 1),
        BucketState::Free | BucketState::Reserved => {}
    }
    let present = free.contains(&key);
    if present != (found.state == BucketState::Free) {
        checker.report(Problem::FreeSpaceKey { device, bucket, present, state: found.state });
    }
    let present = need_discard.contains(&key);
    if present != (found.state == BucketState::NeedDiscard) {
        checker.report(Problem::NeedDiscardKey { device, bucket, present, state: found.state });
    }
}

/// Below the mark every bucket that is not reserved has a place somewhere; above it, those with a key.
fn check_untouched(checker: &mut Checker<'_>, free: &BTreeSet<BucketKey>) -> Result<()> {
    let superblock = checker.filesystem.superblock().clone();
    for (index, member) in superblock.members.iter().enumerate() {
        let device = u8::try_from(index).unwrap_or(u8::MAX);
        let position = Position::new(u64::from(device), 0, 0);
        let untouched_from = match checker.filesystem.forest().get(BtreeId::Devices, position)? {
            Some(value) => match DeviceUsage::decode(&value) {
                Ok(usage) => usage.untouched_from.min(member.bucket_count),
                Err(error) => {
                    checker.undecodable(BtreeId::Devices, position, &error);
                    continue;
                }
            },
            None => 0,
        };
        for bucket in 0..untouched_from {
            let key = (device, bucket);
            let known = superblock.is_reserved(device, bucket)
                || checker.state.stored_buckets.contains_key(&key)
                || free.contains(&key)
                || checker.state.data_buckets.contains_key(&key);
            if !known {
                checker.report(Problem::FreeSpaceKey { device, bucket, present: false, state: BucketState::Free });
            }
        }
        // A bucket above the mark may be in use (nodes take them there directly), but then it has a key; the mark's advance would make
        // free-space keys for all others a second time.
        let beyond: Vec<u64> = free
            .iter()
            .filter(|key| key.0 == device && key.1 >= untouched_from && !checker.state.stored_buckets.contains_key(key))
            .map(|(_, bucket)| *bucket)
            .collect();
        for bucket in beyond {
            checker.report(Problem::Untouched { device, bucket, untouched_from });
        }
    }
    Ok(())
}
