//! `coppice usage`: where space is, by kind.

use std::path::PathBuf;

use clap::Args;
use coppicefs::filesystem::Filesystem;
use coppicefs::format::journal::AccountingCounter;
use coppicefs::fuse::client;
use serde::Serialize;

use crate::output;

/// What `coppice usage` takes.
#[derive(Args, Clone, Debug)]
pub struct Arguments {
    /// As JSON
    #[arg(long)]
    json: bool,
    /// Image file or disk that is not mounted, or a mountpoint
    target: PathBuf,
}

#[derive(Debug, Default, Serialize)]
struct Usage {
    total_bytes: u64,
    free_bytes: u64,
    available_bytes: u64,
    data_bytes: u64,
    unwritten_bytes: u64,
    inline_bytes: u64,
    metadata_bytes: u64,
    waiting_for_reuse_bytes: u64,
    compressed_logical_bytes: u64,
    compressed_disk_bytes: u64,
    inodes: u64,
}

impl Usage {
    fn of_image(target: &std::path::Path) -> anyhow::Result<Self> {
        let filesystem = Filesystem::open_for_reading(target)?;
        let totals = filesystem.totals();
        let counter = |counter| u64::try_from(totals.get(counter)).unwrap_or(0);
        let bucket_bytes = u64::from(filesystem.superblock().geometry.bucket_bytes);
        let space = filesystem.usage();
        let usage = Self {
            total_bytes: space.total_bytes,
            free_bytes: space.free_bytes,
            available_bytes: space.available_bytes,
            data_bytes: counter(AccountingCounter::DataBytes),
            unwritten_bytes: counter(AccountingCounter::ReservedBytes),
            inline_bytes: counter(AccountingCounter::InlineBytes),
            metadata_bytes: counter(AccountingCounter::MetadataBuckets) * bucket_bytes,
            waiting_for_reuse_bytes: counter(AccountingCounter::NeedDiscardBuckets) * bucket_bytes,
            compressed_logical_bytes: counter(AccountingCounter::CompressedLogicalBytes),
            compressed_disk_bytes: counter(AccountingCounter::CompressedDiskBytes),
            inodes: counter(AccountingCounter::Inodes),
        };
        filesystem.close()?;
        Ok(usage)
    }

    fn of_mount(target: &std::path::Path) -> anyhow::Result<Self> {
        let counters = client::statistics(target)?;
        let counter = |wanted: &str| counters.iter().find(|(name, _)| name == wanted).map_or(0, |(_, value)| *value);
        Ok(Self {
            total_bytes: counter("usage.total_bytes"),
            free_bytes: counter("usage.free_bytes"),
            available_bytes: counter("usage.available_bytes"),
            data_bytes: counter("usage.data_bytes"),
            unwritten_bytes: counter("usage.unwritten_bytes"),
            inline_bytes: counter("usage.inline_bytes"),
            metadata_bytes: counter("usage.metadata_bytes"),
            waiting_for_reuse_bytes: counter("usage.waiting_for_reuse_bytes"),
            compressed_logical_bytes: counter("usage.compressed_logical_bytes"),
            compressed_disk_bytes: counter("usage.compressed_disk_bytes"),
            inodes: counter("usage.inodes"),
        })
    }
}

/// Runs it.
///
/// # Errors
/// Those of opening, or if a directory is no mount of ours.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let usage = if arguments.target.is_dir() {
        Usage::of_mount(&arguments.target)?
    } else {
        Usage::of_image(&arguments.target)?
    };
    if arguments.json {
        return output::json(&usage);
    }
    let mut table = output::table(&[]);
    let rows = [
        ("Total", usage.total_bytes),
        ("Free", usage.free_bytes),
        ("Available", usage.available_bytes),
        ("File data on disk", usage.data_bytes),
        ("Allocated, not written", usage.unwritten_bytes),
        ("File data in keys", usage.inline_bytes),
        ("B-tree nodes", usage.metadata_bytes),
        ("Waiting for reuse", usage.waiting_for_reuse_bytes),
    ];
    for (name, bytes) in rows {
        table.add_row([name.to_owned(), output::size(bytes), bytes.to_string()]);
    }
    if usage.compressed_disk_bytes > 0 {
        #[allow(clippy::cast_precision_loss, reason = "a ratio for people")]
        let ratio = usage.compressed_logical_bytes as f64 / usage.compressed_disk_bytes as f64;
        let name = format!("Compressed, ratio {ratio:.2}");
        let sizes = format!(
            "{} in {}",
            output::size(usage.compressed_logical_bytes),
            output::size(usage.compressed_disk_bytes)
        );
        table.add_row([name, sizes, usage.compressed_disk_bytes.to_string()]);
    }
    table.add_row(["Inodes".to_owned(), usage.inodes.to_string(), String::new()]);
    output::align_right(&mut table, 1);
    output::print(&table);
    Ok(())
}
