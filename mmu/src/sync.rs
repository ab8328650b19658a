//! Unsync tables: a guest table that the guest may write although it is shadowed.
//!
//! The first write to a shadowed table makes all shadow pages of its frame *unsync* and lets the
//! write through. From then on their entries are what a TLB's and paging-structure caches' are:
//! possibly stale until the guest flushes (SDM vol. 3A 4.10). A table at any level may become
//! unsync, so a write to a table always makes progress without an instruction emulator, also where
//! the table maps itself.
//!
//! Syncing write-protects the table again, flushes, and then drops every entry that no longer says
//! what the guest's does. It happens to all unsync pages when the guest loads a paging register or
//! flushes its TLB; to all unsync upper tables and the one leaf entry at INVLPG, which also
//! invalidates all paging-structure caches (SDM vol. 3A 4.10.4.1); and to a page that is about to be
//! linked in a new place, because for a new translation no guest has to flush.

use crate::host::Host;
use crate::level::{ENTRIES, Level};
use crate::page::{ActivePage, PageId};
use crate::registers::{Format, Rights};
use crate::role::{Role, bits};
use crate::spte::Spte;
use crate::state::{Core, Target};
use crate::zap::Batch;
use umbra_vcpu::address::Gfn;

/// What the guest's entry behind a shadow entry asks for.
pub(crate) enum Wanted {
    Nothing,
    Leaf { gfn: Gfn, rights: Rights },
    Page { gfn: Gfn, role: Role },
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

    /// Drops entry `index` unless it is what the guest's table asks for.
    pub fn sync_entry(&mut self, id: PageId, index: usize, spte: Spte) {
        if spte.is_empty() {
            return;
        }
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
        if !keeps {
            self.drop_entry(id, index);
        }
    }

    /// Brings one unsync page up to date and write-protects its table.
    pub fn sync_page(&mut self, page: ActivePage) {
        let id = page.id();
        if !self.state.pages[id].unsync {
            return;
        }
        self.state.pages.set_sync(id);
        let gfn = self.state.pages[id].gfn;
        self.write_protect(gfn);
        self.flush();
        self.compare(id);
    }

    fn compare(&mut self, id: PageId) {
        for index in 0..ENTRIES {
            let spte = self.load(id, index);
            self.sync_entry(id, index, spte);
        }
    }

    /// Brings all unsync upper tables up to date, with one flush before the comparison.
    pub fn sync_tables(&mut self) {
        let mut at = self.state.pages.unsync_tables().first();
        if at.is_none() {
            return;
        }
        while let Some(id) = at {
            let gfn = self.state.pages[id].gfn;
            self.write_protect(gfn);
            at = self.state.pages.next_unsync(id);
        }
        self.flush();
        while let Some(id) = self.state.pages.unsync_tables().first() {
            self.state.pages.set_sync(id);
            self.compare(id);
        }
    }

    /// Brings everything up to date.
    pub fn sync_all(&mut self) {
        let mut at = self.state.pages.unsync_leaves().first();
        while let Some(id) = at {
            let gfn = self.state.pages[id].gfn;
            self.write_protect(gfn);
            at = self.state.pages.next_unsync(id);
        }
        let mut at = self.state.pages.unsync_tables().first();
        while let Some(id) = at {
            let gfn = self.state.pages[id].gfn;
            self.write_protect(gfn);
            at = self.state.pages.next_unsync(id);
        }
        self.flush();
        while let Some(id) = self.state.pages.unsync_leaves().first() {
            self.state.pages.set_sync(id);
            self.compare(id);
        }
        self.sync_tables();
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
                self.sync_entry(id, index, spte);
            }
        }
        self.flush();
    }
}
