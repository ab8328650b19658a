//! What ring 3 may not do, and #AC.

use super::simple::{gate_error, tidy};
use crate::boot::BootInfo;
use crate::check::Checks;
use crate::cpu::{self, cr0, cr4, flags};
use crate::memory::{PhysAddr, VirtAddr, copy_to, poke};
use crate::paging::space::take_frame;
use crate::tables::{self, GateStack, USER_CODE};
use crate::trap::{Trap, vector};
use crate::user::{self, Program, programs};

/// One page that ring 3 can run and read.
struct Page {
    frame: PhysAddr,
    address: VirtAddr,
}

impl Page {
    #[cfg(target_arch = "x86")]
    fn new() -> Self {
        let frame = take_frame();
        Self {
            frame,
            address: frame.identity(),
        }
    }

    #[cfg(target_arch = "x86_64")]
    fn new() -> Self {
        use crate::paging::space::{Mode, Space, bits, turn_on};
        let (space, frame, address) = (Space::new(Mode::Long), take_frame(), Mode::Long.window());
        space.map(address, 1, frame, bits::PWU);
        turn_on(space);
        Self { frame, address }
    }

    fn run(&self, code: &[u8]) -> Trap {
        copy_to(self.frame, code);
        copy_to(self.frame.plus(code.len() as u64), &[0xcd, vector::DONE]);
        user::run(self.address, [0; 2], 0)
    }
}

pub fn run(boot: &BootInfo, checks: &mut Checks) {
    let page = Page::new();
    privileged(checks, &page);
    exceptions(boot, checks, &page);
    alignment(boot, checks, &page);
}

fn privileged(checks: &mut Checks, page: &Page) {
    let instructions: [(&str, &[u8]); 12] = [
        ("HLT", &[0xf4]),
        ("CLI", &[0xfa]),
        ("STI", &[0xfb]),
        ("IN", &[0xe4, 0x60]),
        ("OUT", &[0xe6, 0xf4]),
        ("MOV from CR0", &[0x0f, 0x20, 0xc0]),
        ("MOV to CR3", &[0x0f, 0x22, 0xd8]),
        ("CLTS", &[0x0f, 0x06]),
        ("RDMSR", &[0x0f, 0x32]),
        ("WRMSR", &[0x0f, 0x30]),
        ("INVD", &[0x0f, 0x08]),
        ("LIDT", &[0x0f, 0x01, 0x1b]),
    ];
    for (name, code) in instructions {
        let trap = page.run(code);
        checks.raises(
            format_args!("{name} in ring 3"),
            vector::GP,
            0,
            Err::<(), _>(trap),
        );
        checks.equal(
            format_args!("{name}: instruction pointer"),
            page.address.0,
            trap.ip,
        );
        checks.equal(format_args!("{name}: CS"), usize::from(USER_CODE), trap.cs);
    }
    checks.ok("privileged instructions in ring 3");
    cpu::set_cr4(cr4::TSD);
    let trap = page.run(&[0x0f, 0x31]);
    checks.raises("RDTSC with CR4.TSD", vector::GP, 0, Err::<(), _>(trap));
    cpu::clear_cr4(cr4::TSD);
    let trap = page.run(&[0x0f, 0x31]);
    checks.equal("RDTSC without CR4.TSD", vector::DONE, trap.vector);
    checks.ok("CR4.TSD");
}

fn exceptions(boot: &BootInfo, checks: &mut Checks, page: &Page) {
    for _ in 0..3 {
        let trap = page.run(&[]);
        checks.equal("INT 0x80", vector::DONE, trap.vector);
        checks.equal("behind it", page.address.0 + 2, trap.ip);
        let trap = tidy(boot, 0x60, page.run(&[0xcd, 0x60]));
        checks.raises(
            "INT of ring 0's gate",
            vector::GP,
            gate_error(0x60),
            Err::<(), _>(trap),
        );
        let trap = tidy(boot, vector::BP, page.run(&[0xcc]));
        checks.raises(
            "INT3 of ring 0's gate",
            vector::GP,
            gate_error(3),
            Err::<(), _>(trap),
        );
        tables::set_gate(vector::BP, vector::BP, 3, GateStack::Ordinary);
        let trap = page.run(&[0xcc]);
        checks.raises("INT3", vector::BP, 0, Err::<(), _>(trap));
        checks.equal("behind it", page.address.0 + 1, trap.ip);
        tables::restore_gate(vector::BP);
        let trap = page.run(&[0x0f, 0x0b]);
        checks.raises("UD2", vector::UD, 0, Err::<(), _>(trap));
        let trap = page.run(&[0x31, 0xc9, 0xf7, 0xf1]);
        checks.raises("DIV by zero", vector::DE, 0, Err::<(), _>(trap));
        checks.equal("its CS", usize::from(USER_CODE), trap.cs);
        // mov eax, 0x10; mov ds, eax.
        let trap = page.run(&[0xb8, 0x10, 0, 0, 0, 0x8e, 0xd8]);
        checks.raises("DS of ring 0", vector::GP, 0x10, Err::<(), _>(trap));
        // CPUID is allowed.
        let trap = page.run(&[0x31, 0xc0, 0x0f, 0xa2]);
        checks.equal("CPUID", vector::DONE, trap.vector);
        checks.equal("its result", cpu::cpuid(0, 0).eax, trap.ax as u32);
    }
    checks.ok("exceptions and interrupts from ring 3");
}

fn alignment(boot: &BootInfo, checks: &mut Checks, page: &Page) {
    copy_to(page.frame, programs());
    poke(page.frame.plus(0x800), 0x1234_5678_u32);
    let load = |offset: usize, flags: usize| {
        let code = Program::Read.at(page.address);
        user::run(code, [page.address.0 + 0x800 + offset, 0], flags)
    };
    cpu::set_cr0(cr0::AM);
    let trap = load(0, flags::AC);
    checks.equal(
        "an aligned load",
        (vector::DONE, 0x1234_5678),
        (trap.vector, trap.ax as u32),
    );
    let trap = load(1, 0);
    checks.equal("an unaligned load without AC", vector::DONE, trap.vector);
    let trap = load(1, flags::AC);
    if trap.vector == vector::DONE && !boot.is_strict() {
        checks.skip("#AC", "this processor does not raise it");
    } else {
        checks.raises("an unaligned load", vector::AC, 0, Err::<(), _>(trap));
        cpu::clear_cr0(cr0::AM);
        let trap = load(1, flags::AC);
        checks.equal(
            "an unaligned load without CR0.AM",
            vector::DONE,
            trap.vector,
        );
        checks.ok("#AC");
    }
    cpu::clear_cr0(cr0::AM);
}
