//! fsck.
fn main() {}
