//! How many faults a guest takes that has fewer shadow pages than it needs: CLOCK must keep what is
//! used again and again, whatever passes by once.
#![allow(missing_docs, reason = "a test")]
#![allow(
    clippy::precedence,
    reason = "bits are written as the manual draws them"
)]

mod common;

use common::{Cpu, SimHost, Try};
use umbra_mmu::*;
use umbra_vcpu::address::{Gfn, Gva};
use x86_64::registers::control::{Cr0Flags, Cr4Flags, EferFlags};

const REGIONS: u64 = 256;
const READS: u64 = 100_000;
/// Present, writable, user, accessed, dirty.
const ENTRY: u64 = 0x67;
/// The guest's root, pointers and directory, then one page table for each region, then memory.
const FIRST_TABLE: u64 = 4;
const MEMORY: u64 = FIRST_TABLE + REGIONS;
const MEMORY_PAGES: u64 = 1024;

#[derive(Clone, Copy, Debug)]
enum Kind {
    /// Nine of ten reads go to 16 of the regions, the others anywhere.
    Hot,
    /// Nine of ten reads go to 16 of the regions, the others to the next of all in turn.
    Scan,
}

/// Reads of any page in the regions: the faults that they take.
fn faults(kind: Kind, limit: usize, victims: VictimPolicy, prefetch: usize) -> u64 {
    let host = SimHost::new((MEMORY + MEMORY_PAGES) as usize, 256);
    host.set_slot(SlotId(0), 0);
    for page in 0..MEMORY + MEMORY_PAGES {
        host.touch(page);
    }
    let set = |table: u64, index: u64, value: u64| {
        host.word(table, index as usize)
            .store(value << 12 | ENTRY, std::sync::atomic::Ordering::Relaxed);
    };
    set(1, 0, 2);
    set(2, 0, 3);
    for region in 0..REGIONS {
        set(3, region, FIRST_TABLE + region);
        for index in 0..512 {
            let page = (region * 512 + index) % MEMORY_PAGES;
            set(FIRST_TABLE + region, index, MEMORY + page);
        }
    }
    let config = MmuConfig {
        limit,
        victims,
        prefetch,
        ..MmuConfig::default()
    };
    let mmu = MmuPool::new(usize::MAX).create(host.clone(), config);
    mmu.add_slot(MemorySlot {
        id: SlotId(0),
        base: Gfn::new(0),
        pages: MEMORY + MEMORY_PAGES,
        flags: SlotFlags::empty(),
    })
    .unwrap();
    let mut cpu = Cpu::new(&mmu);
    mmu.load_registers(
        &mut cpu.vcpu,
        PagingRegisters {
            cr0: Cr0Flags::PROTECTED_MODE_ENABLE | Cr0Flags::PAGING | Cr0Flags::WRITE_PROTECT,
            cr3: Cr3::new(1 << 12),
            cr4: Cr4Flags::PHYSICAL_ADDRESS_EXTENSION,
            efer: EferFlags::LONG_MODE_ENABLE,
            ..PagingRegisters::RESET
        },
    );
    let mut random: u64 = 1;
    let mut pick = |below: u64| {
        random = random
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (random >> 33) % below
    };
    for read in 0..READS {
        let region = match kind {
            _ if !read.is_multiple_of(10) => pick(16) * 16,
            Kind::Hot => pick(REGIONS),
            Kind::Scan => read / 10 % REGIONS,
        };
        let attempt = Try {
            gva: Gva::new(region << 21 | pick(512) << 12),
            kind: AccessKind::Read,
            user: false,
            ac: false,
        };
        loop {
            let entry = mmu.prepare_entry(&mut cpu.vcpu).unwrap();
            host.enter(cpu.number, &entry);
            match host.hardware(cpu.number, &entry, Cr4Flags::empty(), &attempt) {
                Ok(_) => break,
                Err(error) => {
                    let fixed = mmu.handle_page_fault(&mut cpu.vcpu, &attempt.fault(error));
                    assert_eq!(fixed, Ok(FaultOutcome::Fixed));
                }
            }
        }
    }
    mmu.audit().unwrap();
    mmu.statistics().pf_taken
}

/// The victims that a VM has unless it is told otherwise cost at most 35 % of FIFO's faults.
fn default_policy_beats_fifo(kind: Kind) {
    for limit in [64, 128] {
        for prefetch in [MmuConfig::default().prefetch, 1] {
            let fifo = faults(kind, limit, VictimPolicy::Fifo, prefetch);
            let clock = faults(kind, limit, MmuConfig::default().victims, prefetch);
            println!("{kind:?}, {limit} pages, prefetch {prefetch}: {clock} faults of {fifo}");
            assert!(
                clock * 100 <= fifo * 35,
                "{kind:?}, {limit} pages, prefetch {prefetch}: {clock} faults of {fifo}"
            );
        }
    }
}

#[test]
fn hot_tables_stay_beside_random_reads() {
    default_policy_beats_fifo(Kind::Hot);
}

#[test]
fn hot_tables_stay_beside_a_scan() {
    default_policy_beats_fifo(Kind::Scan);
}
