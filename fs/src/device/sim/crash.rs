//! What may be on the medium after a power cut: [`Snapshot`] holds what there is to choose from, a [`CrashPlan`] is one choice,
//! and [`Snapshot::plans`] enumerates choices: all of them for few unflushed writes, the telling ones and seeded samples for many.

use std::fmt;

use super::SECTOR_BYTES;
use crate::device::Image;
use crate::sync::Arc;

/// A small generator (splitmix64), so that a plan depends on its seed alone.
#[derive(Clone, Debug)]
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(mix(seed ^ 0x6a09_e667_f3bc_c908))
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `bound`, which must not be 0.
    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub(super) fn one_in(&mut self, chances: u64) -> bool {
        self.below(chances) == 0
    }

    pub(super) fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            let pick = self.below(last as u64 + 1) as usize;
            items.swap(last, pick);
        }
    }
}

fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// What a discard leaves behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DiscardKind {
    Garbage(u64),
    Zeros,
    Keep,
}

#[derive(Clone)]
pub(super) enum Content {
    Data(Arc<[u8]>),
    Discarded { kind: DiscardKind, length: u64 },
}

/// A write or a discard that no flush has made durable yet.
#[derive(Clone)]
pub struct UnflushedWrite {
    number: u64,
    offset: u64,
    content: Content,
}

impl UnflushedWrite {
    pub(super) fn new(number: u64, offset: u64, content: Content) -> Self {
        Self { number, offset, content }
    }

    /// Counts up from 0 over all writes and discards of the device, in the order of their completion.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Byte offset on the device.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Length in bytes.
    #[must_use]
    pub fn length(&self) -> u64 {
        match &self.content {
            Content::Data(data) => data.len() as u64,
            Content::Discarded { length, .. } => *length,
        }
    }

    /// Whether it is a discard.
    #[must_use]
    pub fn is_discard(&self) -> bool {
        matches!(self.content, Content::Discarded { .. })
    }

    /// Whether both are writes of the same bytes: copies of one thing.
    #[must_use]
    pub fn is_copy_of(&self, other: &Self) -> bool {
        match (&self.content, &other.content) {
            (Content::Data(one), Content::Data(another)) => one == another,
            _ => false,
        }
    }

    fn sectors(&self) -> u64 {
        self.length().div_ceil(SECTOR_BYTES)
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.offset < other.offset + other.length() && other.offset < self.offset + self.length()
    }

    /// Applies the chosen sectors to `image`.
    pub(super) fn apply(&self, sectors: &Sectors, image: &mut Image) {
        for run in sectors.runs(self.sectors()) {
            let from = run.start * SECTOR_BYTES;
            let to = (run.end * SECTOR_BYTES).min(self.length());
            match &self.content {
                Content::Data(data) => image.write(self.offset + from, &data[from as usize..to as usize]),
                Content::Discarded { kind: DiscardKind::Keep, .. } => {}
                Content::Discarded { kind: DiscardKind::Zeros, .. } => image.zero(self.offset + from, to - from),
                Content::Discarded { kind: DiscardKind::Garbage(seed), .. } => {
                    // Garbage depends on the seed and the place alone, so that pieces of any shape give the same bytes.
                    image.update(self.offset + from, to - from, |offset, piece| {
                        for (index, word) in piece.chunks_mut(8).enumerate() {
                            let bytes = mix(seed ^ (offset / 8 + index as u64)).to_le_bytes();
                            word.copy_from_slice(&bytes[..word.len()]);
                        }
                    });
                }
            }
        }
    }
}

impl fmt::Debug for UnflushedWrite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = if self.is_discard() { "discard" } else { "write" };
        write!(f, "{what} {} of [{:#x}, +{:#x})", self.number, self.offset, self.length())
    }
}

/// Which sectors of a write reached the medium.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sectors {
    /// All.
    All,
    /// The first so many.
    First(u64),
    /// The last so many.
    Last(u64),
    /// About half of them, by seed.
    Scattered(u64),
}

impl Sectors {
    fn keeps(self, index: u64, count: u64) -> bool {
        match self {
            Self::All => true,
            Self::First(kept) => index < kept,
            Self::Last(kept) => index + kept >= count,
            Self::Scattered(seed) => mix(seed ^ index.wrapping_mul(0x9e37_79b9_7f4a_7c15)) & 1 == 0,
        }
    }

    /// Runs of kept sectors out of `count`.
    fn runs(self, count: u64) -> Vec<std::ops::Range<u64>> {
        if self == Self::All {
            return std::iter::once(0..count).collect();
        }
        let mut runs: Vec<std::ops::Range<u64>> = Vec::new();
        for index in (0..count).filter(|&index| self.keeps(index, count)) {
            match runs.last_mut() {
                Some(run) if run.end == index => run.end += 1,
                _ => runs.push(index..index + 1),
            }
        }
        runs
    }
}

/// A write that reached the medium, in part or whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Survivor {
    /// Index in the snapshot's list of unflushed writes.
    pub write: usize,
    /// How much of it.
    pub sectors: Sectors,
}

/// Which unflushed writes reached the medium, and in which order. The `Debug` form is what a failing test prints.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CrashPlan {
    /// In the order in which they reached it; what is not here was lost.
    pub survivors: Vec<Survivor>,
}

impl CrashPlan {
    /// Every write of `writes` whole, in that order.
    #[must_use]
    pub fn keeping(writes: impl IntoIterator<Item = usize>) -> Self {
        Self { survivors: writes.into_iter().map(|write| Survivor { write, sectors: Sectors::All }).collect() }
    }
}

/// What [`Snapshot::plans`] enumerates.
#[derive(Clone, Debug)]
pub struct PlanOptions {
    /// Up to so many unflushed writes every subset is given (at most 16).
    pub exhaustive_up_to: usize,
    /// How many random plans are given beside the fixed ones.
    pub samples: usize,
    /// Give torn writes too.
    pub torn: bool,
    /// Give overlapping writes in other orders too.
    pub reordered: bool,
    /// Decides the random plans.
    pub seed: u64,
    /// No more plans than this: "none" and "all" first, then a choice by seed.
    pub limit: Option<usize>,
}

impl Default for PlanOptions {
    fn default() -> Self {
        Self { exhaustive_up_to: 6, samples: 32, torn: true, reordered: true, seed: 0, limit: None }
    }
}

/// One plan in short form; made whole when its turn comes, since a plan is as long as the list of writes.
#[derive(Clone, Copy, Debug)]
enum Recipe {
    /// The writes whose bits are set.
    Subset(u32),
    All,
    Prefix(usize),
    AllBut(usize),
    Only(usize),
    /// One write torn, with all others or none.
    Torn {
        write: usize,
        sectors: Sectors,
        others: bool,
    },
    /// Two overlapping writes in the other order, with all others or none.
    Swapped {
        earlier: usize,
        later: usize,
        others: bool,
    },
    /// Each of the bits' writes torn with probability one half.
    TornSubset(u32, u64),
    Random(u64),
}

/// What a power cut has to work with: the durable image and the writes since. Cheap to copy and to keep.
#[derive(Clone, Debug)]
pub struct Snapshot {
    durable: Arc<Image>,
    unflushed: Vec<Arc<UnflushedWrite>>,
    boundary: u64,
}

impl Snapshot {
    pub(super) fn new(durable: Arc<Image>, unflushed: Vec<Arc<UnflushedWrite>>, boundary: u64) -> Self {
        Self { durable, unflushed, boundary }
    }

    /// How many boundaries had passed.
    #[must_use]
    pub fn boundary(&self) -> u64 {
        self.boundary
    }

    /// What certainly survives.
    #[must_use]
    pub fn durable(&self) -> &Image {
        &self.durable
    }

    /// The writes that may or may not survive, in the order of their completion.
    #[must_use]
    pub fn unflushed(&self) -> &[Arc<UnflushedWrite>] {
        &self.unflushed
    }

    /// The image after a power cut, as `plan` says. Its [`Image::content_hash`] tells whether it was seen before.
    #[must_use]
    pub fn crash(&self, plan: &CrashPlan) -> Image {
        let mut image = Image::clone(&self.durable);
        for survivor in &plan.survivors {
            if let Some(write) = self.unflushed.get(survivor.write) {
                write.apply(&survivor.sectors, &mut image);
            }
        }
        image
    }

    /// As [`Self::crash`], if the device had lost some writes besides that it had acknowledged and flushed. `before` is an older durable image,
    /// `history` all writes that were flushed since, in order; `lost` are indexes in it.
    #[must_use]
    pub fn crash_without(
        &self,
        plan: &CrashPlan,
        before: &Image,
        history: &[Arc<UnflushedWrite>],
        lost: &[usize],
    ) -> Image {
        let mut durable = Image::clone(&self.durable);
        for gone in lost.iter().filter_map(|&index| history.get(index)) {
            // What these bytes would hold: only writes that overlap them matter.
            let mut other = before.clone();
            for (index, write) in history.iter().enumerate() {
                if write.overlaps(gone) && !lost.contains(&index) {
                    write.apply(&Sectors::All, &mut other);
                }
            }
            let mut bytes = vec![0; usize::try_from(gone.length()).unwrap_or(0)];
            other.read(gone.offset, &mut bytes);
            durable.write(gone.offset, &bytes);
        }
        let without = Self { durable: Arc::new(durable), unflushed: self.unflushed.clone(), boundary: self.boundary };
        without.crash(plan)
    }

    /// The image if everything was written: what a clean shutdown leaves, and a process that was killed.
    #[must_use]
    pub fn everything(&self) -> Image {
        self.crash(&self.make(Recipe::All))
    }

    /// One plan by seed: some writes lost, some torn, some overlapping ones in another order.
    #[must_use]
    pub fn random_plan(&self, seed: u64) -> CrashPlan {
        self.make(Recipe::Random(seed))
    }

    /// Plans, as `options` says: always none, all, every prefix, every single write, and all but each single one.
    #[must_use]
    pub fn plans(&self, options: &PlanOptions) -> Plans<'_> {
        let count = self.unflushed.len();
        let exhaustive = count <= options.exhaustive_up_to.min(16);
        let mut random = Random::new(options.seed);
        let mut recipes = vec![Recipe::Prefix(0)];
        if count > 0 {
            recipes.push(Recipe::All);
        }
        if exhaustive {
            let all = (1u32 << count) - 1;
            recipes.extend((1..all).map(Recipe::Subset));
            if options.torn {
                recipes.extend((1..=all).map(|subset| Recipe::TornSubset(subset, random.next())));
            }
        } else {
            recipes.extend((1..count).map(Recipe::Prefix));
            recipes.extend((0..count - 1).map(Recipe::AllBut));
            recipes.extend((1..count).map(Recipe::Only));
        }
        if options.torn {
            for (write, unflushed) in self.unflushed.iter().enumerate().filter(|(_, write)| write.sectors() > 1) {
                let sectors = unflushed.sectors();
                let cut = random_cut(sectors, &mut random);
                for kept in [Sectors::First(cut), Sectors::Last(cut), Sectors::Scattered(random.next())] {
                    recipes.push(Recipe::Torn { write, sectors: kept, others: true });
                    recipes.push(Recipe::Torn { write, sectors: kept, others: false });
                }
            }
        }
        if options.reordered {
            for (earlier, later) in self.overlapping_pairs() {
                recipes.push(Recipe::Swapped { earlier, later, others: true });
                recipes.push(Recipe::Swapped { earlier, later, others: false });
            }
        }
        if count > 1 && (!exhaustive || options.torn || options.reordered) {
            recipes.extend((0..options.samples).map(|_| Recipe::Random(random.next())));
        }
        if let Some(limit) = options.limit
            && recipes.len() > limit
        {
            let fixed = recipes.len().min(2);
            random.shuffle(&mut recipes[fixed..]);
            recipes.truncate(limit);
        }
        Plans { snapshot: self, recipes, next: 0, options: options.clone() }
    }

    /// Pairs of writes where order decides what the medium holds.
    fn overlapping_pairs(&self) -> Vec<(usize, usize)> {
        // Sorted by offset, only writes that start before this one ends can overlap it.
        let mut order: Vec<usize> = (0..self.unflushed.len()).collect();
        order.sort_by_key(|&index| self.unflushed[index].offset);
        let mut pairs = Vec::new();
        for (position, &one) in order.iter().enumerate() {
            for &other in &order[position + 1..] {
                if !self.unflushed[one].overlaps(&self.unflushed[other]) {
                    // Zero-length writes aside, the next ones start even later.
                    break;
                }
                pairs.push((one.min(other), one.max(other)));
            }
        }
        pairs.sort_unstable();
        pairs
    }

    fn make(&self, recipe: Recipe) -> CrashPlan {
        let count = self.unflushed.len();
        let whole = |write| Survivor { write, sectors: Sectors::All };
        let chosen = |subset: u32| (0..count.min(32)).filter(move |index| subset >> index & 1 == 1);
        match recipe {
            Recipe::Subset(subset) => CrashPlan::keeping(chosen(subset)),
            Recipe::All => CrashPlan::keeping(0..count),
            Recipe::Prefix(length) => CrashPlan::keeping(0..length),
            Recipe::AllBut(lost) => CrashPlan::keeping((0..count).filter(|&write| write != lost)),
            Recipe::Only(write) => CrashPlan::keeping([write]),
            Recipe::Torn { write, sectors, others } => CrashPlan {
                survivors: (0..count)
                    .filter(|&index| others || index == write)
                    .map(|index| if index == write { Survivor { write, sectors } } else { whole(index) })
                    .collect(),
            },
            Recipe::Swapped { earlier, later, others } => {
                let rest = (0..count).filter(|&index| others && index != earlier && index != later);
                let mut plan = CrashPlan::keeping(rest);
                let position = plan.survivors.partition_point(|survivor| survivor.write < later);
                plan.survivors.splice(position..position, [whole(later), whole(earlier)]);
                plan
            }
            Recipe::TornSubset(subset, seed) => {
                let mut random = Random::new(seed);
                let survivors = chosen(subset)
                    .map(|write| if random.one_in(2) { self.tear(write, &mut random) } else { whole(write) })
                    .collect();
                CrashPlan { survivors }
            }
            Recipe::Random(seed) => {
                let mut random = Random::new(seed);
                let lost_in_eight = [1, 4, 4, 7][random.below(4) as usize];
                let torn_in_eight = [0, 1, 3][random.below(3) as usize];
                let reorder = random.one_in(3);
                let mut survivors: Vec<Survivor> = Vec::new();
                for write in 0..count {
                    if random.below(8) >= lost_in_eight {
                        let torn = random.below(8) < torn_in_eight;
                        survivors.push(if torn { self.tear(write, &mut random) } else { whole(write) });
                    }
                }
                if reorder {
                    random.shuffle(&mut survivors);
                }
                CrashPlan { survivors }
            }
        }
    }

    fn tear(&self, write: usize, random: &mut Random) -> Survivor {
        let count = self.unflushed.get(write).map_or(0, |write| write.sectors());
        let sectors = if count < 2 {
            Sectors::All
        } else {
            match random.below(3) {
                0 => Sectors::First(random_cut(count, random)),
                1 => Sectors::Last(random_cut(count, random)),
                _ => Sectors::Scattered(random.next()),
            }
        };
        Survivor { write, sectors }
    }
}

/// Sectors of a usual block: what is written at once often consists of such.
const BLOCK_SECTORS: u64 = 4096 / SECTOR_BYTES;

/// Where to tear a write of so many sectors, at least 2: anywhere inside, and as often as not between two blocks.
fn random_cut(sectors: u64, random: &mut Random) -> u64 {
    let inner_blocks = (sectors - 1) / BLOCK_SECTORS;
    if inner_blocks > 0 && random.one_in(2) {
        BLOCK_SECTORS * (1 + random.below(inner_blocks))
    } else {
        1 + random.below(sectors - 1)
    }
}

/// Iterator over the plans of a [`Snapshot`].
#[derive(Clone, Debug)]
pub struct Plans<'a> {
    snapshot: &'a Snapshot,
    recipes: Vec<Recipe>,
    next: usize,
    options: PlanOptions,
}

impl Iterator for Plans<'_> {
    type Item = CrashPlan;

    fn next(&mut self) -> Option<CrashPlan> {
        let recipe = *self.recipes.get(self.next)?;
        self.next += 1;
        let mut plan = self.snapshot.make(recipe);
        if let Recipe::Random(_) = recipe {
            if !self.options.torn {
                plan.survivors.iter_mut().for_each(|survivor| survivor.sectors = Sectors::All);
            }
            if !self.options.reordered {
                plan.survivors.sort_by_key(|survivor| survivor.write);
            }
        }
        Some(plan)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = self.recipes.len() - self.next;
        (left, Some(left))
    }
}

impl ExactSizeIterator for Plans<'_> {}
