//! What a mount serves: the filesystem of an image, through its vfs.

use std::sync::Arc;

use coppicefs::filesystem::{Filesystem, OpenOptions};
use coppicefs::options::MountOptions;
use coppicefs::vfs::Vfs;

use crate::mount::{Mountable, Target};
use crate::place;

/// The open filesystem of an image.
pub struct Image(Arc<Filesystem>);

impl From<Arc<Filesystem>> for Image {
    fn from(filesystem: Arc<Filesystem>) -> Self {
        Self(filesystem)
    }
}

impl Mountable for Image {
    type Operations = Vfs;

    fn operations(&self) -> Arc<Vfs> {
        Arc::clone(self.0.vfs())
    }

    fn close(&self) -> coppicefs::Result<()> {
        self.0.close()
    }
}

/// Opens the image that a mount names, and recovers it.
///
/// # Errors
/// One line that says what is wrong with it and how to go on.
pub fn open(target: &Target, options: &MountOptions) -> coppicefs::Result<Image> {
    Ok(Image(Filesystem::open_path(&target.image, &place::kept(OpenOptions::from(options)))?))
}
