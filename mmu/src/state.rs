//! All that one VM's lock protects, and the operations on single entries.
//!
//! [`Core`] is a view of the state while the lock is held. Whatever takes a right away from the
//! hardware notes it in `flush_pending`; [`Core::flush`] must run before anybody relies on the
//! result, and runs in any case before the lock is released.

use crate::budget::Budget;
use crate::config::MmuConfig;
use crate::host::{Host, Touch};
use crate::level::Level;
use crate::lock::AtomicU64;
use crate::page::{ActivePage, PageId, PageTable, Translations, group_bit};
use crate::registers::Rights;
use crate::rmap::{RmapHead, RmapNodes, SpteRef};
use crate::role::LeafTranslation;
use crate::root::VcpuRoots;
use crate::slot::{MAPPING_LEVELS, Slot, Slots};
use crate::spte::{Mapping, Spte};
use crate::statistics::Counters;
use alloc::vec::Vec;
use umbra_vcpu::address::{Gfn, Hpa, Pfn};

/// What one guest access may need, allocated before the lock is taken.
pub(crate) struct Caches {
    pub frames: Vec<Hpa>,
    pub translations: Vec<Translations>,
}

pub(crate) struct State {
    pub pages: PageTable,
    pub nodes: RmapNodes,
    pub slots: Slots,
    pub caches: Caches,
    pub vcpus: Vec<Option<VcpuRoots>>,
    pub limit: usize,
    /// Pages counted in the budget ahead of being made.
    pub reserved: usize,
    /// Pages that hold a frame: active, invalid or in a batch.
    pub used: usize,
    /// Of these, pages that are roots of virtual CPUs, in use or previous.
    pub pinned: usize,
    pub generation: u32,
    pub mmio_generation: u32,
    pub flush_pending: bool,
    pub counters: Counters,
}

/// The state while its lock is held, with what doesn't need the lock beside it.
pub(crate) struct Core<'a, H> {
    pub host: &'a H,
    pub config: &'a MmuConfig,
    pub budget: &'a Budget,
    /// Counts the events after which virtual CPUs must look at their roots again.
    pub root_epoch: &'a AtomicU64,
    pub state: &'a mut State,
}

/// What an entry says together with its translation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Target {
    Leaf { gfn: Gfn, rights: Rights },
    Page(PageId),
}

/// A mapping of one guest frame.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Leaf {
    pub gfn: Gfn,
    pub frame: Pfn,
    /// The guest's own rights, and the frame, as the page keeps them.
    pub translation: LeafTranslation,
    /// What the hardware may do now, a part of them.
    pub granted: Rights,
}

/// Frames and arrays kept ready: the worst case of one fault or root load, and all that one recycling
/// frees, so that the host is not asked again and again.
pub(crate) const CACHED: usize = 32;

impl Leaf {
    #[inline]
    fn spte(&self, level: Level) -> Spte {
        let mapping = if level == Level::One {
            Mapping::Small
        } else {
            Mapping::Large
        };
        Spte::leaf(self.frame, self.granted, mapping)
    }
}

impl<H: Host> Core<'_, H> {
    /// Makes every virtual CPU forget what it must, if there is anything.
    #[inline]
    pub fn flush(&mut self) {
        if core::mem::take(&mut self.state.flush_pending) {
            self.state.counters.tlb_flush += 1;
            self.host.flush_all();
        }
    }

    #[inline]
    pub fn load(&self, page: PageId, index: usize) -> Spte {
        Spte(self.host.load(self.state.pages[page].frame, index))
    }

    /// Whether an entry that isn't empty is a leaf (or MMIO) or links to a page.
    pub fn is_leaf(&self, page: PageId, spte: Spte) -> bool {
        !spte.is_present() || spte.is_large() || self.state.pages[page].role.level == Level::One
    }

    /// What the non-empty entry at `index` stands for.
    pub fn target(&self, page: PageId, index: usize, spte: Spte) -> Target {
        let shadow = &self.state.pages[page];
        let Some(translations) = &shadow.translations else {
            return Target::Leaf {
                gfn: shadow.gfn.offset(index as u64),
                rights: shadow.role.rights,
            };
        };
        let translation = translations[index];
        if self.is_leaf(page, spte) {
            let (gfn, rights) = shadow.role.leaf(LeafTranslation(translation));
            Target::Leaf { gfn, rights }
        } else {
            Target::Page(PageId::from_number(translation as u32))
        }
    }

    /// Empties an entry and forgets it in the reverse map or in its child's parents.
    pub fn drop_entry(&mut self, page: PageId, index: usize) -> Option<PageId> {
        let frame = self.state.pages[page].frame;
        let old = Spte(self.host.swap(frame, index, 0));
        if old.is_empty() {
            return None;
        }
        let target = self.target(page, index, old);
        self.state.pages[page].used_entries -= 1;
        if !old.is_present() {
            return None;
        }
        self.state.flush_pending = true;
        let spte = SpteRef { page, index };
        let state = &mut *self.state;
        match target {
            Target::Leaf { gfn, .. } => {
                let level = state.pages[page].role.level;
                if let Some(slot) = state.slots.of(gfn) {
                    let found = state.nodes.remove(slot.rmap(level, gfn), spte);
                    debug_assert!(found, "a leaf was not in its reverse map");
                } else {
                    debug_assert!(false, "a leaf maps a frame without a slot");
                }
                None
            }
            Target::Page(child) => {
                let mut parents = state.pages[child].parents;
                let found = state.nodes.remove(&mut parents, spte);
                debug_assert!(found, "a link was not among its page's parents");
                state.pages[child].parents = parents;
                state.pages.note_orphan(child);
                Some(child)
            }
        }
    }

    fn note(&mut self, page: PageId, index: usize, translation: u64) {
        let shadow = &mut self.state.pages[page];
        shadow.used_entries += 1;
        shadow.occupied |= group_bit(index);
        if let Some(translations) = &mut shadow.translations {
            translations[index] = translation;
        }
    }

    /// Lets the empty entry at `index` of `page` point to `child`.
    #[inline]
    pub fn link(&mut self, page: ActivePage, index: usize, child: ActivePage) {
        let (page, child) = (page.id(), child.id());
        self.note(page, index, u64::from(child.number()));
        let state = &mut *self.state;
        let mut parents = state.pages[child].parents;
        state.nodes.insert(&mut parents, SpteRef { page, index });
        state.pages[child].parents = parents;
        state.pages.note_orphan(child);
        debug_assert!(
            !state.pages.is_unsync_within(child),
            "what is linked in a new place was not synced"
        );
        let value = Spte::link(self.state.pages[child].frame);
        self.host
            .store(self.state.pages[page].frame, index, value.0);
    }

    /// Makes the entry at `index` map `leaf`, whatever it held.
    pub fn map(&mut self, page: ActivePage, index: usize, leaf: &Leaf) {
        let id = page.id();
        let (level, table) = (self.state.pages[id].role.level, self.state.pages[id].frame);
        let old = self.load(id, index);
        if old.is_present() && self.is_leaf(id, old) && old.frame() == leaf.frame {
            let held = self.target(id, index, old);
            if matches!(held, Target::Leaf { gfn, .. } if gfn == leaf.gfn) {
                if let Some(translations) = &mut self.state.pages[id].translations {
                    translations[index] = leaf.translation.0;
                }
                let new = leaf.spte(level);
                let old = Spte(self.host.swap(table, index, new.0));
                self.state.flush_pending |= old.needs_flush_before(new);
                return;
            }
        }
        if !old.is_empty() {
            self.drop_entry(id, index);
        }
        self.map_empty(page, index, level, leaf);
    }

    /// Makes the empty entry at `index` of a page at `level` map `leaf`.
    #[inline]
    pub fn map_empty(&mut self, page: ActivePage, index: usize, level: Level, leaf: &Leaf) {
        let id = page.id();
        self.note(id, index, leaf.translation.0);
        let state = &mut *self.state;
        if let Some(slot) = state.slots.of(leaf.gfn) {
            state
                .nodes
                .insert(slot.rmap(level, leaf.gfn), SpteRef { page: id, index });
        }
        let frame = state.pages[id].frame;
        self.host.store(frame, index, leaf.spte(level).0);
    }

    /// Makes the entry at `index` of a level-1 page an MMIO entry, whatever it held.
    pub fn map_mmio(&mut self, page: ActivePage, index: usize, gfn: Gfn, rights: Rights) {
        let id = page.id();
        self.drop_entry(id, index);
        self.note(id, index, LeafTranslation::of(gfn, rights).0);
        let value = Spte::mmio(self.state.mmio_generation, rights);
        self.host.store(self.state.pages[id].frame, index, value.0);
    }

    /// Takes the write right from every entry that maps `gfn`. Large entries go altogether.
    #[inline]
    pub fn write_protect(&mut self, gfn: Gfn) {
        let mapped = |slot: &Slot| slot.is_mapped(gfn);
        if self.state.slots.get(gfn).is_some_and(mapped) {
            self.write_protect_mapped(gfn);
        }
    }

    fn write_protect_mapped(&mut self, gfn: Gfn) {
        let Some(slot) = self.state.slots.of(gfn) else {
            return;
        };
        // To drop entries of one level changes the lists of no other.
        let heads = MAPPING_LEVELS.map(|level| *slot.rmap(level, gfn));
        for (level, head) in MAPPING_LEVELS.into_iter().zip(heads) {
            if level == Level::One {
                let mut cursor = RmapNodes::start(head);
                while let Some(spte) = self.state.nodes.step(&mut cursor) {
                    self.write_protect_entry(spte);
                }
            } else {
                self.drop_writable(level, gfn, head);
            }
        }
    }

    fn drop_writable(&mut self, level: Level, gfn: Gfn, mut head: RmapHead) {
        // The list changes with every drop, so it is read again from the start.
        while let Some(spte) = self.state.nodes.first(head) {
            self.drop_entry(spte.page, spte.index);
            let Some(slot) = self.state.slots.of(gfn) else {
                return;
            };
            head = *slot.rmap(level, gfn);
        }
    }

    pub fn write_protect_entry(&mut self, spte: SpteRef) {
        let frame = self.state.pages[spte.page].frame;
        let mut old = self.load(spte.page, spte.index);
        while old.is_writable() {
            // The hardware may set the accessed or dirty bit in between.
            let new = old.write_protected();
            match self.host.compare_exchange(frame, spte.index, old.0, new.0) {
                Ok(_) => {
                    self.state.flush_pending = true;
                    return;
                }
                Err(found) => old = Spte(found),
            }
        }
    }

    /// Whether a write to `gfn` would change a table that a shadow page holds to be unchanged.
    #[inline]
    pub fn is_tracked(&self, gfn: Gfn) -> bool {
        let near = |slot: &Slot| slot.has_tables_near(gfn);
        if !self.state.slots.get(gfn).is_some_and(near) {
            return false;
        }
        self.state.pages.of(gfn).any(|id| {
            let page = &self.state.pages[id];
            !page.role.is_direct() && !page.unsync
        })
    }

    /// The host frame of `gfn` if it is memory that has been touched.
    pub fn resolve(&self, gfn: Gfn) -> Option<Pfn> {
        self.frame_in(self.state.slots.usable(gfn)?, gfn)
    }

    /// The same in its slot.
    #[inline]
    pub fn frame_in(&self, slot: &Slot, gfn: Gfn) -> Option<Pfn> {
        let found = self.host.frame(slot.memory.id, slot.page(gfn), Touch::Peek);
        found.ok().flatten()
    }
}
