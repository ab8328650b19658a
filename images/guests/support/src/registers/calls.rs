//! SYSCALL and SYSRET, SYSENTER and SYSEXIT.

use super::{NOT_CANONICAL, UserPage, keeps, refuses};
use crate::boot::BootInfo;
use crate::check::Checks;
use crate::cpu::{self, Feature, cpuid, efer, has, msr, rdmsr, wrmsr};
use crate::tables::{KERNEL_CODE, KERNEL_DATA, USER_CODE_32, USER_CODE_64};
use crate::trap::{Global, vector};

/// What the system call's entry saw: RCX, R11, CS, SS, RFLAGS.
static SEEN: Global<[usize; 5]> = Global::new([0; 5]);

core::arch::global_asm!(
    "guest_syscall:",
    "mov [rip + {seen}], rcx",
    "mov [rip + {seen} + 8], r11",
    "mov eax, cs",
    "mov [rip + {seen} + 16], rax",
    "mov eax, ss",
    "mov [rip + {seen} + 24], rax",
    "mov rdx, rsp",
    "lea rsp, [rip + guest_syscall_stack_end]",
    "pushfq",
    "pop rax",
    "mov [rip + {seen} + 32], rax",
    "mov rsp, rdx",
    "mov eax, 0x5ca11",
    "sysretq",
    "guest_sysenter:",
    "pushfq",
    "pop rax",
    "mov [rip + {seen} + 32], rax",
    "mov [rip + {seen}], rsp",
    "mov eax, cs",
    "mov [rip + {seen} + 16], rax",
    "mov eax, ss",
    "mov [rip + {seen} + 24], rax",
    "mov eax, 0x5e17e",
    ".byte 0x48, 0x0f, 0x35",
    ".pushsection .bss.syscall, \"aw\", @nobits",
    ".balign 16",
    ".skip 256",
    "guest_syscall_stack_end:",
    ".popsection",
    seen = sym SEEN,
);

unsafe extern "C" {
    static guest_syscall: u8;
    static guest_sysenter: u8;
    static guest_syscall_stack_end: u8;
}

const STD: u8 = 0xfd;
const SYSCALL: [u8; 2] = [0x0f, 0x05];

pub fn run(boot: &BootInfo, checks: &mut Checks, user: &UserPage) {
    system_call(boot, checks, user);
    system_enter(boot, checks, user);
}

fn system_call(boot: &BootInfo, checks: &mut Checks, user: &UserPage) {
    keeps(checks, "STAR", msr::STAR, 0x0023_0010_0000_0000);
    keeps(checks, "LSTAR", msr::LSTAR, 0xffff_ffff_8123_4560);
    keeps(checks, "CSTAR", msr::CSTAR, 0x1234_5678);
    keeps(checks, "SFMASK", msr::SFMASK, 0x4_7700);
    if !boot.is_lenient() {
        refuses(checks, "LSTAR", msr::LSTAR, NOT_CANONICAL);
    }
    checks.ok("system call MSRs");
    let direction = 1 << 10;
    let star = u64::from(USER_CODE_32) << 48 | u64::from(KERNEL_CODE) << 32;
    wrmsr(msr::STAR, star);
    wrmsr(msr::LSTAR, (&raw const guest_syscall) as u64);
    wrmsr(msr::SFMASK, direction as u64);
    let disabled = rdmsr(msr::EFER) & !efer::SCE;
    wrmsr(msr::EFER, disabled);
    let trap = user.run(&SYSCALL);
    checks.raises(
        "SYSCALL without EFER.SCE",
        vector::UD,
        0,
        Err::<(), _>(trap),
    );
    wrmsr(msr::EFER, disabled | efer::SCE);
    for _ in 0..3 {
        SEEN.set([0; 5]);
        let trap = user.run(&[STD, SYSCALL[0], SYSCALL[1]]);
        checks.equal(
            "SYSCALL and back",
            (vector::DONE, 0x5ca11),
            (trap.vector, trap.ax),
        );
        checks.equal("CS in ring 3", usize::from(USER_CODE_64), trap.cs);
        checks.equal("the instruction pointer", UserPage::ADDRESS.0 + 5, trap.ip);
        checks.equal("RFLAGS.DF is restored", direction, trap.flags & direction);
        let [rcx, r11, cs, ss, flags] = SEEN.get();
        checks.equal("RCX", UserPage::ADDRESS.0 + 3, rcx);
        checks.equal("R11 has RFLAGS.DF", direction, r11 & direction);
        let selectors = (usize::from(KERNEL_CODE), usize::from(KERNEL_DATA));
        checks.equal("CS and SS in ring 0", selectors, (cs, ss));
        checks.equal("SFMASK cleared RFLAGS.DF", 0, flags & direction);
    }
    wrmsr(msr::EFER, disabled);
    checks.ok("SYSCALL and SYSRET");
}

fn system_enter(boot: &BootInfo, checks: &mut Checks, user: &UserPage) {
    let what = "SYSENTER and SYSEXIT";
    if !has(Feature::Sep) {
        return checks.skip(what, "no SEP");
    }
    keeps(checks, "SYSENTER_CS", msr::SYSENTER_CS, 0x1234);
    keeps(checks, "SYSENTER_ESP", msr::SYSENTER_ESP, 0x1234_5678_9abc);
    keeps(
        checks,
        "SYSENTER_EIP",
        msr::SYSENTER_EIP,
        0xffff_8765_4321_0000,
    );
    checks.ok("SYSENTER MSRs");
    // lea rdx, [rip + 4]; xor ecx, ecx; sysenter.
    let enter = [0x48, 0x8d, 0x15, 4, 0, 0, 0, 0x31, 0xc9, 0x0f, 0x34];
    let intel = cpuid(0, 0).ebx == u32::from_le_bytes(*b"Genu");
    if !intel {
        // APM vol. 3: not in long mode.
        let trap = user.run(&enter);
        if trap.vector != vector::UD && !boot.is_strict() {
            return checks.skip(what, "not AMD's behaviour");
        }
        checks.raises("SYSENTER in long mode", vector::UD, 0, Err::<(), _>(trap));
        return checks.ok(what);
    }
    wrmsr(msr::SYSENTER_CS, 0);
    let trap = user.run(&enter);
    checks.raises(
        "SYSENTER with SYSENTER_CS = 0",
        vector::GP,
        0,
        Err::<(), _>(trap),
    );
    let stack = (&raw const guest_syscall_stack_end) as usize;
    wrmsr(msr::SYSENTER_CS, u64::from(KERNEL_CODE));
    wrmsr(msr::SYSENTER_ESP, stack as u64);
    wrmsr(msr::SYSENTER_EIP, (&raw const guest_sysenter) as u64);
    for _ in 0..3 {
        SEEN.set([0; 5]);
        let trap = user.run(&enter);
        checks.equal(
            "SYSENTER and back",
            (vector::DONE, 0x5e17e),
            (trap.vector, trap.ax),
        );
        checks.equal("the instruction pointer", UserPage::ADDRESS.0 + 13, trap.ip);
        // SYSEXIT to 64-bit code: SYSENTER_CS + 32, ring 3.
        checks.equal("CS in ring 3", (usize::from(KERNEL_CODE) + 32) | 3, trap.cs);
        let [rsp, _, cs, ss, flags] = SEEN.get();
        checks.equal("RSP", stack, rsp);
        checks.equal("CS and SS in ring 0", (8, 0x10), (cs, ss));
        checks.equal("RFLAGS.IF", 0, flags & cpu::flags::IF);
    }
    wrmsr(msr::SYSENTER_CS, 0);
    checks.ok(what);
}
