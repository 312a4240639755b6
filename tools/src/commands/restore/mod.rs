//! `coppice restore`: copies out all that is readable from an image that cannot be mounted.
//!
//! Read-only on the image, best effort: what is lost is jumped over and said. Directories are walked from the root; what is then left without a name goes
//! to `lost+found`, under its inode number. Nothing that an image says can lead outside of the target directory: see `target`.

mod copy;
mod flags;
mod report;
mod target;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::rc::Rc;

use anyhow::Context as _;
use clap::Args;
use coppicefs::filesystem::Filesystem;
use coppicefs::format::journal::AccountingCounter;
use coppicefs::format::namespace::{Dirent, DirentBucket, FileType, Inode};
use coppicefs::format::{BtreeId, Position};
use coppicefs::recovery::{Salvage, SalvageOptions, Salvaged};
use coppicefs::units::{InodeNumber, SnapshotId};
use indicatif::{ProgressBar, ProgressStyle};

use report::Report;
use target::{Place, Target};

/// All was copied.
pub const EXIT_COMPLETE: u8 = 0;
/// Some of it could not be read, or nobody knows whether it is right.
pub const EXIT_INCOMPLETE: u8 = 4;
/// The copy itself could not be made.
pub const EXIT_OPERATIONAL: u8 = 8;

/// What `coppice restore` takes.
#[derive(Args, Clone, Debug)]
#[command(
    after_help = "Exit codes: 0 everything was copied, 4 a part could not be read or not be verified (it is listed), 8 no copy could be made."
)]
pub struct Arguments {
    /// Copy the state of then, of this checkpoint (`coppice checkpoints` lists them), instead of the present one
    #[arg(long, value_name = "N")]
    checkpoint: Option<u64>,
    /// Copy data without checksums, too, where nothing tells whether its space was used again since: such ranges of files, which are listed, may hold
    /// other bytes than the file's
    #[arg(long)]
    unverified: bool,
    /// Copy into a directory that is not empty; nothing in it is overwritten
    #[arg(long)]
    non_empty: bool,
    /// The report as JSON on standard output
    #[arg(long)]
    json: bool,
    /// Say nothing but what is lost
    #[arg(short, long)]
    quiet: bool,
    /// Image file or disk, not mounted; nothing is written to it
    image: PathBuf,
    /// Directory to copy to; made if it is not there
    directory: PathBuf,
}

/// What the inodes tree says of a number.
enum Known {
    Inode(Inode),
    Lost(String),
    Missing,
}

/// A copy that is being made.
struct Restore<'a> {
    salvage: &'a Salvage,
    /// Data that nothing can verify is copied.
    gives_unverified: bool,
    target: Target,
    report: Report,
    bar: ProgressBar,
    /// Inodes that were copied.
    visited: BTreeSet<u64>,
    /// Directories that have a place.
    placed: BTreeSet<u64>,
    /// Where the first name of a file with several is.
    links: BTreeMap<u64, Rc<Place>>,
    /// Directories that were made, parents first: their attributes are set at the end.
    made: Vec<(Option<Rc<Place>>, u64, Inode)>,
    /// Directories whose names are to be copied.
    pending: Vec<(u64, Option<Rc<Place>>)>,
    /// What has flags of chattr, `None` for the target itself: set when nothing else is to be done to anything.
    flagged: Vec<(Option<Rc<Place>>, u32)>,
}

/// Runs it; returns the exit code.
#[must_use]
pub fn run(arguments: &Arguments) -> u8 {
    match restore(arguments) {
        Ok(code) => code,
        Err(error) => {
            complain!("coppice: {error:#}");
            EXIT_OPERATIONAL
        }
    }
}

fn restore(arguments: &Arguments) -> anyhow::Result<u8> {
    let options = SalvageOptions { checkpoint: arguments.checkpoint, give_unverified: arguments.unverified };
    let salvage = Filesystem::open_salvage(&arguments.image, options)?;
    for warning in salvage.warnings() {
        complain!("coppice: warning: {warning}");
    }
    let target = Target::open(&arguments.directory, arguments.non_empty)?;
    let inodes = u64::try_from(salvage.totals().get(AccountingCounter::Inodes)).unwrap_or(0);
    let bar = if arguments.quiet { ProgressBar::hidden() } else { ProgressBar::new(inodes) };
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} inodes {msg} [{elapsed}, {eta} left]") {
        bar.set_style(style);
    }
    let mut restore = Restore {
        salvage: &salvage,
        gives_unverified: arguments.unverified,
        target,
        report: Report::new(&arguments.image, &arguments.directory, &salvage),
        bar,
        visited: BTreeSet::new(),
        placed: BTreeSet::new(),
        links: BTreeMap::new(),
        made: Vec::new(),
        pending: Vec::new(),
        flagged: Vec::new(),
    };
    let outcome = restore.everything();
    restore.bar.finish_and_clear();
    outcome.with_context(|| format!("cannot copy to {}", arguments.directory.display()))?;
    restore.report.print(arguments.json, arguments.quiet)
}

fn position(inode: u64, offset: u64) -> Position {
    Position::new(inode, offset, SnapshotId::ROOT.0)
}

/// For visitors of scans, which can fail only with the library's errors.
fn stopped(error: &anyhow::Error) -> coppicefs::Error {
    coppicefs::Error::Unusable(format!("{error:#}"))
}

impl Restore<'_> {
    fn everything(&mut self) -> anyhow::Result<()> {
        let root = match self.inode(InodeNumber::ROOT.0) {
            Known::Inode(inode) => inode,
            Known::Lost(reason) => {
                self.report.lose("/", format!("the root directory's attributes are lost: {reason}"));
                copy::unknown(FileType::Directory)
            }
            Known::Missing => {
                self.report.lose("/", "there is no root directory".into());
                copy::unknown(FileType::Directory)
            }
        };
        self.made.push((None, InodeNumber::ROOT.0, root));
        self.pending.push((InodeNumber::ROOT.0, None));
        self.walk()?;
        self.unnamed()?;
        while let Some((place, number, inode)) = self.made.pop() {
            let directory = self.target.directory(place.as_deref())?;
            let path = Place::path(place.as_deref());
            self.finish(&directory, number, &inode, &path);
            self.keep_flags(place, inode.flags);
        }
        self.set_flags()
    }

    fn inode(&self, number: u64) -> Known {
        let mut known = Known::Missing;
        let scanned = self.salvage.scan(BtreeId::Inodes, position(number, 0), position(number, 0), &mut |salvaged| {
            match salvaged {
                Salvaged::Key(_, value) => {
                    known = match Inode::decode(&value) {
                        Ok(inode) => Known::Inode(inode),
                        Err(error) => Known::Lost(error.to_string()),
                    };
                }
                Salvaged::Lost(lost) => known = Known::Lost(lost.reason),
            }
            Ok(())
        });
        match scanned {
            Ok(()) => known,
            Err(error) => Known::Lost(error.to_string()),
        }
    }

    /// Copies the pending directories, and those below them.
    fn walk(&mut self) -> anyhow::Result<()> {
        while let Some((number, place)) = self.pending.pop() {
            if !self.visited.insert(number) {
                continue;
            }
            self.bar.inc(1);
            self.report.directories += 1;
            let directory = self.target.directory(place.as_deref())?;
            let mut failed = None;
            let salvage = self.salvage;
            let outcome =
                salvage.scan(BtreeId::Dirents, position(number, 0), position(number, u64::MAX), &mut |found| {
                    let copied = match found {
                        Salvaged::Key(at, _) if at.snapshot != SnapshotId::ROOT.0 => Ok(()),
                        Salvaged::Key(_, value) => self.names(&directory, place.as_ref(), &value),
                        Salvaged::Lost(lost) => {
                            self.report
                                .lose(&Place::path(place.as_deref()), format!("names in it are lost: {}", lost.reason));
                            Ok(())
                        }
                    };
                    copied.map_err(|error| {
                        let stop = stopped(&error);
                        failed = Some(error);
                        stop
                    })
                });
            match (outcome, failed) {
                (_, Some(error)) => return Err(error),
                (outcome, None) => outcome?,
            }
        }
        Ok(())
    }

    fn names(&mut self, directory: &target::Directory, place: Option<&Rc<Place>>, value: &[u8]) -> anyhow::Result<()> {
        let bucket = match DirentBucket::decode(value) {
            Ok(bucket) => bucket,
            Err(error) => {
                self.report.lose(&Place::path(place.map(Rc::as_ref)), format!("a name in it is lost: {error}"));
                return Ok(());
            }
        };
        for Dirent { file_type, inode, name, .. } in bucket.0 {
            let here = Place::new(place, &name, inode.0);
            if here.is_too_deep() {
                self.report.lose(&Place::path(place.map(Rc::as_ref)), "what is below is too deep to be copied".into());
                return Ok(());
            }
            if here.name() != name {
                let path = Place::path(Some(&here));
                self.report.note(format!("{path}: its name was '{}', which cannot be a name", name.escape_ascii()));
            }
            self.entry(directory, here, inode.0, file_type)?;
        }
        Ok(())
    }

    /// Copies what a name stands for.
    fn entry(
        &mut self,
        directory: &target::Directory,
        mut here: Rc<Place>,
        number: u64,
        file_type: FileType,
    ) -> anyhow::Result<()> {
        let inode = match self.inode(number) {
            Known::Inode(inode) => inode,
            Known::Lost(reason) => {
                let path = Place::path(Some(&here));
                self.report.lose(&path, format!("its attributes are lost, its content may not be: {reason}"));
                copy::unknown(file_type)
            }
            Known::Missing => {
                self.report.lose(&Place::path(Some(&here)), format!("inode {number}, which it names, does not exist"));
                return Ok(());
            }
        };
        let file_type = inode.file_type().unwrap_or(file_type);
        if file_type == FileType::Directory {
            if number == InodeNumber::ROOT.0 || !self.placed.insert(number) {
                self.report.lose(&Place::path(Some(&here)), format!("directory {number} has another name already"));
                return Ok(());
            }
            here = directory.make_directory(here)?;
            self.made.push((Some(Rc::clone(&here)), number, inode));
            self.pending.push((number, Some(here)));
            return Ok(());
        }
        if let Some(first) = self.links.get(&number) {
            let from = self.target.directory(first.parent())?;
            directory.link(&from, first, here)?;
            self.report.hard_links += 1;
            return Ok(());
        }
        let here = self.copy(directory, here, number, file_type, inode.clone())?;
        self.visited.insert(number);
        self.bar.inc(1);
        if let Some(here) = here
            && inode.link_count > 1
        {
            self.links.insert(number, here);
        }
        Ok(())
    }

    /// Inodes that no directory led to.
    fn unnamed(&mut self) -> anyhow::Result<()> {
        let mut unnamed: BTreeMap<u64, FileType> = BTreeMap::new();
        let mut is_damaged = false;
        self.salvage.scan(BtreeId::Inodes, Position::MIN, Position::MAX, &mut |found| {
            match found {
                Salvaged::Key(at, value) => {
                    if let Ok(inode) = Inode::decode(&value)
                        && at.snapshot == SnapshotId::ROOT.0
                        && inode.link_count > 0
                        && !self.visited.contains(&at.inode)
                    {
                        unnamed.insert(at.inode, inode.file_type().unwrap_or(FileType::Regular));
                    }
                }
                Salvaged::Lost(lost) => {
                    is_damaged = true;
                    let (from, to) = (lost.from.inode, lost.to.inode);
                    self.report.lose("", format!("attributes of inodes {from} to {to} are lost: {}", lost.reason));
                }
            }
            Ok(())
        })?;
        if is_damaged {
            // What has names in it is a directory, what has data a file.
            self.without_attributes(BtreeId::Dirents, FileType::Directory, &mut unnamed)?;
            self.without_attributes(BtreeId::Extents, FileType::Regular, &mut unnamed)?;
        }
        if unnamed.is_empty() {
            return Ok(());
        }
        let lost_and_found = self.target.lost_and_found()?;
        let directory = self.target.directory(Some(&lost_and_found))?;
        // Those that another one leads to come with it; in a ring of directories one is taken for the first.
        let below = self.children_of(&unnamed)?;
        let first: Vec<_> = unnamed.iter().filter(|(number, _)| !below.contains(number)).collect();
        let rest: Vec<_> = unnamed.iter().filter(|(number, _)| below.contains(number)).collect();
        for (&number, &file_type) in first.into_iter().chain(rest) {
            if self.visited.contains(&number) {
                continue;
            }
            self.report.unnamed += 1;
            let here = Place::new(Some(&lost_and_found), format!("#{number}").as_bytes(), number);
            self.entry(&directory, here, number, file_type)?;
            self.walk()?;
        }
        Ok(())
    }

    /// Numbers that have keys in a tree, and whose inodes are lost.
    fn without_attributes(
        &self,
        btree: BtreeId,
        file_type: FileType,
        unnamed: &mut BTreeMap<u64, FileType>,
    ) -> coppicefs::Result<()> {
        let mut from = Some(Position::MIN);
        while let Some(start) = from.take() {
            let mut found = None;
            // One key of each inode is enough.
            let _ = self.salvage.scan(btree, start, Position::MAX, &mut |salvaged| match salvaged {
                Salvaged::Key(at, _) => {
                    found = Some(at.inode);
                    Err(coppicefs::Error::Restart)
                }
                Salvaged::Lost(_) => Ok(()),
            });
            let Some(number) = found else { break };
            if !self.visited.contains(&number)
                && !unnamed.contains_key(&number)
                && matches!(self.inode(number), Known::Lost(_))
            {
                unnamed.insert(number, file_type);
            }
            from = number.checked_add(1).map(|next| Position::new(next, 0, 0));
        }
        Ok(())
    }

    fn children_of(&self, unnamed: &BTreeMap<u64, FileType>) -> anyhow::Result<BTreeSet<u64>> {
        let mut below = BTreeSet::new();
        for (&number, _) in unnamed.iter().filter(|(_, file_type)| **file_type == FileType::Directory) {
            self.salvage.scan(BtreeId::Dirents, position(number, 0), position(number, u64::MAX), &mut |found| {
                if let Salvaged::Key(_, value) = found
                    && let Ok(bucket) = DirentBucket::decode(&value)
                {
                    below.extend(bucket.0.iter().map(|dirent| dirent.inode.0).filter(|child| *child != number));
                }
                Ok(())
            })?;
        }
        Ok(below)
    }
}
