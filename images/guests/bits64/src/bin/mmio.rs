//! `mmio`: instructions on device memory, in 64-bit mode.

#![no_std]
#![no_main]

use umbra_guest::paging::space::{Mode, Space, turn_on};
use umbra_guest::{BootInfo, Checks, guest, mmio};

guest!("mmio", kludge_and_pvh, run);

fn run(boot: &BootInfo, checks: &mut Checks) {
    let space = Space::new(Mode::Long);
    turn_on(space);
    mmio::run(boot, checks, space);
}
