//! `coppice try`: the main job, end to end, on an image in a temporary folder, saying what it does.
//!
//! Everything goes through the same programs that people use: mkfs, the mount helper with its daemon, the kernel, SIGKILL, fsck.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::mpsc;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use coppicefs::device::lock_holders;
use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};

use crate::output::size;

/// What `coppice try` takes.
#[derive(Args, Clone, Debug)]
pub struct Arguments {
    /// Tree to copy in; the cargo registry's sources or a system folder if not given
    #[arg(long)]
    tree: Option<PathBuf>,
    /// Copy at most this many files
    #[arg(long, default_value = "4000")]
    files: usize,
    /// Keep the image, and say where it is
    #[arg(long)]
    keep: bool,
}

/// fsyncs that are waited for before the daemon is killed in the middle of the next writes.
const SYNCS_BEFORE_KILL: usize = 200;

struct Trial {
    program: PathBuf,
    image: PathBuf,
    mount: PathBuf,
    step: u32,
}

/// Unmounts what is left mounted when a step fails.
impl Drop for Trial {
    fn drop(&mut self) {
        let _ = self.unmount();
    }
}

/// Runs it.
///
/// # Errors
/// The first step that did not do what it should, with what to look at.
pub fn run(arguments: &Arguments) -> Result<()> {
    let folder = tempfile::Builder::new().prefix("coppice-try-").tempdir().context("making a temporary folder")?;
    let mut trial = Trial {
        program: std::env::current_exe().context("finding this program")?,
        image: folder.path().join("disk.img"),
        mount: folder.path().join("mnt"),
        step: 0,
    };
    fs::create_dir(&trial.mount)?;
    trial.all(arguments)?;
    let (image, mount) = (trial.image.clone(), trial.mount.clone());
    drop(trial);
    say!("\nIt works. To go on:");
    if arguments.keep {
        let kept = folder.keep();
        say!("  the image is {} in {}", image.display(), kept.display());
        say!("  coppice mount {} {}", image.display(), mount.display());
    } else {
        say!("  coppice mkfs disk.img --size 10G");
        say!("  mkdir -p mnt && coppice mount disk.img mnt");
    }
    say!("  coppice usage mnt; coppice stats mnt        # while it is mounted");
    say!("  umount mnt && coppice fsck -n disk.img       # fusermount3 -u mnt as an ordinary user");
    say!("  coppice install                              # then mount -t coppice disk.img mnt works");
    Ok(())
}

impl Trial {
    fn all(&mut self, arguments: &Arguments) -> Result<()> {
        self.say(&format!("format a new sparse image of 4 GiB: {}", self.image.display()));
        timed(|| self.coppice(&["mkfs", "--quiet", "--size", "4G"], &[&self.image]).map(done))?;

        self.say(&format!("mount it on {}: a daemon serves it", self.mount.display()));
        timed(|| self.mount().map(done))?;

        let source = source_tree(arguments)?;
        let mut files = Vec::new();
        list(&source, &source, arguments.files, &mut files)?;
        self.say(&format!("copy {} files and folders from {} in", files.len(), source.display()));
        let copy = self.mount.join("tree");
        let bytes = timed(|| copy_tree(&source, &copy, &files).map(|bytes| (bytes, size(bytes))))?;

        self.say("read it back and compare every byte");
        timed(|| compare_tree(&source, &copy, &files).map(|()| ((), size(bytes))))?;

        self.say(&format!(
            "write and fsync files from two threads; after {SYNCS_BEFORE_KILL} fsyncs kill the daemon with SIGKILL"
        ));
        let synced = timed(|| self.write_until_killed().map(done))?;

        self.say("mount it again: the journal is replayed, no fsck is needed");
        timed(|| self.mount().map(done))?;

        self.say(&format!("check the {} files that were fsynced", synced.len()));
        timed(|| self.check_synced(&synced).map(done))?;

        self.say("unmount, and run fsck -n (it waits for the daemon to finish)");
        timed(|| {
            self.unmount()?;
            self.coppice(&["fsck", "-n"], &[&self.image]).map(done)
        })?;
        Ok(())
    }

    fn say(&mut self, text: &str) {
        self.step += 1;
        say!("{}. {text}", self.step);
    }

    fn coppice(&self, words: &[&str], paths: &[&Path]) -> Result<()> {
        let status = Command::new(&self.program).args(words).args(paths).status().context("starting coppice")?;
        ensure!(status.success(), "`coppice {}` ended with {status}", words.join(" "));
        Ok(())
    }

    fn mount(&self) -> Result<()> {
        self.coppice(&["mount"], &[&self.image, &self.mount])
    }

    fn unmount(&self) -> Result<()> {
        if coppicefs::fuse::mounts::find(&self.mount)?.is_none() {
            return Ok(());
        }
        Ok(coppicefs::fuse::mounts::unmount(&self.mount, false, !rustix::process::geteuid().is_root())?)
    }

    /// Two threads write and fsync files until the daemon is gone. Returns the names and seeds of what was acknowledged.
    fn write_until_killed(&self) -> Result<Vec<(String, u64)>> {
        let daemon = lock_holders(&self.image);
        let [daemon] = daemon.as_slice() else { bail!("expected one daemon that holds the image, found {daemon:?}") };
        let daemon = rustix::process::Pid::from_raw(i32::try_from(*daemon)?).context("the daemon's process id")?;
        let folder = self.mount.join("synced");
        fs::create_dir(&folder)?;
        let synced = Mutex::new(Vec::new());
        let (sender, receiver) = mpsc::channel();
        std::thread::scope(|scope| {
            for thread in 0..2_u64 {
                let (folder, synced, sender) = (&folder, &synced, sender.clone());
                scope.spawn(move || {
                    for number in 0_u64.. {
                        let (name, seed) = (format!("{thread}-{number}"), number * 2 + thread);
                        // The write that fails is the one that met the kill.
                        if write_synced(&folder.join(&name), seed).is_err() {
                            return;
                        }
                        if let Ok(mut synced) = synced.lock() {
                            synced.push((name, seed));
                        }
                        let _ = sender.send(());
                    }
                });
            }
            drop(sender);
            for _ in 0..SYNCS_BEFORE_KILL {
                receiver.recv().context("a writer stopped before the daemon was killed")?;
            }
            rustix::process::kill_process(daemon, rustix::process::Signal::KILL).context("killing the daemon")?;
            Ok::<_, anyhow::Error>(())
        })?;
        Ok(synced.into_inner().unwrap_or_default())
    }

    fn check_synced(&self, synced: &[(String, u64)]) -> Result<()> {
        for (name, seed) in synced {
            let path = self.mount.join("synced").join(name);
            let found = fs::read(&path).with_context(|| format!("{} was fsynced and is gone", path.display()))?;
            ensure!(found == content(*seed), "{} was fsynced and has other content", path.display());
        }
        Ok(())
    }
}

/// Does a step and says how long it took; the step says what it did.
fn timed<T>(work: impl FnOnce() -> Result<(T, String)>) -> Result<T> {
    let start = Instant::now();
    let (value, what) = work()?;
    say!("   {what} in {:.2} s", start.elapsed().as_secs_f64());
    Ok(value)
}

fn done<T>(value: T) -> (T, String) {
    (value, "done".to_owned())
}

fn source_tree(arguments: &Arguments) -> Result<PathBuf> {
    if let Some(tree) = &arguments.tree {
        ensure!(tree.is_dir(), "{} is not a folder", tree.display());
        return Ok(tree.clone());
    }
    let cargo = std::env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".cargo")));
    let candidates =
        [cargo.map(|cargo| cargo.join("registry/src")), Some("/usr/include".into()), Some("/usr/share".into())];
    let found = candidates.into_iter().flatten().find(|path| path.is_dir());
    found.context("no tree to copy: name one with --tree")
}

#[derive(Debug)]
enum Kind {
    Folder,
    File,
    Link(PathBuf),
}

/// Lists up to `limit` files, folders and links below `folder`, parents before children, relative to `root`.
fn list(root: &Path, folder: &Path, limit: usize, found: &mut Vec<(PathBuf, Kind)>) -> Result<()> {
    let mut entries: Vec<_> =
        fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?.collect::<Result<_, _>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        if found.len() >= limit {
            return Ok(());
        }
        let path = entry.path();
        let relative = path.strip_prefix(root)?.to_path_buf();
        let kind = entry.file_type()?;
        if kind.is_dir() {
            found.push((relative, Kind::Folder));
            list(root, &path, limit, found)?;
        } else if kind.is_symlink() {
            found.push((relative, Kind::Link(fs::read_link(&path)?)));
        } else if kind.is_file() && File::open(&path).is_ok() {
            found.push((relative, Kind::File));
        }
    }
    Ok(())
}

fn copy_tree(source: &Path, target: &Path, files: &[(PathBuf, Kind)]) -> Result<u64> {
    fs::create_dir(target)?;
    let mut bytes = 0;
    for (relative, kind) in files {
        let (from, to) = (source.join(relative), target.join(relative));
        match kind {
            Kind::Folder => fs::create_dir(&to)?,
            Kind::Link(link) => symlink(link, &to)?,
            Kind::File => bytes += fs::copy(&from, &to).with_context(|| format!("copying {}", from.display()))?,
        }
    }
    Ok(bytes)
}

fn compare_tree(source: &Path, copy: &Path, files: &[(PathBuf, Kind)]) -> Result<()> {
    let (mut left, mut right) = (Vec::new(), Vec::new());
    for (relative, kind) in files {
        let (from, to) = (source.join(relative), copy.join(relative));
        match kind {
            Kind::Folder => ensure!(to.is_dir(), "{} is no folder", to.display()),
            Kind::Link(link) => ensure!(fs::read_link(&to)? == *link, "{} leads elsewhere", to.display()),
            Kind::File => {
                left.clear();
                right.clear();
                File::open(&from)?.read_to_end(&mut left)?;
                File::open(&to)?.read_to_end(&mut right)?;
                ensure!(left == right, "{} differs from its source", to.display());
                let modes = [&from, &to].map(|path| fs::metadata(path).map(|metadata| metadata.permissions().mode()));
                let [Ok(one), Ok(other)] = modes else { bail!("looking at {}", to.display()) };
                ensure!(one == other, "{} has mode {other:o}, its source {one:o}", to.display());
            }
        }
    }
    // The copy has no more than it should.
    let mut there = Vec::new();
    list(copy, copy, usize::MAX, &mut there)?;
    ensure!(there.len() == files.len(), "the copy has {} files and folders, its source {}", there.len(), files.len());
    ensure!(fs::metadata(copy)?.nlink() >= 2, "the copy's folder has too few links");
    Ok(())
}

/// Up to 64 KiB that only this seed makes.
fn content(seed: u64) -> Vec<u8> {
    let mut random = Xoshiro256PlusPlus::seed_from_u64(seed);
    let length = usize::try_from(random.next_u64() % 65_536).unwrap_or(0) + 1;
    let mut bytes = vec![0; length];
    random.fill_bytes(&mut bytes);
    bytes
}

fn write_synced(path: &Path, seed: u64) -> Result<()> {
    let mut file = File::create_new(path)?;
    file.write_all(&content(seed))?;
    file.sync_all()?;
    Ok(())
}
