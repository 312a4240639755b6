//! Counts, indexes, and other keys that follow from others.

use coppicefs::format::BtreeId;
use coppicefs::format::Position;
use coppicefs::format::extent::ExtentValue;
use coppicefs::format::space::{Backpointer, BucketState, DeviceUsage, FreeBucket};
use coppicefs::{Error, Result};

use super::{KeyRepair, device_position};
use crate::problem::Problem;

impl KeyRepair<'_, '_> {
    pub(super) fn count(&mut self, problem: &Problem) -> Result<()> {
        match problem {
            Problem::InodeAllocated { inode, found, .. } => {
                self.change_inode(*inode, |stored| stored.allocated_bytes = *found)?;
            }
            Problem::DirectorySize { inode, found, .. } => self.change_inode(*inode, |stored| stored.size = *found)?,
            Problem::LinkCount { inode, found, .. } => {
                self.change_inode(*inode, |stored| stored.link_count = *found)?;
            }
            Problem::BackpointerMissing { extent, place } => self.backpointer(*extent, *place)?,
            Problem::BackpointerWrong { place, .. } => self.transaction.delete(BtreeId::Backpointers, *place),
            Problem::IndexKeyStray { btree, position } => self.transaction.delete(*btree, *position),
            Problem::Accounting { counter, stored, found } => self.transaction.account(*counter, found - stored),
            other => self.bucket(other)?,
        }
        Ok(())
    }

    fn backpointer(&mut self, extent: Position, place: Position) -> Result<()> {
        let Some(value) = self.transaction.get(BtreeId::Extents, extent)? else { return Ok(()) };
        if let Ok(ExtentValue::Data(data)) = ExtentValue::decode(&value) {
            let backpointer = Backpointer { btree: BtreeId::Extents, disk_bytes: data.disk_bytes, position: extent };
            self.transaction.put(BtreeId::Backpointers, place, backpointer.encode());
        }
        Ok(())
    }

    fn bucket(&mut self, problem: &Problem) -> Result<()> {
        let transaction = &mut *self.transaction;
        let free = || FreeBucket { discarded: false }.encode();
        match problem {
            Problem::BucketWrong { device, bucket, found, .. } => {
                transaction.put(BtreeId::Buckets, device_position(*device, *bucket), found.encode());
            }
            Problem::FreeSpaceKey { device, bucket, state, .. } => {
                let position = device_position(*device, *bucket);
                match state {
                    BucketState::Free => transaction.put(BtreeId::FreeSpace, position, free()),
                    _ => transaction.delete(BtreeId::FreeSpace, position),
                }
            }
            Problem::FreeSpaceValue { device, bucket, .. } => {
                let position = device_position(*device, *bucket);
                // Gone if another problem says that it does not belong there.
                if transaction.get(BtreeId::FreeSpace, position)?.is_some() {
                    transaction.put(BtreeId::FreeSpace, position, free());
                }
            }
            Problem::NeedDiscardKey { device, bucket, state, .. } => {
                let position = device_position(*device, *bucket);
                match state {
                    BucketState::NeedDiscard => transaction.put(BtreeId::NeedDiscard, position, Vec::new()),
                    _ => transaction.delete(BtreeId::NeedDiscard, position),
                }
            }
            Problem::Untouched { device, bucket, .. } => {
                let position = Position::new(u64::from(*device), 0, 0);
                let stored = transaction.get(BtreeId::Devices, position)?;
                let stored = stored.and_then(|value| DeviceUsage::decode(&value).ok());
                let stored = stored.map_or(0, |usage| usage.untouched_from);
                let usage = DeviceUsage { untouched_from: stored.max(*bucket + 1) };
                transaction.put(BtreeId::Devices, position, usage.encode());
            }
            other => return Err(Error::Bug(format!("no repair for {}", other.id()))),
        }
        Ok(())
    }
}
