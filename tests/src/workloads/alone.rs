//! Each mutation alone: on files that are durable, in as few operations as show it; then with a checkpoint around it, and with space that is
//! short, so that compaction moves what is left.

use super::{collapse, create, directory, fsync, insert, rename, truncate, unlink, write};
use crate::operation::{Operation, Way};

use Operation::{Settle, Sync};

fn of(path: &str) -> String {
    path.into()
}

fn write_as(way: Way, offset: u64, length: u64) -> Operation {
    Operation::WriteAs { path: of("/a"), offset, length, tag: 9, way }
}

/// A file with content and an attribute, a tiny one, a link, directories.
fn prelude() -> Vec<Operation> {
    vec![
        create("/a"),
        write("/a", 0, 40_960, 1),
        Operation::SetXattr { path: of("/a"), name: of("user.old"), value: of("1") },
        create("/tiny"),
        write("/tiny", 0, 60, 2),
        Operation::Link { existing: of("/a"), path: of("/link") },
        directory("/d"),
        directory("/empty"),
        create("/d/b"),
        write("/d/b", 0, 9000, 3),
        Sync,
        Operation::Begin,
    ]
}

/// Every mutation there is.
fn mutations() -> Vec<(&'static str, Operation)> {
    let allocate = |offset, length, keep_size| Operation::Allocate { path: of("/a"), offset, length, keep_size };
    vec![
        ("create", create("/new")),
        ("mkdir", directory("/new")),
        ("symlink", Operation::SymbolicLink { path: of("/new"), target: of("a") }),
        ("mkfifo", Operation::MakeFifo { path: of("/new"), mode: 0o600 }),
        ("link", Operation::Link { existing: of("/a"), path: of("/d/new") }),
        ("unlink", unlink("/d/b")),
        ("unlink of one of two names", unlink("/link")),
        ("rmdir", Operation::RemoveDirectory { path: of("/empty") }),
        ("rename", rename("/a", "/new")),
        ("rename into another directory", rename("/d/b", "/empty/b")),
        ("rename over a file", rename("/d/b", "/a")),
        ("rename of a directory over a directory", rename("/d", "/empty")),
        ("exchange", Operation::Exchange { one: of("/a"), other: of("/d/b") }),
        ("write", write("/a", 10_000, 9000, 9)),
        ("write of a tiny file", write("/tiny", 30, 60, 9)),
        ("append", write_as(Way::Append, 40_960, 9000)),
        ("direct write", write_as(Way::Direct, 8192, 8192)),
        ("direct append", write_as(Way::Direct, 40_960, 8192)),
        ("synchronous write", write_as(Way::Synchronous, 10_000, 9000)),
        ("synchronous direct write", write_as(Way::DirectSynchronous, 8192, 8192)),
        ("truncate to less", truncate("/a", 9000)),
        ("truncate to more", truncate("/a", 90_000)),
        ("open with O_TRUNC", Operation::OpenTruncated { path: of("/a") }),
        ("punch", Operation::Punch { path: of("/a"), offset: 5000, length: 20_000 }),
        ("zero", Operation::Zero { path: of("/a"), offset: 30_000, length: 20_000, keep_size: false }),
        ("zero and keep the size", Operation::Zero { path: of("/a"), offset: 30_000, length: 20_000, keep_size: true }),
        ("collapse", collapse("/a", 4096, 8192)),
        ("insert", insert("/a", 4096, 8192)),
        ("fallocate", allocate(30_000, 40_000, false)),
        ("fallocate and keep the size", allocate(30_000, 40_000, true)),
        ("chmod", Operation::ChangeMode { path: of("/a"), mode: 0o4711 }),
        ("setxattr", Operation::SetXattr { path: of("/a"), name: of("user.new"), value: "2".repeat(300) }),
        ("setxattr over another", Operation::SetXattr { path: of("/a"), name: of("user.old"), value: of("2") }),
        ("removexattr", Operation::RemoveXattr { path: of("/a"), name: of("user.old") }),
    ]
}

/// All of them, with their names.
pub(super) fn all() -> Vec<(&'static str, Vec<Operation>)> {
    let mut all: Vec<_> = mutations()
        .into_iter()
        .map(|(name, mutation)| {
            let mut workload = prelude();
            workload.extend([mutation, Operation::Turns { count: 12 }, Settle]);
            (name, workload)
        })
        .collect();
    all.extend([
        ("mutations between checkpoints", between_checkpoints()),
        ("punch and reuse", punch_and_reuse()),
        ("collapse and write", collapse_and_write()),
        ("insert and write", insert_and_write()),
        ("fifos", fifos()),
        ("names during compaction", during_compaction()),
    ]);
    all
}

fn between_checkpoints() -> Vec<Operation> {
    let mut workload = prelude();
    for (name, mutation) in mutations() {
        // Not those that take away what others need, and one new name is enough.
        let is_left_out = ["unlink", "rmdir", "rename", "exchange", "mkdir", "symlink", "mkfifo"];
        if !is_left_out.iter().any(|start| name.starts_with(start)) {
            workload.extend([mutation, Settle]);
        }
    }
    workload.push(Sync);
    workload
}

/// What a hole gave back is taken by another file, while a crash may still bring the hole's content back.
fn punch_and_reuse() -> Vec<Operation> {
    let mut workload = Vec::new();
    for round in 0..3u32 {
        let (old, new) = (format!("/old{round}"), format!("/new{round}"));
        workload.extend([
            create(&old),
            write(&old, 0, 200_000, 2 * round + 1),
            fsync(&old),
            Operation::Punch { path: old.clone(), offset: 0, length: 196_608 },
            Operation::Turns { count: 8 },
            create(&new),
            write(&new, 0, 190_000, 2 * round + 2),
            Operation::Turns { count: 8 },
            fsync(&new),
        ]);
    }
    workload
}

fn collapse_and_write() -> Vec<Operation> {
    let mut workload = vec![create("/a"), write("/a", 0, 80_000, 1), fsync("/a")];
    for round in 0..3u32 {
        workload.extend([
            write("/a", 20_000, 9000, 10 + round),
            collapse("/a", 4096 * u64::from(round), 8192),
            write("/a", 8000, 5000, 20 + round),
            if round == 1 { fsync("/a") } else { Settle },
        ]);
    }
    workload.push(fsync("/a"));
    workload
}

fn insert_and_write() -> Vec<Operation> {
    let mut workload = vec![create("/a"), write("/a", 0, 50_000, 1), fsync("/a")];
    for round in 0..3u32 {
        workload.extend([
            write("/a", 20_000, 9000, 10 + round),
            insert("/a", 4096 * u64::from(round + 1), 8192),
            write("/a", 8000, 5000, 20 + round),
            if round == 1 { fsync("/a") } else { Settle },
        ]);
    }
    workload.push(fsync("/a"));
    workload
}

fn fifos() -> Vec<Operation> {
    let fifo = |path: &str| Operation::MakeFifo { path: of(path), mode: 0o640 };
    vec![
        fifo("/f"),
        Operation::FsyncDirectory { path: of("/") },
        Operation::Link { existing: of("/f"), path: of("/g") },
        rename("/f", "/h"),
        Settle,
        create("/a"),
        write("/a", 0, 5000, 1),
        rename("/h", "/a"),
        Operation::ChangeMode { path: of("/g"), mode: 0o600 },
        unlink("/g"),
        fifo("/f"),
        Operation::Exchange { one: of("/a"), other: of("/f") },
        Sync,
    ]
}

/// Most of 8 MiB in use, in pieces: whoever wants space waits for compaction, while names change.
fn during_compaction() -> Vec<Operation> {
    let mut workload = vec![directory("/d")];
    for file in 0..26u32 {
        let path = format!("/f{file}");
        workload.extend([create(&path), write(&path, 0, 128 << 10, file + 1)]);
        if file % 7 == 6 {
            workload.push(Sync);
        }
    }
    workload.push(Operation::Begin);
    for round in 0..16u32 {
        let path = format!("/f{}", round * 5 % 26);
        workload.push(write(&path, u64::from(round % 4) * 32_768, 20_000, 100 + round));
        match round % 4 {
            0 => workload.push(rename(&path, &format!("/d/g{round}"))),
            1 => workload.push(Operation::Link { existing: path, path: format!("/d/l{round}") }),
            2 => workload.push(Settle),
            _ => workload.push(Sync),
        }
        if round % 4 == 0 {
            workload.push(rename(&format!("/d/g{round}"), &format!("/f{}", round * 5 % 26)));
        }
    }
    workload.push(Sync);
    workload
}
