//! Images of nodes: encoding a full one or an appended bset, decoding and verifying one. Pure functions over bytes.

use super::node::encode_pointer;
use super::run::Run;
use crate::error::Corruption;
use crate::format::key::{PackedKeyHeader, pack, unpack};
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

/// Checks the header of the copy of a node at `address`, and gives it with the published bytes. The problem is for [`damage`].
fn check_header<'b>(
    filesystem: uuid::Uuid,
    bytes: &'b [u8],
    pointer: &NodePointer,
    address: NodeAddress,
    expected: &Expected,
) -> Result<(NodeHeader, &'b [u8]), String> {
    let Some(bytes) = bytes.get(..pointer.written_bytes as usize) else {
        return Err(format!("{} bytes, {} in the pointer", bytes.len(), pointer.written_bytes));
    };
    let header = NodeHeader::decode(bytes).map_err(|corruption| corruption.to_string())?;
    if header.filesystem != filesystem {
        return Err("of another filesystem".into());
    }
    if (header.device, header.address) != (address.device, address.offset) {
        return Err(format!("it says that it lies at byte {} of device {}", header.address, header.device));
    }
    if (header.node, header.btree, header.level) != (pointer.node, expected.btree, expected.level) {
        let found = format!("node {} of the {} tree, level {}", header.node, header.btree.name(), header.level);
        return Err(format!("{found} lies there"));
    }
    let covers_limit = match (header.limit, expected.limit) {
        (None, _) => true,
        (Some(_), None) => false,
        (Some(header), Some(expected)) => header >= expected,
    };
    if header.minimum != expected.minimum || !covers_limit {
        return Err(format!("its range starts at {} and does not cover its parent's", header.minimum));
    }
    Ok((header, bytes))
}

fn damage(pointer: &NodePointer, address: NodeAddress, expected: &Expected, problem: String) -> Corruption {
    let what = format!("node {} of the {} tree, level {}", pointer.node, expected.btree.name(), expected.level);
    Corruption::new(what, problem).at(address.device, address.offset)
}

/// Verifies a further copy of a node, of which another was decoded from `good`: beside what names their places, copies are the same.
///
/// # Errors
/// As [`decode`].
pub(super) fn verify_twin(
    filesystem: uuid::Uuid,
    bytes: &[u8],
    good: &[u8],
    pointer: &NodePointer,
    address: NodeAddress,
    expected: &Expected,
) -> Result<(), Corruption> {
    let published = HEADER_BYTES..pointer.written_bytes as usize;
    if bytes.get(published.clone()) != good.get(published) {
        return decode_in_place(filesystem, bytes, pointer, address, expected).map(|_| ());
    }
    match check_header(filesystem, bytes, pointer, address, expected) {
        Ok(_) => Ok(()),
        Err(problem) => Err(damage(pointer, address, expected, problem)),
    }
}

/// The keys of a verified image, clipped to the expected range: where their values lie in its bytes.
#[derive(Debug, Default)]
pub(super) struct Decoded {
    pub keys: Vec<(Position, Span)>,
    /// Newest journal sequence of the keys.
    pub newest: JournalSequence,
}

/// A value's bytes in an image: the first, and the first beyond. Images are at most 1 MiB.
pub(super) type Span = (u32, u32);

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
    let Decoded { keys, newest } = decode_in_place(filesystem, bytes, pointer, address, expected)?;
    let mut run = Run::with_capacity(keys.len(), keys.iter().map(|(_, (start, end))| (end - start) as usize).sum());
    for (position, (start, end)) in keys {
        run.push(position, bytes.get(start as usize..end as usize).unwrap_or_default());
    }
    Ok(Image { run, newest })
}

/// As [`decode`], with the values left where they are.
///
/// # Errors
/// As [`decode`].
pub(super) fn decode_in_place(
    filesystem: uuid::Uuid,
    bytes: &[u8],
    pointer: &NodePointer,
    address: NodeAddress,
    expected: &Expected,
) -> Result<Decoded, Corruption> {
    let bad = |problem: String| damage(pointer, address, expected, problem);
    let (header, bytes) = check_header(filesystem, bytes, pointer, address, expected).map_err(bad)?;
    let mut bsets = Bsets { offset: HEADER_BYTES, previous_checksum: 0, newest: JournalSequence(0), keys: Vec::new() };
    for index in 0..pointer.bset_count {
        bsets.add(bytes, pointer.node, index, &header, expected.limit).map_err(bad)?;
    }
    let Bsets { offset, previous_checksum, newest, mut keys } = bsets;
    if pointer.bset_count == 0 || offset != bytes.len() || previous_checksum != pointer.last_checksum {
        let found = format!("{} bsets end at byte {offset} with checksum {previous_checksum:#x}", pointer.bset_count);
        let problem = format!("{found}; its pointer says {} and {:#x}", bytes.len(), pointer.last_checksum);
        return Err(bad(problem));
    }
    if pointer.bset_count > 1 {
        // Presorted stretches: the sort is a merge. Of equal positions the newest bset's comes first, and decides.
        keys.sort_by(|a, b| (a.0, b.1).cmp(&(b.0, a.1)));
        keys.dedup_by_key(|(position, ..)| *position);
    }
    let keys: Vec<(Position, Span)> =
        keys.into_iter().filter_map(|(position, _, value)| value.map(|value| (position, value))).collect();
    if expected.level > 0 {
        check_children(bytes, &keys, expected).map_err(bad)?;
    }
    Ok(Decoded { keys, newest })
}

/// What the bsets of an image hold, as far as they were looked at.
struct Bsets {
    /// Where the last one ends.
    offset: usize,
    previous_checksum: u32,
    newest: JournalSequence,
    /// Position, bset, and where the value lies; `None` for a whiteout.
    keys: Vec<(Position, u16, Option<Span>)>,
}

impl Bsets {
    /// Verifies the next bset, and adds its keys below `limit`.
    fn add(
        &mut self,
        bytes: &[u8],
        node: NodeId,
        index: u16,
        header: &NodeHeader,
        limit: Option<Position>,
    ) -> Result<(), String> {
        if index > 0 {
            self.offset = append_offset(self.offset);
        }
        let rest = bytes.get(self.offset..).ok_or_else(|| format!("bset {index} would start beyond its end"))?;
        let (bset, mut payload, checksum) = BsetHeader::decode(rest).map_err(|corruption| corruption.to_string())?;
        if (bset.node, bset.index, bset.previous_checksum) != (node, index, self.previous_checksum) {
            return Err(format!("bset {index} is bset {} of node {}, or of an earlier life", bset.index, bset.node));
        }
        self.offset += BsetHeader::BYTES + payload.len();
        // No key is shorter than its header: a forged count reserves no more than the payload could hold.
        self.keys.reserve((bset.key_count as usize).min(payload.len() / PackedKeyHeader::BYTES));
        let mut last = None;
        let mut count = 0u32;
        while !payload.is_empty() {
            let (key, rest) = unpack(payload).map_err(|corruption| format!("bset {index}: {corruption}"))?;
            payload = rest;
            count += 1;
            if last.is_some_and(|last| last >= key.position) {
                return Err(format!("bset {index}: key {} is out of order", key.position));
            }
            last = Some(key.position);
            if key.position < header.minimum || header.limit.is_some_and(|limit| key.position >= limit) {
                return Err(format!("bset {index}: key {} is outside of the node", key.position));
            }
            if limit.is_none_or(|limit| key.position < limit) {
                // The value ends where the rest begins.
                let end = (self.offset - payload.len()) as u32;
                let span = key.value.map(|value| (end - value.len() as u32, end));
                self.keys.push((key.position, index, span));
            }
        }
        if count != bset.key_count {
            return Err(format!("bset {index} has {count} keys, {} by its header", bset.key_count));
        }
        self.newest = self.newest.max(bset.newest_sequence);
        self.previous_checksum = checksum;
        Ok(())
    }
}

/// Checks that the keys of an interior node point to children.
fn check_children(bytes: &[u8], keys: &[(Position, Span)], expected: &Expected) -> Result<(), String> {
    for (position, (start, end)) in keys {
        let value = bytes.get(*start as usize..*end as usize).unwrap_or_default();
        let child = NodePointer::decode(value).map_err(|corruption| format!("key {position}: {corruption}"))?;
        if child.copies.is_empty() || child.node == NodeId(0) {
            return Err(format!("key {position} points to no node"));
        }
    }
    if keys.first().map(|(first, _)| *first) != Some(expected.minimum) {
        return Err("its first child does not start where it starts".into());
    }
    Ok(())
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
