//! `triple-fault`: an exception with an empty IDT.

#![no_std]
#![no_main]

use umbra_guest::tables::{TablePointer, load_idt};
use umbra_guest::{BootInfo, Checks, cpu, guest, println};

guest!("triple-fault", multiboot, run);

fn run(_: &BootInfo, _: &mut Checks) {
    println!("triple-fault: no interrupt descriptors, now #UD");
    load_idt(TablePointer::default());
    cpu::undefined();
    println!("FAIL #UD without a descriptor: still here");
    cpu::exit(umbra_guest::check::FAILED);
}
