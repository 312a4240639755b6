//! Single paths: what a hit costs, what a bad block costs, what reclaim keeps, how memory stays bounded.

use super::*;
use crate::sync::lock_count;

#[test]
fn a_warm_read_of_one_mebibyte_is_one_reference_and_no_lock() {
    let bench = Bench::new(1, CacheOptions::new(256 << 20));
    let file = bench.file_with(1, 16 << 20);
    for offset in (0..16 << 20).step_by(128 << 10) {
        file.read(offset, 128 << 10).unwrap();
    }
    for offset in (4 << 20..15 << 20).step_by(1 << 20) {
        let (locks, added) = (lock_count(), bench.metrics.pagecache_add_taken.get());
        let mut pages = PageBatch::new();
        let outcome = read_iter(&file.context(), offset, 1 << 20, &mut pages);
        assert_eq!(lock_count() - locks, 0, "a hit takes no lock");
        assert_eq!(outcome.bytes, 1 << 20);
        assert_eq!(pages.reference_count(), 1, "at {offset}");
        assert_eq!(pages.as_single().unwrap().len(), 1 << 20);
        drop(pages);
        assert_eq!(lock_count() - locks, 0, "nor does letting go");
        assert_eq!(bench.metrics.pagecache_add_taken.get(), added);
    }
}

#[test]
fn a_sequential_read_takes_few_batches() {
    let bench = Bench::new(1, CacheOptions::new(256 << 20));
    let file = bench.file_with(1, 64 << 20);
    for offset in (0..64 << 20).step_by(128 << 10) {
        assert_eq!(file.read(offset, 128 << 10).unwrap()[..8], pattern(1, offset / BLOCK)[..8]);
    }
    let batches = file.store.batches.lock().len();
    assert!(batches <= 64 / 4 + 8, "{batches} batches");
    assert_eq!(file.store.batches.lock().iter().flatten().map(|range| range.end - range.start).sum::<u64>(), 64 << 20);
}

#[test]
fn one_bad_block_costs_one_block() {
    let bench = Bench::new(1, CacheOptions::new(64 << 20));
    let file = bench.file_with(1, 1 << 20);
    file.store.bad.lock().insert(77);
    let mut bytes = vec![0; 1 << 20];
    let outcome = read_iter(&file.context(), 0, 1 << 20, &mut CopySink::new(&mut bytes));
    assert_eq!(outcome.bytes, 77 * BLOCK);
    assert!(outcome.error.unwrap().to_string().contains("block 77"));
    let batches = file.store.batches.lock().len();
    assert_eq!(file.read(78 * BLOCK, 100 * BLOCK).unwrap()[..8], pattern(1, 78)[..8]);
    assert_eq!(file.store.batches.lock().len(), batches, "the neighbours came with the first batch");
    file.store.bad.lock().clear();
    assert_eq!(file.read(76 * BLOCK, 3 * BLOCK).unwrap()[4096..4104], pattern(1, 77)[..8]);
}

#[test]
fn only_insert_takes_add_and_a_write_hit_does_not() {
    let bench = Bench::new(1, CacheOptions::new(64 << 20));
    let file = bench.file_with(1, 1 << 20);
    file.read(0, 1 << 20).unwrap();
    let added = bench.metrics.pagecache_add_taken.get();
    file.write(5000, &[1; 100_000]).unwrap();
    file.write(5000, &[2; 100_000]).unwrap();
    assert_eq!(bench.metrics.pagecache_add_taken.get(), added);
    file.write(2 << 20, &[3; 8192]).unwrap();
    assert!(bench.metrics.pagecache_add_taken.get() > added);
}

#[test]
fn a_write_under_a_reference_replaces_only_what_it_changes() {
    let bench = Bench::new(1, CacheOptions::new(64 << 20));
    let file = bench.file_with(1, 1 << 20);
    file.read(0, 1 << 20).unwrap();
    let pages = file.collect(0, 1 << 20).unwrap();
    let before = pages.to_vec();
    let used = bench.cache.used_bytes();
    file.write(10 * BLOCK + 7, &[9; 50]).unwrap();
    assert_eq!(bench.cache.used_bytes() - used, BLOCK, "one block of new memory");
    assert_eq!(pages.to_vec(), before, "what was collected does not change");
    let now = file.read(0, 1 << 20).unwrap();
    assert_eq!(now[10 * 4096 + 7..10 * 4096 + 57], [9; 50]);
    assert_eq!(now[..10 * 4096 + 7], before[..10 * 4096 + 7]);
    assert_eq!(now[10 * 4096 + 57..], before[10 * 4096 + 57..]);
    assert_eq!(file.store.batches.lock().iter().flatten().map(|range| range.end - range.start).sum::<u64>(), 1 << 20);
}

#[test]
fn a_scan_does_not_evict_a_hot_set_that_fits() {
    // Reads as long as parts of a folio, and such as begin and end inside of one: reading on there is not reading again.
    for piece in [128 << 10, 4096, 10_000, (1 << 20) - 16] {
        scan_beside_a_hot_set(piece);
    }
}

fn scan_beside_a_hot_set(piece: u64) {
    let budget = 32 << 20;
    let bench = Bench::new(1, CacheOptions::new(budget));
    let hot = bench.file_with(1, 16 << 20);
    for _ in 0..3 {
        for offset in (0..16 << 20).step_by(64 << 10) {
            hot.read(offset, 64 << 10).unwrap();
        }
    }
    let scanned = bench.file_with(2, 4 * budget);
    let mut offset = 0;
    while offset < 4 * budget {
        scanned.read(offset, piece).unwrap();
        offset += piece;
    }
    let misses = bench.metrics.pagecache_misses.get();
    for offset in (0..16 << 20).step_by(64 << 10) {
        hot.read(offset, 64 << 10).unwrap();
    }
    let missed = bench.metrics.pagecache_misses.get() - misses;
    assert_eq!(missed, 0, "the scan in pieces of {piece} bytes threw hot folios out");
    assert!(bench.cache.peak_bytes() <= budget);
}

#[test]
fn a_refault_is_seen_and_kept() {
    let budget = 4 << 20;
    let bench = Bench::new(1, CacheOptions::new(budget));
    let file = bench.file_with(1, budget);
    let read = |offset: u64| {
        let context = ReadContext { readahead: None, ..file.context() };
        let mut pages = PageBatch::new();
        assert!(read_iter(&context, offset, BLOCK, &mut pages).error.is_none());
    };
    read(0);
    bench.cache.evict_all_clean();
    assert_eq!(bench.metrics.pagecache_refaults.get(), 0);
    read(0);
    assert_eq!(bench.metrics.pagecache_refaults.get(), 1);
}

#[test]
fn writing_far_more_than_the_budget_stays_in_it() {
    let budget = 2 << 20;
    let bench = Bench::new(7, CacheOptions::new(budget));
    let file = bench.file(1, 0);
    for round in 0..64_u64 {
        file.write(round << 20, &vec![round as u8; 1 << 20]).unwrap();
        assert!(bench.cache.dirty_bytes() + bench.cache.writeback_bytes() <= budget / 4);
    }
    assert!(bench.cache.peak_bytes() <= budget, "{}", bench.cache.peak_bytes());
    assert!(bench.metrics.pagecache_writer_throttled.get() > 0);
    for round in 0..64_u64 {
        assert_eq!(file.read(round << 20, 10).unwrap(), [round as u8; 10]);
    }
}

#[test]
fn a_block_redirtied_in_writeback_stays_dirty_and_errors_lose_nothing() {
    let bench = Bench::new(1, CacheOptions::new(64 << 20));
    let file = bench.file(1, 0);
    file.write(0, &[1; 8192]).unwrap();
    let mut cursor = file.space.errors().cursor();
    let run = collect_dirty(&file.space, 0..u64::MAX, u64::MAX).pop().unwrap();
    assert_eq!((run.offset(), run.length(), run.units()), (0, 8192, 6));
    file.write(0, &[2; 4096]).unwrap();
    assert_eq!(run.slices().flatten().filter(|&&byte| byte == 1).count(), 8192, "the run's bytes are stable");
    assert!(collect_dirty(&file.space, 0..u64::MAX, u64::MAX).is_empty(), "its next version waits for this one");
    assert_eq!(file.space.unwritten_ranges(&(0..u64::MAX)), vec![0..8192]);
    assert_eq!(run.complete(Err(Error::ReadOnly)), 3, "the units of the block that was written again");
    assert!(file.space.errors().check(&mut cursor).is_err());
    assert!(file.space.errors().check(&mut cursor).is_ok());
    let run = collect_dirty(&file.space, 0..u64::MAX, u64::MAX).pop().unwrap();
    let bytes: Vec<u8> = run.slices().flatten().copied().collect();
    assert_eq!((bytes[0], bytes[8191], run.units()), (2, 1, 6));
    assert_eq!(run.complete(Ok(())), 0);
    assert!(bench.cache.dirty_spaces(9, None).is_empty());
}

#[test]
fn a_direct_reads_sequence_moves_with_each_change() {
    let bench = Bench::new(1, CacheOptions::new(64 << 20));
    let file = bench.file(1, 0);
    let first = file.space.sample_sequence().unwrap();
    {
        let _guard = file.space.block(0..10).unwrap();
        assert_eq!(file.space.sample_sequence(), None, "a blocker is inside");
    }
    assert_ne!(file.space.sample_sequence(), Some(first));
    let second = file.space.sample_sequence();
    file.write(0, &[1; 100]).unwrap();
    file.write_back(u64::MAX, false);
    assert_ne!(file.space.sample_sequence(), second, "writeback's commit is a change");
}

#[test]
fn a_latched_cache_throws_writers_out() {
    let bench = Bench::new(1, CacheOptions { dirty_limit_bytes: Some(8 * BLOCK), ..CacheOptions::new(1 << 20) });
    bench.env.unregister_all();
    let file = bench.file(1, 0);
    file.write(0, &[1; 8 * 4096]).unwrap();
    bench.cache.latch(Error::Latched { reason: "a test".into() });
    assert!(matches!(file.write(1 << 20, &[1; 4096]), Err(Error::Latched { .. })));
}

/// A punch reads and changes its edge under block. All memory is taken by others, who wait for add perhaps, and what is dirty is of the same file: to wait
/// for memory would be for ever.
#[test]
fn who_holds_block_does_not_wait_for_memory() {
    let bench = Bench::new(1, CacheOptions::new(1 << 20));
    let file = bench.file_with(1, 1 << 20);
    file.write(0, &[7; 4096]).unwrap();
    // Nobody writes back: the holder of block has the file's turn.
    bench.env.unregister_all();
    let mut others = Vec::new();
    while bench.cache.used_bytes() + BLOCK <= 1 << 20 {
        others.push(bench.cache.fresh_pages(4096).unwrap());
    }
    file.punch(100 * BLOCK + 10, 20).unwrap();
    drop(others);
    let mut expected = pattern(1, 100);
    expected[10..30].fill(0);
    same(&file.read(100 * BLOCK, BLOCK).unwrap(), &expected, "the edge");
}

/// At the dirty limit: what failed is tried again before a writer of another file hears of it; then it does, for else it would wait for ever.
#[test]
fn a_writer_does_not_wait_for_what_fails_again() {
    let options = CacheOptions { dirty_limit_bytes: Some(8 * BLOCK), ..CacheOptions::new(1 << 20) };
    let cache = Cache::new(Env::real(), Arc::new(Metrics::default()), options).unwrap();
    let (failing, other) = (File::new(&cache, 1, 0), File::new(&cache, 2, 0));
    failing.write(0, &[1; 8 * 4096]).unwrap();
    assert!(failing.space.failure().is_none());
    failing.write_back(u64::MAX, true);
    assert!(failing.space.failure().is_some());
    let (ended, end) = std::sync::mpsc::channel();
    let writer = Arc::clone(&other);
    std::thread::spawn(move || ended.send(writer.write(0, &[2; 4096])));
    while !cache.needs_writeback() || cache.metrics().pagecache_writer_throttled.get() == 0 {
        std::thread::yield_now();
    }
    assert!(end.try_recv().is_err(), "it gives up before anything was tried again");
    let outcome = (0..600).find_map(|_| {
        failing.write_back(u64::MAX, true);
        end.recv_timeout(std::time::Duration::from_millis(100)).ok()
    });
    assert!(matches!(outcome, Some(Err(Error::ReadOnly))), "{outcome:?}");
    failing.write_back(u64::MAX, false);
    assert!(failing.space.failure().is_none());
    other.write(0, &[2; 4096]).unwrap();
}

#[test]
fn interleaved_readers_of_one_file_do_not_disturb_each_other() {
    let bench = Bench::new(1, CacheOptions::new(512 << 20));
    let file = bench.file_with(1, 128 << 20);
    for step in 0..256_u64 {
        for stream in 0..4_u64 {
            file.read((stream << 25) + step * (128 << 10), 128 << 10).unwrap();
        }
    }
    let batches = file.store.batches.lock().len();
    assert!(batches <= 128 / 4 + 40, "{batches} batches");
}

#[test]
fn many_threads_on_a_small_cache_stay_in_its_budget_and_end() {
    let budget = 8 << 20;
    let env = Env::real();
    let metrics = Arc::new(Metrics::default());
    let options = CacheOptions { spawn: Some(spawn_threads(2).unwrap()), ..CacheOptions::new(budget) };
    let cache = Cache::new(env, Arc::clone(&metrics), options).unwrap();
    let files: Vec<Arc<File>> = (0..3).map(|number| File::new(&cache, number, 0)).collect();
    for (number, file) in (0..).zip(&files) {
        for block in 0..4096 {
            file.store.blocks.lock().insert(block, pattern(number, block));
        }
        file.size.store(4096 * BLOCK, Ordering::SeqCst);
    }
    let stop = std::sync::atomic::AtomicBool::new(false);
    let flush = |file: &File| {
        for run in collect_dirty(&file.space, 0..u64::MAX, 1 << 20) {
            file.store_run(run, false);
        }
    };
    std::thread::scope(|scope| {
        let (stop, files, flush, cache) = (&stop, &files, &flush, &cache);
        let flusher = scope.spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                let seen = cache.writeback_wanted().generation();
                files.iter().for_each(|file| flush(file));
                if cache.dirty_bytes() == 0 && !stop.load(Ordering::Relaxed) {
                    cache.writeback_wanted().wait_past(seen, Some(std::time::Duration::from_millis(5)));
                }
            }
        });
        let workers: Vec<_> = (1..=6_u64)
            .map(|number| {
                scope.spawn(move || {
                    let mut state = number.wrapping_mul(0x9E37_79B9_7F4A_7C15);
                    for _ in 0..300 {
                        state ^= state << 13;
                        state ^= state >> 7;
                        state ^= state << 17;
                        let which = state % 3;
                        let file = &files[usize::try_from(which).unwrap()];
                        let block = (state >> 20) % 4000;
                        let count = 1 + (state >> 40) % 64;
                        if number % 3 == 0 {
                            let data: Vec<u8> =
                                (block..block + count).flat_map(|block| pattern(which, block)).collect();
                            file.write(block * BLOCK, &data).unwrap();
                        } else {
                            let pages = file.collect(block * BLOCK, count * BLOCK).unwrap();
                            let expected: Vec<u8> =
                                (block..block + count).flat_map(|block| pattern(which, block)).collect();
                            same(&pages.to_vec(), &expected, "a thread's read");
                        }
                    }
                })
            })
            .collect();
        for worker in workers {
            worker.join().unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        flusher.join().unwrap();
    });
    cache.quiesce().unwrap();
    files.iter().for_each(|file| flush(file));
    let peak = cache.peak_bytes();
    assert!(peak <= budget + budget / 20, "{peak} of {budget}");
    assert_eq!(cache.dirty_bytes() + cache.writeback_bytes(), 0);
    cache.evict_all_clean();
    assert_eq!(cache.used_bytes(), 0);
}
