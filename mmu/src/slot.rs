//! Memory slots: which guest frames have memory, and for each of them its reverse maps.

use crate::host::SlotId;
use crate::level::Level;
use crate::rmap::RmapHead;
use alloc::vec::Vec;
use bitflags::bitflags;
use core::cell::Cell;
use core::fmt;
use umbra_vcpu::address::Gfn;

bitflags! {
    /// How a slot's memory is used.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct SlotFlags: u8 {
        /// Writes leave to the host as MMIO.
        const READ_ONLY = 1;
        /// Written pages are recorded.
        const LOG_DIRTY = 2;
    }
}

/// A range of guest frames that has memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MemorySlot {
    /// Its name.
    pub id: SlotId,
    /// The first frame.
    pub base: Gfn,
    /// 4 KiB pages, at least one.
    pub pages: u64,
    /// How it is used.
    pub flags: SlotFlags,
}

/// Why a slot cannot be as asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SlotError {
    /// There is a slot of this name.
    Exists,
    /// There is no slot of this name.
    Unknown,
    /// It shares frames with another slot.
    Overlaps(SlotId),
    /// It has no pages, or reaches past the physical address space.
    BadRange,
    /// There are [`MAXIMUM_SLOTS`] slots.
    TooMany,
    /// The host has no memory for the slot's reverse maps.
    OutOfMemory,
}

impl fmt::Display for SlotError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exists => formatter.write_str("a memory slot of this name exists"),
            Self::Unknown => formatter.write_str("no memory slot has this name"),
            Self::Overlaps(other) => write!(formatter, "overlaps memory slot {}", other.0),
            Self::BadRange => formatter.write_str("the slot is empty or ends past 2^52"),
            Self::TooMany => write!(formatter, "more than {MAXIMUM_SLOTS} memory slots"),
            Self::OutOfMemory => formatter.write_str("no host memory for reverse maps"),
        }
    }
}

impl core::error::Error for SlotError {}

/// Slots that a VM can have.
pub const MAXIMUM_SLOTS: usize = 64;

/// Levels at which host pages are mapped.
pub(crate) const MAPPING_LEVELS: [Level; 3] = [Level::One, Level::Two, Level::Three];

pub(crate) struct Slot {
    pub memory: MemorySlot,
    /// Being removed: nothing new may be mapped.
    pub retiring: bool,
    rmaps: [Vec<RmapHead>; 3],
    /// For each range of level 2 and 3: shadowed tables inside, plus one if the slot doesn't cover
    /// the range.
    disallowed: [Vec<u32>; 2],
    dirty: Vec<u64>,
}

fn filled<T: Clone>(value: &T, count: u64) -> Option<Vec<T>> {
    let mut vector = Vec::new();
    vector.try_reserve_exact(count as usize).ok()?;
    vector.resize(count as usize, value.clone());
    Some(vector)
}

impl Slot {
    pub fn new(memory: MemorySlot) -> Result<Self, SlotError> {
        let end = memory
            .base
            .as_u64()
            .checked_add(memory.pages)
            .ok_or(SlotError::BadRange)?;
        if memory.pages == 0 || end > 1 << 40 {
            return Err(SlotError::BadRange);
        }
        let ranges = |level: Level| {
            let last = end - 1;
            last / level.pages() - memory.base.as_u64() / level.pages() + 1
        };
        let rmaps = |level| filled(&RmapHead::EMPTY, ranges(level)).ok_or(SlotError::OutOfMemory);
        let disallowed = |level: Level| {
            let mut counts = filled(&0, ranges(level)).ok_or(SlotError::OutOfMemory)?;
            if !memory.base.as_u64().is_multiple_of(level.pages()) {
                counts[0] += 1;
            }
            if let (false, Some(last)) = (end.is_multiple_of(level.pages()), counts.last_mut()) {
                *last += 1;
            }
            Ok(counts)
        };
        Ok(Self {
            memory,
            retiring: false,
            rmaps: [rmaps(Level::One)?, rmaps(Level::Two)?, rmaps(Level::Three)?],
            disallowed: [disallowed(Level::Two)?, disallowed(Level::Three)?],
            dirty: filled(&0, memory.pages.div_ceil(64)).ok_or(SlotError::OutOfMemory)?,
        })
    }

    #[inline]
    pub fn contains(&self, gfn: Gfn) -> bool {
        gfn.as_u64().wrapping_sub(self.memory.base.as_u64()) < self.memory.pages
    }

    #[inline]
    pub fn page(&self, gfn: Gfn) -> u64 {
        gfn.as_u64() - self.memory.base.as_u64()
    }

    #[inline]
    fn range(&self, level: Level, gfn: Gfn) -> usize {
        (gfn.as_u64() / level.pages() - self.memory.base.as_u64() / level.pages()) as usize
    }

    #[inline]
    pub fn rmap(&mut self, level: Level, gfn: Gfn) -> &mut RmapHead {
        let range = self.range(level, gfn);
        &mut self.rmaps[level.slot()][range]
    }

    /// Whether any entry maps `gfn`.
    #[inline]
    pub fn is_mapped(&self, gfn: Gfn) -> bool {
        MAPPING_LEVELS
            .iter()
            .any(|level| !self.rmaps[level.slot()][self.range(*level, gfn)].is_empty())
    }

    /// Every head with the frame its range starts at.
    pub fn rmaps(&self, level: Level) -> impl Iterator<Item = (Gfn, RmapHead)> + '_ {
        let first = self.memory.base.as_u64() / level.pages();
        self.rmaps[level.slot()]
            .iter()
            .enumerate()
            .map(move |(index, head)| (Gfn::new((first + index as u64) * level.pages()), *head))
    }

    /// The largest level at which `gfn` may be mapped as far as shadowed tables and the slot's
    /// borders are concerned.
    pub fn largest_allowed(&self, gfn: Gfn) -> Level {
        let free = |level: Level| self.disallowed[level.slot() - 1][self.range(level, gfn)] == 0;
        match (free(Level::Two), free(Level::Three)) {
            (false, _) => Level::One,
            (true, false) => Level::Two,
            (true, true) => Level::Three,
        }
    }

    /// Whether shadowed tables may lie in the 2 MiB around `gfn`.
    #[inline]
    pub fn has_tables_near(&self, gfn: Gfn) -> bool {
        self.disallowed[0][self.range(Level::Two, gfn)] != 0
    }

    #[inline]
    pub fn disallow_large(&mut self, gfn: Gfn) {
        for level in [Level::Two, Level::Three] {
            let range = self.range(level, gfn);
            self.disallowed[level.slot() - 1][range] += 1;
        }
    }

    pub fn allow_large(&mut self, gfn: Gfn) {
        for level in [Level::Two, Level::Three] {
            let range = self.range(level, gfn);
            let count = &mut self.disallowed[level.slot() - 1][range];
            debug_assert!(*count > 0, "unbalanced large-page count");
            *count = count.saturating_sub(1);
        }
    }

    /// The count for the audit: tables shadowed in the range of `gfn`, without the borders' share.
    pub fn disallow_count(&self, level: Level, gfn: Gfn) -> u32 {
        self.disallowed[level.slot() - 1][self.range(level, gfn)]
    }

    /// The share of the slot's borders in [`Self::disallow_count`].
    pub fn border_share(&self, level: Level, gfn: Gfn) -> u32 {
        let start = level.align(gfn).as_u64();
        let (base, end) = (
            self.memory.base.as_u64(),
            self.memory.base.as_u64() + self.memory.pages,
        );
        u32::from(start < base) + u32::from(start + level.pages() > end)
    }

    /// Changes the flags; a log that is turned on starts empty.
    pub fn set_flags(&mut self, flags: SlotFlags) {
        if flags.contains(SlotFlags::LOG_DIRTY) && !self.memory.flags.contains(SlotFlags::LOG_DIRTY)
        {
            self.dirty.fill(0);
        }
        self.memory.flags = flags;
    }

    pub fn mark_dirty(&mut self, gfn: Gfn) {
        if self.memory.flags.contains(SlotFlags::LOG_DIRTY) {
            let page = self.page(gfn) as usize;
            self.dirty[page / 64] |= 1 << (page % 64);
        }
    }

    /// Clears and returns one dirty page at or after the cursor.
    pub fn take_dirty(&mut self, cursor: &mut usize) -> Option<Gfn> {
        while let Some(word) = self.dirty.get_mut(*cursor) {
            if *word != 0 {
                let bit = word.trailing_zeros();
                *word &= *word - 1;
                return Some(
                    self.memory
                        .base
                        .offset(*cursor as u64 * 64 + u64::from(bit)),
                );
            }
            *cursor += 1;
        }
        None
    }
}

/// A VM's slots, in the order of their frames.
pub(crate) struct Slots {
    slots: Vec<Slot>,
    /// Where the last frame was found: most often the next one is there, too.
    last: Cell<usize>,
}

impl Slots {
    pub fn new() -> Self {
        Self {
            slots: Vec::new(),
            last: Cell::new(0),
        }
    }

    #[inline]
    fn position(&self, gfn: Gfn) -> Option<usize> {
        let last = self.last.get();
        match self.slots.get(last) {
            Some(slot) if slot.contains(gfn) => Some(last),
            _ => self.search(gfn),
        }
    }

    fn search(&self, gfn: Gfn) -> Option<usize> {
        let after = self.slots.partition_point(|slot| slot.memory.base <= gfn);
        let index = after.checked_sub(1)?;
        let found = self.slots[index].contains(gfn);
        if found {
            self.last.set(index);
        }
        found.then_some(index)
    }

    /// The slot that holds `gfn`, unless it is going away.
    #[inline]
    pub fn usable(&self, gfn: Gfn) -> Option<&Slot> {
        self.position(gfn)
            .map(|index| &self.slots[index])
            .filter(|slot| !slot.retiring)
    }

    /// The slot that holds `gfn`.
    #[inline]
    pub fn get(&self, gfn: Gfn) -> Option<&Slot> {
        self.position(gfn).map(|index| &self.slots[index])
    }

    /// The same, to be changed.
    #[inline]
    pub fn of(&mut self, gfn: Gfn) -> Option<&mut Slot> {
        self.position(gfn).map(|index| &mut self.slots[index])
    }

    pub fn named(&mut self, id: SlotId) -> Option<&mut Slot> {
        self.slots.iter_mut().find(|slot| slot.memory.id == id)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Slot> {
        self.slots.iter()
    }

    /// Takes the slot if it fits; what was rejected stays with the caller.
    pub fn insert(&mut self, slot: &mut Option<Slot>) -> Result<(), SlotError> {
        let Some(new) = slot.as_ref().map(|slot| slot.memory) else {
            return Ok(());
        };
        if self.slots.len() == MAXIMUM_SLOTS {
            return Err(SlotError::TooMany);
        }
        for other in self.slots.iter().map(|slot| slot.memory) {
            if other.id == new.id {
                return Err(SlotError::Exists);
            }
            if new.base.as_u64() < other.base.as_u64() + other.pages
                && other.base.as_u64() < new.base.as_u64() + new.pages
            {
                return Err(SlotError::Overlaps(other.id));
            }
        }
        self.slots
            .try_reserve(1)
            .map_err(|_| SlotError::OutOfMemory)?;
        let index = self
            .slots
            .partition_point(|other| other.memory.base < new.base);
        self.slots.extend(slot.take());
        self.slots[index..].rotate_right(1);
        Ok(())
    }

    pub fn remove(&mut self, id: SlotId) -> Option<Slot> {
        let index = self.slots.iter().position(|slot| slot.memory.id == id)?;
        Some(self.slots.remove(index))
    }
}
