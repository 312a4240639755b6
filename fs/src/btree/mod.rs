//! PLACEHOLDER SIGNATURES so that main compiles until the owner lands: on a rebase conflict the owner takes their own file whole.
use crate::{
    error::Result,
    format::{BtreeId, Position, Value},
    units::*,
};
pub struct Forest;
pub struct LeafTarget {
    pub btree: BtreeId,
    pub position: Position,
    pub write: bool,
}
pub struct LockedLeaves<'a>(&'a Forest);
pub struct Scan {
    pub keys: Vec<(Position, Value)>,
    pub covered_to: Position,
}
impl Forest {
    pub fn get(&self, _: BtreeId, _: Position) -> Result<Option<Value>> {
        Ok(None)
    }
    pub fn scan(&self, _: BtreeId, _: Position, t: Position, _: usize) -> Result<Scan> {
        Ok(Scan { keys: vec![], covered_to: t })
    }
    pub fn scan_back(&self, _: BtreeId, _: Position, t: Position, _: usize) -> Result<Scan> {
        Ok(Scan { keys: vec![], covered_to: t })
    }
    pub fn lock_leaves(&self, _: &mut Vec<LeafTarget>) -> Result<LockedLeaves<'_>> {
        Ok(LockedLeaves(self))
    }
    pub fn make_room(&self, _: BtreeId, _: Position, _: usize) -> Result<()> {
        Ok(())
    }
    pub fn wait_for_dirty_room(&self) -> Result<()> {
        Ok(())
    }
}
impl LockedLeaves<'_> {
    pub fn get(&self, _: BtreeId, _: Position) -> Option<Value> {
        None
    }
    pub fn range(&self, _: BtreeId, _: Position, _: Position) -> Option<Vec<(Position, Value)>> {
        None
    }
    pub fn room(&self, _: BtreeId, _: Position, _: usize) -> bool {
        true
    }
    pub fn put(&mut self, _: BtreeId, _: Position, _: Option<Value>, _: JournalSequence) {}
}
