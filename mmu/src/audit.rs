//! A check of every structural invariant, for tests and debug builds.

#![allow(
    clippy::redundant_closure_for_method_calls,
    reason = "the methods' own lifetimes are not general enough"
)]

use crate::host::Host;
use crate::level::{ENTRIES, Level};
use crate::mmu::Mmu;
use crate::page::{PageState, group_bit};
use crate::rmap::SpteRef;
use crate::slot::MAPPING_LEVELS;
use crate::state::{Core, Target};
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

impl<H: Host> Mmu<H> {
    /// Checks all structures against each other: reverse maps and parents against entries, list
    /// against hash against counts, write protection, large-page counts.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub fn audit(&self) -> Result<(), String> {
        self.locked(|core| core.audit())
    }
}

macro_rules! ensure {
    ($condition:expr, $($message:tt)+) => {
        if !$condition {
            return Err(format!($($message)+));
        }
    };
}

impl<H: Host> Core<'_, H> {
    fn audit(&mut self) -> Result<(), String> {
        let listed = self.audit_lists()?;
        self.audit_roots()?;
        let mut leaves = BTreeMap::<(u64, Level), BTreeSet<(u32, usize)>>::new();
        let mut links = BTreeMap::<u32, BTreeSet<(u32, usize)>>::new();
        for id in &listed {
            let id = crate::page::PageId::from_number(*id);
            let (level, gfn) = (self.state.pages[id].role.level, self.state.pages[id].gfn);
            let mut used = 0;
            for index in 0..ENTRIES {
                let spte = self.load(id, index);
                if spte.is_empty() {
                    continue;
                }
                used += 1;
                ensure!(
                    self.state.pages[id].occupied & group_bit(index) != 0,
                    "{id:?}[{index}]: its group counts as empty"
                );
                match self.target(id, index, spte) {
                    Target::Leaf { gfn, rights } => {
                        if !spte.is_present() {
                            ensure!(spte.as_mmio().is_some(), "{id:?}[{index}]: garbage");
                            continue;
                        }
                        ensure!(
                            rights.contains(spte.rights()),
                            "{id:?}[{index}]: grants {:?} of {rights:?}",
                            spte.rights()
                        );
                        ensure!(
                            !spte.is_writable() || !self.is_tracked(gfn),
                            "{id:?}[{index}]: writable, but {gfn} is a synced table"
                        );
                        leaves
                            .entry((gfn.as_u64(), level))
                            .or_default()
                            .insert((id.number(), index));
                    }
                    Target::Page(child) => {
                        let page = &self.state.pages[child];
                        ensure!(
                            page.state == PageState::Active,
                            "{id:?}[{index}]: links to a {:?} page",
                            page.state
                        );
                        ensure!(
                            Some(page.role.level) == level.below(),
                            "{id:?}[{index}]: links to a page of the wrong level"
                        );
                        ensure!(
                            spte.frame().base() == page.frame,
                            "{id:?}[{index}]: frame and page differ"
                        );
                        ensure!(
                            !self.state.pages.is_unsync_within(child)
                                || self.state.pages[id].unsync_below & group_bit(index) != 0,
                            "{id:?}[{index}]: leads to an unsync page unmarked"
                        );
                        links
                            .entry(child.number())
                            .or_default()
                            .insert((id.number(), index));
                    }
                }
            }
            ensure!(
                used == self.state.pages[id].used_entries,
                "{id:?} ({gfn}): {used} entries, {} counted",
                self.state.pages[id].used_entries
            );
        }
        for id in &listed {
            let id = crate::page::PageId::from_number(*id);
            let parents = self.state.pages[id].parents;
            let have: BTreeSet<_> = self.references(parents);
            let want = links.remove(&id.number()).unwrap_or_default();
            ensure!(have == want, "{id:?}: parents {have:?}, links {want:?}");
        }
        self.audit_slots(leaves)
    }

    fn references(&self, head: crate::rmap::RmapHead) -> BTreeSet<(u32, usize)> {
        self.state
            .nodes
            .iter(head)
            .map(|SpteRef { page, index }| (page.number(), index))
            .collect()
    }

    fn audit_lists(&self) -> Result<BTreeSet<u32>, String> {
        let pages = &self.state.pages;
        let mut listed = BTreeSet::new();
        let mut at = pages.active_list().first();
        while let Some(id) = at {
            ensure!(
                pages[id].state == PageState::Active,
                "{id:?} is listed but {:?}",
                pages[id].state
            );
            ensure!(
                listed.insert(id.number()),
                "the active list has a loop at {id:?}"
            );
            ensure!(
                pages.of(pages[id].gfn).filter(|other| *other == id).count() == 1,
                "{id:?} is not once in the hash"
            );
            at = pages.next(id);
        }
        ensure!(
            listed.len() == pages.active_list().len(),
            "the active list's length drifted"
        );
        let (mut active, mut existing, mut unsync, mut orphans) = (0, 0, 0, 0);
        let mut frames = BTreeSet::new();
        for id in pages.ids() {
            let page = &pages[id];
            match page.state {
                PageState::Unused => continue,
                PageState::Active => active += 1,
                PageState::Invalid => {
                    ensure!(page.root_count > 0, "{id:?} is invalid and nobody's root");
                    ensure!(page.parents.is_empty(), "{id:?} is invalid and has parents");
                    ensure!(page.used_entries == 0, "{id:?} is invalid and has entries");
                }
                PageState::Zapped => return Err(format!("{id:?} was zapped and not freed")),
            }
            existing += 1;
            unsync += usize::from(page.unsync);
            let orphan = page.state == PageState::Active && self.is_orphan(id);
            ensure!(
                orphan == page.is_on_orphan_list(),
                "{id:?}: an orphan not listed, or listed"
            );
            orphans += usize::from(orphan);
            ensure!(frames.insert(page.frame), "{id:?} shares its frame");
        }
        for frame in &self.state.caches.frames {
            ensure!(frames.insert(*frame), "a cached frame is in use");
        }
        ensure!(
            active == listed.len(),
            "{active} active pages, {} listed",
            listed.len()
        );
        ensure!(
            existing == self.state.used,
            "{existing} pages, {} counted",
            self.state.used
        );
        ensure!(
            unsync == pages.unsync().count(),
            "the count of unsync pages drifted"
        );
        ensure!(
            orphans == pages.orphans().len(),
            "the list of orphans drifted"
        );
        ensure!(self.state.reserved == 0, "a reservation was not given back");
        ensure!(!self.state.flush_pending, "a flush was forgotten");
        Ok(listed)
    }

    fn audit_roots(&self) -> Result<(), String> {
        let mut counts = BTreeMap::<u32, u32>::new();
        for roots in self.state.vcpus.iter().flatten() {
            for root in roots.iter() {
                for id in root.pages.iter().flatten() {
                    *counts.entry(id.number()).or_default() += 1;
                }
            }
        }
        ensure!(
            self.state.pinned == counts.len(),
            "{} pinned pages, {} counted",
            counts.len(),
            self.state.pinned
        );
        for id in self.state.pages.ids() {
            let (have, want) = (
                self.state.pages[id].root_count,
                counts.get(&id.number()).copied().unwrap_or_default(),
            );
            ensure!(have == want, "{id:?}: root count {have}, roots {want}");
        }
        Ok(())
    }

    fn audit_slots(
        &self,
        mut leaves: BTreeMap<(u64, Level), BTreeSet<(u32, usize)>>,
    ) -> Result<(), String> {
        let mut shadowed = Vec::new();
        let mut at = self.state.pages.active_list().first();
        while let Some(id) = at {
            let page = &self.state.pages[id];
            if !page.role.is_direct() {
                shadowed.push(page.gfn);
            }
            at = self.state.pages.next(id);
        }
        for slot in self.state.slots.iter() {
            for level in MAPPING_LEVELS {
                for (gfn, head) in slot.rmaps(level) {
                    if head.is_empty() {
                        continue;
                    }
                    let have = self.references(head);
                    let want = leaves.remove(&(gfn.as_u64(), level)).unwrap_or_default();
                    ensure!(
                        have == want,
                        "rmap of {gfn} at {level:?}: {have:?}, leaves {want:?}"
                    );
                }
                if level == Level::One {
                    continue;
                }
                let mut tables = BTreeMap::<u64, u32>::new();
                for gfn in &shadowed {
                    if slot.contains(*gfn) {
                        *tables.entry(level.align(*gfn).as_u64()).or_default() += 1;
                    }
                }
                for (gfn, _) in slot.rmaps(level) {
                    let inside = tables.get(&gfn.as_u64()).copied().unwrap_or_default();
                    let (have, want) = (
                        slot.disallow_count(level, gfn),
                        inside + slot.border_share(level, gfn),
                    );
                    ensure!(
                        have == want,
                        "large pages at {gfn}, {level:?}: {have}, tables {want}"
                    );
                }
            }
        }
        ensure!(leaves.is_empty(), "leaves without reverse map: {leaves:?}");
        Ok(())
    }
}
