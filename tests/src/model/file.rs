//! The data of one file of the model: its history, and what of it a crash may leave.

use std::collections::BTreeMap;
use std::sync::Arc;

/// What happened to a file's data.
#[derive(Clone, Debug)]
pub(super) enum FileEvent {
    Write {
        offset: u64,
        data: Arc<[u8]>,
    },
    Truncate(u64),
    /// Made as large as this, if it is smaller.
    Grow(u64),
    Punch {
        offset: u64,
        length: u64,
    },
    Zero {
        offset: u64,
        length: u64,
        keep_size: bool,
    },
    /// `removed` bytes at `offset` go, then `inserted` zeros come.
    Shift {
        offset: u64,
        removed: u64,
        inserted: u64,
    },
    /// All data so far is durable.
    Synced,
    /// All data so far is durable wherever the operation of this event survived.
    Settled,
}

/// See the module's documentation.
#[derive(Clone, Debug)]
pub(super) struct FileHistory {
    block_bytes: u64,
    /// What the file held when it was last synced; the events are after that.
    base: Arc<Vec<u8>>,
    events: Vec<(u64, FileEvent)>,
}

/// What a file may hold after a crash.
struct Candidates {
    block_bytes: usize,
    /// As if everything survived.
    latest: Vec<u8>,
    /// What each block held at some time, cut at the end of the file at that time.
    blocks: BTreeMap<usize, Vec<Vec<u8>>>,
    size_min: usize,
    size_max: usize,
}

impl Candidates {
    fn new(block_bytes: u64, base: &[u8]) -> Self {
        let mut candidates = Self {
            block_bytes: block_bytes as usize,
            latest: base.to_vec(),
            blocks: BTreeMap::new(),
            size_min: 0,
            size_max: 0,
        };
        candidates.settle();
        candidates
    }

    /// Only the latest state is possible.
    fn settle(&mut self) {
        self.blocks = self.latest.chunks(self.block_bytes).map(|block| vec![block.to_vec()]).enumerate().collect();
        self.size_min = self.latest.len();
        self.size_max = self.latest.len();
    }

    fn write(&mut self, offset: usize, data: &[u8]) {
        let end = offset + data.len();
        let changed_from = offset.min(self.latest.len());
        if self.latest.len() < end {
            self.latest.resize(end, 0);
        }
        self.latest[offset..end].copy_from_slice(data);
        for block in changed_from / self.block_bytes..end.div_ceil(self.block_bytes) {
            let start = block * self.block_bytes;
            let state = self.latest[start..self.latest.len().min(start + self.block_bytes)].to_vec();
            let states = self.blocks.entry(block).or_default();
            if !states.contains(&state) {
                states.push(state);
            }
        }
        self.size_max = self.size_max.max(end);
    }

    fn truncate(&mut self, size: usize, survived: bool) {
        let before = self.latest.len();
        self.latest.resize(size, 0);
        if !survived {
            return;
        }
        if size <= before {
            // Data that made the file grow may be lost, and so may that growth.
            self.size_min = self.size_min.min(size);
            self.size_max = size;
        } else {
            // Made larger: what was there before is there now, then zeros.
            self.size_min = size;
            self.size_max = size;
        }
        let block_bytes = self.block_bytes;
        self.blocks.retain(|&block, states| {
            let start = block * block_bytes;
            for state in states.iter_mut() {
                // A state that reached the old end goes on with zeros; a shorter one lacks data that the file held.
                if start + state.len() == before && size > before {
                    state.resize(block_bytes.min(size - start), 0);
                }
                state.truncate(size.saturating_sub(start));
            }
            start < size
        });
        for block in before.div_ceil(block_bytes)..size.div_ceil(block_bytes) {
            self.blocks.insert(block, vec![vec![0; block_bytes.min(size - block * block_bytes)]]);
        }
    }

    /// The whole hole belongs to the prefix: its edges, parts of blocks, are then the newest content with zeros.
    fn punch(&mut self, offset: usize, length: usize, survived: bool) {
        let hole_end = offset.saturating_add(length);
        let end = hole_end.min(self.latest.len());
        if offset >= end {
            return;
        }
        self.latest[offset..end].fill(0);
        let block_bytes = self.block_bytes;
        for block in offset / block_bytes..end.div_ceil(block_bytes) {
            let start = block * block_bytes;
            let block_end = self.latest.len().min(start + block_bytes);
            let states = self.blocks.entry(block).or_default();
            if !survived {
                continue;
            }
            if offset <= start && start + block_bytes <= hole_end {
                states.iter_mut().for_each(|state| state.fill(0));
            } else {
                *states = vec![self.latest[start..block_end].to_vec()];
            }
        }
    }

    fn zero(&mut self, offset: usize, length: usize, keep_size: bool, survived: bool) {
        if !keep_size && offset + length > self.latest.len() {
            self.truncate(offset + length, survived);
        }
        self.punch(offset, length, survived);
    }

    /// What moves was written back before: where the move survived, all that came before it is there.
    fn shift(&mut self, offset: usize, removed: usize, inserted: usize, survived: bool) {
        self.latest.splice(offset..offset + removed, std::iter::repeat_n(0, inserted));
        if survived {
            self.settle();
        }
    }
}

impl FileHistory {
    pub(super) fn new(block_bytes: u64) -> Self {
        Self { block_bytes, base: Arc::default(), events: Vec::new() }
    }

    pub(super) fn push(&mut self, number: u64, event: FileEvent) {
        if matches!(event, FileEvent::Synced) {
            self.base = Arc::new(self.latest());
            self.events.clear();
        } else {
            self.events.push((number, event));
        }
    }

    /// What may be there where operations up to `survived` did survive.
    fn candidates(&self, survived: u64) -> Candidates {
        let mut candidates = Candidates::new(self.block_bytes, &self.base);
        for (number, event) in &self.events {
            let survived = *number <= survived;
            match event {
                FileEvent::Write { offset, data } => candidates.write(*offset as usize, data),
                FileEvent::Truncate(size) => candidates.truncate(*size as usize, survived),
                FileEvent::Grow(size) if *size as usize > candidates.latest.len() => {
                    candidates.truncate(*size as usize, survived);
                }
                FileEvent::Punch { offset, length } => candidates.punch(*offset as usize, *length as usize, survived),
                FileEvent::Zero { offset, length, keep_size } => {
                    candidates.zero(*offset as usize, *length as usize, *keep_size, survived);
                }
                FileEvent::Shift { offset, removed, inserted } => {
                    candidates.shift(*offset as usize, *removed as usize, *inserted as usize, survived);
                }
                FileEvent::Settled if survived => candidates.settle(),
                FileEvent::Grow(_) | FileEvent::Settled | FileEvent::Synced => {}
            }
        }
        candidates
    }

    /// What the file holds now.
    pub(super) fn latest(&self) -> Vec<u8> {
        self.candidates(u64::MAX).latest
    }

    /// Whether `bytes` may be there where operations up to `survived` did survive.
    pub(super) fn check(&self, survived: u64, bytes: &[u8]) -> Result<(), String> {
        let candidates = self.candidates(survived);
        let (least, most) = (candidates.size_min, candidates.size_max);
        if !(least..=most).contains(&bytes.len()) {
            return Err(format!("has {} bytes, should have {least} to {most}", bytes.len()));
        }
        for (block, found) in bytes.chunks(candidates.block_bytes).enumerate() {
            let states = candidates.blocks.get(&block).map_or(&[][..], Vec::as_slice);
            if !states.iter().any(|state| state.starts_with(found)) {
                return Err(describe(block * candidates.block_bytes, found, states, &candidates.latest));
            }
        }
        Ok(())
    }
}

fn describe(offset: usize, found: &[u8], states: &[Vec<u8>], latest: &[u8]) -> String {
    let what = match found {
        _ if found.iter().all(|&byte| byte == 0) => "zeros".to_owned(),
        _ => {
            let latest = latest.get(offset..).unwrap_or_default();
            match found.iter().zip(latest).position(|(one, other)| one != other) {
                Some(position) => format!("bytes that differ from the newest at byte {}", offset + position),
                None => "bytes".to_owned(),
            }
        }
    };
    format!(
        "the block at byte {offset} ({} bytes in the file) holds {what}, which it never did; {} states are allowed",
        found.len(),
        states.len()
    )
}
