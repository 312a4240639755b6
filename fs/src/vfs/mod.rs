//! POSIX operations over the namespace, the page cache and the data layer.

mod types;

pub use types::*;
