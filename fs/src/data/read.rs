//! Reading: one pass over the extents, one submission to the device, every byte verified.
//!
//! ```text
//! look up the extents of all pieces -> take bucket references -> check that the keys are still so -> submit everything at once
//!   -> verify block by block, decode each frame once -> what failed: look the key up again
//!                                                         changed: read that piece again
//!                                                         unchanged: read the unit alone from each copy; none good: it is damaged
//! ```
//!
//! Guarantees:
//! 1. A byte is given out only if it was verified by the checksum of its unit (unless the extent has none), in a bucket that was referenced,
//!    by a key that was there *after* the reference was taken. A bucket is not rewritten while it is referenced, so that key's bytes are
//!    this file's, even without checksums.
//! 2. A failure costs exactly its checksum unit: one block of raw data, or one compressed frame. All else of the piece is filled.
//! 3. Raw data goes from the device straight into the destination; a frame is read and decoded once, whatever number of pieces want
//!    parts of it.
//!
//! Holds no lock across I/O; the trees' leaves are locked for each lookup only. Waits for nothing but the device. Frames are decoded in rayon's pool
//! (not in simulation), where nothing waits.

use rayon::prelude::*;

use super::Data;
use super::compress;
use super::extents::Extent;
use crate::device::ReadRequest;
use crate::error::{Corruption, Error, Result};
use crate::format::extent::{DataExtent, ExtentPointer, ExtentValue};
use crate::format::{BtreeId, ChecksumKind, CompressionKind, Position, Value};
use crate::memory::AlignedBuffer;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::units::InodeNumber;

/// One destination of a read.
#[derive(Debug)]
pub struct ReadPiece<'a> {
    /// File offset in bytes, a multiple of the block size.
    pub offset: u64,
    /// Where the bytes go; whole blocks. Aligned memory is read into directly.
    pub buffer: &'a mut [u8],
}

/// A range of a file that cannot be read; all of it belongs to one checksum unit, cut to the piece that asked.
#[derive(Clone, Debug)]
pub struct BadRange {
    /// File offset of its first byte.
    pub start: u64,
    /// File offset of the first byte after it.
    pub end: u64,
    /// Why.
    pub error: Error,
}

/// How often a piece is read again because its keys changed under it, before that is taken for a bug.
const ATTEMPTS_MAX: u32 = 64;

/// Decoding fewer bytes than this is not worth handing to other threads.
const PARALLEL_BYTES_MIN: u64 = 64 << 10;

/// An extent as it was looked up.
struct Found {
    position: Position,
    value: Value,
    extent: Extent,
}

impl Found {
    fn data(&self) -> Option<&DataExtent> {
        match &self.extent.value {
            ExtentValue::Data(data) => Some(data),
            _ => None,
        }
    }
}

/// Bytes of one piece that one extent has.
struct Segment<'a> {
    /// Index of the piece.
    piece: usize,
    /// File offset.
    offset: u64,
    buffer: &'a mut [u8],
}

impl Segment<'_> {
    fn end(&self) -> u64 {
        self.offset + self.buffer.len() as u64
    }
}

/// Raw bytes of one extent for one piece, read in place.
struct RawRead<'a> {
    found: usize,
    segment: Segment<'a>,
    landed: Result<()>,
}

/// A compressed frame, and who wants parts of it.
struct FrameRead<'a> {
    found: usize,
    stored: AlignedBuffer,
    segments: Vec<(usize, Segment<'a>)>,
    landed: Result<()>,
}

/// What one attempt found out about the pieces it was asked for.
#[derive(Default)]
struct Attempted {
    /// (piece, range and reason).
    bad: Vec<(usize, BadRange)>,
    /// Pieces that met a changed key: to be read again.
    again: Vec<usize>,
}

impl Data {
    /// Fills the pieces with what the trees say now, holes and unwritten extents with zeros, and reports each with its first error. The
    /// pieces are in any order and may touch but not overlap. Bytes beyond the file's size are zeros (see [`super`], invariant 1).
    ///
    /// `landed` is called once for each piece.
    pub fn read(&self, inode: InodeNumber, pieces: &mut [ReadPiece<'_>], landed: &mut dyn FnMut(usize, Result<()>)) {
        self.read_detailed(inode, pieces, &mut || {}, &mut |piece, bad| {
            landed(piece, bad.into_iter().next().map_or(Ok(()), |bad| Err(bad.error)));
        });
    }

    /// As [`Self::read`], but reports exactly which bytes of a piece could not be read; all others of it are filled. `looked_up` is called once,
    /// when all extents are known and their buckets are held: from then on only the pieces' own ranges are ever looked up again,
    /// after damage or when copygc moved them.
    pub fn read_detailed(
        &self,
        inode: InodeNumber,
        pieces: &mut [ReadPiece<'_>],
        looked_up: &mut dyn FnMut(),
        landed: &mut dyn FnMut(usize, Vec<BadRange>),
    ) {
        let mut pending = Vec::with_capacity(pieces.len());
        for (index, piece) in pieces.iter().enumerate() {
            match self.check_piece(piece) {
                Ok(()) => pending.push(index),
                Err(error) => landed(index, vec![whole(piece, error)]),
            }
        }
        pending.sort_by_key(|&index| pieces.get(index).map(|piece| piece.offset));
        let mut first = true;
        for attempt in 0.. {
            if pending.is_empty() {
                break;
            }
            let mut looked_up_now = || {
                if std::mem::take(&mut first) {
                    looked_up();
                }
            };
            let outcome = if attempt < ATTEMPTS_MAX {
                self.attempt(inode, pieces, &pending, &mut looked_up_now)
            } else {
                Err(Error::Bug(format!("the extents of inode {inode} changed under a read {attempt} times")))
            };
            match outcome {
                Ok(mut attempted) => {
                    attempted.again.sort_unstable();
                    for &index in &pending {
                        if attempted.again.binary_search(&index).is_err() {
                            let bad = attempted.bad.iter().filter(|(piece, _)| *piece == index);
                            landed(index, bad.map(|(_, bad)| bad.clone()).collect());
                        }
                    }
                    pending.retain(|index| attempted.again.binary_search(index).is_ok());
                }
                // The trees could not be read: nothing is known about any of them.
                Err(error) => {
                    for index in pending.drain(..) {
                        if let Some(piece) = pieces.get(index) {
                            landed(index, vec![whole(piece, error.clone())]);
                        }
                    }
                }
            }
        }
        if first {
            looked_up();
        }
    }

    /// The range to read when `range` is wanted: widened to the live parts of the compressed frames that it cuts, so that no frame is
    /// decoded for a part of what could be had. Advice: on an error it is the range itself.
    #[must_use]
    pub fn widen(&self, inode: InodeNumber, range: std::ops::Range<u64>) -> std::ops::Range<u64> {
        let mut transaction = self.transactions.read();
        let mut at = |offset: u64| {
            let (_, _, extent) = self.view().next(&mut transaction, inode, offset).ok().flatten()?;
            let compressed =
                matches!(&extent.value, ExtentValue::Data(data) if data.compression != CompressionKind::None);
            (compressed && extent.start() <= offset).then(|| extent.start()..extent.end)
        };
        if range.is_empty() {
            return range;
        }
        let first = at(range.start);
        let last = match &first {
            Some(first) if first.end >= range.end => Some(first.clone()),
            _ => at(range.end - 1),
        };
        first.map_or(range.start, |frame| frame.start)..last.map_or(range.end, |frame| frame.end)
    }

    fn check_piece(&self, piece: &ReadPiece<'_>) -> Result<()> {
        let block = u64::from(self.shape.block_bytes);
        let length = piece.buffer.len() as u64;
        if !piece.offset.is_multiple_of(block)
            || !length.is_multiple_of(block)
            || piece.offset.checked_add(length).is_none()
        {
            return Err(Error::Invalid(format!("a read of {length} bytes at {} is not whole blocks", piece.offset)));
        }
        Ok(())
    }

    /// Reads the pieces that `pending` names (ascending by offset) once.
    fn attempt(
        &self,
        inode: InodeNumber,
        pieces: &mut [ReadPiece<'_>],
        pending: &[usize],
        looked_up: &mut dyn FnMut(),
    ) -> Result<Attempted> {
        let mut wanted: Vec<Option<&mut [u8]>> = pieces.iter().map(|_| None).collect();
        let mut offsets = Vec::with_capacity(pending.len());
        for (slot, piece) in wanted.iter_mut().zip(pieces.iter_mut()) {
            *slot = Some(&mut *piece.buffer);
            offsets.push(piece.offset);
        }
        let mut segments: Vec<(usize, Segment<'_>)> = Vec::new();
        let mut found: Vec<Found> = Vec::new();
        let mark = self.space.reuse_mark();
        let mut cursor = Cursor { data: self, inode, transaction: self.transactions.read(), ahead: Ahead::Unknown };
        for &piece in pending {
            let (Some(buffer), Some(&offset)) = (wanted.get_mut(piece).and_then(Option::take), offsets.get(piece))
            else {
                continue;
            };
            cursor.lay_out(Segment { piece, offset, buffer }, &mut found, &mut segments)?;
        }
        let pointers: Vec<ExtentPointer> =
            found.iter().filter_map(Found::data).flat_map(|data| data.pointers.iter().copied()).collect();
        #[cfg(test)]
        super::tests::seam::reach("looked up");
        let _references = (!self.space.switches().no_bucket_references).then(|| self.space.reference(&pointers));
        looked_up();
        let mut attempted = Attempted::default();
        // If a bucket was freed since before the look-up, only a key that is still there names bytes that stay.
        let mut stale = vec![false; found.len()];
        if !self.space.unchanged_since(mark) {
            for (slot, found) in stale.iter_mut().zip(&found) {
                *slot = found.data().is_some() && !self.is_unchanged(found)?;
            }
        }
        // Data that is wanted from the middle of a block on: inline data was looked up before it, and has become a block of the device since.
        let block_bytes = u64::from(self.shape.block_bytes);
        segments.retain(|(index, segment)| {
            let is_stale = stale.get(*index).copied().unwrap_or(false) || !segment.offset.is_multiple_of(block_bytes);
            if is_stale {
                attempted.again.push(segment.piece);
            }
            !is_stale
        });
        self.refuse_reused(inode, &found, &mut segments, &mut attempted)?;
        #[cfg(test)]
        super::tests::seam::reach("submitting");
        self.space.test_pause();
        let (mut raws, mut frames) = self.sort_out(&found, segments)?;
        self.submit(&found, &mut raws, &mut frames);
        for raw in raws {
            self.finish_raw(inode, &found, raw, &mut attempted)?;
        }
        self.finish_frames(inode, &found, frames, &mut attempted)?;
        Ok(attempted)
    }

    /// Of an older state: leaves out the extents whose buckets were used again since.
    fn refuse_reused(
        &self,
        inode: InodeNumber,
        found: &[Found],
        segments: &mut Vec<(usize, Segment<'_>)>,
        attempted: &mut Attempted,
    ) -> Result<()> {
        let Some(check) = self.reuse_check.get() else { return Ok(()) };
        let mut reasons = Vec::with_capacity(found.len());
        for found in found {
            reasons.push(found.data().map(check).transpose()?.flatten());
        }
        segments.retain_mut(|(index, segment)| {
            let Some(reason) = reasons.get(*index).and_then(Option::as_ref) else { return true };
            let what = format!("data of inode {inode} at byte {}", segment.offset);
            let error = Error::corrupt(what, reason.clone());
            segment.buffer.fill(0);
            attempted.bad.push((segment.piece, BadRange { start: segment.offset, end: segment.end(), error }));
            false
        });
        Ok(())
    }

    fn is_unchanged(&self, found: &Found) -> Result<bool> {
        let now = self.transactions.read().get(BtreeId::Extents, found.position)?;
        Ok(now.as_ref() == Some(&found.value))
    }

    /// Splits what is to be read into raw ranges and whole frames.
    fn sort_out<'a>(
        &self,
        found: &[Found],
        segments: Vec<(usize, Segment<'a>)>,
    ) -> Result<(Vec<RawRead<'a>>, Vec<FrameRead<'a>>)> {
        let mut raws = Vec::new();
        let mut frames: Vec<FrameRead<'a>> = Vec::new();
        for (index, segment) in segments {
            let Some(data) = found.get(index).and_then(Found::data) else { continue };
            if data.compression == CompressionKind::None {
                raws.push(RawRead { found: index, segment, landed: Ok(()) });
                continue;
            }
            // Parts of one frame are neighbours, with what was written into the middle of it in between: few frames to look at.
            let same = frames.iter_mut().rev().take(32).find(|frame| {
                found.get(frame.found).and_then(Found::data).is_some_and(|other| other.pointers == data.pointers)
            });
            match same {
                Some(frame) => frame.segments.push((index, segment)),
                None => frames.push(FrameRead {
                    found: index,
                    stored: AlignedBuffer::try_zeroed(data.disk_bytes as usize)?,
                    segments: vec![(index, segment)],
                    landed: Ok(()),
                }),
            }
        }
        Ok((raws, frames))
    }

    /// One submission for each device that has any of it: the first copies.
    fn submit(&self, found: &[Found], raws: &mut [RawRead<'_>], frames: &mut [FrameRead<'_>]) {
        struct Target<'a> {
            buffer: &'a mut [u8],
            offset: u64,
            device: usize,
            landed: &'a mut Result<()>,
        }
        let mut targets: Vec<Target<'_>> = Vec::with_capacity(raws.len() + frames.len());
        for raw in raws {
            let Some((extent, data)) = found.get(raw.found).and_then(|f| Some((&f.extent, f.data()?))) else {
                continue;
            };
            let Some(pointer) = data.pointers.first() else {
                raw.landed = Err(lost(extent.start()));
                continue;
            };
            targets.push(Target {
                offset: pointer.offset + (raw.segment.offset - extent.start()),
                buffer: &mut *raw.segment.buffer,
                device: usize::from(pointer.device.0),
                landed: &mut raw.landed,
            });
        }
        for frame in frames {
            let Some(pointer) = found.get(frame.found).and_then(Found::data).and_then(|data| data.pointers.first())
            else {
                continue;
            };
            targets.push(Target {
                offset: pointer.offset,
                buffer: &mut frame.stored,
                device: usize::from(pointer.device.0),
                landed: &mut frame.landed,
            });
        }
        for (index, device) in self.devices.iter().enumerate() {
            let mut requests = Vec::new();
            let mut results = Vec::new();
            for target in targets.iter_mut().filter(|target| target.device == index) {
                requests.push(ReadRequest { offset: target.offset, buffer: &mut *target.buffer });
                results.push(&mut *target.landed);
            }
            if requests.is_empty() {
                continue;
            }
            self.metrics.device_data_read_submissions.increment();
            device.read_batch(&mut requests, &mut |request, outcome| {
                if let Some(result) = results.get_mut(request) {
                    **result = outcome;
                }
            });
        }
    }

    /// Verifies a raw range block by block and mends what can be mended.
    fn finish_raw(
        &self,
        inode: InodeNumber,
        found: &[Found],
        raw: RawRead<'_>,
        attempted: &mut Attempted,
    ) -> Result<()> {
        let Some(source) = found.get(raw.found) else { return Ok(()) };
        let Some(data) = source.data() else { return Ok(()) };
        let RawRead { segment, landed, .. } = raw;
        let block = self.shape.block_bytes as usize;
        let first_block = (segment.offset - source.extent.start()) / u64::from(self.shape.block_bytes);
        let mut known_unchanged = false;
        for (index, bytes) in segment.buffer.chunks_mut(block).enumerate() {
            let number = first_block + index as u64;
            if landed.is_ok() && block_is_good(data, number, bytes) {
                continue;
            }
            if !known_unchanged {
                if !self.is_unchanged(source)? {
                    attempted.again.push(segment.piece);
                    return Ok(());
                }
                known_unchanged = true;
            }
            let in_extent = number * u64::from(self.shape.block_bytes);
            let offset = source.extent.start() + in_extent;
            if let Err(error) = self.mend_block(inode, offset, data, number, bytes) {
                let end = offset + block as u64;
                attempted.bad.push((segment.piece, BadRange { start: offset, end, error }));
            }
        }
        Ok(())
    }

    /// Reads one block of a raw extent alone, from each copy in turn, until one is good.
    fn mend_block(
        &self,
        inode: InodeNumber,
        offset: u64,
        data: &DataExtent,
        number: u64,
        bytes: &mut [u8],
    ) -> Result<()> {
        let in_extent = number * u64::from(self.shape.block_bytes);
        let mut first_error = None;
        for pointer in &data.pointers {
            let place = pointer.offset + in_extent;
            let error = match self.device(pointer.device)?.read(place, bytes) {
                Ok(()) if block_is_good(data, number, bytes) => return Ok(()),
                Ok(()) => {
                    let expected = usize::try_from(number).ok().and_then(|number| data.checksums.get(number)).copied();
                    damage(inode, offset, data.checksum_kind, data.checksum_kind.compute(bytes), expected)
                        .at(pointer.device, place)
                        .into()
                }
                Err(error) => error,
            };
            first_error.get_or_insert(error);
        }
        let error = first_error.unwrap_or_else(|| lost(offset));
        self.report_damage(inode, offset, &error);
        Err(error)
    }

    /// Verifies and decodes the frames, in parallel where that helps.
    fn finish_frames(
        &self,
        inode: InodeNumber,
        found: &[Found],
        frames: Vec<FrameRead<'_>>,
        attempted: &mut Attempted,
    ) -> Result<()> {
        let decoding = AtomicU64::new(0);
        let decode = |frame: &mut FrameRead<'_>| -> Result<()> {
            self.metrics.data_frames_decoded_at_once.raise_to(decoding.fetch_add(1, Ordering::Relaxed) + 1);
            let outcome = decode_frame(found, frame);
            decoding.fetch_sub(1, Ordering::Relaxed);
            outcome
        };
        let mut frames: Vec<(FrameRead<'_>, Result<()>)> = frames.into_iter().map(|frame| (frame, Ok(()))).collect();
        let decoded_bytes: u64 = frames
            .iter()
            .filter_map(|(frame, _)| found.get(frame.found)?.data())
            .map(|data| u64::from(data.frame_bytes))
            .sum();
        if frames.len() > 1 && decoded_bytes >= PARALLEL_BYTES_MIN && !self.env.is_simulated() {
            frames.par_iter_mut().for_each(|(frame, result)| *result = decode(frame));
        } else {
            frames.iter_mut().for_each(|(frame, result)| *result = decode(frame));
        }
        for (frame, result) in frames {
            let Err(first_error) = result else { continue };
            self.mend_frame(inode, found, frame, first_error, attempted)?;
        }
        Ok(())
    }

    /// A frame that did not decode: read again because its key changed, from another copy, or bad.
    fn mend_frame(
        &self,
        inode: InodeNumber,
        found: &[Found],
        mut frame: FrameRead<'_>,
        first_error: Error,
        attempted: &mut Attempted,
    ) -> Result<()> {
        let Some(source) = found.get(frame.found) else { return Ok(()) };
        let Some(data) = source.data() else { return Ok(()) };
        for (index, _) in &frame.segments {
            if let Some(part) = found.get(*index)
                && !self.is_unchanged(part)?
            {
                attempted.again.extend(frame.segments.iter().map(|(_, segment)| segment.piece));
                return Ok(());
            }
        }
        let mut place = None;
        for pointer in &data.pointers {
            place.get_or_insert((pointer.device, pointer.offset));
            if self.device(pointer.device)?.read(pointer.offset, &mut frame.stored).is_ok()
                && unpack_frame(data, &frame.stored, found, &mut frame.segments).is_ok()
            {
                return Ok(());
            }
        }
        let error = match first_error {
            Error::Corrupt(corruption) => {
                let what = format!("data of inode {inode} at byte {}", source.extent.start());
                let corruption = Corruption::new(what, corruption.problem);
                match place {
                    Some((device, offset)) => corruption.at(device, offset).into(),
                    None => corruption.into(),
                }
            }
            other => other,
        };
        self.report_damage(inode, source.extent.start(), &error);
        for (_, segment) in frame.segments {
            let bad = BadRange { start: segment.offset, end: segment.end(), error: error.clone() };
            attempted.bad.push((segment.piece, bad));
        }
        Ok(())
    }

    fn report_damage(&self, inode: InodeNumber, offset: u64, error: &Error) {
        self.metrics.data_checksum_errors.increment();
        // Whoever asked for it says so to people, with the file's path.
        tracing::debug!(inode = inode.0, offset, "file data cannot be read: {error}");
    }
}

/// Walks the extents of one inode upwards, asking the tree once for each extent.
struct Cursor<'d> {
    data: &'d Data,
    inode: InodeNumber,
    transaction: crate::transaction::Transaction<'d>,
    ahead: Ahead,
}

/// What the cursor knows about the next extent.
enum Ahead {
    Unknown,
    /// Index of the extent with the smallest end above the place where it was asked for.
    Found(usize),
    None,
}

impl Cursor<'_> {
    /// Cuts the segment at extents; fills what needs no device.
    fn lay_out<'a>(
        &mut self,
        mut segment: Segment<'a>,
        found: &mut Vec<Found>,
        segments: &mut Vec<(usize, Segment<'a>)>,
    ) -> Result<()> {
        while !segment.buffer.is_empty() {
            let Some(index) = self.seek(segment.offset, found)? else {
                segment.buffer.fill(0);
                return Ok(());
            };
            let Some(extent) = found.get(index).map(|found| &found.extent) else { return Ok(()) };
            if extent.start() > segment.offset {
                let hole = cut(&mut segment, extent.start());
                hole.buffer.fill(0);
                continue;
            }
            let head = cut(&mut segment, extent.end);
            match &extent.value {
                ExtentValue::Data(_) => segments.push((index, head)),
                ExtentValue::Unwritten { .. } | ExtentValue::Whiteout { .. } => head.buffer.fill(0),
                ExtentValue::Inline(bytes) => {
                    // Inline data starts at offset 0 of the file.
                    let from = usize::try_from(head.offset).unwrap_or(usize::MAX);
                    match bytes.get(from..).and_then(|bytes| bytes.get(..head.buffer.len())) {
                        Some(bytes) => head.buffer.copy_from_slice(bytes),
                        None => return Err(Error::Bug("inline data is shorter than its extent".into())),
                    }
                    #[cfg(test)]
                    super::tests::seam::reach("inline");
                }
            }
        }
        Ok(())
    }

    /// The extent that covers `offset`, or the next one after it.
    fn seek(&mut self, offset: u64, found: &mut Vec<Found>) -> Result<Option<usize>> {
        match self.ahead {
            Ahead::None => return Ok(None),
            Ahead::Found(index) if found.get(index).is_some_and(|found| found.extent.end > offset) => {
                return Ok(Some(index));
            }
            Ahead::Found(_) | Ahead::Unknown => {}
        }
        match self.data.view().next(&mut self.transaction, self.inode, offset)? {
            Some((position, value, extent)) => {
                found.push(Found { position, value, extent });
                self.ahead = Ahead::Found(found.len() - 1);
                Ok(Some(found.len() - 1))
            }
            None => {
                self.ahead = Ahead::None;
                Ok(None)
            }
        }
    }
}

/// Cuts the head of a segment off, up to file offset `end` or its own end.
fn cut<'a>(segment: &mut Segment<'a>, end: u64) -> Segment<'a> {
    let length = usize::try_from(end - segment.offset).unwrap_or(usize::MAX).min(segment.buffer.len());
    let (head, rest) = std::mem::take(&mut segment.buffer).split_at_mut(length);
    let head = Segment { piece: segment.piece, offset: segment.offset, buffer: head };
    segment.offset += length as u64;
    segment.buffer = rest;
    head
}

fn whole(piece: &ReadPiece<'_>, error: Error) -> BadRange {
    BadRange { start: piece.offset, end: piece.offset.saturating_add(piece.buffer.len() as u64), error }
}

/// Whether block `number` of a raw extent is what its checksum says.
pub(super) fn block_is_good(data: &DataExtent, number: u64, bytes: &[u8]) -> bool {
    if data.checksum_kind == ChecksumKind::None {
        return true;
    }
    let expected = usize::try_from(number).ok().and_then(|number| data.checksums.get(number));
    expected == Some(&data.checksum_kind.compute(bytes))
}

/// Why data without a copy cannot be read.
fn lost(offset: u64) -> Error {
    Error::corrupt(format!("data at byte {offset}"), "fsck has found it lost")
}

fn damage(inode: InodeNumber, offset: u64, kind: ChecksumKind, computed: u64, expected: Option<u64>) -> Corruption {
    Corruption::new(
        format!("data of inode {inode} at byte {offset}"),
        format!("{kind:?} is {computed:#x}, {:#x} expected", expected.unwrap_or(0)),
    )
}

/// Decodes a frame that has landed to where its parts are wanted.
fn decode_frame(found: &[Found], frame: &mut FrameRead<'_>) -> Result<()> {
    let Some(data) = found.get(frame.found).and_then(Found::data) else { return Ok(()) };
    std::mem::replace(&mut frame.landed, Ok(()))?;
    unpack_frame(data, &frame.stored, found, &mut frame.segments)
}

/// The stream of a frame, verified.
///
/// # Errors
/// [`Error::Corrupt`] if its checksum does not match.
pub(super) fn verified_stream<'s>(data: &DataExtent, stored: &'s [u8]) -> Result<&'s [u8]> {
    let stream = stored
        .get(..data.stream_bytes as usize)
        .ok_or_else(|| Error::corrupt("compressed frame", "shorter than its stream"))?;
    let computed = data.checksum_kind.compute(stream);
    match data.checksums.first() {
        Some(&expected) if expected != computed => {
            let problem = format!("{:?} is {computed:#x}, {expected:#x} expected", data.checksum_kind);
            Err(Error::corrupt("compressed frame", problem))
        }
        _ => Ok(stream),
    }
}

/// Verifies and decodes a frame, and copies the parts to where they are wanted.
fn unpack_frame(
    data: &DataExtent,
    stored: &[u8],
    found: &[Found],
    segments: &mut [(usize, Segment<'_>)],
) -> Result<()> {
    let stream = verified_stream(data, stored)?;
    if let [(_, segment)] = segments
        && segment.buffer.len() == data.frame_bytes as usize
    {
        return compress::decode(data.compression, stream, segment.buffer);
    }
    let mut decoded = vec![0; data.frame_bytes as usize];
    compress::decode(data.compression, stream, &mut decoded)?;
    for (index, segment) in segments {
        let Some((extent, part)) = found.get(*index).and_then(|found| Some((&found.extent, found.data()?))) else {
            continue;
        };
        let from = u64::from(part.frame_offset) + (segment.offset - extent.start());
        let bytes = usize::try_from(from)
            .ok()
            .and_then(|from| decoded.get(from..)?.get(..segment.buffer.len()))
            .ok_or_else(|| Error::corrupt("compressed frame", "a part lies outside of it"))?;
        segment.buffer.copy_from_slice(bytes);
    }
    Ok(())
}
