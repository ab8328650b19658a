//! MSRs, the instructions that they steer, and CPUID (64-bit).

mod calls;
mod identification;

use core::arch::asm;
use core::fmt::Display;

use crate::boot::{BootInfo, LENIENT};
use crate::check::Checks;
use crate::cpu::{self, Feature, cr4, efer, has, msr, rdmsr, wrmsr};
use crate::memory::{PhysAddr, VirtAddr, copy_to};
use crate::paging::space::{Mode, PAGE, Space, bits, take_frame, turn_on};
use crate::trap::{Trap, catch, vector};
use crate::user;

/// Runs everything.
pub fn run(boot: &BootInfo, checks: &mut Checks) {
    let user = UserPage::new();
    identification::run(checks);
    extended_features(boot, checks);
    segment_bases(boot, checks, &user);
    base_instructions(boot, checks);
    memory_types(boot, checks);
    apic_base(checks);
    time_stamps(boot, checks);
    unknown(boot, checks);
    calls::run(boot, checks, &user);
}

/// One page with code for ring 3, the next with data.
struct UserPage(PhysAddr);

impl UserPage {
    const ADDRESS: VirtAddr = Mode::Long.window();
    const DATA: VirtAddr = Self::ADDRESS.plus(PAGE as usize);

    fn new() -> Self {
        let (space, code, data) = (Space::new(Mode::Long), take_frame(), take_frame());
        space.map(Self::ADDRESS, 1, code, bits::PWU);
        space.map(Self::DATA, 1, data, bits::PWU);
        turn_on(space);
        Self(code)
    }

    fn run(&self, code: &[u8]) -> Trap {
        copy_to(self.0, code);
        copy_to(self.0.plus(code.len() as u64), &[0xcd, vector::DONE]);
        user::run(Self::ADDRESS, [Self::DATA.0, 0], 0)
    }
}

/// Checks that `number` keeps `value`, also across exits, and restores it.
fn keeps(checks: &mut Checks, name: impl Display, number: u32, value: u64) {
    let before = checks.succeeds(format_args!("RDMSR {name}"), catch(|| rdmsr(number)));
    let written = catch(|| wrmsr(number, value));
    checks.succeeds(format_args!("WRMSR {name} = {value:#x}"), written);
    let _ = cpu::cpuid(0, 0);
    let _ = cpu::inb(0x3fd);
    checks.equal(format_args!("{name}"), value, rdmsr(number));
    wrmsr(number, before);
    checks.equal(format_args!("{name} restored"), before, rdmsr(number));
}

/// Checks that WRMSR raises #GP and changes nothing.
fn refuses(checks: &mut Checks, name: impl Display, number: u32, value: u64) {
    let before = rdmsr(number);
    let written = catch(|| wrmsr(number, value));
    checks.raises(
        format_args!("WRMSR {name} = {value:#x}"),
        vector::GP,
        0,
        written,
    );
    checks.equal(
        format_args!("{name} after the refusal"),
        before,
        rdmsr(number),
    );
}

const NOT_CANONICAL: u64 = 0x8000_0000_0000;

fn extended_features(boot: &BootInfo, checks: &mut Checks) {
    let value = rdmsr(msr::EFER);
    checks.equal(
        "EFER.LME and LMA",
        efer::LME | efer::LMA,
        value & (efer::LME | efer::LMA),
    );
    for bit in [efer::SCE, efer::NXE] {
        wrmsr(msr::EFER, value ^ bit);
        checks.equal("a changed EFER", value ^ bit, rdmsr(msr::EFER));
        wrmsr(msr::EFER, value);
    }
    wrmsr(msr::EFER, value & !efer::LMA);
    checks.equal("EFER.LMA is not written", value, rdmsr(msr::EFER));
    if boot.is_lenient() {
        checks.skip("values that EFER refuses", LENIENT);
    } else {
        refuses(checks, "EFER without LME", msr::EFER, value & !efer::LME);
        refuses(
            checks,
            "EFER with a reserved bit",
            msr::EFER,
            value | 1 << 3,
        );
        refuses(checks, "EFER with a high bit", msr::EFER, value | 1 << 40);
    }
    checks.ok("EFER");
}

fn segment_bases(boot: &BootInfo, checks: &mut Checks, user: &UserPage) {
    let words = [0x1111_u64, 0x2222];
    let [first, second] = [&raw const words[0] as u64, &raw const words[1] as u64];
    for (name, number) in [
        ("FS_BASE", msr::FS_BASE),
        ("GS_BASE", msr::GS_BASE),
        ("KERNEL_GS_BASE", msr::KERNEL_GS_BASE),
    ] {
        keeps(checks, name, number, 0x1234_5678_9abc);
        keeps(checks, name, number, 0xffff_8765_4321_0000);
        if !boot.is_lenient() {
            refuses(checks, name, number, NOT_CANONICAL);
        }
    }
    wrmsr(msr::FS_BASE, first);
    wrmsr(msr::GS_BASE, first);
    wrmsr(msr::KERNEL_GS_BASE, second);
    for round in 0..4 {
        let _ = cpu::cpuid(0, 0);
        let (fs, gs): (u64, u64);
        // SAFETY: both bases point to `words`.
        unsafe {
            asm!("mov {0}, fs:[0]", "mov {1}, gs:[0]", out(reg) fs, out(reg) gs, options(nostack));
        }
        checks.equal("a load by FS", 0x1111, fs);
        checks.equal("a load by GS", words[round % 2], gs);
        // SAFETY: it exchanges two bases that are both valid.
        unsafe { asm!("swapgs") };
        let (now, other) = if round % 2 == 0 {
            (second, first)
        } else {
            (first, second)
        };
        checks.equal("GS_BASE after SWAPGS", now, rdmsr(msr::GS_BASE));
        checks.equal(
            "KERNEL_GS_BASE after SWAPGS",
            other,
            rdmsr(msr::KERNEL_GS_BASE),
        );
    }
    let trap = user.run(&[0x0f, 0x01, 0xf8]);
    checks.raises("SWAPGS in ring 3", vector::GP, 0, Err::<(), _>(trap));
    // mov eax, gs:[0] in ring 3, with the base in a page of ring 3.
    wrmsr(msr::GS_BASE, UserPage::DATA.0 as u64 - 0x10);
    checks.succeeds("a store", crate::memory::write(UserPage::DATA, 0x5555_u32));
    let trap = user.run(&[0x65, 0x8b, 0x04, 0x25, 0x10, 0, 0, 0]);
    checks.equal(
        "ring 3's load by GS",
        (vector::DONE, 0x5555),
        (trap.vector, trap.ax),
    );
    checks.ok("FS and GS bases, SWAPGS");
}

fn base_instructions(boot: &BootInfo, checks: &mut Checks) {
    let what = "RDFSBASE and its kin";
    if !has(Feature::FsGsBase) {
        return checks.skip(what, "no FSGSBASE");
    }
    let read = || {
        catch(|| {
            let base: u64;
            // SAFETY: it reads a register.
            unsafe { asm!("rdfsbase {}", out(reg) base) };
            base
        })
    };
    let write = |base: u64| {
        catch(|| {
            // SAFETY: compiled code does not use FS.
            unsafe { asm!("wrfsbase {}", in(reg) base) };
        })
    };
    checks.raises("RDFSBASE without CR4.FSGSBASE", vector::UD, 0, read());
    cpu::set_cr4(cr4::FSGSBASE);
    checks.succeeds("WRFSBASE", write(0x7654_3210));
    let base = checks.succeeds("RDFSBASE", read());
    checks.equal("RDFSBASE", 0x7654_3210, base);
    checks.equal("FS_BASE", 0x7654_3210, rdmsr(msr::FS_BASE));
    let result = write(NOT_CANONICAL);
    if result.is_err() || boot.is_strict() {
        checks.raises("WRFSBASE not canonical", vector::GP, 0, result);
    }
    cpu::clear_cr4(cr4::FSGSBASE);
    checks.ok(what);
}

fn memory_types(boot: &BootInfo, checks: &mut Checks) {
    let what = "the page attribute table";
    if !has(Feature::Pat) {
        return checks.skip(what, "no PAT");
    }
    keeps(checks, "PAT", msr::PAT, 0x0007_0406_0007_0401);
    keeps(checks, "PAT", msr::PAT, 0x0606_0606_0606_0606);
    if !boot.is_lenient() {
        refuses(checks, "PAT with type 2", msr::PAT, 0x0007_0406_0007_0402);
        refuses(checks, "PAT with type 8", msr::PAT, 0x0807_0406_0007_0406);
    }
    checks.ok(what);
}

fn apic_base(checks: &mut Checks) {
    let what = "the APIC base";
    if !has(Feature::Apic) {
        return checks.skip(what, "no APIC");
    }
    let base = checks.succeeds("RDMSR APIC_BASE", catch(|| rdmsr(msr::APIC_BASE)));
    checks.equal("the bootstrap processor's bit", 1 << 8, base & 1 << 8);
    checks.equal(
        "bits beyond physical addresses",
        0,
        base >> cpu::physical_address_bits(),
    );
    checks.succeeds(
        "WRMSR APIC_BASE, unchanged",
        catch(|| wrmsr(msr::APIC_BASE, base)),
    );
    checks.equal("it", base, rdmsr(msr::APIC_BASE));
    checks.ok(what);
}

fn time_stamps(boot: &BootInfo, checks: &mut Checks) {
    let mut last = cpu::rdtsc();
    for round in 0..1000 {
        let now = match round % 4 {
            0 if !boot.is_lenient() => rdmsr(msr::TSC),
            1 => {
                let _ = cpu::cpuid(0, 0);
                cpu::rdtsc()
            }
            2 if has(Feature::Rdtscp) => cpu::rdtscp().0,
            _ => cpu::rdtsc(),
        };
        checks.equal(
            format_args!("time goes on: {last:#x} to {now:#x}"),
            true,
            now >= last,
        );
        last = now;
    }
    if has(Feature::Rdtscp) {
        for value in [0x1234, 0xffff_ffff, 0] {
            checks.succeeds("WRMSR TSC_AUX", catch(|| wrmsr(msr::TSC_AUX, value)));
            checks.equal("TSC_AUX", value, rdmsr(msr::TSC_AUX));
            checks.equal("TSC_AUX by RDTSCP", value as u32, cpu::rdtscp().1);
        }
    } else {
        checks.raises("RDTSCP", vector::UD, 0, catch(cpu::rdtscp));
    }
    checks.ok("time stamps");
}

fn unknown(boot: &BootInfo, checks: &mut Checks) {
    let what = "unknown MSRs";
    if boot.is_lenient() {
        return checks.skip(what, LENIENT);
    }
    for number in [0x1234, 0xc000_3abc, 0xdead_beef] {
        let read = catch(|| rdmsr(number));
        checks.raises(format_args!("RDMSR {number:#x}"), vector::GP, 0, read);
        let written = catch(|| wrmsr(number, 0));
        checks.raises(format_args!("WRMSR {number:#x}"), vector::GP, 0, written);
    }
    checks.ok(what);
}
