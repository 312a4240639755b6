//! The whole cache against a plain `Vec<u8>`, on a budget far smaller than the file.

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Operation {
    Write {
        offset: u64,
        length: u64,
        byte: u8,
    },
    Read {
        offset: u64,
        length: u64,
    },
    /// Collects, keeps the pages, and checks at the end that they have not changed.
    Hold {
        offset: u64,
        length: u64,
    },
    LetGo,
    Truncate(u64),
    Punch {
        offset: u64,
        length: u64,
    },
    WriteBack {
        max_bytes: u64,
        fail: bool,
    },
    /// Takes runs and keeps them under way across the next operations.
    StartWriteback {
        max_bytes: u64,
    },
    FinishWriteback {
        fail: bool,
    },
    Evict,
    /// A crash after a flush has left garbage behind the end of the file, in its last block.
    Garbage,
    BadBlock(u64),
}

fn operations(most: u64) -> impl Strategy<Value = Vec<Operation>> {
    let offset = || prop_oneof![0..most, (0..most / BLOCK).prop_map(|block| block * BLOCK), 0..BLOCK * 3];
    let length = || prop_oneof![1..BLOCK, 1..BLOCK * 20, (1..30_u64).prop_map(|blocks| blocks * BLOCK)];
    let operation = prop_oneof![
        6 => (offset(), length(), any::<u8>()).prop_map(|(offset, length, byte)| Operation::Write { offset, length, byte }),
        6 => (offset(), length()).prop_map(|(offset, length)| Operation::Read { offset, length }),
        2 => (offset(), length()).prop_map(|(offset, length)| Operation::Hold { offset, length }),
        1 => Just(Operation::LetGo),
        2 => offset().prop_map(Operation::Truncate),
        2 => (offset(), length()).prop_map(|(offset, length)| Operation::Punch { offset, length }),
        2 => (1..BLOCK * 40, prop::bool::weighted(0.2)).prop_map(|(max_bytes, fail)| Operation::WriteBack { max_bytes, fail }),
        2 => (1..BLOCK * 40).prop_map(|max_bytes| Operation::StartWriteback { max_bytes }),
        2 => any::<bool>().prop_map(|fail| Operation::FinishWriteback { fail }),
        1 => Just(Operation::Evict),
        1 => Just(Operation::Garbage),
        1 => (0..most / BLOCK).prop_map(Operation::BadBlock),
    ];
    prop::collection::vec(operation, 1..70)
}

struct Held {
    pages: PageBatch,
    expected: Vec<u8>,
}

fn run(seed: u64, budget_bytes: u64, widen_blocks: u64, operations: Vec<Operation>) {
    let bench = Bench::new(seed, CacheOptions::new(budget_bytes));
    let file = bench.file(1, widen_blocks);
    let mut model: Vec<u8> = Vec::new();
    let mut held: Vec<Held> = Vec::new();
    let part = |model: &Vec<u8>, offset: u64, length: u64| {
        let start = usize::try_from(offset).unwrap().min(model.len());
        let end = usize::try_from(offset + length).unwrap().min(model.len());
        model[start..end].to_vec()
    };
    for operation in operations {
        bench.env.maybe_yield(3).unwrap();
        match operation {
            Operation::Write { offset, length, byte } => {
                let data: Vec<u8> = (0..length).map(|at| byte.wrapping_add((at % 251) as u8)).collect();
                file.write(offset, &data).unwrap();
                let end = usize::try_from(offset + length).unwrap();
                if model.len() < end {
                    model.resize(end, 0);
                }
                model[usize::try_from(offset).unwrap()..end].copy_from_slice(&data);
            }
            Operation::Read { offset, length } => {
                same(&file.read(offset, length).unwrap(), &part(&model, offset, length), "read");
            }
            Operation::Hold { offset, length } => {
                let pages = file.collect(offset, length).unwrap();
                let expected = part(&model, offset, length);
                same(&pages.to_vec(), &expected, "collect");
                held.push(Held { pages, expected });
            }
            Operation::LetGo => {
                for held in held.drain(..) {
                    same(&held.pages.to_vec(), &held.expected, "collected pages");
                }
            }
            Operation::Truncate(size) => {
                file.truncate(size).unwrap();
                model.resize(usize::try_from(size).unwrap(), 0);
            }
            Operation::Punch { offset, length } => {
                file.punch(offset, length).unwrap();
                let start = usize::try_from(offset).unwrap().min(model.len());
                let end = usize::try_from(offset + length).unwrap().min(model.len());
                model[start..end].fill(0);
            }
            Operation::WriteBack { max_bytes, fail } => {
                file.write_back(max_bytes, fail);
            }
            Operation::StartWriteback { max_bytes } => {
                let runs = collect_dirty(&file.space, 0..u64::MAX, max_bytes);
                bench.flusher.under_way.lock().extend(runs.into_iter().map(|run| (Arc::clone(&file), run)));
            }
            Operation::FinishWriteback { fail } => {
                let runs = std::mem::take(&mut *bench.flusher.under_way.lock());
                for (file, run) in runs {
                    file.store_run(run, fail);
                }
            }
            Operation::Evict => {
                bench.cache.evict_all_clean();
            }
            Operation::Garbage => {
                while file.write_back(u64::MAX, false) {}
                file.space.wait_for_writeback(&(0..u64::MAX)).unwrap();
                bench.cache.evict_all_clean();
                let end = file.size();
                let is_uncached = file.space.unwritten_blocks() == 0 && !file.space.has_folios(&(end..end + 1));
                let mut blocks = file.store.blocks.lock();
                if is_uncached && let Some(bytes) = blocks.get_mut(&(end / BLOCK)) {
                    bytes[usize::try_from(end % BLOCK).unwrap()..].fill(0xDD);
                }
            }
            Operation::BadBlock(block) => {
                // Readahead meets it; whoever wants it gets the error; it heals. Nothing else changes.
                let offset = block * BLOCK;
                if offset < file.size() && !file.space.has_folios(&(offset..offset + 1)) {
                    file.store.bad.lock().insert(block);
                    assert!(file.read(offset, 1).is_err());
                    if block > 0 {
                        let before = file.read(offset - 1, 1).unwrap();
                        same(&before, &part(&model, offset - 1, 1), "neighbour");
                    }
                    file.store.bad.lock().clear();
                }
            }
        }
        assert_eq!(file.size(), model.len() as u64);
    }
    for held in held.drain(..) {
        same(&held.pages.to_vec(), &held.expected, "collected pages");
    }
    same(&file.read(0, u64::MAX >> 1).unwrap(), &model, "the end");
    while file.write_back(u64::MAX, false) {}
    file.space.wait_for_writeback(&(0..u64::MAX)).unwrap();
    while file.write_back(u64::MAX, false) {}
    assert_eq!((file.space.unwritten_blocks(), *file.units.lock()), (0, 0), "every unit was consumed or given back");
    assert_eq!((bench.cache.dirty_bytes(), bench.cache.writeback_bytes()), (0, 0));
    bench.cache.evict_all_clean();
    assert_eq!(bench.cache.used_bytes(), 0, "nothing leaks");
    assert_eq!(file.space.folio_count(), 0);
    same(&file.read(0, u64::MAX >> 1).unwrap(), &model, "the device");
}

/// A slice in CI; `PROPTEST_CASES=20000 cargo test -p coppicefs --lib pagecache::tests::model` for long.
fn cases() -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(150)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), max_shrink_iters: 3000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_file_is_a_vector_of_bytes(seed: u64, operations in operations(600 * 1024)) {
        run(seed, 256 * 1024, 0, operations);
    }

    #[test]
    fn so_it_is_with_compressed_frames_and_large_folios(seed: u64, operations in operations(1500 * 1024)) {
        run(seed, 4 << 20, 16, operations);
    }
}
