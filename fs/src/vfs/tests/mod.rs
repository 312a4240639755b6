//! Tests of the POSIX operations over a whole filesystem in memory.

mod data;
mod delayed;
mod durability;
mod files;
mod model;
mod names;
mod splice;
mod rules;
mod schedules;
mod threads;
mod throttle;
mod writeback;

use std::ffi::OsStr;

use super::*;
use crate::device::{BlockDevice, MemDevice};
use crate::filesystem::format::test_geometry;
use crate::filesystem::{Filesystem, OpenOptions};
use crate::units::InodeNumber;
use rustix::io::Errno;

pub const ROOT: u64 = InodeNumber::ROOT.0;
pub const USER: Caller = Caller { uid: 0, gid: 0, pid: 0, umask: 0o022 };

/// A filesystem on a device in memory that can be closed, crashed and opened again.
pub struct Mount {
    pub device: Arc<MemDevice>,
    pub env: Arc<Env>,
    pub options: OpenOptions,
    pub filesystem: Option<Arc<Filesystem>>,
}

impl Mount {
    pub fn simulated(seed: u64) -> Self {
        Self::with(Env::simulated(seed), 48 << 20, OpenOptions::default())
    }

    pub fn with(env: Arc<Env>, size: u64, options: OpenOptions) -> Self {
        let device = Arc::new(MemDevice::new(size));
        let as_device: Arc<dyn BlockDevice> = device.clone();
        Filesystem::format(&as_device, &test_geometry(), &env).unwrap();
        let options = OpenOptions { env: Some(env.clone()), cache_bytes: 24 << 20, ..options };
        let mut mount = Self { device, env, options, filesystem: None };
        mount.open();
        mount
    }

    pub fn open(&mut self) {
        self.filesystem = Some(Filesystem::open(vec![self.device.clone()], &self.options).unwrap());
    }

    pub fn vfs(&self) -> &Vfs {
        self.filesystem.as_ref().unwrap().vfs()
    }

    pub fn close(&mut self) {
        if let Some(filesystem) = self.filesystem.take() {
            filesystem.close().unwrap();
        }
    }

    pub fn reopen(&mut self) {
        self.close();
        self.open();
    }

    /// What the device holds now becomes the device of a new mount: the present one has died.
    pub fn crash(&mut self) {
        let image = self.device.image();
        let filesystem = self.filesystem.take().unwrap();
        filesystem.vfs().latch("crash");
        // A latched filesystem writes nothing more.
        let _ = filesystem.close();
        self.device = Arc::new(MemDevice::from_image(image, false));
        self.open();
    }

    pub fn create(&self, parent: u64, name: &str) -> (u64, u64) {
        let (entry, opened) = self.vfs().create(&USER, parent, OsStr::new(name), 0o644, 2).unwrap();
        (entry.attributes.node, opened.handle)
    }

    pub fn mkdir(&self, parent: u64, name: &str) -> u64 {
        self.vfs().mkdir(&USER, parent, OsStr::new(name), 0o755).unwrap().attributes.node
    }

    pub fn lookup(&self, parent: u64, name: &str) -> Option<u64> {
        match self.vfs().lookup(&USER, parent, OsStr::new(name)).unwrap() {
            Lookup::Found(entry) => Some(entry.attributes.node),
            Lookup::Absent => None,
        }
    }

    pub fn open_file(&self, node: u64) -> u64 {
        self.vfs().open(&USER, node, 2).unwrap().handle
    }

    pub fn write(&self, (node, handle): (u64, u64), offset: u64, data: &[u8]) -> Result<u32> {
        self.vfs().write(&USER, &write_request(node, handle, offset, data))
    }

    pub fn read(&self, (node, handle): (u64, u64), offset: u64, length: u32) -> Result<Vec<u8>> {
        let request = ReadRequest { node, handle, offset, length_bytes: length, direct: false };
        Ok(self.vfs().read(&USER, &request)?.to_vec())
    }

    pub fn truncate(&self, node: u64, size: u64) -> Result<Attributes> {
        self.vfs().set_attributes(&USER, node, &SetAttributes { size_bytes: Some(size), ..SetAttributes::default() })
    }

    pub fn attributes(&self, node: u64) -> Attributes {
        self.vfs().get_attributes(&USER, node, None).unwrap()
    }

    pub fn list(&self, node: u64) -> Vec<(String, u64)> {
        let mut names = Vec::new();
        let mut cookie = 0;
        // In small pieces, so that cookies are used.
        loop {
            let mut taken = 0;
            self.vfs()
                .readdir(&USER, node, 0, cookie, &mut |entry| {
                    if taken == 3 {
                        return Emitted::Full;
                    }
                    taken += 1;
                    cookie = entry.next_cookie;
                    names.push((entry.name.to_str().unwrap().to_owned(), entry.node));
                    Emitted::Accepted
                })
                .unwrap();
            if taken == 0 {
                return names;
            }
        }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if let Some(filesystem) = self.filesystem.take() {
            let _ = filesystem.close();
        }
    }
}

pub fn write_request(node: u64, handle: u64, offset: u64, data: &[u8]) -> WriteRequest<'_> {
    WriteRequest::new(node, handle, offset, data)
}

pub fn errno<T: std::fmt::Debug>(result: Result<T>) -> Errno {
    result.unwrap_err().errno()
}
