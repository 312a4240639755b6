//! The commit: see the module's documentation for its steps and why none can fail after the journal reservation.

use std::collections::BTreeMap;

use smallvec::SmallVec;

use super::{BucketChange, BucketOutcome, CommitOptions, Hook, ReadRecord, Transaction, Transactions};
use crate::btree::{LeafTarget, LockedLeaves};
use crate::error::{Error, Result};
use crate::format::journal::{AccountingCounter, encode_accounting, encode_key};
use crate::format::key::packed_bytes;
use crate::format::space::Bucket;
use crate::format::{BtreeId, Position, Value};
use crate::units::{BucketIndex, DeviceIndex, JournalSequence};

type BucketKey = (DeviceIndex, BucketIndex);
type Updates = BTreeMap<(BtreeId, Position), Option<Value>>;

/// What the body and the triggers came to.
struct Staged<'a> {
    transactions: &'a Transactions,
    updates: Updates,
    reads: Vec<ReadRecord>,
    accounting: SmallVec<[(AccountingCounter, i64); 4]>,
    buckets: Vec<(BucketKey, BucketChange)>,
}

/// A bucket's value before and after, as computed under the locks.
struct BucketUpdate {
    key: BucketKey,
    old: Bucket,
    outcome: BucketOutcome,
}

/// What one attempt under the locks came to.
enum Attempt {
    Done(JournalSequence, Vec<BucketUpdate>),
    /// Final bucket values need leaves that were not predicted.
    PredictAgain,
    /// Split for this many bytes at this position, then try again.
    MakeRoom(BtreeId, Position, usize),
    /// The journal has no space for this many bytes now.
    WaitForJournal(usize),
}

pub(super) fn commit(mut transaction: Transaction<'_>, options: CommitOptions) -> Result<JournalSequence> {
    if !options.raw
        && let Err(error) = run_triggers(&mut transaction)
    {
        return Err(believe(&transaction, error));
    }
    let Transaction { transactions, updates, reads, accounting, buckets, hooks, .. } = transaction;
    let buckets: Vec<_> = buckets.into_iter().filter(|(_, change)| !change.is_nothing()).collect();
    let staged = Staged { transactions, updates, reads, accounting, buckets };
    if staged.updates.is_empty() && staged.buckets.is_empty() && staged.accounting.iter().all(|(_, delta)| *delta == 0)
    {
        // One read is consistent in itself.
        if staged.reads.len() > 1 {
            check_reads(staged.transactions, &staged.reads)?;
        }
        return Ok(JournalSequence(0));
    }
    let (sequence, bucket_updates) = staged.commit(options)?;
    transactions.metrics.transaction_commits.increment();
    finish(transactions, sequence, bucket_updates, hooks);
    Ok(sequence)
}

/// An error of a body or of a trigger: [`Error::Restart`] instead of it if what was read is no longer so. Then the error may come from a mixture of
/// states that never was; the next run sees what is there. Waits for a few leaves, and reads them if they were evicted.
pub(super) fn believe(transaction: &Transaction<'_>, error: Error) -> Error {
    match check_reads(transaction.transactions, &transaction.reads) {
        Err(Error::Restart) => Error::Restart,
        _ => error,
    }
}

/// [`Error::Restart`] if what was read is no longer so.
fn check_reads(transactions: &Transactions, reads: &[ReadRecord]) -> Result<()> {
    let mut targets = read_targets(reads).collect();
    let leaves = transactions.forest.lock_leaves(&mut targets)?;
    validate(reads, &leaves)
}

fn read_targets(reads: &[ReadRecord]) -> impl Iterator<Item = LeafTarget> {
    reads.iter().map(|read| LeafTarget { btree: read.btree, position: read.from, write: false })
}

/// Everything that was read must still be so.
fn validate(reads: &[ReadRecord], leaves: &LockedLeaves<'_>) -> Result<()> {
    for read in reads {
        let unchanged = if read.from == read.to {
            leaves.get(read.btree, read.from).as_ref() == read.observed.first().map(|(_, value)| value)
        } else {
            leaves.range(read.btree, read.from, read.to).is_some_and(|now| now.as_slice() == read.observed.as_slice())
        };
        if !unchanged {
            return Err(Error::Restart);
        }
    }
    Ok(())
}

fn finish(transactions: &Transactions, sequence: JournalSequence, buckets: Vec<BucketUpdate>, hooks: Vec<Hook<'_>>) {
    if let Some(trigger) = transactions.trigger.get() {
        for BucketUpdate { key: (device, bucket), old, outcome } in buckets {
            trigger.bucket_committed(device, bucket, old, outcome.new, sequence);
        }
    }
    for hook in hooks {
        hook(sequence);
    }
}

/// Trees whose keys only triggers and bucket changes write: nothing follows from a change of them.
#[must_use]
pub fn is_index(btree: BtreeId) -> bool {
    matches!(btree, BtreeId::Buckets | BtreeId::FreeSpace | BtreeId::NeedDiscard | BtreeId::Backpointers)
}

/// Drops updates that change nothing, and lets the trigger add what follows from the others.
fn run_triggers(transaction: &mut Transaction<'_>) -> Result<()> {
    let Some(trigger) = transaction.transactions.trigger.get() else { return Ok(()) };
    let staged: Vec<_> = transaction
        .updates
        .iter()
        .filter(|((btree, _), _)| !is_index(*btree))
        .map(|(key, value)| (*key, value.clone()))
        .collect();
    for ((btree, position), new) in staged {
        transaction.updates.remove(&(btree, position));
        let old = transaction.get(btree, position)?;
        if old == new {
            continue;
        }
        transaction.updates.insert((btree, position), new.clone());
        trigger.key_changed(transaction, btree, position, old.as_deref(), new.as_deref())?;
    }
    Ok(())
}

fn bucket_position((device, bucket): BucketKey) -> Position {
    Position::new(u64::from(device.0), bucket.0, 0)
}

fn decode_bucket(value: Option<&[u8]>) -> Result<Bucket> {
    Ok(value.map(Bucket::decode).transpose()?.unwrap_or(Bucket::UNUSED))
}

impl Staged<'_> {
    fn commit(&self, options: CommitOptions) -> Result<(JournalSequence, Vec<BucketUpdate>)> {
        let Transactions { forest, journal, .. } = self.transactions;
        loop {
            if options.watermark != crate::journal::JournalWatermark::Checkpoint {
                forest.wait_for_dirty_room()?;
            }
            let mut targets = self.targets()?;
            let attempt = {
                let mut leaves = forest.lock_leaves(&mut targets)?;
                self.attempt(&targets, &mut leaves, options)?
            };
            match attempt {
                Attempt::Done(sequence, buckets) => return Ok((sequence, buckets)),
                Attempt::PredictAgain => {}
                Attempt::MakeRoom(btree, position, bytes) => forest.make_room(btree, position, bytes)?,
                Attempt::WaitForJournal(bytes) => {
                    self.transactions.metrics.journal_reservations_blocked.increment();
                    let started = self.transactions.env.monotonic();
                    journal.wait_for_space(bytes, options.watermark)?;
                    let waited = self.transactions.env.monotonic().saturating_sub(started);
                    let waited = u64::try_from(waited.as_micros()).unwrap_or(u64::MAX);
                    self.transactions.metrics.transaction_room_wait_max_us.raise_to(waited);
                }
            }
        }
    }

    /// Everything read and written, with the index keys that the buckets' present values say will change.
    fn targets(&self) -> Result<Vec<LeafTarget>> {
        let mut targets = Vec::with_capacity(self.updates.len() + self.reads.len() + 3 * self.buckets.len());
        targets.extend(read_targets(&self.reads));
        targets.extend(self.updates.keys().map(|&(btree, position)| LeafTarget { btree, position, write: true }));
        for (key, change) in &self.buckets {
            let position = bucket_position(*key);
            let old = decode_bucket(self.transactions.forest.get(BtreeId::Buckets, position)?.as_deref())?;
            // A guess: what was read may be stale, and then the change may look impossible. Only the outcome under the locks counts.
            let outcome = self.outcome(*key, old, change).ok();
            let btrees = [
                Some(BtreeId::Buckets),
                outcome.as_ref().and_then(|outcome| outcome.free_space).map(|_| BtreeId::FreeSpace),
                outcome.as_ref().and_then(|outcome| outcome.need_discard).map(|_| BtreeId::NeedDiscard),
            ];
            targets.extend(btrees.into_iter().flatten().map(|btree| LeafTarget { btree, position, write: true }));
        }
        targets.sort_by_key(|target| (target.btree, target.position, !target.write));
        targets.dedup_by_key(|target| (target.btree, target.position));
        Ok(targets)
    }

    fn outcome(&self, (device, bucket): BucketKey, old: Bucket, change: &BucketChange) -> Result<BucketOutcome> {
        let trigger = self.transactions.trigger.get();
        let trigger = trigger.ok_or_else(|| Error::Bug("a bucket change without a trigger".into()))?;
        trigger.bucket_changed(device, bucket, old, change)
    }

    fn attempt(
        &self,
        targets: &[LeafTarget],
        leaves: &mut LockedLeaves<'_>,
        options: CommitOptions,
    ) -> Result<Attempt> {
        validate(&self.reads, leaves)?;
        let Some(buckets) = self.buckets_under_lock(targets, leaves)? else { return Ok(Attempt::PredictAgain) };
        let mut updates = self.updates.clone();
        let mut accounting = self.accounting.clone();
        for update in &buckets {
            add_bucket(update, &mut updates, &mut accounting);
        }
        accounting.retain(|(_, delta)| *delta != 0);
        if let Some((btree, position, bytes)) = lacking_room(&updates, leaves) {
            return Ok(Attempt::MakeRoom(btree, position, bytes));
        }
        let mut payload = Vec::new();
        for ((btree, position), value) in &updates {
            encode_key(*btree, *position, value.as_deref(), &mut payload);
        }
        // The accounting entries are summed and written by the journal; reserve as if each transaction wrote its own.
        let mut accounting_bytes = Vec::new();
        for (counter, delta) in &accounting {
            encode_accounting(*counter, *delta, &mut accounting_bytes);
        }
        let bytes = payload.len() + accounting_bytes.len();
        let Some(reservation) = self.transactions.journal.try_reserve(bytes, options.watermark) else {
            return Ok(Attempt::WaitForJournal(bytes));
        };
        let sequence = reservation.sequence();
        let entry_count = u32::try_from(updates.len()).unwrap_or(u32::MAX);
        for ((btree, position), value) in updates {
            leaves.put(btree, position, value, sequence);
        }
        self.transactions.journal.append(reservation, payload, entry_count, &accounting, options.data_needs_flush);
        Ok(Attempt::Done(sequence, buckets))
    }

    /// Final values of the buckets; `None` if one needs an index leaf that is not locked.
    fn buckets_under_lock(
        &self,
        targets: &[LeafTarget],
        leaves: &LockedLeaves<'_>,
    ) -> Result<Option<Vec<BucketUpdate>>> {
        let locked = |btree, position| {
            targets
                .binary_search_by_key(&(btree, position), |target| (target.btree, target.position))
                .is_ok_and(|index| targets.get(index).is_some_and(|target| target.write))
        };
        let mut updates = Vec::with_capacity(self.buckets.len());
        for (key, change) in &self.buckets {
            let position = bucket_position(*key);
            let old = decode_bucket(leaves.get(BtreeId::Buckets, position).as_deref())?;
            let outcome = self.outcome(*key, old, change)?;
            if (outcome.free_space.is_some() && !locked(BtreeId::FreeSpace, position))
                || (outcome.need_discard.is_some() && !locked(BtreeId::NeedDiscard, position))
            {
                return Ok(None);
            }
            updates.push(BucketUpdate { key: *key, old, outcome });
        }
        Ok(Some(updates))
    }
}

fn add_bucket(update: &BucketUpdate, updates: &mut Updates, accounting: &mut SmallVec<[(AccountingCounter, i64); 4]>) {
    let position = bucket_position(update.key);
    updates.insert((BtreeId::Buckets, position), Some(update.outcome.new.encode().into()));
    if let Some(free) = update.outcome.free_space {
        updates.insert((BtreeId::FreeSpace, position), free.map(|free| free.encode().into()));
    }
    if let Some(need) = update.outcome.need_discard {
        updates.insert((BtreeId::NeedDiscard, position), need.then(|| Value::from([].as_slice())));
    }
    for (counter, delta) in &update.outcome.accounting {
        match accounting.iter_mut().find(|(present, _)| present == counter) {
            Some((_, sum)) => *sum += delta,
            None => accounting.push((*counter, *delta)),
        }
    }
}

/// The first place where a leaf has no room for what the transaction puts in its tree.
fn lacking_room(updates: &Updates, leaves: &LockedLeaves<'_>) -> Option<(BtreeId, Position, usize)> {
    leaves
        .full_leaf(updates.iter().map(|(&(btree, position), value)| (btree, position, packed_bytes(value.as_deref()))))
}
