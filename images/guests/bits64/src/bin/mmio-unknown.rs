//! `mmio-unknown`: an instruction on device memory that Umbra does not emulate.

#![no_std]
#![no_main]

use umbra_guest::paging::space::{Mode, Space, turn_on};
use umbra_guest::{BootInfo, Checks, cpu, guest, mmio, println};

guest!("mmio-unknown", kludge_and_pvh, run);

fn run(_: &BootInfo, _: &mut Checks) {
    println!("mmio-unknown: FLD of a device's memory");
    let space = Space::new(Mode::Long);
    turn_on(space);
    mmio::load_float(space);
    println!("FAIL it went on");
    cpu::exit(2);
}
