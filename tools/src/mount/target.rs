//! The image and the mountpoint: found, checked, and what cannot work refused in one line that says how to go on.

use std::ffi::OsString;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context, bail};
use coppicefs::device::is_same_image;
use coppicefs::fuse::FILE_SYSTEM_TYPE;
use coppicefs::fuse::mounts::{self, MountEntry};

/// How long a mount's root may take to answer before it counts as alive but slow.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// What is mounted where.
#[derive(Clone, Debug)]
pub struct Target {
    /// The image as given, for `/proc/mounts`.
    pub source: OsString,
    /// The image, absolute.
    pub image: PathBuf,
    /// The mountpoint, absolute and without links.
    pub directory: PathBuf,
}

/// Asks the daemon that serves a directory, if one does: statfs is never answered from the kernel's caches, as stat may be.
fn ask(directory: &Path) -> std::io::Result<()> {
    rustix::fs::statfs(directory).map(|_| ()).map_err(Into::into)
}

/// Whether a mount's daemon is gone. One that does not answer in time is alive.
fn is_dead(directory: &Path) -> bool {
    let (answer, answered) = mpsc::channel();
    let directory = directory.to_owned();
    std::thread::spawn(move || {
        let dead = ask(&directory).is_err_and(|error| mounts::is_dead(&error));
        let _ = answer.send(dead);
    });
    answered.recv_timeout(ANSWER_TIMEOUT).unwrap_or(false)
}

fn is_mount_of(entry: &MountEntry, image: &Path) -> bool {
    entry.file_system_type == FILE_SYSTEM_TYPE && is_same_image(Path::new(&entry.source), image)
}

impl Target {
    /// Finds and checks both. A dead mount of the same image at the mountpoint is detached.
    ///
    /// # Errors
    /// One line: what is wrong, and how to go on.
    pub(super) fn resolve(spec: &Path, directory: &Path) -> anyhow::Result<Self> {
        let metadata = match std::fs::metadata(spec) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                bail!("{0} does not exist: make an image with `mkfs-coppice {0} --size 10G`", spec.display())
            }
            Err(error) => bail!("cannot look at {}: {error}", spec.display()),
        };
        if metadata.is_dir() {
            bail!("{} is a directory: give an image file or a block device", spec.display());
        }
        if !metadata.is_file() && !metadata.file_type().is_block_device() {
            bail!("{} is neither a file nor a block device: give an image", spec.display());
        }
        let image = std::fs::canonicalize(spec).with_context(|| format!("cannot resolve {}", spec.display()))?;
        let directory = mountpoint(directory, &image)?;
        let target = Self { source: spec.into(), image, directory };
        if let Some(place) = target.served_at(false)? {
            bail!("{} is in use, mounted at {}: unmount it there first", spec.display(), place.display());
        }
        Ok(target)
    }

    /// Where a live daemon serves this image now, as far as the mount table shows. A source that was given as a relative path says
    /// nothing certain; it counts only with `also_relative`, when the image is known to be in use.
    ///
    /// # Errors
    /// If /proc cannot be read.
    pub fn served_at(&self, also_relative: bool) -> coppicefs::Result<Option<PathBuf>> {
        let found = mounts::list()?.into_iter().find(|entry| {
            (also_relative || Path::new(&entry.source).is_absolute())
                && is_mount_of(entry, &self.image)
                && !is_dead(&entry.directory)
        });
        Ok(found.map(|entry| entry.directory))
    }
}

/// The mountpoint, absolute and without links; a dead mount of `image` is taken off it.
fn mountpoint(directory: &Path, image: &Path) -> anyhow::Result<PathBuf> {
    let metadata = match ask(directory).and_then(|()| std::fs::metadata(directory)) {
        Err(error) if mounts::is_dead(&error) => {
            let path = resolve_last(directory)?;
            let entry = mounts::find(&path)?.filter(|entry| is_mount_of(entry, image));
            let Some(entry) = entry else {
                bail!(
                    "{0} is a mount of something else whose daemon is gone: `umount -l {0}` detaches it",
                    path.display()
                )
            };
            tracing::warn!(directory = %path.display(), source = ?entry.source, "detaching a dead mount of this image");
            mounts::unmount(&path, true, !rustix::process::geteuid().is_root())
                .with_context(|| format!("cannot detach the dead mount at {}", path.display()))?;
            std::fs::metadata(&path)
        }
        other => other,
    };
    match metadata {
        Ok(metadata) if !metadata.is_dir() => bail!("mountpoint {} is not a directory", directory.display()),
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            bail!("mountpoint {0} does not exist: `mkdir {0}` makes it", directory.display())
        }
        Err(error) => bail!("cannot look at the mountpoint {}: {error}", directory.display()),
    }
    std::fs::canonicalize(directory).with_context(|| format!("cannot resolve {}", directory.display()))
}

/// As canonicalize, without looking at the last component.
pub(super) fn resolve_last(path: &Path) -> anyhow::Result<PathBuf> {
    let path = std::path::absolute(path).with_context(|| format!("cannot resolve {}", path.display()))?;
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => Ok(std::fs::canonicalize(parent)
            .with_context(|| format!("cannot resolve {}", parent.display()))?
            .join(name)),
        _ => Ok(path),
    }
}
