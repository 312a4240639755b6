//! That explorations find what they are for.

use shuttle::scheduler::RandomScheduler;
use shuttle::thread;
use std::panic::catch_unwind;

use super::atomic::{AtomicBool, AtomicU64, Ordering};
use super::schedule::explore;
use super::{Arc, Condvar, Mutex, RwLock};

const SCHEDULES: usize = 200;

/// Whether any of a few schedules of `body` fails.
fn is_caught(body: impl Fn() + Send + Sync + std::panic::UnwindSafe + 'static) -> bool {
    catch_unwind(|| explore(RandomScheduler::new_from_seed(7, SCHEDULES), body)).is_err()
}

/// Two tasks that do the same.
fn twice(body: impl Fn() + Send + Sync + 'static) {
    let body = Arc::new(body);
    let other = Arc::clone(&body);
    let task = thread::spawn(move || other());
    body();
    task.join().unwrap();
}

#[test]
fn a_lost_update_is_found_and_a_lock_prevents_it() {
    assert!(is_caught(|| {
        let count = Arc::new(AtomicU64::new(0));
        let seen = Arc::clone(&count);
        twice(move || count.store(count.load(Ordering::SeqCst) + 1, Ordering::SeqCst));
        assert_eq!(seen.load(Ordering::SeqCst), 2);
    }));
    assert!(!is_caught(|| {
        let count = Arc::new((Mutex::new(()), AtomicU64::new(0)));
        let seen = Arc::clone(&count);
        twice(move || {
            let _alone = count.0.lock();
            count.1.store(count.1.load(Ordering::SeqCst) + 1, Ordering::SeqCst);
        });
        assert_eq!(seen.1.load(Ordering::SeqCst), 2);
    }));
}

#[test]
fn readers_share_and_a_writer_is_alone() {
    assert!(!is_caught(|| {
        let lock = Arc::new(RwLock::new((0, 0)));
        let writer = Arc::clone(&lock);
        let task = thread::spawn(move || {
            let mut value = writer.write();
            value.0 += 1;
            thread::yield_now();
            value.1 += 1;
        });
        twice(move || {
            let value = lock.read();
            assert_eq!(value.0, value.1);
        });
        task.join().unwrap();
    }));
}

/// A flag under a lock, and who waits for it.
fn handshake(notifies: bool, looks_under_the_lock: bool) {
    let shared = Arc::new((Mutex::new(false), Condvar::new(), AtomicBool::new(false)));
    let waiter = Arc::clone(&shared);
    let task = thread::spawn(move || {
        let (mutex, changed, flag) = &*waiter;
        if looks_under_the_lock {
            let mut is_set = mutex.lock();
            while !*is_set {
                changed.wait(&mut is_set);
            }
        } else if !flag.load(Ordering::SeqCst) {
            // What is set here is not seen, and its notification is lost.
            changed.wait(&mut mutex.lock());
        }
    });
    let (mutex, changed, flag) = &*shared;
    *mutex.lock() = true;
    flag.store(true, Ordering::SeqCst);
    if notifies {
        changed.notify_all();
    }
    task.join().unwrap();
}

#[test]
fn a_lost_wake_up_is_found() {
    assert!(!is_caught(|| handshake(true, true)));
    assert!(is_caught(|| handshake(true, false)));
    assert!(is_caught(|| handshake(false, true)));
}

#[test]
fn all_who_wait_for_each_other_are_found() {
    assert!(is_caught(|| {
        let locks = Arc::new([Mutex::new(()), Mutex::new(())]);
        let other = Arc::clone(&locks);
        let task = thread::spawn(move || {
            let _first = other[0].lock();
            drop(other[1].lock());
        });
        let _second = locks[1].lock();
        drop(locks[0].lock());
        task.join().unwrap();
    }));
}

#[test]
fn a_wait_with_a_limit_ends() {
    assert!(!is_caught(|| {
        let shared = Arc::new((Mutex::new(()), Condvar::new()));
        twice(move || {
            let mut guard = shared.0.lock();
            assert!(shared.1.wait_for(&mut guard, std::time::Duration::from_secs(3600)).timed_out());
        });
    }));
}
