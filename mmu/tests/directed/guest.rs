//! A guest whose tables a test makes entry by entry, and whose processors are simulated.

use crate::common::{Cpu, SimHost, Try};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use umbra_mmu::*;
use umbra_vcpu::address::{Gfn, Gva};
use x86_64::registers::control::{Cr0Flags, Cr4Flags, EferFlags};
use x86_64::structures::idt::PageFaultErrorCode as Code;

pub const P: u64 = 1;
pub const W: u64 = 2;
pub const U: u64 = 4;
pub const A: u64 = 0x20;
pub const D: u64 = 0x40;
pub const PS: u64 = 0x80;
/// What an ordinary link has.
pub const TABLE: u64 = P | W | U | A;

pub const SLOT: SlotId = SlotId(0);
pub const PAGES: u64 = 2048;

pub struct Guest {
    pub mmu: Arc<Mmu<SimHost>>,
    pub pool: MmuPool<SimHost>,
    pub host: SimHost,
    pub cpus: Vec<Cpu>,
    pub next_table: u64,
}

pub fn read(gva: u64) -> Try {
    Try {
        gva: Gva::new(gva),
        kind: AccessKind::Read,
        user: false,
        ac: false,
    }
}

pub fn write(gva: u64) -> Try {
    Try {
        kind: AccessKind::Write,
        ..read(gva)
    }
}

pub fn execute(gva: u64) -> Try {
    Try {
        kind: AccessKind::Execute,
        ..read(gva)
    }
}

pub fn by_user(attempt: Try) -> Try {
    Try {
        user: true,
        ..attempt
    }
}

/// 4-level paging with the given root table; WP and NXE set.
pub fn long_mode(root: u64) -> PagingRegisters {
    PagingRegisters {
        cr0: Cr0Flags::PROTECTED_MODE_ENABLE | Cr0Flags::PAGING | Cr0Flags::WRITE_PROTECT,
        cr3: Cr3::new(root << 12),
        cr4: Cr4Flags::PHYSICAL_ADDRESS_EXTENSION,
        efer: EferFlags::LONG_MODE_ENABLE | EferFlags::NO_EXECUTE_ENABLE,
        pdptrs: Pdptrs::default(),
    }
}

impl Guest {
    pub fn with(config: MmuConfig) -> Self {
        let host = SimHost::new(PAGES as usize, 4000);
        let pool = MmuPool::new(100_000);
        let mmu = pool.create(host.clone(), config);
        host.set_slot(SLOT, 0);
        mmu.add_slot(MemorySlot {
            id: SLOT,
            base: Gfn::new(0),
            pages: PAGES,
            flags: SlotFlags::empty(),
        })
        .unwrap();
        for page in 0..PAGES {
            host.touch(page);
        }
        let cpu = Cpu::new(&mmu);
        Self {
            mmu,
            pool,
            host,
            cpus: vec![cpu],
            next_table: 1,
        }
    }

    pub fn new() -> Self {
        Self::with(MmuConfig {
            limit: 1000,
            prefetch: 1,
            ..MmuConfig::default()
        })
    }

    /// A zeroed page for a table.
    pub fn table(&mut self) -> u64 {
        self.next_table += 1;
        self.next_table - 1
    }

    /// Writes a table's entry as the guest's loader would, before anything is shadowed.
    pub fn set(&self, table: u64, index: u64, value: u64) {
        self.host
            .word(table, index as usize)
            .store(value, Ordering::Relaxed);
    }

    pub fn get(&self, table: u64, index: u64) -> u64 {
        self.host
            .word(table, index as usize)
            .load(Ordering::Relaxed)
    }

    /// Maps `gva` to `value` by 4 KiB through tables that it makes as needed.
    pub fn map(&mut self, root: u64, gva: u64, value: u64) {
        let mut table = root;
        for level in [4, 3, 2] {
            let index = gva >> (12 + 9 * (level - 1)) & 511;
            let mut entry = self.get(table, index);
            if entry & P == 0 {
                entry = self.table() << 12 | TABLE;
                self.set(table, index, entry);
            }
            table = entry >> 12 & 0xff_ffff;
        }
        self.set(table, gva >> 12 & 511, value);
    }

    /// The table that holds the level-1 entry of `gva`.
    pub fn leaf_table(&self, root: u64, gva: u64) -> u64 {
        let directory = self.directory(root, gva);
        self.get(directory, gva >> 21 & 511) >> 12 & 0xff_ffff
    }

    /// The table above that.
    pub fn directory(&self, root: u64, gva: u64) -> u64 {
        (3..=4).rev().fold(root, |table, level| {
            self.get(table, gva >> (12 + 9 * (level - 1)) & 511) >> 12 & 0xff_ffff
        })
    }

    pub fn load(&mut self, cpu: usize, registers: PagingRegisters) {
        self.mmu.load_registers(&mut self.cpus[cpu].vcpu, registers);
    }

    /// One access to its end, with the number of faults that it took.
    pub fn try_access(&mut self, cpu: usize, attempt: Try) -> (Result<u64, FaultOutcome>, usize) {
        let Cpu { vcpu, number } = &mut self.cpus[cpu];
        for faults in 0..20 {
            let entry = self.mmu.prepare_entry(vcpu).expect("a root");
            self.host.enter(*number, &entry);
            let cr4 = vcpu.registers().cr4;
            let error = match self.host.hardware(*number, &entry, cr4, &attempt) {
                Ok(frame) => return (Ok(self.host.ram_page(frame)), faults),
                Err(error) => error,
            };
            match self
                .mmu
                .handle_page_fault(vcpu, &attempt.fault(error))
                .expect("pages")
            {
                FaultOutcome::Fixed => {}
                other => return (Err(other), faults + 1),
            }
        }
        panic!("{attempt:x?} makes no progress");
    }

    pub fn page(&mut self, attempt: Try) -> u64 {
        let page = self.try_access(0, attempt).0.expect("memory");
        self.mmu.audit().unwrap();
        page
    }

    pub fn fault(&mut self, attempt: Try) -> Code {
        match self.try_access(0, attempt).0 {
            Err(FaultOutcome::Inject(fault)) => fault.error,
            other => panic!("{attempt:x?}: {other:x?}"),
        }
    }

    pub fn faults(&mut self, attempt: Try) -> usize {
        let (page, faults) = self.try_access(0, attempt);
        page.expect("memory");
        faults
    }
}

/// Maps 64 regions of 2 MiB, so that each needs a page table of its own.
pub fn regions(guest: &mut Guest, count: u64) -> u64 {
    let root = guest.table();
    for region in 0..count {
        guest.map(root, region << 21, (1000 + region) << 12 | TABLE | D);
    }
    guest.load(0, long_mode(root));
    root
}
