//! The transitions of a bucket, as a pure function: what a [`BucketChange`] makes of a [`Bucket`] and of its index keys.
//!
//! ```text
//!   Free --count > 0--> Data --count 0, generation + 1--> NeedDiscard --freed--> Free
//!                         ^                                  |
//!                         +-----count > 0 (still open)-------+
//!   Free --claim--> Metadata --release, generation + 1--> NeedDiscard
//! ```
//! Whatever is not drawn is an error: counts never wrap, and a bucket never changes hands unnoticed.

use smallvec::{SmallVec, smallvec};

use crate::error::Error;
use crate::format::journal::AccountingCounter;
use crate::format::space::{Bucket, BucketState, FreeBucket};
use crate::transaction::{BucketChange, BucketOutcome};
use crate::units::{BucketIndex, DeviceIndex};

/// Why a change is impossible.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// A new pointer was made for another generation.
    OtherGeneration {
        /// The pointer's.
        expected: u32,
        /// The bucket's.
        actual: u32,
    },
    /// What is on disk contradicts itself.
    Corrupt(String),
    /// A caller of ours asked for a transition that does not exist.
    Bug(String),
}

impl Refusal {
    /// As an error that names the bucket. A generation that does not fit is damage here.
    pub(super) fn into_error(self, device: DeviceIndex, bucket: BucketIndex) -> Error {
        let what = || format!("bucket {bucket} of device {device}");
        match self {
            Self::OtherGeneration { expected, actual } => {
                Error::corrupt(what(), format!("a pointer of generation {expected} into generation {actual}"))
            }
            Self::Corrupt(problem) => Error::corrupt(what(), problem),
            Self::Bug(problem) => Error::Bug(format!("{}: {problem}", what())),
        }
    }
}

/// What `change` makes of `old`.
pub(super) fn apply(old: Bucket, change: &BucketChange) -> Result<BucketOutcome, Refusal> {
    match change.to_state {
        None => count(old, change),
        Some(_) if change.charged_delta != 0 => Err(Refusal::Bug("a count and a state in one change".into())),
        Some(to) => set_state(old, to, change.discarded),
    }
}

fn count(old: Bucket, change: &BucketChange) -> Result<BucketOutcome, Refusal> {
    let mut expected = [change.expected_generation, change.newer_generation].into_iter().flatten();
    if let Some(expected) = expected.find(|expected| *expected != old.generation) {
        return Err(Refusal::OtherGeneration { expected, actual: old.generation });
    }
    if matches!(old.state, BucketState::Metadata | BucketState::Reserved) {
        return Err(Refusal::Corrupt(format!("file data is counted in a bucket that holds {:?}", old.state)));
    }
    if old.state != BucketState::Data && old.charged_bytes != 0 {
        return Err(Refusal::Corrupt(format!("{:?} with a count of {}", old.state, old.charged_bytes)));
    }
    let charged_bytes = old.charged_bytes.checked_add_signed(change.charged_delta).ok_or_else(|| {
        Refusal::Corrupt(format!("a count of {} changes by {}", old.charged_bytes, change.charged_delta))
    })?;
    let state = match (old.state, charged_bytes) {
        (BucketState::Data, 0) => BucketState::NeedDiscard,
        (state, 0) => state,
        _ => BucketState::Data,
    };
    let emptied = old.state == BucketState::Data && state == BucketState::NeedDiscard;
    let generation = if emptied { old.generation.wrapping_add(1) } else { old.generation };
    Ok(outcome(old, Bucket { state, generation, charged_bytes }, false))
}

fn set_state(old: Bucket, to: BucketState, discarded: bool) -> Result<BucketOutcome, Refusal> {
    if old.charged_bytes != 0 {
        return Err(Refusal::Bug(format!("to {to:?} with a count of {}", old.charged_bytes)));
    }
    let generation = match (old.state, to) {
        (BucketState::Free, BucketState::Metadata | BucketState::Free) => old.generation,
        (BucketState::NeedDiscard, BucketState::Free) => old.generation,
        (BucketState::Metadata, BucketState::NeedDiscard) => old.generation.wrapping_add(1),
        (from, to) => return Err(Refusal::Bug(format!("from {from:?} to {to:?}"))),
    };
    Ok(outcome(old, Bucket { state: to, generation, charged_bytes: 0 }, discarded))
}

/// Index keys and counters that follow from the states.
fn outcome(old: Bucket, new: Bucket, discarded: bool) -> BucketOutcome {
    let changed = old.state != new.state;
    let free_space = match (old.state, new.state) {
        (_, BucketState::Free) if changed || discarded => Some(Some(FreeBucket { discarded })),
        (BucketState::Free, _) if changed => Some(None),
        _ => None,
    };
    let need_discard = match (old.state, new.state) {
        (_, BucketState::NeedDiscard) if changed => Some(true),
        (BucketState::NeedDiscard, _) if changed => Some(false),
        _ => None,
    };
    let mut accounting: SmallVec<[(AccountingCounter, i64); 4]> = smallvec![];
    if changed {
        accounting.extend(counter_of(old.state).map(|counter| (counter, -1)));
        accounting.extend(counter_of(new.state).map(|counter| (counter, 1)));
    }
    BucketOutcome { new, free_space, need_discard, accounting }
}

fn counter_of(state: BucketState) -> Option<AccountingCounter> {
    match state {
        BucketState::Free | BucketState::Reserved => None,
        BucketState::Data => Some(AccountingCounter::DataBuckets),
        BucketState::Metadata => Some(AccountingCounter::MetadataBuckets),
        BucketState::NeedDiscard => Some(AccountingCounter::NeedDiscardBuckets),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn counted(delta: i64) -> BucketChange {
        BucketChange { charged_delta: delta, ..BucketChange::default() }
    }

    fn to(state: BucketState) -> BucketChange {
        BucketChange { to_state: Some(state), ..BucketChange::default() }
    }

    #[test]
    fn a_life() {
        let opened = apply(Bucket::UNUSED, &counted(4096)).unwrap();
        assert_eq!(opened.new, Bucket { state: BucketState::Data, generation: 0, charged_bytes: 4096 });
        assert_eq!((opened.free_space, opened.need_discard), (Some(None), None));
        assert_eq!(opened.accounting.as_slice(), [(AccountingCounter::DataBuckets, 1)]);

        let emptied = apply(opened.new, &counted(-4096)).unwrap();
        assert_eq!(emptied.new, Bucket { state: BucketState::NeedDiscard, generation: 1, charged_bytes: 0 });
        assert_eq!((emptied.free_space, emptied.need_discard), (None, Some(true)));
        let counters = [(AccountingCounter::DataBuckets, -1), (AccountingCounter::NeedDiscardBuckets, 1)];
        assert_eq!(emptied.accounting.as_slice(), counters);

        let again = BucketChange { expected_generation: Some(1), ..counted(8192) };
        let again = apply(emptied.new, &again).unwrap();
        assert_eq!(again.new, Bucket { state: BucketState::Data, generation: 1, charged_bytes: 8192 });
        assert_eq!((again.free_space, again.need_discard), (None, Some(false)));

        let freed = apply(emptied.new, &to(BucketState::Free)).unwrap();
        assert_eq!(freed.new, Bucket { state: BucketState::Free, generation: 1, charged_bytes: 0 });
        assert_eq!(freed.free_space, Some(Some(FreeBucket { discarded: false })));
        assert_eq!(freed.need_discard, Some(false));

        let punched = apply(freed.new, &BucketChange { discarded: true, ..to(BucketState::Free) }).unwrap();
        assert_eq!((punched.new, punched.free_space), (freed.new, Some(Some(FreeBucket { discarded: true }))));

        let claimed = apply(freed.new, &to(BucketState::Metadata)).unwrap();
        assert_eq!((claimed.new.state, claimed.free_space), (BucketState::Metadata, Some(None)));
        let released = apply(claimed.new, &to(BucketState::NeedDiscard)).unwrap();
        assert_eq!((released.new.state, released.new.generation), (BucketState::NeedDiscard, 2));
    }

    #[test]
    fn what_is_not_drawn_is_refused() {
        let data = Bucket { state: BucketState::Data, generation: 3, charged_bytes: 4096 };
        let stale = BucketChange { expected_generation: Some(2), ..counted(1) };
        assert_eq!(apply(data, &stale), Err(Refusal::OtherGeneration { expected: 2, actual: 3 }));
        assert!(matches!(apply(data, &counted(-4097)), Err(Refusal::Corrupt(_))));
        assert!(matches!(apply(data, &counted(i64::MIN)), Err(Refusal::Corrupt(_))));
        assert!(matches!(apply(data, &to(BucketState::Free)), Err(Refusal::Bug(_))));
        assert!(matches!(apply(Bucket::UNUSED, &counted(-1)), Err(Refusal::Corrupt(_))));
        assert!(matches!(apply(Bucket::UNUSED, &to(BucketState::NeedDiscard)), Err(Refusal::Bug(_))));
        let nodes = Bucket { state: BucketState::Metadata, generation: 0, charged_bytes: 0 };
        assert!(matches!(apply(nodes, &counted(4096)), Err(Refusal::Corrupt(_))));
        assert!(matches!(apply(nodes, &to(BucketState::Free)), Err(Refusal::Bug(_))));
        let full = Bucket { state: BucketState::Data, generation: 0, charged_bytes: u64::MAX };
        assert!(matches!(apply(full, &counted(1)), Err(Refusal::Corrupt(_))));
    }

    proptest! {
        /// Over any run of changes: the keys of the indexes are exactly the buckets in that state, the counters count them,
        /// and the generation has gone up once for each emptying.
        #[test]
        fn indexes_follow_the_state(changes in proptest::collection::vec((0_u8..5, -3_i64..4), 0..200)) {
            let mut bucket = Bucket::UNUSED;
            let (mut free_key, mut need_discard_key, mut emptyings) = (true, false, 0);
            let mut totals = std::collections::BTreeMap::new();
            for (kind, delta) in changes {
                let change = match kind {
                    0 => to(BucketState::Free),
                    1 => to(BucketState::Metadata),
                    2 => to(BucketState::NeedDiscard),
                    _ => counted(delta * 4096),
                };
                let Ok(outcome) = apply(bucket, &change) else { continue };
                if let Some(free) = outcome.free_space { free_key = free.is_some(); }
                if let Some(need) = outcome.need_discard { need_discard_key = need; }
                for (counter, delta) in outcome.accounting { *totals.entry(counter).or_insert(0) += delta; }
                if outcome.new.state == BucketState::NeedDiscard && bucket.state != BucketState::NeedDiscard { emptyings += 1; }
                bucket = outcome.new;
                prop_assert_eq!(free_key, bucket.state == BucketState::Free);
                prop_assert_eq!(need_discard_key, bucket.state == BucketState::NeedDiscard);
                prop_assert_eq!(bucket.generation, emptyings);
                prop_assert_eq!(bucket.charged_bytes > 0, bucket.state == BucketState::Data);
                for (counter, state) in [
                    (AccountingCounter::DataBuckets, BucketState::Data),
                    (AccountingCounter::MetadataBuckets, BucketState::Metadata),
                    (AccountingCounter::NeedDiscardBuckets, BucketState::NeedDiscard),
                ] {
                    prop_assert_eq!(totals.get(&counter).copied().unwrap_or(0), i64::from(bucket.state == state));
                }
            }
        }
    }
}
