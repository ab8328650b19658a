//! `exit-costs`: what instructions that leave the guest cost, in ticks of the guest's time-stamp
//! counter. Under an emulator that counts instructions (QEMU's `-icount shift=0`) a tick is one.

#![no_std]
#![no_main]

use umbra_guest::memory::VirtAddr;
use umbra_guest::{BootInfo, Checks, cpu, guest, println};

guest!("exit-costs", pvh, run);

const WARM_UP: u64 = 64;
const ROUNDS: u64 = 4096;
const WRITE_PROTECT: usize = 1 << 16;
const PAGE_GLOBAL: usize = 1 << 7;
/// A port that no device claims.
const PORT: u16 = 0x5a0;
/// IA32_PAT, which software keeps for the guest.
const PAT: u32 = 0x277;

fn run(_boot: &BootInfo, checks: &mut Checks) {
    // An empty round first: what the loop and the counter themselves take.
    let empty = ticks(|| {});
    let cost = |name: &str, operation: &mut dyn FnMut()| {
        let ticks = ticks(operation).saturating_sub(empty);
        println!(
            "cost {name}: {}.{:02}",
            ticks / ROUNDS,
            ticks % ROUNDS * 100 / ROUNDS
        );
    };
    cost("cpuid", &mut || {
        cpu::cpuid(0, 0);
    });
    cost("rdmsr", &mut || {
        cpu::rdmsr(PAT);
    });
    cost("port write", &mut || cpu::outb(PORT, 0));
    cost("port read", &mut || {
        cpu::inb(PORT);
    });
    cost("cr3 load", &mut cpu::reload_root);
    cost("cr0.wp toggle", &mut || {
        cpu::clear_cr0(WRITE_PROTECT);
        cpu::set_cr0(WRITE_PROTECT);
    });
    cost("cr4.pge toggle", &mut || {
        cpu::set_cr4(PAGE_GLOBAL);
        cpu::clear_cr4(PAGE_GLOBAL);
    });
    let stack = 0_u8;
    cost("invlpg", &mut || {
        cpu::invlpg(VirtAddr((&raw const stack).addr()))
    });
    checks.ok("costs measured");
}

/// The ticks that [`ROUNDS`] calls take, after a warm-up.
fn ticks(mut operation: impl FnMut()) -> u64 {
    for _ in 0..WARM_UP {
        operation();
    }
    let start = cpu::rdtsc();
    for _ in 0..ROUNDS {
        operation();
    }
    cpu::rdtsc() - start
}
