//! Keys in words.

use coppicefs::format::extent::ExtentValue;
use coppicefs::format::namespace::{DirentBucket, Inode, LoggedOperation, Snapshot, Subvolume, XattrBucket};
use coppicefs::format::space::{Backpointer, Bucket, DeviceUsage, FreeBucket};
use coppicefs::format::{BtreeId, CompressionKind};

use crate::output::printable;

/// What a key's value says; the reason if it cannot be decoded.
#[must_use]
pub fn value(btree: BtreeId, value: &[u8]) -> String {
    let text = match btree {
        BtreeId::Extents => ExtentValue::decode(value).map(|extent| describe_extent(&extent)),
        BtreeId::Inodes => Inode::decode(value).map(|inode| describe_inode(&inode)),
        BtreeId::Dirents => DirentBucket::decode(value).map(|bucket| {
            let names = bucket
                .0
                .iter()
                .map(|dirent| format!("'{}' -> {} ({:?})", printable(&dirent.name), dirent.inode, dirent.file_type));
            names.collect::<Vec<_>>().join(", ")
        }),
        BtreeId::Xattrs => XattrBucket::decode(value).map(|bucket| {
            let names =
                bucket.0.iter().map(|xattr| format!("{} = {} bytes", printable(&xattr.name), xattr.value.len()));
            names.collect::<Vec<_>>().join(", ")
        }),
        BtreeId::Buckets => Bucket::decode(value).map(|bucket| {
            format!("{:?} generation {} charged {}", bucket.state, bucket.generation, bucket.charged_bytes)
        }),
        BtreeId::FreeSpace => FreeBucket::decode(value)
            .map(|free| if free.discarded { "discarded".into() } else { "written before".into() }),
        BtreeId::NeedDiscard | BtreeId::Orphans => Ok(String::new()),
        BtreeId::Backpointers => Backpointer::decode(value)
            .map(|back| format!("{} {} ({} bytes on disk)", back.btree.name(), back.position, back.disk_bytes)),
        BtreeId::LoggedOperations => LoggedOperation::decode(value).map(|operation| format!("{operation:?}")),
        BtreeId::Subvolumes => Subvolume::decode(value).map(|subvolume| format!("{subvolume:?}")),
        BtreeId::Snapshots => Snapshot::decode(value).map(|snapshot| format!("{snapshot:?}")),
        BtreeId::Devices => {
            DeviceUsage::decode(value).map(|usage| format!("untouched from bucket {}", usage.untouched_from))
        }
    };
    text.unwrap_or_else(|error| error.to_string())
}

fn describe_extent(extent: &ExtentValue) -> String {
    match extent {
        ExtentValue::Inline(bytes) => format!("inline {} bytes", bytes.len()),
        ExtentValue::Unwritten { length } => format!("unwritten {length} bytes"),
        ExtentValue::Whiteout { length } => format!("whiteout {length} bytes"),
        ExtentValue::Data(data) => {
            let places: Vec<_> = data
                .pointers
                .iter()
                .map(|pointer| format!("{}:{} generation {}", pointer.device, pointer.offset, pointer.generation))
                .collect();
            let stored = match data.compression {
                CompressionKind::None => String::new(),
                kind => format!(
                    " {kind:?} {} of {} at {} in {} on disk",
                    data.length, data.frame_bytes, data.frame_offset, data.disk_bytes
                ),
            };
            format!(
                "{} bytes at {}{stored}, {} {} checksums",
                data.length,
                places.join(" and "),
                data.checksums.len(),
                data.checksum_kind
            )
        }
    }
}

fn describe_inode(inode: &Inode) -> String {
    format!(
        "mode {:o} owner {}:{} links {} size {} allocated {} modified {}.{:09} in {}",
        inode.mode,
        inode.uid,
        inode.gid,
        inode.link_count,
        inode.size,
        inode.allocated_bytes,
        inode.modification_time.seconds,
        inode.modification_time.nanoseconds,
        inode.parent
    )
}
