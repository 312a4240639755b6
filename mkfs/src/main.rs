//! mkfs.
fn main() {}
