//! The whole filesystem in one process: made, used, closed, cut off, opened again.

use std::ffi::OsStr;
use std::sync::Arc;

use super::format::test_geometry;
use super::*;
use crate::device::{CrashPlan, MemDevice, SimDevice, SimOptions};
use crate::vfs::{Caller, Lookup, ReadRequest, WriteRequest};

const ROOT: u64 = 1;
const O_RDWR: i32 = 2;
const CALLER: Caller = Caller { uid: 0, gid: 0, pid: 1, umask: 0 };

fn options(env: &Arc<Env>) -> OpenOptions {
    OpenOptions { env: Some(Arc::clone(env)), cache_bytes: 16 << 20, ..OpenOptions::default() }
}

fn create(filesystem: &Filesystem, name: &str, data: &[u8], fsync: bool) -> Result<()> {
    let vfs = filesystem.vfs();
    let (entry, opened) = vfs.create(&CALLER, ROOT, OsStr::new(name), 0o100_644, O_RDWR)?;
    let node = entry.attributes.node;
    let mut offset = 0;
    for chunk in data.chunks(64 << 10) {
        let request = WriteRequest::new(node, opened.handle, offset, chunk);
        offset += u64::from(vfs.write(&CALLER, &request)?);
    }
    if fsync {
        vfs.fsync(&CALLER, node, opened.handle, false)?;
    }
    vfs.release(node, opened.handle)?;
    vfs.forget(node, 1);
    Ok(())
}

fn content(filesystem: &Filesystem, name: &str) -> Result<Option<Vec<u8>>> {
    let vfs = filesystem.vfs();
    let Lookup::Found(entry) = vfs.lookup(&CALLER, ROOT, OsStr::new(name))? else { return Ok(None) };
    let node = entry.attributes.node;
    let opened = vfs.open(&CALLER, node, 0)?;
    let mut found = Vec::new();
    loop {
        let request = ReadRequest {
            node,
            handle: opened.handle,
            offset: found.len() as u64,
            length_bytes: 128 << 10,
            direct: false,
        };
        let pages = vfs.read(&CALLER, &request)?;
        let before = found.len();
        for slice in pages.slices() {
            found.extend_from_slice(slice);
        }
        if found.len() == before {
            break;
        }
    }
    vfs.release(node, opened.handle)?;
    vfs.forget(node, 1);
    Ok(Some(found))
}

fn pattern(seed: u64, length: usize) -> Vec<u8> {
    (0..length as u64).map(|index| (index.wrapping_mul(seed | 1) >> 3) as u8 ^ seed as u8).collect()
}

#[test]
fn a_filesystem_lives_through_a_close() {
    let env = Env::real();
    let device: Arc<dyn BlockDevice> = Arc::new(MemDevice::new(64 << 20));
    Filesystem::format(&device, &test_geometry(), &env).unwrap();
    let filesystem = Filesystem::open(vec![Arc::clone(&device)], &options(&env)).unwrap();
    for index in 0..200_u64 {
        create(&filesystem, &format!("file {index}"), &pattern(index, index as usize * 300), false).unwrap();
    }
    filesystem.close().unwrap();
    drop(filesystem);
    let filesystem = Filesystem::open(vec![device], &options(&env)).unwrap();
    assert_eq!(filesystem.replayed().keys, 0, "a closed filesystem has nothing to replay");
    for index in 0..200_u64 {
        let found = content(&filesystem, &format!("file {index}")).unwrap();
        assert!(found.as_deref() == Some(&pattern(index, index as usize * 300)), "file {index} differs");
    }
    filesystem.close().unwrap();
}

#[test]
fn what_was_fsynced_survives_a_power_cut_in_simulation() {
    for seed in 0..4 {
        let env = Env::simulated(seed);
        let sim = Arc::new(SimDevice::new(64 << 20, SimOptions::default()));
        let device: Arc<dyn BlockDevice> = Arc::clone(&sim) as _;
        Filesystem::format(&device, &test_geometry(), &env).unwrap();
        let filesystem = Filesystem::open(vec![Arc::clone(&device)], &options(&env)).unwrap();
        for index in 0..40_u64 {
            create(&filesystem, &format!("file {index}"), &pattern(index, 5000), true).unwrap();
        }
        // The power goes with nothing of what was in flight on the medium.
        let image = sim.crash(&CrashPlan::keeping([]));
        env.unregister_all();
        drop(filesystem);
        let env = Env::simulated(seed + 100);
        let device: Arc<dyn BlockDevice> = Arc::new(SimDevice::from_image(image, SimOptions::default()));
        let filesystem = Filesystem::open(vec![device], &options(&env)).unwrap();
        for index in 0..40_u64 {
            let found = content(&filesystem, &format!("file {index}")).unwrap();
            assert!(found.as_deref() == Some(&pattern(index, 5000)), "seed {seed}: file {index} differs");
        }
        filesystem.close().unwrap();
    }
}
