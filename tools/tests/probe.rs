//! The facts that the design relies on hold for the kernel that the tests run on.

#[test]
fn every_fact_holds() {
    if !rustix::process::geteuid().is_root() || std::fs::File::open("/dev/fuse").is_err() {
        eprintln!("skipped: needs root and /dev/fuse");
        return;
    }
    let facts = coppicefs_tools::probe::observe().unwrap();
    assert!(facts.len() > 50, "{}", facts.len());
    let differing: Vec<_> = facts.iter().filter(|fact| !fact.holds).collect();
    assert!(differing.is_empty(), "{differing:#?}");
}
