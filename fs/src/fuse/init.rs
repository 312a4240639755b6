//! What is agreed with the kernel when the session starts: exactly the capabilities that the design needs, no more, since several
//! that fuser 0.18.0 accepts are not safe in it (`FUSE_OVER_IO_URING` hangs, `FUSE_SETXATTR_EXT` panics, and others).

use fuser::{InitFlags, KernelConfig};

use crate::options::CacheMode;

/// Largest WRITE and READ: 256 pages, the kernel's default `max_pages_limit`.
pub const REQUEST_BYTES_MAX: u32 = 1 << 20;

/// Requests that the kernel may have in flight in the background (readahead, asynchronous direct I/O).
const BACKGROUND_REQUESTS_MAX: u16 = 128;

/// What the design asks for; `ATOMIC_O_TRUNC` is not among it.
fn wanted(cache: CacheMode) -> InitFlags {
    let delayed_writes = match cache {
        CacheMode::Writeback => InitFlags::FUSE_WRITEBACK_CACHE,
        CacheMode::Kernel | CacheMode::Daemon => InitFlags::empty(),
    };
    delayed_writes
        | InitFlags::FUSE_PARALLEL_DIROPS
        | InitFlags::FUSE_DO_READDIRPLUS
        | InitFlags::FUSE_READDIRPLUS_AUTO
        | InitFlags::FUSE_ASYNC_DIO
        | InitFlags::FUSE_POSIX_ACL
        | InitFlags::FUSE_DONT_MASK
        | InitFlags::FUSE_EXPORT_SUPPORT
        | InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP
        | InitFlags::FUSE_CACHE_SYMLINKS
        | InitFlags::FUSE_EXPLICIT_INVAL_DATA
        | InitFlags::FUSE_MAX_PAGES
        | InitFlags::FUSE_HAS_IOCTL_DIR
        | InitFlags::FUSE_HANDLE_KILLPRIV_V2
}

/// What was agreed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Negotiated {
    /// The kernel's protocol version, major and minor.
    pub protocol: (u32, u32),
    /// Capabilities that the kernel offered (`FUSE_*` bits of INIT).
    pub offered: u64,
    /// Those that are in use.
    pub granted: u64,
    /// Largest readahead that the kernel offered, in bytes.
    pub readahead_bytes_offered: u32,
    /// Largest WRITE that was asked for, in bytes.
    pub write_bytes_max: u32,
}

impl Negotiated {
    /// Names of the granted or offered capabilities among `bits`.
    #[must_use]
    pub fn names(bits: u64) -> Vec<&'static str> {
        InitFlags::from_bits_truncate(bits).iter_names().map(|(name, _)| name).collect()
    }

    /// Whether the capability with this name (`FUSE_...`) is in use.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        InitFlags::from_name(name).is_some_and(|flag| self.granted & flag.bits() != 0)
    }
}

/// Asks for what is wanted as far as this kernel has it.
pub(super) fn negotiate(config: &mut KernelConfig, cache: CacheMode) -> Negotiated {
    let offered = config.capabilities();
    let granted = wanted(cache) & offered;
    // Cannot fail: it is a subset of what is offered.
    let _ = config.add_capabilities(granted);
    let _ = config.set_max_write(REQUEST_BYTES_MAX);
    let _ = config.set_max_background(BACKGROUND_REQUESTS_MAX);
    // Asking for more than is offered says how much that is.
    let readahead_bytes_offered = match config.set_max_readahead(u32::MAX) {
        Ok(_) => u32::MAX,
        Err(most) => {
            let _ = config.set_max_readahead(most);
            most
        }
    };
    let version = config.kernel_abi();
    Negotiated {
        protocol: (version.0, version.1),
        offered: offered.bits(),
        granted: (granted | (offered & (InitFlags::FUSE_ASYNC_READ | InitFlags::FUSE_BIG_WRITES))).bits(),
        readahead_bytes_offered,
        write_bytes_max: REQUEST_BYTES_MAX,
    }
}
