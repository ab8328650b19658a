//! Everything else that happens to a VM.

use std::sync::atomic::Ordering;

use umbra_mmu::{AccessKind, MmuPool, Pkru, SlotFlags};
use umbra_vcpu::address::Gfn;

use super::scenario::Op;
use super::vm::{RESTLESS, SlotModel, Vm};
use crate::common::SimHost;

impl Vm {
    /// Does what concerns one VM alone.
    pub(super) fn step(&mut self, pool: &MmuPool<SimHost>, op: Op) {
        match op {
            Op::Access {
                cpu,
                place,
                kind,
                user,
                ac,
            } => {
                let number = usize::from(cpu);
                let kind =
                    [AccessKind::Read, AccessKind::Write, AccessKind::Execute][usize::from(kind)];
                let attempt = self.attempt(number, place, kind, user, ac);
                self.access(pool, number, &attempt);
            }
            Op::Write {
                cpu,
                place,
                user,
                ac,
                width,
                entry,
            } => {
                let number = usize::from(cpu);
                let attempt = self.attempt(number, place, AccessKind::Write, user, ac);
                if let Some(page) = self.access(pool, number, &attempt) {
                    self.write(page, place.offset, width, entry);
                }
            }
            Op::HostWrite {
                table,
                index,
                entry,
            } => {
                let (page, word, value) = self.table_word(table, index, entry);
                self.poke(page, word, value);
            }
            Op::Load { cpu, root } => self.load(usize::from(cpu), root),
            Op::Mode {
                cpu,
                mode,
                flags,
                root,
            } => {
                self.set_mode(usize::from(cpu), mode, flags, root);
            }
            Op::Pkru { cpu, value } => {
                let processor = &mut self.processors[usize::from(cpu)];
                processor.rules.pkru = value;
                self.mmu.set_pkru(&mut processor.cpu.vcpu, Pkru(value));
            }
            Op::Invlpg { cpu, place } => {
                let gva = self.gva(usize::from(cpu), place);
                let processor = &mut self.processors[usize::from(cpu)];
                self.mmu.invalidate_page(&mut processor.cpu.vcpu, gva);
                self.now += 1;
                processor.invalidated.insert(gva.as_u64() >> 12, self.now);
            }
            Op::Flush { cpu } => {
                self.mmu
                    .flush_guest_tlb(&mut self.processors[usize::from(cpu)].cpu.vcpu);
                self.flushed(usize::from(cpu));
            }
            Op::Limit(pages) => self.mmu.set_limit(8 + usize::from(pages) % 80),
            Op::Pressure(_) => {
                self.mmu.release_caches();
            }
            Op::Total(pages) => pool.set_limit(total_limit(pages)),
            Op::ZapAll => self.mmu.zap_all(),
            Op::Unprotect(table) => {
                self.mmu.unprotect(Gfn::new(1 + u64::from(table) % 12));
            }
            Op::Slot(choice) => self.change_slot(choice),
            Op::Dirty => self.take_dirty(),
            Op::Accessed(page) => {
                let _ = self.mmu.take_accessed(Gfn::new(u64::from(page)), 16);
            }
            Op::Flags(flags) => self.change_flags(SlotFlags::from_bits_truncate(flags)),
        }
    }

    /// Every page that was written since the last time is in the log.
    fn take_dirty(&mut self) {
        let Some(slot) = self.slots.get(&RESTLESS).copied() else {
            return;
        };
        let mut pages = Vec::new();
        self.mmu
            .take_dirty(RESTLESS, |gfn| pages.push(gfn.as_u64()))
            .unwrap();
        let inside = |page: &u64| page.wrapping_sub(slot.base) < slot.pages;
        assert!(pages.iter().all(inside), "{pages:?} of {slot:?}");
        for page in std::mem::take(&mut self.written) {
            let gfn = slot.base + page - slot.ram;
            assert!(pages.contains(&gfn), "a write to page {page} is not logged");
        }
    }

    fn change_flags(&mut self, flags: SlotFlags) {
        if let Some(slot) = self.slots.get_mut(&RESTLESS) {
            self.mmu.set_slot_flags(RESTLESS, flags).unwrap();
            slot.flags = flags;
            if !flags.contains(SlotFlags::LOG_DIRTY) {
                self.written.clear();
            }
        }
    }

    fn change_slot(&mut self, choice: u8) {
        let id = RESTLESS;
        self.written.clear();
        match self.slots.get(&id).copied() {
            None => self.add(
                id,
                48 + u64::from(choice % 4) * 8,
                8,
                48,
                SlotFlags::LOG_DIRTY,
            ),
            Some(_) if choice & 1 == 0 => {
                self.mmu.remove_slot(id).unwrap();
                self.slots.remove(&id);
            }
            Some(slot) => {
                let base = 48 + u64::from(choice % 4) * 8;
                let moved = self.mmu.move_slot(id, Gfn::new(base));
                assert_eq!(moved, Ok(()));
                self.slots.insert(id, SlotModel { base, ..slot });
            }
        }
        // Whatever was cached of the old layout is gone for everybody.
        for number in 0..2 {
            self.now += 1;
            self.processors[number].flushed = self.now;
        }
        for number in 0..2 {
            self.flushed(number);
            self.mmu
                .flush_guest_tlb(&mut self.processors[number].cpu.vcpu);
        }
    }

    pub(super) fn compare(&self, pages: u64) {
        for page in 0..pages {
            let model = &self.model[page as usize * 512..][..512];
            if !self.host.is_in_use(page) && model.iter().all(|word| *word == 0) {
                continue;
            }
            for (word, model) in model.iter().copied().enumerate() {
                let real = self.host.word(page, word).load(Ordering::Relaxed);
                assert_eq!(
                    real, model,
                    "page {page}, word {word} ({real:#x}, not {model:#x})"
                );
            }
        }
    }
}

/// The limit of all VMs together that a byte stands for.
pub(super) fn total_limit(pages: u8) -> usize {
    if pages < 128 {
        16 + usize::from(pages)
    } else {
        100_000
    }
}
