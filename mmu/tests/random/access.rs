//! Accesses by a VM's processors, and what they must come to.

use std::sync::atomic::Ordering;

use umbra_mmu::{
    AccessKind, FaultOutcome, Marking, MmioTarget, MmuError, MmuPool, SlotFlags, TranslateError,
};
use x86_64::structures::idt::PageFaultErrorCode as Code;

use super::reference::{Mode, Outcome, Rules};
use super::scenario::{Entry, Place};
use super::vm::{LIMIT, RESTLESS, Vm, index4, index8};
use crate::common::{SimHost, Try};

impl Vm {
    /// An access, until it has gone through or turned into something else. Where it went.
    pub(super) fn access(
        &mut self,
        pool: &MmuPool<SimHost>,
        number: usize,
        attempt: &Try,
    ) -> Option<u64> {
        let clean = self
            .history
            .values()
            .flatten()
            .all(|(until, _)| *until <= self.processors[number].flushed);
        let expected = self.current(number, attempt);
        let marked = self.marked(&expected, attempt);
        self.check_translation(number, attempt, &expected);
        for _ in 0..40 {
            let processor = &mut self.processors[number];
            let entry = match self.mmu.prepare_entry(&mut processor.cpu.vcpu) {
                Ok(entry) => entry,
                Err(error) => {
                    self.raise_limit(pool, error);
                    continue;
                }
            };
            self.host.enter(processor.cpu.number, &entry);
            let cr4 = processor.registers.cr4;
            let error = match self
                .host
                .hardware(processor.cpu.number, &entry, cr4, attempt)
            {
                Ok(frame) => {
                    let page = self.host.ram_page(frame);
                    self.check_page(number, attempt, page, &expected, clean);
                    self.check_marks(&marked, clean);
                    let recent = &mut self.recent[number];
                    recent.push_back(attempt.gva);
                    if recent.len() > 8 {
                        recent.pop_front();
                    }
                    return Some(page);
                }
                Err(error) => error,
            };
            let fault = attempt.fault(error);
            match self.mmu.handle_page_fault(&mut processor.cpu.vcpu, &fault) {
                Ok(FaultOutcome::Fixed) => {}
                Ok(FaultOutcome::Inject(fault)) => {
                    assert_eq!(fault.gva, attempt.gva);
                    assert_eq!(
                        Outcome::Fault(fault.error),
                        expected,
                        "{attempt:x?} by {number}: the fault differs"
                    );
                    return None;
                }
                Ok(FaultOutcome::Mmio {
                    gpa,
                    access,
                    target,
                }) => {
                    let gfn = gpa.as_u64() >> 12;
                    assert_eq!(access, attempt.kind);
                    assert_eq!(gpa.page_offset(), attempt.gva.page_offset());
                    match target {
                        MmioTarget::NoSlot => assert!(self.slot(gfn).is_none()),
                        MmioTarget::ReadOnlySlot => assert!(
                            attempt.kind == AccessKind::Write
                                && self.slot(gfn).unwrap().flags.contains(SlotFlags::READ_ONLY)
                        ),
                    }
                    match &expected {
                        Outcome::Page { gfn: wanted, .. } if *wanted == gfn => {}
                        other => assert!(
                            !clean && self.is_allowed_stale(number, attempt, gfn),
                            "{attempt:x?} by {number}: MMIO at {gfn:#x}, not {other:x?}"
                        ),
                    }
                    self.check_marks(&marked, clean);
                    return None;
                }
                Err(error) => self.raise_limit(pool, error),
            }
        }
        panic!("{attempt:x?} by {number} makes no progress ({expected:x?})");
    }

    /// For the emulation of an instruction the guest's tables count as they are now.
    fn check_translation(&self, number: usize, attempt: &Try, expected: &Outcome) {
        let vcpu = &self.processors[number].cpu.vcpu;
        let access = attempt.access(Marking::Leave);
        match (self.mmu.translate(vcpu, attempt.gva, &access), expected) {
            (Ok(gpa), Outcome::Page { gfn, .. }) => {
                assert_eq!(gpa.as_u64() >> 12, *gfn, "{attempt:x?} by {number}");
                assert_eq!(gpa.page_offset(), attempt.gva.page_offset());
            }
            (Err(TranslateError::Fault(fault)), Outcome::Fault(error)) => {
                assert_eq!(fault.error, *error, "{attempt:x?} by {number}");
            }
            (found, _) => panic!("{attempt:x?} by {number}: {found:x?}, not {expected:x?}"),
        }
    }

    fn raise_limit(&self, pool: &MmuPool<SimHost>, error: MmuError) {
        let MmuError::NoPageAvailable(report) = error else {
            panic!("{error}")
        };
        let limit = self.mmu.limit();
        if report.used + report.needed > limit {
            assert_eq!(report.limit, limit.min(pool.limit()));
            assert!(report.pinned + report.needed > limit, "{report:?}");
            self.mmu.set_limit(LIMIT);
        } else {
            // The limit of all VMs together, as all that they hold is pinned or was not enough.
            let (count, total) = (pool.count(), pool.limit());
            assert!(count + report.needed > total, "{report:?}, all {count}");
            self.refused.set(self.refused.get() + 1);
            pool.set_limit(count + LIMIT);
        }
    }

    fn check_page(&self, number: usize, attempt: &Try, page: u64, expected: &Outcome, clean: bool) {
        let writes_read_only = |gfn| {
            attempt.kind == AccessKind::Write
                && self
                    .slot(gfn)
                    .is_some_and(|slot| slot.flags.contains(SlotFlags::READ_ONLY))
        };
        if let Outcome::Page { gfn, .. } = expected
            && self.ram(*gfn) == Some(page)
            && !writes_read_only(*gfn)
        {
            return;
        }
        let slot = self
            .slots
            .values()
            .find(|slot| page.wrapping_sub(slot.ram) < slot.pages)
            .expect("the page belongs to a slot");
        let gfn = slot.base + page - slot.ram;
        assert!(
            !clean && !writes_read_only(gfn) && self.is_allowed_stale(number, attempt, gfn),
            "{attempt:x?} by {number}: reached {gfn:#x}, not {expected:x?}"
        );
    }

    /// Takes over the marks; without stale translations they must be there.
    fn check_marks(&mut self, marked: &[(u64, usize, u64)], clean: bool) {
        for (page, word, value) in marked {
            let real = self.host.word(*page, *word).load(Ordering::Relaxed);
            let model = &mut self.model[*page as usize * 512 + *word];
            assert!(
                real == *value || (!clean && real & *value == real && *model & real == *model),
                "marks of word {word} in page {page}: {real:#x}, not {value:#x}"
            );
            *model = real;
        }
    }

    pub(super) fn attempt(
        &self,
        number: usize,
        place: Place,
        kind: AccessKind,
        user: bool,
        ac: bool,
    ) -> Try {
        // Most random addresses lead nowhere: three in four attempts look for one that leads to
        // memory (a write: to a table), the last successful ones first.
        let attempt = |gva| Try {
            gva,
            kind,
            user,
            ac,
        };
        let first = attempt(self.gva(number, place));
        if place.indices[4] & 3 == 0 {
            return self.sayable(number, first);
        }
        let again = self.recent[number].iter().rev().map(|gva| attempt(*gva));
        let other = (0..24u8).map(|round| {
            let indices = place
                .indices
                .map(|index| index.wrapping_mul(2 * round + 1).wrapping_add(round));
            attempt(self.gva(number, Place { indices, ..place }))
        });
        let leads = |attempt: &Try| match self.current(number, attempt) {
            Outcome::Page { gfn, .. } => kind != AccessKind::Write || (1..13).contains(&gfn),
            Outcome::Fault(_) => false,
        };
        let found = if place.indices[4] & 4 == 0 && kind != AccessKind::Write {
            // As likely as not one that has been used, whatever its entries say by now.
            again.chain(other).nth(usize::from(place.indices[3] & 7))
        } else {
            other.chain(again).find(leads)
        };
        self.sayable(number, found.unwrap_or(first))
    }

    /// The same access, or a near one where it would give a right that no shadow entry can say
    /// without giving more: to fetch what a protection key lets nobody read, and to write with AC set
    /// what is read-only for the user while CR0.WP is clear and SMAP on.
    fn sayable(&self, number: usize, attempt: Try) -> Try {
        let rules = &self.processors[number].rules;
        let faults = |rules: &Rules, attempt: &Try| match self.current_under(rules, attempt) {
            Outcome::Fault(code) => Some(code),
            Outcome::Page { .. } => None,
        };
        if attempt.kind == AccessKind::Execute {
            let read = Try {
                kind: AccessKind::Read,
                ac: true,
                ..attempt
            };
            let code = faults(rules, &read).unwrap_or(Code::empty());
            return if code.contains(Code::PROTECTION_KEY) {
                read
            } else {
                attempt
            };
        }
        let protected = Rules { wp: true, ..*rules };
        if rules.smap && !rules.wp && attempt.ac && faults(&protected, &attempt).is_some() {
            return Try {
                ac: false,
                ..attempt
            };
        }
        attempt
    }

    pub(super) fn write(&mut self, page: u64, offset: u16, width: u8, entry: Entry) {
        let width = 1usize << (width % 4);
        let offset = usize::from(offset) & 0xfff;
        if offset + width > 4096 {
            return;
        }
        // Table entries mostly where entries are; else anything anywhere.
        let offset = if entry.key & 7 == 7 {
            offset
        } else {
            offset & !7
        };
        let offset = if entry.key & 8 == 0 && self.processors[0].rules.mode != Mode::Legacy {
            index8(offset as u8, false) as usize * 8
        } else if entry.key & 8 == 0 {
            index4(offset as u8) as usize * 4
        } else {
            offset
        };
        if offset + width > 4096 {
            return;
        }
        let bytes = self.value(entry, width == 8).to_le_bytes();
        for word in offset / 8..=(offset + width - 1) / 8 {
            let mut value = self.model[page as usize * 512 + word].to_le_bytes();
            for (index, byte) in bytes[..width].iter().enumerate() {
                if (offset + index) / 8 == word {
                    value[(offset + index) % 8] = *byte;
                }
            }
            self.remember(page, word, u64::from_le_bytes(value));
        }
        self.host.write_ram(page, offset, &bytes[..width]);
        if let Some(slot) = self.slots.get(&RESTLESS)
            && page.wrapping_sub(slot.ram) < slot.pages
            && slot.flags.contains(SlotFlags::LOG_DIRTY)
        {
            self.written.insert(page);
        }
    }
}
