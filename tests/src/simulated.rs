//! Images on simulated devices, as the tests of bad media in this process open them.

use std::sync::Arc;

use coppicefs::device::{Image, SimDevice, SimOptions};

/// A device of 4 KiB blocks with this image on it.
#[must_use]
pub fn device_of(image: Image) -> Arc<SimDevice> {
    Arc::new(SimDevice::from_image(image, SimOptions { block_bytes: 4096, ..SimOptions::default() }))
}
