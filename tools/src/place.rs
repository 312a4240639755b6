//! Keeps the place of a scrub beyond the unmount: a file of JSON for each filesystem, outside of all images.
//!
//! `$COPPICE_STATE_DIRECTORY`, else `/var/lib/coppice` for root, else `$XDG_STATE_HOME/coppice` or `~/.local/state/coppice`; `scrub.UUID.json` in it. The folder is
//! for its owner alone, as is the file, which is written whole or not at all. What it holds is read as what anybody may have written. No locks: a filesystem
//! is open in one process at a time.

use std::fs::{DirBuilder, File};
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use coppicefs::filesystem::OpenOptions;
use coppicefs::format::Position;
use coppicefs::scrub::{ScrubKeeper, ScrubPlace};
use coppicefs::vfs::{ScrubState, ScrubStatus};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

const VERSION: u64 = 1;
/// No place takes more.
const FILE_BYTES_MAX: u64 = 64 << 10;

/// Lets the filesystem that is opened with these options keep its scrubs' places, if there is a folder for them.
#[must_use]
pub fn kept(options: OpenOptions) -> OpenOptions {
    let keeper = folder().map(|folder| Arc::new(Files { folder }) as Arc<dyn ScrubKeeper>);
    OpenOptions { scrub_keeper: keeper, ..options }
}

fn folder() -> Option<PathBuf> {
    // What is not absolute is to be ignored, says the XDG specification.
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    absolute("COPPICE_STATE_DIRECTORY")
        .or_else(|| rustix::process::geteuid().is_root().then(|| PathBuf::from("/var/lib/coppice")))
        .or_else(|| absolute("XDG_STATE_HOME").map(|state| state.join("coppice")))
        .or_else(|| absolute("HOME").map(|home| home.join(".local/state/coppice")))
}

#[derive(Debug)]
struct Files {
    folder: PathBuf,
}

#[derive(Deserialize)]
struct Versioned {
    version: u64,
}

/// What a scrub has read and found so far, as the kept file and `coppice scrub --json` say it.
#[derive(Clone, Copy, Deserialize, Serialize)]
pub struct Totals {
    bytes: u64,
    bytes_total: u64,
    nodes: u64,
    copies: u64,
    data_bytes: u64,
    unchecked_bytes: u64,
    repaired: u64,
    damaged: u64,
}

impl Totals {
    /// Those of a status.
    #[must_use]
    pub fn of(status: &ScrubStatus) -> Self {
        let &ScrubStatus { bytes, bytes_total, nodes, copies, data_bytes, unchecked_bytes, repaired, damaged, .. } =
            status;
        Self { bytes, bytes_total, nodes, copies, data_bytes, unchecked_bytes, repaired, damaged }
    }

    fn status(self) -> ScrubStatus {
        let Self { bytes, bytes_total, nodes, copies, data_bytes, unchecked_bytes, repaired, damaged } = self;
        ScrubStatus {
            bytes,
            bytes_total,
            nodes,
            copies,
            data_bytes,
            unchecked_bytes,
            repaired,
            damaged,
            ..ScrubStatus::default()
        }
    }
}

#[derive(Deserialize, Serialize)]
struct Kept {
    version: u64,
    uuid: String,
    state: String,
    phase: String,
    tree: String,
    level: u8,
    inode: u64,
    offset: u64,
    snapshot: u32,
    unsettled: bool,
    read_only: bool,
    #[serde(flatten)]
    totals: Totals,
    elapsed_ms: u64,
    ended_at: i64,
    failure: String,
}

impl Files {
    fn path(&self, filesystem: Uuid) -> PathBuf {
        self.folder.join(format!("scrub.{filesystem}.json"))
    }
}

impl ScrubKeeper for Files {
    fn recall(&self, filesystem: Uuid) -> Result<Option<ScrubPlace>, String> {
        let path = self.path(filesystem);
        let in_file = |why: String| format!("{}: {why}", path.display());
        match read(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(in_file(error.to_string())),
            Ok(bytes) => decode(&bytes, filesystem).map(Some).map_err(in_file),
        }
    }

    fn keep(&self, filesystem: Uuid, place: &ScrubPlace) -> std::io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.folder)?;
        // Made for its owner alone.
        let mut file = tempfile::NamedTempFile::new_in(&self.folder)?;
        file.write_all(&encode(filesystem, place)?)?;
        file.as_file().sync_all()?;
        file.persist(self.path(filesystem))?;
        File::open(&self.folder)?.sync_all()
    }
}

/// The bytes of a file; never those of a pipe or a device, which may wait for ever.
fn read(path: &Path) -> std::io::Result<Vec<u8>> {
    if !std::fs::symlink_metadata(path)?.is_file() {
        return Err(std::io::Error::other("not a file"));
    }
    let mut bytes = Vec::new();
    File::open(path)?.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > FILE_BYTES_MAX { Err(std::io::Error::other("too long")) } else { Ok(bytes) }
}

fn encode(filesystem: Uuid, place: &ScrubPlace) -> serde_json::Result<Vec<u8>> {
    let ScrubPlace { status, position, .. } = place;
    let kept = Kept {
        version: VERSION,
        uuid: filesystem.to_string(),
        state: status.state.name().to_owned(),
        phase: status.phase.clone(),
        tree: place.tree.clone(),
        level: place.level,
        inode: position.inode,
        offset: position.offset,
        snapshot: position.snapshot,
        unsettled: place.is_unsettled,
        read_only: place.is_read_only,
        totals: Totals::of(status),
        elapsed_ms: status.elapsed_ms,
        ended_at: status.ended_at,
        failure: status.failure.chars().take(500).collect(),
    };
    serde_json::to_vec_pretty(&kept)
}

fn decode(bytes: &[u8], filesystem: Uuid) -> Result<ScrubPlace, String> {
    let damaged = |error: serde_json::Error| format!("damaged: {error}");
    let Versioned { version } = serde_json::from_slice(bytes).map_err(damaged)?;
    if version != VERSION {
        return Err(format!("of version {version}, this program knows {VERSION}"));
    }
    let kept: Kept = serde_json::from_slice(bytes).map_err(damaged)?;
    if kept.uuid != filesystem.to_string() {
        return Err(format!("of another filesystem, {}", kept.uuid.escape_debug()));
    }
    let state = ScrubState::named(&kept.state).ok_or_else(|| "damaged: no such state".to_owned())?;
    let status = ScrubStatus {
        state,
        phase: kept.phase,
        elapsed_ms: kept.elapsed_ms,
        ended_at: kept.ended_at,
        failure: kept.failure,
        ..kept.totals.status()
    };
    Ok(ScrubPlace {
        status,
        tree: kept.tree,
        level: kept.level,
        position: Position { inode: kept.inode, offset: kept.offset, snapshot: kept.snapshot },
        is_unsettled: kept.unsettled,
        is_read_only: kept.read_only,
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn place() -> ScrubPlace {
        let status = ScrubStatus {
            state: ScrubState::Cancelled,
            phase: "data".into(),
            bytes: 10,
            data_bytes: 9,
            ended_at: 1_796_058_183,
            ..ScrubStatus::default()
        };
        let position = Position { inode: 5, offset: 6, snapshot: 7 };
        ScrubPlace { status, position, ..ScrubPlace::default() }
    }

    #[test]
    fn a_place_is_kept_for_its_owner_alone() {
        let folder = tempfile::tempdir().unwrap();
        let files = Files { folder: folder.path().join("state/coppice") };
        let uuid = Uuid::from_u128(7);
        assert_eq!(files.recall(uuid), Ok(None));
        files.keep(uuid, &ScrubPlace::default()).unwrap();
        files.keep(uuid, &place()).unwrap();
        assert_eq!(files.recall(uuid), Ok(Some(place())));
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&files.folder), mode(&files.path(uuid))), (0o700, 0o600));
        // Nothing is left beside it.
        assert_eq!(std::fs::read_dir(&files.folder).unwrap().count(), 1);
    }

    #[test]
    fn what_is_none_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let files = Files { folder: folder.path().to_owned() };
        let uuid = Uuid::from_u128(7);
        let whole = String::from_utf8(encode(uuid, &place()).unwrap()).unwrap();
        for (bytes, why) in [
            (String::new(), "damaged"),
            (whole[..whole.len() / 2].to_owned(), "damaged"),
            (whole.replace("\"bytes\": 10", "\"bytes\": -1"), "damaged"),
            (whole.replace("cancelled", "asleep"), "damaged"),
            (whole.replace("\"version\": 1", "\"version\": 2"), "version 2"),
            (whole.replace("-000000000007", "-000000000008"), "another filesystem"),
            ("{\"version\": 9}".to_owned(), "version 9"),
            (" ".repeat(70_000), "too long"),
        ] {
            std::fs::write(files.path(uuid), bytes).unwrap();
            let refused = files.recall(uuid).unwrap_err();
            assert!(refused.contains(why), "{refused}, not {why}");
        }
        std::fs::remove_file(files.path(uuid)).unwrap();
        std::fs::create_dir(files.path(uuid)).unwrap();
        assert!(files.recall(uuid).unwrap_err().contains("not a file"));
    }
}
