//! A host whose processors run the guest for real: each access is a walk of the shadow pages, entry by
//! entry, and the scheduler may switch to another thread before each of them.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use umbra_mmu_interleavings::{
    Frames, GuestMemory, HardwareRoot, OutOfMemory, RootChange, SlotId, TlbFlush, Touch, Zone,
};
use umbra_vcpu::address::{Gva, Hpa, Pfn};

/// Pages of guest memory. A frame of guest memory has its page's number.
pub const MEMORY_PAGES: u64 = 24;
/// The first frame for shadow pages.
const FIRST_FRAME: u64 = 64;
const FRAMES: usize = 48;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 2;
const ACCESSED: u64 = 0x20;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Which processors a flush request reaches.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Flushes {
    ReachAll,
    /// It never gets to processor 1.
    MissOne,
    /// It returns while guests may still run with what they know.
    DoNotWait,
}

#[derive(Default)]
struct Tlb {
    /// Translations by page, and leaf tables by their range of 2 MiB.
    pages: HashMap<u64, u64>,
    tables: HashMap<u64, u64>,
}

/// One processor, as a hypervisor for several would run it.
#[derive(Default)]
struct Processor {
    /// Whether it runs guest code.
    is_inside: shuttle::sync::atomic::AtomicBool,
    /// A flush request that it has not seen yet.
    request: shuttle::sync::atomic::AtomicBool,
    tlb: Mutex<Tlb>,
}

pub struct Machine {
    memory: Vec<AtomicU64>,
    frames: Vec<AtomicU64>,
    is_used: Vec<AtomicBool>,
    next: AtomicUsize,
    processors: Vec<Processor>,
    flushes: Flushes,
    /// Reading it lets the scheduler switch threads.
    bus: shuttle::sync::atomic::AtomicUsize,
}

#[derive(Clone)]
pub struct Host(pub Arc<Machine>);

/// What an access met.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Met {
    /// Guest memory: its page's number.
    Page(u64),
    /// A page fault.
    Fault {
        /// Whether there was a translation, which forbids the access.
        present: bool,
    },
}

impl Host {
    pub fn new(processors: usize, flushes: Flushes) -> Self {
        let words = |pages| (0..pages * 512).map(|_| AtomicU64::new(0)).collect();
        Self(Arc::new(Machine {
            memory: words(MEMORY_PAGES as usize),
            frames: words(FRAMES),
            is_used: (0..FRAMES).map(|_| AtomicBool::new(false)).collect(),
            next: AtomicUsize::new(0),
            processors: (0..processors).map(|_| Processor::default()).collect(),
            flushes,
            bus: shuttle::sync::atomic::AtomicUsize::new(0),
        }))
    }

    /// A word of guest memory.
    pub fn memory(&self, page: u64, index: u64) -> &AtomicU64 {
        &self.0.memory[(page * 512 + index) as usize]
    }

    pub fn frames_in_use(&self) -> usize {
        let used = self.0.is_used.iter();
        used.filter(|used| used.load(Ordering::SeqCst)).count()
    }

    fn switch(&self) {
        self.0.bus.load(Ordering::SeqCst);
    }

    fn entry(&self, frame: Hpa, index: usize) -> &AtomicU64 {
        self.switch();
        let number = (Pfn::containing(frame).as_u64() - FIRST_FRAME) as usize;
        assert!(
            self.0.is_used[number].load(Ordering::SeqCst),
            "{frame} is used after it was freed"
        );
        &self.0.frames[number * 512 + index]
    }

    /// Sees the flush requests that came while the processor was outside the guest.
    pub fn take_request(&self, processor: usize) {
        let processor = &self.0.processors[processor];
        if processor.request.swap(false, Ordering::SeqCst) {
            *processor.tlb.lock().unwrap() = Tlb::default();
        }
    }

    /// Enters the guest for one access and `then`, which gets what it met. `None` if a flush request
    /// came first.
    pub fn run<R>(
        &self,
        processor: usize,
        entry: &HardwareRoot,
        gva: Gva,
        is_write: bool,
        then: impl FnOnce(Met) -> R,
    ) -> Option<R> {
        let this = &self.0.processors[processor];
        if entry.change == RootChange::Changed {
            *this.tlb.lock().unwrap() = Tlb::default();
        }
        this.is_inside.store(true, Ordering::SeqCst);
        let result = if this.request.load(Ordering::SeqCst) {
            None
        } else {
            let met = self.access(this, entry.root, gva, is_write);
            self.switch();
            Some(then(met))
        };
        this.is_inside.store(false, Ordering::SeqCst);
        result
    }

    fn access(&self, processor: &Processor, root: Hpa, gva: Gva, is_write: bool) -> Met {
        let page = gva.as_u64() >> 12;
        let known = processor.tlb.lock().unwrap().pages.get(&page).copied();
        let Some(translation) = known.or_else(|| self.walk(processor, root, gva)) else {
            return Met::Fault { present: false };
        };
        let mut tlb = processor.tlb.lock().unwrap();
        if is_write && translation & WRITABLE == 0 {
            // A fault makes the processor forget the address (SDM vol. 3A 4.10.4.1).
            *tlb = Tlb::default();
            return Met::Fault { present: true };
        }
        tlb.pages.insert(page, translation);
        Met::Page((translation & ADDRESS) >> 12)
    }

    fn walk(&self, processor: &Processor, root: Hpa, gva: Gva) -> Option<u64> {
        let range = gva.as_u64() >> 21;
        let known = processor.tlb.lock().unwrap().tables.get(&range).copied();
        let (mut level, mut table) = known.map_or((4, root.as_u64()), |table| (1, table));
        loop {
            let index = (gva.as_u64() >> (12 + 9 * (level - 1)) & 511) as usize;
            let value = self.entry(Hpa::new(table), index).load(Ordering::SeqCst);
            if value & PRESENT == 0 {
                return None;
            }
            // The processor sets the bit only if the entry is still the same.
            let marked = self.entry(Hpa::new(table), index).compare_exchange(
                value,
                value | ACCESSED,
                Ordering::SeqCst,
                Ordering::SeqCst,
            );
            if marked.is_err() {
                continue;
            }
            if level == 1 {
                return Some(value);
            }
            level -= 1;
            table = value & ADDRESS;
            if level == 1 {
                processor.tlb.lock().unwrap().tables.insert(range, table);
            }
        }
    }
}

impl TlbFlush for Host {
    fn flush_all(&self) {
        let all = self.0.processors.iter().enumerate();
        let reached = || {
            all.clone()
                .filter(|(number, _)| *number != 1 || self.0.flushes != Flushes::MissOne)
                .map(|(_, processor)| processor)
        };
        for processor in reached() {
            processor.request.store(true, Ordering::SeqCst);
        }
        if self.0.flushes == Flushes::DoNotWait {
            return;
        }
        // One that runs guest code leaves it; one that has seen the request has no old translation.
        for processor in reached() {
            while processor.is_inside.load(Ordering::SeqCst)
                && processor.request.load(Ordering::SeqCst)
            {
                shuttle::thread::yield_now();
            }
        }
    }
}

impl Frames for Host {
    fn allocate(&self, _: Zone) -> Option<Hpa> {
        self.switch();
        let start = self.0.next.fetch_add(1, Ordering::SeqCst);
        let number = (start..start + FRAMES)
            .map(|number| number % FRAMES)
            .find(|number| !self.0.is_used[*number].swap(true, Ordering::SeqCst))?;
        for word in &self.0.frames[number * 512..][..512] {
            word.store(0, Ordering::SeqCst);
        }
        Some(Pfn::new(FIRST_FRAME + number as u64).base())
    }

    fn free(&self, frame: Hpa) {
        let number = (Pfn::containing(frame).as_u64() - FIRST_FRAME) as usize;
        assert!(
            self.0.is_used[number].swap(false, Ordering::SeqCst),
            "{frame} is freed twice"
        );
        for processor in &self.0.processors {
            // A request that is still to be seen comes before the next access.
            assert!(
                processor.request.load(Ordering::SeqCst)
                    || !processor
                        .tlb
                        .lock()
                        .unwrap()
                        .tables
                        .values()
                        .any(|table| *table == frame.as_u64()),
                "{frame} is freed while a processor knows it as a table"
            );
        }
    }

    fn load(&self, frame: Hpa, index: usize) -> u64 {
        self.entry(frame, index).load(Ordering::SeqCst)
    }

    fn store(&self, frame: Hpa, index: usize, value: u64) {
        self.entry(frame, index).store(value, Ordering::SeqCst);
    }

    fn swap(&self, frame: Hpa, index: usize, value: u64) -> u64 {
        self.entry(frame, index).swap(value, Ordering::SeqCst)
    }

    fn compare_exchange(
        &self,
        frame: Hpa,
        index: usize,
        current: u64,
        new: u64,
    ) -> Result<u64, u64> {
        let (success, failure) = (Ordering::SeqCst, Ordering::SeqCst);
        self.entry(frame, index)
            .compare_exchange(current, new, success, failure)
    }
}

impl GuestMemory for Host {
    fn frame(&self, slot: SlotId, page: u64, _: Touch) -> Result<Option<Pfn>, OutOfMemory> {
        Ok(Some(Pfn::new(u64::from(slot.0) + page)))
    }

    fn load_u32(&self, frame: Pfn, offset: usize) -> u32 {
        (self.load_u64(frame, offset & !7) >> (offset % 8 * 8)) as u32
    }

    fn load_u64(&self, frame: Pfn, offset: usize) -> u64 {
        self.switch();
        self.memory(frame.as_u64(), offset as u64 / 8)
            .load(Ordering::SeqCst)
    }

    fn compare_exchange_u32(&self, _: Pfn, _: usize, _: u32, _: u32) -> Result<u32, u32> {
        unreachable!("the guest's entries have 8 bytes")
    }

    fn compare_exchange_u64(
        &self,
        frame: Pfn,
        offset: usize,
        current: u64,
        new: u64,
    ) -> Result<u64, u64> {
        self.switch();
        let (success, failure) = (Ordering::SeqCst, Ordering::SeqCst);
        self.memory(frame.as_u64(), offset as u64 / 8)
            .compare_exchange(current, new, success, failure)
    }
}
