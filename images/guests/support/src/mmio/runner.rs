//! Runs one form with all registers given, and takes all of them afterwards.

use crate::trap::{Disposition, Frame, Global, Trap, catch, with_hook};

/// General registers in the order of their encoding.
#[cfg(target_arch = "x86_64")]
pub const REGISTERS: usize = 16;
/// General registers in the order of their encoding.
#[cfg(target_arch = "x86")]
pub const REGISTERS: usize = 8;

/// The registers before or after a form.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct State {
    /// The general registers.
    pub general: [usize; REGISTERS],
    /// The flags.
    pub flags: usize,
}

impl State {
    /// All zero.
    pub const ZERO: Self = Self {
        general: [0; REGISTERS],
        flags: 0,
    };
}

unsafe extern "C" {
    fn guest_run_form(state: *mut State, code: usize);
}

static AT_TRAP: Global<State> = Global::new(State::ZERO);

fn note(_trap: &Trap, frame: &mut Frame) -> Disposition {
    let mut state = State::ZERO;
    state.general[..4].copy_from_slice(&frame.first_four());
    state.general[6..8].copy_from_slice(&frame.index_registers());
    state.flags = frame.flags;
    AT_TRAP.set(state);
    Disposition::GiveUp
}

/// Runs the code at `code`; after an exception the state is what its handler found, but for stack
/// and frame pointer.
pub fn run(state: &mut State, code: usize) -> Result<(), Trap> {
    let pointer = &raw mut *state;
    // SAFETY: the code is one of the forms, which end in `guest_form_return`, where the registers
    // that a function must keep are restored; exceptions come back through `catch`.
    let result = with_hook(note, || catch(|| unsafe { guest_run_form(pointer, code) }));
    if result.is_err() {
        *state = AT_TRAP.get();
    }
    result
}

core::arch::global_asm!(
    ".pushsection .data",
    ".balign 8",
    "guest_form_state: .quad 0",
    "guest_form_stack: .quad 0",
    "guest_form_code: .quad 0",
    "guest_form_scratch: .quad 0",
    ".popsection",
);

#[cfg(target_arch = "x86_64")]
core::arch::global_asm!(
    "guest_run_form:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "mov [rip + guest_form_state], rdi",
    "mov [rip + guest_form_code], rsi",
    "mov [rip + guest_form_stack], rsp",
    "push [rdi + 128]",
    "popfq",
    "mov rax, [rdi]",
    "mov rcx, [rdi + 8]",
    "mov rdx, [rdi + 16]",
    "mov rbx, [rdi + 24]",
    "mov rsp, [rdi + 32]",
    "mov rbp, [rdi + 40]",
    "mov rsi, [rdi + 48]",
    ".irp n, 8,9,10,11,12,13,14,15",
    "mov r\\n, [rdi + 8 * \\n]",
    ".endr",
    "mov rdi, [rdi + 56]",
    "jmp [rip + guest_form_code]",
    "guest_form_return:",
    "mov [rip + guest_form_scratch], rax",
    "mov rax, [rip + guest_form_state]",
    "mov [rax + 8], rcx",
    "mov [rax + 16], rdx",
    "mov [rax + 24], rbx",
    "mov [rax + 32], rsp",
    "mov [rax + 40], rbp",
    "mov [rax + 48], rsi",
    "mov [rax + 56], rdi",
    ".irp n, 8,9,10,11,12,13,14,15",
    "mov [rax + 8 * \\n], r\\n",
    ".endr",
    "mov rcx, [rip + guest_form_scratch]",
    "mov [rax], rcx",
    "mov rsp, [rip + guest_form_stack]",
    "pushfq",
    "pop [rax + 128]",
    "cld",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
);

#[cfg(target_arch = "x86")]
core::arch::global_asm!(
    "guest_run_form:",
    "push ebx",
    "push ebp",
    "push esi",
    "push edi",
    "mov [guest_form_stack], esp",
    "mov eax, [esp + 20]",
    "mov ecx, [esp + 24]",
    "mov [guest_form_state], eax",
    "mov [guest_form_code], ecx",
    "push [eax + 32]",
    "popfd",
    "mov ecx, [eax + 4]",
    "mov edx, [eax + 8]",
    "mov ebx, [eax + 12]",
    "mov esp, [eax + 16]",
    "mov ebp, [eax + 20]",
    "mov esi, [eax + 24]",
    "mov edi, [eax + 28]",
    "mov eax, [eax]",
    "jmp [guest_form_code]",
    "guest_form_return:",
    "mov [guest_form_scratch], eax",
    "mov eax, [guest_form_state]",
    "mov [eax + 4], ecx",
    "mov [eax + 8], edx",
    "mov [eax + 12], ebx",
    "mov [eax + 16], esp",
    "mov [eax + 20], ebp",
    "mov [eax + 24], esi",
    "mov [eax + 28], edi",
    "mov ecx, [guest_form_scratch]",
    "mov [eax], ecx",
    "mov esp, [guest_form_stack]",
    "pushfd",
    "pop [eax + 32]",
    "cld",
    "pop edi",
    "pop esi",
    "pop ebp",
    "pop ebx",
    "ret",
);
