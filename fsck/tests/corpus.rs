//! The corpus: for each kind of problem, damage that is made through the real code or on the medium; found, repaired by a first run of the program, and
//! gone in a second; what `-n` lists is what `-y` repairs; what was not damaged is untouched.

#[path = "corpus/cases.rs"]
mod cases;
#[path = "corpus/damage.rs"]
mod damage;
#[path = "corpus/ground.rs"]
mod ground;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;
use std::sync::LazyLock;

use cases::{CASES, Case, LOST_LEAVES};
use coppicefs::device::Image;
use coppicefs::format::extent::ExtentValue;
use coppicefs::format::{BtreeId, Position};
use coppicefs::transaction::CommitOptions;
use coppicefs_fsck::problem::IDS;
use coppicefs_fsck::state::FACTS_BYTES;
use coppicefs_fsck::{CheckOptions, Report, check, check_with};
use ground::{Ground, ROOT, Shown, changed_inodes, device_of, keys, open, shown};

static GROUND: LazyLock<Ground> = LazyLock::new(Ground::made);

fn report(image: &Image) -> Report {
    let filesystem = open(&device_of(image), true).unwrap();
    let report = check(&filesystem, &|_, _, _, _| {}).unwrap();
    filesystem.close().unwrap();
    report
}

fn ids(report: &Report) -> BTreeSet<&'static str> {
    report.problems.iter().map(coppicefs_fsck::Problem::id).collect()
}

/// What the program says, cut to what a person reads.
struct Said(serde_json::Value);

impl std::fmt::Display for Said {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for problem in self.0["problems"].as_array().into_iter().flatten().take(12) {
            write!(f, "\n    {}: {}", problem["id"], problem["text"])?;
        }
        write!(f, "\n    lost: {:.300}", self.0["lost"].to_string())
    }
}

/// Runs the program. Its exit code, and what it says as JSON. What it warns of it warns of once each time that it opens something.
fn fsck(image: &Path, mode: &str) -> (i32, Said) {
    let output = Command::new("timeout")
        .args(["60", env!("CARGO_BIN_EXE_fsck-coppice"), mode, "--json"])
        .arg(image)
        .output()
        .unwrap();
    let warnings = String::from_utf8(output.stderr.clone()).unwrap();
    let mut copies: Vec<&str> = warnings.lines().filter(|line| line.contains("copy ")).collect();
    copies.sort_unstable();
    let often: Vec<_> = copies.windows(16).filter(|lines| lines[0] == lines[15]).collect();
    assert!(often.is_empty(), "{mode}: told again and again: {often:#?}");
    let said = String::from_utf8(output.stdout).unwrap();
    let said = serde_json::from_str(&said)
        .unwrap_or_else(|error| panic!("{error}: {said}{}", String::from_utf8_lossy(&output.stderr)));
    (output.status.code().unwrap(), Said(said))
}

/// Runs `-n`, `-y` and `-n` on a damaged image, and returns what `-y` left and said.
fn repaired(name: &str, damaged: &Image) -> (Image, Said) {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("image");
    damaged.to_file(&file).unwrap();
    let (code, shown) = fsck(&file, "-n");
    assert_eq!(code, 4, "{name}: -n: {shown}");
    assert_eq!(Image::from_file(&file).unwrap().content_hash(), damaged.content_hash(), "{name}: -n has written");
    let (code, said) = fsck(&file, "-y");
    assert_eq!(code, 1, "{name}: -y: {said}");
    for part in ["problems", "lost"] {
        assert!(shown.0[part] == said.0[part], "{name}: -n and -y give different lists:{shown}\n{said}");
    }
    let (code, clean) = fsck(&file, "-n");
    assert_eq!(code, 0, "{name}: -n after -y: {clean}; it was {said}");
    for counted in ["directories", "regular_files", "symbolic_links", "other_files", "data_bytes"] {
        assert_eq!(said.0[counted], clean.0[counted], "{name}: {counted} as -y tells it, and as it is: {said}");
    }
    (Image::from_file(&file).unwrap(), said)
}

/// What `--list-damaged` lists of an image; it writes nothing.
fn listed(name: &str, image: &Image) -> serde_json::Value {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("image");
    image.to_file(&file).unwrap();
    let (code, said) = fsck(&file, "--list-damaged");
    assert!([0, 4].contains(&code), "{name}: --list-damaged: {code}: {:.500}", said.0.to_string());
    assert_eq!(Image::from_file(&file).unwrap().content_hash(), image.content_hash(), "{name}: it has written");
    said.0["damaged"].clone()
}

fn name_of(case: &Case) -> String {
    format!("{} ({})", case.id, case.name)
}

fn proves(case: &Case) {
    let ground = &*GROUND;
    let name = name_of(case);
    let damaged = case.image(ground);
    if case.takes_rebuild {
        return takes_rebuild(case, &damaged);
    }
    let found = ids(&report(&damaged));
    let expected: BTreeSet<_> = case.follows.iter().copied().chain([case.id]).collect();
    assert!(found == expected, "{name}: found\n{found:?}, expected\n{expected:?}");
    let (image, said) = repaired(&name, &damaged);
    // Files.
    let after = shown(&image);
    let in_lost_and_found: BTreeSet<String> = case.comes.iter().map(|path| path.to_string()).collect();
    let gone = case.goes.first().map(|path| ground.inode(path).to_string()).unwrap_or_default();
    let comes: BTreeSet<String> = in_lost_and_found.iter().map(|path| path.replace("INODE", &gone)).collect();
    let goes: BTreeSet<String> = case.goes.iter().map(|path| path.to_string()).collect();
    let paths = |shown: &BTreeMap<String, Shown>| shown.keys().cloned().collect::<BTreeSet<_>>();
    assert_eq!(&paths(&after) - &paths(&ground.shown), comes, "{name}: come: {said}");
    assert_eq!(&paths(&ground.shown) - &paths(&after), goes, "{name}: go: {said}");
    for (path, before) in &ground.shown {
        let Some(after) = after.get(path) else { continue };
        let is_touched = case.touches.contains(&path.as_str());
        assert!(is_touched || after == before, "{name}: {path} has changed");
        let lost = if case.lost.contains(&path.as_str()) {
            let (position, data) = damage::extent_of(ground, path);
            (position.offset - u64::from(data.length)) as usize / 4096..position.offset.div_ceil(4096) as usize
        } else {
            0..0
        };
        let unreadable: Vec<usize> =
            after.content.iter().enumerate().filter(|(_, block)| block.is_none()).map(|(index, _)| index).collect();
        assert_eq!(unreadable, lost.clone().collect::<Vec<_>>(), "{name}: unreadable blocks of {path}: {said}");
        assert!(reads_as_before(after, before), "{name}: {path} has other content");
        assert!(lost.is_empty() || is_named(&said, before), "{name}: {path} has lost data, and is not named: {said}");
    }
    // Keys.
    let keys = keys(&image);
    let largest = ground.all(BtreeId::Inodes).iter().map(|(position, _)| position.inode).max().unwrap();
    let touched: BTreeSet<u64> =
        case.touches.iter().map(|path| if *path == "/" { ROOT } else { ground.inode(path) }).collect();
    let changed = changed_inodes(&ground.keys, &keys);
    let others: Vec<_> = changed.iter().filter(|inode| **inode <= largest && !touched.contains(inode)).collect();
    assert!(others.is_empty(), "{name}: keys of inodes {others:?} have changed");
}

/// What can be read is what was there. The size of a file whose inode was gone is known to a block.
fn reads_as_before(after: &Shown, before: &Shown) -> bool {
    after.content.len() == before.content.len()
        && after.content.iter().zip(&before.content).all(|(after, before)| match (after, before) {
            (Some(after), Some(before)) => after.starts_with(before),
            _ => true,
        })
}

/// Whether a file is among those that lost data, by any of its names.
fn is_named(said: &Said, file: &Shown) -> bool {
    let mut lost = said.0["lost"].as_array().unwrap().iter();
    lost.any(|lost| lost["inode"] == file.inode && lost["path"].as_str().unwrap().starts_with('/'))
}

fn takes_rebuild(case: &Case, damaged: &Image) {
    let name = name_of(case);
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("image");
    damaged.to_file(&file).unwrap();
    for mode in ["-n", "-y"] {
        let (code, said) = fsck(&file, mode);
        assert_eq!(code, 8, "{name}: {mode}: {said}");
        assert_eq!(said.0["problems"][0]["id"], case.id, "{name}: {mode}: {said}");
        let output = Command::new(env!("CARGO_BIN_EXE_fsck-coppice")).arg(mode).arg(&file).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains("--rebuild"), "{name}: {mode}: {text}");
        assert_eq!(
            Image::from_file(&file).unwrap().content_hash(),
            damaged.content_hash(),
            "{name}: {mode} has written"
        );
    }
}

/// Some cases, by their place in the table: so that they run beside each other. All of them run, whichever fails.
fn proves_part(part: usize, parts: usize) {
    let mine = CASES.iter().enumerate().filter(|(index, _)| index % parts == part);
    let failed: Vec<String> = mine
        .filter(|(_, case)| std::panic::catch_unwind(|| proves(case)).is_err())
        .map(|(_, case)| name_of(case))
        .collect();
    assert!(failed.is_empty(), "failed: {failed:#?}");
}

#[test]
fn cases_0() {
    proves_part(0, 2);
}

#[test]
fn cases_1() {
    proves_part(1, 2);
}

#[test]
fn every_problem_has_a_case() {
    let others = ["node-unreadable", "node-map-lost"];
    let covered: BTreeSet<_> = CASES.iter().map(|case| case.id).chain(others).collect();
    let all: BTreeSet<_> = IDS.iter().copied().collect();
    assert_eq!(covered, all);
}

/// Of a leaf that is gone, what it held is lost, and said; what other leaves hold of the same files is as it was, and what cannot be read is an
/// error and no zeros.
#[test]
fn lost_leaves() {
    let ground = &*GROUND;
    for (tree, btree, damage) in LOST_LEAVES {
        let mut damaged = ground.image.clone();
        damage(ground, &mut damaged);
        let found = report(&damaged);
        assert!(ids(&found).contains("node-unreadable"), "{tree}: {:?}", found.problems);
        let (image, said) = repaired(tree, &damaged);
        // The files that are hit have names before anything is repaired.
        let list = listed(tree, &damaged);
        assert!(list == listed(tree, &image), "{tree}: {list:.300} before the repair");
        assert_eq!(list.as_array().unwrap().is_empty(), *btree != BtreeId::Extents, "{tree}: {list:.300}");
        let after = shown(&image);
        let by_inode: BTreeMap<u64, &Shown> = after.values().map(|shown| (shown.inode, shown)).collect();
        let (mut whole, mut lost) = (0, 0);
        for (path, before) in &ground.shown {
            let Some(after) = by_inode.get(&before.inode) else {
                assert_eq!(*btree, BtreeId::Inodes, "{tree}: {path} is gone");
                continue;
            };
            assert!(reads_as_before(after, before), "{tree}: {path} reads as something that it never held");
            if after.content.iter().any(Option::is_none) {
                lost += 1;
                assert!(is_named(&said, before), "{tree}: {path} is not named: {said}");
            } else {
                whole += 1;
            }
        }
        println!("{tree}: {whole} files and links whole, {lost} with lost data, of {}", ground.shown.len());
        assert!(whole > 0 && (lost > 0) == (*btree == BtreeId::Extents), "{tree}: {whole} whole, {lost} lost");
        if matches!(btree, BtreeId::Backpointers | BtreeId::Xattrs) {
            assert_eq!(whole, ground.shown.len(), "{tree}: {said}");
        }
    }
}

/// The node-space map is lost in every copy, and in the checkpoint before, too: nothing else is, so it is made again, as it was.
#[test]
fn a_lost_map_is_made_again() {
    let ground = &*GROUND;
    let mut damaged = ground.image.clone();
    let before = damage::lose_maps(&mut damaged);
    let (image, said) = repaired("a lost map", &damaged);
    let problems = said.0["problems"].as_array().unwrap();
    assert!(problems.len() == 1 && problems[0]["id"] == "node-map-lost", "{said}");
    assert_eq!(said.0["repaired"], 1, "{said}");
    assert!(shown(&image) == ground.shown && keys(&image) == ground.keys, "what is not damaged has changed: {said}");
    // The slots that are used are all that counts: where the buckets stand in the pages does not.
    let after = damage::lose_maps(&mut image.clone());
    assert!(!before.is_empty() && before.keys().all(|bucket| after.contains_key(bucket)), "{before:?} {after:?}");
    // With an interior node lost, too, only a scan helps.
    let mut damaged = with_three_levels(ground);
    let interior = ground::nodes_of(&damaged, BtreeId::Extents, 1);
    interior[0].2.iter().for_each(|copy| damaged.write(*copy, &[0; 4096]));
    damage::lose_maps(&mut damaged);
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("image");
    damaged.to_file(&file).unwrap();
    for mode in ["-n", "-y"] {
        let (code, said) = fsck(&file, mode);
        assert_eq!(code, 8, "{mode}: {said}");
        let now = Image::from_file(&file).unwrap().content_hash();
        assert_eq!(now, damaged.content_hash(), "{mode} has written");
    }
}

/// Roots are lost, in the checkpoint before, too, of trees that say what others say: they begin anew. Of a tree that alone says what it says, they take a scan.
#[test]
fn lost_roots_of_trees_that_follow_from_others() {
    let ground = &*GROUND;
    for btree in BtreeId::ALL {
        let mut damaged = ground.image.clone();
        if !damage::lose_root(&mut damaged, btree) {
            continue;
        }
        let name = format!("the root of {}", btree.name());
        let is_users = matches!(btree, BtreeId::Extents | BtreeId::Inodes | BtreeId::Dirents | BtreeId::Xattrs);
        if is_users {
            let directory = tempfile::tempdir().unwrap();
            let file = directory.path().join("image");
            damaged.to_file(&file).unwrap();
            let (code, said) = fsck(&file, "-y");
            assert_eq!(code, 8, "{name}: {said}");
            assert!(said.to_string().contains(btree.name()), "{name}: {said}");
            continue;
        }
        let (image, said) = repaired(&name, &damaged);
        let first = &said.0["problems"][0];
        assert!(first["id"] == "node-unreadable" && first["text"].to_string().contains(btree.name()), "{name}: {said}");
        assert!(shown(&image) == ground.shown, "{name}: something else is shown: {said}");
        assert!(said.0["lost"].as_array().unwrap().is_empty(), "{name}: {said}");
    }
}

/// All leaves of extents are lost, and one of inodes: what files beside that one had is lost, too, and no zeros; and where the last one is lost, the search for
/// files ends.
#[test]
fn lost_leaves_of_extents_and_inodes() {
    let ground = &*GROUND;
    let inodes = ground.nodes(BtreeId::Inodes, 0);
    assert!(inodes.len() > 1);
    for (_, _, lost) in [inodes.first(), inodes.last()].into_iter().flatten() {
        let mut damaged = ground.image.clone();
        let extents = ground.nodes(BtreeId::Extents, 0);
        for copy in extents.iter().flat_map(|(.., copies)| copies).chain(lost) {
            damaged.write(*copy, &[0; 4096]);
        }
        let (image, said) = repaired("leaves of extents and inodes", &damaged);
        let after = shown(&image);
        let by_inode: BTreeMap<u64, &Shown> = after.values().map(|shown| (shown.inode, shown)).collect();
        let mut found = 0;
        for (path, before) in &ground.shown {
            let Some(after) = by_inode.get(&before.inode) else { continue };
            assert!(reads_as_before(after, before), "{path} reads as something that it never held: {said}");
            found += 1;
        }
        assert!(found > 0, "{said}");
    }
}

/// With little memory the names are looked at several times, and what is found is the same.
#[test]
fn windows_of_inodes_find_the_same() {
    let ground = &*GROUND;
    let options = CheckOptions { memory_bytes: 0 };
    for case in CASES.iter().filter(|case| !case.takes_rebuild) {
        let name = name_of(case);
        let filesystem = open(&device_of(&case.image(ground)), true).unwrap();
        let at_once = check(&filesystem, &|_, _, _, _| {}).unwrap();
        let furthest = std::sync::Mutex::new((0, 0));
        let bounded = check_with(&filesystem, &options, &|at| {
            let mut furthest = furthest.lock().unwrap();
            assert!(at.done >= furthest.0 && at.done <= at.total, "{name}: {at:?}");
            *furthest = (at.done, at.total);
        })
        .unwrap();
        filesystem.close().unwrap();
        assert!(at_once.windows == 1 && bounded.windows >= 4, "{} and {} windows", at_once.windows, bounded.windows);
        let inodes = at_once.inode_counts.iter().sum::<u64>();
        let index = 24 * inodes;
        assert!(bounded.tables_peak_bytes <= index + 64 * FACTS_BYTES, "{} bytes", bounded.tables_peak_bytes);
        assert!(at_once.tables_peak_bytes >= (inodes - 2) * FACTS_BYTES, "{} bytes", at_once.tables_peak_bytes);
        let said = |report: &Report| -> BTreeSet<String> {
            report.problems.iter().map(|problem| format!("{}: {}", problem.id(), problem.describe())).collect()
        };
        assert_eq!(said(&bounded), said(&at_once), "{name}");
        let (done, total) = *furthest.lock().unwrap();
        assert!(done * 10 >= total * 9, "{name}: it ended at {done} of {total}");
    }
}

#[test]
fn little_memory_is_refused() {
    let output =
        Command::new(env!("CARGO_BIN_EXE_fsck-coppice")).args(["--memory", "1K", "/nothing"]).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(16) && said.contains("at least 16 MiB"), "{said}");
}

/// An extents tree of three levels.
fn with_three_levels(ground: &Ground) -> Image {
    let inode = ground.inode("/folder 0 0/file 20");
    let device = device_of(&ground.image);
    let filesystem = open(&device, false).unwrap();
    let raw = CommitOptions { raw: true, ..CommitOptions::default() };
    // Values so large that they make three levels; what they mean is not looked at any more.
    for batch in 0..30_u64 {
        let commit = filesystem.transactions().run(raw, |transaction| {
            for number in 0..100 {
                let end = (20 + batch * 100 + number) * 4096;
                let value = ExtentValue::Inline(vec![7; 1000]);
                transaction.put(BtreeId::Extents, Position::new(inode, end, ground::SNAPSHOT), value.encode());
            }
            Ok(())
        });
        commit.unwrap();
    }
    filesystem.close().unwrap();
    device.image()
}

/// Below a lost interior node all leaves are whole, and a scan finds them: nothing is repaired, least of all what would be counted without them.
#[test]
fn a_lost_interior_node_takes_a_rebuild() {
    let intact = with_three_levels(&GROUND);
    let mut damaged = intact.clone();
    let interior = ground::nodes_of(&damaged, BtreeId::Extents, 1);
    let (.., copies) = interior.first().expect("three levels");
    copies.iter().for_each(|copy| damaged.write(*copy, &[0; 4096]));
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("image");
    damaged.to_file(&file).unwrap();
    let (code, said) = fsck(&file, "-y");
    let problems = said.0["problems"].as_array().unwrap();
    assert_eq!((code, &said.0["repaired"]), (8, &0.into()), "{said}");
    assert!(problems[0]["id"] == "node-unreadable" && problems[0]["repairable"] == false, "{said}");
    let output = Command::new(env!("CARGO_BIN_EXE_fsck-coppice")).arg("-y").arg(&file).output().unwrap();
    assert!(String::from_utf8(output.stdout).unwrap().contains("--rebuild"), "{said}");
    // All leaves are where they were.
    let after = Image::from_file(&file).unwrap();
    for (.., copies) in ground::nodes_of(&intact, BtreeId::Extents, 0) {
        let [mut before, mut now] = [vec![0; 16 << 10], vec![0; 16 << 10]];
        intact.read(copies[0], &mut before);
        after.read(copies[0], &mut now);
        assert!(before == now, "the leaf at byte {} has changed", copies[0]);
    }
}

/// A lost range is an error until it is written again; then all is as if nothing had been.
#[test]
fn what_is_lost_can_be_written_again() {
    let ground = &*GROUND;
    let case = CASES.iter().find(|case| case.id == "extent-pointer").unwrap();
    let (image, _) = repaired(&name_of(case), &case.image(ground));
    let path = case.lost[0];
    let before = shown(&image);
    assert!(before[path].content[0].is_none() && before[path].content[1].is_some());
    let data = ground::content(77, 4096);
    let image = ground::with_block_written(&image, ground.inode(path), &data);
    let after = shown(&image);
    assert_eq!(after[path].content[0].as_ref(), Some(&data));
    assert_eq!(after[path].content[1..], before[path].content[1..]);
    assert!(report(&image).is_clean(), "{:?}", report(&image).problems);
}
