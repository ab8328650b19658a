//! One test for each rule, and for each mistake that shadow MMUs are known to have made.
#![allow(missing_docs, reason = "a test")]
#![allow(
    clippy::too_many_lines,
    clippy::verbose_bit_mask,
    clippy::nonminimal_bool,
    clippy::struct_excessive_bools,
    clippy::precedence,
    reason = "bits are written as the manual draws them"
)]

mod common;

use common::{Cpu, SimHost, Try};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use umbra_mmu::*;
use umbra_vcpu::address::{Gfn, Gpa, Gva};
use x86_64::registers::control::{Cr0Flags, Cr4Flags, EferFlags};
use x86_64::structures::idt::PageFaultErrorCode as Code;

const P: u64 = 1;
const W: u64 = 2;
const U: u64 = 4;
const A: u64 = 0x20;
const D: u64 = 0x40;
const PS: u64 = 0x80;
/// What an ordinary link has.
const TABLE: u64 = P | W | U | A;

const SLOT: SlotId = SlotId(0);
const PAGES: u64 = 2048;

struct Guest {
    mmu: Arc<Mmu<SimHost>>,
    pool: MmuPool<SimHost>,
    host: SimHost,
    cpus: Vec<Cpu>,
    next_table: u64,
}

fn read(gva: u64) -> Try {
    Try {
        gva: Gva::new(gva),
        kind: AccessKind::Read,
        user: false,
        ac: false,
    }
}

fn write(gva: u64) -> Try {
    Try {
        kind: AccessKind::Write,
        ..read(gva)
    }
}

fn execute(gva: u64) -> Try {
    Try {
        kind: AccessKind::Execute,
        ..read(gva)
    }
}

fn by_user(attempt: Try) -> Try {
    Try {
        user: true,
        ..attempt
    }
}

/// 4-level paging with the given root table; WP and NXE set.
fn long_mode(root: u64) -> PagingRegisters {
    PagingRegisters {
        cr0: Cr0Flags::PROTECTED_MODE_ENABLE | Cr0Flags::PAGING | Cr0Flags::WRITE_PROTECT,
        cr3: Cr3::new(root << 12),
        cr4: Cr4Flags::PHYSICAL_ADDRESS_EXTENSION,
        efer: EferFlags::LONG_MODE_ENABLE | EferFlags::NO_EXECUTE_ENABLE,
        pdptrs: Pdptrs::default(),
    }
}

impl Guest {
    fn with(config: MmuConfig) -> Self {
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

    fn new() -> Self {
        Self::with(MmuConfig {
            limit: 1000,
            prefetch: 1,
            ..MmuConfig::default()
        })
    }

    /// A zeroed page for a table.
    fn table(&mut self) -> u64 {
        self.next_table += 1;
        self.next_table - 1
    }

    /// Writes a table's entry as the guest's loader would, before anything is shadowed.
    fn set(&self, table: u64, index: u64, value: u64) {
        self.host
            .word(table, index as usize)
            .store(value, Ordering::Relaxed);
    }

    fn get(&self, table: u64, index: u64) -> u64 {
        self.host
            .word(table, index as usize)
            .load(Ordering::Relaxed)
    }

    /// Maps `gva` to `value` by 4 KiB through tables that it makes as needed.
    fn map(&mut self, root: u64, gva: u64, value: u64) {
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
    fn leaf_table(&self, root: u64, gva: u64) -> u64 {
        (2..=4).rev().fold(root, |table, level| {
            self.get(table, gva >> (12 + 9 * (level - 1)) & 511) >> 12 & 0xff_ffff
        })
    }

    fn load(&mut self, cpu: usize, registers: PagingRegisters) {
        self.mmu.load_registers(&mut self.cpus[cpu].vcpu, registers);
    }

    /// One access to its end, with the number of faults that it took.
    fn try_access(&mut self, cpu: usize, attempt: Try) -> (Result<u64, FaultOutcome>, usize) {
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

    fn page(&mut self, attempt: Try) -> u64 {
        let page = self.try_access(0, attempt).0.expect("memory");
        self.mmu.audit().unwrap();
        page
    }

    fn fault(&mut self, attempt: Try) -> Code {
        match self.try_access(0, attempt).0 {
            Err(FaultOutcome::Inject(fault)) => fault.error,
            other => panic!("{attempt:x?}: {other:x?}"),
        }
    }

    fn faults(&mut self, attempt: Try) -> usize {
        let (page, faults) = self.try_access(0, attempt);
        page.expect("memory");
        faults
    }
}

#[test]
fn a_zapped_active_root_leaves_the_list_and_is_freed_by_its_last_user() {
    let mut guest = Guest::new();
    let root = guest.table();
    guest.map(root, 0x1000, 100 << 12 | TABLE);
    guest.cpus.push(Cpu::new(&guest.mmu));
    for cpu in 0..2 {
        guest.load(cpu, long_mode(root));
        assert_eq!(guest.try_access(cpu, read(0x1000)).0, Ok(100));
    }
    assert_eq!(guest.mmu.used(), 4);
    // The whole tree goes; the root's frame stays, for two processors stand on it.
    assert_eq!(guest.mmu.unprotect(Gfn::new(root)), 4);
    guest.mmu.audit().unwrap();
    assert_eq!(guest.mmu.used(), 1);
    // Each moves to the new root; nobody puts the old one back.
    assert_eq!(guest.try_access(0, read(0x1000)).0, Ok(100));
    guest.mmu.audit().unwrap();
    assert_eq!(guest.mmu.used(), 1 + 4);
    assert_eq!(guest.try_access(1, read(0x1000)).0, Ok(100));
    guest.mmu.audit().unwrap();
    assert_eq!(guest.mmu.used(), 4);
}

/// Maps 64 regions of 2 MiB, so that each needs a page table of its own.
fn regions(guest: &mut Guest, count: u64) -> u64 {
    let root = guest.table();
    for region in 0..count {
        guest.map(root, region << 21, (1000 + region) << 12 | TABLE | D);
    }
    guest.load(0, long_mode(root));
    root
}

#[test]
fn fifo_takes_the_oldest_first() {
    let limit = 64;
    let mut guest = Guest::with(MmuConfig {
        limit,
        victims: VictimPolicy::Fifo,
        prefetch: 1,
        ..MmuConfig::default()
    });
    regions(&mut guest, 200);
    // Fill up to the point where the next table recycles: root, two levels, and leaves.
    let fits = (limit - 3 - MINIMUM_FREE_PAGES) as u64;
    for region in 0..fits {
        guest.page(read(region << 21));
    }
    assert_eq!(guest.mmu.statistics().mmu_recycled, 0);
    let flushes = guest.host.0.flushes.load(Ordering::Relaxed);
    for region in fits..fits + 2 {
        guest.page(read(region << 21));
    }
    let statistics = guest.mmu.statistics();
    assert!(statistics.mmu_recycled >= (REFILL_PAGES - MINIMUM_FREE_PAGES) as u64);
    assert!(guest.host.0.flushes.load(Ordering::Relaxed) > flushes);
}

/// 16 hot of 256 regions take 90 % of the accesses: faults on hot regions, and on all. (A cold access
/// faults under any policy as often as its region isn't among the few cold ones that fit.)
fn hot_cold(victims: VictimPolicy, limit: usize, seed: u64) -> (usize, usize) {
    let mut guest = Guest::with(MmuConfig {
        limit,
        victims,
        prefetch: 1,
        ..MmuConfig::default()
    });
    regions(&mut guest, 256);
    let mut random = seed;
    let (mut hot, mut all) = (0, 0);
    for step in 0..20_000 {
        random = random
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        let draw = random >> 33;
        let region = if draw % 10 < 9 {
            draw / 10 % 16
        } else {
            draw / 10 % 256
        };
        let taken = guest.faults(read(region << 21));
        if step > 2000 {
            all += taken;
            hot += if region < 16 { taken } else { 0 };
        }
    }
    guest.mmu.audit().unwrap();
    (hot, all)
}

#[test]
fn clock_keeps_hot_tables_that_fifo_loses() {
    for limit in [64, 128] {
        let fifo = hot_cold(VictimPolicy::Fifo, limit, 1);
        let clock = hot_cold(VictimPolicy::Clock, limit, 1);
        println!("pool {limit}, faults (hot, all): {fifo:?} with FIFO, {clock:?} with CLOCK");
        assert!(
            clock.0 * 100 <= fifo.0 * 35,
            "pool {limit}: {clock:?} against {fifo:?}"
        );
        assert!(clock.1 < fifo.1, "pool {limit}: {clock:?} against {fifo:?}");
    }
}

#[test]
fn the_newest_tables_survive_recycling() {
    // A reversed list would lose what was just used: the last few regions, again and again.
    for victims in [VictimPolicy::Fifo, VictimPolicy::Clock] {
        let mut guest = Guest::with(MmuConfig {
            limit: 64,
            victims,
            prefetch: 1,
            ..MmuConfig::default()
        });
        regions(&mut guest, 256);
        let mut again = 0;
        for region in 8..256 {
            guest.page(read(region << 21));
            for recent in region - 8..region {
                again += guest.faults(read(recent << 21));
            }
        }
        println!("{victims:?}: {again} faults on recent regions");
        assert!(
            again <= 250,
            "{victims:?}: {again} faults on recent regions"
        );
    }
}

#[test]
fn an_active_root_never_ends_a_batch() {
    for victims in [VictimPolicy::Fifo, VictimPolicy::Clock] {
        let mut guest = Guest::with(MmuConfig {
            limit: 64,
            victims,
            prefetch: 1,
            ..MmuConfig::default()
        });
        // The active root is the oldest page of all.
        regions(&mut guest, 60);
        for region in 0..56 {
            guest.page(read(region << 21));
        }
        guest.mmu.release_caches();
        let before = guest.mmu.used();
        let shrunk = guest.pool.scan(40);
        guest.mmu.audit().unwrap();
        assert_eq!(before - guest.mmu.used(), shrunk.freed);
        assert_eq!(shrunk.freed, 40, "{victims:?}");
        assert_eq!(guest.page(read(5 << 21)), 1005);
    }
}

#[test]
fn a_batch_takes_one_flush() {
    let mut guest = Guest::new();
    regions(&mut guest, 256);
    for region in 0..256 {
        guest.page(read(region << 21));
    }
    guest.mmu.release_caches();
    let flushes = guest.host.0.flushes.load(Ordering::Relaxed);
    let shrunk = guest.pool.scan(200);
    assert_eq!(
        shrunk,
        Shrunk {
            freed: 200,
            skipped: 0
        }
    );
    // The VM is above its floor by 195 pages, so the last 5 are a second batch.
    assert!(guest.host.0.flushes.load(Ordering::Relaxed) - flushes <= 2);
}

#[test]
fn no_page_available_is_an_error_and_can_be_resumed() {
    let mut guest = Guest::with(MmuConfig {
        limit: 3,
        prefetch: 1,
        ..MmuConfig::default()
    });
    let root = guest.table();
    guest.map(root, 0x1000, 100 << 12 | TABLE);
    guest.load(0, long_mode(root));
    let vcpu = &mut guest.cpus[0].vcpu;
    guest.mmu.prepare_entry(vcpu).unwrap();
    for _ in 0..3 {
        let fault = read(0x1000).fault(Code::empty());
        assert_eq!(
            guest.mmu.handle_page_fault(vcpu, &fault),
            Err(MmuError::NoPageAvailable(NoPageAvailable {
                needed: 3,
                used: 1,
                limit: 3,
                pinned: 1
            }))
        );
    }
    guest.mmu.set_limit(4);
    assert_eq!(guest.page(read(0x1000)), 100);
    assert_eq!(guest.pool.count(), 4);
}

#[test]
fn a_limit_of_all_vms_holds() {
    let mut guest = Guest::new();
    let root = guest.table();
    guest.map(root, 0x1000, 100 << 12 | TABLE);
    guest.load(0, long_mode(root));
    guest.pool.set_limit(2);
    let vcpu = &mut guest.cpus[0].vcpu;
    guest.mmu.prepare_entry(vcpu).unwrap();
    let error = guest
        .mmu
        .handle_page_fault(vcpu, &read(0x1000).fault(Code::empty()))
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "no MMU page available: needed 3, used 1 of 2, pinned 1"
    );
    guest.pool.set_limit(4);
    assert_eq!(guest.page(read(0x1000)), 100);
}

#[test]
fn a_host_without_memory_is_an_error_and_can_be_resumed() {
    let mut guest = Guest::new();
    let root = guest.table();
    guest.map(root, 0x1000, 100 << 12 | TABLE);
    guest.load(0, long_mode(root));
    guest.mmu.prepare_entry(&mut guest.cpus[0].vcpu).unwrap();
    guest.mmu.release_caches();
    guest.host.0.frame_limit.store(3, Ordering::Relaxed);
    let fault = read(0x1000).fault(Code::empty());
    let error = guest.mmu.handle_page_fault(&mut guest.cpus[0].vcpu, &fault);
    assert_eq!(error, Err(MmuError::OutOfMemory));
    assert_eq!(
        guest.host.0.frames_in_use.load(Ordering::Relaxed),
        2,
        "frames leaked"
    );
    guest.host.0.frame_limit.store(100, Ordering::Relaxed);
    assert_eq!(guest.page(read(0x1000)), 100);
}

#[test]
fn pinned_roots_do_not_make_reclaim_run_for_ever() {
    let mut guest = Guest::with(MmuConfig {
        limit: 70,
        prefetch: 1,
        ..MmuConfig::default()
    });
    for cpu in 0..40 {
        if cpu > 0 {
            guest.cpus.push(Cpu::new(&guest.mmu));
        }
        let root = guest.table();
        guest.load(cpu, long_mode(root));
        guest.mmu.prepare_entry(&mut guest.cpus[cpu].vcpu).unwrap();
    }
    assert_eq!(guest.mmu.used(), 40);
    guest.mmu.set_limit(40);
    let shrunk = guest.pool.scan(1000);
    assert_eq!(guest.mmu.used(), 40, "{shrunk:?}");
    guest.mmu.audit().unwrap();
}

#[test]
fn zap_all_leaves_nothing_obsolete_in_previous_roots() {
    let mut guest = Guest::new();
    let roots: Vec<u64> = (0..4)
        .map(|number| {
            let root = guest.table();
            guest.map(root, 0x1000, (100 + number) << 12 | TABLE);
            root
        })
        .collect();
    for root in &roots {
        guest.load(0, long_mode(*root));
        guest.page(read(0x1000));
    }
    assert_eq!(guest.mmu.used(), 16);
    guest.mmu.zap_all();
    guest.mmu.audit().unwrap();
    // Only the root on which the processor stands keeps its frame, invalid.
    assert_eq!(guest.mmu.used(), 1);
    assert_eq!(guest.page(read(0x1000)), 103);
    assert_eq!(guest.mmu.used(), 4);
}

#[test]
fn previous_roots_are_found_again() {
    let mut guest = Guest::new();
    let roots: Vec<u64> = (0..4)
        .map(|number| {
            let root = guest.table();
            guest.map(root, 0x1000, (100 + number) << 12 | TABLE);
            root
        })
        .collect();
    for _ in 0..2 {
        for (number, root) in roots.iter().enumerate() {
            guest.load(0, long_mode(*root));
            assert_eq!(guest.page(read(0x1000)), 100 + number as u64);
        }
    }
    assert_eq!(guest.mmu.statistics().mmu_cache_miss, 16);
}

#[test]
fn a_child_is_reused_only_if_frame_and_role_match() {
    let mut guest = Guest::new();
    let root = guest.table();
    let gva = 5 << 21;
    guest.map(root, gva, 100 << 12 | TABLE | D);
    let directory = guest.leaf_table(root, gva);
    let above = {
        let pointer = guest.get(root, 0) >> 12;
        guest.get(pointer, 0) >> 12
    };
    assert_eq!(guest.get(above, 5) >> 12, directory);
    guest.load(0, long_mode(root));
    assert_eq!(guest.page(write(gva)), 100);
    // The guest turns the table into a large page, then back into a read-only table: neither may
    // use the child that stands there.
    guest.set(above, 5, 2 << 21 | PS | TABLE | D);
    guest.mmu.track_guest_write(Gpa::new((above << 12) + 40), 8);
    assert_eq!(guest.page(read(gva)), 1024);
    guest.set(above, 5, directory << 12 | P | U | A);
    guest.mmu.track_guest_write(Gpa::new((above << 12) + 40), 8);
    assert_eq!(guest.page(read(gva)), 100);
    assert_eq!(
        guest.fault(write(gva)),
        Code::PROTECTION_VIOLATION | Code::CAUSED_BY_WRITE
    );
    // The same without the host's tracking: the write makes the table unsync, no flush follows, and
    // the fault on the way must notice that the child is not the one.
    let alias = 7 << 21;
    guest.map(root, alias, above << 12 | TABLE | D);
    guest.mmu.flush_guest_tlb(&mut guest.cpus[0].vcpu);
    assert_eq!(guest.page(write(alias)), above);
    guest.set(above, 5, directory << 12 | TABLE);
    assert_eq!(guest.page(write(gva)), 100);
}

#[test]
fn permissions_are_those_of_the_whole_path() {
    let mut guest = Guest::new();
    let root = guest.table();
    guest.map(root, 0, 100 << 12 | TABLE | D);
    // The same page table three times: in full, read-only, supervisor's.
    let table = guest.leaf_table(root, 0);
    let directory = guest.get(guest.get(root, 0) >> 12, 0) >> 12;
    guest.set(directory, 1, table << 12 | P | U | A);
    guest.set(directory, 2, table << 12 | P | W | A);
    guest.set(directory, 3, table << 12 | TABLE | 1 << 63);
    guest.load(0, long_mode(root));
    let denied = Code::PROTECTION_VIOLATION;
    assert_eq!(guest.page(by_user(write(0))), 100);
    assert_eq!(guest.page(by_user(read(1 << 21))), 100);
    assert_eq!(
        guest.fault(by_user(write(1 << 21))),
        denied | Code::CAUSED_BY_WRITE | Code::USER_MODE
    );
    assert_eq!(guest.page(write(2 << 21)), 100);
    assert_eq!(
        guest.fault(by_user(read(2 << 21))),
        denied | Code::USER_MODE
    );
    assert_eq!(guest.page(read(3 << 21)), 100);
    assert_eq!(
        guest.fault(execute(3 << 21)),
        denied | Code::INSTRUCTION_FETCH
    );
    assert_eq!(guest.page(by_user(execute(0))), 100);
}

#[test]
fn without_wp_a_supervisor_writes_read_only_user_pages() {
    for smep in [false, true] {
        let mut guest = Guest::new();
        let root = guest.table();
        guest.map(root, 0, 100 << 12 | P | U | A);
        let mut registers = long_mode(root);
        registers.cr0.remove(Cr0Flags::WRITE_PROTECT);
        registers
            .cr4
            .set(Cr4Flags::SUPERVISOR_MODE_EXECUTION_PROTECTION, smep);
        guest.load(0, registers);
        assert_eq!(guest.page(write(0)), 100);
        let denied = Code::PROTECTION_VIOLATION;
        // The page is the supervisor's in the shadow now, yet neither may the supervisor run it
        // under SMEP nor the user write it.
        if smep {
            assert_eq!(guest.fault(execute(0)), denied | Code::INSTRUCTION_FETCH);
        } else {
            assert_eq!(guest.page(execute(0)), 100);
        }
        assert_eq!(guest.page(by_user(read(0))), 100);
        assert_eq!(
            guest.fault(by_user(write(0))),
            denied | Code::CAUSED_BY_WRITE | Code::USER_MODE
        );
        assert_eq!(guest.page(by_user(execute(0))), 100);
        assert_eq!(guest.page(write(0)), 100);
        // Turning WP on takes the right away.
        registers.cr0.insert(Cr0Flags::WRITE_PROTECT);
        guest.load(0, registers);
        assert_eq!(guest.fault(write(0)), denied | Code::CAUSED_BY_WRITE);
    }
}

#[test]
fn a_clean_large_page_without_wp_becomes_dirty() {
    let mut guest = Guest::new();
    let (root, pointers, directory) = (guest.table(), guest.table(), guest.table());
    guest.set(root, 0, pointers << 12 | TABLE);
    guest.set(pointers, 0, directory << 12 | TABLE);
    guest.set(directory, 0, 2 << 21 | P | U | A | PS);
    let mut registers = long_mode(root);
    registers.cr0.remove(Cr0Flags::WRITE_PROTECT);
    guest.load(0, registers);
    for gva in [0x3000, 0x4000] {
        assert_eq!(guest.page(read(gva)), 1024 + (gva >> 12));
        assert_eq!(
            guest.get(directory, 0) & D,
            if gva == 0x3000 { 0 } else { D }
        );
        assert_eq!(guest.page(write(gva)), 1024 + (gva >> 12));
        assert_eq!(guest.get(directory, 0) & D, D);
    }
    // A table inside the range splits the large page.
    let inside = 1024 + 5;
    guest.map(root, 1 << 39, inside << 12 | TABLE);
    guest.set(guest.leaf_table(root, 1 << 39), 0, inside << 12 | TABLE);
    guest.mmu.flush_guest_tlb(&mut guest.cpus[0].vcpu);
    assert_eq!(guest.page(write(0x5000)), inside);
}

#[test]
fn mmio_takes_the_place_of_a_present_entry() {
    let mut guest = Guest::new();
    let root = guest.table();
    guest.map(root, 0, 100 << 12 | TABLE | D);
    guest.load(0, long_mode(root));
    assert_eq!(guest.page(write(0)), 100);
    let table = guest.leaf_table(root, 0);
    guest.set(table, 0, 0xfee00 << 12 | TABLE | D);
    guest.mmu.track_guest_write(Gpa::new(table << 12), 8);
    for fast in 0..3 {
        let (outcome, _) = guest.try_access(0, write(0x20));
        assert_eq!(
            outcome,
            Err(FaultOutcome::Mmio {
                gpa: Gpa::new(0xfee0_0020),
                access: AccessKind::Write,
                target: MmioTarget::NoSlot
            })
        );
        guest.mmu.audit().unwrap();
        assert_eq!(guest.mmu.statistics().pf_mmio_fast, fast);
    }
    // The guest points it elsewhere through an unsync table, without a flush: new memory must not
    // be found as MMIO after the flush.
    guest.set(table, 0, 101 << 12 | TABLE | D);
    guest.mmu.track_guest_write(Gpa::new(table << 12), 8);
    assert_eq!(guest.page(write(0)), 101);
}

#[test]
fn memory_added_where_there_was_mmio_is_found() {
    let mut guest = Guest::new();
    let root = guest.table();
    guest.map(root, 0, 3000 << 12 | TABLE | D);
    guest.load(0, long_mode(root));
    assert!(matches!(
        guest.try_access(0, read(0)).0,
        Err(FaultOutcome::Mmio { .. })
    ));
    let id = SlotId(9);
    guest.host.set_slot(id, 200);
    let memory = MemorySlot {
        id,
        base: Gfn::new(3000),
        pages: 4,
        flags: SlotFlags::empty(),
    };
    guest.mmu.add_slot(memory).unwrap();
    assert_eq!(guest.page(read(0)), 200);
    guest.mmu.move_slot(id, Gfn::new(3001)).unwrap();
    assert!(matches!(
        guest.try_access(0, read(0)).0,
        Err(FaultOutcome::Mmio { .. })
    ));
    assert_eq!(
        guest.mmu.move_slot(id, Gfn::new(5)),
        Err(SlotError::Overlaps(SLOT)),
        "a slot stays where it is if it cannot move"
    );
    guest.mmu.move_slot(id, Gfn::new(3000)).unwrap();
    assert_eq!(guest.page(read(0)), 200);
    guest.mmu.remove_slot(id).unwrap();
    assert!(matches!(
        guest.try_access(0, read(0)).0,
        Err(FaultOutcome::Mmio { .. })
    ));
    guest.mmu.audit().unwrap();
}

#[test]
fn prefetch_maps_each_neighbour_to_its_own_frame() {
    let mut guest = Guest::with(MmuConfig {
        limit: 100,
        prefetch: 8,
        ..MmuConfig::default()
    });
    let root = guest.table();
    for page in 0..16 {
        guest.map(root, page << 12, (100 + page * 3) << 12 | TABLE);
    }
    // Not accessed, reserved bit, no memory.
    guest.map(root, 1 << 12, 103 << 12 | P | W);
    guest.map(root, 2 << 12, 106 << 12 | TABLE | 1 << 51);
    guest.map(root, 3 << 12, 9000 << 12 | TABLE);
    guest.load(0, long_mode(root));
    assert_eq!(guest.faults(read(0)), 1);
    assert_eq!(guest.mmu.statistics().mmu_prefetched, 4);
    for page in 4..8 {
        assert_eq!(guest.faults(read(page << 12)), 0);
        assert_eq!(guest.page(read(page << 12)), 100 + page * 3);
    }
    assert_eq!(guest.get(guest.leaf_table(root, 0), 1) & A, 0);
    assert_eq!(guest.faults(read(8 << 12)), 1);
    // A clean page was prefetched read-only.
    assert_eq!(guest.faults(write(4 << 12)), 1);
    assert_eq!(guest.get(guest.leaf_table(root, 0), 4) & D, D);
}

#[test]
fn prefetch_leaves_pages_whose_key_forbids_reading() {
    let mut guest = Guest::with(MmuConfig {
        limit: 100,
        prefetch: 8,
        ..MmuConfig::default()
    });
    let root = guest.table();
    for page in 0..16 {
        guest.map(root, page << 12, (100 + page) << 12 | TABLE | D);
    }
    for page in [1, 9] {
        guest.map(root, page << 12, (100 + page) << 12 | TABLE | D | 3 << 59);
    }
    let mut registers = long_mode(root);
    registers.cr4 |= Cr4Flags::PROTECTION_KEY_USER;
    guest.load(0, registers);
    guest.mmu.set_pkru(&mut guest.cpus[0].vcpu, Pkru(1 << 6));
    // The first fault makes the table, the second finds it.
    for first in [0, 8] {
        assert_eq!(guest.page(read(first << 12)), 100 + first);
        assert_eq!(guest.faults(read((first + 2) << 12)), 0);
        assert_eq!(
            guest.fault(read((first + 1) << 12)),
            Code::PROTECTION_VIOLATION | Code::PROTECTION_KEY
        );
    }
}

#[test]
fn an_entry_that_changes_before_it_is_marked_is_read_again() {
    let mut guest = Guest::new();
    let root = guest.table();
    for page in 0..3 {
        guest.map(root, page << 12, (100 + page) << 12 | P | W | U);
    }
    guest.load(0, long_mode(root));
    let table = guest.leaf_table(root, 0);
    // The first fault makes the table, the second finds it.
    for page in 0..2 {
        let host = guest.host.clone();
        *guest.host.0.before_exchange.lock().unwrap() = Some(Box::new(move || {
            host.word(table, page as usize)
                .store((200 + page) << 12 | P | W | U, Ordering::Relaxed);
        }));
        assert_eq!(guest.page(write(page << 12)), 200 + page);
        assert_eq!(guest.get(table, page), (200 + page) << 12 | TABLE | D);
    }
}

#[test]
fn invlpg_refreshes_upper_tables_for_every_address() {
    let mut guest = Guest::new();
    let root = guest.table();
    guest.map(root, 0, 100 << 12 | TABLE | D);
    guest.map(root, 1 << 30, 101 << 12 | TABLE | D);
    let alias = 2 << 30;
    let pointers = guest.get(root, 0) >> 12;
    guest.map(root, alias, pointers << 12 | TABLE | D);
    guest.load(0, long_mode(root));
    assert_eq!(guest.page(read(0)), 100);
    assert_eq!(guest.page(read(1 << 30)), 101);
    assert_eq!(guest.page(write(alias)), pointers);
    assert!(guest.mmu.statistics().mmu_unsync > 0);
    // Both directories change places. INVLPG of any address drops all paging-structure caches, so
    // a page that was never accessed must be found through the new ones.
    let (zero, one) = (guest.get(pointers, 0), guest.get(pointers, 1));
    guest.set(pointers, 0, one);
    guest.set(pointers, 1, zero);
    guest
        .mmu
        .invalidate_page(&mut guest.cpus[0].vcpu, Gva::new(0x7777_0000));
    guest.mmu.audit().unwrap();
    assert_eq!(guest.page(read(0)), 101);
    assert_eq!(guest.page(read(1 << 30)), 100);
    assert_eq!(guest.mmu.statistics().mmu_unsync, 0);
}

#[test]
fn a_table_that_maps_itself_can_be_written_through_itself() {
    let mut guest = Guest::new();
    let root = guest.table();
    guest.map(root, 0, 100 << 12 | TABLE | D);
    // The root's last-but-one entry is the root: address of the root as a page.
    guest.set(root, 510, root << 12 | TABLE | D);
    let own = 510 << 39 | 510 << 30 | 510 << 21 | 510u64 << 12;
    guest.load(0, long_mode(root));
    for round in 0..20 {
        assert_eq!(guest.page(write(own)), root);
        assert_eq!(guest.page(read(0)), 100, "round {round}");
        guest.mmu.flush_guest_tlb(&mut guest.cpus[0].vcpu);
        guest.mmu.audit().unwrap();
    }
}

#[test]
fn a_table_written_again_and_again_is_no_table_any_more() {
    let mut guest = Guest::new();
    let root = guest.table();
    guest.map(root, 0, 100 << 12 | TABLE | D);
    let table = guest.leaf_table(root, 0);
    guest.map(root, 1 << 30, table << 12 | TABLE | D);
    guest.load(0, long_mode(root));
    guest.page(read(0));
    for _ in 0..6 {
        assert_eq!(guest.page(write(1 << 30)), table);
        guest.mmu.flush_guest_tlb(&mut guest.cpus[0].vcpu);
    }
    assert_eq!(guest.mmu.statistics().mmu_flooded, 1);
    // No longer write-protected.
    assert_eq!(guest.faults(write(1 << 30)), 0);
    assert_eq!(guest.page(read(0)), 100);
}

#[test]
fn another_processors_change_during_the_flush_is_seen() {
    let mut guest = Guest::new();
    let root = guest.table();
    guest.map(root, 0, 100 << 12 | TABLE | D);
    let table = guest.leaf_table(root, 0);
    // The table is mapped writable before it is shadowed, so that shadowing it takes a flush.
    guest.map(root, 1 << 30, table << 12 | TABLE | D);
    guest.load(0, long_mode(root));
    assert_eq!(guest.page(write(1 << 30)), table);
    // While the flush waits for it, the other processor's store still goes through.
    let host = guest.host.clone();
    *guest.host.0.during_flush.lock().unwrap() = Some(Box::new(move || {
        host.word(table, 0)
            .store(101 << 12 | TABLE | D, Ordering::Relaxed);
    }));
    assert_eq!(guest.page(read(0)), 101);
    *guest.host.0.during_flush.lock().unwrap() = None;
}

#[test]
fn a_table_that_lost_its_link_during_the_flush_is_an_orphan() {
    let mut guest = Guest::new();
    let root = guest.table();
    guest.map(root, 0, 100 << 12 | TABLE | D);
    guest.map(root, 5 << 21, 101 << 12 | TABLE | D);
    let table = guest.leaf_table(root, 0);
    guest.map(root, 1 << 30, table << 12 | TABLE | D);
    guest.load(0, long_mode(root));
    assert_eq!(guest.page(write(1 << 30)), table);
    // While the table is shadowed, the directory's entry comes to lead to another one.
    let directory = guest.get(guest.get(root, 0) >> 12, 0) >> 12;
    let (other, host) = (guest.get(directory, 5), guest.host.clone());
    *guest.host.0.during_flush.lock().unwrap() = Some(Box::new(move || {
        host.word(directory, 0).store(other, Ordering::Relaxed);
    }));
    assert_eq!(guest.page(read(0)), 101);
    *guest.host.0.during_flush.lock().unwrap() = None;
    guest.mmu.audit().unwrap();
}

#[test]
fn written_pages_are_logged_once_until_they_are_taken() {
    let mut guest = Guest::new();
    let id = SlotId(5);
    guest.host.set_slot(id, 300);
    let memory = MemorySlot {
        id,
        base: Gfn::new(5000),
        pages: 100,
        flags: SlotFlags::LOG_DIRTY,
    };
    guest.mmu.add_slot(memory).unwrap();
    let root = guest.table();
    for page in 0..4 {
        guest.map(root, page << 12, (5000 + page * 30) << 12 | TABLE | D);
    }
    guest.load(0, long_mode(root));
    let taken = |guest: &Guest| {
        let mut pages = Vec::new();
        guest
            .mmu
            .take_dirty(id, |gfn| pages.push(gfn.as_u64()))
            .unwrap();
        pages
    };
    guest.page(read(0));
    assert_eq!(taken(&guest), []);
    for round in 0..2 {
        assert_eq!(guest.faults(write(1 << 12)), 1, "round {round}");
        assert_eq!(guest.faults(write(1 << 12)), 0);
        guest.page(write(3 << 12));
        guest.mmu.track_guest_write(Gpa::new(5001 << 12), 5000);
        assert_eq!(taken(&guest), [5001, 5002, 5030, 5090]);
    }
    assert_eq!(taken(&guest), []);
    assert_eq!(
        guest.mmu.take_dirty(SlotId(77), |_| {}),
        Err(SlotError::Unknown)
    );
}

/// A small and a large VM of one pool, with 100 and 300 page tables, the last of which is not in use.
fn small_and_large() -> (MmuPool<SimHost>, [Guest; 2]) {
    let host = SimHost::new(PAGES as usize, 4000);
    host.set_slot(SLOT, 0);
    for page in 0..PAGES {
        host.touch(page);
    }
    let pool = MmuPool::new(100_000);
    let guests = [(100, 1), (300, 500)].map(|(tables, next_table)| {
        let mut guest = Guest::with(MmuConfig::default());
        guest.host = host.clone();
        let config = MmuConfig {
            limit: 1000,
            prefetch: 1,
            ..MmuConfig::default()
        };
        guest.mmu = pool.create(host.clone(), config);
        let memory = MemorySlot {
            id: SLOT,
            base: Gfn::new(0),
            pages: PAGES,
            flags: SlotFlags::empty(),
        };
        guest.mmu.add_slot(memory).unwrap();
        guest.cpus = vec![Cpu::new(&guest.mmu)];
        guest.next_table = next_table;
        regions(&mut guest, tables);
        for region in 0..tables - 1 {
            guest.page(read(region << 21));
        }
        guest
    });
    (pool, guests)
}

fn used(guests: &[Guest; 2]) -> [usize; 2] {
    guests.each_ref().map(|guest| guest.mmu.used())
}

#[test]
fn at_the_common_limit_all_give_in_proportion_and_none_below_its_floor() {
    let (pool, mut guests) = small_and_large();
    let before = used(&guests);
    pool.set_limit(pool.count());
    let [small, _] = &mut guests;
    let flushes = small.mmu.statistics().tlb_flush;
    small.page(read(99 << 21));
    assert!(small.mmu.statistics().tlb_flush <= flushes + 2);
    let after = used(&guests);
    let (from_small, from_large) = (before[0] + 1 - after[0], before[1] - after[1]);
    assert!(
        from_small > 0 && from_large > 3 * from_small,
        "{from_small} from the small VM, {from_large} from the large one"
    );
    // However much the one wants, the other keeps its floor.
    pool.set_limit(120);
    for round in 0..300 {
        guests[0].page(read(round % 100 << 21));
        assert!(pool.count() <= 120 || round == 0);
    }
    let held = used(&guests);
    assert!(held[1] >= 60 && held[0] + held[1] > 100, "{held:?}");
    for guest in &guests {
        guest.mmu.audit().unwrap();
    }
}

#[test]
fn the_shrinker_gives_caches_back_first_and_shares_the_rest() {
    let (pool, guests) = small_and_large();
    let before = used(&guests);
    assert_eq!(pool.count(), before.iter().sum());
    // A little is had from the caches alone.
    let shrunk = pool.scan(1);
    assert!(shrunk.freed >= 1);
    assert_eq!(used(&guests), before);
    for guest in &guests {
        guest.mmu.release_caches();
    }
    let shrunk = pool.scan(100);
    assert_eq!(
        shrunk,
        Shrunk {
            freed: 100,
            skipped: 0
        }
    );
    let after = used(&guests);
    assert_eq!(pool.count(), after.iter().sum());
    let (small, large) = (before[0] - after[0], before[1] - after[1]);
    assert!(
        large > 3 * small,
        "{small} from the small VM, {large} from the large one"
    );
    assert!(after[0] >= MINIMUM_PAGES);
}

#[test]
fn use_of_memory_is_tracked() {
    let mut guest = Guest::new();
    let root = guest.table();
    guest.map(root, 0, 100 << 12 | TABLE | D);
    guest.load(0, long_mode(root));
    assert_eq!(guest.mmu.take_accessed(Gfn::new(90), 20), Accessed::No);
    for _ in 0..2 {
        guest.page(read(0));
        assert_eq!(guest.mmu.take_accessed(Gfn::new(90), 10), Accessed::No);
        assert_eq!(guest.mmu.take_accessed(Gfn::new(90), 20), Accessed::Yes);
        assert_eq!(guest.mmu.take_accessed(Gfn::new(90), 20), Accessed::No);
        guest.mmu.audit().unwrap();
    }
}

#[test]
fn a_slots_flags_change_while_the_guest_runs() {
    let mut guest = Guest::new();
    let root = guest.table();
    guest.map(root, 0, 100 << 12 | TABLE | D);
    guest.map(root, 4 << 21, 1024 << 12 | TABLE | D);
    guest.load(0, long_mode(root));
    guest.page(write(0));
    guest
        .mmu
        .set_slot_flags(SLOT, SlotFlags::LOG_DIRTY)
        .unwrap();
    guest.page(write(0));
    let mut pages = Vec::new();
    guest
        .mmu
        .take_dirty(SLOT, |gfn| pages.push(gfn.as_u64()))
        .unwrap();
    assert_eq!(pages, [100]);
    guest
        .mmu
        .set_slot_flags(SLOT, SlotFlags::READ_ONLY)
        .unwrap();
    assert_eq!(guest.page(read(0)), 100);
    assert!(matches!(
        guest.try_access(0, write(0)).0,
        Err(FaultOutcome::Mmio {
            target: MmioTarget::ReadOnlySlot,
            ..
        })
    ));
    guest.mmu.set_slot_flags(SLOT, SlotFlags::empty()).unwrap();
    assert_eq!(guest.page(write(0)), 100);
}

#[test]
fn under_the_total_limit_one_vm_takes_from_another() {
    let mut large = Guest::new();
    regions(&mut large, 60);
    for region in 0..60 {
        large.page(read(region << 21));
    }
    let mut small = Guest::new();
    let config = MmuConfig {
        limit: 100,
        prefetch: 1,
        ..MmuConfig::default()
    };
    small.mmu = large.pool.create(small.host.clone(), config);
    let memory = MemorySlot {
        id: SLOT,
        base: Gfn::new(0),
        pages: PAGES,
        flags: SlotFlags::empty(),
    };
    small.mmu.add_slot(memory).unwrap();
    small.cpus = vec![Cpu::new(&small.mmu)];
    let root = small.table();
    small.map(root, 0, 100 << 12 | TABLE);
    small.load(0, long_mode(root));
    let held = large.mmu.used();
    large.pool.set_limit(held);
    assert_eq!(small.page(read(0)), 100);
    assert_eq!(small.mmu.used(), 4);
    assert_eq!(large.mmu.used(), held - 4);
    assert_eq!(large.pool.count(), held);
    large.mmu.audit().unwrap();
}

#[test]
fn a_child_of_another_frame_is_not_filled() {
    let mut guest = Guest::new();
    let root = guest.table();
    let (first, second, alias) = (5 << 21, 6 << 21, 1 << 30);
    for page in 0..4 {
        guest.map(root, first + (page << 12), (100 + page) << 12 | TABLE | D);
        guest.map(root, second + (page << 12), (200 + page) << 12 | TABLE | D);
    }
    let directory = guest.get(guest.get(root, 0) >> 12, 0) >> 12;
    guest.map(root, alias, directory << 12 | TABLE | D);
    guest.load(0, long_mode(root));
    assert_eq!(guest.page(read(first)), 100);
    // The directory becomes unsync, and its entry comes to point to the other table, which has the
    // same role. Without a flush the old mapping may be used, but the old page must not be filled
    // from the new table.
    assert_eq!(guest.page(write(alias)), directory);
    let (one, two) = (guest.get(directory, 5), guest.get(directory, 6));
    guest.set(directory, 5, two);
    assert_eq!(guest.page(read(first + 0x1000)), 201);
    guest.set(directory, 6, one);
    // The first fault links the old page, so that the next access faults no more.
    assert_eq!(guest.page(read(second)), 100);
    assert_eq!(guest.page(read(second + 0x1000)), 101);
    guest.mmu.flush_guest_tlb(&mut guest.cpus[0].vcpu);
    for page in 0..4 {
        assert_eq!(guest.page(read(first + (page << 12))), 200 + page);
        assert_eq!(guest.page(read(second + (page << 12))), 100 + page);
    }
}

#[test]
fn a_new_place_for_an_old_table_shows_its_present_content() {
    // For a translation that never existed no guest has to flush: neither for the table itself,
    // nor for one above it.
    for level in [2, 3, 4] {
        let mut guest = Guest::new();
        let root = guest.table();
        guest.map(root, 0, 100 << 12 | TABLE | D);
        guest.map(root, 0x1000, 102 << 12 | TABLE | D);
        let alias = 3 << 39;
        let table = guest.leaf_table(root, 0);
        guest.map(root, alias, table << 12 | TABLE | D);
        guest.load(0, long_mode(root));
        assert_eq!(guest.page(read(0)), 100);
        assert_eq!(guest.page(write(alias)), table);
        guest.set(table, 0, 101 << 12 | TABLE | D);
        // The table's holder gets a second, new entry for the same thing below it.
        let mut holder = root;
        for _ in level..4 {
            holder = guest.get(holder, 0) >> 12 & 0xff_ffff;
        }
        guest.set(holder, 1, guest.get(holder, 0));
        guest.mmu.track_guest_write(Gpa::new((holder << 12) + 8), 8);
        // Another page first: its fault links the table, the next access finds what is there.
        let place = 1 << (12 + 9 * (level - 1));
        assert_eq!(guest.page(read(place + 0x1000)), 102, "level {level}");
        assert_eq!(guest.page(read(place)), 101, "level {level}");
    }
}

#[test]
fn narrowing_an_entry_reaches_every_processor() {
    let mut guest = Guest::new();
    let root = guest.table();
    guest.map(root, 0, 100 << 12 | P | W | A | D);
    let table = guest.leaf_table(root, 0);
    guest.map(root, 1 << 30, table << 12 | TABLE | D);
    guest.cpus.push(Cpu::new(&guest.mmu));
    for cpu in 0..2 {
        guest.load(cpu, long_mode(root));
        assert_eq!(guest.try_access(cpu, write(0)).0, Ok(100));
    }
    // A supervisor's writable page becomes a user's read-only one, and a fault of the first processor
    // brings that into the shadow before anybody flushes.
    assert_eq!(guest.page(write(1 << 30)), table);
    guest.set(table, 0, 100 << 12 | P | U | A | D);
    // No writable mapping of the table is left whose protection would flush anyway.
    guest
        .mmu
        .unprotect(Gfn::new(guest.leaf_table(root, 1 << 30)));
    assert_eq!(
        guest.try_access(1, write(0)).0,
        Ok(100),
        "stale, as a TLB may be"
    );
    assert_eq!(guest.page(by_user(read(0))), 100);
    // After its own flush the second processor must not write any more.
    guest.mmu.flush_guest_tlb(&mut guest.cpus[1].vcpu);
    assert!(matches!(
        guest.try_access(1, write(0)).0,
        Err(FaultOutcome::Inject(_))
    ));
}

#[test]
fn a_table_inside_a_large_page_is_write_protected() {
    let mut guest = Guest::new();
    let (root, pointers, directory) = (guest.table(), guest.table(), guest.table());
    guest.set(root, 0, pointers << 12 | TABLE);
    guest.set(pointers, 0, directory << 12 | TABLE);
    guest.set(directory, 0, 2 << 21 | P | W | U | A | D | PS);
    let inside = 1024 + 5;
    guest.map(root, 1 << 39, 100 << 12 | TABLE | D);
    let above = guest.get(guest.get(guest.get(root, 1) >> 12, 0) >> 12, 0) >> 12;
    let holder = guest.get(guest.get(root, 1) >> 12, 0) >> 12;
    assert_ne!(above, inside);
    guest.set(holder, 0, inside << 12 | TABLE);
    guest.set(inside, 0, 100 << 12 | TABLE | D);
    guest.load(0, long_mode(root));
    // First a large writable page, then a table in its midst.
    assert_eq!(guest.page(write(0x1000)), 1025);
    assert_eq!(
        guest.faults(write(0x2000)),
        0,
        "one entry maps the whole page"
    );
    assert_eq!(guest.page(read(1 << 39)), 100);
    // The write must be noticed.
    assert_eq!(guest.faults(write(0x5000)), 1);
    guest.set(inside, 0, 101 << 12 | TABLE | D);
    guest.mmu.flush_guest_tlb(&mut guest.cpus[0].vcpu);
    assert_eq!(guest.page(read(1 << 39)), 101);
}

#[test]
fn each_way_to_flush_makes_a_changed_entry_seen() {
    type Flush = fn(&mut Guest, u64);
    let ways: [(&str, Flush); 5] = [
        ("the same root again", |guest, root| {
            guest.load(0, long_mode(root));
        }),
        ("another root and back", |guest, root| {
            let other = guest.table();
            guest.map(other, 0, 103 << 12 | TABLE | D);
            guest.load(0, long_mode(other));
            assert_eq!(guest.page(read(0)), 103);
            guest.load(0, long_mode(root));
        }),
        ("another mode and back", |guest, root| {
            guest.load(0, PagingRegisters::RESET);
            assert_eq!(guest.page(read(0x10_3000)), 0x103);
            guest.load(0, long_mode(root));
        }),
        ("INVLPG", |guest, _| {
            guest
                .mmu
                .invalidate_page(&mut guest.cpus[0].vcpu, Gva::new(0x1234));
        }),
        ("INVPCID", |guest, _| {
            guest.mmu.flush_guest_tlb(&mut guest.cpus[0].vcpu);
        }),
    ];
    for (way, flush) in ways {
        let mut guest = Guest::new();
        let root = guest.table();
        for page in 0..3 {
            guest.map(root, page << 12, (100 + page) << 12 | TABLE | D);
        }
        let (table, alias) = (guest.leaf_table(root, 0), 1 << 30);
        guest.map(root, alias, table << 12 | TABLE | D);
        guest.load(0, long_mode(root));
        assert_eq!(guest.page(write(0x1000)), 101);
        assert_eq!(guest.page(write(alias)), table);
        // The page goes elsewhere and becomes read-only; the page after it is gone.
        guest.set(table, 1, 200 << 12 | P | U | A | D);
        assert_eq!(
            guest.page(write(0x1000)),
            101,
            "{way}: stale until the flush"
        );
        flush(&mut guest, root);
        assert_eq!(guest.page(read(0x1000)), 200, "{way}");
        let denied = Code::PROTECTION_VIOLATION | Code::CAUSED_BY_WRITE;
        assert_eq!(guest.fault(write(0x1000)), denied, "{way}");
        assert_eq!(guest.page(read(0)), 100, "{way}");
    }
}
