//! Real threads: many who reserve, append and flush; a checkpoint taker driven by pressure; the worker.

use std::sync::atomic::AtomicBool;
use std::sync::mpsc;

use super::*;

/// Every thread commits its own numbers in order, flushing some; checkpoints keep the ring (much smaller than what is written) going.
/// At the end all that was committed since the last boundary is in the log, in order for each thread, and the boundary's totals are exactly those of
/// the commits below it.
#[test]
fn many_threads_share_flushes_and_a_small_ring() {
    const THREADS: u64 = 6;
    const COMMITS: u64 = 300;
    let device = std::sync::Arc::new(MemDevice::new(9 * u64::from(BUCKET_BYTES)));
    let config = two_copies(device, 4);
    let env = Env::real();
    let metrics = std::sync::Arc::new(Metrics::default());
    let journal = Journal::open(config.clone(), JournalStart::fresh(), env.clone(), metrics.clone()).unwrap();
    let worker = journal.workers().remove(0);
    let is_stopping = AtomicBool::new(false);
    let (ask, asked) = mpsc::sync_channel::<()>(1);
    let wish = ask.clone();
    journal.set_pressure_hook(Box::new(move || {
        let _ = wish.try_send(());
    }));
    let committed = Mutex::new(Vec::new());
    let is_done = AtomicBool::new(false);

    let last = std::thread::scope(|scope| {
        scope.spawn(|| {
            loop {
                let seen = worker.event().generation();
                if is_stopping.load(Ordering::Acquire) {
                    return;
                }
                if let Progress::Idle(timeout) = worker.step(8).unwrap() {
                    worker.event().wait_past(seen, timeout);
                }
            }
        });
        let (journal_of_checkpointer, is_done_for_all) = (journal.clone(), &is_done);
        let checkpointer = scope.spawn(move || {
            let (journal, is_done) = (journal_of_checkpointer, is_done_for_all);
            let mut kept = vec![first_checkpoint()];
            while asked.recv().is_ok() && !is_done.load(Ordering::Acquire) {
                let boundary = journal.boundary().unwrap();
                journal.flush(journal.newest()).unwrap();
                kept.push(checkpoint(&boundary, 1));
                if kept.len() > 2 {
                    kept.remove(0);
                }
                release(&journal, &kept[0]);
            }
            kept.pop().unwrap()
        });
        let committers: Vec<_> = (0..THREADS)
            .map(|thread| {
                let (journal, committed) = (&journal, &committed);
                scope.spawn(move || {
                    for index in 0..COMMITS {
                        let number = thread * 10_000 + index;
                        let sequence = commit(journal, number, (number % 7 * 200) as usize);
                        committed.lock().push((sequence, number));
                        if index % 5 == thread % 5 {
                            journal.flush(sequence).unwrap();
                            assert!(journal.flushed() >= sequence);
                        }
                        if index % 50 == 0 {
                            drop(journal.try_reserve(100, JournalWatermark::Normal));
                        }
                    }
                })
            })
            .collect();
        for committer in committers {
            committer.join().unwrap();
        }
        is_done.store(true, Ordering::Release);
        let _ = ask.try_send(());
        let last = checkpointer.join().unwrap();
        journal.close().unwrap();
        is_stopping.store(true, Ordering::Release);
        worker.event().notify();
        last
    });

    let committed = committed.into_inner();
    let inodes = |from: &Checkpoint| Totals::from_stored(&from.totals).unwrap().get(AccountingCounter::Inodes);
    let below = committed.iter().filter(|(sequence, _)| sequence.0 < last.first_replay).count();
    assert_eq!(inodes(&last), below as i64);
    let log = read_log(&config, &last).unwrap();
    let mut read = log_numbers(&log);
    for thread in 0..THREADS {
        assert!(read.iter().filter(|&&number| number / 10_000 == thread).is_sorted());
    }
    let mut expected: Vec<u64> =
        committed.iter().filter(|(sequence, _)| sequence.0 >= last.first_replay).map(|&(_, number)| number).collect();
    read.sort_unstable();
    expected.sort_unstable();
    assert_eq!(read, expected);
    assert_eq!(log.totals(&last).unwrap(), journal.totals());
    assert_eq!(journal.totals().get(AccountingCounter::Inodes), (THREADS * COMMITS) as i64);
    assert!(metrics.journal_flushes.get() <= THREADS * COMMITS / 5 + 200);
}
