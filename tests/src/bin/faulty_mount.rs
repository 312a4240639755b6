//! `coppice-faulty-mount`: `mount-coppice` on a device that misbehaves as `COPPICE_FAULTS` says (`coppicefs_tests::faulty`). For tests only.

#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::sync::Arc;

use coppicefs::device::FileOptions;
use coppicefs::filesystem::{Filesystem, OpenOptions};
use coppicefs::options::MountOptions;
use coppicefs::space::TestSwitches;
use coppicefs::{Error, Result};
use coppicefs_tests::faulty::{FaultPlan, FaultyDevice};
use coppicefs_tools::image::Image;
use coppicefs_tools::mount::Target;

fn open(target: &Target, options: &MountOptions) -> Result<Image> {
    let plan = std::env::var("COPPICE_FAULTS").unwrap_or_default();
    let plan: FaultPlan = plan.parse().map_err(Error::Invalid)?;
    let file = FileOptions { read_only: options.read_only, ..FileOptions::default() };
    let device = Filesystem::open_device_waiting(&target.image, &file)?;
    let switches = TestSwitches { refuse_allocations: plan.no_space(), ..TestSwitches::default() };
    let device = FaultyDevice::new(Arc::new(device), plan);
    Ok(Filesystem::open(vec![Arc::new(device)], &OpenOptions { switches, ..OpenOptions::from(options) })?.into())
}

fn main() -> ExitCode {
    coppicefs_tools::mount::main_with(open)
}
