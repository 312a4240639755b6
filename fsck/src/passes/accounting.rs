//! Checks: every global counter is what the other passes have summed. Collects nothing.

use coppicefs::Result;
use coppicefs::format::journal::AccountingCounter;

use super::Checker;
use crate::problem::Problem;

pub(super) fn run(checker: &mut Checker<'_>) -> Result<()> {
    // With lost ranges the sums mean nothing, and repairing the counters by them would make it worse.
    if !checker.state.lost.is_empty() {
        return Ok(());
    }
    let totals = checker.filesystem.totals();
    for counter in AccountingCounter::ALL {
        checker.examine(1);
        let found = checker.state.totals.get(&(counter as u16)).copied().unwrap_or(0);
        let stored = totals.get(counter);
        if stored != found {
            checker.report(Problem::Accounting { counter, stored, found });
        }
    }
    Ok(())
}
