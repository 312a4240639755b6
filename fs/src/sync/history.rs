//! What was done to one register, and whether some serial order explains it.
//!
//! Operations of one register are in order if each can be given a moment between its beginning and its end such that every read returns what the last
//! write before it wrote. A file is many registers (its half blocks), and registers compose: if each is in order, so is the whole.

use std::collections::HashSet;

/// One read or write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operation {
    /// When it began and when it had ended, by one clock.
    pub begin: u64,
    pub end: u64,
    pub is_write: bool,
    pub value: u64,
}

/// Whether some serial order explains the operations of a register that holds 0 at first. At most 64 of them.
pub fn is_explained(operations: &[Operation]) -> bool {
    assert!(operations.len() <= 64, "{} operations of one register", operations.len());
    let all = if operations.len() == 64 { u64::MAX } else { (1 << operations.len()) - 1 };
    explain(operations, all, 0, &mut HashSet::new())
}

/// `left`: the operations that have no place yet. `value`: what the register holds. `hopeless`: what was tried.
fn explain(operations: &[Operation], left: u64, value: u64, hopeless: &mut HashSet<(u64, u64)>) -> bool {
    let of = |set: u64| operations.iter().enumerate().filter(move |(number, _)| set & 1 << number != 0);
    let Some(first_end) = of(left).map(|(_, operation)| operation.end).min() else { return true };
    if !hopeless.insert((left, value)) {
        return false;
    }
    // The next one is any that began before the first of the rest had ended.
    of(left).filter(|(_, operation)| operation.begin <= first_end).any(|(number, operation)| {
        let rest = left & !(1 << number);
        if operation.is_write {
            explain(operations, rest, operation.value, hopeless)
        } else {
            operation.value == value && explain(operations, rest, value, hopeless)
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(begin: u64, end: u64, value: u64) -> Operation {
        Operation { begin, end, is_write: true, value }
    }

    fn read(begin: u64, end: u64, value: u64) -> Operation {
        Operation { begin, end, is_write: false, value }
    }

    #[test]
    fn what_a_serial_order_explains_is_accepted_and_nothing_else() {
        assert!(is_explained(&[]));
        assert!(is_explained(&[read(0, 1, 0), write(2, 3, 7), read(4, 5, 7)]));
        // While a write is under way, either.
        assert!(is_explained(&[write(0, 9, 7), read(1, 2, 0), read(3, 4, 7), read(5, 6, 7)]));
        assert!(is_explained(&[write(0, 9, 7), write(1, 8, 8), read(2, 3, 8), read(4, 5, 7)]));
        // But not backwards, not what nobody wrote, not what was overwritten before.
        assert!(!is_explained(&[write(0, 9, 7), read(1, 2, 7), read(3, 4, 0)]));
        assert!(!is_explained(&[write(0, 1, 7), read(2, 3, 9)]));
        assert!(!is_explained(&[write(0, 1, 7), write(2, 3, 8), read(4, 5, 7)]));
        assert!(!is_explained(&[write(0, 9, 7), write(1, 8, 8), read(2, 3, 8), read(4, 5, 7), read(6, 7, 8)]));
    }
}
