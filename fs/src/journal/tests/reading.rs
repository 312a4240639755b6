//! What recovery makes of damaged, stale and hostile rings.

use proptest::prelude::*;

use super::*;
use crate::format::ChecksumKind;
use crate::format::journal::{RecordHeader, encode_data_range};
use crate::units::DeviceIndex;

const RING_START: [u64; 2] = [BUCKET_BYTES as u64, 3 * BUCKET_BYTES as u64];

/// Six records (the first of them empty), each durable and one block long; the last states that those before are.
fn six_records() -> (std::sync::Arc<SimDevice>, JournalConfig) {
    let (device, config) = simulated(2, 1);
    let journal = open(&config, JournalStart::fresh());
    for number in 2..=6 {
        let sequence = commit(&journal, number, 10);
        journal.flush(sequence).unwrap();
    }
    (device, config)
}

#[test]
fn one_good_copy_of_each_record_is_enough() {
    let (device, config) = six_records();
    for (block, copy) in [(0, 0), (1, 1), (2, 0), (4, 1)] {
        device.flip_bit(RING_START[copy] + block * 4096 + 30, 1);
    }
    device.make_bad(RING_START[0] + 3 * 4096, 512);
    let log = read_log(&config, &first_checkpoint()).unwrap();
    assert_eq!(log_numbers(&log), [2, 3, 4, 5, 6]);
    assert_eq!(log.known_flushed, JournalSequence(5));
}

#[test]
fn a_hole_below_the_highest_statement_is_damage_and_above_it_the_end() {
    for lost in 1..=6u64 {
        let (device, config) = six_records();
        for start in RING_START {
            device.flip_bit(start + (lost - 1) * 4096 + 20, 3);
        }
        let outcome = read_log(&config, &first_checkpoint());
        if lost == 6 {
            assert_eq!(log_numbers(&outcome.unwrap()), [2, 3, 4, 5]);
            continue;
        }
        let Err(Error::Corrupt(corruption)) = outcome else { panic!("record {lost} is not missed") };
        assert_eq!(corruption.what, format!("journal record {lost}"));
        assert_eq!(corruption.place, Some((DeviceIndex(0), RING_START[0] + (lost - 1) * 4096)));
    }
}

#[test]
fn what_is_not_stated_may_end_anywhere() {
    let (device, config) = simulated(2, 1);
    let journal = open(&config, JournalStart::fresh());
    // Six records in one batch: none of them states another.
    for number in 2..=6 {
        commit(&journal, number, 10);
        journal.boundary().unwrap();
    }
    journal.close().unwrap();
    for start in RING_START {
        device.flip_bit(start + 2 * 4096 + 20, 3);
    }
    let log = read_log(&config, &first_checkpoint()).unwrap();
    assert_eq!(log_numbers(&log), [2]);
    assert_eq!((log.next, log.offset), (JournalSequence(3), 2 * 4096));
}

/// Data that was written alongside its record, and did not arrive: the log ends there, once and for all, although what stood behind is
/// still in the ring and continues the chain.
#[test]
fn missing_data_cuts_the_log_for_ever() {
    let (device, config) = simulated(2, 1);
    let data_offset = 512u64;
    let data = [9u8; 1024];
    let journal = open(&config, JournalStart::fresh());
    commit(&journal, 2, 10);
    journal.flush(journal.newest()).unwrap();
    let mut payload = entry(3, 10);
    let checksum = ChecksumKind::Crc32c.compute(&data);
    encode_data_range(DeviceIndex(0), data_offset, 1024, ChecksumKind::Crc32c, checksum, &mut payload);
    let reservation = journal.try_reserve(payload.len(), JournalWatermark::Normal).unwrap();
    journal.append(reservation, payload, 2, &[], false);
    journal.boundary().unwrap();
    commit(&journal, 4, 10);
    journal.boundary().unwrap();
    commit(&journal, 5, 10);
    journal.close().unwrap();

    let from = first_checkpoint();
    let cut = read_log(&config, &from).unwrap();
    assert_eq!((log_numbers(&cut), cut.next, cut.offset), (vec![2], JournalSequence(3), 2 * 4096));
    device.write(data_offset, &data).unwrap();
    assert_eq!(log_numbers(&read_log(&config, &from).unwrap()), [2, 3, 4, 5]);

    // A mount that continues at the cut overrules the rest as soon as its first record is durable.
    let journal = open(&config, cut.start(&from, &from).unwrap());
    journal.flush(journal.newest()).unwrap();
    let log = read_log(&config, &from).unwrap();
    assert_eq!(log_numbers(&log), [2]);
    assert_eq!(log.records.len(), 3);
    assert_eq!(log.next, JournalSequence(4));
    assert_eq!(log.highest_epoch, 2);

    // A durable statement makes it a matter of that block alone.
    drop(journal);
    let (device, config) = simulated(2, 1);
    let journal = open(&config, JournalStart::fresh());
    let mut payload = entry(3, 10);
    encode_data_range(DeviceIndex(0), data_offset, 1024, ChecksumKind::Crc32c, checksum, &mut payload);
    device.write(data_offset, &data).unwrap();
    let reservation = journal.try_reserve(payload.len(), JournalWatermark::Normal).unwrap();
    let sequence = reservation.sequence();
    journal.append(reservation, payload, 2, &[], false);
    assert!(journal.make_reusable(sequence, JournalWatermark::Reclaim).unwrap());
    device.write(data_offset, &[0; 1024]).unwrap();
    assert_eq!(log_numbers(&read_log(&config, &from).unwrap()), [3]);
}

/// A record of an earlier life that has the right sequence and continues the checksums does not continue a chain of a later one; and a
/// new mount is above every epoch that the ring holds.
#[test]
fn epochs_never_go_down() {
    let (device, config) = simulated(2, 1);
    let write = |block: u64, epoch: u64, sequence: u64, previous_checksum: u32| {
        let header = RecordHeader {
            filesystem: config.filesystem,
            epoch,
            sequence: JournalSequence(sequence),
            known_flushed: JournalSequence(0),
            previous_checksum,
            payload_bytes: 0,
            entry_count: 0,
        };
        let (mut bytes, checksum) = header.encode(&[]);
        bytes.resize(4096, 0);
        device.write(RING_START[0] + block * 4096, &bytes).unwrap();
        checksum
    };
    let first = write(0, 3, 1, 0);
    let second = write(1, 5, 2, first);
    write(2, 4, 3, second);
    write(9, 8, 1, 0);
    let log = read_log(&config, &first_checkpoint()).unwrap();
    assert_eq!(log.records.len(), 2);
    assert_eq!(log.highest_epoch, 8);
    let mut later = first_checkpoint();
    later.epoch = 4;
    assert!(read_log(&config, &later).unwrap().records.is_empty());
}

proptest! {
    /// Whatever is in the ring: an answer, and never a record that was not written.
    #[test]
    fn any_ring_gives_an_answer(
        changes in proptest::collection::vec((0u64..32 * 4096, any::<u8>(), 1u64..200), 0..12),
        first_replay in prop_oneof![1u64..8, any::<u64>()],
        offset in prop_oneof![(0u64..32).prop_map(|block| block * 4096), any::<u64>()],
    ) {
        let (device, config) = six_records();
        for (offset, value, length) in changes {
            let length = length.min(32 * 4096 - offset);
            for start in RING_START {
                device.corrupt(start + offset, length, |_, bytes| bytes.fill(value));
            }
        }
        let mut from = first_checkpoint();
        if let Ok(log) = read_log(&config, &from) {
            let read = log_numbers(&log);
            prop_assert_eq!(&read[..], &[2, 3, 4, 5, 6][..read.len()]);
            log.start(&from, &from).unwrap();
        }
        (from.first_replay, from.first_replay_offset) = (first_replay, offset);
        if let Ok(log) = read_log(&config, &from) {
            let start = log.start(&from, &from).unwrap();
            let _ = Journal::open(config, start, Env::simulated(1), Default::default());
        }
    }
}
