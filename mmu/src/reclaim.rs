//! Giving shadow pages back: to this VM when it is at its limit, to the host when memory runs low.
//!
//! Both prepare victims into one batch, oldest first, and commit once. Pages that are roots in use
//! are passed over and never end the search. The hand is a position in the active list that the
//! list itself keeps valid, so zapping a page together with its orphans never forces a restart.

use crate::config::{MINIMUM_FREE_PAGES, MINIMUM_PAGES, REFILL_PAGES, VictimPolicy};
use crate::error::NoPageAvailable;
use crate::host::Host;
use crate::level::Level;
use crate::page::{ActivePage, PageId};
use crate::rmap::{RmapHead, RmapNodes};
use crate::slot::MAPPING_LEVELS;
use crate::spte::Spte;
use crate::state::Core;
use crate::zap::Batch;
use umbra_vcpu::address::Gfn;

/// Which pages a pass over the list takes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pass {
    /// Level 1, or without entries.
    OldestLeaves,
    /// The same, and not used since the hand came by last.
    ColdLeaves,
    /// Whatever is not a root in use.
    Any,
}

impl<H: Host> Core<'_, H> {
    /// Pages that the VM's own limit leaves.
    fn own_available(&self) -> usize {
        self.state
            .limit
            .saturating_sub(self.state.used + self.state.reserved)
    }

    /// Pages that may still be made.
    pub fn available(&self) -> usize {
        self.own_available().min(self.budget.available())
    }

    /// Pages too many for `more` to fit, where the limit may have been lowered below what is held.
    fn excess_with(&self, more: usize) -> usize {
        let own = (self.state.used + self.state.reserved + more).saturating_sub(self.state.limit);
        let total = (self.budget.used() + more).saturating_sub(self.budget.limit());
        own.max(total)
    }

    /// Reserves `needed` pages, zapping others if it must.
    pub fn make_pages_available(&mut self, needed: usize) -> Result<(), NoPageAvailable> {
        let (trigger, refill) = if self.state.limit >= MINIMUM_PAGES {
            (MINIMUM_FREE_PAGES.max(needed), REFILL_PAGES.max(needed))
        } else {
            (needed, needed)
        };
        if self.available() < trigger {
            self.recycle(self.excess_with(refill));
        }
        if self.own_available() >= needed && self.budget.reserve(needed) {
            self.state.reserved += needed;
            Ok(())
        } else {
            Err(self.no_page_available(needed + self.state.reserved))
        }
    }

    /// Zaps pages to make room under a limit. Returns how many were freed.
    pub fn recycle(&mut self, wanted: usize) -> usize {
        let freed = self.reclaim(wanted);
        self.state.counters.mmu_recycled += freed as u64;
        freed
    }

    /// Gives back reservations that were not used.
    pub fn release_reservation(&mut self) {
        let left = core::mem::take(&mut self.state.reserved);
        if left > 0 {
            self.budget.release(left);
        }
    }

    /// Zaps up to `wanted` pages (an upper table takes along what only it points to) and frees
    /// them. Returns how many were freed.
    pub fn reclaim(&mut self, wanted: usize) -> usize {
        let mut batch = Batch::new();
        match self.config.victims {
            VictimPolicy::Fifo => {
                self.take_victims(Pass::OldestLeaves, wanted, &mut batch);
                if batch.len() < wanted {
                    self.release_previous_roots(&mut batch);
                }
                self.take_victims(Pass::OldestLeaves, wanted, &mut batch);
            }
            VictimPolicy::Clock => {
                self.take_orphans(wanted, &mut batch);
                if batch.len() < wanted && self.release_previous_roots(&mut batch) {
                    self.take_orphans(wanted, &mut batch);
                }
                // The first round clears accessed bits, the second finds them clear.
                for _ in 0..2 {
                    self.take_victims(Pass::ColdLeaves, wanted, &mut batch);
                }
            }
        }
        // Upper tables go last, and take along what only they point to.
        self.take_victims(Pass::Any, wanted, &mut batch);
        let freed = batch.len();
        self.commit(batch);
        freed
    }

    /// Takes pages that nothing points to, the one that was lost first before the others.
    fn take_orphans(&mut self, wanted: usize, batch: &mut Batch) {
        while batch.len() < wanted
            && let Some(id) = self.state.pages.orphans().first()
            && let Some(page) = self.state.pages.active(id)
        {
            self.prepare_zap(page, batch);
        }
    }

    /// One pass over the list, from its oldest page, until the batch has `wanted` pages.
    fn take_victims(&mut self, pass: Pass, wanted: usize, batch: &mut Batch) {
        let mut left = self.state.pages.active_list().len();
        self.state.pages.hand = self.state.pages.active_list().first();
        while batch.len() < wanted && left > 0 {
            let Some(id) = self.state.pages.hand else {
                break;
            };
            left -= 1;
            let Some(page) = self.state.pages.active(id) else {
                break;
            };
            if self.state.pages[id].root_count > 0 || !self.is_victim(page, pass) {
                if self.state.pages.hand == Some(id) {
                    self.state.pages.hand = self.state.pages.next(id);
                }
                continue;
            }
            // Retiring the page moves the hand on.
            self.prepare_zap(page, batch);
        }
        self.state.pages.hand = None;
    }

    fn is_victim(&mut self, page: ActivePage, pass: Pass) -> bool {
        let id = page.id();
        match pass {
            Pass::Any => true,
            Pass::OldestLeaves => self.is_childless(id),
            Pass::ColdLeaves => {
                if !self.is_childless(id) {
                    return false;
                }
                if !self.test_and_clear_accessed(id) {
                    return true;
                }
                // A second chance: among the newest, to be met again at the end of the list.
                self.state.pages.hand = self.state.pages.next(id);
                self.state.pages.move_to_last(page);
                false
            }
        }
    }

    fn is_childless(&self, id: PageId) -> bool {
        let page = &self.state.pages[id];
        page.role.level == Level::One || page.used_entries == 0
    }

    /// Whether the hardware has gone through a link to this page since this was last asked.
    fn test_and_clear_accessed(&mut self, id: PageId) -> bool {
        self.clear_accessed(self.state.pages[id].parents)
    }

    /// Whether the hardware has used a mapping of `gfn` since this was last asked.
    pub fn test_and_clear_leaves(&mut self, gfn: Gfn) -> bool {
        let mut accessed = false;
        for level in MAPPING_LEVELS {
            let Some(slot) = self.state.slots.of(gfn) else {
                break;
            };
            let head = *slot.rmap(level, gfn);
            accessed |= self.clear_accessed(head);
        }
        accessed
    }

    fn clear_accessed(&mut self, head: RmapHead) -> bool {
        let mut accessed = false;
        let mut cursor = RmapNodes::start(head);
        while let Some(spte) = self.state.nodes.step(&mut cursor) {
            let frame = self.state.pages[spte.page].frame;
            let mut old = self.load(spte.page, spte.index);
            while old.is_accessed() {
                let new = old.not_accessed();
                match self.host.compare_exchange(frame, spte.index, old.0, new.0) {
                    Ok(_) => {
                        accessed = true;
                        break;
                    }
                    Err(found) => old = Spte(found),
                }
            }
        }
        accessed
    }
}

impl<H: Host> Core<'_, H> {
    /// Reclaims for the host: the frames go back to it, not into the caches.
    pub fn shrink(&mut self, wanted: usize) -> usize {
        if wanted == 0 {
            return 0;
        }
        let freed = self.reclaim(wanted);
        self.release_caches();
        self.state.counters.shrink_freed += freed as u64;
        freed
    }
}
