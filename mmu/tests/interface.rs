//! What callers see of the MMU besides faults: translations for emulation, refusals, and texts.
#![allow(missing_docs, reason = "a test")]

mod common;

use std::sync::atomic::Ordering;

use common::{Cpu, SimHost, Try};
use umbra_mmu::*;
use umbra_vcpu::address::{Gfn, Gpa, Gva};
use x86_64::registers::control::{Cr0Flags, Cr4Flags, EferFlags};
use x86_64::structures::idt::PageFaultErrorCode as Code;

const PAGES: u64 = 64;

fn slot(id: u16, base: u64, pages: u64) -> MemorySlot {
    MemorySlot {
        id: SlotId(id),
        base: Gfn::new(base),
        pages,
        flags: SlotFlags::empty(),
    }
}

fn mmu() -> (Mmu<SimHost>, SimHost) {
    let host = SimHost::new(PAGES as usize, 200);
    let mmu = Mmu::new(host.clone(), MmuConfig::default());
    host.set_slot(SlotId(0), 0);
    mmu.add_slot(slot(0, 0, PAGES)).unwrap();
    (mmu, host)
}

/// Paging with two levels, whose root is in frame 1.
fn legacy() -> PagingRegisters {
    PagingRegisters {
        cr0: Cr0Flags::PROTECTED_MODE_ENABLE | Cr0Flags::PAGING | Cr0Flags::WRITE_PROTECT,
        cr3: Cr3::new(1 << 12),
        cr4: Cr4Flags::empty(),
        efer: EferFlags::empty(),
        pdptrs: Pdptrs::default(),
    }
}

fn attempt(gva: u64, kind: AccessKind) -> Try {
    Try {
        gva: Gva::new(gva),
        kind,
        user: true,
        ac: false,
    }
}

#[test]
fn translations_for_emulation_follow_the_guest_s_tables() {
    let (mmu, host) = mmu();
    let mut cpu = Cpu::new(&mmu);
    assert_eq!(cpu.vcpu.pkru(), Pkru(0));
    mmu.load_registers(&mut cpu.vcpu, legacy());
    assert_eq!(cpu.vcpu.registers().cr3.as_u64(), 1 << 12);
    // Linear address 0x1000 is read-only in frame 3.
    host.word(1, 0).store(2 << 12 | 7, Ordering::Relaxed);
    host.word(2, 0)
        .store((3 << 12 | 5) << 32, Ordering::Relaxed);
    let pages = [1, 2];
    for page in pages {
        host.touch(page);
    }
    let translate = |gva, kind, marking| {
        let attempt = attempt(gva, kind);
        mmu.translate(&cpu.vcpu, attempt.gva, &attempt.access(marking))
    };
    let read = |marking| translate(0x1008, AccessKind::Read, marking);
    let accessed = || host.word(1, 0).load(Ordering::Relaxed) & 0x20 != 0;
    assert_eq!(read(Marking::Leave), Ok(Gpa::new(0x3008)));
    assert!(!accessed(), "a debugger's look leaves no mark");
    assert_eq!(read(Marking::SetAccessedDirty), Ok(Gpa::new(0x3008)));
    assert!(accessed());
    // Outside long mode only 32 bits of an address count.
    let high = translate(0x1_0000_1008, AccessKind::Read, Marking::Leave);
    assert_eq!(high, Ok(Gpa::new(0x3008)));
    let fault = |gva, kind, error| {
        let expected = PageFault {
            gva: Gva::new(gva),
            error,
        };
        let found = translate(gva, kind, Marking::SetAccessedDirty);
        assert_eq!(found, Err(TranslateError::Fault(expected)));
    };
    let user_write = Code::USER_MODE | Code::CAUSED_BY_WRITE;
    fault(
        0x1008,
        AccessKind::Write,
        user_write | Code::PROTECTION_VIOLATION,
    );
    fault(0x2000, AccessKind::Write, user_write);
    fault(0x40_0000, AccessKind::Read, Code::USER_MODE);
    mmu.destroy_vcpu(cpu.vcpu);
}

#[test]
fn pointers_with_reserved_bits_are_refused() {
    let (mmu, host) = mmu();
    host.touch(4);
    let cr3 = Cr3::new(4 << 12 | 32);
    host.word(4, 4).store(5 << 12 | 1, Ordering::Relaxed);
    host.word(4, 6)
        .store(0xffff_ffff_ffff_fffe, Ordering::Relaxed);
    assert_eq!(
        mmu.read_pdptrs(cr3),
        Ok(Pdptrs([5 << 12 | 1, 0, 0xffff_ffff_ffff_fffe, 0])),
        "reserved bits of an absent pointer do not count"
    );
    for value in [6 << 12 | 3, 1 << 40 | 1, 6 << 12 | 0x101] {
        host.word(4, 7).store(value, Ordering::Relaxed);
        assert_eq!(mmu.read_pdptrs(cr3), Err(InvalidPdpte { index: 3, value }));
    }
}

#[test]
fn slots_that_cannot_be_are_refused_and_leave_everything_as_it_was() {
    let (mmu, host) = mmu();
    assert_eq!(mmu.add_slot(slot(0, 100, 1)), Err(SlotError::Exists));
    assert_eq!(
        mmu.add_slot(slot(1, PAGES - 1, 2)),
        Err(SlotError::Overlaps(SlotId(0)))
    );
    assert_eq!(mmu.add_slot(slot(1, 100, 0)), Err(SlotError::BadRange));
    assert_eq!(mmu.add_slot(slot(1, 1 << 40, 1)), Err(SlotError::BadRange));
    assert_eq!(mmu.add_slot(slot(1, u64::MAX, 2)), Err(SlotError::BadRange));
    assert_eq!(mmu.remove_slot(SlotId(1)), Err(SlotError::Unknown));
    assert_eq!(
        mmu.move_slot(SlotId(1), Gfn::new(200)),
        Err(SlotError::Unknown)
    );
    assert_eq!(
        mmu.set_slot_flags(SlotId(1), SlotFlags::READ_ONLY),
        Err(SlotError::Unknown)
    );
    assert_eq!(mmu.take_dirty(SlotId(1), |_| ()), Err(SlotError::Unknown));
    for number in 1..MAXIMUM_SLOTS as u16 {
        host.set_slot(SlotId(number), 0);
        let more = slot(number, 100 * u64::from(number), 1);
        assert_eq!(mmu.add_slot(more), Ok(()));
    }
    assert_eq!(mmu.add_slot(slot(999, 50_000, 1)), Err(SlotError::TooMany));
    // Where it cannot go, it stays.
    assert_eq!(
        mmu.move_slot(SlotId(1), Gfn::new(200)),
        Err(SlotError::Overlaps(SlotId(2)))
    );
    assert_eq!(mmu.remove_slot(SlotId(2)), Ok(()));
    assert_eq!(mmu.move_slot(SlotId(1), Gfn::new(200)), Ok(()));
    mmu.audit().unwrap();
}

#[test]
fn a_virtual_cpu_s_place_is_used_again() {
    let (mmu, host) = mmu();
    let frames = || host.0.frames_in_use.load(Ordering::Relaxed);
    for _ in 0..100 {
        let cpu = Cpu::new(&mmu);
        assert_eq!(frames(), 1);
        mmu.destroy_vcpu(cpu.vcpu);
        assert_eq!(frames(), 0);
    }
}

#[test]
fn the_default_limit_is_one_page_in_fifty() {
    assert_eq!(default_limit(0), MINIMUM_PAGES);
    assert_eq!(default_limit(50 * MINIMUM_PAGES + 49), MINIMUM_PAGES);
    assert_eq!(default_limit(1 << 18), 5242);
    let pool = MmuPool::<SimHost>::new(7);
    assert_eq!((pool.limit(), pool.count()), (7, 0));
    pool.set_limit(9);
    assert_eq!(pool.limit(), 9);
    assert_eq!(pool.scan(5), Shrunk::default());
}

#[test]
fn errors_say_what_and_how_much() {
    let none = MmuError::from(NoPageAvailable {
        needed: 4,
        used: 60,
        limit: 62,
        pinned: 59,
    });
    assert_eq!(
        none.to_string(),
        "no MMU page available: needed 4, used 60 of 62, pinned 59"
    );
    assert_eq!(
        MmuError::from(OutOfMemory).to_string(),
        "the host is out of memory"
    );
    let slots = [
        (SlotError::Exists, "a memory slot of this name exists"),
        (SlotError::Unknown, "no memory slot has this name"),
        (SlotError::Overlaps(SlotId(7)), "overlaps memory slot 7"),
        (SlotError::BadRange, "the slot is empty or ends past 2^52"),
        (SlotError::TooMany, "more than 64 memory slots"),
        (SlotError::OutOfMemory, "no host memory for reverse maps"),
    ];
    for (error, text) in slots {
        assert_eq!(error.to_string(), text);
    }
}

#[test]
fn an_inspection_shows_both_paths_and_changes_nothing() {
    let (mmu, host) = mmu();
    let mut cpu = Cpu::new(&mmu);
    mmu.load_registers(&mut cpu.vcpu, legacy());
    // Linear address 0x1000 is read-only in frame 3, 0x2000 in no frame, 0x3000 beyond memory.
    let entries: [u64; 2] = [(3 << 12 | 5) << 32, (PAGES << 12 | 7) << 32];
    host.word(1, 0).store(2 << 12 | 7, Ordering::Relaxed);
    host.word(2, 0).store(entries[0], Ordering::Relaxed);
    host.word(2, 1).store(entries[1], Ordering::Relaxed);
    for page in [1, 2, 3] {
        host.touch(page);
    }
    let inspect = |cpu: &Cpu, gva| mmu.inspect(&cpu.vcpu, Gva::new(gva));
    let before = inspect(&cpu, 0x1_0000_1008);
    assert_eq!(before.gva, Gva::new(0x1008), "32 bits count");
    let directory = before.guest[1].unwrap();
    assert_eq!(
        (directory.at, directory.value),
        (Gpa::new(0x1000), 2 << 12 | 7)
    );
    let table = before.guest[0].unwrap();
    assert_eq!((table.at, table.index), (Gpa::new(0x2004), 1));
    let permits = Permissions {
        write: Permission::Denied,
        user: Permission::Granted,
        execute: Permission::Granted,
    };
    let page = GuestEnd::Page {
        gpa: Gpa::new(0x3008),
        level: Level::One,
        permits,
    };
    assert_eq!(before.guest_end, page);
    assert_eq!(before.shadow_end, ShadowEnd::NoRoot);

    mmu.prepare_entry(&mut cpu.vcpu).unwrap();
    assert_eq!(
        inspect(&cpu, 0x1008).shadow_end,
        ShadowEnd::Empty(Level::Two)
    );
    let fault = |gva| attempt(gva, AccessKind::Read).fault(Code::USER_MODE);
    let fixed = mmu.handle_page_fault(&mut cpu.vcpu, &fault(0x1008));
    assert_eq!(fixed, Ok(FaultOutcome::Fixed));
    let marked = host.word(1, 0).load(Ordering::Relaxed);
    let after = inspect(&cpu, 0x1008);
    let ShadowEnd::Page {
        level,
        permits: shadow,
        ..
    } = after.shadow_end
    else {
        panic!("{after:?}");
    };
    assert_eq!((level, shadow), (Level::One, permits));
    let leaf = after.shadow[0].unwrap();
    assert_eq!(
        (leaf.gfn, leaf.index, leaf.kind),
        (Gfn::new(2), 1, ShadowKind::Synced)
    );
    assert_eq!(after.shadow[1].unwrap().gfn, Gfn::new(1));

    let missing = inspect(&cpu, 0x2000);
    assert_eq!(missing.guest_end, GuestEnd::NotPresent(Level::One));
    assert_eq!(missing.shadow_end, ShadowEnd::Empty(Level::One));
    let device = mmu.handle_page_fault(&mut cpu.vcpu, &fault(0x3000));
    assert!(matches!(device, Ok(FaultOutcome::Mmio { .. })));
    assert_eq!(inspect(&cpu, 0x3000).shadow_end, ShadowEnd::Mmio);
    assert_eq!(host.word(1, 0).load(Ordering::Relaxed), marked);
    mmu.audit().unwrap();
}

#[test]
fn an_inspection_tells_addresses_and_entries_that_no_processor_takes() {
    let (mmu, host) = mmu();
    let mut cpu = Cpu::new(&mmu);
    mmu.load_registers(
        &mut cpu.vcpu,
        PagingRegisters {
            cr4: Cr4Flags::PHYSICAL_ADDRESS_EXTENSION,
            efer: EferFlags::LONG_MODE_ENABLE,
            ..legacy()
        },
    );
    let end = |gva| mmu.inspect(&cpu.vcpu, Gva::new(gva)).guest_end;
    host.touch(1);
    host.word(1, 0).store(2 << 12 | 7, Ordering::Relaxed);
    host.word(1, 256).store(1 << 7 | 1, Ordering::Relaxed);
    assert_eq!(end(0x8000_0000_0000), GuestEnd::NotCanonical);
    assert_eq!(end(0xffff_8000_0000_0000), GuestEnd::Malformed(Level::Four));
    assert_eq!(end(0x1000), GuestEnd::NotPresent(Level::Three));
}
