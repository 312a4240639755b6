//! memory.
mod buffer;
pub use buffer::{ALIGNMENT_BYTES, AlignedBuffer};
