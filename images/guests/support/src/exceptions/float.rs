//! #MF, #XM, and floating-point registers that survive exits.

use core::arch::asm;

use super::attempt;
use crate::boot::BootInfo;
use crate::check::Checks;
use crate::cpu::{self, Feature, cr0, cr4, has};
use crate::trap::{catch, vector};

pub fn run(boot: &BootInfo, checks: &mut Checks) {
    cpu::clear_cr0(cr0::EM | cr0::TS);
    cpu::set_cr0(cr0::NE | cr0::MP);
    x87(checks);
    if has(Feature::Fxsr) && has(Feature::Sse) {
        cpu::set_cr4(cr4::OSFXSR);
        sse(boot, checks);
        survival(checks);
    } else {
        checks.skip("SSE", "not in this processor");
    }
    extended(checks);
}

fn x87(checks: &mut Checks) {
    // Division by zero unmasked.
    let control: u16 = 0x37b;
    let result = attempt!("fninit", "fldcw [{c}]", "fld1", "fldz", "fdivp" => "fwait" => "fninit";
        c = in(reg) &raw const control);
    checks.faults("an x87 division by zero", vector::MF, 0, result);
    // SAFETY: it resets the x87 state, which nothing else uses.
    unsafe { asm!("fnclex", "fninit") };
    checks.ok("#MF");
}

fn sse(boot: &BootInfo, checks: &mut Checks) {
    let operands = [1.0_f32.to_bits(), 0];
    let (unmasked, masked) = (0x1f80_u32 & !(1 << 9), 0x1f80_u32);
    let divide = || {
        attempt!("ldmxcsr [{m}]", "movss xmm0, [{o}]", "movss xmm1, [{o} + 4]"
            => "divss xmm0, xmm1" => "ldmxcsr [{n}]"; m = in(reg) &raw const unmasked,
            n = in(reg) &raw const masked, o = in(reg) &raw const operands)
    };
    cpu::set_cr4(cr4::OSXMMEXCPT);
    let result = divide();
    if result.is_ok() && !boot.is_strict() {
        checks.skip("#XM", "this processor does not raise it");
    } else {
        checks.faults("an SSE division by zero", vector::XM, 0, result);
        cpu::clear_cr4(cr4::OSXMMEXCPT);
        checks.faults("the same without OSXMMEXCPT", vector::UD, 0, divide());
        checks.ok("#XM");
    }
    // SAFETY: the usual value of MXCSR.
    unsafe { asm!("ldmxcsr [{}]", in(reg) &raw const masked) };
    cpu::clear_cr4(cr4::OSFXSR);
    checks.faults(
        "SSE without OSFXSR",
        vector::UD,
        0,
        attempt!("xorps xmm0, xmm0"),
    );
    cpu::set_cr4(cr4::OSFXSR);
    checks.succeeds("SSE with OSFXSR", attempt!("xorps xmm0, xmm0"));
}

#[repr(C, align(64))]
struct Image([u8; 512]);

/// Registers of FXSAVE's image that hold numbers: eight of 10 bytes, then those of 16.
fn numbers(image: &Image) -> impl Iterator<Item = u8> {
    let xmm = if cfg!(target_arch = "x86_64") { 16 } else { 8 };
    let x87 = (0..8).flat_map(|index| 32 + index * 16..42 + index * 16);
    x87.chain(160..160 + xmm * 16).map(|index| image.0[index])
}

fn survival(checks: &mut Checks) {
    for seed in 1..4_u8 {
        let mut before = Image([0; 512]);
        for (index, byte) in before.0.iter_mut().enumerate().skip(32).take(416 - 32) {
            *byte = (index as u8).wrapping_mul(seed).wrapping_add(seed);
        }
        before.0[..2].copy_from_slice(&0x37f_u16.to_le_bytes());
        before.0[4] = 0xff;
        before.0[24..28].copy_from_slice(&0x1f80_u32.to_le_bytes());
        let mut after = Image([0; 512]);
        let result = catch(|| {
            // SAFETY: both images have the size and alignment that FXRSTOR and FXSAVE want; the
            // compiler uses none of these registers.
            unsafe {
                asm!("fxrstor [{0}]", in(reg) &raw const before);
                for _ in 0..20 {
                    let _ = cpu::cpuid(1, 0);
                    let _ = cpu::inb(0x3fd);
                    let _ = cpu::rdtsc();
                    cpu::write_cr0(cpu::read_cr0());
                    cpu::reload_root();
                }
                asm!("fxsave [{0}]", "fninit", in(reg) &raw mut after);
            }
        });
        checks.succeeds("FXRSTOR, exits, FXSAVE", result);
        checks.equal(
            "x87 and SSE registers",
            true,
            numbers(&before).eq(numbers(&after)),
        );
        checks.equal("FCW", &before.0[..2], &after.0[..2]);
        checks.equal("MXCSR", &before.0[24..28], &after.0[24..28]);
    }
    checks.ok("x87 and SSE registers survive exits");
}

fn extended(checks: &mut Checks) {
    let what = "XCR0 and AVX registers";
    if !has(Feature::Xsave) {
        return checks.skip(what, "no XSAVE");
    }
    let osxsave = || cpu::cpuid(1, 0).ecx >> 27 & 1;
    checks.equal("CPUID.OSXSAVE before", 0, osxsave());
    let result = attempt!("xor ecx, ecx" => "xgetbv" =>; out("eax") _, out("ecx") _, out("edx") _);
    checks.faults("XGETBV without OSXSAVE", vector::UD, 0, result);
    cpu::set_cr4(cr4::OSXSAVE);
    checks.equal("CPUID.OSXSAVE after", 1, osxsave());
    let set = |value: u32, index: u32| attempt!(=> "xsetbv" =>; in("eax") value, in("edx") 0, in("ecx") index);
    checks.faults("XCR0 without x87", vector::GP, 0, set(2, 0));
    checks.faults("XCR0 with AVX but not SSE", vector::GP, 0, set(5, 0));
    checks.faults("an unknown XCR", vector::GP, 0, set(1, 1));
    checks.succeeds("XCR0 = x87 and SSE", set(3, 0));
    if has(Feature::Avx) {
        checks.faults(
            "AVX without its XCR0 bit",
            vector::UD,
            0,
            attempt!("vzeroall"),
        );
        checks.succeeds("XCR0 = x87, SSE and AVX", set(7, 0));
        let (before, mut after) = ([0x1234_5678_9abc_def0_u64, 2, 3, !4], [0_u64; 4]);
        let result = catch(|| {
            // SAFETY: the compiler uses no vector register; the arrays have 32 bytes.
            unsafe {
                asm!("vmovups ymm3, [{0}]", in(reg) &raw const before);
                for _ in 0..20 {
                    let _ = cpu::cpuid(1, 0);
                    let _ = cpu::inb(0x3fd);
                    cpu::reload_root();
                }
                asm!("vmovups [{0}], ymm3", "vzeroupper", in(reg) &raw mut after);
            }
        });
        checks.succeeds("AVX", result);
        checks.equal("YMM3", before, after);
    }
    checks.succeeds("XCR0 = x87", set(1, 0));
    cpu::clear_cr4(cr4::OSXSAVE);
    checks.ok(what);
}
