//! What is derived from the extents, after any history of changes, is a recount.

use proptest::prelude::*;

use super::*;

/// Kinds of extents that a step puts.
#[derive(Clone, Debug)]
enum Shape {
    Raw {
        blocks: u32,
        copies: usize,
    },
    /// A compressed frame, live in two parts with a gap of a block between them.
    Frame {
        disk_blocks: u32,
        first_blocks: u32,
        second_blocks: u32,
    },
    Unwritten {
        blocks: u32,
    },
    Inline {
        bytes: usize,
    },
}

#[derive(Clone, Debug)]
enum Step {
    Put(u64, Shape),
    Delete(u64),
    /// The extent at one place becomes one at another, same bytes: what trimming the end of an extent does.
    Move(u64, u64),
    /// The front is cut off: same key, later bytes.
    CutFront(u64),
}

fn steps() -> impl Strategy<Value = Vec<Vec<Step>>> {
    let shape = prop_oneof![
        4 => (1_u32..5, 1_usize..3).prop_map(|(blocks, copies)| Shape::Raw { blocks, copies }),
        2 => (1_u32..4, 1_u32..4, 1_u32..4).prop_map(|(disk_blocks, first_blocks, second_blocks)| {
            Shape::Frame { disk_blocks, first_blocks, second_blocks }
        }),
        1 => (1_u32..9).prop_map(|blocks| Shape::Unwritten { blocks }),
        1 => (1_usize..100).prop_map(|bytes| Shape::Inline { bytes }),
    ];
    let place = 0_u64..12;
    let step = prop_oneof![
        4 => (place.clone(), shape).prop_map(|(place, shape)| Step::Put(place, shape)),
        2 => place.clone().prop_map(Step::Delete),
        2 => (place.clone(), place.clone()).prop_map(|(from, to)| Step::Move(from, to)),
        1 => place.prop_map(Step::CutFront),
    ];
    proptest::collection::vec(proptest::collection::vec(step, 1..4), 1..40)
}

fn place(number: u64) -> Position {
    Position::new(1 + number / 4, (1 + number % 4) << 20, SnapshotId::ROOT.0)
}

/// Hands out distinct places on the device, in few buckets that are all usable.
struct Places {
    next: u64,
    buckets: Vec<u64>,
}

impl Places {
    fn pointer(&mut self, fixture: &Fixture, blocks: u32) -> ExtentPointer {
        let per_bucket = fixture.space.reserves().bucket_bytes / (4 * BLOCK_BYTES);
        assert!(blocks <= 4);
        let bucket = self.buckets[usize::try_from(self.next / per_bucket).unwrap() % self.buckets.len()];
        let offset = bucket * fixture.space.reserves().bucket_bytes + self.next % per_bucket * 4 * BLOCK_BYTES;
        self.next += 1;
        let generation = fixture.space.bucket((DeviceIndex(0), BucketIndex(bucket))).unwrap().generation;
        ExtentPointer { device: DeviceIndex(0), generation, offset }
    }
}

fn values(fixture: &Fixture, places: &mut Places, shape: &Shape) -> Vec<ExtentValue> {
    match *shape {
        Shape::Raw { blocks, copies } => {
            let length = blocks * BLOCK;
            let pointers = (0..copies).map(|_| places.pointer(fixture, blocks)).collect();
            let ExtentValue::Data(data) = raw(length, places.pointer(fixture, blocks), 1) else { unreachable!() };
            vec![ExtentValue::Data(DataExtent { pointers, ..data })]
        }
        Shape::Frame { disk_blocks, first_blocks, second_blocks } => {
            let pointer = places.pointer(fixture, disk_blocks);
            let part = |frame_offset: u32, blocks: u32| {
                ExtentValue::Data(DataExtent {
                    length: blocks * BLOCK,
                    pointers: smallvec![pointer],
                    compression: CompressionKind::Lz4,
                    disk_bytes: disk_blocks * BLOCK,
                    stream_bytes: disk_blocks * BLOCK - 5,
                    frame_bytes: 16 * BLOCK,
                    frame_offset,
                    checksum_kind: ChecksumKind::Crc32c,
                    checksums: vec![4],
                })
            };
            vec![part(0, first_blocks), part((first_blocks + 1) * BLOCK, second_blocks)]
        }
        Shape::Unwritten { blocks } => vec![ExtentValue::Unwritten { length: blocks * BLOCK }],
        Shape::Inline { bytes } => vec![ExtentValue::Inline(vec![7; bytes])],
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn derived_keys_are_a_recount(history in steps()) {
        let fixture = Fixture::new(Env::real(), TestSwitches::default());
        let usable = (100..200).filter(|bucket| !fixture.superblock.is_reserved(0, *bucket));
        let mut places = Places { next: 0, buckets: usable.collect() };
        // The test writes where it likes; the search must not have seen these buckets as free.
        let mark = DeviceUsage { untouched_from: 0 };
        prop_assert_eq!(fixture.keys(BtreeId::Devices).len(), usize::try_from(mark.untouched_from).unwrap());
        for steps in history {
            let prepared: Vec<_> = steps
                .iter()
                .map(|step| match step {
                    Step::Put(_, shape) => values(&fixture, &mut places, shape),
                    _ => Vec::new(),
                })
                .collect();
            fixture.transactions.run(CommitOptions::default(), |transaction| {
                for (step, values) in steps.iter().zip(&prepared) {
                    match *step {
                        Step::Put(number, _) => {
                            for (index, value) in (0..).zip(values) {
                                transaction.put(BtreeId::Extents, place((number + index) % 12), value.encode());
                            }
                        }
                        Step::Delete(number) => transaction.delete(BtreeId::Extents, place(number)),
                        Step::Move(from, to) => {
                            if let Some(value) = transaction.get(BtreeId::Extents, place(from))? {
                                transaction.delete(BtreeId::Extents, place(from));
                                transaction.put(BtreeId::Extents, place(to), value.to_vec());
                            }
                        }
                        Step::CutFront(number) => {
                            let value = transaction.get(BtreeId::Extents, place(number))?;
                            if let Some(ExtentValue::Data(mut data)) =
                                value.map(|value| ExtentValue::decode(&value)).transpose()?
                                && data.compression == CompressionKind::None
                                && data.length > BLOCK
                            {
                                data.length -= BLOCK;
                                (data.disk_bytes, data.stream_bytes, data.frame_bytes) = (data.length, data.length, data.length);
                                data.pointers.iter_mut().for_each(|pointer| pointer.offset += BLOCK_BYTES);
                                transaction.put(BtreeId::Extents, place(number), ExtentValue::Data(data).encode());
                            }
                        }
                    }
                }
                Ok(())
            }).unwrap();
        }
        // The free-space keys that were deleted on opening never existed, so only the rest is compared.
        fixture.check();
    }
}

#[test]
fn pointers_to_nowhere_are_damage() {
    let fixture = Fixture::new(Env::real(), TestSwitches::default());
    let member = &fixture.superblock.members[0];
    let put = |offset: u64, device: u8, blocks: u32| {
        let pointer = ExtentPointer { device: DeviceIndex(device), generation: 0, offset };
        fixture.transactions.run(CommitOptions::default(), |transaction| {
            transaction.put(BtreeId::Extents, place(0), raw(blocks * BLOCK, pointer, 1).encode());
            Ok(())
        })
    };
    for (offset, device, blocks) in [
        (0, 0, 1),
        (member.size_bytes, 0, 1),
        (u64::MAX - 4095, 0, 1),
        (200 << 16, 1, 1),
        ((200 << 16) + (60 << 10), 0, 2),
        (fixture.superblock.layout.journal[0].first << 16, 0, 1),
    ] {
        assert!(matches!(put(offset, device, blocks), Err(Error::Corrupt(_))), "{offset} of {device}");
    }
    fixture.check();
    put(200 << 16, 0, 2).unwrap();
    fixture.check();
}
