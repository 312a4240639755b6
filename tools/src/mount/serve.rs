//! Open, mount, serve, close.

use std::path::Path;
use std::sync::{Arc, mpsc};

use anyhow::{Context, anyhow};
use coppicefs::fuse::mounts::{MountRequest, Mounted};
use coppicefs::fuse::{Operations, Session, SessionSettings};
use coppicefs::options::{AccessTimes, CacheMode, MountOptions};
use rustix::io::Errno;
use rustix::mount::MountFlags;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::{MountCommand, Mountable, Target, logging};

/// The kernel caps FUSE's readahead at 128 KiB; root may raise it. Two of the largest requests.
const READ_AHEAD_KIB: u32 = 2048;

/// Mounts and serves until the mount is gone, then closes the filesystem. `report` is called once the mount is usable.
pub(super) fn serve<M: Mountable>(
    command: &MountCommand,
    options: MountOptions,
    open: impl FnOnce(&Target, &MountOptions) -> coppicefs::Result<M>,
    report: impl FnOnce(()) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    if command.daemon {
        logging::to_system(command.verbose, options.log.as_deref())?;
    }
    // Blocked until there is something to unmount; a second thread takes them from then on.
    let signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).context("cannot handle signals")?;
    let target = Target::resolve(&command.spec, &command.directory)?;
    let request = MountRequest {
        source: target.source.clone(),
        directory: target.directory.clone(),
        flags: mount_flags(&options),
        allow_other: options.allow_other.unwrap_or_else(|| rustix::process::geteuid().is_root()),
    };
    let settings = SessionSettings { cache: options.cache, threads: options.threads.unwrap_or_else(default_threads) };
    let filesystem = open(&target, &options).map_err(|error| with_way_out(error, &target.image))?;
    if command.daemon {
        // Holds no directory busy; the paths are absolute.
        std::env::set_current_dir("/").context("cannot change to /")?;
    }
    let served = mount_and_serve(&filesystem, &request, settings, signals, report);
    let closed = filesystem.close().context("closing the filesystem failed");
    match &closed {
        Ok(()) => tracing::info!(image = %target.image.display(), "closed"),
        Err(error) => tracing::error!(image = %target.image.display(), "{error:#}"),
    }
    served.and(closed)
}

/// Damage that keeps an image from being mounted names the tools that help, where it does not do so itself.
fn with_way_out(error: coppicefs::Error, image: &Path) -> anyhow::Error {
    if !error.is_media_error() || error.to_string().contains("fsck") {
        return error.into();
    }
    let image = image.display();
    anyhow!(
        "{error}: `coppice restore {image} DIR` copies out what can be read, `fsck.coppice -n {image}` says what can be repaired"
    )
}

fn mount_and_serve<M: Mountable>(
    filesystem: &M,
    request: &MountRequest,
    settings: SessionSettings,
    signals: Signals,
    report: impl FnOnce(()) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let operations = filesystem.operations();
    let session = Session::mount(Arc::clone(&operations), request, settings)?;
    let mounted = session.mounted().clone();
    tracing::debug!(negotiated = ?session.negotiated(), "agreed with the kernel");
    if settings.cache == CacheMode::Writeback {
        hold_landing_reserve(&*operations, &mounted);
    }
    let handle = signals.handle();
    let watched = mounted.clone();
    // The first end of the session: its own, or given up by a second signal.
    let (end, ended) = mpsc::channel();
    let give_up = end.clone();
    let watcher = std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || watch_signals(signals, &watched, &give_up))
        .context("cannot start a thread")?;
    std::thread::Builder::new()
        .name("server".into())
        .spawn(move || {
            let served = session.serve();
            let _ = end.send(served.map_err(Into::into));
        })
        .context("cannot start a thread")?;
    if let Err(error) = check_usable(&mounted).and_then(|()| report(())) {
        let _ = mounted.unmount(true);
        let _ = ended.recv();
        return Err(error);
    }
    tracing::info!(source = ?request.source, directory = %request.directory.display(), "mounted");
    let served = ended.recv().unwrap_or_else(|_| Err(anyhow!("the serving thread panicked")));
    handle.close();
    let _ = watcher.join();
    let panics = operations.metrics().vfs_panics.get();
    if panics > 0 {
        tracing::error!(panics, "requests have panicked during this mount");
    }
    served
}

/// Keeps space for the writes that the kernel may delay, and has it delay no more than that, as far as we may.
fn hold_landing_reserve(operations: &impl Operations, mounted: &Mounted) {
    let most = operations.landing_bytes_max();
    let bytes = match mounted.dirty_bytes_max() {
        Ok(bytes) if bytes <= most => bytes,
        Ok(_) if mounted.set_dirty_bytes_max(most).is_ok() => most,
        other => {
            tracing::warn!(
                kernel = other.ok(),
                reserve = most,
                "the kernel may delay more than space is kept for: what does not fit is reported by fsync and close"
            );
            most
        }
    };
    operations.hold_landing_reserve(bytes);
}

/// One request through the kernel and back; and what root can do for speed.
fn check_usable(mounted: &Mounted) -> anyhow::Result<()> {
    rustix::fs::statfs(mounted.directory()).context("the mount does not answer")?;
    if rustix::process::geteuid().is_root()
        && let Err(error) = mounted.set_read_ahead_kib(READ_AHEAD_KIB)
    {
        tracing::warn!("cannot raise the kernel's readahead, sequential reads will be slower: {error}");
    }
    Ok(())
}

/// SIGTERM and SIGINT unmount; a second one ends what still keeps the mount busy. SIGHUP does as SIGTERM: only a daemon that has lost
/// its terminal gets it.
fn watch_signals(mut signals: Signals, mounted: &Mounted, give_up: &mpsc::Sender<anyhow::Result<()>>) {
    for (count, signal) in signals.forever().enumerate() {
        if count > 0 {
            tracing::warn!(signal, "ending the connection; what is under way fails");
            if let Err(error) = mounted.abort() {
                // The filesystem is closed, and the connection ends with this process.
                tracing::debug!("cannot end the connection by itself: {error}");
                let _ = give_up.send(Ok(()));
            }
            continue;
        }
        tracing::info!(signal, "unmounting");
        let outcome = match mounted.unmount(false) {
            Err(error) if error.errno() == Errno::BUSY => {
                tracing::warn!("the mount is busy: it is taken out of the tree, and served until its files are closed");
                mounted.unmount(true)
            }
            other => other,
        };
        if let Err(error) = outcome {
            tracing::error!("cannot unmount: {error}");
        }
    }
}

fn mount_flags(options: &MountOptions) -> MountFlags {
    let mut flags = match options.access_times {
        AccessTimes::Never => MountFlags::NOATIME,
        AccessTimes::Relative => MountFlags::RELATIME,
        AccessTimes::Always => MountFlags::STRICTATIME,
    };
    for (wanted, flag) in [
        (options.read_only, MountFlags::RDONLY),
        (!options.devices, MountFlags::NODEV),
        (!options.set_id, MountFlags::NOSUID),
        (!options.execution, MountFlags::NOEXEC),
        (options.synchronous, MountFlags::SYNCHRONOUS),
        (options.directory_synchronous, MountFlags::DIRSYNC),
    ] {
        if wanted {
            flags |= flag;
        }
    }
    flags
}

/// Each thread blocks in one request: more than processors, to keep a device busy; each holds up to 1 MiB of request.
fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(8, |count| (count.get() * 4).clamp(8, 32))
}
