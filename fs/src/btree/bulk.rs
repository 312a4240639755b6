//! Building whole trees from sorted keys, for a rebuild: no journal, no cache, no transactions.
//!
//! **Guarantees.** Every leaf that is written holds all keys of its range, so that a scan that finds some of the nodes of an unfinished build finds
//! nothing that is wrong by itself. Only slots that the caller has called free are written. Nothing refers to the nodes until
//! [`BulkWriter::publish`] writes the checkpoint's record.
//!
//! Memory: one leaf, a batch of writes, and a pointer for each node. No locks.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use smallvec::SmallVec;

use super::image::{LEVEL_MAX, append_offset, encode_bset};
use super::node::{Limits, encode_pointer};
use super::reader::NodeReader;
use crate::device::WriteRequest;
use crate::error::{Error, Result};
use crate::format::checkpoint::{Checkpoint, MAP_PAGE_ENTRIES, MapEntry, Root};
use crate::format::key::packed_bytes;
use crate::format::node::{HEADER_BYTES, NodeAddress, NodeHeader, NodePointer};
use crate::format::{BtreeId, Position};
use crate::units::{DeviceIndex, JournalSequence, NodeId};

/// Bytes of images that are written together.
const WRITE_BATCH_BYTES: usize = 4 << 20;

/// A bucket that nodes may be written to, and which of its slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FreeSlots {
    /// Bucket of device 0.
    pub bucket: u64,
    /// Bit `i`: slot `i` may be written.
    pub slots: u64,
}

/// Slots in the order in which they are taken, for each half of the device: copies of a node lie far apart.
#[derive(Debug)]
struct SlotPool {
    halves: [VecDeque<FreeSlots>; 2],
    claimed: BTreeMap<u64, u64>,
}

impl SlotPool {
    /// Takes a slot in the wanted half, or else in the other, but not in the buckets of `taken`.
    fn take(&mut self, wanted: usize, taken: &BTreeSet<u64>) -> Option<(u64, u32)> {
        let order = if wanted == 0 { [0, 1] } else { [1, 0] };
        for half in order {
            let Some(queue) = self.halves.get_mut(half) else { continue };
            let Some(index) = queue.iter().position(|free| !taken.contains(&free.bucket)) else { continue };
            let Some(free) = queue.get_mut(index) else { continue };
            let slot = free.slots.trailing_zeros();
            let bucket = free.bucket;
            free.slots &= free.slots.wrapping_sub(1);
            if free.slots == 0 {
                queue.remove(index);
            }
            *self.claimed.entry(bucket).or_default() |= 1 << slot;
            return Some((bucket, slot));
        }
        None
    }
}

/// A node that was written, as its parent will hold it.
type Child = (Position, NodePointer);

/// An image on its way to the device.
struct Write {
    offset: u64,
    header: Vec<u8>,
    bset: std::sync::Arc<Vec<u8>>,
}

/// A tree that is being built.
struct Building {
    btree: BtreeId,
    /// The leaf that is being filled.
    keys: Vec<(Position, Vec<u8>)>,
    key_bytes: usize,
    /// Where the leaf that is being filled starts.
    minimum: Position,
    leaves: Vec<Child>,
}

/// See the module's documentation.
pub struct BulkWriter {
    reader: NodeReader,
    limits: Limits,
    bucket_bytes: u64,
    next_node: u64,
    sequence: JournalSequence,
    pool: SlotPool,
    building: Option<Building>,
    roots: Vec<Root>,
    writes: Vec<Write>,
    write_bytes: usize,
    node_count: u64,
}

impl BulkWriter {
    /// A writer of nodes with ids from `first_node` on, whose keys count as being of `sequence`, into `free`: ascending in preference.
    #[must_use]
    pub fn new(reader: NodeReader, free: &[FreeSlots], first_node: NodeId, sequence: JournalSequence) -> Self {
        let geometry = reader.superblock.geometry;
        let middle = reader.superblock.members.first().map_or(0, |member| member.bucket_count) / 2;
        let of_half = |half: usize| {
            free.iter().filter(|free| free.slots != 0 && usize::from(free.bucket >= middle) == half).copied().collect()
        };
        Self {
            limits: Limits::new(&geometry),
            bucket_bytes: geometry.bucket_bytes.into(),
            next_node: first_node.0,
            sequence,
            pool: SlotPool { halves: [of_half(0), of_half(1)], claimed: BTreeMap::new() },
            building: None,
            roots: Vec::new(),
            writes: Vec::new(),
            write_bytes: 0,
            node_count: 0,
            reader,
        }
    }

    /// Begins a tree.
    pub fn begin(&mut self, btree: BtreeId) {
        self.building =
            Some(Building { btree, keys: Vec::new(), key_bytes: 0, minimum: Position::MIN, leaves: Vec::new() });
    }

    /// Adds a key to the tree that was begun; keys come in ascending order.
    ///
    /// # Errors
    /// [`Error::NoSpace`] if there is no free slot; [`Error::Invalid`] for a key that is too long; [`Error::Bug`] for one that is out of order; the device's.
    pub fn push(&mut self, position: Position, value: Vec<u8>) -> Result<()> {
        // As full as a node that was split, filled again by half: room for appended bsets.
        let full_bytes = self.limits.capacity_bytes / 8 * 5;
        let bytes = packed_bytes(Some(&value));
        if bytes > self.limits.capacity_bytes {
            return Err(Error::Invalid(format!("{bytes} bytes of a key at {position} do not fit a node")));
        }
        let building = self.building.as_mut().ok_or_else(|| Error::Bug("no tree was begun".into()))?;
        if building.keys.last().is_some_and(|(last, _)| *last >= position) || position < building.minimum {
            return Err(Error::Bug(format!("key {position} of {} is out of order", building.btree.name())));
        }
        if !building.keys.is_empty() && building.key_bytes + bytes > full_bytes {
            self.end_leaf(Some(position))?;
        }
        if let Some(building) = self.building.as_mut() {
            building.keys.push((position, value));
            building.key_bytes += bytes;
        }
        Ok(())
    }

    /// Ends the tree that was begun. One without keys gets an empty leaf: what a scan finds of older ones does not count then.
    ///
    /// # Errors
    /// As [`Self::push`].
    pub fn end(&mut self) -> Result<()> {
        self.end_leaf(None)?;
        let Some(Building { btree, leaves, .. }) = self.building.take() else { return Ok(()) };
        let mut children = leaves;
        let mut level = 0;
        while children.len() > 1 {
            level += 1;
            if level >= LEVEL_MAX {
                return Err(Error::Bug(format!("the {} tree would have {level} levels", btree.name())));
            }
            children = self.parents(btree, level, &children)?;
        }
        if let Some((_, pointer)) = children.first() {
            self.roots.push(Root { btree: btree as u8, level, pointer: encode_pointer(pointer).to_vec() });
        }
        Ok(())
    }

    fn end_leaf(&mut self, limit: Option<Position>) -> Result<()> {
        let Some(building) = self.building.as_mut() else { return Ok(()) };
        let keys = std::mem::take(&mut building.keys);
        building.key_bytes = 0;
        let (btree, minimum) = (building.btree, building.minimum);
        if let Some(limit) = limit {
            building.minimum = limit;
        }
        let pointer = self.node(btree, 0, minimum, limit, &keys)?;
        if let Some(building) = self.building.as_mut() {
            building.leaves.push((minimum, pointer));
        }
        Ok(())
    }

    fn parents(&mut self, btree: BtreeId, level: u8, children: &[Child]) -> Result<Vec<Child>> {
        let each = packed_bytes(None) + self.limits.pointer_bytes;
        let fan_out = (self.limits.capacity_bytes / 8 * 5 / each).max(2);
        let groups: Vec<&[Child]> = children.chunks(fan_out).collect();
        let mut parents = Vec::with_capacity(groups.len());
        for (index, group) in groups.iter().enumerate() {
            let Some((minimum, _)) = group.first() else { continue };
            let limit = groups.get(index + 1).and_then(|next| next.first()).map(|(next, _)| *next);
            let keys: Vec<_> = group.iter().map(|(at, child)| (*at, encode_pointer(child).to_vec())).collect();
            parents.push((*minimum, self.node(btree, level, *minimum, limit, &keys)?));
        }
        Ok(parents)
    }

    /// Writes a node: all its copies.
    fn node(
        &mut self,
        btree: BtreeId,
        level: u8,
        minimum: Position,
        limit: Option<Position>,
        keys: &[(Position, Vec<u8>)],
    ) -> Result<NodePointer> {
        let node = NodeId(self.next_node);
        self.next_node += 1;
        let packed = keys.iter().map(|(position, value)| (*position, Some(value.as_slice())));
        let encoded = encode_bset(node, 0, 0, self.sequence, packed);
        let written = HEADER_BYTES + encoded.bytes.len();
        if written > self.limits.node_bytes {
            return Err(Error::Bug(format!("a node of {written} bytes")));
        }
        let mut bytes = encoded.bytes;
        bytes.resize(append_offset(written) - HEADER_BYTES, 0);
        let bset = std::sync::Arc::new(bytes);
        let mut copies: SmallVec<[NodeAddress; 2]> = SmallVec::new();
        let mut taken = BTreeSet::new();
        for copy in 0..self.limits.copies {
            let (bucket, slot) = self
                .pool
                .take(copy % 2, &taken)
                .ok_or(Error::NoSpace("there are too few buckets without data or nodes that are still needed"))?;
            taken.insert(bucket);
            let offset = bucket * self.bucket_bytes + u64::from(slot) * self.limits.node_bytes as u64;
            let address = NodeAddress { device: DeviceIndex(0), offset };
            copies.push(address);
            let header = NodeHeader {
                filesystem: self.reader.superblock.filesystem,
                node,
                device: address.device,
                address: offset,
                btree,
                level,
                newest_sequence: self.sequence,
                minimum,
                limit,
            };
            self.write_bytes += HEADER_BYTES + bset.len();
            self.writes.push(Write { offset, header: header.encode(), bset: std::sync::Arc::clone(&bset) });
        }
        self.node_count += 1;
        if self.write_bytes >= WRITE_BATCH_BYTES {
            self.write_batch()?;
        }
        Ok(NodePointer {
            node,
            // Below a slot, which is at most 1 MiB.
            written_bytes: u32::try_from(written).unwrap_or(u32::MAX),
            bset_count: 1,
            last_checksum: encoded.checksum,
            copies,
        })
    }

    fn write_batch(&mut self) -> Result<()> {
        let requests: Vec<WriteRequest<'_>> = self
            .writes
            .iter()
            .map(|write| WriteRequest { offset: write.offset, data: vec![&write.header, &write.bset] })
            .collect();
        if let Some(device) = self.reader.devices.first()
            && !requests.is_empty()
        {
            device.write_batch(&requests)?;
        }
        self.writes.clear();
        self.write_bytes = 0;
        Ok(())
    }

    /// Makes sure that so many more nodes can be written with no further bucket, so that the buckets are known before the trees that list them are
    /// built.
    ///
    /// # Errors
    /// [`Error::NoSpace`].
    pub fn claim_for(&mut self, nodes: usize) -> Result<()> {
        // Either half may have to take all copies, and one more bucket keeps the copies of the last node apart.
        for queue in &self.pool.halves {
            let mut slots = 0;
            let mut spare = 1;
            for free in queue {
                if slots >= nodes * self.limits.copies {
                    if spare == 0 {
                        break;
                    }
                    spare -= 1;
                }
                slots += free.slots.count_ones() as usize;
                self.pool.claimed.entry(free.bucket).or_default();
            }
        }
        let total: u32 = self.pool.halves.iter().flatten().map(|free| free.slots.count_ones()).sum();
        if (total as usize) < nodes * self.limits.copies {
            return Err(Error::NoSpace("there are too few buckets without data or nodes that are still needed"));
        }
        Ok(())
    }

    /// The buckets of device 0 that have nodes, or were claimed for them.
    #[must_use]
    pub fn buckets(&self) -> Vec<u64> {
        self.pool.claimed.keys().copied().collect()
    }

    /// Number of nodes that were written, each counted once.
    #[must_use]
    pub fn node_count(&self) -> u64 {
        self.node_count
    }

    /// The id of the next node.
    #[must_use]
    pub fn next_node(&self) -> NodeId {
        NodeId(self.next_node)
    }

    /// Packed bytes of keys that a node is filled with at most.
    #[must_use]
    pub fn filled_bytes(&self) -> usize {
        self.limits.capacity_bytes / 8 * 5
    }

    /// Writes what is left of the nodes, and makes all of them durable.
    ///
    /// # Errors
    /// The device's.
    pub fn finish_nodes(&mut self) -> Result<()> {
        self.write_batch()?;
        self.reader.flush()
    }

    /// Publishes the trees: `checkpoint` gets their roots and the map. What other records the area had is gone then, since nothing of what they
    /// name is kept. Durable when it returns.
    ///
    /// # Errors
    /// The device's.
    pub fn publish(mut self, mut checkpoint: Checkpoint) -> Result<Checkpoint> {
        self.finish_nodes()?;
        let entries: Vec<MapEntry> =
            self.pool.claimed.iter().map(|(&bucket, &used)| MapEntry { device: 0, bucket, used }).collect();
        let pages: Vec<Vec<MapEntry>> = entries.chunks(MAP_PAGE_ENTRIES).map(<[MapEntry]>::to_vec).collect();
        self.reader.erase_records()?;
        self.reader.flush()?;
        checkpoint.map = self.reader.write_map(&pages, &[], &[], &[])?;
        checkpoint.roots = std::mem::take(&mut self.roots);
        checkpoint.next_node = self.next_node;
        self.reader.flush()?;
        self.reader.write_record(&checkpoint)?;
        self.reader.flush()?;
        Ok(checkpoint)
    }
}
