//! Single cases of writing, truncating, allocating and deleting.

use std::cell::RefCell;
use std::rc::Rc;

use super::*;
use crate::data::range::logged_position;
use crate::format::namespace::LoggedOperation;

#[test]
fn large_writes_make_large_extents() {
    let stack = Stack::new(plain(), 1);
    let inode = stack.create(9);
    let content = noise(300_000, 1);
    stack.write(inode, &content, 0, content.len() as u64);
    stack.check(&[(inode, &content)]);
    // Buckets of 64 KiB: an extent for each, and one more where an open bucket ended.
    assert!(stack.extents_of(inode).len() <= 7, "{:?}", stack.extents_of(inode).len());
}

#[test]
fn compression_saves_space_and_small_reads_decode_one_frame() {
    let stack = Stack::new(options(zstd(), ChecksumKind::Xxh3), 1);
    let inode = stack.create(9);
    let content = text(600_000, 1);
    stack.write(inode, &content, 0, content.len() as u64);
    stack.check(&[(inode, &content)]);
    assert!(stack.stored(inode).allocated_bytes * 3 < content.len() as u64);
    assert_eq!(stack.read(inode, 81920, 86016), content[81920..86016]);
    let widened = stack.data.widen(inode, 81920..86016);
    assert!(widened.start <= 65536 && widened.end >= 86016 && widened.end - widened.start <= 65536, "{widened:?}");
}

#[test]
fn tiny_files_are_inline_until_they_grow() {
    let stack = Stack::new(plain(), 1);
    let inode = stack.create(9);
    let mut content = text(700, 1);
    stack.write(inode, &content, 0, 700);
    assert!(matches!(stack.extents_of(inode)[0].value, ExtentValue::Inline(_)));
    assert_eq!(stack.space.usage().data_bytes, 0);
    content.truncate(100);
    stack.data.truncate(inode, 100, &|_| {}).unwrap();
    stack.check(&[(inode, &content)]);
    // Longer again: what was cut off does not come back.
    content.resize(3000, 0);
    stack.data.truncate(inode, 3000, &|_| {}).unwrap();
    stack.check(&[(inode, &content)]);
    content.resize(5000, 7);
    stack.write(inode, &content, 3000, 5000);
    assert!(matches!(stack.extents_of(inode)[0].value, ExtentValue::Data(_)));
    stack.check(&[(inode, &content)]);
}

#[test]
fn bytes_behind_the_end_are_never_shown() {
    let stack = Stack::new(plain(), 1);
    let inode = stack.create(9);
    let mut content = noise(20_000, 1);
    stack.write(inode, &content, 0, 20_000);
    for size in [10_000, 9_000, 19_999, 4097, 40_000] {
        content.resize(size, 0);
        stack.data.truncate(inode, size as u64, &|_| {}).unwrap();
        stack.check(&[(inode, &content)]);
    }
}

#[test]
fn a_writer_that_pads_with_garbage_is_cut_at_the_size() {
    let stack = Stack::new(plain(), 1);
    let inode = stack.create(9);
    let garbage = vec![0xAA; 8192];
    let commit = WriteCommit { size_limit: &|| 5000, update_inode: &|_| {} };
    let run = WriteRun { offset: 0, data: vec![&garbage] };
    stack.data.write(inode, &[run], stack.space.reserve(8192).unwrap(), commit).unwrap();
    stack.check(&[(inode, &garbage[..5000])]);
}

#[test]
fn odd_slices_are_gathered() {
    let stack = Stack::new(plain(), 1);
    let inode = stack.create(9);
    let content = noise(50_001, 1);
    let size = content.len() as u64;
    let commit = WriteCommit { size_limit: &|| size, update_inode: &|_| {} };
    let run = WriteRun { offset: 0, data: content.chunks(7777).collect() };
    stack.data.write(inode, &[run], stack.space.reserve(size).unwrap(), commit).unwrap();
    stack.check(&[(inode, &content)]);
}

#[test]
fn a_write_to_a_deleted_inode_is_dropped() {
    let stack = Stack::new(plain(), 1);
    let content = noise(100_000, 1);
    let change = stack.write(InodeNumber(77), &content, 0, 100_000);
    assert_eq!(change.inode, None);
    let change = stack.write(InodeNumber(77), &content[..500], 0, 500);
    assert_eq!(change.inode, None);
    stack.check(&[]);
    assert_eq!(stack.keys(BtreeId::Extents), vec![]);
    assert_eq!(stack.space.usage().reserved_bytes, 0);
}

#[test]
fn a_write_within_the_last_block_of_a_longer_file_is_refused() {
    let stack = Stack::new(plain(), 1);
    let inode = stack.create(9);
    let content = noise(8192, 1);
    stack.write(inode, &content, 0, 8192);
    let commit = WriteCommit { size_limit: &|| 8192, update_inode: &|_| {} };
    let run = WriteRun { offset: 0, data: vec![&content[..5000]] };
    let outcome = stack.data.write(inode, &[run], stack.space.reserve(8192).unwrap(), commit);
    assert!(matches!(outcome, Err(Error::Invalid(_))), "{outcome:?}");
    stack.check(&[(inode, &content)]);
}

#[test]
fn allocated_space_is_held_and_then_used() {
    let stack = Stack::new(plain(), 1);
    let inode = stack.create(9);
    let mut content = text(300, 1);
    stack.write(inode, &content, 0, 300);
    let reservation = stack.space.reserve(200_704).unwrap();
    let set_size = |inode: &mut Inode| inode.size = 200_000;
    stack.data.allocate(inode, 100, 200_000, reservation, &set_size).unwrap();
    content.resize(200_000, 0);
    stack.check(&[(inode, &content)]);
    assert_eq!(stack.space.usage().reserved_bytes, 0);
    assert_eq!(stack.stored(inode).allocated_bytes, 200_704);
    assert_eq!(stack.data.unwritten_bytes(inode, 0, 1 << 40).unwrap(), 200_704 - 4096);
    assert_eq!(stack.data.unwritten_bytes(inode, 0, 8192).unwrap(), 4096);
    assert_eq!(stack.data.seek_data(inode, 5000, 200_000).unwrap(), None);
    content[100_000..120_000].fill(9);
    stack.write(inode, &content, 100_000, 120_000);
    stack.check(&[(inode, &content)]);
    assert_eq!(stack.stored(inode).allocated_bytes, 200_704);
}

/// A file of many extents is truncated in several transactions; a crash after any of them leaves a promise that is kept at mount.
#[test]
fn an_interrupted_truncation_is_finished() {
    let stack = Stack::new(plain(), 1);
    let inode = stack.create(9);
    let mut content = noise(200 * 8192, 1);
    for index in 0..200_u64 {
        let start = index * 8192;
        stack.write_runs(inode, &content, &[(start, start + BLOCK)]);
        content[(start + BLOCK) as usize..(start + 8192) as usize].fill(0);
    }
    content.truncate(199 * 8192 + BLOCK as usize);
    stack.data.truncate(inode, content.len() as u64, &|_| {}).unwrap();
    stack.check(&[(inode, &content)]);
    let commits = stack.metrics.transaction_commits.get();
    stack.data.truncate(inode, 5000, &|_| {}).unwrap();
    assert!(stack.metrics.transaction_commits.get() - commits > 3, "one transaction for 200 extents");
    content.truncate(5000);
    stack.check(&[(inode, &content)]);
    assert_eq!(stack.keys(BtreeId::LoggedOperations), vec![]);
    // As if the machine had stopped after the first transaction: the size is set, extents are left beyond it.
    let long = noise(100_000, 2);
    stack.write(inode, &long, 0, 100_000);
    stack
        .transactions
        .run(CommitOptions::default(), |transaction| {
            let mut stored = stack.data.inode(transaction, inode)?.unwrap();
            stored.size = 8192;
            stack.data.put_inode(transaction, inode, &mut stored, 0, &|_| {})?;
            let operation = LoggedOperation::Truncate { inode: inode.0, size: 8192 };
            transaction.put(BtreeId::LoggedOperations, logged_position(inode), operation.encode()?);
            Ok(())
        })
        .unwrap();
    assert!(stack.data.resume_logged_operation().unwrap());
    assert!(!stack.data.resume_logged_operation().unwrap());
    stack.check(&[(inode, &long[..8192])]);
}

/// Long changes of ranges, stopped after each of their transactions in turn and resumed: what is there then is whole.
#[test]
fn interrupted_changes_of_ranges_are_finished() {
    type Change = (&'static str, fn(&Data, InodeNumber), fn(&mut Vec<u8>));
    const AT: u64 = 10 * BLOCK;
    const LENGTH: u64 = 30 * BLOCK;
    let changes: [Change; 4] = [
        (
            "punch",
            |data, inode| drop(data.punch(inode, AT, 10 * AT, &|_| {})),
            |content| content[AT as usize..10 * AT as usize].fill(0),
        ),
        (
            "zero",
            |data, inode| {
                let edges = PreparedWrite::empty();
                drop(data.replace_range(inode, &edges, AT..10 * AT, RangeFill::Unwritten, &|_| {}));
            },
            |content| content[AT as usize..10 * AT as usize].fill(0),
        ),
        (
            "collapse",
            |data, inode| drop(data.collapse(inode, AT, LENGTH, &|_| {})),
            |content| drop(content.drain(AT as usize..(AT + LENGTH) as usize)),
        ),
        (
            "insert",
            |data, inode| drop(data.insert(inode, AT, LENGTH, &|_| {})),
            |content| drop(content.splice(AT as usize..AT as usize, std::iter::repeat_n(0, LENGTH as usize))),
        ),
    ];
    for (name, change, expected) in changes {
        let stack = Stack::new(plain(), 7);
        let inode = stack.create(9);
        // Extents of one block each: written one by one, from the end.
        let mut content = noise(120 * BLOCK as usize - 100, 1);
        for index in (0..120).rev() {
            let start = index * BLOCK;
            stack.write_runs(inode, &content, &[(start, (start + BLOCK).min(content.len() as u64))]);
        }
        let images = Rc::new(RefCell::new(Vec::new()));
        keep_images(&stack, &images);
        change(&stack.data, inode);
        seam::at("never", || {});
        expected(&mut content);
        stack.check(&[(inode, &content)]);
        drop(stack);
        let images = images.take();
        assert!(images.len() >= 2, "{name} took {} transactions only", images.len() + 1);
        for image in images {
            let sim = SimOptions { discard_mode: DiscardMode::Garbage, ..SimOptions::default() };
            let stack = Stack::open(Arc::new(SimDevice::from_image(image, sim)), Env::simulated(8));
            assert_eq!(stack.keys(BtreeId::LoggedOperations), vec![]);
            stack.check(&[(inode, &content)]);
        }
    }
}

/// At each transaction of a long change but its last: makes all so far durable, and keeps what the medium then holds.
fn keep_images(stack: &Stack, images: &Rc<RefCell<Vec<crate::device::Image>>>) {
    let (device, images) = (Arc::clone(&stack.device), Rc::clone(images));
    let filesystem = Arc::clone(&stack.filesystem);
    fn arm(device: Arc<SimDevice>, filesystem: Arc<Filesystem>, images: Rc<RefCell<Vec<crate::device::Image>>>) {
        seam::at("range advanced", move || {
            let journal = filesystem.transactions().journal();
            journal.flush(journal.newest()).unwrap();
            images.borrow_mut().push(device.snapshot().durable().clone());
            arm(device, filesystem, images);
        });
    }
    arm(device, filesystem, images);
}

#[test]
fn deleting_gives_everything_back() {
    let stack = Stack::new(options(lz4(), ChecksumKind::Crc32c), 1);
    let inode = stack.create(9);
    let content = text(500_000, 1);
    stack.write(inode, &content, 0, 500_000);
    for start in (0..100).map(|index| index * 5000) {
        stack.write(inode, &content, start, start + 10);
    }
    let mut steps = 0;
    while stack.data.delete_extents_step(inode, 0, 10).unwrap() {
        steps += 1;
    }
    assert!(steps > 3);
    assert_eq!(stack.space.usage().data_bytes, 0);
    assert_eq!(stack.stored(inode).allocated_bytes, 0);
    stack.check_space(&[]);
}
