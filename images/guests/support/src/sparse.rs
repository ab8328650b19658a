//! Page tables that map one page each, so that a shadow MMU needs as much memory as the tables
//! themselves.

use crate::memory::{self, FREE_END, FREE_START, PhysAddr, VirtAddr};
use crate::{Checks, cpu};

const PAGE: u64 = 4096;
const ENTRIES: u64 = 512;
const PRESENT_WRITABLE_USER: u64 = 0b111;
/// Pages of data that the tables share.
const DATA_PAGES: u64 = 16;
/// Where the mappings begin: entry 1 of the root table.
const BASE: usize = 1 << 39;
/// What one page table covers.
const DISTANCE: usize = 2 << 20;

/// Builds `tables` page tables, each of which maps one page, at the start of its own 2 MiB.
pub fn build(checks: &mut Checks, tables: u64) {
    let directory_count = tables.div_ceil(ENTRIES);
    let data = PhysAddr(FREE_START);
    let pointers = data.plus(DATA_PAGES * PAGE);
    let directories = pointers.plus(PAGE);
    let first_table = directories.plus(directory_count * PAGE);
    let end = first_table.plus(tables * PAGE);
    checks.equal("the tables fit", true, end.0 <= FREE_END);

    for page in 0..DATA_PAGES {
        memory::poke(data.plus(page * PAGE), marker(page));
    }
    memory::clear(pointers, PAGE as usize);
    for number in 0..directory_count {
        let directory = directories.plus(number * PAGE);
        memory::clear(directory, PAGE as usize);
        set_entry(pointers, number, directory);
    }
    for number in 0..tables {
        let table = first_table.plus(number * PAGE);
        memory::clear(table, PAGE as usize);
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
}

/// Checks that the page of table `number` is what it should be.
pub fn visit(checks: &mut Checks, number: u64) {
    let address = VirtAddr(BASE + number as usize * DISTANCE);
    checks.equal(
        format_args!("the page of table {number}"),
        Ok(marker(number % DATA_PAGES)),
        memory::read::<u64>(address),
    );
}

fn set_entry(table: PhysAddr, index: u64, target: PhysAddr) {
    memory::poke(table.plus(8 * index), target.0 | PRESENT_WRITABLE_USER);
}

fn marker(page: u64) -> u64 {
    0x5afe_0000 + page
}
