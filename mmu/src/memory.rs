//! The guest's memory from the outside: slots that come and go, writes by the host, logs of use.

#![allow(
    clippy::redundant_closure_for_method_calls,
    reason = "the methods' own lifetimes are not general enough"
)]

use crate::host::{Host, SlotId};
use crate::mmu::Mmu;
use crate::slot::{MemorySlot, Slot, SlotError, SlotFlags};
use crate::state::Core;
use crate::zap::Batch;
use umbra_vcpu::address::{Gfn, Gpa};

/// Whether memory was used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Accessed {
    /// It was, or may have been.
    Yes,
    /// No processor has translated an address to it.
    No,
}

impl<H: Host> Mmu<H> {
    /// The host has written guest memory at `gpa`: shadow entries that depend on it are dropped.
    pub fn track_guest_write(&self, gpa: Gpa, bytes: usize) {
        self.locked(|core| {
            let (mut at, mut left) = (gpa, bytes);
            while left > 0 {
                let offset = at.page_offset() as usize;
                let here = left.min(4096 - offset);
                core.track_write(Gfn::containing(at), offset, here);
                at = at.wrapping_add(here as u64);
                left -= here;
            }
        });
    }

    /// Adds memory to the guest.
    ///
    /// # Errors
    /// See [`SlotError`]; nothing is changed then.
    pub fn add_slot(&self, memory: MemorySlot) -> Result<(), SlotError> {
        let mut slot = Some(Slot::new(memory)?);
        self.locked(|core| {
            core.state.slots.insert(&mut slot)?;
            core.forget_range(memory.base, memory.pages);
            Ok(())
        })
    }

    /// Takes memory away from the guest.
    ///
    /// # Errors
    /// [`SlotError::Unknown`].
    pub fn remove_slot(&self, id: SlotId) -> Result<(), SlotError> {
        self.locked(|core| {
            core.state
                .slots
                .named(id)
                .map(|slot| slot.retiring = true)
                .ok_or(SlotError::Unknown)
        })?;
        self.zap_all();
        let slot = self.locked(|core| {
            core.state.mmio_generation = core.state.mmio_generation.wrapping_add(1);
            core.state.slots.remove(id)
        });
        drop(slot);
        Ok(())
    }

    /// Moves a slot's memory to another place in the guest's physical address space.
    ///
    /// # Errors
    /// See [`SlotError`]; where the new place is not free the slot stays where it is.
    pub fn move_slot(&self, id: SlotId, base: Gfn) -> Result<(), SlotError> {
        let old = self.locked(|core| {
            core.state
                .slots
                .named(id)
                .map(|slot| slot.memory)
                .ok_or(SlotError::Unknown)
        })?;
        self.remove_slot(id)?;
        self.add_slot(MemorySlot { base, ..old }).inspect_err(|_| {
            let restored = self.add_slot(old);
            debug_assert!(restored.is_ok(), "the slot's old place was taken");
        })
    }

    /// The pages of a slot that were written since the last call, which starts over.
    ///
    /// # Errors
    /// [`SlotError::Unknown`].
    pub fn take_dirty(&self, id: SlotId, mut page: impl FnMut(Gfn)) -> Result<(), SlotError> {
        self.locked(|core| {
            let mut cursor = 0;
            let mut any = false;
            loop {
                let slot = core.state.slots.named(id).ok_or(SlotError::Unknown)?;
                let Some(gfn) = slot.take_dirty(&mut cursor) else {
                    break;
                };
                core.write_protect(gfn);
                page(gfn);
                any = true;
            }
            core.state.flush_pending |= any;
            Ok(())
        })
    }

    /// Changes how a slot is used: read-only or not, writes logged or not.
    ///
    /// # Errors
    /// [`SlotError::Unknown`].
    pub fn set_slot_flags(&self, id: SlotId, flags: SlotFlags) -> Result<(), SlotError> {
        self.locked(|core| {
            let slot = core.state.slots.named(id).ok_or(SlotError::Unknown)?;
            slot.set_flags(flags);
            let memory = slot.memory;
            for page in 0..memory.pages {
                core.write_protect(memory.base.offset(page));
            }
            Ok(())
        })
    }

    /// Whether the guest has used any of the `pages` pages from `first` on since this was last asked.
    /// Mappings made ahead of use count as used once.
    pub fn take_accessed(&self, first: Gfn, pages: u64) -> Accessed {
        let any = self.locked(|core| {
            let mut any = false;
            for page in 0..pages {
                any |= core.test_and_clear_leaves(first.offset(page));
            }
            // Only after a flush does the hardware set the bits again.
            core.state.flush_pending |= any;
            any
        });
        if any { Accessed::Yes } else { Accessed::No }
    }
}

impl<H: Host> Core<'_, H> {
    /// New memory: what was known of these frames, that they have none, holds no longer.
    fn forget_range(&mut self, base: Gfn, pages: u64) {
        self.state.mmio_generation = self.state.mmio_generation.wrapping_add(1);
        let inside = |gfn: Gfn| gfn.as_u64().wrapping_sub(base.as_u64()) < pages;
        let mut batch = Batch::new();
        self.state.pages.hand = self.state.pages.active_list().first();
        while let Some(id) = self.state.pages.hand {
            let shadow = &self.state.pages[id];
            let Some(page) = self
                .state
                .pages
                .active(id)
                .filter(|_| inside(shadow.gfn) && !shadow.role.is_direct())
            else {
                self.state.pages.hand = self.state.pages.next(id);
                continue;
            };
            // It was never counted among the tables of a slot: count it, so that zapping balances.
            let gfn = shadow.gfn;
            if let Some(slot) = self.state.slots.of(gfn) {
                slot.disallow_large(gfn);
            }
            self.prepare_zap(page, &mut batch);
        }
        self.commit(batch);
    }
}
