//! What a restore has copied, and what it could not.

use std::ops::Range;
use std::path::Path;

use coppicefs::recovery::Salvage;
use serde::Serialize;

use super::{EXIT_COMPLETE, EXIT_INCOMPLETE};
use crate::output;

/// Notes that are kept: a copy by somebody who is not root may have one for each file.
const NOTES_MAX: usize = 1000;

#[derive(Debug, Serialize)]
struct Damaged {
    path: String,
    inode: u64,
    start: u64,
    end: u64,
    reason: String,
}

#[derive(Debug, Serialize)]
struct Lost {
    path: String,
    reason: String,
}

/// See the module's documentation.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    image: String,
    directory: String,
    checkpoint: u64,
    exit_code: u8,
    pub(super) directories: u64,
    pub(super) files: u64,
    pub(super) symbolic_links: u64,
    pub(super) others: u64,
    pub(super) hard_links: u64,
    /// Inodes that are in lost+found, and not below another one that is.
    pub(super) unnamed: u64,
    /// Bytes of file data that were read.
    pub(super) bytes: u64,
    warnings: Vec<String>,
    damaged: Vec<Damaged>,
    /// Ranges that were copied, of which nobody knows whether they are the file's.
    unverified: Vec<Damaged>,
    lost: Vec<Lost>,
    notes: Vec<String>,
    further_notes: u64,
}

impl Report {
    pub(super) fn new(image: &Path, directory: &Path, salvage: &Salvage) -> Self {
        Self {
            image: image.display().to_string(),
            directory: directory.display().to_string(),
            checkpoint: salvage.checkpoint().number,
            exit_code: EXIT_COMPLETE,
            directories: 0,
            files: 0,
            symbolic_links: 0,
            others: 0,
            hard_links: 0,
            unnamed: 0,
            bytes: 0,
            warnings: salvage.warnings().to_vec(),
            damaged: Vec::new(),
            unverified: Vec::new(),
            lost: Vec::new(),
            notes: Vec::new(),
            further_notes: 0,
        }
    }

    /// A range of a file that cannot be read.
    pub(super) fn damage(&mut self, path: &str, inode: u64, range: Range<u64>, reason: &str) {
        add(&mut self.damaged, path, inode, range, reason);
    }

    /// A range of a file that was copied although nothing can verify it.
    pub(super) fn unverified(&mut self, path: &str, inode: u64, range: Range<u64>, reason: &str) {
        add(&mut self.unverified, path, inode, range, reason);
    }

    /// How many ranges are damaged.
    pub(super) fn damaged_count(&self) -> usize {
        self.damaged.len()
    }

    /// Something that is not there.
    pub(super) fn lose(&mut self, path: &str, reason: String) {
        self.lost.push(Lost { path: path.to_owned(), reason });
    }

    /// Something that is there, but not as it was.
    pub(super) fn note(&mut self, note: String) {
        if self.notes.len() < NOTES_MAX { self.notes.push(note) } else { self.further_notes += 1 }
    }

    /// Prints it, and gives the exit code.
    pub(super) fn print(mut self, json: bool, quiet: bool) -> anyhow::Result<u8> {
        let is_complete =
            self.damaged.is_empty() && self.unverified.is_empty() && self.lost.is_empty() && self.unnamed == 0;
        self.exit_code = if is_complete { EXIT_COMPLETE } else { EXIT_INCOMPLETE };
        if json {
            output::json(&self)?;
            return Ok(self.exit_code);
        }
        for damaged in &self.damaged {
            let Damaged { path, start, end, reason, .. } = damaged;
            let end = if *end == u64::MAX { "the end".to_owned() } else { end.to_string() };
            say!("{path}: bytes {start} to {end} cannot be read, and are left as a hole: {reason}");
        }
        for Damaged { path, start, end, reason, .. } in &self.unverified {
            say!("{path}: bytes {start} to {end} are copied, but may not be the file's: {reason}");
        }
        for Lost { path, reason } in &self.lost {
            say!("{path}{}{reason}", if path.is_empty() { "" } else { ": " });
        }
        if !quiet {
            for note in &self.notes {
                say!("{note}");
            }
            if self.further_notes > 0 {
                say!("and {} more", self.further_notes);
            }
            say!(
                "{}: {} directories, {} files, {} symbolic links, {} others, {} more names, {} of data copied from checkpoint {}",
                self.directory,
                self.directories,
                self.files,
                self.symbolic_links,
                self.others,
                self.hard_links,
                output::size(self.bytes),
                self.checkpoint
            );
            if !is_complete {
                say!(
                    "{} ranges of files and {} other things are lost; {} ranges cannot be verified; {} inodes without a name are in lost+found",
                    self.damaged.len(),
                    self.lost.len(),
                    self.unverified.len(),
                    self.unnamed
                );
            }
        }
        Ok(self.exit_code)
    }
}

/// Adds a range. Neighbours are one.
fn add(ranges: &mut Vec<Damaged>, path: &str, inode: u64, range: Range<u64>, reason: &str) {
    if range.is_empty() {
        return;
    }
    match ranges.last_mut() {
        Some(last) if last.inode == inode && last.path == path && last.end == range.start => last.end = range.end,
        _ => ranges.push(Damaged {
            path: path.to_owned(),
            inode,
            start: range.start,
            end: range.end,
            reason: reason.to_owned(),
        }),
    }
}
