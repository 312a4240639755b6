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

/// A moment for people, in UTC.
#[must_use]
pub fn time(seconds: i64) -> String {
    // Days from civil, after Hinnant: years begin in March, eras have 400 years.
    let days = seconds.div_euclid(86_400) + 719_468;
    let of_day = seconds.rem_euclid(86_400);
    let (era, day) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let of_year = day - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let date = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year + era * 400 + i64::from(month <= 2);
    let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
    format!("{year:04}-{month:02}-{date:02} {hour:02}:{minute:02}:{second:02} UTC")
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
        ] {
            assert_eq!(time(seconds), text);
        }
    }
}
