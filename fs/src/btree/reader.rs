//! Reading nodes from the devices: the first good copy wins. No locks.

use crate::device::{BlockDevice, ReadRequest};
use crate::error::{Error, Result};
use crate::format::node::{NodeAddress, NodePointer};
use crate::format::superblock::Superblock;
use crate::memory::AlignedBuffer;
use crate::metrics::Metrics;
use crate::sync::Arc;

use super::image::{self, Expected, Image};

/// Devices and what one must know to read nodes from them.
#[derive(Clone, Debug)]
pub struct NodeReader {
    pub(super) superblock: Arc<Superblock>,
    pub(super) devices: Vec<Arc<dyn BlockDevice>>,
    pub(super) metrics: Arc<Metrics>,
}

impl NodeReader {
    /// A reader over the devices, in the order of the superblock's members.
    #[must_use]
    pub fn new(superblock: Arc<Superblock>, devices: Vec<Arc<dyn BlockDevice>>, metrics: Arc<Metrics>) -> Self {
        Self { superblock, devices, metrics }
    }

    pub(super) fn device(&self, address: NodeAddress) -> Result<&Arc<dyn BlockDevice>> {
        self.devices.get(usize::from(address.device.0)).ok_or_else(|| {
            Error::corrupt("node pointer", format!("it names device {}, of {}", address.device, self.devices.len()))
        })
    }

    /// Reads and verifies one copy.
    pub(super) fn read_copy(&self, pointer: &NodePointer, copy: NodeAddress, expected: &Expected) -> Result<Image> {
        let sizes: Vec<u64> = self.devices.iter().map(|device| device.size_bytes()).collect();
        image::check_pointer(pointer, u64::from(self.superblock.geometry.node_bytes), &sizes)?;
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
        Ok(image::decode(self.superblock.filesystem, &buffer, pointer, copy, expected)?)
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
                    tracing::warn!("copy {index} of node {} cannot be used: {error}", pointer.node);
                    last_error = error;
                }
            }
        }
        Err(last_error)
    }
}
