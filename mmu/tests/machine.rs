//! Random machines against a reference walker.
//!
//! Every access is compared with a walk of the guest's tables that knows nothing of shadows: frame,
//! fault code, accessed and dirty bits, memory. A stale translation is allowed exactly if each entry
//! it would come from was in the table at some time since this processor's last flush. After every
//! step all structures are audited.
#![allow(missing_docs, reason = "a test")]
#![allow(
    clippy::too_many_lines,
    clippy::verbose_bit_mask,
    clippy::nonminimal_bool,
    clippy::struct_excessive_bools,
    clippy::precedence,
    clippy::single_match_else,
    reason = "bits are written as the manual draws them"
)]

mod common;
#[path = "common/reference.rs"]
mod reference;

use common::{Cpu, SimHost, Try};
use proptest::prelude::*;
use reference::{Mode, Outcome, Rules};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use umbra_mmu::*;
use umbra_vcpu::address::{Gfn, Gpa, Gva};
use x86_64::registers::control::{Cr0Flags, Cr4Flags, EferFlags};

const LOW_PAGES: u64 = 64;
const RAM_PAGES: u64 = 1024;
const WIDTH: u8 = 40;

#[derive(Clone, Copy, Debug)]
struct Place {
    indices: [u8; 5],
    offset: u16,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    target: u8,
    flags: u16,
    key: u8,
}

#[derive(Clone, Copy, Debug)]
enum Op {
    Access {
        cpu: u8,
        place: Place,
        kind: u8,
        user: bool,
        ac: bool,
    },
    Write {
        cpu: u8,
        place: Place,
        user: bool,
        ac: bool,
        width: u8,
        entry: Entry,
    },
    HostWrite {
        table: u8,
        index: u8,
        entry: Entry,
    },
    Load {
        cpu: u8,
        root: u8,
    },
    Mode {
        cpu: u8,
        mode: u8,
        flags: u8,
        root: u8,
    },
    Pkru {
        cpu: u8,
        value: u32,
    },
    Invlpg {
        cpu: u8,
        place: Place,
    },
    Flush {
        cpu: u8,
    },
    Limit(u8),
    Pressure(u8),
    ZapAll,
    Unprotect(u8),
    Slot(u8),
    Dirty,
}

fn place() -> impl Strategy<Value = Place> {
    (any::<[u8; 5]>(), any::<u16>()).prop_map(|(indices, offset)| Place { indices, offset })
}

fn entry() -> impl Strategy<Value = Entry> {
    (any::<u8>(), any::<u16>(), any::<u8>()).prop_map(|(target, flags, key)| Entry {
        target,
        flags,
        key,
    })
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        30 => (0u8..2, place(), 0u8..3, any::<bool>(), any::<bool>())
            .prop_map(|(cpu, place, kind, user, ac)| Op::Access { cpu, place, kind, user, ac }),
        30 => (0u8..2, place(), any::<bool>(), any::<bool>(), 0u8..4, entry()).prop_map(
            |(cpu, place, user, ac, width, entry)| Op::Write { cpu, place, user, ac, width, entry }
        ),
        6 => (any::<u8>(), any::<u8>(), entry())
            .prop_map(|(table, index, entry)| Op::HostWrite { table, index, entry }),
        4 => (0u8..2, any::<u8>()).prop_map(|(cpu, root)| Op::Load { cpu, root }),
        2 => (0u8..2, any::<u8>(), any::<u8>(), any::<u8>())
            .prop_map(|(cpu, mode, flags, root)| Op::Mode { cpu, mode, flags, root }),
        1 => (0u8..2, any::<u32>()).prop_map(|(cpu, value)| Op::Pkru { cpu, value }),
        8 => (0u8..2, place()).prop_map(|(cpu, place)| Op::Invlpg { cpu, place }),
        3 => (0u8..2).prop_map(|cpu| Op::Flush { cpu }),
        1 => any::<u8>().prop_map(Op::Limit),
        2 => any::<u8>().prop_map(Op::Pressure),
        1 => Just(Op::ZapAll),
        1 => any::<u8>().prop_map(Op::Unprotect),
        1 => any::<u8>().prop_map(Op::Slot),
        1 => Just(Op::Dirty),
    ]
}

#[derive(Clone, Debug)]
struct Scenario {
    modes: [u8; 2],
    flags: [u8; 2],
    fifo: bool,
    seed: Vec<(u8, u8, Entry)>,
    ops: Vec<Op>,
}

fn scenario(length: usize) -> impl Strategy<Value = Scenario> {
    (
        any::<[u8; 2]>(),
        any::<[u8; 2]>(),
        any::<bool>(),
        prop::collection::vec((any::<u8>(), any::<u8>(), entry()), 40..120),
        prop::collection::vec(op(), 1..length),
    )
        .prop_map(|(modes, flags, fifo, seed, ops)| Scenario {
            modes,
            flags,
            fifo,
            seed,
            ops,
        })
}

struct Processor {
    cpu: Cpu,
    rules: Rules,
    registers: PagingRegisters,
    /// Nothing older than this may be used.
    flushed: u64,
    invalidated: HashMap<u64, u64>,
}

#[derive(Clone, Copy)]
struct SlotModel {
    base: u64,
    pages: u64,
    ram: u64,
    flags: SlotFlags,
}

struct Test {
    mmu: Arc<Mmu<SimHost>>,
    pool: MmuPool<SimHost>,
    host: SimHost,
    processors: Vec<Processor>,
    model: Vec<u64>,
    /// Former values of words, with the time until which they were there.
    history: HashMap<(u64, usize), Vec<(u64, u64)>>,
    slots: HashMap<SlotId, SlotModel>,
    now: u64,
    /// Addresses that each processor has reached memory at.
    recent: [VecDeque<Gva>; 2],
}

static STEPS: AtomicU64 = AtomicU64::new(0);

fn index8(raw: u8, top: bool) -> u64 {
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

fn index4(raw: u8) -> u64 {
    [0, 1, 2, 3, 255, 512, 767, 1023][raw as usize % 8]
}

impl Test {
    fn new(scenario: &Scenario) -> Self {
        let host = SimHost::new(RAM_PAGES as usize, 700);
        let pool = MmuPool::new(100_000);
        let config = MmuConfig {
            features: GuestFeatures {
                max_physical_address: WIDTH,
                flags: Feature::all(),
            },
            limit: 64,
            victims: if scenario.fifo {
                VictimPolicy::Fifo
            } else {
                VictimPolicy::Clock
            },
            ..MmuConfig::default()
        };
        let mmu = pool.create(host.clone(), config);
        let mut test = Self {
            mmu,
            pool,
            host,
            processors: Vec::new(),
            model: vec![0; RAM_PAGES as usize * 512],
            history: HashMap::new(),
            slots: HashMap::new(),
            now: 1,
            recent: Default::default(),
        };
        test.add(SlotId(0), 0, 32, 0, SlotFlags::empty());
        test.add(SlotId(1), 512, 512, 512, SlotFlags::empty());
        test.add(SlotId(2), 40, 4, 40, SlotFlags::READ_ONLY);
        test.add(SlotId(3), 48, 8, 48, SlotFlags::LOG_DIRTY);
        if scenario.flags[0] & 1 == 0 {
            for page in 512..1024 {
                test.host.touch(page);
            }
        }
        for number in 0..2 {
            let cpu = Cpu::new(&test.mmu);
            test.processors.push(Processor {
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
            let mode = if scenario.modes[1] & 3 == 0 {
                scenario.modes[number]
            } else {
                scenario.modes[0]
            };
            test.set_mode(number, mode, scenario.flags[number], 0);
        }
        for (table, index, entry) in &scenario.seed {
            let (page, word, value) = test.table_word(*table, *index, *entry);
            test.host.touch(page);
            test.host.word(page, word).store(value, Ordering::Relaxed);
            test.model[page as usize * 512 + word] = value;
        }
        for number in 0..2 {
            test.load(number, 0);
        }
        test
    }

    fn add(&mut self, id: SlotId, base: u64, pages: u64, ram: u64, flags: SlotFlags) {
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

    fn slot(&self, gfn: u64) -> Option<SlotModel> {
        self.slots
            .values()
            .copied()
            .find(|slot| gfn.wrapping_sub(slot.base) < slot.pages)
    }

    fn ram(&self, gfn: u64) -> Option<u64> {
        self.slot(gfn).map(|slot| slot.ram + gfn - slot.base)
    }

    /// A word for a table: a link, a page or rubbish, likely to be useful.
    fn value(&self, entry: Entry, long: bool) -> u64 {
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
    fn table_word(&self, table: u8, index: u8, entry: Entry) -> (u64, usize, u64) {
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

    fn gva(&self, cpu: usize, place: Place) -> Gva {
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

    fn set_mode(&mut self, number: usize, mode: u8, flags: u8, root: u8) {
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

    fn load(&mut self, number: usize, root: u8) {
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

    fn flushed(&mut self, number: usize) {
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
    fn poke(&mut self, page: u64, word: usize, value: u64) {
        self.host.touch(page);
        self.remember(page, word, value);
        self.host.word(page, word).store(value, Ordering::Relaxed);
        self.mmu
            .track_guest_write(Gpa::new((page << 12) + word as u64 * 8), 8);
    }

    fn remember(&mut self, page: u64, word: usize, value: u64) {
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

    fn current(&self, number: usize, attempt: &Try) -> Outcome {
        let mut read = |gfn: u64, offset: usize, width: usize| {
            vec![self.ram(gfn).map_or(u64::MAX >> (64 - 8 * width), |page| {
                extract(self.model[page as usize * 512 + offset / 8], offset, width)
            })]
        };
        self.processors[number]
            .rules
            .walk(attempt, &mut read)
            .remove(0)
    }

    /// Whether `wanted` may come from entries that were there since the last flush.
    fn is_allowed_stale(&self, number: usize, attempt: &Try, gfn: u64) -> bool {
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
    fn marked(&self, outcome: &Outcome, attempt: &Try) -> Vec<(u64, usize, u64)> {
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

    /// An access, until it has gone through or turned into something else. Where it went.
    fn access(&mut self, number: usize, attempt: &Try) -> Option<u64> {
        let clean = self
            .history
            .values()
            .flatten()
            .all(|(until, _)| *until <= self.processors[number].flushed);
        let expected = self.current(number, attempt);
        let marked = self.marked(&expected, attempt);
        for _ in 0..40 {
            let processor = &mut self.processors[number];
            let entry = match self.mmu.prepare_entry(&mut processor.cpu.vcpu) {
                Ok(entry) => entry,
                Err(error) => {
                    self.raise_limit(error);
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
                Err(error) => self.raise_limit(error),
            }
        }
        panic!("{attempt:x?} by {number} makes no progress ({expected:x?})");
    }

    fn raise_limit(&self, error: MmuError) {
        let MmuError::NoPageAvailable(report) = error else {
            panic!("{error}")
        };
        assert!(report.limit < report.used + report.needed, "{report:?}");
        assert!(report.pinned + report.needed > report.limit, "{report:?}");
        self.mmu.set_limit(64);
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

    fn step(&mut self, op: Op) {
        STEPS.fetch_add(1, Ordering::Relaxed);
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
                if let Some(attempt) = self.attempt(number, place, kind, user, ac) {
                    self.access(number, &attempt);
                }
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
                if let Some(attempt) = self.attempt(number, place, AccessKind::Write, user, ac)
                    && let Some(page) = self.access(number, &attempt)
                {
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
            Op::Pressure(amount) => self.pressure(usize::from(amount)),
            Op::ZapAll => self.mmu.zap_all(),
            Op::Unprotect(table) => {
                self.mmu.unprotect(Gfn::new(1 + u64::from(table) % 12));
            }
            Op::Slot(choice) => self.change_slot(choice),
            Op::Dirty => {
                if self.slots.contains_key(&SlotId(3)) {
                    self.mmu
                        .take_dirty(SlotId(3), |gfn| assert!(gfn.as_u64() < 1000))
                        .unwrap();
                }
            }
        }
        if let Err(problem) = self.mmu.audit() {
            panic!("after {op:?}: {problem}");
        }
        assert_eq!(self.pool.count(), self.mmu.used());
        self.compare(LOW_PAGES);
    }

    fn pressure(&self, amount: usize) {
        if amount & 1 == 0 {
            self.mmu.release_caches();
            return;
        }
        let before = self.host.0.frames_in_use.load(Ordering::Relaxed);
        let shrunk = self.pool.scan(amount / 8);
        let after = self.host.0.frames_in_use.load(Ordering::Relaxed);
        assert_eq!(before - after, shrunk.freed, "the shrinker miscounts");
        assert_eq!(shrunk.skipped, 0);
    }

    fn attempt(
        &self,
        number: usize,
        place: Place,
        kind: AccessKind,
        user: bool,
        ac: bool,
    ) -> Option<Try> {
        let rules = &self.processors[number].rules;
        // Two things that no shadow entry can say, both documented: a fetch-only page by protection
        // key, and a user page that only a supervisor with AC set may write although it is read-only.
        if rules.pke && kind == AccessKind::Execute {
            return None;
        }
        let ac = ac && !(rules.smap && !rules.wp);
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
            return Some(first);
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
        Some(found.unwrap_or(first))
    }

    fn write(&mut self, page: u64, offset: u16, width: u8, entry: Entry) {
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
    }

    fn change_slot(&mut self, choice: u8) {
        let id = SlotId(3);
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

    fn compare(&self, pages: u64) {
        for page in 0..pages {
            for word in 0..512 {
                let real = self.host.word(page, word).load(Ordering::Relaxed);
                let model = self.model[page as usize * 512 + word];
                assert_eq!(
                    real, model,
                    "page {page}, word {word} ({real:#x}, not {model:#x})"
                );
            }
        }
    }
}

fn extract(word: u64, offset: usize, width: usize) -> u64 {
    if width == 8 {
        word
    } else {
        word >> (offset % 8 * 8) & 0xffff_ffff
    }
}

fn run(scenario: &Scenario) {
    let mut test = Test::new(scenario);
    for op in &scenario.ops {
        test.step(*op);
    }
    test.compare(RAM_PAGES);
    let Test {
        mmu,
        pool,
        host,
        processors,
        ..
    } = test;
    for processor in processors {
        mmu.destroy_vcpu(processor.cpu.vcpu);
    }
    drop(mmu);
    assert_eq!(pool.count(), 0);
    assert_eq!(
        host.0.frames_in_use.load(Ordering::Relaxed),
        0,
        "frames leaked"
    );
}

#[test]
fn agrees_with_the_reference_walker() {
    let steps: u64 = match (std::env::var("UMBRA_STEPS"), std::env::var("UMBRA_LONG")) {
        (Ok(steps), _) => steps.parse().expect("UMBRA_STEPS is a number"),
        (_, Ok(_)) => 10_000_000,
        _ => 200_000,
    };
    // Half of the longest scenario is the mean.
    let length = 800;
    let mut config = ProptestConfig::with_cases((steps / (length / 2)) as u32 + 1);
    config.max_shrink_iters = 1500;
    config.failure_persistence = Some(Box::new(
        proptest::test_runner::FileFailurePersistence::Direct(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/machine.regressions"
        )),
    ));
    while STEPS.load(Ordering::Relaxed) < steps {
        let mut runner = proptest::test_runner::TestRunner::new(config.clone());
        let result = runner.run(&scenario(length as usize), |scenario| {
            run(&scenario);
            Ok(())
        });
        if let Err(failure) = result {
            panic!("{failure}");
        }
    }
    println!("{} steps", STEPS.load(Ordering::Relaxed));
}
