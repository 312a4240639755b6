//! coppice.
fn main() {}
