//! Reading nodes from the devices: one, of which the first good copy wins, or many at once with all their copies. A copy that cannot be used is
//! warned of once. No locks but that of what was warned of, for a moment.

use std::collections::HashSet;

use rayon::prelude::*;
use smallvec::SmallVec;

use crate::device::{BlockDevice, ReadRequest};
use crate::error::{Error, Result};
use crate::format::node::{NodeAddress, NodePointer};
use crate::format::superblock::Superblock;
use crate::memory::AlignedBuffer;
use crate::metrics::Metrics;
use crate::sync::{Arc, Mutex};

use super::image::{self, Decoded, Expected, Image};
use super::keys::{Keys, SpareBuffers};

/// Devices and what one must know to read nodes from them.
#[derive(Clone, Debug)]
pub struct NodeReader {
    pub(super) superblock: Arc<Superblock>,
    pub(super) devices: Vec<Arc<dyn BlockDevice>>,
    pub(super) metrics: Arc<Metrics>,
    /// Copies that were warned of, with the checksum that was expected.
    told: Arc<Mutex<HashSet<(NodeAddress, u32)>>>,
}

/// Copies that are warned of one by one.
const TOLD_MAX: usize = 10_000;

impl NodeReader {
    /// A reader over the devices, in the order of the superblock's members.
    #[must_use]
    pub fn new(superblock: Arc<Superblock>, devices: Vec<Arc<dyn BlockDevice>>, metrics: Arc<Metrics>) -> Self {
        Self { superblock, devices, metrics, told: Arc::default() }
    }

    pub(super) fn device(&self, address: NodeAddress) -> Result<&Arc<dyn BlockDevice>> {
        self.devices.get(usize::from(address.device.0)).ok_or_else(|| {
            Error::corrupt("node pointer", format!("it names device {}, of {}", address.device, self.devices.len()))
        })
    }

    /// Reads and verifies one copy.
    pub(super) fn read_copy(&self, pointer: &NodePointer, copy: NodeAddress, expected: &Expected) -> Result<Image> {
        let buffer = self.read_slot(pointer, copy)?;
        Ok(image::decode(self.superblock.filesystem, &buffer, pointer, copy, expected)?)
    }

    /// Checks that what a pointer says can be true here.
    pub(super) fn check_pointer(&self, pointer: &NodePointer) -> Result<()> {
        let sizes: SmallVec<[u64; 4]> = self.devices.iter().map(|device| device.size_bytes()).collect();
        Ok(image::check_pointer(pointer, u64::from(self.superblock.geometry.node_bytes), &sizes)?)
    }

    /// Reads what is published of one copy.
    fn read_slot(&self, pointer: &NodePointer, copy: NodeAddress) -> Result<AlignedBuffer> {
        self.check_pointer(pointer)?;
        // At most a slot: the pointer was checked.
        let mut buffer = AlignedBuffer::try_zeroed(image::append_offset(pointer.written_bytes as usize))?;
        let mut outcome = Ok(());
        self.metrics.device_metadata_read_submissions.increment();
        self.device(copy)?
            .read_batch(&mut [ReadRequest { offset: copy.offset, buffer: &mut buffer }], &mut |_, result| {
                outcome = result
            });
        outcome?;
        self.metrics.btree_node_reads.increment();
        Ok(buffer)
    }

    /// Whether this copy was not warned of so far. Damage that no cache holds is met again and again.
    fn is_news(&self, pointer: &NodePointer, copy: NodeAddress) -> bool {
        let mut told = self.told.lock();
        let is_news = told.len() < TOLD_MAX && told.insert((copy, pointer.last_checksum));
        let is_last = is_news && told.len() == TOLD_MAX;
        drop(told);
        if is_last {
            tracing::warn!(
                "{TOLD_MAX} copies of nodes cannot be used: further ones are counted, and not told one by one"
            );
        }
        is_news
    }

    /// Reads a node. The flag says that a copy before the one that was used is bad.
    ///
    /// # Errors
    /// The last copy's problem, if none is good.
    pub(super) fn read(&self, pointer: &NodePointer, expected: &Expected) -> Result<(Image, bool)> {
        let mut last_error = Error::corrupt(format!("pointer to node {}", pointer.node), "it has no copies");
        for (index, &copy) in pointer.copies.iter().enumerate() {
            match self.read_copy(pointer, copy, expected) {
                Ok(image) => {
                    if index > 0 {
                        self.metrics.btree_node_read_repaired.increment();
                    }
                    return Ok((image, index > 0));
                }
                Err(error) => {
                    if self.is_news(pointer, copy) {
                        tracing::warn!("copy {index} of node {} cannot be used: {error}", pointer.node);
                    }
                    last_error = error;
                }
            }
        }
        Err(last_error)
    }
}

/// A copy of a node on its way.
#[derive(Debug)]
struct Copy {
    address: NodeAddress,
    buffer: AlignedBuffer,
    outcome: Result<()>,
}

/// A node of a batch that is read: what is known of it, and the copies that were asked for.
#[derive(Debug)]
pub(super) struct Fetch {
    pub pointer: NodePointer,
    pub expected: Expected,
    copies: SmallVec<[Copy; 2]>,
    /// Why nothing was read.
    refused: Option<Error>,
}

/// What a node of a batch turned out to be.
#[derive(Debug)]
pub(super) struct Fetched {
    /// What each copy that was read is; all of them if none was good.
    pub copies: Vec<(NodeAddress, Result<()>)>,
    /// Of the first good one; or the last one's problem.
    pub keys: Result<Keys>,
}

impl NodeReader {
    /// Prepares to read copies of a node: all, or the first.
    pub(super) fn prepare(
        &self,
        pointer: NodePointer,
        expected: Expected,
        all_copies: bool,
        spare: &SpareBuffers,
    ) -> Result<Fetch> {
        let node_bytes = u64::from(self.superblock.geometry.node_bytes);
        let mut copies = SmallVec::new();
        let refused = self.check_pointer(&pointer).err();
        if refused.is_none() {
            for &address in pointer.copies.iter().take(if all_copies { usize::MAX } else { 1 }) {
                // The largest that there can be, so that it fits the next one, too.
                let buffer = spare.take(usize::try_from(node_bytes).unwrap_or(usize::MAX))?;
                copies.push(Copy { address, buffer, outcome: Ok(()) });
            }
        }
        Ok(Fetch { pointer, expected, copies, refused })
    }

    /// Reads a batch, in one submission for each device.
    pub(super) fn fetch(&self, batch: &mut [Fetch]) {
        for (index, device) in self.devices.iter().enumerate() {
            let mut outcomes = Vec::new();
            let mut requests = Vec::new();
            for fetch in batch.iter_mut() {
                let length = image::append_offset(fetch.pointer.written_bytes as usize);
                for copy in fetch.copies.iter_mut().filter(|copy| usize::from(copy.address.device.0) == index) {
                    let Copy { address, buffer, outcome } = copy;
                    // Within a slot, as was checked.
                    let Some(buffer) = buffer.get_mut(..length) else { continue };
                    requests.push(ReadRequest { offset: address.offset, buffer });
                    outcomes.push(outcome);
                }
            }
            if requests.is_empty() {
                continue;
            }

            self.metrics.device_metadata_read_submissions.increment();
            device.read_batch(&mut requests, &mut |request, result| {
                if let Some(outcome) = outcomes.get_mut(request) {
                    **outcome = result;
                }
            });
        }
    }

    /// Verifies a batch that was read, on all cores.
    pub(super) fn decode_all(&self, batch: Vec<Fetch>, spare: &Arc<SpareBuffers>) -> Vec<(Fetch, Fetched)> {
        batch
            .into_par_iter()
            .map(|mut fetch| {
                let copies = std::mem::take(&mut fetch.copies);
                let fetched = self.decode_copies(&fetch, copies, spare);
                (fetch, fetched)
            })
            .collect()
    }

    fn decode_copies(&self, fetch: &Fetch, read: SmallVec<[Copy; 2]>, spare: &Arc<SpareBuffers>) -> Fetched {
        let Fetch { pointer, expected, refused, .. } = fetch;
        let filesystem = self.superblock.filesystem;
        if let Some(error) = refused {
            let copies = pointer.copies.iter().map(|&address| (address, Err(error.clone()))).collect();
            return Fetched { copies, keys: Err(error.clone()) };
        }
        let mut good: Option<(AlignedBuffer, Decoded)> = None;
        let mut copies = Vec::with_capacity(pointer.copies.len());
        for Copy { address, buffer, outcome } in read {
            self.metrics.btree_node_reads.increment();
            let verified = match (outcome, &good) {
                (Err(error), _) => Err(error),
                (Ok(()), Some((bytes, _))) => {
                    image::verify_twin(filesystem, &buffer, bytes, pointer, address, expected).map_err(Error::from)
                }
                (Ok(()), None) => match image::decode_in_place(filesystem, &buffer, pointer, address, expected) {
                    Ok(decoded) => {
                        good = Some((buffer, decoded));
                        copies.push((address, Ok(())));
                        continue;
                    }
                    Err(corruption) => Err(corruption.into()),
                },
            };
            spare.give(buffer);
            copies.push((address, verified));
        }
        // If the first alone was asked for, and is bad.
        for &address in pointer.copies.iter().skip(copies.len()) {
            if good.is_some() {
                break;
            }
            let read = self.read_slot(pointer, address).and_then(|buffer| {
                let decoded = image::decode_in_place(filesystem, &buffer, pointer, address, expected)?;
                Ok((buffer, decoded))
            });
            copies.push((address, read.as_ref().map(|_| ()).map_err(Clone::clone)));
            good = read.ok();
        }
        let problem = || {
            let last = copies.iter().rev().find_map(|(_, outcome)| outcome.clone().err());
            last.unwrap_or_else(|| Error::corrupt(format!("pointer to node {}", pointer.node), "it has no copies"))
        };
        let keys = good.map(|(buffer, decoded)| Keys::read(decoded.keys, buffer, spare)).ok_or_else(problem);
        Fetched { copies, keys }
    }
}
