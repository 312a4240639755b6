//! Snapshots: which of the keys at one place is the one that a subvolume sees.
//!
//! A key of a tree with [`BtreeId::has_snapshots`] belongs to the snapshot in its position, and is seen from there and from every
//! descendant, unless a key of a nearer one stands at the same place. Ids descend: a child's is below its parent's. So of the keys at
//! one `(inode, offset)`, ascending by snapshot from the reader's own on, the first that belongs to an ancestor is the nearest one.
//!
//! The tree of snapshots is small and in memory. It has one node, [`SnapshotId::ROOT`], until snapshots can be made; every
//! look-up goes through here all the same. Extents are keyed by their end, so once there are several snapshots, readers of extents must
//! also clip ranges that overlap in different snapshots: that comes with them.
//!
//! Takes no locks: the table does not change after it was loaded.

use std::collections::BTreeMap;

use crate::error::{Error, Result};
use crate::format::namespace::{Snapshot, Subvolume};
use crate::format::{BtreeId, Position, Value};
use crate::sync::Arc;
use crate::transaction::{Transaction, Transactions};
use crate::units::{InodeNumber, SnapshotId};

/// The key of the one snapshot that every filesystem has, and its value.
///
/// # Errors
/// Never, in practice.
pub fn stored_root() -> Result<(Position, Vec<u8>)> {
    let value = Snapshot { parent: 0, subvolume: 0 }.encode()?;
    Ok((Position::new(0, SnapshotId::ROOT.0.into(), 0), value))
}

/// The key of the one subvolume that every filesystem has, and its value.
///
/// # Errors
/// Never, in practice.
pub fn stored_subvolume() -> Result<(Position, Vec<u8>)> {
    let value = Subvolume { snapshot: SnapshotId::ROOT.0, root: InodeNumber::ROOT.0 }.encode()?;
    Ok((Position::MIN, value))
}

/// The snapshot tree of a filesystem.
#[derive(Debug)]
pub struct Snapshots {
    /// Parent of each snapshot; the root has none.
    parents: BTreeMap<SnapshotId, Option<SnapshotId>>,
}

impl Snapshots {
    /// The tree that every filesystem has: nothing makes snapshots yet, so there is nothing else to be read from the keys. For fsck, which
    /// checks and repairs them ([`stored_root`]).
    #[must_use]
    pub fn root_alone() -> Arc<Self> {
        Arc::new(Self { parents: BTreeMap::from([(SnapshotId::ROOT, None)]) })
    }

    /// Loads the tree.
    ///
    /// # Errors
    /// The device's; [`Error::Corrupt`] if a key means nothing, or a parent is missing or not above its child.
    pub fn load(transactions: &Transactions) -> Result<Arc<Self>> {
        let mut parents = BTreeMap::new();
        let keys = transactions.read().range(BtreeId::Snapshots, Position::MIN, Position::MAX, usize::MAX)?;
        for (position, value) in keys {
            let id = u32::try_from(position.offset)
                .map_err(|_| Error::corrupt("snapshots tree", format!("a snapshot at {position}")))?;
            let parent = Snapshot::decode(&value)?.parent;
            parents.insert(SnapshotId(id), (parent != 0).then_some(SnapshotId(parent)));
        }
        Self::new(parents)
    }

    fn new(parents: BTreeMap<SnapshotId, Option<SnapshotId>>) -> Result<Arc<Self>> {
        for (id, parent) in &parents {
            if let Some(parent) = parent
                && (parent <= id || !parents.contains_key(parent))
            {
                return Err(Error::corrupt(format!("snapshot {id}"), format!("its parent is {parent}")));
            }
        }
        if !parents.contains_key(&SnapshotId::ROOT) {
            return Err(Error::corrupt("snapshots tree", "it has no root"));
        }
        Ok(Arc::new(Self { parents }))
    }

    /// Whether what belongs to `ancestor` is seen from `descendant`. A snapshot is its own ancestor.
    #[must_use]
    pub fn is_ancestor(&self, ancestor: SnapshotId, descendant: SnapshotId) -> bool {
        let mut id = descendant;
        while id < ancestor {
            // Parents are above their children, so this ends.
            match self.parents.get(&id).copied().flatten() {
                Some(parent) => id = parent,
                None => return false,
            }
        }
        id == ancestor && self.parents.contains_key(&id)
    }

    /// The key at exactly `(inode, offset)` that is seen from `snapshot`.
    ///
    /// # Errors
    /// The device's, or damage.
    pub fn visible(
        &self,
        transaction: &mut Transaction<'_>,
        btree: BtreeId,
        inode: InodeNumber,
        offset: u64,
        snapshot: SnapshotId,
    ) -> Result<Option<(Position, Value)>> {
        let own = Position::new(inode.0, offset, snapshot.0);
        if snapshot == SnapshotId::ROOT {
            return Ok(transaction.get(btree, own)?.map(|value| (own, value)));
        }
        self.first_seen(transaction, btree, own, Position::new(inode.0, offset, u32::MAX), snapshot)
    }

    /// The first key at or after `from`, up to `to` inclusive, that is seen from `snapshot`. The snapshot fields of the bounds are not looked at.
    ///
    /// # Errors
    /// The device's, or damage.
    pub fn next_visible(
        &self,
        transaction: &mut Transaction<'_>,
        btree: BtreeId,
        from: Position,
        to: Position,
        snapshot: SnapshotId,
    ) -> Result<Option<(Position, Value)>> {
        let from = Position { snapshot: snapshot.0, ..from };
        self.first_seen(transaction, btree, from, Position { snapshot: u32::MAX, ..to }, snapshot)
    }

    /// The last key at or before `from`, down to `to` inclusive, that is seen from `snapshot`. The snapshot fields of the bounds are not looked at.
    ///
    /// # Errors
    /// The device's, or damage.
    pub fn previous_visible(
        &self,
        transaction: &mut Transaction<'_>,
        btree: BtreeId,
        from: Position,
        to: Position,
        snapshot: SnapshotId,
    ) -> Result<Option<(Position, Value)>> {
        let to = Position { snapshot: 0, ..to };
        let mut from = Position { snapshot: u32::MAX, ..from };
        while from >= to {
            let Some((position, _)) = transaction.previous(btree, from, to)? else { return Ok(None) };
            let place = Position { snapshot: snapshot.0, ..position };
            let last = Position { snapshot: u32::MAX, ..position };
            if let Some(seen) = self.first_seen(transaction, btree, place, last, snapshot)? {
                return Ok(Some(seen));
            }
            match (Position { snapshot: 0, ..position }).predecessor() {
                Some(before) => from = before,
                None => break,
            }
        }
        Ok(None)
    }

    /// The first key in `[from, to]` whose snapshot is an ancestor. Keys of the reader's descendants stand below its own at each place, those of
    /// nearer ancestors below those of farther ones.
    fn first_seen(
        &self,
        transaction: &mut Transaction<'_>,
        btree: BtreeId,
        mut from: Position,
        to: Position,
        snapshot: SnapshotId,
    ) -> Result<Option<(Position, Value)>> {
        while from <= to {
            let Some((position, value)) = transaction.next(btree, from, to)? else { return Ok(None) };
            if self.is_ancestor(SnapshotId(position.snapshot), snapshot) {
                return Ok(Some((position, value)));
            }
            match position.successor() {
                Some(next) => from = next,
                None => break,
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transaction::CommitOptions;
    use crate::transaction::tests::transactions;

    /// Against the definition: of the keys at a place, the one of the nearest ancestor.
    #[test]
    fn the_nearest_ancestors_key_is_seen() {
        let root = SnapshotId::ROOT.0;
        let ids = [root, root - 1, root - 2, root - 3, root - 4];
        let parents = [None, Some(root), Some(root), Some(root - 1), Some(root - 3)];
        let table = ids.into_iter().zip(parents);
        let snapshots = Snapshots::new(table.map(|(id, parent)| (SnapshotId(id), parent.map(SnapshotId))).collect());
        let snapshots = snapshots.unwrap();
        let keys: Vec<Position> =
            [(10, 0), (10, 3), (20, 2), (20, 1), (30, 4), (40, 0), (40, 1), (40, 3), (50, 2), (60, 0)]
                .into_iter()
                .map(|(offset, id): (u64, usize)| Position::new(7, offset, ids[id]))
                .collect();
        let transactions = transactions();
        transactions
            .run(CommitOptions::default(), |transaction| {
                for position in &keys {
                    transaction.put(BtreeId::Dirents, *position, position.snapshot.to_le_bytes().to_vec());
                }
                Ok(())
            })
            .unwrap();
        let nearest = |offset: u64, reader: u32| {
            let mut id = Some(reader);
            while let Some(snapshot) = id {
                let position = Position::new(7, offset, snapshot);
                if keys.contains(&position) {
                    return Some(position);
                }
                id = parents[ids.iter().position(|known| *known == snapshot).unwrap()];
            }
            None
        };
        let mut transaction = transactions.read();
        for reader in ids {
            let seen: Vec<Position> = (0..7).filter_map(|index| nearest(index * 10, reader)).collect();
            for offset in 0..70 {
                let expected = nearest(offset, reader);
                let found =
                    snapshots.visible(&mut transaction, BtreeId::Dirents, InodeNumber(7), offset, SnapshotId(reader));
                assert_eq!(found.unwrap().map(|(position, _)| position), expected, "{offset} from {reader}");
                let here = Position::new(7, offset, 0);
                let (first, last) = (Position::new(7, 0, 0), Position::new(7, 65, 0));
                let next = snapshots.next_visible(&mut transaction, BtreeId::Dirents, here, last, SnapshotId(reader));
                let expected = seen.iter().find(|position| position.offset >= offset).copied();
                assert_eq!(next.unwrap().map(|(position, _)| position), expected, "from {offset} on, {reader}");
                let previous =
                    snapshots.previous_visible(&mut transaction, BtreeId::Dirents, here, first, SnapshotId(reader));
                let expected = seen.iter().rfind(|position| position.offset <= offset).copied();
                assert_eq!(previous.unwrap().map(|(position, _)| position), expected, "down from {offset}, {reader}");
            }
        }
    }

    #[test]
    fn ancestry_follows_parents() {
        let root = SnapshotId::ROOT;
        let (left, right, leaf) = (SnapshotId(root.0 - 1), SnapshotId(root.0 - 2), SnapshotId(root.0 - 3));
        let parents = [(root, None), (left, Some(root)), (right, Some(root)), (leaf, Some(left))];
        let snapshots = Snapshots::new(parents.into_iter().collect()).unwrap();
        for (ancestor, descendant, expected) in [
            (root, root, true),
            (root, leaf, true),
            (left, leaf, true),
            (right, leaf, false),
            (leaf, left, false),
            (leaf, leaf, true),
            (SnapshotId(5), SnapshotId(5), false),
        ] {
            assert_eq!(snapshots.is_ancestor(ancestor, descendant), expected, "{ancestor} of {descendant}");
        }
    }

    #[test]
    fn a_tree_that_is_none_is_damage() {
        let root = SnapshotId::ROOT;
        assert!(Snapshots::new(BTreeMap::new()).is_err());
        assert!(Snapshots::new([(root, None), (SnapshotId(7), Some(SnapshotId(6)))].into_iter().collect()).is_err());
        assert!(Snapshots::new([(root, None), (SnapshotId(7), Some(SnapshotId(9)))].into_iter().collect()).is_err());
    }
}
