//! Rules of the namespace that the model does not know: set-group-id directories, ACLs, attributes, cookies, flags, errors.

use std::collections::BTreeSet;

use super::*;
use crate::env::Timestamp;

fn name(text: &str) -> &OsStr {
    OsStr::new(text)
}

#[test]
fn a_set_group_id_directory_gives_its_group() {
    let mount = Mount::simulated(1);
    let directory = mount.mkdir(ROOT, "d");
    let changes = SetAttributes { mode: Some(0o2775), gid: None, ..SetAttributes::default() };
    mount.vfs().set_attributes(&USER, directory, &SetAttributes { gid: Some(77), ..SetAttributes::default() }).unwrap();
    mount.vfs().set_attributes(&USER, directory, &changes).unwrap();
    let user = Caller { uid: 5, gid: 6, pid: 0, umask: 0o027 };
    let file = mount.vfs().mknod(&user, directory, name("f"), 0o100_666, 0).unwrap().attributes;
    assert_eq!((file.uid, file.gid, file.permissions), (5, 77, 0o640));
    let below = mount.vfs().mkdir(&user, directory, name("s"), 0o777).unwrap().attributes;
    assert_eq!((below.gid, below.permissions), (77, 0o2750));
}

#[test]
fn cookies_are_stable_while_names_come_and_go() {
    let mount = Mount::simulated(2);
    let directory = mount.mkdir(ROOT, "d");
    for index in 0..300 {
        mount.create(directory, &format!("old{index}"));
    }
    let mut seen = BTreeSet::new();
    let mut gone = BTreeSet::new();
    let mut cookie = 0;
    let mut round = 0;
    loop {
        let mut taken = 0;
        mount
            .vfs()
            .readdir(&USER, directory, 0, cookie, &mut |entry| {
                if taken == 7 {
                    return Emitted::Full;
                }
                taken += 1;
                cookie = entry.next_cookie;
                assert!(i64::try_from(cookie).is_ok());
                assert!(seen.insert(entry.name.to_owned()), "{:?} was listed twice", entry.name);
                Emitted::Accepted
            })
            .unwrap();
        if taken == 0 {
            break;
        }
        // What was listed already goes, other names come.
        let listed =
            seen.iter().find(|name| name.to_str().unwrap().starts_with("old") && !gone.contains(*name)).cloned();
        if let Some(listed) = listed.filter(|_| round % 2 == 0) {
            mount.vfs().unlink(&USER, directory, &listed).unwrap();
            gone.insert(listed);
        }
        mount.create(directory, &format!("new{round}"));
        round += 1;
    }
    for index in 0..300 {
        let text = format!("old{index}");
        assert!(seen.contains(name(&text)), "{text} was passed over");
        assert_eq!(mount.lookup(directory, &text).is_some(), !gone.contains(name(&text)));
    }
    assert!(gone.len() > 20);
}

#[test]
fn readdirplus_counts_what_is_accepted() {
    let mount = Mount::simulated(3);
    let (node, handle) = mount.create(ROOT, "f");
    let mut seen = Vec::new();
    mount
        .vfs()
        .readdirplus(&USER, ROOT, 0, 0, &mut |entry, found| {
            seen.push((entry.name.to_owned(), found.map(|found| found.attributes.node)));
            Emitted::Accepted
        })
        .unwrap();
    assert_eq!(seen.len(), 3);
    assert_eq!(seen[2], (name("f").to_owned(), Some(node)));
    // Two lookups: create's and the listing's. After both are given back the unlinked file goes.
    mount.vfs().release(node, handle).unwrap();
    mount.vfs().unlink(&USER, ROOT, name("f")).unwrap();
    mount.vfs().forget(node, 1);
    assert!(mount.vfs().get_attributes(&USER, node, None).is_ok());
    mount.vfs().forget(node, 1);
    assert_eq!(errno(mount.vfs().get_attributes(&USER, node, None)), Errno::STALE);
    mount.vfs().wait_for_deletions().unwrap();
    assert_eq!(errno(mount.vfs().lookup(&USER, node, name("."))), Errno::STALE);
}

#[test]
fn dots_are_looked_up_for_export() {
    let mut mount = Mount::simulated(4);
    let directory = mount.mkdir(ROOT, "d");
    let below = mount.mkdir(directory, "e");
    let generation = |mount: &Mount, node| match mount.vfs().lookup(&USER, node, name(".")).unwrap() {
        Lookup::Found(entry) => entry.generation,
        Lookup::Absent => panic!("absent"),
    };
    let before = generation(&mount, below);
    mount.reopen();
    assert_eq!(generation(&mount, below), before);
    assert_eq!(mount.lookup(below, ".."), Some(directory));
    assert_eq!(errno(mount.vfs().lookup(&USER, 999, name("."))), Errno::STALE);
}

#[test]
fn extended_attributes_keep_their_rules() {
    let mut mount = Mount::simulated(5);
    let (node, _) = mount.create(ROOT, "f");
    let vfs = mount.vfs();
    vfs.set_xattr(&USER, node, name("user.a"), b"one", 1).unwrap();
    assert_eq!(errno(vfs.set_xattr(&USER, node, name("user.a"), b"two", 1)), Errno::EXIST);
    vfs.set_xattr(&USER, node, name("user.a"), b"two", 2).unwrap();
    assert_eq!(errno(vfs.set_xattr(&USER, node, name("user.b"), b"", 2)), Errno::NODATA);
    vfs.set_xattr(&USER, node, name("trusted.t"), b"", 0).unwrap();
    vfs.set_xattr(&USER, node, name("security.s"), &[7; 100], 0).unwrap();
    assert_eq!(errno(vfs.set_xattr(&USER, node, name("other.x"), b"", 0)), Errno::OPNOTSUPP);
    assert_eq!(errno(vfs.set_xattr(&USER, node, name("user."), b"", 0)), Errno::INVAL);
    assert_eq!(errno(vfs.set_xattr(&USER, node, name("user.big"), &[0; 8000], 0)), Errno::NOSPC);
    assert_eq!(errno(vfs.set_xattr(&USER, node, name("user.big"), &[0; 70_000], 0)), Errno::TOOBIG);
    assert_eq!(errno(vfs.get_xattr(&USER, node, name("user.none"))), Errno::NODATA);
    mount.reopen();
    let vfs = mount.vfs();
    assert_eq!(vfs.get_xattr(&USER, node, name("user.a")).unwrap(), b"two");
    let names = |caller: &Caller| -> BTreeSet<String> {
        let list = vfs.list_xattrs(caller, node).unwrap();
        list.split(|&byte| byte == 0)
            .filter(|name| !name.is_empty())
            .map(|name| String::from_utf8(name.to_vec()).unwrap())
            .collect()
    };
    assert_eq!(names(&USER), ["security.s", "trusted.t", "user.a"].map(String::from).into());
    let user = Caller { uid: 9, ..USER };
    assert_eq!(names(&user), ["security.s", "user.a"].map(String::from).into());
    vfs.remove_xattr(&USER, node, name("user.a")).unwrap();
    assert_eq!(errno(vfs.remove_xattr(&USER, node, name("user.a"))), Errno::NODATA);
    assert!(vfs.get_xattr(&USER, node, name("user.coppice.birth_time")).is_ok());
}

fn access_list(owner: u16, user: u16, group: u16, mask: u16, other: u16) -> Vec<u8> {
    let mut out = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in
        [(1_u16, owner, 0_u32), (2, user, 1000), (4, group, 0), (0x10, mask, 0), (0x20, other, 0)]
    {
        out.extend_from_slice(&tag.to_le_bytes());
        out.extend_from_slice(&permissions.to_le_bytes());
        out.extend_from_slice(&id.to_le_bytes());
    }
    out
}

#[test]
fn access_lists_and_modes_follow_each_other() {
    let mount = Mount::simulated(6);
    let vfs = mount.vfs();
    let (node, _) = mount.create(ROOT, "f");
    let access = name("system.posix_acl_access");
    vfs.set_xattr(&USER, node, access, &access_list(7, 6, 4, 5, 1), 0).unwrap();
    assert_eq!(mount.attributes(node).permissions, 0o751);
    let changes = SetAttributes { mode: Some(0o620), ..SetAttributes::default() };
    vfs.set_attributes(&USER, node, &changes).unwrap();
    assert_eq!(vfs.get_xattr(&USER, node, access).unwrap(), access_list(6, 6, 4, 2, 0));
    assert_eq!(
        errno(vfs.set_xattr(&USER, node, name("system.posix_acl_default"), &access_list(7, 7, 7, 7, 7), 0)),
        Errno::ACCESS
    );
    assert_eq!(errno(vfs.set_xattr(&USER, node, access, b"nonsense", 0)), Errno::OPNOTSUPP);

    let directory = mount.mkdir(ROOT, "d");
    let default = access_list(7, 7, 5, 7, 0);
    vfs.set_xattr(&USER, directory, name("system.posix_acl_default"), &default, 0).unwrap();
    let file = vfs.mknod(&USER, directory, name("f"), 0o100_666, 0).unwrap().attributes;
    // The umask has no say where there is a default list.
    assert_eq!(file.permissions, 0o660);
    assert_eq!(vfs.get_xattr(&USER, file.node, access).unwrap(), access_list(6, 7, 5, 6, 0));
    let below = vfs.mkdir(&USER, directory, name("s"), 0o777).unwrap().attributes;
    assert_eq!(vfs.get_xattr(&USER, below.node, name("system.posix_acl_default")).unwrap(), default);
}

#[test]
fn protected_files_refuse() {
    let mount = Mount::simulated(7);
    let vfs = mount.vfs();
    let flags = |node: u64, flags: u32| {
        let input = u64::from(flags).to_le_bytes();
        let request = IoctlRequest {
            node,
            handle: 0,
            directory: false,
            command: 0x4008_6602,
            input: &input,
            output_bytes_max: 0,
        };
        vfs.ioctl(&USER, &request)
    };
    let (node, handle) = mount.create(ROOT, "f");
    flags(node, 0x10).unwrap();
    assert_eq!(errno(mount.write((node, handle), 0, b"x")), Errno::PERM);
    assert_eq!(errno(mount.truncate(node, 0)), Errno::PERM);
    assert_eq!(errno(vfs.unlink(&USER, ROOT, name("f"))), Errno::PERM);
    assert_eq!(errno(vfs.rename(&USER, ROOT, name("f"), ROOT, name("g"), 0)), Errno::PERM);
    assert_eq!(errno(vfs.link(&USER, node, ROOT, name("g"))), Errno::PERM);
    assert_eq!(errno(vfs.set_xattr(&USER, node, name("user.x"), b"", 0)), Errno::PERM);
    assert_eq!(errno(vfs.open(&USER, node, 1)), Errno::PERM);
    flags(node, 0x20).unwrap();
    assert_eq!(errno(mount.write((node, handle), 0, b"x")), Errno::PERM);
    let request = WriteRequest { append: true, ..write_request(node, handle, 0, b"x") };
    assert_eq!(vfs.write(&USER, &request).unwrap(), 1);
    flags(node, 0).unwrap();
    vfs.unlink(&USER, ROOT, name("f")).unwrap();
    assert_eq!(errno(flags(node, 1 << 20)), Errno::OPNOTSUPP);
    let request =
        IoctlRequest { node: ROOT, handle: 0, directory: true, command: 0x1234, input: &[], output_bytes_max: 0 };
    assert_eq!(errno(vfs.ioctl(&USER, &request)), Errno::NOTTY);
}

#[test]
fn times_and_set_id_bits_follow_the_rules() {
    let mut mount = Mount::simulated(8);
    let (node, handle) = mount.create(ROOT, "f");
    let vfs = mount.vfs();
    let time = Timestamp { seconds: -5, nanoseconds: 123_456_789 };
    let changes = SetAttributes {
        mode: Some(0o6755),
        modification_time: Some(SetTime::To(time)),
        access_time: Some(SetTime::To(time)),
        ..SetAttributes::default()
    };
    mount.write((node, handle), 0, b"data").unwrap();
    vfs.set_attributes(&USER, node, &changes).unwrap();
    vfs.fsync(&USER, node, handle, false).unwrap();
    let attributes = mount.attributes(node);
    assert_eq!((attributes.modification_time, attributes.access_time, attributes.permissions), (time, time, 0o6755));
    mount.reopen();
    let attributes = mount.attributes(node);
    assert_eq!((attributes.modification_time, attributes.access_time, attributes.permissions), (time, time, 0o6755));
    let handle = mount.open_file(node);
    let request = WriteRequest { clear_set_id: true, ..write_request(node, handle, 0, b"x") };
    mount.vfs().write(&USER, &request).unwrap();
    assert_eq!(mount.attributes(node).permissions, 0o755);
    assert!(mount.attributes(node).modification_time > time);
    let vfs = mount.vfs();
    vfs.set_attributes(&USER, node, &SetAttributes { mode: Some(0o6755), ..SetAttributes::default() }).unwrap();
    vfs.set_attributes(&USER, node, &SetAttributes { uid: Some(3), ..SetAttributes::default() }).unwrap();
    assert_eq!(mount.attributes(node).permissions, 0o755);
    vfs.set_attributes(&USER, node, &SetAttributes { mode: Some(0o6755), ..SetAttributes::default() }).unwrap();
    let other = Caller { uid: 3, ..USER };
    vfs.set_attributes(&other, node, &SetAttributes { size_bytes: Some(1), ..SetAttributes::default() }).unwrap();
    assert_eq!(mount.attributes(node).permissions, 0o755);
    // Relative access times: reading after a change moves them, and they come to the disk.
    mount.read((node, handle), 0, 1).unwrap();
    let read_at = mount.attributes(node).access_time;
    assert!(read_at > time);
    mount.reopen();
    assert_eq!(mount.attributes(node).access_time, read_at);
}

#[test]
fn bad_names_and_types_are_refused() {
    let mount = Mount::simulated(9);
    let vfs = mount.vfs();
    let (node, _) = mount.create(ROOT, "f");
    let long = "x".repeat(256);
    assert_eq!(errno(vfs.mkdir(&USER, ROOT, name(&long), 0o755)), Errno::NAMETOOLONG);
    assert_eq!(errno(vfs.lookup(&USER, ROOT, name(&long))), Errno::NAMETOOLONG);
    vfs.mkdir(&USER, ROOT, name(&long[1..]), 0o755).unwrap();
    assert_eq!(errno(vfs.mkdir(&USER, ROOT, name("a/b"), 0o755)), Errno::INVAL);
    assert_eq!(errno(vfs.mkdir(&USER, ROOT, name(".."), 0o755)), Errno::EXIST);
    assert_eq!(errno(vfs.mkdir(&USER, node, name("x"), 0o755)), Errno::NOTDIR);
    assert_eq!(errno(vfs.lookup(&USER, node, name("x"))), Errno::NOTDIR);
    assert_eq!(errno(vfs.unlink(&USER, node, name("x"))), Errno::NOTDIR);
    assert_eq!(errno(vfs.rmdir(&USER, ROOT, name("."))), Errno::INVAL);
    assert_eq!(errno(vfs.rmdir(&USER, ROOT, name(".."))), Errno::NOTEMPTY);
    assert_eq!(errno(vfs.unlink(&USER, ROOT, name("."))), Errno::ISDIR);
    assert_eq!(errno(vfs.readlink(&USER, node)), Errno::INVAL);
    assert_eq!(errno(vfs.symlink(&USER, ROOT, name("l"), &[b'x'; 5000])), Errno::NAMETOOLONG);
    assert_eq!(errno(vfs.rename(&USER, ROOT, name("f"), ROOT, name("g"), 4)), Errno::INVAL);
    assert_eq!(errno(vfs.rename(&USER, ROOT, name("f"), ROOT, name("g"), 3)), Errno::INVAL);
    assert_eq!(errno(vfs.lookup(&USER, u64::MAX, name("."))), Errno::STALE);
    let target = [b'y'; 1000];
    let link = vfs.symlink(&USER, ROOT, name("l"), &target).unwrap().attributes;
    assert_eq!(vfs.readlink(&USER, link.node).unwrap(), target);
    assert_eq!((link.size_bytes, link.permissions), (1000, 0o777));
    let device = vfs.mknod(&USER, ROOT, name("null"), 0o020_666, 0x103).unwrap().attributes;
    assert_eq!(device.device_number, 0x103);
    // A directory that was removed takes no new names.
    let directory = mount.mkdir(ROOT, "d");
    vfs.rmdir(&USER, ROOT, name("d")).unwrap();
    assert_eq!(errno(vfs.mkdir(&USER, directory, name("x"), 0o755)), Errno::NOENT);
}
