//! `paging-costs`: what a guest's work on its page tables costs, in ticks of its time-stamp counter:
//! the first use of pages, changes of a table, and a copy of an address space as `fork` makes it. With
//! `tables=NUMBER` on the command line only this: one page in each of so many tables is read, again
//! and again, so that a shadow MMU with fewer pages must recycle one each time.

#![no_std]
#![no_main]

use umbra_guest::memory::{self, FREE_END, FREE_START, PhysAddr, VirtAddr};
use umbra_guest::{BootInfo, Checks, cpu, guest, println};

guest!("paging-costs", pvh, run);

const PAGE: u64 = 4096;
const ENTRIES: u64 = 512;
const PRESENT_WRITABLE_USER: u64 = 0b111;
const WRITABLE: u64 = 0b10;
const ENTRY_FLAGS: u64 = 0xfff;
/// Pages of data that all tables share.
const DATA_PAGES: u64 = 16;
/// Where the new mappings begin: entry 1 of the root table.
const BASE: usize = 1 << 39;
const LARGE_PAGE: usize = 2 << 20;
/// Full tables of the address space whose pages are used and copied.
const FULL_TABLES: u64 = 4;
/// Pages of each table that the copy of the address space uses.
const USED_PAGES: u64 = 64;
const ROUNDS: u64 = 16;

fn run(boot: &BootInfo, checks: &mut Checks) {
    for page in 0..DATA_PAGES {
        memory::poke(data(page), marker(page));
    }
    match tables_wanted(boot) {
        Some(tables) => recycle(checks, tables),
        None => full_tables(checks),
    }
    checks.ok("costs measured");
}

fn tables_wanted(boot: &BootInfo) -> Option<u64> {
    let words = boot.command_line.split(|byte| *byte == b' ');
    let digits = words
        .filter_map(|word| word.strip_prefix(b"tables="))
        .next()?;
    core::str::from_utf8(digits).ok()?.parse().ok()
}

fn data(page: u64) -> PhysAddr {
    PhysAddr(FREE_START + page % DATA_PAGES * PAGE)
}

fn marker(page: u64) -> u64 {
    0x5afe_0000 + page % DATA_PAGES
}

fn set_entry(table: PhysAddr, index: u64, target: PhysAddr) {
    memory::poke(table.plus(8 * index), target.0 | PRESENT_WRITABLE_USER);
}

/// Frames for tables, one after the other.
struct Frames(u64);

impl Frames {
    const FIRST: Self = Self(FREE_START + DATA_PAGES * PAGE);

    fn take(&mut self) -> PhysAddr {
        assert!(self.0 + PAGE <= FREE_END, "out of free RAM");
        let frame = PhysAddr(self.0);
        self.0 += PAGE;
        memory::clear(frame, PAGE as usize);
        frame
    }
}

/// Page directories for `tables` tables below entry 1 of `root`; `table` makes each.
fn map_tables(
    frames: &mut Frames,
    root: PhysAddr,
    tables: u64,
    mut table: impl FnMut(&mut Frames, u64) -> PhysAddr,
) {
    let pointers = frames.take();
    let mut directory = pointers;
    for number in 0..tables {
        if number % ENTRIES == 0 {
            directory = frames.take();
            set_entry(pointers, number / ENTRIES, directory);
        }
        let table = table(frames, number);
        set_entry(directory, number % ENTRIES, table);
    }
    set_entry(root, 1, pointers);
}

fn root() -> PhysAddr {
    PhysAddr(cpu::read_cr3() as u64 & !(PAGE - 1))
}

fn address(table: u64, page: u64) -> VirtAddr {
    VirtAddr(BASE + table as usize * LARGE_PAGE + (page * PAGE) as usize)
}

fn check(checks: &mut Checks, table: u64, page: u64, expected: u64) {
    let read = memory::peek::<u64>(PhysAddr(address(table, page).0 as u64));
    checks.equal("the page of the table", expected, read);
}

fn report(name: &str, ticks: u64, times: u64) {
    println!(
        "cost {name}: {}.{:02}",
        ticks / times,
        ticks % times * 100 / times
    );
}

/// One page in each of many tables, read again and again.
fn recycle(checks: &mut Checks, tables: u64) {
    let mut frames = Frames::FIRST;
    map_tables(&mut frames, root(), tables, |frames, number| {
        let table = frames.take();
        set_entry(table, 0, data(number));
        table
    });
    cpu::reload_root();
    let mut pass = || {
        let start = cpu::rdtsc();
        for number in 0..tables {
            check(checks, number, 0, marker(number));
        }
        cpu::rdtsc() - start
    };
    pass();
    let ticks: u64 = (0..3).map(|_| pass()).sum();
    report("recycle", ticks, 3 * tables);
}

/// All pages of a few tables: first use, changes, and copies.
fn full_tables(checks: &mut Checks) {
    let mut frames = Frames::FIRST;
    let mut tables = [PhysAddr(0); FULL_TABLES as usize];
    let parent = root();
    map_tables(&mut frames, parent, FULL_TABLES, |frames, number| {
        let table = frames.take();
        for page in 0..ENTRIES {
            set_entry(table, page, data(page));
        }
        tables[number as usize] = table;
        table
    });
    cpu::reload_root();

    let start = cpu::rdtsc();
    for number in 0..FULL_TABLES {
        for page in 0..ENTRIES {
            check(checks, number, page, marker(page));
        }
    }
    report("first-use", cpu::rdtsc() - start, FULL_TABLES * ENTRIES);

    let mut ticks = 0;
    for round in 1..=ROUNDS {
        let start = cpu::rdtsc();
        for page in 0..ENTRIES {
            set_entry(tables[0], page, data(page + round));
        }
        cpu::reload_root();
        ticks += cpu::rdtsc() - start;
        check(checks, 0, round, marker(2 * round));
    }
    report("table-write", ticks, ROUNDS * ENTRIES);

    let mut ticks = 0;
    for _ in 0..ROUNDS {
        let start = cpu::rdtsc();
        let mut spare = Frames(frames.0);
        fork(checks, &mut spare, parent, &tables);
        ticks += cpu::rdtsc() - start;
    }
    report("fork", ticks, ROUNDS);
}

/// Copies the tables, with all pages write-protected on both sides, uses some in the copy, and comes
/// back.
fn fork(checks: &mut Checks, frames: &mut Frames, parent: PhysAddr, tables: &[PhysAddr]) {
    let child = frames.take();
    for index in 0..ENTRIES {
        let entry: u64 = memory::peek(parent.plus(8 * index));
        memory::poke(child.plus(8 * index), entry);
    }
    map_tables(frames, child, FULL_TABLES, |frames, number| {
        let copy = frames.take();
        for page in 0..ENTRIES {
            let entry = tables[number as usize].plus(8 * page);
            let protected = memory::peek::<u64>(entry) & !WRITABLE;
            memory::poke(entry, protected);
            memory::poke(copy.plus(8 * page), protected);
        }
        copy
    });
    cpu::load_root(child);
    for number in 0..FULL_TABLES {
        for page in 0..USED_PAGES {
            let entry: u64 = memory::peek(tables[number as usize].plus(8 * page));
            let expected = memory::peek(PhysAddr(entry & !ENTRY_FLAGS));
            check(checks, number, page, expected);
        }
    }
    cpu::load_root(parent);
}
