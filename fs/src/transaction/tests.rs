//! Transactions over real trees and a real journal, on a device in memory.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::btree::{ForestConfig, Opening};
use crate::device::{BlockDevice, MemDevice};
use crate::filesystem::format::{plan, test_geometry};
use crate::journal::{JournalConfig, JournalStart};
use crate::sync::atomic::AtomicU64;

const TREE: BtreeId = BtreeId::Inodes;

/// An empty forest and a fresh journal.
pub(crate) fn transactions() -> Arc<Transactions> {
    let (env, metrics) = (Env::real(), Arc::new(Metrics::default()));
    let size = 64 << 20;
    let superblock = Arc::new(plan(&test_geometry(), size).unwrap());
    let devices: Vec<Arc<dyn BlockDevice>> = vec![Arc::new(MemDevice::new(size))];
    let config = ForestConfig {
        superblock: Arc::clone(&superblock),
        devices: devices.clone(),
        cache_bytes: Arc::new(AtomicU64::new(64 << 20)),
        dirty_bytes_max: 64 << 20,
        epoch: 1,
    };
    let forest = Forest::open(config, &Opening::empty(), env.clone(), metrics.clone()).unwrap();
    let config = JournalConfig {
        record_bytes_max: 64 << 10,
        ..JournalConfig::new(&superblock, devices, Some(std::time::Duration::from_secs(1)))
    };
    let journal = Journal::open(config, JournalStart::fresh(), env.clone(), metrics.clone()).unwrap();
    Transactions::new(forest, journal, env, metrics)
}

fn at(inode: u64) -> Position {
    Position::new(inode, 0, 0)
}

fn number(value: Option<Value>) -> u64 {
    value.map_or(0, |value| u64::from_le_bytes(value.as_ref().try_into().unwrap()))
}

#[test]
fn concurrent_increments_are_all_there() {
    let transactions = transactions();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..200 {
                    transactions
                        .run(CommitOptions::default(), |transaction| {
                            let now = number(transaction.get(TREE, at(7))?);
                            transaction.put(TREE, at(7), (now + 1).to_le_bytes().to_vec());
                            Ok(())
                        })
                        .unwrap();
                }
            });
        }
    });
    assert_eq!(number(transactions.read().get(TREE, at(7)).unwrap()), 800);
}

/// Two transactions that each read what the other writes: if both committed on what they read, no serial order would explain it.
#[test]
fn write_skew_is_refused() {
    let transactions = transactions();
    for round in 0..100_u64 {
        let (left, right) = (at(1000 + 2 * round), at(1001 + 2 * round));
        let barrier = std::sync::Barrier::new(2);
        std::thread::scope(|scope| {
            for (reads, writes) in [(left, right), (right, left)] {
                let (barrier, transactions) = (&barrier, &transactions);
                scope.spawn(move || {
                    let mut first = true;
                    transactions
                        .run(CommitOptions::default(), |transaction| {
                            let seen = transaction.get(TREE, reads)?;
                            if std::mem::take(&mut first) {
                                barrier.wait();
                            }
                            if seen.is_none() {
                                transaction.put(TREE, writes, vec![1]);
                            }
                            Ok(())
                        })
                        .unwrap();
                });
            }
        });
        let mut reader = transactions.read();
        let both = reader.get(TREE, left).unwrap().is_some() && reader.get(TREE, right).unwrap().is_some();
        assert!(!both, "round {round}: both wrote on the belief that the other had not");
    }
}

/// A range that was found empty must be empty at the commit: no phantoms.
#[test]
fn a_range_that_was_read_is_validated() {
    let transactions = transactions();
    let mut runs = 0;
    let committed = transactions
        .run(CommitOptions::default(), |transaction| {
            runs += 1;
            let found = transaction.range(TREE, at(10), at(20), 100)?;
            if runs == 1 {
                // Another transaction gets in between.
                transactions.run(CommitOptions::default(), |other| {
                    other.put(TREE, at(15), vec![1]);
                    Ok(())
                })?;
            }
            transaction.put(TREE, at(30), vec![u8::try_from(found.len()).unwrap()]);
            Ok(found.len())
        })
        .unwrap();
    assert_eq!((runs, committed.value), (2, 1));
    assert!(committed.sequence > JournalSequence(0));
}

/// What a body read may be a mixture of two states; an error that follows from it must not reach the caller.
#[test]
fn an_error_from_a_mixture_of_states_is_not_believed() {
    let transactions = transactions();
    let put_both = |value: u8| {
        transactions
            .run(CommitOptions::default(), |transaction| {
                transaction.put(TREE, at(1), vec![value]);
                transaction.put(TREE, at(2), vec![value]);
                Ok(())
            })
            .unwrap();
    };
    put_both(1);
    let mut runs = 0;
    let committed = transactions.run(CommitOptions::default(), |transaction| {
        runs += 1;
        let first = transaction.get(TREE, at(1))?;
        if runs == 1 {
            put_both(2);
        }
        if first != transaction.get(TREE, at(2))? {
            return Err(Error::corrupt("a pair", "its halves differ"));
        }
        transaction.put(TREE, at(3), vec![7]);
        Ok(())
    });
    assert!(committed.is_ok(), "{committed:?}");
    assert_eq!(runs, 2);

    // What is there to be seen by everybody is believed at once.
    let mut runs = 0;
    let refused = transactions.run(CommitOptions::default(), |transaction| {
        runs += 1;
        transaction.get(TREE, at(1))?;
        Err::<(), _>(Error::corrupt("a pair", "it is wrong"))
    });
    assert!(matches!(refused, Err(Error::Corrupt(_))));
    assert_eq!(runs, 1);
}

/// A transaction that changes nothing is one moment too.
#[test]
fn a_result_without_changes_is_validated() {
    let transactions = transactions();
    let mut runs = 0;
    let committed = transactions
        .run(CommitOptions::default(), |transaction| {
            runs += 1;
            let first = number(transaction.get(TREE, at(1))?);
            if runs == 1 {
                transactions.run(CommitOptions::default(), |other| {
                    other.put(TREE, at(1), 1_u64.to_le_bytes().to_vec());
                    other.put(TREE, at(2), 1_u64.to_le_bytes().to_vec());
                    Ok(())
                })?;
            }
            Ok((first, number(transaction.get(TREE, at(2))?)))
        })
        .unwrap();
    assert_eq!((committed.value, runs), ((1, 1), 2));
}

/// A moment in the middle of a look through several leaves, where a test lets something happen.
pub mod seam {
    use std::cell::RefCell;

    thread_local! {
        static HOOK: RefCell<Option<Box<dyn FnOnce()>>> = const { RefCell::new(None) };
    }

    /// Runs `hook` once, when this thread next goes from one leaf to the next.
    pub fn between_leaves(hook: impl FnOnce() + 'static) {
        HOOK.set(Some(Box::new(hook)));
    }

    pub fn reach() {
        if let Some(hook) = HOOK.take() {
            hook();
        }
    }
}

/// One of two keys in different leaves is there at any moment; a reader who looks for the first of them must find one, though it looks
/// at the leaves one after the other. Extents that are split by copygc, or by a write into their middle, move like that.
#[test]
fn a_key_that_moves_to_another_leaf_is_never_missed() {
    let transactions = transactions();
    // Enough to make several leaves, of which those between the two keys are then emptied.
    for chunk in 0..80_u64 {
        transactions
            .run(CommitOptions::default(), |transaction| {
                (0..10).for_each(|index| transaction.put(TREE, at(1000 + chunk * 10 + index), vec![0; 150]));
                Ok(())
            })
            .unwrap();
    }
    let (low, high) = (at(1300), at(1500));
    for inode in 1300..=1500_u64 {
        transactions
            .run(CommitOptions::default(), |transaction| {
                transaction.delete(TREE, at(inode));
                Ok(())
            })
            .unwrap();
    }
    let leaf_end = transactions.forest().scan(TREE, low, high, 1).unwrap().covered_to;
    assert!(leaf_end < high, "they lie in different leaves");
    let moves = |put: Position, delete: Position| {
        let transactions = Arc::clone(&transactions);
        move || {
            transactions
                .run(CommitOptions::default(), |transaction| {
                    transaction.put(TREE, put, vec![1]);
                    transaction.delete(TREE, delete);
                    Ok(())
                })
                .unwrap();
        }
    };
    moves(high, low)();
    seam::between_leaves(moves(low, high));
    let found = transactions.read().next(TREE, low, high).unwrap();
    assert_eq!(found.map(|(position, _)| position), Some(low));
    seam::between_leaves(moves(high, low));
    let found = transactions.read().previous(TREE, high, low).unwrap();
    assert_eq!(found.map(|(position, _)| position), Some(high));
}

#[test]
fn a_neighbours_change_in_the_same_leaf_is_no_conflict() {
    let transactions = transactions();
    let mut runs = 0;
    transactions
        .run(CommitOptions::default(), |transaction| {
            runs += 1;
            transaction.get(TREE, at(10))?;
            if runs == 1 {
                transactions.run(CommitOptions::default(), |other| {
                    other.put(TREE, at(11), vec![1]);
                    Ok(())
                })?;
            }
            transaction.put(TREE, at(12), vec![2]);
            Ok(())
        })
        .unwrap();
    assert_eq!(runs, 1);
}

#[test]
fn nothing_changed_is_no_record() {
    let transactions = transactions();
    let before = transactions.journal().newest();
    let committed = transactions.run(CommitOptions::default(), |transaction| transaction.get(TREE, at(1))).unwrap();
    assert_eq!(committed.sequence, JournalSequence(0));
    assert_eq!(transactions.journal().newest(), before);
}

#[test]
fn hooks_run_once_after_the_commit_that_counts() {
    let transactions = transactions();
    let ran = std::rc::Rc::new(std::cell::Cell::new(0));
    let mut runs = 0;
    transactions
        .run(CommitOptions::default(), |transaction| {
            runs += 1;
            let ran = std::rc::Rc::clone(&ran);
            transaction.on_commit(move |_| ran.set(ran.get() + 1));
            transaction.put(TREE, at(1), vec![runs]);
            if runs < 3 { Err(Error::Restart) } else { Ok(()) }
        })
        .unwrap();
    assert_eq!((runs, ran.get()), (3, 1));
    assert_eq!(transactions.read().get(TREE, at(1)).unwrap().as_deref(), Some([3].as_slice()));
}

#[derive(Clone, Debug)]
enum Step {
    Put(u64, u8),
    Delete(u64),
    Get(u64),
    Range(u64, u64, usize),
    Previous(u64, u64),
    Commit,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let key = 0..40_u64;
    let step = prop_oneof![
        4 => (key.clone(), any::<u8>()).prop_map(|(key, value)| Step::Put(key, value)),
        2 => key.clone().prop_map(Step::Delete),
        2 => key.clone().prop_map(Step::Get),
        2 => (key.clone(), key.clone(), 1..6_usize).prop_map(|(from, to, limit)| Step::Range(from, to, limit)),
        1 => (key.clone(), key).prop_map(|(from, to)| Step::Previous(from, to)),
        1 => Just(Step::Commit),
    ];
    prop::collection::vec(step, 1..60)
}

fn check_step(
    transaction: &mut Transaction<'_>,
    model: &mut BTreeMap<u64, u8>,
    step: &Step,
) -> Result<(), TestCaseError> {
    match *step {
        Step::Put(key, value) => {
            transaction.put(TREE, at(key), vec![value]);
            model.insert(key, value);
        }
        Step::Delete(key) => {
            transaction.delete(TREE, at(key));
            model.remove(&key);
        }
        Step::Get(key) => {
            let found = transaction.get(TREE, at(key)).unwrap();
            prop_assert_eq!(found.as_deref(), model.get(&key).map(std::slice::from_ref));
        }
        Step::Range(from, to, limit) => {
            let found = transaction.range(TREE, at(from), at(to), limit).unwrap();
            let found: Vec<_> = found.iter().map(|(position, value)| (position.inode, value[0])).collect();
            let expected: Vec<_> = if from <= to {
                model.range(from..=to).take(limit).map(|(key, value)| (*key, *value)).collect()
            } else {
                Vec::new()
            };
            prop_assert_eq!(found, expected);
        }
        Step::Previous(from, to) => {
            let found = transaction.previous(TREE, at(from), at(to)).unwrap().map(|(position, _)| position.inode);
            let expected = if to <= from { model.range(to..=from).next_back().map(|(key, _)| *key) } else { None };
            prop_assert_eq!(found, expected);
        }
        Step::Commit => {}
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// A transaction sees its own updates over what is stored, in every kind of read.
    #[test]
    fn the_overlay_equals_a_map(steps in steps()) {
        let transactions = transactions();
        let mut model = BTreeMap::new();
        for batch in steps.split(|step| matches!(step, Step::Commit)) {
            let mut outcome = Ok(());
            transactions
                .run(CommitOptions::default(), |transaction| {
                    outcome = batch.iter().try_for_each(|step| check_step(transaction, &mut model, step));
                    Ok(())
                })
                .unwrap();
            outcome?;
        }
        let stored = transactions.read().range(TREE, Position::MIN, Position::MAX, 1000).unwrap();
        let stored: BTreeMap<_, _> = stored.iter().map(|(position, value)| (position.inode, value[0])).collect();
        prop_assert_eq!(stored, model);
    }
}
