//! Scrub: metadata with one bad copy heals, damaged data is named with its path and range, and all that beside a load, with cancel and resume.
//!
//! `COPPICE_SCRUB_IMAGES` (40) is how many images lose a block of metadata, `COPPICE_SEED` the first one's seed.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use coppicefs::device::{BlockDevice, Image, MemDevice};
use coppicefs::env::Env;
use coppicefs::filesystem::format::test_geometry;
use coppicefs::filesystem::{Filesystem, OpenOptions, WorkerSet};
use coppicefs::format::namespace::{FileType, Inode};
use coppicefs::format::{BtreeId, Position};
use coppicefs::units::InodeNumber;
use coppicefs::vfs::{
    Caller, ScrubAsk, ScrubControl, ScrubReport, ScrubRequest, ScrubState, ScrubStatus, WriteRequest,
};
use coppicefs_fsck::check;
use coppicefs_tests::crash::seed_or;
use coppicefs_tests::damage::Target;
use coppicefs_tests::limit::{Limit, finish};
use coppicefs_tests::mount::{Site, assert_refused, count, run, wait_until};
use coppicefs_tests::regions::metadata_blocks;
use coppicefs_tests::simulated::device_of;
use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};

const CALLER: Caller = Caller { uid: 0, gid: 0, pid: 1, umask: 0o022 };
const BLOCK: u64 = 4096;

fn open(device: Arc<dyn BlockDevice>) -> coppicefs::Result<Arc<Filesystem>> {
    let options = OpenOptions { workers: WorkerSet::Essential, cache_bytes: 16 << 20, ..OpenOptions::default() };
    Filesystem::open(vec![device], &options)
}

/// A tree with data inline and in extents; closed in order, or with a journal that the next mount replays.
fn made(is_closed: bool) -> Image {
    let memory = Arc::new(MemDevice::new(32 << 20));
    let device: Arc<dyn BlockDevice> = Arc::clone(&memory) as _;
    Filesystem::format(&device, &test_geometry(), &Env::real()).unwrap();
    let filesystem = open(device).unwrap();
    let vfs = filesystem.vfs();
    for folder in 0..8_u32 {
        let made = vfs.mkdir(&CALLER, 1, OsStr::new(&format!("folder {folder}")), 0o755).unwrap().attributes.node;
        for file in 0..40_u32 {
            let name = format!("file {file} of {folder}");
            let (entry, opened) = vfs.create(&CALLER, made, OsStr::new(&name), 0o644, 2).unwrap();
            let node = entry.attributes.node;
            let data = format!("{name};").into_bytes().repeat(1 + 40 * (file as usize % 20));
            let request = WriteRequest::new(node, opened.handle, 0, &data);
            vfs.write(&CALLER, &request).unwrap();
            vfs.set_xattr(&CALLER, node, OsStr::new("user.number"), name.as_bytes(), 0).unwrap();
            vfs.release(node, opened.handle).unwrap();
        }
        filesystem.sync().unwrap();
        if folder == 4 {
            filesystem.checkpoint().unwrap();
        }
    }
    if is_closed {
        filesystem.close().unwrap();
        return memory.image();
    }
    let image = memory.image();
    filesystem.close().unwrap();
    image
}

/// All keys that users see, and the bytes of all files.
fn everything(filesystem: &Filesystem) -> BTreeMap<(BtreeId, Position), Vec<u8>> {
    let mut found = BTreeMap::new();
    for btree in [BtreeId::Inodes, BtreeId::Dirents, BtreeId::Xattrs] {
        let mut cursor = Some(Position::MIN);
        while let Some(from) = cursor {
            let scan = filesystem.forest().scan(btree, from, Position::MAX, 1000).unwrap();
            cursor = scan.covered_to.successor();
            found.extend(scan.keys.into_iter().map(|(position, value)| ((btree, position), value.to_vec())));
        }
    }
    let inodes: Vec<_> = found
        .iter()
        .filter(|((btree, _), _)| *btree == BtreeId::Inodes)
        .map(|((_, at), value)| (*at, value.clone()))
        .collect();
    for (position, value) in inodes {
        let inode = Inode::decode(&value).unwrap();
        if inode.file_type() == Some(FileType::Regular) {
            let mut bytes = vec![0; usize::try_from(inode.size.next_multiple_of(BLOCK)).unwrap()];
            let mut pieces = [coppicefs::data::ReadPiece { offset: 0, buffer: &mut bytes }];
            filesystem.data().read(InodeNumber(position.inode), &mut pieces, &mut |_, outcome| outcome.unwrap());
            found.insert((BtreeId::Extents, position), bytes);
        }
    }
    found
}

fn ask(filesystem: &Filesystem, ask: ScrubAsk, cursor: u64) -> coppicefs::vfs::ScrubPage {
    filesystem.scrub().control(ScrubRequest { ask, cursor }).unwrap()
}

/// Scrubs to the end.
fn scrub(filesystem: &Filesystem) -> (ScrubStatus, Vec<ScrubReport>) {
    ask(filesystem, ScrubAsk::Start { restart: true, rate_bytes: 0 }, 0);
    wait_until("the scrub has ended", || ask(filesystem, ScrubAsk::Status, 0).status.state != ScrubState::Running);
    let page = ask(filesystem, ScrubAsk::Status, 0);
    assert_eq!(page.status.state, ScrubState::Done, "{page:?}");
    (page.status, page.findings)
}

/// Of images with one block of metadata destroyed and two copies: all open, all files are intact, and one scrub heals them.
#[test]
fn metadata_with_one_bad_copy_heals() {
    let _limit = Limit::new();
    let images = count("COPPICE_SCRUB_IMAGES", 40);
    let bases: Vec<_> = [true, false]
        .into_iter()
        .map(|is_closed| {
            let image = made(is_closed);
            let blocks = metadata_blocks(&device_of(image.clone())).unwrap();
            let filesystem = open(Arc::new(MemDevice::from_image(image.clone(), false))).unwrap();
            let content = everything(&filesystem);
            filesystem.close().unwrap();
            assert!(blocks.len() > 100 && content.len() > 900, "{} blocks, {} keys", blocks.len(), content.len());
            (image, blocks, content)
        })
        .collect();
    let seed = seed_or(1);
    let (next, found_bad) = (AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= images {
                        break;
                    }
                    let _limit = Limit::new();
                    let (image, blocks, content) = &bases[usize::try_from(number % 2).unwrap()];
                    found_bad.fetch_add(heals(image, blocks, content, seed + number), Ordering::Relaxed);
                }
            });
        }
    });
    let found_bad = found_bad.load(Ordering::Relaxed);
    eprintln!(
        "{images} images with one block of metadata destroyed: all opened, all intact, all healed by one scrub ({found_bad} by the scrub alone)"
    );
    // The rest was healed by opening, or nobody needs it: the journal, and nodes that were read.
    assert!(found_bad * 3 > images, "{found_bad} of {images}");
}

/// Returns 1 if the scrub had something to heal.
fn heals(image: &Image, blocks: &[u64], content: &BTreeMap<(BtreeId, Position), Vec<u8>>, seed: u64) -> u64 {
    let mut random = Xoshiro256PlusPlus::seed_from_u64(seed);
    let block = blocks[usize::try_from(random.next_u64() % blocks.len() as u64).unwrap()];
    let memory = Arc::new(MemDevice::from_image(image.clone(), false));
    let mut garbage = vec![0; BLOCK as usize];
    if !seed.is_multiple_of(3) {
        random.fill_bytes(&mut garbage);
    }
    memory.write(block, &garbage).unwrap();
    let say = format!("seed {seed}, block at {block}");
    let filesystem = open(Arc::clone(&memory) as _).unwrap_or_else(|error| panic!("{say}: {error}"));
    assert!(everything(&filesystem) == *content, "{say}: not all files are intact");
    let (status, findings) = scrub(&filesystem);
    assert_eq!(status.damaged, 0, "{say}: {findings:?}");
    filesystem.close().unwrap();

    let filesystem = open(Arc::clone(&memory) as _).unwrap();
    let (again, findings) = scrub(&filesystem);
    assert_eq!((again.damaged, again.repaired), (0, 0), "{say}: after one scrub: {findings:?}");
    assert!(again.nodes > 20 && again.copies > again.nodes, "{again:?}");
    let report = check(&filesystem, &|_, _, _, _| {}).unwrap();
    assert!(report.is_clean(), "{say}: {:?}", report.problems);
    assert!(everything(&filesystem) == *content, "{say}: after the scrub");
    filesystem.close().unwrap();
    u64::from(status.repaired > 0)
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn json(output: &Output) -> serde_json::Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", said(output)))
}

/// Starts a program that is looked at while it runs.
fn started(command: &mut Command) -> std::process::Child {
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn fill(folder: &Path, files: u32, bytes: usize) {
    for file in 0..files {
        fs::write(folder.join(format!("file {file}")), format!("<{file}>").into_bytes().repeat(bytes / 4)).unwrap();
    }
}

/// On an image and on a mount: a node heals, a block of data is named; exit codes.
#[test]
fn damage_is_named_and_healed_on_images_and_mounts() {
    let Some(site) = Site::formatted("64M", &[]) else { return };
    site.mount("");
    fs::create_dir(site.mnt().join("a folder")).unwrap();
    fill(&site.mnt().join("a folder"), 60, 100_000);
    site.unmount();
    let scrub =
        |on: &Path, options: &[&str]| finish(site.coppice(&["scrub", "-q", "--json"]).args(options).arg(on)).unwrap();
    let clean = scrub(&site.image(), &[]);
    assert_eq!(clean.status.code(), Some(0), "{}", said(&clean));
    assert!(json(&clean)["data_bytes"].as_u64().unwrap() > 5_000_000, "{}", said(&clean));

    let break_nodes = || {
        let target = Target::open(&site.image());
        let newest = target.checkpoints().remove(0);
        for (index, (.., node)) in target.nodes(&newest).iter().enumerate() {
            target.destroy_copy(node, &node.copies[index % 2]);
        }
    };
    break_nodes();
    let healed = scrub(&site.image(), &[]);
    assert_eq!(healed.status.code(), Some(1), "{}", said(&healed));
    let again = scrub(&site.image(), &[]);
    assert_eq!(again.status.code(), Some(0), "{}", said(&again));
    site.assert_clean();

    break_nodes();
    site.mount("");
    let mounted_elsewhere = finish(site.coppice(&["scrub"]).arg(site.image())).unwrap();
    assert_eq!(mounted_elsewhere.status.code(), Some(8));
    assert!(said(&mounted_elsewhere).contains("mounted at"), "{}", said(&mounted_elsewhere));
    let healed = scrub(&site.mnt(), &[]);
    assert_eq!(healed.status.code(), Some(1), "{}", said(&healed));
    let again = scrub(&site.mnt(), &[]);
    assert_eq!(again.status.code(), Some(0), "{}", said(&again));
    site.unmount_noisily();
    site.assert_clean();

    // Data has one copy.
    let (inode, start) = {
        let target = Target::open(&site.image());
        let newest = target.checkpoints().remove(0);
        let (key, offset, length) = target.data(&newest).into_iter().find(|(_, _, length)| *length > 20_000).unwrap();
        target.destroy(offset + 8192, 4096);
        (key.inode, key.offset - u64::from(length) + 8192)
    };
    let check_found = |output: &Output| {
        assert_eq!(output.status.code(), Some(4), "{}", said(output));
        let report = json(output);
        let found = report["findings"].as_array().unwrap();
        assert_eq!(found.len(), 1, "{report}");
        assert!(found[0]["path"].as_str().unwrap().starts_with("/a folder/file "), "{report}");
        assert_eq!(
            (found[0]["inode"].as_u64(), found[0]["start"].as_u64(), found[0]["end"].as_u64()),
            (Some(inode), Some(start), Some(start + 4096))
        );
    };
    check_found(&scrub(&site.image(), &[]));
    site.mount("");
    check_found(&scrub(&site.mnt(), &[]));
    let status = scrub(&site.mnt(), &["--status"]);
    check_found(&status);
    let words = finish(site.coppice(&["scrub", "--status"]).arg(site.mnt())).unwrap();
    assert!(said(&words).contains(&format!("bytes {start} to {} cannot be read", start + 4096)), "{}", said(&words));
    site.unmount_noisily();
    // Read-only: it is looked at all the same.
    site.mount("ro");
    check_found(&scrub(&site.mnt(), &[]));
    site.unmount_noisily();
}

/// Beside writers: nothing false is found. Cancelled, it goes on where it stopped.
#[test]
fn a_scrub_beside_a_load_finds_nothing_and_can_be_cancelled() {
    let Some(site) = Site::formatted("128M", &[]) else { return };
    site.mount("");
    fill(&site.mnt(), 120, 200_000);
    site.sync();
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for writer in 0..2_u64 {
            let (site, is_over) = (&site, &is_over);
            scope.spawn(move || {
                let mut random = Xoshiro256PlusPlus::seed_from_u64(writer);
                while !is_over.load(Ordering::Relaxed) {
                    let number = random.next_u64() % 60;
                    let path = site.mnt().join(format!("file {number}"));
                    match random.next_u64() % 6 {
                        0 => drop(fs::remove_file(&path)),
                        1 => drop(fs::rename(&path, site.mnt().join(format!("file {}", random.next_u64() % 60)))),
                        2 => {
                            drop(fs::create_dir_all(site.mnt().join(format!("d{writer}/{}", random.next_u64() % 500))))
                        }
                        _ => {
                            let file =
                                fs::File::options().write(true).create(true).truncate(false).open(&path).unwrap();
                            file.write_all_at(&vec![1 + number as u8; 60_000], random.next_u64() % 150_000).unwrap();
                            if number % 5 == 0 {
                                file.sync_all().unwrap();
                            }
                        }
                    }
                }
            });
        }
        for _ in 0..3 {
            let output = finish(site.coppice(&["scrub", "--restart", "--json", "-q"]).arg(site.mnt())).unwrap();
            if output.status.code() != Some(0) {
                is_over.store(true, Ordering::Relaxed);
                panic!("{}", said(&output));
            }
        }
        is_over.store(true, Ordering::Relaxed);
    });

    // Slowly, so that it can be caught at work.
    let mut slow = started(site.coppice(&["scrub", "--restart", "--rate", "2M", "-q", "--json"]).arg(site.mnt()));
    let state = || json(&finish(site.coppice(&["scrub", "--status", "--json"]).arg(site.mnt())).unwrap());
    wait_until("some of it is read", || {
        let now = state();
        now["state"] == "running" && now["phase"] == "data" && now["data_bytes"].as_u64().unwrap() > 0
    });
    let second = finish(site.coppice(&["scrub"]).arg(site.mnt())).unwrap();
    assert_eq!(second.status.code(), Some(8));
    assert_refused(&second, &["running", "--cancel"]);
    run(site.coppice(&["scrub", "--cancel"]).arg(site.mnt()));
    let outcome = slow.wait().unwrap();
    assert_eq!(outcome.code(), Some(8), "who waited for it is told");
    let cancelled = state();
    assert_eq!(cancelled["state"], "cancelled", "{cancelled}");
    let read_before = cancelled["bytes"].as_u64().unwrap();
    let resumed = finish(site.coppice(&["scrub", "--json", "-q"]).arg(site.mnt())).unwrap();
    let report = json(&resumed);
    assert!(resumed.status.code() == Some(0) && report["resumed"] == true && report["state"] == "done", "{report}");
    assert!(report["bytes"].as_u64().unwrap() > read_before, "{report}");

    // An interruption is a cancellation.
    let slow = started(site.coppice(&["scrub", "--rate", "1M", "-q"]).arg(site.mnt()));
    wait_until("it runs", || state()["state"] == "running");
    let pid = rustix::process::Pid::from_raw(i32::try_from(slow.id()).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    assert_eq!(slow.wait_with_output().unwrap().status.code(), Some(8));
    assert_eq!(state()["state"], "cancelled");
    site.unmount_and_check();
}
