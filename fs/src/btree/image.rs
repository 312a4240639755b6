//! Images of nodes: encoding a full one or an appended bset, decoding and verifying one. Pure functions over bytes.

use super::node::encode_pointer;
use super::run::Run;
use crate::error::Corruption;
use crate::format::key::{pack, unpack};
use crate::format::node::{APPEND_ALIGNMENT_BYTES, BsetHeader, HEADER_BYTES, NodeAddress, NodeHeader, NodePointer};
use crate::format::{BtreeId, Position};
use crate::units::{JournalSequence, NodeId};

/// Trees are never deeper: interior nodes hold at least 2 children, in practice hundreds.
pub(super) const LEVEL_MAX: u8 = 12;

/// What whoever points to a node knows about it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Expected {
    pub btree: BtreeId,
    pub level: u8,
    pub minimum: Position,
    pub limit: Option<Position>,
}

/// A verified image, clipped to the expected range.
#[derive(Debug)]
pub(super) struct Image {
    pub run: Run,
    /// Newest journal sequence of its keys.
    pub newest: JournalSequence,
}

/// One bset with the checksum that the next one chains to.
#[derive(Debug)]
pub(super) struct EncodedBset {
    pub bytes: Vec<u8>,
    pub checksum: u32,
}

/// Encodes a bset of keys in ascending order.
pub(super) fn encode_bset<'a>(
    node: NodeId,
    index: u16,
    previous_checksum: u32,
    newest_sequence: JournalSequence,
    keys: impl Iterator<Item = (Position, Option<&'a [u8]>)>,
) -> EncodedBset {
    let mut payload = Vec::new();
    let mut key_count = 0;
    for (position, value) in keys {
        pack(position, value, &mut payload);
        key_count += 1;
    }
    let header = BsetHeader {
        node,
        index,
        previous_checksum,
        key_count,
        // A bset is smaller than its node, which is at most 1 MiB.
        payload_bytes: u32::try_from(payload.len()).unwrap_or(u32::MAX),
        newest_sequence,
    };
    let (bytes, checksum) = header.encode(&payload);
    EncodedBset { bytes, checksum }
}

/// Rounds up to where the next bset starts.
pub(super) fn append_offset(written_bytes: usize) -> usize {
    written_bytes.next_multiple_of(APPEND_ALIGNMENT_BYTES)
}

/// Decodes and verifies the copy of a node at `address`: `bytes` are the slot's, from its start, at least `pointer.written_bytes`.
///
/// # Errors
/// Says what is not as the pointer and `expected` say.
pub(super) fn decode(
    filesystem: uuid::Uuid,
    bytes: &[u8],
    pointer: &NodePointer,
    address: NodeAddress,
    expected: &Expected,
) -> Result<Image, Corruption> {
    let bad = |problem: String| {
        let what = format!("node {} of the {} tree, level {}", pointer.node, expected.btree.name(), expected.level);
        Err(Corruption::new(what, problem).at(address.device, address.offset))
    };
    let Some(bytes) = bytes.get(..pointer.written_bytes as usize) else {
        return bad(format!("{} bytes, {} in the pointer", bytes.len(), pointer.written_bytes));
    };
    let header = match NodeHeader::decode(bytes) {
        Ok(header) => header,
        Err(corruption) => return bad(corruption.to_string()),
    };
    if header.filesystem != filesystem {
        return bad("of another filesystem".into());
    }
    if (header.device, header.address) != (address.device, address.offset) {
        return bad(format!("it says that it lies at byte {} of device {}", header.address, header.device));
    }
    if (header.node, header.btree, header.level) != (pointer.node, expected.btree, expected.level) {
        let found = format!("node {} of the {} tree, level {}", header.node, header.btree.name(), header.level);
        return bad(format!("{found} lies there"));
    }
    let covers_limit = match (header.limit, expected.limit) {
        (None, _) => true,
        (Some(_), None) => false,
        (Some(header), Some(expected)) => header >= expected,
    };
    if header.minimum != expected.minimum || !covers_limit {
        return bad(format!("its range starts at {} and does not cover its parent's", header.minimum));
    }

    let mut keys: Vec<(Position, u16, Option<&[u8]>)> = Vec::new();
    let mut newest = JournalSequence(0);
    let mut offset = HEADER_BYTES;
    let mut previous_checksum = 0;
    for index in 0..pointer.bset_count {
        if index > 0 {
            offset = append_offset(offset);
        }
        let Some(rest) = bytes.get(offset..) else { return bad(format!("bset {index} would start beyond its end")) };
        let (bset, mut payload, checksum) = match BsetHeader::decode(rest) {
            Ok(decoded) => decoded,
            Err(corruption) => return bad(corruption.to_string()),
        };
        if (bset.node, bset.index, bset.previous_checksum) != (pointer.node, index, previous_checksum) {
            return bad(format!("bset {index} is bset {} of node {}, or of an earlier life", bset.index, bset.node));
        }
        offset += BsetHeader::BYTES + payload.len();
        let mut last = None;
        let mut count = 0u32;
        while !payload.is_empty() {
            let (key, rest) = match unpack(payload) {
                Ok(unpacked) => unpacked,
                Err(corruption) => return bad(format!("bset {index}: {corruption}")),
            };
            payload = rest;
            count += 1;
            if last.is_some_and(|last| last >= key.position) {
                return bad(format!("bset {index}: key {} is out of order", key.position));
            }
            last = Some(key.position);
            if key.position < header.minimum || header.limit.is_some_and(|limit| key.position >= limit) {
                return bad(format!("bset {index}: key {} is outside of the node", key.position));
            }
            if expected.limit.is_none_or(|limit| key.position < limit) {
                keys.push((key.position, index, key.value));
            }
        }
        if count != bset.key_count {
            return bad(format!("bset {index} has {count} keys, {} by its header", bset.key_count));
        }
        newest = newest.max(bset.newest_sequence);
        previous_checksum = checksum;
    }
    if pointer.bset_count == 0 || offset != bytes.len() || previous_checksum != pointer.last_checksum {
        let found = format!("{} bsets end at byte {offset} with checksum {previous_checksum:#x}", pointer.bset_count);
        return bad(format!("{found}; its pointer says {} and {:#x}", bytes.len(), pointer.last_checksum));
    }

    // Presorted stretches: the sort is a merge. Of equal positions the newest bset's comes first.
    keys.sort_by(|a, b| (a.0, b.1).cmp(&(b.0, a.1)));
    let mut run = Run::default();
    let mut done = None;
    for (position, _, value) in keys {
        if done == Some(position) {
            continue;
        }
        done = Some(position);
        if let Some(value) = value {
            if expected.level > 0 {
                let child = match NodePointer::decode(value) {
                    Ok(child) => child,
                    Err(corruption) => return bad(format!("key {position}: {corruption}")),
                };
                if child.copies.is_empty() || child.node == NodeId(0) {
                    return bad(format!("key {position} points to no node"));
                }
            }
            run.push(position, value);
        }
    }
    if expected.level > 0 && run.key(0).map(|(first, _)| first) != Some(expected.minimum) {
        return bad("its first child does not start where it starts".into());
    }
    run.shrink();
    Ok(Image { run, newest })
}

/// Checks that what a pointer says can be true on a device of this size, before anything is read by it.
///
/// # Errors
/// Says what cannot.
pub(super) fn check_pointer(pointer: &NodePointer, node_bytes: u64, device_bytes: &[u64]) -> Result<(), Corruption> {
    let bad = |problem: String| Err(Corruption::new(format!("pointer to node {}", pointer.node), problem));
    let written = u64::from(pointer.written_bytes);
    if pointer.node == NodeId(0) || pointer.copies.is_empty() {
        return bad("it points to no node".into());
    }
    if written < (HEADER_BYTES + BsetHeader::BYTES) as u64 || written > node_bytes {
        return bad(format!("{written} bytes in a slot of {node_bytes}"));
    }
    for copy in &pointer.copies {
        let size = device_bytes.get(usize::from(copy.device.0)).copied().unwrap_or(0);
        let end = copy.offset.checked_add(node_bytes);
        if copy.offset % node_bytes != 0 || end.is_none_or(|end| end > size) {
            return bad(format!("byte {} of device {} cannot be a slot", copy.offset, copy.device));
        }
    }
    Ok(())
}

/// Whether an encoded pointer is this one.
pub(super) fn is_pointer(bytes: &[u8], pointer: &NodePointer) -> bool {
    *encode_pointer(pointer) == *bytes
}
