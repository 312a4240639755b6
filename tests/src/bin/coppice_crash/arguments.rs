//! The command line, and what it means for the simulator.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Parser;
use coppicefs::device::{CrashPlan, PlanOptions};
use coppicefs_tests::crash::{CrashOptions, Cut, Fault};
use coppicefs_tests::filesystem_subject::{CHECKSUMS, COMPRESSIONS, Coppice, switch_names, turn_on};
use coppicefs_tests::operation::Operation;
use coppicefs_tests::workloads;

/// Exit codes, for --help.
const EXIT_CODES: &str = "\
Exit codes:
  0  everything held
  1  something did not: each failure is printed with the one command that shows it again
  2  the command line is wrong
  3  the program itself could not go on (a file that cannot be read or written)";

/// Run workloads on a simulated device, cut the power at every write and flush, and see whether what is left is what coppice promises.
///
/// Each state of the medium that a cut can leave is opened: fsck -n finds nothing, it mounts, what it shows is allowed by a model of POSIX that
/// knows what was synced, and a second mount shows the same. With no workload named, all fixed ones are run. Everything is decided by the seed.
#[derive(Parser, Clone, Debug)]
#[command(name = "coppice-crash", version, after_help = EXIT_CODES)]
#[allow(clippy::struct_excessive_bools, reason = "command-line flags")]
pub struct Arguments {
    /// List the workloads and the broken builds, and do nothing else
    #[arg(long)]
    pub list: bool,
    /// Run this workload (may be given again): a name, random:SEED:OPERATIONS, full:SEED:OPERATIONS, or @FILE with operations as JSON
    #[arg(short, long = "workload", value_name = "NAME")]
    pub workloads: Vec<String>,
    /// Run so many random workloads, beside those that are named
    #[arg(long, value_name = "COUNT")]
    pub random: Option<u64>,
    /// Run so many random workloads that fill the device
    #[arg(long, value_name = "COUNT")]
    pub full: Option<u64>,
    /// Operations of each random workload
    #[arg(long, default_value_t = 100)]
    pub operations: usize,
    /// Decides everything that is not decided by the workload
    #[arg(short, long, default_value_t = 1)]
    pub seed: u64,
    /// Try so many states of the medium at each boundary
    #[arg(long, value_name = "COUNT", default_value_t = 32, conflicts_with = "exhaustive")]
    pub plans: usize,
    /// Try all subsets of up to 6 writes in flight at each boundary, and a sample of more; half of a write too
    #[arg(long)]
    pub exhaustive: bool,
    /// Random states beside the regular ones, at boundaries with more writes in flight
    #[arg(long, value_name = "COUNT")]
    pub samples: Option<usize>,
    /// Cut the power again in so many ways at boundaries of a recovery
    #[arg(long, value_name = "COUNT", default_value_t = 2)]
    pub during_recovery: usize,
    /// The same in one recovery of so many
    #[arg(long, value_name = "COUNT", default_value_t = 16)]
    pub recovery_one_in: usize,
    /// Let the process die, mount over what the host has cached, and cut the power in so many ways
    #[arg(long, value_name = "COUNT", default_value_t = 1)]
    pub after_kill: usize,
    /// The same at one boundary of so many
    #[arg(long, value_name = "COUNT", default_value_t = 16)]
    pub kill_one_in: usize,
    /// Let the device lose so many flushed writes of the log, one at a time, at each boundary
    #[arg(long, value_name = "COUNT", default_value_t = 0)]
    pub lost_writes: usize,
    /// Check before recovery too, unmount, and mount a second time, for one image in so many; the others are mounted, read and checked
    #[arg(long, value_name = "COUNT", default_value_t = 1)]
    pub twice_one_in: usize,
    /// No flush makes anything durable: what is left must be an older state, or be refused
    #[arg(long)]
    pub device_lies: bool,
    /// Let write number N after the mount fail with EIO
    #[arg(long, value_name = "N", conflicts_with = "fail_flush")]
    pub fail_write: Option<u64>,
    /// Let flush number N after the mount fail with EIO
    #[arg(long, value_name = "N")]
    pub fail_flush: Option<u64>,
    /// Operations that need space may find none
    #[arg(long)]
    pub may_lack_space: bool,
    /// Break the filesystem in this way (may be given again): --list names them
    #[arg(long = "switch", value_name = "NAME")]
    pub switches: Vec<String>,
    /// Size of the device in bytes; by default what the workload wants
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u64).range(8 << 20..=1 << 32))]
    pub device_bytes: Option<u64>,
    /// Memory for caches, in bytes
    #[arg(long, value_name = "BYTES")]
    pub cache_bytes: Option<u64>,
    /// Largest record of the journal, in bytes
    #[arg(long, value_name = "BYTES")]
    pub record_bytes: Option<u32>,
    /// Compress data: none, lz4, zstd
    #[arg(long, value_name = "KIND", default_value = "none")]
    pub compression: String,
    /// Checksums of data: none, crc32c, xxh3
    #[arg(long, value_name = "KIND", default_value = "crc32c")]
    pub checksum: String,
    /// Every operation is durable when it returns (commit=0)
    #[arg(long)]
    pub commit_at_once: bool,
    /// Threads
    #[arg(short, long, value_name = "COUNT")]
    pub jobs: Option<usize>,
    /// Only this end: the boundary at which the run stops
    #[arg(long, value_name = "BOUNDARY")]
    pub cut: Option<usize>,
    /// With --cut: the writes in flight that reached the medium, as a failure prints them
    #[arg(long, value_name = "PLAN", requires = "cut", default_value = "none")]
    pub plan: CrashPlan,
    /// With --cut: the process dies, the host stays
    #[arg(long, requires = "cut", conflicts_with = "plan")]
    pub killed: bool,
    /// With --cut: the flushed write of the log that the device has lost
    #[arg(long, value_name = "NUMBER", requires = "cut")]
    pub lose: Option<usize>,
    /// With --cut: count what was promised by this later boundary, at which a cut can leave the same
    #[arg(long, value_name = "BOUNDARY", requires = "cut")]
    pub promised_at: Option<usize>,
    /// With --cut: power fails again at this boundary of the recovery
    #[arg(long, value_name = "BOUNDARY", requires = "cut")]
    pub second_cut: Option<usize>,
    /// With --second-cut: what reached the medium then
    #[arg(long, value_name = "PLAN", requires = "second_cut", default_value = "none")]
    pub second_plan: CrashPlan,
    /// With --cut: write what is on the medium to this file, for fsck-coppice and mount-coppice, instead of opening it here
    #[arg(long, value_name = "FILE", requires = "cut")]
    pub image: Option<PathBuf>,
    /// Time in seconds for making a failing workload smaller; 0: leave it as it is
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    pub shrink: u64,
    /// Go on with the other workloads after a failure
    #[arg(short, long)]
    pub keep_going: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// No progress
    #[arg(short, long)]
    pub quiet: bool,
}

/// A workload by its name.
pub struct Named {
    pub name: String,
    pub operations: Vec<Operation>,
    pub device_bytes: u64,
}

impl Arguments {
    /// The workloads to run.
    ///
    /// # Errors
    /// If there is no such workload.
    pub fn chosen(&self) -> Result<Vec<Named>> {
        let mut chosen = Vec::new();
        for name in &self.workloads {
            chosen.push(self.named(name)?);
        }
        for (kind, count) in [("random", self.random), ("full", self.full)] {
            for number in 0..count.unwrap_or(0) {
                chosen.push(self.named(&format!("{kind}:{}:{}", self.seed + number, self.operations))?);
            }
        }
        if chosen.is_empty() && self.random.is_none() && self.full.is_none() {
            for (name, _) in workloads::fixed() {
                chosen.push(self.named(name)?);
            }
        }
        Ok(chosen)
    }

    fn named(&self, name: &str) -> Result<Named> {
        let operations = if let Some(file) = name.strip_prefix('@') {
            let text = std::fs::read(file).with_context(|| format!("reading the workload {file}"))?;
            serde_json::from_slice(&text).with_context(|| format!("{file} is no list of operations"))?
        } else {
            match workloads::by_name(name) {
                Some(operations) => operations,
                None => bail!("there is no workload {name:?}: --list names them"),
            }
        };
        let device_bytes = self.device_bytes.unwrap_or_else(|| workloads::device_bytes(name));
        Ok(Named { name: name.to_owned(), operations, device_bytes })
    }

    /// The filesystem under test.
    ///
    /// # Errors
    /// If a name is not known.
    pub fn subject(&self) -> Result<Coppice> {
        let mut subject = Coppice { commit_at_once: self.commit_at_once, ..Coppice::default() };
        for name in &self.switches {
            if !turn_on(&mut subject.switches, name) {
                let names: Vec<_> = switch_names(&subject.switches).into_iter().map(|(name, _)| name).collect();
                bail!("there is no switch {name:?}; there are {}", names.join(", "));
            }
        }
        subject.cache_bytes = self.cache_bytes.unwrap_or(subject.cache_bytes);
        subject.record_bytes_max = self.record_bytes.unwrap_or(subject.record_bytes_max);
        let Some((_, compression)) = COMPRESSIONS.iter().find(|(name, _)| *name == self.compression) else {
            bail!("there is no compression {:?}: none, lz4, zstd", self.compression);
        };
        let Some((_, checksum)) = CHECKSUMS.iter().find(|(name, _)| *name == self.checksum) else {
            bail!("there is no checksum {:?}: none, crc32c, xxh3", self.checksum);
        };
        subject.format.defaults.compression = *compression as u8;
        subject.format.defaults.compression_level = 3;
        subject.format.defaults.checksum = *checksum as u8;
        Ok(subject)
    }

    /// How a workload is run.
    pub fn options(&self, workload: &Named, threads: usize) -> CrashOptions {
        let plans = if self.exhaustive {
            PlanOptions { exhaustive_up_to: 6, samples: self.samples.unwrap_or(32), ..PlanOptions::default() }
        } else {
            let samples = self.samples.unwrap_or(8);
            PlanOptions { exhaustive_up_to: 4, samples, limit: Some(self.plans), ..PlanOptions::default() }
        };
        let write = self.fail_write.map(Fault::Write);
        CrashOptions {
            seed: self.seed,
            device_bytes: workload.device_bytes,
            plans,
            during_recovery: self.during_recovery,
            recovery_one_in: self.recovery_one_in,
            after_kill: self.after_kill,
            kill_one_in: self.kill_one_in,
            lost_writes: self.lost_writes,
            twice_one_in: self.twice_one_in,
            device_lies: self.device_lies,
            fault: write.or_else(|| self.fail_flush.map(Fault::Flush)),
            may_lack_space: self.may_lack_space || workload.name.starts_with("full:"),
            threads,
            again: format!("coppice-crash --workload '{}'", workload.name),
            ..CrashOptions::default()
        }
    }

    /// The one end that is asked for.
    pub fn only_cut(&self) -> Option<Cut> {
        let boundary = self.cut?;
        Some(Cut {
            plan: (!self.killed).then(|| self.plan.clone()),
            lost: self.lose,
            promised_at: self.promised_at,
            second: self.second_cut.map(|second| (second, self.second_plan.clone())),
            boundary,
        })
    }
}
