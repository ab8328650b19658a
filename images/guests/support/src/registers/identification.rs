//! CPUID: leaves that agree with each other and with what the processor does.

use crate::check::Checks;
use crate::cpu::{self, Cpuid, Feature, cpuid, has};
use crate::println;

const EXTENDED: u32 = 0x8000_0000;

pub fn run(checks: &mut Checks) {
    let (basic, extended) = (cpuid(0, 0), cpuid(EXTENDED, 0));
    let vendor = [basic.ebx, basic.edx, basic.ecx].map(u32::to_le_bytes);
    println!(
        "vendor: {}, leaves up to {:#x} and {:#x}",
        vendor.as_flattened().escape_ascii(),
        basic.eax,
        extended.eax
    );
    checks.equal("at least leaf 1", true, (1..0x100).contains(&basic.eax));
    checks.equal("extended leaves", EXTENDED, extended.eax & 0xffff_0000);
    checks.equal(
        "at least leaf 0x80000008",
        true,
        extended.eax >= EXTENDED + 8,
    );
    checks.equal(
        "a vendor",
        true,
        vendor.as_flattened().iter().all(u8::is_ascii_graphic),
    );
    if extended.ebx != 0 {
        let again = (extended.ebx, extended.ecx, extended.edx);
        checks.equal("the vendor again", (basic.ebx, basic.ecx, basic.edx), again);
    }
    checks.equal("a family", true, cpuid(1, 0).eax >> 8 & 0xf != 0);
    checks.ok("vendor and leaves");
    features(checks);
    stable(checks, basic.eax);
    let sizes = cpuid(EXTENDED + 8, 0).eax;
    checks.equal(
        "physical addresses",
        true,
        (32..=52).contains(&(sizes & 0xff)),
    );
    let linear = if cpuid(7, 0).ecx >> 16 & 1 != 0 && basic.eax >= 7 {
        57
    } else {
        48
    };
    checks.equal("linear addresses", linear, sizes >> 8 & 0xff);
    checks.ok("address sizes");
    if extended.eax >= EXTENDED + 4 {
        let mut text = [0_u32; 12];
        for (index, leaf) in (EXTENDED + 2..=EXTENDED + 4).enumerate() {
            let Cpuid { eax, ebx, ecx, edx } = cpuid(leaf, 0);
            text[index * 4..][..4].copy_from_slice(&[eax, ebx, ecx, edx]);
        }
        let text = text.map(u32::to_le_bytes);
        let printable = |byte: &u8| *byte == 0 || *byte == b' ' || byte.is_ascii_graphic();
        checks.equal(
            "a printable brand",
            true,
            text.as_flattened().iter().all(printable),
        );
        checks.ok("brand");
    }
}

fn features(checks: &mut Checks) {
    // What long mode's code relies on, and we run in.
    for feature in [
        Feature::Fpu,
        Feature::Msr,
        Feature::Pae,
        Feature::Pge,
        Feature::Fxsr,
        Feature::Sse,
        Feature::LongMode,
        Feature::Syscall,
        Feature::Nx,
    ] {
        checks.equal(format_args!("{feature:?}"), true, has(feature));
    }
    if has(Feature::Avx) {
        checks.equal("XSAVE, since there is AVX", true, has(Feature::Xsave));
    }
    if has(Feature::Xsave) {
        checks.equal(
            "leaf 0xd, since there is XSAVE",
            true,
            cpuid(0, 0).eax >= 0xd,
        );
        let state = cpuid(0xd, 0);
        checks.equal("x87 and SSE in XCR0", 3, state.eax & 3);
        checks.equal("room for x87 and SSE", true, state.ecx >= 576);
    }
    if has(Feature::Invpcid) {
        checks.equal("PCID, since there is INVPCID", true, has(Feature::Pcid));
    }
    checks.ok("features");
}

fn stable(checks: &mut Checks, highest: u32) {
    for leaf in [0, 1, 7, 0xd, EXTENDED, EXTENDED + 1, EXTENDED + 8] {
        if leaf <= highest || leaf >= EXTENDED {
            let first = cpuid(leaf, 0);
            let _ = cpu::inb(0x3fd);
            checks.equal(format_args!("leaf {leaf:#x} twice"), first, cpuid(leaf, 0));
        }
    }
    checks.ok("the same leaf twice");
}
