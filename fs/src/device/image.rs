//! [`Image`]: a sparse array of bytes in memory that is cheap to copy.
//!
//! The bytes live in chunks of [`CHUNK_BYTES`]; a missing chunk is all zeros, so an image of 8 TiB that nobody wrote costs
//! nothing. Cloning shares the chunks, and a chunk is copied when one of its owners writes to it. Each chunk remembers the
//! hash of its content until it is written again, so hashing many images that differ little is cheap. No locks.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use crate::error::{Error, Result};
use crate::sync::Arc;
use crate::sync::atomic::{AtomicU64, Ordering};

/// Length of a chunk in bytes.
pub const CHUNK_BYTES: u64 = 64 * 1024;
const CHUNK_LENGTH: usize = CHUNK_BYTES as usize;

struct Chunk {
    bytes: Box<[u8; CHUNK_LENGTH]>,
    /// Hash of the bytes, 0 while unknown.
    hash: AtomicU64,
}

impl Chunk {
    fn zeroed() -> Self {
        Self { bytes: Box::new([0; CHUNK_LENGTH]), hash: AtomicU64::new(0) }
    }

    fn hash(&self) -> u64 {
        match self.hash.load(Ordering::Relaxed) {
            0 => {
                // A chunk of zeros counts as a missing one, so that equal content has equal hashes.
                let hash = if self.bytes.iter().all(|&byte| byte == 0) { 1 } else { xxh3_64(&self.bytes[..]).max(2) };
                self.hash.store(hash, Ordering::Relaxed);
                hash
            }
            known => known,
        }
    }
}

impl Clone for Chunk {
    fn clone(&self) -> Self {
        // Cloned only to be written, so the hash does not survive.
        Self { bytes: self.bytes.clone(), hash: AtomicU64::new(0) }
    }
}

/// A sparse, copy-on-write array of bytes. Reads and writes beyond its size are the caller's to refuse: here they are cut off.
#[derive(Clone)]
pub struct Image {
    size_bytes: u64,
    chunks: BTreeMap<u64, Arc<Chunk>>,
}

impl Image {
    /// An image of `size_bytes` zeros.
    #[must_use]
    pub fn new(size_bytes: u64) -> Self {
        Self { size_bytes, chunks: BTreeMap::new() }
    }

    /// An image that holds `bytes`.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let mut image = Self::new(bytes.len() as u64);
        image.write(0, bytes);
        image
    }

    /// Size in bytes.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Memory that the chunks take, in bytes; shared ones count too.
    #[must_use]
    pub fn resident_bytes(&self) -> u64 {
        self.chunks.len() as u64 * CHUNK_BYTES
    }

    /// The parts of `[offset, offset + length)` by chunk: (chunk index, start inside the chunk, start inside the range, length).
    fn parts(&self, offset: u64, length: usize) -> impl Iterator<Item = (u64, usize, usize, usize)> + use<> {
        let length = usize::try_from(self.size_bytes.saturating_sub(offset)).unwrap_or(usize::MAX).min(length);
        let mut done = 0;
        std::iter::from_fn(move || {
            if done == length {
                return None;
            }
            let at = offset + done as u64;
            let inside = (at % CHUNK_BYTES) as usize;
            let part = (CHUNK_LENGTH - inside).min(length - done);
            let item = (at / CHUNK_BYTES, inside, done, part);
            done += part;
            Some(item)
        })
    }

    /// Copies the bytes at `offset` into `buffer`; what lies beyond the image is left alone.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) {
        for (index, inside, outside, length) in self.parts(offset, buffer.len()) {
            let to = &mut buffer[outside..outside + length];
            match self.chunks.get(&index) {
                Some(chunk) => to.copy_from_slice(&chunk.bytes[inside..inside + length]),
                None => to.fill(0),
            }
        }
    }

    /// Writes `data` at `offset`; what lies beyond the image is dropped.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        for (index, inside, outside, length) in self.parts(offset, data.len()) {
            self.chunk_mut(index).bytes[inside..inside + length].copy_from_slice(&data[outside..outside + length]);
        }
    }

    /// Changes the bytes of a range in place, piece by piece: `change` gets the offset on the image of each piece, and the piece.
    pub fn update(&mut self, offset: u64, length: u64, mut change: impl FnMut(u64, &mut [u8])) {
        for (index, inside, _, length) in self.parts(offset, usize::try_from(length).unwrap_or(usize::MAX)) {
            change(index * CHUNK_BYTES + inside as u64, &mut self.chunk_mut(index).bytes[inside..inside + length]);
        }
    }

    /// Zeroes a range; whole chunks are given back.
    pub fn zero(&mut self, offset: u64, length: u64) {
        let end = offset.saturating_add(length).min(self.size_bytes);
        if offset >= end {
            return;
        }
        let whole = offset.div_ceil(CHUNK_BYTES)..end / CHUNK_BYTES;
        if whole.is_empty() {
            self.zero_inside(offset, end);
            return;
        }
        let gone: Vec<u64> = self.chunks.range(whole.clone()).map(|(&index, _)| index).collect();
        for index in gone {
            self.chunks.remove(&index);
        }
        self.zero_inside(offset, whole.start * CHUNK_BYTES);
        self.zero_inside(whole.end * CHUNK_BYTES, end);
    }

    fn zero_inside(&mut self, from: u64, to: u64) {
        for (index, inside, _, length) in self.parts(from, (to - from) as usize) {
            if self.chunks.contains_key(&index) {
                self.chunk_mut(index).bytes[inside..inside + length].fill(0);
            }
        }
    }

    fn chunk_mut(&mut self, index: u64) -> &mut Chunk {
        let chunk = Arc::make_mut(self.chunks.entry(index).or_insert_with(|| Arc::new(Chunk::zeroed())));
        *chunk.hash.get_mut() = 0;
        chunk
    }

    /// A hash of size and content: equal for equal bytes, whatever wrote them. Only chunks that changed since their last hash are
    /// read.
    #[must_use]
    pub fn content_hash(&self) -> u64 {
        self.chunks
            .iter()
            .map(|(index, chunk)| (index, chunk.hash()))
            .filter(|&(_, hash)| hash != 1)
            .fold(self.size_bytes, |sum, (index, hash)| sum.wrapping_add(xxh3_64_with_seed(&index.to_le_bytes(), hash)))
    }

    /// All bytes. For small images: the vector is as large as the image.
    ///
    /// # Errors
    /// ENOMEM if the host has no memory for it.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let no_memory = Error::Posix(rustix::io::Errno::NOMEM);
        let length = usize::try_from(self.size_bytes).map_err(|_| no_memory.clone())?;
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(length).map_err(|_| no_memory)?;
        bytes.resize(length, 0);
        self.read(0, &mut bytes);
        Ok(bytes)
    }

    /// Writes the image to a new sparse file at `path`, replacing what is there.
    ///
    /// # Errors
    /// The host's.
    pub fn to_file(&self, path: &Path) -> Result<()> {
        let context = |error| Error::io(format!("writing the image to {}", path.display()), error);
        let file = File::create(path).map_err(context)?;
        file.set_len(self.size_bytes).map_err(context)?;
        for (index, chunk) in &self.chunks {
            let offset = index * CHUNK_BYTES;
            let length = (self.size_bytes - offset).min(CHUNK_BYTES) as usize;
            file.write_all_at(&chunk.bytes[..length], offset).map_err(context)?;
        }
        Ok(())
    }

    /// Reads an image file. Chunks of zeros take no memory.
    ///
    /// # Errors
    /// The host's.
    pub fn from_file(path: &Path) -> Result<Self> {
        let context = |error| Error::io(format!("reading the image {}", path.display()), error);
        let file = File::open(path).map_err(context)?;
        let mut image = Self::new(file.metadata().map_err(context)?.len());
        let mut buffer = vec![0; CHUNK_LENGTH];
        let mut offset = 0;
        while offset < image.size_bytes {
            // Skip holes: a sparse image of terabytes is read in the time of its data.
            offset = match rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(offset)) {
                Ok(data) => data - data % CHUNK_BYTES,
                Err(rustix::io::Errno::NXIO) => break,
                Err(_) => offset,
            };
            let length = (image.size_bytes - offset).min(CHUNK_BYTES) as usize;
            let piece = &mut buffer[..length];
            match file.read_exact_at(piece, offset) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => break,
                Err(error) => return Err(context(error)),
            }
            if piece.iter().any(|&byte| byte != 0) {
                image.write(offset, piece);
            }
            offset += length as u64;
        }
        Ok(image)
    }
}

impl std::fmt::Debug for Image {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Image({} bytes, {} chunks)", self.size_bytes, self.chunks.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_huge_image_costs_nothing() {
        let mut image = Image::new(8 << 40);
        image.write((8 << 40) - 2, b"end");
        let mut buffer = [0; 4];
        image.read((8 << 40) - 4, &mut buffer);
        assert_eq!(&buffer, b"\0\0en");
        assert_eq!(image.resident_bytes(), CHUNK_BYTES);
        image.zero(0, u64::MAX);
        image.zero(5, 1 << 41);
        assert_eq!(image.content_hash(), Image::new(8 << 40).content_hash());
    }

    #[test]
    fn a_clone_does_not_see_later_writes() {
        let mut image = Image::from_bytes(&[1; 100]);
        let before = image.clone();
        let hash = image.content_hash();
        image.write(10, &[2; 10]);
        assert_eq!(before.to_bytes().unwrap(), vec![1; 100]);
        assert_eq!(before.content_hash(), hash);
        assert_ne!(image.content_hash(), hash);
        image.write(10, &[1; 10]);
        assert_eq!(image.content_hash(), hash);
    }

    #[test]
    fn an_image_survives_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        let mut image = Image::new(10 * CHUNK_BYTES + 12);
        image.write(3 * CHUNK_BYTES - 5, &[9; 20]);
        image.write(10 * CHUNK_BYTES + 6, &[8; 6]);
        image.to_file(&path).unwrap();
        let again = Image::from_file(&path).unwrap();
        assert_eq!(again.to_bytes().unwrap(), image.to_bytes().unwrap());
        assert_eq!(again.content_hash(), image.content_hash());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn an_image_is_a_vector(operations in prop::collection::vec((0u8..3, 0usize..300_000, 0usize..140_000, any::<u8>()), 1..20)) {
            let mut model = vec![0u8; 300_000];
            let mut image = Image::new(300_000);
            for (kind, start, length, value) in operations {
                let end = (start + length).min(model.len());
                match kind {
                    0 => {
                        model[start..end].fill(value);
                        image.write(start as u64, &vec![value; length]);
                    }
                    1 => {
                        model[start..end].fill(0);
                        image.zero(start as u64, length as u64);
                    }
                    _ => {
                        model[start..end].iter_mut().for_each(|byte| *byte ^= value);
                        image.update(start as u64, length as u64, |_, piece| piece.iter_mut().for_each(|byte| *byte ^= value));
                    }
                }
                let mut read = vec![0; end - start];
                image.read(start as u64, &mut read);
                prop_assert_eq!(&read[..], &model[start..end]);
            }
            prop_assert_eq!(image.content_hash(), Image::from_bytes(&model).content_hash());
            prop_assert!(image.to_bytes().unwrap() == model);
        }
    }
}
