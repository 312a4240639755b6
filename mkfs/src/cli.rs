//! The command line of mkfs.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Args;
use coppicefs::device::{BlockDevice, Creation, FileDevice, FileOptions};
use coppicefs::env::Env;
use coppicefs::filesystem::{Filesystem, FormatOptions, format};
use coppicefs::format::superblock::{Defaults, Superblock};
use coppicefs::format::{ChecksumKind, CompressionKind};
use coppicefs::options::CompressionChoice;

use crate::layout::{self, Wishes};
use crate::signature;

/// What mkfs takes on the command line.
#[derive(Args, Clone, Debug)]
pub struct Arguments {
    /// Overwrite what is there, whatever it is
    #[arg(short, long)]
    force: bool,
    /// Print nothing
    #[arg(short, long)]
    quiet: bool,
    /// Only say what would be made
    #[arg(short = 'n', long)]
    dry_run: bool,
    /// Name of the filesystem, at most 64 bytes
    #[arg(short = 'L', long, default_value = "")]
    label: String,
    /// Id of the filesystem; random if not given
    #[arg(short = 'U', long)]
    uuid: Option<uuid::Uuid>,
    /// Size of the image, as 10G or 512MiB; needed for a new image, makes an existing one larger
    #[arg(long, value_parser = size)]
    size: Option<u64>,
    /// Unit of allocation and of checksums: 4KiB to 64KiB
    #[arg(long, value_parser = size)]
    block_size: Option<u64>,
    /// Bucket: unit of space reuse, 64KiB to 16MiB; by the size of the device if not given
    #[arg(long, value_parser = size)]
    bucket_size: Option<u64>,
    /// B-tree node: 16KiB to 1MiB; by the size of the device if not given
    #[arg(long, value_parser = size)]
    node_size: Option<u64>,
    /// Each copy of the journal, at least 1MiB; by the size of the device if not given
    #[arg(long, value_parser = size)]
    journal_size: Option<u64>,
    /// Compression of file data: none, lz4, zstd or zstd:1 to zstd:19
    #[arg(long, default_value = "none", value_parser = compression)]
    compression: CompressionChoice,
    /// Checksums of file data: crc32c, xxh3 or none
    #[arg(long, default_value = "crc32c")]
    checksum: ChecksumKind,
    /// Copies of metadata
    #[arg(long, default_value = "2", value_parser = clap::value_parser!(u8).range(1..=2))]
    metadata_replicas: u8,
    /// Image file or disk
    target: PathBuf,
}

/// Parses sizes as people write them; the units are powers of two, with or without the "i".
fn size(text: &str) -> Result<u64, String> {
    let parser = parse_size::Config::new().with_binary();
    parser.parse_size(text).map_err(|error| format!("{error} (use 4096, 512M, 10G, ...)"))
}

fn compression(text: &str) -> Result<CompressionChoice, String> {
    CompressionChoice::parse(text).map_err(|error| error.to_string())
}

/// Runs mkfs.
///
/// # Errors
/// One line that says what is wrong and how to go on; nothing is changed then.
pub fn run(arguments: &Arguments) -> Result<()> {
    let start = Instant::now();
    let target = &arguments.target;
    if arguments.label.len() > 64 {
        bail!("the label is {} bytes long, at most 64 fit", arguments.label.len());
    }
    let existing = inspect(arguments)?;
    let size_bytes = match (existing, arguments.size) {
        (Some(Existing { is_disk: true, size_bytes, .. }), Some(wanted)) if wanted != size_bytes => {
            bail!("{} is a disk of {size_bytes} bytes: --size cannot change that, leave it out", target.display())
        }
        (Some(Existing { size_bytes, .. }), Some(wanted)) if wanted < size_bytes && !arguments.force => {
            bail!(
                "{} is {size_bytes} bytes long: --size {wanted} would cut it off; use -f if that is meant",
                target.display()
            )
        }
        (_, Some(wanted)) => wanted,
        (Some(Existing { size_bytes: 0, .. }), None) => {
            bail!("{} is empty: say how large with --size", target.display())
        }
        (Some(Existing { size_bytes, .. }), None) => size_bytes,
        (None, None) => bail!("{} does not exist: give --size to make a new image", target.display()),
    };
    let options = format_options(arguments, size_bytes)?;
    // Everything that can be refused is refused before anything is touched.
    let planned = format::plan(&options, size_bytes)?;
    if arguments.dry_run {
        describe(arguments, &planned, "would make");
        return Ok(());
    }
    let made = make(arguments, existing.is_some(), size_bytes, &options);
    if made.is_err() && existing.is_none() {
        // An image that was made for this must not be left behind.
        let _ = fs::remove_file(target);
    }
    let superblock = made?;
    describe(arguments, &superblock, "made");
    if !arguments.quiet {
        say!("in {:.2} s", start.elapsed().as_secs_f64());
    }
    Ok(())
}

#[derive(Clone, Copy)]
struct Existing {
    size_bytes: u64,
    is_disk: bool,
}

/// Looks at what is there, and refuses what mkfs should not overwrite.
fn inspect(arguments: &Arguments) -> Result<Option<Existing>> {
    let target = &arguments.target;
    let metadata = match fs::metadata(target) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let folder = target.parent().filter(|folder| !folder.as_os_str().is_empty());
            match folder.filter(|folder| !folder.exists()) {
                Some(folder) => bail!("folder {0} does not exist: `mkdir -p {0}` makes it", folder.display()),
                None => return Ok(None),
            }
        }
        Err(error) => return Err(error).with_context(|| format!("looking at {}", target.display())),
    };
    if metadata.is_dir() {
        bail!("{} is a directory: name an image file in it, or a disk", target.display());
    }
    let read_only = FileOptions { read_only: true, ..FileOptions::default() };
    // The lock says whether somebody uses it.
    let device = Filesystem::open_device_waiting(target, &read_only)?;
    let existing = Existing { size_bytes: device.size_bytes(), is_disk: device.is_disk() };
    drop(device);
    if !arguments.force
        && let Some(found) = signature_of(target)?
    {
        bail!("{} holds {found}: use -f to overwrite it, everything in it is lost then", target.display());
    }
    if !arguments.dry_run {
        fs::OpenOptions::new()
            .write(true)
            .open(target)
            .with_context(|| format!("{} cannot be written", target.display()))?;
    }
    Ok(Some(existing))
}

fn signature_of(target: &Path) -> Result<Option<&'static str>> {
    let mut start = Vec::new();
    fs::File::open(target)
        .and_then(|file| file.take(signature::WANTED_BYTES as u64).read_to_end(&mut start))
        .with_context(|| format!("reading {}", target.display()))?;
    Ok(signature::recognise(&start))
}

fn format_options(arguments: &Arguments, size_bytes: u64) -> Result<FormatOptions> {
    let wishes = Wishes {
        block_bytes: arguments.block_size,
        bucket_bytes: arguments.bucket_size,
        node_bytes: arguments.node_size,
        journal_bytes: arguments.journal_size,
        metadata_replicas: Some(arguments.metadata_replicas),
    };
    let (geometry, journal_bytes) = layout::choose(size_bytes, wishes).map_err(anyhow::Error::msg)?;
    let (compression, compression_level) = match arguments.compression {
        CompressionChoice::None => (CompressionKind::None, 0),
        CompressionChoice::Lz4 => (CompressionKind::Lz4, 0),
        CompressionChoice::Zstd(level) => (CompressionKind::Zstd, level),
    };
    let env = Env::real();
    Ok(FormatOptions {
        uuid: arguments.uuid.unwrap_or_else(uuid::Uuid::new_v4),
        geometry,
        journal_bytes,
        defaults: Defaults {
            label: arguments.label.clone(),
            checksum: arguments.checksum as u8,
            compression: compression as u8,
            compression_level,
            created_at: env.now().seconds,
            created_by: concat!("mkfs-coppice ", env!("CARGO_PKG_VERSION")).into(),
            hash_seed: env.random_u64(),
        },
        owner: Filesystem::caller_identity(),
        buckets_min: format::BUCKETS_MIN,
    })
}

fn make(arguments: &Arguments, exists: bool, size_bytes: u64, options: &FormatOptions) -> Result<Superblock> {
    let creation = if arguments.force { Creation::Force } else { Creation::Careful };
    let device = if exists {
        let mut device = Filesystem::open_device_waiting(&arguments.target, &FileOptions::default())?;
        if device.size_bytes() != size_bytes {
            device.resize(size_bytes, creation)?;
        }
        device
    } else {
        FileDevice::create(&arguments.target, size_bytes, creation, &FileOptions::default())?
    };
    let device: Arc<dyn BlockDevice> = Arc::new(device);
    Ok(Filesystem::format(&device, options, &Env::real())?)
}

fn describe(arguments: &Arguments, superblock: &Superblock, did: &str) {
    if arguments.quiet {
        return;
    }
    let size = |bytes: u64| humansize::format_size(bytes, humansize::BINARY);
    let geometry = superblock.geometry;
    let member_bytes = superblock.members.first().map_or(0, |member| member.size_bytes);
    let buckets = superblock.members.first().map_or(0, |member| member.bucket_count);
    let journal = superblock.layout.journal.first().map_or(0, |range| range.count) * u64::from(geometry.bucket_bytes);
    say!("{did} a coppice filesystem on {}", arguments.target.display());
    say!("  UUID         {}", superblock.filesystem);
    if !superblock.defaults.label.is_empty() {
        say!("  label        {}", superblock.defaults.label);
    }
    say!("  size         {} in {buckets} buckets of {}", size(member_bytes), size(geometry.bucket_bytes.into()));
    say!("  blocks       {}, nodes {}", size(geometry.block_bytes.into()), size(geometry.node_bytes.into()));
    say!("  journal      {}, {} copies of metadata", size(journal), geometry.metadata_replicas);
    say!("  checksum     {}", arguments.checksum);
    say!("  compression  {}", compression_name(arguments.compression));
}

fn compression_name(compression: CompressionChoice) -> String {
    match compression {
        CompressionChoice::None => "none".into(),
        CompressionChoice::Lz4 => "lz4".into(),
        CompressionChoice::Zstd(level) => format!("zstd, level {level}"),
    }
}
