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

/// What an image was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Allowed,
    Refused,
}

/// What is shown is not allowed.
struct Refusal {
    problem: String,
    /// The boundary whose oracle says so.
    promised_at: Option<usize>,
}

impl Refusal {
    /// With the cut that shows it.
    fn of(self, cut: &Cut) -> (Cut, String) {
        let promised_at = self.promised_at.filter(|&boundary| boundary != cut.boundary);
        (Cut { promised_at, ..cut.clone() }, self.problem)
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
        // Whose boundaries are wanted is mounted and unmounted.
        let twice = index.is_multiple_of(self.options.twice_one_in.max(1)) || second_plans > 0;
        let shown = self.open_image(&device, self.seed_of(cut), twice, (second_plans > 0).then_some(&inside));
        if self.judge(&case.oracle, shown).map_err(|refusal| refusal.of(cut))? == Verdict::Refused {
            lock(report).refused += 1;
        }
        let inside = std::mem::take(&mut *lock(&inside));
        self.second_cuts(case, &inside, second_plans, report)
    }

    /// Opens one cut exactly, its second cut too.
    pub fn open_exactly(&self, cut: &Cut) -> Result<(), String> {
        let oracle = self.recording.oracle(cut, self.options).ok_or_else(|| missing(cut))?;
        let device = match &cut.second {
            Some(_) => self.device(self.image(cut)?, self.seed_of(cut)),
            None => self.first_device(cut)?,
        };
        let shown = self.open_image(&device, self.seed_of(cut), true, None);
        self.judge(&oracle, shown).map(|_| ()).map_err(|refusal| refusal.problem)
    }

    /// The image that a cut leaves, after its second cut if it has one; after a kill alone, what the host would write yet is on it.
    pub fn image(&self, cut: &Cut) -> Result<Image, String> {
        let device = self.first_device(cut)?;
        let Some((boundary, plan)) = &cut.second else { return Ok(device.image()) };
        let inside: Arc<Mutex<Vec<Snapshot>>> = Arc::default();
        let seed = self.seed_of(&Cut { second: None, ..cut.clone() });
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
        let seed = self.seed_of(&Cut { second: None, ..cut.clone() });
        match &cut.plan {
            None => {
                let snapshot = self.recording.snapshot(cut).ok_or_else(|| missing(cut))?;
                Ok(Arc::new(SimDevice::from_snapshot(snapshot, sim_options(self.options, seed))))
            }
            Some(_) => self.recording.image(cut).map(|image| self.device(image, seed)).ok_or_else(|| missing(cut)),
        }
    }

    fn device(&self, image: Image, seed: u64) -> Arc<SimDevice> {
        Arc::new(SimDevice::from_image(image, sim_options(self.options, seed)))
    }

    /// Decides what the device and background work do after a cut: another thing after each, and the same in each run. (The image's own hash
    /// would not do: a new filesystem has a random id.)
    fn seed_of(&self, cut: &Cut) -> u64 {
        let hash = cut
            .arguments_of_medium()
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
        self.options.seed ^ hash
    }

    fn judge(&self, oracle: &Oracle, shown: Result<Tree, Trouble>) -> Result<Verdict, Refusal> {
        let refusal = |problem: String| Refusal { problem, promised_at: None };
        let shown = match (oracle, shown) {
            (_, Ok(shown)) => shown,
            (Oracle::OlderOrRefusal { .. }, Err(Trouble { is_refusal: true, is_early: true, .. }))
            | (Oracle::Lies { .. }, Err(Trouble { is_refusal: true, .. })) => return Ok(Verdict::Refused),
            (_, Err(trouble)) => return Err(refusal(trouble.problem)),
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
            Oracle::Contract(models) => {
                for &(index, boundary) in models {
                    let allowed = model(index).and_then(|model| model.check(&shown));
                    allowed.map_err(|problem| Refusal { problem, promised_at: Some(boundary) })?;
                }
            }
            Oracle::OlderOrRefusal { first, last } => any(*first, *last).map_err(refusal)?,
            Oracle::Lies { last } => any(0, *last).map_err(refusal)?,
        }
        Ok(Verdict::Allowed)
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
            let plans_seed = self.options.seed ^ snapshot.boundary() ^ case.cut.boundary as u64;
            let plans = PlanOptions { limit: Some(limit), seed: plans_seed, ..self.options.plans.clone() };
            for (index, plan) in snapshot.plans(&plans).enumerate() {
                lock(report).recovery_crashes += 1;
                let image = snapshot.crash(&plan);
                if !seen.insert(image.content_hash()) {
                    continue;
                }
                lock(report).recovery_images += 1;
                let twice = index.is_multiple_of(self.options.twice_one_in.max(1));
                let cut = Cut { second: Some((boundary, plan)), ..case.cut.clone() };
                let seed = self.seed_of(&cut);
                let shown = self.open_image(&self.device(image, seed), seed, twice, None);
                self.judge(&case.oracle, shown).map_err(|refusal| refusal.of(&cut))?;
            }
        }
        Ok(())
    }

    /// On a device of its own: what is mounted afterwards must be the same whether it was checked before or not.
    fn check(&self, image: &Image, seed: u64, when: &str) -> Result<(), Trouble> {
        let hash = image.content_hash();
        let device = self.device(image.clone(), seed);
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

    /// Mounts, reads and checks; if `twice`, it checks before too, unmounts, and mounts again. The boundaries of the first mount go to
    /// `inside`.
    fn open_image(
        &self,
        device: &Arc<SimDevice>,
        seed: u64,
        twice: bool,
        inside: Option<&Arc<Mutex<Vec<Snapshot>>>>,
    ) -> Result<Tree, Trouble> {
        let subject = self.subject;
        if twice {
            self.check(&device.image(), seed, "before recovery")?;
        }
        if let Some(inside) = inside {
            watch_into(device, inside);
        }
        let mut mounted =
            subject.mount(device, seed).map_err(|error| Trouble::of("mounting failed", &error).early())?;
        let shown = mounted.tree().map_err(|error| Trouble::of("reading everything failed", &error))?;
        if !twice {
            // The process dies: what it has written is as good as what it leaves in order.
            drop(mounted);
            device.clear_hook();
            self.check(&device.image(), seed, "after recovery")?;
            return Ok(shown);
        }
        mounted.unmount().map_err(|error| Trouble::of("unmounting failed", &error))?;
        device.clear_hook();
        self.check(&device.image(), seed, "after recovery")?;
        // What recovery showed is durable: had the power gone now, with everything unflushed lost, it would still be there.
        let device = self.device(device.snapshot().durable().clone(), seed);
        let mut mounted = subject.mount(&device, seed).map_err(|error| Trouble::of("mounting again failed", &error))?;
        let again = mounted.tree().map_err(|error| Trouble::of("reading everything again failed", &error))?;
        mounted.unmount().map_err(|error| Trouble::of("unmounting again failed", &error))?;
        if shown != again {
            let differing = shown.iter().find(|(path, entry)| again.get(*path) != Some(*entry)).map(|(path, _)| path);
            return Err(Trouble::new(format!("a second mount shows something else, first at {differing:?}")));
        }
        Ok(shown)
    }
}

fn missing(cut: &Cut) -> String {
    format!("the run has no boundary {}", cut.boundary)
}

fn watch_into(device: &Arc<SimDevice>, inside: &Arc<Mutex<Vec<Snapshot>>>) {
    let inside = Arc::clone(inside);
    device.set_hook(move |device, _| lock(&inside).push(device.snapshot()));
}
