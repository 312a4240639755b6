//! Sizes that follow from the size of the device when the user names none.

use coppicefs::filesystem::format::BUCKETS_MIN;
use coppicefs::format::superblock::Geometry;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// Smallest bucket.
const BUCKET_BYTES_MIN: u64 = 64 * KIB;

/// Sizes that the user named.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wishes {
    /// `--block-size`
    pub block_bytes: Option<u64>,
    /// `--bucket-size`
    pub bucket_bytes: Option<u64>,
    /// `--node-size`
    pub node_bytes: Option<u64>,
    /// `--journal-size`
    pub journal_bytes: Option<u64>,
    /// `--metadata-replicas`
    pub metadata_replicas: Option<u8>,
}

/// Chooses what the wishes leave open. Returns the geometry, and the bytes of each copy of the journal.
///
/// # Errors
/// One line that names the wish that cannot be, and what can.
pub fn choose(device_bytes: u64, wishes: Wishes) -> Result<(Geometry, u64), String> {
    let bucket = wishes.bucket_bytes.unwrap_or_else(|| default_bucket_bytes(device_bytes));
    let node = wishes.node_bytes.unwrap_or_else(|| default_node_bytes(device_bytes).min(bucket));
    let block = wishes.block_bytes.unwrap_or(4 * KIB);
    check("--block-size", block, 4 * KIB, 64 * KIB)?;
    check("--bucket-size", bucket, BUCKET_BYTES_MIN, 16 * MIB)?;
    check("--node-size", node, 16 * KIB, MIB)?;
    if node > bucket || bucket / node > 64 {
        return Err(format!(
            "--node-size {node} does not go with --bucket-size {bucket}: a bucket holds 1 to 64 nodes, so {} to {}",
            (bucket / 64).max(16 * KIB),
            bucket.min(MIB)
        ));
    }
    let journal = wishes.journal_bytes.unwrap_or_else(|| (device_bytes / 256).clamp(2 * MIB, 32 * MIB));
    if journal < MIB {
        return Err(format!("--journal-size {journal} is too small: at least 1MiB"));
    }
    // A device that is too small for the default is refused for its own size, later.
    if wishes.journal_bytes.is_some() && journal > device_bytes / 4 {
        return Err(format!("--journal-size {journal} is more than a quarter of the device ({device_bytes} bytes)"));
    }
    let small = |bytes: u64| u32::try_from(bytes).unwrap_or(u32::MAX);
    let geometry = Geometry {
        block_bytes: small(block),
        bucket_bytes: small(bucket),
        node_bytes: small(node),
        metadata_replicas: wishes.metadata_replicas.unwrap_or(2),
    };
    Ok((geometry, journal))
}

fn check(option: &str, bytes: u64, minimum: u64, maximum: u64) -> Result<(), String> {
    if bytes.is_power_of_two() && (minimum..=maximum).contains(&bytes) {
        Ok(())
    } else {
        Err(format!("{option} {bytes} cannot be: a power of two from {minimum} to {maximum}"))
    }
}

/// Some thousands of buckets: few enough to keep track of, many enough for copygc to find empty ones. Smaller than 256 KiB only where there
/// would be too few.
fn default_bucket_bytes(device_bytes: u64) -> u64 {
    let wanted = (device_bytes / 8192).max(1);
    let most = (device_bytes / BUCKETS_MIN).max(1);
    let usual: u64 = (1 << wanted.ilog2()).clamp(256 * KIB, 4 * MIB);
    usual.min(1 << most.ilog2()).max(BUCKET_BYTES_MIN)
}

/// Large nodes make long appends worth it; small devices cannot afford the reserve that dirty large ones need.
fn default_node_bytes(device_bytes: u64) -> u64 {
    match device_bytes {
        0..GIB => 32 * KIB,
        GIB..4_294_967_296 => 64 * KIB,
        _ => 128 * KIB,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_follow_the_device() {
        let (small, journal) = choose(128 * MIB, Wishes::default()).unwrap();
        assert_eq!((small.bucket_bytes, small.node_bytes, journal), (256 << 10, 32 << 10, 2 * MIB));
        for (device_bytes, bucket_bytes) in [(127 * MIB, 128 << 10), (64 * MIB, 128 << 10), (32 * MIB, 64 << 10)] {
            let (tiny, _) = choose(device_bytes, Wishes::default()).unwrap();
            assert_eq!(tiny.bucket_bytes, bucket_bytes, "{device_bytes}");
        }
        let (large, journal) = choose(8192 * GIB, Wishes::default()).unwrap();
        assert_eq!((large.bucket_bytes, large.node_bytes, journal), (4 << 20, 128 << 10, 32 * MIB));
    }

    #[test]
    fn a_wish_that_cannot_be_is_named() {
        let refused = |wishes| choose(GIB, wishes).unwrap_err();
        assert!(refused(Wishes { block_bytes: Some(1000), ..Wishes::default() }).contains("--block-size 1000"));
        assert!(refused(Wishes { node_bytes: Some(MIB), ..Wishes::default() }).contains("--node-size"));
        assert!(refused(Wishes { journal_bytes: Some(GIB), ..Wishes::default() }).contains("--journal-size"));
    }
}
