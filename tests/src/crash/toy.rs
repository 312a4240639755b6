//! A filesystem small enough to be seen to be right: a log of operations, replayed into a model at each mount. It can be broken in
//! well-known ways, to show that the harness notices.

use std::collections::BTreeMap;
use std::sync::Arc;

use coppicefs::Error;
use coppicefs::device::{BlockDevice, SimDevice};

use super::{Mounted, Subject};
use crate::model::Model;
use crate::operation::Operation;
use crate::tree::Tree;

/// What is wrong with the toy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bug {
    None,
    /// A sync does not flush.
    NoFlush,
    /// A sync flushes before it writes.
    FlushFirst,
    /// Records are taken as they are.
    NoChecksum,
    /// Replay goes on after a record that is missing.
    SkipBadRecords,
    /// Recovery cuts the log by zeroing it whole, then writes it anew.
    RewriteAtMount,
    /// The check writes.
    CheckWrites,
    /// Removals are not logged.
    LoseUnlinks,
}

const SLOT_BYTES: u64 = 4096;
/// Where in a slot the tag of a write lies.
const TAG_AT: usize = SLOT_BYTES as usize - 4;

pub(super) struct Toy(pub(super) Bug);

struct MountedToy {
    bug: Bug,
    device: Arc<SimDevice>,
    model: Model,
    /// Records that are not written yet.
    pending: Vec<Operation>,
    next_slot: u64,
}

fn checksum(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash: u32, &byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

fn encode(operation: &Operation) -> Vec<u8> {
    let mut operation = operation.clone();
    let mut tag = 0;
    if let Operation::Write { tag: in_body, .. } = &mut operation {
        tag = std::mem::take(in_body);
    }
    let body = serde_json::to_vec(&operation).unwrap();
    assert!(body.len() + 8 <= TAG_AT);
    let mut slot = (body.len() as u32).to_le_bytes().to_vec();
    slot.extend([0; 4]);
    slot.extend(&body);
    // A part of it lies in the last sector of the slot, so that tearing it matters.
    slot.resize(TAG_AT, b'#');
    slot.extend(tag.to_le_bytes());
    let sum = checksum(&slot);
    slot[4..8].copy_from_slice(&sum.to_le_bytes());
    slot
}

fn decode(slot: &[u8], verify: bool) -> Option<Operation> {
    let length = u32::from_le_bytes(slot[..4].try_into().ok()?) as usize;
    let body = slot.get(8..8 + length)?;
    let mut plain = slot.to_vec();
    plain[4..8].fill(0);
    if length == 0 || verify && u32::from_le_bytes(slot[4..8].try_into().ok()?) != checksum(&plain) {
        return None;
    }
    let mut operation = serde_json::from_slice(body).ok()?;
    if let Operation::Write { tag, .. } = &mut operation {
        *tag = u32::from_le_bytes(slot[TAG_AT..].try_into().ok()?);
    }
    Some(operation)
}

impl Toy {
    fn replay(&self, device: &SimDevice) -> Result<(Vec<Operation>, Model), Error> {
        let (mut operations, mut model) = (Vec::new(), Model::new(SLOT_BYTES));
        let mut slot = vec![0; SLOT_BYTES as usize];
        let mut misses = 0;
        for offset in (0..device.size_bytes()).step_by(SLOT_BYTES as usize) {
            device.read(offset, &mut slot)?;
            match decode(&slot, self.0 != Bug::NoChecksum) {
                Some(operation) => {
                    if model.begin(&operation).is_ok() {
                        operations.push(operation);
                    }
                }
                None if self.0 == Bug::SkipBadRecords && misses < 64 => misses += 1,
                None => break,
            }
        }
        Ok((operations, model))
    }
}

impl Subject for Toy {
    fn format(&self, _: &Arc<SimDevice>) -> Result<(), Error> {
        Ok(())
    }

    fn mount(&self, device: &Arc<SimDevice>, _: u64) -> Result<Box<dyn Mounted>, Error> {
        device.flush()?;
        let (operations, model) = self.replay(device)?;
        let next_slot = operations.len() as u64;
        if self.0 == Bug::RewriteAtMount {
            for slot in 0..next_slot {
                device.write(slot * SLOT_BYTES, &vec![0; SLOT_BYTES as usize])?;
            }
            device.flush()?;
            for (slot, operation) in (0u64..).zip(&operations) {
                device.write(slot * SLOT_BYTES, &encode(operation))?;
            }
        } else if self.0 != Bug::SkipBadRecords {
            // What lies beyond the cut must not be taken for records once the gap before it is filled.
            device.write(next_slot * SLOT_BYTES, &vec![0; 64 * SLOT_BYTES as usize])?;
        }
        device.flush()?;
        let (device, bug) = (Arc::clone(device), self.0);
        Ok(Box::new(MountedToy { bug, device, model, pending: Vec::new(), next_slot }))
    }

    fn check(&self, device: &Arc<SimDevice>) -> Result<Vec<String>, Error> {
        if self.0 == Bug::CheckWrites {
            device.write(0, &vec![1; SLOT_BYTES as usize])?;
        }
        Ok(Vec::new())
    }
}

impl MountedToy {
    fn write_pending(&mut self) -> Result<(), Error> {
        for operation in std::mem::take(&mut self.pending) {
            self.device.write(self.next_slot * SLOT_BYTES, &encode(&operation))?;
            self.next_slot += 1;
        }
        Ok(())
    }
}

impl Mounted for MountedToy {
    fn perform(&mut self, operation: &Operation) -> Result<(), Error> {
        self.model.begin(operation)?;
        if self.bug == Bug::FlushFirst && operation.is_sync() {
            self.device.flush()?;
        }
        match operation {
            Operation::Settle => self.write_pending()?,
            Operation::Turns { .. } | Operation::Begin => {}
            Operation::Unlink { .. } if self.bug == Bug::LoseUnlinks => {}
            operation if operation.is_sync() => {
                self.write_pending()?;
                if !matches!(self.bug, Bug::NoFlush | Bug::FlushFirst) {
                    self.device.flush()?;
                }
            }
            operation => self.pending.push(operation.clone()),
        }
        Ok(())
    }

    fn tree(&mut self) -> Result<Tree, Error> {
        // Numbers are given anew, as in a filesystem that does not know the oracle.
        let mut numbers = BTreeMap::new();
        let mut tree = self.model.tree();
        for entry in tree.values_mut() {
            let next = numbers.len() as u64 + 10;
            entry.inode = *numbers.entry(entry.inode).or_insert(next);
        }
        Ok(tree)
    }

    fn unmount(mut self: Box<Self>) -> Result<(), Error> {
        self.write_pending()?;
        self.device.flush()
    }
}
