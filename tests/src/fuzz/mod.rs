//! Fuzz targets: whatever the bytes, no panic, no hang, no allocation beyond their size class, and what holds for each target.
//!
//! - [`TARGETS`]: the targets by name. The first four feed decoders, as the bytes are and with checksums made right, so that what a
//!   malicious image would hold gets past them. `image` makes such an image out of a good one; `operations` performs a workload.
//! - [`corpus`]: where each target's inputs are kept, one in a file (`tests/corpus/TARGET/`): seeds made by [`seeds`] from the real code, and
//!   every input that has ever failed.
//! - [`mutate`]: another input from one or two.

mod decoders;
mod image;
mod operations;

use std::path::PathBuf;

use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};

/// Longest input in bytes.
const INPUT_BYTES_MAX: usize = 64 << 10;

/// A target: its name, what it does with an input, and inputs to begin with.
pub struct Target {
    /// Name of its folder in the corpus.
    pub name: &'static str,
    /// Panics if what must hold does not.
    pub run: fn(&[u8]),
    /// It takes milliseconds, and could wait for ever.
    pub is_slow: bool,
    seeds: fn() -> Vec<Vec<u8>>,
}

/// All targets.
pub const TARGETS: [Target; 6] = [
    Target { name: "superblock", run: decoders::superblock, is_slow: false, seeds: decoders::superblock_seeds },
    Target {
        name: "journal-record",
        run: decoders::journal_record,
        is_slow: false,
        seeds: decoders::journal_record_seeds,
    },
    Target { name: "node", run: decoders::node, is_slow: false, seeds: decoders::node_seeds },
    Target { name: "value", run: decoders::value, is_slow: false, seeds: decoders::value_seeds },
    Target { name: "image", run: image::image, is_slow: true, seeds: image::seeds },
    Target { name: "operations", run: operations::operations, is_slow: true, seeds: operations::seeds },
];

/// The target of this name.
///
/// # Panics
/// If there is none.
#[must_use]
pub fn target(name: &str) -> &'static Target {
    static ALL: [Target; 6] = TARGETS;
    ALL.iter().find(|target| target.name == name).unwrap_or_else(|| panic!("no fuzz target {name}"))
}

/// Where a target's inputs are.
#[must_use]
pub fn corpus(target: &Target) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target.name)
}

/// Inputs to begin with: what the code itself writes.
#[must_use]
pub fn seeds(target: &Target) -> Vec<Vec<u8>> {
    let mut seeds = (target.seeds)();
    seeds.sort();
    seeds.dedup();
    seeds
}

/// Random numbers by seed.
pub struct Random(Xoshiro256PlusPlus);

impl Random {
    /// The same for the same seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(Xoshiro256PlusPlus::seed_from_u64(seed))
    }

    /// From 0 to below `bound`; 0 if that is 0.
    pub fn below(&mut self, bound: usize) -> usize {
        (self.0.next_u64() % bound.max(1) as u64) as usize
    }

    fn word(&mut self) -> u64 {
        self.0.next_u64()
    }
}

/// Another input: `one` with up to eight changes, some of which take pieces of `other`.
#[must_use]
pub fn mutate(random: &mut Random, one: &[u8], other: &[u8]) -> Vec<u8> {
    let mut bytes = one.to_vec();
    for _ in 0..=random.below(8) {
        let at = random.below(bytes.len() + 1);
        let length = 1 + random.below(16);
        let end = (at + length).min(bytes.len());
        match random.below(7) {
            0 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            1 if at < bytes.len() => bytes[at] = random.word() as u8,
            2 => {
                // Numbers at the edges of what a field holds.
                let width = 1 << random.below(4);
                let values = [0, 1, u64::MAX, u64::MAX >> 1, 1 << 63, 1 << 32, (1 << 32) - 1, 4096, random.word()];
                let value = values[random.below(values.len())].to_le_bytes();
                let end = (at + width).min(bytes.len());
                bytes[at..end].copy_from_slice(&value[..end - at]);
            }
            3 => drop(bytes.drain(at..end)),
            4 => drop(bytes.splice(at..at, vec![random.word() as u8; length])),
            5 => {
                let from = random.below(other.len() + 1);
                let piece = &other[from..(from + length * 4).min(other.len())];
                drop(bytes.splice(at..end, piece.iter().copied()));
            }
            _ => bytes.truncate(if random.below(8) == 0 { at } else { bytes.len() }),
        }
    }
    bytes.truncate(INPUT_BYTES_MAX);
    bytes
}
