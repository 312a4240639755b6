//! One mount that is being served.

use std::sync::OnceLock;

use fuser::{Config, SessionACL};

use super::adapter::Adapter;
use super::crew::Crew;
use super::init::Negotiated;
use super::mounts::{self, MountRequest, Mounted};
use super::operations::Operations;
use crate::error::{Error, Result};
use crate::options::CacheMode;
use crate::sync::{Arc, Mutex};

/// How a mount is served.
#[derive(Clone, Copy, Debug)]
pub struct SessionSettings {
    /// How the kernel's page cache is used for file data.
    pub cache: CacheMode,
    /// Threads that read requests and serve them, at least 1. Each may block in one request.
    pub threads: usize,
}

impl Default for SessionSettings {
    fn default() -> Self {
        Self { cache: CacheMode::Kernel, threads: 8 }
    }
}

/// A mount that exists and whose parameters are agreed with the kernel; requests wait until [`Self::serve`] runs.
pub struct Session<O: Operations> {
    session: fuser::Session<Adapter<O>>,
    mounted: Mounted,
    negotiated: Negotiated,
}

impl<O: Operations> std::fmt::Debug for Session<O> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").field("mounted", &self.mounted).finish_non_exhaustive()
    }
}

impl<O: Operations> Session<O> {
    /// Mounts `operations`. Nothing is left mounted if it fails.
    ///
    /// # Errors
    /// What the kernel or fusermount3 said.
    pub fn mount(operations: Arc<O>, request: &MountRequest, settings: SessionSettings) -> Result<Self> {
        let (connection, mounted) = mounts::mount(request)?;
        let negotiated = Arc::new(Mutex::new(Negotiated::default()));
        let notifier = Arc::new(OnceLock::new());
        let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let crew = Crew::new(settings.threads.max(1), processors);
        let adapter = Adapter::new(operations, settings.cache, Arc::clone(&negotiated), Arc::clone(&notifier), crew);
        // With the kernel's permission checks switched on, this is about which user's requests fuser lets through at all.
        let acl = if request.allow_other { SessionACL::All } else { SessionACL::Owner };
        let mut config = Config::default();
        config.acl = acl;
        config.n_threads = Some(settings.threads.max(1));
        // A queue for each thread, where the host lets us open the device (a user often may not).
        config.clone_fd = std::fs::OpenOptions::new().read(true).write(true).open("/dev/fuse").is_ok();
        match fuser::Session::from_fd(adapter, connection, acl, config) {
            Ok(session) => {
                let _ = notifier.set(session.notifier());
                let negotiated = *negotiated.lock();
                Ok(Self { session, mounted, negotiated })
            }
            Err(error) => {
                let _ = mounted.unmount(true);
                Err(Error::io("the FUSE handshake failed", error))
            }
        }
    }

    /// The mount, to unmount it from elsewhere.
    #[must_use]
    pub fn mounted(&self) -> &Mounted {
        &self.mounted
    }

    /// What was agreed with the kernel.
    #[must_use]
    pub fn negotiated(&self) -> Negotiated {
        self.negotiated
    }

    /// Serves requests until the mount is gone; the filesystem is still open then, and the caller closes it.
    ///
    /// # Errors
    /// If reading requests failed: the mount is then taken away.
    pub fn serve(self) -> Result<()> {
        let mounted = self.mounted;
        match self.session.run() {
            // Of a connection that has ended the kernel says ENODEV to those who wait, but this to one who had just taken a request.
            Err(error) if error.raw_os_error() != Some(libc::ECONNABORTED) => {
                let _ = mounted.unmount(true);
                Err(Error::io("serving FUSE requests failed", error))
            }
            _ => Ok(()),
        }
    }
}
