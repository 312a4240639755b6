//! What people are told of file data that cannot be read: one line in the log for each place, with the path of the file.
//!
//! Locks: the caller holds none, since the path is looked up in the trees. What was told has a mutex of its own.

use std::collections::VecDeque;

use super::Vfs;
use crate::error::Error;
use crate::sync::Mutex;
use crate::units::InodeNumber;

/// Places that are remembered, so that a reader who tries again does not fill the log.
const TOLD_MAX: usize = 256;

/// What was told, newest last.
#[derive(Debug, Default)]
pub(super) struct Told(Mutex<VecDeque<(InodeNumber, String)>>);

impl Told {
    /// Whether it has not been told yet; now it has.
    fn is_news(&self, inode: InodeNumber, text: &str) -> bool {
        let mut told = self.0.lock();
        if told.iter().any(|(known, what)| *known == inode && what == text) {
            return false;
        }
        if told.len() >= TOLD_MAX {
            told.pop_front();
        }
        told.push_back((inode, text.to_owned()));
        true
    }
}

impl Vfs {
    /// Says in the log what is damaged and in which file, once for each place. Other errors are the caller's own.
    pub(super) fn tell_of_damage(&self, inode: InodeNumber, error: &Error) {
        let text = error.to_string();
        if !error.is_media_error() || !self.told.is_news(inode, &text) {
            return;
        }
        let path = self.namespace.path(&mut self.transactions.read(), inode).ok().flatten();
        let path = path.map_or_else(
            || format!("a file whose name is not known (inode {inode})"),
            |path| path.escape_ascii().to_string(),
        );
        tracing::error!("{path} cannot be read: {text}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_place_is_told_once_and_what_is_remembered_is_bounded() {
        let told = Told::default();
        assert!(told.is_news(InodeNumber(1), "byte 0"));
        assert!(!told.is_news(InodeNumber(1), "byte 0"));
        assert!(told.is_news(InodeNumber(1), "byte 4096"));
        assert!(told.is_news(InodeNumber(2), "byte 0"));
        for place in 0..2 * TOLD_MAX {
            assert!(told.is_news(InodeNumber(3), &place.to_string()));
        }
        assert_eq!(told.0.lock().len(), TOLD_MAX);
    }
}
