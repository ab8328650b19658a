//! Unsync tables: a guest table that the guest may write although it is shadowed.
//!
//! The first write to a shadowed table makes all shadow pages of its frame *unsync* and lets the
//! write through. From then on their entries are what a TLB's and paging-structure caches' are:
//! possibly stale until the guest flushes (SDM vol. 3A 4.10). A table at any level may become
//! unsync, so a write to a table always makes progress without an instruction emulator, also where
//! the table maps itself.
//!
//! Syncing write-protects the table again, flushes, and then drops every entry that no longer says
//! what the guest's does. Which pages are synced when:
//!
//! - All that a root leads to, before the hardware uses it for the first time after the guest has
//!   loaded a paging register or flushed its TLB. Pages that only other roots lead to stay as they
//!   are, until one of those is loaded.
//! - The upper tables that the root leads to and the one leaf entry, at INVLPG, which also invalidates
//!   all paging-structure caches (SDM vol. 3A 4.10.4.1).
//! - All that a page leads to when it is about to be linked in a new place, because for a new
//!   translation no guest has to flush.
//!
//! The way down to the unsync pages is marked in the pages above (`ShadowPage::unsync_below`), so a
//! root without any costs nothing, and the marks that are followed are cleared.

use crate::host::Host;
use crate::level::Level;
use crate::page::{GROUP, PageId, group_bit, ones};
use crate::registers::{Format, Rights};
use crate::rmap::{RmapNodes, SpteRef};
use crate::role::{Role, bits};
use crate::spte::Spte;
use crate::state::{Core, Target};
use crate::zap::Batch;
use umbra_vcpu::address::{Gfn, Gva, Pfn};

/// What the guest's entry behind a shadow entry asks for.
pub(crate) enum Wanted {
    Nothing,
    Leaf { gfn: Gfn, rights: Rights },
    Page { gfn: Gfn, role: Role },
}

/// What a sync brings up to date of the pages that it comes to.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reach {
    /// Every page.
    All,
    /// Those above level 1.
    UpperTables,
}

/// Of a group of entries, a bit for each.
struct Seen {
    /// Those that aren't empty.
    used: u64,
    /// Of these, those of which the guest has not changed its own entry.
    same: u64,
}

/// Whether an entry says what the guest's says.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kept {
    Yes,
    /// It didn't, and was dropped.
    No,
}

/// After this many writes without use in between, a table is taken to be one no longer.
const FLOODED: u8 = 3;

impl<H: Host> Core<'_, H> {
    /// What the guest's table says now about entry `index` of an indirect page.
    pub fn wanted(&self, id: PageId, index: usize) -> Wanted {
        let page = &self.state.pages[id];
        let (role, features) = (page.role, self.config.features);
        let format = role.entries();
        let value = self.read_guest(role.format, page.gfn, role.guest_entry_offset(index));
        if value & bits::PRESENT == 0
            || value & bits::ACCESSED == 0
            || format.is_malformed(role.level, value, features)
        {
            return Wanted::Nothing;
        }
        let rights = role.rights & format.rights(value);
        match role.level.below() {
            Some(below) if !format.is_leaf(role.level, value, features) => Wanted::Page {
                gfn: format.table(value),
                role: role.of_table_below(index, below, rights),
            },
            _ if format.is_fetch_only(rights, value) => Wanted::Nothing,
            _ => {
                let half = u64::from(role.format == Format::Legacy && role.level == Level::Two)
                    * (index as u64 & 1)
                    * 512;
                Wanted::Leaf {
                    gfn: format.page(role.level, value).offset(half),
                    rights: format.leaf_rights(rights, value),
                }
            }
        }
    }

    /// Drops entry `index`, which isn't empty, unless it is what the guest's table asks for.
    fn sync_entry(&mut self, id: PageId, index: usize, spte: Spte) -> Kept {
        let keeps = match (self.wanted(id, index), self.target(id, index, spte)) {
            (Wanted::Leaf { gfn, rights }, held @ Target::Leaf { .. }) => {
                held == Target::Leaf { gfn, rights }
            }
            // A large guest page in small pieces.
            (Wanted::Leaf { gfn, rights }, Target::Page(child)) => {
                let role = self.state.pages[id].role;
                let child = &self.state.pages[child];
                role.level.below().is_some_and(|below| {
                    child.gfn == gfn && child.role == role.of_direct_below(below, rights)
                })
            }
            (Wanted::Page { gfn, role }, Target::Page(child)) => {
                let child = &self.state.pages[child];
                child.gfn == gfn && child.role == role
            }
            (Wanted::Nothing, _) | (Wanted::Page { .. }, Target::Leaf { .. }) => false,
        };
        if keeps {
            return Kept::Yes;
        }
        self.drop_entry(id, index);
        Kept::No
    }

    /// Brings the one leaf entry for `gva` below `page` up to date.
    pub fn sync_address(&mut self, mut page: PageId, gva: Gva) {
        loop {
            let level = self.state.pages[page].role.level;
            let index = level.index(gva);
            let spte = self.load(page, index);
            if spte.is_empty() {
                return;
            }
            if !self.is_leaf(page, spte)
                && let Target::Page(child) = self.target(page, index, spte)
            {
                page = child;
                continue;
            }
            if level == Level::One && self.state.pages[page].unsync {
                self.sync_entry(page, index, spte);
            }
            return;
        }
    }

    /// Notes at `link`, and above its page, that it leads to an unsync page.
    pub fn mark_unsync_below(&mut self, link: SpteRef) {
        let page = &mut self.state.pages[link.page];
        let known = page.unsync_below != 0;
        page.unsync_below |= group_bit(link.index);
        if !known {
            self.mark_links_to(link.page);
        }
    }

    fn mark_links_to(&mut self, page: PageId) {
        let mut cursor = RmapNodes::start(self.state.pages[page].parents);
        while let Some(link) = self.state.nodes.step(&mut cursor) {
            self.mark_unsync_below(link);
        }
    }

    /// Brings everything up to date that `pages` lead to, themselves included, with one flush.
    pub fn sync_within(&mut self, pages: impl IntoIterator<Item = PageId>, reach: Reach) {
        let mut found = None;
        for page in pages {
            if self.state.pages.is_unsync_within(page) {
                self.gather(page, reach, &mut found);
            }
        }
        if found.is_none() {
            return;
        }
        // Only now does no processor write the tables any more.
        self.flush();
        while let Some(id) = found {
            found = self.state.pages[id].next_in_batch.take();
            self.compare(id);
        }
    }

    /// Write-protects the unsync tables at and below a page, and adds their pages to `found`.
    fn gather(&mut self, id: PageId, reach: Reach, found: &mut Option<PageId>) {
        let shadow = &mut self.state.pages[id];
        if shadow.unsync && (reach == Reach::All || shadow.role.level != Level::One) {
            shadow.next_in_batch = found.replace(id);
            let gfn = shadow.gfn;
            self.state.pages.set_sync(id);
            self.write_protect(gfn);
        }
        let mut left = 0;
        for group in ones(self.state.pages[id].unsync_below) {
            for index in group * GROUP..(group + 1) * GROUP {
                let spte = self.load(id, index);
                if spte.is_empty() {
                    continue;
                }
                let Target::Page(child) = self.target(id, index, spte) else {
                    continue;
                };
                self.gather(child, reach, found);
                if self.state.pages.is_unsync_within(child) {
                    left |= group_bit(index);
                }
            }
        }
        self.state.pages[id].unsync_below = left;
    }

    /// Drops all entries of a page that aren't what the guest's table asks for.
    fn compare(&mut self, id: PageId) {
        let leaves = self.leaves(id);
        for group in ones(self.state.pages[id].occupied) {
            let first = group * GROUP;
            let seen = self.see(id, first, leaves);
            let mut kept = seen.same != 0;
            for place in ones(seen.used & !seen.same) {
                let spte = self.load(id, first + place);
                kept |= self.sync_entry(id, first + place, spte) == Kept::Yes;
            }
            if !kept {
                self.state.pages[id].occupied &= !group_bit(first);
            }
        }
    }

    /// The guest's table behind a level-1 page, if it is memory and no keys matter: what is unchanged
    /// there needs no other look.
    fn leaves(&self, id: PageId) -> Option<Pfn> {
        let page = &self.state.pages[id];
        let plain = page.role.level == Level::One && page.role.entries().keys.is_none();
        let slot = self.state.slots.usable(page.gfn).filter(|_| plain)?;
        self.frame_in(slot, page.gfn)
    }

    /// Looks at the group of entries that begins with `first`, with the guest's `leaves` beside it.
    #[inline]
    fn see(&self, id: PageId, first: usize, leaves: Option<Pfn>) -> Seen {
        let page = &self.state.pages[id];
        let unchanged = |index: usize| {
            let (Some(leaves), Some(translations)) = (leaves, &page.translations) else {
                return false;
            };
            let (held, offset) = (translations[index], page.role.guest_entry_offset(index));
            held & bits::PRESENT != 0 && self.load_guest(page.role.format, leaves, offset) == held
        };
        let mut seen = Seen { used: 0, same: 0 };
        for place in 0..GROUP {
            if !Spte(self.host.load(page.frame, first + place)).is_empty() {
                seen.used |= 1 << place;
                seen.same |= u64::from(unchanged(first + place)) << place;
            }
        }
        seen
    }

    /// Lets the guest write the tables in `gfn`: their shadow pages become unsync, or go if they
    /// are written again and again without being used.
    pub fn allow_table_writes(&mut self, gfn: Gfn) {
        self.state.counters.mmu_pte_write += 1;
        let mut batch = Batch::new();
        let mut at = self.state.pages.first_of(gfn);
        while let Some(id) = at {
            at = self.state.pages.next_same_gfn(id);
            let shadow = &mut self.state.pages[id];
            if shadow.role.is_direct() || shadow.unsync {
                continue;
            }
            shadow.write_flooding = shadow.write_flooding.saturating_add(1);
            let flooded = shadow.write_flooding > FLOODED && shadow.root_count == 0;
            let Some(page) = self.state.pages.active(id) else {
                continue;
            };
            if flooded {
                self.state.counters.mmu_flooded += 1;
                self.prepare_zap(page, &mut batch);
                // A page of the same frame may have gone with it, so look from the start.
                at = self.state.pages.first_of(gfn);
            } else {
                self.state.pages.set_unsync(page);
                self.mark_links_to(id);
            }
        }
        self.commit(batch);
    }

    /// The host has written `length` bytes of `gfn` from `offset` on: what depends on them goes.
    pub fn track_write(&mut self, gfn: Gfn, offset: usize, length: usize) {
        if let Some(slot) = self.state.slots.of(gfn) {
            slot.mark_dirty(gfn);
        }
        let mut at = self.state.pages.first_of(gfn);
        if at.is_none() {
            return;
        }
        self.state.counters.mmu_pte_write += 1;
        while let Some(id) = at {
            at = self.state.pages.next_same_gfn(id);
            let role = self.state.pages[id].role;
            if role.is_direct() {
                continue;
            }
            for index in role.entries_of_bytes(offset, offset + length) {
                let spte = self.load(id, index);
                if !spte.is_empty() {
                    self.sync_entry(id, index, spte);
                }
            }
        }
        self.flush();
    }
}
