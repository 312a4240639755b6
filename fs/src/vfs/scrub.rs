//! What is said between a scrub and whoever asks for it, through an ioctl or in one process: requests, status and findings, as fixed-size pages of text.
//!
//! Pure functions over bytes and a trait; no locks.

use std::fmt::Write as _;

use rustix::io::Errno;

use super::types::{Caller, IoctlReply, IoctlRequest};
use super::{Vfs, caller};
use crate::error::{Error, Result};

/// Starts, cancels and asks about a scrub. `_IOWR(0xc7, 3, [u8; 12288])`: a [`ScrubRequest`] in, a [`ScrubPage`] out. Root and the owner of the daemon only.
pub const IOCTL_SCRUB: u32 = 0xf000_c703;
/// Bytes of its argument.
pub const SCRUB_PAGE_BYTES: usize = 12288;
/// Most bytes that one finding takes in a page.
const FINDING_BYTES_MAX: usize = 8_000;

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScrubAsk {
    /// How far it is.
    Status,
    /// Begin, or go on where a cancelled one stopped.
    Start {
        /// Begin from the beginning in any case.
        restart: bool,
        /// Most bytes a second that are read; 0 for no limit.
        rate_bytes: u64,
    },
    /// Stop after the present step.
    Cancel,
}

/// A request: what is asked, and from which finding on they are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScrubRequest {
    /// What is asked.
    pub ask: ScrubAsk,
    /// Number of the first finding that is wanted.
    pub cursor: u64,
}

impl ScrubRequest {
    /// The bytes that go in.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let (what, flag, rate) = match self.ask {
            ScrubAsk::Status => (0_u32, 0_u32, 0),
            ScrubAsk::Start { restart, rate_bytes } => (1, u32::from(restart), rate_bytes),
            ScrubAsk::Cancel => (2, 0, 0),
        };
        let mut bytes = Vec::with_capacity(24);
        bytes.extend_from_slice(&what.to_le_bytes());
        bytes.extend_from_slice(&flag.to_le_bytes());
        bytes.extend_from_slice(&rate.to_le_bytes());
        bytes.extend_from_slice(&self.cursor.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (what, rest) = bytes.split_first_chunk()?;
        let (flag, rest) = rest.split_first_chunk()?;
        let (rate, rest) = rest.split_first_chunk()?;
        let cursor = u64::from_le_bytes(*rest.first_chunk()?);
        let ask = match (u32::from_le_bytes(*what), u32::from_le_bytes(*flag)) {
            (0, _) => ScrubAsk::Status,
            (1, restart @ 0..=1) => ScrubAsk::Start { restart: restart == 1, rate_bytes: u64::from_le_bytes(*rate) },
            (2, _) => ScrubAsk::Cancel,
            _ => return None,
        };
        Some(Self { ask, cursor })
    }
}

/// Where a scrub is in its life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ScrubState {
    /// There was none, as far as is known.
    #[default]
    Never,
    /// It is reading.
    Running,
    /// It was cancelled, and can go on.
    Cancelled,
    /// It has come to its end.
    Done,
    /// It could not go on.
    Failed,
}

impl ScrubState {
    const ALL: [(Self, &'static str); 5] = [
        (Self::Never, "never"),
        (Self::Running, "running"),
        (Self::Cancelled, "cancelled"),
        (Self::Done, "done"),
        (Self::Failed, "failed"),
    ];

    /// Its word.
    #[must_use]
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(state, _)| *state == self).map_or("", |(_, name)| name)
    }

    /// The state of that word.
    #[must_use]
    pub fn named(word: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, name)| *name == word).map(|(state, _)| *state)
    }
}

/// How far a scrub is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScrubStatus {
    /// Where in its life.
    pub state: ScrubState,
    /// What it is reading: `superblock`, `checkpoints`, `journal`, `nodes`, `data`.
    pub phase: String,
    /// It went on where a cancelled one stopped.
    pub resumed: bool,
    /// Bytes that were read.
    pub bytes: u64,
    /// Bytes that there are to read, as far as known.
    pub bytes_total: u64,
    /// Nodes that were verified.
    pub nodes: u64,
    /// Copies of metadata that were verified.
    pub copies: u64,
    /// Bytes of file data that were read, as they are on disk.
    pub data_bytes: u64,
    /// Those of them that have no checksum: that they could be read is all that is known.
    pub unchecked_bytes: u64,
    /// Findings that were repaired.
    pub repaired: u64,
    /// Findings that were not.
    pub damaged: u64,
    /// How long it has been running, in milliseconds.
    pub elapsed_ms: u64,
    /// When it ended or was cancelled, in seconds since 1970; 0 if it was not.
    pub ended_at: i64,
    /// Why it failed.
    pub failure: String,
    /// What who starts it is to be told: why it does not go on where the last one stopped.
    pub notice: String,
}

/// Something that a scrub has found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScrubReport {
    /// `data`, `node`, `checkpoint`, `journal`, `superblock` or `key`.
    pub kind: String,
    /// It is repaired.
    pub is_repaired: bool,
    /// For data: the inode, and the range in bytes.
    pub inode: u64,
    /// First byte.
    pub start: u64,
    /// First byte behind it.
    pub end: u64,
    /// For data: a path of the file, escaped; empty if none is known.
    pub path: String,
    /// What was found.
    pub reason: String,
}

impl ScrubReport {
    /// The finding in a line.
    #[must_use]
    pub fn describe(&self) -> String {
        let outcome = if self.is_repaired { "repaired" } else { "NOT repaired" };
        if self.kind != "data" {
            return format!("{}: {} ({outcome})", self.kind, self.reason);
        }
        let inode = self.inode;
        let name = if self.path.is_empty() { format!("inode {inode}, no name known") } else { self.path.clone() };
        format!("{name}: bytes {} to {} cannot be read: {}", self.start, self.end, self.reason)
    }
}

/// An answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScrubPage {
    /// How far it is.
    pub status: ScrubStatus,
    /// Findings from the one that was asked for on, as many as fit.
    pub findings: Vec<ScrubReport>,
    /// Number of the first finding that is not among them.
    pub next: u64,
    /// How many there are.
    pub finding_count: u64,
}

/// Text that is one field of one line.
fn field(text: &str) -> String {
    text.chars().map(|character| if character.is_control() { ' ' } else { character }).collect()
}

impl ScrubPage {
    /// The bytes that come out, [`SCRUB_PAGE_BYTES`] at most: what does not fit is for the next page.
    #[must_use]
    pub fn encode(&self, cursor: u64) -> Vec<u8> {
        let status = &self.status;
        let mut text = String::new();
        let numbers = [
            ("bytes", status.bytes),
            ("bytes_total", status.bytes_total),
            ("nodes", status.nodes),
            ("copies", status.copies),
            ("data_bytes", status.data_bytes),
            ("unchecked_bytes", status.unchecked_bytes),
            ("repaired", status.repaired),
            ("damaged", status.damaged),
            ("elapsed_ms", status.elapsed_ms),
            ("resumed", u64::from(status.resumed)),
            ("finding_count", self.finding_count),
        ];
        // Writing to a string cannot fail.
        let _ = writeln!(text, "state {}\nphase {}", status.state.name(), field(&status.phase));
        for (name, number) in numbers {
            let _ = writeln!(text, "{name} {number}");
        }
        let failure: String = field(&status.failure).chars().take(500).collect();
        let notice: String = field(&status.notice).chars().take(500).collect();
        let _ = writeln!(text, "failure {failure}\nnotice {notice}\nended_at {}", status.ended_at);
        let mut next = cursor;
        for finding in &self.findings {
            let ScrubReport { kind, is_repaired, inode, start, end, path, reason } = finding;
            let (path, reason) = (field(path), field(reason));
            let mut line =
                format!("finding {kind}\t{}\t{inode}\t{start}\t{end}\t{path}\t{reason}", u8::from(*is_repaired));
            let cut = (0..=line.len().min(FINDING_BYTES_MAX)).rev().find(|&at| line.is_char_boundary(at)).unwrap_or(0);
            line.truncate(cut);
            if size_of::<u64>() + text.len() + line.len() + 2 > SCRUB_PAGE_BYTES {
                break;
            }
            let _ = writeln!(text, "{line}");
            next += 1;
        }
        let mut bytes = next.to_le_bytes().to_vec();
        bytes.extend_from_slice(text.as_bytes());
        bytes
    }

    /// What [`Self::encode`] made.
    ///
    /// # Errors
    /// [`Error::Unusable`] if it is none.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let wrong = || {
            Error::Unusable("the answer about the scrub cannot be understood: another version serves the mount".into())
        };
        let (next, text) = bytes.split_first_chunk().ok_or_else(wrong)?;
        let mut page = Self { next: u64::from_le_bytes(*next), ..Self::default() };
        let text = text.split(|&byte| byte == 0).next().unwrap_or_default();
        let text = std::str::from_utf8(text).map_err(|_| wrong())?;
        for line in text.lines() {
            let (name, value) = line.split_once(' ').ok_or_else(wrong)?;
            let status = &mut page.status;
            let number = || value.parse::<u64>().map_err(|_| wrong());
            match name {
                "state" => {
                    status.state = ScrubState::named(value).ok_or_else(wrong)?;
                }
                "phase" => status.phase = value.to_owned(),
                "failure" => status.failure = value.to_owned(),
                "notice" => status.notice = value.to_owned(),
                "ended_at" => status.ended_at = value.parse().map_err(|_| wrong())?,
                "bytes" => status.bytes = number()?,
                "bytes_total" => status.bytes_total = number()?,
                "nodes" => status.nodes = number()?,
                "copies" => status.copies = number()?,
                "data_bytes" => status.data_bytes = number()?,
                "unchecked_bytes" => status.unchecked_bytes = number()?,
                "repaired" => status.repaired = number()?,
                "damaged" => status.damaged = number()?,
                "elapsed_ms" => status.elapsed_ms = number()?,
                "resumed" => status.resumed = number()? != 0,
                "finding_count" => page.finding_count = number()?,
                "finding" => page.findings.push(decode_finding(value).ok_or_else(wrong)?),
                // Of a later version.
                _ => {}
            }
        }
        Ok(page)
    }
}

fn decode_finding(value: &str) -> Option<ScrubReport> {
    let mut fields = value.split('\t');
    Some(ScrubReport {
        kind: fields.next()?.to_owned(),
        is_repaired: fields.next()? == "1",
        inode: fields.next()?.parse().ok()?,
        start: fields.next()?.parse().ok()?,
        end: fields.next()?.parse().ok()?,
        path: fields.next()?.to_owned(),
        reason: fields.next().unwrap_or_default().to_owned(),
    })
}

/// Who scrubs. Its implementation lies above this layer.
pub trait ScrubControl: Send + Sync {
    /// Does what is asked and says how far it is.
    ///
    /// # Errors
    /// `EBUSY` for a start while one is running; the host's, if no thread can be started.
    fn control(&self, request: ScrubRequest) -> Result<ScrubPage>;
}

impl Vfs {
    /// Says who scrubs. Only the first counts.
    pub fn set_scrub(&self, control: crate::sync::Arc<dyn ScrubControl>) {
        let _ = self.scrub.set(control);
    }

    pub(super) fn scrub_ioctl(&self, caller: &Caller, request: &IoctlRequest<'_>) -> Result<IoctlReply> {
        if !caller::is_privileged(caller) && caller.uid != rustix::process::geteuid().as_raw() {
            return Err(Errno::PERM.into());
        }
        let control = self.scrub.get().ok_or(Errno::OPNOTSUPP)?;
        let asked = ScrubRequest::decode(request.input).ok_or(Errno::INVAL)?;
        let output = control.control(asked)?.encode(asked.cursor);
        Ok(IoctlReply { result: 0, output }.cut(request.output_bytes_max))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_and_pages_come_out_as_they_went_in() {
        for ask in [ScrubAsk::Status, ScrubAsk::Start { restart: true, rate_bytes: 1 << 40 }, ScrubAsk::Cancel] {
            let request = ScrubRequest { ask, cursor: 7 };
            assert_eq!(ScrubRequest::decode(&request.encode()), Some(request));
        }
        assert_eq!(ScrubRequest::decode(&[9; 24]), None);
        assert_eq!(ScrubRequest::decode(&[0; 3]), None);
        let finding = ScrubReport {
            kind: "data".into(),
            inode: 9,
            start: 4096,
            end: 8192,
            path: "/a b".into(),
            reason: "wrong\nchecksum".into(),
            ..ScrubReport::default()
        };
        let status =
            ScrubStatus { state: ScrubState::Running, phase: "data".into(), bytes: 5, ..ScrubStatus::default() };
        let page = ScrubPage { status, findings: vec![finding], next: 0, finding_count: 4 };
        let decoded = ScrubPage::decode(&page.encode(3)).unwrap();
        assert_eq!(decoded.next, 4);
        assert_eq!(decoded.findings[0].reason, "wrong checksum");
        assert_eq!((decoded.status, decoded.finding_count), (page.status.clone(), 4));
        // Whatever the paths, a page holds at least one finding, and pages go on where the one before ended.
        let long = ScrubReport { kind: "data".into(), path: "ä".repeat(9000), ..ScrubReport::default() };
        let many = ScrubPage { findings: vec![long; 3], ..page };
        let bytes = many.encode(0);
        assert!(bytes.len() <= SCRUB_PAGE_BYTES);
        assert_eq!(ScrubPage::decode(&bytes).unwrap().next, 1);
    }
}
