//! The guest writes its tables, and flushes.

use crate::common::Cpu;
use crate::guest::*;
use std::sync::atomic::Ordering;
use umbra_mmu::*;
use umbra_vcpu::address::{Gfn, Gpa, Gva};
use x86_64::registers::control::Cr4Flags;
use x86_64::structures::idt::PageFaultErrorCode as Code;

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

#[test]
fn only_what_the_loaded_root_leads_to_is_synced() {
    let mut guest = Guest::new();
    let roots = [guest.table(), guest.table()];
    let alias = 1 << 30;
    for (root, frame) in roots.into_iter().zip([100, 110]) {
        guest.map(root, 0, frame << 12 | TABLE | D);
        let table = guest.leaf_table(root, 0);
        guest.map(root, alias, table << 12 | TABLE | D);
    }
    let unsync = |guest: &Guest| guest.mmu.statistics().mmu_unsync;
    for (root, frame) in roots.into_iter().zip([100, 110]) {
        guest.load(0, long_mode(root));
        assert_eq!(guest.page(read(0)), frame);
        assert_eq!(guest.page(write(alias)), guest.leaf_table(root, 0));
    }
    // The first root's table was not looked at when the second root was loaded.
    assert_eq!(unsync(&guest), 2);
    for (root, frame) in roots.into_iter().zip([200, 210]) {
        guest.set(guest.leaf_table(root, 0), 0, frame << 12 | TABLE | D);
    }
    guest.load(0, long_mode(roots[1]));
    assert_eq!(guest.page(read(0)), 210);
    assert_eq!(unsync(&guest), 1);
    guest.mmu.audit().unwrap();
    guest.load(0, long_mode(roots[0]));
    assert_eq!(guest.page(read(0)), 200);
    assert_eq!(unsync(&guest), 0);
    // And written anew it is found anew, through marks that were cleared.
    assert_eq!(guest.page(write(alias)), guest.leaf_table(roots[0], 0));
    guest.set(guest.leaf_table(roots[0], 0), 0, 201 << 12 | TABLE | D);
    guest.load(0, long_mode(roots[0]));
    assert_eq!(guest.page(read(0)), 201);
}

#[test]
fn what_invlpg_dropped_is_not_found_again_under_other_keys() {
    let mut guest = Guest::new();
    let (root, alias) = (guest.table(), 1 << 30);
    guest.map(root, 0, 100 << 12 | TABLE | D);
    let table = guest.leaf_table(root, 0);
    guest.map(root, alias, table << 12 | TABLE | D);
    let mut registers = long_mode(root);
    registers.cr4 |= Cr4Flags::PROTECTION_KEY_USER;
    guest.load(0, registers);
    // WRPKRU flushes nothing, so both roots keep what they have.
    for pkru in [Pkru(0), Pkru(4)] {
        guest.mmu.set_pkru(&mut guest.cpus[0].vcpu, pkru);
        assert_eq!(guest.page(read(0)), 100);
        assert_eq!(guest.page(write(alias)), table);
    }
    guest.set(table, 0, 200 << 12 | TABLE | D);
    guest
        .mmu
        .invalidate_page(&mut guest.cpus[0].vcpu, Gva::new(0));
    for pkru in [Pkru(0), Pkru(4)] {
        guest.mmu.set_pkru(&mut guest.cpus[0].vcpu, pkru);
        assert_eq!(guest.page(read(0)), 200, "{pkru:?}");
    }
}

#[test]
fn a_link_through_two_parents_is_marked_in_both() {
    let mut guest = Guest::new();
    let (root, other) = (guest.table(), guest.table());
    guest.map(root, 0, 100 << 12 | TABLE | D);
    let table = guest.leaf_table(root, 0);
    guest.map(root, 1 << 30, table << 12 | TABLE | D);
    // The other root's own upper tables lead to the same page table.
    guest.map(other, 0, 0);
    guest.set(guest.directory(other, 0), 0, table << 12 | TABLE);
    for root in [other, root] {
        guest.load(0, long_mode(root));
        assert_eq!(guest.page(read(0)), 100);
    }
    for frame in [200, 201] {
        assert_eq!(guest.page(write(1 << 30)), table);
        guest.set(table, 0, frame << 12 | TABLE | D);
        let new = if frame == 200 { other } else { root };
        guest.load(0, long_mode(new));
        assert_eq!(guest.page(read(0)), frame);
        guest.load(0, long_mode(root));
        guest.mmu.audit().unwrap();
    }
}

#[test]
fn an_entry_that_only_looks_like_what_was_kept_is_dropped() {
    let mut guest = Guest::new();
    let (root, alias) = (guest.table(), 1 << 30);
    guest.map(root, 0, 0xfee00 << 12 | TABLE | D);
    let table = guest.leaf_table(root, 0);
    guest.map(root, alias, table << 12 | TABLE | D);
    guest.load(0, long_mode(root));
    assert!(guest.try_access(0, read(0)).0.is_err());
    assert_eq!(guest.page(write(alias)), table);
    // A page that is not present, whatever its other bits.
    for low in 0..128 {
        guest.set(table, 0, 0xfee00 << 8 | low << 1);
        guest.load(0, long_mode(root));
        assert_eq!(guest.fault(read(0)), Code::empty());
        guest.set(table, 0, 0xfee00 << 12 | TABLE | D);
        assert!(guest.try_access(0, read(0)).0.is_err());
        assert_eq!(guest.page(write(alias)), table);
    }
}

#[test]
fn another_processors_store_while_a_sync_flushes_is_seen() {
    let mut guest = Guest::new();
    let (root, alias) = (guest.table(), 1 << 30);
    guest.map(root, 0, 100 << 12 | TABLE | D);
    let table = guest.leaf_table(root, 0);
    guest.map(root, alias, table << 12 | TABLE | D);
    guest.load(0, long_mode(root));
    assert_eq!(guest.page(read(0)), 100);
    assert_eq!(guest.page(write(alias)), table);
    // The table is writable until every processor has seen the flush.
    let host = guest.host.clone();
    *guest.host.0.during_flush.lock().unwrap() = Some(Box::new(move || {
        host.word(table, 0)
            .store(101 << 12 | TABLE | D, Ordering::Relaxed);
    }));
    guest.load(0, long_mode(root));
    assert_eq!(guest.page(read(0)), 101);
    *guest.host.0.during_flush.lock().unwrap() = None;
}

#[test]
fn a_root_in_use_is_never_flooded() {
    let mut guest = Guest::new();
    let (root, other, alias) = (guest.table(), guest.table(), 1 << 30);
    guest.map(root, 0, 100 << 12 | TABLE | D);
    guest.map(other, alias, root << 12 | TABLE | D);
    guest.cpus.push(Cpu::new(&guest.mmu));
    guest.load(0, long_mode(other));
    guest.load(1, long_mode(root));
    assert_eq!(guest.try_access(1, read(0)).0, Ok(100));
    for round in 0..20 {
        assert_eq!(guest.page(write(alias)), root);
        guest.set(root, 300, (700 + round) << 12 | TABLE);
        guest.load(1, long_mode(root));
        assert_eq!(guest.try_access(1, read(0)), (Ok(100), 0));
    }
    let statistics = guest.mmu.statistics();
    assert!(statistics.mmu_pte_write >= 20);
    assert_eq!(
        (statistics.mmu_flooded, statistics.mmu_shadow_zapped),
        (0, 0)
    );
}
