//! Which folios leave the cache: S3-FIFO, with shadow entries.
//!
//! A new folio enters the **small** queue (a tenth of the cache). At its end it leaves the cache, unless it was read again since:
//! then it moves to the **main** queue. At the end of main a folio that was read again gets another round. A folio that left is remembered by
//! a **shadow entry**; if it comes back soon (a refault) it enters main at once. So a scan, however long, passes through small and
//! leaves main alone.
//!
//! - A hit touches no queue: it sets a counter in the folio ([`Folio::touch`]).
//! - Queues hold weak references: a folio that was punched or replaced is freed at once, its entry is skipped later.
//! - Dirty folios leave the queues when they are met and come back when their writeback ends, so that no reclaim walks over them twice.
//! - Eviction only *tries* the folio's lock. `queues` is never held together with any other lock.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Weak};

use super::folio::Folio;
use crate::metrics::Metrics;
use crate::sync::Mutex;

/// Folios of at least this size leave a shadow for each such part, smaller ones one for their index.
const SHADOW_BYTES: u64 = 65536;

#[derive(Debug)]
struct Entry {
    folio: Weak<Folio>,
    bytes: u64,
}

#[derive(Debug, Default)]
struct Queue {
    entries: VecDeque<Entry>,
    bytes: u64,
}

impl Queue {
    fn push(&mut self, folio: &Arc<Folio>) {
        let bytes = folio.length();
        self.bytes += bytes;
        self.entries.push_back(Entry { folio: Arc::downgrade(folio), bytes });
    }

    fn pop(&mut self) -> Option<Weak<Folio>> {
        let entry = self.entries.pop_front()?;
        self.bytes -= entry.bytes;
        Some(entry.folio)
    }

    fn drop_dead(&mut self) {
        let mut bytes = 0;
        self.entries.retain(|entry| {
            let alive = entry.folio.strong_count() > 0;
            bytes += if alive { entry.bytes } else { 0 };
            alive
        });
        self.bytes = bytes;
    }
}

/// Identity of a shadow: space, kind (0 index, 1 part), number.
type ShadowKey = (u64, u8, u64);

#[derive(Debug, Default)]
struct Shadows {
    order: VecDeque<(ShadowKey, u64)>,
    newest: HashMap<ShadowKey, u64>,
    count: u64,
}

impl Shadows {
    fn insert(&mut self, key: ShadowKey, capacity: usize) {
        self.count += 1;
        self.newest.insert(key, self.count);
        self.order.push_back((key, self.count));
        while self.order.len() > capacity {
            if let Some((old, count)) = self.order.pop_front()
                && self.newest.get(&old) == Some(&count)
            {
                self.newest.remove(&old);
            }
        }
    }

    fn take(&mut self, key: ShadowKey) -> bool {
        self.newest.remove(&key).is_some()
    }
}

#[derive(Debug, Default)]
struct Queues {
    small: Queue,
    main: Queue,
    shadows: Shadows,
    pushes_since_cleaning: usize,
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Reclaim {
    queues: Mutex<Queues>,
    shadow_capacity: usize,
}

#[derive(Debug, PartialEq, Eq)]
enum Eviction {
    Evicted,
    Gone,
    Busy,
    Dirty,
}

impl Reclaim {
    pub(super) fn new(budget_bytes: u64) -> Self {
        let shadow_capacity = usize::try_from(budget_bytes / 16384).unwrap_or(usize::MAX).clamp(256, 1 << 20);
        Self { queues: Mutex::new(Queues::default()), shadow_capacity }
    }

    /// Puts a folio where it belongs, unless it stands in a queue. Returns whether it is a refault.
    pub(super) fn enqueue(&self, folio: &Arc<Folio>) -> bool {
        if !folio.claim_queue_place() {
            return false;
        }
        let shadows = folio.space().map(|space| {
            let serial = space.serial();
            [(serial, 0, folio.index()), (serial, 1, folio.start() / SHADOW_BYTES)]
        });
        let mut queues = self.queues.lock();
        let mut refault = false;
        for key in shadows.into_iter().flatten() {
            refault |= queues.shadows.take(key);
        }
        if refault {
            folio.set_hot();
        }
        if folio.is_hot() {
            queues.main.push(folio);
        } else {
            queues.small.push(folio);
        }
        queues.pushes_since_cleaning += 1;
        if queues.pushes_since_cleaning > 1024 + (queues.small.entries.len() + queues.main.entries.len()) / 2 {
            queues.pushes_since_cleaning = 0;
            queues.small.drop_dead();
            queues.main.drop_dead();
        }
        refault
    }

    /// Evicts one folio. False if none can be evicted now.
    pub(super) fn evict_one(&self, metrics: &Metrics) -> bool {
        let mut tries = {
            let queues = self.queues.lock();
            (queues.small.entries.len() + queues.main.entries.len()) * 5 + 8
        };
        while tries > 0 {
            tries -= 1;
            let Some(candidate) = self.next_candidate() else { return false };
            let Some(folio) = candidate.upgrade() else { continue };
            if folio.frequency() > 0 {
                folio.set_frequency(if folio.is_hot() { folio.frequency() - 1 } else { 0 });
                folio.set_hot();
                self.queues.lock().main.push(&folio);
                continue;
            }
            match Self::evict(&folio) {
                Eviction::Gone => {}
                Eviction::Evicted => {
                    self.leave_shadow(&folio);
                    metrics.pagecache_evicted_folios.increment();
                    if folio.is_unread_guess() {
                        metrics.pagecache_readahead_wasted.increment();
                    }
                    return true;
                }
                Eviction::Busy => {
                    let mut queues = self.queues.lock();
                    if folio.is_hot() {
                        queues.main.push(&folio);
                    } else {
                        queues.small.push(&folio);
                    }
                }
                Eviction::Dirty => {
                    folio.leave_queue();
                    // Its writeback may have ended just before; then nobody else brings it back.
                    if !is_unwritten(&folio) {
                        self.enqueue(&folio);
                    }
                }
            }
        }
        false
    }

    fn next_candidate(&self) -> Option<Weak<Folio>> {
        let mut queues = self.queues.lock();
        let small_share = (queues.small.bytes + queues.main.bytes) / 10;
        if queues.small.bytes > small_share {
            queues.small.pop().or_else(|| queues.main.pop())
        } else {
            queues.main.pop().or_else(|| queues.small.pop())
        }
    }

    fn evict(folio: &Arc<Folio>) -> Eviction {
        let Some(space) = folio.space() else { return Eviction::Gone };
        let Some(locked) = folio.try_lock() else { return Eviction::Busy };
        if folio.is_detached() {
            return Eviction::Gone;
        }
        if folio.bytes().is_referenced() {
            return Eviction::Busy;
        }
        // Under the folio's lock nobody can make it dirty.
        if is_unwritten(folio) {
            return Eviction::Dirty;
        }
        space.detach(&locked);
        Eviction::Evicted
    }

    fn leave_shadow(&self, folio: &Folio) {
        let Some(space) = folio.space() else { return };
        let serial = space.serial();
        let mut queues = self.queues.lock();
        if folio.length() < SHADOW_BYTES {
            queues.shadows.insert((serial, 0, folio.index()), self.shadow_capacity);
        } else {
            let first = folio.start() / SHADOW_BYTES;
            for part in first..first + folio.length() / SHADOW_BYTES {
                queues.shadows.insert((serial, 1, part), self.shadow_capacity);
            }
        }
    }
}

fn is_unwritten(folio: &Folio) -> bool {
    folio.space().is_some_and(|space| {
        let tracking = space.tracking.lock();
        let blocks = folio.index()..folio.end();
        tracking.dirty.overlaps(blocks.clone()) || tracking.writeback.overlaps(blocks)
    })
}
