//! Every interleaving of reserving, appending, sealing and encoding, at the granularity of the mutex: the bookkeeping has no other shared
//! state, so these are all schedules that threads can have. (A loom model of the same would need the whole crate under `--cfg loom`.)

use super::*;
use crate::journal::state::Encoded;

/// One actor's steps are done in order; those of different actors in every order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Reserve(usize),
    Append(usize),
    /// An unwinding caller.
    Drop(usize),
    Seal,
    Encode,
}

const ACTORS: [&[Step]; 4] = [
    &[Step::Reserve(0), Step::Append(0)],
    &[Step::Reserve(1), Step::Append(1)],
    &[Step::Reserve(2), Step::Drop(2)],
    &[Step::Seal, Step::Encode, Step::Seal, Step::Encode],
];

fn schedules(done: [usize; 4], schedule: &mut Vec<Step>, visit: &mut impl FnMut(&[Step])) {
    let mut is_complete = true;
    for (actor, steps) in ACTORS.iter().enumerate() {
        if let Some(&step) = steps.get(done[actor]) {
            is_complete = false;
            let mut next = done;
            next[actor] += 1;
            schedule.push(step);
            schedules(next, schedule, visit);
            schedule.pop();
        }
    }
    if is_complete {
        visit(schedule);
    }
}

#[test]
fn every_schedule_keeps_order_and_totals() {
    let config = memory_config();
    let mut count = 0;
    schedules([0; 4], &mut Vec::new(), &mut |schedule| {
        count += 1;
        run(&config, schedule);
    });
    // 10! / (2! 2! 2! 4!)
    assert_eq!(count, 18_900);
}

fn run(config: &JournalConfig, schedule: &[Step]) {
    let journal = open(config, JournalStart::fresh());
    let inner = &journal.inner;
    let mut held: [Option<Reservation>; 3] = Default::default();
    // The record of each reservation, in order of reservation; and the actors that have appended.
    let mut reserved: Vec<(JournalSequence, usize)> = Vec::new();
    let mut appended = [false; 3];
    for &step in schedule {
        match step {
            Step::Reserve(actor) => {
                let reservation = journal.try_reserve(100, JournalWatermark::Normal).unwrap();
                reserved.push((reservation.sequence(), actor));
                held[actor] = Some(reservation);
            }
            Step::Append(actor) => {
                let deltas = [(AccountingCounter::Inodes, 1), (AccountingCounter::DataBytes, 10 << actor)];
                journal.append(held[actor].take().unwrap(), entry(actor as u64, 20), 1, &deltas, false);
                appended[actor] = true;
            }
            Step::Drop(actor) => held[actor] = None,
            Step::Seal => inner.state.lock().seal_used(),
            Step::Encode => {
                inner.encode_ready();
            }
        }
        check(inner, &reserved, &appended, &held, schedule);
    }
    journal.boundary().unwrap();
    check(inner, &reserved, &appended, &held, schedule);
    assert_eq!(inner.chain.lock().totals, journal.totals(), "{schedule:?}");
}

fn check(
    inner: &Inner,
    reserved: &[(JournalSequence, usize)],
    appended: &[bool; 3],
    held: &[Option<Reservation>; 3],
    schedule: &[Step],
) {
    let chain = inner.chain.lock();
    let state = inner.state.lock();
    // Everything below the chain's tip is complete, and nothing was reserved in it afterwards.
    let mut expected = Totals::default();
    for &(sequence, actor) in reserved.iter().filter(|(sequence, _)| *sequence < chain.next) {
        assert!(held[actor].is_none(), "record {sequence} was encoded without {actor}: {schedule:?}");
        if appended[actor] {
            expected.add(AccountingCounter::Inodes, 1);
            expected.add(AccountingCounter::DataBytes, 10 << actor);
        }
    }
    assert_eq!(chain.totals, expected, "{schedule:?}");
    assert!(reserved.is_sorted_by_key(|(sequence, _)| *sequence), "{schedule:?}");
    // Sequences are consecutive through the queues.
    let encoded = state.encoded.iter().map(|record: &Encoded| record.unflushed.sequence);
    let sealed = state.sealed.iter().map(|record| record.sequence);
    let all: Vec<u64> = encoded.chain(sealed).chain([state.open.sequence]).map(|sequence| sequence.0).collect();
    assert!(all.windows(2).all(|pair| pair[0] + 1 == pair[1]), "{all:?}: {schedule:?}");
    // Entries stand in order of reservation.
    for record in &state.encoded {
        let (header, payload, _) = crate::format::journal::RecordHeader::decode(&record.bytes).unwrap();
        let expected = reserved.iter().filter(|(sequence, actor)| *sequence == header.sequence && appended[*actor]);
        let expected: Vec<u64> = expected.map(|&(_, actor)| actor as u64).collect();
        assert_eq!(numbers(&LogRecord { header, payload: payload.to_vec() }), expected, "{schedule:?}");
    }
}
