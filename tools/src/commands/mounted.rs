//! `coppice stats` and `coppice sync`: what is asked of a mounted filesystem.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use coppicefs::fuse::client;
use coppicefs::output::is_wanted;

use crate::output;

/// What `coppice stats` takes.
#[derive(Args, Clone, Debug)]
pub struct StatsArguments {
    /// As JSON
    #[arg(long)]
    json: bool,
    /// Show again every second what has changed, until interrupted; with --json all counters, an object a line
    #[arg(long)]
    watch: bool,
    /// Mountpoint, or anything in it
    mount: PathBuf,
}

/// What `coppice sync` takes.
#[derive(Args, Clone, Debug)]
pub struct SyncArguments {
    /// Mountpoint, or anything in it
    mount: PathBuf,
}

/// Prints all counters.
///
/// # Errors
/// If it is not a mount of ours.
pub fn stats(arguments: &StatsArguments) -> anyhow::Result<()> {
    let mut counters = client::statistics(&arguments.mount)?;
    match (arguments.json, arguments.watch) {
        (true, false) => return output::json(&object(&counters)),
        (true, true) => print_line(&counters),
        (false, _) => print(&counters),
    }
    if !arguments.watch {
        return Ok(());
    }
    while is_wanted() {
        std::thread::sleep(Duration::from_secs(1));
        let now = client::statistics(&arguments.mount)?;
        if arguments.json {
            print_line(&now);
            continue;
        }
        let changed: Vec<_> = now.iter().filter(|counter| !counters.contains(counter)).cloned().collect();
        say!("");
        print(&changed);
        counters = now;
    }
    Ok(())
}

fn object(counters: &[(String, u64)]) -> serde_json::Map<String, serde_json::Value> {
    counters.iter().map(|(name, value)| (name.clone(), serde_json::Value::from(*value))).collect()
}

fn print_line(counters: &[(String, u64)]) {
    say!("{}", serde_json::Value::from(object(counters)));
}

fn print(counters: &[(String, u64)]) {
    let mut table = output::table(&[]);
    for (name, value) in counters {
        table.add_row([name.clone(), value.to_string()]);
    }
    output::align_right(&mut table, 1);
    output::print(&table);
}

/// Makes everything durable.
///
/// # Errors
/// If it is not a mount of ours, or the filesystem failed.
pub fn sync(arguments: &SyncArguments) -> anyhow::Result<()> {
    Ok(client::sync(&arguments.mount)?)
}
