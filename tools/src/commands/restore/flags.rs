//! Flags of chattr. They are set at the end: nothing can be added to an immutable directory, nor a second name be given to an immutable file.

use std::rc::Rc;

use coppicefs::namespace::{FLAG_APPEND, FLAG_IMMUTABLE, FLAG_NOATIME, FLAG_NODUMP, FLAG_SYNC, FLAGS_SETTABLE};
use rustix::fs::{IFlags, Mode, OFlags, ioctl_getflags, ioctl_setflags, openat};
use rustix::io::Errno;

use super::Restore;
use super::target::Place;

impl Restore<'_> {
    /// Remembers the flags of what was copied, if it has some.
    pub(super) fn keep_flags(&mut self, place: Option<Rc<Place>>, flags: u32) {
        if flags & FLAGS_SETTABLE != 0 {
            self.flagged.push((place, flags & FLAGS_SETTABLE));
        }
    }

    /// Sets all that were remembered, as far as the target's filesystem has such flags; what it does not take is said once.
    pub(super) fn set_flags(&mut self) -> anyhow::Result<()> {
        let mut refused = Refused::default();
        for (place, flags) in std::mem::take(&mut self.flagged) {
            let parent = self.target.directory(place.as_deref().and_then(Place::parent))?;
            let name = place.as_deref().map_or(&b"."[..], Place::name);
            let opened = openat(&parent, name, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty());
            for (flag, _) in LETTERS.into_iter().filter(|(flag, _)| flags & flag != 0) {
                let outcome = opened.as_ref().map_err(|errno| *errno).and_then(|file| {
                    let present = ioctl_getflags(file)?;
                    ioctl_setflags(file, present.union(IFlags::from_bits_retain(flag)))
                });
                if let Err(errno) = outcome {
                    refused.flags |= flag;
                    refused.count += 1;
                    refused.first.get_or_insert_with(|| (Place::path(place.as_deref()), errno));
                }
            }
        }
        if let Refused { flags, count, first: Some((path, errno)) } = refused {
            let letters: String =
                LETTERS.iter().filter(|(flag, _)| flags & flag != 0).map(|(_, letter)| *letter).collect();
            self.report
                .note(format!("{path}: flags of chattr not kept, here first, {count} in all (of {letters}): {errno}"));
        }
        Ok(())
    }
}

/// Flags that the target did not take.
#[derive(Default)]
struct Refused {
    flags: u32,
    count: u64,
    first: Option<(String, Errno)>,
}

/// What is set, with lsattr's letters. Those that keep the others from being changed come last.
const LETTERS: [(u32, char); 5] =
    [(FLAG_SYNC, 'S'), (FLAG_NODUMP, 'd'), (FLAG_NOATIME, 'A'), (FLAG_APPEND, 'a'), (FLAG_IMMUTABLE, 'i')];
