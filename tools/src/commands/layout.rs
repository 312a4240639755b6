//! `coppice collapse` and `coppice insert`: changes of a mounted file's layout that Linux passes on to no FUSE filesystem by itself.

use std::path::PathBuf;

use clap::Args;
use coppicefs::fuse::client;

/// What both take.
#[derive(Args, Clone, Debug)]
pub struct Arguments {
    /// The file, on a mounted coppice filesystem
    file: PathBuf,
    /// Byte offset, a multiple of the block size
    offset: u64,
    /// Length in bytes, a multiple of the block size
    length: u64,
}

/// Takes the range out; the file becomes shorter.
///
/// # Errors
/// If the file is none of ours, or the range reaches its end or is not whole blocks.
pub fn collapse(arguments: &Arguments) -> anyhow::Result<()> {
    Ok(client::collapse_range(&arguments.file, arguments.offset, arguments.length)?)
}

/// Makes a hole; the file becomes longer.
///
/// # Errors
/// If the file is none of ours, or the offset lies behind its end, or the range is not whole blocks.
pub fn insert(arguments: &Arguments) -> anyhow::Result<()> {
    Ok(client::insert_range(&arguments.file, arguments.offset, arguments.length)?)
}
