//! More small workloads: each shows one thing that programs do, as short as it can be shown.

use super::{create, directory, fsync, rename, truncate, unlink, write};
use crate::operation::{COMPRESSIBLE, Operation, Way};

fn write_as(way: Way, path: &str, offset: u64, length: u64, tag: u32) -> Operation {
    Operation::WriteAs { path: path.into(), offset, length, tag, way }
}

fn fsync_directory(path: &str) -> Operation {
    Operation::FsyncDirectory { path: path.into() }
}

fn allocate(path: &str, offset: u64, length: u64, keep_size: bool) -> Operation {
    Operation::Allocate { path: path.into(), offset, length, keep_size }
}

fn punch(path: &str, offset: u64, length: u64) -> Operation {
    Operation::Punch { path: path.into(), offset, length }
}

fn hold(path: &str) -> Operation {
    Operation::Hold { path: path.into() }
}

fn link(existing: &str, path: &str) -> Operation {
    Operation::Link { existing: existing.into(), path: path.into() }
}

fn symbolic_link(path: &str, target: &str) -> Operation {
    Operation::SymbolicLink { path: path.into(), target: target.into() }
}

fn set_xattr(path: &str, name: &str, value: String) -> Operation {
    Operation::SetXattr { path: path.into(), name: name.into(), value }
}

fn remove_xattr(path: &str, name: &str) -> Operation {
    Operation::RemoveXattr { path: path.into(), name: name.into() }
}

fn exchange(one: &str, other: &str) -> Operation {
    Operation::Exchange { one: one.into(), other: other.into() }
}

fn change_mode(path: &str, mode: u16) -> Operation {
    Operation::ChangeMode { path: path.into(), mode }
}

use Operation::{Release, Settle, Sync};

/// The workload, with bytes that shrink in two of three writes, so that compressed and raw extents lie side by side.
#[must_use]
pub fn compressible(workload: Vec<Operation>) -> Vec<Operation> {
    let mut workload = workload;
    for operation in &mut workload {
        if let Operation::Write { tag, .. } | Operation::WriteAs { tag, .. } | Operation::WriteUnlinked { tag, .. } =
            operation
            && !tag.is_multiple_of(3)
        {
            *tag |= COMPRESSIBLE;
        }
    }
    workload
}

/// All of them, with their names.
pub(super) fn all() -> Vec<(&'static str, Vec<Operation>)> {
    let mut all = data();
    all.extend(sizes());
    all.extend(names());
    all.extend(inodes());
    all
}

/// Writes and what makes them durable.
fn data() -> Vec<(&'static str, Vec<Operation>)> {
    vec![
        ("append and fsync each time", append_and_fsync()),
        ("O_SYNC", synchronous(Way::Synchronous)),
        ("O_DIRECT", synchronous(Way::Direct)),
        ("O_DIRECT and O_SYNC", synchronous(Way::DirectSynchronous)),
        ("O_APPEND", appends()),
        ("direct writes over cached ones", direct_over_cached()),
        ("sync after each write", sync_after_each()),
        ("one block again and again", one_block()),
        ("two files, one synced", two_files_one_synced()),
        ("a large write", large_write()),
        ("islands in a hole", islands()),
        ("small grows large", small_grows_large()),
        ("large becomes small", large_becomes_small()),
        ("checkpoint between write and fsync", checkpoint_between()),
        ("fdatasync", data_synced()),
    ]
}

/// Truncation, holes, space that is taken ahead.
fn sizes() -> Vec<(&'static str, Vec<Operation>)> {
    vec![
        ("truncate and write beyond", truncate_and_write_beyond()),
        ("grow and write", grow_and_write()),
        ("truncate to nothing and write anew", write_anew()),
        ("preallocate and write", preallocate_and_write()),
        ("preallocate beyond the end", preallocate_beyond()),
        ("preallocate over data", preallocate_over_data()),
        ("punch what is preallocated", punch_preallocated()),
        ("punch all", punch_all()),
        ("punch in the middle", punch_middle()),
    ]
}

/// Names: renames, links, directories.
fn names() -> Vec<(&'static str, Vec<Operation>)> {
    vec![
        ("mkdir, create, fsync the directory", create_in_new_directory()),
        ("fsync of a file in new directories", fsync_deep()),
        ("rename without fsync", rename_unsynced()),
        ("rename of tiny files", rename_tiny()),
        ("a chain of renames", rename_chain()),
        ("a directory over an empty one", directory_over_directory()),
        ("directories move with what they hold", directories_move()),
        ("exchange without fsync", exchange_unsynced()),
        ("exchange of a file and a directory", exchange_kinds()),
        ("hard links come and go", hard_links()),
        ("a link stays when its file is replaced", link_stays()),
        ("symbolic links are replaced", symbolic_links()),
        ("a name is used again", name_used_again()),
        ("a directory is made again", directory_again()),
    ]
}

/// What inodes carry, and inodes without a name.
fn inodes() -> Vec<(&'static str, Vec<Operation>)> {
    vec![
        ("xattrs of all sizes", xattrs()),
        ("xattrs of directories", xattrs_of_directories()),
        ("modes", modes()),
        ("an unlinked file that is open", unlinked_and_open()),
        ("a replaced file that is open", replaced_and_open()),
        ("many unlinked files that are open", many_open()),
    ]
}

fn append_and_fsync() -> Vec<Operation> {
    let mut workload = vec![create("/log")];
    let mut end = 0;
    for (tag, length) in (1..).zip([40, 4000, 60, 9000, 1, 4096, 12_000, 333]) {
        workload.extend([write("/log", end, length, tag), fsync("/log")]);
        end += length;
    }
    workload
}

/// Whole blocks, since direct writes want them.
fn synchronous(way: Way) -> Vec<Operation> {
    let mut workload = vec![create("/a"), create("/b")];
    for (tag, (at, blocks)) in (1..).zip([(0, 1), (1, 4), (0, 2), (8, 1), (2, 8), (3, 1)]) {
        workload.push(write_as(way, "/a", at * 4096, blocks * 4096, tag));
        if tag % 2 == 0 {
            workload.push(write_as(way, "/b", u64::from(tag) * 8192, 8192, 100 + tag));
        }
        if tag == 4 {
            workload.push(Settle);
        }
    }
    workload.push(fsync("/a"));
    workload
}

fn appends() -> Vec<Operation> {
    let mut workload = vec![create("/log")];
    let mut end = 0;
    for (tag, length) in (1..).zip([100, 5000, 3, 4096, 20_000, 77]) {
        workload.push(write_as(Way::Append, "/log", end, length, tag));
        end += length;
        match tag % 3 {
            0 => workload.push(Settle),
            1 => {}
            _ => workload.push(fsync("/log")),
        }
    }
    workload
}

fn direct_over_cached() -> Vec<Operation> {
    vec![
        create("/a"),
        write("/a", 0, 40_000, 1),
        write_as(Way::Direct, "/a", 8192, 8192, 2),
        fsync("/a"),
        write("/a", 10_000, 5000, 3),
        write_as(Way::Direct, "/a", 12_288, 16_384, 4),
        write("/a", 20_000, 300, 5),
        Settle,
        write_as(Way::DirectSynchronous, "/a", 0, 4096, 6),
        write_as(Way::Direct, "/a", 40_960, 4096, 7),
        truncate("/a", 41_000),
        fsync("/a"),
    ]
}

fn sync_after_each() -> Vec<Operation> {
    let mut workload = Vec::new();
    for round in 0..4u32 {
        let path = format!("/f{round}");
        workload.extend([
            create(&path),
            Sync,
            write(&path, 0, 100 + u64::from(round) * 5000, round + 1),
            Sync,
            write("/f0", u64::from(round) * 1000, 1500, 10 + round),
            Sync,
        ]);
    }
    workload
}

fn one_block() -> Vec<Operation> {
    let mut workload = vec![create("/a"), write("/a", 0, 8192, 1), fsync("/a")];
    for round in 0..12u32 {
        workload.push(write("/a", 4096, 4096, 10 + round));
        match round % 4 {
            1 => workload.push(fsync("/a")),
            3 => workload.push(Settle),
            _ => {}
        }
    }
    workload
}

fn two_files_one_synced() -> Vec<Operation> {
    let mut workload = vec![create("/synced"), create("/lazy")];
    for round in 0..5u32 {
        let at = u64::from(round) * 6000;
        workload.extend([
            write("/lazy", at, 6000, 2 * round + 1),
            write("/synced", at, 6000, 2 * round + 2),
            fsync("/synced"),
        ]);
    }
    workload.push(Settle);
    workload
}

fn large_write() -> Vec<Operation> {
    vec![
        create("/a"),
        write("/a", 0, 1_300_000, 1),
        fsync("/a"),
        write("/a", 200_000, 700_000, 2),
        Settle,
        write("/a", 900_001, 150_000, 3),
        fsync("/a"),
        truncate("/a", 600_000),
        Sync,
    ]
}

fn islands() -> Vec<Operation> {
    let mut workload = vec![create("/sparse")];
    for (tag, at) in (1..).zip([1 << 20, 0, 600 << 10, (300 << 10) - 100, (1 << 20) + 5000]) {
        workload.push(write("/sparse", at, 3000, tag));
        workload.push(if tag % 2 == 0 { fsync("/sparse") } else { Settle });
    }
    workload.extend([truncate("/sparse", 800 << 10), Sync]);
    workload
}

/// From inside the inode to extents.
fn small_grows_large() -> Vec<Operation> {
    let mut workload = vec![create("/a"), create("/b")];
    let mut tag = 0;
    for size in [1, 20, 90, 200, 500, 2000, 4097, 30_000] {
        tag += 1;
        workload.extend([write("/a", 0, size, tag), write("/b", size / 2, size, 100 + tag)]);
        workload.push(if tag % 2 == 0 { fsync("/a") } else { Settle });
    }
    workload
}

fn large_becomes_small() -> Vec<Operation> {
    let mut workload = vec![create("/a"), write("/a", 0, 50_000, 1), fsync("/a")];
    for (tag, size) in (2..).zip([20_000, 5000, 4096, 700, 60, 1, 0]) {
        workload.extend([truncate("/a", size), write("/a", size / 2, 10, tag)]);
        workload.push(if tag % 3 == 0 { fsync("/a") } else { Settle });
    }
    workload
}

fn checkpoint_between() -> Vec<Operation> {
    let mut workload = Vec::new();
    for round in 0..3u32 {
        let path = format!("/f{round}");
        workload.extend([
            create(&path),
            write(&path, 0, 20_000, round + 1),
            Settle,
            Settle,
            write(&path, 3000, 9000, 10 + round),
            Settle,
            fsync(&path),
        ]);
    }
    workload
}

fn data_synced() -> Vec<Operation> {
    let fdatasync = |path: &str| Operation::Fdatasync { path: path.into() };
    vec![
        create("/a"),
        write("/a", 0, 3000, 1),
        fdatasync("/a"),
        write("/a", 3000, 9000, 2),
        fdatasync("/a"),
        write("/a", 1000, 500, 3),
        fdatasync("/a"),
        truncate("/a", 2000),
        fdatasync("/a"),
        Settle,
        truncate("/a", 9000),
        write("/a", 5000, 100, 4),
        fdatasync("/a"),
    ]
}

fn truncate_and_write_beyond() -> Vec<Operation> {
    let mut workload = vec![create("/a"), write("/a", 0, 30_000, 1), fsync("/a")];
    for round in 0..4u64 {
        workload.extend([
            truncate("/a", 10_000 - round * 2000),
            write("/a", 15_000 + round * 1000, 3000, 10 + round as u32),
            if round % 2 == 0 { Settle } else { fsync("/a") },
        ]);
    }
    workload
}

fn grow_and_write() -> Vec<Operation> {
    let mut workload = vec![create("/a"), write("/a", 0, 100, 1)];
    for round in 1..5u64 {
        workload.extend([
            truncate("/a", round * 9000),
            write("/a", round * 9000 - 4500, 2000, 10 + round as u32),
            if round % 2 == 0 { Settle } else { fsync("/a") },
        ]);
    }
    workload
}

/// As `>` in a shell does, with nothing synced in between.
fn write_anew() -> Vec<Operation> {
    let mut workload = vec![create("/a"), write("/a", 0, 20_000, 1), fsync("/a")];
    for round in 0..4u32 {
        workload.extend([truncate("/a", 0), write("/a", 0, 15_000 + u64::from(round) * 5000, 10 + round), Settle]);
    }
    workload.push(fsync("/a"));
    workload
}

fn preallocate_and_write() -> Vec<Operation> {
    vec![
        create("/a"),
        allocate("/a", 0, 100_000, false),
        Settle,
        write("/a", 20_000, 10_000, 1),
        fsync("/a"),
        write("/a", 0, 5000, 2),
        write("/a", 90_000, 30_000, 3),
        Settle,
        write("/a", 25_000, 100, 4),
        fsync("/a"),
    ]
}

fn preallocate_beyond() -> Vec<Operation> {
    vec![
        create("/a"),
        write("/a", 0, 5000, 1),
        allocate("/a", 0, 200_000, true),
        fsync("/a"),
        write("/a", 5000, 9000, 2),
        Settle,
        fsync("/a"),
        truncate("/a", 14_000),
        write("/a", 50_000, 4096, 3),
        fsync("/a"),
        truncate("/a", 1000),
        Settle,
        allocate("/a", 150_000, 10_000, true),
        Sync,
    ]
}

fn preallocate_over_data() -> Vec<Operation> {
    vec![
        create("/a"),
        write("/a", 8192, 8192, 1),
        allocate("/a", 0, 40_000, false),
        fsync("/a"),
        write("/a", 0, 30_000, 2),
        allocate("/a", 10_000, 60_000, false),
        Settle,
        write("/a", 65_000, 10_000, 3),
        allocate("/a", 70_000, 20_000, false),
        fsync("/a"),
    ]
}

fn punch_preallocated() -> Vec<Operation> {
    vec![
        create("/a"),
        allocate("/a", 0, 64 << 10, false),
        write("/a", 16 << 10, 16 << 10, 1),
        fsync("/a"),
        punch("/a", 8 << 10, 16 << 10),
        Settle,
        write("/a", 12 << 10, 4096, 2),
        punch("/a", 0, 64 << 10),
        fsync("/a"),
        allocate("/a", 4096, 8192, false),
        write("/a", 0, 16 << 10, 3),
        punch("/a", 4096, 4096),
        Sync,
    ]
}

fn punch_all() -> Vec<Operation> {
    let mut workload = vec![create("/a")];
    for round in 0..3u32 {
        workload.extend([
            write("/a", 0, 40_960, round + 1),
            if round == 1 { fsync("/a") } else { Settle },
            punch("/a", 0, 40_960),
            if round == 2 { Settle } else { fsync("/a") },
        ]);
    }
    workload
}

fn punch_middle() -> Vec<Operation> {
    vec![
        create("/a"),
        write("/a", 0, 100_000, 1),
        fsync("/a"),
        punch("/a", 8192, 20_480),
        write("/a", 16_384, 4096, 2),
        punch("/a", 4096, 8192),
        Settle,
        punch("/a", 61_440, 1 << 20),
        fsync("/a"),
        write("/a", 98_000, 1000, 3),
        punch("/a", 40_960, 8192),
        Settle,
        Sync,
    ]
}

fn create_in_new_directory() -> Vec<Operation> {
    let mut workload = Vec::new();
    for round in 0..3u32 {
        let folder = format!("/d{round}");
        let (one, other) = (format!("{folder}/one"), format!("{folder}/other"));
        workload.extend([
            directory(&folder),
            create(&one),
            write(&one, 0, 5000, round + 1),
            create(&other),
            fsync_directory(&folder),
            write(&other, 0, 100, 10 + round),
            Settle,
        ]);
    }
    workload
}

/// The file's name is durable, and so is the way to it.
fn fsync_deep() -> Vec<Operation> {
    vec![
        directory("/a"),
        directory("/a/b"),
        directory("/a/b/c"),
        create("/a/b/c/file"),
        write("/a/b/c/file", 0, 7000, 1),
        fsync("/a/b/c/file"),
        rename("/a/b/c", "/a/c"),
        write("/a/c/file", 7000, 7000, 2),
        fsync("/a/c/file"),
        rename("/a/c/file", "/file"),
        Operation::RemoveDirectory { path: "/a/c".into() },
        fsync("/file"),
    ]
}

fn rename_unsynced() -> Vec<Operation> {
    let mut workload = vec![create("/config"), write("/config", 0, 50_000, 1), Sync];
    for round in 0..4u32 {
        workload.extend([
            create("/new"),
            write("/new", 0, 20_000 + u64::from(round) * 11_000, 10 + round),
            rename("/new", "/config"),
        ]);
        if round % 2 == 1 {
            workload.push(Settle);
        }
    }
    workload
}

fn rename_tiny() -> Vec<Operation> {
    let mut workload = vec![create("/config"), write("/config", 0, 30, 1)];
    for round in 0..6u32 {
        workload.extend([create("/new"), write("/new", 0, 20 + u64::from(round) * 7, 10 + round)]);
        workload.push(rename("/new", "/config"));
        if round % 3 == 2 {
            workload.push(Settle);
        }
    }
    workload.push(fsync("/config"));
    workload
}

fn rename_chain() -> Vec<Operation> {
    let mut workload = vec![create("/n0"), write("/n0", 0, 9000, 1), fsync("/n0")];
    for step in 0..6 {
        workload.push(rename(&format!("/n{step}"), &format!("/n{}", step + 1)));
        if step == 3 {
            workload.extend([create("/n0"), write("/n0", 0, 100, 2), Settle]);
        }
    }
    workload.extend([rename("/n6", "/n0"), fsync_directory("/")]);
    workload
}

fn directory_over_directory() -> Vec<Operation> {
    vec![
        directory("/a"),
        create("/a/file"),
        write("/a/file", 0, 6000, 1),
        directory("/b"),
        rename("/a", "/b"),
        Settle,
        directory("/a"),
        fsync_directory("/"),
        rename("/b", "/a"),
        directory("/a/inner"),
        directory("/b"),
        rename("/a/inner", "/b"),
        fsync("/a/file"),
        Settle,
    ]
}

fn directories_move() -> Vec<Operation> {
    vec![
        directory("/one"),
        directory("/two"),
        directory("/one/x"),
        create("/one/x/f"),
        write("/one/x/f", 0, 5000, 1),
        rename("/one/x", "/two/x"),
        create("/two/x/g"),
        fsync_directory("/two/x"),
        rename("/two", "/one/two"),
        Settle,
        rename("/one/two/x", "/x"),
        rename("/one", "/x/one"),
        fsync("/x/f"),
        unlink("/x/g"),
        Sync,
    ]
}

fn exchange_unsynced() -> Vec<Operation> {
    let mut workload = vec![create("/a"), write("/a", 0, 9000, 1), create("/b"), write("/b", 0, 13_000, 2)];
    for round in 0..4u32 {
        workload.push(exchange("/a", "/b"));
        workload.push(write("/a", u64::from(round) * 3000, 5000, 10 + round));
        if round % 2 == 1 {
            workload.push(Settle);
        }
    }
    workload.push(fsync_directory("/"));
    workload
}

fn exchange_kinds() -> Vec<Operation> {
    vec![
        directory("/d"),
        directory("/d/e"),
        create("/d/e/f"),
        create("/a"),
        write("/a", 0, 5000, 1),
        exchange("/a", "/d/e"),
        Settle,
        symbolic_link("/s", "target"),
        exchange("/s", "/d/e"),
        fsync("/s"),
        exchange("/d", "/a"),
        fsync_directory("/d"),
        Settle,
    ]
}

fn hard_links() -> Vec<Operation> {
    let mut workload = vec![directory("/d"), create("/a"), write("/a", 0, 6000, 1)];
    for number in 0..5 {
        workload.push(link("/a", &format!("/d/l{number}")));
    }
    workload.extend([
        fsync("/a"),
        unlink("/a"),
        write("/d/l0", 3000, 6000, 2),
        fsync("/d/l1"),
        rename("/d/l1", "/d/l2"),
        rename("/d/l2", "/a"),
        Settle,
    ]);
    workload.extend((2..5).filter(|&number| number != 2).map(|number| unlink(&format!("/d/l{number}"))));
    workload.extend([unlink("/d/l0"), unlink("/d/l1"), fsync_directory("/d"), unlink("/a"), Sync]);
    workload
}

fn link_stays() -> Vec<Operation> {
    vec![
        create("/a"),
        write("/a", 0, 7000, 1),
        link("/a", "/kept"),
        create("/new"),
        write("/new", 0, 9000, 2),
        rename("/new", "/a"),
        Settle,
        write("/kept", 1000, 100, 3),
        fsync("/kept"),
        unlink("/kept"),
        link("/a", "/kept"),
        fsync_directory("/"),
    ]
}

fn symbolic_links() -> Vec<Operation> {
    let mut workload = vec![symbolic_link("/current", "release-0"), fsync_directory("/")];
    for round in 1..5 {
        workload.extend([
            symbolic_link("/next", &format!("release-{round}/{}", "x".repeat(round * 120))),
            rename("/next", "/current"),
        ]);
        if round % 2 == 0 {
            workload.push(Settle);
        }
    }
    workload.extend([unlink("/current"), symbolic_link("/current", "back"), Sync]);
    workload
}

fn name_used_again() -> Vec<Operation> {
    let mut workload = Vec::new();
    for round in 0..5u32 {
        workload.extend([create("/a"), write("/a", 0, 3000 * u64::from(round + 1), round + 1)]);
        workload.push(if round % 2 == 0 { fsync("/a") } else { Settle });
        workload.push(unlink("/a"));
    }
    workload.push(fsync_directory("/"));
    workload
}

fn directory_again() -> Vec<Operation> {
    let mut workload = Vec::new();
    for round in 0..4u32 {
        workload.extend([
            directory("/d"),
            create("/d/f"),
            set_xattr("/d", "user.round", round.to_string()),
            if round % 2 == 0 { fsync_directory("/d") } else { Settle },
            unlink("/d/f"),
            Operation::RemoveDirectory { path: "/d".into() },
        ]);
    }
    workload.push(fsync_directory("/"));
    workload
}

fn xattrs() -> Vec<Operation> {
    let mut workload = vec![create("/a"), create("/b")];
    for (round, length) in [1usize, 100, 900, 3000, 2, 2500].into_iter().enumerate() {
        let name = format!("user.{}", round % 3);
        workload.push(set_xattr("/a", &name, "v".repeat(length)));
        workload.push(set_xattr("/b", &format!("user.n{round}"), round.to_string()));
        workload.push(if round % 2 == 1 { fsync("/a") } else { Settle });
    }
    workload.extend([
        remove_xattr("/a", "user.0"),
        remove_xattr("/a", "user.1"),
        fsync("/a"),
        set_xattr("/a", "user.0", "again".into()),
        remove_xattr("/b", "user.n0"),
        unlink("/b"),
        Sync,
    ]);
    workload
}

fn xattrs_of_directories() -> Vec<Operation> {
    vec![
        directory("/d"),
        set_xattr("/d", "user.a", "1".into()),
        fsync_directory("/d"),
        directory("/d/e"),
        set_xattr("/d/e", "user.a", "2".repeat(300)),
        set_xattr("/d", "user.a", "3".into()),
        rename("/d/e", "/e"),
        Settle,
        remove_xattr("/d", "user.a"),
        fsync_directory("/d"),
        Operation::RemoveDirectory { path: "/e".into() },
        Sync,
    ]
}

fn modes() -> Vec<Operation> {
    let mut workload = vec![create("/a"), directory("/d"), Sync];
    for (round, mode) in [0o600, 0o4755, 0o000, 0o640, 0o2711].into_iter().enumerate() {
        workload.extend([change_mode("/a", mode), change_mode("/d", mode | 0o100)]);
        workload.push(if round % 2 == 0 { fsync("/a") } else { Settle });
    }
    workload
}

fn unlinked_and_open() -> Vec<Operation> {
    let late = |offset, tag| Operation::WriteUnlinked { offset, length: 30_000, tag };
    vec![
        create("/a"),
        write("/a", 0, 60_000, 1),
        fsync("/a"),
        hold("/a"),
        unlink("/a"),
        fsync_directory("/"),
        late(0, 2),
        Settle,
        create("/b"),
        write("/b", 0, 60_000, 3),
        fsync("/b"),
        late(60_000, 4),
        Settle,
        Release,
        Settle,
        Sync,
        Settle,
    ]
}

fn replaced_and_open() -> Vec<Operation> {
    vec![
        create("/a"),
        write("/a", 0, 40_000, 1),
        hold("/a"),
        create("/new"),
        write("/new", 0, 20_000, 2),
        rename("/new", "/a"),
        Operation::WriteUnlinked { offset: 10_000, length: 5000, tag: 3 },
        fsync("/a"),
        Settle,
        Release,
        Settle,
        fsync_directory("/"),
    ]
}

fn many_open() -> Vec<Operation> {
    let mut workload = Vec::new();
    for number in 0..6u32 {
        let path = format!("/f{number}");
        workload.extend([create(&path), write(&path, 0, 9000, number + 1), hold(&path), unlink(&path)]);
        if number % 3 == 2 {
            workload.extend([Settle, Sync]);
        }
    }
    workload.extend([Release, Settle, Sync, Settle]);
    workload
}
