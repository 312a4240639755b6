//! File data against a plain vector: writes, truncations, holes, allocation, dropped caches, remounts, crashes after fsync.

use proptest::prelude::*;

use super::*;

const SIZE_MAX: u64 = 300_000;

#[derive(Clone, Debug)]
enum Operation {
    Write { offset: u64, length: usize, byte: u8 },
    Append { length: usize, byte: u8 },
    Read { offset: u64, length: u32 },
    Truncate { size: u64 },
    Punch { offset: u64, length: u64 },
    Zero { offset: u64, length: u64, keep_size: bool },
    Collapse { block: u64, count: u64 },
    Insert { block: u64, count: u64 },
    DirectWrite { offset: u64, length: usize, byte: u8 },
    DirectRead { offset: u64, length: u32 },
    Allocate { offset: u64, length: u64, keep_size: bool },
    Copy { from: u64, to: u64, length: u64 },
    Fsync,
    DropCaches,
    Remount,
    CrashAfterFsync,
    Rename,
}

fn offset() -> impl Strategy<Value = u64> {
    prop_oneof![0..SIZE_MAX, (0..SIZE_MAX / 4096).prop_map(|block| block * 4096), 0..5000_u64]
}

fn length() -> impl Strategy<Value = u64> {
    prop_oneof![1..100_000_u64, (1..20_u64).prop_map(|blocks| blocks * 4096), 1..5000_u64]
}

fn operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        8 => (offset(), length(), any::<u8>())
            .prop_map(|(offset, length, byte)| Operation::Write { offset, length: length as usize, byte }),
        2 => (length(), any::<u8>()).prop_map(|(length, byte)| Operation::Append { length: length as usize, byte }),
        4 => (offset(), length()).prop_map(|(offset, length)| Operation::Read { offset, length: length as u32 }),
        3 => offset().prop_map(|size| Operation::Truncate { size }),
        3 => (offset(), length()).prop_map(|(offset, length)| Operation::Punch { offset, length }),
        3 => (offset(), length(), any::<bool>())
            .prop_map(|(offset, length, keep_size)| Operation::Zero { offset, length, keep_size }),
        2 => (0..SIZE_MAX / 4096, 1..20_u64).prop_map(|(block, count)| Operation::Collapse { block, count }),
        2 => (0..SIZE_MAX / 4096, 1..20_u64).prop_map(|(block, count)| Operation::Insert { block, count }),
        5 => (offset(), length(), any::<u8>())
            .prop_map(|(offset, length, byte)| Operation::DirectWrite { offset, length: length as usize, byte }),
        3 => (offset(), length()).prop_map(|(offset, length)| Operation::DirectRead { offset, length: length as u32 }),
        2 => (offset(), length(), any::<bool>())
            .prop_map(|(offset, length, keep_size)| Operation::Allocate { offset, length, keep_size }),
        1 => (offset(), offset(), length()).prop_map(|(from, to, length)| Operation::Copy { from, to, length }),
        2 => Just(Operation::Fsync),
        2 => Just(Operation::DropCaches),
        1 => Just(Operation::Remount),
        1 => Just(Operation::CrashAfterFsync),
        1 => Just(Operation::Rename),
    ]
}

fn pattern(byte: u8, length: usize) -> Vec<u8> {
    // Neither constant nor periodic in blocks, and not compressible by much.
    let mut state = u32::from(byte) + 1;
    std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    })
    .take(length)
    .collect()
}

fn put(content: &mut Vec<u8>, offset: u64, data: &[u8]) {
    let (start, end) = (offset as usize, offset as usize + data.len());
    if content.len() < end {
        content.resize(end, 0);
    }
    content[start..end].copy_from_slice(data);
}

fn check_holes(mount: &Mount, file: (u64, u64), content: &[u8]) {
    let size = content.len() as u64;
    let mut at = 0;
    while at < size {
        let data = match mount.vfs().seek(&USER, file.0, file.1, at, Seek::Data) {
            Ok(data) => data,
            Err(error) => {
                assert_eq!(error.errno(), Errno::NXIO);
                size
            }
        };
        assert!(data >= at);
        assert!(content[at as usize..data as usize].iter().all(|&byte| byte == 0), "bytes in the hole {at}..{data}");
        if data == size {
            break;
        }
        let hole = mount.vfs().seek(&USER, file.0, file.1, data, Seek::Hole).unwrap();
        assert!(hole > data && hole <= size, "hole at {hole} after data at {data}");
        at = hole;
    }
    assert_eq!(errno(mount.vfs().seek(&USER, file.0, file.1, size, Seek::Data)), Errno::NXIO);
}

fn run(operations: &[Operation], seed: u64) {
    let mut mount = Mount::simulated(seed);
    let mut file = mount.create(ROOT, "file");
    let mut content: Vec<u8> = Vec::new();
    let mut name = "file";
    for operation in operations {
        match operation {
            Operation::Write { offset, length, byte } => {
                let data = pattern(*byte, *length);
                assert_eq!(mount.write(file, *offset, &data).unwrap() as usize, data.len());
                put(&mut content, *offset, &data);
            }
            Operation::Append { length, byte } => {
                let data = pattern(*byte, *length);
                let request = WriteRequest { append: true, ..write_request(file.0, file.1, 7, &data) };
                assert_eq!(mount.vfs().write(&USER, &request).unwrap() as usize, data.len());
                content.extend_from_slice(&data);
            }
            Operation::Read { offset, length } => {
                let start = (*offset as usize).min(content.len());
                let end = (start + *length as usize).min(content.len());
                assert!(mount.read(file, *offset, *length).unwrap() == content[start..end], "{operation:?}");
            }
            Operation::Truncate { size } => {
                assert_eq!(mount.truncate(file.0, *size).unwrap().size_bytes, *size);
                content.resize(*size as usize, 0);
            }
            Operation::Punch { offset, length } => {
                mount.vfs().fallocate(&USER, file.0, file.1, *offset, *length, 3).unwrap();
                let start = (*offset as usize).min(content.len());
                let end = (start + *length as usize).min(content.len());
                content[start..end].fill(0);
            }
            Operation::Zero { offset, length, keep_size } => {
                let mode = 16 | i32::from(*keep_size);
                mount.vfs().fallocate(&USER, file.0, file.1, *offset, *length, mode).unwrap();
                if !keep_size {
                    content.resize(content.len().max((offset + length) as usize), 0);
                }
                let start = (*offset as usize).min(content.len());
                let end = (start + *length as usize).min(content.len());
                content[start..end].fill(0);
            }
            Operation::Collapse { block, count } => {
                let (offset, length) = (block * 4096, count * 4096);
                let outcome = mount.vfs().collapse_range(file.0, file.1, offset, length);
                if offset + length >= content.len() as u64 {
                    assert_eq!(errno(outcome), Errno::INVAL);
                } else {
                    outcome.unwrap();
                    content.drain(offset as usize..(offset + length) as usize);
                }
            }
            Operation::Insert { block, count } => {
                let (offset, length) = (block * 4096, count * 4096);
                let outcome = mount.vfs().insert_range(file.0, file.1, offset, length);
                if offset >= content.len() as u64 {
                    assert_eq!(errno(outcome), Errno::INVAL);
                } else {
                    outcome.unwrap();
                    content.splice(offset as usize..offset as usize, std::iter::repeat_n(0, length as usize));
                }
            }
            Operation::DirectWrite { offset, length, byte } => {
                let data = pattern(*byte, *length);
                assert_eq!(mount.vfs().direct_write(&USER, file.0, file.1, *offset, &data).unwrap(), data.len());
                put(&mut content, *offset, &data);
            }
            Operation::DirectRead { offset, length } => {
                let start = (*offset as usize).min(content.len());
                let end = (start + *length as usize).min(content.len());
                let mut buffer = crate::memory::AlignedBuffer::zeroed(*length as usize);
                let bytes = mount.vfs().direct_read(&USER, file.0, file.1, *offset, &mut buffer).unwrap();
                assert!(buffer[..bytes] == content[start..end], "{operation:?}");
                let request =
                    ReadRequest { node: file.0, handle: file.1, offset: *offset, length_bytes: *length, direct: true };
                assert!(mount.vfs().read(&USER, &request).unwrap().to_vec() == content[start..end], "{operation:?}");
            }
            Operation::Allocate { offset, length, keep_size } => {
                mount.vfs().fallocate(&USER, file.0, file.1, *offset, *length, i32::from(*keep_size)).unwrap();
                if !keep_size {
                    content.resize(content.len().max((offset + length) as usize), 0);
                }
            }
            Operation::Copy { from, to, length } => {
                let request = CopyRequest {
                    source_node: file.0,
                    source_handle: file.1,
                    source_offset: *from,
                    target_node: file.0,
                    target_handle: file.1,
                    target_offset: *to,
                    length_bytes: *length,
                };
                let copied = mount.vfs().copy_file_range(&USER, &request);
                if from.abs_diff(*to) < *length {
                    assert_eq!(errno(copied), Errno::INVAL);
                    continue;
                }
                let start = (*from as usize).min(content.len());
                let end = (start + *length as usize).min(content.len());
                assert_eq!(copied.unwrap() as usize, end - start);
                let data = content[start..end].to_vec();
                if !data.is_empty() {
                    put(&mut content, *to, &data);
                }
            }
            Operation::Fsync => mount.vfs().fsync(&USER, file.0, file.1, false).unwrap(),
            Operation::DropCaches => {
                mount.vfs().write_back_all().unwrap();
                mount.filesystem.as_ref().unwrap().cache().evict_all_clean();
            }
            Operation::Remount | Operation::CrashAfterFsync => {
                if matches!(operation, Operation::Remount) {
                    mount.reopen();
                } else {
                    mount.vfs().fsync(&USER, file.0, file.1, true).unwrap();
                    mount.crash();
                }
                file.0 = mount.lookup(ROOT, name).unwrap();
                file.1 = mount.open_file(file.0);
            }
            Operation::Rename => {
                let new = if name == "file" { "other" } else { "file" };
                mount.vfs().rename(&USER, ROOT, OsStr::new(name), ROOT, OsStr::new(new), 0).unwrap();
                name = new;
            }
        }
        assert_eq!(mount.attributes(file.0).size_bytes, content.len() as u64, "size after {operation:?}");
    }
    for _ in 0..2 {
        let all = mount.read(file, 0, content.len() as u32).unwrap();
        if let Some(at) = all.iter().zip(&content).position(|(a, b)| a != b) {
            panic!("byte {at} differs");
        }
        assert_eq!(all.len(), content.len());
        check_holes(&mount, file, &content);
        mount.reopen();
        file.0 = mount.lookup(ROOT, name).unwrap();
        file.1 = mount.open_file(file.0);
        assert_eq!(mount.attributes(file.0).size_bytes, content.len() as u64);
    }
    // Everything comes back when it is gone, exactly.
    let allocated = mount.filesystem.as_ref().unwrap().usage();
    mount.vfs().release(file.0, file.1).unwrap();
    mount.vfs().unlink(&USER, ROOT, OsStr::new(name)).unwrap();
    mount.vfs().forget(file.0, 1);
    mount.vfs().wait_for_deletions().unwrap();
    let usage = mount.filesystem.as_ref().unwrap().usage();
    assert_eq!((usage.data_bytes, usage.unwritten_bytes), (0, 0), "before: {allocated:?}");
    assert_eq!(usage.reserved_bytes, 0, "promises are left");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 300, ..ProptestConfig::default() })]

    #[test]
    fn data_is_as_in_a_vector(operations in prop::collection::vec(operation(), 1..60), seed: u64) {
        run(&operations, seed);
    }
}
