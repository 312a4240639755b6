//! What a mount whose kernel delays writes (`cache=writeback`) may rely on.

use super::*;
use crate::env::Timestamp;
use crate::namespace::{FLAG_APPEND, FLAG_IMMUTABLE};

fn delaying(seed: u64) -> Mount {
    let options = OpenOptions { kernel_delays_writes: true, ..OpenOptions::default() };
    Mount::with(Env::simulated(seed), 48 << 20, options)
}

fn write_delayed(mount: &Mount, node: u64, offset: u64, data: &[u8]) -> Result<u32> {
    // The kernel's guess of a handle may be any.
    let request = WriteRequest { from_page_cache: true, ..write_request(node, u64::MAX, offset, data) };
    mount.vfs().write(&USER, &request)
}

fn available(mount: &Mount) -> u64 {
    let found = mount.vfs().statistics().unwrap();
    found.blocks_available * u64::from(found.block_bytes)
}

/// Writes until there is no space. Returns how much went in.
fn fill(mount: &Mount, file: (u64, u64), step: &[u8]) -> u64 {
    let mut offset = 0;
    loop {
        match mount.write(file, offset, step) {
            Ok(written) => offset += u64::from(written),
            Err(error) => {
                assert_eq!(error.errno(), Errno::NOSPC);
                return offset;
            }
        }
    }
}

#[test]
fn the_landing_reserve_is_kept_out_of_df_and_takes_what_the_kernel_has_accepted() {
    let mut mount = delaying(31);
    let before = available(&mount);
    let reserve = mount.vfs().landing_bytes_max() & !0xfff;
    assert!(reserve > 1 << 20);
    mount.vfs().hold_landing_reserve(reserve);
    let shown = available(&mount);
    assert!(shown + reserve <= before && shown + 2 * reserve > before, "{before} {shown} {reserve}");

    let (node, _) = mount.create(ROOT, "delayed");
    // Both before it is full: a write takes what there is to the last block, and then no name fits either.
    let (file, rest) = (mount.create(ROOT, "fill"), mount.create(ROOT, "rest"));
    fill(&mount, file, &[1; 1 << 16]);
    fill(&mount, rest, &[1; 4096]);
    // All of it lands, on a filesystem that is full for everybody else.
    let step = [2; 1 << 16];
    for offset in (0..reserve - (1 << 16)).step_by(1 << 16) {
        write_delayed(&mount, node, offset, &step).unwrap();
    }
    let mut offset = reserve;
    while let Ok(written) = write_delayed(&mount, node, offset, &step) {
        offset += u64::from(written);
    }
    let refused = write_delayed(&mount, node, offset, &step).unwrap_err();
    assert_eq!(refused.errno(), Errno::NOSPC, "beyond the reserve it is refused, and the kernel reports that");
    mount.vfs().sync().unwrap();

    // What becomes free goes to the reserve before anyone else is promised it.
    mount.vfs().unlink(&USER, ROOT, OsStr::new("fill")).unwrap();
    mount.vfs().release(file.0, file.1).unwrap();
    mount.vfs().forget(file.0, 1);
    let mut steps = 0;
    while mount.env.step_random_worker().unwrap() && steps < 10_000 {
        steps += 1;
    }
    mount.vfs().statistics().unwrap();
    fill(&mount, mount.create(ROOT, "again"), &[3; 1 << 16]);
    for offset in (0..reserve - (1 << 16)).step_by(1 << 16) {
        write_delayed(&mount, node, (64 << 20) + offset, &step).unwrap();
    }
    mount.reopen();
    let node = mount.lookup(ROOT, "delayed").unwrap();
    let file = (node, mount.open_file(node));
    assert_eq!(mount.read(file, 0, 1 << 16).unwrap(), step);
    assert_eq!(mount.read(file, 64 << 20, 1 << 16).unwrap(), step);
}

#[test]
fn delayed_writes_leave_times_to_the_kernel_and_are_never_refused_for_flags() {
    let mount = delaying(32);
    let (node, handle) = mount.create(ROOT, "file");
    mount.write((node, handle), 0, b"direct").unwrap();
    let time = Timestamp { seconds: 1_900_000_000, nanoseconds: 8 };
    let times = SetAttributes {
        modification_time: Some(SetTime::To(time)),
        change_time: Some(time),
        ..SetAttributes::default()
    };
    mount.vfs().set_attributes(&USER, node, &times).unwrap();
    write_delayed(&mount, node, 10, b"late").unwrap();
    let found = mount.attributes(node);
    assert_eq!((found.modification_time, found.change_time, found.size_bytes), (time, time, 14));

    // chattr +i and +a: what was written before still arrives, and so do its times.
    for flags in [FLAG_IMMUTABLE, FLAG_APPEND] {
        let input = flags.to_le_bytes();
        // FS_IOC_SETFLAGS.
        let command = 0x4008_6602;
        let request = IoctlRequest { node, handle, directory: false, command, input: &input, output_bytes_max: 0 };
        mount.vfs().ioctl(&USER, &request).unwrap();
        write_delayed(&mount, node, 4, b"more").unwrap();
        mount.vfs().set_attributes(&USER, node, &times).unwrap();
        assert_eq!(mount.attributes(node).modification_time, time);
        assert_eq!(errno(mount.write((node, handle), 0, b"x")), Errno::PERM, "but not what is written now");
        let mode = SetAttributes { mode: Some(0o600), change_time: Some(time), ..SetAttributes::default() };
        assert_eq!(errno(mount.vfs().set_attributes(&USER, node, &mode)), Errno::PERM);
    }
    // Appends go where the kernel says, since it may know of bytes that are not here.
    let request = WriteRequest { append: true, ..write_request(node, handle, 100, b"end") };
    mount.vfs().write(&USER, &request).unwrap();
    assert_eq!(mount.attributes(node).size_bytes, 103);
    assert_eq!(mount.read((node, handle), 0, 14).unwrap(), b"dire\x6dore\0\0late");
}

#[test]
fn a_file_may_be_dirty_in_the_kernel_while_it_is_open_for_writing() {
    let mount = delaying(33);
    let (node, handle) = mount.create(ROOT, "file");
    let reader = mount.vfs().open(&USER, node, 0).unwrap().handle;
    assert!(mount.vfs().may_be_dirty_in_kernel(node));
    mount.vfs().release(node, handle).unwrap();
    assert!(!mount.vfs().may_be_dirty_in_kernel(node));
    mount.vfs().release(node, reader).unwrap();
}
