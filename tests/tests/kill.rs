//! SIGKILL of the daemon in the middle of work: what was fsynced is there after the next mount, and fsck finds nothing.
//!
//! `COPPICE_KILL_ROUNDS` (5) makes it longer, `COPPICE_KILL_SEED` repeats a run's operations (not its timing).

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Barrier;
use std::time::Duration;

use coppicefs::device::lock_holders;
use coppicefs_tests::limit::finish;
use coppicefs_tests::mount::{Site, command, count, number, wait_until};
use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};

/// What a thread knows of one of its files.
#[derive(Clone, Default)]
struct Known {
    /// As of the last fsync that returned; none: it had not been synced under this name.
    synced: Option<Vec<u8>>,
    /// What has been asked for since, in whatever order it may have become durable: block by block, any of these.
    later: Vec<Vec<u8>>,
    /// A removal or a rename away was asked for, and not made durable.
    may_be_gone: bool,
}

const FILES: u64 = 24;
const BLOCK: usize = 4096;
const LARGEST: usize = 24 * BLOCK;

/// Works until the daemon is gone. Returns the error kind that ended it.
fn work(folder: &Path, random: &mut Xoshiro256PlusPlus, files: &mut BTreeMap<String, Known>) -> std::io::Error {
    loop {
        let name = format!("file {}", random.next_u64() % FILES);
        if let Err(error) = step(folder, &name, random, files) {
            return error;
        }
    }
}

fn step(
    folder: &Path,
    name: &str,
    random: &mut Xoshiro256PlusPlus,
    files: &mut BTreeMap<String, Known>,
) -> std::io::Result<()> {
    let path = folder.join(name);
    let known = files.entry(name.to_owned()).or_default();
    let mut now = known.later.last().cloned().or_else(|| known.synced.clone()).unwrap_or_default();
    match random.next_u32() % 10 {
        // Removed, and durably so.
        0 => {
            known.may_be_gone = true;
            match fs::remove_file(&path) {
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                other => other?,
            }
            File::open(folder)?.sync_all()?;
            *known = Known::default();
        }
        // Replaced as editors do: a new file, fsynced, renamed over.
        1 | 2 => {
            let mut bytes = vec![0; (random.next_u32() as usize) % LARGEST];
            random.fill_bytes(&mut bytes);
            let temporary = folder.join(format!("{name}.new"));
            let file = File::create(&temporary)?;
            file.write_all_at(&bytes, 0)?;
            file.sync_all()?;
            // Either is whole: an earlier state of the old, or the new.
            known.later.push(bytes.clone());
            fs::rename(&temporary, &path)?;
            File::open(folder)?.sync_all()?;
            *known = Known { synced: Some(bytes), ..Known::default() };
        }
        // Written in the middle or at the end.
        operation => {
            let offset = (random.next_u32() as usize) % LARGEST;
            let mut bytes = vec![0; 1 + (random.next_u32() as usize) % (3 * BLOCK)];
            random.fill_bytes(&mut bytes);
            now.resize(now.len().max(offset + bytes.len()), 0);
            now[offset..offset + bytes.len()].copy_from_slice(&bytes);
            known.later.push(now.clone());
            let file = File::options().create(true).truncate(false).read(true).write(true).open(&path)?;
            file.write_all_at(&bytes, offset as u64)?;
            if operation < 8 {
                if operation < 6 {
                    file.sync_all()?
                } else {
                    file.sync_data()?
                }
                *known = Known { synced: Some(now), ..Known::default() };
            }
        }
    }
    Ok(())
}

/// What is there after a crash is what the thread knows, block by block one of the states since the last fsync.
fn check(folder: &Path, files: &BTreeMap<String, Known>, round: u64) {
    for (name, known) in files {
        let found = match fs::read(folder.join(name)) {
            Ok(found) => found,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                assert!(known.synced.is_none() || known.may_be_gone, "round {round}: {name} was fsynced and is gone");
                continue;
            }
            Err(error) => panic!("round {round}: {name}: {error}"),
        };
        let states: Vec<&[u8]> = known.synced.iter().chain(&known.later).map(Vec::as_slice).chain([&[][..]]).collect();
        let least = known
            .synced
            .as_ref()
            .map_or(0, Vec::len)
            .min(states[..states.len() - 1].iter().map(|state| state.len()).min().unwrap_or(0));
        assert!(found.len() >= least, "round {round}: {name} has {} bytes, {least} were fsynced", found.len());
        for (index, block) in found.chunks(BLOCK).enumerate() {
            let at = index * BLOCK;
            let fits = states.iter().any(|state| {
                // A state that ends before or in this block: the rest is zeros.
                let state = state.get(at..).unwrap_or_default();
                let state = &state[..state.len().min(block.len())];
                block[..state.len()] == *state && block[state.len()..].iter().all(|&byte| byte == 0)
            });
            // Without a later state there is only the one that was synced.
            let exact = known.later.is_empty() && known.synced.as_ref().is_some_and(|synced| *synced == found);
            let admitted = if known.later.is_empty() { exact } else { fits };
            assert!(
                admitted,
                "round {round}: block {index} of {name} ({} bytes) was never written like this",
                found.len()
            );
        }
        if known.later.is_empty()
            && let Some(synced) = &known.synced
        {
            assert_eq!(found.len(), synced.len(), "round {round}: {name}");
        }
    }
}

/// What is on the disk now is what the next round starts from.
fn adopt(folder: &Path, files: &mut BTreeMap<String, Known>) {
    for (name, known) in files.iter_mut() {
        *known = Known { synced: fs::read(folder.join(name)).ok(), ..Known::default() };
        if known.synced.is_some() {
            File::open(folder.join(name)).unwrap().sync_all().unwrap();
        }
    }
}

fn rounds(options: &str, format: &[&str], seed: u64) {
    const THREADS: u64 = 4;
    let rounds = count("COPPICE_KILL_ROUNDS", 5);
    let seed = number("COPPICE_KILL_SEED", seed);
    let Some(site) = Site::formatted("256M", format) else { return };
    let mut random = Xoshiro256PlusPlus::seed_from_u64(seed);
    let mut threads: Vec<BTreeMap<String, Known>> = (0..THREADS).map(|_| BTreeMap::new()).collect();
    site.mount(options);
    for thread in 0..THREADS {
        fs::create_dir(site.mnt().join(format!("thread {thread}"))).unwrap();
    }
    site.sync();
    for round in 0..rounds {
        let start = Barrier::new(threads.len() + 1);
        let seed = random.next_u64();
        let pause = Duration::from_millis(random.next_u64() % 700);
        std::thread::scope(|scope| {
            for (thread, files) in threads.iter_mut().enumerate() {
                let (site, start) = (&site, &start);
                scope.spawn(move || {
                    let mut random = Xoshiro256PlusPlus::seed_from_u64(seed ^ thread as u64);
                    start.wait();
                    let error = work(&site.mnt().join(format!("thread {thread}")), &mut random, files);
                    // What the kernel had delayed and can write no more is EIO for fsync.
                    let gone = [libc_code::ENOTCONN, libc_code::ECONNABORTED, libc_code::EIO].map(Some);
                    let gone = gone.contains(&error.raw_os_error());
                    assert!(gone, "round {round}: not the error of a dead daemon: {error}");
                });
            }
            start.wait();
            std::thread::sleep(pause);
            site.kill();
        });
        wait_until("the daemon is gone", || lock_holders(&site.image()).is_empty());
        // What `umount` of a dead mount does; every other time that is left to the mount itself.
        if round % 2 == 0 {
            let _ = finish(command("umount").arg("-l").arg(site.mnt()));
        }
        if round % 3 == 2 {
            let _ = finish(command("umount").arg("-l").arg(site.mnt()));
            // The log is replayed in memory: an image that needs it is clean.
            site.assert_clean();
        }
        site.mount(options);
        for (thread, files) in threads.iter_mut().enumerate() {
            let folder = site.mnt().join(format!("thread {thread}"));
            check(&folder, files, round);
            adopt(&folder, files);
        }
        site.unmount_and_check();
        site.mount(options);
    }
    site.unmount_and_check();
}

/// What the kernel answers for a daemon that is gone.
mod libc_code {
    pub const ENOTCONN: i32 = rustix::io::Errno::NOTCONN.raw_os_error();
    pub const ECONNABORTED: i32 = rustix::io::Errno::CONNABORTED.raw_os_error();
    pub const EIO: i32 = rustix::io::Errno::IO.raw_os_error();
}

#[test]
fn what_was_fsynced_survives_sigkill() {
    rounds("", &[], 1);
}

#[test]
fn with_the_kernels_delayed_writes() {
    rounds("cache=writeback", &[], 3);
}

#[test]
fn with_compression_and_the_daemons_cache() {
    rounds("cache=daemon,commit=5", &["--compression", "lz4"], 2);
}
