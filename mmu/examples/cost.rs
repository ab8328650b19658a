//! Does one thing many times, to be counted under callgrind:
//!
//! ```text
//! cargo build --release -p umbra-mmu --example cost
//! valgrind --tool=callgrind --callgrind-out-file=/dev/null target/release/examples/cost fill 10000
//! ```
//!
//! The cost of one is the difference between two counts. `fill COUNT` fills 4 KiB mappings whose
//! tables are all shadowed; `build COUNT` fills mappings that need three new pages each;
//! `zap PAGES BATCH` makes leaf tables and shrinks them away in batches.
#![allow(
    clippy::precedence,
    reason = "bits are written as the manual draws them"
)]

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use umbra_mmu::{
    Fault, Frames, GuestMemory, MemorySlot, MmuConfig, MmuPool, OutOfMemory, PagingRegisters,
    SlotFlags, SlotId, TlbFlush, Touch, Zone,
};
use umbra_vcpu::address::{Gfn, Gva, Hpa, Pfn};
use x86_64::registers::control::{Cr0Flags, Cr4Flags, EferFlags};
use x86_64::registers::rflags::RFlags;
use x86_64::structures::idt::PageFaultErrorCode;

struct Host {
    words: Vec<AtomicU64>,
    free: Mutex<Vec<u64>>,
}

impl Host {
    fn word(&self, frame: u64, index: usize) -> &AtomicU64 {
        &self.words[frame as usize * 512 + index]
    }

    fn entry(&self, frame: Hpa, index: usize) -> &AtomicU64 {
        self.word(Pfn::containing(frame).as_u64(), index)
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
        self.word(frame.as_u64(), offset / 8).load(Relaxed)
    }
    fn compare_exchange_u32(&self, _: Pfn, _: usize, current: u32, _: u32) -> Result<u32, u32> {
        Ok(current)
    }
    fn compare_exchange_u64(
        &self,
        frame: Pfn,
        offset: usize,
        current: u64,
        new: u64,
    ) -> Result<u64, u64> {
        self.word(frame.as_u64(), offset / 8)
            .compare_exchange(current, new, Relaxed, Relaxed)
    }
}

impl Frames for Host {
    fn allocate(&self, _: Zone) -> Option<Hpa> {
        self.free
            .lock()
            .ok()?
            .pop()
            .map(|frame| Pfn::new(frame).base())
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
    fn flush_all(&self) {}
}

const LINK: u64 = 0x67;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let number = |index: usize| -> u64 {
        arguments
            .get(index)
            .and_then(|text| text.parse().ok())
            .unwrap_or(1000)
    };
    let what = arguments.get(1).map_or("fill", String::as_str);
    let count = number(2);
    // One page table that maps frame 0 everywhere serves all addresses: tables 1 to 4.
    let frames = 8 + 4 * count.min(20_000) + 64;
    let host = Host {
        words: (0..frames * 512).map(|_| AtomicU64::new(0)).collect(),
        free: Mutex::new((8..frames).collect()),
    };
    for index in 0..512 {
        host.word(1, index).store(2 << 12 | LINK, Relaxed);
        host.word(2, index).store(3 << 12 | LINK, Relaxed);
        host.word(3, index).store(4 << 12 | LINK, Relaxed);
        host.word(4, index).store(5 << 12 | LINK, Relaxed);
    }
    let pool = MmuPool::new(usize::MAX);
    let config = MmuConfig {
        limit: 1 << 20,
        prefetch: 1,
        ..MmuConfig::default()
    };
    let mmu = pool.create(host, config);
    let memory = MemorySlot {
        id: SlotId(0),
        base: Gfn::new(0),
        pages: 8,
        flags: SlotFlags::empty(),
    };
    mmu.add_slot(memory).expect("the first slot");
    let mut vcpu = mmu.create_vcpu().expect("memory");
    let registers = PagingRegisters {
        cr0: Cr0Flags::PROTECTED_MODE_ENABLE | Cr0Flags::PAGING | Cr0Flags::WRITE_PROTECT,
        cr3: umbra_mmu::Cr3::new(1 << 12),
        cr4: Cr4Flags::PHYSICAL_ADDRESS_EXTENSION,
        efer: EferFlags::LONG_MODE_ENABLE,
        ..PagingRegisters::RESET
    };
    mmu.load_registers(&mut vcpu, registers);
    let mut touch = |gva: u64| {
        mmu.prepare_entry(&mut vcpu).expect("memory");
        let fault = Fault {
            gva: Gva::new(gva),
            error: PageFaultErrorCode::empty(),
            cpl: 0,
            rflags: RFlags::empty(),
        };
        mmu.handle_page_fault(&mut vcpu, &fault).expect("memory");
    };
    match what {
        "fill" => (0..count).for_each(|index| touch((index % 512) << 12)),
        "build" => {
            for index in 0..count {
                touch((index % 256) << 39);
                pool.scan(100);
            }
        }
        _ => {
            // Every page table is the same frame with one role, so it takes different rights in the
            // levels above to get many: a root for each instead.
            for index in 0..count {
                touch(index << 12);
            }
            while pool.scan(number(3) as usize).freed > 0 {}
        }
    }
    println!("{:?}", mmu.statistics());
}
