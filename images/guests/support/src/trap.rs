//! Exceptions and software interrupts.
//!
//! Protocol: [`catch`] remembers the stack pointer and calls a closure. If an exception lands while
//! the closure runs, the handler offers it to the hook (see [`with_hook`]), which may repair the
//! cause and resume. Otherwise it records a [`Trap`], gives up the closure's stack frames (which
//! own nothing), and `catch` returns the trap. An exception outside any `catch` fails the guest.

use core::cell::UnsafeCell;
use core::mem::MaybeUninit;

use crate::check::FAILED;
use crate::cpu::{exit, read_cr2, read_dr6};
use crate::println;

/// A vector number.
#[allow(missing_docs)]
pub mod vector {
    pub const DE: u8 = 0;
    pub const DB: u8 = 1;
    pub const BP: u8 = 3;
    pub const OF: u8 = 4;
    pub const BR: u8 = 5;
    pub const UD: u8 = 6;
    pub const NM: u8 = 7;
    pub const DF: u8 = 8;
    pub const TS: u8 = 10;
    pub const NP: u8 = 11;
    pub const SS: u8 = 12;
    pub const GP: u8 = 13;
    pub const PF: u8 = 14;
    pub const MF: u8 = 16;
    pub const AC: u8 = 17;
    pub const XM: u8 = 19;
    /// The gate that user mode may call; it means "done".
    pub const DONE: u8 = 0x80;
}

/// An exception or software interrupt, as the handler saw it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Trap {
    /// The vector.
    pub vector: u8,
    /// The error code; zero for vectors without one.
    pub error_code: u32,
    /// CR2 (meaningful for #PF).
    pub cr2: usize,
    /// DR6 after #DB, else 0: under a hypervisor it costs an exit to read.
    pub dr6: usize,
    /// The saved instruction pointer.
    pub ip: usize,
    /// The saved code segment.
    pub cs: usize,
    /// The saved flags.
    pub flags: usize,
    /// The saved accumulator.
    pub ax: usize,
}

/// Registers as the entry stub pushed them; changes take effect on resuming.
#[repr(C)]
#[allow(missing_docs)]
#[cfg(target_arch = "x86_64")]
pub struct Frame {
    r: [usize; 8],
    di: usize,
    si: usize,
    bp: usize,
    bx: usize,
    dx: usize,
    cx: usize,
    pub ax: usize,
    vector: usize,
    error_code: usize,
    pub ip: usize,
    pub cs: usize,
    pub flags: usize,
}

/// Registers as the entry stub pushed them; changes take effect on resuming.
#[repr(C)]
#[allow(missing_docs)]
#[cfg(target_arch = "x86")]
pub struct Frame {
    es: usize,
    ds: usize,
    di: usize,
    si: usize,
    bp: usize,
    unused_sp: usize,
    bx: usize,
    dx: usize,
    cx: usize,
    pub ax: usize,
    vector: usize,
    error_code: usize,
    pub ip: usize,
    pub cs: usize,
    pub flags: usize,
}

impl Frame {
    /// The first four registers in the order of their encoding.
    pub(crate) const fn first_four(&self) -> [usize; 4] {
        [self.ax, self.cx, self.dx, self.bx]
    }

    /// (E)SI and (E)DI.
    pub(crate) const fn index_registers(&self) -> [usize; 2] {
        [self.si, self.di]
    }
}

/// What a hook decided.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Disposition {
    /// The cause is repaired: resume from the frame.
    Resume,
    /// Let `catch` return the trap.
    GiveUp,
}

/// A hook that sees each trap first.
pub type Hook = fn(&Trap, &mut Frame) -> Disposition;

/// A global for one processor without interrupts.
pub struct Global<T>(UnsafeCell<T>);

// SAFETY: the crate's fact 1.
unsafe impl<T> Sync for Global<T> {}

impl<T: Copy> Global<T> {
    /// A global with this first value.
    pub const fn new(value: T) -> Self {
        Self(UnsafeCell::new(value))
    }

    /// Its value.
    pub fn get(&self) -> T {
        // SAFETY: the crate's fact 1; no reference to the inside exists.
        unsafe { self.0.get().read_volatile() }
    }

    /// Replaces its value.
    pub fn set(&self, value: T) {
        // SAFETY: as in `get`.
        unsafe { self.0.get().write_volatile(value) };
    }
}

static HOOK: Global<Option<Hook>> = Global::new(None);
static CAUGHT: Global<Option<Trap>> = Global::new(None);

/// Runs `body` while `hook` sees each trap first.
pub fn with_hook<T>(hook: Hook, body: impl FnOnce() -> T) -> T {
    let outer = HOOK.get();
    HOOK.set(Some(hook));
    let value = body();
    HOOK.set(outer);
    value
}

/// Runs `body`, which must own nothing that needs dropping.
///
/// # Errors
///
/// The exception or software interrupt that ended it.
pub fn catch<T, F: FnOnce() -> T>(body: F) -> Result<T, Trap> {
    struct Call<F, T> {
        body: MaybeUninit<F>,
        value: MaybeUninit<T>,
    }

    extern "C" fn run<F: FnOnce() -> T, T>(call: *mut Call<F, T>) {
        // SAFETY: `catch` passes its own live `call`, whose body is initialised and taken once.
        unsafe {
            let body = (*call).body.assume_init_read();
            (*call).value.write(body());
        }
    }

    let mut call = Call {
        body: MaybeUninit::new(body),
        value: MaybeUninit::<T>::uninit(),
    };
    let outer = UNWIND_STACK.get();
    // SAFETY: `run::<F, T>` gets the argument that it expects; `guest_catch` returns once, with
    // callee-saved registers restored, whichever way `run` ends.
    let trapped =
        unsafe { guest_catch(run::<F, T> as *const () as usize, (&raw mut call) as usize) };
    UNWIND_STACK.set(outer);
    match CAUGHT.get() {
        Some(trap) if trapped != 0 => Err(trap),
        // SAFETY: `run` came to its end, so it wrote the value.
        _ => Ok(unsafe { call.value.assume_init() }),
    }
}

extern "C" fn handle(frame: &mut Frame) {
    let trap = Trap {
        vector: frame.vector as u8,
        error_code: frame.error_code as u32,
        cr2: read_cr2(),
        dr6: if frame.vector == usize::from(vector::DB) {
            read_dr6()
        } else {
            0
        },
        ip: frame.ip,
        cs: frame.cs & 0xffff,
        flags: frame.flags,
        ax: frame.ax,
    };
    if let Some(hook) = HOOK.get()
        && hook(&trap, frame) == Disposition::Resume
    {
        return;
    }
    if UNWIND_STACK.get() == 0 {
        println!("FAIL nothing should trap here: got {trap:#x?}");
        exit(FAILED);
    }
    CAUGHT.set(Some(trap));
    // SAFETY: a `catch` is active, so its saved stack pointer leads to its frame.
    unsafe { guest_unwind() }
}

#[unsafe(export_name = "guest_unwind_stack")]
static UNWIND_STACK: Global<usize> = Global::new(0);

unsafe extern "C" {
    fn guest_catch(body: usize, argument: usize) -> usize;
    fn guest_unwind() -> !;
    /// 256 entry stubs, 16 bytes each.
    pub(crate) static guest_trap_stubs: u8;
}

#[cfg(target_arch = "x86_64")]
core::arch::global_asm!(
    "guest_catch:",
    "push rbp",
    "push rbx",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "mov [rip + guest_unwind_stack], rsp",
    "sub rsp, 8",
    "mov rax, rdi",
    "mov rdi, rsi",
    "call rax",
    "add rsp, 8",
    "xor eax, eax",
    "2:",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbx",
    "pop rbp",
    "ret",
    "guest_unwind:",
    "mov eax, {data}",
    "mov ds, eax",
    "mov es, eax",
    "mov ss, eax",
    "mov rsp, [rip + guest_unwind_stack]",
    "push 2",
    "popfq",
    "mov eax, 1",
    "jmp 2b",
    "guest_trap_common:",
    "push rax",
    "push rcx",
    "push rdx",
    "push rbx",
    "push rbp",
    "push rsi",
    "push rdi",
    "push r8",
    "push r9",
    "push r10",
    "push r11",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "cld",
    "mov rdi, rsp",
    "call {handle}",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop r11",
    "pop r10",
    "pop r9",
    "pop r8",
    "pop rdi",
    "pop rsi",
    "pop rbp",
    "pop rbx",
    "pop rdx",
    "pop rcx",
    "pop rax",
    "add rsp, 16",
    "iretq",
    data = const crate::tables::KERNEL_DATA,
    handle = sym handle,
);

#[cfg(target_arch = "x86")]
core::arch::global_asm!(
    "guest_catch:",
    "push ebp",
    "push ebx",
    "push esi",
    "push edi",
    "mov [guest_unwind_stack], esp",
    "mov eax, [esp + 20]",
    "mov ecx, [esp + 24]",
    "sub esp, 8",
    "push ecx",
    "call eax",
    "add esp, 12",
    "xor eax, eax",
    "2:",
    "pop edi",
    "pop esi",
    "pop ebx",
    "pop ebp",
    "ret",
    "guest_unwind:",
    "mov eax, {data}",
    "mov ds, eax",
    "mov es, eax",
    "mov ss, eax",
    "mov esp, [guest_unwind_stack]",
    "push 2",
    "popfd",
    "mov eax, 1",
    "jmp 2b",
    "guest_trap_common:",
    "pushad",
    "mov eax, ds",
    "push eax",
    "mov eax, es",
    "push eax",
    "mov eax, {data}",
    "mov ds, eax",
    "mov es, eax",
    "cld",
    "mov eax, esp",
    "mov ebp, esp",
    "and esp, -16",
    "sub esp, 12",
    "push eax",
    "call {handle}",
    "mov esp, ebp",
    "pop eax",
    "mov es, eax",
    "pop eax",
    "mov ds, eax",
    "popad",
    "add esp, 8",
    "iretd",
    data = const crate::tables::KERNEL_DATA,
    handle = sym handle,
);

// A stub pushes a zero where the processor pushes no error code (SDM vol. 3, table 6-1).
core::arch::global_asm!(
    ".balign 16",
    "guest_trap_stubs:",
    ".set guest_vector, 0",
    ".rept 256",
    ".balign 16",
    ".if guest_vector != 8 && guest_vector != 17 && guest_vector != 21 && \
     (guest_vector < 10 || guest_vector > 14) && guest_vector != 29 && guest_vector != 30",
    "push 0",
    ".endif",
    "push guest_vector",
    "jmp guest_trap_common",
    ".set guest_vector, guest_vector + 1",
    ".endr",
);
