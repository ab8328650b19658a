//! The way into the guest and back: general registers, VMLAUNCH or VMRESUME.
//!
//! Protocol: interrupts are off, the VMCS is current, and everything but the fifteen general
//! registers is in the VMCS or in the processor. The stub keeps HOST_RSP in step with its own stack
//! pointer; a VM exit arrives at `umbra_vmx_exit` with that stack pointer.

use core::arch::{global_asm, naked_asm};

use umbra_vcpu::registers::Registers;

use crate::fields::HOST_RSP_ENCODING;

unsafe extern "C" {
    /// Where a VM exit continues: the value of HOST_RIP. Not a function to call.
    fn umbra_vmx_exit();
}

/// The value of HOST_RIP.
pub fn exit_address() -> u64 {
    umbra_vmx_exit as *const () as u64
}

/// Which instruction enters the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum EntryKind {
    /// VMLAUNCH: the VMCS has not been entered since it was cleared.
    Launch,
    /// VMRESUME.
    Resume,
}

/// The processor refused the instruction itself; the values are the stub's.
pub const ENTRY_DONE: u64 = 0;

/// Enters the guest and returns after its exit: [`ENTRY_DONE`], or another value if VMLAUNCH or
/// VMRESUME failed. `host_rsp` caches what HOST_RSP holds.
///
/// # Safety
/// 1. Interrupts are off, and the current VMCS has valid controls and this core's host state.
/// 2. `registers` and `host_rsp` are valid for reads and writes and belong to the caller.
/// 3. What the guest can reach through the shadow root and the pass-through registers is nothing of
///    the host's.
#[unsafe(naked)]
pub unsafe extern "sysv64" fn enter(
    registers: *mut Registers,
    kind: EntryKind,
    host_rsp: *mut u64,
) -> u64 {
    naked_asm!(
        "push rbp",
        "push rbx",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "push rdi",
        "cmp [rdx], rsp",
        "je 2f",
        "mov [rdx], rsp",
        "mov eax, {host_rsp}",
        "vmwrite rax, rsp",
        "2:",
        "test rsi, rsi",
        // MOV leaves the flags of TEST alone.
        "mov rax, [rdi + 8 * 0]",
        "mov rcx, [rdi + 8 * 1]",
        "mov rdx, [rdi + 8 * 2]",
        "mov rbx, [rdi + 8 * 3]",
        "mov rbp, [rdi + 8 * 5]",
        "mov rsi, [rdi + 8 * 6]",
        "mov r8, [rdi + 8 * 8]",
        "mov r9, [rdi + 8 * 9]",
        "mov r10, [rdi + 8 * 10]",
        "mov r11, [rdi + 8 * 11]",
        "mov r12, [rdi + 8 * 12]",
        "mov r13, [rdi + 8 * 13]",
        "mov r14, [rdi + 8 * 14]",
        "mov r15, [rdi + 8 * 15]",
        "mov rdi, [rdi + 8 * 7]",
        "jnz 3f",
        "vmlaunch",
        "jmp 4f",
        "3:",
        "vmresume",
        "4:",
        // Only a refused instruction continues here.
        "pop rdi",
        "mov eax, 1",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbx",
        "pop rbp",
        "ret",
        host_rsp = const HOST_RSP_ENCODING,
    )
}

global_asm!(
    ".pushsection .text.umbra_vmx_exit, \"ax\", @progbits",
    ".global umbra_vmx_exit",
    "umbra_vmx_exit:",
    // The top of the stack is the pointer to the registers; it changes places with the guest's RDI.
    "xchg [rsp], rdi",
    "mov [rdi + 8 * 0], rax",
    "mov [rdi + 8 * 1], rcx",
    "mov [rdi + 8 * 2], rdx",
    "mov [rdi + 8 * 3], rbx",
    "mov [rdi + 8 * 5], rbp",
    "mov [rdi + 8 * 6], rsi",
    "mov [rdi + 8 * 8], r8",
    "mov [rdi + 8 * 9], r9",
    "mov [rdi + 8 * 10], r10",
    "mov [rdi + 8 * 11], r11",
    "mov [rdi + 8 * 12], r12",
    "mov [rdi + 8 * 13], r13",
    "mov [rdi + 8 * 14], r14",
    "mov [rdi + 8 * 15], r15",
    "pop rax",
    "mov [rdi + 8 * 7], rax",
    "xor eax, eax",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbx",
    "pop rbp",
    "ret",
    ".popsection",
);
