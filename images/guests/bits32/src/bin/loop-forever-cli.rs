//! `loop-forever-cli`: loops with interrupts off.

#![no_std]
#![no_main]

use umbra_guest::{BootInfo, Checks, cpu, guest, println};

guest!("loop-forever-cli", multiboot, run);

fn run(_: &BootInfo, _: &mut Checks) {
    println!("loop-forever-cli: interrupts off");
    cpu::loop_forever(cpu::Interrupts::Off)
}
