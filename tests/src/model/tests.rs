//! What the oracle allows and what it refuses, rule by rule.

use super::*;

const BLOCK: u64 = 4096;

fn create(path: &str) -> Operation {
    Operation::Create { path: path.into(), mode: 0o644 }
}

fn write(path: &str, offset: u64, length: u64, tag: u32) -> Operation {
    Operation::Write { path: path.into(), offset, length, tag }
}

fn truncate(path: &str, size: u64) -> Operation {
    Operation::Truncate { path: path.into(), size }
}

fn fsync(path: &str) -> Operation {
    Operation::Fsync { path: path.into() }
}

fn rename(from: &str, to: &str) -> Operation {
    Operation::Rename { from: from.into(), to: to.into() }
}

fn run(operations: &[Operation]) -> Model {
    let mut model = Model::new(BLOCK);
    for operation in operations {
        model.begin(operation).unwrap();
        model.acknowledge(operation);
    }
    model
}

/// The tree after some operations of which nothing was lost.
fn tree(operations: &[Operation]) -> Tree {
    run(operations).tree()
}

fn set(tree: &mut Tree, path: &str, bytes: Vec<u8>) {
    tree.get_mut(path).unwrap().kind = Kind::File(bytes);
}

#[track_caller]
fn allowed(model: &Model, tree: &Tree) {
    model.check(tree).unwrap();
}

#[track_caller]
fn refused(model: &Model, tree: &Tree, why: &str) {
    let problem = model.check(tree).unwrap_err();
    assert!(problem.contains(why), "{problem}");
}

#[test]
fn unsynced_names_survive_as_a_prefix() {
    let all = [create("/a"), create("/b"), rename("/a", "/c")];
    let model = run(&all);
    for length in 0..=3 {
        allowed(&model, &tree(&all[..length]));
    }
    refused(&model, &tree(&[create("/b")]), "/c is missing");
    refused(&model, &tree(&[create("/a"), create("/b"), create("/c")]), "should not be there");
}

#[test]
fn what_was_synced_must_be_there() {
    let all = [create("/a"), create("/b"), fsync("/a"), create("/c")];
    let model = run(&all);
    refused(&model, &tree(&[]), "/a is missing");
    // The sync of a promises nothing of b, which came later.
    for length in [1, 2, 4] {
        allowed(&model, &tree(&all[..length]));
    }
    let model = run(&[create("/a"), create("/b"), Operation::FsyncDirectory { path: "/".into() }]);
    refused(&model, &tree(&[create("/a")]), "/b is missing");
    let model = run(&[create("/a"), create("/b"), Operation::Sync]);
    refused(&model, &tree(&[create("/a")]), "/b is missing");
}

#[test]
fn a_sync_promises_nothing_before_it_returns() {
    let mut model = run(&[create("/a"), write("/a", 0, 100, 1)]);
    model.begin(&fsync("/a")).unwrap();
    allowed(&model, &tree(&[]));
    model.acknowledge(&fsync("/a"));
    refused(&model, &tree(&[]), "missing");
    refused(&model, &tree(&[create("/a")]), "has 0 bytes");
}

#[test]
fn blocks_are_old_or_new_each_for_itself() {
    let base = [create("/a"), write("/a", 0, 3 * BLOCK, 1), fsync("/a")];
    let mut model = run(&base);
    let over = write("/a", 0, 3 * BLOCK, 2);
    model.begin(&over).unwrap();
    let (old, new) = (content(1, 0, 3 * BLOCK), content(2, 0, 3 * BLOCK));
    let block = BLOCK as usize;
    for choice in 0..8 {
        let mut bytes = old.clone();
        for index in (0..3).filter(|index| choice >> index & 1 == 1) {
            bytes[index * block..(index + 1) * block].copy_from_slice(&new[index * block..(index + 1) * block]);
        }
        let mut found = tree(&base);
        set(&mut found, "/a", bytes);
        allowed(&model, &found);
    }
    let mut torn = tree(&base);
    set(&mut torn, "/a", [&old[..100], &new[100..]].concat());
    refused(&model, &torn, "block at byte 0");
    let mut zeros = tree(&base);
    set(&mut zeros, "/a", [&old[..2 * block], &vec![0; block]].concat());
    refused(&model, &zeros, "zeros");
}

#[test]
fn a_file_grows_only_with_its_data() {
    let base = [create("/a"), write("/a", 0, 100, 1), fsync("/a")];
    let mut model = run(&base);
    model.begin(&write("/a", 100, 2 * BLOCK, 2)).unwrap();
    let whole = [content(1, 0, 100), content(2, 100, 2 * BLOCK)].concat();
    for size in [100, 4096, 8192, whole.len()] {
        let mut found = tree(&base);
        set(&mut found, "/a", whole[..size].to_vec());
        allowed(&model, &found);
    }
    for (kept, size) in [(100, 4096), (4096, 8192), (100, whole.len())] {
        let mut found = tree(&base);
        let mut bytes = whole[..size].to_vec();
        bytes[kept..].fill(0);
        set(&mut found, "/a", bytes);
        refused(&model, &found, "holds");
    }
    let mut found = tree(&base);
    set(&mut found, "/a", whole[..99].to_vec());
    refused(&model, &found, "has 99 bytes, should have 100 to 8292");
}

#[test]
fn truncated_bytes_do_not_come_back() {
    let base = [create("/a"), write("/a", 0, 2 * BLOCK, 1), fsync("/a"), truncate("/a", 100), truncate("/a", 5000)];
    let model = run(&base);
    for length in 3..=5 {
        allowed(&model, &tree(&base[..length]));
    }
    let mut found = tree(&base);
    set(&mut found, "/a", content(1, 0, 5000));
    refused(&model, &found, "holds");
    let synced = run(&[&base[..], &[fsync("/a")]].concat());
    allowed(&synced, &tree(&base));
    refused(&synced, &tree(&base[..4]), "has 100 bytes");
}

#[test]
fn data_below_a_larger_size_is_not_zeros() {
    let all = [create("/a"), write("/a", 0, 1000, 1), truncate("/a", 8192)];
    let model = run(&all);
    allowed(&model, &tree(&all));
    let mut found = tree(&all);
    set(&mut found, "/a", vec![0; 8192]);
    refused(&model, &found, "zeros");
}

#[test]
fn a_hole_survives_as_part_of_the_prefix() {
    let punch = Operation::Punch { path: "/a".into(), offset: 50, length: 9000 };
    let all = [create("/a"), write("/a", 0, 3 * BLOCK, 1), fsync("/a"), punch, create("/b")];
    let model = run(&all);
    for length in 3..=5 {
        allowed(&model, &tree(&all[..length]));
    }
    // The edges are zeroed with the block between them, or not at all.
    let (old, new) = (content(1, 0, 3 * BLOCK), model.tree()["/a"].clone());
    let Kind::File(new) = new.kind else { panic!("{new:?}") };
    let block = BLOCK as usize;
    let mut found = tree(&all);
    set(&mut found, "/a", [&old[..block], &new[block..]].concat());
    refused(&model, &found, "holds");
    set(&mut found, "/a", [&new[..2 * block], &old[2 * block..]].concat());
    refused(&model, &found, "holds");
    set(&mut found, "/a", old);
    refused(&model, &found, "holds");
}

#[test]
fn a_collapse_and_an_insert_survive_whole() {
    let collapse = Operation::Collapse { path: "/a".into(), offset: BLOCK, length: BLOCK };
    let insert = Operation::Insert { path: "/a".into(), offset: BLOCK, length: 2 * BLOCK };
    for shift in [collapse, insert] {
        let all = [create("/a"), write("/a", 0, 4 * BLOCK + 7, 1), fsync("/a"), shift, create("/b")];
        let model = run(&all);
        for length in 3..=5 {
            allowed(&model, &tree(&all[..length]));
        }
        // /b is there, so the shift must be, with all that it moved.
        let mut found = tree(&all);
        set(&mut found, "/a", content(1, 0, 4 * BLOCK + 7));
        refused(&model, &found, "has 16391 bytes");
        let Kind::File(mut bytes) = model.tree()["/a"].kind.clone() else { panic!("not a file") };
        bytes[2 * BLOCK as usize..3 * BLOCK as usize].fill(1);
        set(&mut found, "/a", bytes);
        refused(&model, &found, "holds");
    }
}

#[test]
fn rename_over_shows_the_old_or_the_new_content() {
    let all =
        [create("/a"), write("/a", 0, 100, 1), fsync("/a"), create("/b"), write("/b", 0, 5000, 2), rename("/b", "/a")];
    let model = run(&all);
    for length in [3, 4, 5, 6] {
        allowed(&model, &tree(&all[..length]));
    }
    // Without the rename nothing is promised of b.
    let mut empty = tree(&all[..5]);
    set(&mut empty, "/b", Vec::new());
    allowed(&model, &empty);
    for bytes in [Vec::new(), content(2, 0, 4096), vec![0; 5000]] {
        let mut found = tree(&all);
        set(&mut found, "/a", bytes);
        assert!(model.check(&found).is_err());
    }
}

#[test]
fn links_modes_and_attributes_are_compared() {
    let all = [
        create("/a"),
        Operation::Link { existing: "/a".into(), path: "/b".into() },
        Operation::ChangeMode { path: "/a".into(), mode: 0o600 },
        Operation::SetXattr { path: "/a".into(), name: "user.x".into(), value: "1".into() },
        Operation::SymbolicLink { path: "/s".into(), target: "a".into() },
        Operation::Sync,
    ];
    let model = run(&all);
    let good = tree(&all);
    allowed(&model, &good);
    let broken: [(&str, fn(&mut Entry)); 5] = [
        ("links", |entry| entry.links = 1),
        ("mode", |entry| entry.mode = 0o644),
        ("attributes", |entry| entry.xattrs.clear()),
        ("wrong inode", |entry| entry.inode += 100),
        ("is a directory", |entry| entry.kind = Kind::Directory),
    ];
    for (why, change) in broken {
        let mut found = good.clone();
        change(found.get_mut("/b").unwrap());
        refused(&model, &found, why);
    }
    let mut found = good.clone();
    found.get_mut("/s").unwrap().kind = Kind::SymbolicLink("b".into());
    refused(&model, &found, "/s");
}

#[test]
fn operations_fail_as_posix_says_and_change_nothing() {
    let mut model = run(&[
        create("/a"),
        Operation::MakeDirectory { path: "/d".into(), mode: 0o755 },
        create("/d/x"),
        Operation::MakeDirectory { path: "/e".into(), mode: 0o755 },
    ]);
    let before = model.tree();
    for (operation, errno) in [
        (create("/a"), Errno::EXIST),
        (create("/missing/x"), Errno::NOENT),
        (create("/a/x"), Errno::NOTDIR),
        (Operation::Unlink { path: "/d".into() }, Errno::ISDIR),
        (Operation::RemoveDirectory { path: "/d".into() }, Errno::NOTEMPTY),
        (Operation::RemoveDirectory { path: "/a".into() }, Errno::NOTDIR),
        (rename("/d", "/d/y"), Errno::INVAL),
        (rename("/a", "/d"), Errno::ISDIR),
        (rename("/d", "/a"), Errno::NOTDIR),
        (rename("/e", "/d"), Errno::NOTEMPTY),
        (Operation::Link { existing: "/d".into(), path: "/l".into() }, Errno::PERM),
        (write("/d", 0, 1, 1), Errno::ISDIR),
        (Operation::RemoveXattr { path: "/a".into(), name: "user.x".into() }, Errno::NODATA),
    ] {
        assert_eq!(model.begin(&operation).unwrap_err(), errno, "{operation:?}");
    }
    assert_eq!(model.tree(), before);
    model.check_live(&before).unwrap();
}

#[test]
fn a_punch_behind_the_end_makes_an_fsync_promise_nothing() {
    let punch = |offset| Operation::Punch { path: "/f".into(), offset, length: 100 };
    let begun = [create("/f"), write("/f", 0, 4096, 1), fsync("/f"), create("/other")];
    let without = tree(&begun[..3]);
    let behind = run(&[&begun[..], &[punch(4096), fsync("/f")]].concat());
    allowed(&behind, &without);
    allowed(&behind, &tree(&begun));
    // Before the end it changes the file: it is there, and with it all that came before.
    let inside = run(&[&begun[..], &[punch(4000), fsync("/f")]].concat());
    refused(&inside, &without, "/other is missing");
}
