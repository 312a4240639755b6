//! The add lock: exclusion, fairness, re-entry; its loom models.

use super::*;

#[cfg(not(loom))]
mod real {
    use super::*;
    use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

    fn lock() -> Arc<AddLock> {
        Arc::new(AddLock::new(Env::real(), Arc::new(Metrics::default())))
    }

    #[test]
    fn each_state_shares_within_itself_and_excludes_the_other() {
        let lock = lock();
        let other_thread = |f: &(dyn Fn() -> bool + Sync)| std::thread::scope(|scope| scope.spawn(f).join().unwrap());
        let adding = lock.add(0..10).unwrap();
        assert_eq!(lock.count(), -1);
        assert!(other_thread(&|| lock.try_add(0..1).is_some()));
        assert!(other_thread(&|| lock.try_block(0..1).is_none()));
        assert!(adding.covers(&lock, &(2..10)) && !adding.covers(&lock, &(2..11)));
        drop(adding);
        let blocking = lock.block(0..10).unwrap();
        assert_eq!(lock.count(), 1);
        assert!(lock.is_blocked());
        assert!(other_thread(&|| lock.try_block(0..1).is_some()));
        assert!(other_thread(&|| lock.try_add(0..1).is_none()));
        drop(blocking);
        assert_eq!(lock.count(), 0);
    }

    #[test]
    #[cfg(debug_assertions)]
    #[should_panic(expected = "pass the guard down")]
    fn re_entry_panics_in_debug_builds() {
        let lock = lock();
        let _first = lock.add(0..1).unwrap();
        let _second = lock.add(0..1).unwrap();
    }

    #[test]
    #[cfg(debug_assertions)]
    #[should_panic(expected = "lock order")]
    fn waiting_for_it_with_a_folio_locked_panics_in_debug_builds() {
        let lock = lock();
        let _folio = order::hold(&LockClass::folio(1, 0), 1);
        let _ = lock.try_block(0..1);
    }

    #[test]
    fn a_waiter_is_passed_at_most_bound_times() {
        let lock = lock();
        let first = lock.add(0..1).unwrap();
        std::thread::scope(|scope| {
            let blocker = scope.spawn(|| drop(lock.block(0..1).unwrap()));
            while lock.state.lock().queues[Side::Block as usize].waiting == 0 {
                std::thread::yield_now();
            }
            let mut passed = 0;
            // Each newcomer is a thread of its own, since re-entry is forbidden.
            while std::thread::scope(|scope| scope.spawn(|| lock.try_add(0..1).is_some()).join().unwrap()) {
                passed += 1;
                assert!(passed <= FAIRNESS_BOUND);
            }
            assert_eq!(passed, FAIRNESS_BOUND);
            drop(first);
            blocker.join().unwrap();
        });
        assert_eq!(lock.count(), 0);
    }

    #[test]
    fn the_two_states_never_meet_under_load() {
        let lock = lock();
        let inside = AtomicI64::new(0);
        let entries = [AtomicU64::new(0), AtomicU64::new(0)];
        std::thread::scope(|scope| {
            for number in 0..6_usize {
                let (lock, inside, entries) = (&lock, &inside, &entries);
                scope.spawn(move || {
                    for _ in 0..400 {
                        let add = number % 2 == 0;
                        let guards = if add {
                            (Some(lock.add(0..1).unwrap()), None)
                        } else {
                            (None, Some(lock.block(0..1).unwrap()))
                        };
                        let change = if add { -1 } else { 1 };
                        let before = inside.fetch_add(change, Ordering::SeqCst);
                        assert!(before * change >= 0, "adders and blockers met");
                        std::thread::yield_now();
                        inside.fetch_sub(change, Ordering::SeqCst);
                        entries[number % 2].fetch_add(1, Ordering::Relaxed);
                        drop(guards);
                    }
                });
            }
        });
        assert_eq!(lock.count(), 0);
        assert!(entries.iter().all(|count| count.load(Ordering::Relaxed) == 1200));
    }
}

/// `RUSTFLAGS="--cfg loom" cargo test -p coppicefs --lib --release pagecache::add_lock`
#[cfg(loom)]
mod model {
    use super::*;
    use loom::sync::atomic::{AtomicI64, Ordering};
    use loom::thread;

    fn model(f: impl Fn() + Send + Sync + 'static) {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(3);
        builder.check(f);
    }

    fn lock() -> Arc<AddLock> {
        Arc::new(AddLock::new(Env::real(), Arc::new(Metrics::default())))
    }

    fn enter(lock: &AddLock, inside: &AtomicI64, side: Side) {
        let change = side.sign();
        let visit = || {
            let before = inside.fetch_add(change, Ordering::SeqCst);
            assert!(before * change >= 0, "adders and blockers met");
            inside.fetch_sub(change, Ordering::SeqCst);
        };
        match side {
            Side::Add => {
                let _guard = lock.add(0..1).unwrap();
                visit();
            }
            Side::Block => {
                let _guard = lock.block(0..1).unwrap();
                visit();
            }
        }
    }

    /// Mutual exclusion, and no lost wake-up (loom reports a deadlock if anybody sleeps for ever).
    #[test]
    fn exclusion_and_wake_up() {
        model(|| {
            let lock = lock();
            let inside = Arc::new(AtomicI64::new(0));
            let threads: Vec<_> = [Side::Add, Side::Block]
                .into_iter()
                .map(|side| {
                    let (lock, inside) = (Arc::clone(&lock), Arc::clone(&inside));
                    thread::spawn(move || enter(&lock, &inside, side))
                })
                .collect();
            enter(&lock, &inside, Side::Add);
            for thread in threads {
                thread.join().unwrap();
            }
            assert_eq!(lock.count(), 0);
        });
    }

    /// An adder that comes back again and again (with one more beside it, so that the count need never be 0) lets a blocker in:
    /// with the bound at 1, no more than one newcomer passes it. Without the bound loom finds the schedule in which the counter is exceeded.
    #[test]
    fn nobody_starves_past_the_bound() {
        model(|| {
            let lock = lock();
            let first = lock.add(0..1).unwrap();
            let blocked = Arc::new(AtomicI64::new(0));
            let blocker = {
                let (lock, blocked) = (Arc::clone(&lock), Arc::clone(&blocked));
                thread::spawn(move || {
                    let _guard = lock.block(0..1).unwrap();
                    blocked.store(1, Ordering::SeqCst);
                })
            };
            let adder = {
                let lock = Arc::clone(&lock);
                thread::spawn(move || {
                    let mut passed = 0;
                    for _ in 0..2 {
                        let waiting = lock.state.lock().queues[Side::Block as usize].waiting > 0;
                        if let Some(guard) = lock.try_add(0..1) {
                            passed += u32::from(waiting);
                            drop(guard);
                        }
                    }
                    assert!(passed <= FAIRNESS_BOUND, "a waiter was passed {passed} times");
                })
            };
            adder.join().unwrap();
            drop(first);
            blocker.join().unwrap();
            assert_eq!(lock.count(), 0);
            assert_eq!(blocked.load(Ordering::SeqCst), 1);
        });
    }
}
