//! Errors of writeback, remembered so that each open file hears of each of them once, as Linux's errseq does.

use crate::error::{Error, Result};
use crate::sync::Mutex;

#[derive(Debug, Default)]
struct State {
    /// How many errors there were.
    count: u64,
    /// Whether anybody has heard of the newest.
    seen: bool,
    newest: Option<Error>,
}

/// The errors of one address space.
#[derive(Debug, Default)]
pub struct ErrorSequence(Mutex<State>);

/// What one open file has heard of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ErrorCursor(u64);

impl ErrorSequence {
    /// Remembers an error.
    pub fn record(&self, error: Error) {
        let mut state = self.0.lock();
        state.count += 1;
        state.seen = false;
        state.newest = Some(error);
    }

    /// A cursor for a file that is opened now: it will hear of later errors, and of the newest one if nobody has heard of it yet.
    #[must_use]
    pub fn cursor(&self) -> ErrorCursor {
        let state = self.0.lock();
        ErrorCursor(if state.seen { state.count } else { state.count.saturating_sub(1) })
    }

    /// The newest error that `cursor` has not heard of; it will be reported again.
    ///
    /// # Errors
    /// That error.
    pub fn peek(&self, cursor: &ErrorCursor) -> Result<()> {
        let state = self.0.lock();
        match &state.newest {
            Some(error) if cursor.0 != state.count => Err(error.clone()),
            _ => Ok(()),
        }
    }

    /// Reports the newest error that `cursor` has not heard of, and moves the cursor past it.
    ///
    /// # Errors
    /// The error that is reported.
    pub fn check(&self, cursor: &mut ErrorCursor) -> Result<()> {
        let mut state = self.0.lock();
        if cursor.0 == state.count {
            return Ok(());
        }
        cursor.0 = state.count;
        state.seen = true;
        state.newest.clone().map_or(Ok(()), Err)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_cursor_hears_of_each_error_once() {
        let errors = ErrorSequence::default();
        let mut early = errors.cursor();
        assert!(errors.check(&mut early).is_ok());
        errors.record(Error::ReadOnly);
        assert!(errors.peek(&early).is_err() && errors.peek(&early).is_err());
        let mut unheard = errors.cursor();
        assert!(errors.check(&mut early).is_err());
        assert!(errors.check(&mut early).is_ok());
        let mut late = errors.cursor();
        assert!(errors.check(&mut late).is_ok(), "somebody has heard of it before this file was opened");
        assert!(errors.check(&mut unheard).is_err(), "nobody had when this one was opened");
        errors.record(Error::ReadOnly);
        assert!(errors.check(&mut late).is_err());
    }
}
