//! `mount-coppice` with a filesystem in memory behind it (the image is not looked into): for tests of the command, the daemon
//! and the adapter.

use std::process::ExitCode;
use std::sync::Arc;

use coppicefs::fuse::MemoryFilesystem;
use coppicefs_tools::mount::{self, Mountable};

struct Memory(Arc<MemoryFilesystem>);

impl Mountable for Memory {
    type Operations = MemoryFilesystem;

    fn operations(&self) -> Arc<MemoryFilesystem> {
        Arc::clone(&self.0)
    }

    fn close(&self) -> coppicefs::Result<()> {
        Ok(())
    }
}

fn main() -> ExitCode {
    mount::main_with(|_, _| Ok(Memory(Arc::new(MemoryFilesystem::new()))))
}
