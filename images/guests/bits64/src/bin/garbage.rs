//! `garbage`: executes random bytes, in ring 3 with exceptions caught, then in ring 0 without an
//! IDT, which ends in a triple fault. The bytes are the same in every run.

#![no_std]
#![no_main]

use umbra_guest::memory::poke;
use umbra_guest::paging::Numbers;
use umbra_guest::paging::space::{Mode, PAGE, Space, bits, take, turn_on};
use umbra_guest::tables::{TablePointer, load_idt};
use umbra_guest::{BootInfo, Checks, cpu, guest, println, user};

guest!("garbage", kludge_and_pvh, run);

const ROUNDS: u32 = 64;
const CODE_PAGES: u64 = 4;

fn run(_: &BootInfo, checks: &mut Checks) {
    let space = Space::new(Mode::Long);
    turn_on(space);
    let code = take(CODE_PAGES * PAGE, PAGE);
    let window = Mode::Long.window();
    for page in 0..CODE_PAGES {
        let offset = page * PAGE;
        space.map(
            window.plus(offset as usize),
            1,
            code.plus(offset),
            bits::PWU,
        );
    }
    cpu::reload_root();
    let mut numbers = Numbers::new(0x9e37_79b9);
    for round in 0..ROUNDS {
        for offset in (0..CODE_PAGES * PAGE).step_by(4) {
            poke(code.plus(offset), numbers.draw());
        }
        let trap = user::run(window, [window.0, window.0], 0);
        let ring = trap.cs & 3;
        checks.equal(format_args!("the ring of round {round}"), 3, ring);
    }
    checks.ok("random bytes in ring 3 end by exceptions");
    println!("garbage: random bytes in ring 0 without interrupt descriptors");
    load_idt(TablePointer::default());
    space.change(window, 1, bits::U, 0);
    cpu::reload_root();
    cpu::jump(window)
}
