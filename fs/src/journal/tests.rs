//! The journal against a plain list of what was appended, on devices whose power can be cut.

use super::*;
use crate::device::MemDevice;
use crate::format::checkpoint::Checkpoint;
use crate::format::journal::{Entries, Entry, encode_key};
use crate::format::{Position, key::BtreeId};

pub(super) const BUCKET_BYTES: u32 = 64 << 10;

/// One copy for each range, on the devices that the ranges name.
pub(super) fn config(devices: Vec<std::sync::Arc<dyn BlockDevice>>, copies: Vec<BucketRange>) -> JournalConfig {
    JournalConfig {
        filesystem: Uuid::from_u128(7),
        devices,
        copies,
        bucket_bytes: BUCKET_BYTES,
        record_bytes_max: 16 << 10,
        commit_interval: Some(Duration::from_secs(1)),
    }
}

/// A checkpoint that names a boundary.
pub(super) fn checkpoint(boundary: &Boundary, epoch: u64) -> Checkpoint {
    Checkpoint {
        number: 1,
        epoch,
        first_replay: boundary.first_replay.0,
        first_replay_offset: boundary.offset,
        previous_record_checksum: boundary.previous_checksum,
        newest_sequence: 0,
        roots: Vec::new(),
        totals: boundary.totals.to_stored(),
        next_node: 1,
        clean: false,
        map: Vec::new(),
        written_at: 0,
    }
}

/// The checkpoint of a new filesystem.
pub(super) fn first_checkpoint() -> Checkpoint {
    let start = JournalStart::fresh();
    let (first_replay, offset) = (start.next, start.offset);
    checkpoint(&Boundary { first_replay, offset, previous_checksum: 0, totals: Totals::default() }, 0)
}

/// An entry that names `number`, padded with a value of `bytes` bytes.
pub(super) fn entry(number: u64, bytes: usize) -> Vec<u8> {
    let mut out = Vec::new();
    let position = Position { inode: number, offset: 0, snapshot: 0 };
    encode_key(BtreeId::Inodes, position, Some(&vec![number as u8; bytes]), &mut out);
    out
}

/// The numbers in a record, in order.
pub(super) fn numbers(record: &LogRecord) -> Vec<u64> {
    let keys = Entries::new(&record.payload).filter_map(|entry| match entry.unwrap() {
        Entry::Key { key, .. } => Some(key.position.inode),
        _ => None,
    });
    keys.collect()
}

/// Commits one entry: its sequence.
pub(super) fn commit(journal: &Journal, number: u64, bytes: usize) -> JournalSequence {
    let payload = entry(number, bytes);
    loop {
        if let Some(reservation) = journal.try_reserve(payload.len(), JournalWatermark::Normal) {
            let sequence = reservation.sequence();
            let accounting = [(AccountingCounter::Inodes, 1), (AccountingCounter::DataBytes, number as i64)];
            journal.append(reservation, payload, 1, &accounting, false);
            return sequence;
        }
        journal.wait_for_space(payload.len(), JournalWatermark::Normal).unwrap();
    }
}

fn range(device: u8, first: u64) -> BucketRange {
    BucketRange { device, first, count: 2 }
}

fn memory_config() -> JournalConfig {
    config(vec![std::sync::Arc::new(MemDevice::new(1 << 20))], vec![range(0, 1), range(0, 9)])
}

#[test]
fn what_is_committed_is_read_back_and_continued() {
    let config = memory_config();
    let mut expected = Vec::new();
    let from = first_checkpoint();
    for life in 0..3 {
        let log = read_log(&config, &from).unwrap();
        assert_eq!(log.records.iter().flat_map(numbers).collect::<Vec<_>>(), expected);
        let start = log.start(&from, &from).unwrap();
        assert_eq!(start.totals.get(AccountingCounter::Inodes), expected.len() as i64);
        assert_eq!(start.epoch, life + 1);
        let journal = Journal::open(config.clone(), start, Env::simulated(life), Default::default()).unwrap();
        assert_eq!(journal.reusable(), JournalSequence(0));
        for number in 0..10 {
            let sequence = commit(&journal, life * 100 + number, 100);
            expected.push(life * 100 + number);
            if number % 3 == 0 {
                journal.flush(sequence).unwrap();
                assert!(journal.flushed() >= sequence);
            }
        }
        journal.close().unwrap();
        assert_eq!(journal.totals().get(AccountingCounter::Inodes), expected.len() as i64);
    }
}
