//! The local APIC, in both of its modes (SDM vol. 3, chapter 11).

use crate::check::Checks;
use crate::cpu::{Feature, cpuid, has, msr, rdmsr, wrmsr};
use crate::memory::{self, VirtAddr};

/// Where its registers are after reset.
pub const PAGE: VirtAddr = VirtAddr(0xfee0_0000);

const ID: u32 = 0x02;
const VERSION: u32 = 0x03;
const END_OF_INTERRUPT: u32 = 0x0b;
const SPURIOUS: u32 = 0x0f;
const SOFTWARE_ENABLE: u32 = 1 << 8;
const SPURIOUS_VECTOR: u32 = 0xf0;
const X2APIC_REGISTERS: u32 = 0x800;
const X2APIC: u64 = 1 << 10;

/// Switches it on by its page, which must be mapped, and then in x2APIC mode if there is one, and
/// looks at its identity in each.
pub fn start(checks: &mut Checks) {
    let identity = cpuid(1, 0).ebx >> 24;
    let at = |register: u32| PAGE.plus(register as usize * 16);
    let spurious = SOFTWARE_ENABLE | SPURIOUS_VECTOR;
    let get = |checks: &mut Checks, what, register| {
        checks.succeeds(what, memory::read::<u32>(at(register)))
    };
    let enabled = memory::write(at(SPURIOUS), spurious);
    checks.succeeds("the spurious vector", enabled);
    let read = get(checks, "the spurious vector", SPURIOUS) & 0x1ff;
    checks.equal("the spurious vector", spurious, read);
    let id = get(checks, "the APIC's number", ID) >> 24;
    checks.equal("the APIC's number", identity, id);
    let version = get(checks, "the APIC's version", VERSION);
    checks.equal("an APIC of this century", 1, version >> 4 & 0xf);
    let ended = memory::write(at(END_OF_INTERRUPT), 0_u32);
    checks.succeeds("an end of interrupt", ended);
    if !has(Feature::X2Apic) {
        return checks.ok("the APIC answers by its page; there is no x2APIC");
    }
    let base = rdmsr(msr::APIC_BASE);
    wrmsr(msr::APIC_BASE, base | X2APIC);
    let register = |number: u32| rdmsr(X2APIC_REGISTERS + number);
    checks.equal("the number as x2APIC", u64::from(identity), register(ID));
    checks.equal("its version", u64::from(version), register(VERSION));
    checks.equal("its vector", u64::from(spurious), register(SPURIOUS));
    wrmsr(X2APIC_REGISTERS + END_OF_INTERRUPT, 0);
    checks.ok("the APIC answers by its page and as x2APIC");
}
