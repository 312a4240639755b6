//! filesystem.
