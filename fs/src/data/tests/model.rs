//! Random operations on two files against arrays of bytes.

use proptest::prelude::*;

use super::*;
use crate::format::ChecksumKind;

const FILE_BYTES_MAX: u64 = 700_000;

#[derive(Clone, Debug)]
enum Operation {
    Write { from: u64, length: u64, compressible: bool },
    TwoRuns { from: u64, gap: u64 },
    Truncate { size: u64 },
    Punch { first: u64, count: u64 },
    Collapse { first: u64, count: u64 },
    Insert { first: u64, count: u64 },
    Zero { first: u64, count: u64 },
    Allocate { from: u64, length: u64 },
    Evacuate { which: usize },
    Delete,
    Reopen,
    Crash,
}

fn operation() -> impl Strategy<Value = (usize, Operation)> {
    let lengths = prop_oneof![1..200_u64, 1..9000_u64, 1..300_000_u64];
    let operation = prop_oneof![
        6 => (0..FILE_BYTES_MAX, lengths.clone(), any::<bool>())
            .prop_map(|(from, length, compressible)| Operation::Write { from, length, compressible }),
        3 => (0..1_u64, 1..3000_u64, any::<bool>())
            .prop_map(|(from, length, compressible)| Operation::Write { from, length, compressible }),
        1 => (0..FILE_BYTES_MAX / 2, 4096..100_000_u64).prop_map(|(from, gap)| Operation::TwoRuns { from, gap }),
        3 => prop_oneof![0..FILE_BYTES_MAX, 0..5000_u64].prop_map(|size| Operation::Truncate { size }),
        2 => (0..FILE_BYTES_MAX / BLOCK, 1..80_u64).prop_map(|(first, count)| Operation::Punch { first, count }),
        2 => (0..FILE_BYTES_MAX / BLOCK, 1..40_u64).prop_map(|(first, count)| Operation::Collapse { first, count }),
        2 => (0..FILE_BYTES_MAX / BLOCK, 1..40_u64).prop_map(|(first, count)| Operation::Insert { first, count }),
        1 => (0..FILE_BYTES_MAX / BLOCK, 1..40_u64).prop_map(|(first, count)| Operation::Zero { first, count }),
        2 => (0..FILE_BYTES_MAX, lengths).prop_map(|(from, length)| Operation::Allocate { from, length }),
        3 => any::<usize>().prop_map(|which| Operation::Evacuate { which }),
        1 => Just(Operation::Delete),
        1 => Just(Operation::Reopen),
        1 => Just(Operation::Crash),
    ];
    (0..2_usize, operation)
}

fn fill(content: &mut [u8], number: usize, compressible: bool) {
    let bytes = if compressible { text(content.len(), number as u64) } else { noise(content.len(), number as u64) };
    content.copy_from_slice(&bytes);
}

fn apply(stack: &Stack, inode: InodeNumber, content: &mut Vec<u8>, number: usize, operation: &Operation) {
    match *operation {
        Operation::Write { from, length, compressible } => {
            let end = (from + length) as usize;
            if content.len() < end {
                content.resize(end, 0);
            }
            fill(&mut content[from as usize..end], number, compressible);
            stack.write(inode, content, from, from + length);
        }
        Operation::TwoRuns { from, gap } => {
            let (first, second) = (from / BLOCK * BLOCK, (from + gap) / BLOCK * BLOCK + BLOCK);
            let end = second + 20_000;
            if content.len() < end as usize {
                content.resize(end as usize, 0);
            }
            fill(&mut content[first as usize..(first + BLOCK) as usize], number, true);
            fill(&mut content[second as usize..end as usize], number, false);
            let end = end.next_multiple_of(BLOCK).min(content.len() as u64);
            stack.write_runs(inode, content, &[(first, first + BLOCK), (second, end)]);
        }
        Operation::Truncate { size } => {
            content.resize(size as usize, 0);
            let change = stack.data.truncate(inode, size, &|_| {}).unwrap();
            assert_eq!(change.inode.unwrap().size, size);
        }
        Operation::Punch { first, count } => {
            let (start, end) = (first * BLOCK, (first + count) * BLOCK);
            let length = content.len();
            content[length.min(start as usize)..length.min(end as usize)].fill(0);
            stack.data.punch(inode, start, end, &|_| {}).unwrap();
        }
        Operation::Collapse { first, count } => {
            let (start, length) = (first * BLOCK, count * BLOCK);
            let outcome = stack.data.collapse(inode, start, length, &|_| {});
            if start + length >= content.len() as u64 {
                assert!(outcome.is_err());
            } else {
                content.drain(start as usize..(start + length) as usize);
                assert_eq!(outcome.unwrap().inode.unwrap().size, content.len() as u64);
            }
        }
        Operation::Insert { first, count } => {
            let (start, length) = (first * BLOCK, count * BLOCK);
            if start >= content.len() as u64 {
                assert!(stack.data.insert(inode, start, length, &|_| {}).is_err());
            } else {
                let change = stack.data.insert(inode, start, length, &|_| {}).unwrap();
                content.splice(start as usize..start as usize, std::iter::repeat_n(0, length as usize));
                assert_eq!(change.inode.unwrap().size, content.len() as u64);
            }
        }
        Operation::Zero { first, count } => {
            let (start, end) = (first * BLOCK, (first + count) * BLOCK);
            let reservation = stack.space.reserve(end - start).unwrap();
            let edges = PreparedWrite::empty();
            stack.data.replace_range(inode, &edges, start..end, RangeFill::Unwritten, &|_| {}).unwrap();
            drop(reservation);
            let length = content.len();
            content[length.min(start as usize)..length.min(end as usize)].fill(0);
        }
        Operation::Allocate { from, length } => {
            let bytes = (from + length).next_multiple_of(BLOCK) - from / BLOCK * BLOCK;
            let reservation = stack.space.reserve(bytes).unwrap();
            stack.data.allocate(inode, from, from + length, reservation, &|_| {}).unwrap();
        }
        Operation::Evacuate { which } => {
            let buckets = stack.data_buckets();
            if let Some(bucket) = buckets.get(which % buckets.len().max(1)) {
                stack.data.evacuate(DeviceIndex(0), *bucket).unwrap();
            }
        }
        Operation::Delete => {
            content.clear();
            while stack.data.delete_extents_step(inode, 0, 3).unwrap() {}
            assert_eq!(stack.extents_of(inode), vec![]);
            // What namespace does next; here the file goes on with nothing in it.
            stack.data.truncate(inode, 0, &|_| {}).unwrap();
        }
        // The stack's, not the file's.
        Operation::Reopen | Operation::Crash => {}
    }
}

fn check_seek(stack: &Stack, inode: InodeNumber, content: &[u8]) {
    let size = content.len() as u64;
    let mut at = 0;
    let mut is_data = vec![false; content.len()];
    while let Some(data) = stack.data.seek_data(inode, at, size).unwrap() {
        assert!(data >= at && data < size);
        assert_eq!(stack.data.seek_data(inode, data, size).unwrap(), Some(data));
        let hole = stack.data.seek_hole(inode, data, size).unwrap();
        assert!(hole > data && hole <= size);
        is_data[data as usize..hole as usize].fill(true);
        at = hole;
    }
    let lost = content.iter().zip(&is_data).position(|(&byte, &is_data)| byte != 0 && !is_data);
    assert_eq!(lost, None, "data in a hole");
}

fn run(options: DataOptions, operations: &[(usize, Operation)], seed: u64) {
    let mut stack = Stack::new(options, seed);
    let inodes = [stack.create(10), stack.create(11)];
    let mut contents = [Vec::new(), Vec::new()];
    for (number, (file, operation)) in operations.iter().enumerate() {
        apply(&stack, inodes[*file], &mut contents[*file], number, operation);
        stack = match operation {
            Operation::Reopen => stack.reopened(),
            Operation::Crash => stack.recovered(),
            _ => stack,
        };
        if number % 4 == 3 || number + 1 == operations.len() {
            stack.check(&[(inodes[0], &contents[0]), (inodes[1], &contents[1])]);
            check_seek(&stack, inodes[*file], &contents[*file]);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: ProptestConfig::default().cases / 8, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn files_hold_what_was_written(
        operations in proptest::collection::vec(operation(), 1..28),
        compression in prop_oneof![Just(Compression::NONE), Just(lz4()), Just(zstd())],
        checksum in prop_oneof![Just(ChecksumKind::None), Just(ChecksumKind::Crc32c), Just(ChecksumKind::Xxh3)],
        seed in any::<u64>(),
    ) {
        run(options(compression, checksum), &operations, seed);
    }
}
