//! Giving shadow pages back: to this VM when it is at its limit, to the host when memory runs low.
//!
//! Both prepare victims into one batch, the coldest or the oldest first, and commit once. Pages that
//! are roots in use are passed over and never end the search. The hand is a position in the active
//! list that the list itself keeps valid, so zapping a page together with its orphans never forces a
//! restart.

use crate::config::{MINIMUM_FREE_PAGES, MINIMUM_PAGES, REFILL_PAGES, VictimPolicy};
use crate::error::NoPageAvailable;
use crate::host::Host;
use crate::level::Level;
use crate::page::PageId;
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
    /// Whatever is not a root in use.
    Any,
}

/// How often in a row the clock's hand has to find a page unused before it takes one that was used
/// all the time. A page that was used only when it was made goes the first time.
const HOTTEST: u8 = 3;
/// Pages that the hand may look at for each that it takes. Where almost everything is in use it
/// doesn't go round and round, but takes what comes.
const VISITS: usize = 32;

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
        (self.state.used + self.state.reserved + more).saturating_sub(self.state.limit)
    }

    /// Reserves `needed` pages, zapping others if the VM's own limit is in the way. If it is the limit
    /// of all VMs together, all of them have to give, for which the lock must be let go first.
    pub fn make_pages_available(&mut self, needed: usize) -> Result<(), NoPageAvailable> {
        let (trigger, refill) = if self.state.limit >= MINIMUM_PAGES {
            (MINIMUM_FREE_PAGES, REFILL_PAGES)
        } else {
            // What little there is stays in use until the last moment, but goes a few at a time.
            (0, self.state.limit / 8)
        };
        if self.own_available() < trigger.max(needed) {
            self.recycle(self.excess_with(refill.max(needed)));
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
        let mut freed = 0;
        while freed < wanted {
            match self.reclaim((wanted - freed).min(self.config.batch)) {
                0 => break,
                more => freed += more,
            }
        }
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
                self.take_cold_leaves(wanted, &mut batch);
                self.take_victims(Pass::OldestLeaves, wanted, &mut batch);
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

    /// Goes round the list as a clock's hand, which always stands at the list's first page, and takes
    /// leaves that have cooled down. Each time that a page is found used it gets warmer, else cooler.
    fn take_cold_leaves(&mut self, wanted: usize, batch: &mut Batch) {
        let rounds = usize::from(HOTTEST) + 2;
        let missing = wanted.saturating_sub(batch.len());
        let mut left =
            (self.state.pages.active_list().len() * rounds).min(missing.saturating_mul(VISITS));
        self.meet_new_pages(left);
        while batch.len() < wanted
            && left > 0
            && let Some(id) = self.state.pages.active_list().first()
            && let Some(page) = self.state.pages.active(id)
        {
            left -= 1;
            if self.state.pages[id].root_count == 0 && self.is_childless(id) && self.is_cold(id) {
                self.prepare_zap(page, batch);
            } else {
                self.state.pages.move_to_last(page);
            }
        }
    }

    /// Clears the accessed bits of pages that were made since the last time, so that until the next
    /// time each can show whether it is used again. They are the last on the list.
    fn meet_new_pages(&mut self, most: usize) {
        let mut at = self.state.pages.active_list().last();
        for _ in 0..most {
            let Some(id) = at.filter(|id| !self.state.pages[*id].met) else {
                return;
            };
            self.test_and_clear_accessed(id);
            let page = &mut self.state.pages[id];
            page.met = true;
            page.heat = 1;
            at = self.state.pages.previous(id);
        }
    }

    /// Whether the page was unused long enough, counting this visit.
    fn is_cold(&mut self, id: PageId) -> bool {
        let used = self.test_and_clear_accessed(id);
        let page = &mut self.state.pages[id];
        page.met = true;
        let heat = &mut page.heat;
        if used {
            *heat = (*heat + 1).min(HOTTEST);
            return false;
        }
        *heat = heat.saturating_sub(1);
        *heat == 0
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
            if self.state.pages[id].root_count > 0 || !self.is_victim(id, pass) {
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

    fn is_victim(&self, id: PageId, pass: Pass) -> bool {
        match pass {
            Pass::Any => true,
            Pass::OldestLeaves => self.is_childless(id),
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
