//! The directory that is copied to. Every name is one component, made safe, and opened relative to the directory above it without following symbolic
//! links: so nothing that an image holds leads outside, whatever was copied before.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::rc::Rc;

use anyhow::{Context as _, bail};
use coppicefs::format::namespace::NAME_BYTES_MAX;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, linkat, mkdirat, openat};
use rustix::io::Errno;

/// Deepest place that is copied: corrupt directories may go on for ever, and a path must be walked.
const DEPTH_MAX: usize = 2048;

/// A place below the target directory.
#[derive(Debug)]
pub(super) struct Place {
    parent: Option<Rc<Place>>,
    name: Vec<u8>,
    depth: usize,
}

impl Place {
    /// The place of a name, which may be anything, in a directory (`None`: the target itself).
    pub(super) fn new(parent: Option<&Rc<Self>>, name: &[u8], inode: u64) -> Rc<Self> {
        let depth = parent.map_or(0, |parent| parent.depth) + 1;
        Rc::new(Self { parent: parent.map(Rc::clone), name: safe(name, inode), depth })
    }

    /// The safe name.
    pub(super) fn name(&self) -> &[u8] {
        &self.name
    }

    /// It is deeper than what can be copied.
    pub(super) fn is_too_deep(&self) -> bool {
        self.depth > DEPTH_MAX
    }

    /// The directory that it is in.
    pub(super) fn parent(&self) -> Option<&Self> {
        self.parent.as_deref()
    }

    /// The same place under another name: when the name is taken.
    fn beside(&self, attempt: u32) -> Rc<Self> {
        let suffix = format!("~{attempt}");
        let kept = self.name.len().min(NAME_BYTES_MAX - suffix.len());
        let name = [self.name.get(..kept).unwrap_or_default(), suffix.as_bytes()].concat();
        Rc::new(Self { parent: self.parent.clone(), name, depth: self.depth })
    }

    fn names(&self) -> Vec<&[u8]> {
        let mut names = vec![self.name.as_slice()];
        let mut at = self.parent();
        while let Some(place) = at {
            names.push(&place.name);
            at = place.parent();
        }
        names.reverse();
        names
    }

    /// The path for people, from `/`.
    pub(super) fn path(place: Option<&Self>) -> String {
        place.map_or_else(
            || "/".to_owned(),
            |place| place.names().iter().map(|name| format!("/{}", name.escape_ascii())).collect(),
        )
    }
}

/// A name that is one component of a path.
fn safe(name: &[u8], inode: u64) -> Vec<u8> {
    if name.is_empty() || name == b"." || name == b".." {
        return format!("#{inode}").into_bytes();
    }
    let cut = name.get(..name.len().min(NAME_BYTES_MAX)).unwrap_or_default();
    cut.iter().map(|&byte| if byte == b'/' || byte == 0 { b'_' } else { byte }).collect()
}

/// The directory that is copied to.
pub(super) struct Target(OwnedFd);

/// A directory in it, open.
pub(super) struct Directory(OwnedFd);

impl AsFd for Directory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

impl Target {
    /// Opens it, and makes it if it is not there.
    pub(super) fn open(path: &Path, may_hold_something: bool) -> anyhow::Result<Self> {
        match rustix::fs::mkdir(path, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno).with_context(|| format!("cannot make {}", path.display())),
        }
        let opened = openat(CWD, path, DIRECTORY, Mode::empty());
        let opened = opened.with_context(|| format!("cannot open {} as a directory", path.display()))?;
        let mut entries = std::fs::read_dir(path).with_context(|| format!("cannot list {}", path.display()))?;
        if !may_hold_something && entries.next().is_some() {
            bail!(
                "{} is not empty: name another directory, or give --non-empty (nothing is overwritten)",
                path.display()
            );
        }
        Ok(Self(opened))
    }

    /// Opens a directory that was made before; the target itself for `None`.
    pub(super) fn directory(&self, place: Option<&Place>) -> anyhow::Result<Directory> {
        let mut at = self.0.try_clone()?;
        for name in place.map(Place::names).unwrap_or_default() {
            at = openat(&at, name, DIRECTORY | OFlags::NOFOLLOW, Mode::empty())
                .with_context(|| format!("cannot open {}", Place::path(place)))?;
        }
        Ok(Directory(at))
    }

    /// `lost+found` in it, made if the image had none.
    pub(super) fn lost_and_found(&self) -> anyhow::Result<Rc<Place>> {
        let place = Place::new(None, b"lost+found", 0);
        let root = self.directory(None)?;
        match mkdirat(&root, place.name(), Mode::RWXU) {
            Ok(()) => Ok(place),
            Err(Errno::EXIST) if self.directory(Some(&place)).is_ok() => Ok(place),
            Err(Errno::EXIST) => root.make_directory(place),
            Err(errno) => Err(errno).context("cannot make lost+found"),
        }
    }
}

impl Directory {
    /// Makes something under a name, or, if that is taken, under one beside it; nothing is overwritten.
    pub(super) fn make<T>(
        &self,
        mut place: Rc<Place>,
        make: impl Fn(&[u8]) -> rustix::io::Result<T>,
    ) -> anyhow::Result<(Rc<Place>, T)> {
        let wanted = Rc::clone(&place);
        for attempt in 1..10_000 {
            match make(place.name()) {
                Ok(made) => return Ok((place, made)),
                Err(Errno::EXIST) => place = wanted.beside(attempt),
                Err(errno) => {
                    return Err(errno).with_context(|| format!("cannot make {}", Place::path(Some(&place))));
                }
            }
        }
        bail!("all names beside {} are taken", Place::path(Some(&wanted)))
    }

    /// Makes a directory, for its owner alone until all is in it.
    pub(super) fn make_directory(&self, place: Rc<Place>) -> anyhow::Result<Rc<Place>> {
        Ok(self.make(place, |name| mkdirat(&self.0, name, Mode::RWXU))?.0)
    }

    /// Another name for a file that was copied.
    pub(super) fn link(&self, from: &Self, first: &Place, place: Rc<Place>) -> anyhow::Result<()> {
        self.make(place, |name| linkat(&from.0, first.name(), &self.0, name, AtFlags::empty())).map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_names_are_one_component() {
        for (hostile, made) in [
            (&b".."[..], &b"#7"[..]),
            (b".", b"#7"),
            (b"", b"#7"),
            (b"../../etc/passwd", b".._.._etc_passwd"),
            (b"/", b"_"),
            (b"a\0b", b"a_b"),
            (b"plain", b"plain"),
        ] {
            assert_eq!(safe(hostile, 7), made);
        }
        assert_eq!(safe(&[b'x'; 300], 7).len(), NAME_BYTES_MAX);
        let long = Place::new(None, &[b'x'; 255], 7);
        assert_eq!(long.beside(12).name().len(), NAME_BYTES_MAX);
    }

    #[test]
    fn a_symbolic_link_in_the_way_is_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(outside.path(), folder.path().join("link")).unwrap();
        let target = Target::open(folder.path(), true).unwrap();
        let link = Place::new(None, b"link", 1);
        assert!(target.directory(Some(&link)).is_err());
        let made = target.directory(None).unwrap().make_directory(link).unwrap();
        assert_eq!(made.name(), b"link~1");
        assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
        assert!(Target::open(folder.path(), false).is_err(), "not empty");
    }
}
