//! Damaged media, by seed: a small populated image with some sectors or some keys changed is opened, walked, read, repaired and checked.
//! Errors are answers; a panic, a hang, or a check that writes is a failure. After `fsck -y` a second check finds nothing, or the first said that it
//! takes a rebuild; then one is made, and its result is clean. Where sectors are damaged, whatever can be read afterwards is what was there.
//!
//! Where no node is lost, the repair is complete: keys alone never take a rebuild.
//!
//! `COPPICE_FUZZ_IMAGES` (160) is how many images of each kind, `COPPICE_SEED` the first one's seed; of a single one what was found is printed.
//! `COPPICE_FUZZ_FOLDERS` (4): how large the image is; with 16 the trees have interior nodes.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use coppicefs::device::{BlockDevice, Image, SimDevice, SimOptions};
use coppicefs::env::Env;
use coppicefs::filesystem::{Filesystem, OpenOptions, WorkerSet};
use coppicefs::format::namespace::{FileType, Inode, LoggedOperation};
use coppicefs::format::space::FreeBucket;
use coppicefs::format::{BtreeId, Position};
use coppicefs::recovery::superblock;
use coppicefs::transaction::{CommitOptions, Transaction};
use coppicefs::vfs::{Attributes, Caller, Emitted, Lookup, ReadRequest, Vfs, WriteRequest};
use coppicefs::{Error, Result};
use coppicefs_fsck::rebuild::{RebuildOptions, Target, finish, rebuild};
use coppicefs_fsck::session::repair_all;
use coppicefs_tests::crash::{Subject, seed_or};
use coppicefs_tests::filesystem_subject::Coppice;
use coppicefs_tests::limit::Limit;
use coppicefs_tests::mount::count;
use coppicefs_tests::operation::Operation;
use coppicefs_tests::regions::{Region, regions};
use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};
use rustix::io::Errno;

const DEVICE_BYTES: u64 = 16 << 20;
const SECTOR_BYTES: u64 = 512;
const ROOT: u64 = 1;
const CALLER: Caller = Caller { uid: 0, gid: 0, pid: 1, umask: 0 };
const READ_BYTES: u32 = 16 << 10;

/// Images of each kind, if not told otherwise.
const IMAGES: u64 = 160;

struct Random(Xoshiro256PlusPlus);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0.next_u64() % bound.max(1)
    }
}

fn device_of(image: Image) -> Arc<SimDevice> {
    Arc::new(SimDevice::from_image(image, SimOptions { block_bytes: 4096, ..SimOptions::default() }))
}

/// Every kind of inode, data inline, in extents, compressed or not, preallocated, with holes; a journal that needs replay.
fn made(subject: &Coppice) -> Image {
    let device = device_of(Image::new(DEVICE_BYTES));
    subject.format(&device).unwrap();
    let mut mounted = subject.mount(&device, 1).unwrap();
    let mut perform = |operation: Operation| mounted.perform(&operation).unwrap();
    for folder in 0..count("COPPICE_FUZZ_FOLDERS", 4) {
        let path = format!("/d{folder}");
        perform(Operation::MakeDirectory { path: path.clone(), mode: 0o755 });
        for file in 0..12_u32 {
            let path = format!("{path}/a-file-with-a-name-{file}");
            perform(Operation::Create { path: path.clone(), mode: 0o644 });
            let length = 1 + u64::from(file) * 4000;
            perform(Operation::Write { path: path.clone(), offset: 0, length, tag: file | (file % 2) << 31 });
            perform(Operation::SetXattr { path: path.clone(), name: "user.a".into(), value: "v".repeat(1 << file) });
            match file {
                3 => perform(Operation::Link { existing: path, path: format!("/link{folder}") }),
                4 => perform(Operation::SymbolicLink { path: format!("/symbolic{folder}"), target: path }),
                5 => perform(Operation::Punch { path, offset: 4096, length: 8192 }),
                6 => perform(Operation::Allocate { path, offset: 20_000, length: 80_000, keep_size: false }),
                _ => {}
            }
        }
        perform(if folder % 2 == 0 { Operation::Sync } else { Operation::Settle });
    }
    // Open when the power is cut: to be deleted.
    let path = String::from("/d0/gone");
    perform(Operation::Create { path: path.clone(), mode: 0o600 });
    perform(Operation::Write { path: path.clone(), offset: 0, length: 9000, tag: 99 });
    perform(Operation::Hold { path: path.clone() });
    perform(Operation::Unlink { path });
    // Not unmounted: the newest changes are in the journal alone.
    perform(Operation::Sync);
    device.snapshot().everything()
}

fn options() -> OpenOptions {
    OpenOptions { cache_bytes: 8 << 20, env: Some(Env::simulated(1)), ..OpenOptions::default() }
}

/// What files show, by node: pieces of `READ_BYTES`, `None` for those that are errors.
type Contents = BTreeMap<u64, Vec<Option<Vec<u8>>>>;

/// Mounts, and asks for everything that there is: whatever fails, the rest is asked for, too.
fn walk(device: &Arc<SimDevice>) -> Result<Vec<(PathBuf, Error)>> {
    walk_and_read(device).map(|(errors, _)| errors)
}

fn walk_and_read(device: &Arc<SimDevice>) -> Result<(Vec<(PathBuf, Error)>, Contents)> {
    let env = Env::simulated(1);
    let options = OpenOptions { env: Some(Arc::clone(&env)), ..options() };
    let filesystem = Filesystem::open(vec![Arc::clone(device) as _], &options)?;
    let mut walk = Walk { vfs: filesystem.vfs(), seen: BTreeSet::new(), errors: Vec::new(), contents: Contents::new() };
    walk.directory(&PathBuf::from("/"), ROOT);
    let Walk { errors, contents, .. } = walk;
    let closed = filesystem.close();
    // The workers hold the filesystem, and the scheduler holds them.
    env.unregister_all();
    closed.map(|()| (errors, contents))
}

struct Walk<'a> {
    vfs: &'a Vfs,
    seen: BTreeSet<u64>,
    errors: Vec<(PathBuf, Error)>,
    contents: Contents,
}

impl Walk<'_> {
    fn note<T>(&mut self, path: &Path, outcome: Result<T>) -> Option<T> {
        outcome.map_err(|error| self.errors.push((path.to_owned(), error))).ok()
    }

    fn directory(&mut self, path: &Path, node: u64) {
        // A damaged tree may have rings.
        if !self.seen.insert(node) {
            return;
        }
        let vfs = self.vfs;
        let Some(opened) = self.note(path, vfs.opendir(&CALLER, node, 0)) else { return };
        let mut names = Vec::new();
        let listed = vfs.readdir(&CALLER, node, opened.handle, 0, &mut |entry| {
            names.push(entry.name.to_owned());
            Emitted::Accepted
        });
        self.note(path, listed);
        self.note(path, vfs.releasedir(node, opened.handle));
        for name in names.iter().filter(|name| *name != "." && *name != "..") {
            let path = path.join(name);
            let Some(found) = self.note(&path, vfs.lookup(&CALLER, node, name)) else { continue };
            let Lookup::Found(entry) = found else { continue };
            self.inode(&path, &entry.attributes);
            vfs.forget(entry.attributes.node, 1);
        }
    }

    fn inode(&mut self, path: &Path, attributes: &Attributes) {
        let (vfs, node) = (self.vfs, attributes.node);
        if let Some(names) = self.note(path, vfs.list_xattrs(&CALLER, node)) {
            for name in names.split(|&byte| byte == 0).filter(|name| !name.is_empty()) {
                self.note(path, vfs.get_xattr(&CALLER, node, OsStr::from_bytes(name)));
            }
        }
        match attributes.file_type {
            FileType::Directory => self.directory(path, node),
            FileType::Symlink => {
                self.note(path, vfs.readlink(&CALLER, node));
            }
            FileType::Regular => self.file(path, attributes),
            _ => {}
        }
    }

    fn file(&mut self, path: &Path, attributes: &Attributes) {
        let (vfs, node) = (self.vfs, attributes.node);
        let for_writing = vfs.open(&CALLER, node, 2);
        // Flags that were changed are flags: this one may not be written to.
        let is_protected = matches!(for_writing, Err(Error::Posix(Errno::PERM)));
        let opened = if is_protected { vfs.open(&CALLER, node, 0) } else { for_writing };
        let Some(opened) = self.note(path, opened) else { return };
        // A size that is not so is not read to its end.
        let mut content = Vec::new();
        for offset in (0..attributes.size_bytes.min(256 << 10)).step_by(READ_BYTES as usize) {
            let request =
                ReadRequest { node, handle: opened.handle, offset, length_bytes: READ_BYTES, direct: offset > 65_536 };
            let read = self.note(path, vfs.read(&CALLER, &request));
            content.push(read.map(|pages| {
                let mut bytes = Vec::new();
                pages.slices().for_each(|slice| bytes.extend_from_slice(slice));
                bytes
            }));
        }
        // By another name it was read before it was written to.
        self.contents.entry(node).or_insert(content);
        let data = [7; 5000];
        let request = WriteRequest::new(node, opened.handle, 3000, &data);
        if !is_protected {
            self.note(path, vfs.write(&CALLER, &request).map(|_| ()));
        }
        self.note(path, vfs.fsync(&CALLER, node, opened.handle, false));
        self.note(path, vfs.release(node, opened.handle));
    }
}

/// What became of the images.
#[derive(Default)]
struct Outcomes {
    opened: AtomicU64,
    shown: AtomicU64,
    repaired: AtomicU64,
    rebuild: AtomicU64,
    rebuilt: AtomicU64,
    /// What the intact image shows, where the damage is such that nothing else may be shown.
    original: Option<Contents>,
    /// There is one image, of which more is said.
    is_one: bool,
    /// Why a rebuild is what they take, in words without numbers, and the first seed of each.
    reasons: Mutex<BTreeMap<String, (u64, u64)>>,
}

impl Outcomes {
    fn takes_rebuild(&self, seed: u64, reason: &str) {
        self.rebuild.fetch_add(1, Ordering::Relaxed);
        let words: Vec<String> = reason
            .split(|letter: char| !letter.is_ascii_alphabetic())
            .filter(|word| !word.is_empty() && !word.chars().any(char::is_numeric))
            .map(str::to_owned)
            .collect();
        let mut reasons = self.reasons.lock().unwrap();
        let known = reasons.entry(words.join(" ")).or_insert((0, seed));
        known.0 += 1;
        known.1 = known.1.min(seed);
    }
}

/// What can be read is what was there; the size of a file whose inode is gone is known to a block.
fn assert_content(seed: u64, what: &str, original: &Contents, found: &Contents) {
    for (node, found) in found {
        let Some(original) = original.get(node) else { continue };
        for (number, (found, original)) in found.iter().zip(original).enumerate() {
            if let (Some(found), Some(original)) = (found, original) {
                let differs = found.iter().zip(original).position(|(found, original)| found != original);
                assert_eq!(differs, None, "seed {seed}, {what}: piece {number} of inode {node} has other bytes");
                let is_padded = found.get(original.len()..).is_some_and(|more| more.iter().all(|&byte| byte == 0));
                assert!(is_padded, "seed {seed}, {what}: piece {number} of inode {node} has other bytes");
            }
        }
    }
}

/// What takes a rebuild gets one: the result is clean and can be used, and where nothing is said to be lost, it shows what was there.
fn rebuild_one(subject: &Coppice, image: Image, seed: u64, outcomes: &Outcomes) {
    let device = device_of(image);
    let target: Arc<dyn BlockDevice> = Arc::clone(&device) as _;
    let options = RebuildOptions { filesystem: None, env: Env::simulated(1) };
    let report = match rebuild(&target, Target::InPlace, &options, &|_, _| (), &mut |_| true) {
        Ok(report) => report,
        Err(Error::Unusable(reason)) => {
            println!("seed {seed}: not rebuilt: {reason}");
            return;
        }
        Err(error) => panic!("seed {seed}: --rebuild: {error}"),
    };
    let finished = finish(target, Some(Env::simulated(1)), &mut |_| Ok(()));
    let finished = finished.unwrap_or_else(|error| panic!("seed {seed}: after --rebuild: {error}"));
    assert!(finished.report.is_clean(), "seed {seed}: after --rebuild: {:?}", finished.report.problems);
    assert_eq!(subject.check(&device).unwrap(), [""; 0], "seed {seed}: after --rebuild");
    let (errors, contents) =
        walk_and_read(&device).unwrap_or_else(|error| panic!("seed {seed}: rebuilt, but does not mount: {error}"));
    let errors: Vec<_> = errors.iter().filter(|(_, error)| !error.is_media_error()).collect();
    assert!(errors.is_empty(), "seed {seed}: rebuilt, but then {errors:?}");
    outcomes.rebuilt.fetch_add(1, Ordering::Relaxed);
    if !report.is_something_lost()
        && let Some(original) = &outcomes.original
    {
        assert_content(seed, "rebuilt", original, &contents);
    }
}

/// One image: errors are fine, whatever they say.
fn try_one(subject: &Coppice, image: Image, seed: u64, outcomes: &Outcomes) {
    let _limit = Limit::new();
    // The check first: it writes nothing.
    let device = device_of(image.clone());
    let before = device.image().content_hash();
    let checked = subject.check(&device);
    assert_eq!(device.image().content_hash(), before, "seed {seed}: the check changed the image");
    outcomes.opened.fetch_add(u64::from(checked.is_ok()), Ordering::Relaxed);
    let shown = walk(&device_of(image.clone()));
    outcomes.shown.fetch_add(u64::from(shown.is_ok_and(|errors| errors.is_empty())), Ordering::Relaxed);
    let device = device_of(image.clone());
    match repair_all(&[Arc::clone(&device) as _], &options()) {
        Ok(outcome) if !outcome.needs_rebuild() => {
            if outcomes.is_one {
                println!("repaired {:#?}", outcome.problems);
            }
            assert!(outcome.left.is_empty(), "seed {seed}: left by fsck -y: {:?}", outcome.left);
        }
        // Exit 8, naming --rebuild.
        Ok(outcome) => {
            if outcomes.is_one {
                println!("found {:#?}\nfailed {:#?}\nleft {:#?}", outcome.problems, outcome.failed, outcome.left);
            }
            let failed = outcome.failed.iter().map(|(problem, why)| format!("{}: {why}", problem.id()));
            let left =
                outcome.left.iter().filter(|problem| !problem.is_repairable()).map(|problem| problem.id().into());
            let reasons: BTreeSet<String> = failed.chain(left).collect();
            outcomes.takes_rebuild(seed, &reasons.into_iter().collect::<Vec<_>>().join("; "));
            return rebuild_one(subject, image, seed, outcomes);
        }
        Err(error) => {
            let is_damage = error.is_media_error() || matches!(error, Error::Unusable(_));
            assert!(is_damage && checked.is_err(), "seed {seed}: fsck -y: {error}");
            outcomes.takes_rebuild(seed, &error.to_string());
            return rebuild_one(subject, image, seed, outcomes);
        }
    }
    outcomes.repaired.fetch_add(1, Ordering::Relaxed);
    let problems = subject.check(&device).unwrap_or_else(|error| panic!("seed {seed}: after a repair: {error}"));
    assert!(problems.is_empty(), "seed {seed}: repaired, but then the check finds {problems:?}");
    // The data of files is not what fsck looks at: a bad block stays one.
    let (errors, contents) =
        walk_and_read(&device).unwrap_or_else(|error| panic!("seed {seed}: repaired, but does not mount: {error}"));
    if let Some(original) = &outcomes.original {
        assert_content(seed, "repaired", original, &contents);
    }
    let errors: Vec<_> = errors.iter().filter(|(_, error)| !error.is_media_error()).collect();
    assert!(errors.is_empty(), "seed {seed}: repaired, but then {errors:?}");
    let problems = subject.check(&device).unwrap_or_else(|error| panic!("seed {seed}: after use: {error}"));
    assert!(problems.is_empty(), "seed {seed}: repaired and used, but then the check finds {problems:?}");
}

/// Tries images on as many threads as there are processors, and says what became of them.
fn try_all(
    what: &str,
    images: u64,
    original: Option<Contents>,
    damage: impl Fn(u64, &mut Random) -> Image + Sync,
) -> Outcomes {
    let subject = Coppice::default();
    let (first, images) = (seed_or(1), count("COPPICE_FUZZ_IMAGES", images));
    let next = AtomicU64::new(0);
    let outcomes = Outcomes { is_one: images == 1, original, ..Outcomes::default() };
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= images {
                        return;
                    }
                    let seed = first + number;
                    let image = damage(seed, &mut Random(Xoshiro256PlusPlus::seed_from_u64(seed)));
                    // A thread with a name: a report of a panic or a hang says which image it is.
                    let (subject, outcomes) = (&subject, &outcomes);
                    let named = std::thread::Builder::new().name(format!("{what} COPPICE_SEED={seed}"));
                    let tried = named.spawn_scoped(scope, move || try_one(subject, image, seed, outcomes)).unwrap();
                    tried.join().unwrap_or_else(|_| panic!("{what}: failed, again with COPPICE_SEED={seed}"));
                }
            });
        }
    });
    println!(
        "{what}: {images} images in {:.1} s: {} could be checked, {} showed everything, {} were repaired, {} take a rebuild, of which {} were rebuilt",
        start.elapsed().as_secs_f64(),
        outcomes.opened.load(Ordering::Relaxed),
        outcomes.shown.load(Ordering::Relaxed),
        outcomes.repaired.load(Ordering::Relaxed),
        outcomes.rebuild.load(Ordering::Relaxed),
        outcomes.rebuilt.load(Ordering::Relaxed),
    );
    for (reason, (count, seed)) in outcomes.reasons.lock().unwrap().iter() {
        println!("    {count} (the first is seed {seed}): {reason}");
    }
    outcomes
}

/// Changes one to 64 sectors among those that hold anything.
fn damage_sectors(image: &Image, used: &[u64], random: &mut Random) -> Image {
    let mut image = image.clone();
    for _ in 0..1 << random.below(7) {
        let offset = used[random.below(used.len() as u64) as usize];
        let mut sector = [0; SECTOR_BYTES as usize];
        image.read(offset, &mut sector);
        match random.below(4) {
            0 => sector.fill(0),
            1 => random.0.fill_bytes(&mut sector),
            // A write that went to the wrong place.
            2 => image.read(used[random.below(used.len() as u64) as usize], &mut sector),
            _ => sector[random.below(SECTOR_BYTES) as usize] ^= 1 << random.below(8),
        }
        image.write(offset, &sector);
    }
    image
}

#[test]
fn sectors() {
    let image = made(&Coppice::default());
    let mut sector = [0; SECTOR_BYTES as usize];
    let used: Vec<u64> = (0..DEVICE_BYTES)
        .step_by(SECTOR_BYTES as usize)
        .filter(|&offset| {
            image.read(offset, &mut sector);
            sector.iter().any(|&byte| byte != 0)
        })
        .collect();
    assert!(used.len() > 1000, "{} sectors are in use", used.len());
    let (errors, original) = walk_and_read(&device_of(image.clone())).unwrap();
    assert!(errors.is_empty() && original.len() > 40, "{errors:?}");
    let outcomes = try_all("sectors", IMAGES, Some(original), |_, random| damage_sectors(&image, &used, random));
    assert!(outcomes.opened.load(Ordering::Relaxed) > 0 && outcomes.repaired.load(Ordering::Relaxed) > 0);
}

/// Damages one to 64 structures, each in all of its copies: what two copies do not help against. Every kind of structure is as likely as any other.
fn damage_structures(image: &Image, regions: &BTreeMap<&str, Vec<Region>>, random: &mut Random) -> Image {
    let mut image = image.clone();
    for _ in 0..1 << random.below(7) {
        let of_kind = regions.values().nth(random.below(regions.len() as u64) as usize).unwrap();
        let region = &of_kind[random.below(of_kind.len() as u64) as usize];
        let length = region.copies.iter().map(|copy| copy.end - copy.start).min().unwrap_or(0);
        let sector = random.below(length.div_ceil(SECTOR_BYTES)) * SECTOR_BYTES;
        let (kind, bit) = (random.below(2), random.below(8 * length.saturating_sub(sector).clamp(1, SECTOR_BYTES)));
        for copy in &region.copies {
            let offset = copy.start + sector;
            let mut bytes = [0; SECTOR_BYTES as usize];
            image.read(offset, &mut bytes);
            match kind {
                0 => bytes.fill(0),
                _ => bytes[(bit / 8) as usize] ^= 1 << (bit % 8),
            }
            image.write(offset, &bytes);
        }
    }
    image
}

#[test]
fn structures() {
    let image = made(&Coppice::default());
    let mut regions_of: BTreeMap<&str, Vec<Region>> = BTreeMap::new();
    for region in regions(&device_of(image.clone())).unwrap() {
        regions_of.entry(region.name).or_default().push(region);
    }
    assert!(regions_of.len() > 10, "{:?}", regions_of.keys());
    let (_, original) = walk_and_read(&device_of(image.clone())).unwrap();
    let outcomes =
        try_all("structures", IMAGES / 2, Some(original), |_, random| damage_structures(&image, &regions_of, random));
    assert!(outcomes.repaired.load(Ordering::Relaxed) > 0 && outcomes.rebuilt.load(Ordering::Relaxed) > 0);
}

/// Changes up to eight keys, under checksums that are right: what a hostile image, or a fault of ours, would hold.
fn damage_keys(transaction: &mut Transaction<'_>, random: &mut Random) -> Result<()> {
    for _ in 0..1 << random.below(4) {
        let btree = BtreeId::ALL[random.below(BtreeId::ALL.len() as u64) as usize];
        let keys = transaction.range(btree, Position::MIN, Position::MAX, 400)?;
        let Some((position, value)) = keys.get(random.below(keys.len() as u64) as usize) else { continue };
        let mut value = value.to_vec();
        match random.below(6) {
            0 => {
                transaction.delete(btree, *position);
                continue;
            }
            // To another place, or to a second one.
            1 => {
                let to = Position { offset: position.offset ^ 1 << random.below(64), ..*position };
                transaction.put(btree, to, value);
                continue;
            }
            2 => {
                let to = Position { inode: position.inode ^ 1 << random.below(64), ..*position };
                transaction.put(btree, to, value);
                transaction.delete(btree, *position);
                continue;
            }
            3 => value.truncate(random.below(value.len() as u64 + 1) as usize),
            _ => {
                for _ in 0..1 + random.below(3) {
                    if !value.is_empty() {
                        let at = random.below(value.len() as u64) as usize;
                        value[at] ^= 1 << random.below(8);
                    }
                }
            }
        }
        transaction.put(btree, *position, value);
    }
    Ok(())
}

/// The image with keys changed by a transaction that checks nothing.
fn with_keys(image: &Image, seed: u64, change: impl Fn(&mut Transaction<'_>) -> Result<()>) -> Image {
    let device = device_of(image.clone());
    let essential = OpenOptions { workers: WorkerSet::Essential, ..options() };
    let filesystem = Filesystem::open(vec![Arc::clone(&device) as _], &essential).unwrap();
    let raw = CommitOptions { raw: true, ..CommitOptions::default() };
    let changed = filesystem.transactions().run(raw, |transaction| change(transaction));
    changed.unwrap_or_else(|error| panic!("seed {seed}: cannot make the damage: {error}"));
    // The checkpoint at the end may meet the damage; then this is an image of a crash.
    if let Err(error) = filesystem.close() {
        assert!(error.is_media_error(), "seed {seed}: cannot close the damaged image: {error}");
    }
    device.image()
}

/// No node is lost by it, so nothing takes a rebuild.
fn assert_all_repaired(outcomes: &Outcomes) {
    let reasons = outcomes.reasons.lock().unwrap();
    assert!(reasons.is_empty() && outcomes.repaired.load(Ordering::Relaxed) > 0, "not repaired: {reasons:#?}");
}

#[test]
fn keys() {
    let image = made(&Coppice::default());
    let outcomes = try_all("keys", IMAGES, None, |seed, random| {
        // The body may run again: with the same choices.
        let state = random.0.clone();
        with_keys(&image, seed, |transaction| damage_keys(transaction, &mut Random(state.clone())))
    });
    assert_all_repaired(&outcomes);
}

/// Number and size of files with data in extents.
fn large_files(transaction: &mut Transaction<'_>) -> Result<Vec<(u64, u64)>> {
    let inodes = transaction.range(BtreeId::Inodes, Position::MIN, Position::MAX, 400)?;
    let decoded = inodes.iter().filter_map(|(position, value)| Some((position.inode, Inode::decode(value).ok()?)));
    let files = decoded.filter(|(_, inode)| inode.file_type() == Some(FileType::Regular) && inode.link_count > 0);
    Ok(files.map(|(number, inode)| (number, inode.size)).filter(|(_, size)| *size > 20_000).collect())
}

/// A note of a deletion that names a file which has a name, by its place or by its inode: the mount deleted the data before it looked at the file.
#[test]
fn a_wrong_note_of_a_deletion_costs_no_data() {
    let _limit = Limit::new();
    let subject = Coppice::default();
    let intact = made(&subject);
    let (_, original) = walk_and_read(&device_of(intact.clone())).unwrap();
    let image = with_keys(&intact, 0, |transaction| {
        for (number, (inode, _)) in (0..2).zip(large_files(transaction)?) {
            transaction.put(BtreeId::Orphans, Position::new(number, inode, u32::MAX), Vec::new());
        }
        Ok(())
    });
    let device = device_of(image);
    let env = Env::simulated(1);
    let mounting = OpenOptions { env: Some(Arc::clone(&env)), ..options() };
    let filesystem = Filesystem::open(vec![Arc::clone(&device) as _], &mounting).unwrap();
    filesystem.vfs().wait_for_deletions().unwrap();
    filesystem.close().unwrap();
    env.unregister_all();
    drop(filesystem);
    let problems = subject.check(&device).unwrap();
    let ids: Vec<_> = problems.iter().filter_map(|problem| problem.split(':').next()).collect();
    assert_eq!(ids, ["orphan-linked", "key-undecodable"], "{problems:?}");
    let outcome = repair_all(&[Arc::clone(&device) as _], &options()).unwrap();
    assert!(outcome.losses.is_empty() && outcome.left.is_empty(), "{outcome:?}");
    let (errors, contents) = walk_and_read(&device).unwrap();
    assert!(errors.is_empty() && contents.len() == original.len(), "{errors:?}");
    assert_content(0, "after a mount", &original, &contents);
    assert_eq!(subject.check(&device).unwrap(), Vec::<String>::new());
}

/// Keys that call the superblock, the journal and what lies behind the end of the device free: nothing is written there, nor given back to the host.
#[test]
fn what_is_no_bucket_is_never_handed_out() {
    let _limit = Limit::new();
    let subject = Coppice::default();
    let image = made(&subject);
    let superblock = superblock::read(&*device_of(image.clone())).unwrap().superblock;
    let image = with_keys(&image, 0, |transaction| {
        let count = superblock.members.first().map_or(0, |member| member.bucket_count);
        for bucket in (0..count + 9).filter(|bucket| *bucket >= count || superblock.is_reserved(0, *bucket)) {
            let free = FreeBucket { discarded: false };
            transaction.put(BtreeId::FreeSpace, Position::new(0, bucket, 0), free.encode());
        }
        Ok(())
    });
    let device = device_of(image);
    let mut mounted = subject.mount(&device, 1).unwrap();
    for file in 0..40 {
        let path = format!("/new{file}");
        mounted.perform(&Operation::Create { path: path.clone(), mode: 0o644 }).unwrap();
        mounted.perform(&Operation::Write { path, offset: 0, length: 70_000, tag: file }).unwrap();
        mounted.perform(&Operation::Settle).unwrap();
    }
    mounted.perform(&Operation::Sync).unwrap();
    mounted.unmount().unwrap();
    let found = superblock::read(&*device).unwrap();
    assert!(found.stale_copies.is_empty(), "{:?}", found.stale_copies);
    let problems = subject.check(&device).unwrap();
    let strays = problems.iter().filter(|problem| problem.starts_with("index-key-stray")).count();
    assert!(strays > 9 && strays == problems.len(), "{problems:#?}");
    let outcome = repair_all(&[Arc::clone(&device) as _], &options()).unwrap();
    assert!(outcome.losses.is_empty() && outcome.left.is_empty(), "{outcome:?}");
    assert_eq!(walk(&device).unwrap().len(), 0);
    assert_eq!(subject.check(&device).unwrap(), Vec::<String>::new());
}

/// Ways to damage one key.
const WAYS: u64 = 9;

fn damage_key(transaction: &mut Transaction<'_>, btree: BtreeId, position: Position, value: &[u8], way: u64) {
    let value = match way {
        0 => return transaction.delete(btree, position),
        1 | 2 => {
            let away = if way == 1 {
                Position { offset: position.offset ^ 1 << 33, ..position }
            } else {
                Position { inode: position.inode ^ 1 << 20, snapshot: position.snapshot ^ 1, ..position }
            };
            transaction.put(btree, away, value.to_vec());
            return transaction.delete(btree, position);
        }
        // A second one.
        3 => return transaction.put(btree, Position { offset: position.offset ^ 64, ..position }, value.to_vec()),
        4 => Vec::new(),
        5 => value.split_last().map_or_else(Vec::new, |(_, rest)| rest.to_vec()),
        6 => [value, &[1]].concat(),
        7 => vec![0xff; value.len().max(1)],
        _ => value.iter().enumerate().map(|(index, byte)| byte ^ u8::from(index < 2)).collect(),
    };
    transaction.put(btree, position, value);
}

/// Each key of each tree, damaged in each way, alone: all of it is repaired. `COPPICE_FUZZ_KEYS` (2) is of how many keys of each tree.
#[test]
fn every_key_of_every_tree() {
    let subject = Coppice::default();
    let image = with_keys(&made(&subject), 0, |transaction| {
        // As it is after a crash in a long truncation, and in a long hole.
        let mut files = large_files(transaction)?.into_iter();
        for number in 0..2 {
            let Some((inode, size)) = files.next() else { break };
            let operation = if number == 0 {
                LoggedOperation::Truncate { inode, size }
            } else {
                LoggedOperation::Replace { inode, start: 4096, end: 8192, unwritten: false }
            };
            transaction.put(BtreeId::LoggedOperations, Position::new(0, inode, 0), operation.encode()?);
        }
        Ok(())
    });
    let mut keys = Vec::new();
    {
        let reading = OpenOptions { read_only: true, workers: WorkerSet::Essential, ..options() };
        let filesystem = Filesystem::open(vec![device_of(image.clone()) as _], &reading).unwrap();
        for btree in BtreeId::ALL {
            let all = filesystem.transactions().read().range(btree, Position::MIN, Position::MAX, 4000).unwrap();
            assert!(!all.is_empty() || btree == BtreeId::NeedDiscard, "the {} tree has no key", btree.name());
            let wanted = usize::try_from(count("COPPICE_FUZZ_KEYS", 2)).unwrap().max(1);
            let step = all.len().div_ceil(wanted).max(1);
            keys.extend(all.into_iter().rev().step_by(step).map(|(position, value)| (btree, position, value)));
        }
        filesystem.close().unwrap();
    }
    println!("{} keys", keys.len());
    let outcomes = try_all("every key", keys.len() as u64 * WAYS, None, |seed, _| {
        let (btree, position, value) = &keys[usize::try_from((seed - 1) / WAYS).unwrap() % keys.len()];
        let way = (seed - 1) % WAYS;
        let damaged = with_keys(&image, seed, |transaction| {
            damage_key(transaction, *btree, *position, value, way);
            Ok(())
        });
        // A mount does not come up with what it cannot be sure of, and says what helps.
        if matches!(btree, BtreeId::Subvolumes | BtreeId::Snapshots | BtreeId::LoggedOperations)
            && let Err(error) = walk(&device_of(damaged.clone()))
        {
            assert!(error.to_string().contains("`fsck.coppice -y` repairs it"), "seed {seed}: {error}");
        }
        damaged
    });
    assert_all_repaired(&outcomes);
}
