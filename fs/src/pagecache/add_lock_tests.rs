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

/// `RUSTFLAGS="--cfg loom" cargo test -p coppicefs --lib --release --target-dir target/loom`: every schedule of few threads with
/// few preemptions. `LOOM_MAX_PREEMPTIONS=n` for others; each more takes some ten times as long.
#[cfg(loom)]
mod model {
    use super::*;
    use loom::sync::atomic::{AtomicI64, Ordering};
    use loom::thread;

    fn model(preemptions_max: usize, f: impl Fn() + Send + Sync + 'static) {
        // Reads the environment.
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound.get_or_insert(preemptions_max);
        builder.check(f);
    }

    fn lock() -> Arc<AddLock> {
        Arc::new(AddLock::new(Env::real(), Arc::new(Metrics::default())))
    }

    /// Holds the lock while `body` runs.
    fn holding<R>(lock: &AddLock, side: Side, body: impl FnOnce() -> R) -> R {
        match side {
            Side::Add => {
                let _guard = lock.add(0..1).unwrap();
                body()
            }
            Side::Block => {
                let _guard = lock.block(0..1).unwrap();
                body()
            }
        }
    }

    fn visit(inside: &AtomicI64, side: Side) {
        let change = side.sign();
        let before = inside.fetch_add(change, Ordering::SeqCst);
        assert!(before * change >= 0, "adders and blockers met");
        inside.fetch_sub(change, Ordering::SeqCst);
    }

    /// Mutual exclusion, and no lost wake-up (loom reports a deadlock if anybody sleeps for ever): one thread for each side of `sides`,
    /// besides one that enters on the first again and again.
    fn exclusion_and_wake_up(sides: &'static [Side]) {
        model(if sides.len() > 2 { 2 } else { 3 }, move || {
            let lock = lock();
            let inside = Arc::new(AtomicI64::new(0));
            let spawn = |side: Side| {
                let (lock, inside) = (Arc::clone(&lock), Arc::clone(&inside));
                thread::spawn(move || holding(&lock, side, || visit(&inside, side)))
            };
            let threads: Vec<_> = sides.iter().copied().map(spawn).collect();
            for _ in 0..2 {
                holding(&lock, sides[0], || visit(&inside, sides[0]));
            }
            for thread in threads {
                thread.join().unwrap();
            }
            assert_eq!(lock.count(), 0);
        });
    }

    #[test]
    fn an_adder_and_a_blocker_exclude_each_other_and_wake_each_other() {
        exclusion_and_wake_up(&[Side::Add, Side::Block]);
    }

    #[test]
    fn two_blockers_share_and_exclude_an_adder() {
        exclusion_and_wake_up(&[Side::Block, Side::Add, Side::Block]);
    }

    #[test]
    fn two_adders_share_and_exclude_a_blocker() {
        exclusion_and_wake_up(&[Side::Add, Side::Block, Side::Add]);
    }

    /// One of `side` that comes back again and again, with one more beside it so that the count need never be 0, lets in who waits on
    /// the other: with the bound at 1, no more than one newcomer passes it. Without the bound loom finds the schedule in which the counter is exceeded.
    fn nobody_starves_past_the_bound(side: Side) {
        model(4, move || {
            let lock = lock();
            let has_entered = Arc::new(AtomicI64::new(0));
            let waiter = holding(&lock, side, || {
                let (other, has_entered) = (Arc::clone(&lock), Arc::clone(&has_entered));
                let waiter = thread::spawn(move || {
                    holding(&other, side.other(), || has_entered.store(1, Ordering::SeqCst));
                });
                let lock = Arc::clone(&lock);
                let newcomer = thread::spawn(move || {
                    let mut passed = 0;
                    for _ in 0..3 {
                        let is_waited_for = lock.state.lock().queues[side.other() as usize].waiting > 0;
                        let has_entered = match side {
                            Side::Add => lock.try_add(0..1).is_some(),
                            Side::Block => lock.try_block(0..1).is_some(),
                        };
                        passed += u32::from(is_waited_for && has_entered);
                    }
                    assert!(passed <= FAIRNESS_BOUND, "a waiter was passed {passed} times");
                });
                newcomer.join().unwrap();
                waiter
            });
            waiter.join().unwrap();
            assert_eq!(lock.count(), 0);
            assert_eq!(has_entered.load(Ordering::SeqCst), 1);
        });
    }

    #[test]
    fn a_blocker_does_not_starve_past_the_bound() {
        nobody_starves_past_the_bound(Side::Add);
    }

    #[test]
    fn an_adder_does_not_starve_past_the_bound() {
        nobody_starves_past_the_bound(Side::Block);
    }
}
