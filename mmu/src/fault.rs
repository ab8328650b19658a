//! The page-fault handler: walk the guest's tables, then make the shadow's path say the same.

use crate::config::MINIMUM_FREE_PAGES;
use crate::error::{MmuError, NoPageAvailable};
use crate::host::{Host, SlotId, Touch};
use crate::level::Level;
use crate::page::{ActivePage, NewPage, PageId, ShadowPage};
use crate::registers::{AccessKind, Attempt, Fault, GuestPaging, Marking, PageFault, Rights};
use crate::role::Role;
use crate::slot::SlotFlags;
use crate::spte::Spte;
use crate::state::{Core, Leaf, Target};
use crate::sync::Reach;
use crate::walk::{Walk, WalkEnd};
use umbra_vcpu::address::{Gfn, Gpa, Gva, Pfn};

/// Why an MMIO access cannot go to memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MmioTarget {
    /// No memory slot holds the address.
    NoSlot,
    /// The slot is read-only, and this is a write.
    ReadOnlySlot,
}

/// What to do after a page fault.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FaultOutcome {
    /// Enter the guest again: the access will go through, or fault anew for another reason.
    Fixed,
    /// The guest's own fault: set CR2 and inject #PF.
    Inject(PageFault),
    /// Emulate the instruction.
    Mmio {
        /// The guest-physical address.
        gpa: Gpa,
        /// What the instruction does there.
        access: AccessKind,
        /// What is there.
        target: MmioTarget,
    },
}

/// How an attempt to handle a fault under the lock ended.
pub(crate) enum Step {
    Done(FaultOutcome),
    /// The page has no memory yet; it has to be allocated without the lock.
    Allocate {
        slot: SlotId,
        page: u64,
    },
}

/// Pages, frames and translation arrays that one fault can use: one a level below the root.
pub(crate) const FAULT_PAGES: usize = 4;

impl<H: Host> Core<'_, H> {
    /// Handles a fault of the virtual CPU whose root pages are `roots`.
    pub fn handle_fault(
        &mut self,
        paging: &GuestPaging,
        root: Option<ActivePage>,
        fault: &Fault,
    ) -> Result<Step, MmuError> {
        let attempt = Attempt::of_fault(fault);
        let gva = paging.linear(fault.gva);
        let walk = match self.walk(paging, gva, attempt, Marking::SetAccessedDirty) {
            Ok(walk) => walk,
            Err(WalkEnd::Changed) => return Ok(Step::Done(FaultOutcome::Fixed)),
            Err(WalkEnd::Fault(page_fault)) => {
                return Ok(Step::Done(FaultOutcome::Inject(page_fault)));
            }
        };
        let writes = attempt.kind == AccessKind::Write;
        let gpa = Gpa::new(walk.gfn.base().as_u64() | gva.page_offset());
        let mmio = |target| FaultOutcome::Mmio {
            gpa,
            access: attempt.kind,
            target,
        };
        let Some(slot) = self.state.slots.usable(walk.gfn) else {
            if let Some(root) = root {
                self.fill(root, gva, &walk, attempt, None)?;
            }
            return Ok(Step::Done(mmio(MmioTarget::NoSlot)));
        };
        let (id, page) = (slot.memory.id, slot.page(walk.gfn));
        if writes && slot.memory.flags.contains(SlotFlags::READ_ONLY) {
            return Ok(Step::Done(mmio(MmioTarget::ReadOnlySlot)));
        }
        let Ok(Some(frame)) = self.host.frame(id, page, Touch::Peek) else {
            return Ok(Step::Allocate { slot: id, page });
        };
        // The root may have been zapped meanwhile; the next entry loads another.
        if let Some(root) = root {
            let level = self.mapping_level(root, &walk);
            self.fill(root, gva, &walk, attempt, Some((frame, level)))?;
        }
        Ok(Step::Done(FaultOutcome::Fixed))
    }

    /// The largest page that guest, host, slot and shadowed tables allow around the address.
    fn mapping_level(&self, root: ActivePage, walk: &Walk) -> Level {
        if walk.leaf == Level::One {
            return Level::One;
        }
        let Some(slot) = self.state.slots.usable(walk.gfn) else {
            return Level::One;
        };
        if slot.memory.flags.contains(SlotFlags::LOG_DIRTY) {
            return Level::One;
        }
        // A PAE page directory is the highest table that has entries of its own.
        let structural = match self.state.pages[root.id()].role.level {
            Level::Two => Level::Two,
            _ => Level::Three,
        };
        let limit = walk
            .leaf
            .min(structural)
            .min(self.config.largest_mapping)
            .min(slot.largest_allowed(walk.gfn));
        if limit == Level::One {
            return limit;
        }
        limit.min(self.host.mapping_level(slot.memory.id, slot.page(walk.gfn)))
    }

    /// The page below `parent` on the path of `walk`: frame and role.
    #[inline]
    fn child(page: &ShadowPage, index: usize, walk: &Walk) -> (Gfn, Role) {
        let level = page.role.level;
        let below = level.below().unwrap_or(Level::One);
        if level > walk.leaf {
            let rights =
                page.role.rights & page.role.entries().rights(walk.entries[level.slot()].value);
            (
                walk.entries[below.slot()].table,
                page.role.of_table_below(index, below, rights),
            )
        } else {
            (
                level.align(walk.gfn),
                page.role.of_direct_below(below, walk.rights),
            )
        }
    }

    /// Makes sure that the pages missing on the path can be made: the fault's exact worst case. All
    /// is there down to `last`. Returns the page to go on from.
    fn reserve_path(
        &mut self,
        root: ActivePage,
        last: ActivePage,
        walk: &Walk,
        gva: Gva,
        level: Level,
    ) -> Result<ActivePage, MmuError> {
        // The usual case: there is room for a page at every level below, whatever exists already.
        let lowest = self.state.pages[last.id()].role.level;
        let most = usize::from(lowest.number().saturating_sub(level.number()));
        if self.available() >= most + MINIMUM_FREE_PAGES && self.budget.reserve(most) {
            self.state.reserved += most;
            return Ok(last);
        }
        // Making room may zap pages on the path itself, even where it fails in the end, so what is
        // missing is counted anew until it is covered or no more: at most once for each level.
        loop {
            let missing = self.missing(root, walk, gva, level);
            if missing <= self.state.reserved {
                return Ok(root);
            }
            if let Err(report) = self.make_pages_available(missing - self.state.reserved) {
                if self.missing(root, walk, gva, level) > missing {
                    continue;
                }
                let needed = missing;
                return Err(NoPageAvailable { needed, ..report }.into());
            }
        }
    }

    fn missing(&self, root: ActivePage, walk: &Walk, gva: Gva, target: Level) -> usize {
        let mut page = root;
        loop {
            let level = self.state.pages[page.id()].role.level;
            if level <= target {
                return 0;
            }
            let index = level.index(gva);
            let spte = self.load(page.id(), index);
            let (gfn, role) = Self::child(&self.state.pages[page.id()], index, walk);
            let existing = self.matching_child(page, index, spte, gfn, role);
            match existing.or_else(|| self.find(gfn, role)) {
                Some(child) => page = child,
                None => return usize::from(level.number() - target.number()),
            }
        }
    }

    /// The page that an entry links to, if frame *and* role are those that are wanted now.
    #[inline]
    fn matching_child(
        &self,
        page: ActivePage,
        index: usize,
        spte: Spte,
        gfn: Gfn,
        role: Role,
    ) -> Option<ActivePage> {
        if spte.is_empty() {
            return None;
        }
        let Target::Page(child) = self.target(page.id(), index, spte) else {
            return None;
        };
        let shadow = &self.state.pages[child];
        if shadow.gfn == gfn && shadow.role == role && shadow.generation == self.state.generation {
            self.state.pages.active(child)
        } else {
            None
        }
    }

    fn find(&self, gfn: Gfn, role: Role) -> Option<ActivePage> {
        self.find_from(self.state.pages.first_of(gfn), role)
    }

    /// The page with this role among those of one frame, of which `at` is the first.
    #[inline]
    fn find_from(&self, mut at: Option<PageId>, role: Role) -> Option<ActivePage> {
        while let Some(id) = at {
            let page = &self.state.pages[id];
            if page.role == role && page.generation == self.state.generation {
                return self.state.pages.active(id);
            }
            at = self.state.pages.next_same_gfn(id);
        }
        None
    }

    /// Makes the path of `walk` and its last entry.
    fn fill(
        &mut self,
        root: ActivePage,
        gva: Gva,
        walk: &Walk,
        attempt: Attempt,
        memory: Option<(Pfn, Level)>,
    ) -> Result<(), MmuError> {
        let target = memory.map_or(Level::One, |(_, level)| level);
        let mut page = root;
        // Down as far as everything is as it should be: most often that is the whole path.
        loop {
            let shadow = &self.state.pages[page.id()];
            let level = shadow.role.level;
            let index = level.index(gva);
            if level <= target {
                self.fill_leaf(page, index, walk, attempt, memory);
                return Ok(());
            }
            let spte = Spte(self.host.load(shadow.frame, index));
            if spte.is_empty() {
                break;
            }
            let (gfn, role) = Self::child(shadow, index, walk);
            let Some(child) = self.matching_child(page, index, spte, gfn, role) else {
                break;
            };
            self.state.pages[child.id()].write_flooding = 0;
            page = child;
        }
        let from = self.reserve_path(root, page, walk, gva, target)?;
        self.make_path(from, gva, walk, attempt, memory);
        Ok(())
    }

    /// The same from `page` on, where a page for every missing level is reserved.
    fn make_path(
        &mut self,
        mut page: ActivePage,
        gva: Gva,
        walk: &Walk,
        attempt: Attempt,
        memory: Option<(Pfn, Level)>,
    ) {
        let target = memory.map_or(Level::One, |(_, level)| level);
        let flushes = self.state.counters.tlb_flush;
        loop {
            // What was read is in doubt only once a table had to be write-protected: until the flush
            // for it, another processor may have gone on writing.
            let in_doubt = self.state.counters.tlb_flush != flushes;
            if in_doubt && !self.is_current(page, walk) {
                return;
            }
            let shadow = &self.state.pages[page.id()];
            let level = shadow.role.level;
            let index = level.index(gva);
            if level <= target {
                self.fill_leaf(page, index, walk, attempt, memory);
                return;
            }
            let (gfn, role) = Self::child(shadow, index, walk);
            let spte = Spte(self.host.load(shadow.frame, index));
            if !spte.is_empty() {
                if let Some(child) = self.matching_child(page, index, spte, gfn, role) {
                    self.state.pages[child.id()].write_flooding = 0;
                    page = child;
                    continue;
                }
                self.drop_entry(page.id(), index);
            }
            let Some(child) = self.get_page(gfn, role) else {
                return;
            };
            // Among what came in with the flush may be the entry that leads here.
            let in_doubt = self.state.counters.tlb_flush != flushes;
            if self.state.pages.active(page.id()).is_none()
                || (in_doubt && !self.is_current(page, walk))
            {
                self.state.pages.note_orphan(child.id());
                return;
            }
            self.link(page, index, child);
            page = child;
        }
    }

    /// Whether the guest's entry in `page`'s table is still what the walk read.
    fn is_current(&self, page: ActivePage, walk: &Walk) -> bool {
        let role = self.state.pages[page.id()].role;
        if role.is_direct() {
            return true;
        }
        let entry = walk.entries[role.level.slot()];
        self.read_guest(role.format, entry.table, entry.offset) == entry.value
    }

    fn fill_leaf(
        &mut self,
        page: ActivePage,
        index: usize,
        walk: &Walk,
        attempt: Attempt,
        memory: Option<(Pfn, Level)>,
    ) {
        let Some((frame, level)) = memory else {
            self.map_mmio(page, index, walk.gfn, walk.rights);
            return;
        };
        let gfn = level.align(walk.gfn);
        let frame = Pfn::new(frame.as_u64() & !(level.pages() - 1));
        let writes = attempt.kind == AccessKind::Write;
        if writes && level == Level::One && self.is_tracked(gfn) {
            self.allow_table_writes(gfn);
            if self.state.pages.active(page.id()).is_none() {
                return;
            }
        }
        let granted = self.granted(gfn, level, walk.rights, attempt.kind);
        let role = self.state.pages[page.id()].role;
        let leaf = Leaf {
            gfn,
            frame,
            translation: role.translation(walk.entries[0].value, gfn, walk.rights),
            granted,
        };
        self.map(page, index, &leaf);
        if self.config.prefetch > 1 {
            self.prefetch(page, index);
        }
    }

    /// What of the guest's `rights` the hardware may have right now.
    fn granted(&mut self, gfn: Gfn, level: Level, rights: Rights, kind: AccessKind) -> Rights {
        if !rights.contains(Rights::WRITE) {
            return rights;
        }
        let tracked = level == Level::One && self.is_tracked(gfn);
        let Some(slot) = self.state.slots.of(gfn) else {
            return rights - Rights::WRITE;
        };
        let flags = slot.memory.flags;
        if tracked || flags.contains(SlotFlags::READ_ONLY) {
            return rights - Rights::WRITE;
        }
        if flags.contains(SlotFlags::LOG_DIRTY) {
            if kind != AccessKind::Write {
                return rights - Rights::WRITE;
            }
            slot.mark_dirty(gfn);
        }
        rights
    }

    /// The page with this frame and role, up to date; made if there is none.
    ///
    /// `None` only if the caller reserved too little, which the audit would show.
    #[inline]
    pub fn get_page(&mut self, gfn: Gfn, role: Role) -> Option<ActivePage> {
        let first = self.state.pages.first_of(gfn);
        match self.find_from(first, role) {
            Some(page) => {
                self.refresh(page);
                Some(page)
            }
            None => self.make_page(gfn, role, first),
        }
    }

    /// Brings a page up to date that is about to be linked in a new place. Nobody has to flush for a
    /// translation that is new, so what is linked must be fresh, and with it everything below.
    fn refresh(&mut self, page: ActivePage) {
        self.state.pages[page.id()].write_flooding = 0;
        self.sync_within([page.id()], Reach::All);
    }

    fn make_page(&mut self, gfn: Gfn, role: Role, first: Option<PageId>) -> Option<ActivePage> {
        let caches = &mut self.state.caches;
        let frame = caches.frames.pop();
        let translations = if role.is_direct() && role.level == Level::One {
            None
        } else if let Some(translations) = caches.translations.pop() {
            Some(translations)
        } else {
            debug_assert!(false, "the caches were not topped up");
            caches.frames.extend(frame);
            return None;
        };
        let Some(frame) = frame else {
            debug_assert!(false, "the caches were not topped up");
            caches.translations.extend(translations);
            return None;
        };
        self.state.counters.mmu_cache_miss += 1;
        self.state.used += 1;
        self.state.reserved -= 1;
        let page = NewPage {
            gfn,
            role,
            frame,
            translations,
            generation: self.state.generation,
        };
        let page = self.state.pages.insert(page, first);
        if !role.is_direct() {
            if let Some(slot) = self.state.slots.of(gfn) {
                slot.disallow_large(gfn);
            }
            self.write_protect(gfn);
            self.flush();
        }
        Some(page)
    }

    /// The error of a VM that gets no more pages.
    pub fn no_page_available(&self, needed: usize) -> NoPageAvailable {
        NoPageAvailable {
            needed,
            used: self.state.used,
            limit: self.state.limit.min(self.budget.limit()),
            pinned: self.state.pinned,
        }
    }
}
