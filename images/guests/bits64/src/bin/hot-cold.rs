//! `hot-cold`: in each round uses all of some page tables and a few of many others, which come round
//! again long after. A shadow MMU that knows what is used keeps the first and gives up the others.
//!
//! On the command line, `hot=N` and `rounds=N` say how many tables are used all the time, and how often.

#![no_std]
#![no_main]

use umbra_guest::{BootInfo, Checks, guest, sparse};

guest!("hot-cold", pvh, run);

const HOT: u64 = 80;
const COLD: u64 = 800;
/// How many of the cold tables a round uses.
const COLD_IN_A_ROUND: u64 = 8;
const ROUNDS: u64 = 200;

fn run(boot: &BootInfo, checks: &mut Checks) {
    let option = |name, default| boot.number(name).unwrap_or(default);
    let (hot, rounds) = (option("hot", HOT), option("rounds", ROUNDS));
    sparse::build(checks, hot + COLD);
    let mut cold = (0..COLD).cycle();
    for _ in 0..rounds {
        for number in 0..hot {
            sparse::visit(checks, number);
        }
        for number in cold.by_ref().take(COLD_IN_A_ROUND as usize) {
            sparse::visit(checks, hot + number);
        }
    }
    checks.ok("every mapping shows its page in every round");
}
