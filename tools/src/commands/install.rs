//! `coppice install`: copies this program into a prefix, and makes the links by which mount(8), fsck(8) and people find it.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;

/// What `coppice install` takes.
#[derive(Args, Clone, Debug)]
pub struct Arguments {
    /// Where to install: PREFIX/bin and PREFIX/sbin
    #[arg(long, default_value = "/usr/local")]
    prefix: PathBuf,
    /// Where mount(8) looks for its helpers; "none" for no links there (mount -t coppice needs them)
    #[arg(long, default_value = "/sbin")]
    helpers: PathBuf,
}

/// Names in PREFIX/bin by which the program is started; it looks at its own name.
const NAMES: &[&str] = &[
    "mkfs-coppice",
    "fsck-coppice",
    "mount-coppice",
    "mkfs.coppice",
    "fsck.coppice",
    "mount.coppice",
    "mount.fuse.coppice",
    "umount.fuse.coppice",
];
/// Names that mount(8), umount(8), mkfs(8) and fsck(8) look for.
const HELPERS: &[&str] =
    &["mkfs.coppice", "fsck.coppice", "mount.coppice", "mount.fuse.coppice", "umount.fuse.coppice"];

/// Runs it.
///
/// # Errors
/// If something cannot be written: nothing is half there under a name that is used, since the program is copied first.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let program = std::env::current_exe().context("finding this program")?;
    let bin = arguments.prefix.join("bin");
    fs::create_dir_all(&bin).with_context(|| format!("making {}", bin.display()))?;
    let installed = bin.join("coppice");
    let fresh = bin.join(".coppice.new");
    fs::copy(&program, &fresh).with_context(|| format!("copying to {}", fresh.display()))?;
    fs::rename(&fresh, &installed).with_context(|| format!("renaming to {}", installed.display()))?;
    say!("{}", installed.display());
    for name in NAMES {
        link(Path::new("coppice"), &bin.join(name))?;
    }
    if arguments.helpers != Path::new("none") {
        let installed = fs::canonicalize(&installed)?;
        for name in HELPERS {
            link(&installed, &arguments.helpers.join(name))?;
        }
    }
    Ok(())
}

/// Makes a link, in place of an older one of ours; refuses to replace anything that is not a link.
fn link(target: &Path, path: &Path) -> anyhow::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_symlink() => {
            fs::remove_file(path).with_context(|| format!("replacing {}", path.display()))?
        }
        Ok(_) => anyhow::bail!("{} is in the way and is not a link: remove it, or install elsewhere", path.display()),
        Err(_) => {}
    }
    symlink(target, path).with_context(|| format!("linking {}", path.display()))?;
    say!("{} -> {}", path.display(), target.display());
    Ok(())
}
