//! Readers against reuse: the space that a reader is about to read is freed and given to another file, at the worst moments, without checksums that
//! would notice.

use super::*;

/// Deletes `victim`'s data, makes that durable, and fills all space with another file's bytes, so that every bucket that may be reused is.
fn reuse_everything(filesystem: &Arc<Filesystem>, victim: InodeNumber, other: InodeNumber) {
    let data = filesystem.data();
    data.truncate(victim, 0, &|_| {}).unwrap();
    for _ in 0..3 {
        filesystem.sync().unwrap();
        // Time for workers to free what was emptied.
        for _ in 0..50 {
            filesystem.env().step_random_worker().unwrap();
            filesystem.env().advance_clock();
        }
        let bytes = vec![0xBB; (filesystem.usage().available_bytes * 95 / 100 / BLOCK * BLOCK) as usize];
        let size = bytes.len() as u64;
        let commit = WriteCommit { size_limit: &|| size, update_inode: &|_| {} };
        let run = WriteRun { offset: 0, data: bytes.chunks(64 << 10).collect() };
        let reservation = filesystem.space().reserve(size).unwrap();
        data.write(other, &[run], reservation, commit).unwrap();
        data.truncate(other, 0, &|_| {}).unwrap();
    }
}

fn read_while_reused(place: &'static str, switches: TestSwitches) -> (Vec<u8>, Vec<u8>, Arc<Metrics>) {
    let stack = Stack::new(options(Compression::NONE, ChecksumKind::None), 4).reopened_with(switches);
    let (victim, other) = (stack.create(9), stack.create(10));
    let content = noise(50 * BLOCK as usize, 1);
    stack.write(victim, &content, 0, content.len() as u64);
    let filesystem = Arc::clone(&stack.filesystem);
    seam::at(place, move || reuse_everything(&filesystem, victim, other));
    let bytes = stack.read(victim, 0, content.len() as u64);
    assert_eq!(stack.stored(victim).size, 0, "nothing happened in the middle");
    (bytes, content, Arc::clone(&stack.metrics))
}

#[test]
fn what_is_freed_before_the_reference_is_looked_up_again() {
    let (bytes, _, metrics) = read_while_reused("looked up", TestSwitches::default());
    assert!(bytes.iter().all(|&byte| byte == 0), "the file was empty by then");
    assert!(metrics.buckets_emptied.get() > 3);
}

#[test]
fn what_is_referenced_is_not_rewritten() {
    // It was looked up before the deletion, and it is whole.
    let (bytes, content, _) = read_while_reused("submitting", TestSwitches::default());
    assert!(bytes == content, "a bucket was rewritten under its reader");
}

#[test]
fn without_the_references_the_reuse_is_seen() {
    let switches = TestSwitches { no_bucket_references: true, ..TestSwitches::default() };
    let (bytes, content, _) = read_while_reused("submitting", switches);
    assert!(bytes != content, "the test would not notice lost references");
}

/// The rest of its block was then wanted from the device, from a byte on that is none's of a block: EINVAL.
#[test]
fn inline_data_that_becomes_a_block_meanwhile_is_looked_up_again() {
    let stack = Stack::new(options(Compression::NONE, ChecksumKind::None), 4);
    let inode = stack.create(9);
    stack.write(inode, &noise(700, 1), 0, 700);
    let content = noise(2 * BLOCK as usize, 2);
    let (filesystem, longer) = (Arc::clone(&stack.filesystem), content.clone());
    seam::at("inline", move || {
        let size = longer.len() as u64;
        let commit = WriteCommit { size_limit: &|| size, update_inode: &|_| {} };
        let run = WriteRun { offset: 0, data: longer.chunks(16 << 10).collect() };
        let reservation = filesystem.space().reserve(size).unwrap();
        filesystem.data().write(inode, &[run], reservation, commit).unwrap();
    });
    assert_eq!(stack.read(inode, 0, content.len() as u64), content);
}
