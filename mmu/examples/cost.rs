//! Does one thing many times, to be counted under callgrind:
//!
//! ```text
//! cargo build --release -p umbra-mmu --example cost
//! valgrind --tool=callgrind --callgrind-out-file=/dev/null --toggle-collect='cost::measured*' \
//!     target/release/examples/cost fill 10000
//! ```
//!
//! callgrind counts each round of a repeated instruction, so for `build`, which clears memory, set
//! `GLIBC_TUNABLES=glibc.cpu.x86_rep_stosb_threshold=1000000`.
//!
//! Only what is inside of `measured` is counted. `fill COUNT PREFETCH` fills 4 KiB mappings whose tables
//! are all shadowed; `build COUNT` fills mappings that need three new pages each; `zap PAGES BATCH
//! STRIDE` makes leaf tables, which map other pages each or with stride 0 all the same, and takes them
//! away in batches; `trace hot|scan PAGES clock|fifo any|one PREFETCH`
//! counts the faults of a guest that has fewer pages than it needs, and says what the best of all
//! policies, which knows the future, would have to fetch.
//!
//! `wp COUNT` and `pge COUNT` clear CR0.WP or set CR4.PGE and undo it; `cr3 COUNT TABLES MAPPINGS`
//! switches to another cached root and back after the guest has written so many page tables with so
//! many mappings each; `invlpg COUNT TABLES` drops an address after writes to other tables; `write
//! COUNT MAPPINGS` is the guest's first write to a page table that is in step.
#![allow(
    clippy::precedence,
    reason = "bits are written as the manual draws them"
)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use umbra_mmu::{
    Cr3, Fault, Frames, GuestMemory, MemorySlot, Mmu, MmuConfig, MmuPool, OutOfMemory,
    PagingRegisters, SlotFlags, SlotId, TlbFlush, Touch, Vcpu, VictimPolicy, Zone,
};
use umbra_vcpu::address::{Gfn, Gva, Hpa, Pfn};
use x86_64::registers::control::{Cr0Flags, Cr4Flags, EferFlags};
use x86_64::registers::rflags::RFlags;
use x86_64::structures::idt::PageFaultErrorCode;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

struct Counting;

// SAFETY: everything is left to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Relaxed);
        // SAFETY: the caller's promises are the same.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are the same.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const LINK: u64 = 0x67;
/// Where the guest's tables of each level lie, and the memory that they map. Nothing of it is stored:
/// an entry is computed when it is read. There are two roots, without a table in common for the same
/// address, and the last entry of each page table maps that table.
const OTHER_4: u64 = 0;
const TABLES_4: u64 = 1;
const TABLES_3: u64 = 2;
const TABLES_2: u64 = TABLES_3 + 512;
const TABLES_1: u64 = TABLES_2 + 512 * 512;
const MEMORY: u64 = TABLES_1 + (1 << 18);
const PAGES: u64 = MEMORY + (1 << 21);
/// The entry of a page table that maps the table.
const OWN: u64 = 511;

struct Host {
    words: Vec<AtomicU64>,
    free: Mutex<Vec<u64>>,
    flushes: AtomicU64,
    /// Pages of memory from one table's first to the next one's.
    stride: u64,
}

impl Host {
    fn entry(&self, frame: Hpa, index: usize) -> &AtomicU64 {
        &self.words[Pfn::containing(frame).as_u64() as usize * 512 + index]
    }
}

impl GuestMemory for Host {
    fn frame(&self, _: SlotId, page: u64, _: Touch) -> Result<Option<Pfn>, OutOfMemory> {
        Ok(Some(Pfn::new(page)))
    }
    fn load_u32(&self, frame: Pfn, offset: usize) -> u32 {
        (self.load_u64(frame, offset & !7) >> (offset % 8 * 8)) as u32
    }
    fn load_u64(&self, frame: Pfn, offset: usize) -> u64 {
        let (table, index) = (frame.as_u64(), offset as u64 / 8);
        let below = |first: u64, tables: u64| tables + (table - first) * 512 + index;
        let target = match table {
            MEMORY.. => 0,
            TABLES_1.. if index == OWN => table,
            TABLES_1.. => MEMORY + ((table - TABLES_1) * self.stride + index) % (PAGES - MEMORY),
            TABLES_2.. => TABLES_1 + below(TABLES_2, 0) % (MEMORY - TABLES_1),
            TABLES_3.. => below(TABLES_3, TABLES_2),
            TABLES_4.. => TABLES_3 + index,
            _ => TABLES_3 + (index + 256) % 512,
        };
        target << 12 | LINK
    }
    fn compare_exchange_u32(&self, _: Pfn, _: usize, current: u32, _: u32) -> Result<u32, u32> {
        Ok(current)
    }
    fn compare_exchange_u64(&self, _: Pfn, _: usize, current: u64, _: u64) -> Result<u64, u64> {
        Ok(current)
    }
}

impl Frames for Host {
    fn allocate(&self, _: Zone) -> Option<Hpa> {
        let frame = self.free.lock().ok()?.pop()?;
        Some(Pfn::new(frame).base())
    }
    fn free(&self, frame: Hpa) {
        if let Ok(mut free) = self.free.lock() {
            free.push(Pfn::containing(frame).as_u64());
        }
    }
    fn load(&self, frame: Hpa, index: usize) -> u64 {
        self.entry(frame, index).load(Relaxed)
    }
    fn store(&self, frame: Hpa, index: usize, value: u64) {
        self.entry(frame, index).store(value, Relaxed);
    }
    fn swap(&self, frame: Hpa, index: usize, value: u64) -> u64 {
        self.entry(frame, index).swap(value, Relaxed)
    }
    fn compare_exchange(
        &self,
        frame: Hpa,
        index: usize,
        current: u64,
        new: u64,
    ) -> Result<u64, u64> {
        self.entry(frame, index)
            .compare_exchange(current, new, Relaxed, Relaxed)
    }
}

impl TlbFlush for Host {
    fn flush_all(&self) {
        self.flushes.fetch_add(1, Relaxed);
    }
}

/// What callgrind counts.
#[inline(never)]
fn measured<R>(work: impl FnOnce() -> R) -> R {
    work()
}

const REGISTERS: PagingRegisters = PagingRegisters {
    cr0: Cr0Flags::PROTECTED_MODE_ENABLE
        .union(Cr0Flags::PAGING)
        .union(Cr0Flags::WRITE_PROTECT),
    cr3: Cr3::new(TABLES_4 << 12),
    cr4: Cr4Flags::PHYSICAL_ADDRESS_EXTENSION,
    efer: EferFlags::LONG_MODE_ENABLE,
    ..PagingRegisters::RESET
};

struct Guest {
    mmu: Arc<Mmu<Host>>,
    vcpu: Vcpu,
    faults: u64,
}

impl Guest {
    fn new(frames: u64, stride: u64) -> Self {
        let config = MmuConfig {
            limit: 1 << 20,
            prefetch: 1,
            ..MmuConfig::default()
        };
        Self::with(frames, config, stride)
    }

    fn with(frames: u64, config: MmuConfig, stride: u64) -> Self {
        let host = Host {
            words: (0..frames * 512).map(|_| AtomicU64::new(0)).collect(),
            free: Mutex::new((1..frames).collect()),
            flushes: AtomicU64::new(0),
            stride,
        };
        let mmu = MmuPool::new(usize::MAX).create(host, config);
        let memory = MemorySlot {
            id: SlotId(0),
            base: Gfn::new(0),
            pages: PAGES,
            flags: SlotFlags::empty(),
        };
        mmu.add_slot(memory).expect("the first slot");
        let mut vcpu = mmu.create_vcpu().expect("memory");
        mmu.load_registers(&mut vcpu, REGISTERS);
        let mut guest = Self {
            mmu,
            vcpu,
            faults: 0,
        };
        guest.fault(0);
        guest
    }

    fn fault(&mut self, gva: u64) {
        self.mmu.prepare_entry(&mut self.vcpu).expect("memory");
        self.handle(gva);
    }

    fn handle(&mut self, gva: u64) {
        self.handle_with(gva, PageFaultErrorCode::empty());
    }

    fn handle_with(&mut self, gva: u64, error: PageFaultErrorCode) {
        let fault = Fault {
            gva: Gva::new(gva),
            error,
            cpl: 0,
            rflags: RFlags::empty(),
        };
        self.mmu
            .handle_page_fault(&mut self.vcpu, &fault)
            .expect("memory");
        self.faults += 1;
    }

    /// Loads registers and goes back into the guest.
    fn load(&mut self, registers: PagingRegisters) {
        self.mmu.load_registers(&mut self.vcpu, registers);
        self.mmu.prepare_entry(&mut self.vcpu).expect("memory");
    }

    /// Fills as many mappings of the page table with this number, and the mapping of the table itself.
    fn fill_table(&mut self, table: u64, mappings: u64) {
        for page in (0..mappings).chain([OWN]) {
            self.handle(table << 21 | page << 12);
        }
    }

    /// Writes to a page table, which is write-protected while it is in step.
    fn write_table(&mut self, table: u64) {
        let error = PageFaultErrorCode::PROTECTION_VIOLATION | PageFaultErrorCode::CAUSED_BY_WRITE;
        self.handle_with(table << 21 | OWN << 12, error);
    }

    /// Reads as the hardware does: sets accessed bits on the way, faults where nothing is mapped.
    fn read(&mut self, gva: u64) {
        let entry = self.mmu.prepare_entry(&mut self.vcpu).expect("memory");
        let mut table = entry.root;
        for level in (0..4).rev() {
            let index = (gva >> (12 + 9 * level) & 511) as usize;
            let entry = self.mmu.host().entry(table, index);
            if entry.load(Relaxed) & 1 == 0 {
                return self.fault(gva);
            }
            let value = entry.fetch_or(0x20, Relaxed);
            table = Hpa::new(value & 0x000f_ffff_ffff_f000);
        }
    }
}

fn fill(count: u64, prefetch: usize) {
    let config = MmuConfig {
        limit: 1 << 20,
        prefetch,
        ..MmuConfig::default()
    };
    let mut guest = Guest::with(8 + count / 8, config, 512);
    for number in 0..count {
        // The first group of entries in each table is filled by the fault that makes the table.
        let groups = (512 / prefetch - 1) as u64;
        let (table, group) = (number / groups, number % groups + 1);
        let gva = table << 21 | (group * prefetch as u64) << 12;
        if group == 1 {
            guest.fault(gva & !0x1f_ffff);
        }
        measured(|| guest.handle(gva));
    }
    println!("{count} mappings filled: {:?}", guest.mmu.statistics());
}

fn build(count: u64) {
    assert!(count < 256, "the lower half has 256 ranges of 512 GiB");
    let mut guest = Guest::new(16 + 4 * count, 512);
    // A page table of its own for each path, so that three pages are made.
    let paths = || (1..=count).map(|range| range << 39 | range << 21);
    // Once for all that grows by doubling.
    paths().for_each(|gva| guest.handle(gva));
    guest.mmu.zap_all();
    guest.mmu.release_caches();
    guest.fault(0);
    let made = guest.mmu.statistics().mmu_cache_miss;
    for gva in paths() {
        measured(|| guest.handle(gva));
    }
    let statistics = guest.mmu.statistics();
    println!(
        "{count} paths built of {} pages: {statistics:?}",
        statistics.mmu_cache_miss - made
    );
}

fn zap(pages: usize, batch: usize, stride: u64) {
    let mut guest = Guest::new(pages as u64 + 1024, stride);
    let mut gva = 0;
    while guest.mmu.used() < pages {
        for page in 0..4 {
            guest.handle(gva + (page << 12));
        }
        gva += 1 << 21;
    }
    guest.mmu.release_caches();
    let held = guest.mmu.used();
    let (flushes, allocations) = (
        guest.mmu.host().flushes.load(Relaxed),
        ALLOCATIONS.load(Relaxed),
    );
    let mut batches = 0;
    let mut limit = guest.mmu.used();
    while limit > batch {
        limit -= batch;
        measured(|| guest.mmu.set_limit(limit));
        batches += 1;
        // An upper table takes along what only it pointed to.
        limit = limit.min(guest.mmu.used());
    }
    println!(
        "{} of {held} pages zapped in {batches} batches, {} flushes, {} allocations",
        held - guest.mmu.used(),
        guest.mmu.host().flushes.load(Relaxed) - flushes,
        ALLOCATIONS.load(Relaxed) - allocations
    );
}

/// Registers that the guest loads in turn, with nothing to bring up to date.
fn toggle(count: u64, other: PagingRegisters) {
    let mut guest = Guest::new(1024, 512);
    for _ in 0..2 {
        guest.load(other);
        guest.handle(0);
        guest.load(REGISTERS);
    }
    for _ in 0..count {
        measured(|| {
            guest.load(other);
            guest.load(REGISTERS);
        });
    }
    println!(
        "{count} toggles there and back: {:?}",
        guest.mmu.statistics()
    );
}

/// Switches between two cached roots: away from the one whose `tables` page tables the guest has just
/// written, and back to it.
fn load_cr3(count: u64, tables: u64, mappings: u64) {
    let mut guest = Guest::new(4096, 512);
    let other = PagingRegisters {
        cr3: Cr3::new(OTHER_4 << 12),
        ..REGISTERS
    };
    for registers in [other, REGISTERS] {
        guest.load(registers);
        (0..tables.max(1)).for_each(|table| guest.fill_table(table, mappings));
    }
    for _ in 0..count {
        (0..tables).for_each(|table| guest.write_table(table));
        measured(|| {
            guest.load(other);
            guest.load(REGISTERS);
        });
    }
    println!("{count} switches and back: {:?}", guest.mmu.statistics());
}

fn invalidate(count: u64, tables: u64) {
    let mut guest = Guest::new(4096, 512);
    (0..=tables).for_each(|table| guest.fill_table(table, 32));
    (1..=tables).for_each(|table| guest.write_table(table));
    for _ in 0..count {
        measured(|| {
            guest
                .mmu
                .invalidate_page(&mut guest.vcpu, Gva::new(1 << 12));
            guest.mmu.prepare_entry(&mut guest.vcpu).expect("memory");
        });
    }
    println!("{count} addresses dropped: {:?}", guest.mmu.statistics());
}

fn write_table(count: u64, mappings: u64) {
    let mut guest = Guest::new(1024, 512);
    guest.fill_table(0, mappings);
    for _ in 0..count {
        measured(|| guest.write_table(0));
        guest.load(REGISTERS);
    }
    println!("{count} first writes: {:?}", guest.mmu.statistics());
}

const REGIONS: usize = 256;
const READS: usize = 100_000;

/// 256 regions of 2 MiB: nine of ten reads go to 16 hot ones (`hot`), or to those while every tenth
/// goes to the next of the others in turn (`scan`). Each read takes one of the region's 512 pages
/// (`any`), or always the same (`one`).
fn reads(kind: &str, place: &str) -> Vec<(usize, u64)> {
    let mut random: u64 = 1;
    let mut cold: u64 = 0;
    let mut pick = |below: u64| {
        random = random
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (random >> 33) % below
    };
    (0..READS)
        .map(|step| {
            let region = match kind {
                "hot" if pick(10) > 0 => pick(16) * 16,
                "hot" => pick(REGIONS as u64),
                _ if step % 10 > 0 => pick(16) * 16,
                _ => {
                    cold += 1;
                    cold % REGIONS as u64
                }
            };
            let page = if place == "one" { 0 } else { pick(512) };
            (region as usize, page)
        })
        .collect()
}

/// Belady's optimum: how often a region's table must be made if `tables` fit and always that one goes
/// whose next use is farthest away.
fn optimum(reads: &[(usize, u64)], tables: usize) -> usize {
    let mut next = vec![usize::MAX; reads.len()];
    let mut seen = [usize::MAX; REGIONS];
    for (at, (region, _)) in reads.iter().enumerate().rev() {
        next[at] = std::mem::replace(&mut seen[*region], at);
    }
    let mut held = std::collections::HashMap::new();
    let mut made = 0;
    for (at, (region, _)) in reads.iter().enumerate() {
        if held.insert(*region, next[at]).is_none() {
            made += 1;
            if held.len() > tables {
                let farthest = held.iter().max_by_key(|(_, next)| **next);
                let victim = *farthest.expect("there are tables").0;
                held.remove(&victim);
            }
        }
    }
    made
}

fn trace(kind: &str, pages: usize, victims: VictimPolicy, place: &str, prefetch: usize) {
    let config = MmuConfig {
        limit: pages,
        victims,
        prefetch,
        ..MmuConfig::default()
    };
    let mut guest = Guest::with(4096, config, 512);
    guest.faults = 0;
    let mut hot_faults = 0;
    let reads = reads(kind, place);
    for (region, page) in &reads {
        let before = guest.faults;
        measured(|| guest.read((*region as u64) << 21 | page << 12));
        if region % 16 == 0 {
            hot_faults += guest.faults - before;
        }
    }
    println!(
        "{kind} trace, {place} page, {pages} pages, prefetch {prefetch}, {victims:?}: {} faults in {READS} reads, \
         {hot_faults} in hot regions; {} tables made, {} by the optimum",
        guest.faults,
        guest.mmu.statistics().mmu_cache_miss,
        optimum(&reads, pages - 3)
    );
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let text = |index: usize| arguments.get(index).map_or("", String::as_str);
    let number = |index: usize, default: u64| text(index).parse().unwrap_or(default);
    match text(1) {
        "build" => build(number(2, 250)),
        "wp" => {
            let cr0 = REGISTERS.cr0 - Cr0Flags::WRITE_PROTECT;
            toggle(number(2, 1000), PagingRegisters { cr0, ..REGISTERS });
        }
        "pge" => {
            let cr4 = REGISTERS.cr4 | Cr4Flags::PAGE_GLOBAL;
            toggle(number(2, 1000), PagingRegisters { cr4, ..REGISTERS });
        }
        "cr3" => load_cr3(number(2, 1000), number(3, 0), number(4, 64)),
        "invlpg" => invalidate(number(2, 1000), number(3, 0)),
        "write" => write_table(number(2, 1000), number(3, 64)),
        "zap" => {
            let (pages, batch) = (number(2, 1000), number(3, 25));
            zap(pages as usize, batch as usize, number(4, 8));
        }
        "trace" => {
            let victims = match text(4) {
                "fifo" => VictimPolicy::Fifo,
                _ => VictimPolicy::Clock,
            };
            let pages = number(3, 64) as usize;
            let prefetch = number(6, MmuConfig::default().prefetch as u64) as usize;
            trace(text(2), pages, victims, text(5), prefetch);
        }
        _ => fill(number(2, 1000), number(3, 1) as usize),
    }
}
