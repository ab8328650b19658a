//! `loop-forever`: loops with interrupts on; every interrupt returns at once, none is acknowledged.

#![no_std]
#![no_main]

use umbra_guest::{BootInfo, Checks, cpu, guest, println, tables};

guest!("loop-forever", multiboot, run);

fn run(_: &BootInfo, _: &mut Checks) {
    println!("loop-forever: interrupts on");
    tables::ignore_interrupts();
    cpu::loop_forever(cpu::Interrupts::On)
}
