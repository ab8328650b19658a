//! The faults that need no walk of the guest's tables: only the last entry is missing, or it is known
//! that there is no memory behind it.
//!
//! Links between synced pages say what the guest's upper tables say right now, and a page's role
//! holds the rights that they leave. So where the whole path is there and synced, one guest entry
//! decides. Whatever is not the plain success (a right that is missing, a reserved bit, a logged page,
//! no memory yet) is left to the whole walk, which also finds the exact error code.

use crate::fault::{FAULT_PAGES, FaultOutcome, MmioTarget};
use crate::host::Host;
use crate::level::{ENTRIES, Level};
use crate::page::{ActivePage, PageId, ShadowPage};
use crate::registers::{AccessKind, Attempt, Fault, GuestPaging, Rights};
use crate::role::{EntryFormat, LeafTranslation, bits};
use crate::spte::Spte;
use crate::state::{Core, Leaf, Target};
use umbra_vcpu::address::{Gfn, Gpa, Gva, Pfn};

/// Where the hardware's walk ends.
struct End {
    page: PageId,
    index: usize,
    spte: Spte,
    /// Whether that is the level of 4 KiB pages.
    last: bool,
    /// Whether all links on the way are what the guest's tables ask for now.
    synced: bool,
}

/// What the guest's last entry says.
struct Found {
    gfn: Gfn,
    rights: Rights,
    /// The two as the page keeps them.
    translation: LeafTranslation,
    /// The accessed and dirty bits that the access sets.
    mark: Option<Mark>,
}

/// A change of a guest entry.
struct Mark {
    memory: Pfn,
    offset: usize,
    old: u64,
    new: u64,
}

impl<H: Host> Core<'_, H> {
    /// Answers a fault from the shadow tables and at most one guest entry. `None` if it takes more.
    #[inline]
    pub fn handle_fault_fast(
        &mut self,
        paging: &GuestPaging,
        root: PageId,
        fault: &Fault,
    ) -> Option<FaultOutcome> {
        let attempt = Attempt::of_fault(fault);
        let gva = paging.linear(fault.gva);
        let end = self.hardware_walk(root, gva);
        if end.spte.is_empty() {
            if !end.last || !end.synced {
                return None;
            }
            self.fill_last(paging, &end, gva, attempt)?;
            Some(FaultOutcome::Fixed)
        } else if end.spte.is_present() {
            None
        } else {
            self.known_mmio(paging, &end, gva, attempt)
        }
    }

    /// Follows the links from `root` on, as the hardware did.
    #[inline]
    fn hardware_walk(&mut self, root: PageId, gva: Gva) -> End {
        let (mut page, mut synced) = (root, true);
        let mut below = self.state.pages[page].role.level.number() - 1;
        let last_index = gva.as_u64() >> 12;
        loop {
            let shadow = &mut self.state.pages[page];
            shadow.write_flooding = 0;
            let index = (last_index >> (9 * below)) as usize % ENTRIES;
            let spte = Spte(self.host.load(shadow.frame, index));
            if below > 0
                && spte.is_present()
                && !spte.is_large()
                && let Some(translations) = &shadow.translations
            {
                synced &= !shadow.unsync;
                page = PageId::from_number(translations[index] as u32);
                below -= 1;
                continue;
            }
            return End {
                page,
                index,
                spte,
                last: below == 0,
                synced,
            };
        }
    }

    /// Fills the empty last entry of a path that is synced.
    #[inline]
    fn fill_last(
        &mut self,
        paging: &GuestPaging,
        end: &End,
        gva: Gva,
        attempt: Attempt,
    ) -> Option<()> {
        let page = self.state.pages.active(end.page)?;
        let shadow = &self.state.pages[end.page];
        let direct = shadow.role.is_direct();
        let found = if direct {
            self.direct_translation(paging, shadow, end.index, attempt)?
        } else {
            self.last_translation(paging, shadow, gva, attempt)?
        };
        let leaf = self.leaf_to(found.gfn, found.rights, found.translation, attempt.kind)?;
        if let Some(mark) = found.mark {
            self.exchange_guest(paging.format, mark.memory, mark.offset, mark.old, mark.new)
                .ok()?;
        }
        self.map_empty(page, end.index, Level::One, &leaf);
        if self.config.prefetch > 1 && !direct {
            self.prefetch(page, end.index);
        }
        Some(())
    }

    /// Reads the guest's entry behind a level-1 page.
    #[inline]
    fn last_translation(
        &self,
        paging: &GuestPaging,
        shadow: &ShadowPage,
        gva: Gva,
        attempt: Attempt,
    ) -> Option<Found> {
        let format = EntryFormat::of(paging);
        let offset = format.offset(Level::One, gva);
        let slot = self.state.slots.usable(shadow.gfn)?;
        let memory = self.frame_in(slot, shadow.gfn)?;
        let old = self.load_guest(paging.format, memory, offset);
        if old & bits::PRESENT == 0 || old & format.suspicious(self.config.features) != 0 {
            return None;
        }
        let rights = shadow.role.rights & format.rights(old);
        if paging.forbids(attempt, rights, format.key(old)).is_some() {
            return None;
        }
        let marks = match attempt.kind {
            AccessKind::Write => bits::ACCESSED | bits::DIRTY,
            AccessKind::Read | AccessKind::Execute => bits::ACCESSED,
        };
        let new = old | marks;
        // A logged or read-only table takes the long way.
        if new != old && !slot.memory.flags.is_empty() {
            return None;
        }
        Some(Found {
            gfn: format.table(old),
            rights: format.leaf_rights(rights, new),
            translation: LeafTranslation(new),
            mark: (new != old).then_some(Mark {
                memory,
                offset,
                old,
                new,
            }),
        })
    }

    /// The same in a page that maps a piece of a large guest page or of unpaged memory.
    fn direct_translation(
        &self,
        paging: &GuestPaging,
        shadow: &ShadowPage,
        index: usize,
        attempt: Attempt,
    ) -> Option<Found> {
        let (gfn, rights) = (shadow.gfn.offset(index as u64), shadow.role.rights);
        // The page's rights may be narrower than the guest's own: by a key, or because a supervisor
        // wrote with CR0.WP clear.
        let exact =
            !paging.protection_keys && (paging.write_protect || rights.contains(Rights::USER));
        let slot = self.state.slots.usable(gfn)?;
        // Where a large mapping has become possible, the whole walk makes it.
        let smallest = self.config.largest_mapping == Level::One || slot.has_tables_near(gfn);
        let plain = exact && smallest && paging.forbids(attempt, rights, 0).is_none();
        plain.then_some(Found {
            gfn,
            rights,
            translation: LeafTranslation::of(gfn, rights),
            mark: None,
        })
    }

    /// Fills empty neighbours of a level-1 entry whose guest entries are accessed already, as a
    /// processor may at any time.
    pub fn prefetch(&mut self, page: ActivePage, index: usize) {
        let shadow = &self.state.pages[page.id()];
        let (role, frame, table) = (shadow.role, shadow.frame, shadow.gfn);
        if role.is_direct() || role.level != Level::One {
            return;
        }
        let slot = self.state.slots.usable(table);
        let Some(memory) = slot.and_then(|slot| self.frame_in(slot, table)) else {
            return;
        };
        let format = role.entries();
        let looked_at = bits::PRESENT | bits::ACCESSED | format.suspicious(self.config.features);
        let first = index & !(self.config.prefetch - 1);
        for neighbour in first..(first + self.config.prefetch).min(ENTRIES) {
            if neighbour == index || !Spte(self.host.load(frame, neighbour)).is_empty() {
                continue;
            }
            let offset = role.guest_entry_offset(neighbour);
            let value = self.load_guest(role.format, memory, offset);
            let rights = role.rights & format.rights(value);
            if value & looked_at != bits::PRESENT | bits::ACCESSED
                || format.is_fetch_only(rights, value)
            {
                continue;
            }
            let rights = format.leaf_rights(rights, value);
            let (gfn, entry) = (format.table(value), LeafTranslation(value));
            let Some(leaf) = self.leaf_to(gfn, rights, entry, AccessKind::Read) else {
                continue;
            };
            if self.state.nodes.available() < FAULT_PAGES * 2 {
                return;
            }
            self.map_empty(page, neighbour, Level::One, &leaf);
            self.state.counters.mmu_prefetched += 1;
        }
    }

    /// A mapping of `gfn`, if it is ordinary memory that lets `kind` through at once.
    #[inline]
    fn leaf_to(
        &self,
        gfn: Gfn,
        rights: Rights,
        translation: LeafTranslation,
        kind: AccessKind,
    ) -> Option<Leaf> {
        let slot = self.state.slots.usable(gfn)?;
        let frame = self.frame_in(slot, gfn)?;
        let mut granted = rights;
        // Read-only and logged memory takes its writes the long way.
        if rights.contains(Rights::WRITE) && (!slot.memory.flags.is_empty() || self.is_tracked(gfn))
        {
            granted -= Rights::WRITE;
        }
        if kind == AccessKind::Write && !granted.contains(Rights::WRITE) {
            return None;
        }
        Some(Leaf {
            gfn,
            frame,
            translation,
            granted,
        })
    }

    /// Answers an access to a page of which an earlier fault found that it has no memory.
    fn known_mmio(
        &mut self,
        paging: &GuestPaging,
        end: &End,
        gva: Gva,
        attempt: Attempt,
    ) -> Option<FaultOutcome> {
        let Target::Leaf { gfn, .. } = self.target(end.page, end.index, end.spte) else {
            return None;
        };
        let (generation, rights) = end.spte.as_mmio()?;
        // Keys and write-enabled pages are left to the whole walk.
        if generation != self.state.mmio_generation
            || paging.protection_keys
            || (attempt.kind == AccessKind::Write && !rights.contains(Rights::WRITE))
            || (!paging.write_protect && !rights.contains(Rights::USER))
            || paging.forbids(attempt, rights, 0).is_some()
        {
            return None;
        }
        self.state.counters.pf_mmio_fast += 1;
        Some(FaultOutcome::Mmio {
            gpa: Gpa::new(gfn.base().as_u64() | gva.page_offset()),
            access: attempt.kind,
            target: MmioTarget::NoSlot,
        })
    }
}
