//! Ways to change a page table: through itself, through aliases, shared by two roots, and with
//! stores of every width.

use super::space::{Mode, PAGE, Space, bits, poke_entry, take_frame};
use super::suite::{Suite, error};
use crate::cpu::{self, invlpg};
use crate::memory::{self, PhysAddr, VirtAddr, peek, poke};
use crate::trap::catch;

pub fn run(suite: &mut Suite<'_>) {
    partial_stores(suite);
    locked_stores(suite);
    table_as_data(suite);
    shared_table(suite);
    recursive(suite);
    table_becomes_data(suite);
    replaced_tables(suite);
}

/// Two frames whose first words are 1 and 2, page `index` mapped to the first.
fn two_frames(suite: &mut Suite<'_>, index: usize) -> (VirtAddr, PhysAddr, PhysAddr) {
    // Neighbours, so that entries differ in bits 12 and up by one byte's store.
    let first = super::space::take(2 * PAGE, 2 * PAGE);
    let second = first.plus(PAGE);
    poke(first, 1_u32);
    poke(second, 2_u32);
    let page = suite.page(index);
    suite.space.map(page, 1, first, bits::PWU);
    invlpg(page);
    suite.reads("the first frame", 1, page);
    (page, first, second)
}

fn partial_stores(suite: &mut Suite<'_>) {
    let (page, first, second) = two_frames(suite, 30);
    let entry = suite.space.entry(page, 1);
    let flags = bits::PWU as u8;
    poke(entry, 0_u8);
    invlpg(page);
    suite.read_faults("a byte store of P = 0", 0, page);
    poke(entry, flags);
    suite.reads("a byte store of P = 1", 1, page);
    poke(entry.plus(1), (second.0 >> 8) as u8);
    invlpg(page);
    suite.reads("a byte store of address bits", 2, page);
    poke(entry, first.0 as u16 | u16::from(flags));
    invlpg(page);
    suite.reads("a word store", 1, page);
    poke(entry.plus(1), (second.0 >> 8) as u16);
    invlpg(page);
    suite.reads("a word store at an odd address", 2, page);
    poke(entry, first.0 as u32 | u32::from(flags));
    invlpg(page);
    suite.reads("a dword store", 1, page);
    poke(
        PhysAddr(entry.0 - 2),
        (second.0 as u32 | u32::from(flags)) << 16,
    );
    invlpg(page);
    suite.reads("a dword store across two entries", 2, page);
    // It cleared the high half of the neighbour below, which is not used.
    poke(entry.plus(1), first.0 as u32 >> 8);
    invlpg(page);
    suite.reads("a dword store at an odd address", 1, page);
    #[cfg(target_arch = "x86_64")]
    {
        poke(entry, second.0 | bits::PWU);
        invlpg(page);
        suite.reads("a qword store", 2, page);
        poke(PhysAddr(entry.0 - 4), (first.0 | bits::PWU) << 32);
        poke(entry.plus(4), 0_u32);
        invlpg(page);
        suite.reads("a qword store across two entries", 1, page);
    }
    suite.space.set(page, 1, 0);
    invlpg(page);
    suite.read_faults("a cleared entry", 0, page);
    suite.checks.ok("table stores of every width and alignment");
}

fn locked_stores(suite: &mut Suite<'_>) {
    let (page, first, second) = two_frames(suite, 31);
    let entry = suite.space.entry(page, 1).identity();
    let old = suite.space.get(page, 1) as u32;
    let new = second.0 as u32 | bits::PWU as u32;
    let exchanged = catch(|| {
        let mut found = old;
        // SAFETY: the entry is identity-mapped; changing it changes the window only.
        unsafe {
            core::arch::asm!("lock cmpxchg dword ptr [{}], {:e}", in(reg) entry.0, in(reg) new,
                inout("eax") found, options(nostack));
        }
        found
    });
    let exchanged = suite.checks.succeeds("LOCK CMPXCHG", exchanged);
    suite
        .checks
        .equal("LOCK CMPXCHG found the entry", old, exchanged);
    invlpg(page);
    suite.reads("after LOCK CMPXCHG", 2, page);
    let exchanged = catch(|| {
        let mut value = first.0 as u32 | bits::PWU as u32;
        // SAFETY: as above.
        unsafe {
            core::arch::asm!("xchg dword ptr [{}], {:e}", in(reg) entry.0, inout(reg) value,
                options(nostack));
        }
        value
    });
    let exchanged = suite.checks.succeeds("XCHG", exchanged);
    suite.checks.equal(
        "XCHG found what was stored, with A",
        new | bits::A as u32,
        exchanged,
    );
    invlpg(page);
    suite.reads("after XCHG", 1, page);
    // SAFETY: as above.
    let result = catch(|| unsafe {
        core::arch::asm!("lock btr dword ptr [{}], 1", in(reg) entry.0, options(nostack));
    });
    suite.checks.succeeds("LOCK BTR", result);
    invlpg(page);
    suite.write_faults(
        "after LOCK BTR of W",
        error::PROTECTION | error::WRITE,
        page,
    );
    // SAFETY: as above.
    let result = catch(|| unsafe {
        core::arch::asm!("lock or dword ptr [{}], 2", in(reg) entry.0, options(nostack));
    });
    suite.checks.succeeds("LOCK OR", result);
    invlpg(page);
    suite.writes("after LOCK OR of W", page, 4);
    suite.checks.ok("read-modify-write instructions on tables");
}

fn table_as_data(suite: &mut Suite<'_>) {
    let (page, first, second) = two_frames(suite, 32);
    let entry = suite.space.entry(page, 1);
    let table = PhysAddr(entry.0 & !(PAGE - 1));
    let offset = (entry.0 & (PAGE - 1)) as usize;
    // Once in the very table that it shows, once by a table of its own.
    let far = suite.mode.window().plus(suite.mode.span(2) as usize * 3);
    for alias in [suite.page(33), far] {
        suite.space.map(alias, 1, table, bits::PWU);
        invlpg(alias);
        let got = memory::read::<u32>(alias.plus(offset));
        let got = suite.checks.succeeds("the entry through an alias", got);
        suite
            .checks
            .equal("it", suite.space.get(page, 1) as u32, got);
        for (frame, value) in [(second, 2), (first, 1), (second, 2)] {
            let low = frame.0 as u32 | bits::PWU as u32;
            suite.writes("ring 0's store to the entry", alias.plus(offset), low);
            invlpg(page);
            suite.reads("after ring 0's store", value, page);
            let got = memory::read::<u32>(alias.plus(offset));
            let got = suite.checks.succeeds("the entry through the alias", got);
            suite
                .checks
                .equal("its A", bits::A as u32, got & bits::A as u32);
        }
        let low = first.0 as u32 | bits::PWU as u32;
        suite.user_writes("ring 3's store to the entry", alias.plus(offset), low);
        invlpg(page);
        suite.user_reads("after ring 3's store", 1, page);
        suite.change(alias, 1, bits::W, 0);
        let code = error::PROTECTION | error::WRITE;
        suite.write_faults("a table mapped read-only", code, alias.plus(offset));
        suite.change(alias, 1, 0, bits::W);
    }
    suite.checks.ok("a page table that is also mapped as data");
}

fn shared_table(suite: &mut Suite<'_>) {
    let (page, first, second) = two_frames(suite, 34);
    let (home, other) = (suite.space, Space::new(suite.mode));
    other.set(page, 2, home.get(page, 2));
    let check = |suite: &mut Suite<'_>, value: u32| {
        for space in [other, home] {
            space.enter();
            suite.reads("through the shared table", value, page);
        }
    };
    check(suite, 1);
    for (from, frame, value) in [(home, second, 2), (other, first, 1), (home, second, 2)] {
        from.enter();
        from.map(page, 1, frame, bits::PWU);
        invlpg(page);
        suite.reads("after a store in one space", value, page);
        check(suite, value);
    }
    // The two roots give one table different permissions.
    other.change(page, 2, bits::W, 0);
    other.enter();
    suite.write_faults(
        "the space that narrows",
        error::PROTECTION | error::WRITE,
        page,
    );
    home.enter();
    suite.writes("the space that does not", page, 2);
    other.set(page, 2, 0);
    other.enter();
    suite.read_faults("the space without the table", 0, page);
    home.enter();
    suite.reads("the space with the table", 2, page);
    suite.checks.ok("a page table shared by two roots");
}

/// A root that maps itself: tables appear in their own address space.
fn recursive(suite: &mut Suite<'_>) {
    let (page, first, second) = two_frames(suite, 35);
    let (mode, space) = (suite.mode, suite.space);
    let slots = PAGE / mode.entry_bytes();
    let self_index = slots - 3;
    // Where the leaf tables appear, and the entry to take back at the end.
    let (base, own) = match mode {
        Mode::Legacy | Mode::LegacyPse => {
            let entry = space.root.plus(self_index * 4);
            poke_entry(mode, entry, space.root.0 | bits::P | bits::W);
            ((self_index as usize) << 22, entry)
        }
        Mode::Pae => {
            // PAE has four page directories: the last one shows all four.
            let last = VirtAddr(0xc000_0000);
            for index in 0..4 {
                let directory = peek::<u32>(space.root.plus(index * 8)) & !0xfff;
                let at = last.plus(index as usize * mode.span(2) as usize);
                space.set(at, 2, u64::from(directory) | bits::P | bits::W);
            }
            (last.0, space.entry(last.plus(3 * mode.span(2) as usize), 2))
        }
        Mode::Long => {
            let entry = space.root.plus(self_index * 8);
            poke_entry(mode, entry, space.root.0 | bits::P | bits::W);
            (canonical(self_index << 39), entry)
        }
    };
    cpu::reload_root();
    let page_number = (page.0 as u64 & 0xffff_ffff_ffff) / PAGE;
    let entry = VirtAddr(base + (page_number * mode.entry_bytes()) as usize);
    for (frame, value) in [(second, 2), (first, 1), (second, 2), (first, 1)] {
        suite.writes(
            "a store through the self-map",
            entry,
            frame.0 as u32 | bits::PWU as u32,
        );
        invlpg(page);
        suite.reads("after it", value, page);
        let got = memory::read::<u32>(entry);
        let got = suite.checks.succeeds("the entry through the self-map", got);
        suite
            .checks
            .equal("it, with A", space.get(page, 1) as u32, got);
        suite
            .checks
            .equal("its A", bits::A as u32, got & bits::A as u32);
    }
    suite
        .checks
        .succeeds("P = 0 through the self-map", memory::write(entry, 0_u8));
    invlpg(page);
    suite.read_faults("after it", 0, page);
    suite
        .checks
        .succeeds("P = 1", memory::write(entry, bits::PWU as u8));
    suite.reads("after it", 1, page);
    poke_entry(mode, own, 0);
    cpu::reload_root();
    if mode != Mode::Pae {
        suite.read_faults("the self-map removed", 0, entry);
    }
    suite.checks.ok("page tables that map themselves");
}

const fn canonical(address: u64) -> usize {
    ((address << 16).cast_signed() >> 16).cast_unsigned() as usize
}

fn table_becomes_data(suite: &mut Suite<'_>) {
    let (page, _, second) = two_frames(suite, 36);
    // Another table takes over: the old one is then plain memory, written at will.
    let page = VirtAddr(page.0 + suite.mode.span(2) as usize * 5);
    suite.space.map(page, 1, second, bits::PWU);
    suite.reads("through the old table", 2, page);
    let old = PhysAddr(suite.space.get(page, 2) & suite.mode.address_mask());
    let new = take_frame();
    for offset in (0..PAGE).step_by(4) {
        poke(new.plus(offset), peek::<u32>(old.plus(offset)));
    }
    suite.space.set(page, 2, new.0 | bits::PWU);
    invlpg(page);
    for offset in (0..PAGE).step_by(4) {
        poke(old.plus(offset), 0xa5a5_a5a5_u32);
    }
    suite.reads("through the new table", 2, page);
    suite.space.map(page, 1, old, bits::PWU);
    invlpg(page);
    suite.reads("the old table as a page", 0xa5a5_a5a5, page);
    suite.writes("a store to it", page, 6);
    suite.checks.equal("it", 6, peek::<u32>(old));
    suite.checks.ok("a page table becomes data");
}

/// Many tables come and go, in frames that are used again and again.
fn replaced_tables(suite: &mut Suite<'_>) {
    let mode = suite.mode;
    let base = mode.window().plus(mode.span(2) as usize * 8);
    let tables = [take_frame(), take_frame(), take_frame()];
    let frames = [take_frame(), take_frame(), take_frame(), take_frame()];
    for (index, frame) in frames.iter().enumerate() {
        poke(*frame, index as u32);
    }
    for round in 0..48_usize {
        let page = base.plus(mode.span(2) as usize * (round % 5) + PAGE as usize * (round % 7));
        let (table, frame) = (tables[round % 3], frames[round % 4]);
        for offset in (0..PAGE).step_by(4) {
            poke(table.plus(offset), 0_u32);
        }
        suite.space.set(page, 2, table.0 | bits::PWU);
        poke_entry(
            mode,
            table.plus(mode.index(page, 1) * mode.entry_bytes()),
            frame.0 | bits::P,
        );
        cpu::reload_root();
        suite.reads("through a table used again", (round % 4) as u32, page);
        suite.write_faults("its read-only page", error::PROTECTION | error::WRITE, page);
        suite.space.set(page, 2, 0);
        invlpg(page);
        suite.read_faults("without it", 0, page);
    }
    suite.checks.ok("page table frames used again");
}
