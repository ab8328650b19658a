//! `reserved-bits`: sets every reserved bit that there is in its own page tables.

#![no_std]
#![no_main]

use umbra_guest::memory::{self, VirtAddr, poke};
use umbra_guest::paging::error;
use umbra_guest::paging::space::{Mode, Space, bits, take_frame, turn_on};
use umbra_guest::trap::vector;
use umbra_guest::{BootInfo, Checks, cpu, guest};

guest!("reserved-bits", pvh, run);

fn run(boot: &BootInfo, checks: &mut Checks) {
    let (space, frame) = (Space::new(Mode::Long), take_frame());
    let page = Mode::Long.window();
    poke(frame, 0x1234_5678_u32);
    space.map(page, 1, frame, bits::P | bits::W);
    turn_on(space);
    let lenient = boot.is_lenient();
    for level in 1..=4 {
        for bit in cpu::physical_address_bits()..52 {
            with_bit(checks, space, page, level, 1 << bit, lenient);
        }
    }
    with_bit(checks, space, page, 4, bits::PS, lenient);
    checks.ok("reserved bits in all levels fault, and are forgotten once cleared");
}

fn with_bit(c: &mut Checks, space: Space, page: VirtAddr, level: u32, bit: u64, lenient: bool) {
    let what = format_args!("bit {bit:#x} at level {level}");
    space.change(page, level, 0, bit);
    cpu::invlpg(page);
    let loaded = memory::read::<u32>(page).map_err(|mut trap| {
        trap.error_code |= if lenient { error::PROTECTION } else { 0 };
        trap
    });
    let trap = c.raises(
        what,
        vector::PF,
        error::PROTECTION | error::RESERVED,
        loaded,
    );
    c.equal("CR2", page.0, trap.cr2);
    space.change(page, level, bit, 0);
    cpu::invlpg(page);
    let value = c.succeeds(what, memory::read::<u32>(page));
    c.equal(what, 0x1234_5678, value);
}
