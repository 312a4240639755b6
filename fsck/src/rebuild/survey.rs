//! The first part of a rebuild: what is on the device, and of which filesystem. Writes nothing.

use std::collections::BTreeMap;
use std::sync::Arc;

use coppicefs::btree::{NodeReader, salvage_keys};
use coppicefs::device::BlockDevice;
use coppicefs::format::checkpoint::Checkpoint;
use coppicefs::format::mark::{RebuildMark, mark_places};
use coppicefs::format::superblock::{SUPERBLOCK_BYTES, Superblock, copy_offsets};
use coppicefs::format::{BtreeId, Position};
use coppicefs::journal::journal_identity;
use coppicefs::memory::AlignedBuffer;
use coppicefs::metrics::Metrics;
use coppicefs::recovery::records::{FoundLog, find_log};
use coppicefs::recovery::scan::{FoundNode, scan_nodes};
use coppicefs::recovery::superblock;
use coppicefs::units::{InodeNumber, SnapshotId};
use coppicefs::{Error, Result};

/// Bits of a node's id below the epoch.
pub const NODE_COUNTER_BITS: u32 = 40;
/// How far the nodes of a checkpoint that was cut off may be ahead of the journal, where no other filesystem was on the device.
const SEQUENCES_AHEAD: u64 = 64;
/// Ids listed when there are several.
const IDS_LISTED: usize = 16;

/// What was found.
#[derive(Debug)]
pub struct Survey {
    /// The superblock, if a copy of it is whole.
    pub superblock: Option<Superblock>,
    /// The filesystem's id.
    pub filesystem: uuid::Uuid,
    /// Its nodes; those of a rebuild that was cut off are left out.
    pub nodes: Vec<FoundNode>,
    /// The newest checkpoint's record, if the superblock says where it is.
    pub record: Option<Checkpoint>,
    /// The highest epoch that was seen, and the highest sequence.
    pub highest_epoch: u64,
    /// The highest journal sequence that was seen in nodes and records.
    pub highest_sequence: u64,
    /// The newest sequence in any node: what came before is in the nodes, nearly all of it.
    pub newest_in_nodes: u64,
    /// Slots that start like nodes but are damaged.
    pub damaged_nodes: u64,
    /// Nodes that belong elsewhere: parts of an image in a file.
    pub misplaced_nodes: u64,
    /// Nodes of other filesystems.
    pub foreign_nodes: u64,
    /// Bytes that cannot be read.
    pub unreadable_bytes: u64,
    /// A rebuild was cut off before.
    pub is_second: bool,
}

/// Looks at the whole device. `wanted` chooses among several filesystems.
///
/// # Errors
/// [`Error::Unusable`] if there is nothing to rebuild, or several filesystems and no choice; the device's.
pub fn survey(
    device: &Arc<dyn BlockDevice>,
    wanted: Option<uuid::Uuid>,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<Survey> {
    let known = whole_superblock(&**device)?.filter(|known| wanted.is_none_or(|wanted| wanted == known.filesystem));
    if let Some(known) = &known
        && known.members.len() != 1
    {
        return Err(Error::Unusable(format!(
            "the filesystem has {} devices: only one can be rebuilt",
            known.members.len()
        )));
    }
    let scan = scan_nodes(&**device, progress)?;
    let mut by_id: BTreeMap<uuid::Uuid, Vec<FoundNode>> = BTreeMap::new();
    for node in scan.nodes {
        by_id.entry(node.summary.header.filesystem).or_default().push(node);
    }
    let total: usize = by_id.values().map(Vec::len).sum();
    let filesystem = match wanted.or(known.as_ref().map(|known| known.filesystem)) {
        Some(id) => id,
        None => choose(&**device, &by_id)?,
    };
    let mut nodes = by_id.remove(&filesystem).unwrap_or_default();
    let foreign_nodes = (total - nodes.len()) as u64;
    let mark = read_mark(&**device, filesystem);
    let mut highest_epoch = 0;
    for node in &nodes {
        highest_epoch = highest_epoch.max(node.summary.header.node.0 >> NODE_COUNTER_BITS);
    }
    if let Some(mark) = mark {
        nodes.retain(|node| node.summary.header.node.0 >> NODE_COUNTER_BITS != mark.epoch);
        highest_epoch = highest_epoch.max(mark.epoch);
    }
    if nodes.is_empty() {
        return Err(Error::Unusable(format!(
            "no node of {} is on {}: there is nothing to rebuild from",
            if wanted.is_some() || known.is_some() {
                format!("filesystem {filesystem}")
            } else {
                "a filesystem".into()
            },
            device.name()
        )));
    }
    let newest = nodes.iter().map(|node| node.summary.newest(node.summary.bset_count()).0).max().unwrap_or(0);
    let record = known.as_ref().and_then(|known| reader(known, device).newest_record());
    if let Some(record) = &record {
        highest_epoch = highest_epoch.max(record.epoch);
    }
    let highest_sequence =
        record.as_ref().map_or(newest, |record| newest.max(record.newest_sequence).max(record.first_replay));
    Ok(Survey {
        superblock: known,
        filesystem,
        nodes,
        record,
        highest_epoch,
        highest_sequence,
        newest_in_nodes: newest,
        damaged_nodes: scan.damaged,
        misplaced_nodes: scan.misplaced,
        foreign_nodes,
        unreadable_bytes: scan.unreadable_bytes,
        is_second: mark.is_some(),
    })
}

/// A reader of nodes by pointers.
#[must_use]
pub fn reader(superblock: &Superblock, device: &Arc<dyn BlockDevice>) -> NodeReader {
    NodeReader::new(Arc::new(superblock.clone()), vec![Arc::clone(device)], Arc::new(Metrics::default()))
}

impl Survey {
    /// The journal: where the superblock says that it is, or in `areas`.
    pub fn log(&mut self, device: &dyn BlockDevice, areas: &[(u64, u64)]) -> FoundLog {
        let log = match &self.superblock {
            Some(known) => {
                let bucket_bytes = u64::from(known.geometry.bucket_bytes);
                let areas: Vec<_> = known
                    .layout
                    .journal
                    .iter()
                    .map(|area| (area.first * bucket_bytes, (area.first + area.count) * bucket_bytes))
                    .collect();
                find_log(device, &areas, Some(journal_identity(known)))
            }
            None => {
                let log = find_log(device, areas, None);
                // The id does not tell whose it is; a journal that ends before the nodes do is another filesystem's.
                let ahead = if self.foreign_nodes == 0 { SEQUENCES_AHEAD } else { 0 };
                let end = log.highest_sequence.saturating_add(ahead);
                if end < self.newest_in_nodes { FoundLog::default() } else { log }
            }
        };
        self.highest_epoch = self.highest_epoch.max(log.highest_epoch);
        self.highest_sequence = self.highest_sequence.max(log.highest_sequence);
        log
    }

    /// Whether the record's leaves and the log together are the present state, with nothing to guess.
    #[must_use]
    pub fn is_record_current(&self, log: &FoundLog) -> bool {
        let Some(record) = &self.record else { return false };
        match (log.whole_from(), log.records.last()) {
            (Some(from), Some(last)) => {
                from <= record.first_replay && last.header.sequence.0.saturating_add(1) >= record.first_replay
            }
            _ => self.highest_sequence <= record.newest_sequence.max(record.first_replay),
        }
    }
}

/// The newest whole copy, or `None` if all are lost.
fn whole_superblock(device: &dyn BlockDevice) -> Result<Option<Superblock>> {
    match superblock::read(device) {
        Ok(found) => Ok(Some(found.superblock)),
        Err(error) => {
            let mut buffer = AlignedBuffer::try_zeroed(SUPERBLOCK_BYTES)?;
            for offset in copy_offsets(device.size_bytes()) {
                let fits = offset + SUPERBLOCK_BYTES as u64 <= device.size_bytes();
                if fits && device.read(offset, &mut buffer).is_ok() {
                    // One that is too new, or whose device was cut short, is no reason to guess.
                    match Superblock::decode(&buffer) {
                        Ok(_) | Err(Error::Unusable(_)) => return Err(error),
                        Err(_) => {}
                    }
                }
            }
            if device.size_bytes() == 0 { Err(error) } else { Ok(None) }
        }
    }
}

/// The one filesystem whose root directory was found; a question if there are several.
fn choose(device: &dyn BlockDevice, by_id: &BTreeMap<uuid::Uuid, Vec<FoundNode>>) -> Result<uuid::Uuid> {
    let with_root: Vec<_> = by_id.iter().filter(|(_, nodes)| nodes.iter().any(|node| has_root(device, node))).collect();
    let plausible: Vec<_> = if with_root.is_empty() { by_id.iter().collect() } else { with_root };
    match plausible.as_slice() {
        [] => Err(Error::Unusable(format!(
            "{} holds no node of a coppice filesystem: there is nothing to rebuild from",
            device.name()
        ))),
        [(id, _)] => Ok(**id),
        several => {
            let listed: Vec<_> = several
                .iter()
                .take(IDS_LISTED)
                .map(|(id, nodes)| {
                    let newest = nodes.iter().map(|node| node.summary.newest(usize::MAX).0).max().unwrap_or(0);
                    format!("{id} ({} nodes, up to transaction {newest})", nodes.len())
                })
                .collect();
            Err(Error::Unusable(format!(
                "{} holds nodes of {} filesystems, choose one with --filesystem-id: {}",
                device.name(),
                several.len(),
                listed.join(", ")
            )))
        }
    }
}

fn has_root(device: &dyn BlockDevice, node: &FoundNode) -> bool {
    let header = &node.summary.header;
    let root = Position::new(InodeNumber::ROOT.0, 0, SnapshotId::ROOT.0);
    if (header.btree, header.level) != (BtreeId::Inodes, 0)
        || header.minimum > root
        || header.limit.is_some_and(|limit| limit <= root)
    {
        return false;
    }
    let length = (node.summary.written_bytes as usize).next_multiple_of(4096);
    let Ok(mut buffer) = AlignedBuffer::try_zeroed(length) else { return false };
    device.read(node.address, &mut buffer).is_ok()
        && salvage_keys(&buffer, node.summary.bset_count(), root, root.successor()).is_ok_and(|keys| !keys.is_empty())
}

/// The mark of a rebuild that was cut off.
fn read_mark(device: &dyn BlockDevice, filesystem: uuid::Uuid) -> Option<RebuildMark> {
    let mut block = AlignedBuffer::try_zeroed(4096).ok()?;
    mark_places(device.size_bytes()).into_iter().find_map(|(offset, within)| {
        device.read(offset, &mut block).ok()?;
        RebuildMark::decode(block.get(within..)?).filter(|mark| mark.filesystem == filesystem)
    })
}
