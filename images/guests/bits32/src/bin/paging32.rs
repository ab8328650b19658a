//! `paging32`: 32-bit paging, without and with 4 MiB pages.

#![no_std]
#![no_main]

use umbra_guest::paging::space::{Mode, Space, release_all, turn_off, turn_on};
use umbra_guest::{BootInfo, Checks, guest, paging, println};

guest!("paging32", multiboot, run);

fn run(boot: &BootInfo, checks: &mut Checks) {
    for mode in [Mode::Legacy, Mode::LegacyPse] {
        println!("{mode:?}");
        let space = Space::new(mode);
        turn_on(space);
        paging::run(boot, checks, space);
        turn_off();
        release_all();
    }
}
