//! `coppice journal`: what is in the log that the next mount would replay.

use std::path::PathBuf;

use clap::Args;
use coppicefs::filesystem::Filesystem;
use coppicefs::format::journal::{Entries, Entry};
use serde::Serialize;

use super::describe;
use crate::output;

/// What `coppice journal` takes.
#[derive(Args, Clone, Debug)]
pub struct Arguments {
    /// Show the entries of each record
    #[arg(short, long)]
    all: bool,
    /// As JSON
    #[arg(long)]
    json: bool,
    /// Image file or disk, not mounted
    target: PathBuf,
}

#[derive(Serialize)]
struct JsonRecord {
    sequence: u64,
    epoch: u64,
    known_flushed: u64,
    payload_bytes: u32,
    entry_count: u32,
    entries: Vec<String>,
}

fn entry_text(entry: &Entry<'_>) -> String {
    match entry {
        Entry::Key { btree, key } => match key.value {
            Some(value) => format!("{} {} {}", btree.name(), key.position, describe::value(*btree, value)),
            None => format!("{} {} deleted", btree.name(), key.position),
        },
        Entry::Accounting { counter, delta } => format!("{counter:?} {delta:+}"),
        Entry::DataRange { device, offset, length, .. } => format!("data of {length} bytes at {device}:{offset}"),
    }
}

/// Runs it.
///
/// # Errors
/// Those of opening, and a damaged journal.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let inspected = Filesystem::inspect_log(&arguments.target)?;
    let records: Vec<JsonRecord> = inspected
        .log
        .records
        .iter()
        .map(|record| {
            let entries = Entries::new(&record.payload).map(|entry| match entry {
                Ok(entry) => entry_text(&entry),
                Err(error) => error.to_string(),
            });
            JsonRecord {
                sequence: record.header.sequence.0,
                epoch: record.header.epoch,
                known_flushed: record.header.known_flushed.0,
                payload_bytes: record.header.payload_bytes,
                entry_count: record.header.entry_count,
                entries: if arguments.all || arguments.json { entries.collect() } else { Vec::new() },
            }
        })
        .collect();
    if arguments.json {
        return output::json(&records);
    }
    say!(
        "checkpoint {} of epoch {}; replay starts at record {}",
        inspected.checkpoint.number,
        inspected.checkpoint.epoch,
        inspected.checkpoint.first_replay
    );
    let mut table = output::table(&["record", "epoch", "known flushed", "entries", "bytes"]);
    for record in &records {
        table.add_row([
            record.sequence.to_string(),
            record.epoch.to_string(),
            record.known_flushed.to_string(),
            record.entry_count.to_string(),
            record.payload_bytes.to_string(),
        ]);
        for entry in &record.entries {
            table.add_row([format!("    {entry}")]);
        }
    }
    output::align_right(&mut table, 1);
    output::print(&table);
    Ok(())
}
