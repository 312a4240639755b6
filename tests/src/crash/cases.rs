//! Which ends of a run are tried: power cuts at each boundary, kills, lost writes; each different state once.

use std::collections::HashMap;

use coppicefs::device::{CrashPlan, Image, PlanOptions, Snapshot};

use super::cut::Cut;
use super::record::Recording;
use super::{CrashOptions, Report};

/// What an image may show. Numbers of oracles in the [`Recording`].
#[derive(Clone, Debug)]
pub(super) enum Oracle {
    /// What every one of these allows; each with the boundary at which it counts.
    Contract(Vec<(usize, usize)>),
    /// The device has lost a write of the log that it had acknowledged: what one of these allows, whole and readable, or a refusal to mount.
    OlderOrRefusal { first: usize, last: usize },
    /// The device lies about every flush: what one up to this one allows, or a refusal at any step.
    Lies { last: usize },
}

/// One image to open.
pub(super) struct Case {
    pub cut: Cut,
    pub oracle: Oracle,
}

/// Newest flushed writes of the log of which one is lost.
const LOST_CANDIDATES: usize = 24;

impl Recording {
    /// The image that a cut leaves; without its second cut.
    pub fn image(&self, cut: &Cut) -> Option<Image> {
        let snapshot = &self.moments.get(cut.boundary)?.snapshot;
        Some(match (&cut.plan, cut.lost) {
            (None, _) => snapshot.everything(),
            (Some(plan), None) => snapshot.crash(plan),
            (Some(plan), Some(lost)) => snapshot.crash_without(plan, &self.before, &self.history, &self.copies(lost)),
        })
    }

    pub fn snapshot(&self, cut: &Cut) -> Option<&Snapshot> {
        self.moments.get(cut.boundary).map(|moment| &moment.snapshot)
    }

    /// A write of the history and its copies.
    fn copies(&self, write: usize) -> Vec<usize> {
        let Some(one) = self.history.get(write) else { return Vec::new() };
        // Copies are written in one batch.
        let from = write.saturating_sub(64);
        let near = self.history.iter().enumerate().skip(from).take(128);
        near.filter(|(_, other)| one.is_copy_of(other)).map(|(index, _)| index).collect()
    }

    fn is_log(&self, write: usize) -> bool {
        self.history.get(write).is_some_and(|write| {
            let end = write.offset() + write.length();
            self.log.iter().any(|range| range.start <= write.offset() && end <= range.end)
        })
    }

    /// What an image may show after this cut.
    pub fn oracle(&self, cut: &Cut, options: &CrashOptions) -> Option<Oracle> {
        let boundary = cut.promised_at.unwrap_or(cut.boundary);
        let moment = self.moments.get(boundary)?;
        if options.device_lies {
            return Some(Oracle::Lies { last: moment.model });
        }
        Some(match cut.lost {
            None => Oracle::Contract(vec![(moment.model, boundary)]),
            Some(lost) => {
                // As it was just before the write that is lost.
                let earliest = self.copies(lost).into_iter().min().unwrap_or(lost);
                let after = self
                    .moments
                    .partition_point(|moment| moment.flushed + moment.snapshot.unflushed().len() <= earliest);
                // Before the first moment that is remembered, it is the oldest oracle.
                let before = after.checked_sub(1).and_then(|before| self.moments.get(before));
                Oracle::OlderOrRefusal { first: before.map_or(0, |before| before.model), last: moment.model }
            }
        })
    }

    /// All ends that the options ask for. Equal images with equal kinds of oracle are one case.
    pub fn cases(&self, options: &CrashOptions, report: &mut Report) -> Vec<Case> {
        let mut cases: Vec<Case> = Vec::new();
        let mut seen: HashMap<u64, usize> = HashMap::new();
        for (boundary, moment) in self.moments.iter().enumerate() {
            let plans =
                PlanOptions { seed: options.plans.seed ^ options.seed ^ boundary as u64, ..options.plans.clone() };
            for plan in moment.snapshot.plans(&plans) {
                report.crashes += 1;
                let hash = moment.snapshot.crash(&plan).content_hash();
                let case = *seen.entry(hash).or_insert_with(|| {
                    let oracle = if options.device_lies {
                        Oracle::Lies { last: moment.model }
                    } else {
                        Oracle::Contract(Vec::new())
                    };
                    cases.push(Case { cut: Cut::power(boundary, plan), oracle });
                    cases.len() - 1
                });
                match cases.get_mut(case).map(|case| &mut case.oracle) {
                    Some(Oracle::Contract(models)) if models.last().is_none_or(|last| last.0 != moment.model) => {
                        models.push((moment.model, boundary));
                    }
                    _ => {}
                }
            }
        }
        report.images = cases.len();
        if options.after_kill > 0 {
            self.add_kills(options, &mut cases);
        }
        if options.lost_writes > 0 {
            self.add_lost(options, &mut cases, report);
        }
        cases
    }

    fn add_kills(&self, options: &CrashOptions, cases: &mut Vec<Case>) {
        for boundary in (0..self.moments.len()).step_by(options.kill_one_in.max(1)) {
            let cut = Cut { plan: None, ..Cut::power(boundary, CrashPlan::default()) };
            cases.extend(self.oracle(&cut, options).map(|oracle| Case { cut, oracle }));
        }
    }

    fn add_lost(&self, options: &CrashOptions, cases: &mut Vec<Case>, report: &mut Report) {
        let mut seen: HashMap<u64, ()> = HashMap::new();
        for (boundary, moment) in self.moments.iter().enumerate() {
            let newest = (0..moment.flushed).rev().filter(|&write| self.is_log(write));
            // Of copies the last one stands for all.
            let newest = newest.filter(|&write| self.copies(write).last() == Some(&write));
            let candidates: Vec<usize> = newest.take(LOST_CANDIDATES).collect();
            for round in 0..options.lost_writes.min(candidates.len()) {
                let mixed = (options.seed ^ boundary as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23);
                let pick = (mixed.wrapping_add(round as u64 * 0x51)) % candidates.len() as u64;
                let Some(&lost) = candidates.get(pick as usize) else { continue };
                let all = CrashPlan::keeping(0..moment.snapshot.unflushed().len());
                for plan in [all, CrashPlan::default()] {
                    let cut = Cut { lost: Some(lost), ..Cut::power(boundary, plan) };
                    report.crashes += 1;
                    let Some(image) = self.image(&cut) else { continue };
                    if seen.insert(image.content_hash(), ()).is_none() {
                        report.lost += 1;
                        cases.extend(self.oracle(&cut, options).map(|oracle| Case { cut, oracle }));
                    }
                }
            }
        }
    }
}
