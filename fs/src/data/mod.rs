//! File data: extents, their checksums and compression, and copygc.
//!
//! The layer maps ranges of a file to bytes on devices. It knows inodes only as the record that holds a file's size and allocated bytes, which
//! change in the same transaction as the extents. It knows nothing of caches: whoever has dirty bytes in memory lays them over.
//!
//! Invariants of the extents tree beyond those of [`extents`]:
//!
//! 1. **Nothing behind the end.** Every byte that an extent holds at or beyond its inode's stored size is zero, and no extent with data
//!    starts behind the block that holds the end (unwritten ones may). So making a file longer never shows old bytes, whatever crashed in
//!    between. [`Data::write`] pads with zeros and drops what lies beyond the size; [`Data::truncate`] replaces the last block by a copy with a
//!    zeroed tail in the transaction that sets the size; [`Data::read`] needs not know the size.
//! 2. **Sizes and sums agree.** `allocated_bytes` of an inode is the sum of [`extents::allocated_bytes`] of its extents, after every
//!    transaction.
//! 3. **A promise is on disk before it is needed.** Work that one transaction cannot finish (a truncation, a hole, a collapse of many extents) is
//!    named in the logged-operations tree by its first transaction, and removed by its last: [`Data::resume_logged_operation`] finishes it
//!    at mount, before the inode can be used.
//!
//! Callers exclude, for one inode, changes that must not meet: truncation and punching against writes to the same blocks (the page cache's
//! block lock and its wait for writeback). Everything else, copygc among it, may run at any time: a transaction looks at the keys that it
//! changes.
//!
//! No lock is held across I/O; the only locks are those that the layers below take inside of their calls.

pub mod compress;
mod copygc;
pub mod extents;
mod logged;
mod range;
mod read;
mod salvage;
mod seek;
mod write;

#[cfg(test)]
pub(crate) mod tests;

use std::sync::OnceLock;

use smallvec::SmallVec;

use crate::device::{BlockDevice, WriteRequest};
use crate::env::Env;
use crate::error::{Error, Result};
use crate::format::extent::{DataExtent, EXTENT_BYTES_MAX};
use crate::format::namespace::Inode;
use crate::format::superblock::Superblock;
use crate::format::{BtreeId, ChecksumKind, Position};
use crate::metrics::Metrics;
use crate::snapshot::Snapshots;
use crate::space::Space;
use crate::sync::Arc;
use crate::transaction::{Transaction, Transactions};
use crate::units::{DeviceIndex, InodeNumber, JournalSequence, SnapshotId};

pub use compress::Compression;
pub use copygc::{CopyGc, Evacuated};
pub use extents::{Extent, Shape};
pub use logged::RangeFill;
pub use range::PreparedTruncation;
pub use read::{BadRange, ReadPiece};
pub use salvage::{BadPart, read_extent};
pub use write::{PreparedWrite, WriteCommit, WriteRun};

/// Largest file that is kept inline, in bytes, by default: what keeps a leaf of 128 KiB holding several dozen files.
pub const INLINE_BYTES_MAX: u32 = 2048;

/// How new data is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataOptions {
    /// Checksums of file data.
    pub checksum: ChecksumKind,
    /// Compression of file data.
    pub compression: Compression,
    /// Largest file in bytes that is kept in its extent's key; 0 for none. Never a whole block.
    pub inline_max: u32,
}

impl Default for DataOptions {
    fn default() -> Self {
        Self { checksum: ChecksumKind::default(), compression: Compression::NONE, inline_max: INLINE_BYTES_MAX }
    }
}

/// What a change of a file came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The newest record that holds a part of it: what `fsync` waits for. 0 if nothing was changed.
    pub sequence: JournalSequence,
    /// The inode as its last transaction left it. `None` if the inode is gone, and nothing was done.
    pub inode: Option<Inode>,
}

/// File data of one filesystem. See the module's documentation.
pub struct Data {
    devices: Vec<Arc<dyn BlockDevice>>,
    transactions: Arc<Transactions>,
    space: Arc<Space>,
    snapshots: Arc<Snapshots>,
    env: Arc<Env>,
    metrics: Arc<Metrics>,
    options: DataOptions,
    shape: extents::Shape,
    /// The snapshot that is read and written.
    snapshot: SnapshotId,
    /// Most bytes of one raw extent: as the format allows, less where nodes are so small that its checksums would not fit well.
    extent_bytes_max: u64,
    /// Bytes that are compressed, and checksummed, at a time: [`compress::FRAME_BYTES`], less where buckets are smaller.
    frame_bytes: u64,
    /// Keys that one transaction changes at most, give or take those of one extent.
    keys_max: usize,
    /// Bytes of values after which a transaction takes no further extent.
    value_bytes_max: usize,
    /// Told of each inode whose extents copygc has moved.
    moved: OnceLock<MovedHook>,
    /// Where an older state is read.
    reuse_check: OnceLock<ReuseCheck>,
}

/// See [`Data::set_reuse_check`]: why an extent's bytes may no longer be its own, if so.
pub type ReuseCheck = Box<dyn Fn(&DataExtent) -> Result<Option<String>> + Send + Sync>;

/// See [`Data::set_moved_hook`].
pub type MovedHook = Box<dyn Fn(InodeNumber) + Send + Sync>;

impl std::fmt::Debug for Data {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Data").field("options", &self.options).finish_non_exhaustive()
    }
}

impl Data {
    /// File data over these devices and trees.
    #[must_use]
    pub fn new(
        superblock: &Superblock,
        devices: Vec<Arc<dyn BlockDevice>>,
        transactions: Arc<Transactions>,
        space: Arc<Space>,
        snapshots: Arc<Snapshots>,
        env: Arc<Env>,
        metrics: Arc<Metrics>,
        options: DataOptions,
    ) -> Arc<Self> {
        let geometry = superblock.geometry;
        let shape = extents::Shape {
            block_bytes: geometry.block_bytes,
            bucket_bytes: geometry.bucket_bytes,
            device_bytes: devices.iter().map(|device| device.size_bytes()).collect::<SmallVec<_>>(),
        };
        // A transaction's keys of one tree must fit into a leaf together with what is there: use an eighth of it. An extent key with its
        // backpointer takes about 120 bytes beside its checksums.
        let node_bytes = geometry.node_bytes as usize;
        let value_bytes_max = node_bytes / 8;
        let blocks_max = (value_bytes_max / 4 / options.checksum.stored_bytes().max(4)).max(1) as u64;
        let extent_bytes_max = (blocks_max * u64::from(geometry.block_bytes))
            .min(u64::from(EXTENT_BYTES_MAX))
            .min(u64::from(geometry.bucket_bytes));
        Arc::new(Self {
            devices,
            transactions,
            space,
            snapshots,
            env,
            metrics,
            options,
            shape,
            snapshot: SnapshotId::ROOT,
            extent_bytes_max,
            frame_bytes: u64::from(compress::FRAME_BYTES.min(geometry.bucket_bytes)),
            keys_max: (node_bytes / 8 / 64).clamp(4, 256),
            value_bytes_max,
            moved: OnceLock::new(),
            reuse_check: OnceLock::new(),
        })
    }

    /// Sets what is called, with no lock held, after copygc's commits, once for each inode whose extents it moved. Only the first hook counts.
    pub fn set_moved_hook(&self, hook: MovedHook) {
        let _ = self.moved.set(hook);
    }

    /// Sets what is asked before an extent is read, for a state whose buckets may have been used again since. Only the first counts.
    pub fn set_reuse_check(&self, check: ReuseCheck) {
        let _ = self.reuse_check.set(check);
    }

    /// How new data is stored.
    #[must_use]
    pub fn options(&self) -> &DataOptions {
        &self.options
    }

    /// Sizes that extents obey.
    #[must_use]
    pub fn shape(&self) -> &extents::Shape {
        &self.shape
    }

    fn view(&self) -> extents::View<'_> {
        extents::View { snapshots: &self.snapshots, snapshot: self.snapshot, shape: &self.shape }
    }

    fn device(&self, index: DeviceIndex) -> Result<&Arc<dyn BlockDevice>> {
        self.devices
            .get(usize::from(index.0))
            .ok_or_else(|| Error::corrupt("extent pointer", format!("device {index} does not exist")))
    }

    /// One submission for each device that has any of the writes.
    fn write_to_devices(&self, writes: Vec<(DeviceIndex, WriteRequest<'_>)>) -> Result<()> {
        for (index, device) in self.devices.iter().enumerate() {
            let mine = writes.iter().filter(|(target, _)| usize::from(target.0) == index);
            let requests: Vec<WriteRequest<'_>> = mine.map(|(_, request)| request.clone()).collect();
            if !requests.is_empty() {
                device.write_batch(&requests)?;
            }
        }
        Ok(())
    }

    /// The stored inode.
    fn inode(&self, transaction: &mut Transaction<'_>, inode: InodeNumber) -> Result<Option<Inode>> {
        let found = self.snapshots.visible(transaction, BtreeId::Inodes, inode, 0, self.snapshot)?;
        Ok(found.map(|(_, value)| Inode::decode(&value)).transpose()?)
    }

    /// Stages the inode with its allocated bytes changed by `allocated_delta`, and with what the caller's closure does to it.
    fn put_inode(
        &self,
        transaction: &mut Transaction<'_>,
        number: InodeNumber,
        inode: &mut Inode,
        allocated_delta: i64,
        update: &dyn Fn(&mut Inode),
    ) -> Result<()> {
        // A wrong sum is for fsck to find; it must not make the file undeletable.
        inode.allocated_bytes = inode.allocated_bytes.saturating_add_signed(allocated_delta);
        update(inode);
        transaction.put(BtreeId::Inodes, Position::new(number.0, 0, self.snapshot.0), inode.encode()?);
        Ok(())
    }
}
