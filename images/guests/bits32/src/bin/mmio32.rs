//! `mmio32`: instructions on device memory, in 32-bit mode.

#![no_std]
#![no_main]

use umbra_guest::paging::space::{Mode, Space, turn_on};
use umbra_guest::{BootInfo, Checks, guest, mmio};

guest!("mmio32", multiboot, run);

fn run(boot: &BootInfo, checks: &mut Checks) {
    let space = Space::new(Mode::Pae);
    turn_on(space);
    mmio::run(boot, checks, space);
}
