//! The mount helper: `mount.coppice` and `mount.fuse.coppice` are links to it, or to `coppice`.

#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    coppicefs_tools::mount::main_with(coppicefs_tools::image::open)
}
