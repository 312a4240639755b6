//! Rescue, with the real programs: the previous checkpoint in place of a damaged one.

use std::fs;
use std::sync::Arc;

use coppicefs::device::{BlockDevice, MemDevice};
use coppicefs::env::Env;
use coppicefs::filesystem::format::test_geometry;
use coppicefs::filesystem::{Filesystem, OpenOptions, WorkerSet};
use coppicefs::format::BtreeId;
use coppicefs::journal::{JournalConfig, holds_log_of};
use coppicefs::vfs::Caller;
use coppicefs_tests::damage::Target;
use coppicefs_tests::limit::{Limit, finish};
use coppicefs_tests::mount::Site;

/// Directories of files with known content, some changed again in each round, each round with a checkpoint of its own.
fn populated(rounds: u32) -> Option<Site> {
    let site = Site::formatted("64M", &[])?;
    for round in 0..rounds {
        site.mount("");
        for number in 0..30 {
            if round == 0 || number % 3 == round % 3 {
                let folder = site.mnt().join(format!("folder{}", number % 5));
                fs::create_dir_all(&folder).unwrap();
                fs::write(folder.join(format!("file{number}")), content(round, number)).unwrap();
            }
        }
        site.unmount();
    }
    Some(site)
}

fn content(round: u32, number: u32) -> Vec<u8> {
    format!("round {round} file {number};").into_bytes().repeat(20 + 300 * number as usize)
}

fn assert_present_state(site: &Site, rounds: u32) {
    for number in 0..30 {
        let last = (0..rounds).rev().find(|round| *round == 0 || number % 3 == round % 3).unwrap();
        let path = site.mnt().join(format!("folder{}/file{number}", number % 5));
        assert!(fs::read(&path).unwrap() == content(last, number), "{}", path.display());
    }
}

/// The newest checkpoint's record, a root: each destroyed in all copies. (A map's pages are those of the checkpoint before, where no node has moved.)
#[test]
fn the_previous_checkpoint_gives_the_present_state() {
    const ROUNDS: u32 = 4;
    let Some(site) = populated(ROUNDS) else { return };
    let intact = fs::read(site.image()).unwrap();
    for part in ["record", "root of the inodes", "root of the extents"] {
        fs::write(site.image(), &intact).unwrap();
        let newest = {
            let target = Target::open(&site.image());
            let checkpoints = target.checkpoints();
            match part {
                "record" => target.destroy_record(checkpoints[0].number),
                "root of the inodes" => target.destroy_node(&target.root(&checkpoints[0], BtreeId::Inodes)),
                _ => target.destroy_node(&target.root(&checkpoints[0], BtreeId::Extents)),
            }
            checkpoints[0].number
        };
        // A lost record looks like a power cut while it was written; the rest is damage.
        let check = finish(site.coppice(&["fsck", "-n"]).arg(site.image())).unwrap();
        let said = String::from_utf8_lossy(&check.stdout).into_owned() + &String::from_utf8_lossy(&check.stderr);
        assert_eq!(check.status.code(), Some(if part == "record" { 0 } else { 4 }), "{part}: {said}");
        let warning = format!("checkpoint {newest} cannot be used");
        assert!(said.contains(&warning) && said.contains("is used instead"), "{part}: {said}");
        assert_eq!(said.contains("checkpoint-damaged"), part != "record", "{part}: {said}");

        fs::write(site.path("log"), "").unwrap();
        site.mount("ro");
        assert_present_state(&site, ROUNDS);
        site.remount("");
        assert_present_state(&site, ROUNDS);
        let log = site.log();
        assert!(log.contains("WARN") && log.contains(&warning), "{part}: {log}");
        site.unmount_and_check();
        site.mount("");
        assert_present_state(&site, ROUNDS);
        site.unmount();
    }

    // fsck repairs it alone, and says so.
    fs::write(site.image(), &intact).unwrap();
    {
        let target = Target::open(&site.image());
        target.destroy_node(&target.root(&target.checkpoints()[0], BtreeId::Inodes));
    }
    let repaired = finish(site.coppice(&["fsck", "-y"]).arg(site.image())).unwrap();
    let said = String::from_utf8_lossy(&repaired.stdout).into_owned();
    assert_eq!(repaired.status.code(), Some(1), "{said}");
    assert!(said.contains("checkpoint-damaged"), "{said}");
    let again = finish(site.coppice(&["fsck", "-n"]).arg(site.image())).unwrap();
    let said = String::from_utf8_lossy(&again.stderr).into_owned();
    assert!(again.status.code() == Some(0) && !said.contains("cannot be used"), "{said}");
    site.mount("");
    assert_present_state(&site, ROUNDS);
    site.unmount();
}

/// The one before the newest is lost, and the one before that is long no longer kept: its place in the journal is others'. It was taken for the
/// older kept one, and the journal then began to overwrite what the newest needs.
#[test]
fn a_checkpoint_whose_journal_is_gone_is_not_kept() {
    const CALLER: Caller = Caller { uid: 0, gid: 0, pid: 1, umask: 0o022 };
    let _limit = Limit::new();
    let memory = Arc::new(MemDevice::new(64 << 20));
    let device: Arc<dyn BlockDevice> = Arc::clone(&memory) as _;
    let env = Env::simulated(1);
    Filesystem::format(&device, &test_geometry(), &env).unwrap();
    let open = |device: Arc<dyn BlockDevice>| {
        let options = OpenOptions {
            workers: WorkerSet::Essential,
            cache_bytes: 16 << 20,
            env: Some(Env::simulated(1)),
            ..OpenOptions::default()
        };
        Filesystem::open(vec![device], &options).unwrap()
    };
    let filesystem = open(Arc::clone(&device));
    let config = JournalConfig::new(filesystem.superblock(), vec![Arc::clone(&device)], None);
    let reader = coppicefs::btree::NodeReader::new(
        Arc::new(filesystem.superblock().clone()),
        vec![Arc::clone(&device)],
        Arc::clone(filesystem.metrics()),
    );
    for round in 0..4_u64 {
        for number in 0..8 {
            let name = format!("{round}.{number}");
            filesystem.vfs().mkdir(&CALLER, 1, std::ffi::OsStr::new(&name), 0o755).unwrap();
        }
        filesystem.journal().flush(filesystem.journal().newest()).unwrap();
        filesystem.checkpoint().unwrap();
    }
    let checkpoints = reader.checkpoints();
    assert!(checkpoints[2].first_replay < checkpoints[0].first_replay && holds_log_of(&config, &checkpoints[2]));
    // Power is cut, the record of the older kept one is lost, and where the log of the one before it began, later records are.
    let image = memory.image();
    drop(filesystem);
    let after: Arc<dyn BlockDevice> = Arc::new(MemDevice::from_image(image, false));
    let bucket_bytes = u64::from(config.bucket_bytes);
    let superblock = coppicefs::recovery::superblock::read(&*after).unwrap().superblock;
    for area in &superblock.layout.checkpoints {
        let slot = checkpoints[1].number % coppicefs::format::checkpoint::RECORD_SLOTS;
        let at = area.first * bucket_bytes + slot * coppicefs::format::checkpoint::RECORD_SLOT_BYTES as u64;
        after.write(at, &[0x5a; 4096]).unwrap();
    }
    for ring in &superblock.layout.journal {
        after.write(ring.first * bucket_bytes + checkpoints[2].first_replay_offset, &[0x5a; 4096]).unwrap();
    }
    let filesystem = open(after);
    assert_eq!(filesystem.opening().newest.number, checkpoints[0].number);
    assert_eq!(filesystem.opening().previous.as_ref().map(|older| older.number), None);
    filesystem.close().unwrap();
}
