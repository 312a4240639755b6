//! Assembly: open, run, close.

pub mod format;
