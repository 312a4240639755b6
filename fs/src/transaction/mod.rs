//! Transactions: the only writer of the journal and of the B-trees.
//!
//! A transaction is a closure over a [`Transaction`]: it reads keys and stages updates, and may run more than once. No lock is held
//! while it runs, so it may read nodes from the device and wait. The commit is optimistic:
//!
//! ```text
//! body ends -> triggers stage what follows from its changes (bucket counts, backpointers, accounting)
//!           -> an error of either counts only if everything read is still so (else the body runs again)
//!           -> wait for room (dirty node bytes), no locks held
//!           -> lock the leaves of everything read and written, in (tree, position) order
//!           -> check that everything read is still so           (else unlock; the body runs again)
//!           -> compute final bucket values under the locks      (they may need another leaf: unlock, lock again)
//!           -> room in the leaves                               (else unlock, split, lock again)
//!           -> reserve journal space without blocking           (else unlock, wait for space, lock again)
//!           -> apply to the leaves, append to the journal       (nothing can fail here)
//!           -> unlock -> in-memory effects, commit hooks
//! ```
//!
//! Invariants:
//! 1. A transaction lies wholly in one journal record, as final, exact-position puts and whiteouts.
//! 2. Locks are taken in one global order with no tree traversal in between, and no I/O happens under them: no deadlock, and
//!    transactions on different leaves never wait for each other.
//! 3. What was read (keys, and ranges found empty) is the same at the commit as it was in the body: transactions are serialisable.
//!    Validation compares contents, so a neighbour's change in the same leaf costs a comparison and not a restart.
//!    That holds for errors too: a body may have read a mixture of states, so its error is believed only if what it read is still there.
//!    And for transactions that change nothing.
//! 4. The order of reservations is the order of application for any two transactions that touch the same key.
//!
//! This is Kung and Robinson's backward validation ("On Optimistic Methods for Concurrency Control", 1981) with key ranges
//! as read sets; bcachefs reaches the same end with locks held through the body, and restarts on lock-order conflicts.

mod bucket;
mod commit;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use smallvec::SmallVec;

pub use bucket::{BucketChange, BucketOutcome};
pub use commit::is_index;

use crate::btree::Forest;
use crate::env::Env;
use crate::error::{Error, Result};
use crate::format::journal::AccountingCounter;
use crate::format::space::Bucket;
use crate::format::{BtreeId, Position, Value};
use crate::journal::{Journal, JournalWatermark};
use crate::metrics::Metrics;
use crate::units::{BucketIndex, DeviceIndex, JournalSequence};

/// What the layer above adds to changes of keys, in the same transaction.
pub trait Trigger: Send + Sync {
    /// Called once for each changed key when the body has ended, with the value before and after the transaction. May stage
    /// updates of index trees, accounting and bucket changes.
    ///
    /// # Errors
    /// Any error ends the transaction without a commit.
    fn key_changed(
        &self,
        transaction: &mut Transaction<'_>,
        btree: BtreeId,
        position: Position,
        old: Option<&[u8]>,
        new: Option<&[u8]>,
    ) -> Result<()>;

    /// The final value of a bucket and of its index keys. A pure function, called under leaf locks, possibly several times.
    ///
    /// # Errors
    /// If the change is impossible (a count below zero, a stale generation).
    fn bucket_changed(
        &self,
        device: DeviceIndex,
        bucket: BucketIndex,
        old: Bucket,
        change: &BucketChange,
    ) -> Result<BucketOutcome>;

    /// In-memory effects of a committed change; called with no lock held. No I/O.
    fn bucket_committed(
        &self,
        device: DeviceIndex,
        bucket: BucketIndex,
        old: Bucket,
        new: Bucket,
        sequence: JournalSequence,
    );
}

/// How a transaction commits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CommitOptions {
    /// How deep it may go into the journal's reserve.
    pub watermark: JournalWatermark,
    /// Its keys name data whose writes have completed but may not be flushed.
    pub data_needs_flush: bool,
    /// No triggers: for fsck, which corrects what triggers would keep.
    pub raw: bool,
}

impl Default for CommitOptions {
    fn default() -> Self {
        Self { watermark: JournalWatermark::Normal, data_needs_flush: false, raw: false }
    }
}

impl CommitOptions {
    /// For work that gives space back.
    #[must_use]
    pub fn reclaim() -> Self {
        Self { watermark: JournalWatermark::Reclaim, ..Self::default() }
    }

    /// For the checkpoint's own claims.
    #[must_use]
    pub fn checkpoint() -> Self {
        Self { watermark: JournalWatermark::Checkpoint, ..Self::default() }
    }

    /// For keys that name newly written data.
    #[must_use]
    pub fn data() -> Self {
        Self { data_needs_flush: true, ..Self::default() }
    }
}

/// Restarts in a row that no load explains: seconds of nothing else.
const RESTARTS_MAX: u32 = 1 << 20;
/// Bytes of the log for which [`Transactions::wait_for_room`] waits.
const SMALL_COMMIT_BYTES: usize = 2048;

/// A transaction that has committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Committed<T> {
    /// What the body returned.
    pub value: T,
    /// The record that holds it: what `fsync` must wait for. 0 if nothing was changed.
    pub sequence: JournalSequence,
}

/// What was read: `[from, to]` of a tree held exactly these keys.
#[derive(Debug)]
struct ReadRecord {
    btree: BtreeId,
    from: Position,
    to: Position,
    observed: SmallVec<[(Position, Value); 1]>,
}

type Hook<'a> = Box<dyn FnOnce(JournalSequence) + 'a>;

/// The door to transactions. One for each filesystem.
pub struct Transactions {
    forest: Arc<Forest>,
    journal: Arc<Journal>,
    env: Arc<Env>,
    metrics: Arc<Metrics>,
    trigger: OnceLock<Arc<dyn Trigger>>,
}

impl std::fmt::Debug for Transactions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Transactions").finish_non_exhaustive()
    }
}

impl Transactions {
    /// Over these trees and this journal. The trigger is set later, by the layer that implements it.
    #[must_use]
    pub fn new(forest: Arc<Forest>, journal: Arc<Journal>, env: Arc<Env>, metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Self { forest, journal, env, metrics, trigger: OnceLock::new() })
    }

    /// Sets the trigger, once.
    ///
    /// # Errors
    /// [`Error::Bug`] if there is one.
    pub fn set_trigger(&self, trigger: Arc<dyn Trigger>) -> Result<()> {
        self.trigger.set(trigger).map_err(|_| Error::Bug("a second trigger".into()))
    }

    /// The trees, for those who only look.
    #[must_use]
    pub fn forest(&self) -> &Arc<Forest> {
        &self.forest
    }

    /// The journal.
    #[must_use]
    pub fn journal(&self) -> &Arc<Journal> {
        &self.journal
    }

    /// A transaction that only reads: each key, and each [`Transaction::next`] and [`Transaction::previous`], is consistent in itself, also where it
    /// looks through several leaves; a longer range leaf by leaf. The whole is not validated.
    #[must_use]
    pub fn read(&self) -> Transaction<'_> {
        Transaction::new(self, false)
    }

    /// Waits for what a small commit would wait for: dirty nodes that are too many, the log's ring. For who is about to do what cannot be taken
    /// back before its commit: so want of space is met before that. Call it with no locks of nodes or folios held.
    ///
    /// # Errors
    /// [`Error::NoSpace`] if no checkpoint finds any; [`Error::Latched`].
    pub fn wait_for_room(&self, options: CommitOptions) -> Result<()> {
        self.forest.wait_for_dirty_room()?;
        self.journal.wait_for_space(SMALL_COMMIT_BYTES, options.watermark)
    }

    /// Runs `body` until it commits or fails. The body may run several times, so it has no effects outside of the transaction but
    /// through [`Transaction::on_commit`]. Holds no lock while the body runs.
    ///
    /// # Errors
    /// The body's own, and those of the commit: the device's, [`Error::Latched`], [`Error::NoSpace`] from triggers; [`Error::Corrupt`] if what it
    /// reads never stays as it was, as where two nodes have one id.
    pub fn run<'a, T>(
        &'a self,
        options: CommitOptions,
        mut body: impl FnMut(&mut Transaction<'a>) -> Result<T>,
    ) -> Result<Committed<T>> {
        let mut attempts = 0_u32;
        loop {
            self.env.maybe_yield(4)?;
            let mut transaction = Transaction::new(self, true);
            let outcome = match body(&mut transaction) {
                Ok(value) => commit::commit(transaction, options).map(|sequence| (value, sequence)),
                Err(error) => Err(commit::believe(&transaction, error)),
            };
            match outcome {
                Ok((value, sequence)) => return Ok(Committed { value, sequence }),
                Err(Error::Restart) => {
                    self.metrics.transaction_restarts.increment();
                    attempts += 1;
                    if attempts == RESTARTS_MAX {
                        return Err(Error::corrupt(
                            "the B-trees",
                            format!("they had changed after each of {attempts} looks"),
                        ));
                    }
                    // Another transaction committed in between each time, so the system as a whole makes progress.
                    if attempts.is_multiple_of(8) && !self.env.is_simulated() {
                        std::thread::yield_now();
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }
}

/// A transaction in its body. Reads see the transaction's own updates.
pub struct Transaction<'a> {
    transactions: &'a Transactions,
    updates: BTreeMap<(BtreeId, Position), Option<Value>>,
    reads: Vec<ReadRecord>,
    accounting: SmallVec<[(AccountingCounter, i64); 4]>,
    buckets: BTreeMap<(DeviceIndex, BucketIndex), BucketChange>,
    hooks: Vec<Hook<'a>>,
    validate: bool,
}

impl<'a> Transaction<'a> {
    fn new(transactions: &'a Transactions, validate: bool) -> Self {
        Self {
            transactions,
            updates: BTreeMap::new(),
            reads: Vec::new(),
            accounting: SmallVec::new(),
            buckets: BTreeMap::new(),
            hooks: Vec::new(),
            validate,
        }
    }

    /// The value at exactly this position.
    ///
    /// # Errors
    /// The device's, or damage.
    pub fn get(&mut self, btree: BtreeId, position: Position) -> Result<Option<Value>> {
        if let Some(staged) = self.updates.get(&(btree, position)) {
            return Ok(staged.clone());
        }
        let value = self.transactions.forest.get(btree, position)?;
        if self.validate {
            let observed = value.iter().map(|value| (position, Arc::clone(value))).collect();
            self.reads.push(ReadRecord { btree, from: position, to: position, observed });
        }
        Ok(value)
    }

    /// The first key in `[from, to]`.
    ///
    /// # Errors
    /// The device's, or damage.
    pub fn next(&mut self, btree: BtreeId, from: Position, to: Position) -> Result<Option<(Position, Value)>> {
        loop {
            let mut scans = Scans::default();
            let found = self.scan(btree, from, to, 1, &mut scans)?.pop();
            if scans.are_one_state(&self.transactions.forest, btree)? {
                return Ok(found);
            }
            self.transactions.metrics.transaction_restarts.increment();
        }
    }

    /// The first `limit` keys in `[from, to]`, ascending.
    ///
    /// # Errors
    /// The device's, or damage.
    pub fn range(
        &mut self,
        btree: BtreeId,
        from: Position,
        to: Position,
        limit: usize,
    ) -> Result<Vec<(Position, Value)>> {
        self.scan(btree, from, to, limit, &mut Scans::default())
    }

    fn scan(
        &mut self,
        btree: BtreeId,
        from: Position,
        to: Position,
        limit: usize,
        scans: &mut Scans,
    ) -> Result<Vec<(Position, Value)>> {
        let mut found = Vec::new();
        let mut cursor = from;
        while cursor <= to && found.len() < limit {
            // Staged whiteouts hide stored keys, so ask for as many more.
            let hidden = self.updates.range((btree, cursor)..=(btree, to)).filter(|(_, value)| value.is_none()).count();
            let wanted = (limit - found.len()).saturating_add(hidden);
            let scan = self.transactions.forest.scan(btree, cursor, to, wanted)?;
            let covered_to = scan.covered_to.min(to);
            let staged = self.updates.range((btree, cursor)..=(btree, covered_to));
            merge(&scan.keys, staged.map(|((_, position), value)| (*position, value)), &mut found, false);
            self.record(scans, btree, cursor, covered_to, scan.keys);
            #[cfg(test)]
            tests::seam::reach();
            match covered_to.successor() {
                Some(next) => cursor = next,
                None => break,
            }
        }
        found.truncate(limit);
        Ok(found)
    }

    /// The last key in `[to, from]`: the search goes down from `from`.
    ///
    /// # Errors
    /// The device's, or damage.
    pub fn previous(&mut self, btree: BtreeId, from: Position, to: Position) -> Result<Option<(Position, Value)>> {
        loop {
            let mut scans = Scans::default();
            let found = self.scan_back(btree, from, to, &mut scans)?;
            if scans.are_one_state(&self.transactions.forest, btree)? {
                return Ok(found);
            }
            self.transactions.metrics.transaction_restarts.increment();
        }
    }

    fn scan_back(
        &mut self,
        btree: BtreeId,
        from: Position,
        to: Position,
        scans: &mut Scans,
    ) -> Result<Option<(Position, Value)>> {
        let mut cursor = from;
        while cursor >= to {
            let hidden = self.updates.range((btree, to)..=(btree, cursor)).filter(|(_, value)| value.is_none()).count();
            let scan = self.transactions.forest.scan_back(btree, cursor, to, 1 + hidden)?;
            let covered_to = scan.covered_to.max(to);
            let staged = self.updates.range((btree, covered_to)..=(btree, cursor)).rev();
            let mut found = Vec::new();
            merge(&scan.keys, staged.map(|((_, position), value)| (*position, value)), &mut found, true);
            let mut keys = scan.keys;
            keys.reverse();
            self.record(scans, btree, covered_to, cursor, keys);
            if let Some(first) = found.into_iter().next() {
                return Ok(Some(first));
            }
            #[cfg(test)]
            tests::seam::reach();
            match covered_to.predecessor() {
                Some(next) => cursor = next,
                None => break,
            }
        }
        Ok(None)
    }

    fn record(
        &mut self,
        scans: &mut Scans,
        btree: BtreeId,
        from: Position,
        to: Position,
        keys: Vec<(Position, Value)>,
    ) {
        if self.validate {
            self.reads.push(ReadRecord { btree, from, to, observed: keys.into_iter().collect() });
        } else {
            scans.done.push((from, to, keys));
        }
    }

    /// Stages a put.
    pub fn put(&mut self, btree: BtreeId, position: Position, value: Vec<u8>) {
        self.updates.insert((btree, position), Some(value.into()));
    }

    /// Stages a delete.
    pub fn delete(&mut self, btree: BtreeId, position: Position) {
        self.updates.insert((btree, position), None);
    }

    /// Stages a change of a global counter.
    pub fn account(&mut self, counter: AccountingCounter, delta: i64) {
        match self.accounting.iter_mut().find(|(present, _)| *present == counter) {
            Some((_, sum)) => *sum += delta,
            None => self.accounting.push((counter, delta)),
        }
    }

    /// Stages a change of a bucket, whose final value is computed at the commit.
    pub fn change_bucket(&mut self, device: DeviceIndex, bucket: BucketIndex, change: BucketChange) {
        let entry = self.buckets.entry((device, bucket)).or_default();
        *entry = entry.merged(change);
    }

    /// Runs `hook` with the record's sequence after the commit, with no lock held. Dropped if the body runs again.
    pub fn on_commit(&mut self, hook: impl FnOnce(JournalSequence) + 'a) {
        self.hooks.push(Box::new(hook));
    }

    /// Number of staged key updates, so that callers can bound a transaction.
    #[must_use]
    pub fn update_count(&self) -> usize {
        self.updates.len()
    }
}

/// The scans of one query that nobody validates later: leaf by leaf, at different moments.
#[derive(Default)]
struct Scans {
    /// What `[from, to]` held, in the order in which it was looked at.
    done: Vec<(Position, Position, Vec<(Position, Value)>)>,
}

impl Scans {
    /// Whether all leaves together were like that at one moment, that of the last scan: keys that move between leaves in one
    /// transaction would else be seen in both, or in none.
    fn are_one_state(&self, forest: &Forest, btree: BtreeId) -> Result<bool> {
        let Some((_, earlier)) = self.done.split_last() else { return Ok(true) };
        for (from, to, keys) in earlier {
            let mut at = *from;
            let mut seen = keys.as_slice();
            loop {
                let scan = forest.scan(btree, at, *to, seen.len() + 1)?;
                let Some(rest) = seen.get(scan.keys.len()..).filter(|_| seen.starts_with(&scan.keys)) else {
                    return Ok(false);
                };
                seen = rest;
                match scan.covered_to.successor().filter(|next| next <= to) {
                    Some(next) => at = next,
                    None => break,
                }
            }
            if !seen.is_empty() {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// Merges stored keys with staged ones, which win; whiteouts hide. Both are ascending, or both descending.
fn merge<'k>(
    stored: &[(Position, Value)],
    staged: impl Iterator<Item = (Position, &'k Option<Value>)>,
    found: &mut Vec<(Position, Value)>,
    descending: bool,
) {
    let mut stored = stored.iter().peekable();
    let before = |a: Position, b: Position| if descending { a > b } else { a < b };
    for (position, value) in staged {
        while let Some((stored_position, stored_value)) = stored.next_if(|(stored, _)| before(*stored, position)) {
            found.push((*stored_position, Arc::clone(stored_value)));
        }
        stored.next_if(|(stored, _)| *stored == position);
        if let Some(value) = value {
            found.push((position, Arc::clone(value)));
        }
    }
    found.extend(stored.map(|(position, value)| (*position, Arc::clone(value))));
}
