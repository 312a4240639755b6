//! What follows from a change of a key: counts of buckets, backpointers, accounting. All in the same transaction.
//!
//! Each extent is charged [`DataExtent::charged_bytes`] in the bucket of each of its pointers. A change is the old value's charges taken
//! back and the new one's added, so that the sum over any history is the recount over what is there. Nothing here looks at another
//! extent.

use crate::alloc::capacity::{in_ranges, reserved_ranges};
use crate::alloc::{Allocator, BucketKey};
use crate::error::{Error, Result};
use crate::format::extent::{DataExtent, ExtentPointer, ExtentValue};
use crate::format::journal::AccountingCounter;
use crate::format::space::{Backpointer, Bucket};
use crate::format::superblock::Superblock;
use crate::format::{BtreeId, CompressionKind, Position};
use crate::sync::Arc;
use crate::sync::atomic::Ordering;
use crate::transaction::{BucketChange, BucketOutcome, Transaction, Trigger};
use crate::units::{BucketIndex, DeviceIndex, JournalSequence};

use super::bucket_state::{self, Refusal};

/// The trigger of a filesystem.
#[derive(Debug)]
pub struct SpaceTrigger {
    superblock: Arc<Superblock>,
    reserved: Vec<Vec<(u64, u64)>>,
    allocator: Arc<Allocator>,
}

impl SpaceTrigger {
    /// Over the allocator that learns of committed changes.
    #[must_use]
    pub fn new(superblock: Arc<Superblock>, allocator: Arc<Allocator>) -> Self {
        let devices = (0..=u8::MAX).zip(&superblock.members).map(|(device, _)| device);
        let reserved = devices.map(|device| reserved_ranges(&superblock, device)).collect();
        Self { superblock, reserved, allocator }
    }

    /// The bucket that a pointer points into, and its place there. The whole stored range lies in one bucket of data.
    fn place(&self, position: Position, pointer: &ExtentPointer, disk_bytes: u32) -> Result<(BucketKey, u64)> {
        let bucket_bytes = u64::from(self.superblock.geometry.bucket_bytes);
        let (bucket, start) = (pointer.offset / bucket_bytes, pointer.offset % bucket_bytes);
        let key = (pointer.device, BucketIndex(bucket));
        let slot = usize::from(pointer.device.0);
        let exists = self.superblock.members.get(slot).is_some_and(|member| bucket < member.bucket_count)
            && self.reserved.get(slot).is_some_and(|ranges| !in_ranges(ranges, key));
        if !exists || start + u64::from(disk_bytes) > bucket_bytes {
            let problem = format!("{disk_bytes} bytes at byte {} of device {}", pointer.offset, pointer.device);
            return Err(Error::corrupt(format!("extent {position}"), problem));
        }
        Ok((key, start))
    }

    fn extent_changed(
        &self,
        transaction: &mut Transaction<'_>,
        position: Position,
        old: Option<ExtentValue>,
        new: Option<ExtentValue>,
    ) -> Result<()> {
        if let Some(old) = &old {
            self.account(transaction, old, -1);
            if let ExtentValue::Data(data) = old {
                self.drop_data(transaction, position, data)?;
            }
        }
        if let Some(new) = &new {
            self.account(transaction, new, 1);
            if let ExtentValue::Data(data) = new {
                self.add_data(transaction, position, data)?;
            }
        }
        Ok(())
    }

    fn account(&self, transaction: &mut Transaction<'_>, value: &ExtentValue, sign: i64) {
        match value {
            ExtentValue::Data(data) => {
                let charged = i64::from(data.charged_bytes()) * signed(data.pointers.len() as u64);
                transaction.account(AccountingCounter::DataBytes, sign * charged);
                if data.compression != CompressionKind::None {
                    let logical = i64::from(data.length);
                    transaction.account(AccountingCounter::CompressedLogicalBytes, sign * logical);
                    transaction.account(AccountingCounter::CompressedDiskBytes, sign * charged);
                }
            }
            ExtentValue::Inline(bytes) => {
                transaction.account(AccountingCounter::InlineBytes, sign * signed(bytes.len() as u64));
            }
            ExtentValue::Unwritten { length } => {
                let delta = sign * i64::from(*length);
                transaction.account(AccountingCounter::ReservedBytes, delta);
                let counters = Arc::clone(self.allocator.counters());
                transaction.on_commit(move |_| {
                    counters.unwritten_bytes.fetch_add(delta, Ordering::SeqCst);
                });
            }
            ExtentValue::Whiteout { .. } => {}
        }
    }

    fn drop_data(&self, transaction: &mut Transaction<'_>, position: Position, data: &DataExtent) -> Result<()> {
        for pointer in &data.pointers {
            let ((device, bucket), start) = self.place(position, pointer, data.disk_bytes)?;
            let change = BucketChange { charged_delta: -i64::from(data.charged_bytes()), ..BucketChange::default() };
            transaction.change_bucket(device, bucket, change);
            // An extent that moved to another end keeps its place on disk: its new key may have put the backpointer already.
            let at = self.backpointer_position(position, (device, bucket), start, data);
            let present = transaction.get(BtreeId::Backpointers, at)?;
            if let Some(present) = present
                && Backpointer::decode(&present)?.position == position
            {
                transaction.delete(BtreeId::Backpointers, at);
            }
        }
        Ok(())
    }

    fn add_data(&self, transaction: &mut Transaction<'_>, position: Position, data: &DataExtent) -> Result<()> {
        for pointer in &data.pointers {
            let ((device, bucket), start) = self.place(position, pointer, data.disk_bytes)?;
            let change = BucketChange {
                charged_delta: i64::from(data.charged_bytes()),
                expected_generation: Some(pointer.generation),
                ..BucketChange::default()
            };
            transaction.change_bucket(device, bucket, change);
            let at = self.backpointer_position(position, (device, bucket), start, data);
            let backpointer = Backpointer { btree: BtreeId::Extents, disk_bytes: data.disk_bytes, position };
            transaction.put(BtreeId::Backpointers, at, backpointer.encode());
        }
        Ok(())
    }

    /// Parts of one compressed frame share its place on disk, so the block in the frame tells them apart.
    fn backpointer_position(
        &self,
        position: Position,
        (device, bucket): BucketKey,
        start: u64,
        data: &DataExtent,
    ) -> Position {
        let block = u64::from(data.frame_offset / self.superblock.geometry.block_bytes.max(1));
        Position::new(u64::from(device.0) << 48 | bucket.0, start << 32 | block, position.snapshot)
    }
}

impl Trigger for SpaceTrigger {
    fn key_changed(
        &self,
        transaction: &mut Transaction<'_>,
        btree: BtreeId,
        position: Position,
        old: Option<&[u8]>,
        new: Option<&[u8]>,
    ) -> Result<()> {
        match btree {
            BtreeId::Extents => {
                let old = old.map(ExtentValue::decode).transpose()?;
                let new = new.map(ExtentValue::decode).transpose()?;
                self.extent_changed(transaction, position, old, new)
            }
            BtreeId::Inodes => {
                let delta = i64::from(new.is_some()) - i64::from(old.is_some());
                transaction.account(AccountingCounter::Inodes, delta);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn bucket_changed(
        &self,
        device: DeviceIndex,
        bucket: BucketIndex,
        old: Bucket,
        change: &BucketChange,
    ) -> Result<BucketOutcome> {
        bucket_state::apply(old, change).map_err(|refusal| match refusal {
            Refusal::OtherGeneration { expected, actual }
                if self.allocator.may_retry_pointer((device, bucket), expected, actual) =>
            {
                Error::Restart
            }
            refusal => refusal.into_error(device, bucket),
        })
    }

    fn bucket_committed(
        &self,
        device: DeviceIndex,
        bucket: BucketIndex,
        old: Bucket,
        new: Bucket,
        sequence: JournalSequence,
    ) {
        self.allocator.bucket_committed((device, bucket), old, new, sequence);
    }
}

fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}
