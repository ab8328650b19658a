//! `unknown-ports-msrs`: what is not there reads as all ones, ignores writes, or raises #GP.

#![no_std]
#![no_main]

use umbra_guest::boot::LENIENT;
use umbra_guest::trap::{catch, vector};
use umbra_guest::{BootInfo, Checks, cpu, guest};

guest!("unknown-ports-msrs", pvh, run);

/// Ports that no PC device claims.
const PORTS: [u16; 6] = [0x0e8, 0x158, 0x2a8, 0x5a0, 0x9a8, 0x7ff8];

/// MSRs in ranges that neither vendor defines.
const MSRS: [u32; 5] = [0x1234, 0x0000_3fff, 0x4fff_ffff, 0xc000_3abc, 0xdead_beef];

fn run(boot: &BootInfo, checks: &mut Checks) {
    for port in PORTS {
        for _ in 0..2 {
            checks.equal(format_args!("INB {port:#x}"), 0xff, cpu::inb(port));
            checks.equal(format_args!("INW {port:#x}"), 0xffff, cpu::inw(port));
            checks.equal(format_args!("INL {port:#x}"), 0xffff_ffff, cpu::inl(port));
            cpu::outb(port, 0x12);
            cpu::outw(port, 0x3456);
            cpu::outl(port, 0x789a_bcde);
        }
    }
    checks.ok("unknown ports");
    if boot.is_lenient() {
        return checks.skip("unknown MSRs", LENIENT);
    }
    for msr in MSRS {
        let read = catch(|| cpu::rdmsr(msr));
        checks.raises(format_args!("RDMSR {msr:#x}"), vector::GP, 0, read);
        let written = catch(|| cpu::wrmsr(msr, 0));
        checks.raises(format_args!("WRMSR {msr:#x}"), vector::GP, 0, written);
    }
    checks.ok("unknown MSRs");
}
