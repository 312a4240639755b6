//! Filling, overwriting, emptying; reuse; node buckets.

use super::*;

fn blocks(fixture: &Fixture) -> u64 {
    fixture.space.usage().available_bytes / BLOCK_BYTES
}

#[test]
fn full_exactly_where_usage_says_and_all_of_it_comes_back() {
    let fixture = Fixture::simulated(1, TestSwitches::default());
    let before = fixture.space.usage();
    let promised = blocks(&fixture);
    assert!(promised > 4000, "{before:?}");
    let mut written = 0;
    let refused = loop {
        match fixture.write(written % 7 + 1, written) {
            Ok(()) => written += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(refused, Error::NoSpace(_)));
    assert_eq!(blocks(&fixture), 0, "refused although df offers something");
    // Each block is an extent of its own here, the worst there is: still most of what one large file could have.
    assert!(written * 100 >= promised * 80, "df called {promised} blocks available, {written} fitted");
    fixture.check();
    fixture.check_content();
    // Deleting needs no space, and what it frees can be written at once: freed but not yet reusable counts as free. But for what the splits of a
    // few nodes take, in both copies.
    for block in 0..100 {
        fixture.delete(block % 7 + 1, block).unwrap();
    }
    for block in 0..70 {
        fixture.write(9, block).unwrap();
    }
    fixture.check();
    for (position, _) in fixture.keys(BtreeId::Extents) {
        fixture.delete(position.inode, position.offset / BLOCK_BYTES - 1).unwrap();
    }
    fixture.settle();
    fixture.check();
    let after = fixture.space.usage();
    assert_eq!((after.data_bytes, after.reserved_bytes, after.data_buckets, after.need_discard_buckets), (0, 0, 0, 0));
    assert_eq!(after.free_buckets, before.free_buckets);
    // No checkpoint has merged the nodes yet.
    assert_eq!(after.free_bytes + after.node_bytes, before.free_bytes + before.node_bytes);
    assert_eq!(fixture.early.load(Ordering::SeqCst), 0);
}

/// Overwrites random blocks at a high fill, several times the size.
fn overwrite(fixture: &Arc<Fixture>, fill_permille: u64, rounds: u64) {
    let total = blocks(fixture) * fill_permille / 1000;
    for block in 0..total {
        fixture.write(block % 5 + 1, block).unwrap();
    }
    for round in 0..rounds * total {
        if round % 500 == 0 {
            // There is no checkpoint here, and no crash: the ring just goes round.
            let boundary = fixture.journal.boundary().unwrap();
            fixture.journal.flush(fixture.journal.newest()).unwrap();
            fixture.journal.release_before(boundary.offset, boundary.first_replay);
        }
        let block = fixture.env.random_u64() % total;
        fixture.write(block % 5 + 1, block).unwrap();
    }
}

#[test]
fn overwriting_many_times_the_size_never_runs_out() {
    for seed in 1..=2 {
        let fixture = Fixture::simulated(seed, TestSwitches::default());
        overwrite(&fixture, 800, 3);
        fixture.check();
        fixture.check_content();
        assert_eq!(fixture.early.load(Ordering::SeqCst), 0);
        let size = fixture.space.reserves().usable_buckets;
        assert!(fixture.space.metrics.buckets_opened.get() > 2 * size, "buckets are reused");
    }
}

/// The same with checkpoints that claim node buckets, on a filesystem that is filled up in the middle.
#[test]
fn checkpoints_get_their_buckets_on_a_full_filesystem() {
    let fixture = Fixture::checkpointed(7);
    let promised = blocks(&fixture);
    let mut written = 0;
    let refused = loop {
        match fixture.write(written % 5 + 1, written) {
            Ok(()) => written += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(refused, Error::NoSpace(_)), "{refused}");
    assert!(written * 100 >= promised * 80, "df called {promised} blocks available, {written} fitted");
    // Overwriting on the full filesystem: refused or done, never stuck.
    let mut done = 0;
    for _ in 0..1500 {
        let block = fixture.env.random_u64() % written;
        match fixture.write(block % 5 + 1, block) {
            Ok(()) => done += 1,
            Err(Error::NoSpace(_)) => fixture.delete(block % 5 + 1, block).unwrap(),
            Err(error) => panic!("{error}"),
        }
    }
    assert!(done > 500, "{done} of 1500");
    fixture.check();
    fixture.check_content();
    let mut deleted = 0;
    for (position, _) in fixture.keys(BtreeId::Extents) {
        fixture.delete(position.inode, position.offset / BLOCK_BYTES - 1).unwrap();
        deleted += 1;
    }
    assert!(deleted > 1000);
    fixture.settle();
    fixture.check();
    let usage = fixture.space.usage();
    assert_eq!((usage.data_bytes, usage.data_buckets, usage.reserved_bytes), (0, 0, 0));
    assert!(blocks(&fixture) > promised * 8 / 10, "{usage:?}");
    assert_eq!(fixture.early.load(Ordering::SeqCst), 0);
}

#[test]
fn reuse_too_early_is_seen() {
    let fixture = Fixture::simulated(3, TestSwitches { reuse_too_early: true, ..TestSwitches::default() });
    for round in 0..1000 {
        fixture.write(1, round % 40).unwrap();
    }
    assert!(fixture.early.load(Ordering::SeqCst) > 0, "the check above can fail");
}

#[test]
fn a_bucket_that_empties_while_open_goes_on_in_its_next_generation() {
    let fixture = Fixture::new(Env::real(), TestSwitches::default());
    fixture.write(1, 0).unwrap();
    let waiting = fixture.allocate(WritePoint::User(1), BLOCK, Watermark::Normal).unwrap();
    let key = (waiting.device, waiting.bucket);
    assert_eq!(fixture.space.bucket(key).unwrap().generation, 0);
    let position = Position::new(2, BLOCK_BYTES, SnapshotId::ROOT.0);
    let mut runs = 0;
    fixture
        .transactions
        .run(CommitOptions::data(), |transaction| {
            runs += 1;
            let made = pointer(transaction, &waiting, 0);
            if runs == 1 {
                // Another transaction empties the bucket after the pointer was made.
                fixture.delete(1, 0).unwrap();
                assert_eq!(fixture.space.bucket(key).unwrap().state, BucketState::NeedDiscard);
                assert!(!fixture.space.allocator.close_empty(), "it is open, and written to");
            }
            transaction.put(BtreeId::Extents, position, raw(BLOCK, made, 7).encode());
            Ok(())
        })
        .unwrap();
    assert_eq!(runs, 2);
    let bucket = fixture.space.bucket(key).unwrap();
    assert_eq!(bucket, Bucket { state: BucketState::Data, generation: 1, charged_bytes: BLOCK_BYTES });
    fixture.check();
    drop(waiting);

    // Who makes pointers outside of the body is told, not left to run for ever.
    let waiting = fixture.allocate(WritePoint::User(1), BLOCK, Watermark::Normal).unwrap();
    let mut value = raw(BLOCK, pointer(&fixture.transactions.read(), &waiting, 0), 8);
    fixture.delete(2, 0).unwrap();
    let put = |value: &ExtentValue| {
        fixture.transactions.run(CommitOptions::data(), |transaction| {
            transaction.put(BtreeId::Extents, position, value.encode());
            Ok(())
        })
    };
    assert!(matches!(put(&value), Err(Error::Corrupt(_))));
    stamp(&fixture.transactions.read(), &waiting, &mut value);
    put(&value).unwrap();
    fixture.check();

    // A pointer into a bucket that is not open has nothing to wait for.
    let closed = ExtentPointer { device: DeviceIndex(0), generation: 3, offset: 800 * (64 << 10) };
    assert!(matches!(put(&raw(BLOCK, closed, 9)), Err(Error::Corrupt(_))));
}

#[test]
fn pointers_of_two_generations_never_meet_in_one_transaction() {
    let fixture = Fixture::new(Env::real(), TestSwitches::default());
    fixture.write(1, 0).unwrap();
    let waiting: Vec<_> =
        (0..2).map(|_| fixture.allocate(WritePoint::User(1), BLOCK, Watermark::Normal).unwrap()).collect();
    let key = (waiting[0].device, waiting[0].bucket);
    for in_order in [true, false] {
        let mut runs = 0;
        fixture
            .transactions
            .run(CommitOptions::data(), |transaction| {
                runs += 1;
                let mut pointers = vec![pointer(transaction, &waiting[0], 0)];
                if runs == 1 {
                    // Another transaction empties the bucket between the two.
                    fixture.delete(if in_order { 1 } else { 2 }, 0).unwrap();
                    if !in_order {
                        fixture.delete(3, 0).unwrap();
                    }
                }
                pointers.push(pointer(transaction, &waiting[1], 0));
                for (inode, pointer) in (2..).zip(pointers) {
                    // In the order of the keys, the younger generation is staged first or last.
                    let inode = if in_order { inode } else { 5 - inode };
                    let position = Position::new(inode, BLOCK_BYTES, SnapshotId::ROOT.0);
                    transaction.put(BtreeId::Extents, position, raw(BLOCK, pointer, 7).encode());
                }
                Ok(())
            })
            .unwrap();
        assert_eq!(runs, 2);
        let bucket = fixture.space.bucket(key).unwrap();
        assert_eq!(bucket.charged_bytes, 2 * BLOCK_BYTES);
        fixture.check();
    }
}

#[test]
fn node_buckets_lie_in_both_halves_and_come_back() {
    let fixture = Fixture::simulated(4, TestSwitches::default());
    let half = fixture.superblock.members[0].bucket_count / 2;
    fixture.write(1, 0).unwrap();
    let claimed = fixture.space.claim_node_buckets(10).unwrap();
    for (index, bucket) in claimed.iter().enumerate() {
        assert_eq!(bucket.half, if index % 2 == 0 { Half::Low } else { Half::High });
        assert_eq!(bucket.bucket.0 < half, bucket.half == Half::Low);
        assert_eq!(fixture.space.bucket((bucket.device, bucket.bucket)).unwrap().state, BucketState::Metadata);
    }
    assert_eq!(claimed.iter().map(|bucket| bucket.bucket).collect::<BTreeSet<_>>().len(), 10);
    assert_eq!(fixture.space.usage().metadata_buckets, 10);
    fixture.check();
    let released: Vec<_> = claimed[..6].iter().map(|bucket| (bucket.device, bucket.bucket)).collect();
    fixture.space.release_node_buckets(&released).unwrap();
    let foreign = (DeviceIndex(0), BucketIndex(half + 300));
    assert!(matches!(fixture.space.release_node_buckets(&[foreign]), Err(Error::Bug(_))));
    fixture.check();
    fixture.settle();
    assert_eq!(fixture.space.usage().metadata_buckets, 4);
    fixture.check();
    // All of the device can be claimed and none of it twice; then the error is clean.
    let mut all: Vec<NodeBucket> = claimed[6..].to_vec();
    loop {
        match fixture.space.claim_node_buckets(2) {
            Ok(more) => all.extend(more),
            Err(error) => {
                assert!(matches!(error, Error::NoSpace(_)));
                break;
            }
        }
    }
    let distinct: BTreeSet<_> = all.iter().map(|bucket| bucket.bucket).collect();
    assert_eq!(distinct.len(), all.len());
    assert!(all.len() as u64 + 2 >= fixture.space.reserves().usable_buckets, "{} claimed", all.len());
    fixture.settle();
    fixture.check();
}

#[test]
fn surplus_buckets_are_given_back_to_the_host() {
    let fixture = Fixture::simulated(5, TestSwitches::default());
    let total = blocks(&fixture) / 2;
    for block in 0..total {
        fixture.write(1, block).unwrap();
    }
    for block in 0..total {
        fixture.delete(1, block).unwrap();
    }
    fixture.settle();
    let keep = (fixture.space.reserves().usable_buckets / 16).max(64);
    fixture.env.wait(&Event::new(), || (fixture.space.allocator.undiscarded() <= keep).then_some(())).unwrap();
    assert!(fixture.space.metrics.buckets_discarded.get() > 10);
    fixture.check();
    let undiscarded = fixture.keys(BtreeId::FreeSpace).iter().filter(|(_, value)| value == &[0]).count() as u64;
    assert!(undiscarded <= keep + 1 && undiscarded + 20 > keep, "{undiscarded} of {keep} are kept");
    for block in 0..total {
        fixture.write(2, block).unwrap();
    }
    fixture.check();
    fixture.check_content();
}

#[test]
fn threads_share_the_space() {
    let fixture = Fixture::new(Env::real(), TestSwitches::default());
    let workers: Vec<_> = fixture.journal.workers().into_iter().chain(fixture.space.workers()).collect();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for worker in &workers {
            scope.spawn(|| {
                while !stop.load(Ordering::SeqCst) {
                    let seen = worker.event().generation();
                    if worker.step(16).unwrap() != Progress::Worked {
                        worker.event().wait_past(seen, Some(std::time::Duration::from_millis(2)));
                    }
                }
            });
        }
        let writers: Vec<_> = (1..=4_u64)
            .map(|inode| {
                let fixture = &fixture;
                scope.spawn(move || {
                    for round in 0..400 {
                        fixture.write(inode, round % 20).unwrap();
                        if round % 3 == 0 {
                            fixture.delete(inode, (round * 7) % 20).unwrap();
                        }
                        if round % 50 == 49 {
                            for block in 0..20 {
                                fixture.delete(inode, block).unwrap();
                            }
                        }
                    }
                })
            })
            .collect();
        for writer in writers {
            writer.join().unwrap();
        }
        stop.store(true, Ordering::SeqCst);
    });
    fixture.check();
    fixture.check_content();
}
