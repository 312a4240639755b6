//! The repository lints itself: layers depend downwards only, unsafe stays where it is allowed, and files stay readable.

use std::fs;
use std::path::{Path, PathBuf};

/// Modules of `fs/src`, lowest first: a module may use only what stands before it.
const LAYERS: &[&str] = &[
    "units",
    "error",
    "output",
    "sync",
    "env",
    "options",
    "metrics",
    "memory",
    "format",
    "device",
    "alloc",
    "journal",
    "btree",
    "transaction",
    "space",
    "snapshot",
    "data",
    "namespace",
    "pagecache",
    "vfs",
    "recovery",
    "workers",
    "scrub",
    "filesystem",
    "fuse",
];

/// What a lower layer may still use of a higher one, with the reason.
const ALLOWED: &[(&str, &str)] = &[
    // `data` implements the page cache's `PageSource`: the trait belongs to its user, the page cache.
    ("data", "pagecache"),
    // `options` parses what the format names: compression and checksum kinds.
    ("options", "format"),
];

/// Modules that may contain `unsafe`.
const UNSAFE_ALLOWED: &[&str] = &["memory", "device", "fuse"];

/// Lines of a file past which it must be split.
const LINES_MAX: usize = 1000;

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").to_path_buf()
}

fn rust_files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
        let path = entry.expect("a directory entry").path();
        if path.is_dir() {
            if path.file_name().is_some_and(|name| name != "target") {
                rust_files(&path, found);
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

fn member_files(below: &str) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for member in ["fs", "mkfs", "fsck", "tools", "tests"] {
        rust_files(&repository().join(member).join(below), &mut files);
    }
    assert!(files.len() > 60, "the walk found only {} files", files.len());
    files
}

fn module_of(file: &Path, root: &Path) -> String {
    let relative = file.strip_prefix(root).expect("below the root");
    let first = relative.components().next().expect("a component").as_os_str().to_string_lossy().into_owned();
    first.trim_end_matches(".rs").to_owned()
}

fn is_test(file: &Path) -> bool {
    file.components().any(|part| part.as_os_str() == "tests")
        || file.file_stem().is_some_and(|stem| stem.to_string_lossy().contains("test"))
}

/// The code of a file: without comments, and without its test module.
fn code(file: &Path) -> String {
    let text = fs::read_to_string(file).expect("a source file");
    let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
    let text = text.split("#[cfg(all(test").next().unwrap_or_default();
    text.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

#[test]
fn layers_depend_downwards_only() {
    let root = repository().join("fs/src");
    let mut files = Vec::new();
    rust_files(&root, &mut files);
    let mut wrong = Vec::new();
    for file in files.iter().filter(|file| !is_test(file)) {
        let module = module_of(file, &root);
        let Some(rank) = LAYERS.iter().position(|layer| *layer == module) else {
            assert_eq!(module, "lib", "{} is in no layer", file.display());
            continue;
        };
        let text = code(file);
        for layer in &LAYERS[rank + 1..] {
            let used = text.match_indices(&format!("crate::{layer}")).any(|(at, found)| {
                !text[at + found.len()..].starts_with(|next: char| next.is_alphanumeric() || next == '_')
            });
            if used && !ALLOWED.contains(&(module.as_str(), layer)) {
                wrong.push(format!("{} uses the higher layer {layer}", file.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn unsafe_is_only_where_it_is_allowed() {
    let root = repository().join("fs/src");
    let wrong: Vec<_> = member_files("src")
        .into_iter()
        .filter(|file| {
            let allowed = file.starts_with(&root) && UNSAFE_ALLOWED.contains(&module_of(file, &root).as_str());
            let text = code(file);
            !allowed && ["unsafe {", "unsafe fn", "unsafe impl"].iter().any(|found| text.contains(found))
        })
        .map(|file| file.display().to_string())
        .collect();
    assert!(wrong.is_empty(), "unsafe code in {}", wrong.join(", "));
}

/// `println!` panics where its reader has gone, in the middle of whatever the program does: `say!` and `complain!` do not.
#[test]
fn no_program_ends_by_printing() {
    let folders = ["mkfs/src", "fsck/src", "tools/src", "tests/src/bin"];
    let wrong: Vec<_> = folders
        .iter()
        .flat_map(|folder| {
            let mut files = Vec::new();
            rust_files(&repository().join(folder), &mut files);
            files
        })
        .filter(|file| ["println!(", "print!("].iter().any(|found| code(file).contains(found)))
        .map(|file| file.display().to_string())
        .collect();
    assert!(wrong.is_empty(), "println! and the like in {}", wrong.join(", "));
}

#[test]
fn files_stay_readable() {
    let long: Vec<_> = member_files("")
        .iter()
        .map(|file| (fs::read_to_string(file).expect("a source file").lines().count(), file))
        .filter(|(lines, _)| *lines > LINES_MAX)
        .map(|(lines, file)| format!("{} has {lines} lines", file.display()))
        .collect();
    assert!(long.is_empty(), "{}", long.join("\n"));
}

#[test]
fn every_module_says_what_it_is() {
    let mute: Vec<_> = member_files("src")
        .iter()
        .filter(|file| !fs::read_to_string(file).expect("a source file").starts_with("//!"))
        .map(|file| file.display().to_string())
        .collect();
    assert!(mute.is_empty(), "no module documentation at the top of {}", mute.join(", "));
}
