//! `wild-jump`: jumps to memory that is not mapped, without a handler.

#![no_std]
#![no_main]

use umbra_guest::memory::VirtAddr;
use umbra_guest::tables::{TablePointer, load_idt};
use umbra_guest::{BootInfo, Checks, cpu, guest, println};

guest!("wild-jump", kludge_and_pvh, run);

fn run(_: &BootInfo, _: &mut Checks) {
    println!("wild-jump: to 0x123456789000");
    load_idt(TablePointer::default());
    cpu::jump(VirtAddr(0x1234_5678_9000))
}
