//! Changes of buckets: the one kind of update whose final value is computed under the leaf lock.
//!
//! Every write and every delete of file data changes the counts of the buckets that it touches, so buckets are shared by
//! transactions that have nothing else in common. Reading a count in the body and writing it back would make them all restart. So a
//! transaction stages a [`BucketChange`]; the commit reads, computes and writes the value while it holds the leaf's lock, and
//! logs the final value, which is what replay needs.

use smallvec::SmallVec;

use crate::format::journal::AccountingCounter;
use crate::format::space::{Bucket, BucketState, FreeBucket};

/// What a transaction does to a bucket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BucketChange {
    /// Change of the bytes that extents are charged with.
    pub charged_delta: i64,
    /// Generation that a new pointer was made for; a bucket with another one makes the commit fail. Of several pointers the oldest.
    pub expected_generation: Option<u32>,
    /// The newest generation of several pointers, if it is not the oldest too: the bucket was emptied while the body ran. No bucket has both, so the
    /// commit fails.
    pub newer_generation: Option<u32>,
    /// A state that is set as such: a claim for nodes, the end of a discard.
    pub to_state: Option<BucketState>,
    /// With `to_state` [`BucketState::Free`]: whether the host was told.
    pub discarded: bool,
}

impl BucketChange {
    /// Both changes as one.
    #[must_use]
    pub fn merged(self, later: Self) -> Self {
        let generations =
            [self, later].into_iter().flat_map(|change| [change.expected_generation, change.newer_generation]);
        let oldest = generations.clone().flatten().min();
        Self {
            charged_delta: self.charged_delta + later.charged_delta,
            expected_generation: oldest,
            newer_generation: generations.flatten().max().filter(|newest| Some(*newest) != oldest),
            to_state: later.to_state.or(self.to_state),
            discarded: self.discarded || later.discarded,
        }
    }

    /// Whether nothing is left of it: no count, no state, and no generation to check.
    #[must_use]
    pub fn is_nothing(&self) -> bool {
        self.charged_delta == 0 && self.to_state.is_none() && self.expected_generation.is_none()
    }
}

/// What a [`BucketChange`] comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BucketOutcome {
    /// The bucket's final value.
    pub new: Bucket,
    /// `Some(Some(_))` puts its key in the free-space tree, `Some(None)` removes it, `None` leaves it.
    pub free_space: Option<Option<FreeBucket>>,
    /// `Some(true)` puts its key in the need-discard tree, `Some(false)` removes it, `None` leaves it.
    pub need_discard: Option<bool>,
    /// Global counters that follow.
    pub accounting: SmallVec<[(AccountingCounter, i64); 4]>,
}
