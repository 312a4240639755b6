//! The small workloads that are crashed at every boundary, and random ones by seed.

mod alone;
mod more;

use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};

use crate::model::Model;
use crate::operation::{Operation, Way};
use crate::tree::Kind;

pub use more::compressible;

fn create(path: &str) -> Operation {
    Operation::Create { path: path.into(), mode: 0o644 }
}

fn directory(path: &str) -> Operation {
    Operation::MakeDirectory { path: path.into(), mode: 0o755 }
}

fn write(path: &str, offset: u64, length: u64, tag: u32) -> Operation {
    Operation::Write { path: path.into(), offset, length, tag }
}

fn fsync(path: &str) -> Operation {
    Operation::Fsync { path: path.into() }
}

fn truncate(path: &str, size: u64) -> Operation {
    Operation::Truncate { path: path.into(), size }
}

fn rename(from: &str, to: &str) -> Operation {
    Operation::Rename { from: from.into(), to: to.into() }
}

fn unlink(path: &str) -> Operation {
    Operation::Unlink { path: path.into() }
}

/// More fixed workloads, with their names: each shows one thing, in a few operations.
#[must_use]
pub fn more() -> Vec<(&'static str, Vec<Operation>)> {
    more::all()
}

/// Each mutation alone, and with a checkpoint or compaction around it.
#[must_use]
pub fn alone() -> Vec<(&'static str, Vec<Operation>)> {
    alone::all()
}

/// All fixed workloads, with their names.
#[must_use]
pub fn fixed() -> Vec<(&'static str, Vec<Operation>)> {
    let mut fixed = all();
    fixed.extend(more());
    fixed.extend(alone());
    fixed.extend(large());
    fixed.push(("batches of records", batches()));
    fixed.push(("more than memory", more_than_memory()));
    fixed
}

/// A workload by its name: a fixed one, `random:SEED:OPERATIONS`, or `full:SEED:OPERATIONS`, which fills the device.
#[must_use]
pub fn by_name(name: &str) -> Option<Vec<Operation>> {
    let mut parts = name.split(':');
    let (kind, seed, length) = (parts.next()?, parts.next().map(str::parse), parts.next().map(str::parse));
    match (kind, seed, length, parts.next()) {
        ("random", Some(Ok(seed)), Some(Ok(length)), None) => Some(random(seed, length)),
        ("full", Some(Ok(seed)), Some(Ok(length)), None) => Some(full(seed, length)),
        _ => fixed().into_iter().find(|(fixed, _)| *fixed == name).map(|(_, operations)| operations),
    }
}

/// Size of the device, in bytes, that a workload is meant for.
#[must_use]
pub fn device_bytes(name: &str) -> u64 {
    match name {
        "more than memory" => 32 << 20,
        _ if name.starts_with("full:") || name.contains("compaction") => 8 << 20,
        _ => 16 << 20,
    }
}

/// The first fixed workloads, with their names.
#[must_use]
pub fn all() -> Vec<(&'static str, Vec<Operation>)> {
    vec![
        ("create, write, fsync", create_write_fsync()),
        ("rename over", rename_over()),
        ("append", append()),
        ("unlink", unlink_and_reuse()),
        ("bucket reuse", bucket_reuse()),
        ("directory tree", directory_tree()),
        ("truncate", truncate_and_extend()),
        ("overwrite", overwrite()),
        ("checkpoint in the middle", checkpoint_in_the_middle()),
        ("attributes and links", attributes_and_links()),
        ("exchange", exchange()),
        ("ranges", ranges()),
        ("direct", direct()),
    ]
}

/// Workloads that are too large for every plan at every boundary: trees of several nodes, a device whose space is short.
#[must_use]
pub fn large() -> Vec<(&'static str, Vec<Operation>)> {
    vec![("many names", many_names()), ("compaction", compaction())]
}

/// Many operations between two syncs: with small records, several records to a batch.
#[must_use]
pub fn batches() -> Vec<Operation> {
    let mut workload = Vec::new();
    for round in 0..3 {
        for file in 0..24 {
            workload.push(create(&format!("/a-file-with-a-name-{round}-{file}")));
        }
        workload.push(Operation::FsyncDirectory { path: "/".into() });
    }
    workload
}

/// Files that together are larger than a page cache of 4 MiB, and changes all over them.
#[must_use]
pub fn more_than_memory() -> Vec<Operation> {
    let mut workload = Vec::new();
    for file in 0..6u32 {
        let path = format!("/f{file}");
        workload.extend([create(&path), write(&path, 0, 1 << 20, file + 1)]);
    }
    workload.extend([Operation::Sync, Operation::Begin]);
    for round in 0..12u32 {
        let path = format!("/f{}", round % 6);
        workload.push(write(&path, u64::from(round * 81 % 13) * 70_000, 30_000, 100 + round));
        match round % 4 {
            1 => workload.push(Operation::Settle),
            3 => workload.push(fsync(&path)),
            _ => {}
        }
    }
    workload
}

/// Enough names that nodes split, and then so few that they merge.
fn many_names() -> Vec<Operation> {
    let mut workload = vec![directory("/d")];
    for round in 0..5 {
        for file in 0..60 {
            workload.push(create(&format!("/d/a-name-that-is-rather-long-{round}-{file}")));
        }
        workload.extend([Operation::Settle, Operation::FsyncDirectory { path: "/d".into() }]);
    }
    for round in 0..5 {
        for file in 0..60 {
            let path = format!("/d/a-name-that-is-rather-long-{round}-{file}");
            match file % 6 {
                0 => workload.push(rename(&path, &format!("/d/renamed-{round}-{file}"))),
                _ => workload.push(unlink(&path)),
            }
        }
        workload.extend([Operation::Settle, Operation::Settle]);
    }
    workload.push(Operation::Sync);
    workload
}

/// Fills most of 8 MiB, then rewrites parts everywhere: only moving what is left gives whole buckets back.
fn compaction() -> Vec<Operation> {
    let mut workload = Vec::new();
    for file in 0..COMPACTION_FILES as u32 {
        let path = format!("/f{file}");
        workload.extend([create(&path), write(&path, 0, 128 << 10, file + 1)]);
        if file % 7 == 6 {
            workload.extend([Operation::Sync, Operation::Settle]);
        }
    }
    for round in 0..48u64 {
        let path = format!("/f{}", round * 5 % COMPACTION_FILES);
        let offset = (round / 4 % 4) * (32 << 10);
        workload.push(write(&path, offset, (16 << 10) + round % 3 * 1000, 100 + round as u32));
        match round % 6 {
            2 => workload.push(Operation::Settle),
            5 => workload.extend([fsync(&path), Operation::Settle]),
            _ => {}
        }
    }
    workload.push(Operation::Sync);
    workload
}

/// Of 128 KiB each.
const COMPACTION_FILES: u64 = 28;

fn create_write_fsync() -> Vec<Operation> {
    vec![
        create("/a"),
        write("/a", 0, 100, 1),
        fsync("/a"),
        create("/b"),
        write("/b", 0, 20_000, 2),
        Operation::Settle,
        write("/b", 5000, 9000, 3),
        fsync("/b"),
        create("/c"),
        write("/c", 1 << 20, 4096, 4),
        Operation::Settle,
        fsync("/c"),
    ]
}

fn rename_over() -> Vec<Operation> {
    let mut workload = vec![create("/config"), write("/config", 0, 6000, 1), fsync("/config")];
    for round in 0..4u32 {
        // Every other time without an fsync, as many programs do.
        workload.extend([create("/config.new"), write("/config.new", 0, 3000 + 3000 * u64::from(round), 10 + round)]);
        if round % 2 == 0 {
            workload.push(fsync("/config.new"));
        }
        workload.extend([rename("/config.new", "/config"), Operation::Settle]);
    }
    workload.push(Operation::FsyncDirectory { path: "/".into() });
    workload
}

fn append() -> Vec<Operation> {
    let mut workload = vec![create("/log")];
    let mut end = 0;
    for (tag, length) in [10u64, 700, 4096, 1, 9000, 300, 5000].into_iter().enumerate() {
        workload.push(write("/log", end, length, tag as u32 + 1));
        end += length;
        if tag % 2 == 1 {
            workload.push(fsync("/log"));
        }
        if tag % 3 == 2 {
            workload.push(Operation::Settle);
        }
    }
    workload
}

fn unlink_and_reuse() -> Vec<Operation> {
    let mut workload = Vec::new();
    for round in 0..3u32 {
        workload.extend([
            create("/a"),
            write("/a", 0, 30_000, 2 * round + 1),
            fsync("/a"),
            unlink("/a"),
            // Takes the space of what was deleted, perhaps.
            create("/b"),
            write("/b", 0, 30_000, 2 * round + 2),
            Operation::Settle,
            fsync("/b"),
            unlink("/b"),
            Operation::FsyncDirectory { path: "/".into() },
            Operation::Settle,
        ]);
    }
    workload
}

/// Whole buckets are emptied and at once wanted again, by other files, while a crash may still bring back what they held.
fn bucket_reuse() -> Vec<Operation> {
    let mut workload = Vec::new();
    for round in 0..6u32 {
        let (old, new) = (format!("/old{}", round % 2), format!("/new{round}"));
        workload.extend([
            create(&old),
            write(&old, 0, 200_000, 2 * round + 1),
            fsync(&old),
            unlink(&old),
            Operation::Turns { count: 6 },
            create(&new),
            write(&new, 0, 200_000, 2 * round + 2),
            Operation::Turns { count: 12 },
        ]);
        if round % 2 == 1 {
            workload.extend([Operation::Settle, Operation::Sync, unlink(&new)]);
        }
    }
    workload
}

fn directory_tree() -> Vec<Operation> {
    let mut workload = Vec::new();
    for outer in 0..3 {
        workload.push(directory(&format!("/d{outer}")));
        for inner in 0..3 {
            let folder = format!("/d{outer}/e{inner}");
            let file = format!("{folder}/file");
            workload.extend([directory(&folder), create(&file), write(&file, 0, 50, outer * 10 + inner)]);
        }
        workload.push(Operation::FsyncDirectory { path: format!("/d{outer}") });
    }
    workload.extend([
        rename("/d0/e0", "/d1/moved"),
        rename("/d1", "/d2/d1"),
        Operation::Settle,
        unlink("/d2/d1/moved/file"),
        Operation::RemoveDirectory { path: "/d2/d1/moved".into() },
        fsync("/d2/d1/e1/file"),
    ]);
    workload
}

fn truncate_and_extend() -> Vec<Operation> {
    vec![
        create("/a"),
        write("/a", 0, 20_000, 1),
        fsync("/a"),
        truncate("/a", 5000),
        truncate("/a", 15_000),
        Operation::Settle,
        write("/a", 14_000, 3000, 2),
        truncate("/a", 16_000),
        fsync("/a"),
        truncate("/a", 0),
        write("/a", 0, 100, 3),
        Operation::Settle,
        truncate("/a", 60),
        Operation::Punch { path: "/a".into(), offset: 10, length: 20 },
        write("/a", 8192, 8192, 4),
        fsync("/a"),
        Operation::Punch { path: "/a".into(), offset: 8000, length: 5000 },
        Operation::Settle,
        Operation::Sync,
    ]
}

fn write_direct(path: &str, offset: u64, length: u64, tag: u32) -> Operation {
    Operation::WriteAs { path: path.into(), offset, length, tag, way: Way::Direct }
}

fn collapse(path: &str, offset: u64, length: u64) -> Operation {
    Operation::Collapse { path: path.into(), offset, length }
}

fn insert(path: &str, offset: u64, length: u64) -> Operation {
    Operation::Insert { path: path.into(), offset, length }
}

/// Holes with edges, zeroed ranges, and files whose middle is taken out or made longer, with one extent for each block: more than a transaction takes.
fn ranges() -> Vec<Operation> {
    let mut workload = vec![create("/a"), write("/a", 0, 30_000, 1), fsync("/a")];
    workload.extend([
        Operation::Punch { path: "/a".into(), offset: 3000, length: 11_000 },
        write("/a", 20_000, 5000, 2),
        Operation::Zero { path: "/a".into(), offset: 18_000, length: 4000, keep_size: true },
        Operation::Settle,
        Operation::Zero { path: "/a".into(), offset: 25_000, length: 10_000, keep_size: false },
        create("/b"),
    ]);
    let blocks = 24;
    for block in (0..blocks).rev() {
        workload.push(write("/b", block * 4096, 4096 - 50 * u64::from(block + 1 == blocks), 10 + block as u32));
        workload.push(write_direct("/b", block * 4096, 2000, 50));
    }
    workload.extend([
        fsync("/b"),
        collapse("/b", 4096, 3 * 4096),
        write("/b", 8000, 3000, 90),
        insert("/b", 8192, 5 * 4096),
        Operation::Settle,
        collapse("/b", 0, 4096),
        write("/b", 100, 100, 91),
        fsync("/b"),
        Operation::Punch { path: "/b".into(), offset: 4000, length: 60_000 },
        Operation::Sync,
    ]);
    workload
}

/// Direct writes beside buffered ones: aligned, extending, over dirty blocks, into holes and over inline data.
fn direct() -> Vec<Operation> {
    let direct = |offset, length, tag| write_direct("/a", offset, length, tag);
    vec![
        create("/a"),
        write("/a", 0, 700, 1),
        fsync("/a"),
        direct(0, 4096, 2),
        direct(4096, 8192, 3),
        fsync("/a"),
        write("/a", 5000, 3000, 4),
        direct(4096, 4096, 5),
        Operation::Settle,
        write("/a", 9000, 9000, 6),
        direct(20_000, 3000, 7),
        truncate("/a", 21_000),
        direct(16_384, 4096, 8),
        direct(1000, 200, 9),
        fsync("/a"),
        direct(40_960, 4096, 10),
        Operation::Sync,
    ]
}

/// Rewrites parts of a few files again and again: old extents die one by one, so that compaction has work.
fn overwrite() -> Vec<Operation> {
    let mut workload = Vec::new();
    for file in 0..4u32 {
        let path = format!("/f{file}");
        workload.extend([create(&path), write(&path, 0, 64 << 10, file + 1)]);
    }
    workload.push(Operation::Sync);
    for round in 0..24u64 {
        let path = format!("/f{}", round % 4);
        workload.push(write(&path, round * 20_480 % 61_440, 4096 + round % 3 * 1000, 100 + round as u32));
        if round % 5 == 4 {
            workload.push(Operation::Settle);
        }
        if round % 8 == 7 {
            workload.push(fsync(&path));
        }
    }
    workload
}

fn checkpoint_in_the_middle() -> Vec<Operation> {
    let mut workload = Vec::new();
    for round in 0..3u32 {
        for file in 0..8 {
            workload.push(create(&format!("/r{round}-{file}")));
        }
        workload.extend([Operation::Settle, Operation::Settle]);
        let path = format!("/r{round}-0");
        workload.extend([write(&path, 0, 9000, round + 1), fsync(&path), Operation::Settle]);
        workload.push(unlink(&format!("/r{round}-1")));
    }
    workload.push(Operation::Sync);
    workload
}

fn attributes_and_links() -> Vec<Operation> {
    vec![
        create("/a"),
        Operation::ChangeMode { path: "/a".into(), mode: 0o600 },
        Operation::SetXattr { path: "/a".into(), name: "user.one".into(), value: "1".into() },
        fsync("/a"),
        Operation::Link { existing: "/a".into(), path: "/b".into() },
        Operation::SetXattr { path: "/b".into(), name: "user.one".into(), value: "2".repeat(200) },
        Operation::Settle,
        unlink("/a"),
        Operation::SymbolicLink { path: "/s".into(), target: "b".into() },
        fsync("/b"),
        Operation::RemoveXattr { path: "/b".into(), name: "user.one".into() },
        Operation::Link { existing: "/b".into(), path: "/a".into() },
        // The newest of several names goes, once by itself and once under another file.
        Operation::Link { existing: "/b".into(), path: "/c".into() },
        unlink("/c"),
        Operation::Link { existing: "/b".into(), path: "/c".into() },
        create("/d"),
        rename("/d", "/c"),
        Operation::Settle,
        Operation::Sync,
    ]
}

fn exchange() -> Vec<Operation> {
    vec![
        create("/a"),
        write("/a", 0, 5000, 1),
        directory("/d"),
        create("/d/b"),
        write("/d/b", 0, 7000, 2),
        Operation::Exchange { one: "/a".into(), other: "/d/b".into() },
        Operation::Settle,
        fsync("/a"),
        Operation::Exchange { one: "/a".into(), other: "/d".into() },
        Operation::FsyncDirectory { path: "/".into() },
    ]
}

/// A workload of `length` operations by seed. Most of them succeed; some fail, and must fail in the right way.
#[must_use]
pub fn random(seed: u64, length: usize) -> Vec<Operation> {
    let mut random = Random(Xoshiro256PlusPlus::seed_from_u64(seed));
    let mut model = Model::new(4096);
    let mut workload = Vec::with_capacity(length);
    for tag in 1..=length as u32 {
        let operation = random.operation(&model, tag);
        // The model goes along, so that paths are mostly ones that exist.
        let _ = model.begin(&operation);
        workload.push(operation);
    }
    workload
}

/// A workload of `length` operations by seed that writes more than 8 MiB hold, and deletes when it finds no space.
#[must_use]
pub fn full(seed: u64, length: usize) -> Vec<Operation> {
    let mut random = Random(Xoshiro256PlusPlus::seed_from_u64(seed ^ 0xf011));
    let mut model = Model::new(4096);
    let mut workload = Vec::with_capacity(length);
    for tag in 1..=length as u32 {
        let tree = model.tree();
        let files: Vec<String> = tree
            .iter()
            .filter(|(_, entry)| matches!(entry.kind, Kind::File(_)))
            .map(|(path, _)| path.clone())
            .collect();
        let operation = match random.below(16) {
            0..=2 => create(&format!("/n{}", random.below(40))),
            3..=7 => {
                let length = (64 << 10) + random.below(512 << 10);
                write(&random.pick(&files), random.below(256 << 10), length, tag)
            }
            8 => {
                let (offset, length) = (random.below(64) * 4096, (1 + random.below(64)) * 4096);
                write_direct(&random.pick(&files), offset, length, tag)
            }
            9 => Operation::Allocate {
                path: random.pick(&files),
                offset: random.below(1 << 20),
                length: 1 + random.below(1 << 20),
                keep_size: random.below(2) == 0,
            },
            10 | 11 if tag > 40 => unlink(&random.pick(&files)),
            12 => truncate(&random.pick(&files), 0),
            13 => fsync(&random.pick(&files)),
            14 => Operation::Settle,
            _ => random.operation(&model, tag),
        };
        let _ = model.begin(&operation);
        workload.push(operation);
    }
    workload
}

struct Random(Xoshiro256PlusPlus);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0.next_u64() % bound.max(1)
    }

    fn pick(&mut self, paths: &[String]) -> String {
        let index = self.below(paths.len() as u64) as usize;
        paths.get(index).cloned().unwrap_or_else(|| "/missing".into())
    }

    fn operation(&mut self, model: &Model, tag: u32) -> Operation {
        let tree = model.tree();
        let of = |wanted: fn(&Kind) -> bool| -> Vec<String> {
            tree.iter().filter(|(_, entry)| wanted(&entry.kind)).map(|(path, _)| path.clone()).collect()
        };
        let files = of(|kind| matches!(kind, Kind::File(_)));
        let folders = of(|kind| *kind == Kind::Directory);
        let all: Vec<String> = tree.keys().filter(|path| *path != "/").cloned().collect();
        let folder = self.pick(&folders);
        let fresh = format!("{}/n{}", folder.trim_end_matches('/'), self.below(12));
        let size = |path: &str| match tree.get(path).map(|entry| &entry.kind) {
            Some(Kind::File(bytes)) => bytes.len() as u64,
            _ => 0,
        };
        match self.below(44) {
            0..=4 => Operation::Create { path: fresh, mode: 0o600 + self.below(0o100) as u16 },
            5 | 6 => directory(&fresh),
            7..=13 => {
                let path = self.pick(&files);
                let offset = match self.below(3) {
                    0 => size(&path),
                    _ => self.below(size(&path).max(1) + 5000),
                };
                let length = match self.below(3) {
                    0 => 1 + self.below(300),
                    1 => 4096,
                    _ => 1 + self.below(40_000),
                };
                Operation::Write { path, offset, length, tag }
            }
            14 | 15 => {
                let path = self.pick(&files);
                let size = self.below(size(&path) * 2 + 1000);
                Operation::Truncate { path, size }
            }
            16 => {
                let path = self.pick(&files);
                let (offset, length) = (self.below(size(&path) + 1), 1 + self.below(9000));
                Operation::Punch { path, offset, length }
            }
            17 | 18 => unlink(&self.pick(&files)),
            19 => Operation::RemoveDirectory { path: self.pick(&folders) },
            20 | 21 => rename(&self.pick(&all), &fresh),
            22 => rename(&self.pick(&files), &self.pick(&files)),
            23 => Operation::Exchange { one: self.pick(&all), other: self.pick(&all) },
            24 => Operation::Link { existing: self.pick(&files), path: fresh },
            25 => Operation::SymbolicLink { path: fresh, target: format!("target-{tag}") },
            26 => Operation::ChangeMode { path: self.pick(&files), mode: self.below(0o1000) as u16 },
            27 => Operation::SetXattr {
                path: self.pick(&files),
                name: format!("user.{}", tag % 3),
                value: tag.to_string(),
            },
            28 => fsync(&self.pick(&files)),
            29 => Operation::FsyncDirectory { path: folder },
            30 => Operation::Sync,
            31 => {
                let path = self.pick(&files);
                let (offset, length) = (self.below(size(&path) + 3000), 1 + self.below(20_000));
                Operation::Zero { path, offset, length, keep_size: self.below(2) == 0 }
            }
            32 | 33 => {
                let path = self.pick(&files);
                let blocks = size(&path) / 4096 + 1;
                let (offset, length) = (self.below(blocks) * 4096, (1 + self.below(blocks / 2 + 1)) * 4096);
                if self.below(2) == 0 { collapse(&path, offset, length) } else { insert(&path, offset, length) }
            }
            34 | 35 => {
                let path = self.pick(&files);
                let (offset, length) = match self.below(2) {
                    0 => (self.below(size(&path) / 4096 + 2) * 4096, (1 + self.below(4)) * 4096),
                    _ => (self.below(size(&path) + 5000), 1 + self.below(9000)),
                };
                write_direct(&path, offset, length, tag)
            }
            36 => Operation::RemoveXattr { path: self.pick(&files), name: format!("user.{}", tag % 3) },
            37 | 38 => Operation::Allocate {
                path: self.pick(&files),
                offset: self.below(40_000),
                length: 1 + self.below(60_000),
                keep_size: self.below(2) == 0,
            },
            39 => Operation::MakeFifo { path: fresh, mode: 0o644 },
            40 => Operation::OpenTruncated { path: self.pick(&files) },
            41 => Operation::Fdatasync { path: self.pick(&files) },
            _ => Operation::Settle,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fixed_workloads_succeed_in_the_model() {
        for (name, workload) in fixed() {
            let mut model = Model::new(4096);
            for operation in &workload {
                model.begin(operation).unwrap_or_else(|errno| panic!("{name}: {operation:?}: {errno}"));
                model.acknowledge(operation);
            }
        }
    }

    #[test]
    fn random_workloads_are_varied_and_depend_on_the_seed_alone() {
        assert_eq!(random(1, 100), random(1, 100));
        assert_eq!(by_name("full:4:50"), Some(full(4, 50)));
        assert_eq!(by_name("append"), Some(append()));
        for name in ["random", "random:1", "random:1:x", "random:1:2:3", "nothing"] {
            assert_eq!(by_name(name), None, "{name}");
        }
        assert_ne!(random(1, 100), random(2, 100));
        let mut model = Model::new(4096);
        let failed = random(3, 500).iter().filter(|operation| model.begin(operation).is_err()).count();
        assert!((1..250).contains(&failed), "{failed} of 500 fail");
        assert!(model.tree().len() > 5);
    }
}
