//! How commands print: a table for people, or JSON with `--json`. Sizes are in bytes in JSON, humane in tables.

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use coppicefs::output::Output;
use serde::Serialize;

/// Prints a value as JSON.
///
/// # Errors
/// If the value has no JSON.
pub fn json<T: Serialize>(value: &T) -> anyhow::Result<()> {
    serde_json::to_writer_pretty(Output, value)?;
    say!("");
    Ok(())
}

/// A table without lines, with a header.
#[must_use]
pub fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_content_arrangement(ContentArrangement::Disabled);
    if !header.is_empty() {
        table.set_header(header.iter().copied());
    }
    table
}

/// Aligns the columns from `first` on to the right: for numbers.
pub fn align_right(table: &mut Table, first: usize) {
    for index in first..table.column_count() {
        if let Some(column) = table.column_mut(index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
}

/// Prints a table, without spaces at the ends of lines.
pub fn print(table: &Table) {
    for line in table.lines() {
        say!("{}", line.trim_end());
    }
}

/// Bytes for people.
#[must_use]
pub fn size(bytes: u64) -> String {
    humansize::format_size(bytes, humansize::BINARY)
}

/// A moment for people, in UTC, from the seconds since 1970.
#[must_use]
pub fn time(seconds: i64) -> String {
    // Years from -9999 to 9999; what a damaged record says may be far outside.
    match jiff::Timestamp::from_second(seconds) {
        Ok(moment) => moment.strftime("%Y-%m-%d %H:%M:%S UTC").to_string(),
        Err(_) => format!("{seconds} s after 1970"),
    }
}

/// A name or other bytes that may be hostile, made printable.
#[must_use]
pub fn printable(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).escape_debug().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_dates() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_782_400, "2000-02-29 00:00:00 UTC"),
            (1_796_058_183, "2026-11-30 17:03:03 UTC"),
            (-1, "1969-12-31 23:59:59 UTC"),
            (253_402_207_200, "9999-12-30 22:00:00 UTC"),
            (i64::MAX, "9223372036854775807 s after 1970"),
            (i64::MIN, "-9223372036854775808 s after 1970"),
        ] {
            assert_eq!(time(seconds), text);
        }
    }
}
