//! All pages of a few tables: their first use, and changes.

use umbra_guest::memory::PhysAddr;
use umbra_guest::{Checks, cpu};

use crate::space::{ENTRIES, Frames, check, entry, map_tables, report, root, set_entry, target};

const TABLES: u64 = 4;
const ROUNDS: u64 = 16;

pub fn measure(checks: &mut Checks, frames: &mut Frames) {
    let mut first_table = PhysAddr(0);
    map_tables(frames, root(), TABLES, |frames, number| {
        let table = frames.table();
        for page in 0..ENTRIES {
            set_entry(table, page, frames.page(number * ENTRIES + page));
        }
        if number == 0 {
            first_table = table;
        }
        table
    });
    cpu::reload_root();

    let start = cpu::rdtsc();
    for number in 0..TABLES {
        for page in 0..ENTRIES {
            check(checks, number, page, number * ENTRIES + page);
        }
    }
    report("first-use", cpu::rdtsc() - start, TABLES * ENTRIES);

    let mut ticks = 0;
    for round in 1..=ROUNDS {
        let first = target(entry(first_table, 0));
        let start = cpu::rdtsc();
        for page in 1..ENTRIES {
            let next = target(entry(first_table, page));
            set_entry(first_table, page - 1, next);
        }
        set_entry(first_table, ENTRIES - 1, first);
        cpu::reload_root();
        ticks += cpu::rdtsc() - start;
        check(checks, 0, 1, 1 + round);
    }
    report("table-write", ticks, ROUNDS * ENTRIES);
}
