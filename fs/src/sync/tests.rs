//! The facade and the order of locks. What is checked exists in debug builds only.

use super::*;

#[test]
fn acquisitions_are_counted_per_thread() {
    let before = lock_count();
    let mutex = Mutex::new(0);
    *mutex.lock() += 1;
    let lock = RwLock::new(0);
    let _ = *lock.read();
    *lock.write() += 1;
    assert_eq!(lock_count() - before, 3);
}

#[test]
#[cfg(not(debug_assertions))]
fn ranks_cost_nothing_in_release_builds() {
    assert_eq!(size_of::<LockClass>(), 0);
    assert_eq!(size_of::<order::Held>(), 0);
    assert_eq!(size_of::<Mutex<u64>>(), size_of::<parking_lot::Mutex<u64>>());
    assert_eq!(size_of::<MutexGuard<'_, u64>>(), size_of::<parking_lot::MutexGuard<'_, u64>>());
    assert!(!std::mem::needs_drop::<order::Held>());
}

#[cfg(debug_assertions)]
mod ranks {
    use super::*;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    const ALL: [Rank; 14] = [
        Rank::Lifecycle,
        Rank::Inode,
        Rank::Block,
        Rank::Add,
        Rank::Folio,
        Rank::Structure,
        Rank::RootSlot,
        Rank::Node,
        Rank::JournalChain,
        Rank::JournalState,
        Rank::OuterLeaf,
        Rank::Leaf,
        Rank::InnerLeaf,
        Rank::Event,
    ];

    fn mutex(class: LockClass) -> Mutex<()> {
        Mutex::ranked(class, ())
    }

    /// What the body is reported for.
    fn report_of(body: impl FnOnce()) -> Option<String> {
        let panic = catch_unwind(AssertUnwindSafe(body)).err()?;
        Some(panic.downcast_ref::<String>().cloned().unwrap_or_else(|| "not a report".into()))
    }

    #[test]
    fn every_pair_of_ranks_has_one_legal_order() {
        for first in ALL {
            for second in ALL {
                let (outer, inner) = (mutex(LockClass::new(first)), mutex(LockClass::new(second)));
                let report = report_of(|| {
                    let _outer = outer.lock();
                    let _inner = inner.lock();
                });
                let is_legal = first.place() < second.place();
                assert_eq!(report.is_none(), is_legal, "{first} then {second}: {report:?}");
                if let Some(report) = report {
                    assert!(report.contains("lock order"), "{report}");
                    assert!(report.contains(&format!("the order here    {first} -> {second}")), "{report}");
                }
                // Nothing stays behind, also after a panic.
                drop(mutex(LockClass::new(Rank::Lifecycle)).lock());
            }
        }
    }

    #[test]
    fn a_report_names_both_orders_and_both_places() {
        let (node, inode) = (mutex(LockClass::node(1, 3, (4, 5, 6))), mutex(LockClass::inode(12)));
        let (held_line, wanted_line) = (line!() + 2, line!() + 3);
        let report = report_of(|| {
            let _node = node.lock();
            let _inode = inode.lock();
        })
        .unwrap();
        for part in [
            "wants inode 12 (rank inode) at ",
            "holds      node of tree 3, level 1, from 4:5:6 (rank node) since ",
            &format!("tests.rs:{held_line}:"),
            &format!("tests.rs:{wanted_line}:"),
            "the order here    node -> inode",
            "the rule          lifecycle -> inode (by number) -> add or block -> folio",
        ] {
            assert!(report.contains(part), "{part:?} is not in: {report}");
        }
    }

    #[test]
    fn equal_ranks_follow_their_keys() {
        let legal = |first: LockClass, second: LockClass| {
            let (outer, inner) = (mutex(first), mutex(second));
            report_of(|| {
                let _outer = outer.lock();
                let _inner = inner.lock();
            })
            .is_none()
        };
        assert!(legal(LockClass::inode(3), LockClass::inode(4)));
        assert!(!legal(LockClass::inode(4), LockClass::inode(3)));
        assert!(!legal(LockClass::inode(3), LockClass::inode(3)), "equal inodes are locked once");
        assert!(legal(LockClass::folio(1, 0), LockClass::folio(1, 16)));
        assert!(!legal(LockClass::folio(1, 16), LockClass::folio(1, 0)));
        assert!(!legal(LockClass::folio(1, 0), LockClass::folio(2, 16)), "no order between two files");
        let leaf = |tree, offset| LockClass::node(0, tree, (7, offset, 0));
        assert!(legal(leaf(1, 9), leaf(2, 0)));
        assert!(legal(leaf(1, 0), leaf(1, 9)));
        assert!(!legal(leaf(1, 9), leaf(1, 0)));
        assert!(!legal(leaf(2, 0), leaf(1, 9)));
        let parent = LockClass::node(1, 2, (9, 9, 0));
        assert!(legal(parent, leaf(1, 0)), "a parent precedes all below");
        assert!(!legal(leaf(1, 0), parent));
    }

    #[test]
    fn the_whole_order_is_legal() {
        let locks: Vec<_> =
            ALL.iter().filter(|&&rank| rank != Rank::Add).map(|&rank| mutex(LockClass::new(rank))).collect();
        let guards: Vec<_> = locks.iter().map(Mutex::lock).collect();
        // Released in any order.
        for guard in guards {
            drop(guard);
        }
    }

    #[test]
    fn the_same_lock_twice_is_reported_before_it_hangs() {
        let lock = RwLock::ranked(LockClass::inode(1), ());
        let report = report_of(|| {
            let _first = lock.read();
            let _second = lock.read();
        });
        assert!(report.unwrap().contains("holds already since"));
        let shared = SharedRwLock::ranked(LockClass::node(0, 0, (0, 0, 0)), ());
        let report = report_of(|| {
            let _first = shared.write_owned();
            let _second = shared.read();
        });
        assert!(report.unwrap().contains("pass the guard down"));
    }

    #[test]
    fn what_is_taken_without_waiting_is_legal_but_what_is_waited_for_under_it_is_not() {
        let (folio, inode) = (mutex(LockClass::folio(1, 1)), mutex(LockClass::inode(1)));
        let _folio = folio.lock();
        let tried = inode.try_lock();
        assert!(tried.is_some(), "a try form cannot deadlock");
        drop(tried);
        drop(_folio);
        let _folio = folio.try_lock();
        assert!(report_of(|| drop(inode.lock())).is_some());
        let shared = SharedRwLock::ranked(LockClass::new(Rank::Structure), ());
        shared.expect_order();
        let _leaf = mutex(LockClass::default());
        let _held = _leaf.lock();
        assert!(report_of(|| shared.expect_order()).is_some());
    }

    #[test]
    fn a_lock_that_was_handed_over_is_nobodys() {
        let (folio, inode) = (LockClass::folio(1, 1), mutex(LockClass::inode(1)));
        let mut held = order::hold(&folio, 1);
        assert!(report_of(|| drop(inode.lock())).is_some());
        held.hand_over();
        drop(inode.lock());
        std::thread::spawn(move || drop(held)).join().unwrap();
    }

    #[test]
    fn a_lock_that_is_released_by_another_thread_without_a_hand_over_is_reported() {
        let lock = mutex(LockClass::inode(1));
        std::thread::scope(|scope| {
            let guard = lock.lock();
            let report = scope.spawn(move || report_of(|| drop(guard))).join().unwrap();
            assert!(report.unwrap().contains("hand it over explicitly"));
            // It was released all the same.
            assert!(scope.spawn(|| lock.try_lock().is_some()).join().unwrap());
        });
    }

    #[test]
    fn a_simulated_worker_is_a_thread_of_its_own() {
        let (node, inode) = (mutex(LockClass::new(Rank::Node)), mutex(LockClass::inode(1)));
        let _node = node.lock();
        order::apart(|| drop(inode.lock()));
        assert!(report_of(|| order::apart(|| panic!("{}", "on purpose"))).is_some());
        assert!(report_of(|| drop(inode.lock())).is_some(), "the waiter's notes are back");
    }

    #[test]
    fn nothing_but_the_exempt_is_held_over_input_and_output() {
        for rank in ALL {
            let lock = mutex(LockClass::new(rank));
            let _guard = lock.lock();
            for (what, allowed) in [
                ("a device read", order::OVER_READ),
                ("a device write", order::OVER_WRITE),
                ("a wait", order::OVER_WAIT),
                ("a reply", RankSet::NONE),
            ] {
                let report = report_of(|| order::check_held(what, allowed));
                assert_eq!(report.is_none(), allowed.contains(rank), "{rank} over {what}");
                if let Some(report) = report {
                    assert!(report.contains(&format!("held over {what} at ")) && report.contains("since "), "{report}");
                }
            }
        }
    }
}
