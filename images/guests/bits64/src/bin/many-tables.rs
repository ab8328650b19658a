//! `many-tables`: builds thousands of page tables and goes through all of them again and again, so
//! that a shadow MMU needs as much memory as the tables themselves.
//!
//! On the command line, `tables=N` and `rounds=N` say how many and how often, and `wait=N` after how
//! many ticks of the time-stamp counter it begins.

#![no_std]
#![no_main]

use umbra_guest::{BootInfo, Checks, cpu, guest, sparse};

guest!("many-tables", pvh, run);

const TABLES: u64 = 5600;
const ROUNDS: u64 = 3;

fn run(boot: &BootInfo, checks: &mut Checks) {
    let option = |name, default| boot.number(name).unwrap_or(default);
    let (tables, rounds) = (option("tables", TABLES), option("rounds", ROUNDS));
    let start = cpu::rdtsc();
    while cpu::rdtsc() - start < option("wait", 0) {}
    sparse::build(checks, tables);
    for _ in 0..rounds {
        for number in 0..tables {
            sparse::visit(checks, number);
        }
    }
    checks.ok("every mapping shows its page in every round");
}
