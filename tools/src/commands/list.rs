//! `coppice list`: the keys of a B-tree, by position.

use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::Args;
use coppicefs::filesystem::Filesystem;
use coppicefs::format::{BtreeId, Position};
use coppicefs::output::is_wanted;
use serde::Serialize;

use super::describe;
use crate::output;

/// What `coppice list` takes.
#[derive(Args, Clone, Debug)]
pub struct Arguments {
    /// Tree: extents, inodes, dirents, xattrs, buckets, free-space, need-discard, backpointers, orphans, ...
    #[arg(short, long, default_value = "inodes")]
    btree: String,
    /// First position, as INODE[:OFFSET[:SNAPSHOT]]
    #[arg(short, long)]
    start: Option<String>,
    /// Last position
    #[arg(short, long)]
    end: Option<String>,
    /// At most this many keys
    #[arg(short, long)]
    limit: Option<usize>,
    /// As JSON
    #[arg(long)]
    json: bool,
    /// Image file or disk, not mounted
    target: PathBuf,
}

#[derive(Serialize)]
struct JsonKey {
    inode: u64,
    offset: u64,
    snapshot: u32,
    bytes: usize,
    value: String,
}

/// Parses a position; what is left out is `rest`'s.
fn position(text: &str, rest: Position) -> anyhow::Result<Position> {
    let mut parts = text.split(':');
    let mut next = |default: u64| parts.next().map_or(Ok(default), str::parse::<u64>);
    let parsed = (|| {
        Ok::<_, anyhow::Error>((next(rest.inode)?, next(rest.offset)?, u32::try_from(next(rest.snapshot.into())?)?))
    })();
    match parsed {
        Ok((inode, offset, snapshot)) if parts.next().is_none() => Ok(Position::new(inode, offset, snapshot)),
        _ => bail!("'{text}' is not a position: INODE[:OFFSET[:SNAPSHOT]]"),
    }
}

/// Runs it.
///
/// # Errors
/// An unknown tree or position, and those of opening and reading.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let btree = BtreeId::ALL.into_iter().find(|btree| btree.name() == arguments.btree).with_context(|| {
        let names: Vec<_> = BtreeId::ALL.iter().map(|btree| btree.name()).collect();
        format!("unknown tree '{}': {}", arguments.btree, names.join(", "))
    })?;
    let start = arguments.start.as_deref().map_or(Ok(Position::MIN), |text| position(text, Position::MIN))?;
    let end = arguments.end.as_deref().map_or(Ok(Position::MAX), |text| position(text, Position::MAX))?;
    let filesystem = Filesystem::open_for_reading(&arguments.target)?;
    let mut left = arguments.limit.unwrap_or(usize::MAX);
    let mut cursor = Some(start);
    let mut keys = Vec::new();
    while let Some(from) = cursor.filter(|from| left > 0 && *from <= end && is_wanted()) {
        let scan = filesystem.forest().scan(btree, from, end, left.min(4096))?;
        left -= scan.keys.len().min(left);
        for (position, value) in &scan.keys {
            let text = describe::value(btree, value);
            if arguments.json {
                let Position { inode, offset, snapshot } = *position;
                keys.push(JsonKey { inode, offset, snapshot, bytes: value.len(), value: text });
            } else {
                say!("{position} {text}");
            }
        }
        cursor = scan.covered_to.successor();
    }
    filesystem.close()?;
    if arguments.json { output::json(&keys) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_parse_in_parts() {
        assert_eq!(position("7", Position::MIN).unwrap(), Position::new(7, 0, 0));
        assert_eq!(position("7:8", Position::MAX).unwrap(), Position::new(7, 8, u32::MAX));
        assert_eq!(position("7:8:9", Position::MIN).unwrap(), Position::new(7, 8, 9));
        assert!(position("x", Position::MIN).is_err());
        assert!(position("1:2:3:4", Position::MIN).is_err());
    }
}
