//! The command-line tools: `coppice` with its subcommands, and the mount helper.

#![forbid(unsafe_code)]

// `say!` and `complain!`, which end no program.
#[macro_use]
extern crate coppicefs;

pub mod bench;
pub mod cli;
pub mod commands;
pub mod image;
pub mod mount;
pub mod output;
pub mod place;
pub mod probe;
pub mod trial;

/// The allocator of the programs. What a page cache asks for is aligned pieces of 4 KiB to 1 MiB, in any order, for days: glibc's heap then
/// grows to several times what is in use, and `cache_size` bounds nothing.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;
