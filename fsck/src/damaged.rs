//! `--list-damaged`: reads all file data through its checksums and says which ranges of which files cannot be read. Changes nothing.
//!
//! Extents are walked in the order of the tree; what one file has next to each other is read together, so that a compressed frame is decoded once.
//! A few threads read; memory is bounded by their buffers. What a lost node of the trees held is not known here: that is an error, and
//! the command line then lists what a repair in memory leaves, whose losses read as errors.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use coppicefs::data::ReadPiece;
use coppicefs::filesystem::Filesystem;
use coppicefs::format::extent::ExtentValue;
use coppicefs::format::{BtreeId, Position};
use coppicefs::memory::AlignedBuffer;
use coppicefs::units::InodeNumber;
use coppicefs::{Error, Result};
use parking_lot::Mutex;
use serde::Serialize;

/// Keys that one step of the walk asks for.
const SCAN_KEYS: usize = 4096;
/// Most bytes that are read at once.
const READ_BYTES_MAX: u64 = 1 << 20;
/// Threads that read.
const READERS: usize = 4;

/// A range of a file that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Damaged {
    /// A path of the file, for people: what is not printable is escaped. Empty if no name is known.
    pub path: String,
    /// Its inode number.
    pub inode: u64,
    /// Offset of the first byte.
    pub start: u64,
    /// Offset of the first byte after it.
    pub end: u64,
    /// Why.
    pub reason: String,
}

impl Damaged {
    /// The finding in a line.
    #[must_use]
    pub fn describe(&self) -> String {
        let name =
            if self.path.is_empty() { format!("inode {}, no name known", self.inode) } else { self.path.clone() };
        format!("{name}: bytes {} to {}: {}", self.start, self.end, self.reason)
    }
}

/// All ranges that cannot be read, by inode and offset, and how many bytes of file data were read. `progress` is called with bytes that have been read.
///
/// # Errors
/// If the trees cannot be read; a shutdown.
pub fn find(filesystem: &Filesystem, progress: &(dyn Fn(u64) + Sync)) -> Result<(Vec<Damaged>, u64)> {
    let mut found: BTreeMap<(u64, u64), (u64, String)> = BTreeMap::new();
    let mut total = 0;
    let mut cursor = Some(Position::MIN);
    while let Some(from) = cursor {
        let scan = filesystem.forest().scan(BtreeId::Extents, from, Position::MAX, SCAN_KEYS)?;
        cursor = scan.covered_to.successor();
        let mut reads: Vec<(u64, Range<u64>)> = Vec::new();
        for (position, value) in scan.keys {
            let extent = ExtentValue::decode(&value).map_err(|error| {
                Error::corrupt(format!("the extent at {position}"), format!("{error}: fsck -n says more"))
            })?;
            if let ExtentValue::Data(_) = extent {
                let start = position.offset.saturating_sub(extent.length());
                add_range(&mut reads, position.inode, start..position.offset);
            }
        }
        total += reads.iter().map(|(_, range)| range.end - range.start).sum::<u64>();
        read_all(filesystem, &reads, &mut found, progress)?;
    }
    let mut damaged: Vec<Damaged> = Vec::new();
    for ((inode, start), (end, reason)) in found {
        match damaged.last_mut() {
            Some(last) if (last.inode, last.end, &last.reason) == (inode, start, &reason) => last.end = end,
            _ => damaged.push(Damaged { path: path(filesystem, inode)?, inode, start, end, reason }),
        }
    }
    Ok((damaged, total))
}

/// Adds a range to those that are read together, or starts another.
fn add_range(reads: &mut Vec<(u64, Range<u64>)>, inode: u64, mut range: Range<u64>) {
    if let Some((last, before)) = reads.last_mut()
        && *last == inode
        && before.end == range.start
        && range.end - before.start <= READ_BYTES_MAX
    {
        before.end = range.end;
        return;
    }
    while range.end - range.start > READ_BYTES_MAX {
        reads.push((inode, range.start..range.start + READ_BYTES_MAX));
        range.start += READ_BYTES_MAX;
    }
    reads.push((inode, range));
}

type Found = BTreeMap<(u64, u64), (u64, String)>;

fn read_all(
    filesystem: &Filesystem,
    reads: &[(u64, Range<u64>)],
    found: &mut Found,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<()> {
    let next = AtomicUsize::new(0);
    let found = Mutex::new(found);
    let reader = || {
        while let Some((inode, range)) = reads.get(next.fetch_add(1, Ordering::Relaxed)) {
            read_one(filesystem, *inode, range, &found)?;
            progress(range.end - range.start);
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..READERS.min(reads.len())).map(|_| scope.spawn(reader)).collect();
        readers.into_iter().try_for_each(|reader| {
            reader.join().unwrap_or_else(|_| Err(Error::Bug("a thread that reads file data panicked".into())))
        })
    })
}

fn read_one(filesystem: &Filesystem, inode: u64, range: &Range<u64>, found: &Mutex<&mut Found>) -> Result<()> {
    let length = usize::try_from(range.end - range.start).unwrap_or(usize::MAX);
    let mut buffer = AlignedBuffer::try_zeroed(length)?;
    let mut pieces = [ReadPiece { offset: range.start, buffer: &mut buffer }];
    let mut outcome = Ok(());
    filesystem.data().read_detailed(InodeNumber(inode), &mut pieces, &mut || {}, &mut |_, bad| {
        for bad in bad {
            if bad.error.is_media_error() {
                found.lock().insert((inode, bad.start), (bad.end, bad.error.to_string()));
            } else {
                outcome = Err(bad.error);
            }
        }
    });
    outcome
}

/// A path of an inode, for people. Empty if none is known.
pub(crate) fn path(filesystem: &Filesystem, inode: u64) -> Result<String> {
    let path = filesystem.namespace().path(&mut filesystem.transactions().read(), InodeNumber(inode))?;
    Ok(path.map_or_else(String::new, |path| path.escape_ascii().to_string()))
}
