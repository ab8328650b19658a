//! What shadow tables say: rights, children, large pages, neighbours.

use crate::guest::*;
use std::sync::atomic::Ordering;
use umbra_mmu::*;
use umbra_vcpu::address::Gpa;
use x86_64::registers::control::{Cr0Flags, Cr4Flags};
use x86_64::structures::idt::PageFaultErrorCode as Code;

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
