//! What is promised across a crash: fsync, names of new files, rename over an existing file, order.

use super::*;

fn content(mount: &Mount, name: &str) -> Option<Vec<u8>> {
    let node = mount.lookup(ROOT, name)?;
    let handle = mount.open_file(node);
    let size = mount.attributes(node).size_bytes;
    Some(mount.read((node, handle), 0, size as u32).unwrap())
}

#[test]
fn fsync_of_a_new_file_makes_its_name_durable() {
    let mut mount = Mount::simulated(1);
    let directory = mount.mkdir(ROOT, "d");
    let file = mount.create(directory, "f");
    mount.write(file, 0, &[3; 5000]).unwrap();
    mount.vfs().fsync(&USER, file.0, file.1, true).unwrap();
    mount.create(ROOT, "not synced");
    mount.crash();
    let directory = mount.lookup(ROOT, "d").unwrap();
    let node = mount.lookup(directory, "f").unwrap();
    assert_eq!(mount.read((node, mount.open_file(node)), 0, 9000).unwrap(), [3; 5000]);
}

#[test]
fn unsynced_data_does_not_lengthen_a_file_with_zeros() {
    let mut mount = Mount::simulated(2);
    let file = mount.create(ROOT, "f");
    mount.write(file, 0, &[1; 1000]).unwrap();
    mount.vfs().fsync(&USER, file.0, file.1, false).unwrap();
    mount.write(file, 1000, &[2; 100_000]).unwrap();
    // A commit of attributes must not carry the new size without the data.
    mount
        .vfs()
        .set_attributes(&USER, file.0, &SetAttributes { mode: Some(0o600), ..SetAttributes::default() })
        .unwrap();
    mount.vfs().fsyncdir(&USER, ROOT, 0, false).unwrap();
    let journal = mount.filesystem.as_ref().unwrap().journal().clone();
    journal.flush(journal.newest()).unwrap();
    mount.crash();
    let found = content(&mount, "f").unwrap();
    assert_eq!(found[..1000], [1; 1000]);
    assert!(found[1000..].iter().all(|&byte| byte == 2), "zeros that were never written");
    assert_eq!(mount.attributes(mount.lookup(ROOT, "f").unwrap()).permissions, 0o600);
}

#[test]
fn rename_over_a_file_brings_its_data() {
    for exchange in [0, 2] {
        let mut mount = Mount::simulated(3);
        let old = mount.create(ROOT, "f");
        mount.write(old, 0, b"old").unwrap();
        mount.vfs().fsync(&USER, old.0, old.1, false).unwrap();
        let new = mount.create(ROOT, "f.new");
        mount.write(new, 0, &[9; 50_000]).unwrap();
        mount.vfs().rename(&USER, ROOT, OsStr::new("f.new"), ROOT, OsStr::new("f"), exchange).unwrap();
        let journal = mount.filesystem.as_ref().unwrap().journal().clone();
        journal.flush(journal.newest()).unwrap();
        mount.crash();
        assert_eq!(content(&mount, "f").unwrap(), [9; 50_000]);
        assert_eq!(content(&mount, "f.new"), if exchange == 2 { Some(b"old".to_vec()) } else { None });
    }
}

#[test]
fn truncation_leaves_no_old_bytes() {
    let mut mount = Mount::simulated(4);
    let file = mount.create(ROOT, "f");
    mount.write(file, 0, &[1; 20_000]).unwrap();
    mount.vfs().fsync(&USER, file.0, file.1, false).unwrap();
    mount.truncate(file.0, 5000).unwrap();
    mount.vfs().fsync(&USER, file.0, file.1, false).unwrap();
    mount.crash();
    let node = mount.lookup(ROOT, "f").unwrap();
    mount.truncate(node, 20_000).unwrap();
    let found = content(&mount, "f").unwrap();
    assert_eq!(found[..5000], [1; 5000]);
    assert!(found[5000..].iter().all(|&byte| byte == 0));
}

#[test]
fn a_size_survives_when_its_last_block_is_punched_or_cut() {
    let mut mount = Mount::simulated(5);
    let punched = mount.create(ROOT, "punched");
    mount.write(punched, 0, &[1; 10_000]).unwrap();
    mount.vfs().fallocate(&USER, punched.0, punched.1, 0, 16_384, 3).unwrap();
    let cut = mount.create(ROOT, "cut");
    mount.write(cut, 8000, &[1; 4000]).unwrap();
    mount.truncate(cut.0, 3000).unwrap();
    for file in [punched, cut] {
        mount.vfs().fsync(&USER, file.0, file.1, false).unwrap();
    }
    mount.crash();
    assert_eq!(content(&mount, "punched").unwrap(), [0; 10_000]);
    assert_eq!(content(&mount, "cut").unwrap(), [0; 3000]);
}

#[test]
fn delayed_data_is_written_back_in_time() {
    let mut mount = Mount::simulated(6);
    let file = mount.create(ROOT, "f");
    mount.write(file, 0, &[4; 30_000]).unwrap();
    run_workers_for(&mount, Duration::from_secs(20));
    mount.crash();
    assert_eq!(content(&mount, "f").unwrap(), [4; 30_000]);
}

/// `sync(2)` never reaches a FUSE daemon: what it promises, `commit=` seconds keep. Writeback used to start only after five seconds,
/// and its record then waited for the interval once more.
#[test]
fn all_is_durable_within_the_commit_interval() {
    for interval in [Duration::from_secs(1), Duration::from_secs(4)] {
        let options = OpenOptions { commit_interval: interval, ..OpenOptions::default() };
        let mut mount = Mount::with(Env::simulated(16), 48 << 20, options);
        // Not at the beginning of anybody's period.
        let file = mount.create(ROOT, "early");
        mount.write(file, 0, &[1; 9000]).unwrap();
        run_workers_for(&mount, interval / 5);
        for index in 0..8_u8 {
            let file = mount.create(ROOT, &format!("f{index}"));
            mount.write(file, 0, &[index; 30_000]).unwrap();
        }
        run_workers_for(&mount, interval);
        mount.crash();
        assert_eq!(content(&mount, "early").unwrap(), [1; 9000]);
        for index in 0..8_u8 {
            assert_eq!(content(&mount, &format!("f{index}")).unwrap(), [index; 30_000], "within {interval:?}");
        }
    }
}

/// Steps workers until so much simulated time has passed.
fn run_workers_for(mount: &Mount, time: Duration) {
    let until = mount.env.monotonic() + time;
    while mount.env.monotonic() < until {
        if !mount.env.step_random_worker().unwrap() && !mount.env.advance_clock() {
            break;
        }
    }
}

#[test]
fn the_sync_ioctl_makes_everything_durable() {
    let mut mount = Mount::simulated(7);
    for index in 0..20 {
        let file = mount.create(ROOT, &format!("f{index}"));
        mount.write(file, 0, &[index as u8; 3000]).unwrap();
    }
    let request =
        IoctlRequest { node: ROOT, handle: 0, directory: true, command: IOCTL_SYNC, input: &[], output_bytes_max: 0 };
    mount.vfs().ioctl(&USER, &request).unwrap();
    mount.crash();
    for index in 0..20 {
        assert_eq!(content(&mount, &format!("f{index}")).unwrap(), [index as u8; 3000]);
    }
}

#[test]
fn a_synchronous_mount_needs_no_fsync() {
    let options = OpenOptions { synchronous: true, ..OpenOptions::default() };
    let commit_at_once = OpenOptions { commit_interval: Duration::ZERO, ..OpenOptions::default() };
    for options in [options, commit_at_once] {
        let mut mount = Mount::with(Env::simulated(8), 48 << 20, options);
        let directory = mount.mkdir(ROOT, "d");
        let file = mount.create(directory, "f");
        mount.write(file, 0, &[5; 9000]).unwrap();
        mount.truncate(file.0, 8000).unwrap();
        mount.vfs().fallocate(&USER, file.0, file.1, 100, 5000, 3).unwrap();
        mount.vfs().set_xattr(&USER, file.0, OsStr::new("user.x"), b"y", 0).unwrap();
        mount.vfs().rename(&USER, directory, OsStr::new("f"), ROOT, OsStr::new("g"), 0).unwrap();
        mount.crash();
        let found = content(&mount, "g").unwrap();
        assert_eq!((found.len(), found[99], found[100], found[5099], found[5100]), (8000, 5, 0, 0, 5));
        let node = mount.lookup(ROOT, "g").unwrap();
        assert_eq!(mount.vfs().get_xattr(&USER, node, OsStr::new("user.x")).unwrap(), b"y");
    }
}

#[test]
fn a_directory_synchronous_mount_keeps_names() {
    let options = OpenOptions { directory_synchronous: true, ..OpenOptions::default() };
    let mut mount = Mount::with(Env::simulated(9), 48 << 20, options);
    mount.create(ROOT, "f");
    mount.crash();
    assert!(mount.lookup(ROOT, "f").is_some());
}
