//! One page in each of many tables, read again and again.

use umbra_guest::{Checks, cpu};

use crate::space::{Frames, check, map_tables, report, root, set_entry};

const PASSES: u64 = 3;

pub fn measure(checks: &mut Checks, frames: &mut Frames, tables: u64) {
    map_tables(frames, root(), tables, |frames, number| {
        let table = frames.table();
        set_entry(table, 0, frames.page(number));
        table
    });
    cpu::reload_root();
    let mut pass = || {
        let start = cpu::rdtsc();
        for number in 0..tables {
            check(checks, number, 0, number);
        }
        cpu::rdtsc() - start
    };
    pass();
    let ticks: u64 = (0..PASSES).map(|_| pass()).sum();
    report("recycle", ticks, PASSES * tables);
}
