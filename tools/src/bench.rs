//! `coppice bench`: runs the fio job files of `tools/fio/` and prints a table. The job files run by plain fio too.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde::Serialize;

use crate::output;

/// What `coppice bench` takes.
#[derive(Args, Clone, Debug)]
pub struct Arguments {
    /// Each job for a few seconds at most, and few rounds
    #[arg(long)]
    quick: bool,
    /// Rounds: the medians are shown
    #[arg(long)]
    rounds: Option<usize>,
    /// Other folders to compare with, measured in turn in the same run (ext4, btrfs, ...)
    #[arg(long, value_name = "DIR")]
    beside: Vec<PathBuf>,
    /// As JSON
    #[arg(long)]
    json: bool,
    /// Folder on the filesystem to be measured
    directory: PathBuf,
}

/// A job file, built in so that the installed program has them.
struct Job {
    name: &'static str,
    text: &'static str,
    /// What counts: "write" or "read" of fio's JSON, and which figure.
    direction: &'static str,
    figure: Figure,
}

#[derive(Clone, Copy)]
enum Figure {
    MebibytesPerSecond,
    OperationsPerSecond,
}

const JOBS: &[Job] = &[
    Job {
        name: "seq-write",
        text: include_str!("../fio/seq-write.fio"),
        direction: "write",
        figure: Figure::MebibytesPerSecond,
    },
    Job {
        name: "seq-read",
        text: include_str!("../fio/seq-read.fio"),
        direction: "read",
        figure: Figure::MebibytesPerSecond,
    },
    Job {
        name: "rand-write",
        text: include_str!("../fio/rand-write.fio"),
        direction: "write",
        figure: Figure::OperationsPerSecond,
    },
    Job {
        name: "rand-read",
        text: include_str!("../fio/rand-read.fio"),
        direction: "read",
        figure: Figure::OperationsPerSecond,
    },
    Job {
        name: "sync-write",
        text: include_str!("../fio/sync-write.fio"),
        direction: "write",
        figure: Figure::OperationsPerSecond,
    },
    Job {
        name: "many-files",
        text: include_str!("../fio/many-files.fio"),
        direction: "write",
        figure: Figure::OperationsPerSecond,
    },
];

#[derive(Serialize)]
struct Row {
    job: &'static str,
    unit: &'static str,
    /// By directory, in the order given.
    medians: Vec<f64>,
    /// The first directory's figure divided by each other's.
    ratios: Vec<f64>,
}

/// Runs it.
///
/// # Errors
/// If fio is not there, or a job fails.
pub fn run(arguments: &Arguments) -> Result<()> {
    let version = Command::new("fio").arg("--version").output();
    ensure!(version.is_ok_and(|output| output.status.success()), "fio is needed: apt-get install fio");
    let directories: Vec<&Path> =
        std::iter::once(&arguments.directory).chain(&arguments.beside).map(PathBuf::as_path).collect();
    for directory in &directories {
        ensure!(directory.is_dir(), "{} is not a folder", directory.display());
    }
    let rounds = arguments.rounds.unwrap_or(if arguments.quick { 1 } else { 3 }).max(1);
    let mut rows = Vec::new();
    for job in JOBS {
        let mut figures = vec![Vec::new(); directories.len()];
        for _ in 0..rounds {
            // In turn, so that a noisy moment of the machine hits all alike.
            for (figures, directory) in figures.iter_mut().zip(&directories) {
                figures.push(run_job(job, directory, arguments.quick)?);
            }
        }
        let medians: Vec<f64> = figures.iter_mut().map(|figures| median(figures)).collect();
        let first = medians.first().copied().unwrap_or(0.0);
        rows.push(Row {
            job: job.name,
            unit: match job.figure {
                Figure::MebibytesPerSecond => "MiB/s",
                Figure::OperationsPerSecond => "operations/s",
            },
            ratios: medians.iter().skip(1).map(|other| first / other).collect(),
            medians,
        });
    }
    for directory in &directories {
        clean(directory)?;
    }
    if arguments.json { output::json(&rows) } else { print(&rows, &directories) }
}

fn median(figures: &mut [f64]) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied().unwrap_or(0.0)
}

fn run_job(job: &Job, directory: &Path, quick: bool) -> Result<f64> {
    let folder = tempfile::tempdir().context("making a temporary folder")?;
    let file = folder.path().join(format!("{}.fio", job.name));
    std::fs::write(&file, job.text)?;
    // fio runs in the temporary folder: its own leftovers go there.
    let directory = directory.canonicalize().with_context(|| format!("looking for {}", directory.display()))?;
    let mut fio = Command::new("fio");
    fio.arg("--output-format=json").arg(format!("--directory={}", directory.display()));
    if quick {
        fio.arg("--runtime=5");
    }
    let output = fio.arg(&file).current_dir(folder.path()).output().context("starting fio")?;
    if !output.status.success() {
        bail!(
            "fio's job {} failed on {}: {}",
            job.name,
            directory.display(),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    // fio writes warnings before its JSON.
    let text = String::from_utf8_lossy(&output.stdout);
    let json = text.find('{').and_then(|start| text.get(start..)).unwrap_or_default();
    let parsed: serde_json::Value = serde_json::from_str(json).context("reading fio's JSON")?;
    let figures =
        parsed.pointer("/jobs/0").and_then(|first| first.get(job.direction)).context("fio reported no job")?;
    let number = |name: &str| figures.get(name).and_then(serde_json::Value::as_f64).unwrap_or(0.0);
    Ok(match job.figure {
        Figure::MebibytesPerSecond => number("bw_bytes") / f64::from(1 << 20),
        Figure::OperationsPerSecond => number("iops"),
    })
}

fn clean(directory: &Path) -> Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("coppice-bench.") || name.starts_with("many-files.") {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

fn print(rows: &[Row], directories: &[&Path]) -> Result<()> {
    let mut header = vec!["job".to_owned(), "unit".to_owned()];
    header.extend(directories.iter().map(|directory| directory.display().to_string()));
    header.extend(directories.iter().skip(1).map(|directory| format!("ratio to {}", directory.display())));
    let mut table = output::table(&header.iter().map(String::as_str).collect::<Vec<_>>());
    for row in rows {
        let mut cells = vec![row.job.to_owned(), row.unit.to_owned()];
        cells.extend(row.medians.iter().map(|figure| format!("{figure:.0}")));
        cells.extend(row.ratios.iter().map(|ratio| format!("{ratio:.2}")));
        table.add_row(cells);
    }
    output::align_right(&mut table, 2);
    output::print(&table);
    Ok(())
}
