//! Performing a workload once, and remembering every moment at which it could end.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use coppicefs::device::{BlockDevice, BoundaryKind, Image, SimDevice, Snapshot, UnflushedWrite};
use rustix::io::Errno;

use super::{CrashOptions, Fault, Mounted, Subject, lock, sim_options};
use crate::model::Model;
use crate::operation::Operation;

/// A moment of the run: what was on its way to the medium, and what the oracle knew.
pub(super) struct Moment {
    pub snapshot: Snapshot,
    /// Index of the oracle.
    pub model: usize,
    /// How many writes were flushed before.
    pub flushed: usize,
}

/// A run.
pub(super) struct Recording {
    pub moments: Vec<Moment>,
    /// The oracle after each operation's beginning and end, where it changed.
    pub models: Vec<Arc<Model>>,
    /// What was durable at the beginning.
    pub before: Image,
    /// Every write that was flushed since.
    pub history: Vec<Arc<UnflushedWrite>>,
    /// Where the log lies.
    pub log: Vec<Range<u64>>,
    /// How many operations found no space.
    pub lacked_space: usize,
    /// The device has failed.
    pub has_failed: bool,
}

#[derive(Default)]
struct Growing {
    moments: Vec<Moment>,
    models: Vec<Arc<Model>>,
    history: Vec<Arc<UnflushedWrite>>,
}

impl Growing {
    fn remember(&mut self, device: &SimDevice) {
        let moment = Moment {
            snapshot: device.snapshot(),
            model: self.models.len().saturating_sub(1),
            flushed: self.history.len(),
        };
        self.moments.push(moment);
    }

    /// The oracle, to be changed: from now on it is another one.
    fn change(&mut self, change: impl FnOnce(&mut Model)) {
        let mut model = self.models.last().map_or_else(|| Model::new(4096), |model| Model::clone(model));
        change(&mut model);
        self.models.push(Arc::new(model));
    }

    fn model(&self) -> Arc<Model> {
        self.models.last().map_or_else(|| Arc::new(Model::new(4096)), Arc::clone)
    }
}

/// What the run's end is, when it is not a failure.
enum After {
    /// Go on with the next operation.
    Next,
    /// A device fault has ended the acknowledgements.
    Latched,
}

struct Run<'a> {
    subject: &'a dyn Subject,
    options: &'a CrashOptions,
    growing: Arc<Mutex<Growing>>,
    mounted: Box<dyn Mounted>,
    is_latched: bool,
    lacked_space: usize,
}

/// Performs the workload. The error names the operation by its index in the workload.
pub(super) fn record(
    subject: &dyn Subject,
    workload: &[Operation],
    options: &CrashOptions,
) -> Result<Recording, (String, usize)> {
    let at_end = |problem: String| (problem, workload.len());
    let device = Arc::new(SimDevice::new(options.device_bytes, sim_options(options, options.seed)));
    subject.format(&device).map_err(|error| at_end(format!("format failed: {error}")))?;
    device.flush().map_err(|error| at_end(error.to_string()))?;
    let before = device.image();
    let log = subject.log_ranges(&device).map_err(|error| at_end(error.to_string()))?;
    device.lie_about_flush(options.device_lies);
    let models = vec![Arc::new(Model::new(options.block_bytes))];
    let growing = Arc::new(Mutex::new(Growing { models, ..Growing::default() }));
    let at_boundary = Arc::clone(&growing);
    let lies = options.device_lies;
    device.set_hook(move |device, boundary| {
        let mut growing = lock(&at_boundary);
        growing.remember(device);
        if boundary.kind == BoundaryKind::Flush && !lies {
            let flushed = growing.moments.last().map(|moment| moment.snapshot.unflushed().to_vec());
            growing.history.extend(flushed.unwrap_or_default());
        }
    });
    let mounted =
        subject.mount(&device, options.seed).map_err(|error| at_end(format!("the first mount failed: {error}")))?;
    match options.fault {
        Some(Fault::Write(nth)) => device.fail_write(nth, Errno::IO),
        Some(Fault::Flush(nth)) => device.fail_flush(nth, Errno::IO),
        None => {}
    }
    let mut run = Run { subject, options, growing: Arc::clone(&growing), mounted, is_latched: false, lacked_space: 0 };
    for (index, operation) in workload.iter().enumerate() {
        match run.perform(operation).map_err(|problem| (problem, index))? {
            After::Next => {}
            After::Latched => run.is_latched = true,
        }
    }
    let (lacked_space, has_failed) = (run.lacked_space, run.is_latched);
    run.end(&device).map_err(at_end)?;
    device.clear_hook();
    let Growing { moments, models, history } = std::mem::take(&mut *lock(&growing));
    Ok(Recording { moments, models, before, history, log, lacked_space, has_failed })
}

impl Run<'_> {
    fn perform(&mut self, operation: &Operation) -> Result<After, String> {
        if *operation == Operation::Begin {
            lock(&self.growing).moments.clear();
        }
        let previous = lock(&self.growing).model();
        let mut expected = Ok(());
        lock(&self.growing).change(|model| expected = model.begin(operation));
        let answer = self.mounted.perform(operation).map_err(|error| (error.errno(), error));
        match (&expected, &answer) {
            (_, Ok(())) if self.is_latched && operation.is_sync() => {
                Err("was acknowledged as durable, though the device had failed before".into())
            }
            (Ok(()), Ok(())) => {
                let promised = if self.subject.is_durable_at_once() { &Operation::Sync } else { operation };
                lock(&self.growing).change(|model| model.acknowledge(promised));
                Ok(After::Next)
            }
            (Err(expected), Err((errno, _))) if expected == errno => Ok(After::Next),
            (Ok(()), Err((Errno::NOSPC, error))) if self.options.may_lack_space => {
                if operation.gives_space_back() {
                    return Err(format!("gives space back and answered {error}"));
                }
                self.lacked_space += 1;
                let done = self.mounted.bytes_done();
                let kept = operation.cut_to(done);
                lock(&self.growing).change(|model| {
                    *model = Model::clone(&previous);
                    if let Some(kept) = kept {
                        // It fits, since the whole did.
                        let _ = model.begin(&kept);
                    }
                });
                Ok(After::Next)
            }
            (_, Err((Errno::IO | Errno::ROFS, _))) if self.options.fault.is_some() => {
                // What the failure interrupted may be there or not: the oracle has it as begun. What is refused afterwards is not there.
                if self.is_latched {
                    lock(&self.growing).models.push(previous);
                }
                Ok(After::Latched)
            }
            (expected, answer) => {
                let answer = answer.as_ref().map_err(|(_, error)| error.to_string());
                Err(format!("answered {answer:?}, should have answered {expected:?}"))
            }
        }
    }

    fn end(mut self, device: &SimDevice) -> Result<(), String> {
        if self.is_latched {
            lock(&self.growing).remember(device);
            // Nothing can be asked of it any more; but it must come to an end.
            let _ = self.mounted.unmount();
            lock(&self.growing).remember(device);
            return Ok(());
        }
        let shown = self.mounted.tree().map_err(|error| format!("reading everything failed: {error}"))?;
        let model = lock(&self.growing).model();
        model.check_live(&shown).map_err(|problem| format!("with no crash at all: {problem}"))?;
        lock(&self.growing).remember(device);
        match self.mounted.unmount() {
            // An unmounted filesystem is a synced one.
            Ok(()) => lock(&self.growing).change(|model| model.acknowledge(&Operation::Sync)),
            Err(_) if self.options.fault.is_some() => {}
            Err(error) => return Err(format!("unmounting failed: {error}")),
        }
        lock(&self.growing).remember(device);
        Ok(())
    }
}
