//! Opening what a cut left: check, mount, read everything, unmount, check, mount again; and cutting the power again meanwhile.

use std::sync::{Arc, Mutex};

use coppicefs::Error;
use coppicefs::device::{Image, PlanOptions, SimDevice, Snapshot};

use super::cases::{Case, Oracle};
use super::cut::Cut;
use super::record::Recording;
use super::{CrashOptions, Report, Subject, lock, sim_options};
use crate::tree::Tree;

/// What went wrong with an image, and how.
struct Trouble {
    problem: String,
    /// The filesystem says that it is damaged.
    is_refusal: bool,
    /// It does so before it shows anything.
    is_early: bool,
}

impl Trouble {
    fn new(problem: String) -> Self {
        Self { problem, is_refusal: false, is_early: false }
    }

    fn of(what: &str, error: &Error) -> Self {
        let is_refusal = error.is_media_error()
            || matches!(error, Error::Unusable(_) | Error::Latched { .. })
            || matches!(error, Error::Posix(errno) if *errno == rustix::io::Errno::IO);
        Self { problem: format!("{what}: {error}"), is_refusal, is_early: false }
    }

    fn early(self) -> Self {
        Self { is_early: true, ..self }
    }
}

/// Opens images of one recording.
pub(super) struct Opener<'a> {
    pub subject: &'a dyn Subject,
    pub options: &'a CrashOptions,
    pub recording: &'a Recording,
}

impl Opener<'_> {
    /// Opens a case, and what second cuts leave of it. Adds to the report what was tried beside the case itself. The error comes with the cut
    /// that it belongs to.
    pub fn open(&self, case: &Case, index: usize, report: &Mutex<Report>) -> Result<(), (Cut, String)> {
        let cut = &case.cut;
        let own = |problem: String| (cut.clone(), problem);
        let device = self.first_device(cut).map_err(own)?;
        let is_turn = index.is_multiple_of(self.options.recovery_one_in.max(1));
        let second_plans = match (&cut.plan, &case.oracle) {
            (None, _) => self.options.after_kill,
            (_, Oracle::Contract(_)) if is_turn => self.options.during_recovery,
            _ => 0,
        };
        let inside: Arc<Mutex<Vec<Snapshot>>> = Arc::default();
        let shown = self.open_image(&device, (second_plans > 0).then_some(&inside));
        self.judge(&case.oracle, shown).map_err(own)?;
        let inside = std::mem::take(&mut *lock(&inside));
        self.second_cuts(case, &inside, second_plans, report)
    }

    /// Opens one cut exactly, its second cut too.
    pub fn open_exactly(&self, cut: &Cut) -> Result<(), String> {
        let oracle = self.recording.oracle(cut, self.options).ok_or_else(|| missing(cut))?;
        let device = match &cut.second {
            Some(_) => self.device(self.image(cut)?),
            None => self.first_device(cut)?,
        };
        let shown = self.open_image(&device, None);
        self.judge(&oracle, shown)
    }

    /// The image that a cut leaves, after its second cut if it has one; after a kill alone, what the host would write yet is on it.
    pub fn image(&self, cut: &Cut) -> Result<Image, String> {
        let device = self.first_device(cut)?;
        let Some((boundary, plan)) = &cut.second else { return Ok(device.image()) };
        let inside: Arc<Mutex<Vec<Snapshot>>> = Arc::default();
        let seed = self.mount_seed(&device);
        watch_into(&device, &inside);
        // Whatever comes of it: only the boundaries are wanted.
        if let Ok(mut mounted) = self.subject.mount(&device, seed) {
            let _ = mounted.tree();
            let _ = mounted.unmount();
        }
        device.clear_hook();
        let inside = std::mem::take(&mut *lock(&inside));
        let snapshot = inside.get(*boundary).ok_or_else(|| format!("the recovery has no boundary {boundary}"))?;
        Ok(snapshot.crash(plan))
    }

    /// What is mounted after a cut, without its second cut.
    fn first_device(&self, cut: &Cut) -> Result<Arc<SimDevice>, String> {
        match &cut.plan {
            None => {
                let snapshot = self.recording.snapshot(cut).ok_or_else(|| missing(cut))?;
                let options = sim_options(self.options, self.options.seed ^ snapshot.everything().content_hash());
                Ok(Arc::new(SimDevice::from_snapshot(snapshot, options)))
            }
            Some(_) => self.recording.image(cut).map(|image| self.device(image)).ok_or_else(|| missing(cut)),
        }
    }

    fn device(&self, image: Image) -> Arc<SimDevice> {
        let options = sim_options(self.options, self.options.seed ^ image.content_hash());
        Arc::new(SimDevice::from_image(image, options))
    }

    fn judge(&self, oracle: &Oracle, shown: Result<Tree, Trouble>) -> Result<(), String> {
        let shown = match (oracle, shown) {
            (_, Ok(shown)) => shown,
            (Oracle::OlderOrRefusal { .. }, Err(Trouble { is_refusal: true, is_early: true, .. }))
            | (Oracle::Lies { .. }, Err(Trouble { is_refusal: true, .. })) => return Ok(()),
            (_, Err(trouble)) => return Err(trouble.problem),
        };
        let model = |index: usize| self.recording.models.get(index).ok_or("no such oracle".to_owned());
        let any = |first: usize, last: usize| {
            for index in (first..=last).rev() {
                if model(index)?.check(&shown).is_ok() {
                    return Ok(());
                }
            }
            // What the newest one says is the most telling.
            model(last)?.check(&shown)
        };
        match oracle {
            Oracle::Contract(models) => models.iter().try_for_each(|&index| model(index)?.check(&shown)),
            Oracle::OlderOrRefusal { first, last } => any(*first, *last),
            Oracle::Lies { last } => any(0, *last),
        }
    }

    fn second_cuts(
        &self,
        case: &Case,
        inside: &[Snapshot],
        limit: usize,
        report: &Mutex<Report>,
    ) -> Result<(), (Cut, String)> {
        let mut seen = std::collections::HashSet::new();
        let step = inside.len().div_ceil(self.options.recovery_boundaries_max.max(1)).max(1);
        // The first are recovery itself: all of them.
        let chosen = inside.iter().enumerate().filter(|(index, _)| *index < 8 || index.is_multiple_of(step));
        for (boundary, snapshot) in chosen {
            let seed = self.options.seed ^ snapshot.boundary() ^ case.cut.boundary as u64;
            let plans = PlanOptions { limit: Some(limit), seed, ..self.options.plans.clone() };
            for plan in snapshot.plans(&plans) {
                lock(report).recovery_crashes += 1;
                let image = snapshot.crash(&plan);
                if !seen.insert(image.content_hash()) {
                    continue;
                }
                lock(report).recovery_images += 1;
                let shown = self.open_image(&self.device(image), None);
                self.judge(&case.oracle, shown)
                    .map_err(|problem| (Cut { second: Some((boundary, plan)), ..case.cut.clone() }, problem))?;
            }
        }
        Ok(())
    }

    /// On a device of its own: what is mounted afterwards must be the same whether it was checked before or not.
    fn check(&self, image: &Image, when: &str) -> Result<(), Trouble> {
        let hash = image.content_hash();
        let device = self.device(image.clone());
        let findings = self
            .subject
            .check(&device)
            .map_err(|error| Trouble::of(&format!("checking {when} failed"), &error).early())?;
        if !findings.is_empty() {
            let problem = format!("the check {when} found: {}", findings.join("; "));
            return Err(Trouble { problem, is_refusal: true, is_early: false });
        }
        if device.image().content_hash() != hash {
            return Err(Trouble::new(format!("the check {when} changed the image")));
        }
        Ok(())
    }

    /// Checks, mounts, reads, unmounts, checks, and mounts again. The boundaries of the first mount go to `inside`.
    fn open_image(&self, device: &Arc<SimDevice>, inside: Option<&Arc<Mutex<Vec<Snapshot>>>>) -> Result<Tree, Trouble> {
        let subject = self.subject;
        let seed = self.mount_seed(device);
        self.check(&device.image(), "before recovery")?;
        if let Some(inside) = inside {
            watch_into(device, inside);
        }
        let mut mounted =
            subject.mount(device, seed).map_err(|error| Trouble::of("mounting failed", &error).early())?;
        let shown = mounted.tree().map_err(|error| Trouble::of("reading everything failed", &error))?;
        mounted.unmount().map_err(|error| Trouble::of("unmounting failed", &error))?;
        device.clear_hook();
        self.check(&device.image(), "after recovery")?;
        // What recovery showed is durable: had the power gone now, with everything unflushed lost, it would still be there.
        let device = self.device(device.snapshot().durable().clone());
        let mut mounted = subject.mount(&device, seed).map_err(|error| Trouble::of("mounting again failed", &error))?;
        let again = mounted.tree().map_err(|error| Trouble::of("reading everything again failed", &error))?;
        mounted.unmount().map_err(|error| Trouble::of("unmounting again failed", &error))?;
        if shown != again {
            let differing = shown.iter().find(|(path, entry)| again.get(*path) != Some(*entry)).map(|(path, _)| path);
            return Err(Trouble::new(format!("a second mount shows something else, first at {differing:?}")));
        }
        Ok(shown)
    }

    /// Decides what background work does when, in the mount of this image.
    fn mount_seed(&self, device: &SimDevice) -> u64 {
        self.options.seed ^ device.image().content_hash()
    }
}

fn missing(cut: &Cut) -> String {
    format!("the run has no boundary {}", cut.boundary)
}

fn watch_into(device: &Arc<SimDevice>, inside: &Arc<Mutex<Vec<Snapshot>>>) {
    let inside = Arc::clone(inside);
    device.set_hook(move |device, _| lock(&inside).push(device.snapshot()));
}
