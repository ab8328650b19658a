//! `exit-costs`: what instructions that leave the guest cost, in ticks of the guest's time-stamp
//! counter. Under an emulator that counts instructions (QEMU's `-icount shift=0`) a tick is one.
//!
//! With names of operations on the command line, only these are measured.

#![no_std]
#![no_main]

use umbra_guest::cpu::{self, Hypercall};
use umbra_guest::interrupts::{self, Mode, register};
use umbra_guest::memory::VirtAddr;
use umbra_guest::{BootInfo, Checks, guest, memory, paging, println};

guest!("exit-costs", pvh, run);

const NAMES: [&str; 12] = [
    "cpuid",
    "hypercall",
    "rdmsr",
    "port-write",
    "port-read",
    "unknown-port",
    "cr3-same",
    "cr3-load",
    "cr0.wp-toggle",
    "cr4.pge-toggle",
    "invlpg",
    "self-ipi",
];

const WARM_UP: u64 = 64;
const ROUNDS: u64 = 4096;
const WRITE_PROTECT: usize = 1 << 16;
const PAGE_GLOBAL: usize = 1 << 7;
/// The interrupt mask of the second i8259.
const PORT: u16 = 0xa1;
/// A port that no device claims.
const UNKNOWN_PORT: u16 = 0x5a0;
/// IA32_PAT, which software keeps for the guest.
const PAT: u32 = 0x277;
/// A call that no hypervisor knows.
const UNKNOWN_CALL: usize = 0x7fff;
const VECTOR: u8 = 0x50;
const TABLE_BYTES: usize = 4096;

fn run(boot: &BootInfo, checks: &mut Checks) {
    let chosen = NAMES.iter().any(|name| boot.has_word(name));
    // An empty round first: what the loop and the counter themselves take.
    let empty = ticks(|| {});
    let cost = |name: &str, operation: &mut dyn FnMut()| {
        if chosen && !boot.has_word(name) {
            return;
        }
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
    let hypercall = Hypercall::of_processor();
    cost("hypercall", &mut || {
        hypercall.call(UNKNOWN_CALL);
    });
    cost("rdmsr", &mut || {
        cpu::rdmsr(PAT);
    });
    cost("port-write", &mut || cpu::outb(PORT, 0xff));
    cost("port-read", &mut || {
        cpu::inb(PORT);
    });
    cost("unknown-port", &mut || {
        cpu::inb(UNKNOWN_PORT);
    });
    roots(&cost);
    let cr0 = cpu::read_cr0();
    cost("cr0.wp-toggle", &mut || {
        cpu::write_cr0(cr0 ^ WRITE_PROTECT);
        cpu::write_cr0(cr0);
    });
    let cr4 = cpu::read_cr4();
    cost("cr4.pge-toggle", &mut || {
        cpu::write_cr4(cr4 ^ PAGE_GLOBAL);
        cpu::write_cr4(cr4);
    });
    let stack = 0_u8;
    cost("invlpg", &mut || {
        cpu::invlpg(VirtAddr((&raw const stack).addr()));
    });
    if interrupts::has_x2apic() {
        interrupts::initialize_pic(0x20, 0xffff);
        interrupts::enable(Mode::X2Apic);
        interrupts::end_at_once(VECTOR);
        cost("self-ipi", &mut || {
            interrupts::write(register::SELF_IPI, VECTOR.into());
            interrupts::open_window();
        });
    }
    checks.ok("costs measured");
}

/// Loads of CR3: with the root that is there, and with each of two in turn.
fn roots(cost: &dyn Fn(&str, &mut dyn FnMut())) {
    cost("cr3-same", &mut cpu::reload_root);
    let first = memory::PhysAddr(cpu::read_cr3() as u64);
    let second = paging::space::take_frame();
    for offset in (0..TABLE_BYTES as u64).step_by(8) {
        memory::poke(second.plus(offset), memory::peek::<u64>(first.plus(offset)));
    }
    let mut roots = [first, second];
    cost("cr3-load", &mut || {
        roots.reverse();
        cpu::load_root(roots[0]);
    });
    cpu::load_root(first);
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
