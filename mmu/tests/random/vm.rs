//! One VM: its MMU, its processors, and the model that both are compared with.

use std::cell::Cell;
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use umbra_mmu::{
    AccessKind, Cr3, Feature, GuestFeatures, MemorySlot, Mmu, MmuConfig, MmuPool, PagingRegisters,
    SlotFlags, SlotId, VictimPolicy,
};
use umbra_vcpu::address::{Gfn, Gpa, Gva};
use x86_64::registers::control::{Cr0Flags, Cr4Flags, EferFlags};

use super::reference::{Mode, Outcome, Rules};
use super::scenario::{Entry, Place, Scenario, VmSetup};
use crate::common::{Cpu, SimHost, Try};

/// Pages of memory that are compared after every step: tables, and what is written beside them.
pub(super) const LOW_PAGES: u64 = 64;
pub(super) const RAM_PAGES: u64 = 1024;
const FRAMES: usize = 700;
const WIDTH: u8 = 40;
/// The VM's limit on shadow pages at first, and whenever it was too low.
pub(super) const LIMIT: usize = 64;
/// The slot that moves, goes away and changes its flags.
pub(super) const RESTLESS: SlotId = SlotId(3);

pub(super) struct Processor {
    pub(super) cpu: Cpu,
    pub(super) rules: Rules,
    pub(super) registers: PagingRegisters,
    /// Nothing older than this may be used.
    pub(super) flushed: u64,
    pub(super) invalidated: HashMap<u64, u64>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct SlotModel {
    pub(super) base: u64,
    pub(super) pages: u64,
    pub(super) ram: u64,
    pub(super) flags: SlotFlags,
}

pub(super) struct Vm {
    pub(super) mmu: Arc<Mmu<SimHost>>,
    pub(super) host: SimHost,
    pub(super) processors: Vec<Processor>,
    pub(super) model: Vec<u64>,
    /// Former values of words, with the time until which they were there.
    pub(super) history: HashMap<(u64, usize), Vec<(u64, u64)>>,
    pub(super) slots: HashMap<SlotId, SlotModel>,
    pub(super) now: u64,
    /// How often the limit of all VMs together was in the way.
    pub(super) refused: Cell<u64>,
    /// Pages that were written since the log of writes was last taken.
    pub(super) written: BTreeSet<u64>,
    /// Addresses that each processor has reached memory at.
    pub(super) recent: [VecDeque<Gva>; 2],
}

pub(super) fn index8(raw: u8, top: bool) -> u64 {
    [
        0,
        1,
        2,
        3,
        4,
        255,
        if top { 5 } else { 256 },
        if top { 6 } else { 511 },
    ][raw as usize % 8]
}

pub(super) fn index4(raw: u8) -> u64 {
    [0, 1, 2, 3, 255, 512, 767, 1023][raw as usize % 8]
}

impl Vm {
    pub(super) fn new(pool: &MmuPool<SimHost>, setup: VmSetup, scenario: &Scenario) -> Self {
        let host = SimHost::new(RAM_PAGES as usize, FRAMES);
        let config = MmuConfig {
            features: GuestFeatures {
                max_physical_address: WIDTH,
                flags: Feature::all(),
            },
            limit: LIMIT,
            victims: if setup.fifo {
                VictimPolicy::Fifo
            } else {
                VictimPolicy::Clock
            },
            ..MmuConfig::default()
        };
        let mmu = pool.create(host.clone(), config);
        let mut vm = Self {
            mmu,
            host,
            processors: Vec::new(),
            model: vec![0; RAM_PAGES as usize * 512],
            history: HashMap::new(),
            slots: HashMap::new(),
            now: 1,
            refused: Cell::new(0),
            written: BTreeSet::new(),
            recent: Default::default(),
        };
        vm.add(SlotId(0), 0, 32, 0, SlotFlags::empty());
        vm.add(SlotId(1), 512, 512, 512, SlotFlags::empty());
        vm.add(SlotId(2), 40, 4, 40, SlotFlags::READ_ONLY);
        vm.add(RESTLESS, 48, 8, 48, SlotFlags::LOG_DIRTY);
        if setup.flags[0] & 1 == 0 {
            for page in 512..1024 {
                vm.host.touch(page);
            }
        }
        for number in 0..2 {
            let cpu = Cpu::new(&vm.mmu);
            vm.processors.push(Processor {
                cpu,
                rules: Rules {
                    mode: Mode::Unpaged,
                    pse: false,
                    nxe: false,
                    wp: false,
                    smep: false,
                    smap: false,
                    pke: false,
                    pkru: 0,
                    width: u32::from(WIDTH),
                    root: 1,
                    pointers: [0; 4],
                },
                registers: PagingRegisters::RESET,
                flushed: 0,
                invalidated: HashMap::new(),
            });
            // The second processor shares the first one's mode more often than not.
            let mode = if setup.modes[1] & 3 == 0 {
                setup.modes[number]
            } else {
                setup.modes[0]
            };
            vm.set_mode(number, mode, setup.flags[number], 0);
        }
        for (table, index, entry) in &scenario.seed {
            let (page, word, value) = vm.table_word(*table, *index, *entry);
            vm.host.touch(page);
            vm.host.word(page, word).store(value, Ordering::Relaxed);
            vm.model[page as usize * 512 + word] = value;
        }
        for number in 0..2 {
            vm.load(number, 0);
        }
        vm
    }

    pub(super) fn add(&mut self, id: SlotId, base: u64, pages: u64, ram: u64, flags: SlotFlags) {
        self.host.set_slot(id, ram);
        self.mmu
            .add_slot(MemorySlot {
                id,
                base: Gfn::new(base),
                pages,
                flags,
            })
            .expect("the slot is free");
        self.slots.insert(
            id,
            SlotModel {
                base,
                pages,
                ram,
                flags,
            },
        );
    }

    pub(super) fn slot(&self, gfn: u64) -> Option<SlotModel> {
        self.slots
            .values()
            .copied()
            .find(|slot| gfn.wrapping_sub(slot.base) < slot.pages)
    }

    pub(super) fn ram(&self, gfn: u64) -> Option<u64> {
        self.slot(gfn).map(|slot| slot.ram + gfn - slot.base)
    }

    /// A word for a table: a link, a page or rubbish, likely to be useful.
    pub(super) fn value(&self, entry: Entry, long: bool) -> u64 {
        let target = match entry.target % 16 {
            0..=6 => 1 + u64::from(entry.target >> 4) % 12,
            7..=10 => 13 + u64::from(entry.target >> 4),
            11 => 40 + u64::from(entry.target >> 4) % 4,
            12 => 48 + u64::from(entry.target >> 4) % 8,
            13 => 512 + u64::from(entry.target >> 4),
            14 => 0,
            _ => 1000 + u64::from(entry.target >> 4) * 16,
        };
        let flags = entry.flags;
        let mut value = target << 12 | 0x27;
        for (bit, mask) in [(0, 1), (1, 2), (2, 4), (5, 0x20)] {
            // Each is clear in one case of eight.
            if flags >> (3 * bit.min(3)) & 7 == 0 {
                value &= !mask;
            }
        }
        if flags >> 12 & 1 != 0 {
            value |= 0x40;
        }
        if flags >> 13 & 7 == 0 {
            value = value & !(0x1f_f000) | 0x80;
        }
        if long {
            if entry.key & 15 == 0 {
                value |= 1 << 63;
            }
            if entry.key & 31 == 1 {
                value |= 1 << 45;
            }
            if self.processors.iter().any(|cpu| cpu.rules.pke) {
                value |= u64::from(entry.key >> 4 & 3) << 59;
            }
        }
        value
    }

    /// Where an entry goes: RAM page, word, and the word's new value.
    pub(super) fn table_word(&self, table: u8, index: u8, entry: Entry) -> (u64, usize, u64) {
        let page = 1 + u64::from(table) % 12;
        if self.processors[0].rules.mode == Mode::Legacy {
            let at = index4(index) as usize;
            let word = self.model[page as usize * 512 + at / 2];
            let shift = at % 2 * 32;
            let value = self.value(entry, false);
            (
                page,
                at / 2,
                word & !(0xffff_ffff << shift) | value << shift,
            )
        } else {
            (page, index8(index, false) as usize, self.value(entry, true))
        }
    }

    pub(super) fn gva(&self, cpu: usize, place: Place) -> Gva {
        let offset = u64::from(place.offset) & 0xfff;
        let i = place.indices;
        Gva::new(match self.processors[cpu].rules.mode {
            Mode::Unpaged => (u64::from(i[0]) & 63) << 12 | u64::from(i[1] & 1) << 21 | offset,
            Mode::Legacy => index4(i[1]) << 22 | index4(i[0]) << 12 | offset,
            Mode::Pae => {
                (u64::from(i[2]) & 3) << 30
                    | index8(i[1], false) << 21
                    | index8(i[0], false) << 12
                    | offset
            }
            Mode::Long4 => {
                index8(i[3], true) << 39
                    | index8(i[2], false) << 30
                    | index8(i[1], false) << 21
                    | index8(i[0], false) << 12
                    | offset
            }
            Mode::Long5 => {
                index8(i[4], true) << 48
                    | index8(i[3], false) << 39
                    | index8(i[2], false) << 30
                    | index8(i[1], false) << 21
                    | index8(i[0], false) << 12
                    | offset
            }
        })
    }

    pub(super) fn set_mode(&mut self, number: usize, mode: u8, flags: u8, root: u8) {
        self.recent[number].clear();
        let processor = &mut self.processors[number];
        let registers = &mut processor.registers;
        let mode = match mode % 16 {
            0 => Mode::Unpaged,
            1..=4 => Mode::Legacy,
            5..=8 => Mode::Pae,
            9..=13 => Mode::Long4,
            _ => Mode::Long5,
        };
        let set = |bit: u8| flags >> bit & 1 != 0;
        registers.cr0 = Cr0Flags::PROTECTED_MODE_ENABLE;
        registers.cr4 = Cr4Flags::empty();
        registers.efer = EferFlags::empty();
        registers.cr0.set(Cr0Flags::PAGING, mode != Mode::Unpaged);
        registers.cr0.set(Cr0Flags::WRITE_PROTECT, set(0) || set(7));
        registers.cr4.set(Cr4Flags::PAGE_SIZE_EXTENSION, set(1));
        registers.cr4.set(
            Cr4Flags::SUPERVISOR_MODE_EXECUTION_PROTECTION,
            set(2) && set(6),
        );
        registers.cr4.set(
            Cr4Flags::SUPERVISOR_MODE_ACCESS_PREVENTION,
            set(3) && set(6),
        );
        registers.cr4.set(Cr4Flags::PROTECTION_KEY_USER, set(4));
        registers.efer.set(EferFlags::NO_EXECUTE_ENABLE, set(5));
        let wide = !matches!(mode, Mode::Unpaged | Mode::Legacy);
        registers
            .cr4
            .set(Cr4Flags::PHYSICAL_ADDRESS_EXTENSION, wide);
        let long = matches!(mode, Mode::Long4 | Mode::Long5);
        registers.efer.set(EferFlags::LONG_MODE_ENABLE, long);
        registers.cr4.set(Cr4Flags::L5_PAGING, mode == Mode::Long5);
        let paged = mode != Mode::Unpaged;
        processor.rules = Rules {
            mode,
            pse: set(1),
            nxe: set(5) && wide,
            wp: registers.cr0.contains(Cr0Flags::WRITE_PROTECT),
            smep: paged && set(2) && set(6),
            smap: paged && set(3) && set(6),
            pke: long && set(4),
            ..processor.rules
        };
        self.load(number, root);
    }

    pub(super) fn load(&mut self, number: usize, root: u8) {
        let root = 1 + u64::from(root) % 3;
        let mut cr3 = Cr3::new(root << 12);
        let mut pointers = [0; 4];
        if self.processors[number].registers.uses_pdptrs() {
            // The four pointers live in a page of their own, 32-byte aligned anywhere in it.
            let (page, first) = (30, root as usize * 4);
            for index in 0..4u64 {
                let value = if (root + index).is_multiple_of(7) {
                    0
                } else {
                    (1 + (root + index) % 5) << 12 | 1
                };
                self.poke(page, first + index as usize, value);
                pointers[index as usize] = value;
            }
            cr3 = Cr3::new((page << 12) + first as u64 * 8);
        }
        let processor = &mut self.processors[number];
        processor.registers.cr3 = cr3;
        if processor.registers.uses_pdptrs() {
            processor.registers.pdptrs = self.mmu.read_pdptrs(cr3).expect("valid pointers");
            assert_eq!(processor.registers.pdptrs.0, pointers);
        }
        processor.rules.root = root;
        processor.rules.pointers = pointers;
        self.mmu
            .load_registers(&mut processor.cpu.vcpu, processor.registers);
        self.flushed(number);
    }

    pub(super) fn flushed(&mut self, number: usize) {
        self.now += 1;
        self.processors[number].flushed = self.now;
        self.processors[number].invalidated.clear();
        let oldest = self
            .processors
            .iter()
            .map(|cpu| cpu.flushed)
            .min()
            .unwrap_or(0);
        self.history.retain(|_, values| {
            values.retain(|(until, _)| *until > oldest);
            !values.is_empty()
        });
    }

    /// A host write with all that belongs to it.
    pub(super) fn poke(&mut self, page: u64, word: usize, value: u64) {
        self.host.touch(page);
        self.remember(page, word, value);
        self.host.word(page, word).store(value, Ordering::Relaxed);
        self.mmu
            .track_guest_write(Gpa::new((page << 12) + word as u64 * 8), 8);
    }

    pub(super) fn remember(&mut self, page: u64, word: usize, value: u64) {
        let place = &mut self.model[page as usize * 512 + word];
        let old = std::mem::replace(place, value);
        if old != value {
            self.now += 1;
            self.history
                .entry((page, word))
                .or_default()
                .push((self.now, old));
        }
    }

    pub(super) fn current(&self, number: usize, attempt: &Try) -> Outcome {
        self.current_under(&self.processors[number].rules, attempt)
    }

    pub(super) fn current_under(&self, rules: &Rules, attempt: &Try) -> Outcome {
        let mut read = |gfn: u64, offset: usize, width: usize| {
            vec![self.ram(gfn).map_or(u64::MAX >> (64 - 8 * width), |page| {
                extract(self.model[page as usize * 512 + offset / 8], offset, width)
            })]
        };
        rules.walk(attempt, &mut read).remove(0)
    }

    /// Whether `wanted` may come from entries that were there since the last flush.
    pub(super) fn is_allowed_stale(&self, number: usize, attempt: &Try, gfn: u64) -> bool {
        let processor = &self.processors[number];
        let page = attempt.gva.as_u64() >> 12;
        let since = processor
            .flushed
            .max(processor.invalidated.get(&page).copied().unwrap_or(0));
        let mut read = |table: u64, offset: usize, width: usize| {
            let Some(ram) = self.ram(table) else {
                return vec![u64::MAX >> (64 - 8 * width)];
            };
            let mut words = vec![self.model[ram as usize * 512 + offset / 8]];
            let former = self.history.get(&(ram, offset / 8)).into_iter().flatten();
            words.extend(
                former
                    .filter(|(until, _)| *until > since)
                    .map(|(_, word)| *word),
            );
            for word in &mut words {
                *word = extract(*word, offset, width);
            }
            words.sort_unstable();
            words.dedup();
            words
        };
        processor
            .rules
            .walk(attempt, &mut read)
            .iter()
            .any(|outcome| matches!(outcome, Outcome::Page { gfn: found, .. } if *found == gfn))
    }

    /// What the current tables look like after the access has marked them.
    pub(super) fn marked(&self, outcome: &Outcome, attempt: &Try) -> Vec<(u64, usize, u64)> {
        let Outcome::Page { path, .. } = outcome else {
            return Vec::new();
        };
        let mut words = Vec::<(u64, usize, u64)>::new();
        for (table, offset, _, leaf) in path {
            let Some(slot) = self.slot(*table) else {
                continue;
            };
            if slot.flags.contains(SlotFlags::READ_ONLY) {
                continue;
            }
            let page = slot.ram + table - slot.base;
            let mut bits = 0x20;
            if *leaf && attempt.kind == AccessKind::Write {
                bits |= 0x40;
            }
            let bits = bits << (offset % 8 * 8);
            match words
                .iter_mut()
                .find(|(at, word, _)| (*at, *word) == (page, offset / 8))
            {
                Some((_, _, value)) => *value |= bits,
                None => {
                    let value = self.model[page as usize * 512 + offset / 8] | bits;
                    words.push((page, offset / 8, value));
                }
            }
        }
        words
    }
}

fn extract(word: u64, offset: usize, width: usize) -> u64 {
    if width == 8 {
        word
    } else {
        word >> (offset % 8 * 8) & 0xffff_ffff
    }
}
