//! A simulated host and a simulated processor that walks the shadow pages with a TLB and
//! paging-structure caches of its own, so that a missing flush shows.
#![allow(dead_code, reason = "each test program uses its own part")]

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use umbra_mmu::{
    Access, AccessKind, Fault, Frames, GuestMemory, HardwareRoot, Level, Marking, Mmu, OutOfMemory,
    RootChange, ShadowMode, SlotId, TlbFlush, Touch, Vcpu, Zone,
};
use umbra_vcpu::address::{Gva, Hpa, Pfn};
use x86_64::registers::control::Cr4Flags;
use x86_64::registers::rflags::RFlags;
use x86_64::structures::idt::PageFaultErrorCode as Code;

/// Where the simulated guest RAM begins in host memory.
pub const RAM_BASE: u64 = 0x10_0000;
/// Where frames for shadow pages begin.
const FRAME_BASE: u64 = 0x8_0000;

/// Pages of zeros, each of which costs nothing until something is done with it.
struct Pages(Vec<OnceLock<Box<[AtomicU64; 512]>>>);

impl Pages {
    fn new(count: usize) -> Self {
        Self((0..count).map(|_| OnceLock::new()).collect())
    }

    fn page(&self, number: usize) -> &[AtomicU64; 512] {
        self.0[number].get_or_init(|| Box::new(std::array::from_fn(|_| AtomicU64::new(0))))
    }
}

pub struct Machine {
    ram: Pages,
    touched: Vec<AtomicBool>,
    /// For each slot: the page of RAM at which its memory begins.
    slots: Mutex<HashMap<SlotId, u64>>,
    frames: Pages,
    frame_used: Vec<AtomicBool>,
    next_frame: AtomicUsize,
    pub frames_in_use: AtomicUsize,
    /// Frames that can be had, to simulate a host that runs out.
    pub frame_limit: AtomicUsize,
    /// A flush request for each virtual CPU, seen before its next access.
    tlbs: Mutex<Vec<Tlb>>,
    pub flushes: AtomicU32,
    /// When set, flush requests are lost.
    pub drop_flushes: AtomicBool,
    /// Counts flush requests: a processor that saw an older count must not enter the guest.
    pub epoch: AtomicU64,
    /// Runs inside a flush request, as another processor would.
    pub during_flush: Mutex<Option<Box<dyn FnMut() + Send>>>,
    /// Runs once before a guest entry is changed, as another processor would in the last moment.
    pub before_exchange: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

#[derive(Clone)]
pub struct SimHost(pub Arc<Machine>);

#[derive(Default)]
struct Tlb {
    pages: HashMap<u64, u64>,
    tables: HashMap<(u8, u64), u64>,
    pointers: [u64; 4],
}

impl SimHost {
    pub fn new(ram_pages: usize, frames: usize) -> Self {
        let flags = |count| {
            (0..count)
                .map(|_| AtomicBool::new(false))
                .collect::<Vec<_>>()
        };
        Self(Arc::new(Machine {
            ram: Pages::new(ram_pages),
            touched: flags(ram_pages),
            slots: Mutex::default(),
            frames: Pages::new(frames),
            frame_used: flags(frames),
            next_frame: AtomicUsize::new(0),
            frames_in_use: AtomicUsize::new(0),
            frame_limit: AtomicUsize::new(frames),
            tlbs: Mutex::default(),
            flushes: AtomicU32::new(0),
            drop_flushes: AtomicBool::new(false),
            epoch: AtomicU64::new(0),
            during_flush: Mutex::new(None),
            before_exchange: Mutex::new(None),
        }))
    }

    pub fn set_slot(&self, id: SlotId, ram_page: u64) {
        self.0.slots.lock().unwrap().insert(id, ram_page);
    }

    pub fn add_processor(&self) {
        self.0.tlbs.lock().unwrap().push(Tlb::default());
    }

    /// A word of guest RAM by its page of RAM.
    pub fn word(&self, ram_page: u64, word: usize) -> &AtomicU64 {
        &self.0.ram.page(ram_page as usize)[word]
    }

    /// Whether anything was ever done with a page of RAM; until then it is all zeros.
    pub fn is_in_use(&self, ram_page: u64) -> bool {
        self.0.ram.0[ram_page as usize].get().is_some()
    }

    pub fn touch(&self, ram_page: u64) {
        self.0.touched[ram_page as usize].store(true, Ordering::Relaxed);
    }

    #[allow(clippy::unused_self, reason = "the layout is this host's")]
    pub fn ram_page(&self, frame: Pfn) -> u64 {
        frame.as_u64() - RAM_BASE
    }

    pub fn write_ram(&self, ram_page: u64, offset: usize, bytes: &[u8]) {
        for (index, byte) in bytes.iter().enumerate() {
            let at = offset + index;
            let word = self.word(ram_page, at / 8);
            let shift = at % 8 * 8;
            let old = word.load(Ordering::Relaxed);
            word.store(
                old & !(0xff << shift) | u64::from(*byte) << shift,
                Ordering::Relaxed,
            );
        }
    }

    fn frame_word(&self, frame: Hpa, index: usize) -> &AtomicU64 {
        let number = (Pfn::containing(frame).as_u64() - FRAME_BASE) as usize;
        assert!(
            self.0.frame_used[number].load(Ordering::Relaxed),
            "frame {frame} is used after it was freed"
        );
        &self.0.frames.page(number)[index]
    }
}

impl GuestMemory for SimHost {
    fn frame(&self, slot: SlotId, page: u64, touch: Touch) -> Result<Option<Pfn>, OutOfMemory> {
        let ram_page = self.0.slots.lock().unwrap()[&slot] + page;
        let touched = &self.0.touched[ram_page as usize];
        if touch == Touch::Allocate {
            touched.store(true, Ordering::Relaxed);
        }
        Ok(touched
            .load(Ordering::Relaxed)
            .then(|| Pfn::new(RAM_BASE + ram_page)))
    }

    fn load_u32(&self, frame: Pfn, offset: usize) -> u32 {
        let word = self
            .word(self.ram_page(frame), offset / 8)
            .load(Ordering::Relaxed);
        (word >> (offset % 8 * 8)) as u32
    }

    fn load_u64(&self, frame: Pfn, offset: usize) -> u64 {
        self.word(self.ram_page(frame), offset / 8)
            .load(Ordering::Relaxed)
    }

    fn compare_exchange_u32(
        &self,
        frame: Pfn,
        offset: usize,
        current: u32,
        new: u32,
    ) -> Result<u32, u32> {
        let word = self.word(self.ram_page(frame), offset / 8);
        let shift = offset % 8 * 8;
        let old = word.load(Ordering::Relaxed);
        let found = (old >> shift) as u32;
        if found != current {
            return Err(found);
        }
        let changed = old & !(0xffff_ffff << shift) | u64::from(new) << shift;
        word.store(changed, Ordering::Relaxed);
        Ok(found)
    }

    fn compare_exchange_u64(
        &self,
        frame: Pfn,
        offset: usize,
        current: u64,
        new: u64,
    ) -> Result<u64, u64> {
        if let Some(other) = self.0.before_exchange.lock().unwrap().take() {
            other();
        }
        self.word(self.ram_page(frame), offset / 8)
            .compare_exchange(current, new, Ordering::Relaxed, Ordering::Relaxed)
    }

    fn mapping_level(&self, slot: SlotId, page: u64) -> Level {
        let ram_page = self.0.slots.lock().unwrap()[&slot] + page;
        let start = ram_page & !511;
        let gfn_aligned = (ram_page ^ page).is_multiple_of(512);
        let all = (start..start + 512).all(|page| {
            self.0
                .touched
                .get(page as usize)
                .is_some_and(|page| page.load(Ordering::Relaxed))
        });
        if gfn_aligned && all {
            Level::Two
        } else {
            Level::One
        }
    }
}

impl Frames for SimHost {
    fn allocate(&self, _zone: Zone) -> Option<Hpa> {
        if self.0.frames_in_use.load(Ordering::Relaxed)
            >= self.0.frame_limit.load(Ordering::Relaxed)
        {
            return None;
        }
        // Round robin, so that a frame used after it was freed stays noticeable for long.
        let start = self.0.next_frame.fetch_add(1, Ordering::Relaxed);
        let count = self.0.frame_used.len();
        let number = (0..count)
            .map(|step| (start + step) % count)
            .find(|number| !self.0.frame_used[*number].swap(true, Ordering::Relaxed))?;
        self.0.frames_in_use.fetch_add(1, Ordering::Relaxed);
        for word in self.0.frames.page(number) {
            word.store(0, Ordering::Relaxed);
        }
        Some(Pfn::new(FRAME_BASE + number as u64).base())
    }

    fn free(&self, frame: Hpa) {
        let number = (Pfn::containing(frame).as_u64() - FRAME_BASE) as usize;
        assert!(
            self.0.frame_used[number].swap(false, Ordering::Relaxed),
            "{frame} freed twice"
        );
        self.0.frames_in_use.fetch_sub(1, Ordering::Relaxed);
        for tlb in self.0.tlbs.lock().unwrap().iter() {
            assert!(
                tlb.tables.values().all(|table| *table != frame.as_u64()),
                "{frame} is freed while a processor's paging-structure cache leads to it"
            );
        }
    }

    fn load(&self, frame: Hpa, index: usize) -> u64 {
        self.frame_word(frame, index).load(Ordering::Relaxed)
    }

    fn store(&self, frame: Hpa, index: usize, value: u64) {
        self.frame_word(frame, index)
            .store(value, Ordering::Relaxed);
    }

    fn swap(&self, frame: Hpa, index: usize, value: u64) -> u64 {
        self.frame_word(frame, index).swap(value, Ordering::Relaxed)
    }

    fn compare_exchange(
        &self,
        frame: Hpa,
        index: usize,
        current: u64,
        new: u64,
    ) -> Result<u64, u64> {
        self.frame_word(frame, index).compare_exchange(
            current,
            new,
            Ordering::Relaxed,
            Ordering::Relaxed,
        )
    }
}

impl TlbFlush for SimHost {
    fn flush_all(&self) {
        self.0.flushes.fetch_add(1, Ordering::Relaxed);
        if self.0.drop_flushes.load(Ordering::Relaxed) {
            return;
        }
        if let Some(other) = self.0.during_flush.lock().unwrap().as_mut() {
            other();
        }
        let mut tlbs = self.0.tlbs.lock().unwrap();
        self.0.epoch.fetch_add(1, Ordering::SeqCst);
        for tlb in tlbs.iter_mut() {
            tlb.pages.clear();
            tlb.tables.clear();
        }
    }
}

/// One access as the guest's instruction makes it.
#[derive(Clone, Copy, Debug)]
pub struct Try {
    pub gva: Gva,
    pub kind: AccessKind,
    pub user: bool,
    pub ac: bool,
}

impl Try {
    pub fn rflags(&self) -> RFlags {
        if self.ac {
            RFlags::ALIGNMENT_CHECK
        } else {
            RFlags::empty()
        }
    }

    pub fn access(&self, marking: Marking) -> Access {
        Access {
            kind: self.kind,
            cpl: if self.user { 3 } else { 0 },
            rflags: self.rflags(),
            marking,
        }
    }

    pub fn fault(&self, error: Code) -> Fault {
        Fault {
            gva: self.gva,
            error,
            cpl: if self.user { 3 } else { 0 },
            rflags: self.rflags(),
        }
    }
}

const P: u64 = 1;
const W: u64 = 2;
const U: u64 = 4;
const A: u64 = 0x20;
const PS: u64 = 0x80;
const NX: u64 = 1 << 63;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

impl SimHost {
    /// The processor enters the guest: root change and, outside long mode, the pointers' reload.
    pub fn enter(&self, processor: usize, entry: &HardwareRoot) {
        let mut tlbs = self.0.tlbs.lock().unwrap();
        let tlb = &mut tlbs[processor];
        if entry.change == RootChange::Changed {
            tlb.pages.clear();
            tlb.tables.clear();
        }
        if entry.mode == ShadowMode::Pae {
            assert!(entry.root.as_u64() < 1 << 32 && entry.root.as_u64().is_multiple_of(32));
            tlb.pointers = std::array::from_fn(|index| self.load(entry.root, index));
            for pointer in tlb.pointers {
                assert_eq!(
                    pointer & 0xfff0_0000_0000_01e6,
                    0,
                    "reserved bits in {pointer:#x}"
                );
            }
        }
    }

    /// The processor's own translation: the frame, or the error code of its fault.
    pub fn hardware(
        &self,
        processor: usize,
        entry: &HardwareRoot,
        guest_cr4: Cr4Flags,
        attempt: &Try,
    ) -> Result<Pfn, Code> {
        let mut tlbs = self.0.tlbs.lock().unwrap();
        Self::run(self, &mut tlbs[processor], entry, guest_cr4, attempt)
    }

    /// The same with other processors at work: enters the guest, unless a flush request came after
    /// `epoch` (then `None`), and does `store` as part of the access.
    pub fn run_once(
        &self,
        processor: usize,
        entry: &HardwareRoot,
        guest_cr4: Cr4Flags,
        attempt: &Try,
        epoch: u64,
        store: impl FnOnce(Pfn),
    ) -> Option<Result<Pfn, Code>> {
        let mut tlbs = self.0.tlbs.lock().unwrap();
        if self.0.epoch.load(Ordering::SeqCst) != epoch {
            return None;
        }
        let tlb = &mut tlbs[processor];
        if entry.change == RootChange::Changed {
            tlb.pages.clear();
            tlb.tables.clear();
        }
        let result = Self::run(self, tlb, entry, guest_cr4, attempt);
        if let Ok(frame) = result {
            store(frame);
        }
        Some(result)
    }

    fn run(
        &self,
        tlb: &mut Tlb,
        entry: &HardwareRoot,
        guest_cr4: Cr4Flags,
        attempt: &Try,
    ) -> Result<Pfn, Code> {
        let cr4 = (guest_cr4 - entry.controls.cr4_clear) | entry.controls.cr4_set;
        let page = attempt.gva.as_u64() >> 12;
        let translation = match tlb.pages.get(&page) {
            Some(translation) => *translation,
            None => self
                .hardware_walk(tlb, entry, attempt.gva)
                .ok_or(error(attempt, false))?,
        };
        let (writable, user, execute) = (
            translation & W != 0,
            translation & U != 0,
            translation & NX == 0,
        );
        let smep = cr4.contains(Cr4Flags::SUPERVISOR_MODE_EXECUTION_PROTECTION);
        let smap = cr4.contains(Cr4Flags::SUPERVISOR_MODE_ACCESS_PREVENTION);
        let allowed = match attempt.kind {
            AccessKind::Execute => {
                execute && (user || !attempt.user) && !(smep && user && !attempt.user)
            }
            kind => {
                (kind == AccessKind::Read || writable)
                    && (user || !attempt.user)
                    && (!smap || !user || attempt.user || attempt.ac)
            }
        };
        if !allowed {
            // A fault makes the processor forget the address (SDM vol. 3A 4.10.4.1).
            tlb.pages.remove(&page);
            tlb.tables.clear();
            return Err(error(attempt, true));
        }
        tlb.pages.insert(page, translation);
        Ok(Pfn::containing(Hpa::new(translation & ADDRESS)))
    }

    fn hardware_walk(&self, tlb: &mut Tlb, entry: &HardwareRoot, gva: Gva) -> Option<u64> {
        let top = match entry.mode {
            ShadowMode::Pae => 2,
            ShadowMode::FourLevel => 4,
            ShadowMode::FiveLevel => 5,
        };
        let prefix = |level: u8| (level, gva.as_u64() >> (12 + 9 * u32::from(level)));
        // The lowest table that the paging-structure caches know.
        let cached = (1..top).find_map(|level| Some((level, *tlb.tables.get(&prefix(level))?)));
        let (mut level, mut table) = match cached {
            Some(found) => found,
            None if entry.mode == ShadowMode::Pae => {
                let pointer = tlb.pointers[(gva.as_u64() >> 30 & 3) as usize];
                if pointer & P == 0 {
                    return None;
                }
                (top, pointer & ADDRESS)
            }
            None => (top, entry.root.as_u64()),
        };
        loop {
            let index = (gva.as_u64() >> (12 + 9 * (u32::from(level) - 1)) & 511) as usize;
            let value = self.load(Hpa::new(table), index);
            if value & P == 0 {
                return None;
            }
            assert_eq!(
                value & 0x000f_fe00_0000_0000,
                0,
                "address bits that no host has"
            );
            // A processor sets the bit in one step with looking whether the entry is still the same.
            if self
                .frame_word(Hpa::new(table), index)
                .compare_exchange(value, value | A, Ordering::SeqCst, Ordering::SeqCst)
                .is_err()
            {
                continue;
            }
            if level == 1 || value & PS != 0 {
                let pages = 1u64 << (9 * (level - 1));
                let base = value & ADDRESS;
                assert_eq!(base >> 12 & (pages - 1), 0, "a large page is not aligned");
                let within = (gva.as_u64() >> 12) & (pages - 1);
                return Some((value & !(ADDRESS | PS)) | (base + (within << 12)));
            }
            assert!(
                value & (W | U) == W | U && value & NX == 0,
                "a link must permit everything"
            );
            level -= 1;
            table = value & ADDRESS;
            tlb.tables.insert(prefix(level), table);
        }
    }
}

fn error(attempt: &Try, present: bool) -> Code {
    let mut code = Code::empty();
    code.set(Code::PROTECTION_VIOLATION, present);
    code.set(Code::CAUSED_BY_WRITE, attempt.kind == AccessKind::Write);
    code.set(Code::USER_MODE, attempt.user);
    code.set(Code::INSTRUCTION_FETCH, attempt.kind == AccessKind::Execute);
    code
}

/// A virtual CPU with its processor's number.
pub struct Cpu {
    pub vcpu: Vcpu,
    pub number: usize,
}

impl Cpu {
    pub fn new(mmu: &Mmu<SimHost>) -> Self {
        let number = mmu.host().0.tlbs.lock().unwrap().len();
        mmu.host().add_processor();
        Self {
            vcpu: mmu.create_vcpu().expect("room for a virtual CPU"),
            number,
        }
    }
}
