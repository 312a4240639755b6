//! The one table of mount options: name, value, default, help, and what each sets. Parser, `--help`, man page and completions come
//! from it.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use crate::error::{Error, Result};

/// Which reads change the access time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AccessTimes {
    /// None (`noatime`).
    Never,
    /// Those of a file whose access time is older than its last change, or than a day (`relatime`).
    #[default]
    Relative,
    /// All (`strictatime`).
    Always,
}

/// Whose cache holds file data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheMode {
    /// The kernel's, for reads and mappings; every write reaches the daemon before write(2) returns.
    #[default]
    Kernel,
    /// The kernel's, for writes too: it delays them, and what then does not fit or cannot be written is reported by fsync and close.
    Writeback,
    /// The daemon's alone: every read and write reaches it; the kernel caches for mappings and splice only.
    Daemon,
}

/// How new file data is compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CompressionChoice {
    /// Not at all.
    #[default]
    None,
    /// LZ4.
    Lz4,
    /// zstd with this level, 1 to 19.
    Zstd(u8),
}

impl CompressionChoice {
    /// Level of zstd when none is given.
    pub const ZSTD_LEVEL_DEFAULT: u8 = 3;

    /// Parses `none`, `lz4`, `zstd` or `zstd:LEVEL`.
    ///
    /// # Errors
    /// [`Error::Invalid`] with what is accepted.
    pub fn parse(text: &str) -> Result<Self> {
        let wrong = || Error::Invalid(format!("compression `{text}` is none of: none, lz4, zstd, zstd:1 to zstd:19"));
        match text.split_once(':') {
            None if text == "none" => Ok(Self::None),
            None if text == "lz4" => Ok(Self::Lz4),
            None if text == "zstd" => Ok(Self::Zstd(Self::ZSTD_LEVEL_DEFAULT)),
            Some(("zstd", level)) => match level.parse() {
                Ok(level @ 1..=19) => Ok(Self::Zstd(level)),
                _ => Err(wrong()),
            },
            _ => Err(wrong()),
        }
    }
}

/// What a mount was asked to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountOptions {
    /// Nothing is written, not even by recovery.
    pub read_only: bool,
    /// Which reads change the access time.
    pub access_times: AccessTimes,
    /// Device nodes work.
    pub devices: bool,
    /// Set-user-id and set-group-id bits work.
    pub set_id: bool,
    /// Programs may be run.
    pub execution: bool,
    /// All writes are durable before they return.
    pub synchronous: bool,
    /// All changes of directories are durable before they return.
    pub directory_synchronous: bool,
    /// Whose cache holds file data.
    pub cache: CacheMode,
    /// Budget of page cache and node cache together, in bytes; `None` is a quarter of the memory.
    pub cache_bytes: Option<u64>,
    /// Threads that serve requests; `None` is by the number of processors.
    pub threads: Option<usize>,
    /// How new data is compressed; `None` is what mkfs wrote.
    pub compression: Option<CompressionChoice>,
    /// What is written becomes durable at the latest after this time. Zero: with each operation.
    pub commit_interval: Duration,
    /// Whether other users may use the mount; `None` is: if root makes it.
    pub allow_other: Option<bool>,
    /// Where the daemon logs to; `None` is syslog.
    pub log: Option<PathBuf>,
    /// The state of this checkpoint is shown, not the present one.
    pub checkpoint: Option<u64>,
}

impl Default for MountOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            access_times: AccessTimes::Relative,
            devices: false,
            set_id: false,
            execution: true,
            synchronous: false,
            directory_synchronous: false,
            cache: CacheMode::Kernel,
            cache_bytes: None,
            threads: None,
            compression: None,
            commit_interval: Duration::from_secs(1),
            allow_other: None,
            log: None,
            checkpoint: None,
        }
    }
}

/// Smallest budget that `cache_size=` accepts, in bytes.
pub const CACHE_BYTES_MIN: u64 = 16 << 20;
/// Most threads that `threads=` accepts.
pub const THREADS_MAX: usize = 256;
/// Longest interval that `commit=` accepts, in seconds.
pub const COMMIT_SECONDS_MAX: u64 = 300;

/// How an option sets its field.
#[derive(Clone, Copy)]
pub enum Setter {
    /// It has no value.
    Flag(fn(&mut MountOptions)),
    /// It needs a value; the text names it in the help.
    Value(&'static str, fn(&mut MountOptions, &str) -> Result<()>),
    /// It speaks to mount(8), not to a filesystem: accepted, with or without a value.
    Generic,
}

/// One row of the table.
#[derive(Clone, Copy)]
pub struct OptionDefinition {
    /// Name in `-o`.
    pub name: &'static str,
    /// What it does to the options.
    pub setter: Setter,
    /// Whether it is what happens without it.
    pub default: bool,
    /// One sentence.
    pub help: &'static str,
}

const fn flag(name: &'static str, default: bool, set: fn(&mut MountOptions), help: &'static str) -> OptionDefinition {
    OptionDefinition { name, setter: Setter::Flag(set), default, help }
}

const fn value(
    name: &'static str,
    metavariable: &'static str,
    set: fn(&mut MountOptions, &str) -> Result<()>,
    help: &'static str,
) -> OptionDefinition {
    OptionDefinition { name, setter: Setter::Value(metavariable, set), default: false, help }
}

const fn generic(name: &'static str) -> OptionDefinition {
    OptionDefinition { name, setter: Setter::Generic, default: false, help: "" }
}

/// The table.
pub const MOUNT_OPTIONS: &[OptionDefinition] = &[
    flag(
        "ro",
        false,
        |o| o.read_only = true,
        "mount read-only: nothing is written to the image, recovery runs in memory",
    ),
    flag("rw", true, |o| o.read_only = false, "mount read-write"),
    flag("noatime", false, |o| o.access_times = AccessTimes::Never, "reads never change access times"),
    flag(
        "relatime",
        true,
        |o| o.access_times = AccessTimes::Relative,
        "reads change an access time that is older than the last change, or than a day",
    ),
    flag("strictatime", false, |o| o.access_times = AccessTimes::Always, "every read changes the access time"),
    flag("dev", false, |o| o.devices = true, "device nodes work (root only)"),
    flag("nodev", true, |o| o.devices = false, "device nodes do not work"),
    flag("suid", false, |o| o.set_id = true, "set-user-id and set-group-id bits work (root only)"),
    flag("nosuid", true, |o| o.set_id = false, "set-user-id and set-group-id bits do not work"),
    flag("exec", true, |o| o.execution = true, "programs may be run"),
    flag("noexec", false, |o| o.execution = false, "programs may not be run"),
    flag("sync", false, |o| o.synchronous = true, "writes are durable before they return"),
    flag("async", true, |o| o.synchronous = false, "writes become durable by fsync, or after the commit interval"),
    flag("dirsync", false, |o| o.directory_synchronous = true, "changes of directories are durable before they return"),
    value(
        "cache",
        "kernel|writeback|daemon",
        |o, text| {
            o.cache = match text {
                "kernel" => CacheMode::Kernel,
                "writeback" => CacheMode::Writeback,
                "daemon" => CacheMode::Daemon,
                _ => return Err(Error::Invalid(format!("cache `{text}` is none of: kernel, writeback, daemon"))),
            };
            Ok(())
        },
        "whose cache holds file data: the kernel's for reads (default), the kernel's for delayed writes too, or the daemon's alone",
    ),
    value(
        "cache_size",
        "SIZE",
        |o, text| {
            let bytes = parse_size(text)?;
            if bytes < CACHE_BYTES_MIN {
                return Err(Error::Invalid(format!("cache_size `{text}` is too small: 16M is the least")));
            }
            o.cache_bytes = Some(bytes);
            Ok(())
        },
        "memory for the page cache and the node cache together (default: a quarter of the machine's)",
    ),
    value(
        "threads",
        "COUNT",
        |o, text| {
            o.threads = match text.parse() {
                Ok(count) if (1..=THREADS_MAX).contains(&count) => Some(count),
                _ => return Err(Error::Invalid(format!("threads `{text}` is not a number from 1 to {THREADS_MAX}"))),
            };
            Ok(())
        },
        "threads that serve requests (default: by the number of processors)",
    ),
    value(
        "compression",
        "none|lz4|zstd[:LEVEL]",
        |o, text| {
            o.compression = Some(CompressionChoice::parse(text)?);
            Ok(())
        },
        "how new data is compressed (default: what mkfs was told)",
    ),
    value(
        "commit",
        "SECONDS",
        |o, text| {
            o.commit_interval = match text.parse() {
                Ok(seconds @ 0..=COMMIT_SECONDS_MAX) => Duration::from_secs(seconds),
                _ => {
                    return Err(Error::Invalid(format!(
                        "commit `{text}` is not a number of seconds from 0 to {COMMIT_SECONDS_MAX}"
                    )));
                }
            };
            Ok(())
        },
        "what is written becomes durable at the latest after this (default 1; 0: with each operation)",
    ),
    value(
        "checkpoint",
        "N",
        |o, text| {
            let wrong =
                || Error::Invalid(format!("checkpoint `{text}` is not a number: `coppice checkpoints` lists them"));
            o.checkpoint = Some(text.parse().map_err(|_| wrong())?);
            Ok(())
        },
        "show the state of an older checkpoint, with ro only; data that was overwritten since is an error (EIO)",
    ),
    flag("allow_other", false, |o| o.allow_other = Some(true), "other users may use the mount (default for root)"),
    flag("noallow_other", false, |o| o.allow_other = Some(false), "only the user who mounts may use the mount"),
    value(
        "log",
        "FILE",
        |o, text| {
            if text.is_empty() {
                return Err(Error::Invalid("log needs the path of a file".into()));
            }
            o.log = Some(PathBuf::from(text));
            Ok(())
        },
        "append messages to this file (default: syslog; the terminal with -f)",
    ),
    generic("defaults"),
    generic("auto"),
    generic("noauto"),
    generic("user"),
    generic("nouser"),
    generic("users"),
    generic("owner"),
    generic("group"),
    generic("_netdev"),
    generic("nofail"),
    generic("comment"),
    generic("loud"),
    generic("silent"),
    generic("nomand"),
];

/// Parses a size in bytes: a number, with K, M, G or T for powers of 1024 (also `KiB`, `MB`, ...: all are powers of 1024 here).
///
/// # Errors
/// [`Error::Invalid`] with what is accepted.
pub fn parse_size(text: &str) -> Result<u64> {
    let wrong = || Error::Invalid(format!("`{text}` is not a size: a number, with K, M, G or T behind it"));
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.to_ascii_uppercase().as_str() {
        "" | "B" => 0,
        "K" | "KB" | "KIB" => 10,
        "M" | "MB" | "MIB" => 20,
        "G" | "GB" | "GIB" => 30,
        "T" | "TB" | "TIB" => 40,
        _ => return Err(wrong()),
    };
    let number: u64 = number.parse().map_err(|_| wrong())?;
    number.checked_mul(1 << shift).ok_or_else(wrong)
}

impl MountOptions {
    /// Takes the options of one `-o` argument, `a,b=c,...`; later ones win.
    ///
    /// # Errors
    /// [`Error::Invalid`], one line that names the option.
    pub fn apply(&mut self, options: &str) -> Result<()> {
        options.split(',').filter(|option| !option.is_empty()).try_for_each(|option| self.apply_one(option))
    }

    /// As [`Self::apply`], but unknown options are ignored (mount(8)'s `-s`).
    ///
    /// # Errors
    /// [`Error::Invalid`] for a wrong value.
    pub fn apply_known(&mut self, options: &str) -> Result<()> {
        let name = |option: &str| option.split_once('=').map_or(option, |(name, _)| name).to_owned();
        let known = |option: &&str| MOUNT_OPTIONS.iter().any(|definition| definition.name == name(option));
        options.split(',').filter(known).try_for_each(|option| self.apply_one(option))
    }

    fn apply_one(&mut self, option: &str) -> Result<()> {
        let (name, given) = match option.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (option, None),
        };
        if name.starts_with("x-") || name.starts_with("X-") {
            return Ok(());
        }
        let Some(definition) = MOUNT_OPTIONS.iter().find(|definition| definition.name == name) else {
            return Err(Error::Invalid(format!("unknown mount option `{name}`: `mount-coppice --help` lists them")));
        };
        match (definition.setter, given) {
            (Setter::Flag(set), None) => {
                set(self);
                Ok(())
            }
            (Setter::Flag(_), Some(_)) => Err(Error::Invalid(format!("mount option `{name}` takes no value"))),
            (Setter::Value(_, set), Some(given)) => {
                set(self, given).map_err(|error| Error::Invalid(format!("mount option {error}")))
            }
            (Setter::Value(metavariable, _), None) => {
                Err(Error::Invalid(format!("mount option `{name}` needs a value: {name}={metavariable}")))
            }
            (Setter::Generic, _) => Ok(()),
        }
    }
}

/// The table as text, for `--help` and the man page.
#[must_use]
pub fn mount_options_help() -> String {
    let mut text = String::from("Mount options (-o, separated by commas):\n");
    for definition in MOUNT_OPTIONS {
        let name = match definition.setter {
            Setter::Flag(_) => definition.name.to_owned(),
            Setter::Value(metavariable, _) => format!("{}={metavariable}", definition.name),
            Setter::Generic => continue,
        };
        let default = if definition.default { " (default)" } else { "" };
        let _ = writeln!(text, "  {name:<34} {}{default}", definition.help);
    }
    text.push_str(
        "Options for mount(8) itself (defaults, noauto, user, nofail, _netdev, x-*, comment=...) are accepted.\n",
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(options: &str) -> Result<MountOptions> {
        let mut parsed = MountOptions::default();
        parsed.apply(options)?;
        Ok(parsed)
    }

    #[test]
    fn options_set_what_they_say() {
        let parsed = parse(
            "ro,noatime,dev,suid,noexec,cache=daemon,cache_size=64M,threads=3,compression=zstd:7,commit=0,allow_other,\
             log=/tmp/l,checkpoint=12,defaults,noauto,user,nofail,_netdev,x-systemd.automount,x-y=1,comment=two words",
        )
        .unwrap();
        assert_eq!(
            parsed,
            MountOptions {
                read_only: true,
                access_times: AccessTimes::Never,
                devices: true,
                set_id: true,
                execution: false,
                synchronous: false,
                directory_synchronous: false,
                cache: CacheMode::Daemon,
                cache_bytes: Some(64 << 20),
                threads: Some(3),
                compression: Some(CompressionChoice::Zstd(7)),
                commit_interval: Duration::ZERO,
                allow_other: Some(true),
                log: Some("/tmp/l".into()),
                checkpoint: Some(12),
            }
        );
        assert_eq!(parse("rw,,defaults").unwrap(), MountOptions::default());
        assert!(!parse("ro,rw").unwrap().read_only, "the later one wins");
    }

    #[test]
    fn errors_name_the_option_in_one_line() {
        for (options, named) in [
            ("rw,nosuch", "nosuch"),
            ("ro=1", "ro"),
            ("cache", "cache"),
            ("cache=both", "both"),
            ("cache_size=1M", "16M"),
            ("cache_size=12Q", "12Q"),
            ("threads=0", "threads"),
            ("compression=zstd:20", "zstd:20"),
            ("compression=gzip", "gzip"),
            ("commit=301", "301"),
            ("commit=-1", "-1"),
            ("checkpoint=x", "coppice checkpoints"),
        ] {
            let error = parse(options).unwrap_err().to_string();
            assert!(error.contains(named) && !error.contains('\n'), "{options}: {error}");
        }
    }

    #[test]
    fn sizes() {
        assert_eq!(parse_size("4096").unwrap(), 4096);
        assert_eq!(parse_size("3GiB").unwrap(), 3 << 30);
        assert!(parse_size("99999999999T").is_err());
        assert!(parse_size("").is_err());
        assert!(parse_size("K").is_err());
    }

    #[test]
    fn each_name_is_in_the_table_once_and_in_the_help() {
        let help = mount_options_help();
        for (index, definition) in MOUNT_OPTIONS.iter().enumerate() {
            assert!(MOUNT_OPTIONS.iter().skip(index + 1).all(|other| other.name != definition.name));
            assert!(help.contains(definition.name) || matches!(definition.setter, Setter::Generic));
        }
    }
}
