//! `paging64`: 4-level paging.

#![no_std]
#![no_main]

use umbra_guest::paging::space::{Mode, Space, turn_on};
use umbra_guest::{BootInfo, Checks, guest, paging};

guest!("paging64", kludge_and_pvh, run);

fn run(boot: &BootInfo, checks: &mut Checks) {
    let space = Space::new(Mode::Long);
    turn_on(space);
    paging::run(boot, checks, space);
}
