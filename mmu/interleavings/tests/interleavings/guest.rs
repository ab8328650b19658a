//! A guest with several processors, which use and change one set of page tables.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use umbra_mmu_interleavings::{
    Cr3, Fault, FaultOutcome, MemorySlot, MmioTarget, Mmu, MmuConfig, MmuError, MmuPool,
    PagingRegisters, Pdptrs, SlotFlags, SlotId, Vcpu,
};
use umbra_vcpu::address::{Gfn, Gva};
use x86_64::registers::control::{Cr0Flags, Cr4Flags, EferFlags};
use x86_64::registers::rflags::RFlags;
use x86_64::structures::idt::PageFaultErrorCode as Code;

use crate::host::{Flushes, Host, Met};
use crate::random::Random;

/// Present, writable, user; accessed and dirty, so that marking them changes nothing.
const ENTRY: u64 = 0x67;
/// The tables: root, pointers, directory, two page tables of memory, one of these two tables.
const ROOT: u64 = 1;
const FIRST_TABLE: u64 = 4;
const TABLES: u64 = 2;
const TABLE_OF_TABLES: u64 = 6;
/// Each table's first entries map pages of a group of its own.
const ENTRIES: u64 = 2;
const GROUP: u64 = 4;
const FIRST_GROUP: u64 = 8;
/// The entry of table 0 for memory that can be taken away, and of table 1 for memory whose writes
/// are logged. A slot's number is its first page's.
const SPECIAL: u64 = ENTRIES;
pub const REMOVABLE: SlotId = SlotId(16);
pub const LOGGED: SlotId = SlotId(20);

/// How often a processor tries one access. Each failure had a cause in what another one did.
const ATTEMPTS: usize = 20_000;

pub fn removable() -> MemorySlot {
    slot(REMOVABLE, 2, SlotFlags::empty())
}

fn slot(id: SlotId, pages: u64, flags: SlotFlags) -> MemorySlot {
    let base = Gfn::new(u64::from(id.0));
    MemorySlot {
        id,
        base,
        pages,
        flags,
    }
}

pub struct Guest {
    pub mmu: Arc<Mmu<Host>>,
    pub host: Host,
    /// The removable memory is gone: nobody may reach it.
    pub is_removed: AtomicBool,
    /// The logged page was written.
    pub is_written: AtomicBool,
    /// Every page that an entry ever named, in order.
    history: Mutex<HashMap<(u64, u64), Vec<u64>>>,
}

/// A virtual CPU and what it must not have forgotten.
pub struct Cpu {
    vcpu: Vcpu,
    number: usize,
    random: Random,
    /// For each entry: how much of its history may not be used any more.
    flushed: HashMap<(u64, u64), usize>,
}

fn gva(table: u64, index: u64) -> Gva {
    Gva::new(table << 21 | index << 12)
}

impl Guest {
    pub fn new(pool: &MmuPool<Host>, processors: usize, flushes: Flushes) -> Arc<Self> {
        let host = Host::new(processors, flushes);
        let config = MmuConfig {
            limit: 12,
            prefetch: 2,
            ..MmuConfig::default()
        };
        let mmu = pool.create(host.clone(), config);
        mmu.add_slot(slot(SlotId(0), 16, SlotFlags::empty()))
            .unwrap();
        mmu.add_slot(removable()).unwrap();
        mmu.add_slot(slot(LOGGED, 2, SlotFlags::LOG_DIRTY)).unwrap();
        let guest = Self {
            mmu,
            host,
            is_removed: AtomicBool::new(false),
            is_written: AtomicBool::new(false),
            history: Mutex::default(),
        };
        let set = |table, index, page: u64| {
            let word = guest.host.memory(table, index);
            word.store(page << 12 | ENTRY, Ordering::SeqCst);
        };
        set(ROOT, 0, ROOT + 1);
        set(ROOT + 1, 0, ROOT + 2);
        for table in 0..TABLES {
            set(ROOT + 2, table, FIRST_TABLE + table);
            set(TABLE_OF_TABLES, table, FIRST_TABLE + table);
            for index in 0..ENTRIES {
                let page = FIRST_GROUP + table * GROUP + index;
                set(FIRST_TABLE + table, index, page);
                guest.remember(table, index, page);
            }
        }
        set(ROOT + 2, TABLES, TABLE_OF_TABLES);
        set(FIRST_TABLE, SPECIAL, u64::from(REMOVABLE.0));
        set(FIRST_TABLE + 1, SPECIAL, u64::from(LOGGED.0));
        Arc::new(guest)
    }

    fn remember(&self, table: u64, index: u64, page: u64) {
        let mut history = self.history.lock().unwrap();
        history.entry((table, index)).or_default().push(page);
    }

    pub fn cpu(&self, number: usize, random: Random) -> Cpu {
        let mut vcpu = self.mmu.create_vcpu().unwrap();
        let registers = PagingRegisters {
            cr0: Cr0Flags::PROTECTED_MODE_ENABLE | Cr0Flags::PAGING | Cr0Flags::WRITE_PROTECT,
            cr3: Cr3::new(ROOT << 12),
            cr4: Cr4Flags::PHYSICAL_ADDRESS_EXTENSION,
            efer: EferFlags::LONG_MODE_ENABLE,
            pdptrs: Pdptrs::default(),
        };
        self.mmu.load_registers(&mut vcpu, registers);
        Cpu {
            vcpu,
            number,
            random,
            flushed: HashMap::new(),
        }
    }

    pub fn destroy(&self, cpu: Cpu) {
        self.mmu.destroy_vcpu(cpu.vcpu);
    }

    pub fn step(&self, cpu: &mut Cpu) {
        let (table, index) = (cpu.random.below(TABLES), cpu.random.below(ENTRIES));
        match cpu.random.below(12) {
            0..=4 => self.read(cpu, table, index),
            5..=7 => self.change(cpu, table, index),
            8 => self.flush(cpu),
            9 | 10 => self.write_logged(cpu),
            _ => self.read_removable(cpu),
        }
    }

    fn read(&self, cpu: &mut Cpu, table: u64, index: u64) {
        let flushed = cpu.flushed.get(&(table, index)).copied().unwrap_or(0);
        let reached = self.access(cpu, gva(table, index), false, |met| match met {
            Met::Page(page) => {
                let history = &self.history.lock().unwrap()[&(table, index)];
                assert!(
                    history[flushed..].contains(&page),
                    "entry {index} of table {table} led to page {page}, not to one of {history:?} from {flushed} on"
                );
            }
            Met::Fault { .. } => {}
        });
        assert_eq!(reached, Reached::Memory);
    }

    /// Lets an entry name another page of its group, through the table that maps the tables.
    fn change(&self, cpu: &mut Cpu, table: u64, index: u64) {
        let page = FIRST_GROUP + table * GROUP + cpu.random.below(GROUP);
        let reached = self.access(cpu, gva(TABLES, table), true, |met| {
            if let Met::Page(reached) = met {
                assert_eq!(reached, FIRST_TABLE + table);
                let word = self.host.memory(reached, index);
                word.store(page << 12 | ENTRY, Ordering::SeqCst);
                self.remember(table, index, page);
            }
        });
        assert_eq!(reached, Reached::Memory);
        let now = self.history.lock().unwrap()[&(table, index)].len() - 1;
        self.mmu.invalidate_page(&mut cpu.vcpu, gva(table, index));
        cpu.flushed.insert((table, index), now);
    }

    fn flush(&self, cpu: &mut Cpu) {
        let now: Vec<_> = {
            let history = self.history.lock().unwrap();
            let entries = history.iter();
            entries
                .map(|(entry, pages)| (*entry, pages.len() - 1))
                .collect()
        };
        self.mmu.flush_guest_tlb(&mut cpu.vcpu);
        cpu.flushed.extend(now);
    }

    fn write_logged(&self, cpu: &mut Cpu) {
        let reached = self.access(cpu, gva(1, SPECIAL), true, |met| {
            if let Met::Page(page) = met {
                assert_eq!(page, u64::from(LOGGED.0));
                self.is_written.store(true, Ordering::SeqCst);
            }
        });
        assert_eq!(reached, Reached::Memory);
    }

    fn read_removable(&self, cpu: &mut Cpu) {
        let reached = self.access(cpu, gva(0, SPECIAL), false, |met| {
            if let Met::Page(page) = met {
                assert_eq!(page, u64::from(REMOVABLE.0));
                assert!(
                    !self.is_removed.load(Ordering::SeqCst),
                    "memory is reached after it was taken away"
                );
            }
        });
        assert_ne!(reached, Reached::Nothing);
    }

    /// Runs one access as a hypervisor's loop does.
    fn access(&self, cpu: &mut Cpu, gva: Gva, is_write: bool, observe: impl Fn(Met)) -> Reached {
        for _ in 0..ATTEMPTS {
            self.host.take_request(cpu.number);
            let entry = match self.mmu.prepare_entry(&mut cpu.vcpu) {
                Ok(entry) => entry,
                Err(error) => {
                    wait_for_pages(error);
                    continue;
                }
            };
            let run = self.host.run(cpu.number, &entry, gva, is_write, |met| {
                observe(met);
                met
            });
            let present = match run {
                None => continue,
                Some(Met::Page(_)) => return Reached::Memory,
                Some(Met::Fault { present }) => present,
            };
            let mut error = Code::empty();
            error.set(Code::PROTECTION_VIOLATION, present);
            error.set(Code::CAUSED_BY_WRITE, is_write);
            let fault = Fault {
                gva,
                error,
                cpl: 0,
                rflags: RFlags::empty(),
            };
            match self.mmu.handle_page_fault(&mut cpu.vcpu, &fault) {
                Ok(FaultOutcome::Fixed) => {}
                Ok(FaultOutcome::Mmio {
                    target: MmioTarget::NoSlot,
                    ..
                }) => return Reached::NoSlot,
                Ok(other) => panic!("{other:?} at {gva:?}"),
                Err(error) => wait_for_pages(error),
            }
        }
        Reached::Nothing
    }
}

/// Where an access went.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Reached {
    Memory,
    NoSlot,
    /// It made no progress.
    Nothing,
}

fn wait_for_pages(error: MmuError) {
    match error {
        MmuError::NoPageAvailable(_) => shuttle::thread::yield_now(),
        MmuError::OutOfMemory => panic!("{error}"),
    }
}
