//! Opening and making filesystems.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::{CHECKPOINT_IDLE, Filesystem, FormatOptions, format};
use crate::alloc::{Reserves, TestSwitches};
use crate::btree::{CheckpointLog, CheckpointReason, Forest, ForestConfig, NodeReader, Opening, UsedSlots};
use crate::data::{Compression, Data, DataOptions};
use crate::device::{BlockDevice, CheckedDevice, FileDevice, FileOptions, is_same_image};
use crate::env::{Env, Worker};
use crate::error::{Error, Result};
use crate::format::checkpoint::Checkpoint;
use crate::format::namespace::{FileType, Inode, LoggedOperation};
use crate::format::superblock::{KNOWN_READ_ONLY_COMPAT, Superblock};
use crate::format::{BtreeId, ChecksumKind, CompressionKind, Position};
use crate::journal::{Journal, JournalConfig, Log, journal_identity, read_log};
use crate::metrics::Metrics;
use crate::options::{AccessTimes, CacheMode, CompressionChoice, MountOptions};
use crate::pagecache::{Cache, CacheOptions, spawn_threads};
use crate::recovery::{
    InspectedCheckpoints, Salvage, SalvageOptions, choose_log, choose_older, inspect_checkpoints, present_reuse_check,
    replay, replay_index, replay_with_triggers, superblock,
};
use crate::scrub::{Scrub, ScrubConfig, ScrubKeeper, ScrubRequests};
use crate::snapshot::{Snapshots, stored_root, stored_subvolume};
use crate::space::Space;
use crate::sync::Mutex;
use crate::sync::atomic::AtomicU64;
use crate::transaction::{CommitOptions, Transaction, Transactions};
use crate::units::{BucketIndex, DeviceIndex, InodeNumber, SnapshotId};
use crate::vfs::{AccessTime, Vfs, VfsConfig, VfsOptions};
use crate::workers::{OnFailure, WorkerThreads};

/// The longest time that the devices may need for all that is dirty.
const DIRTY_TIME_MAX: Duration = Duration::from_secs(2);
/// Threads that read ahead what nobody waits for yet.
const READAHEAD_THREADS: usize = 2;

/// Which background jobs run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WorkerSet {
    /// All.
    #[default]
    All,
    /// Those that commits wait for: journal and checkpoints. Nothing changes that nobody asked for: for fsck.
    Essential,
}

/// How a filesystem is opened.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// Write nothing: the log is replayed in memory.
    pub read_only: bool,
    /// Show the state of this checkpoint, as it was when it was made. With `read_only` alone.
    pub checkpoint: Option<u64>,
    /// Background jobs.
    pub workers: WorkerSet,
    /// Budget in bytes for page cache and node cache together.
    pub cache_bytes: u64,
    /// How long a change may stay undurable; zero: every operation is durable when it returns.
    pub commit_interval: Duration,
    /// Compression of new data; mkfs's choice if not given.
    pub compression: Option<CompressionChoice>,
    /// Which reads change the access time.
    pub access_times: AccessTimes,
    /// Time, randomness and waiting; the host's if not given.
    pub env: Option<Arc<Env>>,
    /// Deliberate faults, for tests that prove that tests find them.
    pub switches: TestSwitches,
    /// Largest journal record in bytes.
    pub record_bytes_max: u32,
    /// Age at which dirty data is written back, at most; less where `commit_interval` asks for it.
    pub writeback_age: Duration,
    /// The kernel delays writes to files.
    pub kernel_delays_writes: bool,
    /// Everything is durable when it returns.
    pub synchronous: bool,
    /// Changes of names are durable when they return.
    pub directory_synchronous: bool,
    /// What is in use, whatever the trees say.
    pub known_in_use: KnownInUse,
    /// Open although keys mean nothing that a mount must understand: for fsck, which repairs them.
    pub for_repair: bool,
    /// Keeps the place of a scrub beyond the unmount. Not asked for the state of a `checkpoint`.
    pub scrub_keeper: Option<Arc<dyn ScrubKeeper>>,
}

/// What a check of the filesystem found to be in use although the trees say otherwise. To be known before anything is written: a checkpoint could
/// else go over it.
#[derive(Clone, Debug, Default)]
pub struct KnownInUse {
    /// Buckets: device and number.
    pub buckets: Vec<(u8, u64)>,
    /// All slots that hold nodes, with the number of the checkpoint whose they are, if the node-space map says something else.
    pub slots: Option<(u64, Vec<UsedSlots>)>,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            checkpoint: None,
            workers: WorkerSet::All,
            cache_bytes: default_cache_bytes(),
            commit_interval: Duration::from_secs(1),
            compression: None,
            access_times: AccessTimes::default(),
            env: None,
            switches: TestSwitches::default(),
            record_bytes_max: 1 << 20,
            writeback_age: Duration::from_secs(5),
            kernel_delays_writes: false,
            synchronous: false,
            directory_synchronous: false,
            known_in_use: KnownInUse::default(),
            for_repair: false,
            scrub_keeper: None,
        }
    }
}

impl From<&MountOptions> for OpenOptions {
    fn from(mount: &MountOptions) -> Self {
        Self {
            read_only: mount.read_only,
            checkpoint: mount.checkpoint,
            cache_bytes: mount.cache_bytes.unwrap_or_else(default_cache_bytes),
            commit_interval: mount.commit_interval,
            compression: mount.compression,
            access_times: mount.access_times,
            kernel_delays_writes: mount.cache == CacheMode::Writeback,
            synchronous: mount.synchronous,
            directory_synchronous: mount.directory_synchronous,
            ..Self::default()
        }
    }
}

/// How `commit_interval` is divided. All of a change is to be durable within it, delayed data included: data waits for three eighths of it,
/// the record that names it for a half, and an eighth is left for the writing.
impl OpenOptions {
    /// How long a record may wait for its flush. Zero stays zero: each operation is flushed.
    fn journal_interval(&self) -> Duration {
        self.commit_interval / 2
    }

    /// How long data may stay dirty.
    fn data_age(&self) -> Duration {
        if self.commit_interval.is_zero() {
            // Each operation writes back what it made dirty; only what the kernel delayed is left to age.
            return self.writeback_age;
        }
        self.writeback_age.min(self.commit_interval * 3 / 8)
    }

    /// How long the devices may need for all that is dirty: a half of the interval. What writeback leaves to its age is then at most what they write in
    /// an eighth of it. At most two seconds, since a sync, or the end of the mount, waits for that.
    fn dirty_time(&self) -> Duration {
        if self.commit_interval.is_zero() {
            return DIRTY_TIME_MAX;
        }
        (self.commit_interval / 2).min(DIRTY_TIME_MAX)
    }
}

/// A quarter of the host's memory.
fn default_cache_bytes() -> u64 {
    let info = rustix::system::sysinfo();
    let total = (info.totalram as u64).saturating_mul(u64::from(info.mem_unit));
    (total / 4).max(64 << 20)
}

/// Budget for nodes, out of the one for everything: a quarter, but not so little that a commit's nodes do not fit.
fn node_cache_bytes(options: &OpenOptions, superblock: &Superblock) -> u64 {
    (options.cache_bytes / 4).max(64 * u64::from(superblock.geometry.node_bytes))
}

/// What a log that was only looked at holds.
#[derive(Debug)]
pub struct InspectedLog {
    /// The superblock.
    pub superblock: Superblock,
    /// The checkpoint that replay would start from.
    pub checkpoint: Checkpoint,
    /// The records.
    pub log: Log,
}

/// How long a tool waits for a daemon that is shutting down.
const SHUTDOWN_WAIT: Duration = Duration::from_secs(30);

/// Opens a device with its lock. While the lock is held and no mount serves the image (a daemon is finishing after `umount`), waits for it.
pub(super) fn open_device(path: &Path, read_only: bool) -> Result<FileDevice> {
    open_device_with(path, &FileOptions { read_only, ..FileOptions::default() })
}

fn open_device_with(path: &Path, options: &FileOptions) -> Result<FileDevice> {
    let mut said = false;
    let mut mounted_at = None;
    let outcome = FileDevice::open_waiting(path, options, |error, waited| {
        mounted_at = mount_of(path);
        if mounted_at.is_some() || waited > SHUTDOWN_WAIT {
            return false;
        }
        if !std::mem::replace(&mut said, true) {
            tracing::warn!("{error}; waiting for it to finish");
        }
        true
    });
    match (outcome, mounted_at) {
        (Err(Error::InUse { .. }), Some(directory)) => Err(Error::Unusable(format!(
            "{} is in use, mounted at {directory}: unmount it first (umount {directory})",
            path.display()
        ))),
        (outcome, _) => outcome,
    }
}

/// Where the image is mounted by us, as far as this process can see.
fn mount_of(image: &Path) -> Option<String> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
    table.lines().find_map(|line| {
        let (fields, kind) = line.split_once(" - ")?;
        let mut kind = kind.split(' ');
        if kind.next()? != "fuse.coppice" {
            return None;
        }
        let source = unescape(kind.next()?);
        let directory = unescape(fields.split(' ').nth(4)?);
        // Unlike stat, statfs is never answered from the kernel's caches.
        let is_alive = rustix::fs::statfs(directory.as_str()).is_ok();
        (is_alive && is_same_image(Path::new(&source), image)).then_some(directory)
    })
}

/// /proc writes space, tab, newline and backslash in octal.
fn unescape(field: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(field.to_owned(), |text, (from, to)| text.replace(from, to))
}

/// Damage that a mount does not get around, and fsck does.
fn refused(error: Error) -> Error {
    match error {
        Error::Corrupt(mut corruption) => {
            corruption.problem.push_str(": `fsck.coppice -y` repairs it");
            Error::Corrupt(corruption)
        }
        error => error,
    }
}

fn check_features(superblock: &Superblock, read_only: bool) -> Result<()> {
    let unknown = superblock.read_only_compat & !KNOWN_READ_ONLY_COMPAT;
    if unknown != 0 && !read_only {
        return Err(Error::Unusable(format!(
            "this filesystem has features that this coppice cannot write ({unknown:#x}): mount it with -o ro, or use a newer coppice"
        )));
    }
    Ok(())
}

fn journal_config(superblock: &Superblock, devices: &[Arc<dyn BlockDevice>], options: &OpenOptions) -> JournalConfig {
    JournalConfig {
        filesystem: journal_identity(superblock),
        devices: devices.to_vec(),
        copies: superblock.layout.journal.clone(),
        bucket_bytes: superblock.geometry.bucket_bytes,
        record_bytes_max: options.record_bytes_max,
        commit_interval: Some(options.journal_interval()),
        switches: options.switches,
    }
}

fn data_options(superblock: &Superblock, options: &OpenOptions) -> Result<DataOptions> {
    let compression = match options.compression {
        Some(CompressionChoice::None) => Compression::NONE,
        Some(CompressionChoice::Lz4) => Compression::new(CompressionKind::Lz4, 0)?,
        Some(CompressionChoice::Zstd(level)) => Compression::new(CompressionKind::Zstd, level.into())?,
        None => {
            let kind = CompressionKind::from_stored(superblock.defaults.compression)?;
            Compression::new(kind, superblock.defaults.compression_level.into())?
        }
    };
    Ok(DataOptions {
        checksum: ChecksumKind::from_stored(superblock.defaults.checksum)?,
        compression,
        ..DataOptions::default()
    })
}

impl Filesystem {
    /// Opens the filesystem on an image file or a disk, locked.
    ///
    /// # Errors
    /// As [`Self::open`], and those of opening the device.
    pub fn open_path(path: &Path, options: &OpenOptions) -> Result<Arc<Self>> {
        let device = open_device(path, options.read_only)?;
        Self::open(vec![Arc::new(device)], options)
    }

    /// Opens a device, waiting for a daemon that is shutting down.
    ///
    /// # Errors
    /// [`Error::Unusable`] if it is mounted, [`Error::InUse`] if somebody else keeps it, and the host's.
    pub fn open_device_waiting(path: &Path, options: &FileOptions) -> Result<FileDevice> {
        open_device_with(path, options)
    }

    /// User and group of this process: who owns the root directory of a filesystem that it makes.
    #[must_use]
    pub fn caller_identity() -> (u32, u32) {
        (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw())
    }

    /// Opens an image for looking into it: nothing is written, few workers, a small cache.
    ///
    /// # Errors
    /// As [`Self::open_path`].
    pub fn open_for_reading(path: &Path) -> Result<Arc<Self>> {
        let options = OpenOptions {
            read_only: true,
            workers: WorkerSet::Essential,
            cache_bytes: 64 << 20,
            for_repair: true,
            ..OpenOptions::default()
        };
        Self::open_path(path, &options)
    }

    /// Reads the log of an image, and replays nothing.
    ///
    /// # Errors
    /// Those of opening, and a damaged journal.
    pub fn inspect_log(path: &Path) -> Result<InspectedLog> {
        let device: Arc<dyn BlockDevice> = Arc::new(open_device(path, true)?);
        let superblock = superblock::read(&*device)?.superblock;
        let devices = vec![device];
        let reader = NodeReader::new(Arc::new(superblock.clone()), devices.clone(), Arc::new(Metrics::default()));
        let checkpoint = reader.choose_checkpoint()?.newest;
        let log = read_log(&journal_config(&superblock, &devices, &OpenOptions::default()), &checkpoint)?;
        Ok(InspectedLog { superblock, checkpoint, log })
    }

    /// Looks at all checkpoints of an image. `progress` is told of each node that was read.
    ///
    /// # Errors
    /// Those of opening the device, and of the superblock.
    pub fn inspect_checkpoints(path: &Path, progress: &dyn Fn()) -> Result<InspectedCheckpoints> {
        inspect_checkpoints(Arc::new(open_device(path, true)?), progress)
    }

    /// Opens what is left of an image that cannot be mounted, for reading.
    ///
    /// # Errors
    /// As [`Salvage::open`], and those of opening the device.
    pub fn open_salvage(path: &Path, options: SalvageOptions) -> Result<Salvage> {
        Salvage::open(vec![Arc::new(open_device(path, true)?)], options)
    }

    /// Opens a filesystem: recovers it, and starts its workers.
    ///
    /// # Errors
    /// [`Error::Unusable`] with what to do; [`Error::Corrupt`] for damage that recovery cannot get around; the device's.
    pub fn open(devices: Vec<Arc<dyn BlockDevice>>, options: &OpenOptions) -> Result<Arc<Self>> {
        Self::open_prepared(devices, options, |_| Ok(()))
    }

    /// `prepare` runs when transactions work, before anything looks at what the trees hold.
    fn open_prepared(
        devices: Vec<Arc<dyn BlockDevice>>,
        options: &OpenOptions,
        prepare: impl FnOnce(&Transactions) -> Result<()>,
    ) -> Result<Arc<Self>> {
        if options.checkpoint.is_some() && !options.read_only {
            return Err(Error::Invalid(
                "checkpoint=N shows an older state, which nothing can be written to: mount it with -o ro,checkpoint=N"
                    .into(),
            ));
        }
        let env = options.env.clone().unwrap_or_else(Env::real);
        let metrics = Arc::new(Metrics::default());
        let checked: Vec<_> =
            devices.into_iter().map(|device| Arc::new(CheckedDevice::new(device, Arc::clone(&metrics)))).collect();
        let devices: Vec<Arc<dyn BlockDevice>> = checked.iter().map(|device| Arc::clone(device) as _).collect();
        let first = devices.first().ok_or_else(|| Error::Invalid("a filesystem needs a device".into()))?;
        let superblock = Arc::new(superblock::read(&**first)?.superblock);
        check_features(&superblock, options.read_only)?;
        if superblock.members.len() != devices.len() {
            return Err(Error::Unusable(format!(
                "the filesystem has {} devices, {} were given",
                superblock.members.len(),
                devices.len()
            )));
        }

        let reader = NodeReader::new(Arc::clone(&superblock), devices.clone(), Arc::clone(&metrics));
        let config = journal_config(&superblock, &devices, options);
        let (opening, log) = match options.checkpoint {
            Some(number) => choose_older(&reader, &config, number)?,
            None => choose_log(&reader, &config, options.read_only)?,
        };
        if !options.read_only {
            // The last records before a power cut may be in one copy only, and will be counted on.
            log.repair_copies(&config)?;
        }
        let oldest = opening.previous.as_ref().unwrap_or(&opening.newest);
        let start = log.start(&opening.newest, oldest)?;

        let forest = Forest::open(
            ForestConfig {
                superblock: Arc::clone(&superblock),
                devices: devices.clone(),
                cache_bytes: Arc::new(AtomicU64::new(node_cache_bytes(options, &superblock))),
                dirty_bytes_max: Reserves::of(&superblock).dirty_node_bytes_max,
                epoch: start.epoch,
            },
            &opening,
            Arc::clone(&env),
            Arc::clone(&metrics),
        )?;
        if let Some((number, slots)) = &options.known_in_use.slots {
            forest.correct_used_slots(*number, slots)?;
        }
        let with_triggers = options.switches.triggers_in_replay;
        let replayed = if with_triggers { replay_index(&forest, &log)? } else { replay(&forest, &log)? };
        let journal = Journal::open(config, start, Arc::clone(&env), Arc::clone(&metrics))?;
        let abandoned = Arc::downgrade(&forest);
        journal.on_latch(Arc::new(move |reason| {
            if let Some(forest) = abandoned.upgrade() {
                forest.abandon(reason);
            }
        }));
        forest.set_test_switches(options.switches);
        if !options.read_only {
            // The cut: nothing is overwritten before this record of the new epoch is durable.
            journal.flush(journal.newest())?;
        }
        let transactions =
            Transactions::new(Arc::clone(&forest), Arc::clone(&journal), Arc::clone(&env), Arc::clone(&metrics));
        let space = Space::open_with(
            Arc::clone(&superblock),
            devices.clone(),
            Arc::clone(&transactions),
            Arc::clone(&journal),
            Arc::clone(&env),
            Arc::clone(&metrics),
            options.switches,
        )?;
        let in_use = options.known_in_use.buckets.iter();
        space.withhold(&in_use.map(|&(device, bucket)| (DeviceIndex(device), BucketIndex(bucket))).collect::<Vec<_>>());
        forest.set_node_buckets(space.node_buckets());
        if with_triggers {
            replay_with_triggers(&transactions, &log)?;
        }
        prepare(&transactions)?;
        let filesystem = Self::assemble(
            superblock,
            checked,
            devices,
            env,
            metrics,
            forest,
            journal,
            transactions,
            space,
            opening,
            replayed,
            options,
        )?;
        if options.checkpoint.is_some() {
            filesystem.guard_older_state(&reader, options);
        }
        filesystem.start(options)?;
        if replayed.keys > 0 {
            tracing::info!(records = replayed.records, keys = replayed.keys, "recovered: the journal was replayed");
        }
        Ok(filesystem)
    }

    fn assemble(
        superblock: Arc<Superblock>,
        checked: Vec<Arc<CheckedDevice>>,
        devices: Vec<Arc<dyn BlockDevice>>,
        env: Arc<Env>,
        metrics: Arc<Metrics>,
        forest: Arc<Forest>,
        journal: Arc<Journal>,
        transactions: Arc<Transactions>,
        space: Arc<Space>,
        opening: Opening,
        replayed: crate::recovery::Replayed,
        options: &OpenOptions,
    ) -> Result<Arc<Self>> {
        let snapshots = if options.for_repair {
            Snapshots::root_alone()
        } else {
            Snapshots::load(&transactions).map_err(refused)?
        };
        let data = Data::new(
            &superblock,
            devices.clone(),
            Arc::clone(&transactions),
            Arc::clone(&space),
            Arc::clone(&snapshots),
            Arc::clone(&env),
            Arc::clone(&metrics),
            data_options(&superblock, options)?,
        );
        let page_bytes = options.cache_bytes.saturating_sub(node_cache_bytes(options, &superblock)).max(4 << 20);
        let cache = Cache::new(
            Arc::clone(&env),
            Arc::clone(&metrics),
            CacheOptions {
                block_bytes: superblock.geometry.block_bytes,
                spawn: if env.is_simulated() { None } else { Some(spawn_threads(READAHEAD_THREADS)?) },
                fault_add_lock_excludes_nobody: options.switches.add_lock_excludes_nobody,
                dirty_time: options.dirty_time(),
                ..CacheOptions::new(page_bytes)
            },
        )?;
        let vfs = Vfs::new(VfsConfig {
            transactions: Arc::clone(&transactions),
            journal: Arc::clone(&journal),
            space: Arc::clone(&space),
            data: Arc::clone(&data),
            snapshots,
            superblock: Arc::clone(&superblock),
            cache: Arc::clone(&cache),
            env: Arc::clone(&env),
            metrics: Arc::clone(&metrics),
            options: VfsOptions {
                read_only: options.read_only,
                access_time: match options.access_times {
                    AccessTimes::Never => AccessTime::Never,
                    AccessTimes::Relative => AccessTime::Relative,
                    AccessTimes::Always => AccessTime::Always,
                },
                writeback_age: options.data_age(),
                synchronous: options.synchronous,
                kernel_delays_writes: options.kernel_delays_writes,
                directory_synchronous: options.directory_synchronous,
                ..VfsOptions::default()
            },
        })?;
        let scrub = Scrub::new(ScrubConfig {
            superblock: Arc::clone(&superblock),
            devices: devices.clone(),
            forest: Arc::clone(&forest),
            journal: Arc::clone(&journal),
            transactions: Arc::clone(&transactions),
            data: Arc::clone(&data),
            space: Arc::clone(&space),
            vfs: Arc::clone(&vfs),
            env: Arc::clone(&env),
            read_only: options.read_only,
            keeper: options.scrub_keeper.clone().filter(|_| options.checkpoint.is_none()),
            on_failure: latch_on_failure(&vfs),
        });
        vfs.set_scrub(Arc::new(ScrubRequests(Arc::downgrade(&scrub))));
        Ok(Arc::new(Self {
            scrub,
            superblock,
            checked,
            devices,
            env,
            metrics,
            forest,
            journal,
            transactions,
            space,
            data,
            cache,
            vfs,
            opening,
            replayed,
            read_only: options.read_only,
            workers: Mutex::new(None),
        }))
    }

    /// Data of an older state is read only where it was not overwritten since.
    fn guard_older_state(&self, reader: &NodeReader, options: &OpenOptions) {
        let config = journal_config(&self.superblock, &self.devices, options);
        let mut warnings = Vec::new();
        let check = present_reuse_check(&self.superblock, &self.devices, reader, &config, &mut warnings);
        self.data.set_reuse_check(check);
        for warning in warnings {
            tracing::warn!("{warning}");
        }
        let record = &self.opening.newest;
        tracing::info!(
            "this is the state of checkpoint {}, of {} seconds after 1970",
            record.number,
            record.written_at
        );
    }

    /// Starts the workers, and makes what was replayed need no replay again.
    fn start(self: &Arc<Self>, options: &OpenOptions) -> Result<()> {
        if options.read_only {
            // Tools that look at keys may; whoever reads files must not see one half moved.
            let pending = match options.workers {
                WorkerSet::All => self.data.next_logged_operation().map_err(refused)?,
                WorkerSet::Essential => None,
            };
            return match pending {
                None | Some(LoggedOperation::Truncate { .. }) => Ok(()),
                Some(operation) if options.checkpoint.is_some() => Err(Error::Invalid(format!(
                    "an operation was under way when that checkpoint was made ({operation:?}): `coppice restore --checkpoint` copies what is there"
                ))),
                Some(operation) => Err(Error::Invalid(format!(
                    "a crash interrupted an operation ({operation:?}): mount read-write once, so that it is finished"
                ))),
            };
        }
        let log: Arc<dyn CheckpointLog> = Arc::clone(&self.journal) as _;
        let mut workers: Vec<Arc<dyn Worker>> = self.journal.workers();
        workers.push(self.forest.checkpoint_worker(Arc::clone(&log), CHECKPOINT_IDLE));
        if options.workers == WorkerSet::All {
            workers.extend(self.space.workers());
            workers.push(self.data.copygc_worker());
            workers.extend(self.vfs.workers());
        }
        let on_failure = latch_on_failure(&self.vfs);
        *self.workers.lock() = Some(WorkerThreads::start(&self.env, workers, &on_failure)?);
        // fsck looks first what may be written over.
        if self.replayed.keys > 0 && options.workers == WorkerSet::All {
            match self.forest.checkpoint(&*log, CheckpointReason::Requested) {
                // The worker tries again when something was deleted; until then the next mount replays again.
                Err(Error::NoSpace(reason)) => tracing::warn!("no checkpoint can be made now: {reason}"),
                outcome => drop(outcome?),
            }
        }
        if options.workers == WorkerSet::All {
            // Before anybody can use the inodes that they work on.
            while self.data.resume_logged_operation().map_err(refused)? {}
        }
        Ok(())
    }

    pub(super) fn take_checkpoint(&self, reason: CheckpointReason) -> Result<()> {
        self.forest.checkpoint(&*self.journal, reason).map(|_| ())
    }

    /// Makes a new filesystem on a device: everything on it is lost.
    ///
    /// # Errors
    /// [`Error::Unusable`] if the device is too small; the device's.
    pub fn format(device: &Arc<dyn BlockDevice>, options: &FormatOptions, env: &Arc<Env>) -> Result<Superblock> {
        let superblock = format::plan(options, device.size_bytes())?;
        format::write_empty(&**device, &superblock, env)?;
        let open = OpenOptions {
            workers: WorkerSet::Essential,
            cache_bytes: 32 << 20,
            env: Some(Arc::clone(env)),
            ..OpenOptions::default()
        };
        let filesystem = Self::open_prepared(vec![Arc::clone(device)], &open, |transactions| {
            transactions.run(CommitOptions::default(), |transaction| make_root(transaction, options, env)).map(|_| ())
        })?;
        filesystem.close()?;
        Ok(superblock)
    }
}

/// The first transaction of a filesystem: a snapshot, a subvolume that writes in it, and the subvolume's root directory.
fn make_root(transaction: &mut Transaction<'_>, options: &FormatOptions, env: &Env) -> Result<()> {
    let (position, value) = stored_root()?;
    transaction.put(BtreeId::Snapshots, position, value);
    let (position, value) = stored_subvolume()?;
    transaction.put(BtreeId::Subvolumes, position, value);
    let now = env.now().into();
    let root = Inode {
        mode: FileType::Directory.mode_bits() | 0o755,
        uid: options.owner.0,
        gid: options.owner.1,
        link_count: 2,
        generation: env.random_u64(),
        access_time: now,
        modification_time: now,
        change_time: now,
        birth_time: now,
        parent: InodeNumber::ROOT.0,
        ..Inode::default()
    };
    transaction.put(BtreeId::Inodes, Position::new(InodeNumber::ROOT.0, 0, SnapshotId::ROOT.0), root.encode()?);
    Ok(())
}

/// A worker that failed latches the filesystem.
fn latch_on_failure(vfs: &Arc<Vfs>) -> OnFailure {
    let latched = Arc::downgrade(vfs);
    Arc::new(move |name, error| {
        if let Some(vfs) = latched.upgrade() {
            vfs.latch(format!("worker {name} failed: {error}"));
        }
    })
}
