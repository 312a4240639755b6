//! Where a scrub stopped, as it is kept outside of the filesystem, so that one goes on after the next mount.
//!
//! A place is a position in the trees' keys, never one on a device: it means the same whatever was written, moved or deleted since. What it says comes
//! from a file that anybody may have changed: [`ScrubPlace::read`] takes nothing from it that does not fit together. Pure, but for the keeper; no locks.

use super::{Phase, State};
use crate::btree::NodeCursor;
use crate::format::Position;
use crate::vfs::{ScrubState, ScrubStatus};

/// No total is larger; what a scrub adds to it, and sums of two, stay far below the largest number.
const TOTAL_MAX: u64 = 1 << 60;

/// How a scrub stands, with all that it needs to go on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScrubPlace {
    /// State, phase and totals.
    pub status: ScrubStatus,
    /// In the phase `nodes`: the name of the tree.
    pub tree: String,
    /// In the phase `nodes`: the level, leaves are 0.
    pub level: u8,
    /// In the phases `nodes` and `data`: where it goes on.
    pub position: Position,
    /// Of what it repaired, something is written by a checkpoint that was not made yet.
    pub is_unsettled: bool,
    /// It was made where nothing may be written.
    pub is_read_only: bool,
}

/// Who keeps the places of scrubs: by file, outside of all images.
pub trait ScrubKeeper: std::fmt::Debug + Send + Sync {
    /// What was kept for a filesystem, if anything.
    ///
    /// # Errors
    /// Why what is there cannot be used, in words that follow its name.
    fn recall(&self, filesystem: uuid::Uuid) -> Result<Option<ScrubPlace>, String>;

    /// Keeps a place, instead of the one before, whole or not at all.
    ///
    /// # Errors
    /// Those of the host.
    fn keep(&self, filesystem: uuid::Uuid, place: &ScrubPlace) -> std::io::Result<()>;
}

impl ScrubPlace {
    pub(super) fn of(state: &State, status: ScrubStatus, is_read_only: bool) -> Self {
        let mut place = Self { status, is_read_only, ..Self::default() };
        match state.phase {
            Phase::Nodes(cursor) => (place.tree, place.level, place.position) = cursor.parts(),
            Phase::Data(position) => place.position = position,
            _ => {}
        }
        place
    }

    /// The phase that it goes on with.
    ///
    /// # Errors
    /// Why it does not go on from there.
    pub(super) fn read(&self, is_read_only: bool) -> Result<Phase, &'static str> {
        let status = &self.status;
        // A scrub beside writes may read more than the devices hold, but no device has so many bytes.
        let totals = [status.bytes, status.bytes_total, status.nodes, status.copies];
        let others = [status.repaired, status.damaged, status.elapsed_ms];
        if totals.into_iter().chain(others).any(|total| total > TOTAL_MAX) {
            return Err("it counts more than there can be");
        }
        let is_part = status.unchecked_bytes <= status.data_bytes && status.data_bytes <= status.bytes;
        if status.state == ScrubState::Never || !is_part {
            return Err("it does not fit together");
        }
        if matches!(status.state, ScrubState::Done | ScrubState::Failed) {
            // What it found is all that is wanted.
            return Ok(Phase::End);
        }
        if self.is_unsettled {
            return Err("no checkpoint was made of all that it had repaired");
        }
        if self.is_read_only && !is_read_only && status.damaged > 0 {
            return Err("it was made read-only, and found what can be repaired now perhaps");
        }
        match status.phase.as_str() {
            "superblock" => Ok(Phase::Superblock),
            "checkpoints" => Ok(Phase::Checkpoints),
            "journal" => Ok(Phase::Journal),
            "nodes" => NodeCursor::from_parts(&self.tree, self.level, self.position)
                .map(Phase::Nodes)
                .ok_or("it names a node that cannot be"),
            "data" => Ok(Phase::Data(self.position)),
            // The checkpoint that it waited for was made.
            "settling" => Ok(Phase::Data(Position::MAX)),
            _ => Err("it does not fit together"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(phase: &str) -> ScrubPlace {
        let status = ScrubStatus {
            state: ScrubState::Cancelled,
            phase: phase.into(),
            bytes: 900,
            data_bytes: 800,
            unchecked_bytes: 8,
            ..ScrubStatus::default()
        };
        ScrubPlace {
            status,
            tree: "inodes".into(),
            position: Position { inode: 7, offset: 8, snapshot: 9 },
            ..ScrubPlace::default()
        }
    }

    #[test]
    fn a_place_comes_out_as_it_went_in() {
        for phase in ["superblock", "checkpoints", "journal", "nodes", "data"] {
            let mut state = State::new();
            state.phase = place(phase).read(false).unwrap();
            assert_eq!(state.phase.name(), phase);
            let again = ScrubPlace::of(&state, place(phase).status, false);
            assert_eq!(again.read(false), Ok(state.phase));
        }
        assert_eq!(place("settling").read(false), Ok(Phase::Data(Position::MAX)));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        type Change = fn(&mut ScrubPlace);
        let changes: [(&str, Change); 12] = [
            ("more than there can be", |place| place.status.bytes = u64::MAX),
            ("more than there can be", |place| place.status.copies = u64::MAX),
            ("more than there can be", |place| place.status.damaged = u64::MAX),
            ("more than there can be", |place| place.status.elapsed_ms = u64::MAX),
            ("fit together", |place| place.status.bytes = 799),
            ("fit together", |place| place.status.unchecked_bytes = 801),
            ("fit together", |place| place.status.phase = "cleaning".into()),
            ("fit together", |place| place.status.state = ScrubState::Never),
            ("cannot be", |place| place.tree = "oak".into()),
            ("cannot be", |place| place.level = 200),
            ("no checkpoint", |place| place.is_unsettled = true),
            ("read-only", |place| (place.is_read_only, place.status.damaged) = (true, 1)),
        ];
        for (why, change) in changes {
            let mut wrong = place("nodes");
            change(&mut wrong);
            let refused = wrong.read(false).unwrap_err();
            assert!(refused.contains(why), "{refused}, not {why}");
        }
        let read_only = ScrubPlace { is_read_only: true, ..place("data") };
        assert!(read_only.read(false).is_ok() && read_only.read(true).is_ok());
    }
}
