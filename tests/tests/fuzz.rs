//! The fuzz targets (`coppicefs_tests::fuzz`): the corpus, and inputs made from it by seed.
//!
//! `COPPICE_FUZZ_SECONDS` (2) is how long each target is fed, `COPPICE_SEED` (1) what is made: the long form is
//! `COPPICE_FUZZ_SECONDS=600 cargo test --release -p coppicefs-tests --test fuzz`. An input that fails is kept in the corpus, and tried first
//! from then on. `COPPICE_FUZZ_WRITE_SEEDS=1` writes the inputs that the code itself makes, after a change of the format.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use coppicefs_tests::crash::seed_or;
use coppicefs_tests::fuzz::{Random, TARGETS, Target, corpus, mutate, seeds, target};
use coppicefs_tests::limit::{Limit, lengthen};
use coppicefs_tests::mount::number;

/// No input may take longer.
const INPUT_TIME_MAX: Duration = Duration::from_secs(10);

fn inputs(target: &Target) -> Vec<(String, Vec<u8>)> {
    let mut inputs: Vec<_> = fs::read_dir(corpus(target))
        .unwrap_or_else(|error| panic!("{}: {error}", corpus(target).display()))
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), fs::read(&path).unwrap()))
        .collect();
    inputs.sort();
    inputs
}

/// An input that fails is written down.
fn feed(target: &Target, name: &str, input: &[u8]) {
    let start = Instant::now();
    // One that does not come back is found here.
    let under_way = std::env::temp_dir().join(format!("coppice-fuzz-{}-{}", target.name, std::process::id()));
    if target.is_slow {
        fs::write(&under_way, input).unwrap();
    }
    let outcome = catch_unwind(AssertUnwindSafe(|| (target.run)(input)));
    let took = start.elapsed();
    if target.is_slow {
        fs::remove_file(&under_way).unwrap();
    }
    if outcome.is_err() || took > INPUT_TIME_MAX {
        let kept = corpus(target).join(format!("failure-{:08x}", crc32c::crc32c(input)));
        fs::write(&kept, input).unwrap();
        panic!("{} failed by {name} after {took:?}: the input is kept as {}", target.name, kept.display());
    }
}

fn fuzz(name: &str) {
    let seconds = number("COPPICE_FUZZ_SECONDS", 2);
    lengthen(1 + seconds / 60);
    let _limit = Limit::new();
    let target = target(name);
    let inputs = inputs(target);
    assert!(!inputs.is_empty(), "{name} has no corpus");
    for (name, input) in &inputs {
        feed(target, name, input);
    }
    let mut random = Random::new(seed_or(1));
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut made = 0_u64;
    // What was made is mutated again: a chain of changes goes further than one step from the corpus.
    let mut pool: Vec<Vec<u8>> = inputs.into_iter().map(|(_, input)| input).collect();
    while Instant::now() < end {
        let [one, other] = [random.below(pool.len()), random.below(pool.len())];
        let input = mutate(&mut random, &pool[one], &pool[other]);
        feed(target, &format!("input {made} of COPPICE_SEED={}", seed_or(1)), &input);
        if pool.len() < 4096 && random.below(16) == 0 {
            pool.push(input);
        }
        made += 1;
    }
    println!("{name}: {made} inputs");
    assert!(made > 0);
}

#[test]
fn superblock() {
    fuzz("superblock");
}

#[test]
fn journal_record() {
    fuzz("journal-record");
}

#[test]
fn node() {
    fuzz("node");
}

#[test]
fn value() {
    fuzz("value");
}

#[test]
fn image() {
    fuzz("image");
}

#[test]
fn operations() {
    fuzz("operations");
}

#[test]
fn seeds_are_in_the_corpus() {
    for target in &TARGETS {
        let seeds = seeds(target);
        assert!(!seeds.is_empty(), "{}", target.name);
        if std::env::var_os("COPPICE_FUZZ_WRITE_SEEDS").is_some() {
            fs::create_dir_all(corpus(target)).unwrap();
            for (number, seed) in seeds.iter().enumerate() {
                fs::write(corpus(target).join(format!("seed-{number:03}")), seed).unwrap();
            }
        }
        let kept = inputs(target).iter().filter(|(name, _)| name.starts_with("seed-")).count();
        assert_eq!(kept, seeds.len(), "{}: again with COPPICE_FUZZ_WRITE_SEEDS=1", target.name);
    }
}
