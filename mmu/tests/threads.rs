//! Several virtual CPUs on one MMU at once, with the host reclaiming in between: no frame is used
//! after it was freed, every translation leads to a page that its entry has held, and all structures
//! are whole at the end.
#![allow(missing_docs, reason = "a test")]
#![allow(
    clippy::precedence,
    reason = "bits are written as the manual draws them"
)]

mod common;

use common::{Cpu, SimHost, Try};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use umbra_mmu::*;
use umbra_vcpu::address::{Gfn, Gva};
use x86_64::registers::control::{Cr0Flags, Cr4Flags, EferFlags};

const TABLE: u64 = 0x27;
const DIRTY: u64 = 0x40;
/// The tables: root, pointers, directory, then page tables of 2 MiB each.
const TABLES: u64 = 24;
const FIRST_TABLE: u64 = 4;

#[test]
fn processors_and_shrinker_share_an_mmu() {
    let host = SimHost::new(1024, 1000);
    let pool = MmuPool::new(1000);
    let mmu = pool.create(
        host.clone(),
        MmuConfig {
            limit: 20,
            ..MmuConfig::default()
        },
    );
    host.set_slot(SlotId(0), 0);
    let memory = MemorySlot {
        id: SlotId(0),
        base: Gfn::new(0),
        pages: 1024,
        flags: SlotFlags::empty(),
    };
    mmu.add_slot(memory).unwrap();
    for page in 0..1024 {
        host.touch(page);
    }
    let set = |table: u64, index: u64, value: u64| {
        host.word(table, index as usize)
            .store(value, Ordering::SeqCst);
    };
    set(1, 0, 2 << 12 | TABLE);
    set(2, 0, 3 << 12 | TABLE);
    for table in 0..TABLES {
        let page = FIRST_TABLE + table;
        set(3, table, page << 12 | TABLE);
        for index in 0..8 {
            set(
                page,
                index,
                (100 + table * 16 + index) << 12 | TABLE | DIRTY,
            );
        }
        // The last table maps the tables, so that they are written while they are shadowed.
        set(FIRST_TABLE + TABLES, table, page << 12 | TABLE | DIRTY);
    }
    set(3, TABLES, (FIRST_TABLE + TABLES) << 12 | TABLE);
    let registers = PagingRegisters {
        cr0: Cr0Flags::PROTECTED_MODE_ENABLE | Cr0Flags::PAGING | Cr0Flags::WRITE_PROTECT,
        cr3: Cr3::new(1 << 12),
        cr4: Cr4Flags::PHYSICAL_ADDRESS_EXTENSION,
        efer: EferFlags::LONG_MODE_ENABLE,
        pdptrs: Pdptrs::default(),
    };
    let cpus: Vec<_> = (0..4).map(|_| Cpu::new(&mmu)).collect();
    let done = AtomicBool::new(false);
    let cpus: Vec<_> = thread::scope(|scope| {
        let (mmu, host, done, pool) = (&*mmu, &host, &done, &pool);
        let workers: Vec<_> = cpus
            .into_iter()
            .map(|mut cpu| {
                scope.spawn(move || {
                    mmu.load_registers(&mut cpu.vcpu, registers);
                    let mut random = cpu.number as u64 * 77 + 1;
                    for _ in 0..20_000 {
                        random = random
                            .wrapping_mul(6364136223846793005)
                            .wrapping_add(1442695040888963407);
                        step(mmu, host, &mut cpu, random >> 16);
                    }
                    cpu
                })
            })
            .collect();
        let shrinker = scope.spawn(move || {
            let mut round = 0;
            while !done.load(Ordering::SeqCst) {
                round += 1;
                match round % 4 {
                    0 => mmu.zap_all(),
                    1 => drop(mmu.unprotect(Gfn::new(round % 8))),
                    2 => mmu.set_limit(12 + round as usize % 20),
                    _ => assert!(pool.scan(5).skipped <= 1),
                }
                mmu.audit().unwrap();
                thread::yield_now();
            }
        });
        let cpus = workers
            .into_iter()
            .map(|worker| worker.join().unwrap())
            .collect();
        done.store(true, Ordering::SeqCst);
        shrinker.join().unwrap();
        cpus
    });
    mmu.audit().unwrap();
    assert_eq!(pool.count(), mmu.used());
    for cpu in cpus {
        mmu.destroy_vcpu(cpu.vcpu);
    }
    drop(mmu);
    assert_eq!(host.0.frames_in_use.load(Ordering::SeqCst), 0);
}

/// Reads a page, changes an entry through the tables' own mapping, or flushes.
fn step(mmu: &Mmu<SimHost>, host: &SimHost, cpu: &mut Cpu, random: u64) {
    let (table, index) = (random % TABLES, random / 64 % 8);
    let Cpu { vcpu, number } = cpu;
    if (random / 1024).is_multiple_of(16) {
        mmu.flush_guest_tlb(vcpu);
        return;
    }
    let writes = random / 1024 % 16 < 4;
    let attempt = Try {
        gva: Gva::new(if writes {
            TABLES << 21 | table << 12
        } else {
            table << 21 | index << 12
        }),
        kind: if writes {
            AccessKind::Write
        } else {
            AccessKind::Read
        },
        user: false,
        ac: false,
    };
    for _ in 0..10_000 {
        let epoch = host.0.epoch.load(Ordering::SeqCst);
        let entry = match mmu.prepare_entry(vcpu) {
            Ok(entry) => entry,
            Err(MmuError::NoPageAvailable(_)) => continue,
            Err(error) => panic!("{error}"),
        };
        // Keeps A and D, so that only the frame changes.
        let value = (100 + table * 16 + random / 4096 % 16) << 12 | TABLE | DIRTY;
        let ran = host.run_once(
            *number,
            &entry,
            Cr4Flags::empty(),
            &attempt,
            epoch,
            |frame| {
                if writes {
                    host.word(host.ram_page(frame), index as usize)
                        .store(value, Ordering::SeqCst);
                }
            },
        );
        match ran {
            // Kicked before it entered: what changed may be its root.
            None => {}
            Some(Ok(frame)) => {
                let page = host.ram_page(frame);
                if writes {
                    assert_eq!(page, FIRST_TABLE + table);
                    mmu.invalidate_page(vcpu, Gva::new(table << 21 | index << 12));
                } else {
                    assert_eq!((page - 100) / 16, table, "a page of another table");
                }
                return;
            }
            Some(Err(error)) => match mmu.handle_page_fault(vcpu, &attempt.fault(error)) {
                Ok(FaultOutcome::Fixed) | Err(MmuError::NoPageAvailable(_)) => {}
                other => panic!("{attempt:x?}: {other:x?}"),
            },
        }
    }
    panic!("{attempt:x?} makes no progress");
}
