//! Damaged and hostile images: errors, never panics, never endless walks.

use super::world::*;
use super::*;
use crate::btree::image::{self, encode_bset};
use crate::device::MemDevice;
use crate::format::checkpoint::Root;
use crate::format::node::{HEADER_BYTES, NodeAddress, NodeHeader};
use crate::units::DeviceIndex;
use proptest::prelude::*;

/// A valid image of a node with these keys; returns the pointer to it.
fn plant(device: &dyn BlockDevice, level: u8, offset: u64, keys: &[(Position, Value)]) -> NodePointer {
    let node = NodeId(77);
    let header = NodeHeader {
        filesystem: uuid::Uuid::from_u128(7),
        node,
        device: DeviceIndex(0),
        address: offset,
        btree: BtreeId::Extents,
        level,
        newest_sequence: JournalSequence(1),
        minimum: Position::MIN,
        limit: None,
    };
    let keys = keys.iter().map(|(position, value)| (*position, Some(&**value)));
    let bset = encode_bset(node, 0, 0, JournalSequence(1), keys);
    let mut bytes = header.encode();
    bytes.extend_from_slice(&bset.bytes);
    let written_bytes = bytes.len() as u32;
    bytes.resize(image::append_offset(bytes.len()), 0);
    device.write(offset, &bytes).unwrap();
    let copies = [NodeAddress { device: DeviceIndex(0), offset }].into_iter().collect();
    NodePointer { node, written_bytes, bset_count: 1, last_checksum: bset.checksum, copies }
}

fn opening(pointer: &NodePointer, level: u8) -> Opening {
    let mut opening = Opening::empty();
    let mut encoded = Vec::new();
    pointer.encode(&mut encoded);
    opening.newest.roots = vec![Root { btree: BtreeId::Extents as u8, level, pointer: encoded }];
    opening
}

fn open(device: &Arc<MemDevice>, opening: &Opening) -> Result<World> {
    let device = Arc::clone(device) as Arc<dyn BlockDevice>;
    World::open(device, Arc::new(superblock(SIZE_BYTES, 2)), Arc::default(), opening, 2, 1 << 20, Env::simulated(1))
}

#[test]
fn a_node_that_is_its_own_child_is_damage() {
    let device = Arc::new(MemDevice::new(SIZE_BYTES));
    // The pointer to itself cannot have the right checksum of itself: so verification already ends the descent.
    let address = [NodeAddress { device: DeviceIndex(0), offset: 16 << 20 }].into_iter().collect();
    let itself = NodePointer { node: NodeId(77), written_bytes: 300, bset_count: 1, last_checksum: 1, copies: address };
    let mut value = Vec::new();
    itself.encode(&mut value);
    let pointer = plant(&*device, 3, 16 << 20, &[(Position::MIN, Value::from(value))]);
    let world = open(&device, &opening(&pointer, 3)).unwrap();
    assert!(matches!(world.forest.get(BtreeId::Extents, Position::MIN), Err(Error::Corrupt(_))));
    let mut visited = 0;
    walk_published(&world.reader(), &opening(&pointer, 3).newest, &mut |_| {
        visited += 1;
        Ok(())
    })
    .unwrap();
    assert_eq!(visited, 2);
}

#[test]
fn hostile_roots_are_damage() {
    let device = Arc::new(MemDevice::new(SIZE_BYTES));
    let pointer = plant(&*device, 0, 16 << 20, &[(Position::MIN, value(1, 20))]);
    assert!(open(&device, &opening(&pointer, 0)).is_ok());
    let corrupt = |opening: &Opening| matches!(open(&device, opening), Err(Error::Corrupt(_)));
    assert!(corrupt(&opening(&pointer, 200)), "level");
    assert!(corrupt(&opening(&pointer, 1)), "another level");
    let mut odd = pointer.clone();
    odd.copies[0].offset += 512;
    assert!(corrupt(&opening(&odd, 0)), "not a slot");
    odd.copies[0].offset = !8191;
    assert!(corrupt(&opening(&odd, 0)), "beyond the device");
    odd.copies[0] = NodeAddress { device: DeviceIndex(9), offset: 16 << 20 };
    assert!(corrupt(&opening(&odd, 0)), "no such device");
    let mut long = pointer.clone();
    long.written_bytes = u32::MAX;
    assert!(corrupt(&opening(&long, 0)), "longer than a slot");
    let mut none = pointer.clone();
    none.copies.clear();
    assert!(corrupt(&opening(&none, 0)), "no copies");
    let mut many = pointer.clone();
    many.bset_count = u16::MAX;
    assert!(corrupt(&opening(&many, 0)), "more bsets than there are");
    // An interior node must begin with a child for its smallest position.
    let mut child = Vec::new();
    pointer.encode(&mut child);
    let late = plant(&*device, 1, 17 << 20, &[(Position::new(5, 0, 0), Value::from(child))]);
    assert!(corrupt(&opening(&late, 1)), "a gap before the first child");
    let junk = plant(&*device, 1, 18 << 20, &[(Position::MIN, value(1, 30))]);
    assert!(corrupt(&opening(&junk, 1)), "children that are not pointers");
}

#[test]
fn damage_to_the_checkpoint_area_costs_replay_only() {
    use crate::format::checkpoint::{RECORD_SLOT_BYTES, RECORD_SLOTS};
    let device = Arc::new(MemDevice::new(SIZE_BYTES));
    let world = World::new(Arc::clone(&device) as Arc<dyn BlockDevice>, 2, 1 << 20);
    for round in 0..4u64 {
        for index in 0..400u64 {
            world.commit(vec![(BtreeId::Extents, Position::new(index, 0, 0), Some(value(round * 1000 + index, 100)))]);
        }
        world.checkpoint();
    }
    let newest = world.reader().choose_checkpoint().unwrap().newest;
    let intact = device.image();
    let starts = [3u64 << 18, 8 << 18];
    let record = newest.number % RECORD_SLOTS * RECORD_SLOT_BYTES as u64;
    let page = RECORD_SLOTS * RECORD_SLOT_BYTES as u64 + u64::from(newest.map[0].place) * 4096;
    for (offset, copies, expected) in [(record, 1, 0), (record, 2, 1), (page, 1, 0), (page, 2, 1)] {
        let device = Arc::new(MemDevice::from_image(intact.clone(), false));
        for start in starts.iter().take(copies) {
            device.write(start + offset, &[0x5a; 4096]).unwrap();
        }
        let again = world.reopen(device, world.log.len()).unwrap();
        assert_eq!(again.reader().choose_checkpoint().unwrap().newest.number, newest.number - expected);
        again.assert_matches_log();
        again.checkpoint();
        again.assert_map_is_reachability();
        let third = again.reopen(Arc::clone(&again.device), again.log.len()).unwrap();
        third.assert_matches_log();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn flipped_bits_are_errors_or_repaired(flips in proptest::collection::vec((any::<u64>(), 0u8..8), 1..40)) {
        let device = Arc::new(MemDevice::new(SIZE_BYTES));
        let world = World::new(Arc::clone(&device) as Arc<dyn BlockDevice>, 2, 1 << 20);
        for index in 0..600u64 {
            world.commit(vec![(BtreeId::Extents, Position::new(index, 0, 0), Some(value(index, 100)))]);
            if index % 250 == 0 {
                world.checkpoint();
            }
        }
        world.checkpoint();
        let opening = world.reader().choose_checkpoint().unwrap();
        let mut used = Vec::new();
        walk_published(&world.reader(), &opening.newest, &mut |node| {
            used.extend(node.copies.iter().map(|(address, _)| (address.offset, u64::from(node.pointer.written_bytes))));
            Ok(())
        })
        .unwrap();
        for (place, bit) in flips {
            let (offset, bytes) = used[place as usize % used.len()];
            let at = offset + (place >> 16) % bytes;
            let mut block = vec![0; 512];
            device.read(at / 512 * 512, &mut block).unwrap();
            block[at as usize % 512] ^= 1 << bit;
            device.write(at / 512 * 512, &block).unwrap();
        }
        let model = world.model(BtreeId::Extents, world.log.len());
        if let Ok(again) = world.reopen(Arc::clone(&world.device), world.log.len()) {
            for (position, expected) in &model {
                match again.forest.get(BtreeId::Extents, *position) {
                    Ok(found) => prop_assert_eq!(found.as_ref(), Some(expected)),
                    Err(error) => prop_assert!(error.is_media_error()),
                }
            }
        }
        walk_published(&world.reader(), &opening.newest, &mut |_| Ok(())).unwrap();
    }

    #[test]
    fn decoding_arbitrary_nodes_never_panics(mut bytes in proptest::collection::vec(any::<u8>(), 168..6000), bsets in 0u16..4) {
        // A valid header, so that the bsets are looked at.
        let pointer = NodePointer {
            node: NodeId(77),
            written_bytes: bytes.len() as u32,
            bset_count: bsets,
            last_checksum: 0,
            copies: [NodeAddress { device: DeviceIndex(0), offset: 0 }].into_iter().collect(),
        };
        let device = MemDevice::new(1 << 20);
        plant(&device, 0, 0, &[]);
        device.read(0, &mut bytes[..0]).ok();
        let mut header = vec![0; 512];
        device.read(0, &mut header).unwrap();
        bytes[..HEADER_BYTES].copy_from_slice(&header[..HEADER_BYTES]);
        let expected = Expected { btree: BtreeId::Extents, level: 0, minimum: Position::MIN, limit: None };
        prop_assert!(image::decode(uuid::Uuid::from_u128(7), &bytes, &pointer, pointer.copies[0], &expected).is_err());
    }
}
