//! mount.
fn main() {}
