//! `coppice checkpoints`: which of the checkpoints of an image are whole, and what they can be opened as.

use std::path::PathBuf;

use clap::Args;
use coppicefs::filesystem::Filesystem;
use coppicefs::recovery::InspectedCheckpoint;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::output;

/// What `coppice checkpoints` takes.
#[derive(Args, Clone, Debug)]
pub struct Arguments {
    /// As JSON
    #[arg(long)]
    json: bool,
    /// Image file or disk, not mounted
    target: PathBuf,
}

#[derive(Serialize)]
struct JsonCheckpoint {
    number: u64,
    newest: bool,
    epoch: u64,
    first_replay: u64,
    newest_sequence: u64,
    written_at: i64,
    closed_in_order: bool,
    whole: bool,
    nodes: u64,
    lost_nodes: u64,
    bad_copies: u64,
    problems: Vec<String>,
    gives_present_state: bool,
    present_state_problem: Option<String>,
    opens_as_it_was: bool,
    as_it_was_problem: Option<String>,
}

#[derive(Serialize)]
struct JsonLost {
    number: u64,
    problem: String,
}

#[derive(Serialize)]
struct JsonCheckpoints {
    target: String,
    lost: Option<JsonLost>,
    checkpoints: Vec<JsonCheckpoint>,
}

fn described(found: &InspectedCheckpoint, newest: u64) -> JsonCheckpoint {
    let checkpoint = &found.checkpoint;
    JsonCheckpoint {
        number: checkpoint.number,
        newest: checkpoint.number == newest,
        epoch: checkpoint.epoch,
        first_replay: checkpoint.first_replay,
        newest_sequence: checkpoint.newest_sequence,
        written_at: checkpoint.written_at,
        closed_in_order: checkpoint.clean,
        whole: found.is_whole(),
        nodes: found.nodes,
        lost_nodes: found.lost_nodes,
        bad_copies: found.bad_copies,
        problems: found.problems.clone(),
        gives_present_state: found.present.is_none(),
        present_state_problem: found.present.clone(),
        opens_as_it_was: found.as_it_was.is_none(),
        as_it_was_problem: found.as_it_was.clone(),
    }
}

/// Runs it.
///
/// # Errors
/// Those of opening, and no whole superblock.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let bar = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {pos} nodes read [{elapsed}]") {
        bar.set_style(style);
    }
    let found = Filesystem::inspect_checkpoints(&arguments.target, &|| bar.inc(1));
    bar.finish_and_clear();
    let found = found?;
    let newest = found.checkpoints.first().map_or(0, |first| first.checkpoint.number);
    let checkpoints: Vec<_> = found.checkpoints.iter().map(|one| described(one, newest)).collect();
    if arguments.json {
        let lost = found.lost.map(|lost| JsonLost { number: lost.number, problem: lost.reason });
        let target = arguments.target.display().to_string();
        return output::json(&JsonCheckpoints { target, lost, checkpoints });
    }
    print(&checkpoints);
    if let Some(lost) = found.lost {
        say!("\ncheckpoint {}: {}", lost.number, lost.reason);
    }
    for one in &checkpoints {
        for problem in &one.problems {
            say!("\ncheckpoint {}: {problem}", one.number);
        }
    }
    say!(
        "\n\"present\": with the journal it gives the present state. \"as it was\": mount -o ro,checkpoint=N shows the state of then."
    );
    Ok(())
}

fn print(checkpoints: &[JsonCheckpoint]) {
    let mut table = output::table(&["checkpoint", "written", "replay from", "nodes", "state", "present", "as it was"]);
    let yes = |is: bool| if is { "yes" } else { "no" }.to_owned();
    for one in checkpoints {
        let state = match (one.whole, one.lost_nodes) {
            (true, _) if one.bad_copies > 0 => format!("whole, {} copies bad", one.bad_copies),
            (true, _) => "whole".to_owned(),
            (false, 0) => "damaged".to_owned(),
            (false, lost) => format!("{lost} nodes lost"),
        };
        let newest = if one.newest { " (newest)" } else { "" };
        table.add_row([
            format!("{}{newest}", one.number),
            output::time(one.written_at),
            one.first_replay.to_string(),
            one.nodes.to_string(),
            state,
            yes(one.gives_present_state),
            yes(one.opens_as_it_was),
        ]);
    }
    output::print(&table);
}
