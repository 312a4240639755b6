//! Looking for nodes on a whole device, where nothing can be trusted to say where they are.
//!
//! A node's header names its filesystem, its own address, its tree and its range, so an image inside of a file (wrong address) and an older
//! filesystem on the same device (another id) are told apart. Slots lie on multiples of their size in a device whose geometry need not be known.
//! Memory: a few windows, and a summary for each node. One thread reads ahead of rayon's, which verify; no locks.

use rayon::prelude::*;

use crate::btree::{NodeSummary, may_be_node, summarise};
use crate::device::BlockDevice;
use crate::error::{Error, Result};
use crate::memory::AlignedBuffer;

/// Bytes that are read at once: a multiple of the largest node.
const WINDOW_BYTES: u64 = 4 << 20;
/// The largest node.
const NODE_BYTES_MAX: usize = 1 << 20;
/// Nodes lie on multiples of this at least: the smallest size that a superblock may name.
const STEP_BYTES: usize = 8192;
/// What is read at once where a window cannot be read as a whole.
const RETRY_BYTES: usize = 64 << 10;
/// Windows that wait to be verified.
const WINDOWS_AHEAD: usize = 2;
/// Most nodes whose summaries are kept: above it the device is not one of ours, or a forgery.
const NODES_MAX: usize = 1 << 24;

/// A node where its header says that it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundNode {
    /// Byte address on the device.
    pub address: u64,
    /// What is there.
    pub summary: NodeSummary,
}

/// What a scan found.
#[derive(Debug, Default)]
pub struct Scan {
    /// All nodes, by address.
    pub nodes: Vec<FoundNode>,
    /// Slots that start like a node but are damaged.
    pub damaged: u64,
    /// Whole nodes that say that they belong elsewhere: parts of an image in a file.
    pub misplaced: u64,
    /// Bytes that cannot be read.
    pub unreadable_bytes: u64,
}

/// Looks at the whole device. `progress` is called with the bytes that have been looked at since the last call.
///
/// # Errors
/// If there is no memory, or there are more nodes than there can be. What cannot be read is counted.
pub fn scan_nodes(device: &dyn BlockDevice, progress: &(dyn Fn(u64) + Sync)) -> Result<Scan> {
    let size_bytes = device.size_bytes();
    let mut scan = Scan::default();
    let (full, windows) = crossbeam_channel::bounded::<Result<Window>>(WINDOWS_AHEAD);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut offset = 0;
            while offset < size_bytes {
                let window = Window::read(device, offset, (size_bytes - offset).min(WINDOW_BYTES));
                // Nobody listens any more: an error ended the scan.
                if full.send(window).is_err() {
                    break;
                }
                offset += WINDOW_BYTES;
            }
        });
        for window in windows {
            let window = window?;
            window.look(&mut scan);
            progress(window.bytes.len() as u64);
            if scan.nodes.len() > NODES_MAX {
                return Err(Error::Unusable(format!("there are more than {NODES_MAX} nodes on {}", device.name())));
            }
        }
        Ok(())
    })?;
    Ok(scan)
}

struct Window {
    offset: u64,
    bytes: AlignedBuffer,
    unreadable_bytes: u64,
}

impl Window {
    fn read(device: &dyn BlockDevice, offset: u64, length: u64) -> Result<Self> {
        let length = length - length % u64::from(device.block_bytes().max(1));
        let mut bytes = AlignedBuffer::try_zeroed(usize::try_from(length).unwrap_or(0))?;
        let mut unreadable_bytes = 0;
        if !bytes.is_empty() && device.read(offset, &mut bytes).is_err() {
            let mut at = offset;
            for piece in bytes.chunks_mut(RETRY_BYTES) {
                if device.read(at, piece).is_err() {
                    piece.fill(0);
                    unreadable_bytes += piece.len() as u64;
                }
                at += piece.len() as u64;
            }
        }
        Ok(Self { offset, bytes, unreadable_bytes })
    }

    fn look(&self, scan: &mut Scan) {
        scan.unreadable_bytes += self.unreadable_bytes;
        let steps = self.bytes.len().div_ceil(STEP_BYTES);
        let found: Vec<_> = (0..steps)
            .into_par_iter()
            .filter_map(|step| {
                let start = step * STEP_BYTES;
                let address = self.offset + start as u64;
                // A slot is no larger than what its address is a multiple of.
                let slot = usize::try_from(1_u64 << address.trailing_zeros().min(20)).unwrap_or(NODE_BYTES_MAX);
                let rest = self.bytes.get(start..)?;
                let bytes = rest.get(..slot.min(rest.len()))?;
                may_be_node(bytes).then(|| (address, summarise(bytes)))
            })
            .collect();
        for (address, outcome) in found {
            match outcome {
                Err(_) => scan.damaged += 1,
                Ok(summary) if summary.header.address != address || summary.header.device.0 != 0 => {
                    scan.misplaced += 1;
                }
                Ok(summary) => scan.nodes.push(FoundNode { address, summary }),
            }
        }
    }
}
