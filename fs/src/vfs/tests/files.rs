//! Open files: what lives without a name, space, errors, statistics.

use super::*;

#[test]
fn an_unlinked_file_lives_until_it_is_closed() {
    let mount = Mount::simulated(1);
    let file = mount.create(ROOT, "f");
    mount.write(file, 0, &[7; 100_000]).unwrap();
    mount.vfs().fsync(&USER, file.0, file.1, false).unwrap();
    mount.vfs().unlink(&USER, ROOT, OsStr::new("f")).unwrap();
    mount.vfs().forget(file.0, 1);
    assert_eq!(mount.attributes(file.0).link_count, 0);
    mount.write(file, 100_000, &[8; 100_000]).unwrap();
    mount.vfs().fsync(&USER, file.0, file.1, false).unwrap();
    assert_eq!(mount.read(file, 99_999, 2).unwrap(), [7, 8]);
    mount.write(file, 0, b"never written back").unwrap();
    mount.vfs().release(file.0, file.1).unwrap();
    mount.vfs().wait_for_deletions().unwrap();
    let usage = mount.filesystem.as_ref().unwrap().usage();
    assert_eq!((usage.data_bytes, usage.reserved_bytes), (0, 0));
}

#[test]
fn leftover_orphans_are_deleted_by_the_next_mount() {
    let mut mount = Mount::simulated(2);
    let handles: Vec<(u64, u64)> = (0..100)
        .map(|index| {
            let name = format!("f{index}");
            let file = mount.create(ROOT, &name);
            mount.write(file, 0, &[1; 20_000]).unwrap();
            mount.vfs().set_xattr(&USER, file.0, OsStr::new("user.x"), b"y", 0).unwrap();
            mount.vfs().fsync(&USER, file.0, file.1, false).unwrap();
            mount.vfs().unlink(&USER, ROOT, OsStr::new(&name)).unwrap();
            file
        })
        .collect();
    mount.vfs().fsyncdir(&USER, ROOT, 0, false).unwrap();
    assert_eq!(mount.read(handles[5], 0, 1).unwrap(), [1]);
    mount.crash();
    mount.vfs().wait_for_deletions().unwrap();
    let filesystem = mount.filesystem.as_ref().unwrap();
    assert_eq!(filesystem.usage().data_bytes, 0);
    assert_eq!(filesystem.totals().get(crate::format::journal::AccountingCounter::Inodes), 1);
}

#[test]
fn a_full_filesystem_says_so_in_write_and_can_be_emptied() {
    let mount = Mount::simulated(3);
    let before = mount.vfs().statistics().unwrap();
    let mut files = Vec::new();
    let mut written = 0_u64;
    'filling: for index in 0.. {
        let file = mount.create(ROOT, &format!("f{index}"));
        files.push(file);
        for piece in 0..16 {
            match mount.write(file, piece * 65_536, &[index as u8 + 1; 65_536]) {
                Ok(bytes) => written += u64::from(bytes),
                Err(error) => {
                    assert_eq!(error.errno(), Errno::NOSPC);
                    break 'filling;
                }
            }
        }
    }
    let available = before.blocks_available * u64::from(before.block_bytes);
    assert!(written * 10 >= available * 9, "{written} of {available} bytes could be written");
    // What was admitted is written.
    mount.vfs().sync().unwrap();
    for (index, &file) in files.iter().enumerate() {
        mount.vfs().release(file.0, file.1).unwrap();
        mount.vfs().unlink(&USER, ROOT, OsStr::new(&format!("f{index}"))).unwrap();
        mount.vfs().forget(file.0, 1);
    }
    mount.vfs().wait_for_deletions().unwrap();
    let usage = mount.filesystem.as_ref().unwrap().usage();
    assert_eq!((usage.data_bytes, usage.reserved_bytes), (0, 0));
}

#[test]
fn allocated_space_can_be_written_when_nothing_else_can() {
    let mount = Mount::simulated(4);
    let file = mount.create(ROOT, "held");
    mount.vfs().fallocate(&USER, file.0, file.1, 0, 1 << 20, 0).unwrap();
    assert_eq!(mount.attributes(file.0).size_bytes, 1 << 20);
    assert!(mount.attributes(file.0).blocks_of_512 >= 2048);
    let filler = mount.create(ROOT, "filler");
    let mut offset = 0;
    for step in [1 << 20, 1 << 16, 4096] {
        let data = vec![9; step];
        while mount.write(filler, offset, &data).is_ok() {
            offset += step as u64;
        }
    }
    assert_eq!(errno(mount.write(filler, offset, &[1; 4096])), Errno::NOSPC);
    assert_eq!(mount.write(file, 4096, &[5; 65_536]).unwrap(), 65_536);
    mount.vfs().sync().unwrap();
    assert_eq!(mount.read(file, 4095, 2).unwrap(), [0, 5]);
    // More than there is: refused, and nothing is taken.
    let before = mount.vfs().statistics().unwrap();
    assert_eq!(errno(mount.vfs().fallocate(&USER, file.0, file.1, 0, 1 << 40, 1)), Errno::NOSPC);
    assert_eq!(mount.vfs().statistics().unwrap().blocks_available, before.blocks_available);
}

#[test]
fn modes_that_are_not_served_say_so() {
    let mount = Mount::simulated(5);
    let file = mount.create(ROOT, "f");
    for mode in [2, 0x9, 0x12, 0x21, 0x40, 0x13] {
        assert_eq!(errno(mount.vfs().fallocate(&USER, file.0, file.1, 0, 4096, mode)), Errno::OPNOTSUPP, "{mode:#x}");
    }
    assert_eq!(errno(mount.vfs().fallocate(&USER, file.0, file.1, 0, 0, 0)), Errno::INVAL);
    assert_eq!(errno(mount.truncate(file.0, u64::MAX)), Errno::FBIG);
    assert_eq!(errno(mount.truncate(ROOT, 0)), Errno::ISDIR);
    assert_eq!(errno(mount.write(file, i64::MAX as u64, b"x")), Errno::FBIG);
    assert_eq!(mount.read(file, u64::MAX, 10).unwrap(), []);
}

#[test]
fn a_shutdown_stops_everything() {
    let mut mount = Mount::simulated(6);
    let file = mount.create(ROOT, "f");
    mount.write(file, 0, b"kept").unwrap();
    let request = IoctlRequest {
        node: ROOT,
        handle: 0,
        directory: true,
        command: 0x8004_587d,
        input: &0_u32.to_le_bytes(),
        output_bytes_max: 0,
    };
    assert_eq!(errno(mount.vfs().ioctl(&Caller { uid: 1, ..USER }, &request)), Errno::PERM);
    mount.vfs().ioctl(&USER, &request).unwrap();
    assert_eq!(errno(mount.vfs().get_attributes(&USER, ROOT, None)), Errno::IO);
    assert!(mount.write(file, 0, b"lost").is_err());
    mount.crash();
    let node = mount.lookup(ROOT, "f").unwrap();
    assert_eq!(mount.read((node, mount.open_file(node)), 0, 10).unwrap(), b"kept");
}

#[test]
fn a_read_only_mount_changes_nothing() {
    let mut mount = Mount::simulated(7);
    let file = mount.create(ROOT, "f");
    mount.write(file, 0, b"data").unwrap();
    mount.close();
    mount.options.read_only = true;
    mount.open();
    assert_eq!(errno(mount.vfs().mkdir(&USER, ROOT, OsStr::new("d"), 0o755)), Errno::ROFS);
    assert_eq!(errno(mount.vfs().open(&USER, file.0, 2)), Errno::ROFS);
    let handle = mount.vfs().open(&USER, file.0, 0).unwrap().handle;
    assert_eq!(mount.read((file.0, handle), 0, 10).unwrap(), b"data");
    assert_eq!(errno(mount.write((file.0, handle), 0, b"x")), Errno::ROFS);
    assert_eq!(errno(mount.truncate(file.0, 0)), Errno::ROFS);
    assert_eq!(errno(mount.vfs().unlink(&USER, ROOT, OsStr::new("f"))), Errno::ROFS);
    mount.vfs().fsync(&USER, file.0, handle, false).unwrap();
}

#[test]
fn statistics_are_paged() {
    let mount = Mount::simulated(8);
    let mut text = Vec::new();
    let mut cursor = 0_u64;
    let mut answers = 0;
    loop {
        let request = IoctlRequest {
            node: ROOT,
            handle: 0,
            directory: true,
            command: IOCTL_STATISTICS,
            input: &cursor.to_le_bytes(),
            output_bytes_max: 100,
        };
        let reply = mount.vfs().ioctl(&USER, &request).unwrap();
        assert!(reply.output.len() <= 100);
        let (next, part) = reply.output.split_first_chunk::<8>().unwrap();
        text.extend_from_slice(part);
        answers += 1;
        // Values that get longer meanwhile tear nothing.
        mount.vfs().metrics().vfs_panics.add(1 << 40);
        cursor = u64::from_le_bytes(*next);
        if cursor == 0 {
            break;
        }
    }
    assert!(answers > 3);
    let text = String::from_utf8(text).unwrap();
    assert!(text.lines().any(|line| line.starts_with("transaction.commits ")));
    assert!(text.lines().any(|line| line.starts_with("vfs.inodes_in_memory ")));
    let names = |text: &str| text.lines().map(|line| line.split(' ').next().unwrap().to_owned()).collect::<Vec<_>>();
    assert_eq!(names(&text), names(&mount.vfs().statistics_text()));
}

#[test]
fn objects_in_memory_are_bounded() {
    let mount = Mount::simulated(9);
    let mut nodes = Vec::new();
    for index in 0..600 {
        nodes.push(
            mount.vfs().mknod(&USER, ROOT, OsStr::new(&format!("f{index}")), 0o100_644, 0).unwrap().attributes.node,
        );
    }
    let table = inode_table::InodeTable::new(64);
    for &node in &nodes {
        let number = InodeNumber(node);
        let load = || {
            mount.vfs().new_object(
                number,
                crate::format::namespace::Inode { mode: 0o100_644, link_count: 1, ..Default::default() },
                crate::units::JournalSequence(0),
            )
        };
        table.get_or_load(number, 1, load).unwrap();
    }
    assert!(table.resident_count() <= 64 * 4, "{} objects", table.resident_count());
    assert!(!table.forget(InodeNumber(nodes[0]), 0));
    assert!(table.forget(InodeNumber(nodes[0]), 1));
}
