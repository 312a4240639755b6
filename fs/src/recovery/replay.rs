//! Replay: the journal's puts, raw, onto the trees of a checkpoint.

use crate::btree::Forest;
use crate::error::{Corruption, Result};
use crate::format::BtreeId;
use crate::format::journal::{Entries, Entry};
use crate::journal::Log;
use crate::transaction::{CommitOptions, Transactions, is_index};
use crate::units::JournalSequence;

/// What a replay did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Replayed {
    /// Records that were replayed.
    pub records: u64,
    /// Keys that were put.
    pub keys: u64,
}

/// Applies the keys of every record of `log`, in order. Accounting is [`Log::totals`]'s. Takes leaf locks one at a time.
///
/// # Errors
/// A record that is whole but means nothing (damage that the checksum did not see, or a bug), or a node that cannot be read.
pub fn replay(forest: &Forest, log: &Log) -> Result<Replayed> {
    replay_trees(forest, log, |_| true)
}

fn replay_trees(forest: &Forest, log: &Log, wanted: impl Fn(BtreeId) -> bool) -> Result<Replayed> {
    let mut replayed = Replayed::default();
    for record in &log.records {
        let sequence = record.header.sequence;
        for entry in Entries::new(&record.payload) {
            if let Entry::Key { btree, key } = entry.map_err(|error| in_record(sequence, error))?
                && wanted(btree)
            {
                forest.replay_put(btree, key.position, key.value.map(Into::into), sequence)?;
                replayed.keys += 1;
            }
        }
        replayed.records += 1;
    }
    forest.end_replay()?;
    Ok(replayed)
}

/// The first half of how replay must not be ([`crate::alloc::TestSwitches::triggers_in_replay`]): only what follows from other keys.
///
/// # Errors
/// As [`replay`].
pub fn replay_index(forest: &Forest, log: &Log) -> Result<Replayed> {
    replay_trees(forest, log, is_index)
}

/// The second half: the other keys, with triggers that change again what the log has changed already.
///
/// # Errors
/// Those of transactions.
pub fn replay_with_triggers(transactions: &Transactions, log: &Log) -> Result<()> {
    for record in &log.records {
        transactions.run(CommitOptions::default(), |transaction| {
            for entry in Entries::new(&record.payload) {
                if let Entry::Key { btree, key } = entry.map_err(|error| in_record(record.header.sequence, error))?
                    && !is_index(btree)
                {
                    match key.value {
                        Some(value) => transaction.put(btree, key.position, value.to_vec()),
                        None => transaction.delete(btree, key.position),
                    }
                }
            }
            Ok(())
        })?;
    }
    Ok(())
}

fn in_record(sequence: JournalSequence, error: Corruption) -> Corruption {
    Corruption { what: format!("{} of journal record {sequence}", error.what), ..error }
}
