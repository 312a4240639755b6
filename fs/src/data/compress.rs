//! Frames: compressing a piece of file data, and getting it back.
//!
//! A frame is [`FRAME_BYTES`] of file data, compressed alone. Larger frames shrink better, but a 4 KiB read has to read and decode a
//! whole one. 128 KiB is what the kernel's readahead asks for at most, and the usual size of one FUSE write: so a sequential request
//! meets one or two frames, and none is decoded for much more than what was asked for.
//!
//! Guarantees:
//! 1. [`encode`] gives a frame only if it saves at least one block on disk; all else is stored raw, so that compression never
//!    costs space, and a reader of raw data reads single blocks.
//! 2. [`decode`] is total: the output's length is given by the caller (and bounded by the format), a stream that does not decode to exactly that
//!    length is [`Error::Corrupt`], and no length of the stream's own is believed.
//!
//! No locks. The codecs' contexts are kept for each thread, since making one costs more than compressing a block.

use std::cell::RefCell;

use crate::error::{Error, Result};
use crate::format::CompressionKind;
use crate::memory::AlignedBuffer;
use crate::units::round_up;

/// Bytes of file data in one compressed frame; see the module's documentation for why.
pub const FRAME_BYTES: u32 = 128 << 10;

/// Highest level of zstd that is offered. 20 to 22 need windows larger than a frame and gain nothing.
pub const ZSTD_LEVEL_MAX: i32 = 19;

/// Bytes that are looked at to guess whether a frame will shrink.
const SAMPLE_BYTES: usize = 4096;

/// How new data is compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Compression {
    kind: CompressionKind,
    level: i32,
}

impl Compression {
    /// Stored raw.
    pub const NONE: Self = Self { kind: CompressionKind::None, level: 0 };

    /// Of this kind. `level` counts for zstd only: 1 to 19, 0 for its default (3).
    ///
    /// # Errors
    /// [`Error::Invalid`] for a level that does not exist.
    pub fn new(kind: CompressionKind, level: i32) -> Result<Self> {
        match kind {
            CompressionKind::None | CompressionKind::Lz4 => Ok(Self { kind, level: 0 }),
            CompressionKind::Zstd if level == 0 => Ok(Self { kind, level: 3 }),
            CompressionKind::Zstd if (1..=ZSTD_LEVEL_MAX).contains(&level) => Ok(Self { kind, level }),
            CompressionKind::Zstd => {
                Err(Error::Invalid(format!("zstd level {level} does not exist; 1 to {ZSTD_LEVEL_MAX} do")))
            }
        }
    }

    /// Its kind.
    #[must_use]
    pub fn kind(self) -> CompressionKind {
        self.kind
    }
}

/// A compressed frame, ready to be written.
#[derive(Clone, Debug)]
pub struct EncodedFrame {
    /// The stream, padded with zeros to whole blocks.
    pub bytes: AlignedBuffer,
    /// Bytes of the stream without the padding.
    pub stream_bytes: u32,
}

thread_local! {
    static ZSTD_ENCODER: RefCell<Option<(i32, zstd::bulk::Compressor<'static>)>> = const { RefCell::new(None) };
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    static ZSTD_DECODER: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
}

/// Compresses a frame. `None` if it is to be stored raw: compression is off, the data looks incompressible, or less than one block
/// would be saved.
#[must_use]
pub fn encode(compression: Compression, data: &[u8], block_bytes: u32) -> Option<EncodedFrame> {
    let block = block_bytes as usize;
    if data.len() <= block || !looks_compressible(compression.kind, data) {
        return None;
    }
    SCRATCH.with_borrow_mut(|scratch| {
        let stream_length = match compression.kind {
            CompressionKind::None => return None,
            CompressionKind::Lz4 => {
                let room = lz4_flex::block::get_maximum_output_size(data.len());
                lz4_flex::block::compress_into(data, room_of(scratch, room)?).ok()?
            }
            // A stream longer than this is of no use: then zstd gives up early.
            CompressionKind::Zstd => zstd_compress(compression.level, data, room_of(scratch, data.len() - block)?)?,
        };
        let padded = usize::try_from(round_up(stream_length as u64, u64::from(block_bytes))).ok()?;
        if stream_length == 0 || padded + block > data.len() {
            return None;
        }
        let mut bytes = AlignedBuffer::try_zeroed(padded).ok()?;
        bytes.get_mut(..stream_length)?.copy_from_slice(scratch.get(..stream_length)?);
        Some(EncodedFrame { bytes, stream_bytes: u32::try_from(stream_length).ok()? })
    })
}

fn room_of(scratch: &mut Vec<u8>, length: usize) -> Option<&mut [u8]> {
    if scratch.len() < length {
        scratch.resize(length, 0);
    }
    scratch.get_mut(..length)
}

fn zstd_compress(level: i32, data: &[u8], out: &mut [u8]) -> Option<usize> {
    ZSTD_ENCODER.with_borrow_mut(|slot| {
        if slot.as_ref().is_none_or(|(present, _)| *present != level) {
            *slot = Some((level, zstd::bulk::Compressor::new(level).ok()?));
        }
        let (_, encoder) = slot.as_mut()?;
        encoder.compress_to_buffer(data, out).ok()
    })
}

/// Decodes a stream into `out`, which it must fill exactly.
///
/// # Errors
/// [`Error::Corrupt`] if it does not.
pub fn decode(kind: CompressionKind, stream: &[u8], out: &mut [u8]) -> Result<()> {
    let problem = |text: String| Error::corrupt("compressed frame", text);
    let length = match kind {
        CompressionKind::None => {
            return Err(problem("a frame that is not compressed".into()));
        }
        CompressionKind::Lz4 => lz4_flex::block::decompress_into(stream, out).map_err(|e| problem(e.to_string()))?,
        CompressionKind::Zstd => ZSTD_DECODER.with_borrow_mut(|slot| {
            let decoder = match slot {
                Some(decoder) => decoder,
                None => slot.insert(
                    zstd::bulk::Decompressor::new().map_err(|source| Error::io("making a zstd decoder", source))?,
                ),
            };
            decoder.decompress_to_buffer(stream, out).map_err(|e| problem(e.to_string()))
        })?,
    };
    if length == out.len() { Ok(()) } else { Err(problem(format!("{length} bytes decoded, {} expected", out.len()))) }
}

/// Guesses from two samples whether compression is worth trying. Wrong guesses cost space or time, never correctness.
fn looks_compressible(kind: CompressionKind, data: &[u8]) -> bool {
    if kind == CompressionKind::None {
        return false;
    }
    if data.len() <= 4 * SAMPLE_BYTES {
        return true;
    }
    let middle = data.len() / 2;
    [0, middle].into_iter().filter_map(|from| data.get(from..from + SAMPLE_BYTES)).any(|sample| {
        let mut scratch = [0; SAMPLE_BYTES + SAMPLE_BYTES / 8];
        let matches = lz4_flex::block::compress_into(sample, &mut scratch)
            .is_ok_and(|length| length < SAMPLE_BYTES - SAMPLE_BYTES / 16);
        // zstd also gains where there are no repetitions, but few different bytes.
        matches || (kind == CompressionKind::Zstd && entropy_bits(sample) < 7.5)
    })
}

/// Bits for each byte of an ideal code that knows only how frequent each byte is. Random bytes give about 7.95 on a sample.
fn entropy_bits(sample: &[u8]) -> f32 {
    let mut counts = [0_u16; 256];
    for &byte in sample {
        if let Some(count) = counts.get_mut(usize::from(byte)) {
            *count = count.saturating_add(1);
        }
    }
    let total = sample.len().max(1) as f32;
    counts.iter().filter(|&&count| count > 0).map(|&count| f32::from(count) / total).map(|p| -p * p.log2()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rand_xoshiro::Xoshiro256PlusPlus;
    use rand_xoshiro::rand_core::{Rng, SeedableRng};

    const BLOCK: u32 = 4096;

    fn all() -> Vec<Compression> {
        vec![
            Compression::new(CompressionKind::Lz4, 0).unwrap(),
            Compression::new(CompressionKind::Zstd, 1).unwrap(),
            Compression::new(CompressionKind::Zstd, 19).unwrap(),
        ]
    }

    fn random(length: usize, seed: u64) -> Vec<u8> {
        let mut bytes = vec![0; length];
        Xoshiro256PlusPlus::seed_from_u64(seed).fill_bytes(&mut bytes);
        bytes
    }

    #[test]
    fn levels_are_checked() {
        assert!(Compression::new(CompressionKind::Zstd, 20).is_err());
        assert!(Compression::new(CompressionKind::Zstd, -1).is_err());
        assert!(Compression::new(CompressionKind::Zstd, 19).is_ok());
    }

    #[test]
    fn text_shrinks_and_comes_back() {
        let text: Vec<u8> = (0..20_000_u32).flat_map(|n| format!("line {n}\n").into_bytes()).take(128 << 10).collect();
        for compression in all() {
            let frame = encode(compression, &text, BLOCK).unwrap();
            assert!(frame.bytes.len() * 2 < text.len());
            assert_eq!(frame.bytes.len() % BLOCK as usize, 0);
            let stream = &frame.bytes[..frame.stream_bytes as usize];
            let mut back = vec![0; text.len()];
            decode(compression.kind(), stream, &mut back).unwrap();
            assert_eq!(back, text);
            // Any other length is refused.
            assert!(decode(compression.kind(), stream, &mut vec![0; text.len() - 1]).is_err());
            assert!(decode(compression.kind(), stream, &mut vec![0; text.len() + 1]).is_err());
        }
    }

    #[test]
    fn random_bytes_stay_raw() {
        for compression in all() {
            assert!(encode(compression, &random(128 << 10, 7), BLOCK).is_none());
            assert!(encode(compression, &random(8192, 7), BLOCK).is_none());
        }
    }

    #[test]
    fn few_symbols_without_repetition_are_found_by_zstd() {
        let hex: Vec<u8> = random(64 << 10, 9).iter().flat_map(|b| format!("{b:02x}").into_bytes()).collect();
        assert!(encode(Compression::new(CompressionKind::Zstd, 3).unwrap(), &hex, BLOCK).is_some());
    }

    #[test]
    fn saving_less_than_a_block_is_not_worth_it() {
        // One compressible block among many: saves just about nothing beyond it.
        let mut data = random(32 << 10, 3);
        data[..4000].fill(0);
        for compression in all() {
            assert!(encode(compression, &data, BLOCK).is_none());
        }
        // One block cannot save a block.
        assert!(encode(all()[0], &[0; 4096], BLOCK).is_none());
    }

    proptest! {
        #[test]
        fn arbitrary_streams_never_panic(stream in proptest::collection::vec(any::<u8>(), 0..600), length in 0_usize..9000) {
            let mut out = vec![0; length];
            for kind in [CompressionKind::Lz4, CompressionKind::Zstd] {
                let _ = decode(kind, &stream, &mut out);
            }
        }

        #[test]
        fn damaged_streams_never_panic(at in 0_usize..2000, flip in 1_u8.., seed in 0_u64..20) {
            let mut data = random(16 << 10, seed);
            data[4096..].fill(7);
            for compression in all() {
                let mut frame = encode(compression, &data, BLOCK).unwrap();
                let stream_bytes = frame.stream_bytes as usize;
                frame.bytes[at % stream_bytes] ^= flip;
                let mut out = vec![0; data.len()];
                let _ = decode(compression.kind(), &frame.bytes[..stream_bytes], &mut out);
            }
        }
    }
}
