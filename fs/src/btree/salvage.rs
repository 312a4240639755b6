//! Images of nodes that nothing is known to point to: what a scan of a device finds in a slot. Pure functions over bytes, no locks.
//!
//! A pointer says how many bsets of an image are published. Without one the chain itself must say it: bsets are taken for as long as each is whole, of
//! this node, next in index, and names the checksum of the one before. The last may belong to a checkpoint that a power cut ended; whoever has the
//! pointer passes its number of bsets.

use std::collections::BTreeMap;

use smallvec::SmallVec;

use super::image::append_offset;
use crate::error::Corruption;
use crate::format::key::{PackedKey, unpack};
use crate::format::node::{BsetHeader, HEADER_BYTES, NODE_MAGIC, NodeHeader};
use crate::format::{Position, Value};
use crate::units::JournalSequence;

/// A node image that was found whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeSummary {
    /// Its header.
    pub header: NodeHeader,
    /// For each bset, in order, the newest journal sequence of its keys.
    pub bset_sequences: SmallVec<[JournalSequence; 4]>,
    /// Checksum of the last bset.
    pub last_checksum: u32,
    /// Bytes of the slot up to the end of the last bset.
    pub written_bytes: u32,
}

impl NodeSummary {
    /// Newest journal sequence of the first `bset_count` bsets.
    #[must_use]
    pub fn newest(&self, bset_count: usize) -> JournalSequence {
        self.bset_sequences.iter().take(bset_count).copied().max().unwrap_or_default()
    }

    /// Number of bsets.
    #[must_use]
    pub fn bset_count(&self) -> usize {
        self.bset_sequences.len()
    }
}

/// Whether a slot starts like a node: cheap, for scans.
#[must_use]
pub fn may_be_node(bytes: &[u8]) -> bool {
    bytes.starts_with(&NODE_MAGIC.to_le_bytes())
}

/// Reads the image at the start of `bytes`, a slot or more: its header and as much of its chain as is whole.
///
/// # Errors
/// If the header or the first bset is damaged, or its keys mean nothing.
pub fn summarise(bytes: &[u8]) -> Result<NodeSummary, Corruption> {
    let header = NodeHeader::decode(bytes)?;
    let mut summary =
        NodeSummary { header, bset_sequences: SmallVec::new(), last_checksum: 0, written_bytes: HEADER_BYTES as u32 };
    let mut problem = None;
    while summary.bset_sequences.len() < usize::from(u16::MAX) {
        match next_bset(bytes, &summary) {
            Ok((bset, payload, checksum)) => {
                if let Err(error) = each_key(&summary.header, &bset, payload, &mut |_| ()) {
                    problem = Some(error);
                    break;
                }
                let end = bset_offset(&summary) + BsetHeader::BYTES + payload.len();
                summary.bset_sequences.push(bset.newest_sequence);
                summary.last_checksum = checksum;
                // Inside `bytes`, of which a slot is 1 MiB at most; a caller with more than 4 GiB finds the chain to end.
                summary.written_bytes = u32::try_from(end).unwrap_or(u32::MAX);
            }
            Err(error) => {
                problem = Some(error);
                break;
            }
        }
    }
    match problem {
        Some(problem) if summary.bset_sequences.is_empty() => Err(problem),
        _ => Ok(summary),
    }
}

/// The keys of an image's first `bset_count` bsets in `[from, to)`, ascending, newest values, whiteouts left out.
///
/// # Errors
/// If fewer bsets are whole: `bytes` are not what was summarised.
pub fn salvage_keys(
    bytes: &[u8],
    bset_count: usize,
    from: Position,
    to: Option<Position>,
) -> Result<Vec<(Position, Value)>, Corruption> {
    let header = NodeHeader::decode(bytes)?;
    let mut summary =
        NodeSummary { header, bset_sequences: SmallVec::new(), last_checksum: 0, written_bytes: HEADER_BYTES as u32 };
    let mut newest: BTreeMap<Position, Option<Value>> = BTreeMap::new();
    for _ in 0..bset_count {
        let (bset, payload, checksum) = next_bset(bytes, &summary)?;
        each_key(&summary.header, &bset, payload, &mut |key| {
            if key.position >= from && to.is_none_or(|to| key.position < to) {
                newest.insert(key.position, key.value.map(Value::from));
            }
        })?;
        let end = bset_offset(&summary) + BsetHeader::BYTES + payload.len();
        summary.bset_sequences.push(bset.newest_sequence);
        summary.last_checksum = checksum;
        summary.written_bytes = u32::try_from(end).unwrap_or(u32::MAX);
    }
    Ok(newest.into_iter().filter_map(|(position, value)| Some((position, value?))).collect())
}

/// Where the bset behind those in the summary starts.
fn bset_offset(summary: &NodeSummary) -> usize {
    match summary.bset_sequences.len() {
        0 => HEADER_BYTES,
        _ => append_offset(summary.written_bytes as usize),
    }
}

fn next_bset<'a>(bytes: &'a [u8], summary: &NodeSummary) -> Result<(BsetHeader, &'a [u8], u32), Corruption> {
    let index = summary.bset_sequences.len();
    let what = || format!("bset {index} of node {}", summary.header.node);
    let rest = bytes.get(bset_offset(summary)..).ok_or_else(|| Corruption::new(what(), "the slot ends before it"))?;
    let (bset, payload, checksum) = BsetHeader::decode(rest)?;
    if (bset.node, usize::from(bset.index), bset.previous_checksum)
        != (summary.header.node, index, summary.last_checksum)
    {
        return Err(Corruption::new(what(), format!("bset {} of node {} lies there", bset.index, bset.node)));
    }
    Ok((bset, payload, checksum))
}

/// Checks the keys of a bset, and shows them to `visit`.
fn each_key<'a>(
    header: &NodeHeader,
    bset: &BsetHeader,
    mut payload: &'a [u8],
    visit: &mut dyn FnMut(PackedKey<'a>),
) -> Result<(), Corruption> {
    let bad = |problem: String| Err(Corruption::new(format!("bset {} of node {}", bset.index, bset.node), problem));
    let mut last = None;
    let mut count = 0_u32;
    while !payload.is_empty() {
        let (key, rest) = unpack(payload)?;
        payload = rest;
        count += 1;
        let is_outside = key.position < header.minimum || header.limit.is_some_and(|limit| key.position >= limit);
        if is_outside || last.is_some_and(|last| last >= key.position) {
            return bad(format!("key {} does not belong there", key.position));
        }
        last = Some(key.position);
        visit(key);
    }
    if count == bset.key_count { Ok(()) } else { bad(format!("{count} keys, {} by its header", bset.key_count)) }
}
