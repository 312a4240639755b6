//! Giving node space back: moving nodes out of sparsely used buckets, so that the buckets empty.
//!
//! After a large deletion few nodes are left, each in a bucket that was full of them once. A checkpoint then marks some nodes of the uppermost
//! buckets to be written whole, which puts them into the lowest free slots; the checkpoint after the next finds their buckets unused by any that
//! is kept, and gives them back. Nothing is done while what the buckets take is within the reserve, which nobody else could use.
//!
//! Locks: a node's content, exclusively, to mark it; none over the read of its header.

use super::Forest;
use super::log::CheckpointLog;
use crate::device::ReadRequest;
use crate::error::Result;
use crate::format::node::{HEADER_BYTES, NodeAddress, NodeHeader};
use crate::memory::AlignedBuffer;
use crate::sync::atomic::Ordering;

/// Nodes that one checkpoint moves.
const RELOCATIONS_MAX: usize = 64;
/// From so much of the cap on dirty nodes on none is moved: that makes them dirty, and the reserve is for the cap.
const RELOCATE_DIRTY_PERMILLE: u64 = 600;
/// Most buckets that one checkpoint gives back.
const GIVE_BACK_MAX: usize = 64;
/// Bytes of a leaf that giving a bucket back may take.
const GIVE_BACK_LEAF_BYTES: usize = 64;
/// From this fill of the journal on no buckets are given back: it is for what must be logged.
const GIVE_BACK_FILL_PERMILLE: u32 = 500;
/// Checkpoints in a row that are made for this alone and give nothing back.
const IDLE_ROUNDS_MAX: u32 = 4;
/// Nodes that may be merged, from which on a checkpoint is made for that alone.
const SMALL_NODES_MANY: usize = 16;

impl Forest {
    /// Slots that the reserve is made for: (kept checkpoints + 1) x the cap on dirty nodes, and some splits, in all copies.
    fn reserve_slots(&self) -> usize {
        (3 * self.dirty_nodes_max() + 8) * self.limits.copies
    }

    /// Whether the buckets have so many slots more than nodes and reserve need that buckets could be given back.
    fn is_sparse(&self) -> bool {
        let space = self.space.lock();
        space.claimed_slots() > space.used_slots() + self.reserve_slots() + 2 * space.bucket_slots()
    }

    /// Whether checkpoints could make node space free: nodes to be merged, or buckets that are sparsely used.
    #[must_use]
    pub fn could_free_nodes(&self) -> bool {
        !self.small_nodes.lock().is_empty() || self.reclaim_pending.load(Ordering::Relaxed)
    }

    /// Whether a checkpoint should be made for the node space that it gives back.
    pub(super) fn wants_reclaim(&self) -> bool {
        self.reclaim_pending.load(Ordering::Relaxed) || self.small_nodes.lock().len() >= SMALL_NODES_MANY
    }

    /// Marks nodes of sparsely used buckets to be written elsewhere. Returns how many.
    pub(super) fn relocate_nodes(&self) -> Result<usize> {
        if !self.is_sparse() {
            return Ok(0);
        }
        let addresses = self.space.lock().movable(RELOCATIONS_MAX);
        let mut moved = 0;
        for address in addresses {
            if self.dirty_permille() >= RELOCATE_DIRTY_PERMILLE {
                break;
            }
            match self.relocate(address) {
                Ok(is_marked) => moved += usize::from(is_marked),
                // It stays where it is.
                Err(error) if error.is_media_error() => tracing::warn!("a node is not moved: {error}"),
                Err(error) => return Err(error),
            }
        }
        Ok(moved)
    }

    fn relocate(&self, address: NodeAddress) -> Result<bool> {
        let mut bytes = AlignedBuffer::try_zeroed(HEADER_BYTES.next_multiple_of(4096))?;
        let mut outcome = Ok(());
        let mut request = [ReadRequest { offset: address.offset, buffer: &mut bytes }];
        self.reader.device(address)?.read_batch(&mut request, &mut |_, result| outcome = result);
        outcome?;
        let header = NodeHeader::decode(&bytes)?;
        let Some(found) = self.find(header.btree, header.minimum, header.level)? else { return Ok(false) };
        let mut content = found.node.content.write();
        let is_there = !content.retired && content.image.as_ref().is_some_and(|image| image.copies.contains(&address));
        if !is_there || content.rewrite {
            return Ok(false);
        }
        content.rewrite = true;
        let newest = content.newest;
        let became_dirty = content.touch(newest);
        self.charge_slot(&mut content);
        if became_dirty {
            self.list_dirty(&found.node);
        }
        Ok(true)
    }

    /// Gives buckets back that no kept checkpoint uses, if more slots are free than will be needed. Decides whether another checkpoint is to be
    /// made for the same. `moved`: nodes that this checkpoint has moved.
    pub(super) fn give_back_surplus(&self, needed: usize, moved: usize, log: &dyn CheckpointLog) -> Result<()> {
        let Some(node_buckets) = self.node_buckets.get() else { return Ok(()) };
        if log.fill_permille() >= GIVE_BACK_FILL_PERMILLE {
            return Ok(());
        }
        let surplus = {
            let mut space = self.space.lock();
            let keep = (needed * 2 + 4 * space.bucket_slots()).max(self.reserve_slots().min(space.used_slots() / 2));
            let count = (self.leaf_bytes_max() / GIVE_BACK_LEAF_BYTES).clamp(8, GIVE_BACK_MAX);
            let surplus = space.surplus(keep, count);
            for &(device, bucket) in &surplus {
                space.forget_bucket(device, bucket)?;
            }
            surplus
        };
        if !surplus.is_empty() {
            node_buckets.release(&surplus)?;
            self.reclaim_idle_rounds.store(0, Ordering::Relaxed);
        }
        let could_give_more = self.is_sparse() && (!surplus.is_empty() || moved > 0 || self.space.lock().is_aging());
        let rounds = self.reclaim_idle_rounds.fetch_add(1, Ordering::Relaxed);
        self.reclaim_pending.store(could_give_more && rounds < IDLE_ROUNDS_MAX, Ordering::Relaxed);
        if !could_give_more {
            self.reclaim_idle_rounds.store(0, Ordering::Relaxed);
        }
        Ok(())
    }
}
