//! Memory slots: MMIO, logs of writes and of use.

use crate::guest::*;
use umbra_mmu::*;
use umbra_vcpu::address::{Gfn, Gpa};

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
