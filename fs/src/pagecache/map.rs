//! Folios by index: a persistent radix tree behind one atomic pointer.
//!
//! - **Reading takes no lock**: [`FolioMap::load`] is one atomic load of the root (`arc-swap`); what it returns is a snapshot that never
//!   changes, and everything reachable from it stays alive.
//! - **Writing** copies the nodes on the path to what changes (only those that a snapshot still shares: a batch that inserts 32
//!   folios copies each node once) and publishes one new root. So readers see all of a change or nothing of it: a split never shows a gap.
//!   Writers exclude each other by a mutex that is held for the update alone.
//!
//! A folio of order `o` occupies one slot, or several of one node, at the height where it fits: 1 MiB is one slot at height 2.

use std::sync::Arc;

use arc_swap::ArcSwap;

use super::folio::Folio;
use crate::sync::Mutex;

const FANOUT_BITS: u32 = 4;
const FANOUT: usize = 1 << FANOUT_BITS;

#[derive(Clone, Debug, Default)]
enum Slot {
    #[default]
    Empty,
    Node(Arc<Node>),
    Folio(Arc<Folio>),
}

#[derive(Clone, Debug, Default)]
struct Node {
    slots: [Slot; FANOUT],
}

/// Number of indexes that a slot at `height` covers; saturates.
fn span(height: u32) -> u64 {
    1_u64.checked_shl(height * FANOUT_BITS).unwrap_or(u64::MAX)
}

/// A version of the tree: the root slot covers indexes `0..16^height`.
#[derive(Clone, Debug, Default)]
pub(super) struct Root {
    height: u32,
    slot: Slot,
}

impl Root {
    /// The folio that covers `index`.
    pub(super) fn get(&self, index: u64) -> Option<&Arc<Folio>> {
        if index >= span(self.height) {
            return None;
        }
        let mut slot = &self.slot;
        let mut height = self.height;
        loop {
            match slot {
                Slot::Empty => return None,
                Slot::Folio(folio) => return folio.covers(index).then_some(folio),
                Slot::Node(node) => {
                    height -= 1;
                    slot = &node.slots[child(index, height)];
                }
            }
        }
    }

    /// The first folio that ends after `index`: the one that covers it, or the next one.
    pub(super) fn at_or_after(&self, index: u64) -> Option<&Arc<Folio>> {
        if index >= span(self.height) {
            return None;
        }
        find(&self.slot, self.height, 0, index)
    }

    /// Whether no folio covers any of `start..end`.
    pub(super) fn is_vacant(&self, start: u64, end: u64) -> bool {
        self.at_or_after(start).is_none_or(|folio| folio.index() >= end)
    }

    /// Puts a folio where nothing is. Returns false, and changes nothing, if something is there.
    pub(super) fn insert(&mut self, folio: Arc<Folio>) -> bool {
        let (start, end) = (folio.index(), folio.end());
        if !self.is_vacant(start, end) {
            return false;
        }
        while end > span(self.height) {
            let below = std::mem::take(&mut self.slot);
            self.height += 1;
            if !matches!(below, Slot::Empty) {
                let mut node = Node::default();
                // A folio that filled the old root may be one of several slots now: the old root covered exactly one slot.
                node.slots[0] = below;
                self.slot = Slot::Node(Arc::new(node));
            }
        }
        let count = folio.block_count();
        place(&mut self.slot, self.height, start, count, &Slot::Folio(folio));
        true
    }

    /// Takes `folio` out if it is in. Returns whether it was.
    pub(super) fn remove(&mut self, folio: &Arc<Folio>) -> bool {
        if !self.get(folio.index()).is_some_and(|found| Arc::ptr_eq(found, folio)) {
            return false;
        }
        place(&mut self.slot, self.height, folio.index(), folio.block_count(), &Slot::Empty);
        if matches!(self.slot, Slot::Empty) {
            self.height = 0;
        }
        true
    }
}

#[expect(clippy::cast_possible_truncation, reason = "masked to four bits")]
fn child(index: u64, height: u32) -> usize {
    (index.checked_shr(height * FANOUT_BITS).unwrap_or(0) & (FANOUT as u64 - 1)) as usize
}

/// Sets the slots that `count` indexes from `start` occupy below `slot`, which covers `span(height)` indexes; makes nodes on the way
/// down, and drops those that become empty on the way up.
fn place(slot: &mut Slot, height: u32, start: u64, count: u64, value: &Slot) {
    if count >= span(height) {
        *slot = value.clone();
        return;
    }
    if matches!(slot, Slot::Empty) {
        *slot = Slot::Node(Arc::new(Node::default()));
    }
    let Slot::Node(node) = slot else {
        debug_assert!(false, "a folio lies where another one is placed");
        return;
    };
    let node = Arc::make_mut(node);
    let below = height - 1;
    let first = child(start, below);
    if count >= span(below) {
        let slots = usize::try_from(count / span(below)).unwrap_or(FANOUT);
        for slot in node.slots.iter_mut().skip(first).take(slots) {
            *slot = value.clone();
        }
    } else {
        place(&mut node.slots[first], below, start, count, value);
    }
    if matches!(value, Slot::Empty) && node.slots.iter().all(|slot| matches!(slot, Slot::Empty)) {
        *slot = Slot::Empty;
    }
}

fn find(slot: &Slot, height: u32, base: u64, index: u64) -> Option<&Arc<Folio>> {
    match slot {
        Slot::Empty => None,
        Slot::Folio(folio) => (folio.end() > index).then_some(folio),
        Slot::Node(node) => {
            let below = height - 1;
            let first = if index > base { child(index, below) } else { 0 };
            node.slots.iter().enumerate().skip(first).find_map(|(number, slot)| {
                find(slot, below, base.saturating_add((number as u64).saturating_mul(span(below))), index)
            })
        }
    }
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct FolioMap {
    root: ArcSwap<Root>,
    update: Mutex<()>,
}

impl FolioMap {
    /// The present version; takes no lock.
    pub(super) fn load(&self) -> arc_swap::Guard<Arc<Root>> {
        self.root.load()
    }

    /// The present version, to be kept across waits.
    pub(super) fn load_full(&self) -> Arc<Root> {
        self.root.load_full()
    }

    /// Makes and publishes the next version. `change` must be short: it runs under the writers' mutex.
    pub(super) fn update<R>(&self, change: impl FnOnce(&mut Root) -> R) -> R {
        let _writer = self.update.lock();
        let mut root = Root::clone(&self.root.load());
        let outcome = change(&mut root);
        self.root.store(Arc::new(root));
        outcome
    }
}
