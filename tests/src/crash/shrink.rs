//! Making a failing workload small: delta debugging of the list of operations (Zeller and Hildebrandt, "Simplifying and Isolating
//! Failure-Inducing Input", 2002), within a time.
//!
//! A part is left out if what remains still fails, in whatever way. What a later operation needs may be left out before it: it then fails as POSIX
//! says, in the filesystem and in the oracle, and is left out too.

use std::time::Instant;

use super::{CrashOptions, Failure, Subject, forget_image, run};
use crate::operation::Operation;

/// The smallest failing workload that was found until `deadline`, with its failure. `failure` is that of `workload`, which is returned if nothing
/// can be left out.
pub fn shrink(
    subject: &dyn Subject,
    workload: &[Operation],
    failure: Box<Failure>,
    options: &CrashOptions,
    deadline: Instant,
) -> (Vec<Operation>, Box<Failure>) {
    let mut best = (workload.to_vec(), failure);
    // What comes after the operation at which it failed cannot matter to the failure, only to the schedule.
    if let Some((number, _)) = best.1.operation {
        let length = usize::try_from(number).unwrap_or(usize::MAX).min(workload.len());
        try_smaller(subject, workload.get(..length).unwrap_or_default().to_vec(), options, &mut best);
    }
    let mut parts = 2;
    while best.0.len() > 1 && parts <= best.0.len() && Instant::now() < deadline {
        let length = best.0.len().div_ceil(parts);
        let mut start = 0;
        let mut is_smaller = false;
        while start < best.0.len() && Instant::now() < deadline {
            let end = (start + length).min(best.0.len());
            let mut without = best.0.clone();
            without.drain(start..end);
            if try_smaller(subject, without, options, &mut best) {
                // The next part is where this one was.
                is_smaller = true;
            } else {
                start = end;
            }
        }
        parts = if is_smaller {
            (parts - 1).max(2)
        } else if length == 1 {
            usize::MAX
        } else {
            (parts * 2).min(best.0.len())
        };
    }
    best
}

fn try_smaller(
    subject: &dyn Subject,
    workload: Vec<Operation>,
    options: &CrashOptions,
    best: &mut (Vec<Operation>, Box<Failure>),
) -> bool {
    if workload.is_empty() || workload.len() >= best.0.len() {
        return false;
    }
    match run(subject, &workload, options) {
        Err(failure) => {
            forget_image(&best.1);
            *best = (workload, failure);
            true
        }
        Ok(_) => false,
    }
}
