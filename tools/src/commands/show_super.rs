//! `coppice show-super`: what the superblock and the newest checkpoint say.

use std::path::PathBuf;

use clap::Args;
use coppicefs::filesystem::Filesystem;
use coppicefs::format::superblock::{BucketRange, Superblock, copy_offsets};
use coppicefs::format::{ChecksumKind, CompressionKind};
use serde::Serialize;

use crate::output;

/// What `coppice show-super` takes.
#[derive(Args, Clone, Debug)]
pub struct Arguments {
    /// As JSON
    #[arg(long)]
    json: bool,
    /// Image file or disk, not mounted
    target: PathBuf,
}

#[derive(Serialize)]
struct Shown {
    uuid: String,
    label: String,
    version: u16,
    version_minimum: u16,
    sequence: u64,
    compat: u64,
    read_only_compat: u64,
    incompat: u64,
    block_bytes: u32,
    bucket_bytes: u32,
    node_bytes: u32,
    metadata_replicas: u8,
    checksum: String,
    compression: String,
    created_at: i64,
    created_by: String,
    devices: Vec<ShownDevice>,
    journal: Vec<ShownRange>,
    checkpoints: Vec<ShownRange>,
    superblock_copies: Vec<u64>,
    stale_copies: Vec<String>,
    errors: Vec<(String, u64)>,
}

#[derive(Serialize)]
struct ShownDevice {
    uuid: String,
    size_bytes: u64,
    buckets: u64,
}

#[derive(Serialize)]
struct ShownRange {
    device: u8,
    first_bucket: u64,
    buckets: u64,
}

impl From<&BucketRange> for ShownRange {
    fn from(range: &BucketRange) -> Self {
        Self { device: range.device, first_bucket: range.first, buckets: range.count }
    }
}

fn shown(superblock: &Superblock, stale: Vec<String>) -> Shown {
    let defaults = &superblock.defaults;
    let compression = match CompressionKind::from_stored(defaults.compression) {
        Ok(CompressionKind::None) => "none".to_owned(),
        Ok(CompressionKind::Lz4) => "lz4".to_owned(),
        Ok(CompressionKind::Zstd) => format!("zstd:{}", defaults.compression_level),
        Err(error) => error.to_string(),
    };
    Shown {
        uuid: superblock.filesystem.to_string(),
        label: defaults.label.clone(),
        version: superblock.version,
        version_minimum: superblock.version_minimum,
        sequence: superblock.sequence,
        compat: superblock.compat,
        read_only_compat: superblock.read_only_compat,
        incompat: superblock.incompat,
        block_bytes: superblock.geometry.block_bytes,
        bucket_bytes: superblock.geometry.bucket_bytes,
        node_bytes: superblock.geometry.node_bytes,
        metadata_replicas: superblock.geometry.metadata_replicas,
        checksum: ChecksumKind::from_stored(defaults.checksum)
            .map_or_else(|error| error.to_string(), |kind| kind.to_string()),
        compression,
        created_at: defaults.created_at,
        created_by: defaults.created_by.clone(),
        devices: superblock
            .members
            .iter()
            .map(|member| ShownDevice {
                uuid: uuid::Uuid::from_bytes(member.uuid).to_string(),
                size_bytes: member.size_bytes,
                buckets: member.bucket_count,
            })
            .collect(),
        journal: superblock.layout.journal.iter().map(Into::into).collect(),
        checkpoints: superblock.layout.checkpoints.iter().map(Into::into).collect(),
        superblock_copies: superblock
            .members
            .first()
            .map_or_else(Vec::new, |member| copy_offsets(member.size_bytes).to_vec()),
        stale_copies: stale,
        errors: superblock.errors.counts.clone(),
    }
}

/// Runs it. Reads the superblock alone: it works on what cannot be mounted.
///
/// # Errors
/// Those of opening and of reading the superblock.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let found = Filesystem::read_superblock(&arguments.target)?;
    let stale = found.stale_copies.iter().map(|(offset, reason)| format!("byte {offset}: {reason}")).collect();
    let shown = shown(&found.superblock, stale);
    if arguments.json {
        return output::json(&shown);
    }
    let ranges = |ranges: &[ShownRange]| {
        let texts = ranges.iter().map(|range| {
            format!("buckets {}..{} of device {}", range.first_bucket, range.first_bucket + range.buckets, range.device)
        });
        texts.collect::<Vec<_>>().join(", ")
    };
    let mut table = output::table(&[]);
    let mut row = |name: &str, value: String| {
        table.add_row([name.to_owned(), value]);
    };
    row("UUID", shown.uuid.clone());
    row("Label", shown.label.clone());
    row("Format version", format!("{} (readable from {})", shown.version, shown.version_minimum));
    row(
        "Features",
        format!(
            "compat {:#x}, read-only-compat {:#x}, incompat {:#x}",
            shown.compat, shown.read_only_compat, shown.incompat
        ),
    );
    row("Sequence", shown.sequence.to_string());
    row("Block size", output::size(shown.block_bytes.into()));
    row("Bucket size", output::size(shown.bucket_bytes.into()));
    row("Node size", output::size(shown.node_bytes.into()));
    row("Copies of metadata", shown.metadata_replicas.to_string());
    row("Checksum", shown.checksum.clone());
    row("Compression", shown.compression.clone());
    row("Made by", shown.created_by.clone());
    for (index, device) in shown.devices.iter().enumerate() {
        row(
            &format!("Device {index}"),
            format!("{} in {} buckets, {}", output::size(device.size_bytes), device.buckets, device.uuid),
        );
    }
    row("Journal", ranges(&shown.journal));
    row("Checkpoint area", ranges(&shown.checkpoints));
    row("Superblock copies", shown.superblock_copies.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "));
    for stale in &shown.stale_copies {
        row("Stale copy", stale.clone());
    }
    for (kind, count) in &shown.errors {
        row("Errors", format!("{kind}: {count}"));
    }
    output::print(&table);
    Ok(())
}
