//! The walk of the guest's own tables, exactly as the processor would do it.
//!
//! Entries are read top-down; a not-present entry or a reserved bit ends the walk at once,
//! permissions are judged at the end over the whole path, and only an access that is allowed sets
//! accessed and dirty bits, by compare-exchange.

use crate::host::Host;
use crate::level::Level;
use crate::registers::{AccessKind, Attempt, Format, GuestPaging, Marking, PageFault, Rights};
use crate::role::{EntryFormat, bits};
use crate::slot::SlotFlags;
use crate::state::Core;
use umbra_vcpu::address::{Gfn, Gva, Pfn};
use x86_64::structures::idt::PageFaultErrorCode;

/// One guest entry on the path.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct WalkEntry {
    /// The table that holds it.
    pub table: Gfn,
    /// Its place in the table, in bytes.
    pub offset: usize,
    pub value: u64,
}

/// A translation that the guest allows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Walk {
    /// The 4 KiB frame that the address lies in.
    pub gfn: Gfn,
    /// The level of the guest's leaf; one more than the root's where the guest doesn't page.
    pub leaf: Level,
    /// What the whole path permits, without writing where the leaf isn't dirty yet.
    pub rights: Rights,
    /// The path, by level.
    pub entries: [WalkEntry; 5],
}

/// Why a walk has no result.
pub(crate) enum WalkEnd {
    Fault(PageFault),
    /// Another processor changed an entry meanwhile.
    Changed,
}

impl<H: Host> Core<'_, H> {
    /// Reads a guest entry. Where there is no memory the bus reads all ones.
    #[inline]
    pub fn read_guest(&self, format: Format, table: Gfn, offset: usize) -> u64 {
        let Some(slot) = self.state.slots.usable(table) else {
            return if format == Format::Legacy {
                u64::from(u32::MAX)
            } else {
                u64::MAX
            };
        };
        match self.frame_in(slot, table) {
            Some(frame) => self.load_guest(format, frame, offset),
            None => 0,
        }
    }

    /// Loads a guest entry from its memory.
    #[inline]
    pub fn load_guest(&self, format: Format, frame: Pfn, offset: usize) -> u64 {
        match format {
            Format::Legacy => u64::from(self.host.load_u32(frame, offset)),
            _ => self.host.load_u64(frame, offset),
        }
    }

    /// Changes a guest entry unless it is `value` no longer.
    #[inline]
    pub fn exchange_guest(
        &self,
        format: Format,
        frame: Pfn,
        offset: usize,
        value: u64,
        new: u64,
    ) -> Result<(), WalkEnd> {
        let done = match format {
            Format::Legacy => self
                .host
                .compare_exchange_u32(frame, offset, value as u32, new as u32)
                .is_ok(),
            _ => self
                .host
                .compare_exchange_u64(frame, offset, value, new)
                .is_ok(),
        };
        if done { Ok(()) } else { Err(WalkEnd::Changed) }
    }

    fn mark(&mut self, format: Format, entry: &mut WalkEntry, set: u64) -> Result<(), WalkEnd> {
        let new = entry.value | set;
        let Some(slot) = self.state.slots.of(entry.table) else {
            return Ok(());
        };
        if slot.retiring || slot.memory.flags.contains(SlotFlags::READ_ONLY) {
            return Ok(());
        }
        slot.mark_dirty(entry.table);
        let Some(frame) = self.resolve(entry.table) else {
            return Ok(());
        };
        self.exchange_guest(format, frame, entry.offset, entry.value, new)?;
        entry.value = new;
        Ok(())
    }

    /// Translates `gva` for `attempt`.
    pub fn walk(
        &mut self,
        paging: &GuestPaging,
        gva: Gva,
        attempt: Attempt,
        marking: Marking,
    ) -> Result<Walk, WalkEnd> {
        let features = self.config.features;
        let format = EntryFormat::of(paging);
        let mut walk = Walk {
            gfn: Gfn::new(gva.as_u64() >> 12),
            leaf: Level::Three,
            rights: Rights::all(),
            entries: [WalkEntry::default(); 5],
        };
        let fault = |cause| {
            Err(WalkEnd::Fault(PageFault {
                gva,
                error: paging.error(attempt, cause),
            }))
        };
        let mut table = match paging.format {
            Format::Unpaged => {
                walk.gfn = Gfn::new(walk.gfn.as_u64() & 0xf_ffff);
                return Ok(walk);
            }
            Format::Pae => {
                let pointer = paging.pdptrs.0[(gva.as_u64() >> 30 & 3) as usize];
                if pointer & bits::PRESENT == 0 {
                    return fault(PageFaultErrorCode::empty());
                }
                format.table(pointer)
            }
            Format::Legacy | Format::Long4 | Format::Long5 => paging.table,
        };
        let mut level = paging.format.root_level();
        let suspicious = format.suspicious(features);
        // What all entries allow; the bit that forbids fetches counts the other way round.
        let mut allowed = u64::MAX;
        let value = loop {
            let offset = format.offset(level, gva);
            let value = self.read_guest(paging.format, table, offset);
            walk.entries[level.slot()] = WalkEntry {
                table,
                offset,
                value,
            };
            if value & bits::PRESENT == 0 {
                return fault(PageFaultErrorCode::empty());
            }
            if value & suspicious != 0 && format.is_malformed(level, value, features) {
                return fault(
                    PageFaultErrorCode::PROTECTION_VIOLATION | PageFaultErrorCode::MALFORMED_TABLE,
                );
            }
            allowed &= value ^ bits::NO_EXECUTE;
            match level.below() {
                Some(below) if !format.is_leaf(level, value, features) => {
                    table = format.table(value);
                    level = below;
                }
                _ => break value,
            }
        };
        walk.rights = format.rights(allowed ^ bits::NO_EXECUTE);
        walk.leaf = level;
        let within = (gva.as_u64() >> 12) & (format.pages(level) - 1);
        walk.gfn = format.page(level, value).offset(within);
        if let Some(cause) = paging.forbids(attempt, walk.rights, format.key(value)) {
            return fault(cause);
        }
        let writes = attempt.kind == AccessKind::Write;
        let unmarked = allowed & bits::ACCESSED == 0 || (writes && value & bits::DIRTY == 0);
        if unmarked && marking == Marking::SetAccessedDirty {
            for above in (level.slot()..=paging.format.root_level().slot()).rev() {
                let mut set = bits::ACCESSED;
                if above == level.slot() && writes {
                    set |= bits::DIRTY;
                }
                let entry = &mut walk.entries[above];
                if entry.value & set != set {
                    self.mark(paging.format, entry, set)?;
                }
            }
        }
        // A table in read-only memory cannot be marked; the write is allowed all the same.
        let value = walk.entries[level.slot()].value | if writes { bits::DIRTY } else { 0 };
        walk.rights = format.leaf_rights(walk.rights, value);
        if writes && !walk.rights.contains(Rights::WRITE) {
            // CR0.WP is clear and a supervisor writes: the hardware, whose WP is always set, gets a
            // writable supervisor page. Users fault on it and turn it back; with SMEP the
            // supervisor must not execute what used to be a user page.
            walk.rights |= Rights::WRITE;
            if walk.rights.contains(Rights::USER) && paging.smep {
                walk.rights -= Rights::EXECUTE;
            }
            walk.rights -= Rights::USER;
        }
        Ok(walk)
    }
}
