//! The trees as a scan's nodes and the journal give them: for each range of keys the newest leaf that covers it, and above it what
//! the journal has changed since.
//!
//! **Why the highest node id wins.** A split leaves the lower half its id and gives the upper one a new id; a merge makes a new node. So
//! the leaf of a position never has a lower id than the leaf before it had, and of two images whose ranges cover a position the one with the higher id
//! is the later; of two with one id the one with the newer sequence. Keys that were deleted so cannot come back where a newer node covers them.
//! Leaves that a checkpoint's record leads to, with the journal from its F on, need no such guess: they go before all others.
//!
//! Memory: a line for each leaf, the journal's keys, and one leaf at a time.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};

use coppicefs::btree::{NodeReader, salvage_keys, walk_published};
use coppicefs::device::BlockDevice;
use coppicefs::format::checkpoint::Checkpoint;
use coppicefs::format::journal::{Entries, Entry};
use coppicefs::format::node::NodePointer;
use coppicefs::format::{BtreeId, Position, Value};
use coppicefs::memory::AlignedBuffer;
use coppicefs::recovery::records::{FoundLog, data_is_there};
use coppicefs::recovery::scan::FoundNode;
use coppicefs::{Error, Result};

/// Where the keys of a range are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Source {
    /// There are none: the tree was empty.
    Empty,
    /// In the first `bset_count` bsets of a node.
    Image { node: usize, bset_count: usize },
}

/// A leaf that may be the one of its range.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    from: Position,
    to: Option<Position>,
    source: Source,
    /// Newest sequence that it reflects.
    newest: u64,
    is_published: bool,
    id: u64,
}

/// A range of keys with one source.
#[derive(Clone, Copy, Debug)]
struct Segment {
    from: Position,
    to: Option<Position>,
    source: Source,
    newest: u64,
    /// The checkpoint that was followed leads to it.
    is_published: bool,
    id: u64,
}

/// One tree.
#[derive(Debug, Default)]
struct Tree {
    /// Ascending, disjoint.
    segments: Vec<Segment>,
    /// Ranges of which there was a newer leaf, by what points to leaves.
    suspects: Vec<(Position, Option<Position>)>,
    /// Something points to a leaf of it.
    had_leaves: bool,
    /// What the journal says: sequence, and value or whiteout.
    changes: BTreeMap<Position, (u64, Option<Value>)>,
}

/// A key that was found.
#[derive(Clone, Debug)]
pub struct Recovered {
    /// Where.
    pub position: Position,
    /// Its value.
    pub value: Value,
    /// It was so at this sequence at least.
    pub known: u64,
}

/// What the journal has added.
#[derive(Clone, Copy, Debug, Default)]
pub struct Applied {
    /// Records of the log.
    pub records: u64,
    /// Keys that are newer than any leaf's.
    pub keys: u64,
    /// Records that mean nothing or cannot be read.
    pub bad_records: u64,
    /// The log's last sequence that counts.
    pub end: u64,
}

/// All trees of the filesystem that is being rebuilt.
pub struct Trees<'a> {
    device: &'a dyn BlockDevice,
    nodes: &'a [FoundNode],
    trees: Vec<Tree>,
    /// From here to `log_end` the log has no gap.
    log_from: Option<u64>,
    log_end: u64,
    /// Leaves that were whole at the scan and could not be read since.
    failed_reads: AtomicU64,
}

/// Bytes of the largest node.
const NODE_BYTES_MAX: u64 = 1 << 20;

impl<'a> Trees<'a> {
    /// The newest leaf for each range. `record` is a checkpoint whose leaves go before all others, with a reader that can follow it.
    ///
    /// # Errors
    /// Those of following the record that are not damage.
    pub fn new(
        device: &'a dyn BlockDevice,
        nodes: &'a [FoundNode],
        record: Option<(&NodeReader, &Checkpoint)>,
    ) -> Result<Self> {
        let mut candidates: Vec<Vec<Candidate>> = vec![Vec::new(); BtreeId::ALL.len()];
        for (index, node) in nodes.iter().enumerate().filter(|(_, node)| node.summary.header.level == 0) {
            let header = &node.summary.header;
            let bset_count = node.summary.bset_count();
            if let Some(list) = candidates.get_mut(header.btree as usize) {
                list.push(Candidate {
                    from: header.minimum,
                    to: header.limit,
                    source: Source::Image { node: index, bset_count },
                    newest: node.summary.newest(bset_count).0,
                    is_published: false,
                    id: header.node.0,
                });
            }
        }
        if let Some((reader, checkpoint)) = record {
            add_published(nodes, reader, checkpoint, &mut candidates)?;
        }
        let trees = candidates.iter().map(|list| Tree {
            segments: newest_of(list),
            suspects: Vec::new(),
            had_leaves: false,
            changes: BTreeMap::new(),
        });
        Ok(Self { device, nodes, trees: trees.collect(), log_from: None, log_end: 0, failed_reads: AtomicU64::new(0) })
    }

    fn tree(&self, btree: BtreeId) -> Option<&Tree> {
        self.trees.get(btree as usize)
    }

    /// Puts the journal's keys above the leaves.
    pub fn apply_log(&mut self, log: &FoundLog) -> Applied {
        let mut applied = Applied::default();
        self.log_from = log.whole_from();
        for record in &log.records {
            let sequence = record.header.sequence.0;
            let payload = match record.payload(self.device) {
                Ok(payload) => payload,
                Err(error) => {
                    tracing::warn!("journal record {sequence} is left out: {error}");
                    applied.bad_records += 1;
                    self.log_from = Some(sequence + 1);
                    continue;
                }
            };
            if sequence > log.known_flushed && !matches!(data_is_there(self.device, &payload), Ok(true)) {
                break;
            }
            for entry in Entries::new(&payload) {
                match entry {
                    Ok(Entry::Key { btree, key }) => {
                        applied.keys += u64::from(self.change(btree, sequence, key.position, key.value));
                    }
                    Ok(_) => {}
                    Err(error) => {
                        tracing::warn!("journal record {sequence}: {error}");
                        applied.bad_records += 1;
                        break;
                    }
                }
            }
            applied.records += 1;
            applied.end = sequence;
        }
        self.log_end = applied.end;
        applied
    }

    /// A change that the journal names; whether the leaf of its position does not reflect it for certain.
    fn change(&mut self, btree: BtreeId, sequence: u64, position: Position, value: Option<&[u8]>) -> bool {
        // Those that follow from others are made anew.
        if matches!(btree, BtreeId::Backpointers | BtreeId::FreeSpace | BtreeId::NeedDiscard | BtreeId::Devices) {
            return false;
        }
        let Some(tree) = self.trees.get_mut(btree as usize) else { return false };
        // A transaction of the same record may have come after the image.
        let is_newer = segment_at(&tree.segments, position).is_none_or(|segment| segment.newest <= sequence);
        if is_newer {
            tree.changes.insert(position, (sequence, value.map(Value::from)));
        }
        is_newer
    }

    /// Up to which sequence it is known what stands at a position; `None` if its leaf is lost.
    #[must_use]
    pub fn known_at(&self, btree: BtreeId, position: Position) -> Option<u64> {
        let tree = self.tree(btree)?;
        if let Some((sequence, _)) = tree.changes.get(&position) {
            return Some(self.with_log(*sequence));
        }
        segment_at(&tree.segments, position).map(|segment| self.with_log(segment.newest))
    }

    /// What was known at `sequence` and is in the log from there on without a gap is known at its end.
    fn with_log(&self, sequence: u64) -> u64 {
        match self.log_from {
            Some(from) if from <= sequence.saturating_add(1) => sequence.max(self.log_end),
            _ => sequence,
        }
    }

    /// Ranges of a tree that no leaf covers; all of it if no leaf was found. None if the log has everything from the first record on.
    #[must_use]
    pub fn lost(&self, btree: BtreeId) -> Vec<(Position, Option<Position>)> {
        let mut lost = Vec::new();
        if self.log_from == Some(1) {
            return lost;
        }
        let mut cursor = Some(Position::MIN);
        for segment in self.tree(btree).map(|tree| tree.segments.as_slice()).unwrap_or_default() {
            let Some(from) = cursor else { break };
            if from < segment.from {
                lost.push((from, Some(segment.from)));
            }
            cursor = segment.to;
        }
        if let Some(from) = cursor {
            lost.push((from, None));
        }
        lost
    }

    /// Ranges whose leaf is lost, and for which an older one stands in that once covered them: a leaf that still is one shows its first position.
    #[must_use]
    pub fn outdated(&self, btree: BtreeId) -> Vec<(Position, Option<Position>)> {
        let segments = self.tree(btree).map(|tree| tree.segments.as_slice()).unwrap_or_default();
        let is_outdated = |segment: &&Segment| match segment.source {
            Source::Empty => false,
            Source::Image { node, .. } => {
                self.nodes.get(node).is_some_and(|node| node.summary.header.minimum != segment.from)
            }
        };
        segments.iter().filter(is_outdated).map(|segment| (segment.from, segment.to)).collect()
    }

    /// Looks for leaves that are lost although an older one covers their whole range: nothing in that one shows it, but what points to leaves does. For each
    /// range the newest interior node counts that was found, whatever its age, or the root of `record` where that is a leaf. Where the journal has everything
    /// since the older leaf, nothing is missing.
    pub fn find_suspects(&mut self, record: Option<&Checkpoint>) {
        let mut claims = Claims::new();
        for node in self.nodes.iter().filter(|node| node.summary.header.level == 1) {
            let header = &node.summary.header;
            let bset_count = node.summary.bset_count();
            let newest = node.summary.newest(bset_count).0;
            let (from, to) = (header.minimum, header.limit);
            let (source, id) = (Source::Empty, header.node.0);
            let whole = Segment { from, to, source, newest, is_published: false, id };
            let Ok(children) = self.read_node(node, bset_count, &whole) else { continue };
            for (index, (from, value)) in children.iter().enumerate() {
                let to = children.get(index + 1).map(|(next, _)| *next).or(header.limit);
                claims.add(header.btree, (*from, to), (id, newest), value);
            }
        }
        let newest = record.map_or(0, |record| record.newest_sequence);
        for root in record.iter().flat_map(|record| &record.roots).filter(|root| root.level == 0) {
            if let Ok(btree) = BtreeId::from_stored(root.btree) {
                claims.add(btree, (Position::MIN, None), (u64::MAX, newest), &root.pointer);
            }
        }
        let addresses: HashSet<u64> = self.nodes.iter().map(|node| node.address).collect();
        let suspects = |(btree, tree): (BtreeId, &Tree)| {
            let is_older = |segment: &Segment, claim: &Segment, pointer: &NodePointer| {
                !segment.is_published
                    && !self.is_complete(segment)
                    && self.is_older(segment, claim.newest, pointer, &addresses)
            };
            claims.newer(btree, &tree.segments, is_older)
        };
        let suspects: Vec<_> = BtreeId::ALL.into_iter().zip(&self.trees).map(suspects).collect();
        for (tree, (suspects, pointers)) in self.trees.iter_mut().zip(suspects.into_iter().zip(&claims.ranges)) {
            tree.suspects = suspects;
            tree.had_leaves = !pointers.is_empty();
        }
    }

    /// Whether a pointer, of a node with this newest sequence, names a later leaf than a segment's: one with a higher id; more bsets in the same slot; or the
    /// same leaf written whole elsewhere, where nothing is now. A slot that was given up keeps its image until another node is written there.
    fn is_older(&self, segment: &Segment, newest: u64, pointer: &NodePointer, addresses: &HashSet<u64>) -> bool {
        let Source::Image { node, bset_count } = segment.source else { return false };
        if pointer.node.0 != segment.id {
            return pointer.node.0 > segment.id;
        }
        let address = self.nodes.get(node).map(|node| node.address);
        if pointer.copies.iter().any(|copy| Some(copy.offset) == address) {
            return usize::from(pointer.bset_count) > bset_count;
        }
        segment.newest <= newest && pointer.copies.iter().all(|copy| !addresses.contains(&copy.offset))
    }

    /// The journal has all changes since a leaf was written.
    fn is_complete(&self, segment: &Segment) -> bool {
        self.log_from.is_some_and(|from| from <= segment.newest.saturating_add(1))
    }

    /// Ranges that may be older than the rest. See [`Self::find_suspects`].
    #[must_use]
    pub fn suspects(&self, btree: BtreeId) -> &[(Position, Option<Position>)] {
        self.tree(btree).map(|tree| tree.suspects.as_slice()).unwrap_or_default()
    }

    /// Whether it is known that a tree had leaves, found or not.
    #[must_use]
    pub fn had_leaves(&self, btree: BtreeId) -> bool {
        self.tree(btree).is_some_and(|tree| tree.had_leaves)
    }

    /// Whether nothing is known of a tree.
    #[must_use]
    pub fn is_unknown(&self, btree: BtreeId) -> bool {
        self.tree(btree).is_none_or(|tree| tree.segments.is_empty() && tree.changes.is_empty())
    }

    /// Calls `visit` with the keys of a tree, ascending.
    ///
    /// # Errors
    /// `visit`'s. A leaf that was whole at the scan and no longer is is left out with a warning.
    pub fn for_each(&self, btree: BtreeId, mut visit: impl FnMut(Recovered) -> Result<()>) -> Result<()> {
        let Some(tree) = self.tree(btree) else { return Ok(()) };
        let mut cursor = Some(Position::MIN);
        for segment in &tree.segments {
            let Some(from) = cursor else { break };
            if from < segment.from {
                merge(&tree.changes, from, Some(segment.from), Vec::new(), 0, &mut visit)?;
            }
            let keys = self.read(segment).unwrap_or_else(|error| {
                tracing::warn!("a leaf of {} can no longer be read: {error}", btree.name());
                self.failed_reads.fetch_add(1, Ordering::Relaxed);
                Vec::new()
            });
            merge(&tree.changes, segment.from, segment.to, keys, segment.newest, &mut visit)?;
            cursor = segment.to;
        }
        match cursor {
            Some(from) => merge(&tree.changes, from, None, Vec::new(), 0, &mut visit),
            None => Ok(()),
        }
    }

    /// How many leaves could not be read again so far.
    #[must_use]
    pub fn failed_reads(&self) -> u64 {
        self.failed_reads.load(Ordering::Relaxed)
    }

    /// The keys of a segment, out of whichever copy of its node can be read.
    fn read(&self, segment: &Segment) -> Result<Vec<(Position, Value)>> {
        let Source::Image { node, bset_count } = segment.source else { return Ok(Vec::new()) };
        let missing = || Error::Bug("a leaf that was not found".into());
        let wanted = self.nodes.get(node).ok_or_else(missing)?;
        match self.read_node(wanted, bset_count, segment) {
            Ok(keys) => Ok(keys),
            Err(error) => {
                let same = |other: &&FoundNode| {
                    other.summary.header.node == wanted.summary.header.node
                        && other.summary.last_checksum == wanted.summary.last_checksum
                        && other.address != wanted.address
                };
                let copies = self.nodes.iter().filter(same);
                copies.map(|copy| self.read_node(copy, bset_count, segment)).find(Result::is_ok).unwrap_or(Err(error))
            }
        }
    }

    fn read_node(&self, node: &FoundNode, bset_count: usize, segment: &Segment) -> Result<Vec<(Position, Value)>> {
        let wanted = u64::from(node.summary.written_bytes).next_multiple_of(4096).min(NODE_BYTES_MAX);
        let length = wanted.min(self.device.size_bytes().saturating_sub(node.address));
        let mut buffer = AlignedBuffer::try_zeroed(usize::try_from(length).unwrap_or(0))?;
        self.device.read(node.address, &mut buffer)?;
        Ok(salvage_keys(&buffer, bset_count, segment.from, segment.to)?)
    }

    /// Indexes of the nodes that are needed: all copies of each.
    #[must_use]
    pub fn needed_nodes(&self) -> Vec<usize> {
        let mut ids = BTreeSet::new();
        for segment in self.trees.iter().flat_map(|tree| &tree.segments) {
            if let Source::Image { node, .. } = segment.source
                && let Some(node) = self.nodes.get(node)
            {
                ids.insert(node.summary.header.node);
            }
        }
        let nodes = self.nodes.iter().enumerate();
        nodes.filter(|(_, node)| ids.contains(&node.summary.header.node)).map(|(index, _)| index).collect()
    }
}

/// Leaves that the record leads to, and the trees that it says are empty.
fn add_published(
    nodes: &[FoundNode],
    reader: &NodeReader,
    checkpoint: &Checkpoint,
    candidates: &mut [Vec<Candidate>],
) -> Result<()> {
    let by_address: HashMap<u64, usize> = nodes.iter().enumerate().map(|(index, node)| (node.address, index)).collect();
    let reflected = checkpoint.first_replay.saturating_sub(1);
    let walked = walk_published(reader, checkpoint, &mut |node| {
        let found = node.copies.iter().find_map(|(copy, _)| by_address.get(&copy.offset).copied());
        let bset_count = usize::from(node.pointer.bset_count);
        if let (0, Ok(_), Some(index)) = (node.level, &node.keys, found)
            && let Some(summary) = nodes.get(index).map(|node| &node.summary)
            && summary.header.node == node.pointer.node
            && summary.bset_count() >= bset_count
            && let Some(list) = candidates.get_mut(node.btree as usize)
        {
            list.push(Candidate {
                from: node.minimum,
                to: node.limit,
                source: Source::Image { node: index, bset_count },
                newest: summary.newest(bset_count).0.max(reflected),
                is_published: true,
                id: node.pointer.node.0,
            });
        }
        Ok(())
    });
    match walked {
        Err(error) if !error.is_media_error() => return Err(error),
        Err(error) => tracing::warn!("the checkpoint cannot be followed: {error}"),
        Ok(()) => {}
    }
    for btree in BtreeId::ALL {
        if checkpoint.roots.iter().all(|root| root.btree != btree as u8)
            && let Some(list) = candidates.get_mut(btree as usize)
        {
            list.push(Candidate {
                from: Position::MIN,
                to: None,
                source: Source::Empty,
                newest: reflected,
                is_published: true,
                id: 0,
            });
        }
    }
    Ok(())
}

/// What points to leaves: for each tree, the pointers, and for each the range and who says so.
struct Claims {
    pointers: Vec<NodePointer>,
    ranges: Vec<Vec<Candidate>>,
}

impl Claims {
    fn new() -> Self {
        Self { pointers: Vec::new(), ranges: vec![Vec::new(); BtreeId::ALL.len()] }
    }

    /// Adds a pointer to a leaf, of a node with this id and newest sequence. What means nothing says nothing.
    fn add(
        &mut self,
        btree: BtreeId,
        (from, to): (Position, Option<Position>),
        (id, newest): (u64, u64),
        value: &[u8],
    ) {
        let (Ok(pointer), Some(list)) = (NodePointer::decode(value), self.ranges.get_mut(btree as usize)) else {
            return;
        };
        let source = Source::Image { node: self.pointers.len(), bset_count: 0 };
        list.push(Candidate { from, to, source, newest, is_published: false, id });
        self.pointers.push(pointer);
    }

    /// Parts of segments that are older than what the newest pointer for their place names.
    fn newer(
        &self,
        btree: BtreeId,
        segments: &[Segment],
        is_older: impl Fn(&Segment, &Segment, &NodePointer) -> bool,
    ) -> Vec<(Position, Option<Position>)> {
        let mut found: Vec<(Position, Option<Position>)> = Vec::new();
        let ends_before = |end: Option<Position>, other: Position| end.is_some_and(|end| end <= other);
        let claims = self.ranges.get(btree as usize).map(|list| newest_of(list)).unwrap_or_default();
        let mut claims = claims.iter().peekable();
        for segment in segments {
            while claims.next_if(|claim| ends_before(claim.to, segment.from)).is_some() {}
            for claim in claims.clone().take_while(|claim| !ends_before(segment.to, claim.from)) {
                let Source::Image { node, .. } = claim.source else { continue };
                if !self.pointers.get(node).is_some_and(|pointer| is_older(segment, claim, pointer)) {
                    continue;
                }
                let from = claim.from.max(segment.from);
                let to = match (claim.to, segment.to) {
                    (Some(one), Some(other)) => Some(one.min(other)),
                    (one, other) => one.or(other),
                };
                match found.last_mut() {
                    Some(last) if last.1 == Some(from) => last.1 = to,
                    _ => found.push((from, to)),
                }
            }
        }
        found
    }
}

/// For each range the best candidate that covers it. A sweep over their ends.
fn newest_of(candidates: &[Candidate]) -> Vec<Segment> {
    let mut starts: BTreeMap<Position, Vec<usize>> = BTreeMap::new();
    let mut ends: BTreeMap<Position, Vec<usize>> = BTreeMap::new();
    for (index, candidate) in candidates.iter().enumerate() {
        if candidate.to.is_some_and(|to| to <= candidate.from) {
            continue;
        }
        starts.entry(candidate.from).or_default().push(index);
        if let Some(to) = candidate.to {
            ends.entry(to).or_default().push(index);
        }
    }
    let rank = |index: usize| candidates.get(index).map(|at| (at.is_published, at.id, at.newest, at.source, index));
    let mut points: Vec<Position> = starts.keys().chain(ends.keys()).copied().collect();
    points.sort_unstable();
    points.dedup();
    let mut active = BTreeSet::new();
    let mut segments: Vec<Segment> = Vec::new();
    for (at, &point) in points.iter().enumerate() {
        for &index in ends.get(&point).into_iter().flatten() {
            active.remove(&rank(index));
        }
        for &index in starts.get(&point).into_iter().flatten() {
            active.insert(rank(index));
        }
        let best = active.last().copied().flatten().and_then(|(.., index)| candidates.get(index));
        let Some(best) = best else { continue };
        let to = points.get(at + 1).copied();
        match segments.last_mut() {
            Some(last)
                if (last.source, last.id, last.newest) == (best.source, best.id, best.newest)
                    && last.to == Some(point) =>
            {
                last.to = to;
            }
            _ => {
                let Candidate { source, newest, is_published, id, .. } = *best;
                segments.push(Segment { from: point, to, source, newest, is_published, id });
            }
        }
    }
    segments
}

fn segment_at(segments: &[Segment], position: Position) -> Option<&Segment> {
    let index = segments.partition_point(|segment| segment.from <= position).checked_sub(1)?;
    segments.get(index).filter(|segment| segment.to.is_none_or(|to| position < to))
}

/// Shows what is in `[from, to)`: keys of the leaf, and the journal's in their place.
fn merge(
    changes: &BTreeMap<Position, (u64, Option<Value>)>,
    from: Position,
    to: Option<Position>,
    keys: Vec<(Position, Value)>,
    newest: u64,
    visit: &mut impl FnMut(Recovered) -> Result<()>,
) -> Result<()> {
    let mut changed = changes.range(from..).take_while(|(position, _)| to.is_none_or(|to| **position < to)).peekable();
    let mut show = |position: Position, (known, value): &(u64, Option<Value>)| match value {
        Some(value) => visit(Recovered { position, value: Value::clone(value), known: *known }),
        None => Ok(()),
    };
    for (position, value) in keys {
        while let Some((at, change)) = changed.next_if(|(at, _)| **at < position) {
            show(*at, change)?;
        }
        match changed.next_if(|(at, _)| **at == position) {
            Some((at, change)) => show(*at, change)?,
            None => show(position, &(newest, Some(value)))?,
        }
    }
    for (at, change) in changed {
        show(*at, change)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use coppicefs::format::node::NodeAddress;
    use coppicefs::units::{DeviceIndex, NodeId};

    use super::*;

    fn at(inode: u64) -> Position {
        Position::new(inode, 0, 0)
    }

    fn leaf(id: u64, from: u64, to: u64, newest: u64) -> Candidate {
        let source = Source::Image { node: usize::try_from(id * 1000 + newest).unwrap(), bset_count: 1 };
        Candidate { from: at(from), to: (to < 100).then(|| at(to)), source, newest, is_published: false, id }
    }

    fn shown(segments: &[Segment]) -> Vec<(u64, u64, usize)> {
        let node = |source| if let Source::Image { node, .. } = source { node } else { 0 };
        segments.iter().map(|s| (s.from.inode, s.to.map_or(100, |to| to.inode), node(s.source))).collect()
    }

    #[test]
    fn the_highest_id_wins_each_range_whatever_was_appended_to_the_lower() {
        // 1 was split at 50 (2 is the upper half), and written again; its old image still covers all.
        let segments = newest_of(&[leaf(1, 0, 100, 40), leaf(2, 50, 100, 20), leaf(1, 0, 50, 30)]);
        assert_eq!(shown(&segments), [(0, 50, 1040), (50, 100, 2020)]);
        // 3 is the merge of both.
        let segments = newest_of(&[leaf(1, 0, 50, 40), leaf(3, 0, 100, 10), leaf(2, 50, 100, 20)]);
        assert_eq!(shown(&segments), [(0, 100, 3010)]);
    }

    #[test]
    fn the_newest_pointer_for_a_place_is_what_a_leaf_is_held_against() {
        let pointer = |id: u64| {
            let copies = std::iter::once(NodeAddress { device: DeviceIndex(0), offset: 1 << 20 }).collect();
            let pointer =
                NodePointer { node: NodeId(id), written_bytes: 4096, last_checksum: 1, bset_count: 1, copies };
            let mut bytes = Vec::new();
            pointer.encode(&mut bytes);
            bytes
        };
        let mut claims = Claims::new();
        // Parents 20 and 21; what 20 says of [40, 50) is no longer so.
        for (parent, from, to, child) in
            [(20, 0, 20, 4), (20, 20, 40, 6), (20, 40, 50, 7), (21, 40, 70, 4), (21, 70, 100, 9)]
        {
            let to = (to < 100).then(|| at(to));
            claims.add(BtreeId::Inodes, (at(from), to), (parent, 1), &pointer(child));
        }
        claims.add(BtreeId::Inodes, (at(0), None), (99, 1), b"nothing");
        let segments = newest_of(&[leaf(4, 0, 70, 10), leaf(8, 70, 100, 10)]);
        let by_id = |segment: &Segment, _: &Segment, pointer: &NodePointer| pointer.node.0 > segment.id;
        assert_eq!(claims.newer(BtreeId::Inodes, &segments, by_id), [(at(20), Some(at(40))), (at(70), None)]);
        assert!(claims.newer(BtreeId::Inodes, &segments, |_, _, _| false).is_empty());
        assert!(claims.newer(BtreeId::Extents, &segments, by_id).is_empty());
    }

    #[test]
    fn what_nobody_covers_is_left_out_and_published_leaves_go_first() {
        let published = Candidate { is_published: true, ..leaf(1, 20, 30, 5) };
        let segments = newest_of(&[leaf(7, 10, 40, 9), published, leaf(8, 60, 70, 1)]);
        assert_eq!(shown(&segments), [(10, 20, 7009), (20, 30, 1005), (30, 40, 7009), (60, 70, 8001)]);
        assert!(newest_of(&[leaf(1, 5, 5, 1)]).is_empty());
    }
}
