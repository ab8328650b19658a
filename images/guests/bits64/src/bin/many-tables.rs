//! `many-tables`: builds thousands of page tables and goes through all of them again and again, so
//! that a shadow MMU needs as much memory as the tables themselves.

#![no_std]
#![no_main]

use umbra_guest::memory::{self, FREE_END, FREE_START, PhysAddr, VirtAddr};
use umbra_guest::{BootInfo, Checks, cpu, guest};

guest!("many-tables", pvh, run);

const PAGE: u64 = 4096;
const TABLE_BYTES: usize = 4096;
const PRESENT_WRITABLE_USER: u64 = 0b111;
/// Page tables: each maps one page, at the start of its own 2 MiB.
const TABLES: u64 = 5600;
const ENTRIES: u64 = 512;
const DIRECTORIES: u64 = TABLES.div_ceil(ENTRIES);
/// Pages of data that the tables share.
const DATA_PAGES: u64 = 16;
const ROUNDS: u64 = 3;
/// Where the new mappings begin: entry 1 of the root table.
const BASE: usize = 1 << 39;

fn run(_boot: &BootInfo, checks: &mut Checks) {
    let data = PhysAddr(FREE_START);
    let pointers = data.plus(DATA_PAGES * PAGE);
    let directories = pointers.plus(PAGE);
    let tables = directories.plus(DIRECTORIES * PAGE);
    checks.equal("the tables fit", true, tables.0 + TABLES * PAGE <= FREE_END);

    for page in 0..DATA_PAGES {
        memory::poke(data.plus(page * PAGE), marker(page));
    }
    memory::clear(pointers, TABLE_BYTES);
    for number in 0..DIRECTORIES {
        let directory = directories.plus(number * PAGE);
        memory::clear(directory, TABLE_BYTES);
        set_entry(pointers, number, directory);
    }
    for number in 0..TABLES {
        let table = tables.plus(number * PAGE);
        memory::clear(table, TABLE_BYTES);
        set_entry(table, 0, data.plus(number % DATA_PAGES * PAGE));
        set_entry(
            directories.plus(number / ENTRIES * PAGE),
            number % ENTRIES,
            table,
        );
    }
    let root = PhysAddr(cpu::read_cr3() as u64 & !(PAGE - 1));
    set_entry(root, 1, pointers);
    cpu::reload_root();

    for _ in 0..ROUNDS {
        for number in 0..TABLES {
            let address = VirtAddr(BASE + (number as usize) * (2 << 20));
            checks.equal(
                format_args!("the page of table {number}"),
                Ok(marker(number % DATA_PAGES)),
                memory::read::<u64>(address),
            );
        }
    }
    checks.ok("every mapping shows its page in every round");
}

fn set_entry(table: PhysAddr, index: u64, target: PhysAddr) {
    memory::poke(table.plus(8 * index), target.0 | PRESENT_WRITABLE_USER);
}

fn marker(page: u64) -> u64 {
    0x5afe_0000 + page
}
