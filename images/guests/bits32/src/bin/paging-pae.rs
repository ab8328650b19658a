//! `paging-pae`: PAE paging, and switching between it and 32-bit paging.

#![no_std]
#![no_main]

use umbra_guest::memory::{VirtAddr, poke};
use umbra_guest::paging::space::{Mode, Space, bits, take_frame, turn_off, turn_on};
use umbra_guest::{BootInfo, Checks, guest, memory, paging};

guest!("paging-pae", multiboot, run);

fn run(boot: &BootInfo, checks: &mut Checks) {
    let space = Space::new(Mode::Pae);
    turn_on(space);
    paging::run(boot, checks, space);
    turn_off();
    switch_modes(checks);
}

fn switch_modes(checks: &mut Checks) {
    let page = VirtAddr(0x5000_0000);
    let spaces = [Mode::Pae, Mode::Legacy, Mode::LegacyPse].map(|mode| {
        let (space, frame) = (Space::new(mode), take_frame());
        poke(frame, mode as u32);
        space.map(page, 1, frame, bits::P | bits::W);
        space
    });
    for round in 0..9 {
        let space = spaces[round % 3];
        turn_on(space);
        let got = checks.succeeds("a load after a mode switch", memory::read::<u32>(page));
        checks.equal("what it loaded", space.mode as u32, got);
        turn_off();
    }
    checks.ok("switches between PAE and 32-bit paging");
}
