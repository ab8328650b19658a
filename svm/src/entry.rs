//! The way into the guest and back, in assembly.
//!
//! Protocol: interrupts are off (RFLAGS.IF clear) when it is called and when it returns. The global
//! interrupt flag is clear from before VMLOAD of the guest until after VMLOAD of the host, so that
//! no host handler ever sees the guest's segment bases. Between, RFLAGS.IF is set, because with
//! V_INTR_MASKING physical interrupts exit only if the host's IF was set at VMRUN (APM vol. 2
//! 15.21.1).

use core::arch::naked_asm;

use umbra_vcpu::address::Hpa;
use umbra_vcpu::registers::Registers;

/// The general registers but RAX and RSP, which the VMCB holds; RDI holds the pointer and so comes
/// last.
macro_rules! load_guest_registers {
    () => {
        "mov rcx, [rdi + 8]
         mov rdx, [rdi + 16]
         mov rbx, [rdi + 24]
         mov rbp, [rdi + 40]
         mov rsi, [rdi + 48]
         mov r8, [rdi + 64]
         mov r9, [rdi + 72]
         mov r10, [rdi + 80]
         mov r11, [rdi + 88]
         mov r12, [rdi + 96]
         mov r13, [rdi + 104]
         mov r14, [rdi + 112]
         mov r15, [rdi + 120]
         mov rdi, [rdi + 56]"
    };
}

macro_rules! save_host_state {
    () => {
        "push rbx
         push rbp
         push r12
         push r13
         push r14
         push r15
         push rdi
         push rdx
         push rsi
         clgi
         mov rax, rdx
         vmsave rax
         mov rax, rsi
         vmload rax
         sti"
    };
}

/// Expects the physical address of the VMCB in RAX, where #VMEXIT leaves it.
macro_rules! leave_guest {
    () => {
        "vmsave rax
         cli
         mov rax, [rsp + 16]
         mov [rax + 8], rcx
         mov [rax + 16], rdx
         mov [rax + 24], rbx
         mov [rax + 40], rbp
         mov [rax + 48], rsi
         mov [rax + 56], rdi
         mov [rax + 64], r8
         mov [rax + 72], r9
         mov [rax + 80], r10
         mov [rax + 88], r11
         mov [rax + 96], r12
         mov [rax + 104], r13
         mov [rax + 112], r14
         mov [rax + 120], r15
         mov rax, [rsp + 8]
         vmload rax
         stgi
         add rsp, 24
         pop r15
         pop r14
         pop r13
         pop r12
         pop rbp
         pop rbx
         ret"
    };
}

/// Runs the guest until it exits.
///
/// # Safety
/// 1. The caller runs in ring 0 on a core where SVM is enabled and interrupts are off.
/// 2. `vmcb` is the physical address of a block that keeps the host's memory out of the guest's
///    reach, `host` that of a page for the host's own VMSAVE state; nobody else uses either.
/// 3. `registers` is valid for writes.
#[unsafe(naked)]
pub unsafe extern "sysv64" fn enter(registers: *mut Registers, vmcb: Hpa, host: Hpa) {
    naked_asm!(
        save_host_state!(),
        load_guest_registers!(),
        "vmrun rax",
        leave_guest!(),
    )
}

/// As [`enter`], with the guest's breakpoints in the debug registers.
///
/// Emulators arm breakpoints when software writes DR7, not when VMRUN loads it, and never disarm
/// them at #VMEXIT. So DR7 is written on both sides, as close to VMRUN as can be: between the two
/// writes no host memory is accessed but the top of the stack.
///
/// # Safety
/// 1. As [`enter`].
/// 2. DR0 to DR3 hold the guest's addresses; those that `dr7` enables match neither this function's
///    code nor the host's stack.
#[unsafe(naked)]
pub unsafe extern "sysv64" fn enter_with_breakpoints(
    registers: *mut Registers,
    vmcb: Hpa,
    host: Hpa,
    dr7: u64,
) {
    naked_asm!(
        save_host_state!(),
        "mov rax, rcx",
        load_guest_registers!(),
        "mov dr7, rax",
        "mov rax, [rsp]",
        "vmrun rax",
        "mov eax, 0x400",
        "mov dr7, rax",
        "mov rax, [rsp]",
        leave_guest!(),
    )
}

/// No breakpoint may lie in this many bytes from the start of [`enter_with_breakpoints`].
pub const CODE_SIZE: u64 = 512;
