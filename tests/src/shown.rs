//! What a filesystem on a bad medium shows, against what it should: never other bytes, names or attributes, at worst an error.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::sync::Arc;

use coppicefs::device::BlockDevice;
use coppicefs::env::Env;
use coppicefs::filesystem::{Filesystem, OpenOptions};
use coppicefs::format::namespace::FileType;
use coppicefs::options::AccessTimes;
use coppicefs::vfs::{Attributes, Caller, Emitted, Lookup, ReadRequest, Vfs};
use coppicefs::{Error, Result};

use crate::tree::{Entry, Kind, Tree};

const ROOT: u64 = 1;
const CALLER: Caller = Caller { uid: 0, gid: 0, pid: 1, umask: 0 };
const BLOCK_BYTES: u64 = 4096;

/// What a comparison found.
#[derive(Debug, Default)]
pub struct Shown {
    /// What is shown and is not so. Always a failure.
    pub wrong: Vec<String>,
    /// What could not be shown: the path, and for a block of a file its offset in bytes.
    pub errors: Vec<(String, Option<u64>, Error)>,
    /// The filesystem's counters, at the end.
    pub counters: BTreeMap<&'static str, u64>,
}

impl Shown {
    /// Everything is shown, as it should be.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.wrong.is_empty() && self.errors.is_empty()
    }
}

/// Mounts, reads everything that `expected` has, and what there is besides; ends the mount in order.
///
/// # Errors
/// If it does not mount, or does not end in order.
pub fn show(device: &Arc<dyn BlockDevice>, expected: &Tree) -> Result<Shown> {
    let env = Env::simulated(1);
    let options = OpenOptions {
        cache_bytes: 8 << 20,
        access_times: AccessTimes::Never,
        env: Some(Arc::clone(&env)),
        ..OpenOptions::default()
    };
    let filesystem = Filesystem::open(vec![Arc::clone(device)], &options)?;
    let mut reader = Reader { vfs: filesystem.vfs(), expected, shown: Shown::default() };
    reader.all();
    let mut shown = reader.shown;
    let closed = filesystem.close();
    shown.counters = filesystem.metrics().snapshot().into_iter().collect();
    // The workers hold the filesystem, and the scheduler holds them.
    env.unregister_all();
    closed.map(|()| shown)
}

struct Reader<'a> {
    vfs: &'a Vfs,
    expected: &'a Tree,
    shown: Shown,
}

impl Reader<'_> {
    fn note<T>(&mut self, path: &str, offset: Option<u64>, outcome: Result<T>) -> Option<T> {
        outcome.map_err(|error| self.shown.errors.push((path.to_owned(), offset, error))).ok()
    }

    fn wrong(&mut self, path: &str, what: &str) {
        self.shown.wrong.push(format!("{path}: {what}"));
    }

    fn all(&mut self) {
        for (path, entry) in self.expected {
            let mut counted = Vec::new();
            let found = self.find(path, &mut counted);
            if let Some(attributes) = self.note(path, None, found) {
                match attributes {
                    Some(attributes) => self.compare(path, entry, &attributes),
                    None => self.wrong(path, "is not there"),
                }
            }
            counted.into_iter().for_each(|node| self.vfs.forget(node, 1));
        }
    }

    /// `None`: there is no such name.
    fn find(&self, path: &str, counted: &mut Vec<u64>) -> Result<Option<Attributes>> {
        let mut at = self.vfs.get_attributes(&CALLER, ROOT, None)?;
        for name in path.split('/').filter(|name| !name.is_empty()) {
            match self.vfs.lookup(&CALLER, at.node, OsStr::new(name))? {
                Lookup::Found(entry) => {
                    at = entry.attributes;
                    counted.push(at.node);
                }
                Lookup::Absent => return Ok(None),
            }
        }
        Ok(Some(at))
    }

    fn compare(&mut self, path: &str, entry: &Entry, attributes: &Attributes) {
        let node = attributes.node;
        match (&entry.kind, attributes.file_type) {
            (Kind::File(bytes), FileType::Regular) => self.file(path, bytes, attributes),
            (Kind::Directory, FileType::Directory) => self.directory(path, node),
            (Kind::SymbolicLink(target), FileType::Symlink) => {
                let read = self.vfs.readlink(&CALLER, node);
                if self.note(path, None, read).is_some_and(|read| *read != *target.as_bytes()) {
                    self.wrong(path, "another target");
                }
            }
            (_, other) => self.wrong(path, &format!("is a {other:?}")),
        }
        if !matches!(entry.kind, Kind::SymbolicLink(_)) && attributes.permissions != entry.mode {
            self.wrong(path, "another mode");
        }
        for (name, value) in &entry.xattrs {
            let read = self.vfs.get_xattr(&CALLER, node, OsStr::new(name));
            if self.note(path, None, read).is_some_and(|read| *read != *value.as_bytes()) {
                self.wrong(path, "another attribute");
            }
        }
    }

    /// No name that is not expected. (That the expected ones are there is seen one by one.)
    fn directory(&mut self, path: &str, node: u64) {
        let opened = self.vfs.opendir(&CALLER, node, 0);
        let Some(opened) = self.note(path, None, opened) else { return };
        let mut names = Vec::new();
        let listed = self.vfs.readdir(&CALLER, node, opened.handle, 0, &mut |entry| {
            names.push(entry.name.to_string_lossy().into_owned());
            Emitted::Accepted
        });
        self.note(path, None, listed);
        let released = self.vfs.releasedir(node, opened.handle);
        self.note(path, None, released);
        for name in names.iter().filter(|name| *name != "." && *name != "..") {
            let path = format!("{}/{name}", path.trim_end_matches('/'));
            if !self.expected.contains_key(&path) {
                self.wrong(&path, "should not be there");
            }
        }
    }

    /// Block by block: one that cannot be read takes no other with it.
    fn file(&mut self, path: &str, expected: &[u8], attributes: &Attributes) {
        if attributes.size_bytes != expected.len() as u64 {
            return self.wrong(path, &format!("{} bytes, not {}", attributes.size_bytes, expected.len()));
        }
        let node = attributes.node;
        let opened = self.vfs.open(&CALLER, node, 0);
        let Some(opened) = self.note(path, None, opened) else { return };
        for (number, block) in expected.chunks(BLOCK_BYTES as usize).enumerate() {
            let offset = number as u64 * BLOCK_BYTES;
            let request = ReadRequest {
                node,
                handle: opened.handle,
                offset,
                length_bytes: BLOCK_BYTES as u32,
                direct: number % 5 == 4,
            };
            let read = self.vfs.read(&CALLER, &request).map(|pages| pages.slices().collect::<Vec<_>>().concat());
            if self.note(path, Some(offset), read).is_some_and(|read| read != block) {
                self.wrong(path, &format!("other bytes at {offset}"));
            }
        }
        let released = self.vfs.release(node, opened.handle);
        self.note(path, None, released);
    }
}
